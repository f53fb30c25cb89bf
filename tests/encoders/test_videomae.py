"""The ViT and its checkpoints: every layout against a plain float64 computation, and every key accounted for."""

import json
import math

import plain_videomae
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_teachers import LAYOUTS, make_state, write_teacher

from fastlatent.encoders.engines.numerics import relative_error
from fastlatent.encoders.teachers import load_teacher
from fastlatent.encoders.videomae import PUBLISHED, VideoMAE, sine_positions
from fastlatent.encoders.videomae_keys import Checkpoint, encoder_tensors, read_checkpoint

# The proportions of the published sizes: S and B have heads of 64 numbers and an MLP of 4 times the width; the giant
# has patches of 14, heads of 88 and an MLP of 48/11.
SIZES = {
    "small": {"dim": 32, "depth": 2, "heads": 1, "size": 32},
    "base": {"dim": 48, "depth": 2, "heads": 3, "size": 48, "frames": 2},  # 9 tokens: the middle is in one time step
    "giant": {"dim": 88, "depth": 1, "heads": 2, "size": 28, "patch": 14, "mlp_ratio": 48 / 11},
}


def state_of(
    dim=32, depth=2, heads=2, patch=16, tubelet=2, seed=0, mlp_ratio=4.0, layer_scale=False, cosine=False, **_
):
    """What `write_teacher` of the same arguments writes."""
    return make_state(dim, depth, heads, patch, tubelet, seed, int(dim * mlp_ratio), layer_scale, cosine, torch.float32)


def clips_of(frames=4, size=32, batch=2, seed=1, **_):
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (batch, frames, size, size, 3), dtype=torch.uint8, generator=draw)


def in_float64(teacher, clips):
    """Of the loaded module, which has float64 weights."""
    with torch.no_grad():
        return teacher.encoder()(teacher.prepare(clips).double())


# ---- arithmetic ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", SIZES)
def test_every_layout_in_float64(tmp_path, layout, name):
    sizes = SIZES[name]
    teacher = load_teacher("videomaev2", str(write_teacher(tmp_path, layout, **sizes)), dtype=torch.float64)
    clips = clips_of(**sizes)
    want = plain_videomae.tokens(state_of(**sizes), teacher.prepare(clips), sizes["heads"])
    assert relative_error(in_float64(teacher, clips), want) <= 1e-10
    assert relative_error(teacher.encode(teacher.prepare(clips)), want) <= 1e-7  # float32 rows


@pytest.mark.parametrize("special", [{"layer_scale": True}, {"cosine": True}], ids=str)
def test_layer_scale_and_cosine_attention(tmp_path, special):
    teacher = load_teacher("videomaev2", str(write_teacher(tmp_path, **special)), dtype=torch.float64)
    clips = clips_of()
    state = state_of(**special)
    if "cosine" in special:
        assert state["blocks.0.attn.scale"].max() > 4.6052  # one factor is cut off
    want = plain_videomae.tokens(state, teacher.prepare(clips), 2)
    assert relative_error(in_float64(teacher, clips), want) <= 1e-10


def test_learned_positions(tmp_path):
    file = write_teacher(tmp_path, "github")
    loaded = torch.load(file, weights_only=True)
    shift = torch.randn(1, 8, 32, generator=torch.Generator().manual_seed(3))
    # A table that differs from the sines by `shift`: the patch bias cannot imitate it.
    loaded["model"]["pos_embed"] = (sine_positions(8, 32) + shift.double()).float()
    torch.save(loaded, file)
    learned = load_teacher("videomaev2", str(file))
    fixed = load_teacher("videomaev2", str(write_teacher(tmp_path / "fixed")))
    clips = clips_of()
    with torch.no_grad():
        first = [teacher.encoder()[0].patch_embed(teacher.prepare(clips)) for teacher in (learned, fixed)]
        tables = [teacher.encoder()[0].positions for teacher in (learned, fixed)]
    assert torch.equal(*first)
    assert torch.allclose(tables[0] - tables[1], shift[0], atol=1e-6)
    assert learned.identity()["weights"] != fixed.identity()["weights"]


def test_against_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.VideoMAEConfig(
        image_size=32, num_frames=4, hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=128
    )
    model = transformers.VideoMAEModel(config).eval().double()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.float().save_pretrained(tmp_path)  # by the names of the library's day: query.bias now, q_bias before
    teacher = load_teacher("videomaev2", str(tmp_path), dtype=torch.float64)
    assert teacher.identity()["sizes"]["eps"] == 1e-12  # of its config, not VideoMAEv2's
    clips = clips_of()
    pixels = teacher.prepare(clips).double()
    with torch.no_grad():
        out = model.double()(pixels.transpose(1, 2), output_hidden_states=True)
    assert relative_error(in_float64(teacher, clips), out.last_hidden_state) < 1e-7  # its table is rounded to float32
    second = load_teacher("videomaev2", str(tmp_path), dtype=torch.float64, layer=2)
    assert relative_error(in_float64(second, clips), out.hidden_states[2]) < 1e-7
    single = load_teacher("videomaev2", str(tmp_path))
    with torch.no_grad():
        want = model.float()(pixels.float().transpose(1, 2)).last_hidden_state
    assert relative_error(single.encode(single.prepare(clips)), want) < 1e-6


def test_half_precision_is_as_good_as_plain_torch(tmp_path):
    sizes = {"dim": 96, "heads": 3, "depth": 3, "size": 64}
    file = write_teacher(tmp_path, "github", **sizes)
    state, clips = state_of(**sizes), clips_of(**sizes)
    half = load_teacher("videomaev2", str(file), dtype=torch.bfloat16)
    pixels = half.prepare(clips)
    want = plain_videomae.tokens(state, pixels, 3)
    plain = plain_torch({name: tensor.bfloat16() for name, tensor in state.items()}, pixels.bfloat16(), 3)
    assert relative_error(half.encode(pixels), want) <= 1.5 * relative_error(plain, want)


def plain_torch(state, pixels, heads):
    """As one writes it: a convolution, attention written out."""
    x = torch.nn.functional.conv3d(
        pixels, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=(2, 16, 16)
    )
    x = x.flatten(2).transpose(1, 2)
    x = x + sine_positions(*x.shape[1:]).to(x.dtype)
    for i in range(3):
        one = {k.removeprefix(f"blocks.{i}."): v for k, v in state.items() if k.startswith(f"blocks.{i}.")}
        y = torch.nn.functional.layer_norm(x, x.shape[-1:], one["norm1.weight"], one["norm1.bias"], 1e-6)
        bias = torch.cat([one["attn.q_bias"], torch.zeros_like(one["attn.q_bias"]), one["attn.v_bias"]])
        qkv = torch.nn.functional.linear(y, one["attn.qkv.weight"], bias)
        q, k, v = qkv.reshape(*x.shape[:2], 3, heads, -1).permute(2, 0, 3, 1, 4)
        attention = ((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)).softmax(-1) @ v
        y = attention.transpose(1, 2).flatten(2)
        x = x + torch.nn.functional.linear(y, one["attn.proj.weight"], one["attn.proj.bias"])
        y = torch.nn.functional.layer_norm(x, x.shape[-1:], one["norm2.weight"], one["norm2.bias"], 1e-6)
        y = torch.nn.functional.gelu(torch.nn.functional.linear(y, one["mlp.fc1.weight"], one["mlp.fc1.bias"]))
        x = x + torch.nn.functional.linear(y, one["mlp.fc2.weight"], one["mlp.fc2.bias"])
    return x


# ---- the published sizes ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    # depth · (4D² + 2DM + M + 8D) for a block of width D and MLP M, + (3 · 2 · patch² + 1) · D: without class token,
    # norm and head, and without biases of keys.
    ("size", "tokens", "parameters"),
    [("small", 1568, 21_879_168), ("base", 1568, 86_225_664), ("giant", 2048, 1_011_607_936)],
)
def test_published_sizes(size, tokens, parameters):
    sizes = PUBLISHED[size]
    with torch.device("meta"):
        model = VideoMAE(sizes)
        out = VideoMAE(sizes, 1)(torch.empty(1, 3, 16, 224, 224))
    # Here the keys have biases: zeros.
    assert sum(parameter.numel() for parameter in model.parameters()) - sizes.depth * sizes.dim == parameters
    assert sizes.tokens == tokens and out.shape == (1, tokens, sizes.dim)
    assert sizes.mlp == sizes.dim * (48 / 11 if size == "giant" else 4)


def test_a_published_file_without_a_config():
    # Of the widths in the papers heads are known, and 16 frames of 224² are what all of them take.
    for size, heads in {"small": 6, "base": 12, "large": 16, "huge": 16, "giant": 16}.items():
        one = PUBLISHED[size]
        state = make_state_on_meta(one)
        sizes, tensors = encoder_tensors(Checkpoint(f"{size}.pth", state, {}))
        assert sizes == one and sizes.heads == heads
        assert tensors["blocks.0.attn.qkv.bias"].shape == (3 * one.dim,)
    with pytest.raises(ValueError, match='how many heads its width of 400 has: add an entry "config"'):
        encoder_tensors(Checkpoint("x.pth", make_state_on_meta(PUBLISHED["small"], dim=400), {}))


def make_state_on_meta(sizes, dim=None):
    names = make_state(8, sizes.depth, 1, sizes.patch, sizes.tubelet, 0, 32, False, False, torch.float32)
    full = {8: dim or sizes.dim, 24: 3 * (dim or sizes.dim), 32: sizes.mlp}
    return {
        name: torch.empty([full.get(n, n) if "proj.weight" not in name or i == 0 else (n if n != 8 else full[8])
                           for i, n in enumerate(tensor.shape)], device="meta")
        for name, tensor in names.items()
    }  # fmt: skip


# ---- what does not fit -----------------------------------------------------------------------------------


def edited(file, change):
    loaded = torch.load(file, weights_only=True)
    change(loaded["model"], loaded["config"])
    torch.save(loaded, file)
    return file


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s, c: s.pop("blocks.0.norm1.weight"), r"missing: blocks.0.norm1.weight \(1 in all\)"),
        (lambda s, c: s.pop("blocks.1.mlp.fc1.weight"), r"missing: blocks.1.mlp.fc1.weight \(1"),
        (lambda s, c: s.pop("blocks.0.attn.q_bias"), r"missing: blocks.0.attn.q_bias \(1"),
        (lambda s, c: s.pop("patch_embed.proj.bias"), r"missing: patch_embed.proj.bias"),
        (lambda s, c: s.update({"cls_token": torch.zeros(1, 1, 32)}), r"unexpected: cls_token \(1 in all\)"),
        (lambda s, c: s.update({"blocks.0.attn.k_bias": torch.zeros(32)}), r"unexpected: blocks.0.attn.k_bias"),
        (lambda s, c: s.update({"blocks.0.mlp.fc2.bias": torch.zeros(33)}), r"fc2.bias \[33\], expected \[32\]"),
        (lambda s, c: s.pop("patch_embed.proj.weight"), r"expected one encoder of VideoMAE in .*, with a key"),
        (lambda s, c: s.update({"ema.patch_embed.proj.weight": torch.zeros(1)}), r"expected one encoder"),
        (lambda s, c: c.update(patch_size=14), r"says patch_size = 14 \(patch\), its weights have 16"),
        (lambda s, c: c.update(depth=3), r"says depth = 3 \(depth\), its weights have 2"),
        (lambda s, c: c.update(mlp_ratio=3), r"says mlp_ratio = 96 \(mlp\), its weights have 128"),
        (lambda s, c: c.update(cos_attn=True), r"says cos_attn = True \(cosine\), its weights have False"),
        (lambda s, c: c.update(qk_scale=0.5), r"has qk_scale = 0.5; only None is known"),
        (lambda s, c: c.update(num_heads=5), r"sizes in .* do not divide"),
        (lambda s, c: c.update(num_heads="2"), r"has num_heads = '2'"),
        (lambda s, c: c.update(img_size=[32, 48]), r"expected squares .* got size \[32, 48\]"),
        (lambda s, c: s["blocks.1.mlp.fc1.bias"][3:].fill_(math.nan), r"NaN or infinity in float32: blocks.1.mlp.fc1"),
    ],
)  # fmt: skip
def test_weights_that_do_not_fit(tmp_path, change, message):
    file = edited(write_teacher(tmp_path, "github"), change)
    with pytest.raises(ValueError, match=message):
        load_teacher("videomaev2", str(file))


def test_missing_and_unexpected_keys_of_the_other_layouts(tmp_path):
    for layout, gone in (
        ("transformers", "videomae.encoder.layer.1.attention.attention.key.weight"),
        ("hub", "model.blocks.1.attn.proj.bias"),
    ):
        folder = write_teacher(tmp_path / layout, layout)
        tensors = load_file(folder / "model.safetensors")
        del tensors[gone]
        save_file(tensors | {"strange.weight": torch.zeros(1)}, folder / "model.safetensors")
        with pytest.raises(ValueError, match=rf"missing: {gone} \(1 in all\); unexpected: strange.weight \(1 in all\)"):
            load_teacher("videomaev2", str(folder))


def test_folders(tmp_path):
    folder = write_teacher(tmp_path / "one")
    want = load_teacher("videomaev2", str(folder)).identity()
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="neither model.safetensors nor pytorch_model.bin"):
        load_teacher("videomaev2", str(folder))
    torch.save(tensors, folder / "pytorch_model.bin")
    assert load_teacher("videomaev2", str(folder)).identity() == want
    names = sorted(tensors)
    shards = {f"model-{i}.safetensors": names[i::2] for i in range(2)}
    for file, keys in shards.items():
        save_file({key: tensors[key] for key in keys}, folder / file)
    index = {"weight_map": {key: file for file, keys in shards.items() for key in keys}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "pytorch_model.bin").unlink()
    assert load_teacher("videomaev2", str(folder)).identity() == want
    (folder / "model-1.safetensors").unlink()
    with pytest.raises(ValueError, match="model.safetensors.index.json, but no model-1.safetensors"):
        load_teacher("videomaev2", str(folder))
    (folder / "config.json").write_text("{")
    (folder / "model-1.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="config.json is not JSON"):
        load_teacher("videomaev2", str(folder))
    with pytest.raises(ValueError, match=r"teacher: .*x.pth does not load"):
        (tmp_path / "x.pth").write_bytes(b"torn")
        load_teacher("videomaev2", str(tmp_path / "x.pth"))
    with pytest.raises(ValueError, match="which does not exist"):
        read_checkpoint(tmp_path / "nowhere")
