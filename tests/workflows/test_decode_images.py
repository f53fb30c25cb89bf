"""`fastlatent decode` of images: every kind of input against the same autoencoder in plain diffusers, every output."""

import contextlib
import errno
import io
import json
import os
import tracemalloc
import zipfile
from types import SimpleNamespace

import imagecodecs
import numpy as np
import pytest
import tifffile
import torch
from diffusers import AutoencoderKL
from PIL import Image, JpegImagePlugin
from safetensors.torch import save_file

from fastlatent.config import DecodeConfig
from fastlatent.config.fields import build
from fastlatent.encoders.load import load_autoencoder
from fastlatent.media.writers import to_uint16, to_unit
from fastlatent.store.records import Schema
from fastlatent.store.rows import Rows
from fastlatent.store.scan import Entry
from fastlatent.store.writer import DatasetWriter
from fastlatent.workflows import decode_images, image_files
from fastlatent.workflows.latent_files import LatentFile
from fastlatent.workflows.latent_inputs import open_latents

COUNT = 5
# Multiples of 1/64: float16 holds them, and scaling by powers of two comes out even.
LATENTS = torch.randint(-192, 193, (COUNT, 2, 4, 4), generator=torch.Generator().manual_seed(1)) / 64
WIDE = torch.randint(-192, 193, (4, 2, 2, 6), generator=torch.Generator().manual_seed(2)) / 64
MOMENTS = torch.cat([LATENTS, torch.full_like(LATENTS, 7.0)], 1).numpy()  # the log-variance shall not matter
RAW = {"latents_are": "raw"}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A tiny autoencoder in a folder, and what plain diffusers decodes with it."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("tiny") / "vae"
    model = AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2, layers_per_block=1, norm_num_groups=4, latent_channels=2,
        sample_size=8, scaling_factor=0.5, shift_factor=0.25,
    ).eval()  # fmt: skip
    with torch.no_grad():
        model.decoder.conv_out.weight *= 4  # also pixels beyond white and black
    model.save_pretrained(path)
    model.requires_grad_(False)  # where weights could have gradients, torch takes other kernels: last bits differ

    @torch.inference_mode()
    def decode(latents, batch_size=4):  # a full batch and one row: nothing is padded
        return torch.cat([model.decode(part).sample for part in latents.split(batch_size)])

    return SimpleNamespace(path=path, decode=decode, identity=load_autoencoder(path).identity())


@pytest.fixture
def decode(made, tmp_path, capsys):
    """decode(latents, **settings): the folder it wrote, and what it printed."""

    def run(latents, *, vae=made.path, output="out", **settings):
        given = {"latents": str(latents), "output_dir": str(tmp_path / output), "batch_size": 4, "threads": 1}
        given |= {"device": "cpu", **({} if vae is None else {"vae": str(vae)}), **settings}
        with contextlib.redirect_stderr(io.StringIO()):
            decode_images.decode_images(build(DecodeConfig, {}, given))
        return tmp_path / output, capsys.readouterr().out

    return run


def eight_bits(pixels):
    return ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


def images_of(folder):
    """name -> pixels, in the order of images.jsonl; and nothing else is there."""
    lines = [json.loads(line) for line in (folder / "images.jsonl").read_text().splitlines()]
    assert sorted(f"images/{name}" for name in os.listdir(folder / "images")) == [line["file"] for line in lines]
    return {line["name"]: np.asarray(Image.open(folder / line["file"])) for line in lines}


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def shard(path, latents):
    save_file({"latents": latents, "latents_flip": latents + 9, "labels": torch.arange(len(latents))}, path)


def dataset(folder, identity, samples, buckets, payload="moments"):
    """key -> row [1, ...], float32."""
    (folder / "source").mkdir(parents=True)
    entries = []
    for key, row in samples.items():
        path = folder / "source" / key
        path.write_text(key)
        place = buckets.index(tuple(row.shape))
        entries.append(Entry(key, str(path), -1, 1, path.stat().st_mtime_ns, bucket=place))
    provenance = {"hashed": {"vae": identity}, "informational": {"vae_path": "gone"}}
    schema = Schema(buckets, payload)
    with DatasetWriter.open(folder / "d", provenance, [], unit_rows=3, schema=schema) as writer:
        for unit in writer.plan(sorted(entries, key=lambda entry: entry.key)):
            keys = [item.key for item in unit.items]
            writer.commit(unit, Rows(keys, np.stack([samples[key].numpy() for key in keys])))
        writer.finish()
    return folder / "d"


def mar_tree(folder):
    for i, values in enumerate(MOMENTS):
        file = folder / "träge ☃" / f"{i}.JPEG.npz"
        file.parent.mkdir(exist_ok=True)
        np.savez(file, moments=values, moments_flip=values + 9)


def frames_tree(folder):
    (folder / "walk").mkdir()
    for i in range(COUNT):  # 8.pt to 12.pt: as text, 10 comes before 8
        torch.save({"latent": LATENTS[i].clone()}, folder / "walk" / f"{i + 8}.pt")
    (folder / "walk" / "traj_data.pkl").write_bytes(b"poses")


def shards(folder):
    shard(folder / "latents_rank00_shard000.safetensors", LATENTS[:3])
    shard(folder / "latents_rank00_shard001.safetensors", LATENTS[3:].half())
    torch.save({"mean": torch.zeros(1, 2, 1, 1)}, folder / "latents_stats.pt")


FRAMES = [f"walk/{i}.pt" for i in range(8, 13)]
# what is written, below which name (None: the folder), settings, what it is found to be, names
INPUTS = {
    "moments of MAR": (mar_tree, None, {}, "5 .npz files of moments", [f"träge ☃/{i}.JPEG.npz" for i in range(COUNT)]),
    "npz": (lambda f: np.savez(f / "a b.npz", arr_0=LATENTS.half(), arr_1=[1]), "a b.npz", RAW, "a .npz file", None),
    "deflated": (lambda f: np.savez_compressed(f / "x.npz", latents=LATENTS), "x.npz", RAW, "a .npz file", None),
    "npy": (lambda f: np.save(f / "x.npy", LATENTS.numpy().astype(">f8")), "x.npy", RAW, "a .npy file", None),
    "npy's": (
        lambda f: [np.save(f / f"{i}.npy", LATENTS[i : i + 1].numpy()) for i in range(COUNT)], None, RAW,
        "5 .npy files", [f"{i}.npy" for i in range(COUNT)],
    ),
    "tensor": (lambda f: torch.save(LATENTS.bfloat16(), f / "x.pt"), "x.pt", RAW, "a .pt file", None),
    "old pt": (
        lambda f: torch.save(LATENTS, f / "x.pt", _use_new_zipfile_serialization=False), "x.pt", RAW, "a .pt file", None
    ),
    "array": (lambda f: torch.save({"latents": LATENTS.numpy()}, f / "x.pt"), "x.pt", RAW, "a .pt file", None),
    "list": (lambda f: torch.save(list(LATENTS.clone()), f / "x.pt"), "x.pt", RAW, "a .pt file", None),
    "moments": (lambda f: torch.save({"moments": torch.tensor(MOMENTS)}, f / "x.pt"), "x.pt", {}, "of moments", None),
    "frames": (frames_tree, None, RAW, "5 .pt files", FRAMES),
    "shards": (
        shards, None, {}, "2 .safetensors files of LightningDiT",
        [f"latents_rank00_shard000.safetensors[{i}]" for i in range(3)]
        + [f"latents_rank00_shard001.safetensors[{i}]" for i in range(2)],
    ),
    "a shard by its name": (
        lambda f: save_file({"latents": LATENTS}, f / "latents_rank00_shard000.safetensors"),
        "latents_rank00_shard000.safetensors", {}, "of LightningDiT", None,
    ),
    "a shard": (lambda f: shard(f / "x.safetensors", LATENTS), "x.safetensors", {}, "of LightningDiT", None),
    "scaled": (
        lambda f: torch.save((LATENTS - 0.25) * 0.5, f / "x.pt"), "x.pt", {"latents_are": "scaled"}, "scaled", None
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", INPUTS)
def test_every_input_equals_direct_decoding(made, decode, tmp_path, case):
    write, name, settings, found, names = INPUTS[case]
    source = tmp_path / "latents"
    source.mkdir()
    write(source)
    out, printed = decode(source / name if name else source, **settings)
    images = images_of(out)
    assert list(images) == (names or [f"{name}[{i}]" for i in range(COUNT)])
    np.testing.assert_array_equal(np.stack(list(images.values())), eight_bits(made.decode(LATENTS)))
    assert found in printed.splitlines()[0] and "5 images, latents [2, 4, 4]" in printed


def test_latents_of_two_shapes(made, decode, tmp_path):
    mixed = [LATENTS[0], WIDE[0], LATENTS[1], LATENTS[2], WIDE[1:3]]
    torch.save([one.clone() for one in mixed], tmp_path / "x.pt")
    out, printed = decode(tmp_path / "x.pt", **RAW)
    assert "6 images, latents [2, 4, 4], [2, 2, 6], raw" in printed
    images = list(images_of(out).values())
    square, wide = eight_bits(made.decode(torch.cat([LATENTS[:3], LATENTS[:1]]))), eight_bits(made.decode(WIDE))
    for got, want in zip(images, [square[0], wide[0], square[1], square[2], wide[1], wide[2]], strict=True):
        np.testing.assert_array_equal(got, want)
    sheet = Image.open(out / "sheet.png")
    assert sheet.size == (6 * 12 * 8 + 5 * 2, 8 * 8)  # cells of 8 × 12 pixels, eightfold: at least 64 high
    cell = np.asarray(sheet)[::8, : 12 * 8 : 8]
    np.testing.assert_array_equal(cell[:, 2:10], square[0])
    assert (cell[:, :2] == 255).all() and (cell[:, 10:] == 255).all()


def test_latents_of_sample(made, decode, tmp_path):
    tokens = LATENTS.flatten(2).transpose(1, 2).contiguous()
    vae = {**made.identity, "path": str(made.path)}
    labels = torch.arange(COUNT)
    LatentFile((tokens - 0.5) * 2, labels, 0.5, 0.5, vae, list("vwxyz")).write(tmp_path / "x.safetensors")
    out, printed = decode(tmp_path / "x.safetensors", vae=None)
    assert "latents of `fastlatent sample`, 5 images" in printed
    images = images_of(out)
    assert list(images) == list("vwxyz")
    np.testing.assert_array_equal(np.stack(list(images.values())), eight_bits(made.decode(LATENTS)))


def test_datasets_of_several_shapes_and_of_frames(made, decode, tmp_path):
    rows = [torch.cat([one, one * 0], 0)[None] for pair in zip(LATENTS, WIDE, strict=False) for one in pair]
    path = dataset(
        tmp_path / "buckets", made.identity, {f"{i}": row for i, row in enumerate(rows)}, ((1, 4, 4, 4), (1, 4, 2, 6))
    )
    out, printed = decode(path, output="mixed")
    assert "a dataset of moments, 8 images, latents [2, 4, 4], [2, 2, 6], raw" in printed
    images = images_of(out)
    assert list(images) == [str(i) for i in range(8)]
    np.testing.assert_array_equal(
        np.stack([images[f"{i}"] for i in (0, 2, 4, 6)]), eight_bits(made.decode(LATENTS[:4]))
    )
    np.testing.assert_array_equal(np.stack([images[f"{i}"] for i in (1, 3, 5, 7)]), eight_bits(made.decode(WIDE)))
    # Rows [F, C, t, h, w]: two of three frames, in batches of four; limit cuts the second one.
    videos = torch.cat([LATENTS, LATENTS[:1]]).reshape(2, 3, 2, 4, 4).transpose(1, 2)[:, None].contiguous()
    path = dataset(
        tmp_path / "frames", made.identity, {"a": videos[0], "b": videos[1]}, ((1, 2, 3, 4, 4),), payload="latents"
    )
    out, _ = decode(path, output="frames", limit=COUNT)
    images = images_of(out)
    assert list(images) == ["a[0]", "a[1]", "a[2]", "b[0]", "b[1]"]
    np.testing.assert_array_equal(np.stack(list(images.values())), eight_bits(made.decode(LATENTS)))
    # Clips of three frames and of two: the same images in two buckets.
    buckets = ((1, 2, 3, 4, 4), (1, 2, 2, 4, 4))
    path = dataset(
        tmp_path / "clips", made.identity, {"a": videos[0], "b": videos[1][:, :, :2]}, buckets, payload="latents"
    )
    out, printed = decode(path, output="clips")
    assert "5 images, latents [2, 4, 4], raw" in printed
    assert images_of(out).keys() == images.keys()
    np.testing.assert_array_equal(np.stack(list(images_of(out).values())), eight_bits(made.decode(LATENTS)))
    # Another autoencoder than the one that is recorded.
    other = {**made.identity, "weights": "0" * 64}
    path = dataset(tmp_path / "other", other, {"a": videos[0]}, ((1, 2, 3, 4, 4),), payload="latents")
    with pytest.raises(ValueError, match="is not the autoencoder that made these latents"):
        decode(path, output="other-out")
    decode(path, output="other-out", allow_other_vae=True)


def test_only_what_is_decoded_is_read(tmp_path):
    rows = 10**6  # 32 MB of float32 in a sparse file
    with open(tmp_path / "x.npy", "wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": (rows, 2, 2, 2)})
        file.truncate(file.tell() + rows * 32)
    tracemalloc.start()
    images = open_latents(tmp_path / "x.npy", limit=3)
    assert images.read(next(images.batches(16))).shape == (3, 2, 2, 2)
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


def test_factors_of_each_channel(made, decode, tmp_path):
    config = json.loads((made.path / "config.json").read_text())
    vae = tmp_path / "vae"
    vae.mkdir()
    (vae / "diffusion_pytorch_model.safetensors").symlink_to(made.path / "diffusion_pytorch_model.safetensors")
    (vae / "config.json").write_text(json.dumps(config | {"latents_mean": [0.25, 0.5], "latents_std": [2, 4]}))
    mean, std = torch.tensor([0.25, 0.5]).reshape(2, 1, 1), torch.tensor([2.0, 4.0]).reshape(2, 1, 1)
    torch.save((LATENTS - mean) * 0.5 / std, tmp_path / "x.pt")
    out, _ = decode(tmp_path / "x.pt", vae=vae, latents_are="scaled")
    images = np.stack(list(images_of(out).values()))
    np.testing.assert_array_equal(images, eight_bits(made.decode(LATENTS)))
    for damaged in ({"latents_std": [1, 2, 3]}, {"scaling_factor": "one"}):
        (vae / "config.json").write_text(json.dumps(config | damaged))
        with pytest.raises(ValueError, match="config.json: expected a number or 2 numbers as scaling_factor"):
            decode(tmp_path / "x.pt", vae=vae, latents_are="scaled", output="none")
    del config["scaling_factor"]
    (vae / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="names no scaling_factor and no latents_std"):
        decode(tmp_path / "x.pt", vae=vae, latents_are="scaled", output="none")


# --- outputs ---


@pytest.fixture
def latents(tmp_path):
    np.save(tmp_path / "x.npy", LATENTS.numpy())
    return tmp_path / "x.npy"


def test_every_format(made, decode, latents):
    pixels = made.decode(LATENTS)
    assert float(pixels.abs().max()) > 1
    for format, more in (("png", {"bit_depth": "16"}), ("tiff", {}), ("webp", {}), ("jpeg", {}), ("auto", {})):
        out, _ = decode(latents, format=format, **RAW, **more)
        # The images of the format before, and of nothing else, are gone.
        files = sorted((out / "images").iterdir())
        assert len(files) == COUNT
        if format == "png":
            got = np.stack([imagecodecs.png_decode(file.read_bytes()) for file in files])
            np.testing.assert_array_equal(got, to_uint16(pixels.numpy()))
        elif format == "tiff":
            got = np.stack([tifffile.imread(file) for file in files])
            assert got.dtype == np.float32
            np.testing.assert_array_equal(got, to_unit(pixels.numpy()))
        else:
            images = [Image.open(file) for file in files]
            assert {image.format for image in images} == {{"auto": "PNG"}.get(format, format.upper())}
            want = eight_bits(pixels)
            if format == "jpeg":
                assert {JpegImagePlugin.get_sampling(image) for image in images} == {0}  # 4:4:4
                assert np.abs(np.stack(images).astype(int) - want).mean() < 4
            else:
                np.testing.assert_array_equal(np.stack(images), want)
        sheet = np.asarray(Image.open(out / "sheet.png"))
        assert sheet.shape == (64, 5 * 64 + 4 * 2, 3)
        assert np.abs(sheet[::8, :64:8].astype(int) - eight_bits(pixels)[0]).mean() < (4 if format == "jpeg" else 1)
    out, _ = decode(latents, format="jpeg", limit=2, **RAW)
    assert [file.name for file in sorted((out / "images").iterdir())] == ["000000.jpg", "000001.jpg"]


def test_a_sheet_of_large_images_is_small(made, decode, latents, monkeypatch):
    monkeypatch.setattr(image_files, "SHEET_SIDE", 4)
    out, _ = decode(latents, **RAW)
    sheet = np.asarray(Image.open(out / "sheet.png"))
    assert sheet.shape == (64, 5 * 64 + 4 * 2, 3)  # cells of 4 × 4 pixels, sixteenfold
    want = eight_bits(made.decode(LATENTS))[0].reshape(4, 2, 4, 2, 3).mean((1, 3))
    assert np.abs(sheet[::16, :64:16] - want).max() <= 0.5


@pytest.mark.parametrize(("folder", "name"), [("run.v1", "run.v1-images"), (".", "here-images")])
def test_a_folder_is_named_whole(made, tmp_path, monkeypatch, folder, name):
    here = tmp_path / "here"
    (here / "run.v1").mkdir(parents=True)
    np.save(here / "run.v1" / "0.npy", LATENTS.numpy())
    monkeypatch.chdir(here)
    given = {"latents": folder, "vae": str(made.path), "device": "cpu", "threads": 1, **RAW}
    decode_images.decode_images(build(DecodeConfig, {}, given))
    assert [path.name for path in tmp_path.rglob("*-images")] == [name]


def test_an_interrupted_run_is_finished_by_the_next(decode, latents, tmp_path, monkeypatch):
    whole, _ = decode(latents, output="whole", **RAW)
    write, left = image_files.write_atomic, [3]

    def full(path, data):
        left[0] -= path.suffix == ".png"
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write(path, data)

    monkeypatch.setattr(image_files, "write_atomic", full)
    with pytest.raises(OSError, match="No space left"):
        decode(latents, output="out", **RAW)
    monkeypatch.undo()
    assert len(list((tmp_path / "out" / "images").iterdir())) == 3
    (tmp_path / "out" / "images" / ".tmp-000003.png-0").write_bytes(b"of a process that was killed")
    (tmp_path / "out" / ".tmp-samples.npz-0").write_bytes(b"of `sample --npz` that was killed")
    out, _ = decode(latents, output="out", **RAW)
    one, other = contents(out), contents(whole)
    del one["decode.yaml"], other["decode.yaml"]  # they name their folders
    assert one == other


def test_an_engine_gets_batches_of_one_size(made, decode, latents, monkeypatch):
    opened = []
    original = decode_images.open_decoder

    def eager(name, vae, *, shapes, cache):
        opened.append((name, shapes))
        return original("eager", vae, shapes=shapes, cache=cache)

    monkeypatch.setattr(decode_images, "open_decoder", eager)
    out, _ = decode(latents, engine="compile", **RAW)
    assert opened == [("compile", ((4, 2, 4, 4),))]
    got = np.stack(list(images_of(out).values()))
    np.testing.assert_allclose(got, eight_bits(made.decode(LATENTS)).astype(int), atol=1)  # channels_last rounds anew


def test_a_dry_run_writes_nothing(decode, latents, tmp_path):
    _, printed = decode(latents, dry_run=True, **RAW)
    assert "a .npy file, 5 images, latents [2, 4, 4], raw" in printed
    assert not (tmp_path / "out").exists()


# --- what is refused ---


class Anything:
    """What only pickle can load."""


def header(shape, descr="<f4", fortran=False):
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": descr, "fortran_order": fortran, "shape": shape})
    return file.getvalue()


def cut(path, write):
    write(path)
    path.write_bytes(path.read_bytes()[:-40])


def zipped(path, data, name="latents.npy"):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(name, data)


def bomb(path):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", bytes(2**20))


def sampled(path, *, std=0.5, vae=None, classes=(), conditions=()):
    """What `fastlatent sample` writes, with a provenance that somebody edited."""
    LatentFile(LATENTS.flatten(2).mT, torch.zeros(COUNT).long(), 0.5, std, vae, classes, conditions).write(path)


SCALED = {"latents_are": "scaled"}
HUGE = (10**12, 2, 4, 4)
BAD = {
    "rank.npy": (lambda p: np.save(p, LATENTS[0, 0].numpy()), RAW, r"expected latents of images \[C, h, w\] or"),
    "video.npy": (lambda p: np.save(p, LATENTS[None].numpy()), RAW, r"got \[1, 5, 2, 4, 4\]"),
    "none.npy": (lambda p: np.save(p, LATENTS[:0].numpy()), RAW, r"got \[0, 2, 4, 4\]"),
    "objects.npy": (lambda p: np.save(p, np.array([{}]), allow_pickle=True), RAW, "pickled objects, which are never"),
    "bits.npy": (lambda p: np.save(p, np.zeros((2, 4, 4), np.uint16)), RAW, "if this is bfloat16, save its values"),
    "fortran.npy": (lambda p: np.save(p, np.asfortranarray(LATENTS.numpy())), RAW, "Fortran's order"),
    "cut.npy": (lambda p: cut(p, lambda p: np.save(p, LATENTS.numpy())), RAW, "it is truncated"),
    "huge.npy": (lambda p: p.write_bytes(header(HUGE)), RAW, "it is truncated"),
    "long.npy": (lambda p: p.write_bytes(b"\x93NUMPY\x02\x00\xff\xff\xff\x7f" + b" " * 99), RAW, "header is damaged"),
    "text.npy": (lambda p: p.write_text("latents"), RAW, "expected a .npy file of numpy.save"),
    "empty.npy": (lambda p: p.write_bytes(b""), RAW, "expected a .npy file of numpy.save"),
    "names.npz": (lambda p: np.savez(p, mu=LATENTS), RAW, "expected one of moments, latents, .* it holds mu.npy"),
    "cut.npz": (lambda p: cut(p, lambda p: np.savez(p, latents=LATENTS)), RAW, "not a zip file"),
    "huge.npz": (lambda p: zipped(p, header(HUGE)), RAW, "it is truncated"),
    "objects.npz": (lambda p: np.savez(p, arr_0=np.array([{}])), RAW, "pickled objects, which are never"),
    "odd.npz": (lambda p: np.savez(p, moments=MOMENTS[:, :3]), {}, "even number of channels"),
    "scaled.npz": (lambda p: np.savez(p, moments=MOMENTS), SCALED, "--latents-are scaled: .* leave it out"),
    "class.pt": (lambda p: torch.save(Anything(), p), RAW, "Anything, which is never loaded, since it could"),
    "dict.pt": (lambda p: torch.save({"z": LATENTS}, p), RAW, "expected a dict with one of moments.* it has 'z'"),
    "ints.pt": (lambda p: torch.save(LATENTS.long(), p), RAW, "expected tensors of floats"),
    "empty.pt": (lambda p: torch.save([], p), RAW, "got an empty list"),
    "huge.pt": (lambda p: torch.save(LATENTS[:1].expand(10**9, -1, -1, -1), p), RAW, "larger than what is"),
    "cut.pt": (lambda p: cut(p, lambda p: torch.save(LATENTS, p)), RAW, "cut.pt: "),
    "unsaid.pt": (lambda p: torch.save(LATENTS, p), {}, "add --latents-are raw or --latents-are scaled"),
    "channels.pt": (lambda p: torch.save(LATENTS.repeat(1, 2, 1, 1), p), RAW, "with 4 latent channels, it has 2"),
    "cut.safetensors": (lambda p: cut(p, lambda p: shard(p, LATENTS)), {}, "not a readable safetensors file"),
    "negative.npy": (lambda p: p.write_bytes(header((-5, -2, 4, 4)) + bytes(640)), RAW, r"damaged: shape \(-5,"),
    "meta.pt": (lambda p: torch.save(LATENTS.to("meta"), p), RAW, "dense tensor, got .* on meta"),
    "bomb.pt": (bomb, RAW, "compressed records"),
    "factors.safetensors": (lambda p: sampled(p, std=[1, 2, 3]), {}, "its provenance is damaged"),
    "factor.safetensors": (lambda p: sampled(p, std=None), {}, "its provenance is damaged"),
    "vae.safetensors": (lambda p: sampled(p, vae="kl"), {}, "its provenance is damaged"),
    "path.safetensors": (lambda p: sampled(p, vae={"path": 3}), {}, "its provenance is damaged"),
    "classes.safetensors": (lambda p: sampled(p, classes=3), {}, "its provenance is damaged"),
    "conditions.safetensors": (lambda p: sampled(p, conditions={"a": 1}), {}, "its provenance is damaged"),
    "x.png": (lambda p: p.write_bytes(b"\x89PNG"), RAW, "x.png: expected a dataset folder, a .safetensors file of"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_files(decode, tmp_path, name):
    write, settings, message = BAD[name]
    write(tmp_path / name)
    with pytest.raises(ValueError, match=message):
        decode(tmp_path / name, **settings)
    assert not (tmp_path / "out").exists()


def test_bad_folders(decode, tmp_path):
    folder = tmp_path / "latents"
    with pytest.raises(ValueError, match="does not exist; expected a dataset folder"):
        decode(folder)
    folder.mkdir()
    with pytest.raises(ValueError, match="expected a dataset.*\n?.*or expected a dataset folder, a .safetensors"):
        decode(folder)
    torch.save(LATENTS[0].clone(), folder / "0.pt")
    torch.save(LATENTS[1, :1].clone(), folder / "1.pt")
    with pytest.raises(ValueError, match=r"1.pt: expected latents of 2 channels as in 0.pt, got latents of 1"):
        decode(folder, **RAW)
    np.save(folder / "1.npy", LATENTS.numpy())
    with pytest.raises(ValueError, match="expected files of one kind, found 1 .npy, 2 .pt"):
        decode(folder, **RAW)
    with pytest.raises(ValueError, match="do not say which autoencoder made them; name it with --vae"):
        decode(folder / "1.npy", vae=None, **RAW)


def test_nan_is_found_where_it_is(decode, tmp_path):
    for i, values in enumerate(LATENTS):
        np.savez(tmp_path / f"{i}.npz", latents=values if i != 4 else values.log())
    (tmp_path / "d").mkdir()
    for i in range(COUNT):
        os.rename(tmp_path / f"{i}.npz", tmp_path / "d" / f"{i}.npz")
    with pytest.raises(ValueError, match="4.npz: the latents 0 to 0 hold NaN or infinity"):
        decode(tmp_path / "d", **RAW)


def test_settings_that_have_no_meaning(decode, latents, tmp_path, monkeypatch):
    for setting, message in (
        ({"format": "mp4"}, "--format mp4 is for the videos of an experiment; images: png, jpeg, webp, tiff"),
        ({"step_filter": "last"}, "--step-filter: is for the videos of an experiment"),
        ({"crf": 3}, "--crf: is for the videos"),
        ({"format": "jpeg", "bit_depth": "16"}, "--bit-depth 16 is for PNG"),
        ({"dtype": "tf32", "engine": "compile"}, "--dtype tf32"),
    ):
        with pytest.raises(ValueError, match=message):
            decode(latents, **RAW, **setting)
        assert not (tmp_path / "out").exists()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="images are decoded by one process"):
        decode(latents, **RAW)


@pytest.mark.parametrize("name", ["images/000009.png", "samples.npz", "sheet.png", "images.jsonl"])
def test_what_others_made_stays(decode, latents, tmp_path, name):
    """Among them what a run of ours would delete or overwrite, were it of an earlier one."""
    path = tmp_path / "out" / name
    path.parent.mkdir(parents=True)
    path.write_text('{"path": "images/000000.png", "caption": "a list of somebody\'s images"}\n')
    before = contents(tmp_path / "out")
    with pytest.raises(ValueError, match="is not of an earlier run of sample or decode; write to another"):
        decode(latents, **RAW)
    assert contents(tmp_path / "out") == before


def test_a_folder_that_cannot_be_listed_is_not_left_out(decode, tmp_path, monkeypatch):
    frames_tree(tmp_path)
    listed = os.scandir

    def scandir(path):
        if str(path).endswith("walk"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return listed(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(PermissionError):
        decode(tmp_path, **RAW)
