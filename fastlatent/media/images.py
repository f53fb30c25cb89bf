"""Images as arrays: decoding, and the range that models see. Torch-free."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageFile, UnidentifiedImageError, features

from fastlatent.media.high_depth import UNSIGNED, WHITE_IS_ZERO, read_deep, unit_floats, unit_integers
from fastlatent.media.image_error import MAX_PIXELS, ImageError, MissingPackage, refuse_bomb
from fastlatent.media.orientation import orientation_of, upright

__all__ = [
    "DECODE_RULE", "MAX_PIXELS", "ImageError", "check_image", "image_size", "read_image", "to_model_range", "to_uint8",
]  # fmt: skip

DECODE_RULE = "pillow-2"
"""The name, kept in provenance, of what `read_image` does to a file:

- decoded by Pillow as AVIF, BMP, GIF, JPEG, PNG, PPM/PGM/PFM, TIFF or WebP, whatever the file's name says;
  the first frame of an animation or first page of a TIFF;
- where that would lose bits, which the file's header tells, by libpng and libtiff (imagecodecs): PNG of 16 bits
  per channel that is not plain grey, TIFF of 16, 32 or 64 bits; OpenEXR by OpenEXR: the first part's data window,
  channels R, G, B or Y as stored, that is, linear light;
- integers of more than 8 bits divided by their largest value, floats mapped from the stated range to [0, 1], and
  refused if they lie outside: float32 in [0, 1];
- everything else uint8; Pillow keeps the upper 8 bits of AVIF and of PPM in colour;
- EXIF orientation applied; an orientation that cannot be read counts as upright;
- palette, CMYK, YCbCr and grey + alpha converted to RGB by Pillow; alpha dropped, never blended (integers that a
  TIFF holds multiplied by alpha are divided by it); colour profiles ignored;
- channels=3 repeats grey; channels=1 takes the luma of the RGB pixels, (299 R + 587 G + 114 B) / 1000, for uint8
  as Pillow rounds it.
"""

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "PPM", "TIFF")
TIFF_BITS, TIFF_PHOTOMETRIC, TIFF_SAMPLE_FORMAT = 258, 262, 339


def read_image(data: bytes, *, channels: int, input_range: tuple[float, float] | None = None) -> np.ndarray:
    """Decode a whole image file by DECODE_RULE.

    Args:
        data: the file's bytes.
        channels: 1 or 3.
        input_range: the values of float files that become 0 and 1; None for (0, 1). Integers have their own.

    Returns:
        [H, W, channels], uint8, or float32 in [0, 1] for more than 8 bits; C-contiguous, perhaps read-only.

    Raises:
        ImageError: the file is empty, truncated, broken, larger than MAX_PIXELS or of no readable format, or
            has float pixels outside input_range or signed integer pixels.
        ValueError: channels is not 1 or 3, input_range does not rise, a package that the file needs is missing, or
            Pillow has been told to accept truncated files.
    """
    if channels not in (1, 3):
        raise ValueError(f"read_image: expected channels 1 or 3, got {channels}")
    if input_range is not None and not -np.inf < input_range[0] < input_range[1] < np.inf:
        raise ValueError(f"read_image: expected input_range low < high, both finite, got {input_range}")
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        raise ValueError(
            "read_image: PIL.ImageFile.LOAD_TRUNCATED_IMAGES is True in this process, so Pillow would return "
            "half-decoded pixels; set it to False"
        )
    if not data:
        raise ImageError("empty file")
    try:
        pixels = read_deep(data, input_range)
        if pixels is None:
            with Image.open(io.BytesIO(data), formats=_formats(data)) as image:
                refuse_bomb(*image.size)
                image.load()
                pixels = upright(_pixels(image, channels, input_range), orientation_of(image))
        return _with_channels(pixels, channels)
    except (ImageError, MissingPackage, MemoryError):  # the last two are no property of the file
        raise
    except UnidentifiedImageError:
        # Pillow's own text holds the address of the BytesIO.
        raise ImageError(f"no readable {'/'.join(FORMATS)} image; starts with {data[:8]!r}") from None
    except Exception as error:
        # Broken files make Pillow raise OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error,
        # IndexError, KeyError, TypeError and more; there is no common base.
        text = " ".join(f"{type(error).__name__}: {error}".split())
        raise ImageError(text[:160]) from None


def image_size(data: bytes, *, input_range: tuple[float, float] | None = None) -> tuple[int, int]:
    """Height and width, upright: of JPEG, PNG and WebP from the header alone, else as `read_image` decodes it.

    Raises:
        ImageError: it cannot be told; as `read_image`, and what that raises besides.
    """
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP")) as image:
            width, height = image.size
            turned = orientation_of(image) >= 5
    except Exception:  # another format, or broken: `read_image` says which
        height, width, _ = read_image(data, channels=3, input_range=input_range).shape
        return height, width
    return (width, height) if turned else (height, width)


def _formats(data: bytes) -> tuple[str, ...]:
    brands = data[8:64] if data[4:8] == b"ftyp" else b""  # the major brand of an AVIF may be the container's, mif1
    if b"avif" not in brands and b"avis" not in brands:
        return FORMATS
    if "avif" not in features.modules or not features.check("avif"):
        raise MissingPackage("this Pillow was built without AVIF: pip install 'pillow>=11.3'")
    return ("AVIF",)


def _pixels(image: Image.Image, channels: int, input_range: tuple[float, float] | None) -> np.ndarray:
    """[H, W, 1 or 3], as the file lies."""
    if image.mode == "F" or image.mode.startswith("I"):
        return _unit_range(image, input_range)[:, :, None]
    # Without it, Pillow's palette conversion warns that RGB cannot hold transparency.
    image.info.pop("transparency", None)
    rgb_or_grey: Image.Image = image
    if channels == 1 and image.mode in ("1", "L", "LA"):
        rgb_or_grey = image.convert("L")
    elif image.mode != "RGB":
        rgb_or_grey = image.convert("RGB")
    # asarray is a view of Pillow's bytes. A copy of 13 MB costs 16 ms in page faults, decoding a JPEG of it 24.
    return np.asarray(rgb_or_grey.convert("L"))[:, :, None] if channels == 1 else np.asarray(rgb_or_grey)


def _unit_range(image: Image.Image, input_range: tuple[float, float] | None) -> np.ndarray:
    """Grey pixels of 16 or 32 bits or floats as float32 [H, W] in [0, 1]."""
    values = np.asarray(image)
    tags = getattr(image, "tag_v2", {})  # {} unless TIFF
    if image.mode == "F":
        unit = unit_floats(values, input_range)
    else:
        if tags.get(TIFF_SAMPLE_FORMAT, (UNSIGNED,))[0] != UNSIGNED:
            raise ImageError("signed integer pixels, which have no agreed range: save as unsigned or float")
        bits = tags[TIFF_BITS][0] if tags else 16
        # Pillow reads unsigned 32-bit pixels into int32.
        unit = unit_integers(values.view(np.uint32) if bits == 32 else values, bits)
    # Pillow inverts white-is-zero files of 8 bits, but not these.
    return 1 - unit if tags.get(TIFF_PHOTOMETRIC) == WHITE_IS_ZERO else unit


def _with_channels(pixels: np.ndarray, channels: int) -> np.ndarray:
    if pixels.shape[2] == channels:
        return pixels
    if channels == 3:
        return np.repeat(pixels, 3, axis=2)
    red, green, blue = (pixels[:, :, c].astype(np.float64) for c in range(3))  # floats: uint8 is converted above
    return (0.299 * red + 0.587 * green + 0.114 * blue).astype(np.float32)[:, :, None]


def to_model_range(image: np.ndarray) -> np.ndarray:
    """[H, W, 1 or 3] uint8 or float32 in [0, 1] -> float32 [C, H, W] in [-1, 1]: x / 127.5 - 1, or 2x - 1.

    Raises:
        ValueError: shape or dtype is not as above.
    """
    check_image("to_model_range", image)
    planes = np.ascontiguousarray(image.transpose(2, 0, 1), dtype=np.float32)
    return planes / np.float32(127.5) - 1 if image.dtype == np.uint8 else 2 * planes - 1


def to_uint8(pixels: np.ndarray) -> np.ndarray:
    """float [N, C, H, W] in [-1, 1] -> uint8 [N, H, W, C]: clamp, (x + 1) · 127.5 in float32, round half to
    even. The exact inverse of `to_model_range` for every uint8 value.

    Raises:
        ValueError: pixels is not a float array of four dimensions, or holds NaN.
    """
    if pixels.ndim != 4 or not np.issubdtype(pixels.dtype, np.floating):
        raise ValueError(f"to_uint8: expected floats [N, C, H, W], got {pixels.dtype} {list(pixels.shape)}")
    values = pixels.astype(np.float32)
    nans = int(np.isnan(values).sum())
    if nans:
        raise ValueError(f"to_uint8: {nans} of {values.size} pixels are NaN; find the step that made them")
    return np.rint((values.clip(-1, 1) + 1) * np.float32(127.5)).astype(np.uint8).transpose(0, 2, 3, 1).copy()


def check_image(caller: str, image: np.ndarray) -> None:
    """Raise ValueError unless image is uint8 or float32 [H, W, 1 or 3] with at least one pixel."""
    if (
        image.ndim != 3
        or image.shape[2] not in (1, 3)
        or 0 in image.shape
        or image.dtype not in (np.dtype(np.uint8), np.dtype(np.float32))
    ):
        raise ValueError(f"{caller}: expected uint8 or float32 [H, W, 1 or 3], got {image.dtype} {list(image.shape)}")
