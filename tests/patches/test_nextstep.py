"""fastlatent.patches.nextstep: the patched image head against doubles of its three releases."""

import copy

import numpy as np
import pytest
import torch
import toy_mar
import toy_nextstep
from torch import nn
from toy_mar import error

from fastlatent.patches.patch import patch

RELEASES = list(toy_nextstep.HEADS)


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def make(release, dtype=torch.float64, **sizes):
    model = toy_mar.randomise(toy_nextstep.NextStep(release, **sizes))
    return toy_mar.widen(model) if dtype == torch.float64 else model.to(dtype)


def run(model, c, seed=0, **kwargs):
    torch.manual_seed(seed)
    out = model.image_head.sample(c=c, **kwargs)
    return out, torch.rand(())  # the generator's state after it: as many draws as published


def conditions(rows, dtype=torch.float64):
    return torch.randn(rows, 24, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def second(release):
    return "cfg2" if release == "1" else "cfg_img"


# One scale above 1 adds one branch, whichever it is; with the second alone the first still weighs.
@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("cfg, cfg_img", [(1.0, 1.0), (7.5, 1.0), (7.5, 2.0), (0.6, 2.0), (0.5, 0.5)])
@pytest.mark.parametrize("options", [{}, {"num_sampling_steps": 2, "timesteps_shift": 3.2}])  # 2: the fewest of 1
def test_float64_equals_the_original(release, cfg, cfg_img, options):
    model, c = make(release), conditions(12)
    options = {"cfg": cfg, second(release): cfg_img, **options}
    theirs, after = run(model, c, **options)
    with patch(model) as handle:
        ours, ours_after = run(model, c, **options)
    assert (handle.family, handle.replaced) == ("nextstep", ["image_head.sample"])
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype == torch.float64
    assert error(ours, theirs) < 1e-9
    assert after == ours_after


@pytest.mark.parametrize(
    "release, options",
    [
        ("1", {"last_step_size": 0.1, "noise_repeat": 3}),
        ("1.1", {"last_step_size": 0.1, "noise_repeat": 2, "num_sampling_steps": 1}),
        ("training", {"sde_type": "cps", "noise_level": 0.5}),
        ("training", {"sde_type": "ode", "timesteps_shift": 2.0}),
        ("training", {"noise_level": 0.3, "num_sampling_steps": 1, "sde_solver": True}),
        ("training", {"noise": torch.full((6, 8), 0.25, dtype=torch.float64)}),
    ],
)
def test_all_arguments(release, options):
    model, c = make(release), conditions(6)
    theirs, after = run(model, c, **options)
    with patch(model):
        ours, ours_after = run(model, c, **options)
    assert error(ours, theirs) < 1e-9 and after == ours_after


@pytest.mark.parametrize("release", RELEASES)
def test_published_float32(release):
    """float32 times and coefficients: off by 6e-8 each; the state is float32."""
    model, c = make(release, torch.float32), conditions(4, torch.float32)
    theirs, _ = run(model, c, cfg=3.0)
    with patch(model):
        ours, _ = run(model, c, cfg=3.0)
    assert ours.dtype == theirs.dtype == torch.float32 and error(ours, theirs) < 1e-5


# Few rows and many: two paths of the op. noise_repeat 2: with 1, all tokens share their noise.
@pytest.mark.parametrize("rows", [4, 36])
@pytest.mark.parametrize("release", ["1", "1.1"])  # their noise is float32 in any dtype
def test_bfloat16_error_is_the_originals(release, rows):
    model, c = make(release, torch.bfloat16, dim=64), conditions(rows, torch.bfloat16)
    wide, ours, theirs = toy_mar.widen(model), [], []
    for seed in range(4):
        options = {"cfg": 4.0, "noise_repeat": 2, "num_sampling_steps": 20, "seed": seed}
        exact, _ = run(wide, c.double(), **options)
        plain, _ = run(model, c, **options)
        with patch(model):
            fused, _ = run(model, c, **options)
        assert fused.dtype == plain.dtype == torch.bfloat16
        ours.append(error(fused, exact))
        theirs.append(error(plain, exact))
    assert np.mean(ours) <= 1.5 * np.mean(theirs), (ours, theirs)
    assert np.mean(theirs) > 1e-3  # bfloat16 it was


def test_autocast_folds_to_its_dtype():
    model, c = make("1", torch.float32, dim=64), conditions(8, torch.float32)
    exact, _ = run(toy_mar.widen(model), c.double(), cfg=3.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        theirs, _ = run(model, c, cfg=3.0)
        with patch(model):
            ours, _ = run(model, c, cfg=3.0)
    assert ours.dtype == theirs.dtype == torch.float32
    assert 1e-3 < error(ours, exact) <= 1.5 * error(theirs, exact)


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("use_norm", [False, True])
def test_a_generation_script_gives_the_same_tokens(release, dtype, use_norm):
    model = make(release, dtype)

    def script():
        torch.manual_seed(42)
        ids = torch.tensor([[1, 2, 3], [4, 5, 6], [8, 2, 3], [8, 5, 6], [8, 8, 8], [8, 8, 8]])
        return model.decoding(
            ids, max_new_len=4, num_images_per_caption=2, use_norm=use_norm, cfg=7.5, cfg_img=2.0,
            cfg_schedule="linear", timesteps_shift=3.2, num_sampling_steps=6,
        )  # fmt: skip

    theirs = script()
    with patch(model):
        assert error(script(), theirs) < (1e-9 if dtype == torch.float64 else 1e-3)
    assert torch.equal(script(), theirs) and "sample" not in vars(model.image_head)


def test_torch_compile_stays_out_of_the_way(monkeypatch):
    manager = toy_nextstep.compile_manager
    model, c = make("1"), conditions(4)
    monkeypatch.setattr(manager, "compile_enabled", True)
    monkeypatch.setattr(manager, "calls", 0)
    with patch(model):
        run(model, c, cfg=2.0)
        assert manager.calls == 0
    run(model, c, cfg=2.0)
    assert manager.calls > 1


def test_weights_are_followed():
    model, c = make("1.1"), conditions(4)
    with patch(model):
        first, _ = run(model, c)
        with torch.no_grad():
            model.image_head.net.cond_embed.weight.mul_(1.5)
        second, _ = run(model, c)
    theirs, _ = run(model, c)
    assert error(second, first) > 1e-3 and error(second, theirs) < 1e-9


class SwiGLU(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.w12, self.w3 = nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)


def gelu(head):
    head.net.time_embed.mlp[1] = nn.GELU()


def extra(head):
    head.net.res_blocks[1].scale = nn.Parameter(torch.ones(1))


def predicts_variance(head):
    head.net.final_layer.linear = nn.Linear(32, 16)


def swiglu(head):
    head.net.res_blocks[0].mlp = SwiGLU(32)


def time_times_1000(head):
    plain = head.net.time_embed.forward
    head.net.time_embed.forward = lambda t: plain(1000 * t)


def other_arguments(head):
    head.sample = lambda c, cfg=1.0, steps=20: c


def other_loop(head):
    class Fork(type(head)):
        def sample(self, c, cfg=1.0, cfg2=1.0, timesteps_shift=1.0, num_sampling_steps=20, last_step_size=0.04,
                   noise_repeat=1):  # fmt: skip
            return super().sample(c, cfg, cfg2, 1.1 * timesteps_shift, num_sampling_steps, last_step_size, noise_repeat)

    head.__class__ = Fork


@pytest.mark.parametrize(
    "spoil, message",
    [
        (gelu, "net.time_embed.mlp.1 to be SiLU, got GELU"),
        (extra, "res_blocks.1.scale"),
        (predicts_variance, "with 8 rows"),
        (swiglu, "net.res_blocks.0.mlp.1 to be SiLU, got NoneType"),
        (time_times_1000, "expected net to compute what the published one does"),
        (other_arguments, r"got \(c, cfg, steps\)"),
        (other_loop, "expected Fork.sample to compute what the published one does"),
    ],
)
def test_look_alikes_are_refused_and_nothing_is_replaced(spoil, message):
    model = make("1", torch.float32)
    spoil(model.image_head)
    before = [dict(vars(module)) for module in model.modules()]
    with pytest.raises(ValueError, match=message):
        patch(model, family="nextstep")
    assert [dict(vars(module)) for module in model.modules()] == before


def test_bad_calls_say_what_was_expected():
    model, c = make("1"), conditions(6)
    with patch(model):
        sample = model.image_head.sample
        with pytest.raises(ValueError, match="2 branches times B"):
            sample(c[:5], cfg=2.0)
        with pytest.raises(ValueError, match="noise_repeat to divide 6 tokens, got 4"):
            sample(c, noise_repeat=4)
        with pytest.raises(ValueError, match="num_sampling_steps >= 2"):
            sample(c, num_sampling_steps=1)
    with pytest.raises(ValueError, match="expected a module image_head with net and sample, got none"):
        patch(nn.Linear(2, 2), family="nextstep")


def test_an_untrained_head_is_patched():
    """Its modulations and output start from zero; so does what the proof would compare."""
    model, c = make("1"), conditions(4)
    final = copy.deepcopy(model.image_head.net.final_layer)
    for tensor in (final.linear.weight, final.linear.bias):
        tensor.zero_()
    model.image_head.net.final_layer = final
    theirs, _ = run(model, c)
    with patch(model):
        assert error(run(model, c)[0], theirs) < 1e-9
