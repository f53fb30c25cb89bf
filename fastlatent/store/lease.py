"""Who is at work on a dataset: a file that each writer keeps moving, and hard links to it, one for each piece of work.

Leases save work; correctness never needs them. What two writers both do, they do with the same bytes.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import threading
import time
import uuid
import weakref
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastlatent.store.files import (
    TEMPORARY,
    canonical_json,
    fsync_directory,
    make_directory,
    member,
    natural,
    parse_json,
    write_all,
)

LEASE = "lease"
WRITER = "writer-"  # begins the name of a writer's own file; every other file there is a link to one of them
BEAT_SECONDS = 10.0
EXPIRY_SECONDS = 120.0  # twelve missed beats, of the observer's own clock: clocks of hosts differ, and so do mtimes
POLL_SECONDS = 0.1


@dataclass(frozen=True)
class Sighting:
    """A lease as it was last looked at.

    Attributes:
        inode: of the writer's file.
        name: "pid N on HOST".
        generation: of the plan that its writer works on, 0 before it has joined one.
        alive: it has not expired.
        certain: it was seen to be at work, not only not yet seen to be dead.
    """

    inode: int
    name: str
    generation: int
    alive: bool
    certain: bool


class Leases:
    """This writer's file, DATASET/lease/writer-UUID.json, its leases (hard links to it), and its view of the others'.

    A lease has expired when its counter did not move for EXPIRY_SECONDS of this process's own clock, or at once where
    its writer was on this host and its flock is free: that ends with its process.
    """

    def __init__(self, root: Path):
        """Raises OSError: no hard links there, no space ..."""
        self._directory = root / LEASE
        self._path = self._directory / f"{WRITER}{uuid.uuid4().hex}.json"
        self._state: dict[str, Any] = {"host": socket.gethostname(), "pid": os.getpid(), "counter": 0, "generation": 0}
        self._seen: dict[int, tuple[bytes, float, bool]] = {}  # inode -> contents, since when, whether they moved
        self._guard = threading.Lock()  # of _fd and _state, between the caller and the heartbeat
        self._fd = -1
        self.mine: set[str] = set()
        self._appear()
        self._stop = threading.Event()
        threading.Thread(target=self._beat, args=(weakref.ref(self), self._stop), daemon=True).start()

    def take(self, name: str) -> bool:
        """Lease `name`, also from a writer whose lease has expired. False: another has it."""
        path = self._directory / f"{name}.json"
        for _ in range(2):
            try:
                self._link(path)
                self.mine.add(name)
                return True
            except FileExistsError:
                if not self._steal(path):
                    return False
        return False

    def release(self, name: str) -> None:
        """Give a lease back; nothing where it was stolen."""
        self.mine.discard(name)
        path = self._directory / f"{name}.json"
        with suppress(FileNotFoundError):
            if path.stat().st_ino == os.fstat(self._fd).st_ino:
                os.unlink(path)

    def join(self, generation: int) -> None:
        """Tell the others that this writer works on the plan of `generation`; 0: on none."""
        if self._state["generation"] != generation:
            with self._guard:
                self._state["generation"] = generation
                self._write()

    def others(self, generation: int) -> list[Sighting]:
        """The other writers that work on the plan of `generation` and have not expired."""
        own = os.fstat(self._fd).st_ino
        sightings = [self._look(path) for path in sorted(self._directory.glob(f"{WRITER}*.json"))]
        return [one for one in sightings if one and one.alive and one.inode != own and one.generation == generation]

    def sweep(self) -> None:
        """Remove the leases that have expired."""
        for path in self._directory.glob("*.json"):
            sighting = self._look(path)
            if sighting and not sighting.alive:
                with suppress(FileNotFoundError):
                    os.unlink(path)

    def close(self) -> None:
        """Give everything back."""
        self._stop.set()
        try:
            for name in sorted(self.mine):
                self.release(name)
            with suppress(FileNotFoundError):
                os.unlink(self._path)
        finally:
            with self._guard:
                _HELD.discard(self)
                os.close(self._fd)
                self._fd = -1

    def _appear(self) -> None:
        """Make this writer's file. Its name appears when it is complete and its flock is held."""
        make_directory(self._directory)
        temporary = self._directory / f"{TEMPORARY}writer-{uuid.uuid4().hex}"
        fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            write_all(fd, canonical_json(self._state))
            os.replace(temporary, self._path)
        except BaseException:
            os.close(fd)
            with suppress(OSError):
                os.unlink(temporary)
            raise
        with self._guard:
            if self._fd >= 0:
                os.close(self._fd)
            self._fd = fd
            _HELD.add(self)

    def _link(self, path: Path) -> None:
        try:
            os.link(self._path, path)
        except FileNotFoundError:  # somebody took our file away, and perhaps the folder
            self._appear()
            os.link(self._path, path)

    def _steal(self, path: Path) -> bool:
        """Whether `path` is free now."""
        sighting = self._look(path)
        if sighting is None:
            return True
        if sighting.alive:
            return False
        aside = self._directory / f"{TEMPORARY}lease-{uuid.uuid4().hex}"
        try:
            os.replace(path, aside)
        except FileNotFoundError:
            return True
        expired = aside.stat().st_ino == sighting.inode
        if not expired:  # another stole it before us, and this is its lease
            with suppress(FileExistsError):
                os.link(aside, path)
        os.unlink(aside)
        return expired

    def _look(self, path: Path) -> Sighting | None:
        """None where there is no such lease."""
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            data, inode, held = os.read(fd, 4096), os.fstat(fd).st_ino, _held(fd)
        finally:
            os.close(fd)
        name, host, generation = _parse(data)
        before = self._seen.get(inode)
        now = time.monotonic()
        if before is None or before[0] != data:
            self._seen[inode] = before = (data, now, before is not None)
        dead = not held and host in (None, self._state["host"])
        alive = not dead and now - before[1] < EXPIRY_SECONDS
        return Sighting(inode, name, generation, alive, alive and (held or before[2]))

    @staticmethod
    def _beat(reference: weakref.ref[Leases], stop: threading.Event) -> None:
        while not stop.wait(BEAT_SECONDS):
            leases = reference()
            if leases is None:
                return
            with leases._guard, suppress(OSError):  # a full disk: the lease may expire, which costs work only
                leases._write()
            del leases

    def _write(self) -> None:
        if self._fd < 0:
            return
        self._state["counter"] += 1
        data = canonical_json(self._state)
        os.pwrite(self._fd, data, 0)
        os.ftruncate(self._fd, len(data))
        os.fsync(self._fd)  # a network file system shows it to others only now


_HELD: weakref.WeakSet[Leases] = weakref.WeakSet()


def _drop_inherited() -> None:
    # A forked child shares the flock: without this, a worker that outlives a killed parent would keep its leases.
    for leases in list(_HELD):
        _HELD.discard(leases)
        os.close(leases._fd)


os.register_at_fork(after_in_child=_drop_inherited)


def writers(root: Path) -> list[str]:
    """ "pid N on HOST" of every writer that holds its flock."""
    names = []
    for path in sorted((root / LEASE).glob(f"{WRITER}*.json")):
        with suppress(FileNotFoundError):
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                if _held(fd):
                    names.append(_parse(os.read(fd, 4096))[0])
            finally:
                os.close(fd)
    return names


def write_exclusive(path: Path, data: bytes) -> bool:
    """`store.files.write_atomic` that never overwrites. False: there is a file at `path`, which stays.

    Raises:
        ValueError: a file system without hard links.
    """
    make_directory(path.parent)
    temporary = path.parent / f"{TEMPORARY}{path.name[:64]}-{uuid.uuid4().hex}"
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            write_all(fd, data)
            os.fdatasync(fd)
        finally:
            os.close(fd)
        os.link(temporary, path)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS):
            raise ValueError(f"{path}: expected a file system with hard links, got: {error.strerror}") from None
        raise
    finally:
        with suppress(OSError):
            os.unlink(temporary)
    fsync_directory(path.parent)
    return True


@contextlib.contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Hold flock on the file `path`, which is made where it is missing; wait for it as long as it takes."""
    make_directory(path.parent)
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _held(fd: int) -> bool:
    """Whether another open file holds the flock."""
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    fcntl.flock(fd, fcntl.LOCK_UN)
    return False


def _parse(data: bytes) -> tuple[str, str | None, int]:
    """Name, host and generation; no host where a power cut took the contents."""
    try:
        value = parse_json(data, LEASE)
        host = member(value, "host", str, LEASE)
        return f"pid {natural(value, 'pid', LEASE)} on {host}", host, natural(value, "generation", LEASE)
    except ValueError:
        return "another process", None, 0
