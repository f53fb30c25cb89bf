"""Ctrl-C and SIGTERM at a safe point: between two steps instead of inside one."""

from __future__ import annotations

import signal
import sys
from types import FrameType, TracebackType


class StopRequest:
    """`with StopRequest() as stop: …; stop.check()` raises KeyboardInterrupt at check() if a stop was asked for.

    A second Ctrl-C interrupts at once. Only for the main thread; the previous handlers come back at the end.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.requested = False

    def __enter__(self) -> StopRequest:
        self._previous = {number: signal.signal(number, self._request) for number in self.SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def check(self) -> None:
        if self.requested:
            raise KeyboardInterrupt

    def _request(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        print(
            f"\n{signal.Signals(number).name}: stopping after this step; again: at once",
            file=sys.stderr,
            flush=True,
        )
