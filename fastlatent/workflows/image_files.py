"""What sample and decode leave: images/NNNNNN.png, images.jsonl, sheet.png and samples.npz."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastlatent.encoders.protocol import Autoencoder
from fastlatent.media.images import to_uint8
from fastlatent.media.sheets import save_png, save_sheet
from fastlatent.media.writers import png16, to_uint16, write_npz
from fastlatent.sampling.graphs import batch_bucket
from fastlatent.store.files import publish, write_atomic

# A sheet of more images is too large to look at.
SHEET_IMAGES = 400
NPZ = "samples.npz"


class ImageFiles:
    """The numbered images of a folder. Several processes may write different numbers; one of them finishes.

    Args:
        output: the folder; created.
        bit_depth: of the PNG files, 8 or 16.

    Raises:
        ValueError: the folder has images that are not of an earlier run.
    """

    def __init__(self, output: Path, *, bit_depth: int = 8) -> None:
        self.output, self.bit_depth = output, bit_depth
        self.folder, self.listing = output / "images", output / "images.jsonl"
        if self.folder.exists() and not self.listing.exists():
            raise ValueError(
                f"{self.folder} is not of an earlier decode (no {self.listing.name} beside it); use another --output"
            )
        output.mkdir(parents=True, exist_ok=True)
        if not self.listing.exists():
            write_atomic(self.listing, b"")  # from here on the images are ours, also after an interruption
        self.folder.mkdir(exist_ok=True)

    def write(self, begin: int, pixels: Tensor) -> None:
        """Write float [B, C, H, W], nominally in [−1, 1], as the images begin, begin + 1, …

        Raises:
            ValueError: a pixel is NaN or infinite.
        """
        if not pixels.isfinite().all():
            raise ValueError(
                f"decoding rows {begin} to {begin + len(pixels) - 1} gave NaN or infinity; try --dtype float32"
            )
        if self.bit_depth == 16:
            for i, image in enumerate(to_uint16(pixels.numpy()), begin):
                write_atomic(self._path(i), png16(image))
        else:
            for i, image in enumerate(to_uint8(pixels.numpy()), begin):
                save_png(self._path(i), image)

    def finish(self, names: list[str], *, columns: int, npz: bool = False, labels: Tensor | None = None) -> None:
        """Write list and sheet, once images 0 to len(names) − 1 are there; delete what an earlier run leaves.

        Args:
            columns: of the sheet.
            npz: also write samples.npz; the images are of 8 bits.
            labels: int64 [N] for it, or None.
        """
        lines = [json.dumps({"file": f"images/{i:06d}.png", "name": name}) + "\n" for i, name in enumerate(names)]
        write_atomic(self.listing, "".join(lines).encode())
        stale = len(names)  # images of an earlier, longer list
        while self._path(stale).exists():
            self._path(stale).unlink()
            stale += 1
        (self.output / NPZ).unlink(missing_ok=True)
        if npz:
            self._write_npz(len(names), labels)
        sheet = list(self._read(min(len(names), SHEET_IMAGES)))
        save_sheet(self.output / "sheet.png", np.stack(sheet), columns=columns)

    def _write_npz(self, count: int, labels: Tensor | None) -> None:
        def write(fd: int) -> str:
            with os.fdopen(fd, "wb", closefd=False) as file:
                write_npz(file, self._read(count), count, None if labels is None else labels.numpy())
            return NPZ

        publish(self.output, NPZ, write)

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:06d}.png"

    def _read(self, count: int) -> Iterator[np.ndarray]:
        """uint8 [H, W, C] of the first images; 16 bits are cut to 8."""
        for i in range(count):
            with Image.open(self._path(i)) as image:
                values = np.asarray(image)
            if values.dtype != np.uint8:
                values = (values.astype(np.uint16) >> 8).astype(np.uint8)
            yield values if values.ndim == 3 else values[:, :, None]


def decode_batch(vae: Autoencoder, latents: Tensor) -> Tensor:
    """Raw latents [B, C, h, w] → float32 pixels [B, channels, H, W] on the CPU.

    The batch is padded to a bucket: the last bits of a convolution depend on how many rows it has.
    """
    rows = len(latents)
    padding = latents.new_zeros(batch_bucket(rows) - rows, *latents.shape[1:])
    return vae.decode(torch.cat([latents, padding]))[:rows].cpu()
