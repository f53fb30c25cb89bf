"""Solver tables from diffusers schedulers, told apart by class name and read by config: diffusers is not imported."""

from __future__ import annotations

import copy
import importlib
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastlatent.diffusion.rows import (
    DPM_ALGORITHMS,
    DPM_TYPES,
    ddim_rows,
    ddpm_rows,
    dpm_rows,
    new_rows,
    shifted,
    to_data,
    to_noise,
)
from fastlatent.diffusion.schedules import alphas_cumprod, rescale_zero_terminal_snr
from fastlatent.diffusion.solvers import SolverTable
from fastlatent.ops.solver_step import A, B, E, P, Q, R, S

# "cosine" is what VibeVoice's copy of the DPMSolver scheduler calls it.
SCHEDULE_NAMES = {
    "linear": "linear",
    "scaled_linear": "scaled_linear",
    "squaredcos_cap_v2": "cosine",
    "cosine": "cosine",
}
SIGMA_SPACINGS = {
    "use_karras_sigmas": "karras",
    "use_lu_lambdas": "exponential",  # uniform in log SNR is uniform in log sigma; only timesteps are rounded otherwise
    "use_exponential_sigmas": "exponential",
    "use_beta_sigmas": "beta",
}
VARIANCE_TYPES = {
    "fixed_small": "fixed_small",
    "fixed_small_log": "fixed_small",  # the same standard deviation, by way of its logarithm
    "fixed_large": "fixed_large",
    "learned_range": "learned_range",
}


def solver_table(scheduler: Any, num_inference_steps: int, *, eta: float = 0.0, mu: float | None = None) -> SolverTable:
    """See `SolverTable.from_diffusers`."""
    name, steps = type(scheduler).__name__, num_inference_steps
    if name == "EulerDiscreteScheduler":
        raise ValueError(
            "from_diffusers: got an EulerDiscreteScheduler, which scales its start noise and what the network is given "
            "(scale_model_input), and a row does neither; expected DPMSolverMultistepScheduler with solver_order=1, "
            "which takes Euler's steps in unscaled variables"
        )
    if name not in CONVERTERS:
        raise ValueError(f"from_diffusers: expected a scheduler of {', '.join(CONVERTERS)}, got {name}")
    config = scheduler.config
    if config.get("thresholding", False):
        raise ValueError(
            "from_diffusers: expected thresholding=False, got True: dynamic thresholding needs a quantile of each "
            "sample; clip_sample of DDIMScheduler and DDPMScheduler has a table"
        )
    flow = name == "FlowMatchEulerDiscreteScheduler"
    if steps < 1 or (steps > config["num_train_timesteps"] and not flow):
        wanted = ">= 1" if flow else f"1 to {config['num_train_timesteps']} (num_train_timesteps)"
        raise ValueError(f"from_diffusers: expected num_inference_steps {wanted}, got {steps}")
    if not 0 <= eta <= 1 or (eta and name != "DDIMScheduler"):
        raise ValueError(f"from_diffusers: expected eta in [0, 1] for DDIMScheduler, or 0, got {eta} for {name}")
    if mu is not None and not (flow and config.get("use_dynamic_shifting", False)):
        raise ValueError(
            "from_diffusers: expected mu only for FlowMatchEulerDiscreteScheduler with use_dynamic_shifting=True, "
            f"got mu={mu} for {name}"
        )
    table = CONVERTERS[name](scheduler, steps, eta, mu)
    if not torch.isfinite(table.rows.index_fill(1, torch.tensor(R), 0)).all():
        raise ValueError(
            f"from_diffusers: expected finite coefficients, got others from {table.name}; two steps fall together "
            "(use fewer), or prediction_type epsilon meets a schedule with zero terminal SNR (use v_prediction)"
        )
    return table


def _dpm(scheduler: Any, steps: int, eta: float, mu: float | None) -> SolverTable:
    config = scheduler.config
    algorithm, solver_type = config["algorithm_type"], config["solver_type"]
    singlestep = type(scheduler).__name__ == "DPMSolverSinglestepScheduler"
    order = _choice(config, "solver_order", (1, 2, 3))
    _choice(config, "algorithm_type", DPM_ALGORITHMS)
    _choice(config, "solver_type", DPM_TYPES)
    if config.get("variance_type", None) is not None:
        raise ValueError(
            f"from_diffusers: expected variance_type None for {type(scheduler).__name__}, got "
            f"{config['variance_type']!r}; drop the network's variance channels, which this solver does not use"
        )
    if config.get("use_dynamic_shifting", False):
        raise ValueError(
            f"from_diffusers: expected use_dynamic_shifting=False for {type(scheduler).__name__}, got True; set "
            "flow_shift=exp(mu) instead"
        )
    if algorithm == "sde-dpmsolver" and order == 3:
        raise ValueError("from_diffusers: expected solver_order 1 or 2 for sde-dpmsolver, got 3, which is not defined")
    data_prediction = algorithm in ("dpmsolver++", "sde-dpmsolver++")
    prediction_type = _choice(
        config,
        "prediction_type",
        ("epsilon", "v_prediction", "sample") + (("flow_prediction",) if data_prediction else ()),
    )
    alpha_bar = _alphas_cumprod(config)
    if config.get("rescale_betas_zero_snr", False):
        alpha_bar[-1] = 2.0**-24  # as diffusers does, so that sigma is finite
    scheduler, timesteps = _with_timesteps(scheduler, steps)
    train_sigma = ((1 - alpha_bar) / alpha_bar).sqrt()
    ratio, flow = train_sigma[timesteps.long()], bool(config.get("use_flow_sigmas", False))
    spacing = next((kind for name, kind in SIGMA_SPACINGS.items() if config.get(name, False)), None)
    if spacing is not None:
        ratio = _spaced(spacing, train_sigma[-1].item(), train_sigma[0].item(), steps)
    elif flow:
        noise = 1 - torch.linspace(1, 1 / len(alpha_bar), steps + 1, dtype=torch.float64)
        shift = config["flow_shift"]
        ratio = (shift * noise / (1 + (shift - 1) * noise)).flip(0)[:-1]
    if steps > 1 and ratio[0] == ratio[-1]:
        raise ValueError(
            f"from_diffusers: expected timesteps that go down, got {steps} times {timesteps[0]:g}; use fewer steps or "
            "another timestep_spacing"
        )
    # `ratio` is sigma / alpha, as diffusers keeps it; with flow sigmas it is sigma itself, and alpha is 1 - sigma.
    final = 0.0 if config["final_sigmas_type"] == "zero" else train_sigma[0].item()
    ratio = torch.cat([ratio, ratio.new_tensor([final])])
    alpha = 1 - ratio if flow else 1 / (1 + ratio**2).sqrt()
    sigma = ratio if flow else ratio * alpha
    # The scheduler may have switched lower_order_final on in set_timesteps, which its copy remembers.
    orders = scheduler.order_list if singlestep else _multistep_orders(config, steps)
    rows = dpm_rows(
        timesteps,
        alpha,
        sigma,
        torch.tensor(orders),
        algorithm=algorithm,
        solver_type=solver_type,
        singlestep=singlestep,
    )
    if prediction_type == "flow_prediction":
        rows[:, P], rows[:, Q] = 1.0, -ratio[:-1]
    else:
        convert = to_data if data_prediction else to_noise
        rows[:, P], rows[:, Q] = convert(prediction_type, alpha[:-1], sigma[:-1])
    kind = f"{'singlestep ' if singlestep else ''}order {order} {solver_type}"
    return SolverTable(rows, timesteps, f"{algorithm} ({kind}), {prediction_type}, {steps} steps")


def _multistep_orders(config: Mapping[str, Any], steps: int) -> list[int]:
    few = config["lower_order_final"] and steps < 15
    orders = [min(config["solver_order"], k + 1) for k in range(steps)]
    if few:
        orders[-2:] = [min(order, 2) for order in orders[-2:]]
    if few or config.get("euler_at_final", False) or config["final_sigmas_type"] == "zero":
        orders[-1] = 1
    return orders


def _ddim(scheduler: Any, steps: int, eta: float, mu: float | None) -> SolverTable:
    config = scheduler.config
    prediction_type = _choice(config, "prediction_type", ("epsilon", "v_prediction", "sample"))
    alpha_bar = _alphas_cumprod(config)
    _, timesteps = _with_timesteps(scheduler, steps)
    # Not the next timestep: with "linspace", or where steps does not divide T, a step ends beside it.
    following = timesteps.long() - len(alpha_bar) // steps
    final = alpha_bar.new_tensor(1.0) if config.get("set_alpha_to_one", True) else alpha_bar[0]
    ends = torch.where(following >= 0, alpha_bar[following.clamp(min=0)], final)
    rows = ddim_rows(timesteps, alpha_bar[timesteps.long()], ends, prediction_type, eta)
    _clip(rows, config)
    return SolverTable(rows, timesteps, f"ddim (eta {eta:g}), {prediction_type}, {steps} steps")


def _ddpm(scheduler: Any, steps: int, eta: float, mu: float | None) -> SolverTable:
    config = scheduler.config
    prediction_type = _choice(config, "prediction_type", ("epsilon", "v_prediction", "sample"))
    variance_type = _choice(config, "variance_type", tuple(VARIANCE_TYPES))
    _, timesteps = _with_timesteps(scheduler, steps)
    alpha_bar = _alphas_cumprod(config)[timesteps.long()]
    rows = ddpm_rows(timesteps, alpha_bar, shifted(alpha_bar, 1.0), prediction_type, VARIANCE_TYPES[variance_type])
    _clip(rows, config)
    return SolverTable(rows, timesteps, f"ddpm ({variance_type}), {prediction_type}, {steps} steps")


def _flow(scheduler: Any, steps: int, eta: float, mu: float | None) -> SolverTable:
    config = scheduler.config
    train_timesteps = config["num_train_timesteps"]
    last = torch.tensor(1 / train_timesteps, dtype=torch.float64)
    if config.get("use_dynamic_shifting", False):
        if mu is None:
            raise ValueError(
                "from_diffusers: expected mu with use_dynamic_shifting=True, got None; pass the mu that set_timesteps "
                "gets"
            )
        factor = math.exp(mu) if config.get("time_shift_type", "exponential") == "exponential" else float(mu)
        sigma = _shift(torch.linspace(1, last.item(), steps, dtype=torch.float64), factor)
    else:
        # The last sigma is shifted twice: by the constructor and by set_timesteps, whose shift set_shift may change.
        last = _shift(last, config["shift"])
        factor = getattr(scheduler, "shift", config["shift"])
        sigma = _shift(torch.linspace(1, last.item(), steps, dtype=torch.float64), factor)
    terminal = config.get("shift_terminal", None)
    if terminal:
        sigma = 1 - (1 - sigma) / ((1 - sigma[-1]) / (1 - terminal))
    spacing = next((kind for name, kind in SIGMA_SPACINGS.items() if config.get(name, False)), None)
    if spacing is not None:
        sigma = _spaced(spacing, sigma[0].item(), sigma[-1].item(), steps)
    inverted = bool(config.get("invert_sigmas", False))
    if inverted:
        sigma = 1 - sigma
    following = shifted(sigma, 1.0 if inverted else 0.0)
    timesteps = sigma * train_timesteps
    rows = new_rows(timesteps)
    rows[:, P], rows[:, Q] = 1.0, -sigma
    stochastic = bool(config.get("stochastic_sampling", False))
    if stochastic:
        rows[:, B], rows[:, S] = 1 - following, following
    else:
        rows[:, A], rows[:, E] = 1.0, following - sigma
    return SolverTable(rows, timesteps, f"euler{' (stochastic)' if stochastic else ''}, flow, {steps} steps")


CONVERTERS: dict[str, Callable[[Any, int, float, float | None], SolverTable]] = {
    "DPMSolverMultistepScheduler": _dpm,
    "DPMSolverSinglestepScheduler": _dpm,
    "DDIMScheduler": _ddim,
    "DDPMScheduler": _ddpm,
    "FlowMatchEulerDiscreteScheduler": _flow,
}


def _choice(config: Mapping[str, Any], name: str, choices: tuple) -> Any:
    if config[name] not in choices:
        raise ValueError(f"from_diffusers: expected {name} of {', '.join(map(str, choices))}, got {config[name]!r}")
    return config[name]


def _alphas_cumprod(config: Mapping[str, Any]) -> Tensor:
    """float64 [T] of the config's betas."""
    trained = config.get("trained_betas", None)
    if trained is not None:
        if len(trained) != config["num_train_timesteps"]:
            raise ValueError(
                f"from_diffusers: expected {config['num_train_timesteps']} trained_betas (num_train_timesteps), got "
                f"{len(trained)}"
            )
        alpha_bar = torch.cumprod(1 - torch.as_tensor(np.asarray(trained), dtype=torch.float64), dim=0)
    elif config["beta_schedule"] not in SCHEDULE_NAMES:
        raise ValueError(
            f"from_diffusers: expected beta_schedule of {', '.join(SCHEDULE_NAMES)}, got {config['beta_schedule']!r}; "
            "give its betas to the scheduler as trained_betas"
        )
    else:
        name = SCHEDULE_NAMES[config["beta_schedule"]]
        beta_range = None if name == "cosine" else (config["beta_start"], config["beta_end"])
        alpha_bar = alphas_cumprod(name, config["num_train_timesteps"], beta_range=beta_range)
    return rescale_zero_terminal_snr(alpha_bar) if config.get("rescale_betas_zero_snr", False) else alpha_bar


def _with_timesteps(scheduler: Any, steps: int) -> tuple[Any, Tensor]:
    """A copy of the scheduler after set_timesteps, which may change its config; and the timesteps, float64 [steps]."""
    scheduler = copy.deepcopy(scheduler)
    scheduler.set_timesteps(steps)
    timesteps = scheduler.timesteps.double().cpu()
    train_timesteps = scheduler.config["num_train_timesteps"]
    # np.arange(T, 0, -T / steps) has one element too many for 62 of the 1000 numbers of steps of T = 1000, 61 first.
    if len(timesteps) != steps or timesteps.min() < 0 or timesteps.max() > train_timesteps - 1:
        raise ValueError(
            f"from_diffusers: expected {steps} timesteps from 0 to {train_timesteps - 1}, got {len(timesteps)} from "
            f"{timesteps.min():g} to {timesteps.max():g}; use another number of steps, timestep_spacing "
            f"({scheduler.config.get('timestep_spacing', 'linspace')}) or steps_offset "
            f"({scheduler.config.get('steps_offset', 0)})"
        )
    return scheduler, timesteps


def _shift(t: Tensor, factor: float) -> Tensor:
    return factor * t / (1 + (factor - 1) * t)


def _spaced(kind: str, high: float, low: float, steps: int) -> Tensor:
    """Sigmas from high down to low: Karras et al. 2022 (rho = 7), uniform in the logarithm, or Beta(0.6, 0.6)."""
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    if kind == "karras":
        return (high ** (1 / 7) + ramp * (low ** (1 / 7) - high ** (1 / 7))) ** 7
    if kind == "exponential":
        return torch.exp(math.log(high) + ramp * (math.log(low) - math.log(high)))
    assert kind == "beta", kind
    # Not a dependency of ours, but the scheduler could not be made without it.
    quantiles = importlib.import_module("scipy.stats").beta.ppf(1 - ramp.numpy(), 0.6, 0.6)
    return low + torch.from_numpy(quantiles) * (high - low)


def _clip(rows: Tensor, config: Mapping[str, Any]) -> None:
    if config.get("clip_sample", True):
        rows[:, R] = config.get("clip_sample_range", 1.0)
