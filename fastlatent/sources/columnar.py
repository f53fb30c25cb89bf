"""Millions of paths without millions of Python objects: one block of bytes, and arrays. Torch-free."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from typing import overload

import numpy as np

from fastlatent.sources.items import Item, stamp_of

BLOCK = 4096  # items made at a time while iterating: numpy gives them out 20 times faster than one by one


class Keys:
    """Paths, each once, sorted by their bytes.

    Attributes:
        utf8: uint8, all paths one after another. Bytes that are no UTF-8 are kept as they are.
        offsets: uint64 [N+1]; path i is utf8[offsets[i] : offsets[i+1]].
    """

    def __init__(self, utf8: np.ndarray, offsets: np.ndarray) -> None:
        self.utf8, self.offsets = utf8, offsets.astype("<u8", copy=False)

    @classmethod
    def of(cls, paths: Sequence[bytes]) -> Keys:
        """`paths` are sorted already."""
        offsets = np.zeros(len(paths) + 1, "<u8")
        np.cumsum([len(path) for path in paths], out=offsets[1:])
        return cls(np.frombuffer(b"".join(paths), "u1"), offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def raw(self, i: int) -> bytes:
        start, end = self.offsets[i : i + 2].tolist()
        return self.utf8[start:end].tobytes()

    def texts(self, start: int = 0, end: int | None = None) -> list[str]:
        """Paths start to end, as os.fsdecode gives them."""
        ends = self.offsets[start : len(self) + 1 if end is None else end + 1].tolist()
        block = self.utf8[ends[0] : ends[-1]].tobytes()
        return [os.fsdecode(block[a - ends[0] : b - ends[0]]) for a, b in pairwise(ends)]

    def bisect(self, path: bytes) -> int:
        """How many paths precede `path`."""
        low, high = 0, len(self)
        while low < high:
            middle = (low + high) // 2
            if self.raw(middle) < path:
                low = middle + 1
            else:
                high = middle
        return low

    def find(self, path: str) -> int:
        """The number of `path`, or -1."""
        wanted = os.fsencode(path)
        i = self.bisect(wanted)
        return i if i < len(self) and self.raw(i) == wanted else -1

    def ending(self, suffixes: Iterable[str]) -> np.ndarray:
        """bool [N]: whether a path ends in one of these, of at most 8 bytes of ASCII, in any case of letters."""
        padded = np.concatenate([np.zeros(8, np.uint8), self.utf8])
        tails = np.lib.stride_tricks.sliding_window_view(padded, 8)[self.offsets[1:]]
        tails = np.where((tails >= ord("A")) & (tails <= ord("Z")), tails + 32, tails)
        numbers = tails.view("<u8").reshape(-1)  # the path's last byte is the highest
        found = np.zeros(len(self), bool)
        for suffix in suffixes:
            raw = suffix.encode("ascii")
            assert len(raw) <= 8
            found |= numbers >> np.uint64(64 - 8 * len(raw)) == np.uint64(int.from_bytes(raw, "little"))
        return found

    def select(self, wanted: np.ndarray) -> Keys:
        """Those paths whose number is in `wanted`, int64 and rising."""
        if len(wanted) == len(self):
            return self
        lengths = np.diff(self.offsets)[wanted]
        offsets = np.zeros(len(wanted) + 1, "<u8")
        np.cumsum(lengths, out=offsets[1:])
        marks = np.zeros(len(self), bool)
        marks[wanted] = True
        return Keys(self.utf8[np.repeat(marks, np.diff(self.offsets).astype(np.int64))], offsets)


class ItemTable(Sequence[Item]):
    """The items of a source, made when they are asked for.

    Attributes:
        keys: sorted by their bytes.
        size, stamp: uint64, int64 [N]. label: int64 [N], -1 for none.
        captions: one text for each item, or None where the source has no captions.
    """

    def __init__(
        self,
        keys: Keys,
        size: np.ndarray,
        stamp: np.ndarray,
        label: np.ndarray,
        place: Callable[[str], str],
        captions: Sequence[str] | None = None,
    ) -> None:
        self.keys, self.place, self.captions = keys, place, captions
        self.size, self.label = size.astype("<u8", copy=False), label.astype("<i8", copy=False)
        self.stamp = stamp.astype("<i8", copy=False)
        if captions is not None:
            pairs = zip(self.stamp.tolist(), captions, strict=True)
            self.stamp = np.array([stamp_of(one, {"caption": caption}) for one, caption in pairs], "<i8")
        assert len(keys) == len(size) == len(stamp) == len(label) == len(captions or keys)

    def __len__(self) -> int:
        return len(self.keys)

    @overload
    def __getitem__(self, index: int) -> Item: ...
    @overload
    def __getitem__(self, index: slice) -> list[Item]: ...
    def __getitem__(self, index: int | slice) -> Item | list[Item]:
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            if step != 1:
                return [self[i] for i in range(start, stop, step)]
            return self._block(start, max(start, stop))
        i = index + len(self) if index < 0 else index
        if not 0 <= i < len(self):
            raise IndexError(f"expected an item from 0 to {len(self) - 1}, got {index}")
        return self._block(i, i + 1)[0]

    def __iter__(self) -> Iterator[Item]:
        for start in range(0, len(self), BLOCK):
            yield from self._block(start, min(start + BLOCK, len(self)))

    def find(self, key: str) -> int:
        """The number of the item with this key, or -1: 20 comparisons among a million, and no dictionary."""
        return self.keys.find(key)

    def _block(self, start: int, end: int) -> list[Item]:
        columns = (column[start:end].tolist() for column in (self.size, self.stamp, self.label))
        rows = zip(self.keys.texts(start, end), *columns, strict=True)
        if self.captions is None:
            return [Item(key, self.place(key), size, stamp, label) for key, size, stamp, label in rows]
        return [
            Item(key, self.place(key), size, stamp, label, attached={"caption": caption})
            for (key, size, stamp, label), caption in zip(rows, self.captions[start:end], strict=True)
        ]
