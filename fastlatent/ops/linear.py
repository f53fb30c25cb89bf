"""linear: a product of few rows on the CPU, where torch reads a float32 weight slowly and has none in int8."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlatent import _native
from fastlatent.ops._library import LIBRARY

LIBRARY.define("linear(Tensor x, Tensor weight, Tensor? scale=None) -> Tensor")


def linear(x: Tensor, weight: Tensor, *, scale: Tensor | None = None) -> Tensor:
    """x · weightᵀ, as torch.nn.functional.linear; sums are float32, rounded once to x's dtype.

    On the CPU up to 16 rows with a float32 or int8 weight run in C++; everything else is torch's
    own product. Forward only.

    Args:
        x: [R, K] of float64, float32, bfloat16 or float16.
        weight: [N, K] of x's dtype, or int8 with a scale.
        scale: float32 [N] where the weight is int8 (float64 where x is): weight = int8 · scale.

    Returns:
        [R, N] in x's dtype.

    Raises:
        ValueError: a shape, dtype or device is not as above, or x requires grad.
        RuntimeError: the compiled library is missing.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    if x.ndim != 2 or weight.ndim != 2 or x.shape[1] != weight.shape[1] or x.device != weight.device:
        raise ValueError(f"linear: expected x [R, K] and weight [N, K] on one device, got {_describe(x, weight)}")
    if scale is None and weight.dtype != x.dtype:
        raise ValueError(f"linear: expected a weight of x's dtype, or int8 with a scale, got {_describe(x, weight)}")
    if scale is not None and (
        weight.dtype != torch.int8 or scale.shape != weight.shape[:1] or scale.dtype != wide or scale.device != x.device
    ):
        raise ValueError(
            f"linear: expected an int8 weight with scale [{len(weight)}] of {wide}, got {_describe(weight, scale)}"
        )
    if x.requires_grad or weight.requires_grad:
        raise ValueError("linear: expected inputs without gradient; this op only runs forward: use F.linear to train")
    if scale is None and not _few_rows(x, int8=False):
        return F.linear(x, weight)
    return torch.ops.fastlatent.linear.default(x, weight, scale)


def linear_reference(x: Tensor, weight: Tensor, scale: Tensor | None = None) -> Tensor:
    """The definition of `linear`, in plain torch."""
    if scale is None:
        return F.linear(x, weight)
    wide = scale.dtype
    return (F.linear(x.to(wide), weight.to(wide)) * scale).to(x.dtype)


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int8 values and a scale per row, max|row|/127: [..., N, K] → int8 [..., N, K] and [..., N].

    The scale is float32, or float64 for float64 weights. A row of zeros has scale 1.
    """
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    scale = wide.abs().amax(-1) / 127
    scale = torch.where(scale == 0, 1.0, scale)
    return (wide / scale[..., None]).round().to(torch.int8), scale


# Rows up to which the C++ kernel wins (benchmarks/bench_linear.py; [4096, 1024], 2 cores with AVX-512, us): float32
# 1260 against torch's 2020 at 4 rows, 1890 and 2200 at 16. In bfloat16 it reads a weight in 370 where torch takes 480,
# but only alone: our threads start for each product and share the cores with torch's, which wait spinning, so between
# torch's own products it takes 660 to 1400. torch's int8 product (318 at 2 rows, ours 387) is private.
FEW_ROWS = 16


def _few_rows(x: Tensor, int8: bool) -> bool:
    if x.device.type != "cpu" or len(x) > FEW_ROWS:
        return False
    return x.dtype != torch.float64 if int8 else x.dtype == torch.float32


def _cpu(x: Tensor, weight: Tensor, scale: Tensor | None = None) -> Tensor:
    if not _few_rows(x, scale is not None):
        return linear_reference(x, weight, scale)
    wide, weight = x.float().contiguous(), weight.contiguous()
    scale = None if scale is None else scale.contiguous()
    out = wide.new_empty(len(x), len(weight))
    _native.call(
        "cpu", "linear", wide.data_ptr(), weight.data_ptr(), None if scale is None else scale.data_ptr(),
        out.data_ptr(), len(x), weight.shape[1], len(weight), torch.get_num_threads(),
    )  # fmt: skip
    return out.to(x.dtype)


def _describe(*tensors: Tensor) -> str:
    return " and ".join(f"{list(t.shape)} {t.dtype} on {t.device}" for t in tensors)


LIBRARY.impl("linear", linear_reference, "CompositeExplicitAutograd")
LIBRARY.impl("linear", _cpu, "CPU")


@torch.library.register_fake("fastlatent::linear", lib=LIBRARY)
def _fake(x: Tensor, weight: Tensor, scale: Tensor | None = None) -> Tensor:
    return x.new_empty((len(x), len(weight)))
