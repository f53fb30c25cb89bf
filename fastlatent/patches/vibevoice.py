"""VibeVoice: the class of transformers, and the two of the original code (1.5B/7B and Realtime)."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fastlatent.heads.spec import VIBEVOICE
from fastlatent.patches.fused_loop import FlowMatchingProof, FusedLoop, differs_inside, prove
from fastlatent.patches.handle import PatchHandle
from fastlatent.patches.live_head import LiveHead
from fastlatent.patches.schedules import Schedule, learn, scheduler_loop


@dataclass(frozen=True)
class _Layout:
    """Where a published class has its head, and what its loop is called with."""

    head: str  # below model.model
    method: str
    parameters: tuple[str, ...]


PORT = _Layout(
    "diffusion_head",
    "_sample_audio_latent",
    ("positive_condition", "negative_condition", "noise_scheduler", "num_diffusion_steps", "guidance_scale"),
)
ORIGINAL = _Layout("prediction_head", "sample_speech_tokens", ("condition", "neg_condition", "cfg_scale"))


def mismatch(model: Any) -> str:
    """See `fastlatent.patches.patch.FAMILIES`."""
    layout = _layout(model)
    if layout is None:
        return f"expected model.{PORT.head} and {PORT.method}, or model.{ORIGINAL.head} and {ORIGINAL.method}"
    takes = tuple(inspect.signature(getattr(model, layout.method)).parameters)
    if takes != layout.parameters:
        return f"expected {layout.method}({', '.join(layout.parameters)}), got ({', '.join(takes)})"
    head = getattr(model.model, layout.head)
    if layout is PORT:
        for name in ("timestep_embedding", "timestep_proj"):
            if not isinstance(getattr(head, name, None), nn.Module):
                return f"expected the module model.{layout.head}.{name}, which is missing"
    elif not isinstance(getattr(head, "t_embedder", None), nn.Module):
        return f"expected the module model.{layout.head}.t_embedder, which is missing"
    elif not hasattr(model, "ddpm_inference_steps") or not hasattr(model.model, "noise_scheduler"):
        return "expected ddpm_inference_steps and model.noise_scheduler"
    return differs_inside(head, f"model.{layout.head}", VIBEVOICE.eps)


def apply(model: Any, handle: PatchHandle) -> None:
    """See `fastlatent.patches.patch.FAMILIES`."""
    layout = _layout(model)
    assert layout is not None
    loop = _Loop(model, layout)
    loop.live.get()
    handle.replace(model, layout.method, loop.port if layout is PORT else loop.original)


def _layout(model: Any) -> _Layout | None:
    inner = getattr(model, "model", None)
    for layout in (PORT, ORIGINAL):
        if isinstance(getattr(inner, layout.head, None), nn.Module) and callable(getattr(model, layout.method, None)):
            return layout
    return None


class _Loop(FusedLoop):
    """The loop over the head as one op; draws what the published loop draws."""

    def __init__(self, model: Any, layout: _Layout) -> None:
        super().__init__()
        self._model, self._layout, self._theirs = model, layout, getattr(model, layout.method)
        self.live = LiveHead(self._module, "vibevoice", self._prove)
        # The published default; it differs between copies of the class.
        self._cfg_scale = inspect.signature(self._theirs).parameters[layout.parameters[-1]].default
        # Per scheduler and number of steps: what its config held, and what was learnt.
        self._schedules: WeakKeyDictionary[Any, dict[int, tuple[list[object], Schedule]]] = WeakKeyDictionary()

    def port(
        self,
        positive_condition: Tensor,
        negative_condition: Tensor,
        noise_scheduler: Any,
        num_diffusion_steps: int,
        guidance_scale: float,
    ) -> Tensor:
        """[B, H] twice → latents [B, 1, C]; no gradients."""
        latent = self._sample(
            positive_condition, negative_condition, noise_scheduler, num_diffusion_steps, guidance_scale
        )
        return latent.unsqueeze(1)

    def original(self, condition: Tensor, neg_condition: Tensor, cfg_scale: float | None = None) -> Tensor:
        """[B, H] twice → latents [B, C]; no gradients."""
        cfg_scale = self._cfg_scale if cfg_scale is None else cfg_scale
        scheduler, steps = self._model.model.noise_scheduler, self._model.ddpm_inference_steps
        return self._sample(condition, neg_condition, scheduler, steps, cfg_scale)

    def embed(self, t: Tensor) -> Tensor:
        module = self._module()
        if self._layout is ORIGINAL:
            return module.t_embedder(t)
        return module.timestep_proj(module.timestep_embedding(t).to(t.dtype))

    def _module(self) -> Any:
        return getattr(self._model.model, self._layout.head)

    def _prove(self) -> None:
        parameter = self._module().noisy_images_proj.weight
        generator = torch.Generator().manual_seed(0)
        a, b = (torch.randn(2, len(parameter), generator=generator).to(parameter) for _ in range(2))
        theirs, where = self._theirs, f"{type(self._model).__name__}.{self._layout.method}"
        proof = FlowMatchingProof()
        if self._layout is PORT:
            prove(lambda: theirs(a, b, proof, 2, 1.5), lambda: self.port(a, b, proof, 2, 1.5), parameter, where)
            return
        model, inner = self._model, self._model.model
        settings = inner.noise_scheduler, model.ddpm_inference_steps
        try:
            inner.noise_scheduler, model.ddpm_inference_steps = proof, 2
            prove(lambda: theirs(a, b, 1.5), lambda: self.original(a, b, 1.5), parameter, where)
        finally:
            inner.noise_scheduler, model.ddpm_inference_steps = settings

    @torch.no_grad()
    def _sample(self, positive: Tensor, negative: Tensor, scheduler: Any, steps: int, scale: float) -> Tensor:
        head = self.live.get()
        condition = torch.cat([positive, negative]).to(head.weights.device)
        # On the CPU and for both halves, of which the first counts: the published draw.
        noise = torch.randn(len(condition), head.spec.channels).to(condition)
        schedule = self._schedule(scheduler, steps, head.spec.channels, head.weights.device)
        scheduler.set_timesteps(steps)  # the model's own loop does: others may look
        return self.sample(head, schedule, condition, noise, scale)

    def _schedule(self, scheduler: Any, steps: int, channels: int, device: torch.device) -> Schedule:
        # set_shift of the flow scheduler is not in its config.
        config = getattr(scheduler, "config", None)
        holds = [getattr(scheduler, "shift", None), *(config.values() if isinstance(config, Mapping) else ())]
        known = self._schedules.setdefault(scheduler, {})
        seen = known.get(steps)
        if seen is None or len(seen[0]) != len(holds) or any(a is not b for a, b in zip(seen[0], holds, strict=True)):
            stepper = copy.deepcopy(scheduler)
            seen = known[steps] = holds, learn(stepper, scheduler_loop(stepper, steps), (channels,), device)
        return seen[1]
