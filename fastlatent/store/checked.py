"""A shard held against its manifest record: its size, header, and the dtype and shape of every column."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from fastlatent.store.files import inside
from fastlatent.store.records import FORMAT, Bucket, Field, ShardRecord
from fastlatent.store.shard import Shard

# column of every shard -> dtype in the file, sizes after the row axis
SHARD_COLUMNS = {
    "sample_id": ("U64", ()), "src_xxh3": ("U64", (2,)), "orig_hw": ("I32", (2,)), "crop": ("I32", (4,)),
    "row_xxh3": ("U64", ()),
}  # fmt: skip


def open_checked(
    path: Path, record: ShardRecord, buckets: list[Bucket], fingerprint: str, extras: Sequence[Field] = ()
) -> Shard:
    """Open one shard and hold it against its manifest record."""
    file = inside(path, record.path, "manifest")
    shard = Shard.open(file, expected_bytes=record.bytes)
    bucket, rows = buckets[record.bucket], record.rows
    expected: dict[str, object] = {
        "header_bytes": record.header_bytes,
        "header_xxh3_64": record.header_xxh3_64,
        "fls.format": FORMAT,
        "fls.fingerprint": fingerprint,
        "fls.unit": record.unit,
    }
    found: dict[str, object] = {"header_bytes": shard.header_bytes, "header_xxh3_64": shard.header_xxh3_64}
    found |= shard.metadata
    columns: dict[str, tuple[str, list[tuple[int, ...]]]] = {}
    for name, dtype, shape, ragged in _tensors(bucket, extras):
        if ragged:
            offsets = shard.columns.get(f"{name}.offsets")
            columns[f"{name}.offsets"] = ("U64", [(rows + 1,)])
            total = int(offsets[-1]) if offsets is not None and offsets.ndim == 1 and len(offsets) else 0
            columns[name] = (dtype, [(total, *shape)])
        else:
            columns[name] = (dtype, [(rows, *shape)])
    if bucket.dtype == "I8":
        name = bucket.payload
        (whole,) = columns[name][1]
        columns[f"{name}.scale"] = ("F32", [whole[:1]] if bucket.ragged else [whole[:2], whole[:3]])
    columns |= {name: (dtype, [(rows, *rest)]) for name, (dtype, rest) in SHARD_COLUMNS.items()}
    columns["key.offsets"] = ("U64", [(rows + 1,)])
    for name, value in expected.items():
        if found.get(name) != value:
            raise ValueError(
                f"{file}: {name}: expected {value!r}, got {found.get(name)!r:.200}: the header is damaged, or "
                "the file is of another dataset; restore it from a copy, or run `fastlatent repair`"
            )
    for name, (dtype, shapes) in columns.items():
        column = shard.columns.get(name)
        if column is None or shard.dtypes[name] != dtype or column.shape not in shapes:
            came = "no such column" if column is None else f"{shard.dtypes[name]} {column.shape}"
            raise ValueError(
                f"{file}: {name}: expected {dtype} {' or '.join(map(str, shapes))}, got {came}: the header is damaged, "
                "or the file is of another dataset; restore it from a copy, or run `fastlatent repair`"
            )
        if name.endswith(".offsets") and name != "key.offsets":
            check_offsets(column, len(shard.columns[name.removesuffix(".offsets")]), name, str(file))
    check_keys(shard.columns, shard.dtypes, str(file))
    return shard


def _tensors(bucket: Bucket, extras: Sequence[Field]) -> Iterator[tuple[str, str, tuple[int, ...], bool]]:
    """Name, dtype, shape of a row (its first axis left out where it is ragged) and whether it is, of every tensor."""
    yield bucket.payload, bucket.dtype, bucket.shape[2:] if bucket.ragged else bucket.shape, bucket.ragged
    for field in extras:
        yield field.name, field.dtype, field.shape[1:] if field.ragged else field.shape, field.ragged


def check_keys(columns: dict[str, np.ndarray], dtypes: dict[str, str], what: str) -> None:
    """Raise ValueError unless key.offsets rise from 0 to the length of key.utf8."""
    offsets, utf8 = columns["key.offsets"], columns.get("key.utf8")
    if utf8 is None or dtypes["key.utf8"] != "U8" or utf8.ndim != 1:
        raise ValueError(f"{what}: expected a column key.utf8 of U8 [bytes], got {dtypes.get('key.utf8')}")
    check_offsets(offsets, len(utf8), "key.offsets", what)


def check_offsets(offsets: np.ndarray, length: int, name: str, what: str) -> None:
    """Raise ValueError unless `offsets` rise from 0 to `length`."""
    if not len(offsets) or offsets[0] != 0 or offsets[-1] != length or (offsets[1:] < offsets[:-1]).any():
        raise ValueError(f"{what}: expected {name} to rise from 0 to {length}, got {offsets!r:.200}")
