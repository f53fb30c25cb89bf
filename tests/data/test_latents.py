import math
import pickle
import types

import numpy as np
import pytest
import torch

from fastlatent.data.latents import LatentDataset, draw_latents
from fastlatent.data.loader import LatentLoader
from fastlatent.ops import sample_posterior


def same(one, other):
    assert one.keys() == other.keys()
    for name in one:
        equal = torch.equal(one[name], other[name]) if isinstance(one[name], torch.Tensor) else one[name] == other[name]
        assert equal, name


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_rows_are_what_was_stored(make, make_row, tmp_path, dtype):
    dataset = LatentDataset(make(tmp_path, 12, flips=1, dtype=dtype))
    assert len(dataset) == 12
    for i in (0, 4, 5, 11, -1):  # both ends of the first shard, the next one, the last row
        sample = dataset[i]
        assert torch.equal(sample["moments"], make_row(i % 12, (1, 4, 3, 3), dtype))
        assert (int(sample["label"]), sample["label"].dtype) == (i % 12 % 3, torch.int64)
        assert sample["key_hash"].dtype == torch.int64
    assert len({int(dataset[i]["key_hash"]) for i in range(12)}) == 12


@pytest.mark.parametrize("index", [23, -24])
def test_index_out_of_range(path, index):
    with pytest.raises(IndexError, match=f"index {index} of 23 rows"):
        LatentDataset(path)[index]


def test_only_some_columns(path):
    dataset = LatentDataset(path, columns=("label",))
    assert list(dataset[3]) == ["label"]
    assert not dataset._readers  # no shard was opened
    with pytest.raises(ValueError, match=r"unknown columns \['pixels'\]; known: moments, label, key_hash"):
        LatentDataset(path, columns=("label", "pixels"))


def test_what_is_no_dataset(tmp_path):
    with pytest.raises(ValueError, match="expected a dataset"):
        LatentDataset(tmp_path)


@pytest.mark.parametrize(("workers", "start"), [(0, None), (2, "fork"), (2, "spawn")])
def test_torch_dataloader(path, workers, start):
    dataset = LatentDataset(path)
    dataset[0]  # maps the shards, so that forked workers inherit the mappings
    loader = torch.utils.data.DataLoader(
        dataset, batch_size=8, shuffle=False, num_workers=workers, multiprocessing_context=start
    )
    batches = list(loader)
    assert [len(batch["label"]) for batch in batches] == [8, 8, 7]
    want = LatentDataset(path).gather(np.arange(23))
    for name, values in want.items():
        assert torch.equal(torch.cat([batch[name] for batch in batches]), values)


def test_pickle_opens_it_again(path):
    dataset = LatentDataset(path, columns=("moments",))
    dataset[0]
    again = pickle.loads(pickle.dumps(dataset))
    same(again[3], dataset[3])
    assert len(pickle.dumps(dataset)) < 1000  # no mapping travels


def test_writing_to_a_batch_changes_no_file(path):
    before = LatentDataset(path)[0]["moments"].clone()
    dataset = LatentDataset(path)
    dataset[0]["moments"].zero_()
    dataset.gather(np.arange(3))["moments"].zero_()
    assert torch.equal(dataset[0]["moments"], before)


def test_in_a_lightning_data_module(path, tmp_path):
    """What a Trainer does with one, as far as data goes; the base class is Lightning's where it is installed."""
    try:
        from lightning import LightningDataModule
    except ImportError:

        class LightningDataModule:
            trainer = None

            def state_dict(self):
                return {}

    class Latents(LightningDataModule):
        def __init__(self, path, batch_size, seed=0):
            super().__init__()
            self.path, self.batch_size, self.seed, self.state = path, batch_size, seed, None

        def setup(self, stage):
            self.dataset = LatentDataset(self.path)

        def train_dataloader(self):
            self.loader = LatentLoader(
                self.dataset, self.batch_size, seed=self.seed, device=self.trainer.strategy.root_device,
                rank=self.trainer.global_rank, world_size=self.trainer.world_size,
            )  # fmt: skip
            if self.state is not None:
                self.loader.load_state_dict(self.state)
            return self.loader

        def val_dataloader(self):
            return torch.utils.data.DataLoader(self.dataset, batch_size=self.batch_size)

        def state_dict(self):
            return self.loader.state_dict()

        def load_state_dict(self, state):
            self.state = state

    def module():
        made = Latents(str(path), 8)
        made.trainer = types.SimpleNamespace(
            strategy=types.SimpleNamespace(root_device=torch.device("cpu")), global_rank=0, world_size=1
        )
        made.setup("fit")
        return made

    first = module()
    loader = first.train_dataloader()
    want = [*loader, *loader]
    assert sum(len(batch["label"]) for batch in first.val_dataloader()) == 23
    again = module()
    batches = iter(again.train_dataloader())
    same(next(batches), want[0])
    resumed = module()
    resumed.load_state_dict(pickle.loads(pickle.dumps(again.state_dict())))
    loader = resumed.train_dataloader()
    for batch, wanted in zip([*loader, *loader], want[1:], strict=True):
        same(batch, wanted)


# --- posterior samples ---


def batch(count, flips=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    moments = torch.randn(count, flips, 4, 3, 3, generator=generator)
    # Both halves of the range of 64-bit hashes.
    keys = torch.randint(-(2**63), 2**63 - 1, (count,), generator=generator)
    return moments, keys


def test_a_draw_depends_on_its_row_alone():
    moments, keys = batch(9)
    together = draw_latents(moments, keys, seed=1, epoch=2)
    assert (together.shape, together.dtype) == ((9, 2, 3, 3), torch.float32)
    order = torch.tensor([4, 8, 0, 2])
    assert torch.equal(draw_latents(moments[order], keys[order], seed=1, epoch=2), together[order])
    apart = [draw_latents(moments[i : i + 1], keys[i : i + 1], seed=1, epoch=2) for i in range(9)]
    assert torch.equal(torch.cat(apart), together)


def test_a_draw_is_the_op():
    moments, keys = batch(5)
    want = sample_posterior(moments, keys, seed=3, epoch=4)
    assert torch.equal(draw_latents(moments, keys, seed=3, epoch=4), want)


def test_seed_epoch_and_key_are_different_draws():
    moments = torch.zeros(1, 1, 4, 3, 3)
    draws = [
        draw_latents(moments, torch.tensor([key]), seed=seed, epoch=epoch)
        # Keys next to each other at both ends of the range: none may be rounded.
        for key in (0, 1, 2, 2**62, 2**62 + 1, -1, -2, -(2**63), -(2**63) + 1)
        for seed in (0, 1)
        for epoch in (0, 1)
    ]
    assert len({tuple(draw.flatten().tolist()) for draw in draws}) == len(draws)


@pytest.mark.filterwarnings("error")
def test_large_keys_warn_of_nothing():
    draw_latents(torch.zeros(1, 1, 4, 3, 3), torch.tensor([-1]), seed=2**63 - 1, epoch=2**31)


def test_half_of_the_rows_are_mirrored():
    # Means tell which of the two was drawn: 0 or 100. 20000 draws: 5 standard deviations are 1.8 %.
    moments = torch.zeros(20_000, 2, 2, 1, 1)
    moments[:, 1, 0] = 100
    keys = torch.arange(20_000)
    share = (draw_latents(moments, keys, seed=0, epoch=0) > 50).double().mean()
    assert abs(float(share) - 0.5) < 0.018
    again = draw_latents(moments, keys, seed=0, epoch=1) > 50
    changed = (again != (draw_latents(moments, keys, seed=0, epoch=0) > 50)).double().mean()
    assert abs(float(changed) - 0.5) < 0.018  # chosen anew each epoch


def test_noise_is_normal_and_independent_of_the_choice():
    moments, keys = torch.zeros(4000, 2, 2, 3, 3), torch.arange(4000)
    noise = draw_latents(moments, keys, seed=0, epoch=0).double()
    assert abs(float(noise.mean())) < 5 / math.sqrt(noise.numel())
    assert abs(float(noise.var()) - 1) < 5 * math.sqrt(2 / noise.numel())


def test_half_precision_moments_are_widened_first():
    moments, keys = batch(4)
    for dtype in (torch.float16, torch.bfloat16):
        got = draw_latents(moments.to(dtype), keys, seed=0, epoch=0)
        assert torch.equal(got, draw_latents(moments.to(dtype).float(), keys, seed=0, epoch=0))
