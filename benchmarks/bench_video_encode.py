"""Encoding a clip with Wan 2.1's autoencoder, seconds for one clip: ours piece by piece against diffusers' encode.

Weights are random; the clip is uint8 [1, T, H, W, 3] on the device already, and its normalisation counts. 61 frames of
848×480 are 125.9 TFLOP: 6.28 clips/s at 790 TFLOP/s.

encode_clips     `VideoClipEncoder.encode_clips`, what `fastlatent encode` runs: eager, deterministic
diffusers        the clip in the model's dtype, then AutoencoderKLWan.encode, as one writes it
floor            as many FLOPs in products of matrices: see bench_vae_encode.py

benchmark video_encode  dtype "tf32" is float32 with TF32 allowed. On CUDA rows have `peak_bytes`: what PyTorch has
                        allocated at most besides the model and the clip, in one call
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import harness
import pytest
import torch
from bench_vae_encode import products
from bench_video_vae import CONFIGS
from diffusers import AutoencoderKLWan
from rows import Case, Row, cpu_cores
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fastlatent.encoders.engines.numerics import fix_numerics, relative_error
from fastlatent.encoders.video_clips import load_video_clip_encoder

PROVIDERS = ("encode_clips", "diffusers", "floor")
COMPUTING = ("encode_clips", "diffusers")
CUDA = torch.cuda.is_available()


def _case(model: str, frames: int, size: str, dtype: str) -> Case:
    sizes: dict[str, int | float | str] = {"model": model, "frames": frames, "size": size}
    return Case("video_encode", sizes, dtype, "cuda" if CUDA else "cpu", PROVIDERS, 1 if CUDA else cpu_cores())


CASES = (
    [
        *[_case("wan-2.1", frames, "848x480", "bfloat16") for frames in (61, 241)],
        _case("wan-2.1", 61, "848x480", "tf32"),
    ]
    if CUDA
    else [_case("narrow", 17, "128x96", "float32")]
)


def clip_shape(case: Case) -> tuple[int, int, int, int, int]:
    width, height = map(int, str(case.sizes["size"]).split("x"))
    return 1, int(case.sizes["frames"]), height, width, 3


@functools.cache
def flops(model: str, shape: tuple[int, ...]) -> int:
    _, frames, height, width, _ = shape
    with torch.device("meta"):
        vae = AutoencoderKLWan(**CONFIGS[model])
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            vae.encode(torch.empty(1, 3, frames, height, width))
    return counter.get_total_flops()


@contextmanager
def prepare(case: Case) -> Iterator[harness.Prepared]:
    threads_before = torch.get_num_threads()
    torch.set_num_threads(case.threads)
    fix_numerics(tf32=case.dtype == "tf32")
    dtype = torch.bfloat16 if case.dtype == "bfloat16" else torch.float32
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        AutoencoderKLWan(**CONFIGS[str(case.sizes["model"])]).save_pretrained(folder)
        encoder = load_video_clip_encoder(folder, case.device, dtype)
    model = encoder.autoencoder.model
    clips = torch.randint(0, 256, clip_shape(case), dtype=torch.uint8).to(case.device)

    def ours() -> Callable[[], Tensor]:
        return lambda: encoder.encode_clips(clips)

    def diffusers() -> Callable[[], Tensor]:
        @torch.inference_mode()
        def run() -> Tensor:
            tf32 = torch.backends.cudnn.allow_tf32
            with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=False, allow_tf32=tf32):
                pixels = (clips.permute(0, 4, 1, 2, 3).float() / 127.5 - 1).to(dtype).contiguous()
                return model.encode(pixels).latent_dist.parameters

        return run

    count = flops(str(case.sizes["model"]), tuple(clips.shape))
    factories: dict[str, Callable[[], Callable[[], object]]] = {
        "encode_clips": ours,
        "diffusers": diffusers,
        "floor": lambda: products(count, clips.device, dtype),
    }
    try:
        yield harness.Prepared(factories, flops=count, floor="floor", rivals=("diffusers",))
    finally:
        torch.set_num_threads(threads_before)
        fix_numerics()
        if CUDA:
            torch.cuda.empty_cache()


def measure(case: Case, seconds: float) -> list[Row]:
    with prepare(case) as prepared:
        outcomes = harness.interleave(prepared.providers, device=case.device, min_seconds=seconds)
        found = harness.rows_of(case, prepared, outcomes)
        peaks = {name: _peak(prepared.providers[name]()) for name in COMPUTING if CUDA and outcomes[name].timing}
    return [replace(row, peak_bytes=peaks.get(row.provider)) for row in found]


def _peak(function: Callable[[], object]) -> int:
    """Bytes that one call allocates at most on the GPU."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


# ---- pytest ----------------------------------------------------------------------------------------------


def test_flops():
    assert flops("wan-2.1", (1, 61, 480, 848, 3)) == pytest.approx(125.9e12, rel=1e-2)


def test_providers_agree():
    case = _case("narrow", 9, "32x24", "float32")
    with prepare(case) as prepared:
        ours, theirs = (prepared.providers[name]()() for name in COMPUTING)
        assert ours.shape == (1, 32, 3, 3, 4)
        assert relative_error(ours, theirs) < (1e-6 if not CUDA else 1e-3)
        assert prepared.providers["floor"]()() is not None


# ---- the command line ------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> list[Row]:
    return harness.measure_all(CASES, measure, argv, (__doc__ or "").split("\n")[0])


if __name__ == "__main__":
    main()
