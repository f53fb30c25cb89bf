"""Exponential moving average of weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

SCHEDULES = ("warmup", "power", "constant", "published")


@dataclass(frozen=True)
class EmaSchedule:
    """The decay d of shadow ← shadow + (1 − d)·(weight − shadow) after each optimiser step s, counted from 0.

    warmup: min(decay, (1 + s)/(10 + s)); reaches `decay` at s = 9/(1 − decay).
    power: min(decay, 1 − (1 + s/inv_gamma)^−power), as in Karras' k-diffusion and diffusers' EMAModel.
    constant: decay. published: 0 at the first step and then decay, which is what EMAModel does with min_decay = decay.
    """

    kind: str
    decay: float
    inv_gamma: float = 1.0
    power: float = 0.75

    def __post_init__(self) -> None:
        if self.kind not in SCHEDULES:
            raise ValueError(f"ema_schedule: expected one of {', '.join(SCHEDULES)}, got {self.kind!r}")
        if not 0 < self.decay < 1:
            raise ValueError(f"ema_decay: expected above 0 and below 1, or 0 for none, got {self.decay}")

    def __call__(self, step: int) -> float:
        if self.kind == "warmup":
            return min(self.decay, (1 + step) / (10 + step))
        if self.kind == "power":
            return min(self.decay, 1 - (1 + step / self.inv_gamma) ** -self.power)
        return 0.0 if self.kind == "published" and step == 0 else self.decay


class EMA:
    """The average of `weights`, whose tensors the optimiser changes in place; in their dtype, beside them."""

    def __init__(self, weights: Mapping[str, Tensor], schedule: EmaSchedule) -> None:
        self.schedule, self._weights = schedule, dict(weights)
        self.shadow: dict[str, Tensor] = {name: weight.detach().clone() for name, weight in weights.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """After optimiser step `step` (from 0)."""
        weights = [weight.detach() for weight in self._weights.values()]
        torch._foreach_lerp_(list(self.shadow.values()), weights, 1 - self.schedule(step))
