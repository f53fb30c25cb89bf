"""How near a decoded image is to the one that was encoded: PSNR and SSIM, in float64."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

WINDOW = 11  # taps of the Gaussian window: the smallest side that SSIM is defined for
SIGMA = 1.5
K1, K2 = 0.01, 0.03


def psnr(images: Tensor, references: Tensor, *, data_range: float) -> Tensor:
    """Peak signal-to-noise ratio 10·log10(data_range² / MSE) in dB; the MSE is over all values of an image.

    Args:
        images, references: [N, ...] of one shape and dtype, uint8 or float, on one device.
        data_range: largest possible value minus smallest: 255 for uint8, 2 for floats in [−1, 1].

    Returns:
        float64 [N]; infinity where an image equals its reference, NaN where either holds NaN.

    Raises:
        ValueError: an argument is not as above.
    """
    _check("psnr", images, references, data_range)
    difference = images.double() - references.double()
    return 10 * torch.log10(data_range**2 / difference.square().flatten(1).mean(1))


def ssim(images: Tensor, references: Tensor, *, data_range: float, channel_axis: int) -> Tensor:
    """Structural similarity (Wang, Bovik, Sheikh and Simoncelli, 2004, equation 13), a mean over the channels.

    Gaussian window of 11 × 11 taps, σ = 1.5; K1 = 0.01, K2 = 0.03; population variances; only windows that lie inside
    the image; at full resolution, without the paper's optional halving of large images.

    Args:
        images, references: [N, C, H, W] or [N, H, W, C] of one shape and dtype, uint8 or float, on one device; H and W
            at least 11.
        data_range: largest possible value minus smallest: 255 for uint8, 2 for floats in [−1, 1].
        channel_axis: where C is: 1 or 3.

    Returns:
        float64 [N], at most 1; 1 where an image equals its reference, NaN where either holds NaN.

    Raises:
        ValueError: an argument is not as above.
    """
    _check("ssim", images, references, data_range)
    if images.ndim != 4 or channel_axis not in (1, 3):
        raise ValueError(
            f"ssim: expected [N, C, H, W] and channel_axis 1, or [N, H, W, C] and 3, got {list(images.shape)} and "
            f"{channel_axis}"
        )
    x, y = (one.double().movedim(channel_axis, 1) for one in (images, references))
    if min(x.shape[2:]) < WINDOW:
        raise ValueError(
            f"ssim: expected images of at least {WINDOW} x {WINDOW} pixels, the window's size, got "
            f"{x.shape[2]} x {x.shape[3]}"
        )
    x, y = x.flatten(0, 1), y.flatten(0, 1)
    mean_x, mean_y, xx, yy, xy = _blur(torch.stack([x, y, x * x, y * y, x * y]))
    variances, covariance = xx - mean_x**2 + yy - mean_y**2, xy - mean_x * mean_y
    c1, c2 = (K1 * data_range) ** 2, (K2 * data_range) ** 2
    similarity = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    similarity = similarity / ((mean_x**2 + mean_y**2 + c1) * (variances + c2))
    return similarity.reshape(len(images), -1).mean(1)


def _blur(maps: Tensor) -> Tensor:
    """[K, M, H, W] → [K, M, H − 10, W − 10]: weighted means over the window, along columns, then along rows."""
    offsets = torch.arange(WINDOW, dtype=torch.float64, device=maps.device) - WINDOW // 2
    weights = torch.exp(-0.5 * (offsets / SIGMA) ** 2)
    weights = weights / weights.sum()
    planes = F.conv2d(maps.flatten(0, 1)[:, None], weights.reshape(1, 1, WINDOW, 1))
    planes = F.conv2d(planes, weights.reshape(1, 1, 1, WINDOW))
    return planes.reshape(*maps.shape[:2], *planes.shape[2:])


def _check(caller: str, images: Tensor, references: Tensor, data_range: float) -> None:
    kinds = images.dtype == references.dtype and (images.dtype == torch.uint8 or images.is_floating_point())
    if not kinds or images.shape != references.shape or images.ndim < 2 or 0 in images.shape:
        raise ValueError(
            f"{caller}: expected images and references of one shape [N, ...] and one dtype, uint8 or float, got "
            f"{images.dtype} {list(images.shape)} and {references.dtype} {list(references.shape)}"
        )
    if not (data_range > 0 and math.isfinite(data_range)):
        raise ValueError(f"{caller}: expected a data_range above 0 (255 for uint8), got {data_range}")
