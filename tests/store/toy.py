"""A source of small files and an autoencoder made of arithmetic, for the tests of the store. Also a script."""

import hashlib
import math
import os
import socket
import sys
import time
from pathlib import Path

import numpy as np

from fastlatent.store import lease
from fastlatent.store.records import Quarantined, Schema
from fastlatent.store.rows import Rows
from fastlatent.store.scan import Entry
from fastlatent.store.writer import DatasetWriter

BUCKET = (1, 4, 2, 2)  # one mirror, 2 channels of mean and 2 of logvar, 2 x 2 positions: 32 bytes a row in float16
SCHEMA = Schema((BUCKET,))
PROVENANCE = {"hashed": {"vae": {"weights": "a1b2c3d4" * 8}, "size": 256}, "informational": {"torch": "none"}}
EPOCH = 1_700_000_000_000_000_000  # ns: files get fixed times, so that an index has fixed bytes


def write_file(source: Path, key: str, data: bytes, tick: int = 0) -> None:
    path = source / key
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    os.utime(path, ns=(EPOCH + tick, EPOCH + tick))


def make_source(source: Path, keys: list[str]) -> Path:
    for key in keys:
        write_file(source, key, b"contents of " + os.fsencode(key))
    return source


def scan(source: Path) -> tuple[list[Entry], list[str]]:
    paths = sorted(path for path in source.rglob("*") if path.is_file())
    classes = sorted({path.parent.name for path in paths})
    entries = []
    for path in paths:
        stat = path.stat()
        key, label = path.relative_to(source).as_posix(), classes.index(path.parent.name)
        entries.append(Entry(key, str(path), label, stat.st_size, stat.st_mtime_ns))
    return entries, classes


def row(path: str, bucket=BUCKET) -> np.ndarray:
    """Decided by the file's bytes alone: multiples of 1/64 from -2 to 2, exact in float16."""
    values = hashlib.shake_256(Path(path).read_bytes()).digest(math.prod(bucket))
    return ((np.frombuffer(values, np.uint8).astype(np.float16) - 128) / 64).reshape(bucket)


def encode(unit) -> tuple[Rows, list[Quarantined]]:
    """Files whose bytes begin with "bad" cannot be decoded; those that begin with "nan" give NaN."""
    keys, moments, bad = [], [], []
    for item in unit.items:
        data = Path(item.path).read_bytes()
        if data.startswith(b"bad"):
            bad.append(Quarantined(item.key, item.digest, "cannot be decoded", "UnidentifiedImageError"))
        else:
            keys.append(item.key)
            moments.append(row(item.path, unit.bucket) * (np.float16("nan") if data.startswith(b"nan") else 1))
    count = len(keys)
    stacked = np.stack(moments) if moments else np.zeros((0, *unit.bucket), np.float16)
    hw = np.tile(np.array([300, 400], np.int32), (count, 1))
    return Rows(keys, stacked, hw, np.tile(np.array([22, 72, 256, 256], np.int32), (count, 1))), bad


def build(dataset: Path, source: Path, *, unit_rows=2, provenance=PROVENANCE, pause=0.0, encoded=None):
    """Bring `dataset` up to date with `source`; returns what finish returned and the keys that were encoded.

    A list given as `encoded` holds them, unit by unit once committed, even where the build is killed.
    """
    entries, classes = scan(source)
    encoded = [] if encoded is None else encoded
    with DatasetWriter.open(dataset, provenance, classes, unit_rows=unit_rows, schema=SCHEMA) as writer:
        writer.plan(entries)
        for unit in writer.claim():
            time.sleep(pause)
            writer.commit(unit, *encode(unit))
            encoded += [item.key for item in unit.items]
        time.sleep(pause)
        return writer.finish(), encoded


def contents(dataset: Path) -> dict[str, bytes]:
    """Every file of a dataset. The lock file is left out: it names the process that holds it."""
    files = (path for path in dataset.rglob("*") if path.is_file() and path.name != ".lock")
    return {path.relative_to(dataset).as_posix(): path.read_bytes() for path in files}


if __name__ == "__main__":
    # DATASET SOURCE PAUSE [EXPIRY HOST]: one of several writers; another HOST shares no process table with the others.
    if len(sys.argv) > 4:
        lease.EXPIRY_SECONDS = float(sys.argv[4])
        lease.BEAT_SECONDS = lease.EXPIRY_SECONDS / 8
        socket.gethostname = lambda: sys.argv[5]
    build(Path(sys.argv[1]), Path(sys.argv[2]), pause=float(sys.argv[3]))
