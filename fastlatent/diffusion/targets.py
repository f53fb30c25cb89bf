"""What a network is trained to predict: noised inputs and regression targets."""

from __future__ import annotations

import torch
from torch import Tensor

PREDICTION_TYPES = ("epsilon", "v_prediction", "flow")


def add_noise(x0: Tensor, noise: Tensor, t: Tensor, schedule: Tensor | None) -> Tensor:
    """Return x_t = alpha(t) x0 + sigma(t) noise, in x0's dtype. Differentiable.

    Args:
        x0: clean data [B, ...], for tokens [B, N, C].
        noise: standard normal, shaped as x0.
        t: one time per leading index, shaped as x0's first dimensions: [B], or [B, N] for a time per token.
            With a schedule int64 in [0, T); without one floating in [0, 1].
        schedule: alphas_cumprod [T] on t's device (`fastlatent.diffusion.schedules`): alpha = sqrt(ab),
            sigma = sqrt(1 - ab). None is the straight path of flow matching: alpha = 1 - t, sigma = t.

    Raises:
        ValueError: shapes, dtype of t or the device of schedule are not as above.
    """
    alpha, sigma = _levels("add_noise", x0, noise, t, schedule)
    return alpha * x0 + sigma * noise


def target(prediction_type: str, x0: Tensor, noise: Tensor, t: Tensor, schedule: Tensor | None) -> Tensor:
    """Return what the network should predict at x_t, in x0's dtype. Arguments as in `add_noise`.

    epsilon: noise (Ho et al. 2020). v_prediction: alpha noise - sigma x0 (Salimans & Ho 2022).
    flow: noise - x0, the velocity of the straight path (Lipman et al. 2023); only without a schedule.

    Raises:
        ValueError: as `add_noise`; the prediction type is unknown; or flow came with a schedule, or another
            type without one.
    """
    if prediction_type not in PREDICTION_TYPES:
        raise ValueError(
            f"target: expected a prediction_type of {', '.join(PREDICTION_TYPES)}, got {prediction_type!r}"
        )
    if (prediction_type == "flow") != (schedule is None):
        given = "None" if schedule is None else "a schedule"
        wanted = "schedule=None" if prediction_type == "flow" else "a schedule of alphas_cumprod"
        raise ValueError(f"target: expected {wanted} for {prediction_type}, got {given}")
    alpha, sigma = _levels("target", x0, noise, t, schedule)
    if prediction_type == "epsilon":
        return noise.to(x0.dtype)
    if prediction_type == "v_prediction":
        return alpha * noise - sigma * x0
    return noise - x0


def _levels(name: str, x0: Tensor, noise: Tensor, t: Tensor, schedule: Tensor | None) -> tuple[Tensor, Tensor]:
    """alpha and sigma at t, shaped to broadcast against x0 and rounded once to its dtype."""
    if noise.shape != x0.shape:
        raise ValueError(f"{name}: expected noise {list(x0.shape)} like x0, got {list(noise.shape)}")
    if t.shape != x0.shape[: t.ndim]:
        raise ValueError(
            f"{name}: expected t shaped as the first dimensions of x0 {list(x0.shape)}, got {list(t.shape)}"
        )
    if schedule is None:
        if not t.is_floating_point():
            raise ValueError(f"{name}: expected floating t in [0, 1] without a schedule, got {t.dtype}")
        alpha, sigma = 1 - t, t
    else:
        if t.dtype != torch.int64:
            raise ValueError(f"{name}: expected int64 t in [0, {len(schedule)}) with a schedule, got {t.dtype}")
        if schedule.device != t.device:
            raise ValueError(f"{name}: expected the schedule on {t.device} like t, got {schedule.device}")
        alpha_bar = schedule[t]
        alpha, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    shape = t.shape + (1,) * (x0.ndim - t.ndim)
    return alpha.reshape(shape).to(x0.dtype), sigma.reshape(shape).to(x0.dtype)
