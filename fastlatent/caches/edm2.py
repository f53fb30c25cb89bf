"""EDM2's and REPA's cache: NNNNN/img-mean-std-NNNNNNNN.npy [2C, h, w], mean‖std, and dataset.json with the classes.

A folder, or a zip file whose members are stored as they are (its tool writes such). Keys are the files' paths. The two
projects differ in the pixels that their autoencoder saw, and nothing in the files tells which: [0, 1] for EDM2, [-1, 1]
for REPA.

std becomes logvar = 2·ln(std), computed in float64 and rounded once; back, std = exp(logvar / 2). The means come back
bit for bit, float32 stds within 5.3e-7 of themselves (half a step of a logvar of -16 to -32) for all that the encoder
can give, 3e-7 and more.
Written is a folder, also where the source was a zip file. Rows of another dataset become float32, numbered from 0 on,
their logvar first clamped to [-30, 20], as EDM2's encoder does.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fastlatent.caches.cache import NAME_OF, Cache, CacheItem, CacheRow, DamagedEntry, Told, check_row
from fastlatent.caches.outgoing import Outgoing, put, target
from fastlatent.data.array_files import DamagedArrays, npy_bytes, read_npy, to_tensor
from fastlatent.data.packed_files import Member, member_content, zip_members
from fastlatent.sources.files import Files, Found
from fastlatent.store.files import parse_json

TITLE = "EDM2, REPA: NNNNN/img-mean-std-NNNNNNNN.npy with mean and std, and dataset.json; a folder or a zip file"
PAYLOADS = ("moments",)
SCALING = (1.0, 0.0)
DTYPE = "F32"
ROUNDING = 1e-6  # of logvar, after its way through a float32 std
NAME = re.compile(r"((?:.*/)?)\d{5,}/img-mean-std-\d{8,}\.npy", re.ASCII | re.DOTALL)
LABELS = "dataset.json"
MAX_CLASSES = 1 << 20
GLANCE = 1 << 16  # bytes of a zip file's directory that `claims` looks at


def claims(files: Files, found: Sequence[Found]) -> int:
    count = sum(1 for one in found if NAME.fullmatch(one.path))
    if count:
        return count
    try:
        return int(
            len(found) == 1
            and found[0].path.endswith(".zip")
            and any(NAME.fullmatch(one.name) for one in zip_members(*_ranges(files, found[0]), most=GLANCE))
        )
    except (DamagedArrays, OSError):
        return 0


def open_cache(files: Files, found: Sequence[Found], told: Told) -> Cache:
    if len(found) == 1 and found[0].path.endswith(".zip"):
        return _open_zip(files, found[0])
    items = [
        CacheItem(one.path, files.place(one.path), one.size, one.stamp) for one in found if NAME.fullmatch(one.path)
    ]
    others = [one.path for one in found if not NAME.fullmatch(one.path)]
    return _cache(files.root, items, others, lambda item: files.read(item.key), files.read, {})


def write(outgoing: Outgoing, out: Path) -> Iterator[int]:
    if len(outgoing.shapes) != 1 or len(outgoing.shapes[0]) != 4 or outgoing.shapes[0][0] != 1:
        shapes = " and ".join(str(list(shape)) for shape in outgoing.shapes)
        raise ValueError(
            f"{out}: EDM2's cache has rows [1, 2C, h, w] of one shape, without a mirror image, got {shapes}: choose mar"
        )
    channels = outgoing.shapes[0][1] // 2
    folder = str(outgoing.notes.get("folder", ""))
    again = bool(outgoing.facts)  # rows of such a cache have their names, numbers of classes and dtype back
    labelled = outgoing.count > 0 and outgoing.row(0).label >= 0
    labels: list[tuple[str, int]] = []
    names = []
    for number in range(outgoing.count):
        row = outgoing.row(number)
        name = row.key if again else f"{number // 1000:05d}/img-mean-std-{number:08d}.npy"
        if not NAME.fullmatch(name):
            raise ValueError(f"{out}: expected keys NNNNN/img-mean-std-NNNNNNNN.npy, got {name!r:.200}")
        if (row.label >= 0) != labelled:
            raise ValueError(
                f"{out}: EDM2's cache has a class for every row or for none, row {row.key!r:.200} differs from the "
                "first in that"
            )
        if labelled:
            labels.append((name.removeprefix(folder), int(outgoing.classes[row.label]) if again else row.label))
        names.append(name)
    for number, name in enumerate(names):
        path = target(out, name)
        if not path.exists():
            row = outgoing.row(number)
            values = to_tensor(row.values[0], outgoing.dtype).double().numpy()
            logvar = values[channels:] if again else np.clip(values[channels:], -30, 20)
            kind = {"F16": "<f2", "F64": "<f8"}.get(outgoing.dtype, "<f4") if again else "<f4"
            with np.errstate(over="ignore"):
                both = np.concatenate([values[:channels], np.exp(logvar / 2)]).astype(kind)
            if not (np.isfinite(both).all() and (both[channels:] > 0).all()):
                raise ValueError(f"{out}: row {row.key!r:.200}: a value is out of the range of {both.dtype}")
            put(path, npy_bytes(both))
        yield 1
    put(target(out, folder + LABELS), json.dumps({"labels": labels or None}).encode())


def _open_zip(files: Files, one: Found) -> Cache:
    read, size = _ranges(files, one)
    place = files.place(one.path)
    names: Counter[str] = Counter()
    own: list[Member] = []
    others: dict[str, Member] = {}
    try:
        for member in zip_members(read, size):
            names[member.name] += 1
            if NAME.fullmatch(member.name):
                own.append(member)
            else:
                others[member.name] = member
    except DamagedArrays as error:
        raise ValueError(f"{place}: {error}") from None
    left_out, items = {}, []
    most = 4 * own[0].size + 4096 if own else 0  # overlapping members could claim any sum of sizes
    for member in own:
        if names[member.name] > 1:
            why = f"{names[member.name]} members of this name"
        elif "\0" in member.name or not {"", ".", ".."}.isdisjoint(member.name.split("/")):
            why = "its name leads out of the folder"
        elif member.size > most:
            why = f"expected about {own[0].size:,} bytes as the first has, got {member.size:,}"
        else:
            items.append(CacheItem(member.name, place, one.size, one.stamp, at=member))
            continue
        left_out[f"{place}/{member.name}"] = why
    items.sort(key=lambda item: os.fsencode(item.key))

    def read_labels(name: str) -> bytes:
        try:
            return bytes(member_content(read, others[name]))
        except DamagedArrays as error:
            raise ValueError(f"{place}: {error}") from None

    return _cache(place, items, others, lambda item: bytes(member_content(read, item.at)), read_labels, left_out)


def _cache(
    root: str, items: list[CacheItem], others: Iterable[str], content: Any, read: Any, left_out: dict[str, str]
) -> Cache:
    """The cache of these items, which have no labels yet. others: names of the other files, which `read` reads."""
    folders = Counter(match[1] for item in items if (match := NAME.fullmatch(item.key)))
    if len(folders) > 1:
        listed = ", ".join(f"{folder or '.'} ({count:,} files)" for folder, count in sorted(folders.items()))
        raise ValueError(f"{root}: expected one cache, got several: {listed}: convert each by itself")
    folder = next(iter(folders), "")
    shape, dtype = _first(root, items, content)
    remarks: list[str] = []
    others = set(others)
    if folder + LABELS in others:
        others.discard(folder + LABELS)
        items, remarks = _labelled(items, folder, _labels(read(folder + LABELS), root, folder), root, left_out)
    else:
        remarks.append(f"no {folder}{LABELS}: rows have no classes")
    return Cache(
        items=items,
        payload="moments",
        dtype=dtype,
        buckets=((1, *shape),),
        content=content,
        row=partial(_row, shape, dtype),
        classes=[str(i) for i in range(max((item.label for item in items), default=-1) + 1)],
        facts={"posterior": "mean,std"},
        notes={"folder": folder},
        left_out=left_out,
        ignored=dict(Counter(os.path.splitext(name)[1].lower() for name in others)),
        remarks=tuple(remarks),
    )


def _row(shape: tuple[int, ...], dtype: str, item: CacheItem, data: bytes) -> CacheRow:
    both = check_row(read_npy(data), shape, dtype)
    half = shape[0] // 2
    values = np.empty((1, *shape), both.dtype)
    values[0, :half] = both[:half]
    logvar = both[half:].astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        np.log(logvar, out=logvar)
    np.multiply(logvar, 2, out=values[0, half:], casting="same_kind")
    if not np.isfinite(values[0, half:]).all():
        raise DamagedEntry("expected a std above 0 everywhere, got one that is 0, negative, infinite or no number")
    return CacheRow(values)


def _first(root: str, items: Sequence[CacheItem], content: Any, look: int = 8) -> tuple[tuple[int, ...], str]:
    """Shape and dtype of the first of a few items that can be read."""
    why = "no file has such a name"
    for item in items[:look]:
        try:
            values = read_npy(content(item))
        except (DamagedArrays, OSError) as error:
            why = f"{item.key}: {error}"
            continue
        dtype = NAME_OF.get(values.dtype)
        if dtype is None or values.ndim != 3 or len(values) % 2 or not values.size:
            raise ValueError(
                f"{root}: {item.key}: expected mean and std [2C, h, w] of floats, got {values.dtype} "
                f"{list(values.shape)}"
            )
        return values.shape, dtype
    raise ValueError(f"{root}: expected NNNNN/img-mean-std-NNNNNNNN.npy, none of the first can be read: {why}")


def _labels(data: bytes, root: str, folder: str) -> list[Any] | None:
    what = f"{root}: {folder}{LABELS}"
    parsed = parse_json(data, what)
    if not isinstance(parsed, dict) or "labels" not in parsed or not isinstance(parsed["labels"], (list, type(None))):
        raise ValueError(f'{what}: expected {{"labels": [["NNNNN/img-mean-std-NNNNNNNN.npy", 0], …]}} or null')
    labels = parsed["labels"]
    if labels and isinstance(labels[0], list) and len(labels[0]) == 2 and isinstance(labels[0][1], list):
        raise ValueError(
            f"{what}: expected the class of each image as an integer, got vectors: write the integers there"
        )
    return labels


def _labelled(
    items: list[CacheItem], folder: str, labels: list[Any] | None, root: str, left_out: dict[str, str]
) -> tuple[list[CacheItem], list[str]]:
    """The items with their classes; those without one go to `left_out`."""
    if labels is None:
        return items, [f"{folder}{LABELS} has no labels: rows have no classes"]
    known: dict[str, int] = {}
    wrong: dict[str, str] = {}
    for entry in labels:
        if not isinstance(entry, list) or len(entry) != 2 or not isinstance(entry[0], str):
            raise ValueError(f"{root}: {folder}{LABELS}: expected [name, class], got {entry!r:.100}")
        name, label = entry
        if type(label) is not int or not 0 <= label < MAX_CLASSES:
            wrong[name] = f"{LABELS}: expected a class from 0 to {MAX_CLASSES - 1:,}, got {label!r:.100}"
        elif known.setdefault(name, label) != label:
            wrong[name] = f"{LABELS}: two classes, {known[name]} and {label}"
    kept = []
    for item in items:
        name = item.key.removeprefix(folder)
        if name in wrong or name not in known:
            place = item.place if item.place.endswith(item.key) else f"{item.place}/{item.key}"
            left_out[place] = wrong.get(name, f"no class in {folder}{LABELS}")
        else:
            kept.append(CacheItem(item.key, item.place, item.size, item.stamp, known[name], at=item.at))
    spare = len((known.keys() | wrong.keys()) - {item.key.removeprefix(folder) for item in items})
    return kept, [f"{spare:,} names in {folder}{LABELS} have no file"] if spare else []


def _ranges(files: Files, one: Found) -> tuple[Any, int]:
    return partial(files.read_range, one.path), one.size
