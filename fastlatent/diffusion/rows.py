"""Coefficient rows of `fastlatent.ops.solver_step`: what one step of each kind of sampler is, in float64.

Levels are those of x = alpha x0 + sigma noise. Every function returns new rows [S, 16]; clipping (R) and guidance are
left to the caller.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastlatent.ops.solver_step import BASE, L0, L1, ROW, A, B, C, D, E, F, P, Q, R, S, T

DPM_ALGORITHMS = ("dpmsolver++", "sde-dpmsolver++", "dpmsolver", "sde-dpmsolver")
DPM_TYPES = ("midpoint", "heun")
# diffusers clamps the posterior's variance here, where its logarithm is needed.
MIN_VARIANCE = 1e-20


def new_rows(timesteps: Tensor) -> Tensor:
    """Rows that do nothing yet and do not clip. timesteps [S], or [S, 2] of which the first is kept."""
    rows = torch.zeros(len(timesteps), ROW, dtype=torch.float64)
    rows[:, R] = torch.inf
    rows[:, T] = timesteps if timesteps.ndim == 1 else timesteps[:, 0]
    return rows


def levels(alpha_bar: Tensor) -> tuple[Tensor, Tensor]:
    """alpha and sigma of a variance-preserving schedule."""
    return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()


def shifted(values: Tensor, final: float) -> Tensor:
    """The values at each step's end: the next step's, and `final` after the last."""
    return torch.cat([values[1:], values.new_tensor([final])])


def to_data(prediction_type: str, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """p and q of x0 = p x + q output."""
    if prediction_type == "epsilon":
        return 1 / alpha, -sigma / alpha
    if prediction_type == "v_prediction":
        return alpha, -sigma
    assert prediction_type == "sample", prediction_type
    return torch.zeros_like(alpha), torch.ones_like(alpha)


def to_noise(prediction_type: str, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """p and q of noise = p x + q output."""
    if prediction_type == "epsilon":
        return torch.zeros_like(alpha), torch.ones_like(alpha)
    if prediction_type == "v_prediction":
        return sigma, alpha
    assert prediction_type == "sample", prediction_type
    return 1 / sigma, -alpha / sigma


def ddim_rows(timesteps: Tensor, alpha_bar: Tensor, alpha_bar_next: Tensor, prediction_type: str, eta: float) -> Tensor:
    """DDIM (Song et al. 2020, equation 12). The direction's noise is the output's, whatever R clips."""
    alpha, sigma = levels(alpha_bar)
    variance = eta**2 * (1 - alpha_bar_next) / (1 - alpha_bar) * (1 - alpha_bar / alpha_bar_next)
    direction = (1 - alpha_bar_next - variance).clamp(min=0).sqrt()
    x_to_noise, output_to_noise = to_noise(prediction_type, alpha, sigma)
    rows = new_rows(timesteps)
    rows[:, P], rows[:, Q] = to_data(prediction_type, alpha, sigma)
    rows[:, A], rows[:, E] = direction * x_to_noise, direction * output_to_noise
    rows[:, B] = alpha_bar_next.sqrt()
    rows[:, S] = variance.sqrt()
    return rows


def ddpm_rows(
    timesteps: Tensor, alpha_bar: Tensor, alpha_bar_next: Tensor, prediction_type: str, variance_type: str
) -> Tensor:
    """Ancestral sampling (Ho et al. 2020, equation 7) with betas of the steps taken; no noise at timestep 0.

    variance_type: the posterior's ("fixed_small"), beta ("fixed_large"), or what the network says between these two
    ("learned_range", Nichol & Dhariwal 2021, equation 15).
    """
    beta = 1 - alpha_bar / alpha_bar_next
    posterior = (beta * (1 - alpha_bar_next) / (1 - alpha_bar)).clamp(min=MIN_VARIANCE)
    rows = new_rows(timesteps)
    rows[:, P], rows[:, Q] = to_data(prediction_type, *levels(alpha_bar))
    rows[:, A] = (alpha_bar / alpha_bar_next).sqrt() * (1 - alpha_bar_next) / (1 - alpha_bar)
    rows[:, B] = alpha_bar_next.sqrt() * beta / (1 - alpha_bar)
    if variance_type == "learned_range":
        std = torch.ones_like(beta)
        rows[:, L0], rows[:, L1] = posterior.log(), beta.log() - posterior.log()
    else:
        assert variance_type in ("fixed_small", "fixed_large"), variance_type
        std = posterior.sqrt() if variance_type == "fixed_small" else beta.sqrt()
    rows[:, S] = torch.where(timesteps > 0, std, 0.0)
    return rows


def dpm_rows(
    timesteps: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    orders: Tensor,
    *,
    algorithm: str,
    solver_type: str,
    singlestep: bool = False,
) -> Tensor:
    """DPM-Solver and DPM-Solver++ (Lu et al. 2022), as an ODE or an SDE, but for P and Q.

    The data term is the predicted x0 for the "++" algorithms, and the predicted noise for the others.

    Args:
        timesteps: [S].
        alpha, sigma: [S + 1], with the level after the last step; sigma may end at 0.
        orders: int64 [S], 1 to 3. Multistep: how many data terms a step uses, never more than there are; a step
            of length 0, or one whose history has one, is of a lower order, since it has no slope. Singlestep: the
            place of a step in its group 1, (2, (3)), which starts over from the group's first x.
        algorithm: of `DPM_ALGORITHMS`; sde-dpmsolver goes up to order 2.
        solver_type: of `DPM_TYPES`, how order 2 (and singlestep order 3) uses the slope.
    """
    steps = len(timesteps)
    log_snr = alpha.log() - sigma.log()
    interval = log_snr.diff()
    previous, before = (torch.cat([interval.new_zeros(n), interval])[:steps] for n in (1, 2))
    if singlestep:
        start = torch.arange(steps) - (orders - 1)
    else:
        start = torch.arange(steps)
        slopes = (previous > 0).long() + ((previous > 0) & (before > 0)).long()
        orders = torch.where(interval > 0, orders.minimum(1 + slopes), 1)
    h = log_snr[1:] - log_snr[start]
    ratio, phi0, phi1, phi2, std = _integrals(algorithm, alpha[start], sigma[start], alpha[1:], sigma[1:], h)
    half = phi0 / 2 if solver_type == "midpoint" else phi1

    rows = new_rows(timesteps)
    first, second, third = (orders == order for order in (1, 2, 3))
    rows[:, S] = std
    if not singlestep:
        r0, r1 = previous / h, before / h
        share = r0 / (r0 + r1)
        curve = phi2 / (r0 + r1)
        slope0 = torch.where(second, half, phi1 * (1 + share) + curve) / r0
        slope1 = -(phi1 * share + curve) / r1
        rows[:, A], rows[:, B] = ratio, phi0
        rows[:, B] += torch.where(first, 0.0, slope0)
        rows[:, C] = torch.where(first, 0.0, torch.where(third, slope1, 0.0) - slope0)
        rows[:, D] = torch.where(third, -slope1, 0.0)
        return rows

    # r0 and r1: where in the group's interval the newest data term and the one before it were taken.
    r0, r1 = (previous + torch.where(third, before, 0.0)) / h, before / h
    if solver_type == "midpoint":
        slope0, slope1 = phi1 / r0, torch.zeros_like(h)
    else:
        slope0 = (2 * phi2 - phi1 * r1) / (r0 - r1) / r0
        slope1 = (phi1 * r0 - 2 * phi2) / (r0 - r1) / r1
    slope0 = torch.where(third, slope0, half / r0)
    rows[:, BASE] = first.double()
    rows[:, A], rows[:, F] = torch.where(first, ratio, 0.0), torch.where(first, 0.0, ratio)
    rows[:, B] = torch.where(first, phi0, slope0)
    rows[:, C] = torch.where(second, phi0 - slope0, torch.where(third, slope1, 0.0))
    rows[:, D] = torch.where(third, phi0 - slope0 - slope1, 0.0)
    return rows


def _integrals(
    algorithm: str, alpha0: Tensor, sigma0: Tensor, alpha: Tensor, sigma: Tensor, h: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Over a step of log-SNR length h: the weights of x, of the data term, its slope and curvature, and of noise."""
    zero = torch.zeros_like(h)
    if algorithm == "dpmsolver++":
        g = torch.expm1(-h)
        return sigma / sigma0, -alpha * g, alpha * (g / h + 1), -alpha * ((g + h) / h**2 - 0.5), zero
    if algorithm == "sde-dpmsolver++":
        g, ratio = torch.expm1(-2 * h), sigma / sigma0 * torch.exp(-h)
        phi2 = -alpha * ((g + 2 * h) / (2 * h) ** 2 + 0.5)
        return ratio, -alpha * g, alpha * (g / (2 * h) + 1), phi2, sigma * (-g).clamp(min=0).sqrt()
    g, ratio = torch.expm1(h), alpha / alpha0
    phi0, phi1, phi2 = -sigma * g, -sigma * (g / h - 1), -sigma * ((g - h) / h**2 - 0.5)
    if algorithm == "dpmsolver":
        return ratio, phi0, phi1, phi2, zero
    assert algorithm == "sde-dpmsolver", algorithm
    return ratio, 2 * phi0, 2 * phi1, 2 * phi2, sigma * torch.expm1(2 * h).clamp(min=0).sqrt()
