"""Encode a random sample of a dataset again and compare it with what is stored."""

from __future__ import annotations

import dataclasses
import functools
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from fastlatent.config import EncodeConfig, VerifyConfig, build
from fastlatent.media.transforms import transform_name
from fastlatent.pipeline.ahead import ahead
from fastlatent.pipeline.interrupt import StopRequest
from fastlatent.pipeline.meter import Meter
from fastlatent.pipeline.progress import Progress
from fastlatent.sources.items import content_digest
from fastlatent.store.files import member
from fastlatent.store.provenance import differences
from fastlatent.store.reader import Dataset
from fastlatent.store.records import PlannedItem, Unit, digest_strings
from fastlatent.store.rows import Rows
from fastlatent.store.statistics import to_float64
from fastlatent.store.verify import Finding
from fastlatent.workflows.encode_open import set_up_encode
from fastlatent.workflows.encode_rows import RowMaker
from fastlatent.workflows.encode_setup import kept_settings

# How the source was read; what decides bytes beyond that is in the provenance.
SOURCE_SETTINGS = ("kind", "split", "trajectories", "manifest_root", "captions", "decoder")


def reencode(config: VerifyConfig) -> tuple[list[Finding], str]:
    """The samples that come out otherwise, and what was compared, in words.

    On the engine that wrote the dataset (settings, torch and processor as recorded) every bit must be the same;
    elsewhere the relative error of a row, |new - stored| / |stored|, may be config.tolerance.

    Raises:
        ValueError: not a dataset of `fastlatent encode`; another autoencoder or other rules; no source file unchanged.
    """
    dataset = Dataset.open(config.dataset)
    recorded = dataset.provenance["informational"]
    if "converted" in dataset.provenance["hashed"]:
        raise ValueError(f"{dataset.path}: its rows were converted from a cache, not encoded; leave --reencode")
    source = _there("--source", config.source or recorded.get("source"))
    if "view" in dataset.provenance["hashed"]:
        settings = _settings_of_clips(dataset, config.vae, source, config.device)
    else:
        vae = _there("--vae", config.vae or recorded.get("vae_path"))
        settings = _settings(dataset, vae, source, config.device)
    setup = set_up_encode(settings)
    now = setup.provenance()
    other = [
        line
        for line in differences(dataset.provenance["hashed"], now["hashed"])
        if not line.startswith("text")  # embeddings of captions are not made again
    ]
    if any(not line.startswith("engine.") for line in other):
        raise ValueError("these latents cannot be made again with this:\n  " + "\n  ".join(other))
    chosen = np.random.default_rng(config.seed).permutation(len(dataset))[: config.reencode]
    digests = digest_strings(dataset.src_xxh3[chosen])
    items: dict[int, PlannedItem] = {}
    for i, digest in zip(chosen.tolist(), digests, strict=True):
        item = setup.item(dataset.key(i))
        with suppress(ValueError):  # it cannot be read any more
            if item is not None and content_digest(item, setup.source.fetch(item)) == digest:
                items[i] = PlannedItem(dataset.key(i), item.place, digest, item.size, item.stamp)
    if not items:
        raise ValueError(f"--source {source}: expected files as they were encoded, got 0 of {len(chosen)} unchanged")
    here = _computing(now["informational"]["environment"])
    written = {i: dataset.shards[dataset.shard[i]].environment or recorded.get("environment") for i in items}
    written = {i: _computing(environment) for i, environment in written.items()}
    exact = {i for i in items if not other and written[i] == here}
    findings = []
    watch, meter = setup.watch(), Meter({"encode": 1})
    with StopRequest() as stop, Progress("encode again", len(items), setup.noun) as progress:
        for number, bucket in enumerate(dataset.buckets):
            samples = sorted(i for i in items if dataset.bucket[i] == number)
            if not samples:
                continue
            unit = Unit.of(dataset.fingerprint, bucket.shape, tuple(items[i] for i in samples))
            maker = RowMaker(setup, watch, unit, meter, stop.check, lambda files, bad: progress.advance(files))
            items_left = ([one] for one in unit.items)
            # Not all at once: a clip may have 100 MB.
            for _, pictures in ahead(
                functools.partial(next, items_left, None), functools.partial(setup.read, unit), pool=setup.readers,
                depth=2 * settings.readers,
            ):  # fmt: skip
                maker.add(pictures[0])
            rows, _ = maker.finish()
            number_of = {key: k for k, key in enumerate(rows.keys)}
            for i in samples:
                what = _compared(dataset, i, rows, number_of.get(items[i].key), 0.0 if i in exact else config.tolerance)
                if what:
                    findings.append(Finding(dataset.shards[dataset.shard[i]].path, dataset.key(i), what))
    ways = {"bit for bit": exact, f"within {config.tolerance} (not the engine that wrote it)": items.keys() - exact}
    how = " or ".join(way for way, samples in ways.items() if samples)
    skipped = f", {len(chosen) - len(items)} skipped: their files changed" if len(items) < len(chosen) else ""
    return findings, f", {len(items)} encoded again and compared {how}{skipped}"


def _computing(environment: dict[str, str] | None) -> dict[str, str] | None:
    """Without what made the captions' embeddings only."""
    return environment and {name: value for name, value in environment.items() if name != "transformers"}


def _there(flag: str, path: str | None) -> str:
    if path is None or not ("://" in path or Path(path).exists()):
        raise ValueError(f"{flag}: expected what the dataset was made of, got {path}: name it with {flag} PATH")
    return path


def _settings_of_clips(dataset: Dataset, vae: str | None, source: str, device: str) -> EncodeConfig:
    """Those of the encode that wrote a dataset of clips, as it kept them; what decides bytes is compared afterwards.

    Raises:
        ValueError: it kept none: the dataset was made of others.
    """
    how = kept_settings(dataset.path, [one.name for one in dataclasses.fields(EncodeConfig)])
    if not how:
        raise ValueError(f"{dataset.path}: expected encode.yaml, which says how clips were made; it was made of others")
    engine: dict[str, Any] = dataset.provenance["hashed"]["engine"]
    now: dict[str, Any] = {
        "source": source,
        "out": str(dataset.path),
        "cache_dir": None,
        "engine": engine["name"],
        "batch_size": engine["batch_size"],
        "threads": engine.get("threads", 0),
        "device": engine["device"] if device == "auto" else device,
        **({"teacher_weights" if how.get("teacher") else "vae": vae} if vae else {}),
    }
    return build(EncodeConfig, how, now)


def _settings(dataset: Dataset, vae: str, source: str, device: str) -> EncodeConfig:
    """Those of the encode that wrote the dataset: what its provenance has, and for how to read the source encode.yaml.

    A dataset that was made of others (merge, split, filter) has no encode.yaml: then the source must tell by itself.
    """
    how = kept_settings(dataset.path, SOURCE_SETTINGS)
    hashed, what = dataset.provenance["hashed"], f"{dataset.path}: not written by `fastlatent encode`"
    engine: dict[str, Any] = member(hashed, "engine", dict, what)
    transform: dict[str, Any] = member(hashed, "transform", dict, what)
    limits = hashed.get("input_range")
    made = {
        "source": source,
        "vae": vae,
        "out": str(dataset.path),
        "transform": transform_name(transform),
        "size": member(transform, "size", int, what),
        "seed": transform.get("seed", 0),
        "mirror": bool(hashed.get("mirror")),
        "condition_spec": hashed.get("conditions", "none"),
        "payload": hashed.get("payload", "moments"),
        "input_range": ",".join(map(str, limits)) if limits else None,
        "dtype": member(hashed, "storage_dtype", str, what),
        "compute_dtype": member(engine, "dtype", str, what),
        "engine": member(engine, "name", str, what),
        "batch_size": member(engine, "batch_size", int, what),
        "threads": engine.get("threads", 0),
        "device": member(engine, "device", str, what) if device == "auto" else device,
    }
    return build(EncodeConfig, how, made)


def _compared(dataset: Dataset, i: int, rows: Rows, k: int | None, tolerance: float) -> str | None:
    """What is wrong with sample i, which row k of `rows` is anew; or None."""
    if k is None:
        return "its file cannot be decoded any more"
    columns, dtype = dataset.open_shard(int(dataset.shard[i])).columns, dataset.buckets[dataset.bucket[i]].dtype
    scales = columns.get(f"{dataset.payload}.scale")
    new = to_float64(rows.payload[k], dtype, None if rows.scale is None else rows.scale[k])
    row = int(dataset.row[i])
    old = to_float64(columns[dataset.payload][row], dtype, None if scales is None else scales[row])
    if np.array_equal(new, old):
        return None
    error = float(np.linalg.norm(new - old) / max(1e-300, float(np.linalg.norm(old))))
    if error <= tolerance:
        return None
    return f"encoded again it gives other values: {(new != old).mean():.1%} of them, relative error {error:.2g}"
