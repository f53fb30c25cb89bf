import pytest
import torch
from plain_samplers import BATCH, CHANNELS, network, noises, start

from fastlatent.ops.solver_step import solver_step_reference


@pytest.fixture(scope="session")
def our_states():
    """Every state of a table, [S, B, C], through the plain reference of solver_step."""

    def states(table, model=network):
        state = torch.zeros(4, BATCH, CHANNELS, dtype=torch.float64)
        state[0] = start()
        guidance = torch.ones(1, BATCH, dtype=torch.float64)
        kept = []
        for row, t, noise in zip(table.rows, table.timesteps, noises(len(table.rows)), strict=True):
            solver_step_reference(state, model(state[0], t)[None], guidance, row, noise if table.needs_noise else None)
            kept.append(state[0].clone())
        return torch.stack(kept)

    return states


@pytest.fixture(scope="session")
def assert_same():
    """At most `bound` apart, relative to the largest value of each intermediate state."""

    def check(got, want, bound=1e-9):
        assert torch.isfinite(want).all()
        scale = want.abs().amax(dim=(1, 2))
        assert ((got - want).abs().amax(dim=(1, 2)) / scale).max() <= bound

    return check
