"""Check a dataset against its own digests and against itself. Changes nothing and holds no lock."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field, fields
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from fastlatent.store.checked import open_checked
from fastlatent.store.files import inside, member, parse_json, read_bytes
from fastlatent.store.live import (
    Columns,
    live_statistics,
    merged,
    payload_rows,
    rows_by_shard,
    shard_statistics,
)
from fastlatent.store.provenance import fingerprint as fingerprint_of
from fastlatent.store.reader import (
    GENERATION,
    INDEX_COLUMNS,
    PROVENANCE,
    Dataset,
    read_fields,
    read_provenance,
    read_root,
    root_digest,
)
from fastlatent.store.records import (
    ROOT,
    Bucket,
    Field,
    FileRecord,
    ShardRecord,
    decode_key,
    key_hashes,
    key_list,
)
from fastlatent.store.rows import finite_rows, row_digest
from fastlatent.store.shard import Shard
from fastlatent.store.statistics import Statistics

SHARDS = "shards"
BLOCK_BYTES = 8 << 20  # read and hashed at a time
# Another processor's exp() and order of summation differ in the last bits: 1e-15 of the largest term were seen.
STATISTICS_TOLERANCE = 1e-12


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong: the file (relative to the dataset), the sample where it is about one, and what."""

    path: str
    key: str | None
    what: str

    def __str__(self) -> str:
        return f"{self.path}: {self.what}" if self.key is None else f"{self.path}: sample {self.key!a}: {self.what}"


@dataclass(frozen=True)
class VerifyReport:
    """What was checked, and what was found wrong with it. `bytes` were read: all of the shards, or nothing of them."""

    path: Path
    generation: int | None
    rows: int
    shards: int
    bytes: int
    full: bool
    findings: list[Finding]


@dataclass
class Examined:
    """All of a generation that could be read, and all that is wrong with it.

    Attributes:
        root: dataset.json, or its newest sound copy; None where there is none.
        hashed: of provenance.json; None where it is damaged.
        shards: of the manifests that could be read; `numbered` where these are all, so that the index's numbers hold.
        index: its columns; None where it is damaged. quarantine: its entries, likewise.
        damaged: numbers of the shards that are not what they should be.
    """

    path: Path
    root: dict[str, Any] | None = None
    hashed: dict[str, Any] | None = None
    buckets: list[Bucket] = field(default_factory=list)
    extras: list[Field] = field(default_factory=list)
    shards: list[ShardRecord] = field(default_factory=list)
    numbered: bool = True
    index: Columns | None = None
    quarantine: list[dict[str, Any]] | None = None
    damaged: set[int] = field(default_factory=set)
    findings: list[Finding] = field(default_factory=list)

    def find(self, path: str, error: object, key: str | None = None) -> None:
        self.findings.append(Finding(path, key, str(error).removeprefix(f"{self.path / path}: ")))

    @property
    def fingerprint(self) -> str:
        assert self.root is not None
        return self.root["fingerprint"]

    def open(self, i: int) -> Shard:
        """Shard i, held against its manifest record; see `fastlatent.store.checked.open_checked`."""
        return self.open_record(self.shards[i])

    def open_record(self, record: ShardRecord) -> Shard:
        return open_checked(self.path, record, self.buckets, self.fingerprint, self.extras)


Progress = Callable[[int, int], None]  # (shards done, shards in all)


def verify(path: Path | str, *, full: bool, threads: int, on_progress: Progress | None = None) -> VerifyReport:
    """Check the current generation of a dataset.

    Always: dataset.json, provenance.json, manifests, index, statistics and quarantine against their digests and each
    other; size and header of every shard. With `full` also every byte of every shard: its digest, that of each row (so
    that damaged samples are named), NaN and infinity, the samples against the index, the statistics against a
    recomputation. What nothing records the digest of is not checked: the informational part of provenance.json.

    Args:
        threads: shards that are read at a time; each is held in memory only as the page cache likes.
        on_progress: called with (shards done, shards in all).

    Raises:
        ValueError: there is no dataset at all.
    """
    seen = examine(Path(path), full=full, threads=threads, on_progress=on_progress)
    root = seen.root or {}
    rows = 0 if seen.index is None else len(seen.index["row"])
    size = sum(one.bytes for one in seen.shards) if full else 0
    return VerifyReport(seen.path, root.get("generation"), rows, len(seen.shards), size, full, seen.findings)


def examine(path: Path, *, full: bool, threads: int, on_progress: Progress | None = None) -> Examined:
    """`verify`, with what it has read: for whoever repairs."""
    seen = Examined(path)
    _read_root(seen)
    if seen.root is None:
        return seen
    try:
        provenance = read_provenance(path)
        found = fingerprint_of(provenance["hashed"])
        if found != seen.fingerprint:
            raise ValueError(f"expected what has the fingerprint {seen.fingerprint}, got {found}")
        seen.hashed = provenance["hashed"]
    except ValueError as error:
        seen.find(PROVENANCE, error)
    try:
        _read_fields(seen)
        _read_manifests(seen)
        _read_index(seen)
        _read_statistics_and_quarantine(seen)
    except (ValueError, KeyError, TypeError) as error:
        seen.find(ROOT, error)
        return seen
    if not seen.findings:
        try:
            Dataset.open(path)
        except ValueError as error:
            seen.find(ROOT, error)
            seen.index = None
    _check_shards(seen, full, threads, on_progress)
    if full and seen.index is not None:
        _check_index(seen)
        if seen.numbered and not seen.damaged and not seen.findings:
            _check_statistics(seen)
    return seen


def _read_root(seen: Examined) -> None:
    """dataset.json, or else its newest sound copy."""
    copies, damaged = sound_copies(seen.path)
    if not copies and not damaged and not (seen.path / ROOT).is_file():
        read_root(seen.path)  # raises, and says what the folder is instead
    seen.findings += damaged
    try:
        seen.root = read_root(seen.path)
    except ValueError as error:
        seen.find(ROOT, error)
        seen.root = parse_json(copies[0].read_bytes(), ROOT) if copies else None


def sound_copies(path: Path) -> tuple[list[Path], list[Finding]]:
    """The copies of dataset.json whose own digest is right, newest first; and what is wrong with the others."""
    sound, found = [], Examined(path)
    for copy in sorted((path / GENERATION).glob("*.json"), reverse=True):
        name = f"{GENERATION}/{copy.name}"
        try:
            value = parse_json(read_bytes(copy), str(copy))
            if member(value, "xxh3_128", str, str(copy)) != root_digest(value):
                raise ValueError("expected contents with the digest that it states, got others: damaged")
            sound.append(copy)
        except ValueError as error:
            found.find(name, error)
    return sound, found.findings


def _read_fields(seen: Examined) -> None:
    assert seen.root is not None
    payload, seen.extras = read_fields(seen.root, ROOT)
    seen.buckets = [Bucket.parse(one, f"{ROOT}: buckets", payload) for one in member(seen.root, "buckets", list, ROOT)]


def _read_manifests(seen: Examined) -> None:
    assert seen.root is not None
    for entry in member(seen.root, "manifests", list, ROOT):
        record = FileRecord.parse(entry, f"{ROOT}: manifests")
        try:
            shards = member(record.read_json(seen.path), "shards", list, record.path)
            records = [ShardRecord.parse(one, f"{record.path}: shards") for one in shards]
            for one in records:
                if one.bucket >= len(seen.buckets):
                    raise ValueError(f"expected bucket {one.bucket} of {one.path}, got {len(seen.buckets)} buckets")
            seen.shards += records
        except ValueError as error:
            seen.find(record.path, error)
            seen.numbered = False


def _read_index(seen: Examined) -> None:
    assert seen.root is not None
    for entry in member(seen.root, "indexes", list, ROOT):
        record = FileRecord.parse(entry, f"{ROOT}: indexes")
        try:
            file = inside(seen.path, record.path, ROOT)
            shard = Shard.open(file, expected_bytes=record.bytes)
            record.check(file, memoryview(shard.mapping))
            missing = {*INDEX_COLUMNS, "key.offsets", "key.utf8"} - shard.columns.keys()
            if missing:
                raise ValueError(f"expected the columns of an index, got none named {sorted(missing)}")
            seen.index = shard.columns
        except ValueError as error:
            seen.find(record.path, error)


def _read_statistics_and_quarantine(seen: Examined) -> None:
    assert seen.root is not None
    record = FileRecord.parse(seen.root["statistics"], f"{ROOT}: statistics")
    try:
        Statistics.from_dict(record.read_json(seen.path), record.path)
    except ValueError as error:
        seen.find(record.path, error)
    if seen.root["quarantine"] is None:
        seen.quarantine = []
        return
    record = FileRecord.parse(seen.root["quarantine"], f"{ROOT}: quarantine")
    try:
        seen.quarantine = member(record.read_json(seen.path), "files", list, record.path)
    except ValueError as error:
        seen.find(record.path, error)


def _check_shards(seen: Examined, full: bool, threads: int, on_progress: Progress | None) -> None:
    count = len(seen.shards)
    known = seen.index is not None and seen.numbered
    live = rows_by_shard(seen.index, count) if full and known and seen.index is not None else [None] * count

    def check(i: int) -> list[Finding]:
        if full:
            return check_shard(seen, i, live[i])
        try:
            seen.open(i).close()
        except ValueError as error:
            one = Examined(seen.path)
            one.find(seen.shards[i].path, error)
            return one.findings
        return []

    with ThreadPoolExecutor(threads) as pool:
        for i, found in enumerate(pool.map(check, range(count))):
            if found:
                seen.damaged.add(i)
                seen.findings += found
            if on_progress is not None:
                on_progress(i + 1, count)


def check_shard(seen: Examined, i: int, at: np.ndarray | None) -> list[Finding]:
    """Every byte of shard i; `at`: the numbers of the index rows that lie in it, None where that is not known."""
    record = seen.shards[i]
    own = Examined(seen.path)  # its findings only: shards are checked side by side
    try:
        # By read() before anything is mapped: a bad block is an error here, and kills the process there.
        digest = hash_file(inside(seen.path, record.path, "manifest"))
        shard = seen.open(i)
    except (OSError, ValueError) as error:
        own.find(record.path, error.strerror if isinstance(error, OSError) else error)
        return own.findings
    with closing(shard):
        keys = key_list(shard.columns)
        names = [decode_key(key) for key in keys]
        if seen.index is not None and at is not None:  # a damaged shard's own keys may be what is damaged
            utf8, offsets = seen.index["key.utf8"], seen.index["key.offsets"]
            for sample, row in zip(at.tolist(), seen.index["row"][at].tolist(), strict=True):
                if row < len(names):
                    names[row] = decode_key(utf8[offsets[sample] : offsets[sample + 1]].tobytes())
        bucket = seen.buckets[record.bucket]
        name = bucket.payload
        rows = payload_rows(shard, name)
        scaled = [payload_rows(shard, one) for one in (f"{name}.scale",) if one in shard.columns]
        found = np.array([row_digest(*parts) for parts in zip(rows, *scaled, strict=True)], "<u8")
        damaged = (found != shard.columns["row_xxh3"]) | (key_hashes(keys) != shard.columns["sample_id"])
        for row in np.flatnonzero(damaged).tolist():
            own.find(record.path, "its bytes are not those that its digest is of: damaged", names[row])
        if digest != record.xxh3_128:
            own.find(record.path, f"expected xxh3_128 {record.xxh3_128}, got {digest}: the file is damaged")
        dtype = "F32" if scaled else shard.dtypes[name]
        bad = ~finite_rows(scaled[0] if scaled else rows, dtype)
        for row in np.flatnonzero(bad & ~damaged).tolist():
            own.find(record.path, "it holds NaN or infinity", names[row])
        if seen.index is not None and at is not None:
            _check_samples(own, seen.index, at, shard, keys, record.path)
        if not own.findings and not same_statistics(shard_statistics(shard, bucket), record.statistics):
            own.find(record.path, "expected rows with the statistics of its manifest, got others")
    return own.findings


def _check_samples(own: Examined, index: Columns, at: np.ndarray, shard: Shard, keys: list[bytes], path: str) -> None:
    """The samples that the index says lie in this shard, against the shard's own columns."""
    row = index["row"][at]
    offsets, utf8 = index["key.offsets"], index["key.utf8"]
    ours = [utf8[offsets[i] : offsets[i + 1]].tobytes() for i in at.tolist()]
    inside_shard = row < len(keys)
    row = np.where(inside_shard, row, 0)
    wrong = {"row": ~inside_shard, "key": np.array([keys[r] for r in row.tolist()], object) != np.array(ours, object)}
    for name in ("src_xxh3", "orig_hw", "crop"):
        wrong[name] = (shard.columns[name][row] != index[name][at]).any(axis=1)
    wrong["sample_id"] = shard.columns["sample_id"][row] != index["key_hash"][at]
    for name, differs in wrong.items():
        for i in np.flatnonzero(differs).tolist():
            own.find(path, f"{name}: the index and the shard disagree", decode_key(ours[i]))


def _check_index(seen: Examined) -> None:
    """Keys in order and none twice; their hashes; no row of a shard used twice; quarantine apart."""
    assert seen.index is not None and seen.root is not None
    path = str(seen.root["indexes"][0]["path"])
    keys = key_list(seen.index)
    if "group" not in seen.index:  # else its groups are in the order of their keys
        for key, following in pairwise(keys):
            if key > following:
                seen.find(path, "expected keys in order, got one after it that belongs before it", decode_key(key))
    for key, times in Counter(keys).items():
        if times > 1:
            seen.find(path, f"expected every key once, got this one {times} times", decode_key(key))
    for i in np.flatnonzero(key_hashes(keys) != seen.index["key_hash"]).tolist():
        seen.find(path, "expected the hash of its key, got another", decode_key(keys[i]))
    places = seen.index["shard"].astype(np.uint64) << np.uint64(32) | seen.index["row"]
    _, first = np.unique(places, return_index=True)
    for i in np.setdiff1d(np.arange(len(keys)), first).tolist():
        seen.find(path, "expected a row of its own, got one that an earlier sample has", decode_key(keys[i]))
    if "group" in seen.index:
        group, order, shard, row = (seen.index[name].astype(np.int64) for name in ("group", "order", "shard", "row"))
        parts = (np.diff(shard) != 0) | (np.diff(row) != 1) | (np.diff(order) <= 0)
        for i in np.flatnonzero((np.diff(group) == 0) & parts).tolist():
            seen.find(path, "expected to lie behind the sample of its group before it", decode_key(keys[i + 1]))
    both = {decode_key(key) for key in keys} & {str(one.get("key")) for one in seen.quarantine or ()}
    for name in sorted(both):
        seen.find(path, "expected a sample or a file in quarantine, got both", name)


def _check_statistics(seen: Examined) -> None:
    assert seen.root is not None and seen.index is not None
    record = FileRecord.parse(seen.root["statistics"], ROOT)
    recorded = Statistics.from_dict(record.read_json(seen.path), record.path)
    if not same_statistics(
        merged(part for _, part in live_statistics(seen.index, seen.shards, seen.buckets, seen.open)), recorded
    ):
        seen.find(record.path, "expected the statistics of the samples, got others")


def same_statistics(one: Statistics, other: Statistics) -> bool:
    """Equal, but for the last bits of sums: relative to the largest channel within STATISTICS_TOLERANCE."""
    for name in (each.name for each in fields(Statistics)):
        a, b = np.asarray(getattr(one, name)), np.asarray(getattr(other, name))
        exact = name in ("count", "min", "max", "abs_max")
        scale = 0.0 if exact else STATISTICS_TOLERANCE * max(1e-300, float(np.abs(b).max()))
        if a.shape != b.shape or not (np.abs(a - b) <= scale).all():
            return False
    return True


def hash_file(path: Path) -> str:
    """xxh3_128 of a file's bytes, a few MiB at a time. Raises OSError where they cannot be read."""
    digest = xxhash.xxh3_128()
    buffer = bytearray(BLOCK_BYTES)
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        while count := os.readv(fd, [buffer]):
            digest.update(memoryview(buffer)[:count])
    finally:
        os.close(fd)
    return digest.hexdigest()
