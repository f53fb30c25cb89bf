"""A model small enough to train in milliseconds, with all that an objective can have: a part of its own that begins
late, frozen weights, draws for each sample; and what the tests of the loop ask about a run."""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from fastlatent.diffusion.noise import Draws
from fastlatent.media.sheets import save_sheet
from fastlatent.pipeline.checkpoints import checkpoints
from fastlatent.training.loop import LoopSettings, train
from fastlatent.training.objective import Part
from fastlatent.training.team import Team

CPU = torch.device("cpu")
SETTINGS = {
    "steps": 9, "accumulate": 1, "learning_rate": 1e-2, "lr_schedule": "cosine", "warmup_steps": 3, "adam_beta1": 0.9,
    "adam_beta2": 0.98, "adam_eps": 1e-8, "weight_decay": 0.1, "grad_clip": 1.0, "ema_decay": 0.9,
    "ema_schedule": "warmup", "ema_inv_gamma": 1.0, "ema_power": 0.75, "mixed_precision": "no", "compile": False,
    "fsdp": False, "checkpoint_every": 4, "keep_checkpoints": 2, "trackers": (),
}  # fmt: skip
BATCH = 8
BEGIN = 5  # of the critic


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(6, 6) for _ in range(3)])
        self.fixed = nn.Parameter(torch.ones(6), requires_grad=False)
        self.critic = nn.Linear(6, 1)

    def forward(self, batch):
        x = batch["x"].to(self.fixed.dtype) * self.fixed
        for layer in self.layers:
            x = torch.tanh(layer(x)) + x
        error = (x - batch["y"].to(x.dtype)).square().mean()
        judged = self.critic(x.detach())
        return error + (judged.square().mean() if batch["late"] else 0 * judged.sum()), {"error": error.detach() * 1}


class ToyObjective:
    parts = (Part("critic.", 2e-2, BEGIN),)
    blocks = (nn.Linear,)
    steps_per_epoch = 10

    def __init__(self, team, *, seed=0, dtype=torch.float64):
        torch.manual_seed(0)
        self.module, self.team, self.seed = Toy().to(dtype), team, seed

    def batch(self, step):
        ids = torch.arange(BATCH)[self.team.rank :: self.team.world_size] + step * BATCH
        draws = Draws(ids, self.seed, 0)
        return {"x": draws.normal("x", (6,)), "y": draws.normal("y", (6,)), "late": step >= BEGIN}

    def compile(self):
        self.module.compile()

    def left_out(self):
        return {"a.png": "it is torn"} if self.team.is_main else {"b.png": "so is it"}

    def save(self, folder, weights, *, hurried):
        save_file(weights, folder / "model.safetensors")
        if hurried:
            return {}
        grey = np.zeros((1, 8, 8, 1), dtype=np.uint8)
        save_sheet(folder / "preview.png", grey, columns=1)
        return {"loudness": float(weights["layers.0.weight"].abs().sum())}


class CrashError(Exception):
    pass


def settings(**change):
    return LoopSettings(**{**SETTINGS, **change})


def at_step(objective, step, action):
    """Do something while the batch of a step is fetched."""
    original = objective.batch

    def batch(wanted):
        if wanted == step:
            action()
        return original(wanted)

    objective.batch = batch
    return objective


def crash():
    raise CrashError


def run(folder, *, stop_at=None, seed=0, **change):
    """Train the toy in this process, or as one of a team; a crash before step `stop_at`."""
    team = Team(CPU)
    objective = ToyObjective(team, seed=seed)
    if stop_at is not None:
        at_step(objective, stop_at, crash)
    Path(folder).mkdir(parents=True, exist_ok=True)
    try:
        train(objective, Path(folder), settings(**change), team)
    except CrashError:
        if team.world_size > 1:
            sys.exit(0)


def log(folder):
    return [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]


def newest(folder):
    """Every tensor of the newest checkpoint: weights, average, optimisers, and what users load."""
    found = checkpoints(Path(folder))[-1]
    return {f"{file.name}/{k}": v for file in found.glob("*.safetensors") for k, v in load_file(file).items()}


def assert_same(one, two, tolerance=0.0):
    """Losses and tensors of two runs, bit for bit or to a relative tolerance."""
    lines, others = log(one), log(two)
    assert [line["step"] for line in lines] == [line["step"] for line in others]
    for line, other in zip(lines, others, strict=True):
        assert line.keys() == other.keys()
        for name in line:
            assert abs(line[name] - other[name]) <= tolerance * max(1, abs(line[name])), (line, other)
    tensors, more = newest(one), newest(two)
    assert tensors.keys() == more.keys()
    assert any(".exp_avg_sq" in name for name in tensors)
    for name, tensor in tensors.items():
        error = (tensor.double() - more[name].double()).abs().max()
        assert tensor.dtype == more[name].dtype and error <= tolerance * max(1, tensor.abs().max()), (name, error)
