"""What array files are packed in, gzip streams and zip archives, perhaps hostile: sizes are checked before anything
is allocated. Torch-free."""

from __future__ import annotations

import functools
import gzip
import io
import struct
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

Buffer = bytes | bytearray | memoryview
T = TypeVar("T")

# Zeros become 1/1032 of their size by deflate, floats nine tenths. What unpacks to more than this is a bomb.
MAX_UNPACKED, MAX_RATIO = 64 << 20, 64
MAX_MEMBERS = 100_000
CHUNK = 1 << 20
GZIP = b"\x1f\x8b"

_END, _END64 = struct.Struct("<4s4H2LH"), struct.Struct("<4sQ2H2L4Q")
_LOCATOR = struct.Struct("<4s4xQ4x")
_CENTRAL, _LOCAL = struct.Struct("<4s6H3L5H2L"), struct.Struct("<4s22xHH")


class DamagedArrays(ValueError):
    """A file that does not hold what was expected; says what came and what to do, without the file's name."""


def guarded(reader: Callable[..., T]) -> Callable[..., T]:
    """A reader whose lack of memory is told as damage: what needs more than the machine has cannot be used."""

    @functools.wraps(reader)
    def read(*args: Any, **more: Any) -> T:
        try:
            return reader(*args, **more)
        except MemoryError:
            raise DamagedArrays("not enough memory to read it") from None

    return read


def check_unpacked(size: int, packed: int) -> None:
    if size > max(MAX_UNPACKED, MAX_RATIO * packed):
        raise DamagedArrays(f"expected at most {MAX_RATIO} bytes unpacked of each packed one, got {size} of {packed}")


def damaged_gzip(error: Exception) -> DamagedArrays:
    return DamagedArrays(
        f"the gzip stream is {'truncated' if isinstance(error, EOFError) else f'damaged ({error})'}; make it again"
    )


def gunzip(data: Buffer) -> bytearray:
    whole = bytearray()
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(data)) as file:
            while piece := file.read(CHUNK):
                whole += piece
                check_unpacked(len(whole), len(data))
    except (OSError, EOFError, zlib.error) as error:
        raise damaged_gzip(error) from None
    return whole


class Member(NamedTuple):
    """A member of a zip archive: its bytes are data[begin : begin + packed]."""

    name: str
    deflated: bool
    crc: int
    packed: int
    size: int
    begin: int


def zip_members(data: Buffer) -> list[Member]:
    """The members of a zip archive as its central directory lists them; sizes are checked, contents are not yet.

    Eight times as fast as zipfile for the few members of a latent's file.
    """
    try:
        return _zip_members(memoryview(data))
    except (struct.error, IndexError, UnicodeDecodeError, NotImplementedError) as error:
        raise DamagedArrays(f"a damaged zip archive ({error}); make it again") from None


def _zip_members(data: memoryview) -> list[Member]:
    at = len(data) - _END.size
    if at < 0 or bytes(data[at : at + 4]) != b"PK\5\6" or data[-2:] != b"\0\0":  # there is a comment
        tail = max(0, len(data) - _END.size - 0xFFFF)
        at = tail + bytes(data[tail:]).rfind(b"PK\5\6")
        if at < tail or at + _END.size + int.from_bytes(data[at + 20 : at + 22], "little") != len(data):
            raise DamagedArrays("a damaged zip archive (its directory is missing: truncated?); make it again")
    *_, count, length, offset, _ = _END.unpack_from(data, at)
    if count == 0xFFFF or 0xFFFFFFFF in (length, offset):
        signature, end = _LOCATOR.unpack_from(data, max(0, at - _LOCATOR.size))
        if signature != b"PK\6\7" or end > at:
            raise DamagedArrays("a damaged zip archive (its end is torn); make it again")
        at = end
        *_, count, length, offset = _END64.unpack_from(data, at)
    if count > MAX_MEMBERS:
        raise DamagedArrays(f"expected at most {MAX_MEMBERS} members of a zip archive, got {count}")
    if offset + length > at:
        raise DamagedArrays("a damaged zip archive (its directory lies behind its end); make it again")
    members, place, unpacked = [], offset, 0
    for _ in range(count):
        (signature, _, _, flags, method, _, _, crc, packed, size, name_length, extra, comment, _, _, _, begin) = (
            _CENTRAL.unpack_from(data, place)
        )
        place += _CENTRAL.size
        raw = bytes(data[place : place + name_length])
        if 0xFFFFFFFF in (packed, size, begin):
            packed, size, begin = _zip64(data[place + name_length : place + name_length + extra], [packed, size, begin])
        place += name_length + extra + comment
        if signature != b"PK\1\2" or place > offset + length:
            raise DamagedArrays("a damaged zip archive (its directory is torn); make it again")
        name = raw.decode("utf-8" if flags & 0x800 else "cp437")
        if flags & 1 or method not in (0, 8):
            raise DamagedArrays(
                f"{name!r:.80}: expected a stored or deflated member, got method {method}, flags {flags}"
            )
        signature, local_name, local_extra = _LOCAL.unpack_from(data, begin)
        inside = begin + _LOCAL.size
        if signature != b"PK\3\4" or data[inside : inside + local_name] != raw:
            raise DamagedArrays(f"a damaged zip archive ({name!r:.80} is not where it should be); make it again")
        inside += local_name + local_extra
        unpacked += packed
        if inside + packed > offset or unpacked > offset or (not method and packed != size):
            raise DamagedArrays(f"a damaged zip archive ({name!r:.80} is longer than its file); make it again")
        members.append(Member(name, bool(method), crc, packed, size, inside))
    return members


def _zip64(extra: memoryview, values: list[int]) -> list[int]:
    """Sizes and offset of a member where those of 32 bits say that they do not suffice."""
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, at)
        at += 4
        if kind == 1:
            for i, value in enumerate(values):
                if value == 0xFFFFFFFF:
                    (values[i],) = struct.unpack_from("<Q", extra, at)
                    at += 8
            return values
        at += length
    return values


def member_content(data: memoryview, member: Member, total: int) -> Buffer:
    content: Buffer = data[member.begin : member.begin + member.packed]
    if member.deflated:
        check_unpacked(member.size, total)
        inflater = zlib.decompressobj(-zlib.MAX_WBITS)
        try:
            content = inflater.decompress(content, member.size + 1)
        except zlib.error as error:
            raise DamagedArrays(f"{member.name!r:.80}: damaged ({error}); make it again") from None
        if len(content) != member.size or not inflater.eof:
            raise DamagedArrays(f"{member.name!r:.80}: expected {member.size} bytes, it is torn; make it again")
    if zlib.crc32(content) != member.crc:
        raise DamagedArrays(f"{member.name!r:.80}: its checksum is wrong; make it again")
    return content
