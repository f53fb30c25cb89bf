"""DiT: its loss against formulas written down again in float64, with the same draws; its batches."""

import dataclasses
import math
from types import SimpleNamespace

import plain_dit
import plain_latentlm
import pytest
import torch

from fastlatent.diffusion.noise import Draws
from fastlatent.models.checkpoint import DiTCheckpointConfig, load_checkpoint
from fastlatent.models.dit import DiT
from fastlatent.training.dit import DitLoss, DitObjective

NULL = 3


def config(prediction_type="v_prediction"):
    return DiTCheckpointConfig(
        hidden_size=32, depth=2, num_heads=2, num_kv_heads=2, mlp_ratio=3, patch_size=2, in_channels=2, input_size=4,
        num_classes=NULL, prediction_type=prediction_type,
    )  # fmt: skip


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = DiT(config()).double()
    model.initialize()
    for name, parameter in model.named_parameters():
        if name != "pos_embed":
            torch.nn.init.normal_(parameter, std=0.15)  # zero modulations would hide errors in them
    return model


def objective(model, prediction_type="v_prediction", *, rows=6, dropout=0.3, flow_times="uniform"):
    def batch(step):
        ids = torch.arange(100 + rows * step, 100 + rows * (step + 1))
        draws = Draws(ids, 7, epoch=step // 2)
        return {"latents": draws.normal("stub", (2, 4, 4)), "draws": draws, "label": ids % NULL}

    loss = DitLoss(model, prediction_type=prediction_type, beta_schedule="cosine")
    source = SimpleNamespace(batch=batch, steps_per_epoch=2)
    return DitObjective(
        source, loss, config(prediction_type), flow_times=flow_times, class_dropout_prob=dropout
    )  # fmt: skip


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "flow"])
def test_the_loss_is_its_formula(model, prediction_type):
    made = objective(model, prediction_type)
    batch = made.batch(1)
    got, metrics = made.module(batch)
    x0, e, t = batch["latents"].double(), batch["noise"].double(), batch["t"]
    assert t.shape == (6,) and e.shape == x0.shape == (6, 2, 4, 4)
    if prediction_type == "flow":
        alpha, sigma, t_model = 1 - t, t, 1000 * t
    else:
        level = torch.tensor(plain_latentlm.cosine_alphas_cumprod(), dtype=torch.float64)[t]
        alpha, sigma, t_model = level.sqrt(), (1 - level).sqrt(), t
    alpha, sigma = (x[:, None, None, None] for x in (alpha, sigma))
    wanted = {"flow": e - x0, "epsilon": e, "v_prediction": alpha * e - sigma * x0}[prediction_type]
    sizes = dataclasses.asdict(config())
    predicted = plain_dit.predict(model.state_dict(), sizes, alpha * x0 + sigma * e, t_model, batch["label"])
    assert metrics == {} and got.dtype == torch.float64
    assert got.item() == pytest.approx(float((predicted - wanted).square().mean()), rel=1e-7)  # of the stored positions


def test_times_labels_and_noise(model):
    for flow_times, variance in (("uniform", 1 / 12), ("logit_normal", 0.04341)):
        batch = objective(model, "flow", rows=2000, flow_times=flow_times, dropout=0.25).batch(0)
        # Var(sigmoid(z)) = 0.0434 for standard normal z.
        assert abs(float(batch["t"].mean()) - 0.5) < 5 * math.sqrt(variance / 2000)
        assert float(batch["t"].var()) == pytest.approx(variance, rel=0.15)
        dropped = batch["label"] == NULL
        assert abs(float(dropped.double().mean()) - 0.25) < 5 * math.sqrt(0.25 * 0.75 / 2000)
        assert not torch.equal(batch["noise"], batch["latents"])


def test_all_but_the_positions_learns(model):
    made = objective(model, rows=12)
    model.zero_grad()
    made.module(made.batch(0))[0].backward()
    for name, parameter in model.named_parameters():
        learns = parameter.grad is not None and bool(parameter.grad.abs().sum() > 0)
        assert learns == (name != "pos_embed"), name


def test_half_inside_float32_outside():
    torch.manual_seed(0)
    made = objective(DiT(config()))
    for name, parameter in made.module.named_parameters():
        if name != "model.pos_embed":
            torch.nn.init.normal_(parameter, std=0.15)
    want = made.module(made.batch(0))[0].item()
    seen = set()
    for layer in made.module.modules():
        if isinstance(layer, torch.nn.Linear):
            layer.register_forward_hook(lambda _, x, y: seen.add(y.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        loss = made.module(made.batch(0))[0]
    assert seen == {torch.bfloat16} and loss.dtype == torch.float32
    assert loss.item() == pytest.approx(want, rel=0.05)
    loss = made.module.bfloat16()(made.batch(0))[0]
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(want, rel=0.05)


def test_a_saved_checkpoint_loads(model, tmp_path):
    made = objective(model)
    weights = {name: p.detach().float() for name, p in made.module.named_parameters()}
    assert made.save(tmp_path, weights, hurried=False) == {}
    loaded, read = load_checkpoint(tmp_path, torch.float32, "cpu")
    assert read == made.config and isinstance(loaded, DiT)
    assert all(torch.equal(tensor, weights[f"model.{name}"]) for name, tensor in loaded.state_dict().items())
