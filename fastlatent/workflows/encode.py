"""images → latent dataset; any number of processes and hosts on one file system may fill one together."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from PIL import __version__ as pillow_version

from fastlatent import __version__
from fastlatent.config import EncodeConfig
from fastlatent.encoders.autoencoder_kl import load_autoencoder
from fastlatent.encoders.protocol import Autoencoder
from fastlatent.media.images import (
    DECODE_RULE,
    TRANSFORM_RULE,
    ImageError,
    center_crop,
    read_image,
    to_model_range,
)
from fastlatent.pipeline.interrupt import StopRequest
from fastlatent.pipeline.progress import Progress
from fastlatent.sources.image_folder import Item, scan_image_folder
from fastlatent.store.reader import PROVENANCE, Dataset, read_provenance
from fastlatent.store.records import PlannedItem, Quarantined, Schema, Unit
from fastlatent.store.rows import Rows, quantize
from fastlatent.store.scan import Entry
from fastlatent.store.writer import DatasetWriter
from fastlatent.workflows.runtime import DTYPES, available_cores, keep_config, refuse_output_in_source, set_up

READERS = 4
STORED = {
    name: np.dtype(kind)
    for name, kind in (("float16", np.float16), ("bfloat16", np.uint16), ("float32", np.float32), ("int8", np.int8))
}
MAX_UNIT_BYTES = 256 * 2**20  # a unit's rows are assembled in memory


@dataclass(frozen=True)
class EncodeReport:
    """What an encode run left: rows and shards of the dataset, rows encoded now, and what was left out."""

    path: Path
    rows: int
    encoded: int
    shards: int
    bytes: int
    quarantined: dict[str, str]
    unreadable: dict[str, str]


@dataclass(frozen=True)
class _Picture:
    """One decoded file, or why it is left out."""

    item: PlannedItem
    pixels: np.ndarray | None
    orig_hw: tuple[int, int] = (0, 0)
    crop: np.ndarray | None = None
    error: ImageError | None = None


def encode(config: EncodeConfig) -> EncodeReport:
    """Encode a folder of images; see EncodeConfig.

    Raises:
        ValueError: the source, the autoencoder or the dataset folder cannot be used as asked.
    """
    refuse_output_in_source(config.out, config.source)
    folder = scan_image_folder(config.source)
    out = Path(config.out)
    threads = config.threads or _recorded_threads(out) or available_cores()
    device = set_up(config.device, threads)
    vae = load_autoencoder(config.vae, device, DTYPES[config.compute_dtype])
    if config.size % vae.downsample:
        raise ValueError(f"--size {config.size}: this autoencoder needs a multiple of {vae.downsample}")
    # The promise of identical bytes holds for fixed kernels only.
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    side = config.size // vae.downsample
    stored_channels = vae.latent_channels * (2 if config.payload == "moments" else 1)
    bucket = (2 if config.mirror else 1, stored_channels, side, side)
    row_bytes = int(np.prod(bucket)) * STORED[config.dtype].itemsize
    entries, unreadable = _entries(folder.items)
    with DatasetWriter.open(
        out,
        provenance(config, vae, device, threads),
        folder.classes,
        unit_rows=max(1, min(config.unit_rows, MAX_UNIT_BYTES // row_bytes)),
        schema=Schema((bucket,), config.payload),
    ) as writer:
        keep_config(out / "encode.yaml", config)
        with Progress("scan", 0, "files") as scanned:

            def on_scan(done: int, total: int) -> None:
                scanned.total = total
                scanned.advance(done - scanned.done)

            units = writer.plan(entries, on_scan)
        todo, encoded = sum(len(unit.items) for unit in units), 0
        with (
            StopRequest() as stop,
            Progress("encode", todo, "images") as progress,
            ThreadPoolExecutor(READERS, thread_name_prefix="decode") as pool,
        ):

            def on_others(files: int) -> None:
                stop.check()
                progress.advance(files)

            def decode(item: PlannedItem) -> Future[_Picture]:
                return pool.submit(decode_picture, item, vae.pixel_channels, config.size)

            for unit, pictures in _decoded(writer, decode, on_others):
                rows, bad = encode_unit(unit, pictures, vae, config, bucket, progress, stop)
                writer.commit(unit, rows, bad)
                encoded += len(rows.keys)
            progress.advance(progress.total - progress.done)  # by others, after this process last looked
        info = writer.finish()
    quarantined = {one.key: one.reason for one in Dataset.open(out).quarantined}
    report = EncodeReport(out, info.rows, encoded, info.shards, info.bytes, quarantined, unreadable)
    _print(report)
    return report


def provenance(config: EncodeConfig, vae: Autoencoder, device: torch.device, threads: int) -> dict[str, Any]:
    """What changes the bytes of a dataset (hashed), and what helps to understand it (informational)."""
    engine = {
        "name": "eager",
        "device": device.type,
        "dtype": config.compute_dtype,
        "batch_size": config.batch_size,
    }
    return {
        "hashed": {
            "vae": vae.identity(),
            "decode": DECODE_RULE,
            "transform": {"rule": TRANSFORM_RULE, "size": config.size},
            "pixel_range": [-1, 1],
            "mirror": config.mirror,
            "storage_dtype": config.dtype,
            # A convolution's last bits depend on batch size, threads and device.
            "engine": engine if device.type == "cuda" else {**engine, "threads": threads},
            # Datasets of moments are older than the choice, and keep their fingerprint.
            **({} if config.payload == "moments" else {"payload": config.payload}),
        },
        "informational": {
            "vae_path": str(Path(config.vae).resolve()),
            "source": str(Path(config.source).resolve()),
            "fastlatent": __version__,
            "torch": torch.__version__,
            "pillow": pillow_version,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        },
    }


def _entries(items: list[Item]) -> tuple[list[Entry], dict[str, str]]:
    """Files with size and time; those that cannot be read are left out and listed, not fatal."""
    entries, unreadable = [], {}
    for item in items:
        try:
            stat = os.stat(item.path)
            if not os.access(item.path, os.R_OK):
                raise PermissionError(0, "no permission to read it")
        except OSError as error:
            unreadable[item.key] = error.strerror or type(error).__name__
        else:
            entries.append(Entry(item.key, item.path, item.label, stat.st_size, stat.st_mtime_ns))
    return entries, unreadable


def _decoded(
    writer: DatasetWriter, decode: Callable[[PlannedItem], Future[_Picture]], on_others: Callable[[int], None]
) -> Iterator[tuple[Unit, Iterator[_Picture]]]:
    """Every unit that is to be done here, and its files in order, decoded a few batches ahead.

    At most one unit is claimed ahead: what this process holds, no other one does.
    """
    ahead: deque[Future[_Picture]] = deque()
    items: Iterator[PlannedItem] = iter(())
    following: Unit | None = None

    def pictures(unit: Unit) -> Iterator[_Picture]:
        nonlocal items, following
        asked = False
        for _ in unit.items:
            while len(ahead) <= 16 * READERS:
                item = next(items, None)
                if item is not None:
                    ahead.append(decode(item))
                elif asked:
                    break
                else:
                    asked, following = True, writer.claim_now(on_others)
                    items = iter(following.items if following else ())
            yield ahead.popleft().result()

    while unit := following or next(writer.claim(on_others), None):
        if unit is not following:
            items = iter(unit.items)
        following = None
        yield unit, pictures(unit)


def decode_picture(item: PlannedItem, channels: int, size: int) -> _Picture:
    try:
        data = Path(item.path).read_bytes()
    except OSError as error:
        raise ValueError(f"{item.path} could not be read: {error.strerror}; rerun the same command") from None
    if xxhash.xxh3_128_hexdigest(data) != item.digest:
        raise ValueError(f"{item.path} changed while the dataset was being encoded; rerun the same command")
    try:
        image = read_image(data, channels=channels)
        pixels, crop = center_crop(image, size)
    except ImageError as error:
        return _Picture(item, None, error=error)
    return _Picture(item, to_model_range(pixels), image.shape[:2], crop)


def encode_unit(
    unit: Unit,
    pictures: Iterator[_Picture],
    vae: Autoencoder,
    config: EncodeConfig,
    bucket: tuple[int, ...],
    progress: Progress,
    stop: StopRequest,
) -> tuple[Rows, list[Quarantined]]:
    """The rows of one unit, in batches of one size: a batch's size changes its last bits, so the tail is padded."""
    good: list[_Picture] = []
    bad: list[Quarantined] = []
    payload = np.empty((len(unit.items), *bucket), STORED[config.dtype])
    # A scale per channel: means and log-variances differ by more than 127 steps can tell apart.
    scale = np.empty((len(unit.items), *bucket[:2]), np.float32) if config.dtype == "int8" else None
    batch = np.zeros((config.batch_size, vae.pixel_channels, config.size, config.size), dtype=np.float32)
    filled = 0

    def run() -> None:
        nonlocal filled
        stop.check()
        batch[filled:] = 0
        begin = len(good) - filled
        moments = _moments(vae, batch, bucket[0])[:filled, :, : bucket[1]]
        if scale is None:
            payload[begin : len(good)] = _stored(moments, config.dtype)
        else:
            payload[begin : len(good)], scale[begin : len(good)] = quantize(moments.numpy(), 3)
        progress.advance(filled, f"{len(bad)} bad in this shard" if bad else "")
        filled = 0

    for picture in pictures:
        if picture.pixels is None:
            bad.append(
                Quarantined(picture.item.key, picture.item.digest, str(picture.error), type(picture.error).__name__)
            )
            progress.advance(1)
            continue
        batch[filled] = picture.pixels
        good.append(picture)
        filled += 1
        if filled == config.batch_size:
            run()
    if filled:
        run()
    rows = Rows(
        [picture.item.key for picture in good],
        payload[: len(good)],
        np.array([picture.orig_hw for picture in good], dtype=np.int32).reshape(-1, 2),
        np.array([picture.crop for picture in good], dtype=np.int32).reshape(-1, 4),
        None if scale is None else scale[: len(good)],
    )
    return rows, bad


def _moments(vae: Autoencoder, batch: np.ndarray, flips: int) -> torch.Tensor:
    """float32 [B, F, 2C, h, w] on the CPU."""
    pixels = torch.from_numpy(batch)
    views = [pixels, pixels.flip(-1)][:flips]
    return torch.stack([vae.encode(view).cpu() for view in views], dim=1)


def _stored(moments: torch.Tensor, dtype: str) -> np.ndarray:
    if dtype == "bfloat16":
        return moments.to(torch.bfloat16).view(torch.uint16).numpy()
    return moments.to(DTYPES[dtype]).numpy()


def _recorded_threads(out: Path) -> int:
    """The thread count that an unfinished or finished dataset was begun with, 0 if there is none."""
    if not (out / PROVENANCE).exists():
        return 0
    return read_provenance(out)["hashed"].get("engine", {}).get("threads", 0)


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "cpu"
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "cpu")


def _print(report: EncodeReport) -> None:
    print(
        f"{report.path}: {report.rows:,} rows in {report.shards} shards, {report.bytes / 2**20:,.1f} MiB; "
        f"{report.encoded:,} files encoded now"
    )
    for what, listed in (
        ("could not be decoded", report.quarantined),
        ("could not be read", report.unreadable),
    ):
        if listed:
            print(f"{len(listed)} files {what} and are not in the dataset:")
            for key, reason in list(listed.items())[:20]:
                print(f"  {key!a}: {reason}")
            if len(listed) > 20:
                print(f"  … and {len(listed) - 20} more")
