"""fastlatent.ops.group_norm_silu against torch's GroupNorm and SiLU, eager and compiled: the norms of SD's autoencoder.

The shapes are those of its three largest levels at 256 x 256 pixels, 32 groups. On a GPU batches of 16 take turns,
256 MiB of them at least, so that none waits in its cache; torch's eager GroupNorm gives a contiguous result there also
where its input is channels_last, and the copy back that the next convolution makes is not counted. The floor copies as
many bytes as the result has, read once and written once: the statistics need a second read where an image does not
stay in a cache, so that 2/3 of the floor is what is left there.
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
import torch.nn.functional as F
from torch import Tensor

from fastlatent.ops import group_norm_silu

# (channels, side)
SIZES = ((128, 256), (256, 128), (512, 64))
LAYOUTS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}
GROUPS, EPS = 32, 1e-6
ROTATING_BYTES = 256 * 2**20


def make_case(channels: int, side: int, layout: str, dtype: str, device: str) -> harness.Case:
    return harness.Case(
        "group_norm_silu",
        {"images": 16 if device == "cuda" else 1, "channels": channels, "side": side, "layout": layout},
        dtype,
        device,
        ("fastlatent", "torch", "torch-compiled", "copy"),
        threads=row_files.cpu_cores() if device == "cpu" else 1,
    )


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES = [
    make_case(*size, layout, dtype, DEVICE) for dtype in ("bfloat16", "float32") for size in SIZES for layout in LAYOUTS
]


def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.silu(F.group_norm(x, GROUPS, weight, bias, EPS))


@contextmanager
def prepare(case: harness.Case) -> Iterator[harness.Prepared]:
    threads_before = torch.get_num_threads()
    torch.set_num_threads(case.threads)
    torch.compiler.reset()
    images, channels, side = (int(case.sizes[name]) for name in ("images", "channels", "side"))
    dtype, layout = getattr(torch, case.dtype), LAYOUTS[str(case.sizes["layout"])]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(images, channels, side, side, generator=generator)
    x = x.to(case.device, dtype).contiguous(memory_format=layout)
    inputs = [x] + [x.clone() for _ in range(1, ROTATING_BYTES // x.nbytes if case.device == "cuda" else 1)]
    weight, bias = torch.randn(2, channels, generator=generator).to(case.device, dtype)
    target = torch.empty_like(x)

    def cycle(function: Callable[[Tensor], object]) -> Callable[[], Callable[[], object]]:
        def factory() -> Callable[[], object]:
            turns = itertools.cycle(inputs)

            @torch.inference_mode()
            def run() -> object:
                return function(next(turns))

            return run

        return factory

    compiled = torch.compile(plain)
    factories = {
        "fastlatent": cycle(lambda x: group_norm_silu(x, weight, bias, groups=GROUPS, eps=EPS)),
        "torch": cycle(lambda x: plain(x, weight, bias)),
        "torch-compiled": cycle(lambda x: compiled(x, weight, bias)),
        "copy": cycle(lambda x: target.copy_(x)),
    }
    try:
        yield harness.Prepared(
            {name: factories[name] for name in case.providers},
            bytes=2 * x.nbytes,
            floor="copy",
            rivals=("torch", "torch-compiled"),
        )
    finally:
        torch.set_num_threads(threads_before)


@pytest.mark.parametrize(
    "case, provider", [(c, p) for c in CASES for p in c.providers], ids=lambda v: getattr(v, "key", v)
)
def test_group_norm_silu(benchmark, case, provider):
    with prepare(case) as prepared:
        benchmark(prepared.providers[provider]())


if __name__ == "__main__":
    harness.main(CASES, prepare)
