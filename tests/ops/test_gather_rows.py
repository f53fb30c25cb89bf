"""gather_rows against its definition, at every edge of shards, rows and threads."""

import gc
import itertools
import mmap
import threading
import time

import pytest
import torch

from fastlatent import _native
from fastlatent.ops import ShardTable, gather_rows
from fastlatent.ops.gather_rows import gather_rows_reference

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool]
# Row shapes: one number; 1 channel; below, at and above a cache line of 64 bytes for some dtype; above the 512
# bytes that are prefetched; a latent; rows of zero numbers.
ROW_SHAPES = [(), (1,), (7,), (64,), (65,), (5, 200), (2, 4, 3, 3), (0,), (3, 0)]


def shards(rows, row_shape, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 120, (n, *row_shape), generator=generator).to(dtype) for n in rows]


def indices(rows, count, seed=1):
    generator = torch.Generator().manual_seed(seed)
    pairs = torch.tensor([(s, r) for s, n in enumerate(rows) for r in range(n)])
    chosen = pairs[torch.randint(len(pairs), (count,), generator=generator)]
    return chosen[:, 0].contiguous(), chosen[:, 1].contiguous()


def check(tables, shard, row, threads=1):
    out = torch.full((len(shard), *tables[0].shape[1:]), 1).to(tables[0].dtype)
    want = out.clone()
    gather_rows(tables, shard, row, out, threads)
    gather_rows_reference(tables, shard, row, want)
    assert torch.equal(out, want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("row_shape", ROW_SHAPES, ids=str)
def test_equals_the_definition(dtype, row_shape):
    rows = [5, 1, 0, 3]  # the third shard has no row
    tables = shards(rows, row_shape, dtype)
    # 0 and 1 rows; 2 and 3: fewer than the copy looks ahead, and as many and one; 40: rows occur several times.
    for count, threads in itertools.product((0, 1, 2, 3, 40), (1, 2, 5)):
        check(tables, *indices(rows, count), threads)


@pytest.mark.parametrize("threads", [1, 2, 5, 8, 1000])  # more threads than rows
def test_threads_change_nothing(threads):
    rows = [100, 28]
    check(shards(rows, (300,), torch.float32), *indices(rows, 7), threads)
    check(shards(rows, (300,), torch.float32), *indices(rows, 500), threads)


def test_one_shard_and_many():
    check(shards([3], (4,), torch.float32), *indices([3], 5))
    rows = [1 + i % 3 for i in range(300)]
    check(shards(rows, (4,), torch.float16), *indices(rows, 1000), 2)


def test_rows_at_both_ends_of_every_shard():
    tables = shards([4, 1, 2], (9,), torch.float32)
    check(tables, torch.tensor([0, 0, 1, 2, 2]), torch.tensor([0, 3, 0, 0, 1]))


def test_into_a_part_of_a_larger_batch():
    tables = shards([4], (3,), torch.float32)
    whole = torch.full((6, 3), -1.0)
    gather_rows(tables, torch.tensor([0, 0]), torch.tensor([1, 2]), whole[2:4])
    assert torch.equal(whole[2:4], tables[0][1:3])
    assert (whole[:2] == -1).all()
    assert (whole[4:] == -1).all()


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(
    ("shard", "row", "message"),
    [
        ([0, 0, 2], [0, 1, 0], r"shard_index\[2\] is 2, expected 0 to 1"),
        ([-1, 0, 0], [0, 1, 0], r"shard_index\[0\] is -1, expected 0 to 1"),
        ([0, 0, 0], [0, 4, 0], r"row_index\[1\] is 4, expected 0 to 3 in shard 0"),
        ([0, 1, 0], [0, 1, 0], r"row_index\[1\] is 1, expected 0 to 0 in shard 1"),
        ([0, 0, 0], [0, 0, -1], r"row_index\[2\] is -1, expected 0 to 3 in shard 0"),
        ([0, 0, 2**62], [0, 0, 0], r"shard_index\[2\] is 4611686018427387904"),
        ([0, 0, 0], [0, 0, -(2**63)], r"row_index\[2\] is -9223372036854775808"),
    ],
)
def test_an_index_out_of_range_writes_nothing(shard, row, message, threads):
    tables = shards([4, 1], (5,), torch.float32)
    out = torch.full((3, 5), -1.0)
    with pytest.raises(ValueError, match=message):
        gather_rows(tables, torch.tensor(shard), torch.tensor(row), out, threads)
    assert (out == -1).all()


def test_an_empty_shard_has_no_row_0():
    tables = shards([0, 2], (5,), torch.float32)
    with pytest.raises(ValueError, match=r"row_index\[0\] is 0, expected 0 to -1 in shard 0"):
        gather_rows(tables, torch.tensor([0]), torch.tensor([0]), torch.empty(1, 5))


ZEROS = torch.zeros(2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"out": torch.empty(3, 5)}, r"expected out contiguous \[2, 5\]"),
        ({"out": torch.empty(2, 6)}, r"expected out contiguous \[2, 5\]"),
        ({"out": torch.empty(2, 5, 1)}, r"expected out contiguous \[2, 5\]"),
        ({"out": torch.empty(2, 5, dtype=torch.float64)}, "torch.float32 on the CPU, got"),
        ({"out": torch.empty(5, 2).T}, r"strides \(1, 2\)"),
        ({"out": torch.empty(2, 5, device="meta")}, "on meta"),
        ({"shard_index": ZEROS.int()}, "expected shard_index contiguous int64"),
        ({"row_index": ZEROS.int()}, "expected row_index contiguous int64"),
        ({"row_index": torch.zeros(3, dtype=torch.int64)}, "expected row_index contiguous int64"),
        ({"row_index": torch.zeros(4, dtype=torch.int64)[::2]}, r"strides \(2,\)"),
        ({"shard_index": torch.zeros(2, 1, dtype=torch.int64)}, "gather_rows: expected"),
        ({"shard_index": torch.tensor(0)}, "gather_rows: expected"),
        ({"threads": 0}, "expected threads >= 1, got 0"),
        ({"threads": -1}, "expected threads >= 1, got -1"),
    ],
)
def test_bad_arguments(change, message):
    arguments = {"shard_index": ZEROS, "row_index": ZEROS, "out": torch.empty(2, 5)} | change
    with pytest.raises(ValueError, match=message):
        gather_rows(shards([4], (5,), torch.float32), **arguments)


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ([], "expected at least one shard, got none"),
        ([torch.tensor(1.0)], r"expected contiguous CPU shards \[rows, ...\], got 0: \[\]"),
        ([torch.zeros(2, 3), torch.zeros(3, 2).T], r"got 1: \[2, 3\] torch.float32 on cpu, strides"),
        ([torch.zeros(2, 3), torch.zeros(2, 4)], r"got shard 0: \[2, 3\] .* and shard 1: \[2, 4\]"),
        ([torch.zeros(2, 3), torch.zeros(2, 3).half()], "one row shape and dtype"),
        ([torch.zeros(2, 3), torch.zeros(2)], "one row shape and dtype"),
        ([torch.zeros(2, 3, device="meta")], "on meta"),
    ],
)
def test_bad_shards(tables, message):
    with pytest.raises(ValueError, match=message):
        ShardTable(tables)


def test_mapped_files(tmp_path):
    want = torch.randn(10, 33)
    path = tmp_path / "rows"
    path.write_bytes(b"x" * 12 + want.numpy().tobytes())  # rows do not begin at a multiple of their alignment
    with open(path, "rb") as file:
        mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    shard = torch.frombuffer(mapping, dtype=torch.float32, offset=12).view(10, 33)
    row = torch.tensor([9, 0, 4, 4])
    out = torch.empty(4, 33)
    gather_rows([shard], torch.zeros(4, dtype=torch.int64), row, out, 2)
    assert torch.equal(out, want[row])


def test_a_table_keeps_its_shards_alive():
    table = ShardTable(shards([1000, 1000], (100,), torch.float32))
    want = [shard.clone() for shard in table.shards]
    gc.collect()
    _ = [torch.zeros(1000, 100) for _ in range(20)]  # would take the memory over if it were free
    shard, row = indices([1000, 1000], 64)
    out = torch.empty(64, 100)
    gather_rows(table, shard, row, out)
    expected = torch.empty(64, 100)
    gather_rows_reference(want, shard, row, expected)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("threads", [1, 2])
def test_opcheck(threads):
    table = ShardTable(shards([3, 2], (4,), torch.float32))
    shard, row = indices([3, 2], 6)
    arguments = (table.addresses, shard, row, torch.zeros(6, 4), threads)
    torch.library.opcheck(torch.ops.fastlatent.gather_rows.default, arguments)


def test_the_compiled_kernel_is_what_runs(monkeypatch):
    called = []
    original = _native.call
    monkeypatch.setattr(_native, "call", lambda *args: called.append(args[:2]) or original(*args))
    check(shards([3], (4,), torch.float32), *indices([3], 2))
    assert called == [("cpu", "gather_rows")]


def test_other_threads_of_python_go_on_meanwhile():
    table = ShardTable([torch.zeros(1024, 64 * 1024)])  # 256 MiB of rows of 256 KiB
    row = torch.arange(1024).repeat(2)
    out = torch.empty(2048, 64 * 1024)
    ticks, stop = [], threading.Event()

    def tick():
        while not stop.is_set():
            ticks.append(time.perf_counter())
            time.sleep(0.0005)

    thread = threading.Thread(target=tick)
    thread.start()
    try:
        time.sleep(0.01)
        begin = time.perf_counter()
        gather_rows(table, torch.zeros(2048, dtype=torch.int64), row, out)
        end = time.perf_counter()
    finally:
        stop.set()
        thread.join()
    assert end - begin > 0.02  # long enough to judge
    # With the GIL held there would be none strictly inside.
    inside = [t for t in ticks if begin + 0.005 < t < end - 0.005]
    assert len(inside) >= 3
