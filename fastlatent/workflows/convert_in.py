"""A latent cache of another project → a dataset, by any number of processes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash

from fastlatent import __version__
from fastlatent.caches.cache import Cache, CacheItem, CacheRow, DamagedEntry
from fastlatent.caches.formats import detect, format_of
from fastlatent.config import ConvertConfig
from fastlatent.encoders.load import load_autoencoder
from fastlatent.encoders.video_clips import is_video_model, load_video_clip_encoder
from fastlatent.pipeline.ahead import ahead
from fastlatent.pipeline.interrupt import StopRequest
from fastlatent.pipeline.progress import Progress
from fastlatent.store.reader import Dataset
from fastlatent.store.records import RAGGED, Bucket, PlannedItem, Quarantined, Schema, Unit
from fastlatent.store.rows import Rows, Values
from fastlatent.store.scan import Entry
from fastlatent.store.shard import DTYPES as ARRAY_DTYPES
from fastlatent.store.writer import DatasetWriter
from fastlatent.workflows.convert_cache import ConvertReport, list_source, open_format
from fastlatent.workflows.convert_values import FLAGS, Scaling, settle_scaling, stored_dtype, to_raw
from fastlatent.workflows.runtime import available_cores, keep_config, refuse_output_in_source

MAX_UNIT_BYTES = 128 * 2**20  # of rows; two units are in memory: one is read while the last one is written
CHUNK = 32  # rows that a thread reads before it hands over
LISTED = 20  # damaged rows that a message names


def convert_in(config: ConvertConfig) -> ConvertReport:
    """`convert` of a cache.

    Raises:
        ValueError: the source is of no known format, or of several; something it does not say was not said; more rows
            than --max-errors are damaged; the folder holds something else; what was written differs from the source.
    """
    files, found = list_source(config.source)
    refuse_output_in_source(config.out, config.source)
    name = detect(files, found) if config.format == "auto" else config.format
    cache = open_format(name, files, found, config.latent_shape)
    try:
        return _Import(config, name, cache).run()
    finally:
        cache.close()


@dataclass
class _Import:
    """One process's part in making a dataset of a cache."""

    config: ConvertConfig
    name: str
    cache: Cache
    _unreadable: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        config, cache = self.config, self.cache
        channels = Bucket(cache.buckets[0], "F16", 0, cache.payload).channels
        known = cache.scaling or format_of(self.name).SCALING
        self.scaling: Scaling = settle_scaling(config, known, cache.payload, channels, self.name)
        self.dtype = stored_dtype(config.dtype, cache.dtype, self.scaling)
        self.schema = Schema(cache.buckets, cache.payload, cache.fields)
        self.by_key: dict[str, CacheItem] = {item.key: item for item in cache.items}

    def run(self) -> ConvertReport:
        config, cache, out = self.config, self.cache, Path(self.config.out)
        self._check_errors()
        _print_found(self, config)
        with DatasetWriter.open(
            out, self._provenance(), cache.classes, unit_rows=self._unit_rows(), schema=self.schema
        ) as writer:
            keep_config(out / "convert.yaml", replace(config, source=_absolute(config.source)))
            with Progress("read", 0, "rows") as scanned:

                def on_scan(done: int, total: int) -> None:
                    scanned.total = total
                    scanned.advance(done - scanned.done)

                units = writer.plan(self._entries(), on_scan, examine=self._examine)
            converted = self._convert(writer, sum(len(unit.items) for unit in units))
            self._check_errors(writer.quarantined)
            info = writer.finish()
        dataset = Dataset.open(out)
        checked = self._check(dataset)
        left_out = {**self._left_out, **{one.key: one.reason for one in dataset.quarantined}}
        print(
            f"{out}: {info.rows:,} rows of {self.name} in {info.shards} shards, {info.bytes / 2**20:,.1f} MiB; "
            f"{converted:,} converted now, {checked:,} read again and compared"
        )
        _print_left_out(left_out)
        return ConvertReport(out, self.name, info.rows, converted, left_out)

    def _provenance(self) -> dict[str, Any]:
        config, cache = self.config, self.cache
        vae = _identity(config.vae, cache.payload)
        unknown = [
            *(["vae"] if vae is None and cache.payload != "tokens" else []),
            *(["pixel_range"] if config.pixel_range == "unknown" and cache.payload != "tokens" else []),
            "transform",
        ]
        return {
            "hashed": {
                "converted": {
                    "format": self.name,
                    "dtype": cache.dtype,
                    "scaling": self.scaling.record(),
                    "unknown": unknown,
                    **({"facts": dict(cache.facts)} if cache.facts else {}),
                },
                "payload": cache.payload,
                "mirror": cache.buckets[0][0] == 2,
                "storage_dtype": {kind: flag for flag, kind in FLAGS.items()}[self.dtype],
                "pixel_range": config.pixel_range,
                **({"vae": vae} if vae else {}),
            },
            "informational": {
                "source": _absolute(config.source),
                **({"vae_path": _absolute(config.vae)} if config.vae else {}),
                "fastlatent": __version__,
                **({"cache": dict(cache.notes)} if cache.notes else {}),
            },
        }

    def _unit_rows(self) -> int:
        """A ragged row's size is not known before it is read: as if it had 4,096 tokens."""
        largest = max(np.prod([4096 if size == RAGGED else size for size in bucket]) for bucket in self.cache.buckets)
        return int(max(1, min(self.config.unit_rows, MAX_UNIT_BYTES // (4 * largest))))

    def _entries(self) -> Iterable[Entry]:
        for item in self.cache.items:
            yield Entry(item.key, item.place, item.label, item.size, item.stamp, 0, item.group, item.order)

    def _examine(self, entry: Entry) -> tuple[str, int] | None:
        item = self.by_key[entry.key]
        try:
            data = self.cache.content(item)
        except (OSError, DamagedEntry) as error:
            self._unreadable[item.key] = f"{item.place}: {_reason(error)}"
            return None
        bucket = 0
        if len(self.cache.buckets) > 1:
            with suppress(DamagedEntry):  # whoever makes the rows finds it again, and puts it into quarantine
                bucket = self._bucket(self.cache.row(item, data))
        return xxhash.xxh3_128_hexdigest(data), bucket

    def _bucket(self, row: CacheRow) -> int:
        shape = row.values.shape
        if shape not in self.cache.buckets:
            raise DamagedEntry(f"expected one of the shapes {list(self.cache.buckets)}, got {shape}")
        return self.cache.buckets.index(shape)

    @property
    def _left_out(self) -> dict[str, str]:
        return {**self.cache.left_out, **self._unreadable}

    def _convert(self, writer: DatasetWriter, total: int) -> int:
        """Claim and commit units until all are; how many rows were converted here."""
        threads = self.config.threads or 2 * available_cores()
        converted, writing = 0, None
        with (
            StopRequest() as stop,
            Progress("convert", total, "rows") as progress,
            ThreadPoolExecutor(threads, thread_name_prefix="read") as pool,
            ThreadPoolExecutor(1, thread_name_prefix="write") as behind,
        ):

            def on_others(rows: int) -> None:
                stop.check()
                progress.advance(rows)

            def done(pending: Future[None] | None) -> None:
                if pending is not None:
                    pending.result()

            while True:
                unit = writer.claim_now(on_others)
                if unit is None:
                    done(writing)  # what is committed here need not be waited for
                    writing, unit = None, next(writer.claim(on_others), None)
                if unit is None:
                    break
                rows, bad = self._rows(unit, pool, threads, stop.check, progress.advance)
                self._check_errors([*writer.quarantined, *bad])
                converted += len(rows.keys)
                done(writing)
                writing = behind.submit(writer.commit, unit, rows, bad)
        return converted

    def _rows(
        self,
        unit: Unit,
        pool: ThreadPoolExecutor,
        threads: int,
        check: Callable[[], None],
        advance: Callable[[int], None],
    ) -> tuple[Rows, list[Quarantined]]:
        """The unit's rows, and the files that gave none."""
        count, ragged = len(unit.items), RAGGED in unit.bucket
        kind = np.dtype(ARRAY_DTYPES[self.dtype])
        payload: Any = [None] * count if ragged else np.empty((count, *unit.bucket), kind)
        rows: list[CacheRow | None] = [None] * count
        bad: list[Quarantined] = []

        def read(begin: int) -> list[Quarantined]:
            wrong = []
            for k in range(begin, min(begin + CHUNK, count)):
                try:
                    rows[k] = self._read(unit, unit.items[k], k, payload)
                except DamagedEntry as error:
                    item = unit.items[k]
                    reason = f"{self.by_key[item.key].place}: {error}"
                    wrong.append(Quarantined(item.key, item.digest, reason, type(error).__name__))
            return wrong

        starts = iter(range(0, count, CHUNK))
        for begin, wrong in ahead(partial(next, starts, None), read, pool=pool, depth=2 * threads):
            check()
            bad += wrong
            advance(min(CHUNK, count - begin))
        good = [k for k in range(count) if rows[k] is not None]
        kept = [row for row in rows if row is not None]
        extras: dict[str, Values] = {}
        for one in self.cache.fields:
            values = [row.extras[one.name] for row in kept]
            extras[one.name] = values if one.ragged else np.array(values).reshape(len(kept), *one.shape)
        return (
            Rows(
                [unit.items[k].key for k in good],
                [payload[k] for k in good] if ragged else payload if len(good) == count else payload[good],
                np.array([row.orig_hw for row in kept], np.int32).reshape(-1, 2),
                np.array([row.crop for row in kept], np.int32).reshape(-1, 4),
                None,
                extras,
            ),
            bad,
        )

    def _read(self, unit: Unit, planned: PlannedItem, k: int, payload: Any) -> CacheRow:
        """Row k of the unit, its values put into `payload` as they will be stored."""
        item = self.by_key[planned.key]
        try:
            data = self.cache.content(item)
        except OSError as error:
            raise ValueError(f"{item.place} could not be read: {_reason(error)}; rerun the same command") from None
        if xxhash.xxh3_128_hexdigest(data) != planned.digest:
            raise ValueError(f"{item.place} changed while it was being converted; rerun the same command")
        row = self.cache.row(item, data)
        raw = to_raw(row.values, self.cache.dtype, self.scaling, self.dtype)
        if isinstance(payload, list):
            payload[k] = raw[0]
        elif raw.shape != unit.bucket:
            raise DamagedEntry(f"expected a latent {list(unit.bucket)} as in the first file, got {list(raw.shape)}")
        else:
            payload[k] = raw
        return CacheRow(row.values[:0], row.orig_hw, row.crop, row.extras)  # its values are not kept twice

    def _check(self, dataset: Dataset) -> int:
        """Read rows of the cache again and compare them with what the dataset's shards hold; how many.

        Raises:
            ValueError: one differs.
        """
        chosen = np.random.default_rng(0).permutation(len(dataset))[: self.config.check].tolist()
        for i in sorted(chosen):
            item = self.by_key[dataset.key(i)]
            row = self.cache.row(item, self.cache.content(item))
            raw = to_raw(row.values, self.cache.dtype, self.scaling, self.dtype)
            if stored_row(dataset, i).tobytes() != raw.tobytes():
                raise ValueError(
                    f"{dataset.path}: row {item.key!r} differs from {item.place}: the source changed, or the disk is "
                    "at fault; run `fastlatent verify --full`"
                )
        return len(chosen)

    def _check_errors(self, quarantined: Sequence[Quarantined] = ()) -> None:
        """Raise ValueError where more rows than --max-errors are left out; it names them."""
        bad = {**self._left_out, **{one.key: one.reason for one in quarantined}}
        if len(bad) <= self.config.max_errors:
            return
        named = [f"{key}: {why}" for key, why in list(bad.items())[:LISTED]]
        more = [f"… and {len(bad) - len(named):,} more"] if len(bad) > len(named) else []
        raise ValueError(
            "\n  ".join(
                [
                    f"{self.config.source}: {len(bad):,} rows cannot be used, and --max-errors is "
                    f"{self.config.max_errors}; nothing was published. Mend them and run the same command again, or "
                    "leave them out with a higher --max-errors",
                    *named,
                    *more,
                ]
            )
        )


def stored_row(dataset: Dataset, i: int) -> np.ndarray:
    """[F, ...] of sample i as its shard holds it, a view."""
    row = dataset.open_shard(int(dataset.shard[i])).row(dataset.payload, int(dataset.row[i]))
    return row[None] if dataset.buckets[dataset.bucket[i]].ragged else row


def _print_found(job: _Import, config: ConvertConfig) -> None:
    cache, shapes = job.cache, [list(shape) for shape in job.cache.buckets[:4]]
    more = f" and {len(cache.buckets) - 4} more shapes" if len(cache.buckets) > 4 else ""
    print(
        f"{config.source}: {job.name}, {len(cache.items):,} rows of {cache.payload} "
        f"{', '.join(map(str, shapes))}{more} {cache.dtype}, stored as {job.dtype}",
        flush=True,
    )
    for remark in cache.remarks:
        print(remark, flush=True)
    if not job.scaling.known:
        print("scaling unknown: values stay as they are, and decode must be told --latents-are")
    if cache.ignored:
        listed = ", ".join(f"{suffix or 'no suffix'} {count:,}" for suffix, count in sorted(cache.ignored.items()))
        print(f"not looked at, by suffix: {listed}")


def _print_left_out(left_out: dict[str, str]) -> None:
    if left_out:
        print(f"{len(left_out):,} rows could not be used and are not in the dataset:")
        for key, why in list(left_out.items())[:LISTED]:
            print(f"  {key!a}: {why}")


def _identity(path: str | None, payload: str) -> dict[str, Any] | None:
    """Of the autoencoder at `path`, as encode records it."""
    if path is None:
        return None
    cpu = torch.device("cpu")
    if is_video_model(path):
        return load_video_clip_encoder(path, cpu, torch.float32, payload).identity()
    return load_autoencoder(path, cpu, torch.float32).identity()


def _absolute(path: str) -> str:
    return path if "://" in path else os.path.abspath(path)


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
