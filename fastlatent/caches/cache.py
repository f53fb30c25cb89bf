"""A cache of another project once it is opened: its rows in order, and how to read each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fastlatent.data.packed_files import DamagedArrays
from fastlatent.store.records import Field

DTYPES: dict[str, np.dtype[Any]] = {
    "F16": np.dtype("<f2"), "BF16": np.dtype("<u2"), "F32": np.dtype("<f4"), "F64": np.dtype("<f8"),
}  # fmt: skip
# Of arrays, which know no bfloat16.
NAME_OF = {dtype: name for name, dtype in DTYPES.items() if dtype.kind == "f"}
# What a row's file held besides the latent, as the bytes of a safetensors file: nothing of a cache is lost.
REST = Field("rest", "U8", (-1,))


# A row that cannot be used; the message says why, without the file's name. The row is left out and named.
DamagedEntry = DamagedArrays


@dataclass(frozen=True)
class Told:
    """What the user said of a cache that its files do not tell.

    latent_shape: of a row, where files hold bytes alone; () if not said.
    """

    latent_shape: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class CacheItem:
    """One row to be.

    key: relative POSIX path, unique in the cache, from which `write` makes the row's place again.
    place: the file that holds it, for messages, as `Files.place` gives it.
    size, stamp: of that file; while both stay, the row is taken to be unchanged.
    label: index into Cache.classes, -1 for none. group, order: of a trajectory or video, and the place there.
    at: where in the file, for the format alone.
    """

    key: str
    place: str
    size: int
    stamp: int
    label: int = -1
    group: str = ""
    order: int = 0
    at: Any = None


@dataclass(frozen=True)
class CacheRow:
    """values [F, ...] in the cache's dtype (uint16 for BF16), as they are stored; F = 2: the image, then its mirror
    image. orig_hw, crop: as in `fastlatent.store`, zeros where not known. extras: one array for each Cache.fields.
    """

    values: np.ndarray
    orig_hw: tuple[int, int] = (0, 0)
    crop: tuple[int, int, int, int] = (0, 0, 0, 0)
    extras: Mapping[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True)
class Cache:
    """A cache, opened.

    Attributes:
        items: by group, order and the key's bytes.
        payload: "moments" (mean‖logvar), "latents" or "tokens". dtype: of DTYPES, of all rows.
        buckets: shapes [F, ...] that rows may have; a row of another shape is damaged.
        content: the bytes that make one row, and no other; their digest tells whether it changed. OSError or
            DamagedEntry where they cannot be had. Called in several threads, as `row` is.
        row: from those bytes. DamagedEntry.
        classes: names. fields: the further tensors of every row.
        facts: what the format says of how the values were made, hashed into the fingerprint; JSON.
        notes: what else the cache says of itself (statistics, metadata), kept beside; JSON.
        scaling: (factor, shift) where this cache says it; else the format's SCALING counts.
        left_out: place -> why; files that should hold rows and do not. ignored: suffix -> count of other files.
        remarks: lines to print.
    """

    items: Sequence[CacheItem]
    payload: str
    dtype: str
    buckets: tuple[tuple[int, ...], ...]
    content: Callable[[CacheItem], bytes]
    row: Callable[[CacheItem, bytes], CacheRow]
    classes: list[str] = field(default_factory=list)
    fields: tuple[Field, ...] = ()
    scaling: tuple[float, float] | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    notes: Mapping[str, Any] = field(default_factory=dict)
    left_out: Mapping[str, str] = field(default_factory=dict)
    ignored: Mapping[str, int] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()
    close: Callable[[], None] = lambda: None


def check_row(values: np.ndarray, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """`values`, contiguous, if they are of this shape and dtype; DamagedEntry with what was expected otherwise."""
    if values.shape != shape or values.dtype != DTYPES[dtype]:
        raise DamagedEntry(
            f"expected {DTYPES[dtype]} {list(shape)} as in the first file, got {values.dtype} {list(values.shape)}"
        )
    return np.ascontiguousarray(values)
