"""sd-scripts' cache: one .npz for each image, a sample [C, h, w] as the autoencoder gives it, unscaled, in float32.

{stem}_{WWWW}x{HHHH}_{arch}.npz beside the image, or {stem}.npz (older, SD and SDXL), with the arrays
    latents             and latents_flipped, of the mirrored image, where that was asked for
    original_size       (width, height) of the image
    crop_ltrb           where the whole image would lie in its bucket, in the bucket's pixels; often no integers
    alpha_mask          [H, W], where that was asked for
FLUX, SD3 and Lumina write latents_{h}x{w}, original_size_{h}x{w} …, several sizes in a file if need be: each is a row.
Keys are the files' paths, followed by @{h}x{w} for such rows. Latents of videos [C, T, h, w] are taken too. Caches of
text encoders (_te.npz, _te_outputs.npz) lie in the same folders and are not looked at.

original_size becomes orig_hw; the part that the latent shows is not in the file, so crop stays unknown. All arrays but
the latents are kept in the field `rest` as they are, under their names without the size. Round trip: equal arrays
under equal names; float16 and bfloat16 become float32, without rounding, as its loader expects.

Rows of another dataset become {stem}.npz, which the loader takes for SD and SDXL whatever the image's size; they need 4
channels, and the image's size, from which crop_ltrb follows. Other models' files are named after the model.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from fastlatent.caches.cache import NAME_OF, REST, Cache, CacheItem, CacheRow, DamagedEntry, Told, check_row
from fastlatent.caches.outgoing import Outgoing, OutRow, put, target
from fastlatent.data.array_files import (
    DamagedArrays,
    npz_bytes,
    read_npz,
    read_safetensors,
    safetensors_bytes,
    to_tensor,
)
from fastlatent.data.numpy_files import npy_begin, npy_header
from fastlatent.data.packed_files import Member, Read, member_content, zip_members
from fastlatent.sources.files import Files, Found, read_each

TITLE = "kohya sd-scripts: {stem}_{W}x{H}_{model}.npz or {stem}.npz with latents, original_size, crop_ltrb"
PAYLOADS = ("latents",)
SCALING = (1.0, 0.0)
DTYPE = "F32"
SUFFIX = ".npz"
TEXTS = ("_te.npz", "_te_outputs.npz")
MODEL = re.compile(r".*_\d+x\d+_([A-Za-z0-9_-]+)\.npz", re.ASCII | re.DOTALL)
LATENTS = re.compile(r"latents((?:_\d+x\d+)?)\.npy", re.ASCII)
SIZE = re.compile(r"_\d+x\d+\Z", re.ASCII)
KEY = re.compile(r"(.*\.npz)(?:@(\d+x\d+))?", re.ASCII | re.DOTALL)
ORDER = ("latents", "original_size", "crop_ltrb", "latents_flipped", "alpha_mask")  # as its writer has them
STRIDE = 8  # pixels for a latent of SD and SDXL
HEAD = 512  # bytes of an array's header that are looked at; numpy pads it to 128
TAIL = 4096  # the directory of a file of 15 arrays is shorter than this


@dataclass(frozen=True, slots=True)
class Latents:
    """Of one row: "_{h}x{w}" or "", and what its header says."""

    suffix: str
    shape: tuple[int, ...]
    dtype: str
    flipped: bool
    more: bool  # whether there are further arrays

    @property
    def kind(self) -> tuple[int, int, int, str]:
        """What is the same in all rows of a dataset: F, number of sizes, channels, dtype."""
        return 2 if self.flipped else 1, len(self.shape), self.shape[0], self.dtype


def claims(files: Files, found: Sequence[Found]) -> int:
    own = _own(found)
    for one in own[:8]:
        try:
            if any(LATENTS.fullmatch(name) for name in _members(files, one)[1]):
                return len(own)
        except (DamagedArrays, OSError):
            continue
    return 0


def open_cache(files: Files, found: Sequence[Found], told: Told) -> Cache:
    own = _own(found)
    by_path = {one.path: one for one in own}
    looks = read_each(by_path, lambda path: _look(files, by_path[path]))
    left_out: dict[str, str] = {}
    rows: list[tuple[Found, Latents]] = []
    for one, look in zip(own, looks, strict=True):
        if isinstance(look, Exception):
            left_out[files.place(one.path)] = str(look)
        else:
            rows += [(one, latents) for latents in look]
    models = Counter(match[1] for one in own if (match := MODEL.fullmatch(one.path)))
    if len(models) > 1:
        listed = ", ".join(f"{model} ({count:,} files)" for model, count in models.most_common())
        raise ValueError(f"{files.root}: expected the latents of one model, got {listed}: convert each from a folder")
    kinds = Counter(latents.kind for _, latents in rows)
    if not kinds:
        why = "; ".join(f"{place}: {reason}" for place, reason in list(left_out.items())[:3])
        raise ValueError(f"{files.root}: expected .npz files with latents, got none that can be read: {why}")
    kind = max(kinds, key=lambda one: (kinds[one], one))
    items, shapes, rest = [], set(), False
    before = ""
    for one, latents in rows:
        key = one.path + latents.suffix.replace("_", "@", 1)
        if latents.kind != kind:
            left_out[files.place(key)] = f"expected {_words(kind)} as most files have, got {_words(latents.kind)}"
            continue
        shapes.add((kind[0], *latents.shape))
        rest |= latents.more
        at = one.path, latents.suffix, one.path != before
        items.append(CacheItem(key, files.place(one.path), one.size, one.stamp, at=at))
        before = one.path
    items.sort(key=lambda item: os.fsencode(item.key))
    old = sum(1 for one in own if not MODEL.fullmatch(one.path)) if models else 0
    return Cache(
        items=items,
        payload="latents",
        dtype=kind[3],
        buckets=tuple(sorted(shapes)),
        content=lambda item: files.read(item.at[0]),
        row=partial(_row, kind, rest),
        fields=(REST,) if rest else (),
        facts={"model": next(iter(models), "")},
        left_out=left_out,
        ignored=_ignored(found),
        remarks=(f"{old:,} files do not say of which model they are",) if old else (),
    )


def write(outgoing: Outgoing, out: Path) -> Iterator[int]:
    again = bool(outgoing.facts)
    channels = {shape[1] for shape in outgoing.shapes}
    if not again and (channels != {4} or any(len(shape) != 4 for shape in outgoing.shapes)):
        raise ValueError(
            f"{out}: expected latents [4, h, w] of SD or SDXL, got {sorted(outgoing.shapes)[:4]}: sd-scripts names "
            "the files of other models after the model and the image's size, which the dataset does not say"
        )
    places: dict[str, list[int]] = {}
    for number in range(outgoing.count):
        row = outgoing.row(number)
        place, _ = _place(row.key, again, out)
        if not again and place in places:
            raise ValueError(f"{out}: {place} would hold two images, {row.key!r:.200} is one: rename it")
        if not again and min(row.orig_hw) < 1:
            raise ValueError(
                f"{out}: expected the size of each image, which its loader needs, got none of {row.key!r:.200}"
            )
        places.setdefault(place, []).append(number)
    for place, numbers in places.items():
        path = target(out, place)
        if not path.exists():
            arrays: dict[str, np.ndarray] = {}
            for row in map(outgoing.row, numbers):
                arrays |= _arrays(row, outgoing.dtype, _place(row.key, again, out)[1], again)
            put(path, npz_bytes(arrays))
        yield len(numbers)


def renamed(key: str) -> str:
    """The key that a row of another dataset has after its way through this format."""
    return os.path.splitext(key)[0] + SUFFIX


def _own(found: Sequence[Found]) -> list[Found]:
    return [one for one in found if one.path.endswith(SUFFIX) and not one.path.endswith(TEXTS)]


def _ignored(found: Sequence[Found]) -> dict[str, int]:
    count: Counter[str] = Counter()
    for one in found:
        texts = next((end for end in TEXTS if one.path.endswith(end)), None)
        if texts or not one.path.endswith(SUFFIX):
            count[texts or os.path.splitext(one.path)[1].lower()] += 1
    return dict(count)


def _members(files: Files, one: Found) -> tuple[Read, dict[str, Member]]:
    """A reader of the file's ranges, its end read once, and the arrays in it."""
    begin = max(0, one.size - TAIL)
    tail = files.read_range(one.path, begin, TAIL)

    def read(offset: int, size: int) -> bytes:
        if offset >= begin:
            return tail[offset - begin : offset - begin + size]
        return files.read_range(one.path, offset, size)

    found: dict[str, Member] = {}
    for member in zip_members(read, one.size):
        if member.name in found:
            raise DamagedArrays(f"two arrays {member.name!r:.100}")
        found[member.name] = member
    return read, found


def _look(files: Files, one: Found) -> list[Latents]:
    """What the headers of the latents in a file say. DamagedArrays or OSError."""
    read, arrays = _members(files, one)
    suffixes = [match[1] for name in arrays if (match := LATENTS.fullmatch(name))]
    if not suffixes:
        raise DamagedArrays(f"expected an array 'latents', got {', '.join(arrays) or 'none':.200}")
    if "" in suffixes and len(suffixes) > 1:
        raise DamagedArrays("expected latents or latents_{h}x{w}, got both")
    rows = []
    for suffix in suffixes:
        member = arrays[f"latents{suffix}.npy"]
        begin = member_content(read, member, HEAD)
        end = npy_begin(begin)
        header = npy_header(begin[:end])
        dtype = NAME_OF.get(header.dtype)
        if dtype is None or len(header.shape) not in (3, 4) or 0 in header.shape:
            raise DamagedArrays(f"expected latents [C, h, w] of floats, got {header.dtype} {list(header.shape)}")
        if end + header.nbytes != member.size:
            raise DamagedArrays(f"latents claim {header.nbytes:,} bytes, the file has {member.size - end:,} of them")
        if suffix and suffix != f"_{header.shape[-2]}x{header.shape[-1]}":
            raise DamagedArrays(f"latents{suffix} are {list(header.shape)}")
        flipped = f"latents_flipped{suffix}.npy" in arrays
        rows.append(Latents(suffix, header.shape, dtype, flipped, len(arrays) > len(suffixes) * (1 + flipped)))
    return rows


def _words(kind: tuple[int, int, int, str]) -> str:
    sizes = "[C, h, w]" if kind[1] == 3 else "[C, T, h, w]"
    return f"{sizes} of {kind[2]} channels in {kind[3]} {'with' if kind[0] == 2 else 'without'} latents_flipped"


def _row(kind: tuple[int, int, int, str], rest: bool, item: CacheItem, data: bytes) -> CacheRow:
    suffix: str = item.at[1]
    arrays = read_npz(data)
    latents = arrays.pop("latents" + suffix, None)
    flipped = arrays.pop("latents_flipped" + suffix, None)
    if latents is None or (flipped is not None) != (kind[0] == 2):
        raise DamagedEntry(f"expected {_words(kind)}, got {', '.join(arrays) or 'none':.200} besides the latents")
    values = latents[None]
    if flipped is not None:
        values = np.stack([check_row(latents, latents.shape, kind[3]), check_row(flipped, latents.shape, kind[3])])
    others = _others(arrays, suffix, first=item.at[2])
    size = others.get("original_size", np.zeros(0))
    known = size.shape == (2,) and size.dtype.kind in "iu" and bool((size > 0).all() and (size < 1 << 31).all())
    return CacheRow(
        check_row(values, values.shape, kind[3]),
        orig_hw=(int(size[1]), int(size[0])) if known else (0, 0),
        extras={REST.name: _packed(others)} if rest else {},
    )


def _others(arrays: dict[str, np.ndarray], suffix: str, first: bool) -> dict[str, np.ndarray]:
    """The further arrays of a row: those that end in its suffix, without it. Those that end in none belong to the
    file; its first row has them, their names behind a slash.
    """
    others = {name.removesuffix(suffix): array for name, array in arrays.items() if name.endswith(suffix)}
    if first and suffix:
        others |= {f"/{name}": array for name, array in arrays.items() if not SIZE.search(name)}
    return others


def _packed(arrays: dict[str, np.ndarray]) -> np.ndarray:
    if not arrays:
        return np.zeros(0, np.uint8)
    try:
        tensors = {name: torch.from_numpy(np.require(array, requirements=["C", "W"])) for name, array in arrays.items()}
    except (TypeError, ValueError) as error:
        raise DamagedEntry(f"expected arrays of numbers beside the latents: {error}") from None
    return np.frombuffer(safetensors_bytes(tensors), np.uint8)


def _place(key: str, again: bool, out: Path) -> tuple[str, str]:
    """The file of a row, and the end "_{h}x{w}" of its arrays' names."""
    if not again:
        return renamed(key), ""
    match = KEY.fullmatch(key)
    if match is None:
        raise ValueError(f"{out}: expected keys PATH.npz or PATH.npz@HxW, got {key!r:.200}")
    return match[1], f"_{match[2]}" if match[2] else ""


def _arrays(row: OutRow, dtype: str, suffix: str, again: bool) -> dict[str, np.ndarray]:
    values = row.values if dtype == "F32" else to_tensor(row.values, dtype).float().numpy()
    arrays = dict(zip(("latents", "latents_flipped"), values, strict=False))
    if not again:
        height, width = row.orig_hw
        arrays["original_size"] = np.array([width, height], "<i8")
        arrays["crop_ltrb"] = _crop_ltrb((values.shape[-1] * STRIDE, values.shape[-2] * STRIDE), (width, height))
    elif len(row.extras.get(REST.name, ())):
        tensors, _ = read_safetensors(row.extras[REST.name].tobytes())
        arrays |= {name: tensor.numpy() for name, tensor in tensors.items()}
    names = [*(name for name in ORDER if name in arrays), *sorted(arrays.keys() - set(ORDER))]
    return {name[1:] if name[0] == "/" else name + suffix: arrays[name] for name in names}


def _crop_ltrb(bucket: tuple[int, int], image: tuple[int, int]) -> np.ndarray:
    """float64 [4]: left, top, right, bottom of the image, resized to fit into the bucket, (width, height) both."""
    ratio = image[0] / image[1]
    wide = bucket[0] / bucket[1] > ratio
    width, height = (bucket[1] * ratio, bucket[1]) if wide else (bucket[0], bucket[0] / ratio)
    left, top = (bucket[0] - width) // 2, (bucket[1] - height) // 2
    return np.array([left, top, left + width, top + height], "<f8")
