"""New datasets out of finished ones, by reference to the same shards: merge, split, filter."""

from __future__ import annotations

import difflib
import errno
import fnmatch
import functools
import itertools
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from fastlatent.store.checked import open_checked
from fastlatent.store.files import (
    TEMPORARY,
    canonical_json,
    fsync_directory,
    inside,
    make_directory,
    publish,
    write_all,
    write_atomic,
)
from fastlatent.store.generation import Contents, DatasetInfo
from fastlatent.store.generation import publish as publish_generation
from fastlatent.store.live import (
    Columns,
    count_rows,
    dataset_index,
    group_columns,
    group_keys,
    live_statistics,
    merged,
    renumber,
    take,
)
from fastlatent.store.provenance import differences
from fastlatent.store.reader import PROVENANCE, Dataset
from fastlatent.store.records import Bucket, ShardRecord, decode_key, encode_key, key_columns, key_list
from fastlatent.store.shard import Shard
from fastlatent.store.verify import BLOCK_BYTES

# Where a second name for a file cannot be: another file system, one without hard links, too many links.
NO_LINK = (errno.EXDEV, errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK)


@dataclass(frozen=True)
class Derived:
    """A new dataset, and how many of its shards are the same files as its parents' (the others were copied)."""

    info: DatasetInfo
    linked: int


@dataclass(frozen=True)
class Part:
    """What becomes a dataset.

    Attributes:
        shards: each with the dataset that it lies in, and its record there; `records`: its record in the new one.
        index: columns, numbered through them. buckets, classes, quarantine: as in `Contents`.
    """

    shards: list[tuple[Dataset, ShardRecord]]
    records: list[ShardRecord]
    index: Columns
    buckets: list[Bucket]
    classes: list[str]
    quarantine: list[dict[str, Any]]


def merge(paths: list[Path], out: Path, *, copy: bool) -> Derived:
    """One dataset of all samples of several that have one fingerprint.

    Classes are united by name, in the order in which they first appear; so the labels of the first dataset stay.

    Raises:
        ValueError: fewer than two datasets, other fingerprints (field by field), a key or a group twice (both datasets
            are named), or `out` is there already.
    """
    if len(paths) < 2:
        raise ValueError(f"expected at least two datasets to merge, got {len(paths)}")
    parents = [Dataset.open(path) for path in paths]
    first = parents[0]
    for other in parents[1:]:
        if other.fingerprint != first.fingerprint:
            lines = "\n  ".join(differences(first.provenance["hashed"], other.provenance["hashed"]))
            lines = lines.replace("(dataset)", f"({first.path})").replace("(now)", f"({other.path})")
            raise ValueError(f"{first.path} and {other.path} were encoded with different settings:\n  {lines}")
        if other.root["fields"] != first.root["fields"] or (other.groups is None) != (first.groups is None):
            raise ValueError(
                f"{first.path} and {other.path}: expected the same fields and groups in both, got "
                f"{first.root['fields']} and {other.root['fields']}"
            )
        buckets = (first.buckets[0], other.buckets[0])
        kinds = [(one.shape[0], len(one.shape), one.channels, one.dtype) for one in buckets]
        if kinds[0] != kinds[1]:
            raise ValueError(
                f"{first.path} and {other.path}: expected rows of one kind and dtype, got {first.buckets[0]} and "
                f"{other.buckets[0]}"
            )
    _refuse_twice(parents, "key", [[*key_list(dataset_index(one)), *_quarantined(one)] for one in parents])
    if first.groups is not None:
        _refuse_twice(parents, "group", [group_keys(dataset_index(one)) for one in parents])
    return _write([(out, _union(parents))], parents, f"merge of {len(parents)}", copy=copy)[0]


def split(path: Path, outs: Mapping[str, float], seed: int, prefix: str, *, copy: bool) -> dict[str, Derived]:
    """Datasets PREFIX-NAME of a share of the samples each; a group stays together.

    The side is a function of the sample's key (its group's key) and the seed alone, xxh3_64(key, seed) / 2^64 between
    the sums of the shares; so it stays when the dataset grows, and the shares are met as closely as chance has it.

    Raises:
        ValueError: shares that are not above 0 or do not add up to 1, a side without a sample, or one that is there.
    """
    if not outs or any(not share > 0 for share in outs.values()) or abs(sum(outs.values()) - 1) > 1e-9:
        raise ValueError(f"fractions: expected shares above 0 that add up to 1, got {dict(outs)}")
    parent = Dataset.open(path)
    index = dataset_index(parent)
    if parent.groups is None:
        side = _sides(key_list(index), list(outs.values()), seed)
    else:
        side = _sides(group_keys(index), list(outs.values()), seed)[index["group"]]
    apart = _sides(_quarantined(parent), list(outs.values()), seed)
    parts = []
    for i, (name, share) in enumerate(outs.items()):
        chosen = np.flatnonzero(side == i)
        if not len(chosen):
            raise ValueError(f"fractions: {name}={share}: expected at least one sample of {len(parent)}, got 0")
        quarantine = [one for one, where in zip(parent.quarantine, apart.tolist(), strict=True) if where == i]
        parts.append((Path(f"{prefix}-{name}"), _selected(parent, chosen, quarantine)))
    what = f"split {','.join(f'{name}={share}' for name, share in outs.items())} with seed {seed}"
    return dict(zip(outs, _write(parts, [parent], what, copy=copy), strict=True))


@dataclass(frozen=True)
class Conditions:
    """What a sample must meet, all of it.

    Attributes:
        classes: names, of which it has one; the new dataset has these classes only, in the old order.
        keys: patterns, of which its key meets one: *, ? and [...], and * also stands for "/".
        min_size: pixels that the shorter side of its source image has at least.
        listed: keys, of which it has one.
    """

    classes: tuple[str, ...] = ()
    keys: tuple[str, ...] = ()
    min_size: int = 0
    listed: frozenset[bytes] | None = None


def select(path: Path, conditions: Conditions, out: Path, *, copy: bool) -> Derived:
    """A dataset of the samples that meet all conditions; of the quarantine, the files whose keys meet them.

    Raises:
        ValueError: no condition; a class or a listed key that is not there; no sample is left; `out` is there already.
    """
    if conditions == Conditions():
        raise ValueError("expected a condition: --classes, --keys, --min-size or --list")
    parent = Dataset.open(path)
    index = dataset_index(parent)
    keys = key_list(index)
    apart = _quarantined(parent)
    unknown = sorted((conditions.listed or frozenset()) - {*keys, *apart})
    if unknown:
        raise ValueError(f"{path}: expected the listed keys, {len(unknown)} are not there: {unknown[:3]}")
    keep = np.array([_meets(key, conditions) for key in keys], bool)
    keep &= index["orig_hw"].min(axis=1) >= conditions.min_size
    classes, label = parent.classes, index["label"]
    if conditions.classes:
        for name in conditions.classes:
            if name not in classes:
                near = difflib.get_close_matches(name, classes, n=1)
                raise ValueError(f"{path}: no class {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
        old = [i for i, name in enumerate(classes) if name in conditions.classes]
        new = np.full(len(classes) + 1, -1, "<i8")  # the last: samples without a class, label -1
        new[old] = np.arange(len(old))
        keep &= new[label] >= 0
        classes, index = [classes[i] for i in old], index | {"label": new[label]}
    if parent.groups is not None:
        size, kept = np.bincount(index["group"]), np.bincount(index["group"], keep)
        torn = np.flatnonzero((kept > 0) & (kept < size))
        if len(torn):
            raise ValueError(
                f"{path}: expected conditions that a group meets as a whole (its rows are one read), {len(torn)} "
                f"groups meet them in part, {parent.groups.key(int(torn[0]))!r} first"
            )
    if not keep.any():
        raise ValueError(f"{path}: expected at least one sample that meets the conditions, got 0 of {len(parent)}")
    known = not conditions.classes and not conditions.min_size  # quarantine knows neither label nor size
    quarantine = [
        one for one, key in zip(parent.quarantine, apart, strict=True) if known and _meets(key, conditions)
    ]  # fmt: skip
    part = _selected(parent, np.flatnonzero(keep), quarantine, index, classes)
    return _write([(out, part)], [parent], "filter", copy=copy)[0]


def _meets(key: bytes, conditions: Conditions) -> bool:
    if conditions.listed is not None and key not in conditions.listed:
        return False
    name = decode_key(key)
    return not conditions.keys or any(fnmatch.fnmatchcase(name, pattern) for pattern in conditions.keys)


def _sides(keys: list[bytes], shares: list[float], seed: int) -> np.ndarray:
    """int64 [N]: which share each key falls into."""
    bounds = np.array([round(bound * 2.0**64) for bound in itertools.accumulate(shares)][:-1], np.float64)
    hashes = np.array([xxhash.xxh3_64_intdigest(key, seed=seed) for key in keys], np.uint64)
    return np.searchsorted(bounds, hashes.astype(np.float64), side="right")


def _quarantined(dataset: Dataset) -> list[bytes]:
    return [encode_key(one["key"]) for one in dataset.quarantine]


def _refuse_twice(parents: list[Dataset], what: str, keys: list[list[bytes]]) -> None:
    owner: dict[bytes, Dataset] = {}
    for parent, own in zip(parents, keys, strict=True):
        for key in own:
            if owner.setdefault(key, parent) is not parent:
                raise ValueError(
                    f"expected every {what} in one dataset, got {decode_key(key)!r} in {owner[key].path} and in "
                    f"{parent.path}: filter one of them, or encode from a common folder, so that relative paths differ"
                )


def _selected(
    parent: Dataset,
    rows: np.ndarray,
    quarantine: list[dict[str, Any]],
    index: Columns | None = None,
    classes: list[str] | None = None,
) -> Part:
    """The samples numbered `rows`, and the shards that they lie in."""
    index = take(dataset_index(parent) if index is None else index, rows)
    used = np.unique(index["shard"])
    new = np.zeros(len(parent.shards), np.int64)
    new[used] = np.arange(len(used))
    shards = [(parent, parent.shards[i]) for i in used.tolist()]
    classes = parent.classes if classes is None else classes
    return Part(shards, [one for _, one in shards], renumber(index, new), parent.buckets, classes, quarantine)


def _union(parents: list[Dataset]) -> Part:
    """All samples of all datasets, in key order (by groups: in the order of their keys). Shards they share stay one."""
    classes = list(dict.fromkeys(name for one in parents for name in one.classes))
    kinds = list(dict.fromkeys((bucket.shape, bucket.dtype) for one in parents for bucket in one.buckets))
    buckets: dict[tuple[tuple[int, ...], str], Bucket] = {}
    shards: dict[str, tuple[Dataset, ShardRecord]] = {}
    records: dict[str, ShardRecord] = {}
    columns: list[Columns] = []
    groups: list[bytes] = []
    for parent in parents:
        index = dataset_index(parent)
        bucket = np.array([kinds.index((one.shape, one.dtype)) for one in parent.buckets])
        buckets |= {(one.shape, one.dtype): one for one in parent.buckets}
        for record in parent.shards:
            shards.setdefault(record.path, (parent, record))
            records.setdefault(record.path, replace(record, bucket=int(bucket[record.bucket])))
        number = {path: i for i, path in enumerate(shards)}
        label = np.array([*(classes.index(name) for name in parent.classes), -1])  # label -1 is the last
        index = renumber(index, np.array([number[record.path] for record in parent.shards]))
        index |= {"bucket": bucket[index["bucket"]].astype("<u2"), "label": label[index["label"]].astype("<i8")}
        if parent.groups is not None:
            index |= {"group": index["group"] + np.uint32(len(groups))}
            groups += group_keys(index)
        columns.append(index)
    keys = [key for index in columns for key in key_list(index)]
    joined = {name: np.concatenate([one[name] for one in columns]) for name in columns[0] if "." not in name}
    if groups:
        by_key = sorted(range(len(groups)), key=groups.__getitem__)
        rank = np.empty(len(groups), "<u4")
        rank[by_key] = np.arange(len(groups))
        joined["group"] = rank[joined["group"]]
        order = np.argsort(joined["group"], kind="stable").tolist()
        joined |= group_columns([groups[i] for i in by_key])
    else:
        order = sorted(range(len(keys)), key=keys.__getitem__)
    joined = {name: column if "." in name else column[order] for name, column in joined.items()}
    joined |= key_columns([keys[i] for i in order])
    index = {name: joined[name] for name in columns[0]}
    quarantine = sorted((entry for one in parents for entry in one.quarantine), key=lambda one: encode_key(one["key"]))
    united = [buckets[kind] for kind in kinds]
    return Part(list(shards.values()), list(records.values()), index, united, classes, quarantine)


def _write(parts: list[tuple[Path, Part]], parents: list[Dataset], what: str, *, copy: bool) -> list[Derived]:
    """Write the datasets beside their places; they appear there when all are complete."""
    derived = []
    with ExitStack() as stack:
        folders = [stack.enter_context(_appearing(out, parents)) for out, _ in parts]
        for (out, part), folder in zip(parts, folders, strict=True):
            parent = parents[0]
            informational = parent.provenance["informational"] | {
                "derived": what,
                "parents": [{"path": str(one.path.resolve()), "generation": one.generation} for one in parents],
            }
            provenance = {"hashed": parent.provenance["hashed"], "informational": informational}
            write_atomic(folder / PROVENANCE, canonical_json(provenance) + b"\n")
            linked = _place_shards(folder, part, copy)
            statistics = live_statistics(part.index, part.records, part.buckets, functools.partial(_open, part))
            contents = Contents(
                fingerprint=parent.fingerprint,
                classes=part.classes,
                buckets=count_rows(part.buckets, part.index),
                fields=parent.root["fields"],
                manifests=[],
                kept=[],
                added=part.records,
                index=part.index,
                statistics=merged(one for _, one in statistics),
                quarantine=part.quarantine,
            )
            derived.append(Derived(replace(publish_generation(folder, None, contents), path=out), linked))
    return derived


def _open(part: Part, i: int) -> Shard:
    parent, record = part.shards[i]
    return open_checked(parent.path, record, parent.buckets, parent.fingerprint, parent.extras)


@contextmanager
def _appearing(out: Path, parents: list[Dataset]) -> Iterator[Path]:
    """A folder beside `out` that becomes `out` where all goes well, and else goes away."""
    if out.is_symlink() or (out.exists() and not (out.is_dir() and not any(out.iterdir()))):
        raise ValueError(f"{out}: expected a name that is free, got something that is there: choose another --out")
    for parent in parents:
        if out.resolve().is_relative_to(parent.path.resolve()):
            raise ValueError(f"{out}: expected a folder outside {parent.path}, got one inside")
    folder = out.parent / f"{TEMPORARY}{out.name[:64]}-{uuid.uuid4().hex}"
    make_directory(folder)
    try:
        yield folder
        os.rename(folder, out)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    fsync_directory(out.parent)


def _place_shards(folder: Path, part: Part, copy: bool) -> int:
    """Every shard of `part` in `folder`, under its own name; how many are hard links."""
    linked = 0
    places = set()
    for i, (parent, record) in enumerate(part.shards):
        _open(part, i).close()  # what is damaged is not handed on
        source, target = inside(parent.path, record.path, "manifest"), folder / record.path
        make_directory(target.parent)
        places.add(target.parent)
        if not copy:
            try:
                os.link(source, target)
                linked += 1
                continue
            except OSError as error:
                if error.errno not in NO_LINK:
                    raise
        _copy(source, target, record)
    for place in places:
        fsync_directory(place)
    return linked


def _copy(source: Path, target: Path, record: ShardRecord) -> None:
    def write(fd: int) -> str:
        digest = xxhash.xxh3_128()
        with open(source, "rb", buffering=0) as file:
            while chunk := file.read(BLOCK_BYTES):
                digest.update(chunk)
                write_all(fd, chunk)
        if digest.hexdigest() != record.xxh3_128:
            raise ValueError(f"{source}: expected xxh3_128 {record.xxh3_128}, got {digest.hexdigest()}: damaged")
        return target.name

    publish(target.parent, target.stem, write)
