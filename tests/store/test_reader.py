import json
import os
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import xxhash

from fastlatent.store.files import canonical_json
from fastlatent.store.reader import INDEX_COLUMNS, Dataset, build_state, root_digest
from fastlatent.store.writer import DatasetWriter


def read_all(path):
    dataset = Dataset.open(path)
    for i in range(len(dataset.shards)):
        dataset.open_shard(i)
    return dataset


def edit(path: Path, change, *names: str) -> None:
    """Let `change` alter the parsed JSON file; then make every digest above it right again, as a liar would."""
    root = json.loads((path / "dataset.json").read_bytes())
    if names:
        record = root
        for name in names:
            record = record[name]
        value = json.loads((path / record["path"]).read_bytes())
        value = change(value) or value
        data = canonical_json(value)
        (path / record["path"]).write_bytes(data)
        record |= {"bytes": len(data), "xxh3_128": xxhash.xxh3_128_hexdigest(data)}
    else:
        root = change(root) or root
    if "xxh3_128" in root:
        root["xxh3_128"] = root_digest(root)
    (path / "dataset.json").write_bytes(canonical_json(root))


def put(*names, value):
    """A change: set the member that `names` lead to."""

    def change(root):
        for name in names[:-1]:
            root = root[name]
        root[names[-1]] = value

    return change


def drop(*names):
    def change(root):
        for name in names[:-1]:
            root = root[name]
        del root[names[-1]]

    return change


def test_the_columns_are_writable_views_that_change_no_file(dataset, toy):
    before = toy.contents(dataset)
    opened = read_all(dataset)
    for name in INDEX_COLUMNS:
        column = getattr(opened, name)
        assert len(column) == len(opened) and not column.flags.owndata
        column[:] = 1
    assert toy.contents(dataset) == before
    assert Dataset.open(dataset).label.tolist() == [0, 1, 2, 2, 3]
    assert opened.open_shard(0) is opened.open_shard(0)


def test_what_a_later_version_may_add_is_ignored(dataset):
    edit(dataset, put("later", value={"a": 1}))
    edit(dataset, lambda root: root["fields"].append({"name": "caption", "required": False}))
    edit(dataset, lambda root: root["totals"].update(later=1))
    edit(dataset, lambda manifest: manifest["shards"][0].update(later=1), "manifests", 0)
    edit(dataset, lambda statistics: statistics.update(later=1), "statistics")
    edit(dataset, lambda quarantine: quarantine["files"][0].update(later=1), "quarantine")
    assert len(read_all(dataset)) == 5


SHARD = ("shards", 0)
ROOT_LIES = {
    "another format": (put("format", value="fls/2"), "expected format 'fls/1', got 'fls/2'"),
    "format no string": (put("format", value=1), "'format'"),
    "no format": (drop("format"), "expected 'format'"),
    "no object": (lambda root: [root], "object"),
    "no digest of its own": (drop("xxh3_128"), "expected 'xxh3_128'"),
    "an unknown required field": (
        lambda root: root["fields"].append({"name": "depth", "required": True}),
        r"expected only \['latents', 'moments', 'tokens'\] to be required, got 'depth'",
    ),
    "a field that says nothing of required": (lambda root: root["fields"].append({"name": "depth"}), "got 'depth'"),
    "fields no list": (put("fields", value={}), "'fields'"),
    "fingerprint": (put("fingerprint", value="0" * 64), r"provenance\.json: expected what has the fingerprint 000"),
    "fingerprint too short": (put("fingerprint", value="0" * 63), "64 hexadecimal digits"),
    "fingerprint upper case": (put("fingerprint", value="A" * 64), "64 hexadecimal digits"),
    "generation": (put("generation", value=-1), "'generation'"),
    "generation true": (put("generation", value=True), "'generation'"),
    "classes": (put("classes", value=["a", 1]), "'classes'"),
    "too few classes": (put("classes", value=["a"]), "labels outside -1 to 0"),
    "rows": (put("totals", "rows", value=6), "rows=6"),
    "shards": (put("totals", "shards", value=6), "shards=6"),
    "bytes": (put("totals", "bytes", value=6), "bytes=6"),
    "quarantined": (put("totals", "quarantined", value=0), "quarantined=0"),
    "no totals": (drop("totals"), "'totals'"),
    "bucket rows": (put("buckets", 0, "rows", value=4), "rows in the index"),
    "bucket dtype": (put("buckets", 0, "dtype", value="F64"), "'dtype'"),
    "bucket dtype of another": (put("buckets", 0, "dtype", value="F32"), "moments: expected"),
    "bucket shape": (put("buckets", 0, "shape", value=[1, 4, 2, 3]), "moments: expected"),
    "bucket of other channels": (put("buckets", 0, "shape", value=[1, 8, 2, 1]), "statistics of 2 channels"),
    "bucket shape odd": (put("buckets", 0, "shape", value=[1, 3, 2, 2]), "row shape"),
    "bucket of video": (put("buckets", 0, "shape", value=[1, 4, 2, 2, 2]), "moments: expected"),
    "bucket of five axes and more": (put("buckets", 0, "shape", value=[1, 4, 2, 2, 2, 2]), "row shape"),
    "bucket too large": (put("buckets", 0, "shape", value=[1, 4, 1 << 40, 1 << 40]), "row shape"),
    "no bucket": (put("buckets", value=[]), "bucket"),
    "a bucket too many": (lambda root: root["buckets"].append(root["buckets"][0]), "in the index"),
    "manifest outside": (put("manifests", 0, "path", value="../dataset.json"), "expected a path inside"),
    "manifest absolute": (put("manifests", 0, "path", value="/etc/passwd"), "expected a path inside"),
    "manifest missing": (put("manifests", 0, "path", value="manifest/7.json"), r"manifest/7\.json"),
    "manifest size": (put("manifests", 0, "bytes", value=7), r"manifest/000001\.json: expected 7 bytes"),
    "manifest digest": (put("manifests", 0, "xxh3_128", value="0" * 32), r"manifest/000001\.json: expected"),
    "a manifest too few": (drop("manifests", 1), "beside"),
    "index outside": (put("indexes", 0, "path", value="../x"), "expected a path inside"),
    "index of another generation": (put("indexes", 0, "path", value="index/000001.safetensors"), "index/000001"),
    "index size": (put("indexes", 0, "bytes", value=7), r"index/000002\.safetensors: expected 7 bytes"),
    "index digest": (put("indexes", 0, "xxh3_128", value="0" * 32), r"index/000002\.safetensors: expected"),
    "two indexes": (lambda root: root["indexes"].append(root["indexes"][0]), "expected one file, got 2"),
    "no index": (put("indexes", value=[]), "expected one file, got 0"),
    "statistics": (put("statistics", "xxh3_128", value="0" * 32), r"statistics/000002\.json: expected"),
    "statistics null": (put("statistics", value=None), "'statistics'"),
    "quarantine": (put("quarantine", "bytes", value=0), r"quarantine/000002\.json: expected 0 bytes"),
    "quarantine left out": (put("quarantine", value=None), "quarantined=1"),
}  # fmt: skip
FILE_LIES = {
    "manifest of another format": (put("format", value="fls/2"), ("manifests", 0), "'format'"),
    "manifest of another dataset": (put("fingerprint", value="0" * 64), ("manifests", 0), "'fingerprint'"),
    "shard outside": (put(*SHARD, "path", value="../x"), ("manifests", 0), "expected a path inside"),
    "shard absolute": (put(*SHARD, "path", value="/x"), ("manifests", 0), "expected a path inside"),
    "shard bytes": (put(*SHARD, "bytes", value=7), ("manifests", 0), "bytes"),
    "shard header size": (put(*SHARD, "header_bytes", value=8), ("manifests", 0), "header_bytes: expected 8, got 4096"),
    "shard header digest": (put(*SHARD, "header_xxh3_64", value="0" * 16), ("manifests", 0), "header_xxh3_64: exp"),
    "shard unit": (put(*SHARD, "unit", value="0" * 32), ("manifests", 0), r"fls\.unit: expected"),
    "shard unit no digest": (put(*SHARD, "unit", value="x"), ("manifests", 0), "32 hexadecimal digits"),
    "shard rows": (put(*SHARD, "rows", value=3), ("manifests", 0), "moments: expected"),
    "shard rows too few": (put(*SHARD, "rows", value=0), ("manifests", 0), "expected at least 1, got 0"),
    "shard bucket": (put(*SHARD, "bucket", value=1), ("manifests", 0), "expected bucket 1"),
    "shard statistics": (put(*SHARD, "statistics", "mean", value=[None]), ("manifests", 0), "statistics"),
    "no statistics": (drop(*SHARD, "statistics"), ("manifests", 0), "'statistics'"),
    "shards no list": (put("shards", value={}), ("manifests", 0), "'shards'"),
    "statistics of more channels": (
        lambda value: {k: v * 2 if k != "count" else v for k, v in value.items()}, ("statistics",), "4 channels",
    ),
    "quarantine without a reason": (drop("files", 0, "reason"), ("quarantine",), "'reason'"),
    "quarantine digest": (put("files", 0, "digest", value="x"), ("quarantine",), "'digest'"),
    "quarantine size": (put("files", 0, "size", value=-1), ("quarantine",), "'size'"),
}  # fmt: skip


@pytest.mark.parametrize("name", ROOT_LIES)
def test_a_root_that_lies_is_refused(dataset, name):
    change, match = ROOT_LIES[name]
    edit(dataset, change)
    with pytest.raises(ValueError, match=match):
        read_all(dataset)


@pytest.mark.parametrize("name", FILE_LIES)
def test_a_file_that_lies_is_refused(dataset, name):
    change, where, match = FILE_LIES[name]
    edit(dataset, change, *where)
    with pytest.raises(ValueError, match=match):
        read_all(dataset)


def relie(dataset, change):
    """Alter the columns of the index, and make the digests right again."""
    root = json.loads((dataset / "dataset.json").read_bytes())
    path = dataset / root["indexes"][0]["path"]
    data = bytearray(path.read_bytes())
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    change(header, data, 8 + length)
    data[8 : 8 + length] = json.dumps(header).encode().ljust(length)
    path.write_bytes(data)
    edit(dataset, put("indexes", 0, "xxh3_128", value=xxhash.xxh3_128_hexdigest(bytes(data))))


def column(name, dtype, row, value):
    def change(header, data, start):
        at = start + header[name]["data_offsets"][0] + row * np.dtype(dtype).itemsize
        data[at : at + np.dtype(dtype).itemsize] = np.array(value, dtype).tobytes()

    return change


INDEX_LIES = {
    "shard past the end": (column("shard", "<u4", 2, 5), "past the end of a shard"),
    "row past the end": (column("row", "<u4", 2, 2), "past the end of a shard"),
    "row far past the end": (column("row", "<u4", 2, 0xFFFFFFFF), "past the end of a shard"),
    "bucket": (column("bucket", "<u2", 2, 1), "different buckets"),
    "label": (column("label", "<i8", 2, 4), "labels outside"),
    "label negative": (column("label", "<i8", 2, -2), "labels outside"),
    "keys do not begin at 0": (column("key.offsets", "<u8", 0, 1), "key.offsets to rise"),
    "keys fall": (column("key.offsets", "<u8", 2, 1), "key.offsets to rise"),
    "keys past the end": (column("key.offsets", "<u8", 5, 1 << 40), "key.offsets to rise"),
    "dtype": (lambda h, d, s: h["label"].update(dtype="U64"), "'label': expected"),
    "shape": (lambda h, d, s: h["crop"].update(shape=[4, 5]), "'crop': expected"),
    "another dataset's": (lambda h, d, s: h["__metadata__"].update({"fls.fingerprint": "x"}), "expected the index of"),
    "another format": (lambda h, d, s: h["__metadata__"].update({"fls.format": "fls/2"}), "expected the index of"),
    "a column is missing": (lambda h, d, s: h.update(gone=h.pop("row")), "'label'|'row': expected|expected"),
}


@pytest.mark.parametrize("name", INDEX_LIES)
def test_an_index_that_lies_is_refused(dataset, name):
    change, match = INDEX_LIES[name]
    relie(dataset, change)
    with pytest.raises(ValueError, match=match):
        read_all(dataset)


def test_any_flipped_bit_outside_the_latents_is_found(dataset):
    # Every byte of dataset.json and of the JSON files it names; some of the index; headers of the shards. What is not
    # covered: the latents (their digests are in the manifest; reading all of them is for a full check), and the
    # informational part of provenance.json.
    draw = np.random.default_rng(0)
    root = json.loads((dataset / "dataset.json").read_bytes())
    records = [*root["manifests"], *root["indexes"], root["statistics"], root["quarantine"]]
    files = {dataset / record["path"]: record["bytes"] for record in records}
    files[dataset / "dataset.json"] = (dataset / "dataset.json").stat().st_size
    files |= {path: 4096 for path in (dataset / "shards").rglob("*.safetensors")}
    for path, size in files.items():
        data = path.read_bytes()
        places = range(size) if path.name == "dataset.json" else draw.choice(size, 40, replace=False)
        for at in places:
            damaged = bytearray(data)
            damaged[at] ^= 1 << draw.integers(8)
            path.write_bytes(damaged)
            with pytest.raises(ValueError):
                read_all(dataset)
        path.write_bytes(data)
    read_all(dataset)


def test_truncated_extended_and_missing_files_are_found(dataset, toy):
    root = json.loads((dataset / "dataset.json").read_bytes())
    records = [*root["manifests"], *root["indexes"], root["statistics"], root["quarantine"]]
    names = [record["path"] for record in records] + ["dataset.json", "provenance.json"]
    names += [path.relative_to(dataset).as_posix() for path in (dataset / "shards").rglob("*.safetensors")]
    for name in names:
        path = dataset / name
        data = path.read_bytes()
        for size in (0, 1, len(data) // 2, len(data) - 2):
            path.write_bytes(data[:size])
            with pytest.raises(ValueError, match=path.name):
                read_all(dataset)
        path.write_bytes(data + b"x")
        with pytest.raises(ValueError, match=path.name):
            read_all(dataset)
        path.unlink()
        with pytest.raises(ValueError, match=path.name):
            read_all(dataset)
        path.write_bytes(data)
    read_all(dataset)


def test_a_shard_of_another_dataset_is_found(dataset, toy, source, tmp_path):
    other = {"hashed": {"size": 1}, "informational": {}}
    toy.build(tmp_path / "other", source, provenance=other)
    ours, theirs = Dataset.open(dataset), Dataset.open(tmp_path / "other")
    assert ours.shards[0].bytes == theirs.shards[0].bytes
    shutil.copyfile(theirs.path / theirs.shards[0].path, ours.path / ours.shards[0].path)
    with pytest.raises(ValueError, match="restore it from a copy"):
        ours.open_shard(0)


def test_a_link_that_leads_outside_is_refused(dataset, tmp_path):
    (dataset / "shards").rename(tmp_path / "elsewhere")
    (dataset / "shards").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="a link to"):
        Dataset.open(dataset)


def test_a_dataset_behind_a_link_is_fine(dataset, tmp_path):
    (tmp_path / "link").symlink_to(dataset)
    assert len(read_all(tmp_path / "link")) == 5
    shutil.copytree(dataset, tmp_path / "copy")
    assert len(read_all(tmp_path / "copy")) == 5
    assert len(read_all(Path(os.path.relpath(dataset)))) == 5


def test_what_is_no_dataset_says_what_it_is(toy, tmp_path, source):
    with pytest.raises(ValueError, match="got no folder"):
        Dataset.open(tmp_path / "none")
    with pytest.raises(ValueError, match=r"expected a dataset, got a folder with \['ant', 'bee', 'cat'\]"):
        Dataset.open(source)
    assert build_state(tmp_path / "none") is None and build_state(source) is None
    path = tmp_path / "d"
    entries, classes = toy.scan(source)
    with DatasetWriter.open(path, toy.PROVENANCE, classes, unit_rows=2, schema=toy.SCHEMA) as writer:
        with pytest.raises(ValueError, match=rf"still going on \(pid {os.getpid()} on .*, 0 of 0 units done\)"):
            Dataset.open(path)
        assert build_state(path).planned_units == 0
    with pytest.raises(ValueError, match="interrupted before its first unit: rerun the same encode command"):
        Dataset.open(path)
    assert build_state(path) is None
    with DatasetWriter.open(path, toy.PROVENANCE, classes, unit_rows=2, schema=toy.SCHEMA) as writer:
        units = writer.plan(entries)
        writer.commit(units[0], *toy.encode(units[0]))
        with pytest.raises(ValueError, match=r"still going on .* 1 of 3 units done"):
            Dataset.open(path)
    with pytest.raises(ValueError, match=r"interrupted \(1 of 3 units done\): rerun the same encode command"):
        Dataset.open(path)


def test_the_speed_of_an_encode_is_that_of_its_last_shards(toy, tmp_path, source):
    path = tmp_path / "d"
    toy.make_source(source, [f"ant/more{i}.jpg" for i in range(5)])
    entries, classes = toy.scan(source)
    with DatasetWriter.open(path, toy.PROVENANCE, classes, unit_rows=1, schema=toy.SCHEMA) as writer:
        units = writer.plan(entries)
        writer.commit(units[0], *toy.encode(units[0]))
        assert build_state(path).rows_per_second is None  # of one shard nothing can be told
        for unit in units[1:6]:
            writer.commit(unit, *toy.encode(unit))
    # A row every 2 s; the night that the machine was off is no part of the speed.
    for unit, written in zip(units[:6], (0, 2, 4, 6, 36_006, 36_008), strict=True):
        for shard in path.rglob(f"{unit.id}*.safetensors"):
            os.utime(shard, (1e9 + written, 1e9 + written))
    assert build_state(path).rows_per_second == pytest.approx(0.5)
    # Two processes at one pace write two shards within 10 ms of every 10 s: those 10 s are no pause between two runs.
    for unit, written in zip(units[:6], (0, 0.01, 10, 10.01, 20, 20.01), strict=True):
        for shard in path.rglob(f"{unit.id}*.safetensors"):
            os.utime(shard, (1e9 + written, 1e9 + written))
    assert build_state(path).rows_per_second == pytest.approx(5 / 20.01)


def test_build_state_of_a_second_generation(toy, change, tmp_path, source):
    path = tmp_path / "d"
    toy.build(path, source)
    change(source)
    entries, classes = toy.scan(source)
    with DatasetWriter.open(path, toy.PROVENANCE, classes, unit_rows=2, schema=toy.SCHEMA) as writer:
        units = writer.plan(entries)
        writer.commit(units[0], *toy.encode(units[0]))
    state = build_state(path)
    assert (state.last_generation, state.planned_units, state.done_units) == (1, 2, 1)
    assert (state.planned_rows, state.done_rows, state.quarantined) == (3, 1, 1)
    assert state.bytes == sum(p.stat().st_size for p in path.rglob("*.safetensors") if units[0].id in p.name)
    assert Dataset.open(path).generation == 1  # the encode that is going on is nothing to a reader


def test_a_reader_that_is_open_keeps_its_generation(toy, change, tmp_path, source):
    path = tmp_path / "d"
    toy.build(path, source)
    opened = Dataset.open(path)
    change(source)
    toy.build(path, source)
    assert len(read_all(path)) == 5 and Dataset.open(path).generation == 2
    assert [opened.key(i) for i in range(5)] == ["ant/1.jpg", "ant/2.jpg", "bee/1.jpg", "bee/2.jpg", "cat/1.jpg"]
    for i in range(3):
        opened.open_shard(i)
