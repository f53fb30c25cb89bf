"""Copy a dataset from slow or remote storage to a local disk, whole shards, every byte held against its digest."""

from __future__ import annotations

import fcntl
import importlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import xxhash

from fastlatent.store.files import TEMPORARY, inside, make_directory, publish, write_all, write_atomic
from fastlatent.store.reader import PROVENANCE, Dataset, read_root
from fastlatent.store.records import ROOT, FileRecord

STREAMS = 4  # shards copied at once: one stream of an object store gives 50 to 100 MB/s
CHUNK_BYTES = 8 << 20


def stage(
    source: str | os.PathLike[str], cache: str | os.PathLike[str], *, shards: Iterable[int] | None = None
) -> Path:
    """A local copy of a dataset, for LatentDataset to open. What is there already is not copied again.

    Every file is written under a temporary name, held against the digest that the dataset records of it, and renamed:
    what has its name is whole. An interrupted call goes on where it stopped, shard by shard; several processes may
    stage the same dataset at once, each shard is copied by one of them. A new generation at the source adds its shards.

    Args:
        source: folder of the dataset, a path or a URL that fsspec knows ("s3://bucket/latents").
        cache: local folder; the copy is in a folder of its own inside it.
        shards: numbers of those to copy, for who reads them by `Dataset.open_shard` (LatentDataset needs all); all by
            default.

    Raises:
        ValueError: fsspec, or its package for this kind of URL, is missing; no dataset at `source`, or a damaged one;
            too little room in `cache`; a shard number out of range.
        OSError: the source or the disk failed; call again to go on.
    """
    filesystem, base = _filesystem(os.fspath(source))
    local = Path(cache) / f"{Path(base).name or 'dataset'}-{xxhash.xxh3_64_hexdigest(os.fspath(source).encode())}"
    make_directory(local)
    try:
        data = filesystem.cat_file(f"{base}/{ROOT}")
        provenance = filesystem.cat_file(f"{base}/{PROVENANCE}")
    except FileNotFoundError:
        raise ValueError(f"{source}: expected a dataset with {ROOT} and {PROVENANCE}, got a folder without") from None
    with tempfile.TemporaryDirectory(prefix=TEMPORARY, dir=local) as folder:
        (Path(folder) / ROOT).write_bytes(data)
        root = read_root(Path(folder))

    def fetch(record: FileRecord) -> None:
        _fetch(record, local, lambda: filesystem.open(f"{base}/{record.path}", "rb"), os.fspath(source))

    if not (local / PROVENANCE).exists() or (local / PROVENANCE).read_bytes() != provenance:
        write_atomic(local / PROVENANCE, provenance)
    for record in _named_files(root):
        fetch(record)
    store = Dataset(local, root)
    numbers = range(len(store.shards)) if shards is None else sorted(set(shards))
    if numbers and not 0 <= numbers[0] <= numbers[-1] < len(store.shards):
        raise ValueError(f"{source}: shards: expected numbers from 0 to {len(store.shards) - 1}, got {list(numbers)}")
    records = [FileRecord(store.shards[i].path, store.shards[i].bytes, store.shards[i].xxh3_128) for i in numbers]
    missing = [record for record in records if not _is_there(record, local)]
    needed, free = sum(record.bytes for record in missing), shutil.disk_usage(local).free
    if needed > free:
        raise ValueError(
            f"{local}: expected room for {needed:,} bytes of {len(missing)} shards, got {free:,}: free some space, "
            "use another folder, or stage only some shards"
        )
    with ThreadPoolExecutor(STREAMS, thread_name_prefix="stage") as pool:
        jobs = [pool.submit(fetch, record) for record in missing]
        try:
            for job in jobs:
                job.result()
        finally:
            pool.shutdown(cancel_futures=True)  # after a failure the others end the shard they are at
    write_atomic(local / ROOT, data)
    return local


def _filesystem(source: str) -> tuple[Any, str]:
    try:
        core = importlib.import_module("fsspec.core")
        filesystem, base = core.url_to_fs(source)
    except ImportError as error:
        raise ValueError(
            f"{source}: staging needs fsspec and its package for this kind of URL (pip install fsspec s3fs): {error}"
        ) from None
    return filesystem, base.rstrip("/")


def _named_files(root: dict[str, Any]) -> Iterator[FileRecord]:
    for name, entries in root.items():
        # Whatever dataset.json names with a path and digests: manifests, indexes, statistics, quarantine.
        for entry in entries if isinstance(entries, list) else [entries]:
            if isinstance(entry, dict) and {"path", "bytes", "xxh3_128"} <= set(entry):
                yield FileRecord.parse(entry, f"{ROOT}: {name}")


def _is_there(record: FileRecord, local: Path) -> bool:
    path = inside(local, record.path, ROOT)
    if not path.is_file() or path.stat().st_size != record.bytes:
        return False
    # A shard's name holds its digest; index/000001.safetensors may be that of a dataset that was there before.
    return record.xxh3_128 in path.name or FileRecord.of(record.path, path.read_bytes()) == record


def _fetch(record: FileRecord, local: Path, open_source: Callable[[], Any], source: str) -> None:
    path = inside(local, record.path, ROOT)
    make_directory(path.parent)
    with _alone(local / f"{TEMPORARY}lock-{xxhash.xxh3_64_hexdigest(record.path.encode('utf-8', 'surrogateescape'))}"):
        if _is_there(record, local):  # another process was faster
            return

        def write(fd: int) -> str:
            digest, size = xxhash.xxh3_128(), 0
            with open_source() as opened:
                while chunk := opened.read(CHUNK_BYTES):
                    digest.update(chunk)
                    size += len(chunk)
                    write_all(fd, chunk)
            if (size, digest.hexdigest()) != (record.bytes, record.xxh3_128):
                raise ValueError(
                    f"{source}/{record.path}: expected {record.bytes} bytes with xxh3_128 {record.xxh3_128}, got "
                    f"{size} bytes with {digest.hexdigest()}: damaged there or on the way; stage again, and if that "
                    "does not help, `fastlatent repair` the source"
                )
            return path.name

        publish(path.parent, path.name, write)


@contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """Hold an exclusive lock, which ends with its process at the latest; its file is removed by the last holder."""
    while True:
        fd = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        fcntl.flock(fd, fcntl.LOCK_EX)
        try:
            current = os.stat(lock).st_ino == os.fstat(fd).st_ino
        except FileNotFoundError:
            current = False
        if current:
            break
        os.close(fd)  # its last holder removed it while we waited
    try:
        yield
    finally:
        os.unlink(lock)
        os.close(fd)
