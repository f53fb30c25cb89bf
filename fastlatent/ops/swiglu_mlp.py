"""swiglu_mlp: a feed-forward layer with SiLU, gated (SwiGLU) or not, and its adaptive residual, for many rows."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlatent.ops._library import LIBRARY

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)

LIBRARY.define(
    "swiglu_mlp(Tensor x, Tensor up_weight, Tensor up_bias, Tensor down_weight, Tensor down_bias, "
    "Tensor? residual=None, Tensor? gate=None) -> Tensor"
)


def swiglu_mlp(
    x: Tensor,
    up_weight: Tensor,
    up_bias: Tensor,
    down_weight: Tensor,
    down_bias: Tensor,
    residual: Tensor | None = None,
    gate: Tensor | None = None,
) -> Tensor:
    """down(silu(up₀ x)·(up₁ x)), or down(silu(up x)); then ·gate and +residual where given. Source: Shazeer 2020.

    On CUDA two Triton products whose epilogues hold everything else; float64, which they do not take, and other
    devices run the definition in plain torch.

    Args:
        x: [R, H] of bfloat16, float16, float32 or float64.
        up_weight: [2F, H] in x's dtype, rows [:F] through silu; or [F, H] without gating. Bias: [2F] or [F].
        down_weight: [H, F] in x's dtype. Bias: [H]. Both biases are float32, or float64 where x is ("wide").
        residual: wide [R, H].
        gate: [R, H] in x's dtype, with a residual. Rows may lie any distance apart, as slices of a wider table of
            modulations do; everything else is contiguous.

    Returns:
        [R, H]: wide where a residual is given, else in x's dtype.

    Raises:
        ValueError: a shape, dtype, device or layout is not as above, or an input requires grad.
    """
    if x.ndim != 2 or x.dtype not in DTYPES or down_weight.ndim != 2 or up_weight.ndim != 2:
        raise ValueError(
            "swiglu_mlp: expected x [R, H] of torch.bfloat16, float16, float32 or float64 and weights of two "
            f"dimensions, got x {list(x.shape)} {x.dtype}, up {list(up_weight.shape)}, down {list(down_weight.shape)}"
        )
    (rows, hidden), width, up = x.shape, down_weight.shape[1], len(up_weight)
    if up not in (width, 2 * width) or min(hidden, width) < 1:
        raise ValueError(f"swiglu_mlp: expected up_weight [F or 2F, H] of down_weight [H, F], got {up} and F {width}")
    if gate is not None and residual is None:
        raise ValueError("swiglu_mlp: expected a residual with a gate, got a gate alone")
    wide = torch.promote_types(x.dtype, torch.float32)
    expected = {
        "x": (x, (rows, hidden), x.dtype),
        "up_weight": (up_weight, (up, hidden), x.dtype),
        "up_bias": (up_bias, (up,), wide),
        "down_weight": (down_weight, (hidden, width), x.dtype),
        "down_bias": (down_bias, (hidden,), wide),
        "residual": (residual, (rows, hidden), wide),
        "gate": (gate, (rows, hidden), x.dtype),
    }
    for name, (tensor, shape, dtype) in expected.items():
        if tensor is None:
            continue
        if tensor.shape != shape or tensor.dtype != dtype or tensor.device != x.device:
            raise ValueError(
                f"swiglu_mlp: expected {name} {list(shape)} of {dtype} on {x.device}, got "
                f"{list(tensor.shape)} {tensor.dtype} on {tensor.device}"
            )
        if not (tensor.stride(1) == 1 or hidden == 1 if name == "gate" else tensor.is_contiguous()):
            wanted = "adjacent elements within a row of" if name == "gate" else "a contiguous"
            raise ValueError(f"swiglu_mlp: expected {wanted} {name}, got strides {tensor.stride()}")
        if tensor.requires_grad:
            raise ValueError(
                f"swiglu_mlp: expected inputs without gradient, got {name} that requires grad; this op only runs "
                "forward: compute it under torch.no_grad() or detach it"
            )
    return torch.ops.fastlatent.swiglu_mlp.default(x, up_weight, up_bias, down_weight, down_bias, residual, gate)


def swiglu_mlp_reference(
    x: Tensor,
    up_weight: Tensor,
    up_bias: Tensor,
    down_weight: Tensor,
    down_bias: Tensor,
    residual: Tensor | None = None,
    gate: Tensor | None = None,
) -> Tensor:
    """The definition of `swiglu_mlp`, in plain torch. What enters a product is rounded to x's dtype."""
    wide = up_bias.dtype
    inner = F.linear(x, up_weight).to(wide) + up_bias
    if len(up_weight) != down_weight.shape[1]:
        first, second = inner.chunk(2, dim=-1)
        inner = F.silu(first) * second
    else:
        inner = F.silu(inner)
    out = F.linear(inner.to(x.dtype), down_weight).to(wide) + down_bias
    if gate is not None:
        out = gate.to(wide) * out
    return out.to(x.dtype) if residual is None else residual + out


# The dispatcher leaves out trailing arguments that equal their defaults.
def _cuda(
    x: Tensor,
    up_weight: Tensor,
    up_bias: Tensor,
    down_weight: Tensor,
    down_bias: Tensor,
    residual: Tensor | None = None,
    gate: Tensor | None = None,
) -> Tensor:
    if x.dtype == torch.float64:
        return swiglu_mlp_reference(x, up_weight, up_bias, down_weight, down_bias, residual, gate)
    from fastlatent.kernels.swiglu_mlp import swiglu_mlp_triton

    out = _fake(x, up_weight, up_bias, down_weight, down_bias, residual, gate)
    with torch.cuda.device(x.device):
        swiglu_mlp_triton(x, up_weight, up_bias, down_weight, down_bias, residual, gate, out)
    return out


LIBRARY.impl("swiglu_mlp", swiglu_mlp_reference, "CompositeExplicitAutograd")
LIBRARY.impl("swiglu_mlp", _cuda, "CUDA")


@torch.library.register_fake("fastlatent::swiglu_mlp", lib=LIBRARY)
def _fake(
    x: Tensor,
    up_weight: Tensor,
    up_bias: Tensor,
    down_weight: Tensor,
    down_bias: Tensor,
    residual: Tensor | None = None,
    gate: Tensor | None = None,
) -> Tensor:
    return torch.empty_like(x if residual is None else residual)
