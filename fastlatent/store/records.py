"""The small objects that plan, journal, manifest and dataset.json are made of, each with its parser."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from fastlatent.store.files import (
    canonical_json,
    hexadecimal,
    inside,
    member,
    natural,
    parse_json,
    read_bytes,
)
from fastlatent.store.shard import DTYPES
from fastlatent.store.statistics import Statistics

FORMAT = "fls/1"
ROOT = "dataset.json"
PAYLOAD_DTYPES = {"F16": 2, "F32": 4, "BF16": 2, "I8": 1}  # what a payload may be stored as -> bytes a value
PAYLOADS = ("moments", "latents", "tokens")
MAX_ROW_BYTES = 1 << 32
RAGGED = -1  # the length of an axis that differs from row to row
Data = bytes | memoryview  # a record has a field `bytes`, so the type needs another name inside it


def encode_key(key: str) -> bytes:
    """The bytes of a key, a relative POSIX path; names that are not UTF-8 keep their bytes (surrogateescape).

    Raises:
        ValueError: an empty key, or one with a surrogate that stands for no byte.
    """
    try:
        data = key.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError as error:
        raise ValueError(f"key {key!r}: expected a path as the file system gives it: {error}") from None
    if not data:
        raise ValueError("expected a key that is not empty")
    return data


def decode_key(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")


@dataclass(frozen=True)
class FileRecord:
    """A file of the dataset other than a shard, named by dataset.json: read whole, so checked whole."""

    path: str
    bytes: int
    xxh3_128: str

    @classmethod
    def of(cls, path: str, data: Data) -> FileRecord:
        return cls(path, len(data), xxhash.xxh3_128_hexdigest(data))

    @classmethod
    def parse(cls, value: object, what: str) -> FileRecord:
        return cls(member(value, "path", str, what), natural(value, "bytes", what), _digest(value, "xxh3_128", what))

    def check(self, path: Path, data: Data) -> None:
        """Raise ValueError where the file at `path`, read as `data`, is not the one that was committed."""
        digest = xxhash.xxh3_128_hexdigest(data)
        if (len(data), digest) != (self.bytes, self.xxh3_128):
            raise ValueError(
                f"{path}: expected {self.bytes} bytes with xxh3_128 {self.xxh3_128}, got {len(data)} bytes "
                f"with {digest}: the file is damaged; restore it from a copy, or run `fastlatent repair`"
            )

    def read_json(self, root: Path) -> Any:
        """The file's contents, its bytes checked before they are parsed."""
        path = inside(root, self.path, str(root / ROOT))
        data = read_bytes(path)
        self.check(path, data)
        return parse_json(data, str(path))


@dataclass(frozen=True)
class Field:
    """One more tensor of every row, an embedding or a caption's bytes, say: its name, dtype and the shape of a row.

    A first size of RAGGED: rows [L, ...] of L of their own; the shard holds them one after another, and NAME.offsets.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        taken = self.name.partition(".")[0] in TAKEN
        if not self.name or taken or self.name.endswith((".offsets", ".scale", ".utf8")) or self.name[0] == "_":
            raise ValueError(
                f"field {self.name!r}: expected a name that the format leaves free, not of {sorted(TAKEN)}"
            )
        if self.dtype not in DTYPES:
            raise ValueError(f"field {self.name!r}: expected a dtype among {sorted(DTYPES)}, got {self.dtype!r:.100}")
        sizes = self.shape[1:] if self.shape[:1] == (RAGGED,) else self.shape
        if not all(type(size) is int and size >= 1 for size in sizes) or math.prod(sizes) > MAX_ROW_BYTES // 8:
            raise ValueError(f"field {self.name!r}: expected sizes >= 1 (the first may be -1), got {self.shape!r:.100}")

    @property
    def ragged(self) -> bool:
        return self.shape[:1] == (RAGGED,)

    @classmethod
    def parse(cls, value: object, what: str) -> Field:
        shape = tuple(member(value, "shape", list, what))
        name, dtype = member(value, "name", str, what), member(value, "dtype", str, what)
        try:
            return cls(name, dtype, shape)
        except ValueError as error:
            raise ValueError(f"{what}: {error}") from None

    def to_dict(self) -> dict[str, object]:
        return {"name": self.name, "required": False, "dtype": self.dtype, "shape": list(self.shape)}


# Columns of shard and index, and what a loader's batch has besides.
TAKEN = frozenset(PAYLOADS) | {
    "sample_id", "key", "src_xxh3", "orig_hw", "crop", "row_xxh3", "group", "label",
    "key_hash", "scale", "epoch", "order",
}  # fmt: skip


@dataclass(frozen=True)
class Bucket:
    """One shape of row of the dataset's payload; the index has `rows` of them."""

    shape: tuple[int, ...]
    dtype: str
    rows: int
    payload: str = "moments"

    @classmethod
    def parse(cls, value: object, what: str, payload: str) -> Bucket:
        shape = tuple(member(value, "shape", list, what))
        check_shape(shape, what, payload)
        dtype = member(value, "dtype", str, what)
        if dtype not in PAYLOAD_DTYPES:
            raise ValueError(f"{what}: 'dtype': expected one of {sorted(PAYLOAD_DTYPES)}, got {dtype!r:.100}")
        return cls(shape, dtype, natural(value, "rows", what), payload)

    @property
    def ragged(self) -> bool:
        return RAGGED in self.shape

    @property
    def channels(self) -> int:
        """Latent channels C, or D of tokens."""
        return self.shape[2] if self.payload == "tokens" else self.shape[1] // (2 if self.payload == "moments" else 1)


# payload -> its row shape in words, and how many axes it has
SHAPES = {"moments": ("[F, 2C, ...]", 3, 5), "latents": ("[F, C, ...]", 2, 5), "tokens": ("[F, N, D]", 3, 3)}


def check_shape(shape: tuple[int, ...], what: str, payload: str | None = None) -> None:
    """Raise ValueError unless `shape` is a row shape of `payload` (None: of any), every size >= 1, and of sane size.

    F is 2 where the mirrored image is stored too, else 1. Rows of tokens may differ in N: RAGGED, and then F is 1.
    """
    names = PAYLOADS if payload is None else (payload,)
    if not any(_is_shape(shape, name) for name in names):
        words = " or ".join(f"{SHAPES[name][0]} of {name}" for name in names)
        raise ValueError(f"{what}: expected a row shape {words} with F = 1 or 2, got {list(shape)!r:.100}")


def _is_shape(shape: tuple[int, ...], payload: str) -> bool:
    _, least, most = SHAPES[payload]
    sizes = (1, *shape[2:]) if payload == "tokens" and shape[:2] == (1, RAGGED) else shape
    if not least <= len(shape) <= most or not all(type(size) is int and size >= 1 for size in sizes):
        return False
    even = payload != "moments" or shape[1] % 2 == 0
    return sizes[0] <= 2 and math.prod(sizes) <= MAX_ROW_BYTES // 4 and even


@dataclass(frozen=True)
class Schema:
    """What the rows of a dataset hold: the payload's shapes, one for each bucket, and the further tensors."""

    buckets: tuple[tuple[int, ...], ...]
    payload: str = "moments"
    extras: tuple[Field, ...] = ()

    def __post_init__(self) -> None:
        if self.payload not in PAYLOADS:
            raise ValueError(f"payload: expected one of {', '.join(PAYLOADS)}, got {self.payload!r:.100}")
        for shape in self.buckets:
            check_shape(shape, "bucket", self.payload)
        names = [one.name for one in self.extras]
        if not self.buckets or len(set(self.buckets)) < len(self.buckets) or len(set(names)) < len(names):
            raise ValueError(f"expected one bucket or more and each name once, got {self.buckets} and {names}")
        kinds = {(shape[0], len(shape), Bucket(shape, "F16", 0, self.payload).channels) for shape in self.buckets}
        if len(kinds) > 1:
            raise ValueError(f"buckets: expected F, channels and number of sizes the same in all, got {self.buckets}")

    @property
    def fields(self) -> list[dict[str, object]]:
        """As in dataset.json."""
        return [{"name": self.payload, "required": True}, *(one.to_dict() for one in self.extras)]


@dataclass(frozen=True)
class ShardRecord:
    """What the manifest says of one shard. `statistics` are over all its rows, also those not in use now.

    `environment`: of the machine that wrote it, where it is not the one of the dataset's first writer.
    """

    unit: str
    path: str
    bytes: int
    header_bytes: int
    header_xxh3_64: str
    xxh3_128: str
    rows: int
    bucket: int
    first_key: str
    last_key: str
    statistics: Statistics
    environment: dict[str, Any] | None = None

    @classmethod
    def parse(cls, value: object, what: str) -> ShardRecord:
        environment = value.get("environment") if isinstance(value, dict) else None
        record = cls(
            unit=_digest(value, "unit", what),
            path=member(value, "path", str, what),
            bytes=natural(value, "bytes", what),
            header_bytes=natural(value, "header_bytes", what),
            header_xxh3_64=hexadecimal(value, "header_xxh3_64", 16, what),
            xxh3_128=_digest(value, "xxh3_128", what),
            rows=natural(value, "rows", what),
            bucket=natural(value, "bucket", what),
            first_key=member(value, "first_key", str, what),
            last_key=member(value, "last_key", str, what),
            statistics=Statistics.from_dict(member(value, "statistics", dict, what), f"{what}: statistics"),
            environment=environment if isinstance(environment, dict) else None,
        )
        if not record.rows:
            raise ValueError(f"{what}: 'rows': expected at least 1, got 0")
        return record

    def to_dict(self) -> dict[str, object]:
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        if self.environment is None:
            del values["environment"]
        return values | {"statistics": self.statistics.to_dict()}


@dataclass(frozen=True)
class PlannedItem:
    """One file that is to become a row. `digest` is the xxh3_128 (32 hexadecimal digits) of the file's bytes.

    Whoever encodes it should hash the bytes it decodes: a file can change after it was planned.
    """

    key: str
    path: str
    digest: str
    size: int
    mtime_ns: int


@dataclass(frozen=True)
class Unit:
    """A piece of work that becomes one shard of rows of shape `bucket`, its items in key order."""

    id: str
    bucket: tuple[int, ...]
    items: tuple[PlannedItem, ...]

    @classmethod
    def of(cls, fingerprint: str, bucket: tuple[int, ...], items: tuple[PlannedItem, ...]) -> Unit:
        """The unit of these items; its id follows from fingerprint, bucket, keys and digests alone."""
        pairs = [[item.key, item.digest] for item in items]
        return cls(xxhash.xxh3_128_hexdigest(canonical_json([fingerprint, list(bucket), pairs])), bucket, items)

    @classmethod
    def parse(cls, value: object, fingerprint: str, what: str) -> Unit:
        """A unit of a plan; the items' paths are not in it and are left empty."""
        bucket = tuple(member(value, "bucket", list, what))
        check_shape(bucket, what)
        items = []
        for entry in member(value, "items", list, what):
            if not isinstance(entry, list) or [type(part) for part in entry] != [str, str, int, int]:
                raise ValueError(f"{what}: expected [key, digest, size, mtime_ns], got {entry!r:.100}")
            items.append(PlannedItem(entry[0], "", *entry[1:]))
        unit = cls.of(fingerprint, bucket, tuple(items))
        if unit.id != member(value, "unit", str, what):
            raise ValueError(f"{what}: 'unit': expected {unit.id} for its items, got {value!r:.100}")
        return unit

    def to_dict(self) -> dict[str, object]:
        items = [[item.key, item.digest, item.size, item.mtime_ns] for item in self.items]
        return {"unit": self.id, "bucket": list(self.bucket), "items": items}


@dataclass(frozen=True)
class Quarantined:
    """A file that cannot become a row: what was wrong with it, and the class of the exception."""

    key: str
    digest: str
    reason: str
    error: str

    @classmethod
    def parse(cls, value: object, what: str) -> Quarantined:
        return cls(
            member(value, "key", str, what),
            _digest(value, "digest", what),
            member(value, "reason", str, what),
            member(value, "error", str, what),
        )

    def to_dict(self) -> dict[str, object]:
        return asdict(self)


def digest_columns(digests: list[str]) -> np.ndarray:
    """Hexadecimal xxh3_128 digests as uint64 [N, 2]: the upper 64 bits, then the lower."""
    return np.frombuffer(bytes.fromhex("".join(digests)), ">u8").reshape(-1, 2).astype("<u8")


def digest_strings(columns: np.ndarray) -> list[str]:
    """The inverse of `digest_columns`."""
    text = columns.astype(">u8").tobytes().hex()
    return [text[start : start + 32] for start in range(0, len(text), 32)]


def key_columns(keys: list[bytes]) -> dict[str, np.ndarray]:
    """key.offsets uint64 [N+1] and key.utf8 uint8: key i is utf8[offsets[i] : offsets[i+1]]."""
    offsets = np.zeros(len(keys) + 1, "<u8")
    np.cumsum([len(key) for key in keys], out=offsets[1:])
    return {"key.offsets": offsets, "key.utf8": np.frombuffer(b"".join(keys), "u1")}


def key_list(columns: dict[str, np.ndarray]) -> list[bytes]:
    """The inverse of `key_columns`."""
    blob, offsets = columns["key.utf8"].tobytes(), columns["key.offsets"].tolist()
    return [blob[start:end] for start, end in pairwise(offsets)]


def key_hashes(keys: list[bytes]) -> np.ndarray:
    """uint64 [N]: xxh3_64 of the key's bytes; the identity of a sample wherever order or noise is drawn."""
    return np.array([xxhash.xxh3_64_intdigest(key) for key in keys], "<u8")


def _digest(value: object, name: str, what: str) -> str:
    return hexadecimal(value, name, 32, what)
