"""The pictures or clips of one unit → its rows: encoded in batches of one size, in the dtype they are stored in."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from fastlatent.encoders.text import BATCH_SIZE, TextEncoder
from fastlatent.encoders.watch import OverflowWatch
from fastlatent.pipeline.meter import Meter
from fastlatent.store.records import Quarantined, Unit
from fastlatent.store.rows import Rows, Values, quantize
from fastlatent.workflows.encode_setup import STORED, EncodeSetup, Picture
from fastlatent.workflows.runtime import DTYPES


@dataclass
class _Running:
    """A batch that the device is at work on: where its rows go, and what comes back, valid once `done`.

    views: the pixels, and those of the mirror images; moments: of each; stored, finite: on the host, the rows as they
    are stored (float32 for int8) and whether each is finite.
    """

    begin: int
    count: int
    views: list[Tensor]
    moments: list[Tensor]
    stored: Tensor
    finite: Tensor
    begun: torch.cuda.Event | None
    done: torch.cuda.Event | None


class RowMaker:
    """`for picture in …: maker.add(picture)`, then `maker.finish()`: the rows of one unit.

    A batch's size changes its last bits, so all have one size, and the last one is padded. On CUDA the next
    batch is launched before the last one's rows are fetched.

    Args:
        check: called before each batch; raises to stop.
        on_done: called with a number of files that are done, and of those that are left out.
    """

    def __init__(
        self,
        setup: EncodeSetup,
        watch: OverflowWatch,
        unit: Unit,
        meter: Meter,
        check: Callable[[], None],
        on_done: Callable[[int, int], None],
    ) -> None:
        self._setup, self._watch, self._unit, self._meter = setup, watch, unit, meter
        self._check, self._on_done = check, on_done
        config, bucket = setup.config, unit.bucket
        self._good: list[Picture] = []
        self._bad: list[Quarantined] = []
        self._waiting: list[Picture] = []
        self._running: deque[_Running] = deque()
        self._payload = np.empty((len(unit.items), *bucket), STORED[config.dtype])
        # A scale per channel: means and log-variances differ by more than 127 steps can tell apart.
        self._scale = np.empty((len(unit.items), *bucket[:2]), np.float32) if config.dtype == "int8" else None

    def add(self, picture: Picture) -> None:
        """The unit's next file; a batch is encoded whenever one is full."""
        if picture.error is not None:
            item, error = picture.item, picture.error
            self._bad.append(Quarantined(item.key, item.digest, str(error), type(error).__name__))
            self._on_done(1, 1)
            return
        self._waiting.append(picture)
        if len(self._waiting) == self._setup.config.batch_size:
            self._launch()

    def finish(self) -> tuple[Rows, list[Quarantined]]:
        """The unit's rows, and the files that gave none."""
        if self._waiting:
            self._launch()
        while self._running:
            self._fetch()
        good, count = self._good, len(self._good)
        rows = Rows(
            [picture.item.key for picture in good],
            self._payload[:count],
            np.array([picture.orig_hw for picture in good], np.int32).reshape(-1, 2),
            np.array([picture.crop for picture in good], np.int32).reshape(-1, 4),
            None if self._scale is None else self._scale[:count],
            self._extras(good),
        )
        return rows, self._bad

    def _launch(self) -> None:
        self._check()
        setup, count = self._setup, len(self._waiting)
        pixels = setup.batch([picture.pixels for picture in self._waiting])
        begin = len(self._good)
        self._good += [replace(one, pixels=None) for one in self._waiting]
        self._waiting = []
        views = [pixels] if self._unit.bucket[0] == 1 else [pixels, setup.mirrored(pixels)]
        cuda = setup.device.type == "cuda"
        begun, done = (torch.cuda.Event(enable_timing=True) for _ in range(2)) if cuda else (None, None)
        with nullcontext() if cuda else self._meter.busy("encode"):
            if begun is not None:
                begun.record()
            moments = [setup.encode(view) for view in views]
        rows = self._rows(moments, count)
        finite, stored = _to_host(rows.isfinite().flatten(1).all(1)), _to_host(self._cast(rows))
        if done is not None:
            done.record()
        self._running.append(_Running(begin, count, views, moments, stored, finite, begun, done))
        while len(self._running) > (1 if cuda else 0):
            self._fetch()

    def _fetch(self) -> None:
        """Take over the oldest running batch's rows; only of a batch that overflowed is anything computed here."""
        run = self._running.popleft()
        if run.begun is not None and run.done is not None:
            run.done.synchronize()
            self._meter.add("encode", run.begun.elapsed_time(run.done) / 1e3)
        stored = run.stored
        if not run.finite.all():
            moments = [
                self._watch.repair(view, part, run.count) for view, part in zip(run.views, run.moments, strict=True)
            ]
            stored = self._cast(self._rows(moments, run.count)).cpu()
        where = slice(run.begin, run.begin + run.count)
        if self._scale is not None:
            self._payload[where], self._scale[where] = quantize(stored.numpy(), 3)
        else:
            self._payload[where] = (stored.view(torch.uint16) if stored.dtype == torch.bfloat16 else stored).numpy()
        self._on_done(run.count, 0)

    def _rows(self, moments: list[Tensor], count: int) -> Tensor:
        """[count, F, 2C or C, h, w]: without the padding of the batch, and without logvar where that is not stored."""
        return torch.stack(moments, dim=1)[:count, :, : self._unit.bucket[1]]

    def _cast(self, rows: Tensor) -> Tensor:
        return rows if self._scale is not None else rows.to(DTYPES[self._setup.config.dtype])

    def _extras(self, pictures: list[Picture]) -> dict[str, Values]:
        """The further tensors of these rows: what the source attached, embeddings of captions, what decoding gave."""
        setup, keys = self._setup, [picture.item.key for picture in pictures]
        items = [setup.item(key) for key in keys] if setup.source.columns else []
        attached = [item.attached for item in items if item is not None]
        columns: dict[str, Values] = {}
        for column in setup.source.columns:
            values = [one[column.name] for one in attached]
            if column.dtype == "U8":
                columns[column.name] = [np.frombuffer(text.encode(), np.uint8) for text in values]
            else:
                kind = {"F32": np.float32, "F64": np.float64, "I64": np.int64}[column.dtype]
                columns[column.name] = np.array(values, kind).reshape(len(keys), *column.shape)
        if setup.text is not None and keys:
            with self._meter.busy("encode"):
                columns |= _embeddings(setup.text, [one["caption"] for one in attached], self._check)
        for one in setup.decoded_fields:
            rows = [picture.extras[one.name] for picture in pictures]
            columns[one.name] = rows if one.ragged else np.stack(rows) if rows else np.empty((0, *one.shape))
        return columns


def _embeddings(text: TextEncoder, captions: list[str], check: Callable[[], None]) -> dict[str, Values]:
    """The encoder's columns. Cast batch by batch: in float32 a caption of T5-XXL takes 4 MiB."""
    tokens, pooled = [], []
    for begin in range(0, len(captions), BATCH_SIZE):
        check()
        for one in text.encode(captions[begin : begin + BATCH_SIZE]):
            tokens.append(one.tokens.numpy().astype(np.float16))
            if one.pooled is not None:
                pooled.append(one.pooled.numpy().astype(np.float16))
    columns: dict[str, Values] = {"text": tokens if text.columns[0].ragged else np.stack(tokens)}
    return {**columns, "text_pooled": np.stack(pooled)} if pooled else columns


def _to_host(values: Tensor) -> Tensor:
    """On CUDA into pinned memory and valid only once the stream has got there; else itself."""
    if not values.is_cuda:
        return values
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    return host.copy_(values, non_blocking=True)
