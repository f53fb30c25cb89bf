import io
import struct
import sys
import warnings
import zlib

import imagecodecs
import media_corpus
import numpy as np
import OpenEXR
import pytest
from media_corpus import deep_picture, exif, exr, png_of, tiff
from PIL import Image

from fastlatent.media.image_error import MAX_PIXELS
from fastlatent.media.images import ImageError, read_image

DEEP = deep_picture()
UNIT = DEEP.astype(np.float32) / 65535
PLANAR = DEEP.transpose(2, 0, 1).copy()


def luma(rgb):
    return (rgb.astype(np.float64) @ [0.299, 0.587, 0.114])[:, :, None]


def turned(pixels, orientation):
    """What a viewer does, from the definitions of EXIF: where row 0 and column 0 of the file belong."""
    transposed = pixels.swapaxes(0, 1) if orientation >= 5 else pixels
    from_right = orientation in (2, 3, 6, 7)
    from_bottom = orientation in (3, 4, 7, 8)
    return transposed[:: -1 if from_bottom else 1, :: -1 if from_right else 1]


SIXTEEN_BIT = {
    "png rgb": imagecodecs.png_encode(DEEP),
    "png rgba": imagecodecs.png_encode(deep_picture(4)),
    "tiff": tiff(DEEP, photometric="rgb"),
    "tiff big-endian": tiff(DEEP, photometric="rgb", byteorder=">"),
    "tiff lzw": tiff(DEEP, photometric="rgb", compression="lzw", predictor=True),
    "tiff deflate strips": tiff(DEEP, photometric="rgb", compression="zlib", rowsperstrip=5),
    "tiff tiles": tiff(DEEP, photometric="rgb", tile=(16, 16)),  # 36 × 44: tiles overhang on both sides
    "tiff deflate tiles": tiff(DEEP, photometric="rgb", tile=(16, 32), compression="zlib"),
    "tiff planar": tiff(PLANAR, photometric="rgb", planarconfig="separate"),
    "tiff planar tiles": tiff(PLANAR, photometric="rgb", planarconfig="separate", tile=(16, 16)),
    "tiff pages": tiff(np.stack([DEEP, DEEP[::-1]]), photometric="rgb"),
    "tiff alpha": tiff(deep_picture(4), photometric="rgb", extrasamples=["unassalpha"]),
    "bigtiff": tiff(DEEP, photometric="rgb", bigtiff=True),
    "bigtiff big-endian": tiff(DEEP, photometric="rgb", bigtiff=True, byteorder=">"),
}


@pytest.mark.parametrize("name", SIXTEEN_BIT)
def test_colour_of_sixteen_bits_keeps_them(name):
    pixels = read_image(SIXTEEN_BIT[name], channels=3)
    assert pixels.dtype == np.float32 and pixels.flags.c_contiguous
    np.testing.assert_array_equal(pixels, UNIT)
    grey = read_image(SIXTEEN_BIT[name], channels=1)
    assert grey.dtype == np.float32 and grey.min() == 0 and grey.max() == 1
    np.testing.assert_allclose(grey, luma(UNIT), atol=1e-7)


def with_alpha(grey):
    return np.stack([grey, DEEP[:, :, 1]], axis=2)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (imagecodecs.png_encode(with_alpha(DEEP[:, :, 0])), UNIT[:, :, 0]),  # Pillow would keep 8 of its bits
        (tiff(with_alpha(DEEP[:, :, 0]), photometric="minisblack", extrasamples=["unassalpha"]), UNIT[:, :, 0]),
        (tiff(DEEP[:, :, 0].copy(), photometric="miniswhite"), 1 - UNIT[:, :, 0]),
        (tiff(DEEP[:, :, 0].astype(np.uint32) * 65537, photometric="minisblack"), UNIT[:, :, 0]),
        # Pillow cannot open these three.
        (tiff(DEEP[:, :, 0].astype(np.uint32) * 65537, photometric="minisblack", byteorder=">"), UNIT[:, :, 0]),
        (tiff(UNIT[:, :, 0].astype(np.float64), photometric="minisblack"), UNIT[:, :, 0]),
        (tiff(UNIT[:, :, 0].astype(np.float16), photometric="minisblack"), UNIT[:, :, 0].astype(np.float16)),
        (tiff(1 - UNIT[:, :, 0], photometric="miniswhite"), UNIT[:, :, 0]),
        (exr({"Y": UNIT[:, :, 0].copy()}), UNIT[:, :, 0]),
    ],
)
def test_deep_grey(data, expected):
    for channels in (1, 3):
        pixels = read_image(data, channels=channels)
        assert pixels.dtype == np.float32
        # One rounding more than the expectation: 1 - (1 - x), or 32 bits through float64.
        np.testing.assert_allclose(pixels, np.repeat(expected[:, :, None], channels, axis=2), rtol=0, atol=6e-8)


@pytest.mark.parametrize(
    "data",
    [
        tiff(UNIT, photometric="rgb"),
        tiff(UNIT.astype(np.float64), photometric="rgb", compression="zlib"),
        tiff(UNIT, photometric="rgb", compression="zlib", predictor=3, byteorder=">"),
        tiff(UNIT.transpose(2, 0, 1).copy(), photometric="rgb", planarconfig="separate"),
        exr({"RGB": UNIT}),
        exr({"RGB": UNIT}, compression=OpenEXR.PIZ_COMPRESSION),
        exr({"RGBA": np.dstack([UNIT, UNIT[:, :, 0]])}),  # alpha dropped
        exr({"R": UNIT[:, :, 0].copy(), "G": UNIT[:, :, 1].copy(), "B": UNIT[:, :, 2].copy(), "Z": UNIT[:, :, 0] * 99}),
    ],
)
def test_floats_in_colour(data):
    np.testing.assert_array_equal(read_image(data, channels=3), UNIT)
    np.testing.assert_allclose(read_image(data, channels=1), luma(UNIT), atol=1e-7)


def test_half_and_whole_numbers_of_exr():
    half = UNIT.astype(np.float16)
    np.testing.assert_array_equal(read_image(exr({"RGB": half}), channels=3), half.astype(np.float32))
    whole = DEEP.astype(np.uint32) * 65537
    pixels = read_image(exr(dict(zip("RGB", whole.transpose(2, 0, 1).copy(), strict=True))), channels=3)
    np.testing.assert_allclose(pixels, UNIT, rtol=0, atol=6e-8)


def test_the_range_of_floats_is_stated():
    hdr = UNIT * 12 - 2  # -2 to 10
    files = [exr({"RGB": hdr}), tiff(hdr, photometric="rgb"), tiff(hdr[:, :, 0].copy(), photometric="minisblack")]
    for data in files:
        with pytest.raises(ImageError, match="from -2 to 10, expected \\[0, 1\\].* --input-range LO,HI"):
            read_image(data, channels=3)
        with pytest.raises(ImageError, match="from -2 to 10, expected \\[-2, 9\\]"):
            read_image(data, channels=3, input_range=(-2, 9))
    for data in files[:2]:
        pixels = read_image(data, channels=3, input_range=(-2, 10))
        assert pixels.dtype == np.float32 and pixels.min() == 0 and pixels.max() == 1
        np.testing.assert_allclose(pixels, UNIT, atol=3e-7)  # hdr's own rounding, 2⁻²¹, divided by 12
    # Integers have a range of their own.
    np.testing.assert_array_equal(read_image(SIXTEEN_BIT["tiff"], channels=3, input_range=(-2, 10)), UNIT)
    for wrong in ((1, 1), (2, 1), (0, np.inf), (np.nan, 1)):
        with pytest.raises(ValueError, match="expected input_range low < high") as error:
            read_image(files[0], channels=3, input_range=wrong)
        assert not isinstance(error.value, ImageError)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_no_range_allows_nan_or_infinity(value):
    values = UNIT.copy()
    values[3, 2, 1] = value
    for data in (exr({"RGB": values}), tiff(values, photometric="rgb")):
        with pytest.raises(ImageError, match="NaN or infinity"):
            read_image(data, channels=3, input_range=(-1e9, 1e9))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation(orientation):
    tags = [(274, "H", 1, orientation, True)]
    for data in (
        tiff(DEEP, photometric="rgb", extratags=tags),
        tiff(PLANAR, photometric="rgb", planarconfig="separate", extratags=tags),
        png_with_exif(orientation, before=b"IDAT"),
        png_with_exif(orientation, before=b"IEND"),
    ):
        pixels = read_image(data, channels=3)
        assert pixels.flags.c_contiguous
        np.testing.assert_array_equal(pixels, turned(UNIT, orientation))
    # The expectation itself, against Pillow.
    image = media_corpus.picture()
    pixels = read_image(media_corpus.encode(image, "PNG", exif=exif(orientation)), channels=3)
    np.testing.assert_array_equal(pixels, turned(np.asarray(image), orientation))


def png_with_exif(orientation, before):
    data = imagecodecs.png_encode(DEEP)
    body = exif(orientation).tobytes().removeprefix(b"Exif\0\0")
    chunk = struct.pack(">I", len(body)) + b"eXIf" + body
    chunk += struct.pack(">I", zlib.crc32(b"eXIf" + body))
    at = data.index(before) - 4
    return data[:at] + chunk + data[at:]


def test_associated_alpha_is_divided_out():
    alpha = np.full((*DEEP.shape[:2], 1), 32768, dtype=np.uint16)
    alpha[5] = 0
    data = tiff(np.dstack([DEEP // 2 * (alpha > 0), alpha]), photometric="rgb", extrasamples=["assocalpha"])
    pixels = read_image(data, channels=3)
    assert (pixels[5] == 0).all()
    np.testing.assert_allclose(np.delete(pixels, 5, axis=0), np.delete(UNIT, 5, axis=0), atol=1 / 32768)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (tiff(DEEP.astype(np.int16), photometric="rgb"), "signed integer"),
        (tiff(DEEP.astype(np.int8), photometric="rgb"), "signed integer"),  # which Pillow would take for unsigned
        (tiff(deep_picture(4), photometric="separated"), "photometric interpretation 5: save as grey or RGB"),
        (tiff(UNIT.astype(np.complex64), photometric="rgb"), "64 bits of sample format 6"),
        (tiff(np.dstack([DEEP] * 3), photometric="rgb"), "9 channels"),
        (exr({"Z": UNIT[:, :, 0].copy()}), "channels Z, expected R, G, B, or Y alone"),
        (exr({"R": UNIT[:, :, 0].copy()}), "channels R, expected"),
        (exr({"left.Y": UNIT[:, :, 0].copy()}), "channels left.Y, expected"),
    ],
)
def test_kinds_that_are_refused(data, reason):
    with pytest.raises(ImageError, match=reason):
        read_image(data, channels=3)


def patched(data, tag, value):
    """A little-endian TIFF with another value in the first directory."""
    (at,) = struct.unpack_from("<L", data, 4)
    for entry in range(at + 2, at + 2 + 12 * struct.unpack_from("<H", data, at)[0], 12):
        if struct.unpack_from("<H", data, entry)[0] == tag:
            return data[: entry + 2] + struct.pack("<HLL", 4, 1, value) + data[entry + 12 :]
    raise AssertionError(f"no tag {tag}")


def test_bombs_are_refused_before_decoding():
    plain, tiles = SIXTEEN_BIT["tiff"], SIXTEEN_BIT["tiff tiles"]
    header = bytearray(exr({"RGB": UNIT}))
    at = header.index(b"dataWindow\0box2i\0") + len(b"dataWindow\0box2i\0") + 4
    header[at : at + 16] = struct.pack("<4i", 0, 0, 39_999, 39_999)
    for data in (
        png_of(MAX_PIXELS // 2 + 1, 2, depth=16),
        patched(plain, 256, MAX_PIXELS),
        patched(tiles, 322, MAX_PIXELS),  # one tile is decoded whole
        bytes(header),
    ):
        with pytest.raises(ImageError, match="pixels"):
            read_image(data, channels=3)


def test_empty_strips_are_not_black():
    with pytest.raises(ImageError, match="1 of 1 strips or tiles are empty"):
        read_image(patched(SIXTEEN_BIT["tiff"], 279, 0), channels=3)


def tiles():
    description = OpenEXR.TileDescription()
    description.xSize = description.ySize = 16
    return description


DAMAGED = {
    "png": SIXTEEN_BIT["png rgb"],
    "tiff": SIXTEEN_BIT["tiff"],
    "tiff lzw": SIXTEEN_BIT["tiff lzw"],
    "tiff deflate tiles": SIXTEEN_BIT["tiff deflate tiles"],
    "tiff planar": SIXTEEN_BIT["tiff planar"],
    "bigtiff": SIXTEEN_BIT["bigtiff"],
    "float tiff": tiff(UNIT, photometric="rgb", compression="zlib", predictor=3),
    "exr": exr({"RGB": UNIT}),
    "exr tiles": exr({"RGB": UNIT}, type=OpenEXR.tiledimage, tiles=tiles()),
}


def read_or_refuse(data):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return read_image(data, channels=3)
        except ImageError as error:
            assert 0 < len(str(error)) <= 200 and "\n" not in str(error) and "0x7" not in str(error)
            return None


@pytest.mark.parametrize("name", DAMAGED)
def test_a_truncated_file_is_an_error_or_complete(name):
    data = DAMAGED[name]
    full = read_image(data, channels=3)
    # Header and trailer byte by byte, between them every 97th.
    cuts = {*range(1, 64), *range(64, len(data), 97), *range(len(data) - 24, len(data))}
    results = [read_or_refuse(data[:cut]) for cut in sorted(cuts)]
    for pixels in results:
        if pixels is not None:
            np.testing.assert_array_equal(pixels, full)
    assert sum(pixels is None for pixels in results) >= len(range(64, len(data) - 24, 97))


@pytest.mark.parametrize("name", DAMAGED)
def test_flipped_bytes_are_read_or_refused(name):
    # Whatever the libraries raise for a damaged header or directory, only ImageError may come out.
    data = DAMAGED[name]
    for at in {*range(0, 400, 3), *range(len(data) - 300, len(data), 3)}:
        read_or_refuse(data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :])


@pytest.mark.parametrize(
    ("data", "package"),
    [(SIXTEEN_BIT["png rgb"], "imagecodecs"), (SIXTEEN_BIT["tiff"], "imagecodecs"), (exr({"RGB": UNIT}), "OpenEXR")],
)
def test_a_missing_package_is_not_blamed_on_the_file(data, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=f"decoded by {package}.*pip install 'fastlatent\\[media\\]'") as error:
        read_image(data, channels=3)
    assert not isinstance(error.value, ImageError)


def test_an_old_openexr_is_not_blamed_on_the_file(monkeypatch):
    monkeypatch.setattr(OpenEXR, "__version__", "3.4.4")
    with pytest.raises(ValueError, match="expected OpenEXR 3.5 or later, got 3.4.4") as error:
        read_image(DAMAGED["exr"], channels=3)
    assert not isinstance(error.value, ImageError)


def test_plain_files_need_no_optional_package(monkeypatch):
    for package in ("imagecodecs", "OpenEXR", "tifffile"):
        monkeypatch.setitem(sys.modules, package, None)
    grey = Image.fromarray(DEEP[:, :, 0])
    for image, format in ((media_corpus.picture(), "TIFF"), (grey, "TIFF"), (grey, "PNG"), (grey, "PPM")):
        assert read_image(media_corpus.encode(image, format), channels=3).shape == (*DEEP.shape[:2], 3)
    floats = io.BytesIO()
    Image.fromarray(UNIT[:, :, 0]).save(floats, "TIFF")
    np.testing.assert_array_equal(read_image(floats.getvalue(), channels=1)[:, :, 0], UNIT[:, :, 0])
