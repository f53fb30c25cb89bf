"""decode_attention: one query per row attends to the cached tokens up to its position."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlatent.ops._library import LIBRARY
from fastlatent.ops.rope_append_kv import (
    DTYPES,
    check_caches,
    check_float8_device,
    check_placement,
    check_position,
    describe,
)

LIBRARY.define(
    "decode_attention(Tensor q, Tensor keys, Tensor values, Tensor position, float scale, int max_length) -> Tensor"
)


def decode_attention(
    q: Tensor, keys: Tensor, values: Tensor, position: Tensor, *, scale: float | None = None, max_length: int
) -> Tensor:
    """Attention of one query per row to positions 0 to `position` inclusive; query head h reads key head h·Hkv // Hq.

    Softmax and sums are computed in float32, or in float64 where q is; grouped 16-bit heads (Hkv < Hq) on a GPU round
    the softmax weights to q's dtype, as flash attention does. Only position + 1 tokens are read, and the tokens behind
    them may hold anything. The same sizes and position give the same bits; another R or max_length may split the sum
    over tokens elsewhere and change the last ones.

    Args:
        q: [R, Hq, D]; bfloat16, float16, float32 or float64.
        keys, values: contiguous [R, N, Hkv, D] caches of one dtype, any of q's or torch.float8_e4m3fn (compute
            capability 8.9 or later on a GPU). Hq is a multiple of Hkv; D is even and at most 256.
        position: int64 [1] on the device of the others, 0 ≤ position < max_length: one CUDA graph serves every token.
            Checked on the CPU only, where it costs no synchronisation; a GPU reads out of bounds from N on.
        scale: of the scores; None is D^-1/2.
        max_length: upper bound of position + 1 that the host knows, at most N. It decides how many programs share
            the tokens of a head.

    Returns:
        [R, Hq, D] in q's dtype.

    Raises:
        ValueError: a shape, dtype, device, layout, max_length or (on the CPU) the position is not as above, or an
            input requires grad.
    """
    check_caches("decode_attention", keys, values, position)
    rows, tokens, kv_heads, head_dim = keys.shape
    if (
        q.ndim != 3
        or q.shape[0] != rows
        or q.shape[1] < 1
        or q.shape[1] % kv_heads
        or q.shape[2] != head_dim
        or q.dtype not in DTYPES
    ):
        raise ValueError(
            f"decode_attention: expected q [{rows}, a multiple of {kv_heads}, {head_dim}] of bfloat16, float16, "
            f"float32 or float64, got {describe(q)}"
        )
    if not 1 <= max_length <= tokens:
        raise ValueError(f"decode_attention: expected max_length from 1 to N = {tokens}, got {max_length}")
    check_placement("decode_attention", {"q": q, "keys": keys, "values": values, "position": position})
    scale = head_dim**-0.5 if scale is None else scale
    return torch.ops.fastlatent.decode_attention.default(q, keys, values, position, scale, max_length)


def decode_attention_reference(
    q: Tensor, keys: Tensor, values: Tensor, position: Tensor, scale: float, max_length: int
) -> Tensor:
    """The definition of `decode_attention`, in plain torch; it reads max_length tokens and never synchronises."""
    compute = torch.promote_types(q.dtype, torch.float32)
    kv_heads = keys.shape[2]
    inside = torch.arange(max_length, device=q.device) <= position
    outside = ~inside[:, None, None]
    # What lies behind the position may be NaN, and 0·NaN is one.
    k, v = (cache[:, :max_length].to(compute).masked_fill(outside, 0) for cache in (keys, values))
    grouped = q.to(compute).unflatten(1, (kv_heads, -1))
    scores = torch.einsum("rkgd,rnkd->rkgn", grouped, k) * scale
    weights = scores.masked_fill(~inside, -torch.inf).softmax(-1)
    return torch.einsum("rkgn,rnkd->rkgd", weights, v).flatten(1, 2).to(q.dtype)


def sdpa_over_tokens(q: Tensor, keys: Tensor, values: Tensor, *, scale: float, mask: Tensor | None = None) -> Tensor:
    """torch's attention of q [R, Hq, D] to all tokens of keys and values [R, n, Hkv, D], or those where mask [n] is.

    The heads of a group stand as the queries of their key head, so that no key is repeated. → [R, Hq, D].
    """
    k, v = (cache.to(q.dtype).transpose(1, 2) for cache in (keys, values))
    grouped = q.unflatten(1, (keys.shape[2], -1))
    mask = None if mask is None else mask.expand(grouped.shape[2], -1)
    return F.scaled_dot_product_attention(grouped, k, v, attn_mask=mask, scale=scale).reshape(q.shape)


def _cpu(q: Tensor, keys: Tensor, values: Tensor, position: Tensor, scale: float, max_length: int) -> Tensor:
    check_position("decode_attention", position, max_length, "max_length")
    if q.numel() == 0:
        return q.new_empty(q.shape)
    length = int(position) + 1
    return sdpa_over_tokens(q, keys[:, :length], values[:, :length], scale=scale).contiguous()


def _cuda(q: Tensor, keys: Tensor, values: Tensor, position: Tensor, scale: float, max_length: int) -> Tensor:
    from fastlatent.kernels.decode_attention import decode_attention_triton

    check_float8_device("decode_attention", keys)
    with torch.cuda.device(q.device):
        return decode_attention_triton(q.contiguous(), keys, values, position, scale, max_length)


LIBRARY.impl("decode_attention", decode_attention_reference, "CompositeExplicitAutograd")
LIBRARY.impl("decode_attention", _cpu, "CPU")
LIBRARY.impl("decode_attention", _cuda, "CUDA")


@torch.library.register_fake("fastlatent::decode_attention", lib=LIBRARY)
def _fake(q: Tensor, keys: Tensor, values: Tensor, position: Tensor, scale: float, max_length: int) -> Tensor:
    return q.new_empty(q.shape)
