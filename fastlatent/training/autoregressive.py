"""Next-token diffusion (LatentLM): every token of every sequence is denoised at a time step of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastlatent.data.latents import draw_latents
from fastlatent.data.loader import LatentLoader
from fastlatent.diffusion.schedules import alphas_cumprod
from fastlatent.diffusion.targets import add_noise, target
from fastlatent.models.checkpoint import CheckpointConfig, save_checkpoint
from fastlatent.models.transformer import Transformer


class NextTokenLoss(nn.Module):
    """Latents → mean squared error of the prediction, in float32.

    Args:
        model: the Transformer.
        prediction_type, beta_schedule: what is predicted, under which noise.
        batch_mul: noised copies of each sequence: the backbone runs once, the head batch_mul times.
        class_dropout_prob: share of labels replaced by the null class.
    """

    def __init__(
        self,
        model: Transformer,
        *,
        prediction_type: str,
        beta_schedule: str,
        batch_mul: int,
        class_dropout_prob: float,
    ) -> None:
        super().__init__()
        self.model, self.prediction_type = model, prediction_type
        self.batch_mul, self.class_dropout_prob = batch_mul, class_dropout_prob
        schedule = None if prediction_type == "flow" else alphas_cumprod(beta_schedule)
        self.schedule: Tensor | None
        self.register_buffer("schedule", schedule, persistent=False)

    def forward(self, batch: tuple[Tensor, Tensor], generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """batch: normalised latents [B, N, C] and labels int64 [B]. Returns (loss, nothing else to log)."""
        latents, labels = batch
        options: dict[str, Any] = {"generator": generator, "device": latents.device}
        dropped = torch.rand(labels.shape, **options) < self.class_dropout_prob
        labels = torch.where(dropped, self.model.config.num_classes, labels)
        condition = self.model.condition(latents, labels).repeat_interleave(self.batch_mul, dim=0)
        clean = latents.repeat_interleave(self.batch_mul, dim=0)
        noise = torch.randn(clean.shape, **options)
        if self.schedule is None:
            t = torch.rand(clean.shape[:2], **options)
            t_model = 1000 * t
        else:
            t = torch.randint(len(self.schedule), clean.shape[:2], **options)
            t_model = t
        noisy = add_noise(clean, noise, t, self.schedule)
        prediction = self.model.denoise(noisy, t_model, condition)
        wanted = target(self.prediction_type, clean, noise, t, self.schedule)
        return (prediction.float() - wanted.float()).square().mean(), {}


class NextTokenObjective:
    """Trains a Transformer on a latent dataset.

    Args:
        loader: batches of the dataset.
        config: of the checkpoint to write; its latents_mean and latents_std normalise.
        seed: of posterior noise and mirroring.
        device: where the model is.
    """

    def __init__(
        self,
        loader: LatentLoader,
        loss: NextTokenLoss,
        config: CheckpointConfig,
        seed: int,
        device: torch.device,
    ) -> None:
        self.loader, self.module, self.config, self.seed = loader, loss, config, seed
        mean, std = torch.tensor(config.latents_mean), torch.tensor(config.latents_std)
        channels = (config.in_channels,)  # a number stands for all channels
        self._mean, self._std = (v.float().expand(channels).contiguous().to(device) for v in (mean, std))

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        batch = self.loader.batch(step)
        latents = draw_latents(
            batch["moments" if "moments" in batch else "latents"],
            batch["key_hash"],
            seed=self.seed,
            epoch=batch["epoch"],
            scale=batch.get("scale"),
            has_logvar="moments" in batch,
            mean=self._mean,
            std=self._std,
        )
        return latents.flatten(2).transpose(1, 2), batch["label"]

    def save(self, folder: Path, weights: dict[str, Tensor]) -> None:
        save_checkpoint(folder, self.config, {name.removeprefix("model."): t for name, t in weights.items()})
