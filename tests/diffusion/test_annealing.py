import pytest
import torch

from fastlatent.diffusion.annealing import GUIDANCE_SCHEDULES, annealed_steps, guidance_scales


@pytest.mark.parametrize(
    "first, last, tokens, want",
    [
        (50, 5, 10, [50, 45, 40, 35, 30, 25, 20, 15, 10, 5]),
        (5, 1, 3, [5, 3, 1]),
        # 1.5 rounds up whichever way the steps go.
        (1, 2, 3, [1, 2, 2]),
        (2, 1, 3, [2, 2, 1]),
        # Thirds: 4 - 2/3, 4 - 4/3.
        (4, 2, 4, [4, 3, 3, 2]),
        (7, 7, 4, [7, 7, 7, 7]),
        (50, 5, 2, [50, 5]),
        # One token has no way to go.
        (50, 5, 1, [50]),
    ],
)
def test_annealed_steps(first, last, tokens, want):
    assert annealed_steps(first, last, tokens) == want


@pytest.mark.parametrize("first, last", [(50, 5), (100, 1), (1, 1000), (20, 20)])
@pytest.mark.parametrize("tokens", [2, 255, 256, 1024])
def test_annealed_steps_are_within_half_of_the_line(first, last, tokens):
    steps = annealed_steps(first, last, tokens)
    assert steps[0] == first and steps[-1] == last and all(isinstance(step, int) for step in steps)
    line = torch.linspace(first, last, tokens, dtype=torch.float64)
    assert (torch.tensor(steps) - line).abs().max() <= 0.5 + 1e-9


def test_guidance_scales():
    assert guidance_scales(3.0, 4, "linear").tolist() == [1.5, 2.0, 2.5, 3.0]
    assert guidance_scales(3.0, 4, "constant").tolist() == [3.0] * 4
    assert guidance_scales(3.0, 1, "linear").tolist() == [3.0]
    # Guidance below 1 goes down; 1 stays.
    assert guidance_scales(0.0, 2, "linear").tolist() == [0.5, 0.0]
    for schedule in GUIDANCE_SCHEDULES:
        scales = guidance_scales(1.0, 256, schedule)
        assert scales.dtype == torch.float64 and (scales == 1).all() and len(scales) == 256


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: annealed_steps(0, 5, 4), "annealed_steps: expected first >= 1, got 0"),
        (lambda: annealed_steps(5, 0, 4), "annealed_steps: expected last >= 1, got 0"),
        (lambda: annealed_steps(5, 5, 0), "annealed_steps: expected tokens >= 1, got 0"),
        (lambda: guidance_scales(3.0, 0, "linear"), "guidance_scales: expected tokens >= 1, got 0"),
        (lambda: guidance_scales(3.0, 4, "cosine"), "guidance_scales: .* constant, linear, got 'cosine'"),
    ],
)
def test_rejects(call, message):
    with pytest.raises(ValueError, match=message):
        call()
