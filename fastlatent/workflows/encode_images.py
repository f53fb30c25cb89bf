"""Images → rows: which decoder, crop, autoencoder and engine, and the pixels of a batch."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastlatent.config import EncodeConfig, given
from fastlatent.config.encode import IMAGE_SIZE, IMAGE_TRANSFORM
from fastlatent.encoders.engines.choose import choose_engine
from fastlatent.encoders.engines.engine import Engine, engine_settings, open_engine
from fastlatent.encoders.engines.numerics import fix_numerics
from fastlatent.encoders.load import load_autoencoder
from fastlatent.encoders.protocol import Autoencoder
from fastlatent.encoders.watch import OverflowWatch, precision_warning
from fastlatent.media.decoders import Decoder, choose_decoder, decoder_of, open_decoder
from fastlatent.media.image_error import ImageError
from fastlatent.media.images import image_size
from fastlatent.media.transforms import Transform, open_transform
from fastlatent.store.records import PlannedItem, Schema, Unit
from fastlatent.workflows.encode_setup import (
    EncodeSetup,
    Picture,
    engine_cache,
    open_encode_source,
    open_text_encoder,
    recorded,
    settle_decoder,
    source_fields,
)
from fastlatent.workflows.runtime import DTYPES, available_cores, set_up

# Settings that only clips of videos have.
OF_CLIPS = (
    "frames", "frame_stride", "fps", "placement", "views", "short", "keep_pixels", "teacher_weights", "layer",
    "token_norm", "pool", "project_to",
)  # fmt: skip
# What a decoder needs besides Pillow, as pip calls it.
PACKAGES = {"dali": ("nvidia-dali-cuda130",), "nvimagecodec": ("nvidia-nvimgcodec-cu13",)}


@dataclass(frozen=True, kw_only=True)
class ImageSetup(EncodeSetup):
    """The setup of images. decoding: held while `decoder` is called: DALI and nvImageCodec take one call at a time."""

    transform: Transform
    decoder: Decoder
    vae: Autoencoder
    decoding: AbstractContextManager[object]
    noun = "images"

    @cached_property
    def engine(self) -> Engine:
        config = self.config
        shapes = tuple((config.batch_size, self.vae.pixel_channels, *shape) for shape in self.transform.shapes)
        return open_engine(config.engine, self.vae, shapes=shapes, cache=engine_cache(), fuse=self._fuse)

    @property
    def _fuse(self) -> bool:
        return self.config.engine == "eager" and self.device.type == "cpu"  # on CUDA not measured yet

    @property
    def reading(self) -> tuple[int, int]:
        """One file and many calls, or many files in a call for decoders that divide them themselves."""
        return (1, self.config.readers) if self.decoder.name == "pillow" else (self.config.batch_size, 2)

    @property
    def decoding_threads(self) -> int:
        return self.config.readers if self.decoder.name == "pillow" else 1

    @property
    def most_pixel_bytes(self) -> int:
        return 4 * self.vae.pixel_channels * max(height * width for height, width in self.transform.shapes)

    def read(self, unit: Unit, items: Sequence[PlannedItem]) -> list[Picture]:
        files = [self.fetch(items[0])] if len(items) == 1 else list(self.readers.map(self.fetch, items))
        bucket = self.transform.shapes.index(self._pixel_shape(unit.bucket))
        pictures = []
        with _own_stream(self.device):
            with self.decoding:
                images: list[Any] = self.decoder.decode(files)
            for planned, image in zip(items, images, strict=True):
                if isinstance(image, ImageError):
                    pictures.append(Picture(planned, None, error=image))
                    continue
                pixels, crop = self.transform.apply(image, planned.key, bucket)
                pictures.append(Picture(planned, pixels, (int(image.shape[0]), int(image.shape[1])), crop))
        return pictures

    def bucket_of(self, data: bytes) -> int:
        return self.transform.shape_of(*image_size(data, input_range=self._input_range))

    def blank(self, bucket: tuple[int, ...], count: int) -> Tensor:
        return torch.zeros(count, self.vae.pixel_channels, *self._pixel_shape(bucket), device=self.device)

    def batch(self, pixels: Sequence[Any]) -> Tensor:
        return to_batch(pixels, self.config.batch_size, self.device)

    def mirrored(self, batch: Tensor) -> Tensor:
        return batch.flip(-1)

    def encode(self, batch: Tensor) -> Tensor:
        return self.engine.encode(batch)

    def encode_small(self, batch: Tensor) -> Tensor:
        return self.vae.encode(batch)

    def watch(self) -> OverflowWatch:
        return OverflowWatch(self.vae, DTYPES[self.config.compute_dtype])

    def _pixel_shape(self, row: tuple[int, ...]) -> tuple[int, int]:
        """Height and width of the pixels that a row [F, 2C or C, h, w] is made of."""
        return row[-2] * self.vae.downsample, row[-1] * self.vae.downsample

    @property
    def _input_range(self) -> tuple[float, float] | None:
        return parse_range(self.config.input_range) if self.config.input_range else None

    def _made_by(self) -> dict[str, Any]:
        return {
            "vae": self.vae.identity(),
            "decode": self.decoder.rule,
            "transform": self.transform.settings(),
            "pixel_range": [-1, 1],
            **({"input_range": list(self._input_range)} if self._input_range else {}),
        }

    def _engine_settings(self) -> dict[str, Any]:
        if self.config.engine == "tensorrt":
            return self.engine.settings()
        return engine_settings(self.config.engine, self.device, fuse=self._fuse)

    def _packages(self) -> list[str]:
        return ["diffusers", *PACKAGES.get(self.decoder.name, ())]

    def close(self) -> None:
        super().close()
        self.decoder.close()


def set_up_images(config: EncodeConfig) -> ImageSetup:
    """Open and choose everything; see EncodeConfig.

    Raises:
        ValueError: the source, the autoencoder or a setting cannot be used as asked.
    """
    _refuse_settings_of_clips(config)
    config = replace(
        config,
        size=config.size or IMAGE_SIZE,
        transform=IMAGE_TRANSFORM if config.transform == "auto" else config.transform,
    )
    assert config.vae is not None
    source = open_encode_source(config, "images")
    made = recorded(Path(config.out))
    begun: dict[str, Any] = made.get("engine", {})
    threads = config.threads or begun.get("threads", 0) or available_cores()
    device = set_up(config.device, threads)
    fix_numerics()
    vae = load_autoencoder(config.vae, device, DTYPES[config.compute_dtype])
    if config.payload == "moments" and not vae.has_posterior:
        raise ValueError(f"--payload moments: {config.vae} gives latents without a posterior; say --payload latents")
    if vae.fixed_size and (config.size != vae.fixed_size or config.transform == "buckets"):
        raise ValueError(
            f"--size {config.size}: this autoencoder takes images of {vae.fixed_size}×{vae.fixed_size} only"
        )
    transform = open_transform(config.transform, config.size, seed=config.seed, multiple=vae.size_multiple)
    if len(transform.shapes) > 1 and source.items[0].group:
        raise ValueError("--transform buckets: expected images without groups; frames of a trajectory have one shape")
    warning = precision_warning(vae, DTYPES[config.compute_dtype])
    name, why_decoder = settle_decoder(
        config.decoder, made.get("decode"), lambda: choose_decoder(device.type), decoder_of
    )
    decoder = open_decoder(
        name, channels=vae.pixel_channels, device=str(device), threads=config.readers,
        input_range=parse_range(config.input_range) if config.input_range else None,
    )  # fmt: skip
    engine, batch, why = choose_engine(device, len(source.items), transform.shapes)
    reasons = [*([warning] if warning else []), *why_decoder]
    if config.engine == "auto":
        reasons.append(f"engine {begun.get('name', engine)}: {'as recorded' if 'name' in begun else why}")
    text = open_text_encoder(config, device)
    settled = replace(
        config,
        threads=threads,
        engine=begun.get("name", engine) if config.engine == "auto" else config.engine,
        batch_size=config.batch_size or begun.get("batch_size", batch),
    )
    buckets = tuple(_latent_shape(config, vae, shape) for shape in transform.shapes)
    return ImageSetup(
        config=settled,
        source=source,
        text=text,
        device=device,
        schema=Schema(buckets, config.payload, source_fields(source, text)),
        reasons=tuple(reasons),
        readers=ThreadPoolExecutor(config.readers, thread_name_prefix="read"),
        transform=transform,
        decoder=decoder,
        vae=vae,
        decoding=nullcontext() if decoder.name == "pillow" else threading.Lock(),
    )


def _refuse_settings_of_clips(config: EncodeConfig) -> None:
    """Raise ValueError for what means nothing for images."""
    if flags := given(config, OF_CLIPS):
        raise ValueError(
            f"{', '.join(flags)}: expected a --teacher, a --vae of videos or --kind videos; {config.vae} is of images"
        )


def parse_range(text: str) -> tuple[float, float]:
    """ "LOW,HIGH" of --input-range."""
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError:
        low = high = 0.0
    if not (np.isfinite([low, high]).all() and low < high):
        raise ValueError(f'--input-range: expected two numbers, "LOW,HIGH" with LOW < HIGH, got {text!r}')
    return low, high


def _latent_shape(config: EncodeConfig, vae: Autoencoder, pixels: tuple[int, int]) -> tuple[int, ...]:
    channels = vae.latent_channels * (2 if config.payload == "moments" else 1)
    return (2 if config.mirror else 1, channels, pixels[0] // vae.downsample, pixels[1] // vae.downsample)


@contextmanager
def _own_stream(device: torch.device) -> Iterator[None]:
    """On CUDA a stream of this thread's own, waited for at the end: decoding goes on beside the encoder's batches."""
    if device.type != "cuda":
        yield
        return
    if not hasattr(_threads, "stream"):
        _threads.stream = torch.cuda.Stream(device)
    with torch.cuda.device(device), torch.cuda.stream(_threads.stream):
        yield
    _threads.stream.synchronize()


_threads = threading.local()


def to_batch(pixels: Sequence[Any], size: int, device: torch.device) -> Tensor:
    """[h, w, C] images, uint8 or float32 in [0, 1], as float32 [size, C, h, w] in [−1, 1] on the device.

    What is missing to `size` is 0, mid-grey. x / 127.5 − 1, or 2x − 1, in float32, as `media.images.to_model_range`.
    """
    images = [one if isinstance(one, Tensor) else torch.from_numpy(one) for one in pixels]
    for image in images:
        if image.is_cuda:  # made on another stream, and freed while this one may still read it
            image.record_stream(torch.cuda.current_stream(device))
    if all(image.dtype == torch.uint8 for image in images):
        stacked = torch.stack(images)
        if device.type == "cuda" and not stacked.is_cuda:  # from pageable memory the copy would wait for the encoder
            stacked = stacked.pin_memory()
        parts = [stacked.to(device, non_blocking=True).permute(0, 3, 1, 2).float() / 127.5 - 1]
    else:
        parts = []
        for image in images:
            unit = image.to(device).permute(2, 0, 1)[None]
            parts.append(unit.float() / 127.5 - 1 if image.dtype == torch.uint8 else 2 * unit - 1)
    missing = size - len(images)
    if missing:
        parts.append(torch.zeros(missing, *parts[0].shape[1:], device=device))
    return torch.cat(parts).contiguous()
