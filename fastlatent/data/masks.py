"""Which tokens of a clip a student shall predict: masks that are functions of (seed, epoch, the clip's key) alone."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import xxhash
from torch import Tensor

from fastlatent.diffusion.noise import philox
from fastlatent.store.files import canonical_json

KINDS = ("blocks", "tube", "random")
_CHUNK = 32  # clips drawn together: more would leave the cache, fewer pay numpy's overhead for each
# The low bits of a random word become its place, so that no two are equal and no sort can depend on numpy's algorithm.
_PLACE_BITS = 24


@dataclass(frozen=True)
class MaskConfig:
    """How tokens are masked. Every clip of a grid has exactly `count(grid)` masked tokens.

    kind "blocks" is the multi-block mask of V-JEPA (Bardes et al., arXiv 2404.08471), "tube" that of VideoMAE (Tong et
    al., NeurIPS 2022): the same random cells of the spatial grid at every time step. "random" masks single tokens.

    Blocks are drawn until their union has `count` tokens; what the last one brings too much is given back, whole cells
    in random order, of the last of these cells random time steps. (Published code draws a fixed number of blocks and
    cuts every clip's mask to the shortest of its batch by keeping the first indices: late frames are masked less, and
    a clip's mask depends on its neighbours. Here the number of blocks varies instead; see SHORT and LONG.) A block is
    round(sqrt(scale·h·w·aspect)) cells high and round(sqrt(scale·h·w/aspect)) wide, one aspect for all blocks of a
    mask, and lies anywhere inside the grid and the clip: with temporal < 1 the first and the last time steps are
    covered least.

    Attributes:
        kind: "blocks", "tube" or "random".
        ratio: the share of masked tokens, rounded to whole tokens, or to whole cells where all time steps are alike
            (tubes, and blocks with temporal 1).
        scale: of blocks: the share of the spatial grid that one covers.
        aspect: of blocks: smallest and largest height / width; uniform between them.
        temporal: of blocks: the share of the time steps that one covers.

    Raises:
        ValueError: a number is out of its range.
    """

    kind: str
    ratio: float
    scale: float = 0.15
    aspect: tuple[float, float] = (0.75, 1.5)
    temporal: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"mask kind: expected one of {', '.join(KINDS)}, got {self.kind!r:.100}")
        # 1 and 1.0, or a list out of JSON, must be the same mask.
        for name in ("ratio", "scale", "temporal"):
            object.__setattr__(self, name, float(getattr(self, name)))
        object.__setattr__(self, "aspect", tuple(map(float, self.aspect)))
        if not 0 < self.ratio < 1:
            raise ValueError(f"mask ratio: expected a share between 0 and 1, got {self.ratio:g}")
        for name in ("scale", "temporal"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"mask {name}: expected a share above 0, at most 1, got {getattr(self, name):g}")
        if len(self.aspect) != 2 or not 0 < self.aspect[0] <= self.aspect[1] < math.inf:
            raise ValueError(f"mask aspect: expected (smallest, largest) height / width, got {self.aspect}")

    def count(self, grid: tuple[int, int, int]) -> int:
        """How many of a clip's tokens are masked, the same for every clip of this grid (time steps, height, width).

        Raises:
            ValueError: none would be, or all; or no grid.
        """
        if len(grid) != 3 or min(grid) < 1 or math.prod(grid) >= 1 << _PLACE_BITS:
            raise ValueError(f"mask: expected a grid (time steps, height, width), got {tuple(grid)}")
        tokens, copies = math.prod(grid), self._copies(grid)
        if tokens == 1:
            raise ValueError(f"mask: the grid {tuple(grid)} is one token, as of --pool all: nothing would stay visible")
        count = round(self.ratio * (tokens // copies)) * copies
        if not 0 < count < tokens:
            raise ValueError(
                f"mask ratio {self.ratio:g} of a grid {tuple(grid)}: expected it to mask 1 to {tokens - 1} of {tokens} "
                f"tokens, got {count}; choose a ratio nearer to 0.5"
            )
        return count

    def masked(
        self,
        seed: int,
        epoch: int,
        key_hash: Tensor | np.ndarray,
        grid: tuple[int, int, int],
        *,
        number: int = 0,
    ) -> Tensor:
        """The masked tokens of each clip, rising: token (τ, y, x) of a grid (t, h, w) is number (τ·h + y)·w + x.

        A row is a function of (seed, epoch, its key hash, this config, grid, number) alone: not of the batch, the
        clip's place in it, or how many processes share it. The stream is Philox4x64's, its key a hash of seed, config
        and number beside the key hash, the epoch in its counter.

        Args:
            seed, epoch: 0 to 2**64 - 1.
            key_hash: int64 (or uint64) [B], of the clips' keys.
            number: which mask, where a clip has several of one config.

        Returns:
            int64 [B, M] on the CPU, M = count(grid). `complement` gives the visible rest.

        Raises:
            ValueError: as `count`; or seed, epoch or number out of range.
        """
        count = self.count(grid)
        for name, value in (("seed", seed), ("epoch", epoch), ("number", number)):
            if not 0 <= value < 1 << 64:
                raise ValueError(f"mask {name}: expected 0 to 2^64 - 1, got {value}")
        hashes = np.asarray(key_hash)
        if hashes.ndim != 1 or hashes.dtype not in (np.dtype(np.int64), np.dtype(np.uint64)):
            raise ValueError(f"mask key_hash: expected int64 [B], got {hashes.dtype} {list(hashes.shape)}")
        # Only what this kind reads: a default that changes elsewhere must change no mask.
        names = ("kind", "ratio", *(("scale", "aspect", "temporal") if self.kind == "blocks" else ()))
        fields = {name: getattr(self, name) for name in names}
        stream = xxhash.xxh3_64_intdigest(canonical_json({"mask": fields, "seed": seed, "number": number}))
        ids = hashes.view(np.uint64).tolist()
        masks = np.empty((len(ids), count), np.int64)
        for begin in range(0, len(ids), _CHUNK):
            masks[begin : begin + _CHUNK] = self._draw(stream, epoch, ids[begin : begin + _CHUNK], grid, count)
        return torch.from_numpy(masks)

    def visible(
        self,
        seed: int,
        epoch: int,
        key_hash: Tensor | np.ndarray,
        grid: tuple[int, int, int],
        *,
        number: int = 0,
    ) -> Tensor:
        """int64 [B, N - M]: the tokens that `masked` does not have, rising."""
        return complement(self.masked(seed, epoch, key_hash, grid, number=number), math.prod(grid))

    def _copies(self, grid: tuple[int, int, int]) -> int:
        """How many time steps share one mask of the spatial grid."""
        alike = self.kind == "tube" or (self.kind == "blocks" and self._duration(grid) == grid[0])
        return grid[0] if alike else 1

    def _duration(self, grid: tuple[int, int, int]) -> int:
        return max(1, round(self.temporal * grid[0]))

    def _draw(self, stream: int, epoch: int, ids: list[int], grid: tuple[int, int, int], count: int) -> np.ndarray:
        """int64 [len(ids), count]. Words of a stream are used in their order: asking for more changes none before."""
        copies = self._copies(grid)
        places, few = math.prod(grid) // copies, count // copies
        if self.kind == "blocks":
            chosen = self._blocks(stream, epoch, ids, (grid[0] // copies, grid[1], grid[2]), few, self._duration(grid))
        else:
            chosen = _smallest(_distinct(_words(stream, epoch, ids, places)), few)
        if copies == 1:
            return chosen
        return (chosen[:, None, :] + places * np.arange(copies)[None, :, None]).reshape(len(ids), count)

    def _blocks(
        self, stream: int, epoch: int, ids: list[int], grid: tuple[int, int, int], count: int, duration: int
    ) -> np.ndarray:
        steps, height, width = grid
        cells, duration = height * width, min(duration, steps)
        # As many as are enough for most clips: each covers `share` of what is left, and less at the edges.
        share = self.scale * duration / steps
        blocks = 4 + 2 * math.ceil(math.log(1 - self.ratio) / math.log(1 - min(share, 0.9)))
        masks = np.empty((len(ids), count), np.int64)
        waiting = np.arange(len(ids))
        while len(waiting):
            words = _words(stream, epoch, [ids[i] for i in waiting.tolist()], cells + steps + 1 + 3 * blocks)
            first = self._first_block(words[:, cells + steps :], grid, duration)
            # Block by block, in a block cell by cell, in a cell step by step; ranks keep these apart for any word.
            cell, step = _ranks(words[:, :cells]), _ranks(words[:, cells : cells + steps])
            order = (first.reshape(-1, steps, cells) * cells + cell[:, None, :]) * steps + step[:, :, None]
            reached = (first < blocks).sum(1) >= count
            masks[waiting[reached]] = _smallest(order.reshape(-1, steps * cells)[reached], count)
            waiting, blocks = waiting[~reached], 2 * blocks
        return masks

    def _first_block(self, words: np.ndarray, grid: tuple[int, int, int], duration: int) -> np.ndarray:
        """int64 [B, tokens]: the first block of each clip that covers a token; K, of K, where none does.

        Args:
            words: uint64 [B, 1 + 3K]: the clip's aspect; top, left and first step of each block.
        """
        steps, height, width = grid
        low, high = self.aspect
        # Nothing but operations that IEEE 754 rounds correctly: the same bits on every machine.
        aspect = low + (words[:, :1] >> np.uint64(11)).astype(np.float64) * 2.0**-53 * (high - low)
        area = self.scale * (height * width)
        drawn = words[:, 1:].reshape(len(words), -1, 3)

        def covered(which: int, length: int, extent: np.ndarray | int) -> np.ndarray:
            """bool [B, K, length]: where the blocks lie on one axis."""
            begin = (drawn[:, :, which] >> np.uint64(32)).astype(np.int64) * (length - extent + 1) >> 32
            offset = np.arange(length) - begin[:, :, None]
            return (offset >= 0) & (offset < np.reshape(extent, (-1, 1, 1)))

        rows = covered(0, height, np.clip(np.rint(np.sqrt(area * aspect)), 1, height).astype(np.int64))
        columns = covered(1, width, np.clip(np.rint(np.sqrt(area / aspect)), 1, width).astype(np.int64))
        # A block's number where it covers, K elsewhere: the larger of space's and time's is its number where both do.
        blocks = drawn.shape[1]
        dtype = np.int16 if blocks < 1 << 15 else np.int32  # most of the time goes into these arrays
        numbers = np.arange(blocks, dtype=dtype)[:, None]
        space = (rows[..., :, None] & columns[..., None, :]).reshape(len(words), blocks, height * width)
        in_space = np.where(space, numbers, dtype(blocks))
        in_time = np.where(covered(2, steps, duration), numbers, dtype(blocks))
        first = np.maximum(in_space[:, :, None, :], in_time[..., None]).min(1)
        return first.reshape(len(words), -1).astype(np.int64)


# The masks of SALT (arXiv 2509.24317) and V-JEPA: 8 blocks of 0.15 of the grid, and 2 of 0.7. Their union covers on
# average, over aspects and places on a 14 x 14 grid, 0.6314 of it (standard deviation 0.076) and 0.8164 (0.076): here
# it is 124 and 160 of the 196 cells for every clip.
SHORT = MaskConfig("blocks", 0.631, 0.15)
LONG = MaskConfig("blocks", 0.816, 0.7)


def complement(tokens: Tensor, total: int) -> Tensor:
    """The other tokens: int64 [B, M], each row rising and below `total`, to int64 [B, total - M], rising."""
    rest = np.ones((len(tokens), total), bool)
    np.put_along_axis(rest, tokens.numpy(), False, 1)
    return torch.from_numpy(np.nonzero(rest)[1].reshape(len(tokens), total - tokens.shape[1]))


def _words(stream: int, epoch: int, ids: list[int], count: int) -> np.ndarray:
    """uint64 [len(ids), count]: raw words, since numpy may change what a Generator makes of them."""
    return np.stack([philox(stream, id, epoch).bit_generator.random_raw(count) for id in ids])


def _distinct(words: np.ndarray) -> np.ndarray:
    """The same order of magnitude, and no two of a row equal."""
    return words >> np.uint64(_PLACE_BITS) << np.uint64(_PLACE_BITS) | np.arange(words.shape[1], dtype=np.uint64)


def _smallest(values: np.ndarray, count: int) -> np.ndarray:
    """int64 [B, count]: where each row's `count` smallest numbers are, rising; no two of a row may be equal."""
    largest = np.partition(values, count - 1, axis=1)[:, count - 1 : count]
    return np.nonzero(values <= largest)[1].reshape(len(values), count)


def _ranks(words: np.ndarray) -> np.ndarray:
    """int64 [B, n]: random permutations of 0 ... n - 1."""
    ranks = np.empty(words.shape, np.int64)
    np.put_along_axis(ranks, np.argsort(_distinct(words), axis=1), np.arange(words.shape[1])[None], 1)
    return ranks
