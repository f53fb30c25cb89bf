"""The README's section "In other projects": every example, as it stands there, against what it replaces."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import DPMSolverMultistepScheduler
from torch import Tensor, nn

from fastlatent import _native, ops

README = Path(__file__).parents[1] / "README.md"
TITLE = "## In other projects\n"
MAX_LINES = 12


def section() -> str:
    text = README.read_text()
    assert TITLE in text, f"{README} has no section {TITLE.strip()!r}"
    return text.split(TITLE)[1].split("\n## ")[0]


def examples() -> list[str]:
    return re.findall(r"```python\n(.*?)```", section(), re.DOTALL)


def run(mark: str, names: dict) -> dict:
    """The names after the one example that holds `mark` has run with these."""
    [code] = [code for code in examples() if mark in code]
    exec(code, names)
    return names


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_every_example_is_short_and_has_its_test():
    assert len(examples()) == 7
    for code in examples():
        written = [line for line in code.splitlines() if line and not line.startswith(("import ", "from "))]
        assert len(written) <= MAX_LINES, code


class OwnHead(nn.Module):
    """Somebody's diffusion head, as they wrote it."""

    def __init__(self, channels: int = 4, hidden: int = 16, conditions: int = 6) -> None:
        super().__init__()
        self.token, self.context = nn.Linear(channels, hidden), nn.Linear(conditions, hidden)
        self.time_embed = nn.Module()
        self.time_embed.mlp = nn.Sequential(nn.Linear(256, hidden), nn.SiLU(), nn.Linear(hidden, hidden))
        self.blocks = nn.ModuleList(nn.Module() for _ in range(2))
        for block in self.blocks:
            block.norm = nn.LayerNorm(hidden, eps=1e-6)
            block.mlp = nn.Sequential(nn.Linear(hidden, 20), nn.SiLU(), nn.Linear(20, hidden))
            block.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden, 3 * hidden))
        self.final_layer = nn.Module()
        self.final_layer.linear = nn.Linear(hidden, channels)
        self.final_layer.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden, 2 * hidden))

    def forward(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        angle = t.float() * 10000 ** (-torch.arange(128) / 128)
        y = self.context(condition) + self.time_embed.mlp(torch.cat([angle.cos(), angle.sin()]))
        x = self.token(x)
        for block in self.blocks:
            shift, scale, gate = block.adaLN_modulation(y).chunk(3, -1)
            x = x + gate * block.mlp(block.norm(x) * (1 + scale) + shift)
        shift, scale = self.final_layer.adaLN_modulation(y).chunk(2, -1)
        return self.final_layer.linear(F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift)


def scheduler() -> DPMSolverMultistepScheduler:
    return DPMSolverMultistepScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")


def sampled(model, x: Tensor, given: tuple, scale: float) -> Tensor:
    """The loop that people write with diffusers: guidance, then scheduler.step."""
    stepper = scheduler()
    stepper.set_timesteps(10)
    for t in stepper.timesteps:
        conditional, unconditional = (model(x, t, one) for one in given)
        x = stepper.step(unconditional + scale * (conditional - unconditional), t, x).prev_sample
    return x


@torch.no_grad()
def test_a_head_under_other_names():
    torch.manual_seed(0)
    net, noise, given = OwnHead(), randn(3, 4), (randn(3, 6, seed=1), randn(3, 6, seed=2))
    names = {"net": net, "scheduler": scheduler(), "noise": noise, "condition": given[0], "null_condition": given[1]}
    found = run("from_state_dict", names)["tokens"]
    assert (found - noise).abs().max() > 0.1
    torch.testing.assert_close(found, sampled(net, noise, given, 2.0), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_scheduler_step():
    weight = 0.3 * randn(3, 3)

    def model(x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        return torch.einsum("dc,bchw->bdhw", weight, x) + 0.001 * t.float() + 0.1 * labels[:, None, None, None]

    noise, given = randn(2, 3, 4, 4), (torch.tensor([1, 2]), torch.tensor([0, 0]))
    names = {"model": model, "scheduler": scheduler(), "noise": noise, "labels": given[0], "null_labels": given[1]}
    found = run("solver_step", names)["latents"]
    torch.testing.assert_close(found, sampled(model, noise, given, 3.0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=str)
def test_an_adaptive_norm(dtype, tolerance):
    x, shift, scale = randn(3, 5, 24), randn(3, 24, seed=1).to(dtype), randn(3, 24, seed=2).to(dtype)
    found = run("norm_modulate", {})["modulated_norm"](x, shift, scale)
    plain = F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale.float()[:, None]) + shift.float()[:, None]
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), plain, rtol=tolerance, atol=tolerance)


@torch.no_grad()
def test_a_cache():
    batch, tokens, kv_heads, head_dim = 2, 6, 2, 8
    qkv, hidden = nn.Linear(12, (4 + 2 * kv_heads) * head_dim), randn(batch, tokens, 12)
    names = {"batch": batch, "tokens": tokens, "kv_heads": kv_heads, "head_dim": head_dim, "qkv": qkv, "hidden": hidden}
    found = torch.stack(run("rope_append_kv", names)["outs"], dim=2)  # [B, Hq, N, D]
    q, k, v = qkv(hidden).unflatten(-1, (-1, head_dim)).transpose(1, 2).split([4, kv_heads, kv_heads], dim=1)
    turn = torch.outer(torch.arange(tokens), 10000.0 ** (-torch.arange(0, head_dim, 2) / head_dim))
    q, k = (
        torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * torch.exp(1j * turn)).flatten(
            -2
        )
        for x in (q, k)
    )
    plain = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_norms_of_a_network(monkeypatch):
    calls, call = [], _native.call
    monkeypatch.setattr(_native, "call", lambda *args: calls.append(args[1]) or call(*args))
    block = nn.Sequential(nn.GroupNorm(2, 8), nn.SiLU(), nn.Conv2d(8, 8, 3), nn.GroupNorm(4, 8), nn.SiLU())
    network = nn.Sequential(nn.Conv2d(3, 8, 3), block, nn.GroupNorm(1, 8))  # the last one has no SiLU: it stays
    x, names = randn(2, 3, 9, 9), list(network.state_dict())
    plain = network(x)
    run("group_norm_silu", {"network": network})
    torch.testing.assert_close(network(x), plain, rtol=1e-4, atol=1e-5)
    assert calls == ["group_norm_silu"] * 2
    assert list(network.state_dict()) == names


def test_a_cache_of_mar(tmp_path):
    paths, keys = [tmp_path / f"{i}.JPEG.npz" for i in range(8)], torch.arange(8) * 977
    for i, path in enumerate(paths):
        # No variance to speak of: what comes out is one of the two means.
        parts = [np.concatenate([randn(4, 3, 3, seed=i + 50 * flip), np.full((4, 3, 3), -60.0)]) for flip in (0, 1)]
        np.savez(path, moments=parts[0].astype(np.float32), moments_flip=parts[1].astype(np.float32))
    latents_of = run("sample_posterior", {})["latents_of"]
    found = latents_of(paths, keys, 3)
    both = torch.stack([randn(4, 3, 3, seed=i + 50 * flip) for i in range(8) for flip in (0, 1)]).unflatten(0, (8, 2))
    off = (found[:, None] - 0.2325 * both).abs().flatten(2).amax(-1)
    assert off.min(dim=1).values.max() < 1e-5
    assert len(set(off.argmin(dim=1).tolist())) == 2  # mirrored and not
    # A file's noise does not depend on the batch that it is in.
    assert torch.equal(latents_of(paths[5:], keys[5:], 3), found[5:])

    moments = randn(8, 2, 8, 3, 3)
    for path, pair in zip(paths, moments.numpy(), strict=True):
        np.savez(path, moments=pair[0], moments_flip=pair[1])
    plain = ops.sample_posterior_reference(moments, keys, 0, 3, None, None, None, True, torch.float32)
    torch.testing.assert_close(latents_of(paths, keys, 3), 0.2325 * plain, rtol=1e-4, atol=1e-5)


def test_a_head_in_torch_export():
    h, blocks = 16, 2
    sizes = [(h, 4), (h,), ((3 * blocks + 2) * h, h), ((3 * blocks + 2) * h,), (blocks, 40, h), (blocks, 40),
             (blocks, h, 20), (blocks, h), (4, h), (4,)]  # fmt: skip
    weights = ops.HeadWeights(*(0.3 * randn(*size, seed=i) for i, size in enumerate(sizes)))
    table = 0.5 * randn(3, 16)
    table[:, 2] = torch.inf  # no clipping
    inputs = {"noise": randn(3, 4), "condition": randn(2, 3, h), "guidance": torch.ones(2, 3)}
    names = {"weights": weights, "table": table, "t_embedding": randn(3, h), **inputs}
    run("torch.export", names)
    noise, condition, guidance = randn(5, 4), randn(2, 5, h), torch.ones(2, 5)
    state = torch.cat([noise[None], torch.zeros(3, 5, 4)])
    ops.diffusion_head_sample_reference(state, condition, names["t_embedding"], table, guidance, weights)
    torch.testing.assert_close(names["program"].module()(noise, condition, guidance), state[0], rtol=1e-4, atol=1e-4)
