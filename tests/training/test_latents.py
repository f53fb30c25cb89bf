from types import SimpleNamespace

import torch

from fastlatent.diffusion.noise import Draws
from fastlatent.ops.sample_posterior import sample_posterior_reference
from fastlatent.training.latents import LatentBatches


class Loader:
    """What a LatentLoader gives: 6 rows, all of them in every batch."""

    steps_per_epoch = 1

    def __init__(self, payload="moments", flips=1, dtype=torch.float32, conditions=False):
        shape = (6, flips, 8 if payload == "moments" else 4, 3, 3)
        values = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        self.rows = {"label": torch.arange(6), "key_hash": torch.arange(6) * 7 - 20}
        if dtype == torch.int8:
            self.rows["scale"] = torch.full((6, flips), 0.05)
            values = (values / 0.05).round().clamp(-127, 127)
        self.rows[payload] = values.to(dtype)
        if conditions:
            self.rows |= {"condition": torch.arange(24.0).reshape(6, 4), "condition_present": torch.ones(6, 3)}

    def batch(self, step):
        order = torch.randperm(6, generator=torch.Generator().manual_seed(step))
        return {name: value[order] for name, value in self.rows.items()} | {"epoch": step}


MEAN, STD = torch.tensor([0.5, -0.5, 0.0, 1.0], dtype=torch.float64), torch.tensor([1.0, 2.0, 0.5, 4.0])


def batches(loader, **options):
    return LatentBatches(loader, mean=MEAN, std=STD, seed=3, **options)


def test_latents_without_a_posterior_are_normalised():
    loader = Loader("latents")
    assert batches(loader).steps_per_epoch == 1
    batch = batches(loader).batch(2)
    assert set(batch) == {"latents", "label", "draws"}
    stored = loader.rows["latents"][batch["label"], 0].double()
    wanted = (stored - MEAN[:, None, None]) / STD.double()[:, None, None]
    assert (batch["latents"].shape, batch["latents"].dtype) == ((6, 4, 3, 3), torch.float32)
    torch.testing.assert_close(batch["latents"].double(), wanted, rtol=1e-6, atol=1e-6)


def test_posterior_noise_and_mirroring_follow_the_sample_not_its_place():
    loader = Loader(flips=2)
    found = {}
    for step, epoch in ((0, 0), (1, 0), (2, 1), (2, 2)):
        given = loader.batch(step) | {"epoch": epoch}
        batch = batches(SimpleNamespace(batch=lambda step, given=given: given)).batch(step)
        order = batch["label"].argsort()
        latents = found[step, epoch] = batch["latents"][order]
        mean, std = MEAN.float(), STD
        rows, hashes = loader.rows["moments"], loader.rows["key_hash"]
        wanted = sample_posterior_reference(rows, hashes, 3, epoch, mean, std, None, True, torch.float32)
        torch.testing.assert_close(latents, wanted, rtol=1e-4, atol=1e-4)
    assert torch.equal(found[0, 0], found[1, 0])
    assert not torch.isclose(found[2, 1], found[2, 2]).flatten(1).all(1).any()
    # Both the image and its mirror image occur.
    noiseless = Loader("latents", flips=2)
    epochs = [batches(noiseless).batch(step) for step in range(20)]
    drawn = torch.stack([one["latents"][one["label"].argsort()] for one in epochs])
    assert [len(row.flatten(1).unique(dim=0)) for row in drawn.unbind(1)] == [2] * 6


def test_draws_belong_to_the_samples():
    batch = batches(Loader()).batch(4)
    assert isinstance(batch["draws"], Draws)
    assert (batch["draws"].seed, batch["draws"].epoch) == (3, 4)
    assert torch.equal(batch["draws"].ids, batch["label"] * 7 - 20)


def test_int8_rows_have_a_scale():
    loader = Loader("latents", dtype=torch.int8)
    batch = batches(loader).batch(0)
    stored = loader.rows["latents"][batch["label"], 0].double() * 0.05
    wanted = (stored - MEAN[:, None, None]) / STD.double()[:, None, None]
    torch.testing.assert_close(batch["latents"].double(), wanted, rtol=1e-5, atol=1e-5)


def test_conditions_are_given_and_selected():
    loader = Loader(conditions=True)
    batch = batches(loader).batch(0)
    assert torch.equal(batch["condition"], loader.rows["condition"][batch["label"]])
    assert torch.equal(batch["condition_present"], torch.ones(6, 3))
    some = batches(loader, conditions=([3, 0], [2, 0])).batch(0)
    assert torch.equal(some["condition"], batch["condition"][:, [3, 0]])
    assert some["condition_present"].shape == (6, 2)
