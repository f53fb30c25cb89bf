"""The samples of a WebDataset tar of latents: which members belong together, and what the arrays in them are."""

from __future__ import annotations

import json
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch

from fastlatent.caches.cache import NAME_OF
from fastlatent.data.array_files import (
    DamagedArrays,
    extract_latent,
    read_npy,
    read_npz,
    read_pt,
    read_safetensors,
    to_values,
)
from fastlatent.data.numpy_files import npy_begin, npy_header
from fastlatent.sources.files import MAX_TEXT, Files, Found
from fastlatent.sources.tar_members import DamagedTar, Member, Window, members
from fastlatent.sources.tars import class_label
from fastlatent.store.records import PAYLOADS, check_shape

OURS = "fastlatent/1"  # "format" in the .json of the tars that are written here
ARRAYS = ("npy", "npz", "pt", "pth", "safetensors")
PICKLES = ("pickle", "pkl", "pyd")
FLIP = "_flip"
LOOK_MEMBERS = 64  # of a tar, by `has_latents`
NPY_HEADER = 256  # bytes that hold nearly every header of a .npy
PT_HEADER = 2048  # and the pickle of a file of torch.save that holds a tensor


@dataclass(frozen=True, slots=True)
class Place:
    """A sample's members (suffix, offset, size) but .cls: the latent, its flip where there is one, then the others."""

    tar: Found
    parts: tuple[tuple[str, int, int], ...]
    flip: bool


@dataclass(frozen=True, slots=True)
class Kind:
    """What an array member holds: the payload, the shape of one image's latent, and how it was wrapped."""

    payload: str
    dtype: str
    shape: tuple[int, ...]
    rows: int  # F, of what is in one member
    name: str  # of the array in its file, "" where it has none
    batch: bool  # a first size of 1 was taken off


@dataclass
class Samples:
    """One archive: its samples as (name, place, label), what our .json says of each, kinds of latents -> how many."""

    samples: list[tuple[str, Place, int]] = field(default_factory=list)
    told: list[dict[str, Any] | None] = field(default_factory=list)
    kinds: Counter[Kind] = field(default_factory=Counter)
    left_out: dict[str, str] = field(default_factory=dict)
    ignored: Counter[str] = field(default_factory=Counter)
    pickles: Counter[str] = field(default_factory=Counter)


def has_latents(files: Files, tar: Found) -> bool:
    window = Window(partial(files.read_range, tar.path), tar.size, files.gap)
    try:
        for number, member in enumerate(members(window)):
            if split_name(member.name)[1].rpartition(".")[2] in ARRAYS:
                return True
            if number >= LOOK_MEMBERS:
                break
    except (OSError, ValueError):
        pass
    return False


def split_name(name: str) -> tuple[str, str]:
    """A member's sample and its suffix, as the webdataset package has them."""
    folder, slash, base = name.rpartition("/")
    stem, _, suffix = base.partition(".")
    return folder + slash + stem, suffix.lower()


def look(read: Callable[[int, int], bytes], found: Found, gap: int) -> Samples:
    """Index one archive, reading headers, labels and shapes; other latents than .npy whole, of each kind one.

    Args:
        read: (offset, size) -> bytes of the archive. gap: as of `Files`.
    Raises:
        OSError: it cannot be read. ValueError: it is compressed.
    """
    window, tar = Window(read, found.size, gap), Samples()
    parts: dict[str, dict[str, tuple[int, int]]] = {}
    heads: dict[str, dict[str, bytes]] = {}  # of .npy, .cls and .json members
    known: dict[bytes, Kind | None] = {}  # by `_alike`
    twice: dict[str, str] = {}
    last = ""
    try:
        for member in members(window):
            name = re.sub(r"^(\./)+", "", member.name)
            why = _unusable(name, member)
            if why:
                tar.left_out[name] = why
            if why is not None:
                continue
            last, suffix = split_name(name)
            if not suffix or not last.rpartition("/")[2]:
                tar.ignored[os.path.splitext(name)[1].lower()] += 1
                continue
            own = parts.setdefault(last, {})
            if suffix in own:
                twice[last] = name
            own[sys.intern(suffix)] = member.offset, member.size
            if suffix in ("cls", "json") or suffix.endswith("npy"):
                most = NPY_HEADER if suffix.endswith("npy") else MAX_TEXT
                heads.setdefault(last, {})[suffix] = window.read(member.offset, min(member.size, most))
    except DamagedTar as error:
        tar.left_out[""] = f"{error}; what comes before is used" if parts else str(error)
        if last in parts:
            tar.left_out[last] = "its tar cannot be read on from here, and may hold more of this sample"
            del parts[last]
    for name, own in parts.items():
        head = heads.get(name, {})
        try:
            if name in twice:
                raise ValueError(f"{twice[name]} is in its tar twice")
            place, pickles = _choose(found, own)
            label = class_label(head.get("cls"))
        except ValueError as error:
            if any(suffix.rpartition(".")[2] in ARRAYS for suffix in own):
                tar.left_out[name] = str(error)
            else:
                tar.ignored.update(f".{suffix.rpartition('.')[2]}" for suffix in own)
            continue
        suffix, offset, size = place.parts[0]
        begins = head[suffix] if suffix in head else window.read(offset, min(size, PT_HEADER))
        like = _alike(suffix, begins, size)
        if like not in known:
            whole = begins if suffix in head or size <= PT_HEADER else window.read(offset, size)
            known[like] = _npy_kind(suffix, whole) if suffix in head else _kind_of(suffix, whole)
        kind = known[like]
        if not like:
            del known[like]
        tar.kinds.update([kind] if kind else [])  # damaged ones are found when their rows are read
        tar.pickles.update(f".{one.rpartition('.')[2]}" for one in pickles)
        tar.samples.append((name, place, label))
        tar.told.append(told_by(head.get("json")))
    return tar


def _unusable(name: str, member: Member) -> str | None:
    """Why a member cannot be part of a sample; "" where nobody misses it, None where it can."""
    folders = name.split("/")
    if member.kind == "a folder":
        return ""
    if name.startswith("/") or ".." in folders or "" in folders or "\0" in name:
        return "its name leads out of the archive: expected a relative path"
    if any(one.startswith(".") for one in folders):
        return ""
    return f"{member.kind}: expected a file" if member.kind else None


def _choose(tar: Found, own: Mapping[str, tuple[int, int]]) -> tuple[Place, list[str]]:
    """A sample's place, and the suffixes of what is never read.

    Raises:
        ValueError: no array, or several of which none counts.
    """
    arrays = [suffix for suffix in own if suffix.rpartition(".")[2] in ARRAYS]
    plain = [one for one in arrays if not stem_of(one).endswith(FLIP)] if len(arrays) > 1 else arrays
    named: list[str] = []
    for words in (set(PAYLOADS), {"latent", "moment"}):
        named = named or [one for one in plain if words & set(re.split(r"[._-]", stem_of(one)))]
    wanted = named if named else ([one for one in plain if "." not in one] or plain)
    if len(wanted) != 1:
        raise ValueError(
            "expected one array member a sample, or one called latents, moments or tokens, got "
            f"{', '.join('.' + one for one in wanted) or 'none'}"
        )
    stem, _, kind = wanted[0].rpartition(".")
    chosen = [wanted[0], *([flip] if stem and (flip := f"{stem}{FLIP}.{kind}") in own else [])]
    unused = [one for one in own if one.rpartition(".")[2] in PICKLES]
    chosen += sorted(set(own) - {*chosen, *unused, "cls"})
    return Place(tar, tuple((one, *own[one]) for one in chosen), len(chosen) > 1 and FLIP in chosen[1]), unused


def stem_of(suffix: str) -> str:
    return suffix.rpartition(".")[0]


def told_by(data: bytes | None) -> dict[str, Any] | None:
    """What our own .json says; None where it is none of ours."""
    if data is None or OURS.encode() not in data:
        return None
    try:
        value = json.loads(data)
        sound = value["format"] == OURS and isinstance(value["key"], str) and type(value["order"]) is int
        texts = [value[name] for name in ("label", "group")]
        numbers = [*value["orig_hw"], *value["crop"]]
        scaling = value["scaling"]
        sound &= all(isinstance(one, str) for one in texts) and all(type(one) is int for one in numbers)
        sound &= scaling in ("raw", None) or (len(scaling) == 2 and all(type(one) is float for one in scaling))
        return value if sound and len(value["orig_hw"]) == 2 and len(value["crop"]) == 4 else None
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def _alike(suffix: str, begins: bytes, size: int) -> bytes:
    """What two members have in common that are of one kind; nothing where that cannot be told from how they begin."""
    if suffix.endswith("npy"):
        return begins[: 10 + int.from_bytes(begins[8:10], "little")] + suffix.encode()
    pickle = begins[: max(0, begins.find(b"PK\3\4", 4))]  # of torch.save: all but the values comes first
    return b"%d %s %s" % (size, suffix.encode(), pickle) if b"data.pkl" in pickle[:100] else b""


def _kind_of(suffix: str, data: bytes) -> Kind | None:
    try:
        return read_member(suffix, data)[2]
    except DamagedArrays:
        return None


def _npy_kind(suffix: str, head: bytes) -> Kind | None:
    try:
        header = npy_header(head[: npy_begin(head)])
    except DamagedArrays:
        return None
    return _kind(suffix, "", header.shape, NAME_OF[header.dtype], 1) if header.dtype in NAME_OF else None


def _kind(suffix: str, name: str, shape: tuple[int, ...], dtype: str, rows: int) -> Kind | None:
    words = {*re.split(r"[._-]", stem_of(suffix)), name.removesuffix(FLIP)}
    payload = next((one for one in PAYLOADS if one in words), "tokens" if len(shape) == 2 else "latents")
    batch = len(shape) >= (3 if payload == "tokens" else 4) and shape[0] == 1
    shape = shape[1:] if batch else shape
    try:
        check_shape((rows, *shape), "array", payload)
    except ValueError:
        return None
    return Kind(payload, dtype, shape, rows, name, batch)


_READERS = {"npz": read_npz, "pt": read_pt, "pth": read_pt}


def read_member(suffix: str, data: Any) -> tuple[np.ndarray, str, Kind, dict[str, torch.Tensor]]:
    """Values [F, ...] of a latent member, their dtype, their kind, and the other arrays of the file.

    Raises:
        DamagedArrays: it has none, or a shape that no latent has.
    """
    ending, name, rest = suffix.rpartition(".")[2], "", dict[str, torch.Tensor]()
    if ending == "npy":
        array = read_npy(data)
        if array.dtype not in NAME_OF:
            raise DamagedArrays(f"expected float16, float32 or float64, got {array.dtype}")
        parts, dtype = [array], NAME_OF[array.dtype]
    else:
        loaded: Any = read_safetensors(data)[0] if ending == "safetensors" else _READERS[ending](data)
        tensors = [loaded]
        if isinstance(loaded, dict):
            held = {str(key): one for key, one in loaded.items() if isinstance(one, torch.Tensor | np.ndarray)}
            named = next((one for one in (*PAYLOADS, "latent") if one in held), None)
            if named is None and len(held) == 1:
                named = next(iter(held))
            if named is None:
                raise DamagedArrays(
                    f"expected an array called latents, moments or tokens, got {', '.join(held)!r:.200}"
                )
            name = named
            tensors = [held.pop(name), *([held.pop(name + FLIP)] if name + FLIP in held else [])]
            rest = {
                one: array if isinstance(array, torch.Tensor) else torch.from_numpy(array.copy())  # a writable copy
                for one, array in held.items()
            }
        read = [to_values(extract_latent(one)) for one in tensors]
        parts, dtype = [array for array, _ in read], read[0][1]
        if len({(array.shape, kind) for array, kind in read}) > 1:
            raise DamagedArrays(f"expected a mirror image {list(parts[0].shape)}, got {list(parts[-1].shape)}")
    kind = _kind(suffix, name, parts[0].shape, dtype, len(parts))
    if kind is None:
        raise DamagedArrays(f"expected a latent [C, ...] or tokens [N, D], got {list(parts[0].shape)}")
    flat = [array[0] if kind.batch else array for array in parts]
    return flat[0][None] if len(flat) == 1 else np.stack(flat), dtype, kind, rest
