"""LatentLM's sampling, patched and not, over structural doubles of its published classes."""

import copy
import functools

import pytest
import torch
from plain_samplers import in_float64
from toy_latentlm import (
    DPMSolverMultistepScheduler,
    FlowMatchingScheduler,
    LaterTransformer,
    Transformer,
    p_sample_of,
    randomise,
    relative,
    same_noise,
)

from fastlatent.patches.latentlm import scheduler_of
from fastlatent.patches.patch import patch

torch.set_num_threads(1)
NULL = 10
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.needs_cuda)]


def sample(model, scheduler, steps=4, scale=2.5, sample_func=None, batch=2):
    labels = torch.cat([torch.arange(batch), torch.full((batch,), NULL)]).to(next(model.parameters()).device)
    with torch.no_grad():
        return model.sample_with_cfg(labels, scale, sample_func or p_sample_of(scheduler, steps))


def both(model, scheduler, **options):
    """Latents without and with the patch from one seed, and whether the generator ends where it would."""
    out, after = [], []
    for patched in (False, True):
        handle = patch(model) if patched else None
        torch.manual_seed(3)
        out.append(sample(model, scheduler, **options))
        after.append(torch.rand(()))
        if handle:
            handle.undo()
    assert after[0] == after[1]
    assert out[0].shape == out[1].shape and out[0].dtype == out[1].dtype
    return relative(out[1], out[0])


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "flow"])
@pytest.mark.parametrize("kind", [Transformer, LaterTransformer])
def test_float64_is_equal(kind, prediction):
    model = randomise(kind().double())
    if prediction == "flow":
        assert both(model, FlowMatchingScheduler()) < 1e-9
        return
    wide, _ = in_float64("DPMSolverMultistepScheduler", "scheduling_dpmsolver_multistep")
    assert both(model, wide(beta_schedule="squaredcos_cap_v2", prediction_type=prediction)) < 1e-9
    # As published: float32 tables and states. epsilon divides by alpha[999] = 4.9e-5, which float32 knows to 1.5e-5.
    limit = 1e-4 if prediction == "epsilon" else 1e-5
    assert both(model, DPMSolverMultistepScheduler(prediction_type=prediction)) < limit


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("options", "batch", "scale"),
    [
        ({"algorithm_type": "sde-dpmsolver++"}, 2, 2.5),  # noise at every step, float32, of 2B rows
        ({"algorithm_type": "sde-dpmsolver++", "solver_type": "heun"}, 3, 4.0),
        ({"solver_order": 3}, 1, 1.0),  # guidance 1: one branch alone
        ({"final_sigmas_type": "sigma_min"}, 1, 0.0),
    ],
)
def test_schedulers_in_float32(device, options, batch, scale):
    scheduler = DPMSolverMultistepScheduler(prediction_type="v_prediction", **options)
    assert both(randomise(Transformer()).to(device), scheduler, batch=batch, scale=scale) < 2e-5


@pytest.mark.parametrize("kind", [Transformer, LaterTransformer])
def test_bfloat16_errs_no_more_than_unpatched(monkeypatch, kind):
    model, exact = randomise(kind()).bfloat16(), None
    exact = copy.deepcopy(model).double()
    errors = [0.0, 0.0]
    for seed in range(6):
        results = []
        for net, patched in ((exact, False), (model, False), (model, True)):
            with monkeypatch.context() as draws:
                handle = patch(net) if patched else None
                same_noise(draws, seed)
                results.append(sample(net, DPMSolverMultistepScheduler(prediction_type="v_prediction"), batch=4))
                if handle:
                    handle.undo()
        assert results[2].dtype == torch.bfloat16
        errors = [total + relative(got, results[0]) for total, got in zip(errors, results[1:], strict=True)]
    assert errors[1] <= 1.5 * errors[0]


def test_weights_are_followed():
    model, scheduler = randomise(Transformer()), FlowMatchingScheduler()
    other = {name: value * 1.1 for name, value in model.state_dict().items()}

    def compared():
        torch.manual_seed(0)
        got = sample(model, scheduler)
        theirs = copy.deepcopy(model)  # a copy has the model's own loop
        torch.manual_seed(0)
        return relative(got, sample(theirs, scheduler))

    with patch(model):
        assert compared() < 1e-5
        model.load_state_dict(other)
        assert compared() < 1e-5
        with torch.no_grad():
            model.t_embedder.mlp[0].weight.mul_(2)
        assert compared() < 1e-5
        model.final_layer = copy.deepcopy(model.final_layer).apply(lambda m: m)
        with torch.no_grad():
            model.final_layer.linear.weight.neg_()
        assert compared() < 1e-5
        model.double()
        assert compared() < 1e-9


SCHEDULER = FlowMatchingScheduler()
STEPS = 3


def by_global(model, image):
    return p_sample_of(SCHEDULER, STEPS)(model, image)


def by_argument(scheduler, steps, model, image):
    return p_sample_of(scheduler, steps)(model, image)


def by_default(model, image, scheduler=SCHEDULER):
    return p_sample_of(scheduler, 3)(model, image)


class Pipeline:
    def __init__(self, scheduler):
        self.noise_scheduler, self.spare = scheduler, FlowMatchingScheduler()

    def p_sample(self, model, image):
        return p_sample_of(self.noise_scheduler, 3)(model, image)

    def __call__(self, model, image):
        return self.p_sample(model, image)


def test_the_scheduler_is_found():
    s = FlowMatchingScheduler()
    pipeline = Pipeline(s)
    assert scheduler_of(p_sample_of(s, 3)) is s
    assert scheduler_of(torch.no_grad()(p_sample_of(s, 3))) is s
    assert scheduler_of(by_global) is SCHEDULER
    assert scheduler_of(by_default) is SCHEDULER
    assert scheduler_of(functools.partial(by_argument, s, 3)) is s
    assert scheduler_of(pipeline.p_sample) is s  # of two in the object, the one that the code names
    assert scheduler_of(lambda model, image: p_sample_of(pipeline.noise_scheduler, 3)(model, image)) is s
    for function in (lambda model, image: image, lambda model, image: (s, SCHEDULER)):
        with pytest.raises(ValueError, match="expected one scheduler"):
            scheduler_of(function)


def test_steps_are_read_at_each_call():
    model, steps, scheduler = randomise(Transformer()), [4], FlowMatchingScheduler()

    def p_sample(network, image):
        return p_sample_of(scheduler, steps[0])(network, image)

    with patch(model):
        for steps[0] in (4, 1):
            torch.manual_seed(0)
            got = sample(model, scheduler, sample_func=p_sample)
            torch.manual_seed(0)
            assert relative(got, sample(copy.deepcopy(model), scheduler, sample_func=p_sample)) < 1e-5


def test_loops_that_are_not_their_schedulers():
    model, scheduler = randomise(Transformer()), DPMSolverMultistepScheduler(prediction_type="v_prediction")
    noisy = DPMSolverMultistepScheduler(prediction_type="v_prediction", algorithm_type="sde-dpmsolver++")

    def custom(network, image):  # timesteps of its own
        scheduler.set_timesteps(timesteps=[900, 500, 100])
        for t in scheduler.timesteps:
            image = scheduler.step(network(image, t.repeat(len(image)).to(image)), t, image).prev_sample
        return image

    def seeded(network, image):  # draws from its own generator
        noisy.set_timesteps(3)
        generator = torch.Generator().manual_seed(0)
        for t in noisy.timesteps:
            output = network(image, t.repeat(len(image)).to(image))
            image = noisy.step(output, t, image, generator=generator).prev_sample
        return image

    def scaled(network, image):
        return 1.01 * p_sample_of(scheduler, 3)(network, image)

    def halved(network, image):
        return p_sample_of(scheduler, 3)(network, image[:1])

    with patch(model):
        for function in (custom, seeded, scaled):
            with pytest.raises(ValueError, match="relative difference"):
                sample(model, scheduler, sample_func=function)
        with pytest.raises(ValueError, match="one timestep"):
            sample(model, scheduler, sample_func=halved)
        with pytest.raises(ValueError, match="thresholding.*undo the patch"):
            sample(model, DPMSolverMultistepScheduler(thresholding=True))
        with pytest.raises(ValueError, match="expected one scheduler"):
            sample(model, scheduler, sample_func=lambda network, image: image)
        assert torch.isfinite(sample(model, scheduler)).all()  # none of it is left behind


def wrong(model, change):
    change(model)
    return model


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (lambda: torch.nn.Linear(2, 2), "noisy_x_embedder"),
        (lambda: wrong(Transformer(), lambda m: delattr(m, "final_layer")), "final_layer, which is missing"),
        (lambda: wrong(Transformer(), lambda m: setattr(m, "forward_with_cfg", None)), "forward_with_cfg"),
        (lambda: Transformer(patch=2), "noisy_x_embedder.proj.weight"),
        (lambda: wrong(Transformer(), lambda m: setattr(m.diffusion_blocks[1].norm, "eps", 1e-5)), r"1\.norm\.eps"),
        (
            lambda: wrong(Transformer(), lambda m: m.diffusion_blocks[0].adaLN_modulation.insert(0, torch.nn.GELU())),
            "to be SiLU, got GELU",
        ),
        (
            lambda: wrong(Transformer(), lambda m: m.diffusion_blocks[0].mlp.register_parameter(
                "scale", torch.nn.Parameter(torch.ones(64)))),
            "mlp.scale",
        ),
        (
            lambda: wrong(Transformer(), lambda m: setattr(
                m, "forward_with_cfg", lambda x, t, condition, cfg_scale: 1.5 * Transformer.forward_with_cfg(
                    m, x, t, condition, cfg_scale))),
            "other tokens",
        ),
        (
            lambda: wrong(Transformer(), lambda m: m.t_embedder.mlp[0].weight.data.fill_(torch.nan)),
            "finite",
        ),
    ],
)  # fmt: skip
def test_what_looks_like_it(model, says):
    model = model()
    if not any(p.isnan().any() for p in model.parameters()):
        randomise(model)
    before = dict(vars(model))
    with pytest.raises(ValueError, match=says):
        patch(model, family="latentlm")
    assert vars(model) == before
