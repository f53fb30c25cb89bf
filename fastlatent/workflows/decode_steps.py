"""Steps of an experiment to videos: the next one read and unzipped, and the last one written, while one is decoded."""

from __future__ import annotations

import gc
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastlatent.data.step_latents import read_step, statistics
from fastlatent.encoders.decode_memory import DecodePlan, explain, is_out_of_memory
from fastlatent.encoders.video_protocol import VideoAutoencoder
from fastlatent.media.videos import open_video, output_path
from fastlatent.pipeline.ahead import ahead
from fastlatent.pipeline.handoff import Abandoned, Handoff
from fastlatent.pipeline.interrupt import StopRequest
from fastlatent.pipeline.meter import Meter
from fastlatent.pipeline.progress import Progress
from fastlatent.sources.experiment import Step, step_metadata
from fastlatent.workflows.decode_records import Records, StepResult

READ_AHEAD = 2  # steps; one takes 3 MiB (61 frames of 848×480 in float16)
CHUNKS_BEHIND = 8  # between decoding and writing; one of 4 frames of 848×480 takes 5 MB
POLL_SECONDS = 0.2  # how often to look whether what others decode is done


@dataclass(frozen=True, kw_only=True)
class VideoSettings:
    """How videos are written; `media.videos.open_video` says what each is."""

    format: str
    fps: float
    crf: int
    scale: float


@dataclass(frozen=True)
class _Read:
    """What the reading thread found. `about` is metadata of the result to be; no `values`: there is nothing to decode.

    known: `result` is in the records already.
    """

    digest: str | None
    about: dict[str, Any]
    values: Tensor | None = None
    result: StepResult | None = None
    known: bool = False


class StepDecoder:
    """Decodes steps that no other process has, and records what became of them.

    Args:
        vae: the autoencoder, ready to run.
        size: frames, height and width in pixels as the experiment's settings say, for packed latents.
        plan: what decoding latents [1, C, t, h, w] takes; raises ValueError where it cannot fit.
        told: called with each result, as they come.
    """

    def __init__(
        self,
        vae: VideoAutoencoder,
        device: torch.device,
        settings: VideoSettings,
        records: Records,
        *,
        size: tuple[int, int, int] | None,
        plan: Callable[[torch.Size], DecodePlan],
        told: Callable[[Step, StepResult], None],
    ) -> None:
        self._vae, self._device, self._settings, self._records = vae, device, settings, records
        self._size, self._plan, self._told = size, plan, told
        self._meter = Meter({"read": READ_AHEAD, "decode": 1, "write": 1})
        self._remaining: deque[Step] = deque()
        self.results: dict[Step, StepResult] = {}

    def run(self, steps: Sequence[Step], *, force: bool) -> None:
        """Decode `steps`, which puts them into `results`; returns when all are done, by whomever.

        Args:
            force: also what was done before this run began.

        Raises:
            KeyboardInterrupt: a stop was asked for. What is finished stays; no half file does.
        """
        self._remaining.extend(steps)
        writing: deque[tuple[Step, _Read, Future[StepResult | None]]] = deque()

        def finish(step: Step, read: _Read, result: StepResult) -> None:
            if not read.known:
                self._records.write(step, read.digest, result)
            self._records.leases.release(self._records.lease(step))
            self.results[step] = result
            self._told(step, result)
            progress.advance()

        def settle(most: int) -> None:
            """Record the videos that are written, and wait until at most `most` are not."""
            while writing and (len(writing) > most or writing[0][2].done()):
                step, read, future = writing.popleft()
                result = future.result()
                assert result is not None, step  # only an abandoned one has none, and its future was dropped
                finish(step, read, result)

        with (
            StopRequest() as stop,
            Progress("decode", len(steps), "steps", describe=self._meter.text) as progress,
            ThreadPoolExecutor(READ_AHEAD, thread_name_prefix="read") as pool,
            ThreadPoolExecutor(1, thread_name_prefix="write") as behind,
        ):
            try:
                while self._remaining:
                    for step, read in ahead(
                        self._pull, lambda step: self._read(step, force), pool=pool, depth=READ_AHEAD
                    ):
                        stop.check()
                        if read.result is not None:
                            finish(step, read, read.result)
                        else:
                            writing.append((step, read, self._decode(step, read, behind, stop)))
                        settle(1)
                    settle(0)
                    stop.check()
                    if self._remaining:  # another process has them
                        time.sleep(POLL_SECONDS)
            except KeyboardInterrupt:
                settle(0)
                raise

    def _pull(self) -> Step | None:
        """The next step that nobody else has."""
        for _ in range(len(self._remaining)):
            step = self._remaining.popleft()
            if self._records.leases.take(self._records.lease(step)):
                return step
            self._remaining.append(step)
        return None

    def _read(self, step: Step, force: bool) -> _Read:
        with self._meter.busy("read"):
            about: dict[str, Any] = {"notes": [], "metadata": step_metadata(step)}
            digest = values = failure = None
            try:
                latents = read_step(step.path)
                digest, values = latents.digest, latents.values
                about |= {"notes": list(latents.notes), "latent": statistics(values)}
            except (ValueError, OSError) as error:
                failure = _failure(error, about, 0.0)
            known = self._records.finished(step, digest, force=force)
            return _Read(digest, about, values, known or failure, known=known is not None)

    def _decode(
        self, step: Step, read: _Read, behind: ThreadPoolExecutor, stop: StopRequest
    ) -> Future[StepResult | None]:
        """Decode one step. Its frames are written meanwhile, the last ones after this returns."""
        assert read.values is not None
        begun, about = time.perf_counter(), read.about
        if bad := about["latent"]["nan"]:
            about["notes"].append(f"{bad:,} of {read.values.numel():,} latents are NaN or infinite")
        try:
            stored = self._vae.arrange(read.values.to(self._device), self._size)
            plan = self._plan(stored.shape)
            raw = self._vae.denormalize(stored)
            for tiles in [tiles for tiles in (False, True) if tiles >= plan.tiles and (self._vae.tiles or not tiles)]:
                try:
                    return self._stream(step, raw, tiles, about, begun, behind, stop)
                except (RuntimeError, MemoryError) as error:
                    if not is_out_of_memory(error):
                        raise
                    reason = explain(error, plan)
                about["notes"].append(f"out of memory {'in tiles' if tiles else 'without tiles'}")
                gc.collect()
                if self._device.type == "cuda":
                    torch.cuda.empty_cache()
            raise ValueError(reason)
        except (ValueError, OSError) as error:
            failed: Future[StepResult | None] = Future()
            failed.set_result(_failure(error, about, time.perf_counter() - begun))
            return failed

    def _stream(
        self,
        step: Step,
        raw: Tensor,
        tiles: bool,
        about: dict[str, Any],
        begun: float,
        behind: ThreadPoolExecutor,
        stop: StopRequest,
    ) -> Future[StepResult | None]:
        path = output_path(self._records.output / step.folder, step.name, self._settings.format)
        path.parent.mkdir(parents=True, exist_ok=True)
        chunks: Handoff[Frames] = Handoff(CHUNKS_BEHIND)
        written = behind.submit(self._write, path, chunks, about, begun)
        try:
            with closing(self._vae.stream(raw, tiles=tiles)) as decoded:
                while True:
                    with self._meter.busy("decode"):
                        pixels = next(decoded, None)
                        frames = None if pixels is None else to_frames(pixels)
                    stop.check()
                    if frames is None or not chunks.put(frames):
                        break
        except BaseException:
            chunks.abandon()
            raise
        chunks.end()
        return written

    def _write(self, path: Path, chunks: Handoff[Frames], about: dict[str, Any], begun: float) -> StepResult | None:
        """In the writing thread. None where the decoding thread failed; what goes wrong with the file is a result."""
        try:
            taken = iter(chunks)
            first = next(taken)
            nan = 0
            height, width, channels = first.pixels.shape[1:]
            settings = self._settings
            with open_video(
                path, format=settings.format, fps=settings.fps, height=height, width=width, channels=channels,
                crf=settings.crf, scale=settings.scale,
            ) as writer:  # fmt: skip
                for frames in chain([first], taken):
                    pixels, bad = frames.wait()
                    nan += bad
                    with self._meter.busy("write"):
                        writer.write(pixels)
        except Abandoned:
            return None
        except (ValueError, OSError) as error:
            return _failure(error, about, time.perf_counter() - begun)
        finally:
            chunks.give_up()
        notes = [*about["notes"], *writer.notes]
        if nan:
            notes.append(f"{nan:,} pixel values are NaN, shown black; if the latents are not, try --dtype float32")
        height, width = writer.size
        sizes = {"frames": writer.frames, "width": width, "height": height, "fps": settings.fps}
        seconds = time.perf_counter() - begun
        return StepResult(
            success=True, output_path=path, decode_time=seconds, metadata={**about, **sizes, "notes": notes}
        )


def _failure(error: Exception, about: dict[str, Any], seconds: float) -> StepResult:
    return StepResult(success=False, error_message=str(error), decode_time=seconds, metadata=about)


@dataclass(frozen=True)
class Frames:
    """uint8 [n, H, W, C] on the CPU, and how many values were NaN; both are there once `copied` has happened."""

    pixels: Tensor
    nan: Tensor
    copied: torch.cuda.Event | None

    def wait(self) -> tuple[np.ndarray, int]:
        if self.copied is not None:
            self.copied.synchronize()
        return self.pixels.numpy(), int(self.nan)


def to_frames(pixels: Tensor) -> Frames:
    """float [C, n, H, W] in [−1, 1] → frames: clamped, (x + 1) · 127.5 rounded half to even, NaN black.

    Asynchronous on CUDA: the next chunk is begun while this one travels.
    """
    values = torch.nan_to_num(pixels.float(), nan=-1.0).clamp_(-1, 1).add_(1).mul_(127.5).round_()
    frames, nan = values.to(torch.uint8).permute(1, 2, 3, 0).contiguous(), pixels.isnan().sum()
    if not pixels.is_cuda:
        return Frames(frames, nan, None)
    there = torch.empty_like(frames, device="cpu", pin_memory=True).copy_(frames, non_blocking=True)
    bad = torch.empty_like(nan, device="cpu", pin_memory=True).copy_(nan, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()
    return Frames(there, bad, copied)
