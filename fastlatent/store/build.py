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
from dataclasses import dataclass
from pathlib import Path

from fastlatent.store.files import (
    canonical_json,
    fsync_directory,
    make_directory,
    member,
    natural,
    parse_json,
    read_bytes,
    write_all,
    write_atomic,
)
from fastlatent.store.records import FORMAT, PAYLOAD_DTYPES, Quarantined, ShardRecord, Unit

LOCK = ".lock"
PLAN = "plan"
JOURNAL = "journal"
LOCK_PATIENCE = 0.5  # seconds: `lock_holder` of a monitor holds the lock for microseconds


class Lock:
    """flock on DATASET/.lock, which names its holder. It ends with the process, however that ends."""

    def __init__(self, root: Path):
        """Raises ValueError: another process holds it, or the folder cannot be written to."""
        path = root / LOCK
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise ValueError(f"{root}: expected a folder that can be written to, got: {error.strerror}") from None
        deadline = time.monotonic() + LOCK_PATIENCE
        while True:
            try:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if error.errno not in (errno.EWOULDBLOCK, errno.EACCES) or time.monotonic() > deadline:
                    os.close(self._fd)
                    if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                        raise ValueError(f"{path}: expected a file system with flock, got: {error.strerror}") from None
                    raise ValueError(
                        f"{root} is being written by {_holder(path)}; wait until that has finished, or "
                        "stop it (the lock ends with its process) and run this again"
                    ) from None
                time.sleep(0.02)
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, canonical_json({"pid": os.getpid(), "host": socket.gethostname()}), 0)
        _HELD.add(self)

    def release(self) -> None:
        if self in _HELD:
            _HELD.discard(self)
            os.ftruncate(self._fd, 0)
            fcntl.flock(self._fd, fcntl.LOCK_UN)
            os.close(self._fd)


_HELD: weakref.WeakSet[Lock] = weakref.WeakSet()


def _drop_inherited() -> None:
    # A forked child shares the lock: without this, a worker that outlives a killed parent would keep it.
    for lock in list(_HELD):
        _HELD.discard(lock)
        os.close(lock._fd)


os.register_at_fork(after_in_child=_drop_inherited)


def lock_holder(root: Path) -> str | None:
    """ "pid N on HOST" of the process that is writing the dataset, or None."""
    path = root / LOCK
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return _holder(path)
    finally:
        os.close(fd)
    return None


def _holder(path: Path) -> str:
    try:
        value = json.loads(path.read_bytes())
        return f"pid {value['pid']} on {value['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"  # it has the lock and is about to write its name


def plan_path(root: Path, generation: int) -> Path:
    return root / PLAN / f"{generation:06d}.json"


def write_plan(root: Path, generation: int, fingerprint: str, units: list[Unit]) -> None:
    """Commit the plan: from here on these units, and no others, become generation `generation`."""
    value = {
        "format": FORMAT,
        "generation": generation,
        "fingerprint": fingerprint,
        "units": [unit.to_dict() for unit in units],
    }
    write_atomic(plan_path(root, generation), canonical_json(value))


def read_plan(root: Path, generation: int, fingerprint: str) -> list[Unit]:
    """The units of a pending plan, paths left empty; none where there is no plan.

    Raises:
        ValueError: damaged, or of another format or fingerprint.
    """
    path = plan_path(root, generation)
    if not path.exists():
        return []
    value = parse_json(read_bytes(path), str(path))
    wanted = {"format": FORMAT, "generation": generation, "fingerprint": fingerprint}
    for name, expected in wanted.items():
        if member(value, name, (str, int), str(path)) != expected:
            raise ValueError(
                f"{path}: {name!r}: expected {expected!r}, got {value[name]!r}; delete the file: units "
                "that are already encoded but not yet in the dataset will be encoded again"
            )
    units = member(value, "units", list, str(path))
    return [Unit.parse(unit, fingerprint, f"{path}: unit {i}") for i, unit in enumerate(units)]


@dataclass(frozen=True)
class Committed:
    """One journal line: a unit that is done. `shard` is None where not one of its files became a row."""

    generation: int
    unit: str
    dtype: str
    shard: ShardRecord | None
    quarantined: tuple[Quarantined, ...]

    @classmethod
    def parse(cls, value: object, what: str) -> Committed:
        shard = member(value, "shard", (dict, type(None)), what)
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
        return {
            "generation": self.generation,
            "unit": self.unit,
            "dtype": self.dtype,
            "shard": self.shard and self.shard.to_dict(),
            "quarantined": [one.to_dict() for one in self.quarantined],
        }


class Journal:
    """This writer's own file of committed units, one fsynced line each; made when the first unit is done."""

    def __init__(self, root: Path):
        self._directory = root / JOURNAL
        self._fd: int | None = None

    def append(self, committed: Committed) -> None:
        try:
            if self._fd is None:
                make_directory(self._directory)
                path = self._directory / f"{uuid.uuid4().hex}.jsonl"
                self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o666)
                fsync_directory(self._directory)
            write_all(self._fd, canonical_json(committed.to_dict()) + b"\n")
            os.fsync(self._fd)
        except BaseException:
            self.close()  # the line may be torn: only a last line may, so the next one goes to a new file
            raise

    def close(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


def read_journals(root: Path, generation: int) -> dict[str, Committed]:
    """unit id -> what was committed for `generation` and still lies on the disk in full size.

    A torn last line is what a kill leaves, and counts for nothing. Where two writers committed one unit with
    different bytes (mixed hardware), the smaller digest wins.

    Raises:
        ValueError: a damaged line that is not the last.
    """
    done: dict[str, Committed] = {}
    for path in sorted((root / JOURNAL).glob("*.jsonl")):
        lines = path.read_bytes().split(b"\n")
        for number, line in enumerate(lines[:-1], 1):  # what follows the last newline is torn
            what = f"{path}: line {number} (delete the file to have its units encoded again)"
            try:
                committed = Committed.parse(parse_json(line, what), what)
            except ValueError:
                if number == len(lines) - 1:
                    continue  # pages reach the disk in any order: a torn line can end in its newline
                raise
            other = done.get(committed.unit)
            if committed.generation != generation or not _on_disk(root, committed.shard):
                continue
            if other is None or _digest(committed) < _digest(other):
                done[committed.unit] = committed
    return done


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
