"""train ddpm and pixel-ddpm through the command line: artifacts, resume, --init, old spellings, bad input."""

import contextlib
import io
import json
import re
import shutil
import sys

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file

from fastlatent.cli import main, train_legacy_ddpm
from fastlatent.models.unet import ConditionVectors, load_unet, scheduler

SPEC = "temperature:1,wind:3,wind_mag:1"
TINY = (
    "--block-out-channels 8,8 --layers-per-block 1 --norm-groups 4 --batch-size 4 --warmup-steps 1 "
    "--learning-rate 1e-2 --checkpoint-every 2 --threads 1 --preview-images 2 --preview-inference-steps 2"
)


def write_manifest(folder, count, size, metadata, pixels=None):
    """PNG images and the manifest that lists them."""
    (folder / "images").mkdir(parents=True)
    records = [{"record_type": "set", "output_root": str(folder / "images")}]
    for i in range(count):
        image = np.random.default_rng(i).integers(0, 256, (size, size), dtype=np.uint8) if pixels is None else pixels[i]
        Image.fromarray(image).save(folder / "images" / f"{i:05}.png")
        records.append({"record_type": "sample", "output_rel": f"{i:05}.png", "metadata": metadata(i)})
    (folder / "manifest.json").write_text("\n".join(map(json.dumps, records)))
    return folder / "manifest.json"


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    # Every fourth image has no temperature; sample 1 has no wind.
    def metadata(i):
        known = {"split": "train", "temperature": 10.0 + i, "wind": [3.0, 4.0 * i, 0.0]}
        return {k: v for k, v in known.items() if not ((k == "temperature" and i % 4 == 0) or (k == "wind" and i == 1))}

    return write_manifest(tmp_path_factory.mktemp("manifest"), 9, 8, metadata)


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vae")
    torch.manual_seed(0)
    AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2, layers_per_block=1, norm_num_groups=4, latent_channels=2,
    ).save_pretrained(folder)  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def latents(tmp_path_factory, manifest, vae):
    out = tmp_path_factory.mktemp("latents") / "set"
    line = f"encode --size 8 --batch-size 3 --threads 1 --condition-spec {SPEC} --out {out} --vae {vae} {manifest}"
    assert main(line.split()) == 0
    return out


@pytest.fixture(scope="module")
def pixel_run(tmp_path_factory, manifest):
    out = tmp_path_factory.mktemp("pixels") / "run"
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        assert main(f"train pixel-ddpm {manifest} --out {out} {PIXELS} --steps 4".split()) == 0
    assert "condition 'temperature': 3 of 9 samples lack it; the first is '00000.png'" in shown.getvalue()
    return out


PIXELS = f"{TINY} --size 8 --channels 1 --condition-spec {SPEC}"


@pytest.fixture
def fails(capsys):
    def run(line: str) -> str:
        assert main(line.split()) in (1, 2)
        error = capsys.readouterr().err
        assert "Traceback" not in error
        return error

    return run


def test_pixel_run_leaves_what_diffusers_loads(pixel_run, manifest):
    for folder in (pixel_run, pixel_run / "checkpoint-000004"):
        UNet2DConditionModel.from_pretrained(folder / "unet")
        assert DDPMScheduler.from_pretrained(folder).config.clip_sample is False
        assert (folder / "preview.png").exists()
        assert {path.name for path in (folder / "images").iterdir()} == {f"sample_step4_img{i}.png" for i in range(2)}
    source = json.loads((pixel_run / "vae_source.json").read_text())
    assert source["vae_path"] is None and source["vae"] is None and source["condition_spec"] == SPEC
    # Over the images that have it: temperatures of 6 of 9, winds of 8.
    temperatures = [10.0 + i for i in range(9) if i % 4]
    winds = np.array([[3.0, 4.0 * i, 0.0] for i in range(9) if i != 1])
    magnitudes = np.hypot(winds[:, 0], winds[:, 1])
    mean = [np.mean(temperatures), *winds.mean(axis=0), magnitudes.mean()]
    std = [np.std(temperatures), 1.0, winds[:, 1].std(), 1.0, magnitudes.std()]  # constant numbers: 1
    np.testing.assert_allclose(source["conditions"]["mean"], mean, rtol=1e-12)
    np.testing.assert_allclose(source["conditions"]["std"], std, rtol=1e-12)


def test_resume_is_exact_and_keeps_what_the_weights_mean(pixel_run, manifest, tmp_path):
    # The first five samples: other means. --init brings its own, and a resume needs no --init.
    lines = manifest.read_text().splitlines()
    (tmp_path / "few.json").write_text("\n".join(lines[:6]))
    line = f"train pixel-ddpm {tmp_path / 'few.json'} {PIXELS} --steps 4"
    assert main(f"{line} --out {tmp_path / 'whole'} --init {pixel_run}".split()) == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoint-000004")
    # What --init says now does not matter.
    assert main(f"{line} --out {tmp_path / 'again'} --init {tmp_path / 'gone'}".split()) == 0
    for run in ("whole", "again"):
        assert (tmp_path / run / "vae_source.json").read_text() == (pixel_run / "vae_source.json").read_text()
    one, two = (load_file(tmp_path / run / "checkpoint-000004" / "training.safetensors") for run in ("whole", "again"))
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def test_latents_from_the_dataset_and_from_images(latents, manifest, vae, tmp_path, capsys):
    sizes = f"{TINY} --steps 2"
    assert main(f"train ddpm {latents} --out {tmp_path / 'stored'} {sizes}".split()) == 0
    shown = capsys.readouterr().out
    assert "9 latents of 2×4×4" in shown and f"conditions: {SPEC}" in shown
    images = f"train ddpm {manifest} --vae {vae} --size 8 --latent-statistics 9 --out {tmp_path / 'images'}"
    line = f"{images} {sizes} --condition-spec temperature:1 --unet UNet2DModel --gradient-checkpointing"
    assert main([*line.split(), "--enable_xformers_memory_efficient_attention"]) == 0
    assert "PyTorch's scaled_dot_product_attention" in capsys.readouterr().out
    for run, spec in (("stored", SPEC), ("images", "temperature:1")):
        model, config = load_unet(tmp_path / run)
        assert config.condition_spec == spec and config.vae["path"] == str(vae)
        assert model.kind == ("UNet2DConditionModel" if run == "stored" else "UNet2DModel")
        picture = np.asarray(Image.open(tmp_path / run / "images" / "sample_step2_img0.png"))
        assert picture.shape == (8, 8, 3)  # decoded
        source = json.loads((tmp_path / run / "vae_source.json").read_text())
        assert len(source["latents_mean"]) == 2 and min(source["latents_std"]) > 0
    # Other data of the same kind: weights go on, with the normalisation that they were trained on.
    more = f"train ddpm {latents} --out {tmp_path / 'more'} {sizes} --normalization all --init {tmp_path / 'stored'}"
    assert main(more.split()) == 0
    assert load_unet(tmp_path / "more")[1] == load_unet(tmp_path / "stored")[1]
    selected = f"train ddpm {latents} --out {tmp_path / 'none'} {sizes} --condition-spec none"
    assert main(selected.split()) == 0
    assert load_unet(tmp_path / "none")[1].conditions == ()
    assert load_unet(tmp_path / "none")[0].kind == "UNet2DModel"


def test_without_the_autoencoder_there_are_no_previews(latents, vae, tmp_path, capsys):
    moved = vae.with_name("moved")
    vae.rename(moved)
    try:
        assert main(f"train ddpm {latents} --out {tmp_path / 'run'} {TINY} --steps 2".split()) == 0
    finally:
        moved.rename(vae)
    assert "no previews: the autoencoder that made these latents was at" in capsys.readouterr().out
    assert not (tmp_path / "run" / "preview.png").exists()


def test_a_unet_from_a_config_file(pixel_run, manifest, tmp_path, fails):
    own = json.loads((pixel_run / "unet" / "config.json").read_text())
    line = (
        f"train pixel-ddpm {manifest} --out {tmp_path / 'run'} {PIXELS} --steps 1 --unet-config {tmp_path / 'c.json'}"
    )

    def write(**change):
        (tmp_path / "c.json").write_text(json.dumps({**own, **change}))

    for change, message in (
        ({"_class_name": "UNet1DModel"}, "expected _class_name UNet2DModel or UNet2DConditionModel"),
        ({"in_channels": 4}, "expected in_channels 1 for this data, got 4"),
        (
            {"projection_class_embeddings_input_dim": 5},
            "expected projection_class_embeddings_input_dim 9 for conditions",
        ),
        ({"dropout": 0.1}, "expected dropout 0, got 0.1"),
        ({"block_out_channels": [8] * 5}, "5 levels halve the side 4 times"),
        ({"addition_embed_type": "text_time", "addition_time_embed_dim": 8}, "this UNet cannot take the data"),
        ({"widths": [8]}, "cannot be built with these sizes"),
    ):
        write(**change)
        assert message in fails(line)
    assert "--unet" in fails(f"{line} --unet UNet2DModel")
    assert "leave one out" in fails(f"{line} --init {pixel_run}")
    assert not (tmp_path / "run").exists()
    # Written by hand: what data and conditions say is filled in; blocks with cross-attention are given an empty text.
    (tmp_path / "c.json").write_text(
        json.dumps(
            {
                "_class_name": "UNet2DConditionModel", "block_out_channels": [8, 8], "norm_num_groups": 4,
                "layers_per_block": 1, "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
                "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"], "cross_attention_dim": 8,
                "attention_head_dim": 4,
            }
        )
    )  # fmt: skip
    assert main(line.split()) == 0
    assert load_unet(tmp_path / "run")[0].sizes["projection_class_embeddings_input_dim"] == 9


def test_bad_input(pixel_run, manifest, latents, tmp_path, fails):
    pixels, out = f"train pixel-ddpm {manifest} --steps 1", f"--out {tmp_path / 'run'}"
    assert "no image has numbers for 'temprature'" in fails(
        f"{pixels} {out} {TINY} --size 8 --condition-spec temprature:1"
    )
    assert "is not name:count" in fails(f"{pixels} {out} {TINY} --size 8 --condition-spec temperature")
    assert "multiple of 2; got 7. Use fewer levels" in fails(f"{pixels} {out} {TINY} --size 7")
    assert "expected 1 (grey) or 3 (RGB), got 2" in fails(f"{pixels} {out} {TINY} --size 8 --channels 2")
    assert "multiples of --norm-groups 3" in fails(f"{pixels} {out} {TINY} --size 8 --norm-groups 3")
    assert "means nothing for" in fails(
        f"train pixel-ddpm {manifest.parent / 'images'} {out} {TINY} --size 8 --condition-spec temperature:1"
    )
    assert "names no image" in fails(f"{pixels} {out} {TINY} --size 8 --split val")
    assert "has no wind:2" in fails(f"train ddpm {latents} {out} {TINY} --steps 1 --condition-spec wind:2")
    assert not (tmp_path / "run").exists()
    init = f"{out} {TINY} --size 8 --init {pixel_run}"
    assert "its conditions is" in fails(f"{pixels} {init} --channels 1")
    assert "its prediction_type is epsilon, expected v_prediction" in fails(
        f"{pixels} {init} --channels 1 --condition-spec {SPEC} --prediction-type v_prediction"
    )
    assert "its channels is 1, expected 3" in fails(f"{pixels} {init} --condition-spec {SPEC}")
    same = f"{pixels} {init} --channels 1 --condition-spec {SPEC}"
    for more, message in (
        ("--block-out-channels 16,8", "--block-out-channels 16,8: --init .* has 8,8; leave"),
        ("--layers-per-block 3", "--layers-per-block 3: --init .* has 1; leave"),
        ("--norm-groups 8", "--norm-groups 8: --init .* has 4; leave"),
        ("--unet UNet2DModel", "--unet UNet2DModel: --init .* has UNet2DConditionModel; leave"),
    ):
        assert re.search(message, fails(f"{same} {more}"))


def test_the_old_console_script(manifest, tmp_path, monkeypatch, capsys):
    arguments = (
        f"--manifest_path={manifest} --output_dir {tmp_path / 'run'} --resolution 8 --train_batch_size 4 "
        "--num-epochs 2 --dry-run"
    )
    for line in (arguments, arguments.replace("_path=", "-path ")):
        monkeypatch.setattr(sys, "argv", ["train-legacy-ddpm", *line.split()])
        assert train_legacy_ddpm() == 0
        shown = capsys.readouterr().out
        for expected in (f"source: {manifest}", f"out: {tmp_path / 'run'}", "size: 8", "batch_size: 4", "epochs: 2"):
            assert f"{expected}\n" in shown
    more = (
        "--use_ema --lr_warmup_steps 7 --checkpointing_steps 9 --checkpoints_total_limit 3 --ema_max_decay 0.99 "
        "--adam_weight_decay 0.5 --ddpm_beta_schedule cosine --gradient_accumulation_steps 2 --adam_epsilon 1e-7 "
        "--logger tensorboard --max_train_steps=11"
    )
    monkeypatch.setattr(sys, "argv", ["train-legacy-ddpm", *arguments.split(), *more.split()])
    assert train_legacy_ddpm() == 0
    shown = capsys.readouterr().out
    for expected in (
        "warmup_steps: 7", "checkpoint_every: 9", "keep_checkpoints: 3", "ema_decay: 0.99", "weight_decay: 0.5",
        "beta_schedule: cosine", "accumulate: 2", "adam_eps: 1.0e-07", "steps: 11",
    ):  # fmt: skip
        assert f"\n{expected}\n" in shown, expected
    assert "tensorboard" in shown
    monkeypatch.setattr(sys, "argv", ["train-legacy-ddpm", *arguments.split(), "--lr_num_cycles", "2"])
    assert train_legacy_ddpm() == 2
    assert "unknown argument '--lr-num-cycles'" in capsys.readouterr().err


@pytest.mark.soak
def test_samples_are_as_bright_as_their_condition_says(tmp_path):
    """Handwritten digits, each lifted by a random grey: the mean brightness is the temperature, of 9 in 10."""
    from sklearn.datasets import load_digits

    digits, random = load_digits().images, np.random.default_rng(0)
    lifts = random.uniform(0, 0.6, len(digits))
    pixels = [np.rint(255 * (lift + 0.4 * one / 16)).astype(np.uint8) for lift, one in zip(lifts, digits, strict=True)]

    def metadata(i):
        return {"temperature": 10 + 20 * pixels[i].mean() / 255} if i % 10 else {}

    manifest = write_manifest(tmp_path, len(digits), 8, metadata, pixels)
    line = (
        f"train pixel-ddpm {manifest} --out {tmp_path / 'run'} --channels 1 --size 8 --condition-spec temperature:1 "
        "--block-out-channels 16,32 --norm-groups 8 --layers-per-block 1 --steps 900 --batch-size 32 "
        "--learning-rate 2e-3 --warmup-steps 50 --ema-decay 0.99 --beta-schedule cosine --prediction-type v_prediction "
        "--threads 1"
    )
    assert main(line.split()) == 0
    model, config = load_unet(tmp_path / "run")
    count = 64
    wanted = torch.linspace(13, 27, count)

    def correlation(present, dropped):
        vector = ConditionVectors(config)(wanted[:, None], present, dropped)
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(count, 1, 8, 8, generator=generator)
        solver = scheduler(config)
        solver.set_timesteps(50)
        for t in solver.timesteps.tolist():
            x = solver.step(model(x, torch.full((count,), t), vector), t, x, generator=generator).prev_sample
        assert x.isfinite().all()
        return float(np.corrcoef(x.clamp(-1, 1).mean((1, 2, 3)), wanted)[0, 1])

    given = correlation(torch.ones(count, 1), torch.zeros(count))
    null = correlation(torch.zeros(count, 1), torch.ones(count))
    print(f"correlation of brightness with the condition: {given:.3f}; without: {null:.3f}")
    assert given >= 0.9 and abs(null) < 0.4  # 64 unrelated numbers: 0.25 is two standard deviations
