"""ParallelSampler: against a plain float64 loop, guidance, batches and their buckets, noise of the solver."""

import numpy as np
import pytest
import torch

from fastlatent.diffusion.noise import normal
from fastlatent.diffusion.solvers import SolverTable, build_table
from fastlatent.ops.solver_step import A, B, C, D, E, P, Q, S
from fastlatent.sampling.graphs import batch_bucket
from fastlatent.sampling.parallel import ParallelSampler

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.needs_cuda)]
SHAPE = (2, 4, 4)
SOLVERS = [
    ("dpmsolver++", "epsilon"),
    ("dpmsolver++", "v_prediction"),
    ("ddim", "v_prediction"),
    ("ddpm", "epsilon"),
    ("euler", "flow"),
]


def linear(x, t, condition):
    """A model whose rows differ, and whose output depends on all that it is given."""
    output = 0.7 * x.roll(1, dims=2) + (t / 1000).to(x.dtype)[:, None, None, None]
    if condition is not None:
        output = output + condition.to(x.dtype)[:, :1, None, None] * x + condition.to(x.dtype)[:, 1:, None, None]
    return output


def conditions(count):
    return torch.from_numpy(np.random.default_rng(1).normal(size=(count, 2)))


NULL = torch.tensor([0.3, -0.2], dtype=torch.float64)


def plain(table: SolverTable, noise, condition, scale, seed):
    """The definition, step by step: no history array, no op, one sample at a time."""
    made = []
    for i, start in enumerate(noise.double()):
        x, d1, d2 = start[None], torch.zeros(1), torch.zeros(1)
        for s, row in enumerate(table.rows):
            t = table.timesteps[s : s + 1]
            c = linear(x, t, condition[i : i + 1])
            u = linear(x, t, NULL[None])
            output = u + scale * (c - u)
            data = row[P] * x + row[Q] * output
            following = row[A] * x + row[B] * data + row[C] * d1 + row[D] * d2 + row[E] * output
            x, d1, d2 = following + row[S] * normal(seed, [i], s + 1, SHAPE), data, d1
        made.append(x)
    return torch.cat(made)


def sampler(solver="dpmsolver++", prediction_type="v_prediction", dtype=torch.float64, device="cpu", scale=2.5):
    table = build_table(solver, 5, prediction_type, "cosine")
    return ParallelSampler(
        linear, table, SHAPE, dtype=dtype, device=torch.device(device), cfg_scale=scale, null=NULL
    ), table  # fmt: skip


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("scale", [1.0, 2.5])  # 1: one way, 2.5: two
@pytest.mark.parametrize(("solver", "prediction_type"), SOLVERS)
def test_equals_a_plain_loop(solver, prediction_type, scale, device):
    ours, table = sampler(solver, prediction_type, device=device, scale=scale)
    assert ours.ways == (1 if scale == 1 else 2)
    noise, condition = normal(0, range(3), 0, SHAPE), conditions(3)
    got = ours.sample(noise, condition, seed=7).cpu()
    want = plain(table, noise, condition, scale, 7)
    assert got.dtype == torch.float64
    assert float((got - want).abs().max() / want.abs().max()) <= 1e-12


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("solver", ["dpmsolver++", "ddpm"])
def test_a_sample_has_the_same_bits_in_its_bucket(solver, device):
    ours, _ = sampler(solver, dtype=torch.float32, device=device)
    noise, condition = normal(0, range(8), 0, SHAPE), conditions(8)
    whole = ours.sample(noise, condition, seed=3)
    for rows in (5, 6, 8):  # all of them in the bucket of 8
        assert torch.equal(ours.sample(noise[:rows], condition[:rows], seed=3), whole[:rows])
    # Beside other samples, at another place: still the same sample.
    again = ours.sample(noise[3:], condition[3:], seed=3, first_id=3)
    assert torch.equal(again, whole[3:])
    for rows in (1, 3):  # smaller buckets
        for begin in range(0, 8 - rows + 1, rows):
            part = slice(begin, begin + rows)
            got = ours.sample(noise[part], condition[part], seed=3, first_id=begin)
            torch.testing.assert_close(got, whole[part], rtol=1e-5, atol=1e-5)


def test_seeds_of_the_solver():
    ours, _ = sampler("ddpm")
    noise, condition = normal(0, range(2), 0, SHAPE), conditions(2)
    want = ours.sample(noise, condition, seed=3)
    assert torch.equal(ours.sample(noise, condition, seed=3), want)
    assert float((ours.sample(noise, condition, seed=4) - want).abs().max()) > 0.01
    assert float((ours.sample(noise, condition, seed=3, first_id=1) - want).abs().max()) > 0.01


def test_without_conditions():
    table = build_table("ddim", 3, "epsilon", "linear")
    ours = ParallelSampler(linear, table, SHAPE, dtype=torch.bfloat16, device=torch.device("cpu"), cfg_scale=3.0)
    assert ours.ways == 1  # there is nothing to guide towards
    got = ours.sample(normal(0, range(3), 0, SHAPE))
    assert got.shape == (3, *SHAPE)
    assert got.dtype == torch.float32  # the solver's state, whatever the model's
    assert ours.sample(torch.zeros(0, *SHAPE)).shape == (0, *SHAPE)


def test_steps_are_told_and_may_stop():
    ours, _ = sampler()
    rows = []
    ours.sample(normal(0, range(3), 0, SHAPE), conditions(3), on_step=rows.append)
    assert rows == [3] * 5

    def stop(rows):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ours.sample(normal(0, range(3), 0, SHAPE), conditions(3), on_step=stop)
    # What was left half done is not seen by the next batch.
    noise = normal(0, range(3), 0, SHAPE)
    assert torch.equal(ours.sample(noise, conditions(3)), sampler()[0].sample(noise, conditions(3)))


def test_nothing_waits_for_the_device(monkeypatch):
    # The loop must not read a tensor on the host: under a graph it would be frozen, and without one it would wait.
    ours, _ = sampler()
    noise, condition = normal(0, range(3), 0, SHAPE), conditions(3)

    def forbidden(*_):
        raise AssertionError("read on the host")

    for name in ("item", "tolist", "__bool__", "__int__", "__float__", "__index__", "numpy"):
        monkeypatch.setattr(torch.Tensor, name, forbidden)
    ours.sample(noise, condition)


@pytest.mark.parametrize(
    ("noise", "condition", "message"),
    [
        (torch.zeros(2, 2, 4, 5), conditions(2), r"noise: expected \[samples, 2, 4, 4\], got \[2, 2, 4, 5\]"),
        (torch.zeros(2, *SHAPE), conditions(3), r"expected one row per sample \(2\), got \[3, 2\]"),
        (torch.zeros(2, *SHAPE), None, "expected one row per sample for a model with a null condition"),
    ],
)
def test_bad_calls(noise, condition, message):
    with pytest.raises(ValueError, match=message):
        sampler()[0].sample(noise, condition)


def test_buckets():
    assert [batch_bucket(n) for n in (1, 2, 3, 4, 5, 63, 64, 65, 129)] == [1, 2, 4, 4, 8, 64, 64, 128, 192]
