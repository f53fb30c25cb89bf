"""latents → images."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastlatent.config import DecodeConfig
from fastlatent.data.latents import LatentDataset
from fastlatent.encoders.load import load_autoencoder
from fastlatent.encoders.protocol import Autoencoder
from fastlatent.media.images import to_uint8
from fastlatent.media.sheets import save_png, save_sheet
from fastlatent.pipeline.interrupt import StopRequest
from fastlatent.pipeline.progress import Progress
from fastlatent.store.files import write_atomic
from fastlatent.store.provenance import differences
from fastlatent.workflows.latent_files import read_latent_file
from fastlatent.workflows.runtime import DTYPES, keep_config, set_up

# A sheet of more images is too large to look at.
SHEET_IMAGES = 400


def decode(config: DecodeConfig) -> None:
    """Decode a latent dataset or a file of sampled latents; see DecodeConfig."""
    device = set_up(config.device, config.threads)
    path, output = Path(config.latents), Path(config.output)
    if not path.exists():
        raise ValueError(
            f"{path} does not exist; expected a dataset folder or a .safetensors file of `fastlatent sample`"
        )
    made_by: dict[str, Any] | None
    if path.is_dir():
        dataset = LatentDataset(path)
        made_by = dataset.autoencoder
        names = [dataset.store.key(i) for i in range(min(len(dataset), config.limit or len(dataset)))]
        check_images(dataset)
        channels = dataset.store.buckets[0].channels
        read: Callable[[int, int], Tensor] = functools.partial(dataset_means, dataset)
    else:
        file = read_latent_file(path)
        latents, made_by = file.raw(), file.vae
        names = file.names()[: config.limit or len(latents)]
        channels = latents.shape[1]
        read = functools.partial(rows_of, latents)
    vae = load_matching_autoencoder(
        config.vae, made_by, channels, device, DTYPES[config.dtype], allow_other=config.allow_other_vae
    )
    output.mkdir(parents=True, exist_ok=True)
    keep_config(output / "decode.yaml", config)
    decode_to_folder(read, vae, output, names=names, batch_size=config.batch_size, columns=config.columns)


def check_images(dataset: LatentDataset) -> None:
    """Raise ValueError unless the rows are latents of images, all of one shape."""
    if dataset.store.payload == "tokens" or len(dataset.row_shape) != 4:
        path, payload = dataset.store.path, dataset.store.payload
        raise ValueError(f"{path}: expected latents of images, got {payload} {dataset.row_shape}")


def dataset_means(dataset: LatentDataset, begin: int, end: int) -> Tensor:
    """Posterior means float32 [end − begin, C, h, w] of a dataset's rows, not mirrored."""
    batch = dataset.gather(np.arange(begin, end))
    values = batch[dataset.store.payload][:, 0].float()
    if "scale" in batch:
        scale = batch["scale"][:, 0]
        values *= scale.reshape(*scale.shape, *[1] * (values.ndim - scale.ndim))
    return values[:, : dataset.store.buckets[0].channels]


def rows_of(latents: Tensor, begin: int, end: int) -> Tensor:
    """What decode_to_folder reads where all latents are in memory."""
    return latents[begin:end]


def load_matching_autoencoder(
    path: str | None,
    made_by: dict[str, Any] | None,
    channels: int,
    device: torch.device,
    dtype: torch.dtype,
    *,
    allow_other: bool,
) -> Autoencoder:
    """The autoencoder at `path`, or the one the latents' provenance names.

    Raises:
        ValueError: none is named, it is not there, it has other latents, or it is not the one that made these.
    """
    if path is None:
        path = (made_by or {}).get("path")
        if path is None:
            raise ValueError("these latents do not say which autoencoder made them; name it with --vae PATH")
        if not Path(path).exists():
            raise ValueError(
                f"the autoencoder that made these latents was at {path} and is gone; name it with --vae PATH"
            )
    vae = load_autoencoder(path, device, dtype)
    if vae.latent_channels != channels:
        raise ValueError(
            f"--vae {path}: expected an autoencoder with {channels} latent channels, it has {vae.latent_channels}"
        )
    if made_by is not None and not allow_other:
        other = differences({k: v for k, v in made_by.items() if k != "path"}, vae.identity())
        if other:
            raise ValueError(
                f"--vae {path} is not the autoencoder that made these latents (name that one, or add "
                f"--allow-other-vae):\n  " + "\n  ".join(other)
            )
    return vae


def decode_to_folder(
    read: Callable[[int, int], Tensor],
    vae: Autoencoder,
    output: Path,
    *,
    names: list[str],
    batch_size: int,
    columns: int,
) -> None:
    """Write images/NNNNNN.png, images.jsonl (which is which) and sheet.png.

    Args:
        read: read(begin, end) gives raw latents [end − begin, C, h, w]; one batch at a time is in memory.
        names: one for each latent.
    """
    folder, listing = output / "images", output / "images.jsonl"
    if folder.exists() and not listing.exists():
        raise ValueError(f"{folder} is not of an earlier decode (no {listing.name} beside it); use another --output")
    folder.parent.mkdir(parents=True, exist_ok=True)
    if not listing.exists():
        write_atomic(listing, b"")  # from here on the images are ours, also after an interruption
    folder.mkdir(exist_ok=True)
    sheet: list[np.ndarray] = []
    lines: list[str] = []
    with StopRequest() as stop, Progress("decode", len(names), "images") as progress:
        for begin in range(0, len(names), batch_size):
            stop.check()
            pixels = vae.decode(read(begin, min(begin + batch_size, len(names)))).cpu()
            if not pixels.isfinite().all():
                raise ValueError(
                    f"decoding rows {begin} to {begin + len(pixels) - 1} gave NaN or infinity; try --dtype float32"
                )
            images = to_uint8(pixels.numpy())
            for i, image in enumerate(images, begin):
                save_png(folder / f"{i:06d}.png", image)
                lines.append(json.dumps({"file": f"images/{i:06d}.png", "name": names[i]}) + "\n")
            sheet += list(images)[: max(0, SHEET_IMAGES - len(sheet))]
            progress.advance(len(images))
    write_atomic(listing, "".join(lines).encode())
    stale = len(names)  # images of an earlier, longer list
    while (folder / f"{stale:06d}.png").exists():
        (folder / f"{stale:06d}.png").unlink()
        stale += 1
    save_sheet(output / "sheet.png", np.stack(sheet), columns=columns)
    print(f"{output}: {len(names)} images, sheet.png")
