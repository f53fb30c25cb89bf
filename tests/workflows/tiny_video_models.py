"""Autoencoders of every video class of diffusers, small enough for tests: random weights, the real strides."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import torch

# class name -> what its constructor is given. At latents of 3×4, 5 latent frames decode in less than 0.2 s.
TINY: dict[str, dict[str, Any]] = {
    "AutoencoderKLWan": {
        "base_dim": 8, "z_dim": 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1,
        "temperal_downsample": [False, True, True],
    },
    "AutoencoderKLHunyuanVideo": {
        "latent_channels": 4, "block_out_channels": (8, 8, 8, 8), "layers_per_block": 1, "norm_num_groups": 4,
    },
    "AutoencoderKLHunyuanVideo15": {
        "latent_channels": 4, "block_out_channels": (8, 8, 8, 8, 8), "layers_per_block": 1,
    },
    "AutoencoderKLCogVideoX": {
        "latent_channels": 4, "block_out_channels": (8, 8, 8, 8), "layers_per_block": 1, "norm_num_groups": 4,
    },
    "AutoencoderKLLTXVideo": {
        "latent_channels": 8, "block_out_channels": (8, 8, 8, 8), "decoder_block_out_channels": (8, 8, 8, 8),
        "layers_per_block": (1, 1, 1, 1, 1), "decoder_layers_per_block": (1, 1, 1, 1, 1),
    },
    "AutoencoderKLMochi": {
        "encoder_block_out_channels": (32, 32, 32, 32), "decoder_block_out_channels": (32, 32, 32, 32),
        "latent_channels": 4, "layers_per_block": (1, 1, 1, 1, 1),
    },
    "AutoencoderKLAllegro": {
        "latent_channels": 4, "block_out_channels": (4, 4, 4, 4), "layers_per_block": 1, "norm_num_groups": 2,
        "sample_size": 128,  # latents must be 16×16, 6 frames, at least: see TINY_LATENTS
    },
    "AutoencoderKLCosmos": {
        "latent_channels": 4, "encoder_block_out_channels": (8, 8, 8, 8), "decode_block_out_channels": (8, 8, 8, 8),
        "num_layers": 1, "attention_resolutions": (8,), "resolution": 32,
    },
    "AutoencoderKLTemporalDecoder": {
        "block_out_channels": (32, 32, 32, 32), "down_block_types": ("DownEncoderBlock2D",) * 4,
    },
}  # fmt: skip
# Latent frames, height and width that a class decodes in its tests. Allegro decodes whole tiles only.
TINY_LATENTS: dict[str, tuple[int, int, int]] = {
    **dict.fromkeys(TINY, (5, 3, 4)), "AutoencoderKLHunyuanVideo15": (5, 2, 3), "AutoencoderKLAllegro": (6, 16, 16),
}  # fmt: skip
# Other published forms of these classes: name -> class, constructor arguments.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "Wan2.2": (
        "AutoencoderKLWan",
        {**TINY["AutoencoderKLWan"], "decoder_base_dim": 16, "z_dim": 6, "is_residual": True, "patch_size": 2,
         "in_channels": 12, "out_channels": 12, "temperal_downsample": [False, True, True],
         "scale_factor_spatial": 16},
    ),
    "LTX-0.9.1": (
        "AutoencoderKLLTXVideo",
        {**TINY["AutoencoderKLLTXVideo"], "timestep_conditioning": True, "decoder_block_out_channels": (8, 16, 32),
         "decoder_layers_per_block": (1, 1, 1, 1), "decoder_spatio_temporal_scaling": (True, True, True),
         "decoder_inject_noise": (True, False, False, False), "upsample_residual": (True, True, True),
         "upsample_factor": (2, 2, 2)},
    ),
    "CogVideoX-1.5-I2V": (
        "AutoencoderKLCogVideoX",
        {**TINY["AutoencoderKLCogVideoX"], "scaling_factor": 0.7, "invert_scale_latents": True},
    ),
    "Mochi-scaled": ("AutoencoderKLMochi", {**TINY["AutoencoderKLMochi"], "scaling_factor": 1.25}),
    "Cosmos-2.5": ("AutoencoderKLCosmos", {**TINY["AutoencoderKLCosmos"], "scaling_factor": 0.5}),
}  # fmt: skip
# Per-channel statistics of the latents are part of the config, or of the weights (LTX).
_LISTS = ("AutoencoderKLWan", "AutoencoderKLMochi", "AutoencoderKLCosmos")


def make_vae(name: str, folder: Path, seed: int = 0, **changes: Any) -> Path:
    """Save a model of TINY or VARIANTS to `folder`, with random weights and statistics of its latents."""
    kind, kwargs = VARIANTS[name] if name in VARIANTS else (name, TINY[name])
    kwargs = {**kwargs, **changes}
    draw = torch.Generator().manual_seed(seed)
    channels = kwargs.get("latent_channels", kwargs.get("z_dim", 4))
    # Cosmos keeps a mean for each channel and latent frame.
    length = channels * (16 if kind == "AutoencoderKLCosmos" else 1)
    mean, std = torch.randn(length, generator=draw), 0.5 + torch.rand(length, generator=draw)
    if kind in _LISTS:
        kwargs = {"latents_mean": mean.tolist(), "latents_std": std.tolist(), **kwargs}
    torch.manual_seed(seed)
    model = getattr(diffusers, kind)(**kwargs)
    for _, parameter in sorted(model.named_parameters()):
        if parameter.unique().numel() == 1:  # zeros and ones, as they are made, would hide what is left out
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=draw)
    if kind == "AutoencoderKLLTXVideo":
        model.latents_mean.copy_(mean)
        model.latents_std.copy_(std)
    model.save_pretrained(folder)
    assert json.loads((Path(folder) / "config.json").read_text())["_class_name"] == kind
    return Path(folder)
