import errno
import os
import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import xxhash

from fastlatent.store import scan as scan_module
from fastlatent.store.build import Lock
from fastlatent.store.reader import Dataset, build_state
from fastlatent.store.records import Quarantined, Schema
from fastlatent.store.scan import Entry
from fastlatent.store.writer import DatasetWriter


def open_writer(toy, path, classes=(), **arguments):
    arguments = {"provenance": toy.PROVENANCE, "unit_rows": 2, "schema": toy.SCHEMA, **arguments}
    return DatasetWriter.open(path, arguments.pop("provenance"), list(classes), **arguments)


def keys(dataset):
    return [dataset.key(i) for i in range(len(dataset))]


def latent(dataset, key):
    i = keys(dataset).index(key)
    return dataset.open_shard(int(dataset.shard[i])).columns["moments"][dataset.row[i]]


def shard_files(toy, path):
    return {name: data for name, data in toy.contents(path).items() if name.startswith("shards/")}


def test_round_trip(toy, tmp_path, source):
    info, encoded = toy.build(tmp_path / "d", source)
    dataset = Dataset.open(tmp_path / "d")
    assert keys(dataset) == encoded == ["ant/1.jpg", "ant/2.jpg", "bee/1.jpg", "bee/2.jpg", "cat/1.jpg"]
    assert (info.rows, info.shards, info.generation, len(dataset)) == (5, 3, 1, 5)
    assert dataset.classes == ["ant", "bee", "cat"] and dataset.label.tolist() == [0, 0, 1, 1, 2]
    assert dataset.orig_hw.tolist() == [[300, 400]] * 5 and dataset.crop.tolist() == [[22, 72, 256, 256]] * 5
    for i, key in enumerate(encoded):
        data = (source / key).read_bytes()
        np.testing.assert_array_equal(latent(dataset, key), toy.row(source / key))
        assert dataset.key_hash[i] == xxhash.xxh3_64_intdigest(key.encode())
        assert "{:016x}{:016x}".format(*dataset.src_xxh3[i].tolist()) == xxhash.xxh3_128_hexdigest(data)
        assert (dataset.src_size[i], dataset.src_mtime_ns[i]) == (len(data), toy.EPOCH)
        shard = dataset.open_shard(int(dataset.shard[i])).columns
        row = dataset.row[i]
        assert shard["row_xxh3"][row] == xxhash.xxh3_64_intdigest(shard["moments"][row].tobytes())
        assert shard["sample_id"][row] == dataset.key_hash[i]


def test_nothing_new_is_no_new_generation(toy, tmp_path, source):
    toy.build(tmp_path / "d", source)
    before = toy.contents(tmp_path / "d")
    info, encoded = toy.build(tmp_path / "d", source)
    assert encoded == [] and info.generation == 1
    assert toy.contents(tmp_path / "d") == before


def test_the_same_files_give_the_same_bytes_anywhere(toy, tmp_path, source):
    toy.build(tmp_path / "one", source)
    toy.build(tmp_path / "two", source, pause=0.001)
    assert toy.contents(tmp_path / "one") == toy.contents(tmp_path / "two")


def test_a_small_dataset_is_what_it_was(toy, tmp_path, source):
    # Pinned like the shard's golden bytes: unit ids, index, names. Do not update; see fastlatent.store.
    toy.build(tmp_path / "d", source)
    contents = toy.contents(tmp_path / "d")
    assert contents.pop("generation/000001.json") == contents["dataset.json"]
    names = "\n".join(sorted(contents))
    index = (tmp_path / "d/index/000001.safetensors").read_bytes()
    assert xxhash.xxh3_128_hexdigest(names.encode()) == "7d27af16ff63eab5ea337e6e52dc4b28"
    assert xxhash.xxh3_128_hexdigest(index) == "4aa0288da3861e4201126e394bd3a173"


def test_inserted_edited_and_removed_files_disturb_no_other_unit(toy, change, tmp_path, source):
    toy.build(tmp_path / "d", source)
    before = shard_files(toy, tmp_path / "d")
    change(source)
    info, encoded = toy.build(tmp_path / "d", source)
    assert encoded == ["aardvark/0.jpg", "ant/bad.jpg", "bee/2.jpg"]
    assert (info.generation, info.rows, info.quarantined) == (2, 5, 1)
    after = shard_files(toy, tmp_path / "d")
    assert {name: after[name] for name in before} == before and len(after) == len(before) + 2
    dataset = Dataset.open(tmp_path / "d")
    assert keys(dataset) == ["aardvark/0.jpg", "ant/1.jpg", "bee/1.jpg", "bee/2.jpg", "cat/1.jpg"]
    assert dataset.label.tolist() == [0, 1, 2, 2, 3]  # the new class shifted every label, and no shard
    for key in keys(dataset):
        np.testing.assert_array_equal(latent(dataset, key), toy.row(source / key))
    assert [(one.key, one.error) for one in dataset.quarantined] == [("ant/bad.jpg", "UnidentifiedImageError")]
    assert toy.build(tmp_path / "d", source)[1] == []  # what is in quarantine is not tried again


def test_statistics_are_those_of_the_rows_in_the_index(toy, dataset):
    opened = Dataset.open(dataset)  # shards 0 and 1 have a row that is no longer in use
    used = np.stack([latent(opened, key) for key in keys(opened)]).astype(np.float64)
    means, logvars = used[:, 0, :2], used[:, 0, 2:]
    assert opened.statistics.count == 5 * 4
    np.testing.assert_allclose(opened.statistics.latent_mean, means.mean((0, 2, 3)), rtol=1e-12)
    variance = means.var((0, 2, 3)) + np.exp(logvars).mean((0, 2, 3))
    np.testing.assert_allclose(opened.statistics.latent_std, np.sqrt(variance), rtol=1e-12)
    np.testing.assert_array_equal(opened.statistics.abs_max, np.abs(means).max((0, 2, 3)))


def test_a_file_that_comes_back_gets_its_row_back(toy, change, tmp_path, source):
    toy.build(tmp_path / "d", source)
    change(source)
    toy.build(tmp_path / "d", source)
    toy.make_source(source, ["ant/2.jpg", "bee/2.jpg"])  # restored, and edited back
    info, encoded = toy.build(tmp_path / "d", source)
    assert encoded == [] and (info.generation, info.rows) == (3, 6)
    dataset = Dataset.open(tmp_path / "d")
    for key in keys(dataset):
        np.testing.assert_array_equal(latent(dataset, key), toy.row(source / key))


def test_a_touched_file_is_read_but_not_encoded(toy, tmp_path, source, monkeypatch):
    toy.build(tmp_path / "d", source)
    os.utime(source / "ant/1.jpg", ns=(toy.EPOCH, toy.EPOCH + 1))
    read = []
    real = scan_module.hash_file
    monkeypatch.setattr(scan_module, "hash_file", lambda entry: read.append(entry.key) or real(entry))
    info, encoded = toy.build(tmp_path / "d", source)
    assert read == ["ant/1.jpg"] and encoded == [] and info.generation == 2  # its new mtime is in the index
    assert toy.build(tmp_path / "d", source)[0].generation == 2
    assert read == ["ant/1.jpg"]


def test_progress_counts_the_files_that_are_read(toy, tmp_path, source, monkeypatch):
    monkeypatch.setattr(scan_module, "HASH_BLOCK", 2)
    seen = []
    entries, classes = toy.scan(source)
    with open_writer(toy, tmp_path / "d", classes) as writer:
        writer.plan(entries, lambda done, total: seen.append((done, total)))
    assert seen == [(2, 5), (4, 5), (5, 5)]


def test_a_file_in_quarantine_is_tried_again_when_it_changes(toy, tmp_path, source):
    toy.write_file(source, "bee/x.jpg", b"bad")
    assert toy.build(tmp_path / "d", source)[0].quarantined == 1
    toy.write_file(source, "bee/x.jpg", b"mended", 1)
    info, encoded = toy.build(tmp_path / "d", source)
    assert encoded == ["bee/x.jpg"] and info.quarantined == 0 and info.rows == 6
    assert Dataset.open(tmp_path / "d").root["quarantine"] is None


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.uint16])
@pytest.mark.parametrize("bad", ["nan", "inf", "-inf"])
def test_rows_that_are_not_finite_go_into_quarantine(toy, tmp_path, source, dtype, bad):
    entries, classes = toy.scan(source)
    with open_writer(toy, tmp_path / "d", classes, unit_rows=5) as writer:
        (unit,) = writer.plan(entries)
        rows, _ = toy.encode(unit)
        values = rows.payload.astype(np.float32)
        values[1, 0, 3, 1, 1] = float(bad)  # the last value of a row
        values[4, 0, 0, 0, 0] = float(bad)  # the first
        moments = (values.view(np.uint32) >> 16).astype(np.uint16) if dtype == np.uint16 else values.astype(dtype)
        writer.commit(unit, replace(rows, payload=moments))
        assert writer.finish().rows == 3
    dataset = Dataset.open(tmp_path / "d")
    assert [one.key for one in dataset.quarantined] == ["ant/2.jpg", "cat/1.jpg"]
    assert dataset.quarantined[0].error == "FloatingPointError"
    np.testing.assert_array_equal(dataset.open_shard(0).columns["moments"], moments[[0, 2, 3]])
    assert dataset.open_shard(0).dtypes["moments"] == {"e": "F16", "f": "F32", "H": "BF16"}[np.dtype(dtype).char]


def test_no_good_row_is_an_error_that_names_the_quarantine(toy, tmp_path):
    source = tmp_path / "source"
    for i in range(3):
        toy.write_file(source, f"a/{i}.jpg", b"bad" if i else b"nan")
    for _ in range(2):  # and again, from the journal
        with pytest.raises(ValueError, match=r"0 of 3; all 3 are listed in .*quarantine/000001.json(.|\n)*a/1.jpg"):
            toy.build(tmp_path / "d", source)
    assert not (tmp_path / "d/dataset.json").exists() and not (tmp_path / "d/shards").exists()
    toy.write_file(source, "a/1.jpg", b"good", 1)
    assert toy.build(tmp_path / "d", source)[0].rows == 1


def test_an_empty_scan_keeps_what_was_there(toy, dataset, tmp_path):
    before = toy.contents(dataset)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="at least one file that can be encoded, got 0 of 0"):
        toy.build(dataset, tmp_path / "empty")
    assert toy.contents(dataset) == before


KEYS = [
    "a", "A", "é", "e\u0301", "\u212b", "日本/猫.png", "🐈/\U0010ffff", "\udcff\udc80.jpg", "x y\n\t\"'\\", ".tmp-a",
    "-", "z" * 3000, "d/" * 1000 + "deep", "\ud7ff", "\ue000", "a/../b", "/a",
]  # fmt: skip


def test_any_key(toy, tmp_path):
    # Keys are data, never file names: equal after NFC or casefold is different, and no length is too long.
    file = tmp_path / "file"
    file.write_bytes(b"x")
    stat = file.stat()
    entries = [Entry(key, str(file), -1, stat.st_size, stat.st_mtime_ns) for key in reversed(KEYS)]
    for _ in range(2):
        with open_writer(toy, tmp_path / "d", unit_rows=3) as writer:
            for unit in writer.plan(entries)[:3]:
                writer.commit(unit, *toy.encode(unit))  # interrupted after three: keys go through plan and journal
    with open_writer(toy, tmp_path / "d", unit_rows=3) as writer:
        assert writer.plan(entries) == []
        writer.finish()
    dataset = Dataset.open(tmp_path / "d")
    assert keys(dataset) == sorted(KEYS, key=lambda key: key.encode("utf-8", "surrogateescape"))
    assert dataset.label.tolist() == [-1] * len(KEYS)


def test_a_file_name_that_is_not_utf8(toy, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    with open(os.fsencode(source) + b"/caf\xe9.jpg", "wb") as file:
        file.write(b"latin-1")
    toy.build(tmp_path / "d", source)
    assert os.fsencode(Dataset.open(tmp_path / "d").key(0)) == b"caf\xe9.jpg"


@pytest.mark.parametrize("key", ["", "\ud800", "a\udbff"])
def test_keys_that_are_no_paths_are_refused(toy, tmp_path, key):
    with open_writer(toy, tmp_path / "d") as writer, pytest.raises(ValueError, match="key"):
        writer.plan([Entry(key, "x", -1, 1, 1)])


def test_a_key_that_occurs_twice_names_both_files(toy, tmp_path):
    entries = [Entry("k", "/one/k", -1, 1, 1), Entry("l", "/l", -1, 1, 1), Entry("k", "/two/k", -1, 1, 1)]
    with open_writer(toy, tmp_path / "d") as writer, pytest.raises(ValueError, match="'k' for both /one/k and /two/k"):
        writer.plan(entries)


@pytest.mark.parametrize("label", [-2, 2])
def test_labels_outside_the_classes_are_refused(toy, tmp_path, label):
    with open_writer(toy, tmp_path / "d", ["a", "b"]) as writer, pytest.raises(ValueError, match="label from -1 to 1"):
        writer.plan([Entry("k", "x", label, 1, 1)])


@pytest.mark.parametrize("how", ["gone", "grown", "touched", "a folder"])
def test_a_source_that_changes_under_the_scan_is_refused(toy, tmp_path, source, how):
    entries, classes = toy.scan(source)
    path = source / "bee/1.jpg"
    if how in ("gone", "a folder"):
        path.unlink()
    if how == "a folder":
        path.mkdir()
    if how == "grown":
        toy.write_file(source, "bee/1.jpg", path.read_bytes() + b"more")
    if how == "touched":
        os.utime(path, ns=(1, 1))
    with open_writer(toy, tmp_path / "d", classes) as writer:
        with pytest.raises(ValueError, match=r"bee/1\.jpg"):
            writer.plan(entries)
        with pytest.raises(ValueError, match="plan"):
            writer.finish()


def test_other_settings_are_refused_with_every_difference(toy, tmp_path, source):
    toy.build(tmp_path / "d", source)
    before = toy.contents(tmp_path / "d")
    other = {"hashed": {"vae": {"weights": "ffff" * 16}, "size": 512}, "informational": {}}
    with pytest.raises(ValueError, match="other settings") as error:
        toy.build(tmp_path / "d", source, provenance=other)
    message = str(error.value)
    assert "size: 256 (dataset) != 512 (now)" in message and "vae.weights: a1b2c3d4a1b2… (dataset)" in message
    assert "another folder" in message
    with pytest.raises(ValueError, match=r"\(1, 4, 2, 2\), got bucket \(2, 4, 2, 2\)"):
        open_writer(toy, tmp_path / "d", schema=Schema(((2, 4, 2, 2),)))
    assert toy.contents(tmp_path / "d") == before
    again = {**toy.PROVENANCE, "informational": {"torch": "another"}}
    assert toy.build(tmp_path / "d", source, provenance=again)[0].generation == 1
    assert toy.contents(tmp_path / "d") == before  # provenance stays that of the first writer


@pytest.mark.parametrize(
    "arguments, match",
    [
        ({"provenance": {"hashed": {}}}, "informational"),
        ({"provenance": {"hashed": {"a": float("nan")}, "informational": {}}}, "JSON"),
        ({"unit_rows": 0}, "unit_rows"), ({"unit_rows": 1 << 30}, "unit_rows"),
    ],
)  # fmt: skip
def test_open_refuses_arguments(toy, tmp_path, arguments, match):
    with pytest.raises(ValueError, match=match):
        open_writer(toy, tmp_path / "d", **arguments)
    assert not (tmp_path / "d").exists()


def test_folders_of_others_are_refused(toy, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/cat.jpg").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"got \['cat.jpg'\]: choose another folder"):
        open_writer(toy, tmp_path / "photos")
    assert [path.name for path in (tmp_path / "photos").iterdir()] == ["cat.jpg"]
    with pytest.raises(ValueError, match="expected a folder for the dataset, got a file"):
        open_writer(toy, tmp_path / "photos/cat.jpg")
    with pytest.raises(ValueError, match="can be written to"):
        open_writer(toy, tmp_path / "photos/cat.jpg/inside")


def test_a_read_only_folder_is_refused(toy, dataset, tmp_path, monkeypatch):
    # Tests run as root, who may write anywhere, so the system call is made to fail.
    real = os.open

    def read_only(path, flags, *args, **kwargs):
        if flags & (os.O_WRONLY | os.O_RDWR):
            raise OSError(errno.EROFS, "Read-only file system", str(path))
        return real(path, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", read_only)
    with pytest.raises(ValueError, match="can be written to, got: Read-only file system"):
        open_writer(toy, dataset)
    assert len(Dataset.open(dataset)) == 5


def test_who_wants_the_dataset_alone_is_told_who_is_at_work(toy, dataset):
    with open_writer(toy, dataset):
        with pytest.raises(ValueError, match=rf"being written by pid {os.getpid()} on .*; wait until"):
            Lock(dataset)
        assert len(Dataset.open(dataset)) == 5  # readers are not disturbed
        assert build_state(dataset).writer.startswith(f"pid {os.getpid()} on ")
        with open_writer(toy, dataset):
            assert build_state(dataset).writer.startswith(f"2 writers: pid {os.getpid()} on ")
    assert build_state(dataset) is None
    alone = Lock(dataset)
    with pytest.raises(ValueError, match=rf"being written by pid {os.getpid()} on .*; wait until"):
        open_writer(toy, dataset)
    alone.release()
    open_writer(toy, dataset).__exit__(None, None, None)
    assert not [name for name in toy.contents(dataset) if name.startswith("lease/")]


def test_a_forked_child_does_not_keep_the_lock(toy, tmp_path):
    # Decoding workers may outlive a killed parent; the next encode must not have to wait for them.
    code = (
        "import importlib.util, os, sys, time\n"
        "spec = importlib.util.spec_from_file_location('toy', sys.argv[1])\n"
        "toy = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(toy)\n"
        "w = toy.DatasetWriter.open(sys.argv[2], toy.PROVENANCE, [], unit_rows=2, schema=toy.SCHEMA)\n"
        "r, s = os.pipe()\n"
        "if os.fork() == 0:\n"
        "    os.write(s, b'x'); sys.stdin.read(); os._exit(0)\n"
        "os.read(r, 1); print('forked', flush=True); os.kill(os.getpid(), 9)\n"
    )
    command = [sys.executable, "-c", code, toy.__spec__.origin, str(tmp_path / "d")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"forked\n"
        assert process.wait() == -9
        open_writer(toy, tmp_path / "d").__exit__(None, None, None)  # while the child lives: its stdin is open
        process.stdin.close()


def test_commit_refuses_what_is_not_the_unit(toy, tmp_path, source):
    entries, classes = toy.scan(source)
    with open_writer(toy, tmp_path / "d", classes) as writer:
        first, second, _ = writer.plan(entries)
        rows, _ = toy.encode(first)
        item = first.items[0]
        wrong = [
            (replace(rows, keys=rows.keys[::-1]), ()),
            (replace(rows, keys=rows.keys[:1]), ()),
            (replace(rows, payload=rows.payload[:1]), ()),
            (replace(rows, payload=rows.payload[..., :1]), ()),
            (replace(rows, payload=rows.payload.astype(np.float64)), ()),
            (replace(rows, orig_hw=rows.orig_hw[:, :1]), ()),
            (replace(rows, crop=rows.crop[:1]), ()),
            (replace(rows, crop=rows.crop.astype(np.float32)), ()),
            (rows, [Quarantined(item.key, item.digest, "", "")]),  # a row of a file in quarantine
            (rows, [Quarantined("another", item.digest, "", "")]),
            (rows, [Quarantined(item.key, "0" * 32, "", "")]),
            (toy.encode(second)[0], ()),
        ]
        for bad_rows, quarantined in wrong:
            with pytest.raises(ValueError):
                writer.commit(first, bad_rows, quarantined)
        assert not (tmp_path / "d/journal").exists() and not (tmp_path / "d/shards").exists()
        writer.commit(first, rows)
        with pytest.raises(ValueError, match="not yet committed"):
            writer.commit(first, rows)
        rows, _ = toy.encode(second)
        with pytest.raises(ValueError, match="expected F16 as in the rest of the dataset, got F32"):
            writer.commit(second, replace(rows, payload=rows.payload.astype(np.float32)))
        with pytest.raises(ValueError, match="2 of 3 units are not yet committed"):
            writer.finish()


def test_units_may_be_committed_in_any_order(toy, tmp_path, source):
    toy.build(tmp_path / "one", source)
    entries, classes = toy.scan(source)
    with open_writer(toy, tmp_path / "two", classes) as writer:
        for unit in reversed(writer.plan(entries)):
            writer.commit(unit, *toy.encode(unit))
        writer.finish()
    assert toy.contents(tmp_path / "one") == toy.contents(tmp_path / "two")


def interrupted(toy, path, source, count):
    """Commit `count` units, and stop."""
    entries, classes = toy.scan(source)
    with open_writer(toy, path, classes) as writer:
        units = writer.plan(entries)
        for unit in units[:count]:
            writer.commit(unit, *toy.encode(unit))
    return units


def test_a_digit_that_changed_in_a_journal_is_found(toy, tmp_path, source):
    interrupted(toy, tmp_path / "d", source, 2)
    (journal,) = (tmp_path / "d/journal").glob("*.jsonl")
    data = journal.read_bytes()
    for digit in re.finditer(rb"\d", data.split(b"\n")[0]):
        changed = bytearray(data)
        changed[digit.start()] = ord("1") if digit[0] != b"1" else ord("2")
        journal.write_bytes(changed)
        with pytest.raises(ValueError, match=r"jsonl: line 1 .*(damaged|expected)"):
            open_writer(toy, tmp_path / "d")


def test_a_pending_plan_is_taken_up_as_it_is(toy, tmp_path, source):
    first = interrupted(toy, tmp_path / "d", source, 1)
    entries, classes = toy.scan(source)
    with open_writer(toy, tmp_path / "d", classes, unit_rows=5) as writer:  # it would be cut differently now
        assert writer.plan(entries) == first[1:]
    state = build_state(tmp_path / "d")
    assert (state.planned_units, state.done_units, state.planned_rows, state.done_rows) == (3, 1, 5, 2)
    assert state.writer is None and state.last_generation is None and state.bytes > 0
    toy.build(tmp_path / "d", source)
    toy.build(tmp_path / "whole", source)
    assert toy.contents(tmp_path / "d") == toy.contents(tmp_path / "whole")


def test_a_plan_grows_with_the_source(toy, tmp_path, source):
    first = interrupted(toy, tmp_path / "d", source, 1)
    toy.make_source(source, ["ant/3.jpg", "zoo/1.jpg"])
    entries, classes = toy.scan(source)
    with open_writer(toy, tmp_path / "d", classes) as writer:
        units = writer.plan(entries)
    assert {unit.id for unit in first[1:]} < {unit.id for unit in units}
    assert [[item.key for item in unit.items] for unit in units] == [
        ["ant/3.jpg", "zoo/1.jpg"], ["bee/1.jpg", "bee/2.jpg"], ["cat/1.jpg"]
    ]  # fmt: skip
    assert toy.build(tmp_path / "d", source)[0].rows == 7


def test_a_plan_is_cut_anew_when_a_file_of_an_open_unit_changes(toy, tmp_path, source):
    first = interrupted(toy, tmp_path / "d", source, 1)
    toy.write_file(source, "bee/1.jpg", b"edited", 1)
    entries, classes = toy.scan(source)
    with open_writer(toy, tmp_path / "d", classes) as writer:
        units = writer.plan(entries)
    assert not {unit.id for unit in first} & {unit.id for unit in units[:1]}
    info, encoded = toy.build(tmp_path / "d", source)
    assert encoded == ["bee/1.jpg", "bee/2.jpg", "cat/1.jpg"] and info.rows == 5


def test_a_committed_unit_serves_while_one_of_its_files_is_wanted(toy, tmp_path, source):
    interrupted(toy, tmp_path / "d", source, 1)
    toy.write_file(source, "ant/1.jpg", b"edited", 1)
    info, encoded = toy.build(tmp_path / "d", source)
    assert "ant/1.jpg" in encoded and "ant/2.jpg" not in encoded and info.rows == 5
    dataset = Dataset.open(tmp_path / "d")
    for key in keys(dataset):
        np.testing.assert_array_equal(latent(dataset, key), toy.row(source / key))
    assert dataset.statistics.count == 5 * 4  # the edited file's old row counts for nothing


def test_a_committed_unit_that_serves_nothing_is_left_out(toy, tmp_path, source):
    interrupted(toy, tmp_path / "d", source, 1)
    (source / "ant/1.jpg").unlink()
    (source / "ant/2.jpg").unlink()
    info, _ = toy.build(tmp_path / "d", source)
    assert info.rows == 3 and info.shards == 2
    assert len(shard_files(toy, tmp_path / "d")) == 3  # its file stays: shards are never deleted


def test_a_shard_that_is_gone_or_short_is_encoded_again(toy, tmp_path, source):
    interrupted(toy, tmp_path / "d", source, 2)
    first, second = sorted((tmp_path / "d").rglob("*.safetensors"))
    first.unlink()
    os.truncate(second, 5000)
    assert len(toy.build(tmp_path / "d", source)[1]) == 5


def test_a_shard_missing_from_a_generation_is_an_error(toy, dataset, source):
    shard = next(iter(sorted((dataset / "shards").rglob("*.safetensors"))))
    shard.unlink()
    with pytest.raises(ValueError, match="no such file: restore it from a copy"):
        toy.build(dataset, source)


@pytest.mark.parametrize("tail", [b'{"generation":1,"unit', b"\0" * 300, b"\0" * 300 + b"\n", b"{}\n", b""])
def test_a_torn_last_journal_line_counts_for_nothing(toy, tmp_path, source, tail):
    interrupted(toy, tmp_path / "d", source, 2)
    (journal,) = (tmp_path / "d/journal").iterdir()
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(lines[0] + tail)
    assert toy.build(tmp_path / "d", source)[1] == ["bee/1.jpg", "bee/2.jpg", "cat/1.jpg"]
    toy.build(tmp_path / "whole", source)
    assert toy.contents(tmp_path / "d") == toy.contents(tmp_path / "whole")


def test_a_damaged_journal_line_that_is_not_the_last_is_an_error(toy, tmp_path, source):
    interrupted(toy, tmp_path / "d", source, 2)
    (journal,) = (tmp_path / "d/journal").iterdir()
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(lines[0].replace(b"unit", b"u\0it") + lines[1])
    with pytest.raises(ValueError, match=r"jsonl: line 1 \(delete the file"):
        toy.build(tmp_path / "d", source)
    journal.unlink()
    assert len(toy.build(tmp_path / "d", source)[1]) == 5


def test_a_damaged_plan_is_an_error_with_a_way_out(toy, tmp_path, source):
    interrupted(toy, tmp_path / "d", source, 1)
    plan = tmp_path / "d/plan/000001.json"
    plan.write_bytes(plan.read_bytes().replace(b"ant/1", b"ant/9"))
    with pytest.raises(ValueError, match=r"plan/000001\.json: unit 0.*expected"):
        toy.build(tmp_path / "d", source)


@pytest.mark.parametrize("when", ["shard", "journal", "finish"])
def test_a_full_disk_leaves_the_previous_generation_and_the_call_can_be_repeated(
    toy, change, tmp_path, source, monkeypatch, when
):
    toy.build(tmp_path / "d", source)
    toy.build(tmp_path / "whole", source)
    change(source)
    toy.build(tmp_path / "whole", source)
    before = toy.contents(tmp_path / "d")
    real, full = os.write, False

    def write(fd, data):
        journal = os.readlink(f"/proc/self/fd/{fd}").endswith(".jsonl")
        if full and journal == (when == "journal"):
            real(fd, data[: len(data) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(fd, data)

    monkeypatch.setattr(os, "write", write)
    entries, classes = toy.scan(source)
    with open_writer(toy, tmp_path / "d", classes) as writer:
        for unit in writer.plan(entries):
            full = when != "finish"
            for _ in range(2 if full else 0):
                with pytest.raises(OSError):
                    writer.commit(unit, *toy.encode(unit))
            full = False
            writer.commit(unit, *toy.encode(unit))
        if when == "finish":
            full = True
            with pytest.raises(OSError, match="free some space"):
                writer.finish()
        after = toy.contents(tmp_path / "d")
        assert {name: after[name] for name in before} == before
        assert Dataset.open(tmp_path / "d").generation == 1
        assert not any(".tmp-" in name for name in after)
        full = False
        writer.finish()
    assert toy.contents(tmp_path / "d") == toy.contents(tmp_path / "whole")


def test_unfinished_files_are_removed_and_no_others(toy, tmp_path, source):
    toy.build(tmp_path / "d", source)
    before = toy.contents(tmp_path / "d")
    ours = tmp_path / "d/shards/1x4x2x2" / f".tmp-unit-{'0a' * 16}"
    ours.write_bytes(b"x")
    (tmp_path / "d/.tmp-notes").write_bytes(b"somebody else's")
    toy.build(tmp_path / "d", source)
    assert toy.contents(tmp_path / "d") == {**before, ".tmp-notes": b"somebody else's"}


def test_a_writer_goes_on_after_finish(toy, change, tmp_path, source):
    classes = toy.scan(source)[1]
    with open_writer(toy, tmp_path / "d", [*classes, "aardvark"]) as writer:
        for generation in (1, 2):
            for unit in writer.plan(toy.scan(source)[0]):
                writer.commit(unit, *toy.encode(unit))
            assert writer.finish().generation == generation
            with pytest.raises(ValueError, match="plan"):
                writer.finish()
            if generation == 1:
                change(source)
