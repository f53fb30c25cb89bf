"""gather_rows: copy N rows from many memory-mapped shards into one preallocated batch."""

from __future__ import annotations

import array
from collections.abc import Sequence

import torch
from torch import Tensor

from fastlatent import _native
from fastlatent.ops._library import LIBRARY

LIBRARY.define(
    "gather_rows(Tensor[] shards, Tensor shard_index, Tensor row_index, Tensor(a!) out, int threads=1) -> ()"
)


def gather_rows(
    shards: Sequence[Tensor], shard_index: Tensor, row_index: Tensor, out: Tensor, threads: int = 1
) -> None:
    """out[i] = shards[shard_index[i]][row_index[i]] for every i, the GIL released meanwhile.

    Args:
        shards: contiguous CPU tensors [rows_s, ...] of one dtype and row shape, usually views of mapped files.
        shard_index: int64 [N], each in [0, len(shards)).
        row_index: int64 [N], each in [0, rows of its shard).
        out: contiguous CPU tensor [N, ...] of the same dtype and row shape; may be pinned.
        threads: how many threads copy; keep 1 where several loaders already run beside each other.

    Raises:
        ValueError: a tensor's shape, dtype, device or layout is not as above, or an index is out of range
            (then `out` is unchanged).
    """
    if not shards:
        raise ValueError("gather_rows: expected at least one shard, got none")
    row_shape = out.shape[1:]
    for i, shard in enumerate(shards):
        if shard.shape[1:] != row_shape or shard.dtype != out.dtype or not shard.is_contiguous() or shard.is_cuda:
            raise ValueError(
                f"gather_rows: expected contiguous CPU shards [rows, {', '.join(map(str, row_shape))}] of "
                f"{out.dtype}, got shard {i}: {_describe(shard)}"
            )
    count = len(out) if out.ndim else -1
    if out.is_cuda or not out.is_contiguous():
        raise ValueError(f"gather_rows: expected a contiguous CPU batch `out`, got {_describe(out)}")
    for name, index in (("shard_index", shard_index), ("row_index", row_index)):
        if index.dtype != torch.int64 or index.shape != (count,) or not index.is_contiguous() or index.is_cuda:
            raise ValueError(
                f"gather_rows: expected {name} contiguous int64 [{count}] on the CPU, got {_describe(index)}"
            )
    if threads < 1:
        raise ValueError(f"gather_rows: expected threads >= 1, got {threads}")
    torch.ops.fastlatent.gather_rows.default(list(shards), shard_index, row_index, out, threads)


def gather_rows_reference(
    shards: Sequence[Tensor], shard_index: Tensor, row_index: Tensor, out: Tensor, threads: int = 1
) -> None:
    """The definition of `gather_rows`; `threads` changes nothing."""
    pairs = list(zip(shard_index.tolist(), row_index.tolist(), strict=True))
    if not all(0 <= shard < len(shards) and 0 <= row < len(shards[shard]) for shard, row in pairs):
        raise _out_of_range(shards, shard_index, row_index)
    for i, (shard, row) in enumerate(pairs):
        out[i] = shards[shard][row]


def _cpu(shards: list[Tensor], shard_index: Tensor, row_index: Tensor, out: Tensor, threads: int) -> None:
    addresses = array.array("q", [shard.data_ptr() for shard in shards])
    lengths = array.array("q", [shard.shape[0] for shard in shards])
    row_bytes = out.nbytes // max(1, out.shape[0])
    try:
        _native.call(
            "cpu", "gather_rows", addresses.buffer_info()[0], lengths.buffer_info()[0], len(shards),
            shard_index.data_ptr(), row_index.data_ptr(), out.shape[0], row_bytes, out.data_ptr(), threads,
        )  # fmt: skip
    except _native.BadIndexError:
        raise _out_of_range(shards, shard_index, row_index) from None


def _out_of_range(shards: Sequence[Tensor], shard_index: Tensor, row_index: Tensor) -> ValueError:
    for i, (shard, row) in enumerate(zip(shard_index.tolist(), row_index.tolist(), strict=True)):
        if not 0 <= shard < len(shards):
            return ValueError(f"gather_rows: shard_index[{i}] is {shard}, expected 0 to {len(shards) - 1}")
        if not 0 <= row < len(shards[shard]):
            return ValueError(
                f"gather_rows: row_index[{i}] is {row}, expected 0 to {len(shards[shard]) - 1} in shard {shard}"
            )
    raise AssertionError("the kernel refused an index that is in range")


def _describe(tensor: Tensor) -> str:
    layout = "contiguous" if tensor.is_contiguous() else f"strides {tensor.stride()}"
    return f"{list(tensor.shape)} {tensor.dtype} on {tensor.device}, {layout}"


LIBRARY.impl("gather_rows", gather_rows_reference, "CompositeExplicitAutograd")
LIBRARY.impl("gather_rows", _cpu, "CPU")


@torch.library.register_fake("fastlatent::gather_rows", lib=LIBRARY)
def _fake(shards: list[Tensor], shard_index: Tensor, row_index: Tensor, out: Tensor, threads: int) -> None:
    return None
