"""Schedules against their definitions in plain Python, and the samplers that are made of them."""

import math

import pytest
import torch

from fastlatent.diffusion.schedules import SCHEDULES, alphas_cumprod
from fastlatent.diffusion.solvers import build_table
from fastlatent.ops.solver_step import solver_step

# Written down again from their definitions. Quantile functions: of Cauchy(3, 1) over 90 % of its mass, of
# Laplace(0, 1) over 98 %; log SNR to alpha_bar by a logistic function that ends a little above 0.
FUNCTIONS = {
    "cosine": lambda u: math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2,
    "exp": lambda u: math.e ** (-12 * u),
    "cauchy": lambda u: logistic(3 + math.tan((0.5 - u) * math.pi * 0.9), 1.1),
    "laplace": lambda u: logistic((-1 if u < 0.5 else 1) * math.log(1 - 0.98 * abs(2 * u - 1)), 1.02),
}


def logistic(log_snr, rest):
    return (math.exp(log_snr) + rest - 1) / (math.exp(log_snr) + rest)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("steps", [1000, 1, 7])  # the trained number, the smallest, and one with no middle point
def test_schedules_are_their_definitions(name, steps):
    product, want = 1.0, []
    for i in range(steps):
        beta = 1 - FUNCTIONS[name]((i + 1) / steps) / FUNCTIONS[name](i / steps)
        product *= 1 - min(beta, 0.999)
        want.append(product)
    got = alphas_cumprod(name, steps)
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64), rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_run_from_data_to_noise(name):
    got = alphas_cumprod(name)
    assert (got[1:] < got[:-1]).all() and 0 < got[-1] < 0.15 and 0.95 < got[0] < 1


def test_quantiles_of_the_log_snr():
    # Half of Laplace(0, 1) lies above 0, a quarter above log 2; of Cauchy(3, 1) half above 3, a quarter above 4.
    for name, rest, points in (
        ("laplace", 1.02, {0.5: 0.0, 0.5 - 0.25 / 0.98: math.log(2)}),
        ("cauchy", 1.1, {0.5: 3.0, 0.5 - 0.25 / 0.9: 4.0}),
    ):
        alpha_bar = alphas_cumprod(name, 100_000)
        scale = FUNCTIONS[name](0)  # the product begins at 1, the function just below
        for u, log_snr in points.items():
            value = float(alpha_bar[round(u * 100_000) - 1]) * scale
            assert math.log(1 / (1 - value) - rest) == pytest.approx(log_snr, abs=1e-3), name


@pytest.mark.parametrize("name", ["cauchy", "laplace", "exp"])
@pytest.mark.parametrize("solver", ["dpmsolver++", "ddim", "ddpm"])
def test_samplers_take_them(name, solver):
    """With the true noise of a known image, samplers return that image."""
    table = build_table(solver, 20, "epsilon", name)
    data, noise = torch.randn(2, 1, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    state = torch.zeros(4, 1, 6, dtype=torch.float64)
    alpha_bar = alphas_cumprod(name)
    state[0] = (
        alpha_bar[int(table.timesteps[0])].sqrt() * data + (1 - alpha_bar[int(table.timesteps[0])]).sqrt() * noise
    )
    for row, t in zip(table.rows, table.timesteps.tolist(), strict=True):
        level = alpha_bar[int(t)]
        output = (state[0] - level.sqrt() * data) / (1 - level).sqrt()
        solver_step(state, output[None], torch.ones(1, 1, dtype=torch.float64), row, torch.zeros_like(data))
    torch.testing.assert_close(state[0], data, rtol=1e-9, atol=1e-9)


def test_no_beta_range_where_there_is_none():
    for name in FUNCTIONS:
        with pytest.raises(ValueError, match=f"no beta_range for {name}"):
            alphas_cumprod(name, beta_range=(0.1, 0.2))
