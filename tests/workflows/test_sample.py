"""`fastlatent sample` from checkpoints of every kind, made by hand: what comes out, and that batches change nothing."""

import contextlib
import io
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file

import fastlatent
from fastlatent.cli import main
from fastlatent.diffusion.noise import normal, philox
from fastlatent.diffusion.solvers import build_table
from fastlatent.encoders.load import load_autoencoder
from fastlatent.media.images import read_image, to_uint8
from fastlatent.models.checkpoint import CheckpointConfig, DiTCheckpointConfig, save_checkpoint
from fastlatent.models.dit import DiT
from fastlatent.models.transformer import Transformer
from fastlatent.models.unet import ConditionalUNet, ConditionVectors, UNetConfig, load_unet, save_unet, unet_sizes
from fastlatent.ops.solver_step import solver_step_reference
from fastlatent.workflows.latent_files import read_latent_file

CONDITIONS = (("temperature", 1), ("wind", 3), ("wind_mag", 1))
CLASSES = ["ant", "bee", "cow"]
MEAN, STD = [0.5, -0.25], [2.0, 0.5]
KINDS = ["ar", "dit", "ddpm", "plain", "pixel"]
WITH_CLASSES = ["ar", "dit"]


def run(*words):
    """(exit code, output, the error) of a command in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(["sample", "--threads", "1", "--num-inference-steps", "3", *map(str, words)])
        except SystemExit as error:
            code = int(error.code or 0)
    return code, out.getvalue(), err.getvalue()


def ok(*words):
    code, out, err = run(*words)
    assert code == 0, err
    return out


def refused(*words):
    code, _, err = run(*words)
    assert code == 1 and "Traceback" not in err, err
    return err


def contents(folder):
    # The settings name the output.
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*.*") if p.suffix != ".yaml"}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder with a checkpoint of every kind and their autoencoder, all with random weights."""
    root = tmp_path_factory.mktemp("checkpoints")
    torch.manual_seed(0)
    AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=4, latent_channels=2, sample_size=8,
    ).save_pretrained(root / "vae")  # fmt: skip
    vae = load_autoencoder(root / "vae").identity() | {"path": str(root / "vae")}
    about = {"latents_mean": MEAN, "latents_std": STD, "vae": vae}
    sizes = {
        "hidden_size": 64, "depth": 1, "num_heads": 2, "num_kv_heads": 2, "mlp_ratio": 2, "in_channels": 2,
        "input_size": 4, "num_classes": 3, "prediction_type": "v_prediction", "classes": CLASSES,
    }  # fmt: skip
    for name, model, config in (
        ("ar", Transformer, CheckpointConfig(**sizes, **about, diffusion_depth=1)),
        ("dit", DiT, DiTCheckpointConfig(**sizes, **about, patch_size=2)),
    ):
        state = {key: torch.randn(t.shape) * 0.1 for key, t in model(config).state_dict().items()}
        (root / name).mkdir()
        save_checkpoint(root / name, config, state)
    nothing = {"latents_mean": [0.0], "latents_std": [1.0], "vae": None}
    for name, kind, conditions, channels, side, prediction_type, source in (
        ("ddpm", "UNet2DConditionModel", CONDITIONS, 2, 4, "v_prediction", about),
        ("own", "UNet2DModel", CONDITIONS, 2, 4, "v_prediction", about),
        ("plain", "UNet2DModel", (), 2, 4, "epsilon", about),
        ("pixel", "UNet2DModel", (), 1, 8, "epsilon", nothing),
    ):
        numbers = sum(count for _, count in conditions)
        config = UNetConfig(
            conditions, [0.5] * numbers, [2.0] * numbers, prediction_type, "linear", channels, side, **source
        )
        options = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_groups": 4}
        model = ConditionalUNet(kind, unet_sizes(config, kind=kind, **options), config.vector_width)
        # A run folder, of which the newest checkpoint is taken.
        folder = root / name / "checkpoint-000002"
        folder.mkdir(parents=True)
        save_unet(folder, model, config)
    return root


@pytest.mark.parametrize("kind", KINDS)
def test_folder_of_images(made, tmp_path, kind):
    out = ok(made / kind, "--output", tmp_path / "o", "--num", 5)
    assert "5 images, sheet.png" in out
    lines = [json.loads(line) for line in (tmp_path / "o" / "images.jsonl").read_text().splitlines()]
    names = [line["name"] for line in lines]
    if kind in WITH_CLASSES:
        assert names == ["ant", "bee", "cow", "ant", "bee"]
    else:
        assert names == [f"sample {i}" for i in range(5)]
    pictures = [np.asarray(Image.open(tmp_path / "o" / line["file"])) for line in lines]
    assert {p.shape for p in pictures} == {(8, 8) if kind == "pixel" else (8, 8, 3)}
    assert len({p.tobytes() for p in pictures}) == 5  # each its own noise
    assert (tmp_path / "o" / "latents.safetensors").exists() == (kind != "pixel")
    # Fewer in the same folder: those of the longer list go.
    (tmp_path / "o" / "samples.npz").write_bytes(b"of an earlier run")
    ok(made / kind, "--output", tmp_path / "o", "--num", 2, "--dtype", "bfloat16")
    assert len(list((tmp_path / "o" / "images").iterdir())) == 2
    assert not (tmp_path / "o" / "samples.npz").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_batch_size_changes_nothing_much(made, tmp_path, kind):
    def latents(size, *more):
        output = tmp_path / f"{size}{len(more)}.safetensors"
        ok(made / kind, "--output", output, "--no-decode", "--num", 8, "--batch-size", size, "--solver", "ddpm", *more)
        return load_file(output)["latents"]

    if kind == "pixel":
        assert "there are no latents" in refused(made / kind, "--output", tmp_path / "x.safetensors", "--no-decode")
        return
    want = latents(8)
    for size in (1, 3):
        # Rounding of float32, enlarged by the steps and by guidance.
        assert float((latents(size) - want).norm() / want.norm()) <= 1e-5
    assert float((latents(8, "--seed", 1) - want).abs().max()) > 0.1


@pytest.mark.parametrize("kind", ["dit", "ddpm", "pixel"])
def test_an_image_has_the_same_bytes_in_its_bucket(made, tmp_path, kind):
    for num in (5, 8):
        ok(made / kind, "--output", tmp_path / str(num), "--num", num)
    few, many = (contents(tmp_path / str(num) / "images") for num in (5, 8))
    assert few == {name: many[name] for name in few}


SCRIPT = """
import os, sys, json
import fastlatent.workflows.sample
from fastlatent.cli import main
for words in json.loads(sys.argv[1]):
    children = []
    for rank in (0, 1):
        pid = os.fork()
        if pid == 0:
            os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank))
            os._exit(main(words))
        children.append(pid)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
    print("CODES", *codes, flush=True)
"""


def test_two_processes_write_what_one_writes(made, tmp_path):
    def line(kind, output, *more):
        words = [made / kind, "--output", output, "--num", 7, "--num-inference-steps", 3, "--npz", *more]
        return ["sample", "--threads", "1", "--batch-size", "2", *map(str, words)]

    jobs = [line("ar", tmp_path / "ar", "--labels", "random"), line("ddpm", tmp_path / "ddpm", "--bit-depth", "8")]
    jobs.append(line("pixel", tmp_path / "pixel", "--batch-size", "16"))  # one batch: nothing for the second process
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(jobs)], capture_output=True, text=True, timeout=300, env=environment
    )
    assert [x for x in done.stdout.splitlines() if x.startswith("CODES")] == ["CODES 0 0"] * 3, done.stderr
    assert "1 of 2 processes have no batch" in done.stdout
    for words in jobs:
        output = Path(words[words.index("--output") + 1])
        words[words.index("--output") + 1] = str(tmp_path / "alone" / output.name)
        ok(*words[1:])
        assert contents(output) == contents(tmp_path / "alone" / output.name)


def guided(model, config, vectors, null, noise, steps, scale):
    """Plain float64: the solver's rows, one after the other, with classifier-free guidance."""
    table = build_table("dpmsolver++", steps, config.prediction_type, config.beta_schedule)
    state = torch.zeros(4, len(noise), noise[0].numel(), dtype=torch.float64)
    state[0] = noise.flatten(1)
    for row, t in zip(table.rows, table.timesteps, strict=True):
        x = state[0].reshape(noise.shape)
        c = model(x, t.long().expand(len(x)), vectors)
        u = model(x, t.long().expand(len(x)), null.expand(len(x), -1))
        output = u + scale * (c - u)
        solver_step_reference(state, output.flatten(1)[None], torch.ones(1, len(x), dtype=torch.float64), row)
    return state[0].reshape(noise.shape)


@pytest.mark.parametrize("kind", ["ddpm", "own"])
def test_guidance_with_conditions_is_the_formula(made, tmp_path, kind):
    given = [{"temperature": 0.3, "wind": [1, 2, 2]}, {"temperature": 0, "wind": None}]
    output = tmp_path / "o.safetensors"
    ok(
        made / kind,
        "--output",
        output,
        "--no-decode",
        "--cond",
        json.dumps(given),
        "--cfg-scale",
        2,
        "--dtype",
        "float64",
    )
    model, config = load_unet(made / kind, dtype=torch.float64)
    values = torch.tensor([[0.3, 1, 2, 2, 3], [0, 0, 0, 0, 0]], dtype=torch.float64)  # wind_mag follows from wind
    present = torch.tensor([[1, 1, 1], [1, 0, 0]], dtype=torch.float64)
    vectors = ConditionVectors(config)(values, present, torch.zeros(2))
    null = ConditionVectors(config)(values[:1], present[:1], torch.ones(1))
    noise = normal(0, range(2), 0, (2, 4, 4))
    want = guided(model, config, vectors, null, noise, 3, 2.0)
    got = load_file(output)["latents"].transpose(1, 2).reshape(want.shape)
    assert float((got - want).abs().max() / want.abs().max()) <= 1e-12
    file = read_latent_file(output)
    assert file.names() == [json.dumps(one) for one in given]
    assert file.latents_mean == MEAN
    # Without --cond: the null alone, whatever the default guidance.
    ok(made / kind, "--output", output, "--no-decode", "--num", 2, "--dtype", "float64")
    want = guided(model, config, null.expand(2, -1), null, noise, 3, 1.0)
    got = load_file(output)["latents"].transpose(1, 2).reshape(want.shape)
    assert float((got - want).abs().max() / want.abs().max()) <= 1e-12


def test_conditions_from_a_file_are_repeated(made, tmp_path):
    given = [{"temperature": 0.3}, {"temperature": None, "wind": [0, 0, 0]}]
    (tmp_path / "cond.json").write_text(json.dumps(given))
    ok(made / "ddpm", "--output", tmp_path / "o", "--cond", tmp_path / "cond.json", "--num", 3)
    names = [json.loads(line)["name"] for line in (tmp_path / "o" / "images.jsonl").read_text().splitlines()]
    assert [json.loads(name) for name in names] == [*given, given[0]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"temprature": 1}', "unknown condition 'temprature'; did you mean 'temperature'?"),
        ('{"x": 1}', "this model's: temperature:1,wind:3,wind_mag:1"),
        ('{"wind": [1, 2]}', "expected 3 numbers for wind, got 2"),
        ('{"wind": 1}', "expected 3 numbers for wind, got 1"),
        ('{"temperature": [1, 2]}', "expected 1 numbers for temperature, got 2"),
        ('{"temperature": "hot"}', "expected finite numbers, or null, for temperature, got 'hot'"),
        ('{"temperature": true}', "expected finite numbers, or null, for temperature, got True"),
        ('{"temperature": NaN}', "expected finite numbers, or null, for temperature, got nan"),
        ('{"temperature": 1e39}', "expected finite numbers, or null, for temperature, got 1e+39"),  # not a float32
        ('{"wind": [0, null, 0]}', "expected finite numbers, or null, for wind, got None"),
        ('{"wind": []}', "expected 3 numbers for wind, got 0"),
        ("[]", "expected at least one object in the list"),
        ("[1]", 'expected an object such as {"temperature": 0, "wind": [0, 0, 0], "wind_mag": 0}, got 1'),
        ('{"temperature": 1', "not JSON"),
        ("nothing-there.json", "--cond nothing-there.json: expected a JSON object or a file of it: No such file"),
    ],
)
def test_bad_conditions(made, tmp_path, text, message):
    assert message in refused(made / "ddpm", "--output", tmp_path / "o", "--cond", text)
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("kind", "more", "message"),
    [
        ("ddpm", "--labels 1", "--labels: {path} is a UNet, which has no such setting"),
        ("ddpm", "--per-class 2", "--per-class"),
        ("ddpm", "--ema", "--ema"),
        ("ddpm", "--fp8-cache", "--fp8-cache"),
        ("ddpm", "--cfg-scale 2", "guidance is towards --cond, which was not given"),
        ("plain", "--cfg-scale 2", "and this UNet has no conditions"),
        ("plain", "--cond {}", "--cond: {path} is a UNet without conditions, which has no such setting"),
        ("dit", "--cond {}", "--cond: {path} is a DiT"),
        ("dit", "--attention sdpa", "--attention: {path} is a DiT"),
        ("dit", "--noise file", "--noise: {path} is a DiT"),
        ("ar", "--cond {}", "--cond: {path} is a next-token-diffusion model"),
        ("dit", "--labels 3", "--labels: expected 0 to 2"),
        ("dit", "--labels random", "--labels random: give --num"),
        ("dit", "--labels random --num 2 --per-class 3", "give --num alone"),
        ("dit", "--solver euler", "--solver euler is for flow; {path} predicts v_prediction: leave"),
        ("plain", "--num-inference-steps 1001", "expected 1 to 1000 steps, got 1001"),
        ("pixel", "--vae anything", "--vae: this model samples pixels, there is nothing to decode"),
        ("pixel", "--allow-other-vae", "--allow-other-vae: this model samples pixels"),
        ("dit", "--npz --bit-depth 16", "--npz holds 8 bits"),
        ("dit", "--npz --no-decode --output o.safetensors", "--npz is about images"),
        ("dit", "--bit-depth 16 --no-decode --output o.safetensors", "--bit-depth 16 is about images"),
    ],
)
def test_settings_of_another_kind(made, tmp_path, kind, more, message):
    words = more.split() if "--output" in more else [*more.split(), "--output", str(tmp_path / "o")]
    assert message.format(path=made / kind) in refused(made / kind, *words)
    assert not (tmp_path / "o").exists()


def test_nothing_is_written_where_training_writes(made, tmp_path):
    message = "belongs to the training; name another place"
    run_folder = tmp_path / "run"
    shutil.copytree(made / "pixel", run_folder)
    checkpoint = run_folder / "checkpoint-000002"
    before = sorted(run_folder.rglob("*"))
    for output in (run_folder, run_folder / "samples", checkpoint / "images", tmp_path / "elsewhere" / ".." / "run"):
        assert message in refused(run_folder, "--output", output)
    assert message in refused(made / "dit", "--no-decode", "--output", made / "dit" / "model.safetensors")
    # Beside a checkpoint that no training goes on from there is room.
    ok(checkpoint, "--output", run_folder / "samples")
    shutil.rmtree(run_folder / "samples")
    (checkpoint / "training.safetensors").touch()
    assert message in refused(checkpoint, "--output", run_folder / "samples")
    (checkpoint / "training.safetensors").unlink()
    assert sorted(run_folder.rglob("*")) == before


def test_labels(made, tmp_path):
    def labels(*more):
        ok(made / "dit", "--output", tmp_path / "l.safetensors", "--no-decode", "--num-inference-steps", 1, *more)
        return load_file(tmp_path / "l.safetensors")["labels"].tolist()

    assert labels() == [0, 1, 2]
    assert labels("--labels", "2,0", "--per-class", 2) == [2, 2, 0, 0]
    assert labels("--labels", "2,0", "--num", 5) == [2, 0, 2, 0, 2]
    assert labels("--per-class", 2, "--num", 3) == [0, 0, 1]  # --num is what counts
    drawn = labels("--labels", "random", "--num", 40, "--seed", 5)
    assert labels("--labels", "random", "--num", 9, "--seed", 5, "--batch-size", 2) == drawn[:9]
    assert labels("--labels", "random", "--num", 40, "--seed", 6) != drawn
    assert set(drawn) == {0, 1, 2}
    # Not the generator of the same sample's noise.
    assert float(philox(5, 0, 2**63).standard_normal()) != float(philox(5, 0, 0).standard_normal())


def test_a_label_changes_a_dit_and_guidance_too(made, tmp_path):
    def latents(*more):
        ok(made / "dit", "--output", tmp_path / "l.safetensors", "--no-decode", *more)
        return load_file(tmp_path / "l.safetensors")["latents"]

    one, other, unguided = latents("--labels", 0), latents("--labels", 1), latents("--labels", 0, "--cfg-scale", 1)
    assert float((one - other).abs().max()) > 1e-3
    assert float((one - unguided).abs().max()) > 1e-3


@pytest.mark.parametrize("kind", ["dit", "ddpm"])
def test_decoded_pixels_equal_plain_diffusers(made, tmp_path, kind):
    ok(made / kind, "--output", tmp_path / "o", "--num", 3, "--npz")
    latents = load_file(tmp_path / "o" / "latents.safetensors")["latents"].double()
    raw = (latents * torch.tensor(STD) + torch.tensor(MEAN)).transpose(1, 2).reshape(3, 2, 4, 4).float()
    with torch.inference_mode():
        pixels = AutoencoderKL.from_pretrained(made / "vae").eval().decode(raw).sample
    with np.load(tmp_path / "o" / "samples.npz") as npz:
        assert npz["arr_0"].dtype == np.uint8
        np.testing.assert_allclose(npz["arr_0"], to_uint8(pixels.numpy()), atol=1)  # .5 may round either way
        assert npz.files == (["arr_0", "arr_1"] if kind == "dit" else ["arr_0"])
        if kind == "dit":
            assert npz["arr_1"].tolist() == [0, 1, 2]
        for i, image in enumerate(npz["arr_0"]):
            np.testing.assert_array_equal(image, Image.open(tmp_path / "o" / "images" / f"{i:06d}.png"))


@pytest.mark.parametrize("kind", ["dit", "pixel"])  # colour and grey
def test_sixteen_bits(made, tmp_path, kind):
    channels = 1 if kind == "pixel" else 3
    for depth in ("8", "16"):
        ok(made / kind, "--output", tmp_path / depth, "--num", 2, "--bit-depth", depth)
    shallow, deep = (
        read_image((tmp_path / depth / "images" / "000001.png").read_bytes(), channels=channels)
        for depth in ("8", "16")
    )
    assert (shallow.dtype, deep.dtype) == (np.uint8, np.float32)
    assert np.abs(deep - shallow / 255).max() <= 0.5 / 255 + 1e-5
    assert len(np.unique(deep)) > len(np.unique(shallow)) or np.abs(deep * 255 - np.rint(deep * 255)).max() > 0.1
    assert (tmp_path / "16" / "sheet.png").exists()
    if kind == "dit":  # and from the latents
        words = [
            "decode",
            "--threads",
            "1",
            "--bit-depth",
            "16",
            "--output-dir",
            tmp_path / "d",
            tmp_path / "16" / "latents.safetensors",
        ]
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            assert main([*map(str, words)]) == 0
        assert contents(tmp_path / "d" / "images") == contents(tmp_path / "16" / "images")


def test_another_autoencoder_is_refused(made, tmp_path):
    other = AutoencoderKL.from_pretrained(made / "vae")
    with torch.no_grad():
        other.decoder.conv_out.bias.add_(1)
    other.save_pretrained(tmp_path / "vae")
    for kind in ("dit", "ddpm"):
        assert "is not the autoencoder" in refused(made / kind, "--output", tmp_path / "o", "--vae", tmp_path / "vae")


def test_samples_that_are_not_finite(made, tmp_path):
    state = {name: t * float("nan") for name, t in load_file(made / "dit" / "model.safetensors").items()}
    config = DiTCheckpointConfig(
        **{k: v for k, v in json.loads((made / "dit" / "config.json").read_text()).items() if k != "model"}
    )
    (tmp_path / "nan").mkdir()
    save_checkpoint(tmp_path / "nan", config, state)
    assert "3 of the samples 0 to 2 are not finite" in refused(tmp_path / "nan", "--output", tmp_path / "o")


def test_the_pipeline_names_what_it_does_not_take(made):
    with pytest.raises(ValueError, match="expected a next-token-diffusion checkpoint, got a DiT"):
        fastlatent.NextTokenPipeline.from_pretrained(made / "dit", threads=1)
    with pytest.raises(ValueError, match=r"expected config.json and model.safetensors"):
        fastlatent.NextTokenPipeline.from_pretrained(made / "ddpm", threads=1)
