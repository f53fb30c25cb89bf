"""The present scan: which files there are, in key order, and the digest of each."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import pairwise

import xxhash

from fastlatent.store.records import encode_key

HASH_THREADS = 8  # reading many small files waits for the disk, not for the processor
HASH_BLOCK = 4096  # files between two progress calls
HASH_CHUNK = 32  # files that a thread reads in a row: to hand over a single one takes as long as to read 100 KB
Pair = tuple[bytes, str]  # a key's bytes and its file's digest
Known = tuple[int, int, str, int]  # what a file was when it was last read: size, mtime_ns, digest, bucket (-1: unknown)


@dataclass(frozen=True)
class Entry:
    """A file of the present scan.

    Attributes:
        key: its relative POSIX path. label: an index into the classes, or -1.
        mtime_ns: of the file, or any number that changes whenever what its row is made of does.
        bucket: the shape that its row will have, an index into the schema's buckets.
        group, order: the key of the group it belongs to, and its place there; all files have a group, or none has.
    """

    key: str
    path: str
    label: int
    size: int
    mtime_ns: int
    bucket: int = 0
    group: str = ""
    order: int = 0


# What a file's bytes tell: their digest, 32 hexadecimal digits, and its bucket; None: it cannot be read, and is no file
# of the scan. Called in several threads.
Examine = Callable[[Entry], tuple[str, int] | None]


@dataclass(frozen=True)
class Scanned:
    """A file of the present scan, read: `key` as bytes."""

    key: bytes
    entry: Entry
    digest: str

    @property
    def pair(self) -> Pair:
        return self.key, self.digest


def sort_entries(entries: Iterable[Entry], classes: int, buckets: int) -> list[tuple[bytes, Entry]]:
    """By group, place in it and the key's bytes. Refuses keys that occur twice, and labels and buckets out of range."""
    pairs = sorted(((encode_key(entry.key), entry) for entry in entries), key=lambda pair: pair[0])
    for (key, entry), (following, other) in pairwise(pairs):
        if key == following:
            raise ValueError(
                f"expected every key once, got {entry.key!r} for both {entry.path} and {other.path}: give the "
                "sources a common folder above them, so that their relative paths differ"
            )
    for _, entry in pairs:
        if not -1 <= entry.label < classes:
            raise ValueError(f"{entry.path}: expected a label from -1 to {classes - 1}, got {entry.label}")
        if not 0 <= entry.bucket < buckets:
            raise ValueError(f"{entry.path}: expected a bucket from 0 to {buckets - 1}, got {entry.bucket}")
    grouped = {bool(entry.group) for _, entry in pairs}
    if grouped == {True, False}:
        raise ValueError("expected a group for every file or for none, got both")
    if grouped == {True}:
        pairs.sort(key=lambda pair: (encode_key(pair[1].group), pair[1].order, pair[0]))
        _check_groups(pairs)
    return pairs


def _check_groups(pairs: list[tuple[bytes, Entry]]) -> None:
    for (_, one), (_, other) in pairwise(pairs):
        if one.group == other.group and (one.order == other.order or one.bucket != other.bucket):
            raise ValueError(
                f"group {one.group!r}: expected files of one bucket with places of their own, got {one.path} (bucket "
                f"{one.bucket}, place {one.order}) and {other.path} (bucket {other.bucket}, place {other.order})"
            )


def scan(
    entries: list[tuple[bytes, Entry]],
    known: Mapping[bytes, Known],
    examine: Examine | None,
    on_progress: Callable[[int, int], None] | None,
) -> list[Scanned]:
    """Every entry with its digest: that in `known` where it `is_known`, else what `examine` says of its bytes.

    With `examine` an entry's bucket is the one that is known or that it tells; without, its own.

    Raises:
        ValueError: a file cannot be read, or is no longer the one that was listed; a bucket out of place in a group.
    """
    found: list[Scanned | None] = []
    for key, entry in entries:
        if is_known(known, key, entry, examine):
            _, _, digest, bucket = known[key]
            found.append(Scanned(key, entry if examine is None else _in_bucket(entry, bucket), digest))
        else:
            found.append(None)
    unread = [i for i, one in enumerate(found) if one is None]
    read = examine or (lambda entry: (hash_file(entry), entry.bucket))

    def read_chunk(chunk: list[int]) -> list[tuple[str, int] | None]:
        return [read(entries[i][1]) for i in chunk]

    with ThreadPoolExecutor(HASH_THREADS) as pool:
        for start in range(0, len(unread), HASH_BLOCK):
            block = unread[start : start + HASH_BLOCK]
            # Of a few files each thread has one.
            size = min(HASH_CHUNK, -(-len(block) // HASH_THREADS))
            chunks = [block[k : k + size] for k in range(0, len(block), size)]
            for chunk, told in zip(chunks, pool.map(read_chunk, chunks), strict=True):
                for i, one in zip(chunk, told, strict=True):
                    if one is not None:
                        found[i] = Scanned(entries[i][0], _in_bucket(entries[i][1], one[1]), one[0])
            if on_progress is not None:
                on_progress(start + len(block), len(unread))
    scanned = [one for one in found if one is not None]
    if examine is not None and entries and entries[0][1].group:
        _check_groups([(one.key, one.entry) for one in scanned])
    return scanned


def is_known(known: Mapping[bytes, Known], key: bytes, entry: Entry, examine: Examine | None) -> bool:
    """Whether an entry need not be read again: size and mtime_ns are what they were, and so is its bucket if asked."""
    size, mtime_ns, _, bucket = known.get(key, (-1, -1, "", -1))
    return (size, mtime_ns) == (entry.size, entry.mtime_ns) and (examine is None or bucket >= 0)


def _in_bucket(entry: Entry, bucket: int) -> Entry:
    return entry if entry.bucket == bucket else replace(entry, bucket=bucket)


def hash_file(entry: Entry) -> str:
    """xxh3_128 of the file's bytes, 32 hexadecimal digits.

    Raises:
        ValueError: it cannot be read, or is no longer the file that was listed.
    """
    digest = xxhash.xxh3_128()
    try:
        with open(entry.path, "rb", buffering=0) as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
            stat = os.fstat(file.fileno())
    except OSError as error:
        raise ValueError(f"{entry.path}: listed, but it cannot be read: {error.strerror}") from None
    if (stat.st_size, stat.st_mtime_ns) != (entry.size, entry.mtime_ns):
        raise ValueError(
            f"{entry.path}: expected {entry.size} bytes of mtime {entry.mtime_ns} ns as listed, "
            f"got {stat.st_size} of {stat.st_mtime_ns}: something writes to the source; run this again afterwards"
        )
    return digest.hexdigest()
