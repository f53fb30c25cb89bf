import numpy as np
import pytest

from fastlatent.data.order import BatchOrder


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


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_share_the_same_batches(world_size):
    whole = BatchOrder(50, 8, seed=1)
    ranks = [BatchOrder(50, 8, seed=1, rank=rank, world_size=world_size) for rank in range(world_size)]
    for step in range(13):  # two epochs of 6 steps, and one step more
        parts = [rank.indices(step)[1] for rank in ranks]
        assert all(len(part) == 8 // world_size for part in parts)
        np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.sort(whole.indices(step)[1]))
        assert all(rank.indices(step)[0] == step // 6 for rank in ranks)


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
