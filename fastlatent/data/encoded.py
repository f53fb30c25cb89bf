"""Latents of images that are encoded every time anew, in place of a latent dataset."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fastlatent.data.images import ImageLoader

# Images that are encoded at a time: at 256 x 256, each activation of an autoencoder's first level (128 channels,
# float32) takes 1 GiB for 32 images, and 8 GiB for a batch of 256.
ENCODED_TOGETHER = 32


class EncodedLoader:
    """What a LatentLoader gives, made of images when it is asked for.

    Args:
        images: reads ahead in its own threads.
        encode: pixels float32 [B, channels, H, W] in [−1, 1] → mean‖logvar [B, 2C, h, w], or latents [B, C, h, w]; B is
            at most ENCODED_TOGETHER. Runs in the caller's thread, without gradients.
        has_posterior: whether that is mean‖logvar.
    """

    def __init__(self, images: ImageLoader, encode: Callable[[Tensor], Tensor], has_posterior: bool) -> None:
        self.images, self.encode = images, encode
        self.payload = "moments" if has_posterior else "latents"

    @property
    def steps_per_epoch(self) -> int:
        """Steps in which every image is seen once."""
        return self.images.steps_per_epoch

    @property
    def left_out(self) -> Mapping[str, str]:
        """Files that this process could not use so far → why."""
        return self.images.left_out

    def batch(self, step: int) -> dict[str, Any]:
        """The images' batch of a step with moments [B, 1, 2C, h, w] or latents [B, 1, C, h, w], float32, for pixels."""
        batch = self.images.batch(step)
        with torch.no_grad():
            encoded = [self.encode(pixels).float() for pixels in batch.pop("pixels").split(ENCODED_TOGETHER)]
        return {self.payload: torch.cat(encoded).unsqueeze(1), **batch}
