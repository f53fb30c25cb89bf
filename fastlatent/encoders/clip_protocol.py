"""What every encoder of video clips offers `fastlatent encode`: video autoencoders and teachers alike."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor, nn


class ClipEncoder(Protocol):
    """uint8 clips → rows of a dataset.

    payload: "tokens" of a teacher, "moments" of an autoencoder with a posterior, else "latents". size_multiple: what
    height and width must be divisible by. clip: (frames, height, width) that it was made for: a teacher takes no
    others; None of autoencoders.
    """

    payload: str
    size_multiple: int
    clip: tuple[int, int, int] | None

    def row_shape(self, frames: int, height: int, width: int) -> tuple[int, ...]:
        """Of one clip's row: (N, D) tokens, (2C, t, h, w) moments or (C, t, h, w) latents.

        Raises:
            ValueError: a number of frames or a size that it does not take; the message names the nearest that it does.
        """
        ...

    def prepare(self, clips: Tensor) -> Tensor:
        """uint8 [B, T, H, W, 3], on the encoder's device → float32 [B, 3, T, H, W], normalised as it was trained."""
        ...

    def encode(self, pixels: Tensor) -> Tensor:
        """What `prepare` gives → float32 [B, *row_shape]. In memory that does not grow with T where it can."""
        ...

    def encoder(self) -> nn.Module:
        """`encode` as a module for engines to compile: pixels in the weights' dtype → rows in it.

        Raises:
            ValueError: it runs eagerly only.
        """
        ...

    def upcast(self) -> ClipEncoder:
        """The same encoder in float32, for batches that overflow in half precision; its own copy of the weights."""
        ...

    def identity(self) -> dict[str, Any]:
        """What changes its output, as JSON: class, sizes, layer, projection …, and the digest of its weights."""
        ...
