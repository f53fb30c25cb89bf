import numpy as np
import pytest

from fastlatent.data import order as order_module
from fastlatent.data.order import BatchOrder, BucketOrder, Permutation


@pytest.mark.parametrize(
    ("count", "batch_size"),
    [(1, 1), (7, 1), (7, 7), (8, 3), (100, 8)],  # one sample; batches of one; one batch; a rest of 2; a rest of 4
)
def test_every_epoch_is_a_permutation(count, batch_size):
    order = BatchOrder(count, batch_size, seed=3)
    assert order.steps_per_epoch == count // batch_size
    seen = []
    for epoch in range(3):
        batches = []
        for step in range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch):
            got, indices = order.indices(step)
            assert got == epoch
            assert (indices.shape, indices.dtype) == ((batch_size,), np.int64)
            batches.append(indices)
        joined = np.concatenate(batches)
        assert len(set(joined.tolist())) == len(joined) == count - count % batch_size
        assert joined.min() >= 0
        assert joined.max() < count
        seen.append(joined.tolist())
    if count == 100:
        assert seen[0] != seen[1] != seen[2]
        assert seen[0] != sorted(seen[0])
        # Another rest is left out in each epoch.
        assert set(seen[0]) != set(seen[1])


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8])
def test_ranks_share_the_same_batches(world_size):
    whole = BatchOrder(50, 24, seed=1)
    ranks = [BatchOrder(50, 24, seed=1, rank=rank, world_size=world_size) for rank in range(world_size)]
    for step in range(5):  # two epochs of 2 steps, and one step more
        parts = [rank.indices(step) for rank in ranks]
        np.testing.assert_array_equal(np.stack([part for _, part in parts], axis=1).flatten(), whole.indices(step)[1])
        assert {epoch for epoch, _ in parts} == {step // 2}


def test_a_step_depends_on_nothing_before_it():
    forwards = BatchOrder(20, 4, seed=9)
    all_steps = [forwards.indices(step)[1] for step in range(20)]
    for step in (19, 0, 7, 13):
        np.testing.assert_array_equal(BatchOrder(20, 4, seed=9).indices(step)[1], all_steps[step])


def test_seeds_and_epochs_are_different_streams():
    def first(seed, epoch):
        return tuple(BatchOrder(30, 30, seed=seed).indices(epoch)[1].tolist())

    orders = {first(seed, epoch) for seed in (0, 1, 2**63 - 1) for epoch in (0, 1, 10**6)}
    assert len(orders) == 9


def test_position_and_sample_are_independent():
    # Each sample stands at every place equally often: chi-square of 20 x 20 places over 4000 epochs.
    count, epochs = 20, 4000
    order = BatchOrder(count, count, seed=0)
    places = np.zeros((count, count))
    for epoch in range(epochs):
        places[order.indices(epoch)[1], np.arange(count)] += 1
    expected = epochs / count
    chi2 = ((places - expected) ** 2 / expected).sum()
    freedom = (count - 1) ** 2
    assert abs(chi2 - freedom) < 5 * np.sqrt(2 * freedom)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((10, 0), r"expected 1 to 10 \(the number of samples\), got 0"),
        ((10, 11), "expected 1 to 10"),
        ((0, 1), "expected 1 to 0"),
        ((10, 4, 0, 0, 3), "batch_size 4 must be a multiple of world_size 3"),
        ((10, 4, 0, 2, 2), "rank below it, got 2"),
        ((10, 4, 0, -1, 2), "rank below it, got -1"),
    ],
)
def test_refused(arguments, message):
    count, batch_size, *rest = arguments
    options = dict(zip(("seed", "rank", "world_size"), rest, strict=False))
    with pytest.raises(ValueError, match=message):
        BatchOrder(count, batch_size, **options)


@pytest.mark.parametrize("counts", [range(1, 101), pytest.param(range(101, 301), marks=pytest.mark.soak)])
def test_small_permutations_and_their_inverses(counts):
    for count in counts:
        permutation, places = Permutation(3, 7, count % 5, count), np.arange(count)
        samples = permutation(places)
        assert sorted(samples.tolist()) == places.tolist()
        np.testing.assert_array_equal(permutation.inverse(samples), places)


# A square, where nothing is beyond the count; one more: 1023 numbers are; ImageNet; more than 32 bits count.
@pytest.mark.parametrize("count", [1024**2, 1024**2 + 1, 1_281_167, 2**32])
def test_large_permutations(count):
    permutation = Permutation(0, 1, 2, count)
    places = np.unique(np.random.default_rng(0).integers(0, count, 20_000))
    samples = permutation(places)
    assert samples.min() >= 0 and samples.max() < count
    assert len(np.unique(samples)) == len(places)
    np.testing.assert_array_equal(permutation.inverse(samples), places)
    # Neighbours go to places that have nothing to do with each other: correlation 0 within 5 standard deviations.
    near = permutation(np.arange(10_000)) / count
    for distance in (1, 2, 1024, 1132):  # 1132: the side of ImageNet's square
        correlation = np.corrcoef(near[:-distance], near[distance:])[0, 1]
        assert abs(correlation) < 5 / np.sqrt(10_000 - distance), distance
    # And they fall evenly: 100 tenths of a tenth.
    tenths = np.bincount((near * 100).astype(int), minlength=100)
    assert abs(((tenths - 100) ** 2 / 100).sum() - 99) < 5 * np.sqrt(2 * 99)


# 5 of 3 x 2: where six rounds fail. 7 of 3 x 3, 10 of 4 x 3: some numbers are beyond the count. 16, 20: none.
@pytest.mark.parametrize("count", [3, 5, 7, 10, 16, 20])
def test_pairs_of_places_are_equally_frequent(count):
    epochs = 4000
    pairs = np.zeros((count, count))
    for epoch in range(epochs):
        first, second = Permutation(0, 5, epoch, count)(np.array([0, 1]))
        pairs[first, second] += 1
    assert not pairs.diagonal().any()
    expected = epochs / (count * (count - 1))
    chi2 = ((pairs[~np.eye(count, dtype=bool)] - expected) ** 2 / expected).sum()
    freedom = count * (count - 1) - 1
    assert abs(chi2 - freedom) < 5 * np.sqrt(2 * freedom)


def test_a_batch_costs_what_it_holds(monkeypatch):
    """Whatever the count: 2^40 samples would be 8 TiB of indices."""
    order = BatchOrder(2**40, 256)
    tables = order_module._tables
    sizes = []
    monkeypatch.setattr(order_module, "_tables", lambda *key: sizes.append(tables(*key)) or sizes[-1])
    assert len(set(order.indices(12345)[1].tolist())) == 256
    assert sum(part.nbytes for entry in sizes for pair in entry.rounds for part in pair) <= 32 * 2**21


def test_the_order_is_pinned():
    """A training that goes on after an update must see the samples it would have seen."""
    assert BatchOrder(1_281_167, 4, seed=7).indices(2 * 320_291 + 5)[1].tolist() == [646680, 489576, 1133332, 1201204]
    assert Permutation(7, 1, 2, 10)(np.arange(10)).tolist() == [4, 1, 6, 9, 3, 8, 0, 2, 7, 5]


# --- buckets ---

# Three whole batches of 4 and a rest; none; exactly one; no sample; two and a rest.
SIZES = (13, 3, 4, 0, 9)


def buckets():
    """Samples numbered through; the first of the last bucket is 20."""
    numbers = np.random.default_rng(1).permutation(sum(SIZES))
    return np.split(numbers, np.cumsum(SIZES)[:-1])


def test_every_batch_is_of_one_bucket():
    parts = buckets()
    order = BucketOrder(parts, 4, seed=5)
    assert (order.count, order.steps_per_epoch) == (29, 6)
    sequences, left_out = set(), set()
    for epoch in range(12):
        seen, sequence = [], []
        for step in range(6):
            got, indices = order.indices(6 * epoch + step)
            assert (got, indices.shape, indices.dtype) == (epoch, (4,), np.int64)
            of = [i for i, part in enumerate(parts) if set(indices.tolist()) <= set(part.tolist())]
            assert len(of) == 1
            sequence += of
            seen += indices.tolist()
        assert sorted(sequence) == [0, 0, 0, 2, 4, 4]
        assert len(set(seen)) == 24
        sequences.add(tuple(sequence))
        left_out.add(tuple(set(parts[0].tolist()) - set(seen)))
    assert len(sequences) > 4 and len(left_out) > 4  # both are drawn anew each epoch


def test_equal_buckets_have_orders_of_their_own():
    first, second = BucketOrder([np.arange(50), np.arange(50, 100)], 50).indices, {}
    for step in range(2):
        indices = first(step)[1]
        second[int(indices[0]) // 50] = (indices % 50).tolist()
    assert second[0] != second[1]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_share_the_same_bucket(world_size):
    whole = BucketOrder(buckets(), 4, seed=2)
    ranks = [BucketOrder(buckets(), 4, seed=2, rank=rank, world_size=world_size) for rank in range(world_size)]
    for step in (7, 0, 3, 11):
        parts = np.stack([rank.indices(step)[1] for rank in ranks], axis=1)
        np.testing.assert_array_equal(parts.flatten(), whole.indices(step)[1])


@pytest.mark.parametrize(
    ("sizes", "arguments", "message"),
    [
        ((3, 4), (5,), r"expected 1 to 4 \(the samples of the largest bucket\), got 5; use --batch-size 4"),
        ((3, 4), (0,), "expected 1 to 4"),
        ((), (1,), "expected 1 to 0"),
        ((8,), (4, 0, 0, 3), "batch_size 4 must be a multiple of world_size 3"),
    ],
)
def test_buckets_refused(sizes, arguments, message):
    batch_size, *rest = arguments
    options = dict(zip(("seed", "rank", "world_size"), rest, strict=False))
    with pytest.raises(ValueError, match=message):
        BucketOrder([np.arange(size) for size in sizes], batch_size, **options)
