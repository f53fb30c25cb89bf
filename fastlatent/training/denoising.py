"""What next-token diffusion, DiT and UNets share: times, noised latents and the squared error."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastlatent.diffusion.noise import Draws
from fastlatent.diffusion.schedules import alphas_cumprod
from fastlatent.diffusion.targets import add_noise, target

TRAIN_TIMESTEPS = 1000


def draw_times(draws: Draws, prediction_type: str, flow_times: str, shape: tuple[int, ...] = ()) -> Tensor:
    """Times [B, *shape]: int64, uniform on 0 … 999; of flow float64 in (0, 1), uniform or the sigmoid of N(0, 1)."""
    if prediction_type != "flow":
        return draws.integers("t", TRAIN_TIMESTEPS, shape)
    if flow_times == "logit_normal":
        return draws.normal("t", shape).double().sigmoid()
    return draws.uniform("t", shape)


def drop_labels(draws: Draws, labels: Tensor, probability: float, null: int) -> Tensor:
    """Labels int64 [B], each replaced by the null class with the given probability."""
    return torch.where(draws.uniform("dropout") < probability, null, labels)


class DenoisingLoss(nn.Module):
    """A model, the noise that it is trained under, and the squared error of what it predicts.

    Args:
        model: predicts.
        prediction_type, beta_schedule: what is predicted, under which noise (flow has no schedule).
    """

    def __init__(self, model: nn.Module, *, prediction_type: str, beta_schedule: str) -> None:
        super().__init__()
        self.model = model
        self.prediction_type = prediction_type
        schedule = None if prediction_type == "flow" else alphas_cumprod(beta_schedule, TRAIN_TIMESTEPS)
        self.schedule: Tensor | None
        self.register_buffer("schedule", schedule, persistent=False)

    def noised(self, clean: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Noisy latents, and the time as a network is given it: 0 to 999, or 1000·t of flow."""
        noisy = add_noise(clean, noise, t, self.schedule)
        return noisy, t if self.schedule is not None else TRAIN_TIMESTEPS * t

    def error(self, prediction: Tensor, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Mean squared error, in the dtype of `clean`."""
        wanted = target(self.prediction_type, clean, noise, t, self.schedule)
        return (prediction.to(clean.dtype) - wanted).square().mean()


def wide(batch: dict[str, Any], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Latents and noise of a batch in float32, or wider where the weights' dtype is."""
    work = torch.promote_types(dtype, torch.float32)
    return batch["latents"].to(work), batch["noise"].to(work)
