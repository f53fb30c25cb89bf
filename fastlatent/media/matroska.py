"""What FFmpeg's reader of Matroska and WebM passes over in silence: a file that is cut off, damage in the middle."""

from __future__ import annotations

SEGMENT, CLUSTER = 0x18538067, 0x1F43B675
GROUP = 0xA0  # BlockGroup
UNKNOWN = -1


def segment_end(data: bytes) -> int | None:
    """Where the segment says that it ends; None where it does not say."""
    try:
        _, size, begin = _element(data, 0)
        if size == UNKNOWN:
            return None
        number, size, at = _element(data, begin + size)
    except IndexError:
        return None
    return None if number != SEGMENT or size == UNKNOWN else at + size


def damaged_at(data: bytes) -> int | None:
    """The byte where elements no longer follow each other, each ending where the next begins, in the segment, its
    clusters and their groups of blocks; None where all do. FFmpeg goes on at the next cluster that it finds: frames
    are missing then, and those that are predicted from them are decoded from others.

    Not looked into: what comes after a size that is not said, as files that were recorded live have it.
    """
    end = segment_end(data)
    if end is None:
        return None
    _, size, at = _element(data, 0)
    _, _, at = _element(data, at + size)
    return _broken(data, at, min(end, len(data)))


def _broken(data: bytes, at: int, end: int) -> int | None:
    while at < end:
        try:
            number, size, begin = _element(data, at)
        except IndexError:
            return at
        if size == UNKNOWN:
            return None
        if number == 0 or begin + size > end:
            return at
        if number in (CLUSTER, GROUP) and (inside := _broken(data, begin, begin + size)) is not None:
            return inside
        at = begin + size
    return None


def _element(data: bytes, at: int) -> tuple[int, int, int]:
    """The id (with its marker; 0 is none), the size of the contents, and where these begin. IndexError: cut off."""
    length = 9 - data[at].bit_length()
    number = int.from_bytes(data[at : at + length], "big") if length <= 4 else 0
    at += length
    length = 9 - data[at].bit_length()
    size = int.from_bytes(data[at : at + length], "big") - (1 << 7 * length)
    return number, UNKNOWN if size == (1 << 7 * length) - 1 else size, at + length
