"""Work that runs ahead in threads while its results are used, in order, and never more than a few of them waiting."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def ahead(
    pull: Callable[[], T | None], work: Callable[[T], R], *, pool: ThreadPoolExecutor, depth: int
) -> Iterator[tuple[T, R]]:
    """Every task and its result, in the order of `pull`, which is called in the caller's thread.

    Args:
        pull: the next task, None where there is none at this moment; it is asked again before every result.
        work: runs in `pool`. What it raises is raised here, at its task's turn.
        depth: how many tasks are begun or done at most before the first one's result is used.
    """
    begun: deque[tuple[T, Future[R]]] = deque()
    try:
        while True:
            while len(begun) < depth and (task := pull()) is not None:
                begun.append((task, pool.submit(work, task)))
            if not begun:
                return
            task, future = begun.popleft()
            yield task, future.result()
    finally:
        for _, future in begun:
            future.cancel()
