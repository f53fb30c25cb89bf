"""The DiT: sizes, keys and initial weights as published, and its function against a plain one in float64."""

import dataclasses
import itertools
import json

import plain_dit
import pytest
import torch
from safetensors.torch import save_file

from fastlatent.models.checkpoint import DiTCheckpointConfig, load_checkpoint, read_config, save_checkpoint
from fastlatent.models.dit import DIT_SIZES, DiT, DiTConfig, position_table, published_dit_size

DATA = {"in_channels": 16, "input_size": 16, "num_classes": 1000}
# Millions of weights that learn for 16 channels and patches of 1, and the FFN width, as published.
PUBLISHED = {
    "DiT-Base": (130, 2048),
    "DiT-Medium": (454, 2688),
    "DiT-Large": (1028, 4096),
    "DiT-XL": (1824, 5440),
}
# 3 heads of 8, one of keys and values; FFN width 64; 4 tokens of 2×2×2 numbers.
SIZES = DiTConfig(
    hidden_size=24, depth=2, num_heads=3, num_kv_heads=1, mlp_ratio=4, patch_size=2, in_channels=2, input_size=4,
    num_classes=3,
)  # fmt: skip


def random_dit(sizes=SIZES, seed=0):
    torch.manual_seed(seed)
    model = DiT(sizes).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15)  # zero modulations would hide errors in them
    model.pos_embed.data.copy_(position_table(sizes.input_size // sizes.patch_size, sizes.hidden_size))
    return model


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name):
    total, width = PUBLISHED[name]
    config = DiTConfig(**published_dit_size(name), patch_size=1, **DATA)
    with torch.device("meta"):
        count = sum(p.numel() for p in DiT(config).parameters() if p.requires_grad)
    assert config.ffn_width == width
    assert count / 1e6 == pytest.approx(total, abs=0.5)


def test_published_keys_in_their_order():
    block = ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.gate", "mlp.fc2", "adaLN_modulation.1"]
    want = [
        "pos_embed", "x_embedder.proj.weight", "x_embedder.proj.bias", "t_embedder.mlp.0.weight",
        "t_embedder.mlp.2.weight", "y_embedder.embedding_table.weight",
        *(f"blocks.{i}.{part}.weight" for i, part in itertools.product(range(2), block)),
        "final_layer.linear.weight", "final_layer.adaLN_modulation.1.weight",
    ]  # fmt: skip
    model = DiT(SIZES)
    state = model.state_dict()
    assert list(state) == [name for name, _ in model.named_parameters()] == want
    shapes = {name: tuple(state[name].shape) for name in ("pos_embed", "x_embedder.proj.weight")}
    assert shapes == {"pos_embed": (1, 4, 24), "x_embedder.proj.weight": (24, 2, 2, 2)}
    assert state["final_layer.linear.weight"].shape == (8, 24)
    assert state["blocks.0.adaLN_modulation.1.weight"].shape == (144, 24)


def test_initial_weights():
    model = DiT(dataclasses.replace(SIZES, num_classes=3000))
    model.initialize()
    zero = [name for name, p in model.named_parameters() if not p.any()]
    assert zero == [
        "x_embedder.proj.bias", "blocks.0.adaLN_modulation.1.weight", "blocks.1.adaLN_modulation.1.weight",
        "final_layer.linear.weight", "final_layer.adaLN_modulation.1.weight",
    ]  # fmt: skip
    for weight in (model.y_embedder.embedding_table.weight, model.t_embedder.mlp[0].weight):
        assert float(weight.detach().std()) == pytest.approx(0.02, rel=0.03)
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["pos_embed"]
    torch.testing.assert_close(model.pos_embed[0].double(), plain_dit.positions(2, 24), rtol=0, atol=1e-7)
    assert not model(torch.randn(2, 2, 4, 4), torch.tensor([3, 999]), torch.tensor([0, 3])).any()


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"patch_size": 1, "input_size": 3, "num_kv_heads": 3},  # a token per place, an odd side
        {"patch_size": 4},  # one token
        {"in_channels": 1, "depth": 1, "input_size": 6},
    ],
)
def test_it_is_the_plain_model(change):
    sizes = dataclasses.replace(SIZES, **change)
    model = random_dit(sizes)
    x = torch.randn(3, sizes.in_channels, sizes.input_size, sizes.input_size, dtype=torch.float64)
    t, labels = torch.tensor([0.0, 999.0, 412.75], dtype=torch.float64), torch.tensor([2, 0, 3])
    want = plain_dit.predict(model.state_dict(), dataclasses.asdict(sizes), x, t, labels)
    with torch.no_grad():
        got = model(x, t, labels)
    assert float((got - want).abs().max() / want.abs().max()) <= 1e-12
    # Every token sees every other, and their places matter.
    if sizes.num_tokens > 1:
        with torch.no_grad():
            moved = model(x.flip(-1), t, labels).flip(-1)
        assert float((moved - want).abs().max()) > 1e-6


def test_recomputed_activations_change_nothing():
    model = random_dit()
    x, t, labels = torch.randn(2, 2, 4, 4).double(), torch.tensor([1, 500]), torch.tensor([3, 1])
    found = []
    for again in (False, True):
        model.gradient_checkpointing = again
        model.zero_grad()
        model(x, t, labels).square().mean().backward()
        found.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 26, "num_heads": 1, "num_kv_heads": 1}, "multiple of 4 .* got 26"),
        ({"patch_size": 3}, "patch_size to divide input_size 4, got 3"),
        ({"patch_size": 0}, "patch_size to be a positive number"),
        ({"num_heads": 5}, "num_heads to divide hidden_size 24, got 5"),
        ({"num_heads": 4, "num_kv_heads": 3}, "multiple of num_kv_heads"),
        ({"mlp_ratio": 3}, "FFN of width 0"),
    ],
)
def test_impossible_sizes(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SIZES, **change)


def test_unknown_size_lists_what_there_is():
    with pytest.raises(ValueError, match="DiT-Medium"):
        published_dit_size("DiT-XL/2")


# --- checkpoints ---


def config(**more):
    return DiTCheckpointConfig(**dataclasses.asdict(SIZES), prediction_type="flow", **more)


def test_our_checkpoints(tmp_path):
    state = {name: tensor.float() for name, tensor in random_dit().state_dict().items()}
    save_checkpoint(tmp_path, config(latents_mean=[0.5, 1.0]), state)
    assert json.loads((tmp_path / "config.json").read_text())["model"] == "dit"
    model, read = load_checkpoint(tmp_path, torch.float32, "cpu")
    assert isinstance(model, DiT) and read == config(latents_mean=[0.5, 1.0]) == read_config(tmp_path / "config.json")
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(values | {"model": "unet"}))
    with pytest.raises(ValueError, match="expected model transformer or dit in .*, got 'unet'"):
        load_checkpoint(tmp_path, torch.float32, "cpu")
    # Without the key it is a Transformer's, whose sizes these are not.
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in values.items() if k != "model"}))
    with pytest.raises(ValueError, match="unknown key 'patch_size'"):
        load_checkpoint(tmp_path, torch.float32, "cpu")


def published(folder, state, given, ema=None):
    folder.mkdir()
    save_file(state, folder / "model.safetensors")
    torch.save({"scaling_factor": 0.5, "bias_factor": 0.25, "steps": 3, "ema": ema}, folder / "other_state.pth")
    (folder / "config.json").write_text(json.dumps(given))
    return folder


def test_published_checkpoints(tmp_path):
    state = {name: tensor.float().contiguous() for name, tensor in random_dit().state_dict().items()}
    shadow = [tensor.float() for tensor in random_dit(seed=1).state_dict().values()]
    given = {"prediction_type": "flow", "num_heads": 3}
    folder = published(tmp_path / "a", state, given, ema={"shadow_params": shadow})
    model, read = load_checkpoint(folder, torch.float32, "cpu")
    # 64 = floor(24·r·2/3/64)·64 for r from 4: the smallest that fits.
    assert read == config(latents_mean=-0.25, latents_std=2.0)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    averaged = load_checkpoint(folder, torch.float32, "cpu", ema=True)[0].state_dict()
    assert all(torch.equal(a, b) for a, b in zip(averaged.values(), shadow, strict=True))
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match="do not tell prediction_type, num_heads; write them to"):
        load_checkpoint(folder, torch.float32, "cpu")
    for extra, message in (
        ({"model": "transformer"}, "expected model dit in"),
        ({"input_size": 8}, "input_size is 4 by the files"),
        ({"patch_size": 1}, "patch_size is 2 by the files"),
        ({"diffusion_depth": 1}, "unknown key 'diffusion_depth'"),
    ):
        (folder / "config.json").write_text(json.dumps(given | extra))
        with pytest.raises(ValueError, match=message):
            load_checkpoint(folder, torch.float32, "cpu")


@pytest.mark.parametrize("name", DIT_SIZES)
def test_every_published_size_is_recognised(tmp_path, name):
    from fastlatent.models import published as layout

    values = published_dit_size(name) | {"patch_size": 2, "in_channels": 4, "input_size": 32, "num_classes": 1000}
    with torch.device("meta"):
        state = dict(DiT(DiTConfig(**values)).state_dict())
    found = layout.complete(tmp_path, {"prediction_type": "flow"}, state, {"scaling_factor": 1.0, "bias_factor": 0.0})
    assert found == values | {"prediction_type": "flow", "latents_mean": 0.0, "latents_std": 1.0}
