"""The plan of an encode: who may write the dataset, what is to be done, and whether it fits."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from fastlatent.pipeline.progress import duration
from fastlatent.store.reader import PROVENANCE
from fastlatent.store.records import Unit
from fastlatent.store.rows import Rows, Values, shard_bytes
from fastlatent.store.shard import DTYPES
from fastlatent.store.writer import DatasetWriter
from fastlatent.workflows.encode_setup import STORED, EncodeSetup
from fastlatent.workflows.runtime import available_cores

MAX_UNIT_BYTES = 256 * 2**20  # a unit's rows are assembled in memory; one more may be on its way to the disk


def open_writer(setup: EncodeSetup) -> DatasetWriter:
    """A writer of the dataset; see DatasetWriter.open for what it refuses."""
    config = setup.config
    largest = max(math.prod(bucket) for bucket in setup.schema.buckets) * STORED[config.dtype].itemsize
    for one in setup.schema.extras:
        rows = setup.most_rows(one.name) if one.ragged else math.prod(one.shape[:1])
        largest += np.dtype(DTYPES[one.dtype]).itemsize * rows * math.prod(one.shape[1:])
    return DatasetWriter.open(
        Path(config.out),
        setup.provenance(),
        setup.source.classes,
        unit_rows=max(1, min(config.unit_rows, MAX_UNIT_BYTES // largest)),
        schema=setup.schema,
        allow_mixed=config.allow_mixed,
    )


def try_engine(setup: EncodeSetup) -> None:
    """Before a new dataset records its engine, encode a batch with it where that may fail: a compiler, a GPU's memory.

    Raises:
        ValueError, RuntimeError: it does; nothing is written yet, so another engine or batch size can be asked for.
    """
    config = setup.config
    if (Path(config.out) / PROVENANCE).exists() or (config.engine == "eager" and setup.device.type == "cpu"):
        return
    for bucket in setup.schema.buckets:
        setup.encode(setup.blank(bucket, config.batch_size)).cpu()


def plan(setup: EncodeSetup, writer: DatasetWriter, on_scan: Callable[[int, int], None] | None = None) -> list[Unit]:
    """The units that are to be done."""
    return writer.plan(setup.entries(), on_scan, examine=setup.examine)


def preflight(setup: EncodeSetup, units: list[Unit]) -> None:
    """Print what the source remarks, and what is to be done: rows, bytes, space, time; refuse what does not fit.

    The bytes are exact if no file is left out; embeddings of T5, whose lengths are not known yet, count as the longest.

    Raises:
        ValueError: the disk has less room than the shards will take.
    """
    for remark in setup.source.remarks:
        print(remark, flush=True)
    count = sum(len(unit.items) for unit in units)
    if not count:
        return
    out = Path(setup.config.out)
    hashed = setup.provenance()["hashed"]
    needed = sum(shard_bytes(hashed, unit, _empty(setup, unit), setup.schema) for unit in units)
    ragged = setup.text is not None and setup.text.columns[0].ragged
    if setup.text is not None and ragged:
        needed += 2 * count * setup.text.max_length * math.prod(setup.text.columns[0].shape[1:])
    free = shutil.disk_usage(out).free
    sample = units[0].items[: max(4, setup.reading[0])]  # they are read again afterwards
    begin = time.monotonic()
    pictures = setup.read(units[0], sample)
    reading = (time.monotonic() - begin) / len(sample) / min(setup.decoding_threads, available_cores())
    del pictures
    seconds = count * max(reading, _encoding_seconds(setup, units[0]) * units[0].bucket[0])
    most = "at most " if ragged else ""
    print(
        f"{count:,} {setup.noun} to encode in {len(units):,} shards of {most}{needed:,} bytes "
        f"({needed / 2**20:,.1f} MiB), "
        f"{free / 2**30:,.1f} GiB free, about {duration(seconds)} with one process",
        flush=True,
    )
    if needed > free:
        raise ValueError(
            f"{out}: {needed:,} bytes are to be written, and {free:,} are free: choose another folder, or make room"
        )


def _encoding_seconds(setup: EncodeSetup, unit: Unit) -> float:
    """Of one row, once warm. On the CPU timed by a single one: a whole batch can take half a minute."""
    size = setup.config.batch_size if setup.device.type == "cuda" else 1
    pixels = setup.blank(unit.bucket, size)
    encode = setup.encode if setup.device.type == "cuda" else setup.encode_small
    for _ in range(2):
        begin = time.monotonic()
        encode(pixels).cpu()
    return (time.monotonic() - begin) / size


def _empty(setup: EncodeSetup, unit: Unit) -> Rows:
    """Rows of the unit's shapes and dtypes, of no contents and, until someone touches it, of no memory."""
    count, dtype = len(unit.items), STORED[setup.config.dtype]
    scale = np.empty((count, *unit.bucket[:2]), np.float32) if setup.config.dtype == "int8" else None
    extras: dict[str, Values] = {}
    for one in setup.schema.extras:
        kind = DTYPES[one.dtype]
        if not one.ragged:
            extras[one.name] = np.empty((count, *one.shape), kind)
        else:
            lengths = [setup.ragged_rows(one.name, unit, item) for item in unit.items]
            extras[one.name] = [np.empty((length, *one.shape[1:]), kind) for length in lengths]
    return Rows([item.key for item in unit.items], np.empty((count, *unit.bucket), dtype), None, None, scale, extras)
