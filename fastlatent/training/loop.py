"""The training loop: what differs between models is the objective, everything else is here, top to bottom."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastlatent.media.sheets import save_loss_curve
from fastlatent.models.ema import EMA
from fastlatent.pipeline import checkpoints
from fastlatent.pipeline.interrupt import StopRequest
from fastlatent.pipeline.progress import Progress
from fastlatent.store.files import write_atomic

LOG = "log.jsonl"
STATE = "training.safetensors"
ADAM_BETAS = (0.9, 0.98)
# Losses stay on the device until so many steps are logged at once: reading one waits for the GPU.
FLUSH_STEPS = 20


class Objective(Protocol):
    """A model in training, and the batches that it learns from."""

    @property
    def module(self) -> nn.Module:
        """`module(batch, generator)` → (loss, {name: scalar} to log)."""
        ...

    def batch(self, step: int) -> Any:
        """The batch of a step: a function of (data, seed, step) alone."""
        ...

    def save(self, folder: Path, weights: dict[str, Tensor]) -> None:
        """Write what users load: config and weights, given under the module's parameter names."""
        ...


@dataclass(frozen=True)
class LoopSettings:
    """Numbers of one run; see TrainConfig for their meaning."""

    steps: int
    learning_rate: float
    warmup_steps: int
    weight_decay: float
    grad_clip: float
    ema_decay: float
    mixed_precision: str
    checkpoint_every: int
    keep_checkpoints: int
    seed: int


def train(objective: Objective, run: Path, settings: LoopSettings, device: torch.device) -> None:
    """Train to `settings.steps`, from the newest checkpoint in `run` if there is one.

    Everything random is a function of (seed, step), so an interrupted run gives the same losses as one that was not.
    Losses go to run/log.jsonl and run/loss.png.

    Raises:
        ValueError: the loss became NaN or infinite; the newest checkpoint is from before that.
        KeyboardInterrupt: Ctrl-C or SIGTERM, after a checkpoint was written.
    """
    module = objective.module
    module.train()
    optimizer = torch.optim.AdamW(_parameter_groups(module, settings.weight_decay), lr=0.0, betas=ADAM_BETAS)
    ema = EMA(module, settings.ema_decay) if settings.ema_decay else None
    checkpoints.remove_temporaries(run)
    begin = _restore(run, module, optimizer, ema)
    log = Log(run / LOG, begin)
    generator = torch.Generator(device)
    autocast = torch.autocast(device.type, torch.bfloat16) if settings.mixed_precision == "bf16" else None

    def save(step: int) -> None:
        log.flush()
        checkpoints.save(run, step, lambda folder: _write(folder, objective, optimizer, ema), settings.keep_checkpoints)

    with StopRequest() as stop, Progress("train", settings.steps, "steps", begin) as progress:
        for step in range(begin, settings.steps):
            rate = learning_rate(settings, step)
            for group in optimizer.param_groups:
                group["lr"] = rate
            generator.manual_seed(step_seed(settings.seed, step))
            batch = objective.batch(step)
            with autocast or contextlib.nullcontext():
                loss, metrics = module(batch, generator)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            norm = nn.utils.clip_grad_norm_(module.parameters(), settings.grad_clip or math.inf)
            optimizer.step()
            if ema:
                ema.update(step)
            log.add(step, rate, {"loss": loss.detach(), **metrics, "grad_norm": norm})
            progress.advance(note=f"loss {log.last_loss:.4g}" if log.last_loss is not None else "")
            done = step + 1
            if done % settings.checkpoint_every == 0 or done == settings.steps or stop.requested:
                save(done)
            stop.check()
    log.plot(run / "loss.png")


def learning_rate(settings: LoopSettings, step: int) -> float:
    """Linear warm-up, then a cosine from the peak to 0 at the last step."""
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    progress = (step - settings.warmup_steps) / max(1, settings.steps - settings.warmup_steps)
    return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


def step_seed(seed: int, step: int) -> int:
    """The seed of everything random in a step."""
    return int(np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)[0]) >> 1


class Log:
    """run/log.jsonl: one line per step. Lines of steps after `begin` are of a run that was cut off, and go."""

    def __init__(self, path: Path, begin: int) -> None:
        self.path = path
        self._pending: list[tuple[int, float, dict[str, Tensor]]] = []
        kept = [line for line in _lines(path) if line["step"] < begin]
        write_atomic(path, "".join(json.dumps(line) + "\n" for line in kept).encode())
        self.last_loss: float | None = kept[-1]["loss"] if kept else None

    def add(self, step: int, rate: float, values: dict[str, Tensor]) -> None:
        self._pending.append((step, rate, values))
        if len(self._pending) >= FLUSH_STEPS:
            self.flush()

    def flush(self) -> None:
        """Write what is pending.

        Raises:
            ValueError: a loss or gradient is not finite.
        """
        if not self._pending:
            return
        names = list(self._pending[0][2])
        table = torch.stack([torch.stack([v.float() for v in values.values()]) for _, _, values in self._pending])
        with open(self.path, "a", encoding="utf-8") as file:
            for (step, rate, _), row in zip(self._pending, table.tolist(), strict=True):
                values = dict(zip(names, row, strict=True))
                file.write(json.dumps({"step": step, "learning_rate": rate, **values}) + "\n")
                for name in ("loss", "grad_norm"):
                    if not math.isfinite(values[name]):
                        raise ValueError(
                            f"{name} became {values[name]} at step {step}: the run diverged. Its newest checkpoint in "
                            f"{self.path.parent} is from before that; use a lower --learning-rate in another --out"
                        )
        self.last_loss = values["loss"]
        self._pending.clear()

    def plot(self, path: Path) -> None:
        lines = list(_lines(self.path))
        # Means of at most 500 points: a curve of 200,000 steps is otherwise a band.
        width = max(1, len(lines) // 500)
        points = [lines[i : i + width] for i in range(0, len(lines), width)]
        loss = [float(np.mean([line["loss"] for line in point])) for point in points]
        save_loss_curve(path, [point[-1]["step"] + 1 for point in points], {"loss": loss}, "training loss")


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            # A torn last line is of a step after the newest checkpoint.
            with contextlib.suppress(ValueError):
                yield json.loads(line)


def _parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    matrices = [p for p in module.parameters() if p.requires_grad and p.ndim >= 2]
    vectors = [p for p in module.parameters() if p.requires_grad and p.ndim < 2]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]


def _write(folder: Path, objective: Objective, optimizer: torch.optim.Optimizer, ema: EMA | None) -> None:
    weights = {name: p.detach() for name, p in objective.module.named_parameters()}
    objective.save(folder, ema.shadow if ema else weights)
    state = {f"weights.{name}": tensor for name, tensor in weights.items()}
    if ema:
        state |= {f"ema.{name}": tensor for name, tensor in ema.shadow.items()}
    for index, slots in optimizer.state_dict()["state"].items():
        state |= {f"optimizer.{index}.{slot}": tensor for slot, tensor in slots.items()}
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / STATE)


def _restore(run: Path, module: nn.Module, optimizer: torch.optim.Optimizer, ema: EMA | None) -> int:
    """Load the newest checkpoint; returns the number of steps done."""
    found = checkpoints.checkpoints(run)
    if not found:
        return 0
    try:
        state = load_file(found[-1] / STATE)
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{found[-1] / STATE} does not load ({error}); delete {found[-1]} to resume from the checkpoint before it"
        ) from None
    own = {name: p.detach() for name, p in module.named_parameters()}
    targets = {f"weights.{name}": tensor for name, tensor in own.items()}
    if ema:
        targets |= {f"ema.{name}": tensor for name, tensor in ema.shadow.items()}
    slots: dict[int, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        if name.startswith("optimizer."):
            _, index, slot = name.split(".")
            slots.setdefault(int(index), {})[slot] = tensor
        elif name not in targets or targets[name].shape != tensor.shape:
            raise ValueError(
                f"{found[-1] / STATE}: {name} {list(tensor.shape)} does not fit this model; use another --out"
            )
        else:
            targets.pop(name).copy_(tensor)
    if targets:
        raise ValueError(f"{found[-1] / STATE} lacks {next(iter(targets))}; use another --out")
    optimizer.load_state_dict({**optimizer.state_dict(), "state": slots})
    step = checkpoints.step_of(found[-1])
    assert step is not None
    return step
