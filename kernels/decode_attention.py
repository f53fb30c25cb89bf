"""Triton kernels for fastlatent.ops.decode_attention: flash-decoding (Dao et al. 2023) with a fixed order of sums."""

from __future__ import annotations

import math
import os

import torch
import triton
import triton.language as tl
from torch import Tensor

# Programs that fill an H100 or H200: one per SM.
PROGRAMS = 132
# One tile of heads of 64: a split of fewer tokens takes as long.
MIN_SPLIT_TOKENS = 32
# Elements of a tile of keys: 16 per thread of 4 warps, two 16-byte loads in bfloat16. Programs then need 48 to 82
# registers on sm_90, and at 4096 ptxas spills on sm_100 and sm_120.
TILE = 2048
# The smallest side of tl.dot.
MIN_DOT = 16
# Splits that the reduction reads at once.
BLOCK_S = 16
OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}
# Below every score, and finite: exp2(-inf - -inf) would be NaN. A split without tokens has this maximum and weight 0.
NO_SCORE = tl.constexpr(-1e30)


@triton.jit
def _store(
    out_ptr, partial_ptr, statistics_ptr, head, g, mask, d, acc, top, total, split, SPLITS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """Store acc [G, D] of heads head + g with their maximum and sum [G]: divided, or as partial results of a split."""
    tile_mask = mask[:, None] & (d < HEAD_DIM)[None, :]
    if SPLITS == 1:
        out_ptr += head * HEAD_DIM
        tl.store(out_ptr + g[:, None] * HEAD_DIM + d[None, :], acc / total[:, None], mask=tile_mask)
    else:
        slot = head * SPLITS + split
        partial_ptr += slot * HEAD_DIM
        statistics_ptr += 2 * slot
        tl.store(partial_ptr + g[:, None] * (SPLITS * HEAD_DIM) + d[None, :], acc, mask=tile_mask)
        tl.store(statistics_ptr + 2 * SPLITS * g, top, mask=mask)
        tl.store(statistics_ptr + 2 * SPLITS * g + 1, total, mask=mask)


@triton.jit
def _widen(x, dtype: tl.constexpr):
    """float8 by float32, which it converts to directly."""
    if x.dtype == tl.float8e4nv:
        x = x.to(tl.float32)
    return x.to(dtype)


@triton.jit
def _tokens_of(position_ptr, tokens, split, SPLITS: tl.constexpr):
    """Tokens [begin, end) of this split: an equal share of position + 1, whatever the caches hold beyond it."""
    position = tl.load(position_ptr)
    tl.device_assert((position >= 0) & (position < tokens), "position is outside of the caches")
    length = (position + 1).to(tl.int32)
    share = tl.cdiv(length, SPLITS)
    begin = split * share
    return begin, tl.minimum(begin + share, length)


@triton.jit
def decode_one_head_kernel(
    q_ptr,
    keys_ptr,
    values_ptr,
    position_ptr,
    out_ptr,
    partial_ptr,
    statistics_ptr,
    tokens,
    Q_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    SCALE_LOG2: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """One query head per program, in COMPUTE throughout. Every one of the BLOCK_N places of a tile runs its own online
    softmax and they meet at the end, so that the loop needs no reduction across warps."""
    head = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    begin, end = _tokens_of(position_ptr, tokens, split, SPLITS)
    d = tl.arange(0, BLOCK_D)
    n = tl.arange(0, BLOCK_N)
    # Scaled once, with log2(e) for exp2.
    q = tl.load(q_ptr + head * HEAD_DIM + d, mask=d < HEAD_DIM, other=0.0).to(COMPUTE) * SCALE_LOG2
    # int64: the caches pass 2^31 elements at 512 rows of 4096 tokens. Within a row int32 does, of fewer registers.
    first = (head // Q_HEADS) * tokens * (KV_HEADS * HEAD_DIM) + (head % Q_HEADS) // (Q_HEADS // KV_HEADS) * HEAD_DIM
    keys_ptr += first
    values_ptr += first
    top = tl.full([BLOCK_N], NO_SCORE, COMPUTE)
    total = tl.zeros([BLOCK_N], COMPUTE)
    acc = tl.zeros([BLOCK_N, BLOCK_D], COMPUTE)
    for start in range(begin, end, BLOCK_N):
        inside = start + n < end
        offset = (start + n)[:, None] * (KV_HEADS * HEAD_DIM) + d[None, :]
        mask = inside[:, None] & (d < HEAD_DIM)[None, :]
        # Both loads before the arithmetic: their latencies overlap.
        k = tl.load(keys_ptr + offset, mask=mask, other=0.0)
        v = tl.load(values_ptr + offset, mask=mask, other=0.0)
        score = tl.where(inside, tl.sum(q[None, :] * _widen(k, COMPUTE), axis=1), -float("inf"))
        new_top = tl.maximum(top, score)
        shrink = tl.exp2(top - new_top)
        weight = tl.exp2(score - new_top)
        total = total * shrink + weight
        acc = acc * shrink[:, None] + weight[:, None] * _widen(v, COMPUTE)
        top = new_top
    highest = tl.max(top, axis=0)
    shrink = tl.exp2(top - highest)
    one = tl.arange(0, 1)
    _store(
        out_ptr, partial_ptr, statistics_ptr, head, one, one == 0, d, tl.sum(acc * shrink[:, None], axis=0)[None, :],
        highest + tl.zeros([1], COMPUTE), tl.sum(total * shrink, axis=0) + tl.zeros([1], COMPUTE), split, SPLITS,
        HEAD_DIM,
    )  # fmt: skip


@triton.jit
def decode_group_kernel(
    q_ptr,
    keys_ptr,
    values_ptr,
    position_ptr,
    out_ptr,
    partial_ptr,
    statistics_ptr,
    tokens,
    Q_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    SCALE_LOG2: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """All query heads of one key and value head per program, on the tensor cores with float32 sums."""
    GROUP: tl.constexpr = Q_HEADS // KV_HEADS
    pair = tl.program_id(0).to(tl.int64)
    row, kv_head = pair // KV_HEADS, pair % KV_HEADS
    split = tl.program_id(1)
    begin, end = _tokens_of(position_ptr, tokens, split, SPLITS)
    d = tl.arange(0, BLOCK_D)
    n = tl.arange(0, BLOCK_N)
    g = tl.arange(0, BLOCK_G)
    q_ptr += pair * (GROUP * HEAD_DIM)
    q_mask = (g < GROUP)[:, None] & (d < HEAD_DIM)[None, :]
    q = tl.load(q_ptr + g[:, None] * HEAD_DIM + d[None, :], mask=q_mask, other=0.0)
    operand = tl.float32 if UPCAST else q.dtype
    q = q.to(operand)
    first = row * tokens * (KV_HEADS * HEAD_DIM) + kv_head * HEAD_DIM
    keys_ptr += first
    values_ptr += first
    top = tl.full([BLOCK_G], NO_SCORE, tl.float32)
    total = tl.zeros([BLOCK_G], tl.float32)
    acc = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
    for start in range(begin, end, BLOCK_N):
        inside = start + n < end
        offset = (start + n)[:, None] * (KV_HEADS * HEAD_DIM) + d[None, :]
        mask = inside[:, None] & (d < HEAD_DIM)[None, :]
        k = tl.load(keys_ptr + offset, mask=mask, other=0.0).to(operand)
        v = tl.load(values_ptr + offset, mask=mask, other=0.0).to(operand)
        score = tl.where(inside[None, :], tl.dot(q, tl.trans(k)) * SCALE_LOG2, -float("inf"))
        new_top = tl.maximum(top, tl.max(score, axis=1))
        shrink = tl.exp2(top - new_top)
        weight = tl.exp2(score - new_top[:, None])
        total = total * shrink + tl.sum(weight, axis=1)
        acc = acc * shrink[:, None] + tl.dot(weight.to(operand), v)
        top = new_top
    _store(
        out_ptr, partial_ptr, statistics_ptr, pair * GROUP, g, g < GROUP, d, acc, top, total, split, SPLITS, HEAD_DIM
    )


@triton.jit
def reduce_splits_kernel(
    partial_ptr,
    statistics_ptr,
    out_ptr,
    HEAD_DIM: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Sum the splits of one query head per program, always in the same order."""
    head = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    s = tl.arange(0, BLOCK_S)
    top = tl.full([BLOCK_S], NO_SCORE, COMPUTE)
    for start in range(0, SPLITS, BLOCK_S):
        slot = head * SPLITS + start + s
        top = tl.maximum(top, tl.load(statistics_ptr + 2 * slot, mask=start + s < SPLITS, other=NO_SCORE))
    highest = tl.max(top, axis=0)
    total = tl.zeros([BLOCK_S], COMPUTE)
    acc = tl.zeros([BLOCK_S, BLOCK_D], COMPUTE)
    for start in range(0, SPLITS, BLOCK_S):
        slot = head * SPLITS + start + s
        inside = start + s < SPLITS
        shrink = tl.exp2(tl.load(statistics_ptr + 2 * slot, mask=inside, other=NO_SCORE) - highest)
        total += shrink * tl.load(statistics_ptr + 2 * slot + 1, mask=inside, other=0.0)
        mask = inside[:, None] & (d < HEAD_DIM)[None, :]
        partial = tl.load(partial_ptr + slot[:, None] * HEAD_DIM + d[None, :], mask=mask, other=0.0)
        acc += shrink[:, None] * partial
    tl.store(out_ptr + head * HEAD_DIM + d, tl.sum(acc, axis=0) / tl.sum(total, axis=0), mask=d < HEAD_DIM)


def split_count(programs: int, max_length: int) -> int:
    """Splits of up to max_length tokens, where there are `programs` programs without: enough to fill the GPU, as far as
    each keeps MIN_SPLIT_TOKENS."""
    return min(triton.cdiv(PROGRAMS, programs), triton.cdiv(max_length, MIN_SPLIT_TOKENS))


def decode_attention_triton(
    q: Tensor, keys: Tensor, values: Tensor, position: Tensor, scale: float, max_length: int
) -> Tensor:
    """Launch over contiguous tensors, as checked by `fastlatent.ops.decode_attention.decode_attention`."""
    rows, q_heads, head_dim = q.shape
    tokens, kv_heads = keys.shape[1:3]
    out = torch.empty_like(q)
    if rows == 0:
        return out  # a CUDA grid cannot be empty
    assert tokens * kv_heads * head_dim < 2**31, "offsets within a row are int32"
    group = q_heads // kv_heads
    interpreting = os.environ.get("TRITON_INTERPRET") == "1"
    # A tensor core's 16 rows are wasted on a single head, and its operands have 16 bits. There, and for wider types, a
    # program takes one query head; those of a group then read the same keys from L2.
    grouped = group > 1 and q.element_size() == 2 and keys.element_size() <= 2
    heads = kv_heads if grouped else q_heads
    splits = split_count(rows * heads, max_length)
    block_d = max(MIN_DOT, triton.next_power_of_2(head_dim))
    compute = torch.float64 if q.dtype == torch.float64 else torch.float32
    partial = statistics = None
    if splits > 1:
        partial = q.new_empty((rows, q_heads, splits, head_dim), dtype=compute)
        statistics = q.new_empty((rows, q_heads, splits, 2), dtype=compute)
    arguments = (q, keys, values, position, out, partial, statistics, tokens)
    sizes = {
        "Q_HEADS": q_heads, "KV_HEADS": kv_heads, "HEAD_DIM": head_dim, "SCALE_LOG2": scale / math.log(2),
        "SPLITS": splits, "BLOCK_N": max(MIN_DOT, TILE // block_d), "BLOCK_D": block_d,
    }  # fmt: skip
    compute_tl = tl.float64 if compute == torch.float64 else tl.float32
    grid = (rows * heads, splits)
    if grouped:
        block_g = max(MIN_DOT, triton.next_power_of_2(group))
        decode_group_kernel[grid](*arguments, **sizes, BLOCK_G=block_g, UPCAST=interpreting, **OPTIONS)
    else:
        decode_one_head_kernel[grid](*arguments, **sizes, COMPUTE=compute_tl, **OPTIONS)
    if splits > 1:
        reduce_splits_kernel[(rows * q_heads,)](
            partial,
            statistics,
            out,
            HEAD_DIM=head_dim,
            SPLITS=splits,
            BLOCK_S=BLOCK_S,
            BLOCK_D=block_d,
            COMPUTE=compute_tl,
            **OPTIONS,
        )
    return out


def aot_cases() -> list[dict]:
    """16 heads of 64 and 128 up to 256 tokens: 2 rows, whose tokens are split, and 512, whose are not."""
    cases = []
    pointers = ("q_ptr", "keys_ptr", "values_ptr", "position_ptr", "out_ptr", "partial_ptr", "statistics_ptr")
    tokens, q_heads = 256, 16

    def add(name: str, kernel: object, dtypes: dict[str, str], constants: dict, cache: Tensor) -> None:
        q = cache.new_empty((len(cache), q_heads, cache.shape[3]), dtype=torch.bfloat16)
        position = cache.new_empty(1, dtype=torch.int64)
        case = {
            "name": name,
            "kernel": kernel,
            "signature": dtypes | dict.fromkeys(constants, "constexpr"),
            "constants": constants,
            "attrs": {(i,): [["tt.divisibility", 16]] for i, key in enumerate(dtypes) if key not in constants},
            "options": dict(OPTIONS),
            "wgmma": False,  # 16 rows of queries: mma.sync
            "launch": lambda: decode_attention_triton(q, cache, cache, position, cache.shape[3] ** -0.5, tokens),
        }
        if cache.dtype == torch.float8_e4m3fn:
            case["arches"] = (89, 90, 100, 120)  # conversions of float8_e4m3fn
        cases.append(case)

    for head_dim in (64, 128):
        for dtype, cache_dtype in (("bf16", torch.bfloat16), ("fp8e4nv", torch.float8_e4m3fn)):
            for rows, kv_heads in ((512, 16), (512, 4), (2, 16), (2, 4)):
                cache = torch.empty((rows, tokens, kv_heads, head_dim), dtype=cache_dtype, device="meta")
                splits = split_count(rows * kv_heads, tokens)
                dtypes = dict.fromkeys(pointers, "*bf16") | {"position_ptr": "*i64", "tokens": "i32"}
                dtypes |= dict.fromkeys(("keys_ptr", "values_ptr"), "*" + dtype)
                dtypes |= dict.fromkeys(("partial_ptr", "statistics_ptr"), "*fp32")
                constants = {
                    "Q_HEADS": q_heads, "KV_HEADS": kv_heads, "HEAD_DIM": head_dim,
                    "SCALE_LOG2": head_dim**-0.5 / math.log(2), "SPLITS": splits, "BLOCK_N": TILE // head_dim,
                    "BLOCK_D": head_dim,
                }  # fmt: skip
                if splits == 1:
                    constants |= {"partial_ptr": None, "statistics_ptr": None}
                name = f"{dtype} D{head_dim} {q_heads}/{kv_heads} {rows} rows"
                if kv_heads == q_heads:
                    add(name, decode_one_head_kernel, dtypes, constants | {"COMPUTE": tl.float32}, cache)
                else:
                    constants |= {"BLOCK_G": MIN_DOT, "UPCAST": False}
                    add(name, decode_group_kernel, dtypes, constants, cache)
        cache = torch.empty((2, tokens, q_heads, head_dim), dtype=torch.bfloat16, device="meta")
        dtypes = {"partial_ptr": "*fp32", "statistics_ptr": "*fp32", "out_ptr": "*bf16"}
        constants = {
            "HEAD_DIM": head_dim, "SPLITS": split_count(2 * q_heads, tokens), "BLOCK_S": BLOCK_S, "BLOCK_D": head_dim,
            "COMPUTE": tl.float32,
        }  # fmt: skip
        add(f"reduction D{head_dim}", reduce_splits_kernel, dtypes, constants, cache)
    return cases
