"""Which kernel attends, and in which dtype."""

import sys
import types

import pytest
import torch

from fastlatent.models import attention
from fastlatent.models.transformer import Block, TransformerConfig

CONFIG = TransformerConfig(
    hidden_size=32, depth=1, num_heads=4, num_kv_heads=2, mlp_ratio=3, diffusion_depth=1, in_channels=2, input_size=3,
    num_classes=3,
)  # fmt: skip


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_attention_is_its_formula(causal, kv_heads):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 5, heads, 8, dtype=torch.float64) for heads in (4, kv_heads, kv_heads))
    want = torch.empty(2, 5, 4, 8, dtype=torch.float64)
    for head in range(4):
        group = head * kv_heads // 4
        for n in range(5):
            seen = n + 1 if causal else 5
            scores = torch.einsum("bd,bmd->bm", q[:, n, head], k[:, :seen, group]) / 8**0.5
            want[:, n, head] = torch.einsum("bm,bmd->bd", scores.softmax(-1), v[:, :seen, group])
    torch.testing.assert_close(attention.attend(q, k, v, causal=causal), want, rtol=1e-12, atol=1e-12)


def test_under_autocast_all_of_attention_is_half(monkeypatch):
    seen = []
    original = attention.attend
    monkeypatch.setattr(
        attention, "attend",
        lambda q, k, v, causal: seen.append((q.dtype, k.dtype, v.dtype)) or original(q, k, v, causal=causal),
    )  # fmt: skip
    x, cos, sin = torch.randn(2, 9, 32), torch.ones(9, 4), torch.zeros(9, 4)
    with torch.autocast("cpu", torch.bfloat16):
        Block(CONFIG)(x, cos, sin)
    assert seen == [(torch.bfloat16,) * 3]


class OnCuda(torch.Tensor):
    """A CPU tensor that says that it is on a GPU."""

    is_cuda = True


@pytest.mark.parametrize(
    ("dtype", "capability", "cuda", "flash"),
    [
        (torch.bfloat16, (8, 0), True, True),
        (torch.float16, (9, 0), True, True),
        (torch.float16, (7, 5), True, False),  # Turing, which flash-attn 2 does not run on
        (torch.float32, (9, 0), True, False),
        (torch.bfloat16, (9, 0), False, False),
    ],
)
def testflash_attention_where_it_can(monkeypatch, dtype, capability, cuda, flash):
    calls = []
    fake = types.ModuleType("flash_attn")
    fake.flash_attn_func = lambda q, k, v, causal: calls.append((q.shape, k.shape, causal)) or q
    monkeypatch.setitem(sys.modules, "flash_attn", fake)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    attention.flash_attention.cache_clear()
    q, k = (torch.zeros(1, 3, heads, 8, dtype=dtype) for heads in (4, 2))
    if cuda:
        q, k = q.as_subclass(OnCuda), k.as_subclass(OnCuda)
    attention.attend(q, k, k, causal=True)
    attention.flash_attention.cache_clear()
    assert calls == ([((1, 3, 4, 8), (1, 3, 2, 8), True)] if flash else [])
