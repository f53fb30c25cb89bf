"""What the patches of models with a scheduler and classifier-free guidance share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastlatent.heads.diffusion_head import DiffusionHead
from fastlatent.patches.schedules import Schedule, same_draws

# How far two ways to compute two Euler steps may be apart, relative to the result, by the head's dtype: rounding of
# three layers makes 1e-3 and 8e-3 in float16 and bfloat16, another activation in one of them 0.07.
PROOF = {torch.float64: 1e-5, torch.float32: 1e-4, torch.float16: 0.01, torch.bfloat16: 0.04}
ACTIVATIONS = ("torch.nn.modules.activation", "transformers.activations")


class FusedLoop(ABC):
    """One token's loop, with the model's own time embeddings: its roundings of t and of the sinusoid are kept."""

    def __init__(self) -> None:
        self._embedded: WeakKeyDictionary[Schedule, dict[torch.dtype, tuple[DiffusionHead, Tensor]]]
        self._embedded = WeakKeyDictionary()

    @abstractmethod
    def embed(self, t: Tensor) -> Tensor:
        """t [S] in the dtype that the loop gives it → [S, H], by the model's modules."""

    def sample(
        self, head: DiffusionHead, schedule: Schedule, condition: Tensor, noise: Tensor, guidance_scale: float
    ) -> Tensor:
        """condition [2B, Z] (with, then without), noise [2B, C], whose first half counts → [B, C] in the noise's dtype.

        Noise of the steps is drawn for 2B rows, as published loops do.
        """
        known = self._embedded.setdefault(schedule, {})
        if noise.dtype not in known or known[noise.dtype][0] is not head:
            t = schedule.timesteps.to(noise.device, noise.dtype).to(head.weights.dtype)
            with torch.autocast(noise.device.type, enabled=False):
                known[noise.dtype] = head, self.embed(t)
        half = len(noise) // 2
        step_noise = schedule.noise(len(noise), noise.shape[1], noise)
        with torch.autocast(noise.device.type, enabled=False):  # the op's dtype is the weights'
            tokens = head.sample(
                condition[:half],
                solver=schedule.table,
                null_cond=condition[half:],
                guidance_scale=guidance_scale,
                noise=noise[:half],
                step_noise=None if step_noise is None else step_noise[:, :half],
                t_embedding=known[noise.dtype][1],
            )
        return tokens.to(noise.dtype)


class FlowMatchingProof:
    """Euler steps from 1 to 0: a scheduler to hold any model's loop against ours, whatever it samples with."""

    config: Mapping[str, Any] = {}

    def set_timesteps(self, num_inference_steps: int) -> None:
        self.timesteps = torch.linspace(1, 0, num_inference_steps + 1)[:-1]

    def step(self, output: Tensor, t: Tensor, sample: Tensor) -> SimpleNamespace:
        return SimpleNamespace(prev_sample=sample - output / len(self.timesteps))


def prove(
    theirs: Callable[[], Tensor],
    ours: Callable[[], Tensor],
    parameter: Tensor,
    what: str,
    tolerance: float | None = None,
) -> None:
    """Hold our computation against the model's own, outside of autocast.

    Args:
        parameter: one of the head's.
        tolerance: of the relative difference; None takes PROOF's.

    Raises:
        ValueError: they give different tokens.
    """
    autocast = torch.autocast(parameter.device.type, enabled=False)
    with torch.no_grad(), autocast, same_draws(parameter.device) as again:
        want = theirs().double()
        again()
        got = ours().double()
    error = float((got - want).norm() / want.norm())
    if got.shape != want.shape or not error <= (tolerance or PROOF[parameter.dtype]):
        raise ValueError(
            f"patch: expected {what} to compute what the published one does, got other tokens from it (relative "
            f"difference {error:.1e}, {parameter.dtype}): its code or a module of the head differs; if it is patched "
            "already, undo that"
        )


def differs_inside(head: nn.Module, where: str, eps: float) -> str:
    """What weights do not show: norms' epsilons and activations of a head, "" where they are as published."""
    for name, module in head.named_modules():
        at = f"{where}.{name}" if name else where
        for attribute in ("eps", "variance_epsilon", "rms_norm_eps"):
            value: Any = getattr(module, attribute, eps)
            if (value is None or isinstance(value, float)) and value != eps:
                return f"expected {at}.{attribute} {eps:g}, got {value}"
        if type(module).__module__ in ACTIVATIONS:
            x = torch.linspace(-4, 4, 9)
            if not torch.allclose(module(x), F.silu(x)):
                return f"expected {at} to be SiLU, got {type(module).__name__}"
        kind = type(module).__name__
        if "Norm" in kind and not any(part in kind for part in ("RMSNorm", "AdaLayerNorm")):
            return f"expected {at} to be an RMSNorm, got {kind}"
    if any(parameter.is_meta for parameter in head.parameters()):
        return f"expected the weights of {where} in memory, got them on meta: load the head without offloading"
    return ""
