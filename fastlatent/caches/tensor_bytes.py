"""The bytes of safetensors files: headers read and checked before anything is allocated, headers made."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastlatent.caches.cache import DamagedEntry
from fastlatent.store.files import parse_json

ITEM_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8, "C64": 8,
}  # fmt: skip
MAX_HEADER = 100_000_000  # bytes, the format's own limit
HEAD = 4096  # bytes read at once: a file of a few tensors has its header in them
MAX_ARRAY = 1 << 48  # bytes; larger numbers in a header are nonsense


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor of a file: its bytes are file[begin:end]."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_header(read: Callable[[int, int], bytes], size: int) -> tuple[dict[str, Entry], dict[str, str]]:
    """The tensors and the metadata of a file of `size` bytes; `read(offset, count)` gives its bytes.

    Raises:
        DamagedEntry: the file is cut, or its header is no header of safetensors that covers the file exactly.
    """
    head = read(0, min(HEAD, size))
    length = int.from_bytes(head[:8], "little")
    if len(head) < 8 or length > min(size - 8, MAX_HEADER):
        raise DamagedEntry(f"expected a safetensors file, got {size} bytes that begin with {bytes(head[:8])!r}")
    text = head[8 : 8 + length] if 8 + length <= len(head) else read(8, length)
    if len(text) != length:
        raise DamagedEntry(f"expected a header of {length} bytes, got {len(text)}: the file was cut")
    return parse_header(text, size)


def parse_header(text: bytes | memoryview, size: int) -> tuple[dict[str, Entry], dict[str, str]]:
    """As `read_header`, from the header's text."""
    try:
        value = parse_json(text, "header")
    except ValueError as error:
        raise DamagedEntry(str(error)) from None
    if not isinstance(value, dict):
        raise DamagedEntry(f"expected a header that is a JSON object, got {value!r:.100}")
    metadata = value.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(one, str) for one in metadata.values()):
        raise DamagedEntry(f"expected metadata of texts, got {metadata!r:.100}")
    try:
        "".join((*value, *metadata, *metadata.values())).encode()
    except UnicodeEncodeError as error:
        raise DamagedEntry(
            f"expected names and metadata that UTF-8 can hold, got {error.object[error.start]!a}"
        ) from None
    start = 8 + len(text)
    entries = {name: _entry(name, said, start) for name, said in value.items()}
    at = start
    for name, entry in sorted(entries.items(), key=lambda one: (one[1].begin, one[1].end)):
        if entry.begin != at:
            raise DamagedEntry(f"{name!r:.100}: expected its bytes at {at}, got {entry.begin}: a hole or an overlap")
        at = entry.end
    if at != size:
        raise DamagedEntry(f"expected {at} bytes as the header says, got {size}: half-written or cut")
    return entries, metadata


def _entry(name: str, said: Any, start: int) -> Entry:
    if isinstance(said, dict):
        dtype, shape, place = said.get("dtype"), said.get("shape"), said.get("data_offsets")
        if (
            isinstance(dtype, str)
            and dtype in ITEM_BYTES
            and isinstance(shape, list)
            and isinstance(place, list)
            and len(place) == 2
            and all(type(one) is int and 0 <= one < MAX_ARRAY for one in (*shape, *place))
            and math.prod(shape) * ITEM_BYTES[dtype] == place[1] - place[0]
        ):
            return Entry(dtype, tuple(shape), start + place[0], start + place[1])
    raise DamagedEntry(
        f"{name!r:.100}: expected a dtype, a shape and the offsets that follow from them, got {said!r:.200}"
    )


def in_order(tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> list[str]:
    """The names in the order of the format's usual writer: wide dtypes first, so that all are aligned, then by name."""
    return sorted(tensors, key=lambda name: (-ITEM_BYTES[tensors[name][0]], name))


def header(tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str]) -> tuple[bytes, list[int]]:
    """A file's first bytes for tensors (dtype, shape) in this order; and the offsets of each and of the end."""
    value: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    places = [0]
    for name, (dtype, shape) in tensors.items():
        end = places[-1] + math.prod(shape) * ITEM_BYTES[dtype]
        value[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [places[-1], end]}
        places.append(end)
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    return len(text).to_bytes(8, "little") + text, [start + place for place in places]


def file_bytes(
    tensors: Mapping[str, tuple[str, tuple[int, ...], bytes | memoryview]], metadata: Mapping[str, str]
) -> bytes:
    """A whole file of tensors (dtype, shape, bytes); the same input gives the same file."""
    named: Sequence[str] = in_order({name: (one[0], one[1]) for name, one in tensors.items()})
    head, _ = header({name: tensors[name][:2] for name in named}, metadata)
    return b"".join((head, *(tensors[name][2] for name in named)))
