"""Next-token diffusion (LatentLM): every token of every sequence is denoised at a time step of its own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastlatent.heads.latentlm import DiffusionBlock
from fastlatent.models.checkpoint import CheckpointConfig, save_checkpoint
from fastlatent.models.transformer import Block, Transformer
from fastlatent.training.denoising import Denoising, draw_times, drop_labels, wide
from fastlatent.training.latents import LatentBatches
from fastlatent.training.objective import Part


class NextTokenLoss(nn.Module):
    """Latents → mean squared error of the prediction, in float32 or more.

    Args:
        model: the Transformer.
        prediction_type, beta_schedule: what is predicted, under which noise.
    """

    def __init__(self, model: Transformer, *, prediction_type: str, beta_schedule: str) -> None:
        super().__init__()
        self.model = model
        self.denoising = Denoising(prediction_type, beta_schedule)

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
        noisy, t = self.denoising.noised(clean, noise, batch["t"])
        prediction = self.model.denoise(noisy.to(dtype), t, condition[:, None])
        return self.denoising.loss(prediction, clean, noise, batch["t"]), {}


class NextTokenObjective:
    """Trains a Transformer on latents.

    Args:
        batches: of normalised latents with labels.
        config: of the checkpoints to write.
        batch_mul: noised copies of each sequence.
        flow_times: distribution of the times of flow, uniform or logit_normal.
        class_dropout_prob: share of labels replaced by the null class.
    """

    parts: tuple[Part, ...] = ()
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
        self.batches, self.config = batches, config
        self.module: nn.Module = loss
        self.model = loss.model
        self.batch_mul, self.flow_times, self.class_dropout_prob = batch_mul, flow_times, class_dropout_prob
        self.steps_per_epoch = batches.steps_per_epoch

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
        self.module.compile()

    def left_out(self) -> Mapping[str, str]:
        return self.batches.left_out

    def save(self, folder: Path, weights: dict[str, Tensor], *, hurried: bool) -> dict[str, float]:
        save_checkpoint(folder, self.config, {name.removeprefix("model."): t for name, t in weights.items()})
        return {}
