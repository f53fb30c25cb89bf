"""Turn what was committed into the contents of a generation, and publish it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from fastlatent.store.build import JOURNAL, PLAN, Committed, journal_generation
from fastlatent.store.checked import open_checked
from fastlatent.store.files import TEMPORARY, write_atomic
from fastlatent.store.generation import Contents, DatasetInfo, listing, publish
from fastlatent.store.live import live_statistics, merged
from fastlatent.store.reader import Dataset
from fastlatent.store.records import (
    Bucket,
    Field,
    Schema,
    ShardRecord,
    Unit,
    digest_columns,
    digest_strings,
    encode_key,
    key_columns,
    key_hashes,
    key_list,
)
from fastlatent.store.scan import Entry, Pair, Scanned
from fastlatent.store.shard import Shard

Place = tuple[int, int]  # a shard's number in the manifests, and a row of it


def index_rows(current: Dataset | None) -> dict[Pair, int]:
    """Every pair of the current generation's index -> its row there."""
    if current is None:
        return {}
    keys = key_list({"key.offsets": current.key_offsets, "key.utf8": current.key_utf8})
    pairs = zip(keys, digest_strings(current.src_xxh3), strict=True)
    return {pair: i for i, pair in enumerate(pairs)}


def quarantined_files(current: Dataset | None) -> dict[Pair, dict[str, Any]]:
    """Every pair of the current generation's quarantine -> its entry there."""
    return {(encode_key(one["key"]), one["digest"]): one for one in (current.quarantine if current else ())}


def changed_groups(current: Dataset | None, files: list[Scanned]) -> set[Pair]:
    """The pairs of every group whose rows do not follow each other in one shard, in its order: it is encoded anew.

    It gained or lost a file, or changed one, since `current`; or that had no groups, or lost them to damage.
    """
    if current is None or not any(one.entry.group for one in files):
        return set()
    indexed, bad = index_rows(current), quarantined_files(current)
    shard, row = current.shard.tolist(), current.row.tolist()
    groups: dict[str, list[Pair]] = {}
    for one in files:
        if one.pair not in bad:
            groups.setdefault(one.entry.group, []).append(one.pair)

    def whole(pairs: list[Pair]) -> bool:
        at = [indexed.get(pair, -1) for pair in pairs]
        follows = [(shard[at[0]], row[at[0]] + k) for k in range(len(at))]
        return min(at) >= 0 and [(shard[i], row[i]) for i in at] == follows

    return {pair for pairs in groups.values() if not whole(pairs) for pair in pairs}


def revive(current: Dataset | None, wanted: set[Pair]) -> dict[Pair, Place]:
    """Rows that no key points to now but that are wanted again, because a file came back."""
    found: dict[Pair, Place] = {}
    if current is None or not wanted:
        return found
    live = np.bincount(current.shard, minlength=len(current.shards)).tolist()
    for i, record in enumerate(current.shards):
        if live[i] < record.rows:
            with closing(
                open_checked(current.path, record, current.buckets, current.fingerprint, current.extras)
            ) as shard:
                found.update({pair: (i, row) for row, pair in enumerate(_pairs(shard)) if pair in wanted})
    return found


def merge(
    path: Path,
    fingerprint: str,
    schema: Schema,
    classes: list[str],
    current: Dataset | None,
    scan: list[Scanned],
    indexed: dict[Pair, int],
    revived: dict[Pair, Place],
    committed: list[tuple[Unit, Committed]],
) -> DatasetInfo:
    """Write the generation after `current`: exactly the files of `scan`; `committed` is in plan order.

    Nothing is written to dataset.json where it would say what it says already.
    """
    kept = current.shards if current else []
    shapes = [one.shape for one in current.buckets] if current else []
    used = {unit.bucket for unit, one in committed if one.shard}
    shapes += [shape for shape in schema.buckets if shape in used and shape not in shapes]
    added = [replace(one.shard, bucket=shapes.index(unit.bucket)) for unit, one in committed if one.shard]
    dtype = current.buckets[0].dtype if current else next((one.dtype for _, one in committed if one.shard), "F16")
    buckets = [Bucket(shape, dtype, 0, schema.payload) for shape in shapes]
    source = _Source(path, fingerprint, buckets, [*kept, *added], schema.extras)
    bad = _quarantine(scan, current, committed)
    good = [one for one in scan if one.pair not in bad]
    if not good:
        listed = ""
        if bad:
            file = path / "quarantine" / f"{current.generation + 1 if current else 1:06d}.json"
            write_atomic(file, listing(fingerprint, "files", list(bad.values())))
            reasons = "".join(f"\n  {one['key']}: {one['error']}: {one['reason']}" for one in list(bad.values())[:3])
            listed = f"; all {len(bad)} are listed in {file}:{reasons}"
        raise ValueError(f"{path}: expected at least one file that can be encoded, got 0 of {len(scan)}{listed}")
    index = _index(good, current, indexed, revived | source.places(len(kept)), source)
    rows = np.bincount(index["bucket"], minlength=len(buckets)).tolist()
    contents = Contents(
        fingerprint=fingerprint,
        classes=classes,
        buckets=[replace(bucket, rows=count) for bucket, count in zip(buckets, rows, strict=True)],
        fields=schema.fields,
        manifests=current.root["manifests"] if current else [],
        kept=kept,
        added=added,
        index=index,
        statistics=merged(part for _, part in live_statistics(index, source.shards, buckets, source.open)),
        quarantine=list(bad.values()),
    )
    return publish(path, current, contents)


def describes(dataset: Dataset, files: list[Scanned], classes: list[str]) -> bool:
    """Whether `dataset` is exactly of these files."""
    indexed, bad = index_rows(dataset), quarantined_files(dataset)
    if dataset.classes != classes or len(files) != len(indexed) + len(bad):
        return False
    columns = [dataset.src_size.tolist(), dataset.src_mtime_ns.tolist(), dataset.label.tolist()]
    groups = dataset.groups
    names = [groups.key(i) for i in range(len(groups))] if groups else []
    for one in files:
        i, entry = indexed.get(one.pair), one.entry
        if i is not None:
            same = [column[i] for column in columns] == [entry.size, entry.mtime_ns, entry.label]
            place = (names[groups.group[i]], int(groups.order[i])) if groups else ("", 0)
            same = same and place == (entry.group, entry.order if groups else 0)
        else:
            was = bad.get(one.pair, {})
            same = (was.get("size"), was.get("mtime_ns")) == (entry.size, entry.mtime_ns)
        if not same:
            return False
    return True


def published(dataset: Dataset) -> DatasetInfo:
    """What the `publish` of this generation returned."""
    totals = dataset.totals
    return DatasetInfo(
        dataset.path, dataset.generation, dataset.fingerprint,
        totals.rows, totals.shards, totals.bytes, totals.quarantined,
    )  # fmt: skip


def clean(path: Path, generation: int, *, empty: bool) -> None:
    """Remove plans and journals of generations up to `generation`. Never a shard.

    `empty`: also journals without a whole line; while a plan is pending, a writer may be about to write its first.
    """
    for plan in (path / PLAN).glob("*.json"):
        if plan.stem.isdecimal() and int(plan.stem) <= generation:
            _remove(plan)
    for journal in (path / JOURNAL).glob("*.jsonl"):
        if (0 if empty else 1) <= journal_generation(journal) <= generation:
            _remove(journal)


def sweep(path: Path) -> None:
    """Remove unfinished files. Only for who is alone: another writer's are about to be renamed."""
    for temporary in path.rglob(f"{TEMPORARY}*-{'[0-9a-f]' * 32}"):
        _remove(temporary)


def _remove(path: Path) -> None:
    with suppress(FileNotFoundError):  # another writer was faster
        os.unlink(path)


@dataclass(frozen=True)
class _Source:
    """The shards of old and new manifests, each opened for a moment only: there may be many thousands."""

    path: Path
    fingerprint: str
    buckets: list[Bucket]
    shards: list[ShardRecord]
    extras: Sequence[Field]

    def open(self, i: int) -> Shard:
        return open_checked(self.path, self.shards[i], self.buckets, self.fingerprint, self.extras)

    def places(self, first: int) -> dict[Pair, Place]:
        """Where every row of the shards from `first` on lies."""
        found: dict[Pair, Place] = {}
        for i in range(first, len(self.shards)):
            with closing(self.open(i)) as shard:
                found.update({pair: (i, row) for row, pair in enumerate(_pairs(shard))})
        return found


def _pairs(shard: Shard) -> list[Pair]:
    return list(zip(key_list(shard.columns), digest_strings(shard.columns["src_xxh3"]), strict=True))


def _quarantine(
    scan: list[Scanned], current: Dataset | None, committed: list[tuple[Unit, Committed]]
) -> dict[Pair, dict[str, Any]]:
    """The quarantine entries of the scan's files, in key order."""
    known = quarantined_files(current)
    known |= {(encode_key(one.key), one.digest): one.to_dict() for _, unit in committed for one in unit.quarantined}
    return {
        one.pair: {**known[one.pair], "size": one.entry.size, "mtime_ns": one.entry.mtime_ns}
        for one in scan
        if one.pair in known
    }


def _index(
    good: list[Scanned],
    current: Dataset | None,
    indexed: dict[Pair, int],
    places: dict[Pair, Place],
    source: _Source,
) -> dict[str, np.ndarray]:
    """The columns of the index, one row per file, in key order."""
    count = len(good)
    shard, row = np.empty(count, "<u4"), np.empty(count, "<u4")
    orig_hw, crop = np.empty((count, 2), "<i4"), np.empty((count, 4), "<i4")
    origin = np.array([indexed.get(one.pair, -1) for one in good], np.int64)
    kept, fresh = np.flatnonzero(origin >= 0), np.flatnonzero(origin < 0)
    if current is not None:
        for new, old in (
            (shard, current.shard),
            (row, current.row),
            (orig_hw, current.orig_hw),
            (crop, current.crop),
        ):
            new[kept] = old[origin[kept]]
    found = np.array([places[good[i].pair] for i in fresh.tolist()], np.int64).reshape(-1, 2)
    shard[fresh], row[fresh] = found[:, 0], found[:, 1]
    for i in np.unique(found[:, 0]).tolist():
        at = fresh[found[:, 0] == i]
        with closing(source.open(i)) as opened:
            orig_hw[at] = opened.columns["orig_hw"][row[at]]
            crop[at] = opened.columns["crop"][row[at]]
    keys = [one.key for one in good]
    entries = [one.entry for one in good]
    return {
        "key_hash": key_hashes(keys),
        "bucket": np.array([one.bucket for one in source.shards], "<u2")[shard],
        "shard": shard,
        "row": row,
        "label": np.array([one.label for one in entries], "<i8"),
        "src_size": np.array([one.size for one in entries], "<u8"),
        "src_mtime_ns": np.array([one.mtime_ns for one in entries], "<i8"),
        "src_xxh3": digest_columns([one.digest for one in good]),
        "orig_hw": orig_hw,
        "crop": crop,
        **key_columns(keys),
        **_groups(entries),
    }


def _groups(entries: list[Entry]) -> dict[str, np.ndarray]:
    """The index's columns of groups, numbered in their order; none where the files have no groups."""
    if not entries[0].group:
        return {}
    names = list(dict.fromkeys(entry.group for entry in entries))
    number = {name: i for i, name in enumerate(names)}
    columns = key_columns([encode_key(name) for name in names])
    return {
        "group": np.array([number[entry.group] for entry in entries], "<u4"),
        "order": np.array([entry.order for entry in entries], "<i8"),
        "group.offsets": columns["key.offsets"],
        "group.utf8": columns["key.utf8"],
    }
