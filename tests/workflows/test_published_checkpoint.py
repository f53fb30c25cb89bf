"""`sample` from the folders that the published training script leaves equals the plain sampler with their weights."""

import json

import plain_latentlm
import pytest
import torch
from safetensors.torch import load_file, save_file

from fastlatent.models import transformer
from fastlatent.models.transformer import Transformer, TransformerConfig
from fastlatent.workflows.latent_files import read_latent_file

SCALE, BIAS = 0.7, -0.3
# 3 heads of 8, one of keys and values; FFN width floor(24·4·2/3/64)·64 = 64; 4 tokens of 2 channels; 3 classes.
SIZES = {
    "hidden_size": 24, "depth": 2, "num_heads": 3, "num_kv_heads": 1, "mlp_ratio": 4, "diffusion_depth": 2,
    "in_channels": 2, "input_size": 2, "num_classes": 3,
}  # fmt: skip
LABELS = torch.tensor([2, 0])


def random_weights(seed):
    """float32, in the order of the model's parameters. std 0.05; modulations and output are not zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        parameters = dict(Transformer(TransformerConfig(**SIZES)).named_parameters())
    return {name: 0.05 * torch.randn(tuple(p.shape), generator=generator) for name, p in parameters.items()}


def published(run, *, kind="safetensors", ema=True):
    """RUN/checkpoint-5 and RUN/latest as accelerate or DeepSpeed leave them → weights, averaged weights."""
    folder = run / "checkpoint-5"
    folder.mkdir(parents=True)
    state, shadow = random_weights(0), random_weights(1)
    if kind == "safetensors":
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        (folder / "pytorch_model").mkdir()
        module = {f"module.{name}": tensor for name, tensor in state.items()}
        torch.save({"module": module, "global_steps": 5}, folder / "pytorch_model" / "mp_rank_00_model_states.pt")
        (folder / "latest").write_text("pytorch_model")
    average = {"decay": 0.9999, "optimization_step": 5, "shadow_params": list(shadow.values())} if ema else None
    torch.save({"scaling_factor": SCALE, "bias_factor": BIAS, "steps": 5, "ema": average}, folder / "other_state.pth")
    (run / "latest").write_text("/where/it/was/trained/run/checkpoint-5")
    return state, shadow


def model_config(tmp_path, **values):
    (tmp_path / "model.json").write_text(json.dumps(values))
    return tmp_path / "model.json"


@pytest.fixture
def noise(tmp_path):
    values = torch.randn(len(LABELS), 4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    save_file({"noise": values}, tmp_path / "noise.safetensors")
    return values


def sample(chain, tmp_path, checkpoint, more=""):
    return chain.command(
        "sample --dtype float64 --num-inference-steps 3 --cfg-scale 2.5 --labels 2,0 --no-decode --threads 1 "
        f"{more} --noise {tmp_path}/noise.safetensors --output {tmp_path}/out.safetensors", checkpoint,
    )  # fmt: skip


def error_of(tmp_path, weights, noise, prediction_type):
    state = {name: tensor.double() for name, tensor in weights.items()}
    want = plain_latentlm.sample(
        state, SIZES, LABELS, noise, prediction_type=prediction_type, steps=3, cfg_scale=2.5
    )  # fmt: skip
    got = load_file(tmp_path / "out.safetensors")["latents"]
    assert got.dtype == torch.float64
    return float((got - want).abs().max() / want.abs().max())


@pytest.mark.parametrize("kind", ["safetensors", "deepspeed"])
@pytest.mark.parametrize("ema", [False, True])
def test_sample_equals_the_plain_sampler(chain, tmp_path, noise, kind, ema):
    state, shadow = published(tmp_path / "run", kind=kind)
    file = model_config(tmp_path, prediction_type="v_prediction", input_size=2, num_heads=3)
    done = sample(chain, tmp_path, tmp_path / "run", f"--model-config {file} {'--ema' if ema else ''}")
    assert done.code == 0, done.err
    used, other = (shadow, state) if ema else (state, shadow)
    assert error_of(tmp_path, used, noise, "v_prediction") <= 1e-10
    assert error_of(tmp_path, other, noise, "v_prediction") > 1e-3
    # The file knows the way back: raw = latents/scale − bias.
    written = read_latent_file(tmp_path / "out.safetensors")
    assert (written.latents_mean, written.latents_std) == (-BIAS, 1 / SCALE)
    raw = (written.latents / SCALE - BIAS).transpose(1, 2).reshape(2, 2, 2, 2)
    torch.testing.assert_close(written.raw(), raw.float(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("prediction_type", ["epsilon", "flow"])
def test_a_published_size_needs_two_keys(chain, tmp_path, noise, monkeypatch, prediction_type):
    monkeypatch.setitem(transformer.SIZES, "Transformer-Tiny", (2, 24, 3, 4, 2))
    state, _ = published(tmp_path / "run", ema=False)
    folder = tmp_path / "run" / "checkpoint-5"
    (folder / "config.json").write_text(json.dumps({"prediction_type": prediction_type, "input_size": 2}))
    done = sample(chain, tmp_path, folder)
    assert done.code == 0, done.err
    assert error_of(tmp_path, state, noise, prediction_type) <= 1e-10
    assert "trained without --use_ema" in sample(chain, tmp_path, folder, "--ema").message


def test_images_of_a_published_checkpoint(chain, tmp_path):
    published(tmp_path / "run")
    file = model_config(tmp_path, prediction_type="flow", input_size=2, num_heads=3)
    more = f"--num-inference-steps 2 --threads 1 --model-config {file} --output"
    message = chain.command(f"sample {more}", tmp_path / "out", tmp_path / "run").message
    assert "--vae PATH" in message  # the checkpoint does not say what made its latents
    chain.ok(f"sample --ema {more}", tmp_path / "out", "--vae", chain.vae, tmp_path / "run")
    assert len(list((tmp_path / "out" / "images").iterdir())) == 3
    # The same again from the settings that were kept.
    before = (tmp_path / "out" / "latents.safetensors").read_bytes()
    chain.ok("sample --config", tmp_path / "out" / "sample.yaml", "--output", tmp_path / "again")
    assert (tmp_path / "again" / "latents.safetensors").read_bytes() == before


def test_refusals_are_one_message(chain, tmp_path, noise):
    published(tmp_path / "run")
    message = sample(chain, tmp_path, tmp_path / "run").message
    assert "do not tell prediction_type, input_size, num_heads; write them to" in message
    line = message.splitlines()[-1]
    assert json.loads(line) == {"prediction_type": "epsilon", "input_size": 16, "num_heads": 1}
    # A line pasted unread: 1 head cannot be, and 256 tokens are not what the noise has.
    (tmp_path / "run" / "checkpoint-5" / "config.json").write_text(line)
    assert "with num_heads 1 expected" in sample(chain, tmp_path, tmp_path / "run").message
    file = model_config(tmp_path, **(json.loads(line) | {"num_heads": 3}))
    assert "[2, 256, 2]" in sample(chain, tmp_path, tmp_path / "run", f"--model-config {file}").message
    assert "None.json does not read" in sample(chain, tmp_path, tmp_path / "run", "--model-config None.json").message
    assert "already is the average" in sample(chain, tmp_path, chain.ar, "--ema").message
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize("kind", ["safetensors", "deepspeed"])
def test_inspect_says_what_it_is(chain, tmp_path, kind):
    published(tmp_path / "run", kind=kind)
    for path, what in ((tmp_path / "run", "run"), (tmp_path / "run" / "checkpoint-5", "checkpoint")):
        out = chain.ok("inspect", path).out
        assert f"kind: LatentLM {what} as the published training script writes it" in out
        name = "model.safetensors" if kind == "safetensors" else "pytorch_model/mp_rank_00_model_states.pt"
        assert f"  {name}: " in out
        assert "  other_state.pth: " in out
