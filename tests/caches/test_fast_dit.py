"""fast-DiT's features and labels: values, names, classes, the scaled sample back bit for bit, and what is damaged."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from fastlatent.caches import fast_dit
from fastlatent.caches.cache import DamagedEntry, Told
from fastlatent.caches.outgoing import Outgoing, OutRow
from fastlatent.config import ConvertConfig, build
from fastlatent.sources.files import open_files
from fastlatent.store.reader import Dataset
from fastlatent.workflows.convert import convert

SHAPE = (1, 4, 4, 6)


def run(source, out, **settings):
    return convert(build(ConvertConfig, {}, {"source": str(source), "out": str(out), "threads": 1, **settings}))


def make(root, count=12, name="imagenet256_", names=str, dtype=np.float32):
    """As its extract_features.py writes them; file name -> (features, class)."""
    draw, arrays = np.random.default_rng(0), {}
    for folder in ("features", "labels"):
        (root / f"{name}{folder}").mkdir(parents=True)
    for i in range(count):
        features = draw.standard_normal(SHAPE).astype(dtype)
        np.save(root / f"{name}features" / f"{names(i)}.npy", features)
        np.save(root / f"{name}labels" / f"{names(i)}.npy", np.array([i * 7 % 5]))
        arrays[f"{names(i)}.npy"] = features, i * 7 % 5
    return arrays


def opened(root):
    files = open_files(root)
    found = files.listing()
    return fast_dit.open_cache(files, found, Told())


def tree(root: Path):
    files = [path for path in root.rglob("*.npy") if path.is_file()]
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in files}


def loader(root, name="imagenet256_"):
    """What its CustomDataset gives: both folders listed, in the order of their names' letters."""
    features, labels = (sorted(os.listdir(root / f"{name}{folder}")) for folder in ("features", "labels"))
    assert len(features) == len(labels)
    for feature, label in zip(features, labels, strict=True):
        yield (
            torch.from_numpy(np.load(root / f"{name}features" / feature)),
            torch.from_numpy(np.load(root / f"{name}labels" / label)),
        )


def test_pairs_become_rows_and_come_back(tmp_path, capsys):
    arrays = make(tmp_path / "cache")
    report = run(tmp_path / "cache", tmp_path / "latents")  # the format is found
    assert (report.format, report.rows) == ("fast-dit", 12)
    dataset = Dataset.open(tmp_path / "latents")
    assert dataset.classes == list("01234")
    assert [dataset.key(i) for i in range(12)] == [f"{i:08d}" for i in range(12)]  # by number: 2 before 10
    for i in range(12):
        features, label = arrays[f"{i}.npy"]
        stored = dataset.open_shard(int(dataset.shard[i])).columns["latents"][dataset.row[i]]
        assert np.array_equal(stored, (features.astype("f8") / 0.18215).astype("f4")) and dataset.label[i] == label
    run(tmp_path / "latents", tmp_path / "back", to="fast-dit")
    for name, (features, label) in arrays.items():
        back = np.load(tmp_path / "back/imagenet256_features" / name)
        assert back.dtype == np.float32 and np.abs(back / features - 1).max() <= 2**-23  # kept in float32
        assert np.load(tmp_path / "back/imagenet256_labels" / name).tolist() == [label]
    run(tmp_path / "cache", tmp_path / "as-is", scaling_factor="unknown")
    run(tmp_path / "as-is", tmp_path / "same", to="fast-dit")
    assert tree(tmp_path / "same") == tree(tmp_path / "cache")


@pytest.mark.parametrize(
    "names",
    [lambda i: f"{i:05d}", lambda i: f"{i % 2}_{i:03d}"],
    ids=["padded", "named"],  # of a fork that names the process
)
def test_half_precision_and_names_come_back(tmp_path, names):
    make(tmp_path / "cache", name="lsun_", names=names, dtype=np.float16)
    run(tmp_path / "cache", tmp_path / "latents")
    assert Dataset.open(tmp_path / "latents").buckets[0].dtype == "F32"
    run(tmp_path / "latents", tmp_path / "back", to="fast-dit")
    assert tree(tmp_path / "back") == tree(tmp_path / "cache")


def test_a_killed_export_goes_on(tmp_path):
    make(tmp_path / "cache")
    run(tmp_path / "cache", tmp_path / "latents", scaling_factor="unknown")
    run(tmp_path / "latents", tmp_path / "back", to="fast-dit")
    whole = tree(tmp_path / "back")
    (tmp_path / "back/imagenet256_features/7.npy").unlink()
    (tmp_path / "back/imagenet256_labels/8.npy").unlink()
    run(tmp_path / "latents", tmp_path / "back", to="fast-dit")
    assert tree(tmp_path / "back") == whole


def test_its_training_loop_reads_what_is_written(tmp_path):
    arrays = make(tmp_path / "cache")
    run(tmp_path / "cache", tmp_path / "latents")
    run(tmp_path / "latents", tmp_path / "back", to="fast-dit")
    pairs = list(loader(tmp_path / "back"))
    for (x, y), name in zip(pairs, sorted(arrays), strict=True):
        assert torch.allclose(x, torch.from_numpy(arrays[name][0]), rtol=2**-23, atol=0) and y.tolist() == [
            arrays[name][1]
        ]
    embed, model = torch.nn.Embedding(5, 4), torch.nn.Conv2d(4, 4, 1)
    optimizer = torch.optim.SGD([*embed.parameters(), *model.parameters()], 0.1)
    losses = []
    for _ in range(3):
        x, y = (torch.stack(column).squeeze(dim=1) for column in zip(*pairs, strict=True))
        loss = (model(x) + embed(y)[:, :, None, None] - x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_what_has_no_class_or_is_damaged_is_named(tmp_path):
    root = tmp_path / "cache"
    make(root)
    (root / "imagenet256_labels/3.npy").unlink()
    np.save(root / "imagenet256_labels/4.npy", np.array([1.5]))
    np.save(root / "imagenet256_labels/5.npy", np.array([-1]))
    np.save(root / "imagenet256_labels/6.npy", np.array([1 << 40]))  # not as many names of classes
    np.save(root / "imagenet256_labels/7.npy", np.array([{}], object), allow_pickle=True)
    np.save(root / "imagenet256_labels/77.npy", np.array([0]))
    np.save(root / "imagenet256_features/8.npy", np.zeros((1, 4, 6, 4), "f4"))
    half = (root / "imagenet256_features/9.npy").read_bytes()[:-5]
    (root / "imagenet256_features/9.npy").write_bytes(half)
    (root / "README.md").write_text("x")
    cache = opened(root)
    reasons = {Path(place).name: why for place, why in cache.left_out.items()}
    assert sorted(reasons) == ["3.npy", "4.npy", "5.npy", "6.npy", "7.npy"]
    assert "no class: expected imagenet256_labels/3.npy" in reasons["3.npy"]
    assert "one integer, got float64 [1]" in reasons["4.npy"] and "got -1" in reasons["5.npy"]
    assert "got 1099511627776" in reasons["6.npy"] and "pickled" in reasons["7.npy"]
    assert cache.remarks == ("1 files of imagenet256_labels have no features",) and cache.ignored == {".md": 1}
    items = {item.key: item for item in cache.items}
    assert len(items) == 7
    for key, words in (
        ("00000008", r"expected float32 \[1, 4, 4, 6\].*got float32 \[1, 4, 6, 4\]"),
        ("00000009", "expected 384 bytes"),
    ):
        with pytest.raises(DamagedEntry, match=words):
            cache.row(items[key], cache.content(items[key]))
    with pytest.raises(ValueError, match="5 rows cannot be used, and --max-errors is 0"):
        run(root, tmp_path / "latents", format="fast-dit")
    assert run(root, tmp_path / "latents", format="fast-dit", max_errors=7).rows == 5


def test_what_cannot_be_one_cache_is_refused(tmp_path):
    make(tmp_path / "two")
    make(tmp_path / "two", name="imagenet512_")
    with pytest.raises(
        ValueError, match=r"expected one folder <name>_features, got imagenet256_features \(12 files\), im"
    ):
        opened(tmp_path / "two")
    make(tmp_path / "mixed", names=lambda i: f"{i:04d}")
    for folder in ("features", "labels"):  # two files for one number
        old = tmp_path / f"mixed/imagenet256_{folder}/0003.npy"
        (old.parent / "3.npy").write_bytes(old.read_bytes())
    cache = opened(tmp_path / "mixed")
    assert len(cache.items) == 12 and "expected the name 0003.npy" in next(iter(cache.left_out.values()))
    (tmp_path / "bare/x_features").mkdir(parents=True)
    np.save(tmp_path / "bare/x_features/0.npy", np.zeros(SHAPE, "f4"))
    with pytest.raises(ValueError, match="expected the classes in x_labels"):
        opened(tmp_path / "bare")
    np.save(tmp_path / "two/imagenet256_features/0.npy", np.zeros((4, 4), "f4"))
    for path in (tmp_path / "two").glob("imagenet512*/*"):
        path.unlink()
    with pytest.raises(ValueError, match=r"expected \[1, C, h, w\] of floats, got float32 \[4, 4\]"):
        opened(tmp_path / "two")


def outgoing(rows, shape=SHAPE, **changes):
    zeros = np.zeros(0)
    said = {"dtype": "F16", "classes": ["a", "b"], "facts": {}, "notes": {}, **changes}
    return Outgoing(
        count=len(rows), row=rows.__getitem__, payload="latents", shapes=(shape,), mean=zeros, std=zeros,
        rows_per_shard=1, **said,
    )  # fmt: skip


def test_other_datasets_are_numbered_or_refused_before_the_first_file(tmp_path):
    def row(key, label):
        return OutRow(key, label, "", 0, np.full(SHAPE, 0.5, "f2"), (0, 0), (0, 0, 0, 0), {})

    rows = [row("a/x.png", 0), row("b/y.png", 1)]
    assert list(fast_dit.write(outgoing(rows), tmp_path / "out")) == [1, 1]
    pairs = list(loader(tmp_path / "out"))
    assert [y.item() for _, y in pairs] == [0, 1] and all(x.dtype == torch.float32 for x, _ in pairs)
    with pytest.raises(ValueError, match=r"has a class for every row, got none for 'c.png'"):
        next(fast_dit.write(outgoing([*rows, row("c.png", -1)]), tmp_path / "none"))
    with pytest.raises(ValueError, match=r"without a mirror image, got \[2, 4, 4, 6\]"):
        next(fast_dit.write(outgoing(rows, shape=(2, 4, 4, 6)), tmp_path / "none"))
    with pytest.raises(ValueError, match="expected a name that stays inside a folder"):
        facts = {"name": "../x_", "padding": None}
        next(fast_dit.write(outgoing([row("0", 0)], facts=facts, classes=["0"]), tmp_path / "none"))
    assert not (tmp_path / "none").exists()
