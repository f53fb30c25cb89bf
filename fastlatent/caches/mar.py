"""MAR's and LatentLM's cache: one .npz for each image, with `moments` and `moments_flip` [2C, h, w] float32.

The tree is that of the images, <class>/<file>.JPEG.npz or <class>/<file>.npz. Values are mean‖logvar as the autoencoder
gives them. The flip is that of the image, encoded. Round trip: equal arrays under equal names; bfloat16, which
numpy lacks, becomes float32.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from fastlatent.caches.cache import NAME_OF, Cache, CacheItem, CacheRow, DamagedEntry, Told, check_row
from fastlatent.caches.outgoing import Outgoing, put, target
from fastlatent.data.array_files import DamagedArrays, npz_bytes, read_npz, to_tensor
from fastlatent.sources.files import Files, Found

TITLE = "MAR, LatentLM: <class>/<file>.npz with moments and moments_flip"
PAYLOADS = ("moments",)
SCALING = (1.0, 0.0)
SUFFIX = ".npz"
NAMES = ("moments", "moments_flip")


def claims(files: Files, found: Sequence[Found]) -> int:
    own = [one for one in found if one.path.endswith(SUFFIX)]
    return len(own) if first_readable(files, own) is not None else 0


def open_cache(files: Files, found: Sequence[Found], told: Told) -> Cache:
    own = [one for one in found if one.path.endswith(SUFFIX)]
    first = first_readable(files, own)
    if first is None:
        raise ValueError(f"{files.root}: expected .npz files with an array 'moments', got none that can be read")
    flip, moments = "moments_flip" in first, first["moments"]
    dtype = NAME_OF.get(moments.dtype)
    if dtype is None or moments.ndim != 3 or len(moments) % 2:
        raise ValueError(
            f"{files.root}: expected moments [2C, h, w] of floats, got {moments.dtype} {list(moments.shape)}"
        )
    shape = moments.shape
    classes, labels = classes_of(one.path for one in own)

    def row(item: CacheItem, data: bytes) -> CacheRow:
        arrays = read_npz(data, NAMES)
        if set(arrays) != set(NAMES if flip else NAMES[:1]):
            wanted = "moments and moments_flip" if flip else "moments alone"
            raise DamagedEntry(f"expected {wanted} as in the first file, got {', '.join(arrays) or 'neither'}")
        views = [check_row(arrays[name], shape, dtype) for name in (NAMES if flip else NAMES[:1])]
        return CacheRow(np.stack(views))

    return Cache(
        items=[
            CacheItem(one.path.removesuffix(SUFFIX), files.place(one.path), one.size, one.stamp, label, at=one.path)
            for one, label in zip(own, labels, strict=True)
        ],
        payload="moments",
        dtype=dtype,
        buckets=((2 if flip else 1, *shape),),
        content=lambda item: files.read(item.at),
        row=row,
        classes=classes,
        ignored=ignored(found, SUFFIX),
        remarks=() if flip else ("no moments_flip: rows have no mirror image",),
    )


def write(outgoing: Outgoing, out: Path) -> Iterator[int]:
    for number in range(outgoing.count):
        row = outgoing.row(number)
        path = target(out, row.key + SUFFIX)
        if not path.exists():
            values = to_tensor(row.values, "BF16").float().numpy() if outgoing.dtype == "BF16" else row.values
            put(path, npz_bytes(dict(zip(NAMES, values, strict=False))))
        yield 1


def first_readable(files: Files, own: Sequence[Found], look: int = 8) -> dict[str, np.ndarray] | None:
    """The arrays of the first of a few files that can be read and have moments."""
    for one in own[:look]:
        try:
            arrays = read_npz(files.read(one.path), NAMES)
        except (DamagedArrays, OSError):
            continue
        if "moments" in arrays:
            return arrays
    return None


def classes_of(paths: Iterator[str]) -> tuple[list[str], list[int]]:
    """As torchvision's ImageFolder: classes are the sorted names of the first folders; none where a file has none."""
    heads = [head if rest else None for head, _, rest in (path.partition("/") for path in paths)]
    if None in heads:
        return [], [-1] * len(heads)
    classes = sorted({head for head in heads if head is not None})
    number = {name: i for i, name in enumerate(classes)}
    return classes, [number[str(head)] for head in heads]


def ignored(found: Sequence[Found], *suffixes: str) -> dict[str, int]:
    """Suffix -> how many files do not end in one of `suffixes`."""
    others = (one.path for one in found if not one.path.endswith(suffixes))
    return dict(Counter(os.path.splitext(path)[1].lower() for path in others))
