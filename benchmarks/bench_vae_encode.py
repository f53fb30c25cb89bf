"""Encoding with the autoencoder of Stable Diffusion (f8, 34 M parameters in the encoder): seconds per image.

Weights are random. Pixels are on the device already, moments stay there: neither decoding nor copying is in it.

eager, compile, aoti, tensorrt   our engines, `fix_numerics` on: deterministic, no TF32, nothing chosen by timing
eager-fused, compile-fused       those with `ops.group_norm_silu`
diffusers              AutoencoderKL.encode as one writes it, with torch's own switches
diffusers-nhwc         that with channels_last and cuDNN measuring its algorithms (TF32 in float32)
diffusers-compile      that under torch.compile
floor                  as many FLOPs as the encoder has, in products of matrices of 4096 columns (CPU: 1024) of the same
                       dtype and threads, with the switches of our engines. `fraction_of_floor` is thus the share of the
                       FLOPs that this machine reaches in practice. The convolutions with 128 channels at full
                       resolution, 29 % of the FLOPs at 256², suit no matrix unit as well

`flops` are 2 × multiply-adds of convolutions and products: 272.7 G at 256², 1,116.7 G at 512². Compiling is part of the
60 s warm-up; packages, plans and what Inductor compiled are kept, so after a "timeout" a second run gets further.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import harness
import pytest
import rows as row_files
import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fastlatent.encoders.engines.engine import open_engine
from fastlatent.encoders.engines.numerics import fix_numerics, relative_error
from fastlatent.encoders.load import load_autoencoder

WIDTHS = {"sd-vae-f8": (128, 256, 512, 512), "tiny": (32, 32)}  # the second for the tests below
OURS = {
    "eager": ("eager", False),
    "eager-fused": ("eager", True),
    "compile": ("compile", False),
    "compile-fused": ("compile", True),
    "aoti": ("aoti", False),
    "tensorrt": ("tensorrt", False),
}
RIVALS = ("diffusers", "diffusers-nhwc", "diffusers-compile")


def config(model: str) -> dict[str, object]:
    levels = len(WIDTHS[model])
    return {
        "block_out_channels": WIDTHS[model],
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "layers_per_block": 2,
        "latent_channels": 4,
    }


@functools.cache
def flops(model: str, size: int) -> int:
    """Of one image."""
    with torch.device("meta"):
        vae = AutoencoderKL(**config(model))
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            vae.encode(torch.empty(1, 3, size, size))
    return counter.get_total_flops()


# ---- cases -----------------------------------------------------------------------------------------------


def make_case(model: str, size: int, dtype: str, batch: int, device: str) -> harness.Case:
    ours = [name for name in OURS if name != "tensorrt" or (device == "cuda" and importlib.util.find_spec(name))]
    return harness.Case(
        "vae_encode",
        {"model": model, "size": size, "batch": batch},
        dtype,
        device,
        (*ours, *RIVALS, "floor"),
        threads=row_files.cpu_cores() if device == "cpu" else 1,
    )


def make_cases() -> list[harness.Case]:
    if not torch.cuda.is_available():
        return [make_case("sd-vae-f8", 256, dtype, 1, "cpu") for dtype in ("float32", "bfloat16")]
    chosen = [
        *[(256, dtype, 64) for dtype in ("bfloat16", "float16", "float32")],
        *[(256, "bfloat16", batch) for batch in (16, 128)],
        *[(512, "bfloat16", batch) for batch in (4, 16, 32)],
        (512, "float16", 16),
    ]
    return [make_case("sd-vae-f8", *one, "cuda") for one in chosen]


CASES = make_cases()


# ---- providers -------------------------------------------------------------------------------------------


@contextmanager
def prepare(case: harness.Case) -> Iterator[harness.Prepared]:
    model, size, batch = str(case.sizes["model"]), int(case.sizes["size"]), int(case.sizes["batch"])
    dtype, device = getattr(torch, case.dtype), torch.device(case.device)
    threads_before = torch.get_num_threads()
    torch.set_num_threads(case.threads)
    torch.compiler.reset()
    fix_numerics()
    cache = Path(os.environ.get("FASTLATENT_CACHE") or Path.home() / ".cache" / "fastlatent") / "engines"
    shape = (batch, 3, size, size)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        AutoencoderKL(**config(model)).save_pretrained(folder)
        vae = load_autoencoder(folder, device, dtype)
    pixels = (torch.rand(shape) * 2 - 1).to(device, dtype)

    def ours(name: str, fuse: bool) -> Callable[[], Tensor]:
        engine = open_engine(name, vae, shapes=(shape,), cache=cache, fuse=fuse)
        return lambda: engine.encode(pixels)

    def diffusers(nhwc: bool = False, compile: bool = False) -> Callable[[], Tensor]:
        plain = AutoencoderKL(**config(model)).eval().requires_grad_(False)
        plain.load_state_dict(vae.model.state_dict())
        plain = plain.to(device, dtype)
        inputs = pixels
        if nhwc:
            plain, inputs = plain.to(memory_format=torch.channels_last), pixels.to(memory_format=torch.channels_last)

        def encode(images: Tensor) -> Tensor:
            posterior = plain.encode(images).latent_dist
            return torch.cat([posterior.mean, posterior.logvar], dim=1)

        encode = torch.compile(encode) if compile else encode

        @torch.inference_mode()
        def run() -> Tensor:
            with torch.backends.cudnn.flags(enabled=True, benchmark=nhwc, deterministic=False, allow_tf32=True):
                return encode(inputs)

        return run

    factories: dict[str, Callable[[], Callable[[], object]]] = {
        **{name: functools.partial(ours, *OURS[name]) for name in OURS},
        "diffusers": diffusers,
        "diffusers-nhwc": lambda: diffusers(nhwc=True),
        "diffusers-compile": lambda: diffusers(nhwc=True, compile=True),
        "floor": lambda: products(batch * flops(model, size), device, dtype),
    }
    try:
        yield harness.Prepared(
            {name: factories[name] for name in case.providers},
            flops=flops(model, size),
            floor="floor",
            rivals=RIVALS,
            units=batch,
        )
    finally:
        torch.set_num_threads(threads_before)
        if case.device == "cuda":
            torch.cuda.empty_cache()


def products(flops: int, device: torch.device, dtype: torch.dtype) -> Callable[[], Tensor]:
    """As many FLOPs in products of matrices of 4096 columns (CPU: 1024)."""
    columns = 4096 if device.type == "cuda" else 1024
    left = torch.randn(8192, columns, device=device, dtype=dtype)
    right = torch.randn(columns, columns, device=device, dtype=dtype)
    whole, rest = divmod(flops, 2 * len(left) * columns**2)
    last = left[: max(1, round(rest / (2 * columns**2)))]

    @torch.inference_mode()
    def run() -> Tensor:
        for _ in range(whole):
            left @ right
        return last @ right

    return run


# ---- pytest ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "case, provider", [(c, p) for c in CASES for p in c.providers], ids=lambda v: getattr(v, "key", v)
)
def test_vae_encode(benchmark, case, provider):
    with prepare(case) as prepared:
        benchmark(prepared.providers[provider]())


def test_flops():
    assert flops("sd-vae-f8", 256) == pytest.approx(272.7e9, rel=1e-3)
    assert flops("sd-vae-f8", 512) == pytest.approx(1116.7e9, rel=1e-3)


def test_providers_agree():
    # Those that compile are compared with eager when they are opened.
    with prepare(make_case("tiny", 16, "float32", 2, CASES[0].device)) as prepared:
        want = prepared.providers["diffusers"]()()
        for name in ("eager", "eager-fused", "diffusers-nhwc"):
            assert relative_error(prepared.providers[name]()(), want) < (1e-5 if want.device.type == "cpu" else 1e-2)
        assert prepared.providers["floor"]()() is not None


if __name__ == "__main__":
    harness.main(CASES, prepare)
