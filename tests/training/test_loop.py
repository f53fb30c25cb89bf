"""The loop: resumed runs are the uninterrupted run, bit for bit; schedule, average, log."""

import math
import os
import random
import signal
import time

import pytest
import torch
import toy_training as toy
from safetensors.torch import load_file, save_file
from torch import nn
from toy_training import CPU, at_step, crash, log, newest, settings

from fastlatent.models.ema import EMA, EmaSchedule
from fastlatent.pipeline.checkpoints import checkpoints, step_of
from fastlatent.training.log import Log, check_trackers
from fastlatent.training.loop import schedule, train
from fastlatent.training.team import Team, check_launcher


def steps_of(run):
    return [step_of(one) for one in checkpoints(run)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    run = tmp_path_factory.mktemp("whole")
    toy.run(run)
    return run


# Before the first checkpoint (of step 4), right after it, before and after the second one, the last step.
@pytest.mark.parametrize("step", [1, 4, 7, 8])
def test_a_crash_changes_nothing(whole, tmp_path, step):
    with pytest.raises(toy.CrashError):
        train(at_step(toy.ToyObjective(Team(CPU)), step, crash), tmp_path, settings(), Team(CPU))
    assert steps_of(tmp_path) == [s for s in (4, 8) if s <= step]
    toy.run(tmp_path)
    toy.assert_same(tmp_path, whole)


def test_crashes_at_random_steps_change_nothing(whole, tmp_path):
    for step in random.Random(int(os.environ.get("FASTLATENT_SEED", "0"))).choices(range(9), k=4):
        toy.run(tmp_path, stop_at=step, checkpoint_every=2)
    toy.run(tmp_path, checkpoint_every=2)
    toy.assert_same(tmp_path, whole)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_writes_a_checkpoint_and_changes_nothing(whole, tmp_path, number):
    objective = at_step(toy.ToyObjective(Team(CPU)), 5, lambda: os.kill(os.getpid(), number))
    with pytest.raises(KeyboardInterrupt):
        train(objective, tmp_path, settings(), Team(CPU))
    # The step that was going on is finished and kept, and nothing is drawn: who stops it may not wait.
    assert steps_of(tmp_path) == [4, 6]
    assert [(folder / "preview.png").exists() for folder in checkpoints(tmp_path)] == [True, False]
    assert (tmp_path / "loss.png").exists()
    toy.run(tmp_path)
    toy.assert_same(tmp_path, whole)


def test_a_torn_log_is_repaired(whole, tmp_path):
    toy.run(tmp_path, stop_at=6)
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"step": 4, "loss": 1.0}\n{"step": 5, "lo')
    toy.run(tmp_path)
    toy.assert_same(tmp_path, whole)
    assert (tmp_path / "loss.png").exists() and (tmp_path / "validation.png").exists()


def test_a_run_that_is_done_stays(whole):
    before = newest(whole), log(whole)
    toy.run(whole)
    assert log(whole) == before[1]
    assert all(torch.equal(tensor, before[0][name]) for name, tensor in newest(whole).items())


def test_a_checkpoint_of_another_model_is_refused(whole, tmp_path):
    with pytest.raises(ValueError, match="ema"):
        toy.run(whole, ema_decay=0.0, steps=10)
    with pytest.raises(ValueError, match=r"does not fit this model|lacks"):
        train(QuadraticObjective(), whole, settings(), Team(CPU))
    with pytest.raises(ValueError, match="not trained in fp16"):
        toy.run(whole, mixed_precision="fp16", steps=10)


def test_a_damaged_checkpoint_says_what_to_do(tmp_path):
    toy.run(tmp_path)
    file = checkpoints(tmp_path)[-1] / "training.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match="does not load.*delete .*checkpoint-000009 to resume from the checkpoint bef"):
        toy.run(tmp_path)


def test_seeds(whole, tmp_path):
    toy.run(tmp_path, seed=1)
    assert [line["loss"] for line in log(tmp_path)] != [line["loss"] for line in log(whole)]


def test_parts_of_a_batch_are_the_batch(whole, tmp_path):
    toy.run(tmp_path, accumulate=4)
    toy.assert_same(tmp_path, whole, tolerance=1e-12)


def test_a_part_begins_when_it_should(tmp_path):
    toy.run(tmp_path, checkpoint_every=1, keep_checkpoints=20)
    first = toy.ToyObjective(Team(CPU)).module.critic.weight
    for folder in checkpoints(tmp_path):
        state, done = load_file(folder / "training.safetensors"), step_of(folder)
        begun = done > toy.BEGIN
        assert torch.equal(state["weights.critic.weight"], first) != begun, done
        assert ("optimizer.critic.weight.exp_avg" in state) == begun
        if begun:  # its own count of steps: Adam's correction starts with it
            assert state["optimizer.critic.weight.step"] == done - toy.BEGIN
        assert not any(name.startswith("ema.critic") for name in state)  # it is not averaged
        assert torch.equal(state["ema.fixed"], torch.ones(6, dtype=torch.float64))  # frozen, and in the average


# --- several processes (gloo, float64) ---


def test_sharded_bf16_is_bf16(tmp_path, teams):
    for world, name in ((1, "one"), (2, "two")):
        teams.run(world, "toy_training:run", folder=str(tmp_path / name), mixed_precision="bf16", fsdp=True)
    for one, two in zip(log(tmp_path / "one"), log(tmp_path / "two"), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=0.02)
    assert all(tensor.dtype in (torch.float64, torch.float32) for tensor in newest(tmp_path / "two").values())


@pytest.mark.parametrize("change", [{}, {"fsdp": True}, {"accumulate": 2}], ids=["ddp", "fsdp", "accumulate"])
def test_two_processes_are_one(whole, tmp_path, teams, change):
    teams.run(2, "toy_training:run", folder=str(tmp_path / "run"), **change)
    toy.assert_same(tmp_path / "run", whole, tolerance=1e-12)


@pytest.mark.parametrize("fsdp", [pytest.param(False, marks=pytest.mark.soak), True])  # DDP: test_processes.py too
def test_the_number_of_processes_may_change(whole, tmp_path, teams, fsdp):
    common = {"folder": str(tmp_path / "run"), "checkpoint_every": 2}
    teams.run(1, "toy_training:run", stop_at=3, **common)
    teams.run(2, "toy_training:run", stop_at=7, fsdp=fsdp, **common)
    assert steps_of(tmp_path / "run") == [4, 6]
    teams.run(1, "toy_training:run", **common)
    toy.assert_same(tmp_path / "run", whole, tolerance=1e-12)


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.soak), 1])
def test_a_signal_to_one_stops_all(whole, tmp_path, teams, rank):
    teams.run(2, "toy_faults:stop_in_one", folder=str(tmp_path / "run"), rank=rank)
    assert steps_of(tmp_path / "run") == [4, 6]
    toy.run(tmp_path / "run")
    toy.assert_same(tmp_path / "run", whole, tolerance=1e-12)


def test_what_the_main_process_raises_all_raise(tmp_path, teams):
    printed = teams.run(2, "toy_faults:no_space", folder=str(tmp_path / "run"))
    assert "both stopped" in printed


def test_what_a_launcher_says_is_compared(monkeypatch):
    check_launcher("no", fsdp=False)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    check_launcher("bf16", fsdp=False)
    with pytest.raises(ValueError, match="--mixed_precision bf16, the settings say no: add --mixed-precision bf16"):
        check_launcher("no", fsdp=False)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    check_launcher("no", fsdp=True)
    with pytest.raises(ValueError, match="says --use_fsdp: add --fsdp"):
        check_launcher("no", fsdp=False)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ValueError, match="not supported: use --fsdp"):
        check_launcher("no", fsdp=True)


def test_a_model_that_cannot_be_sharded(tmp_path, teams):
    assert "leave out --fsdp" in teams.run(2, "toy_faults:not_sharded", folder=str(tmp_path / "run"))


# --- learning rate ---


@pytest.mark.parametrize(
    ("steps", "warmup"), [(10, 0), (10, 3), (10, 9), (10, 10), (10, 20), (1, 0), (1, 1), (200_000, 100)]
)
@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
def test_learning_rate(steps, warmup, kind):
    chosen = settings(steps=steps, warmup_steps=warmup, lr_schedule=kind)
    for step in {*range(min(steps, 30)), steps // 2, steps - 1}:
        left = 1 - (step - warmup) / max(1, steps - warmup)
        want = {"cosine": 0.5 * (1 - math.cos(math.pi * left)), "linear": left, "constant": 1.0}[kind]
        want = (step + 1) / warmup if step < warmup else want
        assert schedule(chosen, step) == pytest.approx(want, rel=1e-9)
        assert 0 < want <= 1


def test_the_rate_in_the_log_is_the_one_that_was_used(whole):
    for line in log(whole):
        assert line["learning_rate"] == 1e-2 * schedule(settings(), line["step"])


class Quadratic(nn.Module):
    """loss = sum of (weight − step)² over a matrix and a vector: gradients that are known."""

    def __init__(self):
        super().__init__()
        self.matrix = nn.Parameter(torch.ones(2, 3))
        self.vector = nn.Parameter(torch.ones(3))

    def forward(self, batch):
        goal = batch["goal"]
        return (self.matrix - goal).square().sum() + (self.vector - goal).square().sum(), {}


class QuadraticObjective:
    parts = blocks = ()
    steps_per_epoch = 1

    def __init__(self):
        self.module = Quadratic()

    def batch(self, step):
        return {"goal": float(step)}

    def left_out(self):
        return {}

    def save(self, folder, weights, *, hurried):
        save_file(dict(weights), folder / "model.safetensors")
        return {}


@pytest.mark.parametrize("ema_schedule", ["warmup", "power", "constant", "published"])
def test_one_run_equals_plain_adamw(tmp_path, ema_schedule):
    chosen = settings(steps=6, grad_clip=2.0, checkpoint_every=6, ema_schedule=ema_schedule, ema_inv_gamma=2.0)
    train(QuadraticObjective(), tmp_path, chosen, Team(CPU))
    # AdamW written down again in float64 (Loshchilov & Hutter 2019), with clipping by the global norm.
    weights = {"matrix": torch.ones(2, 3, dtype=torch.float64), "vector": torch.ones(3, dtype=torch.float64)}
    shadow = {name: w.clone() for name, w in weights.items()}
    first = {name: torch.zeros_like(w) for name, w in weights.items()}
    second = {name: torch.zeros_like(w) for name, w in weights.items()}
    for step in range(6):
        gradients = {name: 2 * (w - step) for name, w in weights.items()}
        norm = math.sqrt(sum(float(g.square().sum()) for g in gradients.values()))
        assert log(tmp_path)[step]["grad_norm"] == pytest.approx(norm, rel=1e-4)
        decay_of_average = {
            "warmup": min(0.9, (1 + step) / (10 + step)),
            "power": min(0.9, 1 - 1 / (1 + step / 2.0) ** 0.75),
            "constant": 0.9,
            "published": 0.9 if step else 0.0,
        }[ema_schedule]
        for name, w in weights.items():
            g = gradients[name] * min(1, 2.0 / norm)
            first[name] = 0.9 * first[name] + 0.1 * g
            second[name] = 0.98 * second[name] + 0.02 * g * g
            rate = 1e-2 * schedule(chosen, step)
            decay = 0.1 if name == "matrix" else 0.0  # none on vectors
            m, v = first[name] / (1 - 0.9 ** (step + 1)), second[name] / (1 - 0.98 ** (step + 1))
            weights[name] = w - rate * decay * w - rate * m / (v.sqrt() + 1e-8)
            shadow[name] = decay_of_average * shadow[name] + (1 - decay_of_average) * weights[name]
    state = load_file(checkpoints(tmp_path)[-1] / "training.safetensors")
    average = load_file(checkpoints(tmp_path)[-1] / "model.safetensors")
    for name in weights:
        torch.testing.assert_close(state[f"weights.{name}"].double(), weights[name], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(state[f"ema.{name}"].double(), shadow[name], rtol=1e-5, atol=1e-6)
        assert torch.equal(average[name], state[f"ema.{name}"])  # what users load is the average


def test_without_an_average_the_weights_are_saved(tmp_path):
    train(QuadraticObjective(), tmp_path, settings(steps=2, ema_decay=0.0), Team(CPU))
    folder = checkpoints(tmp_path)[-1]
    state, saved = load_file(folder / "training.safetensors"), load_file(folder / "model.safetensors")
    assert torch.equal(saved["matrix"], state["weights.matrix"])
    assert not any(name.startswith("ema.") for name in state)


def test_no_clipping(tmp_path):
    # Adam forgets the scale of gradients, so clipping shows in the second moment alone.
    states = {}
    for clip in (0.0, 1.0):
        run = tmp_path / str(clip)
        train(QuadraticObjective(), run, settings(steps=1, grad_clip=clip, warmup_steps=0), Team(CPU))
        states[clip] = load_file(checkpoints(run)[-1] / "training.safetensors")
    # The gradient of the first step is 2 everywhere, its norm 2·√9 = 6.
    torch.testing.assert_close(states[0.0]["optimizer.matrix.exp_avg_sq"], torch.full((2, 3), 0.02 * 4))
    torch.testing.assert_close(states[1.0]["optimizer.matrix.exp_avg_sq"], torch.full((2, 3), 0.02 * 4 / 36))


@pytest.mark.parametrize("mixed_precision", ["bf16", "fp16"])
def test_mixed_precision(tmp_path, mixed_precision):
    for name, precision in (("half", mixed_precision), ("full", "no")):
        objective = toy.ToyObjective(Team(CPU), dtype=torch.float32)
        train(objective, tmp_path / name, settings(mixed_precision=precision, steps=4), Team(CPU))
    assert all(tensor.dtype == torch.float32 for tensor in newest(tmp_path / "half").values())
    for line, full in zip(log(tmp_path / "half"), log(tmp_path / "full"), strict=True):
        assert line["loss"] != full["loss"]
        assert line["loss"] == pytest.approx(full["loss"], rel=0.05)


def test_fp16_goes_on_where_a_gradient_overflowed(whole, tmp_path):
    # A scale of 2^16 makes gradients of 1 infinite in fp16: such steps are left out, and the scale halves.
    class Loud(Quadratic):
        def forward(self, batch):
            product = self.matrix.half() * torch.tensor(1.0, dtype=torch.float16)
            return product.float().sum() * 10 + self.vector.sum() * 0, {}

    objective = QuadraticObjective()
    objective.module = Loud()
    train(objective, tmp_path, settings(mixed_precision="fp16", steps=9), Team(CPU))
    lines = log(tmp_path)
    assert not math.isfinite(lines[0]["grad_norm"]) and math.isfinite(lines[-1]["grad_norm"])
    scale = newest(tmp_path)["training.safetensors/scaler.scale"]
    assert scale < 2**16
    again = objective.module.matrix.detach().clone()
    train(objective, tmp_path, settings(mixed_precision="fp16", steps=9), Team(CPU))
    assert torch.equal(again, objective.module.matrix)


# --- the average ---


def test_ema_reaches_its_decay():
    for kind, step in (("warmup", 891), ("power", 464)):
        assert EmaSchedule(kind, 0.99)(step) == 0.99 > EmaSchedule(kind, 0.99)(step - 2)
    # What diffusers' documentation says of power 3/4: 0.999 after 10,000 steps, 0.9999 after 215,000.
    assert EmaSchedule("power", 0.99999)(10_000) == pytest.approx(0.999, abs=1e-5)
    assert EmaSchedule("power", 0.99999)(215_000) == pytest.approx(0.9999, abs=1e-6)


@pytest.mark.parametrize("decay", [-0.1, 0, 1, 1.5])
def test_ema_decay_out_of_range(decay):
    with pytest.raises(ValueError, match="ema_decay: expected above 0 and below 1"):
        EmaSchedule("warmup", decay)


def test_ema_schedule_unknown():
    with pytest.raises(ValueError, match="ema_schedule: expected one of warmup, power, constant, published, got 'x'"):
        EmaSchedule("x", 0.9)


def test_ema_against_diffusers():
    from diffusers.training_utils import EMAModel

    for kind, options in (
        ("power", {"use_ema_warmup": True, "inv_gamma": 3.0, "power": 0.6}),
        ("published", {"min_decay": 0.9}),
    ):
        theirs = nn.Linear(2, 2)
        published = EMAModel(theirs.parameters(), decay=0.9, **options)
        ours = EMA(dict(theirs.named_parameters()), EmaSchedule(kind, 0.9, inv_gamma=3.0, power=0.6))
        for step in range(30):
            with torch.no_grad():
                theirs.weight.fill_(math.sin(step))
            published.step(theirs.parameters())
            ours.update(step)
        torch.testing.assert_close(ours.shadow["weight"], published.shadow_params[0], rtol=1e-5, atol=1e-6)


# --- the log ---


def test_log_keeps_steps_before_the_checkpoint(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 0, "loss": 1.0}\n{"step": 1, "loss": 2.0}\nnoise\n{"step": 2, "loss": 3.0}\n{"st')
    assert Log(tmp_path, 2).last_loss == 2.0
    assert path.read_text() == '{"step": 0, "loss": 1.0}\n{"step": 1, "loss": 2.0}\n'
    assert Log(tmp_path, 0).last_loss is None
    assert path.read_text() == ""


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan), (1.0, math.inf)])
def test_log_raises_where_a_run_diverges(tmp_path, loss, norm):
    log = Log(tmp_path, 0)
    for step in range(3):
        bad = step == 1
        values = {"loss": torch.tensor(loss if bad else 1.0), "grad_norm": torch.tensor(norm if bad else 1.0)}
        log.add(step, 0.1, values)
    with pytest.raises(ValueError, match="at step 1: the run diverged.*--learning-rate in another --out"):
        log.flush()


def test_fp16_diverges_where_every_gradient_overflows(tmp_path):
    log = Log(tmp_path, 0, overflows=True)
    good, bad = ({"loss": torch.tensor(1.0), "grad_norm": torch.tensor(value)} for value in (1.0, math.inf))
    for step in range(20):
        log.add(step, 0.1, bad if step else good)
    with pytest.raises(ValueError, match="grad_norm became inf at step 20: the run diverged"):
        for step in range(20, 40):
            log.add(step, 0.1, bad)


def test_a_run_that_diverges_draws_its_curve(tmp_path):
    objective = QuadraticObjective()
    objective.batch = lambda step: {"goal": math.nan if step == 2 else 0.0}
    with pytest.raises(ValueError, match="at step 2: the run diverged"):
        train(objective, tmp_path, settings(), Team(CPU))
    assert (tmp_path / "loss.png").exists() and not checkpoints(tmp_path)


def test_files_that_cannot_be_used_are_listed(tmp_path, teams, capsys):
    toy.run(tmp_path / "one")
    assert (tmp_path / "one" / "left_out.txt").read_text() == "'a.png': it is torn\n"
    assert "1 files cannot be used, see" in capsys.readouterr().out
    teams.run(2, "toy_training:run", folder=str(tmp_path / "two"))
    assert (tmp_path / "two" / "left_out.txt").read_text() == "'a.png': it is torn\n'b.png': so is it\n"


def test_the_newest_checkpoint_is_from_before_a_divergence(tmp_path):
    objective = QuadraticObjective()
    original = objective.batch
    objective.batch = lambda step: {"goal": math.nan} if step == 5 else original(step)
    with pytest.raises(ValueError, match="at step 5"):
        train(objective, tmp_path, settings(steps=30, checkpoint_every=3), Team(CPU))
    assert steps_of(tmp_path) == [3]
    assert all(tensor.isfinite().all() for tensor in newest(tmp_path).values())


def test_losses_are_read_in_groups(tmp_path, monkeypatch):
    # Reading one waits for the device.
    log, flushes = Log(tmp_path, 0), []
    original = Log.flush
    monkeypatch.setattr(Log, "flush", lambda self: flushes.append(len(self._pending)) or original(self))
    for step in range(45):
        log.add(step, 0.1, {"loss": torch.tensor(1.0), "grad_norm": torch.tensor(1.0)})
    assert flushes == [20, 20]


def test_tensorboard_gets_what_is_logged(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    toy.run(tmp_path, stop_at=6, trackers=("tensorboard",))
    toy.run(tmp_path, trackers=("tensorboard",))
    events = EventAccumulator(str(tmp_path / "tensorboard" / tmp_path.name)).Reload()
    assert {"loss", "error", "grad_norm", "learning_rate", "validation/loudness"} <= set(events.Tags()["scalars"])
    assert events.Tags()["images"] == ["preview"]  # grey, in a format that takes three channels
    seen = {event.step: event.value for event in events.Scalars("loss")}
    assert seen == pytest.approx({line["step"]: line["loss"] for line in log(tmp_path)}, rel=1e-6)


def test_weights_and_biases_offline(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    toy.run(tmp_path, trackers=("wandb",))
    [file] = tmp_path.glob("wandb/offline-run-*/*.wandb")
    for _ in range(100):  # another process writes it, which need not be done when ours is
        if b"loudness" in file.read_bytes():
            return
        time.sleep(0.2)
    raise AssertionError("what was measured is not in the file")


def test_trackers_are_checked(monkeypatch):
    with pytest.raises(ValueError, match="--trackers: expected tensorboard or wandb, got 'mlflow'"):
        check_trackers(("mlflow",))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"--trackers wandb: the package is missing; pip install 'fastlatent\[track"):
        check_trackers(("wandb",))
