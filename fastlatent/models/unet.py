"""UNets of diffusers that denoise latents or pixels, with or without conditions, and their checkpoints.

A checkpoint folder is what diffusers loads by itself: unet/ (config and weights), scheduler_config.json, and beside
them vae_source.json, which says what neither knows: what the conditions are, how they become numbers, how the model's
latents relate to the autoencoder's, and which autoencoder that is.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel, UNet2DModel
from diffusers.models.embeddings import TimestepEmbedding
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastlatent.diffusion.schedules import BETA_RANGES, alphas_cumprod
from fastlatent.pipeline.checkpoints import newest_first
from fastlatent.sources.conditions import parse_conditions

UNETS = {"UNet2DModel": UNet2DModel, "UNet2DConditionModel": UNet2DConditionModel}
PREDICTION_TYPES = ("epsilon", "v_prediction")
FOLDER, SOURCE, PROJECTION = "unet", "vae_source.json", "condition_projection.safetensors"
WEIGHTS = "diffusion_pytorch_model.safetensors"
HEAD = 8  # values per attention head, diffusers' default
# What diffusers calls our schedules; any other is written as its betas.
_DIFFUSERS_SCHEDULES = {"cosine": "squaredcos_cap_v2", "linear": "linear", "scaled_linear": "scaled_linear"}
# For those who read vae_source.json without us.
_VECTOR = "(number - mean)/std, 0 where missing | of each name: 1 where present | dropped: 1, the others 0"


@dataclass(frozen=True)
class UNetConfig:
    """What a UNet's weights mean.

    Attributes:
        conditions: (name, how many numbers) of each, in the order of the vector; () for none.
        condition_mean, condition_std: of the training data, one number for each of theirs.
        prediction_type: epsilon or v_prediction.
        beta_schedule: of `fastlatent.diffusion.schedules`, over 1000 training steps.
        channels, side: of the square latents or images.
        latents_mean, latents_std: model latents are (raw − mean)/std, per channel; zeros and ones for pixels.
        vae: identity of the autoencoder that made the latents, and the path it had; None in pixel space.
    """

    conditions: tuple[tuple[str, int], ...]
    condition_mean: list[float]
    condition_std: list[float]
    prediction_type: str
    beta_schedule: str
    channels: int
    side: int
    latents_mean: list[float]
    latents_std: list[float]
    vae: dict[str, Any] | None

    def __post_init__(self) -> None:
        if self.prediction_type not in PREDICTION_TYPES:
            raise ValueError(
                f"UNet: expected prediction_type {' or '.join(PREDICTION_TYPES)}, got {self.prediction_type!r}"
            )
        numbers = sum(count for _, count in self.conditions)
        expected = {
            "condition_mean": numbers, "condition_std": numbers,
            "latents_mean": self.channels, "latents_std": self.channels,
        }  # fmt: skip
        for name, count in expected.items():
            values = getattr(self, name)
            if len(values) != count or not all(isinstance(v, (int, float)) and math.isfinite(v) for v in values):
                raise ValueError(f"UNet: expected {count} finite numbers in {name}, got {values!r}")
            if name.endswith("_std") and any(value <= 0 for value in values):
                raise ValueError(f"UNet: expected {name} above 0, got {values!r}")

    @property
    def vector_width(self) -> int:
        """Length of a condition vector, 0 without conditions."""
        return sum(count for _, count in self.conditions) + len(self.conditions) + 1 if self.conditions else 0

    @property
    def condition_spec(self) -> str:
        return ",".join(f"{name}:{count}" for name, count in self.conditions) or "none"


class ConditionVectors:
    """Makes what the model is given of samples' conditions.

    Missing (present 0), zero ((0 − mean)/std, present 1) and dropped (all 0 but the last) are three different things;
    the model's weights of the last number are the null that guidance contrasts with.

    Args:
        config: what the conditions are.
        device: of the tensors; its constants are put there once, because a copy at every step would wait for the GPU.
    """

    def __init__(self, config: UNetConfig, device: torch.device | str = "cpu") -> None:
        numbers = torch.tensor([config.condition_mean, config.condition_std], dtype=torch.float64, device=device)
        self._mean, self._std = numbers
        names = [name for name, (_, count) in enumerate(config.conditions) for _ in range(count)]
        self._name_of = torch.tensor(names, dtype=torch.int64, device=device)

    def __call__(self, values: Tensor, present: Tensor, dropped: Tensor) -> Tensor:
        """Condition vectors.

        Args:
            values: floating [B, all numbers], raw, in the order of config.conditions; ignored where missing.
            present: [B, names], 1 or 0.
            dropped: [B], 1 or 0.

        Returns:
            [B, all numbers + names + 1] in the dtype of values.
        """
        present, dropped = present.to(values.dtype), dropped.to(values.dtype)[:, None]
        standard = (values - self._mean.to(values.dtype)) / self._std.to(values.dtype)
        known = torch.where(present.index_select(1, self._name_of) > 0, standard, 0)
        return torch.cat([torch.cat([known, present], dim=1) * (1 - dropped), dropped], dim=1)


class ConditionalUNet(nn.Module):
    """A UNet of diffusers, and what turns a condition vector into what it is given.

    UNet2DConditionModel has a projection of its own. UNet2DModel has none ("identity"): that is `projection` here, the
    same two layers, saved beside its weights. Both add the result to the embedding of the timestep.

    Args:
        kind: name of the class.
        sizes: its constructor's arguments.
        vector_width: of the conditions; 0 for none.

    Raises:
        ValueError: the class cannot be built with these sizes.
    """

    def __init__(self, kind: str, sizes: Mapping[str, Any], vector_width: int) -> None:
        super().__init__()
        self.kind, self.vector_width = kind, vector_width
        self.sizes = {name: value for name, value in sizes.items() if not name.startswith("_")}
        try:
            self.unet: Any = UNETS[kind](**self.sizes)
        except (TypeError, ValueError, ZeroDivisionError) as error:
            raise ValueError(f"UNet: {kind} cannot be built with these sizes: {error}") from None
        embedding = self.unet.time_embedding.linear_2.out_features
        own = kind == "UNet2DModel" and vector_width > 0
        self.projection = TimestepEmbedding(vector_width, embedding) if own else None

    def forward(self, x: Tensor, t: Tensor, vector: Tensor | None = None) -> Tensor:
        """Predict what the model was trained to, from x_t.

        Args:
            x: [B, C, H, W] in the weights' dtype.
            t: int64 [B], timesteps from 0 to 999.
            vector: [B, vector_width] of `ConditionVectors`; None without conditions.

        Returns:
            [B, C, H, W].
        """
        if (vector is None) != (self.vector_width == 0):
            wanted = f"a condition vector of {self.vector_width} numbers" if self.vector_width else "no conditions"
            raise ValueError(f"UNet: expected {wanted}, got {'none' if vector is None else list(vector.shape)}")
        if vector is not None:
            vector = vector.to(x.dtype)
        if self.projection is not None:
            vector = self.projection(vector)
        if self.kind == "UNet2DModel":
            return self.unet(x, t, class_labels=vector).sample
        # diffusers wants a text; our blocks have no cross-attention that could read it.
        width = self.sizes.get("cross_attention_dim", 1280)
        text = x.new_zeros(len(x), 1, width if isinstance(width, int) else max(width))
        return self.unet(x, t, encoder_hidden_states=text, class_labels=vector).sample

    def with_weights(self, weights: Mapping[str, Tensor]) -> ConditionalUNet:
        """A model of the same sizes that has these weights (under the names of this module's parameters)."""
        with torch.device("meta"):
            other = ConditionalUNet(self.kind, self.sizes, self.vector_width)
        other.load_state_dict(dict(weights), assign=True)
        return other.eval().requires_grad_(False)


def unet_sizes(
    config: UNetConfig, *, kind: str, block_out_channels: tuple[int, ...], layers_per_block: int, norm_groups: int
) -> dict[str, Any]:
    """Constructor arguments of a UNet whose levels all have residual blocks, and attention at all but the ends.

    Raises:
        ValueError: a width does not fit the groups or heads.
    """
    for width in block_out_channels:
        if width < 1 or width % norm_groups or width % HEAD:
            raise ValueError(
                f"--block-out-channels {','.join(map(str, block_out_channels))}: expected multiples of --norm-groups "
                f"{norm_groups} and of {HEAD} (an attention head), got {width}"
            )
    levels = len(block_out_channels)
    attention = [0 < level < levels - 1 for level in range(levels)]
    sizes: dict[str, Any] = {
        "sample_size": config.side, "in_channels": config.channels, "out_channels": config.channels,
        "block_out_channels": block_out_channels, "layers_per_block": layers_per_block,
        "norm_num_groups": norm_groups, "attention_head_dim": HEAD, "mid_block_type": "UNetMidBlock2D",
        "down_block_types": tuple("AttnDownBlock2D" if one else "DownBlock2D" for one in attention),
        "up_block_types": tuple("AttnUpBlock2D" if one else "UpBlock2D" for one in reversed(attention)),
    }  # fmt: skip
    return sizes | class_embedding(config, kind)


def class_embedding(config: UNetConfig, kind: str) -> dict[str, Any]:
    """The constructor arguments by which a UNet takes the conditions."""
    if not config.conditions:
        return {}
    if kind == "UNet2DModel":
        return {"class_embed_type": "identity"}
    return {"class_embed_type": "projection", "projection_class_embeddings_input_dim": config.vector_width}


def check_side(sizes: Mapping[str, Any], side: int) -> None:
    """ValueError where the levels cannot halve the side."""
    levels = len(sizes["block_out_channels"])
    factor = 2 ** (levels - 1)
    if side % factor:
        below = side // factor * factor
        raise ValueError(
            f"UNet: {levels} levels halve the side {levels - 1} times, so it must be a multiple of {factor}; got "
            f"{side}. Use fewer levels (--block-out-channels), or a size that gives "
            f"{f'{below} or ' if below else ''}{below + factor}"
        )


def scheduler(config: UNetConfig) -> DDPMScheduler:
    """The scheduler of diffusers with the model's noise schedule.

    Samples are not clipped to [−1, 1], which the class does by default: of latents with unit variance, that takes a
    third. Timesteps begin at the last one ("trailing"), where there is nothing but noise.
    """
    schedule: dict[str, Any] = {}
    if config.beta_schedule in _DIFFUSERS_SCHEDULES:
        schedule["beta_schedule"] = _DIFFUSERS_SCHEDULES[config.beta_schedule]
        if config.beta_schedule in BETA_RANGES:
            schedule["beta_start"], schedule["beta_end"] = BETA_RANGES[config.beta_schedule]
    else:
        alpha_bar = alphas_cumprod(config.beta_schedule)
        before = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])
        schedule["trained_betas"] = (1 - alpha_bar / before).tolist()
    return DDPMScheduler(
        num_train_timesteps=1000, prediction_type=config.prediction_type, clip_sample=False,
        timestep_spacing="trailing", **schedule,
    )  # fmt: skip


def save_unet(folder: Path, model: ConditionalUNet, config: UNetConfig) -> None:
    """Write unet/, scheduler_config.json and vae_source.json into an existing folder."""
    model.unet.save_pretrained(folder / FOLDER, max_shard_size="1000GB")
    if model.projection is not None:
        state = {name: tensor.contiguous() for name, tensor in model.projection.state_dict().items()}
        save_file(state, folder / FOLDER / PROJECTION)
    scheduler(config).save_config(folder)
    path = None if config.vae is None else config.vae.get("path")
    identity = None if config.vae is None else {name: value for name, value in config.vae.items() if name != "path"}
    means, stds = set(config.latents_mean), set(config.latents_std)
    scalars = (
        {"scaling_factor": 1 / config.latents_std[0], "shift_factor": config.latents_mean[0]}
        if len(means) == len(stds) == 1
        else {}
    )
    values = {
        "vae_path": path,
        "condition_spec": config.condition_spec,
        "conditions": {"mean": config.condition_mean, "std": config.condition_std, "vector": _VECTOR},
        "latents_mean": config.latents_mean,
        "latents_std": config.latents_std,
        **scalars,
        "prediction_type": config.prediction_type,
        "beta_schedule": config.beta_schedule,
        "channels": config.channels,
        "side": config.side,
        "vae": identity,
    }
    (folder / SOURCE).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def find_unet(path: str | Path) -> Path | None:
    """The checkpoint folder of a UNet: the newest of the run `path`, or `path` itself; None if there is none."""
    path = Path(path)
    for folder in newest_first(path):
        if (folder / SOURCE).is_file() and (folder / FOLDER / "config.json").is_file():
            return folder
    return None


def read_unet_config(folder: Path) -> UNetConfig:
    """Parse vae_source.json; ValueError if it is damaged."""
    file = folder / SOURCE
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        vae = values["vae"]
        return UNetConfig(
            conditions=parse_conditions(values["condition_spec"]),
            condition_mean=values["conditions"]["mean"],
            condition_std=values["conditions"]["std"],
            prediction_type=values["prediction_type"],
            beta_schedule=values["beta_schedule"],
            channels=values["channels"],
            side=values["side"],
            latents_mean=values["latents_mean"],
            latents_std=values["latents_std"],
            vae=None if vae is None else {**vae, "path": values["vae_path"]},
        )
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        missing = f"lacks {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"UNet: {file} does not describe one: {missing}") from None


def load_unet(
    path: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[ConditionalUNet, UNetConfig]:
    """Load a checkpoint folder, or the newest checkpoint of a run, for sampling (eval, without gradients).

    Raises:
        ValueError: none is there, or files are missing, damaged or do not fit each other.
    """
    folder = find_unet(path)
    if folder is None:
        there = "" if Path(path).exists() else " (it does not exist)"
        raise ValueError(
            f"UNet: expected {FOLDER}/ and {SOURCE} in {path} or in its checkpoint-* folders, as `fastlatent train "
            f"ddpm` writes them{there}"
        )
    config = read_unet_config(folder)
    sizes = read_json_object(folder / FOLDER / "config.json")
    kind = sizes.get("_class_name")
    if kind not in UNETS:
        raise ValueError(f"UNet: expected _class_name {' or '.join(UNETS)} in {folder / FOLDER}, got {kind!r}")
    with torch.device("meta"):
        model = ConditionalUNet(kind, sizes, config.vector_width)
    state = {f"unet.{name}": tensor for name, tensor in _read(folder / FOLDER / WEIGHTS).items()}
    if model.projection is not None:
        state |= {f"projection.{name}": tensor for name, tensor in _read(folder / FOLDER / PROJECTION).items()}
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    for name in sorted(expected.keys() ^ state.keys()):
        raise ValueError(f"UNet: {folder / FOLDER} {'holds' if name in state else 'lacks'} {name!r}, unlike its config")
    for name, tensor in state.items():
        if tensor.shape != expected[name]:
            raise ValueError(
                f"UNet: {name} has shape {list(tensor.shape)} in {folder / FOLDER}, but its config gives "
                f"{list(expected[name])}"
            )
    model.load_state_dict({name: tensor.to(device, dtype) for name, tensor in state.items()}, assign=True)
    return model.eval().requires_grad_(False), config


def read_json_object(file: Path) -> dict[str, Any]:
    """ValueError if the file is not there or is no JSON object."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"UNet: {file} does not read as JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"UNet: expected a JSON object in {file}, got {type(values).__name__}")
    return values


def _read(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"UNet: {file} does not load: {error}") from None
