"""rope_append_kv: rotate one token's queries and keys and write its keys and values into the caches, in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlatent.ops._library import LIBRARY

FLOAT8 = torch.float8_e4m3fn
FLOAT8_MAX = 448.0  # a larger number would become NaN: e4m3fn has no infinity
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
CACHE_DTYPES = (*DTYPES, FLOAT8)
# A program of the Triton kernels holds whole heads.
MAX_HEAD_DIM = 256

LIBRARY.define(
    "rope_append_kv(Tensor qkv, Tensor cos, Tensor sin, Tensor position, Tensor(a!) keys, Tensor(b!) values) -> Tensor"
)


def rope_append_kv(qkv: Tensor, cos: Tensor, sin: Tensor, position: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Rotate the queries and keys of one token per row (RoPE, Su et al. 2021, on interleaved even/odd pairs), write its
    keys and values at `position` of the caches, in place, and return its queries.

    The rotation is computed in float32, or in float64 where qkv is. A float8 cache takes values clamped to ±448.

    Args:
        qkv: [R, (Hq + 2·Hkv)·D], the heads of q, then of k, then of v; bfloat16, float16, float32 or float64.
        cos, sin: [N, D/2] in any of these dtypes; row n is the angle of position n.
        position: int64 [1] on the device of the others, 0 ≤ position < N: one CUDA graph serves every token. Checked
            on the CPU only, where it costs no synchronisation; a GPU writes out of bounds.
        keys, values: contiguous [R, N, Hkv, D] caches of one dtype: any of the above or torch.float8_e4m3fn
            (compute capability 8.9 or later on a GPU). D is even and at most 256.

    Returns:
        q [R, Hq, D], rotated, in qkv's dtype.

    Raises:
        ValueError: a shape, dtype, device, layout or (on the CPU) the position is not as above, or an input requires
            grad.
    """
    check_caches("rope_append_kv", keys, values, position)
    rows, tokens, kv_heads, head_dim = keys.shape
    width = qkv.shape[-1] if qkv.ndim else 0
    if (
        qkv.ndim != 2
        or qkv.shape[0] != rows
        or width % head_dim
        or width // head_dim <= 2 * kv_heads
        or qkv.dtype not in DTYPES
    ):
        raise ValueError(
            f"rope_append_kv: expected qkv [{rows}, (Hq + {2 * kv_heads})·{head_dim}] of {_names(DTYPES)}, got "
            f"{describe(qkv)}"
        )
    for name, table in (("cos", cos), ("sin", sin)):
        if table.shape != (tokens, head_dim // 2) or table.dtype not in DTYPES:
            raise ValueError(
                f"rope_append_kv: expected {name} [{tokens}, {head_dim // 2}] of {_names(DTYPES)}, got "
                f"{describe(table)}"
            )
    tensors = {"qkv": qkv, "cos": cos, "sin": sin, "position": position, "keys": keys, "values": values}
    check_placement("rope_append_kv", tensors)
    return torch.ops.fastlatent.rope_append_kv.default(qkv, cos, sin, position, keys, values)


def rope_append_kv_reference(
    qkv: Tensor, cos: Tensor, sin: Tensor, position: Tensor, keys: Tensor, values: Tensor
) -> Tensor:
    """The definition of `rope_append_kv`, in plain torch; it writes into the caches too, and never synchronises."""
    kv_heads, head_dim = keys.shape[2:]
    compute = torch.promote_types(qkv.dtype, torch.float32)
    heads = qkv.unflatten(1, (-1, head_dim)).to(compute)
    c, s = cos.index_select(0, position).to(compute), sin.index_select(0, position).to(compute)
    q_and_k, v = heads[:, :-kv_heads], heads[:, -kv_heads:]
    even, odd = q_and_k[..., 0::2], q_and_k[..., 1::2]
    rotated = torch.stack([even * c - odd * s, even * s + odd * c], dim=-1).flatten(-2)
    _write(keys, position, rotated[:, -kv_heads:])
    _write(values, position, v)
    return rotated[:, :-kv_heads].to(qkv.dtype, memory_format=torch.contiguous_format, copy=True)


def _write(cache: Tensor, position: Tensor, token: Tensor) -> None:
    if cache.dtype == FLOAT8:
        # torch has no index_copy_ of float8, but one of bytes.
        token = token.clamp(-FLOAT8_MAX, FLOAT8_MAX).to(FLOAT8).view(torch.uint8)
        cache = cache.view(torch.uint8)
    cache.index_copy_(1, position, token[:, None].to(cache.dtype))


def check_caches(op: str, keys: Tensor, values: Tensor, position: Tensor) -> None:
    """ValueError unless keys and values are caches and position a position, as the ops over caches expect them."""
    for name, cache in (("keys", keys), ("values", values)):
        if (
            cache.ndim != 4
            or min(cache.shape[1:]) < 1
            or cache.shape[3] % 2
            or cache.shape[3] > MAX_HEAD_DIM
            or cache.dtype not in CACHE_DTYPES
            or not cache.is_contiguous()
        ):
            raise ValueError(
                f"{op}: expected contiguous {name} [R, N, Hkv, D even and ≤ {MAX_HEAD_DIM}] of {_names(CACHE_DTYPES)}, "
                f"got {describe(cache)}"
            )
    if values.shape != keys.shape or values.dtype != keys.dtype:
        raise ValueError(f"{op}: expected values like keys {describe(keys)}, got {describe(values)}")
    if position.shape != (1,) or position.dtype != torch.int64:
        raise ValueError(f"{op}: expected position [1] of torch.int64, got {describe(position)}")


def check_placement(op: str, tensors: dict[str, Tensor]) -> None:
    """ValueError unless all tensors are on the device of the first, and none requires grad."""
    first_name, first = next(iter(tensors.items()))
    for name, tensor in tensors.items():
        if tensor.device != first.device:
            raise ValueError(f"{op}: expected {name} on {first.device} like {first_name}, got {describe(tensor)}")
        if tensor.requires_grad:
            raise ValueError(
                f"{op}: expected inputs without gradient, got {name} that requires grad; this op only runs forward: "
                "compute it under torch.no_grad() or detach it"
            )


def check_position(op: str, position: Tensor, end: int, name: str) -> None:
    """ValueError unless 0 ≤ position < end; only for a position on the CPU, where reading it waits for nothing."""
    if not 0 <= int(position) < end:
        raise ValueError(f"{op}: expected a position from 0 to {name} - 1 = {end - 1}, got {int(position)}")


def check_float8_device(op: str, cache: Tensor) -> None:
    """ValueError for a float8 cache on a GPU without float8 conversions."""
    if cache.dtype == FLOAT8 and torch.cuda.get_device_capability(cache.device) < (8, 9):
        raise ValueError(
            f"{op}: expected compute capability 8.9 or later for {FLOAT8} caches, got "
            f"{torch.cuda.get_device_name(cache.device)}; use caches of qkv's dtype"
        )


def describe(tensor: Tensor) -> str:
    layout = "contiguous" if tensor.is_contiguous() else f"strides {tensor.stride()}"
    return f"{list(tensor.shape)} {tensor.dtype} on {tensor.device}, {layout}"


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def _cpu(qkv: Tensor, cos: Tensor, sin: Tensor, position: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    check_position("rope_append_kv", position, keys.shape[1], "N")
    return rope_append_kv_reference(qkv, cos, sin, position, keys, values)


def _cuda(qkv: Tensor, cos: Tensor, sin: Tensor, position: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    from fastlatent.kernels.rope_append_kv import rope_append_kv_triton

    check_float8_device("rope_append_kv", keys)
    with torch.cuda.device(qkv.device):
        return rope_append_kv_triton(
            qkv.contiguous(), cos.contiguous(), sin.contiguous(), position, keys, values
        )  # fmt: skip


LIBRARY.impl("rope_append_kv", rope_append_kv_reference, "CompositeExplicitAutograd")
LIBRARY.impl("rope_append_kv", _cpu, "CPU")
LIBRARY.impl("rope_append_kv", _cuda, "CUDA")


@torch.library.register_fake("fastlatent::rope_append_kv", lib=LIBRARY)
def _fake(qkv: Tensor, cos: Tensor, sin: Tensor, position: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    kv_heads, head_dim = keys.shape[2:]
    return qkv.new_empty((qkv.shape[0], qkv.shape[1] // head_dim - 2 * kv_heads, head_dim))
