"""Publish a generation: its manifest, index, statistics and quarantine, and dataset.json last, which is the commit."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastlatent.store.files import canonical_json, natural, parse_json, read_bytes, write_atomic
from fastlatent.store.reader import GENERATION, Dataset, root_digest
from fastlatent.store.records import FORMAT, ROOT, Bucket, FileRecord, ShardRecord
from fastlatent.store.shard import chunks, layout
from fastlatent.store.statistics import Statistics


@dataclass(frozen=True)
class DatasetInfo:
    """What `finish` published, or found to be current already."""

    path: Path
    generation: int
    fingerprint: str
    rows: int
    shards: int
    bytes: int
    quarantined: int


@dataclass(frozen=True)
class Contents:
    """All that a generation says of a dataset.

    Attributes:
        fingerprint, classes, buckets, fields: as in dataset.json.
        manifests: entries of dataset.json, of earlier generations, that stay as they are.
        kept: the shards that these manifests name, in their order.
        added: shards of a new manifest, which comes after them; none: no new manifest.
        index: columns of the index; `shard` counts through kept, then added.
        statistics: over the rows of the index.
        quarantine: entries of the quarantine file.
    """

    fingerprint: str
    classes: list[str]
    buckets: list[Bucket]
    fields: list[dict[str, Any]]
    manifests: list[dict[str, Any]]
    kept: list[ShardRecord]
    added: list[ShardRecord]
    index: dict[str, np.ndarray]
    statistics: Statistics
    quarantine: list[dict[str, Any]]


def listing(fingerprint: str, name: str, entries: list[dict[str, Any]]) -> bytes:
    """A manifest or quarantine file: its entries under `name`."""
    return canonical_json({"format": FORMAT, "fingerprint": fingerprint, name: entries}) + b"\n"


def publish(path: Path, current: Dataset | None, contents: Contents) -> DatasetInfo:
    """Commit `contents` as the generation after `current`; where nothing differs from `current`, write nothing."""
    generation = current.generation + 1 if current else 1
    shards = [*contents.kept, *contents.added]
    size = sum(one.bytes for one in shards)
    known: dict[tuple[str, int, str], dict[str, Any]] = {}
    if current:
        for one in (*current.root["indexes"], current.root["statistics"], current.root["quarantine"]):
            if one is not None:
                record = FileRecord.parse(one, ROOT)
                known[record.path.partition("/")[0], record.bytes, record.xxh3_128] = vars(record)

    def put(kind: str, suffix: str, data: bytes) -> dict[str, Any]:
        """Write DATASET/kind/GENERATION.suffix, or name the file of `current` with the same bytes."""
        record = FileRecord.of("", data)
        if (kind, record.bytes, record.xxh3_128) in known:
            return known[kind, record.bytes, record.xxh3_128]
        name = f"{kind}/{generation:06d}.{suffix}"
        write_atomic(path / name, data)
        return vars(FileRecord(name, record.bytes, record.xxh3_128))

    manifests = list(contents.manifests)
    if contents.added:
        entries = [one.to_dict() for one in contents.added]
        manifests.append(put("manifest", "json", listing(contents.fingerprint, "shards", entries)))
    header, tensors = layout(contents.index, (), {"fls.format": FORMAT, "fls.fingerprint": contents.fingerprint})
    rows = len(contents.index["row"])
    root: dict[str, Any] = {
        "format": FORMAT,
        "fingerprint": contents.fingerprint,
        "totals": {
            "rows": rows,
            "shards": len(shards),
            "bytes": size,
            "quarantined": len(contents.quarantine),
        },
        "buckets": [{"shape": list(one.shape), "dtype": one.dtype, "rows": one.rows} for one in contents.buckets],
        "fields": contents.fields,
        "classes": contents.classes,
        "manifests": manifests,
        "indexes": [put("index", "safetensors", b"".join(chunks(header, tensors)))],
        "statistics": put("statistics", "json", canonical_json(contents.statistics.to_dict()) + b"\n"),
        "quarantine": None,
    }
    if contents.quarantine:
        root["quarantine"] = put("quarantine", "json", listing(contents.fingerprint, "files", contents.quarantine))
    if current and all(current.root.get(name) == value for name, value in root.items()):
        generation = current.generation
    else:
        root |= {"generation": generation, "previous_generation": current.generation if current else None}
        root["xxh3_128"] = root_digest(root)
        write_atomic(path / ROOT, json.dumps(root, indent=1, sort_keys=True).encode("ascii") + b"\n")
    keep_copy(path)
    return DatasetInfo(path, generation, contents.fingerprint, rows, len(shards), size, len(contents.quarantine))


def keep_copy(path: Path) -> None:
    """Keep the current dataset.json as generation/GGGGGG.json, for who wants this generation later."""
    data = read_bytes(path / ROOT)
    copy = path / GENERATION / f"{natural(parse_json(data, ROOT), 'generation', ROOT):06d}.json"
    if not copy.exists() or copy.read_bytes() != data:
        write_atomic(copy, data)
