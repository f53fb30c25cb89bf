"""Latents in files of others (.npz, .npy, .pt, LightningDiT's shards): shapes are read first, rows when asked for.

Nothing is unpickled but tensors and arrays, and nothing is allocated because a header claims it.
"""

from __future__ import annotations

import math
import weakref
import zipfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from fastlatent.data.array_files import map_pt
from fastlatent.data.numpy_files import npy_begin, npy_header

# What latents are called in a file that holds several arrays; the first that is there counts. Moments are mean‖logvar.
NAMES = ("moments", "latents", "latent", "arr_0")
MAX_IMAGE = 1 << 27  # numbers of one image's latent; 16,384² pixels at a stride of 8 have 32 channels in it
_INFLATED = 1032  # deflate makes at most this of one byte


@dataclass(frozen=True)
class LatentArray:
    """An array of one file. shape: [C, h, w] or [N, C, h, w]. rows: those from begin to end, float32 [n, C, h, w].

    is_moments: C are the channels of mean‖logvar.
    """

    shape: tuple[int, ...]
    is_moments: bool
    rows: Callable[[int, int], Tensor]

    @property
    def count(self) -> int:
        return self.shape[0] if len(self.shape) == 4 else 1

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of the latents in it."""
        channels, height, width = self.shape[-3:]
        return channels // 2 if self.is_moments else channels, height, width

    def latents(self, begin: int, end: int) -> Tensor:
        """float32 [end − begin, C, h, w] of latents (means of moments) on the CPU."""
        return self.rows(begin, end)[:, : self.latent_shape[0]]


class LatentArrays:
    """The arrays of one file, opened for reading; a context manager.

    Raises:
        ValueError: the file is damaged, pickled, or holds no latents of images; the message names it.
    """

    def __init__(self, path: Path) -> None:
        self.path, stack = path, ExitStack()
        self._close = weakref.finalize(self, stack.close)
        try:
            self.arrays = [_checked(path, *found) for found in READERS[path.suffix.lower()](path, stack)]
        except BaseException as error:
            self.close()
            if not isinstance(error, Exception):
                raise
            raise _unreadable(path, error) from None  # damaged files raise whatever their bytes happen to mean

    def close(self) -> None:
        self._close()

    def __enter__(self) -> LatentArrays:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


Rows = Callable[[int, int], Tensor]
Found = tuple[tuple[int, ...], bool, Rows]  # shape, whether moments, what reads them


def _checked(path: Path, shape: tuple[int, ...], is_moments: bool, rows: Rows) -> LatentArray:
    if len(shape) not in (3, 4) or min(shape) < 1:  # a header may also claim negative sizes, of which two cancel
        raise ValueError(f"expected latents of images [C, h, w] or [N, C, h, w], got {list(shape)}")
    if is_moments and shape[-3] % 2:
        raise ValueError(f"expected moments (mean‖logvar) of an even number of channels, got {list(shape)}")
    if math.prod(shape[-3:]) > MAX_IMAGE:
        raise ValueError(f"expected at most {MAX_IMAGE} numbers for an image, got {list(shape)}")

    def read(begin: int, end: int) -> Tensor:
        try:
            return rows(begin, end).detach().float()
        except Exception as error:
            raise _unreadable(path, error) from None

    return LatentArray(shape, is_moments, read)


def _unreadable(path: Path, error: Exception) -> ValueError:
    return ValueError(f"{path}: {' '.join((str(error) or repr(error)).split())[:400]}")


def _npy(path: Path, stack: ExitStack) -> list[Found]:
    return [_stream(stack.enter_context(open(path, "rb")), path.stat().st_size, is_moments=False)]


def _npz(path: Path, stack: ExitStack) -> list[Found]:
    archive = stack.enter_context(zipfile.ZipFile(path))
    members = {info.filename: info for info in archive.infolist()}
    name = next((name for name in NAMES if f"{name}.npy" in members), None)
    if name is None:
        raise ValueError(f"expected one of {', '.join(NAMES)}, it holds {', '.join(sorted(members)[:8]) or 'nothing'}")
    info = members[f"{name}.npy"]
    if info.compress_size > path.stat().st_size or info.file_size > _INFLATED * (info.compress_size + 1):
        raise ValueError(f"{name}: {info.compress_size} bytes cannot hold the {info.file_size} that it claims")
    return [_stream(stack.enter_context(archive.open(info)), info.file_size, is_moments=name == "moments")]


def _stream(stream: IO[bytes], size: int, *, is_moments: bool) -> Found:
    """An array in the format .npy of `size` bytes, read forwards where rows are asked for in their order."""
    start = stream.read(12)
    begin = npy_begin(start)
    header = npy_header(start + stream.read(begin - 12))
    dtype, shape, fortran = header
    if dtype.kind != "f":
        hint = ": if this is bfloat16, save its values as float32" if dtype == np.uint16 else ""
        raise ValueError(f"expected floats, got {dtype}{hint}")
    if fortran and len(shape) > 1:
        raise ValueError("expected rows one after another, got Fortran's order; save np.ascontiguousarray of it")
    if begin + header.nbytes != size:
        raise ValueError(f"expected {begin} + {list(shape)} × {dtype.itemsize} bytes, got {size}: it is truncated")
    row = math.prod(shape[-3:])

    def rows(first: int, last: int) -> Tensor:
        wanted = (last - first) * row * dtype.itemsize
        stream.seek(begin + first * row * dtype.itemsize)
        data = stream.read(wanted)
        if len(data) != wanted:
            raise ValueError(f"expected {wanted} bytes of the rows {first} to {last - 1}, got {len(data)}")
        values = np.frombuffer(data, dtype).astype(dtype.newbyteorder("="))
        return torch.from_numpy(values.reshape(-1, *shape[-3:]))

    return shape, is_moments, rows


def _pt(path: Path, stack: ExitStack) -> list[Found]:
    loaded = map_pt(path)
    name = None
    if isinstance(loaded, Mapping):
        name = next((name for name in NAMES if name in loaded), None)
        if name is None:
            raise ValueError(f"expected a dict with one of {', '.join(NAMES)}, it has {', '.join(map(repr, loaded))}")
        loaded = loaded[name]
    things = loaded if isinstance(loaded, list | tuple) else [loaded]
    tensors = [torch.from_numpy(thing) if isinstance(thing, np.ndarray) else thing for thing in things]
    for tensor in tensors:
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ValueError(f"expected tensors of floats (alone, in a list, or in a dict), got {kind}")
    if not tensors:
        raise ValueError("expected tensors of floats (alone, in a list, or in a dict), got an empty list")
    return [_tensor(tensor, name == "moments") for tensor in tensors]


def _tensor(tensor: Tensor, is_moments: bool) -> Found:
    batch = tensor if tensor.ndim == 4 else tensor.unsqueeze(0)
    return tuple(tensor.shape), is_moments, lambda first, last: batch[first:last]


def _shard(path: Path, stack: ExitStack) -> list[Found]:
    """`latents` of a shard of LightningDiT; raw, one sample of each image."""
    values = stack.enter_context(safe_open(path, "pt")).get_slice("latents")
    dtype, shape = values.get_dtype(), tuple(values.get_shape())
    if dtype not in ("F64", "F32", "F16", "BF16"):
        raise ValueError(f"latents: expected floats, got {dtype}")
    if len(shape) == 3:
        return [(shape, False, lambda first, last: values[:].unsqueeze(0))]
    return [(shape, False, lambda first, last: values[first:last])]


READERS: dict[str, Callable[[Path, ExitStack], list[Found]]] = {
    ".npz": _npz, ".npy": _npy, ".pt": _pt, ".pth": _pt, ".safetensors": _shard,
}  # fmt: skip
