"""Clips of videos → rows: which frames and pixels, the teacher or autoencoder, and what a student needs to know."""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastlatent.config import EncodeConfig, given
from fastlatent.config.encode import CLIP_TRANSFORM, IMAGE_SIZE, TEACHER_STRIDE, VAE_STRIDE
from fastlatent.encoders.clip_protocol import ClipEncoder
from fastlatent.encoders.engines.choose import choose_clip_engine
from fastlatent.encoders.engines.engine import Engine, engine_settings, open_engine
from fastlatent.encoders.engines.numerics import fix_numerics, numerics
from fastlatent.encoders.teachers import load_teacher
from fastlatent.encoders.video_clips import VideoClipEncoder, load_video_clip_encoder
from fastlatent.encoders.watch import OverflowWatch
from fastlatent.media.clips import ClipReader
from fastlatent.media.frame_sampling import FrameSampling
from fastlatent.media.transforms import open_transform
from fastlatent.media.video_decoders import choose_video_decoder, open_video_decoder, video_decoder_of
from fastlatent.media.video_error import VideoError
from fastlatent.sources.columnar import ItemTable
from fastlatent.sources.items import Item
from fastlatent.sources.open import kind_of
from fastlatent.store.records import RAGGED, Field, PlannedItem, Schema, Unit
from fastlatent.store.scan import Entry
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

# Settings that only images have, only a teacher, only an autoencoder: a student needs the tokens of the clip that it
# sees, not of its mirror image.
OF_IMAGES = ("all", "trajectories", "manifest_root", "copy_pkl", "condition_spec", "input_range")
OF_TEACHERS = ("teacher_weights", "layer", "token_norm", "pool", "project_to")
OF_AUTOENCODERS = ("payload", "mirror")
IMAGE_DECODERS = ("pillow", "nvimagecodec")
CALL_BYTES = 64 * 2**20  # of the clips that are read in one call


@dataclass(frozen=True, kw_only=True)
class ClipSetup(EncodeSetup):
    """The setup of clips. A row is one view of a video: its key is the item's, or with several views KEY@VIEW."""

    reader: ClipReader
    encoder: ClipEncoder
    noun = "clips"

    @cached_property
    def engine(self) -> Engine:
        config = self.config
        shapes = tuple((config.batch_size, 3, *shape) for shape in self.reader.shapes)
        return open_engine(config.engine, self.encoder, shapes=shapes, cache=engine_cache())

    @property
    def reading(self) -> tuple[int, int]:
        """The views of one video in a call, for which it is fetched once; of many or large ones some."""
        return max(1, min(self.config.views, CALL_BYTES // self.most_pixel_bytes)), self.config.readers

    @property
    def decoding_threads(self) -> int:
        return self.config.readers

    @property
    def most_pixel_bytes(self) -> int:
        return 3 * max(math.prod(shape) for shape in self.reader.shapes)

    def read(self, unit: Unit, items: Sequence[PlannedItem]) -> list[Picture]:
        pictures: list[Picture] = []
        name, data = "", b""
        for planned in items:
            key, view = self._split(planned.key)
            if key != name:
                name, data = key, self.fetch(planned)
            try:
                clip = self.reader.read(data, key, view)
                if clip.pixels.shape[:3] != self._clip_shape(unit.bucket):
                    raise VideoError(f"expected a clip of {self._clip_shape(unit.bucket)}, got {clip.pixels.shape[:3]}")
            except VideoError as error:
                pictures.append(Picture(planned, None, error=error))
                continue
            extras = {"frame_index": clip.frame_index, "view_xxh3": np.array([clip.digest], np.uint64)}
            if self.config.keep_pixels:
                extras["pixels"] = clip.pixels
            pictures.append(Picture(planned, clip.pixels, clip.orig_hw, clip.crop, extras=extras))
        return pictures

    def bucket_of(self, data: bytes) -> int:
        return self.reader.bucket(data)

    def blank(self, bucket: tuple[int, ...], count: int) -> Tensor:
        return torch.zeros(count, *self._clip_shape(bucket), 3, dtype=torch.uint8, device=self.device)

    def batch(self, pixels: Sequence[Any]) -> Tensor:
        shape = self.config.batch_size, *pixels[0].shape
        # From pageable memory the copy would wait for the encoder. 32 clips are 77 MB: put together where they belong.
        clips = torch.empty(shape, dtype=torch.uint8, pin_memory=self.device.type == "cuda")
        np.stack(pixels, out=clips.numpy()[: len(pixels)])
        clips[len(pixels) :] = 0
        return clips.to(self.device, non_blocking=True)

    def mirrored(self, batch: Tensor) -> Tensor:
        return batch.flip(3)

    def encode(self, batch: Tensor) -> Tensor:
        if isinstance(self.encoder, VideoClipEncoder):  # piece by piece in time
            return self.encoder.encode_clips(batch)
        return self.engine.encode(self.encoder.prepare(batch))

    def encode_small(self, batch: Tensor) -> Tensor:
        return _Unprepared(self.encoder).encode(batch)

    def watch(self) -> OverflowWatch:
        return OverflowWatch(_Unprepared(self.encoder), DTYPES[self.config.compute_dtype])

    def ragged_rows(self, name: str, unit: Unit, item: PlannedItem) -> int:
        if name in ("frame_index", "pixels"):
            return self._clip_shape(unit.bucket)[0]
        return super().ragged_rows(name, unit, item)

    def most_rows(self, name: str) -> int:
        return max(self.reader.sampling.frames) if name in ("frame_index", "pixels") else super().most_rows(name)

    @property
    def table(self) -> ItemTable | None:
        return super().table if self.config.views == 1 else None

    def item(self, key: str) -> Item | None:
        return super().item(self._split(key)[0])

    def entries(self) -> list[Entry]:
        views = self.config.views
        if views == 1:
            return super().entries()
        return [
            Entry(f"{one.key}@{view}", one.place, one.label, one.size, one.stamp, 0, one.key, view)
            for one in self.source.items
            for view in range(views)
        ]

    def examine(self, entry: Entry) -> tuple[str, int] | None:
        return self._examined(entry.group) if self.config.views > 1 else super().examine(entry)

    @cached_property
    def _examined(self) -> Any:
        """`examine` of a video's first view, for the others as well: they follow it, or come at the same time."""
        locks = [threading.Lock() for _ in range(64)]

        @functools.lru_cache(maxsize=64)
        def examine(key: str) -> tuple[str, int] | None:
            return super(ClipSetup, self).examine(Entry(f"{key}@0", "", -1, 0, 0))

        def examined(key: str) -> tuple[str, int] | None:
            with locks[hash(key) % len(locks)]:
                return examine(key)

        return examined

    def _split(self, key: str) -> tuple[str, int]:
        """The item's key and the number of the view."""
        if self.config.views == 1:
            return key, 0
        name, _, view = key.rpartition("@")
        return name, int(view)

    def _clip_shape(self, bucket: tuple[int, ...]) -> tuple[int, int, int]:
        """Frames, height and width of the clips whose rows have this shape."""
        return self.reader.shapes[self.schema.buckets.index(tuple(bucket))]

    def _made_by(self) -> dict[str, Any]:
        teacher = self.config.teacher is not None
        return {
            "teacher" if teacher else "vae": self.encoder.identity(),
            "view": self.reader.settings(),
            "pixel_range": [0, 1] if teacher else [-1, 1],
            **({"keep_pixels": True} if self.config.keep_pixels else {}),
        }

    def _engine_settings(self) -> dict[str, Any]:
        if isinstance(self.encoder, VideoClipEncoder):
            return {"name": "eager", **numerics(self.device)}
        return engine_settings(self.config.engine, self.device, clips=True)

    def _packages(self) -> list[str]:
        of_encoder = ["diffusers"] if self.config.vae else []
        return [*of_encoder, *self.reader.decoder.packages]

    def provenance(self) -> dict[str, Any]:
        """With what a dataset over it needs to find the videos again."""
        made = super().provenance()
        names = ("kind", "split", "captions")
        made["informational"] |= {name: getattr(self.config, name) for name in names}
        return made

    def close(self) -> None:
        super().close()
        self.reader.close()


class _Unprepared:
    """A ClipEncoder that takes uint8 clips."""

    def __init__(self, encoder: ClipEncoder) -> None:
        self._encoder = encoder

    def encode(self, clips: Tensor) -> Tensor:
        return self._encoder.encode(self._encoder.prepare(clips))

    def upcast(self) -> _Unprepared:
        return _Unprepared(self._encoder.upcast())


def set_up_clips(config: EncodeConfig) -> ClipSetup:
    """Open and choose everything; see EncodeConfig.

    Raises:
        ValueError: the source, the encoder or a setting cannot be used as asked.
    """
    _refuse_settings_of_others(config)
    source = open_encode_source(config, "videos")
    if config.fps is not None:  # refused here, not clip by clip after all of them were read
        kind = kind_of(config.source, "videos") if config.kind == "auto" else config.kind
        if kind == "frames":
            raise ValueError(
                "--fps: folders of frames have no times, which it needs; leave it out, or say --frame-stride"
            )
    made = recorded(Path(config.out))
    begun: dict[str, Any] = made.get("engine", {})
    threads = config.threads or begun.get("threads", 0) or available_cores()
    device = set_up(config.device, threads)
    fix_numerics()
    encoder = _load(config, device)
    reader, reasons = _open_reader(config, encoder, device, made)
    engine, batch, why = choose_clip_engine(device, len(source.items) * config.views, config.teacher is not None)
    if config.engine == "auto":
        reasons.append(f"engine {begun.get('name', engine)}: {'as recorded' if 'name' in begun else why}")
    settled = replace(
        config,
        threads=threads,
        engine=begun.get("name", engine) if config.engine == "auto" else config.engine,
        batch_size=config.batch_size or begun.get("batch_size", batch),
    )
    text = open_text_encoder(config, device)
    lengths = {shape[0] for shape in reader.shapes}
    frames = lengths.pop() if len(lengths) == 1 else RAGGED
    sizes = {shape[1:] for shape in reader.shapes}
    decoded = [Field("frame_index", "I32", (frames,)), Field("view_xxh3", "U64", (1,))]
    if config.keep_pixels:
        if len(sizes) > 1:
            raise ValueError("--keep-pixels: expected clips of one height and width, got --transform buckets")
        decoded.append(Field("pixels", "U8", (frames, *sizes.pop(), 3)))
    mirror = 2 if config.mirror else 1
    buckets = tuple((mirror, *encoder.row_shape(*shape)) for shape in reader.shapes)
    if len(set(buckets)) < len(buckets):  # pooled over all tokens, say
        raise ValueError(f"--frames: expected lengths whose rows differ in shape, got {buckets}; say one length")
    return ClipSetup(
        config=settled,
        source=source,
        text=text,
        device=device,
        schema=Schema(buckets, encoder.payload, (*source_fields(source, text), *decoded)),
        reasons=tuple(reasons),
        readers=ThreadPoolExecutor(1, thread_name_prefix="read"),
        decoded_fields=tuple(decoded),
        reader=reader,
        encoder=encoder,
    )


def _load(config: EncodeConfig, device: torch.device) -> ClipEncoder:
    dtype = DTYPES[config.compute_dtype]
    if config.vae is not None:
        if config.engine not in ("auto", "eager"):
            raise ValueError(f"--engine {config.engine}: autoencoders of videos encode with eager only")
        return load_video_clip_encoder(config.vae, device, dtype, config.payload)
    assert config.teacher is not None
    return load_teacher(
        config.teacher, config.teacher_weights, device, dtype,
        layer=config.layer, token_norm=config.token_norm, pool=config.pool, project_to=config.project_to,
        seed=config.seed,
    )  # fmt: skip


def _open_reader(
    config: EncodeConfig, encoder: ClipEncoder, device: torch.device, made: dict[str, Any]
) -> tuple[ClipReader, list[str]]:
    """What makes the clips, and why this decoder."""
    frames, size = config.frames, config.size
    if encoder.clip is not None:
        taken, height, width = encoder.clip
        if frames not in ((), (taken,)) or size not in (0, height) or height != width:
            raise ValueError(
                f"--frames, --size: this teacher takes {taken} frames of {height}×{width}, got "
                f"{','.join(map(str, frames)) or taken} of {size or height}"
            )
        frames, size = (taken,), height
    if not frames:
        raise ValueError("--frames: expected how many frames a clip has, such as 17, or 17,33,61 by the video's length")
    transform = open_transform(
        CLIP_TRANSFORM if config.transform == "auto" else config.transform,
        size or IMAGE_SIZE,
        seed=config.seed,
        multiple=encoder.size_multiple,
    )
    for count in frames:
        for shape in transform.shapes:
            encoder.row_shape(count, *shape)  # refuses what it does not take
    sampling = FrameSampling(
        frames,
        stride=config.frame_stride or _stride(config),
        placement=config.placement,
        views=config.views,
        fps=config.fps,
        short=config.short,
        seed=config.seed,
    )
    rule = made.get("view", {}).get("decode")
    name, reasons = settle_decoder(
        config.decoder, rule, lambda: choose_video_decoder(device.type), video_decoder_of
    )  # fmt: skip
    decoder = open_video_decoder(name, device=str(device), threads=config.readers)
    return ClipReader(decoder, sampling, transform), reasons


def _stride(config: EncodeConfig) -> int:
    """What --frame-stride 0 stands for."""
    if config.placement == "uniform":  # the video's length decides
        return 1
    return VAE_STRIDE if config.teacher is None else TEACHER_STRIDE


def _refuse_settings_of_others(config: EncodeConfig) -> None:
    """Raise ValueError for what means nothing for clips, or nothing with an autoencoder."""
    others = OF_TEACHERS if config.vae else OF_AUTOENCODERS
    if flags := given(config, (*OF_IMAGES, *others)):
        raise ValueError(f"{', '.join(flags)}: means nothing for videos with --{'vae' if config.vae else 'teacher'}")
    if config.decoder in IMAGE_DECODERS:
        raise ValueError(f"--decoder {config.decoder}: of images; expected auto, pyav, torchcodec or dali for videos")
    if config.fps is not None and not (config.fps > 0 and math.isfinite(config.fps)):
        raise ValueError(f"--fps: expected a positive number, got {config.fps}")
