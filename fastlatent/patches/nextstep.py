"""NextStep-1 (stepfun-ai/NextStep-1): FlowMatchingHead.sample as one op.

Three releases differ in their samplers, told apart by the arguments of `sample`. t goes up from 0 (noise) to 1, and the
network predicts v = data - noise and is given t itself.

- 1 (`cfg2`): steps - 1 Euler-Maruyama steps to 1 - last_step_size, one ODE step over the rest.
- 1.1 (`cfg_img`): Euler-Maruyama steps to 1, all noisy.
- its training code (`sde_type`): steps to 1 by "sde" or "cps" (both noisy, of strength noise_level), else the ODE.

What stays as published: the signatures, the branches (one more for each of the two scales above 1), the order and dtype
of the draws, and that 1 and 1.1 share noise among groups of noise_repeat tokens. What differs: times and coefficients
are float64, where the published code has float32 and hands t to the network in the dtype of c. The layer norm of
`use_norm` is the caller's.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastlatent.diffusion.rows import new_rows
from fastlatent.diffusion.solvers import SolverTable
from fastlatent.heads.diffusion_head import DiffusionHead
from fastlatent.ops.solver_step import A, E, S
from fastlatent.patches.handle import PatchHandle
from fastlatent.patches.mar import CastHead, KnownHead, adaln_mlp_mismatch, prove_loop


def mismatch(model: Any) -> str:
    """ "" where the model has one image_head that is NextStep's; else what is missing or otherwise."""
    found = _found(model)
    if len(found) != 1:
        return f"expected a module image_head with net and sample, got {', '.join(found) or 'none'}"
    [(path, head)] = found.items()
    arguments = _arguments(head)
    if arguments not in RELEASES:
        known = " or ".join(f"({', '.join(names)})" for names in RELEASES)
        return f"expected {path}.sample{known}, got ({', '.join(arguments)})"
    return adaln_mlp_mismatch(head.net)


def apply(model: Any, handle: PatchHandle) -> None:
    """Replace `sample` of the model's image_head.

    Raises:
        ValueError: its weights are not those of NextStep's head.
    """
    [(path, head)] = _found(model).items()
    cast, release = CastHead(head, "nextstep", torch.tensor([0.03, 0.7])), RELEASES[_arguments(head)]
    before = (None,) if release is _training_code else ()  # the noise
    for ways, scales in ((1, (1.0, 1.0)), (2, (1.5, 1.0)), (3, (1.5, 2.0))):
        prove_loop(head, cast.get(), release, ways, *before, *scales, 1.5, 3)
    handle.replace(head, "sample", release(cast), path)


def _found(model: Any) -> dict[str, Any]:
    if not isinstance(model, nn.Module):
        return {}
    return {
        path: module
        for path, module in model.named_modules()
        if path.split(".")[-1] == "image_head"
        and "net" in module._modules
        and callable(getattr(module, "sample", None))
    }


def _arguments(head: Any) -> tuple[str, ...]:
    return tuple(inspect.signature(head.sample).parameters)


# ---- the samplers of the releases --------------------------------------------------------------------------


def _release_1(cast: CastHead | KnownHead) -> Callable[..., Tensor]:
    def sample(
        c: Tensor, cfg: float = 1.0, cfg2: float = 1.0, timesteps_shift: float = 1.0, num_sampling_steps: int = 20,
        last_step_size: float = 0.04, noise_repeat: int = 1,
    ) -> Tensor:  # fmt: skip
        solver = _euler_maruyama(num_sampling_steps, float(timesteps_shift), float(last_step_size))
        return _with_shared_noise(cast.get(), c, cfg, cfg2, solver, num_sampling_steps - 1, noise_repeat)

    return sample


def _release_1_1(cast: CastHead | KnownHead) -> Callable[..., Tensor]:
    def sample(
        c: Tensor, cfg: float = 1.0, cfg_img: float = 1.0, timesteps_shift: float = 1.0, num_sampling_steps: int = 20,
        last_step_size: float = 0.0, noise_repeat: int = 1,
    ) -> Tensor:  # fmt: skip
        # last_step_size has no effect there either.
        solver = _euler_maruyama(num_sampling_steps, float(timesteps_shift), None)
        return _with_shared_noise(cast.get(), c, cfg, cfg_img, solver, num_sampling_steps, noise_repeat)

    return sample


def _training_code(cast: CastHead | KnownHead) -> Callable[..., Tensor]:
    def sample(
        c: Tensor, noise: Tensor | None = None, cfg: float = 1.0, cfg_img: float = 1.0, timesteps_shift: float = 1.0,
        num_sampling_steps: int = 20, last_step_size: float = 0.0, noise_repeat: int = 1, sde_solver: bool = False,
        sde_type: str = "sde", noise_level: float = 0.8,
    ) -> Tensor:  # fmt: skip
        # last_step_size, noise_repeat and sde_solver have no effect there either.
        head = cast.get()
        shape = _batch(c, cfg, cfg_img), head.spec.channels
        if noise is None:
            noise = torch.randn(shape, device=c.device, dtype=c.dtype)
        solver = _flow_sde(num_sampling_steps, float(timesteps_shift), sde_type, float(noise_level))
        step_noise = None
        if sde_type in ("sde", "cps"):
            step_noise = torch.stack(
                [torch.randn(shape, device=c.device, dtype=c.dtype) for _ in range(num_sampling_steps)]
            )
        return _denoise(head, c, cfg, cfg_img, solver, noise, step_noise)

    return sample


COMMON = ("timesteps_shift", "num_sampling_steps", "last_step_size", "noise_repeat")
RELEASES = {
    ("c", "cfg", "cfg2", *COMMON): _release_1,
    ("c", "cfg", "cfg_img", *COMMON): _release_1_1,
    ("c", "noise", "cfg", "cfg_img", *COMMON, "sde_solver", "sde_type", "noise_level"): _training_code,
}


def _with_shared_noise(
    head: DiffusionHead | KnownHead, c: Tensor, cfg: float, cfg_img: float, solver: SolverTable, draws: int, repeat: int
) -> Tensor:
    """Tokens whose noise, float32, is `repeat` rows over and over down the batch, anew at the first `draws` steps."""
    batch, device = _batch(c, cfg, cfg_img), head.weights.device
    if batch % repeat:
        raise ValueError(f"FlowMatchingHead.sample: expected noise_repeat to divide {batch} tokens, got {repeat}")

    def draw() -> Tensor:
        shape = repeat, head.spec.channels
        return torch.randn(shape, dtype=torch.float32, device=device).repeat(batch // repeat, 1)

    start = draw()
    step_noise = start.new_zeros(len(solver.rows), *start.shape)
    for step in step_noise[:draws]:
        step.copy_(draw())
    return _denoise(head, c, cfg, cfg_img, solver, start, step_noise)


def _batch(c: Tensor, cfg: float, cfg_img: float) -> int:
    """Tokens, of which c has one row for each branch."""
    ways = 1 + (cfg > 1.0) + (cfg_img > 1.0)
    if c.ndim != 2 or len(c) % ways:
        raise ValueError(
            f"FlowMatchingHead.sample: expected c [{ways} branches times B, Z] for cfg {cfg} and {cfg_img}, got "
            f"{list(c.shape)}"
        )
    return len(c) // ways


def _denoise(
    head: DiffusionHead | KnownHead,
    c: Tensor,
    cfg: float,
    cfg_img: float,
    solver: SolverTable,
    start: Tensor,
    noise: Tensor | None,
) -> Tensor:
    cond, *nulls = c.split(max(1, len(start)))
    scales = (float(cfg), float(cfg_img))
    with torch.autocast(c.device.type, enabled=False):
        if not nulls:
            token = head.sample(cond, solver=solver, noise=start, step_noise=noise)
        elif len(nulls) == 1:
            token = head.sample(
                cond, null_cond=nulls[0], guidance_scale=scales[0], solver=solver, noise=start, step_noise=noise
            )
        else:
            token = head.sample(
                cond,
                null_cond=(nulls[0], nulls[1]),
                guidance_scale=scales,
                solver=solver,
                noise=start,
                step_noise=noise,
            )
    return token.to(c.dtype)


# ---- tables ------------------------------------------------------------------------------------------------


def _grid(steps: int, end: float, count: int, shift: float) -> Tensor:
    """`steps` times of linspace(0, end, count), shifted."""
    if steps < 1 or count < 2 or shift <= 0:
        raise ValueError(
            f"FlowMatchingHead.sample: expected num_sampling_steps >= {2 + steps - count} and timesteps_shift > 0, got "
            f"{steps} and {shift}"
        )
    t = torch.linspace(0, end, count, dtype=torch.float64)[:steps]
    return t / (shift - (shift - 1) * t)


@functools.lru_cache(maxsize=64)
def _euler_maruyama(steps: int, shift: float, last: float | None) -> SolverTable:
    """Of dx = ((1 + t) v - x) dt + sqrt(2 (1 - t)) dw, and over the `last` of the time of dx = v dt."""
    t = _grid(steps, 1.0, steps + 1, shift) if last is None else _grid(steps, 1.0 - last, steps, shift)
    dt = torch.cat([t, t.new_ones(1)]).diff()
    rows = new_rows(t)
    rows[:, A], rows[:, E], rows[:, S] = 1 - dt, (1 + t) * dt, (2 * (1 - t) * dt).sqrt()
    if last is not None:
        rows[-1, A], rows[-1, E], rows[-1, S] = 1.0, last, 0.0
    return SolverTable(rows, t, f"nextstep sde of a model (shift {shift:g}), {steps} steps")


@functools.lru_cache(maxsize=64)
def _flow_sde(steps: int, shift: float, kind: str, level: float) -> SolverTable:
    """x' = k noise + u data + s z for the step from t to u, with the noise x - t v and the data x + (1 - t) v of x."""
    t = _grid(steps, 1.0, steps + 1, shift)
    u = torch.cat([t[1:], t.new_ones(1)])
    k, s = 1 - u, torch.zeros_like(t)
    if kind == "sde":  # Flow-GRPO's; at t = 0 its published code divides by 1 - (the last t) instead of by t
        variance = level**2 * (1 - t) / torch.where(t == 0, 1 - t[-1], t)
        k, s = k - variance * (u - t) / (2 * (1 - t)), (variance * (u - t)).sqrt()
    elif kind == "cps":
        k, s = (1 - u) * math.cos(level * math.pi / 2), (1 - u) * math.sin(level * math.pi / 2)
    rows = new_rows(t)
    rows[:, A], rows[:, E], rows[:, S] = k + u, u * (1 - t) - k * t, s
    return SolverTable(rows, t, f"nextstep flow {kind} of a model (shift {shift:g}), {steps} steps")
