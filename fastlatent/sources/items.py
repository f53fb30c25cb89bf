"""What every source yields: items in a fixed order, the columns that come with them, and how to read their bytes.

Torch-free.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import xxhash

RAGGED = -1
RETRY_SECONDS = (0.5, 2.0, 0.0)  # after each failed attempt to read a file
NOTHING: Mapping[str, Any] = MappingProxyType({})


def _nothing() -> Mapping[str, Any]:
    return NOTHING  # unhashable before Python 3.12, so no default by itself


@dataclass(frozen=True, slots=True)
class Item:
    """One image or video.

    key: relative POSIX path, unique in the source. Bytes of a name that are no UTF-8 appear as surrogates
        (os.fsdecode), so os.fsencode(key) gives the name's exact bytes back.
    place: where its bytes are, for `Source.read` and for messages: a path, a URL, "a.tar: member" ...
    size, stamp: bytes of what holds it, and a number that changes whenever that or `attached` does (mtime_ns of a
        file, mixed with a hash of what is attached): while both stay, the item is taken to be unchanged.
    label: index into Source.classes, -1 for none.
    group, order: the trajectory it belongs to, and its place there; all items of a source have a group, or none has.
    attached: column name -> value, for each of Source.columns: numbers (nested sequences) or text.
    """

    key: str
    place: str
    size: int
    stamp: int
    label: int = -1
    group: str = ""
    order: int = 0
    attached: Mapping[str, Any] = field(default_factory=_nothing)


@dataclass(frozen=True)
class Column:
    """What every item carries beside its pixels: dtype F32, F64 or I64 and the shape of one value; or text.

    Text is dtype U8 of shape (RAGGED,): UTF-8, "" where an item has none.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]


class UnreadableError(ValueError):
    """An item's bytes cannot be had; the message says why."""


@dataclass(frozen=True)
class Source:
    """All items below one root.

    items: sorted by the bytes of their keys; with groups by group key, order, key.
    read: the file's bytes. OSError where that fails; ValueError for what is damaged around it (an archive, say).
    left_out: what was found and cannot be used -> why, in a line; nothing of it is among the items.
    ignored: suffix (".txt", "" for none) -> how many files of it were passed over.
    beside: files to copy beside the dataset when asked to (traj_data.pkl): relative POSIX path -> how to read it.
    remarks: what the items' columns lack, or what was made to fit: lines to print.
    """

    items: Sequence[Item]
    read: Callable[[Item], bytes]
    classes: list[str] = field(default_factory=list)
    columns: tuple[Column, ...] = ()
    left_out: Mapping[str, str] = field(default_factory=_nothing)
    ignored: Mapping[str, int] = field(default_factory=_nothing)
    beside: Mapping[str, Callable[[], bytes]] = field(default_factory=_nothing)
    remarks: tuple[str, ...] = ()

    def fetch(self, item: Item) -> bytes:
        """`read`, where a network's file is asked for three times; UnreadableError if it cannot be had."""
        for pause in RETRY_SECONDS:
            try:
                return self.read(item)
            except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
                raise UnreadableError(f"{item.place} could not be read: {error.strerror or error}") from None
            except OSError as error:  # of a network's file system, say
                reason = error.strerror or str(error) or type(error).__name__
                time.sleep(pause)
            except ValueError as error:  # a damaged archive
                raise UnreadableError(str(error)) from None
        raise UnreadableError(f"{item.place} could not be read, {len(RETRY_SECONDS)} times: {reason}")


def items_digest(items: Iterable[Item], *names: str) -> str:
    """xxh3_128, 32 hexadecimal digits, of these fields of all items."""
    digest = xxhash.xxh3_128()
    for item in items:
        digest.update(repr(tuple(getattr(item, name) for name in names)).encode())
    return digest.hexdigest()


def stamp_of(mtime_ns: int, attached: Mapping[str, Any]) -> int:
    """Item.stamp: mtime_ns itself where nothing is attached, else mixed with it; a non-negative 63-bit number."""
    if not attached:
        return mtime_ns
    return (mtime_ns + xxhash.xxh3_64_intdigest(_canonical(attached))) % 2**63


def content_digest(item: Item, data: bytes) -> str:
    """xxh3_128, 32 hexadecimal digits: of the file's bytes alone, or followed by what is attached."""
    digest = xxhash.xxh3_128(data)
    if item.attached:
        digest.update(_canonical(item.attached))
    return digest.hexdigest()


def _canonical(attached: Mapping[str, Any]) -> bytes:
    return json.dumps(dict(attached), sort_keys=True, separators=(",", ":")).encode()
