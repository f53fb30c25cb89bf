"""Losses against formulas written down again in float64, with the same draws."""

import copy
import math

import plain_latentlm
import pytest
import torch

from fastlatent.data.latents import draw_latents
from fastlatent.models.checkpoint import load_checkpoint
from fastlatent.models.transformer import Transformer
from fastlatent.training.autoregressive import NextTokenLoss


@pytest.fixture(scope="module")
def model(make_config):
    torch.manual_seed(0)
    model = Transformer(make_config()).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15)  # zero modulations would hide errors in them
    return model


def draws(shape, batch_mul, prediction_type, seed):
    """Dropout uniforms, noise and times of one step, in the order in which the loss draws them."""
    generator = torch.Generator().manual_seed(seed)
    rows, tokens, channels = shape
    uniform = torch.rand(rows, generator=generator)
    noise = torch.randn(rows * batch_mul, tokens, channels, generator=generator)
    times = rows * batch_mul, tokens
    if prediction_type == "flow":
        return uniform, noise, torch.rand(times, generator=generator)
    return uniform, noise, torch.randint(1000, times, generator=generator)


def plain_loss(model, latents, labels, *, prediction_type, batch_mul, dropout, seed):
    state, sizes = model.state_dict(), vars(model.config)
    uniform, noise, t = draws(latents.shape, batch_mul, prediction_type, seed)
    labels = torch.tensor([3 if u < dropout else int(label) for u, label in zip(uniform, labels, strict=True)])
    # The backbone sees the clean tokens before each one.
    conditions = plain_latentlm.conditions(state, sizes, latents[:, :-1], labels)
    alphas_cumprod = plain_latentlm.cosine_alphas_cumprod()
    total = 0.0
    for one in range(len(noise)):
        row = one // batch_mul
        for n in range(latents.shape[1]):
            clean, e = latents[row, n], noise[one, n].double()
            if prediction_type == "flow":
                time = float(t[one, n])
                alpha, sigma, t_model = 1 - time, time, 1000 * time
                wanted = e - clean
            else:
                alpha_bar = alphas_cumprod[int(t[one, n])]
                alpha, sigma, t_model = math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar), int(t[one, n])
                wanted = e if prediction_type == "epsilon" else alpha * e - sigma * clean
            x = (alpha * clean + sigma * e)[None]
            got = plain_latentlm.head(state, sizes, x, t_model, conditions[row, n][None])[0]
            total += float((got - wanted).square().mean())
    return total / (len(noise) * latents.shape[1])


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "flow"])
@pytest.mark.parametrize("batch_mul", [1, 3])
@pytest.mark.parametrize("dropout", [0.0, 0.5, 1.0])
def test_next_token_loss(model, prediction_type, batch_mul, dropout):
    latents = torch.randn(4, 9, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    labels = torch.tensor([0, 2, 1, 2])
    loss = NextTokenLoss(
        model, prediction_type=prediction_type, beta_schedule="cosine", batch_mul=batch_mul, class_dropout_prob=dropout
    )
    got, metrics = loss((latents, labels), torch.Generator().manual_seed(7))
    want = plain_loss(
        model, latents, labels, prediction_type=prediction_type, batch_mul=batch_mul, dropout=dropout, seed=7
    )
    assert metrics == {}
    assert float(got.detach()) == pytest.approx(want, rel=2e-6)  # the squares are added in float32


@pytest.mark.parametrize("dropout", [0.0, 0.5, 1.0])
def test_label_dropout_reaches_the_backbone(model, dropout, monkeypatch):
    seen = []
    original = Transformer.condition
    monkeypatch.setattr(Transformer, "condition", lambda self, x, y: seen.append(y) or original(self, x, y))
    labels = torch.arange(3).repeat(200)
    loss = NextTokenLoss(model, prediction_type="flow", beta_schedule="cosine", batch_mul=1, class_dropout_prob=dropout)
    loss((torch.zeros(600, 9, 2, dtype=torch.float64), labels), torch.Generator().manual_seed(0))
    dropped = seen[0] == 3
    assert torch.equal(seen[0][~dropped], labels[~dropped])
    assert abs(float(dropped.double().mean()) - dropout) <= 5 * 0.5 / math.sqrt(600) * (0 < dropout < 1)


def test_the_backbone_runs_once_for_all_copies(model, monkeypatch):
    rows = []
    original = Transformer.condition
    monkeypatch.setattr(Transformer, "condition", lambda self, x, y: rows.append(len(x)) or original(self, x, y))
    loss = NextTokenLoss(model, prediction_type="flow", beta_schedule="cosine", batch_mul=4, class_dropout_prob=0)
    loss((torch.zeros(5, 9, 2, dtype=torch.float64), torch.zeros(5, dtype=torch.int64)), torch.Generator())
    assert rows == [5]


def test_every_weight_of_the_model_learns(model):
    loss = NextTokenLoss(model, prediction_type="flow", beta_schedule="cosine", batch_mul=1, class_dropout_prob=0.5)
    latents = torch.randn(8, 9, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    value, _ = loss((latents, torch.arange(8) % 3), torch.Generator().manual_seed(0))
    model.zero_grad()
    value.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_batches_are_normalised_draws(make_ar):
    objective = make_ar()
    for step in (0, 1, 5):
        latents, labels = objective.batch(step)
        batch = objective.loader.batch(step)
        raw = draw_latents(batch["moments"], batch["key_hash"], seed=5, epoch=step // 2).double()
        want = torch.stack([(raw[:, 0] - 0.5) / 2.0, (raw[:, 1] + 0.25) / 0.5], dim=-1).reshape(4, 9, 2)
        torch.testing.assert_close(latents.double(), want, rtol=1e-6, atol=1e-6)
        assert torch.equal(labels, batch["label"])


def test_a_saved_checkpoint_loads(make_ar, tmp_path):
    objective = make_ar()
    weights = {name: p.detach() for name, p in objective.module.named_parameters()}
    objective.save(tmp_path, weights)
    model, config = load_checkpoint(tmp_path, torch.float32, "cpu")
    assert config == objective.config
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, weights[f"model.{name}"])


# --- autoencoder ---


def test_reconstruction_loss(make_vae):
    objective = make_vae()
    loss, pixels = objective.module, objective.batch(0)
    value, metrics = loss(pixels, torch.Generator().manual_seed(3))
    with torch.no_grad():
        model, wide = copy.deepcopy(loss.model).double(), pixels.double()
        mean, logvar = model.quant_conv(model.encoder(wide)).chunk(2, dim=1)
        noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(3)).double()
        again = model.decoder(model.post_quant_conv(mean + torch.exp(0.5 * logvar) * noise))
        mse, l1 = ((again - wide) ** 2).mean(), (again - wide).abs().mean()
        # KL(N(m, s²) ‖ N(0, 1)) per latent value.
        kl = (torch.log(1 / torch.exp(logvar / 2)) + (torch.exp(logvar) + mean**2) / 2 - 0.5).mean()
    for name, want in (("mse", mse), ("l1", l1), ("kl", kl)):
        assert float(metrics[name]) == pytest.approx(float(want), rel=1e-5), name
        assert not metrics[name].requires_grad
    assert float(value.detach()) == pytest.approx(float(mse + 0.5 * l1 + 0.25 * kl), rel=1e-5)
    assert value.requires_grad


def test_kl_is_torchs(make_vae):
    objective = make_vae()
    pixels = objective.batch(1)
    _, metrics = objective.module(pixels, torch.Generator())
    with torch.no_grad():
        posterior = objective.module.model.encode(pixels).latent_dist
    want = torch.distributions.kl_divergence(
        torch.distributions.Normal(posterior.mean, posterior.std), torch.distributions.Normal(0.0, 1.0)
    ).mean()
    torch.testing.assert_close(metrics["kl"], want)


def test_a_saved_autoencoder_loads(make_vae, tmp_path):
    from fastlatent.encoders.load import load_autoencoder

    objective = make_vae()
    objective.save(tmp_path, {name: p.detach() for name, p in objective.module.named_parameters()})
    pixels = objective.batch(0)
    with torch.no_grad():
        posterior = objective.module.model.eval().encode(pixels).latent_dist
    got = load_autoencoder(tmp_path).encode(pixels)
    torch.testing.assert_close(got, torch.cat([posterior.mean, posterior.logvar], 1), rtol=1e-5, atol=1e-6)
    assert (tmp_path / "preview.png").exists()
