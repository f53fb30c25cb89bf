"""The members of an uncompressed tar, from its headers alone: POSIX (pax), GNU and the old formats. Torch-free."""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass

BLOCK = 512
MAX_EXTENSION = 1 << 20  # bytes of a pax header or a long name; anything above is damage
# What has no data behind its header, whatever size it states; as tarfile does.
WITHOUT_DATA = {
    tarfile.LNKTYPE: "a hard link", tarfile.SYMTYPE: "a symbolic link", tarfile.DIRTYPE: "a folder",
    tarfile.CHRTYPE: "a device", tarfile.BLKTYPE: "a device", tarfile.FIFOTYPE: "a pipe",
}  # fmt: skip
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


class DamagedTar(ValueError):
    """What follows cannot be read; what came before can."""


@dataclass(frozen=True, slots=True)
class Member:
    """kind: "" of a file, else what it is instead. Its bytes are the archive's [offset, offset + size)."""

    name: str
    offset: int
    size: int
    kind: str


class Window:
    """Reads of an archive from front to back: what was read along with one header serves the next ones."""

    def __init__(self, read_range: Callable[[int, int], bytes], size: int, gap: int) -> None:
        self.size = size
        self._read_range, self._gap = read_range, gap
        self._begin, self._data = 0, b""

    def read(self, offset: int, size: int) -> bytes:
        """`size` bytes.

        Raises:
            OSError: that fails.
            DamagedTar: the archive ends before.
        """
        start = offset - self._begin
        if not 0 <= start <= start + size <= len(self._data):
            self._begin, start = offset, 0
            self._data = self._read_range(offset, max(size, min(self._gap, self.size - offset)))
        data = self._data[start : start + size]
        if len(data) < size:
            raise DamagedTar(f"cut off: byte {offset + size} of it was asked for, and it has {offset + len(data)}")
        return data


def members(archive: Window) -> Iterator[Member]:
    """Every member in order, up to the mark of the archive's end, a block of zeros.

    Raises:
        ValueError: the archive is compressed.
        OSError: it cannot be read.
        DamagedTar: it is cut off, the mark being missing, or a header is damaged. A member whose bytes are cut off is
            given before that.
    """
    if not archive.size:
        raise DamagedTar("an empty file, no tar")
    position = 0
    for_all: dict[str, str] = {}  # a global pax header
    special: dict[str, str] = {}  # the next member's
    while position < archive.size:
        if position == 0:
            _refuse_compressed(archive.read(0, min(BLOCK, archive.size)))
        block = archive.read(position, BLOCK)
        if not block.strip(b"\0"):
            return
        header = _header(block, position)
        data = position + BLOCK
        if header.type in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.XGLTYPE):
            records = _pax(_extension(archive, header, data), position)
            for_all |= records if header.type == tarfile.XGLTYPE else {}
            special |= records if header.type != tarfile.XGLTYPE else {}
            position = data + _padded(header.size)
            continue
        if header.type in (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK):
            text = _extension(archive, header, data).split(b"\0")[0].decode("utf-8", "surrogateescape")
            special |= {"path": text} if header.type == tarfile.GNUTYPE_LONGNAME else {}
            position = data + _padded(header.size)
            continue
        # POSIX: a type that is not known is a file.
        kind, known = WITHOUT_DATA.get(header.type, ""), for_all | special
        if header.type == tarfile.GNUTYPE_SPARSE:
            data = _after_sparse_map(archive, block, data)
        if header.type == tarfile.GNUTYPE_SPARSE or any(name.startswith("GNU.sparse.") for name in known):
            kind = "a sparse file"
        size = 0 if header.type in WITHOUT_DATA else _size(known.get("size", str(header.size)), position)
        yield Member(known.get("path", header.name), data, size, kind)
        if data + size > archive.size:
            raise DamagedTar(f"cut off: its last member ends at byte {data + size}, the file at {archive.size}")
        position, special = data + _padded(size), {}
    raise DamagedTar(f"cut off: it ends at byte {archive.size} without the mark of its end")


def _refuse_compressed(block: bytes) -> None:
    for magic, name in COMPRESSED.items():
        if block.startswith(magic):
            raise ValueError(
                f"expected an uncompressed tar, got one compressed by {name}: its members cannot be read one by one. "
                "Uncompress it; the images in it are compressed already"
            )


def _header(block: bytes, position: int) -> tarfile.TarInfo:
    try:
        return tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        what = "no tar" if position == 0 else "damaged"
        raise DamagedTar(f"{what}: expected a header at byte {position}: {error}") from None


def _size(text: str, position: int) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 18:
        raise DamagedTar(f"damaged: expected the size of a member at byte {position}, got {text!r:.50}")
    return int(text)


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _extension(archive: Window, header: tarfile.TarInfo, data: int) -> bytes:
    if not 0 <= header.size <= MAX_EXTENSION:
        raise DamagedTar(
            f"damaged: expected at most {MAX_EXTENSION} bytes of extended header at {data}, got {header.size}"
        )
    return archive.read(data, header.size)


def _pax(data: bytes, position: int) -> dict[str, str]:
    """Records "LENGTH NAME=VALUE\\n", LENGTH in bytes and of all of it."""
    found = {}
    while data.strip(b"\0"):
        digits, _, _ = data.partition(b" ")
        length = int(digits) if digits.isdigit() and len(digits) < 8 else 0
        name, equals, value = data[len(digits) + 1 : max(length - 1, 0)].partition(b"=")
        if not equals or length > len(data) or data[length - 1 : length] != b"\n":
            raise DamagedTar(f"damaged: expected pax records at byte {position}, got {data[:50]!r}")
        found[name.decode("utf-8", "surrogateescape")] = value.decode("utf-8", "surrogateescape")
        data = data[length:]
    return found


def _after_sparse_map(archive: Window, block: bytes, data: int) -> int:
    more = block[482]
    while more:
        more = archive.read(data, BLOCK)[504]
        data += BLOCK
    return data
