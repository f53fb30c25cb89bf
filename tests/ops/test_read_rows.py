"""read_rows against its definition, by threads and io_uring; and what populate_rows says of files that were cut."""

import errno
import mmap
import os

import pytest
import torch

from fastlatent.ops import ShardTable, gather_rows
from fastlatent.ops.read_rows import (
    FileTable,
    RowFile,
    advise_random,
    count_resident,
    io_uring_refusal,
    populate_rows,
    read_rows,
    read_rows_reference,
)

WAYS = [{"threads": 1}, {"threads": 5}, {"depth": 1}, {"depth": 3}, {"depth": 64}, {"depth": 100_000}]


def usable(way):
    if "depth" in way and (refusal := io_uring_refusal()):
        pytest.skip(f"io_uring: {refusal}")
    return way


def write(folder, rows, row_shape, dtype=torch.uint8, offset=0):
    """Files of `rows` rows each, the first of which begins at `offset`; and the rows."""
    files, tensors = [], []
    for i, count in enumerate(rows):
        tensor = torch.randint(0, 120, (count, *row_shape), generator=torch.Generator().manual_seed(i)).to(dtype)
        path = folder / f"{i}.bin"
        path.write_bytes(b"x" * offset + tensor.reshape(-1).view(torch.uint8).numpy().tobytes() + b"end")
        files.append(RowFile(path, offset, count))
        tensors.append(tensor)
    return files, tensors


def indices(rows, count, seed=1):
    pairs = torch.tensor([(s, r) for s, n in enumerate(rows) for r in range(n)])
    chosen = pairs[torch.randint(len(pairs), (count,), generator=torch.Generator().manual_seed(seed))]
    return chosen[:, 0].contiguous(), chosen[:, 1].contiguous()


@pytest.mark.parametrize("way", WAYS, ids=str)
# One byte; below, at and above a page; not a multiple of anything; two numbers of 2 bytes in one row; no byte at all.
@pytest.mark.parametrize(
    ("row_shape", "dtype"),
    [((1,), torch.uint8), ((4095,), torch.uint8), ((2, 4, 16, 16), torch.float16), ((4097,), torch.uint8),
     ((3, 7), torch.bfloat16), ((0,), torch.float32)],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("offset", [0, 4096, 13])
def test_equals_the_definition(tmp_path, way, row_shape, dtype, offset):
    rows = [9, 1, 4]
    files, tensors = write(tmp_path, rows, row_shape, dtype, offset)
    table = FileTable(files, row_shape, dtype)
    for count in (0, 1, 2, 40):
        shard, row = indices(rows, count)
        out = torch.ones((count, *row_shape), dtype=dtype)
        want, mapped = out.clone(), out.clone()
        read_rows(table, shard, row, out, **usable(way))
        read_rows_reference(table, shard, row, want)
        gather_rows(tensors, shard, row, mapped)
        assert torch.equal(out, want)
        assert torch.equal(out, mapped)


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_rows_side_by_side(tmp_path, way):
    # 300 KB a row: 3 of them are one read of at most 1 MiB. A group of rows, all rows, one row many times.
    files, (rows,) = write(tmp_path, [11], (300_000,))
    table = FileTable(files, (300_000,), torch.uint8)
    for order in ([3, 4, 5], list(range(11)), [7] * 5, [0, 1, 1, 2, 10, 9, 8]):
        out = torch.empty(len(order), 300_000, dtype=torch.uint8)
        read_rows(table, torch.zeros(len(order), dtype=torch.int64), torch.tensor(order), out, **usable(way))
        assert torch.equal(out, rows[order])


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_a_file_that_is_cut_meanwhile(tmp_path, way):
    files, _ = write(tmp_path, [8, 8], (1000,), offset=100)
    table = FileTable(files, (1000,), torch.uint8)
    os.truncate(files[1].path, 100 + 5 * 1000 + 500)  # in the middle of row 5
    out = torch.empty(5, 1000, dtype=torch.uint8)
    read_rows(table, torch.tensor([0, 0, 1, 1, 1]), torch.tensor([5, 7, 0, 1, 4]), out, **usable(way))
    for shard, row, bad in [([0, 1, 1, 1], [7, 4, 7, 5], 7), ([1, 1, 1, 1], [3, 4, 5, 6], 5)]:
        with pytest.raises(ValueError, match=rf"1.bin: row {bad}: expected it inside the file, .*repair"):
            read_rows(table, torch.tensor(shard), torch.tensor(row), out[:4], **way)


@pytest.mark.parametrize("way", [{"threads": 3}, {"depth": 8}], ids=str)
def test_a_read_that_fails(tmp_path, way):
    files, _ = write(tmp_path, [3], (10,))
    table = FileTable(files, (10,), torch.uint8)
    directory = os.open(tmp_path, os.O_RDONLY)  # EISDIR
    table.addresses[0, 0] = directory
    try:
        with pytest.raises(ValueError, match="0.bin: row 2: expected a readable file, got: Is a directory"):
            zeros = torch.zeros(1, dtype=torch.int64)
            read_rows(table, zeros, zeros + 2, torch.empty(1, 10, dtype=torch.uint8), **usable(way))
    finally:
        os.close(directory)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"out": torch.empty(3, 5)}, r"expected out contiguous \[2, 5\] torch.float32 on the CPU, got \[3, 5\]"),
        ({"out": torch.empty(2, 5).double()}, "got .* torch.float64"),
        ({"out": torch.empty(5, 2).T}, r"strides \(1, 2\)"),
        ({"shard_index": torch.zeros(2).int()}, "expected shard_index contiguous int64"),
        ({"row_index": torch.zeros(3).long()}, "expected row_index contiguous int64"),
        ({"row_index": torch.tensor([0, 4])}, r"read_rows: row_index\[1\] is 4, expected 0 to 3 in shard 0"),
        ({"row_index": torch.tensor([-1, 4])}, r"row_index\[0\] is -1"),
        ({"shard_index": torch.tensor([0, 1])}, r"shard_index\[1\] is 1, expected 0 to 0"),
        ({"threads": 0}, "expected threads >= 1 and depth >= 0, got 0 and 0"),
        ({"depth": -1}, "got 8 and -1"),
    ],
)
def test_bad_arguments(tmp_path, change, message):
    files, _ = write(tmp_path, [4], (5,), torch.float32)
    zeros = torch.zeros(2, dtype=torch.int64)
    arguments = {"shard_index": zeros, "row_index": zeros, "out": torch.empty(2, 5)} | change
    with pytest.raises(ValueError, match=message):
        read_rows(FileTable(files, (5,), torch.float32), **arguments)


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(ValueError, match="expected at least one file"):
        FileTable([], (1,), torch.uint8)
    files, _ = write(tmp_path, [1], (1,))
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ValueError, match="none: expected a readable file, got: No such file"):
        FileTable([*files, RowFile(tmp_path / "none", 0, 1)], (1,), torch.uint8)
    table = FileTable(files, (1,), torch.uint8)
    del table
    assert len(os.listdir("/proc/self/fd")) == before


def mapped(path, offset, row_shape):
    with open(path, "rb") as file:
        mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    rows = (len(mapping) - offset - 3) // row_shape[0]
    return torch.frombuffer(mapping, dtype=torch.uint8, offset=offset, count=rows * row_shape[0]).view(rows, *row_shape)


def test_populated_rows_are_in_memory(tmp_path):
    files, (rows,) = write(tmp_path, [40], (10_000,), offset=13)
    fd = os.open(files[0].path, os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)
    shard = mapped(files[0].path, 13, (10_000,))
    advise_random(shard)
    before, pages = count_resident(shard)
    assert pages in (98, 99)  # 400,000 bytes that begin at byte 13
    if before:
        pytest.skip("this file system keeps its files in memory")
    table = ShardTable([shard])
    wanted = torch.tensor([3, 4, 20, 20, 39])
    assert populate_rows(table, torch.zeros(5, dtype=torch.int64), wanted) is None
    # Rows 3 and 4 touch 6 pages, 20 and 39 three or four each; no read-ahead beyond them.
    assert 11 <= count_resident(shard)[0] <= 15
    out = torch.empty(5, 10_000, dtype=torch.uint8)
    gather_rows(table, torch.zeros(5, dtype=torch.int64), wanted, out)
    assert torch.equal(out, rows[wanted])


def test_populate_finds_a_cut_file(tmp_path):
    files, _ = write(tmp_path, [4, 40], (4096,))
    table = ShardTable([mapped(file.path, 0, (4096,)) for file in files])
    os.truncate(files[1].path, 20 * 4096)
    one = torch.ones(3, dtype=torch.int64)
    assert populate_rows(table, one, torch.tensor([19, 0, 7])) is None
    assert populate_rows(table, one, torch.tensor([19, 30, 7])) == (1, errno.EFAULT)
    assert populate_rows(table, one, torch.tensor([39, 20, 7])) == (0, errno.EFAULT)  # the first in the batch
    assert populate_rows(table, one[:0], one[:0]) is None
    with pytest.raises(ValueError, match=r"populate_rows: row_index\[0\] is 40, expected 0 to 39 in shard 1"):
        populate_rows(table, one[:1], torch.tensor([40]))


def test_io_uring_works_or_says_why():
    refusal = io_uring_refusal()
    assert refusal is None or refusal  # a sentence of the system's
