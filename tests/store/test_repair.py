"""What is damaged goes, what is sound stays, and one more encode makes the dataset what it was."""

import json
import os
import shutil

import pytest

from fastlatent.store.build import Lock, plan_path, read_journals, read_plan
from fastlatent.store.reader import Dataset
from fastlatent.store.repair import repair
from fastlatent.store.verify import verify


def shards(toy, dataset):
    return {name: data for name, data in toy.contents(dataset).items() if name.startswith("shards/")}


def samples(dataset):
    """Everything that a reader sees of each sample, whatever shard it lies in."""
    opened = Dataset.open(dataset)
    found = {}
    for i in range(len(opened)):
        row = opened.open_shard(int(opened.shard[i])).columns["moments"][opened.row[i]].tobytes()
        source = opened.src_size[i], opened.src_mtime_ns[i], opened.src_xxh3[i].tobytes()
        found[opened.key(i)] = (opened.classes[opened.label[i]], row, opened.crop[i].tobytes(), *source)
    return found, opened.quarantine, {**opened.provenance}


def flip(pattern, at=-3):
    def damage(dataset):
        for path in sorted(dataset.glob(pattern))[:1]:
            data = bytearray(path.read_bytes())
            data[at] ^= 1
            path.write_bytes(data)

    return damage


def truncate(pattern):
    return lambda dataset: [os.truncate(path, 100) for path in sorted(dataset.glob(pattern))[:1]]


def remove(pattern, count=1):
    return lambda dataset: [path.unlink() for path in sorted(dataset.glob(pattern))[:count]]


def together(*damages):
    return lambda dataset: [damage(dataset) for damage in damages]


def swap(dataset):
    one, other = sorted(dataset.glob("shards/*/*"), key=lambda path: path.stat().st_size)[:2]
    data = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(data)


SHARD = "shards/*/*"
DAMAGES = {
    "a flipped bit": flip(SHARD),
    "a flipped bit in a header": flip(SHARD, 100),
    "a truncated shard": truncate(SHARD),
    "a missing shard": remove(SHARD),
    "a missing folder of shards": lambda dataset: shutil.rmtree(dataset / "shards"),
    "shards swapped": swap,
    "a manifest": flip("manifest/000001.json"),
    "the newest manifest missing": remove("manifest/000002.json"),
    "all manifests": remove("manifest/*", 9),
    "the index": flip("index/000002.safetensors", 5000),
    "the index missing": remove("index/000002.safetensors"),
    "the statistics": flip("statistics/000002.json"),
    "the quarantine": flip("quarantine/*"),
    "dataset.json": flip("dataset.json", 40),
    "dataset.json missing": remove("dataset.json"),
    "provenance.json": flip("provenance.json", 30),
    "a copy of dataset.json": flip("generation/000001.json", 40),
    "index and manifest": together(flip("index/*2.safetensors", 5000), flip("manifest/000001.json")),
    "index and shard": together(flip("index/*2.safetensors", 5000), flip(SHARD)),
    "manifest and shard": together(flip("manifest/000001.json"), flip(SHARD)),
    "dataset.json and shard": together(truncate("dataset.json"), remove(SHARD)),
    "everything but the shards": together(
        truncate("dataset.json"), truncate("manifest/*1.json"), remove("index/*", 9), remove("statistics/*", 9)
    ),
}


@pytest.fixture
def grown(tmp_path, toy, source):
    """Two generations without a sample that is no longer used: files were added, one of them is in quarantine."""
    path = tmp_path / "grown"
    toy.build(path, source)
    toy.write_file(source, "ant/bad.jpg", b"bad bytes")
    toy.write_file(source, "aardvark/0.jpg", b"a class in front of all others")
    toy.write_file(source, "dog/0.jpg", b"and one behind")
    toy.build(path, source)
    return path


@pytest.mark.parametrize("name", DAMAGES)
def test_repair_and_encode_again_give_what_was_there(grown, toy, source, name):
    dataset = grown
    before, whole = shards(toy, dataset), samples(dataset)
    DAMAGES[name](dataset)
    damaged = toy.contents(dataset)
    findings = verify(dataset, full=True, threads=1).findings
    report = repair(dataset, threads=2)
    assert {one.path for one in findings} == {one.path for one in report.findings} and findings
    if report.generation is not None:
        assert verify(dataset, full=True, threads=1).findings == []
        kept = samples(dataset)[0]
        assert (
            {key: value[1:2] for key, value in kept.items()}.items()
            <= {key: value[1:2] for key, value in whole[0].items()}.items()
            or "index" in name
            or name == "everything but the shards"
        )
    # Nothing is deleted: what lay there lies there still, or in damaged/.
    after = toy.contents(dataset)
    assert {data for path, data in damaged.items() if path.split("/")[0] not in ("plan", "journal")} <= {
        *after.values()
    }
    encoded = toy.build(dataset, source)[1]
    assert set(report.lost) <= set(encoded) or name.startswith(("manifest and", "everything"))
    assert verify(dataset, full=True, threads=1).findings == []
    assert {path: data for path, data in before.items()}.items() <= shards(toy, dataset).items()
    now = samples(dataset)
    assert now[:2] == whole[:2]
    assert now[2]["hashed"] == whole[2]["hashed"]
    assert toy.build(dataset, source)[1] == []


def test_a_sound_dataset_is_left_alone(dataset, toy):
    before = toy.contents(dataset)
    report = repair(dataset, threads=1)
    assert (report.findings, report.moved, report.generation) == ([], [], 2)
    assert toy.contents(dataset) == before


def test_exactly_the_lost_units_are_encoded_again(dataset, toy, source):
    opened = Dataset.open(dataset)
    shard = int(opened.shard[1])
    record = opened.shards[shard]
    lost = [opened.key(i) for i in range(len(opened)) if opened.shard[i] == shard]
    (dataset / record.path).unlink()
    report = repair(dataset, threads=1)
    assert (report.lost, report.generation) == (lost, 3)
    info, encoded = toy.build(dataset, source)
    assert (encoded, info.generation) == (lost, 4)


def test_a_unit_with_files_in_quarantine_keeps_its_identity(tmp_path, toy):
    keys = [f"a/{i}.jpg" for i in range(8)]
    source = toy.make_source(tmp_path / "source", keys)
    for i in (0, 3, 7):  # the first of the first unit, one within, the last of all
        toy.write_file(source, f"a/{i}.jpg", b"bad %d" % i)
    path = tmp_path / "dataset"
    toy.build(path, source, unit_rows=4)
    whole = toy.contents(path)
    for i in range(2):
        (path / Dataset.open(path).shards[0].path).unlink()
        report = repair(path, threads=1)
        assert report.planned == 1
        units = read_plan(path, report.generation + 1, Dataset.open(path).fingerprint)
        assert [len(unit.items) for unit in units] == [4]
        assert len(Dataset.open(path).quarantine) == (1 if i == 0 else 2)
        toy.build(path, source, unit_rows=4)
        assert len(Dataset.open(path).quarantine) == 3
        assert {k: v for k, v in whole.items() if k.startswith("shards/")} == shards(toy, path)


def test_a_unit_that_lost_a_file_since_is_cut_afresh(dataset, toy, source):
    # ant/2.jpg was removed: its unit of generation 1 cannot be made again, ant/1.jpg is encoded in a new one.
    opened = Dataset.open(dataset)
    i = [opened.key(j) for j in range(len(opened))].index("ant/1.jpg")
    record = opened.shards[opened.shard[i]]
    assert record.rows == 2
    whole = samples(dataset)
    (dataset / record.path).unlink()
    report = repair(dataset, threads=1)
    assert (report.lost, report.planned) == (["ant/1.jpg"], 0)
    assert toy.build(dataset, source)[1] == ["ant/1.jpg"]
    assert samples(dataset) == whole


def test_work_of_an_interrupted_encode_is_kept(dataset, toy, source):
    # Two new units, one of them done; then a shard of the last generation is damaged.
    for i in range(4):
        toy.write_file(source, f"new/{i}.jpg", b"new %d" % i)
    opened = Dataset.open(dataset)

    class Stop(Exception):
        pass

    done = []

    def commit_one(unit):
        if done:
            raise Stop
        done.append(unit)
        return encode(unit)

    encode, toy.encode = toy.encode, commit_one
    try:
        with pytest.raises(Stop):
            toy.build(dataset, source)
    finally:
        toy.encode = encode
    done = read_journals(dataset, 3)
    assert len(done) == 1
    path = dataset / opened.shards[opened.shard[0]].path
    path.write_bytes(path.read_bytes()[:-1])
    report = repair(dataset, threads=1)
    assert report.generation == 3 and report.planned == 1
    assert set(read_journals(dataset, 4)) == set(done)
    encoded = toy.build(dataset, source)[1]
    assert set(encoded) >= set(report.lost) and len(encoded) == 2 + 2  # the unit that was not done, and the lost one
    assert len(Dataset.open(dataset)) == 5 + 4


def test_a_damaged_plan_is_set_aside(dataset, toy, source):
    plan_path(dataset, 3).parent.mkdir(exist_ok=True)
    plan_path(dataset, 3).write_bytes(b"{torn")
    (dataset / Dataset.open(dataset).shards[0].path).unlink()
    report = repair(dataset, threads=1)
    assert "plan/000003.json" in report.moved and any("set aside" in note for note in report.notes)
    toy.build(dataset, source)
    assert len(Dataset.open(dataset)) == 5


def test_refused_while_a_writer_is_active(dataset):
    for shared in (False, True):
        lock = Lock(dataset, shared=shared)
        if shared:
            lock.share()
        try:
            with pytest.raises(ValueError, match="is being written by"):
                repair(dataset, threads=1)
        finally:
            lock.release()


def test_a_newer_format_is_not_repaired(dataset, toy):
    from fastlatent.store.reader import root_digest

    root = json.loads((dataset / "dataset.json").read_bytes())
    root["format"] = "fls/2"
    root["xxh3_128"] = root_digest(root)
    (dataset / "dataset.json").write_text(json.dumps(root))
    before = toy.contents(dataset)
    with pytest.raises(ValueError, match="expected format 'fls/1', got 'fls/2'"):
        repair(dataset, threads=1)
    assert toy.contents(dataset) == before


def test_without_a_copy_of_dataset_json_nothing_is_touched(dataset, toy):
    (dataset / "dataset.json").write_bytes(b"{torn")
    shutil.rmtree(dataset / "generation")
    before = toy.contents(dataset)
    with pytest.raises(ValueError, match="no sound copy"):
        repair(dataset, threads=1)
    assert toy.contents(dataset) == before


def test_what_is_no_dataset_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="got no folder"):
        repair(tmp_path / "none", threads=1)
    with pytest.raises(ValueError, match="expected a dataset, got a folder"):
        repair(tmp_path, threads=1)
    assert list(tmp_path.iterdir()) == []


def test_a_file_outside_is_not_moved(dataset, tmp_path):
    record = Dataset.open(dataset).shards[0]
    (dataset / record.path).rename(tmp_path / "elsewhere")
    (dataset / record.path).symlink_to(tmp_path / "elsewhere")
    report = repair(dataset, threads=1)
    assert report.moved == [] and (tmp_path / "elsewhere").exists()
    assert verify(dataset, full=True, threads=1).findings == []


def test_a_second_repair_finds_nothing(dataset):
    flip(SHARD)(dataset)
    repair(dataset, threads=1)
    assert repair(dataset, threads=1).findings == []
