"""What train ar and train dit share: latents with labels, and the model that a run begins with."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from fastlatent.config import LabelledTrainConfig, SampleConfig, build
from fastlatent.media.images import to_uint8
from fastlatent.media.sheets import save_sheet
from fastlatent.models.checkpoint import (
    AnyCheckpointConfig,
    CheckpointConfig,
    DenoiserConfig,
    DiTCheckpointConfig,
    load_checkpoint,
    read_config,
)
from fastlatent.pipeline.checkpoints import checkpoints
from fastlatent.training.latents import LatentBatches
from fastlatent.training.loop import PREVIEW
from fastlatent.training.objective import Objective
from fastlatent.workflows.decode_images import load_matching_autoencoder
from fastlatent.workflows.image_files import decode_batch
from fastlatent.workflows.latent_source import LatentSource, open_latents
from fastlatent.workflows.sample import latent_file
from fastlatent.workflows.sample_models import open_samples
from fastlatent.workflows.train import Run, run_training

PREVIEW_IMAGES = 8
Checkpoint = TypeVar("Checkpoint", CheckpointConfig, DiTCheckpointConfig)
# Flags that --init settles.
_SIZES = ("hidden_size", "depth", "num_heads", "num_kv_heads", "mlp_ratio", "diffusion_depth", "patch_size")


@dataclass(frozen=True)
class Start(Generic[Checkpoint]):
    """What a run begins with.

    Attributes:
        checkpoint: of the checkpoints to write.
        weights: of --init, for a run that begins with it.
        batches: normalised as the checkpoint says.
    """

    checkpoint: Checkpoint
    weights: dict[str, Tensor] | None
    batches: LatentBatches


def open_labelled(config: LabelledTrainConfig, command: str) -> LatentSource:
    """The latents that config names; ValueError where one of them has no label."""
    source = open_latents(config)
    if source.unlabelled or not source.classes:
        raise ValueError(
            f"{config.latents}: {command} needs a label for every row; encode a folder with one sub-folder per class"
        )
    return source


def given_sizes(config: LabelledTrainConfig) -> dict[str, Any]:
    """The sizes that are set, in place of those of config.model."""
    return {name: value for name in _SIZES if (value := getattr(config, name, None)) is not None}


def start(
    config: LabelledTrainConfig, run: Run, source: LatentSource, kind: type[Checkpoint], sizes: dict[str, Any]
) -> Start[Checkpoint]:
    """Settle sizes and normalisation: of the run's own newest checkpoint, of --init, or of the settings and the data.

    Raises:
        ValueError: --init is no such model, or contradicts the settings or the data.
    """
    batches, mean, std = source.batches(run, config)
    values: dict[str, Any] = {
        **sizes,
        "in_channels": source.channels,
        "input_size": source.side,
        "num_classes": len(source.classes),
        "prediction_type": config.prediction_type,
        "beta_schedule": config.beta_schedule,
        "latents_mean": mean[0] if config.normalization == "all" else mean,
        "latents_std": std[0] if config.normalization == "all" else std,
        "vae": source.vae,
        "classes": source.classes,
    }
    weights, before = None, None
    if run.resumed_from:
        # What --init gave may be gone by now, and a run never changes its own.
        before = read_config(checkpoints(run.folder)[-1] / "config.json")
        assert isinstance(before, kind), before
    elif config.init is not None:
        model, before = load_checkpoint(config.init, torch.float32, "cpu")
        if not isinstance(before, kind):
            raise ValueError(f"--init {config.init}: expected a model {kind.MODEL!r}, got {before.MODEL!r}")
        _compare(config, source, before)
        weights = model.state_dict()
        if run.rank == 0:
            print(
                f"weights, sizes and normalisation (mean {before.latents_mean}, std {before.latents_std}) of "
                f"{config.init}",
                flush=True,
            )
    if before is not None:
        own = {field.name for field in fields(kind)} - {field.name for field in fields(DenoiserConfig)}
        values |= {name: getattr(before, name) for name in own | {"latents_mean", "latents_std"}}
        parts = (torch.tensor(x).float().expand(source.channels) for x in (before.latents_mean, before.latents_std))
        mean_of, std_of = parts
        batches = LatentBatches(batches.loader, mean=mean_of, std=std_of, seed=config.seed)
    return Start(kind(**values), weights, batches)


def train_labelled(objective: Objective, config: LabelledTrainConfig, run: Run) -> None:
    """Train, and leave preview.png in the run's folder: images of random classes, as `fastlatent sample` makes them."""
    run_training(objective, config, run)
    run.team.on_main(lambda: _save_preview(run, config.seed))


def _save_preview(run: Run, seed: int) -> None:
    wanted = {
        "checkpoint": str(run.folder), "output": "-", "labels": "random", "num": PREVIEW_IMAGES,
        "batch_size": PREVIEW_IMAGES, "seed": seed,
    }  # fmt: skip
    samples = open_samples(build(SampleConfig, {}, wanted), run.device)
    try:
        vae = load_matching_autoencoder(
            None, samples.vae, samples.channels, run.device, torch.float32, allow_other=False
        )
    except ValueError as error:
        print(f"no {PREVIEW}: {error}", flush=True)
        return
    latents = samples.run(0, samples.count, lambda rows: None).cpu()
    # A model that has learned little may give anything.
    pixels = decode_batch(vae, latent_file(samples, [latents.nan_to_num()]).raw()).nan_to_num()
    save_sheet(run.folder / PREVIEW, to_uint8(pixels.numpy()), columns=PREVIEW_IMAGES)


def _compare(config: LabelledTrainConfig, source: LatentSource, before: AnyCheckpointConfig) -> None:
    """ValueError where --init contradicts flags or data."""
    where = f"--init {config.init}"
    flags = given_sizes(config) | {"prediction_type": config.prediction_type}
    if config.prediction_type != "flow":
        flags["beta_schedule"] = config.beta_schedule
    for name, value in flags.items():
        if value != getattr(before, name):
            flag = "--" + name.replace("_", "-")
            raise ValueError(f"{where}: it was trained with {flag} {getattr(before, name)}, but this run has {value}")
    got = (source.channels, source.side, len(source.classes))
    expected = (before.in_channels, before.input_size, before.num_classes)
    if got != expected:
        raise ValueError(
            f"{where}: {_shown(expected)} is what it was trained on, but {config.latents} holds {_shown(got)}"
        )
    for name, value in (before.vae or {}).items():
        if name != "path" and value != source.vae.get(name, value):
            raise ValueError(
                f"{where}: its latents were made by another autoencoder than those of {config.latents} ({name}: "
                f"{value} != {source.vae[name]})"
            )


def _shown(shape: Iterable[int]) -> str:
    channels, side, classes = shape
    return f"{channels}×{side}×{side} latents of {classes:,} classes"
