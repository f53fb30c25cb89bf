"""Latents of images, wherever they are: datasets, what `sample` writes, and files of others; read batch by batch."""

from __future__ import annotations

import dataclasses
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fastlatent.data.latents import LatentDataset
from fastlatent.sources.experiment import natural_order
from fastlatent.store.records import ROOT
from fastlatent.workflows.latent_arrays import READERS, LatentArrays
from fastlatent.workflows.latent_files import read_latent_file

Shape = tuple[int, ...]  # C, h, w
RAW, UNKNOWN = "raw", "unknown"
_SHARD = re.compile(r"latents_rank\d+_shard\d+\.safetensors")
EXPECTED = (
    "a dataset folder, a .safetensors file of `fastlatent sample`, .npz, .npy or .pt files or a folder of them, "
    "shards of LightningDiT (latents_rankRR_shardSSS.safetensors), or an experiment (folder with "
    "latents/PROMPT/VIDEO/step_*)"
)


@dataclass(frozen=True)
class LatentImages:
    """Latents of images, numbered from 0.

    Attributes:
        format: what they were found to be.
        are: RAW, as the autoencoder gives them; UNKNOWN: raw or scaled, which the user must say.
        made_by: identity and path of the autoencoder, if the files say it.
        names: of the images.
        groups: shape (C, h, w) of a latent → int64 numbers of the images that have it, ascending.
        read: ascending numbers of one group → float32 [B, C, h, w] on the CPU. ValueError: they cannot be read.
    """

    format: str
    are: str
    made_by: dict[str, Any] | None
    names: list[str]
    groups: dict[Shape, np.ndarray]
    read: Callable[[np.ndarray], Tensor]

    @property
    def channels(self) -> int:
        return next(iter(self.groups))[0]

    def batches(self, size: int) -> Iterator[np.ndarray]:
        """The numbers of all images in batches of one shape."""
        for numbers in self.groups.values():
            yield from (numbers[begin : begin + size] for begin in range(0, len(numbers), size))


def open_latents(path: Path, limit: int = 0) -> LatentImages:
    """The latents at `path`, the first `limit` of them (0: all). Of arrays only the headers are read here.

    Raises:
        ValueError: nothing is there, it is none of EXPECTED, or it is damaged.
    """
    if not path.exists():
        raise ValueError(f"{path} does not exist; expected {EXPECTED}")
    if path.is_dir():
        if (path / ROOT).exists():
            return _of_dataset(LatentDataset(path), limit)
        files = _latent_files(path)
        if not files:
            try:
                return _of_dataset(LatentDataset(path), limit)
            except ValueError as error:
                raise ValueError(f"{error}; or expected {EXPECTED}") from None
        return _of_files(path, files, limit)
    if path.suffix.lower() not in READERS:
        raise ValueError(f"{path}: expected {EXPECTED}")
    if path.suffix.lower() != ".safetensors" or _is_shard(path):
        return _of_files(path.parent, [path.name], limit)
    return _of_sampler(path, limit)


def dataset_means(dataset: LatentDataset, indices: np.ndarray) -> Tensor:
    """Posterior means float32 [B, C, ...] of a dataset's rows, which have one shape; not mirrored."""
    batch = dataset.gather(indices)
    values = batch[dataset.store.payload][:, 0].float()
    if "scale" in batch:
        scale = batch["scale"][:, 0]
        values *= scale.reshape(*scale.shape, *[1] * (values.ndim - scale.ndim))
    return values[:, : dataset.store.buckets[0].channels]


def _of_dataset(dataset: LatentDataset, limit: int) -> LatentImages:
    """Rows [F, C, h, w] are images; of rows [F, C, t, h, w] every frame is one."""
    store = dataset.store
    used = {number: bucket for number, bucket in enumerate(store.buckets) if bucket.rows}
    for bucket in used.values():
        if store.payload == "tokens" or len(bucket.shape) not in (4, 5):
            raise ValueError(f"{store.path}: expected latents of images, got {store.payload} {bucket.shape}")
    if not len(store):
        raise ValueError(f"{store.path}: expected latents of images, the dataset is empty")
    frames = np.array([b.shape[2] if len(b.shape) == 5 else 1 for b in store.buckets])[store.bucket]
    starts = np.concatenate([[0], np.cumsum(frames)])  # the first image of each row
    count = min(limit or starts[-1], starts[-1])
    rows = np.searchsorted(starts, np.arange(count), "right") - 1
    keys = [store.key(row) for row in range(rows[-1] + 1)]
    names = keys
    if len(starts) <= starts[-1]:  # there are more images than rows
        names = [f"{keys[row]}[{i - starts[row]}]" for i, row in enumerate(rows.tolist())]

    def read(numbers: np.ndarray) -> Tensor:
        wanted = rows[numbers]
        first = np.unique(wanted)
        means: dict[int, Tensor] = {}  # of whole rows
        for number in np.unique(store.bucket[first]):
            some = first[store.bucket[first] == number]
            means |= zip(some.tolist(), dataset_means(dataset, some), strict=True)
        places = zip(wanted.tolist(), (numbers - starts[wanted]).tolist(), strict=True)
        return torch.stack([means[row] if means[row].ndim == 3 else means[row][:, frame] for row, frame in places])

    shapes: dict[Shape, list[int]] = {}  # of several buckets where only the number of frames differs
    for number, bucket in used.items():
        shapes.setdefault((bucket.channels, *bucket.shape[-2:]), []).append(number)
    groups = {shape: np.flatnonzero(np.isin(store.bucket[rows], numbers)) for shape, numbers in shapes.items()}
    kind = f"a dataset of {store.payload}"
    hashed = store.provenance["hashed"]
    are = UNKNOWN if "values" in hashed.get("converted", {}).get("scaling", {}) else RAW
    made_by = dataset.autoencoder if "vae" in hashed else None  # of a converted cache it may not be known
    return LatentImages(kind, are, made_by, names, {k: v for k, v in groups.items() if len(v)}, read)


def _of_sampler(path: Path, limit: int) -> LatentImages:
    file = read_latent_file(path)

    def read(numbers: np.ndarray) -> Tensor:
        return dataclasses.replace(file, latents=file.latents[torch.from_numpy(numbers)]).raw()

    names = file.names()[: limit or None]
    numbers = np.arange(len(names))
    _, *shape = read(numbers[:1]).shape
    return LatentImages("latents of `fastlatent sample`", RAW, file.vae, names, {tuple(shape): numbers}, read)


def _is_shard(path: Path) -> bool:
    """Whether a .safetensors file is one of LightningDiT's, by its name or by what it holds."""
    if _SHARD.fullmatch(path.name):
        return True
    try:
        with safe_open(path, "pt") as file:
            return {"latents", "latents_flip"} <= set(file.keys())
    except SafetensorError:
        return False


def _latent_files(folder: Path) -> list[str]:
    """The files of latents below a folder, relative to it, with numbers in their order: all shards, or all of one kind.

    Raises:
        ValueError: there are several kinds.
    """
    found = []

    def fail(error: OSError) -> None:
        raise error

    for parent, folders, files in os.walk(folder, onerror=fail):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [os.path.relpath(os.path.join(parent, name), folder) for name in files if not name.startswith(".")]
    shards = [file for file in found if _SHARD.fullmatch(os.path.basename(file))]
    if shards:
        return sorted(shards, key=natural_order)  # latents_stats.pt lies beside them
    kinds = Counter(os.path.splitext(file)[1].lower() for file in found)
    kinds = Counter({kind: count for kind, count in kinds.items() if kind in READERS and kind != ".safetensors"})
    if len(kinds) > 1:
        there = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
        raise ValueError(f"{folder}: expected files of one kind, found {there}; name a folder of one kind, or one file")
    return sorted((file for file in found if os.path.splitext(file)[1].lower() in kinds), key=natural_order)


def _of_files(root: Path, files: list[str], limit: int) -> LatentImages:
    """Arrays in files below `root`, in their order."""
    parts: list[tuple[str, int]] = []  # file, place of the array in it
    starts: list[int] = [0]
    names: list[str] = []
    numbers: dict[Shape, list[np.ndarray]] = {}
    first = None
    for file in files:
        with LatentArrays(root / file) as opened:
            arrays = [(array.latent_shape, array.is_moments, array.count) for array in opened.arrays]
        alone, offset = sum(count for *_, count in arrays) == 1, len(names)
        for place, (shape, is_moments, count) in enumerate(arrays):
            first = first or (shape[0], is_moments)
            if (shape[0], is_moments) != first:
                came = _kind(shape[0], is_moments)
                raise ValueError(f"{root / file}: expected {_kind(*first)} as in {files[0]}, got {came}")
            end = min(len(names) + count, limit or sys.maxsize)
            numbers.setdefault(shape, []).append(np.arange(len(names), end))
            names += [file if alone else f"{file}[{number - offset}]" for number in range(len(names), end)]
            parts.append((file, place))
            starts.append(end)
        if len(names) == limit:
            break
    assert first is not None
    suffix = os.path.splitext(files[0])[1].lower()
    is_shard, is_moments = suffix == ".safetensors", first[1]
    many = f"{len(files)} {suffix} files" if len(files) > 1 else f"a {suffix} file"
    return LatentImages(
        f"{many}{' of LightningDiT' if is_shard else ' of moments' if is_moments else ''}",
        RAW if is_shard or is_moments else UNKNOWN,
        None,
        names,
        {shape: found for shape, ranges in numbers.items() if len(found := np.concatenate(ranges))},
        _Reader(root, parts, np.array(starts)).read,
    )


def _kind(channels: int, is_moments: bool) -> str:
    return f"{'moments' if is_moments else 'latents'} of {channels} channels"


class _Reader:
    """Reads images from the files that hold them. The last file stays open: a large one is read batch by batch."""

    def __init__(self, root: Path, parts: list[tuple[str, int]], starts: np.ndarray) -> None:
        self._root, self._parts, self._starts = root, parts, starts
        self._opened: LatentArrays | None = None

    def read(self, numbers: np.ndarray) -> Tensor:
        which = np.searchsorted(self._starts, numbers, "right") - 1
        latents = []
        for part in np.unique(which).tolist():
            rows = numbers[which == part] - self._starts[part]  # a part has one shape: these follow each other
            file, place = self._parts[part]
            latents.append(self._latents(self._root / file, place, int(rows[0]), int(rows[-1]) + 1))
        return torch.cat(latents)

    def _latents(self, path: Path, place: int, begin: int, end: int) -> Tensor:
        if self._opened is None or self._opened.path != path:
            if self._opened is not None:
                self._opened.close()
            self._opened = LatentArrays(path)
        latents = self._opened.arrays[place].latents(begin, end)
        if not latents.isfinite().all():
            raise ValueError(f"{path}: the latents {begin} to {end - 1} hold NaN or infinity")
        return latents
