import hashlib
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from fastlatent.media.images import to_model_range, to_uint8
from fastlatent.media.transforms import NAMES, center_crop, open_transform, transform_name, transform_of


def noise(height, width, channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def resized(image, size, method):
    """Columns first, then rows: Pillow 13 turns that round where images over twice as high as wide shrink."""
    return image.resize((size[0], image.height), method).resize(size, method)


def adm_reference(image, size):
    """The published recipe on whole PIL images: the definition that center_crop is held to."""
    while min(*image.size) >= 2 * size:
        image = resized(image, tuple(side // 2 for side in image.size), Image.BOX)
    scale = size / min(*image.size)
    image = resized(image, tuple(round(side * scale) for side in image.size), Image.BICUBIC)
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


# SHA-256 of the cropped bytes, as Pillow 11.0 and 13.0 made them too. Where they change, TRANSFORM_RULE needs a new
# name: latents made before and after differ.
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
    pixels, _ = center_crop(pattern(61, 50).astype(np.float32) / 255, 16)
    expected = [0.5510337, 0.238832, 0.4234862, 0.7884539]
    np.testing.assert_allclose(pixels[::5, 7, 1], expected, rtol=0, atol=1e-6)


def test_refuses_what_is_no_image():
    for image in (
        np.zeros((4, 4), np.uint8),
        np.zeros((4, 4, 5), np.uint8),
        np.zeros((0, 4, 3), np.uint8),
        np.zeros((4, 4, 3), np.float64),
        torch.zeros(4, 4, 3, dtype=torch.int16),
    ):
        for function in (lambda image: center_crop(image, 4), lambda image: open_transform("nwm", 8).apply(image, "a")):
            with pytest.raises(ValueError, match=r"expected uint8 or float32 \[H, W, 1 to 4\], got"):
                function(image)
    for image in (np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3), np.float64)):
        with pytest.raises(ValueError, match=r"expected uint8 or float32 \[H, W, 1 or 3\], got"):
            to_model_range(image)
    with pytest.raises(ValueError, match="at least 1 pixel, got 0"):
        center_crop(noise(4, 4), 0)


# --- the other rules ---

SIZES = [
    (375, 500), (500, 375), (333, 500), (427, 640), (1, 1), (1, 9), (9, 1), (64, 64), (63, 64), (65, 64), (640, 301),
    (20, 25), (480, 640), (512, 640), (480, 480), (640, 480), (31, 40), (3, 4), (2, 3),
]  # fmt: skip


def short_side(image, size):
    """torchvision's Resize(size) on a PIL image."""
    width, height = image.size
    short, long = (width, height) if width <= height else (height, width)
    new_long = int(size * long / short)
    new = (size, new_long) if width <= height else (new_long, size)
    return image if new == image.size else resized(image, new, Image.BILINEAR)


def center(image, height, width):
    """torchvision's CenterCrop on a PIL image, where it needs no padding."""
    assert image.height >= height and image.width >= width
    top, left = round((image.height - height) / 2.0), round((image.width - width) / 2.0)
    return image.crop((left, top, left + width, top + height))


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_center(height, width):
    image, transform = noise(height, width, seed=height), open_transform("center", 64)
    pixels, crop = transform.apply(image, "a")
    np.testing.assert_array_equal(pixels, np.asarray(center(short_side(Image.fromarray(image), 64), 64, 64)))
    # The longer side loses up to a pixel of the resized image, the offset half of one.
    assert_is_centred(crop, height, width, min(height, width), min(height, width), slack=min(height, width) / 64)


def assert_is_centred(crop, height, width, crop_height, crop_width, slack=0.0):
    """Within `slack` and, as everything is rounded, a pixel."""
    top, left, rows, columns = crop.tolist()
    assert 0 <= top < top + rows <= height and 0 <= left < left + columns <= width
    assert abs(rows - crop_height) <= 1 + slack and abs(columns - crop_width) <= 1 + slack
    assert abs(top + rows / 2 - height / 2) <= 1 + slack and abs(left + columns / 2 - width / 2) <= 1 + slack


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_random(height, width):
    image, transform = noise(height, width, seed=height), open_transform("random", 64, seed=5)
    whole = np.asarray(short_side(Image.fromarray(image), 64))
    pixels, crop = transform.apply(image, "a/b.png")
    (top, left, *_) = transform.plan(height, width, "a/b.png").window
    np.testing.assert_array_equal(pixels, whole[top : top + 64, left : left + 64])
    assert abs(crop[0] - top * height / len(whole)) <= 0.5 and abs(crop[1] - left * width / len(whole[0])) <= 0.5
    assert 0 <= crop[0] < crop[0] + crop[2] <= height and 0 <= crop[1] < crop[1] + crop[3] <= width


def test_crops_stay_inside_whatever_the_offset():
    rng = np.random.default_rng(3)
    for i, (height, width) in enumerate(rng.integers(1, 60, (3000, 2)).tolist()):
        for name in NAMES:
            transform = open_transform(name, 8)
            plan = transform.plan(height, width, str(i), transform.shape_of(height, width))
            top, left, rows, columns = plan.crop().tolist()
            assert 0 <= top < top + rows <= height and 0 <= left < left + columns <= width, (name, height, width)


def test_random_offsets_are_even_and_of_seed_and_key_alone():
    transform = open_transform("random", 64, seed=2**64 - 1)
    keys = [f"n01440764/{i}.JPEG" for i in range(4000)]
    lefts = [transform.plan(64, 67, key).window[1] for key in keys]
    assert lefts == [transform.plan(64, 67, key).window[1] for key in reversed(keys)][::-1]
    counts = np.bincount(lefts, minlength=4)
    assert len(counts) == 4 and abs(counts - 1000).max() < 5 * np.sqrt(4000 * 0.25 * 0.75)
    tops = [transform.plan(67, 64, key).window[0] for key in keys]
    agreeing = sum(a == b for a, b in zip(tops, lefts, strict=True))
    assert abs(agreeing - 1000) < 5 * np.sqrt(4000 * 0.25 * 0.75)
    other = [open_transform("random", 64, seed=0).plan(64, 67, key).window[1] for key in keys]
    assert abs(sum(a == b for a, b in zip(other, lefts, strict=True)) - 1000) < 5 * np.sqrt(4000 * 0.25 * 0.75)
    transform.plan(64, 67, "name\udcff.png")  # bytes that are no UTF-8
    # Written down: they must be the same everywhere and for ever.
    windows = [open_transform("random", 256, seed=seed).plan(500, 375, "a.png").window for seed in (0, 1)]
    assert windows == RANDOM_WINDOWS


RANDOM_WINDOWS = [(68, 0, 256, 256), (35, 0, 256, 256)]


RANDOM_BOXES = [(71, 69, 165, 177), (10, 79, 155, 154), (8, 30, 220, 214), (2, 7, 238, 260)]


def test_random_resized_boxes_are_torchvisions():
    """Areas are uniform, ratios uniform in their logarithm, places uniform; in a square most draws fit."""
    transform = open_transform("random-resized", 64, seed=9)
    plans = [transform.plan(2000, 2000, f"{i}.webm") for i in range(3000)]
    boxes = np.array([plan.box for plan in plans], dtype=np.float64)
    top, left, rows, columns = boxes.T
    assert (boxes == np.array([plan.crop() for plan in plans])).all()
    assert (top + rows <= 2000).all() and (left + columns <= 2000).all() and boxes.min() >= 0
    area, ratio = rows * columns / 2000**2, columns / rows
    assert 0.299 < area.min() < 0.31 and 0.74 < ratio.min() < 0.76 and 1.34 < ratio.max() < 1.36
    # Below 1 / 1.35 of the square every ratio fits.
    free = area < 1 / 1.36
    assert abs(area[free].mean() - (0.3 + 1 / 1.36) / 2) < 0.01
    middle = (math.log(0.75) + math.log(1.35)) / 2
    assert abs(np.log(ratio[free]).mean() - middle) < 0.01 and area.max() > 0.95
    down, right = top / (2000 - rows).clip(1), left / (2000 - columns).clip(1)
    for share in (down[free], right[free]):
        assert abs(share.mean() - 0.5) < 0.03 and share.min() < 0.01 and share.max() > 0.99
    drawn = np.stack([area, np.log(ratio), down, right])[:, free]
    assert abs(np.corrcoef(drawn) - np.eye(4)).max() < 5 / math.sqrt(free.sum())
    assert all(plan.steps == ((64, 64, "bilinear"),) and plan.window == (0, 0, 64, 64) for plan in plans)


def test_random_resized_is_of_seed_and_key_alone():
    plans = [open_transform("random-resized", 64, seed=seed).plan(240, 320, key) for seed in (0, 1) for key in "ab"]
    assert len({plan.box for plan in plans}) == 4
    open_transform("random-resized", 64).plan(240, 320, "name\udcff.webm")  # bytes that are no UTF-8
    # Written down: they must be the same everywhere and for ever.
    assert [plan.box for plan in plans] == RANDOM_BOXES


@pytest.mark.parametrize(
    ("height", "width", "box"),
    [
        (100, 1000, (0, 432, 100, 135)),  # wider than 1.35: every draw is too wide, the middle 135 columns
        (1000, 100, (433, 0, 133, 100)),  # narrower than 0.75: 100 / 0.75 rows
        (1, 100_000, (0, 49_999, 1, 1)),
        (100_000, 1, (49_999, 0, 1, 1)),
    ],
)
def test_random_resized_falls_back_to_the_middle(height, width, box):
    # Areas of at least 0.3: at 10:1 the least wide box that fits is 10 · 0.3 = 3:1.
    assert all(open_transform("random-resized", 64).plan(height, width, key).box == box for key in "abc")


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_random_resized(height, width):
    image, transform = noise(height, width, seed=height), open_transform("random-resized", 64, seed=5)
    pixels, crop = transform.apply(image, "a")
    top, left, rows, columns = crop.tolist()
    assert 0 <= top < top + rows <= height and 0 <= left < left + columns <= width
    cut = Image.fromarray(image).crop((left, top, left + columns, top + rows))
    np.testing.assert_array_equal(pixels, np.asarray(resized(cut, (64, 64), Image.BILINEAR)))


def four_thirds(image):
    """The published crop, with rows cut where it would pad columns."""
    width, height = image.size
    if width > height and int(height * (4 / 3)) <= width:
        return center(image, height, int(height * (4 / 3)))
    return center(image, max(1, int(width / (4 / 3))), width)


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_nwm(height, width):
    image = noise(height, width, seed=height)
    pixels, crop = open_transform("nwm", 56).apply(image, "a")
    cut = four_thirds(Image.fromarray(image))
    np.testing.assert_array_equal(pixels, np.asarray(resized(cut, (56, 56), Image.BILINEAR)))
    assert tuple(crop[2:]) == (cut.height, cut.width)
    assert_is_centred(crop, height, width, cut.height, cut.width)


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [
        (480, 640, (0, 0, 480, 640)),  # 4:3 already
        (480, 480, (60, 0, 360, 480)),
        (640, 480, (140, 0, 360, 480)),
        (512, 640, (16, 0, 480, 640)),  # narrower than 4:3: published, 682 columns, 42 of them black
        (360, 640, (0, 80, 360, 480)),
    ],
)
def test_nwm_boxes(height, width, expected):
    assert open_transform("nwm", 224).plan(height, width, "a").box == expected


def test_four_thirds_in_whole_numbers():
    for side in range(1, 20_000):
        assert (side * 4 // 3, side * 3 // 4) == (int(side * (4 / 3)), int(side / (4 / 3)))


@pytest.mark.parametrize(("size", "multiple", "step"), [(1024, 8, 64), (256, 8, 16), (256, 32, 32), (64, 64, 64)])
def test_buckets_are_what_is_written(size, multiple, step):
    shapes = open_transform("buckets", size, multiple=multiple).shapes
    assert (size, size) in shapes and len(set(shapes)) == len(shapes)
    for height, width in shapes:
        assert height % step == width % step == 0 and height * width <= size**2
        assert max(height, width) <= 2 * min(height, width)
        assert (width, height) in shapes
        # Nothing larger of the same ratio range would fit.
        bigger = [(height + step, width), (height, width + step)]
        assert all(h * w > size**2 or max(h, w) > 2 * min(h, w) for h, w in bigger)
    if size == 1024:
        assert len(shapes) == 11 and {(832, 1216), (896, 1152), (768, 1344)} <= set(shapes)  # SDXL's


def test_the_nearest_bucket():
    transform = open_transform("buckets", 1024)
    assert transform.shapes[transform.shape_of(333, 333)] == (1024, 1024)
    assert transform.shapes[transform.shape_of(1216, 832)] == (1216, 832)
    assert transform.shapes[transform.shape_of(1, 10_000)] == min(transform.shapes, key=lambda s: s[0] / s[1])
    assert transform.shapes[transform.shape_of(10_000, 1)] == max(transform.shapes, key=lambda s: s[0] / s[1])
    assert open_transform("adm", 64).shape_of(1, 1000) == 0


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_buckets(height, width):
    image, transform = noise(height, width, seed=height), open_transform("buckets", 64)
    for bucket in {transform.shape_of(height, width), 0}:
        rows, columns = transform.shapes[bucket]
        pixels, crop = transform.apply(image, "a", bucket)
        scale = max(rows / height, columns / width)
        whole = resized(Image.fromarray(image), (round(width * scale), round(height * scale)), Image.BICUBIC)
        top, left = (whole.height - rows) // 2, (whole.width - columns) // 2
        np.testing.assert_array_equal(pixels, np.asarray(whole)[top : top + rows, left : left + columns])
        assert min(abs(crop[2] - height), abs(crop[3] - width)) <= 1
        assert crop[0] + crop[2] <= height and crop[1] + crop[3] <= width


@pytest.mark.parametrize("name", NAMES)
def test_every_kind_of_image(name):
    """Grey and 4 channels, floats, arrays that cannot be written or run backwards, tensors: the same pixels."""
    transform = open_transform(name, 32, seed=3)
    image = noise(50, 70, 4)
    bucket = transform.shape_of(50, 70)
    pixels, crop = transform.apply(image, "a", bucket)
    assert pixels.shape == (*transform.shapes[bucket], 4) and crop.dtype == np.int32
    read_only = image.copy()
    read_only.flags.writeable = False
    backwards = np.ascontiguousarray(image[::-1, ::-1])[::-1, ::-1]
    for same in (read_only, backwards, np.asfortranarray(image)):
        np.testing.assert_array_equal(transform.apply(same, "a", bucket)[0], pixels)
    np.testing.assert_array_equal(transform.apply(image[:, :, 1:2], "a", bucket)[0], pixels[:, :, 1:2])
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    for device in devices:
        got, tensor_crop = transform.apply(torch.from_numpy(image).to(device), "a", bucket)
        assert isinstance(got, torch.Tensor) and got.device.type == device
        np.testing.assert_array_equal(got.cpu().numpy(), pixels)
        np.testing.assert_array_equal(tensor_crop, crop)
    floats, _ = transform.apply(image.astype(np.float32) / 255, "a", bucket)
    # uint8 rounds and clamps after each of up to four passes, floats only at the end.
    assert floats.dtype == np.float32 and floats.min() >= 0 and floats.max() <= 1
    assert abs(floats * 255 - pixels).mean() <= 1
    image_before = noise(50, 70, 4)
    np.testing.assert_array_equal(image, image_before)  # nothing is written into what came


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("height", "width"), [(1, 100_000), (100_000, 1), (1, 4000), (300, 60_000)])
def test_one_side_thousands_of_times_the_other(name, height, width):
    """The whole resized image would have up to 6.5 thousand million pixels; those of the crop are few."""
    transform = open_transform(name, 256)
    bucket = transform.shape_of(height, width)
    pixels, crop = transform.apply(np.full((height, width, 3), 77, np.uint8), "a", bucket)
    assert pixels.shape[:2] == transform.shapes[bucket] and (pixels == 77).all()
    assert 0 <= crop[0] < crop[0] + crop[2] <= height and 0 <= crop[1] < crop[1] + crop[3] <= width


def test_the_largest_image_that_is_read():
    for height, width in ((1, 178_956_970), (178_956_970, 1)):
        plan = open_transform("adm", 256).plan(height, width, "a")
        assert max(plan.steps[-1][:2]) == 178_956_970 * 256 and (plan.crop() >= 0).all()


def test_settings():
    assert open_transform("adm", 256).settings() == {"rule": "adm-center-crop-1", "size": 256}
    assert open_transform("random", 64, seed=7).settings()["seed"] == 7
    assert open_transform("random-resized", 64, seed=7).settings() == {
        "rule": "random-resized-crop-area-0.3-1-aspect-0.75-1.35-bilinear-1", "size": 64, "seed": 7
    }  # fmt: skip
    assert open_transform("buckets", 64).settings()["shapes"] == [list(s) for s in open_transform("buckets", 64).shapes]
    assert len({open_transform(name, 64).settings()["rule"] for name in NAMES}) == len(NAMES)


def test_the_name_of_settings():
    assert [transform_name(open_transform(name, 64).settings()) for name in NAMES] == list(NAMES)
    with pytest.raises(ValueError, match="expected a rule among adm-center-crop-1, .*got 'other'"):
        transform_name({"rule": "other", "size": 64})


@pytest.mark.parametrize("name", NAMES)
def test_settings_and_back(name):
    transform = open_transform(name, 64, seed=7, multiple=16)
    written = json.loads(json.dumps(transform.settings()))
    back = transform_of(written)
    assert back.settings() == written and back.shapes == transform.shapes
    bucket = transform.shape_of(50, 90)
    assert back.plan(50, 90, "a", bucket) == transform.plan(50, 90, "a", bucket)
    with pytest.raises(ValueError, match="transform: expected settings like .*, got .*'flip': True"):
        transform_of({**written, "flip": True})
    with pytest.raises(ValueError, match="transform: expected settings of"):
        transform_of({"rule": written["rule"]})


def test_refuses_names_sizes_and_seeds():
    with pytest.raises(
        ValueError, match="expected one of adm, center, random, random-resized, nwm, buckets, got 'square'"
    ):
        open_transform("square", 64)
    with pytest.raises(ValueError, match="a multiple of 8 pixels, .*got 250; the nearest is 248"):
        open_transform("center", 250)
    with pytest.raises(ValueError, match="a multiple of 32 pixels, .*got 0; the nearest is 32"):
        open_transform("adm", 0, multiple=32)
    for seed in (-1, 2**64):
        with pytest.raises(ValueError, match=r"seed of 0 to 2\^64 - 1"):
            open_transform("random", 64, seed=seed)


# --- the range that models see ---


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
