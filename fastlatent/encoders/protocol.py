"""What every autoencoder offers to encode, train, sample and decode."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor, nn


class Autoencoder(Protocol):
    """pixels ⇄ latents. Latents are raw: scaling belongs to the model that is trained on them.

    pixel_channels: of an image, 1 or 3. downsample: pixels per latent, along each side. size_multiple: what H and W of
    the pixels must be divisible by (a multiple of `downsample`). has_posterior: whether `encode` gives mean‖logvar
    [B, 2C, h, w], or the latent alone [B, C, h, w]. fixed_size: the one side that its images may have, or None.
    """

    pixel_channels: int
    latent_channels: int
    downsample: int
    size_multiple: int
    has_posterior: bool
    fixed_size: int | None

    def encode(self, pixels: Tensor) -> Tensor:
        """float [B, channels, H, W] in [−1, 1] → float32 moments mean‖logvar [B, 2C, H/f, W/f], or latents."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """float [B, C, h, w] → float32 pixels [B, channels, h·f, w·f], nominally in [−1, 1]."""
        ...

    def encoder(self) -> nn.Module:
        """`encode` as a module for engines to compile or export: pixels in the weights' dtype → moments, same dtype.

        It shares the weights with this autoencoder; pure tensor code of static shapes, no posterior objects.
        """
        ...

    def decoder(self) -> nn.Module:
        """`decode` as such a module: latents in the weights' dtype → pixels, same dtype.

        Raises:
            ValueError: it draws noise to decode.
        """
        ...

    def upcast(self) -> Autoencoder:
        """The same autoencoder in float32, for batches that overflow in half precision; its own copy of the weights."""
        ...

    def identity(self) -> dict[str, Any]:
        """What changes its output: class, config, and the SHA-256 of its tensors' contents."""
        ...
