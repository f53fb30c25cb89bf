"""diffusers' AutoencoderKL behind the Autoencoder protocol."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file
from torch import Tensor

from fastlatent.pipeline.checkpoints import resolve

WEIGHTS = "diffusion_pytorch_model.safetensors"
# Config entries of the model that is trained on the latents; they change no byte of the output.
_NOT_IDENTITY = {"scaling_factor", "shift_factor", "latents_mean", "latents_std"}


class KLAutoencoder:
    """An AutoencoderKL for encoding and decoding; evaluation mode, no gradients.

    Args:
        model: in the dtype and on the device that it runs in.
        weights_digest: SHA-256 of the tensors as they are stored, whatever dtype the model runs in.
    """

    def __init__(self, model: AutoencoderKL, weights_digest: str) -> None:
        self.model = model.eval().requires_grad_(False)
        self.weights_digest = weights_digest
        self.pixel_channels: int = model.config.in_channels
        self.latent_channels: int = model.config.latent_channels
        self.downsample: int = 2 ** (len(model.config.block_out_channels) - 1)

    @torch.inference_mode()
    def encode(self, pixels: Tensor) -> Tensor:
        posterior = self.model.encode(pixels.to(self.model.device, self.model.dtype)).latent_dist
        return torch.cat([posterior.mean, posterior.logvar], dim=1).float()

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> Tensor:
        return self.model.decode(latents.to(self.model.device, self.model.dtype)).sample.float()

    def identity(self) -> dict[str, Any]:
        # diffusers' own notes begin with an underscore: paths, versions, and a list whose order changes by process.
        config = {k: v for k, v in self.model.config.items() if k not in _NOT_IDENTITY and not k.startswith("_")}
        return {
            "class": "AutoencoderKL",
            "config": json.loads(json.dumps(config, sort_keys=True)),
            "weights": self.weights_digest,
        }


def load_autoencoder(
    path: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> KLAutoencoder:
    """Load a diffusers AutoencoderKL folder, or the newest checkpoint of a `train vae` run.

    Raises:
        ValueError: the folder is not there, holds something else, or its weights do not fit its config.
    """
    folder = resolve(path, WEIGHTS, "autoencoder")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"autoencoder: {folder / 'config.json'} is not JSON: {error}") from None
    name = config.get("_class_name") if isinstance(config, dict) else None
    if name != "AutoencoderKL":
        raise ValueError(f"autoencoder: expected {folder}/config.json of an AutoencoderKL, got _class_name {name!r}")
    try:
        model, info = AutoencoderKL.from_pretrained(
            folder, local_files_only=True, torch_dtype=dtype, output_loading_info=True
        )
        digest = tensors_digest(load_file(folder / WEIGHTS))
    except Exception as error:  # diffusers and safetensors raise many kinds; every one means this folder is unusable
        raise ValueError(f"autoencoder: {folder} does not load: {' '.join(str(error).split())[:300]}") from error
    # diffusers fills what is missing with random numbers and only warns.
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[what]:
            raise ValueError(
                f"autoencoder: {folder / WEIGHTS} does not fit its config.json: {what} "
                f"{sorted(map(str, info[what]))[:3]}"
            )
    return KLAutoencoder(model.to(device), digest)


def tensors_digest(tensors: dict[str, Tensor]) -> str:
    """SHA-256 of CPU tensors, over names, dtypes, shapes and contents, in the order of the names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
