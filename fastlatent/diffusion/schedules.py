"""Noise schedules of discrete-time diffusion, as their cumulative products of 1 - beta."""

from __future__ import annotations

import torch
from torch import Tensor

SCHEDULES = ("cosine", "linear", "scaled_linear")


def alphas_cumprod(name: str, num_train_timesteps: int = 1000) -> Tensor:
    """Return alpha_bar[t] for t in [0, num_train_timesteps), so that x_t = sqrt(ab) x0 + sqrt(1 - ab) noise.

    Schedules:
        cosine: Nichol & Dhariwal 2021, betas capped at 0.999 (diffusers calls it squaredcos_cap_v2).
        linear: betas from 1e-4 to 0.02, Ho et al. 2020.
        scaled_linear: square roots of betas from sqrt(0.00085) to sqrt(0.012), latent diffusion.

    Returns:
        float64 CPU tensor [num_train_timesteps], strictly decreasing.

    Raises:
        ValueError: the name is unknown, or num_train_timesteps < 1.
    """
    if num_train_timesteps < 1:
        raise ValueError(f"alphas_cumprod: expected num_train_timesteps >= 1, got {num_train_timesteps}")
    if name == "cosine":
        u = torch.arange(num_train_timesteps + 1, dtype=torch.float64) / num_train_timesteps
        alpha_bar = torch.cos((u + 0.008) / 1.008 * (torch.pi / 2)) ** 2
        betas = (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999)
    elif name == "linear":
        betas = torch.linspace(1e-4, 0.02, num_train_timesteps, dtype=torch.float64)
    elif name == "scaled_linear":
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, num_train_timesteps, dtype=torch.float64) ** 2
    else:
        raise ValueError(f"alphas_cumprod: expected a schedule of {', '.join(SCHEDULES)}, got {name!r}")
    return torch.cumprod(1 - betas, dim=0)
