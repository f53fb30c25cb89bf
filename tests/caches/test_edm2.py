"""EDM2's folder and zip file: std and logvar, classes by name, and what is damaged or hostile."""

import io
import json
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from fastlatent.caches import edm2
from fastlatent.caches.cache import DamagedEntry, Told
from fastlatent.caches.outgoing import Outgoing, OutRow
from fastlatent.config import ConvertConfig, build
from fastlatent.sources.files import open_beside, open_files
from fastlatent.store.reader import Dataset
from fastlatent.workflows.convert import convert

SHAPE = (8, 4, 6)


def run(source, out, **settings):
    return convert(build(ConvertConfig, {}, {"source": str(source), "out": str(out), "threads": 1, **settings}))


def name_of(i):
    return f"{i // 1000:05d}/img-mean-std-{i:08d}.npy"


def npy(array):
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def contents(count=12, labelled=True, first=995, folder=""):
    """Files of its dataset_tool.py encode: name -> bytes."""
    draw, files = np.random.default_rng(0), {}
    for i in range(first, first + count):  # over the edge of the first folder of 1,000
        mean, logvar = draw.standard_normal((4, 4, 6)), draw.uniform(-30, 3, (4, 4, 6))
        files[folder + name_of(i)] = npy(np.concatenate([mean, np.exp(logvar / 2)]).astype("f4"))
    labels = [[name_of(i), i * 7 % 5] for i in range(first, first + count)] if labelled else None
    return files | {f"{folder}dataset.json": json.dumps({"labels": labels}).encode()}


def make(root, files):
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def make_zip(path, files):
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def opened(source):
    if Path(source).is_dir():
        files = open_files(source)
        return edm2.open_cache(files, files.listing(), Told())
    files, name = open_beside(source)
    return edm2.open_cache(files, [files.stat(name)], Told())


def tree(root):
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*.*") if path.name[0] != "."}


class ImageFolder:
    """What its ImageFolderDataset gives: every .npy in the order of names; one-hot classes by name."""

    def __init__(self, root):
        self.root = Path(root)
        self.names = sorted(path.relative_to(root).as_posix() for path in self.root.rglob("*.npy"))
        labels = json.loads((self.root / "dataset.json").read_text())["labels"]
        self.labels = None if labels is None else np.array([dict(labels)[name] for name in self.names]).astype(np.int64)

    def __getitem__(self, i):
        array = np.load(self.root / self.names[i])
        return array, np.eye(self.labels.max() + 1, dtype=np.float32)[self.labels[i]]


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_rows_are_those_of_the_files_and_come_back(tmp_path, kind):
    files = contents()
    source = make_zip(tmp_path / "c.zip", files) if kind == "zip" else make(tmp_path / "c", files)
    report = run(source, tmp_path / "latents", pixel_range="0,1")  # the format is found
    assert (report.format, report.rows) == ("edm2", 12)
    dataset = Dataset.open(tmp_path / "latents")
    assert dataset.provenance["hashed"]["converted"]["facts"] == {"posterior": "mean,std"}
    assert dataset.classes == list("01234")
    for i in range(12):
        both = np.load(io.BytesIO(files[dataset.key(i)]))
        stored = dataset.open_shard(int(dataset.shard[i])).columns["moments"][dataset.row[i]]
        assert np.array_equal(stored[0, :4], both[:4])
        assert np.array_equal(stored[0, 4:], (2 * np.log(both[4:].astype("f8"))).astype("f4"))
        assert dataset.label[i] == (995 + i) * 7 % 5
    run(tmp_path / "latents", tmp_path / "back", to="edm2")
    back = tree(tmp_path / "back")
    assert list(sorted(back)) == sorted(files) and back["dataset.json"] == files["dataset.json"]
    for name, data in files.items():
        if name.endswith(".npy"):
            ours, theirs = np.load(io.BytesIO(back[name])), np.load(io.BytesIO(data))
            assert np.array_equal(ours[:4], theirs[:4])
            assert np.abs(ours[4:].astype("f8") / theirs[4:] - 1).max() <= 5.3e-7
    (tmp_path / "back" / name_of(997)).unlink()
    (tmp_path / "back" / "dataset.json").unlink()
    run(tmp_path / "latents", tmp_path / "back", to="edm2")  # a killed export goes on
    assert tree(tmp_path / "back") == back


def test_its_training_loop_reads_what_is_written(tmp_path):
    run(make(tmp_path / "c", contents(folder="vae-sd/")), tmp_path / "latents")  # as REPA lays it beside its images
    run(tmp_path / "latents", tmp_path / "back", to="edm2")
    data = ImageFolder(tmp_path / "back/vae-sd")
    assert len(data.names) == 12 and data.labels.tolist() == [i * 7 % 5 for i in range(995, 1007)]
    draw, model = torch.Generator().manual_seed(0), torch.nn.Linear(5, 4)
    optimizer, losses = torch.optim.SGD(model.parameters(), 0.1), []
    for _ in range(3):
        both, labels = (
            torch.from_numpy(np.stack(column)) for column in zip(*(data[i] for i in range(12)), strict=True)
        )
        mean, std = both.chunk(2, dim=1)
        latent = mean + std * torch.randn(mean.shape, generator=draw)
        loss = (model(labels) - latent.mean((2, 3))).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_without_classes(tmp_path):
    for case, files in (("null", contents(labelled=False)), ("none", contents())):
        if case == "none":
            del files["dataset.json"]
        cache = opened(make(tmp_path / case, files))
        assert {item.label for item in cache.items} == {-1} and not cache.classes and len(cache.remarks) == 1
    run(tmp_path / "null", tmp_path / "latents", format="edm2")
    run(tmp_path / "latents", tmp_path / "back", to="edm2")
    assert json.loads((tmp_path / "back/dataset.json").read_text()) == {"labels": None}


def test_classes_that_are_wrong_are_named(tmp_path):
    files = contents(6, first=0)
    labels = [[name_of(i), value] for i, value in enumerate([0, True, -1, 2, 1 << 40])]
    files["dataset.json"] = json.dumps({"labels": [*labels, [name_of(3), 1], [name_of(99), 1]]}).encode()
    cache = opened(make(tmp_path / "c", files))
    reasons = {Path(place).name[-5]: why for place, why in cache.left_out.items()}
    assert [item.key for item in cache.items] == [name_of(0)] and sorted(reasons) == list("12345")
    assert "got True" in reasons["1"] and "two classes, 2 and 1" in reasons["3"] and "no class" in reasons["5"]
    assert cache.remarks == ("1 names in dataset.json have no file",)
    for value, words in (
        ([[name_of(0), [0, 1]]], "got vectors"),
        ([3], r"expected \[name, class\]"),
        ({}, "expected {"),
    ):
        (tmp_path / "c/dataset.json").write_text(json.dumps({"labels": value}))
        with pytest.raises(ValueError, match=words):
            opened(tmp_path / "c")


def test_damaged_rows_are_named(tmp_path):
    files = contents(6, first=0, labelled=False)
    for i, value in ((1, 0.0), (2, -1.0), (3, np.inf)):
        both = np.load(io.BytesIO(files[name_of(i)]))
        both[5, 0, 0] = value
        files[name_of(i)] = npy(both)
    files[name_of(4)] = npy(np.ones((8, 4, 4), "f4"))
    files[name_of(5)] = files[name_of(5)][:-4]
    cache = opened(make(tmp_path / "c", files))
    for item in cache.items[1:]:
        with pytest.raises(DamagedEntry, match=r"std above 0|expected float32 \[8, 4, 6\]|expected 768 bytes"):
            cache.row(item, cache.content(item))
    report = run(tmp_path / "c", tmp_path / "latents", format="edm2", max_errors=5)
    assert report.rows == 1 and len(report.left_out) == 5
    make(tmp_path / "c", contents(2, folder="val/"))
    with pytest.raises(ValueError, match=r"several: \. \(6 files\), val/ \(2 files\)"):
        opened(tmp_path / "c")


def test_hostile_zip_files(tmp_path):
    files = contents(4, first=0)
    good = make_zip(tmp_path / "good.zip", files).read_bytes()
    path = tmp_path / "bad.zip"
    with zipfile.ZipFile(path, "w") as archive:  # one member compressed, one twice, one that leads out, one huge
        for name, data in files.items():
            archive.writestr(name, data, zipfile.ZIP_DEFLATED if name == name_of(1) else zipfile.ZIP_STORED)
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr(name_of(2), files[name_of(3)])
        archive.writestr("../" + name_of(5), files[name_of(3)])
        archive.writestr(name_of(6), bytes(100_000))
    cache = opened(path)
    reasons = {place.rpartition("/")[2]: why for place, why in cache.left_out.items()}
    assert "2 members of this name" in reasons["img-mean-std-00000002.npy"]
    assert "leads out" in reasons["img-mean-std-00000005.npy"]
    assert "got 100,000" in reasons["img-mean-std-00000006.npy"]
    items = {item.key: item for item in cache.items}
    assert sorted(items) == [name_of(0), name_of(1), name_of(3)]
    assert cache.content(items[name_of(1)]) == files[name_of(1)]
    flipped = bytearray(good)
    flipped[good.find(b"\x93NUMPY") + 200] ^= 1
    path.write_bytes(flipped)
    cache = opened(path)
    with pytest.raises(DamagedEntry, match="checksum"):
        cache.content(cache.items[0])
    end = good.rfind(b"PK\5\6")
    for data in (
        good[: len(good) // 2],  # half written
        good[: end + 8] + struct.pack("<2H2L", 60000, 60000, 46 * 60000, 16) + good[end + 20 :],  # claims too many
        good[: end + 12] + struct.pack("<2L", 1 << 31, 0) + good[end + 20 :],  # a directory larger than the file
        good[:end],
    ):
        path.write_bytes(data)
        with pytest.raises(ValueError, match="a damaged zip archive"):
            opened(path)
        files_of, name = open_beside(path)
        assert edm2.claims(files_of, [files_of.stat(name)]) == 0


def test_zip64(tmp_path, monkeypatch):
    """Places beyond 4 GiB and more than 65,535 members stand in other records; here these limits are lower."""
    files = contents(4, first=0)
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 1000)
    monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 2)
    cache = opened(make_zip(tmp_path / "large.zip", files))
    assert b"PK\6\6" in (tmp_path / "large.zip").read_bytes()
    assert {item.key: cache.content(item) for item in cache.items} == {
        name: data for name, data in files.items() if name.endswith(".npy")
    }


def test_other_datasets_are_numbered_or_refused_before_the_first_file(tmp_path):
    def row(key, label):
        values = np.linspace(-40, 25, 192, dtype="f4").reshape(1, *SHAPE)
        return OutRow(key, label, "", 0, values, (0, 0), (0, 0, 0, 0), {})

    def outgoing(rows, shape=(1, *SHAPE)):
        zeros = np.zeros(0)
        return Outgoing(len(rows), rows.__getitem__, "moments", "F32", ["a"], (shape,), zeros, zeros, {}, {}, 1)

    rows = [row("a/x.png", 0), row("b/y.png", 0)]
    list(edm2.write(outgoing(rows), tmp_path / "out"))
    data = ImageFolder(tmp_path / "out")
    assert data.names == [name_of(0), name_of(1)]
    assert data[0][0][4:].max() == np.float32(np.exp(10)) and data[0][0].dtype == np.float32  # logvar clamped to 20
    with pytest.raises(ValueError, match=r"for every row or for none, row 'c.png' differs"):
        next(edm2.write(outgoing([*rows, row("c.png", -1)]), tmp_path / "none"))
    with pytest.raises(ValueError, match="without a mirror image"):
        next(edm2.write(outgoing(rows, (2, *SHAPE)), tmp_path / "none"))
    assert not (tmp_path / "none").exists()
