"""Triton kernel for fastlatent.ops.swiglu_mlp: a matrix product whose epilogue is the rest of its layer."""

from __future__ import annotations

import os
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Rows up to which a line holds: rows of a tile; outputs of a tile of `up` (a gated one has two weights' rows for
# each) and of `down`; depth; warps; stages. Few rows stream the weights: small tiles, to have about 64 programs or
# more at 1024 outputs. Many rows reuse them. All stay within the 99 KiB of shared memory of sm_86, sm_89 and sm_120
# and compile there and on sm_80, sm_90 and sm_100 without spills. Chosen by that, not yet by time.
TILES = (
    (64, 64, 32, 16, 64, 4, 4),
    (128, 64, 64, 32, 64, 4, 4),
    (512, 128, 64, 64, 64, 8, 3),
    (None, 128, 64, 128, 64, 8, 3),
)
# Exact float32 products use no tensor cores.
TILES_FLOAT32 = ((None, 32, 32, 32, 32, 4, 3),)


# Rows are not specialised: one compilation serves every count that takes the same tiles.
@triton.jit(do_not_specialize=["rows"])
def mlp_kernel(
    x_ptr, weight_ptr, bias_ptr, gate_ptr, residual_ptr, out_ptr, rows, gate_stride,
    N: tl.constexpr, K: tl.constexpr, SILU: tl.constexpr, GATED: tl.constexpr, INTERPRETED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out [rows, N] = epilogue(x [rows, K] · weightᵀ + bias).

    The epilogue is silu(first half)·(second half) where GATED (weight [2N, K]), or silu where SILU; then ·gate and
    +residual where those are given.
    """
    # Programs of one column of tiles are neighbours: they share weights, which are larger than the activations.
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    m_long = m.to(tl.int64)  # rows·K passes 2^31 elements at 524288 rows of 4096
    x_ptr += m_long[:, None] * K + k[None, :]
    weight_ptr += n[:, None] * K + k[None, :]
    first = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    second = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for begin in range(0, K, BLOCK_K):
        inside = (begin + k < K)[None, :]
        x = tl.load(x_ptr + begin, mask=(m < rows)[:, None] & inside, other=0.0)
        w = tl.load(weight_ptr + begin, mask=(n < N)[:, None] & inside, other=0.0)
        if INTERPRETED:  # its bfloat16 products are garbage
            x, w = x.to(tl.float32), w.to(tl.float32)
        first = tl.dot(x, tl.trans(w), first, input_precision="ieee")
        if GATED:
            w2 = tl.load(weight_ptr + N * K + begin, mask=(n < N)[:, None] & inside, other=0.0)
            if INTERPRETED:
                w2 = w2.to(tl.float32)
            second = tl.dot(x, tl.trans(w2), second, input_precision="ieee")

    out = first + tl.load(bias_ptr + n, mask=n < N, other=0.0)[None, :]
    if SILU:
        out = out / (1 + tl.exp(-out))
    if GATED:
        out *= second + tl.load(bias_ptr + N + n, mask=n < N, other=0.0)[None, :]
    mask = (m < rows)[:, None] & (n < N)[None, :]
    if gate_ptr is not None:
        out *= tl.load(gate_ptr + m_long[:, None] * gate_stride + n[None, :], mask=mask, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        out += tl.load(residual_ptr + m_long[:, None] * N + n[None, :], mask=mask, other=0.0)
    if INTERPRETED and out_ptr.dtype.element_ty == tl.bfloat16:  # it would truncate: round to nearest even
        bits = out.to(tl.uint32, bitcast=True)
        out = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
    tl.store(out_ptr + m_long[:, None] * N + n[None, :], out.to(out_ptr.dtype.element_ty), mask=mask)


def _tile(rows: int, up: bool, float32: bool) -> tuple[dict[str, int], dict[str, Any]]:
    """Blocks and launch options."""
    table = TILES_FLOAT32 if float32 else TILES
    line = next(line for line in table if line[0] is None or rows <= line[0])
    _, block_m, up_n, down_n, block_k, warps, stages = line
    blocks = {"BLOCK_M": block_m, "BLOCK_N": up_n if up else down_n, "BLOCK_K": block_k}
    return blocks, {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}


def swiglu_mlp_triton(
    x: Tensor, up_weight: Tensor, up_bias: Tensor, down_weight: Tensor, down_bias: Tensor, residual: Tensor | None,
    gate: Tensor | None, out: Tensor,
) -> None:  # fmt: skip
    """Two launches over tensors as checked by `fastlatent.ops.swiglu_mlp.swiglu_mlp`; out is contiguous [R, H]."""
    rows, hidden = x.shape
    if out.numel() == 0:
        return  # a CUDA grid cannot be empty
    width = down_weight.shape[1]
    inner = x.new_empty((rows, width))
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    float32 = x.dtype == torch.float32
    blocks, options = _tile(rows, True, float32)
    mlp_kernel[(triton.cdiv(rows, blocks["BLOCK_M"]), triton.cdiv(width, blocks["BLOCK_N"]))](
        x, up_weight, up_bias, None, None, inner, rows, 0,
        N=width, K=hidden, SILU=True, GATED=len(up_weight) != width, INTERPRETED=interpreted, **blocks, **options,
    )  # fmt: skip
    blocks, options = _tile(rows, False, float32)
    mlp_kernel[(triton.cdiv(rows, blocks["BLOCK_M"]), triton.cdiv(hidden, blocks["BLOCK_N"]))](
        inner, down_weight, down_bias, gate, residual, out, rows, 0 if gate is None else gate.stride(0),
        N=hidden, K=width, SILU=False, GATED=False, INTERPRETED=interpreted, **blocks, **options,
    )  # fmt: skip


def aot_cases() -> list[dict[str, Any]]:
    """Every line of the tables at published sizes, to compile ahead of time without a GPU."""
    cases = []
    for hidden, width, gated, dtype in (
        (1024, 4096, True, "bf16"), (1024, 4096, True, "fp16"), (1024, 4096, True, "fp32"), (1280, 1280, False, "bf16"),
    ):  # fmt: skip
        for rows in (64,) if dtype == "fp32" else (64, 128, 512, 4096):
            for up in (True, False):
                if up and rows == 4096:
                    continue  # the same tiles as for 512
                blocks, options = _tile(rows, up, dtype == "fp32")
                n, k = (width, hidden) if up else (hidden, width)
                constants = {"N": n, "K": k, "SILU": up, "GATED": up and gated, "INTERPRETED": False} | blocks
                constants |= {"gate_ptr": None, "residual_ptr": None} if up else {}
                out = f"*{dtype}" if up else "*fp32"
                types = (f"*{dtype}", f"*{dtype}", "*fp32", f"*{dtype}", "*fp32", out, "i32", "i32")
                signature = dict(zip(mlp_kernel.arg_names, types, strict=False))
                cases.append(
                    {
                        "name": f"mlp {'up' if up else 'down'} {hidden} {width} rows {rows} {dtype}",
                        "kernel": mlp_kernel,
                        "signature": signature | dict.fromkeys(constants, "constexpr"),
                        "constants": constants,
                        "attrs": {(i,): [["tt.divisibility", 16]] for i in (0, 1, 2, 5, 7, *(() if up else (3, 4)))},
                        "options": options,
                        "wgmma": dtype != "fp32",
                    }
                )
    return cases
