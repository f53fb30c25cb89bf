"""UNet checkpoints: diffusers alone loads and samples them, and conditions mean what they say."""

import json
import math

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel, UNet2DModel
from diffusers.models.embeddings import TimestepEmbedding
from safetensors.torch import load_file, save_file

from fastlatent.config.train import BETA_SCHEDULES
from fastlatent.diffusion.schedules import alphas_cumprod
from fastlatent.models.unet import (
    ConditionalUNet,
    ConditionVectors,
    UNetConfig,
    check_side,
    find_unet,
    load_unet,
    save_unet,
    scheduler,
    unet_sizes,
)
from fastlatent.sources.conditions import parse_conditions

SPEC = "temperature:1,wind:3"
CLASSES = {"UNet2DModel": UNet2DModel, "UNet2DConditionModel": UNet2DConditionModel}
KINDS = [(kind, spec) for kind in CLASSES for spec in (SPEC, "none")]


def config_of(spec=SPEC, **change) -> UNetConfig:
    conditions = parse_conditions(spec)
    numbers = sum(count for _, count in conditions)
    values = {
        "conditions": conditions, "condition_mean": [0.5, 10.0, 0.0, -3.0][:numbers],
        "condition_std": [2.0, 5.0, 1.0, 0.25][:numbers], "prediction_type": "epsilon", "beta_schedule": "linear",
        "channels": 2, "side": 4, "latents_mean": [0.5, -0.25], "latents_std": [2.0, 0.5],
        "vae": {"class": "AutoencoderKL", "path": "/data/vae"},
    }  # fmt: skip
    return UNetConfig(**{**values, **change})


def model_of(kind, config, widths=(8, 8, 8)) -> ConditionalUNet:
    torch.manual_seed(0)
    sizes = unet_sizes(config, kind=kind, block_out_channels=widths, layers_per_block=1, norm_groups=4)
    return ConditionalUNet(kind, sizes, config.vector_width)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Each class, with and without conditions, as a run's only checkpoint: (run folder, model, its config)."""
    made = {}
    for kind, spec in KINDS:
        run = tmp_path_factory.mktemp("run")
        config = config_of(spec)
        model = model_of(kind, config).eval()
        (run / "checkpoint-000003").mkdir()
        save_unet(run / "checkpoint-000003", model, config)
        made[kind, spec] = run, model, config
    return made


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vae")
    torch.manual_seed(0)
    AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2, layers_per_block=1, norm_num_groups=4, latent_channels=2,
    ).save_pretrained(folder)  # fmt: skip
    return folder


@pytest.mark.parametrize(("kind", "spec"), KINDS)
@torch.no_grad()
def test_diffusers_alone_loads_samples_and_decodes(saved, vae, kind, spec):
    run, ours, _ = saved[kind, spec]
    folder = run / "checkpoint-000003"
    unet = CLASSES[kind].from_pretrained(folder / "unet").eval()
    solver = DDPMScheduler.from_pretrained(folder)
    source = json.loads((folder / "vae_source.json").read_text())
    assert solver.config.clip_sample is False
    extra, vector = {}, None
    if spec != "none":
        # Temperature 2.5 is known, wind is missing: standardised | present | dropped, from what the file says.
        mean, std = source["conditions"]["mean"], source["conditions"]["std"]
        vector = torch.tensor([[(2.5 - mean[0]) / std[0], 0, 0, 0, 1, 0, 0]] * 2)
        extra["class_labels"] = vector
        if kind == "UNet2DModel":
            state = load_file(folder / "unet" / "condition_projection.safetensors")
            projection = TimestepEmbedding(7, 32)
            projection.load_state_dict(state)
            extra["class_labels"] = projection(vector)
    if kind == "UNet2DConditionModel":
        extra["encoder_hidden_states"] = torch.randn(2, 3, 1280)  # nothing reads it
    x = torch.randn(2, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    solver.set_timesteps(50)
    assert solver.timesteps[0] == 999
    for t in solver.timesteps:
        predicted = unet(x, t, **extra).sample
        if t == 999:
            # The same weights and inputs, only the text differs. Roundings: memory is aligned otherwise.
            torch.testing.assert_close(predicted, ours(x, torch.full((2,), 999), vector), rtol=0, atol=1e-5)
        x = solver.step(predicted, t, x, generator=torch.Generator().manual_seed(int(t))).prev_sample
    raw = x * torch.tensor(source["latents_std"])[:, None, None] + torch.tensor(source["latents_mean"])[:, None, None]
    images = AutoencoderKL.from_pretrained(vae).decode(raw).sample
    assert images.shape == (2, 3, 8, 8) and images.isfinite().all()


@pytest.mark.parametrize(("kind", "spec"), KINDS)
def test_what_is_saved_loads_again(saved, kind, spec):
    run, ours, config = saved[kind, spec]
    model, read = load_unet(run)
    assert read == config
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), ours.state_dict().values(), strict=True))
    assert parse_conditions(json.loads((find_unet(run) / "vae_source.json").read_text())["condition_spec"]) == (
        config.conditions
    )


@pytest.mark.parametrize("kind", CLASSES)
@torch.no_grad()
def test_missing_zero_and_dropped_are_three_things(saved, kind):
    run, _, config = saved[kind, SPEC]
    model, _ = load_unet(run, dtype=torch.float64)
    values = torch.tensor([[0.0] * 4, [0.0] * 4, [0.0] * 4, [7.0] * 4, [7.0] * 4, [math.nan] * 4], dtype=torch.float64)
    present = torch.tensor([[1, 1], [0, 0], [1, 1], [0, 0], [1, 1], [0, 0]])
    dropped = torch.tensor([0, 0, 1, 0, 1, 0])
    vector = ConditionVectors(config)(values, present, dropped)
    x = torch.randn(1, 2, 4, 4, dtype=torch.float64).expand(6, -1, -1, -1)
    assert torch.equal(vector[1], vector[3]) and torch.equal(vector[1], vector[5]) and torch.equal(vector[2], vector[4])
    zero, missing, null, missing_7, null_7, missing_nan = model(x, torch.full((6,), 500), vector)
    for a, b in ((missing, missing_7), (missing, missing_nan), (null, null_7)):
        assert (a - b).abs().max() < 1e-12  # matrix products round by the place in the batch
    for a, b in ((zero, missing), (zero, null), (missing, null)):
        assert (a - b).abs().max() > 1e-3


def test_the_vector_is_standardised_values_then_presence_then_dropped():
    config = config_of("a:2,b:1,c:1")
    random = np.random.default_rng(0)
    values, present = random.normal(size=(5, 4)), random.integers(0, 2, (5, 3))
    dropped = np.array([0, 1, 0, 0, 1])
    expected = []
    for row, here, gone in zip(values, present, dropped, strict=True):
        known, at = [], 0
        for name, count in enumerate((2, 1, 1)):
            for _ in range(count):
                z = (row[at] - config.condition_mean[at]) / config.condition_std[at]
                known.append(z if here[name] and not gone else 0.0)
                at += 1
        expected.append([*known, *(0.0 if gone else float(one) for one in here), float(gone)])
    got = ConditionVectors(config)(torch.tensor(values), torch.tensor(present), torch.tensor(dropped))
    assert got.dtype == torch.float64 and got.shape == (5, config.vector_width)
    np.testing.assert_allclose(got.numpy(), expected, rtol=0, atol=1e-15)
    single = ConditionVectors(config)(torch.tensor(values).float(), torch.tensor(present).bool(), torch.tensor(dropped))
    assert single.dtype == torch.float32


@pytest.mark.parametrize("name", BETA_SCHEDULES)
def test_the_saved_scheduler_has_our_schedule(tmp_path, name):
    scheduler(config_of(beta_schedule=name, prediction_type="v_prediction")).save_config(tmp_path)
    read = DDPMScheduler.from_pretrained(tmp_path)
    # float32 in diffusers: rounding of up to 1000 factors.
    torch.testing.assert_close(read.alphas_cumprod.double(), alphas_cumprod(name), rtol=2e-4, atol=1e-6)
    betas = 1 - alphas_cumprod(name) / torch.cat([torch.ones(1), alphas_cumprod(name)[:-1]])
    torch.testing.assert_close(read.betas.double(), betas, rtol=0, atol=1e-6)
    assert read.config.prediction_type == "v_prediction" and read.config.timestep_spacing == "trailing"


def test_scalar_normalisation_is_also_written_as_diffusers_calls_it(tmp_path):
    config = config_of(latents_mean=[0.5, 0.5], latents_std=[4.0, 4.0])
    save_unet(tmp_path, model_of("UNet2DModel", config), config)
    source = json.loads((tmp_path / "vae_source.json").read_text())
    assert (source["scaling_factor"], source["shift_factor"], source["vae_path"]) == (0.25, 0.5, "/data/vae")


@pytest.mark.parametrize("kind", CLASSES)
def test_every_weight_gets_a_gradient(kind):
    # DDP waits for all of them.
    config = config_of()
    model = model_of(kind, config)
    vector = torch.randn(2, config.vector_width)
    model(torch.randn(2, 2, 4, 4), torch.tensor([0, 999]), vector).square().mean().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_conditions_are_required_and_refused(saved):
    x, t = torch.zeros(1, 2, 4, 4), torch.zeros(1).long()
    with pytest.raises(ValueError, match="expected a condition vector of 7 numbers, got none"):
        saved["UNet2DModel", SPEC][1](x, t)
    with pytest.raises(ValueError, match=r"expected no conditions, got \[1, 7\]"):
        saved["UNet2DModel", "none"][1](x, t, torch.zeros(1, 7))


def test_bad_sizes():
    config = config_of()
    with pytest.raises(ValueError, match="multiples of --norm-groups 4 and of 8 .*, got 12"):
        model_of("UNet2DModel", config, widths=(8, 12))
    with pytest.raises(ValueError, match="3 levels halve the side 2 times.* multiple of 4; got 6.* gives 4 or 8"):
        check_side({"block_out_channels": (8, 8, 8)}, 6)
    with pytest.raises(ValueError, match="UNet2DModel cannot be built with these sizes: .*depht"):
        ConditionalUNet("UNet2DModel", {"depht": 3}, 0)
    for change in ({"condition_std": [1.0, 0.0, 1.0, 1.0]}, {"latents_mean": [0.0]}, {"prediction_type": "flow"}):
        with pytest.raises(ValueError, match=next(iter(change))):
            config_of(**change)


def test_damaged_checkpoints(tmp_path):
    config = config_of()
    model = model_of("UNet2DModel", config)
    with pytest.raises(ValueError, match="does not exist"):
        load_unet(tmp_path / "nowhere")
    save_unet(tmp_path, model, config)
    weights, source = tmp_path / "unet" / "diffusion_pytorch_model.safetensors", tmp_path / "vae_source.json"
    good, text = load_file(weights), source.read_text()
    good = {name: tensor.clone() for name, tensor in good.items()}
    save_file({name: tensor for name, tensor in good.items() if name != "conv_in.bias"}, weights)
    with pytest.raises(ValueError, match=r"lacks 'unet\.conv_in\.bias'"):
        load_unet(tmp_path)
    save_file({**good, "conv_in.bias": torch.zeros(3)}, weights)
    with pytest.raises(ValueError, match=r"conv_in\.bias has shape \[3\] .* gives \[8\]"):
        load_unet(tmp_path)
    weights.write_bytes(b"torn")
    with pytest.raises(ValueError, match="does not load"):
        load_unet(tmp_path)
    save_file(good, weights)
    for wrong, message in (("{", "does not describe"), ("{}", "lacks 'vae'"), (text.replace(":3", ":x"), "not name")):
        source.write_text(wrong)
        with pytest.raises(ValueError, match=message):
            load_unet(tmp_path)
    source.write_text(text)
    load_unet(tmp_path)
