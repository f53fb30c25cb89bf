"""Which samples a step sees: a pure function of (seed, step), whatever was interrupted, on any number of ranks."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from fastlatent.diffusion.noise import philox

# Streams of the permutations, apart from sample noise, whose ids are 64-bit hashes. The order in bucket i has
# _ORDER_ID + i.
_ORDER_ID = 0x6F72646572  # "order"
_BATCHES_ID = 0x62617463686573  # "batches"

# Six rounds with random functions cannot be told from a random permutation by fewer than about sqrt(count) of its
# values (Patarin, "Security of random Feistel schemes with 5 or more rounds", CRYPTO 2004). That says little of small
# counts: after six, the pairs of places that two of 5 samples take are not equally frequent (chi-square 5 standard
# deviations off in 8000 epochs); after eight they are, for every count tried. The 64 us of a batch of 256 are theirs.
_ROUNDS = 8


class BatchOrder:
    """Batches of indices over `count` samples, reshuffled each epoch; the incomplete last batch is dropped.

    Args:
        count: samples in the dataset.
        batch_size: samples per step over all ranks.
        seed: below 2**64.
        rank, world_size: this rank sees every world_size-th sample of each batch, from the rank-th on.

    Raises:
        ValueError: the batch is larger than the dataset, or the ranks do not divide it.
    """

    def __init__(self, count: int, batch_size: int, *, seed: int = 0, rank: int = 0, world_size: int = 1) -> None:
        if not 1 <= batch_size <= count:
            raise ValueError(
                f"batch_size: expected 1 to {count} (the number of samples), got {batch_size}; use --batch-size {count}"
            )
        _check_ranks(batch_size, rank, world_size)
        self.count, self.batch_size, self.seed = count, batch_size, seed
        self.rank, self.world_size = rank, world_size
        self.steps_per_epoch = count // batch_size

    def indices(self, step: int) -> tuple[int, np.ndarray]:
        """(epoch, int64 indices of this rank) of a step counted from 0."""
        epoch, batch = divmod(step, self.steps_per_epoch)
        begin = batch * self.batch_size
        positions = np.arange(begin + self.rank, begin + self.batch_size, self.world_size)
        return epoch, Permutation(self.seed, _ORDER_ID, epoch, self.count)(positions)


class BucketOrder:
    """As BatchOrder over samples of several buckets, every batch from one of them, buckets in random order.

    Each bucket's incomplete last batch is dropped, which is another one each epoch; a bucket with fewer samples than a
    batch is never seen.

    Args:
        buckets: int64 [N_i], the samples of each bucket. Kept, not copied.
        batch_size, seed, rank, world_size: as for BatchOrder.

    Raises:
        ValueError: no bucket fills a batch, or the ranks do not divide it.
    """

    def __init__(
        self, buckets: Sequence[np.ndarray], batch_size: int, *, seed: int = 0, rank: int = 0, world_size: int = 1
    ) -> None:
        largest = max((len(bucket) for bucket in buckets), default=0)
        if not 1 <= batch_size <= largest:
            raise ValueError(
                f"batch_size: expected 1 to {largest} (the samples of the largest bucket), got {batch_size}; "
                f"use --batch-size {largest}"
            )
        _check_ranks(batch_size, rank, world_size)
        self.count, self.batch_size, self.seed = sum(map(len, buckets)), batch_size, seed
        self.rank, self.world_size = rank, world_size
        self._buckets = list(buckets)
        # Batches of an epoch before the order is drawn: bucket i has those from _first[i] to _first[i + 1].
        self._first = np.cumsum([0] + [len(bucket) // batch_size for bucket in buckets])
        self.steps_per_epoch = int(self._first[-1])

    def indices(self, step: int) -> tuple[int, np.ndarray]:
        """(epoch, int64 indices of this rank) of a step counted from 0."""
        epoch, batch = divmod(step, self.steps_per_epoch)
        drawn = int(Permutation(self.seed, _BATCHES_ID, epoch, self.steps_per_epoch)(np.array([batch]))[0])
        i = int(np.searchsorted(self._first, drawn, side="right")) - 1
        begin = (drawn - int(self._first[i])) * self.batch_size
        positions = np.arange(begin + self.rank, begin + self.batch_size, self.world_size)
        bucket = self._buckets[i]
        return epoch, bucket[Permutation(self.seed, _ORDER_ID + i, epoch, len(bucket))(positions)]


@dataclass(frozen=True)
class Permutation:
    """A pseudo-random permutation of [0, count): any part of it costs as much as that part is long.

    A Feistel network on pairs (l, r) of [0, a) x [0, b) with a = ceil(sqrt(count)), b = ceil(count / a), additions
    modulo a and modulo b in turn, and cycle walking: numbers from count on are mapped again until they are below
    (Black and Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002). Of a * b numbers fewer than a are beyond,
    where of the next power of two it could be half. The round functions are tables of random numbers, 32 * (a + b)
    bytes.

    Args:
        seed, id: below 2**64, key of the tables' generator.
        epoch: below 2**64.
        count: at least 1.
    """

    seed: int
    id: int
    epoch: int
    count: int

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        """The samples at `positions`: int64 [N], each in [0, count), to int64 [N]."""
        tables = _tables(self.seed, self.id, self.epoch, self.count)

        def step(values: np.ndarray) -> np.ndarray:
            (a, b), (left, right) = tables.sides, np.divmod(values, tables.sides[1])
            for to_left, to_right in tables.rounds:
                left = (left + to_left[right]) % a
                right = (right + to_right[left]) % b
            return left * b + right

        return self._walk(step, positions)

    def inverse(self, samples: np.ndarray) -> np.ndarray:
        """The positions of `samples`."""
        tables = _tables(self.seed, self.id, self.epoch, self.count)

        def step(values: np.ndarray) -> np.ndarray:
            (a, b), (left, right) = tables.sides, np.divmod(values, tables.sides[1])
            for to_left, to_right in reversed(tables.rounds):
                right = (right - to_right[left]) % b
                left = (left - to_left[right]) % a
            return left * b + right

        return self._walk(step, samples)

    def _walk(self, step: Callable[[np.ndarray], np.ndarray], values: np.ndarray) -> np.ndarray:
        values = step(values)
        while len(beyond := np.flatnonzero(values >= self.count)):
            values[beyond] = step(values[beyond])
        return values


@dataclass(frozen=True)
class _Tables:
    sides: tuple[int, int]  # a, b
    rounds: list[tuple[np.ndarray, np.ndarray]]  # int64 [b] below a, int64 [a] below b


# Every step of an epoch asks for them; the orders of some tens of buckets fit. 73 KB each at 1.28 M samples.
@functools.lru_cache(maxsize=64)
def _tables(seed: int, id: int, epoch: int, count: int) -> _Tables:
    a = math.isqrt(count - 1) + 1
    b = -(-count // a)
    # Raw words: numpy may change how a Generator makes integers of them.
    words = philox(seed, id, epoch).bit_generator.random_raw((_ROUNDS // 2, a + b))
    to_left, to_right = (words[:, :b] % np.uint64(a)).astype(np.int64), (words[:, b:] % np.uint64(b)).astype(np.int64)
    return _Tables((a, b), list(zip(to_left, to_right, strict=True)))


def _check_ranks(batch_size: int, rank: int, world_size: int) -> None:
    if batch_size % world_size or not 0 <= rank < world_size:
        raise ValueError(
            f"batch_size {batch_size} must be a multiple of world_size {world_size}, and rank below it, got {rank}"
        )
