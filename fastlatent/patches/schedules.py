"""A scheduler's loop over a head, learnt by running it once, and accepted only where our table does the same."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastlatent.diffusion.from_diffusers import CONVERTERS
from fastlatent.diffusion.rows import new_rows, shifted
from fastlatent.diffusion.solvers import SolverTable
from fastlatent.ops.solver_step import A, E, P, Q, solver_step_reference

Network = Callable[[Tensor, Tensor], Tensor]  # (noisy tokens, timesteps [rows]) -> the network's output
Loop = Callable[[Network, Tensor], Tensor]  # (network, noise) -> tokens; what LatentLM calls sample_func
# Published schedulers keep float32 tables, where 1 - beta = 0.001 of the cosine schedule's end is 3e-5 off.
TOLERANCE = 1e-4


@dataclass(frozen=True, eq=False)
class Schedule:
    """A loop as a table.

    Attributes:
        table: the solver.
        timesteps: float64 [S], what the loop gives to the network.
        draws: the dtype that step k's noise is drawn in, or None where it draws none; torch.float64 stands for the
            network's own dtype.
    """

    table: SolverTable
    timesteps: Tensor
    draws: tuple[torch.dtype | None, ...]

    def noise(self, rows: int, channels: int, like: Tensor) -> Tensor | None:
        """What the scheduler would draw for `rows` rows from the global generator of like's device, [S, rows, C]."""
        if not any(self.draws):
            return None
        noise = torch.zeros(len(self.draws), rows, channels, dtype=torch.float64, device=like.device)
        for step, dtype in zip(noise, self.draws, strict=True):
            if dtype is not None:
                dtype = like.dtype if dtype is torch.float64 else dtype
                step.copy_(torch.randn(rows, channels, dtype=dtype, device=like.device))
        return noise


@contextmanager
def same_draws(device: torch.device) -> Iterator[Callable[[], None]]:
    """What is drawn inside leaves no trace; the function that it yields has the same numbers drawn once more."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        states = torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None

        def again() -> None:
            torch.set_rng_state(states[0])
            if states[1] is not None:
                torch.cuda.set_rng_state(states[1], device)

        yield again


def learn(scheduler: Any, loop: Loop, shape: tuple[int, ...], device: torch.device) -> Schedule:
    """Run `loop` over noise [2, *shape] in float64 and a network that writes down what it is asked.

    Args:
        scheduler: what the loop steps with: one that `SolverTable.from_diffusers` knows, or a FlowMatching… scheduler
            of LatentLM's forks, Euler steps over its `timesteps` and from the last of them to 0.
        loop: takes one global draw a step at most, and leaves the scheduler as it likes.
        shape: of one token.
        device: where the loop is to run.

    Raises:
        ValueError: the scheduler has no table, or the table does not reproduce the loop.
    """
    start = torch.randn((2, *shape), generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(device)
    asked: list[Tensor] = []

    def recorder(image: Tensor, t: Tensor) -> Tensor:
        if image.shape != start.shape or t.numel() != 2 or t.flatten()[0] != t.flatten()[1]:
            raise ValueError(
                f"patch: expected a loop that calls the network with the image {list(start.shape)} and one timestep "
                f"for all its rows, got {list(image.shape)} and {t.tolist()}"
            )
        asked.append(t.flatten()[0].double().cpu())
        return _output(image, len(asked) - 1)

    with same_draws(device) as again:
        returned = loop(recorder, start).double().reshape(2, -1)
        if not asked:
            raise ValueError("patch: expected a loop that calls the network, got one that does not")
        try:
            table = _table(scheduler, len(asked))
        except ValueError as error:
            raise ValueError(f"{error}; or undo the patch: the model itself samples with any scheduler") from None
        schedule = Schedule(table, torch.stack(asked), _draws(scheduler, torch.stack(asked)))
        again()
        noise = schedule.noise(2, math.prod(shape), start)
    state = torch.zeros(4, 2, math.prod(shape), dtype=torch.float64, device=device)
    state[0] = start.flatten(1)
    guidance = torch.ones(1, 2, dtype=torch.float64, device=device)
    for k, row in enumerate(table.rows.to(device)):
        step_noise = None if noise is None else noise[k]
        solver_step_reference(state, _output(state[0], k)[None], guidance, row, step_noise)
    apart = float((state[0] - returned).abs().max() / returned.abs().max())
    if not apart <= TOLERANCE:
        raise ValueError(
            f"patch: expected a loop that does what its {type(scheduler).__name__} does by its config "
            f"({table.name}), got other tokens (relative difference {apart:.1e}): custom timesteps, a generator of its "
            "own or other arithmetic have no table; undo the patch, and the model samples with this loop itself"
        )
    return schedule


def scheduler_loop(scheduler: Any, steps: int) -> Loop:
    """The loop that LatentLM and VibeVoice are published with."""

    def loop(network: Network, image: Tensor) -> Tensor:
        scheduler.set_timesteps(steps)
        for t in scheduler.timesteps:
            image = scheduler.step(network(image, t.repeat(len(image)).to(image)), t, image).prev_sample
        return image

    return loop


def _output(image: Tensor, step: int) -> Tensor:
    """Of a size like a real network's, so that neither float32 nor 250 steps run out of range."""
    return (0.2 + 0.6 * ((0.618 * step) % 1)) * image + 0.1


def _table(scheduler: Any, steps: int) -> SolverTable:
    name = type(scheduler).__name__
    if name not in CONVERTERS and name.startswith("FlowMatching"):
        t = scheduler.timesteps.double().cpu()
        rows = new_rows(t)
        rows[:, P], rows[:, Q], rows[:, A], rows[:, E] = 1.0, -t, 1.0, shifted(t, 0.0) - t
        return SolverTable(rows, t, f"euler, flow, {steps} steps")
    if name in CONVERTERS and not isinstance(getattr(scheduler, "config", None), Mapping):
        raise ValueError(f"patch: expected a {name} with its options in `config`, as diffusers keeps them, got none")
    return SolverTable.from_diffusers(scheduler, steps)


def _draws(scheduler: Any, timesteps: Tensor) -> tuple[torch.dtype | None, ...]:
    """How `step` draws, by class: whether a step's coefficient of the noise is 0 does not matter to the generator."""
    name, config = type(scheduler).__name__, getattr(scheduler, "config", {})
    if name == "DDPMScheduler":
        return tuple(torch.float64 if t > 0 else None for t in timesteps)
    drawn = None
    if name == "DPMSolverMultistepScheduler" and config["algorithm_type"].startswith("sde"):
        drawn = torch.float32
    elif name == "DPMSolverSinglestepScheduler" and config["algorithm_type"] == "sde-dpmsolver++":
        drawn = torch.float64
    elif name == "FlowMatchEulerDiscreteScheduler" and config.get("stochastic_sampling", False):
        drawn = torch.float32
    return (drawn,) * len(timesteps)
