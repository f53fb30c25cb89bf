"""MDS: rows of one and of several columns, shards byte for byte as they were, its reader, hashes, and what is damaged.

`Writer` and `samples` are doubles of the streaming package's writer and reader, made from the format's facts; with
streaming 0.13.0 itself files came out the same.
"""

import hashlib
import json

import numpy as np
import pytest
import torch
import xxhash

from fastlatent.caches import mds
from fastlatent.caches.cache import DamagedEntry, Told
from fastlatent.caches.formats import detect
from fastlatent.config import ConvertConfig, build
from fastlatent.sources.files import open_files
from fastlatent.store.reader import Dataset
from fastlatent.workflows.convert import convert

SIZES = {"int": 8, "ndarray:float16:3,4,4": 96}
DIGESTS = {"sha1": hashlib.sha1, "xxh64": xxhash.xxh64}


def run(source, out, **settings):
    settings = {"scaling_factor": "unknown", "threads": 1, **settings}
    return convert(build(ConvertConfig, {}, {"source": str(source), "out": str(out), **settings}))


class Writer:
    """columns: name -> encoding. Shards of `limit` bytes at most; samples are given as bytes by column."""

    def __init__(self, out, columns, hashes=(), limit=1000):
        out.mkdir(parents=True)
        self.out, self.names, self.limit, self.shards, self.waiting = out, sorted(columns), limit, [], []
        self.config = {
            "version": 2, "format": "mds", "compression": None, "hashes": list(hashes), "size_limit": limit,
            "column_names": self.names, "column_encodings": [columns[name] for name in self.names],
            "column_sizes": [SIZES.get(columns[name]) for name in self.names],
        }  # fmt: skip

    def write(self, sample):
        free = [name for name, size in zip(self.names, self.config["column_sizes"], strict=True) if size is None]
        head = np.array([len(sample[name]) for name in free], np.uint32).tobytes()
        data = head + b"".join(sample[name] for name in self.names)
        config = len(json.dumps(self.config, sort_keys=True))
        if self.waiting and sum(map(len, [*self.waiting, data])) + 4 * len(self.waiting) + config > self.limit:
            self.flush()
        self.waiting.append(data)

    def flush(self):
        config = json.dumps(self.config, sort_keys=True).encode()
        count = len(self.waiting)
        offsets = np.array([0, *map(len, self.waiting)]).cumsum().astype(np.uint32) + 4 + 4 * (count + 1) + len(config)
        data = np.uint32(count).tobytes() + offsets.astype(np.uint32).tobytes() + config + b"".join(self.waiting)
        name = f"shard.{len(self.shards):05}.mds"
        (self.out / name).write_bytes(data)
        hashes = {one: DIGESTS[one](data).hexdigest() for one in self.config["hashes"]}
        raw = {"basename": name, "bytes": len(data), "hashes": hashes}
        self.shards.append({"samples": count, "raw_data": raw, "zip_data": None, **self.config})
        self.waiting = []

    def finish(self):
        self.flush()
        (self.out / "index.json").write_text(json.dumps({"version": 2, "shards": self.shards}, sort_keys=True))


def samples(root):
    """name -> bytes of every sample, in order: what MDSReader.get_sample_data and decode_sample read."""
    for shard in json.loads((root / "index.json").read_text())["shards"]:
        data = (root / shard["raw_data"]["basename"]).read_bytes()
        assert len(data) == shard["raw_data"]["bytes"]
        for i in range(shard["samples"]):
            begin, end = np.frombuffer(data, np.uint32, 2, 4 * (1 + i)).tolist()
            sample, at, sizes = data[begin:end], 0, []
            for size in shard["column_sizes"]:
                if not size:
                    size, at = int(np.frombuffer(sample, np.uint32, 1, at)[0]), at + 4
                sizes.append(size)
            values = {}
            for name, size in zip(shard["column_names"], sizes, strict=True):
                values[name], at = sample[at : at + size], at + size
            assert at == len(sample)
            yield values


def make(root, count=7, seed=0, hashes=("sha1", "xxh64"), empty=True, **more):
    """As MosaicML's precompute_latents.py: bytes of float16, none where the image was too small."""
    draw = np.random.default_rng(seed)
    columns = {
        "latents_32": "bytes",
        "latents_64": "bytes",
        "caption_latents": "bytes",
        "caption": "str",
        "width": "int",
    }
    writer = Writer(root, columns | {name: "pkl" for name in more}, hashes, limit=2600)
    for i in range(count):
        writer.write({
            "latents_32": draw.standard_normal((4, 4, 4)).astype("<f2").tobytes(),
            "latents_64": draw.standard_normal((4, 8, 8)).astype("<f2").tobytes() if i % 3 or not empty else b"",
            "caption_latents": draw.bytes(40), "caption": f"ein Käfer {i}".encode(),
            "width": (100 + i).to_bytes(8, "little"), **more,
        })  # fmt: skip
    writer.finish()
    return list(samples(root))


def opened(root, shape=()):
    files = open_files(root)
    return mds.open_cache(files, files.listing(), Told(shape))


def tree(root):
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in root.rglob("*") if path.is_file() and not path.name.startswith(".")
    }  # fmt: skip


def row_of(dataset, key):
    i = next(i for i in range(len(dataset)) if dataset.key(i) == key)
    return dataset.open_shard(int(dataset.shard[i])).columns["latents"][dataset.row[i]]


def test_both_sizes_become_rows_and_the_shards_come_back(tmp_path, capsys):
    made = make(tmp_path / "cache")
    files = open_files(tmp_path / "cache")
    assert detect(files, files.listing()) == "mds"
    assert run(tmp_path / "cache", tmp_path / "latents").rows == 7 + 4  # 0, 3 and 6 were too small for 64
    assert "latents_32: 128 bytes are taken as float16 [4, 4, 4]" in capsys.readouterr().out
    dataset = Dataset.open(tmp_path / "latents")
    shards = [shard["samples"] for shard in json.loads((tmp_path / "cache/index.json").read_text())["shards"]]
    assert len(shards) > 1
    k = shards[0]  # the first sample of the second shard
    stored = row_of(dataset, "shard.00001/00000000@32")
    assert stored.tobytes() == made[k]["latents_32"] and stored.shape == (1, 4, 4, 4)
    assert row_of(dataset, "shard.00000/00000001@64").tobytes() == made[1]["latents_64"]
    run(tmp_path / "latents", tmp_path / "back", to="mds")
    assert tree(tmp_path / "back") == tree(tmp_path / "cache")
    run(tmp_path / "cache", tmp_path / "scaled", scaling_factor="0.18215")
    run(tmp_path / "scaled", tmp_path / "again", to="mds", scaling_factor="auto")
    assert tree(tmp_path / "again") == tree(tmp_path / "cache")


@pytest.mark.parametrize("merged", [True, False])
def test_a_folder_for_each_rank(tmp_path, merged):
    root, shards = tmp_path / "cache", []
    for rank in "01":
        make(root / rank, 3, int(rank), empty=False)
        for shard in json.loads((root / rank / "index.json").read_text())["shards"]:
            shard["raw_data"]["basename"] = f"{rank}/{shard['raw_data']['basename']}"
            shards.append(shard)
    if merged:
        (root / "index.json").write_text(json.dumps({"version": 2, "shards": shards}, sort_keys=True))
    run(root, tmp_path / "latents")
    run(tmp_path / "latents", tmp_path / "back", to="mds")
    after = tree(tmp_path / "back")
    merged or after.pop("index.json")  # which the format's merge_index would add
    assert after == tree(root)


def test_arrays_shapes_and_pickled_columns(tmp_path, capsys):
    fixed, free = tmp_path / "fixed", tmp_path / "free"
    for root, encoding in ((fixed, "ndarray:float16:3,4,4"), (free, "ndarray")):
        writer = Writer(root, {"latent": encoding, "meta": "pkl"})
        for i in range(4):
            h = 4 if encoding != "ndarray" else 4 + i % 2
            values = np.full((3, h, 4), i, "<f2")
            prefix = b"" if encoding != "ndarray" else bytes([18, 3 << 2, 3, h, 4])  # float16, 3 sizes of uint8
            writer.write({"latent": prefix + values.tobytes(), "meta": b"cos\nsystem\n"})
        writer.finish()
    cache = opened(fixed)
    assert cache.buckets == ((1, 3, 4, 4),) and not cache.fields
    assert any("pickled columns are left out, unread: meta" in one for one in cache.remarks)
    assert opened(free).buckets == ((1, 3, 4, 4), (1, 3, 5, 4))
    run(free, tmp_path / "latents")
    run(tmp_path / "latents", tmp_path / "back", to="mds")
    assert list(samples(tmp_path / "back")) == [{"latent": one["latent"]} for one in samples(free)]
    writer = Writer(tmp_path / "bytes", {"my_latent": "bytes"})
    writer.write({"my_latent": np.arange(24, dtype="<f2").tobytes()})
    writer.finish()
    with pytest.raises(ValueError, match=r"my_latent.* 48 bytes .*--latent-shape C,h,w of 24 float16"):
        opened(tmp_path / "bytes")
    run(tmp_path / "bytes", tmp_path / "told", latent_shape=(6, 2, 2))
    assert row_of(Dataset.open(tmp_path / "told"), "shard.00000/00000000").shape == (1, 6, 2, 2)


def test_a_dataset_from_elsewhere_and_a_training_loop(tmp_path):
    for i in range(5):  # MAR's cache without flips; means are written
        folder = tmp_path / f"mar/n0{i % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        np.savez(folder / f"{i}.npz", moments=np.random.default_rng(i).standard_normal((8, 4, 4)).astype("f4"))
    run(tmp_path / "mar", tmp_path / "latents", dtype="float16", scaling_factor="auto")
    run(tmp_path / "latents", tmp_path / "out", to="mds", scaling_factor="1", unit_rows=2)
    read = list(samples(tmp_path / "out"))
    dataset = Dataset.open(tmp_path / "latents")
    assert len(list((tmp_path / "out").glob("shard.*.mds"))) == 3
    assert [one["key"].decode() for one in read] == [dataset.key(i) for i in range(5)]
    assert [int.from_bytes(one["label"], "little") for one in read] == dataset.label[:].tolist()
    x = torch.stack([torch.frombuffer(bytearray(one["latents_32"]), dtype=torch.float16).view(4, 4, 4) for one in read])
    model = torch.nn.Conv2d(4, 4, 1)
    loss = (model(x.float()) - x.float()).square().mean()
    loss.backward()
    assert torch.isfinite(loss)
    run(tmp_path / "latents", tmp_path / "wide", to="mds", scaling_factor="1", dtype="float32")
    cache = opened(tmp_path / "wide")
    assert (cache.dtype, cache.buckets) == ("F32", ((1, 4, 4, 4),))


def test_damaged_shards_and_samples_are_named(tmp_path):
    root = tmp_path / "cache"
    make(root, 18, empty=False)
    index = json.loads((root / "index.json").read_text())
    names = [shard["raw_data"]["basename"] for shard in index["shards"]]
    assert len(names) >= 6
    data = (root / names[0]).read_bytes()
    (root / names[1]).write_bytes(data[:-1])  # cut
    second = bytearray((root / names[2]).read_bytes())
    second[-300] ^= 1  # a flipped bit: its hash tells
    (root / names[2]).write_bytes(second)
    third = bytearray((root / names[3]).read_bytes())
    third[4:8] = (1 << 31).to_bytes(4, "little")  # offsets that fall
    (root / names[3]).write_bytes(third)
    fourth = bytearray((root / names[4]).read_bytes())
    begin = int.from_bytes(fourth[4:8], "little")
    fourth[begin : begin + 4] = (1 << 31).to_bytes(4, "little")  # a column larger than its sample
    (root / names[4]).write_bytes(fourth)
    index["shards"][4]["raw_data"]["hashes"] = {}
    index["shards"][5]["raw_data"]["basename"] = "../../etc/shard.mds"
    (root / "index.json").write_text(json.dumps(index))
    cache = opened(root)
    reasons = {place.rpartition("cache/")[2]: why for place, why in cache.left_out.items()}
    assert reasons.keys() == {names[1], names[3], "../../etc/shard.mds"}
    assert "half-written" in reasons[names[1]] and "rise" in reasons[names[3]]
    damaged = {}
    for item in cache.items:
        try:
            cache.row(item, cache.content(item))
        except DamagedEntry as error:
            damaged[item.key] = str(error)
    flipped = [key for key in damaged if key.startswith("shard.00002/")]
    assert len(flipped) == len([one for one in cache.items if one.key.startswith("shard.00002/")]) > 0
    assert "sha1" in damaged[flipped[0]] and len(damaged) == len(flipped) + 1
    assert "as their sizes say" in damaged["shard.00004/00000000@32"]


def test_a_second_size_keeps_the_other_columns_where_the_first_is_not_finite(tmp_path):
    root = tmp_path / "cache"
    writer = Writer(root, {"latents_32": "bytes", "latents_64": "bytes", "caption": "str"})
    for i in range(2):
        first = np.full((4, 4, 4), np.nan if i else 1, "<f2").tobytes()
        writer.write({"latents_32": first, "latents_64": np.ones((4, 8, 8), "<f2").tobytes(), "caption": b"%d" % i})
    writer.finish()
    assert run(root, tmp_path / "latents", max_errors=1).rows == 3
    run(tmp_path / "latents", tmp_path / "back", to="mds")
    before, after = list(samples(root)), list(samples(tmp_path / "back"))
    assert after == [before[0], {**before[1], "latents_32": b""}]


def test_what_cannot_be_converted(tmp_path):
    make(tmp_path / "cache")
    index = json.loads((tmp_path / "cache/index.json").read_text())
    for shard in index["shards"]:
        name = shard["raw_data"]["basename"]
        shard |= {"compression": "zstd", "zip_data": {"basename": f"{name}.zstd", "bytes": 1, "hashes": {}}}
        (tmp_path / "cache" / name).rename(tmp_path / f"cache/{name}.zstd")
    (tmp_path / "cache/index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="not compressed, got zstd"):
        run(tmp_path / "cache", tmp_path / "latents")
    (tmp_path / "cache/index.json").write_text('{"version": 2, "shards": [{"format": "json"}]}')
    with pytest.raises(ValueError, match="shards of format mds"):
        opened(tmp_path / "cache")
    make(tmp_path / "good")
    run(tmp_path / "good", tmp_path / "latents")
    with pytest.raises(ValueError, match="expected values F16 as its columns say, got F32"):
        run(tmp_path / "latents", tmp_path / "out", to="mds", dtype="float32")
