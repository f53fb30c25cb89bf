"""What the store's promises cost: writing a shard against writing plain bytes, and opening a dataset of 1.28 M rows.

Writing: 256 MiB each time, in turn. "plain": write in pieces of 8 MiB, then fdatasync. "fastlatent": one unit is
committed: rows checked and hashed, statistics, shard written, synced and renamed, journal line synced.
"commit-of-one-row": the same for one row; its share of "fastlatent" is what the commit costs beside the bytes.

Opening: Dataset.open in a new process, the files in the page cache. `bytes` is what its resident memory has grown by.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import harness
import numpy as np
from rows import Case, Row

from fastlatent.store.records import Schema, Unit
from fastlatent.store.rows import Rows
from fastlatent.store.scan import Entry
from fastlatent.store.writer import DatasetWriter

SAMPLES = 7
PIECE = 8 << 20
PROVENANCE = {"hashed": {"vae": {"weights": "benchmark"}}, "informational": {}}
CASES = [
    Case(
        "store_write",
        {"shard_bytes": 256 << 20, "row_bytes": 32 << 10},
        dtype="float16",
        device="cpu",
        providers=("fastlatent", "commit-of-one-row", "plain"),
    ),
    Case("store_open", {"rows": 1_280_000, "shards": 128}, dtype="float16", device="cpu", providers=("fastlatent",)),
]
OPEN = """
import json, sys, time
from fastlatent.store.reader import Dataset

def resident():
    lines = (line.split() for line in open("/proc/self/status"))
    return next(int(line[1]) * 1024 for line in lines if line[0] == "VmRSS:")

before, begin = resident(), time.perf_counter()
dataset = Dataset.open(sys.argv[1])
seconds = time.perf_counter() - begin
print(json.dumps([seconds, resident() - before, len(dataset)]))
"""


def measure(case: Case, folder: Path) -> list[Row]:
    """The rows of a case of this file."""
    return write(case, folder / "write") if case.benchmark == "store_write" else open_(case, folder / "open")


def open_writer(path: Path, count: int, unit_rows: int, bucket: tuple[int, ...]) -> tuple[DatasetWriter, list[Unit]]:
    """A writer of a new dataset at `path`, and its units: `count` samples whose order is that of their numbers."""
    path.parent.mkdir(parents=True, exist_ok=True)
    source = path.with_name(f"{path.name}.source")  # one file stands for every sample
    source.write_bytes(b"image")
    stat = source.stat()
    writer = DatasetWriter.open(path, PROVENANCE, ["all"], unit_rows=unit_rows, schema=Schema((bucket,)))
    entries = [Entry(f"{i:08d}", str(source), 0, stat.st_size, stat.st_mtime_ns) for i in range(count)]
    return writer, writer.plan(entries)


def commit(writer: DatasetWriter, unit: Unit, rows: np.ndarray) -> None:
    """Commit [N, ...] as the unit's rows."""
    count = len(unit.items)
    sizes = np.zeros((count, 2), np.int32), np.zeros((count, 4), np.int32)
    writer.commit(unit, Rows([item.key for item in unit.items], rows.reshape(count, *unit.bucket), *sizes))


def write_dataset(path: Path, rows: np.ndarray, unit_rows: int) -> None:
    """A dataset of `rows` (float16 [N, values]) in this order, as moments at 32 x 32 where they have as many values."""
    values = rows.shape[1]
    bucket = (1, values // 1024, 32, 32) if values % 2048 == 0 else (1, values, 1, 1)
    writer, units = open_writer(path, len(rows), unit_rows, bucket)
    with writer:
        begin = 0
        for unit in units:
            commit(writer, unit, rows[begin : begin + len(unit.items)])
            begin += len(unit.items)
        writer.finish()


def write(case: Case, folder: Path) -> list[Row]:
    """A commit of a whole shard, and of one row, against plain bytes."""
    shard_bytes, row_bytes = int(case.sizes["shard_bytes"]), int(case.sizes["row_bytes"])
    count, bucket = shard_bytes // row_bytes, (1, row_bytes // 2048, 32, 32)
    bits = np.random.default_rng(0).integers(0, 0x7C00, (count, math.prod(bucket)), dtype=np.uint16)
    rows = bits.view(np.float16)
    large, large_units = open_writer(folder / "large", (SAMPLES + 1) * count, count, bucket)
    small, small_units = open_writer(folder / "small", SAMPLES + 1, 1, bucket)

    def plain() -> None:
        data = rows.reshape(-1).view(np.uint8).data
        fd = os.open(folder / "plain", os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        for begin in range(0, len(data), PIECE):
            view = data[begin : begin + PIECE]
            while view:
                view = view[os.write(fd, view) :]
        os.fdatasync(fd)
        os.close(fd)

    providers: dict[str, Callable[[], None]] = {
        "fastlatent": lambda: commit(large, large_units.pop(0), rows),
        "commit-of-one-row": lambda: commit(small, small_units.pop(0), rows[:1]),
        "plain": plain,
    }
    seconds: dict[str, list[float]] = {name: [] for name in providers}
    with large, small:
        for _ in range(SAMPLES + 1):
            for name, function in providers.items():
                os.sync()
                begin = time.perf_counter()
                function()
                seconds[name].append(time.perf_counter() - begin)
                for path in (folder / "plain", *folder.glob("large/shards/*/*")):
                    path.unlink(missing_ok=True)
    shutil.rmtree(folder)
    prepared = harness.Prepared(
        dict.fromkeys(case.providers, lambda: lambda: None), bytes=count * row_bytes, floor="plain"
    )
    outcomes = {name: harness.Outcome("ok", timing=harness.quantiles(times[1:])) for name, times in seconds.items()}
    found = harness.rows_of(case, prepared, outcomes)
    return [replace(row, bytes=row_bytes) if row.provider == "commit-of-one-row" else row for row in found]


def open_(case: Case, folder: Path) -> list[Row]:
    """Time and resident memory of opening a dataset; its rows are tiny, for only the index counts."""
    count, shards = int(case.sizes["rows"]), int(case.sizes["shards"])
    write_dataset(folder / "store", np.zeros((count, 2), np.float16), -(-count // shards))
    seconds, sizes = [], []
    for _ in range(SAMPLES + 1):
        run = subprocess.run(
            [sys.executable, "-c", OPEN, str(folder / "store")], capture_output=True, text=True, check=True
        )
        elapsed, size, length = json.loads(run.stdout)
        assert length == count, length
        seconds.append(elapsed)
        sizes.append(size)
    shutil.rmtree(folder)
    prepared = harness.Prepared({"fastlatent": lambda: lambda: None}, bytes=sorted(sizes)[len(sizes) // 2])
    return harness.rows_of(case, prepared, {"fastlatent": harness.Outcome("ok", timing=harness.quantiles(seconds[1:]))})
