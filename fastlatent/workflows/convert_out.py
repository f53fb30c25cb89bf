"""A dataset → the latent cache of another project; a killed export goes on where it was."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fastlatent.caches.formats import FORMATS, format_of
from fastlatent.caches.outgoing import Outgoing, OutRow
from fastlatent.config import ConvertConfig
from fastlatent.pipeline.interrupt import StopRequest
from fastlatent.pipeline.progress import Progress
from fastlatent.store.files import TEMPORARY, canonical_json, write_atomic
from fastlatent.store.reader import Dataset
from fastlatent.store.records import ROOT
from fastlatent.store.statistics import to_float64
from fastlatent.workflows.convert_cache import ConvertReport, list_source, open_format
from fastlatent.workflows.convert_values import FLAGS, UNKNOWN, Scaling, settle_scaling, to_scaled

# In the folder of an export: what it is of. Its name has a dot, so that no reader of the format looks at it.
RECORD = ".fastlatent.json"


def convert_out(config: ConvertConfig) -> ConvertReport:
    """`convert` with --to a format.

    Raises:
        ValueError: the source is no dataset, its rows are not what the format holds, its scaling is not known, the
            folder holds something else, or a row reads otherwise than it was written.
    """
    if not (Path(config.source) / ROOT).is_file():
        raise ValueError(f"--to {config.to}: expected a dataset folder with {ROOT}, got {config.source}")
    dataset, format, out = Dataset.open(config.source), format_of(config.to), Path(config.out)
    if out.resolve().is_relative_to(dataset.path.resolve()):
        raise ValueError(f"--out {out}: expected a folder outside of the dataset {dataset.path}")
    outgoing = _outgoing(dataset, config, format)
    _claim_folder(out, dataset, config, outgoing)
    print(
        f"{dataset.path}: {outgoing.count:,} rows of {dataset.payload} to {config.to} ({format.TITLE}) as "
        f"{outgoing.payload} {outgoing.dtype}",
        flush=True,
    )
    if outgoing.payload != dataset.payload:
        print("the means of the posteriors are written: the format holds one latent for each image")
    held = getattr(format, "EXTRAS", ())
    same = dataset.provenance["hashed"].get("converted", {}).get("format") == config.to
    lost = [] if same or held is None else [one.name for one in dataset.extras if one.name not in held]
    if lost:
        print(f"not written, since {config.to} has no place for them: {', '.join(lost)}")
    with StopRequest() as stop, Progress("write", outgoing.count, "rows") as progress:
        for rows in format.write(outgoing, out):
            progress.advance(rows)
            stop.check()
    os.sync()  # the files were renamed into place, not synced one by one: 100,000 of them would take minutes
    for left in out.rglob(f"{TEMPORARY}*"):  # of an export that was killed
        left.unlink(missing_ok=True)
    checked = _check(outgoing, out, config, format)
    _write_record(out, dataset, config, outgoing, complete=True)
    print(f"{out}: {outgoing.count:,} rows; {checked:,} read again and compared")
    return ConvertReport(out, config.to, outgoing.count, outgoing.count, {})


def _outgoing(dataset: Dataset, config: ConvertConfig, format: Any) -> Outgoing:
    payload = dataset.payload if dataset.payload in format.PAYLOADS else ""
    if dataset.payload == "moments" and not payload and "latents" in format.PAYLOADS:
        payload = "latents"
    if not payload:
        held = " or ".join(format.PAYLOADS)
        raise ValueError(f"--to {config.to}: expected a dataset of {held}, got {dataset.payload} ({dataset.path})")
    converted: Mapping[str, Any] = dataset.provenance["hashed"].get("converted", {})
    same = converted.get("format") == config.to
    stored = dataset.buckets[0].dtype
    written = getattr(format, "DTYPE", "F32" if stored == "I8" else stored)
    dtype = FLAGS.get(config.dtype) or (converted["dtype"] if same else written)
    if hasattr(format, "DTYPE") and dtype not in (written, converted.get("dtype") if same else None):
        raise ValueError(f"--dtype {config.dtype}: expected auto or float32, which {config.to} holds")
    channels = dataset.buckets[0].channels
    if same and config.scaling_factor == "auto":
        scaling = Scaling.recorded(converted["scaling"])
    elif "values" in converted.get("scaling", {}) and config.scaling_factor != "unknown":
        raise ValueError(
            f"{dataset.path}: its values were converted with --scaling-factor unknown, so nothing can be scaled; "
            "convert the cache again with the factor, or say --scaling-factor unknown here too"
        )
    else:
        known = getattr(format, "WRITES", format.SCALING)
        scaling = settle_scaling(config, known, payload, channels, f"--to {config.to}")
    means = payload != dataset.payload
    shapes = {bucket.shape for bucket in dataset.buckets if bucket.rows}
    told = dataset.provenance["informational"].get("cache", {})
    mean, std = (getattr(dataset.statistics, f"latent_{name}") for name in ("mean", "std"))
    scale = UNKNOWN if dataset.payload == "tokens" else scaling
    return Outgoing(
        count=len(dataset),
        row=partial(_row, dataset, channels if means else None, scaling, dtype),
        payload=payload,
        dtype=dtype,
        classes=dataset.classes,
        shapes=tuple(sorted({(s[0], channels, *s[2:]) if means else s for s in shapes})),
        mean=(mean - scale.mean) / scale.std,
        std=std / np.abs(scale.std),
        scaling=scaling.factors,
        facts=converted.get("facts", {}) if same else {},
        notes=told if same else {},
        rows_per_shard=config.unit_rows,
    )


def _row(dataset: Dataset, channels: int | None, scaling: Scaling, dtype: str, i: int) -> OutRow:
    """Row i; of moments the means, where `channels` are given."""
    bucket, row = dataset.buckets[dataset.bucket[i]], int(dataset.row[i])
    shard = dataset.open_shard(int(dataset.shard[i]))
    values, scale = shard.row(dataset.payload, row), None
    if bucket.dtype == "I8":
        scale = shard.row(f"{dataset.payload}.scale", row, dataset.payload)
    if bucket.ragged:
        values, scale = values[None], None if scale is None else scale[None]
    if channels is not None:
        values = values[:, :channels]
        scale = scale[:, :channels] if scale is not None and scale.ndim > 1 else scale
    groups = dataset.groups
    return OutRow(
        key=dataset.key(i),
        label=int(dataset.label[i]),
        group=groups.key(int(groups.group[i])) if groups else "",
        order=int(groups.order[i]) if groups else 0,
        values=to_scaled(values, bucket.dtype, scale, scaling, dtype),
        orig_hw=tuple(dataset.orig_hw[i].tolist()),
        crop=tuple(dataset.crop[i].tolist()),
        extras={one.name: shard.row(one.name, row) for one in dataset.extras},
    )


def _claim_folder(out: Path, dataset: Dataset, config: ConvertConfig, outgoing: Outgoing) -> None:
    """Make the folder, or take up one that an export of the same rows into the same format has begun.

    Raises:
        ValueError: it holds something else; nothing in it is touched.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out}: expected a folder, got a file")
    record = out / RECORD
    # Another process may be about to begin the same export.
    held = [one for one in out.iterdir() if not one.name.startswith(TEMPORARY)] if out.exists() else []
    if record in held:
        try:
            before = json.loads(record.read_text(encoding="utf-8"))
        except ValueError:
            before = None
        if isinstance(before, dict) and {**before, "complete": False} == _record(dataset, config, outgoing):
            return
        if len(held) > 1:  # else the format has refused the rows before its first file
            raise ValueError(
                f"--out {out}: expected the export of these rows, or an empty folder; {record} is of "
                "others: use another folder"
            )
    elif held:
        raise ValueError(f"--out {out}: expected an empty folder, it holds {held[0].name}")
    _write_record(out, dataset, config, outgoing, complete=False)


def _record(dataset: Dataset, config: ConvertConfig, outgoing: Outgoing) -> dict[str, Any]:
    return {
        "format": config.to,
        "fingerprint": dataset.fingerprint,
        "root": dataset.root["xxh3_128"],
        "payload": outgoing.payload,
        "dtype": outgoing.dtype,
        "scaling_factor": config.scaling_factor,
        "shift_factor": config.shift_factor,
        "vae": config.vae,
        "unit_rows": config.unit_rows,
        "complete": False,
    }


def _write_record(out: Path, dataset: Dataset, config: ConvertConfig, outgoing: Outgoing, *, complete: bool) -> None:
    record = {**_record(dataset, config, outgoing), "complete": complete}
    try:
        write_atomic(out / RECORD, canonical_json(record) + b"\n")
    except FileNotFoundError:  # another process that makes the same export has cleaned up, and writes the same
        if not (out / RECORD).exists():
            raise


def _check(outgoing: Outgoing, out: Path, config: ConvertConfig, format: Any) -> int:
    """Open what was written as `convert` would, and compare some rows; how many.

    Raises:
        ValueError: a row is missing or differs.
    """
    if config.to not in FORMATS:
        return format.check(outgoing, out, config.check)
    cache = open_format(config.to, *list_source(str(out)), outgoing.shapes[0][1:])
    try:
        if len(cache.items) != outgoing.count:
            raise ValueError(f"{out}: expected {outgoing.count} rows, {len(cache.items)} can be read again")
        chosen = np.random.default_rng(0).permutation(outgoing.count)[: config.check].tolist()
        by_key = {item.key: item for item in cache.items}
        renamed, numbered = getattr(format, "renamed", str), getattr(format, "NUMBERED", False)
        for i in sorted(chosen):
            wanted = outgoing.row(i)
            # A format that numbers its rows keeps their order.
            item = cache.items[i] if numbered else by_key.get(wanted.key) or by_key.get(renamed(wanted.key))
            item = item or cache.items[i]
            found = to_float64(cache.row(item, cache.content(item)).values, cache.dtype)
            values = to_float64(wanted.values, outgoing.dtype)
            rounding = getattr(format, "ROUNDING", 0.0)
            if found.shape != values.shape or not np.allclose(found, values, rtol=rounding, atol=rounding):
                raise ValueError(f"{item.place}: row {wanted.key!r} reads otherwise than it was written")
    finally:
        cache.close()
    return len(chosen)
