"""The published sampling loops of a per-token diffusion head in plain torch: what `diffusion_head_sample` must beat.

One `PlainHead` holds the weights of a `HeadWeights` as parameters (the same memory), a `Solver` the arithmetic of one
sampler with its scalars from the published formulae (nothing of `fastlatent.diffusion`). `PlainLoop` joins the two.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastlatent.ops.diffusion_head_sample import HeadWeights

GUIDANCE_SCALE = 3.0
# A compiled step gets its scalars as a row of a tensor. Rows of 64 bytes: Inductor copies an input that is not aligned.
SCALAR_ROW = 16


# ---- samplers --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Solver:
    """A sampler: the scalars of each step; update: x, history, output, variance output, noise, scalars → x, history."""

    scalars: Sequence[tuple[float, ...]]
    update: Callable[..., tuple[Tensor, Tensor]]
    needs_noise: bool = False


def cosine_alpha_bar(steps: int = 1000) -> list[float]:
    """The running product of 1 − β of the cosine schedule (Nichol & Dhariwal 2021), β at most 0.999."""

    def level(u: float) -> float:
        return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

    product, products = 1.0, []
    for i in range(steps):
        product *= 1 - min(1 - level((i + 1) / steps) / level(i / steps), 0.999)
        products.append(product)
    return products


def dpmsolver_pp(steps: int) -> Solver:
    """DPM-Solver++(2M), midpoint, of a v-prediction: LatentLM and VibeVoice."""
    alpha_bar = cosine_alpha_bar()
    times = [round(999 * (1 - i / steps)) for i in range(steps)]
    levels = [(math.sqrt(alpha_bar[t]), math.sqrt(1 - alpha_bar[t])) for t in times]
    log_snr = [math.log(alpha / sigma) for alpha, sigma in levels]
    scalars = []
    for i, (alpha, sigma) in enumerate(levels):
        if i == steps - 1:
            scalars.append((alpha, sigma, 0.0, 1.0, 0.0))
            continue
        h, (alpha_next, sigma_next) = log_snr[i + 1] - log_snr[i], levels[i + 1]
        first = -alpha_next * math.expm1(-h)
        second = 0.5 * first * h / (log_snr[i] - log_snr[i - 1]) if i else 0.0
        scalars.append((alpha, sigma, sigma_next / sigma, first + second, -second))
    return Solver(scalars, _dpmsolver_pp)


def _dpmsolver_pp(
    x: Tensor, history: Tensor, output: Tensor, variance: Tensor, noise: Tensor | None, scalars: Sequence[float]
) -> tuple[Tensor, Tensor]:
    alpha, sigma, a, b, c = scalars
    data = alpha * x - sigma * output
    return a * x + b * data + c * history, data


def ancestral(steps: int) -> Solver:
    """Ancestral sampling with a learned variance on a respaced cosine schedule: MAR."""
    alpha_bar = cosine_alpha_bar()
    kept = [alpha_bar[round(999 * i / (steps - 1))] for i in range(steps)]
    scalars = []
    for i in reversed(range(steps)):
        now, after = kept[i], kept[i - 1] if i else 1.0
        beta = 1 - now / after
        # The posterior's variance is 0 in the last step, which adds no noise: any finite logarithm does.
        small = math.log(beta * (1 - after) / (1 - now)) if i else 0.0
        mean_data, mean_x = math.sqrt(after) * beta / (1 - now), math.sqrt(now / after) * (1 - after) / (1 - now)
        row = (math.sqrt(1 / now), math.sqrt(1 / now - 1), mean_data, mean_x)
        scalars.append((*row, small, math.log(beta) if i else 0.0, float(i > 0)))
    return Solver(scalars, _ancestral, needs_noise=True)


def _ancestral(
    x: Tensor, history: Tensor, output: Tensor, variance: Tensor, noise: Tensor, scalars: Sequence[float]
) -> tuple[Tensor, Tensor]:
    per_x, per_output, mean_data, mean_x, small, large, noisy = scalars
    share = (variance + 1) / 2
    mean = mean_data * (per_x * x - per_output * output) + mean_x * x
    return mean + noisy * torch.exp(0.5 * (share * large + (1 - share) * small)) * noise, history


def flow_sde(steps: int) -> Solver:
    """Euler–Maruyama up from noise at t = 0 to t = 0.96, then one plain step to 1, of v = data − noise: NextStep-1."""
    times = [0.96 * i / (steps - 1) for i in range(steps)]
    scalars = [(1 + t, 1.0, end - t, math.sqrt(2 * (1 - t) * (end - t))) for t, end in pairwise(times)]
    return Solver([*scalars, (1.0, 0.0, 1 - times[-1], 0.0)], _flow_sde, needs_noise=True)


def _flow_sde(
    x: Tensor, history: Tensor, output: Tensor, variance: Tensor, noise: Tensor, scalars: Sequence[float]
) -> tuple[Tensor, Tensor]:
    per_output, per_x, dt, spread = scalars
    return x + (per_output * output - per_x * x) * dt + spread * noise, history


# ---- the head --------------------------------------------------------------------------------------------


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A layer on the memory of `weight`; bias is rounded to its dtype, as a published checkpoint is."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    # Parameters, not tensors: only those a CUDA graph of torch.compile reads in place, and only those it freezes.
    layer.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.to(weight.dtype), requires_grad=False)
    return layer


class PlainHead(nn.Module):
    """One evaluation in the weights' dtype, guidance and one solver step. Gate and up of a SwiGLU are one product."""

    def __init__(self, weights: HeadWeights, bias: bool, ways: int, update: Callable[..., tuple[Tensor, Tensor]]):
        super().__init__()
        hidden, blocks = weights.hidden_size, weights.blocks
        self.hidden, self.channels, self.ways, self.update = hidden, weights.channels, ways, update
        self.gated, self.layer_norm, self.eps = weights.gated, weights.layer_norm, weights.eps
        self.input = _linear(weights.input_weight, weights.input_bias)
        self.up, self.down = (
            nn.ModuleList(_linear(matrices[i], biases[i] if bias else None) for i in range(blocks))
            for matrices, biases in (
                (weights.up_weight, weights.up_bias),
                (weights.down_weight, weights.down_bias),
            )
        )
        self.output = _linear(weights.output_weight, weights.output_bias if bias else None)
        matrix, vector = weights.modulation_weight, weights.modulation_bias
        self.modulation = _linear(matrix, vector if bias else None)
        self.modulations = nn.ModuleList(
            _linear(part, part_bias if bias else None)
            for part, part_bias in zip(matrix.split(3 * hidden), vector.split(3 * hidden), strict=True)
        )

    def norm(self, x: Tensor) -> Tensor:
        if self.layer_norm:
            return F.layer_norm(x, (self.hidden,), eps=self.eps)
        return F.rms_norm(x, (self.hidden,), eps=self.eps)

    def network(self, x: Tensor, modulations: Sequence[Tensor]) -> Tensor:
        """x [B, C], modulations 3L + 2 of [W·B, H] → [W·B, O]."""
        h = self.input(x.to(self.input.weight.dtype)).repeat(self.ways, 1)
        for i, (up, down) in enumerate(zip(self.up, self.down, strict=True)):
            shift, scale, gate = modulations[3 * i : 3 * i + 3]
            inner = up(self.norm(h) * (1 + scale) + shift)
            if self.gated:
                first, second = inner.chunk(2, dim=-1)
                inner = F.silu(first) * second
            else:
                inner = F.silu(inner)
            h = h + gate * down(inner)
        shift, scale = modulations[-2:]
        return self.output(self.norm(h) * (1 + scale) + shift)

    def advance(
        self,
        x: Tensor,
        history: Tensor,
        modulations: Sequence[Tensor],
        noise: Tensor | None,
        scalars: Sequence[float] | Tensor,
    ) -> tuple[Tensor, Tensor]:
        output = self.network(x, modulations).float()
        conditional, unconditional = output[:, : self.channels].chunk(2)
        guided = unconditional + GUIDANCE_SCALE * (conditional - unconditional)
        variance = output[: len(x), self.channels :]
        return self.update(x, history, guided, variance, noise, scalars)

    def step(
        self,
        x: Tensor,
        history: Tensor,
        condition: Tensor,
        t_embedding: Tensor,
        noise: Tensor | None,
        scalars: Sequence[float] | Tensor,
    ) -> tuple[Tensor, Tensor]:
        """One solver step, its modulations computed here as published: a product per block."""
        c = F.silu(condition + t_embedding)
        parts = [part for layer in self.modulations for part in layer(c).split(self.hidden, dim=-1)]
        return self.advance(x, history, parts, noise, scalars)

    def hoisted_step(
        self,
        x: Tensor,
        history: Tensor,
        modulations: Tensor,
        noise: Tensor | None,
        scalars: Sequence[float] | Tensor,
    ) -> tuple[Tensor, Tensor]:
        """One solver step with modulations [W·B, (3L+2)·H]."""
        return self.advance(x, history, modulations.split(self.hidden, dim=-1), noise, scalars)

    def all_modulations(self, condition: Tensor, t_embedding: Tensor) -> Tensor:
        """[S, W·B, (3L+2)·H] of all steps: one product."""
        return self.modulation(F.silu(condition + t_embedding[:, None]))


Compile = Callable[[Callable[..., Any]], Callable[..., Any]]


def compile_default(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, fullgraph=True)


def compile_frozen(function: Callable[..., Any]) -> Callable[..., Any]:
    """With Inductor's freezing: weights become constants, packed for the CPU's matrix products.

    Only the global setting has that effect. The option here keeps Dynamo from taking code compiled without it.
    """
    compiled = torch.compile(function, fullgraph=True, options={"freezing": True})

    def call(*args: Any) -> Any:
        with torch._inductor.config.patch(freezing=True):  # 16 µs
            return compiled(*args)

    return call


def compile_with_graphs(mode: str) -> Compile:
    """For the modes of torch.compile that make CUDA graphs of their own: the next replay overwrites their outputs."""

    def compile(step: Callable[..., Any]) -> Callable[..., Any]:
        compiled = torch.compile(step, mode=mode, fullgraph=True)

        def call(*args: Any) -> tuple[Tensor, Tensor]:
            torch.compiler.cudagraph_mark_step_begin()
            x, history = compiled(*args)
            return x.clone(), history.clone()

        return call

    return compile


class PlainLoop:
    """start [B, C], condition [W·B, H], t_embedding [S, H], noise [S, B, C] or None → token [B, C]; x is float32.

    Args:
        compile: what compiles the step; None leaves everything eager. Compiled steps get their scalars as a row of a
            tensor on the device, so that all of them share code; in eager mode and in a CUDA graph numbers are free.
        compile_modulations: the same for the product ahead of the loop, where `hoisted` computes the modulations of all
            steps in one.
    """

    def __init__(
        self,
        head: PlainHead,
        solver: Solver,
        compile: Compile | None = None,
        compile_modulations: Compile | None = None,
        *,
        hoisted: bool,
    ) -> None:
        self.step: Callable[..., tuple[Tensor, Tensor]] = head.hoisted_step if hoisted else head.step
        self.modulate: Callable[..., Tensor] = head.all_modulations
        self.hoisted = hoisted
        self.scalars: Sequence[tuple[float, ...]] | Sequence[Tensor] = solver.scalars
        if compile is not None:
            self.step = compile(self.step)
            used = torch.tensor(solver.scalars, device=head.input.weight.device)
            rows = F.pad(used, (0, SCALAR_ROW - used.shape[1]))
            self.scalars = [row[: used.shape[1]] for row in rows]
        if compile_modulations is not None:
            self.modulate = compile_modulations(self.modulate)

    def __call__(self, start: Tensor, condition: Tensor, t_embedding: Tensor, noise: Tensor | None) -> Tensor:
        x, history = start, torch.zeros_like(start)
        if self.hoisted:
            given: list[tuple[Tensor, ...]] = [(part,) for part in self.modulate(condition, t_embedding)]
        else:
            given = [(condition, part) for part in t_embedding]
        for k, scalars in enumerate(self.scalars):
            x, history = self.step(x, history, *given[k], None if noise is None else noise[k], scalars)
        return x
