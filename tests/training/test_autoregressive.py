"""Next-token diffusion: its loss against formulas written down again in float64, with the same draws; its batches."""

import math
from types import SimpleNamespace

import plain_latentlm
import pytest
import torch

from fastlatent.diffusion.noise import Draws
from fastlatent.models.checkpoint import CheckpointConfig, load_checkpoint
from fastlatent.models.transformer import Block, Transformer
from fastlatent.training.autoregressive import NextTokenLoss, NextTokenObjective

TOKENS, CHANNELS, NULL = 9, 2, 3


def config(prediction_type="v_prediction"):
    return CheckpointConfig(
        hidden_size=64, depth=1, num_heads=2, num_kv_heads=1, mlp_ratio=2.0, diffusion_depth=1, in_channels=CHANNELS,
        input_size=3, num_classes=NULL, prediction_type=prediction_type, latents_mean=[0.5, -0.25],
        latents_std=[2.0, 0.5],
    )  # fmt: skip


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = Transformer(config()).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15)  # zero modulations would hide errors in them
    return model


def batches(rows=4):
    """A stub of LatentBatches: the samples of step s have the keys 100 + rows·s and so on, whatever shares them."""

    def batch(step, share=slice(None)):
        ids = torch.arange(100 + rows * step, 100 + rows * (step + 1))[share]
        draws = Draws(ids, 7, epoch=step // 2)
        return {"latents": draws.normal("stub", (CHANNELS, 3, 3)), "draws": draws, "label": ids % NULL}

    return SimpleNamespace(batch=batch, steps_per_epoch=2)


def objective(model, prediction_type="v_prediction", *, batch_mul=2, flow_times="uniform", dropout=0.3, source=None):
    loss = NextTokenLoss(model, prediction_type=prediction_type, beta_schedule="cosine")
    return NextTokenObjective(
        source or batches(), loss, config(prediction_type), batch_mul=batch_mul, flow_times=flow_times,
        class_dropout_prob=dropout,
    )  # fmt: skip


def plain_loss(model, batch, prediction_type):
    state, sizes = model.state_dict(), vars(model.config)
    latents, noise, times = batch["latents"].double(), batch["noise"].double(), batch["t"]
    # The backbone sees the clean tokens before each one.
    conditions = plain_latentlm.conditions(state, sizes, latents[:, :-1], batch["label"])
    alphas_cumprod = plain_latentlm.cosine_alphas_cumprod()
    errors = []
    for row in range(len(latents)):
        for copy in range(noise.shape[1]):
            for n in range(TOKENS):
                clean, e, time = latents[row, n], noise[row, copy, n], times[row, copy, n].item()
                if prediction_type == "flow":
                    alpha, sigma, t_model = 1 - time, time, 1000 * time
                    wanted = e - clean
                else:
                    alpha, sigma = math.sqrt(alphas_cumprod[time]), math.sqrt(1 - alphas_cumprod[time])
                    t_model, wanted = time, (e if prediction_type == "epsilon" else alpha * e - sigma * clean)
                x = (alpha * clean + sigma * e)[None]
                got = plain_latentlm.head(state, sizes, x, t_model, conditions[row, n][None])[0]
                errors.append(float((got - wanted).square().mean()))
    return sum(errors) / len(errors)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "flow"])
@pytest.mark.parametrize("batch_mul", [1, 3])
def test_the_loss_is_its_formula(model, prediction_type, batch_mul):
    made = objective(model, prediction_type, batch_mul=batch_mul)
    batch = made.batch(1)
    got, metrics = made.module(batch)
    assert metrics == {} and got.dtype == torch.float64
    assert float(got.detach()) == pytest.approx(plain_loss(model, batch, prediction_type), rel=1e-10)


def test_copies_are_copies(model, monkeypatch):
    """batch_mul = M is what M runs over the same samples with their noise would average to; the backbone runs once."""
    rows = []
    original = Transformer.condition
    monkeypatch.setattr(Transformer, "condition", lambda self, x, y: rows.append(len(x)) or original(self, x, y))
    made = objective(model, batch_mul=4)
    batch = made.batch(0)
    together = made.module(batch)[0].item()
    assert rows == [4]
    apart = [
        (made.module(batch | {"t": batch["t"][:, [m]], "noise": batch["noise"][:, [m]]})[0].item()) for m in range(4)
    ]
    assert together == pytest.approx(sum(apart) / 4, rel=1e-12) and len(set(apart)) == 4


def test_shares_and_parts_of_a_batch_are_the_batch(model):
    """What 2 processes draw is what 1 draws; the losses of equal parts average to the loss of the whole."""
    whole = objective(model).batch(3)
    parts = []
    for share in (slice(0, 4, 2), slice(1, 4, 2)):
        source = batches()
        source.batch = lambda step, original=source.batch, share=share: original(step, share)
        parts.append(objective(model, source=source).batch(3))
    for name, values in whole.items():
        assert torch.equal(torch.stack([p[name] for p in parts], 1).flatten(0, 1), values), name
        assert len(values) == 4
    loss = objective(model).module
    assert loss(whole)[0].item() == pytest.approx(sum(loss(part)[0].item() for part in parts) / 2, rel=1e-12)


def test_draws_change_with_the_epoch_only(model):
    source = batches()
    source.batch = lambda step: {**batches().batch(0), "draws": Draws(torch.arange(100, 104), 7, step // 2)}
    made = objective(model, source=source)
    first, again, next_epoch = (made.batch(step) for step in (0, 1, 2))
    for name in ("t", "noise"):
        assert torch.equal(first[name], again[name])
        assert not torch.equal(first[name], next_epoch[name])


def test_draws_have_their_distributions(model):
    for prediction_type, flow_times in (("epsilon", "uniform"), ("flow", "uniform"), ("flow", "logit_normal")):
        made = objective(model, prediction_type, batch_mul=4, flow_times=flow_times, source=batches(400))
        batch = made.batch(0)
        t, noise = batch["t"], batch["noise"]
        assert t.shape == (400, 4, TOKENS) and noise.shape == (400, 4, TOKENS, CHANNELS)
        count = t.numel()
        assert abs(float(noise.mean())) < 5 / math.sqrt(noise.numel())
        assert abs(float(noise.var()) - 1) < 5 * math.sqrt(2 / noise.numel())
        if prediction_type == "epsilon":
            assert t.dtype == torch.int64 and int(t.min()) == 0 and int(t.max()) == 999
            assert abs(float(t.double().mean()) - 499.5) < 5 * 1000 / math.sqrt(12 * count)
        elif flow_times == "uniform":
            assert float(t.min()) > 0 and float(t.max()) < 1
            assert abs(float(t.mean()) - 0.5) < 5 / math.sqrt(12 * count)
            assert abs(float(t.square().mean()) - 1 / 3) < 5 * math.sqrt(4 / 45 / count)
        else:
            # The logit is standard normal; the density at 1/2 is 4·φ(0), 1.6 times the uniform one.
            logit = (t / (1 - t)).log()
            assert abs(float(logit.mean())) < 5 / math.sqrt(count)
            assert abs(float(logit.var()) - 1) < 5 * math.sqrt(2 / count)
            middle = ((t > 0.45) & (t < 0.55)).double().mean()
            share = math.erf(math.log(0.55 / 0.45) / math.sqrt(2))
            assert abs(float(middle) - share) < 5 * math.sqrt(share / count)
        assert not torch.equal(t[:, 0], t[:, 1])


@pytest.mark.parametrize("dropout", [0.0, 0.5, 1.0])
def test_labels_are_dropped(model, dropout):
    batch = objective(model, dropout=dropout, source=batches(600)).batch(0)
    dropped = batch["label"] == NULL
    assert torch.equal(batch["label"][~dropped], (torch.arange(100, 700) % NULL)[~dropped])
    assert abs(float(dropped.double().mean()) - dropout) <= 5 * 0.5 / math.sqrt(600) * (0 < dropout < 1)


def test_every_weight_of_the_model_learns(model):
    made = objective(model, source=batches(8), dropout=0.5)
    model.zero_grad()
    made.module(made.batch(0))[0].backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_half_inside_float32_outside():
    """Under autocast matrices are half, the loss is not; bfloat16 weights get a float32 loss too."""
    torch.manual_seed(0)
    made = objective(Transformer(config()))
    for parameter in made.module.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    want = made.module(made.batch(0))[0]
    seen = set()
    for name, layer in made.module.named_modules():
        if isinstance(layer, torch.nn.Linear | Block):
            layer.register_forward_hook(lambda _, x, y, name=name: seen.add((name, y.dtype)))
    with torch.autocast("cpu", torch.bfloat16):
        loss = made.module(made.batch(0))[0]
    linear = {dtype for name, dtype in seen if name != "model.blocks.0"}
    assert linear == {torch.bfloat16} and loss.dtype == torch.float32
    assert loss.item() == pytest.approx(want.item(), rel=0.05)
    made.module.model.bfloat16()
    loss = made.module(made.batch(0))[0]
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(want.item(), rel=0.05)


def test_a_saved_checkpoint_loads(model, tmp_path):
    made = objective(model)
    weights = {name: p.detach().float() for name, p in made.module.named_parameters()}
    assert made.save(tmp_path, weights, hurried=False) == {}
    loaded, read = load_checkpoint(tmp_path, torch.float32, "cpu")
    assert read == made.config
    assert all(torch.equal(tensor, weights[f"model.{name}"]) for name, tensor in loaded.state_dict().items())
