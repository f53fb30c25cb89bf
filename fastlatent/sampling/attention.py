"""Attention of one token over the KV cache: the cache, and which of four implementations runs here and why."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastlatent.ops.decode_attention import decode_attention, decode_attention_reference, sdpa_over_tokens
from fastlatent.ops.rope_append_kv import CACHE_DTYPES, DTYPES, rope_append_kv, rope_append_kv_reference

# (qkv, cos, sin, position, context, keys, values) → output; `AttentionBackend.run`.
Attend = Callable[[Tensor, Tensor, Tensor, Tensor, int, Tensor, Tensor], Tensor]
# What `choose_attention` tries in turn. "varlen" only runs when forced: it appends with the same kernel as "triton" and
# launches more after it.
CUDA_ORDER = ("flash", "triton", "sdpa")
OTHER_ORDER = ("sdpa",)
# Relative Frobenius error that a probe may have against float64: 4 roundings of a 16-bit dtype; exp's error in float32.
PROBE_TOLERANCE = {torch.bfloat16: 3e-2, torch.float16: 4e-3, torch.float32: 1e-4, torch.float64: 1e-9}


@dataclass(frozen=True)
class KVCache:
    """Keys and values of every layer, allocated once; `cache.keys[layer]` is what a backend takes.

    Attributes:
        keys, values: [layers, R, N, Hkv, D].
    """

    keys: Tensor
    values: Tensor

    @staticmethod
    def allocate(
        layers: int,
        rows: int,
        tokens: int,
        kv_heads: int,
        head_dim: int,
        *,
        kv_dtype: torch.dtype,
        device: torch.device | str,
    ) -> KVCache:
        """Zeros: "sdpa" reads tokens behind the position and gives them weight 0, which a NaN there would survive.

        kv_dtype: bfloat16, float16, float32, float64 or float8_e4m3fn. ValueError for another.
        """
        if kv_dtype not in CACHE_DTYPES:
            raise ValueError(f"KVCache: expected kv_dtype one of {', '.join(map(str, CACHE_DTYPES))}, got {kv_dtype}")
        shape = (layers, rows, tokens, kv_heads, head_dim)
        return KVCache(*(torch.zeros(shape, dtype=kv_dtype, device=device) for _ in range(2)))


@dataclass(frozen=True)
class AttentionBackend:
    """One way to append a token to the cache and attend to what it holds.

    Attributes:
        name: "flash", "triton", "varlen" or "sdpa".
        run: (qkv [R, (Hq + 2·Hkv)·D], cos, sin [N, D/2], position int64 [1] on the device, context,
            keys, values [R, N, Hkv, D]) → [R, Hq·D] in qkv's dtype; writes this token into keys and values. The host
            knows context, position < context ≤ N, and no more than it may be read; position + 1, or its bucket under
            a CUDA graph. Nothing synchronises. What the cache holds behind the position must be finite.
        rejected: (name, reason) of those that were tried before.
    """

    name: str
    run: Attend
    rejected: tuple[tuple[str, str], ...] = ()

    def describe(self) -> str:
        """The choice, and why nothing before it in the order runs here."""
        reasons = "; ".join(f"not {name}: {reason}" for name, reason in self.rejected)
        return f"attention: {self.name}" + (f" ({reasons})" if reasons else "")


def choose_attention(
    device: torch.device | str,
    dtype: torch.dtype,
    head_dim: int,
    kv_dtype: torch.dtype,
    *,
    force: str | None = None,
) -> AttentionBackend:
    """The first of flash → triton → sdpa on CUDA, of sdpa elsewhere, that a probe finds to run and to be right.

    - "flash": flash_attn.flash_attn_with_kvcache; the cache in dtype, bfloat16 or float16.
    - "triton": `fastlatent.ops.rope_append_kv` and `decode_attention`.
    - "varlen": torch.nn.attention.varlen over the cache in place; only when forced.
    - "sdpa": plain torch, over [:context] with a mask.

    The probe imports what is needed and compares two small calls (one and two query heads per key head) with float64.
    It synchronises, so choose before capturing a CUDA graph.

    Args:
        dtype: of activations: bfloat16, float16, float32 or float64.
        kv_dtype: of the cache: dtype, or another that the backend takes.
        force: take this one or none.

    Raises:
        ValueError: a dtype or the forced name is unknown, or no backend runs; with every probe's reason.
    """
    device = torch.device(device)
    for name, kind, known in (("dtype", dtype, DTYPES), ("kv_dtype", kv_dtype, CACHE_DTYPES)):
        if kind not in known:
            raise ValueError(f"attention: expected {name} one of {', '.join(map(str, known))}, got {kind}")
    if force is not None and force not in BACKENDS:
        raise ValueError(f"attention: expected one of {', '.join(BACKENDS)}, got {force!r}")
    rejected: list[tuple[str, str]] = []
    order = CUDA_ORDER if device.type == "cuda" else OTHER_ORDER
    for name in order if force is None else (force,):
        reason = _probe(name, device, dtype, head_dim, kv_dtype)
        if reason is None:
            return AttentionBackend(name, BACKENDS[name], tuple(rejected))
        rejected.append((name, reason))
    reasons = "; ".join(f"{name}: {reason}" for name, reason in rejected)
    raise ValueError(
        f"attention: cannot run on {device} with {dtype}, head size {head_dim}, {kv_dtype} cache: {reasons}"
    )


def _probe(name: str, device: torch.device, dtype: torch.dtype, head_dim: int, kv_dtype: torch.dtype) -> str | None:
    """Why `name` cannot be used, or None."""
    if name != "sdpa" and device.type != "cuda":
        return f"needs a CUDA device, got {device}"
    # 70 tokens of a bucket of 128: more than one tile, and a tail to mask.
    rows, tokens, position, kv_heads = 2, 128, torch.tensor([69]), 2
    generator = torch.Generator().manual_seed(0)
    table, cache = (tokens, head_dim // 2), (rows, tokens, kv_heads, head_dim)
    for heads in (kv_heads, 2 * kv_heads):
        try:
            qkv = torch.randn((rows, (heads + 2 * kv_heads) * head_dim), generator=generator).to(dtype)
            cos, sin = (torch.randn(table, generator=generator).to(dtype) for _ in range(2))
            keys, values = (torch.randn(cache, generator=generator).to(kv_dtype) for _ in range(2))
            x, c, s, p, k, v = (tensor.to(device, copy=True) for tensor in (qkv, cos, sin, position, keys, values))
            out = BACKENDS[name](x, c, s, p, tokens, k, v)
            q = rope_append_kv_reference(qkv.double(), cos, sin, position, keys, values)
            want = decode_attention_reference(q, keys, values, position, head_dim**-0.5, tokens).flatten(1)
            pairs = ((out, want), (k, keys), (v, values))
            errors = [float((a.double().cpu() - b.double()).norm() / b.double().norm()) for a, b in pairs]
        except Exception as failure:  # whatever a missing, old or unfitting package raises is its reason
            return f"{type(failure).__name__}: {failure}"
        if not max(errors) <= PROBE_TOLERANCE[dtype]:
            shown = ", ".join(f"{error:.1e}" for error in errors)
            return f"relative errors of output, keys and values are {shown}, above {PROBE_TOLERANCE[dtype]:.0e}"
    return None


def _sdpa(
    qkv: Tensor, cos: Tensor, sin: Tensor, position: Tensor, context: int, keys: Tensor, values: Tensor
) -> Tensor:
    q = rope_append_kv_reference(qkv, cos, sin, position, keys, values)
    # The host cannot know whether context is position + 1 without waiting for the device, so there is always a mask.
    mask = torch.arange(context, device=q.device) <= position
    scale = q.shape[-1] ** -0.5
    return sdpa_over_tokens(q, keys[:, :context], values[:, :context], scale=scale, mask=mask).flatten(1)


def _triton(
    qkv: Tensor, cos: Tensor, sin: Tensor, position: Tensor, context: int, keys: Tensor, values: Tensor
) -> Tensor:
    q = rope_append_kv(qkv, cos, sin, position, keys, values)
    return decode_attention(q, keys, values, position, max_length=context).flatten(1)


def _flash(
    qkv: Tensor, cos: Tensor, sin: Tensor, position: Tensor, context: int, keys: Tensor, values: Tensor
) -> Tensor:
    from flash_attn import flash_attn_with_kvcache

    rows, _, kv_heads, head_dim = keys.shape
    heads = qkv.view(rows, 1, -1, head_dim)
    q, k, v = heads[:, :, : -2 * kv_heads], heads[:, :, -2 * kv_heads : -kv_heads], heads[:, :, -kv_heads:]
    lengths = torch.empty(rows, dtype=torch.int32, device=qkv.device).copy_(position)
    out = flash_attn_with_kvcache(
        q,
        keys[:, :context],
        values[:, :context],
        k=k,
        v=v,
        rotary_cos=cos.to(qkv.dtype),
        rotary_sin=sin.to(qkv.dtype),
        cache_seqlens=lengths,
        rotary_interleaved=True,
    )
    return out.flatten(1)


def _varlen(
    qkv: Tensor, cos: Tensor, sin: Tensor, position: Tensor, context: int, keys: Tensor, values: Tensor
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    q = rope_append_kv(qkv, cos, sin, position, keys, values)
    rows, tokens, kv_heads, _ = keys.shape
    # The cache is one packed sequence in which row r begins at token r·N; seqused_k says how much of each is real.
    begins = torch.arange(rows + 1, dtype=torch.int32, device=q.device)
    lengths = torch.empty(rows, dtype=torch.int32, device=q.device).copy_(position) + 1
    out = varlen_attn(
        q,
        keys.flatten(0, 1),
        values.flatten(0, 1),
        begins,
        begins * tokens,
        1,
        context,
        enable_gqa=q.shape[1] != kv_heads,
        seqused_k=lengths,
    )
    assert isinstance(out, Tensor)
    return out.flatten(1)


BACKENDS: dict[str, Attend] = {"flash": _flash, "triton": _triton, "varlen": _varlen, "sdpa": _sdpa}
