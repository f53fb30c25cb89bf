"""The bytes of safetensors files: headers read and checked before anything is allocated, tensors and files made."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastlatent.data.packed_files import GZIP, Buffer, DamagedArrays, Read, guarded, gunzip, reader
from fastlatent.store.shard import MAX_HEADER_BYTES, TensorEntry, parse_header

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U64": torch.uint64, "U32": torch.uint32,
    "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu, "C64": torch.complex64,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}
ITEM_BYTES = {name: dtype.itemsize for name, dtype in DTYPES.items()}
HEAD = 4096  # bytes read at once: a file of a few tensors has its header in them


def read_header(read: Read, size: int) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    """The tensors and the metadata of a file of `size` bytes; `read(offset, count)` gives its bytes.

    Raises:
        DamagedArrays: the file is cut, or its header is no header of safetensors that covers the file exactly.
    """
    head = read(0, min(HEAD, size))
    length = int.from_bytes(head[:8], "little")
    if len(head) < 8 or not 2 <= length <= min(size - 8, MAX_HEADER_BYTES):
        raise DamagedArrays(
            f"expected a safetensors file, got {size} bytes that begin with {bytes(head[:8])!r}: truncated or none"
        )
    text = bytes(head[8 : 8 + length] if 8 + length <= len(head) else read(8, length))
    try:
        entries, metadata = parse_header(text, size, ITEM_BYTES)
        "".join((*entries, *metadata, *metadata.values())).encode()
    except UnicodeEncodeError as error:
        raise DamagedArrays(
            f"expected names and metadata that UTF-8 can hold, got {error.object[error.start]!a}"
        ) from None
    except ValueError as error:
        raise DamagedArrays(str(error)) from None
    return entries, metadata


@guarded
def read_safetensors(data: Buffer) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors by name, metadata) of a .safetensors file, also of a .gz.

    Raises:
        DamagedArrays: no such file, torn, a dtype that torch does not have.
    """
    view = memoryview(gunzip(data) if data[:2] == GZIP else data)
    entries, metadata = read_header(reader(view), len(view))
    tensors = {}
    for name, one in entries.items():
        flat = torch.empty(math.prod(one.shape), dtype=DTYPES[one.dtype])
        if flat.numel():
            flat.view(torch.uint8).numpy().data[:] = view[one.begin : one.end]
        tensors[name] = flat.reshape(one.shape)
    return tensors, metadata


def safetensors_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> bytes:
    """What safetensors.torch.save writes, with the metadata in the order of its names.

    The library itself writes metadata in an order that changes from process to process.
    """
    parts: dict[str, tuple[str, tuple[int, ...], Buffer]] = {}
    for name, one in tensors.items():
        flat = one.detach().cpu().contiguous().reshape(-1)
        content = flat.view(torch.uint8).numpy().data if flat.numel() else b""
        parts[name] = NAMES[one.dtype], tuple(one.shape), content
    return file_bytes(parts, metadata or {})


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


def file_bytes(tensors: Mapping[str, tuple[str, tuple[int, ...], Buffer]], metadata: Mapping[str, str]) -> bytes:
    """A whole file of tensors (dtype, shape, bytes); the same input gives the same file."""
    named = in_order({name: (one[0], one[1]) for name, one in tensors.items()})
    head, _ = header({name: tensors[name][:2] for name in named}, metadata)
    return b"".join((head, *(tensors[name][2] for name in named)))
