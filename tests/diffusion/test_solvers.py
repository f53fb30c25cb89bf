import numpy as np
import pytest
import torch
from plain_samplers import BATCH, CHANNELS, diffusers_states, in_float64, network, noises, start

from fastlatent.diffusion.schedules import alphas_cumprod, rescale_zero_terminal_snr
from fastlatent.diffusion.solvers import SOLVERS, build_table, ddim, ddpm, dpmsolver_pp, flow_euler
from fastlatent.ops.solver_step import ROW, A, B, C, R, S, T, solver_step

DIFFUSERS_NAMES = {"cosine": "squaredcos_cap_v2", "linear": "linear", "scaled_linear": "scaled_linear"}
BETAS = {
    "cosine": {},
    "linear": {"beta_start": 1e-4, "beta_end": 0.02},
    "scaled_linear": {"beta_start": 0.00085, "beta_end": 0.012},
}
# 1: first and last step are one. 14 and 15: either side of diffusers' rule for few steps.
STEPS = [1, 2, 5, 10, 14, 15, 20, 50]
# diffusers' own, under numpy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.fixture
def dpm():
    return in_float64("DPMSolverMultistepScheduler", "scheduling_dpmsolver_multistep")


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("solver_type", ["midpoint", "heun"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("schedule", DIFFUSERS_NAMES)
def test_dpmsolver_pp_is_diffusers(
    schedule, prediction_type, solver_type, order, dpm, monkeypatch, our_states, assert_same
):
    cls, module = dpm
    for steps in STEPS:
        scheduler = cls(
            beta_schedule=DIFFUSERS_NAMES[schedule],
            prediction_type=prediction_type,
            solver_type=solver_type,
            solver_order=order,
            **BETAS[schedule],
        )
        scheduler.set_timesteps(steps)
        table = dpmsolver_pp(alphas_cumprod(schedule), steps, prediction_type, order=order, solver_type=solver_type)
        assert table.timesteps.tolist() == scheduler.timesteps.tolist()
        assert not table.needs_noise
        assert_same(our_states(table), diffusers_states(scheduler, module, monkeypatch))


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("schedule", DIFFUSERS_NAMES)
def test_ddim_is_diffusers(schedule, prediction_type, eta, monkeypatch, our_states, assert_same):
    cls, module = in_float64("DDIMScheduler", "scheduling_ddim")
    for steps in STEPS:
        scheduler = cls(
            beta_schedule=DIFFUSERS_NAMES[schedule],
            prediction_type=prediction_type,
            clip_sample=False,
            **BETAS[schedule],
        )
        scheduler.set_timesteps(steps)
        table = ddim(alphas_cumprod(schedule), steps, prediction_type, eta=eta)
        assert table.timesteps.tolist() == scheduler.timesteps.tolist()
        # One step ends at alpha_bar = 1, where no noise is left to add.
        assert table.needs_noise == (eta > 0 and steps > 1)
        assert_same(our_states(table), diffusers_states(scheduler, module, monkeypatch, eta=eta))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("schedule", DIFFUSERS_NAMES)
def test_ddpm_is_diffusers(schedule, prediction_type, monkeypatch, our_states, assert_same):
    cls, module = in_float64("DDPMScheduler", "scheduling_ddpm")
    for steps in STEPS:
        scheduler = cls(
            beta_schedule=DIFFUSERS_NAMES[schedule],
            prediction_type=prediction_type,
            clip_sample=False,
            **BETAS[schedule],
        )
        scheduler.set_timesteps(steps)
        table = ddpm(alphas_cumprod(schedule), steps, prediction_type)
        assert table.timesteps.tolist() == scheduler.timesteps.tolist()
        assert table.needs_noise == (steps > 1)
        assert_same(our_states(table), diffusers_states(scheduler, module, monkeypatch))


def test_flow_euler_is_diffusers(monkeypatch, our_states, assert_same):
    cls, module = in_float64("FlowMatchEulerDiscreteScheduler", "scheduling_flow_match_euler_discrete")
    for steps in [*STEPS, 1000]:
        scheduler = cls()
        # diffusers' own grid ends at t = 1/1000; LatentLM's is linspace(1, 0, steps + 1).
        scheduler.set_timesteps(sigmas=np.linspace(1, 0, steps + 1)[:-1])
        table = flow_euler(steps)
        torch.testing.assert_close(table.timesteps, scheduler.timesteps, rtol=0, atol=1e-12)
        assert not table.needs_noise
        assert_same(our_states(table), diffusers_states(scheduler, module, monkeypatch))


@pytest.mark.parametrize("schedule", DIFFUSERS_NAMES)
def test_schedules_are_diffusers(schedule, dpm):
    scheduler = dpm[0](beta_schedule=DIFFUSERS_NAMES[schedule], **BETAS[schedule])
    torch.testing.assert_close(alphas_cumprod(schedule), scheduler.alphas_cumprod, rtol=1e-12, atol=0)


@pytest.mark.parametrize("schedule", DIFFUSERS_NAMES)
def test_rescaled_schedules_are_diffusers(schedule):
    cls, _ = in_float64("DDIMScheduler", "scheduling_ddim")
    scheduler = cls(beta_schedule=DIFFUSERS_NAMES[schedule], rescale_betas_zero_snr=True, **BETAS[schedule])
    rescaled = rescale_zero_terminal_snr(alphas_cumprod(schedule))
    torch.testing.assert_close(rescaled, scheduler.alphas_cumprod, rtol=1e-12, atol=1e-15)
    assert rescaled[-1] == 0
    torch.testing.assert_close(rescaled[0], alphas_cumprod(schedule)[0], rtol=1e-15, atol=0)
    assert (rescaled.diff() < 0).all()


def test_beta_range():
    assert torch.equal(alphas_cumprod("linear", beta_range=(1e-4, 0.02)), alphas_cumprod("linear"))
    scaled = alphas_cumprod("scaled_linear", 10, beta_range=(0.01, 0.09))
    assert abs(scaled[0].item() - 0.99) < 1e-15 and abs((scaled[-1] / scaled[-2]).item() - 0.91) < 1e-15


def test_cosine_schedule_by_its_numbers():
    alpha_bar = alphas_cumprod("cosine")
    assert alpha_bar.dtype == torch.float64 and alpha_bar.shape == (1000,)
    got = [f"{alpha_bar[i]:.4g}" for i in (0, 998, 999)]
    assert got == ["1", "2.429e-06", "2.429e-09"]
    assert f"{alpha_bar[0]:.7f}" == "0.9999587" and f"{alpha_bar[500]:.6f}" == "0.492285"
    sigma = ((1 - alpha_bar) / alpha_bar).sqrt()
    assert round(sigma[999].item()) == 20291 and f"{sigma[998]:.1f}" == "641.7"


@pytest.mark.parametrize("schedule", DIFFUSERS_NAMES)
@pytest.mark.parametrize("length", [1, 2, 1000])
def test_schedules_decrease(schedule, length):
    alpha_bar = alphas_cumprod(schedule, length)
    assert len(alpha_bar) == length and (alpha_bar > 0).all() and (alpha_bar < 1).all()
    assert (alpha_bar.diff() < 0).all()


def test_latentlm_timesteps():
    schedule = alphas_cumprod("cosine")
    assert dpmsolver_pp(schedule, 20, "epsilon").timesteps.tolist() == [
        999, 949, 899, 849, 799, 749, 699, 649, 599, 549, 500, 450, 400, 350, 300, 250, 200, 150, 100, 50,
    ]  # fmt: skip
    assert dpmsolver_pp(schedule, 10, "epsilon").timesteps.tolist() == [
        999, 899, 799, 699, 599, 500, 400, 300, 200, 100,
    ]  # fmt: skip
    assert dpmsolver_pp(schedule, 5, "epsilon").timesteps.tolist() == [999, 799, 599, 400, 200]


def test_latentlm_coefficients():
    """x' = a x + k D + ...: k is the whole weight of the data terms, b + c."""
    rows = dpmsolver_pp(alphas_cumprod("cosine"), 20, "v_prediction").rows
    weights = [(f"{row[A]:.6f}", f"{row[B] + row[C]:.6f}") for row in rows]
    assert weights[0] == ("0.996966", "0.077795") and weights[18] == ("0.539569", "0.464008")
    assert rows[0, C] == rows[19, C] == 0 and (rows[1:19, C] != 0).all()
    assert rows[19, A] == 0 and rows[19, B] == 1


def test_every_number_of_steps_is_finite():
    """1000 steps round timestep 500 twice: a step of length 0, whose slope must not become 0/0."""
    for solver in ("dpmsolver++", "ddim", "ddpm"):
        for prediction_type in ("epsilon", "v_prediction"):
            for steps in (1, 500, 999, 1000):
                table = build_table(solver, steps, prediction_type, "cosine")
                assert table.rows.shape == (steps, ROW) and table.rows.dtype == torch.float64
                assert torch.isfinite(table.rows.index_fill(1, torch.tensor(R), 0)).all()
                assert torch.isinf(table.rows[:, R]).all()
                assert torch.equal(table.rows[:, T], table.timesteps)
    for solver_type in ("midpoint", "heun"):
        table = dpmsolver_pp(alphas_cumprod("cosine"), 1000, "epsilon", solver_type=solver_type)
        assert torch.isfinite(table.rows[:, A:]).all()
        twice = (table.timesteps == 500).nonzero().flatten()
        assert len(twice) == 2
        assert table.rows[twice[0], A] == 1 and table.rows[twice[0], B] == table.rows[twice[0], C] == 0


@pytest.mark.parametrize("solver", ["dpmsolver++", "ddim", "ddpm"])
def test_a_perfect_network_is_followed(solver):
    """A network that knows the data, x0 = 0.7 everywhere, leads every solver there from either prediction."""
    schedule = alphas_cumprod("linear")
    for prediction_type in ("epsilon", "v_prediction"):
        table = build_table(solver, 250, prediction_type, "linear")
        state = torch.zeros(4, BATCH, CHANNELS, dtype=torch.float64)
        state[0] = start()
        for row, t, noise in zip(table.rows, table.timesteps.long(), noises(250), strict=True):
            alpha, sigma = schedule[t].sqrt(), (1 - schedule[t]).sqrt()
            epsilon = (state[0] - alpha * 0.7) / sigma
            output = epsilon if prediction_type == "epsilon" else alpha * epsilon - sigma * 0.7
            solver_step(state, output[None], torch.ones(1, BATCH, dtype=torch.float64), row, noise)
        torch.testing.assert_close(state[0], torch.full_like(state[0], 0.7), rtol=1e-9, atol=0)


def test_float32_rows_follow_float64(our_states):
    """What sampling runs: rows and state in float32, through the compiled op."""
    table = build_table("dpmsolver++", 20, "v_prediction", "cosine")
    want = our_states(table)
    state = torch.zeros(4, BATCH, CHANNELS)
    state[0] = start()
    for k, row in enumerate(table.rows.float()):
        output = network(state[0].double(), table.timesteps[k]).float()
        solver_step(state, output[None], torch.ones(1, BATCH), row)
        assert (state[0] - want[k]).abs().max() <= 1e-5 * want[k].abs().max()


def test_dpmsolver_pp_from_zero_terminal_snr():
    """An infinite first step in log SNR has no slope to give to the second."""
    rows = dpmsolver_pp(ZERO_SNR, 20, "v_prediction").rows
    assert torch.isfinite(rows[:, A:]).all()
    assert rows[1, C] == 0 and (rows[2:-1, C] != 0).all()


def test_build_table_uses_the_defaults():
    schedule = alphas_cumprod("linear")
    for solver, table in {
        "dpmsolver++": dpmsolver_pp(schedule, 7, "v_prediction"),
        "ddim": ddim(schedule, 7, "v_prediction"),
        "ddpm": ddpm(schedule, 7, "v_prediction"),
    }.items():
        built = build_table(solver, 7, "v_prediction", "linear")
        assert torch.equal(built.rows, table.rows) and built.name == table.name
    assert torch.equal(build_table("euler", 7, "flow", "linear").rows, flow_euler(7).rows)


SCHEDULE = alphas_cumprod("cosine")
ZERO_SNR = rescale_zero_terminal_snr(alphas_cumprod("scaled_linear"))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: build_table("heun", 20, "epsilon", "cosine"), "dpmsolver.., ddim, ddpm, euler, got 'heun'"),
        (lambda: build_table("ddim", 20, "x0", "cosine"), "epsilon, v_prediction, flow, got 'x0'"),
        (
            lambda: build_table("ddim", 20, "epsilon", "sigmoid"),
            "cosine, linear, scaled_linear, cauchy, laplace, exp, got 'sigmoid'",
        ),
        (lambda: build_table("euler", 20, "epsilon", "cosine"), "flow for euler, got epsilon"),
        *(
            (
                lambda solver=solver: build_table(solver, 20, "flow", "cosine"),
                "epsilon or v_prediction for .*, got flow",
            )
            for solver in SOLVERS
            if solver != "euler"
        ),
        *(
            (
                lambda solver=solver, steps=steps: build_table(solver, steps, "epsilon", "cosine"),
                f"1 to 1000 steps, got {steps}",
            )
            for solver in SOLVERS
            if solver != "euler"
            for steps in (-1, 0, 1001)
        ),
        (lambda: build_table("euler", 0, "flow", "cosine"), "steps >= 1, got 0"),
        (lambda: dpmsolver_pp(SCHEDULE, 20, "epsilon", order=3), "order 1 or 2, got 3"),
        (lambda: dpmsolver_pp(SCHEDULE, 20, "epsilon", solver_type="bh1"), "midpoint or heun, got 'bh1'"),
        (lambda: dpmsolver_pp(SCHEDULE, 20, "flow"), "epsilon or v_prediction, got 'flow'"),
        (lambda: ddim(SCHEDULE, 20, "sample"), "epsilon or v_prediction, got 'sample'"),
        (lambda: ddim(SCHEDULE, 20, "epsilon", eta=1.5), r"eta in \[0, 1\], got 1.5"),
        (lambda: ddpm(SCHEDULE, 20, "flow"), "epsilon or v_prediction, got 'flow'"),
        (lambda: ddim(SCHEDULE, 20, "epsilon", timestep_spacing="linspace"), "leading, trailing, got 'linspace'"),
        (
            lambda: ddim(ZERO_SNR, 20, "epsilon", timestep_spacing="trailing"),
            "ddim: expected v_prediction .* zero terminal SNR",
        ),
        (lambda: dpmsolver_pp(ZERO_SNR, 20, "epsilon"), "dpmsolver_pp: expected v_prediction .* zero terminal SNR"),
        # Leading steps meet the last timestep only when they take every one.
        (lambda: ddpm(ZERO_SNR, 1000, "epsilon"), "ddpm: expected v_prediction .* zero terminal SNR"),
        (lambda: alphas_cumprod("cosine", 0), "num_train_timesteps >= 1, got 0"),
        (lambda: alphas_cumprod("cosine", beta_range=(0.1, 0.2)), "no beta_range for cosine"),
        (lambda: rescale_zero_terminal_snr(SCHEDULE[:1]), "2 timesteps or more, got 1"),
    ],
)
def test_rejects(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_noise_stops_at_the_last_step():
    for table in (ddpm(SCHEDULE, 20, "epsilon"), ddim(SCHEDULE, 20, "epsilon", eta=1.0)):
        assert (table.rows[:-1, S] > 0).all() and table.rows[-1, S] == 0
