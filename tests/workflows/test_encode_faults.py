"""One folder with every format and every fault: what `encode` says of it, and its latents against a plain loop."""

import ast
import errno
import os
import re
from pathlib import Path

import imagecodecs
import numpy as np
import OpenEXR
import pytest
import tifffile
import torch
from diffusers import AutoencoderKL
from media_corpus import HEIGHT, WIDTH, write_corpus
from PIL import Image, ImageOps

from fastlatent.pipeline.checkpoints import checkpoints
from fastlatent.sources.files import LocalFiles
from fastlatent.store.reader import Dataset

SIZE, BATCH = 8, 4
# Batches that are not full, and units that hold good and bad files, one of them only bad ones.
ENCODE = f"encode --size {SIZE} --batch-size {BATCH} --unit-rows 7 --threads 1 --dtype float32"
TOLERANCE = 2e-6  # of the largest moment: a few roundings of float32
LINKS = {"faults/gone.jpg": "No such file or directory", "faults/itself.jpg": "Too many levels of symbolic links"}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    made = write_corpus(tmp_path_factory.mktemp("corpus"))
    folder = made.folder
    (folder / "faults" / "gone.jpg").symlink_to("nowhere.jpg")
    (folder / "faults" / "itself.jpg").symlink_to("itself.jpg")
    (folder / "jpeg" / "loop").symlink_to("..")  # a folder inside itself: no file comes twice
    (folder / "empty class").mkdir()
    (folder / "jpeg" / "notes.txt").write_text("not an image's name")
    return made


@pytest.fixture(scope="module")
def encoded(chain, corpus, tmp_path_factory):
    """What the command printed, and the dataset."""
    out = tmp_path_factory.mktemp("encoded") / "latents"
    return chain.ok(f"{ENCODE} --out", out, "--vae", chain.vae, corpus.folder).out, Dataset.open(out)


def moments_of(dataset) -> dict[str, np.ndarray]:
    """Key → moments [2C, h, w] as stored."""
    return {
        dataset.key(i): dataset.open_shard(int(dataset.shard[i])).columns["moments"][dataset.row[i], 0]
        for i in range(len(dataset))
    }


def listed(out: str, what: str) -> dict[str, str]:
    """Key → reason, of the files that the summary lists under `what`."""
    _, *lines = out[out.index(f"files could not be {what} and are not in the dataset:") :].splitlines()
    found = {}
    for line in lines:
        named = re.fullmatch(r"  ('.*?'|\".*?\"): (.*)", line)
        if named is None:
            break
        found[ast.literal_eval(named[1])] = named[2]
    return found


# --- the summary ---


def test_the_summary_lists_exactly_the_faults(corpus, encoded):
    out, dataset = encoded
    assert f"\n{len(corpus.bad)} files could not be used and" in out
    decoded = listed(out, "used")
    assert decoded.keys() == corpus.bad.keys()
    for key, pattern in corpus.bad.items():
        assert re.search(pattern, decoded[key]), (key, decoded[key])
    assert decoded == {one.key: one.reason for one in dataset.quarantined}
    unread = listed(out, "read")
    assert unread.keys() == LINKS.keys()
    assert all(why in unread[key] for key, why in LINKS.items())
    assert "not looked at, by suffix: .txt 1\n" in out


def test_every_good_file_is_a_row(corpus, encoded):
    _, dataset = encoded
    assert [dataset.key(i) for i in range(len(dataset))] == sorted(corpus.good, key=os.fsencode)
    # A class without images, and one of which no file is an image, keep their places.
    assert dataset.classes == sorted((path.name for path in corpus.folder.iterdir()), key=os.fsencode)
    labels = [dataset.classes[label] for label in dataset.label.tolist()]
    assert labels == [dataset.key(i).split("/")[0] for i in range(len(dataset))]
    sizes = {dataset.key(i): tuple(dataset.orig_hw[i].tolist()) for i in range(len(dataset))}
    assert sizes["jpeg/420.JPG"] == sizes["jpeg/orientation 3.jpg"] == (HEIGHT, WIDTH)
    assert sizes["jpeg/orientation 6.jpg"] == (WIDTH, HEIGHT)  # turned a quarter
    assert sizes["jpeg/one pixel.jpg"] == (1, 1)


# --- the latents ---


def plain_pixels(path: Path) -> np.ndarray:
    """[H, W, 3] uint8, or float in [0, 1]: each format by the library that everybody would take."""
    head = path.read_bytes()[:32]
    if head[:4] == b"\x76\x2f\x31\x01":
        channels = OpenEXR.File(str(path), separate_channels=True).channels()
        pixels = np.stack([channels[name].pixels for name in ("RGB" if "R" in channels else "Y")], 2)
    elif head[:4] in (b"II*\0", b"MM\0*"):
        pixels = tifffile.imread(path)
        pixels = pixels.transpose(1, 2, 0) if pixels.shape[0] == 3 else pixels
    elif head[:4] == b"\x89PNG" and head[24] == 16:
        pixels = imagecodecs.png_decode(path.read_bytes())
    else:
        pixels = np.asarray(ImageOps.exif_transpose(Image.open(path)).convert("RGB"))
    if pixels.ndim == 2 or pixels.shape[2] == 1:
        pixels = np.repeat(pixels.reshape(*pixels.shape[:2], 1), 3, 2)
    return (pixels / 65535 if pixels.dtype == np.uint16 else pixels)[:, :, :3]


def plain_crop(image: Image.Image) -> Image.Image:
    """ADM's centre crop."""
    while min(image.size) >= 2 * SIZE:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = SIZE / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - SIZE) // 2, (image.height - SIZE) // 2
    return image.crop((left, top, left + SIZE, top + SIZE))


def plain_input(path: Path) -> np.ndarray:
    """float32 [3, SIZE, SIZE] in [-1, 1]."""
    pixels = plain_pixels(path)
    if pixels.dtype == np.uint8:
        return (
            np.asarray(plain_crop(Image.fromarray(pixels))).transpose(2, 0, 1).astype(np.float32) / np.float32(127.5)
            - 1
        )
    planes = [plain_crop(Image.fromarray(pixels[:, :, c].astype(np.float32))) for c in range(3)]
    return 2 * np.stack([np.asarray(plane) for plane in planes]).clip(0, 1) - 1


def plain_moments(chain, folder: Path, batches: list[list[str]]) -> dict[str, np.ndarray]:
    """Batches of BATCH, what is missing is grey; on one thread, in the memory layout that `--engine eager` has."""
    torch.set_num_threads(1)
    vae = AutoencoderKL.from_pretrained(checkpoints(chain.vae)[-1]).eval().to(memory_format=torch.channels_last)
    moments = {}
    for keys in batches:
        pixels = torch.zeros(BATCH, 3, SIZE, SIZE)
        for place, key in enumerate(keys):
            pixels[place] = torch.from_numpy(plain_input(folder / key))
        with torch.no_grad():
            posterior = vae.encode(pixels.contiguous(memory_format=torch.channels_last)).latent_dist
        both = torch.cat([posterior.mean, posterior.logvar], 1)
        moments |= {key: both[place].numpy() for place, key in enumerate(keys)}
    return moments


def batches_of(dataset) -> list[list[str]]:
    """The good files of each unit in batches: what lies in a shard, in its order."""
    batches = []
    for number in range(len(dataset.shards)):
        samples = sorted(np.flatnonzero(dataset.shard == number).tolist(), key=lambda i: dataset.row[i])
        keys = [dataset.key(i) for i in samples]
        batches += [keys[begin : begin + BATCH] for begin in range(0, len(keys), BATCH)]
    return batches


@pytest.fixture(scope="module")
def plain(chain, corpus, encoded):
    return plain_moments(chain, corpus.folder, batches_of(encoded[1]))


def far(got: np.ndarray, want: np.ndarray) -> float:
    """Largest difference, in parts of the largest value."""
    return float(np.abs(got - want).max() / np.abs(want).max())


def test_latents_equal_a_plain_loop(encoded, plain):
    # Pixels are the same to the last bit; the encoder's fused GroupNorm sums in another order than torch's.
    found = moments_of(encoded[1])
    assert found.keys() == plain.keys()
    assert {key: far(found[key], plain[key]) for key in plain if far(found[key], plain[key]) > TOLERANCE} == {}


def test_the_tolerance_notices_one_grey_level_in_one_pixel(chain, corpus, plain):
    vae = AutoencoderKL.from_pretrained(checkpoints(chain.vae)[-1]).eval()
    pixels = np.stack([plain_input(corpus.folder / "png/rgb.png")] * 2)
    pixels[1, 1, 4, 4] += 1 / 127.5
    with torch.no_grad():
        posterior = vae.encode(torch.from_numpy(pixels)).latent_dist
    right, wrong = torch.cat([posterior.mean, posterior.logvar], 1).numpy()
    # One by one, in torch's own memory layout and without padding: rounding is all that differs.
    assert far(right, plain["png/rgb.png"]) < TOLERANCE
    assert far(wrong, plain["png/rgb.png"]) > 10 * TOLERANCE


@pytest.mark.parametrize(("decoder", "module"), [("dali", "nvidia.dali"), ("nvimagecodec", "nvidia.nvimgcodec")])
def test_other_decoders_on_the_cpu_give_the_same_bytes(chain, corpus, encoded, tmp_path, decoder, module):
    pytest.importorskip(module)
    done = chain.ok(
        f"{ENCODE} --device cpu --decoder {decoder} --out", tmp_path / "d", "--vae", chain.vae, corpus.folder
    )
    out, first = encoded
    dataset = Dataset.open(tmp_path / "d")
    found, wanted = moments_of(dataset), moments_of(first)
    assert {key: data.tobytes() for key, data in found.items()} == {key: data.tobytes() for key, data in wanted.items()}
    assert listed(done.out, "used") == listed(out, "used")
    assert listed(done.out, "read") == listed(out, "read")
    # Not the same dataset for all that: a run on a GPU could not promise the bytes.
    assert dataset.fingerprint != first.fingerprint


# --- while it runs ---


def faulty(images: Path, *names: str) -> None:
    for name in names:
        (images / name).write_bytes(b"no picture")


def shards_of(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.glob("shards/*/*")}


def rows_of(out: Path) -> dict[str, bytes]:
    return {key: data.tobytes() for key, data in moments_of(Dataset.open(out)).items()}


def run(chain, images: Path, out: Path, more: str = ""):
    return chain.command(f"encode {chain.encode} {more} --out", out, "--vae", chain.vae, images)


def test_max_errors_stops_and_a_higher_limit_goes_on(chain, images, tmp_path):
    out = tmp_path / "d"
    # Units of 3: a0 a1 a2, a3 b0 b1, b2 b3 x0, x1 x2: the third fault is in the last one.
    faulty(images, "bee/x0.png", "bee/x1.png", "bee/x2.png")
    done = run(chain, images, out, "--max-errors 2")
    assert done.code == 1
    assert "--max-errors 2: 3 files cannot be used; what is finished stays" in done.message
    assert not (out / "dataset.json").exists()
    kept = shards_of(out)
    assert len(kept) == 3
    # One fault was committed with the third unit, and counts in the second run as in the first.
    assert "--max-errors 2: 3 files cannot be used" in run(chain, images, out, "--max-errors 2").message
    done = run(chain, images, out, "--max-errors 3")
    assert done.code == 0 and "8 rows in 3 shards" in done.out and "0 files encoded now" in done.out
    assert shards_of(out) == kept
    assert len(Dataset.open(out).quarantined) == 3
    # Also when there is nothing left to do, or only another file.
    assert "--max-errors 2: 3 files cannot be used" in run(chain, images, out, "--max-errors 2").message
    chain.image(50).save(images / "bee" / "9.png")
    assert "--max-errors 2: 3 files cannot be used" in run(chain, images, out, "--max-errors 2").message
    assert "1 files encoded now" in run(chain, images, out, "--max-errors 3").out


def test_max_errors_counts_what_the_source_cannot_give_before_anything_is_read(chain, images, tmp_path):
    (images / "ant" / "gone.png").symlink_to("nowhere")
    (images / "ant" / "gone too.png").symlink_to("nowhere")
    done = run(chain, images, tmp_path / "d", "--max-errors 1")
    assert done.code == 1 and "--max-errors 1: 2 files cannot be used" in done.message
    assert not (tmp_path / "d" / "plan").exists()
    assert run(chain, images, tmp_path / "d", "--max-errors 2").code == 0


def test_a_faulty_file_that_comes_or_goes_changes_no_other_row(chain, images, tmp_path):
    out = tmp_path / "d"
    assert run(chain, images, out).code == 0
    shards, rows = shards_of(out), rows_of(out)
    faulty(images, "ant/00.png", "bee/1a.png")  # before and between the others
    assert "0 files encoded now" in run(chain, images, out).out
    assert (shards_of(out), rows_of(out)) == (shards, rows)
    assert [one.key for one in Dataset.open(out).quarantined] == ["ant/00.png", "bee/1a.png"]
    (images / "ant" / "00.png").unlink()
    assert "0 files encoded now" in run(chain, images, out).out
    assert (shards_of(out), rows_of(out)) == (shards, rows)
    assert [one.key for one in Dataset.open(out).quarantined] == ["bee/1a.png"]
    # Encoded from the start beside faults: other units and other batches, and still the same rows.
    faulty(images, "ant/00.png", "bee/00.png", "bee/2a.png")
    assert run(chain, images, tmp_path / "anew").code == 0
    assert shards_of(tmp_path / "anew").keys() != shards.keys()
    assert rows_of(tmp_path / "anew") == rows
    dataset, first = Dataset.open(tmp_path / "anew"), Dataset.open(out)
    for column in ("key_hash", "label", "orig_hw", "crop", "key_utf8"):
        np.testing.assert_array_equal(getattr(dataset, column), getattr(first, column))


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO])  # the second is asked for three times
def test_a_file_that_cannot_be_read_is_left_out_until_it_can(chain, images, tmp_path, monkeypatch, number):
    read, times = LocalFiles.read, []

    def refuse(self, path):
        if path == "bee/1.png":
            times.append(path)
            raise OSError(number, os.strerror(number))
        return read(self, path)

    monkeypatch.setattr(LocalFiles, "read", refuse)
    monkeypatch.setattr("fastlatent.sources.items.RETRY_SECONDS", (0.0, 0.0, 0.0))
    done = run(chain, images, tmp_path / "d")
    reason = os.strerror(number) if number == errno.EACCES else f"3 times: {os.strerror(number)}"
    assert done.code == 0 and "7 rows" in done.out
    assert listed(done.out, "read")["bee/1.png"].endswith(reason)
    assert len(times) == (1 if number == errno.EACCES else 3)
    monkeypatch.undo()
    assert "1 files encoded now" in run(chain, images, tmp_path / "d").out
    assert rows_of(tmp_path / "d") == rows_of(chain.latents)


def test_a_file_that_vanishes_after_the_plan_ends_the_run_and_is_named(chain, images, tmp_path, monkeypatch):
    read, times = LocalFiles.read, []

    def vanish(self, path):
        times.append(path)
        if path == "bee/1.png" and times.count(path) > 1:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        return read(self, path)

    monkeypatch.setattr(LocalFiles, "read", vanish)
    done = run(chain, images, tmp_path / "d")
    assert f"{images / 'bee' / '1.png'} could not be read: No such file or directory" in done.message
    monkeypatch.undo()
    assert run(chain, images, tmp_path / "d").code == 0
    assert rows_of(tmp_path / "d") == rows_of(chain.latents)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_files_without_permission_are_left_out(chain, images, tmp_path):
    os.chmod(images / "bee" / "1.png", 0)
    done = run(chain, images, tmp_path / "d")
    assert done.code == 0
    assert listed(done.out, "read") == {"bee/1.png": "cannot be read: Permission denied"}
    assert "7 rows" in done.out
