"""Arrays of numbers in .npy and .npz files, perhaps damaged or hostile, from bytes and back. Torch-free."""

from __future__ import annotations

import ast
import functools
import gzip
import io
import math
import zipfile
import zlib
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import numpy as np

from fastlatent.data.packed_files import (
    CHUNK,
    GZIP,
    Buffer,
    DamagedArrays,
    check_unpacked,
    damaged_gzip,
    guarded,
    member_content,
    reader,
    zip_members,
)

MAX_HEADER_BYTES = 10_000  # of .npy; numpy's own limit
MAX_AXES = 8

_NPY_CODES = {"f2", "f4", "f8", "b1", *(f"{kind}{size}" for kind in "iu" for size in (1, 2, 4, 8))}


class NpyHeader(NamedTuple):
    """dtype: of _NPY_CODES, in the file's byte order. fortran: the first axis is the fastest."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    fortran: bool

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def npy_begin(start: Buffer) -> int:
    """Where the values of a .npy file begin, from its first 12 bytes or more."""
    begin, version = bytes(start[:12]), bytes(start[6:7])
    if not begin.startswith(b"\x93NUMPY"):
        raise DamagedArrays(f"expected a .npy file of numpy.save, got one that starts with {begin[:8]!r}")
    width = 2 if version == b"\x01" else 4
    length = int.from_bytes(begin[8 : 8 + width], "little")
    if len(begin) < 8 + width or not 0 < length <= MAX_HEADER_BYTES or version not in (b"\x01", b"\x02", b"\x03"):
        raise DamagedArrays("the .npy header is damaged; make it again")
    return 8 + width + length


def npy_header(head: Buffer) -> NpyHeader:
    """What the bytes before the values (`npy_begin` of them) say of an array of floats, integers or booleans."""
    head = bytes(head)
    if len(head) < npy_begin(head):
        raise DamagedArrays("truncated in the .npy header; make it again")
    return _parse_header(head)


@functools.lru_cache(256)  # the files of a cache have the same header: 0.3 µs in place of 25
def _parse_header(head: bytes) -> NpyHeader:
    try:
        text = head[10:].decode("latin-1") if head[6] == 1 else head[12:].decode("utf-8" if head[6] == 3 else "latin-1")
        said = ast.literal_eval(text.strip()) or {}
        descr, fortran, shape = said["descr"], said["fortran_order"], said["shape"]
    except (ValueError, SyntaxError, TypeError, KeyError, MemoryError, RecursionError):
        raise DamagedArrays("the .npy header is damaged; make it again") from None
    code = descr.lstrip("<>=|") if isinstance(descr, str) else ""
    if isinstance(descr, str) and code.startswith("O"):
        raise DamagedArrays(
            "expected an array of floats, got pickled objects, which are never read, since they can run code; save "
            "the array that is in it, as numpy.save(path, array.astype(numpy.float16))"
        )
    if code == "V2":  # bfloat16 as ml_dtypes saves it; its bits, as torch.Tensor.view(torch.uint16) gives them
        code = "u2"
    if code not in _NPY_CODES:
        raise DamagedArrays(
            f"expected float16, float32 or float64, got {descr!r:.80}; "
            "save latents as floats, before any rounding to integers"
        )
    sound = isinstance(shape, tuple) and all(type(side) is int and side >= 0 for side in shape)
    sound = sound and math.prod(max(side, 1) for side in shape) < 1 << 60  # also beside an axis of 0
    if not sound or not isinstance(fortran, bool) or len(shape) > MAX_AXES:
        raise DamagedArrays(f"the .npy header is damaged: shape {shape!r:.80}; make it again")
    return NpyHeader(np.dtype(code).newbyteorder(">" if descr.startswith(">") else "<"), shape, fortran)


@guarded
def read_npy(data: Buffer) -> np.ndarray:
    """The array of a .npy or .npy.gz file: floats, integers or booleans in the machine's byte order.

    A view on `data` where that has this order (writable if `data` is); the axes may lie in Fortran's order.

    Raises:
        DamagedArrays: no such file, truncated, something behind the array, pickled objects.
    """
    if data[:2] == GZIP:
        return _unzipped_npy(data)
    view = memoryview(data)
    begin = npy_begin(view[:12])
    header = npy_header(view[:begin])
    return _npy_values(header, view[begin:], len(view) - begin)


def _unzipped_npy(data: Buffer) -> np.ndarray:
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(data)) as file:
            start = file.read(12)
            head = start + file.read(npy_begin(start) - 12)
            header = npy_header(head)
            check_unpacked(header.nbytes, len(data))
            body = bytearray(header.nbytes)
            view, done = memoryview(body), 0
            while done < len(body) and (count := file.readinto(view[done : done + CHUNK])):
                done += count
            # At a gzip file's end this compares its checksum.
            return _npy_values(header, view[:done], done + len(file.read(1)))
    except (OSError, EOFError, zlib.error) as error:
        raise damaged_gzip(error) from None


def _npy_values(header: NpyHeader, body: memoryview, there: int) -> np.ndarray:
    if there != header.nbytes:
        got = f"got {there}; make it again" if there < header.nbytes else "got more: it is damaged or holds several"
        cut = "truncated: " if there < header.nbytes else ""
        more = "" if there < header.nbytes else " arrays; make it again"
        raise DamagedArrays(f"{cut}expected {header.nbytes} bytes, {list(header.shape)} of {header.dtype}, {got}{more}")
    array = np.frombuffer(body, header.dtype).reshape(header.shape, order="F" if header.fortran else "C")
    return array if header.dtype.isnative else array.astype(header.dtype.newbyteorder("="))


@guarded
def read_npz(data: Buffer, names: Collection[str] | None = None) -> dict[str, np.ndarray]:
    """The arrays of a .npz file by name, in its order; of `names`, those alone that are there.

    Stored arrays are views on `data`, as `read_npy` gives them. Members that are no arrays (no .npy) are left out.

    Raises:
        DamagedArrays: no such file, a wrong checksum, two arrays of one name, a bomb, pickled objects.
    """
    if data[:2] != b"PK":
        raise DamagedArrays(f"expected a .npz file of numpy.savez, got one that starts with {bytes(data[:8])!r}")
    read = reader(data)
    arrays: dict[str, np.ndarray] = {}
    seen = set()
    for member in zip_members(read, len(data)):
        name = member.name.removesuffix(".npy")
        if name == member.name:
            continue
        if name in seen:
            raise DamagedArrays(f"expected each array once, got {name!r:.80} twice; make it again")
        seen.add(name)
        if names is not None and name not in names:
            continue
        content = member_content(read, member)
        try:
            arrays[name] = read_npy(content)
        except DamagedArrays as error:
            raise DamagedArrays(f"{name!r:.80}: {error}") from None
    return arrays


def npy_bytes(array: np.ndarray) -> bytes:
    """What numpy.save writes."""
    stream = io.BytesIO()
    np.lib.format.write_array(stream, np.asanyarray(array), allow_pickle=False)
    return stream.getvalue()


def npz_bytes(arrays: Mapping[str, np.ndarray], compressed: bool = False) -> bytes:
    """What numpy.savez (savez_compressed) writes; members have the date 1980-01-01."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED) as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.asanyarray(array), allow_pickle=False)
    return stream.getvalue()
