"""resize: Pillow's resampling of one image, exact to the bit, and only of the window that is kept."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fastlatent import _native
from fastlatent.ops._library import LIBRARY

FILTERS = ("box", "bilinear", "bicubic", "lanczos")
# How far a filter reaches to either side, in pixels of the output where it shrinks, else of the source.
_SUPPORT = (0.5, 1.0, 2.0, 3.0)
WEIGHT_BITS = 22
# Of the source: places in it are int32. Of the output: its pixels' centres must be exact in float64.
_MAX_SOURCE, _MAX_SIDE = 2**31 - 1, 2**52

# SymInt: an image of another size must not compile the caller again. filter is an index into FILTERS.
LIBRARY.define(
    "resize(Tensor image, SymInt height, SymInt width, int filter, SymInt top, SymInt left, SymInt crop_height, "
    "SymInt crop_width) -> Tensor"
)


def resize(
    image: Tensor,
    height: int,
    width: int,
    filter: str,
    *,
    top: int = 0,
    left: int = 0,
    crop_height: int | None = None,
    crop_width: int | None = None,
) -> Tensor:
    """resize(image to height x width)[top : top + crop_height, left : left + crop_width], as Pillow resizes.

    The horizontal pass comes first, then the vertical one; a side that keeps its size has none. With s = the source's
    side / the output's, c = (i + 1/2) s and t = max(s, 1), pixel i of a pass is the sum of w(j) source(j) over j from
    floor(c - r t + 1/2) up to but without floor(c + r t + 1/2), inside the source, r the filter's reach. The weights
    w(j) = f((j - c + 1/2) / t), divided by their sum, are float64. Reach and f of each filter:

        box       1/2   1 in (-1/2, 1/2]
        bilinear  1     1 - |x|
        bicubic   2     Keys' cubic with a = -1/2 (IEEE Trans. ASSP 29, 1981)
        lanczos   3     sinc(x) sinc(x / 3)

    uint8: the weights are rounded to multiples of 2^-22 and each pass's integer sum to the nearest uint8 (a half goes
    up; clamped). Every device gives the same bytes: those of Pillow. float32: sums in float64, in order and unfused,
    rounded to float32 after each pass: Pillow's mode "F", channel by channel; not clamped.

    Pillow from 13.0 on does the vertical pass first where more than twice as many rows as columns fall away (and from
    12.2 on for images over 100 times as high as wide); this op has the one order of every Pillow before.
    Alpha is a channel like any other, never multiplied in.

    Args:
        image: [H, W, C] uint8 or float32, C 1 to 4, no side empty. Copied where not contiguous.
        height, width: of the whole resized image, which is never made: up to 2^52.
        filter: "box", "bilinear", "bicubic" or "lanczos".
        top, left, crop_height, crop_width: the window, inside the resized image; by default all of it from (top, left).

    Returns:
        [crop_height, crop_width, C] of the image's dtype and device.

    Raises:
        ValueError: an argument is not as above, or the image requires grad.
        RuntimeError: the compiled library is missing.
    """
    crop_height = height - top if crop_height is None else crop_height
    crop_width = width - left if crop_width is None else crop_width
    if image.ndim != 3 or not 1 <= image.shape[2] <= 4 or image.dtype not in (torch.uint8, torch.float32):
        raise ValueError(f"resize: expected an image [H, W, 1 to 4] of uint8 or float32, got {_describe(image)}")
    if image.shape[0] < 1 or image.shape[1] < 1 or max(image.shape[:2]) > _MAX_SOURCE:
        raise ValueError(f"resize: expected an image with sides of 1 to 2^31 - 1 pixels, got {_describe(image)}")
    if image.requires_grad:
        raise ValueError("resize: expected an image without gradient, got one; this op only runs forward: detach it")
    if filter not in FILTERS:
        raise ValueError(f"resize: expected a filter of {', '.join(FILTERS)}, got {filter!r}")
    if not (1 <= height <= _MAX_SIDE and 1 <= width <= _MAX_SIDE):
        raise ValueError(f"resize: expected a height and width of 1 to 2^52 pixels, got {height} x {width}")
    if not (
        0 <= top < top + crop_height <= height
        and 0 <= left < left + crop_width <= width
        and crop_height > 0
        and crop_width > 0
    ):
        raise ValueError(
            f"resize: expected a window of at least one pixel inside {height} x {width}, got {crop_height} x "
            f"{crop_width} at ({top}, {left})"
        )
    return torch.ops.fastlatent.resize.default(
        image, height, width, FILTERS.index(filter), top, left, crop_height, crop_width
    )


def resize_reference(
    image: Tensor, height: int, width: int, filter: int, top: int, left: int, crop_height: int, crop_width: int
) -> Tensor:
    """The definition of `resize`, in plain torch."""
    image = _pass(image, 1, width, filter, left, crop_width)
    return _pass(image, 0, height, filter, top, crop_height).clone(memory_format=torch.contiguous_format)


def _pass(image: Tensor, axis: int, size: int, filter: int, first: int, count: int) -> Tensor:
    if size == image.shape[axis]:
        return image.narrow(axis, first, count)
    weights_of_pass = _weights_reference(image.shape[axis], size, filter, first, count)
    begins, ends, weights = (part.to(image.device) for part in weights_of_pass)
    per_pixel = (1, -1, 1) if axis == 1 else (-1, 1, 1)
    shape = list(image.shape)
    shape[axis] = count
    if image.dtype == torch.uint8:
        weights = (weights * 2**WEIGHT_BITS + torch.where(weights < 0, -0.5, 0.5)).long()  # .long() cuts towards 0
        sums = torch.full(shape, 2 ** (WEIGHT_BITS - 1), dtype=torch.int64, device=image.device)
    else:
        sums = torch.zeros(shape, dtype=torch.float64, device=image.device)
    for k in range(weights.shape[1]):
        source = image.index_select(axis, (begins + k).clamp(max=image.shape[axis] - 1)).to(sums.dtype)
        present = (begins + k < ends).reshape(per_pixel)
        sums += torch.where(present, source * weights[:, k].reshape(per_pixel), 0)
    if image.dtype == torch.uint8:
        return (sums >> WEIGHT_BITS).clamp(0, 255).to(torch.uint8)
    return sums.float()


def _weights_reference(in_size: int, out_size: int, filter: int, first: int, count: int) -> tuple[Tensor, ...]:
    """Where the source pixels of each output pixel begin and end, int64 [count], and weights, float64 [count, taps]."""
    scale = in_size / out_size
    stretch = max(scale, 1.0)
    reach = _SUPPORT[filter] * stretch
    centers = (torch.arange(first, first + count, dtype=torch.float64) + 0.5) * scale
    begins = (centers - reach + 0.5).long().clamp(min=0)
    ends = (centers + reach + 0.5).long().clamp(max=in_size)
    places = begins[:, None] + torch.arange(_taps(in_size, out_size, filter))
    values = _filter(filter, (places - centers[:, None] + 0.5) * (1.0 / stretch))
    values = torch.where(places < ends[:, None], values, 0.0)
    sums = values.cumsum(1)[:, -1:]  # one after the other, as the other implementations add
    return begins, ends, torch.where(sums != 0, values / sums, values)


def _filter(filter: int, x: Tensor) -> Tensor:
    if FILTERS[filter] == "box":
        return ((x > -0.5) & (x <= 0.5)).double()
    if FILTERS[filter] == "lanczos":
        return torch.where((x >= -3) & (x < 3), _sinc(x) * _sinc(x / 3), 0.0)
    x = x.abs()
    if FILTERS[filter] == "bilinear":
        return (1 - x).clamp(min=0)
    inner, outer = (1.5 * x - 2.5) * x * x + 1, (((x - 5) * x + 8) * x - 4) * -0.5
    return torch.where(x < 1, inner, torch.where(x < 2, outer, 0.0))


def _sinc(x: Tensor) -> Tensor:
    x = x * math.pi
    return torch.where(x == 0, 1.0, x.sin() / x)


def _taps(in_size: int, out_size: int, filter: int) -> int:
    return math.ceil(_SUPPORT[filter] * max(in_size / out_size, 1.0)) * 2 + 1


def _cpu(
    image: Tensor, height: int, width: int, filter: int, top: int, left: int, crop_height: int, crop_width: int
) -> Tensor:
    image = image.contiguous()
    out = image.new_empty((crop_height, crop_width, image.shape[2]))
    _native.call(
        "cpu", "resize", image.data_ptr(), out.data_ptr(), *image.shape, height, width, filter, top, left, crop_height,
        crop_width, image.dtype == torch.float32,
    )  # fmt: skip
    return out


@dataclass(frozen=True)
class PassWeights:
    """One pass as kernels/resize.py takes it: bounds int32 [count, 2], where the weights of a pixel begin in the source
    and how many they are; weights [count, taps] int32 or float64. The source is read in [begin, end)."""

    bounds: Tensor
    weights: Tensor
    begin: int
    end: int


# An entry is 10 to 30 KiB for photographs, and many files have the same size.
@functools.lru_cache(maxsize=512)
def _pass_weights(
    in_size: int, out_size: int, filter: int, first: int, count: int, is_float: bool, device: torch.device
) -> PassWeights:
    taps = _taps(in_size, out_size, filter)
    bounds = torch.empty(count, 2, dtype=torch.int32)
    weights = torch.empty(count, taps, dtype=torch.float64 if is_float else torch.int32)
    _native.call(
        "cpu", "resize_weights", in_size, out_size, filter, first, count, taps, bounds.data_ptr(), weights.data_ptr(),
        is_float,
    )  # fmt: skip
    return PassWeights(bounds.to(device), weights.to(device), int(bounds[0, 0]), int(bounds[-1].sum()))


def resize_by_triton(
    image: Tensor, height: int, width: int, filter: int, top: int, left: int, crop_height: int, crop_width: int
) -> Tensor:
    """Both passes by Triton on the image's device: CUDA, or the CPU where Triton interprets."""
    from fastlatent.kernels.resize import resize_columns_triton, resize_rows_triton

    is_float, channels = image.dtype == torch.float32, image.shape[2]
    across = down = None
    if width != image.shape[1]:
        across = _pass_weights(image.shape[1], width, filter, left, crop_width, is_float, image.device)
    if height != image.shape[0]:
        down = _pass_weights(image.shape[0], height, filter, top, crop_height, is_float, image.device)
    for used in (across, down):
        if used is not None and image.is_cuda:  # the cache may drop them while a kernel of this stream still waits
            used.bounds.record_stream(torch.cuda.current_stream())
            used.weights.record_stream(torch.cuda.current_stream())
    # The rows of the source that the vertical pass reads; without one, those of the window.
    begin, end = (top, top + crop_height) if down is None else (down.begin, down.end)
    image = image[begin:end].contiguous()
    if across is not None:
        out = image.new_empty((end - begin, crop_width, channels))
        resize_rows_triton(image, across.bounds, across.weights, out)
        image, left = out, 0
    if down is None:
        window = image[:, left : left + crop_width]
        return window if across is not None else window.clone(memory_format=torch.contiguous_format)
    out = image.new_empty((crop_height, crop_width, channels))
    resize_columns_triton(image, down.bounds, down.weights, out, begin=begin, left=left)
    return out


def _cuda(
    image: Tensor, height: int, width: int, filter: int, top: int, left: int, crop_height: int, crop_width: int
) -> Tensor:
    with torch.cuda.device(image.device):
        return resize_by_triton(image, height, width, filter, top, left, crop_height, crop_width)


def _describe(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} {tensor.dtype} on {tensor.device}"


LIBRARY.impl("resize", resize_reference, "CompositeExplicitAutograd")
LIBRARY.impl("resize", _cpu, "CPU")
LIBRARY.impl("resize", _cuda, "CUDA")


@torch.library.register_fake("fastlatent::resize", lib=LIBRARY)
def _fake(
    image: Tensor, height: int, width: int, filter: int, top: int, left: int, crop_height: int, crop_width: int
) -> Tensor:
    return image.new_empty((crop_height, crop_width, image.shape[2]))
