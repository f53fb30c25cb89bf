"""MosaicML's MDS, version 2, as its diffusion code and MicroDiffusion keep latents in it: index.json and shards.

A column of bytes (float16) or of arrays whose name has "latent" in it, text's left aside, is a row of each sample;
empty bytes are none: the image was too small. Keys are {shard}/{sample:08d}, and @{R} behind for latents_R where there
are several such columns. Other columns stay beside the first row of a sample, byte for byte; pickled ones are left out.
Whether values are scaled is not in the files: MosaicML's are (0.18215), MicroDiffusion's as its configuration says.

Round trip: the same shards of the same bytes where no column is pickled and every sample has latents; samples without
are not written again. Of another dataset keys and labels become columns, which are not read again as such.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastlatent.caches.cache import Cache, DamagedEntry, Told
from fastlatent.caches.mds_files import (
    INDEX,
    Column,
    index_entry,
    list_shards,
    prefix_of,
    sample_bytes,
    shard_bytes,
)
from fastlatent.caches.mds_open import Opening, marks_of
from fastlatent.caches.outgoing import Outgoing, OutRow, put, target
from fastlatent.caches.shards import Ranges, shard_end, shard_of
from fastlatent.data.tensor_files import read_header
from fastlatent.sources.files import Files, Found

TITLE = "MosaicML, MicroDiffusion: MDS shards and index.json, with latents in a column of their own"
PAYLOADS = ("latents",)
SCALING = None
NUMBERED = (
    True  # samples of a shard are renumbered where some were left out: the n-th row written is the n-th read again
)
MARK = re.compile(r"@[^/]*$")  # behind a key, which of a sample's rows it is
SHARD_BYTES = 1 << 26  # as the format's own writer has them


def claims(files: Files, found: Sequence[Found]) -> int:
    return sum(re.search(r"\.mds(\.\w+)?$", one.path) is not None for one in found)


def open_cache(files: Files, found: Sequence[Found], told: Told) -> Cache:
    by_path = {one.path: one for one in found}
    listed = list_shards(files, found)
    packed = [one for one in listed if one.path not in by_path and one.entry.get("zip_data")]
    if packed:
        raise ValueError(
            f"{files.root}: expected shards that are not compressed, got {packed[0].entry.get('compression')} "
            f"({len(packed):,} shards, {packed[0].path} first): decompress them beside {INDEX}, or let the streaming "
            "package do it: StreamingDataset(remote=…, local=…), and convert its local folder"
        )
    ranges = Ranges(files)
    return Opening(files, ranges, by_path, told).cache(listed)


def write(outgoing: Outgoing, out: Path) -> Iterator[int]:
    layout = _told(outgoing, out) if outgoing.facts else _plain(outgoing, out)
    entries: list[dict[str, Any]] = []
    start = 0
    rows = outgoing.rows_per_shard
    if not outgoing.facts and outgoing.count:
        rows = max(1, min(rows, SHARD_BYTES // len(layout.sample([outgoing.row(0)]))))
    width = max(5, len(str((outgoing.count - 1) // rows)))  # so that names sort as numbers
    while start < outgoing.count:
        if outgoing.facts:
            stem, end = shard_of(outgoing.row(start).key, out), shard_end(outgoing, start, out)
        else:
            stem, end = f"shard.{len(entries):0{width}d}", min(start + rows, outgoing.count)
        path = target(out, f"{stem}.mds")
        if not path.exists():
            samples = [layout.sample(one) for one in _samples(outgoing, start, end, bool(outgoing.facts))]
            try:
                put(path, shard_bytes(layout.columns, samples, layout.settings))
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from None
            del samples
        entries.append(index_entry(f"{stem}.mds", path.read_bytes(), layout.columns, layout.settings))
        yield end - start
        start = end
    for folder in sorted({one["raw_data"]["basename"].rpartition("/")[0] for one in entries} - {""}):
        inside = [one for one in entries if one["raw_data"]["basename"].rpartition("/")[0] == folder]
        named = [_named(one, one["raw_data"]["basename"].rpartition("/")[2]) for one in inside]
        put(target(out, f"{folder}/{INDEX}"), _index(named))
    put(target(out, INDEX), _index(entries))


class _Layout:
    """What a sample is made of.

    columns: all of them. latents: name of the column by what keys have behind. settings: of the shards.
    """

    def __init__(
        self, out: Path, columns: Sequence[Column], latents: Mapping[str, str], settings: Mapping[str, Any], told: bool
    ) -> None:
        self.out, self.columns, self.latents, self.settings, self.told = out, columns, latents, settings, told
        self.others = [one.name for one in columns if one.name not in latents.values()]

    def sample(self, rows: Sequence[OutRow]) -> bytes:
        """The bytes of the sample that these rows are."""
        parts: dict[str, bytes | memoryview] = {}
        by_name = {one.name: one for one in self.columns}
        for row in rows:
            mark = MARK.search(row.key) if self.told else None
            name = self.latents.get(mark[0] if mark else "")
            if name is None:
                raise ValueError(
                    f"{self.out}: {row.key}: expected a key that names one of {list(self.latents.values())}"
                )
            encoding, values = by_name[name].encoding, row.values[0]
            dtype = {2: "F16", 4: "F32", 8: "F64"}[values.dtype.itemsize]
            try:
                before = b"" if encoding == "bytes" else prefix_of(encoding, dtype, values.shape)
            except ValueError as error:
                raise ValueError(f"{self.out}: {row.key}: {error}") from None
            parts[name] = before + values.tobytes()
        parts |= self._beside(rows)
        for one in self.columns:
            if one.name not in parts and one.name in self.latents.values() and one.size is None:
                parts[one.name] = b""  # as the format says that an image was too small
            if len(parts.get(one.name, b"")) != one.size and (one.size is not None or one.name not in parts):
                got = f"{len(parts[one.name])} bytes" if one.name in parts else "none: its row is not in the dataset"
                raise ValueError(
                    f"{self.out}: {rows[0].key}: expected column {one.name} ({one.encoding}), got {got}; convert the "
                    "cache again"
                )
        return sample_bytes(self.columns, parts)

    def _beside(self, rows: Sequence[OutRow]) -> dict[str, bytes | memoryview]:
        """The columns that are no latents."""
        if not self.told:
            try:
                made = {"key": rows[0].key.encode(), "label": rows[0].label.to_bytes(8, "little", signed=True)}
            except UnicodeEncodeError:
                raise ValueError(f"{self.out}: expected keys that UTF-8 can hold, got {rows[0].key!a}") from None
            return {name: made[name] for name in self.others}
        if not self.others:
            return {}
        data = next((row.extras["rest"].tobytes() for row in rows if len(row.extras.get("rest", ()))), None)
        if data is None:
            raise ValueError(
                f"{self.out}: {rows[0].key}: expected the sample's other columns beside its first row, which is not in "
                "the dataset; convert the cache again"
            )
        try:
            entries, _ = read_header(lambda at, count: data[at : at + count], len(data))
        except DamagedEntry as error:
            raise ValueError(f"{self.out}: {rows[0].key}: expected `rest` as the conversion made it: {error}") from None
        return {name: memoryview(data)[one.begin : one.end] for name, one in entries.items() if name in self.others}


def _told(outgoing: Outgoing, out: Path) -> _Layout:
    """As the cache was that the dataset comes from."""
    facts = outgoing.facts
    if outgoing.dtype != facts["dtype"]:
        raise ValueError(
            f"{out}: expected values {facts['dtype']} as its columns say, got {outgoing.dtype}: leave --dtype"
        )
    columns = [Column(*one) for one in facts["columns"]]
    latents = {mark: name for name, mark in marks_of(facts["latents"]).items()}
    return _Layout(out, columns, latents, outgoing.notes, True)


def _plain(outgoing: Outgoing, out: Path) -> _Layout:
    """latents_R as bytes for float16 [C, R/8, R/8], else arrays of any shape; keys, and labels where there are any."""
    if any(shape[0] != 1 for shape in outgoing.shapes):
        raise ValueError(
            f"{out}: expected rows of one view, got F = 2: the format has no place for mirror images; encode without "
            "--mirror"
        )
    names = {"F16": "float16", "F32": "float32", "F64": "float64"}
    if outgoing.dtype not in names:
        raise ValueError(f"{out}: expected float16 or float32, got {outgoing.dtype}: say --dtype float16")
    shape = outgoing.shapes[0]
    if len(outgoing.shapes) == 1 and len(shape) == 4 and shape[2] == shape[3] and outgoing.dtype == "F16":
        latents = Column(f"latents_{8 * shape[2]}", "bytes", None)
    else:
        latents = Column("latents", f"ndarray:{names[outgoing.dtype]}", None)
    columns = [Column("key", "str", None), latents]
    if outgoing.classes:
        columns.insert(1, Column("label", "int", 8))
    return _Layout(out, columns, {"": latents.name}, {}, False)


def _samples(outgoing: Outgoing, start: int, end: int, told: bool) -> Iterator[list[OutRow]]:
    """The rows of each sample: one, or where keys say so several."""
    rows: list[OutRow] = []
    for number in range(start, end):
        row = outgoing.row(number)
        if rows and not (told and MARK.sub("", row.key) == MARK.sub("", rows[0].key)):
            yield rows
            rows = []
        rows.append(row)
    yield rows


def _named(entry: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {**entry, "raw_data": {**entry["raw_data"], "basename": name}}


def _index(entries: Sequence[Mapping[str, Any]]) -> bytes:
    return json.dumps({"version": 2, "shards": list(entries)}, sort_keys=True).encode()
