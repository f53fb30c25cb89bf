"""A dataset on its way into another project's format, and the files that it becomes."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from fastlatent.store.files import TEMPORARY, write_all


@dataclass(frozen=True)
class OutRow:
    """A row as the target has it: values [F, ...] in the outgoing dtype (uint16 for BF16), scaled; the rest as stored.

    extras: the dataset's further tensors of this row.
    """

    key: str
    label: int
    group: str
    order: int
    values: np.ndarray
    orig_hw: tuple[int, int]
    crop: tuple[int, int, int, int]
    extras: Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Outgoing:
    """The rows of a dataset for one target format.

    Attributes:
        count: rows. row: number -> OutRow; by group, order and key, as the index has them.
        payload: one of the format's PAYLOADS. dtype: of `fastlatent.caches.cache.DTYPES`.
        classes: names; a label is an index into them.
        shapes: of rows [F, ...].
        mean, std: float64 [C], of latents in the outgoing scale.
        scaling: (factor, shift) of the values, stored = (raw - shift) * factor; None where channels differ, or nobody
            knows.
        facts, notes: of the cache of the same format that the dataset was converted from; else empty.
        rows_per_shard: for formats of many rows a file.
    """

    count: int
    row: Callable[[int], OutRow]
    payload: str
    dtype: str
    classes: list[str]
    shapes: tuple[tuple[int, ...], ...]
    mean: np.ndarray
    std: np.ndarray
    facts: Mapping[str, Any]
    notes: Mapping[str, Any]
    rows_per_shard: int
    scaling: tuple[float, float] | None = (1.0, 0.0)


def target(out: Path, relative: str) -> Path:
    """`out / relative`; ValueError where a key would lead outside, or no file can have that name."""
    parts = relative.split("/")
    if "" in parts or "." in parts or ".." in parts or "\0" in relative:
        raise ValueError(f"{out}: expected a name that stays inside a folder, got {relative!r:.300}")
    if len(os.fsencode(parts[-1])) > 255 - 45:  # room for a temporary file's name
        raise ValueError(f"{out}: expected a file name of at most 210 bytes, got {relative!r:.300}")
    return out / relative


def put(path: Path, data: bytes) -> None:
    """Write a file whole or not at all; one that is there stays: in a folder of ours it has these bytes already."""
    if not path.exists():
        put_file(path, lambda file: write_all(file.fileno(), data))


def put_file(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Make a file of what `write` puts into it, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f"{TEMPORARY}{path.name}-{uuid.uuid4().hex}"
    try:
        with open(temporary, "xb", buffering=0) as file:
            write(file)
        try:
            os.replace(temporary, path)
        except FileNotFoundError:  # another process has finished the same export, and cleaned up behind it
            if not path.exists():
                raise
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
