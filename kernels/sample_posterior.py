"""Triton kernel for fastlatent.ops.sample_posterior."""

from __future__ import annotations

import os
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Philox blocks per program, of four numbers each: two blocks for each thread of 4 warps. The mirror's bit takes a third
# call of Philox in every thread.
BLOCKS = 256
# Nothing fused, every division and root correctly rounded: so the bits are those of csrc/cpu/sample_posterior.cpp,
# whose comments say what the polynomials are.
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}


@triton.jit
def _radius(word):
    u = word.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10  # 2^-32 and 2^-33
    shifted = u.to(tl.int32, bitcast=True) - 0x3F3504F3
    e = (shifted >> 23).to(tl.float32)
    x = ((shifted & 0x7FFFFF) + 0x3F3504F3).to(tl.float32, bitcast=True) - 1.0
    square = x * x
    p = x * -0.0785955935716629 + 0.1288164108991623
    p = p * x - 0.13128770887851715
    p = p * x + 0.14181193709373474
    p = p * x - 0.16624552011489868
    p = p * x + 0.2000228613615036
    p = p * x - 0.25000810623168945
    p = p * x + 0.33333316445350647
    y = x * square * p
    y = y + e * -2.12194440e-4
    y = y - 0.5 * square
    y = x + y
    y = y + e * 0.693359375
    return tl.sqrt_rn(-2.0 * y)


@triton.jit
def _turn(word):
    quarter = (word + 0x20000000) >> 30
    a = (word - (quarter << 30)).to(tl.int32, bitcast=True).to(tl.float32) * 1.4629180792671596e-09
    square = a * a
    s = square * -0.00019517271721269935 + 0.008332177996635437
    s = s * square - 0.16666655242443085
    s = a + a * square * s
    c = square * 2.4438420950900763e-05 - 0.001388736767694354
    c = c * square + 0.04166664555668831
    c = 1.0 - 0.5 * square + square * square * c
    odd = (quarter & 1) != 0
    cosine = tl.where(odd, s, c).to(tl.uint32, bitcast=True) ^ (((quarter + 1) >> 1) << 31)
    sine = tl.where(odd, c, s).to(tl.uint32, bitcast=True) ^ ((quarter >> 1) << 31)
    return cosine.to(tl.float32, bitcast=True), sine.to(tl.float32, bitcast=True)


@triton.jit
def _deviation(logvar):
    """exp(clamp(logvar, -30, 20) / 2)."""
    # tl.clamp would drop a NaN.
    h = tl.where(logvar < -30.0, -30.0, logvar)
    h = tl.where(h > 20.0, 20.0, h) * 0.5
    rounded = h * 1.44269504 + 12582912.0
    n = rounded - 12582912.0
    r = h - n * 0.693359375
    r = r - n * -2.12194440e-4
    p = r * 0.0013950486 + 0.008368888
    p = p * r + 0.041666206
    p = p * r + 0.16666518
    p = p * r + 0.5
    p = 1.0 + (r + r * r * p)
    return p * ((rounded.to(tl.int32, bitcast=True) - 0x4B400000 + 127) << 23).to(tl.float32, bitcast=True)


# Words of the seed and epochs take any value: one compilation serves them all.
@triton.jit(do_not_specialize=["seed_low", "seed_high", "epoch"])
def sample_posterior_kernel(
    moments_ptr,
    key_hash_ptr,
    mean_ptr,
    std_ptr,
    scale_ptr,
    out_ptr,
    seed_low,
    seed_high,
    epoch,
    channels,
    spatial,
    tiles,
    FLIPS: tl.constexpr,
    SCALES: tl.constexpr,  # per row: 0, 1, or 2 for one of each channel
    HAS_LOGVAR: tl.constexpr,
    NORMALISE: tl.constexpr,
    WHOLE: tl.constexpr,  # spatial is a multiple of 4: a Philox block lies in one channel
    INTERPRETED: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    program = tl.program_id(0)
    # int64: 2^31 numbers are 256 Mi rows of 8, or 32 GiB of moments.
    row = (program // tiles).to(tl.int64)
    elements = channels * spatial
    block = (program % tiles) * BLOCKS + tl.arange(0, BLOCKS)
    element = block[:, None] * 4 + tl.arange(0, 4)[None, :]
    mask = element < elements

    seed = (seed_high.to(tl.uint32, bitcast=True).to(tl.uint64) << 32) | seed_low.to(tl.uint32, bitcast=True)
    key = tl.load(key_hash_ptr + row).to(tl.uint64, bitcast=True)
    low, high = (key & 0xFFFFFFFF).to(tl.uint32), (key >> 32).to(tl.uint32)
    call = epoch.to(tl.uint32, bitcast=True)
    plane = row * FLIPS
    if FLIPS == 2:
        word, _1, _2, _3 = tl.philox(seed, low * 0 + 0xFFFFFFFF, low, high, call)
        plane += (word >> 31).to(tl.int64)

    channel = (block * 4 // spatial)[:, None] if WHOLE else element // spatial
    # Padding would read past the channels.
    channel = tl.minimum(channel, channels - 1)
    values_ptr = moments_ptr + plane * elements * (2 if HAS_LOGVAR else 1) + element
    # Converted at once: the interpreter computes garbage on bfloat16.
    x = tl.load(values_ptr, mask=mask).to(tl.float32)
    if SCALES == 1:
        x *= tl.load(scale_ptr + plane)
    if SCALES == 2:
        scale_ptr += plane * channels * (2 if HAS_LOGVAR else 1) + channel
        x *= tl.load(scale_ptr)
    if HAS_LOGVAR:
        logvar = tl.load(values_ptr + elements, mask=mask).to(tl.float32)
        if SCALES == 1:
            logvar *= tl.load(scale_ptr + plane)
        if SCALES == 2:
            logvar *= tl.load(scale_ptr + channels)
        w0, w1, w2, w3 = tl.philox(seed, block.to(tl.uint32, bitcast=True), low, high, call)
        r0, r1 = _radius(w0), _radius(w2)
        c0, s0 = _turn(w1)
        c1, s1 = _turn(w3)
        z = tl.join(tl.join(r0 * c0, r1 * c1), tl.join(r0 * s0, r1 * s1)).reshape(BLOCKS, 4)
        x += _deviation(logvar) * z
    if NORMALISE:
        x = tl.div_rn(x - tl.load(mean_ptr + channel), tl.load(std_ptr + channel) + tl.zeros_like(x))
    if INTERPRETED and out_ptr.dtype.element_ty == tl.bfloat16:  # it would truncate: round to nearest even
        bits = x.to(tl.uint32, bitcast=True)
        nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
        x = tl.where(x == x, nearest, x)
    tl.store(out_ptr + row * elements + element, x.to(out_ptr.dtype.element_ty), mask=mask)


def _word(value: int) -> int:
    """32 bits as the int32 that Triton passes."""
    value &= 0xFFFFFFFF
    return value - 2**32 if value >= 2**31 else value


def sample_posterior_triton(
    moments: Tensor,
    key_hash: Tensor,
    seed: int,
    epoch: int,
    mean: Tensor | None,
    std: Tensor | None,
    scale: Tensor | None,
    has_logvar: bool,
    out: Tensor,
) -> None:
    """Launch over contiguous tensors, as checked by `fastlatent.ops.sample_posterior.sample_posterior`."""
    if out.numel() == 0:
        return  # a CUDA grid cannot be empty
    batch, channels = out.shape[:2]
    elements = out.numel() // batch
    spatial = elements // channels
    tiles = triton.cdiv(elements, 4 * BLOCKS)
    sample_posterior_kernel[(batch * tiles,)](
        moments, key_hash, mean, std, scale, out,
        _word(seed), _word(seed >> 32), _word(epoch), channels, spatial, tiles,
        FLIPS=moments.shape[1], SCALES=0 if scale is None else scale.ndim - 1, HAS_LOGVAR=has_logvar,
        NORMALISE=mean is not None, WHOLE=spatial % 4 == 0, INTERPRETED=os.environ.get("TRITON_INTERPRET") == "1",
        BLOCKS=BLOCKS, **OPTIONS,
    )  # fmt: skip


def aot_cases() -> list[dict[str, Any]]:
    """What tools/kernel_table compiles: each case specialised as the launcher's arguments are."""
    torch_dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "i8": torch.int8}
    cases = []
    for moments, out, flips, channels, spatial, scales, has_logvar, normalise in (
        ("fp16", "fp32", 1, 16, 1024, 0, True, False),
        ("fp16", "bf16", 2, 16, 1024, 0, True, True),
        ("bf16", "fp32", 2, 16, 1024, 0, True, True),
        ("fp32", "fp32", 2, 16, 1024, 0, True, True),
        ("i8", "bf16", 2, 16, 1024, 2, True, True),
        ("i8", "fp32", 1, 16, 1024, 1, False, True),
        ("fp16", "fp16", 2, 16, 1024, 0, False, False),
        ("fp16", "fp32", 2, 16, 49, 0, True, True),  # 7 x 7: blocks cross channels, rows are not aligned
        ("fp32", "fp32", 2, 16, 1, 0, True, True),  # a size of 1 is specialised as a constant
    ):
        tiles = triton.cdiv(channels * spatial, 4 * BLOCKS)
        constants: dict[str, Any] = {
            "FLIPS": flips, "SCALES": scales, "HAS_LOGVAR": has_logvar, "NORMALISE": normalise,
            "WHOLE": spatial % 4 == 0, "INTERPRETED": False, "BLOCKS": BLOCKS,
        }  # fmt: skip
        constants |= {name: 1 for name, size in (("spatial", spatial), ("tiles", tiles)) if size == 1}
        constants |= {} if normalise else {"mean_ptr": None, "std_ptr": None}
        constants |= {} if scales else {"scale_ptr": None}
        signature = {"moments_ptr": f"*{moments}", "key_hash_ptr": "*i64", "out_ptr": f"*{out}"}
        signature |= dict.fromkeys(("mean_ptr", "std_ptr", "scale_ptr"), "*fp32")
        signature |= dict.fromkeys(("seed_low", "seed_high", "epoch", "channels", "spatial", "tiles"), "i32")
        sizes = {9: channels, 10: spatial, 11: tiles}

        def launch(arguments=(moments, out, flips, channels, spatial, scales, has_logvar, normalise)) -> None:
            moments, out, flips, channels, spatial, scales, has_logvar, normalise = arguments
            stored = 2 * channels if has_logvar else channels
            per_channel = torch.empty(channels, device="meta") if normalise else None
            sample_posterior_triton(
                torch.empty(3, flips, stored, spatial, dtype=torch_dtypes[moments], device="meta"),
                torch.empty(3, dtype=torch.int64, device="meta"), 0, 0, per_channel, per_channel,
                torch.empty((3, flips, stored)[: scales + 1], device="meta") if scales else None, has_logvar,
                torch.empty(3, channels, spatial, dtype=torch_dtypes[out], device="meta"),
            )  # fmt: skip

        name = f"{moments} to {out}, F {flips}, {channels} x {spatial}"
        name += "" if has_logvar else ", no logvar"
        name += (", normalised" if normalise else "") + (", scaled" if scales else "")
        cases.append(
            {
                "name": name,
                "kernel": sample_posterior_kernel,
                "signature": signature | dict.fromkeys(constants, "constexpr"),
                "constants": constants,
                "attrs": {(i,): [["tt.divisibility", 16]] for i in range(6)}
                | {(i,): [["tt.divisibility", 16]] for i, size in sizes.items() if size % 16 == 0},
                "options": OPTIONS,
                "wgmma": False,
                "launch": launch,
            }
        )
    return cases
