"""Decoding with the autoencoder of Stable Diffusion (f8, 49 M parameters in the decoder): seconds per image.

Weights are random. Latents are on the device already, pixels stay there: neither reading nor writing files is in it.

eager, compile, aoti   our engines (`open_decoder`), `fix_numerics` on: deterministic, no TF32, nothing chosen by timing
eager-fused            the first with `ops.group_norm_silu`
diffusers              AutoencoderKL.decode as one writes it, with torch's own switches
diffusers-compile      that with channels_last and cuDNN measuring its algorithms (TF32 in float32) under torch.compile;
                       mode "reduce-overhead" on CUDA
floor                  as many FLOPs as the decoder has, in products of matrices: see bench_vae_encode.py

Times are per image: the best batch is the one with the smallest. Compiling is part of the 60 s warm-up; what was
compiled is kept, so after a "timeout" a second run gets further.
"""

from __future__ import annotations

import functools
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import harness
import pytest
import rows as row_files
import torch
from bench_vae_encode import products
from diffusers import AutoencoderKL
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fastlatent.encoders.engines.engine import open_decoder
from fastlatent.encoders.engines.numerics import fix_numerics, relative_error
from fastlatent.encoders.load import load_autoencoder

# The third is for the tests below.
WIDTHS = {"sd-vae-f8": (128, 256, 512, 512), "narrow": (16, 16, 32, 32), "tiny": (32, 32)}
OURS = {
    "eager": ("eager", False),
    "eager-fused": ("eager", True),
    "compile": ("compile", False),
    "aoti": ("aoti", False),
}
RIVALS = ("diffusers", "diffusers-compile")


def config(model: str) -> dict[str, object]:
    levels = len(WIDTHS[model])
    return {
        "block_out_channels": WIDTHS[model],
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "layers_per_block": 2,
        "norm_num_groups": min(32, WIDTHS[model][0]),
        "latent_channels": 4,
    }


def latent_shape(model: str, size: int, batch: int) -> tuple[int, int, int, int]:
    side = size // 2 ** (len(WIDTHS[model]) - 1)
    return batch, 4, side, side


@functools.cache
def flops(model: str, size: int) -> int:
    """Of one image."""
    with torch.device("meta"):
        vae = AutoencoderKL(**config(model))
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            vae.decode(torch.empty(latent_shape(model, size, 1)))
    return counter.get_total_flops()


# ---- cases -----------------------------------------------------------------------------------------------


def make_case(model: str, size: int, dtype: str, batch: int, device: str) -> harness.Case:
    return harness.Case(
        "vae_decode",
        {"model": model, "size": size, "batch": batch},
        dtype,
        device,
        (*OURS, *RIVALS, "floor"),
        threads=row_files.cpu_cores() if device == "cpu" else 1,
    )


def make_cases() -> list[harness.Case]:
    if not torch.cuda.is_available():
        return [
            make_case("sd-vae-f8", 256, "float32", 1, "cpu"),
            make_case("narrow", 256, "float32", 16, "cpu"),
        ]
    chosen = [
        *[(256, "bfloat16", batch) for batch in (1, 32, 128, 8)],
        *[(512, "bfloat16", batch) for batch in (1, 8, 32)],  # of 128 one activation alone has 16 GiB
        *[(256, "float32", batch) for batch in (1, 32)],
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
    shape = latent_shape(model, size, batch)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        AutoencoderKL(**config(model)).save_pretrained(folder)
        vae = load_autoencoder(folder, device, dtype)
    latents = torch.randn(shape).to(device, dtype)

    def ours(name: str, fuse: bool) -> Callable[[], Tensor]:
        engine = open_decoder(name, vae, shapes=(shape,), cache=cache, fuse=fuse)
        return lambda: engine.decode(latents)

    def diffusers(compile: bool = False) -> Callable[[], Tensor]:
        plain = AutoencoderKL(**config(model)).eval().requires_grad_(False)
        plain.load_state_dict(vae.model.state_dict())
        plain = plain.to(device, dtype)
        inputs, decode = latents, lambda z: plain.decode(z).sample
        if compile:
            plain, inputs = plain.to(memory_format=torch.channels_last), latents.to(memory_format=torch.channels_last)
            decode = torch.compile(decode, mode="reduce-overhead" if case.device == "cuda" else None)

        @torch.inference_mode()
        def run() -> Tensor:
            with torch.backends.cudnn.flags(enabled=True, benchmark=compile, deterministic=False, allow_tf32=True):
                return decode(inputs)

        return run

    factories: dict[str, Callable[[], Callable[[], object]]] = {
        **{name: functools.partial(ours, *OURS[name]) for name in OURS},
        "diffusers": diffusers,
        "diffusers-compile": lambda: diffusers(compile=True),
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


# ---- pytest ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "case, provider", [(c, p) for c in CASES for p in c.providers], ids=lambda v: getattr(v, "key", v)
)
def test_vae_decode(benchmark, case, provider):
    with prepare(case) as prepared:
        benchmark(prepared.providers[provider]())


def test_providers_agree():
    # Those that compile are compared with eager when they are opened.
    with prepare(make_case("tiny", 16, "float32", 2, CASES[0].device)) as prepared:
        want = prepared.providers["diffusers"]()()
        assert want.shape == (2, 3, 16, 16)
        for name in ("eager", "eager-fused"):
            assert relative_error(prepared.providers[name]()(), want) < (1e-5 if want.device.type == "cpu" else 1e-2)
        assert prepared.providers["floor"]()() is not None


if __name__ == "__main__":
    harness.main(CASES, prepare)
