"""What a run logs: log.jsonl and validation.jsonl, curves of both as PNG, and TensorBoard or Weights & Biases."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.tracking import GeneralTracker, TensorBoardTracker, WandBTracker
from PIL import Image
from torch import Tensor

from fastlatent.media.sheets import save_loss_curve
from fastlatent.store.files import write_atomic

LOG = "log.jsonl"
VALIDATION = "validation.jsonl"
LEFT_OUT = "left_out.txt"
# Losses stay on the device until so many steps are logged at once: reading one waits for the GPU.
FLUSH_STEPS = 20
CURVE_POINTS = 500  # means of so many points: a curve of 200,000 steps is otherwise a band
TRACKERS = ("tensorboard", "wandb")


class Log:
    """The log of a run, written by the main process.

    Lines of steps from `begin` on are of a run that was cut off, and go.

    Args:
        folder: of the run.
        begin: the step that comes next.
        mean: over the processes; None where there is one.
        is_main: whether this process writes.
        trackers: names of TRACKERS.
        config: the resolved settings, for the trackers.
        overflows: whether single steps with gradients that are not finite are left out, and no divergence (fp16).
    """

    def __init__(
        self,
        folder: Path,
        begin: int,
        *,
        mean: Callable[[Tensor], Tensor] = lambda values: values,
        is_main: bool = True,
        trackers: tuple[str, ...] = (),
        config: Mapping[str, Any] | None = None,
        overflows: bool = False,
    ) -> None:
        self.folder, self._mean, self._main = folder, mean, is_main
        self._overflows = overflows
        self._pending: list[tuple[int, float, dict[str, Tensor]]] = []
        self._trackers: list[GeneralTracker] = []
        self._left_out = 0
        kept = [line for line in lines(folder / LOG) if line["step"] < begin]
        self.last_loss: float | None = kept[-1]["loss"] if kept else None
        if is_main:
            _rewrite(folder / LOG, kept)
            _rewrite(folder / VALIDATION, [line for line in lines(folder / VALIDATION) if line["step"] <= begin])
            self._trackers = [_tracker(name, folder, begin, config or {}) for name in trackers]

    def add(self, step: int, rate: float, values: dict[str, Tensor]) -> None:
        self._pending.append((step, rate, values))
        if len(self._pending) >= FLUSH_STEPS:
            self.flush()

    def flush(self) -> None:
        """Write what is pending; all processes must.

        Raises:
            ValueError: a loss or gradient is not finite.
        """
        if not self._pending:
            return
        names = list(self._pending[0][2])
        table = torch.stack([torch.stack([v.double() for v in values.values()]) for _, _, values in self._pending])
        rows = self._mean(table).tolist()
        records = [
            {"step": step, "learning_rate": rate, **dict(zip(names, row, strict=True))}
            for (step, rate, _), row in zip(self._pending, rows, strict=True)
        ]
        self._pending.clear()
        self.last_loss = records[-1]["loss"]
        if self._main:
            _append(self.folder / LOG, records)
            for tracker in self._trackers:
                for record in records:
                    tracker.log({k: v for k, v in record.items() if k != "step"}, step=record["step"])
        # A scale that is too large is halved with every overflow: so many in a row are no matter of scale.
        overflows = self._overflows and not (
            len(records) == FLUSH_STEPS and not any(math.isfinite(record["grad_norm"]) for record in records)
        )
        for record in records:
            for name in ("loss",) if overflows else ("loss", "grad_norm"):
                if not math.isfinite(record[name]):
                    raise ValueError(
                        f"{name} became {record[name]} at step {record['step']}: the run diverged. Every checkpoint in "
                        f"{self.folder} is from before that; use a lower --learning-rate in another --out"
                    )

    def checkpoint(self, step: int, measured: dict[str, float], pictures: list[Path]) -> None:
        """What was measured and drawn when the checkpoint of `step` was written; the main process only."""
        if measured:
            _append(self.folder / VALIDATION, [{"step": step, **measured}])
        for tracker in self._trackers:
            if measured:
                tracker.log({f"validation/{name}": value for name, value in measured.items()}, step=step)
            layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            for picture in pictures:
                pixels = np.asarray(Image.open(picture).convert("RGB"))[None]
                tracker.log_images({picture.stem: pixels}, step=step, **layout)

    def left_out(self, reasons: Mapping[str, str]) -> None:
        """Keep the files that cannot be used, and why, in left_out.txt, and say so where they have become more."""
        if len(reasons) <= self._left_out:
            return
        self._left_out = len(reasons)
        text = "".join(f"{key!a}: {reason}\n" for key, reason in sorted(reasons.items()))
        write_atomic(self.folder / LEFT_OUT, text.encode())
        key, reason = next(iter(reasons.items()))
        print(f"{len(reasons):,} files cannot be used, see {self.folder / LEFT_OUT}; {key!a}: {reason}", flush=True)

    def finish(self) -> None:
        """Draw the curves and close the trackers; the main process only."""
        records = list(lines(self.folder / LOG))
        if records:
            width = max(1, len(records) // CURVE_POINTS)
            points = [records[i : i + width] for i in range(0, len(records), width)]
            loss = [float(np.mean([record["loss"] for record in point])) for point in points]
            save_loss_curve(
                self.folder / "loss.png", [point[-1]["step"] + 1 for point in points], {"loss": loss}, "training loss"
            )
        measured = list(lines(self.folder / VALIDATION))
        if measured:
            series = {name: [line[name] for line in measured] for name in measured[-1] if name != "step"}
            save_loss_curve(
                self.folder / "validation.png", [line["step"] for line in measured], series, "held-out images"
            )
        for tracker in self._trackers:
            tracker.finish()


def check_trackers(names: tuple[str, ...]) -> None:
    """ValueError for a tracker that is unknown or not installed."""
    import importlib.util

    for name in names:
        if name not in TRACKERS:
            raise ValueError(f"--trackers: expected {' or '.join(TRACKERS)}, got {name!r}")
        if importlib.util.find_spec(name) is None:
            raise ValueError(f"--trackers {name}: the package is missing; pip install 'fastlatent[trackers]'")


def lines(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a log; none where there is no file."""
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            # A torn last line is of a step after the newest checkpoint.
            with contextlib.suppress(ValueError):
                yield json.loads(line)


def _tracker(name: str, folder: Path, begin: int, config: Mapping[str, Any]) -> GeneralTracker:
    tracker: GeneralTracker
    if name == "tensorboard":
        # What an interrupted run logged from `begin` on is hidden.
        tracker = TensorBoardTracker(folder.name, logging_dir=folder / "tensorboard", purge_step=begin)
    else:
        # The id makes a resumed run the same run there.
        tracker = WandBTracker(
            "fastlatent", name=folder.name, dir=os.fspath(folder), id=_run_id(folder), resume="allow"
        )
    tracker.start()
    # TensorBoard takes numbers and texts only.
    tracker.store_init_configuration({k: str(v) if isinstance(v, tuple) or v is None else v for k, v in config.items()})
    return tracker


def _run_id(folder: Path) -> str:
    path = folder / ".wandb-id"
    if not path.exists():
        write_atomic(path, os.urandom(8).hex().encode())
    return path.read_text()


def _rewrite(path: Path, records: list[dict[str, Any]]) -> None:
    if records or path.exists() or path.name == LOG:
        write_atomic(path, "".join(json.dumps(record) + "\n" for record in records).encode())


def _append(path: Path, records: list[dict[str, Any]]) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)
