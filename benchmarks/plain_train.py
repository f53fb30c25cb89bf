"""A training loop of latents as one writes it with PyTorch and Accelerate: what `fastlatent.training` must not lose to.

The model's layers are the same; noising, loss, loader and loop are written anew, without anything of fastlatent's.
Worker processes read the rows as one fancy index of a numpy memmap, the fastest that a DataLoader can. Random numbers
are torch.randn's. Latents are taken as they are, without normalising, and the learning rate is constant: both are less
work than ours. Losses are read from the device every 20 steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from plain_head import cosine_alpha_bar
from torch import Tensor, nn

from fastlatent.models.dit import DiT
from fastlatent.models.transformer import Transformer

LOG_STEPS = 20


@dataclass(frozen=True)
class Recipe:
    """Numbers of a run. copies: noised copies of each sequence (of a Transformer)."""

    batch: int
    copies: int
    class_dropout: float
    null: int
    learning_rate: float
    betas: tuple[float, float]
    weight_decay: float
    grad_clip: float
    ema_decay: float
    compile: bool
    autocast: torch.dtype | None
    workers: int


class Rows(torch.utils.data.Dataset):
    """moments.npy [N, 1, 2C, H, W] and labels.npy int64 [N] of a folder."""

    def __init__(self, folder: Path) -> None:
        self.moments = np.load(folder / "moments.npy", mmap_mode="r")
        self.labels = np.load(folder / "labels.npy")

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        return torch.from_numpy(self.moments[indices]), torch.from_numpy(self.labels[indices])


class PlainLoss(nn.Module):
    """The v-prediction's mean squared error under the cosine schedule."""

    def __init__(self, model: Transformer | DiT) -> None:
        super().__init__()
        self.model = model
        alpha_bar = torch.tensor(cosine_alpha_bar(), dtype=torch.float64)
        self.register_buffer("alpha", alpha_bar.sqrt().float())
        self.register_buffer("sigma", (1 - alpha_bar).sqrt().float())

    def forward(self, latents: Tensor, label: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """latents [B, C, H, W], t [B] and noise like latents; of a Transformer [B, N, C], [B, M, N], [B, M, N, C]."""
        alpha, sigma = (table[t].reshape(*t.shape, *[1] * (noise.ndim - t.ndim)) for table in (self.alpha, self.sigma))
        if isinstance(self.model, Transformer):
            condition = self.model.condition(latents, label)
            latents = latents[:, None]
            prediction = self.model.denoise(alpha * latents + sigma * noise, t, condition[:, None])
        else:
            prediction = self.model(alpha * latents + sigma * noise, t, label)
        return F.mse_loss(prediction.float(), alpha * noise - sigma * latents)


class PlainLoop:
    """`step()` trains the model once.

    Args:
        model: on the device.
        folder: of `Rows`.
        average: tensors that become the average of the weights, one for each parameter.
    """

    def __init__(self, model: Transformer | DiT, folder: Path, recipe: Recipe, average: list[Tensor]) -> None:
        self.recipe, self.average = recipe, average
        self.weights = list(model.parameters())
        self.device = self.weights[0].device
        cuda = self.device.type == "cuda"
        trained = [p for p in self.weights if p.requires_grad]
        loader = torch.utils.data.DataLoader(
            Rows(folder), batch_size=recipe.batch, shuffle=True, drop_last=True, collate_fn=lambda batch: batch,
            num_workers=recipe.workers, persistent_workers=recipe.workers > 0, pin_memory=cuda,
        )  # fmt: skip
        adamw = torch.optim.AdamW(
            trained, lr=recipe.learning_rate, betas=recipe.betas, weight_decay=recipe.weight_decay, fused=cuda
        )
        self.accelerator = Accelerator(cpu=not cuda, dataloader_config=DataLoaderConfiguration(non_blocking=True))
        self.loss, self.adamw, self.loader = self.accelerator.prepare(PlainLoss(model), adamw, loader)
        if recipe.compile:
            self.loss.compile()
        self.batches = self._batches()
        self.losses: list[Tensor] = []

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            yield from self.loader

    def step(self) -> None:
        recipe = self.recipe
        moments, label = next(self.batches)
        mean, logvar = moments[:, 0].float().chunk(2, dim=1)
        latents = mean + (0.5 * logvar.clamp(-30, 20)).exp() * torch.randn_like(mean)
        label = torch.where(torch.rand(len(label), device=self.device) < recipe.class_dropout, recipe.null, label)
        shape: tuple[int, ...] = (len(label),)
        if isinstance(self.loss.model, Transformer):
            latents = latents.flatten(2).transpose(1, 2)
            shape = (len(label), recipe.copies, latents.shape[1])
            noise = torch.randn(*shape, latents.shape[2], device=self.device)
        else:
            noise = torch.randn_like(latents)
        t = torch.randint(len(self.loss.alpha), shape, device=self.device)
        with torch.autocast(self.device.type, recipe.autocast, enabled=recipe.autocast is not None):
            loss = self.loss(latents, label, t, noise)
        self.accelerator.backward(loss)
        self.accelerator.clip_grad_norm_(self.weights, recipe.grad_clip)
        self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)
        with torch.no_grad():
            torch._foreach_lerp_(self.average, self.weights, 1 - recipe.ema_decay)
        self.losses.append(loss.detach())
        if len(self.losses) == LOG_STEPS:
            torch.stack(self.losses).tolist()
            self.losses.clear()
