"""One shard: a safetensors file whose every tensor begins on a page, written once and mapped for reading."""

from __future__ import annotations

import errno
import json
import math
import mmap
import os
import struct
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from fastlatent.store.files import make_directory, parse_json, publish, write_all

ALIGNMENT = 4096  # bytes: a memory page, and what O_DIRECT and GPUDirect storage ask for
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors format itself
MAX_DIMENSIONS = 8
PAD = "_pad."
CHUNK_BYTES = 8 << 20  # hashed and written while it is still in the cache
# name in the header -> the numpy type of the view. numpy has no bfloat16: its bits are uint16.
DTYPES = {
    "U8": "u1", "I8": "i1", "U16": "<u2", "I16": "<i2", "U32": "<u4", "I32": "<i4", "U64": "<u8",
    "I64": "<i8", "F16": "<f2", "F32": "<f4", "F64": "<f8", "BF16": "<u2",
}  # fmt: skip
ITEM_BYTES = {name: np.dtype(dtype).itemsize for name, dtype in DTYPES.items()}
NAMES = {np.dtype(dtype): name for name, dtype in DTYPES.items() if name != "BF16"}


@dataclass(frozen=True)
class ShardFile:
    """A finished file: its size, of which `header_bytes` come before the first tensor, and its digests."""

    path: Path
    bytes: int
    header_bytes: int
    header_xxh3_64: str
    xxh3_128: str


def write_shard(
    directory: Path,
    unit: str,
    columns: Mapping[str, np.ndarray],
    bf16: Collection[str],
    metadata: Mapping[str, str],
) -> ShardFile:
    """Write `directory/{unit}-{xxh3_128}.safetensors` durably; the same arguments give the same bytes.

    Args:
        columns: name -> array, in the order in which they are to lie in the file.
        bf16: names of the uint16 columns whose bits are bfloat16.

    Raises:
        ValueError: a name that begins with "_pad.", or a dtype the format does not have.
        OSError: the disk is full, read-only ...; nothing is left behind.
    """
    header, tensors = layout(columns, bf16, metadata)
    digest = xxhash.xxh3_128()
    size = 0

    def write(fd: int) -> str:
        nonlocal size
        for chunk in chunks(header, tensors):
            digest.update(chunk)
            write_all(fd, chunk)
            size += len(chunk)
        return f"{unit}-{digest.hexdigest()}.safetensors"

    make_directory(directory)
    path = publish(directory, unit, write)
    return ShardFile(path, size, len(header), xxhash.xxh3_64_hexdigest(header), digest.hexdigest())


def layout(
    columns: Mapping[str, np.ndarray], bf16: Collection[str], metadata: Mapping[str, str]
) -> tuple[bytes, list[np.ndarray]]:
    """The file's first bytes, and the arrays that follow, pads included, contiguous and little-endian."""
    entries: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
    tensors: list[np.ndarray] = []
    end = pads = 0

    def add(name: str, dtype: str, array: np.ndarray) -> None:
        nonlocal end
        entries[name] = {
            "dtype": dtype,
            "shape": list(array.shape),
            "data_offsets": [end, end + array.nbytes],
        }
        tensors.append(array)
        end += array.nbytes

    for name, column in columns.items():
        if name.startswith(PAD) or name == "__metadata__":
            raise ValueError(f"column {name!r}: names that begin with {PAD!r} and '__metadata__' are taken")
        dtype = "BF16" if name in bf16 else NAMES.get(column.dtype.newbyteorder("<"))
        if dtype is None or (dtype == "BF16" and column.dtype != np.uint16):
            raise ValueError(f"column {name!r}: expected one of {sorted(DTYPES)} (BF16 as uint16), got {column.dtype}")
        if end % ALIGNMENT:
            add(f"{PAD}{pads}", "U8", np.zeros(-end % ALIGNMENT, np.uint8))
            pads += 1
        add(name, dtype, np.require(column, DTYPES[dtype], "C"))
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=True).encode("ascii")
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    if len(text) > MAX_HEADER_BYTES:
        raise ValueError(f"expected a header of at most {MAX_HEADER_BYTES} bytes, got {len(text)}")
    return struct.pack("<Q", len(text)) + text, tensors


def chunks(header: bytes, tensors: list[np.ndarray]) -> Iterator[memoryview]:
    """The file's bytes in order, a few MiB at a time, without a copy."""
    yield memoryview(header)
    for tensor in tensors:
        flat = tensor.reshape(-1).view(np.uint8).data
        for start in range(0, len(flat), CHUNK_BYTES):
            yield flat[start : start + CHUNK_BYTES]


class Shard:
    """An open shard: one private copy-on-write mapping, so that writing to a view never changes the file.

    Attributes:
        metadata: the strings of `__metadata__`.
        columns: name -> numpy view over the mapping, pads left out. BF16 columns are uint16.
        dtypes: name -> "F16", "U64" ... as the header says.
        header_bytes: where the first tensor begins.
        header_xxh3_64: digest of those first bytes.
    """

    def __init__(self, path: Path, mapping: mmap.mmap, header: _Header):
        self.path = path
        self.bytes = len(mapping)
        self.header_bytes = header.bytes
        self.header_xxh3_64 = header.xxh3_64
        self.metadata = header.metadata
        self.dtypes = {name: tensor.dtype for name, tensor in header.tensors.items() if not name.startswith(PAD)}
        self.columns: dict[str, np.ndarray] = {}
        for name in self.dtypes:
            tensor = header.tensors[name]
            view = np.frombuffer(mapping, DTYPES[tensor.dtype], math.prod(tensor.shape), tensor.begin)
            self.columns[name] = view.reshape(tensor.shape)
        self.mapping = mapping

    @classmethod
    def open(cls, path: Path | str, *, expected_bytes: int | None = None) -> Shard:
        """Map the file, having checked its size, its header and that the tensors fill it without a hole.

        Any safetensors file of the dtypes above is accepted; what the columns mean is the caller's affair.

        Raises:
            ValueError: missing, truncated, extended, or a header that is not one.
        """
        path = Path(path)
        try:
            # O_NONBLOCK: opening a pipe would wait for its writer.
            with open(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb", buffering=0) as file:
                size = os.fstat(file.fileno()).st_size
                if expected_bytes is not None and size != expected_bytes:
                    raise ValueError(
                        f"{path}: expected {expected_bytes} bytes, got {size}: the file was "
                        f"{'truncated' if size < expected_bytes else 'extended'}; restore it from a copy"
                    )
                header = _read_header(file.fileno(), size, path)
                try:
                    mapping = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY)
                except ValueError as error:  # it was truncated in this very moment
                    raise ValueError(f"{path}: expected {size} bytes, and that they stay: {error}") from None
        except OSError as error:
            hint = "; raise the limit with `ulimit -n 65536`" if error.errno == errno.EMFILE else ""
            raise ValueError(f"{path}: expected a readable shard, got: {error.strerror}{hint}") from None
        return cls(path, mapping, header)

    def row(self, name: str, row: int, of: str = "") -> np.ndarray:
        """A view of one row of a tensor, [L, ...] where lengths differ; `of`: whose offsets tell, if not its own."""
        offsets = self.columns.get(f"{of or name}.offsets")
        if offsets is None:
            return self.columns[name][row]
        begin, end = offsets[row : row + 2].tolist()
        return self.columns[name][begin:end]

    def close(self) -> None:
        """Give the mapping back. Views that are still held elsewhere stay valid and keep it until they go."""
        self.columns = {}
        with suppress(BufferError):  # a view lives on: the mapping goes with the last one
            self.mapping.close()


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """A tensor of a safetensors file: its bytes are file[begin:end]."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class _Header:
    bytes: int
    xxh3_64: str
    metadata: dict[str, str]
    tensors: dict[str, TensorEntry]


def _read_header(fd: int, size: int, path: Path) -> _Header:
    first = os.pread(fd, 8, 0)
    length = struct.unpack("<Q", first)[0] if len(first) == 8 else 0
    if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
        raise ValueError(
            f"{path}: expected a safetensors header of 2 to {MAX_HEADER_BYTES} bytes within the file's "
            f"{size}, got a length of {length}: the file is truncated or not a shard"
        )
    text = os.pread(fd, length, 8)
    try:
        tensors, metadata = parse_header(text, size, ITEM_BYTES)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return _Header(8 + length, xxhash.xxh3_64_hexdigest(first + text), metadata, tensors)


def parse_header(
    text: bytes, size: int, item_bytes: Mapping[str, int]
) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    """The tensors and the metadata of a safetensors file of `size` bytes from its header's text.

    Args:
        item_bytes: the dtypes that may be there, and their sizes.
    Raises:
        ValueError: it is no such header, or its tensors do not fill the file without a hole.
    """
    parsed = parse_json(text, "header")
    if not isinstance(parsed, dict):
        raise ValueError(f"header: expected a JSON object, got {parsed!r:.100}")
    metadata = parsed.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError(f"header: expected __metadata__ to hold strings, got {metadata!r:.100}")
    end = 8 + len(text)
    tensors = {name: _tensor(name, entry, end, item_bytes) for name, entry in parsed.items()}
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if tensor.begin != end:
            raise ValueError(f"header: expected {name!r:.100} at {end}, got {tensor.begin}: a hole or an overlap")
        end = tensor.end
    if end != size:
        raise ValueError(
            f"expected {end} bytes as its header says, got {size}: the file is damaged, half-written or cut; restore it"
        )
    return tensors, metadata


def _tensor(name: str, entry: object, start: int, item_bytes: Mapping[str, int]) -> TensorEntry:
    what = f"header: {name!r:.100}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{what}: expected dtype, shape and data_offsets, got {entry!r:.100}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in item_bytes:
        raise ValueError(f"{what}: expected a dtype among {sorted(item_bytes)}, got {dtype!r:.100}")
    if not _naturals(shape) or len(shape) > MAX_DIMENSIONS:
        raise ValueError(f"{what}: expected a shape of at most {MAX_DIMENSIONS} sizes >= 0, got {shape!r:.100}")
    if not _naturals(offsets) or len(offsets) != 2:
        raise ValueError(f"{what}: expected two data_offsets >= 0, got {offsets!r:.100}")
    if math.prod(size for size in shape if size) >= 1 << 59:  # numpy has no such array, not even of 0 bytes
        raise ValueError(f"{what}: expected a shape whose sizes multiply to less than 2**59, got {shape!r:.100}")
    expected = math.prod(shape) * item_bytes[dtype]
    if offsets[1] - offsets[0] != expected:
        raise ValueError(
            f"{what}: expected {expected} bytes for {dtype} {shape!r:.100}, got data_offsets {offsets!r:.100}"
        )
    return TensorEntry(dtype, tuple(shape), start + offsets[0], start + offsets[1])


def _naturals(value: object) -> bool:
    return isinstance(value, list) and all(type(one) is int and 0 <= one < 1 << 63 for one in value)
