"""Over every setting of encode: what changes bytes is refused by name, what does not is taken without a word."""

import dataclasses
import json
import pickle
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from chain_helpers import changed_weights, other_vae
from tiny_teachers import write_teacher
from tiny_video_models import make_vae
from toy_videos import make_video

from fastlatent.config import EncodeConfig
from fastlatent.encoders.engines import engine as engines
from fastlatent.store.reader import Dataset

WEIGHTS = "diffusion_pytorch_model.safetensors"
CLIP_TOKENS = 8


@dataclasses.dataclass(frozen=True)
class Base:
    """A dataset as it was made: out of `source`, with `flags` besides those that all share."""

    source: Path
    flags: tuple[object, ...]
    latents: Path
    encoder: tuple[object, ...]  # the flags that name it
    encode: str  # and those for tiny inputs


def write_clip(folder, seed=0):
    """A CLIP text encoder of one layer, whose tokenizer knows single letters."""
    from transformers import CLIPTextConfig, CLIPTextModel

    folder.mkdir()
    tokens = [letter + end for end in ("", "</w>") for letter in "abcdefgh"] + ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    kind = {"tokenizer_class": "CLIPTokenizer", "model_max_length": CLIP_TOKENS}
    (folder / "tokenizer_config.json").write_text(json.dumps(kind))
    torch.manual_seed(seed)
    config = CLIPTextConfig(
        vocab_size=len(tokens), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        max_position_embeddings=CLIP_TOKENS, bos_token_id=len(tokens) - 2, eos_token_id=len(tokens) - 1,
        pad_token_id=len(tokens) - 1,
    )  # fmt: skip
    CLIPTextModel(config).save_pretrained(folder)
    return folder


def write_captioned(chain, folder):
    shutil.copytree(chain.images, folder)
    (folder / "ant" / "0.txt").write_text("a bad cab")
    return folder


def write_trajectories(chain, folder):
    for name in ("left", "right"):
        (folder / name).mkdir(parents=True)
        for i in range(3):
            chain.image(i).save(folder / name / f"{i}.jpg")
        poses = {"position": np.zeros((3, 2)), "yaw": np.zeros(3)}
        (folder / name / "traj_data.pkl").write_bytes(pickle.dumps(poses, protocol=4))
    return folder


def write_videos(folder):
    folder.mkdir()
    for i in range(2):
        make_video(folder / f"{i}.mp4", frames=20, size=(48, 32), seed=i)
    return folder


def write_manifest(chain, file):
    values = {"wind": 1.5, "rain": 0.0, "says": "a"}
    samples = [
        {"record_type": "sample", "output_rel": f"{name}/{i}.png", "metadata": {**values, "split": split}}
        for name, split in (("ant", "train"), ("bee", "val"))
        for i in range(4)
    ]
    lines = [{"record_type": "set", "output_root": str(chain.images)}, *samples]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


@pytest.fixture(scope="module")
def bases(chain, tmp_path_factory):
    """Name -> Base, made when first asked for."""
    root, made = tmp_path_factory.mktemp("bases"), {}

    def base(name) -> Base:
        if name not in made:
            flags: tuple[object, ...] = ()
            source, encoder, encode = chain.images, ("--vae", chain.vae), chain.encode
            if name == "images":
                made[name] = Base(source, flags, chain.latents, encoder, encode)
                return made[name]
            if name in ("tokens", "clips"):
                source, encode = write_videos(root / name), "--batch-size 2 --threads 1"
                if name == "tokens":
                    encoder = ("--teacher", "videomaev2", "--teacher-weights", write_teacher(root / "teacher"))
                    flags = ("--placement", "random", "--project-to", 8)
                else:
                    encoder = ("--vae", make_vae("AutoencoderKLWan", root / "wan"))
                    encode += " --frames 5 --size 32"
            if name == "random":
                flags = ("--transform", "random")
            elif name in ("captions", "text"):
                source = write_captioned(chain, root / name)
                if name == "text":
                    flags = ("--captions", "txt", "--text-encoder", write_clip(root / "clip"))
            elif name == "trajectories":
                source = write_trajectories(chain, root / name)
            elif name == "manifest":
                source = write_manifest(chain, root / "manifest.jsonl")
                flags = ("--condition-spec", "wind:1")
            out = root / f"{name} latents"
            chain.ok(f"encode {encode} --out", out, *encoder, *flags, source)
            made[name] = Base(source, flags, out, encoder, encode)
        return made[name]

    return base


def one_bit_flipped(chain, to):
    """The chain's autoencoder with another lowest bit in one of its weights."""

    def flip(state):
        name = "encoder.conv_in.weight"
        bits = state[name].contiguous().view(torch.int32).clone()
        bits.view(-1)[-1] ^= 1
        return state | {name: bits.view(torch.float32)}

    return changed_weights(chain, to, flip, "vae", WEIGHTS)


def nvimagecodec(chain, tmp):
    pytest.importorskip("nvidia.nvimgcodec")
    return "nvimagecodec"


def one_name(chain, tmp):
    (tmp / "names.txt").write_text("left\n")
    return tmp / "names.txt"


# Setting -> what it is tried on, another value (None: a switch), and what the refusal calls everything that differs.
CHANGES = {
    "vae": ("images", lambda chain, tmp: other_vae(chain, tmp / "vae"), "vae.weights"),
    "vae: one bit": ("images", lambda chain, tmp: one_bit_flipped(chain, tmp / "vae"), "vae.weights"),
    "condition_spec": ("manifest", "rain:1", "conditions"),
    "captions": ("captions", "txt", "columns"),
    "text_encoder": ("text", lambda chain, tmp: write_clip(tmp / "clip", seed=1), "text.weights"),
    "text_length": ("text", "7", "text.max_length"),
    "size": ("images", "16", "transform.size"),
    "transform": ("images", "center", "transform.rule"),
    "seed": ("random", "1", "transform.seed"),
    "mirror": ("images", None, "mirror"),
    "input_range": ("images", "0,2", "input_range"),
    "decoder": ("images", nvimagecodec, "decode"),
    "payload": ("images", "latents", "payload"),
    "dtype": ("images", "float32", "storage_dtype"),
    "compute_dtype": ("images", "bfloat16", "engine.dtype"),
    "engine": ("images", "compile", "engine"),
    "batch_size": ("images", "3", "engine.batch_size"),
    "threads": ("images", "2", "engine.threads"),
    "teacher_weights": ("tokens", lambda chain, tmp: write_teacher(tmp / "teacher", seed=1), "teacher.weights"),
    "frames": ("clips", "9", "view.sampling.frames"),
    "frame_stride": ("tokens", "3", "view.sampling.stride"),
    "fps": ("tokens", "6", "view.sampling.fps"),
    "placement": ("clips", "start", "view.sampling.placement"),
    "views": ("clips", "2", "view.sampling.views"),
    "short": ("clips", "loop", "view.sampling.short"),
    "keep_pixels": ("tokens", None, "keep_pixels"),
    "layer": ("tokens", "1", "teacher"),  # and so the weights that are used
    "token_norm": ("tokens", "layer", "teacher.token_norm"),
    "pool": ("tokens", "space", "teacher.pool"),
    "project_to": ("tokens", "4", "teacher.projection"),
}
# Setting -> what it is tried on, and another value.
KEEPS = {
    "source": ("images", lambda chain, tmp: shutil.copytree(chain.images, tmp / "moved")),
    "vae": ("images", lambda chain, tmp: shutil.copytree(chain.vae, tmp / "copied")),  # the same weights elsewhere
    "out": ("images", None),  # below: the dataset itself is a copy
    "kind": ("images", "images"),
    "split": ("manifest", "train"),
    "trajectories": ("trajectories", one_name),
    "manifest_root": ("manifest", lambda chain, tmp: shutil.copytree(chain.images, tmp / "moved")),
    "copy_pkl": ("trajectories", None),
    "text_length": ("text", str(CLIP_TOKENS)),  # what 0 stood for
    "seed": ("images", "1"),  # nothing is drawn
    "decoder": ("images", "pillow"),  # what auto stood for
    "engine": ("images", "eager"),
    "batch_size": ("images", "0"),  # what the dataset was begun with
    "threads": ("images", "0"),
    "unit_rows": ("images", "5"),
    "readers": ("images", "1"),
    "device": ("images", "cpu"),
    "max_errors": ("images", "0"),
    "allow_mixed": ("images", None),
    "cluster": ("images", "ray"),  # nothing is left for one
    "teacher_weights": (  # the same in another layout
        "tokens", lambda chain, tmp: write_teacher(tmp / "teacher.pth", "github-module"),
    ),
    "frames": ("tokens", "4"),  # the teacher's own
    "frame_stride": ("tokens", "2"),  # what 0 stood for
    "layer": ("tokens", "2"),
}  # fmt: skip


def test_every_setting_is_one_or_the_other():
    # `all` has a test of its own, and so has what stands for others: `teacher` and `cache_dir`.
    names = {name.split(":")[0] for name in CHANGES} | set(KEEPS) | {"all", "teacher", "cache_dir"}
    assert names == {field.name for field in dataclasses.fields(EncodeConfig)}


def again(chain, tmp_path, base, out, name, value):
    """The command that made `base`, with one setting changed, on the copy `out`."""
    source, encoder, more = base.source, base.encoder, []
    if callable(value):
        value = value(chain, tmp_path)
    setting = name.split(":")[0]
    if setting == "source":
        source = value
    elif setting == "vae":
        encoder = ("--vae", value)
    elif setting != "out":
        more = [f"--{setting.replace('_', '-')}", *([] if value is None else [value])]
    return chain.command(f"encode {base.encode} --out", out, *encoder, *base.flags, *more, source)


def shards(folder):
    return {path.name: path.read_bytes() for path in folder.glob("shards/*/*")}


@pytest.mark.parametrize("name", CHANGES)
def test_what_changes_bytes_is_refused(chain, bases, tmp_path, monkeypatch, name):
    def compiled(*arguments):
        raise AssertionError("a minute of compiling, to be refused after it")

    monkeypatch.setattr(engines, "compile_module", compiled)
    where, value, called = CHANGES[name]
    base = bases(where)
    out = Path(shutil.copytree(base.latents, tmp_path / "latents"))
    before = chain.contents(out)
    done = again(chain, tmp_path, base, out, name, value)
    assert done.code == 1 and "encode into another folder" in done.message
    # Nothing else is named, and nothing was touched.
    named = re.findall(r"^  (\S+): .* != .* \(now\)$", done.err, re.M)
    assert named and all(one == called or one.startswith(f"{called}.") for one in named), done.err
    assert chain.contents(out) == before


@pytest.mark.parametrize("name", KEEPS)
def test_what_changes_no_byte_is_taken(chain, bases, tmp_path, name):
    where, value = KEEPS[name]
    base = bases(where)
    out = Path(shutil.copytree(base.latents, tmp_path / "latents"))
    before = shards(out)
    done = again(chain, tmp_path, base, out, name, value)
    assert done.code == 0 and "0 files encoded now" in done.out, done.err
    assert before and shards(out) == before


def test_all_goes_on_with_what_was_encoded_alone(chain, bases, tmp_path):
    base = bases("trajectories")
    shutil.copytree(base.source, tmp_path / "data" / "recon")
    out = Path(shutil.copytree(base.latents, tmp_path / "latents" / "recon"))
    before = shards(out)
    done = chain.ok(
        f"encode {chain.encode} --all --vae", chain.vae, "--out", tmp_path / "latents", tmp_path / "data"
    )  # fmt: skip
    assert "0 files encoded now" in done.out and shards(out) == before


def test_another_number_of_rows_per_shard_gives_the_same_rows(chain, tmp_path):
    rows = []
    for unit_rows in (3, 5):
        out = tmp_path / str(unit_rows)
        chain.ok(f"encode {chain.encode} --unit-rows {unit_rows} --out", out, "--vae", chain.vae, chain.images)
        dataset = Dataset.open(out)
        places = zip(dataset.shard.tolist(), dataset.row.tolist(), strict=True)
        rows.append([dataset.open_shard(shard).columns["moments"][row].copy() for shard, row in places])
    assert all(torch.equal(*map(torch.from_numpy, pair)) for pair in zip(*rows, strict=True))


# --- machines ---


@pytest.fixture
def elsewhere(chain, tmp_path):
    """A dataset that another machine began, and one file more for it. The settings are ours: the fingerprint holds."""
    out = chain.copy("latents", tmp_path / "latents")
    provenance = json.loads((out / "provenance.json").read_text())
    provenance["informational"]["environment"] |= {"device": "Another Processor", "torch": "2.12.1"}
    (out / "provenance.json").write_text(json.dumps(provenance))
    images = chain.copy("images", tmp_path / "images")
    chain.image(5).save(images / "bee" / "new.png")
    return out, images


def test_another_machine_is_refused_by_name(chain, elsewhere):
    out, images = elsewhere
    before = chain.contents(out)
    done = chain.command(f"encode {chain.encode} --vae", chain.vae, "--out", out, images)
    assert "was begun on another machine or with other software" in done.message
    assert "\n  device: Another Processor (dataset) != " in done.message
    assert f"\n  torch: 2.12.1 (dataset) != {torch.__version__} (now)" in done.message
    assert "--allow-mixed" in done.message
    assert chain.contents(out) == before


def test_allow_mixed_says_where_each_shard_was_made(chain, elsewhere):
    out, images = elsewhere
    before = shards(out)
    done = chain.ok(f"encode {chain.encode} --allow-mixed --vae", chain.vae, "--out", out, images)
    assert "1 files encoded now" in done.out
    assert all(shards(out)[name] == data for name, data in before.items())
    dataset = Dataset.open(out)
    (new,) = (record for record in dataset.shards if Path(record.path).name not in before)
    assert new.rows == 1 and new.environment is not None
    assert new.environment["torch"] == torch.__version__ and new.environment["device"] != "Another Processor"
    assert [record.environment for record in dataset.shards if record is not new] == [None] * (len(dataset.shards) - 1)
    chain.ok("verify --full", out)
    # The new row was made here; the others are compared as far as another processor would agree.
    done = chain.ok("verify --reencode 9 --source", images, out)
    assert "9 encoded again and compared bit for bit or within 0.02 (not the engine that wrote it): sound" in done.out
