"""Which samples a step sees: a pure function of (seed, step), whatever was interrupted, on any number of ranks."""

from __future__ import annotations

import functools

import numpy as np

from fastlatent.diffusion.noise import philox

# Separates the permutation's stream from sample noise, whose ids are 64-bit hashes.
_ORDER_ID = 0x6F72646572  # "order"


class BatchOrder:
    """Batches of indices over `count` samples, reshuffled each epoch; the incomplete last batch is dropped.

    Args:
        count: samples in the dataset.
        batch_size: samples per step over all ranks.

    Raises:
        ValueError: the batch is larger than the dataset, or the ranks do not divide it.
    """

    def __init__(self, count: int, batch_size: int, *, seed: int = 0, rank: int = 0, world_size: int = 1) -> None:
        if not 1 <= batch_size <= count:
            raise ValueError(
                f"batch_size: expected 1 to {count} (the number of samples), got {batch_size}; use --batch-size {count}"
            )
        if batch_size % world_size or not 0 <= rank < world_size:
            raise ValueError(
                f"batch_size {batch_size} must be a multiple of world_size {world_size}, and rank below it, got {rank}"
            )
        self.count, self.batch_size, self.seed = count, batch_size, seed
        self._slice = slice(rank, None, world_size)
        self.steps_per_epoch = count // batch_size

    def indices(self, step: int) -> tuple[int, np.ndarray]:
        """(epoch, int64 indices of this rank) of a step counted from 0."""
        epoch, batch = divmod(step, self.steps_per_epoch)
        begin = batch * self.batch_size
        return epoch, _permutation(self.seed, epoch, self.count)[begin : begin + self.batch_size][self._slice]


@functools.lru_cache(maxsize=4)  # every step of an epoch asks for it; a training and a held-out order fit
def _permutation(seed: int, epoch: int, count: int) -> np.ndarray:
    return philox(seed, _ORDER_ID, epoch).permutation(count)
