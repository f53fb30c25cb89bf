"""latents → diffusion Transformer."""

from __future__ import annotations

from fastlatent.config import TrainDitConfig
from fastlatent.models.checkpoint import DiTCheckpointConfig
from fastlatent.models.dit import DiT, published_dit_size
from fastlatent.training.dit import DitLoss, DitObjective
from fastlatent.workflows.train import count_weights, training_run
from fastlatent.workflows.train_labelled import given_sizes, open_labelled, start, train_labelled


def train_dit(config: TrainDitConfig) -> None:
    """Train a diffusion Transformer on latents; see TrainDitConfig."""
    sizes, given = published_dit_size(config.model), given_sizes(config)
    if "num_heads" in given:
        sizes["num_kv_heads"] = given["num_heads"]
    source = open_labelled(config, "train dit")
    with training_run(config, source.data, source.count, source.unused) as run:
        begin = start(config, run, source, DiTCheckpointConfig, {"patch_size": 1, **sizes, **given})
        checkpoint = begin.checkpoint
        model = DiT(checkpoint)
        model.initialize()
        if begin.weights is not None:
            model.load_state_dict(begin.weights)
        model.gradient_checkpointing = config.gradient_checkpointing
        loss = DitLoss(model, prediction_type=checkpoint.prediction_type, beta_schedule=checkpoint.beta_schedule).to(
            run.device
        )
        if run.rank == 0:
            print(
                f"{count_weights(model)} weights; {source.count:,} latents of {checkpoint.num_tokens} tokens × "
                f"{checkpoint.in_channels * checkpoint.patch_size**2} numbers, {checkpoint.num_classes} classes",
                flush=True,
            )
        objective = DitObjective(
            begin.batches,
            loss,
            checkpoint,
            flow_times=config.flow_times,
            class_dropout_prob=config.class_dropout_prob,
        )
        train_labelled(objective, config, run)
