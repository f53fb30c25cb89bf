"""Next-token diffusion (LatentLM): every token of every sequence is denoised at a time step of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastlatent.heads.latentlm import DiffusionBlock
from fastlatent.models.checkpoint import CheckpointConfig
from fastlatent.models.transformer import Block, Transformer
from fastlatent.training.denoising import DenoisingLoss, draw_times, drop_labels, wide
from fastlatent.training.labelled import LabelledObjective
from fastlatent.training.latents import LatentBatches


class NextTokenLoss(DenoisingLoss):
    """Latents → mean squared error of the Transformer's prediction, in float32 or more."""

    model: Transformer

    def forward(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss, nothing else to log).

        Args:
            batch: `latents` [B, N, C] normalised, `label` int64 [B]; `t` [B, M, N] and `noise` [B, M, N, C] of M noised
                copies of each sequence: the backbone runs once, the head M times.
        """
        dtype = self.model.condition_layer.linear.weight.dtype
        latents, noise = wide(batch, dtype)
        condition = self.model.condition(latents.to(dtype), batch["label"])
        clean = latents[:, None].expand(noise.shape)
        noisy, t = self.noised(clean, noise, batch["t"])
        prediction = self.model.denoise(noisy.to(dtype), t, condition[:, None])
        return self.error(prediction, clean, noise, batch["t"]), {}


class NextTokenObjective(LabelledObjective):
    """Trains a Transformer on latents; `batch_mul` is how many noised copies of each sequence a step has."""

    blocks: tuple[type[nn.Module], ...] = (Block, DiffusionBlock)

    def __init__(
        self,
        batches: LatentBatches,
        loss: NextTokenLoss,
        config: CheckpointConfig,
        *,
        batch_mul: int,
        flow_times: str,
        class_dropout_prob: float,
    ) -> None:
        super().__init__(batches, loss, config, flow_times=flow_times, class_dropout_prob=class_dropout_prob)
        self.model, self.batch_mul = loss.model, batch_mul

    def batch(self, step: int) -> dict[str, Any]:
        batch = self.batches.batch(step)
        draws, config = batch["draws"], self.config
        copies = (self.batch_mul, config.num_tokens)
        return {
            "latents": batch["latents"].flatten(2).transpose(1, 2),
            "label": drop_labels(draws, batch["label"], self.class_dropout_prob, config.num_classes),
            "t": draw_times(draws, config.prediction_type, self.flow_times, copies),
            "noise": draws.normal("noise", (*copies, config.in_channels)),
        }

    def compile(self) -> None:
        # The table now: one that appears in the first step would have the model compiled twice.
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            self.model.rope_for(torch.empty(0, dtype=dtype, device=self.model.condition_layer.linear.weight.device))
        super().compile()
