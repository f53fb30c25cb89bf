"""The directory of a zip file, and its stored members, by reading ranges: an archive of 168 GB is never read whole.

Nothing that a record claims is believed before it fits into the file; no member is unpacked.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

END, END64, LOCATOR64 = b"PK\5\6", b"PK\6\6", b"PK\6\7"
CENTRAL = struct.Struct("<4s6H3L5H2L")
LOCAL = struct.Struct("<4s5H3L2H")
STORED, DEFLATED = 0, 8
SLACK = 64  # bytes for the extra field of a local header, so that one read usually gets all of a member
Read = Callable[[int, int], bytes]  # offset, size -> bytes, fewer at the file's end


class DamagedZip(ValueError):
    """A zip file or member that cannot be used; the message says why, without the file's name."""


class Member(NamedTuple):
    """offset: of the local header. packed, size: bytes in the file, and unpacked. crc: CRC-32 of the unpacked bytes."""

    name: str
    method: int
    offset: int
    packed: int
    size: int
    crc: int
    encrypted: bool


def members(read: Read, size: int, most: int | None = None) -> Iterator[Member]:
    """The members of a zip file of `size` bytes, as its directory has them; folders are left out.

    most: bytes of the directory to look at, for a first glance.

    Raises:
        DamagedZip: it is no zip file, or its directory does not fit it.
    """
    start, length, count = _directory(read, size)
    data = read(start, length if most is None else min(length, most))
    whole = len(data) == length
    at = number = 0
    while at + CENTRAL.size <= len(data):
        fields = CENTRAL.unpack_from(data, at)
        flags, method, crc, packed, unpacked = fields[3], fields[4], fields[7], fields[8], fields[9]
        names, extras, comments, offset = fields[10], fields[11], fields[12], fields[16]
        following = at + CENTRAL.size + names + extras + comments
        if fields[0] != b"PK\1\2" or following > length:
            raise DamagedZip(f"the directory is damaged at its entry {number:,}")
        if following > len(data):
            break
        name = data[at + CENTRAL.size : at + CENTRAL.size + names].decode("utf-8", "surrogateescape")
        if 0xFFFFFFFF in (packed, unpacked, offset):
            extra = data[at + CENTRAL.size + names : following - comments]
            unpacked, packed, offset = _wide(extra, unpacked, packed, offset)
        if offset + LOCAL.size + names + packed > start:
            raise DamagedZip(f"member {name!r:.200} claims {packed:,} bytes from {offset:,}, beyond what the file has")
        if not name.endswith("/"):
            yield Member(name, method, offset, packed, unpacked, crc, bool(flags & 1))
        at, number = following, number + 1
    if most is None and (not whole or at != length or number != count):
        raise DamagedZip(f"expected {count:,} members in {length:,} bytes of directory, got {number:,} in {at:,}")


def head(read: Read, member: Member, size: int) -> bytes:
    """The first bytes of a member, `size` at most, unpacked if need be.

    Raises:
        DamagedZip: its local header is not there, or it is packed in another way than deflate.
    """
    body = _body(read, member, min(size, member.packed) if member.method == STORED else size)
    if member.method == DEFLATED:
        try:
            return zlib.decompressobj(-15).decompress(body[: member.packed], size)
        except zlib.error as error:
            raise DamagedZip(f"{member.name!r:.200}: {error}") from None
    _plain(member)
    return body


def stored(read: Read, member: Member) -> bytes:
    """All bytes of a member that is stored uncompressed, checked against its CRC-32.

    Raises:
        DamagedZip: it is compressed, encrypted or damaged.
    """
    _plain(member)
    body = _body(read, member, member.size)
    if len(body) != member.size or zlib.crc32(body) != member.crc:
        raise DamagedZip(f"expected {member.size:,} bytes with CRC-32 {member.crc:08x}, got {len(body):,} others")
    return body


def _plain(member: Member) -> None:
    if member.encrypted or member.method != STORED or member.packed != member.size:
        how = "encrypted" if member.encrypted else f"compressed (method {member.method})"
        raise DamagedZip(f"expected a member that is stored as it is, got one {how}: unpack the zip file into a folder")


def _body(read: Read, member: Member, size: int) -> bytes:
    """The first `size` bytes of the member as they lie in the file; one read where the local header is not long."""
    data = read(member.offset, LOCAL.size + len(member.name) + SLACK + size)
    if len(data) < LOCAL.size or data[:4] != b"PK\3\4":
        raise DamagedZip(f"no member begins at byte {member.offset:,}")
    *_, names, extras = LOCAL.unpack_from(data)
    begin = LOCAL.size + names + extras
    if begin + size <= len(data):
        return data[begin : begin + size]
    return read(member.offset + begin, size)


def _directory(read: Read, size: int) -> tuple[int, int, int]:
    """Where the directory begins, its bytes and its entries."""
    tail_at = max(0, size - 65557)  # the end record has 22 bytes, and a comment of at most 65535 may follow
    tail = read(tail_at, size - tail_at)
    at = tail.rfind(END)
    if at < 0 or at + 22 > len(tail) or len(tail) != size - tail_at:
        raise DamagedZip(f"expected a zip file, got {size:,} bytes without its end record: it may be half written")
    disk, first, _, count, length, start, _ = struct.unpack_from("<4H2LH", tail, at + 4)
    end = tail_at + at
    if 0xFFFF in (disk, first, count) or 0xFFFFFFFF in (length, start):
        locator = read(end - 20, 20) if end >= 20 else b""
        if locator[:4] == LOCATOR64:
            place = struct.unpack_from("<Q", locator, 8)[0]
            record = read(place, 56) if place + 56 <= end else b""
            if record[:4] != END64 or len(record) < 56:
                raise DamagedZip("the zip64 end record is not where the file says it is")
            count, length, start = struct.unpack_from("<3Q", record, 32)
            end = place
    if start + length > end or count * CENTRAL.size > length:
        raise DamagedZip(
            f"the directory claims {count:,} members in {length:,} bytes from {start:,}, the file has {end:,}"
        )
    return start, length, count


def _wide(extra: bytes, *values: int) -> tuple[int, ...]:
    """size, packed size and offset; those of 0xFFFFFFFF replaced by what the zip64 extra field has, in order."""
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, at)
        if kind == 1 and at + 4 + length <= len(extra):
            wide = iter(struct.unpack_from(f"<{length // 8}Q", extra, at + 4))
            return tuple(next(wide, value) if value == 0xFFFFFFFF else value for value in values)
        at += 4 + length
    return values
