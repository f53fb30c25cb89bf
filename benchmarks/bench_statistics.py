"""fastlatent.store's statistics of stored rows, and its search for NaN and infinity, against NumPy.

Rows lie in memory, 32 MiB of them: more than the caches of one core hold. "numpy" is float64 arithmetic on chunks of
1 MiB (merging them is left out), and for finite rows isfinite. One thread.

I/O per call: read all rows. The floor, "copy", is one copy of them into a buffer by one thread.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import harness
import numpy as np
import pytest

# Twice as many rows of float16: 32 MiB of either.
SHAPES = {"latents": (1024, 2, 4, 32, 32), "moments": (512, 2, 8, 32, 32), "tokens": (14, 1, 1568, 384)}
CHUNK_BYTES = 1 << 20
CASES = [
    harness.Case(benchmark, {"rows": payload}, dtype, device="cpu", providers=("fastlatent", "numpy", "copy"))
    for benchmark, payloads in (("row_statistics", SHAPES), ("finite_rows", ("latents",)))
    for payload in payloads
    for dtype in ("float32", "float16")
]


def chunk_statistics(values: np.ndarray, has_logvar: bool) -> tuple[np.ndarray, ...]:
    """mean, m2, posterior variance, minimum and maximum of the channels of values [n, F, C or 2C, positions]."""
    wide = values.astype(np.float64)
    means, logvars = np.split(wide, 2, axis=2) if has_logvar else (wide, None)
    axes = (0, 1, 3)
    mean = means.mean(axis=axes)
    variance = np.zeros_like(mean) if logvars is None else np.exp(np.clip(logvars, -30, 20)).mean(axis=axes)
    m2 = np.square(means - mean[:, None]).sum(axis=axes)
    return mean, m2, variance, means.min(axis=axes), means.max(axis=axes)


def numpy_statistics(values: np.ndarray, payload: str) -> list[tuple[np.ndarray, ...]]:
    """Of every chunk; merging them is left out."""
    flat = values.reshape(-1, 1, values.shape[-1], 1) if payload == "tokens" else values.reshape(*values.shape[:3], -1)
    step = max(1, CHUNK_BYTES // flat[0].nbytes)
    return [chunk_statistics(flat[i : i + step], payload == "moments") for i in range(0, len(flat), step)]


@contextmanager
def prepare(case: harness.Case) -> Iterator[harness.Prepared]:
    payload = str(case.sizes["rows"])
    rows, *row = SHAPES[payload]
    shape = (2 * rows if case.dtype == "float16" else rows, *row)
    values = np.random.default_rng(0).standard_normal(shape, np.float32).astype(case.dtype)
    out, kind = np.empty_like(values), {"float32": "F32", "float16": "F16"}[case.dtype]

    def fastlatent() -> Callable[[], object]:
        from fastlatent.store import rows, statistics

        if case.benchmark == "finite_rows":
            return functools.partial(rows.finite_rows, values, kind)
        statistics.THREADS = case.threads
        return functools.partial(statistics.Statistics.of, values, kind, payload)

    def numpy() -> Callable[[], object]:
        if case.benchmark == "finite_rows":
            return lambda: np.array([np.isfinite(row).all() for row in values])
        return functools.partial(numpy_statistics, values, payload)

    def copy() -> Callable[[], object]:
        return functools.partial(np.copyto, out, values)

    yield harness.Prepared(
        {"fastlatent": fastlatent, "numpy": numpy, "copy": copy}, bytes=values.nbytes, floor="copy", rivals=("numpy",)
    )


@pytest.mark.parametrize(
    "case, provider", [(c, p) for c in CASES for p in c.providers], ids=lambda v: getattr(v, "key", v)
)
def test_statistics(benchmark, case, provider):
    with prepare(case) as prepared:
        benchmark(prepared.providers[provider]())


if __name__ == "__main__":
    harness.main(CASES, prepare)
