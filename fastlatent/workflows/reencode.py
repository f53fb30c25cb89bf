"""Encode a random sample of a dataset again and compare it with what is stored."""

from __future__ import annotations

import functools
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastlatent.config import EncodeConfig, VerifyConfig
from fastlatent.encoders.autoencoder_kl import load_autoencoder
from fastlatent.pipeline.interrupt import StopRequest
from fastlatent.pipeline.progress import Progress
from fastlatent.store.files import member
from fastlatent.store.provenance import differences
from fastlatent.store.reader import Dataset
from fastlatent.store.records import PlannedItem, Unit, digest_strings
from fastlatent.store.rows import Rows
from fastlatent.store.statistics import to_float64
from fastlatent.store.verify import Finding, hash_file
from fastlatent.workflows.encode import READERS, decode_picture, encode_unit, provenance
from fastlatent.workflows.runtime import DTYPES, available_cores, set_up


def reencode(config: VerifyConfig) -> tuple[list[Finding], str]:
    """The samples that come out otherwise, and what was compared, in words.

    On the engine that wrote the dataset (settings, torch and processor as recorded) every bit must be the same;
    elsewhere the relative error of a row, |new - stored| / |stored|, may be config.tolerance.

    Raises:
        ValueError: not a dataset of `fastlatent encode`; another autoencoder or other rules; no source file unchanged.
    """
    dataset = Dataset.open(config.dataset)
    recorded = dataset.provenance["informational"]
    vae_path, source = config.vae or recorded.get("vae_path"), config.source or recorded.get("source")
    for flag, path in (("--vae", vae_path), ("--source", source)):
        if path is None or not Path(path).exists():
            raise ValueError(f"{flag}: expected what the dataset was made of, got {path}: name it with {flag} PATH")
    settings = _settings(dataset, str(vae_path), str(source), config.device)
    threads = settings.threads or available_cores()
    device = set_up(settings.device, threads)
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    vae = load_autoencoder(settings.vae, device, DTYPES[settings.compute_dtype])
    now = provenance(settings, vae, device, threads)
    other = differences(dataset.provenance["hashed"], now["hashed"])
    if any(not line.startswith("engine.") for line in other):
        raise ValueError("these latents cannot be made again with this:\n  " + "\n  ".join(other))
    exact = not other and all(recorded.get(name) == now["informational"][name] for name in ("torch", "device"))
    chosen = np.random.default_rng(config.seed).permutation(len(dataset))[: config.reencode]
    digests = digest_strings(dataset.src_xxh3[chosen])
    items: dict[int, PlannedItem] = {}
    for i, digest in zip(chosen.tolist(), digests, strict=True):
        path = Path(source) / dataset.key(i)
        with suppress(OSError):
            if hash_file(path) == digest:
                items[i] = PlannedItem(dataset.key(i), str(path), digest, 0, 0)
    if not items:
        raise ValueError(f"--source {source}: expected files as they were encoded, got 0 of {len(chosen)} unchanged")
    findings = []
    with StopRequest() as stop, Progress("encode again", len(items), "images") as progress:
        for number, bucket in enumerate(dataset.buckets):
            samples = sorted(i for i in items if dataset.bucket[i] == number)
            if not samples:
                continue
            unit = Unit.of(dataset.fingerprint, bucket.shape, tuple(items[i] for i in samples))
            with ThreadPoolExecutor(READERS, thread_name_prefix="decode") as pool:
                decode = functools.partial(decode_picture, channels=vae.pixel_channels, size=settings.size)
                pictures = pool.map(decode, unit.items)
                rows, _ = encode_unit(unit, pictures, vae, settings, bucket.shape, progress, stop)
            number_of = {key: k for k, key in enumerate(rows.keys)}
            for i in samples:
                what = _compared(dataset, i, rows, number_of.get(items[i].key), 0.0 if exact else config.tolerance)
                if what:
                    findings.append(Finding(dataset.shards[dataset.shard[i]].path, dataset.key(i), what))
    how = "bit for bit" if exact else f"within {config.tolerance} (not the engine that wrote it)"
    skipped = f", {len(chosen) - len(items)} skipped: their files changed" if len(items) < len(chosen) else ""
    return findings, f", {len(items)} encoded again and compared {how}{skipped}"


def _settings(dataset: Dataset, vae: str, source: str, device: str) -> EncodeConfig:
    """Those of the encode that wrote the dataset."""
    hashed, what = dataset.provenance["hashed"], f"{dataset.path}: not written by `fastlatent encode`"
    engine: dict[str, Any] = member(hashed, "engine", dict, what)
    return EncodeConfig(
        source=source,
        vae=vae,
        out=str(dataset.path),
        size=member(member(hashed, "transform", dict, what), "size", int, what),
        mirror=bool(hashed.get("mirror")),
        payload=hashed.get("payload", "moments"),
        dtype=member(hashed, "storage_dtype", str, what),
        compute_dtype=member(engine, "dtype", str, what),
        batch_size=member(engine, "batch_size", int, what),
        threads=engine.get("threads", 0),
        device=member(engine, "device", str, what) if device == "auto" else device,
    )


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
