"""latents → next-token-diffusion Transformer."""

from __future__ import annotations

from fastlatent.config import TrainArConfig
from fastlatent.models.checkpoint import CheckpointConfig
from fastlatent.models.transformer import Transformer, published_size
from fastlatent.training.autoregressive import NextTokenLoss, NextTokenObjective
from fastlatent.workflows.train import count_weights, training_run
from fastlatent.workflows.train_labelled import given_sizes, open_labelled, start, train_labelled


def train_ar(config: TrainArConfig) -> None:
    """Train a next-token-diffusion Transformer on latents; see TrainArConfig."""
    sizes, given = published_size(config.model), given_sizes(config)
    if "num_heads" in given:
        sizes["num_kv_heads"] = given["num_heads"]
    source = open_labelled(config, "train ar")
    with training_run(config, source.data, source.count, source.unused) as run:
        begin = start(config, run, source, CheckpointConfig, {**sizes, **given})
        checkpoint = begin.checkpoint
        model = Transformer(checkpoint)
        model.initialize()
        if begin.weights is not None:
            model.load_state_dict(begin.weights)
        model.gradient_checkpointing = config.gradient_checkpointing
        loss = NextTokenLoss(
            model, prediction_type=checkpoint.prediction_type, beta_schedule=checkpoint.beta_schedule
        ).to(run.device)
        if run.rank == 0:
            print(
                f"{count_weights(model)} weights; {source.count:,} latents of {checkpoint.num_tokens} tokens × "
                f"{checkpoint.in_channels} channels, {checkpoint.num_classes} classes",
                flush=True,
            )
        objective = NextTokenObjective(
            begin.batches,
            loss,
            checkpoint,
            batch_mul=config.batch_mul,
            flow_times=config.flow_times,
            class_dropout_prob=config.class_dropout_prob,
        )
        train_labelled(objective, config, run)
