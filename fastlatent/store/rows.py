"""The rows of one unit, and the shard they become."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from fastlatent import _native
from fastlatent.store.files import canonical_json
from fastlatent.store.provenance import fingerprint
from fastlatent.store.records import (
    FORMAT,
    RAGGED,
    Bucket,
    Field,
    PlannedItem,
    Schema,
    ShardRecord,
    Unit,
    digest_columns,
    encode_key,
    key_columns,
    key_hashes,
)
from fastlatent.store.shard import DTYPES as SHARD_DTYPES
from fastlatent.store.shard import layout, write_shard
from fastlatent.store.statistics import DTYPE_CODES, Statistics

# What a payload may be stored as.
DTYPES = {
    np.dtype(np.float16): "F16",
    np.dtype(np.float32): "F32",
    np.dtype(np.uint16): "BF16",
    np.dtype(np.int8): "I8",
}
Values = np.ndarray | list[np.ndarray]  # [N, ...], or N arrays that differ in their first size


@dataclass(frozen=True)
class Rows:
    """The rows of one unit, in its order, files in quarantine left out.

    Attributes:
        keys: N keys.
        payload: [N, *bucket]: moments [N, F, 2C, ...] (mean||logvar), latents [N, F, C, ...] or tokens [N, F, n, D],
            unscaled; float16, float32, uint16 holding bfloat16 bits, or int8 with `scale`. Tokens whose number differs
            from row to row: a list of [n, D].
        orig_hw: int32 [N, 2], height and width of the source image; None where rows are not of images (0 is stored).
        crop: int32 [N, 4], top, left, height, width of what the latent shows, in the source image, rounded; or None.
        scale: float32, of int8 rows: [N, F], or [N, F, T] with T the first size after F; for a list, a list of [n].
        extras: the dataset's further tensors: name -> [N, ...], or a list for a ragged one.
    """

    keys: list[str]
    payload: Values
    orig_hw: np.ndarray | None = None
    crop: np.ndarray | None = None
    scale: Values | None = None
    extras: Mapping[str, Values] = field(default_factory=dict)

    @property
    def dtype(self) -> str:
        """Of the payload, as the format names it.

        Raises:
            ValueError: it is none that rows are stored in.
        """
        found = {array.dtype for array in self.payload} if isinstance(self.payload, list) else {self.payload.dtype}
        dtype = DTYPES.get(found.pop()) if len(found) == 1 else None
        if dtype is None:
            kinds = "float16, float32, uint16 (bfloat16) or int8"
            raise ValueError(f"payload: expected one of {kinds}, got {found or getattr(self.payload, 'dtype', found)}")
        return dtype

    def check(self, unit: Unit, payload: str, extras: Sequence[Field]) -> None:
        """Raise ValueError where a shape or dtype is not the dataset's and the unit's."""
        count = len(self.keys)
        ragged = RAGGED in unit.bucket
        _check(payload, self.payload, count, unit.bucket[1:] if ragged else unit.bucket, unit)
        if ragged and not all(len(row) for row in self.payload):
            raise ValueError(f"{payload}: expected one token or more in every row, got none in one of unit {unit.id}")
        for name, size in (("orig_hw", 2), ("crop", 4)):
            values = getattr(self, name)
            if values is not None and (values.shape != (count, size) or values.dtype.kind not in "iu"):
                raise ValueError(f"{name}: expected int32 {(count, size)}, got {values.dtype} {values.shape}")
        if (self.dtype == "I8") != (self.scale is not None):
            raise ValueError(f"{payload}: expected a scale with int8 rows and only there, got {self.dtype}")
        if self.scale is not None:
            allowed = [(RAGGED,)] if ragged else [unit.bucket[:1], unit.bucket[:2]]
            shape = (RAGGED,) if ragged else np.shape(self.scale)[1:]
            if shape not in allowed:
                raise ValueError(f"{payload}.scale: expected {count} rows of {allowed}, got {shape} for unit {unit.id}")
            _check(f"{payload}.scale", self.scale, count, shape, unit, np.dtype("<f4"))
            if ragged and [len(one) for one in self.scale] != [len(one) for one in self.payload]:
                raise ValueError(f"{payload}.scale: expected a scale for each token for unit {unit.id}")
        if set(self.extras) != {one.name for one in extras}:
            raise ValueError(f"expected the further tensors {[one.name for one in extras]}, got {sorted(self.extras)}")
        for one in extras:
            dtype = np.dtype(SHARD_DTYPES[one.dtype])
            _check(one.name, self.extras[one.name], count, one.shape, unit, dtype)

    def finite(self) -> np.ndarray:
        """bool [N]: no value is infinity or NaN, nor, of int8 rows, a scale."""
        return finite_rows(self.payload, self.dtype) if self.scale is None else finite_rows(self.scale, "F32")

    def kept(self, keep: np.ndarray) -> Rows:
        """Those where `keep` (bool [N])."""
        if keep.all():
            return self

        def some(values: Any) -> Any:
            if values is None:
                return None
            return list(compress(values, keep)) if isinstance(values, list) else values[keep]

        extras = {name: some(values) for name, values in self.extras.items()}
        return Rows(some(self.keys), some(self.payload), some(self.orig_hw), some(self.crop), some(self.scale), extras)


def quantize(values: np.ndarray, axes: int) -> tuple[np.ndarray, np.ndarray]:
    """int8 and its scales, max|x|/127: [..., *S] -> int8 of that shape, and float32 of its first `axes` sizes.

    Normal numbers lose 0.87 % of their std with 4096 of them to a scale, 0.70 % with 256. The scale of zeros is 1.
    """
    flat = values.reshape(*values.shape[:axes], -1).astype(np.float32)
    scale = np.abs(flat).max(-1) / np.float32(127)
    scale[scale == 0] = 1
    with np.errstate(invalid="ignore"):  # NaN: `Rows.finite` finds it in the scale
        return np.rint(flat / scale[..., None]).astype(np.int8).reshape(values.shape), scale


def _check(
    name: str, values: Values, count: int, shape: tuple[int, ...], unit: Unit, dtype: np.dtype | None = None
) -> None:
    """Raise ValueError unless `values` are `count` rows of `shape`, whose first size may be RAGGED."""
    if shape[:1] == (RAGGED,):
        sound = isinstance(values, list) and len(values) == count and all(one.shape[1:] == shape[1:] for one in values)
        found: object = [one.shape for one in values[:3]] if isinstance(values, list) else values.shape
        kinds = {one.dtype for one in values}
    else:
        sound, found = isinstance(values, np.ndarray) and values.shape == (count, *shape), np.shape(values)
        kinds = {getattr(values, "dtype", None)}
    if not sound or (dtype is not None and kinds - {dtype}):
        raise ValueError(f"{name}: expected {dtype or ''} {(count, *shape)}, got {found} for unit {unit.id}")


def write_rows(
    path: Path,
    hashed: Mapping[str, object],
    unit: Unit,
    items: list[PlannedItem],
    rows: Rows,
    payload: str = "moments",
    extras: Sequence[Field] = (),
) -> ShardRecord:
    """Write a unit's shard into the dataset `path`; `items` are those of `rows`, which have been checked."""
    dtype = rows.dtype
    parts_of_rows = zip(rows.payload, *([] if rows.scale is None else [rows.scale]), strict=True)
    digests = np.array([row_digest(*parts) for parts in parts_of_rows], "<u8")
    columns, bf16, metadata = _contents(hashed, unit, items, rows, digests, payload, extras)
    with ThreadPoolExecutor(1) as pool:  # while the disk is waited for
        scale = columns.get(f"{payload}.scale")
        statistics = pool.submit(Statistics.of, columns[payload], dtype, payload, scale)
        file = write_shard(path / "shards" / metadata["fls.bucket"], unit.id, columns, bf16, metadata)
    return ShardRecord(
        unit=unit.id,
        path=file.path.relative_to(path).as_posix(),
        bytes=file.bytes,
        header_bytes=file.header_bytes,
        header_xxh3_64=file.header_xxh3_64,
        xxh3_128=file.xxh3_128,
        rows=len(items),
        bucket=0,  # the merge numbers buckets
        first_key=items[0].key,
        last_key=items[-1].key,
        statistics=statistics.result(),
    )


def shard_bytes(hashed: Mapping[str, object], unit: Unit, rows: Rows, schema: Schema) -> int:
    """The size of the file that `write_rows` makes of all the unit's files, from shapes alone: no value is read."""
    digests = np.zeros(len(unit.items), "<u8")
    columns, bf16, metadata = _contents(
        hashed, unit, list(unit.items), rows, digests, schema.payload, schema.extras
    )  # fmt: skip
    header, tensors = layout(columns, bf16, metadata)
    return len(header) + sum(tensor.nbytes for tensor in tensors)


def _contents(
    hashed: Mapping[str, object],
    unit: Unit,
    items: list[PlannedItem],
    rows: Rows,
    digests: np.ndarray,
    payload: str,
    extras: Sequence[Field],
) -> tuple[dict[str, np.ndarray], set[str], dict[str, str]]:
    """A shard's columns in their order, which of them are bfloat16, and its metadata."""
    count, dtype = len(items), rows.dtype
    keys = [encode_key(item.key) for item in items]
    columns = {
        "sample_id": key_hashes(keys),
        **key_columns(keys),
        "src_xxh3": digest_columns([item.digest for item in items]),
        "orig_hw": np.zeros((count, 2), "<i4") if rows.orig_hw is None else rows.orig_hw.astype("<i4"),
        "crop": np.zeros((count, 4), "<i4") if rows.crop is None else rows.crop.astype("<i4"),
        "row_xxh3": digests,
    }
    bf16 = {payload} if dtype == "BF16" else set()
    for one in extras:
        columns |= _columns(one.name, rows.extras[one.name])
        bf16 |= {one.name} if one.dtype == "BF16" else set()
    if rows.scale is not None:
        columns[f"{payload}.scale"] = np.concatenate(rows.scale) if isinstance(rows.scale, list) else rows.scale
    columns |= _columns(payload, rows.payload)
    channels = Bucket(unit.bucket, dtype, 0, payload).channels
    moments = payload == "moments"
    metadata = {
        "fls.format": FORMAT,
        "fls.fingerprint": fingerprint(hashed),
        "fls.provenance": canonical_json(hashed).decode(),
        "fls.unit": unit.id,
        "fls.bucket": "x".join(map(str, unit.bucket)),
        "fls.fields": canonical_json([payload, *(one.name for one in extras)]).decode(),
        "fls.scaling": "raw",
        "fls.pixel_range": str(hashed.get("pixel_range", "-1,1")),
        "fls.posterior": "mean,logvar" if moments else "none",
        "fls.channels": f"0..{channels - 1} mean" + (f", {channels}..{2 * channels - 1} logvar" if moments else ""),
    }
    return columns, bf16, metadata


def _columns(name: str, values: Values) -> dict[str, np.ndarray]:
    """One tensor's columns: ragged rows lie one after another behind their offsets."""
    if not isinstance(values, list):
        return {name: np.ascontiguousarray(values)}
    offsets = np.zeros(len(values) + 1, "<u8")
    np.cumsum([len(one) for one in values], out=offsets[1:])
    return {f"{name}.offsets": offsets, name: np.concatenate(values)}


def finite_rows(values: Values, dtype: str) -> np.ndarray:
    """bool [N]: no value of row i is infinity or NaN."""
    if isinstance(values, list):
        rows = [np.ascontiguousarray(row) for row in values]
        table = np.array([(row.ctypes.data, row.size) for row in rows], np.int64).reshape(-1, 2)
    else:
        values = np.ascontiguousarray(values)
        table = np.full((len(values), 2), math.prod(values.shape[1:]), np.int64)
        table[:, 0] = values.ctypes.data + np.arange(len(values)) * (table[:, 1] * values.itemsize)
    finite = np.empty(len(values), bool)
    _native.call("cpu", "finite_rows", table.ctypes.data, len(table), DTYPE_CODES[dtype], finite.ctypes.data)
    return finite


def row_digest(*parts: np.ndarray) -> int:
    """xxh3_64 of a row's bytes, of int8 rows followed by its scales'."""
    digest = xxhash.xxh3_64()
    for part in parts:
        digest.update(np.ascontiguousarray(part).reshape(-1).view(np.uint8).data)
    return digest.intdigest()
