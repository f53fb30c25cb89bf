"""Batches from a latent dataset: rows gathered from mapped shards, latents drawn from their posterior."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastlatent.data.order import BatchOrder
from fastlatent.diffusion.noise import philox
from fastlatent.ops import ShardTable, gather_rows
from fastlatent.store.reader import Dataset

COLUMNS = ("moments", "label", "key_hash")


class LatentDataset(torch.utils.data.Dataset):
    """Map-style view of a dataset written by `fastlatent encode`.

    A sample is a dict of `moments` [F, 2C, H, W] (raw mean‖logvar as stored; F = 2 where mirrored images were
    encoded too), `label` (int64, −1 where there are no classes) and `key_hash` (int64, the hash of the sample's key).

    Args:
        path: dataset folder.
        columns: which of these to read; all by default.

    Raises:
        ValueError: the dataset is not there, damaged, of a newer format, or holds several latent shapes.
    """

    def __init__(self, path: str | Path, *, columns: Sequence[str] | None = None) -> None:
        self.columns = tuple(COLUMNS if columns is None else columns)
        unknown = set(self.columns) - set(COLUMNS)
        if unknown:
            raise ValueError(f"LatentDataset: unknown columns {sorted(unknown)}; known: {', '.join(COLUMNS)}")
        self.store = Dataset.open(path)
        if len(self.store.buckets) != 1:
            shapes = [list(bucket.shape) for bucket in self.store.buckets]
            raise ValueError(f"LatentDataset: expected latents of one shape, {path} holds {shapes}")
        self._table: ShardTable | None = None

    def __len__(self) -> int:
        return len(self.store)

    @property
    def autoencoder(self) -> dict[str, Any]:
        """Identity of the autoencoder that made the latents, and the path it had then."""
        provenance = self.store.provenance
        return {**provenance["hashed"]["vae"], "path": provenance["informational"]["vae_path"]}

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"LatentDataset: index {index} of {len(self)} rows")
        return self.__getitems__([index % len(self)])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        batch = self.gather(np.asarray(indices, dtype=np.int64))
        return [{name: values[i] for name, values in batch.items()} for i in range(len(indices))]

    def __reduce__(self) -> tuple[Any, ...]:
        # Mappings do not travel to spawned workers; every process opens its own.
        return functools.partial(type(self), columns=self.columns), (self.store.path,)

    def gather(self, indices: np.ndarray, *, pin_memory: bool = False, threads: int = 1) -> dict[str, Tensor]:
        """The rows `indices` (int64 [B]) as one batch of CPU tensors."""
        batch: dict[str, Tensor] = {}
        if "moments" in self.columns:
            table = self._shards()
            moments = torch.empty((len(indices), *table.row_shape), dtype=table.dtype, pin_memory=pin_memory)
            shard = torch.from_numpy(self.store.shard[indices].astype(np.int64))
            row = torch.from_numpy(self.store.row[indices].astype(np.int64))
            gather_rows(table, shard, row, moments, threads)
            batch["moments"] = moments
        if "label" in self.columns:
            batch["label"] = torch.from_numpy(self.store.label[indices])
        if "key_hash" in self.columns:
            batch["key_hash"] = torch.from_numpy(self.store.key_hash[indices].view(np.int64))
        return batch

    def _shards(self) -> ShardTable:
        if self._table is None:
            tensors = []
            for i in range(len(self.store.shards)):
                shard = self.store.open_shard(i)
                tensor = torch.from_numpy(shard.columns["moments"])
                # numpy has no bfloat16: the store hands out its bits.
                tensors.append(tensor.view(torch.bfloat16) if shard.dtypes["moments"] == "BF16" else tensor)
            self._table = ShardTable(tensors)
        return self._table


class LatentLoader:
    """Shuffled batches of a LatentDataset. Iterating goes on where it stopped, to the end of the epoch.

    The sequence of batches depends on (dataset, batch_size, seed) alone: not on ranks, and not on interruptions.

    Args:
        dataset: what to read.
        batch_size: samples per step over all ranks.
        seed: of the order.
        device: where batches go; with a CUDA device they are staged in pinned memory.
        rank, world_size: this process reads every world_size-th sample of each batch.
    """

    def __init__(
        self,
        dataset: LatentDataset,
        batch_size: int,
        *,
        seed: int = 0,
        device: torch.device | str | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.dataset = dataset
        self.device = torch.device(device or "cpu")
        self.order = BatchOrder(len(dataset), batch_size, seed=seed, rank=rank, world_size=world_size)
        self.step = 0

    def __len__(self) -> int:
        """Steps per epoch."""
        return self.order.steps_per_epoch

    def __iter__(self) -> Iterator[dict[str, Any]]:
        epoch = self.step // len(self)
        while self.step // len(self) == epoch:
            batch = self.batch(self.step)
            self.step += 1
            yield batch

    def batch(self, step: int) -> dict[str, Any]:
        """The batch of a step counted from 0: the dataset's columns, and `epoch` (int)."""
        epoch, indices = self.order.indices(step)
        on_gpu = self.device.type == "cuda"
        batch: dict[str, Any] = self.dataset.gather(indices, pin_memory=on_gpu)
        return {name: value.to(self.device, non_blocking=on_gpu) for name, value in batch.items()} | {"epoch": epoch}

    def state_dict(self) -> dict[str, int]:
        """Where the loader stands."""
        return {"seed": self.order.seed, "batch_size": self.order.batch_size, "step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on where `state` was taken; ValueError if it belongs to another order."""
        for name in ("seed", "batch_size"):
            if state[name] != getattr(self.order, name):
                raise ValueError(
                    f"LatentLoader: the state has {name} {state[name]}, this loader {getattr(self.order, name)}"
                )
        self.step = state["step"]


def draw_latents(moments: Tensor, key_hash: Tensor, *, seed: int, epoch: int) -> Tensor:
    """One posterior sample of each row, of the mirrored image in half of the cases where it is stored.

    Args:
        moments: [B, F, 2C, H, W], mean‖logvar.
        key_hash: int64 [B]. Choice and noise are functions of (seed, epoch, key hash) alone.

    Returns:
        float32 [B, C, H, W] on the moments' device.
    """
    flips, (channels, height, width) = moments.shape[1], moments.shape[2:]
    shape = (channels // 2, height, width)
    flip, noise = [], np.empty((len(moments), *shape), dtype=np.float32)
    for i, key in enumerate(key_hash.cpu().numpy().view(np.uint64)):
        generator = philox(seed, int(key), epoch)
        flip.append(int(generator.integers(flips)))
        noise[i] = generator.standard_normal(shape, dtype=np.float32)
    rows = torch.arange(len(moments), device=moments.device)
    chosen = moments[rows, torch.tensor(flip, dtype=torch.int64, device=moments.device)].float()
    mean, logvar = chosen.chunk(2, dim=1)
    return mean + (0.5 * logvar).exp() * torch.from_numpy(noise).to(moments.device)
