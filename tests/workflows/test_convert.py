"""fastlatent convert: kills, several processes, bad caches, scaling, and back; on MAR's and LightningDiT's formats."""

import json
import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file
from toy_mar_cache import make_mar

from fastlatent.caches.outgoing import put_file
from fastlatent.config import ConvertConfig, build
from fastlatent.store.reader import Dataset
from fastlatent.workflows.convert import convert


def run(source, out, **settings):
    return convert(build(ConvertConfig, {}, {"source": str(source), "out": str(out), **settings}))


def tree(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in (".lock", "convert.yaml")
    }


@pytest.fixture(scope="module")
def mar(tmp_path_factory):
    root = tmp_path_factory.mktemp("mar") / "cache"
    return root, make_mar(root, classes=2, count=60)


def test_rows_are_those_of_the_files_and_come_back(mar, tmp_path, capsys):
    root, arrays = mar
    report = run(root, tmp_path / "latents", unit_rows=32)
    assert (report.rows, report.converted, report.left_out) == (120, 120, {})
    assert "mar, 120 rows of moments [2, 8, 4, 4] F32, stored as F32" in capsys.readouterr().out
    dataset = Dataset.open(tmp_path / "latents")
    assert dataset.classes == ["class0", "class1"] and len(dataset.shards) == 4
    for i in range(len(dataset)):
        shard = dataset.open_shard(int(dataset.shard[i])).columns
        moments, flip = arrays[dataset.key(i)]
        assert np.array_equal(shard["moments"][dataset.row[i]], np.stack([moments, flip]))
        assert dataset.label[i] == int(dataset.key(i)[5])
    hashed = dataset.provenance["hashed"]
    assert hashed["converted"]["format"] == "mar"
    assert hashed["converted"]["unknown"] == ["vae", "pixel_range", "transform"]
    assert run(root, tmp_path / "latents", unit_rows=32).converted == 0  # nothing is to do
    run(tmp_path / "latents", tmp_path / "back", to="mar")
    for key, pair in arrays.items():
        with np.load(tmp_path / "back" / f"{key}.npz", allow_pickle=False) as archive:
            assert set(archive.files) == {"moments", "moments_flip"}
            assert np.array_equal(archive["moments"], pair[0]) and np.array_equal(archive["moments_flip"], pair[1])
    names = sorted(path.relative_to(tmp_path / "back").as_posix() for path in (tmp_path / "back").rglob("*.npz"))
    assert names == sorted(f"{key}.npz" for key in arrays)


def test_half_precision_is_one_rounding(mar, tmp_path):
    root, arrays = mar
    run(root, tmp_path / "latents", dtype="bfloat16", check=4)
    dataset = Dataset.open(tmp_path / "latents")
    assert dataset.buckets[0].dtype == "BF16"
    run(tmp_path / "latents", tmp_path / "back", to="mar", dtype="float32")
    for key, (moments, _) in arrays.items():
        with np.load(tmp_path / "back" / f"{key}.npz") as archive:
            assert np.abs(archive["moments"] / moments - 1).max() <= 2**-8


@pytest.mark.parametrize("count", [3, pytest.param(50, marks=pytest.mark.soak)])
def test_killed_at_random_it_ends_with_the_same_bytes(mar, forked, tmp_path, count):
    root, _ = mar
    run(root, tmp_path / "undisturbed", unit_rows=4)
    out, draw = tmp_path / "latents", random.Random(count)
    argv = ["convert", str(root), "--out", str(out), "--unit-rows", "4"]
    kills = [{"argv": argv, "kill_after": [draw.uniform(0.02, 0.3)]} for _ in range(count)]
    *killed, last = forked(*kills, {"argv": argv})
    assert last == [0] and any(codes == [-9] for codes in killed)
    assert tree(out) == tree(tmp_path / "undisturbed")


def test_four_processes_one_of_them_killed(mar, forked, tmp_path):
    root, _ = mar
    run(root, tmp_path / "undisturbed", unit_rows=4)
    out = tmp_path / "latents"
    argv = ["convert", str(root), "--out", str(out), "--unit-rows", "4"]
    (codes,) = forked({"argv": argv, "count": 4, "kill_after": [0.1, None, None, None]})
    assert codes[1:] == [0, 0, 0] and codes[0] in (0, -9), [(tmp_path / f"log-0-{i}.txt").read_text() for i in range(4)]
    assert tree(out) == tree(tmp_path / "undisturbed")


def test_a_killed_export_goes_on(mar, forked, tmp_path):
    root, arrays = mar
    run(root, tmp_path / "latents")
    argv = ["convert", str(tmp_path / "latents"), "--to", "mar", "--out", str(tmp_path / "back")]
    draw = random.Random(1)
    *_, last = forked(*({"argv": argv, "kill_after": [draw.uniform(0.01, 0.1)]} for _ in range(3)), {"argv": argv})
    assert last == [0]
    left = [path for path in (tmp_path / "back").rglob("*") if path.is_file() and path.suffix != ".npz"]
    assert [path.name for path in left] == [".fastlatent.json"]
    assert json.loads(left[0].read_text())["complete"] is True
    for key, pair in arrays.items():
        with np.load(tmp_path / "back" / f"{key}.npz") as archive:
            assert np.array_equal(archive["moments"], pair[0])


def test_damaged_files_are_named_and_nothing_is_published(mar, tmp_path):
    root = tmp_path / "cache"
    shutil.copytree(mar[0], root)
    whole = (root / "class0" / "0003.JPEG.npz").read_bytes()
    (root / "class0" / "0003.JPEG.npz").write_bytes(whole[:700])  # half written
    other = np.zeros((8, 4, 5), np.float32)
    np.savez(root / "class1" / "0007.JPEG.npz", moments=other, moments_flip=other)
    nan = np.full((8, 4, 4), np.nan, np.float32)
    np.savez(root / "class1" / "0009.JPEG.npz", moments=nan, moments_flip=nan)
    with pytest.raises(ValueError, match=r"(?s)--max-errors is 0; nothing was published.*0003\.JPEG") as caught:
        run(root, tmp_path / "latents")
    assert "0007.JPEG" in str(caught.value) and "[8, 4, 5]" in str(caught.value)
    assert not (tmp_path / "latents" / "dataset.json").exists()
    report = run(root, tmp_path / "latents", max_errors=3)  # the same command with a higher limit goes on
    assert report.rows == 117 and len(report.left_out) == 3
    assert "NaN" in report.left_out["class1/0009.JPEG"]
    shutil.copy(mar[0] / "class0" / "0003.JPEG.npz", root / "class0" / "0003.JPEG.npz")
    assert run(root, tmp_path / "latents", max_errors=3).rows == 118  # mended: it comes in


def test_what_is_added_or_changed_is_converted_and_nothing_else(mar, tmp_path):
    root = tmp_path / "cache"
    shutil.copytree(mar[0], root)
    run(root, tmp_path / "latents", unit_rows=16)
    values = np.ones((8, 4, 4), np.float32)
    np.savez(root / "class0" / "0001.JPEG.npz", moments=values, moments_flip=values)
    np.savez(root / "class1" / "new.JPEG.npz", moments=values, moments_flip=values)
    os.unlink(root / "class1" / "0002.JPEG.npz")
    report = run(root, tmp_path / "latents", unit_rows=16)
    assert (report.rows, report.converted) == (120, 2)


def test_a_mixed_folder_is_refused_and_each_format_named(mar, tmp_path):
    root = tmp_path / "cache"
    shutil.copytree(mar[0], root)
    values = {"latents": np.zeros((2, 4, 4, 4), np.float32), "latents_flip": np.zeros((2, 4, 4, 4), np.float32)}
    save_file({**values, "labels": np.zeros(2, np.int64)}, root / "latents_rank00_shard000.safetensors")
    with pytest.raises(ValueError, match=r"expected one format, got mar \(120 files\), lightningdit \(1 files\)"):
        run(root, tmp_path / "latents")
    assert not (tmp_path / "latents").exists()
    assert run(root, tmp_path / "latents", format="mar").rows == 120


def test_links_to_nothing_are_rows_that_cannot_be_used(mar, tmp_path):
    root = tmp_path / "cache"
    shutil.copytree(mar[0], root)
    os.symlink("nowhere.npz", root / "class0" / "lost.npz")
    with pytest.raises(ValueError, match=r"lost\.npz: cannot be read: No such file"):
        run(root, tmp_path / "latents")
    assert run(root, tmp_path / "latents", max_errors=1).rows == 120


def test_three_exports_at_once_into_one_folder(mar, forked, tmp_path):
    run(mar[0], tmp_path / "latents")
    argv = ["convert", str(tmp_path / "latents"), "--to", "webdataset", "--unit-rows", "7", "--out"]
    assert forked({"argv": [*argv, str(tmp_path / "one")]}) == [[0]]
    (codes,) = forked({"argv": [*argv, str(tmp_path / "back")], "count": 3})
    assert codes == [0, 0, 0], [(tmp_path / f"log-1-{i}.txt").read_text() for i in range(3)]
    assert tree(tmp_path / "back") == tree(tmp_path / "one")


def test_a_file_that_another_export_finished_and_swept_is_there(tmp_path):
    def write(file):
        (temporary,) = tmp_path.glob(".tmp-*")
        temporary.unlink()  # as the other process does at its end, when every file is written
        (tmp_path / "a").write_bytes(b"whole")

    put_file(tmp_path / "a", write)
    assert (tmp_path / "a").read_bytes() == b"whole"
    (tmp_path / "a").unlink()
    with pytest.raises(FileNotFoundError):
        put_file(tmp_path / "a", lambda file: [one.unlink() for one in tmp_path.glob(".tmp-*")])


def test_bfloat16_becomes_float32_where_a_format_lacks_it(mar, tmp_path):
    run(mar[0], tmp_path / "latents", dtype="bfloat16")
    run(tmp_path / "latents", tmp_path / "back", to="mar", dtype="bfloat16")
    with np.load(tmp_path / "back" / "class0" / "0000.JPEG.npz") as archive:
        assert archive["moments"].dtype == np.float32
        assert np.abs(archive["moments"] / mar[1]["class0/0000.JPEG"][0] - 1).max() <= 2**-8
    with pytest.raises(ValueError, match="--dtype float16: expected auto or float32, which edm2 holds"):
        run(tmp_path / "latents", tmp_path / "edm2", to="edm2", dtype="float16")


def test_a_format_that_refuses_leaves_the_folder_to_another(mar, tmp_path):
    run(mar[0], tmp_path / "latents")
    with pytest.raises(ValueError, match="without a mirror image"):
        run(tmp_path / "latents", tmp_path / "back", to="edm2")
    run(tmp_path / "latents", tmp_path / "back", to="mar")
    with pytest.raises(ValueError, match="is of others"):
        run(tmp_path / "latents", tmp_path / "back", to="webdataset")


def test_nothing_that_is_there_is_touched(mar, tmp_path):
    root, _ = mar
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"expected an empty folder or a dataset, got \['mine.txt'\]"):
        run(root, tmp_path / "full")
    run(root, tmp_path / "latents")
    with pytest.raises(ValueError, match="expected an empty folder, it holds mine.txt"):
        run(tmp_path / "latents", tmp_path / "full", to="mar")
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["mine.txt"]
    run(tmp_path / "latents", tmp_path / "back", to="mar")
    run(root, tmp_path / "other", dtype="float16")
    with pytest.raises(ValueError, match="is of others: use another folder"):
        run(tmp_path / "other", tmp_path / "back", to="mar")
    with pytest.raises(ValueError, match="other settings"):
        run(root, tmp_path / "latents", dtype="float16")


def test_scaled_latents_become_raw_and_come_back(tmp_path):
    root, draw = tmp_path / "cache", np.random.default_rng(0)
    (root / "imagenet256_features").mkdir(parents=True)
    (root / "imagenet256_labels").mkdir()
    scaled = draw.standard_normal((6, 1, 4, 8, 8)).astype(np.float32)
    for i, values in enumerate(scaled):
        np.save(root / "imagenet256_features" / f"{i}.npy", values)
        np.save(root / "imagenet256_labels" / f"{i}.npy", np.array([i % 3]))
    run(root, tmp_path / "latents")
    dataset = Dataset.open(tmp_path / "latents")
    first = dataset.open_shard(0).columns["latents"][0].astype(np.float64)
    assert np.abs(first * 0.18215 / scaled[0].astype(np.float64) - 1).max() < 2**-23
    run(tmp_path / "latents", tmp_path / "back", to="fast-dit")
    for i, values in enumerate(scaled):
        back = np.load(tmp_path / "back" / "imagenet256_features" / f"{i}.npy")
        assert np.abs(back / values - 1).max() <= 2**-23
    run(root, tmp_path / "unknown", scaling_factor="unknown")
    kept = Dataset.open(tmp_path / "unknown").open_shard(0).columns["latents"]
    assert np.array_equal(kept[0], scaled[0])
    with pytest.raises(ValueError, match="--scaling-factor unknown, so nothing can be scaled"):
        run(tmp_path / "unknown", tmp_path / "lit", to="lightningdit")


def test_means_of_moments_are_exported_where_a_format_has_no_posterior(mar, tmp_path):
    root, arrays = mar
    run(root, tmp_path / "latents")
    run(tmp_path / "latents", tmp_path / "lit", to="lightningdit", unit_rows=50)
    (first, *_) = files = sorted((tmp_path / "lit").glob("latents_rank*.safetensors"))
    assert len(files) == 3
    keys = sorted(arrays)
    with safe_open(first, "np") as shard:
        assert np.array_equal(shard.get_tensor("latents")[7], arrays[keys[7]][0][:4])
        assert np.array_equal(shard.get_tensor("latents_flip")[7], arrays[keys[7]][1][:4])


def test_wrong_flags_say_what_was_expected(mar, tmp_path):
    root, _ = mar
    with pytest.raises(ValueError, match="expected a dataset folder with dataset.json"):
        run(root, tmp_path / "back", to="mar")
    with pytest.raises(ValueError, match="expected auto, unknown or a number"):
        run(root, tmp_path / "latents", scaling_factor="big")
    with pytest.raises(ValueError, match="--shift-factor 0.5: expected it beside --scaling-factor"):
        run(root, tmp_path / "latents", shift_factor=0.5)
    with pytest.raises(ValueError, match="expected a cache, got: No such file"):
        run(tmp_path / "nothing", tmp_path / "latents")
    with pytest.raises(ValueError, match="expected 1 for moments"):
        run(root, tmp_path / "latents", scaling_factor="0.5")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="expected a latent cache of one of these formats"):
        run(tmp_path / "empty", tmp_path / "latents")
    with pytest.raises(ValueError, match="lies inside the source"):
        run(root, root / "latents")
    run(root, tmp_path / "latents")
    with pytest.raises(ValueError, match="got a dataset of fastlatent: say --to"):
        run(tmp_path / "latents", tmp_path / "again")


@pytest.mark.parametrize("count", [3_000, pytest.param(100_000, marks=pytest.mark.soak)])
def test_many_small_files_in_bounded_memory(forked, tmp_path, count):
    """Beyond what one unit takes, a row costs its item, its plan and its index entry."""
    root = tmp_path / "cache"
    make_mar(root, classes=1, count=count, keep=False, size=1)
    first = (
        "import atexit, os, resource\n"
        "import fastlatent.workflows.convert_in as m\n"
        "run = m.convert_in\n"
        "def told(config):\n"
        "    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "    report = run(config)\n"
        f"    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before\n"
        f"    open({str(tmp_path / 'grown')!r}, 'w').write(str(grown))\n"
        "    return report\n"
        "import fastlatent.workflows.convert as c; c.convert_in = told\n"
    )
    argv = ["convert", str(root), "--out", str(tmp_path / "latents")]
    assert forked({"argv": argv, "first": first}) == [[0]], (tmp_path / "log-0-0.txt").read_text()
    grown = int((tmp_path / "grown").read_text()) * 1024
    assert grown < 80 * 2**20 + 4_000 * count, grown
