"""Opening a cache of MDS: its shards, the columns that hold latents and their shapes, and the rows of each sample."""

from __future__ import annotations

import re
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from fastlatent.caches.cache import DTYPES, REST, Cache, CacheItem, CacheRow, DamagedEntry, Told
from fastlatent.caches.mar import ignored
from fastlatent.caches.mds_files import (
    INDEX,
    MOST_PREFIX,
    Column,
    Listed,
    MdsShard,
    array_of,
    fits,
    open_shard,
    read_prefix,
    sizes_of,
    split,
    wrong_hash,
)
from fastlatent.caches.shards import Ranges
from fastlatent.data.tensor_files import ITEM_BYTES, file_bytes
from fastlatent.sources.files import Files, Found, read_each

TEXT = ("caption", "text", "prompt", "clip", "t5", "token", "pool")  # of columns whose latents are no images'
MAX_SHAPES = 1024


class Opening:
    """A cache on its way to be opened: shards, then the columns of latents, then rows."""

    def __init__(self, files: Files, ranges: Ranges, by_path: Mapping[str, Found], told: Told) -> None:
        self.files, self.ranges, self.by_path, self.told = files, ranges, by_path, told
        self.left_out: dict[str, str] = {}
        self.remarks: list[str] = []
        self.shapes: dict[str, set[tuple[int, ...]]] = {}  # of each column of latents
        self.dtypes: dict[str, str] = {}
        self._wrong: dict[str, str] = {}  # shards whose hash was looked at -> why they are damaged
        self._lock = threading.Lock()

    def cache(self, listed: Sequence[Listed]) -> Cache:
        shards = self._open(listed)
        self.columns = tuple(one for one in shards[0].columns if one.encoding.partition(":")[0] != "pkl")
        self.candidates = self.latents = self._latent_columns()
        sizes = self._sizes(shards)
        self._settle(shards, sizes)
        dtype, buckets = self._buckets()
        others = [one for one in self.columns if one not in self.latents]
        pickled = [one.name for one in shards[0].columns if one not in self.columns]
        if pickled:
            self.remarks.append(f"pickled columns are left out, unread: {', '.join(pickled)}")
        items = self._items(shards, sizes)
        return Cache(
            items=items,
            payload="latents",
            dtype=dtype,
            buckets=buckets,
            content=self._content,
            row=partial(self._row, np.dtype(str(DTYPES[dtype])), bool(others)),
            fields=(REST,) if others else (),
            facts={
                "columns": [[one.name, one.encoding, one.size] for one in self.columns],
                "latents": [one.name for one in self.latents],
                "dtype": dtype,
            },
            notes=dict(shards[0].settings),
            left_out=self.left_out,
            ignored=ignored([one for path, one in self.by_path.items() if not path.endswith((f"/{INDEX}", ".mds"))
                             and path != INDEX]),
            remarks=tuple(self.remarks),
            close=self.ranges.close,
        )  # fmt: skip

    def _open(self, listed: Sequence[Listed]) -> list[MdsShard]:
        """The shards that can be used: of the columns that most samples have."""
        by_path = {one.path: one for one in listed}

        def look(path: str) -> MdsShard:
            found = self.by_path.get(path)
            if found is None:
                raise DamagedEntry(f"{INDEX} lists it, and it is not there")
            return open_shard(self.ranges, found, self.files.place(path), by_path[path].entry)

        shards: list[MdsShard] = []
        for path, got in zip(by_path, read_each(by_path, look), strict=True):
            if isinstance(got, Exception):
                self.left_out[self.files.place(path)] = str(got)
            else:
                shards.append(got)
        if not shards:
            why = next(f"; {place}: {why}" for place, why in self.left_out.items())
            raise ValueError(f"{self.files.root}: expected shards of MDS, got none that can be used{why}")
        count: Counter[tuple[Column, ...]] = Counter()
        for one in shards:
            count[one.columns] += len(one.offsets) - 1
        columns = count.most_common(1)[0][0]
        for one in shards:
            if one.columns != columns:
                names = [f"{column.name}: {column.encoding}" for column in one.columns]
                self.left_out[one.place] = f"expected the columns of most shards, got {', '.join(names):.300}"
        return [one for one in shards if one.columns == columns]

    def _latent_columns(self) -> list[Column]:
        latents = []
        for one in self.columns:
            name = one.name.lower()
            if "latent" not in name or any(word in name for word in TEXT):
                continue
            if one.encoding != "bytes":
                try:
                    array_of(one.encoding)
                except ValueError:
                    continue
            latents.append(one)
        if not latents:
            listed = ", ".join(f"{one.name} ({one.encoding})" for one in self.columns)
            raise ValueError(
                f"{self.files.root}: expected a column of bytes or arrays with 'latent' in its name, got {listed}"
            )
        return latents

    def _sizes(self, shards: Sequence[MdsShard]) -> list[np.ndarray]:
        """int64 [samples, latents] for each shard, see `sizes_of`; for each shard what stands before arrays is read."""
        at = [shards[0].columns.index(one) for one in self.latents]
        by_place = {one.place: one for one in shards}
        carried = [one for one in self.latents if one.encoding != "bytes" and None in array_of(one.encoding)]

        def look(place: str) -> tuple[np.ndarray, dict[str, set[tuple[str, tuple[int, ...]]]]]:
            shard = by_place[place]
            sizes = sizes_of(self.ranges, shard)
            seen: dict[str, set[tuple[str, tuple[int, ...]]]] = {one.name: set() for one in carried}
            width = 4 * sum(one.size is None for one in shard.columns)
            before = sizes.cumsum(1) - sizes
            for one in carried:
                k = shard.columns.index(one)
                for i in np.flatnonzero(sizes[:, k] > 0).tolist():
                    begin = int(shard.offsets[i]) + width + int(before[i, k])
                    head = self.ranges.read(shard.found, begin, min(MOST_PREFIX, int(sizes[i, k])))
                    try:
                        dtype, shape, offset = read_prefix(one.encoding, head)
                    except DamagedEntry:
                        continue  # `row` says it
                    if fits(int(sizes[i, k]), shape, offset, ITEM_BYTES[dtype]):
                        seen[one.name].add((dtype, shape))
            return sizes[:, at], seen

        result = []
        for shard, got in zip(shards, read_each(by_place, look), strict=True):
            if isinstance(got, Exception):
                self.left_out[shard.place] = str(got)
                result.append(np.zeros((len(shard.offsets) - 1, len(at)), np.int64))
                continue
            result.append(got[0])
            for name, kinds in got[1].items():
                for dtype, shape in sorted(kinds):
                    if self.dtypes.setdefault(name, dtype) == dtype:
                        self.shapes.setdefault(name, set()).add(shape)
        return result

    def _settle(self, shards: Sequence[MdsShard], sizes: Sequence[np.ndarray]) -> None:
        """Shapes and dtypes of the columns that do not carry them."""
        for k, one in enumerate(self.latents):
            if one.encoding != "bytes":
                dtype, shape = array_of(one.encoding)
                if dtype is not None and shape is not None:
                    self.dtypes[one.name], self.shapes[one.name] = read_prefix(one.encoding, b"")[0], {shape}
                continue
            count: Counter[int] = Counter()
            for per_shard in sizes:
                values, times = np.unique(per_shard[:, k], return_counts=True)
                count.update(dict(zip(values.tolist(), times.tolist(), strict=True)))
            there = [(times, size) for size, times in count.items() if size > 0]
            if there:
                self._settle_bytes(one.name, max(there)[1])

    def _settle_bytes(self, name: str, size: int) -> None:
        told = self.told.latent_shape
        for dtype in ("F16", "F32"):
            if told and fits(size, told, 0, ITEM_BYTES[dtype]):
                self.dtypes[name], self.shapes[name] = dtype, {told}
                return
        match = re.search(r"(\d+)$", name)
        side = int(match[1]) // 8 if match else 0
        if side and size % (2 * side * side) == 0:
            shape = (size // (2 * side * side), side, side)
            self.dtypes[name], self.shapes[name] = "F16", {shape}
            self.remarks.append(
                f"{name}: {size:,} bytes are taken as float16 {list(shape)}: as its name says, 8 pixels for each value"
            )
            return
        said = f", got {list(told)}" if told else ""
        raise ValueError(
            f"{self.files.root}: column {name!r} has {size:,} bytes for each sample, and no shape: expected "
            f"--latent-shape C,h,w of {size // 2:,} float16 values{said}"
        )

    def _buckets(self) -> tuple[str, tuple[tuple[int, ...], ...]]:
        self.latents = [one for one in self.latents if self.shapes.get(one.name)]
        if not self.latents:
            raise ValueError(f"{self.files.root}: expected latents, got none in any sample")
        dtypes = {self.dtypes[one.name] for one in self.latents}
        shapes = sorted({shape for one in self.latents for shape in self.shapes[one.name]})
        if len(dtypes) > 1 or len({(shape[0], len(shape)) for shape in shapes}) > 1 or len(shapes) > MAX_SHAPES:
            said = "; ".join(
                f"{one.name} {self.dtypes[one.name]} {sorted(self.shapes[one.name])[:4]}" for one in self.latents
            )
            raise ValueError(
                f"{self.files.root}: expected latents of one dtype and as many channels, got {said}: is --latent-shape "
                "right? Otherwise write the columns into caches of their own"
            )
        return dtypes.pop(), tuple((1, *shape) for shape in shapes)

    def _items(self, shards: Sequence[MdsShard], sizes: Sequence[np.ndarray]) -> list[CacheItem]:
        marks = marks_of([one.name for one in self.latents])
        at = [self.candidates.index(one) for one in self.latents]
        items, empty = [], 0
        for shard, per_shard in zip(shards, sizes, strict=True):
            stem, place, found = shard.stem, shard.place, shard.found
            if place in self.left_out:
                continue
            for i, row in enumerate(per_shard[:, at].tolist()):
                there = [one for one, size in zip(self.latents, row, strict=True) if size > 0]
                if row[0] < 0:  # its sizes do not add up: a row that says so when it is read
                    there = self.latents[:1]
                empty += not there
                for one in there:
                    items.append(
                        CacheItem(
                            f"{stem}/{i:08d}{marks[one.name]}", place, found.size, found.stamp, at=(shard, i, one)
                        )
                    )
        if empty:
            self.remarks.append(f"{empty:,} samples have no latents: they are not rows")
        items.sort(key=lambda item: item.key.encode("utf-8", "surrogateescape"))
        return items

    def _content(self, item: CacheItem) -> bytes:
        shard, i, _ = item.at
        if shard.hashes:
            self._verify(shard)
        begin, end = int(shard.offsets[i]), int(shard.offsets[i + 1])
        return self.ranges.read(shard.found, begin, end - begin)

    def _verify(self, shard: MdsShard) -> None:
        """Compare a shard with its hashes, once in this process, before the first of its rows is used."""
        why = self._wrong.get(shard.place)
        if why is None:
            with self._lock:
                why = self._wrong.get(shard.place)
                if why is None:
                    why = self._wrong[shard.place] = wrong_hash(self.ranges, shard)
        if why:
            raise DamagedEntry(why)

    def _row(self, dtype: np.dtype[Any], others: bool, item: CacheItem, data: bytes) -> CacheRow:
        shard, _, column = item.at
        parts = split(shard.columns, data)
        values = self._values(column, parts[column.name], dtype)
        if not others:
            return CacheRow(values)
        rest = b""
        if self._carrier(parts, dtype) in ("", column.name):
            own = {one.name for one in self.latents}
            rest = file_bytes(
                {
                    one.name: ("U8", (len(parts[one.name]),), parts[one.name])
                    for one in self.columns
                    if one.name not in own
                },
                {},
            )
        return CacheRow(values, extras={"rest": np.frombuffer(rest, np.uint8)})

    def _carrier(self, parts: Mapping[str, memoryview], dtype: np.dtype[Any]) -> str:
        """The column whose row keeps the sample's other columns: the first that will not be left out."""
        if len(self.latents) == 1:
            return self.latents[0].name
        for one in self.latents:
            try:
                if len(parts[one.name]) and np.isfinite(self._values(one, parts[one.name], dtype)).all():
                    return one.name
            except DamagedEntry:
                continue
        return ""

    def _values(self, column: Column, data: memoryview, dtype: np.dtype[Any]) -> np.ndarray:
        name, shapes = column.name, self.shapes[column.name]
        if column.encoding == "bytes":
            (shape,), offset = shapes, 0
        else:
            said, shape, offset = read_prefix(column.encoding, data)
            if said != self.dtypes[name] or shape not in shapes:
                raise DamagedEntry(
                    f"{name}: expected {self.dtypes[name]} of {sorted(shapes)[:4]}, got {said} {list(shape)}"
                )
        if not fits(len(data), shape, offset, dtype.itemsize):
            raise DamagedEntry(
                f"{name}: expected {dtype} {list(shape)}, {int(np.prod(shape)) * dtype.itemsize + offset} bytes, "
                f"got {len(data)}"
            )
        return np.frombuffer(data, dtype, offset=offset).reshape(1, *shape)


def marks_of(names: Sequence[str]) -> dict[str, str]:
    """What keys have behind for each column of latents: nothing for one, @256 for latents_256, else @ and its name."""
    if len(names) == 1:
        return {names[0]: ""}
    short = {one: match[1] if (match := re.fullmatch(r"latents_(\d+)", one)) else one for one in names}
    if len(set(short.values())) < len(names) or any("/" in one for one in names):
        raise ValueError(f"expected columns of latents with names that a key can hold, got {', '.join(names):.200}")
    return {one: f"@{mark}" for one, mark in short.items()}
