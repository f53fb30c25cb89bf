"""Folders of torch.save's files: which format each folder is of, and what a file holds without reading all of it.

frames, tokens and simpletuner are folders of .pt files. A folder where all of them are called by numbers (or which
holds traj_data.pkl) is of frames, any other of SimpleTuner; but matrices are tokens, since videos are called by numbers
too. step_*.pt are denoising steps and none of these.
"""

from __future__ import annotations

import math
import re
import struct
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from fastlatent.data.array_files import NAMES, extract_latent, read_pt, to_values
from fastlatent.data.packed_files import GZIP, STORED, DamagedArrays, member_bytes, reader, zip_members
from fastlatent.sources.files import Files, Found, read_each
from fastlatent.sources.trajectories import POSES

SUFFIX = ".pt"
NUMBER = re.compile(r"[0-9]{1,9}")
LOOK = 8  # files that detection looks into, of each kind, until one can be read
MAX_LOOK = 1 << 30  # bytes of a file that it looks into
HEAD = 4096  # bytes in which torch.save's pickle of one tensor ends; it has 300
MAX_KNOWN = 4096  # pickles of 300 bytes; sounds have one each, with their lyrics


@dataclass(frozen=True)
class Look:
    """shape, dtype: of the latent. key: its name where it lies in a dict, else "". rest: whether there is more."""

    shape: tuple[int, ...]
    dtype: str
    key: str
    rest: bool


def own_files(found: Sequence[Found]) -> list[Found]:
    """The .pt files, but denoising steps."""
    names = ((one, one.path.rpartition("/")[2]) for one in found if one.path.endswith(SUFFIX))
    return [one for one, name in names if not name.startswith("step_")]


def kinds(files: Files, found: Sequence[Found]) -> Counter[str]:
    """ "frames", "tokens", "simpletuner" -> how many files are of it."""
    numbered, others = [], []
    posed = {one.path.rpartition("/")[0] for one in found if one.path.rpartition("/")[2] == POSES}
    folders: dict[str, list[Found]] = {}
    for one in own_files(found):
        folders.setdefault(one.path.rpartition("/")[0], []).append(one)
    for folder, inside in folders.items():
        numbers = [one for one in inside if number_of(one) is not None]
        if folder in posed:
            numbered += numbers
        elif folder and len(numbers) == len(inside):
            numbered += inside
        else:
            others += inside
    kinds: Counter[str] = Counter()
    for name, inside in (("frames", numbered), ("simpletuner", others)):
        first = first_look(files, inside)
        if first is not None:
            kinds["tokens" if len(first.shape) == 2 else name] += len(inside)
    return kinds


def number_of(found: Found) -> int | None:
    """N of FOLDER/N.pt."""
    stem = found.path.rpartition("/")[2].removesuffix(SUFFIX)
    return int(stem) if NUMBER.fullmatch(stem) else None


def first_look(files: Files, own: Sequence[Found]) -> Look | None:
    """Into the first of a few files that can be read."""
    for one in [one for one in own[:LOOK] if one.size <= MAX_LOOK]:
        try:
            return look(files.read(one.path))
        except (DamagedArrays, OSError):
            continue
    return None


def look(data: bytes) -> Look:
    """DamagedArrays where these bytes are no file of torch.save with one latent."""
    one = open_latent(data)
    return Look(tuple(one.latent.shape), to_values(one.latent)[1], one.key, bool(one.rest))


def looks(files: Files, own: Sequence[Found]) -> list[Look | None]:
    """Into every file; None of what cannot be read.

    Shape and dtype follow from the pickle in front of the values. A pickle that was seen needs no second look, so that
    4 KB are read of most files.
    """
    seen: dict[bytes, Look] = {}

    def one_look(path: str) -> Look:
        pickle = pickle_of(files.read_range(path, 0, HEAD))
        known = seen.get(pickle)
        if known is None:
            known = look(files.read(path))
            if pickle and len(seen) < MAX_KNOWN:
                known = seen.setdefault(pickle, known)
        return known

    found = read_each((one.path for one in own), one_look)
    return [None if isinstance(one, Exception) else one for one in found]


def pickle_of(head: bytes) -> bytes:
    """The pickle that a file of torch.save begins with, unzipped if it is a gzip file; b"" if it is not all there."""
    if head.startswith(GZIP):
        try:
            head = zlib.decompressobj(zlib.MAX_WBITS | 16).decompress(head, HEAD)
        except zlib.error:
            return b""
    if not head.startswith(b"PK\3\4") or len(head) < 30:
        return b""
    name, extra = struct.unpack_from("<HH", head, 26)
    if not head[30 : 30 + name].endswith(b"/data.pkl"):
        return b""
    start = 30 + name + extra
    end = head.find(b".PK", start)  # its STOP, and the next signature
    return head[start : end + 1] if end >= 0 else b""


@dataclass(frozen=True)
class Opened:
    """latent: contiguous. key: its name where it lies in a dict, else "". rest: what the dict holds besides.

    whole: it is all of its storage, value after value.
    """

    latent: Tensor
    key: str
    rest: Mapping[str, Any]
    whole: bool


def open_latent(data: bytes) -> Opened:
    """DamagedArrays where these bytes are no file of torch.save with one latent."""
    loaded = read_pt(data)
    latent = extract_latent(loaded)
    if not isinstance(loaded, Mapping):
        return Opened(latent, "", {}, _is_whole(loaded))
    named = [name for name in NAMES if name in loaded]
    arrays = named or [name for name, one in loaded.items() if isinstance(one, (Tensor, np.ndarray))] or list(loaded)
    rest = {name: one for name, one in loaded.items() if name != arrays[0]}
    # A tensor of the rest may be a view of the latent.
    plain = all(isinstance(one, (str, int, float)) for one in rest.values())
    return Opened(latent, str(arrays[0]), rest, plain and _is_whole(loaded[arrays[0]]))


def _is_whole(value: Any) -> bool:
    if not isinstance(value, Tensor) or not value.is_contiguous() or value.is_neg():
        return False
    return value.untyped_storage().nbytes() == value.numel() * value.element_size()


@dataclass(frozen=True)
class Layout:
    """Of files with one pickle: their only storage holds the latent's values and no others."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    rest: Mapping[str, Any]


class LatentReader:
    """`open_latent` for the files of a cache: 30 µs in place of 250 where torch.load read one with the same pickle.

    What becomes of the storages is a function of the pickle. So where the only storage was found to be the latent,
    it is that in every file with this pickle. Checksums are compared as in `read_pt`.
    """

    def __init__(self) -> None:
        self._known: dict[bytes, Layout] = {}

    def read(self, data: bytes) -> tuple[np.ndarray, Mapping[str, Any]]:
        """(values [1, ...] of the latent, uint16 for bfloat16; what a dict holds besides).

        Raises:
            DamagedArrays: as `open_latent`.
        """
        pickle, storage = _parts(data)
        layout = self._known.get(pickle)
        if layout is not None and len(storage) == math.prod(layout.shape) * layout.dtype.itemsize:
            return np.frombuffer(storage, layout.dtype).reshape(1, *layout.shape), layout.rest
        one = open_latent(data)
        values = to_values(one.latent)[0]
        if pickle and one.whole and len(self._known) < MAX_KNOWN:
            self._known[pickle] = Layout(values.shape, values.dtype, one.rest)
        return values[None], one.rest


def _parts(data: bytes) -> tuple[bytes, memoryview]:
    """The pickle and the only storage of a sound file of torch.save; empty where it is not of this kind."""
    nothing = b"", memoryview(b"")
    read = reader(data)
    try:
        members = [(one, memoryview(member_bytes(read, one))) for one in zip_members(read, len(data))]
    except DamagedArrays:
        return nothing
    pickles, storages = [], []
    for member, content in members:
        # 0: torch.serialization.set_crc32_options(False)
        if member.method != STORED or (member.crc and zlib.crc32(content) != member.crc):
            return nothing
        if member.name.endswith("/data.pkl"):
            pickles.append(bytes(content))
        elif "/data/" in member.name:
            storages.append(content)
        elif member.name.endswith("/byteorder") and content != b"little":
            return nothing
    return (pickles[0], storages[0]) if len(pickles) == len(storages) == 1 else nothing
