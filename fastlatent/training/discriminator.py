"""The adversarial part of an autoencoder's loss: a discriminator of patches, the hinge loss, the adaptive weight.

Isola et al. 2017 (PatchGAN); Esser, Rombach and Ommer 2021, "Taming Transformers for High-Resolution Image Synthesis",
equation 7 (the adaptive weight). With several processes, statistics are those of all their samples.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

SMALLEST_SIDE = 24  # pixels: of 23 nothing is left for the last convolution
_WIDTHS = (64, 128, 256, 512)


class BatchNorm(nn.Module):
    """BatchNorm2d with the statistics of its input, over the samples of all processes; it keeps none.

    torch's SyncBatchNorm works on CUDA only.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.normal(1.0, 0.02, (channels,)))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] → the same, in the weights' dtype."""
        if processes() == 1:
            return functional.batch_norm(x, None, None, self.weight, self.bias, training=True)
        # Every process has as many samples. Two passes: a mean far from 0 would cost the variance its digits.
        centred = x - _mean(x.mean((0, 2, 3), keepdim=True))
        variance = _mean(centred.square().mean((0, 2, 3), keepdim=True))
        normalised = centred * torch.rsqrt(variance + 1e-5)
        return normalised * self.weight[:, None, None] + self.bias[:, None, None]


class PatchDiscriminator(nn.Sequential):
    """Images [B, channels, H, W] → one number per patch of 70², [B, 1, H/8 − 2, W/8 − 2]: above 0 for real ones.

    Three convolutions of stride 2 and two of stride 1, each 4×4; 2.8 M weights for RGB.
    """

    def __init__(self, channels: int) -> None:
        first, last = _WIDTHS[0], _WIDTHS[-1]
        layers: list[nn.Module] = [nn.Conv2d(channels, first, 4, 2, 1), nn.LeakyReLU(0.2)]
        for inputs, outputs in pairwise(_WIDTHS):
            stride = 1 if outputs == last else 2
            layers += [nn.Conv2d(inputs, outputs, 4, stride, 1, bias=False), BatchNorm(outputs), nn.LeakyReLU(0.2)]
        super().__init__(*layers, nn.Conv2d(last, 1, 4, 1, 1))
        for layer in self:
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, 0.0, 0.02)

    def frozen(self, images: Tensor) -> Tensor:
        """The same numbers, with gradients for the images and none for the weights."""
        weights = {name: parameter.detach() for name, parameter in self.named_parameters()}
        return torch.func.functional_call(self, weights, (images,))


def hinge(real: Tensor, made: Tensor) -> Tensor:
    """½·(mean max(0, 1 − real) + mean max(0, 1 + made)): what the discriminator minimises (Lim and Ye 2017)."""
    return 0.5 * (functional.relu(1 - real).mean() + functional.relu(1 + made).mean())


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor, images: Tensor, last: Tensor) -> Tensor:
    """‖∂reconstruction/∂last‖ / (‖∂adversarial/∂last‖ + 1e-4), at most 1e4: both pull equally at the last layer.

    Args:
        reconstruction, adversarial: losses of this process's samples; their means over the processes count.
        images: what the decoder made, in float32 or more; both losses are functions of it.
        last: weight of the decoder's last layer.

    Returns:
        A constant, without gradient.
    """
    norms = []
    for loss in (reconstruction, adversarial):
        (outer,) = torch.autograd.grad(loss, images, retain_graph=True)
        # The last layer may run in float16, where gradients of single pixels vanish (1/(B·3·H·W) is 6e-7 for 8 images
        # of 256²) and sums over them overflow. A norm of 32 to 64 does neither, and a power of two costs no digit.
        scale = torch.exp2(5 - torch.linalg.vector_norm(outer).clamp(min=1e-30).log2().floor())
        (gradient,) = torch.autograd.grad(images, last, outer * scale, retain_graph=True)
        gradient = gradient / scale
        if processes() > 1:
            dist.all_reduce(gradient)
            gradient = gradient / processes()
        norms.append(torch.linalg.vector_norm(gradient))
    return (norms[0] / (norms[1] + 1e-4)).clamp(0, 1e4).detach()


def processes() -> int:
    """How many train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


class _Sum(torch.autograd.Function):
    """The sum over the processes; its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _Sum.forward(ctx, gradient)


def _mean(x: Tensor) -> Tensor:
    return _Sum.apply(x) / processes()
