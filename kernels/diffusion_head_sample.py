"""Triton kernels for fastlatent.ops.diffusion_head_sample with few rows (guidance ways times batch, at most 32).

Every step reads all weights once, so the kernels are built around that stream: two per block (`up`, `down`), and one
(`tail`) for output projection, guidance, solver and the next input projection. Weights are the left operand of each
product and the rows its 16 or 32 columns, because Hopper's tensor cores take at least 64 rows there but as few as
8 columns. On sm_90 and later a kernel starts while the one before it still runs (programmatic dependent launch): it
loads its first weight tile, then waits.
"""

from __future__ import annotations

import itertools
import os
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_ROWS = 32
# Programs that `up` and `down` aim at: about one for each of the 132 multiprocessors of an H100 or H200. A constant,
# not the device's own number, because the split of a sum decides its bits.
PROGRAMS = 128
# Output channels of one program of `tail`, the hidden units it takes at a time, and its warps.
TAIL_CHANNELS, TAIL_HIDDEN, TAIL_WARPS = 16, 256, 8


@triton.jit
def _narrow(x, DTYPE: tl.constexpr, INTERPRETED: tl.constexpr):
    # Rounds to nearest even; the interpreter's own conversion to bfloat16 truncates.
    if INTERPRETED and DTYPE == tl.bfloat16:  # noqa: SIM300
        bits = x.to(tl.uint32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        x = (bits & 0xFFFF0000).to(tl.float32, bitcast=True)
    return x.to(DTYPE)


@triton.jit
def _statistics(x_ptr, row, valid, eps, H: tl.constexpr, LAYER_NORM: tl.constexpr, BLOCK: tl.constexpr):
    """Mean (0 for RMS norm) and reciprocal deviation of rows [R] of x [*, H], in two passes."""
    mean = tl.zeros_like(row).to(tl.float32)
    k = tl.arange(0, BLOCK)
    if LAYER_NORM:
        for begin in range(0, H, BLOCK):
            mask = valid[:, None] & (begin + k < H)[None, :]
            mean += tl.sum(tl.load(x_ptr + row[:, None] * H + (begin + k)[None, :], mask=mask, other=0.0), axis=1)
        mean /= H
    square = tl.zeros_like(mean)
    for begin in range(0, H, BLOCK):
        mask = valid[:, None] & (begin + k < H)[None, :]
        x = tl.load(x_ptr + row[:, None] * H + (begin + k)[None, :], mask=mask, other=0.0)
        x = tl.where(mask, x - mean[:, None], 0.0)
        square += tl.sum(x * x, axis=1)
    return mean, tl.rsqrt(square / H + eps)


@triton.jit
def _modulated(
    x_ptr, shift_ptr, row, k, mask, mean, rstd, H: tl.constexpr, PARTS: tl.constexpr, INTERPRETED: tl.constexpr
):  # fmt: skip
    """norm(x)·(1 + scale) + shift [R, K], rounded to the modulations' dtype; scale follows shift in memory."""
    x = tl.load(x_ptr + row[:, None] * H + k[None, :], mask=mask, other=0.0)
    shift_ptr += row[:, None] * (PARTS * H) + k[None, :]
    shift = tl.load(shift_ptr, mask=mask, other=0.0)
    scale = tl.load(shift_ptr + H, mask=mask, other=0.0).to(tl.float32)
    x = (x - mean[:, None]) * rstd[:, None] * (1 + scale) + shift.to(tl.float32)
    return _narrow(x, shift.dtype, INTERPRETED)


@triton.jit
def _weights(pointers, mask, EVEN: tl.constexpr):
    if EVEN:
        return tl.load(pointers)
    return tl.load(pointers, mask=mask, other=0)


@triton.jit
def _dot(w, x, acc, INTERPRETED: tl.constexpr):
    """acc [N, R] + w [N, K] · x [R, K]ᵀ; int8 weights become x's dtype, which holds them exactly, in registers."""
    if INTERPRETED:  # its bfloat16 products and conversions are garbage
        w, x = w.to(tl.float32), x.to(tl.float32)
    w = w.to(x.dtype)
    return tl.dot(w, tl.trans(x), acc, input_precision="ieee")


# Counts, positions and steps are not specialised: one compilation serves every batch, block and step.
@triton.jit(do_not_specialize=["rows", "step", "block"])
def up_kernel(
    x_ptr, modulation_ptr, weight_ptr, scale_ptr, bias_ptr, h_ptr, rows, step, block, eps,
    H: tl.constexpr, F: tl.constexpr, PARTS: tl.constexpr, GATED: tl.constexpr, LAYER_NORM: tl.constexpr,
    PDL: tl.constexpr, INTERPRETED: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_S: tl.constexpr,
):  # fmt: skip
    """h [rows, F] = silu(up₀ m + bias)·(up₁ m + bias), or silu(up m + bias), of m = norm(x)·(1 + scale) + shift."""
    U: tl.constexpr = 2 * F if GATED else F
    # A gated program takes BLOCK_N / 2 outputs: their rows of up₀, then those of up₁, as one tile.
    OUT: tl.constexpr = BLOCK_N // 2 if GATED else BLOCK_N
    EVEN: tl.constexpr = F % OUT == 0 and H % BLOCK_K == 0
    i = tl.arange(0, BLOCK_N)
    out = tl.program_id(0) * OUT + i % OUT
    n = out + i // OUT * F
    r = tl.arange(0, BLOCK_R)
    k = tl.arange(0, BLOCK_K)
    valid = r < rows
    modulation_ptr += (step.to(tl.int64) * rows * PARTS + 3 * block) * H
    weight_ptr += block.to(tl.int64) * (U * H)
    w_ptr = weight_ptr + n[:, None] * H + k[None, :]
    w = _weights(w_ptr, (out < F)[:, None] & (k < H)[None, :], EVEN)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()

    mean, rstd = _statistics(x_ptr, r, valid, eps, H, LAYER_NORM, BLOCK_S)
    mask = valid[:, None] & (k < H)[None, :]
    m = _modulated(x_ptr, modulation_ptr, r, k, mask, mean, rstd, H, PARTS, INTERPRETED)
    acc = _dot(w, m, tl.zeros((BLOCK_N, BLOCK_R), tl.float32), INTERPRETED)
    for begin in range(BLOCK_K, H, BLOCK_K):
        inside = (begin + k < H)[None, :]
        w = _weights(w_ptr + begin, (out < F)[:, None] & inside, EVEN)
        mask = valid[:, None] & inside
        m = _modulated(x_ptr, modulation_ptr, r, begin + k, mask, mean, rstd, H, PARTS, INTERPRETED)
        acc = _dot(w, m, acc, INTERPRETED)

    if scale_ptr is not None:
        acc *= tl.load(scale_ptr + block * U + n, mask=out < F, other=0.0)[:, None]
    acc += tl.load(bias_ptr + block * U + n, mask=out < F, other=0.0)[:, None]
    if GATED:
        first, second = tl.split(tl.permute(tl.reshape(acc, (2, OUT, BLOCK_R)), (1, 2, 0)))
        h = first / (1 + tl.exp(-first)) * second
    else:
        h = acc / (1 + tl.exp(-acc))
    out = tl.program_id(0) * OUT + tl.arange(0, OUT)
    h = _narrow(h, h_ptr.dtype.element_ty, INTERPRETED)
    tl.store(h_ptr + r[None, :] * F + out[:, None], h, mask=(out < F)[:, None] & valid[None, :])


@triton.jit
def _last_to_arrive(counter_ptr, COUNT: tl.constexpr):
    """Whether COUNT - 1 programs came here before; what they stored is then visible. Leaves the counter at zero."""
    # The atomic releases what its own thread stored or saw; the barrier brings the other threads' stores to it.
    tl.debug_barrier()
    last = tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu") == COUNT - 1
    if last:
        tl.store(counter_ptr, 0)
    return last


@triton.jit
def _add_to_residual(
    acc, x_ptr, gate_ptr, scale_ptr, bias_ptr, n, r, rows, H: tl.constexpr, PARTS: tl.constexpr
):  # fmt: skip
    mask = (n < H)[:, None] & (r < rows)[None, :]
    if scale_ptr is not None:
        acc *= tl.load(scale_ptr + n, mask=n < H, other=0.0)[:, None]
    acc += tl.load(bias_ptr + n, mask=n < H, other=0.0)[:, None]
    gate = tl.load(gate_ptr + r[None, :] * (PARTS * H) + n[:, None], mask=mask, other=0.0)
    x_ptr += r[None, :] * H + n[:, None]
    tl.store(x_ptr, tl.load(x_ptr, mask=mask, other=0.0) + gate.to(tl.float32) * acc, mask=mask)


@triton.jit(do_not_specialize=["rows", "step", "block"])
def down_kernel(
    x_ptr, modulation_ptr, weight_ptr, scale_ptr, bias_ptr, h_ptr, partial_ptr, counter_ptr, rows, step, block,
    H: tl.constexpr, F: tl.constexpr, PARTS: tl.constexpr, PDL: tl.constexpr, INTERPRETED: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPLITS: tl.constexpr, LENGTH: tl.constexpr,
):  # fmt: skip
    """x [rows, H] += gate·(down h + bias): SPLITS programs a tile, each for LENGTH of F; the last one adds them up."""
    EVEN: tl.constexpr = H % BLOCK_N == 0 and F % LENGTH == 0
    tile = tl.program_id(0)
    first = tl.program_id(1) * LENGTH
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    r = tl.arange(0, BLOCK_R)
    k = first + tl.arange(0, BLOCK_K)
    valid = r < rows
    w_ptr = weight_ptr + block.to(tl.int64) * (H * F) + n[:, None] * F + k[None, :]
    w = _weights(w_ptr, (n < H)[:, None] & (k < F)[None, :], EVEN)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()

    h_ptr += r[:, None] * F + k[None, :]
    h = tl.load(h_ptr, mask=valid[:, None] & (k < F)[None, :], other=0.0)
    acc = _dot(w, h, tl.zeros((BLOCK_N, BLOCK_R), tl.float32), INTERPRETED)
    for begin in range(BLOCK_K, LENGTH, BLOCK_K):
        inside = (begin + k < F)[None, :]
        w = _weights(w_ptr + begin, (n < H)[:, None] & inside, EVEN)
        h = tl.load(h_ptr + begin, mask=valid[:, None] & inside, other=0.0)
        acc = _dot(w, h, acc, INTERPRETED)

    gate_ptr = modulation_ptr + (step.to(tl.int64) * rows * PARTS + 3 * block + 2) * H
    if scale_ptr is not None:
        scale_ptr += block * H
    bias_ptr += block * H
    if SPLITS == 1:
        _add_to_residual(acc, x_ptr, gate_ptr, scale_ptr, bias_ptr, n, r, rows, H, PARTS)
    else:
        partial_ptr += tile * (SPLITS * BLOCK_N * BLOCK_R)
        partial_ptr += tl.arange(0, BLOCK_N)[:, None] * BLOCK_R + r[None, :]
        tl.store(partial_ptr + tl.program_id(1) * (BLOCK_N * BLOCK_R), acc)
        if _last_to_arrive(counter_ptr + tile, SPLITS):
            # .cg: past this multiprocessor's own cache, which may hold the step before.
            acc = tl.load(partial_ptr, cache_modifier=".cg")
            for split in tl.static_range(1, SPLITS):
                acc += tl.load(partial_ptr + split * (BLOCK_N * BLOCK_R), cache_modifier=".cg")
            _add_to_residual(acc, x_ptr, gate_ptr, scale_ptr, bias_ptr, n, r, rows, H, PARTS)


@triton.jit(do_not_specialize=["batch", "step"])
def tail_kernel(
    x_ptr, modulation_ptr, output_weight_ptr, output_bias_ptr, input_weight_ptr, input_bias_ptr, state_ptr, table_ptr,
    guidance_ptr, noise_ptr, partial_ptr, counter_ptr, batch, step, eps,
    H: tl.constexpr, C: tl.constexpr, PARTS: tl.constexpr, WAYS: tl.constexpr, SOLVE: tl.constexpr,
    LEARNED_VARIANCE: tl.constexpr, LAYER_NORM: tl.constexpr, PDL: tl.constexpr, INTERPRETED: tl.constexpr,
    BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_H: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """One sample's output, guidance and solver step (unless SOLVE is off), then x [WAYS, batch, H] of the next step.

    Guidance is linear, as is the output projection: the guided output is the projection of the guided activations, so
    each weight is used once whatever the number of ways. GROUPS programs share a sample's channels; the last one adds
    their parts of the input projection.
    """
    b = tl.program_id(0)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    k = tl.arange(0, BLOCK_H)
    way = tl.arange(0, BLOCK_W)
    row = way * batch + b
    rows = WAYS * batch
    channel = c < C
    DTYPE: tl.constexpr = output_weight_ptr.dtype.element_ty
    output_weight_ptr += c[:, None] * H + k[None, :]
    w = tl.load(output_weight_ptr, mask=channel[:, None] & (k < H)[None, :], other=0.0)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()

    state_ptr += b.to(tl.int64) * C + c
    plane = batch.to(tl.int64) * C
    x = tl.load(state_ptr, mask=channel, other=0.0)
    if SOLVE:
        d1 = tl.load(state_ptr + plane, mask=channel)
        d2 = tl.load(state_ptr + 2 * plane, mask=channel)
        x_base = tl.load(state_ptr + 3 * plane, mask=channel)
        modulation_ptr += (step.to(tl.int64) * rows * PARTS + PARTS - 2) * H
        valid = way < WAYS
        mean, rstd = _statistics(x_ptr, row, valid, eps, H, LAYER_NORM, BLOCK_H)
        weight = tl.load(guidance_ptr + row, mask=valid, other=0.0)
        guided = tl.zeros((BLOCK_C,), tl.float32)
        variance = tl.zeros((BLOCK_C,), tl.float32)
        for begin in range(0, H, BLOCK_H):
            inside = (begin + k < H)[None, :]
            mask = valid[:, None] & inside
            m = _modulated(x_ptr, modulation_ptr, row, begin + k, mask, mean, rstd, H, PARTS, INTERPRETED)
            # A where, because an eps of 0 makes padded rows NaN.
            m = tl.where(mask, m.to(tl.float32), 0.0)
            mixed = tl.sum(weight[:, None] * m, axis=0)
            guided += tl.sum(w.to(tl.float32) * mixed[None, :], axis=1)
            more = channel[:, None] & (begin + BLOCK_H + k < H)[None, :]
            w = tl.load(output_weight_ptr + begin + BLOCK_H, mask=more, other=0.0)
            if LEARNED_VARIANCE:
                w_v = tl.load(output_weight_ptr + C * H + begin, mask=channel[:, None] & inside, other=0.0)
                first = tl.sum(tl.where(way[:, None] == 0, m, 0.0), axis=0)
                variance += tl.sum(w_v.to(tl.float32) * first[None, :], axis=1)
        o = guided + tl.load(output_bias_ptr + c, mask=channel, other=0.0) * tl.sum(weight, axis=0)

        # As kernels/solver_step.py. Columns: p q r a f b c d e s l0 l1 base.
        table_ptr += step * 16
        limit = tl.load(table_ptr + 2)
        data = tl.load(table_ptr) * x + tl.load(table_ptr + 1) * o
        data = tl.where(data < -limit, -limit, data)
        data = tl.where(data > limit, limit, data)
        base = tl.where(tl.load(table_ptr + 12) != 0, x, x_base)
        following = tl.load(table_ptr + 3) * x + tl.load(table_ptr + 4) * base
        following += tl.load(table_ptr + 5) * data
        following += tl.load(table_ptr + 6) * d1
        following += tl.load(table_ptr + 7) * d2
        following += tl.load(table_ptr + 8) * o
        if noise_ptr is not None:
            z = tl.load(noise_ptr + (step.to(tl.int64) * batch + b) * C + c, mask=channel, other=0.0)
            s = tl.load(table_ptr + 9)
            if LEARNED_VARIANCE:
                v = variance + tl.load(output_bias_ptr + C + c, mask=channel, other=0.0)
                s *= tl.exp(0.5 * (tl.load(table_ptr + 10) + tl.load(table_ptr + 11) * (0.5 * (v + 1))))
            following += s * z
        # Several threads hold each channel: all must have loaded the state before one of them stores it.
        tl.debug_barrier()
        tl.store(state_ptr, following, mask=channel)
        tl.store(state_ptr + plane, data, mask=channel)
        tl.store(state_ptr + 2 * plane, d1, mask=channel)
        tl.store(state_ptr + 3 * plane, base, mask=channel)
        x = tl.where(channel, following, 0.0)

    x = _narrow(x, DTYPE, INTERPRETED).to(tl.float32)
    x_ptr += row[:, None] * H + k[None, :]
    partial_ptr += b * (GROUPS * H) + k
    for begin in range(0, H, BLOCK_H):
        inside = begin + k < H
        w_ptr = input_weight_ptr + (begin + k)[:, None] * C + c[None, :]
        w_in = tl.load(w_ptr, mask=inside[:, None] & channel[None, :], other=0.0)
        projected = tl.sum(w_in.to(tl.float32) * x[None, :], axis=1)
        if GROUPS == 1:
            projected += tl.load(input_bias_ptr + begin + k, mask=inside, other=0.0)
            tl.store(x_ptr + begin, projected[None, :].broadcast_to(BLOCK_W, BLOCK_H),
                     mask=(way < WAYS)[:, None] & inside[None, :])  # fmt: skip
        else:
            tl.store(partial_ptr + tl.program_id(1) * H + begin, projected, mask=inside)
    if GROUPS > 1:  # noqa: SIM102
        # Not one condition: Triton would evaluate both sides.
        if _last_to_arrive(counter_ptr + b, GROUPS):
            for begin in range(0, H, BLOCK_H):
                inside = begin + k < H
                total = tl.load(input_bias_ptr + begin + k, mask=inside, other=0.0)
                for group in range(GROUPS):
                    total += tl.load(partial_ptr + group * H + begin, mask=inside, other=0.0, cache_modifier=".cg")
                tl.store(x_ptr + begin, total[None, :].broadcast_to(BLOCK_W, BLOCK_H),
                         mask=(way < WAYS)[:, None] & inside[None, :])  # fmt: skip


def _power_of_2(n: int, least: int, most: int) -> int:
    return max(least, min(most, triton.next_power_of_2(n)))


def up_constants(hidden: int, width: int, gated: bool, rows: int, itemsize: int) -> dict[str, int]:
    """Tiles of `up_kernel`; itemsize in bytes of the activations."""
    block_r = 16 if rows <= 16 else 32
    up = 2 * width if gated else width
    # 64 rows of weights fill a wgmma; a narrow block (MAR's H = F = 1280) gets smaller tiles to fill the device.
    block_n = 32 if itemsize == 4 else 64
    while block_n > 16 and 4 * triton.cdiv(up, block_n) < 3 * PROGRAMS:
        block_n //= 2
    # Beside the weights, x, scale and shift of BLOCK_R rows pass through shared memory too.
    block_k = _power_of_2(hidden, 16, 32 if itemsize == 4 else 64)
    block_s = _power_of_2(hidden, 16, 8192 // block_r)
    return {"BLOCK_R": block_r, "BLOCK_N": block_n, "BLOCK_K": block_k, "BLOCK_S": block_s}


def stages(rows: int) -> int:
    """Weight tiles of 8 KiB on their way: all of it fits the 99 KiB of shared memory of sm_86, sm_89 and sm_120."""
    return 6 if rows <= 16 else 4


def down_constants(hidden: int, width: int, rows: int, itemsize: int) -> dict[str, int]:
    """Tiles of `down_kernel`, and the split of its sums."""
    block_n = _power_of_2(hidden, 16, 64)
    block_k = _power_of_2(width, 16, 32 if itemsize == 4 else 64)
    tiles, blocks = triton.cdiv(hidden, block_n), triton.cdiv(width, block_k)
    length = triton.cdiv(blocks, min(blocks, max(1, PROGRAMS // tiles))) * block_k
    return {
        "BLOCK_R": 16 if rows <= 16 else 32, "BLOCK_N": block_n, "BLOCK_K": block_k,
        "SPLITS": triton.cdiv(width, length), "LENGTH": length,
    }  # fmt: skip


def tail_constants(hidden: int, channels: int, ways: int) -> dict[str, int]:
    """Tiles of `tail_kernel`."""
    return {
        "BLOCK_W": triton.next_power_of_2(ways), "BLOCK_C": TAIL_CHANNELS,
        "BLOCK_H": _power_of_2(hidden, 16, TAIL_HIDDEN), "GROUPS": triton.cdiv(channels, TAIL_CHANNELS),
    }  # fmt: skip


def head_steps_triton(
    state: Tensor, modulations: Tensor, table: Tensor, guidance: Tensor, noise: Tensor | None,
    input_weight: Tensor, input_bias: Tensor, up_weight: Tensor, up_bias: Tensor, down_weight: Tensor,
    down_bias: Tensor, output_weight: Tensor, output_bias: Tensor, up_scale: Tensor | None, down_scale: Tensor | None,
    layer_norm: bool, eps: float,
) -> None:  # fmt: skip
    """Run K solver steps in place: 1 + K·(2L + 1) launches, no allocation between them and no wait for the device.

    All tensors are contiguous and as checked by `fastlatent.ops.diffusion_head_sample`; the state is float32.

    Args:
        state: [4, B, C].
        modulations: [K, W, B, (3L+2)·H] in the weights' dtype; W·B at most MAX_ROWS.
        table: [K, 16].
        guidance: [W, B].
        noise: [K, B, C] or None.
    """
    steps, ways, batch, _ = modulations.shape
    rows = ways * batch
    assert state.dtype == torch.float32 and rows <= MAX_ROWS and table.shape[0] == steps
    if state.numel() == 0:
        return  # a CUDA grid cannot be empty
    blocks, up, hidden = up_weight.shape
    width, channels = down_weight.shape[2], input_weight.shape[1]
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    pdl = not interpreted and torch.cuda.get_device_capability(state.device)[0] >= 9
    itemsize = modulations.dtype.itemsize
    ups = up_constants(hidden, width, up != width, rows, itemsize)
    downs = down_constants(hidden, width, rows, itemsize)
    tails = tail_constants(hidden, channels, ways)

    tiles, groups = triton.cdiv(hidden, downs["BLOCK_N"]), tails["GROUPS"]
    partials = max(tiles * downs["SPLITS"] * downs["BLOCK_N"] * downs["BLOCK_R"], batch * groups * hidden)
    x = state.new_empty(rows * hidden)
    h = modulations.new_empty(rows * width)
    partial = state.new_empty(partials)
    counters = torch.zeros(max(tiles, batch), dtype=torch.int32, device=state.device)

    common: dict[str, Any] = {"H": hidden, "PARTS": 3 * blocks + 2, "PDL": pdl, "INTERPRETED": interpreted}
    common |= {"enable_fp_fusion": True}
    options = {"num_warps": 4, "num_stages": stages(rows)}
    launch = {"launch_pdl": True} if pdl else {}
    up_grid = (triton.cdiv(up, ups["BLOCK_N"]),)

    def tail(step: int, **launch: Any) -> None:
        tail_kernel[(batch, groups)](
            x, modulations, output_weight, output_bias, input_weight, input_bias, state, table, guidance, noise,
            partial, counters, batch, step, eps,
            C=channels, WAYS=ways, LEARNED_VARIANCE=len(output_weight) != channels, LAYER_NORM=layer_norm,
            num_warps=TAIL_WARPS, num_stages=1, **tails, **common, **launch,
        )  # fmt: skip

    # Not dependent: the caller may have written the weights just before, and the others load them without waiting.
    tail(0, SOLVE=False)
    for step in range(steps):
        for block in range(blocks):
            up_kernel[up_grid](
                x, modulations, up_weight, up_scale, up_bias, h, rows, step, block, eps,
                F=width, GATED=up != width, LAYER_NORM=layer_norm, **ups, **common, **options, **launch,
            )  # fmt: skip
            down_kernel[(tiles, downs["SPLITS"])](
                x, modulations, down_weight, down_scale, down_bias, h, partial, counters, rows, step, block,
                F=width, **downs, **common, **options, **launch,
            )  # fmt: skip
        tail(step, SOLVE=True, **launch)


def aot_cases() -> list[dict[str, Any]]:
    """The kernels at published sizes, to compile ahead of time without a GPU. 2 rows compile to the same as 16."""
    heads = {  # hidden, width, blocks, channels, gated, layer norm, learned variance
        "latentlm-medium": (1024, 4096, 3, 16, True, False, False),
        "vibevoice-1.5b": (1536, 4608, 4, 64, True, False, False),
        "mar-l": (1280, 1280, 8, 16, False, True, True),
    }
    runs = [(head, "bf16", rows) for head in heads for rows in (16, 32)]
    runs += [
        ("latentlm-medium", *run) for run in (("fp16", 16), ("fp32", 16), ("fp32", 32), ("int8", 16), ("int8", 32))
    ]
    # An argument is a pointer to w(eights), m(odulations), f(loat32) or c(ounters), a (s)ize or position, or (e)ps.
    kinds = {up_kernel: "fmwffmssse", down_kernel: "fmwffmfcsss", tail_kernel: "fmwfwffffffcsse"}
    cases = []
    for (head, dtype, rows), pdl in itertools.product(runs, (True, False)):
        hidden, width, blocks, channels, gated, layer_norm, learned = heads[head]
        weight, small = ("i8", "bf16") if dtype == "int8" else (dtype, dtype)
        itemsize = 4 if dtype == "fp32" else 2
        ups, downs = up_constants(hidden, width, gated, rows, itemsize), down_constants(hidden, width, rows, itemsize)
        scale = {} if dtype == "int8" else {"scale_ptr": None}
        constants = {
            up_kernel: {"F": width, "GATED": gated, "LAYER_NORM": layer_norm} | scale | ups,
            down_kernel: {"F": width} | scale | downs,
        }
        if rows == 16:
            constants[tail_kernel] = {
                "C": channels, "WAYS": 2, "SOLVE": True, "LEARNED_VARIANCE": learned, "LAYER_NORM": layer_norm,
            } | tail_constants(hidden, channels, 2)  # fmt: skip
        for kernel, own in constants.items():
            own |= {"H": hidden, "PARTS": 3 * blocks + 2, "PDL": pdl, "INTERPRETED": False}
            tail = kernel is tail_kernel
            letters = {"w": f"*{small if tail else weight}", "m": f"*{small}", "f": "*fp32", "c": "*i32", "s": "i32"}
            letters["e"] = "fp32"
            signature = dict(zip(kernel.arg_names, (letters[kind] for kind in kinds[kernel]), strict=False))
            aligned = (i for i, kind in enumerate(kinds[kernel]) if kind in "wmfc" and kernel.arg_names[i] not in own)
            warps, depth = (TAIL_WARPS, 1) if tail else (4, stages(rows))
            options = {"num_warps": warps, "num_stages": depth, "enable_fp_fusion": True}
            cases.append(
                {
                    "name": f"{kernel.__name__} {head} {dtype} rows {rows}{'' if pdl else ', no PDL'}",
                    "kernel": kernel,
                    "signature": signature | dict.fromkeys(own, "constexpr"),
                    "constants": own,
                    "attrs": {(i,): [["tt.divisibility", 16]] for i in aligned},
                    "options": options | ({"launch_pdl": True} if pdl else {}),
                    "wgmma": not tail and dtype != "fp32" and own["BLOCK_N"] == 64,
                    "arches": [90, 100, 120] if pdl else [80, 86, 89],
                }
            )
    return cases
