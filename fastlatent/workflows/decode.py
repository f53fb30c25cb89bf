"""latents → images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastlatent.config import DecodeConfig
from fastlatent.data.latents import LatentDataset
from fastlatent.encoders.autoencoder_kl import load_autoencoder
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
        latents, names, made_by = dataset_means(path, config.limit)
    else:
        file = read_latent_file(path)
        latents, made_by = file.raw(), file.vae
        names = [file.classes[label] if file.classes else str(label) for label in file.labels.tolist()]
    if config.limit:
        latents, names = latents[: config.limit], names[: config.limit]
    vae = load_matching_autoencoder(
        config.vae,
        made_by,
        latents.shape[1],
        device,
        DTYPES[config.dtype],
        allow_other=config.allow_other_vae,
    )
    output.mkdir(parents=True, exist_ok=True)
    keep_config(output / "decode.yaml", config)
    decode_to_folder(latents, vae, output, names=names, batch_size=config.batch_size, columns=config.columns)


def dataset_means(path: Path, limit: int) -> tuple[Tensor, list[str], dict[str, Any]]:
    """Posterior means float32 [N, C, h, w] of a dataset's first rows, their keys, and the autoencoder's record."""
    dataset = LatentDataset(path)
    count = min(len(dataset), limit or len(dataset))
    moments = dataset.gather(np.arange(count))["moments"]
    provenance = dataset.store.provenance
    made_by = {**provenance["hashed"]["vae"], "path": provenance["informational"]["vae_path"]}
    keys = [dataset.store.key(i) for i in range(count)]
    return moments[:, 0].float().chunk(2, dim=1)[0], keys, made_by


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
    latents: Tensor, vae: Autoencoder, output: Path, *, names: list[str], batch_size: int, columns: int
) -> None:
    """Write images/NNNNNN.png, images.jsonl (which is which) and sheet.png. latents: raw [N, C, h, w]."""
    folder, listing = output / "images", output / "images.jsonl"
    old = [json.loads(line)["file"] for line in listing.read_text().splitlines()] if listing.exists() else []
    folder.mkdir(parents=True, exist_ok=True)
    sheet: list[np.ndarray] = []
    lines: list[str] = []
    with StopRequest() as stop, Progress("decode", len(latents), "images") as progress:
        for begin in range(0, len(latents), batch_size):
            stop.check()
            pixels = vae.decode(latents[begin : begin + batch_size]).cpu()
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
    for name in old[len(latents) :]:  # of an earlier, longer list
        (output / name).unlink(missing_ok=True)
    save_sheet(output / "sheet.png", np.stack(sheet), columns=columns)
    print(f"{output}: {len(latents)} images, sheet.png")
