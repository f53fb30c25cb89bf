"""Things handed from the thread that makes them to the thread that uses them, a few at most waiting."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class Abandoned(Exception):
    """The maker failed: what was handed over so far is not all."""


class Handoff(Generic[T]):
    """`put` in one thread, iteration in another; either may give up, and the other one learns of it.

    Args:
        depth: how many things wait at most; `put` then waits.
    """

    def __init__(self, depth: int) -> None:
        self._depth = depth
        self._things: deque[T] = deque()
        self._changed = threading.Condition()
        self._ended = self._failed = self._unwanted = False

    def put(self, thing: T) -> bool:
        """Hand over one more. False: the user gave up, and further ones are useless."""
        with self._changed:
            self._changed.wait_for(lambda: self._unwanted or len(self._things) < self._depth)
            if not self._unwanted:
                self._things.append(thing)
            self._changed.notify_all()
            return not self._unwanted

    def end(self) -> None:
        """That was all."""
        self._set("_ended")

    def abandon(self) -> None:
        """There would have been more, but the maker failed."""
        self._set("_failed")

    def give_up(self) -> None:
        """The user wants no more."""
        self._set("_unwanted")

    def __iter__(self) -> Iterator[T]:
        """What was put, in order. Raises Abandoned at once where the maker failed."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._failed or self._things or self._ended)
                if self._failed:
                    raise Abandoned
                if not self._things:
                    return
                thing = self._things.popleft()
                self._changed.notify_all()
            yield thing

    def _set(self, name: str) -> None:
        with self._changed:
            setattr(self, name, True)
            self._changed.notify_all()
