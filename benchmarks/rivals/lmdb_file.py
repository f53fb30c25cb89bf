"""LMDB: one value per row, read in one transaction per batch, straight from the mapping."""

from __future__ import annotations

from pathlib import Path

import lmdb
import numpy as np
import protocol


def read(payload: np.ndarray, folder: Path, batch: int) -> protocol.Batches:
    keys = [number.to_bytes(8, "big") for number in range(len(payload))]
    with (
        lmdb.open(str(folder), map_size=2 * payload.nbytes + (64 << 20)) as environment,
        environment.begin(write=True) as writing,
    ):
        for key, row in zip(keys, payload, strict=True):
            writing.put(key, row.tobytes(), append=True)
    environment = lmdb.open(str(folder), readonly=True, lock=False, readahead=False)
    for indices in protocol.epochs(len(payload), batch):
        values = np.empty((batch, payload.shape[1]), payload.dtype)
        with environment.begin(buffers=True) as reading:
            for out, index in zip(values, indices.tolist(), strict=True):
                out[:] = np.frombuffer(reading.get(keys[index]), payload.dtype)
        yield indices, values


if __name__ == "__main__":
    protocol.main("lmdb", read)
