"""What every video autoencoder offers to decode stored latents, whole or as a stream of frames."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any, Protocol

from torch import Tensor


class VideoAutoencoder(Protocol):
    """pixels ⇄ raw latents, and raw latents ⇄ what the model's pipeline holds while it denoises.

    pixel_channels: 1 or 3. latent_channels: C. time_stride: frames per latent frame. downsample: pixels per latent,
    along height and width. has_posterior: whether `encode` gives mean‖logvar, or the latent alone. streams: `stream`
    needs no more memory for a longer video, also without tiles. tiles: `stream` has the choice of tiles.
    """

    pixel_channels: int
    latent_channels: int
    time_stride: int
    downsample: int
    has_posterior: bool
    streams: bool
    tiles: bool

    def frames(self, latent_frames: int) -> int:
        """How many frames these latent frames decode to."""
        ...

    def latent_frames(self, frames: int) -> int:
        """The inverse of `frames`; ValueError where no number of latent frames gives that many."""
        ...

    def arrange(self, stored: Tensor, size: tuple[int, int, int] | None) -> Tensor:
        """Latents as the pipeline's callback hands them over, with or without the axis of one batch → [1, C, t, h, w].

        size: (frames, height, width) of the video in pixels where it is known; packed latents [1, S, C] need it.

        Raises:
            ValueError: wrong rank or channels, several videos, or a size that does not fit.
        """
        ...

    def normalize(self, raw: Tensor) -> Tensor:
        """[B, C, t, h, w] raw latents → float32, as the pipeline holds them."""
        ...

    def denormalize(self, latents: Tensor) -> Tensor:
        """[B, C, t, h, w] as the pipeline holds them → float32 raw latents, in the arithmetic of the pipeline."""
        ...

    def normalization(self) -> dict[str, Any]:
        """The numbers of `normalize` as JSON, for records: `identity` leaves them out."""
        ...

    def encode(self, pixels: Tensor) -> Tensor:
        """[B, channels, T, H, W] in [−1, 1] → float32 mean‖logvar [B, 2C, t, h, w], or latents [B, C, t, h, w]."""
        ...

    def decode(self, raw: Tensor) -> Tensor:
        """[B, C, t, h, w] raw latents → float32 [B, channels, T, H, W], nominally in [−1, 1]."""
        ...

    def stream(self, raw: Tensor, *, tiles: bool = False) -> Generator[Tensor, None, None]:
        """[1, C, t, h, w] raw latents → float32 [channels, n, H, W] on the device, one after the other in time.

        In float32 they are what `decode` gives, bit for bit. tiles: for less memory and slightly other pixels, in
        overlapping, blended tiles, and in pieces of time where that is not so anyway; ValueError without the choice.
        """
        ...

    def identity(self) -> dict[str, Any]:
        """What changes its output: class, config without scaling, and the SHA-256 of its tensors' contents."""
        ...
