"""What the loaders share: a thread that fills batches ahead, and copies to the GPU beside its work."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# A thread that hangs in a read (a file server that is away) must not keep Ctrl-C or the interpreter's end waiting.
STOP_SECONDS = 1.0


class Ahead:
    """One thread that fills `step`, step + 1, ... and waits while `count` of them are ready. It knows no loader."""

    def __init__(self, fill: Callable[[int], Any], step: int, count: int) -> None:
        self.next = step
        self.pid = os.getpid()  # a forked child inherits this object but not the thread
        self._fill, self._count = fill, count
        self._ready: deque[tuple[Any, BaseException | None]] = deque()
        self._changed = threading.Condition()
        self._stopped = False
        self._thread = threading.Thread(target=self._run, args=(step,), name="fastlatent loader", daemon=True)
        self._thread.start()

    def take(self) -> Any:
        """What `fill` returned for the step `next`, or raise what it raised."""
        with self._changed:
            self._changed.wait_for(lambda: self._ready)
            filled, error = self._ready.popleft()
            self._changed.notify_all()
        if error is not None:
            raise error
        self.next += 1
        return filled

    def stop(self) -> None:
        if self.pid != os.getpid():
            return  # its locks may be held by a thread that was not forked
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        if threading.current_thread() is not self._thread:  # the collector runs in any thread
            self._thread.join(STOP_SECONDS)
        self._ready.clear()

    def _run(self, step: int) -> None:
        error = None
        while error is None:
            with self._changed:
                self._changed.wait_for(lambda: self._stopped or len(self._ready) < self._count)
                if self._stopped:
                    return
            filled = None
            try:
                filled = self._fill(step)
            except BaseException as caught:  # raised again where the step is asked for
                error = caught
            with self._changed:
                self._ready.append((filled, error))
                self._changed.notify_all()
            step += 1


class DeviceCopy:
    """Copies batches to a device; to CUDA on a stream of its own, so that a thread can do it during a step."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def begin(self, batch: dict[str, Tensor]) -> tuple[dict[str, Any], torch.cuda.Event | None]:
        """The batch on the device, and the event after which it is there and its pinned memory free again."""
        if self._stream is None:
            return {name: value.to(self.device) for name, value in batch.items()}, None
        with torch.cuda.stream(self._stream):
            moved = {name: value.to(self.device, non_blocking=True) for name, value in batch.items()}
            copied = torch.cuda.Event()
            copied.record(self._stream)
        return moved, copied

    def finish(self, batch: dict[str, Any], copied: torch.cuda.Event | None) -> dict[str, Any]:
        """Have the current stream wait for what `begin` returned, and take it over. In the consumer's thread."""
        if copied is not None:
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(copied)
            for value in batch.values():
                if isinstance(value, Tensor):
                    value.record_stream(stream)  # allocated on the copying stream, used on this one
        return batch
