"""AutoencoderKL checkpoints of latent diffusion's training code, such as KL-16: their names and sizes, as diffusers'.

Rombach et al. 2022, "High-Resolution Image Synthesis with Latent Diffusion Models". The networks are the same:
GroupNorm of 32 groups with eps 1e-6, down-sampling padded at the right and below, one head of attention in the middle
and behind the blocks of some levels.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

_PREFIXES = ("first_stage_model.", "vae.", "module.")
_PARTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
_GROUPS = 32

# In this order: names of diffusers for those of the published code; levels of the decoder are counted the other way.
_RENAMES = (
    (r"\.(down|up)\.(\d+)\.block\.", r".\1_blocks.\2.resnets."),
    (r"\.(down|up)\.(\d+)\.attn\.", r".\1_blocks.\2.attentions."),
    (r"\.(down|up)\.(\d+)\.(down|up)sample\.", r".\1_blocks.\2.\3samplers.0."),
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.", ".mid_block.attentions.0."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"\.norm_out\.", ".conv_norm_out."),
    (r"(attentions\.\d+)\.norm\.", r"\1.group_norm."),
    (r"(attentions\.\d+)\.([qkv])\.", r"\1.to_\2."),
    (r"(attentions\.\d+)\.proj_out\.", r"\1.to_out.0."),
)


def is_ldm(state: Mapping[str, Tensor]) -> bool:
    """Whether these are weights of a convolutional autoencoder under the published names."""
    return any(re.search(r"(^|\.)encoder\.(down|mid)\.", name) for name in state)


def from_ldm(state: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Constructor arguments and weights of diffusers' AutoencoderKL.

    A whole Stable Diffusion checkpoint may be given: of it only the autoencoder is taken.

    Raises:
        ValueError: it is no AutoencoderKL, or one that diffusers' class cannot be.
    """
    for prefix in _PREFIXES:
        if any(name.startswith(prefix + "encoder.") for name in state):
            state = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    state = {name: tensor for name, tensor in state.items() if not name.startswith("loss.")}  # discriminator, LPIPS
    if any(name.startswith("quantize.") for name in state):
        raise ValueError("a VQ model, and not an AutoencoderKL; save it as a folder of diffusers' VQModel")
    unknown = sorted(name for name in state if not name.startswith(_PARTS))
    if unknown:
        raise ValueError(f"expected weights of an AutoencoderKL only, got {', '.join(unknown[:3])}")
    config = _sizes(state)
    levels = len(config["block_out_channels"])
    return config, {_renamed(name, levels): _as_linear(name, tensor) for name, tensor in state.items()}


def _sizes(state: Mapping[str, Tensor]) -> dict[str, Any]:
    levels = _count(state, r"encoder\.down\.(\d+)\.")
    blocks = _count(state, r"encoder\.down\.0\.block\.(\d+)\.")
    widths = [_shape(state, f"encoder.down.{level}.block.{blocks - 1}.conv2.weight")[0] for level in range(levels)]
    latent_channels = _shape(state, "decoder.conv_in.weight")[1]
    bad = [width for width in widths if width % _GROUPS]
    if bad:
        raise ValueError(f"expected widths that are multiples of {_GROUPS}, the groups of its norms, got {bad[0]}")
    for name, outputs in (("encoder.conv_out.weight", 2), ("quant_conv.weight", 2), ("post_quant_conv.weight", 1)):
        if name in state and state[name].shape[0] != outputs * latent_channels:
            raise ValueError(
                f"expected {outputs * latent_channels} outputs of {name} for {latent_channels} latent channels "
                f"(an AutoencoderKL with z_channels = embed_dim), got {state[name].shape[0]}"
            )

    def block_types(part: str, name: str) -> list[str]:
        attends = [f"{part}.{level}.attn.0.q.weight" in state for level in range(levels)]
        return [f"{'Attn' if attend else ''}{name}" for attend in attends]

    return {
        "in_channels": _shape(state, "encoder.conv_in.weight")[1],
        "out_channels": _shape(state, "decoder.conv_out.weight")[0],
        "latent_channels": latent_channels,
        "block_out_channels": tuple(widths),
        "layers_per_block": blocks,
        "down_block_types": tuple(block_types("encoder.down", "DownEncoderBlock2D")),
        "up_block_types": tuple(reversed(block_types("decoder.up", "UpDecoderBlock2D"))),
        "norm_num_groups": _GROUPS,
        "mid_block_add_attention": "encoder.mid.attn_1.q.weight" in state,
        "use_quant_conv": "quant_conv.weight" in state,
        "use_post_quant_conv": "post_quant_conv.weight" in state,
    }


def _count(state: Mapping[str, Tensor], pattern: str) -> int:
    found = {match[1] for name in state if (match := re.match(pattern, name))}
    if not found:
        raise ValueError(
            f"expected weights such as {pattern.replace(chr(92), '').replace('(d+)', '0')}…, there are none"
        )
    return len(found)


def _shape(state: Mapping[str, Tensor], name: str) -> tuple[int, ...]:
    if name not in state or state[name].ndim != 4:
        raise ValueError(f"expected a convolution {name}, it is missing")
    return tuple(state[name].shape)


def _renamed(name: str, levels: int) -> str:
    name = re.sub(r"^(decoder\.up)\.(\d+)\.", lambda found: f"{found[1]}.{levels - 1 - int(found[2])}.", name)
    for pattern, replacement in _RENAMES:
        name = re.sub(pattern, replacement, name)
    return name


def _as_linear(name: str, tensor: Tensor) -> Tensor:
    """1×1 convolutions of attention are linear layers in diffusers."""
    attention = re.search(r"\.(attn_1|attn\.\d+)\.(q|k|v|proj_out)\.weight$", name)
    return tensor[:, :, 0, 0].contiguous() if attention and tensor.ndim == 4 else tensor
