import io
import re
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, ImageFile, ImageOps, features

from fastlatent.media.images import MAX_PIXELS, ImageError, read_image


def noise(height, width, channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def encode(image, format, **options):
    stream = io.BytesIO()
    image.save(stream, format=format, **options)
    return stream.getvalue()


RGB = Image.fromarray(noise(7, 5))
GREY = Image.fromarray(noise(7, 5)[:, :, 0])
ALPHA = Image.fromarray(noise(7, 5, seed=1)[:, :, 0])
GREY_16 = Image.fromarray(np.random.default_rng(2).integers(0, 65536, (7, 5), dtype=np.uint16))
FLOAT = Image.fromarray(np.random.default_rng(3).random((7, 5), dtype=np.float32))
PALETTE = RGB.quantize(9)


def luma(rgb):
    # ITU-R 601 in 16-bit fixed point with rounding, as Pillow documents for "L".
    return ((rgb.astype(np.int64) @ [19595, 38470, 7471] + 0x8000) >> 16).astype(np.uint8)[:, :, None]


def with_alpha(image):
    copy = image.copy()
    copy.putalpha(ALPHA)
    return copy


# Lossless files of every mode, and the RGB pixels they must give.
EIGHT_BIT = {
    "rgb png": (encode(RGB, "PNG"), np.array(RGB)),
    "rgb bmp": (encode(RGB, "BMP"), np.array(RGB)),
    "rgb ppm": (encode(RGB, "PPM"), np.array(RGB)),
    "rgb tiff": (encode(RGB, "TIFF"), np.array(RGB)),
    "rgb tiff lzw": (encode(RGB, "TIFF", compression="tiff_lzw"), np.array(RGB)),
    "rgb webp": (encode(RGB, "WEBP", lossless=True), np.array(RGB)),
    "rgba png": (encode(with_alpha(RGB), "PNG"), np.array(RGB)),
    "rgba tiff": (encode(with_alpha(RGB), "TIFF"), np.array(RGB)),
    "rgba webp": (encode(with_alpha(RGB), "WEBP", lossless=True, exact=True), np.array(RGB)),
    "grey png": (encode(GREY, "PNG"), np.array(GREY.convert("RGB"))),
    "grey pgm": (encode(GREY, "PPM"), np.array(GREY.convert("RGB"))),
    "grey + alpha png": (encode(with_alpha(GREY), "PNG"), np.array(GREY.convert("RGB"))),
    "palette png": (encode(PALETTE, "PNG"), np.array(PALETTE.convert("RGB"))),
    "palette bmp": (encode(PALETTE, "BMP"), np.array(PALETTE.convert("RGB"))),
    "one transparent colour": (encode(PALETTE, "PNG", transparency=3), np.array(PALETTE.convert("RGB"))),
    "transparency per colour": (
        encode(PALETTE, "PNG", transparency=bytes(range(0, 90, 10))),
        np.array(PALETTE.convert("RGB")),
    ),
    "transparent rgb": (encode(RGB, "PNG", transparency=(1, 2, 3)), np.array(RGB)),
    "1-bit png": (encode(GREY.convert("1"), "PNG"), np.array(GREY.convert("1").convert("RGB"))),
    "1-bit tiff": (
        encode(GREY.convert("1"), "TIFF", compression="group4"),
        np.array(GREY.convert("1").convert("RGB")),
    ),
    "cmyk tiff": (encode(RGB.convert("CMYK"), "TIFF"), np.array(RGB.convert("CMYK").convert("RGB"))),
}


@pytest.mark.parametrize("name", EIGHT_BIT)
def test_eight_bit_files(name):
    data, expected = EIGHT_BIT[name]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # one line per palette image would drown a log
        colour, grey = read_image(data, channels=3), read_image(data, channels=1)
    assert colour.dtype == grey.dtype == np.uint8
    np.testing.assert_array_equal(colour, expected)
    np.testing.assert_array_equal(grey, luma(expected))
    for pixels in (colour, grey):
        assert pixels.flags.c_contiguous


def test_ycbcr_tiff():
    # LZW, because Pillow up to 12.0 calls uncompressed YCbCr files truncated; libtiff converts this one, and
    # rounds by one differently from Pillow.
    source = RGB.convert("YCbCr")
    pixels = read_image(encode(source, "TIFF", compression="tiff_lzw"), channels=3)
    assert abs(pixels.astype(int) - np.array(source.convert("RGB"))).max() <= 1


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("progressive", [False, True])
def test_jpeg_modes(mode, progressive):
    # Smooth, so that JPEG's own loss stays small: an inverted CMYK file would be far off.
    smooth = Image.fromarray(noise(2, 2)).resize((32, 24), Image.Resampling.BILINEAR)
    data = encode(smooth.convert(mode), "JPEG", quality=95, progressive=progressive)
    pixels = read_image(data, channels=3)
    np.testing.assert_array_equal(pixels, np.array(Image.open(io.BytesIO(data)).convert("RGB")))
    expected = np.array(smooth.convert(mode).convert("RGB")).astype(int)
    assert abs(pixels.astype(int) - expected).max() <= 16
    np.testing.assert_array_equal(read_image(data, channels=1), luma(pixels))


@pytest.mark.parametrize("format", ["PNG", "TIFF", "PPM"])
def test_sixteen_bit_grey(format):
    expected = np.array(GREY_16, dtype=np.float32) / 65535
    for channels in (1, 3):
        pixels = read_image(encode(GREY_16, format), channels=channels)
        assert pixels.dtype == np.float32
        np.testing.assert_array_equal(pixels, np.repeat(expected[:, :, None], channels, axis=2))


def tiff(values, *, bits, sample_format, photometric=1, order="<"):
    """An uncompressed single-strip grey TIFF, since Pillow does not write every kind that it reads."""
    strip = values.tobytes()
    tags = [(256, 4, values.shape[1]), (257, 4, values.shape[0]), (258, 3, bits), (259, 3, 1)]
    tags += [(262, 3, photometric), (273, 4, 8), (277, 3, 1), (278, 4, values.shape[0])]
    tags += [(279, 4, len(strip)), (339, 3, sample_format)]
    strip += b"\0" * (len(strip) % 2)
    # Kind 3 is a 16-bit value, left-justified in its four bytes; kind 4 has 32.
    entries = b"".join(
        struct.pack(order + ("HHIHxx" if kind == 3 else "HHII"), tag, kind, 1, value) for tag, kind, value in tags
    )
    header = (b"II" if order == "<" else b"MM") + struct.pack(order + "HI", 42, 8 + len(strip))
    return header + strip + struct.pack(order + "H", len(tags)) + entries + b"\0\0\0\0"


def test_integers_of_every_width_end_at_one():
    ends = np.array([[0, 1, 65534, 65535]])
    expected = (ends / 65535).astype(np.float32)[:, :, None]
    for order in "<>":
        data = tiff(ends.astype(order + "u2"), bits=16, sample_format=1, order=order)
        np.testing.assert_array_equal(read_image(data, channels=1), expected)
    data = tiff(ends.astype("<u2"), bits=16, sample_format=1, photometric=0)  # white is zero
    np.testing.assert_array_equal(read_image(data, channels=1), 1 - expected)
    # Above 2³¹ Pillow's int32 is negative.
    wide = np.array([[0, 1 << 31, (1 << 32) - 1]], dtype="<u4")
    data = tiff(wide, bits=32, sample_format=1)
    expected = np.float32([0, 2**31 / (2**32 - 1), 1])
    np.testing.assert_array_equal(read_image(data, channels=1).ravel(), expected)
    # 12 bits: two values in three bytes, 0xfff and 0x000.
    data = tiff(np.array([[0xFF, 0xF0, 0x00]], dtype=np.uint8), bits=12, sample_format=1)
    data = data.replace(struct.pack("<HHII", 256, 4, 1, 3), struct.pack("<HHII", 256, 4, 1, 2))
    np.testing.assert_array_equal(read_image(data, channels=1).ravel(), np.float32([1, 0]))


@pytest.mark.parametrize(("kind", "bits"), [("<i2", 16), ("<i4", 32)])
def test_signed_integers_are_refused(kind, bits):
    with pytest.raises(ImageError, match="signed integer"):
        read_image(tiff(np.array([[-1, 1]], dtype=kind), bits=bits, sample_format=2), channels=1)


def test_float_tiff():
    for channels in (1, 3):
        pixels = read_image(encode(FLOAT, "TIFF"), channels=channels)
        assert pixels.dtype == np.float32
        np.testing.assert_array_equal(pixels, np.repeat(np.array(FLOAT)[:, :, None], channels, axis=2))


@pytest.mark.parametrize("value", [-0.001, 1.001, 255.0, np.inf, -np.inf, np.nan])
def test_floats_outside_the_unit_range_are_refused(value):
    values = np.array(FLOAT)
    values[3, 2] = value
    with pytest.raises(ImageError, match="expected \\[0, 1\\]"):
        read_image(encode(Image.fromarray(values), "TIFF"), channels=1)


def test_the_range_of_a_pfm_is_stated():
    data = encode(Image.fromarray(np.array(FLOAT) * 8 - 4), "PPM")  # Pillow writes floats as PFM
    with pytest.raises(ImageError, match="expected \\[0, 1\\]: state the range of your files with --input-range LO,HI"):
        read_image(data, channels=1)
    pixels = read_image(data, channels=1, input_range=(-4, 4))
    np.testing.assert_allclose(pixels[:, :, 0], np.array(FLOAT), atol=1e-7)


@pytest.mark.skipif("avif" not in features.modules or not features.check("avif"), reason="a Pillow without AVIF")
def test_avif():
    smooth = Image.fromarray(noise(2, 2)).resize((32, 24), Image.Resampling.BILINEAR)
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(smooth, "AVIF", quality=100, subsampling="4:4:4", exif=exif)
    expected = np.rot90(np.array(smooth), -1).astype(int)
    for file in (data, data.replace(b"ftypavif", b"ftypmif1", 1)):  # the container's brand first, AVIF's among the rest
        pixels = read_image(file, channels=3)
        assert pixels.dtype == np.uint8 and abs(pixels - expected).max() <= 3
        np.testing.assert_array_equal(read_image(file, channels=1), luma(pixels))
    with pytest.raises(ImageError):
        read_image(data[:-20], channels=3)


def test_avif_without_support_is_not_blamed_on_the_file(monkeypatch):
    monkeypatch.setattr(features, "check", lambda name: False)
    with pytest.raises(ValueError, match="without AVIF: pip install") as error:
        read_image(b"\0\0\0\x20ftypavif\0\0\0\0avifmif1", channels=3)
    assert not isinstance(error.value, ImageError)


@pytest.mark.parametrize("orientation", [0, *range(1, 9), 9])  # 0 and 9 are no orientations: upright
@pytest.mark.parametrize(
    ("source", "format"),
    [
        (RGB, "PNG"),
        (RGB, "JPEG"),
        (RGB, "WEBP"),
        (RGB, "TIFF"),  # which Pillow turns by itself
        (PALETTE, "PNG"),
        (GREY_16, "PNG"),
        (GREY_16, "TIFF"),
        (FLOAT, "TIFF"),
        (GREY.convert("1"), "PNG"),
    ],
)
def test_orientation(orientation, source, format):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(source, format, exif=exif)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    if orientation in (5, 6, 7, 8):
        assert upright.size == (7, 5)  # the source is 5 wide
    pixels = read_image(data, channels=3)
    if source in (GREY_16, FLOAT):
        expected = np.array(upright, dtype=np.float32) / (65535 if source is GREY_16 else 1)
        np.testing.assert_array_equal(pixels, np.repeat(expected[:, :, None], 3, axis=2))
    else:
        np.testing.assert_array_equal(pixels, np.array(upright.convert("RGB")))


def test_broken_exif_leaves_the_image_upright():
    plain = encode(RGB, "JPEG")
    for exif in (b"Exif\0\0", b"Exif\0\0garbage that is no TIFF", b"Exif\0\0II*\0\xff\xff\xff\xff"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pixels = read_image(encode(RGB, "JPEG", exif=exif), channels=3)
        np.testing.assert_array_equal(pixels, read_image(plain, channels=3))


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_frame_of_an_animation(format):
    frames = [Image.new("RGB", (6, 4), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if format == "WEBP" else {}
    data = encode(frames[0], format, save_all=True, append_images=frames[1:], **options)
    assert Image.open(io.BytesIO(data)).n_frames == 3
    pixels = read_image(data, channels=3)
    np.testing.assert_array_equal(pixels, np.broadcast_to(np.uint8([255, 0, 0]), (4, 6, 3)))


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1)])  # one pixel; one row; one column
@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF", "PPM"])
def test_thin_images(size, format):
    expected = noise(*size)
    np.testing.assert_array_equal(read_image(encode(Image.fromarray(expected), format), channels=3), expected)


def textured():
    # Larger than one decoder block, with a noisy and a flat half, so that cuts fall into different states.
    image = np.full((24, 32, 3), 77, dtype=np.uint8)
    image[:12] = noise(12, 32)
    return Image.fromarray(image)


TRUNCATED = {
    "jpeg": encode(textured(), "JPEG"),
    "progressive jpeg": encode(textured(), "JPEG", progressive=True),
    "jpeg with restarts": encode(textured(), "JPEG", restart_marker_blocks=1),
    "png": encode(textured(), "PNG"),
    "palette png": encode(textured().quantize(17), "PNG"),
    "16-bit png": encode(GREY_16, "PNG"),
    "gif": encode(textured().quantize(17), "GIF"),
    "bmp": encode(textured(), "BMP"),
    "ppm": encode(textured(), "PPM"),
    "webp": encode(textured(), "WEBP"),
    "lossless webp": encode(textured(), "WEBP", lossless=True),
    "tiff": encode(textured(), "TIFF"),
    "tiff lzw": encode(textured(), "TIFF", compression="tiff_lzw"),
    "tiff jpeg": encode(textured(), "TIFF", compression="jpeg"),
}


@pytest.mark.parametrize("name", TRUNCATED)
def test_a_truncated_file_is_an_error_or_complete(name):
    # Every cut in the header (first 80 bytes) and in the trailer (last 40), every 7th between. A cut may
    # leave all pixels (only PNG's IEND is lost, say), but never fewer.
    data = TRUNCATED[name]
    full = read_image(data, channels=3)
    refused = 0
    for cut in sorted({*range(80), *range(80, len(data), 7), *range(len(data) - 40, len(data))}):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                pixels = read_image(data[:cut], channels=3)
            except ImageError as error:
                refused += 1
                assert 0 < len(str(error)) <= 200 and "\n" not in str(error) and "0x7" not in str(error)
                continue
        np.testing.assert_array_equal(pixels, full)
    assert refused >= len(range(80, len(data) - 40, 7))


def test_bytes_that_are_no_image():
    with pytest.raises(ImageError, match="empty file"):
        read_image(b"", channels=3)
    for data in (b"just some text\n", b"\0" * 1000, b"\x89PNG", b"<svg/>", encode(RGB, "ICO")):
        with pytest.raises(ImageError, match=re.escape(f"starts with {data[:8]!r}")):
            read_image(data, channels=3)


def test_every_flipped_header_byte_is_read_or_refused():
    # Whatever Pillow raises for a damaged header, only ImageError may come out.
    for name in ("jpeg", "png", "gif", "bmp", "webp", "tiff", "tiff lzw"):
        data = TRUNCATED[name]
        for at in [*range(64), *range(len(data) - 120, len(data))]:
            damaged = data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :]
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    read_image(damaged, channels=3)
                except ImageError as error:
                    assert "\n" not in str(error)


def png_of(width, height):
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def test_a_decompression_bomb_is_refused(monkeypatch):
    # 1 over the limit in pixels; and the largest header PNG can hold.
    for size in ((MAX_PIXELS // 2 + 1, 2), (2**31 - 1, 2**31 - 1)):
        with pytest.raises(ImageError, match="pixels"):
            read_image(png_of(*size), channels=3)
    # Libraries that lift Pillow's limit for the whole process do not lift ours.
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    with pytest.raises(ImageError, match=f"more than {MAX_PIXELS}"):
        read_image(png_of(MAX_PIXELS // 2 + 1, 2), channels=3)


def test_usage_errors_are_not_blamed_on_the_file(monkeypatch):
    with pytest.raises(ValueError, match="channels 1 or 3, got 4") as error:
        read_image(encode(RGB, "PNG"), channels=4)
    assert not isinstance(error.value, ImageError)
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(ValueError, match="LOAD_TRUNCATED_IMAGES") as error:
        read_image(encode(RGB, "PNG"), channels=3)
    assert not isinstance(error.value, ImageError)


def test_running_out_of_memory_is_not_blamed_on_the_file(monkeypatch):
    def load(self):
        raise MemoryError

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    with pytest.raises(MemoryError):
        read_image(encode(RGB, "BMP"), channels=3)
