"""The DDPM objective: loss and draws against formulas of their own, previews, and what a run learns."""

from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch
from PIL import Image

from fastlatent.diffusion.noise import Draws
from fastlatent.models.unet import ConditionalUNet, UNetConfig, load_unet, unet_sizes
from fastlatent.training.ddpm import DdpmLoss, DdpmObjective, PixelBatches, Renormalised

CONDITIONS = (("temperature", 1), ("wind", 2))


def config_of(**change) -> UNetConfig:
    values = {
        "conditions": CONDITIONS, "condition_mean": [1.0, 0.0, 2.0], "condition_std": [2.0, 1.0, 0.5],
        "prediction_type": "epsilon", "beta_schedule": "linear", "channels": 3, "side": 4,
        "latents_mean": [0.0] * 3, "latents_std": [1.0] * 3, "vae": None,
    }  # fmt: skip
    return UNetConfig(**{**values, **change})


def model_of(config) -> ConditionalUNet:
    torch.manual_seed(0)
    kind = "UNet2DConditionModel"
    sizes = unet_sizes(config, kind=kind, block_out_channels=(8, 8), layers_per_block=1, norm_groups=4)
    return ConditionalUNet(kind, sizes, config.vector_width)


class Samples:
    """24 samples of latents, 8 a step: those with the numbers [first, last) of each."""

    steps_per_epoch = 3
    left_out: ClassVar = {"a.png": "is empty"}

    def __init__(self, first=0, last=8) -> None:
        self.rows = slice(first, last)
        random = torch.Generator().manual_seed(1)
        self.latents = torch.randn(3, 8, 3, 4, 4, generator=random)
        self.condition = torch.randn(3, 8, 3, generator=random)
        self.present = (torch.rand(3, 8, 2, generator=random) < 0.7).float()

    def batch(self, step):
        epoch, at = divmod(step, 3)
        ids = (torch.arange(8) + 8 * at)[self.rows]
        return {
            "latents": self.latents[at][self.rows], "draws": Draws(ids, 5, epoch), "label": ids,
            "condition": self.condition[at][self.rows], "condition_present": self.present[at][self.rows],
        }  # fmt: skip


def objective_of(batches=None, config=None, **change) -> DdpmObjective:
    config = config or config_of()
    loss = DdpmLoss(model_of(config), prediction_type=config.prediction_type, beta_schedule=config.beta_schedule)
    settings = {
        "cond_dropout_prob": 0.25, "previews": 5, "preview_steps": 2, "decode": lambda pixels: pixels, "seed": 5,
        "device": torch.device("cpu"),
    }  # fmt: skip
    return DdpmObjective(batches or Samples(), loss, config, **settings | change)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_loss_is_the_mean_squared_error_of_the_target(prediction_type):
    objective = objective_of(config=config_of(prediction_type=prediction_type))
    objective.module.double()
    batch = objective.batch(0)
    seen = {}
    model = objective.loss.model
    model.register_forward_hook(lambda module, inputs, output: seen.update(x=inputs[0], output=output))
    loss, _ = objective.module(batch)
    # Ho et al. 2020: betas from 1e-4 to 0.02 in 1000 steps.
    alpha_bar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[batch["t"].numpy()][:, None, None, None]
    clean, noise = batch["latents"].double().numpy(), batch["noise"].double().numpy()
    np.testing.assert_allclose(seen["x"], np.sqrt(alpha_bar) * clean + np.sqrt(1 - alpha_bar) * noise, atol=1e-14)
    wanted = noise if prediction_type == "epsilon" else np.sqrt(alpha_bar) * noise - np.sqrt(1 - alpha_bar) * clean
    expected = np.mean((seen["output"].detach().numpy() - wanted) ** 2)
    assert loss.dtype == torch.float64
    np.testing.assert_allclose(loss.item(), expected, rtol=1e-13)


def test_half_precision_weights_give_a_float32_loss():
    objective = objective_of()
    loss, _ = objective.module.bfloat16()(objective.batch(0))
    assert loss.dtype == torch.float32 and loss.isfinite()


def test_two_processes_draw_what_one_does():
    whole = objective_of().batch(4)
    halves = [objective_of(Samples(first, first + 4)).batch(4) for first in (0, 4)]
    assert whole.keys() == {"latents", "noise", "t", "vector"}
    for name, values in whole.items():
        assert len(values) == 8 and torch.equal(values, torch.cat([half[name] for half in halves]))
    again, other = objective_of().batch(4), objective_of().batch(1)  # the same samples an epoch before
    assert torch.equal(whole["noise"], again["noise"]) and not torch.equal(whole["noise"], other["noise"])


def test_draws_have_their_distributions():
    objective = objective_of()
    batches = [objective.batch(step) for step in range(300)]
    t = torch.cat([batch["t"] for batch in batches]).double()
    dropped = torch.cat([batch["vector"][:, -1] for batch in batches]).double()
    # 2400 draws: 4 standard deviations are 24 of 1000 timesteps, and 0.035 of the share.
    assert t.min() < 10 and t.max() > 989 and abs(t.mean() - 499.5) < 24
    assert abs(dropped.mean() - 0.25) < 0.035
    vector = torch.cat([batch["vector"] for batch in batches])
    assert (vector[dropped == 1][:, :-1] == 0).all()
    assert (vector[dropped == 0][:, 3:5].sum(dim=0) > 0).all()


@pytest.mark.parametrize(("prob", "share"), [(0.0, 0.0), (1.0, 1.0)])
def test_dropout_of_none_and_all(prob, share):
    objective = objective_of(cond_dropout_prob=prob)
    assert torch.cat([objective.batch(step)["vector"][:, -1] for step in range(9)]).mean() == share


def test_without_conditions_there_is_no_vector():
    objective = objective_of(config=config_of(conditions=(), condition_mean=[], condition_std=[]))
    batch = objective.batch(0)
    assert batch.keys() == {"latents", "noise", "t"}
    objective.module(batch)[0].backward()


def test_latents_of_another_normalisation():
    given = config_of(latents_mean=[1.0, 2.0, 3.0], latents_std=[1.0, 2.0, 4.0])
    wanted = config_of(latents_mean=[0.5, 0.0, -1.0], latents_std=[2.0, 0.5, 3.0])
    samples = Samples()
    raw = (
        samples.batch(0)["latents"] * torch.tensor([1.0, 2.0, 4.0])[:, None, None]
        + torch.tensor([1.0, 2.0, 3.0])[:, None, None]
    )
    expected = (raw - torch.tensor([0.5, 0.0, -1.0])[:, None, None]) / torch.tensor([2.0, 0.5, 3.0])[:, None, None]
    torch.testing.assert_close(Renormalised(samples, given, wanted).batch(0)["latents"], expected)


def test_a_checkpoint_has_the_average_and_previews(tmp_path):
    objective = objective_of()
    weights = {name: torch.full_like(p, 0.01).detach() for name, p in objective.module.named_parameters()}
    folder = tmp_path / ".tmp-checkpoint-000120-abc"
    folder.mkdir()
    assert objective.save(folder, weights, hurried=False) == {}
    model, config = load_unet(folder)
    assert config == objective.config
    assert all((p == 0.01).all() for p in model.parameters())
    pictures = sorted(path.name for path in (folder / "images").iterdir())
    assert pictures == [f"sample_step120_img{i}.png" for i in range(5)]
    assert np.asarray(Image.open(folder / "images" / pictures[0])).shape == (4, 4, 3)
    assert (folder / "preview.png").exists()


def test_previews_of_diverged_weights_and_without_a_decoder(tmp_path):
    for name, objective in {"nan": objective_of(), "none": objective_of(decode=None)}.items():
        weights = {name: torch.full_like(p, float("nan")) for name, p in objective.module.named_parameters()}
        (tmp_path / name).mkdir()
        objective.save(tmp_path / name, weights, hurried=False)
        assert (tmp_path / name / "preview.png").exists() == (name == "nan")


def test_a_hurried_checkpoint_is_whole_but_for_previews(tmp_path):
    objective = objective_of(decode=lambda pixels: pytest.fail("there is no time to draw"))
    weights = {name: p.detach() for name, p in objective.module.named_parameters()}
    assert objective.save(tmp_path, weights, hurried=True) == {}
    assert load_unet(tmp_path)[1] == objective.config
    assert {path.name for path in tmp_path.iterdir()} == {"unet", "scheduler_config.json", "vae_source.json"}


def test_left_out_files_are_those_of_the_batches():
    given = config_of(latents_std=[2.0] * 3)
    objective = objective_of(Renormalised(Samples(), given, config_of()))
    assert objective.left_out() == {"a.png": "is empty"}
    pixels = PixelBatches(SimpleNamespace(left_out={"b.png": "is no image"}), seed=0)
    assert pixels.left_out == {"b.png": "is no image"}


def test_a_step_makes_no_tensor_from_numbers(monkeypatch):
    """On CUDA such a tensor is copied from memory that is not pinned, which waits for all work that is queued."""
    given = config_of(latents_std=[2.0] * 3)
    samples = Samples()
    objective = objective_of(Renormalised(samples, given, config_of()))
    stored = samples.batch(1)
    samples.batch = lambda step: stored
    objective.batch(1)
    made = []
    for name in ("tensor", "as_tensor", "from_numpy"):
        monkeypatch.setattr(torch, name, lambda *a, _name=name, **k: made.append(_name))
    monkeypatch.setattr(torch.Tensor, "new_tensor", lambda *a, **k: made.append("new_tensor"))
    monkeypatch.setattr(Draws, "normal", lambda self, name, shape: stored["latents"])
    monkeypatch.setattr(Draws, "integers", lambda self, name, high: stored["label"])
    monkeypatch.setattr(Draws, "uniform", lambda self, name: stored["condition"][:, 0])
    assert objective.batch(1)["vector"].shape == (8, 6)
    assert not made


def test_previews_show_the_conditions_of_the_first_samples():
    seen = []
    objective = objective_of(previews=9)  # one more than a batch
    model = objective.loss.model
    model.register_forward_hook(lambda module, inputs, output: seen.append(inputs[2]))
    objective._preview(model)
    first = Samples().batch(0)["condition"][0], Samples().batch(0)["condition_present"][0]
    expected = [(first[0][i] - [1.0, 0.0, 2.0][i]) / [2.0, 1.0, 0.5][i] * first[1][(0, 1, 1)[i]] for i in range(3)]
    assert len(seen) == 2 and seen[0].shape == (9, 6)
    torch.testing.assert_close(seen[0][0], torch.stack([*expected, *first[1], torch.tensor(0.0)]))
