"""Whether a finished dataset is of exactly the files of a scan, without an object for each of them."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np

from fastlatent.store.reader import Dataset
from fastlatent.store.records import encode_key


def unchanged(
    dataset: Dataset,
    keys_utf8: np.ndarray,
    key_offsets: np.ndarray,
    sizes: np.ndarray,
    stamps: np.ndarray,
    labels: np.ndarray,
    classes: list[str],
) -> bool:
    """True where an encode of these files would change nothing: the same keys, sizes, mtimes, labels and classes.

    As in `DatasetWriter.plan`, a file whose size and mtime are the recorded ones is taken to be unchanged. False is
    always safe: the writer then compares file by file.

    Args:
        keys_utf8, key_offsets: uint8 and uint64 [N+1]: key i is keys_utf8[key_offsets[i] : key_offsets[i+1]], sorted by
            bytes. The source has no groups.
        sizes, stamps, labels: uint64, int64, int64 [N].
    """
    count = len(key_offsets) - 1
    if dataset.groups is not None or dataset.classes != classes or count != len(dataset) + len(dataset.quarantine):
        return False
    bad = _quarantined(dataset, keys_utf8, key_offsets, sizes, stamps)
    return bad is not None and all(
        np.array_equal(dataset.src_size[row:end], sizes[at:until])
        and np.array_equal(dataset.src_mtime_ns[row:end], stamps[at:until])
        and np.array_equal(dataset.label[row:end], labels[at:until])
        and _same_keys(dataset, row, end, keys_utf8, key_offsets[at : until + 1])
        for row, end, at, until in _between(bad, count)
    )


def _between(bad: list[int], count: int) -> Iterator[tuple[int, int, int, int]]:
    """The rows of the index, and the files of the scan that they must be, between files in quarantine."""
    for before, (start, end) in enumerate(pairwise([-1, *bad, count])):
        yield start + 1 - before, end - before, start + 1, end


def _same_keys(dataset: Dataset, row: int, end: int, utf8: np.ndarray, offsets: np.ndarray) -> bool:
    own = dataset.key_offsets[row : end + 1]
    return np.array_equal(own - own[0], offsets - offsets[0]) and np.array_equal(
        dataset.key_utf8[int(own[0]) : int(own[-1])], utf8[int(offsets[0]) : int(offsets[-1])]
    )


def _quarantined(
    dataset: Dataset, utf8: np.ndarray, offsets: np.ndarray, sizes: np.ndarray, stamps: np.ndarray
) -> list[int] | None:
    """Where in the scan the files in quarantine are, rising; None where one is missing or has changed."""
    found = []
    for one in dataset.quarantine:
        i = _find(utf8, offsets, encode_key(one["key"]))
        if i is None or (int(sizes[i]), int(stamps[i])) != (one["size"], one["mtime_ns"]):
            return None
        found.append(i)
    return sorted(set(found)) if len(set(found)) == len(found) else None


def _find(utf8: np.ndarray, offsets: np.ndarray, key: bytes) -> int | None:
    low, high = 0, len(offsets) - 1
    while low < high:
        middle = (low + high) // 2
        if utf8[int(offsets[middle]) : int(offsets[middle + 1])].tobytes() < key:
            low = middle + 1
        else:
            high = middle
    there = low < len(offsets) - 1 and utf8[int(offsets[low]) : int(offsets[low + 1])].tobytes() == key
    return low if there else None
