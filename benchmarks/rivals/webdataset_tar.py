"""WebDataset: tar files of 1,000 rows, read in their order through a shuffle buffer; it has no random access."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import protocol
import webdataset

ROWS_PER_TAR = 1000
BUFFER = 1000


def read(payload: np.ndarray, folder: Path, batch: int) -> protocol.Batches:
    with webdataset.ShardWriter(str(folder / "%06d.tar"), maxcount=ROWS_PER_TAR, verbose=0) as writer:
        for number, row in enumerate(payload):
            writer.write({"__key__": f"{number:08d}", "row": row.tobytes()})
    tars = sorted(str(path) for path in folder.glob("*.tar"))
    dataset = webdataset.WebDataset(tars, shardshuffle=len(tars), empty_check=False)
    samples = iter(dataset.shuffle(BUFFER).to_tuple("__key__", "row").repeat())
    while True:
        indices = np.empty(batch, np.int64)
        values = np.empty((batch, payload.shape[1]), payload.dtype)
        for place in range(batch):
            key, data = next(samples)
            indices[place] = int(key)
            values[place] = np.frombuffer(data, payload.dtype)
        yield indices, values


if __name__ == "__main__":
    protocol.main("webdataset", read, once=True)
