"""What every training run does: hold its folder, compare its settings, resume, train."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import xxhash

from fastlatent.config import TrainConfig
from fastlatent.pipeline.checkpoints import checkpoints, step_of
from fastlatent.store.build import LOCK, Lock
from fastlatent.store.files import canonical_json, parse_json, read_bytes, write_atomic
from fastlatent.training.loop import LoopSettings, Objective, train
from fastlatent.workflows.runtime import keep_config, set_up

CONFIG = "train.yaml"
SETTINGS = ".settings.json"  # what a resumed run is compared with
# What may differ between the runs that one training consists of, without changing its losses.
_FREE = {"out", "device", "threads", "checkpoint_every", "keep_checkpoints"}


@contextlib.contextmanager
def training_run(config: TrainConfig, data: Any) -> Iterator[torch.device]:
    """Hold the run folder for one training, with its config kept and compared; seeds the initial weights.

    `data` is JSON that changes whenever the training data does: a run never goes on with other data than it began with.
    """
    run = Path(config.out)
    run.mkdir(parents=True, exist_ok=True)
    lock = Lock(run)
    try:
        device = set_up(config.device, config.threads)
        now = _settings(config) | {"data": xxhash.xxh3_128_hexdigest(canonical_json(data))}
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
                    f"{previous}: expected a JSON object, got {before!r:.100}; restore it from a copy, or use "
                    "another --out"
                )
            differences = [
                "data: the training data changed since the run began"
                if name == "data"
                else f"{name}: {before.get(name)} (the run) != {value} (now)"
                for name, value in now.items()
                if before.get(name) != value
            ]
            if differences:
                raise ValueError(
                    f"{run} holds a run with other settings; nothing was changed. Use these settings to resume it, "
                    f"or another --out:\n  " + "\n  ".join(differences)
                )
        write_atomic(previous, canonical_json(now))
        keep_config(run / CONFIG, config)
        torch.manual_seed(config.seed)
        yield device
    finally:
        lock.release()


def _settings(config: TrainConfig) -> dict[str, Any]:
    values = {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(config).items()}
    return {k: v for k, v in values.items() if k not in _FREE}


def run_training(objective: Objective, config: TrainConfig, device: torch.device) -> None:
    """Train inside `training_run`, and say where from and where to."""
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(LoopSettings)}
    run = Path(config.out)
    found = checkpoints(run)
    begin = step_of(found[-1]) if found else 0
    if begin:
        print(f"{run}: resuming from step {begin:,}", flush=True)
    train(objective, run, LoopSettings(**values), device)
    print(f"{run}: trained to step {config.steps:,}; newest checkpoint {checkpoints(run)[-1]}")


def count_weights(model: torch.nn.Module) -> str:
    """In millions, for people."""
    return f"{sum(p.numel() for p in model.parameters()) / 1e6:,.2f} M"
