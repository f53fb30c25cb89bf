"""Noise schedules of discrete-time diffusion, as their cumulative products of 1 - beta."""

from __future__ import annotations

import torch
from torch import Tensor

SCHEDULES = ("cosine", "linear", "scaled_linear")
BETA_RANGES = {"linear": (1e-4, 0.02), "scaled_linear": (0.00085, 0.012)}


def alphas_cumprod(
    name: str, num_train_timesteps: int = 1000, *, beta_range: tuple[float, float] | None = None
) -> Tensor:
    """Return alpha_bar[t] for t in [0, num_train_timesteps), so that x_t = sqrt(ab) x0 + sqrt(1 - ab) noise.

    Schedules:
        cosine: Nichol & Dhariwal 2021, betas capped at 0.999 (diffusers calls it squaredcos_cap_v2).
        linear: betas from 1e-4 to 0.02, Ho et al. 2020.
        scaled_linear: square roots of betas from sqrt(0.00085) to sqrt(0.012), latent diffusion.

    Args:
        beta_range: first and last beta of linear and scaled_linear, where they are not those above.

    Returns:
        float64 CPU tensor [num_train_timesteps], strictly decreasing.

    Raises:
        ValueError: the name is unknown, num_train_timesteps < 1, or cosine came with a beta_range.
    """
    if num_train_timesteps < 1:
        raise ValueError(f"alphas_cumprod: expected num_train_timesteps >= 1, got {num_train_timesteps}")
    if name not in SCHEDULES:
        raise ValueError(f"alphas_cumprod: expected a schedule of {', '.join(SCHEDULES)}, got {name!r}")
    if name == "cosine":
        if beta_range is not None:
            raise ValueError(f"alphas_cumprod: expected no beta_range for cosine, got {beta_range}")
        u = torch.arange(num_train_timesteps + 1, dtype=torch.float64) / num_train_timesteps
        alpha_bar = torch.cos((u + 0.008) / 1.008 * (torch.pi / 2)) ** 2
        betas = (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999)
    else:
        first, last = beta_range or BETA_RANGES[name]
        power = 2 if name == "scaled_linear" else 1
        betas = torch.linspace(first ** (1 / power), last ** (1 / power), num_train_timesteps, dtype=torch.float64)
        betas = betas**power
    return torch.cumprod(1 - betas, dim=0)


def rescale_zero_terminal_snr(alphas_cumprod: Tensor) -> Tensor:
    """Shift and scale sqrt(alpha_bar) so that its last value is 0 and its first stays (Lin et al. 2023, algorithm 1).

    At the last timestep nothing of the data is left: an epsilon prediction says nothing about it, v_prediction does.

    Args:
        alphas_cumprod: float64 [T], T >= 2, strictly decreasing.

    Returns:
        float64 [T].

    Raises:
        ValueError: fewer than two timesteps.
    """
    if len(alphas_cumprod) < 2:
        raise ValueError(
            f"rescale_zero_terminal_snr: expected alphas_cumprod of 2 timesteps or more, got {len(alphas_cumprod)}"
        )
    root = alphas_cumprod.sqrt()
    return ((root - root[-1]) * (root[0] / (root[0] - root[-1]))) ** 2
