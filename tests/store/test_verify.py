"""Damage of every kind is found, named by sample where it is a sample's, and nothing is changed."""

import json
import os
import random
import shutil
import struct

import numpy as np
import pytest
import xxhash

from fastlatent.store.files import canonical_json
from fastlatent.store.reader import Dataset, root_digest
from fastlatent.store.verify import verify


def row_at(dataset, i):
    """The shard that sample i lies in, and the byte at which its latent begins."""
    opened = Dataset.open(dataset)
    path = dataset / opened.shards[opened.shard[i]].path
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    entry = json.loads(data[8 : 8 + length])["moments"]
    return path, 8 + length + entry["data_offsets"][0] + int(opened.row[i]) * 32


def rewrite(dataset, name, change):
    """Let `change` alter the JSON of dataset.json's file `name`, and make the digests above it right, as a liar would.

    `name` is a list of members of dataset.json that lead to the file's record; without any, dataset.json itself.
    """
    root = json.loads((dataset / "dataset.json").read_bytes())
    record = root
    for member in name:
        record = record[member]
    if name:
        value = json.loads((dataset / record["path"]).read_bytes())
        change(value)
        data = canonical_json(value)
        (dataset / record["path"]).write_bytes(data)
        record |= {"bytes": len(data), "xxh3_128": xxhash.xxh3_128_hexdigest(data)}
    else:
        change(root)
    root["xxh3_128"] = root_digest(root)
    (dataset / "dataset.json").write_bytes(canonical_json(root))


def forge(dataset, path, data):
    """Write a shard with other latents, and make every digest of it right: of its rows, the file, and above."""
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    begin, end = (8 + length + at for at in header["moments"]["data_offsets"])
    digests = [xxhash.xxh3_64_intdigest(bytes(data[at : at + 32])) for at in range(begin, end, 32)]
    at = 8 + length + header["row_xxh3"]["data_offsets"][0]
    data[at : at + 8 * len(digests)] = np.array(digests, "<u8").tobytes()
    path.write_bytes(data)
    name = path.relative_to(dataset).as_posix()
    manifests = json.loads((dataset / "dataset.json").read_bytes())["manifests"]

    def change(manifest):
        for shard in manifest["shards"]:
            if shard["path"] == name:
                shard["xxh3_128"] = xxhash.xxh3_128_hexdigest(bytes(data))

    for i in range(len(manifests)):
        rewrite(dataset, ["manifests", i], change)


def found(path, full=True):
    return verify(path, full=full, threads=2).findings


@pytest.mark.parametrize("full", [False, True])
def test_a_sound_dataset(dataset, toy, full):
    before = toy.contents(dataset)
    calls = []
    report = verify(dataset, full=full, threads=2, on_progress=lambda *done: calls.append(done))
    assert report.findings == []
    assert (report.generation, report.rows, report.shards, report.full) == (2, 5, 5, full)
    sizes = sum(path.stat().st_size for path in dataset.rglob("shards/*/*"))
    assert report.bytes == (sizes if full else 0)
    assert calls == [(i, 5) for i in range(1, 6)]
    assert toy.contents(dataset) == before


def test_no_lock_and_no_write_permission_is_needed(dataset):
    (dataset / ".lock").unlink()
    assert found(dataset) == []
    assert not (dataset / ".lock").exists()


def covered(dataset):
    """Every byte that something records the digest of: file -> its size. Not the informational part of provenance."""
    root = json.loads((dataset / "dataset.json").read_bytes())
    records = [*root["manifests"], *root["indexes"], root["statistics"], root["quarantine"]]
    files = [dataset / record["path"] for record in records]
    files += [dataset / shard.path for shard in Dataset.open(dataset).shards]
    return {path: path.stat().st_size for path in [*files, dataset / "dataset.json"]}


@pytest.mark.parametrize("flips", [60, pytest.param(1000, marks=pytest.mark.soak)])
def test_single_bit_flips_are_found(dataset, flips):
    draw = random.Random(flips)
    files = covered(dataset)
    for i in range(flips):
        # One in four places outside the shards, which are most of the bytes.
        shards = [path for path in files if path.parent.parent.name == "shards"]
        path = draw.choice(shards if i % 4 else sorted(files.keys() - set(shards)))
        data = bytearray(path.read_bytes())
        at = draw.randrange(len(data))
        data[at] ^= 1 << draw.randrange(8)
        kept = path.read_bytes()
        path.write_bytes(data)
        findings = found(dataset)
        assert any(path == dataset / one.path for one in findings), f"{path} byte {at}"
        path.write_bytes(kept)
    assert found(dataset) == []


def test_the_damaged_sample_is_named(dataset):
    opened = Dataset.open(dataset)
    for i in range(len(opened)):
        path, at = row_at(dataset, i)
        data = bytearray(path.read_bytes())
        data[at + 5] ^= 8
        kept = path.read_bytes()
        path.write_bytes(data)
        named = [one.key for one in found(dataset) if one.key is not None]
        assert named == [opened.key(i)]
        assert found(dataset, full=False) == []  # headers alone do not tell
        path.write_bytes(kept)


def test_a_zeroed_page_is_found(dataset, toy):
    for path in sorted(dataset.rglob("shards/*/*")):
        data = path.read_bytes()
        for start in range(0, len(data), 4096):
            if any(data[start : start + 4096]):
                path.write_bytes(data[:start] + bytes(len(data[start : start + 4096])) + data[start + 4096 :])
                assert any(path == dataset / one.path for one in found(dataset))
        path.write_bytes(data)


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("change", ["truncated", "extended", "missing", "empty", "a folder", "no permission"])
def test_files_of_another_size_are_found(dataset, change, full):
    if change == "no permission" and os.geteuid() == 0:
        pytest.skip("root may read everything")
    for path in covered(dataset):
        if change == "a folder" and path.name == "dataset.json":
            continue  # then it is no dataset
        data = path.read_bytes()
        path.unlink()
        if change == "a folder":
            path.mkdir()
        elif change != "missing":
            path.write_bytes({"truncated": data[:-2], "extended": data + b"x", "empty": b""}.get(change, data))
        if change == "no permission":
            path.chmod(0)
        findings = found(dataset, full)
        assert any(path == dataset / one.path for one in findings), path
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        path.write_bytes(data)
    assert found(dataset, full) == []


@pytest.mark.parametrize("full", [False, True])
def test_two_shards_swapped_are_found(dataset, full):
    # Of one size, so that neither size nor the header's own consistency tells.
    pairs = {}
    for shard in Dataset.open(dataset).shards:
        pairs.setdefault(shard.bytes, []).append(dataset / shard.path)
    one, other = next(paths for paths in pairs.values() if len(paths) > 1)[:2]
    one.rename(dataset / "x")
    other.rename(one)
    (dataset / "x").rename(other)
    assert {dataset / each.path for each in found(dataset, full)} == {one, other}


def test_nan_behind_right_digests_is_found(dataset):
    # As a writer would leave it that does not check: every digest up to dataset.json is made right again.
    opened = Dataset.open(dataset)
    path, at = row_at(dataset, 2)
    key = opened.key(2)
    data = bytearray(path.read_bytes())
    data[at : at + 2] = struct.pack("<e", float("nan"))
    forge(dataset, path, data)
    assert Dataset.open(dataset)
    findings = found(dataset)
    assert [(one.key, one.what) for one in findings] == [(key, "it holds NaN or infinity")]


def test_wrong_statistics_of_a_shard_are_found(dataset):
    path, at = row_at(dataset, 2)
    data = bytearray(path.read_bytes())
    data[at : at + 2] = struct.pack("<e", 1.25)
    forge(dataset, path, data)
    (finding,) = found(dataset)
    assert dataset / finding.path == path and "statistics" in finding.what


def relabel_index(dataset, column, row, value):
    """Put a value into a column of the index, and make the digests above it right."""
    root = json.loads((dataset / "dataset.json").read_bytes())
    path = dataset / root["indexes"][0]["path"]
    data = bytearray(path.read_bytes())
    length = struct.unpack("<Q", data[:8])[0]
    entry = json.loads(data[8 : 8 + length])[column]
    size = len(value)
    begin = 8 + length + entry["data_offsets"][0] + row * size
    data[begin : begin + size] = value
    path.write_bytes(data)
    digest = xxhash.xxh3_128_hexdigest(bytes(data))
    rewrite(dataset, [], lambda root: root["indexes"][0].update(xxh3_128=digest))


@pytest.mark.parametrize(
    ("column", "value", "what"),
    [
        ("key_hash", np.uint64(7), "hash"),
        ("src_xxh3", np.array([1, 2], np.uint64), "src_xxh3"),
        ("crop", np.array([1, 2, 3, 4], np.int32), "crop"),
        ("orig_hw", np.array([1, 2], np.int32), "orig_hw"),
        ("row", np.uint32(1), "key: the index and the shard disagree"),
    ],
)
def test_an_index_that_lies_is_found(dataset, column, value, what):
    opened = Dataset.open(dataset)
    shard = opened.shards
    i = next(j for j in range(len(opened)) if shard[opened.shard[j]].rows > 1 and opened.row[j] == 0)
    relabel_index(dataset, column, i, value.tobytes())
    assert any(one.key == opened.key(i) and what in one.what for one in found(dataset))


def test_a_row_or_a_key_twice_is_found(dataset):
    opened = Dataset.open(dataset)
    assert [opened.key(i) for i in range(3)] == ["aardvark/0.jpg", "ant/1.jpg", "bee/1.jpg"]
    relabel_index(dataset, "shard", 1, opened.shard[0].tobytes())
    relabel_index(dataset, "row", 1, opened.row[0].tobytes())
    assert any(one.key == "ant/1.jpg" and "a row of its own" in one.what for one in found(dataset))
    # bee/1.jpg -> ant/1.jpg: the same length, so the offsets hold.
    start = int(opened.key_offsets[2])
    for i, byte in enumerate(b"ant"):
        relabel_index(dataset, "key.utf8", start + i, bytes([byte]))
    assert any(one.key == "ant/1.jpg" and "got this one 2 times" in one.what for one in found(dataset))


def test_a_sample_that_is_also_in_quarantine_is_found(dataset):
    rewrite(dataset, ["quarantine"], lambda value: value["files"][0].update(key="ant/1.jpg"))
    assert any(one.key == "ant/1.jpg" and "quarantine, got both" in one.what for one in found(dataset))


def test_wrong_statistics_of_the_dataset_are_found(dataset):
    def change(statistics):
        statistics["mean"][0] *= 1 + 1e-9

    rewrite(dataset, ["statistics"], change)
    (finding,) = found(dataset)
    assert finding.path == "statistics/000002.json"


def test_damaged_dataset_json_is_a_finding_and_its_copy_serves(dataset):
    path, at = row_at(dataset, 0)
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)
    (dataset / "dataset.json").write_bytes(b'{"torn')
    copies = sorted((dataset / "generation").glob("*.json"))
    assert len(copies) == 2
    assert {one.path for one in found(dataset)} == {"dataset.json", path.relative_to(dataset).as_posix()}
    copies[1].write_bytes(copies[1].read_bytes()[:-9])
    assert {one.path for one in found(dataset)} >= {"dataset.json", "generation/000002.json"}
    for copy in copies:
        copy.write_bytes(b"")
    assert {one.path for one in found(dataset)} == {
        "dataset.json", "generation/000001.json", "generation/000002.json",
    }  # fmt: skip


def test_what_is_no_dataset_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="got no folder"):
        verify(tmp_path / "none", full=True, threads=1)
    with pytest.raises(ValueError, match="expected a dataset, got a folder"):
        verify(tmp_path, full=True, threads=1)


def test_a_path_outside_is_found(dataset, tmp_path):
    (dataset / "shards").rename(tmp_path / "elsewhere")
    (dataset / "shards").symlink_to(tmp_path / "elsewhere")
    findings = found(dataset)
    assert findings and all("a link to" in one.what for one in findings)
