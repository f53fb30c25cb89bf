"""Noise schedules of discrete-time diffusion, as their cumulative products of 1 - beta."""

from __future__ import annotations

import math

import torch
from torch import Tensor

SCHEDULES = ("cosine", "linear", "scaled_linear", "cauchy", "laplace", "exp")
BETA_RANGES = {"linear": (1e-4, 0.02), "scaled_linear": (0.00085, 0.012)}
MAX_BETA = 0.999


def alphas_cumprod(
    name: str, num_train_timesteps: int = 1000, *, beta_range: tuple[float, float] | None = None
) -> Tensor:
    """Return alpha_bar[t] for t in [0, num_train_timesteps), so that x_t = sqrt(ab) x0 + sqrt(1 - ab) noise.

    Schedules:
        cosine: Nichol & Dhariwal 2021 (diffusers calls it squaredcos_cap_v2).
        linear: betas from 1e-4 to 0.02, Ho et al. 2020.
        scaled_linear: square roots of betas from sqrt(0.00085) to sqrt(0.012), latent diffusion.
        cauchy, laplace: log SNRs lambda are quantiles of these distributions, with the constants of LatentLM's and
            VibeVoice's scheduler. Cauchy: lambda(u) = 3 + tan(0.9 pi (0.5 - u)), alpha_bar = 1 - 1/(e^lambda + 1.1).
            Laplace: lambda(u) = -sgn(0.5 - u) log(1 - 1.96 |0.5 - u|), alpha_bar = 1 - 1/(e^lambda + 1.02). (The
            laplace of diffusers is another one.)
        exp: alpha_bar(u) = exp(-12 u).
        All but the linear ones: beta = 1 - alpha_bar(u + 1/T)/alpha_bar(u), capped at 0.999.

    Args:
        beta_range: first and last beta of linear and scaled_linear, where they are not those above.

    Returns:
        float64 CPU tensor [num_train_timesteps], strictly decreasing.

    Raises:
        ValueError: the name is unknown, num_train_timesteps < 1, or a schedule that has none came with a beta_range.
    """
    if num_train_timesteps < 1:
        raise ValueError(f"alphas_cumprod: expected num_train_timesteps >= 1, got {num_train_timesteps}")
    if name not in SCHEDULES:
        raise ValueError(f"alphas_cumprod: expected a schedule of {', '.join(SCHEDULES)}, got {name!r}")
    if name in BETA_RANGES:
        first, last = beta_range or BETA_RANGES[name]
        power = 2 if name == "scaled_linear" else 1
        betas = torch.linspace(first ** (1 / power), last ** (1 / power), num_train_timesteps, dtype=torch.float64)
        betas = betas**power
    else:
        if beta_range is not None:
            raise ValueError(f"alphas_cumprod: expected no beta_range for {name}, got {beta_range}")
        alpha_bar = _alpha_bar(name, torch.arange(num_train_timesteps + 1, dtype=torch.float64) / num_train_timesteps)
        betas = (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=MAX_BETA)
    return torch.cumprod(1 - betas, dim=0)


def _alpha_bar(name: str, u: Tensor) -> Tensor:
    """float64, for u from 0 to 1."""
    if name == "cosine":
        return torch.cos((u + 0.008) / 1.008 * (math.pi / 2)) ** 2
    if name == "exp":
        return torch.exp(-12 * u)
    if name == "cauchy":
        log_snr, rest = 3 + torch.tan(0.9 * math.pi * (0.5 - u)), 1.1
    else:
        assert name == "laplace", name
        log_snr, rest = -torch.sign(0.5 - u) * torch.log(1 - 1.96 * (0.5 - u).abs()), 1.02
    return 1 - 1 / (log_snr.exp() + rest)


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
