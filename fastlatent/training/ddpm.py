"""Diffusion UNets on latents or pixels: the regression target under given noise, and previews at every checkpoint."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from fastlatent.data.images import ImageLoader
from fastlatent.diffusion.noise import Draws
from fastlatent.media.images import to_uint8
from fastlatent.media.sheets import save_png, save_sheet
from fastlatent.models.unet import ConditionalUNet, ConditionVectors, UNetConfig, save_unet, scheduler
from fastlatent.training.denoising import TRAIN_TIMESTEPS, DenoisingLoss, wide
from fastlatent.training.latents import Batches
from fastlatent.training.objective import Part

SHEET_COLUMNS = 4
_STEP = re.compile(r"checkpoint-0*(\d+)")


class DdpmLoss(DenoisingLoss):
    """Mean squared error of the UNet's prediction, in float32 or more."""

    model: ConditionalUNet

    def forward(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """batch: latents and noise [B, C, H, W], t int64 [B], and with conditions vector [B, K]."""
        dtype = next(self.model.parameters()).dtype
        clean, noise = wide(batch, dtype)
        noisy, t = self.noised(clean, noise, batch["t"])
        return self.error(self.model(noisy.to(dtype), t, batch.get("vector")), clean, noise, t), {}


class PixelBatches:
    """Images in the place of latents."""

    def __init__(self, loader: ImageLoader, seed: int) -> None:
        self.loader, self.seed = loader, seed

    @property
    def steps_per_epoch(self) -> int:
        return self.loader.steps_per_epoch

    @property
    def left_out(self) -> Mapping[str, str]:
        return self.loader.left_out

    def batch(self, step: int) -> dict[str, Any]:
        batch = self.loader.batch(step)
        return {
            **batch,
            "latents": batch["pixels"],
            "draws": Draws(ids=batch["key_hash"], seed=self.seed, epoch=batch["epoch"]),
        }


class Renormalised:
    """Latents that were normalised with one mean and std, as another model wants them."""

    def __init__(self, batches: Batches, given: UNetConfig, wanted: UNetConfig) -> None:
        self.batches = batches
        means, stds = (
            [torch.tensor(values, dtype=torch.float64)[:, None, None] for values in pair]
            for pair in ((given.latents_mean, wanted.latents_mean), (given.latents_std, wanted.latents_std))
        )
        self._scale, self._shift = stds[0] / stds[1], (means[0] - means[1]) / stds[1]

    @property
    def steps_per_epoch(self) -> int:
        return self.batches.steps_per_epoch

    @property
    def left_out(self) -> Mapping[str, str]:
        return self.batches.left_out

    def batch(self, step: int) -> dict[str, Any]:
        batch = self.batches.batch(step)
        latents = batch["latents"]
        self._scale, self._shift = self._scale.to(latents), self._shift.to(latents)  # copies at the first step only
        return {**batch, "latents": latents * self._scale + self._shift}


class DdpmObjective:
    """Trains a UNet.

    Args:
        batches: what it learns from.
        loss: holds the model.
        config: what the model's weights mean.
        cond_dropout_prob: share of samples whose conditions are dropped, all together.
        previews: how many images every checkpoint shows; their conditions are those of the first samples.
        preview_steps: denoising steps of those.
        decode: raw latents [B, C, H, W] → pixels in [−1, 1], or pixels as they are; None: no previews.
        seed: of timesteps, noise, dropout and previews.
    """

    parts: tuple[Part, ...] = ()
    blocks: tuple[type[nn.Module], ...] = (ResnetBlock2D, Attention)

    def __init__(
        self,
        batches: Batches,
        loss: DdpmLoss,
        config: UNetConfig,
        *,
        cond_dropout_prob: float,
        previews: int,
        preview_steps: int,
        decode: Callable[[Tensor], Tensor] | None,
        seed: int,
        device: torch.device,
    ) -> None:
        self.batches, self.config, self.decode = batches, config, decode
        self.loss = loss
        self.module: nn.Module = loss
        self.cond_dropout_prob, self.preview_steps = cond_dropout_prob, preview_steps
        self.previews, self.seed, self.device = previews, seed, device
        self.steps_per_epoch = batches.steps_per_epoch
        self._vectors = ConditionVectors(config, device) if config.conditions else None
        # Now, and not at a checkpoint, where it would disturb the batches that are read ahead.
        self._shown = self._first_conditions(self._vectors, previews) if self._vectors else None

    def batch(self, step: int) -> dict[str, Any]:
        batch = self.batches.batch(step)
        latents, draws = batch["latents"], batch["draws"]
        made = {
            "latents": latents,
            "noise": draws.normal("noise", tuple(latents.shape[1:])),
            "t": draws.integers("t", TRAIN_TIMESTEPS),
        }
        if self._vectors is not None:
            dropped = draws.uniform("dropout") < self.cond_dropout_prob
            made["vector"] = self._vectors(batch["condition"], batch["condition_present"], dropped)
        return made

    def compile(self) -> None:
        self.module.compile()

    def left_out(self) -> Mapping[str, str]:
        return self.batches.left_out

    def save(self, folder: Path, weights: dict[str, Tensor], *, hurried: bool) -> dict[str, float]:
        """Write what diffusers loads; unless `hurried` also previews: images/sample_step{N}_img{i}.png, preview.png."""
        names = {name.removeprefix("model."): tensor for name, tensor in weights.items()}
        model = self.loss.model.with_weights(names)
        save_unet(folder, model, self.config)
        if self.decode is None or hurried:
            return {}
        pixels = self.decode(self._preview(model.to(self.device, torch.float32)))
        # Weights of a run that is about to diverge give NaN; the next step's loss tells, and must be reached.
        images = to_uint8(pixels.detach().nan_to_num().float().cpu().numpy())
        step = _STEP.search(folder.name)
        for i, image in enumerate(images):
            save_png(folder / "images" / f"sample_step{step[1] if step else 0}_img{i}.png", image)
        save_sheet(folder / "preview.png", images, columns=SHEET_COLUMNS)
        return {}

    @torch.inference_mode()
    def _preview(self, model: ConditionalUNet) -> Tensor:
        """Raw latents [previews, C, H, W], by diffusers' DDPM scheduler and without guidance."""
        config, count = self.config, self.previews
        # Drawn on the CPU: the same previews on every device.
        generator = torch.Generator().manual_seed(self.seed)
        x = torch.randn(count, config.channels, config.side, config.side, generator=generator).to(self.device)
        solver = scheduler(config)
        solver.set_timesteps(self.preview_steps)
        for t in solver.timesteps.tolist():
            predicted = model(x, torch.full((count,), t, device=self.device), self._shown)
            x = solver.step(predicted, t, x, generator=generator).prev_sample
        mean, std = (x.new_tensor(values)[:, None, None] for values in (config.latents_mean, config.latents_std))
        return x * std + mean

    def _first_conditions(self, vectors: ConditionVectors, count: int) -> Tensor:
        """Condition vectors [count, K] of the first batches' samples, again from the first where those are too few."""
        found: list[Tensor] = []
        for step in range(self.steps_per_epoch):
            batch = self.batches.batch(step)
            values, present = batch["condition"], batch["condition_present"]
            found += vectors(values, present, torch.zeros_like(present[:, 0])).unbind()
            if len(found) >= count:
                break
        return torch.stack([found[i % len(found)] for i in range(count)])
