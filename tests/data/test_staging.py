"""Staging: what is copied is whole and right, whatever is interrupted, damaged or done twice at once."""

import multiprocessing
import os
import sys
import types
import uuid
from pathlib import Path

import numpy as np
import pytest
import torch

from fastlatent.data import staging
from fastlatent.data.latents import LatentDataset
from fastlatent.data.staging import stage
from fastlatent.store.files import TEMPORARY

fsspec = pytest.importorskip("fsspec")


def upload(path, url):
    """Only what dataset.json names, as somebody would who knows the format."""
    filesystem, base = fsspec.core.url_to_fs(url)
    for folder in ("shards", "manifest", "index", "statistics"):
        for file in (path / folder).rglob("*"):
            if file.is_file():
                target = f"{base}/{file.relative_to(path).as_posix()}"
                filesystem.makedirs(target.rpartition("/")[0], exist_ok=True)
                filesystem.pipe_file(target, file.read_bytes())
    for name in ("provenance.json", "dataset.json"):
        filesystem.pipe_file(f"{base}/{name}", (path / name).read_bytes())
    return filesystem, base


@pytest.fixture
def remote(path):
    return f"memory://{uuid.uuid4().hex}/train"


def same_rows(local, path):
    one, other = (LatentDataset(p).gather(np.arange(23), check_rows=True) for p in (local, path))
    assert all(torch.equal(one[name], other[name]) for name in other)


def leftovers(local):
    return [file for file in local.rglob("*") if file.name.startswith(TEMPORARY)]


@pytest.mark.parametrize("kind", ["memory", "file", "path"])
def test_a_whole_dataset(path, tmp_path, remote, kind):
    if kind == "memory":
        upload(path, remote)
    source = {"memory": remote, "file": path.as_uri(), "path": str(path)}[kind]
    local = stage(source, tmp_path / "cache")
    same_rows(local, path)
    assert local.parent == tmp_path / "cache"
    assert local.name.startswith(("train-", "d-"))
    assert not leftovers(local)
    stamps = {file: file.stat().st_mtime_ns for file in (local / "shards").rglob("*")}
    assert stage(source, tmp_path / "cache") == local
    assert {file: file.stat().st_mtime_ns for file in (local / "shards").rglob("*")} == stamps  # nothing twice


def test_two_sources_of_one_name(path, tmp_path, make):
    other = make(tmp_path / "other", 4)
    assert stage(path, tmp_path) != stage(other, tmp_path)


def test_only_some_shards(path, tmp_path):
    local = stage(path, tmp_path, shards=[3, 1])
    dataset = LatentDataset(local)
    there = [(local / record.path).exists() for record in dataset.store.shards]
    assert there == [False, True, False, True, False]
    dataset.store.open_shard(3)
    with pytest.raises(ValueError, match="expected a readable shard"):
        dataset[0]
    with pytest.raises(ValueError, match=r"shards: expected numbers from 0 to 4, got \[1, 5\]"):
        stage(path, tmp_path, shards=[1, 5])
    stage(path, tmp_path, shards=[])
    same_rows(stage(path, tmp_path), path)


class Failing:
    """A file that breaks off, as a connection does."""

    def __init__(self, file, count):
        self.file, self.count = file, count

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()

    def read(self, size):
        self.count -= 1
        if self.count < 0:
            raise ConnectionResetError("connection reset by peer")
        return self.file.read(100)


def test_an_interrupted_stage_goes_on(path, tmp_path, remote, monkeypatch):
    filesystem, _ = upload(path, remote)
    original = type(filesystem).open
    opened = []

    def flaky(self, name, *args, **options):
        opened.append(name)
        file = original(self, name, *args, **options)
        return Failing(file, 5) if "/shards/" in name and sum("/shards/" in one for one in opened) > 2 else file

    monkeypatch.setattr(type(filesystem), "open", flaky)
    with pytest.raises(ConnectionResetError):
        stage(remote, tmp_path)
    (local,) = tmp_path.iterdir()
    assert not (local / "dataset.json").exists()  # it is not a dataset yet
    done = len(list(local.rglob("*.safetensors"))) - 1  # but the index
    assert 1 <= done < 5
    assert not leftovers(local)
    opened.clear()
    monkeypatch.setattr(type(filesystem), "open", lambda *args, **kw: opened.append(args[1]) or original(*args, **kw))
    same_rows(stage(remote, tmp_path), path)
    assert sum("/shards/" in name for name in opened) == 5 - done


def damage(data: bytes, how: str) -> bytes:
    flipped = bytearray(data)
    flipped[len(data) // 2] ^= 1
    return {"flipped": bytes(flipped), "truncated": data[:-1], "extended": data + b"\0", "empty": b""}[how]


@pytest.mark.parametrize("how", ["flipped", "truncated", "extended", "empty"])
@pytest.mark.parametrize("what", ["shards", "index", "manifest"])
def test_damage_on_the_way_is_refused(path, tmp_path, remote, what, how):
    filesystem, base = upload(path, remote)
    file = next(name for name in filesystem.find(f"{base}/{what}"))
    whole = filesystem.cat_file(file)
    filesystem.pipe_file(file, damage(whole, how))
    relative = file[len(base) + 1 :]
    with pytest.raises(ValueError, match=rf"{remote}/{relative}: expected {len(whole)} bytes with xxh3_128 .*repair"):
        stage(remote, tmp_path)
    (local,) = tmp_path.iterdir()
    assert not (local / relative).exists()
    assert not (local / "dataset.json").exists()
    assert not leftovers(local)
    filesystem.pipe_file(file, whole)
    same_rows(stage(remote, tmp_path), path)


def test_a_path_that_leads_out(path, tmp_path, remote):
    from fastlatent.store.files import canonical_json, parse_json
    from fastlatent.store.reader import root_digest

    filesystem, base = upload(path, remote)
    root = parse_json((path / "dataset.json").read_bytes(), "")
    root["statistics"]["path"] = "../outside.json"
    root["xxh3_128"] = root_digest(root)
    filesystem.pipe_file(f"{base}/dataset.json", canonical_json(root))
    with pytest.raises(ValueError, match="expected a path inside"):
        stage(remote, tmp_path / "cache")
    assert not (tmp_path / "cache" / "outside.json").exists()


def test_what_is_no_dataset(tmp_path, remote):
    with pytest.raises(ValueError, match="expected a dataset with dataset.json"):
        stage(remote, tmp_path / "cache")
    with pytest.raises(ValueError, match="expected a dataset with dataset.json"):
        stage(tmp_path / "nothing", tmp_path / "cache")


def test_too_little_room(path, tmp_path, monkeypatch):
    needed = sum(record.bytes for record in LatentDataset(path).store.shards)
    monkeypatch.setattr(staging.shutil, "disk_usage", lambda folder: types.SimpleNamespace(free=needed - 1))
    with pytest.raises(ValueError, match=f"expected room for {needed:,} bytes of 5 shards, got {needed - 1:,}"):
        stage(path, tmp_path)
    monkeypatch.setattr(staging.shutil, "disk_usage", lambda folder: types.SimpleNamespace(free=needed))
    same_rows(stage(path, tmp_path), path)


def test_without_fsspec(path, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "fsspec.core", None)
    with pytest.raises(ValueError, match=r"staging needs fsspec .*pip install fsspec s3fs"):
        stage(path, tmp_path)


def _stage(source, cache, begin, queue):
    begin.wait()
    copied = []
    original = staging.publish
    staging.publish = lambda folder, *args: copied.append(folder.name) or original(folder, *args)
    queue.put((str(stage(source, cache)), copied))


def test_several_processes_at_once(path, tmp_path):
    context = multiprocessing.get_context("fork")
    begin, queue = context.Barrier(4), context.Queue()
    workers = [context.Process(target=_stage, args=(str(path), str(tmp_path), begin, queue)) for _ in range(4)]
    for worker in workers:
        worker.start()
    results = [queue.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join(60)
    assert len({local for local, _ in results}) == 1
    copied = [name for _, names in results for name in names]
    assert len(copied) == 5 + 3  # five shards, manifest, index and statistics: each by one of them
    local = Path(results[0][0])
    same_rows(local, path)
    assert not leftovers(local)


def test_a_new_generation_adds_its_shards(tmp_path, make):
    source = make(tmp_path / "one", 8)
    local = stage(source, tmp_path / "cache")
    inodes = {file.name: file.stat().st_ino for file in (local / "shards").rglob("*.safetensors")}
    second = make(tmp_path / "two", 13)  # the first 8 rows again, and 5 more
    os.rename(source, tmp_path / "old")
    os.rename(second, source)
    assert stage(source, tmp_path / "cache") == local
    assert len(LatentDataset(local)) == 13
    now = {file.name: file.stat().st_ino for file in (local / "shards").rglob("*.safetensors")}
    kept = inodes.keys() & now.keys()
    assert kept
    assert all(now[name] == inodes[name] for name in kept)


def test_from_s3(path, tmp_path):
    """Against a local server that speaks S3; pip install s3fs 'moto[server]'."""
    pytest.importorskip("s3fs")
    server = pytest.importorskip("moto.server").ThreadedMotoServer(port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        fsspec.config.conf["s3"] = {"key": "a", "secret": "b", "endpoint_url": f"http://{host}:{port}"}
        filesystem = fsspec.filesystem("s3")
        filesystem.mkdir("latents")
        upload(path, "s3://latents/train")
        same_rows(stage("s3://latents/train", tmp_path), path)
    finally:
        fsspec.config.conf.pop("s3", None)
        server.stop()
