import math
import pickle

import numpy as np
import pytest
import torch

from fastlatent.data.latents import LatentDataset, LatentLoader, draw_latents
from fastlatent.diffusion.noise import philox


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
    assert dataset._table is None  # no shard was opened
    with pytest.raises(ValueError, match=r"unknown columns \['pixels'\]; known: moments, label, key_hash"):
        LatentDataset(path, columns=("label", "pixels"))


def test_what_is_no_dataset(tmp_path):
    with pytest.raises(ValueError, match="expected a dataset"):
        LatentDataset(tmp_path)


@pytest.mark.parametrize("workers", [0, 1])
def test_torch_dataloader(path, workers):
    dataset = LatentDataset(path)
    dataset[0]  # maps the first shard, so that a forked worker inherits the mapping
    loader = torch.utils.data.DataLoader(
        dataset, batch_size=8, shuffle=False, num_workers=workers,
        multiprocessing_context="fork" if workers else None,
    )  # fmt: skip
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


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_read_the_same_global_batches(path, world_size):
    dataset = LatentDataset(path)
    whole = LatentLoader(dataset, 8, seed=4)
    ranks = [LatentLoader(dataset, 8, seed=4, rank=r, world_size=world_size) for r in range(world_size)]
    for step in range(5):
        want = set(whole.batch(step)["key_hash"].tolist())
        got = [key for rank in ranks for key in rank.batch(step)["key_hash"].tolist()]
        assert len(got) == 8
        assert set(got) == want
        assert {rank.batch(step)["epoch"] for rank in ranks} == {step // 2}


def test_a_batch_is_what_the_order_says(path):
    dataset = LatentDataset(path)
    loader = LatentLoader(dataset, 8, seed=4)
    epoch, indices = loader.order.indices(3)
    batch = loader.batch(3)
    same(batch, {**dataset.gather(indices), "epoch": epoch})
    assert batch["moments"].shape == (8, 2, 4, 3, 3)


def test_iterating_covers_an_epoch_and_goes_on(path):
    loader = LatentLoader(LatentDataset(path), 8)
    assert len(loader) == 2
    epochs = [[batch["epoch"] for batch in loader] for _ in range(3)]
    assert epochs == [[0, 0], [1, 1], [2, 2]]


@pytest.mark.parametrize("stop", [0, 1, 2, 3, 5])  # nowhere, inside an epoch, at its end, in later epochs
def test_state_resumes_in_the_middle(path, stop):
    dataset = LatentDataset(path)
    whole = LatentLoader(dataset, 8, seed=2)
    want = [batch for _ in range(4) for batch in whole]
    first = LatentLoader(dataset, 8, seed=2)
    got = []
    while len(got) < stop:
        for batch in first:
            got.append(batch)
            if len(got) == stop:
                break
    state = pickle.loads(pickle.dumps(first.state_dict()))
    second = LatentLoader(dataset, 8, seed=2)
    second.load_state_dict(state)
    while len(got) < len(want):
        got += list(second)
    for one, other in zip(got, want, strict=True):
        same(one, other)


@pytest.mark.parametrize(("options", "name"), [({"seed": 1}, "seed"), ({"batch_size": 4}, "batch_size")])
def test_state_of_another_order(path, options, name):
    dataset = LatentDataset(path)
    state = LatentLoader(dataset, **{"batch_size": 8, "seed": 0}).state_dict()
    with pytest.raises(ValueError, match=f"the state has {name}"):
        LatentLoader(dataset, **{"batch_size": 8, "seed": 0, **options}).load_state_dict(state)


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


def test_a_draw_is_mean_plus_std_times_philox_noise():
    moments, keys = batch(5, flips=1)
    got = draw_latents(moments, keys, seed=3, epoch=4)
    for i in range(5):
        generator = philox(3, int(keys[i]) % 2**64, 4)
        generator.integers(1)
        noise = generator.standard_normal((2, 3, 3), dtype=np.float32)
        mean, logvar = moments[i, 0].double().chunk(2)
        want = mean + (logvar / 2).exp() * torch.from_numpy(noise).double()
        torch.testing.assert_close(got[i].double(), want, rtol=1e-6, atol=1e-6)


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
