"""An encode in progress: the lock, the plan of the coming generation, the journals of what was committed."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
import uuid
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from fastlatent.store.files import (
    canonical_json,
    fsync_directory,
    hexadecimal,
    inside,
    make_directory,
    member,
    natural,
    parse_json,
    read_bytes,
    write_all,
    write_atomic,
)
from fastlatent.store.lease import write_exclusive, writers
from fastlatent.store.records import FORMAT, PAYLOAD_DTYPES, Quarantined, Schema, ShardRecord, Unit
from fastlatent.store.scan import Scanned

LOCK = ".lock"
PLAN = "plan"
JOURNAL = "journal"
SCAN_BLOCK = 4096  # files hashed at once in `scan_digest`; part of its definition
LOCK_PATIENCE = 0.5  # seconds: `lock_holder` of a monitor holds the lock for microseconds
CLEARING_PATIENCE = 600.0  # seconds: a writer looks for unfinished files in every folder of the dataset


class Lock:
    """flock on DATASET/.lock: shared by the writers of a dataset, or held by one process, which it then names.

    It ends with the process, however that ends.

    Attributes:
        alone: of a shared lock that is still held exclusively because nobody else was there; see `share`.
    """

    def __init__(self, root: Path, *, shared: bool = False):
        """Raises ValueError: another process holds it, or the folder cannot be written to."""
        self._path = path = root / LOCK
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise ValueError(f"{root}: expected a folder that can be written to, got: {error.strerror}") from None
        try:
            self.alone = self.try_exclusive()
            if not self.alone:
                self._wait(fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
        except BaseException:
            os.close(self._fd)
            raise
        if self.alone or not shared:
            os.ftruncate(self._fd, 0)
        if not shared:
            os.pwrite(self._fd, canonical_json({"pid": os.getpid(), "host": socket.gethostname()}), 0)
        self._named = not shared
        _HELD.add(self)

    def share(self) -> None:
        """Let other writers in. Raises ValueError: a process that wants the dataset for itself was faster."""
        if self.alone:
            self.alone = False
            self._wait(fcntl.LOCK_SH)

    def try_exclusive(self) -> bool:
        """Whether nobody else has it; a shared lock is lost where somebody has."""
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                return False
            raise ValueError(f"{self._path}: expected a file system with flock, got: {error.strerror}") from None
        return True

    def release(self) -> None:
        if self in _HELD:
            _HELD.discard(self)
            if self._named:
                os.ftruncate(self._fd, 0)
            os.close(self._fd)

    def _wait(self, mode: int) -> None:
        root, begin = self._path.parent, time.monotonic()
        while True:
            try:
                fcntl.flock(self._fd, mode | fcntl.LOCK_NB)
                return
            except OSError:
                # A writer that is the only one clears up before it lets others in, and names itself nowhere.
                clearing = mode == fcntl.LOCK_SH and not os.fstat(self._fd).st_size
                if time.monotonic() > begin + (CLEARING_PATIENCE if clearing else LOCK_PATIENCE):
                    raise ValueError(
                        f"{root} is being written by {_holder(root)}; wait until that has finished, or "
                        "stop it (the lock ends with its process) and run this again"
                    ) from None
                time.sleep(0.02)


_HELD: weakref.WeakSet[Lock] = weakref.WeakSet()


def _drop_inherited() -> None:
    # A forked child shares the lock: without this, a worker that outlives a killed parent would keep it.
    for lock in list(_HELD):
        _HELD.discard(lock)
        os.close(lock._fd)


os.register_at_fork(after_in_child=_drop_inherited)


def lock_holder(root: Path) -> str | None:
    """ "pid N on HOST" of the process that is writing the dataset, or None; of several, how many and which."""
    path = root / LOCK
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return _holder(root)
    finally:
        os.close(fd)
    return _named(writers(root))


def _named(names: list[str]) -> str | None:
    return f"{len(names)} writers: {', '.join(names)}" if len(names) > 1 else next(iter(names), None)


def _holder(root: Path) -> str:
    try:
        value = json.loads((root / LOCK).read_bytes())
        return f"pid {value['pid']} on {value['host']}"
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return _named(writers(root)) or "another process"  # which is about to write its name


def plan_path(root: Path, generation: int) -> Path:
    return root / PLAN / f"{generation:06d}.json"


@dataclass(frozen=True)
class Plan:
    """What is to become a generation. `scan` is the digest of the files it was made for (see `scan_digest`), or None
    where `repair` made it; the units' items have no paths.
    """

    scan: str | None
    units: list[Unit]


def scan_digest(files: list[Scanned], classes: list[str], schema: Schema) -> str:
    """What two writers must agree on: xxh3_128 of canonical JSON [classes, fields, buckets], then of each block of
    SCAN_BLOCK files [[key, digest, size, mtime_ns, label, bucket, group, order] ...].
    """
    digest = xxhash.xxh3_128(canonical_json([classes, schema.fields, [list(shape) for shape in schema.buckets]]))
    for start in range(0, len(files), SCAN_BLOCK):
        block = files[start : start + SCAN_BLOCK]
        entries = [(one.entry, one.digest) for one in block]
        digest.update(
            canonical_json([[e.key, d, e.size, e.mtime_ns, e.label, e.bucket, e.group, e.order] for e, d in entries])
        )
    return digest.hexdigest()


def write_plan(
    root: Path, generation: int, fingerprint: str, units: list[Unit], scan: str | None = None, *, replace: bool = True
) -> bool:
    """Commit the plan: from here on these units, and no others, become generation `generation`.

    False: there is a plan already, and `replace` is false.
    """
    value = {
        "format": FORMAT,
        "generation": generation,
        "fingerprint": fingerprint,
        "scan": scan,
        "units": [unit.to_dict() for unit in units],
    }
    path = plan_path(root, generation)
    if not replace:
        return write_exclusive(path, canonical_json(value))
    write_atomic(path, canonical_json(value))
    return True


def load_plan(root: Path, generation: int, fingerprint: str) -> Plan | None:
    """A pending plan; None where there is none.

    Raises:
        ValueError: damaged, or of another format or fingerprint.
    """
    path = plan_path(root, generation)
    if not path.exists():
        return None
    try:
        value = parse_json(read_bytes(path), str(path))
    except ValueError:
        if not path.exists():  # published in this very moment
            return None
        raise
    wanted = {"format": FORMAT, "generation": generation, "fingerprint": fingerprint}
    for name, expected in wanted.items():
        if member(value, name, (str, int), str(path)) != expected:
            raise ValueError(
                f"{path}: {name!r}: expected {expected!r}, got {value[name]!r}; delete the file: units "
                "that are already encoded but not yet in the dataset will be encoded again"
            )
    scan = member({"scan": None} | value, "scan", (str, type(None)), str(path))
    units = member(value, "units", list, str(path))
    return Plan(scan, [Unit.parse(unit, fingerprint, f"{path}: unit {i}") for i, unit in enumerate(units)])


def read_plan(root: Path, generation: int, fingerprint: str) -> list[Unit]:
    """The units of a pending plan; none where there is no plan. Raises what `load_plan` raises."""
    plan = load_plan(root, generation, fingerprint)
    return plan.units if plan else []


@dataclass(frozen=True)
class Committed:
    """One journal line: a unit that is done. `shard` is None where not one of its files became a row."""

    generation: int
    unit: str
    dtype: str
    shard: ShardRecord | None
    quarantined: tuple[Quarantined, ...]

    @classmethod
    def parse(cls, value: Any, what: str) -> Committed:
        shard = member(value, "shard", (dict, type(None)), what)
        stated = hexadecimal(value, "xxh3_128", 32, what)
        try:
            found = cls._digest(value)
        except ValueError as error:  # nested so deeply that it can be read, and not written
            raise ValueError(f"{what}: {error}") from None
        if stated != found:
            raise ValueError(f"{what}: expected contents with xxh3_128 {stated}, got {found}: the line is damaged")
        dtype = member(value, "dtype", str, what)
        if dtype not in PAYLOAD_DTYPES:
            raise ValueError(f"{what}: 'dtype': expected one of {sorted(PAYLOAD_DTYPES)}, got {dtype!r:.100}")
        return cls(
            natural(value, "generation", what),
            member(value, "unit", str, what),
            dtype,
            None if shard is None else ShardRecord.parse(shard, f"{what}: shard"),
            tuple(Quarantined.parse(one, what) for one in member(value, "quarantined", list, what)),
        )

    def to_dict(self) -> dict[str, object]:
        value = {
            "generation": self.generation,
            "unit": self.unit,
            "dtype": self.dtype,
            "shard": self.shard and self.shard.to_dict(),
            "quarantined": [one.to_dict() for one in self.quarantined],
        }
        return value | {"xxh3_128": self._digest(value)}

    @staticmethod
    def _digest(value: Mapping[str, object]) -> str:
        """Of canonical JSON of all other members."""
        others = {name: member for name, member in value.items() if name != "xxh3_128"}
        return xxhash.xxh3_128_hexdigest(canonical_json(others))


class Journal:
    """This writer's own file of committed units, one fsynced line each; made when the first unit is done.

    A file has lines of one generation only: once that is published, anybody may remove it.
    """

    def __init__(self, root: Path):
        self._directory = root / JOURNAL
        self._fd: int | None = None
        self._generation = 0

    def append(self, committed: Committed) -> None:
        line = canonical_json(committed.to_dict()) + b"\n"
        if committed.generation != self._generation:
            self.close()
            self._generation = committed.generation
        try:
            if self._fd is None:
                make_directory(self._directory)
                path = self._directory / f"{uuid.uuid4().hex}.jsonl"
                self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o666)
                fsync_directory(self._directory)
            write_all(self._fd, line)
            os.fsync(self._fd)
        except BaseException:
            self.close()  # the line may be torn: only a last line may, so the next one goes to a new file
            raise

    def close(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


class Journals:
    """The journals of all writers, each byte of them read once."""

    def __init__(self, root: Path, generation: int):
        self._root, self._generation = root, generation
        self._read: dict[str, tuple[int, int]] = {}  # file name -> bytes and number of whole lines that were read
        self.committed: dict[str, Committed] = {}  # see `refresh`

    def refresh(self) -> dict[str, Committed]:
        """unit id -> what was committed for `generation` and lay on the disk in full size when it was read here.

        A torn last line is what a kill leaves, and counts for nothing. Where two writers committed one unit with
        different bytes (mixed hardware), the smaller digest wins.

        Raises:
            ValueError: a damaged line that is not the last.
        """
        for path in sorted((self._root / JOURNAL).glob("*.jsonl")):
            begin, before = self._read.get(path.name, (0, 0))
            try:
                with open(path, "rb") as file:
                    file.seek(begin)
                    lines = file.read().split(b"\n")
            except FileNotFoundError:  # its generation was published in this very moment
                continue
            for number, line in enumerate(lines[:-1], 1):  # what follows the last newline is torn
                what = f"{path}: line {before + number} (delete the file to have its units encoded again)"
                try:
                    committed = Committed.parse(parse_json(line, what), what)
                    if committed.shard:
                        inside(self._root, committed.shard.path, what)
                    self._add(committed)
                except ValueError:
                    if number == len(lines) - 1:
                        break  # pages reach the disk in any order: a torn line can end in its newline
                    raise
                begin += len(line) + 1
                self._read[path.name] = begin, before + number
        return self.committed

    def _add(self, committed: Committed) -> None:
        other = self.committed.get(committed.unit)
        if committed.generation != self._generation or not _on_disk(self._root, committed.shard):
            return
        if other is None or _digest(committed) < _digest(other):
            self.committed[committed.unit] = committed


def read_journals(root: Path, generation: int) -> dict[str, Committed]:
    """What `Journals` reads, at once."""
    return Journals(root, generation).refresh()


def journal_generation(path: Path) -> int:
    """The latest generation that a journal has a whole line of; 0 where it has none."""
    latest = 0
    for line in path.read_bytes().split(b"\n")[:-1]:
        try:
            latest = max(latest, natural(parse_json(line, str(path)), "generation", str(path)))
        except ValueError:
            continue  # torn or damaged: `read_journals` decides which
    return latest


def _digest(committed: Committed) -> str:
    return committed.shard.xxh3_128 if committed.shard else ""


def _on_disk(root: Path, shard: ShardRecord | None) -> bool:
    try:
        return shard is None or (root / shard.path).stat().st_size == shard.bytes
    except OSError:
        return False
