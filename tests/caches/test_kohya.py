"""sd-scripts' .npz: shapes, flips, sizes in one file, everything beside the latents back, and what is damaged."""

from pathlib import Path

import numpy as np
import pytest
import torch

from fastlatent.caches import kohya
from fastlatent.caches.cache import DamagedEntry, Told
from fastlatent.caches.outgoing import Outgoing, OutRow
from fastlatent.config import ConvertConfig, build
from fastlatent.sources.files import open_files
from fastlatent.store.reader import Dataset
from fastlatent.workflows.convert import convert


def run(source, out, **settings):
    return convert(build(ConvertConfig, {}, {"source": str(source), "out": str(out), "threads": 1, **settings}))


def latent(seed, h, w, channels=4):
    return np.random.default_rng(seed).standard_normal((channels, h, w)).astype(np.float32)


def save(path, h, w, *, channels=4, flip=False, mask=False, suffix="", size=(640, 512), **more):
    """As its save_latents_to_disk: the arrays of one size are added to what the file has."""
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = dict(np.load(path)) if path.exists() else {}
    arrays[f"latents{suffix}"] = latent(h, h, w, channels)
    arrays[f"original_size{suffix}"] = np.array(size)
    arrays[f"crop_ltrb{suffix}"] = np.array((0.0, 12.0, w * 8, h * 8 - 11.75))
    if flip:
        arrays[f"latents_flipped{suffix}"] = latent(h + 100, h, w, channels)
    if mask:
        arrays[f"alpha_mask{suffix}"] = np.linspace(0, 1, h * w * 64, dtype="f4").reshape(h * 8, w * 8)
    np.savez(path, **arrays, **more)


def opened(root):
    files = open_files(root)
    return kohya.open_cache(files, files.listing(), Told())


def tree(root):
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*.npz")}


def same_arrays(one, other):
    assert sorted(tree(one)) == sorted(tree(other))
    for name in tree(one):
        with np.load(one / name) as ours, np.load(other / name) as theirs:
            assert ours.files == theirs.files
            for array in ours.files:
                assert ours[array].dtype == theirs[array].dtype and np.array_equal(ours[array], theirs[array])


def load_from_disk(path, bucket, stride=None):
    """What its load_latents_from_disk gives; bucket: (width, height) in pixels; stride: for files of several sizes."""
    suffix = "" if stride is None else f"_{bucket[1] // stride}x{bucket[0] // stride}"
    npz = np.load(path)
    names = "latents", "original_size", "crop_ltrb", "latents_flipped", "alpha_mask"
    latents, size, crop, flipped, mask = (npz.get(name + suffix) for name in names)
    return latents, size.tolist(), crop.tolist(), flipped, mask


def test_buckets_flips_and_masks_come_back(tmp_path):
    root = tmp_path / "cache"
    for i, (h, w) in enumerate([(4, 6), (6, 4), (4, 6), (2, 8)]):
        save(
            root / f"{i % 2}_cat/img{i}_{w * 8:04d}x{h * 8:04d}_sdxl.npz",
            h,
            w,
            flip=True,
            mask=i == 2,
            size=(640, 500 + i),
        )
    np.savez(root / "0_cat/img0_te_outputs.npz", hidden_state1=np.zeros((77, 8)))
    (root / "0_cat/img0.txt").write_text("a cat")
    report = run(root, tmp_path / "latents")  # the format is found
    assert (report.format, report.rows, report.left_out) == ("kohya", 4, {})
    dataset = Dataset.open(tmp_path / "latents")
    assert sorted(bucket.shape for bucket in dataset.buckets) == [(2, 4, 2, 8), (2, 4, 4, 6), (2, 4, 6, 4)]
    keys = [dataset.key(i) for i in range(4)]
    assert keys[0] == "0_cat/img0_0048x0032_sdxl.npz" and dataset.orig_hw[0].tolist() == [500, 640]
    stored = dataset.open_shard(int(dataset.shard[0])).columns["latents"][dataset.row[0]]
    assert np.array_equal(stored, [latent(4, 4, 6), latent(104, 4, 6)])
    run(tmp_path / "latents", tmp_path / "back", to="kohya")
    for left in root.glob("*/*_te_outputs.npz"):
        left.unlink()
    same_arrays(tmp_path / "back", root)
    assert tree(tmp_path / "back") == tree(root)  # numpy writes no times
    next((tmp_path / "back").rglob("*.npz")).unlink()
    run(tmp_path / "latents", tmp_path / "back", to="kohya")  # a killed export goes on
    assert tree(tmp_path / "back") == tree(root)


def test_several_sizes_in_a_file_are_rows(tmp_path):
    root = tmp_path / "cache"
    for h, w in ((4, 6), (2, 8)):
        for i in range(3):
            save(root / f"img{i}_0640x0512_flux.npz", h, w, channels=16, suffix=f"_{h}x{w}", mask=True)
    np.savez(root / "img0_0640x0512_flux.npz", **np.load(root / "img0_0640x0512_flux.npz"), note=np.arange(3))
    run(root, tmp_path / "latents")
    dataset = Dataset.open(tmp_path / "latents")
    assert [dataset.key(i) for i in range(2)] == [f"img0_0640x0512_flux.npz@{size}" for size in ("2x8", "4x6")]
    run(tmp_path / "latents", tmp_path / "back", to="kohya")
    for name in tree(root):
        with np.load(tmp_path / "back" / name) as ours, np.load(root / name) as theirs:
            assert sorted(ours.files) == sorted(theirs.files)
            assert all(np.array_equal(ours[array], theirs[array]) for array in ours.files)
    latents, size, crop, flipped, mask = load_from_disk(tmp_path / "back/img1_0640x0512_flux.npz", (48, 32), stride=8)
    assert np.array_equal(latents, latent(4, 4, 6, 16)) and flipped is None and mask.shape == (32, 48)
    assert size == [640, 512] and crop == [0.0, 12.0, 48.0, 20.25]


def test_old_names_compressed_files_and_videos(tmp_path):
    (tmp_path / "old").mkdir()
    np.savez_compressed(tmp_path / "old/a.npz", latents=np.zeros((4, 32, 32), "f4"), original_size=np.array([9, 8]))
    np.savez(tmp_path / "old/b.npz", latents=np.ones((4, 32, 32), "f4"))
    cache = opened(tmp_path / "old")
    rows = [cache.row(item, cache.content(item)) for item in cache.items]
    assert [row.orig_hw for row in rows] == [(8, 9), (0, 0)] and not len(rows[1].extras["rest"])
    (tmp_path / "video").mkdir()
    np.savez(tmp_path / "video/a_0048x0032_wan.npz", latents_4x6=np.ones((16, 3, 4, 6), "f2"))
    run(tmp_path / "video", tmp_path / "latents")
    assert Dataset.open(tmp_path / "latents").buckets[0].shape == (1, 16, 3, 4, 6)
    run(tmp_path / "latents", tmp_path / "back", to="kohya")
    assert np.load(tmp_path / "back/a_0048x0032_wan.npz")["latents_4x6"].dtype == np.float32  # its loader's dtype


def test_damaged_files_are_named(tmp_path):
    for i in range(8):
        save(tmp_path / f"c/img{i}.npz", 4, 6, flip=True)
    path = tmp_path / "c/img1.npz"
    path.write_bytes(path.read_bytes()[:-30])
    path = tmp_path / "c/img2.npz"
    data = bytearray(path.read_bytes())
    data[300] ^= 1  # a value: the headers are as they were
    path.write_bytes(data)
    save(tmp_path / "c/img0.npz", 4, 6, latents_4x6=latent(0, 4, 6))
    for i, arrays in (
        (3, {"latents": latent(0, 4, 6)}),
        (4, {"latents": latent(0, 4, 6, 16), "latents_flipped": latent(0, 4, 6, 16)}),
        (5, {"latents": np.array([{}], object)}),
        (6, {"latents_8x8": latent(0, 4, 6)}),
    ):
        np.savez(tmp_path / f"c/img{i}.npz", **arrays)
    huge = (tmp_path / "c/img7.npz").read_bytes().replace(b"(4, 4, 6)", b"(4, 4,60)")
    (tmp_path / "c/img7.npz").write_bytes(huge)
    save(tmp_path / "c/img8.npz", 4, 6, flip=True)
    cache = opened(tmp_path / "c")
    reasons = {Path(place).stem[-1]: why for place, why in cache.left_out.items()}
    assert sorted(reasons) == list("0134567")
    assert "got both" in reasons["0"] and "truncated" in reasons["1"] and "without latents_flipped" in reasons["3"]
    assert "16 channels" in reasons["4"] and "pickled" in reasons["5"] and "latents_8x8 are [4, 4, 6]" in reasons["6"]
    assert "latents claim 3,840 bytes, the file has 384" in reasons["7"]
    assert [item.key for item in cache.items] == ["img2.npz", "img8.npz"]
    with pytest.raises(DamagedEntry):
        cache.row(cache.items[0], cache.content(cache.items[0]))
    report = run(tmp_path / "c", tmp_path / "latents", format="kohya", max_errors=8)
    assert report.rows == 1 and len(report.left_out) == 8


def test_two_models_in_a_folder_are_refused(tmp_path):
    save(tmp_path / "img_0048x0032_sdxl.npz", 4, 6)
    save(tmp_path / "img_0048x0032_sd.npz", 4, 6)
    with pytest.raises(ValueError, match=r"latents of one model, got sd \(1 files\), sdxl \(1 files\)"):
        opened(tmp_path)


def outgoing(rows, shapes=((1, 4, 4, 6),), dtype="F16"):
    zeros = np.zeros(0)
    return Outgoing(len(rows), rows.__getitem__, "latents", dtype, [], shapes, zeros, zeros, {}, {}, 1)


def test_its_training_loop_reads_another_dataset(tmp_path):
    def row(key, size=(512, 640)):
        return OutRow(key, -1, "", 0, latent(0, 4, 6)[None].astype("f2"), size, (0, 0, 0, 0), {})

    rows = [row("10_cat/a.png"), row("10_cat/b.jpg", (900, 300))]
    assert list(kohya.write(outgoing(rows), tmp_path / "out")) == [1, 1]
    model, losses = torch.nn.Conv2d(4, 4, 1), []
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(3):
        for key in ("a", "b"):
            latents, size, crop, flipped, mask = load_from_disk(tmp_path / f"out/10_cat/{key}.npz", (48, 32))
            assert flipped is mask is None and latents.dtype == np.float32
            # the whole image fitted into the bucket 48×32: 1.25 wide is 40×32, 1/3 wide is 10.67×32
            assert np.allclose(crop, [4, 0, 44, 32] if key == "a" else [18, 0, 18 + 32 / 3, 32])
            assert size == ([640, 512] if key == "a" else [300, 900])
            x = torch.from_numpy(latents)[None]
            loss = (model(x) - x).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[-1] < losses[0]
    for wrong, words in (
        (outgoing([*rows, row("10_cat/a.jpg")]), "10_cat/a.npz would hold two images"),
        (outgoing([*rows, row("c.jpg", (0, 0))]), "expected the size of each image.*'c.jpg'"),
        (outgoing(rows, ((1, 16, 4, 6),)), r"expected latents \[4, h, w\] of SD or SDXL"),
    ):
        with pytest.raises(ValueError, match=words):
            next(kohya.write(wrong, tmp_path / "none"))
    assert not (tmp_path / "none").exists()
