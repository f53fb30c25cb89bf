"""Video autoencoders, and image ones frame by frame, as encoders of clips for `fastlatent encode`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastlatent.encoders.diffusers_autoencoders import read_config
from fastlatent.encoders.hub import is_hub_id
from fastlatent.encoders.model_folder import find_vae
from fastlatent.encoders.video_autoencoders import DiffusersVideoAutoencoder, load_video_autoencoder
from fastlatent.encoders.video_kinds import VIDEO_KINDS

PAYLOADS = ("moments", "latents")


class VideoClipEncoder:
    """A video autoencoder as a ClipEncoder. Rows are raw: `normalize` belongs to the model that is trained on them.

    Memory does not grow with the number of frames for the classes that diffusers encodes piece by piece, see
    `video_encode_streaming`; with `encode_clips` pixels are uint8 until their turn comes. The last bits of a row depend
    on how many are encoded at once, as those of diffusers do (5e-6 in float32; one video at a time: see there).

    Args:
        autoencoder: of RGB frames.
        payload: "moments", mean‖logvar [2C, t, h, w], or "latents", [C, t, h, w]: the mean, or all that a class without
            a posterior gives.

    Raises:
        ValueError: moments of an autoencoder that has none; grey frames.
    """

    clip: tuple[int, int, int] | None = None

    def __init__(self, autoencoder: DiffusersVideoAutoencoder, *, payload: str = "moments") -> None:
        name = autoencoder.identity()["class"]
        if payload not in PAYLOADS:
            raise ValueError(f"expected a payload of {' or '.join(PAYLOADS)}, got {payload!r}")
        if payload == "moments" and not autoencoder.has_posterior:
            raise ValueError(f"{name} encodes to latents, it has no moments: use --payload latents")
        if autoencoder.pixel_channels != 3:
            raise ValueError(
                f"clips are RGB: expected an autoencoder of 3 channels, got {name} of {autoencoder.pixel_channels}"
            )
        self.autoencoder = autoencoder
        self.payload = payload
        self.size_multiple = autoencoder.kind.fixed_size or autoencoder.downsample

    def row_shape(self, frames: int, height: int, width: int) -> tuple[int, ...]:
        channels = self.autoencoder.latent_channels
        grid = self.autoencoder.latent_shape(frames, height, width)
        return (2 * channels if self.payload == "moments" else channels, *grid)

    def prepare(self, clips: Tensor) -> Tensor:
        _check_clips(clips)
        # In the order of diffusers' own pixels: oneDNN computes channels-last tensors otherwise.
        planes = clips.permute(0, 4, 1, 2, 3).to(torch.float32, memory_format=torch.contiguous_format)
        return planes.div_(127.5).sub_(1)

    def encode(self, pixels: Tensor) -> Tensor:
        return self._row(self.autoencoder.encode(pixels))

    def encode_clips(self, clips: Tensor) -> Tensor:
        """uint8 [B, T, H, W, 3], on any device → float32 [B, *row_shape], the bits of `encode(prepare(clips))`.

        Each piece goes to the autoencoder's device and is normalised there when its turn comes.
        """
        _check_clips(clips)
        _, frames, height, width, _ = clips.shape
        device = self.autoencoder.model.device

        def take(start: int, stop: int) -> Tensor:
            return self.prepare(clips[:, start:stop].to(device, non_blocking=True))

        return self._row(self.autoencoder.encode_pieces(take, frames, height, width))

    def _row(self, encoded: Tensor) -> Tensor:
        return encoded if self.payload == "moments" else encoded[:, : self.autoencoder.latent_channels]

    def encoder(self) -> nn.Module:
        raise ValueError(
            f"{self.autoencoder.identity()['class']} encodes videos piece by piece, which no engine compiles: use "
            "--engine eager"
        )

    def upcast(self) -> VideoClipEncoder:
        return VideoClipEncoder(self.autoencoder.upcast(), payload=self.payload)

    def identity(self) -> dict[str, Any]:
        return self.autoencoder.identity()


def _check_clips(clips: Tensor) -> None:
    if clips.dtype != torch.uint8 or clips.ndim != 5 or clips.shape[4] != 3 or not clips.numel():
        raise ValueError(f"expected uint8 clips [B, T, H, W, 3], got {clips.dtype} {list(clips.shape)}")


def load_video_clip_encoder(
    path: str, device: torch.device | str, dtype: torch.dtype, payload: str = "moments"
) -> VideoClipEncoder:
    """Load an autoencoder of videos, or an image one that then encodes frame by frame.

    Args:
        path: a model's folder, its vae/ folder or a hub id, as `find_vae` takes them.

    Raises:
        ValueError: nothing is there, it encodes no frames, or it does not have the payload.
    """
    return VideoClipEncoder(load_video_autoencoder(find_vae(path, near=Path.cwd()), device, dtype), payload=payload)


def is_video_model(path: str) -> bool:
    """Whether an autoencoder's folder, a model's folder or a hub id (owner/name) has a config.json of a video class.

    Nothing is loaded, but what only the hub has is downloaded. False of files and of all else.

    Raises:
        ValueError: nothing here has that name, nor has the hub, or it is not reached; config.json is not JSON.
    """
    given = Path(os.path.expanduser(path))
    if not given.exists() and is_hub_id(path) and "/" in path:
        given = find_vae(path, near=Path.cwd())
    # In the order of `find_vae`.
    config = next((folder for folder in (given / "vae", given) if (folder / "config.json").is_file()), None)
    return config is not None and read_config(config).get("_class_name") in VIDEO_KINDS
