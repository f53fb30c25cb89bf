"""The README's commands of "Encode anything", "Encode videos", "Bring your caches", "Train anything" and "Decode
anything", as they stand there but for the sizes, on data with the same layouts."""

import json
import pickle
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import plain_ldm_autoencoder
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tiny_teachers import write_teacher
from tiny_video_models import make_vae
from toy_experiment import make_experiment
from toy_mar_cache import make_mar
from toy_ssv2 import make_ssv2
from toy_videos import make_video

import fastlatent.caches.formats
from fastlatent.encoders.video_kinds import VIDEO_KINDS
from fastlatent.pipeline.checkpoints import checkpoints
from fastlatent.store.reader import Dataset

README = Path(__file__).parents[2] / "README.md"
PIXELS = {"224": "8", "256": "8"}


def section(title: str) -> str:
    return README.read_text().split(f"### {title}\n")[1].split("\n### ")[0]


def readme_commands(title: str = "Encode anything") -> list[str]:
    return re.findall(r"^    (fastlatent .*)$", section(title), re.MULTILINE)


def trajectory(folder: Path, frames: int, seed: int) -> None:
    draw = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    for i in range(frames):
        Image.fromarray(draw.integers(0, 256, (12, 16, 3), dtype=np.uint8)).save(folder / f"{i}.jpg")
    poses = {"position": draw.normal(size=(frames, 2)), "yaw": draw.normal(size=(frames,))}
    (folder / "traj_data.pkl").write_bytes(pickle.dumps(poses))


@pytest.fixture(scope="module")
def place(chain, tmp_path_factory) -> Path:
    """A folder with everything that the commands name."""
    root = tmp_path_factory.mktemp("readme")
    for name in ("recon", "tartan"):
        for number in range(2):
            trajectory(root / "data" / name / f"run_{number}", 11, seed=number)
    for name in ("vae", "sd-vae-ft-ema"):
        shutil.copytree(checkpoints(chain.vae)[-1], root / name)
    weights = plain_ldm_autoencoder.random_weights(0, ch=32, mult=(1, 1), blocks=1, z=4, encoder_attention=(1,))
    torch.save({"model": {name: tensor.float() for name, tensor in weights.items()}}, root / "kl16.ckpt")
    for wnid in ("n01440764", "n01443537"):
        (root / "imagenet" / "train" / wnid).mkdir(parents=True)
        for i in range(3):
            chain.image(i).save(root / "imagenet" / "train" / wnid / f"{wnid}_{i}.JPEG")
    lines = [{"record_type": "set", "output_root": "fields"}]
    (root / "fields").mkdir()
    for i in range(4):
        deep = np.random.default_rng(i).integers(0, 65536, (10, 12), dtype=np.uint16)
        Image.fromarray(deep).save(root / "fields" / f"{i}.tif")
        metadata = {"split": "train" if i < 3 else "val", "temperature": 0.5 * i, "wind": [3.0, 4.0, 0.0]}
        lines.append({"record_type": "sample", "output_rel": f"{i}.tif", "metadata": metadata})
    (root / "manifest.json").write_text("\n".join(map(json.dumps, lines)))
    return root


@pytest.fixture(scope="module")
def done(chain, place) -> Path:
    """The folder after the commands."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        for line in readme_commands():
            words = shlex.split(line)[1:]
            words = [PIXELS.get(word, word) if words[i - 1] == "--size" else word for i, word in enumerate(words)]
            more = ["--batch-size", "2"] if words[0] == "encode" else ["--size", "16"]
            chain.ok("", *words, *more, "--threads", "1")
    return place


def test_every_command_is_there():
    kinds = [line.split()[1] for line in readme_commands()]
    assert kinds == ["encode", "encode", "encode", "roundtrip", "encode"]


def test_trajectories(done):
    for name in ("recon", "tartan_drive"):
        dataset = Dataset.open(done / "latents" / name)
        assert len(dataset) == 22 and len(dataset.groups) == 2
        assert [dataset.key(i) for i in (0, 2, 10, 11)] == ["run_0/0.jpg", "run_0/2.jpg", "run_0/10.jpg", "run_1/0.jpg"]
        copied = done / "latents" / name / "run_1" / "traj_data.pkl"
        original = done / "data" / name.removesuffix("_drive") / "run_1" / "traj_data.pkl"
        assert copied.read_bytes() == original.read_bytes()
        poses = pickle.loads(original.read_bytes())
        rows = [dataset.open_shard(int(dataset.shard[i])).columns for i in range(11, 22)]
        yaw = [columns["yaw"][dataset.row[i]] for columns, i in zip(rows, range(11, 22), strict=True)]
        assert np.array_equal(yaw, poses["yaw"])


def test_imagenet(done):
    dataset = Dataset.open(done / "imagenet" / "train_cached")
    assert len(dataset) == 6 and dataset.classes == ["n01440764", "n01443537"]
    assert dataset.buckets[0].shape == (2, 8, 4, 4)  # with its mirror images; one halving
    assert (done / "roundtrip.png").exists()


def test_manifest(done):
    dataset = Dataset.open(done / "latents" / "train")
    assert [dataset.key(i) for i in range(len(dataset))] == ["0.tif", "1.tif", "2.tif"]
    columns = dataset.open_shard(0).columns
    assert np.allclose(columns["condition"], [[0, 3, 4, 0, 5], [0.5, 3, 4, 0, 5], [1, 3, 4, 0, 5]])
    assert columns["condition_present"].all()


VIDEOS = "Encode videos, and a teacher's tokens"


@pytest.fixture(scope="module")
def cached(chain, tmp_path_factory) -> Path:
    """A folder after the commands of "Encode videos", with a small teacher."""
    root = tmp_path_factory.mktemp("videos")
    for number, frames in enumerate((8, 20, 36)):
        make_video(root / "videos" / "ab"[number % 2] / f"{number}.mp4", frames=frames, size=(32, 32))
    make_vae("AutoencoderKLWan", root / "Wan-AI" / "Wan2.1-T2V-1.3B-Diffusers" / "vae")
    ids = make_ssv2(root / "ssv2", lambda path, number: make_video(path, frames=8, seed=number))
    next(root.rglob(f"{ids['train'][1]}.webm")).write_bytes(b"no video")
    teacher = write_teacher(root / "teacher", size=64)
    small = {"480": "32", "videomaev2-base": f"videomaev2 --teacher-weights {teacher}", "--device 0": "--device cpu"}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        for line in readme_commands(VIDEOS):
            for word, ours in small.items():
                line = line.replace(word, ours)
            chain.ok("", *shlex.split(line, comments=True)[1:])
    return root


def test_videos(cached):
    assert [line.split()[1] for line in readme_commands(VIDEOS)] == ["encode", "decode", "encode", "inspect"]
    dataset = Dataset.open(cached / "latents" / "videos")
    assert [bucket.shape[2] for bucket in dataset.buckets if bucket.rows] == [5, 9]  # of 17 and 33 frames
    assert len(list((cached / "latents" / "videos-videos" / "videos").glob("*.mp4"))) == 3
    cache = Dataset.open(cached / "cache" / "train")
    assert (len(cache), len(cache.quarantined)) == (3, 1)


def test_a_loop_over_the_cache(cached, monkeypatch):
    [code] = re.findall(r"```python\n(.*?)```", section(VIDEOS), re.DOTALL)
    monkeypatch.chdir(cached)
    names: dict = {}
    exec(code.replace("num_workers=8", "num_workers=0").replace("range(90)", "range(2)"), names)
    batch, dataset = names["batch"], names["dataset"]
    assert (len(batch["ids"]), len(dataset.missing)) == (3, 1)
    assert batch["tokens"].shape[:2] == batch["masked"].shape
    assert batch["clip"].shape == (3, 4, 64, 64, 3)


CACHES = "Bring your caches"


def test_caches(chain, place, tmp_path, monkeypatch):
    make_mar(tmp_path / "imagenet_cached", classes=2, count=4)
    shutil.copytree(place / "vae", tmp_path / "sd-vae-ft-ema")
    monkeypatch.chdir(tmp_path)
    lines = readme_commands(CACHES)
    assert [line.split()[1] for line in lines] == ["convert"] * 4 + ["push", "pull"]
    for line in lines[:4]:
        chain.ok("", *shlex.split(line, comments=True)[1:])
    assert Dataset.open(tmp_path / "latents" / "half").buckets[0].dtype == "F16"
    originals = sorted((tmp_path / "imagenet_cached").rglob("*.npz"))
    for path in originals:
        again = tmp_path / "imagenet_again" / path.relative_to(tmp_path / "imagenet_cached")
        with np.load(path) as one, np.load(again) as other:
            assert all(np.array_equal(one[name], other[name]) for name in ("moments", "moments_flip"))
    assert len(originals) == 8 and [path.name for path in (tmp_path / "tars").glob("*.tar")] == ["shard-000000.tar"]
    for name in (*fastlatent.caches.formats.FORMATS, "datasets"):
        assert f"| {name} " in section(CACHES)


@pytest.fixture(scope="module")
def trained(chain, done) -> Path:
    """The folder after the commands of "Train anything" too, with small models."""
    unet = "--block-out-channels 8,8 --norm-groups 4 --layers-per-block 1"
    more = {
        "train vae": f"{unet} --batch-size 2",
        "encode": "--batch-size 2",
        "train ddpm": f"{unet} --batch-size 2 --preview-inference-steps 2",
        "sample": "--num-inference-steps 2",
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(done)
        for line in readme_commands("Train anything"):
            words = shlex.split(line.replace("--epochs 50", "--epochs 1"))[1:]
            words = [PIXELS.get(word, word) if words[i - 1] == "--size" else word for i, word in enumerate(words)]
            command = " ".join(words[:2]) if words[0] == "train" else words[0]
            chain.ok("", *words, *more[command].split(), "--threads", "1")
    return done


def test_a_manifest_becomes_samples(chain, trained):
    commands = [line.split()[1:3] for line in readme_commands("Train anything")]
    assert [one[0] for one in commands] == ["train", "encode", "train", "sample"]
    assert len(list((trained / "field-samples" / "images").glob("*.png"))) == 4
    assert (trained / "runs" / "field-vae" / "validation.json").exists()
    for run in ("field-vae", "field-ddpm"):
        assert (trained / "runs" / run / "preview.png").exists() and (trained / "runs" / run / "loss.png").exists()
    assert "temperature:1,wind:3,wind_mag:1" in chain.ok("inspect", trained / "runs" / "field-ddpm").out


def test_the_run_loads_in_plain_diffusers(trained, monkeypatch):
    [code] = re.findall(r"```python\n(.*?)```", section("Train anything"), re.DOTALL)
    monkeypatch.chdir(trained)
    names: dict = {}
    exec(code, names)
    assert names["scheduler"].config.clip_sample is False
    assert names["scheduler"].timesteps[0] == 999
    assert names["images"].shape[0] == 4 and names["images"].isfinite().all()


@pytest.fixture(scope="module")
def decoded(chain, done) -> Path:
    """The folder after the commands of "Decode anything"."""
    make_vae("AutoencoderKLWan", done / "wan" / "vae")
    experiment = done / "outputs" / "boats_20260110_101500"
    make_experiment(experiment, model_id="wan", steps=(0, 5, 19), shape=(1, 4, 2, 3, 4))
    (done / "lightningdit").mkdir()
    shutil.copytree(done / "vae", done / "vavae")
    names = ("latents", "latents_flip")
    values = {name: torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0)) for name in names}
    shard = done / "lightningdit" / "latents_rank00_shard000.safetensors"
    save_file(values | {"labels": torch.zeros(3, dtype=torch.int64)}, shard)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(done)
        for line in readme_commands("Decode anything"):
            words = shlex.split(line)[1:]
            chain.ok("", *words, *(["--threads", "1"] if words[0] == "decode" else []))
    return done


def test_decoded(decoded):
    videos = decoded / "outputs/boats_20260110_101500/latents_videos"
    assert len(list(videos.glob("*/*/step_*.mp4"))) == 12
    assert json.loads((videos / "decode_summary.json").read_text())["failed_steps"] == 0
    gifs = sorted(path.relative_to(decoded / "gifs").as_posix() for path in decoded.glob("gifs/*/*/*.gif"))
    assert gifs == [f"prompt_000/vid_00{v}/step_0{s}.gif" for v in (0, 1) for s in ("00", "19")]
    assert (decoded / "outputs/boats_20260110_101500/gallery.html").stat().st_size > 10_000
    assert len(list((decoded / "look/images").glob("*.png"))) == 3
    assert len(list((decoded / "jpegs/images").glob("*.jpg"))) == 3


def test_the_decoder_in_python(decoded, monkeypatch):
    [code] = re.findall(r"```python\n(.*?)```", section("Decode anything"), re.DOTALL)
    monkeypatch.chdir(decoded)
    names: dict = {}
    exec(code, names)
    assert [result.success for result in names["results"]] == [True, True]
    assert names["summary"]["successful_steps"] == 12


def test_every_video_autoencoder_is_in_the_table():
    table = section("Decode anything")
    assert [name for name in VIDEO_KINDS if name not in table] == []
