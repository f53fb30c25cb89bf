import io
import sys
import zipfile

import imagecodecs
import numpy as np
import pytest
import tifffile
from PIL import Image

from fastlatent.media.image_error import MissingPackage
from fastlatent.media.images import read_image, to_model_range
from fastlatent.media.writers import SUFFIXES, image_bytes, png16, to_uint16, to_unit, write_npz


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 65536, shape, dtype=np.uint16)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 7), (7, 1), (20, 33)])  # no row above; one pixel a row
def test_png_of_sixteen_bits_reads_again(channels, height, width):
    image = noise(height, width, channels)
    data = png16(image)
    pixels = read_image(data, channels=channels)
    assert pixels.dtype == np.float32
    np.testing.assert_array_equal(np.rint(pixels.astype(np.float64) * 65535).astype(np.uint16), image)
    decoded = imagecodecs.png_decode(data)  # libpng, which checks the sums of every chunk
    np.testing.assert_array_equal(decoded.reshape(image.shape), image)


def test_every_value_of_sixteen_bits_comes_back():
    image = np.arange(65536, dtype=np.uint16).reshape(256, 256, 1)
    model = to_model_range(read_image(png16(image), channels=1))
    # float32 near 1 has steps of 6e-8, and a value of 16 bits is 3e-5 wide: nothing is lost.
    np.testing.assert_array_equal(to_uint16(model[None])[0], image)


def test_what_lies_outside_is_clamped():
    pixels = np.array([-3, -1, 0, 1, 1.01], dtype=np.float32).reshape(1, 1, 1, 5)
    assert to_uint16(pixels).ravel().tolist() == [0, 0, 32768, 65535, 65535]  # 32767.5 rounds to even


@pytest.mark.parametrize("pixels", [np.zeros((1, 1, 2)), np.zeros((1, 1, 2, 2), int), np.full((1, 1, 2, 2), np.nan)])
def test_bad_pixels(pixels):
    with pytest.raises(ValueError, match="to_uint16"):
        to_uint16(pixels)


@pytest.mark.parametrize("image", [noise(4, 4), noise(4, 4, 2), noise(0, 4, 3), noise(4, 4, 3).astype(np.uint8)])
def test_bad_images(image):
    with pytest.raises(ValueError, match="png16: expected uint16"):
        png16(image)


@pytest.mark.parametrize("labels", [None, np.array([3, 1, 4])])
def test_npz(labels):
    images = noise(3, 5, 4, 3).astype(np.uint8)
    file, again = io.BytesIO(), io.BytesIO()
    write_npz(file, iter(images), 3, labels)
    write_npz(again, iter(images), 3, labels)
    assert file.getvalue() == again.getvalue()
    with np.load(io.BytesIO(file.getvalue())) as read:
        assert read.files == (["arr_0"] if labels is None else ["arr_0", "arr_1"])
        np.testing.assert_array_equal(read["arr_0"], images)
        assert read["arr_0"].dtype == np.uint8
        if labels is not None:
            np.testing.assert_array_equal(read["arr_1"], labels)
            assert read["arr_1"].dtype == np.int64
    assert zipfile.ZipFile(io.BytesIO(file.getvalue())).testzip() is None


def test_npz_of_images_that_differ():
    with pytest.raises(ValueError, match=r"write_npz: expected uint8 \(2, 2, 1\), got uint8 \(2, 3, 1\)"):
        write_npz(io.BytesIO(), iter([np.zeros((2, 2, 1), np.uint8), np.zeros((2, 3, 1), np.uint8)]), 2, None)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("format", ["png", "webp", "jpeg"])
def test_images_of_eight_bits_read_again(format, channels):
    y, x = np.mgrid[:37, :20]  # no multiples of a JPEG's blocks; smooth, as JPEG expects
    image = np.stack([120 + 3 * y, 20 + 9 * x, 250 - 4 * y], -1).astype(np.uint8)[..., :channels]
    data = image_bytes(image, format)
    assert data == image_bytes(image.copy(), format)
    read = read_image(data, channels=channels)
    assert Image.open(io.BytesIO(data)).format == format.upper()
    assert np.abs(read.astype(int) - image).max() <= (4 if format == "jpeg" else 0)


def test_float_tiff_keeps_every_bit():
    for channels in (1, 3):
        values = np.random.default_rng(0).standard_normal((5, 7, channels)).astype(np.float32)  # also beyond [0, 1]
        data = image_bytes(values, "tiff")
        assert data == image_bytes(values, "tiff")
        np.testing.assert_array_equal(tifffile.imread(io.BytesIO(data)).reshape(values.shape), values)
        inside = np.clip(values, 0, 1)
        np.testing.assert_array_equal(read_image(image_bytes(inside, "tiff"), channels=channels), inside)
    pixels = np.array([-1.5, -1, 0, 1], dtype=np.float32).reshape(1, 1, 2, 2)
    assert to_unit(pixels).ravel().tolist() == [-0.25, 0, 0.5, 1]


def test_what_a_format_cannot_hold(monkeypatch):
    assert image_bytes(noise(4, 4, 3), "png") == png16(noise(4, 4, 3))
    for format in SUFFIXES:
        with pytest.raises(ValueError, match=f"{format}: expected"):
            image_bytes(np.zeros((4, 4, 3), np.float64), format)
    with pytest.raises(ValueError, match="webp: expected sides of at most 16383 pixels, got 16384 × 1"):
        image_bytes(np.zeros((1, 16384, 3), np.uint8), "webp")
    monkeypatch.setitem(sys.modules, "tifffile", None)
    with pytest.raises(MissingPackage, match="TIFF needs tifffile"):
        image_bytes(np.zeros((4, 4, 3), np.float32), "tiff")
