"""DiT: the latents of an image are denoised together, at one time step."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fastlatent.models.dit import DiT, DiTBlock
from fastlatent.training.denoising import DenoisingLoss, draw_times, drop_labels, wide
from fastlatent.training.labelled import LabelledObjective


class DitLoss(DenoisingLoss):
    """Latents → mean squared error of the DiT's prediction, in float32 or more."""

    model: DiT

    def forward(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss, nothing else to log).

        Args:
            batch: `latents` [B, C, H, W] normalised, `label` int64 [B], `t` [B], `noise` [B, C, H, W].
        """
        dtype = self.model.final_layer.linear.weight.dtype
        clean, noise = wide(batch, dtype)
        noisy, t = self.noised(clean, noise, batch["t"])
        prediction = self.model(noisy.to(dtype), t, batch["label"])
        return self.error(prediction, clean, noise, batch["t"]), {}


class DitObjective(LabelledObjective):
    """Trains a DiT on latents."""

    blocks: tuple[type[nn.Module], ...] = (DiTBlock,)

    def batch(self, step: int) -> dict[str, Any]:
        batch = self.batches.batch(step)
        draws, config = batch["draws"], self.config
        return {
            "latents": batch["latents"],
            "label": drop_labels(draws, batch["label"], self.class_dropout_prob, config.num_classes),
            "t": draw_times(draws, config.prediction_type, self.flow_times),
            "noise": draws.normal("noise", (config.in_channels, config.input_size, config.input_size)),
        }
