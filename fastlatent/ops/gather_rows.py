"""gather_rows: copy N rows from many memory-mapped shards into one preallocated batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastlatent import _native
from fastlatent.ops._library import LIBRARY

# table holds (address, rows) of every shard: passing the shards themselves as Tensor[] costs 0.8 us a shard and call
# (measured: 64 us for 64 shards, as long as copying 256 rows of 8 KiB takes).
LIBRARY.define("gather_rows(Tensor table, Tensor shard_index, Tensor row_index, Tensor(a!) out, int threads=1) -> ()")


class ShardTable:
    """Shards to gather from, checked once. It keeps them alive.

    Args:
        shards: contiguous CPU tensors [rows_s, ...] of one dtype and row shape, usually views of mapped files.

    Raises:
        ValueError: there is no shard, or one differs in row shape, dtype, device or layout.
    """

    def __init__(self, shards: Sequence[Tensor]) -> None:
        if not shards:
            raise ValueError("gather_rows: expected at least one shard, got none")
        self.shards = list(shards)
        self.row_shape, self.dtype = self.shards[0].shape[1:], self.shards[0].dtype
        for i, shard in enumerate(self.shards):
            if shard.ndim == 0 or shard.device.type != "cpu" or not shard.is_contiguous():
                raise ValueError(
                    f"gather_rows: expected contiguous CPU shards [rows, ...], got {i}: {_describe(shard)}"
                )
            if shard.shape[1:] != self.row_shape or shard.dtype != self.dtype:
                raise ValueError(
                    f"gather_rows: expected shards of one row shape and dtype, got shard 0: "
                    f"{_describe(self.shards[0])} and shard {i}: {_describe(shard)}"
                )
        self.addresses = torch.tensor([(shard.data_ptr(), shard.shape[0]) for shard in self.shards])


def gather_rows(
    shards: Sequence[Tensor] | ShardTable,
    shard_index: Tensor,
    row_index: Tensor,
    out: Tensor,
    threads: int = 1,
) -> None:
    """out[i] = shards[shard_index[i]][row_index[i]] for every i, the GIL released meanwhile.

    Args:
        shards: as for ShardTable; pass a ShardTable where many calls read the same shards.
        shard_index: int64 [N], each in [0, number of shards).
        row_index: int64 [N], each in [0, rows of its shard).
        out: contiguous CPU tensor [N, ...] of the shards' dtype and row shape; may be pinned.
        threads: how many threads copy at most, 4 MiB each at least; keep 1 where several loaders run beside each other.

    Raises:
        ValueError: a tensor's shape, dtype, device or layout is not as above, or an index is out of range
            (then `out` is unchanged).
    """
    table = shards if isinstance(shards, ShardTable) else ShardTable(shards)
    rows = len(shard_index) if shard_index.ndim == 1 else -1
    if out.shape != (rows, *table.row_shape) or out.dtype != table.dtype or not _plain(out):
        raise ValueError(
            f"gather_rows: expected out contiguous {[rows, *table.row_shape]} {table.dtype} on the CPU, "
            f"got {_describe(out)}"
        )
    for name, index in (("shard_index", shard_index), ("row_index", row_index)):
        if index.dtype != torch.int64 or index.shape != (rows,) or not _plain(index):
            raise ValueError(f"gather_rows: expected {name} contiguous int64 [N] on the CPU, got {_describe(index)}")
    if threads < 1:
        raise ValueError(f"gather_rows: expected threads >= 1, got {threads}")
    torch.ops.fastlatent.gather_rows.default(table.addresses, shard_index, row_index, out, threads)


def gather_rows_reference(
    shards: Sequence[Tensor], shard_index: Tensor, row_index: Tensor, out: Tensor, threads: int = 1
) -> None:
    """The definition of `gather_rows`; `threads` changes nothing."""
    for i, (shard, row) in enumerate(zip(shard_index.tolist(), row_index.tolist(), strict=True)):
        out[i] = shards[shard][row]


def _cpu(table: Tensor, shard_index: Tensor, row_index: Tensor, out: Tensor, threads: int = 1) -> None:
    row_bytes = out.nbytes // max(1, out.shape[0])
    try:
        _native.call(
            "cpu", "gather_rows", table.data_ptr(), table.shape[0], shard_index.data_ptr(), row_index.data_ptr(),
            out.shape[0], row_bytes, out.data_ptr(), threads,
        )  # fmt: skip
    except _native.BadIndexError:
        raise _out_of_range(table[:, 1].tolist(), shard_index.tolist(), row_index.tolist()) from None


def _out_of_range(lengths: list[int], shard_index: list[int], row_index: list[int]) -> ValueError:
    for i, (shard, row) in enumerate(zip(shard_index, row_index, strict=True)):
        if not 0 <= shard < len(lengths):
            return ValueError(f"gather_rows: shard_index[{i}] is {shard}, expected 0 to {len(lengths) - 1}")
        if not 0 <= row < lengths[shard]:
            return ValueError(
                f"gather_rows: row_index[{i}] is {row}, expected 0 to {lengths[shard] - 1} in shard {shard}"
            )
    raise AssertionError("the kernel refused an index that is in range")


def _plain(tensor: Tensor) -> bool:
    return tensor.is_cpu and tensor.is_contiguous()  # device.type makes a string: 0.4 us of the call's 9


def _describe(tensor: Tensor) -> str:
    layout = "contiguous" if tensor.is_contiguous() else f"strides {tensor.stride()}"
    return f"{list(tensor.shape)} {tensor.dtype} on {tensor.device}, {layout}"


LIBRARY.impl("gather_rows", _cpu, "CPU")


@torch.library.register_fake("fastlatent::gather_rows", lib=LIBRARY)
def _fake(table: Tensor, shard_index: Tensor, row_index: Tensor, out: Tensor, threads: int = 1) -> None:
    return None
