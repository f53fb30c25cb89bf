"""Stored latents of one denoising step: .npy, .pt and .safetensors files, zipped or not, perhaps damaged or hostile.

Nothing in a file is called or imported. What is allocated is counted first against what the file can hold.
"""

from __future__ import annotations

import ast
import gzip
import io
import math
import os
import re
import stat
import threading
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor

from fastlatent.sources.experiment import SUFFIXES

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
NAMES = ("latent", "latents")
MAX_BYTES = 64 << 30  # of one latent; 241 frames at 1280×720 in float32 are 57 MB
MAX_PT_BYTES = 4 << 30  # of an unzipped .pt.gz, which does not say how long it is
MAX_HEADER_BYTES = 10_000  # of .npy; numpy's own limit
MAX_AXES = 8
DEFLATE_RATIO = 1032  # no deflate stream becomes longer than this many times itself
CHUNK = 1 << 20

_SAFE_GLOBALS = threading.Lock()  # torch keeps the names that weights_only allows for the whole process

_NPY_DTYPES = {"f2": np.float16, "f4": np.float32, "f8": np.float64}
_BFLOAT16_BITS = ("u2", "i2", "V2")  # bfloat16 through a view, as torch's users and ml_dtypes save it
_SAFETENSORS_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}


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

    .npy: one array of floats. .pt: what torch.save writes (torch 1.6 or later), read with weights_only: a tensor or
    numpy array; a dict in which it is called latent or latents, or is the only one; a list or tuple of one of these.
    .safetensors: the same rule as for a dict.

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
        digest = xxhash.xxh3_128_hexdigest(data)
        zipped = suffix.endswith(".gz")
        _check_zipped(path, data, zipped)
        notes: tuple[str, ...] = ()
        if suffix.startswith(".npy"):
            values = _npy(path, data, zipped)
        elif suffix.startswith(".pt"):
            values, notes = _one(path, _pt(path, _unzipped(path, data) if zipped else data))
        else:
            values, notes = _one(path, _safetensors(path, data))
    except MemoryError:
        raise ValueError(f"{path}: not enough memory to read it") from None
    return StepLatents(_checked(path, values), digest, notes)


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


def _npy(path: Path, data: bytearray, zipped: bool) -> Tensor:
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(data)) if zipped else io.BytesIO(data) as file:
            dtype, shape, fortran, start = _npy_header(path, file)
            count = math.prod(shape) * dtype.itemsize
            most = MAX_BYTES if zipped else len(data) - start
            if zipped and count > DEFLATE_RATIO * len(data):
                most = DEFLATE_RATIO * len(data)
            body = bytearray(min(count, most))
            view, done = memoryview(body), 0
            while done < len(body) and (piece := file.read(min(CHUNK, len(body) - done))):
                view[done : done + len(piece)] = piece
                done += len(piece)
            if done < count:
                raise ValueError(
                    f"{path}: truncated: expected {count} bytes, {list(shape)} of {dtype}, got {done}; make it again"
                )
            if file.read(1):  # at a gzip file's end this compares its checksum
                raise ValueError(
                    f"{path}: expected {count} bytes, {list(shape)} of {dtype}, got more: it is damaged or holds "
                    "several arrays; make it again"
                )
    except (OSError, EOFError, zlib.error) as error:
        raise _damaged_gzip(path, error) from None
    array = np.frombuffer(body, dtype).reshape(shape, order="F" if fortran else "C")
    native = array.dtype.newbyteorder("=")
    return torch.from_numpy(np.ascontiguousarray(array, native).reshape(shape))


def _npy_header(path: Path, file: Any) -> tuple[np.dtype[Any], tuple[int, ...], bool, int]:
    """(dtype, shape, Fortran order, where the values start)."""
    start = file.read(8)
    if not start.startswith(b"\x93NUMPY"):
        raise ValueError(f"{path}: expected a .npy file of numpy.save, got one that starts with {start[:8]!r}")
    width = 2 if start[6:7] == b"\x01" else 4
    raw = file.read(width)
    length = int.from_bytes(raw, "little")
    if len(start) < 8 or len(raw) < width or not 0 < length <= MAX_HEADER_BYTES or start[6] not in (1, 2, 3):
        raise ValueError(f"{path}: the .npy header is damaged; make it again")
    text = file.read(length)
    if len(text) < length:
        raise ValueError(f"{path}: truncated in the .npy header; make it again")
    try:
        header = ast.literal_eval(text.decode("utf-8" if start[6] == 3 else "latin-1").strip()) or {}
        descr, fortran, shape = header["descr"], header["fortran_order"], header["shape"]
    except (ValueError, SyntaxError, TypeError, KeyError, MemoryError, RecursionError):
        raise ValueError(f"{path}: the .npy header is damaged; make it again") from None
    code = descr.lstrip("<>=|") if isinstance(descr, str) else ""
    if isinstance(descr, str) and code.startswith("O"):
        raise ValueError(
            f"{path}: expected an array of floats, got pickled objects, which are never read; save the array that is "
            "in it, as numpy.save(path, array.astype(numpy.float16))"
        )
    if code in _BFLOAT16_BITS:
        raise ValueError(
            f"{path}: expected floats, got {'void' if code == 'V2' else 'integers'} of 2 bytes ({descr}), as bfloat16 "
            f"is often saved; if so, this makes them float32: {_bfloat16_line(path)}"
        )
    if code not in _NPY_DTYPES:
        raise ValueError(
            f"{path}: expected float16, float32 or float64, got {descr!r:.80}; save latents as floats, before any "
            "rounding to integers"
        )
    sound = isinstance(shape, tuple) and all(type(side) is int and side >= 0 for side in shape)
    if not sound or not isinstance(fortran, bool) or len(shape) > MAX_AXES:
        raise ValueError(f"{path}: the .npy header is damaged: shape {shape!r:.80}; make it again")
    dtype = np.dtype(_NPY_DTYPES[code]).newbyteorder(">" if descr.startswith(">") else "<")
    if not 0 < math.prod(shape) * dtype.itemsize <= MAX_BYTES:
        raise ValueError(f"{path}: expected 1 to {MAX_BYTES} bytes of latents, got the shape {shape!r:.80}")
    return dtype, shape, fortran, 8 + width + length


def _bfloat16_line(path: Path) -> str:
    """Python that rewrites a .npy or .npy.gz of bfloat16's bits as float32, in its place."""
    name = repr(str(path))
    source, target = (f"gzip.open({name})", f'gzip.open({name}, "wb")') if path.suffix == ".gz" else (name, name)
    return (
        f"import gzip, numpy as n; a = n.load({source}).view(n.uint16).astype(n.uint32) << 16; "
        f"n.save({target}, a.view(n.float32))"
    )


def _unzipped(path: Path, data: bytearray) -> bytearray:
    whole = bytearray()
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(data)) as file:
            while piece := file.read(CHUNK):
                whole += piece
                if len(whole) > MAX_PT_BYTES:
                    raise ValueError(f"{path}: expected at most {MAX_PT_BYTES} bytes when unzipped, got more; unzip it")
    except (OSError, EOFError, zlib.error) as error:
        raise _damaged_gzip(path, error) from None
    return whole


def _damaged_gzip(path: Path, error: Exception) -> ValueError:
    what = "truncated" if isinstance(error, EOFError) else f"damaged ({error})"
    return ValueError(f"{path}: the gzip stream is {what}; make it again")


def _pt(path: Path, data: bytearray) -> Any:
    """What torch.save wrote, read with weights_only and numpy's arrays allowed."""
    sizes = _pt_records(path, data)
    reconstruct = np.empty(0).__reduce__()[0]
    allowed: list[Any] = [np.ndarray, np.dtype, *{type(np.dtype(code)) for code in "efdhHilqILQbB?"}]
    allowed += [(reconstruct, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")]
    try:
        with _SAFE_GLOBALS, torch.serialization.safe_globals(allowed):
            loaded = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    # Damaged pickles come out as UnpicklingError, RuntimeError, KeyError, IndexError, AssertionError, TypeError …
    except Exception as error:
        said = str(error)
        advice = "save the tensor alone: torch.save(latents.cpu(), path)"
        if refused := re.search(r"GLOBAL (\w+(?:\.\w+)*)", said):
            what = f"a pickle that needs {refused[1]}, which is never loaded"
        elif "Unsupported operand" in said:
            what = "a pickle of another protocol than torch.save's own, 2"
        else:
            what = f"what torch.load calls {' '.join(said.split('WeightsUnpickler error:')[-1].split()):.200}"
            advice = "make it again"
        raise ValueError(f"{path}: expected a tensor, got {what}; {advice}") from None
    _check_storages(path, loaded, sizes)
    return loaded


def _pt_records(path: Path, data: bytearray) -> set[int]:
    """Sizes of the storages in a .pt file, whose checksums are right.

    torch.load compares no checksums, and only newer ones compare a storage's size in the pickle with its record."""
    advice = "expected a file of torch.save (torch 1.6 or later: a zip archive)"
    plain, order = True, b"little"
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            records = archive.infolist()
            plain = sum(record.file_size for record in records) <= len(data)
            plain = plain and all(record.compress_type == zipfile.ZIP_STORED for record in records)
            for record in records if plain else ():
                if not record.CRC:  # torch.serialization.set_crc32_options(False): zipfile then compares nothing
                    record.CRC = None  # type: ignore[assignment]
                content = archive.read(record)
                order = content if record.filename.endswith("/byteorder") else order
    # Beside BadZipFile: ValueError, RuntimeError (encrypted), NotImplementedError (its version), EOFError …
    except Exception as error:
        got = f"one that starts with {bytes(data[:8])!r}" if not data.startswith(b"PK") else f"a damaged one: {error}"
        raise ValueError(f"{path}: {advice}, got {got:.200}; make it again") from None
    if not plain:
        raise ValueError(f"{path}: {advice}, got an archive whose records are compressed or overlap; make it again")
    if order != b"little":
        raise ValueError(f"{path}: expected little-endian tensors, got byte order {order[:8]!r}")
    return {record.file_size for record in records if "/data/" in record.filename}


def _check_storages(path: Path, loaded: Any, sizes: set[int], depth: int = 0) -> None:
    if isinstance(loaded, Tensor):
        if loaded.layout != torch.strided or loaded.is_quantized or loaded.device.type != "cpu":
            raise ValueError(f"{path}: expected a dense tensor, got {loaded.layout} on {loaded.device}")
        storage = loaded.untyped_storage().nbytes()
        if (storage and storage not in sizes) or loaded.numel() * loaded.element_size() > storage:
            raise ValueError(f"{path}: a tensor of shape {list(loaded.shape)} is larger than what is stored of it")
    elif isinstance(loaded, (list, tuple, Mapping)) and depth < 3:
        for value in loaded.values() if isinstance(loaded, Mapping) else loaded:
            _check_storages(path, value, sizes, depth + 1)


def _safetensors(path: Path, data: bytearray) -> dict[str, Tensor]:
    import safetensors

    try:
        named = dict(safetensors.deserialize(bytes(data)))
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: damaged or no .safetensors file ({error}); make it again") from None
    tensors = {}
    for name, entry in named.items():
        dtype = _SAFETENSORS_DTYPES.get(entry["dtype"])
        if dtype is None and (name in NAMES or len(named) == 1):
            raise ValueError(f"{path}: expected {name!r} in {', '.join(_SAFETENSORS_DTYPES)}, got {entry['dtype']}")
        if dtype is not None:
            content = torch.frombuffer(bytearray(entry["data"]), dtype=dtype) if entry["data"] else torch.empty(0)
            tensors[name] = content.reshape(entry["shape"])
    return tensors


def _one(path: Path, loaded: Any, depth: int = 0) -> tuple[Tensor, tuple[str, ...]]:
    """The one array in what was loaded, and a note of what was set aside."""
    rule = "expected a tensor, a dict with `latent` or `latents`, or a list of one"
    if isinstance(loaded, Tensor):
        return loaded, ()
    if isinstance(loaded, np.ndarray):
        if loaded.dtype not in _NPY_DTYPES.values() or loaded.ndim > MAX_AXES:
            raise ValueError(f"{path}: expected float16, float32 or float64, got a numpy array of {loaded.dtype}")
        return torch.from_numpy(np.array(loaded, order="C")), ()
    if isinstance(loaded, (list, tuple)) and len(loaded) == 1 and depth < 3:
        return _one(path, loaded[0], depth + 1)
    if isinstance(loaded, Mapping) and depth < 3:
        named = [name for name in NAMES if name in loaded]
        arrays = named or [name for name, value in loaded.items() if isinstance(value, (Tensor, np.ndarray))]
        if len(arrays) == 1:
            values, notes = _one(path, loaded[arrays[0]], depth + 1)
            others = ", ".join(str(name) for name in loaded if name != arrays[0])
            return values, (*((f"took {arrays[0]!r}, left {others:.200}",) if others else ()), *notes)
        raise ValueError(f"{path}: {rule}, got a dict of {', '.join(map(str, loaded)) or 'nothing':.200}")
    got = f"{type(loaded).__name__} of {len(loaded)}" if isinstance(loaded, (list, tuple)) else type(loaded).__name__
    raise ValueError(f"{path}: {rule}, got a {got}; save the tensor alone: torch.save(latents.cpu(), path)")


def _checked(path: Path, values: Tensor) -> Tensor:
    if values.dtype not in FLOATS:
        hint = ""
        if values.dtype in (torch.int16, torch.uint16):
            hint = "; if these are bfloat16's bits, save latents.view(torch.bfloat16)"
        raise ValueError(f"{path}: expected float16, bfloat16, float32 or float64, got {values.dtype}{hint}")
    if not values.numel():
        raise ValueError(f"{path}: expected latents, got the empty shape {list(values.shape)}; make it again")
    return values.detach().resolve_neg().contiguous()
