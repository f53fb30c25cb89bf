"""Sizes, keys and traps of the published model."""

import itertools
import math

import pytest
import torch

from fastlatent.heads.latentlm import timestep_sinusoid
from fastlatent.models.transformer import SIZES, Transformer, TransformerConfig, published_size, rope_table

DATA = {"in_channels": 16, "input_size": 16, "num_classes": 1000}
# Millions of weights of the whole model and of its head, and the FFN width, as published for 16 channels.
PUBLISHED = {
    "Transformer-Base": (143.2, 28.5, 3072),
    "Transformer-Medium": (455.4, 50.6, 4096),
    "Transformer-Large": (1023.6, 113.7, 6144),
    "Transformer-XL": (1818.8, 201.9, 8192),
    "Transformer-3B": (3679.9, 315.3, 10240),
    "Transformer-7B": (9417, 806, 16384),
    "Transformer-13B": (18068, 1260, 20480),
    "Transformer-B": (212.2, 40.9, 2048),
    "Transformer-L": (495.2, 94.7, 2688),
    "Transformer-H": (1006.7, 220.6, 3392),
}
HEAD = ("noisy_x_embedder.", "t_embedder.", "diffusion_blocks.", "final_layer.")


@pytest.mark.parametrize("name", SIZES)
def test_published_sizes(name):
    total, head, width = PUBLISHED[name]
    config = TransformerConfig(**published_size(name), **DATA)
    with torch.device("meta"):
        weights = dict(Transformer(config).named_parameters())
    assert config.ffn_width == width
    assert sum(p.numel() for p in weights.values()) / 1e6 == pytest.approx(total, rel=5e-4)
    assert sum(p.numel() for n, p in weights.items() if n.startswith(HEAD)) / 1e6 == pytest.approx(head, rel=5e-3)


def test_published_keys_in_their_order():
    # The order is that of the unnamed EMA list in published checkpoints.
    config = TransformerConfig(
        hidden_size=64, depth=2, num_heads=2, num_kv_heads=1, mlp_ratio=3, diffusion_depth=2, **DATA
    )
    block = ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.gate", "mlp.fc2"]
    diffusion = ["mlp.fc1", "mlp.gate", "mlp.fc2", "adaLN_modulation.1"]
    want = [
        "x_embedder.proj.weight", "x_embedder.proj.bias", "noisy_x_embedder.proj.weight", "noisy_x_embedder.proj.bias",
        "t_embedder.mlp.0.weight", "t_embedder.mlp.2.weight", "y_embedder.embedding_table.weight",
        *(f"blocks.{i}.{part}.weight" for i, part in itertools.product(range(2), block)),
        *(f"diffusion_blocks.{i}.{part}.weight" for i, part in itertools.product(range(2), diffusion)),
        "condition_layer.linear.weight", "final_layer.linear.weight", "final_layer.adaLN_modulation.1.weight",
    ]  # fmt: skip
    state = Transformer(config).state_dict()
    assert list(state) == want
    assert state["x_embedder.proj.weight"].shape == (64, 16, 1, 1)
    assert state["blocks.0.attn.qkv.weight"].shape == ((2 + 2 * 1) * 32, 64)
    assert state["y_embedder.embedding_table.weight"].shape == (1001, 64)


def test_initial_weights():
    model = Transformer(TransformerConfig(**{**published_size("Transformer-Base"), "depth": 1}, **DATA))
    model.initialize()
    zero = [name for name, p in model.named_parameters() if not p.any()]
    assert zero == ["x_embedder.proj.bias"] + [f"diffusion_blocks.{i}.adaLN_modulation.1.weight" for i in range(3)] + [
        "final_layer.linear.weight", "final_layer.adaLN_modulation.1.weight",
    ]  # fmt: skip
    assert float(model.y_embedder.embedding_table.weight.detach().std()) == pytest.approx(0.02, rel=0.02)
    # With a zero output layer the untrained model predicts zero.
    x, t = torch.randn(2, 3, 16), torch.full((2, 3), 500)
    assert not model.denoise(x, t, torch.randn(2, 3, 768)).any()


def test_rope_includes_both_endpoints():
    cos, sin = rope_table(256, 8)
    frequencies = torch.atan2(sin[1], cos[1])
    assert torch.allclose(frequencies, torch.tensor([1, 10000 ** -(1 / 3), 10000 ** -(2 / 3), 1e-4]).double())
    assert cos.dtype == torch.float64


def test_sinusoid_is_cosine_first():
    got = timestep_sinusoid(torch.tensor([0.0, 999.0], dtype=torch.float64))
    assert torch.equal(got[0], torch.cat([torch.ones(128), torch.zeros(128)]).double())
    assert float(got[1, 1]) == pytest.approx(math.cos(999 * 10000 ** (-1 / 128)), abs=1e-12)
    assert float(got[1, 129]) == pytest.approx(math.sin(999 * 10000 ** (-1 / 128)), abs=1e-12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 63}, "hidden_size 63"),
        ({"num_kv_heads": 3}, "multiple of num_kv_heads"),
        ({"depth": 0}, "depth to be a positive number"),
        ({"depth": 1.5}, "depth to be a whole number"),
        ({"in_channels": True}, "in_channels to be a positive number"),
        ({"mlp_ratio": 0.1}, "FFN of width 0"),
    ],
)
def test_impossible_sizes(change, message):
    sizes = dict(hidden_size=64, depth=1, num_heads=2, num_kv_heads=2, mlp_ratio=3, diffusion_depth=1, **DATA)
    with pytest.raises(ValueError, match=message):
        TransformerConfig(**{**sizes, **change})


def test_unknown_size_lists_what_there_is():
    with pytest.raises(ValueError, match="Transformer-Medium"):
        published_size("Transformer-Huge")


def test_recomputed_activations_change_nothing():
    sizes = dict(hidden_size=64, depth=2, num_heads=2, num_kv_heads=1, mlp_ratio=3, diffusion_depth=2, **DATA)
    torch.manual_seed(0)
    model = Transformer(TransformerConfig(**sizes | {"input_size": 3})).double()
    latents, labels = torch.randn(2, 9, 16).double(), torch.tensor([3, 1000])
    noisy, t = torch.randn(2, 4, 9, 16).double(), torch.randint(1000, (2, 4, 9))
    found, calls = [], []
    handles = [b.mlp.fc1.register_forward_hook(lambda *_: calls.append(1)) for b in model.blocks]
    for again in (False, True):
        model.gradient_checkpointing = again
        model.zero_grad()
        loss = model.denoise(noisy, t, model.condition(latents, labels)[:, None]).square().mean()
        loss.backward()
        found.append([loss.detach(), *(p.grad.clone() for p in model.parameters())])
        # Every block once, and once more in the backward pass.
        assert len(calls) == (2 if not again else 2 + 4)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    for handle in handles:
        handle.remove()
