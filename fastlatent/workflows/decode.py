"""latents → images or videos: an experiment's denoising steps, clips, or latents of images."""

from __future__ import annotations

from pathlib import Path

from fastlatent.config import DecodeConfig

# Here, where the command line lets Ctrl-C end the process: inside of torch's import it is swallowed.
from fastlatent.workflows.decode_clips import decode_clips, is_dataset_of_clips
from fastlatent.workflows.decode_experiment import decode_experiment
from fastlatent.workflows.decode_images import decode_images


def decode(config: DecodeConfig) -> int | None:
    """Decode what config.latents is; see DecodeConfig."""
    path = Path(config.latents)
    if (path / "latents").is_dir() or (path / "configs").is_dir():
        return decode_experiment(config)
    if is_dataset_of_clips(path):
        decode_clips(config)
    else:
        decode_images(config)
    return None
