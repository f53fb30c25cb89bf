"""GIF and WebP of many frames, written one frame at a time, and what their headers say."""

from __future__ import annotations

import errno
import io
import math
import os
import struct
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

PALETTE_PIXELS = 4096  # k-means of all 848×480 pixels takes 7 s a frame; of these 30 ms, and 0.3 dB less


class _Clock:
    """Whole delays of 1/`ticks` s whose sum is right: the end of each frame is rounded, not its length."""

    def __init__(self, rate: Fraction, ticks: int) -> None:
        self._frame, self._count, self._end = ticks / rate, 0, 0

    def delay(self) -> int:
        self._count += 1
        before, self._end = self._end, round(self._count * self._frame)
        return self._end - before


class GifFile:
    # Pillow's own writer of many frames keeps them all in memory and drops repeated ones.
    def __init__(self, path: Path, rate: Fraction, height: int, width: int) -> None:
        self._clock = _Clock(rate, 100)
        self._file = open(path, "xb")  # noqa: SIM115 — closed by close()
        self._file.write(b"GIF89a" + struct.pack("<HHBBB", width, height, 0x70, 0, 0))
        self._file.write(b"!\xff\x0bNETSCAPE2.0\x03\x01\0\0\0")  # for ever

    def add(self, frame: np.ndarray) -> None:
        stream = io.BytesIO()
        _paletted(frame).save(stream, format="GIF", optimize=False, interlace=0)
        palette, block, data = _gif_parts(stream.getvalue())
        self._file.write(b"!\xf9\x04\0" + struct.pack("<H", self._clock.delay()) + b"\0\0")
        bits = (len(palette) // 3).bit_length() - 1
        self._file.write(block[:9] + bytes([0x80 | (bits - 1)]) + palette + data)

    def close(self, whole: bool = True) -> None:
        if not self._file.closed:
            with self._file:
                self._file.write(b";")


class WebPFile:
    # Each frame is a whole picture: libwebp's animation encoder keeps all of them in memory and joins equal ones.
    def __init__(self, path: Path, rate: Fraction, height: int, width: int) -> None:
        self._clock = _Clock(rate, 1000)
        self._size = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
        self._file = open(path, "xb")  # noqa: SIM115 — closed by close()
        self._file.write(b"RIFF\0\0\0\0WEBP" + _chunk(b"VP8X", b"\x02\0\0\0" + self._size))
        self._file.write(_chunk(b"ANIM", b"\xff\xff\xff\xff\0\0"))  # for ever

    def add(self, frame: np.ndarray) -> None:
        stream = io.BytesIO()
        Image.fromarray(frame).convert("RGB").save(stream, format="WEBP", quality=90, method=4)
        header = bytes(6) + self._size + self._clock.delay().to_bytes(3, "little") + b"\x02"  # no blending
        for kind, data in _chunks(io.BytesIO(stream.getvalue())):
            if kind == b"VP8 ":
                self._file.write(_chunk(b"ANMF", header + _chunk(kind, data)))
        if self._file.tell() >= 1 << 32:
            raise OSError(errno.EFBIG, "a WebP of more than 4 GiB")

    def close(self, whole: bool = True) -> None:
        if not self._file.closed:
            with self._file:
                size = self._file.tell() - 8
                self._file.seek(4)
                self._file.write(struct.pack("<I", size))


def _paletted(frame: np.ndarray) -> Image.Image:
    if frame.ndim == 2:
        image = Image.fromarray(frame).convert("P")
        image.putpalette([value for value in range(256) for _ in range(3)])
        return image
    # A palette per frame: one for all would need them all first, and noise and pictures share few colours.
    step = math.ceil(math.sqrt(frame.shape[0] * frame.shape[1] / PALETTE_PIXELS))
    sample = Image.fromarray(np.ascontiguousarray(frame[(step - 1) // 2 :: step, (step - 1) // 2 :: step]))
    palette = sample.quantize(256, method=Image.Quantize.MEDIANCUT, kmeans=1)
    return Image.fromarray(frame).quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG)


def _gif_parts(data: bytes) -> tuple[bytes, bytes, bytes]:
    """(global palette, image descriptor of 10 bytes, image data) of a GIF of one frame."""
    end = 13 + 3 * (2 << (data[10] & 7))
    at = end
    while data[at] == 0x21:
        at = _skip_blocks(data, at + 2)
    assert data[at] == 0x2C and data[10] & 0x80 and not data[at + 9], "a GIF as Pillow writes it"
    return data[13:end], data[at : at + 10], data[at + 10 : -1]


def _skip_blocks(data: bytes, at: int) -> int:
    while data[at]:
        at += 1 + data[at]
    return at + 1


def gif_info(file: BinaryIO) -> tuple[int, int, int, float | None]:
    data = file.read()
    width, height, flags = struct.unpack_from("<HHB", data, 6)
    at, frames, ticks = 13 + (3 * (2 << (flags & 7)) if flags & 0x80 else 0), 0, 0
    while data[at] != 0x3B:
        if data[at] == 0x21:
            if data[at + 1] == 0xF9:
                ticks += struct.unpack_from("<H", data, at + 4)[0]
            at = _skip_blocks(data, at + 2)
        elif data[at] == 0x2C:
            flags, frames = data[at + 9], frames + 1
            at = _skip_blocks(data, at + 11 + (3 * (2 << (flags & 7)) if flags & 0x80 else 0))
        else:
            raise ValueError(f"expected a GIF, got a block {data[at]:#x} at byte {at}")
    return frames, width, height, 100 * frames / ticks if ticks else None


def _chunk(kind: bytes, data: bytes) -> bytes:
    return kind + struct.pack("<I", len(data)) + data + b"\0" * (len(data) % 2)


def _chunks(file: BinaryIO) -> Iterator[tuple[bytes, bytes]]:
    """(kind, data) of the chunks of a RIFF file."""
    size = 8 + struct.unpack("<I", file.read(12)[4:8])[0]
    while file.tell() < size:
        kind, length = struct.unpack("<4sI", file.read(8))
        data = file.read(length)
        if len(data) != length:
            raise ValueError(f"expected {length} bytes of {kind!r}, got {len(data)}")
        file.seek(length % 2, os.SEEK_CUR)
        yield kind, data


def webp_info(file: BinaryIO) -> tuple[int, int, int, float | None]:
    frames = ticks = width = height = 0
    for kind, data in _chunks(file):
        if kind == b"VP8X":
            width, height = (int.from_bytes(data[i : i + 3], "little") + 1 for i in (4, 7))
        elif kind == b"ANMF":
            frames, ticks = frames + 1, ticks + int.from_bytes(data[12:15], "little")
    if not frames:
        raise ValueError("expected an animated WebP, got a still one")
    return frames, width, height, 1000 * frames / ticks if ticks else None
