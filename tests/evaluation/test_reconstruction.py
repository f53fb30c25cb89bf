import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from fastlatent.evaluation.reconstruction import psnr, ssim

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.needs_cuda)]


def pair(seed, shape, dtype=np.uint8, noise=30.0):
    """Smooth images with noise on top, [N, H, W, C]; floats are in [-1, 1]."""
    random = np.random.default_rng(seed)
    ramp = np.linspace(0, 255, math.prod(shape)).reshape(shape) * 0.5 + random.uniform(0, 100, shape)
    other = ramp + random.normal(0, noise, shape)
    if dtype == np.uint8:
        return tuple(one.clip(0, 255).round().astype(np.uint8) for one in (ramp, other))
    return tuple((one / 127.5 - 1).clip(-1, 1).astype(dtype) for one in (ramp, other))


def wang(image, reference, data_range):
    """scikit-image with the settings that its documentation names for Wang et al."""
    return structural_similarity(
        image, reference, data_range=data_range, channel_axis=-1, gaussian_weights=True, sigma=1.5,
        use_sample_covariance=False,
    )  # fmt: skip


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "shape",
    [
        (1, 11, 11, 3),  # a single window
        (2, 11, 40, 3),  # one row of windows
        (3, 64, 33, 1),  # grey, odd
        (2, 37, 50, 3),
    ],
)
def test_equals_scikit_image(shape, device):
    a, b = pair(0, shape)
    x, y = torch.from_numpy(a).to(device), torch.from_numpy(b).to(device)
    got, want = (
        psnr(x, y, data_range=255),
        [peak_signal_noise_ratio(i, j, data_range=255) for i, j in zip(a, b, strict=True)],
    )
    assert got.dtype == torch.float64 and got.device.type == device
    np.testing.assert_allclose(got.cpu(), want, rtol=1e-12)
    # 1e-9: skimage adds its window up in another order, and the variances are differences of numbers near 255².
    got, want = ssim(x, y, data_range=255, channel_axis=3), [wang(i, j, 255) for i, j in zip(a, b, strict=True)]
    np.testing.assert_allclose(got.cpu(), want, rtol=0, atol=1e-9)


@given(
    seed=st.integers(0, 999), height=st.integers(11, 40), width=st.integers(11, 40), noise=st.sampled_from([0.1, 5, 80])
)
@settings(max_examples=30, deadline=None)
def test_equals_scikit_image_on_floats(seed, height, width, noise):
    a, b = pair(seed, (1, height, width, 2), np.float64, noise)
    x, y = torch.from_numpy(a), torch.from_numpy(b)
    np.testing.assert_allclose(psnr(x, y, data_range=2), peak_signal_noise_ratio(a, b, data_range=2), rtol=1e-12)
    np.testing.assert_allclose(ssim(x, y, data_range=2, channel_axis=3), [wang(a[0], b[0], 2)], rtol=0, atol=1e-9)


def test_layouts_agree():
    a, b = map(torch.from_numpy, pair(1, (2, 20, 30, 3)))
    want = ssim(a, b, data_range=255, channel_axis=3)
    got = ssim(a.permute(0, 3, 1, 2), b.permute(0, 3, 1, 2).contiguous(), data_range=255, channel_axis=1)
    torch.testing.assert_close(got, want, rtol=1e-13, atol=0)
    assert torch.equal(psnr(a, b, data_range=255), psnr(a.permute(0, 3, 1, 2), b.permute(0, 3, 1, 2), data_range=255))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_sums_are_float64_for_every_dtype(dtype):
    # 255² overflows float16, and 12 images of 3 values lose digits in bfloat16.
    a, b = (torch.from_numpy(one).to(dtype) for one in pair(2, (12, 16, 16, 3)))
    assert torch.equal(psnr(a, b, data_range=255), psnr(a.double(), b.double(), data_range=255))
    got = ssim(a, b, data_range=255, channel_axis=3)
    assert torch.equal(got, ssim(a.double(), b.double(), data_range=255, channel_axis=3))


def test_images_count_alone():
    a, b = map(torch.from_numpy, pair(3, (4, 16, 20, 3)))
    for i in range(4):
        one = slice(i, i + 1)
        torch.testing.assert_close(psnr(a, b, data_range=255)[one], psnr(a[one], b[one], data_range=255))
        torch.testing.assert_close(
            ssim(a, b, data_range=255, channel_axis=3)[one], ssim(a[one], b[one], data_range=255, channel_axis=3)
        )


def test_ends_of_the_scale():
    black, white = torch.zeros(1, 12, 12, 3, dtype=torch.uint8), torch.full((1, 12, 12, 3), 255, dtype=torch.uint8)
    noise = torch.from_numpy(pair(4, (1, 12, 12, 3))[0])
    for one in (black, white, noise):
        assert psnr(one, one, data_range=255).item() == math.inf
        assert abs(ssim(one, one, data_range=255, channel_axis=3).item() - 1) < 1e-12
    # uint8 differences must not wrap round: 0 - 255 is not 1.
    assert psnr(black, white, data_range=255).item() == 0
    assert psnr(white, black, data_range=255).item() == 0
    # Both flat: C1 / (255² + C1) of equation 13 remains.
    c1 = (0.01 * 255) ** 2
    assert ssim(black, white, data_range=255, channel_axis=3).item() == pytest.approx(c1 / (255**2 + c1), rel=1e-9)
    assert ssim(255 - noise, noise, data_range=255, channel_axis=3).item() < 0  # a negative is dissimilar


def test_nan_is_not_hidden():
    a = torch.rand(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    b = a.clone()
    b[1, 2, 11, 11] = math.nan  # the last value: in one window of SSIM only
    for values in (psnr(a, b, data_range=1), ssim(a, b, data_range=1, channel_axis=1)):
        assert values.isnan().tolist() == [False, True]


@pytest.mark.parametrize("size", [(10, 64), (64, 10), (1, 1)])  # one below the window, along each side
def test_smaller_than_the_window(size):
    a = torch.zeros(1, *size, 3, dtype=torch.uint8)
    with pytest.raises(ValueError, match=f"ssim: expected images of at least 11 x 11 pixels, .* got {size[0]} x"):
        ssim(a, a, data_range=255, channel_axis=3)
    assert psnr(a, a, data_range=255).item() == math.inf
    with pytest.raises(ValueError, match="at least 11 x 11"):  # channels taken for a side
        ssim(a.permute(0, 3, 1, 2), a.permute(0, 3, 1, 2), data_range=255, channel_axis=3)


@pytest.mark.parametrize(
    ("a", "b", "data_range", "message"),
    [
        (torch.zeros(1, 3, 16, 16), torch.zeros(1, 3, 16, 15), 1, "one shape"),
        (torch.zeros(1, 3, 16, 16), torch.zeros(1, 3, 16, 16, dtype=torch.uint8), 1, "one dtype"),
        (torch.zeros(1, 3, 16, 16).double(), torch.zeros(1, 3, 16, 16), 1, "one dtype"),
        (*[torch.zeros(1, 3, 16, 16, dtype=torch.int64)] * 2, 255, "uint8 or float"),
        (*[torch.zeros(0, 3, 16, 16)] * 2, 1, "one shape"),
        (*[torch.zeros(1, 3, 16, 16)] * 2, 0, "data_range above 0"),
        (*[torch.zeros(1, 3, 16, 16)] * 2, math.nan, "data_range above 0"),
        (*[torch.zeros(1, 3, 16, 16)] * 2, math.inf, "data_range above 0"),
    ],
)
def test_refused(a, b, data_range, message):
    with pytest.raises(ValueError, match=f"psnr: .*{message}"):
        psnr(a, b, data_range=data_range)
    with pytest.raises(ValueError, match=f"ssim: .*{message}"):
        ssim(a, b, data_range=data_range, channel_axis=1)


@pytest.mark.parametrize(("shape", "axis"), [((3, 16, 16), 1), ((1, 3, 16, 16), 0), ((1, 3, 16, 16), -1)])
def test_ssim_names_its_layouts(shape, axis):
    with pytest.raises(ValueError, match=r"ssim: expected \[N, C, H, W\] and channel_axis 1, or"):
        ssim(torch.zeros(shape), torch.zeros(shape), data_range=1, channel_axis=axis)
