"""WebDataset tars of latents: samples as foreign writers make them, tars of ours, damage, and who reads them."""

import io
import json
import re
import tarfile

import numpy as np
import pytest
import torch
from safetensors.torch import save

from fastlatent.caches import formats, webdataset
from fastlatent.caches.cache import DamagedEntry, Told
from fastlatent.config import ConvertConfig
from fastlatent.config.fields import build
from fastlatent.sources.files import open_files
from fastlatent.store.reader import Dataset
from fastlatent.workflows.convert import convert


def latent(seed, shape=(4, 2, 3), dtype=np.float32):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def npy(array):
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def npz(**arrays):
    stream = io.BytesIO()
    np.savez(stream, **arrays)
    return stream.getvalue()


def pt(value):
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def tar(path, members, *, cut=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    if cut is not None:
        path.write_bytes(path.read_bytes()[:cut])


def opened(folder):
    files = open_files(folder)
    found = files.listing()
    return webdataset.open_cache(files, found, Told())


def rows(cache):
    return {item.key: cache.row(item, cache.content(item)) for item in cache.items}


def run(source, out, **flags):
    flags = flags if "to" in flags else {"format": "webdataset", **flags}
    return convert(build(ConvertConfig, {}, {"source": str(source), "out": str(out), **flags}))


def group(path):
    """The samples of a tar as the webdataset package groups them: neighbours whose names agree up to the first dot."""
    samples = []
    with tarfile.open(path) as archive:
        for member in archive:
            match = re.fullmatch(r"((?:.*/|)[^.]+)[.]([^/]*)", member.name)
            if not samples or samples[-1]["__key__"] != match[1]:
                samples.append({"__key__": match[1]})
            assert match[2] not in samples[-1]
            samples[-1][match[2].lower()] = archive.extractfile(member).read()
    return samples


def contents(path):
    return {f"{one['__key__']}.{name}": data for one in group(path) for name, data in one.items() if name[0] != "_"}


@pytest.fixture
def foreign(tmp_path):
    """Two tars as a script around webdataset.ShardWriter leaves them."""
    folder = tmp_path / "tars"
    for number in range(2):
        members = []
        for i in range(3):
            seed = 3 * number + i
            members += [
                (f"{i:03d}.cls", str(seed % 2).encode()),
                (f"{i:03d}.json", json.dumps({"h": 300 + i}).encode()),
                (f"{i:03d}.moments.npy", npy(latent(seed))),
                (f"{i:03d}.txt", b"a caption"),
            ]
        tar(folder / f"{number:05d}.tar", members)
    return folder


def test_foreign_tars_and_back(foreign, tmp_path):
    run(foreign, tmp_path / "dataset")
    dataset = Dataset.open(tmp_path / "dataset")
    assert dataset.payload == "moments" and dataset.key(4) == "00001/001" and len(dataset) == 6
    assert dataset.label.tolist() == [0, 1, 0, 1, 0, 1] and dataset.classes == ["0", "1"]
    shard = dataset.open_shard(0)
    np.testing.assert_array_equal(shard.columns["moments"][4][0], latent(4))
    run(tmp_path / "dataset", tmp_path / "again", to="webdataset")
    for number in range(2):  # the same tars, members and bytes
        before, after = (contents(one / f"{number:05d}.tar") for one in (foreign, tmp_path / "again"))
        assert before == after


def test_detection(foreign, tmp_path):
    files = open_files(foreign)
    assert formats.detect(files, files.listing()) == "webdataset"
    tar(tmp_path / "images" / "a.tar", [("0.jpg", b"..."), ("0.cls", b"1")])
    files = open_files(tmp_path / "images")
    assert webdataset.claims(files, files.listing()) == 0


WAYS = {
    "pth of bfloat16, a batch of one": ("latent.pth", lambda x: pt(torch.from_numpy(x)[None].bfloat16()), "latents"),
    "npz with a flip": ("npz", lambda x: npz(moments=x, moments_flip=-x), "moments"),
    "safetensors": ("safetensors", lambda x: save({"latents": torch.from_numpy(x)}), "latents"),
    "npy alone": ("npy", npy, "latents"),
    "a dict": ("pt", lambda x: pt({"latent": torch.from_numpy(x).half(), "fps": torch.tensor(24)}), "latents"),
    "tokens": ("npy", lambda x: npy(x[0]), "tokens"),
}


@pytest.mark.parametrize("way", WAYS)
def test_ways_to_store_one(tmp_path, way):
    suffix, make, payload = WAYS[way]
    tar(tmp_path / "in" / "sub" / "a.tar", [(f"x/{i}.{suffix}", make(latent(i))) for i in range(3)])
    cache = opened(tmp_path / "in")
    assert cache.payload == payload
    flags = {} if payload != "latents" else {"scaling_factor": "0.5"}
    run(tmp_path / "in", tmp_path / "dataset", **flags)
    run(tmp_path / "dataset", tmp_path / "again", to="webdataset")
    before, after = (rows(opened(tmp_path / one)) for one in ("in", "again"))
    assert before.keys() == after.keys() == {"sub/a/x/0", "sub/a/x/1", "sub/a/x/2"}
    for key, row in before.items():
        np.testing.assert_array_equal(row.values, after[key].values)
        assert row.values.dtype == after[key].values.dtype
    one, other = (contents(tmp_path / at / "sub" / "a.tar") for at in ("in", "again"))
    assert one.keys() == other.keys()
    if suffix in ("npy", "safetensors"):  # written alike by everyone
        assert one == other
    assert before["sub/a/x/0"].values.shape[0] == (2 if "flip" in way else 1)


def test_scaling_must_be_said_of_latents(tmp_path):
    tar(tmp_path / "in" / "a.tar", [("0.npy", npy(latent(0)))])
    with pytest.raises(ValueError, match="its files do not say how latents are scaled"):
        run(tmp_path / "in", tmp_path / "dataset")


def test_several_shapes(tmp_path):
    shapes = [(4, 2, 3), (4, 3, 2), (4, 2, 3), (4, 5, 5)]
    tar(tmp_path / "in" / "a.tar", [(f"{i}.moments.npy", npy(latent(i, one))) for i, one in enumerate(shapes)])
    run(tmp_path / "in", tmp_path / "dataset")
    dataset = Dataset.open(tmp_path / "dataset")
    assert {bucket.shape: bucket.rows for bucket in dataset.buckets} == {(1, *one): shapes.count(one) for one in shapes}
    run(tmp_path / "dataset", tmp_path / "again", to="webdataset")
    assert contents(tmp_path / "in" / "a.tar") == contents(tmp_path / "again" / "a.tar")


def test_damage_is_named_and_costs_one_row(tmp_path):
    bomb = npy(latent(0)).replace(b"(4, 2, 3)", b"(9999999, 2, 3)".ljust(9))
    members = [
        ("good.moments.npy", npy(latent(1))),
        ("good2.moments.npy", npy(latent(2))),
        ("half.moments.npy", npy(latent(3))[:150]),
        ("claims.moments.npy", bomb),
        ("shape.moments.npy", npy(latent(4, (6, 2, 3)))),
        ("object.moments.npy", npy(np.array([{}], object))),
        ("two.a.npy", npy(latent(5))),
        ("two.b.npy", npy(latent(6))),
        ("again.moments.npy", npy(latent(7))),
        ("again.moments.npy", npy(latent(8))),
        ("label.moments.npy", npy(latent(9))),
        ("label.cls", b"-3"),
        ("../out.moments.npy", npy(latent(10))),
        ("/abs.moments.npy", npy(latent(11))),
        ("prompt.pickle", b"never read"),
        ("good.pickle", b"never read"),
        ("picture.jpg", b"..."),
    ]
    tar(tmp_path / "in" / "a.tar", members)
    cache = opened(tmp_path / "in")
    left_out = {place.rpartition("a.tar/")[2]: why for place, why in cache.left_out.items()}
    assert left_out.keys() == {"two", "again", "label", "../out.moments.npy", "/abs.moments.npy"}
    assert "got .a.npy, .b.npy" in left_out["two"] and "twice" in left_out["again"] and "-3" in left_out["label"]
    assert "leads out" in left_out["../out.moments.npy"]
    assert cache.remarks == ("1 members *.pickle are pickles: never read, left out",)
    assert cache.ignored == {".jpg": 1, ".pickle": 1}
    damaged = {}
    for item in cache.items:
        try:
            cache.row(item, cache.content(item))
        except DamagedEntry as error:
            damaged[item.key] = str(error)
    assert damaged.keys() == {"a/half", "a/claims", "a/shape", "a/object"}
    assert "[1, 4, 2, 3] as in most samples, got moments F32 [1, 6, 2, 3]" in damaged["a/shape"]
    with pytest.raises(ValueError, match="5 rows cannot be used"):
        run(tmp_path / "in", tmp_path / "dataset")
    assert run(tmp_path / "in", tmp_path / "dataset", max_errors=9).rows == 2


def test_a_cut_tar_gives_what_comes_before(foreign):
    whole = (foreign / "00001.tar").read_bytes()
    (foreign / "00001.tar").write_bytes(whole[: 8 * 1024])
    cache = opened(foreign)
    reasons = {place.rpartition("tars/")[2]: why for place, why in cache.left_out.items()}
    assert "cut off" in reasons["00001.tar"] and len(reasons) == 2
    assert [item.key for item in cache.items[:3]] == ["00000/000", "00000/001", "00000/002"]
    assert 3 < len(cache.items) < 6 and all(rows(cache))
    (foreign / "00001.tar").write_bytes(b"")
    assert len(opened(foreign).items) == 3
    (foreign / "00000.tar").rename(foreign / "00000.tar.gz")
    (foreign / "00001.tar").unlink()
    with pytest.raises(ValueError, match="expected uncompressed tars"):
        run(foreign, foreign.parent / "dataset")


def test_a_tar_that_changes_meanwhile_is_named(foreign):
    cache = opened(foreign)
    (foreign / "00000.tar").write_bytes((foreign / "00000.tar").read_bytes()[:2048])
    with pytest.raises(DamagedEntry, match="changed meanwhile|was cut"):
        cache.content(cache.items[2])


@pytest.fixture
def images(tmp_path):
    """A dataset as encode leaves one: names with dots, classes, sizes, mirror images."""
    for name in ("ant", "bee.v2"):
        (tmp_path / "mar" / name).mkdir(parents=True)
        for i in range(4):
            array = latent(i + 10 * len(name), (4, 2, 2))
            np.savez(tmp_path / "mar" / name / f"a.{i}%.JPEG.npz", moments=array, moments_flip=array[..., ::-1])
    run(tmp_path / "mar", tmp_path / "images", format="mar")
    return tmp_path / "images"


def test_tars_of_ours(images, tmp_path):
    run(images, tmp_path / "tars", to="webdataset", scaling_factor="1", unit_rows=3)
    names = sorted(path.name for path in (tmp_path / "tars").glob("*.tar"))
    assert names == ["shard-000000.tar", "shard-000001.tar", "shard-000002.tar"]
    run(tmp_path / "tars", tmp_path / "back")
    before, after = Dataset.open(images), Dataset.open(tmp_path / "back")
    assert after.classes == before.classes == ["ant", "bee.v2"]
    for i in range(len(before)):
        assert before.key(i) == after.key(i) and before.label[i] == after.label[i]
        one, other = (set_.open_shard(int(set_.shard[i])).columns["moments"][set_.row[i]] for set_ in (before, after))
        np.testing.assert_array_equal(one, other)
    first = (tmp_path / "tars" / "shard-000001.tar").read_bytes()
    (tmp_path / "tars" / "shard-000001.tar").unlink()  # killed before it
    run(images, tmp_path / "tars", to="webdataset", scaling_factor="1", unit_rows=3)
    assert (tmp_path / "tars" / "shard-000001.tar").read_bytes() == first
    run(tmp_path / "back", tmp_path / "third", to="webdataset", scaling_factor="1", unit_rows=3)
    for name in names:
        assert (tmp_path / "tars" / name).read_bytes() == (tmp_path / "third" / name).read_bytes()


def test_a_training_loop_reads_them(images, tmp_path):
    """As webdataset's pipelines do: group, decode by suffix, (moments, label) to the model."""
    run(images, tmp_path / "tars", to="webdataset", scaling_factor="1", unit_rows=3)
    seen = {}
    model = torch.nn.Linear(16, 2)
    for path in sorted((tmp_path / "tars").glob("*.tar")):
        for sample in group(path):
            moments = torch.from_numpy(np.load(io.BytesIO(sample["moments.npy"])))
            label = torch.tensor([int(sample["cls"])])
            torch.nn.functional.cross_entropy(model(moments.reshape(1, -1)), label).backward()
            seen[json.loads(sample["json"])["key"]] = moments
    assert model.weight.grad.abs().sum() > 0
    dataset = Dataset.open(images)
    assert list(seen) == [dataset.key(i) for i in range(len(dataset))]
    np.testing.assert_array_equal(seen["bee.v2/a.3%.JPEG"], latent(3 + 60, (4, 2, 2)))


def test_the_package_reads_them(images, tmp_path):
    wds = pytest.importorskip("webdataset")
    run(images, tmp_path / "tars", to="webdataset", scaling_factor="1", unit_rows=3)
    urls = sorted(str(path) for path in (tmp_path / "tars").glob("*.tar"))
    found = wds.WebDataset(urls, shardshuffle=False).decode().to_tuple("moments.npy", "moments_flip.npy", "cls", "json")
    samples = list(found)
    assert len(samples) == 8
    for moments, flip, label, said in samples:
        np.testing.assert_array_equal(moments[..., ::-1], flip)
        assert said["key"].startswith(("ant", "bee.v2")[label])


def test_samples_that_are_called_otherwise_than_most_keep_their_names(tmp_path):
    members = [("a.npy", npy(latent(0))), ("b.latents.npy", npy(latent(1))), ("c.npy", npy(latent(2)))]
    members += [("d.npz", npz(latents=latent(3), other=latent(4))), ("e.pt", pt({"moved": torch.ones(1, 4, 2, 3)}))]
    tar(tmp_path / "cache/x.tar", members)
    run(tmp_path / "cache", tmp_path / "latents", scaling_factor="1")
    run(tmp_path / "latents", tmp_path / "back", to="webdataset")
    before, after = (contents(tmp_path / one / "x.tar") for one in ("cache", "back"))
    assert list(before) == list(after)
    assert all(before[name] == after[name] for name in before if name.endswith(".npy"))
    with np.load(io.BytesIO(after["d.npz"])) as archive:
        assert archive.files == ["latents", "other"] and np.array_equal(archive["other"], latent(4))
    assert torch.equal(torch.load(io.BytesIO(after["e.pt"]))["moved"], torch.ones(1, 4, 2, 3))
