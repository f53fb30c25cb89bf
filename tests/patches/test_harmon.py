"""fastlatent.patches.harmon: the patched DiffLoss of a double of Harmon, told apart from MAR by its path."""

import numpy as np
import pytest
import torch
import toy_mar
from torch import nn
from toy_mar import error, noise_as_float32

from fastlatent.patches.patch import patch


def make(dtype=torch.float32, **kwargs):
    model = toy_mar.randomise(toy_mar.Harmon(**kwargs))
    return toy_mar.widen(model) if dtype == torch.float64 else model.to(dtype)


def script(model, cfg=3.0, schedule="constant", temperature=1.0, seed=4):
    """Two prompts, then as many null prompts, as the project's text-to-image script makes them."""
    np.random.seed(seed)
    torch.manual_seed(seed)
    prompts = torch.tensor([[1, 2, 3], [4, 5, 0], [9, 0, 0], [9, 0, 0]])
    if cfg == 1.0:
        prompts = prompts[:2]
    return model.sample(
        input_ids=prompts, attention_mask=prompts > 0, num_iter=5, cfg=cfg, cfg_schedule=schedule,
        temperature=temperature, progress=False,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("cfg, schedule", [(3.0, "constant"), (3.0, "linear"), (1.0, "constant")])
def test_a_generation_script_gives_the_same_tokens(dtype, cfg, schedule):
    model = make(dtype)
    theirs = script(model, cfg, schedule)
    with patch(model) as handle:
        assert (handle.family, handle.replaced) == ("harmon", ["mar.diffloss.sample"])
        ours = script(model, cfg, schedule)
    assert ours.dtype == theirs.dtype == dtype
    assert error(ours, theirs) < (1e-9 if dtype == torch.float64 else 1e-3)
    assert torch.equal(script(model, cfg, schedule), theirs)


def test_bfloat16_tokens_are_as_near_to_float64_as_the_originals(monkeypatch):
    """Harmon runs in bfloat16; a whole image, so that errors of one token reach the next."""
    noise_as_float32(monkeypatch)
    model = make(torch.bfloat16, diffloss_w=64, num_sampling_steps="20")
    wide, ours, theirs = toy_mar.widen(model), [], []
    for seed in range(3):
        exact, plain = script(wide, seed=seed), script(model, seed=seed)
        with patch(model):
            fused = script(model, seed=seed)
        assert fused.dtype == plain.dtype == torch.bfloat16
        ours.append(error(fused, exact))
        theirs.append(error(plain, exact))
    assert np.mean(ours) <= 1.5 * np.mean(theirs), (ours, theirs)


def test_deeper_wrappers_are_found_and_weights_followed():
    model = make(torch.float64)
    wrapper = nn.ModuleDict({"module": nn.Sequential(model)})  # as two launchers wrap
    theirs = script(model)
    with patch(wrapper) as handle:
        assert handle.replaced == ["module.0.mar.diffloss.sample"]
        assert error(script(model), theirs) < 1e-9
        with torch.no_grad():
            model.mar.diffloss.net.final_layer.linear.bias.add_(0.5)
        changed = script(model)
    assert error(changed, theirs) > 1e-3 and error(changed, script(model)) < 1e-9


def test_families_are_told_apart_by_path():
    model = make()
    with pytest.raises(ValueError, match="not called mar.diffloss, got none"):
        patch(model, family="mar")
    with patch(model.mar) as handle:
        assert (handle.family, handle.replaced) == ("mar", ["diffloss.sample"])
    with pytest.raises(ValueError, match="expected a module mar.diffloss with net, gen_diffusion and sample, got none"):
        patch(model.mar, family="harmon")


def test_look_alikes_are_refused_by_name():
    model = make()
    model.mar.diffloss.net.res_blocks[0].adaLN_modulation[0] = nn.GELU()
    with pytest.raises(ValueError, match="harmon: expected net.res_blocks.0.adaLN_modulation.0 to be SiLU, got GELU"):
        patch(model)
    model = make()
    model.mar.diffloss.net.extra = nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="extra"):
        patch(model)
    assert "sample" not in vars(model.mar.diffloss)
