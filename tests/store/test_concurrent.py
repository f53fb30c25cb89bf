"""Any number of processes and hosts fill one dataset together, and end with the bytes of one."""

import errno
import os
import random
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import replace

import pytest

from fastlatent.store import admission, lease
from fastlatent.store import scan as scan_module
from fastlatent.store import writer as writer_module
from fastlatent.store.build import read_journals
from fastlatent.store.reader import Dataset


def open_writer(toy, path, source, **arguments):
    arguments = {"unit_rows": 2, "schema": toy.SCHEMA, "provenance": toy.PROVENANCE, **arguments}
    return toy.DatasetWriter.open(path, arguments.pop("provenance"), toy.scan(source)[1], **arguments)


def work(toy, writer):
    """Do what is left; the keys that were encoded here."""
    encoded = []
    for unit in writer.claim():
        writer.commit(unit, *toy.encode(unit))
        encoded += [item.key for item in unit.items]
    return encoded


def start(toy, path, source, pause=0.01, expiry=30.0, host="here"):
    command = [sys.executable, toy.__spec__.origin, *map(str, (path, source, pause, expiry, host))]
    return subprocess.Popen(command, stderr=subprocess.PIPE)


def many(toy, tmp_path, count=20):
    return toy.make_source(tmp_path / "many", [f"{i % 3}/{i}.jpg" for i in range(count)])


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(lease, "EXPIRY_SECONDS", 0.3)
    monkeypatch.setattr(lease, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(lease, "POLL_SECONDS", 0.01)


def move_abroad(writer):
    """As a process on a host whose flock is not seen here: only its counter tells whether it is alive."""
    leases = writer._leases
    with leases._guard:
        leases._state["host"] = "elsewhere"
        leases._write()
    lease.fcntl.flock(leases._fd, lease.fcntl.LOCK_UN)


def stop_beating(writer):
    """As a process that hangs: its lease expires, and it knows nothing of that."""
    writer._leases._stop.set()
    move_abroad(writer)


@pytest.mark.parametrize("hosts", [["a", "a"], ["a", "b", "c"]])
def test_several_processes_end_with_the_bytes_of_one(toy, tmp_path, hosts):
    source = many(toy, tmp_path)
    toy.build(tmp_path / "whole", source)
    processes = [start(toy, tmp_path / "d", source, host=host) for host in hosts]
    for process in processes:
        assert process.communicate()[1] == b"" and process.returncode == 0
    assert toy.contents(tmp_path / "d") == toy.contents(tmp_path / "whole")


@pytest.mark.parametrize("hosts", [["a", "a"], ["a", "b"]])
def test_one_of_two_is_killed_and_the_other_finishes(toy, tmp_path, hosts):
    source, draw = many(toy, tmp_path), random.Random(hosts[1])
    toy.build(tmp_path / "whole", source)
    expected = toy.contents(tmp_path / "whole")
    one, two = (start(toy, tmp_path / "d", source, pause=0.04, expiry=1.5, host=host) for host in hosts)
    while not (tmp_path / "d/plan/000001.json").exists():
        time.sleep(0.001)
    time.sleep(draw.uniform(0, 0.3))
    one.send_signal(signal.SIGKILL)
    one.communicate()
    assert two.communicate()[1] == b"" and two.returncode == 0
    found = toy.contents(tmp_path / "d")
    # What the dead one of another host left of its presence goes when it has been seen not to move.
    assert {name: data for name, data in found.items() if not name.startswith("lease/writer-")} == expected
    assert hosts[0] != hosts[1] or found == expected
    assert toy.build(tmp_path / "d", source)[1] == []


def rounds_of_kills(toy, tmp_path, kills, seed=0):
    """Kill one of two writers, start another, until they are through; then another dataset. What was done."""
    source, draw, begin = many(toy, tmp_path, 40), random.Random(seed), time.monotonic()
    toy.build(tmp_path / "whole", source)
    expected = toy.contents(tmp_path / "whole")
    done, datasets = 0, 0
    while done < kills:
        path = tmp_path / f"d-{datasets}"
        pair = [start(toy, path, source) for _ in range(2)]
        while done < kills and not (path / "dataset.json").exists():
            time.sleep(draw.uniform(0.05, 0.4))
            victim = pair.pop(draw.randrange(2))
            victim.send_signal(signal.SIGKILL)
            done += victim.wait() == -signal.SIGKILL
            victim.stderr.close()
            pair.append(start(toy, path, source))
        for process in pair:
            assert process.communicate()[1] == b"" and process.returncode == 0
        toy.build(path, source)
        assert toy.contents(path) == expected
        datasets += 1
    return {"kills": done, "datasets": datasets, "units": 20, "seconds": round(time.monotonic() - begin, 1)}


@pytest.mark.parametrize("kills", [2, pytest.param(1000, marks=pytest.mark.soak)])
def test_kills_with_two_writers_at_work(toy, tmp_path, kills):
    row = rounds_of_kills(toy, tmp_path, kills)
    print(row)
    assert row["kills"] == kills


def test_a_unit_is_claimed_by_one(toy, tmp_path, source):
    entries, _ = toy.scan(source)
    with open_writer(toy, tmp_path / "d", source) as one, open_writer(toy, tmp_path / "d", source) as two:
        assert one.plan(entries) == two.plan(entries)
        first, second, third = next(one.claim()), next(two.claim()), one.claim_now()
        assert len({first.id, second.id, third.id}) == 3 and one.claim_now() is None and two.claim_now() is None
        assert next(one.claim()) in (first, third)  # not waiting for itself: it is handed out again
        told = []
        for writer, unit in ((one, first), (two, second), (one, third)):
            writer.commit(unit, *toy.encode(unit))
        assert list(two.claim(told.append)) == [] and sum(told) == len(first.items) + len(third.items)
        assert list(one.claim()) == []
        info = one.finish()
        assert two.finish() == info and info.rows == 5
    toy.build(tmp_path / "whole", source)
    assert toy.contents(tmp_path / "d") == toy.contents(tmp_path / "whole")


def test_leases_are_given_back_on_the_way_out(toy, tmp_path, source):
    entries, _ = toy.scan(source)
    with suppress(KeyboardInterrupt), open_writer(toy, tmp_path / "d", source) as writer:
        writer.plan(entries)
        next(writer.claim())
        raise KeyboardInterrupt
    assert not list((tmp_path / "d/lease").glob("*"))
    assert not [name for name in toy.contents(tmp_path / "d") if ".tmp-" in name]


def test_who_is_late_finds_everything_done(toy, tmp_path, source):
    entries, _ = toy.scan(source)
    with open_writer(toy, tmp_path / "d", source) as late:
        units = late.plan(entries)
        unit = next(late.claim())
        stop_beating(late)
        with open_writer(toy, tmp_path / "d", source) as other:
            other.plan(entries)
            for one in units:  # without claims, as a plain loop does
                other.commit(one, *toy.encode(one))
            info = other.finish()
        before = toy.contents(tmp_path / "d")
        late.commit(unit, *toy.encode(unit))
        assert list(late.claim()) == [] and late.finish() == info
        assert late.plan(entries) == []
        after = toy.contents(tmp_path / "d")
        assert {n: d for n, d in after.items() if n[:6] != "lease/"} == {
            n: d for n, d in before.items() if n[:6] != "lease/"
        }
        assert late.finish() == info


@pytest.mark.parametrize("other_bytes", [False, True])
def test_the_owner_of_a_stolen_lease_comes_back(toy, tmp_path, source, quick, monkeypatch, other_bytes):
    entries, _ = toy.scan(source)
    with open_writer(toy, tmp_path / "d", source) as one, open_writer(toy, tmp_path / "d", source) as two:
        one.plan(entries)
        two.plan(entries)
        unit = next(one.claim())
        stop_beating(one)
        begin = time.monotonic()
        while (found := two.claim_now()) != unit:
            if found is not None:
                two.commit(found, *toy.encode(found))
        assert time.monotonic() - begin > 0.2, "stolen from one that could be alive"
        rows, bad = toy.encode(unit)
        two.commit(unit, rows, bad)
        # It looks before the other's line is there, and writes a line of its own.
        monkeypatch.setattr(one, "_look", lambda on_others=None: None)
        one.commit(unit, replace(rows, payload=rows.payload + other_bytes), bad)
        monkeypatch.undo()
        both = [path for path in (tmp_path / "d").rglob(f"{unit.id}-*.safetensors")]
        assert len(both) == 1 + other_bytes
        assert read_journals(tmp_path / "d", 1)[unit.id].shard.path == min(
            path.relative_to(tmp_path / "d").as_posix() for path in both
        )
        work(toy, two)
        assert one.finish() == two.finish()
    if not other_bytes:
        toy.build(tmp_path / "whole", source)
        found = {n: d for n, d in toy.contents(tmp_path / "d").items() if n[:6] != "lease/"}
        assert found == toy.contents(tmp_path / "whole")
    dataset = Dataset.open(tmp_path / "d")
    for i in range(len(dataset.shards)):
        dataset.open_shard(i)


def test_a_live_lease_is_not_stolen(toy, tmp_path, source, quick):
    entries, _ = toy.scan(source)
    with open_writer(toy, tmp_path / "d", source) as one, open_writer(toy, tmp_path / "d", source) as two:
        one.plan(entries)
        two.plan(entries)
        unit = next(one.claim())
        move_abroad(one)
        for _ in range(2):
            other = two.claim_now()
            two.commit(other, *toy.encode(other))
        deadline = time.monotonic() + 3 * lease.EXPIRY_SECONDS
        while time.monotonic() < deadline:
            assert two.claim_now() is None
            time.sleep(0.02)
        one.commit(unit, *toy.encode(unit))
        assert list(two.claim()) == []


def test_of_many_thieves_one_gets_the_lease(tmp_path, quick):
    owner = lease.Leases(tmp_path)
    assert owner.take("unit")
    thieves = [lease.Leases(tmp_path) for _ in range(6)]
    os.close(owner._fd)  # as its process ends
    lease._HELD.discard(owner)
    owner._fd = -1
    with ThreadPoolExecutor(len(thieves)) as pool:
        got = list(pool.map(lambda one: one.take("unit"), thieves))
    assert sum(got) == 1
    for thief in thieves:
        thief.close()
    assert [path.name for path in (tmp_path / "lease").iterdir()] == [owner._path.name]


def test_another_state_of_the_source_is_refused_while_others_work(toy, tmp_path, source):
    entries, _ = toy.scan(source)
    with open_writer(toy, tmp_path / "d", source) as one:
        one.plan(entries)
        unit = next(one.claim())
        toy.write_file(source, "bee/2.jpg", b"edited", 1)
        with open_writer(toy, tmp_path / "d", source) as two:
            with pytest.raises(
                ValueError,
                match=r"the source changed since the others began \(pid .*\): 1 files differ, 'bee/2.jpg' .*; wait",
            ):
                two.plan(toy.scan(source)[0])
            with pytest.raises(ValueError, match=r"labels or dates .*; wait for them, or stop them"):
                two.plan([replace(entry, label=0) for entry in entries])
            with pytest.raises(ValueError, match="plan"):
                two.finish()
        one.commit(unit, *toy.encode(unit))
    info, encoded = toy.build(tmp_path / "d", source)  # alone: what was done stays
    assert info.rows == 5 and not {item.key for item in unit.items} & set(encoded)


def test_several_that_take_up_a_plan_of_a_source_that_grew(toy, tmp_path):
    # None of them is alone, but none works on the old plan: whoever is first replaces it, and the others join.
    source = many(toy, tmp_path, 12)
    entries, _ = toy.scan(source)
    with open_writer(toy, tmp_path / "d", source) as writer:
        writer.plan(entries)
        unit = next(writer.claim())
        writer.commit(unit, *toy.encode(unit))
    toy.write_file(source, "zoo/1.jpg", b"new", 1)
    with ExitStack() as stack:
        writers = [stack.enter_context(open_writer(toy, tmp_path / "d", source)) for _ in range(3)]
        plans = [writer.plan(toy.scan(source)[0]) for writer in writers]
        assert plans[0] == plans[1] == plans[2] and "zoo/1.jpg" in [i.key for unit in plans[0] for i in unit.items]
        for unit in plans[0]:
            writers[1].commit(unit, *toy.encode(unit))
        assert [writer.finish().rows for writer in writers] == [13] * 3


def test_files_are_hashed_by_one(toy, tmp_path, source, monkeypatch):
    read, real = [], scan_module.hash_file

    def slow(entry):
        read.append(entry.key)
        time.sleep(0.05)
        return real(entry)

    monkeypatch.setattr(scan_module, "hash_file", slow)
    entries, _ = toy.scan(source)
    with ExitStack() as stack:
        writers = [stack.enter_context(open_writer(toy, tmp_path / "d", source)) for _ in range(3)]
        plans = []
        threads = [threading.Thread(target=lambda one=one: plans.append(one.plan(entries))) for one in writers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(read) == 5 and plans[0] == plans[1] == plans[2] and len(plans[0]) == 3


def test_both_hash_and_one_plan_wins(toy, tmp_path, source, monkeypatch):
    # The lease of who plans only saves work: here it keeps nobody out.
    monkeypatch.setattr(lease.Leases, "take", lambda self, name: self.mine.add(name) or True)
    barrier, real, begun = threading.Barrier(2), writer_module.scan, set()

    def together(*args):
        if threading.get_ident() not in begun:
            begun.add(threading.get_ident())
            barrier.wait(10)
        return real(*args)

    monkeypatch.setattr(writer_module, "scan", together)
    entries, _ = toy.scan(source)
    with open_writer(toy, tmp_path / "d", source) as one, open_writer(toy, tmp_path / "d", source, unit_rows=3) as two:
        plans = []
        threads = [threading.Thread(target=lambda one=one: plans.append(one.plan(entries))) for one in (one, two)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(begun) == 2 and plans[0] == plans[1] and len(plans[0]) in (2, 3)


def test_a_first_writer_that_was_faster_decides_the_provenance(toy, tmp_path, source, monkeypatch):
    real = admission.write_exclusive

    def race(path, data):
        path.write_bytes(data.replace(b'"size":256', b'"size":512'))
        return real(path, data)

    monkeypatch.setattr(admission, "write_exclusive", race)
    with pytest.raises(ValueError, match=r"other settings:\n  size: 512 \(dataset\) != 256 \(now\)"):
        open_writer(toy, tmp_path / "d", source)
    assert b'"size":512' in (tmp_path / "d/provenance.json").read_bytes()


def test_a_file_system_without_hard_links_is_refused(toy, tmp_path, source, monkeypatch):
    def link(source, target):
        raise OSError(errno.EPERM, "Operation not permitted", str(target))

    monkeypatch.setattr(os, "link", link)
    with pytest.raises(ValueError, match=r"provenance.json: expected a file system with hard links"):
        open_writer(toy, tmp_path / "d", source)
    assert not [name for name in toy.contents(tmp_path / "d") if ".tmp-" in name]


def test_every_generation_keeps_its_root(toy, change, tmp_path, source):
    toy.build(tmp_path / "d", source)
    first = (tmp_path / "d/dataset.json").read_bytes()
    (tmp_path / "d/generation/000001.json").unlink()  # killed in between: the next run makes it
    toy.build(tmp_path / "d", source)
    assert (tmp_path / "d/generation/000001.json").read_bytes() == first
    change(source)
    toy.build(tmp_path / "d", source)
    assert (tmp_path / "d/generation/000001.json").read_bytes() == first
    assert (tmp_path / "d/generation/000002.json").read_bytes() == (tmp_path / "d/dataset.json").read_bytes()


def test_a_lease_that_a_power_cut_emptied_is_expired(toy, tmp_path, source):
    entries, _ = toy.scan(source)
    with open_writer(toy, tmp_path / "d", source) as writer:
        (first, *_) = writer.plan(entries)
        (tmp_path / "d/lease" / f"{first.id}.json").write_bytes(b"\0" * 80)
        assert writer.claim_now() == first


def test_unfinished_files_stay_while_others_work(toy, tmp_path, source):
    with open_writer(toy, tmp_path / "d", source):
        theirs = tmp_path / "d" / f".tmp-unit-{'0a' * 16}"
        theirs.write_bytes(b"about to be renamed")
        toy.build(tmp_path / "d", source)
        assert theirs.exists()
    assert not theirs.exists()
