"""Attention without bias or qk-norm, causal or not, and what both Transformers repeat around it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def attend(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Tensor:
    """Softmax attention with scale 1/√D, by flash-attn where that is installed and can, else by PyTorch's SDPA.

    Args:
        q: [B, N, H, D].
        k, v: [B, N, Hkv, D], where Hkv divides H.

    Returns:
        [B, N, H, D].
    """
    flash = flash_attention() if q.is_cuda and v.dtype in (torch.float16, torch.bfloat16) else None
    if flash is not None and torch.cuda.get_device_capability(q.device)[0] >= 8:
        return flash(q, k, v, causal=causal)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=grouped).transpose(1, 2)


@functools.cache
def flash_attention() -> Callable[..., Tensor] | None:
    """flash-attn's function, None where it is not installed."""
    try:
        from flash_attn import flash_attn_func
    except ImportError:
        return None
    return flash_attn_func


class Attention(nn.Module):
    """qkv holds [q heads | k heads | v heads]."""

    def __init__(self, hidden_size: int, num_heads: int, num_kv_heads: int, *, causal: bool) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = num_heads, num_kv_heads, hidden_size // num_heads
        self.causal = causal
        self.qkv = nn.Linear(hidden_size, (num_heads + 2 * num_kv_heads) * self.head_dim, bias=False)
        self.proj = nn.Linear(hidden_size, hidden_size, bias=False)

    def forward(self, x: Tensor, rotate: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """x [B, N, hidden] → [B, N, hidden]. `rotate` takes q and k [B, heads, N, D] to their positions."""
        qkv = self.qkv(x).unflatten(-1, (-1, self.head_dim))
        q, k, v = qkv.split([self.heads, self.kv_heads, self.kv_heads], dim=2)
        if rotate is not None:
            # Under autocast qkv is half, but the table is not.
            q, k = (rotate(part.transpose(1, 2)).transpose(1, 2).to(v.dtype) for part in (q, k))
        return self.proj(attend(q, k, v, causal=self.causal).flatten(-2))


def run_block(block: nn.Module, *inputs: Any, again: bool) -> Tensor:
    """block(*inputs); with `again` its activations are not kept, but computed a second time in the backward pass."""
    if again and torch.is_grad_enabled():
        # Nothing in a block is random.
        return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)
    return block(*inputs)
