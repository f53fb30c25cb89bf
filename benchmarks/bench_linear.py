"""fastlatent.ops.linear against torch on the CPU: a product of few rows with one of 24 weights in turn.

24 weights of [4096, 1024], as the layers of a Transformer: 201 MB in bfloat16, so none waits in a cache. `bytes` counts
one weight. The floor reads as many bytes by Tensor.sum over float32 with the same threads; `torch-int8` is torch's own
product of bfloat16 rows with int8 weights (a private function of torch), the rival of int8.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import harness
import pytest
import rows as row_files
import torch
import torch.nn.functional as F

from fastlatent.ops.linear import linear, quantize_rows

N, K, WEIGHTS = 4096, 1024, 24


def make_case(rows: int, dtype: str, int8: bool) -> harness.Case:
    rivals = ("torch", "torch-compiled") if not int8 else ("torch-int8",) if dtype == "bfloat16" else ("torch",)
    sizes = {"rows": rows, "n": N, "k": K, "weight": "int8" if int8 else dtype}
    return harness.Case("linear", sizes, dtype, "cpu", ("fastlatent", *rivals, "floor"), threads=row_files.cpu_cores())


CASES = [
    make_case(rows, dtype, int8)
    for dtype, int8 in (("float32", False), ("bfloat16", False), ("bfloat16", True))
    for rows in (1, 2, 4, 8, 16, 32)
]


@contextmanager
def prepare(case: harness.Case) -> Iterator[harness.Prepared]:
    threads_before = torch.get_num_threads()
    torch.set_num_threads(case.threads)
    torch.compiler.reset()
    dtype, int8 = getattr(torch, case.dtype), case.sizes["weight"] == "int8"
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(int(case.sizes["rows"]), K, generator=generator).to(dtype)
    weights = [torch.randn(N, K, generator=generator).mul_(0.02).to(dtype) for _ in range(WEIGHTS)]
    packed = [quantize_rows(weight) for weight in weights] if int8 else [(weight, None) for weight in weights]
    size = N * K * packed[0][0].itemsize
    buffer = torch.ones(WEIGHTS * size // 4)
    parts = buffer.split(size // 4)

    def cycle(function: Callable, arguments: list, first: int = 0) -> Callable[[], Callable[[], object]]:
        # Each begins at a weight of its own: in step, one would find in the cache what the one before it has read.
        def factory() -> Callable[[], object]:
            turns = itertools.cycle(arguments[first:] + arguments[:first])

            @torch.inference_mode()
            def run() -> object:
                return function(*next(turns))

            return run

        return factory

    factories = {
        "fastlatent": cycle(lambda weight, scale: linear(x, weight, scale=scale), packed),
        "torch": cycle(F.linear, [(x, weight) for weight in weights], WEIGHTS // 3),
        "torch-compiled": cycle(torch.compile(F.linear), [(x, weight) for weight in weights], 2 * WEIGHTS // 3),
        "floor": cycle(torch.Tensor.sum, [(part,) for part in parts]),
    }
    if int8:
        scales = [(x, weight, scale.to(dtype)) for weight, scale in packed]
        factories["torch-int8"] = cycle(torch._weight_int8pack_mm, scales, WEIGHTS // 2)
    try:
        yield harness.Prepared(
            {name: factories[name] for name in case.providers},
            bytes=size,
            flops=2 * len(x) * N * K,
            floor="floor",
            rivals=[name for name in case.providers if name.startswith("torch")],
        )
    finally:
        torch.set_num_threads(threads_before)


@pytest.mark.parametrize(
    "case, provider", [(c, p) for c in CASES for p in c.providers], ids=lambda v: getattr(v, "key", v)
)
def test_linear(benchmark, case, provider):
    with prepare(case) as prepared:
        benchmark(prepared.providers[provider]())


if __name__ == "__main__":
    harness.main(CASES, prepare)
