"""The one way to an autoencoder: a folder of diffusers, a run of `train vae`, or a published checkpoint file."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL

from fastlatent.encoders.diffusers_autoencoders import DiffusersAutoencoder, load_folder
from fastlatent.encoders.ldm_keys import from_ldm, is_ldm
from fastlatent.encoders.protocol import Autoencoder
from fastlatent.encoders.sigma_vae import FILE as SIGMA_FILE
from fastlatent.encoders.sigma_vae import SigmaVAE, sigma_vae
from fastlatent.encoders.weights import SUFFIXES, load_into, read_file, tensors_digest
from fastlatent.pipeline.checkpoints import newest_first


def load_autoencoder(
    path: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> DiffusersAutoencoder | SigmaVAE:
    """Load an image autoencoder.

    Args:
        path: a diffusers folder (config.json and weights), a run of `train vae` (its newest checkpoint), or a file
            (.ckpt, .pt, .pth, .bin, .safetensors) with the weights of a latent-diffusion AutoencoderKL such as KL-16
            or of a σ-VAE.

    Raises:
        ValueError: nothing is there, it is not for images, or its weights do not fit.
    """
    path = Path(path)
    for folder in newest_first(path):
        if (folder / SIGMA_FILE).is_file():
            return _load_file(folder / SIGMA_FILE, device, dtype)
    if not path.is_file() or path.suffix not in SUFFIXES:
        return load_folder(path, device, dtype)
    return _load_file(path, device, dtype)


def _load_file(file: Path, device: torch.device | str, dtype: torch.dtype) -> DiffusersAutoencoder | SigmaVAE:
    def reload() -> Autoencoder:
        return _load_file(file, device, torch.float32)

    state, config = read_file(file)
    if config is not None:
        return sigma_vae(file, config, state, device, dtype, reload)
    if not is_ldm(state):
        raise ValueError(
            f"autoencoder: expected weights of an AutoencoderKL such as encoder.down.0.block.0.conv1.weight in {file}, "
            f"got {min(state)}; of a diffusers autoencoder, name the folder with its config.json"
        )
    try:
        sizes, state = from_ldm(state)
    except ValueError as error:
        raise ValueError(f"autoencoder: {file}: {error}") from None
    with torch.device("meta"):
        model = AutoencoderKL(**sizes)
    load_into(model, state, file)
    return DiffusersAutoencoder(model.to(device, dtype), tensors_digest(state), reload)
