"""Noise as a pure function of what it belongs to: counter-based Philox, so that nothing depends on batches or order."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor


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
