"""Stored latents of one denoising step: .npy, .pt and .safetensors files, zipped or not, perhaps damaged or hostile."""

from __future__ import annotations

import math
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from torch import Tensor

from fastlatent.data.array_files import DamagedArrays, find_latent, read_npy, read_pt, read_safetensors
from fastlatent.sources.experiment import SUFFIXES

MAX_BYTES = 64 << 30  # of one latent; 241 frames at 1280×720 in float32 are 57 MB
_BITS = (np.dtype("<u2"), np.dtype("<i2"))  # bfloat16 through a view, as torch's users and ml_dtypes save it


@dataclass(frozen=True)
class StepLatents:
    """A latent as it was stored.

    Attributes:
        values: any rank, contiguous, one of FLOATS; may hold NaN and infinities.
        digest: xxh3_128 of the file's bytes, 32 hexadecimal digits.
        notes: what was chosen or set aside in reading it, for the user.
    """

    values: Tensor
    digest: str
    notes: tuple[str, ...] = ()


def read_step(path: Path) -> StepLatents:
    """Read one of sources.experiment.SUFFIXES, whole.

    .npy: one array of floats. .pt and .safetensors: what `array_files.extract_latent` takes of what is in them.

    Raises:
        ValueError: no file that can be read, damaged, or something else than one array of floats; says what was
            expected, what came and what to do.
    """
    path = Path(path)
    suffix = next((suffix for suffix in SUFFIXES if path.name.endswith(suffix)), None)
    if suffix is None:
        raise ValueError(f"{path}: expected a name that ends in one of {', '.join(SUFFIXES)}")
    try:
        data = _read(path)
        zipped = suffix.endswith(".gz")
        _check_zipped(path, data, zipped)
        loaded: Any
        if suffix.startswith(".npy"):
            loaded = read_npy(data)
            if loaded.dtype in _BITS:
                raise DamagedArrays(
                    f"expected floats, got {loaded.dtype}, as bfloat16 is often saved; if so, this makes them float32: "
                    f"{_bfloat16_line(path)}"
                )
        elif suffix.startswith(".pt"):
            loaded = read_pt(data)
        else:
            loaded = read_safetensors(data)[0]
        values, note = find_latent(loaded)
    except MemoryError:
        raise ValueError(f"{path}: not enough memory to read it") from None
    except DamagedArrays as error:
        raise ValueError(f"{path}: {error}") from None
    return StepLatents(values, xxhash.xxh3_128_hexdigest(data), (note,) if note else ())


def statistics(values: Tensor) -> dict[str, Any]:
    """shape, dtype, and mean, std (of the population), min, max of the finite values in float64; ready for JSON.

    None stands for a number that does not exist, or not in float64. "nan" counts the values that are NaN or infinite.
    """
    finite = values.double()
    if not (there := finite.isfinite()).all():  # 177 ms of indexing, for a few
        finite = finite[there]
    numbers = {"mean": math.nan, "std": math.nan, "min": math.nan, "max": math.nan}
    if finite.numel():
        mean, std = finite.mean(), finite.std(correction=0)  # 2 ms for 1.6 M values; std_mean takes 29
        low, high = finite.aminmax()
        numbers = {"mean": mean.item(), "std": std.item(), "min": low.item(), "max": high.item()}
    return {
        "shape": list(values.shape),
        "dtype": str(values.dtype).removeprefix("torch."),
        **{name: number if math.isfinite(number) else None for name, number in numbers.items()},
        "nan": values.numel() - finite.numel(),
    }


def _read(path: Path) -> bytearray:
    """All bytes of a regular file, writable."""
    try:
        status = os.stat(path)  # first: to open a pipe waits for its writer
        if not stat.S_ISREG(status.st_mode):
            kind = "folder" if stat.S_ISDIR(status.st_mode) else "pipe or device"
            raise ValueError(f"{path}: expected a file of latents, got a {kind}")
        if not 0 < status.st_size <= MAX_BYTES:
            raise ValueError(f"{path}: expected latents, 1 to {MAX_BYTES} bytes, got {status.st_size}; make it again")
        data = bytearray(status.st_size)
        with open(path, "rb", buffering=0) as file:
            view, done = memoryview(data), 0
            while done < len(data) and (count := file.readinto(view[done:])):
                done += count
    except OSError as error:
        link = f" (a link to {os.readlink(path)})" if path.is_symlink() else ""
        raise ValueError(f"{path}{link}: cannot be read: {error.strerror}") from None
    if done < len(data):
        raise ValueError(f"{path}: expected {len(data)} bytes, got {done}: it is being written; wait for its writer")
    return data


def _check_zipped(path: Path, data: bytearray, zipped: bool) -> None:
    if zipped != data.startswith(b"\x1f\x8b"):
        other = path.name.removesuffix(".gz") if zipped else f"{path.name}.gz"
        came, hint = ("something else", "; if it is not zipped,") if zipped else ("a gzip file", ";")
        expected = "gzip" if zipped else path.suffix
        raise ValueError(f"{path}: expected a {expected} file by its name, got {came}{hint} rename it to {other}")


def _bfloat16_line(path: Path) -> str:
    """Python that rewrites a .npy or .npy.gz of bfloat16's bits as float32, in its place."""
    name = repr(str(path))
    source, target = (f"gzip.open({name})", f'gzip.open({name}, "wb")') if path.suffix == ".gz" else (name, name)
    return (
        f"import gzip, numpy as n; a = n.load({source}).view(n.uint16).astype(n.uint32) << 16; "
        f"n.save({target}, a.view(n.float32))"
    )
