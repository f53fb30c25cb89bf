"""fast-DiT's cache: <name>_features/{i}.npy [1, C, h, w], a scaled sample, beside <name>_labels/{i}.npy, its class [1].

Its loader lists both folders and takes what comes at the same place, so a row is a pair of equal names. The key is the
number i with eight digits (names that are padded with zeros keep that), or the name where not all are numbers. Classes
are named by their numbers. Round trip: equal names; float16 bit for bit, float32 within 2^-23 of itself (the raw value
is rounded once, the scaled one again), bit for bit with --scaling-factor unknown. Rows of another dataset become
float32, numbered from 0 on.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import numpy as np

from fastlatent.caches.cache import NAME_OF, Cache, CacheItem, CacheRow, DamagedEntry, Told, check_row
from fastlatent.caches.outgoing import Outgoing, put, target
from fastlatent.data.array_files import DamagedArrays, npy_bytes, read_npy, to_tensor
from fastlatent.sources.files import Files, Found, read_each

TITLE = "fast-DiT: <name>_features/{i}.npy beside <name>_labels/{i}.npy"
PAYLOADS = ("latents",)
SCALING = (0.18215, 0.0)
DTYPE = "F32"
DEFAULT = "imagenet256_"
MAX_CLASSES = 1 << 20
# the folder and its name up to "features"; the name of a file
FEATURES = re.compile(r"((?:.*/)?(?:[^/]*_)?)features/([^/]+)\.npy", re.DOTALL)
LABELS = re.compile(r"((?:.*/)?(?:[^/]*_)?)labels/([^/]+)\.npy", re.DOTALL)
NUMBER = re.compile(r"\d{1,18}", re.ASCII)


def claims(files: Files, found: Sequence[Found]) -> int:
    features = sum(1 for one in found if FEATURES.fullmatch(one.path))
    return features and features + sum(1 for one in found if LABELS.fullmatch(one.path))


def open_cache(files: Files, found: Sequence[Found], told: Told) -> Cache:
    folders: dict[str, dict[str, Found]] = {}
    classes: dict[str, dict[str, Found]] = {}
    ignored: Counter[str] = Counter()
    for one in found:
        if match := FEATURES.fullmatch(one.path):
            folders.setdefault(match[1], {})[match[2]] = one
        elif match := LABELS.fullmatch(one.path):
            classes.setdefault(match[1], {})[match[2]] = one
        else:
            ignored[os.path.splitext(one.path)[1].lower()] += 1
    if len(folders) != 1:
        listed = ", ".join(f"{name}features ({len(own):,} files)" for name, own in folders.items()) or "none"
        raise ValueError(f"{files.root}: expected one folder <name>_features, got {listed}: convert each by itself")
    [(name, features)] = folders.items()
    labels = classes.get(name, {})
    if not labels:
        raise ValueError(f"{files.root}: expected the classes in {name}labels/{{i}}.npy, got none")
    shape, dtype = _first(files, list(features.values()))

    padding = _padding(features)
    left_out: dict[str, str] = {}
    paired: list[tuple[int, str]] = []
    for stem, one in features.items():
        number = int(stem) if padding is not None else 0
        if padding is not None and stem != f"{number:0{padding}d}":
            left_out[files.place(one.path)] = f"expected the name {number:0{padding}d}.npy as the others are numbered"
        elif stem not in labels:
            left_out[files.place(one.path)] = f"no class: expected {name}labels/{stem}.npy"
        else:
            paired.append((number, stem))
    paired.sort(key=lambda pair: (pair[0], os.fsencode(pair[1])))
    digits = max(8, len(str(paired[-1][0]))) if paired else 8
    read = read_each([labels[stem].path for _, stem in paired], files.read)
    items, head, most = [], [b""], -1
    for (number, stem), data in zip(paired, read, strict=True):
        one = features[stem]
        try:
            label = _label(data, head)
        except (ValueError, OSError) as error:
            left_out[files.place(one.path)] = f"its class {name}labels/{stem}.npy: {error}"
            continue
        most = max(most, label)
        key = stem if padding is None else f"{number:0{digits}d}"
        items.append(CacheItem(key, files.place(one.path), one.size, one.stamp, label, at=one.path))
    alone = len(labels.keys() - features.keys())

    def row(item: CacheItem, data: bytes) -> CacheRow:
        return CacheRow(check_row(read_npy(data), shape, dtype))

    return Cache(
        items=items,
        payload="latents",
        dtype=dtype,
        buckets=(shape,),
        content=lambda item: files.read(item.at),
        row=row,
        classes=[str(i) for i in range(most + 1)],
        facts={"name": name, "padding": padding},
        left_out=left_out,
        ignored=dict(ignored),
        remarks=(f"{alone:,} files of {name}labels have no features",) if alone else (),
    )


def write(outgoing: Outgoing, out: Path) -> Iterator[int]:
    again = bool(outgoing.facts)  # rows of such a cache have their names, classes and dtype back
    name, padding = outgoing.facts.get("name", DEFAULT), outgoing.facts.get("padding")
    if len(outgoing.shapes) != 1 or len(outgoing.shapes[0]) != 4 or outgoing.shapes[0][0] != 1:
        shapes = " and ".join(str(list(shape)) for shape in outgoing.shapes)
        raise ValueError(
            f"{out}: fast-DiT's cache has rows [1, C, h, w] of one shape, without a mirror image, got {shapes}: "
            "choose lightningdit or webdataset"
        )
    places = []
    for number in range(outgoing.count):
        row = outgoing.row(number)
        if row.label < 0:
            raise ValueError(f"{out}: fast-DiT's cache has a class for every row, got none for {row.key!r:.200}")
        if again and padding is not None and not NUMBER.fullmatch(row.key):
            raise ValueError(
                f"{out}: expected numbers as keys, as the cache had that was converted, got {row.key!r:.200}"
            )
        stem = str(number) if not again else row.key if padding is None else f"{int(row.key):0{padding}d}"
        label = int(outgoing.classes[row.label]) if again else row.label
        places.append((stem, label))
    for number, (stem, label) in enumerate(places):
        features, labels = target(out, f"{name}features/{stem}.npy"), target(out, f"{name}labels/{stem}.npy")
        if not features.exists():
            values = outgoing.row(number).values
            if outgoing.dtype == "BF16" or (not again and outgoing.dtype != "F32"):
                values = to_tensor(values, outgoing.dtype).float().numpy()
            put(features, npy_bytes(values))
        put(labels, npy_bytes(np.array([label], "<i8")))
        yield 1


def _first(files: Files, own: Sequence[Found], look: int = 8) -> tuple[tuple[int, ...], str]:
    """Shape and dtype of the first of a few files that can be read."""
    why = ""
    for one in own[:look]:
        try:
            values = read_npy(files.read(one.path))
        except (DamagedArrays, OSError) as error:
            why = why or f"{files.place(one.path)}: {error}"
            continue
        dtype = NAME_OF.get(values.dtype)
        if dtype is None or values.ndim != 4 or len(values) != 1 or not values.size:
            raise ValueError(
                f"{files.place(one.path)}: expected [1, C, h, w] of floats, got {values.dtype} {list(values.shape)}"
            )
        return values.shape, dtype
    raise ValueError(f"{files.root}: expected latents in .npy files, none of the first {len(own[:look])} is one: {why}")


def _padding(stems: Collection[str]) -> int | None:
    """How many digits the names have if they are padded with zeros, else 0; None where not all are numbers."""
    if not all(map(NUMBER.fullmatch, stems)):
        return None
    widths = Counter(len(stem) for stem in stems if stem[0] == "0" and len(stem) > 1)
    return widths.most_common(1)[0][0] if widths else 0


def _label(data: bytes | Exception, head: list[bytes]) -> int:
    """The class in a file [1] or [] of integers. head: [what precedes the number in a file of int64, once known]."""
    if isinstance(data, Exception):
        raise data
    if head[0] and len(data) == len(head[0]) + 8 and data.startswith(head[0]):
        label = int.from_bytes(data[-8:], "little", signed=True)
    else:
        values = read_npy(data)
        if values.size != 1 or values.dtype.kind not in "iu":
            raise DamagedEntry(f"expected one integer, got {values.dtype} {list(values.shape)}")
        label = int(values.reshape(())[()])
        if values.dtype == "<i8":
            head[0] = bytes(data[:-8])
    if not 0 <= label < MAX_CLASSES:
        raise DamagedEntry(f"expected a class from 0 to {MAX_CLASSES - 1:,}, got {label}")
    return label
