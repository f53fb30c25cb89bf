"""What changes a row's bytes, through the command line: transforms, payload, precision, engines, autoencoder files."""

import math
import os
import re
import shutil
from collections import namedtuple

import numpy as np
import plain_ldm_autoencoder as plain_ldm
import pytest
import tifffile
import torch
from chain_helpers import changed_weights
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderTiny
from PIL import Image

from fastlatent.encoders.engines.compiled import OPTIONS
from fastlatent.media.decoders import NAMES, decoder_of
from fastlatent.media.images import DECODE_RULE
from fastlatent.pipeline.checkpoints import checkpoints
from fastlatent.store.reader import Dataset
from fastlatent.workflows import encode_images

WEIGHTS = "diffusion_pytorch_model.safetensors"
TOLERANCE = 2e-6  # of the largest moment: a few roundings of float32
WIDE, TALL, SQUARE = (20, 40), (40, 20), (30, 30)  # height, width


def encode(chain, source, out, more="", vae=None):
    return chain.command(f"encode {chain.encode} {more} --out", out, "--vae", vae or chain.vae, source)


def encoded(chain, source, out, more="", vae=None) -> str:
    done = encode(chain, source, out, more, vae)
    assert done.code == 0, done.err
    return done.out


def rows_of(out, payload="moments") -> dict[str, np.ndarray]:
    """Key → [F, 2C or C, h, w] as stored."""
    dataset = Dataset.open(out)
    return {
        dataset.key(i): dataset.open_shard(int(dataset.shard[i])).columns[payload][dataset.row[i]].copy()
        for i in range(len(dataset))
    }


def crops_of(out) -> dict[str, list[int]]:
    dataset = Dataset.open(out)
    return {dataset.key(i): dataset.crop[i].tolist() for i in range(len(dataset))}


def far(got, want) -> float:
    """Largest difference, in parts of the largest value."""
    return float(np.abs(got.astype(np.float64) - want).max() / np.abs(want).max())


@pytest.fixture(scope="module")
def vae(chain):
    """The chain's autoencoder, as diffusers loads it: image → moments [2C, h, w], one image at a time."""
    model = AutoencoderKL.from_pretrained(checkpoints(chain.vae)[-1]).eval()

    def moments(image: Image.Image) -> np.ndarray:
        with torch.no_grad():
            posterior = model.encode(torch.from_numpy(to_input(image))[None]).latent_dist
        return torch.cat([posterior.mean, posterior.logvar], 1)[0].numpy()

    return moments


def to_input(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(np.float32).transpose(2, 0, 1) / np.float32(127.5) - 1


@pytest.fixture(scope="module")
def shapes(chain, tmp_path_factory):
    """Pictures of several shapes, four wide ones among them."""
    folder = tmp_path_factory.mktemp("shapes")
    for name, size in (("square", SQUARE), ("tall", TALL), *((f"wide {i}", WIDE) for i in range(4))):
        chain.image(len(name) + ord(name[-1]), (*size, 3)).save(folder / f"{name}.png")
    return folder


# --- transforms ---


def short_side(image: Image.Image, left: int) -> Image.Image:
    """20×40 to 8×16, and a square of it."""
    return image.resize((16, 8), Image.Resampling.BILINEAR).crop((left, 0, left + 8, 8))


PLAIN = {  # of a wide image: the crop's place and size in it, and the crop
    "adm": ([0, 10, 20, 20], lambda image: image.resize((20, 10), Image.Resampling.BOX)
            .resize((16, 8), Image.Resampling.BICUBIC).crop((4, 0, 12, 8))),
    "center": ([0, 10, 20, 20], lambda image: short_side(image, 4)),
    "nwm": ([0, 7, 20, 26], lambda image: image.crop((7, 0, 33, 20)).resize((8, 8), Image.Resampling.BILINEAR)),
}  # fmt: skip


@pytest.mark.parametrize("transform", list(PLAIN))
def test_transforms_with_one_shape(chain, shapes, vae, tmp_path, transform):
    crop, plain = PLAIN[transform]
    encoded(chain, shapes, tmp_path / "d", f"--dtype float32 --transform {transform}")
    rows, crops = rows_of(tmp_path / "d"), crops_of(tmp_path / "d")
    assert len(rows) == 6 and {row.shape for row in rows.values()} == {(1, 4, 4, 4)}
    for key in rows:
        if key.startswith("wide"):
            assert crops[key] == crop
            assert far(rows[key][0], vae(plain(Image.open(shapes / key)))) < TOLERANCE
    assert "6 encoded again and compared bit for bit: sound" in chain.ok("verify --reencode 6", tmp_path / "d").out
    assert "transform.rule" in encode(chain, shapes, tmp_path / "d", "--dtype float32 --transform random").message


def test_random_crops_are_a_function_of_seed_and_key(chain, shapes, vae, tmp_path):
    encoded(chain, shapes, tmp_path / "d", "--dtype float32 --transform random --seed 3")
    rows, crops = rows_of(tmp_path / "d"), crops_of(tmp_path / "d")
    wide = [key for key in rows if key.startswith("wide")]
    for key in wide:
        top, left, height, width = crops[key]
        assert (top, height, width) == (0, 20, 20)
        # One pixel of the resized image is two and a half of the source.
        assert far(rows[key][0], vae(short_side(Image.open(shapes / key), round(left / 2.5)))) < TOLERANCE
    assert len({crops[key][1] for key in wide}) > 1
    # Not of the neighbours: one file alone, under the same key.
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(shapes / wide[-1], alone)
    encoded(chain, alone, tmp_path / "one", "--dtype float32 --transform random --seed 3")
    assert crops_of(tmp_path / "one") == {wide[-1]: crops[wide[-1]]}
    np.testing.assert_array_equal(rows_of(tmp_path / "one")[wide[-1]], rows[wide[-1]])
    encoded(chain, shapes, tmp_path / "other", "--dtype float32 --transform random --seed 4")
    assert crops_of(tmp_path / "other") != crops
    message = encode(chain, shapes, tmp_path / "d", "--dtype float32 --transform random --seed 4").message
    assert "transform.seed: 3 (dataset) != 4 (now)" in message
    assert "compared bit for bit: sound" in chain.ok("verify --reencode 6", tmp_path / "d").out


def covered(image: Image.Image, height: int, width: int) -> Image.Image:
    scale = max(height / image.height, width / image.width)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def test_buckets(chain, shapes, vae, tmp_path, monkeypatch):
    source, out, examined = tmp_path / "shapes", tmp_path / "d", []
    shutil.copytree(shapes, source)
    image_size = encode_images.image_size

    def counted(data, **options):
        examined.append(len(data))
        return image_size(data, **options)

    monkeypatch.setattr(encode_images, "image_size", counted)
    run = "--dtype float32 --transform buckets"
    assert "6 rows in 4 shards" in encoded(chain, source, out, run)  # of the 4 wide ones at most 3 lie in a shard
    assert len(examined) == 6
    rows, crops = rows_of(out), crops_of(out)
    buckets = Dataset.open(out).provenance["hashed"]["transform"]["shapes"]
    assert buckets == [[6, 10], [8, 8], [10, 6]]
    for key, row in rows.items():
        image = Image.open(source / key)
        ratio = math.log(image.height / image.width)
        height, width = min(buckets, key=lambda shape: abs(math.log(shape[0] / shape[1]) - ratio))
        assert row.shape == (1, 4, height // 2, width // 2)
        assert far(row[0], vae(covered(image, height, width))) < TOLERANCE
        top, left, crop_height, crop_width = crops[key]
        # All of one side, and the middle of the other, in the bucket's shape to half a pixel.
        assert (top, crop_height) == (0, image.height) or (left, crop_width) == (0, image.width)
        assert abs(2 * top + crop_height - image.height) <= 1 and abs(2 * left + crop_width - image.width) <= 1
        assert abs(crop_height / height - crop_width / width) <= 0.5 * image.height / height
    # Files that are known are not opened again; of a new one the header is.
    examined.clear()
    assert "0 files encoded now" in encoded(chain, source, out, run) and not examined
    chain.image(77, (*TALL, 3)).save(source / "new.png")
    (source / "bad.png").write_bytes(b"no picture")
    assert "1 files encoded now" in encoded(chain, source, out, run) and len(examined) == 2
    assert {key: row.tobytes() for key, row in rows_of(out).items() if key != "new.png"} == {
        key: row.tobytes() for key, row in rows.items()
    }
    # A file that becomes another shape moves.
    chain.image(78, (*SQUARE, 3)).save(source / "new.png")
    assert "1 files encoded now" in encoded(chain, source, out, run) and len(examined) == 3
    assert rows_of(out)["new.png"].shape == rows["square.png"].shape
    assert "sound" in chain.ok("verify --full --reencode 7", out).out
    assert [(bucket.shape, bucket.rows) for bucket in Dataset.open(out).buckets] == [
        ((1, 4, 3, 5), 4), ((1, 4, 4, 4), 2), ((1, 4, 5, 3), 1),
    ]  # fmt: skip


def test_mirror_images_are_encoded_not_mirrored_latents(chain, shapes, vae, tmp_path):
    out = encoded(chain, shapes, tmp_path / "d", "--dtype float32 --transform center --mirror")
    rows = rows_of(tmp_path / "d")
    assert {row.shape for row in rows.values()} == {(2, 4, 4, 4)} and "6 files encoded now" in out
    for key in rows:
        if key.startswith("wide"):
            image = short_side(Image.open(shapes / key), 4)
            assert far(rows[key][0], vae(image)) < TOLERANCE
            assert far(rows[key][1], vae(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT))) < TOLERANCE
            assert far(rows[key][1], rows[key][0][:, :, ::-1]) > 1e-3
    assert "6 encoded again and compared bit for bit: sound" in chain.ok("verify --reencode 6", tmp_path / "d").out


def test_float_images_of_another_range(chain, tmp_path):
    (tmp_path / "eight").mkdir()
    (tmp_path / "float").mkdir()
    image = chain.image(4, (*WIDE, 3))
    image.save(tmp_path / "eight" / "a.tif")
    tifffile.imwrite(tmp_path / "float" / "a.tif", np.asarray(image).astype(np.float32), photometric="rgb")
    done = encode(chain, tmp_path / "float", tmp_path / "f", "--dtype float32")
    assert "--input-range LO,HI" in done.message
    encoded(chain, tmp_path / "float", tmp_path / "g", "--dtype float32 --input-range 0,255")
    encoded(chain, tmp_path / "eight", tmp_path / "e", "--dtype float32")
    # The filters round to 8 bits in between, twice: a grey level or two.
    assert far(rows_of(tmp_path / "g")["a.tif"], rows_of(tmp_path / "e")["a.tif"]) < 0.02
    assert "compared bit for bit: sound" in chain.ok("verify --reencode 1", tmp_path / "g").out
    for bad in ("255,0", "0", "a,b", "0,inf"):
        message = encode(chain, tmp_path / "float", tmp_path / "h", f"--input-range {bad}").message
        assert "--input-range: expected two numbers" in message


# --- payload ---


def test_latents_are_the_means(chain, tmp_path):
    encoded(chain, chain.images, tmp_path / "d", "--payload latents")
    rows, moments = rows_of(tmp_path / "d", "latents"), rows_of(chain.latents)
    assert rows.keys() == moments.keys()
    for key, row in rows.items():
        assert row.shape == (1, 2, 4, 4)
        np.testing.assert_array_equal(row, moments[key][:, :2])
    assert "sound" in chain.ok("verify --full --reencode 8", tmp_path / "d").out
    assert "payload" in encode(chain, chain.images, tmp_path / "d").message


TINY = {
    "AutoencoderTiny": lambda: AutoencoderTiny(
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1), latent_channels=2,
    ),
    "AutoencoderDC": lambda: AutoencoderDC(
        latent_channels=4, attention_head_dim=4, encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"), encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8), encoder_layers_per_block=(1, 1), decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=((), (5,)), decoder_qkv_multiscales=((), (5,)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", list(TINY))
def test_autoencoders_without_a_posterior(chain, shapes, tmp_path, name):
    torch.manual_seed(0)
    model = TINY[name]().eval()
    model.save_pretrained(tmp_path / "vae")
    message = encode(chain, shapes, tmp_path / "d", vae=tmp_path / "vae").message
    assert "gives latents without a posterior; say --payload latents" in message
    assert not (tmp_path / "d").exists()
    encoded(chain, shapes, tmp_path / "d", "--payload latents --dtype float32 --transform center", tmp_path / "vae")
    rows = rows_of(tmp_path / "d", "latents")
    assert len(rows) == 6 and {row.shape for row in rows.values()} == {(1, 2 if name == "AutoencoderTiny" else 4, 4, 4)}
    for key in rows:
        if key.startswith("wide"):
            pixels = torch.from_numpy(to_input(short_side(Image.open(shapes / key), 4)))[None]
            with torch.no_grad():
                wanted = model.encode(pixels, return_dict=False)[0]
            assert far(rows[key][0], wanted[0].numpy()) < TOLERANCE
    assert "sound" in chain.ok("verify --full --reencode 6", tmp_path / "d").out
    chain.ok("decode --threads 1 --output-dir", tmp_path / "o", tmp_path / "d")


# --- precision ---


@pytest.fixture(scope="module")
def overflowing(chain, tmp_path_factory):
    """An autoencoder whose means leave float16's range for about half of the images, and which ones (bool by key)."""
    largest = {key: np.abs(row[:, :2].astype(np.float64)).max() for key, row in rows_of(chain.latents).items()}
    scale = 65504 / np.median(list(largest.values()))

    def change(state):
        return state | {name: state[name] * scale for name in ("quant_conv.weight", "quant_conv.bias")}

    folder = changed_weights(chain, tmp_path_factory.mktemp("overflow") / "vae", change, "vae", WEIGHTS)
    return folder, {key: value * scale > 65504 for key, value in largest.items()}


def test_images_that_overflow_in_float16_are_encoded_again(chain, overflowing, tmp_path):
    vae, overflows = overflowing
    many = sum(overflows.values())
    assert 0 < many < 8
    out = encoded(chain, chain.images, tmp_path / "half", "--dtype float32 --compute-dtype float16", vae)
    assert f"\n{many} images (mirror images counted) overflowed in float16 and were encoded in float32\n" in out
    assert "overflowed" not in encoded(chain, chain.images, tmp_path / "full", "--dtype float32", vae)
    half, full = rows_of(tmp_path / "half"), rows_of(tmp_path / "full")
    assert half.keys() == full.keys() == overflows.keys()
    for key in full:
        assert np.isfinite(half[key]).all()
        assert far(half[key], full[key]) < (TOLERANCE if overflows[key] else 5e-3)  # 5 bits more than float16's 2^-11
    assert "sound" in chain.ok("verify --full --reencode 8", tmp_path / "half").out


def test_latents_that_float16_cannot_hold_are_listed(chain, overflowing, tmp_path):
    vae, overflows = overflowing
    out = encoded(chain, chain.images, tmp_path / "d", vae=vae)
    dataset = Dataset.open(tmp_path / "d")
    assert {one.key for one in dataset.quarantined} == {key for key, over in overflows.items() if over}
    assert {one.reason for one in dataset.quarantined} == {"its latent holds NaN or infinity (as F16)"}
    assert all(f"{one.key!r}: {one.reason}" in out for one in dataset.quarantined)
    # bfloat16 reaches as far as float32.
    assert "8 rows in" in encoded(chain, chain.images, tmp_path / "e", "--dtype bfloat16", vae)


@pytest.mark.parametrize(("dtype", "limit"), [("bfloat16", 2**-8), ("float16", 2**-11), ("int8", 1 / 127)])
def test_what_is_stored_is_near_float32(chain, shapes, tmp_path, dtype, limit):
    encoded(chain, shapes, tmp_path / "full", "--dtype float32")
    encoded(chain, shapes, tmp_path / "d", f"--dtype {dtype}")
    dataset, full = Dataset.open(tmp_path / "d"), rows_of(tmp_path / "full")
    for i in range(len(dataset)):
        columns, row = dataset.open_shard(int(dataset.shard[i])).columns, int(dataset.row[i])
        values = columns["moments"][row]
        if dtype == "bfloat16":
            values = (values.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
        elif dtype == "int8":
            values = values * columns["moments.scale"][row][..., None, None]
        assert far(values, full[dataset.key(i)]) <= limit
    assert "sound" in chain.ok("verify --full --reencode 2", tmp_path / "d").out


# --- engines ---


def check_engine(chain, source, out, monkeypatch, more, vae, engine):
    payload = "latents" if "latents" in more else "moments"
    monkeypatch.setenv("FASTLATENT_CACHE", str(out / "cache"))
    encoded(chain, source, out / "d", f"{more} --engine {engine}", vae)
    encoded(chain, source, out / "eager", more, vae)
    rows, eager = rows_of(out / "d", payload), rows_of(out / "eager", payload)
    assert len(rows) == 6 and all(far(rows[key], eager[key]) < 1e-5 for key in eager)
    recorded = Dataset.open(out / "d").provenance["hashed"]["engine"]
    assert recorded["name"] == engine and recorded["options"] == OPTIONS
    packages = {path: path.stat().st_mtime_ns for path in (out / "cache").rglob("*") if path.is_file()}
    assert bool(packages) == (engine == "aoti")
    # `auto` goes on with what the dataset was begun with, and another engine is refused.
    assert "0 files encoded now" in encoded(chain, source, out / "d", more, vae)
    message = encode(chain, source, out / "d", f"{more} --engine eager", vae).message
    assert f"engine.name: {engine} (dataset) != eager (now)" in message
    assert "6 encoded again and compared bit for bit: sound" in chain.ok("verify --reencode 6", out / "d").out
    assert {path: path.stat().st_mtime_ns for path in packages} == packages  # compiled once


@pytest.mark.soak  # it takes long: see `make soak`
def test_an_engine_compiled_ahead_of_time(chain, shapes, tmp_path, monkeypatch):
    # The smallest autoencoder, which compiles in a third of the time.
    torch.manual_seed(0)
    TINY["AutoencoderTiny"]().save_pretrained(tmp_path / "vae")
    more = "--dtype float32 --payload latents"
    check_engine(chain, shapes, tmp_path, monkeypatch, more, tmp_path / "vae", "aoti")


@pytest.mark.soak
@pytest.mark.parametrize("engine", ["aoti", "compile"])
def test_compiled_engines(chain, shapes, tmp_path, monkeypatch, engine):
    check_engine(chain, shapes, tmp_path, monkeypatch, "--dtype float32 --transform buckets", chain.vae, engine)


# --- preflight ---


PREFLIGHT = re.compile(r"^([\d,]+) images to encode in ([\d,]+) shards of ([\d,]+) bytes .* GiB free, about ", re.M)


@pytest.mark.parametrize("more", ["", "--mirror --dtype float32", "--dtype int8", "--transform buckets", "--seed 1"])
def test_the_preflight_says_how_many_bytes_will_be_written(chain, shapes, tmp_path, more):
    out = encoded(chain, shapes, tmp_path / "d", more)
    count, shards, size = (int(text.replace(",", "")) for text in PREFLIGHT.search(out).groups())
    files = list((tmp_path / "d").glob("shards/*/*"))
    assert (count, shards, size) == (6, len(files), sum(file.stat().st_size for file in files))
    again = encoded(chain, shapes, tmp_path / "d", more)
    assert not PREFLIGHT.search(again)  # nothing is left to do


def test_no_space_is_noticed_before_a_byte_is_written(chain, shapes, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    out = encoded(chain, shapes, tmp_path / "d")
    needed = PREFLIGHT.search(out)[3]
    free = int(needed.replace(",", ""))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**12, 10**12 - free + 1, free - 1))
    done = encode(chain, shapes, tmp_path / "e")
    assert done.code == 1
    assert f"{tmp_path / 'e'}: {needed} bytes are to be written, and {free - 1:,} are free" in done.message
    assert not list((tmp_path / "e").glob("shards/*/*")) and not list((tmp_path / "e").glob("journal/*"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**12, 10**12 - free, free))
    assert "6 rows in" in encoded(chain, shapes, tmp_path / "e")  # it just fits


# --- autoencoder files ---


def test_a_checkpoint_of_latent_diffusion(chain, shapes, tmp_path):
    # KL-16's shape: attention behind the encoder's last level, 4 pixels to a latent here.
    weights = plain_ldm.random_weights(0, ch=32, mult=(1, 1, 2), blocks=2, z=3, encoder_attention=(2,))
    file = tmp_path / "kl16.ckpt"
    torch.save({"model": {name: tensor.float() for name, tensor in weights.items()}}, file)
    message = encode(chain, shapes, tmp_path / "d", "--size 10", file).message
    assert "expected one that is a multiple of 4 pixels" in message and "got 10" in message
    encoded(chain, shapes, tmp_path / "d", "--dtype float32 --transform center", file)
    rows = rows_of(tmp_path / "d")
    for key in rows:
        if key.startswith("wide"):
            pixels = torch.from_numpy(to_input(short_side(Image.open(shapes / key), 4))).double()[None]
            assert far(rows[key][0], plain_ldm.encode(weights, pixels)[0].numpy()) < 1e-5
    assert "sound" in chain.ok("verify --full --reencode 6", tmp_path / "d").out
    changed = torch.load(file)
    changed["model"]["encoder.conv_in.bias"].view(torch.int32)[0] ^= 1  # one bit
    os.rename(file, tmp_path / "before.ckpt")
    torch.save(changed, file)
    message = encode(chain, shapes, tmp_path / "d", "--dtype float32 --transform center", file).message
    assert "was encoded with other settings:\n  vae.weights: " in message
    moved = tmp_path / "before.ckpt"  # the same weights under another name
    again = encoded(chain, shapes, tmp_path / "d", "--dtype float32 --transform center --readers 1", moved)
    assert "0 files encoded now" in again


def test_an_engine_that_does_not_run_leaves_nothing_and_another_can_be_asked_for(chain, images, tmp_path, monkeypatch):
    def no_compiler(*_):
        raise RuntimeError("no working C++ compiler")

    monkeypatch.setattr("fastlatent.encoders.engines.engine.compile_module", no_compiler)
    out = tmp_path / "d"
    failed = chain.command(f"encode {chain.encode} --engine compile --out", out, "--vae", chain.vae, images)
    assert "no working C++ compiler" in failed.message and not out.exists()
    chain.ok(f"encode {chain.encode} --engine eager --out", out, "--vae", chain.vae, images)


def test_the_output_is_a_local_folder_and_not_among_the_images(chain, images, tmp_path):
    for out, source in (("s3://bucket/x", images), (images / "d", f"file://{images}")):
        done = chain.command(f"encode {chain.encode} --out", out, "--vae", chain.vae, source)
        assert done.code == 1 and "--out" in done.message


def test_auto_takes_the_decoder_that_the_dataset_was_begun_with(chain, images, tmp_path, monkeypatch):
    out = tmp_path / "d"
    chain.ok(f"encode {chain.encode} --out", out, "--vae", chain.vae, images)
    monkeypatch.setattr(encode_images, "choose_decoder", lambda *_: ("dali", "it is the best"))
    chain.image(99).save(images / "ant" / "99.png")
    assert (
        "decoder pillow: as recorded" in chain.ok(f"encode {chain.encode} --out", out, "--vae", chain.vae, images).out
    )


@pytest.mark.parametrize("name", NAMES)
def test_a_decoder_is_known_by_its_rule(name):
    rule = DECODE_RULE if name == "pillow" else f"{DECODE_RULE} jpeg:{name}-cuda-1"
    assert decoder_of(rule) == name
