"""Turn what was committed into a generation: manifest, index, statistics, quarantine; dataset.json last."""

from __future__ import annotations

import json
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastlatent.store.build import JOURNAL, PLAN, Committed, journal_generation
from fastlatent.store.files import TEMPORARY, canonical_json, write_atomic
from fastlatent.store.reader import Dataset, open_checked, root_digest
from fastlatent.store.records import (
    FORMAT,
    ROOT,
    Bucket,
    FileRecord,
    ShardRecord,
    digest_columns,
    digest_strings,
    encode_key,
    key_columns,
    key_hashes,
    key_list,
)
from fastlatent.store.scan import Pair, Scanned
from fastlatent.store.shard import Shard, chunks, layout
from fastlatent.store.statistics import Statistics

Place = tuple[int, int]  # a shard's number in the manifests, and a row of it


@dataclass(frozen=True)
class DatasetInfo:
    """What `finish` published, or found to be current already."""

    path: Path
    generation: int
    fingerprint: str
    rows: int
    shards: int
    bytes: int
    quarantined: int


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
    generation = current.generation + 1 if current else 1
    nothing: dict[str, Any] = {"manifests": [], "indexes": [None], "statistics": None, "quarantine": None}
    before = current.root if current else nothing
    added = [one.shard for one in committed if one.shard]
    shards = [*(current.shards if current else ()), *added]
    dtype = current.buckets[0].dtype if current else next((one.dtype for one in committed if one.shard), "F16")
    source = _Source(path, fingerprint, [Bucket(bucket, dtype, 0)], shards)

    def put(kind: str, suffix: str, data: bytes, previous: object) -> dict[str, Any]:
        """Write DATASET/kind/GENERATION.suffix, or name the previous generation's file if it is the same."""
        record = FileRecord.of(f"{kind}/{generation:06d}.{suffix}", data)
        if previous is not None:
            old = FileRecord.parse(previous, ROOT)
            if (old.bytes, old.xxh3_128) == (record.bytes, record.xxh3_128):
                return vars(old)
        write_atomic(path / record.path, data)
        return vars(record)

    def listing(name: str, entries: list[dict[str, Any]]) -> bytes:
        return canonical_json({"format": FORMAT, "fingerprint": fingerprint, name: entries}) + b"\n"

    bad = _quarantine(scan, current, committed)
    good = [one for one in scan if one.pair not in bad]
    quarantine = None
    if bad:
        quarantine = put("quarantine", "json", listing("files", list(bad.values())), before["quarantine"])
    if not good:
        reasons = "".join(f"\n  {one['key']}: {one['error']}: {one['reason']}" for one in list(bad.values())[:3])
        where = f"; all {len(bad)} are listed in {path / quarantine['path']}:{reasons}" if quarantine else ""
        raise ValueError(f"{path}: expected at least one file that can be encoded, got 0 of {len(scan)}{where}")

    columns = _index(good, current, indexed, revived | source.places(len(shards) - len(added)), source)
    header, tensors = layout(columns, (), {"fls.format": FORMAT, "fls.fingerprint": fingerprint})
    manifests = list(before["manifests"])
    if added:
        manifests.append(put("manifest", "json", listing("shards", [one.to_dict() for one in added]), None))
    statistics = _statistics(columns, source).to_dict()
    root: dict[str, Any] = {
        "format": FORMAT,
        "fingerprint": fingerprint,
        "totals": {
            "rows": len(good),
            "shards": len(shards),
            "bytes": sum(one.bytes for one in shards),
            "quarantined": len(bad),
        },
        "buckets": [{"shape": list(bucket), "dtype": dtype, "rows": len(good)}],
        "fields": [{"name": "moments", "required": True}],
        "classes": classes,
        "manifests": manifests,
        "indexes": [put("index", "safetensors", b"".join(chunks(header, tensors)), before["indexes"][0])],
        "statistics": put("statistics", "json", canonical_json(statistics) + b"\n", before["statistics"]),
        "quarantine": quarantine,
    }
    if current and all(current.root.get(name) == value for name, value in root.items()):
        generation = current.generation
    else:
        root |= {"generation": generation, "previous_generation": current.generation if current else None}
        root["xxh3_128"] = root_digest(root)
        write_atomic(path / ROOT, json.dumps(root, indent=1, sort_keys=True).encode("ascii") + b"\n")
    size = sum(one.bytes for one in shards)
    return DatasetInfo(path, generation, fingerprint, len(good), len(shards), size, len(bad))


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
