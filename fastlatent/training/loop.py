"""The training loop: what differs between models is the objective, everything else is here, top to bottom."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastlatent.models.ema import EMA, EmaSchedule
from fastlatent.pipeline import checkpoints
from fastlatent.pipeline.interrupt import StopRequest
from fastlatent.pipeline.progress import Progress
from fastlatent.training.log import Log
from fastlatent.training.objective import Objective
from fastlatent.training.state import TrainingState, averaged_weights, make_optimisers, write_state
from fastlatent.training.team import Team, whole

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
PREVIEW = "preview.png"


@dataclass(frozen=True)
class LoopSettings:
    """Numbers of one run; see TrainConfig for their meaning."""

    steps: int
    accumulate: int
    learning_rate: float
    lr_schedule: str
    warmup_steps: int
    adam_beta1: float
    adam_beta2: float
    adam_eps: float
    weight_decay: float
    grad_clip: float
    ema_decay: float
    ema_schedule: str
    ema_inv_gamma: float
    ema_power: float
    mixed_precision: str
    compile: bool
    fsdp: bool
    checkpoint_every: int
    keep_checkpoints: int
    trackers: tuple[str, ...]


class Trainer:
    """A model in training: its weights, average and optimisers, and one step of all of them.

    Args:
        objective: what is trained.
        settings: how.
        team: the processes that train together.
    """

    def __init__(self, objective: Objective, settings: LoopSettings, team: Team) -> None:
        self.objective, self.settings, self.team = objective, settings, team
        self.module = objective.module.to(team.device).train()
        if settings.compile:
            objective.compile()
        half = torch.bfloat16 if settings.mixed_precision == "bf16" else None
        self.wrapped = team.wrap(self.module, objective.blocks, shard=settings.fsdp, half=half)
        self.optimisers = make_optimisers(
            self.module, objective.parts, betas=(settings.adam_beta1, settings.adam_beta2), eps=settings.adam_eps,
            weight_decay=settings.weight_decay,
        )  # fmt: skip
        self.ema: EMA | None = None
        if settings.ema_decay:
            decay = EmaSchedule(settings.ema_schedule, settings.ema_decay, settings.ema_inv_gamma, settings.ema_power)
            self.ema = EMA(averaged_weights(self.module, objective.parts), decay)
        self.scaler = torch.amp.GradScaler(team.device.type) if settings.mixed_precision == "fp16" else None
        self.state = TrainingState(self.module, self.optimisers, self.ema, self.scaler)

    def step(self, step: int) -> dict[str, Tensor]:
        """One optimiser step; returns loss, metrics and grad_norm, of this process's samples and on its device."""
        settings, scaler = self.settings, self.scaler
        parts = _divide(self.objective.batch(step), settings.accumulate)
        logged: dict[str, Tensor] = {}
        for i, part in enumerate(parts):
            with self.team.accumulating(self.wrapped, last=i == len(parts) - 1):
                with self._autocast():
                    loss, metrics = self.wrapped(part)
                (scaler.scale(loss / len(parts)) if scaler else loss / len(parts)).backward()
            for name, value in {"loss": loss.detach(), **metrics}.items():
                logged[name] = logged[name] + value / len(parts) if i else value / len(parts)
        for optimiser in self.optimisers:
            if not optimiser.active(step):
                continue
            if scaler:
                scaler.unscale_(optimiser.adamw)
            for group in optimiser.adamw.param_groups:
                peak = optimiser.part.learning_rate if optimiser.part else settings.learning_rate
                group["lr"] = peak * schedule(settings, step)
            norm = nn.utils.clip_grad_norm_(optimiser.parameters.values(), settings.grad_clip or math.inf)
            if not optimiser.part:
                logged["grad_norm"] = whole(norm)
            (scaler.step(optimiser.adamw) if scaler else optimiser.adamw.step())
        if scaler:
            scaler.update()
        self.module.zero_grad(set_to_none=True)
        if self.ema:
            self.ema.update(step)
        return logged

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        dtype = AUTOCAST.get(self.settings.mixed_precision)
        return torch.autocast(self.team.device.type, dtype) if dtype else contextlib.nullcontext()


def train(
    objective: Objective, run: Path, settings: LoopSettings, team: Team, config: Mapping[str, Any] | None = None
) -> None:
    """Train to `settings.steps`, from the newest checkpoint in `run` if there is one.

    Everything random is a function of (seed, epoch, sample), so an interrupted run gives the same losses as one that
    was not, and several processes the same as one but for rounding. What is logged: see `Log`. `config` is what
    trackers show as the run's settings.

    Raises:
        ValueError: the loss became NaN or infinite; the newest checkpoint is from before that.
        KeyboardInterrupt: Ctrl-C or SIGTERM in one of the processes, after a checkpoint was written.
    """
    trainer = Trainer(objective, settings, team)
    team.on_main(lambda: checkpoints.remove_temporaries(run))
    begin = trainer.state.restore(run)
    log = Log(
        run, begin, mean=team.mean, is_main=team.is_main, trackers=settings.trackers,
        config=config or {}, overflows=trainer.scaler is not None,
    )  # fmt: skip

    def save(step: int, *, hurried: bool) -> None:
        log.flush()  # raises where the run has diverged: such weights are not kept
        tensors = trainer.state.collect(keep=team.is_main)
        left_out = team.gather(dict(objective.left_out()))

        def write() -> None:
            log.left_out(left_out)
            _write(objective, run, step, tensors, settings.keep_checkpoints, log, hurried=hurried)

        team.on_main(write)

    total = settings.steps if team.is_main else 0
    try:
        with StopRequest() as stop, Progress("train", total, "steps", begin) as progress:
            for step in range(begin, settings.steps):
                log.add(step, settings.learning_rate * schedule(settings, step), trainer.step(step))
                progress.advance(note=f"loss {log.last_loss:.4g}" if log.last_loss is not None else "")
                stop.requested = team.any(stop.requested)
                last = step + 1 == settings.steps
                if last or (step + 1) % settings.checkpoint_every == 0 or stop.requested:
                    save(step + 1, hurried=stop.requested and not last)
                stop.check()
    finally:
        if team.is_main:
            log.finish()


def schedule(settings: LoopSettings, step: int) -> float:
    """The share of the peak learning rate: linear warm-up, then cosine or linear to 0 at the last step, or constant."""
    if step < settings.warmup_steps:
        return (step + 1) / settings.warmup_steps
    progress = (step - settings.warmup_steps) / max(1, settings.steps - settings.warmup_steps)
    if settings.lr_schedule == "constant":
        return 1.0
    return 1 - progress if settings.lr_schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))


def _divide(batch: dict[str, Any], count: int) -> list[dict[str, Any]]:
    """Every count-th sample each: what is no tensor is the same for all."""
    if count == 1:
        return [batch]
    return [{k: v[i::count] if isinstance(v, Tensor) else v for k, v in batch.items()} for i in range(count)]


def _write(
    objective: Objective, run: Path, step: int, tensors: dict[str, Tensor], keep: int, log: Log, *, hurried: bool
) -> None:
    """One checkpoint: what users load, of the average where there is one, and the training state."""
    weights = {
        name.removeprefix(prefix): tensor
        for prefix in ("weights.", "ema.")
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }
    measured: dict[str, float] = {}

    def write(folder: Path) -> None:
        measured.update(objective.save(folder, weights, hurried=hurried))
        write_state(folder, tensors)

    written = checkpoints.save(run, step, write, keep)
    log.checkpoint(step, measured, list(_pictures(written)))


def _pictures(folder: Path) -> Iterator[Path]:
    if (folder / PREVIEW).exists():
        yield folder / PREVIEW
