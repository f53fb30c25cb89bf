"""Images as arrays: decoding, the centre crop of ADM, and the range that models see. Torch-free."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageFile, UnidentifiedImageError

DECODE_RULE = "pillow-1"
"""The name, kept in provenance, of what `read_image` does to a file:

- decoded by Pillow as BMP, GIF, JPEG, PNG, PPM/PGM/PFM, TIFF or WebP, whatever the file's name says;
  the first frame of an animation or first page of a TIFF;
- EXIF orientation applied; an orientation that cannot be read counts as upright;
- grey of 16 or 32 bits (unsigned) divided by its largest value, floats taken as they are: float32 in [0, 1];
- everything else uint8. Colour of 16 bits per channel is among it: Pillow keeps the upper 8;
- palette, CMYK, YCbCr and grey + alpha converted to RGB by Pillow; alpha dropped, never blended; colour
  profiles ignored;
- channels=3 repeats grey; channels=1 takes Pillow's luma of the RGB pixels, (299 R + 587 G + 114 B) / 1000.
"""

TRANSFORM_RULE = "adm-center-crop-1"
"""The name, kept in provenance, of what `center_crop` does."""

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "PPM", "TIFF")
# Twice Pillow's warning threshold, where Pillow itself refuses; ours holds even if a library lifted Pillow's.
MAX_PIXELS = 178_956_970

ORIENTATION_TAG = 0x0112
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
TIFF_BITS, TIFF_PHOTOMETRIC, TIFF_SAMPLE_FORMAT = 258, 262, 339


class ImageError(ValueError):
    """A file that cannot be used; the message is one short line, fit for a list of bad files."""


def read_image(data: bytes, *, channels: int) -> np.ndarray:
    """Decode a whole image file by DECODE_RULE.

    Args:
        data: the file's bytes.
        channels: 1 or 3.

    Returns:
        [H, W, channels], uint8, or float32 in [0, 1] for grey of more than 8 bits; writable, C-contiguous.

    Raises:
        ImageError: the file is empty, truncated, broken, larger than MAX_PIXELS or of no readable format, or
            has float pixels outside [0, 1] or signed integer pixels.
        ValueError: channels is not 1 or 3, or Pillow has been told to accept truncated files.
    """
    if channels not in (1, 3):
        raise ValueError(f"read_image: expected channels 1 or 3, got {channels}")
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        raise ValueError(
            "read_image: PIL.ImageFile.LOAD_TRUNCATED_IMAGES is True in this process, so Pillow would return "
            "half-decoded pixels; set it to False"
        )
    if not data:
        raise ImageError("empty file")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ImageError(f"{image.width} x {image.height} pixels, more than {MAX_PIXELS}")
            image.load()
            return _pixels(image, channels)
    except (ImageError, MemoryError):  # running out of memory is no property of the file
        raise
    except UnidentifiedImageError:
        # Pillow's own text holds the address of the BytesIO.
        raise ImageError(f"no readable {'/'.join(FORMATS)} image; starts with {data[:8]!r}") from None
    except Exception as error:
        # Broken files make Pillow raise OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error,
        # IndexError, KeyError, TypeError and more; there is no common base.
        text = " ".join(f"{type(error).__name__}: {error}".split())
        raise ImageError(text[:160]) from None


def _pixels(image: Image.Image, channels: int) -> np.ndarray:
    method = UPRIGHT.get(_orientation(image))
    if image.mode == "F" or image.mode.startswith("I"):
        pixels = _unit_range(image)
        if method is not None:
            pixels = np.asarray(Image.fromarray(pixels).transpose(method))
        return np.repeat(pixels[:, :, None], channels, axis=2)
    # Without it, Pillow's palette conversion warns that RGB cannot hold transparency.
    image.info.pop("transparency", None)
    rgb_or_grey: Image.Image = image
    if channels == 1 and image.mode in ("1", "L", "LA"):
        rgb_or_grey = image.convert("L")
    elif image.mode != "RGB":
        rgb_or_grey = image.convert("RGB")
    if method is not None:
        rgb_or_grey = rgb_or_grey.transpose(method)
    if channels == 1:
        return np.array(rgb_or_grey.convert("L"))[:, :, None]
    return np.array(rgb_or_grey)


def _orientation(image: Image.Image) -> int:
    # Pillow has already turned a TIFF while loading it, and forgotten its orientation.
    try:
        return image.getexif().get(ORIENTATION_TAG, 1)
    except Exception:  # as many types as above; thousands of photographs carry broken EXIF and fine pixels
        return 1


def _unit_range(image: Image.Image) -> np.ndarray:
    """Grey pixels of 16 or 32 bits or floats as float32 [H, W] in [0, 1]."""
    values = np.asarray(image)
    tags = getattr(image, "tag_v2", {})  # {} unless TIFF
    if image.mode == "F":
        low, high = float(values.min()), float(values.max())
        if not (low >= 0 and high <= 1):  # NaN fails both
            raise ImageError(f"float pixels from {low:.6g} to {high:.6g}, expected [0, 1]: rescale the file")
        unit = values.astype(np.float32)
    else:
        if tags.get(TIFF_SAMPLE_FORMAT, (1,))[0] != 1:
            raise ImageError("signed integer pixels, which have no agreed range: save as unsigned or float")
        bits = tags[TIFF_BITS][0] if tags else 16
        if bits == 32:
            values = values.view(np.uint32)  # Pillow reads unsigned 32-bit pixels into int32
        unit = (values / (2**bits - 1)).astype(np.float32)
    # Pillow inverts white-is-zero files of 8 bits, but not these.
    return 1 - unit if tags.get(TIFF_PHOTOMETRIC) == 0 else unit


def center_crop(image: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Scale the shorter side to `size` and cut the centre: `center_crop_arr` of ADM (Dhariwal and Nichol,
    2021), used by DiT, MAR and LatentLM.

    Halve (floor) with the box filter while the shorter side is at least 2·size, then one bicubic resize to
    (round(w·s), round(h·s)), s = size / min(w, h), then cut at ((h - size) // 2, (w - size) // 2). Smaller
    images are enlarged. float32 pixels go through the same filters channel by channel and are clamped to
    [0, 1], as Pillow clamps uint8 ones to [0, 255].

    Args:
        image: [H, W, 1 or 3] uint8, or float32 in [0, 1].
        size: pixels, at least 1.

    Returns:
        pixels [size, size, C] of the image's dtype, and the crop (top, left, height, width) int32 [4]: the
        region that the square shows, in pixels of the image passed in, each rounded to the nearest integer.

    Raises:
        ImageError: the resized image would have more than MAX_PIXELS, because one side is thousands of times
            the other.
        ValueError: shape, dtype or size is not as above.
    """
    _check_image("center_crop", image)
    if size < 1:
        raise ValueError(f"center_crop: expected a size of at least 1 pixel, got {size}")
    height, width, channels = image.shape
    if image.dtype == np.uint8:
        resized = np.asarray(_adm_resize(Image.fromarray(image[:, :, 0] if channels == 1 else image), size))
        resized = resized.reshape(*resized.shape[:2], channels)
    else:
        planes = [np.asarray(_adm_resize(Image.fromarray(image[:, :, c]), size)) for c in range(channels)]
        resized = np.clip(np.stack(planes, axis=2), 0, 1)
    resized_height, resized_width = resized.shape[:2]
    top, left = (resized_height - size) // 2, (resized_width - size) // 2
    pixels = resized[top : top + size, left : left + size].copy()  # Pillow's own buffer is read-only
    rows, columns = height / resized_height, width / resized_width
    crop = np.array([round(top * rows), round(left * columns), round(size * rows), round(size * columns)])
    return pixels, crop.astype(np.int32)


def _adm_resize(image: Image.Image, size: int) -> Image.Image:
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    if width * height > MAX_PIXELS:
        raise ImageError(
            f"{image.width} x {image.height} pixels would become {width} x {height} before the crop, more "
            f"than {MAX_PIXELS}: one side is too many times the other"
        )
    return image.resize((width, height), Image.Resampling.BICUBIC)


def to_model_range(image: np.ndarray) -> np.ndarray:
    """[H, W, 1 or 3] uint8 or float32 in [0, 1] -> float32 [C, H, W] in [-1, 1]: x / 127.5 - 1, or 2x - 1.

    Raises:
        ValueError: shape or dtype is not as above.
    """
    _check_image("to_model_range", image)
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


def _check_image(caller: str, image: np.ndarray) -> None:
    if (
        image.ndim != 3
        or image.shape[2] not in (1, 3)
        or 0 in image.shape
        or image.dtype not in (np.dtype(np.uint8), np.dtype(np.float32))
    ):
        raise ValueError(f"{caller}: expected uint8 or float32 [H, W, 1 or 3], got {image.dtype} {list(image.shape)}")
