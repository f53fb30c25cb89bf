import hashlib

import numpy as np
import pytest
from PIL import Image

from fastlatent.media.images import ImageError, center_crop, to_model_range, to_uint8


def noise(height, width, channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def adm_reference(image, size):
    """The published recipe on whole PIL images: the definition that center_crop is held to."""
    while min(*image.size) >= 2 * size:
        image = image.resize(tuple(side // 2 for side in image.size), resample=Image.BOX)
    scale = size / min(*image.size)
    image = image.resize(tuple(round(side * scale) for side in image.size), resample=Image.BICUBIC)
    array = np.array(image)
    y, x = (array.shape[0] - size) // 2, (array.shape[1] - size) // 2
    return array[y : y + size, x : x + size]


def random_sizes():
    rng = np.random.default_rng(7)
    # size 32 for speed: sides from 1 (enlarged 32 times) over no halving to three halvings.
    return [(int(h), int(w), 32) for h, w in rng.integers(1, 300, (40, 2))]


EXAMPLES = [
    (375, 500, 256),  # ImageNet's commonest size: no halving
    (768, 1024, 256),  # one halving
    (1000, 257, 64),  # odd, two halvings
    (1023, 4000, 256),  # the longer side 1002 after one halving of an odd side
    (511, 600, 256),  # 511 < 2 · 256: no halving
    (512, 512, 256),  # exactly 2 · 256: one halving, then no resize at all
    (256, 256, 256),  # nothing to do
    (100, 37, 64),  # enlarged
    (1, 1, 16),
    (1, 9, 16),
    (9, 1, 16),
]


@pytest.mark.parametrize(("height", "width", "size"), EXAMPLES + random_sizes())
def test_center_crop_is_adm(height, width, size):
    image = noise(height, width, seed=height)
    pixels, crop = center_crop(image, size)
    np.testing.assert_array_equal(pixels, adm_reference(Image.fromarray(image), size))
    grey, grey_crop = center_crop(image[:, :, :1], size)
    np.testing.assert_array_equal(grey[:, :, 0], adm_reference(Image.fromarray(image[:, :, 0]), size))
    np.testing.assert_array_equal(crop, grey_crop)
    assert pixels.shape == (size, size, 3) and grey.shape == (size, size, 1)
    for array in (pixels, grey):
        assert array.dtype == np.uint8 and array.flags.writeable and array.flags.c_contiguous


@pytest.mark.parametrize(("height", "width", "size"), [(37, 50, 16), (9, 5, 16), (16, 16, 16)])
def test_center_crop_of_floats(height, width, size):
    image = noise(height, width).astype(np.float32) / np.float32(255)
    pixels, crop = center_crop(image, size)
    assert pixels.dtype == np.float32 and pixels.flags.writeable and pixels.flags.c_contiguous
    for c in range(3):
        expected = adm_reference(Image.fromarray(image[:, :, c]), size).clip(0, 1)
        np.testing.assert_array_equal(pixels[:, :, c], expected)
    # The same filters as for uint8, which rounds after each pass (at most four here). Half the contrast keeps
    # bicubic's overshoot inside the range, where uint8 clamps after each pass and floats only at the end.
    mild = noise(height, width) // 2 + 64
    floats, _ = center_crop(mild.astype(np.float32) / np.float32(255), size)
    eight_bit, eight_bit_crop = center_crop(mild, size)
    assert abs(floats * 255 - eight_bit).max() <= 2.5
    np.testing.assert_array_equal(crop, eight_bit_crop)


def test_center_crop_clamps_floats_as_uint8():
    # Bicubic overshoots at an edge from 0 to 1.
    edge = np.zeros((8, 8, 1), dtype=np.float32)
    edge[:, 4:] = 1
    assert adm_reference(Image.fromarray(edge[:, :, 0]), 32).max() > 1.01
    pixels, _ = center_crop(edge, 32)
    assert pixels.min() == 0 and pixels.max() == 1


@pytest.mark.parametrize(
    ("height", "width", "size", "expected"),
    [
        (375, 500, 256, (0, 62, 375, 375)),  # 341 × 256; left (341 - 256) // 2 = 42 times 500 / 341 = 61.6
        (1023, 4000, 256, (0, 1489, 1023, 1022)),  # 1002 × 256; 373 · 3.992 = 1489.02; 256 · 3.992 = 1021.96
        (600, 511, 256, (44, 0, 510, 511)),  # 256 × 301; 45 // 2 = 22 rows above times 600 / 301 = 43.9
        (256, 256, 256, (0, 0, 256, 256)),
        (1, 1, 256, (0, 0, 1, 1)),
        (1, 9, 16, (0, 4, 1, 1)),
    ],
)
def test_crop_is_in_original_pixels(height, width, size, expected):
    _, crop = center_crop(noise(height, width), size)
    assert crop.dtype == np.int32
    assert tuple(crop) == expected
    assert crop[0] + crop[2] <= height and crop[1] + crop[3] <= width


def test_crops_stay_inside():
    for height, width, size in random_sizes():
        _, (top, left, crop_height, crop_width) = center_crop(noise(height, width), size)
        assert 0 <= top < top + crop_height <= height and 0 <= left < left + crop_width <= width


def test_the_shorter_side_is_always_exact():
    # round(m · (S / m)) = S for every m that the halving loop can leave, at every common size.
    for size in (16, 32, 64, 128, 224, 256, 384, 512, 1024):
        for side in range(1, 2 * size):
            assert round(side * (size / side)) == size


# SHA-256 of the cropped bytes. They change when Pillow changes its resampling: then TRANSFORM_RULE needs a
# new name, because latents made before and after differ. Same digests with Pillow 11.0 and 13.0.
GOLDEN = {
    (375, 500, 256): "0071b313bbca4289",  # bicubic down
    (1023, 777, 64): "f1a4048369aa2dd9",  # three box halvings of odd sides, bicubic down
    (9, 5, 32): "aadd04ba077f5e59",  # bicubic up
}


def pattern(height, width):
    y, x, c = np.mgrid[:height, :width, :3]
    return ((y * 7 + x * 13 + c * 50 + y * x // 5) % 256).astype(np.uint8)


@pytest.mark.parametrize(("height", "width", "size"), GOLDEN)
def test_golden_digests(height, width, size):
    pixels, _ = center_crop(pattern(height, width), size)
    assert hashlib.sha256(pixels.tobytes()).hexdigest()[:16] == GOLDEN[height, width, size]


def test_golden_floats():
    # Values, not a digest: Pillow sums floats in double, which fused multiply-add changes in the last bits.
    pixels, _ = center_crop(pattern(61, 50).astype(np.float32) / 255, 16)
    expected = [0.5510337, 0.238832, 0.4234862, 0.7884539]
    np.testing.assert_allclose(pixels[::5, 7, 1], expected, rtol=0, atol=1e-6)


def test_center_crop_refuses_what_it_cannot_do():
    for image in (
        np.zeros((4, 4), np.uint8),
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((0, 4, 3), np.uint8),
        np.zeros((4, 4, 3), np.float64),
        np.zeros((4, 4, 3), np.uint16),
    ):
        for function in (lambda image: center_crop(image, 4), to_model_range):
            with pytest.raises(ValueError, match=r"expected uint8 or float32 \[H, W, 1 or 3\], got"):
                function(image)
    with pytest.raises(ValueError, match="at least 1 pixel, got 0"):
        center_crop(noise(4, 4), 0)
    # 1 × 4000 at 256 would be 256 × 1 024 000 pixels, 786 MB, for a crop of 256².
    with pytest.raises(ImageError, match="would become 1024000 x 256"):
        center_crop(noise(1, 4000), 256)


def test_model_range():
    ends = to_model_range(np.uint8([[[0], [255]]]))
    assert ends.dtype == np.float32 and ends.shape == (1, 1, 2) and ends.ravel().tolist() == [-1, 1]
    image = noise(5, 4)
    np.testing.assert_array_equal(
        to_model_range(image), (image.astype(np.float32) / np.float32(127.5) - 1).transpose(2, 0, 1)
    )
    floats = np.float32([[[0, 0.25, 1]]])
    assert to_model_range(floats).ravel().tolist() == [-1, -0.5, 1]
    assert to_model_range(image).flags.c_contiguous


def test_to_uint8_inverts_model_range():
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16, 1)
    np.testing.assert_array_equal(to_uint8(to_model_range(levels)[None])[0], levels)
    image = noise(5, 4)
    batch = to_uint8(to_model_range(image)[None])
    assert batch.flags.c_contiguous
    np.testing.assert_array_equal(batch[0], image)


def test_to_uint8_clamps_and_rounds_half_to_even():
    def one(value, dtype=np.float32):
        return int(to_uint8(np.full((1, 1, 1, 1), value, dtype=dtype))[0, 0, 0, 0])

    assert [one(v) for v in (-np.inf, -7.0, -1.0, 1.0, 1.5, np.inf)] == [0, 0, 0, 255, 255, 255]
    assert one(0.0) == 128  # 127.5 rounds to the even neighbour
    # The inputs whose float32 product is exactly k + 0.5; half up would differ for even k.
    k = np.arange(255)
    x = ((2 * k + 1) / 255 - 1).astype(np.float32)
    ties = k[(x + 1) * np.float32(127.5) == k + 0.5]
    assert (ties % 2 == 0).any() and (ties % 2 == 1).any()
    for tie in ties:
        assert one(x[tie]) == tie + tie % 2
    assert one(1, np.float16) == 255 and one(-1, np.float64) == 0


def test_to_uint8_refuses_nan_and_integers():
    pixels = np.zeros((1, 1, 2, 2), dtype=np.float32)
    pixels[0, 0, 1, 1] = np.nan
    with pytest.raises(ValueError, match="1 of 4 pixels are NaN"):
        to_uint8(pixels)
    with pytest.raises(ValueError, match=r"expected floats \[N, C, H, W\], got uint8"):
        to_uint8(np.zeros((1, 1, 2, 2), dtype=np.uint8))
    with pytest.raises(ValueError, match=r"expected floats \[N, C, H, W\], got float32 \[1, 2, 2\]"):
        to_uint8(pixels[0])
    assert to_uint8(np.zeros((0, 3, 2, 2), dtype=np.float32)).shape == (0, 2, 2, 3)  # no samples is no error
