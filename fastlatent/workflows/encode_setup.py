"""What an encode settles before its first unit: source, crop, decoder, autoencoder, engine, and the rows they give."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import __version__ as pillow_version

from fastlatent import __version__
from fastlatent.config import EncodeConfig, read_yaml
from fastlatent.encoders.engines.choose import choose_engine
from fastlatent.encoders.engines.compiled import machine
from fastlatent.encoders.engines.engine import Engine, engine_settings, open_engine
from fastlatent.encoders.engines.numerics import fix_numerics
from fastlatent.encoders.load import load_autoencoder
from fastlatent.encoders.protocol import Autoencoder
from fastlatent.encoders.text import TextEncoder, load_text_encoder
from fastlatent.encoders.watch import precision_warning
from fastlatent.media.decoders import Decoder, choose_decoder, decoder_of, open_decoder
from fastlatent.media.images import ImageError, image_size
from fastlatent.media.transforms import Transform, open_transform
from fastlatent.sources.columnar import ItemTable
from fastlatent.sources.conditions import parse_conditions
from fastlatent.sources.items import Item, Source, content_digest
from fastlatent.sources.open import open_source
from fastlatent.store.reader import PROVENANCE, read_provenance
from fastlatent.store.records import Field, Schema
from fastlatent.store.scan import Entry
from fastlatent.workflows.runtime import DTYPES, available_cores, set_up

# What a decoder needs besides Pillow, as pip calls it.
PACKAGES = {"dali": ("nvidia-dali-cuda130",), "nvimagecodec": ("nvidia-nvimgcodec-cu13",)}
STORED = {
    name: np.dtype(kind)
    for name, kind in (("float16", np.float16), ("bfloat16", np.uint16), ("float32", np.float32), ("int8", np.int8))
}


@dataclass(frozen=True)
class EncodeSetup:
    """Everything that decides the bytes of a dataset, settled.

    Attributes:
        config: with engine, batch_size and threads as they are used.
        reasons: of what `auto` chose, one line each.
        decoding: held while `decoder` is called: DALI and nvImageCodec take one call at a time.
        readers: threads that read the files of one call.
    """

    config: EncodeConfig
    source: Source
    transform: Transform
    decoder: Decoder
    vae: Autoencoder
    text: TextEncoder | None
    device: torch.device
    schema: Schema
    reasons: tuple[str, ...]
    decoding: AbstractContextManager[object]
    readers: ThreadPoolExecutor
    _unreadable: dict[str, str] = field(default_factory=dict)

    def item(self, key: str) -> Item | None:
        """The source's item of this key."""
        items = self.source.items
        if not isinstance(items, ItemTable):
            return self._by_key.get(key)
        number = items.find(key)
        return items[number] if number >= 0 else None

    @cached_property
    def _by_key(self) -> dict[str, Item]:
        return {item.key: item for item in self.source.items}

    @cached_property
    def engine(self) -> Engine:
        """Opened when the first unit needs it: compiling may take minutes."""
        config = self.config
        shapes = tuple((config.batch_size, self.vae.pixel_channels, *shape) for shape in self.transform.shapes)
        return open_engine(config.engine, self.vae, shapes=shapes, cache=engine_cache(), fuse=self._fuse)

    @property
    def _fuse(self) -> bool:
        return self.config.engine == "eager" and self.device.type == "cpu"  # on CUDA not measured yet

    def _packages(self) -> list[str]:
        """What computes the rows besides torch and Pillow."""
        return ["diffusers", *PACKAGES.get(self.decoder.name, ()), *(["transformers"] if self.text else [])]

    def _engine_settings(self) -> dict[str, Any]:
        return engine_settings(self.config.engine, self.device, fuse=self._fuse)

    @property
    def reading(self) -> tuple[int, int]:
        """Files that are read in one call, and calls at a time: one file and many calls, or many files in a call for
        decoders that divide them themselves."""
        return (1, self.config.readers) if self.decoder.name == "pillow" else (self.config.batch_size, 2)

    def entries(self) -> list[Entry]:
        """The source's items as the store lists them."""
        return [
            Entry(item.key, item.place, item.label, item.size, item.stamp, 0, item.group, item.order)
            for item in self.source.items
        ]

    def examine(self, entry: Entry) -> tuple[str, int] | None:
        """Digest and bucket of an entry's bytes; None for a file that cannot be read, which `left_out` then lists.

        What cannot be decoded goes to bucket 0, and to quarantine later.
        """
        item = self.item(entry.key)
        assert item is not None
        try:
            data = self.source.fetch(item)
        except ValueError as error:
            self._unreadable[item.key] = str(error)
            return None
        if len(self.transform.shapes) == 1:
            return content_digest(item, data), 0
        try:
            return content_digest(item, data), self.transform.shape_of(*image_size(data, input_range=self.input_range))
        except ImageError:
            return content_digest(item, data), 0

    @property
    def left_out(self) -> dict[str, str]:
        """What the source could not give -> why: as it was listed, and what could not be read since."""
        return {**self.source.left_out, **self._unreadable}

    @property
    def input_range(self) -> tuple[float, float] | None:
        return parse_range(self.config.input_range) if self.config.input_range else None

    def pixel_shape(self, row: tuple[int, ...]) -> tuple[int, int]:
        """Height and width of the pixels that a row [F, 2C or C, h, w] is made of."""
        return row[-2] * self.vae.downsample, row[-1] * self.vae.downsample

    def close(self) -> None:
        """End the threads, and free what engine and decoder hold."""
        self.readers.shutdown()
        self.decoder.close()
        if "engine" in self.__dict__:
            self.engine.close()

    def provenance(self) -> dict[str, Any]:
        """What changes the bytes of a dataset (hashed), and what helps to understand it (informational)."""
        config = self.config
        engine = {
            **(self.engine.settings() if config.engine == "tensorrt" else self._engine_settings()),
            "device": self.device.type,
            "dtype": config.compute_dtype,
            "batch_size": config.batch_size,
        }
        columns = [column.name for column in self.source.columns]
        conditions = ",".join(f"{name}:{count}" for name, count in parse_conditions(config.condition_spec))
        return {
            "hashed": {
                "vae": self.vae.identity(),
                "decode": self.decoder.rule,
                "transform": self.transform.settings(),
                "pixel_range": [-1, 1],
                "mirror": config.mirror,
                "storage_dtype": config.dtype,
                "payload": config.payload,
                # A convolution's last bits depend on batch size, threads and device.
                "engine": engine if self.device.type == "cuda" else {**engine, "threads": config.threads},
                **({"input_range": list(self.input_range)} if self.input_range else {}),
                **({"columns": columns} if columns else {}),
                **({"conditions": conditions} if conditions else {}),
                **({"text": self.text.identity()} if self.text else {}),
            },
            "informational": {
                "vae_path": str(Path(config.vae).resolve()),
                "source": config.source if "://" in config.source else str(Path(config.source).resolve()),
                "fastlatent": __version__,
                "environment": {
                    **{name: value for name, value in machine(self.device).items() if name != "threads"},
                    **{name: version(name) for name in self._packages()},
                    "pillow": pillow_version,
                    "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else _cpu_name(),
                },
            },
        }


def set_up_encode(config: EncodeConfig) -> EncodeSetup:
    """Open and choose everything; see EncodeConfig.

    Raises:
        ValueError: the source, the autoencoder or a setting cannot be used as asked.
    """
    source = open_source(
        config.source,
        kind=config.kind,
        split=config.split,
        names=config.trajectories,
        captions=config.captions,
        conditions=config.condition_spec,
        root=config.manifest_root,
    )
    if not len(source.items):
        raise ValueError(
            f"{config.source}: expected images, got none that can be used: " + "; ".join(
                f"{key}: {why}" for key, why in list(source.left_out.items())[:3]
            )
        )  # fmt: skip
    made = _recorded(Path(config.out))
    recorded: dict[str, Any] = made.get("engine", {})
    threads = config.threads or recorded.get("threads", 0) or available_cores()
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
    reasons = []
    if warning := precision_warning(vae, DTYPES[config.compute_dtype]):
        reasons.append(warning)
    name = config.decoder
    if name == "auto":
        rule = made.get("decode")
        name, why = (decoder_of(rule), "as recorded") if rule else choose_decoder(device.type)
        reasons.append(f"decoder {name}: {why}")
    decoder = open_decoder(
        name, channels=vae.pixel_channels, device=str(device), threads=config.readers,
        input_range=parse_range(config.input_range) if config.input_range else None,
    )  # fmt: skip
    engine, batch, why = choose_engine(device, len(source.items), transform.shapes)
    if config.engine == "auto":
        reasons.append(f"engine {recorded.get('name', engine)}: {'as recorded' if 'name' in recorded else why}")
    text = None
    if config.text_encoder:
        if config.captions is None:
            raise ValueError("--text-encoder: expected --captions too, which says where the captions are")
        text = load_text_encoder(config.text_encoder, device, torch.float32, max_length=config.text_length or None)
    settled = replace(
        config,
        threads=threads,
        engine=recorded.get("name", engine) if config.engine == "auto" else config.engine,
        batch_size=config.batch_size or recorded.get("batch_size", batch),
    )
    buckets = tuple(_latent_shape(config, vae, shape) for shape in transform.shapes)
    extras = tuple(Field(one.name, one.dtype, one.shape) for one in source.columns) + (text.columns if text else ())
    return EncodeSetup(
        settled, source, transform, decoder, vae, text, device,
        Schema(buckets, config.payload, extras), tuple(reasons),
        nullcontext() if decoder.name == "pillow" else threading.Lock(),
        ThreadPoolExecutor(config.readers, thread_name_prefix="read"),
    )  # fmt: skip


def _recorded(out: Path) -> dict[str, Any]:
    """What decides the bytes of the unfinished or finished dataset at `out`, {} if there is none."""
    return read_provenance(out)["hashed"] if (out / PROVENANCE).exists() else {}


def kept_settings(dataset: Path, names: Iterable[str]) -> dict[str, Any]:
    """Those of `names` that a dataset's encode kept in encode.yaml, as text; none where merge or split made it."""
    kept = dataset / "encode.yaml"
    values = read_yaml(str(kept)) if kept.exists() else {}
    return {name: values[name] for name in names if name in values}


def parse_range(text: str) -> tuple[float, float]:
    """ "LOW,HIGH" of --input-range."""
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError:
        low = high = 0.0
    if not (np.isfinite([low, high]).all() and low < high):
        raise ValueError(f'--input-range: expected two numbers, "LOW,HIGH" with LOW < HIGH, got {text!r}')
    return low, high


def engine_cache() -> Path:
    """Where compiled engines are kept: FASTLATENT_CACHE, else the user's cache folder."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("FASTLATENT_CACHE") or Path(home) / "fastlatent") / "engines"


def _latent_shape(config: EncodeConfig, vae: Autoencoder, pixels: tuple[int, int]) -> tuple[int, ...]:
    channels = vae.latent_channels * (2 if config.payload == "moments" else 1)
    return (2 if config.mirror else 1, channels, pixels[0] // vae.downsample, pixels[1] // vae.downsample)


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "cpu"
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "cpu")
