"""Whatever is wrong, a command ends with one message that names the thing and the way out, and harms nothing."""

import json
import os
import re
import shutil

import numpy as np
import pytest
import torch
from chain_helpers import changed_config, changed_weights, encode, other_vae, train_ar, train_vae
from PIL import Image
from safetensors.torch import save_file

from fastlatent.pipeline.checkpoints import checkpoints
from fastlatent.store.reader import Dataset

NAN = float("nan")


# --- sources ---


@pytest.mark.parametrize("command", ["encode", "train vae"])
def test_no_source(chain, tmp_path, command):
    run = encode if command == "encode" else lambda chain, images, out: train_vae(chain, out, images=images)
    assert "does not exist" in run(chain, tmp_path / "nothing", tmp_path / "out").message
    (tmp_path / "empty" / "class").mkdir(parents=True)
    (tmp_path / "empty" / "class" / "notes.txt").write_text("no image")
    assert "holds no image; looked for .bmp" in run(chain, tmp_path / "empty", tmp_path / "out").message
    assert "is a file" in run(chain, tmp_path / "empty" / "class" / "notes.txt", tmp_path / "out").message
    assert not (tmp_path / "out").exists()


def test_bad_files_are_left_out_and_listed(chain, images, tmp_path):
    good = (images / "ant" / "0.png").read_bytes()
    (images / "ant" / "cut.png").write_bytes(good[: len(good) // 2])
    (images / "ant" / "empty.png").write_bytes(b"")
    (images / "bee" / "text.png").write_text("this is no picture")
    done = encode(chain, images, tmp_path / "d")
    assert done.code == 0
    assert "3 files could not be used and are not in the dataset:" in done.out
    assert "'ant/empty.png': empty file" in done.out
    dataset = Dataset.open(tmp_path / "d")
    assert len(dataset) == 8
    assert [one.key for one in dataset.quarantined] == ["ant/cut.png", "ant/empty.png", "bee/text.png"]
    assert "ant/cut.png" in chain.ok("inspect", tmp_path / "d").out
    # They are not tried again, and do not disturb anything that comes later.
    again = encode(chain, images, tmp_path / "d")
    assert "0 files encoded now" in again.out
    assert "3 files could not be used" in again.out
    (images / "ant" / "cut.png").write_bytes(good)  # repaired
    assert "1 files encoded now" in encode(chain, images, tmp_path / "d").out
    assert len(Dataset.open(tmp_path / "d")) == 9


def test_only_bad_files(chain, tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_text("no")
    message = encode(chain, tmp_path / "images", tmp_path / "d").message
    assert "expected at least one file that can be encoded, got 0 of 1" in message
    assert "a.png" in message
    assert train_vae(chain, tmp_path / "vae", "--batch-size 1", images=tmp_path / "images").code == 1


def test_train_vae_leaves_bad_files_out(chain, images, tmp_path):
    (images / "ant" / "text.png").write_text("no picture")
    done = train_vae(chain, tmp_path / "vae", images=images)
    assert done.code == 0
    listed = tmp_path / "vae" / "left_out.txt"
    assert f"1 files cannot be used, see {listed}; 'ant/text.png': no readable" in done.out
    assert listed.read_text().startswith("'ant/text.png': no readable")


def test_every_kind_of_image(chain, tmp_path):
    source = tmp_path / "images" / "all"
    source.mkdir(parents=True)
    rgb = chain.image(1)
    rgb.quantize(16).save(source / "palette.png")
    rgb.convert("CMYK").save(source / "cmyk.jpg")
    rgb.convert("L").save(source / "grey.png")
    rgb.convert("LA").save(source / "grey_alpha.png")
    rgb.convert("RGBA").save(source / "alpha.png")
    rgb.convert("1").save(source / "black_white.png")
    Image.fromarray(np.asarray(rgb.convert("L")).astype(np.uint16) * 257).save(source / "deep.png")
    rgb.save(source / "picture.gif.bmp")
    turned = Image.Exif()
    turned[0x0112] = 6  # to be turned a quarter: the file's 24 x 20 is 20 wide and 24 high
    rgb.save(source / "turned.jpg", exif=turned)
    Image.new("RGB", (1, 1)).save(source / "one_pixel.png")
    Image.new("RGB", (400, 3)).save(source / "wide.png")
    assert encode(chain, tmp_path / "images", tmp_path / "d").code == 0
    dataset = Dataset.open(tmp_path / "d")
    assert (len(dataset), dataset.quarantined) == (11, [])
    sizes = {dataset.key(i): tuple(dataset.orig_hw[i].tolist()) for i in range(len(dataset))}
    assert (sizes["all/turned.jpg"], sizes["all/cmyk.jpg"]) == ((24, 20), (20, 24))
    moments = {
        dataset.key(i): dataset.open_shard(int(dataset.shard[i])).columns["moments"][dataset.row[i]].astype(np.float64)
        for i in range(len(dataset))
    }
    # Grey of 16 bits is scaled without rounding to 8: half a grey level here and there.
    np.testing.assert_allclose(moments["all/deep.png"], moments["all/grey.png"], atol=0.03)
    np.testing.assert_allclose(moments["all/alpha.png"], moments["all/picture.gif.bmp"], atol=2e-3)
    assert np.abs(moments["all/turned.jpg"] - moments["all/cmyk.jpg"]).max() > 0.01


def test_names_of_every_kind(chain, tmp_path):
    source = tmp_path / "images"
    names = ["träge ☃", "a b", "quote'\"", "n" * 250 + ".png", "new\nline", os.fsdecode(b"\xff\xfe")]
    for name in names:
        (source / name).mkdir(parents=True)
        chain.image(len(name)).save(source / name / f"{name[:240].removesuffix('.png')}.png", format="PNG")
    done = encode(chain, source, tmp_path / "d")
    assert done.code == 0, done.err
    dataset = Dataset.open(tmp_path / "d")
    assert dataset.classes == sorted(names, key=os.fsencode)
    assert (tmp_path / "d" / "dataset.json").read_bytes().isascii()
    chain.ok("inspect", tmp_path / "d")
    chain.ok(f"train ar {chain.train_ar} --out", tmp_path / "ar", tmp_path / "d")
    assert chain.sample(tmp_path / "ar", tmp_path / "s").code == 0
    chain.ok("decode --threads 1 --output-dir", tmp_path / "o", tmp_path / "d")
    lines = [json.loads(line)["name"] for line in (tmp_path / "s" / "images.jsonl").read_text().splitlines()]
    assert lines == dataset.classes


def test_folders_with_odd_names(chain, tmp_path):
    odd = tmp_path / "träge\n☃"
    shutil.copytree(chain.vae, odd / "vae")
    # Bytes that are no UTF-8 only where images are: safetensors and diffusers cannot open such paths.
    source = odd / os.fsdecode(b"\xff")
    shutil.copytree(chain.images, source)
    assert encode(chain, source, odd / "latents", vae=odd / "vae").code == 0
    assert train_ar(chain, odd / "ar", latents=odd / "latents").code == 0
    assert train_ar(chain, odd / "ar", latents=odd / "latents").code == 0  # compares the kept settings
    assert chain.sample(odd / "ar", odd / "samples").code == 0
    shutil.copytree(chain.vae, source / "vae")
    assert "does not load" in encode(chain, chain.images, odd / "o", vae=source / "vae").message


def test_a_class_with_one_image(chain, images, tmp_path):
    (images / "cat").mkdir()
    chain.image(5).save(images / "cat" / "only.png")
    assert encode(chain, images, tmp_path / "d").code == 0
    assert train_ar(chain, tmp_path / "ar", latents=tmp_path / "d").code == 0
    assert chain.sample(tmp_path / "ar", tmp_path / "s", "--labels 2").code == 0


def test_a_class_without_images_keeps_its_label(chain, images, tmp_path):
    (images / "ape").mkdir()
    assert encode(chain, images, tmp_path / "d").code == 0
    assert Dataset.open(tmp_path / "d").classes == ["ant", "ape", "bee"]
    assert train_ar(chain, tmp_path / "ar", latents=tmp_path / "d").code == 0


@pytest.mark.parametrize("command", ["encode", "train vae"])
def test_output_inside_the_source(chain, images, command):
    # It would be a class of the next scan, and a training preview an image of it.
    before = chain.contents(images)
    out = images / "a_result"
    done = encode(chain, images, out) if command == "encode" else train_vae(chain, out, images=images)
    assert str(out) in done.message
    assert chain.contents(images) == before


# --- sizes ---


def test_sizes_that_do_not_fit(chain, tmp_path):
    message = encode(chain, chain.images, tmp_path / "o", "--size 9").message
    assert "expected one that is a multiple of 2 pixels, as the autoencoder needs it, got 9" in message
    assert "--size 9: 2 levels in --block-out-channels need" in train_vae(chain, tmp_path / "o", "--size 9").message
    assert "--channels: expected 1 (grey) or 3" in train_vae(chain, tmp_path / "o", "--channels 2").message
    assert "--norm-groups 3 must divide" in train_vae(chain, tmp_path / "o", "--norm-groups 3").message
    assert "block" in train_vae(chain, tmp_path / "o", "--block-out-channels 0,8").message
    assert "block" in train_vae(chain, tmp_path / "o", "--block-out-channels=-8,8").message
    assert "batch_size: expected 1 to 8" in train_vae(chain, tmp_path / "o", "--batch-size 9").message
    assert "batch_size: expected 1 to 8" in train_ar(chain, tmp_path / "a", "--batch-size 9").message
    assert (
        "expected num_heads to divide hidden_size 64, got 3" in train_ar(chain, tmp_path / "a", "--num-heads 3").message
    )
    assert "an FFN of width 0" in train_ar(chain, tmp_path / "a", "--mlp-ratio 0.5").message
    assert "unknown model 'Transformer-XXL'" in train_ar(chain, tmp_path / "a", "--model Transformer-XXL").message
    assert "ema_decay" in train_ar(chain, tmp_path / "a", "--ema-decay 1").message
    assert "class_dropout_prob" in train_ar(chain, tmp_path / "a", "--class-dropout-prob 1.5").message
    assert not (tmp_path / "o").exists()
    assert not checkpoints(tmp_path / "a")


@pytest.mark.parametrize("device", ["cuda:77", "cuda:-1", "gpu", "meta", "mps", "xpu"])
@pytest.mark.parametrize("command", ["encode", "train ar", "sample", "decode"])
def test_devices_that_are_not_there(chain, tmp_path, device, command):
    line = f"--device {device}"
    message = {
        "encode": lambda: encode(chain, chain.images, tmp_path / "o", line),
        "train ar": lambda: train_ar(chain, tmp_path / "o", line),
        "sample": lambda: chain.sample(chain.ar, tmp_path / "o", line),
        "decode": lambda: chain.command(f"decode {line} --output-dir", tmp_path / "o", chain.latents),
    }[command]().message
    assert "--device" in message
    assert not (tmp_path / "o" / "provenance.json").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_without_cuda(chain, tmp_path):
    message = chain.sample(chain.ar, tmp_path / "o", "--device cuda").message
    assert "torch sees 0 CUDA devices; use --device cpu, or see `fastlatent doctor`" in message


@pytest.mark.parametrize("seed", [2**63 - 1, 2**63, 2**64, 10**30])
def test_large_seeds(chain, tmp_path, seed):
    # Taken, or refused by name.
    for done in (
        train_ar(chain, tmp_path / "ar", f"--steps 1 --seed {seed}"),
        chain.sample(chain.ar, tmp_path / "s", f"--seed {seed}"),
    ):
        assert done.code == 0 or "seed" in done.message


# --- checkpoints ---


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"depth": None}, "config.json lacks depth"),
        ({"prediction_type": None}, "lacks prediction_type"),
        ({"hiden_size": 64}, "unknown key 'hiden_size' in .*; did you mean 'hidden_size'?"),
        ({"hidden_size": "64"}, "expected hidden_size to be a positive number, got '64'"),
        ({"hidden_size": 64.5}, "expected hidden_size to be a whole number, got 64.5"),
        ({"hidden_size": 128}, "another model's config.json or weights"),
        ({"num_classes": 9, "classes": []}, "y_embedder.embedding_table.weight has shape"),
        ({"depth": 2}, "lacks 'blocks.1.*' and . more weights"),
        ({"diffusion_depth": 2}, "lacks 'diffusion_blocks.1.*' and . more weights"),
        ({"prediction_type": "x0"}, "expected prediction_type epsilon, v_prediction, flow, got 'x0'"),
        ({"beta_schedule": "squared"}, "expected a schedule of cosine, linear, scaled_linear, .*, got 'squared'"),
        ({"latents_mean": [0.0]}, "expected latents_mean to be"),
        ({"latents_mean": "0"}, "latents_mean"),
        ({"latents_mean": [0, "1"]}, "latents_mean"),
        ({"latents_std": [1, NAN]}, "latents_std"),
        ({"latents_std": 0}, "latents_std"),
        ({"classes": ["one"]}, "classes"),
        ({"classes": [1, 2]}, "classes"),
        ({"vae": "vae"}, "vae"),
        ({"vae": {"class": "AutoencoderKL"}}, "vae"),  # no path: nothing to decode with
    ],
    ids=lambda value: json.dumps(value)[:40] if isinstance(value, dict) else "",
)
def test_configs_that_do_not_fit(chain, tmp_path, values, message):
    checkpoint = changed_config(chain, tmp_path / "checkpoint", **values)
    done = chain.sample(checkpoint, tmp_path / "out")
    assert re.search(message, done.message), done.message
    assert "tokens/s" not in done.err  # before the work, not after
    assert not (tmp_path / "out" / "latents.safetensors").exists()


def test_config_that_is_no_json(chain, tmp_path):
    for name, data in (("text", b"sizes"), ("list", b"[]"), ("binary", b"\xff\x00\x81")):
        checkpoint = changed_config(chain, tmp_path / name)
        (checkpoint / "config.json").write_bytes(data)
        assert "config.json" in chain.sample(checkpoint, tmp_path / "out").message
        if name != "list":
            assert str(checkpoint) in chain.command("inspect", checkpoint).message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state | {"extra.weight": torch.zeros(1)}, "holds 'extra.weight', which a model of config.json"),
        (lambda state: {k: v for k, v in state.items() if "final" not in k}, "lacks 'final_layer"),
        (lambda state: state | {"x_embedder.proj.bias": torch.zeros(3)}, "x_embedder.proj.bias has shape [3]"),
    ],
)
def test_weights_that_do_not_fit(chain, tmp_path, change, message):
    checkpoint = changed_weights(chain, tmp_path / "checkpoint", change)
    assert message in chain.sample(checkpoint, tmp_path / "out").message


def test_damaged_and_missing_weights(chain, tmp_path):
    checkpoint = changed_config(chain, tmp_path / "checkpoint")
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert f"{weights} does not load" in chain.sample(checkpoint, tmp_path / "out").message
    assert "model.safetensors" in chain.command("inspect", checkpoint).message
    weights.unlink()
    message = chain.sample(checkpoint, tmp_path / "out").message
    assert f"expected config.json and model.safetensors in {checkpoint}" in message
    assert "does not exist" in chain.sample(tmp_path / "nothing", tmp_path / "out").message
    assert "got the file" in chain.sample(chain.images / "ant" / "0.png", tmp_path / "out").message


def test_weights_with_nan(chain, tmp_path):
    checkpoint = changed_weights(
        chain,
        tmp_path / "checkpoint",
        lambda state: {k: v * NAN if k.startswith("blocks.") else v for k, v in state.items()},
    )
    assert "2 of the samples 0 to 1 are not finite" in chain.sample(checkpoint, tmp_path / "out").message
    assert not (tmp_path / "out" / "latents.safetensors").exists()


# --- sample ---


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--labels 0,2", "--labels: expected 0 to 1 (this checkpoint's classes), got 2"),
        ("--labels -1", "--labels: expected 0 to 1"),
        ("--labels ant", "expected class numbers such as"),
        ("--labels=", "labels: expected text, got nothing"),
        ("--labels 1,", "expected class numbers such as"),
        ("--solver euler", "euler"),  # a flow solver for v prediction
        ("--no-decode", "--no-decode writes a file: expected --output NAME.safetensors"),
    ],
)
def test_bad_sample_options(chain, tmp_path, more, message):
    assert message in chain.sample(chain.ar, tmp_path / "out", more).message
    assert not (tmp_path / "out").exists()


def test_sample_output_with_the_suffix_of_a_file(chain, tmp_path):
    message = chain.sample(chain.ar, tmp_path / "out.safetensors").message
    assert "without --no-decode it is a folder; add --no-decode" in message


@pytest.mark.parametrize("where", ["file", "file/below"])
def test_sample_output_that_is_a_file_is_noticed_first(chain, tmp_path, where):
    (tmp_path / "file").write_text("mine")
    done = chain.sample(chain.ar, tmp_path / where)
    assert "file" in done.message
    assert "tokens/s" not in done.err
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"noise": torch.zeros(2, 9, 2)}, "expected [2, 16, 2] [samples, tokens, channels], got [2, 9, 2]"),
        ({"noise": torch.zeros(3, 16, 2)}, "--labels times --per-class gives the samples"),
        ({"noises": torch.zeros(2, 16, 2)}, "expected a tensor `noise`, found noises"),
        ({"noise": torch.full((2, 16, 2), NAN)}, "expected finite"),
        ({"noise": torch.zeros(2, 16, 2, dtype=torch.int32)}, "floating-point numbers, got torch.int32"),
        (None, "not a readable safetensors file"),
    ],
)
def test_bad_noise_files(chain, tmp_path, tensors, message):
    file = tmp_path / "noise.safetensors"
    if tensors is None:
        file.write_bytes(b"garbage")
    else:
        save_file(tensors, file)
    assert message in chain.sample(chain.ar, tmp_path / "out", f"--noise {file}").message
    assert "noise" in chain.sample(chain.ar, tmp_path / "out", f"--noise {tmp_path}").message
    assert "noise" in chain.sample(chain.ar, tmp_path / "out", f"--noise {tmp_path}/none").message


# --- autoencoders ---


@pytest.mark.parametrize("command", ["encode", "sample", "decode"])
def test_autoencoders_that_are_none(chain, tmp_path, command):
    broken = changed_weights(
        chain, tmp_path / "lacks", lambda state: {k: v for k, v in state.items() if k != "quant_conv.weight"},
        "vae", "diffusion_pytorch_model.safetensors",
    )  # fmt: skip
    cut = changed_config(chain, tmp_path / "cut", "vae")
    weights = cut / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    for vae, expected in (
        (tmp_path / "nothing", f"{tmp_path / 'nothing'} does not exist"),
        (chain.images, "expected config.json and diffusion_pytorch_model.safetensors in"),
        (chain.ar, "expected config.json and diffusion_pytorch_model.safetensors in"),
        (broken, "does not fit its config.json: missing_keys ['quant_conv.weight']"),
        (changed_config(chain, tmp_path / "wide", "vae", block_out_channels=[8, 16]), str(tmp_path / "wide")),
        (changed_config(chain, tmp_path / "class", "vae", _class_name="UNet2DModel"), "got _class_name 'UNet2DModel'"),
        (cut, f"{cut} does not load"),
    ):
        if command == "encode":
            message = encode(chain, chain.images, tmp_path / "out", vae=vae).message
        elif command == "sample":
            message = chain.sample(chain.ar, tmp_path / "out", f"--vae {vae}").message
        else:
            message = chain.command("decode --output-dir", tmp_path / "out", "--vae", vae, chain.latents).message
        assert expected in message
        assert not (tmp_path / "out").exists()


def test_another_autoencoder_into_a_dataset(chain, tmp_path):
    latents = chain.copy("latents", tmp_path / "latents")
    before = chain.contents(latents)
    message = encode(chain, chain.images, latents, vae=other_vae(chain, tmp_path / "other")).message
    assert "was encoded with other settings:\n  vae.weights: " in message
    assert "encode into another folder" in message
    message = encode(chain, chain.images, latents, "--size 16").message
    assert "transform.size: 8 (dataset) != 16 (now)" in message
    assert (
        "storage_dtype: float16 (dataset) != float32 (now)"
        in encode(chain, chain.images, latents, "--dtype float32").message
    )
    assert "mirror: false (dataset) != true (now)" in encode(chain, chain.images, latents, "--mirror").message
    assert chain.contents(latents) == before


@pytest.mark.parametrize("command", ["sample", "decode"])
def test_decoding_with_another_autoencoder(chain, tmp_path, command):
    def run(vae, more=""):
        if command == "sample":
            return chain.sample(chain.ar, tmp_path / "out", f"--vae {vae} {more}")
        return chain.command(f"decode --threads 1 {more} --output-dir", tmp_path / "out", "--vae", vae, chain.latents)

    vae = other_vae(chain, tmp_path / "other")
    message = run(vae).message
    assert "is not the autoencoder that made these latents" in message
    assert "vae.weights" in message or "weights: " in message
    assert not (tmp_path / "out").exists()
    assert run(vae, "--allow-other-vae").code == 0
    # The same weights elsewhere are the same autoencoder.
    assert run(chain.copy("vae", tmp_path / "moved")).code == 0
    chain.ok(f"train vae {chain.train_vae} --latent-channels 3 --out", tmp_path / "three", chain.images)
    message = run(tmp_path / "three", "--allow-other-vae").message
    assert "expected an autoencoder with 2 latent channels, it has 3" in message


def test_the_autoencoder_is_gone(chain, tmp_path):
    vae = chain.copy("vae", tmp_path / "vae")
    assert encode(chain, chain.images, tmp_path / "d", vae=vae).code == 0
    assert train_ar(chain, tmp_path / "ar", latents=tmp_path / "d").code == 0
    shutil.rmtree(vae)
    for done in (
        chain.sample(tmp_path / "ar", tmp_path / "out"),
        chain.command("decode --threads 1 --output-dir", tmp_path / "out", tmp_path / "d"),
    ):
        assert f"was at {vae} and is gone; name it with --vae PATH" in done.message
    assert chain.sample(tmp_path / "ar", tmp_path / "out", f"--vae {chain.vae}").code == 0


def test_an_autoencoder_with_nan(chain, tmp_path):
    name = "diffusion_pytorch_model.safetensors"
    vae = changed_weights(chain, tmp_path / "vae", lambda s: {k: v * NAN for k, v in s.items()}, "vae", name)
    message = encode(chain, chain.images, tmp_path / "d", vae=vae).message
    assert "expected at least one file that can be encoded, got 0 of 8" in message
    assert "its latent holds NaN or infinity" in message
    assert not (tmp_path / "d" / "dataset.json").exists()
    message = chain.command(
        "decode --threads 1 --allow-other-vae --output-dir", tmp_path / "o", "--vae", vae, chain.latents
    ).message
    assert "NaN" in message
