"""Every published head against its plain re-computation: one evaluation, whole trajectories, guidance, int8."""

import dataclasses
import itertools

import plain_heads
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
from fastlatent.diffusion.solvers import SolverTable, build_table, ddim
from fastlatent.heads.diffusion_head import DiffusionHead

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.needs_cuda)]
LAYOUTS = list(plain_heads.HEADS)
CHANNELS = 5


def family_of(layout):
    return "vibevoice" if layout.startswith("vibevoice") else layout


def times_of(layout):
    """Times as the published net gets them: two for pocket-tts, raw for NextStep."""
    return {"pocket_tts": (0.25, 0.75), "nextstep": 0.3}.get(layout, 451.0)


def setup(layout, *, batch=4, ways=1, **options):
    """State, x, and conditions [ways, B, Z]; random but rounded to bfloat16, so that both dtypes mean the same net."""
    state = {name: tensor.bfloat16().double() for name, tensor in plain_heads.random_state(layout, **options).items()}
    generator = torch.Generator().manual_seed(1)
    projected = "cond_embed.weight" in state
    width = state["cond_embed.weight"].shape[1] if projected else options.get("hidden", 12)
    channels = options.get("channels", CHANNELS)
    x = torch.randn(batch, channels, generator=generator, dtype=torch.float64)
    conditions = torch.randn(ways, batch, width, generator=generator, dtype=torch.float64).bfloat16().double()
    return state, x, conditions


def relative(got, want):
    return float((got.double() - want.double()).norm() / want.double().norm())


def zero_snr(steps=6):
    return ddim(
        rescale_zero_terminal_snr(alphas_cumprod("scaled_linear")), steps, "v_prediction", timestep_spacing="trailing"
    )


# The solver each family is published with, few steps of it, and the plain loop: (predict, x, noise [S, B, C]) → token.
MAR_TIMES = [999, 799, 599, 400, 200, 0]
ORTHUS_TIMES = [999, 832, 666, 499, 332, 166]
SOLVERS = {
    "latentlm": (lambda: build_table("dpmsolver++", 6, "v_prediction", "cosine"),
                 lambda f, x, z: plain_heads.dpmsolver_2m(f, x, 6)),
    "synthlm": (lambda: build_table("euler", 5, "flow", "cosine"), lambda f, x, z: plain_heads.euler_down(f, x, 5)),
    "mar": (lambda: respaced_ddpm(alphas_cumprod("cosine"), 6),
            lambda f, x, z: plain_heads.ancestral(f, x, z, MAR_TIMES)),
    "nextstep": (lambda: nextstep_sde(6), lambda f, x, z: plain_heads.nextstep_sde(f, x, z, 6)),
    "ming": (lambda: flow_euler_up(5), lambda f, x, z: plain_heads.euler_up(f, x, 5)),
    "calm": (lambda: flow_midpoint(6), lambda f, x, z: plain_heads.midpoint_up(f, x, 3)),
    "orthus": (zero_snr, lambda f, x, z: plain_heads.ddim_v(f, x, ORTHUS_TIMES, plain_heads.zero_snr_alphas_cumprod())),
    "pocket_tts": (lambda: lagrangian_flow_map(2), lambda f, x, z: plain_heads.flow_map(f, x, 2)),
}  # fmt: skip
for name in ("vibevoice", "vibevoice_port", "vibevoice_early_port"):
    SOLVERS[name] = SOLVERS["latentlm"]


def plain_trajectory(layout, state, x, conditions, noise, guide, dtype=torch.float64):
    """The plain loop over the plain head in `dtype`; its own state stays wide."""
    low = {name: tensor.to(dtype) for name, tensor in state.items()}

    def predict(x, t):
        ways = [plain_heads.HEADS[layout](low, x.to(dtype), t, c.to(dtype)).to(x.dtype) for c in conditions]
        guided = guide(*[way[:, : x.shape[1]] for way in ways])
        return torch.cat([guided, ways[0][:, x.shape[1] :]], 1)  # the variance is the conditional way's

    return SOLVERS[layout][1](predict, x, noise)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_evaluation_in_float64(layout, device):
    state, x, (condition,) = setup(layout, norm=0.5)
    head = DiffusionHead.from_state_dict(state, family_of(layout), device=device)
    want = plain_heads.HEADS[layout](state, x, times_of(layout), condition)
    t = torch.tensor(times_of(layout), dtype=torch.float64)
    got = head(x.to(device), t.expand(4, 2) if layout == "pocket_tts" else t, condition.to(device))
    assert got.dtype == torch.float64
    assert relative(got.cpu(), want) < 1e-10


def test_one_time_per_token():
    state, x, (condition,) = setup("mar")
    t = torch.tensor([999.0, 500.0, 17.0, 0.0])
    got = DiffusionHead.from_state_dict(state)(x, t, condition)
    rows = [plain_heads.mar(state, x[i : i + 1], float(t[i]), condition[i : i + 1]) for i in range(4)]
    assert relative(got, torch.cat(rows)) < 1e-10


@pytest.mark.parametrize("layout", LAYOUTS)
def test_eps_of_the_family(layout):
    # Inputs so small that 1e-5 and 1e-6 differ by much.
    state, x, (condition,) = setup(layout)
    state = {n: t * (1e-3 if "input" in n or "noisy" in n else 1) for n, t in state.items()}
    want = plain_heads.HEADS[layout](state, x, times_of(layout), condition)
    head = DiffusionHead.from_state_dict(state, family_of(layout))
    t = torch.tensor(times_of(layout), dtype=torch.float64)
    t = t.expand(4, 2) if layout == "pocket_tts" else t
    assert relative(head(x, t, condition), want) < 1e-10
    other = dataclasses.replace(head, weights=dataclasses.replace(head.weights, eps=1.1e-5 - head.weights.eps))
    assert relative(other(x, t, condition), want) > 1e-6


@pytest.mark.parametrize("layout", LAYOUTS)
def test_silu_is_on_the_published_branch(layout):
    # One FFN unit with a on the activated and b on the linear branch: silu(a)·b is not a·silu(b).
    state, x, (condition,) = setup(layout, blocks=1, width=1, std=0.3)
    want = plain_heads.HEADS[layout](state, x, times_of(layout), condition)
    head = DiffusionHead.from_state_dict(state, family_of(layout))
    t = torch.tensor(times_of(layout), dtype=torch.float64)
    t = t.expand(4, 2) if layout == "pocket_tts" else t
    assert relative(head(x, t, condition), want) < 1e-10
    if head.weights.gated:
        swapped = head.weights.up_weight.roll(1, 1).contiguous()
        other = dataclasses.replace(head, weights=dataclasses.replace(head.weights, up_weight=swapped))
        assert relative(other(x, t, condition), want) > 1e-4


# Norm weights near 1, and so small that 1 + scale' without the power of two would lose 5 bits.
@pytest.mark.parametrize("norm", [1.0, 0.03])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_bfloat16_error_of_one_evaluation(layout, norm):
    sizes = {"hidden": 64, "width": 96, "channels": 8, "batch": 32}
    state, x, (condition,) = setup(layout, norm=norm, **sizes)
    for name, tensor in state.items():
        # A net that was trained with such norms has FFN weights and shifts to match.
        block = name.startswith(("res_blocks.", "layers."))
        if block and name.endswith(("mlp.0.weight", "w12.weight", "gate_proj.weight", "up_proj.weight")):
            state[name] = (tensor / norm).bfloat16().double()
        elif block and (".adaLN" in name or ".linear" in name or name.endswith("in_ln.bias")):
            rows = len(tensor) if name.endswith("in_ln.bias") else 64
            state[name] = torch.cat([tensor[:rows] * norm, tensor[rows:]]).bfloat16().double()
    low = {name: tensor.bfloat16() for name, tensor in state.items()}
    exact = plain_heads.HEADS[layout](state, x, times_of(layout), condition)
    plain = plain_heads.HEADS[layout](low, x.bfloat16(), times_of(layout), condition.bfloat16())
    head = DiffusionHead.from_state_dict(low, family_of(layout))
    assert head.weights.dtype == torch.bfloat16
    t = torch.tensor(times_of(layout), dtype=torch.float64)
    got = head(x.float(), t.expand(32, 2) if layout == "pocket_tts" else t, condition.bfloat16())
    assert got.dtype == torch.float32
    assert relative(got, exact) <= 1.5 * relative(plain, exact)


@pytest.mark.parametrize("path", ["reference", "many_rows"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_trajectory_in_float64(layout, path):
    """With guidance: two ways, three for NextStep, none for pocket-tts, which is published without."""
    ways = {"nextstep": 3, "pocket_tts": 1}.get(layout, 2)
    state, x, conditions = setup(layout, ways=ways, norm=0.5)
    table = SOLVERS[layout][0]()
    noise = torch.randn(len(table.rows), 4, CHANNELS, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    if ways == 3:
        scale, null = (3.5, 1.75), (conditions[1], conditions[2])
        want = plain_trajectory(
            layout, state, x, conditions, noise, lambda c, u1, u2: u2 + 1.75 * (u1 - u2) + 3.5 * (c - u1)
        )
    elif ways == 2:
        scale, null = 2.5, conditions[1]
        want = plain_trajectory(layout, state, x, conditions, noise, lambda c, u: u + 2.5 * (c - u))
    else:
        scale, null = 1.0, None
        want = plain_trajectory(layout, state, x, conditions, noise, lambda c: c)
    head = DiffusionHead.from_state_dict(state, family_of(layout))
    got = head.sample(
        conditions[0], solver=table, null_cond=null, guidance_scale=scale, noise=x, step_noise=noise, path=path
    )
    assert got.dtype == torch.float64
    assert relative(got, want) < 1e-10


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_trajectory_in_bfloat16(layout, device):
    sizes = {"hidden": 64, "width": 96, "channels": 8, "batch": 32}
    state, x, conditions = setup(layout, ways=1, **sizes)
    table = SOLVERS[layout][0]()
    noise = torch.randn(len(table.rows), 32, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    exact = plain_trajectory(layout, state, x, conditions, noise, lambda c: c)
    plain = plain_trajectory(layout, state, x.float(), conditions, noise.float(), lambda c: c, dtype=torch.bfloat16)
    head = DiffusionHead.from_state_dict(state, family_of(layout), dtype=torch.bfloat16, device=device)
    cond, x, noise = (tensor.to(device) for tensor in (conditions[0], x, noise))
    got = head.sample(cond, solver=table, noise=x, step_noise=noise)
    assert got.dtype == torch.float32
    assert relative(got.cpu(), exact) <= 1.5 * relative(plain, exact)


def test_bfloat16_moves_published_timesteps():
    # Above 512 bfloat16 counts by 4, so LatentLM's and VibeVoice's nets see other times than their solver means.
    state = plain_heads.random_state("latentlm")
    head = DiffusionHead.from_state_dict(state, dtype=torch.bfloat16)
    meant = torch.tensor([999.0, 949.0, 899.0, 849.0, 549.0, 500.0, 50.0], dtype=torch.float64)
    seen = torch.tensor([1000.0, 948.0, 900.0, 848.0, 548.0, 500.0, 50.0], dtype=torch.float64)
    got = head.time_embedding(meant, published=True)
    assert torch.equal(got, head.time_embedding(seen, published=True))
    assert not torch.equal(got[:5], head.time_embedding(meant)[:5])
    # By hand: t and sinusoid in bfloat16, then exact until the last rounding.
    angle = seen[:, None] * 10000.0 ** (-torch.arange(128, dtype=torch.float64) / 128)
    sinusoid = torch.cat([angle.cos(), angle.sin()], 1).bfloat16().double()
    first, second = (state[f"t_embedder.mlp.{i}.weight"].bfloat16().double() for i in (0, 2))
    want = torch.nn.functional.silu(sinusoid @ first.T) @ second.T
    assert float((got.double() - want).abs().max()) <= float(want.abs().max()) * 2**-8
    # Every time of 20 steps that the published net sees differently.
    times = build_table("dpmsolver++", 20, "v_prediction", "cosine").timesteps
    moved = {int(t): int(t.bfloat16()) for t in times if t != t.bfloat16()}
    assert moved == {
        999: 1000, 949: 948, 899: 900, 849: 848, 799: 800, 749: 748, 699: 700, 649: 648, 599: 600, 549: 548
    }  # fmt: skip


def test_published_changes_the_sample():
    state, x, conditions = setup("vibevoice")
    table = build_table("dpmsolver++", 4, "v_prediction", "cosine")
    head = DiffusionHead.from_state_dict(state, dtype=torch.bfloat16)
    ours, theirs = (head.sample(conditions[0], solver=table, noise=x, published=p) for p in (False, True))
    assert not torch.equal(ours, theirs)
    # Tables are prepared once each way, and not mixed up.
    assert torch.equal(ours, head.sample(conditions[0], solver=table, noise=x))


def test_pocket_tts_time_norm():
    # A mean that is large against the spread: the published norm leaves it in, a layer norm would not.
    state = plain_heads.random_state("pocket_tts")
    for i in range(2):
        state[f"time_embed.{i}.mlp.2.bias"] += 3.0
    head = DiffusionHead.from_state_dict({"flow_net." + name: t for name, t in state.items()})
    s, t = 0.0, 1.0
    rows = []
    for i, time in enumerate((s, t)):
        angle = time * state[f"time_embed.{i}.freqs"]
        h = torch.cat([angle.cos(), angle.sin()]) @ state[f"time_embed.{i}.mlp.0.weight"].T
        h = torch.nn.functional.silu(h + state[f"time_embed.{i}.mlp.0.bias"])
        h = h @ state[f"time_embed.{i}.mlp.2.weight"].T + state[f"time_embed.{i}.mlp.2.bias"]
        rows.append(h * state[f"time_embed.{i}.mlp.3.alpha"] / torch.sqrt(h.var(unbiased=True) + 1e-5))
    got = head.time_embedding(torch.tensor([[s, t]]))
    assert relative(got[0], (rows[0] + rows[1]) / 2) < 1e-12


@pytest.mark.parametrize("times", [0, 1])
def test_pocket_tts_with_fewer_times(times):
    state, x, (condition,) = setup("pocket_tts", times=times)
    head = DiffusionHead.from_state_dict(state, "pocket_tts")
    want = plain_heads.pocket_tts(state, x, (0.5,)[:times], condition)
    assert relative(head(x, 0.5, condition), want) < 1e-10


def test_projection():
    state, _, (condition,) = setup("mar")
    head = DiffusionHead.from_state_dict(state)
    want = condition @ state["cond_embed.weight"].T + state["cond_embed.bias"]
    torch.testing.assert_close(head.project(condition.reshape(2, 2, 7)).reshape(4, 12), want, rtol=0, atol=1e-12)
    plain = DiffusionHead.from_state_dict(plain_heads.random_state("latentlm"))
    assert torch.equal(plain.project(condition.new_ones(12)), condition.new_ones(12))


def test_guidance_forms_agree():
    state, x, conditions = setup("nextstep", ways=3)
    head = DiffusionHead.from_state_dict(state, "nextstep")
    table = flow_euler_up(3, 1.0)
    cond, u1, u2 = conditions

    def sample(null, scale):
        return head.sample(cond, solver=table, null_cond=null, guidance_scale=scale, noise=x)

    alone = head.sample(cond, solver=table, noise=x)
    assert torch.equal(sample(u1, 1.0), alone)
    assert torch.equal(sample((u1, u2), (1.0, 1.0)), alone)
    assert torch.equal(sample(None, 1), alone)
    assert torch.equal(sample(u1, torch.tensor(2.0)), sample(u1, 2.0))
    each = sample(u1, torch.tensor([1.0, 2.0, 3.0, 1.0]))
    assert relative(each[[0, 3]], alone[[0, 3]]) < 1e-12
    assert relative(each[1], sample(u1, 2.0)[1]) < 1e-12
    # u2 + s2·(u1 − u2) + s·(c − u1): equal scales leave u1 out, a second scale of 1 leaves u2 out.
    assert relative(sample((u1, u2), (2.0, 2.0)), sample(u2, 2.0)) < 1e-12
    assert relative(sample((u1, u2), (2.0, 1.0)), sample(u1, 2.0)) < 1e-12
    tensors = tuple(torch.full((4,), s) for s in (3.0, 1.5))
    assert torch.equal(sample((u1, u2), tensors), sample((u1, u2), (3.0, 1.5)))


def test_noise_is_drawn_when_not_given():
    state, _, conditions = setup("mar")
    head = DiffusionHead.from_state_dict(state, dtype=torch.float32)
    table = respaced_ddpm(alphas_cumprod("cosine"), 5)

    def drawn(seed):
        return head.sample(conditions[0], solver=table, generator=torch.Generator().manual_seed(seed))

    generator = torch.Generator().manual_seed(7)
    noise, step_noise = (torch.randn(size, generator=generator) for size in ((4, 5), (5, 4, 5)))
    assert torch.equal(drawn(7), head.sample(conditions[0], solver=table, noise=noise, step_noise=step_noise))
    assert not torch.equal(drawn(7), drawn(8))


@pytest.mark.parametrize("layout", ["mar", "pocket_tts"])
def test_no_rows(layout):
    state, _, _ = setup(layout)
    head = DiffusionHead.from_state_dict(
        {"flow_net." + n: t for n, t in state.items()} if "pocket" in layout else state
    )
    empty = head.sample(torch.zeros(0, 7), solver=SOLVERS[layout][0]())
    assert empty.shape == (0, CHANNELS)
    assert head(
        torch.zeros(0, CHANNELS), torch.zeros(0, 2) if "pocket" in layout else 1.0, torch.zeros(0, 7)
    ).shape == (
        0,
        head.spec.out_channels,
    )


def test_inputs_are_not_changed_and_gradients_do_not_matter():
    state, x, conditions = setup("mar", ways=2)
    head = DiffusionHead.from_state_dict({n: torch.nn.Parameter(t) for n, t in state.items()})
    conditions.requires_grad_()
    before, kept = x.clone(), conditions.detach().clone()
    token = head.sample(
        conditions[0], solver=respaced_ddpm(alphas_cumprod("cosine"), 3), null_cond=conditions[1], guidance_scale=2.0,
        noise=x,
    )  # fmt: skip
    assert not token.requires_grad
    assert torch.equal(x, before) and torch.equal(conditions.detach(), kept)
    assert not head(x, 1.0, conditions[0]).requires_grad


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_head_owns_its_weights(layout):
    state, x, conditions = setup(layout)
    head = DiffusionHead.from_state_dict(state, family_of(layout))
    table = SOLVERS[layout][0]()

    def sample():
        again = SolverTable(table.rows, table.timesteps, "a new object, prepared anew")
        return head.sample(conditions[0], solver=again, noise=x, step_noise=x.expand(len(table.rows), -1, -1))

    before = sample()
    for tensor in state.values():
        tensor.zero_()
    assert torch.equal(before, sample())


@pytest.mark.parametrize("layout", ["latentlm", "mar", "ming"])
def test_int8(layout):
    state, x, conditions = setup(layout, hidden=64, width=96, batch=16)
    up = next(n for n in state if n.endswith(("mlp.fc1.weight", "blocks.0.mlp.0.weight", "mlp.w12.weight")))
    state[up][3] = 0.0  # a row of zeros has no scale of its own
    head = DiffusionHead.from_state_dict(state, dtype=torch.float32)
    small = head.quantize_int8()
    assert small.weights.up_weight.dtype == small.weights.down_weight.dtype == torch.int8
    assert small.weights.dtype == torch.float32
    for name in ("up", "down"):
        q, scale = getattr(small.weights, name + "_weight"), getattr(small.weights, name + "_scale")
        w = getattr(head.weights, name + "_weight")
        # Half a step at most, and the largest of a row is met.
        assert bool(((q * scale[..., None] - w).abs() <= scale[..., None] * 0.50001).all())
        rows = w.abs().amax(-1) > 0
        assert bool((q.abs().amax(-1)[rows] == 127).all()) and bool((q[~rows] == 0).all())
        assert bool((scale > 0).all())
    got, want = small(x.float(), 300.0, conditions[0]), head(x.float(), 300.0, conditions[0])
    assert 0 < relative(got, want) < 0.02
    with pytest.raises(ValueError, match="quantize_int8: expected weights of floating point, got int8"):
        small.quantize_int8()


def test_tables_are_prepared_once(monkeypatch):
    state, x, conditions = setup("mar")
    head = DiffusionHead.from_state_dict(state)
    table, calls = flow_euler_up(2), itertools.count()
    original = DiffusionHead.time_embedding
    monkeypatch.setattr(
        DiffusionHead, "time_embedding", lambda *args, **kwargs: next(calls) * 0 + original(*args, **kwargs)
    )
    for _ in range(3):
        head.sample(conditions[0], solver=table, noise=x)
    assert next(calls) == 1
