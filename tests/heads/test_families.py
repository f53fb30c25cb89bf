"""Recognising and folding published heads: names, prefixes, shapes, and every refusal."""

import dataclasses

import plain_heads
import pytest
import torch

from fastlatent.heads.diffusion_head import DiffusionHead
from fastlatent.heads.families import fold_head
from fastlatent.heads.spec import FAMILIES

# Where each family's head lies in its published model, and what lies beside it.
PREFIXES = {
    "latentlm": "",
    "synthlm": "model.",
    "mar": "diffloss.net.",
    "nextstep": "image_head.net.",
    "ming": "model.diffloss.net.",
    "calm": "generative_head.net.",
    "orthus": "mlp_head.",
    "vibevoice": "model.prediction_head.",
    "vibevoice_port": "model.diffusion_head.",
    "vibevoice_early_port": "model.diffusion_head.",
    "pocket_tts": "flow_lm.flow_net.",
}
BESIDE = {
    "latentlm": [
        "x_embedder.proj.weight", "y_embedder.embedding_table.weight", "condition_layer.linear.weight",
        "blocks.0.attn.qkv.weight", "blocks.0.mlp.fc1.weight",
    ],
    "synthlm": [
        "scaling_factor", "model.condition_layer.linear.weight", "model.input_embedder.weight",
        "model.blocks.0.norm1.weight",
    ],
    "vibevoice": ["model.speech_scaling_factor", "model.language_model.layers.0.self_attn.q_proj.weight"],
}  # fmt: skip


def family_of(layout):
    return "vibevoice" if layout.startswith("vibevoice") else layout


def wrapped(layout, state):
    beside = BESIDE.get(layout, ["lm.layers.0.self_attn.q_proj.weight", "lm.embed_tokens.weight"])
    # A shape and a NaN that would be refused inside the head.
    outside = {name: torch.full((3, 3), torch.nan, dtype=torch.float64) for name in beside}
    return {**outside, **{PREFIXES[layout] + name: tensor for name, tensor in state.items()}}


def fold(state, family=None, **options):
    return fold_head({name: tuple(t.shape) for name, t in state.items()}, state.__getitem__, family, **options)


@pytest.mark.parametrize("layout", PREFIXES)
def test_spec_from_a_whole_model(layout):
    spec = fold(wrapped(layout, plain_heads.random_state(layout))).spec
    mlp = layout in ("mar", "nextstep", "calm", "orthus", "pocket_tts")
    layer_norm = mlp or layout == "ming"
    rms_affine = layout.startswith("vibevoice")
    assert dataclasses.asdict(spec) == {
        "family": family_of(layout),
        "hidden_size": 12,
        "blocks": 2,
        "ffn_width": 20,
        "channels": 5,
        "out_channels": 10 if layout == "mar" else 5,
        "condition_channels": 7 if layer_norm else 12,
        "norm": "layer" if layer_norm else "rms",
        "affine": layer_norm or rms_affine,
        "eps": 1e-5 if rms_affine else 1e-6,
        "ffn": "mlp" if mlp else "swiglu",
        "bias": "all" if layer_norm else "input" if layout == "latentlm" else "none",
        "condition_projection": layer_norm or rms_affine,
        "time_embedders": 2 if layout == "pocket_tts" else 1,
        "time_norm": layout == "pocket_tts",
    }


# The places where MAR's descendants keep the same head; "module." is DistributedDataParallel's.
@pytest.mark.parametrize("prefix", ["diffloss.net.", "mar.diffloss.net.", "module.mar.diffloss.net.", ""])
def test_mar_prefixes(prefix):
    state = {prefix + name: t for name, t in plain_heads.random_state("mar").items()}
    assert fold(state).spec.family == "mar"


def test_calm_predicts_with_or_without_variance():
    for out in (5, 10):
        state = {"generative_head.net." + name: t for name, t in plain_heads.random_state("calm", out=out).items()}
        assert fold(state).spec.family == "calm"
        assert fold(state).spec.out_channels == out


@pytest.mark.parametrize("prefix", ["", "head.", "diffloss.net."])
def test_ambiguous_family_lists_the_candidates(prefix):
    # MAR's own prefix does not help: MAR predicts a variance.
    state = {prefix + name: t for name, t in plain_heads.random_state("orthus").items()}
    with pytest.raises(ValueError, match="fit nextstep, calm, orthus; pass one of them as family"):
        fold(state)
    for family in ("nextstep", "calm", "orthus"):
        assert fold(state, family).spec.family == family


def test_heads_without_time_are_pocket_tts_alone():
    state = plain_heads.random_state("pocket_tts", times=0)
    published = fold({"flow_net." + name: t for name, t in state.items()})
    assert published.spec.time_embedders == 0
    assert published.time is None
    assert fold(state, "pocket_tts").spec.time_embedders == 0
    with pytest.raises(ValueError, match="expected diffloss.net.time_embed.mlp.0.bias.*which are missing"):
        fold({"diffloss.net." + name: t for name, t in state.items()})
    one = plain_heads.random_state("pocket_tts", times=1)
    assert fold(one).spec.time_embedders == 1


@pytest.mark.parametrize("layout", PREFIXES)
def test_every_missing_name_is_named(layout):
    state = wrapped(layout, plain_heads.random_state(layout, blocks=1))
    names = [name for name in state if name.startswith(PREFIXES[layout]) and name not in BESIDE.get(layout, [])]
    anchors = [entry.anchor for entry in FAMILIES[family_of(layout)].layouts]
    for name in names:
        rest = {key: tensor for key, tensor in state.items() if key != name}
        wanted = f"expected {name}, which are missing".replace(".", r"\.")
        if name.removeprefix(PREFIXES[layout]) in anchors:
            wanted = "expected one of the names"
        with pytest.raises(ValueError, match=wanted):
            fold(rest, family_of(layout))


@pytest.mark.parametrize("layout", PREFIXES)
def test_every_wrong_shape_is_named(layout):
    state = wrapped(layout, plain_heads.random_state(layout))
    prefix = PREFIXES[layout]
    for name in plain_heads.shapes(layout):
        if name.endswith(("input_proj.weight", "noisy_x_embedder.proj.weight", "noisy_input_embedder.weight")) or (
            name == "noisy_images_proj.weight"
        ):
            continue  # they say what H and C are
        wrong = {**state, prefix + name: state[prefix + name][:-1]}
        # What gives a size is believed, and then others disagree.
        with pytest.raises(ValueError, match=r"expected .* got"):
            fold(wrong, family_of(layout))


def test_wrong_shape_says_expected_and_got():
    state = plain_heads.random_state("mar")
    state["res_blocks.1.mlp.0.weight"] = torch.zeros(19, 12, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"expected res_blocks.1.mlp.0.weight \[20, 12\], got \[19, 12\]"):
        fold(state)
    state = plain_heads.random_state("latentlm")
    state["noisy_x_embedder.proj.weight"] = torch.zeros(12, 5, 2, 2, dtype=torch.float64)  # patches of 2 pixels
    with pytest.raises(ValueError, match=r"expected noisy_x_embedder.proj.weight \[12, 5, 1, 1\], got \[12, 5, 2, 2\]"):
        fold(state)
    state = plain_heads.random_state("mar", out=15)
    with pytest.raises(ValueError, match=r"final_layer.linear.weight with 5 or 10 rows.*5 channels, got 15"):
        fold(state)
    with pytest.raises(ValueError, match=r"final_layer.linear.weight with 10 rows, of a mar head with 5 channels"):
        fold(plain_heads.random_state("nextstep"), "mar")
    state = plain_heads.random_state("mar")
    state["input_proj.weight"] = torch.zeros(12, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"expected a matrix input_proj.weight, got shape \[12\]"):
        fold(state)


@pytest.mark.parametrize(
    ("layout", "name"),
    [
        ("mar", "res_blocks.1.attn.qkv.weight"),  # attention
        ("mar", "res_blocks.0.norm2.weight"),
        ("latentlm", "diffusion_blocks.0.attn.qkv.weight"),
        ("latentlm", "final_layer.linear.bias"),
        ("vibevoice", "layers.0.ffn.up_proj.bias"),
        ("vibevoice", "final_layer.norm_final.weight"),
        ("mar", "res_blocks.7.in_ln.weight"),  # a gap in the numbers
        ("mar", "res_blocks.02.in_ln.weight"),
        ("ming", "q_proj.weight"),
    ],
)
def test_what_fits_nothing_is_named_with_its_shape(layout, name):
    state = plain_heads.random_state(layout)
    state["zzz" if layout == "latentlm" else name] = torch.zeros(4, 3)
    state[name] = torch.zeros(4, 3)
    prefix = PREFIXES[layout]
    with pytest.raises(ValueError, match=rf"{prefix}{name} \[4, 3\] fits nothing".replace(".", r"\.")):
        fold({prefix + key: tensor for key, tensor in state.items()})


def test_calm_energy_head_is_refused():
    # Another network: noise and hidden state enter side by side, and nothing depends on a timestep.
    names = [
        "transformer.embed_tokens.weight", "generative_head.noise_embd.weight", "generative_head.hidden_embd.weight",
        "generative_head.mlp_blocks.0.in_ln.weight", "generative_head.final_layer.linears.0.weight",
    ]  # fmt: skip
    state = {name: torch.zeros(4, 4) for name in names}
    with pytest.raises(ValueError, match=r"expected one of.*generative_head.noise_embd.weight \[4, 4\] fits nothing"):
        fold(state)


def test_no_head_several_heads_unknown_family():
    with pytest.raises(ValueError, match="the state is empty"):
        fold({})
    with pytest.raises(ValueError, match=r"lm.weight \[2\] fits nothing"):
        fold({"lm.weight": torch.zeros(2)})
    state = plain_heads.random_state("mar")
    two = {prefix + name: t for prefix in ("a.diffloss.net.", "b.diffloss.net.") for name, t in state.items()}
    with pytest.raises(ValueError, match=r"expected one head, got several, at 'a\.diffloss.*'b\.diffloss"):
        fold(two)
    with pytest.raises(ValueError, match="got several"):
        fold({**plain_heads.random_state("latentlm"), **{"diffloss.net." + k: v for k, v in state.items()}})
    with pytest.raises(ValueError, match="expected a family of latentlm, .*got 'nova'"):
        fold(state, "nova")
    with pytest.raises(ValueError, match="expected one of the names noisy_images_proj.weight .of vibevoice."):
        fold(state, "vibevoice")
    with pytest.raises(ValueError, match=r"res_blocks.0.mlp.0.weight \[20, 12\] fits nothing in a head like ming's"):
        fold(state, "ming")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("layout", PREFIXES)
def test_every_weight_that_is_not_finite_is_named(layout, value):
    state = wrapped(layout, plain_heads.random_state(layout, blocks=1))
    for name in plain_heads.shapes(layout, blocks=1):
        key = PREFIXES[layout] + name
        broken = {**state, key: state[key].clone()}
        broken[key].view(-1)[-1] = value
        with pytest.raises(ValueError, match=f"expected finite weights, got NaN or inf in {key}".replace(".", r"\.")):
            fold(broken, family_of(layout))


def test_dtypes():
    state = plain_heads.random_state("mar")
    kept = fold({name: tensor.bfloat16() for name, tensor in state.items()})
    assert kept.weights.dtype == kept.condition_weight.dtype == kept.time.first_weight.dtype == torch.bfloat16
    assert kept.weights.up_bias.dtype == kept.time.first_bias.dtype == torch.float32
    assert fold(state).weights.up_bias.dtype == torch.float64
    assert fold(state, dtype=torch.float16).weights.dtype == torch.float16
    with pytest.raises(ValueError, match=r"expected dtype .*got torch.int8"):
        fold(state, dtype=torch.int8)
    with pytest.raises(ValueError, match=r"expected input_proj.weight of torch.float64.*got torch.int8"):
        fold({name: tensor.to(torch.int8) for name, tensor in state.items()})
    state["res_blocks.1.mlp.2.weight"] *= 1e7
    with pytest.raises(ValueError, match=r"res_blocks.1.mlp.2 does not fit torch.float16; pass dtype=torch.float32"):
        fold(state, dtype=torch.float16)


@pytest.mark.parametrize("weight", [1.0, -0.75, 0.0, 1e-4, 300.0])  # 300: beyond the largest power of two taken out
def test_norm_folds_exactly(weight):
    # One channel's norm takes a special value; a zero one leaves bias and shift alone.
    state = plain_heads.random_state("mar")
    state["res_blocks.0.in_ln.weight"][3] = weight
    x, condition = torch.randn(4, 5).double(), torch.randn(4, 7).double()
    got = DiffusionHead.from_state_dict(state)(x, 500.0, condition)
    torch.testing.assert_close(got, plain_heads.mar(state, x, 500.0, condition), rtol=0, atol=1e-12)


def test_powers_of_two_leave_a_rest_near_one():
    state = plain_heads.random_state("mar", norm=0.03)
    state["res_blocks.0.adaLN_modulation.1.weight"].zero_()
    state["res_blocks.0.adaLN_modulation.1.bias"].zero_()
    weights = fold(state).weights
    multiplier = 1 + weights.modulation_bias[12:24]  # 1 + scale' of the first block
    # Nearest powers of two are within a factor of √2, where the exponent is not clamped at −4.
    assert bool((multiplier > 0).all())
    free = state["res_blocks.0.in_ln.weight"].abs() > 2**-4.5
    assert bool((multiplier[free] > 0.7).all() and (multiplier[free] < 1.42).all())


def test_only_the_heads_tensors_are_read():
    state = wrapped("vibevoice", plain_heads.random_state("vibevoice"))
    read = []
    fold_head({name: tuple(t.shape) for name, t in state.items()}, lambda name: read.append(name) or state[name], None)
    assert set(read) == {name for name in state if name.startswith("model.prediction_head.")}
