"""What sample and decode leave: images/NNNNNN.png (or .jpg …), images.jsonl, sheet.png and samples.npz."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastlatent.encoders.protocol import Autoencoder
from fastlatent.media.images import to_uint8
from fastlatent.media.sheets import SEPARATOR_GREY, save_sheet
from fastlatent.media.writers import SUFFIXES, image_bytes, import_tifffile, to_uint16, to_unit, write_npz
from fastlatent.sampling.graphs import batch_bucket
from fastlatent.store.files import TEMPORARY, publish, write_atomic
from fastlatent.workflows.runtime import available_cores

# A sheet of more images is too large to look at.
SHEET_IMAGES = 400
SHEET_SIDE = 256  # pixels of an image in it: 400 images of 1024² would be a picture of 1.3 GB
NPZ, SHEET = "samples.npz", "sheet.png"
# A PNG of 256² takes 10 ms to compress, a GPU a quarter of that to decode its latent.
WRITERS = 16
_NUMBERED = re.compile(rf"\d{{6,}}({'|'.join(map(re.escape, SUFFIXES.values()))})")


class ImageFiles:
    """The numbered images of a folder. Several processes may write different numbers; one of them finishes.

    Args:
        output: the folder; created.
        format: png, jpeg (quality 95, 4:4:4), webp (lossless) or tiff (float32: 0 is black, 1 white, what the
            autoencoder gives beyond them is kept).
        bit_depth: of PNG files, 8 or 16.

    Raises:
        ValueError: the folder has such files that are not of an earlier run, or the format has no 16 bits.
        MissingPackage: TIFF without tifffile.
    """

    def __init__(self, output: Path, *, format: str = "png", bit_depth: int = 8) -> None:
        if bit_depth != 8 and format != "png":
            raise ValueError(f"--bit-depth {bit_depth} is for PNG; {format} has its own: leave it out, or --format png")
        if format == "tiff":
            import_tifffile()
        self.output, self.format, self.bit_depth = output, format, bit_depth
        self.folder, self.listing = output / "images", output / "images.jsonl"
        # Looked for first: a process beside this one makes the list before all else.
        there = [path for path in (self.listing, self.folder, output / NPZ, output / SHEET) if path.exists()]
        if there and not _is_ours(self.listing):
            raise ValueError(f"{there[0]} is not of an earlier run of sample or decode; write to another folder")
        output.mkdir(parents=True, exist_ok=True)
        if not self.listing.exists():
            write_atomic(self.listing, b"")  # from here on the images are ours, also after an interruption
        self.folder.mkdir(exist_ok=True)

    def write(self, numbers: Sequence[int] | np.ndarray, pixels: Tensor) -> None:
        """Write float [B, C, H, W], nominally in [−1, 1], as the images of these numbers; several threads compress.

        Raises:
            ValueError: a pixel is NaN or infinite.
        """
        if not pixels.isfinite().all():
            rows = f"{numbers[0]} to {numbers[-1]}"
            raise ValueError(f"decoding rows {rows} gave NaN or infinity; try --dtype float32")
        quantize = to_unit if self.format == "tiff" else to_uint16 if self.bit_depth == 16 else to_uint8
        images = quantize(pixels.numpy())

        def one(place: int) -> None:
            write_atomic(self._path(int(numbers[place])), image_bytes(images[place], self.format))

        with ThreadPoolExecutor(min(len(images), WRITERS, available_cores())) as pool:
            list(pool.map(one, range(len(images))))

    def finish(self, names: list[str], *, columns: int, npz: bool = False, labels: Tensor | None = None) -> None:
        """Write list and sheet, once images 0 to len(names) − 1 are there; delete what earlier runs left.

        Args:
            columns: of the sheet.
            npz: also write samples.npz; the images are PNG of 8 bits.
            labels: int64 [N] for it, or None.
        """
        named = {self._path(i).name: name for i, name in enumerate(names)}
        lines = [json.dumps({"file": f"images/{file}", "name": name}) + "\n" for file, name in named.items()]
        write_atomic(self.listing, "".join(lines).encode())
        for file in os.scandir(self.folder):  # of a longer list, of another format, of a run that was killed
            if file.name.startswith(TEMPORARY) or (_NUMBERED.fullmatch(file.name) and file.name not in named):
                os.unlink(file)
        for path in (self.output / NPZ, *self.output.glob(f"{TEMPORARY}{NPZ}-*")):
            path.unlink(missing_ok=True)
        if npz:
            self._write_npz(len(names), labels)
        save_sheet(self.output / SHEET, _cells(self._read(min(len(names), SHEET_IMAGES))), columns=columns)

    def _write_npz(self, count: int, labels: Tensor | None) -> None:
        def write(fd: int) -> str:
            with os.fdopen(fd, "wb", closefd=False) as file:
                write_npz(file, self._read(count), count, None if labels is None else labels.numpy())
            return NPZ

        publish(self.output, NPZ, write)

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:06d}{SUFFIXES[self.format]}"

    def _read(self, count: int) -> Iterator[np.ndarray]:
        """uint8 [H, W, C] of the first images; 16 bits are cut to 8, floats rounded."""
        for i in range(count):
            if self.format == "tiff":
                values = np.rint(import_tifffile().imread(self._path(i)).clip(0, 1) * 255).astype(np.uint8)
            else:
                with Image.open(self._path(i)) as image:
                    values = np.asarray(image)
            if values.dtype != np.uint8:
                values = (values.astype(np.uint16) >> 8).astype(np.uint8)
            yield values if values.ndim == 3 else values[:, :, None]


def _is_ours(listing: Path) -> bool:
    """Whether this is a list of ours: there are folders of images with others of that name."""
    try:
        with open(listing, encoding="utf-8") as file:
            line = file.readline()
        return not line or json.loads(line).keys() == {"file", "name"}
    except (FileNotFoundError, AttributeError, ValueError):
        return False


def _shrunk(image: np.ndarray) -> np.ndarray:
    """uint8 [H, W, C] by the whole factor that makes both sides at most SHEET_SIDE."""
    factor = -(-max(image.shape) // SHEET_SIDE)
    if factor == 1:
        return image
    small = np.asarray(Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image).reduce(factor))
    return small.reshape(*small.shape[:2], -1)


def _cells(images: Iterator[np.ndarray]) -> np.ndarray:
    """uint8 [N, H, W, C]: the images, smaller ones in the middle of a cell of the largest height and width."""
    cells = [_shrunk(image) for image in images]
    height, width = (max(cell.shape[axis] for cell in cells) for axis in (0, 1))

    def padding(size: int, whole: int) -> tuple[int, int]:
        return (whole - size) // 2, whole - size - (whole - size) // 2

    return np.stack(
        [
            np.pad(
                cell,
                (padding(cell.shape[0], height), padding(cell.shape[1], width), (0, 0)),
                constant_values=SEPARATOR_GREY,
            )
            for cell in cells
        ]
    )


def decode_batch(vae: Autoencoder, latents: Tensor) -> Tensor:
    """Raw latents [B, C, h, w] → float32 pixels [B, channels, H, W] on the CPU.

    The batch is padded to a bucket: the last bits of a convolution depend on how many rows it has.
    """
    rows = len(latents)
    padding = latents.new_zeros(batch_bucket(rows) - rows, *latents.shape[1:])
    return vae.decode(torch.cat([latents, padding]))[:rows].cpu()
