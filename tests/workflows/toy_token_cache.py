"""A cache of tokens of a teacher that is arithmetic, written without `fastlatent encode` from real videos."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from fastlatent.media.clips import ClipReader
from fastlatent.media.frame_sampling import FrameSampling
from fastlatent.media.transforms import open_transform
from fastlatent.media.video_decoders import open_video_decoder
from fastlatent.media.video_error import VideoError
from fastlatent.sources.items import content_digest
from fastlatent.sources.open import open_source
from fastlatent.store.records import RAGGED, Field, Quarantined, Schema
from fastlatent.store.rows import Rows, quantize
from fastlatent.store.scan import Entry
from fastlatent.store.writer import DatasetWriter

FRAMES, SIZE, PATCH, TUBELET = 4, 32, 16, 2
GRID = (FRAMES // TUBELET, SIZE // PATCH, SIZE // PATCH)
# As the identity of a VideoMAE.
TEACHER = {
    "class": "Toy", "sizes": {"dim": 6, "patch": PATCH, "tubelet": TUBELET}, "clip": [FRAMES, SIZE, SIZE], "layer": 12,
    "token_norm": "none", "pool": "none", "weights": "0" * 64,
}  # fmt: skip


def toy_tokens(clip: np.ndarray) -> np.ndarray:
    """uint8 [T, h, w, 3] → float32 [N, D = 6]: means of each frame and channel of a patch of 2 x 16 x 16."""
    frames, height, width = clip.shape[0] // TUBELET, clip.shape[1] // PATCH, clip.shape[2] // PATCH
    patches = clip.reshape(frames, TUBELET, height, PATCH, width, PATCH, 3).astype(np.float64) / 255
    means = patches.mean((3, 5))  # [t, 2, h, w, 3]
    return means.transpose(0, 2, 3, 1, 4).reshape(-1, TUBELET * 3).astype(np.float32)


def toy_reader(*, views: int = 1, placement: str = "center", decoder: str = "pyav") -> ClipReader:
    sampling = FrameSampling((FRAMES,), placement=placement, views=views)
    return ClipReader(
        open_video_decoder(decoder, device="cpu", threads=1), sampling, open_transform("center", SIZE, multiple=PATCH)
    )


def make_cache(
    path: Path,
    videos: Path,
    *,
    views: int = 1,
    dtype: str = "float16",
    pixels: bool = False,
    kind: str = "videos",
    split: str | None = None,
    only: Callable[[str], bool] = lambda key: True,
    spoil: Callable[[str, dict[str, Any]], None] | None = None,
    ragged: bool = False,
    teacher: dict[str, Any] = TEACHER,
    environment: dict[str, str] | None = None,
    unit_rows: int = 3,
    units: int = 1 << 30,
    watch: Callable[[int], None] = lambda number: None,
) -> Path:
    """Encode the videos of a source into `path`, as far as `units` units; finished only where that is all.

    watch(number) is called before each unit. spoil(key, columns) may change what is recorded of a row: frame_index,
    crop, view_xxh3, pixels, tokens. only: whether an id is encoded.
    """
    reader = toy_reader(views=views)
    source = open_source(videos, media="videos", kind=kind, split=split)
    items = {item.key: item for item in source.items if only(item.key)}
    of_row = {reader.sampling.clip_key(key, view): (key, view) for key in items for view in range(views)}
    entries = [
        Entry(
            row, row, items[key].label, items[key].size, items[key].stamp, 0, key if views > 1 else "",
            view if views > 1 else 0,
        )
        for row, (key, view) in of_row.items()
    ]  # fmt: skip
    extras = [Field("frame_index", "I32", (FRAMES,)), Field("view_xxh3", "U64", (1,))]
    extras += [Field("pixels", "U8", (FRAMES, SIZE, SIZE, 3))] if pixels else []
    bucket = (1, RAGGED, 6) if ragged else (1, GRID[0] * GRID[1] * GRID[2], 6)
    provenance = {
        "hashed": {"teacher": teacher, "view": reader.settings(), "storage_dtype": dtype},
        "informational": {"kind": kind, "split": split, "environment": environment or {}},
    }

    def examine(entry: Entry) -> tuple[str, int]:
        item = items[of_row[entry.key][0]]
        return content_digest(item, source.fetch(item)), 0

    schema = Schema((bucket,), payload="tokens", extras=tuple(extras))
    with DatasetWriter.open(path, provenance, source.classes, unit_rows=unit_rows, schema=schema) as writer:
        writer.plan(entries, examine=examine)
        for number, unit in enumerate(writer.claim()):
            watch(number)
            if number == units:
                return path
            rows, bad = [], []
            for planned in unit.items:
                key, view = of_row[planned.key]
                try:
                    clip = reader.read(source.fetch(items[key]), key, view)
                except VideoError as error:
                    bad.append(Quarantined(planned.key, planned.digest, str(error), type(error).__name__))
                    continue
                columns = {
                    "frame_index": clip.frame_index, "view_xxh3": np.array([clip.digest], "<u8"), "crop": clip.crop,
                    "pixels": clip.pixels, "tokens": toy_tokens(clip.pixels), "orig_hw": np.array(clip.orig_hw, "<i4"),
                    "key": planned.key,
                }  # fmt: skip
                if spoil is not None:
                    spoil(planned.key, columns)
                rows.append(columns)
            writer.commit(unit, _rows(rows, dtype, ragged, [one.name for one in extras]), bad)
        writer.finish()
    reader.close()
    return path


def _rows(rows: list[dict[str, Any]], dtype: str, ragged: bool, extras: list[str]) -> Rows:
    def stacked(name: str) -> np.ndarray:
        return np.stack([row[name] for row in rows])

    keys = [row["key"] for row in rows]
    if not rows:
        return Rows(keys, np.zeros((0, 1, 1, 6), np.float16))
    scale = None
    if ragged:  # clip i has i tokens less
        payload: Any = [row["tokens"][: len(row["tokens"]) - i].astype(dtype) for i, row in enumerate(rows)]
    elif dtype == "int8":
        payload, scale = quantize(stacked("tokens")[:, None], 3)  # a scale per token
    else:
        payload = stacked("tokens")[:, None].astype(dtype)
    return Rows(
        keys, payload, stacked("orig_hw"), stacked("crop"), scale, {name: stacked(name) for name in extras}
    )  # fmt: skip
