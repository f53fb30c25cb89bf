"""Published diffusion heads: the switches in which they differ, and the names of their weights."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal


@dataclass(frozen=True)
class HeadSpec:
    """A head as it was published; `fastlatent.heads.families` folds all of them into one `HeadWeights`.

    Every head computes, with y = condition (projected) + embedding of the timestep:

        x ← input(x);  x ← x + gate(y) ⊙ FFN(norm(x)·(1 + scale(y)) + shift(y)) per block;
        output(norm(x)·(1 + scale(y)) + shift(y)),  modulations = Linear(silu(y)).

    Attributes:
        family: a name of `FAMILIES`.
        hidden_size, blocks, ffn_width: H, L and F.
        channels, out_channels: C of a token; O is C, or 2C where the head also predicts its variance.
        condition_channels: Z of the condition that the backbone hands over; H where there is no projection.
        norm: of the blocks and of the output; only that of the blocks can be affine.
        affine: the blocks' norm has a weight (RMS), or a weight and a bias (layer norm).
        eps: of both norms; not among the weights, so it is a fact of the family.
        ffn: "swiglu", down(silu(a) ⊙ b), or "mlp", down(silu(a)).
        bias: which linear layers have one: "all", "input" (the token embedding alone) or "none".
        condition_projection: a linear layer Z → H precedes y; LatentLM's condition layer belongs to its backbone.
        time_embedders: how many times the head takes, 1, 2 (pocket-tts: start and target of a step; their embeddings
            are averaged) or 0 (pocket-tts's one-step heads). The sinusoid, [cos | sin] of 128 frequencies with period
            10000, is the same in all.
        time_norm: pocket-tts's norm after each time embedder: x·weight/√(var(x) + 1e-5), var unbiased and about the
            mean, which is not taken from x itself.
    """

    family: str
    hidden_size: int
    blocks: int
    ffn_width: int
    channels: int
    out_channels: int
    condition_channels: int
    norm: Literal["rms", "layer"]
    affine: bool
    eps: float
    ffn: Literal["swiglu", "mlp"]
    bias: Literal["all", "input", "none"]
    condition_projection: bool
    time_embedders: int
    time_norm: bool


@dataclass(frozen=True)
class Layout:
    """Where a head keeps its weights: names of linear layers and norms below the head's prefix.

    "{}" stands for the number of a block, or of a time embedder.
    """

    anchor: str  # the name that tells where in a model's state the head is; the input's, or the first block's norm
    input: str
    time: tuple[str, str]
    block_modulation: str
    up: tuple[str, ...]  # two names: the one that goes through silu first
    down: str
    output_modulation: str
    output: str
    norm: str | None = None
    condition: str | None = None
    layer_norm: bool = False
    eps: float = 1e-6
    gated: bool = True
    silu_second: bool = False  # of a fused pair of branches
    bias: Literal["all", "input", "none"] = "none"
    convolution: bool = False  # the input is a 1x1 convolution
    shared_prefix: bool = False  # the backbone's weights lie beside the head's: their names are not the head's
    several_times: bool = False  # as many time embedders as there are; else one
    time_norm: str | None = None
    frequencies: str | None = None


LATENTLM = Layout(
    anchor="noisy_x_embedder.proj.weight",
    input="noisy_x_embedder.proj",
    time=("t_embedder.mlp.0", "t_embedder.mlp.2"),
    block_modulation="diffusion_blocks.{}.adaLN_modulation.1",
    up=("diffusion_blocks.{}.mlp.fc1", "diffusion_blocks.{}.mlp.gate"),
    down="diffusion_blocks.{}.mlp.fc2",
    output_modulation="final_layer.adaLN_modulation.1",
    output="final_layer.linear",
    bias="input",
    convolution=True,
    shared_prefix=True,
)
SYNTHLM = Layout(
    anchor="noisy_input_embedder.weight",
    input="noisy_input_embedder",
    time=("time_embedder.mlp.0", "time_embedder.mlp.2"),
    block_modulation="diffusion_blocks.{}.adaLN_modulation.proj",
    up=("diffusion_blocks.{}.mlp.up_gate",),
    silu_second=True,
    down="diffusion_blocks.{}.mlp.down_proj",
    output_modulation="final_layer.adaLN_modulation.proj",
    output="final_layer.out_proj",
    shared_prefix=True,
)
ADALN_MLP = Layout(
    anchor="res_blocks.0.in_ln.weight",
    input="input_proj",
    condition="cond_embed",
    time=("time_embed.mlp.0", "time_embed.mlp.2"),
    norm="res_blocks.{}.in_ln",
    layer_norm=True,
    block_modulation="res_blocks.{}.adaLN_modulation.1",
    up=("res_blocks.{}.mlp.0",),
    gated=False,
    down="res_blocks.{}.mlp.2",
    output_modulation="final_layer.adaLN_modulation.1",
    output="final_layer.linear",
    bias="all",
)
MING = replace(ADALN_MLP, up=("res_blocks.{}.mlp.w12",), gated=True, down="res_blocks.{}.mlp.w3")
POCKET_TTS = replace(
    ADALN_MLP,
    time=("time_embed.{}.mlp.0", "time_embed.{}.mlp.2"),
    time_norm="time_embed.{}.mlp.3.alpha",
    frequencies="time_embed.{}.freqs",
    several_times=True,
)
VIBEVOICE = Layout(
    anchor="noisy_images_proj.weight",
    input="noisy_images_proj",
    condition="cond_proj",
    time=("t_embedder.mlp.0", "t_embedder.mlp.2"),
    norm="layers.{}.norm",
    eps=1e-5,
    block_modulation="layers.{}.adaLN_modulation.1",
    up=("layers.{}.ffn.gate_proj", "layers.{}.ffn.up_proj"),
    down="layers.{}.ffn.down_proj",
    output_modulation="final_layer.adaLN_modulation.1",
    output="final_layer.linear",
)
# The port in transformers: as released (5.23), and as its converter once wrote.
VIBEVOICE_PORT = replace(
    VIBEVOICE,
    time=("timestep_proj.fc1", "timestep_proj.fc2"),
    block_modulation="layers.{}.linear",
    output_modulation="final_layer.linear_1",
    output="final_layer.linear_2",
)
VIBEVOICE_EARLY_PORT = replace(VIBEVOICE_PORT, time=("timestep_embedder.layer_1", "timestep_embedder.layer_2"))


@dataclass(frozen=True)
class Family:
    """Layouts a family was published in, how its prefix ends, and the ratios O/C it has.

    The layout decides what a head is; then its prefix; then, if that is not published, which family has O/C first.
    """

    layouts: tuple[Layout, ...]
    prefixes: tuple[str, ...] = ()
    ratios: tuple[int, ...] = (1,)


FAMILIES = {
    "latentlm": Family((LATENTLM,)),
    "synthlm": Family((SYNTHLM,)),
    "mar": Family((ADALN_MLP,), ("diffloss.net.",), (2,)),
    "nextstep": Family((ADALN_MLP,), ("image_head.net.",)),
    "ming": Family((MING,)),
    "calm": Family((ADALN_MLP,), ("generative_head.net.",), (1, 2)),
    "orthus": Family((ADALN_MLP,), ("mlp_head.",)),
    "vibevoice": Family((VIBEVOICE, VIBEVOICE_PORT, VIBEVOICE_EARLY_PORT), ("prediction_head.", "diffusion_head.")),
    "pocket_tts": Family((POCKET_TTS,), ("flow_net.",)),
}
