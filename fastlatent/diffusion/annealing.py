"""What may change from token to token: the number of solver steps, and the guidance scale."""

from __future__ import annotations

import torch
from torch import Tensor

GUIDANCE_SCHEDULES = ("constant", "linear")


def annealed_steps(first: int, last: int, tokens: int) -> list[int]:
    """Solver steps for each token, linear from `first` to `last` (DiSA, Zhao et al. 2025: 50 to 5, training-free).

    Returns:
        `tokens` integers, halves rounded up; the first is `first` and the last is `last`, except that a single
        token takes `first`.

    Raises:
        ValueError: an argument is below 1.
    """
    for name, value in {"first": first, "last": last, "tokens": tokens}.items():
        if value < 1:
            raise ValueError(f"annealed_steps: expected {name} >= 1, got {value}")
    spans = max(tokens - 1, 1)
    # Integers, so that a half is a half: (2 n + d) // 2 d rounds n / d.
    return [first + (2 * (last - first) * i + spans) // (2 * spans) for i in range(tokens)]


def guidance_scales(scale: float, tokens: int, schedule: str) -> Tensor:
    """Guidance scale s of each token, for u + s (c - u).

    Schedules:
        constant: `scale` for every token.
        linear: 1 + (scale - 1) (i + 1) / tokens for token i, which ends at `scale` (MAR, Li et al. 2024).

    Returns:
        float64 CPU [tokens].

    Raises:
        ValueError: the schedule is unknown, or tokens < 1.
    """
    if schedule not in GUIDANCE_SCHEDULES:
        raise ValueError(f"guidance_scales: expected a schedule of {', '.join(GUIDANCE_SCHEDULES)}, got {schedule!r}")
    if tokens < 1:
        raise ValueError(f"guidance_scales: expected tokens >= 1, got {tokens}")
    if schedule == "constant":
        return torch.full((tokens,), scale, dtype=torch.float64)
    return 1 + (scale - 1) * (torch.arange(1, tokens + 1, dtype=torch.float64) / tokens)
