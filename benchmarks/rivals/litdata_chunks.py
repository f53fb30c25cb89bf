"""LitData: uncompressed chunks of 64 MB, read in its own shuffled order, for which it is made."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import protocol
from litdata import StreamingDataset
from litdata.streaming.cache import Cache


def read(payload: np.ndarray, folder: Path, batch: int) -> protocol.Batches:
    cache = Cache(str(folder), chunk_bytes="64MB")
    for number, row in enumerate(payload):
        cache[number] = {"number": number, "row": np.array(row)}
    cache.done()
    cache.merge()
    dataset = StreamingDataset(str(folder), shuffle=True)
    samples = iter(())
    while True:
        indices = np.empty(batch, np.int64)
        values = np.empty((batch, payload.shape[1]), payload.dtype)
        for place in range(batch):
            sample = next(samples, None)
            if sample is None:
                samples = iter(dataset)
                sample = next(samples)
            indices[place] = sample["number"]
            values[place] = sample["row"]
        yield indices, values


if __name__ == "__main__":
    protocol.main("litdata", read, once=True)
