"""latents → images or videos: an experiment's denoising steps, or latents of images."""

from __future__ import annotations

from pathlib import Path

from fastlatent.config import DecodeConfig


def decode(config: DecodeConfig) -> int | None:
    """Decode what config.latents is; see DecodeConfig."""
    path = Path(config.latents)
    # Imported here: neither needs what the other imports.
    if (path / "latents").is_dir() or (path / "configs").is_dir():
        from fastlatent.workflows.decode_experiment import decode_experiment

        return decode_experiment(config)
    from fastlatent.workflows.decode_images import decode_images

    decode_images(config)
    return None
