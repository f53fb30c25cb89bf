"""Turn what was committed into the contents of a generation, and publish it."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastlatent.store.build import JOURNAL, PLAN, Committed, journal_generation
from fastlatent.store.files import TEMPORARY, write_atomic
from fastlatent.store.generation import Contents, DatasetInfo, listing, publish
from fastlatent.store.reader import Dataset, open_checked
from fastlatent.store.records import (
    Bucket,
    ShardRecord,
    digest_columns,
    digest_strings,
    encode_key,
    key_columns,
    key_hashes,
    key_list,
)
from fastlatent.store.scan import Pair, Scanned
from fastlatent.store.shard import Shard
from fastlatent.store.statistics import Statistics

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


def revive(current: Dataset | None, wanted: set[Pair]) -> dict[Pair, Place]:
    """Rows that no key points to now but that are wanted again, because a file came back."""
    found: dict[Pair, Place] = {}
    if current is None or not wanted:
        return found
    live = np.bincount(current.shard, minlength=len(current.shards)).tolist()
    for i, record in enumerate(current.shards):
        if live[i] < record.rows:
            with closing(open_checked(current.path, record, current.buckets, current.fingerprint)) as shard:
                found.update({pair: (i, row) for row, pair in enumerate(_pairs(shard)) if pair in wanted})
    return found


def merge(
    path: Path,
    fingerprint: str,
    bucket: tuple[int, ...],
    classes: list[str],
    current: Dataset | None,
    scan: list[Scanned],
    indexed: dict[Pair, int],
    revived: dict[Pair, Place],
    committed: list[Committed],
) -> DatasetInfo:
    """Write the generation after `current`: exactly the files of `scan`; `committed` is in plan order.

    Nothing is written to dataset.json where it would say what it says already.
    """
    added = [one.shard for one in committed if one.shard]
    kept = current.shards if current else []
    dtype = current.buckets[0].dtype if current else next((one.dtype for one in committed if one.shard), "F16")
    source = _Source(path, fingerprint, [Bucket(bucket, dtype, 0)], [*kept, *added])
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
    contents = Contents(
        fingerprint=fingerprint,
        classes=classes,
        buckets=[Bucket(bucket, dtype, len(good))],
        fields=[{"name": "moments", "required": True}],
        manifests=current.root["manifests"] if current else [],
        kept=kept,
        added=added,
        index=index,
        statistics=_statistics(index, source),
        quarantine=list(bad.values()),
    )
    return publish(path, current, contents)


def clean(path: Path, generation: int) -> None:
    """Remove plans and journals of generations up to `generation`, and unfinished files. Never a shard."""
    for plan in (path / PLAN).glob("*.json"):
        if plan.stem.isdecimal() and int(plan.stem) <= generation:
            plan.unlink()
    for journal in (path / JOURNAL).glob("*.jsonl"):
        if journal_generation(journal) <= generation:
            journal.unlink()
    for temporary in path.rglob(f"{TEMPORARY}*-{'[0-9a-f]' * 32}"):
        temporary.unlink()


@dataclass(frozen=True)
class _Source:
    """The shards of old and new manifests, each opened for a moment only: there may be many thousands."""

    path: Path
    fingerprint: str
    buckets: list[Bucket]
    shards: list[ShardRecord]

    def open(self, i: int) -> Shard:
        return open_checked(self.path, self.shards[i], self.buckets, self.fingerprint)

    def places(self, first: int) -> dict[Pair, Place]:
        """Where every row of the shards from `first` on lies."""
        found: dict[Pair, Place] = {}
        for i in range(first, len(self.shards)):
            with closing(self.open(i)) as shard:
                found.update({pair: (i, row) for row, pair in enumerate(_pairs(shard))})
        return found


def _pairs(shard: Shard) -> list[Pair]:
    return list(zip(key_list(shard.columns), digest_strings(shard.columns["src_xxh3"]), strict=True))


def _quarantine(scan: list[Scanned], current: Dataset | None, committed: list[Committed]) -> dict[Pair, dict[str, Any]]:
    """The quarantine entries of the scan's files, in key order."""
    known = quarantined_files(current)
    known |= {(encode_key(one.key), one.digest): one.to_dict() for unit in committed for one in unit.quarantined}
    return {
        one.pair: {**known[one.pair], "size": one.size, "mtime_ns": one.mtime_ns} for one in scan if one.pair in known
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
    return {
        "key_hash": key_hashes(keys),
        "bucket": np.zeros(count, "<u2"),
        "shard": shard,
        "row": row,
        "label": np.array([one.label for one in good], "<i8"),
        "src_size": np.array([one.size for one in good], "<u8"),
        "src_mtime_ns": np.array([one.mtime_ns for one in good], "<i8"),
        "src_xxh3": digest_columns([one.digest for one in good]),
        "orig_hw": orig_hw,
        "crop": crop,
        **key_columns(keys),
    }


def _statistics(columns: dict[str, np.ndarray], source: _Source) -> Statistics:
    """Of the rows that the index points to, merged in manifest order.

    A shard's own statistics serve while all its rows are in use; else its live rows are read again.
    """
    total: Statistics | None = None
    order = np.lexsort((columns["row"], columns["shard"]))
    shard, row = columns["shard"][order], columns["row"][order]
    starts = np.searchsorted(shard, np.arange(len(source.shards) + 1)).tolist()
    for i, record in enumerate(source.shards):
        live = row[starts[i] : starts[i + 1]]
        if not len(live):
            continue
        part = record.statistics
        if len(live) < record.rows:
            with closing(source.open(i)) as opened:
                part = Statistics.of(opened.columns["moments"][live], opened.dtypes["moments"])
        total = part if total is None else total.merge(part)
    assert total is not None
    return total
