"""ArrayRecord: one record per group, uncompressed, a batch per call of its batched reader."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import protocol
from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordWriter


def read(payload: np.ndarray, folder: Path, batch: int) -> protocol.Batches:
    path = str(folder / "rows.arrayrecord")
    writer = ArrayRecordWriter(path, "group_size:1,uncompressed")
    for row in payload:
        writer.write(row.tobytes())
    writer.close()
    source = ArrayRecordDataSource([path])
    for indices in protocol.epochs(len(payload), batch):
        values = np.empty((batch, payload.shape[1]), payload.dtype)
        for out, record in zip(values, source.__getitems__(indices.tolist()), strict=True):
            out[:] = np.frombuffer(record, payload.dtype)
        yield indices, values


if __name__ == "__main__":
    protocol.main("array-record", read)
