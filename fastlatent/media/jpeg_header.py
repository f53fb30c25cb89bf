"""Which JPEG files every decoder reads alike. Torch-free."""

from __future__ import annotations

import struct
from dataclasses import dataclass

from fastlatent.media.image_error import MAX_PIXELS
from fastlatent.media.orientation import orientation_in

_BASELINE, _EXTENDED, _PROGRESSIVE = 0xC0, 0xC1, 0xC2
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # tables, reserved, arithmetic conditioning
_START_OF_SCAN, _APP1, _APP14 = 0xDA, 0xE1, 0xEE
_WITHOUT_LENGTH = frozenset((0x01, *range(0xD0, 0xD8)))


@dataclass(frozen=True)
class JpegHeader:
    """height, width: as the file lies, before its EXIF orientation (1 to 8) is applied."""

    height: int
    width: int
    orientation: int


def plain_jpeg(data: bytes) -> JpegHeader | None:
    """The header of a whole JPEG of grey or YCbCr with 8 bits, Huffman-coded; None for all others.

    None too for what decoders treat differently: no end marker (a GPU may return half of a truncated file), RGB
    components, an orientation in XMP, more than MAX_PIXELS. Takes a few µs: it stops at the first scan.
    """
    if data[:2] != b"\xff\xd8" or data[-2:] != b"\xff\xd9":
        return None
    try:
        return _walk(data)
    except (struct.error, IndexError):
        return None


def _walk(data: bytes) -> JpegHeader | None:
    exif, at = b"", 2
    frame: tuple[int, int] | None = None
    while data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xFF:  # fill
            at += 1
            continue
        if marker in _WITHOUT_LENGTH:
            at += 2
            continue
        if marker == _START_OF_SCAN:
            return None if frame is None else JpegHeader(*frame, orientation_in(exif) if exif else 1)
        (length,) = struct.unpack_from(">H", data, at + 2)
        body = data[at + 4 : at + 2 + length]
        if marker in _FRAMES:
            if frame is not None or not _plain_frame(marker, body):
                return None
            frame = struct.unpack_from(">HH", body, 1)
        elif marker == _APP1 and body[:6] == b"Exif\0\0":
            if exif:  # Pillow joins them, others take the first
                return None
            exif = body
        elif (marker == _APP1 and b"tiff:Orientation" in body) or (
            marker == _APP14 and body[:5] == b"Adobe" and body[11] != 1
        ):
            return None
        at += 2 + length
    return None


def _plain_frame(marker: int, body: bytes) -> bool:
    precision, height, width, components = struct.unpack_from(">BHHB", body)
    return (
        marker in (_BASELINE, _EXTENDED, _PROGRESSIVE)
        and precision == 8
        and components in (1, 3)
        and 0 < height * width <= MAX_PIXELS
        and body[6 : 6 + 3 * components : 3] != b"RGB"
    )
