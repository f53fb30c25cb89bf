"""A corpus of damaged datasets, made from one that is sound, and who finds the damage: see `CORPUS`."""

import json
import mmap
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import xxhash

from fastlatent.store.files import canonical_json
from fastlatent.store.reader import Dataset, root_digest
from fastlatent.store.writer import DatasetWriter

PAGE = 4096
KEYS = ["ant/1.jpg", "ant/2.jpg", "bee/1.jpg", "bee/2.jpg", "cat/1.jpg", "cat/2.jpg"]  # three shards of one size


@pytest.fixture(scope="module")
def sound(tmp_path_factory, toy):
    folder = tmp_path_factory.mktemp("sound")
    source = toy.make_source(folder / "source", KEYS)
    toy.write_file(source, "cat/bad.jpg", b"bad bytes")
    toy.build(folder / "d", source)
    return folder / "d"


@pytest.fixture
def path(sound, tmp_path):
    return Path(shutil.copytree(sound, tmp_path / "d"))


def root(path):
    return json.loads((path / "dataset.json").read_bytes())


def shards(path):
    return [path / record.path for record in Dataset.open(path).shards]


def header(file):
    """Name -> where its bytes begin and end in the file; "" is the header."""
    data = file.read_bytes()
    start = 8 + struct.unpack("<Q", data[:8])[0]
    entries = json.loads(data[8:start])
    places = {k: [start + at for at in v["data_offsets"]] for k, v in entries.items() if k != "__metadata__"}
    return {"": (0, start), **places}


def flip(file, at, bit=0):
    data = bytearray(file.read_bytes())
    data[at] ^= 1 << bit
    file.write_bytes(data)


def flip_column(name, number=0):
    """In the middle of a column of a shard."""

    def damage(path):
        begin, end = header(shards(path)[number])[name]
        flip(shards(path)[number], (begin + end) // 2)

    return damage


def resize(pattern, change):
    def damage(path):
        file = sorted(path.glob(pattern))[0]
        data = file.read_bytes()
        file.write_bytes(data[:change] if change < 0 else data + bytes(change))

    return damage


def flip_file(pattern):
    def damage(path):
        file = sorted(path.glob(pattern))[0]
        flip(file, file.stat().st_size // 2)

    return damage


def zero_page(column):
    """The page on which a column of the first shard begins."""

    def damage(path):
        file = shards(path)[0]
        begin = header(file)[column][0]
        data = file.read_bytes()
        assert any(data[begin : begin + PAGE])
        file.write_bytes(data[:begin] + bytes(len(data[begin : begin + PAGE])) + data[begin + PAGE :])

    return damage


def swap_shards(path):
    one, other, _ = shards(path)
    first, second = one.read_bytes(), other.read_bytes()
    assert len(first) == len(second) and first != second
    one.write_bytes(second)
    other.write_bytes(first)


def swap_rows(path):
    """The latents of two samples, and nothing else."""
    file = shards(path)[0]
    begin, end = header(file)["moments"]
    data = file.read_bytes()
    middle = (begin + end) // 2
    file.write_bytes(data[:begin] + data[middle:end] + data[begin:middle] + data[end:])


def remove(pattern):
    return lambda path: sorted(path.glob(pattern))[0].unlink()


def edit(change):
    """Alter dataset.json and make its own digest right again."""

    def damage(path):
        value = root(path)
        change(value)
        (path / "dataset.json").write_bytes(canonical_json(value | {"xxh3_128": root_digest(value)}))

    return damage


def lie(path):
    """A latent is altered, and the digest of its file in manifest and dataset.json is made right again."""
    flip_column("moments")(path)
    value = root(path)
    record = value["manifests"][0]
    manifest = json.loads((path / record["path"]).read_bytes())
    manifest["shards"][0]["xxh3_128"] = xxhash.xxh3_128_hexdigest(shards(path)[0].read_bytes())
    data = canonical_json(manifest)
    (path / record["path"]).write_bytes(data)
    record |= {"bytes": len(data), "xxh3_128": xxhash.xxh3_128_hexdigest(data)}
    edit(lambda root: root.update(manifests=value["manifests"]))(path)


def big_header(path):
    """A header that says it has 2 GiB, in a file that is long enough for it (sparse: it takes no space)."""
    with open(shards(path)[0], "r+b") as file:
        file.write(struct.pack("<Q", 1 << 31))
        file.truncate((1 << 31) + PAGE)


def link_outside(path):
    (path / "manifest").rename(path.parent / "elsewhere")
    (path / "manifest").symlink_to(path.parent / "elsewhere")


def twice(pattern, name):
    """A JSON file in which a name occurs twice, with the same value."""

    def damage(path):
        file = sorted(path.glob(pattern))[0]
        value = json.loads(file.read_bytes())[name]
        again = f'{{"{name}":{json.dumps(value)},'.encode()
        file.write_bytes(file.read_bytes().replace(b"{", again, 1))

    return damage


# Who finds it: `root` (Dataset.open: all files but the shards), `shard` (open_shard: size and header), `file` (the
# digest of a whole shard), `row` (row_xxh3, where a row is read); and what the error says. Whatever `root` or `shard`
# does not find is found by `file`, except for what a liar made; whatever alters a latent, by `row` too.
CORPUS = {
    "dataset.json truncated": (resize("dataset.json", -9), "root", "expected JSON"),
    "dataset.json extended": (resize("dataset.json", 1), "root", "expected JSON"),
    "dataset.json flipped": (flip_file("dataset.json"), "root", "dataset.json: "),
    "dataset.json of a newer version": (edit(lambda root: root.update(format="fls/2")), "root", "a newer one"),
    "dataset.json says a name twice": (twice("dataset.json", "format"), "root", "occurs twice"),
    "dataset.json missing": (remove("dataset.json"), "root", "dataset.json"),
    "provenance.json flipped": (flip_file("provenance.json"), "root", "provenance.json: "),
    "provenance.json missing": (remove("provenance.json"), "root", "provenance.json: "),
    "provenance.json says a name twice": (twice("provenance.json", "hashed"), "root", "occurs twice"),
    "manifest truncated": (resize("manifest/*", -1), "root", "manifest/000001.json: expected"),
    "manifest extended": (resize("manifest/*", 1), "root", "manifest/000001.json: expected"),
    "manifest flipped": (flip_file("manifest/*"), "root", "manifest/000001.json: expected"),
    "manifest says a name twice": (twice("manifest/*", "format"), "root", "manifest/000001.json: expected"),
    "manifest missing": (remove("manifest/*"), "root", "manifest/000001.json: expected"),
    "index truncated": (resize("index/*", -1), "root", "the file was truncated"),
    "index extended": (resize("index/*", 1), "root", "the file was extended"),
    "index flipped": (flip_file("index/*"), "root", "index/000001.safetensors: "),
    "index missing": (remove("index/*"), "root", "index/000001.safetensors: "),
    "statistics flipped": (flip_file("statistics/*"), "root", "statistics/000001.json: "),
    "statistics missing": (remove("statistics/*"), "root", "statistics/000001.json: "),
    "quarantine flipped": (flip_file("quarantine/*"), "root", "quarantine/000001.json: "),
    "quarantine missing": (remove("quarantine/*"), "root", "quarantine/000001.json: "),
    "a path with ..": (
        edit(lambda root: root["indexes"][0].update(path="../d/index/000001.safetensors")), "root", "a path inside",
    ),
    "an absolute path": (edit(lambda root: root["manifests"][0].update(path="/etc/passwd")), "root", "a path inside"),
    "a link that leads outside": (link_outside, "root", "a path inside"),
    "shard missing": (lambda path: shards(path)[1].unlink(), "shard", "No such file"),
    "shard truncated": (resize("shards/*/*", -1), "shard", "the file was truncated"),
    "shard cut to a page": (lambda path: os.truncate(shards(path)[0], PAGE), "shard", "the file was truncated"),
    "shard empty": (lambda path: os.truncate(shards(path)[0], 0), "shard", "the file was truncated"),
    "shard extended": (resize("shards/*/*", 1), "shard", "the file was extended"),
    "shard's header flipped": (flip_column(""), "shard", "expected"),
    "shard's header zeroed": (zero_page(""), "shard", "got a length of 0"),
    "shard's header of 2 GiB": (big_header, "shard", "the file was extended"),
    "two shards swapped": (swap_shards, "shard", "restore it from a copy"),
    "key offsets flipped": (flip_column("key.offsets"), "shard", "key.offsets to rise"),
    "key offsets zeroed": (zero_page("key.offsets"), "shard", "key.offsets to rise"),
    "keys flipped": (flip_column("key.utf8"), "file", ""),
    "sample ids flipped": (flip_column("sample_id"), "file", ""),
    "source digests flipped": (flip_column("src_xxh3"), "file", ""),
    "crops zeroed": (zero_page("crop"), "file", ""),
    "a pad flipped": (flip_column("_pad.0"), "file", ""),
    "a latent flipped": (flip_column("moments"), "file row", ""),
    "a latent of the last shard flipped": (flip_column("moments", 2), "file row", ""),
    "latents zeroed": (zero_page("moments"), "file row", ""),
    "two latents swapped": (swap_rows, "file row", ""),
    "row digests flipped": (flip_column("row_xxh3"), "file row", ""),
    "row digests zeroed": (zero_page("row_xxh3"), "file row", ""),
    "a latent flipped, its file's digest made right": (lie, "row", ""),
}  # fmt: skip


def found_by(path) -> tuple[str, str]:
    """Which of the four checks of `CORPUS` find something, and the error of the first two. Needs no store/verify.py."""
    try:
        dataset = Dataset.open(path)
    except ValueError as error:
        return "root", str(error)
    found = set()
    for i, record in enumerate(dataset.shards):
        try:
            columns = dataset.open_shard(i).columns
        except ValueError as error:
            assert Path(record.path).name in str(error)
            return "shard", str(error)
        if xxhash.xxh3_128_hexdigest((path / record.path).read_bytes()) != record.xxh3_128:
            found.add("file")
        if [xxhash.xxh3_64_intdigest(row.tobytes()) for row in columns["moments"]] != columns["row_xxh3"].tolist():
            found.add("row")
    return " ".join(sorted(found)), ""


@pytest.mark.parametrize("name", CORPUS)
def test_damage_is_found(path, name):
    damage, expected, message = CORPUS[name]
    assert found_by(path) == ("", "")
    damage(path)
    found, error = found_by(path)
    assert (found, message in error) == (expected, True), error
    assert not error or str(path) in error


@pytest.mark.parametrize("count", [60, pytest.param(1000, marks=pytest.mark.soak)])
def test_a_flipped_bit_anywhere_is_found(path, count):
    """In any file of the dataset; and no altered latent passes the check of its row."""
    draw = np.random.default_rng(count)
    inside = sorted(shards(path))
    files = [path / "dataset.json", *path.glob("*/000001.*"), *inside]
    files = [file for file in files if file.parent.name not in ("plan", "generation")]
    sizes = [file.stat().st_size for file in files]
    for place in draw.integers(sum(sizes), size=count).tolist():
        number = int(np.searchsorted(np.cumsum(sizes), place, side="right"))
        file, at, bit = files[number], place - sum(sizes[:number]), int(draw.integers(8))
        begin, end = header(file)["moments"] if file in inside else (0, 0)
        flip(file, at, bit)
        found, _ = found_by(path)
        assert found, (file, at, bit)
        assert "row" in found or not begin <= at < end, (file, at, bit)
        flip(file, at, bit)
    assert found_by(path) == ("", "")


# Of an encode that was interrupted: what is damaged, and what the next one says. None: it goes on, to the same bytes.
PENDING = {
    "nothing": (lambda path: None, None),
    "journal missing": (remove("journal/*"), None),
    "last line torn": (resize("journal/*", -7), None),
    "last line zeroed to its end": (lambda path: zero_line(path, 1), None),
    "last line without its newline": (resize("journal/*", -1), None),
    "journal empty": (lambda path: os.truncate(next(path.glob("journal/*")), 0), None),
    "first line zeroed": (lambda path: zero_line(path, 0), r"\.jsonl: line 1 .*delete the file"),
    "first line says a name twice": (lambda path: name_twice(path), r"\.jsonl: line 1 .*occurs twice"),
    "a shard is missing": (remove("shards/*/*"), None),
    "a shard is truncated": (resize("shards/*/*", -1), None),
    "an unfinished file": (lambda path: (path / f"shards/.tmp-x-{'0' * 32}").write_bytes(b"x"), None),
    "plan missing": (remove("plan/*.json"), None),
    "plan truncated": (resize("plan/*.json", -1), r"plan/000001\.json"),
    "plan of another dataset": (lambda path: replan(path, "fingerprint", "0" * 64), r"plan/000001\.json.*delete the f"),
    "plan of a newer version": (lambda path: replan(path, "format", "fls/2"), r"plan/000001\.json.*'fls/1'"),
}  # fmt: skip


def zero_line(path, number):
    file = next(path.glob("journal/*"))
    lines = file.read_bytes().split(b"\n")
    lines[number] = bytes(len(lines[number]))
    file.write_bytes(b"\n".join(lines))


def name_twice(path):
    file = next(path.glob("journal/*"))
    file.write_bytes(b'{"unit":"","unit":"",' + file.read_bytes()[1:])


def replan(path, name, value):
    file = next(path.glob("plan/*.json"))
    file.write_bytes(canonical_json(json.loads(file.read_bytes()) | {name: value}))


@pytest.mark.parametrize("name", PENDING)
def test_damage_to_an_encode_in_progress(sound, toy, tmp_path, name):
    damage, message = PENDING[name]
    source, path = sound.parent / "source", tmp_path / "d"
    entries, classes = toy.scan(source)
    with DatasetWriter.open(path, toy.PROVENANCE, classes, unit_rows=2, schema=toy.SCHEMA) as writer:
        for unit in writer.plan(entries)[:2]:
            writer.commit(unit, *toy.encode(unit))
    damage(path)
    if message:
        with pytest.raises(ValueError, match=message):
            toy.build(path, source)
        remove("journal/*" if "jsonl" in message else "plan/*.json")(path)  # the way out that the error names
    toy.build(path, source)
    assert toy.contents(path) == toy.contents(sound)


def test_keys_that_differ_in_case_or_normal_form_are_different_samples(toy, tmp_path):
    keys = ["ant/a.jpg", "ant/A.jpg", "Ant/a.jpg", "ant/\u00e9.jpg", "ant/e\u0301.jpg"]
    source = toy.make_source(tmp_path / "source", keys)
    if len(list(source.rglob("*.jpg"))) != len(keys):
        pytest.skip("this file system takes some of them for one file")
    toy.build(tmp_path / "d", source)
    dataset = Dataset.open(tmp_path / "d")
    assert {dataset.key(i) for i in range(len(dataset))} == set(keys) and len(set(dataset.key_hash.tolist())) == 5
    for i in range(len(dataset)):
        stored = dataset.open_shard(int(dataset.shard[i])).columns["moments"][dataset.row[i]]
        np.testing.assert_array_equal(stored, toy.row(source / dataset.key(i)))
    names = [file.name.lower() for file in shards(tmp_path / "d")]
    assert len(set(names)) == len(names)  # the shards themselves may lie where case does not count


# What a reader that has a shard open sees when somebody truncates it. Touching a mapped page that is gone kills the
# process (SIGBUS): nothing in user space prevents it, and the size check at open is all that the hot path has. pread
# comes back short, and madvise (MADV_POPULATE_READ) says EFAULT; both can be survived.
TRUNCATED = """
import errno, mmap, os, resource, sys
from fastlatent.store.reader import Dataset
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
dataset = Dataset.open(sys.argv[1])
shard = dataset.open_shard(0)
fd = os.open(shard.path, os.O_RDONLY)
os.truncate(shard.path, 4096)
try:
    Dataset.open(sys.argv[1]).open_shard(0)
except ValueError as error:
    print("the file was truncated" in str(error))
print(len(os.pread(fd, 4096, shard.bytes - 64)))
try:
    shard.mapping.madvise(22)  # MADV_POPULATE_READ, Linux 5.14
except OSError as error:
    print(errno.errorcode[error.errno])
sys.stdout.flush()
print(shard.columns["moments"].sum())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="SIGBUS and MADV_POPULATE_READ are Linux's")
def test_a_file_that_is_truncated_under_an_open_reader(path):
    assert shards(path)[0].stat().st_size > 2 * mmap.PAGESIZE
    done = subprocess.run([sys.executable, "-c", TRUNCATED, path], capture_output=True, text=True, timeout=60)
    reopened, read, populated, *rest = done.stdout.split()
    assert (reopened, read, rest) == ("True", "0", [])
    assert populated in ("EFAULT", "EINVAL")  # EINVAL: a kernel that does not have it
    assert done.returncode == -7, done.stderr  # SIGBUS, from the mapping alone
