"""Triton kernel for fastlatent.ops.norm_modulate."""

from __future__ import annotations

import os
from typing import Any

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def norm_modulate_kernel(
    x_ptr,
    shift_ptr,
    scale_ptr,
    out_ptr,
    x_stride,
    shift_stride,
    scale_stride,
    eps,
    H: tl.constexpr,
    LAYER_NORM: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # int64: a table of modulations passes 2^31 elements at 32768 rows of 14·4608.
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK)
    mask = k < H
    x = tl.load(x_ptr + row * x_stride + k, mask=mask, other=0.0)
    if LAYER_NORM:
        x = tl.where(mask, x - tl.sum(x, axis=0) / H, 0.0)
    rstd = 1 / tl.sqrt(tl.sum(x * x, axis=0) / H + eps)
    # Converted at once: the interpreter computes garbage on bfloat16.
    shift = tl.load(shift_ptr + row * shift_stride + k, mask=mask).to(x.dtype)
    scale = tl.load(scale_ptr + row * scale_stride + k, mask=mask).to(x.dtype)
    out = x * rstd * (1 + scale) + shift
    if INTERPRETED and out_ptr.dtype.element_ty == tl.bfloat16:  # it would truncate: round to nearest even
        bits = out.to(tl.uint32, bitcast=True)
        out = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
    tl.store(out_ptr + row * H + k, out.to(out_ptr.dtype.element_ty), mask=mask)


def _warps(block: int) -> int:
    # 16 elements a thread, up to the 16 warps of one program.
    return max(1, min(16, block // 512))


def norm_modulate_triton(x: Tensor, shift: Tensor, scale: Tensor, out: Tensor, layer_norm: bool, eps: float) -> None:
    """Launch over rows as checked by `fastlatent.ops.norm_modulate.norm_modulate`; out is contiguous [R, H]."""
    rows, hidden = out.shape
    if out.numel() == 0:
        return  # a CUDA grid cannot be empty
    block = triton.next_power_of_2(hidden)
    norm_modulate_kernel[(rows,)](
        x, shift, scale, out, x.stride(0), shift.stride(0), scale.stride(0), eps,
        H=hidden, LAYER_NORM=layer_norm, INTERPRETED=os.environ.get("TRITON_INTERPRET") == "1", BLOCK=block,
        num_warps=_warps(block), enable_fp_fusion=True,
    )  # fmt: skip


def aot_cases() -> list[dict[str, Any]]:
    """The kernel at published sizes, to compile ahead of time without a GPU."""
    cases = []
    for hidden, layer_norm, dtype in (
        (768, False, "bf16"), (1024, False, "bf16"), (1024, False, "fp32"), (1280, True, "bf16"), (1536, False, "bf16"),
        (16384, True, "fp16"),
    ):  # fmt: skip
        block = triton.next_power_of_2(hidden)
        constants = {"H": hidden, "LAYER_NORM": layer_norm, "INTERPRETED": False, "BLOCK": block}
        signature = {"x_ptr": "*fp32"} | dict.fromkeys(("shift_ptr", "scale_ptr", "out_ptr"), f"*{dtype}")
        signature |= dict.fromkeys(("x_stride", "shift_stride", "scale_stride"), "i32") | {"eps": "fp32"}
        cases.append(
            {
                "name": f"norm_modulate H {hidden} {'layer' if layer_norm else 'rms'} {dtype}",
                "kernel": norm_modulate_kernel,
                "signature": signature | dict.fromkeys(constants, "constexpr"),
                "constants": constants,
                "attrs": {(i,): [["tt.divisibility", 16]] for i in range(7)},
                "options": {"num_warps": _warps(block), "enable_fp_fusion": True},
                "wgmma": False,
            }
        )
    return cases
