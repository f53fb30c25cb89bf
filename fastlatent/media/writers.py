"""Images as files: PNG, JPEG, WebP and float TIFF in memory, and one .npz of all samples. Torch-free."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from collections.abc import Iterable
from types import ModuleType
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from fastlatent.media.image_error import MissingPackage

SUFFIXES = {"png": ".png", "jpeg": ".jpg", "webp": ".webp", "tiff": ".tiff"}
_SETTINGS: dict[str, dict[str, Any]] = {
    "png": {},
    "jpeg": {"quality": 95, "subsampling": 0},  # 4:4:4
    "webp": {"lossless": True},
}
_LONGEST_SIDE = {"jpeg": 65_535, "webp": 16_383}  # that the formats can say
_EPOCH = (1980, 1, 1, 0, 0, 0)  # a zip's members have times; the same samples shall give the same bytes


def to_uint16(pixels: np.ndarray) -> np.ndarray:
    """float [N, C, H, W] in [−1, 1] → uint16 [N, H, W, C]: clamp, (x + 1) · 32767.5, round half to even.

    Raises:
        ValueError: pixels is not a float array of four dimensions, or holds NaN.
    """
    if pixels.ndim != 4 or not np.issubdtype(pixels.dtype, np.floating):
        raise ValueError(f"to_uint16: expected floats [N, C, H, W], got {pixels.dtype} {list(pixels.shape)}")
    nans = int(np.isnan(pixels).sum())
    if nans:
        raise ValueError(f"to_uint16: {nans} of {pixels.size} pixels are NaN; find the step that made them")
    values = pixels.astype(np.float64).clip(-1, 1)
    return np.rint((values + 1) * 32767.5).astype(np.uint16).transpose(0, 2, 3, 1).copy()


def to_unit(pixels: np.ndarray) -> np.ndarray:
    """float [N, C, H, W], nominally in [−1, 1] → float32 [N, H, W, C]: x/2 + 1/2, nominally in [0, 1], not clamped."""
    return (pixels.astype(np.float32) * np.float32(0.5) + np.float32(0.5)).transpose(0, 2, 3, 1).copy()


def image_bytes(image: np.ndarray, format: str) -> bytes:
    """An image file of "png" (8 or 16 bits), "jpeg" (quality 95, 4:4:4), "webp" (lossless; grey as RGB) or "tiff".

    The same image gives the same bytes.

    Args:
        image: [H, W, 1 or 3], uint8; for PNG also uint16; for TIFF float32, which is stored as it is.

    Raises:
        ValueError: dtype or shape is not as above, or a side is longer than the format can say.
        MissingPackage: tifffile is missing.
    """
    if format == "tiff":
        return _tiff(image)
    if format == "png" and image.dtype == np.uint16:
        return png16(image)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] not in (1, 3) or 0 in image.shape:
        raise ValueError(f"{format}: expected uint8 [H, W, 1 or 3], none of them 0, got {image.dtype} {image.shape}")
    longest = _LONGEST_SIDE.get(format)
    if longest and max(image.shape) > longest:
        size = f"{image.shape[1]} × {image.shape[0]}"
        raise ValueError(f"{format}: expected sides of at most {longest} pixels, got {size}; use --format png")
    stream = io.BytesIO()
    picture = Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)
    picture.save(stream, format=format.upper(), **_SETTINGS[format])
    return stream.getvalue()


def import_tifffile() -> ModuleType:
    """tifffile, which reads and writes float TIFF.

    Raises:
        MissingPackage: it cannot be imported.
    """
    try:
        import tifffile
    except ImportError as error:
        raise MissingPackage(f"TIFF needs tifffile ({error}): pip install 'fastlatent[media]'") from None
    return tifffile


def _tiff(image: np.ndarray) -> bytes:
    if image.dtype != np.float32 or image.ndim != 3 or image.shape[2] not in (1, 3) or 0 in image.shape:
        raise ValueError(f"tiff: expected float32 [H, W, 1 or 3], none of them 0, got {image.dtype} {image.shape}")
    grey, stream = image.shape[2] == 1, io.BytesIO()
    import_tifffile().imwrite(
        stream, image[:, :, 0] if grey else image, photometric="minisblack" if grey else "rgb", metadata=None
    )
    return stream.getvalue()


def png16(image: np.ndarray) -> bytes:
    """A PNG file of uint16 [H, W, 1 or 3]; Pillow writes no colour of 16 bits.

    Raises:
        ValueError: dtype or shape is not as above.
    """
    if image.dtype != np.uint16 or image.ndim != 3 or image.shape[2] not in (1, 3) or 0 in image.shape:
        raise ValueError(f"png16: expected uint16 [H, W, 1 or 3], none of them 0, got {image.dtype} {image.shape}")
    height, width, channels = image.shape
    rows = np.frombuffer(image.astype(">u2").tobytes(), dtype=np.uint8).reshape(height, -1)
    # Filter 2, "Up": each byte less the one above it.
    up = np.full((height, 1 + rows.shape[1]), 2, dtype=np.uint8)
    up[:, 1:] = np.diff(rows, axis=0, prepend=np.zeros_like(rows[:1]))
    header = struct.pack(">IIBBBBB", width, height, 16, 0 if channels == 1 else 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(up.tobytes())), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


def write_npz(file: BinaryIO, images: Iterable[np.ndarray], count: int, labels: np.ndarray | None) -> None:
    """Write what FID tools read: `arr_0` uint8 [N, H, W, C], and `arr_1` int64 [N] where there are labels.

    One image at a time is in memory.

    Args:
        images: `count` (at least 1) of uint8 [H, W, C], all of one shape.
    """
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        written = 0
        with archive.open(zipfile.ZipInfo("arr_0.npy", _EPOCH), "w", force_zip64=True) as member:
            for image in images:
                if not written:
                    shape, description = image.shape, np.lib.format.dtype_to_descr(np.dtype(np.uint8))
                    header = {"descr": description, "fortran_order": False, "shape": (count, *shape)}
                    np.lib.format.write_array_header_1_0(member, header)
                if image.dtype != np.uint8 or image.shape != shape:
                    raise ValueError(f"write_npz: expected uint8 {shape}, got {image.dtype} {image.shape}")
                member.write(np.ascontiguousarray(image).tobytes())
                written += 1
        assert written == count, (written, count)
        if labels is not None:
            with archive.open(zipfile.ZipInfo("arr_1.npy", _EPOCH), "w", force_zip64=True) as member:
                np.lib.format.write_array(member, labels.astype(np.int64))
