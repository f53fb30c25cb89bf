"""Merge, split and filter: the same samples, by reference to the same shards, as complete datasets."""

import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest

from fastlatent.store import derive
from fastlatent.store.derive import Conditions, merge, select, split
from fastlatent.store.live import dataset_index, group_columns, group_keys, take
from fastlatent.store.reader import Dataset
from fastlatent.store.records import RAGGED, Field, Schema
from fastlatent.store.repair import repair
from fastlatent.store.rows import Rows
from fastlatent.store.scan import Entry
from fastlatent.store.verify import verify
from fastlatent.store.writer import DatasetWriter


def samples(path):
    opened = Dataset.open(path)
    return {
        opened.key(i): (
            opened.classes[opened.label[i]],
            opened.open_shard(int(opened.shard[i])).columns["moments"][opened.row[i]].tobytes(),
        )
        for i in range(len(opened))
    }


def sound(path, *parents):
    """A complete dataset that names its parents and has their fingerprint."""
    assert verify(path, full=True, threads=1).findings == []
    opened = Dataset.open(path)
    assert opened.generation == 1
    assert all(opened.fingerprint == Dataset.open(parent).fingerprint for parent in parents)
    named = opened.provenance["informational"]["parents"]
    assert [one["path"] for one in named] == [str(parent.resolve()) for parent in parents]
    assert not [name for name in os.listdir(path.parent) if name.startswith(".tmp-")]
    return opened


def two(tmp_path, toy):
    """Datasets of one fingerprint whose classes overlap: a, b and b, c."""
    paths = []
    for name, keys in (("one", ["a/0.jpg", "a/2.jpg", "b/1.jpg"]), ("two", ["b/0.jpg", "c/0.jpg", "b/bad.jpg"])):
        source = toy.make_source(tmp_path / f"source {name}", keys)
        if name == "two":
            toy.write_file(source, "b/bad.jpg", b"bad bytes")
        toy.build(tmp_path / name, source)
        paths.append(tmp_path / name)
    return paths


def test_merge(tmp_path, toy):
    one, other = two(tmp_path, toy)
    before = toy.contents(one), toy.contents(other)
    derived = merge([one, other], tmp_path / "out", copy=False)
    opened = sound(tmp_path / "out", one, other)
    assert (derived.info.rows, derived.linked, derived.info.path) == (5, derived.info.shards, tmp_path / "out")
    assert samples(tmp_path / "out") == samples(one) | samples(other)
    assert opened.classes == ["a", "b", "c"]
    assert [opened.key(i) for i in range(5)] == ["a/0.jpg", "a/2.jpg", "b/0.jpg", "b/1.jpg", "c/0.jpg"]
    assert [entry.key for entry in opened.quarantined] == ["b/bad.jpg"]
    for shard in opened.shards:
        assert (tmp_path / "out" / shard.path).stat().st_nlink == 2
    assert (toy.contents(one), toy.contents(other)) == before
    # The labels of the first stay, whatever comes first.
    merge([other, one], tmp_path / "turned", copy=False)
    assert Dataset.open(tmp_path / "turned").classes == ["b", "c", "a"]
    assert samples(tmp_path / "turned") == samples(tmp_path / "out")


def test_what_cannot_be_merged(tmp_path, toy):
    one, other = two(tmp_path, toy)
    out = tmp_path / "out"
    source = toy.make_source(tmp_path / "s", ["z/0.jpg"])
    toy.build(tmp_path / "z", source, provenance={"hashed": {"size": 512}, "informational": {}})
    with pytest.raises(ValueError, match=r"different settings:\n  size: 256 \(.*one\) != 512 \(.*z\)"):
        merge([one, tmp_path / "z"], out, copy=False)
    with pytest.raises(ValueError, match="got 'a/0.jpg' in .*one and in .*one"):
        merge([one, one], out, copy=False)
    toy.write_file(tmp_path / "s2", "b/bad.jpg", b"fine here")
    toy.build(tmp_path / "good", tmp_path / "s2")
    with pytest.raises(ValueError, match="got 'b/bad.jpg' in .*two and in .*good"):  # in quarantine there
        merge([other, tmp_path / "good"], out, copy=False)
    with pytest.raises(ValueError, match="at least two datasets"):
        merge([one], out, copy=False)
    with pytest.raises(ValueError, match="got no folder"):
        merge([one, tmp_path / "none"], out, copy=False)
    assert not out.exists()


@pytest.mark.parametrize("what", ["a dataset", "a file", "a folder with a file", "a dangling link"])
def test_never_into_what_is_there(tmp_path, toy, dataset, what):
    one, other = two(tmp_path, toy)
    out = {"a dataset": dataset, "a file": tmp_path / "f", "a folder with a file": tmp_path / "g"}.get(
        what, tmp_path / "link"
    )
    if what == "a file":
        out.write_text("x")
    elif what == "a folder with a file":
        out.mkdir()
        (out / "x").write_text("x")
    elif what == "a dangling link":
        out.symlink_to(tmp_path / "nowhere")
    before = toy.contents(tmp_path)
    with pytest.raises(ValueError, match="expected a name that is free"):
        merge([one, other], out, copy=False)
    with pytest.raises(ValueError, match="expected a folder outside"):
        merge([one, other], one / "shards" / "new", copy=False)
    assert toy.contents(tmp_path) == before


def test_an_empty_folder_is_a_free_name(tmp_path, toy):
    one, other = two(tmp_path, toy)
    (tmp_path / "out").mkdir()
    merge([one, other], tmp_path / "out", copy=False)
    sound(tmp_path / "out", one, other)


@pytest.fixture
def many(tmp_path, toy):
    keys = [f"{name}/{i:03d}.jpg" for name in ("ant", "bee") for i in range(60)]
    source = toy.make_source(tmp_path / "source of many", keys)
    toy.build(tmp_path / "many", source, unit_rows=16)
    return tmp_path / "many"


def test_split(tmp_path, toy, many):
    shares = {"train": 0.7, "val": 0.2, "test": 0.1}
    parts = split(many, shares, 3, str(tmp_path / "p"), copy=False)
    found = {name: samples(tmp_path / f"p-{name}") for name in shares}
    for name in shares:
        opened = sound(tmp_path / f"p-{name}", many)
        assert parts[name].info.rows == len(found[name]) == len(opened)
        # 120 draws: 5 standard deviations.
        assert abs(len(found[name]) - 120 * shares[name]) < 5 * np.sqrt(120 * shares[name] * (1 - shares[name]))
    assert found["train"] | found["val"] | found["test"] == samples(many)
    assert sum(map(len, found.values())) == 120
    # Back together it is the dataset it was: shards that several parts share are one again.
    merge([tmp_path / f"p-{name}" for name in shares], tmp_path / "back", copy=False)
    assert samples(tmp_path / "back") == samples(many)
    assert len(Dataset.open(tmp_path / "back").shards) == len(Dataset.open(many).shards)
    assert Dataset.open(tmp_path / "back").statistics.count == Dataset.open(many).statistics.count


def test_a_sample_never_changes_sides(tmp_path, toy, many):
    split(many, {"a": 0.5, "b": 0.5}, 0, str(tmp_path / "before"), copy=False)
    for i in range(30):
        toy.write_file(tmp_path / "source of many", f"ant/new {i}.jpg", b"new %d" % i)
    toy.build(many, tmp_path / "source of many", unit_rows=16)
    split(many, {"a": 0.5, "b": 0.5}, 0, str(tmp_path / "after"), copy=False)
    split(many, {"a": 0.5, "b": 0.5}, 1, str(tmp_path / "other seed"), copy=False)
    before, after = samples(tmp_path / "before-a"), samples(tmp_path / "after-a")
    assert before.items() <= after.items() and len(after) > len(before)
    assert not before.items() <= samples(tmp_path / "other seed-a").items()


@pytest.mark.parametrize(
    "shares", [{}, {"a": 0.5}, {"a": 0.6, "b": 0.5}, {"a": 1.5, "b": -0.5}, {"a": 1.0, "b": 0.0}, {"a": float("nan")}]
)
def test_shares_that_are_none(tmp_path, dataset, shares):
    with pytest.raises(ValueError, match="fractions: expected shares above 0 that add up to 1"):
        split(dataset, shares, 0, str(tmp_path / "p"), copy=False)


def test_a_side_without_a_sample_leaves_nothing_behind(tmp_path, toy, dataset):
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(ValueError, match="none=1e-09: expected at least one sample of 5, got 0"):
        split(dataset, {"all": 1 - 1e-9, "none": 1e-9}, 0, str(tmp_path / "p"), copy=False)
    assert sorted(os.listdir(tmp_path)) == before


def test_filter(tmp_path, toy, many):
    everything = samples(many)
    cases = {
        "classes": (Conditions(classes=("bee",)), lambda key: key.startswith("bee")),
        "keys": (Conditions(keys=("*/00?.jpg", "ant/1*")), lambda key: "/00" in key or key.startswith("ant/1")),
        "listed": (Conditions(listed=frozenset({b"ant/001.jpg", b"bee/059.jpg"})), {"ant/001.jpg", "bee/059.jpg"}),
        "all of it": (
            Conditions(("ant",), ("*1.jpg",), 300, frozenset({b"ant/011.jpg", b"ant/012.jpg", b"bee/011.jpg"})),
            {"ant/011.jpg"},
        ),
        "min_size": (Conditions(min_size=300), lambda key: True),
    }  # fmt: skip
    for name, (conditions, wanted) in cases.items():
        out = tmp_path / name
        select(many, conditions, out, copy=False)
        opened = sound(out, many)
        keys = {key for key in everything if (key in wanted if isinstance(wanted, set) else wanted(key))}
        assert samples(out) == {key: everything[key] for key in keys}
        assert len(opened.shards) == len(set(opened.shard.tolist()))  # none that no sample lies in
        assert opened.classes == (list(conditions.classes) or ["ant", "bee"])


def test_statistics_are_those_of_the_samples_left(tmp_path, many):
    select(many, Conditions(keys=("*[1357].jpg",)), tmp_path / "out", copy=False)
    opened = Dataset.open(tmp_path / "out")
    rows = [opened.open_shard(int(opened.shard[i])).columns["moments"][opened.row[i]] for i in range(len(opened))]
    means = np.stack(rows).astype(np.float64)[:, :, :2].transpose(2, 0, 1, 3, 4).reshape(2, -1)
    np.testing.assert_allclose(opened.statistics.mean, means.mean(axis=1), rtol=1e-12)
    np.testing.assert_allclose(opened.statistics.m2, ((means.T - means.mean(axis=1)) ** 2).sum(axis=0), rtol=1e-12)


@pytest.mark.parametrize(
    ("conditions", "message"),
    [
        (Conditions(), "expected a condition"),
        (Conditions(classes=("bea",)), "no class 'bea'; did you mean 'bee'"),
        (Conditions(keys=("nothing*",)), "expected at least one sample that meets the conditions, got 0 of 120"),
        (Conditions(min_size=301), "got 0 of 120"),
        (Conditions(listed=frozenset({b"ant/001.jpg", b"x"})), "1 are not there"),
    ],
)
def test_conditions_that_cannot_be_met(tmp_path, many, conditions, message):
    with pytest.raises(ValueError, match=message):
        select(many, conditions, tmp_path / "out", copy=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("error", [errno.EXDEV, errno.EPERM, errno.EMLINK, None])
def test_copies_where_links_cannot_be(tmp_path, many, monkeypatch, error):
    if error is not None:

        def link(source, target):
            raise OSError(error, os.strerror(error))

        monkeypatch.setattr(os, "link", link)
    derived = select(many, Conditions(classes=("ant",)), tmp_path / "out", copy=error is None)
    monkeypatch.undo()
    opened = sound(tmp_path / "out", many)
    assert derived.linked == 0
    assert all((tmp_path / "out" / shard.path).stat().st_nlink == 1 for shard in opened.shards)


def test_a_full_disk_leaves_nothing_behind(tmp_path, many, monkeypatch):
    before = sorted(os.listdir(tmp_path))

    def link(source, target):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "link", link)
    with pytest.raises(OSError, match="No space"):
        select(many, Conditions(classes=("ant",)), tmp_path / "out", copy=False)
    assert sorted(os.listdir(tmp_path)) == before


def test_damage_is_not_handed_on(tmp_path, many):
    path = many / Dataset.open(many).shards[0].path
    data = bytearray(path.read_bytes())
    data[100] ^= 1  # the header; latents are looked at where they are copied
    path.write_bytes(data)
    with pytest.raises(ValueError, match="header"):
        select(many, Conditions(classes=("ant",)), tmp_path / "out", copy=False)
    data[100] ^= 1
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="xxh3_128"):
        select(many, Conditions(classes=("ant",)), tmp_path / "out", copy=True)
    assert not (tmp_path / "out").exists()


def test_encode_goes_on_with_a_derived_dataset(tmp_path, toy, many):
    select(many, Conditions(classes=("bee",)), tmp_path / "out", copy=False)
    encoded = toy.build(tmp_path / "out", tmp_path / "source of many", unit_rows=16)[1]
    assert samples(tmp_path / "out") == samples(many)
    assert len(encoded) < 120


def test_an_index_with_groups():
    # 3 groups of samples; the middle one goes.
    keys = [b"a0", b"a1", b"b0", b"c0", b"c1"]
    from fastlatent.store.records import key_columns

    index = {
        "shard": np.arange(5, dtype="<u4"),
        **key_columns(keys),
        "group": np.array([0, 0, 1, 2, 2], "<u4"),
        "order": np.array([0, 1, 0, 0, 1], "<i8"),
        **group_columns([b"ga", b"gb", b"gc"]),
    }
    left = take(index, np.array([0, 1, 4]))
    assert list(left) == list(index)
    assert left["group"].tolist() == [0, 0, 1] and left["order"].tolist() == [0, 1, 1]
    assert group_keys(left) == [b"ga", b"gc"]
    assert {name: left[name].dtype for name in left} == {name: index[name].dtype for name in index}


def test_sides_follow_the_published_rule():
    import xxhash

    keys = [b"key %d" % i for i in range(200)]
    sides = derive._sides(keys, [0.25, 0.5, 0.25], 9)
    for key, side in zip(keys, sides.tolist(), strict=True):
        where = xxhash.xxh3_64_intdigest(key, seed=9) / 2**64
        assert side == (where >= 0.25) + (where >= 0.75)


def test_the_index_is_what_the_file_holds(dataset):
    from fastlatent.store.shard import Shard

    root = json.loads((dataset / "dataset.json").read_bytes())
    stored = Shard.open(Path(dataset) / root["indexes"][0]["path"]).columns
    index = dataset_index(Dataset.open(dataset))
    assert list(stored) == list(index)
    assert all(np.array_equal(stored[name], index[name]) for name in stored)


# --- what rows may hold besides moments ---

SCHEMAS = {
    "buckets of int8": (Schema(((1, 4, 2, 3), (1, 4, 3, 2))), np.int8),
    "groups of latents": (Schema(((1, 2, 2, 2),), "latents"), np.float32),
    "ragged tokens": (Schema(((1, RAGGED, 4),), "tokens", (Field("text", "U8", (RAGGED,)),)), np.float16),
    "ragged int8": (Schema(((1, RAGGED, 4),), "tokens"), np.int8),
}


def write_schema(toy, path, source, name):
    """24 samples, in groups of 4 where the name says so, decided by their keys alone; every second in each bucket."""
    schema, dtype = SCHEMAS[name]
    entries = []
    for i in range(24):
        key = f"{i % 3}/{i:02d}.bin"
        if not (source / key).exists():
            toy.write_file(source, key, b"contents %d" % i)
        stat = (source / key).stat()
        place = {"group": f"g{i // 4}", "order": i % 4} if "groups" in name else {}
        entries.append(
            Entry(key, str(source / key), -1, stat.st_size, stat.st_mtime_ns, i % len(schema.buckets), **place)
        )
    encoded = []
    with DatasetWriter.open(path, toy.PROVENANCE, [], unit_rows=5, schema=schema) as writer:
        for unit in writer.plan(entries):
            encoded += [item.key for item in unit.items]
            numbers = [int(item.key[2:4]) for item in unit.items]
            shape = unit.bucket[1:] if RAGGED in unit.bucket else unit.bucket
            made = [
                np.random.default_rng(i).integers(-99, 99, [1 + i % 3 if size == RAGGED else size for size in shape])
                for i in numbers
            ]
            ragged = RAGGED in unit.bucket
            payload = [one.astype(dtype) for one in made]
            scale = [np.full(len(one), 0.5, np.float32) for one in payload] if dtype is np.int8 else None
            extras = {one.name: [np.full(i % 4, i, np.uint8) for i in numbers] for one in schema.extras}
            if not ragged:
                payload = np.stack(payload)
                scale = None if scale is None else np.full((len(numbers), 1), 0.5, np.float32)
            writer.commit(unit, Rows([item.key for item in unit.items], payload, scale=scale, extras=extras))
        writer.finish()
    return encoded


@pytest.mark.parametrize("name", SCHEMAS)
def test_any_schema(tmp_path, toy, name):
    source, path = tmp_path / "source", tmp_path / "dataset"
    write_schema(toy, path, source, name)
    assert verify(path, full=True, threads=1).findings == []
    opened = Dataset.open(path)
    split(path, {"a": 0.5, "b": 0.5}, 0, str(tmp_path / "p"), copy=False)
    parts = [sound(tmp_path / f"p-{side}", path) for side in "ab"]
    if "groups" in name:  # none is divided
        groups = [{part.groups.key(i) for i in range(len(part.groups))} for part in parts]
        assert not groups[0] & groups[1] and groups[0] | groups[1] == {f"g{i}" for i in range(6)}
        assert all(part.group_rows(0)[2] == 4 for part in parts)
    merge([tmp_path / "p-b", tmp_path / "p-a"], tmp_path / "back", copy=False)
    back = sound(tmp_path / "back", tmp_path / "p-b", tmp_path / "p-a")
    assert [back.key(i) for i in range(24)] == [opened.key(i) for i in range(24)]
    assert back.orig_hw.shape == (24, 2) and [one.rows for one in back.buckets] == [one.rows for one in opened.buckets]
    # Damage is found, taken out, and made again.
    whole = {key: data for key, data in toy.contents(path).items() if key.startswith("shards/")}
    (path / opened.shards[1].path).unlink()
    report = repair(path, threads=1)
    assert report.lost and verify(path, full=True, threads=1).findings == []
    assert write_schema(toy, path, source, name) == report.lost
    assert {key: data for key, data in toy.contents(path).items() if key.startswith("shards/")} == whole
    assert verify(path, full=True, threads=1).findings == []
