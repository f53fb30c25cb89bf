import itertools
import math
import random
import types

import diffusers
import numpy as np
import pytest
import torch
from plain_samplers import diffusers_states, in_float64, learned_variance_network, network

from fastlatent.diffusion.schedules import alphas_cumprod
from fastlatent.diffusion.solvers import SolverTable, ddim, ddpm, dpmsolver_pp
from fastlatent.ops.solver_step import R, S

# diffusers' own: numpy 2, and "dpmsolver" without ++, which will go.
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*algorithm_type:FutureWarning"),
]
MODULES = {
    "DPMSolverMultistepScheduler": "scheduling_dpmsolver_multistep",
    "DPMSolverSinglestepScheduler": "scheduling_dpmsolver_singlestep",
    "DDIMScheduler": "scheduling_ddim",
    "DDPMScheduler": "scheduling_ddpm",
    "FlowMatchEulerDiscreteScheduler": "scheduling_flow_match_euler_discrete",
}
BETAS = [
    {"beta_schedule": "squaredcos_cap_v2"},
    {"beta_schedule": "linear"},
    {"beta_schedule": "scaled_linear", "beta_start": 0.001, "beta_end": 0.015},
]
ZERO_SNR = {"beta_schedule": "scaled_linear", "rescale_betas_zero_snr": True}
# 1 and 2: fewer steps than the order. 3, 4, 5: each remainder of singlestep order 3. 14, 15: diffusers' "few steps".
STEPS = [1, 2, 3, 4, 5, 10, 14, 15, 21]
SPACINGS = [{"timestep_spacing": spacing} for spacing in ("linspace", "leading", "trailing")]
SIGMAS = [
    {"use_karras_sigmas": True},
    {"use_exponential_sigmas": True},
    {"use_beta_sigmas": True},
    {"use_flow_sigmas": True, "flow_shift": 3.0},
]
SIGMA_NAMES = {"use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas"}
SOLVER = [
    [{"algorithm_type": name} for name in ("dpmsolver++", "sde-dpmsolver++", "dpmsolver", "sde-dpmsolver")],
    [{"solver_order": order} for order in (1, 2, 3)],
    [{"solver_type": name} for name in ("midpoint", "heun")],
    [{"prediction_type": name} for name in ("epsilon", "v_prediction", "sample", "flow_prediction")],
    [{"final_sigmas_type": name} for name in ("zero", "sigma_min")],
]
MULTISTEP = [
    *SOLVER,
    [*SPACINGS, *SIGMAS, {"use_lu_lambdas": True}],
    [{}, {"lower_order_final": False}, {"lower_order_final": False, "euler_at_final": True}],
    [*BETAS, ZERO_SNR],
]
SINGLESTEP = [
    [part for part in SOLVER[0] if part["algorithm_type"] != "sde-dpmsolver"],
    *SOLVER[1:],
    [{}, *SIGMAS],
    [{}, {"lower_order_final": True}],
    BETAS,
]
DDIM = [
    [{"prediction_type": name} for name in ("epsilon", "v_prediction", "sample")],
    [*SPACINGS, {"timestep_spacing": "leading", "steps_offset": 1}],
    [{"clip_sample": False}, {"clip_sample": True}, {"clip_sample": True, "clip_sample_range": 0.4}],
    [*BETAS, ZERO_SNR],
]
DDPM = [*DDIM, [{"variance_type": n} for n in ("fixed_small", "fixed_small_log", "fixed_large", "learned_range")]]
FLOW = [
    [{}, {"shift": 3.0}, {"use_dynamic_shifting": True}, {"use_dynamic_shifting": True, "time_shift_type": "linear"}],
    [{}, {"shift_terminal": 0.1}],
    [{}, *SIGMAS[:3]],
    [{}, {"invert_sigmas": True}],
    [{}, {"stochastic_sampling": True}],
]


def possible(options):
    """What diffusers itself can run."""
    noise_form = options["algorithm_type"] in ("dpmsolver", "sde-dpmsolver")
    return not (
        (noise_form and (options["final_sigmas_type"] == "zero" or options["prediction_type"] == "flow_prediction"))
        or (options["algorithm_type"] == "sde-dpmsolver" and options["solver_order"] == 3)
    )


def cases(axes, allowed=lambda options: True):
    """Every combination, each with one number of steps."""
    combinations = ({k: v for part in parts for k, v in part.items()} for parts in itertools.product(*axes))
    kept = [options for options in combinations if allowed(options)]
    # 9 numbers of steps against products of 2, 3 and 4: shuffled, or they would go together.
    numbers = random.Random(0)
    return [(options, numbers.choice(STEPS)) for options in kept]


def sample(cases, count):
    return random.Random(1).sample(cases, count)


@pytest.fixture
def compare(monkeypatch, our_states, assert_same):
    """Convert, leave the scheduler as it was, and follow it; True where diffusers itself gives a number."""

    def check(name, options, steps, *, mu=None, eta=0.0):
        cls, module = in_float64(name, MODULES[name])
        scheduler = cls(**options)
        config, state = dict(scheduler.config), vars(scheduler).copy()
        table = SolverTable.from_diffusers(scheduler, steps, eta=eta, mu=mu)
        assert dict(scheduler.config) == config and vars(scheduler).keys() == state.keys()
        assert all(vars(scheduler)[key] is value for key, value in state.items())
        scheduler.set_timesteps(steps, **({} if mu is None else {"mu": mu}))
        learned = options.get("variance_type") == "learned_range"
        model = learned_variance_network if learned else network
        torch.testing.assert_close(table.timesteps, scheduler.timesteps.double(), rtol=0, atol=1e-9)
        step_options = {"eta": eta} if name == "DDIMScheduler" else {}
        want = diffusers_states(scheduler, module, monkeypatch, model, **step_options)
        got = our_states(table, model)
        assert torch.isfinite(got).all()
        if not torch.isfinite(want).all():
            return False
        assert_same(got, want, bound(table, model, got, options))
        return True

    def bound(table, model, got, options):
        """1e-9, or what rounding does to this case: of our coefficients, and of the length of an empty last step.

        From alpha = 5e-5, where the cosine schedule begins, DPM-Solver in its noise form loses nine digits. And the
        noise of an SDE step as long as a rounding error is the root of it.
        """
        if options.get("beta_schedule") != "squaredcos_cap_v2":
            return 1e-9
        generator, worst = torch.Generator().manual_seed(0), 0.0
        for _ in range(2):
            error = 2e-16 * torch.randn(table.rows.shape, generator=generator, dtype=torch.float64)
            rounded = our_states(SolverTable(table.rows * (1 + error), table.timesteps, table.name), model)
            worst = max(worst, ((rounded - got).abs().amax(dim=(1, 2)) / got.abs().amax(dim=(1, 2))).max().item())
        empty = options.get("final_sigmas_type") == "sigma_min" and SIGMA_NAMES & options.keys()
        return max(1e-7 if empty else 1e-9, 20 * worst)

    return check


def check_multistep(compare, cases):
    for options, steps in cases:
        if not compare("DPMSolverMultistepScheduler", options, steps):
            # These sigmas end at sigma_min and are followed by sigma_min. diffusers divides 0 by 0, or takes the root
            # of a rounding error below 0; here a step of length 0 does nothing.
            assert options["final_sigmas_type"] == "sigma_min" and SIGMA_NAMES & options.keys(), options


def check_singlestep(compare, cases):
    for options, steps in cases:
        try:
            equal = compare("DPMSolverSinglestepScheduler", options, steps)
        except ValueError as error:
            assert "expected finite coefficients" in str(error)
            equal = False
        assert equal or (options["final_sigmas_type"] == "sigma_min" and SIGMA_NAMES & options.keys()), options


def check_ddim(compare, cases):
    for options, steps in cases:
        # From alpha_bar = 0 with eta = 1 nothing is left of the direction, of which diffusers leaves the root of a
        # rounding error: 1e-8, or NaN.
        for eta in (0.0, 0.9 if options.get("rescale_betas_zero_snr") else 1.0):
            check_discrete(compare, "DDIMScheduler", options, steps, eta=eta)


def check_discrete(compare, name, options, steps, **arguments):
    spacing = options["timestep_spacing"]
    starts_last = spacing == "trailing" or (spacing == "linspace" and steps > 1)
    if options["prediction_type"] == "epsilon" and "rescale_betas_zero_snr" in options and starts_last:
        with pytest.raises(ValueError, match="zero terminal SNR"):
            compare(name, options, steps, **arguments)
    else:
        assert compare(name, options, steps, **arguments), options


def check_flow(compare, cases):
    for options, steps in cases:
        mu = 1.15 if "use_dynamic_shifting" in options else None
        if "shift_terminal" in options and steps == 1:
            # The only sigma is 1, and cannot be moved to 0.1.
            with pytest.raises(ValueError, match="expected finite coefficients"):
                compare("FlowMatchEulerDiscreteScheduler", options, steps, mu=mu)
        else:
            assert compare("FlowMatchEulerDiscreteScheduler", options, steps, mu=mu), options


@pytest.mark.parametrize("part", range(4))
def test_dpmsolver_multistep(part, compare):
    check_multistep(compare, sample(cases(MULTISTEP, possible), 160)[part::4])


@pytest.mark.soak
def test_dpmsolver_multistep_in_full(compare):
    check_multistep(compare, cases(MULTISTEP, possible))


@pytest.mark.parametrize("part", range(2))
def test_dpmsolver_singlestep(part, compare):
    check_singlestep(compare, sample(cases(SINGLESTEP, possible), 120)[part::2])


@pytest.mark.soak
def test_dpmsolver_singlestep_in_full(compare):
    check_singlestep(compare, cases(SINGLESTEP, possible))


def test_ddim(compare):
    check_ddim(compare, sample(cases([*DDIM, [{}, {"set_alpha_to_one": False}]]), 60))


@pytest.mark.soak
def test_ddim_in_full(compare):
    check_ddim(compare, cases([*DDIM, [{}, {"set_alpha_to_one": False}]]))


def test_ddpm(compare):
    for options, steps in sample(cases(DDPM), 80):
        check_discrete(compare, "DDPMScheduler", options, steps)


@pytest.mark.soak
def test_ddpm_in_full(compare):
    for options, steps in cases(DDPM):
        check_discrete(compare, "DDPMScheduler", options, steps)


def test_flow(compare):
    check_flow(compare, sample(cases(FLOW), 60))


@pytest.mark.soak
def test_flow_in_full(compare):
    check_flow(compare, cases(FLOW))


def test_every_number_of_steps(compare):
    """1000 linspace steps meet timestep 500 twice; 1000 of DDIM and DDPM are all there are."""
    assert compare("DDIMScheduler", {"clip_sample": False}, 1000)
    assert compare("DDPMScheduler", {"timestep_spacing": "trailing", "clip_sample": False}, 1000)
    assert compare("DPMSolverMultistepScheduler", {"timestep_spacing": "trailing"}, 1000)
    # diffusers divides 0 by 0 at the step of length 0.
    assert not compare("DPMSolverMultistepScheduler", {}, 1000)
    assert compare("FlowMatchEulerDiscreteScheduler", {}, 1001)


def test_lambda_min_clipped(compare):
    """It moves the first timestep, which is the scheduler's to say."""
    options = {"beta_schedule": "squaredcos_cap_v2", "lambda_min_clipped": -5.1}
    for spacing in ("linspace", "leading"):
        assert compare("DPMSolverMultistepScheduler", {**options, "timestep_spacing": spacing}, 10)
    assert compare("DPMSolverSinglestepScheduler", options, 10)
    # Trailing steps keep their distance, so that fewer are left.
    with pytest.raises(ValueError, match="expected 500 timesteps from 0 to 999, got 49"):
        compare("DPMSolverMultistepScheduler", {**options, "timestep_spacing": "trailing"}, 500)


def test_trained_betas(compare):
    betas = np.linspace(1e-4, 0.05, 200)
    options = {"trained_betas": betas, "num_train_timesteps": 200}
    assert compare("DDIMScheduler", options, 20) and compare("DPMSolverMultistepScheduler", options, 20)


def test_the_singlestep_scheduler_keeps_its_config(compare):
    """set_timesteps turns lower_order_final on where steps are not in whole groups; not in the user's scheduler."""
    assert compare("DPMSolverSinglestepScheduler", {"solver_order": 3, "lower_order_final": False}, 10)


@pytest.mark.parametrize("steps", [20, 1000])
def test_tables_by_name_are_diffusers_defaults(steps):
    cosine = {"beta_schedule": "squaredcos_cap_v2"}
    schedule = alphas_cumprod("cosine")
    for table, scheduler in (
        (dpmsolver_pp(schedule, steps, "epsilon"), diffusers.DPMSolverMultistepScheduler(**cosine)),
        (ddim(schedule, steps, "epsilon"), diffusers.DDIMScheduler(**cosine, clip_sample=False)),
        (ddpm(schedule, steps, "epsilon"), diffusers.DDPMScheduler(**cosine, clip_sample=False)),
    ):
        converted = SolverTable.from_diffusers(scheduler, steps)
        assert torch.equal(converted.timesteps, table.timesteps)
        torch.testing.assert_close(converted.rows, table.rows, rtol=1e-9, atol=1e-12)


def test_stock_float32_schedulers_differ_by_their_rounding(our_states, monkeypatch):
    """The class people have, in float32 inside: the table is nearer to float64 than its scheduler is."""
    scheduler = diffusers.DPMSolverMultistepScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    got = our_states(SolverTable.from_diffusers(scheduler, 20))[-1]
    scheduler.set_timesteps(20)
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t.double()), t, x, return_dict=False)[0]
    error = (x - got).abs().max() / got.abs().max()
    assert 0 < error < 1e-4


def test_a_copy_under_the_same_name_with_fewer_options():
    """VibeVoice brings its own DPMSolverMultistepScheduler, which calls the schedule cosine."""

    class DPMSolverMultistepScheduler:
        config = types.MappingProxyType(
            {
                "num_train_timesteps": 1000,
                "beta_schedule": "cosine",
                "prediction_type": "v_prediction",
                "algorithm_type": "dpmsolver++",
                "solver_type": "midpoint",
                "solver_order": 2,
                "lower_order_final": True,
                "final_sigmas_type": "zero",
            }
        )

        def __deepcopy__(self, memo):
            return DPMSolverMultistepScheduler()

        def set_timesteps(self, steps):
            self.timesteps = torch.linspace(0, 999, steps + 1).round().flip(0)[:-1].long()

    table = SolverTable.from_diffusers(DPMSolverMultistepScheduler(), 10)
    want = dpmsolver_pp(alphas_cumprod("cosine"), 10, "v_prediction")
    torch.testing.assert_close(table.rows, want.rows, rtol=1e-9, atol=1e-12)


def test_clipping_and_noise_reach_the_table():
    table = SolverTable.from_diffusers(diffusers.DDIMScheduler(clip_sample_range=2.0), 10, eta=0.5)
    assert (table.rows[:, R] == 2).all() and table.needs_noise and "eta 0.5" in table.name
    table = SolverTable.from_diffusers(diffusers.DDIMScheduler(clip_sample=False), 10)
    assert (table.rows[:, R] == math.inf).all() and not table.needs_noise
    # The last timestep of leading steps with an offset is 1: noise of 1e-10, as diffusers adds.
    table = SolverTable.from_diffusers(diffusers.DDPMScheduler(steps_offset=1), 10)
    assert abs(table.rows[-1, S] - 1e-10) < 1e-24


def convert(name, steps=10, *, eta=0.0, mu=None, **options):
    return lambda: SolverTable.from_diffusers(getattr(diffusers, name)(**options), steps, eta=eta, mu=mu)


MULTI, SINGLE = "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler"
FLOW_NAME = "FlowMatchEulerDiscreteScheduler"


@pytest.mark.parametrize(
    "call, message",
    [
        (convert("PNDMScheduler"), "a scheduler of DPMSolverMultistepScheduler, .*, got PNDMScheduler"),
        (
            convert("EulerDiscreteScheduler"),
            "scale_model_input.* expected DPMSolverMultistepScheduler with solver_order=1",
        ),
        (lambda: SolverTable.from_diffusers(object(), 10), "got object"),
        (convert(MULTI, 0), r"num_inference_steps 1 to 1000 \(num_train_timesteps\), got 0"),
        (convert("DDPMScheduler", 1001), "num_inference_steps 1 to 1000 .*, got 1001"),
        (convert("DDIMScheduler", 201, num_train_timesteps=200), "num_inference_steps 1 to 200 .*, got 201"),
        (convert(FLOW_NAME, 0), "num_inference_steps >= 1, got 0"),
        (convert("DDIMScheduler", thresholding=True), "thresholding=False, got True: .*clip_sample"),
        (convert(MULTI, thresholding=True), "thresholding=False"),
        (convert("DDIMScheduler", eta=1.5), r"eta in \[0, 1\] for DDIMScheduler, or 0, got 1.5"),
        (convert("DDPMScheduler", eta=0.5), "got 0.5 for DDPMScheduler"),
        (convert(FLOW_NAME, mu=1.0), "mu only for .*use_dynamic_shifting=True, got mu=1.0"),
        (convert(MULTI, mu=1.0), "mu only for .* got mu=1.0 for DPMSolverMultistepScheduler"),
        (convert(FLOW_NAME, use_dynamic_shifting=True), "mu with use_dynamic_shifting=True, got None"),
        (
            convert(MULTI, use_dynamic_shifting=True, use_flow_sigmas=True),
            r"use_dynamic_shifting=False .*, got True; set flow_shift=exp\(mu\)",
        ),
        (convert(MULTI, variance_type="learned_range"), "variance_type None .*, got 'learned_range'"),
        (convert("DDPMScheduler", variance_type="learned"), "variance_type of fixed_small, .*, got 'learned'"),
        (convert("DDPMScheduler", variance_type="fixed_large_log"), "variance_type of .*, got 'fixed_large_log'"),
        (convert("DDPMScheduler", beta_schedule="sigmoid"), "beta_schedule of .*, got 'sigmoid'; .*trained_betas"),
        (convert("DDPMScheduler", trained_betas=[0.1, 0.2]), "expected 1000 trained_betas .*, got 2"),
        (
            convert(
                MULTI, algorithm_type="dpmsolver", final_sigmas_type="sigma_min", prediction_type="flow_prediction"
            ),
            "prediction_type of epsilon, v_prediction, sample, got 'flow_prediction'",
        ),
        (
            convert(MULTI, algorithm_type="sde-dpmsolver", final_sigmas_type="sigma_min", solver_order=3),
            "solver_order 1 or 2 for sde-dpmsolver, got 3",
        ),
        (convert("DDIMScheduler", prediction_type="flow_prediction"), "got 'flow_prediction'"),
        # 61 steps of 1000/61 come to 62 by rounding, the last of them timestep -1.
        (convert("DDIMScheduler", 61, timestep_spacing="trailing"), "expected 61 timesteps from 0 to 999, got 62"),
        (convert("DDIMScheduler", 1000, steps_offset=1), "expected 1000 timesteps .* from 1 to 1000"),
        # 1000 // 1001 is 0.
        (convert(MULTI, 1000, timestep_spacing="leading"), "timesteps that go down, got 1000 times 0"),
        (
            convert("DDIMScheduler", rescale_betas_zero_snr=True, timestep_spacing="trailing"),
            "expected finite coefficients, .*zero terminal SNR",
        ),
    ],
)
def test_rejects(call, message):
    with pytest.raises(ValueError, match=message):
        call()
