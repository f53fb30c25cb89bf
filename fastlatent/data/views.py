"""The view of a video that a cached row was made from: made again for a student, and held against what was recorded."""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor

from fastlatent.media.clips import Clip, ClipReader, open_clip_reader
from fastlatent.media.video_error import VideoError
from fastlatent.sources.items import Item, Source, UnreadableError, content_digest
from fastlatent.sources.open import open_source
from fastlatent.store.reader import Dataset
from fastlatent.store.records import digest_strings

SHOWN = 24  # numbers of an array that a message shows


class ViewMismatch(ValueError):
    """What is made of a video now is not what the teacher saw; the message names the field and both values."""


class ChangedVideoError(ViewMismatch):
    """The file itself is another one than the cached row was made from."""


@dataclass(frozen=True)
class View:
    """What a dataset records of one row's clip.

    id: the video's key in its source. number: which of its views. digest: xxh3_128 of the file, 32 hexadecimal digits.
    frame_index: int32 [T], the decoded frames. crop: int32 [4], what of each the clip shows. pixels: xxh3_64 of the
    uint8 clip [T, h, w, 3]. environment: versions of what made it.
    """

    id: str
    number: int
    digest: str
    frame_index: np.ndarray
    crop: np.ndarray
    pixels: int
    environment: Mapping[str, Any]


def view_of(store: Dataset, sample: int) -> tuple[str, int]:
    """The id of the video that a sample was made from, and which of its views it is."""
    if store.groups is None:
        return store.key(sample), 0
    return store.groups.key(int(store.groups.group[sample])), int(store.groups.order[sample])


def recorded_view(store: Dataset, sample: int) -> View:
    """The view of a sample of a dataset of clips.

    Raises:
        ValueError: its shard is missing or damaged.
    """
    id, number = view_of(store, sample)
    environment = store.shards[int(store.shard[sample])].environment
    return View(
        id=id,
        number=number,
        digest=digest_strings(store.src_xxh3[sample : sample + 1])[0],
        frame_index=column_row(store, "frame_index", sample),
        crop=store.crop[sample],
        pixels=int(column_row(store, "view_xxh3", sample)[0]),
        environment=environment or store.provenance["informational"].get("environment") or {},
    )


def column_row(store: Dataset, name: str, sample: int) -> np.ndarray:
    """One sample's row of a further tensor, a view of the mapped shard."""
    columns, row = store.open_shard(int(store.shard[sample])).columns, int(store.row[sample])
    offsets = columns.get(f"{name}.offsets")
    return columns[name][row] if offsets is None else columns[name][int(offsets[row]) : int(offsets[row + 1])]


def cached_clip(store: Dataset, sample: int) -> Tensor:
    """The pixels that were stored beside a row: uint8 [T, h, w, 3].

    Raises:
        ValueError: they are damaged, or the shard is.
    """
    pixels = column_row(store, "pixels", sample).copy()
    expected, found = int(column_row(store, "view_xxh3", sample)[0]), xxhash.xxh3_64_intdigest(pixels.data)
    if found != expected:
        raise ValueError(
            f"{store.path}: pixels of {store.key(sample)!r}: expected xxh3_64 {expected:016x}, got {found:016x}: the "
            f"shard is damaged; `fastlatent repair {store.path}` drops it, the same `encode` makes it again"
        )
    return torch.from_numpy(pixels)


class VideoViews:
    """Makes the clips of recorded views anew from the videos themselves.

    Nothing of it is open after unpickling: a spawned worker lists the source and opens the decoder when it first needs
    them. A forked one uses the parent's list, and a decoder of its own.

    Args:
        root: of the videos: what `fastlatent encode` was given, or where they are now.
        settings: the dataset's provenance["hashed"]["view"].
        kind, split, captions: as for `fastlatent encode`; captions too, since a row's digest covers what lies beside.
        device: where the decoder works.

    Raises:
        ValueError: there are no videos; the decoder that made the views is not installed, or a rule of `settings` is
            not known here.
    """

    def __init__(
        self,
        root: str | Path,
        settings: Mapping[str, Any],
        *,
        kind: str = "auto",
        split: str | None = None,
        captions: str | None = None,
        device: str = "cpu",
    ) -> None:
        self.root, self.kind, self.split, self.captions, self.device = str(root), kind, split, captions, device
        self.settings = dict(settings)
        self._source: Source | None = None
        self._number: dict[str, int] = {}
        self._reader: ClipReader | None = None
        self._pid = 0
        # Not kept: a forked worker must not use it, and a decoder that is missing shows here.
        open_clip_reader(self.settings, device=device).close()
        _ = self.source

    @property
    def source(self) -> Source:
        """The videos; listed with the first use in this process."""
        if self._source is None:
            self._source = open_source(
                self.root, media="videos", kind=self.kind, split=self.split, captions=self.captions
            )
        return self._source

    def item(self, id: str) -> Item | None:
        """The video of an id, None where the source has none."""
        items = self.source.items
        if find := getattr(items, "find", None):
            number = find(id)
        else:
            if not self._number:
                self._number = {item.key: i for i, item in enumerate(items)}
            number = self._number.get(id, -1)
        return None if number < 0 else items[number]

    def clip(self, view: View) -> Tensor:
        """uint8 [T, h, w, 3], bit for bit what the teacher saw.

        Raises:
            UnreadableError: the file is gone or cannot be read.
            ChangedVideoError: the file is not the one that the view was made from.
            ViewMismatch: the frames, the crop or the pixels that come out now differ from the recorded ones.
        """
        item = self.item(view.id)
        if item is None:
            raise UnreadableError(f"there is no video {view.id!r} in {self.root}")
        data = self.source.fetch(item)
        found = content_digest(item, data)
        if found != view.digest:
            raise ChangedVideoError(
                f"{item.place} changed since it was cached: xxh3_128 {view.digest} (cache) != {found} (now); put the "
                "file back, or run the same encode again"
            )
        try:
            clip = self._open_reader().read(data, view.id, view.number)
        except VideoError as error:
            raise ViewMismatch(
                f"{item.place}, view {view.number}: could be decoded when it was cached, and cannot now: {error}; "
                f"{_versions(view, self.settings)}"
            ) from error
        different = difference(view, clip)
        if different:
            raise ViewMismatch(
                f"{item.place}, view {view.number}: this is not the clip that the teacher saw: {different}; "
                f"{_versions(view, self.settings)}"
            )
        return torch.from_numpy(clip.pixels)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_source": None, "_number": {}, "_reader": None}

    def _open_reader(self) -> ClipReader:
        if self._reader is None or self._pid != os.getpid():  # a decoder's threads do not survive a fork
            self._reader, self._pid = open_clip_reader(self.settings, device=self.device), os.getpid()
        return self._reader


def difference(view: View, clip: Clip) -> str:
    """The first field in which a clip made now differs from its record: "NAME: THEN (cache) != NOW (now)", or ""."""
    for name in ("frame_index", "crop"):
        then, now = getattr(view, name), getattr(clip, name)
        if not np.array_equal(then, now):
            return f"{name}: {_shown(then)} (cache) != {_shown(now)} (now)"
    if view.pixels != clip.digest:
        return f"pixels (view_xxh3): {view.pixels:016x} (cache) != {clip.digest:016x} (now)"
    return ""


def _versions(view: View, settings: Mapping[str, Any]) -> str:
    """The decoder, and which packages have other versions than those that made the view."""
    changed = []
    for name, then in view.environment.items():
        try:
            now = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # a number of cores, say
            continue
        if now.partition("+")[0] != str(then).partition("+")[0]:  # 2.13.0 is 2.13.0+cpu
            changed.append(f"{name}: {then} (cache) != {now} (now)")
    decoder = settings.get("decode")
    if changed:
        return (
            f"decoder {decoder!r}; {', '.join(changed)}: install those versions, or encode with --keep-pixels and read "
            "the pixels from the cache"
        )
    return (
        f"decoder {decoder!r}, all recorded versions as they were: another processor or FFmpeg decodes here; encode "
        "with --keep-pixels and read the pixels from the cache"
    )


def _shown(values: Sequence[int] | np.ndarray) -> str:
    shown = " ".join(map(str, np.asarray(values).tolist()[:SHOWN]))
    return f"[{shown}{' …' if len(values) > SHOWN else ''}]"
