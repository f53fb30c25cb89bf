"""Triton kernel for fastlatent.ops.resize: one pass, along the rows or along the columns."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Rows and numbers in a row of a program's tile: 512 numbers, four for each thread of 4 warps.
TILE = (4, 128)
# Pillow multiplies and adds floats in double without fusing; products of bytes are exact.
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}


# Sizes differ from image to image, and images of a decoded batch begin anywhere: one compilation serves them all.
@triton.jit(
    do_not_specialize=["rows", "length", "stride", "begin", "left", "taps", "tiles"],
    do_not_specialize_on_alignment=["image_ptr", "bounds_ptr", "weights_ptr", "out_ptr"],
)
def resize_pass_kernel(
    image_ptr,
    bounds_ptr,
    weights_ptr,
    out_ptr,
    rows,
    length,  # numbers in a row of out
    stride,  # numbers in a row of the image
    begin,  # row of the source that is the image's first
    left,  # number in a row of the image that is out's first
    taps,
    tiles,
    CHANNELS: tl.constexpr,  # 0: along the columns, where they do not matter
    TILE_ROWS: tl.constexpr,
    TILE_NUMBERS: tl.constexpr,
):
    program = tl.program_id(0)
    row = (program // tiles) * TILE_ROWS + tl.arange(0, TILE_ROWS)[:, None]
    number = (program % tiles) * TILE_NUMBERS + tl.arange(0, TILE_NUMBERS)[None, :]
    mask = (row < rows) & (number < length)
    # int64: an image may have 2^31 numbers or more.
    if CHANNELS:
        pixel = tl.minimum(number, length - 1) // CHANNELS
        step = CHANNELS
    else:
        pixel = tl.minimum(row, rows - 1)
        step = stride
    first = tl.load(bounds_ptr + 2 * pixel)
    count = tl.load(bounds_ptr + 2 * pixel + 1)
    weights_ptr += pixel.to(tl.int64) * taps
    if CHANNELS:
        image_ptr += row.to(tl.int64) * stride + first * CHANNELS + number % CHANNELS
    else:
        image_ptr += (first - begin).to(tl.int64) * stride + left + number
    if image_ptr.dtype.element_ty == tl.uint8:
        total = tl.full([TILE_ROWS, TILE_NUMBERS], 1 << 21, tl.int32)
    else:
        total = tl.zeros([TILE_ROWS, TILE_NUMBERS], tl.float64)
    for k in range(taps):
        value = tl.load(image_ptr, mask=mask & (k < count), other=0)
        # Weights that a pixel does not have are 0, and so is then the value: nothing is added.
        total += value.to(total.dtype) * tl.load(weights_ptr + k)
        image_ptr += step
    if out_ptr.dtype.element_ty == tl.uint8:
        result = tl.minimum(tl.maximum(total >> 22, 0), 255).to(tl.uint8)
    else:
        result = total.to(tl.float32)
    tl.store(out_ptr + row.to(tl.int64) * length + number, result, mask=mask)


def resize_rows_triton(image: Tensor, bounds: Tensor, weights: Tensor, out: Tensor) -> None:
    """Horizontal pass: contiguous image [rows, W, C] to out [rows, w, C]; bounds [w, 2], weights [w, taps]."""
    _launch(image, bounds, weights, out, 0, 0, image.shape[2])


def resize_columns_triton(
    image: Tensor, bounds: Tensor, weights: Tensor, out: Tensor, *, begin: int, left: int
) -> None:
    """Vertical pass: contiguous image [rows, W, C], whose first row is row `begin` of the source, to out [h, w, C],
    whose first column is column `left` of the image; bounds [h, 2], weights [h, taps]."""
    _launch(image, bounds, weights, out, begin, left * image.shape[2], 0)


def _launch(image: Tensor, bounds: Tensor, weights: Tensor, out: Tensor, begin: int, left: int, channels: int) -> None:
    rows, length = out.shape[0], out.shape[1] * out.shape[2]
    tiles = triton.cdiv(length, TILE[1])
    resize_pass_kernel[(triton.cdiv(rows, TILE[0]) * tiles,)](
        image, bounds, weights, out, rows, length, image[0].numel(), begin, left, weights.shape[1], tiles,
        CHANNELS=channels, TILE_ROWS=TILE[0], TILE_NUMBERS=TILE[1], **OPTIONS,
    )  # fmt: skip


def aot_cases() -> list[dict[str, Any]]:
    """What tools/kernel_table compiles: each case specialised as the launcher's arguments are."""
    cases = []
    for name, kind, torch_kind, weight, channels in (
        ("u8, along rows, 3 channels", "u8", torch.uint8, "i32", 3),
        ("u8, along rows, 1 channel", "u8", torch.uint8, "i32", 1),
        ("u8, along columns", "u8", torch.uint8, "i32", 0),
        ("fp32, along rows, 3 channels", "fp32", torch.float32, "fp64", 3),
        ("fp32, along columns", "fp32", torch.float32, "fp64", 0),
    ):
        constants = {"CHANNELS": channels, "TILE_ROWS": TILE[0], "TILE_NUMBERS": TILE[1]}
        signature = {"image_ptr": f"*{kind}", "bounds_ptr": "*i32", "weights_ptr": f"*{weight}", "out_ptr": f"*{kind}"}
        sizes = ("rows", "length", "stride", "begin", "left", "taps", "tiles")
        signature |= dict.fromkeys(sizes, "i32") | dict.fromkeys(constants, "constexpr")

        def launch(torch_kind: torch.dtype = torch_kind, weight: str = weight, channels: int = channels) -> None:
            image = torch.empty(16, 32, channels or 3, dtype=torch_kind, device="meta")
            weights = torch.empty(16, 5, dtype=torch.int32 if weight == "i32" else torch.float64, device="meta")
            bounds = torch.empty(16, 2, dtype=torch.int32, device="meta")
            if channels:
                resize_rows_triton(image, bounds, weights, image.new_empty(16, 16, channels))
            else:
                resize_columns_triton(image, bounds, weights, image, begin=0, left=0)

        cases.append(
            {
                "name": name,
                "kernel": resize_pass_kernel,
                "signature": signature,
                "constants": constants,
                "attrs": {},
                "options": OPTIONS,
                "wgmma": False,
                "launch": launch,
            }
        )
    return cases
