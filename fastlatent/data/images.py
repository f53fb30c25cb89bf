"""Batches of images straight from a source's files."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastlatent.data.ahead import Ahead, DeviceCopy
from fastlatent.data.order import BatchOrder
from fastlatent.media.images import ImageError, read_image, to_model_range
from fastlatent.media.transforms import center_crop
from fastlatent.ops import sample_posterior
from fastlatent.sources.items import Source, UnreadableError
from fastlatent.store.records import encode_key, key_hashes

# Threads that read and decode: at least 4, because disks and networks want several reads at once; at most 16, because
# each of a machine's processes has as many. Two busy cores decode and crop 400 JPEGs of 500 x 375 a second.
READERS = min(16, max(4, os.cpu_count() or 4))


class ImageLoader:
    """Shuffled batches of centre-cropped images in [−1, 1].

    The sequence of batches depends on (files, batch_size, seed) alone: not on ranks, threads or interruptions. A file
    that cannot be read or decoded is replaced by the next of the source that can be, so that every batch has its size;
    it is tried once, and kept in `failures` (key → reason).

    Args:
        source: the images, with labels and conditions where it has them.
        batch_size: images per step over all ranks.
        size: side of the crop (ADM's).
        channels: 1 or 3.
        mirror: mirror half of the images at random: a function of (seed, epoch, key), and the same one that chooses
            among the latents of a dataset that was encoded with --mirror.
        seed: of order and mirroring.
        rank, world_size: this process reads every world_size-th sample of each batch.
        preserve_input_precision: files of more than 8 bits keep their values; otherwise they are rounded to 8 bits.
        input_range: as for `fastlatent.media.images.read_image`.
        device: where batches go; with CUDA from pinned memory, on a stream of their own.
        prefetch: batches that are filled ahead; 0 fills each when it is asked for.

    Raises:
        ValueError: the batch is larger than the source, or the ranks do not divide it.
    """

    def __init__(
        self,
        source: Source,
        batch_size: int,
        *,
        size: int,
        channels: int,
        mirror: bool,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        preserve_input_precision: bool = True,
        input_range: tuple[float, float] | None = None,
        device: torch.device | str | None = None,
        prefetch: int = 2,
    ) -> None:
        self.source, self.seed, self.prefetch = source, seed, prefetch
        self.order = BatchOrder(len(source.items), batch_size, seed=seed, rank=rank, world_size=world_size)
        self.device = torch.device(device or "cpu")
        if self.device.type == "cuda" and self.device.index is None:
            self.device = torch.device("cuda", torch.cuda.current_device())  # the thread's may be another
        self._files = _Files(source, size, channels, preserve_input_precision, input_range)
        self._filler = _Filler(self._files, self.order, seed if mirror else None, self.device)
        self._ahead: Ahead | None = None
        self._stop: Callable[[], object] = _nothing

    @property
    def steps_per_epoch(self) -> int:
        """Steps in which every image is seen once; the incomplete last batch is dropped."""
        return self.order.steps_per_epoch

    @property
    def failures(self) -> dict[str, str]:
        """Key of each file of this rank that could not be used so far → why."""
        return self._files.failures

    @property
    def left_out(self) -> dict[str, str]:
        """What the source left out, and `failures`."""
        return {**self.source.left_out, **self.failures}

    def batch(self, step: int) -> dict[str, Any]:
        """This rank's share of the batch of a step counted from 0. Steps in sequence are fastest.

        Returns:
            pixels float32 [B, channels, size, size] in [−1, 1], label int64 [B] (−1: none), key_hash int64 [B] (as in
            a dataset that is encoded from the source), epoch int; and condition float32 [B, numbers] and
            condition_present float32 [B, names] where the source has them.

        Raises:
            ValueError: no image can be read, or a package that one of them needs is missing.
        """
        if not self.prefetch:
            return self._filler.finish(self._filler.fill(step))
        ahead = self._ahead
        if ahead is None or ahead.next != step or ahead.pid != os.getpid():
            self.close()
            ahead = self._ahead = Ahead(self._filler.fill, step, self.prefetch)
            # Runs once: in close(), when the loader is collected, or when the interpreter ends.
            self._stop = weakref.finalize(self, ahead.stop)
        try:
            return self._filler.finish(ahead.take())
        except BaseException:  # the thread has ended, or Ctrl-C came: the same step may be asked for again
            self.close()
            raise

    def samples(self, indices: np.ndarray, epoch: int = 0) -> dict[str, Any]:
        """The images `indices` (int64 [B], into the source's items), as `batch` gives them; the thread is not asked."""
        return self._filler.finish(self._filler.read(indices, epoch))

    def close(self) -> None:
        """End the thread; the next batch starts it again."""
        self._stop()
        self._stop, self._ahead = _nothing, None


class _Files:
    """Decodes and crops single images; what cannot be is replaced. Called by several threads."""

    def __init__(
        self,
        source: Source,
        size: int,
        channels: int,
        preserve_input_precision: bool,
        input_range: tuple[float, float] | None,
    ) -> None:
        self.source, self.size, self.channels = source, size, channels
        self._preserve, self._input_range = preserve_input_precision, input_range
        self.failures: dict[str, str] = {}
        self._instead: dict[int, int] = {}  # index that failed -> where to go on: the next one, or one that was good

    def load(self, index: int, out: np.ndarray) -> int:
        """Fill out [channels, size, size] with image `index`, or the next one that can be read; returns which."""
        passed = []
        while True:
            while index in self._instead:
                if len(self._instead) == len(self.source.items):
                    raise ValueError(
                        f"none of {len(self._instead):,} images can be read; "
                        + "; ".join(f"{key!a}: {reason}" for key, reason in list(self.failures.items())[:3])
                    )
                passed.append(index)
                index = self._instead[index]
            item = self.source.items[index]
            try:
                out[:] = self._decode(self.source.fetch(item))
            except (ImageError, UnreadableError) as error:
                self.failures[item.key] = str(error)
                self._instead[index] = (index + 1) % len(self.source.items)
                continue
            for one in passed:  # a long row of bad files is walked along once
                self._instead[one] = index
            return index

    def _decode(self, data: bytes) -> np.ndarray:
        image = read_image(data, channels=self.channels, input_range=self._input_range)
        if image.dtype != np.uint8 and not self._preserve:
            image = np.rint(image * np.float32(255)).astype(np.uint8)
        return to_model_range(center_crop(image, self.size)[0])


class _Filler:
    """Makes batches. `fill` may run in a thread, and knows no loader; `finish` runs in the consumer's."""

    def __init__(self, files: _Files, order: BatchOrder, mirror_seed: int | None, device: torch.device) -> None:
        self._files, self._order, self._mirror_seed = files, order, mirror_seed
        self._names = [one.name for one in files.source.columns if one.name in ("condition", "condition_present")]
        self._copy = DeviceCopy(device)
        self._pinned = device.type == "cuda"
        self._pool: ThreadPoolExecutor | None = None
        self._pid = 0
        self._lock = threading.Lock()

    def fill(self, step: int) -> tuple[dict[str, Any], torch.cuda.Event | None]:
        epoch, indices = self._order.indices(step)
        return self.read(indices, epoch)

    def read(self, indices: np.ndarray, epoch: int) -> tuple[dict[str, Any], torch.cuda.Event | None]:
        files = self._files
        shape = (len(indices), files.channels, files.size, files.size)
        # Of each batch its own: torch keeps freed pinned memory, and gives it out again once its copies are done.
        pixels = torch.empty(shape, pin_memory=self._pinned)
        used = list(self._readers().map(files.load, indices.tolist(), pixels.numpy()))
        items = [files.source.items[index] for index in used]
        hashes = key_hashes([encode_key(item.key) for item in items])
        batch = {
            "pixels": pixels,
            "label": torch.tensor([item.label for item in items], dtype=torch.int64),
            "key_hash": torch.from_numpy(hashes.view(np.int64)),
        }
        for name in self._names:
            batch[name] = torch.tensor([item.attached[name] for item in items], dtype=torch.float32)
        if self._mirror_seed is not None:
            chosen = mirrored(batch["key_hash"], self._mirror_seed, epoch)
            pixels[chosen] = pixels[chosen].flip(-1)
        moved, copied = self._copy.begin(batch)
        return {**moved, "epoch": epoch}, copied

    def finish(self, filled: tuple[dict[str, Any], torch.cuda.Event | None]) -> dict[str, Any]:
        return self._copy.finish(*filled)

    def _readers(self) -> ThreadPoolExecutor:
        with self._lock:
            if self._pool is None or self._pid != os.getpid():  # threads do not survive a fork
                self._pool, self._pid = ThreadPoolExecutor(READERS, thread_name_prefix="images"), os.getpid()
            return self._pool


def mirrored(key_hash: Tensor, seed: int, epoch: int) -> Tensor:
    """bool [B]: which samples are mirrored in this epoch, as `sample_posterior` chooses where both are stored."""
    both = torch.tensor([[0.0], [1.0]], device=key_hash.device).expand(len(key_hash), 2, 1)
    return sample_posterior(both, key_hash, seed=seed, epoch=epoch, has_logvar=False)[:, 0] == 1


def _nothing() -> None:
    pass
