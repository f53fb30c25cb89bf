"""Read back from the shards themselves what a damaged manifest or index said of them."""

from __future__ import annotations

from contextlib import closing, suppress

import numpy as np

from fastlatent.store.live import Columns, shard_statistics, take
from fastlatent.store.records import (
    ShardRecord,
    decode_key,
    digest_strings,
    encode_key,
    key_columns,
    key_hashes,
    key_list,
)
from fastlatent.store.shard import Shard
from fastlatent.store.verify import SHARDS, Examined, hash_file

# What both shard and index have -> dtype, sizes after the row axis.
SOURCE_COLUMNS = {"src_xxh3": ("<u8", (2,)), "orig_hw": ("<i4", (2,)), "crop": ("<i4", (4,))}


def unnamed_shards(seen: Examined) -> list[ShardRecord]:
    """Records of the sound shards that no readable manifest names; a shard's name holds its unit and its digest."""
    named = {one.path for one in seen.shards}
    found = []
    for file in sorted((seen.path / SHARDS).rglob("*.safetensors")):
        name = file.relative_to(seen.path).as_posix()
        unit, _, digest = file.stem.partition("-")
        if name in named:
            continue
        with suppress(ValueError, KeyError, OSError), closing(Shard.open(file)) as shard:
            shape = tuple(int(size) for size in shard.metadata["fls.bucket"].replace("x", " ").split())
            kinds = [number for number, one in enumerate(seen.buckets) if one.shape == shape]
            if hash_file(file) != digest or not kinds:
                continue
            bucket = seen.buckets[kinds[0]]
            keys = key_list(shard.columns)
            record = ShardRecord(
                unit=unit,
                path=name,
                bytes=shard.bytes,
                header_bytes=shard.header_bytes,
                header_xxh3_64=shard.header_xxh3_64,
                xxh3_128=digest,
                rows=len(keys),
                bucket=kinds[0],
                first_key=decode_key(keys[0]),
                last_key=decode_key(keys[-1]),
                statistics=shard_statistics(shard, bucket),
            )
            seen.open_record(record).close()
            found.append(record)
    return found


def index_from_shards(seen: Examined, shards: list[ShardRecord], old: Columns | None) -> tuple[Columns, np.ndarray]:
    """The index of what the shards hold, and which samples of the old index that is (bool [N]).

    With an old index: its samples, wherever they lie now. Without: of every key the latest row, without a label.
    """
    places: dict[tuple[bytes, str], tuple[int, int]] = {}
    latest: dict[bytes, tuple[int, int]] = {}
    parts: list[Columns] = []
    for i, record in enumerate(shards):
        with closing(seen.open_record(record)) as shard:
            keys, digests = key_list(shard.columns), digest_strings(shard.columns["src_xxh3"])
            places |= {pair: (i, row) for row, pair in enumerate(zip(keys, digests, strict=True))}
            latest |= {key: (i, row) for row, key in enumerate(keys)}
            parts.append({name: shard.columns[name].copy() for name in SOURCE_COLUMNS})
    if old is not None:
        pairs = list(zip(key_list(old), digest_strings(old["src_xxh3"]), strict=True))
        live = np.array([pair in places for pair in pairs], bool)
        index = take(old, np.flatnonzero(live))
        at = np.array([places[pair] for pair in pairs if pair in places], np.int64).reshape(-1, 2)
        return index | {"shard": at[:, 0].astype("<u4"), "row": at[:, 1].astype("<u4")}, live
    apart = {encode_key(one["key"]) for one in seen.quarantine or ()}  # what a shard holds of them is an earlier state
    keys = sorted(latest.keys() - apart)
    at = np.array([latest[key] for key in keys], np.int64).reshape(-1, 2)
    buckets = np.array([one.bucket for one in shards], "<u2")
    count = len(keys)
    columns = {
        "key_hash": key_hashes(keys),
        "bucket": buckets[at[:, 0]],
        "shard": at[:, 0].astype("<u4"),
        "row": at[:, 1].astype("<u4"),
        "label": np.full(count, -1, "<i8"),
        "src_size": np.zeros(count, "<u8"),
        "src_mtime_ns": np.zeros(count, "<i8"),  # no file has this size and time: the next encode reads them all
    }
    for name in ("src_xxh3", "orig_hw", "crop"):
        columns[name] = np.array(
            [parts[i][name][row] for i, row in at.tolist()], parts[0][name].dtype if parts else "<i4"
        )
    return columns | key_columns(keys), np.zeros(0, bool)
