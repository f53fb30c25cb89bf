"""train vae from the command line: layouts, what it starts from, validation, bad settings, and that it learns."""

import json
import os
import re
import shutil

import numpy as np
import plain_sigma_vae
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file

from fastlatent.cli import main
from fastlatent.config import TrainVaeConfig
from fastlatent.encoders.load import load_autoencoder
from fastlatent.pipeline.checkpoints import checkpoints

SIZES = "--latent-channels 2 --block-out-channels 8,8 --layers-per-block 1 --norm-groups 4"
RUN = "--steps 2 --batch-size 2 --warmup-steps 1 --checkpoint-every 2 --threads 1 --device cpu"


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for i in range(5):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (24, 26, 3), dtype=np.uint8)).save(
            folder / f"{i}.png"
        )
    return folder


@pytest.fixture(scope="module")
def trained(images, tmp_path_factory):
    """A run with everything on that needs no weights from elsewhere."""
    out = tmp_path_factory.mktemp("run") / "vae"
    words = f"train vae {images} --out {out} --size 24 {SIZES} {RUN} --steps 4 --disc-weight 0.5 --disc-start 2"
    held_out = out.parent / "held-out"
    shutil.copytree(images, held_out)
    assert main([*words.split(), "--validation", str(held_out), "--validation-images", "3"]) == 0
    return out


@pytest.fixture
def train(images, tmp_path, capsys):
    def run(more, *paths, source=images, size=8, expected=0):
        words = f"train vae --out {tmp_path / 'out'} --size {size} {RUN} {more}".split()
        code = main([*words, *map(str, paths), str(source)])
        captured = capsys.readouterr()
        assert code == expected, captured.err
        return captured.out if code == 0 else captured.err

    return run


def refused(train, message, more, *paths, **options):
    assert re.search(message, train(more, *paths, expected=1, **options)), message


def test_a_run_loads_in_diffusers(trained, images):
    model, info = AutoencoderKL.from_pretrained(trained, output_loading_info=True)
    assert not any(info.values())
    assert model.config.scaling_factor > 0
    assert len(model.config.latents_mean) == len(model.config.latents_std) == 2
    assert load_autoencoder(trained).identity() == load_autoencoder(checkpoints(trained)[-1]).identity()
    assert (trained / "preview.png").exists()
    found = json.loads((trained / "validation.json").read_text())
    assert found["images"] == 3
    assert found["psnr"] > 0
    assert "ssim" in found
    lines = [json.loads(line) for line in (trained / "log.jsonl").read_text().splitlines()]
    assert [line["adaptive_weight"] > 0 for line in lines] == [False, False, True, True]
    # The discriminator is trained, and not what users load.
    assert not any("discriminator" in name for name in model.state_dict())


def test_what_is_said_of_the_kl_weight(train):
    out = train(f"{SIZES} --kl-weight 1e-5 --kl-reduction sum")
    # 8² RGB: 192 pixel values
    assert "latent diffusion's 1e-06" in out
    assert "is 5.2e-09 here (--kl-reduction sum); 1e-05 here is 0.0019 there" in out


def test_the_decoder_alone(train, trained, tmp_path):
    train(f"--init {trained} --decoder-only --learning-rate 1e-2 --gradient-checkpointing", size=24)
    before, after = (load_file(run / "diffusion_pytorch_model.safetensors") for run in (trained, tmp_path / "out"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        frozen = name.startswith(("encoder.", "quant_conv."))
        assert torch.equal(tensor, after[name]) == frozen, name


def test_a_sigma_vae_goes_on(train, tmp_path):
    weights = plain_sigma_vae.random_weights(
        0, width=64, hidden=64, depth=1, patch=4, side=2, latent_size=5, dtype=torch.float32
    )
    config = {"img_size": 8, "patch_size": 4, "latent_size": 5, "std": 0.5}
    torch.save({"config": config, "model": weights}, tmp_path / "sigma.pt")
    out = train(f"--init {tmp_path / 'sigma.pt'} --kl-weight 0.01 --validation-split none", size=8, expected=1)
    assert "--split 'none' means nothing" in out
    out = train(f"--init {tmp_path / 'sigma.pt'} --kl-weight 0.01")
    assert "KL weight" not in out
    again = load_autoencoder(tmp_path / "out")
    assert again.config["std"] == 0.5
    assert again.latent_channels == 5
    other = f"--init {tmp_path / 'sigma.pt'} --out {tmp_path / 'other'}"
    refused(train, "--latent-channels 6: --init .* has 5; leave", f"{other} --latent-channels 6")
    refused(train, "--size 16: --init .* has 8", other, size=16)


def test_a_resumed_run_needs_no_init(train, trained, tmp_path):
    more = "--decoder-only --learning-rate 1e-2 --keep-checkpoints 9 --steps 4"
    out = train(f"--init {trained} {more}", size=24)
    assert "measured on 5 latents, of 10,000 asked for" in out
    whole = load_file(checkpoints(tmp_path / "out")[-1] / "training.safetensors")
    shutil.rmtree(tmp_path / "out" / "checkpoint-000004")
    # Sizes, and which weights are frozen, are those of the run; what --init says now does not matter.
    out = train(f"{more} --init {tmp_path / 'gone'}", size=24)
    assert "resuming from step 2" in out
    again = load_file(checkpoints(tmp_path / "out")[-1] / "training.safetensors")
    assert whole.keys() == again.keys()
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    shutil.rmtree(tmp_path / "out" / "checkpoint-000004")
    assert "resuming from step 2" in train(more, size=24)
    refused(train, "holds a run with other settings.*\n.*decoder_only", "--steps 4 --learning-rate 1e-2", size=24)


def test_images_that_changed_are_other_data(train, images, tmp_path):
    mine = tmp_path / "mine"
    shutil.copytree(images, mine)
    more = f"{SIZES} --latent-statistics 5"
    assert "measured on 5 latents\n" in train(more, source=mine)
    os.utime(mine / "0.png", ns=(1, 1))  # as many bytes, at another time
    refused(train, "data: the training data changed", more, source=mine)


def test_validation_is_on_other_images(train, images, tmp_path):
    records = [{"record_type": "set", "output_root": str(images)}]
    for i in range(5):
        split = {"split": "val" if i == 4 else "train"}
        records.append({"record_type": "sample", "output_rel": f"{i}.png", "metadata": split})
    manifest = tmp_path / "m.json"
    manifest.write_text("\n".join(map(json.dumps, records)))
    options = {"source": manifest, "size": 8}
    for more in (
        "--validation-split val",
        "--validation-split val --split val",
        f"--validation {manifest} --split train",
        f"--validation {tmp_path}/./m.json --validation-split val",
    ):
        refused(train, "would measure images that are trained on; name different ones with --split", more, **options)
    assert not (tmp_path / "out").exists()
    train(f"{SIZES} --split train --validation-split val", **options)
    assert json.loads((tmp_path / "out" / "validation.json").read_text())["images"] == 1


def test_sixteen_bit_images(train, tmp_path):
    for folder in ("deep", "shallow"):
        (tmp_path / folder).mkdir()
    for i in range(2):
        deep = np.random.default_rng(i).integers(0, 65536, (8, 8), dtype=np.uint16)
        Image.fromarray(deep).save(tmp_path / "deep" / f"{i}.png")
    losses = []
    for more in ("--preserve-input-precision", "--no-preserve-input-precision"):
        train(f"{SIZES} --channels 1 {more}", "--out", tmp_path / more, source=tmp_path / "deep")
        losses.append(json.loads((tmp_path / more / "log.jsonl").read_text().splitlines()[0])["mse"])
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)


def test_settings_that_contradict_each_other(train, trained, images, tmp_path):
    kl = f"--init {trained}"
    for message, more in (
        ("--lpips-weight 1.0 needs --lpips-weights. LPIPS needs two sets", "--lpips-weight 1"),
        (
            "--lpips-weights .*nothing.pth: there is no such file",
            "--lpips-weight 1 --lpips-weights nothing.pth --size 16",
        ),
        ("--size 8: --lpips-weight needs images of at least 16", "--lpips-weight 1 --lpips-weights nothing.pth"),
        ("--size 8: --disc-weight needs images of at least 24", "--disc-weight 1"),
        ("--decoder-only needs --init", "--decoder-only"),
        ("--size 8: --layout kl-16 needs a multiple of 16", "--layout kl-16"),
        ("--latent-channels 8: --layout kl-16 has 16", "--layout kl-16 --latent-channels 8 --size 16"),
        ("--norm-groups 4: --layout sigma-vae has 32", "--layout sigma-vae --norm-groups 4 --size 16"),
        ("--size 9: 2 levels in --block-out-channels need a multiple of 2", f"{SIZES} --size 9"),
        ("--norm-groups 3 must divide every width", "--norm-groups 3"),
        ("--channels: expected 1", "--channels 2"),
        ("--size 9: --init .* needs a multiple of 2", f"{kl} --size 9"),
        ("--block-out-channels 8,16: --init .* has 8, ?8; leave", f"{kl} --block-out-channels 8,16"),
        ("--channels 1: --init .* has 3", f"{kl} --channels 1"),
        ("--layout kl-16: --init .* has kl", f"{kl} --layout kl-16"),
        ("--validation .*empty: expected images|empty'? holds no image", f"--validation {tmp_path / 'empty'}"),
        ("--split 'val' means nothing", "--validation-split val"),
        ("would measure images that are trained on", f"--validation {images}/."),
    ):
        (tmp_path / "empty").mkdir(exist_ok=True)
        refused(train, message, more)
    assert not (tmp_path / "out").exists()


def test_presets_are_whole():
    for name, values in TrainVaeConfig.PRESETS.items():
        assert set(values) <= set(TrainVaeConfig.__dataclass_fields__), name


@pytest.mark.soak
def test_beats_pca_with_as_many_numbers(tmp_path):
    """Digits, 64 pixels in 8 numbers: the squared error on images that neither has seen."""
    from sklearn.datasets import load_digits
    from sklearn.decomposition import PCA

    pixels = (load_digits().images / 16 * 255).round().astype(np.uint8)
    order = np.random.default_rng(0).permutation(len(pixels))
    held_out, seen = np.split(order, [360])
    (tmp_path / "train").mkdir()
    for i in seen:
        Image.fromarray(pixels[i]).save(tmp_path / "train" / f"{i}.png")
    words = (
        f"train vae {tmp_path / 'train'} --out {tmp_path / 'vae'} --size 8 --channels 1 --latent-channels 2 "
        "--block-out-channels 32,64,64 --layers-per-block 1 --norm-groups 8 --steps 400 --batch-size 64 "
        "--learning-rate 2e-3 --ema-decay 0.99 --kl-weight 1e-5 --l1-weight 0 --device cpu --threads 1"
    )
    assert main(words.split()) == 0
    vae = load_autoencoder(tmp_path / "vae")

    def rows(which):
        return torch.from_numpy(pixels[which].astype(np.float32) / 127.5 - 1)[:, None]

    means = vae.encode(rows(held_out))[:, :2]
    assert means[0].numel() == 8
    mine = float((vae.decode(means) - rows(held_out)).square().mean())
    pca = PCA(8).fit(rows(seen).flatten(1).numpy())
    x = rows(held_out).flatten(1).numpy()
    theirs = float(np.square(pca.inverse_transform(pca.transform(x)) - x).mean())
    print(f"held-out squared error: {mine:.4f}, PCA with 8 components {theirs:.4f}")
    assert mine < 0.7 * theirs
