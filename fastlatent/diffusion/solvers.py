"""Samplers as tables: one row of coefficients per step, for `fastlatent.ops.solver_step`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastlatent.diffusion.rows import (
    DPM_TYPES,
    ddim_rows,
    ddpm_rows,
    dpm_rows,
    levels,
    new_rows,
    shifted,
    to_data,
)
from fastlatent.diffusion.schedules import alphas_cumprod as schedule_by_name
from fastlatent.diffusion.targets import PREDICTION_TYPES
from fastlatent.ops.solver_step import A, E, P, Q, S

SOLVERS = ("dpmsolver++", "ddim", "ddpm", "euler")
TIMESTEP_SPACINGS = ("leading", "trailing")


@dataclass(frozen=True, eq=False)
class SolverTable:
    """All a sampler needs to know about its solver.

    Attributes:
        rows: float64 CPU [S, 16], one row per step, columns as in `fastlatent.ops.solver_step`.
        timesteps: float64 CPU [S], what the network is given at each step: integers from 0 to T - 1 for a
            discrete schedule; for flow 1000 * t, or t itself (the builder says which). [S, 2] for a flow map,
            whose network takes the times at which a step begins and ends.
        name: solver, options and number of steps, for logs.
    """

    rows: Tensor
    timesteps: Tensor
    name: str

    @property
    def needs_noise(self) -> bool:
        """Whether any step adds noise, so that `solver_step` must be given some."""
        return bool((self.rows[:, S] != 0).any())

    @staticmethod
    def from_diffusers(
        scheduler: Any, num_inference_steps: int, *, eta: float = 0.0, mu: float | None = None
    ) -> SolverTable:
        """The sampler of a diffusers scheduler, which is left as it is.

        DPMSolverMultistepScheduler, DPMSolverSinglestepScheduler, DDIMScheduler, DDPMScheduler and
        FlowMatchEulerDiscreteScheduler, or copies of them under the same names, with all their options but dynamic
        thresholding, a `variance_type` other than the DDPM scheduler's, dynamic shifting of DPMSolver, and the beta
        schedules sigmoid and laplace.

        Timesteps are the scheduler's. Coefficients are computed in float64 from its config, not from its own
        float32 tables, so results are more exact than diffusers' and differ by its rounding.

        Args:
            scheduler: of one of the classes above.
            num_inference_steps: 1 to the scheduler's num_train_timesteps.
            eta: share of DDPM's noise, 0 to 1; what DDIMScheduler.step takes.
            mu: shift of the sigmas; what FlowMatchEulerDiscreteScheduler.set_timesteps takes with
                use_dynamic_shifting.

        Raises:
            ValueError: the class or an option has no table (the message says what can be done), or an argument is
                not as above.
        """
        from fastlatent.diffusion.from_diffusers import solver_table

        return solver_table(scheduler, num_inference_steps, eta=eta, mu=mu)


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
    if solver_type not in DPM_TYPES:
        raise ValueError(f"dpmsolver_pp: expected solver_type midpoint or heun, got {solver_type!r}")
    _check_steps("dpmsolver_pp", steps, len(alphas_cumprod))
    grid = torch.linspace(0, len(alphas_cumprod) - 1, steps + 1, dtype=torch.float64).round()
    timesteps = grid.flip(0)[:-1]
    alpha_bar = alphas_cumprod[timesteps.long()]
    _check_prediction("dpmsolver_pp", prediction_type, alpha_bar)
    alpha, sigma = levels(torch.cat([alpha_bar, alpha_bar.new_ones(1)]))
    orders = torch.full((steps,), order)
    orders[0] = orders[-1] = 1
    rows = dpm_rows(timesteps, alpha, sigma, orders, algorithm="dpmsolver++", solver_type=solver_type)
    rows[:, P], rows[:, Q] = to_data(prediction_type, alpha[:-1], sigma[:-1])
    kind = f"order {order}" if order == 1 else f"order {order} {solver_type}"
    return SolverTable(rows, timesteps, f"dpmsolver++ ({kind}), {prediction_type}, {steps} steps")


def ddim(
    alphas_cumprod: Tensor,
    steps: int,
    prediction_type: str,
    *,
    eta: float = 0.0,
    timestep_spacing: str = "leading",
) -> SolverTable:
    """DDIM (Song et al. 2020): deterministic at eta = 0, as noisy as DDPM at eta = 1; nothing is clipped.

    Timesteps, descending, are k * (T // steps), so the first lies below T - 1 unless steps is T ("leading"); or
    round(T - k * T / steps) - 1, so the first is T - 1 ("trailing"). Each step ends where the next begins, the
    last one at alpha_bar = 1. Orthus samples with 100 trailing steps, v_prediction and
    `rescale_zero_terminal_snr` of the scaled_linear schedule.

    Args:
        alphas_cumprod: float64 [T]; its last value may be 0 with v_prediction.
        steps: 1 to T.
        prediction_type: "epsilon" or "v_prediction".
        eta: share of DDPM's noise, 0 to 1.
        timestep_spacing: "leading" or "trailing".

    Raises:
        ValueError: an argument is not as above.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"ddim: expected eta in [0, 1], got {eta}")
    if timestep_spacing not in TIMESTEP_SPACINGS:
        raise ValueError(
            f"ddim: expected a timestep_spacing of {', '.join(TIMESTEP_SPACINGS)}, got {timestep_spacing!r}"
        )
    _check_steps("ddim", steps, len(alphas_cumprod))
    if timestep_spacing == "leading":
        timesteps = _leading(steps, len(alphas_cumprod))
    else:
        timesteps = (torch.arange(steps, 0, -1, dtype=torch.float64) * len(alphas_cumprod) / steps).round() - 1
    alpha_bar = alphas_cumprod[timesteps.long()]
    _check_prediction("ddim", prediction_type, alpha_bar)
    rows = ddim_rows(timesteps, alpha_bar, shifted(alpha_bar, 1.0), prediction_type, eta)
    spacing = "" if timestep_spacing == "leading" else f", {timestep_spacing}"
    return SolverTable(rows, timesteps, f"ddim (eta {eta:g}{spacing}), {prediction_type}, {steps} steps")


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
    _check_steps("ddpm", steps, len(alphas_cumprod))
    timesteps = _leading(steps, len(alphas_cumprod))
    alpha_bar = alphas_cumprod[timesteps.long()]
    _check_prediction("ddpm", prediction_type, alpha_bar)
    rows = ddpm_rows(timesteps, alpha_bar, shifted(alpha_bar, 1.0), prediction_type, "fixed_small")
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
    rows = new_rows(timesteps)
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


def _check_prediction(name: str, prediction_type: str, alpha_bar: Tensor) -> None:
    if prediction_type not in ("epsilon", "v_prediction"):
        raise ValueError(f"{name}: expected prediction_type epsilon or v_prediction, got {prediction_type!r}")
    if prediction_type == "epsilon" and (alpha_bar == 0).any():
        raise ValueError(
            f"{name}: expected v_prediction for a schedule with zero terminal SNR, got epsilon; where alpha_bar is 0 "
            "it says nothing about the data"
        )


def _leading(steps: int, train_timesteps: int) -> Tensor:
    return (torch.arange(steps).flip(0) * (train_timesteps // steps)).double()
