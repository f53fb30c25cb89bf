"""fastlatent.ops.gather_rows against NumPy and torch: one random batch of rows from memory-mapped files.

The data (512 MiB) is in the page cache and every page is mapped before the first timed call, so this is the
cost of the copy and of finding the rows, not of the disk. Batches walk one random permutation of all rows, as
an epoch does, so the source is never in a CPU cache while the 2 to 16 MiB batch may be.

I/O per batch: read rows x row_bytes + write rows x row_bytes. The floor, "copy", is Tensor.copy_ of one
contiguous block of the same size, on the same number of threads.
"""

from __future__ import annotations

import itertools
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

# torch's OpenMP threads spin for milliseconds after each call, on a core that the next provider needs:
# gather_rows with 2 threads on 2 cores took 700 us after index_select, 345 us with this, 290 us alone.
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"

import harness
import numpy as np
import pytest
import torch

ROWS = 256
TOTAL_BYTES = 512 * 2**20
CASES = [
    harness.Case(
        "gather_rows",
        {"rows": ROWS, "row_bytes": row_bytes, "shards": shards},
        dtype="float16",
        device="cpu",
        threads=threads,
        providers=("fastlatent", "numpy", "copy") + (("torch_index_select",) if shards == 1 else ()),
    )
    # 8, 16, 64 KiB: a float16 [4, 32, 32] latent, its mean and logvar, and mean and logvar at 64 x 64.
    for row_bytes in (8 * 1024, 16 * 1024, 64 * 1024)
    for shards in (1, 64)
    for threads in (1, 2)
]


def mapped_shards(shards: int, row_bytes: int) -> list[np.ndarray]:
    """float16 arrays [rows, row_bytes / 2] mapped from files already unlinked: nothing to clean up."""
    shape = (TOTAL_BYTES // shards // row_bytes, row_bytes // 2)
    generator = np.random.default_rng(0)
    block = generator.integers(0, 0x7C00, shape, dtype=np.uint16)  # finite float16 values
    arrays = []
    with tempfile.TemporaryDirectory(prefix="fastlatent-bench-") as folder:
        for shard in range(shards):
            path = Path(folder) / f"{shard}.bin"
            (block + np.uint16(shard)).tofile(path)
            arrays.append(np.memmap(path, np.float16, "r+", shape=shape))
    for array in arrays:
        array.view(np.uint8)[:, ::1024].sum()  # maps every 4 KiB page
    return arrays


@contextmanager
def prepare(case: harness.Case) -> Iterator[harness.Prepared]:
    row_bytes, shards = int(case.sizes["row_bytes"]), int(case.sizes["shards"])
    arrays = mapped_shards(shards, row_bytes)
    tensors = [torch.from_numpy(array) for array in arrays]
    per_shard = len(arrays[0])
    order = torch.randperm(shards * per_shard, generator=torch.Generator().manual_seed(0))
    batches = order[: len(order) // ROWS * ROWS].view(-1, ROWS)
    shard_index, row_index = batches // per_shard, batches % per_shard
    out = torch.empty(ROWS, row_bytes // 2, dtype=torch.float16)

    def numbers() -> Iterator[int]:
        return itertools.cycle(range(len(batches)))

    def fastlatent() -> Callable[[], object]:
        from fastlatent.ops import ShardTable, gather_rows

        batch, table = numbers(), ShardTable(tensors)

        def run() -> None:
            i = next(batch)
            gather_rows(table, shard_index[i], row_index[i], out, case.threads)

        return run

    def numpy() -> Callable[[], object]:
        shard_numbers, row_numbers, target = shard_index.numpy(), row_index.numpy(), out.numpy()
        batch = numbers()

        def one_file() -> None:
            # take with out= spares the new array that array[rows] would allocate; "clip" spares a buffer.
            np.take(arrays[0], row_numbers[next(batch)], axis=0, out=target, mode="clip")

        def many_files() -> None:
            i = next(batch)
            for shard in np.unique(shard_numbers[i]):
                where = np.flatnonzero(shard_numbers[i] == shard)
                target[where] = arrays[shard][row_numbers[i, where]]

        return one_file if shards == 1 else many_files

    def torch_index_select() -> Callable[[], object]:
        batch = numbers()
        return lambda: torch.index_select(tensors[0], 0, row_index[next(batch)], out=out)

    def copy() -> Callable[[], object]:
        # Blocks of ROWS rows that lie side by side in a file; 64 shards of 64 KiB rows hold 128 rows each.
        step = min(ROWS, per_shard)
        blocks = itertools.cycle([t[i : i + step] for t in tensors for i in range(0, per_shard - step + 1, step)])

        def run() -> None:
            for begin in range(0, ROWS, step):
                out[begin : begin + step].copy_(next(blocks))

        return run

    factories = {
        "fastlatent": fastlatent,
        "numpy": numpy,
        "copy": copy,
        "torch_index_select": torch_index_select,
    }
    threads_before = torch.get_num_threads()
    torch.set_num_threads(case.threads)
    try:
        yield harness.Prepared(
            {name: factories[name] for name in case.providers},
            bytes=2 * ROWS * row_bytes,
            floor="copy",
            rivals=("numpy", "torch_index_select"),
        )
    finally:
        torch.set_num_threads(threads_before)


@pytest.mark.parametrize(
    "case, provider", [(c, p) for c in CASES for p in c.providers], ids=lambda v: getattr(v, "key", v)
)
def test_gather_rows(benchmark, case, provider):
    with prepare(case) as prepared:
        benchmark(prepared.providers[provider]())


if __name__ == "__main__":
    harness.main(CASES, prepare)
