"""What training a Transformer and a DiT have in common: latents with labels, and one kind of checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from fastlatent.models.checkpoint import AnyCheckpointConfig, save_checkpoint
from fastlatent.training.latents import LatentBatches
from fastlatent.training.objective import Part


class LabelledObjective:
    """All but the batch of a step, which each model wants in its own shape.

    Args:
        batches: of normalised latents with labels.
        loss: holds the model.
        config: of the checkpoints to write.
        flow_times: distribution of the times of flow, uniform or logit_normal.
        class_dropout_prob: share of labels replaced by the null class.
    """

    parts: tuple[Part, ...] = ()

    def __init__(
        self,
        batches: LatentBatches,
        loss: nn.Module,
        config: AnyCheckpointConfig,
        *,
        flow_times: str,
        class_dropout_prob: float,
    ) -> None:
        self.batches, self.config, self.module = batches, config, loss
        self.flow_times, self.class_dropout_prob = flow_times, class_dropout_prob
        self.steps_per_epoch = batches.steps_per_epoch

    def compile(self) -> None:
        self.module.compile()

    def left_out(self) -> Mapping[str, str]:
        return self.batches.left_out

    def save(self, folder: Path, weights: dict[str, Tensor], *, hurried: bool) -> dict[str, float]:
        save_checkpoint(folder, self.config, {name.removeprefix("model."): t for name, t in weights.items()})
        return {}
