"""latents or images → diffusion UNet, with or without conditions."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastlatent.config import TrainDdpmConfig, TrainPixelDdpmConfig, UNetTrainConfig
from fastlatent.data.images import ImageLoader
from fastlatent.models.unet import (
    UNETS,
    ConditionalUNet,
    UNetConfig,
    check_side,
    class_embedding,
    load_unet,
    read_json_object,
    unet_sizes,
)
from fastlatent.pipeline.checkpoints import checkpoints
from fastlatent.sources.conditions import parse_conditions
from fastlatent.sources.items import items_digest
from fastlatent.sources.open import open_source
from fastlatent.training.ddpm import DdpmLoss, DdpmObjective, PixelBatches, Renormalised
from fastlatent.training.latents import CONDITION_COLUMNS, Batches
from fastlatent.workflows.condition_statistics import condition_statistics
from fastlatent.workflows.decode_images import load_matching_autoencoder
from fastlatent.workflows.encode_images import parse_range
from fastlatent.workflows.latent_source import open_latents
from fastlatent.workflows.runtime import refuse_output_in_source
from fastlatent.workflows.train import Run, count_weights, run_training, training_run

# Settings that are sizes, under the names that diffusers' configs have for them.
_SIZES = {
    "block_out_channels": "block_out_channels", "layers_per_block": "layers_per_block",
    "norm_groups": "norm_num_groups",
}  # fmt: skip


def train_ddpm(config: TrainDdpmConfig) -> None:
    """Train a UNet on latents; see TrainDdpmConfig."""
    source = open_latents(config)
    mean, std = source.condition_statistics()
    model_config = UNetConfig(
        source.conditions, mean, std, config.prediction_type, config.beta_schedule, source.channels, source.side,
        [0.0] * source.channels, [1.0] * source.channels, source.vae or {},
    )  # fmt: skip
    _check(config, model_config)
    with training_run(config, source.data, source.count, source.unused) as run:
        batches, latents_mean, latents_std = source.batches(run, config)
        measured = dataclasses.replace(model_config, latents_mean=latents_mean, latents_std=latents_std)
        model, model_config = _begin(config, measured, run)
        own: Batches = batches
        if (model_config.latents_mean, model_config.latents_std) != (latents_mean, latents_std):
            own = Renormalised(batches, measured, model_config)
        decode = _decoder(source.vae, source.channels, run) if run.rank == 0 else None
        _train(config, run, own, model, model_config, decode, f"{source.count:,} latents")


def train_pixel_ddpm(config: TrainPixelDdpmConfig) -> None:
    """Train a UNet on images; see TrainPixelDdpmConfig."""
    if config.channels not in (1, 3):
        raise ValueError(f"--channels: expected 1 (grey) or 3 (RGB), got {config.channels}")
    refuse_output_in_source(config.out, config.source)
    spec = config.condition_spec or "none"
    source = open_source(config.source, split=config.split, conditions=spec, root=config.manifest_root)
    conditions = parse_conditions(spec)
    items = source.items if conditions else []
    values, present = ([item.attached[name] for item in items] for name in CONDITION_COLUMNS)
    mean, std = condition_statistics(conditions, [(values, present)])
    model_config = UNetConfig(
        conditions, mean, std, config.prediction_type, config.beta_schedule, config.channels, config.size,
        [0.0] * config.channels, [1.0] * config.channels, None,
    )  # fmt: skip
    _check(config, model_config)
    data = items_digest(source.items, "key", "size", "stamp")
    with training_run(config, data, len(source.items)) as run:
        if run.rank == 0:
            for remark in source.remarks:
                print(remark, flush=True)
        model, model_config = _begin(config, model_config, run)
        loader = ImageLoader(
            source, config.batch_size, size=config.size, channels=config.channels, mirror=config.mirror,
            seed=config.seed, rank=run.rank, world_size=run.world_size,
            preserve_input_precision=config.preserve_input_precision,
            input_range=parse_range(config.input_range) if config.input_range else None, device=run.device,
        )  # fmt: skip
        batches = PixelBatches(loader, config.seed)
        _train(config, run, batches, model, model_config, lambda pixels: pixels, f"{len(source.items):,} images")


def _train(
    config: TrainDdpmConfig | TrainPixelDdpmConfig,
    run: Run,
    batches: Batches,
    model: ConditionalUNet,
    model_config: UNetConfig,
    decode: Callable[[Tensor], Tensor] | None,
    what: str,
) -> None:
    if config.gradient_checkpointing:
        model.unet.enable_gradient_checkpointing()
    if run.rank == 0:
        print(
            f"{count_weights(model)} weights ({model.kind}); {what} of {model_config.channels}×{model_config.side}×"
            f"{model_config.side}; conditions: {model_config.condition_spec}",
            flush=True,
        )
        if config.enable_xformers_memory_efficient_attention:
            print(
                "--enable-xformers-memory-efficient-attention: attention is PyTorch's scaled_dot_product_attention, "
                "which needs no more memory; xformers is not used",
                flush=True,
            )
    loss = DdpmLoss(model, prediction_type=model_config.prediction_type, beta_schedule=model_config.beta_schedule)
    objective = DdpmObjective(
        batches, loss.to(run.device), model_config, cond_dropout_prob=config.cond_dropout_prob,
        previews=config.preview_images, preview_steps=config.preview_inference_steps, decode=decode, seed=config.seed,
        device=run.device,
    )  # fmt: skip
    run_training(objective, config, run, publish_files=True)


def _begin(
    config: TrainDdpmConfig | TrainPixelDdpmConfig, wanted: UNetConfig, run: Run
) -> tuple[ConditionalUNet, UNetConfig]:
    """A new model; that of --init; or the one that a resumed run began with. An older one keeps what its weights mean:
    its sizes, and the mean and std of latents and conditions."""
    origin = run.folder if run.resumed_from else config.init
    if origin is None:
        return _build(config, wanted), wanted
    model, found = load_unet(origin)
    if not run.resumed_from:  # its settings and data are those it began with, whatever --init says now
        _compare(config, model, found, wanted)
    model = model.requires_grad_(True).train()
    return model, dataclasses.replace(found, side=wanted.side, vae=wanted.vae)


def _compare(
    config: TrainDdpmConfig | TrainPixelDdpmConfig, model: ConditionalUNet, found: UNetConfig, wanted: UNetConfig
) -> None:
    """ValueError where --init contradicts flags or data."""
    where = f"--init {config.init}"
    for name in ("conditions", "prediction_type", "beta_schedule", "channels"):
        before, now = getattr(found, name), getattr(wanted, name)
        if before != now:
            raise ValueError(f"{where}: its {name} is {before}, expected {now}: change the settings, or leave it")
    if (found.vae is None) != (wanted.vae is None):
        raise ValueError(f"{where}: expected a model of {'pixels' if wanted.vae is None else 'latents'}")
    check_side(model.sizes, wanted.side)
    sizes = {"unet": model.kind, **{name: model.sizes.get(key) for name, key in _SIZES.items()}}
    for field in dataclasses.fields(UNetTrainConfig):
        given = getattr(config, field.name)
        if field.name in sizes and given != field.default and _shown(given) != _shown(sizes[field.name]):
            flag = "--" + field.name.replace("_", "-")
            raise ValueError(f"{flag} {_shown(given)}: {where} has {_shown(sizes[field.name])}; leave {flag} out")


def _shown(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _check(config: TrainDdpmConfig | TrainPixelDdpmConfig, model_config: UNetConfig) -> None:
    """Say what does not fit before the run's folder is there; of a run that goes on, the model is in there."""
    if checkpoints(Path(config.out)):
        return
    if config.init is not None and config.unet_config is not None:
        raise ValueError("--init and --unet-config: the checkpoint has its own sizes; leave one out")
    if config.init is None:
        with torch.device("meta"):
            _build(config, model_config)


def _build(config: UNetTrainConfig, model_config: UNetConfig) -> ConditionalUNet:
    if config.unet_config is not None:
        kind, sizes = _read_sizes(config, model_config)
    else:
        kind = config.unet
        if kind == "auto":
            kind = "UNet2DConditionModel" if model_config.conditions else "UNet2DModel"
        sizes = unet_sizes(
            model_config, kind=kind, block_out_channels=config.block_out_channels,
            layers_per_block=config.layers_per_block, norm_groups=config.norm_groups,
        )  # fmt: skip
    check_side(sizes, model_config.side)
    return ConditionalUNet(kind, sizes, model_config.vector_width)


def _read_sizes(config: UNetTrainConfig, model_config: UNetConfig) -> tuple[str, dict[str, Any]]:
    """Class and constructor arguments of --unet-config, completed by what the data and conditions say."""
    file = str(config.unet_config)
    values = read_json_object(Path(file))
    kind = values.get("_class_name")
    if kind not in UNETS or config.unet not in ("auto", kind):
        wanted = " or ".join(UNETS) if config.unet == "auto" else f"{config.unet} (--unet)"
        raise ValueError(f"--unet-config {file}: expected _class_name {wanted}, got {kind!r}")
    sizes = {name: value for name, value in values.items() if not name.startswith("_")}
    for name in ("in_channels", "out_channels"):
        if sizes.get(name, model_config.channels) != model_config.channels:
            raise ValueError(
                f"--unet-config {file}: expected {name} {model_config.channels} for this data, got {sizes[name]}"
            )
    if sizes.get("dropout", 0):
        raise ValueError(
            f"--unet-config {file}: expected dropout 0, got {sizes['dropout']}: a resume would not be exact"
        )
    embedding = class_embedding(model_config, kind)
    for name in ("class_embed_type", "num_class_embeds", "projection_class_embeddings_input_dim"):
        if sizes.get(name) not in (None, embedding.get(name)):
            raise ValueError(
                f"--unet-config {file}: expected {name} {embedding.get(name)} for conditions "
                f"{model_config.condition_spec}, got {sizes[name]!r}; leave it out, and it is set"
            )
    side, channels = model_config.side, model_config.channels
    sizes |= {"sample_size": side, "in_channels": channels, "out_channels": channels, **embedding}
    if "block_out_channels" not in sizes:
        raise ValueError(f"--unet-config {file}: lacks block_out_channels")
    check_side(sizes, side)
    with torch.device("meta"):
        model, width = ConditionalUNet(kind, sizes, model_config.vector_width), model_config.vector_width
        try:
            model(torch.zeros(1, channels, side, side), torch.zeros(1).long(), torch.zeros(1, width) if width else None)
        except (RuntimeError, ValueError, TypeError) as error:
            raise ValueError(f"--unet-config {file}: this UNet cannot take the data: {error}") from None
    return str(kind), sizes


def _decoder(vae: dict[str, Any] | None, channels: int, run: Run) -> Callable[[Tensor], Tensor] | None:
    """Decodes with the autoencoder that made the latents; None, and a line that says so, where it is not there.

    It is loaded for every call: between checkpoints its memory belongs to the training.
    """

    def load() -> Any:
        return load_matching_autoencoder(None, vae, channels, run.device, torch.float32, allow_other=False)

    try:
        load()
    except ValueError as error:
        print(f"no previews: {error}", flush=True)
        return None
    return lambda latents: load().decode(latents)
