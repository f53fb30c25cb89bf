"""Decoding a video with Wan 2.1's autoencoder, seconds and memory: our stream of chunks against the whole decode.

Weights are random, latents are on the device already, and pixels are dropped as they come. 61 frames of 848×480 are
latents [1, 16, 16, 60, 106] and 211.6 TFLOP.

stream           `stream_wan`, what `fastlatent decode` runs: chunk by chunk, eager, deterministic
stream-compile   that with torch.compile of the step from the third latent frame on; CUDA only
stream-aoti      that with the step compiled ahead of time (AOTInductor); the package is kept; CUDA only
diffusers        AutoencoderKLWan.decode as one writes it
floor            as many FLOPs in products of matrices: see bench_vae_encode.py

benchmark video_decode  seconds. dtype "tf32" is float32 with TF32 allowed, "float32" without it, for all providers
benchmark video_memory  `peak_bytes`: what decoding needs at most besides the loaded model, of one run, 61 and 241
                        frames. On CUDA what PyTorch has allocated; on the CPU the growth of VmHWM in a process of its
                        own, where malloc gives every tensor back at once
"""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import harness
import pytest
import torch
from bench_vae_encode import products
from diffusers import AutoencoderKLWan
from rows import Case, Row, cpu_cores
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fastlatent.encoders.engines.numerics import fix_numerics, relative_error
from fastlatent.encoders.engines.video_step import CompiledStep
from fastlatent.encoders.video_streaming import stream_wan
from fastlatent.workflows.encode_setup import engine_cache

CONFIGS: dict[str, dict[str, Any]] = {
    "wan-2.1": {},  # the class's defaults
    "narrow": {"base_dim": 8, "num_res_blocks": 1},
}
PROVIDERS = ("stream", "stream-compile", "stream-aoti", "diffusers", "floor")
COMPILE_SECONDS = 240.0  # the step has as many kernels as the decoder has layers: more than the usual cap
MEASURED = ("stream", "diffusers")  # whose memory is
CUDA = torch.cuda.is_available()


def _case(benchmark: str, model: str, frames: int, size: str, dtype: str) -> Case:
    providers = MEASURED if benchmark == "video_memory" else PROVIDERS if CUDA else (*MEASURED, "floor")
    threads = 1 if CUDA else cpu_cores()
    sizes: dict[str, int | float | str] = {"model": model, "frames": frames, "size": size}
    return Case(benchmark, sizes, dtype, "cuda" if CUDA else "cpu", providers, threads)


CASES = (
    [
        *[_case("video_decode", "wan-2.1", 61, "848x480", dtype) for dtype in ("float32", "tf32", "bfloat16")],
        *[_case("video_memory", "wan-2.1", frames, "848x480", "float32") for frames in (61, 241)],
    ]
    if CUDA
    else [
        _case("video_decode", "narrow", 17, "128x96", "float32"),
        *[_case("video_memory", "narrow", frames, "128x96", "float32") for frames in (61, 241)],
    ]
)


def latent_shape(case: Case) -> tuple[int, int, int, int, int]:
    width, height = map(int, str(case.sizes["size"]).split("x"))
    return 1, 16, (int(case.sizes["frames"]) - 1) // 4 + 1, height // 8, width // 8


@functools.cache
def flops(model: str, shape: tuple[int, ...]) -> int:
    with torch.device("meta"):
        vae = AutoencoderKLWan(**CONFIGS[model])
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            vae.decode(torch.empty(shape))
    return counter.get_total_flops()


def make_model(case: Case) -> tuple[Any, Tensor]:
    """The model and latents, in place; every switch of torch as the case says."""
    torch.set_num_threads(case.threads)
    fix_numerics(tf32=case.dtype == "tf32")
    dtype = torch.bfloat16 if case.dtype == "bfloat16" else torch.float32
    torch.manual_seed(0)
    with torch.device(case.device):
        model = AutoencoderKLWan(**CONFIGS[str(case.sizes["model"])]).to(dtype).eval().requires_grad_(False)
    return model, torch.randn(latent_shape(case)).to(case.device, dtype)


@contextmanager
def prepare(case: Case) -> Iterator[harness.Prepared]:
    threads_before = torch.get_num_threads()
    torch.compiler.reset()
    model, z = make_model(case)

    def stream(make_step: Callable[[], Callable[..., Any] | None]) -> Callable[[], Tensor]:
        step = make_step()

        def run() -> Tensor:
            for pixels in stream_wan(model, z, step=step):
                last = pixels
            return last

        return run

    def diffusers() -> Callable[[], Tensor]:
        @torch.inference_mode()
        def run() -> Tensor:
            tf32 = torch.backends.cudnn.allow_tf32
            with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=False, allow_tf32=tf32):
                return model.decode(z).sample

        return run

    def compiled(name: str) -> CompiledStep:
        return CompiledStep(name, model, {"benchmark": case.key}, engine_cache())

    count = flops(str(case.sizes["model"]), tuple(z.shape))
    factories: dict[str, Callable[[], Callable[[], object]]] = {
        "stream": lambda: stream(lambda: None),
        "stream-compile": lambda: stream(lambda: compiled("compile")),
        "stream-aoti": lambda: stream(lambda: compiled("aoti")),
        "diffusers": diffusers,
        "floor": lambda: products(count, z.device, z.dtype),
    }
    factories = {name: factories[name] for name in case.providers}
    try:
        yield harness.Prepared(factories, flops=count, floor="floor", rivals=("diffusers",))
    finally:
        torch.set_num_threads(threads_before)
        fix_numerics()
        if CUDA:
            torch.cuda.empty_cache()


# ---- memory ----------------------------------------------------------------------------------------------


def decode_once(case: Case, provider: str) -> tuple[float, int]:
    """(seconds, bytes that it took at most besides the model) in this process."""
    model, z = make_model(case)

    @torch.inference_mode()
    def run(latents: Tensor) -> None:
        if provider == "stream":
            for _ in stream_wan(model, latents):
                pass
        else:
            model.decode(latents)

    run(z[:, :, :3])  # what libraries set up at their first call is no part of it
    before = _allocated(reset=True)
    begin = time.perf_counter()
    run(z)
    peak = _allocated(peak=True) - before
    return time.perf_counter() - begin, peak


def _allocated(*, reset: bool = False, peak: bool = False) -> int:
    if CUDA:
        torch.cuda.synchronize()
        if reset:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()
    if reset:
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM falls to VmRSS
    found = re.search(rf"{'VmHWM' if peak else 'VmRSS'}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024


def in_a_process(case: Case, provider: str) -> tuple[float, int]:
    """`decode_once` in a process of its own."""
    code = f"import bench_video_vae as b; print(*b.decode_once(b.{case!r}, {provider!r}))"
    # Tensors are mappings of their own, which go back when they are freed: what is resident is what lives.
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=Path(__file__).parent
    )
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["no output"])[-1])
    seconds, peak = done.stdout.split()[-2:]
    return float(seconds), int(peak)


def measure_memory(case: Case) -> list[Row]:
    found = []
    for provider in case.providers:
        try:
            seconds, peak = (decode_once if CUDA else in_a_process)(case, provider)
        except Exception as error:  # out of memory in one must not cost the other
            found.append(harness.row(case, provider, harness.failure(error)))
            continue
        timing = harness.Timing(seconds, seconds, seconds, 1)
        found.append(replace(harness.row(case, provider, harness.Outcome("ok", timing=timing)), peak_bytes=peak))
    return found


# ---- pytest ----------------------------------------------------------------------------------------------


def test_flops():
    assert flops("wan-2.1", (1, 16, 16, 60, 106)) == pytest.approx(211.6e12, rel=1e-2)


def test_providers_agree():
    case = _case("video_decode", "narrow", 13, "32x24", "float32")
    with prepare(case) as prepared:
        whole = prepared.providers["diffusers"]()()
        last = prepared.providers["stream"]()()
        assert whole.shape == (1, 3, 13, 24, 32)
        assert relative_error(last, whole[:, :, -4:]) < (1e-6 if not CUDA else 1e-3)
        assert prepared.providers["floor"]()() is not None


# ---- the command line ------------------------------------------------------------------------------------


def measure(case: Case, seconds: float) -> list[Row]:
    if case.benchmark == "video_memory":
        return measure_memory(case)
    with prepare(case) as prepared:
        outcomes = harness.interleave(
            prepared.providers, device=case.device, min_seconds=seconds, cap_seconds=COMPILE_SECONDS
        )
    return harness.rows_of(case, prepared, outcomes)


def main(argv: Sequence[str] | None = None) -> list[Row]:
    return harness.measure_all(CASES, measure, argv, (__doc__ or "").split("\n")[0])


if __name__ == "__main__":
    main()
