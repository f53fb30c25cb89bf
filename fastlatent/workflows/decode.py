"""latents → images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastlatent.config import DecodeConfig
from fastlatent.data.latents import LatentDataset
from fastlatent.encoders.load import load_autoencoder
from fastlatent.encoders.protocol import Autoencoder
from fastlatent.pipeline.interrupt import StopRequest
from fastlatent.pipeline.progress import Progress
from fastlatent.store.provenance import differences
from fastlatent.workflows.image_files import ImageFiles, decode_batch
from fastlatent.workflows.latent_files import read_latent_file
from fastlatent.workflows.runtime import DTYPES, keep_config, set_up


def decode(config: DecodeConfig) -> None:
    """Decode a latent dataset or a file of sampled latents; see DecodeConfig."""
    device = set_up(config.device, config.threads)
    path = Path(config.latents)
    output = Path(config.output_dir) if config.output_dir else path.with_name(f"{path.stem}-images")
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

        def read(begin: int, end: int) -> Tensor:
            return dataset_means(dataset, begin, end)

    else:
        file = read_latent_file(path)
        latents, made_by = file.raw(), file.vae
        names = file.names()[: config.limit or len(latents)]
        channels = latents.shape[1]

        def read(begin: int, end: int) -> Tensor:
            return latents[begin:end]

    vae = load_matching_autoencoder(
        config.vae, made_by, channels, device, DTYPES[config.dtype], allow_other=config.allow_other_vae
    )
    files = ImageFiles(output, bit_depth=int(config.bit_depth))
    keep_config(output / "decode.yaml", config)
    with StopRequest() as stop, Progress("decode", len(names), "images") as progress:
        for begin in range(0, len(names), config.batch_size):
            stop.check()
            pixels = decode_batch(vae, read(begin, min(begin + config.batch_size, len(names))))
            files.write(begin, pixels)
            progress.advance(len(pixels))
    files.finish(names, columns=config.columns)
    print(f"{output}: {len(names)} images, sheet.png")


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
