"""Samplers as tables: one row of coefficients per step, for `fastlatent.ops.solver_step`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastlatent.diffusion.schedules import alphas_cumprod as schedule_by_name
from fastlatent.diffusion.targets import PREDICTION_TYPES
from fastlatent.ops.solver_step import ROW, A, B, C, E, P, Q, R, S, T

SOLVERS = ("dpmsolver++", "ddim", "ddpm", "euler")


@dataclass(frozen=True, eq=False)
class SolverTable:
    """All a sampler needs to know about its solver.

    Attributes:
        rows: float64 CPU [S, 16], one row per step, columns as in `fastlatent.ops.solver_step`.
        timesteps: float64 CPU [S], what the network is given at each step: integers from 0 to T - 1 for a
            discrete schedule, 1000 * t for flow.
        name: solver, options and number of steps, for logs.
    """

    rows: Tensor
    timesteps: Tensor
    name: str

    @property
    def needs_noise(self) -> bool:
        """Whether any step adds noise, so that `solver_step` must be given some."""
        return bool((self.rows[:, S] != 0).any())


def dpmsolver_pp(
    alphas_cumprod: Tensor,
    steps: int,
    prediction_type: str,
    *,
    order: int = 2,
    solver_type: str = "midpoint",
) -> SolverTable:
    """DPM-Solver++ multistep (Lu et al. 2022), the sampler of LatentLM and VibeVoice.

    Timesteps are round(linspace(0, T - 1, steps + 1)) without the 0, descending; the last step ends at
    sigma = 0. First and last step are of order 1: one has no history, the other an infinite log-SNR step.

    Args:
        alphas_cumprod: float64 [T].
        steps: 1 to T.
        prediction_type: "epsilon" or "v_prediction".
        order: 1 (DDIM in other words) or 2.
        solver_type: how order 2 uses its history, "midpoint" or "heun".

    Raises:
        ValueError: an argument is not as above.
    """
    if order not in (1, 2):
        raise ValueError(f"dpmsolver_pp: expected order 1 or 2, got {order}")
    if solver_type not in ("midpoint", "heun"):
        raise ValueError(f"dpmsolver_pp: expected solver_type midpoint or heun, got {solver_type!r}")
    _check_steps("dpmsolver_pp", steps, len(alphas_cumprod))
    grid = torch.linspace(0, len(alphas_cumprod) - 1, steps + 1, dtype=torch.float64).round()
    timesteps = grid.flip(0)[:-1]
    alpha, sigma = _levels(alphas_cumprod[timesteps.long()])
    log_snr = (alpha / sigma).log()
    alpha_next, sigma_next = _shifted(alpha, 1.0), _shifted(sigma, 0.0)
    h = _shifted(log_snr, torch.inf) - log_snr

    rows = _rows(timesteps)
    rows[:, P], rows[:, Q] = _to_data("dpmsolver_pp", prediction_type, alpha, sigma)
    rows[:, A] = sigma_next / sigma
    rows[:, B] = -alpha_next * torch.expm1(-h)
    if order == 2:
        h_previous = torch.cat([h.new_zeros(1), h[:-1]])
        half = -0.5 * torch.expm1(-h) if solver_type == "midpoint" else torch.expm1(-h) / h + 1
        correction = alpha_next * half * (h / h_previous)
        # Zero steps exist: steps = T rounds one timestep twice, and neither it nor its successor has a slope.
        second_order = (h_previous > 0) & (h > 0) & (sigma_next > 0)
        correction = torch.where(second_order, correction, 0.0)
        rows[:, B] += correction
        rows[:, C] = -correction
    kind = f"order {order}" if order == 1 else f"order {order} {solver_type}"
    return SolverTable(rows, timesteps, f"dpmsolver++ ({kind}), {prediction_type}, {steps} steps")


def ddim(alphas_cumprod: Tensor, steps: int, prediction_type: str, *, eta: float = 0.0) -> SolverTable:
    """DDIM (Song et al. 2020): deterministic at eta = 0, as noisy as DDPM at eta = 1; nothing is clipped.

    Timesteps are k * (T // steps), descending, so the first lies below T - 1 unless steps is T ("leading").

    Args:
        alphas_cumprod: float64 [T].
        steps: 1 to T.
        prediction_type: "epsilon" or "v_prediction".
        eta: share of DDPM's noise, 0 to 1.

    Raises:
        ValueError: an argument is not as above.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"ddim: expected eta in [0, 1], got {eta}")
    timesteps, alpha_bar, alpha_bar_next = _leading("ddim", alphas_cumprod, steps)
    alpha, sigma = _levels(alpha_bar)
    variance = eta**2 * (1 - alpha_bar_next) / (1 - alpha_bar) * (1 - alpha_bar / alpha_bar_next)
    direction = (1 - alpha_bar_next - variance).sqrt()

    rows = _rows(timesteps)
    rows[:, P], rows[:, Q] = _to_data("ddim", prediction_type, alpha, sigma)
    rows[:, B] = alpha_bar_next.sqrt()
    # The direction is the predicted noise: the output itself for epsilon, sigma x + alpha v for v.
    if prediction_type == "epsilon":
        rows[:, E] = direction
    else:
        rows[:, A], rows[:, E] = direction * sigma, direction * alpha
    rows[:, S] = variance.sqrt()
    return SolverTable(rows, timesteps, f"ddim (eta {eta:g}), {prediction_type}, {steps} steps")


def ddpm(alphas_cumprod: Tensor, steps: int, prediction_type: str) -> SolverTable:
    """Ancestral sampling (Ho et al. 2020) with the posterior's variance ("fixed_small"); nothing is clipped.

    Timesteps are k * (T // steps), descending, so the first lies below T - 1 unless steps is T ("leading").

    Args:
        alphas_cumprod: float64 [T].
        steps: 1 to T.
        prediction_type: "epsilon" or "v_prediction".

    Raises:
        ValueError: an argument is not as above.
    """
    timesteps, alpha_bar, alpha_bar_next = _leading("ddpm", alphas_cumprod, steps)
    alpha, sigma = _levels(alpha_bar)
    beta = 1 - alpha_bar / alpha_bar_next

    rows = _rows(timesteps)
    rows[:, P], rows[:, Q] = _to_data("ddpm", prediction_type, alpha, sigma)
    rows[:, A] = (alpha_bar / alpha_bar_next).sqrt() * (1 - alpha_bar_next) / (1 - alpha_bar)
    rows[:, B] = alpha_bar_next.sqrt() * beta / (1 - alpha_bar)
    # 0 at the last step, where alpha_bar_next is 1.
    rows[:, S] = (beta * (1 - alpha_bar_next) / (1 - alpha_bar)).sqrt()
    return SolverTable(rows, timesteps, f"ddpm, {prediction_type}, {steps} steps")


def flow_euler(steps: int) -> SolverTable:
    """Euler steps along a flow that predicts noise - x0, t = linspace(1, 0, steps + 1) (Lipman et al. 2023).

    Raises:
        ValueError: steps < 1.
    """
    if steps < 1:
        raise ValueError(f"flow_euler: expected steps >= 1, got {steps}")
    t = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    timesteps = 1000 * t[:-1]
    rows = _rows(timesteps)
    rows[:, P], rows[:, Q] = 1.0, -t[:-1]
    rows[:, A] = 1.0
    rows[:, E] = t[1:] - t[:-1]
    return SolverTable(rows, timesteps, f"euler, flow, {steps} steps")


def build_table(solver: str, steps: int, prediction_type: str, schedule_name: str) -> SolverTable:
    """The table of a solver by its name in `SOLVERS`, with its default options.

    `schedule_name` (`fastlatent.diffusion.schedules`, T = 1000) is not used by euler, whose path is straight.

    Raises:
        ValueError: a name is unknown, steps is out of range, or euler and flow are not together.
    """
    if solver not in SOLVERS:
        raise ValueError(f"build_table: expected a solver of {', '.join(SOLVERS)}, got {solver!r}")
    if prediction_type not in PREDICTION_TYPES:
        raise ValueError(
            f"build_table: expected a prediction_type of {', '.join(PREDICTION_TYPES)}, got {prediction_type!r}"
        )
    if (solver == "euler") != (prediction_type == "flow"):
        wanted = "flow" if solver == "euler" else "epsilon or v_prediction"
        raise ValueError(f"build_table: expected prediction_type {wanted} for {solver}, got {prediction_type}")
    if solver == "euler":
        return flow_euler(steps)
    schedule = schedule_by_name(schedule_name)
    if solver == "dpmsolver++":
        return dpmsolver_pp(schedule, steps, prediction_type)
    if solver == "ddim":
        return ddim(schedule, steps, prediction_type)
    return ddpm(schedule, steps, prediction_type)


def _check_steps(name: str, steps: int, train_timesteps: int) -> None:
    if not 1 <= steps <= train_timesteps:
        raise ValueError(f"{name}: expected 1 to {train_timesteps} steps, got {steps}")


def _rows(timesteps: Tensor) -> Tensor:
    rows = torch.zeros(len(timesteps), ROW, dtype=torch.float64)
    rows[:, R] = torch.inf
    rows[:, T] = timesteps
    return rows


def _levels(alpha_bar: Tensor) -> tuple[Tensor, Tensor]:
    return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()


def _shifted(values: Tensor, final: float) -> Tensor:
    """The values at each step's end: the next step's, and `final` after the last."""
    return torch.cat([values[1:], values.new_tensor([final])])


def _leading(name: str, alphas_cumprod: Tensor, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """Timesteps with "leading" spacing, and alphas_cumprod at each step's start and end (finally 1)."""
    _check_steps(name, steps, len(alphas_cumprod))
    timesteps = torch.arange(steps).flip(0) * (len(alphas_cumprod) // steps)
    alpha_bar = alphas_cumprod[timesteps]
    return timesteps.double(), alpha_bar, _shifted(alpha_bar, 1.0)


def _to_data(name: str, prediction_type: str, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """p and q of x0 = p x + q output."""
    if prediction_type == "epsilon":
        return 1 / alpha, -sigma / alpha
    if prediction_type == "v_prediction":
        return alpha, -sigma
    raise ValueError(f"{name}: expected prediction_type epsilon or v_prediction, got {prediction_type!r}")
