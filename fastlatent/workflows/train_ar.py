"""latent dataset → next-token-diffusion Transformer."""

from __future__ import annotations

import xxhash

from fastlatent.config import TrainArConfig
from fastlatent.data.latents import LatentDataset
from fastlatent.data.loader import LatentLoader
from fastlatent.models.checkpoint import CheckpointConfig
from fastlatent.models.transformer import Transformer, published_size
from fastlatent.training.autoregressive import NextTokenLoss, NextTokenObjective
from fastlatent.workflows.train import count_weights, run_training, training_run


def train_ar(config: TrainArConfig) -> None:
    """Train a next-token-diffusion Transformer on a latent dataset; see TrainArConfig."""
    sizes = published_size(config.model)
    given = {name: value for name in sizes if (value := getattr(config, name)) is not None}
    if "num_heads" in given and "num_kv_heads" not in given:
        given["num_kv_heads"] = given["num_heads"]
    dataset = LatentDataset(config.latents)
    store = dataset.store
    _, _, *sides = dataset.row_shape
    if store.payload == "tokens" or len(sides) != 2 or sides[0] != sides[1]:
        raise ValueError(
            f"{config.latents}: expected square latents of images, got {store.payload} {dataset.row_shape}"
        )
    if (store.label < 0).any() or not store.classes:
        raise ValueError(
            f"{config.latents}: train ar needs a label for every row; encode a folder with one sub-folder per class"
        )
    checkpoint = CheckpointConfig(
        **{**sizes, **given},
        in_channels=store.buckets[0].channels,
        input_size=sides[0],
        num_classes=len(store.classes),
        prediction_type=config.prediction_type,
        beta_schedule=config.beta_schedule,
        latents_mean=store.statistics.latent_mean.tolist(),
        latents_std=store.statistics.latent_std.tolist(),
        vae=dataset.autoencoder,
        classes=store.classes,
    )
    # What a batch is made of; a dataset that was only touched is the same data.
    columns = (store.key_hash, store.label, store.src_xxh3)
    data = [store.fingerprint, store.classes, *(xxhash.xxh3_128_hexdigest(column.tobytes()) for column in columns)]
    with training_run(config, data=data) as device:
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
            f"{count_weights(model)} weights; {len(dataset):,} latents of {checkpoint.num_tokens} tokens × "
            f"{checkpoint.in_channels} channels, {checkpoint.num_classes} classes",
            flush=True,
        )
        run_training(NextTokenObjective(loader, loss, checkpoint, config.seed, device), config, device)
