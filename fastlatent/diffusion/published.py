"""The samplers of published per-token heads that diffusers does not have.

LatentLM and VibeVoice use `dpmsolver_pp`, and Orthus `ddim` (`fastlatent.diffusion.solvers`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastlatent.diffusion.rows import ddpm_rows, new_rows, shifted
from fastlatent.diffusion.solvers import SolverTable
from fastlatent.ops.solver_step import BASE, A, E, F, P, Q, S


def respaced_ddpm(alphas_cumprod: Tensor, steps: int, *, temperature: float = 1.0) -> SolverTable:
    """Ancestral sampling with learned variance on respaced betas: MAR, Harmon, UniPic, MaskGen, CALM's diffusion head.

    The network predicts (epsilon, v), 2C channels, at timesteps round(i * (T - 1) / (steps - 1)) descending: 999,
    989, ..., 71, 61, 50, ..., 10, 0 for 100 of 1000 (the stride is summed, so halves round as the published code's
    do). One step is timestep 0. Variances lie between those of the respaced process; nothing is clipped; the last
    step adds no noise.

    Args:
        alphas_cumprod: float64 [T], for all the above the cosine schedule with T = 1000.
        steps: 1 to T.
        temperature: multiplies the noise of each step; the start noise is the caller's.

    Raises:
        ValueError: an argument is not as above, or the temperature is negative.
    """
    train_timesteps = len(alphas_cumprod)
    if not 1 <= steps <= train_timesteps:
        raise ValueError(f"respaced_ddpm: expected 1 to {train_timesteps} steps, got {steps}")
    if temperature < 0:
        raise ValueError(f"respaced_ddpm: expected temperature >= 0, got {temperature}")
    stride = (train_timesteps - 1) / (steps - 1) if steps > 1 else 1.0
    ascending, position = [], 0.0
    for _ in range(steps):
        ascending.append(round(position))
        position += stride
    timesteps = torch.tensor(ascending).flip(0)
    alpha_bar = alphas_cumprod[timesteps]
    rows = ddpm_rows(timesteps.double(), alpha_bar, shifted(alpha_bar, 1.0), "epsilon", "learned_range")
    rows[:, S] *= temperature
    name = f"respaced ddpm (learned variance, temperature {temperature:g}), epsilon, {steps} steps"
    return SolverTable(rows, timesteps.double(), name)


def nextstep_sde(steps: int, *, shift: float = 1.0) -> SolverTable:
    """NextStep-1: steps - 1 Euler-Maruyama steps of an SDE up to t = 0.96, then one of the ODE over the last 0.04.

    t goes up from 0 (noise) to 1 (data); the network predicts data - noise and is given t itself. The score (t v - x)
    / (1 - t) turns the drift v + (1 - t) score into (1 + t) v - x, with diffusion sqrt(2 (1 - t)). The grid
    linspace(0, 0.96, steps) is shifted by t / (shift - (shift - 1) t); the last step stays 0.04 long.

    Args:
        steps: >= 2, as many as the network is called.
        shift: > 0; published 1, and 3.2 for editing.

    Raises:
        ValueError: an argument is not as above.
    """
    if steps < 2:
        raise ValueError(f"nextstep_sde: expected steps >= 2 (the last one is the ODE's), got {steps}")
    if shift <= 0:
        raise ValueError(f"nextstep_sde: expected shift > 0, got {shift}")
    last = 0.04
    t = torch.linspace(0, 1 - last, steps, dtype=torch.float64)
    t = t / (shift - (shift - 1) * t)
    rows = _up(t, t)
    dt = t.diff()
    rows[:-1, A], rows[:-1, E] = 1 - dt, (1 + t[:-1]) * dt
    rows[:-1, S] = (2 * (1 - t[:-1]) * dt).sqrt()
    rows[-1, A], rows[-1, E] = 1.0, last
    return SolverTable(rows, t, f"nextstep sde (shift {shift:g}), {steps} steps")


def flow_euler_up(steps: int, time_scale: float = 1000.0) -> SolverTable:
    """Euler steps along a flow that predicts data - noise while t still counts down: Ming-UniVision, 16 steps.

    x += v / steps at t = 1, 1 - 1/steps, ..., 1/steps. In inclusionAI/Ming-UniVision t = 1 is noise, the step is
    added although t falls, so v points from noise to data: the opposite sign of `flow_euler`.

    Args:
        steps: >= 1.
        time_scale: the network's sinusoid is given time_scale * t.

    Raises:
        ValueError: steps < 1.
    """
    if steps < 1:
        raise ValueError(f"flow_euler_up: expected steps >= 1, got {steps}")
    t = torch.linspace(1, 0, steps + 1, dtype=torch.float64)[:-1]
    rows = _up(1 - t, time_scale * t)
    rows[:, A], rows[:, E] = 1.0, 1 / steps
    return SolverTable(rows, time_scale * t, f"euler up, flow, {steps} steps")


def flow_midpoint(evaluations: int) -> SolverTable:
    """Midpoint steps along a flow that predicts data - noise, t up from 0 (noise) to 1: CALM's flow head, 20.

    A step of length h = 2 / evaluations is two rows: x_mid = x + h/2 v(x, t), then x + h v(x_mid, t + h/2) from the
    x before both. The network is given trunc(1000 t), with t in float32, as its published code truncates.

    Args:
        evaluations: even, >= 2: how often the network is called.

    Raises:
        ValueError: evaluations is odd or < 2.
    """
    if evaluations < 2 or evaluations % 2:
        raise ValueError(f"flow_midpoint: expected an even number of evaluations >= 2 (two a step), got {evaluations}")
    steps = evaluations // 2
    start = (torch.arange(steps, dtype=torch.float64) / steps).float()
    timesteps = (torch.stack([start, start + 0.5 / steps], dim=1).flatten() * 1000).trunc().double()
    rows = _up(torch.arange(evaluations, dtype=torch.float64) / evaluations, timesteps)
    rows[0::2, A], rows[0::2, E], rows[0::2, BASE] = 1.0, 0.5 / steps, 1.0
    rows[1::2, F], rows[1::2, E] = 1.0, 1 / steps
    return SolverTable(rows, timesteps, f"midpoint, flow, {evaluations} evaluations")


def lagrangian_flow_map(steps: int = 1) -> SolverTable:
    """Jumps of a flow map, x += (t - s) v(s, t, x) from s = i / steps to t = (i + 1) / steps: pocket-tts, 1 step.

    Lagrangian self-distillation (Boffi et al. 2025); time goes up from 0 (noise) to 1 (data). The network is given
    s and t themselves, so timesteps are [steps, 2]. pocket-tts starts from noise of variance `temperature` (0.7):
    scale the start noise by its square root.

    Raises:
        ValueError: steps < 1.
    """
    if steps < 1:
        raise ValueError(f"lagrangian_flow_map: expected steps >= 1, got {steps}")
    times = torch.arange(steps + 1, dtype=torch.float64) / steps
    timesteps = torch.stack([times[:-1], times[1:]], dim=1)
    rows = _up(times[:-1], timesteps)
    rows[:, A], rows[:, E] = 1.0, 1 / steps
    return SolverTable(rows, timesteps, f"lagrangian flow map, {steps} steps")


def _up(t: Tensor, timesteps: Tensor) -> Tensor:
    """Rows of a flow that predicts v = data - noise, at x = t data + (1 - t) noise: data = x + (1 - t) v."""
    rows = new_rows(timesteps)
    rows[:, P], rows[:, Q] = 1.0, 1 - t
    return rows
