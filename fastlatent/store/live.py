"""The rows of shards: their bytes, which of them an index uses, the statistics of those; and a part of an index."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import replace
from itertools import pairwise

import numpy as np

from fastlatent.store.reader import INDEX_COLUMNS, Dataset
from fastlatent.store.records import Bucket, ShardRecord, key_columns, key_list
from fastlatent.store.shard import Shard
from fastlatent.store.statistics import Statistics

Columns = dict[str, np.ndarray]  # of an index, named as in the file


def dataset_index(dataset: Dataset) -> Columns:
    """The index of an open dataset, as `fastlatent.store` names its columns and in the file's order."""
    names = [*INDEX_COLUMNS, "key.offsets", "key.utf8"]
    columns = {name: getattr(dataset, name.replace(".", "_")) for name in names}
    if dataset.groups is not None:
        groups = dataset.groups
        columns |= {"group": groups.group, "order": groups.order}
        columns |= {"group.offsets": groups.offsets, "group.utf8": groups.utf8}
    return columns


def rows_by_shard(index: Columns, shards: int) -> list[np.ndarray]:
    """For each shard the numbers of the index rows that lie in it, in the order in which they lie there."""
    order = np.lexsort((index["row"], index["shard"]))
    starts = np.searchsorted(index["shard"][order], np.arange(shards + 1)).tolist()
    return [order[starts[i] : starts[i + 1]] for i in range(shards)]


def payload_rows(shard: Shard, name: str) -> list[np.ndarray]:
    """The rows of a shard's column; ragged ones lie one after another behind their offsets.

    Those of "NAME.scale", with int8 rows, are the scales of each row.
    """
    values = np.ascontiguousarray(shard.columns[name])
    offsets = shard.columns.get(f"{name.removesuffix('.scale')}.offsets")
    if offsets is None:
        return list(values)
    return [values[start:end] for start, end in pairwise(offsets.tolist())]


def shard_statistics(shard: Shard, bucket: Bucket, rows: np.ndarray | None = None) -> Statistics:
    """Of an open shard's rows: all of them, or those numbered `rows` (at least one)."""
    name = bucket.payload
    values, scale = shard.columns[name], shard.columns.get(f"{name}.scale")
    if rows is not None:
        if bucket.ragged:
            offsets = shard.columns[f"{name}.offsets"].tolist()
            rows = np.concatenate([np.arange(offsets[row], offsets[row + 1]) for row in rows.tolist()])
        values, scale = values[rows], None if scale is None else scale[rows]
    return Statistics.of(values, bucket.dtype, name, scale)


def live_statistics(
    index: Columns,
    shards: list[ShardRecord],
    buckets: list[Bucket],
    opened: Callable[[int], Shard],
    *,
    recompute: bool = False,
) -> Iterator[tuple[int, Statistics]]:
    """(number, statistics of the rows in use) of every shard that has some, in manifest order.

    A shard's own statistics serve while all its rows are in use; else, or to `recompute`, its rows are read again.
    """
    for i, at in enumerate(rows_by_shard(index, len(shards))):
        if len(at) == shards[i].rows and not recompute:
            yield i, shards[i].statistics
        elif len(at):
            with closing(opened(i)) as shard:
                bucket = buckets[shards[i].bucket]
                yield i, shard_statistics(shard, bucket, None if len(at) == shards[i].rows else index["row"][at])


def merged(parts: Iterable[Statistics]) -> Statistics:
    """Of all parts together, merged in their order."""
    return functools.reduce(Statistics.merge, parts)


def take(index: Columns, rows: np.ndarray) -> Columns:
    """The index of the samples numbered `rows` (rising) alone; groups without a sample are left out."""
    columns = {name: column[rows] for name, column in index.items() if "." not in name}
    keys = key_list(index)
    columns |= key_columns([keys[i] for i in rows.tolist()])
    if "group" in index:
        used, columns["group"] = np.unique(columns["group"], return_inverse=True)
        groups = group_keys(index)
        columns |= group_columns([groups[i] for i in used.tolist()])
    return {name: columns[name].astype(index[name].dtype, copy=False) for name in index if name in columns}


def group_keys(index: Columns) -> list[bytes]:
    """The keys of the groups of an index that has groups."""
    return key_list({name: index[name.replace("key", "group")] for name in ("key.offsets", "key.utf8")})


def group_columns(keys: list[bytes]) -> Columns:
    """The inverse of `group_keys`."""
    return {name.replace("key", "group"): column for name, column in key_columns(keys).items()}


def renumber(index: Columns, new: np.ndarray) -> Columns:
    """The same index after shard i has become shard new[i]."""
    return index | {"shard": new[index["shard"]].astype("<u4")}


def count_rows(buckets: list[Bucket], index: Columns) -> list[Bucket]:
    """The buckets with as many rows as the index has of each."""
    counts = np.bincount(index["bucket"], minlength=len(buckets)).tolist()
    return [replace(bucket, rows=rows) for bucket, rows in zip(buckets, counts, strict=True)]
