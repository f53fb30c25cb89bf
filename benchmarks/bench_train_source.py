"""Training on latents from a dataset against images that are encoded on the fly: seconds per step, and memory.

A DiT on the same JPEGs; each provider in a process of its own, segments of several steps in turn:

cached        latents that `fastlatent encode` wrote
on-the-fly    images decoded and encoded for every batch

`peak_bytes`: on CUDA the most that PyTorch has allocated after warming up, on the CPU the growth of VmHWM, from before
the latents were opened. The first steps of a segment, whose batches were prepared during the other's, are not timed.
"""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import re
import tempfile
import time
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

import harness
import rows as row_files
import torch
from bench_encode import WIDTHS, write_images, write_vae
from bench_train import LEAD, Loop, make_objective, model_config, precision, steps_per_call
from rows import Case, Row

from fastlatent.config import EncodeConfig, TrainDitConfig
from fastlatent.workflows.encode import encode
from fastlatent.workflows.latent_source import open_latents
from fastlatent.workflows.train import training_run

CUDA = torch.cuda.is_available()
# A segment may take this long: the first compiles, and measures mean and std.
SEGMENT_SECONDS = 400.0
MAX_SEGMENTS = 40


def make_case(model: str, batch: int, size: int, vae: str, images: int, device: str) -> Case:
    return Case(
        "train_source",
        {"batch": batch, "images": images, "model": model, "size": size, "vae": vae},
        "bfloat16" if device == "cuda" else "float32",
        device,
        ("cached", "on-the-fly"),
        threads=row_files.cpu_cores() if device == "cpu" else 1,
    )


CASES = [
    make_case("DiT-Medium", 64, 256, "sd", 4096, "cuda") if CUDA else make_case("DiT-small", 8, 64, "narrow", 64, "cpu")
]


def write_source(folder: Path, case: Case) -> None:
    """images, vae, and the dataset "cached" that they make."""
    size = int(case.sizes["size"])
    write_images(folder / "images", int(case.sizes["images"]), size * 3 // 2, size * 9 // 8)
    write_vae(folder / "vae", WIDTHS[str(case.sizes["vae"])])
    config = EncodeConfig(
        source=str(folder / "images"), vae=str(folder / "vae"), out=str(folder / "cached"), size=size,
        device=case.device, compute_dtype=case.dtype, threads=case.threads,
    )  # fmt: skip
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        encode(config)
    if CUDA:
        torch.cuda.empty_cache()


def train_segments(pipe: Connection, provider: str, folder: Path, case: Case) -> None:
    """A process's work: for each number that comes, seconds of so many steps and the peak of memory; None ends it."""
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            _train_segments(pipe, provider, folder, case)
    except EOFError:  # the other side is gone
        pass
    except Exception as error:
        pipe.send(harness.failure(error))


def _train_segments(pipe: Connection, provider: str, folder: Path, case: Case) -> None:
    images = provider == "on-the-fly"
    config = TrainDitConfig(
        latents=str(folder / ("images" if images else "cached")), vae=str(folder / "vae") if images else None,
        out=str(folder / f"run-{provider}"), size=int(case.sizes["size"]) if images else 256,
        batch_size=int(case.sizes["batch"]), device=case.device, threads=case.threads, mixed_precision=precision(case),
        compile="on" if case.device == "cuda" else "off", latent_statistics=512,
    )  # fmt: skip
    before = high_water()
    source = open_latents(config)
    with training_run(config, source.data, source.count) as run:
        batches, _, _ = source.batches(run, config)
        objective = make_objective(model_config(str(case.sizes["model"])), batches, run.device)
        loop = Loop(objective, config, run.team, run.folder)

        def go(steps: int) -> None:
            loop.run(steps)
            if case.device == "cuda":
                torch.cuda.synchronize()

        go(LEAD)
        if case.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        while (count := pipe.recv()) is not None:
            go(LEAD)
            begin = time.perf_counter()
            go(count)
            seconds = (time.perf_counter() - begin) / count
            peak = torch.cuda.max_memory_allocated() if case.device == "cuda" else high_water() - before
            pipe.send((seconds, peak))


def high_water() -> int:
    """The most memory that this process has ever had, in bytes."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def measure(case: Case, seconds: float) -> list[Row]:
    spawn = multiprocessing.get_context("spawn")
    outcomes: dict[str, harness.Outcome] = {}
    samples: dict[str, list[float]] = {name: [] for name in case.providers}
    peaks: dict[str, int] = {}
    with tempfile.TemporaryDirectory(prefix="fastlatent-bench-") as work, contextlib.ExitStack() as stack:
        write_source(Path(work), case)
        pipes = {}
        for name in case.providers:
            pipes[name], theirs = spawn.Pipe()
            process = spawn.Process(target=train_segments, args=(theirs, name, Path(work), case), daemon=True)
            process.start()
            theirs.close()
            stack.callback(process.join, 10)
            stack.callback(pipes[name].close)
        begin = time.perf_counter()
        for segment in range(MAX_SEGMENTS):
            if segment > harness.MIN_SAMPLES and time.perf_counter() - begin > seconds * len(pipes):
                break
            for name in [name for name in pipes if name not in outcomes]:
                answer = _ask(pipes[name], steps_per_call(case.device))
                if isinstance(answer, harness.Outcome):
                    outcomes[name] = answer
                elif segment > 0:  # the first waited for the process to start
                    samples[name].append(answer[0])
                    peaks[name] = answer[1]
    outcomes |= {
        name: harness.Outcome("ok", timing=harness.quantiles(times))
        for name, times in samples.items()
        if name not in outcomes
    }
    prepared = harness.Prepared(dict.fromkeys(case.providers, lambda: lambda: None), rivals=("on-the-fly",))
    found = harness.rows_of(case, prepared, {name: outcomes[name] for name in case.providers})
    return [replace(row, peak_bytes=peaks.get(row.provider) if row.status == "ok" else None) for row in found]


def _ask(pipe: Connection, steps: int) -> tuple[float, int] | harness.Outcome:
    """Seconds per step and peak bytes of a segment, or why there is none."""
    try:
        pipe.send(steps)
        if not pipe.poll(SEGMENT_SECONDS):
            return harness.Outcome("timeout", f"no segment within {SEGMENT_SECONDS:g} s")
        return pipe.recv()
    except (EOFError, OSError):
        return harness.Outcome("error", "the process ended: out of memory?")


def main(argv: Sequence[str] | None = None) -> list[Row]:
    return harness.measure_all(CASES, measure, argv, (__doc__ or "").split("\n")[0])


if __name__ == "__main__":
    main()
