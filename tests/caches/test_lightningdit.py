"""LightningDiT's shards: rows, labels and statistics both ways, its loader on what is exported, and what is damaged."""

import dataclasses
import json
import pickle
import shutil
from glob import glob

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from fastlatent.caches import lightningdit
from fastlatent.caches.cache import DamagedEntry, Told
from fastlatent.caches.formats import detect
from fastlatent.config import ConvertConfig, build
from fastlatent.sources.files import open_files
from fastlatent.store.reader import Dataset
from fastlatent.workflows.convert import convert
from fastlatent.workflows.convert_out import _outgoing

C, H, W = 3, 4, 6


def run(source, out, **settings):
    return convert(build(ConvertConfig, {}, {"source": str(source), "out": str(out), "threads": 1, **settings}))


def make(root, shards=((0, 0, 5), (0, 1, 2), (1, 0, 5), (1, 1, 2)), dtype=torch.float32, drop=(), statistics=True):
    """As its extract_features.py writes them; name -> tensors."""
    root.mkdir(parents=True)
    draw, made = torch.Generator().manual_seed(0), {}
    for rank, shard, n in shards:
        tensors = {
            "latents": torch.randn(n, C, H, W, generator=draw).to(dtype),
            "latents_flip": torch.randn(n, C, H, W, generator=draw).to(dtype),
            "labels": torch.randint(0, 7, (n,), generator=draw),
        }
        tensors = {name: tensor for name, tensor in tensors.items() if name not in drop}
        name = f"latents_rank{rank:02d}_shard{shard:03d}.safetensors"
        save_file(tensors, root / name, {"total_size": f"{n}", "dtype": f"{dtype}", "device": "cpu"})
        made[name] = tensors
    if statistics:
        values = {name: torch.rand(1, C, 1, 1, generator=draw) + 0.5 for name in ("mean", "std")}
        torch.save(values, root / "latents_stats.pt")
    return made


def opened(root):
    files = open_files(root)
    return lightningdit.open_cache(files, files.listing(), Told())


def read(root):
    """name -> (tensors, metadata) of every shard."""
    result = {}
    for path in sorted(root.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            names = list(file.keys())
            result[path.name] = {name: file.get_tensor(name) for name in names}, file.metadata()
    return result


class Loader(torch.utils.data.Dataset):
    """What its ImgLatentDataset does: every .safetensors file, rows by number, the flip half of the time."""

    def __init__(self, folder):
        self.rows = []
        for path in sorted(glob(f"{folder}/*.safetensors")):
            with safe_open(path, framework="pt", device="cpu") as file:
                self.rows += [(path, i) for i in range(file.get_slice("labels").get_shape()[0])]
        loaded = torch.load(f"{folder}/latents_stats.pt")
        self.mean, self.std = loaded["mean"], loaded["std"]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, number):
        path, i = self.rows[number]
        with safe_open(path, framework="pt", device="cpu") as file:
            name = "latents" if np.random.uniform(0, 1) > 0.5 else "latents_flip"
            feature, label = file.get_slice(name)[i : i + 1], file.get_slice("labels")[i : i + 1]
        return ((feature - self.mean) / self.std).squeeze(0), label.squeeze(0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rows_come_in_and_go_back_bit_for_bit(tmp_path, dtype):
    made = make(tmp_path / "cache", dtype=dtype)
    files = open_files(tmp_path / "cache")
    assert detect(files, files.listing()) == "lightningdit"
    assert run(tmp_path / "cache", tmp_path / "latents").rows == 14
    dataset = Dataset.open(tmp_path / "latents")
    assert dataset.classes == list("0123456")
    for i in range(len(dataset)):
        shard, number = dataset.key(i).split("/")
        tensors, k = made[f"{shard}.safetensors"], int(number)
        stored = dataset.open_shard(int(dataset.shard[i])).columns["latents"][dataset.row[i]]
        wanted = torch.stack([tensors["latents"][k], tensors["latents_flip"][k]])
        bits = wanted.view(torch.uint16).numpy() if dtype == torch.bfloat16 else wanted.numpy()
        assert np.array_equal(stored, bits) and dataset.label[i] == tensors["labels"][k]
    run(tmp_path / "latents", tmp_path / "back", to="lightningdit")
    back = read(tmp_path / "back")
    assert back.keys() == made.keys()
    for name, (tensors, metadata) in back.items():
        assert tensors.keys() == made[name].keys()
        assert all(one.dtype == made[name][k].dtype and torch.equal(one, made[name][k]) for k, one in tensors.items())
        assert metadata == {"total_size": str(len(tensors["labels"])), "dtype": str(dtype), "device": "cpu"}
    before, after = (torch.load(tmp_path / name / "latents_stats.pt") for name in ("cache", "back"))
    assert all(torch.equal(before[name], after[name]) for name in ("mean", "std"))


def test_its_training_loop_reads_an_export(tmp_path):
    make(tmp_path / "cache")
    run(tmp_path / "cache", tmp_path / "latents")
    run(tmp_path / "latents", tmp_path / "back", to="lightningdit")
    torch.manual_seed(0)
    model = torch.nn.Conv2d(C, C, 1)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    seen = 0
    for x, y in torch.utils.data.DataLoader(Loader(tmp_path / "back"), batch_size=4, shuffle=True):
        assert x.shape[1:] == (C, H, W) and y.dtype == torch.int64
        loss = (model(x) - x).square().mean()
        loss.backward()
        optimizer.step()
        seen += len(x)
    assert seen == 14 and torch.isfinite(loss)


def test_a_dataset_from_elsewhere_becomes_shards_of_rank_0(tmp_path):
    classes = {}
    for i in range(5):  # MAR's cache: classes by folder
        folder = tmp_path / "mar" / f"n0{i % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        arrays = {name: np.random.default_rng(i).standard_normal((2 * C, H, W), "f4") for name in
                  ("moments", "moments_flip")}  # fmt: skip
        np.savez(folder / f"{i}.JPEG.npz", **arrays)
        classes[f"n0{i % 2}/{i}.JPEG"] = i % 2
    run(tmp_path / "mar", tmp_path / "latents")
    run(tmp_path / "latents", tmp_path / "out", to="lightningdit", unit_rows=3)  # 2 of 3 and the rest
    back = read(tmp_path / "out")
    assert [len(tensors["labels"]) for tensors, _ in back.values()] == [3, 2]
    dataset = Dataset.open(tmp_path / "latents")
    assert torch.cat([tensors["labels"] for tensors, _ in back.values()]).tolist() == [
        classes[dataset.key(i)] for i in range(5)
    ]
    assert torch.load(tmp_path / "out/latents_stats.pt")["std"].shape == (1, C, 1, 1)
    assert len(Loader(tmp_path / "out")) == 5


def test_an_export_goes_on_where_it_was_killed(tmp_path, monkeypatch):
    make(tmp_path / "cache", shards=((0, 0, 5), (0, 1, 4), (0, 2, 5)))
    run(tmp_path / "cache", tmp_path / "latents")
    put_file, count = lightningdit.put_file, [0]

    def killed(path, write):
        count[0] += 1
        if count[0] == 2:
            raise KeyboardInterrupt
        put_file(path, write)

    monkeypatch.setattr(lightningdit, "put_file", killed)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "latents", tmp_path / "back", to="lightningdit")
    stamp = (tmp_path / "back/latents_rank00_shard000.safetensors").stat().st_mtime_ns
    run(tmp_path / "latents", tmp_path / "back", to="lightningdit")
    assert (tmp_path / "back/latents_rank00_shard000.safetensors").stat().st_mtime_ns == stamp and count[0] == 4
    before, after = read(tmp_path / "cache"), read(tmp_path / "back")
    assert all(torch.equal(before[name][0][k], one) for name in after for k, one in after[name][0].items())


def test_without_flips_or_labels(tmp_path):
    make(tmp_path / "cache", drop=("latents_flip", "labels"))
    assert opened(tmp_path / "cache").buckets == ((1, C, H, W),)
    run(tmp_path / "cache", tmp_path / "latents")
    run(tmp_path / "latents", tmp_path / "back", to="lightningdit")
    assert all(set(tensors) == {"latents"} for tensors, _ in read(tmp_path / "back").values())


def test_shards_that_do_not_fit_are_named(tmp_path, capsys):
    root = tmp_path / "cache"
    made = make(root, shards=[(0, k, 4) for k in range(8)])
    name = "latents_rank00_shard00{}.safetensors".format
    data = (root / name(1)).read_bytes()
    (root / name(1)).write_bytes(data[:-10])  # half-written
    length = int.from_bytes(data[:8], "little")
    head = json.loads(data[8 : 8 + length])
    head["latents"]["shape"] = [1 << 40, C, H, W]  # a bomb
    text = json.dumps(head).encode()
    (root / name(2)).write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    (root / name(3)).write_bytes((1 << 62).to_bytes(8, "little") + data[8:])
    tensors = made[name(4)]
    save_file({k: v for k, v in tensors.items() if k != "labels"}, root / name(4))
    save_file({**tensors, "latents": tensors["latents"][:, :2].contiguous()}, root / name(5))
    save_file({**tensors, "labels": torch.tensor([0, 1, 2, 1 << 60])}, root / name(6))
    cache = opened(root)
    assert len(cache.items) == 8 and len(cache.left_out) == 6
    reasons = [cache.left_out[str(root / name(k))] for k in range(1, 7)]
    for reason, word in zip(
        reasons, ("cut", "offsets", "safetensors", "without labels", "latents_flip", "labels from 0"), strict=True
    ):
        assert word in reason
    with pytest.raises(ValueError, match="6 rows cannot be used"):
        run(root, tmp_path / "latents")
    (root / name(7)).write_bytes(b"another")  # after the listing
    with pytest.raises(DamagedEntry, match="was cut while it was read"):
        cache.content(cache.items[-1])
    assert run(root, tmp_path / "latents", max_errors=7).rows == 4


def test_two_folders_and_what_ranks_tell(tmp_path):
    make(tmp_path / "cache/train")
    shutil.copytree(tmp_path / "cache/train", tmp_path / "cache/val")
    with pytest.raises(ValueError, match="one folder, got them in train and val"):
        opened(tmp_path / "cache")
    remarks = opened(tmp_path / "cache/val").remarks
    assert len(remarks) == 1 and "up to 1 images may be here twice" in remarks[0]
    make(tmp_path / "stale", shards=((0, 0, 4), (0, 1, 4), (3, 0, 4), (3, 2, 1)), statistics=False)
    remarks = opened(tmp_path / "stale").remarks
    assert any("ranks differ in rows (rank 0: 8, rank 3: 5)" in one for one in remarks)
    assert any("shards are missing of rank 3" in one for one in remarks) and "no latents_stats.pt" in remarks

    class Evil:
        def __reduce__(self):
            return print, ("executed",)

    (tmp_path / "stale/latents_stats.pt").write_bytes(pickle.dumps({"mean": Evil(), "std": 1}))
    assert any("latents_stats.pt is not used" in one for one in opened(tmp_path / "stale").remarks)


def test_what_the_format_cannot_hold(tmp_path):
    make(tmp_path / "one", drop=("latents_flip",))
    run(tmp_path / "one", tmp_path / "latents")
    outgoing = _outgoing(
        Dataset.open(tmp_path / "latents"), build(ConvertConfig, {}, {
            "source": str(tmp_path / "latents"), "out": "out", "to": "lightningdit"}), lightningdit)  # fmt: skip
    with pytest.raises(ValueError, match="encode with --mirror"):
        next(lightningdit.write(dataclasses.replace(outgoing, facts={}), tmp_path / "out"))
    with pytest.raises(ValueError, match="without classes"):
        next(lightningdit.write(dataclasses.replace(
            outgoing, facts={"flip": False}, classes=[]), tmp_path / "out"))  # fmt: skip
    with pytest.raises(ValueError, match="of one shape"):
        next(lightningdit.write(dataclasses.replace(
            outgoing, shapes=((2, C, 4, 6), (2, C, 6, 4))), tmp_path / "out"))  # fmt: skip
    assert not (tmp_path / "out").exists()
