"""Next-token-diffusion checkpoints: a folder with config.json (all sizes) and model.safetensors (published keys)."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from fastlatent.diffusion.targets import PREDICTION_TYPES
from fastlatent.models.transformer import Transformer, TransformerConfig
from fastlatent.pipeline.checkpoints import resolve

WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class CheckpointConfig(TransformerConfig):
    """config.json: the sizes, what the head predicts, and how its latents relate to raw ones.

    Attributes:
        prediction_type: epsilon, v_prediction or flow.
        beta_schedule: of epsilon and v_prediction, over 1000 training steps.
        latents_mean, latents_std: model latents are (raw − mean)/std, per channel (a list) or for all (a number).
        vae: identity of the autoencoder that made the raw latents, and the path it had; null if unknown.
        classes: names of the labels, if known.
    """

    prediction_type: str
    beta_schedule: str = "cosine"
    latents_mean: float | list[float] = 0.0
    latents_std: float | list[float] = 1.0
    vae: dict[str, Any] | None = None
    classes: list[str] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prediction_type not in PREDICTION_TYPES:
            raise ValueError(
                f"config: expected prediction_type {', '.join(PREDICTION_TYPES)}, got {self.prediction_type!r}"
            )
        for name in ("latents_mean", "latents_std"):
            value = getattr(self, name)
            values = value if isinstance(value, list) else [value]
            if not all(type(v) in (int, float) and math.isfinite(v) for v in values) or (
                isinstance(value, list) and len(value) != self.in_channels
            ):
                raise ValueError(
                    f"config: expected {name} to be a finite number, or {self.in_channels} (in_channels), got {value!r}"
                )
            if name == "latents_std" and min(values) <= 0:
                raise ValueError(f"config: expected latents_std above 0, got {value!r}")
        if self.vae is not None and not (isinstance(self.vae, dict) and isinstance(self.vae.get("path", ""), str)):
            raise ValueError(f"config: expected vae to be an object with a path, or null, got {self.vae!r}")
        if (
            not isinstance(self.classes, list)
            or len(self.classes) not in (0, self.num_classes)
            or not all(isinstance(name, str) for name in self.classes)
        ):
            raise ValueError(f"config: expected {self.num_classes} names in classes (num_classes), or none")


def save_checkpoint(folder: Path, config: CheckpointConfig, state: dict[str, torch.Tensor]) -> None:
    """Write config.json and model.safetensors into an existing folder."""
    (folder / "config.json").write_text(json.dumps(dataclasses.asdict(config), indent=2) + "\n", encoding="utf-8")
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / WEIGHTS)


def load_checkpoint(
    path: str | Path, dtype: torch.dtype, device: torch.device | str
) -> tuple[Transformer, CheckpointConfig]:
    """Load a checkpoint folder (also one made by hand), or the newest checkpoint of a run.

    Raises:
        ValueError: files are missing or damaged, or names or shapes of the weights do not fit config.json.
    """
    folder = resolve(path, WEIGHTS, "checkpoint")
    config = read_config(folder / "config.json")
    try:
        state = load_file(folder / WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"checkpoint: {folder / WEIGHTS} does not load: {error}") from None
    with torch.device("meta"):
        model = Transformer(config)
    _check_fit(folder, {name: tuple(t.shape) for name, t in model.state_dict().items()}, state)
    model.load_state_dict({name: tensor.to(device, dtype) for name, tensor in state.items()}, assign=True)
    return model.eval().requires_grad_(False), config


def read_config(path: Path) -> CheckpointConfig:
    """Parse config.json; ValueError names unknown or missing keys."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ValueError(f"checkpoint: {path} does not read as JSON: {error}") from None
    fields = {field.name: field for field in dataclasses.fields(CheckpointConfig)}
    if not isinstance(values, dict):
        raise ValueError(f"checkpoint: expected a JSON object in {path}, got {type(values).__name__}")
    for name in values:
        if name not in fields:
            near = difflib.get_close_matches(name, fields, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(fields)}"
            raise ValueError(f"checkpoint: unknown key {name!r} in {path}; {hint}")
    missing = [
        name
        for name, field in fields.items()
        if name not in values and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ValueError(f"checkpoint: {path} lacks {', '.join(missing)}")
    return CheckpointConfig(**values)


def _check_fit(folder: Path, expected: dict[str, tuple[int, ...]], state: dict[str, torch.Tensor]) -> None:
    for name, tensor in state.items():
        if name not in expected:
            raise ValueError(
                f"checkpoint: {folder / WEIGHTS} holds {name!r}, which a model of config.json's sizes lacks"
            )
        if tuple(tensor.shape) != expected[name]:
            raise ValueError(
                f"checkpoint: {name} has shape {list(tensor.shape)} in {folder / WEIGHTS}, but config.json's sizes "
                f"give {list(expected[name])}: another model's config.json or weights"
            )
    missing = [name for name in expected if name not in state]
    if missing:
        raise ValueError(f"checkpoint: {folder / WEIGHTS} lacks {missing[0]!r} and {len(missing) - 1} more weights")
