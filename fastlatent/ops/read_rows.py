"""read_rows: read N rows of many files into one preallocated batch, by threads or io_uring; populate mapped rows."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fastlatent import _native
from fastlatent.ops.gather_rows import ShardTable


@dataclass(frozen=True)
class RowFile:
    """Where the rows of one file lie: `rows` of them, one after the other, from byte `offset`."""

    path: Path
    offset: int
    rows: int


class FileTable:
    """Files to read rows from, open until the table goes. Nothing is mapped.

    Args:
        files: at least one.
        row_shape, dtype: of every row.

    Raises:
        ValueError: there is no file, or one cannot be opened.
    """

    def __init__(self, files: Sequence[RowFile], row_shape: Sequence[int], dtype: torch.dtype) -> None:
        self._fds: list[int] = []
        if not files:
            raise ValueError("read_rows: expected at least one file, got none")
        self.files = list(files)
        self.row_shape, self.dtype = tuple(row_shape), dtype
        try:
            for file in self.files:
                self._fds.append(os.open(file.path, os.O_RDONLY | os.O_CLOEXEC))
        except OSError as error:
            self.close()
            hint = "; raise the limit with `ulimit -n 65536`" if error.errno == errno.EMFILE else ""
            raise ValueError(f"{file.path}: expected a readable file, got: {error.strerror}{hint}") from None
        self.addresses = torch.tensor(
            [(fd, f.offset, f.rows) for fd, f in zip(self._fds, self.files, strict=True)], dtype=torch.int64
        )

    def close(self) -> None:
        """Close the files; the table is of no use afterwards."""
        while self._fds:
            os.close(self._fds.pop())

    def __del__(self) -> None:
        self.close()


def read_rows(
    table: FileTable, shard_index: Tensor, row_index: Tensor, out: Tensor, *, threads: int = 8, depth: int = 0
) -> None:
    """out[i] = row row_index[i] of table.files[shard_index[i]] for every i, the GIL released meanwhile.

    Rows that follow each other in a file and in `out` are read together, up to 1 MiB.

    Args:
        shard_index: int64 [N], each in [0, number of files).
        row_index: int64 [N], each in [0, rows of its file).
        out: contiguous CPU tensor [N, ...] of the table's row shape and dtype; may be pinned.
        threads: how many threads call pread.
        depth: 0 for the threads; else the reads under way at once in one io_uring.

    Raises:
        ValueError: a tensor is not as above, an index is out of range, or a row could not be read: the file was cut
            after the table was made, or the disk failed. `out` then holds anything.
        RuntimeError: the kernel, or a container's seccomp filter, refuses io_uring.
    """
    check_rows(table.row_shape, table.dtype, shard_index, row_index, out, "read_rows")
    if threads < 1 or depth < 0:
        raise ValueError(f"read_rows: expected threads >= 1 and depth >= 0, got {threads} and {depth}")
    failure = torch.empty(2, dtype=torch.int64)
    row_bytes = out.nbytes // max(1, out.shape[0])
    try:
        _native.call(
            "cpu", "read_rows", table.addresses.data_ptr(), len(table.files), shard_index.data_ptr(),
            row_index.data_ptr(), out.shape[0], row_bytes, out.data_ptr(), threads, depth, failure.data_ptr(),
        )  # fmt: skip
    except _native.BadIndexError:
        raise _out_of_range([file.rows for file in table.files], shard_index, row_index, "read_rows") from None
    position, code = failure.tolist()
    if position < 0:
        return
    if position == out.shape[0]:
        raise RuntimeError(f"read_rows: io_uring is refused here: {os.strerror(code)}")
    raise unreadable(table.files[int(shard_index[position])].path, int(row_index[position]), code)


def io_uring_refusal() -> str | None:
    """Why io_uring cannot be used here, or None where it can: old kernels and many containers' seccomp refuse it."""
    none = torch.zeros(1, dtype=torch.int64)
    failure, one = torch.empty(2, dtype=torch.int64), torch.empty(1, dtype=torch.uint8)
    # One byte of the null device, which is at its end at once: the ring is made and used.
    fd = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    try:
        files = torch.tensor([(fd, 0, 1)])
        _native.call(
            "cpu", "read_rows", files.data_ptr(), 1, none.data_ptr(), none.data_ptr(), 1, 1, one.data_ptr(), 1, 1,
            failure.data_ptr(),
        )  # fmt: skip
    finally:
        os.close(fd)
    position, code = failure.tolist()
    return None if (position, code) == (0, 0) else os.strerror(code)


def read_rows_reference(
    table: FileTable, shard_index: Tensor, row_index: Tensor, out: Tensor, *, threads: int = 8, depth: int = 0
) -> None:
    """The definition of `read_rows`; threads and depth change nothing."""
    row_bytes = out.nbytes // max(1, out.shape[0])
    for i, (shard, row) in enumerate(zip(shard_index.tolist(), row_index.tolist(), strict=True)):
        file = table.files[shard]
        with open(file.path, "rb") as opened:
            opened.seek(file.offset + row * row_bytes)
            data = bytearray(opened.read(row_bytes))
        if data:
            out[i] = torch.frombuffer(data, dtype=out.dtype).view(out.shape[1:])


def populate_rows(table: ShardTable, shard_index: Tensor, row_index: Tensor) -> tuple[int, int] | None:
    """Bring the pages of mapped rows into memory, the whole batch asked for before any of it is waited for.

    Args:
        table, shard_index, row_index: as for gather_rows.

    Returns:
        None, or (position in the batch, errno) of a row that cannot be read, so that nobody touches it and dies of
        SIGBUS: EFAULT where its file was cut. Before Linux 5.14 nothing is waited for and nothing found.

    Raises:
        ValueError: an index is not int64 [N], or out of range.
    """
    rows = len(shard_index) if shard_index.ndim == 1 else -1
    check_index(rows, shard_index, row_index, "populate_rows")
    failure = torch.empty(2, dtype=torch.int64)
    row_bytes = table.row_shape.numel() * table.dtype.itemsize
    try:
        _native.call(
            "cpu", "populate_rows", table.addresses.data_ptr(), len(table.shards), shard_index.data_ptr(),
            row_index.data_ptr(), rows, row_bytes, failure.data_ptr(),
        )  # fmt: skip
    except _native.BadIndexError:
        lengths = [len(shard) for shard in table.shards]
        raise _out_of_range(lengths, shard_index, row_index, "populate_rows") from None
    position, code = failure.tolist()
    return None if position < 0 else (position, code)


def count_resident(mapped: Tensor) -> tuple[int, int]:
    """(pages in memory, pages) of a tensor over a mapped file.

    Linux tells everything resident to whoever neither owns nor may write the file.
    """
    counts = torch.empty(2, dtype=torch.int64)
    _native.call("cpu", "count_resident", mapped.data_ptr(), mapped.nbytes, counts.data_ptr())
    inside, pages = counts.tolist()
    return inside, pages


def advise_random(mapped: Tensor) -> None:
    """No read-ahead in a tensor over a mapped file: with 8 MiB of it a random row of 16 KiB reads 300 times as much."""
    _native.call("cpu", "advise_random", mapped.data_ptr(), mapped.nbytes)


def unreadable(path: Path, row: int, code: int) -> ValueError:
    """The error for a row that cannot be read; `code` is the errno, 0 or EFAULT where the file ends before it."""
    if code in (0, errno.EFAULT):
        return ValueError(
            f"{path}: row {row}: expected it inside the file, got the file's end: the file was cut after it was "
            "opened; `fastlatent repair` drops its shard, the same `encode` makes it again"
        )
    return ValueError(f"{path}: row {row}: expected a readable file, got: {os.strerror(code)}")


def check_rows(
    row_shape: Sequence[int], dtype: torch.dtype, shard_index: Tensor, row_index: Tensor, out: Tensor, name: str
) -> None:
    """Raise ValueError unless `out` and the indices fit each other and the rows."""
    rows = len(shard_index) if shard_index.ndim == 1 else -1
    if out.shape != (rows, *row_shape) or out.dtype != dtype or not out.is_contiguous() or out.device.type != "cpu":
        raise ValueError(
            f"{name}: expected out contiguous {[rows, *row_shape]} {dtype} on the CPU, "
            f"got {list(out.shape)} {out.dtype} on {out.device}, strides {out.stride()}"
        )
    check_index(rows, shard_index, row_index, name)


def check_index(rows: int, shard_index: Tensor, row_index: Tensor, name: str) -> None:
    for what, index in (("shard_index", shard_index), ("row_index", row_index)):
        if index.dtype != torch.int64 or index.shape != (rows,) or not index.is_contiguous() or index.is_cuda:
            raise ValueError(
                f"{name}: expected {what} contiguous int64 [N] on the CPU, got {list(index.shape)} {index.dtype} on "
                f"{index.device}, strides {index.stride()}"
            )


def _out_of_range(lengths: list[int], shard_index: Tensor, row_index: Tensor, name: str) -> ValueError:
    for i, (shard, row) in enumerate(zip(shard_index.tolist(), row_index.tolist(), strict=True)):
        if not 0 <= shard < len(lengths):
            return ValueError(f"{name}: shard_index[{i}] is {shard}, expected 0 to {len(lengths) - 1}")
        if not 0 <= row < lengths[shard]:
            return ValueError(f"{name}: row_index[{i}] is {row}, expected 0 to {lengths[shard] - 1} in shard {shard}")
    raise AssertionError("the kernel refused an index that is in range")
