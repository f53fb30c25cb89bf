"""How busy the stages of a pipeline are, and which of them the others wait for."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager


class Meter:
    """Busy seconds of each stage; any thread may add to them.

    Args:
        stages: name -> how many threads work in it.
    """

    def __init__(self, stages: Mapping[str, int]) -> None:
        self._threads = dict(stages)
        self._busy = dict.fromkeys(stages, 0.0)
        self._guard = threading.Lock()
        self._begun = time.monotonic()
        self._window = self._begun, dict(self._busy)

    @contextmanager
    def busy(self, stage: str) -> Iterator[None]:
        begin = time.monotonic()
        try:
            yield
        finally:
            self.add(stage, time.monotonic() - begin)

    def add(self, stage: str, seconds: float) -> None:
        with self._guard:
            self._busy[stage] += seconds

    def shares(self) -> dict[str, float]:
        """The share of its threads' time that each stage was busy, over all of this meter's life."""
        return self._shares(self._begun, dict.fromkeys(self._busy, 0.0))

    def text(self) -> str:
        """ "waits for decode (decode 98 %, encode 40 %, write 3 %)", of the time since the last call."""
        shares = self._shares(*self._window)
        with self._guard:
            self._window = time.monotonic(), dict(self._busy)
        listed = ", ".join(f"{name} {share:.0%}" for name, share in shares.items())
        return f"waits for {max(shares, key=shares.__getitem__)} ({listed})"

    def _shares(self, begin: float, before: Mapping[str, float]) -> dict[str, float]:
        elapsed = max(time.monotonic() - begin, 1e-9)
        with self._guard:
            return {
                name: min(1.0, (busy - before[name]) / (elapsed * self._threads[name]))
                for name, busy in self._busy.items()
            }
