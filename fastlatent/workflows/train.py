"""latent dataset or images → checkpoints."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import xxhash

from fastlatent.config import TrainArConfig, TrainConfig, TrainVaeConfig
from fastlatent.pipeline.checkpoints import checkpoints, step_of
from fastlatent.store.build import LOCK, Lock
from fastlatent.store.files import canonical_json, parse_json, read_bytes, write_atomic
from fastlatent.training.loop import LoopSettings, Objective, train
from fastlatent.workflows.runtime import keep_config, refuse_output_in_source, set_up

CONFIG = "train.yaml"
SETTINGS = ".settings.json"  # what a resumed run is compared with
# What may differ between the runs that one training consists of, without changing its losses.
_FREE = {"out", "device", "threads", "checkpoint_every", "keep_checkpoints"}


def train_vae(config: TrainVaeConfig) -> None:
    """Train an AutoencoderKL on a folder of images; see TrainVaeConfig."""
    from diffusers import AutoencoderKL

    from fastlatent.data.images import ImageLoader
    from fastlatent.sources.image_folder import scan_image_folder
    from fastlatent.training.vae import ReconstructionLoss, VaeObjective

    levels = len(config.block_out_channels)
    factor = 2 ** (levels - 1)
    if config.size % factor:
        raise ValueError(f"--size {config.size}: {levels} levels in --block-out-channels need a multiple of {factor}")
    if config.channels not in (1, 3):
        raise ValueError(f"--channels: expected 1 (grey) or 3 (RGB), got {config.channels}")
    refuse_output_in_source(config.out, config.source)
    if any(width < 1 or width % config.norm_groups for width in config.block_out_channels):
        raise ValueError(
            f"--norm-groups {config.norm_groups} must divide every width of --block-out-channels "
            f"{','.join(map(str, config.block_out_channels))}"
        )
    folder = scan_image_folder(config.source)
    batch_size = config.batch_size
    loader = ImageLoader(
        folder.items,
        batch_size,
        size=config.size,
        channels=config.channels,
        mirror=config.mirror,
        seed=config.seed,
    )
    with _run(config, data=[item.key for item in folder.items]) as device:
        model = AutoencoderKL(
            in_channels=config.channels,
            out_channels=config.channels,
            latent_channels=config.latent_channels,
            block_out_channels=config.block_out_channels,
            down_block_types=["DownEncoderBlock2D"] * levels,
            up_block_types=["UpDecoderBlock2D"] * levels,
            layers_per_block=config.layers_per_block,
            norm_num_groups=config.norm_groups,
            sample_size=config.size,
        ).to(device)
        loss = ReconstructionLoss(
            model, mse_weight=config.mse_weight, l1_weight=config.l1_weight, kl_weight=config.kl_weight
        )
        latent = config.latent_channels * (config.size // factor) ** 2
        print(
            f"{_count(model)} weights; {len(folder.items):,} images; a latent holds {latent} numbers, "
            f"an image {config.channels * config.size**2}",
            flush=True,
        )
        _train(VaeObjective(loader, loss, device), config, device)
    if loader.failures:
        print(f"{len(loader.failures)} files could not be decoded and were left out:")
        for key, reason in list(loader.failures.items())[:20]:
            print(f"  {key!a}: {reason}")


def train_ar(config: TrainArConfig) -> None:
    """Train a next-token-diffusion Transformer on a latent dataset; see TrainArConfig."""
    from fastlatent.data.latents import LatentDataset, LatentLoader
    from fastlatent.models.checkpoint import CheckpointConfig
    from fastlatent.models.transformer import Transformer, published_size
    from fastlatent.training.autoregressive import NextTokenLoss, NextTokenObjective
    from fastlatent.workflows.decode import autoencoder_record

    sizes = published_size(config.model)
    given = {name: value for name in sizes if (value := getattr(config, name)) is not None}
    if "num_heads" in given and "num_kv_heads" not in given:
        given["num_kv_heads"] = given["num_heads"]
    dataset = LatentDataset(config.latents)
    store = dataset.store
    _, channels, height, width = store.buckets[0].shape
    if height != width:
        raise ValueError(f"{config.latents}: expected square latents, got {height}×{width}")
    if (store.label < 0).any() or not store.classes:
        raise ValueError(
            f"{config.latents}: train ar needs a label for every row; encode a folder with one sub-folder per class"
        )
    checkpoint = CheckpointConfig(
        **{**sizes, **given},
        in_channels=channels // 2,
        input_size=height,
        num_classes=len(store.classes),
        prediction_type=config.prediction_type,
        beta_schedule=config.beta_schedule,
        latents_mean=store.statistics.latent_mean.tolist(),
        latents_std=store.statistics.latent_std.tolist(),
        vae=autoencoder_record(store.provenance),
        classes=store.classes,
    )
    # What a batch is made of; a dataset that was only touched is the same data.
    columns = (store.key_hash, store.label, store.src_xxh3)
    data = [store.fingerprint, store.classes, *(xxhash.xxh3_128_hexdigest(column.tobytes()) for column in columns)]
    with _run(config, data=data) as device:
        loader = LatentLoader(dataset, config.batch_size, seed=config.seed, device=device)
        model = Transformer(checkpoint)
        model.initialize()
        loss = NextTokenLoss(
            model.to(device),
            prediction_type=config.prediction_type,
            beta_schedule=config.beta_schedule,
            batch_mul=config.batch_mul,
            class_dropout_prob=config.class_dropout_prob,
        ).to(device)
        print(
            f"{_count(model)} weights; {len(dataset):,} latents of {checkpoint.num_tokens} tokens × "
            f"{checkpoint.in_channels} channels, {checkpoint.num_classes} classes",
            flush=True,
        )
        _train(NextTokenObjective(loader, loss, checkpoint, config.seed, device), config, device)


@contextlib.contextmanager
def _run(config: TrainConfig, data: Any) -> Iterator[torch.device]:
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
                    f"{previous}: expected a JSON object, got {before!r:.100}; delete it to resume unchecked"
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


def _train(objective: Objective, config: TrainConfig, device: torch.device) -> None:
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(LoopSettings)}
    run = Path(config.out)
    found = checkpoints(run)
    begin = step_of(found[-1]) if found else 0
    if begin:
        print(f"{run}: resuming from step {begin:,}", flush=True)
    train(objective, run, LoopSettings(**values), device)
    print(f"{run}: trained to step {config.steps:,}; newest checkpoint {checkpoints(run)[-1]}")


def _count(model: torch.nn.Module) -> str:
    return f"{sum(p.numel() for p in model.parameters()) / 1e6:,.2f} M"
