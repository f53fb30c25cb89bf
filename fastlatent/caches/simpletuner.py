"""SimpleTuner's cache: a .pt for each sample below folders like those of the images, each perhaps a gzip file.

A file is a tensor [C, h, w] or [C, T, h, w], or a dict with `latents` and more (of sounds: lengths, lyrics), scaled as
the model wants it, which files do not tell. SimpleTuner looks for SHA-256(the image's name without suffix).pt, or with
hash_filenames off for that name itself. Any other tree of .pt files with one latent in each reads like this too; its
first folders are the classes.

Round trip: equal tensors under equal names, zipped where the first file was; in a dict where that was one. What a dict
holds besides (tensors, and what JSON can hold) comes back as it was, but tuples as lists.
"""

from __future__ import annotations

import gzip
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from fastlatent.caches.cache import REST, Cache, CacheItem, CacheRow, DamagedEntry, Told, check_row
from fastlatent.caches.mar import classes_of, ignored
from fastlatent.caches.outgoing import Outgoing, put, target
from fastlatent.caches.pt_files import SUFFIX, LatentReader, kinds, looks, own_files
from fastlatent.data.array_files import GZIP, pt_bytes, read_safetensors, safetensors_bytes, to_tensor
from fastlatent.sources.files import Files, Found
from fastlatent.store.files import canonical_json

TITLE = "SimpleTuner, or any tree of <name>.pt, not all called by numbers: a tensor [C, h, w] or [C, T, h, w] in each"
PAYLOADS = ("latents",)
SCALING = None
NOTED = ("aspect_ratio_bucket_indices", "aspect_ratio_bucket_metadata")  # JSON that may lie beside
MAX_NOTED = 1 << 20


def claims(files: Files, found: Sequence[Found]) -> int:
    return kinds(files, found)["simpletuner"]


def open_cache(files: Files, found: Sequence[Found], told: Told) -> Cache:
    own = own_files(found)
    seen = looks(files, own)
    good = [one for one in seen if one is not None and 1 <= len(one.shape) <= 4]
    if not good:
        raise ValueError(f"{files.root}: expected .pt files with a latent [C, h, w] in each, got none that can be read")
    # Rows of a dataset have one number of channels and axes, and one dtype: those of most files.
    (channels, axes, dtype), _ = Counter((one.shape[0], len(one.shape), one.dtype) for one in good).most_common(1)[0]
    alike = [one for one in good if (one.shape[0], len(one.shape), one.dtype) == (channels, axes, dtype)]
    shapes = {(1, *one.shape) for one in alike}
    rest, latents = any(one.rest for one in alike), LatentReader()
    key = Counter(one.key for one in alike).most_common(1)[0][0]
    first = next(place for place, one in zip(own, seen, strict=True) if one is not None)

    def row(item: CacheItem, data: bytes) -> CacheRow:
        values, more = latents.read(data)
        if values.shape not in shapes:
            got = list(values.shape[1:])
            raise DamagedEntry(f"expected [{channels}, …] of {axes} axes as in most files, got {got}")
        extras = {REST.name: rest_of(more)} if rest else {}
        return CacheRow(check_row(values, values.shape, dtype), extras=extras)

    classes, labels = classes_of(one.path for one in own)
    items = [
        CacheItem(one.path.removesuffix(SUFFIX), files.place(one.path), one.size, one.stamp, label)
        for one, label in zip(own, labels, strict=True)
    ]
    items.sort(key=lambda item: os.fsencode(item.key))
    noted, remarks = _read_notes(files, found)
    return Cache(
        items=items,
        payload="latents",
        dtype=dtype,
        buckets=tuple(sorted(shapes)),
        content=lambda item: files.read(item.key + SUFFIX),
        row=row,
        classes=classes,
        fields=(REST,) if rest else (),
        facts={"gzip": files.read_range(first.path, 0, 2) == GZIP, "key": key},
        notes={"files": noted} if noted else {},
        ignored=ignored([one for one in found if one.path not in noted], SUFFIX),
        remarks=tuple(remarks),
    )


def rest_of(more: Mapping[Any, Any]) -> np.ndarray:
    """uint8 [L]: tensors, and in the metadata's `json` the rest, of what a dict holds besides its latent; [0] if none.

    Raises:
        DamagedEntry: something else is among it.
    """
    if not more:
        return np.empty(0, np.uint8)
    tensors = {name: one for name, one in more.items() if isinstance(one, Tensor)}
    try:
        plain = canonical_json({name: one for name, one in more.items() if name not in tensors})
        data = safetensors_bytes(tensors, {"json": plain.decode()})
    except (ValueError, TypeError, KeyError) as error:
        raise DamagedEntry(
            f"expected tensors, texts and numbers beside the latent, got {', '.join(map(str, more)):.200} ({error}); "
            "save the latent alone"
        ) from None
    return np.frombuffer(data, np.uint8)


def _read_notes(files: Files, found: Sequence[Found]) -> tuple[dict[str, str], list[str]]:
    """Path -> text of the small JSON files about the buckets, and lines about those that are not kept."""
    noted: dict[str, str] = {}
    remarks: list[str] = []
    for one in found:
        name = one.path.rpartition("/")[2]
        if name.startswith(NOTED) and name.endswith(".json"):
            try:
                if one.size > MAX_NOTED:
                    raise ValueError(f"{one.size:,} bytes")
                noted[one.path] = files.read(one.path).decode()
            except (OSError, ValueError) as error:
                remarks.append(f"{files.place(one.path)} is not kept with the dataset: {error}")
    return noted, remarks


def write(outgoing: Outgoing, out: Path) -> Iterator[int]:
    if any(shape[0] != 1 for shape in outgoing.shapes):
        raise ValueError(f"{out}: expected rows without mirror images, which a .pt of SimpleTuner cannot hold")
    zipped, key = outgoing.facts.get("gzip", False), outgoing.facts.get("key") or ""
    for path, text in outgoing.notes.get("files", {}).items():
        put(target(out, path), text.encode())
    for number in range(outgoing.count):
        row = outgoing.row(number)
        path = target(out, row.key + SUFFIX)
        if not path.exists():
            value: Any = to_tensor(row.values[0], outgoing.dtype)
            more = row.extras.get(REST.name, ())
            if key or len(more):
                value = {key or "latents": value, **(_rest(more) if len(more) else {})}
            data = pt_bytes(value)
            put(path, gzip.compress(data, mtime=0) if zipped else data)
        yield 1


def _rest(more: Any) -> dict[str, Any]:
    tensors, metadata = read_safetensors(np.ascontiguousarray(more).tobytes())
    return {**tensors, **json.loads(metadata.get("json", "{}"))}
