"""Write a dataset: plan the units that are missing, commit them one by one, finish with a new generation."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from fastlatent.store import lease
from fastlatent.store.admission import check_ours, check_provenance, check_schema, check_shards, foreign_environment
from fastlatent.store.build import (
    PLAN,
    Committed,
    Journal,
    Journals,
    Lock,
    Plan,
    load_plan,
    plan_path,
    scan_digest,
    write_plan,
)
from fastlatent.store.cut import Cutter
from fastlatent.store.files import canonical_json, make_directory
from fastlatent.store.generation import DatasetInfo, keep_copy
from fastlatent.store.lease import Leases, exclusive
from fastlatent.store.merge import (
    Place,
    changed_groups,
    clean,
    describes,
    index_rows,
    merge,
    published,
    quarantined_files,
    revive,
    sweep,
)
from fastlatent.store.provenance import fingerprint
from fastlatent.store.reader import Dataset, read_root
from fastlatent.store.records import RAGGED, ROOT, Quarantined, Schema, Unit, encode_key
from fastlatent.store.rows import Rows, write_rows
from fastlatent.store.scan import Entry, Examine, Known, Pair, Scanned, is_known, scan, sort_entries

MAX_SHARD_BYTES = 1 << 30  # a unit is assembled in memory
PLANNING = "plan"  # the lease of the writer that reads the files and makes the plan


class DatasetWriter:
    """One of any number of writers of a dataset, from `open` to the end of the `with` block.

    One thread may `commit` while another calls `claim_now`; nothing else may run at the same time.
    """

    def __init__(
        self,
        path: Path,
        lock: Lock,
        leases: Leases,
        provenance: dict[str, Any],
        classes: list[str],
        unit_rows: int,
        schema: Schema,
        current: Dataset | None,
        environment: dict[str, Any] | None,
    ):
        self.path = path
        self._lock = lock
        self._leases = leases
        self._hashed = provenance["hashed"]
        self.fingerprint = fingerprint(self._hashed)
        self._classes = classes
        self._unit_rows = unit_rows
        self._schema = schema
        self._environment = environment
        self._journal = Journal(path)
        self._guard = threading.RLock()  # between claim_now and commit
        self._begin(current)

    def _begin(self, current: Dataset | None) -> None:
        """Be ready for the generation after `current`."""
        self._current = current
        self._generation = (current.generation if current else 0) + 1
        self._journals = Journals(self.path, self._generation)
        self._own: set[str] = set()  # units that this writer committed
        self._told: set[str] = set()  # units of others that `on_others` was told of
        self._committed = self._journals.refresh()
        self._scan: list[Scanned] | None = None
        self._settled = 0  # files of the scan that are in quarantine since earlier generations
        self._digest = ""
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
        schema: Schema,
        allow_mixed: bool = False,
    ) -> DatasetWriter:
        """Create a dataset, or take up one that is there: to go on after a kill, to add what is new, to help others.

        Args:
            provenance: {"hashed": what decides the bytes, "informational": the rest}. The dataset keeps those
                of its first writer.
            classes: class names; an entry's label is an index into them. May differ from earlier
                generations'.
            unit_rows: files per unit, hence at most that many rows per shard (more only for one group that has more).
            schema: what a row holds. Buckets may differ from earlier generations'.
            allow_mixed: whether informational["environment"] may differ from that of the dataset's first writer.

        Raises:
            ValueError: the folder holds something else, or a dataset of another fingerprint, environment or row shape;
                a process holds it for itself alone; it cannot be written to.
        """
        path = Path(path)
        if set(provenance) != {"hashed", "informational"}:
            raise ValueError(f"provenance: expected 'hashed' and 'informational', got {sorted(provenance)}")
        largest = max(math.prod(size for size in shape if size != RAGGED) for shape in schema.buckets)
        if not 1 <= unit_rows <= max(1, MAX_SHARD_BYTES // (4 * largest)):
            raise ValueError(f"unit_rows: expected 1 to {MAX_SHARD_BYTES // (4 * largest)}, got {unit_rows}")
        canonical_json(provenance)  # refuse what JSON cannot hold before anything is written
        check_ours(path)
        try:
            make_directory(path)
        except OSError as error:
            raise ValueError(f"{path}: expected a folder that can be written to, got: {error.strerror}") from None
        lock = Lock(path, shared=True)
        leases = None
        try:
            check_provenance(path, provenance)
            environment = foreign_environment(path, provenance, allow_mixed=allow_mixed)
            current = Dataset.open(path) if (path / ROOT).exists() else None
            if current:
                check_schema(current, schema)
            check_shards(path, current)
            leases = Leases(path)
            if lock.alone:
                sweep(path)
                leases.sweep()
                lock.share()
            if current:
                keep_copy(path)
                clean(path, current.generation, empty=False)
            return cls(path, lock, leases, provenance, list(classes), unit_rows, schema, current, environment)
        except BaseException:
            try:
                if leases is not None:
                    leases.close()
            finally:
                lock.release()
            raise

    def __enter__(self) -> DatasetWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._journal.close()
            if kind is None:
                self._leases.sweep()
        finally:
            try:
                self._leases.close()
                if kind is None and self._lock.try_exclusive():  # the last one clears up
                    sweep(self.path)
            finally:
                self._lock.release()

    def plan(
        self,
        entries: Iterable[Entry],
        on_progress: Callable[[int, int], None] | None = None,
        *,
        examine: Examine | None = None,
    ) -> list[Unit]:
        """Commit or join the plan that brings the dataset to exactly these files; return its units to do, in order.

        A file whose size and mtime are those of the index or of a pending plan is taken to be unchanged;
        every other one is read, by one writer at a time, and `on_progress(done, total)` counts those.

        Args:
            examine: reads an entry and returns its digest and bucket, or None for one that cannot be read and is left
                out; by default the file at entry.path is hashed, and its bucket is entry.bucket.

        Raises:
            ValueError: a key that occurs twice, a label outside the classes, a file that cannot be read or
                changes while it is read; other writers are at work on another state of the files.
        """
        ordered = sort_entries(entries, len(self._classes), len(self._schema.buckets))
        read: dict[bytes, Known] = {}
        self._scan = None  # until this plan stands, `finish` has nothing to finish
        self._leases.join(0)
        try:
            while not self._join(ordered, read, examine, on_progress):
                pass
        finally:
            self._leases.release(PLANNING)
        self._look()
        self._told = set(self._committed)
        return [unit for unit in self._units.values() if unit.id not in self._committed]

    def _join(
        self,
        ordered: list[tuple[bytes, Entry]],
        read: dict[bytes, Known],
        examine: Examine | None,
        on_progress: Callable[[int, int], None] | None,
    ) -> bool:
        """One attempt of `plan`; False: others changed something meanwhile. `read` keeps what was hashed here."""
        self._catch_up()
        stamp = _stamp(plan_path(self.path, self._generation))
        pending = load_plan(self.path, self._generation, self.fingerprint)
        if (pending is None) != (stamp is None):
            return False
        self._indexed = index_rows(self._current)
        known = self._known(pending) | read
        planning = PLANNING in self._leases.mine
        if not planning and not all(is_known(known, key, entry, examine) for key, entry in ordered):
            self._wait_to_plan(stamp)
            return False
        files = scan(ordered, known, examine, on_progress)
        read |= {one.key: (one.entry.size, one.entry.mtime_ns, one.digest, one.entry.bucket) for one in files}
        units = self._cut(files, pending)
        self._digest = scan_digest(files, self._classes, self._schema)
        self._units = {unit.id: unit for unit in units}
        fits = pending is not None and (pending.scan, [one.id for one in pending.units]) == (
            self._digest,
            [*self._units],
        )
        if not fits:
            if pending is None and (not files or (not units and self._is_current(files))):  # no files: `finish` refuses
                self._take(files)
                return True
            if not planning:
                self._wait_to_plan(stamp)
                return False
            if pending is not None:
                self._refuse_beside_others(pending, files)
        with exclusive(self.path / PLAN / ".lock"):
            if _generation(self.path) != self._generation - 1:
                return False
            if _stamp(plan_path(self.path, self._generation)) != stamp:
                return False
            if not fits:
                if pending is not None and self._leases.others(self._generation):
                    return False  # one more joined, and the next attempt will name it
                made = write_plan(
                    self.path, self._generation, self.fingerprint, units, self._digest, replace=pending is not None
                )
                if not made:
                    return False
            self._leases.join(self._generation)
        self._take(files)
        return True

    def _take(self, files: list[Scanned]) -> None:
        settled = quarantined_files(self._current)
        self._scan = files
        self._settled = sum(one.pair in settled for one in files) if settled else 0

    def _wait_to_plan(self, stamp: tuple[int, ...] | None) -> None:
        """Wait until it is this writer's turn to plan, or the plan is no longer the one of `stamp`."""
        path, generation = plan_path(self.path, self._generation), _generation(self.path)
        while not self._leases.take(PLANNING):
            if _stamp(path) != stamp or _generation(self.path) != generation:
                return
            time.sleep(lease.POLL_SECONDS)

    def _cut(self, files: list[Scanned], pending: Plan | None) -> list[Unit]:
        for pair in changed_groups(self._current, files):
            self._indexed.pop(pair, None)  # encoded anew: its row no longer lies among its group's
        settled = quarantined_files(self._current)
        wanted = {one.pair: one for one in files if one.pair not in self._indexed and one.pair not in settled}
        ungrouped = {pair for pair, one in wanted.items() if not one.entry.group}
        self._revived = revive(self._current, ungrouped)
        wanted = {pair: one for pair, one in wanted.items() if pair not in self._revived}
        self._look()
        cutter = Cutter(self.fingerprint, self._schema, self._unit_rows)
        return cutter.cut(wanted, pending.units if pending else [], self._committed)

    def _refuse_beside_others(self, pending: Plan, files: list[Scanned]) -> None:
        """Raise ValueError where others work on `pending`: only who is alone may replace it."""
        while others := self._leases.others(self._generation):
            if any(one.certain for one in others):
                planned = {(encode_key(item.key), item.digest) for unit in pending.units for item in unit.items}
                found = {one.pair for one in files}
                differ = {key for key, _ in planned - found}
                differ |= {key for key, digest in found - planned if (key, digest) not in self._indexed}
                count = f"{len(differ)} files differ" if differ else "labels or dates of files differ, or some are gone"
                first = sorted(differ)[:3]
                listed = (
                    f", {', '.join(repr(key.decode('utf-8', 'replace'))[:80] for key in first)} ..." if first else ""
                )
                names = ", ".join(one.name for one in others)
                raise ValueError(
                    f"{self.path}: the source changed since the others began ({names}): {count}{listed}; wait for "
                    "them, or stop them, and run this again"
                )
            time.sleep(lease.POLL_SECONDS)  # a host that may be down: its lease expires

    @property
    def quarantined(self) -> list[Quarantined]:
        """What the plan's units that are committed, by whomever, put into quarantine."""
        with self._guard:
            units = [one for one in self._committed.values() if one.unit in self._units]
        return [bad for one in units for bad in one.quarantined]

    @property
    def left_out(self) -> int:
        """Files of the plan that are in quarantine: since earlier generations, or by units that are committed."""
        return self._settled + len(self.quarantined)

    def claim(self, on_others: Callable[[int], None] | None = None) -> Iterator[Unit]:
        """The plan's units that nobody has committed and nobody else works on, one by one; commit each.

        When only units are left that others work on, it waits until they are committed or the others are found dead.
        It ends when every unit is committed, by whomever, or the generation published.

        Args:
            on_others: called whenever the others' work was looked at, every POLL_SECONDS while waiting, with the
                number of files that they finished since.
        """
        while True:
            unit = self.claim_now(on_others)
            if unit is None:
                if self._finished():
                    return
                held = [one for name, one in self._units.items() if name in self._leases.mine]
                unit = next((one for one in held if one.id not in self._committed), None)
            if unit is None:
                time.sleep(lease.POLL_SECONDS)
            else:
                yield unit

    def claim_now(self, on_others: Callable[[int], None] | None = None, *, name: str | None = None) -> Unit | None:
        """The next unit of `claim`, None where there is none at this moment. For who prepares one unit ahead.

        Args:
            name: only the unit of this id.
        """
        if self._scan is None:
            raise ValueError(f"{self.path}: expected a call of plan() before claim()")
        with self._guard:
            self._look(on_others)
            if self._finished():
                return None
            for unit in self._units.values() if name is None else [self._units[name]]:
                if unit.id in self._committed or unit.id in self._leases.mine or not self._leases.take(unit.id):
                    continue
                self._look(on_others)  # it may have been committed and released in between
                if unit.id not in self._committed:
                    return unit
                self._leases.release(unit.id)
            return None

    def commit(self, unit: Unit, rows: Rows, quarantined: Iterable[Quarantined] = ()) -> None:
        """Make a unit durable: its shard, then its journal line. Rows with NaN or infinity are quarantined.

        Args:
            rows: of every item of the unit that is not in `quarantined`, in the unit's order.

        Raises:
            ValueError: rows that are not this unit's, or of another shape or dtype than the dataset's.
            OSError: the disk is full ...; nothing is committed, and the call can be repeated.

        A unit that another writer has committed meanwhile is left as it is.
        """
        if unit.id not in self._units or unit.id in self._own:
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
        with self._guard:
            others = {one.dtype for one in self._committed.values() if one.shard}
        others |= {one.dtype for one in self._current.buckets} if self._current else set()
        dtype = rows.dtype if items else next(iter(others), "F16")  # of no ragged row nothing says the dtype
        if items:
            rows.check(unit, self._schema.payload, self._schema.extras)
        if others - {dtype}:
            raise ValueError(f"rows: expected {others.pop()} as in the rest of the dataset, got {dtype}")
        finite = rows.finite() if items else np.zeros(0, bool)
        for item, good in zip(items, finite, strict=True):
            if not good:
                reason = f"its latent holds NaN or infinity (as {dtype})"
                bad[item.key] = Quarantined(item.key, item.digest, reason, "FloatingPointError")
        with self._guard:
            self._look()
            if unit.id in self._committed or self._finished():
                self._leases.release(unit.id)
                return
        shard = None
        if finite.any():
            kept = [item for item, good in zip(items, finite, strict=True) if good]
            schema = self._schema
            shard = write_rows(self.path, self._hashed, unit, kept, rows.kept(finite), schema.payload, schema.extras)
            shard = replace(shard, environment=self._environment)
        order = tuple(bad[item.key] for item in unit.items if item.key in bad)
        committed = Committed(self._generation, unit.id, dtype, shard, order)
        with self._guard:
            self._journal.append(committed)
            self._committed[unit.id] = committed
            self._own.add(unit.id)
            self._leases.release(unit.id)

    def finish(self) -> DatasetInfo:
        """Publish what all writers committed as a new generation, or keep the current one where nothing has changed.

        Every writer may call it; who comes second gets what the first one published.

        Raises:
            ValueError: `plan` was not called, units are missing, or not one row is good (the quarantine is
                named). What was there is kept.
        """
        if self._scan is None:
            raise ValueError(f"{self.path}: expected a call of plan() before finish()")
        with exclusive(self.path / PLAN / ".lock"):
            if _generation(self.path) >= self._generation:
                current = Dataset.open(self.path)
                if not describes(current, self._scan, self._classes):
                    raise ValueError(
                        f"{self.path}: another writer has published generation {current.generation} from another "
                        "state of the files; run this again"
                    )
                info = published(current)
            else:
                info = self._merge()
            clean(self.path, self._generation, empty=True)
        for unit in self._units:
            self._leases.release(unit)
        self._journal.close()
        self._leases.join(0)
        self._begin(Dataset.open(self.path))
        return info

    def _merge(self) -> DatasetInfo:
        assert self._scan is not None
        self._look()
        missing = [unit for unit in self._units.values() if unit.id not in self._committed]
        if missing:
            raise ValueError(f"{self.path}: {len(missing)} of {len(self._units)} units are not yet committed")
        pending = load_plan(self.path, self._generation, self.fingerprint)
        if pending is not None and pending.scan != self._digest:
            raise ValueError(
                f"{self.path}: another writer took this one for dead, and planned for another state of the files; "
                "run this again"
            )
        committed = [(unit, self._committed[unit.id]) for unit in self._units.values()]
        return merge(
            self.path, self.fingerprint, self._schema, self._classes, self._current, self._scan,
            self._indexed, self._revived, committed,
        )  # fmt: skip

    def _look(self, on_others: Callable[[int], None] | None = None) -> None:
        """Read what the others committed since."""
        self._committed = self._journals.refresh()
        if on_others is not None:
            new = self._committed.keys() - self._own - self._told
            self._told |= new
            on_others(sum(len(self._units[name].items) for name in new if name in self._units))

    def _finished(self) -> bool:
        """Whether nothing is left to do on the plan: all is committed, or the generation has been published."""
        return self._units.keys() <= self._committed.keys() or _generation(self.path) >= self._generation

    def _catch_up(self) -> None:
        """Go on from the generation that others have published meanwhile."""
        if _generation(self.path) >= self._generation:
            self._journal.close()
            self._begin(Dataset.open(self.path))

    def _is_current(self, files: list[Scanned]) -> bool:
        return self._current is not None and describes(self._current, files, self._classes)

    def _known(self, pending: Plan | None) -> dict[bytes, Known]:
        """What files looked like when they were last read, by key."""
        known: dict[bytes, Known] = {}
        number = {shape: i for i, shape in enumerate(self._schema.buckets)}
        if self._current is not None:
            now = np.array([number.get(bucket.shape, -1) for bucket in self._current.buckets])
            columns = (self._current.src_size, self._current.src_mtime_ns, now[self._current.bucket])
            sizes, mtimes, buckets = (column.tolist() for column in columns)
            known = {key: (sizes[i], mtimes[i], digest, buckets[i]) for (key, digest), i in self._indexed.items()}
        for (key, digest), one in quarantined_files(self._current).items():
            known[key] = one["size"], one["mtime_ns"], digest, 0  # of no row, so any bucket will do
        for unit in pending.units if pending else ():
            for item in unit.items:
                known[encode_key(item.key)] = item.size, item.mtime_ns, item.digest, number.get(unit.bucket, -1)
        return known


def _generation(path: Path) -> int:
    """The published generation, 0 where there is none."""
    return read_root(path)["generation"] if (path / ROOT).exists() else 0


def _stamp(path: Path) -> tuple[int, ...] | None:
    """Changes whenever another file takes the place of the one at `path`; None where there is none."""
    with suppress(FileNotFoundError):
        stat = path.stat()
        return stat.st_ino, stat.st_size, stat.st_mtime_ns
    return None
