"""A teacher's cached tokens as a student trains on them: with the clips that the teacher saw, and masks."""

from __future__ import annotations

import functools
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor
from torch.utils.data import default_collate

from fastlatent.data.latents import LatentDataset
from fastlatent.data.masks import MaskConfig, complement
from fastlatent.data.views import ChangedVideoError, VideoViews, cached_clip, recorded_view, view_of
from fastlatent.sources.items import UnreadableError
from fastlatent.store.provenance import differences
from fastlatent.store.reader import Dataset
from fastlatent.store.records import decode_key, encode_key, key_list

Grid = tuple[int, int, int]
MISSING = ("error", "leave-out")
VIEWS = ("all", "epoch")


@dataclass(frozen=True)
class LeftOut:
    """In place of a sample that cannot be had now: its video, which view of it, and why."""

    id: str
    view: int
    reason: str


class TeacherTokens(torch.utils.data.Dataset):
    """Map-style view of what `fastlatent encode --teacher` wrote. For a DataLoader with `collate_cached_latents`.

    A sample is a dict: `id` (str, the video's), `view` (int, which of its views), `label` (int, -1 for none),
    `key_hash` (int, of the clip's key), `tokens` [N, D] as stored, or float32 of int8 ones. With masks `tokens` [M, D]
    are the masked ones alone, and nothing else was read; `masked` int64 [M] and `visible` int64 [N - M] say which. With
    clips, `clip` uint8 [T, h, w, 3] are the very pixels that the teacher saw: decoded anew and held against the record
    of frames, crop and pixels, or read from the cache.

    All of a sample is a function of (cache, video, seed, epoch): not of batches, workers or ranks. A sample that cannot
    be had is a `LeftOut` in its place; the others stay where they are.

    Batches of workers pass through /dev/shm: prefetch_factor × num_workers of them, each of batch_size × (tokens and
    clip; 2.4 MB each for a ViT-B's 1568 tokens in float16 and 16 frames of 224 × 224).

    Args:
        path: the cache of one split.
        videos: root of the videos, to have clips decoded: what was encoded, or where it is now.
        kind, split: of that source, as for `fastlatent encode`; by default those that were encoded.
        clips: give the clips that --keep-pixels stored, where there are no `videos`.
        masks: which tokens to read; all by default.
        seed: of masks and views, 0 to 2**64 - 1.
        ids: which videos, in this order; or a file with one on each line. By default all, in the cache's order.
        missing: what to do about videos that are not in the cache, not among the videos, or changed since: "error"
            raises; "leave-out" keeps them in `missing`, or gives a LeftOut where it shows at reading only.
        view: "all": every view of a video is a sample; "epoch": one of them, another one each epoch.
        dequantize: int8 tokens as float32; otherwise as stored, with `scale` float32 ([N] or [M]).
        teacher: identity of the teacher that it must be (`ClipEncoder.identity`).
        grid: (time steps, height, width) of the tokens, where the cache does not say.
        device: where clips are decoded, "cuda" for a cache whose decoder needs that; workers must then be spawned.
        backend, generation: as for LatentDataset.

    Attributes:
        teacher: identity of the teacher.
        missing: id of each video that is left out -> why; ID@VIEW where only this view is.

    Raises:
        ValueError: the cache is not there, not finished, damaged or no cache of tokens; it is another teacher's; the
            decoder that made it is not installed; videos are missing and `missing` is "error"; an argument is wrong.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        videos: str | Path | None = None,
        kind: str = "auto",
        split: str | None = None,
        clips: bool = False,
        masks: MaskConfig | None = None,
        seed: int = 0,
        ids: Sequence[str] | str | Path | None = None,
        missing: str = "leave-out",
        view: str = "all",
        dequantize: bool = True,
        teacher: Mapping[str, Any] | None = None,
        grid: Grid | None = None,
        device: str = "cpu",
        backend: str | None = None,
        generation: int | None = None,
    ) -> None:
        for name, value, known in (("missing", missing, MISSING), ("view", view, VIEWS)):
            if value not in known:
                raise ValueError(f"TeacherTokens: {name}: expected one of {', '.join(known)}, got {value!r}")
        if not 0 <= seed < 1 << 64:
            raise ValueError(f"TeacherTokens: seed: expected 0 to 2^64 - 1, got {seed}")
        store = Dataset.open(path, generation=generation)
        hashed, told = store.provenance["hashed"], store.provenance["informational"]
        if store.payload != "tokens" or "teacher" not in hashed:
            raise ValueError(
                f"{path}: expected a cache of a teacher's tokens (fastlatent encode --teacher), got {store.payload}"
            )
        self.teacher: dict[str, Any] = hashed["teacher"]
        if teacher is not None:
            self.expect_teacher(teacher, path)
        if store.buckets[0].shape[0] != 1:
            raise ValueError(f"{path}: expected tokens of clips as they are, got those of --mirror too; encode without")
        int8 = store.buckets[0].dtype == "I8"
        self._latents = LatentDataset(
            path,
            columns=("tokens", "scale") if int8 else ("tokens",),
            backend=backend,
            generation=store.generation,
        )
        self.seed, self.masks, self.dequantize = seed, masks, dequantize
        self._strict, self._view = missing == "error", view
        self._grid = _token_grid(self.teacher) if grid is None else grid
        if masks is not None:
            self._check_masks(masks)
        self._views: VideoViews | None = None
        if videos is not None:
            recorded = hashed.get("view")
            if recorded is None:
                raise ValueError(
                    f"{path}: expected a cache that says which view of a video a clip is, got {sorted(hashed)}"
                )
            if kind == "auto":
                kind, split = told.get("kind") or "auto", split or told.get("split")
            self._views = VideoViews(
                videos, recorded, kind=kind, split=split, captions=told.get("captions"), device=device
            )
        elif clips and "pixels" not in {one.name for one in store.extras}:
            raise ValueError(
                f"{path}: no pixels were stored beside the tokens: give videos=, or encode with --keep-pixels"
            )
        self._cached_clips = clips and videos is None
        self._first, self._count, self.missing = self._choose(ids)
        self._rows = self._first
        if view == "all":
            inside = np.arange(self._count.sum()) - np.repeat(np.cumsum(self._count) - self._count, self._count)
            self._rows = np.repeat(self._first, self._count) + inside
        # Shared with workers, forked or spawned: those of a DataLoader with persistent_workers see the next epoch too.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def store(self) -> Dataset:
        """The open cache."""
        return self._latents.store

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "ids"}

    @functools.cached_property
    def ids(self) -> list[str]:
        """The video of each sample."""
        return [view_of(self.store, row)[0] for row in self._rows.tolist()]

    @property
    def buckets(self) -> np.ndarray:
        """int64 [len]: samples with the same number have tokens and clips of one shape, and fit into one batch."""
        return self.store.bucket[self._rows].astype(np.int64)

    @property
    def grid(self) -> Grid:
        """(time steps, height, width) of a clip's tokens: token (t, y, x) is number (t · height + y) · width + x.

        Raises:
            ValueError: the cache does not say.
        """
        if self._grid is None:
            raise ValueError(f"{self.store.path}: its teacher does not say how tokens lie in a clip; give grid=")
        return self._grid

    @property
    def epoch(self) -> int:
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Masks and views from now on are those of this epoch, in workers too; call it before iterating."""
        if epoch < 0:
            raise ValueError(f"TeacherTokens: epoch: expected 0 or more, got {epoch}")
        self._epoch.fill_(epoch)

    def expect_teacher(self, identity: Mapping[str, Any], path: str | Path | None = None) -> None:
        """Raise ValueError, field by field, where the tokens are not of the teacher with this identity."""
        lines = differences(self.teacher, identity)
        if lines:
            raise ValueError(
                f"{path or self.store.path}: its tokens are another teacher's: {'; '.join(lines)}; give that teacher, "
                "or encode with this one into another folder"
            )

    def __getitem__(self, index: int) -> dict[str, Any] | LeftOut:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any] | LeftOut]:
        numbers = np.asarray(indices, dtype=np.int64)
        if ((numbers < -len(self)) | (numbers >= len(self))).any():
            raise IndexError(f"TeacherTokens: index {numbers.tolist()} of {len(self)} samples")
        epoch = self.epoch
        rows = self._rows[numbers]
        if self._view == "epoch":
            rows = rows + self._view_of_epoch(numbers, epoch)
        samples: list[dict[str, Any] | LeftOut] = [self._describe(row) for row in rows.tolist()]
        if self._views is not None or self._cached_clips:
            samples = [self._with_clip(sample, row) for sample, row in zip(samples, rows.tolist(), strict=True)]
        good = np.array([isinstance(sample, dict) for sample in samples], bool)
        parts = self._tokens(rows[good]) if self.masks is None else self._masked_tokens(rows[good], epoch, self.masks)
        for sample, part in zip((one for one in samples if isinstance(one, dict)), parts, strict=True):
            sample.update(part)
        return samples

    def _view_of_epoch(self, numbers: np.ndarray, epoch: int) -> np.ndarray:
        """int64 [B], which view each video gives: a function of (seed, epoch, id), every view once in K epochs."""
        drawn = []
        for number in numbers.tolist():
            count = int(self._count[number])
            turn, place = divmod(epoch, count)
            id = encode_key(view_of(self.store, int(self._first[number]))[0])
            word = xxhash.xxh3_64_intdigest(b"view" + turn.to_bytes(8, "little") + id, seed=self.seed)
            drawn.append((word * count // 2**64 + place) % count)
        return np.array(drawn, np.int64)

    def _describe(self, row: int) -> dict[str, Any]:
        id, view = view_of(self.store, row)
        key_hash = int(self.store.key_hash[row].astype(np.int64))
        return {"id": id, "view": view, "label": int(self.store.label[row]), "key_hash": key_hash}

    def _with_clip(self, sample: Any, row: int) -> dict[str, Any] | LeftOut:
        if self._views is None:
            return sample | {"clip": cached_clip(self.store, row)}
        try:
            return sample | {"clip": self._views.clip(recorded_view(self.store, row))}
        except (UnreadableError, ChangedVideoError) as error:
            if self._strict:
                raise
            return LeftOut(sample["id"], sample["view"], str(error))

    def _tokens(self, rows: np.ndarray) -> list[dict[str, Tensor]]:
        samples = self._latents.__getitems__(rows.tolist())
        # Stored behind an axis of one, but where clips differ in their number of tokens.
        ragged = [self.store.buckets[number].ragged for number in self.store.bucket[rows].tolist()]
        return [
            self._values({name: values if flat else values[0] for name, values in sample.items()})
            for sample, flat in zip(samples, ragged, strict=True)
        ]

    def _masked_tokens(self, rows: np.ndarray, epoch: int, masks: MaskConfig) -> list[dict[str, Tensor]]:
        if not len(rows):
            return []
        masked = masks.masked(self.seed, epoch, self.store.key_hash[rows], self.grid)
        visible = complement(masked, math.prod(self.grid))
        gathered = self._latents.gather_tokens(rows, masked)
        return [
            self._values({name: batch[i] for name, batch in gathered.items()})
            | {"masked": masked[i], "visible": visible[i]}
            for i in range(len(rows))
        ]

    def _values(self, stored: dict[str, Tensor]) -> dict[str, Tensor]:
        if not self.dequantize or "scale" not in stored:
            return stored
        return {"tokens": stored["tokens"].float() * stored["scale"].unsqueeze(-1)}

    def _check_masks(self, masks: MaskConfig) -> None:
        counts = {bucket.shape[1] for bucket in self.store.buckets if bucket.rows}
        if counts != {math.prod(self.grid)}:
            raise ValueError(
                f"{self.store.path}: masks need clips of {math.prod(self.grid)} tokens, as the grid {self.grid} has, "
                f"got {sorted(counts)} (-1: any number)"
            )
        masks.count(self.grid)

    def _choose(self, ids: Sequence[str] | str | Path | None) -> tuple[np.ndarray, np.ndarray, dict[str, str]]:
        """First sample and number of views of each video that there is, and why others are left out."""
        store = self.store
        if store.groups is None:
            names = key_list({"key.offsets": store.key_offsets, "key.utf8": store.key_utf8})
            first = np.arange(len(names) + 1)
        else:
            names = key_list({"key.offsets": store.groups.offsets, "key.utf8": store.groups.utf8})
            first = np.searchsorted(store.groups.group, np.arange(len(names) + 1))
        number = {decode_key(name): i for i, name in enumerate(names)}
        wanted = list(number) if ids is None else _read_ids(ids)
        asked = set(wanted)
        why: dict[str, str] = {}
        of_views: dict[str, str] = {}  # a part of a video; there may be a video of this very name
        for one in store.quarantined:
            video = one.key if store.groups is None else one.key.rpartition("@")[0]
            if ids is None or video in asked:
                reason = f"in the cache's quarantine: {one.reason}"
                if video in number:
                    of_views[one.key] = reason
                else:
                    why[video] = reason
        absent = dict.fromkeys(id for id in wanted if id not in number)
        if self._views is not None:
            source = self._views.source
            keys = [item.key for item in source.items]
            if ids is None:
                absent |= dict.fromkeys(id for id in (*keys, *source.left_out) if id not in number)
            there = set(keys)
            gone = f"there is no such video in {self._views.root}"
            why |= {id: source.left_out.get(id, gone) for id in wanted if id in number and id not in there}
            why = {**{id: source.left_out[id] for id in absent if id in source.left_out}, **why}
        not_yet = "not in the cache (yet): run the same encode again, or look at it with fastlatent inspect"
        why = {**dict.fromkeys(absent, not_yet), **why}
        kept = np.array([number[id] for id in wanted if id in number and id not in why], np.int64)
        why = {**of_views, **why}
        if why and (self._strict or not len(kept)):
            listed = "; ".join(f"{id!r}: {reason}" for id, reason in list(why.items())[:3])
            raise ValueError(
                f"{store.path}: {len(why):,} of {len(why) + len(kept):,} videos are missing: {listed}"
                + ("" if not len(kept) else "; missing='leave-out' goes on without them")
            )
        return first[kept], first[kept + 1] - first[kept], why


class CachedSSv2Dataset(TeacherTokens):
    """TeacherTokens of `fastlatent encode --teacher ... --split SPLIT --cache-dir CACHE_DIR`.

    Args:
        cache_dir, split: the cache is CACHE_DIR/SPLIT.
        data_root: root of the videos (`videos` of TeacherTokens): samples then have their clip.
        options: the other arguments of TeacherTokens.

    Raises:
        ValueError: as TeacherTokens.
    """

    def __init__(
        self, cache_dir: str | Path, split: str = "train", data_root: str | Path | None = None, **options: Any
    ) -> None:
        path = Path(cache_dir) / split
        if not path.is_dir():
            there = sorted(one.parent.name for one in Path(cache_dir).glob("*/provenance.json"))
            raise ValueError(
                f"{path}: expected a cache of the split {split!r}, got no such folder; in {cache_dir} there are: "
                f"{', '.join(there) or 'none'}. `fastlatent encode --teacher … --split {split} --cache-dir "
                f"{cache_dir}` makes it"
            )
        super().__init__(path, videos=data_root, **options)


def collate_cached_latents(samples: Sequence[dict[str, Any] | LeftOut]) -> dict[str, Any]:
    """A batch of TeacherTokens' samples, for a DataLoader's collate_fn.

    Returns:
        ids (list of str) of the samples that are there, in their order, and left_out (list of LeftOut). Tensors have a
        row for each of `ids`: tokens [B, N or M, D], and by the samples' names masked [B, M], visible [B, N - M], clip
        uint8 [B, T, h, w, 3], label, view, key_hash int64 [B]. Where nothing of the batch is left there are only ids
        and left_out: skip such a batch, on all ranks together.

    Raises:
        ValueError: clips of several shapes.
    """
    kept = [sample for sample in samples if not isinstance(sample, LeftOut)]
    batch: dict[str, Any] = {
        "ids": [sample["id"] for sample in kept],
        "left_out": [sample for sample in samples if isinstance(sample, LeftOut)],
    }
    for name in kept[0] if kept else ():
        values = [sample[name] for sample in kept]
        shapes = {tuple(value.shape) for value in values if isinstance(value, Tensor)}
        if len(shapes) > 1:
            raise ValueError(
                f"collate_cached_latents: {name}: expected one shape in a batch, got {sorted(shapes)}: make batches of "
                "samples that have the same number in TeacherTokens.buckets"
            )
        if name != "id":
            batch[name] = default_collate(values)  # in a worker straight into shared memory
    return batch


def _read_ids(ids: Sequence[str] | str | Path) -> list[str]:
    """Those given, or the lines of a file.

    Raises:
        ValueError: no such file, none, or one twice.
    """
    what = "ids"
    if isinstance(ids, (str, os.PathLike)):
        what = f"ids of {os.fspath(ids)}"
        try:
            lines = Path(ids).read_text(encoding="utf-8", errors="surrogateescape").splitlines()
        except OSError as error:
            raise ValueError(f"ids: expected a file with one id on each line, got {ids}: {error.strerror}") from None
        ids = [line.strip() for line in lines if line.strip()]
    wanted = [str(id) for id in ids]
    twice = [id for id, count in Counter(wanted).items() if count > 1]
    if twice or not wanted:
        raise ValueError(
            f"{what}: expected each id once, got {len(twice)} more than once: {twice[:3]} of {len(wanted)}"
        )
    return wanted


def _token_grid(teacher: Mapping[str, Any]) -> Grid | None:
    """Of the tokens of a teacher with this identity, None where it does not say."""
    pool, sizes, clip = teacher.get("pool", "none"), teacher.get("sizes", {}), teacher.get("clip")
    if pool == "all":
        return 1, 1, 1
    if not clip or not {"tubelet", "patch"} <= set(sizes):
        return None
    steps, rows, columns = clip[0] // sizes["tubelet"], clip[1] // sizes["patch"], clip[2] // sizes["patch"]
    return (steps, 1, 1) if pool == "space" else (steps, rows, columns)
