"""resize against Pillow, byte for byte, and the three implementations against each other, bit for bit."""

import re
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from fastlatent import _native
from fastlatent.ops.resize import FILTERS, resize, resize_by_triton, resize_reference

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.needs_cuda)]
SIDES = st.integers(1, 300)


def noise(height, width, channels=3, dtype=torch.uint8, seed=0):
    """Half of it black and white: overshoots of bicubic and lanczos on both sides."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.randint(0, 256, (height, width, channels), generator=generator, dtype=torch.uint8)
    image[:, width // 2 :] = (image[:, width // 2 :] > 127) * 255
    return image if dtype == torch.uint8 else image.float() / 255


def pillow(image, height, width, filter):
    """Channel by channel, columns first, as every Pillow before 12.2 orders the passes; see `resize`."""
    method = Image.Resampling[filter.upper()]
    planes = [Image.fromarray(np.ascontiguousarray(image[:, :, c])) for c in range(image.shape[2])]
    resized = [np.asarray(p.resize((width, p.height), method).resize((width, height), method)) for p in planes]
    return torch.from_numpy(np.stack(resized, axis=2))


def reference(image, height, width, filter, *, top=0, left=0, crop_height=None, crop_width=None):
    crop_height, crop_width = crop_height or height - top, crop_width or width - left
    return resize_reference(image, height, width, FILTERS.index(filter), top, left, crop_height, crop_width)


def triton(image, height, width, filter, *, top=0, left=0, crop_height=None, crop_width=None):
    """On the GPU where there is one; interpreted elsewhere."""
    pytest.importorskip("triton")
    crop_height, crop_width = crop_height or height - top, crop_width or width - left
    image = image.cuda() if torch.cuda.is_available() else image
    window = (top, left, crop_height, crop_width)
    return resize_by_triton(image, height, width, FILTERS.index(filter), *window).cpu()


def assert_same(got, want):
    assert got.shape == want.shape and got.dtype == want.dtype and got.is_contiguous()
    assert torch.equal(got, want)


# --- against Pillow ---


@settings(max_examples=300, deadline=None)
@given(SIDES, SIDES, SIDES, SIDES, st.sampled_from(FILTERS), st.integers(1, 4))
@example(1, 1, 300, 300, "lanczos", 1)
@example(1, 300, 300, 1, "bicubic", 3)  # one side grows 300 times, the other shrinks
@example(300, 300, 1, 1, "lanczos", 4)
@example(300, 299, 150, 149, "box", 3)  # halved, exactly and not
def test_bytes_are_pillows(height, width, out_height, out_width, filter, channels):
    image = noise(height, width, channels, seed=height)
    assert_same(resize(image, out_height, out_width, filter), pillow(image.numpy(), out_height, out_width, filter))


@settings(max_examples=100, deadline=None)
@given(SIDES, SIDES, SIDES, SIDES, st.sampled_from(FILTERS))
def test_floats_are_pillows(height, width, out_height, out_width, filter):
    image = noise(height, width, 1, torch.float32, seed=height)
    got, want = resize(image, out_height, out_width, filter), pillow(image.numpy(), out_height, out_width, filter)
    # Pillow is built with fused multiply-add on some processors, which changes last bits; here it is exact.
    assert got.shape == want.shape and float((got - want).abs().max()) <= 2.0**-23


PHOTOGRAPHS = [
    (375, 500, 256, 341, "bicubic"),  # ImageNet's commonest size
    (500, 333, 384, 256, "bicubic"),
    (1281, 854, 640, 427, "box"),  # an odd side halved: 2 and 3 pixels at a time
    (480, 640, 224, 224, "bilinear"),
    (5, 3000, 3, 4, "lanczos"),  # wider than a chunk of the horizontal pass; one output pixel reads more than a chunk
    (40, 5000, 20, 2500, "box"),  # three chunks
]


@pytest.mark.parametrize("size", PHOTOGRAPHS, ids=str)
def test_whole_colour_images_as_pillow_resizes_them(size):
    """RGB in one call. Every Pillow orders these as this op does: none is higher than twice its width."""
    height, width, out_height, out_width, filter = size
    image = noise(height, width)
    resized = Image.fromarray(image.numpy()).resize((out_width, out_height), Image.Resampling[filter.upper()])
    assert_same(resize(image, out_height, out_width, filter), torch.from_numpy(np.array(resized)))


def test_nothing_to_do_is_a_copy():
    for dtype in (torch.uint8, torch.float32):
        image = noise(9, 7, dtype=dtype)
        for function in (resize, reference, triton):
            got = function(image, 9, 7, "lanczos")
            assert_same(got, image)
            assert got.data_ptr() != image.data_ptr()
            assert_same(function(image, 9, 7, "box", top=2, left=3, crop_height=4, crop_width=2), image[2:6, 3:5])


# --- implementations and windows ---

# Either pass, both, none; sizes around the 32 rows and numbers that the C++ loops take at once and Triton's tile of
# 4 x 128; growing and shrinking.
SHAPES = [
    (1, 1, 1, 1), (1, 1, 5, 7), (33, 31, 33, 11), (31, 33, 8, 33), (32, 43, 64, 86), (65, 20, 13, 41), (7, 200, 6, 50),
    (150, 3, 9, 130),
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("filter", FILTERS)
@pytest.mark.parametrize("device", DEVICES)
def test_is_the_definition(device, filter, dtype, native_calls):
    for i, (height, width, out_height, out_width) in enumerate(SHAPES):
        image = noise(height, width, i % 4 + 1, dtype, seed=i)
        want = reference(image, out_height, out_width, filter)
        assert_same(resize(image.to(device), out_height, out_width, filter).cpu(), want)
    assert {call[:2] for call in native_calls} >= ({("cpu", "resize")} if device == "cpu" else set())


# Interpreting takes 1 ms for each pixel of the filter's reach and tile of 4 x 128, so: few tiles. The filters differ in
# their weights only, which C++ computes.
TRITON_CASES = [
    *((filter, (13, 10, 5, 21)) for filter in FILTERS),
    *(("bicubic", size) for size in ((1, 1, 1, 1), (1, 1, 5, 7), (5, 31, 5, 11), (21, 5, 8, 5), (6, 80, 7, 70))),
]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_triton_kernel(dtype):
    """The Triton kernel itself, on any machine."""
    pytest.importorskip("triton")
    from fastlatent.kernels.resize import resize_pass_kernel

    if not torch.cuda.is_available():
        assert type(resize_pass_kernel).__name__ == "InterpretedFunction"
    for i, (filter, (height, width, out_height, out_width)) in enumerate(TRITON_CASES):
        image = noise(height, width, i % 4 + 1, dtype, seed=i)
        assert_same(triton(image, out_height, out_width, filter), reference(image, out_height, out_width, filter))


@settings(max_examples=100, deadline=None)
@given(st.data(), st.sampled_from([torch.uint8, torch.float32]), st.sampled_from(FILTERS))
def test_a_window_is_cut_from_the_whole(data, dtype, filter):
    height, width, out_height, out_width = (data.draw(st.integers(1, 90)) for _ in range(4))
    top, left = data.draw(st.integers(0, out_height - 1)), data.draw(st.integers(0, out_width - 1))
    crop_height = data.draw(st.integers(1, out_height - top))
    crop_width = data.draw(st.integers(1, out_width - left))
    image = noise(height, width, 3, dtype, seed=height)
    want = resize(image, out_height, out_width, filter)[top : top + crop_height, left : left + crop_width]
    window = {"top": top, "left": left, "crop_height": crop_height, "crop_width": crop_width}
    for function in (resize, reference):
        assert_same(function(image, out_height, out_width, filter, **window), want.contiguous())


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_triton_windows(dtype):
    """Each pass alone with a window, and both: the offsets of rows and columns differ in each."""
    image = noise(40, 50, 3, dtype)
    for size in ((40, 21), (90, 50), (17, 91)):
        window = {"top": 5, "left": 7, "crop_height": 11, "crop_width": 13}
        assert_same(triton(image, *size, "bicubic", **window), resize(image, *size, "bicubic", **window))


def test_what_lies_outside_the_window_is_never_made():
    """Sizes of the whole image whose pixels, or whose weights, no memory could hold."""
    for image, size in ((noise(1, 100_000), (2**40, 2**40)), (noise(100_000, 1), (2**50, 3))):
        for function in (resize, triton):
            got = function(image, *size, "bilinear", top=7, left=1, crop_height=2, crop_width=2)
            assert torch.equal(got, image[:1, :1].expand(2, 2, 3))  # the first pixel, enlarged


def test_infinity_and_nan_go_where_pillow_takes_them():
    image = noise(20, 20, 1, torch.float32)
    image[3, 4], image[15, 16], image[9, 9] = torch.inf, -torch.inf, torch.nan
    want = pillow(image.numpy(), 9, 13, "bicubic")
    assert bool(want.isnan().any()) and not bool(want.isnan().all())
    for function in (resize, reference, triton):
        torch.testing.assert_close(function(image, 9, 13, "bicubic"), want, rtol=0, atol=0, equal_nan=True)


def test_threads_beside_each_other():
    images = [noise(70 + i, 90 - i, seed=i) for i in range(16)]
    want = [resize(image, 32, 41, "bicubic") for image in images]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            for got, one in zip(pool.map(lambda image: resize(image, 32, 41, "bicubic"), images), want, strict=True):
                assert torch.equal(got, one)


@pytest.mark.parametrize("device", DEVICES)
def test_strided_images(device):
    whole = noise(40, 60, 4).to(device)
    for image in (whole[3:30, 5:50], whole[:, :, :3], whole.permute(1, 0, 2), whole[::2, 1::3]):
        assert not image.is_contiguous()
        assert torch.equal(resize(image, 21, 33, "bicubic"), resize(image.contiguous(), 21, 33, "bicubic"))


# --- registration ---


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_registration(dtype, device):
    """The schema, the fake and tracing: contiguous, a window; a strided image, all of it."""
    image = noise(9, 7, dtype=dtype).to(device)
    operator = torch.ops.fastlatent.resize.default
    torch.library.opcheck(operator, (image, 5, 11, 2, 1, 2, 3, 4))
    torch.library.opcheck(operator, (image.transpose(0, 1), 5, 11, 0, 0, 0, 5, 11))


def test_other_devices_use_the_reference():
    assert resize(noise(9, 7).to("meta"), 5, 11, "box", top=1).shape == (4, 11, 3)
    keys = ("CompositeExplicitAutograd", "CPU", "CUDA")
    assert all(torch._C._dispatch_has_kernel_for_dispatch_key("fastlatent::resize", key) for key in keys)


@pytest.mark.needs_cuda
def test_cuda_runs_triton(monkeypatch):
    from fastlatent.kernels import resize as kernels

    launched = []
    for name in ("resize_rows_triton", "resize_columns_triton"):
        original = getattr(kernels, name)
        monkeypatch.setattr(kernels, name, lambda *a, f=original, n=name, **k: launched.append(n) or f(*a, **k))
    image = noise(375, 500)
    got = resize(image.cuda(), 256, 341, "bicubic")
    assert launched == ["resize_rows_triton", "resize_columns_triton"]
    assert torch.equal(got.cpu(), resize(image, 256, 341, "bicubic"))


def test_missing_library_is_an_error(monkeypatch):
    monkeypatch.setattr(_native, "load", lambda backend: None)
    with pytest.raises(RuntimeError, match=r"libfastlatent_cpu\.so"):
        resize(noise(9, 7), 5, 11, "box")


WRONG = {
    "rank": ({"image": torch.zeros(4, 4)}, r"an image \[H, W, 1 to 4\] of uint8 or float32, got \[4, 4\]"),
    "channels": ({"image": torch.zeros(4, 4, 5)}, r"1 to 4\].* got \[4, 4, 5\]"),
    "no channel": ({"image": torch.zeros(4, 4, 0)}, r"1 to 4\].* got \[4, 4, 0\]"),
    "dtype": ({"image": torch.zeros(4, 4, 3, dtype=torch.float64)}, r"uint8 or float32, got .*float64"),
    "empty": ({"image": torch.zeros(0, 4, 3)}, r"sides of 1 to 2\^31 - 1 pixels, got \[0, 4, 3\]"),
    "too long": ({"image": torch.zeros(1, 1, 1).expand(2**31, 1, 1)}, r"sides of 1 to 2\^31 - 1"),
    "gradient": ({"image": torch.zeros(4, 4, 3, requires_grad=True)}, r"without gradient, got one"),
    "filter": ({"filter": "hamming"}, r"a filter of box, bilinear, bicubic, lanczos, got 'hamming'"),
    "no height": ({"height": 0}, r"height and width of 1 to 2\^52 pixels, got 0 x 6"),
    "width": ({"width": 2**52 + 1}, r"height and width of 1 to 2\^52"),
    "above": ({"top": -1}, r"window .* inside 5 x 6, got 6 x 6 at \(-1, 0\)"),
    "below": ({"top": 3, "crop_height": 3}, r"got 3 x 6 at \(3, 0\)"),
    "right": ({"left": 2, "crop_width": 5}, r"got 5 x 5 at \(0, 2\)"),
    "nothing": ({"crop_width": 0}, r"at least one pixel .* got 5 x 0"),
}


@pytest.mark.parametrize("case", WRONG)
def test_rejects(case):
    wrong, message = WRONG[case]
    with pytest.raises(ValueError, match=f"^resize: expected .*{message}"):
        resize(**{"image": torch.zeros(4, 4, 3), "height": 5, "width": 6, "filter": "box"} | wrong)


def test_compiles_for_hopper(hopper):
    """Ahead of time and without a GPU, the case with arithmetic in double; tools/kernel_table watches the rest."""
    (row,) = hopper("resize", "fp32, along rows, 3 channels")
    assert row["spilled"] == 0 and row["registers"] <= 64, row
    text = row.pop("ptx")
    assert "mul.rn.f64" in text or "mul.f64" in text
    assert not re.findall(r"\bfma\.[\w.]*f64", text)  # a fused product would not be Pillow's
