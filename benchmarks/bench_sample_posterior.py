"""fastlatent.ops.sample_posterior against plain torch, eager and compiled: a batch of latents from stored moments.

float16 moments [rows, flips, 2 * channels, side, side] become normalised latents: mean + exp(logvar / 2) * noise, of
the image or its mirror where flips is 2. The rivals do what training loops do, with torch's own generator: their noise
depends on the batch and its order, that of fastlatent on each row's key. On a GPU the batches take turns, 256 MiB of
them, so that none waits in its cache. The floor copies as many bytes as a draw reads and writes.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# torch's OpenMP threads spin for milliseconds after each call, on cores that the next provider needs.
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"

import harness
import pytest
import rows as row_files
import torch
from torch import Tensor

from fastlatent.ops import sample_posterior

# (rows, channels, side): the 256 x 256 images of a published training (SD's autoencoder), of one with 16 channels, and
# 512 x 512 images.
SIZES = ((256, 4, 32), (256, 16, 32), (64, 16, 64))
ROTATING_BYTES = 256 * 2**20


def make_case(rows: int, channels: int, side: int, flips: int, out: str, device: str) -> harness.Case:
    return harness.Case(
        "sample_posterior",
        {"rows": rows, "channels": channels, "side": side, "flips": flips, "out": out},
        "float16",
        device,
        ("fastlatent", "torch", "torch-compiled", "copy"),
        threads=row_files.cpu_cores() if device == "cpu" else 1,
    )


def make_cases(device: str) -> list[harness.Case]:
    sizes, out = (SIZES, "bfloat16") if device == "cuda" else (SIZES[:1], "float32")
    return [make_case(*size, flips, out, device) for size in sizes for flips in (1, 2)]


CASES = make_cases("cuda" if torch.cuda.is_available() else "cpu")


def plain(moments: Tensor, mean: Tensor, std: Tensor, out_dtype: torch.dtype) -> Tensor:
    """One draw of each row as training loops have it, of moments [B, F, 2C, H, W]."""
    if moments.shape[1] == 2:
        mirror = torch.randint(2, (len(moments),), device=moments.device)
        moments = moments[torch.arange(len(moments), device=moments.device), mirror]
    else:
        moments = moments[:, 0]
    center, logvar = moments.float().chunk(2, dim=1)
    x = center + torch.exp(0.5 * logvar.clamp(-30.0, 20.0)) * torch.randn_like(center)
    return ((x - mean[:, None, None]) / std[:, None, None]).to(out_dtype)


@contextmanager
def prepare(case: harness.Case) -> Iterator[harness.Prepared]:
    threads_before = torch.get_num_threads()
    torch.set_num_threads(case.threads)
    torch.compiler.reset()
    count, channels, side, flips = (int(case.sizes[name]) for name in ("rows", "channels", "side", "flips"))
    out_dtype, device = getattr(torch, str(case.sizes["out"])), case.device
    generator = torch.Generator().manual_seed(0)
    shape = (count, flips, 2 * channels, side, side)
    batch = torch.randn(shape, generator=generator).sub_(2).half().to(device)
    batches = [batch.clone() for _ in range(max(1, ROTATING_BYTES // batch.nbytes) if device == "cuda" else 1)]
    keys = torch.randint(-(2**63), 2**63 - 1, (count,), generator=generator).to(device)
    mean, std = torch.zeros(channels, device=device), torch.ones(channels, device=device)
    elements = count * channels * side * side
    size = elements * (2 * batch.itemsize + out_dtype.itemsize)
    source = torch.empty(len(batches), size // 2, dtype=torch.uint8, device=device)
    target = torch.empty_like(source[0])

    def cycle(function: Callable[[Tensor], object], inputs: list[Tensor]) -> Callable[[], Callable[[], object]]:
        def factory() -> Callable[[], object]:
            turns = itertools.cycle(inputs)

            @torch.inference_mode()
            def run() -> object:
                return function(next(turns))

            return run

        return factory

    compiled = torch.compile(plain)
    epochs = itertools.count()
    factories = {
        "fastlatent": cycle(
            lambda moments: sample_posterior(
                moments, keys, seed=0, epoch=next(epochs), mean=mean, std=std, out_dtype=out_dtype
            ),
            batches,
        ),
        "torch": cycle(lambda moments: plain(moments, mean, std, out_dtype), batches),
        "torch-compiled": cycle(lambda moments: compiled(moments, mean, std, out_dtype), batches),
        "copy": cycle(lambda part: target.copy_(part), list(source)),
    }
    try:
        yield harness.Prepared(
            {name: factories[name] for name in case.providers},
            bytes=size,
            floor="copy",
            rivals=("torch", "torch-compiled"),
        )
    finally:
        torch.set_num_threads(threads_before)


@pytest.mark.parametrize(
    "case, provider", [(c, p) for c in CASES for p in c.providers], ids=lambda v: getattr(v, "key", v)
)
def test_sample_posterior(benchmark, case, provider):
    with prepare(case) as prepared:
        benchmark(prepared.providers[provider]())


if __name__ == "__main__":
    harness.main(CASES, prepare)
