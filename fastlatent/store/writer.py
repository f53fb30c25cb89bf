"""Write a dataset: plan the units that are missing, commit them one by one, finish with a new generation."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

from fastlatent.store.build import Committed, Journal, Lock, plan_path, read_journals, read_plan, write_plan
from fastlatent.store.cut import Cutter
from fastlatent.store.files import TEMPORARY, canonical_json, make_directory, write_atomic
from fastlatent.store.generation import DatasetInfo
from fastlatent.store.merge import Place, clean, index_rows, merge, quarantined_files, revive
from fastlatent.store.provenance import differences, fingerprint
from fastlatent.store.reader import PROVENANCE, Dataset, read_provenance
from fastlatent.store.records import ROOT, Quarantined, Unit, check_shape, encode_key
from fastlatent.store.rows import Rows, write_rows
from fastlatent.store.scan import Entry, Pair, Scanned, scan, sort_entries

MAX_SHARD_BYTES = 1 << 30  # a unit is assembled in memory


class DatasetWriter:
    """The one writer of a dataset, from `open` to the end of the `with` block. Not thread-safe."""

    def __init__(
        self,
        path: Path,
        lock: Lock,
        provenance: dict[str, Any],
        classes: list[str],
        unit_rows: int,
        bucket: tuple[int, ...],
        current: Dataset | None,
    ):
        self.path = path
        self._lock = lock
        self._hashed = provenance["hashed"]
        self.fingerprint = fingerprint(self._hashed)
        self._classes = classes
        self._unit_rows = unit_rows
        self._bucket = bucket
        self._current = current
        self._generation = (current.generation if current else 0) + 1
        self._committed = read_journals(path, self._generation)
        self._journal = Journal(path)
        self._scan: list[Scanned] | None = None
        self._units: dict[str, Unit] = {}
        self._indexed: dict[Pair, int] = {}
        self._revived: dict[Pair, Place] = {}

    @classmethod
    def open(
        cls,
        path: Path | str,
        provenance: dict[str, Any],
        classes: list[str],
        *,
        unit_rows: int,
        bucket: tuple[int, ...],
    ) -> DatasetWriter:
        """Create a dataset, or take up one that is there: to go on after a kill, or to add what is new.

        Args:
            provenance: {"hashed": what decides the bytes, "informational": the rest}. The dataset keeps those
                of its first writer.
            classes: class names; an entry's label is an index into them. May differ from earlier
                generations'.
            unit_rows: files per unit, hence at most that many rows per shard.
            bucket: shape of a row, [F, 2C, H, W].

        Raises:
            ValueError: the folder holds something else, or a dataset of another fingerprint or row shape;
                another writer is at work; it cannot be written to.
        """
        path = Path(path)
        bucket = tuple(bucket)
        if set(provenance) != {"hashed", "informational"}:
            raise ValueError(f"provenance: expected 'hashed' and 'informational', got {sorted(provenance)}")
        check_shape(bucket, "bucket")
        if not 1 <= unit_rows <= max(1, MAX_SHARD_BYTES // (4 * math.prod(bucket))):
            raise ValueError(f"unit_rows: expected 1 to {MAX_SHARD_BYTES // (4 * math.prod(bucket))}, got {unit_rows}")
        canonical_json(provenance)  # refuse what JSON cannot hold before anything is written
        _check_ours(path)
        try:
            make_directory(path)
        except OSError as error:
            raise ValueError(f"{path}: expected a folder that can be written to, got: {error.strerror}") from None
        lock = Lock(path)
        try:
            _check_provenance(path, provenance)
            current = Dataset.open(path) if (path / ROOT).exists() else None
            if current and [one.shape for one in current.buckets] != [bucket]:
                raise ValueError(f"{path}: expected rows of {current.buckets[0].shape}, got bucket {bucket}")
            _check_shards(path, current)
            clean(path, current.generation if current else 0)
            return cls(path, lock, provenance, list(classes), unit_rows, bucket, current)
        except BaseException:
            lock.release()
            raise

    def __enter__(self) -> DatasetWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._journal.close()
        self._lock.release()

    def plan(self, entries: Iterable[Entry], on_progress: Callable[[int, int], None] | None = None) -> list[Unit]:
        """Commit the plan that brings the dataset to exactly these files; return its units still to do, in order.

        A file whose size and mtime are those of the index or of a pending plan is taken to be unchanged;
        every other one is hashed, and `on_progress(done, total)` counts those.

        Raises:
            ValueError: a key that occurs twice, a label outside the classes, a file that cannot be read or
                changes while it is read.
        """
        self._scan = None  # until this plan stands, `finish` has nothing to finish
        self._indexed = index_rows(self._current)
        pending = read_plan(self.path, self._generation, self.fingerprint)
        files = scan(sort_entries(entries, len(self._classes)), self._known(pending), on_progress)
        settled = quarantined_files(self._current)
        wanted = {one.pair: one for one in files if one.pair not in self._indexed and one.pair not in settled}
        self._revived = revive(self._current, set(wanted))
        wanted = {pair: one for pair, one in wanted.items() if pair not in self._revived}
        units = Cutter(self.fingerprint, self._bucket, self._unit_rows).cut(wanted, pending, self._committed)
        if units or plan_path(self.path, self._generation).exists():
            write_plan(self.path, self._generation, self.fingerprint, units)
        self._units = {unit.id: unit for unit in units}
        self._scan = files
        return [unit for unit in units if unit.id not in self._committed]

    def commit(self, unit: Unit, rows: Rows, quarantined: Iterable[Quarantined] = ()) -> None:
        """Make a unit durable: its shard, then its journal line. Rows with NaN or infinity are quarantined.

        Args:
            rows: of every item of the unit that is not in `quarantined`, in the unit's order.

        Raises:
            ValueError: rows that are not this unit's, or of another shape or dtype than the dataset's.
            OSError: the disk is full ...; nothing is committed, and the call can be repeated.
        """
        if unit.id not in self._units or unit.id in self._committed:
            raise ValueError(f"unit {unit.id}: expected one that `plan` returned and that is not yet committed")
        unit = self._units[unit.id]
        bad = {one.key: one for one in quarantined}
        items = [item for item in unit.items if item.key not in bad]
        if not {(one.key, one.digest) for one in bad.values()} <= {(item.key, item.digest) for item in unit.items}:
            raise ValueError(f"unit {unit.id}: expected files of this unit in quarantine, got {list(bad)!r:.300}")
        if rows.keys != [item.key for item in items]:
            raise ValueError(
                f"unit {unit.id}: expected rows for {len(items)} keys in the unit's order, got "
                f"{len(rows.keys)} keys that begin {rows.keys[:3]!r:.200}"
            )
        rows.check(unit)
        others = {one.dtype for one in self._committed.values() if one.shard}
        others |= {one.dtype for one in self._current.buckets} if self._current else set()
        if others - {rows.dtype}:
            raise ValueError(f"moments: expected {others.pop()} as in the rest of the dataset, got {rows.dtype}")
        finite = rows.finite()
        for item, good in zip(items, finite, strict=True):
            if not good:
                reason = f"its latent holds NaN or infinity (as {rows.dtype})"
                bad[item.key] = Quarantined(item.key, item.digest, reason, "FloatingPointError")
        shard = None
        if finite.any():
            kept = [item for item, good in zip(items, finite, strict=True) if good]
            shard = write_rows(self.path, self._hashed, unit, kept, rows, finite)
        order = tuple(bad[item.key] for item in unit.items if item.key in bad)
        committed = Committed(self._generation, unit.id, rows.dtype, shard, order)
        self._journal.append(committed)
        self._committed[unit.id] = committed

    def finish(self) -> DatasetInfo:
        """Publish what was committed as a new generation, or keep the current one where nothing has changed.

        Raises:
            ValueError: `plan` was not called, units are missing, or not one row is good (the quarantine is
                named). What was there is kept.
        """
        if self._scan is None:
            raise ValueError(f"{self.path}: expected a call of plan() before finish()")
        missing = [unit for unit in self._units.values() if unit.id not in self._committed]
        if missing:
            raise ValueError(f"{self.path}: {len(missing)} of {len(self._units)} units are not yet committed")
        committed = [self._committed[unit] for unit in self._units]
        info = merge(
            self.path, self.fingerprint, self._bucket, self._classes, self._current, self._scan,
            self._indexed, self._revived, committed,
        )  # fmt: skip
        self._journal.close()
        self._current = Dataset.open(self.path)
        self._generation = self._current.generation + 1
        self._committed, self._units, self._indexed, self._revived, self._scan = {}, {}, {}, {}, None
        clean(self.path, self._generation)
        return info

    def _known(self, pending: list[Unit]) -> dict[bytes, tuple[int, int, str]]:
        """What files looked like when they were last read: key -> size, mtime_ns, digest."""
        known: dict[bytes, tuple[int, int, str]] = {}
        if self._current is not None:
            sizes, mtimes = self._current.src_size.tolist(), self._current.src_mtime_ns.tolist()
            known = {key: (sizes[i], mtimes[i], digest) for (key, digest), i in self._indexed.items()}
        for (key, digest), one in quarantined_files(self._current).items():
            known[key] = one["size"], one["mtime_ns"], digest
        for unit in pending:
            for item in unit.items:
                known[encode_key(item.key)] = item.size, item.mtime_ns, item.digest
        return known


def _check_ours(path: Path) -> None:
    """Raise ValueError where `path` holds what no writer of ours has put there."""
    if not path.exists():
        return
    if not path.is_dir():
        raise ValueError(f"{path}: expected a folder for the dataset, got a file")
    names = sorted(entry.name for entry in path.iterdir())
    others = [name for name in names if name != ".lock" and not name.startswith(TEMPORARY)]
    if others and PROVENANCE not in others and ROOT not in others:
        raise ValueError(f"{path}: expected an empty folder or a dataset, got {others[:5]}: choose another folder")


def _check_provenance(path: Path, provenance: dict[str, Any]) -> None:
    """Write provenance.json where there is none; refuse where there is another."""
    if not (path / PROVENANCE).exists():
        if (path / ROOT).exists():
            raise ValueError(f"{path / PROVENANCE} is missing: restore it from a copy, or encode into a new folder")
        write_atomic(path / PROVENANCE, canonical_json(provenance) + b"\n")
        return
    ours = read_provenance(path)["hashed"]
    if fingerprint(ours) != fingerprint(provenance["hashed"]):
        lines = "\n  ".join(differences(ours, provenance["hashed"]))
        raise ValueError(
            f"{path} was encoded with other settings:\n  {lines}\n"
            "encode into another folder, or go back to the dataset's settings"
        )


def _check_shards(path: Path, current: Dataset | None) -> None:
    for record in current.shards if current else ():
        try:
            size = (path / record.path).stat().st_size
        except OSError:
            size = -1
        if size != record.bytes:
            came = "no such file" if size < 0 else f"{size} bytes"
            raise ValueError(
                f"{path / record.path}: expected {record.bytes} bytes, got {came}: restore it from a copy, or "
                "encode into a new folder"
            )
