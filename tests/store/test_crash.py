"""Interrupt the commit protocol at every system call, with and without the loss of what was not yet synced."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from fastlatent.store.reader import Dataset, build_state

CALLS = ("open", "write", "fsync", "fdatasync", "replace", "mkdir", "unlink", "link")


class Crash(BaseException):
    """The process is dead: nothing catches it, and no system call works after it."""


class Disk:
    """Stands between the store and the system calls. Kills at the `kill_at`th call; a killed write is half done.

    `lose()` then takes away what POSIX does not promise to keep after a power cut: the bytes written since the file was
    last synced (they become zeros), and every new, renamed or removed name whose directory was not fsynced since.
    """

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch, kill_at: int | None):
        self.root, self.kill_at, self.calls = root, kill_at, 0
        self.synced: dict[int, int] = {}  # inode -> bytes that are safe, of files with bytes that are not
        self.undo: list[tuple[str, object]] = []  # (directory, function) of names that are not safe, oldest first
        self.real = {name: getattr(os, name) for name in CALLS}
        for name in CALLS:
            monkeypatch.setattr(os, name, self._counted(name))

    def _counted(self, name):
        def call(*args, **kwargs):
            watched = name not in ("open", "mkdir", "unlink") or str(args[0]).startswith(str(self.root))
            if not watched or (name == "open" and not args[1] & os.O_CREAT):
                return self.real[name](*args, **kwargs)
            if self.kill_at is not None and self.calls >= self.kill_at:
                if name == "write" and self.calls == self.kill_at:
                    self.write(args[0], args[1][: len(args[1]) // 2])
                self.calls += 1
                raise Crash
            self.calls += 1
            return getattr(self, name)(*args, **kwargs)

        return call

    def open(self, path, flags, mode=0o777):
        if not os.path.exists(path):
            self._names(path, lambda: self.real["unlink"](path) if os.path.exists(path) else None)
        return self.real["open"](path, flags, mode)

    def write(self, fd, data):
        stat = os.fstat(fd)
        self.synced.setdefault(stat.st_ino, stat.st_size)
        return self.real["write"](fd, data)

    def fdatasync(self, fd):
        self.synced.pop(os.fstat(fd).st_ino, None)  # no call to the system: it would take the test minutes

    def fsync(self, fd):
        path = os.readlink(f"/proc/self/fd/{fd}")
        self.undo = [one for one in self.undo if one[0] != path]
        self.fdatasync(fd)

    def replace(self, source, target):
        before = target.read_bytes() if target.exists() else None

        def back():
            if target.exists():  # else its whole folder was lost
                os.rename(target, source)
                if before is not None:
                    target.write_bytes(before)

        self.real["replace"](source, target)
        self._names(target, back)

    def mkdir(self, path, mode=0o777):
        self.real["mkdir"](path, mode)
        self._names(path, lambda: shutil.rmtree(path))

    def link(self, source, target):
        self.real["link"](source, target)
        self._names(target, lambda: self.real["unlink"](target) if os.path.exists(target) else None)

    def unlink(self, path, **kwargs):
        before = Path(path).read_bytes()
        self.real["unlink"](path, **kwargs)
        self._names(path, lambda: Path(path).write_bytes(before))

    def _names(self, path, back):
        self.undo.append((os.path.dirname(path), back))

    def lose(self, loses):
        for path in [path for path in self.root.rglob("*") if path.is_file() and path.name != ".lock"]:
            if (stat := path.stat()).st_ino in self.synced:
                os.truncate(path, self.synced[stat.st_ino])
                os.truncate(path, stat.st_size)
        for _, back in reversed(self.undo):
            if loses():
                back()


def build_on(disk_root, toy, source, kill_at=None, loses=None):
    """One encode, killed at a call, then perhaps a power cut that takes a name where `loses()` is true.

    Returns the number of calls it came to, and the keys whose commit came back.
    """
    encoded: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        disk = Disk(disk_root, patch, kill_at)
        with suppress(Crash):
            toy.build(disk_root / "d", source, encoded=encoded)
    if loses is not None:
        disk.lose(loses)
    return disk.calls, encoded


LOSSES = {"kill": None, "power cut": lambda: True, "power cut, reordered": lambda: random.random() < 0.5}


# Every call in one of the three ways here, in all three in the soak.
@pytest.mark.parametrize("step", [len(LOSSES), pytest.param(1, marks=pytest.mark.soak)])
@pytest.mark.parametrize("how", LOSSES)
@pytest.mark.parametrize("generation", [1, 2])
def test_killed_at_any_call_ends_with_the_same_bytes(toy, change, tmp_path, source, generation, how, step):
    random.seed(generation)
    start, whole = tmp_path / "start", tmp_path / "whole"
    start.mkdir()
    whole.mkdir()
    if generation == 2:
        toy.build(start / "d", source)
        shutil.copytree(start, whole, dirs_exist_ok=True)
        change(source)
    calls, _ = build_on(whole, toy, source)
    expected = toy.contents(whole / "d")
    first = toy.contents(start / "d")
    assert calls > 80  # 2 or 3 units, their leases, and the files of a generation, each of about 6 calls
    for kill_at in range(list(LOSSES).index(how) % step, calls, step):
        root = tmp_path / f"at-{kill_at}"
        shutil.copytree(start, root)
        _, encoded = build_on(root, toy, source, kill_at, LOSSES[how])
        after = toy.contents(root / "d")
        if "dataset.json" in after:  # a reader never sees anything between two generations
            opened = Dataset.open(root / "d")
            assert len(opened) == len([opened.open_shard(int(i)) for i in opened.shard]) == 5
            assert after.pop("dataset.json") in (first.get("dataset.json"), expected["dataset.json"])
        else:
            assert generation == 1
            with pytest.raises(ValueError, match=r"rerun the same encode|expected a dataset"):
                Dataset.open(root / "d")
        assert {name: data for name, data in first.items() if name != "dataset.json"}.items() <= after.items()
        _, again = build_on(root, toy, source)
        assert not set(encoded) & set(again), "a unit whose commit came back was lost"
        assert toy.contents(root / "d") == expected, f"killed at call {kill_at} of {calls}"
        shutil.rmtree(root)


@pytest.mark.parametrize("step", [6, pytest.param(1, marks=pytest.mark.soak)])
def test_killed_at_any_call_beside_a_writer_that_goes_on(toy, tmp_path, source, step):
    whole = tmp_path / "whole"
    whole.mkdir()
    calls, _ = build_on(whole, toy, source)
    expected = toy.contents(whole / "d")
    entries, classes = toy.scan(source)
    for kill_at in range(0, calls, step):
        root = tmp_path / f"at-{kill_at}"
        root.mkdir()
        with toy.DatasetWriter.open(root / "d", toy.PROVENANCE, classes, unit_rows=2, schema=toy.SCHEMA) as writer:
            writer.plan(entries)
            first = next(writer.claim())  # the other waits for it, and is killed while it does; or takes the rest
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(time, "sleep", lambda seconds: (_ for _ in ()).throw(Crash))
                build_on(root, toy, source, kill_at)
            writer.commit(first, *toy.encode(first))
            for unit in writer.claim():
                writer.commit(unit, *toy.encode(unit))
            assert writer.finish().generation == 1
        assert toy.contents(root / "d") == expected, f"killed at call {kill_at} of {calls}"
        shutil.rmtree(root)


def test_what_finish_returned_survives_a_power_cut(toy, tmp_path, source):
    build_on(tmp_path, toy, source, None, lambda: True)
    assert len(Dataset.open(tmp_path / "d")) == 5
    assert build_state(tmp_path / "d") is None  # the plan and the journal came back, and mean nothing
    kept = toy.contents(tmp_path / "d")
    assert any(name.startswith("journal/") for name in kept)
    assert build_on(tmp_path, toy, source)[1] == []
    assert toy.contents(tmp_path / "d") == {
        name: data for name, data in kept.items() if name.split("/")[0] not in ("plan", "journal")
    }


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.soak)])
def test_killed_again_and_again(toy, tmp_path, source, seed):
    # Each restart meets what all those before it left behind.
    draw = random.Random(seed)
    whole = tmp_path / "whole"
    calls, _ = build_on(whole, toy, source)
    expected = toy.contents(whole / "d")
    for i in range(20 if seed == 0 else 1000):
        root = tmp_path / f"run-{i}"
        root.mkdir()
        for _ in range(6):
            losses = draw.choice([None, lambda: True, lambda: draw.random() < 0.5])
            build_on(root, toy, source, draw.randrange(calls), losses)
        build_on(root, toy, source)
        assert toy.contents(root / "d") == expected
        shutil.rmtree(root)


@pytest.mark.parametrize("kills", [4, pytest.param(1000, marks=pytest.mark.soak)])
def test_a_real_sigkill(toy, tmp_path, kills):
    source = toy.make_source(tmp_path / "source", [f"{i % 3}/{i}.jpg" for i in range(20)])
    toy.build(tmp_path / "whole", source)
    expected = toy.contents(tmp_path / "whole")
    draw = random.Random(0)
    while kills > 0:
        path = tmp_path / f"killed-{kills}"
        while True:
            command = [sys.executable, toy.__spec__.origin, str(path), str(source), "0.01"]
            with subprocess.Popen(command) as process:
                while not (path / ".lock").exists() and process.poll() is None:
                    time.sleep(0.001)
                time.sleep(draw.uniform(0, 0.25))  # the ten units take about as long
                process.send_signal(signal.SIGKILL)
            if process.returncode == 0:
                break  # it was faster
            kills -= 1
            if kills <= 0:
                toy.build(path, source)
                break
        assert toy.contents(path) == expected
