"""LightningDiT's cache: latents_rank{RR}_shard{SSS}.safetensors of about 10,000 rows each, and latents_stats.pt.

A shard holds `latents` and `latents_flip` [n, C, H, W] (samples, as the autoencoder gives them; the flip is that of the
image) and `labels` int64 [n]. Keys are {shard}/{row:08d}. Round trip: the same shards with equal arrays, and equal
statistics. A dataset from elsewhere becomes shards of rank 0.
"""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from fastlatent.caches.cache import DTYPES, Cache, CacheItem, CacheRow, DamagedEntry, Told
from fastlatent.caches.mar import ignored
from fastlatent.caches.outgoing import Outgoing, put, put_file, target
from fastlatent.caches.shards import Ranges, shard_end, shard_of
from fastlatent.data.array_files import DamagedArrays, pt_bytes, read_pt
from fastlatent.data.tensor_files import ITEM_BYTES, TensorEntry, header, in_order, read_header
from fastlatent.sources.files import Files, Found, read_each

TITLE = "LightningDiT: latents_rank00_shard000.safetensors … with latents, latents_flip and labels"
PAYLOADS = ("latents",)
SCALING = (1.0, 0.0)
NUMBERED = True  # rows of a shard are renumbered where some were left out: the n-th row written is the n-th read again
SHARD = re.compile(r"(?:.*/)?latents_rank(\d+)_shard(\d+)\.safetensors", re.DOTALL)
STATISTICS = "latents_stats.pt"
MAX_CLASSES = 1_000_000  # a larger label is damage, and its list of names a bomb
BLOCK = 4 << 20  # bytes of rows gathered for one write
TORCH = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}


@dataclass(frozen=True, slots=True)
class Shard:
    """A shard whose header was checked; labels: None where it has none."""

    found: Found
    place: str
    stem: str
    rows: int
    latents: TensorEntry
    flip: TensorEntry | None
    labels: np.ndarray | None
    metadata: dict[str, str]
    others: tuple[str, ...]

    @property
    def kind(self) -> tuple[Any, ...]:
        """What must be the same in all shards."""
        return self.latents.dtype, self.latents.shape[1:], self.flip is not None, self.labels is not None


def claims(files: Files, found: Sequence[Found]) -> int:
    return sum(SHARD.fullmatch(one.path) is not None for one in found)


def open_cache(files: Files, found: Sequence[Found], told: Told) -> Cache:
    own = [one for one in found if SHARD.fullmatch(one.path)]
    folders = sorted({os.path.dirname(one.path) for one in own})
    if len(folders) > 1:
        raise ValueError(
            f"{files.root}: expected shards in one folder, got them in {folders[0] or '.'} and {folders[1]}"
            f"{' …' * (len(folders) > 2)}: each is a dataset of its own, convert them one by one"
        )
    ranges = Ranges(files)
    by_path = {one.path: one for one in own}
    looked = dict(zip(by_path, read_each(by_path, lambda path: _shard(files, ranges, by_path[path])), strict=True))
    left_out = {files.place(path): str(one) for path, one in looked.items() if isinstance(one, Exception)}
    shards = [one for one in looked.values() if isinstance(one, Shard)]
    if not shards:
        why = next((f"; {place}: {why}" for place, why in left_out.items()), "")
        raise ValueError(f"{files.root}: expected shards with latents [n, C, H, W], got none that can be used{why}")
    rows_of: Counter[tuple[Any, ...]] = Counter()
    for shard in shards:
        rows_of[shard.kind] += shard.rows
    kind = max(rows_of, key=lambda one: rows_of[one])
    dtype, shape, flip, labelled = kind
    left_out |= {one.place: f"expected {_said(kind)} as in most shards, got {_said(one.kind)}" for one in shards
                 if one.kind != kind}  # fmt: skip
    shards = [one for one in shards if one.kind == kind]
    latents = np.dtype(str(DTYPES[dtype]))
    row_bytes = int(np.prod(shape)) * latents.itemsize
    views = 2 if flip else 1

    def content(item: CacheItem) -> bytes:
        shard, i = item.at
        parts = [ranges.read(shard.found, shard.latents.begin + i * row_bytes, row_bytes)]
        if flip:
            parts.append(ranges.read(shard.found, shard.flip.begin + i * row_bytes, row_bytes))
        parts.append(item.label.to_bytes(8, "little", signed=True))
        return b"".join(parts)

    def row(item: CacheItem, data: bytes) -> CacheRow:
        if len(data) != views * row_bytes + 8:
            raise DamagedEntry(f"expected {views * row_bytes + 8} bytes, got {len(data)}")
        return CacheRow(np.frombuffer(data, latents, views * row_bytes // latents.itemsize).reshape(views, *shape))

    most = max((int(one.labels.max()) for one in shards if one.labels is not None and one.rows), default=-1)
    notes, remarks = _notes(files, folders[0], shards)
    others = sorted({name for one in shards for name in one.others})
    if others:
        remarks += [f"not converted, since rows of them have no place in the format: {', '.join(others)}"]
    return Cache(
        items=_items(shards),
        payload="latents",
        dtype=dtype,
        buckets=((views, *shape),),
        content=content,
        row=row,
        classes=[str(i) for i in range(most + 1)],
        facts={"flip": flip, "labels": labelled},
        notes=notes,
        left_out=left_out,
        ignored=ignored([one for one in found if os.path.basename(one.path) != STATISTICS], ".safetensors"),
        remarks=tuple(remarks + _ranks(shards)),
        close=ranges.close,
    )


def _shard(files: Files, ranges: Ranges, found: Found) -> Shard:
    entries, metadata = read_header(partial(ranges.read, found), found.size)
    latents, flip, label = (entries.pop(name, None) for name in ("latents", "latents_flip", "labels"))
    if latents is None or len(latents.shape) != 4 or latents.dtype not in DTYPES or 0 in latents.shape[1:]:
        got = "none" if latents is None else f"{latents.dtype} {list(latents.shape)}"
        raise DamagedEntry(f"expected latents [n, C, H, W] of floats, got {got}")
    if flip is not None and (flip.dtype, flip.shape) != (latents.dtype, latents.shape):
        raise DamagedEntry(
            f"expected latents_flip {latents.dtype} {list(latents.shape)} as latents, "
            f"got {flip.dtype} {list(flip.shape)}"
        )
    rows, labels = latents.shape[0], None
    if label is not None:
        if (label.dtype, label.shape) != ("I64", (rows,)):
            raise DamagedEntry(f"expected labels I64 [{rows}], got {label.dtype} {list(label.shape)}")
        labels = np.frombuffer(ranges.read(found, label.begin, 8 * rows), "<i8")
        if rows and not -1 <= labels.min() <= labels.max() < MAX_CLASSES:
            raise DamagedEntry(f"expected labels from 0 to {MAX_CLASSES - 1}, got {labels.min()} to {labels.max()}")
    stem = found.path.removesuffix(".safetensors")
    return Shard(found, files.place(found.path), stem, rows, latents, flip, labels, metadata, tuple(entries))


def _items(shards: Sequence[Shard]) -> list[CacheItem]:
    return [
        CacheItem(f"{one.stem}/{i:08d}", one.place, one.found.size, one.found.stamp, label, at=(one, i))
        for one in shards
        for i, label in enumerate([-1] * one.rows if one.labels is None else one.labels.tolist())
    ]


def _said(kind: tuple[Any, ...]) -> str:
    dtype, shape, flip, labelled = kind
    return (
        f"latents {dtype} {list(shape)} {'with' if flip else 'without'} latents_flip and "
        f"{'with' if labelled else 'without'} labels"
    )


def _usual(rows: int, dtype: str) -> dict[str, str]:
    return {"total_size": str(rows), "dtype": str(TORCH[dtype]), "device": "cpu"}


def _notes(files: Files, folder: str, shards: Sequence[Shard]) -> tuple[dict[str, Any], list[str]]:
    """The statistics beside the shards and metadata that is not the usual; and what to remark."""
    notes: dict[str, Any] = {}
    remarks = []
    unusual = {one.stem: one.metadata for one in shards if one.metadata != _usual(one.rows, one.latents.dtype)}
    if unusual:
        notes["metadata"] = unusual
    path = f"{folder}/{STATISTICS}".lstrip("/")
    if not files.exists(path):
        return notes, ["no latents_stats.pt"]
    try:
        loaded = read_pt(files.read(path))
        for name in ("mean", "std"):
            tensor = loaded[name]
            if tensor.dtype not in (torch.float32, torch.float64) or not bool(torch.isfinite(tensor).all()):
                raise DamagedArrays(f"expected {name} of finite float32, got {tensor.dtype}")
            if tuple(tensor.shape) != (1, shards[0].latents.shape[1], 1, 1):
                raise DamagedArrays(
                    f"expected {name} [1, {shards[0].latents.shape[1]}, 1, 1], got {list(tensor.shape)}"
                )
            notes[name] = tensor.flatten().tolist()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        notes.pop("mean", None)
        remarks.append(f"{files.place(path)} is not used: {error}")
    return notes, remarks


def _ranks(shards: Sequence[Shard]) -> list[str]:
    """What the numbers of ranks and shards give away."""
    rows: dict[int, int] = defaultdict(int)
    numbers: dict[int, set[int]] = defaultdict(set)
    for one in shards:
        match = SHARD.fullmatch(one.found.path)
        assert match is not None
        rows[int(match[1])] += one.rows
        numbers[int(match[1])].add(int(match[2]))
    remarks = []
    if len(rows) > 1:
        remarks.append(
            f"{len(rows)} ranks: up to {len(rows) - 1} images may be here twice (DistributedSampler repeats some "
            "so that all ranks have as many); each was drawn anew, so they cannot be told apart"
        )
    if len(set(rows.values())) > 1:  # every rank of one run has as many
        said = ", ".join(f"rank {rank}: {count:,}" for rank, count in sorted(rows.items())[:8])
        remarks.append(
            f"ranks differ in rows ({said}{' …' * (len(rows) > 8)}): shards are missing, or some are left from a run "
            "with another number of processes, whose images are then here twice"
        )
    gaps = [rank for rank, there in sorted(numbers.items()) if len(there) != max(there) + 1]
    if gaps:
        remarks.append(f"shards are missing of rank {', '.join(map(str, gaps[:8]))}")
    return remarks


def write(outgoing: Outgoing, out: Path) -> Iterator[int]:
    facts = outgoing.facts
    if len(outgoing.shapes) != 1 or len(outgoing.shapes[0]) != 4:
        raise ValueError(
            f"{out}: expected rows [F, C, H, W] of one shape, got {[list(one) for one in outgoing.shapes]}: "
            "the format stacks them; convert to another one"
        )
    views = outgoing.shapes[0][0]
    if views == 1 and facts.get("flip") is not False:
        raise ValueError(
            f"{out}: expected rows with their mirror image, which LightningDiT's loader takes for every second sample, "
            "got F = 1: encode with --mirror"
        )
    if not outgoing.classes and "labels" not in facts:
        raise ValueError(f"{out}: expected labels, which LightningDiT's loader needs, got a dataset without classes")
    start = number = 0
    width = max(3, len(str((outgoing.count - 1) // outgoing.rows_per_shard)))  # so that names sort as numbers
    while start < outgoing.count:
        if facts:
            stem, end = shard_of(outgoing.row(start).key, out), shard_end(outgoing, start, out)
        else:
            stem, end = f"latents_rank00_shard{number:0{width}d}", min(start + outgoing.rows_per_shard, outgoing.count)
        path = target(out, stem + ".safetensors")
        if not path.exists():
            put_file(path, partial(_write_shard, outgoing, start, end, stem))
        yield end - start
        start, number = end, number + 1
    folder = shard_of(outgoing.row(0).key, out).rpartition("/")[0] if facts and outgoing.count else ""
    statistics = {name: outgoing.notes.get(name, default.tolist()) for name, default in
                  (("mean", outgoing.mean), ("std", outgoing.std))}  # fmt: skip
    put(
        target(out, f"{folder}/{STATISTICS}".lstrip("/")),
        pt_bytes({name: torch.tensor(one, dtype=torch.float32).view(1, -1, 1, 1) for name, one in statistics.items()}),
    )


def _write_shard(outgoing: Outgoing, start: int, end: int, stem: str, file: BinaryIO) -> None:
    """A shard, a few rows at a time: 10,000 rows of 256 KiB would be 2.6 GB."""
    rows, (views, *shape) = end - start, outgoing.shapes[0]
    tensors = {name: (outgoing.dtype, (rows, *shape)) for name in ("latents", "latents_flip")[:views]}
    if outgoing.facts.get("labels") is not False:
        tensors["labels"] = ("I64", (rows,))
    names = in_order(tensors)
    usual = _usual(rows, outgoing.dtype)
    metadata = outgoing.notes.get("metadata", {}).get(stem, usual)
    metadata = metadata | {name: usual[name] for name in ("total_size", "dtype") if name in metadata}
    head, places = header({name: tensors[name] for name in names}, metadata)
    at = dict(zip(names, places, strict=False))
    descriptor = file.fileno()
    _write_at(descriptor, head, 0)
    row_bytes = int(np.prod(shape)) * ITEM_BYTES[outgoing.dtype]
    step = max(1, BLOCK // row_bytes)
    labels = np.empty(rows, "<i8")
    for first in range(0, rows, step):
        block = [outgoing.row(start + i) for i in range(first, min(first + step, rows))]
        labels[first : first + len(block)] = [one.label for one in block]
        for view, name in enumerate(("latents", "latents_flip")[:views]):
            _write_at(descriptor, b"".join([one.values[view].tobytes() for one in block]), at[name] + first * row_bytes)
    if "labels" in at:
        _write_at(descriptor, labels.tobytes(), at["labels"])


def _write_at(descriptor: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        count = os.pwrite(descriptor, view, offset)
        view, offset = view[count:], offset + count
