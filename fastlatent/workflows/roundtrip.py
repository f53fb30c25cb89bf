"""One image → latent → image: what an autoencoder keeps of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastlatent.config import EncodeConfig, RoundtripConfig, build
from fastlatent.config.encode import IMAGE_SIZE, IMAGE_TRANSFORM
from fastlatent.encoders.load import load_autoencoder
from fastlatent.encoders.protocol import Autoencoder
from fastlatent.evaluation.reconstruction import WINDOW, psnr, ssim
from fastlatent.media.images import ImageError, read_image, to_model_range, to_uint8
from fastlatent.media.sheets import save_sheet
from fastlatent.media.transforms import Transform, open_transform, transform_name
from fastlatent.sources.open import open_source
from fastlatent.store.reader import PROVENANCE, Dataset
from fastlatent.workflows.encode_images import parse_range
from fastlatent.workflows.encode_setup import kept_settings
from fastlatent.workflows.runtime import DTYPES, keep_config, set_up


@dataclass(frozen=True)
class _Choice:
    """One image. place: for messages. data: the file's bytes. Of a dataset: vae, the path of the autoencoder, and
    hashed, what its provenance says of how it was made."""

    key: str
    place: str
    data: bytes
    vae: str | None = None
    hashed: dict[str, Any] = field(default_factory=dict)


def roundtrip(config: RoundtripConfig) -> None:
    """Print PSNR and SSIM of one image after its way through an autoencoder, and draw both; see RoundtripConfig.

    The latent is the posterior's mean. Both images are compared as uint8, as they are drawn.
    """
    device = set_up(config.device, config.threads)
    output = Path(config.output)
    if output.suffix != ".png":
        raise ValueError(f"--output: expected a name that ends in .png, got {config.output}")
    chosen = _choose(Path(config.image), np.random.default_rng(config.seed), output)
    path = config.vae or chosen.vae
    if path is None:
        raise ValueError(f"{config.image} does not say which autoencoder to use; name it with --vae PATH")
    if not Path(path).exists():
        raise ValueError(f"the autoencoder {path} is not there; name it with --vae PATH")
    vae = load_autoencoder(path, device, DTYPES[config.dtype])
    transform = _transform(config, chosen.hashed.get("transform"), vae.size_multiple)
    limits = parse_range(config.input_range) if config.input_range else chosen.hashed.get("input_range")
    pixels, (height, width) = _pixels(chosen, vae.pixel_channels, limits, transform)
    latent, decoded = _through(vae, pixels)
    images = to_uint8(np.concatenate([pixels, decoded]))
    rows, columns = pixels.shape[2:]
    print(f"image: {chosen.place}, {width} x {height} pixels, cropped to {columns} x {rows} ({transform.name})")
    print(f"latent: {' x '.join(map(str, latent))}, {np.prod(latent) / (rows * columns):.4g} numbers per pixel")
    print(_score(images))
    save_sheet(output, images, columns=2, labels=["image", "decoded"])
    keep_config(output.with_suffix(".yaml"), config)
    print(f"{output}: image and decoded")


def _choose(path: Path, draw: np.random.Generator, output: Path) -> _Choice:
    """The file itself, or one drawn from a folder of images, or from what a dataset was made of."""
    if path.is_file():
        return _Choice(path.name, str(path), path.read_bytes())
    if not path.is_dir():
        raise ValueError(f"{path} does not exist; expected an image, a folder of images or a dataset")
    if (path / PROVENANCE).exists():
        return _choose_of_dataset(Dataset.open(path), draw)
    if output.resolve().is_relative_to(path.resolve()):
        raise ValueError(f"--output {output} lies inside {path}: the next scan would take it for one of its images")
    source = open_source(path)
    if not len(source.items):
        why = "; ".join(f"{key}: {reason}" for key, reason in list(source.left_out.items())[:3])
        raise ValueError(f"{path}: expected images, got none that can be used: {why}")
    item = source.items[int(draw.integers(len(source.items)))]
    return _Choice(item.key, item.place, source.read(item))


def _choose_of_dataset(dataset: Dataset, draw: np.random.Generator) -> _Choice:
    if not len(dataset):
        raise ValueError(f"{dataset.path} holds no sample to draw; name an image")
    if "view" in dataset.provenance["hashed"]:
        raise ValueError(f"{dataset.path}: expected a dataset of images, got one of clips of videos; name an image")
    key = dataset.key(int(draw.integers(len(dataset))))
    recorded: dict[str, Any] = dataset.provenance["informational"]
    place = recorded.get("source")
    if place is None or not ("://" in place or Path(place).exists()):
        raise ValueError(f"{dataset.path}: its source {place} is not there; name an image or a folder of images")
    how = kept_settings(dataset.path, ("kind", "manifest_root"))
    made = {"source": place, "vae": str(recorded.get("vae_path")), "out": str(dataset.path)}
    settings: EncodeConfig = build(EncodeConfig, how, made)
    source = open_source(place, kind=settings.kind, root=settings.manifest_root)
    item = next((item for item in source.items if item.key == key), None)
    if item is None:
        raise ValueError(f"{dataset.path}: its source {place} has no {key} any more; name an image")
    return _Choice(key, item.place, source.read(item), recorded.get("vae_path"), dataset.provenance["hashed"])


def _transform(config: RoundtripConfig, made: dict[str, Any] | None, multiple: int) -> Transform:
    """What the flags say; what they do not, as the dataset was made; of other images, as encode does by default."""
    size = config.size or (made or {}).get("size", IMAGE_SIZE)
    if made is None or config.transform is not None:
        return open_transform(config.transform or IMAGE_TRANSFORM, size, seed=config.seed, multiple=multiple)
    return open_transform(transform_name(made), size, seed=made.get("seed", 0), multiple=multiple)


def _pixels(
    chosen: _Choice, channels: int, limits: Sequence[float] | None, transform: Transform
) -> tuple[np.ndarray, tuple[int, int]]:
    """float32 [1, C, h, w] in [−1, 1], and height and width of the whole image. limits: see `read_image`."""
    try:
        image = read_image(chosen.data, channels=channels, input_range=(limits[0], limits[1]) if limits else None)
    except ImageError as error:
        raise ValueError(f"{chosen.place} cannot be used: {error}") from None
    height, width = image.shape[:2]
    cropped, _ = transform.apply(image, chosen.key, transform.shape_of(height, width))
    return to_model_range(cropped)[None], (height, width)


def _through(vae: Autoencoder, pixels: np.ndarray) -> tuple[tuple[int, ...], np.ndarray]:
    """Shape of the latent (C, h, w), and what it decodes to."""
    mean = vae.encode(torch.from_numpy(pixels))[:, : vae.latent_channels]
    decoded = vae.decode(mean).cpu().numpy()
    if not np.isfinite(decoded).all():
        raise ValueError("the decoded image holds NaN or infinity; try --dtype float32")
    assert decoded.shape == pixels.shape
    return tuple(mean.shape[1:]), decoded


def _score(images: np.ndarray) -> str:
    image, decoded = torch.from_numpy(images)[:, None]
    decibels = psnr(decoded, image, data_range=255).item()
    if min(image.shape[1:3]) < WINDOW:
        return f"PSNR {decibels:.2f} dB; SSIM is not defined below {WINDOW} x {WINDOW} pixels"
    return f"PSNR {decibels:.2f} dB, SSIM {ssim(decoded, image, data_range=255, channel_axis=3).item():.4f}"
