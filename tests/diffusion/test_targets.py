import numpy as np
import pytest
import torch

from fastlatent.diffusion.schedules import alphas_cumprod
from fastlatent.diffusion.targets import PREDICTION_TYPES, add_noise, target

SCHEDULE = alphas_cumprod("cosine")


def draw(*shape, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=dtype), torch.randn(shape, generator=generator, dtype=dtype)


def times(*shape, prediction_type="epsilon", seed=0):
    generator = torch.Generator().manual_seed(seed)
    if prediction_type == "flow":
        return torch.rand(shape, generator=generator, dtype=torch.float64)
    return torch.randint(0, 1000, shape, generator=generator)


def schedule_for(prediction_type):
    return None if prediction_type == "flow" else SCHEDULE


# One time per image, per token, and for a single element: leading dimensions of any number.
@pytest.mark.parametrize(
    "x_shape, t_shape", [((3, 4, 2, 2), (3,)), ((2, 5, 4), (2, 5)), ((4,), ()), ((0, 5, 4), (0, 5))]
)
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_each_element_has_its_own_time(prediction_type, x_shape, t_shape):
    x0, noise = draw(*x_shape)
    t = times(*t_shape, prediction_type=prediction_type)
    schedule = schedule_for(prediction_type)
    x_t, wanted = add_noise(x0, noise, t, schedule), target(prediction_type, x0, noise, t, schedule)
    assert x_t.shape == wanted.shape == x0.shape
    for at in np.ndindex(t_shape):
        if prediction_type == "flow":
            alpha, sigma = 1 - t[at].item(), t[at].item()
        else:
            alpha, sigma = SCHEDULE[t[at]].item() ** 0.5, (1 - SCHEDULE[t[at]].item()) ** 0.5
        torch.testing.assert_close(x_t[at], alpha * x0[at] + sigma * noise[at])
        expected = {
            "epsilon": noise[at],
            "v_prediction": alpha * noise[at] - sigma * x0[at],
            "flow": noise[at] - x0[at],
        }[prediction_type]
        torch.testing.assert_close(wanted[at], expected)


def test_matches_diffusers():
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    x0, noise = draw(8, 4, 3, dtype=torch.float32)
    t = torch.tensor([0, 1, 250, 500, 750, 990, 998, 999])
    # diffusers keeps alphas_cumprod in float32; at t = 999 only 3 digits of 2.4e-9 survive its 1000 products.
    torch.testing.assert_close(
        add_noise(x0, noise, t, SCHEDULE), scheduler.add_noise(x0, noise, t), rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(
        target("v_prediction", x0, noise, t, SCHEDULE),
        scheduler.get_velocity(x0, noise, t),
        rtol=1e-5,
        atol=1e-5,
    )


def test_flow_ends():
    x0, noise = draw(2, 3)
    assert torch.equal(add_noise(x0, noise, torch.zeros(2), None), x0)
    assert torch.equal(add_noise(x0, noise, torch.ones(2), None), noise)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_keeps_the_dtype(dtype, prediction_type):
    """Levels are computed in float64 and rounded once: a float16 alpha_bar would be 0 near t = 999."""
    x0, noise = (v.to(dtype) for v in draw(2, 5, 4))
    t = times(2, 5, prediction_type=prediction_type)
    schedule = schedule_for(prediction_type)
    x_t = add_noise(x0, noise, t, schedule)
    assert x_t.dtype == target(prediction_type, x0, noise, t, schedule).dtype == dtype
    exact = add_noise(x0.double(), noise.double(), t, schedule)
    # Two coefficients, two products and a sum, each within half a unit in the last place.
    tolerance = 3 * torch.finfo(dtype).eps
    torch.testing.assert_close(x_t.double(), exact, rtol=0, atol=tolerance * exact.abs().max().item())


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_gradients(prediction_type):
    x0, noise = (v.requires_grad_() for v in draw(2, 3, 2))
    t = times(2, 3, prediction_type=prediction_type)
    schedule = schedule_for(prediction_type)
    assert torch.autograd.gradcheck(lambda x, z: add_noise(x, z, t, schedule), (x0, noise))
    assert torch.autograd.gradcheck(lambda x, z: target(prediction_type, x, z, t, schedule), (x0, noise))


X = torch.zeros(2, 3, 4)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((X, X[:1], torch.zeros(2), None), r"add_noise: expected noise \[2, 3, 4\] like x0, got \[1, 3, 4\]"),
        ((X, X, torch.zeros(3), None), r"first dimensions of x0 \[2, 3, 4\], got \[3\]"),
        ((X, X, torch.zeros(2, 3, 4, 1), None), r"first dimensions of x0 .*, got \[2, 3, 4, 1\]"),
        (
            (X, X, torch.zeros(2, dtype=torch.int64), None),
            r"floating t in \[0, 1\] without a schedule, got torch.int64",
        ),
        ((X, X, torch.zeros(2), SCHEDULE), r"int64 t in \[0, 1000\) with a schedule, got torch.float32"),
        ((X, X, torch.zeros(2, dtype=torch.int64), SCHEDULE.to("meta")), "schedule on cpu like t, got meta"),
    ],
)
def test_rejects(arguments, message):
    with pytest.raises(ValueError, match=message):
        add_noise(*arguments)


@pytest.mark.parametrize(
    "prediction_type, schedule, message",
    [
        ("sample", SCHEDULE, "epsilon, v_prediction, flow, got 'sample'"),
        ("flow", SCHEDULE, "schedule=None for flow, got a schedule"),
        ("epsilon", None, "a schedule of alphas_cumprod for epsilon, got None"),
    ],
)
def test_rejects_types(prediction_type, schedule, message):
    with pytest.raises(ValueError, match=message):
        target(prediction_type, X, X, torch.zeros(2), schedule)
