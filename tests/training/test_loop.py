"""The loop: resumed runs are the uninterrupted run, bit for bit; schedule, average, log."""

import json
import math
import os
import random
import signal

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from fastlatent.models.ema import EMA
from fastlatent.pipeline.checkpoints import checkpoints
from fastlatent.training import loop
from fastlatent.training.loop import Log, learning_rate, step_seed, train

CPU = torch.device("cpu")


def log(run):
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def newest(run):
    """Every tensor of the newest checkpoint: weights, average, optimizer, and what users load."""
    folder = checkpoints(run)[-1]
    return {f"{file.name}/{k}": v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


def assert_same(run, other):
    assert log(run) == log(other)
    one, two = newest(run), newest(other)
    assert one.keys() == two.keys()
    assert any(".exp_avg_sq" in name for name in one)
    assert any("/ema." in name for name in one)
    for name in one:
        assert torch.equal(one[name], two[name]), name


def at_step(objective, step, action):
    """Do something while the batch of a step is fetched."""
    original = objective.batch

    def batch(wanted):
        if wanted == step:
            action()
        return original(wanted)

    objective.batch = batch
    return objective


class CrashError(Exception):
    pass


def crash():
    raise CrashError


@pytest.fixture(scope="module")
def whole(tmp_path_factory, settings, make_ar, make_vae):
    runs = {}
    for name, make in (("ar", make_ar), ("vae", make_vae)):
        runs[make] = tmp_path_factory.mktemp(name)
        train(make(), runs[make], settings(), CPU)
    return runs


# Before the first checkpoint (of step 4), right after it, before and after the second one, the last step.
@pytest.mark.parametrize("step", [1, 4, 7, 8])
def test_a_crash_changes_nothing(make, settings, whole, tmp_path, step):
    with pytest.raises(CrashError):
        train(at_step(make(), step, crash), tmp_path, settings(), CPU)
    assert [loop.checkpoints.step_of(one) for one in checkpoints(tmp_path)] == [s for s in (4, 8) if s <= step]
    train(make(), tmp_path, settings(), CPU)
    assert_same(tmp_path, whole[make])


def test_crashes_at_random_steps_change_nothing(make, settings, whole, tmp_path):
    for step in random.Random(int(os.environ.get("FASTLATENT_SEED", "0"))).choices(range(9), k=4):
        try:
            train(at_step(make(), step, crash), tmp_path, settings(checkpoint_every=2), CPU)
        except CrashError:
            continue
    train(make(), tmp_path, settings(checkpoint_every=2), CPU)
    assert_same(tmp_path, whole[make])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_writes_a_checkpoint_and_changes_nothing(make_ar, settings, whole, tmp_path, number):
    objective = at_step(make_ar(), 5, lambda: os.kill(os.getpid(), number))
    with pytest.raises(KeyboardInterrupt):
        train(objective, tmp_path, settings(), CPU)
    # The step that was going on is finished and kept.
    assert [loop.checkpoints.step_of(one) for one in checkpoints(tmp_path)] == [4, 6]
    train(make_ar(), tmp_path, settings(), CPU)
    assert_same(tmp_path, whole[make_ar])


def test_a_stop_at_the_last_step_is_too_late(make_ar, settings, whole, tmp_path):
    objective = at_step(make_ar(), 8, lambda: os.kill(os.getpid(), signal.SIGINT))
    try:
        train(objective, tmp_path, settings(), CPU)
    except KeyboardInterrupt:
        train(make_ar(), tmp_path, settings(), CPU)
    assert (tmp_path / "loss.png").exists()
    assert_same(tmp_path, whole[make_ar])


def test_a_torn_log_is_repaired(make_ar, settings, whole, tmp_path):
    with pytest.raises(CrashError):
        train(at_step(make_ar(), 6, crash), tmp_path, settings(), CPU)
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"step": 4, "loss": 1.0}\n{"step": 5, "lo')
    train(make_ar(), tmp_path, settings(), CPU)
    assert_same(tmp_path, whole[make_ar])


def test_a_run_that_is_done_stays(make_ar, settings, whole):
    run = whole[make_ar]
    before = newest(run), log(run)
    train(make_ar(), run, settings(), CPU)
    assert log(run) == before[1]
    assert all(torch.equal(tensor, before[0][name]) for name, tensor in newest(run).items())


def test_a_checkpoint_of_another_model_is_refused(make_ar, make_vae, settings, whole, tmp_path):
    with pytest.raises(ValueError, match="does not fit this model|lacks"):
        train(make_vae(), whole[make_ar], settings(), CPU)
    with pytest.raises(ValueError, match="ema|lacks|does not fit"):
        train(make_ar(), whole[make_ar], settings(ema_decay=0), CPU)


@pytest.mark.parametrize("seed", [0, 1])
def test_seeds(make_ar, settings, whole, tmp_path, seed):
    # The loop's seed moves noise, times and dropout; data order and weights have their own here.
    train(make_ar(), tmp_path, settings(seed=seed), CPU)
    assert [line["loss"] for line in log(tmp_path)] != [line["loss"] for line in log(whole[make_ar])]


def test_step_seeds_are_all_different():
    seeds = {step_seed(seed, step) for seed in (0, 1, 2**63 - 1) for step in range(1000)}
    assert len(seeds) == 3000
    assert all(0 <= seed < 2**63 for seed in seeds)


# --- learning rate ---


@pytest.mark.parametrize(
    ("steps", "warmup"), [(10, 0), (10, 3), (10, 9), (10, 10), (10, 20), (1, 0), (1, 1), (200_000, 100)]
)
def test_learning_rate(settings, steps, warmup):
    chosen = settings(steps=steps, warmup_steps=warmup, learning_rate=0.1)
    for step in {*range(min(steps, 30)), steps // 2, steps - 1}:
        if step < warmup:
            want = 0.1 * (step + 1) / warmup
        else:
            want = 0.05 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))
        assert learning_rate(chosen, step) == pytest.approx(want, rel=1e-12)
        assert 0 < want <= 0.1 + 1e-15


def test_the_rate_in_the_log_is_the_one_that_was_used(make_ar, settings, whole):
    for line in log(whole[make_ar]):
        assert line["learning_rate"] == learning_rate(settings(), line["step"])


class Quadratic(nn.Module):
    """loss = sum of (weight − step)² over a matrix and a vector: gradients that are known."""

    def __init__(self):
        super().__init__()
        self.matrix = nn.Parameter(torch.ones(2, 3))
        self.vector = nn.Parameter(torch.ones(3))

    def forward(self, batch, generator):
        loss = (self.matrix - batch).square().sum() + (self.vector - batch).square().sum()
        return loss, {"draw": torch.rand((), generator=generator)}


class QuadraticObjective:
    def __init__(self):
        self.module = Quadratic()

    def batch(self, step):
        return float(step)

    def save(self, folder, weights):
        from safetensors.torch import save_file

        save_file(dict(weights), folder / "model.safetensors")


def test_one_run_equals_plain_adamw(settings, tmp_path):
    chosen = settings(steps=6, grad_clip=2.0, checkpoint_every=6)
    train(QuadraticObjective(), tmp_path, chosen, CPU)
    # AdamW written down again in float64 (Loshchilov & Hutter 2019), with clipping by the global norm.
    weights = {"matrix": torch.ones(2, 3, dtype=torch.float64), "vector": torch.ones(3, dtype=torch.float64)}
    shadow = {name: w.clone() for name, w in weights.items()}
    first = {name: torch.zeros_like(w) for name, w in weights.items()}
    second = {name: torch.zeros_like(w) for name, w in weights.items()}
    for step in range(6):
        gradients = {name: 2 * (w - step) for name, w in weights.items()}
        norm = math.sqrt(sum(float(g.square().sum()) for g in gradients.values()))
        assert log(tmp_path)[step]["grad_norm"] == pytest.approx(norm, rel=1e-4)
        for name, w in weights.items():
            g = gradients[name] * min(1, 2.0 / norm)
            first[name] = 0.9 * first[name] + 0.1 * g
            second[name] = 0.98 * second[name] + 0.02 * g * g
            rate = learning_rate(chosen, step)
            decay = 0.1 if name == "matrix" else 0.0  # none on vectors
            m, v = first[name] / (1 - 0.9 ** (step + 1)), second[name] / (1 - 0.98 ** (step + 1))
            weights[name] = w - rate * decay * w - rate * m / (v.sqrt() + 1e-8)
            d = min(0.9, (1 + step) / (10 + step))
            shadow[name] = d * shadow[name] + (1 - d) * weights[name]
    state = load_file(checkpoints(tmp_path)[-1] / "training.safetensors")
    average = load_file(checkpoints(tmp_path)[-1] / "model.safetensors")
    for name in weights:
        torch.testing.assert_close(state[f"weights.{name}"].double(), weights[name], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(state[f"ema.{name}"].double(), shadow[name], rtol=1e-5, atol=1e-6)
        assert torch.equal(average[name], state[f"ema.{name}"])  # what users load is the average


def test_without_an_average_the_weights_are_saved(settings, tmp_path):
    train(QuadraticObjective(), tmp_path, settings(steps=2, ema_decay=0), CPU)
    folder = checkpoints(tmp_path)[-1]
    state, saved = load_file(folder / "training.safetensors"), load_file(folder / "model.safetensors")
    assert torch.equal(saved["matrix"], state["weights.matrix"])
    assert not any(name.startswith("ema.") for name in state)


def test_no_clipping(settings, tmp_path):
    # Adam forgets the scale of gradients, so clipping shows in the second moment alone.
    states = {}
    for clip in (0.0, 1.0):
        train(QuadraticObjective(), tmp_path / str(clip), settings(steps=1, grad_clip=clip, warmup_steps=0), CPU)
        states[clip] = load_file(checkpoints(tmp_path / str(clip))[-1] / "training.safetensors")
    # The gradient of the first step is 2 everywhere, its norm 2·√9 = 6.
    torch.testing.assert_close(states[0.0]["optimizer.0.exp_avg_sq"], torch.full((2, 3), 0.02 * 4))
    torch.testing.assert_close(states[1.0]["optimizer.0.exp_avg_sq"], torch.full((2, 3), 0.02 * 4 / 36))


def test_mixed_precision_of_bf16(make, settings, tmp_path, whole):
    train(make(), tmp_path, settings(mixed_precision="bf16", steps=3), CPU)
    for name, tensor in newest(tmp_path).items():
        assert tensor.dtype == torch.float32, name
    # Not step 0: a new model's output is zero in every dtype.
    line, full = log(tmp_path)[1], log(whole[make])[1]
    assert line["loss"] != full["loss"]
    assert line["loss"] == pytest.approx(full["loss"], rel=0.05)


# --- the average ---


def test_ema_ramp():
    module = nn.Linear(1, 1, bias=False)
    ema = EMA(module, 0.99)
    want = ema.shadow["weight"].double().clone()
    for step in range(2000):
        with torch.no_grad():
            module.weight.fill_(math.sin(step))
        ema.update(step)
        d = min(0.99, (1 + step) / (10 + step))
        want = d * want + (1 - d) * module.weight.detach().double()
        if step == 0:
            assert d == 0.1
        if step == 891:  # 9/(1 − 0.99) = 900 less what rounding leaves
            assert d == 0.99
    torch.testing.assert_close(ema.shadow["weight"].double(), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("decay", [-0.1, 0, 1, 1.5])
def test_ema_decay_out_of_range(decay):
    with pytest.raises(ValueError, match="ema_decay: expected above 0 and below 1"):
        EMA(nn.Linear(1, 1), decay)


def test_ema_of_half_precision_weights_is_float32():
    module = nn.Linear(1, 1, bias=False).bfloat16()
    ema = EMA(module, 0.9999)
    with torch.no_grad():
        module.weight.fill_(1.0)
    before = float(ema.shadow["weight"])
    ema.update(10**6)
    assert ema.shadow["weight"].dtype == torch.float32
    assert float(ema.shadow["weight"]) != before  # a step of 1e-4 would be lost in bfloat16


# --- the log ---


def test_log_keeps_steps_before_the_checkpoint(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 0, "loss": 1.0}\n{"step": 1, "loss": 2.0}\nnoise\n{"step": 2, "loss": 3.0}\n{"st')
    assert Log(path, 2).last_loss == 2.0
    assert path.read_text() == '{"step": 0, "loss": 1.0}\n{"step": 1, "loss": 2.0}\n'
    assert Log(path, 0).last_loss is None
    assert path.read_text() == ""


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan), (1.0, math.inf)])
def test_log_raises_where_a_run_diverges(tmp_path, loss, norm):
    log = Log(tmp_path / "log.jsonl", 0)
    for step in range(3):
        bad = step == 1
        values = {"loss": torch.tensor(loss if bad else 1.0), "grad_norm": torch.tensor(norm if bad else 1.0)}
        log.add(step, 0.1, values)
    with pytest.raises(ValueError, match="at step 1: the run diverged.*--learning-rate in another --out"):
        log.flush()


def test_the_newest_checkpoint_is_from_before_a_divergence(settings, tmp_path):
    objective = QuadraticObjective()
    original = objective.batch
    objective.batch = lambda step: math.nan if step == 5 else original(step)
    with pytest.raises(ValueError, match="at step 5"):
        train(objective, tmp_path, settings(steps=30, checkpoint_every=3), CPU)
    assert [loop.checkpoints.step_of(one) for one in checkpoints(tmp_path)] == [3]
    assert all(tensor.isfinite().all() for tensor in newest(tmp_path).values())


def test_losses_are_read_in_groups(tmp_path, monkeypatch):
    # Reading one waits for the device.
    log, flushes = Log(tmp_path / "log.jsonl", 0), []
    original = Log.flush
    monkeypatch.setattr(Log, "flush", lambda self: flushes.append(1) or original(self))
    for step in range(3 * loop.FLUSH_STEPS):
        log.add(step, 0.1, {"loss": torch.tensor(1.0), "grad_norm": torch.tensor(1.0)})
    assert len(flushes) == 3
