"""Checkpoints of Transformer and DiT: a folder with config.json (all sizes) and model.safetensors; or published."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import save_file

from fastlatent.diffusion.targets import PREDICTION_TYPES
from fastlatent.models import published
from fastlatent.models.dit import DiT, DiTConfig
from fastlatent.models.transformer import Transformer, TransformerConfig
from fastlatent.pipeline.checkpoints import resolve


@dataclass(frozen=True, kw_only=True)
class DenoiserConfig:
    """What config.json says besides the sizes: what is predicted, and how the model's latents relate to raw ones.

    Attributes:
        prediction_type: epsilon, v_prediction or flow.
        beta_schedule: of epsilon and v_prediction, over 1000 training steps.
        latents_mean, latents_std: model latents are (raw − mean)/std, per channel (a list) or for all (a number).
        vae: identity of the autoencoder that made the raw latents, and the path it had; null if unknown.
        classes: names of the labels, if known.
    """

    # "model" in config.json; it was written from the DiT on, and is the Transformer's where it is missing.
    MODEL: ClassVar[str]

    prediction_type: str
    beta_schedule: str = "cosine"
    latents_mean: float | list[float] = 0.0
    latents_std: float | list[float] = 1.0
    vae: dict[str, Any] | None = None
    classes: list[str] = dataclasses.field(default_factory=list)

    def _check(self, in_channels: int, num_classes: int) -> None:
        if self.prediction_type not in PREDICTION_TYPES:
            raise ValueError(
                f"config: expected prediction_type {', '.join(PREDICTION_TYPES)}, got {self.prediction_type!r}"
            )
        for name in ("latents_mean", "latents_std"):
            value = getattr(self, name)
            values = value if isinstance(value, list) else [value]
            if not all(type(v) in (int, float) and math.isfinite(v) for v in values) or (
                isinstance(value, list) and len(value) != in_channels
            ):
                raise ValueError(
                    f"config: expected {name} to be a finite number, or {in_channels} (in_channels), got {value!r}"
                )
            if name == "latents_std" and min(values) <= 0:
                raise ValueError(f"config: expected latents_std above 0, got {value!r}")
        if self.vae is not None and not (isinstance(self.vae, dict) and isinstance(self.vae.get("path", ""), str)):
            raise ValueError(f"config: expected vae to be an object with a path, or null, got {self.vae!r}")
        if (
            not isinstance(self.classes, list)
            or len(self.classes) not in (0, num_classes)
            or not all(isinstance(name, str) for name in self.classes)
        ):
            raise ValueError(f"config: expected {num_classes} names in classes (num_classes), or none")


@dataclass(frozen=True)
class CheckpointConfig(DenoiserConfig, TransformerConfig):
    """config.json of a next-token Transformer."""

    MODEL: ClassVar[str] = "transformer"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check(self.in_channels, self.num_classes)


@dataclass(frozen=True)
class DiTCheckpointConfig(DenoiserConfig, DiTConfig):
    """config.json of a DiT."""

    MODEL: ClassVar[str] = "dit"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check(self.in_channels, self.num_classes)


AnyCheckpointConfig = CheckpointConfig | DiTCheckpointConfig
_CONFIGS: dict[str, type[AnyCheckpointConfig]] = {"transformer": CheckpointConfig, "dit": DiTCheckpointConfig}


def save_checkpoint(folder: Path, config: AnyCheckpointConfig, state: dict[str, torch.Tensor]) -> None:
    """Write config.json and model.safetensors into an existing folder."""
    values = {"model": config.MODEL, **dataclasses.asdict(config)}
    (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / published.WEIGHTS)


def load_checkpoint(
    path: str | Path,
    dtype: torch.dtype,
    device: torch.device | str,
    *,
    model_config: str | Path | None = None,
    ema: bool = False,
) -> tuple[Transformer, CheckpointConfig] | tuple[DiT, DiTCheckpointConfig]:
    """Load a checkpoint folder (also one made by hand), or the newest checkpoint of a run.

    A folder as the published training script writes it needs no config.json: the weights tell which model it is and
    the sizes, and other_state.pth the normalisation. What they cannot tell comes from a config.json with only that.

    Args:
        model_config: a JSON file to read instead of the folder's config.json; it may be partial.
        ema: take the averaged weights of other_state.pth.

    Raises:
        ValueError: files are missing, damaged or need pickle; names or shapes of the weights do not fit the sizes;
            something is known from nowhere (the message says what to give); there are no averaged weights.
    """
    path = Path(path)
    folder = published.find_weights(path) or resolve(path, published.WEIGHTS, "checkpoint")
    state, other = published.read_weights(folder), published.read_other_state(folder)
    config: AnyCheckpointConfig
    if model_config is None and not published.is_published(folder):
        origin, config = "config.json's", read_config(folder / "config.json")
    else:
        file = Path(model_config) if model_config is not None else folder / "config.json"
        kind = published.model_of(state)
        given = _read_keys(file, kind)[1] if model_config is not None or file.is_file() else {}
        complete = published.complete(folder, given, state, other)
        origin, config = "the first weights'", _CONFIGS[kind](**complete)
    with torch.device("meta"):
        model = Transformer(config) if isinstance(config, CheckpointConfig) else DiT(config)
    _check_fit(folder, origin, {name: tuple(t.shape) for name, t in model.state_dict().items()}, state)
    if ema:
        state = published.averaged(folder, other, model.named_parameters())
    model.load_state_dict({name: tensor.to(device, dtype) for name, tensor in state.items()}, assign=True)
    model.eval().requires_grad_(False)
    if isinstance(model, Transformer):
        assert isinstance(config, CheckpointConfig)
        return model, config
    assert isinstance(config, DiTCheckpointConfig)
    return model, config


def read_config(path: Path) -> AnyCheckpointConfig:
    """Parse config.json; ValueError names unknown or missing keys."""
    kind, values = _read_keys(path)
    missing = [
        field.name
        for field in dataclasses.fields(_CONFIGS[kind])
        if field.name not in values
        and field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ValueError(f"checkpoint: {path} lacks {', '.join(missing)}")
    return _CONFIGS[kind](**values)


def _read_keys(path: Path, expected: str | None = None) -> tuple[str, dict[str, Any]]:
    """Which model a config.json is of, and its other entries; `expected` is what the weights say that it is."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ValueError(f"checkpoint: {path} does not read as JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"checkpoint: expected a JSON object in {path}, got {type(values).__name__}")
    kind = values.pop("model", expected or CheckpointConfig.MODEL)
    if not isinstance(kind, str) or kind not in _CONFIGS or kind != (expected or kind):
        raise ValueError(f"checkpoint: expected model {expected or ' or '.join(_CONFIGS)} in {path}, got {kind!r}")
    names = [field.name for field in dataclasses.fields(_CONFIGS[kind])]
    for name in values:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(names)}"
            raise ValueError(f"checkpoint: unknown key {name!r} in {path}; {hint}")
    return kind, values


def _check_fit(folder: Path, origin: str, expected: dict[str, tuple[int, ...]], state: dict[str, torch.Tensor]) -> None:
    for name, tensor in state.items():
        if name not in expected:
            raise ValueError(f"checkpoint: {folder} holds {name!r}, which a model of {origin} sizes lacks")
        if tuple(tensor.shape) != expected[name]:
            raise ValueError(
                f"checkpoint: {name} has shape {list(tensor.shape)} in {folder}, but {origin} sizes "
                f"give {list(expected[name])}: another model's config.json or weights"
            )
    missing = [name for name in expected if name not in state]
    if missing:
        raise ValueError(f"checkpoint: {folder} lacks {missing[0]!r} and {len(missing) - 1} more weights")
