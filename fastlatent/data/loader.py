"""The loader: shuffled batches of a latent dataset, filled ahead by one thread and copied to the device meanwhile."""

from __future__ import annotations

import logging
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fastlatent.data.ahead import Ahead, DeviceCopy
from fastlatent.data.backends import Choice
from fastlatent.data.order import BatchOrder, BucketOrder

if TYPE_CHECKING:
    from fastlatent.data.latents import LatentDataset

_log = logging.getLogger(__name__)


class LatentLoader:
    """Shuffled batches of a LatentDataset. Iterating goes on where it stopped, to the end of the epoch.

    The sequence of batches depends on (dataset, batch_size, seed) alone: not on ranks, the back end, prefetching or
    interruptions. One thread fills batches ahead with the GIL released; no worker processes. On the CPU every batch
    has tensors of its own. With a CUDA device, prefetch + 1 pinned buffers take turns, and the copies run on a stream
    of their own; `batch` makes the current stream wait for its copy. (Capture CUDA graphs beside a running loader with
    capture_error_mode="thread_local".) After a fork the child starts a thread of its own.

    Args:
        dataset: what to read.
        batch_size: samples per step over all ranks.
        seed: of the order.
        device: where batches go.
        rank, world_size: this process reads every world_size-th sample of each batch.
        backend: as for LatentDataset, whose choice it overrides.
        prefetch: batches that are filled ahead; 0 fills each when it is asked for, without a thread.
        check_rows: hold every row against its checksum before it is handed out (0.6 us for 32 KiB).

    Attributes:
        step: the next batch that iterating gives.
        choice: the back end in use and why; None before the first batch.
    """

    def __init__(
        self,
        dataset: LatentDataset,
        batch_size: int,
        *,
        seed: int = 0,
        device: torch.device | str | None = None,
        rank: int = 0,
        world_size: int = 1,
        backend: str | None = None,
        prefetch: int = 2,
        check_rows: bool = False,
    ) -> None:
        if prefetch < 0:
            raise ValueError(f"LatentLoader: expected prefetch >= 0, got {prefetch}")
        if backend is not None and backend != dataset.backend:
            dataset = dataset.with_backend(backend)
        self.dataset = dataset
        self.device = torch.device(device or "cpu")
        if self.device.type == "cuda" and self.device.index is None:
            self.device = torch.device("cuda", torch.cuda.current_device())  # the thread's may be another
        self.order = batch_order(dataset, batch_size, seed=seed, rank=rank, world_size=world_size)
        self.prefetch, self.check_rows = prefetch, check_rows
        self.step = 0
        self.choice: Choice | None = None
        self._filler: _Filler | None = None
        self._ahead: Ahead | None = None
        self._stop: Callable[[], object] = _nothing

    def __len__(self) -> int:
        """Steps per epoch."""
        return self.order.steps_per_epoch

    @property
    def left_out(self) -> dict[str, str]:
        """Nothing: what could not be encoded is no sample of a dataset."""
        return {}

    @property
    def steps_per_epoch(self) -> int:
        """As the other loaders call it."""
        return len(self)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        epoch = self.step // len(self)
        while self.step // len(self) == epoch:
            batch = self.batch(self.step)
            self.step += 1
            yield batch

    def batch(self, step: int) -> dict[str, Any]:
        """The batch of a step counted from 0: the dataset's columns, and `epoch` (int). Steps in sequence are fastest.

        Raises:
            ValueError: a row of this batch cannot be read, or is damaged and check_rows is set.
        """
        if self._filler is None or self._filler.pid != os.getpid():
            self.close()
            self._filler = _Filler(self.dataset, self.order, self.device, self.prefetch + 1, self.check_rows)
            if self.dataset.store.payload in self.dataset.columns:
                self.choice = self.dataset.choice
                _log.info("%s: rows are read by %s: %s", self.dataset.store.path, self.choice.name, self.choice.why)
        if not self.prefetch:
            return self._filler.hand_out(self._filler.fill(step))
        ahead = self._ahead
        if ahead is None or ahead.next != step:
            self.close()
            ahead = self._ahead = Ahead(self._filler.fill, step, self.prefetch)
            # Runs once: in close(), when the loader is collected, or when the interpreter ends.
            self._stop = weakref.finalize(self, ahead.stop)
        try:
            return self._filler.hand_out(ahead.take())
        except BaseException:  # the thread has ended, or Ctrl-C came: the same step may be asked for again
            self.close()
            raise

    def close(self) -> None:
        """End the thread; the next batch starts it again."""
        self._stop()
        self._stop, self._ahead = _nothing, None

    def state_dict(self) -> dict[str, int]:
        """Where the loader stands: {seed, batch_size, step}."""
        return {"seed": self.order.seed, "batch_size": self.order.batch_size, "step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on where `state` was taken, at any step and world size; ValueError if it belongs to another order."""
        for name in ("seed", "batch_size"):
            if state[name] != getattr(self.order, name):
                raise ValueError(
                    f"LatentLoader: the state has {name} {state[name]}, this loader {getattr(self.order, name)}"
                )
        self.step = state["step"]


class _Filler:
    """Makes the batch of a step. `fill` may run in a thread; `hand_out` runs in the consumer's. Of one process."""

    def __init__(
        self,
        dataset: LatentDataset,
        order: BatchOrder | BucketOrder,
        device: torch.device,
        slots: int,
        check_rows: bool,
    ) -> None:
        self.pid = os.getpid()
        self._dataset, self._order, self._device, self._check_rows = dataset, order, device, check_rows
        self._busy = threading.Lock()  # a thread that was told to stop may still be at its last batch
        if dataset.store.payload in dataset.columns:
            dataset.open()  # here: what a thread was opening during a fork would be half open in the child
        self._slots: list[dict[int, dict[str, Tensor]]] = [{} for _ in range(slots)]  # by bucket
        self._copied: list[torch.cuda.Event | None] = [None] * slots
        self._copy = DeviceCopy(device)

    def fill(self, step: int) -> tuple[dict[str, Any], torch.cuda.Event | None]:
        epoch, indices = self._order.indices(step)
        with self._busy:
            if self._device.type != "cuda":
                batch = self._dataset.gather(indices, check_rows=self._check_rows)
                return {name: value.to(self._device) for name, value in batch.items()} | {"epoch": epoch}, None
            slot = step % len(self._slots)
            if (before := self._copied[slot]) is not None:
                before.synchronize()  # the buffer is free once its last batch has left it
            buffers, bucket = self._slots[slot], int(self._dataset.store.bucket[indices[0]])
            if bucket not in buffers:
                buffers[bucket] = self._dataset.empty(len(indices), bucket, pin_memory=True)
            batch = self._dataset.gather(indices, out=dict(buffers[bucket]), check_rows=self._check_rows)
            moved, self._copied[slot] = self._copy.begin(batch)
            return {**moved, "epoch": epoch}, self._copied[slot]

    def hand_out(self, filled: tuple[dict[str, Any], torch.cuda.Event | None]) -> dict[str, Any]:
        return self._copy.finish(*filled)


def batch_order(
    dataset: LatentDataset, batch_size: int, *, seed: int, rank: int, world_size: int
) -> BatchOrder | BucketOrder:
    """Over all samples; where rows have several shapes, every batch of one of them."""
    buckets = dataset.store.bucket
    used = np.unique(buckets).tolist()
    if len(used) == 1:
        return BatchOrder(len(dataset), batch_size, seed=seed, rank=rank, world_size=world_size)
    samples = [np.flatnonzero(buckets == bucket) for bucket in used]
    return BucketOrder(samples, batch_size, seed=seed, rank=rank, world_size=world_size)


def _nothing() -> None:
    pass
