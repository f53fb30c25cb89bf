"""fastlatent.patches.mar: the patched DiffLoss against a double of MAR's."""

import copy

import numpy as np
import pytest
import torch
import toy_mar
from torch import nn
from toy_mar import error, noise_as_float32

from fastlatent.heads.diffusion_head import DiffusionHead
from fastlatent.patches.patch import patch

# The published tables are float32: 8 steps of coefficients off by up to 6e-8, and sinusoids of t < 1000 by 3e-5.
FLOAT32_TABLES = 1e-4


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def make_loss(steps="8", **sizes):
    sizes = {"target_channels": 5, "z_channels": 12, "depth": 3, "width": 32, **sizes}
    return toy_mar.randomise(toy_mar.DiffLoss(num_sampling_steps=steps, **sizes))


def run(loss, z, *args, seed=0, **kwargs):
    torch.manual_seed(seed)
    out = loss.sample(z, *args, **kwargs)
    return out, torch.rand(())  # the generator's state after it: as many draws as published


def conditions(rows, dtype=torch.float64):
    return torch.randn(rows, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


# 6 rows are not a multiple of 16 elements, where torch's CPU generator draws otherwise; "100" is published;
# "4,3" are two sections; "2" is the shortest that the published code can do.
@pytest.mark.parametrize("steps", ["8", "100", "4,3", "2"])
@pytest.mark.parametrize("cfg", [1.0, 2.5, 0.5, 0.0])
def test_float64_equals_the_original(steps, cfg):
    loss, z = toy_mar.widen(make_loss(steps)), conditions(6)
    theirs, after = run(loss, z, cfg=cfg)
    with patch(loss) as handle:
        ours, ours_after = run(loss, z, cfg=cfg)
    rows = 6 if cfg == 1.0 else 3  # the null branch's rows are discarded by every caller
    assert (handle.family, handle.replaced) == ("mar", ["sample"])
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    assert error(ours[:rows], theirs[:rows]) < 1e-9
    assert cfg == 1.0 or torch.equal(ours[rows:], ours[:rows])
    assert after == ours_after


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_temperature_and_published_float32_tables(temperature):
    loss, z = make_loss(), conditions(4, torch.float32)
    theirs, after = run(loss, z, temperature, 3.0)
    wide, _ = run(toy_mar.widen(loss), z.double(), temperature, 3.0) if temperature == 0 else (theirs, None)
    with patch(loss):
        ours, ours_after = run(loss, z, temperature, 3.0)
    assert ours.dtype == theirs.dtype == torch.float32
    assert error(ours[:2], theirs[:2]) < FLOAT32_TABLES and error(ours[:2], wide[:2]) < FLOAT32_TABLES
    assert after == ours_after


def test_steps_temperature_and_guidance_change_from_call_to_call():
    loss, z = toy_mar.widen(make_loss()), conditions(4)
    processes = [toy_mar.create_diffusion(steps) for steps in ("8", "5", "8")]
    for process in processes:
        process.tables = torch.float64

    def calls():
        found = []
        for process, temperature, cfg in zip(processes, (1.0, 0.5, 0.9), (1.0, 4.0, torch.tensor([2.0])), strict=True):
            loss.gen_diffusion = process
            found.append(run(loss, z, temperature, cfg)[0][:2])
        return torch.cat(found)

    theirs = calls()
    with patch(loss):
        assert error(calls(), theirs) < 1e-9
    assert torch.equal(calls(), theirs)  # undone


def test_weights_are_followed():
    loss, z = toy_mar.widen(make_loss()), conditions(4)
    with patch(loss):
        first, _ = run(loss, z, cfg=2.0)
        with torch.no_grad():
            loss.net.res_blocks[1].mlp[0].weight.mul_(1.5)
        second, _ = run(loss, z, cfg=2.0)
        loss.load_state_dict(toy_mar.randomise(copy.deepcopy(loss), seed=5).state_dict())
        loss.net = copy.deepcopy(loss.net)  # as EMA weights are put in its place
        third, _ = run(loss, z, cfg=2.0)
    theirs, _ = run(loss, z, cfg=2.0)
    assert error(second, first) > 1e-3 and error(third[:2], theirs[:2]) < 1e-9
    assert error(third, second) > 1e-3


# Error of patched / error of the original, both against float64 with the same rounded weights and the same noise.
@pytest.mark.parametrize("rows", [4, 48])  # few rows and many: two paths of the op
def test_bfloat16_error_is_the_originals(rows, monkeypatch):
    noise_as_float32(monkeypatch)
    loss = make_loss("20", width=64).bfloat16()
    wide, z = toy_mar.widen(loss), conditions(rows, torch.bfloat16)
    ours, theirs = [], []
    for seed in range(4):
        exact, _ = run(wide, z.double(), cfg=3.0, seed=seed)
        plain, _ = run(loss, z, cfg=3.0, seed=seed)
        with patch(loss):
            fused, _ = run(loss, z, cfg=3.0, seed=seed)
        assert fused.dtype == plain.dtype == torch.float32
        half = rows // 2
        ours.append(error(fused[:half], exact[:half]))
        theirs.append(error(plain[:half], exact[:half]))
    assert np.mean(ours) <= 1.5 * np.mean(theirs), (ours, theirs)
    assert np.mean(theirs) > 1e-3  # bfloat16 it was


def test_autocast_folds_the_weights_to_its_dtype(monkeypatch):
    noise_as_float32(monkeypatch)
    loss, z, used = make_loss("20", width=64), conditions(8, torch.float32), []
    plain_sample = DiffusionHead.sample
    monkeypatch.setattr(
        DiffusionHead, "sample", lambda self, *a, **k: used.append(self.weights.dtype) or plain_sample(self, *a, **k)
    )
    exact, _ = run(toy_mar.widen(loss), z.double(), cfg=3.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        theirs, _ = run(loss, z, cfg=3.0)
    with patch(loss):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            ours, _ = run(loss, z, cfg=3.0)
            with torch.no_grad():
                loss.net.final_layer.linear.weight.mul_(2.0)
            changed, _ = run(loss, z, cfg=3.0)
        run(loss, z, cfg=3.0)
    assert used == [torch.bfloat16, torch.bfloat16, torch.float32]
    assert ours.dtype == theirs.dtype == torch.float32
    assert error(ours[:4], exact[:4]) <= 1.5 * error(theirs[:4], exact[:4])
    assert error(changed, ours) > 1e-3


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("cfg, schedule", [(2.9, "linear"), (3.0, "constant"), (1.0, "linear")])
def test_a_generation_script_gives_the_same_tokens(dtype, cfg, schedule):
    model = toy_mar.randomise(toy_mar.MAR())
    model = toy_mar.widen(model) if dtype == torch.float64 else model

    def script():
        np.random.seed(3)
        torch.manual_seed(3)
        labels = torch.tensor([1, 5, 6])
        return model.sample_tokens(
            bsz=3, num_iter=6, cfg=cfg, cfg_schedule=schedule, labels=labels, temperature=0.95, progress=False
        )

    theirs, names = script(), list(model.state_dict())
    with patch(model) as handle:
        assert handle.replaced == ["diffloss.sample"] and list(model.state_dict()) == names
        assert error(script(), theirs) < (1e-9 if dtype == torch.float64 else 1e-3)
    assert torch.equal(script(), theirs) and "sample" not in vars(model.diffloss)


class SwiGLU(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.w12, self.w3 = nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)


def gelu(loss):
    loss.net.res_blocks[2].mlp[1] = nn.GELU()


def extra(loss):
    loss.net.res_blocks[0].gamma = nn.Parameter(torch.ones(32))


def no_variance(loss):
    loss.net.final_layer.linear = nn.Linear(32, 5)


def swiglu(loss):
    for block in loss.net.res_blocks:
        block.mlp = SwiGLU(32)


def other_eps(loss):
    loss.net.res_blocks[1].in_ln.eps = 1e-5


def rms(loss):
    loss.net.final_layer.norm_final = nn.RMSNorm(32)


def fixed_variance(loss):
    loss.gen_diffusion = toy_mar.create_diffusion("8", learn_sigma=False)


def predicts_data(loss):
    loss.gen_diffusion = toy_mar.create_diffusion("8", predict_xstart=True)


def other_forward(loss):
    plain = loss.net.time_embed.forward
    first = loss.net.time_embed.mlp[0]
    loss.net.time_embed.forward = lambda t: plain(t) + first(torch.zeros(len(t), 256)).mean()


def other_arguments(loss):
    loss.sample = lambda z, temperature=1.0, cfg=1.0, steps=50: z


def other_loop(loss):
    class Fork(toy_mar.DiffLoss):
        def sample(self, z, temperature=1.0, cfg=1.0):
            return super().sample(z, 0.9 * temperature, cfg)

    loss.__class__ = Fork


def hooked(loss):
    loss.net.res_blocks[0].mlp[0].register_forward_hook(lambda module, inputs, output: 1.5 * output)


class Quantised(torch.Tensor):
    """As torchao's: a float tensor by its dtype, int8 by what it holds."""


def quantised(loss):
    linear = loss.net.res_blocks[0].mlp[2]
    linear.weight = nn.Parameter(linear.weight.data.as_subclass(Quantised), requires_grad=False)


def adapted(loss):
    """As peft's LoRA."""
    block, wrapper = loss.net.res_blocks[0], nn.Module()
    wrapper.base_layer, wrapper.lora_A = block.mlp[2], nn.Linear(32, 2)
    block.mlp[2] = wrapper


@pytest.mark.parametrize(
    "spoil, message",
    [
        (gelu, "net.res_blocks.2.mlp.1 to be SiLU, got GELU"),
        (extra, "res_blocks.0.gamma"),
        (no_variance, "10 rows"),
        (swiglu, "net.res_blocks.0.mlp.1 to be SiLU, got NoneType"),
        (other_eps, "net.res_blocks.1.in_ln to be an affine LayerNorm with eps 1e-06"),
        (rms, "net.final_layer.norm_final to be a plain LayerNorm"),
        (fixed_variance, "model_var_type LEARNED_RANGE, got ModelVarType.FIXED_LARGE"),
        (predicts_data, "model_mean_type EPSILON, got ModelMeanType.START_X"),
        (other_forward, "expected net to compute what the published one does"),
        (other_arguments, r"sample\(z, temperature, cfg\), got \(z, temperature, cfg, steps\)"),
        (other_loop, "expected Fork.sample to compute what the published one does"),
        (hooked, "without forward hooks.*got one on res_blocks.0.mlp.0"),
        (quantised, "plain weights, got Quantised as res_blocks.0.mlp.2.weight"),
        (adapted, "res_blocks.0.mlp.2.(base_layer|lora_A)"),
    ],
)
def test_look_alikes_are_refused_and_nothing_is_replaced(spoil, message):
    model = toy_mar.randomise(toy_mar.MAR())
    spoil(model.diffloss)
    before = [dict(vars(module)) for module in model.modules()]
    with pytest.raises(ValueError, match=message):
        patch(model, family="mar")
    assert [dict(vars(module)) for module in model.modules()] == before


def test_a_process_that_is_exchanged_for_another_kind_is_refused():
    loss, z = make_loss(), conditions(4, torch.float32)
    with patch(loss):
        fixed_variance(loss)
        with pytest.raises(ValueError, match="LEARNED_RANGE"):
            loss.sample(z)
        loss.gen_diffusion = toy_mar.create_diffusion("8")
        with pytest.raises(ValueError, match="conditional and null rows, got 3"):
            loss.sample(z[:3], cfg=2.0)


@pytest.mark.parametrize(
    "spoil, message", [(hooked, "forward hooks"), (quantised, "Quantised"), (adapted, "base_layer|lora_A")]
)
def test_what_is_done_to_a_patched_head_is_not_passed_over(spoil, message):
    loss, z = make_loss(), conditions(4, torch.float32)
    with patch(loss):
        spoil(loss)
        for _ in range(2):  # and the second time not either
            with pytest.raises(ValueError, match=message):
                loss.sample(z)


def test_a_head_that_is_trained_later_is_proved_then():
    loss, z = make_loss(), conditions(4, torch.float32)
    for parameter in loss.net.final_layer.linear.parameters():
        parameter.zero_()  # as it is initialised: nothing in the head shows
    other_forward(loss)
    with patch(loss):
        toy_mar.randomise(loss)
        with pytest.raises(ValueError, match="expected net to compute what the published one does"):
            loss.sample(z)


def test_compiled_heads_and_models():
    loss, z = make_loss(), conditions(4, torch.float32)
    loss.net = torch.compile(loss.net, backend="eager")
    theirs, _ = run(loss, z, cfg=2.0)
    with patch(torch.compile(loss, backend="eager")) as handle:  # whose methods are those of what it wraps
        assert handle.replaced == ["sample"] and "sample" in vars(loss)
        assert error(run(loss, z, cfg=2.0)[0][:2], theirs[:2]) < FLOAT32_TABLES
    assert "sample" not in vars(loss) and torch.equal(run(loss, z, cfg=2.0)[0], theirs)


def test_what_is_no_mar_is_named():
    with pytest.raises(ValueError, match="gen_diffusion and sample, not called mar.diffloss, got none"):
        patch(nn.Linear(2, 2), family="mar")
    two = nn.ModuleList([toy_mar.MAR(), toy_mar.MAR()])
    with pytest.raises(ValueError, match="got 0.diffloss, 1.diffloss"):
        patch(two, family="mar")
