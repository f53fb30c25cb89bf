"""norm_modulate: a norm without weight, scaled and shifted row by row (adaptive norm), rounded for a matrix product."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlatent.ops._library import LIBRARY

# The widest row that one Triton program holds in registers: 16 warps of 32 elements a thread.
MAX_HIDDEN = 16384

LIBRARY.define("norm_modulate(Tensor x, Tensor shift, Tensor scale, bool layer_norm, float eps) -> Tensor")


def norm_modulate(x: Tensor, shift: Tensor, scale: Tensor, *, layer_norm: bool, eps: float) -> Tensor:
    """norm(x)·(1 + scale) + shift over rows: RMS norm, or layer norm without mean's or deviation's own weights.

    Everything is computed in x's dtype and rounded once. A Triton kernel on CUDA; float64, which it does not take, and
    other devices run the definition in plain torch. Source: adaLN, Peebles & Xie 2023 (DiT).

    Args:
        x: [R, H], H <= 16384, float32, or float64 where shift is.
        shift, scale: [R, H] of one dtype: bfloat16, float16, float32 or float64. Rows may lie any distance apart, as
            slices of a wider table of modulations do; elements within a row are adjacent, in x too.
        layer_norm: layer norm, or RMS norm.
        eps: added to the mean square.

    Returns:
        [R, H] in shift's dtype, contiguous.

    Raises:
        ValueError: a shape, dtype, device or layout is not as above, or an input requires grad.
    """
    if x.ndim != 2 or not 1 <= x.shape[1] <= MAX_HIDDEN:
        raise ValueError(f"norm_modulate: expected x [R, 1 <= H <= {MAX_HIDDEN}], got {list(x.shape)}")
    if shift.dtype not in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        raise ValueError(
            f"norm_modulate: expected shift of torch.bfloat16, float16, float32 or float64, got {shift.dtype}"
        )
    wide = torch.promote_types(shift.dtype, torch.float32)
    for name, tensor, dtype in (("x", x, wide), ("shift", shift, shift.dtype), ("scale", scale, shift.dtype)):
        if tensor.shape != x.shape or tensor.dtype != dtype or tensor.device != x.device:
            raise ValueError(
                f"norm_modulate: expected {name} {list(x.shape)} of {dtype} on {x.device}, got "
                f"{list(tensor.shape)} {tensor.dtype} on {tensor.device}"
            )
        if tensor.stride(1) != 1 and x.shape[1] > 1:
            raise ValueError(
                f"norm_modulate: expected {name} with adjacent elements within a row, got strides {tensor.stride()}; "
                "call contiguous() on it"
            )
        if tensor.requires_grad:
            raise ValueError(
                f"norm_modulate: expected inputs without gradient, got {name} that requires grad; this op only runs "
                "forward: compute it under torch.no_grad() or detach it"
            )
    return torch.ops.fastlatent.norm_modulate.default(x, shift, scale, layer_norm, eps)


def norm_modulate_reference(x: Tensor, shift: Tensor, scale: Tensor, *, layer_norm: bool, eps: float) -> Tensor:
    """The definition of `norm_modulate`, in plain torch."""
    if layer_norm:
        x = x - x.mean(-1, keepdim=True)
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return (x * (1 + scale.to(x.dtype)) + shift.to(x.dtype)).to(shift.dtype)


def _run(x: Tensor, shift: Tensor, scale: Tensor, layer_norm: bool, eps: float) -> Tensor:
    return norm_modulate_reference(x, shift, scale, layer_norm=layer_norm, eps=eps)


def _cuda(x: Tensor, shift: Tensor, scale: Tensor, layer_norm: bool, eps: float) -> Tensor:
    if x.dtype == torch.float64:
        return _run(x, shift, scale, layer_norm, eps)
    from fastlatent.kernels.norm_modulate import norm_modulate_triton

    out = _fake(x, shift, scale, layer_norm, eps)
    with torch.cuda.device(x.device):
        norm_modulate_triton(x, shift, scale, out, layer_norm, eps)
    return out


LIBRARY.impl("norm_modulate", _run, "CompositeExplicitAutograd")
LIBRARY.impl("norm_modulate", _cuda, "CUDA")


@torch.library.register_fake("fastlatent::norm_modulate", lib=LIBRARY)
def _fake(x: Tensor, shift: Tensor, scale: Tensor, layer_norm: bool, eps: float) -> Tensor:
    return torch.empty(x.shape, dtype=shift.dtype, device=x.device)
