"""How a rival is asked for batches and timed, in this process or in one of its own.

A reader is an endless generator of (indices int64 [B], values [B, row]) that has put the payload into its own format
before its first batch. A rival that is a package is a script here, run in an environment of its own:

    python SCRIPT.py FOLDER PAYLOAD.npy BATCH SECONDS [hot | cold | hot,cold]

It prints one JSON line, the last of its output: {"package", "version", "hot", "cold": seconds of each batch, or null,
"cold_bytes": bytes that a cold batch brought into the page cache, "reason": why there is no cold}.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pagecache

Batches = Iterator[tuple[np.ndarray, Any]]
MIN_SAMPLES = 5
MAX_SAMPLES = 200
WARM_SECONDS = 2.0  # of one epoch, so that pages are mapped and files open


@dataclass(frozen=True)
class Cold:
    """Cold batches: the seconds of each, and how many bytes of the files one of them brought into the page cache."""

    seconds: list[float]
    bytes: int


def epochs(count: int, batch: int) -> Iterator[np.ndarray]:
    """Endless batches of int64 indices: one random permutation of all rows after another, without the last part."""
    generator = np.random.default_rng(0)
    while True:
        order = generator.permutation(count)
        for begin in range(0, count - batch + 1, batch):
            yield order[begin : begin + batch]


def check(found: tuple[np.ndarray, Any], payload: np.ndarray) -> None:
    """Raise ValueError unless the batch holds the payload's bytes."""
    indices, values = found
    got = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
    want = np.ascontiguousarray(payload[indices]).reshape(-1).view(np.uint8)
    if got.shape != want.shape or (got != want).any():
        raise ValueError(f"expected the {len(want)} bytes of rows {indices[:4]} ..., got {len(got)} other bytes")


def warm(batches: Batches, rows: int) -> None:
    """Read an epoch, or for WARM_SECONDS."""
    end, read = time.perf_counter() + WARM_SECONDS, 0
    while read < rows and time.perf_counter() < end:
        read += len(next(batches)[0])


def hot(batches: Batches, seconds: float) -> list[float]:
    """Seconds of each batch."""
    times: list[float] = []
    while len(times) < MIN_SAMPLES or (sum(times) < seconds and len(times) < MAX_SAMPLES):
        begin = time.perf_counter()
        next(batches)
        times.append(time.perf_counter() - begin)
    return times


def cold(batches: Batches, folder: Path, seconds: float, rows: int, *, once: bool = False) -> Cold:
    """Batches whose files, all of `folder`, are not in the page cache.

    Args:
        rows: in the payload; no more than an epoch is read, lest a row come from memory the second time.
        once: empty the page cache before the first batch only, for readers that go through their files in order
            and rightly use what was read ahead.

    Raises:
        pagecache.CannotDrop: the page cache cannot be emptied here.
    """
    times: list[float] = []
    counts: list[int] = []
    pagecache.drop(folder)
    read = 0
    while read < rows and (len(times) < MIN_SAMPLES or (sum(times) < seconds and len(times) < MAX_SAMPLES)):
        if not once:
            pagecache.drop(folder)
        before = pagecache.resident_bytes(folder)
        begin = time.perf_counter()
        indices, _ = next(batches)
        times.append(time.perf_counter() - begin)
        counts.append(pagecache.resident_bytes(folder) - before)
        read += len(indices)
    # Of what was read ahead each batch has its share.
    return Cold(times, sum(counts) // len(counts) if once else sorted(counts)[len(counts) // 2])


def main(package: str, read: Callable[[np.ndarray, Path, int], Batches], *, once: bool = False) -> None:
    """A rival's script: time `read(payload, folder, batch)` on one core, and print the line."""
    folder, path, batch, seconds = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), float(sys.argv[4])
    caches = sys.argv[5].split(",") if len(sys.argv) > 5 else ["hot"]
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})  # one thread's worth, however many a reader starts
    payload = np.load(path, mmap_mode="r")
    batches = read(payload, folder, batch)
    check(next(batches), payload)
    result: dict[str, Any] = {"package": package, "version": importlib.metadata.version(package)}
    result |= dict.fromkeys(("hot", "cold", "cold_bytes", "reason"))
    if "hot" in caches:
        warm(batches, len(payload))
        result["hot"] = hot(batches, seconds)
    if "cold" in caches:
        try:
            found = cold(batches, folder, seconds, len(payload), once=once)
            result |= {"cold": found.seconds, "cold_bytes": found.bytes}
        except pagecache.CannotDrop as error:
            result["reason"] = str(error)
    print(json.dumps(result), flush=True)
    os._exit(0)  # some readers leave threads that would be waited for
