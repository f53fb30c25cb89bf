"""Triton kernels for fastlatent.ops.group_norm_silu: moments of chunks, statistics of groups, the normalised output."""

from __future__ import annotations

import os
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Elements of a tile: 16 and 32 a thread. Moments keep two float32 arrays of it in registers beside what they load.
MOMENTS_TILE, NORMALISE_TILE = 2048, 4096
# Tiles that one program of moments takes in turn, unrolled. Its two numbers per channel are then 1.6 % of the bytes
# that it reads (channels_last, bfloat16: 256 pixels).
TILES = 8
# Channels of a channels_last tile: whole rows of 128 bytes in bfloat16.
ROW = 64
ENTRIES = 1024
OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}


@triton.jit
def _tile(program, pixel_blocks, channel_blocks, STEP: tl.constexpr, P: tl.constexpr, C: tl.constexpr):
    """Image, block of pixels, its first P pixels, and C channels of a program."""
    pixel_block = program % pixel_blocks
    program = program // pixel_blocks
    channel = (program % channel_blocks) * C + tl.arange(0, C)
    # int64: a batch passes 2^31 numbers at 256 images of 128 x 256 x 256.
    image = (program // channel_blocks).to(tl.int64)
    return image, pixel_block, pixel_block * STEP + tl.arange(0, P), channel


@triton.jit
def _offset(pixel, channel, channels, pixels, CHANNELS_LAST: tl.constexpr):
    if CHANNELS_LAST:
        return pixel[:, None] * channels + channel[None, :]
    return channel[None, :] * pixels + pixel[:, None]


@triton.jit
def moments_kernel(
    x_ptr,
    mean_ptr,
    square_ptr,
    channels,
    pixels,
    chunks,
    channel_blocks,
    CHANNELS_LAST: tl.constexpr,
    TILES: tl.constexpr,
    P: tl.constexpr,
    C: tl.constexpr,
):
    """[N, C, chunks] each: mean and sum of squared deviations from it, of TILES·P pixels."""
    image, chunk, pixel, channel = _tile(tl.program_id(0), chunks, channel_blocks, TILES * P, P, C)
    x_ptr += image * channels * pixels
    mean = tl.zeros((P, C), tl.float32)
    square = tl.zeros((P, C), tl.float32)
    # Welford's update, for each place of the tile alone: no exchange between threads, and nothing cancels.
    for tile in tl.static_range(TILES):
        there = pixel + tile * P
        mask = (there < pixels)[:, None] & (channel < channels)[None, :]
        offset = _offset(there, channel, channels, pixels, CHANNELS_LAST)
        # Converted at once: the interpreter computes garbage on bfloat16.
        x = tl.load(x_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        delta = tl.where(mask, x - mean, 0.0)
        mean += delta * (1.0 / (tile + 1))
        square += delta * (x - mean)
    count = tl.minimum(tl.maximum((pixels - pixel + P - 1) // P, 0), TILES).to(tl.float32)[:, None]
    total = tl.minimum(pixels - chunk * TILES * P, TILES * P).to(tl.float32)
    first = tl.sum(mean * count, axis=0) / total
    deviation = mean - first[None, :]
    # What rounding left in the first mean.
    rest = tl.sum(deviation * count, axis=0) / total
    square = tl.sum(square + deviation * deviation * count, axis=0) - total * rest * rest
    to = (image * channels + channel) * chunks + chunk
    tl.store(mean_ptr + to, first + rest, mask=channel < channels)
    tl.store(square_ptr + to, square, mask=channel < channels)


@triton.jit
def statistics_kernel(
    mean_ptr,
    square_ptr,
    statistics_ptr,
    group_channels,
    pixels,
    chunks,
    eps,
    SPAN: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    """[3, N·G]: the mean in two parts and 1 / deviation, of each group's entries."""
    group = tl.program_id(0).to(tl.int64)
    entries = group_channels * chunks
    mean_ptr += group * entries
    square_ptr += group * entries
    # float64: these are few numbers, and what they round all pixels of a group share.
    size = group_channels * pixels.to(tl.float64)
    sums = tl.zeros((ENTRIES,), tl.float64)
    squares = tl.zeros((ENTRIES,), tl.float64)
    for start in range(0, entries, ENTRIES):
        i = start + tl.arange(0, ENTRIES)
        count = tl.minimum(pixels - (i % chunks) * SPAN, SPAN).to(tl.float64)
        mean = tl.load(mean_ptr + i, mask=i < entries, other=0.0).to(tl.float64)
        square = tl.load(square_ptr + i, mask=i < entries, other=0.0).to(tl.float64)
        sums += mean * count
        squares += square + mean * mean * count
    mean = tl.sum(sums, axis=0) / size
    square = tl.sum(squares, axis=0) / size - mean * mean
    variance = tl.where(square < 0, 0.0, square)  # a NaN stays
    pivot = mean.to(tl.float32)
    all_groups = tl.num_programs(0)
    tl.store(statistics_ptr + group, pivot)
    tl.store(statistics_ptr + all_groups + group, (mean - pivot).to(tl.float32))
    tl.store(statistics_ptr + 2 * all_groups + group, (1 / tl.sqrt(variance + eps)).to(tl.float32))


@triton.jit
def normalise_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    statistics_ptr,
    out_ptr,
    channels,
    pixels,
    groups,
    all_groups,
    pixel_blocks,
    channel_blocks,
    SILU: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    INTERPRETED: tl.constexpr,
    P: tl.constexpr,
    C: tl.constexpr,
):
    # From the end: what moments_kernel read last may still be in the cache.
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    image, _block, pixel, channel = _tile(program, pixel_blocks, channel_blocks, P, P, C)
    x_ptr += image * channels * pixels
    out_ptr += image * channels * pixels
    mask = (pixel < pixels)[:, None] & (channel < channels)[None, :]
    offset = _offset(pixel, channel, channels, pixels, CHANNELS_LAST)
    x = tl.load(x_ptr + offset, mask=mask).to(tl.float32)
    # Padding would read past the groups.
    known = tl.minimum(channel, channels - 1)
    statistics_ptr += image * groups + known // (channels // groups)
    pivot = tl.load(statistics_ptr)
    factor = tl.load(statistics_ptr + 2 * all_groups) * tl.load(weight_ptr + known).to(tl.float32)
    # Far from zero a mean in float32 misses by up to half a last place, for all pixels alike: that goes here.
    shift = tl.load(bias_ptr + known).to(tl.float32) - tl.load(statistics_ptr + all_groups) * factor
    out = (x - pivot[None, :]) * factor[None, :] + shift[None, :]
    if SILU:
        out = out / (1 + tl.exp(-out))
    if INTERPRETED and out_ptr.dtype.element_ty == tl.bfloat16:  # it would truncate: round to nearest even
        bits = out.to(tl.uint32, bitcast=True)
        nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
        out = tl.where(out == out, nearest, out)
    tl.store(out_ptr + offset, out.to(out_ptr.dtype.element_ty), mask=mask)


def _tile_sizes(channels: int, pixels: int, channels_last: bool, elements: int) -> tuple[int, int]:
    """Pixels and channels of a tile, powers of two: along what is adjacent in memory first."""
    wide_channels, wide_pixels = triton.next_power_of_2(channels), triton.next_power_of_2(pixels)
    if channels_last:
        c = min(wide_channels, ROW)
        return min(wide_pixels, elements // c), c
    p = min(wide_pixels, elements)
    return p, min(wide_channels, elements // p)


def group_norm_silu_triton(
    x: Tensor, weight: Tensor, bias: Tensor, out: Tensor, groups: int, eps: float, silu: bool, channels_last: bool
) -> None:
    """Launch over tensors as checked by `fastlatent.ops.group_norm_silu`; x and out have one layout, the rest is
    contiguous."""
    if out.numel() == 0:
        return  # a CUDA grid cannot be empty
    batch, channels = x.shape[:2]
    pixels = x.shape[2] * x.shape[3]
    p, c = _tile_sizes(channels, pixels, channels_last, MOMENTS_TILE)
    chunks, channel_blocks = triton.cdiv(pixels, TILES * p), triton.cdiv(channels, c)
    mean = x.new_empty((batch, channels, chunks), dtype=torch.float32)
    square = torch.empty_like(mean)
    moments_kernel[(batch * channel_blocks * chunks,)](
        x, mean, square, channels, pixels, chunks, channel_blocks,
        CHANNELS_LAST=channels_last, TILES=TILES, P=p, C=c, **OPTIONS,
    )  # fmt: skip
    statistics = x.new_empty((3, batch * groups), dtype=torch.float32)
    statistics_kernel[(batch * groups,)](
        mean, square, statistics, channels // groups, pixels, chunks, eps, SPAN=TILES * p, ENTRIES=ENTRIES, **OPTIONS,
    )  # fmt: skip
    p, c = _tile_sizes(channels, pixels, channels_last, NORMALISE_TILE)
    pixel_blocks, channel_blocks = triton.cdiv(pixels, p), triton.cdiv(channels, c)
    normalise_kernel[(batch * pixel_blocks * channel_blocks,)](
        x, weight, bias, statistics, out, channels, pixels, groups, batch * groups, pixel_blocks, channel_blocks,
        SILU=silu, CHANNELS_LAST=channels_last, INTERPRETED=os.environ.get("TRITON_INTERPRET") == "1", P=p, C=c,
        **OPTIONS,
    )  # fmt: skip


def aot_cases() -> list[dict[str, Any]]:
    """The kernels at the sizes of SD's autoencoder, to compile ahead of time without a GPU."""
    shapes = [
        ("bf16", True, 128, 256, True), ("bf16", False, 128, 256, True), ("fp32", True, 128, 256, True),
        ("fp16", True, 96, 15, False),  # not aligned, one chunk
    ]  # fmt: skip
    return [case for shape in shapes for case in _aot_cases(*shape)]


def _aot_cases(dtype: str, channels_last: bool, channels: int, side: int, silu: bool) -> list[dict[str, Any]]:
    batch, groups, pixels = 4, 32, side * side
    torch_dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]

    def launch() -> None:
        x = torch.empty(batch, channels, side, side, dtype=torch_dtype, device="meta")
        per_channel = x.new_empty(channels)
        group_norm_silu_triton(x, per_channel, per_channel, x, groups, 1e-6, silu, channels_last)

    p, c = _tile_sizes(channels, pixels, channels_last, MOMENTS_TILE)
    chunks = triton.cdiv(pixels, TILES * p)
    shared: dict[str, Any] = {"channels": channels, "pixels": pixels, "chunks": chunks}
    shared["channel_blocks"] = triton.cdiv(channels, c)
    constants: dict[str, Any] = {"CHANNELS_LAST": channels_last, "TILES": TILES, "P": p, "C": c}
    pointers = {"x_ptr": f"*{dtype}", "mean_ptr": "*fp32", "square_ptr": "*fp32"}
    moments = _aot_case(moments_kernel, pointers, shared, constants)

    pointers = dict.fromkeys(("mean_ptr", "square_ptr", "statistics_ptr"), "*fp32")
    sizes = {"group_channels": channels // groups, "pixels": pixels, "chunks": chunks, "eps": 1e-6}
    statistics = _aot_case(statistics_kernel, pointers, sizes, {"SPAN": TILES * p, "ENTRIES": ENTRIES})

    p, c = _tile_sizes(channels, pixels, channels_last, NORMALISE_TILE)
    constants = {"SILU": silu, "CHANNELS_LAST": channels_last, "INTERPRETED": False, "P": p, "C": c}
    pointers = {"x_ptr": f"*{dtype}", "weight_ptr": f"*{dtype}", "bias_ptr": f"*{dtype}"}
    pointers |= {"statistics_ptr": "*fp32", "out_ptr": f"*{dtype}"}
    sizes = {"channels": channels, "pixels": pixels, "groups": groups, "all_groups": batch * groups}
    sizes |= {"pixel_blocks": triton.cdiv(pixels, p), "channel_blocks": triton.cdiv(channels, c)}
    normalise = _aot_case(normalise_kernel, pointers, sizes, constants)
    name = f"{dtype} {'NHWC' if channels_last else 'NCHW'} {channels} x {side}^2" + ("" if silu else ", no silu")
    cases = {"moments": moments, "statistics": statistics, "normalise": normalise}
    return [case | {"name": f"{part} {name}", "launch": launch} for part, case in cases.items()]


def _aot_case(
    kernel: Any, pointers: dict[str, str], sizes: dict[str, Any], constants: dict[str, Any]
) -> dict[str, Any]:
    """As triton specialises the launch: a size of 1 is a constant, multiples of 16 are told."""
    constants = {name: value for name, value in sizes.items() if value == 1} | constants
    signature = pointers | {name: "fp32" if isinstance(value, float) else "i32" for name, value in sizes.items()}
    divisible = [i for i, name in enumerate(kernel.arg_names) if name in pointers or sizes.get(name, 1) % 16 == 0]
    return {
        "kernel": kernel,
        "signature": signature | dict.fromkeys(constants, "constexpr"),
        "constants": constants,
        "attrs": {(i,): [["tt.divisibility", 16]] for i in divisible},
        "options": OPTIONS,
        "wgmma": False,
    }
