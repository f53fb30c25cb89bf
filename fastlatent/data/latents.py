"""A latent dataset as torch sees it: rows read from its shards; and latents drawn from their posterior."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastlatent.data.backends import RowReader, choose_backend
from fastlatent.data.loader import LatentLoader as LatentLoader  # imported from here before it had its own file
from fastlatent.ops import sample_posterior
from fastlatent.store.reader import Dataset


class LatentDataset(torch.utils.data.Dataset):
    """Map-style view of a dataset written by `fastlatent encode`.

    A sample is a dict of `moments` [F, 2C, H, W] (raw mean‖logvar as stored; F = 2 where mirrored images were
    encoded too), `label` (int64, −1 where there are no classes) and `key_hash` (int64, the hash of the sample's key).

    Args:
        path: dataset folder.
        columns: which of these to read; all by default.
        backend: how rows are read: "ram", "willneed", "pread" or "io_uring" (see `fastlatent.data.backends`); by
            default a probe of at most 0.2 s chooses before the first row is read.

    Raises:
        ValueError: the dataset is not there, damaged, of a newer format, or holds several latent shapes.
    """

    def __init__(self, path: str | Path, *, columns: Sequence[str] | None = None, backend: str | None = None) -> None:
        self.store = Dataset.open(path)
        known = (self.store.payload, "label", "key_hash")
        self.columns = known if columns is None else tuple(columns)
        unknown = set(self.columns) - set(known)
        if unknown:
            raise ValueError(f"LatentDataset: unknown columns {sorted(unknown)}; known: {', '.join(known)}")
        if len(self.store.buckets) != 1:
            shapes = [list(bucket.shape) for bucket in self.store.buckets]
            raise ValueError(f"LatentDataset: expected latents of one shape, {path} holds {shapes}")
        self.backend = backend
        self._reader: RowReader | None = None

    def __len__(self) -> int:
        return len(self.store)

    @property
    def autoencoder(self) -> dict[str, Any]:
        """Identity of the autoencoder that made the latents, and the path it had then."""
        provenance = self.store.provenance
        return {**provenance["hashed"]["vae"], "path": provenance["informational"]["vae_path"]}

    @property
    def reader(self) -> RowReader:
        """What reads the rows in this process; the first access opens every shard and chooses the back end.

        Raises:
            ValueError: a shard is missing or damaged, or the back end that was asked for cannot be used.
        """
        if self._reader is None:
            self._reader = RowReader(self.store, choose_backend(self.store, self.backend))
        return self._reader

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"LatentDataset: index {index} of {len(self)} rows")
        return self.__getitems__([index % len(self)])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        batch = self.gather(np.asarray(indices, dtype=np.int64))
        return [{name: values[i] for name, values in batch.items()} for i in range(len(indices))]

    def __reduce__(self) -> tuple[Any, ...]:
        # Mappings do not travel to spawned workers; every process opens its own.
        return functools.partial(type(self), columns=self.columns, backend=self.backend), (self.store.path,)

    def empty(self, count: int, *, pin_memory: bool = False) -> dict[str, Tensor]:
        """Uninitialised CPU tensors for `count` samples, as `gather` fills them."""
        layout: dict[str, tuple[tuple[int, ...], torch.dtype]] = {name: ((), torch.int64) for name in self.columns}
        if self.store.payload in self.columns:
            layout[self.store.payload] = (tuple(self.reader.row_shape), self.reader.dtype)
        return {
            name: torch.empty((count, *shape), dtype=dtype, pin_memory=pin_memory)
            for name, (shape, dtype) in layout.items()
        }

    def gather(
        self,
        indices: np.ndarray,
        *,
        out: dict[str, Tensor] | None = None,
        threads: int = 1,
        check_rows: bool = False,
    ) -> dict[str, Tensor]:
        """The samples `indices` (int64 [B]) as one batch of CPU tensors.

        Args:
            out: of `empty`, to be filled and returned; new tensors by default.
            threads: how many copy rows from memory.
            check_rows: hold every row against the checksum that its shard has of it.

        Raises:
            ValueError: a row cannot be read, or is damaged and `check_rows` is set.
        """
        batch = self.empty(len(indices)) if out is None else out
        for name, values in batch.items():
            if name == self.store.payload:
                shard = torch.from_numpy(self.store.shard[indices].astype(np.int64))
                row = torch.from_numpy(self.store.row[indices].astype(np.int64))
                self.reader.read(shard, row, values, threads=threads)
                if check_rows:
                    self.reader.check(indices, shard, row, values)
            else:
                column = self.store.label if name == "label" else self.store.key_hash.view(np.int64)
                values.numpy()[:] = column[indices]
        return batch


def draw_latents(moments: Tensor, key_hash: Tensor, *, seed: int, epoch: int) -> Tensor:
    """One posterior sample of each row, of the mirrored image in half of the cases where it is stored.

    Args:
        moments: [B, F, 2C, H, W], mean‖logvar.
        key_hash: int64 [B]. Choice and noise are functions of (seed, epoch, key hash) alone.
        seed, epoch: as for `fastlatent.ops.sample_posterior`, which says how.

    Returns:
        float32 [B, C, H, W] on the moments' device.
    """
    return sample_posterior(moments, key_hash.to(moments.device), seed=seed, epoch=epoch)
