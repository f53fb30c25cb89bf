"""checkpoint of train ar or dit → the layout of the published LatentLM code."""

from __future__ import annotations

import dataclasses
import json
import shutil
import uuid
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from fastlatent.config import ExportConfig, TrainConfig, read_yaml
from fastlatent.models import published
from fastlatent.models.checkpoint import AnyCheckpointConfig, CheckpointConfig, read_config
from fastlatent.models.dit import DiT
from fastlatent.models.transformer import Transformer
from fastlatent.pipeline.checkpoints import TRAINING_STATE, resolve, step_of
from fastlatent.store.files import write_atomic
from fastlatent.workflows.train import CONFIG

_PREFIX = "model."  # of the model inside the module that is trained


def export(config: ExportConfig) -> None:
    """Write OUTPUT/checkpoint-STEP and OUTPUT/latest; see ExportConfig.

    model.safetensors gets the weights as they are trained and other_state.pth their average. A checkpoint without the
    state of its training has only one set of weights, which goes to model.safetensors. config.json says what neither
    file can tell; the published code does not read it.

    Raises:
        ValueError: there is no such checkpoint, its latents are normalised per channel, or OUTPUT holds this step.
    """
    source = resolve(config.checkpoint, published.WEIGHTS, "checkpoint")
    checkpoint = read_config(source / "config.json")
    mean, std = (_one_number(source, checkpoint, name) for name in ("latents_mean", "latents_std"))
    steps = step_of(source) or 0
    output = Path(config.output)
    final = output / f"checkpoint-{steps}"
    if final.exists():
        raise ValueError(f"{final} exists already; nothing was written. Delete it, or use another --output")
    weights, shadow = _weights(source, checkpoint)
    temporary = output / f".tmp-{final.name}-{uuid.uuid4().hex}"
    temporary.mkdir(parents=True)
    try:
        published.write(temporary, weights, shadow, mean=mean, std=std, steps=steps, ema_decay=_ema_decay(source))
        told = {"model": checkpoint.MODEL, **dataclasses.asdict(checkpoint)}
        del told["latents_mean"], told["latents_std"]  # other_state.pth has them as factors, rounded once more
        (temporary / "config.json").write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
        temporary.rename(final)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    write_atomic(output / "latest", str(final.resolve()).encode())
    average = "and their average" if shadow else "without an average"
    print(f"{final}: {len(weights)} weights of {source}, {average}")


def _one_number(source: Path, checkpoint: AnyCheckpointConfig, name: str) -> float:
    value = getattr(checkpoint, name)
    values = set(value) if isinstance(value, list) else {value}
    if len(values) > 1:
        raise ValueError(
            f"{source}: {name} differs from channel to channel, but the published layout has one scaling_factor and "
            "one bias_factor for all; train with --normalization all"
        )
    return float(values.pop())


def _weights(source: Path, checkpoint: AnyCheckpointConfig) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
    """The weights as they are trained, and their average in the order of the model's parameters, if there is one."""
    with torch.device("meta"):
        model = Transformer(checkpoint) if isinstance(checkpoint, CheckpointConfig) else DiT(checkpoint)
    names = [name for name, _ in model.named_parameters()]
    file = source / TRAINING_STATE
    try:
        if not file.is_file():
            state = load_file(source / published.WEIGHTS)
            return {name: state[name] for name in names}, None
        with safe_open(file, "pt") as tensors:
            weights = {name: tensors.get_tensor(f"weights.{_PREFIX}{name}") for name in names}
            averaged = f"ema.{_PREFIX}{names[0]}" in tensors.keys()  # noqa: SIM118 (it is no dict)
            shadow = {name: tensors.get_tensor(f"ema.{_PREFIX}{name}") for name in names} if averaged else None
        return weights, shadow
    except (SafetensorError, KeyError, OSError) as error:
        raise ValueError(f"{source}: its weights do not load: {error}") from None


def _ema_decay(source: Path) -> float:
    """Of the run that the checkpoint lies in."""
    file = source.parent / CONFIG
    return float(read_yaml(str(file)).get("ema_decay", 0) if file.is_file() else 0) or TrainConfig.ema_decay
