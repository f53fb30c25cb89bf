"""Scaled latents and raw ones: raw = scaled·std + mean, as an autoencoder's config has it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastlatent.pipeline.checkpoints import newest_first


def read_scaling(path: Path, channels: int, asked: str) -> tuple[Tensor, Tensor]:
    """(mean, std), float64 [C] or [], of the autoencoder at `path`; `asked`: the flag that wants them, for messages.

    Raises:
        ValueError: it has no factors of its own (those that diffusers would fill in belong to other autoencoders), or
            they do not fit.
    """
    folder = next((f for f in newest_first(path) if (f / "config.json").is_file()), None)
    config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8")) if folder else {}
    factor, mean, std = (config.get(name) for name in ("scaling_factor", "latents_mean", "latents_std"))
    if (factor is None and std is None) or config.get("_class_name") == "AutoencoderRAE":  # which scales by itself
        raise ValueError(
            f"{asked}: --vae {path} names no scaling_factor and no latents_std in a config.json; name the "
            "autoencoder's diffusers folder, or undo the scaling first"
        )
    try:
        shift = torch.tensor(mean or config.get("shift_factor") or 0.0, dtype=torch.float64)
        scale = torch.tensor(std or 1.0, dtype=torch.float64) / (factor or 1.0)
        fit = all(tuple(one.shape) in ((), (channels,)) for one in (shift, scale))
    except (TypeError, ValueError):
        fit = False
    if not fit:
        raise ValueError(
            f"{asked}: {folder}/config.json: expected a number or {channels} numbers as scaling_factor, shift_factor, "
            f"latents_mean and latents_std, got {(factor, config.get('shift_factor'))}, {mean} and {std}"
        )
    return shift, scale
