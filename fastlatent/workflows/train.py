"""What every training run does: join the other processes, hold its folder, compare its settings, resume, train."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash

from fastlatent.config import TrainConfig
from fastlatent.pipeline.checkpoints import checkpoints, publish, step_of
from fastlatent.store.build import LOCK, Lock
from fastlatent.store.files import canonical_json, parse_json, read_bytes, write_atomic
from fastlatent.training.log import check_trackers
from fastlatent.training.loop import LoopSettings, train
from fastlatent.training.objective import Objective
from fastlatent.training.team import Team, check_launcher
from fastlatent.workflows.runtime import keep_config, set_up

CONFIG = "train.yaml"
SETTINGS = ".settings.json"  # what a resumed run is compared with
# What may differ between the runs that one training consists of, without changing its losses but for rounding.
_FREE = {
    "out", "source", "latents", "vae", "preset", "device", "threads", "checkpoint_every", "keep_checkpoints",
    "accumulate", "compile", "gradient_checkpointing", "fsdp", "trackers", "init", "preview_images",
    "preview_inference_steps", "validation", "validation_split", "validation_images", "lpips_weights",
}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """A training that holds its folder.

    Attributes:
        team: the processes that train together, of which this one has `rank`.
        resumed_from: steps done by earlier runs.
    """

    folder: Path
    team: Team
    resumed_from: int

    @property
    def device(self) -> torch.device:
        return self.team.device

    @property
    def rank(self) -> int:
        return self.team.rank

    @property
    def world_size(self) -> int:
        return self.team.world_size


@contextlib.contextmanager
def training_run(config: TrainConfig, data: Any, samples: int, unused: frozenset[str] = frozenset()) -> Iterator[Run]:
    """Hold the run folder for one training, with its config kept and compared; seeds the initial weights.

    `data` is JSON that changes whenever the training data does: a run never goes on with other data than it began with.
    `samples`: how many it holds. `unused`: settings that change nothing here, or nothing that `data` does not tell.

    Raises:
        ValueError: the folder holds something else, a run with other settings, or one that is going on; the processes
            do not divide the batch; a tracker is not installed.
    """
    check_launcher(config.mixed_precision, fsdp=config.fsdp)
    check_trackers(config.trackers)
    if config.fsdp and config.mixed_precision == "fp16":
        raise ValueError("--fsdp with --mixed-precision fp16: its gradient scale is not shared; use bf16")
    run = Path(config.out)
    team = Team(set_up(config.device, config.threads))
    shares = team.world_size * config.accumulate
    if config.batch_size % shares:
        raise ValueError(
            f"--batch-size {config.batch_size} must be a multiple of {shares}: {team.world_size} processes times "
            f"--accumulate {config.accumulate}; use {max(shares, config.batch_size // shares * shares)}"
        )
    if config.batch_size > samples:  # before there is a folder
        raise ValueError(
            f"batch_size: expected 1 to {samples} (the number of samples), got {config.batch_size}; use --batch-size "
            f"{samples}"
        )
    now = _settings(config, unused) | {"data": xxhash.xxh3_128_hexdigest(canonical_json(data))}
    lock = team.on_main(lambda: _hold(run, config, now))
    try:
        found = checkpoints(run)
        begin = step_of(found[-1]) if found else 0
        torch.manual_seed(config.seed)
        yield Run(run, team, begin or 0)
        team.leave()
    finally:
        if lock is not None:
            lock.release()


def _hold(run: Path, config: TrainConfig, now: dict[str, Any]) -> Lock:
    try:
        run.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out {run}: expected a folder, or a place for one: {error.strerror}") from None
    lock = Lock(run)
    try:
        _compare(run, now)
        keep_config(run / CONFIG, config)
    except BaseException:
        lock.release()
        raise
    return lock


def _compare(run: Path, now: dict[str, Any]) -> None:
    previous = run / SETTINGS
    others = [path.name for path in run.iterdir() if path.name != LOCK and not path.name.startswith(".tmp-")]
    if others and not previous.exists():
        raise ValueError(
            f"--out {run}: expected an empty folder or a run of `fastlatent train`, found {', '.join(others[:5])}"
        )
    if previous.exists() and checkpoints(run):
        before = parse_json(read_bytes(previous), str(previous))
        if not isinstance(before, dict):
            raise ValueError(
                f"{previous}: expected a JSON object, got {before!r:.100}; restore it from a copy, or use another --out"
            )
        differences = [
            "data: the training data changed since the run began"
            if name == "data"
            else f"{name}: {before.get(name)} (the run) != {now.get(name)} (now)"
            for name in sorted(before.keys() | now.keys())
            if before.get(name) != now.get(name)
        ]
        if differences:
            raise ValueError(
                f"{run} holds a run with other settings; nothing was changed. Use these settings to resume it, "
                f"or another --out:\n  " + "\n  ".join(differences)
            )
    write_atomic(previous, canonical_json(now))


def _settings(config: TrainConfig, unused: frozenset[str]) -> dict[str, Any]:
    values = {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(config).items()}
    free = _FREE | unused
    if getattr(config, "disc_weight", 0):
        free -= {"accumulate"}  # the discriminator's batch statistics are those of a part
    return {k: v for k, v in values.items() if k not in free}


def run_training(objective: Objective, config: TrainConfig, run: Run, *, publish_files: bool = False) -> None:
    """Train inside `training_run`, and say where from and where to.

    With `publish_files` the run's folder itself gets what users load of the last checkpoint, once training is done.
    """
    steps = config.epochs * objective.steps_per_epoch or config.steps
    compiled = config.compile == "on" or (config.compile == "auto" and run.device.type == "cuda")
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(LoopSettings)}
    settings = LoopSettings(**values | {"steps": steps, "compile": compiled})
    if run.team.is_main:
        processes = f"{run.world_size} processes{' (FSDP2)' if config.fsdp else ''}" if run.world_size > 1 else ""
        how = [str(run.device), processes, config.mixed_precision.replace("no", ""), "torch.compile" * compiled]
        print(f"{run.folder}: {steps:,} steps on {', '.join(filter(None, how))}", flush=True)
        if run.resumed_from:
            print(f"{run.folder}: resuming from step {run.resumed_from:,}", flush=True)
    train(objective, run.folder, settings, run.team, dataclasses.asdict(config))
    if publish_files:
        run.team.on_main(lambda: publish(run.folder))
    if run.team.is_main:
        print(f"{run.folder}: trained to step {steps:,}; newest checkpoint {checkpoints(run.folder)[-1]}")


def count_weights(model: torch.nn.Module) -> str:
    """In millions, for people."""
    return f"{sum(p.numel() for p in model.parameters()) / 1e6:,.2f} M"
