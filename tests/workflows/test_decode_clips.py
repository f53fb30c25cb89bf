"""Clips there and back through the real commands: what `encode` made of videos, `decode` makes videos of."""

import json

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan
from PIL import Image
from tiny_video_models import make_vae
from toy_videos import make_video

from fastlatent.media.videos import video_info
from fastlatent.store.reader import Dataset

LENGTHS = {"a/x.mp4": 5, "a/x.webm": 9}  # frames of the clip that each gives: names that differ in their suffix alone


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("decode-clips")
    for name, frames in LENGTHS.items():
        make_video(root / "videos" / name, frames=2 * frames, size=(48, 32))
    make_vae("AutoencoderKLWan", root / "wan" / "vae")
    return root


@pytest.fixture(scope="module")
def dataset(chain, place):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        settings = "--vae wan --frames 5,9 --fps 12 --frame-stride 2 --size 32 --mirror --dtype int8 --threads 1"
        chain.ok("", "encode", "videos", *settings.split(), "--out", "clips")
    return place / "clips"


def test_every_row_becomes_the_video_that_diffusers_decodes(chain, dataset, place):
    chain.ok("decode --format png-frames --threads 1", dataset)
    out = place / "clips-videos"
    listed = [json.loads(line) for line in (out / "videos.jsonl").read_text().splitlines()]
    assert listed == [{"file": f"videos/00000{i}", "name": name} for i, name in enumerate(LENGTHS)]
    vae, rows = AutoencoderKLWan.from_pretrained(place / "wan" / "vae"), Dataset.open(dataset)
    for i, frames in enumerate(LENGTHS.values()):
        columns = rows.open_shard(int(rows.shard[i])).columns
        stored, scale = (columns[name][rows.row[i], 0] for name in ("moments", "moments.scale"))  # not the mirrored one
        means = (stored * scale[:, None, None, None].astype(np.float32))[: len(stored) // 2]
        with torch.no_grad():
            wanted = vae.decode(torch.from_numpy(means)[None]).sample[0].clamp(-1, 1)
        files = sorted((out / listed[i]["file"]).iterdir())
        assert len(files) == frames
        pixels = np.stack([np.asarray(Image.open(file)) for file in files])
        assert np.array_equal(pixels, wanted.add(1).mul(127.5).round().byte().permute(1, 2, 3, 0).numpy())


def test_settings(chain, dataset, place, tmp_path):
    done = chain.ok("decode --limit 1 --output-dir", tmp_path / "a", dataset)
    assert "1 videos (mp4)" in done.out
    assert video_info(tmp_path / "a" / "videos" / "000000.mp4") == (5, 32, 32, 6.0)  # 12 a second, every other one
    make_vae("AutoencoderKLWan", place / "other", seed=1)
    (tmp_path / "b" / "videos").mkdir(parents=True)
    for line, message in (
        (f"--vae {place / 'other'}", "is not the autoencoder that made these latents"),
        ("--step-filter first --columns 3", "--step-filter, --columns: not for datasets of clips"),
        (f"--output-dir {tmp_path / 'b'}", "is not of an earlier run of decode"),
    ):
        refused = chain.command(f"decode --limit 1 {line}", dataset)
        assert refused.code == 1 and message in refused.message
    assert not list((tmp_path / "b" / "videos").iterdir())


def test_a_model_of_the_hub_is_looked_for_by_its_name_again(chain, place, tmp_path, monkeypatch):
    monkeypatch.setattr("fastlatent.encoders.video_clips.find_vae", lambda name, near: place / "wan" / "vae")
    encode = "encode --vae owner/model --frames 5 --size 32 --threads 1 --out"
    chain.ok(encode, tmp_path / "clips", place / "videos")
    assert Dataset.open(tmp_path / "clips").provenance["informational"]["vae_path"] == "owner/model"
