"""Denoising steps that a video pipeline stored: `[EXPERIMENT/]latents/[PROMPT/]VIDEO/step_000.npy.gz`.

Also .npy, .pt, .pt.gz and .safetensors. A file holds the latent [1, C, T, h, w] or [1, C, h, w] as the model had it,
perhaps without the first axis; videos may differ in shape, the steps of one may not. step_000_metadata.json beside it
is kept in the field `rest`, as the metadata `json` of a safetensors file, and configs/generation_config.yaml in the
notes.

`write` makes latents/KEY with the ending that all files of the cache had, else .npy.gz; of bfloat16, which .npy does
not have, .pt. Round trip: equal arrays, metadata and settings under equal names; a .pt or .safetensors holds the latent
alone.
"""

from __future__ import annotations

import gzip
import os
import re
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fastlatent.caches.cache import DTYPES, REST, Cache, CacheItem, CacheRow, DamagedEntry, Told, check_row
from fastlatent.caches.outgoing import Outgoing, OutRow, put, target
from fastlatent.caches.pt_files import look as look_into_pt
from fastlatent.caches.pt_files import looks as look_into_pts
from fastlatent.data.array_files import (
    NAMES,
    DamagedArrays,
    extract_latent,
    npy_bytes,
    pt_bytes,
    read_npy,
    read_pt,
    read_safetensors,
    safetensors_bytes,
    to_tensor,
    to_values,
)
from fastlatent.data.numpy_files import npy_begin, npy_header
from fastlatent.data.packed_files import GZIP
from fastlatent.data.tensor_files import read_header
from fastlatent.sources.experiment import CONFIG, MAX_SETTINGS_BYTES, SUFFIXES
from fastlatent.sources.files import Files, Found, read_each, read_text
from fastlatent.sources.items import stamp_of

TITLE = "denoising steps of a video model: latents/PROMPT/VIDEO/step_000.npy.gz, .npy, .pt or .safetensors"
PAYLOADS = ("latents",)
SCALING = None
FACTS = {"normalized": True}  # as the model had them, not as the autoencoder takes them
METADATA = "_metadata.json"
STEP = re.compile(r"step_([0-9]{1,9})")
FOLDER = "latents/"
HEAD = 1024  # bytes in which a .npy's header ends, also zipped; it has 128
_NAMES = {dtype: name for name, dtype in DTYPES.items() if name != "BF16"}


class Place(NamedTuple):
    """path: of the step. metadata: of the file beside it, "" for none. shape: of the row."""

    path: str
    metadata: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Look:
    """shape: of the stored array. more: whether the file holds other things too."""

    shape: tuple[int, ...]
    dtype: str
    more: bool = False


def claims(files: Files, found: Sequence[Found]) -> int:
    return sum(step_of(one.path) is not None for one in found)


def step_of(path: str) -> tuple[str, str] | None:
    """(name, ending) of a step's file; None of what is none, or is not finished."""
    name = path.rpartition("/")[2]
    if not name.startswith("step_"):
        return None
    suffix = next((suffix for suffix in SUFFIXES if name.endswith(suffix)), None)
    if suffix is None or name.removesuffix(suffix).endswith((".tmp", ".part")):
        return None
    return name.removesuffix(suffix), suffix


def open_cache(files: Files, found: Sequence[Found], told: Told) -> Cache:
    own = [one for one in found if step_of(one.path)]
    roots = Counter(root_of(one.path) for one in own)
    if len(roots) != 1:
        listed = ", ".join(f"{root or '.'} ({count:,} steps)" for root, count in roots.items())
        raise ValueError(f"{files.root}: expected the steps of one experiment, got {listed or 'none'}: convert each")
    root = next(iter(roots))
    beside = {one.path: one for one in found if one.path.endswith(METADATA)}
    left_out: dict[str, str] = {}
    videos: dict[str, dict[int, list[Found]]] = {}
    for one in own:
        video, _, name = one.path.removeprefix(root).removeprefix(FOLDER).rpartition("/")
        match = STEP.fullmatch(name.partition(".")[0])
        if not video:
            raise ValueError(f"{files.place(one.path)}: expected VIDEO/step_000 …: convert the folder above it")
        if match is None:
            left_out[files.place(one.path)] = "expected step_ and a number; rename it"
        else:
            videos.setdefault(video, {}).setdefault(int(match[1]), []).append(one)
    looked = look_into_all(files, own)
    first: Look | None = None
    items: list[CacheItem] = []
    shapes: dict[tuple[int, ...], tuple[int, ...]] = {}
    more = missing = 0
    for video in sorted(videos, key=os.fsencode):
        known: Look | None = None
        for number, same in sorted(videos[video].items()):
            one, look = same[0], looked[same[0].path]
            try:
                if len(same) > 1:
                    names = " and ".join(other.path.rpartition("/")[2] for other in same)
                    raise DamagedEntry(f"expected one file of step {number}, got {names}: move the others away")
                if isinstance(look, Exception):
                    raise look
                shape = row_shape(look.shape)
                first, known = first or look, known or look
                check_alike(look, known, first)
            except (DamagedEntry, OSError) as error:
                for other in same:
                    left_out[files.place(other.path)] = str(error)
                continue
            step = step_of(one.path)
            assert step is not None
            folder = one.path[: -len("".join(step))]
            metadata = beside.get(f"{folder}{step[0]}{METADATA}")
            stamp = stamp_of(one.stamp, {"metadata": metadata.stamp}) if metadata else one.stamp
            place = Place(one.path, metadata.path if metadata else "", shapes.setdefault(shape, shape))
            key = f"{video}/{step[0]}"
            items.append(CacheItem(key, files.place(one.path), one.size, stamp, group=video, order=number, at=place))
            more += look.more
            missing += metadata is None
    if first is None:
        reasons = "".join(f"; {place}: {why}" for place, why in list(left_out.items())[:3])
        raise ValueError(f"{files.root}: expected latents of steps, got none that can be read{reasons}")
    config = next((one for one in found if one.path == root + CONFIG), None)
    notes, remarks = notes_of(files, config)
    endings = {step_of(item.at.path)[1] for item in items}  # type: ignore[index]  # by step_of they were found
    if len(endings) == 1:
        notes["suffix"] = endings.pop()
    if len(first.shape) < len(row_shape(first.shape)):
        notes["first_axis"] = False
    if more:
        remarks.append(f"{more:,} files hold more than the latent, which is not converted")
    told_of = missing < len(items)
    used = {root + CONFIG, *(one.path for one in own), *(beside if told_of else ())}
    dtype = first.dtype
    return Cache(
        items=items,
        payload="latents",
        dtype=dtype,
        buckets=tuple(sorted(shapes)),
        content=lambda item: content(files, item.at, told_of),
        row=lambda item, data: read_row(item.at, data, dtype, told_of),
        fields=(REST,) if told_of else (),
        facts=FACTS,
        notes=notes,
        left_out=left_out,
        ignored=dict(Counter(os.path.splitext(one.path)[1].lower() for one in found if one.path not in used)),
        remarks=tuple(remarks),
    )


def root_of(path: str) -> str:
    """ "" or "EXPERIMENT/" of [EXPERIMENT/]latents/…; "" where there is no folder of that name."""
    at = f"/{path}".find(f"/{FOLDER}")
    return path[:at] if at > 0 else ""


def row_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """[1, C, T, h, w] or [1, C, h, w] of an array's shape."""
    whole = shape if len(shape) == 5 or shape[:1] == (1,) else (1, *shape)
    if len(whole) not in (4, 5) or whole[0] != 1 or min(whole) < 1:
        packed = "; packed latents must be unpacked first" if len(shape) == 3 else ""
        raise DamagedEntry(f"expected a latent [1, C, T, h, w] or [1, C, h, w] of one video, got {list(shape)}{packed}")
    return whole


def check_alike(look: Look, known: Look, first: Look) -> None:
    """Raise DamagedEntry where a step is not as its video's first, or not of the dtype and rank that all have."""
    if look.shape != known.shape:
        raise DamagedEntry(f"expected {list(known.shape)} as in the video's first step, got {list(look.shape)}")
    if look.dtype != first.dtype:
        raise DamagedEntry(f"expected {first.dtype} as in the first file, got {look.dtype}")
    axes = [len(row_shape(one.shape)) - len(one.shape) for one in (look, first)]
    if axes[0] != axes[1]:
        raise DamagedEntry(f"expected a shape like {list(first.shape)} in the first file, got {list(look.shape)}")


def look_into_all(files: Files, own: Sequence[Found]) -> dict[str, Look | Exception]:
    """path -> what the header of the file says."""
    pts = [one for one in own if one.path.endswith((".pt", ".pt.gz"))]
    looked: dict[str, Look | Exception] = {}
    for one, seen in zip(pts, look_into_pts(files, pts), strict=True):
        if seen is not None:
            looked[one.path] = Look(seen.shape, seen.dtype, seen.rest)
    known: dict[Look, Look] = {}
    others = {one.path: one for one in own if one.path not in looked}
    for path, one_look in zip(others, read_each(others, lambda path: look_into(files, others[path])), strict=True):
        looked[path] = one_look if isinstance(one_look, Exception) else known.setdefault(one_look, one_look)
    return looked


def look_into(files: Files, one: Found) -> Look:
    """DamagedEntry or OSError says why the file cannot be used."""
    try:
        if one.path.endswith((".pt", ".pt.gz")):
            seen = look_into_pt(files.read(one.path))
            return Look(seen.shape, seen.dtype, seen.rest)
        if one.path.endswith(".safetensors"):
            entries, _ = read_header(lambda offset, count: files.read_range(one.path, offset, count), one.size)
            named = [name for name in NAMES if name in entries] or list(entries)
            if len(named) != 1 or entries[named[0]].dtype not in DTYPES:
                raise DamagedEntry(f"expected one tensor of floats, or `latent`, got {', '.join(entries) or 'nothing'}")
            return Look(entries[named[0]].shape, entries[named[0]].dtype, len(entries) > 1)
        head = files.read_range(one.path, 0, HEAD)
        if head.startswith(GZIP):
            head = zlib.decompressobj(zlib.MAX_WBITS | 16).decompress(head, HEAD)
        begin = npy_begin(head)
        if begin > len(head):  # a header that somebody made longer
            array = read_npy(files.read(one.path))
            return Look(array.shape, _name_of(array))
        header = npy_header(head[:begin])
        return Look(header.shape, _name_of(np.empty(0, header.dtype.newbyteorder("="))))
    except zlib.error as error:
        raise DamagedEntry(f"the gzip stream is damaged ({error}); make it again") from None


def _name_of(array: np.ndarray) -> str:
    name = _NAMES.get(array.dtype)
    if name is None:
        bits = "; if these are bfloat16's bits, save the values as float32" if array.dtype.itemsize == 2 else ""
        raise DamagedEntry(f"expected float16, float32 or float64, got {array.dtype}{bits}")
    return name


def notes_of(files: Files, config: Found | None) -> tuple[dict[str, object], list[str]]:
    """The experiment's settings as they are written, and a remark where they cannot be kept."""
    if config is None:
        return {}, []
    try:
        if config.size > MAX_SETTINGS_BYTES:
            raise ValueError(f"it has {config.size} bytes, at most {MAX_SETTINGS_BYTES} are kept")
        return {"config": files.read(config.path).decode()}, []
    except (OSError, ValueError) as error:
        return {}, [f"{files.place(config.path)} is not kept: {error}"]


def content(files: Files, place: Place, told_of: bool) -> bytes:
    """The step's bytes; with metadata, those and how many they are behind it."""
    data = files.read(place.path)
    if not told_of:
        return data
    metadata = files.read(place.metadata) if place.metadata else b""
    return b"".join((data, metadata, len(metadata).to_bytes(8, "little")))


def read_row(place: Place, data: bytes, dtype: str, told_of: bool) -> CacheRow:
    extras: dict[str, np.ndarray] = {}
    if told_of:
        size = len(data) - 8 - int.from_bytes(data[-8:], "little")
        data, metadata = data[:size], data[size:-8]
        extras = {REST.name: pack_metadata(metadata)}
    if place.path.endswith((".npy", ".npy.gz")):
        values = read_npy(data)
        name = _name_of(values)
    else:
        loaded = read_safetensors(data)[0] if place.path.endswith(".safetensors") else read_pt(data)
        values, name = to_values(extract_latent(loaded))
    if name != dtype:
        raise DamagedEntry(f"expected {dtype} as in the first file, got {name}")
    return CacheRow(check_row(values.reshape(row_shape(values.shape)), place.shape, dtype), extras=extras)


def pack_metadata(data: bytes) -> np.ndarray:
    """uint8 [L]: a safetensors file with the text as metadata `json`; [0] of nothing."""
    if not data:
        return np.empty(0, np.uint8)
    try:
        read_text(data)
        return np.frombuffer(safetensors_bytes({}, {"json": data.decode()}), np.uint8)
    except ValueError as error:
        raise DamagedEntry(f"its {METADATA}: {error}; mend it or take it away") from None


def write(outgoing: Outgoing, out: Path) -> Iterator[int]:
    wrong = [list(shape) for shape in outgoing.shapes if shape[0] != 1 or len(shape) not in (4, 5)]
    if wrong:
        raise ValueError(
            f"{out}: expected rows [1, C, T, h, w] or [1, C, h, w], got {wrong}: steps have no mirror image"
        )
    suffix = str(outgoing.notes.get("suffix", ".npy.gz"))
    if suffix not in SUFFIXES or (outgoing.dtype == "BF16" and suffix.startswith(".npy")):
        suffix = ".pt" if outgoing.dtype == "BF16" else ".npy.gz"
    plain = outgoing.notes.get("first_axis") is False
    for number in range(outgoing.count):
        row = outgoing.row(number)
        if not row.group:
            raise ValueError(f"{out}: expected rows of videos' steps, got {row.key!r:.200} of none")
        name = f"{FOLDER}{row.group}/{name_of(row)}"
        metadata = metadata_of(row, out)
        if number == 0:
            target(out, name)
            if isinstance(config := outgoing.notes.get("config"), str):
                put(target(out, CONFIG), config.encode())
        if metadata:
            put(target(out, name + METADATA), metadata)
        path = target(out, name + suffix)
        if not path.exists():
            put(path, file_bytes(row.values[0] if plain else row.values, outgoing.dtype, suffix))
        yield 1


def name_of(row: OutRow) -> str:
    """The step's name as the key has it if that is one, else made of its number."""
    name = row.key.rpartition("/")[2]
    match = STEP.fullmatch(name)
    return name if match and int(match[1]) == row.order else f"step_{row.order:03d}"


def metadata_of(row: OutRow, out: Path) -> bytes:
    rest = row.extras.get(REST.name)
    if rest is None or not len(rest):
        return b""
    try:
        return read_safetensors(rest.tobytes())[1].get("json", "").encode()
    except DamagedArrays as error:
        raise ValueError(f"{out}: {row.key}: expected `rest` as a conversion made it, got {error}") from None


def file_bytes(values: np.ndarray, dtype: str, suffix: str) -> bytes:
    if suffix.startswith(".npy"):
        data = npy_bytes(values)
    elif suffix.startswith(".pt"):
        data = pt_bytes(to_tensor(values, dtype))
    else:
        data = safetensors_bytes({NAMES[0]: to_tensor(values, dtype)})
    return gzip.compress(data, 6, mtime=0) if suffix.endswith(".gz") else data
