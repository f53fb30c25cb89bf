"""Colour of 16 bits, floats, and whatever else Pillow would cut down to 8 bits: PNG, TIFF, OpenEXR. Torch-free.

What a file holds is read from its header. imagecodecs (libpng, libtiff) and OpenEXR decode; both are optional.
"""

from __future__ import annotations

import io
import struct
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from PIL import Image

from fastlatent.media.image_error import ImageError, MissingPackage, optional_package, refuse_bomb
from fastlatent.media.orientation import known_orientation, orientation_of, upright

UNSIGNED, SIGNED, FLOAT = 1, 2, 3  # TIFF's sample formats
WHITE_IS_ZERO, BLACK_IS_ZERO, RGB = 0, 1, 2  # TIFF's photometric interpretations
ASSOCIATED_ALPHA = 1
MAX_SAMPLES = 6  # per pixel, as in Pillow
_TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_EXR_MAGIC = b"\x76\x2f\x31\x01"
_VALUES = {1: "B", 3: "H", 4: "L", 16: "Q"}  # TIFF's types of whole numbers


class _Tag(IntEnum):
    WIDTH = 256
    HEIGHT = 257
    BITS = 258
    PHOTOMETRIC = 262
    STRIP_OFFSETS = 273
    ORIENTATION = 274
    SAMPLES = 277
    STRIP_LENGTHS = 279
    PLANAR = 284
    TILE_WIDTH = 322
    TILE_HEIGHT = 323
    TILE_OFFSETS = 324
    TILE_LENGTHS = 325
    EXTRA_SAMPLES = 338
    SAMPLE_FORMAT = 339


@dataclass(frozen=True)
class _Tiff:
    """The first directory of a TIFF; the defaults are the standard's."""

    order: str
    tags: dict[int, tuple[int, ...]]

    def first(self, tag: int, default: int = 0) -> int:
        return self.tags.get(tag, (default,))[0]

    @property
    def kinds(self) -> set[tuple[int, int]]:
        """(bits, sample format) of the samples; one each in a file that can be used."""
        every_bits, every_kind = self.tags.get(_Tag.BITS, (1,)), self.tags.get(_Tag.SAMPLE_FORMAT, (UNSIGNED,))
        # One more than can be used is enough; a damaged directory may hold thousands.
        return {(bits, kind) for bits in every_bits[: MAX_SAMPLES + 1] for kind in every_kind[: MAX_SAMPLES + 1]}

    @property
    def samples(self) -> int:
        return self.first(_Tag.SAMPLES, 1)


def read_deep(data: bytes, input_range: tuple[float, float] | None) -> np.ndarray | None:
    """Decode a file that Pillow would not decode to all its bits.

    Returns:
        float32 [H, W, 1 or 3] in [0, 1], upright; None for every file that Pillow reads without loss.

    Raises:
        ImageError: the file is broken, too large, or of a kind that is not read.
        MissingPackage: imagecodecs or OpenEXR is missing.
    """
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        # Bit depth 16, and not the plain grey that Pillow keeps.
        return _read_png(data) if data[24:25] == b"\x10" and data[25:26] != b"\0" else None
    if data[:4] == _EXR_MAGIC:
        return _read_exr(data, input_range)
    if data[:4] in _TIFF_MAGIC:
        tiff = _first_directory(data)
        return _read_tiff(data, tiff, input_range) if _is_deep(tiff) else None
    return None


def unit_integers(values: np.ndarray, bits: int) -> np.ndarray:
    """Unsigned integers as float32 in [0, 1]: v / (2^bits - 1)."""
    return (values / (2**bits - 1)).astype(np.float32)


def unit_floats(values: np.ndarray, input_range: tuple[float, float] | None) -> np.ndarray:
    """Floats as float32 in [0, 1]: as they are, or (v - low) / (high - low).

    Raises:
        ImageError: a value is outside the range, or not finite.
    """
    low, high = (0.0, 1.0) if input_range is None else input_range
    smallest, largest = float(values.min()), float(values.max())
    if not (smallest >= low and largest <= high):  # NaN fails both
        found = f"float pixels from {smallest:.6g} to {largest:.6g}, expected [{low:.6g}, {high:.6g}]"
        if not np.isfinite(values).all():
            raise ImageError(f"{found}: NaN or infinity among them, which no --input-range LO,HI allows")
        raise ImageError(f"{found}: state the range of your files with --input-range LO,HI")
    if input_range is None:
        return values.astype(np.float32)
    return ((values.astype(np.float64) - low) / (high - low)).astype(np.float32)


def _read_png(data: bytes) -> np.ndarray:
    imagecodecs = optional_package("imagecodecs", "PNG of 16 bits per channel")
    # Pillow decodes it too, to 8 bits: the orientation may stand behind the pixels, and what Pillow calls
    # damaged stays damaged.
    with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
        refuse_bomb(*image.size)
        image.load()
        orientation = orientation_of(image)
    values = imagecodecs.png_decode(data)
    colours = 1 if values.shape[2] == 2 else 3
    return upright(unit_integers(values[:, :, :colours], 16), orientation)


def _first_directory(data: bytes) -> _Tiff:
    """An empty one where it cannot be parsed: Pillow then says what is wrong."""
    order = "<" if data[:2] == b"II" else ">"
    big = b"+" in data[2:4]
    word, head = ("Q", 8) if big else ("L", 4)
    tags = {}
    try:
        (at,) = struct.unpack_from(order + word, data, head)
        (count,) = struct.unpack_from(order + ("Q" if big else "H"), data, at)
        at += 8 if big else 2
        size = 20 if big else 12
        for entry in range(at, at + min(count, 4096) * size, size):
            tag, kind, length = struct.unpack_from(order + "HH" + word, data, entry)
            if kind not in _VALUES:
                continue
            layout = f"{order}{length}{_VALUES[kind]}"
            where = entry + (12 if big else 8)
            if struct.calcsize(layout) > (8 if big else 4):
                (where,) = struct.unpack_from(order + word, data, where)
            if length:
                tags[tag] = struct.unpack_from(layout, data, where)
    except struct.error:
        return _Tiff(order, {})
    return _Tiff(order, tags)


def _is_deep(tiff: _Tiff) -> bool:
    if all(bits <= 8 and kind == UNSIGNED for bits, kind in tiff.kinds):
        return False
    kept = {(12, UNSIGNED), (16, UNSIGNED), (32, FLOAT)}
    if tiff.order == "<":
        kept.add((32, UNSIGNED))
    return not (tiff.samples == 1 and tiff.kinds <= kept)


def _read_tiff(data: bytes, tiff: _Tiff, input_range: tuple[float, float] | None) -> np.ndarray:
    bits, kind, colours = _checked_kind(tiff)
    width, height, samples = tiff.first(_Tag.WIDTH), tiff.first(_Tag.HEIGHT), tiff.samples
    refuse_bomb(width, height)
    if _Tag.TILE_WIDTH in tiff.tags:
        refuse_bomb(tiff.first(_Tag.TILE_WIDTH), tiff.first(_Tag.TILE_HEIGHT))
    _refuse_missing_segments(data, tiff)
    imagecodecs = optional_package(
        "imagecodecs", f"TIFF of {bits}-bit {'float' if kind == FLOAT else 'integer'} pixels"
    )
    values = imagecodecs.tiff_decode(data, index=0)
    planar = samples > 1 and tiff.first(_Tag.PLANAR, 1) == 2
    if values.shape != ((samples, height, width) if planar else (height, width, samples)[: values.ndim]):
        raise ImageError(f"TIFF pixels of shape {list(values.shape)}, expected {height} x {width} x {samples}")
    values = values.transpose(1, 2, 0) if planar else values.reshape(height, width, samples)
    if kind == FLOAT:
        unit = unit_floats(values[:, :, :colours], input_range)
    else:
        unit = unit_integers(values[:, :, :colours], bits)
        if samples > colours and tiff.first(_Tag.EXTRA_SAMPLES) == ASSOCIATED_ALPHA:
            # Stored multiplied by alpha; Pillow divides those of 8 bits too.
            alpha = unit_integers(values[:, :, colours : colours + 1], bits)
            unit = np.minimum(np.divide(unit, alpha, out=np.zeros_like(unit), where=alpha > 0), np.float32(1))
    if tiff.first(_Tag.PHOTOMETRIC) == WHITE_IS_ZERO:
        unit = 1 - unit
    return np.ascontiguousarray(upright(unit, known_orientation(tiff.first(_Tag.ORIENTATION, 1))))


def _checked_kind(tiff: _Tiff) -> tuple[int, int, int]:
    """Bits, sample format and channels of colour."""
    if any(kind == SIGNED for _, kind in tiff.kinds):
        raise ImageError("signed integer pixels, which have no agreed range: save as unsigned or float")
    bits, kind = next(iter(tiff.kinds))
    if len(tiff.kinds) != 1 or bits not in (16, 32, 64) or kind not in (UNSIGNED, FLOAT):
        kinds = ", ".join(f"{bits} bits of sample format {kind}" for bits, kind in sorted(tiff.kinds))
        raise ImageError(f"TIFF pixels of {kinds[:120]}: save as 8, 16 or 32 bits")
    photometric, samples = tiff.first(_Tag.PHOTOMETRIC, -1), tiff.samples
    colours = {WHITE_IS_ZERO: 1, BLACK_IS_ZERO: 1, RGB: 3}.get(photometric)
    if colours is None or not colours <= samples <= MAX_SAMPLES:
        raise ImageError(
            f"TIFF of more than 8 bits with {samples} channels, photometric interpretation {photometric}: save as "
            "grey or RGB"
        )
    return bits, kind, colours


def _refuse_missing_segments(data: bytes, tiff: _Tiff) -> None:
    tiled = _Tag.TILE_WIDTH in tiff.tags
    offsets = tiff.tags.get(_Tag.TILE_OFFSETS if tiled else _Tag.STRIP_OFFSETS, ())
    counts = tiff.tags.get(_Tag.TILE_LENGTHS if tiled else _Tag.STRIP_LENGTHS, ())
    if not offsets or len(offsets) != len(counts):
        raise ImageError(f"TIFF with {len(offsets)} offsets and {len(counts)} lengths of strips or tiles")
    end = max(offset + count for offset, count in zip(offsets, counts, strict=True))
    if end > len(data):
        raise ImageError(f"truncated: pixels up to byte {end}, the file has {len(data)}")
    if 0 in counts:  # libraries fill them with zeros
        raise ImageError(f"{counts.count(0)} of {len(counts)} strips or tiles are empty")


def _read_exr(data: bytes, input_range: tuple[float, float] | None) -> np.ndarray:
    exr = optional_package("OpenEXR", "OpenEXR")
    if tuple(int(part) for part in exr.__version__.split(".")[:2]) < (3, 5):  # which learnt to read from memory
        raise MissingPackage(f"expected OpenEXR 3.5 or later, got {exr.__version__}: pip install -U OpenEXR")
    with exr.File(io.BytesIO(data), separate_channels=True, header_only=True) as file:
        if not file.parts:
            raise ImageError("OpenEXR file without a readable part")
        header = file.parts[0].header
        if header["type"] not in (exr.scanlineimage, exr.tiledimage):
            raise ImageError("OpenEXR with several depths per pixel: flatten it")
        (left, top), (right, bottom) = (corner.tolist() for corner in header["dataWindow"])
        refuse_bomb(right - left + 1, bottom - top + 1)
        names = _exr_channels({channel.name: (channel.xSampling, channel.ySampling) for channel in header["channels"]})
    with exr.File(io.BytesIO(data), separate_channels=True) as file:
        if not file.parts:  # OpenEXR prints the reason and drops the part
            raise ImageError("truncated or broken OpenEXR file")
        channels = file.parts[0].channels
        values = np.stack([channels[name].pixels for name in names], axis=2)
    if values.dtype == np.uint32:
        return unit_integers(values, 32)
    return unit_floats(values, input_range)


def _exr_channels(sampling: dict[str, tuple[int, int]]) -> tuple[str, ...]:
    names = ("R", "G", "B") if "R" in sampling else ("Y",)
    if not set(names) <= set(sampling) or "RY" in sampling or "BY" in sampling:
        raise ImageError(f"OpenEXR channels {', '.join(sorted(sampling))[:80]}, expected R, G, B, or Y alone")
    if any(sampling[name] != (1, 1) for name in names):
        raise ImageError("OpenEXR channels of reduced resolution")
    return names
