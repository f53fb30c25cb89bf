"""Further tensors and ragged rows of a batch, copied from the mapped shards: small beside the payload's rows."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fastlatent.store.reader import Dataset
from fastlatent.store.rows import row_digest
from fastlatent.store.shard import DTYPES


def torch_dtype(name: str) -> torch.dtype:
    """Of a column as the format names it; BF16 is torch.bfloat16."""
    return torch.bfloat16 if name == "BF16" else torch.from_numpy(np.empty(0, DTYPES[name])).dtype


def gather_column(store: Dataset, name: str, indices: np.ndarray, out: Tensor) -> None:
    """out[i] = `name` of sample indices[i]."""
    shards, rows = store.shard[indices], store.row[indices]
    filled = _bits(out)
    for shard in np.unique(shards).tolist():
        here = shards == shard
        filled[here] = store.open_shard(shard).columns[name][rows[here]]


def gather_ragged(store: Dataset, name: str, indices: np.ndarray, of: str) -> tuple[Tensor, Tensor]:
    """`name` of these samples one after another, [total, ...], and int64 [B+1] where each begins (`of` tells)."""
    parts = []
    for shard, row in zip(store.shard[indices].tolist(), store.row[indices].tolist(), strict=True):
        parts.append(store.open_shard(shard).row(name, row, of))
    offsets = np.zeros(len(parts) + 1, np.int64)
    np.cumsum([len(part) for part in parts], out=offsets[1:])
    if not parts:
        raise ValueError(f"gather: expected one sample or more where `{name}` differs in length, got none")
    dtype = store.open_shard(int(store.shard[indices[0]])).dtypes[name]
    values = torch.from_numpy(np.concatenate(parts))
    return values.view(torch.bfloat16) if dtype == "BF16" else values, torch.from_numpy(offsets)


def check_tokens(store: Dataset, indices: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """int64 [B]: where the tokens of samples indices[i] begin, counted over their shard; each has all of tokens[i].

    Raises:
        ValueError: one has not.
    """
    if len(indices) != len(tokens):
        raise ValueError(f"gather_tokens: expected tokens of {len(indices)} samples, got of {len(tokens)}")
    rows = store.row[indices].astype(np.int64)
    first, lengths = np.empty_like(rows), np.empty_like(rows)
    shards = store.shard[indices]
    for number in np.unique(shards).tolist():
        here, columns = shards == number, store.open_shard(number).columns
        offsets = columns.get(f"{store.payload}.offsets")
        if offsets is None:
            lengths[here] = columns[store.payload].shape[2]
            first[here] = rows[here] * lengths[here]
        else:
            first[here] = offsets[rows[here]]
            lengths[here] = offsets[rows[here] + 1].astype(np.int64) - first[here]
    wrong = (tokens < 0) | (tokens >= lengths[:, None])
    if wrong.any():
        i, j = (int(place[0]) for place in np.nonzero(wrong))
        raise ValueError(
            f"gather_tokens: sample {int(indices[i])} ({store.key(int(indices[i]))!r}): expected tokens from 0 to "
            f"{int(lengths[i]) - 1}, got {int(tokens[i, j])}: was the mask made for another grid?"
        )
    return first


def gather_token_scales(store: Dataset, indices: np.ndarray, tokens: np.ndarray, out: Tensor) -> None:
    """out[i, j] = the scale of token tokens[i, j] of sample indices[i], which has it."""
    shards, rows = store.shard[indices], store.row[indices].astype(np.int64)
    filled = out.numpy()
    for number in np.unique(shards).tolist():
        here, columns = shards == number, store.open_shard(number).columns
        scale, offsets = columns[f"{store.payload}.scale"], columns.get(f"{store.payload}.offsets")
        if offsets is not None:
            filled[here] = scale[offsets[rows[here]].astype(np.int64)[:, None] + tokens[here]]
        elif scale.ndim == 2:  # one for the whole row
            filled[here] = scale[rows[here]]
        else:
            filled[here] = scale[rows[here][:, None], 0, tokens[here]]


def check_row_digests(store: Dataset, indices: np.ndarray, batch: dict[str, Tensor]) -> None:
    """Hold every row of a batch against the xxh3_64 that its shard has of it: 0.6 us for 32 KiB.

    Raises:
        ValueError: a row is damaged.
    """
    payload, scale, offsets = batch[store.payload], batch.get("scale"), batch.get(f"{store.payload}.offsets")
    if scale is None and store.buckets[0].dtype == "I8":
        raise ValueError("check_rows: expected `scale` among the columns, since an int8 row's checksum covers it")

    def row(values: Tensor, i: int) -> np.ndarray:
        part = values[i] if offsets is None else values[int(offsets[i]) : int(offsets[i + 1])]
        return part.reshape(-1).view(torch.uint8).numpy()

    for i, sample in enumerate(indices.tolist()):
        number, at = int(store.shard[sample]), int(store.row[sample])
        shard = store.open_shard(number)
        found = row_digest(*(row(values, i) for values in (payload, scale) if values is not None))
        expected = int(shard.columns["row_xxh3"][at])
        if found != expected:
            raise ValueError(
                f"{shard.path}: row {at} ({store.key(sample)!r}): expected xxh3_64 {expected:016x}, got {found:016x}: "
                f"the shard is damaged; `fastlatent repair {store.path}` drops it, the same `encode` makes it again"
            )


def _bits(tensor: Tensor) -> np.ndarray:
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
