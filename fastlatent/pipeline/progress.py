"""Progress of a long stage: a line that is redrawn on a terminal, plain lines otherwise."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType

TERMINAL_SECONDS = 0.1
PLAIN_SECONDS = 10.0


class Progress:
    """`with Progress("encode", total, "images") as p: p.advance(16)`. Writes to stderr; nothing if total is 0.

    Args:
        name: what is going on.
        total: how much there is to do.
        unit: what is counted, in the plural.
        done: how much was done before this process began; it does not count towards the rate.
        describe: what stands at the end of every line but the last; called when one is written.
    """

    def __init__(
        self, name: str, total: int, unit: str, done: int = 0, describe: Callable[[], str] | None = None
    ) -> None:
        self.name, self.total, self.unit = name, total, unit
        self.done = self._begun_at = done
        self._terminal = sys.stderr.isatty()
        self._start = self._shown = time.monotonic()
        self._note = ""
        self._describe = describe

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.total and (kind is None or self._terminal):
            self._show(last=True)

    def advance(self, count: int = 1, note: str = "") -> None:
        """Count `count` more; `note` stands at the end of the line."""
        self.done += count
        self._note = note or self._note
        if self.total and time.monotonic() - self._shown >= (TERMINAL_SECONDS if self._terminal else PLAIN_SECONDS):
            self._show(last=False)

    def _show(self, *, last: bool) -> None:
        now = time.monotonic()
        self._shown = now
        elapsed = max(now - self._start, 1e-9)
        rate = (self.done - self._begun_at) / elapsed
        text = f"{self.name}: {self.done:,}/{self.total:,} {self.unit}, {rate:,.1f} {self.unit}/s"
        if last:
            text += f", {duration(elapsed)}"
        elif rate > 0:
            text += f", {duration((self.total - self.done) / rate)} left"
        if self._describe is not None and not last:
            text += f", {self._describe()}"
        if self._note:
            text += f", {self._note}"
        if self._terminal:
            sys.stderr.write(f"\r\x1b[2K{text}" + ("\n" if last else ""))
        else:
            sys.stderr.write(text + "\n")
        sys.stderr.flush()


def duration(seconds: float) -> str:
    """ "7.5 s", "3 min 20 s", "2 h 5 min"."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
