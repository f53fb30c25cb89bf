"""Arrays in .npy, .npz, .pt and .safetensors files, perhaps damaged or hostile, from bytes and back.

Nothing in a file is called or imported, and nothing is allocated because a header claims it: what is allocated is
counted first against what the file can hold. Whatever bytes come, the readers return or raise DamagedArrays. .npy, .pt
and .safetensors may be gzip files as well.
"""

from __future__ import annotations

import functools
import io
import os
import re
import threading
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastlatent.data.numpy_files import MAX_AXES, npy_bytes, npz_bytes, read_npy, read_npz
from fastlatent.data.packed_files import (
    GZIP,
    STORED,
    Buffer,
    DamagedArrays,
    guarded,
    gunzip,
    member_bytes,
    reader,
    zip_members,
)
from fastlatent.data.tensor_files import read_safetensors, safetensors_bytes

__all__ = [
    "DamagedArrays", "extract_latent", "find_latent", "map_pt", "npy_bytes", "npz_bytes", "pt_bytes", "read_npy",
    "read_npz", "read_pt", "read_safetensors", "safetensors_bytes", "to_tensor", "to_values",
]  # fmt: skip

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
NAMES = ("latent", "latents", "moments")  # of the one array that counts in a dict of several
# How a file of torch.save begins before torch 1.6: a pickle of this number.
_LEGACY = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19\x2e"

# What weights_only calls with any number or text: bytearray(17 << 30) takes 17 GB and has 40 bytes in a file; so has
# encode(…, "hex") within another, 30 deep. Nobody needs the one; bytes and numpy's arrays need encode(…, "latin1"),
# which is put in the other's place: a name as long, so that no byte moves.
_BYTEARRAYS = (b"cbuiltins\nbytearray\n", b"c__builtin__\nbytearray\n")
_ENCODE, _LATIN1 = b"c_codecs\nencode\n", b"c_latin1\nencode\n"
_CORES = ("core", "_core")  # of numpy 1 and 2
_SAFE_GLOBALS = threading.Lock()  # torch keeps the names that weights_only allows for the whole process

_BFLOAT16_BITS = (np.dtype("<u2"), np.dtype("<i2"))  # bfloat16 through a view, as torch's users save it


@guarded
def read_pt(data: Buffer) -> Any:
    """What torch.save wrote (.pt, .pth, .bin, also as .gz): tensors, numpy arrays of numbers, containers, scalars.

    Read with weights_only. Tensors are on the CPU, dense, and no larger than what is stored of them.

    Raises:
        DamagedArrays: no such file, a wrong checksum, classes, which are never loaded.
    """
    if data[:2] == GZIP:
        data = gunzip(data)
    sizes, special = _pt_storages(data)
    return _checked_pt(_load(data, special), sizes, len(data))


def map_pt(path: Path) -> Any:
    """As `read_pt`, of a file: tensors stay there until they are looked at, and their checksums are not compared."""
    import mmap

    with open(path, "rb") as file:
        if not os.fstat(file.fileno()).st_size:
            raise DamagedArrays("expected a file of torch.save, got an empty one; make it again")
        data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    sizes, special = _pt_storages(data, checked=False)
    return _checked_pt(_load(data if special else path, special), sizes, len(data))


def _pt_storages(data: Buffer, checked: bool = True) -> tuple[set[int] | None, bool]:
    """Sizes of the storages in a file of torch.save, None where they are not listed (before torch 1.6); and whether its
    pickle may ask for numpy's classes or bytes.

    torch.load compares no checksums, and only newer ones compare a storage's size in the pickle with its record.
    """
    if bytes(data[: len(_LEGACY)]) == _LEGACY:
        _is_special(bytes(data))
        return None, True
    advice = "expected a file of torch.save (a zip archive)"
    if data[:2] != b"PK":
        raise DamagedArrays(f"{advice}, got one that starts with {bytes(data[:8])!r}; make it again")
    read, order, special = reader(data), b"little", False
    try:
        members = [(one, member_bytes(read, one)) for one in zip_members(read, len(data))]
    except DamagedArrays as error:
        raise DamagedArrays(f"{advice}, got {error}") from None
    sizes = set()
    for (name, method, crc, _, size, _), content in members:
        if method != STORED:  # torch would inflate 1 GB of a record that takes 1 MB
            raise DamagedArrays(f"{advice}, got an archive with compressed records; make it again")
        # 0: torch.serialization.set_crc32_options(False)
        if checked and crc and zlib.crc32(content) != crc:
            raise DamagedArrays(f"{advice}, got a damaged one: the checksum of {name!r:.80} is wrong; make it again")
        if "/data/" in name:
            sizes.add(size)
        elif name.endswith(".pkl"):
            special |= _is_special(bytes(content))
        elif name.endswith("/byteorder"):
            order = bytes(content[:8])
    if order != b"little":
        raise DamagedArrays(f"expected little-endian tensors, got byte order {order!r}")
    return sizes, special


def _is_special(pickle: bytes) -> bool:
    """Whether a pickle may ask for numpy's classes or bytes; DamagedArrays where it asks for any amount of memory."""
    if any(one in pickle for one in _BYTEARRAYS):
        raise DamagedArrays(
            "expected tensors, got a pickle that needs bytearray, which is never loaded; save the tensor alone: "
            "torch.save(latents.cpu(), path)"
        )
    return b"numpy" in pickle or _ENCODE in pickle


def _load(source: Buffer | Path, special: bool) -> Any:
    mapped = isinstance(source, Path)
    try:
        if not special:  # nobody waits for the lock
            file = source if isinstance(source, Path) else io.BytesIO(source)
            return torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
        assert not isinstance(source, Path)
        file = io.BytesIO(bytes(source).replace(_ENCODE, _LATIN1))
        with _SAFE_GLOBALS, torch.serialization.safe_globals(_numpy_classes()):
            return torch.load(file, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    # Damaged pickles come out as UnpicklingError, RuntimeError, KeyError, IndexError, AssertionError, TypeError …
    except Exception as error:
        said = str(error) or type(error).__name__
        advice = "save the tensor alone: torch.save(latents.cpu(), path)"
        if refused := re.search(r"GLOBAL (\w+(?:\.\w+)*)", said):
            what = f"a pickle that needs {refused[1]}, which is never loaded, since it could run any code"
        elif "Unsupported operand" in said:
            what = "a pickle of another protocol than torch.save's own, 2"
        else:
            what = f"what torch.load calls {' '.join(said.split('WeightsUnpickler error:')[-1].split()):.200}"
            advice = "make it again"
        raise DamagedArrays(f"expected tensors, got {what}; {advice}") from None


class _Ndarray:
    """Stands for numpy.ndarray in a pickle, which may name it but not call it with a size."""


def _reconstruct(kind: type, shape: tuple[int, ...], code: object) -> np.ndarray:
    """numpy's function of this name with the arguments that numpy itself gives it: the values come with BUILD."""
    if kind is not _Ndarray or shape != (0,):
        raise ValueError(f"expected numpy's own way to write an array, got {kind} {shape}")
    return np.empty(0, "b")


def _encode(text: str, codec: str) -> bytes:
    if codec != "latin1":
        raise ValueError(f"expected latin1, as pickle writes bytes, got {codec!r:.40}")
    return text.encode(codec)


@functools.cache
def _numpy_classes() -> list[Any]:
    """What the safe unpickler must know to build arrays of numbers, under the names that numpy 1 and 2 give it."""
    names: list[Any] = [
        (_Ndarray, "numpy.ndarray"),
        *((_reconstruct, f"numpy.{one}.multiarray._reconstruct") for one in _CORES),
    ]
    # BUILD wants to know the class; no pickle can write this name.
    names.append((_encode, "_latin1.encode"))
    return [*names, (np.ndarray, "\n"), np.dtype, *{type(np.dtype(code)) for code in "efdhHilqILQbB?"}]


def _checked_pt(loaded: Any, sizes: set[int] | None, length: int) -> Any:
    """What was loaded, if its tensors are dense and each has its values in the file."""
    left, seen = [loaded], set()
    while left:
        value = left.pop()
        if isinstance(value, Tensor):
            if value.layout != torch.strided or value.is_quantized or value.device.type != "cpu":
                raise DamagedArrays(f"expected a dense tensor, got {value.layout} on {value.device}")
            stored = value.untyped_storage().nbytes()
            sound = not stored or (stored <= length if sizes is None else stored in sizes)
            if not sound or value.numel() * value.element_size() > stored:
                raise DamagedArrays(f"a tensor of shape {list(value.shape)} is larger than what is stored of it")
        elif isinstance(value, np.ndarray):
            if value.dtype.hasobject or value.nbytes > length:
                raise DamagedArrays(f"expected an array of numbers in {length} bytes, got {value.dtype} {value.shape}")
        elif isinstance(value, (list, tuple, Mapping)) and id(value) not in seen:
            seen.add(id(value))  # a list may hold itself
            left.extend(value.values() if isinstance(value, Mapping) else value)
    return loaded


def extract_latent(loaded: Any) -> Tensor:
    """The one latent in what a file held, contiguous, of FLOATS, its dtype kept.

    A tensor or numpy array; a dict in which it is called latent, latents or moments, or is the only array; a list or
    tuple of one of these; nested lists of numbers (float32, as torch makes of them).

    Raises:
        DamagedArrays: nothing, several, other numbers than floats.
    """
    return find_latent(loaded)[0]


_RULE = "expected a tensor, a dict with `latent` or `latents`, or a list of one"


def find_latent(loaded: Any) -> tuple[Tensor, str]:
    """As `extract_latent`, and what was set aside for it ("" for nothing)."""
    value, taken = loaded, []
    for _ in range(3):
        if isinstance(value, Mapping):
            named = [name for name in NAMES if name in value]
            arrays = named or [name for name, one in value.items() if isinstance(one, (Tensor, np.ndarray))]
            arrays = arrays or list(value)
            if len(arrays) != 1:
                raise DamagedArrays(f"{_RULE}, got a dict of {', '.join(map(str, value)) or 'nothing':.200}")
            others = ", ".join(str(name) for name in value if name != arrays[0])
            taken += [f"took {arrays[0]!r}, left {others:.200}"] if others else []
            value = value[arrays[0]]
        elif isinstance(value, (list, tuple)) and len(value) == 1 and not _is_nested_numbers(value):
            value = value[0]
        else:
            break
    if isinstance(value, Tensor):
        tensor = value
    elif isinstance(value, np.ndarray):
        if value.dtype.kind != "f" or value.dtype.itemsize > 8 or value.ndim > MAX_AXES:
            hint = "; if these are bfloat16's bits, save the values as float32" if value.dtype in _BFLOAT16_BITS else ""
            raise DamagedArrays(f"expected float16, float32 or float64, got a numpy array of {value.dtype}{hint}")
        native = value.astype(value.dtype.newbyteorder("="), order="C", copy=False)
        tensor = torch.from_numpy(native if native.flags.writeable else native.copy())
    elif _is_nested_numbers(value):
        try:
            tensor = torch.tensor(value, dtype=torch.float32)
        except (ValueError, TypeError, RuntimeError, OverflowError) as error:
            raise DamagedArrays(f"{_RULE}, got nested lists that are no array ({error})") from None
    else:
        got = f"{type(value).__name__} of {len(value)}" if isinstance(value, (list, tuple)) else type(value).__name__
        several = isinstance(value, (list, tuple)) and len(value) > 1
        advice = "save one latent a file" if several else "save the tensor alone: torch.save(latents.cpu(), path)"
        raise DamagedArrays(f"{_RULE}, got a {got}; {advice}")
    if tensor.dtype not in FLOATS:
        hint = ""
        if tensor.dtype in (torch.int16, torch.uint16):
            hint = "; if these are bfloat16's bits, save latents.view(torch.bfloat16)"
        raise DamagedArrays(f"expected float16, bfloat16, float32 or float64, got {tensor.dtype}{hint}")
    if not tensor.numel():
        raise DamagedArrays(f"expected latents, got the empty shape {list(tensor.shape)}; make it again")
    return tensor.detach().resolve_neg().contiguous(), "; ".join(taken)


def _is_nested_numbers(value: Any) -> bool:
    """Whether the first leaf of nested lists is a number."""
    for depth in range(MAX_AXES + 1):
        if not isinstance(value, (list, tuple)) or not value:
            return depth > 0 and isinstance(value, (int, float)) and not isinstance(value, bool)
        value = value[0]
    return False


def pt_bytes(value: Any) -> bytes:
    """What torch.save writes; of tensors the values that they show, not what else lies in their storage."""
    stream = io.BytesIO()
    torch.save(_compact(value), stream)
    return stream.getvalue()


def _compact(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value if value.untyped_storage().nbytes() == value.numel() * value.element_size() else value.clone()
    if type(value) is dict:
        return {name: _compact(one) for name, one in value.items()}
    return type(value)(map(_compact, value)) if type(value) in (list, tuple) else value


_VALUES = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32", torch.float64: "F64"}
_DTYPES: Mapping[str, torch.dtype] = {name: dtype for dtype, name in _VALUES.items()}


def to_values(tensor: Tensor) -> tuple[np.ndarray, str]:
    """(values, "F16", "BF16", "F32" or "F64") of a tensor on the CPU; uint16 stands for bfloat16. No copy."""
    if tensor.dtype not in _VALUES:
        raise DamagedArrays(f"expected one of {', '.join(map(str, FLOATS))}, got {tensor.dtype}")
    plain = tensor.detach()
    return (plain.view(torch.uint16) if plain.dtype == torch.bfloat16 else plain).numpy(), _VALUES[tensor.dtype]


def to_tensor(values: np.ndarray, dtype: str) -> Tensor:
    """What `to_values` took apart; a copy where the array may not be written to."""
    tensor = torch.from_numpy(values if values.flags.writeable else values.copy())
    return tensor.view(torch.bfloat16) if dtype == "BF16" else tensor.to(_DTYPES[dtype])
