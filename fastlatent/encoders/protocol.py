"""What every autoencoder offers to encode, train, sample and decode."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor


class Autoencoder(Protocol):
    """pixels ⇄ latents. Latents are raw: scaling belongs to the model that is trained on them."""

    pixel_channels: int
    latent_channels: int
    downsample: int

    def encode(self, pixels: Tensor) -> Tensor:
        """float [B, channels, H, W] in [−1, 1] → float32 posterior moments mean‖logvar [B, 2C, H/f, W/f]."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """float [B, C, h, w] → float32 pixels [B, channels, h·f, w·f], nominally in [−1, 1]."""
        ...

    def identity(self) -> dict[str, Any]:
        """What changes its output: class, config, and the SHA-256 of its tensors' contents."""
        ...
