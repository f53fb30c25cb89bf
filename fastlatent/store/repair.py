"""Take what is damaged out of a dataset, so that the next encode makes exactly that again."""

from __future__ import annotations

import itertools
import os
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from fastlatent.store.build import (
    JOURNAL,
    Committed,
    Journal,
    Lock,
    plan_path,
    read_journals,
    read_plan,
    write_plan,
)
from fastlatent.store.files import (
    canonical_json,
    fsync_directory,
    inside,
    make_directory,
    member,
    parse_json,
    read_bytes,
    write_atomic,
)
from fastlatent.store.generation import Contents, keep_copy, publish
from fastlatent.store.live import (
    count_rows,
    live_statistics,
    merged,
    renumber,
    rows_by_shard,
    take,
)
from fastlatent.store.provenance import fingerprint as fingerprint_of
from fastlatent.store.reader import GENERATION, PROVENANCE, Dataset, Totals, read_provenance, read_root, root_digest
from fastlatent.store.records import (
    ROOT,
    PlannedItem,
    Unit,
    decode_key,
    digest_strings,
    encode_key,
    key_list,
)
from fastlatent.store.salvage import index_from_shards, unnamed_shards
from fastlatent.store.shard import Shard
from fastlatent.store.verify import SHARDS, Examined, Finding, Progress, examine, sound_copies

DAMAGED = "damaged"  # the folder that damaged files are moved to
BESIDE = 4  # files in quarantine before its first and after its last sample that may be a unit's own
MAX_SUBSET = 10  # files in quarantine of which every subset is tried (1,024) to find a unit's own


@dataclass
class RepairReport:
    """What was wrong and what was done.

    Attributes:
        generation: that of the dataset now; None where nothing of it is left and encode begins again.
        findings: of the full check. lost: keys of the samples that are no longer in the dataset.
        planned: units that the next encode makes again with the same bytes; other lost samples it cuts afresh.
        moved: damaged files, now in DATASET/damaged/. notes: sentences for the user.
    """

    path: Path
    generation: int | None = None
    findings: list[Finding] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    planned: int = 0
    moved: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def repair(path: Path | str, *, threads: int, on_progress: Progress | None = None) -> RepairReport:
    """Check the dataset in full, and publish a generation without what is damaged or missing.

    Damaged files are moved to DATASET/damaged/. The plan of the coming generation has the lost units, so that the same
    encode command makes the same shards again. A damaged dataset.json, provenance.json, manifest, index, statistics or
    quarantine is restored from copies or from what the shards hold; labels and quarantine are in no shard, and encode
    adds them again.

    Raises:
        ValueError: no dataset; a writer is at work; a newer format; or no copy of dataset.json is left.
    """
    path = Path(path)
    if not sound_copies(path)[0] and not (path / ROOT).is_file():
        read_root(path)  # raises, and says what the folder is instead
    report = RepairReport(path)
    lock = Lock(path)
    try:
        _restore_root(report)
        _restore_provenance(report)
        seen = examine(path, full=True, threads=threads, on_progress=on_progress)
        report.findings += seen.findings
        assert seen.root is not None
        report.generation = seen.root["generation"]
        copies = {one.path for one in sound_copies(path)[1]}
        if {one.path for one in seen.findings} - copies:
            _publish_the_rest(seen, report)
        for name in dict.fromkeys(one.path for one in seen.findings):
            if name not in (ROOT, PROVENANCE):
                _set_aside(report, name)
        if report.generation is not None:
            keep_copy(path)  # where that of this generation was damaged
            Dataset.open(path)
        return report
    finally:
        lock.release()


def _restore_root(report: RepairReport) -> None:
    """dataset.json from its newest sound copy, where it is damaged or missing."""
    file = report.path / ROOT
    try:
        value = parse_json(read_bytes(file), str(file))
        if member(value, "xxh3_128", str, str(file)) != root_digest(value):
            raise ValueError(f"{file}: expected contents with the digest that it states, got others: damaged")
    except ValueError as error:
        copies = sound_copies(report.path)[0]
        if not copies:
            raise ValueError(
                f"{error}; there is no sound copy of it in {report.path / GENERATION}: restore it from a backup, or "
                "encode into a new folder"
            ) from None
        report.findings.append(Finding(ROOT, None, str(error).removeprefix(f"{file}: ")))
        if file.is_file():
            _set_aside(report, ROOT, keep=True)
        write_atomic(file, copies[0].read_bytes())
        report.notes.append(f"{ROOT} is restored from {GENERATION}/{copies[0].name}")
    read_root(report.path)  # a newer format is no damage: it raises


def _restore_provenance(report: RepairReport) -> None:
    """provenance.json from any shard, where it is damaged or missing: each holds its hashed part."""
    file, fingerprint = report.path / PROVENANCE, read_root(report.path)["fingerprint"]
    informational: dict[str, Any] = {"vae_path": None}
    try:
        value = read_provenance(report.path)
        informational = value["informational"]
        if fingerprint_of(value["hashed"]) != fingerprint:
            raise ValueError(f"{file}: expected what has the fingerprint {fingerprint}, got something else: damaged")
    except ValueError as error:
        hashed = next(_recorded_provenances(report.path, fingerprint), None)
        if hashed is None:
            raise ValueError(f"{error}; and no shard can be read that holds a copy: restore it from a backup") from None
        report.findings.append(Finding(PROVENANCE, None, str(error).removeprefix(f"{file}: ")))
        if file.is_file():
            _set_aside(report, PROVENANCE, keep=True)
        write_atomic(file, canonical_json({"hashed": hashed, "informational": informational}) + b"\n")
        report.notes.append(f"{PROVENANCE} is restored from a shard; of its informational part, what could be read")


def _recorded_provenances(path: Path, fingerprint: str) -> Iterator[dict[str, Any]]:
    for file in sorted((path / SHARDS).rglob("*.safetensors")):
        with suppress(ValueError), closing(Shard.open(file)) as shard:
            hashed = parse_json(shard.metadata.get("fls.provenance", "").encode(), str(file))
            if fingerprint_of(hashed) == fingerprint:
                yield hashed


def _publish_the_rest(seen: Examined, report: RepairReport) -> None:
    """Publish what is sound, and plan what was lost."""
    assert seen.root is not None
    path, root = seen.path, seen.root
    wrong = {one.path for one in seen.findings}
    trusted = seen.index is not None and ROOT not in wrong and not wrong & {one["path"] for one in root["indexes"]}
    shards = [one for i, one in enumerate(seen.shards) if i not in seen.damaged]
    units: list[Unit] = []
    quarantine = list(seen.quarantine or ())
    if seen.quarantine is None:
        report.notes.append("the quarantine is lost: encode tries its files again")
    if trusted and seen.numbered:
        assert seen.index is not None
        new = np.full(len(seen.shards), -1)
        new[[i for i in range(len(new)) if i not in seen.damaged]] = np.arange(len(shards))
        live = new[seen.index["shard"]] >= 0
        index = renumber(take(seen.index, np.flatnonzero(live)), new)
        units, quarantine = _lost_units(seen, quarantine)
    else:
        shards += unnamed_shards(seen) if not seen.numbered else []
        index, live = index_from_shards(seen, shards, seen.index if trusted else None)
    if seen.index is not None and trusted:
        keys = key_list(seen.index)
        report.lost = [decode_key(keys[i]) for i in np.flatnonzero(~live).tolist()]
    else:
        report.notes.append("the index is lost, and with it the labels: rerun encode, which adds them again")
    report.planned = len(units)
    coming = root["generation"] + 1
    if not len(index["row"]):
        # A dataset has at least one row: encode begins again, with the same units.
        _plan(report, seen.fingerprint, coming, 1, units)
        _set_aside(report, ROOT)
        for copy in sorted((path / GENERATION).glob("*.json")):
            _set_aside(report, f"{GENERATION}/{copy.name}")
        report.generation = None
        report.notes.append("not one sample is left: rerun encode, which begins again")
        return
    _plan(report, seen.fingerprint, coming, coming + 1, units)
    unchanged = seen.numbered and not seen.damaged
    parts = live_statistics(index, shards, seen.buckets, lambda i: seen.open_record(shards[i]))
    contents = Contents(
        fingerprint=seen.fingerprint,
        classes=root["classes"],
        buckets=count_rows(seen.buckets, index),
        fields=root["fields"],
        manifests=root["manifests"] if unchanged else [],
        kept=shards if unchanged else [],
        added=[] if unchanged else shards,
        index=index,
        statistics=merged(part for _, part in parts),
        quarantine=quarantine,
    )
    report.generation = publish(path, _without(seen, wrong), contents).generation


def _without(seen: Examined, wrong: set[str]) -> Dataset:
    """What `publish` reads of the last generation, less the files that are damaged: it must not name them again."""
    assert seen.root is not None
    last = Dataset.__new__(Dataset)
    last.path, last.generation = seen.path, seen.root["generation"]
    last.totals = Totals(**{name: seen.root["totals"][name] for name in Totals.__dataclass_fields__})
    last.root = seen.root | {"indexes": [one for one in seen.root["indexes"] if one["path"] not in wrong]}
    for name in ("statistics", "quarantine"):
        if last.root[name] is not None and last.root[name]["path"] in wrong:
            last.root[name] = None
    return last


def _plan(report: RepairReport, fingerprint: str, coming: int, following: int, lost: list[Unit]) -> None:
    """The plan of generation `following`: the lost units, and those of an encode that was interrupted before."""
    path = report.path
    pending: list[Unit] = []
    done: dict[str, Committed] = {}
    try:
        pending = read_plan(path, coming, fingerprint)
        done = read_journals(path, coming)
    except ValueError as error:
        report.notes.append(f"{error}; it is set aside: what was encoded but not yet in the dataset is encoded again")
        for file in (plan_path(path, coming), *sorted((path / JOURNAL).glob("*.jsonl"))):
            if file.exists():
                _set_aside(report, file.relative_to(path).as_posix())
    units = {unit.id: unit for unit in (*pending, *lost)}
    if not units:
        return
    ordered = sorted(units.values(), key=lambda unit: (encode_key(unit.items[0].key), unit.id))
    write_plan(path, following, fingerprint, ordered, None, replace=True)
    journal = Journal(path)
    try:
        for unit, committed in done.items():
            if unit in units and following != coming:
                journal.append(replace(committed, generation=following))
    finally:
        journal.close()


def _lost_units(seen: Examined, quarantine: list[dict[str, Any]]) -> tuple[list[Unit], list[dict[str, Any]]]:
    """The units of the damaged shards as they were planned once, and the quarantine without their files."""
    assert seen.index is not None
    index = seen.index
    keys, digests = key_list(index), digest_strings(index["src_xxh3"])
    sizes, mtimes = index["src_size"].tolist(), index["src_mtime_ns"].tolist()
    live = rows_by_shard(index, len(seen.shards))
    apart = [
        PlannedItem(one["key"], "", one["digest"], one["size"], one["mtime_ns"])
        for one in sorted(quarantine, key=lambda one: encode_key(one["key"]))
    ]
    units: list[Unit] = []
    taken: set[str] = set()
    for i in sorted(seen.damaged):
        record, rows = seen.shards[i], live[i].tolist()
        if len(rows) < record.rows or not rows:
            continue  # it held samples that the dataset no longer has: encode cuts the others afresh
        items = [PlannedItem(decode_key(keys[j]), "", digests[j], sizes[j], mtimes[j]) for j in rows]
        # Its files in quarantine lie between its first and its last key, or a little beside.
        own = [keys[j] for j in rows]
        begin = bisect_left(apart, min(own), key=lambda item: encode_key(item.key))
        end = bisect_right(apart, max(own), key=lambda item: encode_key(item.key))
        near = [one for one in apart[max(0, begin - BESIDE) : end + BESIDE] if one.key not in taken]
        for some in _subsets(near):
            both = tuple(sorted([*items, *some], key=lambda item: encode_key(item.key))) if some else tuple(items)
            unit = Unit.of(seen.fingerprint, seen.buckets[record.bucket].shape, both)
            if unit.id == record.unit:
                units.append(unit)
                taken |= {one.key for one in some}
                break
    return units, [one for one in quarantine if one["key"] not in taken]


def _subsets(files: list[PlannedItem]) -> Iterator[list[PlannedItem]]:
    """Which of these files a unit may have had: every subset of few, of many every run; the empty one first."""
    yield []
    if len(files) <= MAX_SUBSET:
        for count in range(len(files), 0, -1):
            yield from (list(some) for some in itertools.combinations(files, count))
        return
    for count in range(len(files), 0, -1):
        for start in range(len(files) - count + 1):
            yield files[start : start + count]


def _set_aside(report: RepairReport, name: str, *, keep: bool = False) -> None:
    """Move a file of the dataset to DATASET/damaged/ (`keep`: copy it); one that is not there is left out."""
    try:
        file = inside(report.path, name, "repair")
        if not file.is_file():
            return
    except ValueError:
        return  # it lies outside: not ours to move
    folder = report.path / DAMAGED
    make_directory(folder)
    target = folder / file.name
    for number in itertools.count(1):
        if not target.exists():
            break
        target = folder / f"{file.name}.{number}"
    if keep:
        write_atomic(target, file.read_bytes())
    else:
        os.replace(file, target)
        fsync_directory(folder)
        fsync_directory(file.parent)
    report.moved.append(name)
