"""Hugging Face datasets: a column of bytes in memory-mapped Arrow files, a batch per call, without Python objects."""

from __future__ import annotations

from pathlib import Path

import datasets
import numpy as np
import protocol
import pyarrow


def read(payload: np.ndarray, folder: Path, batch: int) -> protocol.Batches:
    datasets.disable_progress_bars()
    row_bytes = payload.shape[1] * payload.itemsize
    offsets = np.arange(len(payload) + 1, dtype=np.int64) * row_bytes
    buffers = [None, pyarrow.py_buffer(offsets), pyarrow.py_buffer(np.ascontiguousarray(payload))]
    column = pyarrow.Array.from_buffers(pyarrow.large_binary(), len(payload), buffers)
    datasets.Dataset(pyarrow.table({"row": column})).save_to_disk(str(folder))
    dataset = datasets.load_from_disk(str(folder), keep_in_memory=False).with_format("arrow")
    for indices in protocol.epochs(len(payload), batch):
        rows = dataset[indices.tolist()]["row"].combine_chunks()
        _, starts, data = rows.buffers()
        start = np.frombuffer(starts, np.int64)[rows.offset]
        values = np.frombuffer(data, payload.dtype, batch * payload.shape[1], int(start))
        yield indices, values.reshape(batch, -1)


if __name__ == "__main__":
    protocol.main("datasets", read)
