"""The rows of one unit, and the shard they become."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from fastlatent.store.files import canonical_json
from fastlatent.store.provenance import fingerprint
from fastlatent.store.records import (
    FORMAT,
    PlannedItem,
    ShardRecord,
    Unit,
    digest_columns,
    encode_key,
    key_columns,
    key_hashes,
)
from fastlatent.store.shard import write_shard
from fastlatent.store.statistics import Statistics

DTYPES = {np.dtype(np.float16): "F16", np.dtype(np.float32): "F32", np.dtype(np.uint16): "BF16"}


@dataclass(frozen=True)
class Rows:
    """The rows of one unit, in its order, files in quarantine left out.

    Attributes:
        keys: N keys.
        moments: [N, F, 2C, H, W], mean||logvar, unscaled; float16, float32, or uint16 holding bfloat16 bits.
        orig_hw: int32 [N, 2], height and width of the source image.
        crop: int32 [N, 4], top, left, height, width of what the latent shows, in the source image, rounded.
    """

    keys: list[str]
    moments: np.ndarray
    orig_hw: np.ndarray
    crop: np.ndarray

    @property
    def dtype(self) -> str:
        """Of the moments, as the format names it.

        Raises:
            ValueError: it is none that rows are stored in.
        """
        dtype = DTYPES.get(self.moments.dtype)
        if dtype is None:
            raise ValueError(f"moments: expected float16, float32 or uint16 (bfloat16), got {self.moments.dtype}")
        return dtype

    def check(self, unit: Unit) -> None:
        """Raise ValueError where a shape or dtype is not the unit's."""
        count = len(self.keys)
        for name, shape in (("moments", unit.bucket), ("orig_hw", (2,)), ("crop", (4,))):
            found = getattr(self, name).shape
            if found != (count, *shape):
                raise ValueError(f"{name}: expected {(count, *shape)}, got {found} for unit {unit.id}")
        for name in ("orig_hw", "crop"):
            if getattr(self, name).dtype.kind not in "iu":
                raise ValueError(f"{name}: expected int32, got {getattr(self, name).dtype}")

    def finite(self) -> np.ndarray:
        """bool [N]: an exponent of all ones is infinity or NaN; 3x as fast as isfinite on float16."""
        masks = {"F16": (0x7C00, np.uint16), "BF16": (0x7F80, np.uint16), "F32": (0x7F800000, np.uint32)}
        mask, bits = masks[self.dtype]
        flat = np.ascontiguousarray(self.moments).view(bits)
        return np.array([not ((row & mask) == mask).any() for row in flat], bool)


def write_rows(
    path: Path, hashed: Mapping[str, object], unit: Unit, items: list[PlannedItem], rows: Rows, kept: np.ndarray
) -> ShardRecord:
    """Write a unit's shard into the dataset `path`: of `rows` those where `kept` (bool [N]); `items` are theirs."""
    moments = np.ascontiguousarray(rows.moments if kept.all() else rows.moments[kept])
    keys = [encode_key(item.key) for item in items]
    payload = moments.reshape(len(keys), -1).view(np.uint8)
    columns = {
        "sample_id": key_hashes(keys),
        **key_columns(keys),
        "src_xxh3": digest_columns([item.digest for item in items]),
        "orig_hw": rows.orig_hw[kept].astype("<i4"),
        "crop": rows.crop[kept].astype("<i4"),
        "row_xxh3": np.array([xxhash.xxh3_64_intdigest(row.data) for row in payload], "<u8"),
        "moments": moments,
    }
    name = "x".join(map(str, unit.bucket))
    channels = unit.bucket[1] // 2
    metadata = {
        "fls.format": FORMAT,
        "fls.fingerprint": fingerprint(hashed),
        "fls.provenance": canonical_json(hashed).decode(),
        "fls.unit": unit.id,
        "fls.bucket": name,
        "fls.fields": canonical_json(["moments"]).decode(),
        "fls.scaling": "raw",
        "fls.pixel_range": str(hashed.get("pixel_range", "-1,1")),
        "fls.posterior": "mean,logvar",
        "fls.channels": f"0..{channels - 1} mean, {channels}..{2 * channels - 1} logvar",
    }
    bf16 = {"moments"} if rows.dtype == "BF16" else set()
    file = write_shard(path / "shards" / name, unit.id, columns, bf16, metadata)
    return ShardRecord(
        unit=unit.id,
        path=file.path.relative_to(path).as_posix(),
        bytes=file.bytes,
        header_bytes=file.header_bytes,
        header_xxh3_64=file.header_xxh3_64,
        xxh3_128=file.xxh3_128,
        rows=len(keys),
        bucket=0,
        first_key=items[0].key,
        last_key=items[-1].key,
        statistics=Statistics.of(moments, rows.dtype),
    )
