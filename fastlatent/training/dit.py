"""DiT: the latents of an image are denoised together, at one time step."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fastlatent.models.checkpoint import DiTCheckpointConfig, save_checkpoint
from fastlatent.models.dit import DiT, DiTBlock
from fastlatent.training.denoising import Denoising, draw_times, drop_labels, wide
from fastlatent.training.latents import LatentBatches
from fastlatent.training.objective import Part


class DitLoss(nn.Module):
    """Latents → mean squared error of the prediction, in float32 or more.

    Args:
        model: the DiT.
        prediction_type, beta_schedule: what is predicted, under which noise.
    """

    def __init__(self, model: DiT, *, prediction_type: str, beta_schedule: str) -> None:
        super().__init__()
        self.model = model
        self.denoising = Denoising(prediction_type, beta_schedule)

    def forward(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss, nothing else to log).

        Args:
            batch: `latents` [B, C, H, W] normalised, `label` int64 [B], `t` [B], `noise` [B, C, H, W].
        """
        dtype = self.model.final_layer.linear.weight.dtype
        clean, noise = wide(batch, dtype)
        noisy, t = self.denoising.noised(clean, noise, batch["t"])
        prediction = self.model(noisy.to(dtype), t, batch["label"])
        return self.denoising.loss(prediction, clean, noise, batch["t"]), {}


class DitObjective:
    """Trains a DiT on latents.

    Args:
        batches: of normalised latents with labels.
        config: of the checkpoints to write.
        flow_times: distribution of the times of flow, uniform or logit_normal.
        class_dropout_prob: share of labels replaced by the null class.
    """

    parts: tuple[Part, ...] = ()
    blocks: tuple[type[nn.Module], ...] = (DiTBlock,)

    def __init__(
        self,
        batches: LatentBatches,
        loss: DitLoss,
        config: DiTCheckpointConfig,
        *,
        flow_times: str,
        class_dropout_prob: float,
    ) -> None:
        self.batches, self.config = batches, config
        self.module: nn.Module = loss
        self.flow_times, self.class_dropout_prob = flow_times, class_dropout_prob
        self.steps_per_epoch = batches.steps_per_epoch

    def batch(self, step: int) -> dict[str, Any]:
        batch = self.batches.batch(step)
        draws, config = batch["draws"], self.config
        return {
            "latents": batch["latents"],
            "label": drop_labels(draws, batch["label"], self.class_dropout_prob, config.num_classes),
            "t": draw_times(draws, config.prediction_type, self.flow_times),
            "noise": draws.normal("noise", (config.in_channels, config.input_size, config.input_size)),
        }

    def compile(self) -> None:
        self.module.compile()

    def left_out(self) -> Mapping[str, str]:
        return self.batches.left_out

    def save(self, folder: Path, weights: dict[str, Tensor], *, hurried: bool) -> dict[str, float]:
        save_checkpoint(folder, self.config, {name.removeprefix("model."): t for name, t in weights.items()})
        return {}
