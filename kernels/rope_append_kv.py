"""Triton kernel for fastlatent.ops.rope_append_kv."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Elements per program: 8 per thread of 2 warps, one 16-byte access each in bfloat16.
TILE = 512
WARPS = 2


@triton.jit
def rope_append_kv_kernel(
    qkv_ptr,
    cos_ptr,
    sin_ptr,
    position_ptr,
    q_ptr,
    keys_ptr,
    values_ptr,
    tokens,
    Q_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_P: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    HEADS: tl.constexpr = Q_HEADS + 2 * KV_HEADS
    PAIRS: tl.constexpr = HEAD_DIM // 2
    # int64: the caches pass 2^31 elements at 512 rows of 4096 tokens.
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)[:, None, None]
    pair = tl.arange(0, BLOCK_P)
    offset = head * HEAD_DIM + 2 * pair[None, :, None] + tl.arange(0, 2)[None, None, :]
    mask = (head < HEADS) & (pair[None, :, None] < PAIRS)
    position = tl.load(position_ptr)
    tl.device_assert((position >= 0) & (position < tokens), "position is outside of the caches")

    # Converted at once: the interpreter computes garbage on bfloat16.
    x = tl.load(qkv_ptr + row * (HEADS * HEAD_DIM) + offset, mask=mask, other=0.0).to(COMPUTE)
    cos = tl.load(cos_ptr + position * PAIRS + pair, mask=pair < PAIRS, other=0.0).to(COMPUTE)[None, :]
    sin = tl.load(sin_ptr + position * PAIRS + pair, mask=pair < PAIRS, other=0.0).to(COMPUTE)[None, :]
    even, odd = tl.split(x)
    rotated = tl.join(even * cos - odd * sin, even * sin + odd * cos)

    tl.store(q_ptr + row * (Q_HEADS * HEAD_DIM) + offset, rotated, mask=mask & (head < Q_HEADS))
    key_mask = mask & (head >= Q_HEADS) & (head < Q_HEADS + KV_HEADS)
    value_mask = mask & (head >= Q_HEADS + KV_HEADS)
    if keys_ptr.dtype.element_ty == tl.float8e4nv:
        # By float32 also from float64: there is no direct conversion. tl.clamp would drop a NaN.
        rotated = rotated.to(tl.float32)
        rotated = tl.where(rotated > 448.0, 448.0, rotated)
        rotated = tl.where(rotated < -448.0, -448.0, rotated)
        x = x.to(tl.float32)
        x = tl.where(x > 448.0, 448.0, x)
        x = tl.where(x < -448.0, -448.0, x)
    cache_row = (row * tokens + position) * (KV_HEADS * HEAD_DIM)
    tl.store(keys_ptr + cache_row + (offset - Q_HEADS * HEAD_DIM), rotated, mask=key_mask)
    tl.store(values_ptr + cache_row + (offset - (Q_HEADS + KV_HEADS) * HEAD_DIM), x, mask=value_mask)


def rope_append_kv_triton(
    qkv: Tensor, cos: Tensor, sin: Tensor, position: Tensor, keys: Tensor, values: Tensor
) -> Tensor:
    """Launch over contiguous tensors, as checked by `fastlatent.ops.rope_append_kv.rope_append_kv`."""
    rows, tokens, kv_heads, head_dim = keys.shape
    heads = qkv.shape[1] // head_dim
    q = qkv.new_empty((rows, heads - 2 * kv_heads, head_dim))
    if rows == 0:
        return q  # a CUDA grid cannot be empty
    block_p = triton.next_power_of_2(head_dim // 2)
    block_h = max(1, TILE // (2 * block_p))
    rope_append_kv_kernel[(rows, triton.cdiv(heads, block_h))](
        qkv,
        cos,
        sin,
        position,
        q,
        keys,
        values,
        tokens,
        Q_HEADS=heads - 2 * kv_heads,
        KV_HEADS=kv_heads,
        HEAD_DIM=head_dim,
        BLOCK_H=block_h,
        BLOCK_P=block_p,
        COMPUTE=tl.float64 if qkv.dtype == torch.float64 else tl.float32,
        num_warps=WARPS,
        # Latency bounds this kernel, so fused multiply-adds gain nothing; without them its bits are the reference's.
        enable_fp_fusion=False,
    )
    return q


def aot_cases() -> list[dict]:
    """16 heads of 64 and 128, with as many and with 4 key heads."""
    cases = []
    rows, tokens, q_heads = 2, 256, 16
    for head_dim in (64, 128):
        for dtype, cache_dtype in (("bf16", torch.bfloat16), ("fp8e4nv", torch.float8_e4m3fn)):
            for kv_heads in (16, 4):
                qkv = torch.empty((rows, (q_heads + 2 * kv_heads) * head_dim), dtype=torch.bfloat16, device="meta")
                table = qkv.new_empty((tokens, head_dim // 2), dtype=torch.float32)
                position = qkv.new_empty(1, dtype=torch.int64)
                cache = qkv.new_empty((rows, tokens, kv_heads, head_dim), dtype=cache_dtype)
                arguments = (qkv, table, table, position, cache, cache)
                names = ("qkv_ptr", "cos_ptr", "sin_ptr", "position_ptr", "q_ptr", "keys_ptr", "values_ptr")
                dtypes = ("*bf16", "*fp32", "*fp32", "*i64", "*bf16", "*" + dtype, "*" + dtype)
                constants = {
                    "Q_HEADS": q_heads, "KV_HEADS": kv_heads, "HEAD_DIM": head_dim, "BLOCK_H": TILE // head_dim,
                    "BLOCK_P": head_dim // 2, "COMPUTE": tl.float32,
                }  # fmt: skip
                signature = dict(zip(names, dtypes, strict=True)) | {"tokens": "i32"}
                case = {
                    "name": f"{dtype} D{head_dim} {q_heads}/{kv_heads}",
                    "kernel": rope_append_kv_kernel,
                    "signature": signature | dict.fromkeys(constants, "constexpr"),
                    "constants": constants,
                    "attrs": {(i,): [["tt.divisibility", 16]] for i in range(len(signature))},
                    "options": {"num_warps": WARPS, "enable_fp_fusion": False},
                    "wgmma": False,
                    "launch": lambda arguments=arguments: rope_append_kv_triton(*arguments),
                }
                if cache_dtype == torch.float8_e4m3fn:
                    case["arches"] = (89, 90, 100, 120)  # conversions of float8_e4m3fn
                cases.append(case)
    return cases
