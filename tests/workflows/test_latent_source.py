"""Latents of a dataset and of the images it was made of: the same ones, and refusals that say the way out."""

import dataclasses
import json
import shutil
import threading
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import fastlatent
from fastlatent.config import TrainArConfig, TrainDdpmConfig, build
from fastlatent.config.train import LatentTrainConfig, TrainConfig
from fastlatent.store.reader import Dataset
from fastlatent.workflows import latent_source
from fastlatent.workflows.latent_source import STATISTICS, open_latents

SPEC = "temperature:1,wind:2,wind_mag:1"
COUNT = 37  # groups of 16, 16 and 5 images are measured


@dataclass(frozen=True)
class Folders:
    root: Path

    @property
    def manifest(self):
        return self.root / "images" / "m.json"

    @property
    def vae(self):
        return self.root / "vae"

    @property
    def dataset(self):
        return self.root / "dataset"

    @property
    def mirrored(self):
        return self.root / "mirrored"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    made = Folders(tmp_path_factory.mktemp("latents"))
    AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2, layers_per_block=1, norm_num_groups=4, latent_channels=2,
        sample_size=8,
    ).save_pretrained(made.vae)  # fmt: skip
    samples = []
    for i in range(COUNT):
        path = made.root / "images" / "ab"[i % 2] / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng(i)
        Image.fromarray(rng.integers(0, 256, (11, 20, 3), dtype=np.uint8)).save(path)
        metadata = {"split": "train", "temperature": float(i)} if i % 3 else {"split": "train"}
        if i % 2:
            metadata["wind"] = [3.0, 4.0 * i]
        samples.append({"output_rel": f"{path.parent.name}/{path.name}", "metadata": metadata})
    made.manifest.write_text(json.dumps({"output_root": ".", "samples": samples}))
    settings = {"size": 8, "dtype": "float32", "threads": 1, "batch_size": 1, "engine": "eager", "decoder": "pillow"}
    fastlatent.encode(made.manifest, made.vae, made.dataset, condition_spec=SPEC, **settings)
    fastlatent.encode(made.root / "images", made.vae, made.mirrored, mirror=True, **settings)
    return made


@pytest.fixture
def make_run(tmp_path):
    def make(rank=0, world_size=1, folder=tmp_path):
        team = SimpleNamespace(on_main=lambda action: action() if rank == 0 else None)
        return SimpleNamespace(
            folder=folder, device=torch.device("cpu"), rank=rank, world_size=world_size, resumed_from=0, team=team
        )

    return make


def ddpm(tmp_path, latents, **flags):
    given = {"latents": str(latents), "out": str(tmp_path / "run"), "batch_size": 8, "size": 8, "seed": 3}
    return build(TrainDdpmConfig, {}, {**given, **{name: value for name, value in flags.items() if value is not None}})


def test_images_give_what_a_dataset_of_them_gives(folders, tmp_path, make_run, capsys):
    stored = open_latents(ddpm(tmp_path, folders.dataset))
    config = ddpm(tmp_path, folders.manifest, vae=str(folders.vae), condition_spec=SPEC)
    fresh = open_latents(config)
    for source in (stored, fresh):
        assert (source.channels, source.side, source.count, source.unlabelled) == (2, 4, COUNT, COUNT)
        assert (source.classes, source.conditions) == ([], (("temperature", 1), ("wind", 2), ("wind_mag", 1)))
    assert stored.vae == fresh.vae
    assert fresh.vae["path"] == str(folders.vae)

    one, mean, std = stored.batches(make_run(), ddpm(tmp_path, folders.dataset))
    other, mean_fresh, std_fresh = fresh.batches(make_run(), config)
    assert mean == pytest.approx(mean_fresh, rel=1e-5)
    assert std == pytest.approx(std_fresh, rel=1e-5)
    assert one.steps_per_epoch == other.steps_per_epoch == COUNT // 8
    # Means and variances differ in the last digits, and with them the last digits of what is normalised.
    for step in (0, 1, 5):
        batch, again = one.batch(step), other.batch(step)
        assert set(batch) == set(again) == {"latents", "label", "draws", "condition", "condition_present"}
        assert torch.equal(batch["draws"].ids, again["draws"].ids)
        assert torch.equal(batch["condition"], again["condition"])
        assert torch.equal(batch["condition_present"], again["condition_present"])
        torch.testing.assert_close(batch["latents"], again["latents"], rtol=1e-4, atol=1e-4)
        assert not again["latents"].is_inference()
    drawn = torch.cat([one.batch(step)["latents"] for step in range(40)]).double()
    assert drawn.mean((0, 2, 3)).tolist() == pytest.approx([0, 0], abs=0.1)
    assert drawn.std((0, 2, 3)).tolist() == pytest.approx([1, 1], abs=0.1)

    mean, std = stored.condition_statistics()
    assert (mean, std) == tuple(pytest.approx(values, rel=1e-6) for values in fresh.condition_statistics())
    temperatures = [float(i) for i in range(COUNT) if i % 3]
    winds = [4.0 * i for i in range(COUNT) if i % 2]
    assert mean[:3] == pytest.approx([np.mean(temperatures), 3.0, np.mean(winds)])
    assert std[:3] == pytest.approx([np.std(temperatures), 1.0, np.std(winds)])  # a std of 0 counts as 1
    assert mean[3] == pytest.approx(np.mean([(9 + wind**2) ** 0.5 for wind in winds]))
    out = capsys.readouterr().out
    assert f"latents from the dataset {folders.dataset}: {COUNT}" in out
    assert f"latents of images from {folders.manifest}, which {folders.vae} encodes every time anew" in out


def test_mirroring_and_labels_agree_too(folders, tmp_path, make_run):
    images = folders.root / "images"
    config = ddpm(tmp_path, images, vae=str(folders.vae), mirror=True)
    stored, fresh = open_latents(ddpm(tmp_path, folders.mirrored)), open_latents(config)
    assert stored.classes == fresh.classes == ["a", "b"]
    assert (stored.unlabelled, fresh.unlabelled, stored.conditions, fresh.conditions) == (0, 0, (), ())
    one, mean, std = stored.batches(make_run(), config)
    other, *_ = fresh.batches(make_run(), config)
    other._mean, other._std = one._mean, one._std  # of half of the images and mirrors here, of all there
    for step in (0, 5):
        batch, again = one.batch(step), other.batch(step)
        assert torch.equal(batch["label"], again["label"])
        torch.testing.assert_close(batch["latents"], again["latents"], rtol=1e-4, atol=1e-4)

    measured = Dataset.open(folders.mirrored).statistics
    channel = open_latents(config)._statistics(make_run(), config, other.loader.images)
    assert channel.latent_std == pytest.approx(measured.latent_std, rel=0.1)
    # One number for all channels: of the two taken together.
    _, mean_all, std_all = stored.batches(make_run(), ddpm(tmp_path, images, normalization="all"))
    assert mean_all == pytest.approx([np.mean(mean)] * 2)
    squares = [s**2 + m**2 for m, s in zip(mean, std, strict=True)]
    assert std_all == pytest.approx([(np.mean(squares) - np.mean(mean) ** 2) ** 0.5] * 2)


def test_statistics_do_not_depend_on_the_processes(folders, tmp_path, make_run, monkeypatch):
    config = ddpm(tmp_path, folders.root / "images", vae=str(folders.vae), latent_statistics=33)
    alone = open_latents(config)
    _, mean, std = alone.batches(make_run(), config)
    kept = (tmp_path / STATISTICS).read_bytes()

    # Two processes, played by threads.
    barrier, shared = threading.Barrier(2, timeout=60), [None, None]

    def exchange(value):
        index = int(threading.current_thread().name)
        shared[index] = value
        barrier.wait()
        found = list(shared)
        barrier.wait()
        return found

    def all_reduce(tensor):
        tensor.copy_(sum(exchange(tensor.clone())))

    def broadcast(values, src, device):
        values[0] = exchange(values[0])[src]

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    monkeypatch.setattr(torch.distributed, "broadcast_object_list", broadcast)
    both = tmp_path / "both"
    both.mkdir()
    found = {}

    def process(rank):
        batches, *rest = open_latents(config).batches(make_run(rank, 2, both), config)
        found[rank] = (rest, batches.batch(2))

    def play():
        threads = [threading.Thread(target=process, args=(rank,), name=str(rank)) for rank in range(2)]
        for one in threads:
            one.start()
        for one in threads:
            one.join()

    play()
    assert (both / STATISTICS).read_bytes() == kept
    assert found[0][0] == found[1][0] == [mean, std]
    whole = alone.batches(make_run(), config)[0].batch(2)
    for rank in range(2):
        assert torch.equal(found[rank][1]["label"], whole["label"][rank::2])
        # A convolution's last bits depend on its batch.
        torch.testing.assert_close(found[rank][1]["latents"], whole["latents"][rank::2], rtol=1e-5, atol=1e-5)

    # What is kept is not measured again, in one process or two; of other settings it is.
    monkeypatch.setattr(latent_source.Statistics, "of", None)
    play()
    assert found[0][0] == found[1][0] == [mean, std]
    assert alone.batches(make_run(), config)[1:] == (mean, std)
    monkeypatch.undo()
    other = ddpm(tmp_path, folders.root / "images", vae=str(folders.vae), latent_statistics=5)
    assert open_latents(other).batches(make_run(), other)[1] != mean
    (tmp_path / STATISTICS).write_text("no")
    with pytest.raises(ValueError, match=STATISTICS):
        alone.batches(make_run(), config)


def test_conditions_are_chosen_by_name(folders, tmp_path, make_run):
    some = ddpm(tmp_path, folders.dataset, condition_spec="wind_mag:1,wind:2")
    source = open_latents(some)
    assert source.conditions == (("wind_mag", 1), ("wind", 2))
    whole = open_latents(ddpm(tmp_path, folders.dataset))
    batch, all_of_them = source.batches(make_run(), some)[0].batch(0), whole.batches(make_run(), some)[0].batch(0)
    assert torch.equal(batch["condition"], all_of_them["condition"][:, [3, 1, 2]])
    assert torch.equal(batch["condition_present"], all_of_them["condition_present"][:, [2, 1]])
    mean, std = whole.condition_statistics()
    assert source.condition_statistics() == ([mean[i] for i in (3, 1, 2)], [std[i] for i in (3, 1, 2)])
    for spec in ("humidity:1", "wind:3"):
        with pytest.raises(ValueError, match=f"has no {spec}; its conditions are {SPEC}"):
            open_latents(ddpm(tmp_path, folders.dataset, condition_spec=spec))

    none = ddpm(tmp_path, folders.dataset, condition_spec="none")
    source = open_latents(none)
    assert (source.conditions, source.condition_statistics()) == ((), ([], []))
    assert "condition" not in source.batches(make_run(), none)[0].batch(0)
    # train ar has no conditions, whatever the dataset has.
    ar = build(TrainArConfig, {}, {"latents": str(folders.dataset), "out": str(tmp_path / "run")})
    assert open_latents(ar).conditions == ()


def test_data_changes_with_the_images_and_the_autoencoder(folders, tmp_path):
    images = tmp_path / "images"
    shutil.copytree(folders.root / "images", images)

    def data(vae=folders.vae):
        return json.dumps(open_latents(ddpm(tmp_path, images, vae=str(vae))).data)

    before = data()
    assert data() == before
    (images / "a" / "00.png").unlink()
    gone = data()
    other = tmp_path / "vae"
    shutil.copytree(folders.vae, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "act_fn": "gelu"}))
    assert len({before, gone, data(other)}) == 3
    again = tmp_path / "again"
    shutil.copytree(folders.dataset, again)
    assert open_latents(ddpm(tmp_path, again)).data == open_latents(ddpm(tmp_path, folders.dataset)).data


def test_what_is_refused(folders, tmp_path, make_run):
    for name, value in (("vae", "v"), ("split", "train"), ("manifest_root", "/"), ("input_range", "0,1")):
        flag = f"--{name.replace('_', '-')}"
        with pytest.raises(ValueError, match=f"is a dataset, and {flag} is for images: leave it out$"):
            open_latents(ddpm(tmp_path, folders.dataset, **{name: value}))
    with pytest.raises(ValueError, match="--mirror is for images: leave it out .*encode --mirror"):
        open_latents(ddpm(tmp_path, folders.dataset, mirror=True))
    with pytest.raises(ValueError, match="--no-preserve-input-precision is for images: leave it out"):
        open_latents(ddpm(tmp_path, folders.dataset, preserve_input_precision=False))
    (tmp_path / "begun").mkdir()
    shutil.copy(folders.dataset / "provenance.json", tmp_path / "begun")
    with pytest.raises(ValueError, match="an encode was interrupted"):
        open_latents(ddpm(tmp_path, tmp_path / "begun"))

    images = folders.root / "images"
    for path, found in ((images, "a folder with a, b, m.json"), (folders.manifest, "a file"), ("no", "nothing")):
        with pytest.raises(ValueError, match=f"expected a dataset written by .* together with --vae, got {found}"):
            open_latents(ddpm(tmp_path, path))
    vae = str(folders.vae)
    with pytest.raises(ValueError, match="--size 9: this autoencoder needs a multiple of 2; the nearest: 8 and 10"):
        open_latents(ddpm(tmp_path, images, vae=vae, size=9))
    with pytest.raises(ValueError, match="of split 'test'; its splits are train"):
        open_latents(ddpm(tmp_path, folders.manifest, vae=vae, split="test"))
    with pytest.raises(ValueError, match="--condition-spec .* means nothing for"):
        open_latents(ddpm(tmp_path, images, vae=vae, condition_spec="wind:2"))
    for inside, flags in ((images, {"vae": vae}), (folders.dataset, {})):
        with pytest.raises(ValueError, match="--out .*run lies inside the source"):
            open_latents(ddpm(inside, inside, **flags))
    with pytest.raises(ValueError, match="--input-range: expected two numbers"):
        open_latents(ddpm(tmp_path, images, vae=vae, input_range="1,0"))
    with pytest.raises(ValueError, match="batch_size: expected 1 to 37"):
        config = ddpm(tmp_path, folders.dataset, batch_size=38)
        open_latents(config).batches(make_run(), config)


def test_a_channel_that_never_changes(folders, tmp_path):
    config = ddpm(tmp_path, folders.dataset)
    mean, std = np.array([1.0, 2.0]), np.array([1.0, 0.0])
    with pytest.raises(ValueError, match=r"channels \[1\] of the latents are the same everywhere"):
        latent_source._normalization(config, mean, std)
    every = ddpm(tmp_path, folders.dataset, normalization="all")
    assert latent_source._normalization(every, mean, std) == ([1.5, 1.5], [0.75**0.5] * 2)


def test_bad_images_are_replaced_and_named(folders, tmp_path, make_run):
    images = tmp_path / "images"
    shutil.copytree(folders.root / "images", images)
    (images / "a" / "00.png").write_text("no picture")
    samples = json.loads((images / "m.json").read_text())["samples"]
    samples.append({"output_rel": "gone.png"})
    (images / "m.json").write_text(json.dumps({"output_root": ".", "samples": samples}))
    config = ddpm(tmp_path, images / "m.json", vae=str(folders.vae), batch_size=COUNT)
    batches, *_ = open_latents(config).batches(make_run(), config)
    assert batches.batch(0)["latents"].shape == (COUNT, 2, 4, 4)
    assert batches.left_out.keys() == {"gone.png", "a/00.png"}


def test_float_images_are_read_as_asked(folders, tmp_path, make_run):
    pixels = np.random.default_rng(0).uniform(0, 4, (4, 8, 8)).astype(np.float32)
    (tmp_path / "images").mkdir()
    for i in range(4):
        Image.fromarray(pixels[i]).save(tmp_path / "images" / f"{i}.tif")
    means = []
    for rounded in (False, True):
        config = ddpm(
            tmp_path, tmp_path / "images", vae=str(folders.vae), batch_size=4, input_range="0,4",
            preserve_input_precision=not rounded,
        )  # fmt: skip
        batches, mean, _ = open_latents(config).batches(make_run(), config)
        means.append(mean)  # measured again in the same folder: these are other pixels
        images = batches.loader.images
        got = images.samples(np.arange(4))["pixels"].numpy()
        level = np.rint(pixels / 4 * 255) / 255 if rounded else pixels / 4
        np.testing.assert_allclose(got, np.repeat(2 * level[:, None] - 1, 3, axis=1), atol=1e-6)
    assert means[0] != means[1]


def test_a_condition_that_no_image_has(folders, tmp_path, make_run, capsys):
    config = ddpm(tmp_path, folders.manifest, vae=str(folders.vae), condition_spec="temprature:1,wind:2")
    source = open_latents(config)
    with pytest.raises(ValueError, match="--condition-spec: no image has numbers for 'temprature'; leave it out, or"):
        source.condition_statistics()
    source.batches(make_run(), config)
    out = capsys.readouterr().out
    assert f"condition 'temprature': {COUNT} of {COUNT} samples lack it; the first is 'a/00.png'\n" in out
    assert f"condition 'wind': {COUNT - COUNT // 2} of {COUNT} samples lack it; the first is 'a/00.png'\n" in out


def test_unused_settings_are_settings(folders, tmp_path):
    names = {field.name for field in dataclasses.fields(TrainArConfig)}
    stored = open_latents(ddpm(tmp_path, folders.dataset)).unused
    fresh = open_latents(ddpm(tmp_path, folders.root / "images", vae=str(folders.vae))).unused
    assert fresh == {"latents", "vae"}
    # All that a source of latents is asked for, but how latents are normalised.
    own = {field.name for field in dataclasses.fields(LatentTrainConfig)}
    common = {field.name for field in dataclasses.fields(TrainConfig)}
    assert stored == own - common - {"normalization"} <= names
