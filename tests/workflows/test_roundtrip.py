import math
import re
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio

from fastlatent.encoders.load import load_autoencoder
from fastlatent.media.images import read_image, to_model_range, to_uint8
from fastlatent.media.transforms import open_transform


def roundtrip(chain, image, output, more="", vae="chain"):
    flags = ["--vae", chain.vae] if vae == "chain" else []
    return chain.command(f"roundtrip --threads 1 {more} --output", output, *flags, image)


def drawn(done, root):
    """The key of the image, which is below `root`."""
    place = re.search(r"^image: (\S+),", done.out, re.MULTILINE)[1]
    return Path(place).relative_to(root).as_posix()


def plain(vae, file, size, key="", transform="adm", seed=0):
    """Image and decoded, uint8 [h, w, 3], without the command."""
    image = read_image(file.read_bytes(), channels=3)
    rule = open_transform(transform, size, seed=seed, multiple=2)
    pixels = to_model_range(rule.apply(image, key, rule.shape_of(*image.shape[:2]))[0])[None]
    model = load_autoencoder(vae).model
    with torch.no_grad():
        decoded = model.decode(model.encode(torch.from_numpy(pixels)).latent_dist.mean).sample
    return to_uint8(pixels)[0], to_uint8(decoded.numpy())[0]


def test_an_image(chain, tmp_path):
    file = chain.images / "ant" / "0.png"
    done = roundtrip(chain, file, tmp_path / "made" / "both.png", "--size 16")
    assert done.code == 0, done.err
    image, decoded = plain(chain.vae, file, 16)
    sheet = np.asarray(Image.open(tmp_path / "made" / "both.png"))
    # 64 pixels are the smallest cell, so four times as large; 2 between cells; labels below.
    assert sheet.shape[1] == 2 * 64 + 2
    np.testing.assert_array_equal(sheet[:64:4, :64:4], image)
    np.testing.assert_array_equal(sheet[:64:4, 66::4], decoded)
    assert f"image: {file}, 24 x 20 pixels, cropped to 16 x 16 (adm)\n" in done.out
    assert "latent: 2 x 8 x 8, 0.5 numbers per pixel\n" in done.out
    decibels, similarity = map(float, re.search(r"PSNR (\S+) dB, SSIM (\S+)", done.out).groups())
    assert decibels == pytest.approx(peak_signal_noise_ratio(image, decoded, data_range=255), abs=0.005)
    assert -1 < similarity < 1
    kept = yaml.safe_load((tmp_path / "made" / "both.yaml").read_text())
    assert (kept["image"], kept["size"]) == (str(file), 16)
    # What is kept makes the same picture again.
    before = (tmp_path / "made" / "both.png").read_bytes()
    chain.ok("roundtrip --config", tmp_path / "made" / "both.yaml")
    assert (tmp_path / "made" / "both.png").read_bytes() == before
    assert sorted(path.name for path in (tmp_path / "made").iterdir()) == ["both.png", "both.yaml"]


def test_smaller_than_the_window_of_ssim(chain, tmp_path):
    done = roundtrip(chain, chain.images / "ant" / "0.png", tmp_path / "a.png", "--size 10")
    assert "SSIM is not defined below 11 x 11 pixels" in done.out
    done = roundtrip(chain, chain.images / "ant" / "0.png", tmp_path / "a.png", "--size 12")
    assert re.search(r" dB, SSIM -?0\.\d{4}\n", done.out)


@pytest.mark.parametrize("transform", ["center", "random", "nwm", "buckets"])
def test_other_crops(chain, tmp_path, transform):
    done = roundtrip(chain, chain.images, tmp_path / "a.png", f"--size 16 --seed 3 --transform {transform}")
    assert done.code == 0, done.err
    image, decoded = plain(
        chain.vae, chain.images / drawn(done, chain.images), 16, drawn(done, chain.images), transform, 3
    )
    height, width = image.shape[:2]
    assert (height, width) == (16, 16) or transform == "buckets"
    assert f"cropped to {width} x {height} ({transform})" in done.out
    scale = math.ceil(64 / min(height, width))  # the smallest that makes both sides 64 pixels
    sheet = np.asarray(Image.open(tmp_path / "a.png"))[: scale * height : scale, ::scale]
    np.testing.assert_array_equal(sheet[:, :width], image)
    sheet = np.asarray(Image.open(tmp_path / "a.png"))[: scale * height : scale, scale * width + 2 :: scale]
    np.testing.assert_array_equal(sheet, decoded)


def test_one_of_a_folder(chain, tmp_path):
    names = [
        drawn(roundtrip(chain, chain.images, tmp_path / "a.png", f"--size 8 --seed {seed}"), chain.images)
        for seed in range(6)
    ]
    assert len(set(names)) > 1  # six draws of 8 images
    assert all((chain.images / name).is_file() for name in names)
    assert names[2] == drawn(roundtrip(chain, chain.images, tmp_path / "a.png", "--size 8 --seed 2"), chain.images)


def test_one_of_a_dataset(chain, tmp_path):
    """Autoencoder and size are those that the dataset was made with."""
    done = roundtrip(chain, chain.latents, tmp_path / "a.png", "--seed 1", vae=None)
    assert done.code == 0, done.err
    assert "cropped to 8 x 8" in done.out
    sheet = np.asarray(Image.open(tmp_path / "a.png"))
    image, decoded = plain(chain.vae, chain.images / drawn(done, chain.images), 8)
    np.testing.assert_array_equal(sheet[:64:8, :64:8], image)
    np.testing.assert_array_equal(sheet[:64:8, 66::8], decoded)
    assert "cropped to 12 x 12" in roundtrip(chain, chain.latents, tmp_path / "a.png", "--size 12").out


def test_a_dataset_whose_images_are_gone(chain, images, tmp_path):
    chain.ok(f"encode {chain.encode} --out", tmp_path / "latents", "--vae", chain.vae, images)
    shutil.rmtree(images)
    message = roundtrip(chain, tmp_path / "latents", tmp_path / "a.png").message
    assert re.search(r"its source .*images is not there; name an image", message)
    for name in ("ant", "bee"):
        (images / name).mkdir(parents=True)
    Image.new("RGB", (9, 9)).save(images / "ant" / "other.png")
    message = roundtrip(chain, tmp_path / "latents", tmp_path / "a.png").message
    assert re.search(r"its source .*images has no (ant|bee)/\d.png any more; name an image", message)
    assert not (tmp_path / "a.png").exists()


def test_lower_precision(chain, tmp_path):
    done = roundtrip(chain, chain.images / "ant" / "0.png", tmp_path / "a.png", "--size 16 --dtype bfloat16")
    assert done.code == 0, done.err


def test_float_images(chain, tmp_path):
    values = np.random.default_rng(0).uniform(-40, 40, (20, 20)).astype(np.float32)
    Image.fromarray(values).save(tmp_path / "float.tiff")
    refused = roundtrip(chain, tmp_path / "float.tiff", tmp_path / "a.png", "--size 16")
    assert "float.tiff cannot be used: " in refused.message and "--input-range" in refused.message
    done = roundtrip(chain, tmp_path / "float.tiff", tmp_path / "a.png", "--size 16 --input-range=-40,40")
    assert done.code == 0, done.err


def test_one_of_tars(chain, tmp_path):
    """A folder of anything that encode reads."""
    (tmp_path / "tars").mkdir()
    with tarfile.open(tmp_path / "tars" / "0.tar", "w") as tar:
        tar.add(chain.images / "ant" / "1.png", "x.png")
    done = roundtrip(chain, tmp_path / "tars", tmp_path / "a.png", "--size 16")
    assert done.code == 0, done.err
    image, _ = plain(chain.vae, chain.images / "ant" / "1.png", 16)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "a.png"))[:64:4, :64:4], image)


def test_deep_and_grey_images(chain, tmp_path):
    values = np.random.default_rng(0).integers(0, 65536, (20, 20)).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / "deep.png")
    done = roundtrip(chain, tmp_path / "deep.png", tmp_path / "a.png", "--size 16")
    assert done.code == 0, done.err
    shown = np.asarray(Image.open(tmp_path / "a.png"))[:64:4, :64:4]
    assert (shown[..., 0] == shown[..., 2]).all()


def test_settings_that_do_not_fit(chain, images, tmp_path):
    odd = roundtrip(chain, images, tmp_path / "a.png", "--size 15")
    assert "a multiple of 2 pixels, as the autoencoder needs it, got 15" in odd.message
    assert "--output: expected a name that ends in .png, got" in roundtrip(chain, images, tmp_path / "a.jpg").message
    # It would be encoded as an image the next time.
    inside = roundtrip(chain, images, images / "ant" / "a.png", "--size 8")
    assert re.search(
        r"--output .*a.png lies inside .*images: the next scan would take it for one of its", inside.message
    )
    assert len(list(images.rglob("*.*"))) == 8


def test_what_is_not_there(chain, tmp_path):
    output, picture = tmp_path / "a.png", chain.images / "ant" / "0.png"
    assert "does not exist; expected an image, a folder" in roundtrip(chain, tmp_path / "no", output).message
    assert "name it with --vae PATH" in roundtrip(chain, picture, output, vae=None).message
    assert "name it with --vae PATH" in roundtrip(chain, chain.images, output, vae=None).message
    missing = chain.command("roundtrip --output", output, "--vae", tmp_path / "no", picture)
    assert "no is not there; name it with --vae PATH" in missing.message
    (tmp_path / "empty").mkdir()
    assert "holds no image" in roundtrip(chain, tmp_path / "empty", output).message
    (tmp_path / "broken.png").write_bytes(picture.read_bytes()[:100])
    assert re.search("broken.png cannot be used: ", roundtrip(chain, tmp_path / "broken.png", output).message)
    assert not output.exists()
