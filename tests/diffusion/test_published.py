import plain_samplers as plain
import pytest
import torch

from fastlatent.diffusion.published import (
    flow_euler_up,
    flow_midpoint,
    lagrangian_flow_map,
    nextstep_sde,
    respaced_ddpm,
)
from fastlatent.diffusion.schedules import alphas_cumprod, rescale_zero_terminal_snr
from fastlatent.diffusion.solvers import ddim, flow_euler
from fastlatent.ops.solver_step import BASE, L1, ROW, A, E, F, R, S, T

COSINE = alphas_cumprod("cosine")


# 1: timestep 0 alone. 2: both ends. 7: 999/6 = 166.5, halves. 100: published. 1000: every timestep.
@pytest.mark.parametrize("steps, temperature", [(1, 1.0), (2, 0.95), (7, 1.0), (100, 1.0), (100, 0.95), (1000, 0.95)])
def test_mar(steps, temperature, our_states, assert_same):
    table = respaced_ddpm(COSINE, steps, temperature=temperature)
    assert table.needs_noise == (steps > 1)
    got = our_states(table, plain.learned_variance_network)
    assert_same(got, plain.mar_states(steps, temperature), 1e-10)


def test_mar_timesteps():
    timesteps = respaced_ddpm(COSINE, 100).timesteps.long().tolist()
    assert timesteps[:2] == [999, 989] and timesteps[:-8:-1] == [0, 10, 20, 30, 40, 50, 61]
    assert timesteps[-8:-6] == [71, 61]
    assert respaced_ddpm(COSINE, 1).timesteps.tolist() == [0]
    # 166.5 and 499.5 to even; 832.5 after a sum of five strides too.
    assert respaced_ddpm(COSINE, 7).timesteps.tolist() == [999, 832, 666, 500, 333, 166, 0]


def test_mar_noise_is_learned_but_for_the_last_step():
    rows = respaced_ddpm(COSINE, 100, temperature=0.5).rows
    assert (rows[:-1, S] == 0.5).all() and rows[-1, S] == 0
    # beta is above the posterior's variance.
    assert (rows[:-1, L1] > 0).all()
    assert not respaced_ddpm(COSINE, 100, temperature=0).needs_noise


# 2: one step of each kind. 20: the function's default; 50: the README's, with its shifts.
@pytest.mark.parametrize("steps, shift", [(2, 1.0), (3, 3.2), (20, 1.0), (50, 3.2), (50, 0.5)])
def test_nextstep(steps, shift, our_states, assert_same):
    table = nextstep_sde(steps, shift=shift)
    assert table.needs_noise and table.rows[-1, S] == 0
    assert table.timesteps[0] == 0 and abs(table.timesteps[-1] - 0.96 / (shift - (shift - 1) * 0.96)) < 1e-12
    assert_same(our_states(table), plain.nextstep_states(steps, shift), 1e-10)


@pytest.mark.parametrize("steps, time_scale", [(1, 1000.0), (2, 1.0), (16, 1000.0), (1000, 1000.0)])
def test_ming(steps, time_scale, our_states, assert_same):
    table = flow_euler_up(steps, time_scale)
    assert table.timesteps[0] == time_scale and not table.needs_noise
    assert_same(our_states(table), plain.ming_states(steps, time_scale), 1e-10)


def test_ming_is_flow_euler_with_the_other_sign(our_states, assert_same):
    negated = our_states(flow_euler(16), lambda x, t: -plain.network(x, t))
    assert_same(our_states(flow_euler_up(16)), negated, 1e-12)


# 2: one step. 20: published, t = 0, 0.05, ...; 58: 29ths, which truncate differently in float64.
@pytest.mark.parametrize("evaluations", [2, 4, 20, 58, 1000])
def test_calm_flow(evaluations, our_states, assert_same):
    table = flow_midpoint(evaluations)
    assert table.rows.shape == (evaluations, ROW) and not table.needs_noise
    assert (table.timesteps == table.timesteps.trunc()).all()
    assert_same(our_states(table), plain.calm_flow_states(evaluations), 1e-10)


def test_calm_flow_timesteps():
    table = flow_midpoint(20)
    assert table.timesteps[:4].tolist() == [0, 50, 100, 150] and table.timesteps[-1] == 950
    assert table.rows[:, BASE].tolist() == [1, 0] * 10
    assert (table.rows[1::2, A] == 0).all() and (table.rows[1::2, F] == 1).all()


@pytest.mark.parametrize("steps", [1, 2, 10])
def test_pocket_tts(steps, our_states, assert_same):
    table = lagrangian_flow_map(steps)
    assert table.timesteps.shape == (steps, 2) and not table.needs_noise
    assert (table.timesteps[1:, 0] == table.timesteps[:-1, 1]).all()
    assert table.timesteps[0, 0] == 0 and table.timesteps[-1, 1] == 1
    assert torch.equal(table.rows[:, T], table.timesteps[:, 0])
    assert_same(our_states(table, plain.two_time_network), plain.pocket_tts_states(steps), 1e-10)


# 1: from pure noise to data. 7 and 300 do not divide 1000. 100: published.
@pytest.mark.parametrize("steps", [1, 2, 7, 100, 300, 1000])
def test_orthus(steps, our_states, assert_same):
    table = ddim(
        rescale_zero_terminal_snr(alphas_cumprod("scaled_linear")), steps, "v_prediction", timestep_spacing="trailing"
    )
    assert table.timesteps[0] == 999 and not table.needs_noise
    assert_same(our_states(table), plain.orthus_states(steps), 1e-10)


def test_rows_are_float64_and_finite():
    for table in (
        respaced_ddpm(COSINE, 1000),
        nextstep_sde(1000),
        flow_euler_up(1000),
        flow_midpoint(1000),
        lagrangian_flow_map(1000),
    ):
        assert table.rows.shape == (1000, ROW) and table.rows.dtype == table.timesteps.dtype == torch.float64
        assert torch.isfinite(table.rows.index_fill(1, torch.tensor(R), 0)).all()
        assert torch.isinf(table.rows[:, R]).all()


def test_a_perfect_network_is_followed():
    """A network that knows the data, 0.7 everywhere, leads every flow there: signs and directions are right."""

    def end(table, data_weight):
        state = plain.start()
        base = state
        for row, weight in zip(table.rows, data_weight, strict=True):
            noise = (state - weight * 0.7) / (1 - weight)
            output = 0.7 - noise
            base = state if row[BASE] else base
            state = row[A] * state + row[F] * base + row[E] * output
        return state

    t = torch.arange(10, dtype=torch.float64) / 10
    for table, weight in ((flow_euler_up(10), t), (flow_midpoint(10), t), (lagrangian_flow_map(10), t)):
        torch.testing.assert_close(end(table, weight), torch.full((3, 4), 0.7, dtype=torch.float64))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: respaced_ddpm(COSINE, 0), "respaced_ddpm: expected 1 to 1000 steps, got 0"),
        (lambda: respaced_ddpm(COSINE, 1001), "respaced_ddpm: expected 1 to 1000 steps, got 1001"),
        (lambda: respaced_ddpm(COSINE, 9, temperature=-1), "respaced_ddpm: expected temperature >= 0, got -1"),
        (lambda: nextstep_sde(1), "nextstep_sde: expected steps >= 2 .*, got 1"),
        (lambda: nextstep_sde(20, shift=0), "nextstep_sde: expected shift > 0, got 0"),
        (lambda: flow_euler_up(0), "flow_euler_up: expected steps >= 1, got 0"),
        (lambda: flow_midpoint(0), "flow_midpoint: expected an even number .*, got 0"),
        (lambda: flow_midpoint(21), "flow_midpoint: expected an even number .*, got 21"),
        (lambda: lagrangian_flow_map(0), "lagrangian_flow_map: expected steps >= 1, got 0"),
    ],
)
def test_rejects(call, message):
    with pytest.raises(ValueError, match=message):
        call()
