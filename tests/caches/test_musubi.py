"""musubi-tuner's files: every tensor, name and metadata back, its batches from an export, and what is damaged."""

import json

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fastlatent.caches import musubi
from fastlatent.caches.cache import DamagedEntry, Told
from fastlatent.caches.formats import detect
from fastlatent.config import ConvertConfig, build
from fastlatent.sources.files import open_files
from fastlatent.store.reader import Dataset
from fastlatent.workflows.convert import convert


def run(source, out, **settings):
    return convert(build(ConvertConfig, {}, {"source": str(source), "out": str(out), "threads": 1, **settings}))


def names_of(latent, kind="latents"):
    sizes = (1, *latent.shape[1:]) if latent.ndim == 3 else latent.shape[1:]
    return f"{kind}_{'x'.join(map(str, sizes))}_{str(latent.dtype).removeprefix('torch.')}"


def make(root, architecture=("wan", "wan"), dtype=torch.bfloat16, images=False):
    """As its save_latent_cache_… write them: clips of two sizes, some with images of their first frame."""
    short, full = architecture
    (root / "clips").mkdir(parents=True)
    draw = torch.Generator().manual_seed(0)
    for i in range(6):
        h, w = (4, 6) if i % 2 else (6, 4)
        shape = (3, h, w) if images else (3, 2, h, w)
        latent = torch.randn(*shape, generator=draw).to(dtype)
        tensors = {names_of(latent): latent}
        if i < 3:
            tensors |= {
                f"clip_{str(dtype).removeprefix('torch.')}": torch.randn(5, 7, generator=draw).to(dtype),
                names_of(latent, "latents_image"): torch.randn(*shape, generator=draw).to(dtype),
                "f_indices_int32": torch.tensor([0, i], dtype=torch.int32),
            }
        metadata = {"architecture": full, "width": str(8 * w), "height": str(8 * h), "format_version": "1.0.1"}
        save_file(
            tensors, root / f"clips/a {i}_00000-009_{8 * w:04d}x{8 * h:04d}_{short}.safetensors",
            metadata | ({} if images else {"frame_count": "9"}),
        )  # fmt: skip
        save_file({"varlen_t5_float32": torch.zeros(i + 1, 8)}, root / f"clips/a {i}_{short}_te.safetensors")


def opened(root):
    files = open_files(root)
    return musubi.open_cache(files, files.listing(), Told())


def read(root):
    """path -> (tensors, metadata) of the latent caches."""
    result = {}
    for path in sorted(root.rglob("*x*.safetensors")):
        with safe_open(path, "pt") as file:
            result[path.relative_to(root).as_posix()] = load_file(path), file.metadata()
    return result


def same(a, b):
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_files_come_back_with_all_that_was_in_them(tmp_path, dtype, capsys):
    make(tmp_path / "cache", dtype=dtype)
    files = open_files(tmp_path / "cache")
    assert detect(files, files.listing()) == "musubi"
    assert run(tmp_path / "cache", tmp_path / "latents", scaling_factor="unknown").rows == 6
    assert "wan: how latents were normalised is not in the files" in capsys.readouterr().out
    before, dataset = read(tmp_path / "cache"), Dataset.open(tmp_path / "latents")
    assert {bucket.shape for bucket in dataset.buckets} == {(1, 3, 2, 4, 6), (1, 3, 2, 6, 4)}
    for i in range(len(dataset)):
        tensors, metadata = before[dataset.key(i) + ".safetensors"]
        latent = next(one for name, one in tensors.items() if name.startswith("latents_2x"))
        stored = dataset.open_shard(int(dataset.shard[i])).columns["latents"][dataset.row[i]]
        assert np.array_equal(stored[0], (latent.view(torch.uint16) if dtype == torch.bfloat16 else latent).numpy())
        assert dataset.orig_hw[i].tolist() == [int(metadata["height"]), int(metadata["width"])]
    run(tmp_path / "latents", tmp_path / "back", to="musubi")
    after = read(tmp_path / "back")
    assert after.keys() == before.keys()
    for path, (tensors, metadata) in after.items():
        assert same(tensors, before[path][0]) and metadata == before[path][1]


def test_its_batches_read_an_export(tmp_path):
    make(tmp_path / "cache", ("hv", "hunyuan_video"))
    run(tmp_path / "cache", tmp_path / "latents")  # hunyuan_video's are as the autoencoder gives them
    run(tmp_path / "latents", tmp_path / "back", to="musubi")
    model = torch.nn.Conv3d(3, 3, 1)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for bucket in ("0032x0048", "0048x0032"):  # its BucketBatchManager: files of one size, names without sizes, stacked
        batch = {}
        for path in sorted((tmp_path / "back").rglob(f"*_{bucket}_hv.safetensors")):
            tensors = load_file(path)
            key = next(name for name in tensors if name.startswith("latents_") and name[8].isdigit())
            name = key.rsplit("_", 1)[0].rsplit("_", 1)[0]
            batch.setdefault(name, []).append(tensors[key].float())
        x = torch.stack(batch["latents"])
        assert x.shape[:3] == (3, 3, 2)
        loss = (model(x) - x).square().mean()
        loss.backward()
        optimizer.step()
    assert torch.isfinite(loss)


def test_images_and_another_dtype(tmp_path):
    make(tmp_path / "cache", ("zi", "z_image"), torch.float32, images=True)
    run(tmp_path / "cache", tmp_path / "latents", scaling_factor="unknown", dtype="float16")
    run(tmp_path / "latents", tmp_path / "back", to="musubi", dtype="float16")
    before, after = read(tmp_path / "cache"), read(tmp_path / "back")
    for path, (tensors, _) in after.items():
        name = next(name for name in tensors if name.startswith("latents_1x"))
        wanted = before[path][0][name.replace("float16", "float32")]
        assert name.endswith("_float16") and torch.equal(tensors[name], wanted.half())
        assert sorted(k for k in tensors if k != name) == sorted(
            k for k in before[path][0] if not k.startswith("latents_1x")
        )


def test_scaling_by_architecture():
    assert musubi.SCALING is None and musubi.SCALED["hunyuan_video"] == (1.0, 0.0)
    # stored = (raw - shift) * factor: FLUX's autoencoder in its own words
    assert musubi.SCALED["flux_kontext"] == (0.3611, 0.1159) and "wan" not in musubi.SCALED


def test_damaged_files_are_named(tmp_path):
    root = tmp_path / "cache"
    make(root)
    paths = sorted(root.rglob("*x*.safetensors"))
    good, data = load_file(paths[0]), paths[0].read_bytes()
    main = next(name for name in good if name.startswith("latents_2x"))
    paths[1].write_bytes(data[:-3])  # half-written
    save_file({k: v for k, v in good.items() if k != main}, paths[2], {"architecture": "wan"})
    save_file({**good, main: good[main][:, :, :3].contiguous()}, paths[3], {"architecture": "wan"})
    save_file({**good, "latents_1x2x2_float32": torch.zeros(3, 1, 2, 2)}, paths[4], {"architecture": "wan"})
    head = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    head[main]["data_offsets"] = [0, 1 << 50]
    text = json.dumps(head).encode()
    paths[5].write_bytes(len(text).to_bytes(8, "little") + text)
    cache = opened(root)
    assert [item.place for item in cache.items] == [str(paths[0])] and len(cache.left_out) == 5
    for path, word in zip(
        paths[1:],
        ("half-written", "latents_image_2x6x4", "as its name says", "expected one tensor", "offsets"),
        strict=True,
    ):
        assert word in cache.left_out[str(path)], cache.left_out
    assert cache.ignored == {".safetensors": 6}  # text encoder caches
    item = cache.items[0]
    changed = {**good, "latents_2x2x2_bfloat16": torch.zeros(3, 2, 2, 2, dtype=torch.bfloat16)}
    del changed[main]
    save_file(changed, paths[0], {"architecture": "wan"})
    with pytest.raises(DamagedEntry, match="changed meanwhile"):
        cache.row(item, cache.content(item))
    save_file({**good, main: torch.full_like(good[main], float("nan"))}, paths[0], {"architecture": "wan"})
    with pytest.raises(ValueError, match="rows cannot be used"):  # the store takes no NaN
        run(root, tmp_path / "latents", scaling_factor="unknown", max_errors=5)


def test_several_architectures_and_datasets_from_elsewhere(tmp_path):
    make(tmp_path / "cache/a")
    make(tmp_path / "cache/b", ("qi", "qwen_image"))
    with pytest.raises(ValueError, match=r"one architecture, got wan \(6 files\), qwen_image \(6 files\)"):
        opened(tmp_path / "cache")
    folder = tmp_path / "mar/n0"
    folder.mkdir(parents=True)
    np.savez(folder / "0.npz", moments=np.ones((4, 2, 2), "f4"))
    run(tmp_path / "mar", tmp_path / "latents")
    with pytest.raises(ValueError, match="converted from musubi-tuner's cache"):
        run(tmp_path / "latents", tmp_path / "out", to="musubi", scaling_factor="1")
