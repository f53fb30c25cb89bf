"""Remove what the current generation does not need."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastlatent.store.build import JOURNAL, PLAN, Lock, journal_generation, plan_path, read_journals
from fastlatent.store.files import TEMPORARY, fsync_directory
from fastlatent.store.generation import Contents, publish
from fastlatent.store.lease import LEASE
from fastlatent.store.live import dataset_index, renumber
from fastlatent.store.reader import GENERATION, Dataset
from fastlatent.store.records import ROOT, FileRecord, ShardRecord
from fastlatent.store.repair import DAMAGED
from fastlatent.store.verify import SHARDS

SHARD_NAME = re.compile(r"[0-9a-f]{32}-[0-9a-f]{32}\.safetensors")
OF_A_GENERATION = re.compile(r"\d{6,}\.(json|safetensors)")
UNFINISHED = re.compile(re.escape(TEMPORARY) + r".*-[0-9a-f]{32}")


@dataclass(frozen=True)
class CollectReport:
    """What was removed (or would be). `bytes`: of files that no other dataset shares by a hard link.

    `generation`: that of the dataset now. `waiting`: shards without a sample that stay until the encode that is pending
    has finished.
    """

    path: Path
    generation: int
    removed: list[str]
    bytes: int
    waiting: int


def collect(path: Path | str, *, dry_run: bool) -> CollectReport:
    """Remove earlier generations, shards that no sample lies in, damaged files that were set aside, and left-overs.

    Shards without a sample go first out of the manifests, by a new generation; but not while an encode is pending,
    whose plan and finished shards stay. Whoever has mapped a file keeps it; an earlier generation cannot be opened any
    more.

    Raises:
        ValueError: no sound dataset there, or a writer is at work.
    """
    path = Path(path)
    dataset = Dataset.open(path)
    lock = Lock(path)
    try:
        dataset = Dataset.open(path)  # as it is now that nobody writes
        index = dataset_index(dataset)
        live = np.bincount(index["shard"], minlength=len(dataset.shards)) > 0
        dead = int((~live).sum())
        pending = plan_path(path, dataset.generation + 1).exists()
        shards = [one for one, used in zip(dataset.shards, live.tolist(), strict=True) if used or pending]
        generation = dataset.generation
        if dead and not pending and not dry_run:
            new = np.cumsum(live) - 1
            contents = Contents(
                fingerprint=dataset.fingerprint,
                classes=dataset.classes,
                buckets=dataset.buckets,
                fields=dataset.root["fields"],
                manifests=[],
                kept=[],
                added=shards,
                index=renumber(index, new),
                statistics=dataset.statistics,  # a shard without a sample has no part in them
                quarantine=dataset.quarantine,
            )
            generation = publish(path, dataset, contents).generation
            dataset = Dataset.open(path)
        files = sorted(_unneeded(dataset, shards, pending, going=bool(dead) and not pending and dry_run))
        freed = 0
        for file in files:
            status = file.lstat()
            freed += status.st_size if status.st_nlink == 1 else 0
            if not dry_run:
                file.unlink()
        if not dry_run:
            _tidy(path, {file.parent for file in files})
        names = [file.relative_to(path).as_posix() for file in files]
        return CollectReport(path, generation, names, freed, dead if pending else 0)
    finally:
        lock.release()


def _unneeded(dataset: Dataset, shards: list[ShardRecord], pending: bool, *, going: bool) -> Iterator[Path]:
    """Files in the folders of the format that nothing needs; what we did not put there stays.

    `going`: a generation without the dead shards would come first, with a manifest and an index of its own.
    """
    path, root = dataset.path, dataset.root
    records = [root["statistics"], root["quarantine"], *([] if going else root["manifests"] + root["indexes"])]
    needed = {FileRecord.parse(one, ROOT).path for one in records if one is not None}
    needed |= {one.path for one in shards} | ({f"{GENERATION}/{dataset.generation:06d}.json"} if not going else set())
    if pending:
        done = read_journals(path, dataset.generation + 1).values()
        needed |= {one.shard.path for one in done if one.shard}
    for folder, pattern in (
        (SHARDS, SHARD_NAME),
        *((name, OF_A_GENERATION) for name in ("manifest", "index", "statistics", "quarantine", GENERATION)),
    ):
        for file in (path / folder).rglob("*"):
            if pattern.fullmatch(file.name) and file.relative_to(path).as_posix() not in needed:
                yield file
    yield from (file for file in (path / DAMAGED).rglob("*") if file.is_file())
    yield from (file for file in path.rglob(f"{TEMPORARY}*") if UNFINISHED.fullmatch(file.name) and file.is_file())
    for file in (path / PLAN).glob("*.json"):
        if file.stem.isdecimal() and int(file.stem) <= dataset.generation:
            yield file
    for file in (path / JOURNAL).glob("*.jsonl"):
        if not pending or journal_generation(file) <= dataset.generation:
            yield file
    yield from (file for file in (path / LEASE).glob("*") if file.is_file())


def _tidy(path: Path, folders: set[Path]) -> None:
    """Make the removals durable, and remove the folders that are empty now."""
    for folder in sorted(folders, reverse=True):
        while folder != path and not any(folder.iterdir()):
            folder.rmdir()
            folder = folder.parent
        fsync_directory(folder)
