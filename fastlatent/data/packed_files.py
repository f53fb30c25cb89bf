"""What array files are packed in, gzip streams and zip archives, perhaps hostile: sizes are checked before anything
is allocated. Torch-free."""

from __future__ import annotations

import functools
import gzip
import io
import struct
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

Buffer = bytes | bytearray | memoryview
Read = Callable[[int, int], Buffer]  # offset, size -> bytes, fewer at the file's end
T = TypeVar("T")

# Zeros become 1/1032 of their size by deflate, floats nine tenths. What unpacks to more than this is a bomb.
MAX_UNPACKED, MAX_RATIO = 64 << 20, 64
CHUNK = 1 << 20
GZIP = b"\x1f\x8b"

_END, _END64 = struct.Struct("<4s4H2LH"), struct.Struct("<4sQ2H2L4Q")
_LOCATOR = struct.Struct("<4s4xQ4x")
_CENTRAL, _LOCAL = struct.Struct("<4s6H3L5H2L"), struct.Struct("<4s2xH18xHH")
STORED, DEFLATED = 0, 8
SLACK = 64  # bytes for the extra field of a local header, so that one read usually gets all of a member


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
    """A member of a zip archive. offset: of its local header. packed, size: bytes there, and unpacked; crc: of these.

    method: STORED, DEFLATED, or another, which is never read; -1 for an encrypted one.
    """

    name: str
    method: int
    crc: int
    packed: int
    size: int
    offset: int


def zip_members(read: Read, size: int, most: int | None = None) -> Iterator[Member]:
    """The members of a zip archive of `size` bytes as its directory lists them; only that is read.

    Nothing that a record claims is believed before it fits into the file. Eight times as fast as zipfile for the few
    members of a latent's file.

    Args:
        most: bytes of the directory to look at, for a first glance.
    Raises:
        DamagedArrays: it is no zip archive, its directory does not fit it, or it is a bomb.
    """
    start, length, count = _directory(read, size)
    data = read(start, length if most is None else min(length, most))
    at = number = claimed = unpacked = 0
    while at + _CENTRAL.size <= len(data):
        (signature, _, _, flags, method, _, _, crc, packed, whole, names, extras, comments, _, _, _, offset) = (
            _CENTRAL.unpack_from(data, at)
        )
        extra = at + _CENTRAL.size + names
        following = extra + extras + comments
        if signature != b"PK\1\2" or following > length:
            raise DamagedArrays(f"a damaged zip archive (its directory is torn at entry {number:,}); make it again")
        if following > len(data):
            break
        name = _name(data[extra - names : extra], flags)
        if 0xFFFFFFFF in (packed, whole, offset):
            whole, packed, offset = _wide(data[extra : extra + extras], whole, packed, offset)
        claimed, unpacked = claimed + packed, unpacked + whole
        if max(offset + _LOCAL.size + names + packed, claimed) > start or (method == STORED and packed != whole):
            raise DamagedArrays(f"a damaged zip archive ({name!r:.80} is longer than its file); make it again")
        yield Member(name, -1 if flags & 1 else method, crc, packed, whole, offset)
        at, number = following, number + 1
    if most is None and (at != length or number != count):
        raise DamagedArrays(
            f"a damaged zip archive (expected {count:,} members in {length:,} bytes of directory, got {number:,} in "
            f"{at:,}); make it again"
        )
    check_unpacked(unpacked, size)


def _directory(read: Read, size: int) -> tuple[int, int, int]:
    """Where the directory begins, its bytes and its entries."""
    end = max(0, size - _END.size)
    tail = read(end, size - end)
    if len(tail) < _END.size or tail[:4] != b"PK\5\6" or tail[-2:] != b"\0\0":  # there is a comment
        begin = max(0, end - 0xFFFF)
        tail = bytes(read(begin, size - begin))
        at = tail.rfind(b"PK\5\6")
        comment = int.from_bytes(tail[at + 20 : at + 22], "little")
        if at < 0 or at + _END.size > len(tail) or at + _END.size + comment != size - begin:
            raise DamagedArrays("a damaged zip archive (its directory is missing: truncated?); make it again")
        end, tail = begin + at, tail[at:]
    *_, count, length, start, _ = _END.unpack_from(tail)
    if count == 0xFFFF or 0xFFFFFFFF in (length, start):
        locator = read(max(0, end - _LOCATOR.size), _LOCATOR.size)
        if locator[:4] == b"PK\6\7":
            place = _LOCATOR.unpack(locator)[1]
            record = read(place, _END64.size) if place + _END64.size <= end else b""
            if record[:4] != b"PK\6\6":
                raise DamagedArrays("a damaged zip archive (its end is torn); make it again")
            *_, count, length, start = _END64.unpack(record)
            end = place
    if start + length > end or count * _CENTRAL.size > length:
        raise DamagedArrays(
            f"a damaged zip archive (its directory claims {count:,} members in {length:,} bytes from {start:,} on, "
            f"before {end:,}); make it again"
        )
    return start, length, count


def _name(raw: Buffer, flags: int) -> str:
    return bytes(raw).decode("utf-8" if flags & 0x800 else "cp437", "surrogateescape")


def _wide(extra: Buffer, *values: int) -> tuple[int, ...]:
    """size, packed size and offset; those of 0xFFFFFFFF replaced by what the zip64 extra field has, in order."""
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, at)
        at += 4
        if kind == 1 and at + length <= len(extra):
            wide = iter(struct.unpack_from(f"<{length // 8}Q", extra, at))
            return tuple(next(wide, value) if value == 0xFFFFFFFF else value for value in values)
        at += length
    return values


def member_bytes(read: Read, member: Member, most: int | None = None) -> Buffer:
    """A member's bytes as they lie in the file, or the first `most` of them; usually by one read.

    Raises:
        DamagedArrays: another member or none is there, or not all of it.
    """
    size = member.packed if most is None else min(most, member.packed)
    data = read(member.offset, _LOCAL.size + len(member.name) + SLACK + size)
    signature, flags, names, extras = _LOCAL.unpack_from(data) if len(data) >= _LOCAL.size else (b"", 0, 0, 0)
    begin = _LOCAL.size + names + extras
    if signature != b"PK\3\4" or _name(data[_LOCAL.size : _LOCAL.size + names], flags) != member.name:
        raise DamagedArrays(f"a damaged zip archive ({member.name!r:.80} is not where it should be); make it again")
    content = data[begin : begin + size] if begin + size <= len(data) else read(member.offset + begin, size)
    if len(content) != size:
        raise DamagedArrays(f"{member.name!r:.80}: expected {size:,} bytes, got {len(content):,}; make it again")
    return content


def member_content(read: Read, member: Member, most: int | None = None) -> Buffer:
    """A member, unpacked and compared with its checksum; or its first `most` bytes, which are not compared.

    Raises:
        DamagedArrays: it is damaged, encrypted, packed otherwise than by deflate, or a bomb.
    """
    if member.method not in (STORED, DEFLATED):
        how = "an encrypted one" if member.method < 0 else f"method {member.method}"
        raise DamagedArrays(f"{member.name!r:.80}: expected a stored or deflated member, got {how}")
    size = member.size if most is None else min(most, member.size)
    if member.method == STORED:
        content = member_bytes(read, member, size)
    else:
        check_unpacked(size, member.packed)
        inflater = zlib.decompressobj(-zlib.MAX_WBITS)
        try:
            content = inflater.decompress(member_bytes(read, member, most and most + SLACK), size + (most is None))
        except zlib.error as error:
            raise DamagedArrays(f"{member.name!r:.80}: damaged ({error}); make it again") from None
        if len(content) != size or (most is None and not inflater.eof):
            raise DamagedArrays(f"{member.name!r:.80}: expected {size:,} bytes, it is torn; make it again")
    if most is None and zlib.crc32(content) != member.crc:
        raise DamagedArrays(f"{member.name!r:.80}: its checksum is wrong; make it again")
    return content


def reader(data: Buffer) -> Read:
    """Ranges of what is in memory, without a copy."""
    view = memoryview(data)
    return lambda offset, size: view[offset : offset + size]
