"""Exponential moving average of weights, in float32."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class EMA:
    """Shadow weights: shadow ← shadow + (1 − d)·(weight − shadow), d = min(decay, (1 + step)/(10 + step)).

    The ramp keeps short runs from averaging in their initial weights; from step 9/(1 − decay) on it is `decay`.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        if not 0 < decay < 1:
            raise ValueError(f"ema_decay: expected above 0 and below 1, or 0 for none, got {decay}")
        self.decay = decay
        self._weights = dict(module.named_parameters())
        self.shadow: dict[str, Tensor] = {name: p.detach().float().clone() for name, p in self._weights.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """After optimiser step `step` (from 0)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(
            list(self.shadow.values()), [p.detach().float() for p in self._weights.values()], 1 - decay
        )
