"""The files of MosaicML's MDS, version 2: index.json and its shards, read with every number checked, and made.

A shard: uint32 count, uint32 offsets[count + 1], a JSON text, then samples; a sample: uint32 sizes of its columns of no
fixed size, then the columns' bytes. A column's encoding says what the bytes are; nothing is decoded here but arrays.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xxhash

from fastlatent.caches.cache import DamagedEntry
from fastlatent.caches.shards import Ranges
from fastlatent.sources.files import Files, Found
from fastlatent.store.files import parse_json

INDEX = "index.json"
MAX_INDEX = 1 << 28  # bytes; 1 M shards
PIECE = 8 << 20  # bytes read at once to hash a shard
FLOATS = {"float16": "F16", "float32": "F32", "float64": "F64"}
CODES = {18: "float16", 34: "float32", 66: "float64"}  # of arrays that carry their dtype
MOST_PREFIX = 1 + 1 + 8 * 63  # bytes before the values of an array that carries its dtype and shape
DIGESTS = {name: getattr(xxhash, name) for name in sorted(xxhash.algorithms_available)} | {
    name: getattr(hashlib, name)
    for name in ("blake2b", "blake2s", "md5", "sha1", "sha224", "sha256", "sha384", "sha512", "sha3_256", "sha3_512")
}


@dataclass(frozen=True, slots=True)
class Column:
    """size: bytes in every sample, None where they differ."""

    name: str
    encoding: str
    size: int | None


@dataclass(frozen=True, slots=True, eq=False)
class MdsShard:
    """offsets: int64 [samples + 1] of the samples in the file. hashes: by algorithm, as the index has them."""

    found: Found
    place: str
    columns: tuple[Column, ...]
    offsets: np.ndarray
    hashes: Mapping[str, str]
    settings: Mapping[str, Any]

    @property
    def stem(self) -> str:
        return self.found.path.removesuffix(".mds")


@dataclass(frozen=True, slots=True)
class Listed:
    """A shard as an index lists it."""

    path: str
    entry: Mapping[str, Any]


def list_shards(files: Files, found: Sequence[Found]) -> list[Listed]:
    """The shards of every index; of indices that one in a folder above has merged, that one counts.

    Raises:
        ValueError: there is no index, or one that cannot be read.
    """
    indices = sorted(
        (one for one in found if one.path.rpartition("/")[2] == INDEX), key=lambda one: (one.path.count("/"), one.path)
    )
    listed: dict[str, Listed] = {}
    for one in indices:
        place, folder = files.place(one.path), one.path.removesuffix(INDEX)
        if one.size > MAX_INDEX:
            raise ValueError(f"{place}: expected at most {MAX_INDEX} bytes, got {one.size}")
        value = parse_json(files.read(one.path), place)
        shards = value.get("shards") if isinstance(value, dict) else None
        if not isinstance(shards, list) or value.get("version") != 2:
            raise ValueError(f"{place}: expected an index of MDS, version 2, with its shards, got {value!s:.100}")
        for entry in shards:
            raw = entry.get("raw_data") if isinstance(entry, dict) else None
            name = raw.get("basename") if isinstance(raw, dict) else None
            if not isinstance(name, str) or entry.get("format") != "mds":
                raise ValueError(f"{place}: expected shards of format mds with their names, got {entry!s:.200}")
            listed.setdefault(folder + name, Listed(folder + name, entry))
    if not listed:
        raise ValueError(f"{files.root}: expected an {INDEX} that lists shards, got none")
    return list(listed.values())


def open_shard(ranges: Ranges, found: Found, place: str, entry: Mapping[str, Any]) -> MdsShard:
    """A shard whose table of samples was checked.

    Raises:
        OSError: it cannot be read. DamagedEntry: index and file do not fit each other, or are no MDS.
    """
    names, encodings, sizes = (entry.get(f"column_{what}") for what in ("names", "encodings", "sizes"))
    if (
        not (isinstance(names, list) and isinstance(encodings, list) and isinstance(sizes, list))
        or not len(names) == len(encodings) == len(sizes) == len(set(map(str, names)))
        or not all(isinstance(one, str) for one in (*names, *encodings))
        or not all(one is None or (type(one) is int and 0 <= one < 1 << 32) for one in sizes)
    ):
        raise DamagedEntry(f"expected columns of one name, encoding and size each, got {entry!s:.200}")
    columns = tuple(Column(*one) for one in zip(names, encodings, (size or None for size in sizes), strict=True))
    samples, said = entry.get("samples"), entry["raw_data"].get("bytes")
    if found.size != said:
        raise DamagedEntry(f"expected {said!r:.40} bytes as {INDEX} says, got {found.size}: half-written or cut")
    count = int.from_bytes(ranges.read(found, 0, min(4, found.size)), "little")
    if count != samples or 4 * (count + 2) > found.size:
        raise DamagedEntry(f"expected {samples!r:.40} samples as {INDEX} says, got {count} in {found.size} bytes")
    offsets = np.frombuffer(ranges.read(found, 4, 4 * (count + 1)), "<u4").astype(np.int64)
    if offsets[0] < 4 * (count + 2) or offsets[-1] != found.size or (np.diff(offsets) < 0).any():
        raise DamagedEntry("expected offsets of samples that rise to the file's end, got others")
    hashes = entry["raw_data"].get("hashes")
    settings = {name: entry.get(name) for name in ("hashes", "size_limit")}
    return MdsShard(found, place, columns, offsets, hashes if isinstance(hashes, dict) else {}, settings)


def sizes_of(ranges: Ranges, shard: MdsShard) -> np.ndarray:
    """int64 [samples, columns] of the columns' bytes; -1 in all of a sample whose sizes do not add up.

    Of a sample only the first bytes are read, of several at once where they lie close.
    """
    free = [k for k, one in enumerate(shard.columns) if one.size is None]
    sizes = np.array([[one.size or 0 for one in shard.columns]], np.int64).repeat(len(shard.offsets) - 1, 0)
    width, gap, offsets = 4 * len(free), ranges.files.gap, shard.offsets
    lengths = np.diff(offsets)
    good = lengths >= width
    if free and len(sizes):
        heads = np.zeros((len(sizes), len(free)), "<u4")
        i = 0
        while i < len(sizes):
            j = max(i + 1, int(np.searchsorted(offsets, offsets[i] + gap - width, "right")) - 1)
            end = min(int(offsets[j - 1]) + width, shard.found.size)
            data = ranges.read(shard.found, int(offsets[i]), end - int(offsets[i]))
            for k in range(i, j):
                if good[k]:
                    heads[k] = np.frombuffer(data, "<u4", len(free), int(offsets[k] - offsets[i]))
            i = j
        sizes[:, free] = heads
    sizes[~good | (sizes.sum(1) + width != lengths)] = -1
    return sizes


def split(columns: Sequence[Column], data: bytes) -> dict[str, memoryview]:
    """A sample's columns.

    Raises:
        DamagedEntry: their sizes do not add up to the sample.
    """
    free = [one for one in columns if one.size is None]
    if len(data) < 4 * len(free):
        raise DamagedEntry(f"expected {len(free)} sizes of columns, got {len(data)} bytes")
    said = iter(np.frombuffer(data, "<u4", len(free)).tolist())
    view, at, parts = memoryview(data), 4 * len(free), {}
    for one in columns:
        size = next(said) if one.size is None else one.size
        parts[one.name] = view[at : at + size]
        at += size
    if at != len(data):
        raise DamagedEntry(f"expected columns of {at} bytes together as their sizes say, got {len(data)}")
    return parts


def sample_bytes(columns: Sequence[Column], parts: Mapping[str, bytes | memoryview]) -> bytes:
    sizes = [len(parts[one.name]) for one in columns if one.size is None]
    return b"".join((np.array(sizes, "<u4").tobytes(), *(parts[one.name] for one in columns)))


def shard_bytes(columns: Sequence[Column], samples: Sequence[bytes], settings: Mapping[str, Any]) -> bytes:
    """A shard. ValueError where it would be larger than its offsets can say."""
    config = json.dumps(config_of(columns, settings), sort_keys=True).encode()
    sizes = [4 * (len(samples) + 2) + len(config), *map(len, samples)]
    offsets = np.array(sizes, np.int64).cumsum()
    if offsets[-1] >= 1 << 32:
        raise ValueError(f"expected a shard below 4 GiB, got {offsets[-1]} bytes: a smaller --unit-rows makes them so")
    head = len(samples).to_bytes(4, "little") + offsets.astype("<u4").tobytes()
    return b"".join((head, config, *samples))


def config_of(columns: Sequence[Column], settings: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "version": 2,
        "format": "mds",
        "compression": None,
        "hashes": list(settings.get("hashes") or ()),
        "size_limit": settings.get("size_limit", 1 << 26),
        "column_names": [one.name for one in columns],
        "column_encodings": [one.encoding for one in columns],
        "column_sizes": [one.size for one in columns],
    }


def index_entry(name: str, data: bytes, columns: Sequence[Column], settings: Mapping[str, Any]) -> dict[str, Any]:
    """What an index says of a shard of these bytes."""
    hashes = {one: DIGESTS[one](data).hexdigest() for one in settings.get("hashes") or () if one in DIGESTS}
    return {
        "samples": int.from_bytes(data[:4], "little"),
        "raw_data": {"basename": name, "bytes": len(data), "hashes": hashes},
        "zip_data": None,
        **config_of(columns, {**settings, "hashes": list(hashes)}),
    }


def wrong_hash(ranges: Ranges, shard: MdsShard) -> str:
    """Why a shard's bytes are not those that its index has hashes of; "" where they are, or nothing is known."""
    known = {name: DIGESTS[name]() for name in shard.hashes if name in DIGESTS}
    for at in range(0, shard.found.size if known else 0, PIECE):
        data = ranges.read(shard.found, at, min(PIECE, shard.found.size - at))
        for digest in known.values():
            digest.update(data)
    for name, digest in known.items():
        if digest.hexdigest() != shard.hashes[name]:
            return (
                f"the shard's {name} is {digest.hexdigest()}, {INDEX} has {shard.hashes[name]!r:.80}: the shard is "
                "damaged; fetch it again"
            )
    return ""


def array_of(encoding: str) -> tuple[str | None, tuple[int, ...] | None]:
    """(dtype, shape) that an encoding ndarray[:dtype[:sizes]] fixes, None for what each array carries.

    Raises:
        ValueError: it is no such encoding.
    """
    name, *said = encoding.split(":")
    try:
        shape = tuple(int(size) for size in said[1].split(",")) if len(said) > 1 else None
    except ValueError:
        shape = ()
    if name != "ndarray" or len(said) > 2 or (said and said[0] not in FLOATS) or (shape is not None and not shape):
        raise ValueError(f"expected an array of floats, got the encoding {encoding!r:.80}")
    return (said[0] if said else None), shape


def read_prefix(encoding: str, data: bytes | memoryview) -> tuple[str, tuple[int, ...], int]:
    """(dtype of DTYPES, shape, offset of the values) of an array; `data` are its bytes, or the first MOST_PREFIX."""
    dtype, shape = array_of(encoding)
    at = 0
    if dtype is None:
        dtype, at = CODES.get(data[0] if data else -1), 1
        if dtype is None:
            raise DamagedEntry(f"expected an array of floats, got the code {data[0] if data else None}")
    if shape is None:
        said = data[at] if len(data) > at else 0
        axes, width = said >> 2, 1 << (said & 3)
        if not axes or len(data) < at + 1 + axes * width:
            raise DamagedEntry(f"expected an array with its shape, got {len(data)} bytes")
        sizes = bytes(data[at + 1 : at + 1 + axes * width])
        shape = tuple(int.from_bytes(sizes[i : i + width], "little") for i in range(0, len(sizes), width))
        at += 1 + axes * width
    return FLOATS[dtype], shape, at


def prefix_of(encoding: str, dtype: str, shape: tuple[int, ...]) -> bytes:
    """What stands before the values of an array; ValueError where the encoding fixes another dtype or shape."""
    fixed_dtype, fixed_shape = array_of(encoding)
    name = next((one for one, said in FLOATS.items() if said == dtype), None)
    if name is None or fixed_dtype not in (None, name) or fixed_shape not in (None, shape):
        raise ValueError(f"expected an array as {encoding} says, got {dtype} {list(shape)}")
    parts = b"" if fixed_dtype else bytes([next(code for code, one in CODES.items() if one == name)])
    if fixed_shape is None:
        wide = next(k for k in range(4) if max(shape) < 1 << (8 << k))
        parts += bytes([len(shape) << 2 | wide]) + b"".join(size.to_bytes(1 << wide, "little") for size in shape)
    return parts


def fits(size: int, shape: tuple[int, ...], offset: int, item: int) -> bool:
    return size - offset == math.prod(shape) * item
