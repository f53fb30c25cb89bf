"""Files of many rows: read without opening them for each row, and written anew under the names that keys give."""

from __future__ import annotations

import os
import re
import threading
from bisect import bisect_left
from pathlib import Path

from fastlatent.caches.cache import DamagedEntry
from fastlatent.caches.outgoing import Outgoing
from fastlatent.sources.files import Files, Found, LocalFiles

KEY = re.compile(r"(.*)/\d{8,}(?:@.*)?", re.DOTALL)  # {shard}/{row} or {shard}/{row}@{column}
OPEN = 64  # files at once, far below the usual limit of 1024 descriptors


class _Descriptor:
    """Closed when the last thread that reads from it lets go."""

    def __init__(self, path: str) -> None:
        self.number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


class Ranges:
    """`read` is called in several threads. pread, not a mapping: a file that is cut meanwhile would end the process."""

    def __init__(self, files: Files) -> None:
        self.files = files
        self.local = isinstance(files, LocalFiles)
        self._table: dict[str, _Descriptor] = {}
        self._lock = threading.Lock()

    def read(self, found: Found, offset: int, size: int) -> bytes:
        """`size` bytes from `offset` on.

        Raises:
            OSError: it cannot be read. DamagedEntry: the file is another than the one that was listed, or was cut.
        """
        if self.local:
            opened = self._table.get(found.path) or self._open(found)
            data = os.pread(opened.number, size, offset)
        else:
            data = self.files.read_range(found.path, offset, size)
        if len(data) != size:
            raise DamagedEntry(
                f"expected {size} bytes at {offset}, got {len(data)}: the file was cut while it was read"
            )
        return data

    def _open(self, found: Found) -> _Descriptor:
        with self._lock:
            opened = self._table.get(found.path)
            if opened is None:
                opened = _Descriptor(self.files.place(found.path))
                status = os.fstat(opened.number)
                if (status.st_size, status.st_mtime_ns) != (found.size, found.stamp):
                    raise DamagedEntry(
                        f"expected {found.size} bytes as listed, got {status.st_size} bytes of another time: the file "
                        "changed meanwhile; run the same command again"
                    )
                if len(self._table) >= OPEN:
                    self._table.pop(next(iter(self._table)))
                self._table[found.path] = opened
            return opened

    def close(self) -> None:
        with self._lock:
            self._table.clear()


def shard_of(key: str, out: Path) -> str:
    """The shard that a key of such a cache names."""
    match = KEY.fullmatch(key)
    if match is None:
        raise ValueError(
            f"{out}: expected keys {{shard}}/{{row}} as this format's conversion made them, got {key!r:.200}"
        )
    return match[1]


def shard_end(outgoing: Outgoing, start: int, out: Path) -> int:
    """The number after the last row of the shard that begins at `start`: keys are sorted, so a few of them are read."""
    stem = shard_of(outgoing.row(start).key, out)
    high = 1
    while start + high < outgoing.count and shard_of(outgoing.row(start + high).key, out) == stem:
        high *= 2
    span = range(start + high // 2, min(start + high, outgoing.count))
    return span.start + bisect_left(span, True, key=lambda i: shard_of(outgoing.row(i).key, out) != stem)
