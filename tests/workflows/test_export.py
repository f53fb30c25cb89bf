"""train ar and dit → export → load: bit-equal; and --init of our and of published checkpoints."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fastlatent.models.checkpoint import load_checkpoint, read_config
from fastlatent.pipeline.checkpoints import checkpoints

SIZES = {
    "ar": "--hidden-size 64 --depth 1 --num-heads 2 --mlp-ratio 2 --diffusion-depth 1",
    "dit": "--hidden-size 64 --depth 1 --num-heads 2 --mlp-ratio 2 --patch-size 2",
}
TRAIN = "--steps 3 --batch-size 4 --warmup-steps 1 --learning-rate 1e-2 --checkpoint-every 2 --threads 1"


@pytest.fixture(scope="session")
def trained(chain, tmp_path_factory):
    """A run of each model with one mean and std for all channels, and what `export` makes of it."""
    root = tmp_path_factory.mktemp("export")
    for model, sizes in SIZES.items():
        chain.ok(f"train {model} {sizes} {TRAIN} --normalization all --out", root / model, chain.latents)
        chain.ok("export --output", root / f"{model}-published", root / model)
    return root


@pytest.mark.parametrize("model", SIZES)
def test_the_published_layout(trained, model):
    out, source = trained / f"{model}-published", checkpoints(trained / model)[-1]
    folder = out / "checkpoint-3"
    assert Path((out / "latest").read_text()) == folder
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors", "other_state.pth"]
    state, training = load_file(folder / "model.safetensors"), load_file(source / "training.safetensors")
    other = torch.load(folder / "other_state.pth", weights_only=True)
    config = read_config(source / "config.json")
    assert set(other) == {"scaling_factor", "bias_factor", "steps", "ema"} and other["steps"] == 3
    assert (other["scaling_factor"], other["bias_factor"]) == (1 / config.latents_std, -config.latents_mean)
    assert all(torch.equal(tensor, training[f"weights.model.{name}"]) for name, tensor in state.items())
    shadow = other["ema"].pop("shadow_params")
    loaded, _ = load_checkpoint(source, torch.float32, "cpu")
    names = [name for name, _ in loaded.named_parameters()]
    assert set(names) == set(state) and (names[0] == "pos_embed") == (model == "dit")
    assert all(torch.equal(tensor, training[f"ema.model.{n}"]) for n, tensor in zip(names, shadow, strict=True))
    assert any(not torch.equal(state[n], tensor) for n, tensor in zip(names, shadow, strict=True))
    assert other["ema"] == {
        "decay": 0.9999, "min_decay": 0.9999, "optimization_step": 3, "update_after_step": 0, "use_ema_warmup": False,
        "inv_gamma": 1.0, "power": 2 / 3,
    }  # fmt: skip


@pytest.mark.parametrize("model", SIZES)
def test_export_and_import_are_bit_equal(trained, model):
    source = checkpoints(trained / model)[-1]
    training = load_file(source / "training.safetensors")
    average, config = load_checkpoint(source, torch.float32, "cpu")
    for ema in (False, True):
        again, read = load_checkpoint(trained / f"{model}-published", torch.float32, "cpu", ema=ema)
        for name, tensor in again.state_dict().items():
            assert torch.equal(tensor, training[f"{'ema' if ema else 'weights'}.model.{name}"]), name
            assert not ema or torch.equal(tensor, average.state_dict()[name])
        assert read.latents_std == pytest.approx(config.latents_std, rel=1e-15)
        assert (read.prediction_type, read.vae, read.classes) == (config.prediction_type, config.vae, config.classes)


def test_bare_checkpoints_and_refusals(chain, trained, tmp_path):
    message = chain.command("export --output", tmp_path / "a", chain.ar).message
    assert "differs from channel to channel" in message and "--normalization all" in message
    assert not (tmp_path / "a").exists()
    assert "expected config.json and model.safetensors" in chain.command(
        "export --output", tmp_path / "a", chain.vae
    ).message  # fmt: skip
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).write_bytes((checkpoints(trained / "dit")[-1] / name).read_bytes())
    chain.ok("export --output", tmp_path / "b", bare)
    want, got = (load_checkpoint(f, torch.float32, "cpu")[0].state_dict() for f in (bare, tmp_path / "b"))
    assert all(torch.equal(got[name], tensor) for name, tensor in want.items())
    assert torch.load(tmp_path / "b" / "checkpoint-0" / "other_state.pth", weights_only=True)["ema"] is None
    assert "exists already" in chain.command("export --output", tmp_path / "b", bare).message


# --- --init ---


@pytest.mark.parametrize("model", SIZES)
@pytest.mark.parametrize("kind", ["ours", "published"])
def test_init(chain, trained, tmp_path, model, kind):
    """Sizes, weights and normalisation are those of --init, whatever --model and the data would give."""
    source = trained / (model if kind == "ours" else f"{model}-published")
    line = f"train {model} {TRAIN.replace('1e-2', '0')} --weight-decay 0 --out"
    begin, config = load_checkpoint(source, torch.float32, "cpu")
    out = chain.ok(line, tmp_path / "run", "--init", source, chain.latents).out
    assert f"normalisation (mean {config.latents_mean}, std {config.latents_std}) of {source}" in out
    end, read = load_checkpoint(tmp_path / "run", torch.float32, "cpu")
    # The data's own would be a number for each channel.
    assert (read.latents_mean, read.latents_std) == (config.latents_mean, config.latents_std)
    # With a learning rate of 0 nothing has changed.
    for name, tensor in end.state_dict().items():
        torch.testing.assert_close(tensor, begin.state_dict()[name], rtol=1e-6, atol=1e-8)


def test_a_run_goes_on_without_its_init(chain, trained, tmp_path):
    source = shutil.copytree(trained / "dit", tmp_path / "source")
    line = f"train dit {TRAIN} --out"
    chain.ok(line, tmp_path / "run", "--init", source, chain.latents)
    last = checkpoints(tmp_path / "run")[-1]
    want = {name: (last / name).read_bytes() for name in ("config.json", "training.safetensors")}
    shutil.rmtree(last)
    shutil.rmtree(source)
    assert "resuming from step 2" in chain.ok(line, tmp_path / "run", chain.latents).out
    assert {name: (last / name).read_bytes() for name in want} == want


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--hidden-size 128", "it was trained with --hidden-size 64, but this run has 128"),
        ("--patch-size 1", "it was trained with --patch-size 2, but this run has 1"),
        ("--prediction-type flow", "it was trained with --prediction-type v_prediction, but this run has flow"),
        ("--beta-schedule laplace", "it was trained with --beta-schedule cosine, but this run has laplace"),
    ],
)
def test_init_that_contradicts(chain, trained, tmp_path, more, message):
    done = chain.command(f"train dit {TRAIN} {more} --out", tmp_path / "run", "--init", trained / "dit", chain.latents)
    assert message in done.message


def test_init_of_something_else(chain, trained, tmp_path):
    def refused(init):
        return chain.command(f"train dit {TRAIN} --out", tmp_path / "run", "--init", init, chain.latents).message

    assert "expected a model 'dit', got 'transformer'" in refused(trained / "ar")
    assert "nowhere does not exist" in refused(tmp_path / "nowhere")
    source, folder = checkpoints(trained / "dit")[-1], tmp_path / "other"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes())
    config = json.loads((source / "config.json").read_text())
    name = next(key for key in config["vae"] if key != "path")
    for change, text in (
        ({"vae": config["vae"] | {name: "another"}}, "made by another autoencoder"),
        ({"input_size": 8}, "pos_embed has shape"),
    ):
        (folder / "config.json").write_text(json.dumps(config | change))
        assert text in refused(folder)


def test_init_of_other_data(chain, trained, tmp_path):
    chain.ok("encode", *chain.encode.replace("--size 8", "--size 16").split(), "--out", tmp_path / "latents", "--vae",
             chain.vae, chain.images)  # fmt: skip
    message = chain.command(
        f"train dit {TRAIN} --out", tmp_path / "run", "--init", trained / "dit", tmp_path / "latents"
    ).message
    assert "2×4×4 latents of 2 classes is what it was trained on" in message and "holds 2×8×8 latents" in message
