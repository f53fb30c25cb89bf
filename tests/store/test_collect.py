"""What the current generation does not need goes, and nothing else."""

import os

import numpy as np
import pytest

from fastlatent.store.build import Lock
from fastlatent.store.collect import collect
from fastlatent.store.derive import Conditions, select
from fastlatent.store.reader import Dataset
from fastlatent.store.repair import repair
from fastlatent.store.verify import verify


def test_only_the_current_generation_is_left(dataset, toy, source):
    (dataset / "encode.yaml").write_text("ours to keep")
    (dataset / "shards" / "notes.txt").write_text("not ours to remove")
    (dataset / ("shards/.tmp-x-" + "0" * 32)).write_bytes(b"unfinished")
    # The unit of bee/2.jpg and cat/1.jpg goes out of use.
    (source / "cat/1.jpg").unlink()
    toy.build(dataset, source)
    opened = Dataset.open(dataset)
    dead = set(range(len(opened.shards))) - set(opened.shard.tolist())
    assert dead
    before = toy.contents(dataset)
    planned = collect(dataset, dry_run=True)
    assert toy.contents(dataset) == before
    report = collect(dataset, dry_run=False)
    assert (planned.removed, planned.bytes) == (report.removed, report.bytes)
    after = toy.contents(dataset)
    kept = {one.path for i, one in enumerate(opened.shards) if i not in dead}
    root = Dataset.open(dataset).root
    records = [*root["manifests"], *root["indexes"], root["statistics"], root["quarantine"]]
    kept |= {one["path"] for one in records} | {"dataset.json", "provenance.json", "generation/000004.json"}
    assert set(after) == kept | {"encode.yaml", "shards/notes.txt"}
    assert report.bytes == sum(len(before[name]) for name in report.removed)
    assert report.generation == 4 and verify(dataset, full=True, threads=1).findings == []
    assert collect(dataset, dry_run=False).removed == []
    assert toy.build(dataset, source)[1] == []


def test_readers_of_an_old_generation_keep_what_they_mapped(dataset, toy, source):
    old = Dataset.open(dataset)
    views = [old.open_shard(i).columns["moments"] for i in range(len(old.shards))]
    before = [view.copy() for view in views]
    keys = [old.key(i) for i in range(len(old))]
    (source / "cat/1.jpg").unlink()
    toy.build(dataset, source)
    report = collect(dataset, dry_run=False)
    assert any(name.startswith("shards/") for name in report.removed)
    assert all(np.array_equal(view, copy) for view, copy in zip(views, before, strict=True))
    assert [old.key(i) for i in range(len(old))] == keys
    assert verify(dataset, full=True, threads=1).findings == []


def test_statistics_stay_to_the_last_bit(dataset, toy, source):
    (source / "cat/1.jpg").unlink()
    toy.build(dataset, source)
    before = Dataset.open(dataset).statistics
    collect(dataset, dry_run=False)
    after = Dataset.open(dataset).statistics
    assert all(np.array_equal(getattr(before, name), getattr(after, name)) for name in vars(before))


def test_a_pending_encode_keeps_its_plan_and_its_shards(dataset, toy, source):
    # After a repair a plan is pending: shards without a sample wait, so that the plan stays that of the coming one.
    (source / "cat/1.jpg").unlink()
    toy.build(dataset, source)
    opened = Dataset.open(dataset)
    shard = opened.shards[opened.shard[0]]
    (dataset / shard.path).write_bytes(b"")
    assert repair(dataset, threads=1).planned == 1
    report = collect(dataset, dry_run=False)
    assert report.waiting == 1 and report.generation == 4
    assert (dataset / "plan/000005.json").exists()
    assert any(name.startswith("damaged/") for name in report.removed) and not (dataset / "damaged").exists()
    toy.build(dataset, source)
    assert collect(dataset, dry_run=False).waiting == 0
    assert verify(dataset, full=True, threads=1).findings == []


def test_what_another_dataset_shares_frees_nothing(dataset, toy, source, tmp_path):
    select(dataset, Conditions(keys=("*",)), tmp_path / "other", copy=False)
    (source / "cat/1.jpg").unlink()
    toy.build(dataset, source)
    report = collect(dataset, dry_run=False)
    gone = [name for name in report.removed if name.startswith("shards/")]
    assert gone
    assert verify(tmp_path / "other", full=True, threads=1).findings == []
    shared = [name for name in gone if (tmp_path / "other" / name).exists()]
    assert shared


def test_refused_while_a_writer_is_active(dataset, toy):
    lock = Lock(dataset, shared=True)
    lock.share()
    before = toy.contents(dataset)
    try:
        for dry_run in (False, True):
            with pytest.raises(ValueError, match="is being written by"):
                collect(dataset, dry_run=dry_run)
    finally:
        lock.release()
    assert toy.contents(dataset) == before


def test_a_damaged_dataset_is_left_alone(dataset, toy):
    (dataset / "dataset.json").write_bytes(b"{torn")
    before = toy.contents(dataset)
    with pytest.raises(ValueError, match=r"dataset\.json"):
        collect(dataset, dry_run=False)
    assert toy.contents(dataset) == before
    with pytest.raises(ValueError, match="got no folder"):
        collect(dataset / "none", dry_run=False)
    assert not os.path.exists(dataset / "none")
