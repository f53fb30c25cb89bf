"""Ctrl-C and SIGTERM at a safe point: between two steps instead of inside one."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType


class StopRequest:
    """`with StopRequest() as stop: …; stop.check()` raises KeyboardInterrupt at check() if a stop was asked for.

    A second Ctrl-C interrupts at once. The previous handlers come back at the end. Outside the main thread, where no
    handler can be set, nothing asks for a stop.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.requested = False

    def __enter__(self) -> StopRequest:
        main = threading.current_thread() is threading.main_thread()
        numbers = self.SIGNALS if main else ()
        # None stands for a handler that was not set from Python.
        self._previous = {number: signal.signal(number, self._request) or signal.SIG_DFL for number in numbers}
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
        # Not print: a handler that runs inside a write to stderr must not write to it again.
        os.write(2, f"\n{signal.Signals(number).name}: stopping after this step; again: at once\n".encode())
