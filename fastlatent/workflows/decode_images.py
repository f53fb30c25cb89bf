"""latents of images → image files."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastlatent.config import DecodeConfig, given
from fastlatent.encoders.engines.engine import open_decoder
from fastlatent.encoders.engines.numerics import fix_numerics
from fastlatent.encoders.load import load_autoencoder
from fastlatent.encoders.protocol import Autoencoder
from fastlatent.media.writers import SUFFIXES
from fastlatent.pipeline.ahead import ahead
from fastlatent.pipeline.interrupt import StopRequest
from fastlatent.pipeline.progress import Progress
from fastlatent.sampling.graphs import batch_bucket
from fastlatent.store.provenance import differences
from fastlatent.workflows.encode_setup import engine_cache
from fastlatent.workflows.image_files import ImageFiles, decode_batch
from fastlatent.workflows.latent_inputs import RAW, LatentImages, open_latents
from fastlatent.workflows.latent_scaling import read_scaling
from fastlatent.workflows.runtime import DTYPES, keep_config, set_up

_OF_VIDEOS = ("prompt_filter", "video_filter", "step_filter", "fps", "crf", "scale", "gpus", "force", "verbose")


def decode_images(config: DecodeConfig) -> None:
    """Decode latents of images: a dataset, sampled latents, or files of others (see latent_inputs.EXPECTED).

    The next batch is read while one is decoded and the one before is written.

    Raises:
        ValueError: a setting is for videos, the latents cannot be read or do not say what they are, or the autoencoder
            is not there, does not fit or is not the one that made them.
    """
    format = _format(config)
    device = set_up(config.device, config.threads)
    fix_numerics(tf32=config.dtype == "tf32")
    path = Path(config.latents)
    images = open_latents(path, config.limit)
    are = _latents_are(config, path, images)
    dtype = DTYPES[config.dtype]
    vae = load_matching_autoencoder(
        config.vae, images.made_by, images.channels, device, dtype, allow_other=config.allow_other_vae
    )
    factors = None
    if are != RAW:
        factors = read_scaling(Path(config.vae or ""), vae.latent_channels, "--latents-are scaled")
    print(f"{path}: {images.format}, {len(images.names)} images, latents {_shapes(images)}, {are}")
    if config.dry_run:
        return
    name = os.path.basename(os.path.abspath(path)) if path.is_dir() else path.stem  # a folder's "run.v2" is all name
    output = Path(config.output_dir or Path(os.path.abspath(path)).with_name(f"{name}-images"))
    files = ImageFiles(output, format=format, bit_depth=int(config.bit_depth))
    keep_config(output / "decode.yaml", config)
    decode = _decoder(config, vae, images, device)
    _decode(config, images, lambda latents: decode(_unscaled(latents, factors)), files)
    files.finish(images.names, columns=config.columns)
    print(f"{output}: {len(images.names)} images ({format}), sheet.png")


def _decode(config: DecodeConfig, images: LatentImages, decode: Callable[[Tensor], Tensor], files: ImageFiles) -> None:
    batches = images.batches(config.batch_size)
    written: Future[None] | None = None
    with (
        ThreadPoolExecutor(1) as reader,
        ThreadPoolExecutor(1) as writer,
        StopRequest() as stop,
        Progress("decode", len(images.names), "images") as progress,
    ):
        for numbers, latents in ahead(lambda: next(batches, None), images.read, pool=reader, depth=2):
            stop.check()
            pixels = decode(latents)
            if written is not None:
                written.result()
            written = writer.submit(files.write, numbers, pixels)
            progress.advance(len(numbers))
        if written is not None:
            written.result()


def _decoder(
    config: DecodeConfig, vae: Autoencoder, images: LatentImages, device: torch.device
) -> Callable[[Tensor], Tensor]:
    """Raw latents → pixels, on the CPU both. Eager is what `fastlatent sample` runs, to the last bit."""
    if config.engine == "eager":
        return lambda latents: decode_batch(vae, latents)
    rows = {shape: min(config.batch_size, batch_bucket(len(numbers))) for shape, numbers in images.groups.items()}
    shapes = tuple((count, *shape) for shape, count in rows.items())
    engine = open_decoder(config.engine, vae, shapes=shapes, cache=engine_cache())

    def decode(latents: Tensor) -> Tensor:
        _, *shape = latents.shape
        padding = latents.new_zeros(rows[tuple(shape)] - len(latents), *shape)
        return engine.decode(torch.cat([latents, padding]).to(device))[: len(latents)].cpu()

    return decode


def _format(config: DecodeConfig) -> str:
    """The images' format. ValueError where a setting has no meaning for images."""
    if config.format not in ("auto", *SUFFIXES):
        raise ValueError(f"--format {config.format} is for the videos of an experiment; images: {', '.join(SUFFIXES)}")
    for flag in given(config, _OF_VIDEOS):
        raise ValueError(f"{flag}: is for the videos of an experiment, and {config.latents} is none; leave it out")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("images are decoded by one process, a launcher such as torchrun started several; leave it out")
    if config.dtype == "tf32" and config.engine != "eager":
        raise ValueError("--dtype tf32: engines are compared with float32; use --engine eager, or --dtype bfloat16")
    return "png" if config.format == "auto" else config.format


def _latents_are(config: DecodeConfig, path: Path, images: LatentImages) -> str:
    if images.are == RAW:
        if config.latents_are not in (None, RAW):
            raise ValueError(
                f"--latents-are {config.latents_are}: {path} is {images.format}, which says how it is scaled; leave "
                "it out"
            )
        return RAW
    if config.latents_are is None:
        raise ValueError(
            f"{path}: {images.format} does not say whether its latents are as the autoencoder gives them or scaled "
            "for a model; add --latents-are raw or --latents-are scaled"
        )
    return config.latents_are


def _shapes(images: LatentImages) -> str:
    return ", ".join(str(list(shape)) for shape in images.groups)


def _unscaled(latents: Tensor, factors: tuple[Tensor, Tensor] | None) -> Tensor:
    if factors is None:
        return latents
    mean, std = (factor.reshape(-1, 1, 1) for factor in factors)
    return (latents.double() * std + mean).float()


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
        check_made_by(path, made_by, vae.identity())
    return vae


def check_made_by(path: str, made_by: dict[str, Any], identity: dict[str, Any]) -> None:
    """ValueError, with the difference, where the autoencoder at `path` is not the one that made the latents."""
    other = differences({k: v for k, v in made_by.items() if k != "path"}, identity)
    if other:
        raise ValueError(
            f"--vae {path} is not the autoencoder that made these latents (name that one, or add "
            f"--allow-other-vae):\n  " + "\n  ".join(other)
        )
