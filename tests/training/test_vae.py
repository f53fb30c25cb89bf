"""The autoencoders' loss against formulas written down again in float64, and what a checkpoint holds."""

import copy
import json
import math
from types import SimpleNamespace

import numpy as np
import plain_ldm_autoencoder
import plain_sigma_vae
import pytest
import torch
from diffusers import AutoencoderKL
from torch import nn

from fastlatent.diffusion.noise import Draws
from fastlatent.encoders.ldm_keys import from_ldm
from fastlatent.encoders.load import load_autoencoder
from fastlatent.encoders.sigma_vae import FILE as SIGMA_FILE
from fastlatent.evaluation.reconstruction import psnr
from fastlatent.training.vae import FixedImages, VaeLoss, VaeObjective, VaeWeights
from fastlatent.training.vae_networks import KlNetwork, SigmaNetwork, new_kl, new_kl16, new_sigma

SIDE = 24  # the smallest that the discriminator takes
ALL = VaeWeights(mse=1.0, l1=0.5, lpips=0.7, kl=0.25, kl_reduction="sum", adversarial=0.8)


def kl_network(side=SIDE, channels=3):
    torch.manual_seed(0)
    sizes = {"latent_channels": 2, "block_out_channels": (4, 8), "layers_per_block": 1, "norm_groups": 4}
    return new_kl(size=side, channels=channels, **sizes)


def sigma_network():
    torch.manual_seed(0)
    return new_sigma(8, 3, 5, patch=4, width=64, depth=2, hidden=96)


class TinyLPIPS(nn.Module):
    """Stands for VGG16's: a frozen weight, a distance per image."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.3), requires_grad=False)

    def forward(self, images, references):
        return self.weight * (images - references).pow(4).flatten(1).sum(1)


def batch_of(network, count=4, adversarial=False, seed=1):
    generator = torch.Generator().manual_seed(seed)
    side = network.size
    return {
        "pixels": torch.rand(count, network.channels, side, side, generator=generator) * 2 - 1,
        "noise": torch.randn(count, *network.latent_shape, generator=generator),
        "sigma": torch.randn(count, generator=generator),
        "adversarial": adversarial,
    }


def full_loss(network, weights=ALL):
    return VaeLoss(network, weights, TinyLPIPS() if weights.lpips else None)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_every_term_before_the_adversary(reduction):
    loss = full_loss(kl_network(), VaeWeights(1.0, 0.5, 0.7, 0.25, reduction)).double()
    batch = batch_of(loss.network)
    value, metrics = loss(batch)
    model, x, noise = loss.network.model, batch["pixels"].double(), batch["noise"].double()
    with torch.no_grad():
        mean, logvar = model.quant_conv(model.encoder(x)).chunk(2, 1)
        error = model.decoder(model.post_quant_conv(mean + torch.exp(logvar / 2) * noise)) - x
        posterior = torch.distributions.Normal(mean, torch.exp(logvar / 2))
        divergence = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0))
        want = {
            "mse": float(error.pow(2).sum()) / error.numel(),
            "l1": float(error.abs().sum()) / error.numel(),
            "lpips": float((0.3 * error.pow(4)).sum()) / 4,
            "kl": float(divergence.sum()) / (divergence.numel() if reduction == "mean" else 4),
        }
    for name, one in want.items():
        # LPIPS' weight is 0.3 in float32
        assert float(metrics[name]) == pytest.approx(one, rel=1e-7), name
        assert not metrics[name].requires_grad
    total = want["mse"] + 0.5 * want["l1"] + 0.7 * want["lpips"] + 0.25 * want["kl"]
    assert value.dtype == torch.float64
    assert float(value.detach()) == pytest.approx(total, rel=1e-7)


def test_the_units_of_the_kl_weight():
    # Latent diffusion: (sum of the error's values + 1e-6 · sum of the KL's) / images. 256² RGB, latents 4×32×32.
    pixels, latent = 3 * 256**2, 4 * 32**2
    for reduction, expected in (("mean", 2.1e-8), ("sum", 5.1e-12)):
        weights = VaeWeights(kl=1.0, kl_reduction=reduction)
        here = 1e-6 / weights.ldm_unit(pixels, latent)
        assert here == pytest.approx(expected, rel=0.02)
        error, kl = torch.rand(pixels, dtype=torch.float64), torch.rand(latent, dtype=torch.float64)
        theirs = float(error.sum() + 1e-6 * kl.sum())
        ours = float(error.mean() + here * (kl.mean() if reduction == "mean" else kl.sum()))
        assert ours * pixels == pytest.approx(theirs, rel=1e-12)


def test_log_variances_are_clamped():
    network = kl_network()
    with torch.no_grad():
        network.model.quant_conv.bias[2:] = torch.tensor([-1e4, 1e4])
        network.model.quant_conv.weight[2:] = 0
    _, logvar = network.encode(batch_of(network)["pixels"])
    assert logvar[:, 0].unique().tolist() == [-30]
    assert logvar[:, 1].unique().tolist() == [20]


def test_the_game():
    loss = full_loss(kl_network()).double()
    batch = batch_of(loss.network, adversarial=True)
    value, metrics = loss(batch)
    value.backward()
    model, critic, x = copy.deepcopy(loss.network.model), copy.deepcopy(loss.discriminator), batch["pixels"].double()
    for one in (model, critic):
        one.zero_grad()
    posterior = model.encode(x).latent_dist
    again = model.decode(posterior.mean + posterior.std * batch["noise"].double()).sample
    error = again - x
    nll = error.pow(2).mean() + 0.5 * error.abs().mean() + 0.7 * loss._lpips[0](again, x).mean()
    kl = torch.distributions.kl_divergence(
        torch.distributions.Normal(posterior.mean, posterior.std), torch.distributions.Normal(0.0, 1.0)
    )
    fooled = -critic(again).mean()
    last = model.decoder.conv_out.weight
    (a,), (b,) = (torch.autograd.grad(one, last, retain_graph=True) for one in (nll, fooled))
    factor = min(max(float(a.norm() / (b.norm() + 1e-4)), 0), 1e4) * 0.8
    assert float(metrics["adaptive_weight"]) == pytest.approx(factor, rel=1e-10)
    # The autoencoder's step, then the critic's, as two losses that know nothing of each other.
    mine = nll + 0.25 * kl.sum((1, 2, 3)).mean() + factor * fooled
    mine.backward()
    for (name, got), want in zip(loss.model.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(got.grad, want.grad, rtol=1e-9, atol=1e-12, msg=name)
    critic.zero_grad()
    theirs = 0.5 * ((1 - critic(x)).clamp(min=0).mean() + (1 + critic(again.detach())).clamp(min=0).mean())
    theirs.backward()
    for (name, got), want in zip(loss.discriminator.named_parameters(), critic.parameters(), strict=True):
        torch.testing.assert_close(got.grad, want.grad, rtol=1e-9, atol=1e-12, msg=name)
    assert float(value.detach()) == pytest.approx(float((mine + theirs).detach()), rel=1e-10)
    assert float(metrics["discriminator"]) == pytest.approx(float(theirs.detach()), rel=1e-10)


@pytest.mark.parametrize("adversarial", [False, True])
def test_what_is_compiled_keeps_its_shapes(monkeypatch, adversarial):
    compiled = []
    monkeypatch.setattr(nn.Module, "compile", lambda self, **options: compiled.append((self, options)))
    objective = objective_of(kl_network(), ALL_BUT_LPIPS if adversarial else None)
    objective.compile()
    assert all(options == {"dynamic": False} for _, options in compiled)
    # The gradient of the last layer's weight is taken alone: with it inside, the whole backward pass would run.
    last = objective.loss.network.last
    assert any(last is inner for part, _ in compiled for inner in part.modules()) != adversarial
    assert {id(part) for part, _ in compiled} >= {id(objective.loss.model.encoder)}


def test_before_the_game_the_critic_has_gradients_of_zero():
    loss = full_loss(kl_network())
    value, metrics = loss(batch_of(loss.network))
    value.backward()
    assert all(p.grad is not None and not p.grad.any() for p in loss.discriminator.parameters())
    assert metrics.keys() == loss(batch_of(loss.network, adversarial=True))[1].keys()
    assert float(metrics["discriminator"]) == float(metrics["adaptive_weight"]) == 0


def test_lpips_is_moved_and_nothing_else():
    loss = full_loss(kl_network())
    names = [name for name, _ in loss.named_parameters()]
    assert {name.split(".")[0] for name in names} == {"model", "discriminator"}
    assert not any(name.startswith("_lpips") for name in loss.state_dict())
    loss.double()
    assert loss._lpips[0].weight.dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_computes_losses_in_float32(dtype):
    loss = full_loss(kl_network())
    batch = batch_of(loss.network, adversarial=True)
    want, exact = loss(batch)
    with torch.autocast("cpu", dtype):
        value, metrics = loss(batch)
    assert {one.dtype for one in (value, *metrics.values())} == {torch.float32}
    assert float(value.detach()) == pytest.approx(float(want.detach()), rel=0.05)
    assert float(metrics["kl"]) == pytest.approx(float(exact["kl"]), rel=0.05)
    value.backward()
    assert all(p.grad.isfinite().all() for p in loss.parameters())


def test_the_sigma_vae():
    loss = VaeLoss(sigma_network(), VaeWeights(mse=1.0, kl=0.01)).double()
    batch = batch_of(loss.network)
    value, metrics = loss(batch)
    weights, x = dict(loss.network.model.named_parameters()), batch["pixels"].double()
    with torch.no_grad():
        mean = plain_sigma_vae.encode(weights, x, 4)
        # One σ for each image, ~ N(0, std/0.8) with std 0.75.
        spread = torch.stack([s * 0.9375 * e for s, e in zip(batch["sigma"], batch["noise"], strict=True)])
        again = plain_sigma_vae.decode(weights, mean + spread.double(), 4)
        mse, square = (again - x).pow(2).mean(), mean.pow(2).mean()
    assert float(metrics["kl"]) == pytest.approx(float(square), rel=1e-10)
    assert float(value.detach()) == pytest.approx(float(mse + 0.01 * square), rel=1e-6)
    value.backward()
    for name, parameter in loss.named_parameters():
        # The mask token is a relic; a bias of the keys moves no attention.
        reached = parameter.grad is not None and bool(parameter.grad.abs().sum() > 0)
        assert reached or name.endswith("mask_token"), name


def test_gradient_checkpointing_changes_no_gradient():
    for make in (kl_network, sigma_network):
        found = []
        for again in (False, True):
            loss = VaeLoss(make(), VaeWeights(mse=1.0)).double().train()
            if again:
                loss.network.checkpoint_gradients()
            loss(batch_of(loss.network))[0].backward()
            found.append([p.grad for p in loss.parameters() if p.grad is not None])
        torch.testing.assert_close(*found)


def test_kl16_is_the_published_network():
    published = plain_ldm_autoencoder.random_weights(0, 32, (1, 1, 2), 2, 3, encoder_attention=(2,))
    config, state = from_ldm(published)
    network = new_kl16(8, 3, latent_channels=3, block_out_channels=(32, 32, 64))
    mine = {name: tensor.shape for name, tensor in network.model.state_dict().items()}
    assert mine == {name: tensor.shape for name, tensor in state.items()}
    for name, value in config.items():
        assert tuple(np.ravel(network.model.config[name])) == tuple(np.ravel(value)), name
    with torch.device("meta"):
        whole = new_kl16(256, 3)
    assert whole.latent_shape == (16, 16, 16)
    assert whole.model.config.block_out_channels == (128, 128, 256, 256, 512)


# --- checkpoints ---


class Images:
    """Stands for the loader of files."""

    steps_per_epoch = 5

    def __init__(self, count, side, channels=3):
        self.source = SimpleNamespace(items=range(count))
        self.left_out = {"a.png": "is empty"}
        generator = torch.Generator().manual_seed(7)
        self.pixels = torch.rand(count, channels, side, side, generator=generator) * 2 - 1

    def samples(self, indices, epoch=0):
        return {"pixels": self.pixels[indices], "key_hash": torch.from_numpy(indices) + 100, "epoch": epoch}

    def batch(self, step):
        return self.samples((np.arange(4) + step) % 10, step // 5)


def objective_of(network, weights=None, measured=7, validation=5):
    loader = Images(10, network.size)
    return VaeObjective(
        loader, VaeLoss(network, weights or VaeWeights(mse=1.0)), measured=FixedImages(loader, measured, 3),
        shown=FixedImages(loader, 4, 3), validation=FixedImages(loader, validation, 2) if validation else None, seed=5,
        device=torch.device("cpu"), disc_learning_rate=0.5, disc_start=3,
    )  # fmt: skip


def saved(objective, folder):
    weights = {name: p.detach().clone() for name, p in objective.module.named_parameters()}
    return weights, objective.save(folder, weights, hurried=False)


def test_batches():
    objective = objective_of(kl_network(), ALL_BUT_LPIPS)
    batch = objective.batch(2)
    draws = Draws(torch.arange(4) + 102, 5, 0)
    assert torch.equal(batch["noise"], draws.normal("posterior", (2, SIDE // 2, SIDE // 2)))
    assert torch.equal(batch["sigma"], draws.normal("sigma", ()))
    assert [objective.batch(step)["adversarial"] for step in (2, 3)] == [False, True]
    (part,) = objective.parts
    assert (part.prefix, part.learning_rate, part.begin) == ("discriminator.", 0.5, 3)
    quiet = objective_of(kl_network())
    assert quiet.parts == ()
    assert not quiet.batch(9)["adversarial"]
    assert quiet.steps_per_epoch == 5
    assert quiet.left_out() == {"a.png": "is empty"}
    assert quiet.blocks == ()  # --fsdp is refused


ALL_BUT_LPIPS = VaeWeights(mse=1.0, adversarial=0.5)


def test_fixed_images_are_evenly_spaced():
    loader = Images(10, 8)
    batches = [batch["key_hash"].tolist() for batch in FixedImages(loader, 4, 3)]
    assert batches == [[100, 102, 105], [107]]
    assert FixedImages(loader, 99, 4).count == 10


def test_a_checkpoint_holds_the_autoencoder_and_its_statistics(tmp_path):
    objective = objective_of(kl_network(), ALL_BUT_LPIPS)
    weights, measured = saved(objective, tmp_path)
    model, info = AutoencoderKL.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, weights[f"model.{name}"])
    # The same latents again, one image after the other, in float64.
    draws, latents = Draws(torch.arange(7) * 10 // 7 + 100, 5, 0), []
    noise = draws.normal("posterior", objective.loss.network.latent_shape)
    with torch.no_grad():
        for i, e in zip(range(7), noise, strict=True):
            posterior = model.encode(objective.loader.pixels[i * 10 // 7][None]).latent_dist
            latents.append((posterior.mean + posterior.std * e).double())
    values = torch.cat(latents)
    config = model.config
    assert config.scaling_factor == pytest.approx(1 / float(values.std(correction=0)), rel=1e-5)
    assert config.shift_factor == pytest.approx(float(values.mean()), rel=1e-4)
    assert config.latents_mean == pytest.approx(values.mean((0, 2, 3)).tolist(), rel=1e-4)
    assert config.latents_std == pytest.approx(values.std((0, 2, 3), correction=0).tolist(), rel=1e-5)
    kept = json.loads((tmp_path / "latent_statistics.json").read_text())
    assert kept == {"count": 7, **{name: config[name] for name in kept.keys() - {"count"}}}
    assert kept.keys() == {"count", "scaling_factor", "shift_factor", "latents_mean", "latents_std"}
    # PSNR on floats, images 0, 2, 4, 6, 8
    pixels = objective.loader.pixels[::2]
    with torch.no_grad():
        again = model(pixels).sample.clamp(-1, 1)
    assert measured["psnr"] == pytest.approx(float(psnr(again, pixels, data_range=2.0).mean()), rel=1e-5)
    kept = json.loads((tmp_path / "validation.json").read_text())
    assert kept == {"images": 5, **measured}
    assert kept.keys() == {"images", "psnr", "ssim"}
    assert (tmp_path / "preview.png").exists()
    assert load_autoencoder(tmp_path).latent_channels == 2


@pytest.mark.parametrize("make", [kl_network, sigma_network])
def test_a_hurried_checkpoint_has_the_statistics_of_the_last(tmp_path, make):
    objective = objective_of(make())
    weights = {name: p.detach() for name, p in objective.module.named_parameters()}
    for name in ("first", "measured", "second"):
        (tmp_path / name).mkdir()
        assert bool(objective.save(tmp_path / name, weights, hurried=name != "measured")) == (name == "measured")
    found = {name: {path.name for path in (tmp_path / name).iterdir()} for name in ("first", "measured", "second")}
    assert found["second"] == found["first"] | {"latent_statistics.json"}
    assert found["measured"] == found["second"] | {"preview.png", "validation.json"}
    measured, second = ((tmp_path / name / "latent_statistics.json").read_text() for name in ("measured", "second"))
    assert measured == second
    if make is kl_network:
        first, second = (AutoencoderKL.load_config(tmp_path / name) for name in ("first", "second"))
        assert (first["scaling_factor"], first["latents_mean"]) == (1.0, None)
        assert second["scaling_factor"] == json.loads(measured)["scaling_factor"]
    else:
        first, second = (
            torch.load(tmp_path / name / SIGMA_FILE, weights_only=True)["config"] for name in ("first", "second")
        )
        assert second == first | {k: v for k, v in json.loads(measured).items() if k != "count"}
        # The statistics of what training began with are not those of these weights.
        again = objective_of(SigmaNetwork(objective.loss.network.model, second))
        (tmp_path / "third").mkdir()
        again.save(tmp_path / "third", weights, hurried=True)
        assert torch.load(tmp_path / "third" / SIGMA_FILE, weights_only=True)["config"] == first


def test_small_images_have_no_ssim(tmp_path):
    # SSIM's window is 11 pixels wide.
    assert saved(objective_of(kl_network(side=8)), tmp_path)[1].keys() == {"psnr"}
    objective = objective_of(kl_network(side=8), validation=0)
    assert saved(objective, tmp_path)[1] == {}


def test_errors_below_an_8_bit_step_count(tmp_path):
    """A reconstruction that is wrong by a quarter of an 8-bit step is 20·log10(2/(2/255/4)) = 60.2 dB, not perfect."""

    class Nearly(KlNetwork):
        def encode(self, pixels):
            return pixels, torch.zeros_like(pixels)

        def decode(self, latents):
            return latents * 0.99 + 2 / 255 / 4

        def copy(self, weights, device):
            return self

    network = Nearly(kl_network(side=8).model, 8)
    objective = objective_of(network, validation=1)
    objective.validation.loader.pixels = torch.zeros(10, 3, 8, 8)
    found = objective._validate(network, tmp_path / "v.json")
    assert found["psnr"] == pytest.approx(20 * math.log10(255 * 4), rel=1e-5)


def test_weights_of_a_run_that_diverges(tmp_path):
    objective = objective_of(kl_network(side=8))
    weights = {name: torch.full_like(p, math.nan) for name, p in objective.module.named_parameters()}
    assert objective.save(tmp_path, weights, hurried=False) == {}
    assert AutoencoderKL.load_config(tmp_path)["scaling_factor"] == 1.0
    assert json.loads((tmp_path / "validation.json").read_text())["psnr"] is None
    json.loads((tmp_path / "config.json").read_text(), parse_constant=pytest.fail)


def test_a_sigma_vae_is_saved_as_published(tmp_path):
    objective = objective_of(sigma_network())
    weights, measured = saved(objective, tmp_path)
    assert measured.keys() == {"psnr"}
    vae = load_autoencoder(tmp_path / SIGMA_FILE)
    assert (vae.fixed_size, vae.latent_channels, vae.downsample) == (8, 5, 4)
    pixels = objective.loader.pixels
    stored = {name.removeprefix("model."): w for name, w in weights.items()}
    want = plain_sigma_vae.encode(stored, pixels, 4)
    torch.testing.assert_close(vae.encode(pixels), want, rtol=1e-4, atol=1e-5)
    config = torch.load(tmp_path / SIGMA_FILE, weights_only=True)["config"]
    assert config["std"] == 0.75
    # A dataset holds means, and so do the statistics.
    chosen = want[torch.arange(7) * 10 // 7]
    assert config["latents_mean"] == pytest.approx(chosen.mean((0, 2, 3)).tolist(), rel=1e-3, abs=1e-5)
