"""Batches of images straight from files, for training an autoencoder."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastlatent.data.order import BatchOrder
from fastlatent.diffusion.noise import philox
from fastlatent.media.images import ImageError, read_image, to_model_range
from fastlatent.media.transforms import center_crop
from fastlatent.sources.items import Item

READERS = 4


class ImageLoader:
    """Shuffled batches of centre-cropped images in [−1, 1].

    A file that cannot be decoded is left out of its batch and kept in `failures` (key → reason).

    Args:
        items: the images.
        batch_size: images per step.
        size: side of the crop.
        channels: 1 or 3.
        mirror: mirror half of the images at random, as a function of (seed, epoch, position).
    """

    def __init__(
        self, items: Sequence[Item], batch_size: int, *, size: int, channels: int, mirror: bool, seed: int
    ) -> None:
        self.items, self.size, self.channels, self.mirror, self.seed = items, size, channels, mirror, seed
        self.order = BatchOrder(len(items), batch_size, seed=seed)
        self.failures: dict[str, str] = {}
        self._pool = ThreadPoolExecutor(READERS, thread_name_prefix="images")

    def batch(self, step: int) -> Tensor:
        """float32 [B, channels, size, size] of a step counted from 0; B is smaller where files failed.

        Raises:
            ValueError: no image of the batch could be read.
        """
        epoch, indices = self.order.indices(step)
        flips = (
            philox(self.seed, int(indices[0]), epoch).random(len(indices)) < 0.5
            if self.mirror
            else [False] * len(indices)
        )
        images = [
            image[..., ::-1] if flip else image
            for image, flip in zip(self._pool.map(self._read, indices.tolist()), flips, strict=True)
            if image is not None
        ]
        if not images:
            raise ValueError(
                f"no image of step {step} could be read; first: "
                + "; ".join(f"{key}: {reason}" for key, reason in list(self.failures.items())[:3])
            )
        return torch.from_numpy(np.stack(images))

    def _read(self, index: int) -> np.ndarray | None:
        item = self.items[index]
        try:
            pixels, _ = center_crop(read_image(Path(item.place).read_bytes(), channels=self.channels), self.size)
        except (ImageError, OSError) as error:
            self.failures[item.key] = str(error)
            return None
        return to_model_range(pixels)
