"""Noise as a pure function of what it belongs to: counter-based Philox, so that nothing depends on batches or order."""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastlatent.ops.sample_posterior import sample_posterior


def philox(seed: int, id: int, call: int) -> np.random.Generator:
    """The generator of one (seed, id, call): Philox4x64 with key (seed, id) and `call` in the counter's top word."""
    # uint64 arrays: numpy takes a list with numbers of 2^63 and more through float64, which loses the low bits.
    key, counter = np.array([seed, id], dtype=np.uint64), np.array([0, 0, 0, call], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def normal(seed: int, ids: Iterable[int], call: int, shape: tuple[int, ...]) -> Tensor:
    """Standard normal noise, a row for each id.

    Args:
        seed: below 2**64.
        ids: what the noise belongs to: the hash of a training sample's key, the number of a generated sample.
        call: which draw of that sample: the epoch, the token.

    Returns:
        float64 [len(ids), *shape] on the CPU.
    """
    return torch.from_numpy(np.stack([philox(seed, int(id), call).standard_normal(shape) for id in ids]))


@dataclass(frozen=True)
class Draws:
    """Everything random that a batch of training samples needs, on their device; the same bits on CPU and CUDA.

    A draw is a function of (seed, epoch, the sample's key hash, the draw's name) alone: not of the batch, the sample's
    place in it, or how many processes share it. Two draws of one sample need two names.

    Attributes:
        ids: int64 [B], the hashes of the samples' keys.
        seed: of the run, below 2**64.
        epoch: 0 to 2**32 - 1; a sample occurs once in each.
    """

    ids: Tensor
    seed: int
    epoch: int

    def normal(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Standard normal float32 [B, *shape], of the generator that `fastlatent.ops.sample_posterior` describes."""
        # Zero moments: what is drawn from N(0, 1) is the noise itself.
        moments = torch.zeros(len(self.ids), 1, 2, *(shape or (1,)), device=self.ids.device)
        seed = int(np.random.SeedSequence([self.seed, zlib.crc32(name.encode())]).generate_state(1, np.uint64)[0])
        noise = sample_posterior(moments, self.ids, seed=seed, epoch=self.epoch)
        return noise.reshape(len(self.ids), *shape)

    def uniform(self, name: str, shape: tuple[int, ...] = ()) -> Tensor:
        """Uniform on (0, 1), float64 [B, *shape], in steps of about 1e-7."""
        # float64: in float32 a normal number above 5.4 would become 1.
        return torch.special.ndtr(self.normal(name, shape).double())

    def integers(self, name: str, high: int, shape: tuple[int, ...] = ()) -> Tensor:
        """Uniform on 0 ... high - 1, int64 [B, *shape]; high up to 10,000 or so."""
        return (self.uniform(name, shape) * high).long()
