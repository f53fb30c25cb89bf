"""What an encode settles before its first unit, of images and of videos: source, encoder, and the rows they give."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import __version__ as pillow_version
from torch import Tensor

from fastlatent import __version__
from fastlatent.config import EncodeConfig, read_yaml
from fastlatent.encoders.engines.compiled import machine
from fastlatent.encoders.engines.engine import Engine
from fastlatent.encoders.text import TextEncoder, load_text_encoder
from fastlatent.encoders.watch import OverflowWatch
from fastlatent.media.image_error import ImageError
from fastlatent.sources.columnar import ItemTable
from fastlatent.sources.conditions import parse_conditions
from fastlatent.sources.items import Item, Source, content_digest
from fastlatent.sources.open import open_source
from fastlatent.store.reader import PROVENANCE, read_provenance
from fastlatent.store.records import Field, PlannedItem, Schema, Unit
from fastlatent.store.scan import Entry

STORED = {
    name: np.dtype(kind)
    for name, kind in (("float16", np.float16), ("bfloat16", np.uint16), ("float32", np.float32), ("int8", np.int8))
}


@dataclass(frozen=True)
class Picture:
    """One file, or a view of it, as the encoder will see it; or why it is left out.

    pixels: [h, w, C] or, of a clip, [T, h, w, C]: uint8, or float32 in [0, 1]; an array, or a CUDA tensor where that
    decodes. extras: the row's further tensors that come from decoding.
    """

    item: PlannedItem
    pixels: Any
    orig_hw: tuple[int, int] = (0, 0)
    crop: np.ndarray | None = None
    error: ImageError | None = None
    extras: Mapping[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class EncodeSetup(ABC):
    """Everything that decides the bytes of a dataset, settled; of one kind of input.

    Attributes:
        config: with engine, batch_size and threads as they are used.
        reasons: of what `auto` chose, one line each.
        readers: threads that read the files of one call.
        decoded_fields: those of the schema's further tensors that `Picture.extras` holds.
        noun: what a row is made of.
    """

    config: EncodeConfig
    source: Source
    text: TextEncoder | None
    device: torch.device
    schema: Schema
    reasons: tuple[str, ...]
    readers: ThreadPoolExecutor
    _unreadable: dict[str, str] = field(default_factory=dict)
    noun: ClassVar[str]

    decoded_fields: tuple[Field, ...] = ()

    # --- of images or of clips ---

    @property
    @abstractmethod
    def engine(self) -> Engine:
        """What encodes; opened when the first unit needs it: compiling may take minutes."""

    @property
    @abstractmethod
    def reading(self) -> tuple[int, int]:
        """Files that are read in one call, and calls at a time."""

    @property
    @abstractmethod
    def decoding_threads(self) -> int:
        """How many of those calls decode at the same time."""

    @property
    @abstractmethod
    def most_pixel_bytes(self) -> int:
        """The most memory that the pixels of a `Picture` take."""

    @abstractmethod
    def read(self, unit: Unit, items: Sequence[PlannedItem]) -> list[Picture]:
        """Read, decode, resize and crop. Runs in several threads; pixels on a GPU are complete when it returns.

        Raises:
            ValueError: a file cannot be read, or is not what was planned.
        """

    @abstractmethod
    def bucket_of(self, data: bytes) -> int:
        """The bucket of a file's row; ImageError where it cannot be told, since the file is damaged."""

    @abstractmethod
    def blank(self, bucket: tuple[int, ...], count: int) -> Tensor:
        """A batch of `count` without contents, for rows of this shape, as `batch` makes them."""

    @abstractmethod
    def batch(self, pixels: Sequence[Any]) -> Tensor:
        """What `Picture.pixels` holds as one batch on the device, padded to the batch size that all batches have."""

    @abstractmethod
    def mirrored(self, batch: Tensor) -> Tensor:
        """The batch flipped left to right."""

    @abstractmethod
    def encode(self, batch: Tensor) -> Tensor:
        """float32 [B, *row], of a batch of the full size."""

    @abstractmethod
    def encode_small(self, batch: Tensor) -> Tensor:
        """The same of a batch of any size, without an engine."""

    @abstractmethod
    def watch(self) -> OverflowWatch:
        """A watch over what `encode` gives."""

    @abstractmethod
    def _made_by(self) -> dict[str, Any]:
        """What else changes the bytes: encoder, decoder, crop; for provenance."""

    @abstractmethod
    def _engine_settings(self) -> dict[str, Any]: ...

    @abstractmethod
    def _packages(self) -> list[str]:
        """What computes the rows besides torch and Pillow, as pip calls it."""

    def ragged_rows(self, name: str, unit: Unit, item: PlannedItem) -> int:
        """How many rows of a further tensor of rows of their own a file has; 0 where that is not known yet."""
        if name != "caption":
            return 0
        found = self.item(item.key)
        assert found is not None
        return len(found.attached["caption"].encode())

    def most_rows(self, name: str) -> int:
        """The most rows that a file can have of a further tensor of rows of their own, as far as that is bounded."""
        return self.text.max_length if self.text else 0

    def close(self) -> None:
        """End the threads, and free what engine and decoder hold."""
        self.readers.shutdown()
        if "engine" in self.__dict__:
            self.engine.close()

    # --- of both ---

    @property
    def table(self) -> ItemTable | None:
        """The source's items as arrays, where each is one row."""
        return self.source.items if isinstance(self.source.items, ItemTable) else None

    def item(self, key: str) -> Item | None:
        """The source's item that the row of this key is made of."""
        items = self.source.items
        if not isinstance(items, ItemTable):
            return self._by_key.get(key)
        number = items.find(key)
        return items[number] if number >= 0 else None

    @cached_property
    def _by_key(self) -> dict[str, Item]:
        return {item.key: item for item in self.source.items}

    def entries(self) -> list[Entry]:
        """The rows to be, as the store lists them."""
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
        try:
            return content_digest(item, data), self.bucket_of(data) if len(self.schema.buckets) > 1 else 0
        except ImageError:
            return content_digest(item, data), 0

    def fetch(self, planned: PlannedItem) -> bytes:
        """The bytes of a planned row's file.

        Raises:
            ValueError: they cannot be read, or are not what was planned.
        """
        item = self.item(planned.key)
        data = b"" if item is None else self.source.fetch(item)
        if item is None or content_digest(item, data) != planned.digest:
            raise ValueError(f"{planned.path} changed while the dataset was being encoded; rerun the same command")
        return data

    @property
    def left_out(self) -> dict[str, str]:
        """What the source could not give -> why: as it was listed, and what could not be read since."""
        return {**self.source.left_out, **self._unreadable}

    def provenance(self) -> dict[str, Any]:
        """What changes the bytes of a dataset (hashed), and what helps to understand it (informational)."""
        config = self.config
        engine = {
            **self._engine_settings(),
            "device": self.device.type,
            "dtype": config.compute_dtype,
            "batch_size": config.batch_size,
        }
        columns = [column.name for column in self.source.columns]
        conditions = ",".join(f"{name}:{count}" for name, count in parse_conditions(config.condition_spec))
        path = config.vae or config.teacher_weights
        return {
            "hashed": {
                **self._made_by(),
                "mirror": config.mirror,
                "storage_dtype": config.dtype,
                "payload": self.schema.payload,
                # A convolution's last bits depend on batch size, threads and device.
                "engine": engine if self.device.type == "cuda" else {**engine, "threads": config.threads},
                **({"columns": columns} if columns else {}),
                **({"conditions": conditions} if conditions else {}),
                **({"text": self.text.identity()} if self.text else {}),
            },
            "informational": {
                **({"vae_path" if config.vae else "teacher_path": _absolute(path)} if path else {}),
                "source": _absolute(config.source),
                "fastlatent": __version__,
                "environment": {
                    **{name: value for name, value in machine(self.device).items() if name != "threads"},
                    **{name: version(name) for name in self._packages()},
                    **({"transformers": version("transformers")} if self.text else {}),
                    "pillow": pillow_version,
                    "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else _cpu_name(),
                },
            },
        }


def open_encode_source(config: EncodeConfig, media: str) -> Source:
    """The source, with one item or more.

    Raises:
        ValueError: it cannot be used as asked, or is empty.
    """
    source = open_source(
        config.source,
        media=media,
        kind=config.kind,
        split=config.split,
        names=config.trajectories,
        captions=config.captions,
        conditions=config.condition_spec,
        root=config.manifest_root,
    )
    if not len(source.items):
        raise ValueError(
            f"{config.source}: expected {media}, got none that can be used: " + "; ".join(
                f"{key}: {why}" for key, why in list(source.left_out.items())[:3]
            )
        )  # fmt: skip
    return source


def open_text_encoder(config: EncodeConfig, device: torch.device) -> TextEncoder | None:
    """That of --text-encoder.

    Raises:
        ValueError: it cannot be loaded, or there are no captions.
    """
    if not config.text_encoder:
        return None
    if config.captions is None:
        raise ValueError("--text-encoder: expected --captions too, which says where the captions are")
    return load_text_encoder(config.text_encoder, device, torch.float32, max_length=config.text_length or None)


def source_fields(source: Source, text: TextEncoder | None) -> tuple[Field, ...]:
    """The further tensors that come with the files: what the source attached, and embeddings of the captions."""
    return tuple(Field(one.name, one.dtype, one.shape) for one in source.columns) + (text.columns if text else ())


def recorded(out: Path) -> dict[str, Any]:
    """What decides the bytes of the unfinished or finished dataset at `out`, {} if there is none."""
    return read_provenance(out)["hashed"] if (out / PROVENANCE).exists() else {}


def settle_decoder(
    asked: str, rule: str | None, choose: Callable[[], tuple[str, str]], name_of: Callable[[str], str]
) -> tuple[str, list[str]]:
    """The decoder's name, and a line that says why where that was left to us. rule: what a dataset was begun with."""
    if asked != "auto":
        return asked, []
    name, why = (name_of(rule), "as recorded") if rule else choose()
    return name, [f"decoder {name}: {why}"]


def kept_settings(dataset: Path, names: Iterable[str]) -> dict[str, Any]:
    """Those of `names` that a dataset's encode kept in encode.yaml, as text; none where merge or split made it."""
    kept = dataset / "encode.yaml"
    values = read_yaml(str(kept)) if kept.exists() else {}
    return {name: values[name] for name in names if name in values}


def engine_cache() -> Path:
    """Where compiled engines are kept: FASTLATENT_CACHE, else the user's cache folder."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("FASTLATENT_CACHE") or Path(home) / "fastlatent") / "engines"


def _absolute(path: str) -> str:
    """But a URL and the name of a model on a hub."""
    return str(Path(path).resolve()) if "://" not in path and Path(path).exists() else path


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "cpu"
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "cpu")
