"""group_norm_silu: GroupNorm and the SiLU after it, as autoencoders have them before every convolution."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlatent import _native
from fastlatent.ops._library import LIBRARY

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

LIBRARY.define("group_norm_silu(Tensor x, Tensor weight, Tensor bias, int groups, float eps, bool silu) -> Tensor")


def group_norm_silu(x: Tensor, weight: Tensor, bias: Tensor, *, groups: int, eps: float, silu: bool = True) -> Tensor:
    """silu(group_norm(x)·weight + bias), or without the SiLU, in one pass over x after that for its statistics.

    Statistics and everything after them are float32 (float64 sums on the CPU), rounded once to x's dtype. C++ on the
    CPU, Triton on CUDA; other devices run the definition in plain torch. Forward only. Source: Wu & He 2018.

    Args:
        x: [N, C, H, W] of float32, bfloat16 or float16, fewer than 2^31 numbers an image. Contiguous or channels_last;
            any other layout is copied to a contiguous one first.
        weight, bias: [C] in x's dtype.
        groups: divides C.
        eps: added to the variance.
        silu: False for the norm alone.

    Returns:
        [N, C, H, W] in x's dtype and x's layout. A group of a single number becomes its bias. NaN and infinity
        make their group NaN.

    Raises:
        ValueError: a shape, dtype or device is not as above, or an input requires grad while gradients are recorded.
        RuntimeError: the compiled library is missing.
    """
    if x.ndim != 4 or x.dtype not in DTYPES:
        raise ValueError(
            f"group_norm_silu: expected x [N, C, H, W] of float32, bfloat16 or float16, got {_describe(x)}"
        )
    channels = x.shape[1]
    if groups < 1 or channels < 1 or channels % groups:
        raise ValueError(f"group_norm_silu: expected groups that divide {channels} channels, got {groups}")
    if channels * x.shape[2] * x.shape[3] >= 2**31:
        raise ValueError(f"group_norm_silu: expected fewer than 2^31 numbers an image, got {_describe(x)}")
    for name, value in (("weight", weight), ("bias", bias)):
        if value.shape != (channels,) or value.dtype != x.dtype or value.device != x.device:
            raise ValueError(
                f"group_norm_silu: expected {name} [{channels}] {x.dtype} on {x.device}, got {_describe(value)}"
            )
    for name, value in (("x", x), ("weight", weight), ("bias", bias)):
        if value.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"group_norm_silu: expected inputs without gradient, got {name} that requires grad; this op only runs "
                "forward: call it under torch.no_grad() or detach it"
            )
    return torch.ops.fastlatent.group_norm_silu.default(x, weight, bias, groups, eps, silu)


def group_norm_silu_reference(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool) -> Tensor:
    """The definition of `group_norm_silu`, in plain torch."""
    out = torch.empty_like(_dense(x))
    # Not F.group_norm: it refuses groups of a single number, also outside of training.
    wide = torch.group_norm(x.float(), groups, weight.float(), bias.float(), eps)
    return out.copy_(F.silu(wide) if silu else wide)


def _cpu(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool) -> Tensor:
    x = _dense(x)
    out = torch.empty_like(x)
    if out.numel():
        weight, bias = weight.float().contiguous(), bias.float().contiguous()
        _native.call(
            "cpu", "group_norm_silu", x.data_ptr(), weight.data_ptr(), bias.data_ptr(), out.data_ptr(), x.shape[0],
            x.shape[1], x.shape[2] * x.shape[3], groups, eps, silu, not x.is_contiguous(),
            _native.DTYPE_CODES[str(x.dtype).removeprefix("torch.")], torch.get_num_threads(),
        )  # fmt: skip
    return out


def _cuda(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool) -> Tensor:
    from fastlatent.kernels.group_norm_silu import group_norm_silu_triton

    x = _dense(x)
    out = torch.empty_like(x)
    with torch.cuda.device(x.device):
        group_norm_silu_triton(x, weight.contiguous(), bias.contiguous(), out, groups, eps, silu, not x.is_contiguous())
    return out


def _dense(x: Tensor) -> Tensor:
    """x where it is contiguous or channels_last; else a contiguous copy."""
    return x if x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last) else x.contiguous()


def _describe(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} {tensor.dtype} on {tensor.device}"


LIBRARY.impl("group_norm_silu", group_norm_silu_reference, "CompositeExplicitAutograd")
LIBRARY.impl("group_norm_silu", _cpu, "CPU")
LIBRARY.impl("group_norm_silu", _cuda, "CUDA")


@torch.library.register_fake("fastlatent::group_norm_silu", lib=LIBRARY)
def _fake(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool) -> Tensor:
    return torch.empty_like(_dense(x))
