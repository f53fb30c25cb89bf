"""A latent dataset as torch sees it: rows read from its shards; and latents drawn from their posterior."""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastlatent.data.backends import Choice, RowReader, choose_backend
from fastlatent.data.columns import (
    check_row_digests,
    check_tokens,
    gather_column,
    gather_ragged,
    gather_token_scales,
    torch_dtype,
)
from fastlatent.ops import sample_posterior
from fastlatent.store.reader import Dataset


class LatentDataset(torch.utils.data.Dataset):
    """Map-style view of a dataset written by `fastlatent encode`.

    A sample is a dict of the payload: `moments` [F, 2C, H, W] (raw mean‖logvar as stored; F = 2 where mirrored images
    were encoded too), `latents` [F, C, H, W] or `tokens` [1, N, D]; `scale` float32 where that is int8 (value = int8 ·
    scale over its first axes); `label` (int64, −1 where there are no classes); `key_hash` (int64, the hash of the
    sample's key); and the dataset's further tensors by their names. Where lengths differ from row to row, a batch of
    `gather` has the rows one after another, and NAME.offsets int64 [B+1]: row i is [offsets[i] : offsets[i+1]].

    Args:
        path: dataset folder.
        columns: which of these to read; all by default.
        backend: how rows are read: "ram", "willneed", "pread" or "io_uring" (see `fastlatent.data.backends`); by
            default a probe of at most 0.2 s chooses before the first row is read.
        generation: an earlier one, which stays until `fastlatent gc`; the current one by default.

    Raises:
        ValueError: the dataset is not there, damaged or of a newer format, or has no such column.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        columns: Sequence[str] | None = None,
        backend: str | None = None,
        generation: int | None = None,
    ) -> None:
        self.store = store = Dataset.open(path, generation=generation)
        scale = ("scale",) if store.buckets[0].dtype == "I8" else ()
        known = (store.payload, *scale, "label", "key_hash", *(one.name for one in store.extras))
        self.columns = known if columns is None else tuple(columns)
        unknown = set(self.columns) - set(known)
        if unknown:
            raise ValueError(f"LatentDataset: unknown columns {sorted(unknown)}; known: {', '.join(known)}")
        ragged = {one.name for one in store.extras if one.ragged}
        self._ragged = [ragged | ({store.payload, "scale"} if one.ragged else set()) for one in store.buckets]
        self._used = [number for number, bucket in enumerate(store.buckets) if bucket.rows]
        self.backend = backend
        self._readers: dict[int, RowReader] = {}
        self._token_readers: dict[int, RowReader] = {}
        self._choice: Choice | None = None

    def __len__(self) -> int:
        return len(self.store)

    @property
    def row_shape(self) -> tuple[int, ...]:
        """Of the payload, as stored.

        Raises:
            ValueError: rows have several shapes.
        """
        shapes = [self.store.buckets[number].shape for number in self._used]
        if len(shapes) > 1:
            raise ValueError(f"expected latents of one shape, {self.store.path} holds {shapes}")
        return shapes[0]

    @property
    def autoencoder(self) -> dict[str, Any]:
        """Identity of the autoencoder that made the latents, where it is known, and the `path` it had then, or None."""
        provenance = self.store.provenance
        return {**provenance["hashed"].get("vae", {}), "path": provenance["informational"].get("vae_path")}

    @property
    def choice(self) -> Choice:
        """The back end that reads rows in this process, and why; the first access chooses it.

        Raises:
            ValueError: a shard is missing or damaged, or the back end that was asked for cannot be used.
        """
        if self._choice is None:
            if all(self.store.buckets[number].ragged for number in self._used):
                if self.backend not in (None, "ram"):
                    raise ValueError(f"backend: expected ram for rows that differ in length, got {self.backend!r}")
                self._choice = Choice("ram", "rows that differ in length are copied from the mapping")
            else:
                self._choice = choose_backend(self.store, self.backend)
        return self._choice

    def open(self) -> None:
        """Open every shard and choose the back end now, not with the first row."""
        for number in self._used:
            if not self.store.buckets[number].ragged:
                self.reader(number)
        _ = self.choice

    def reader(self, bucket: int) -> RowReader:
        """What reads the rows of a bucket."""
        if bucket not in self._readers:
            self._readers[bucket] = RowReader(self.store, self.choice, self._shards(bucket))
        return self._readers[bucket]

    def _token_reader(self, bucket: int) -> RowReader:
        if bucket not in self._token_readers:
            self._token_readers[bucket] = RowReader(self.store, self.choice, self._shards(bucket), tokens=True)
        return self._token_readers[bucket]

    def _shards(self, bucket: int) -> list[int]:
        return [i for i, record in enumerate(self.store.shards) if record.bucket == bucket]

    def with_backend(self, backend: str) -> LatentDataset:
        """The same open files, read in another way."""
        other = copy.copy(self)
        other.backend, other._readers, other._token_readers, other._choice = backend, {}, {}, None
        return other

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"LatentDataset: index {index} of {len(self)} rows")
        return self.__getitems__([index % len(self)])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        wanted = np.asarray(indices, dtype=np.int64)
        samples: list[dict[str, Any]] = [{} for _ in indices]
        buckets = self.store.bucket[wanted]
        for bucket in np.unique(buckets).tolist():
            places = np.flatnonzero(buckets == bucket)
            batch = self.gather(wanted[places])
            for i, place in enumerate(places.tolist()):
                for name, values in batch.items():
                    of = self.store.payload if name == "scale" else name
                    offsets = batch.get(f"{of}.offsets")
                    if not name.endswith(".offsets"):
                        samples[place][name] = values[i] if offsets is None else values[offsets[i] : offsets[i + 1]]
        return samples

    def group(self, number: int) -> dict[str, Any]:
        """All samples of a group in their order, as `gather` gives them, and `order` (int64): one contiguous read.

        Raises:
            ValueError: the dataset has no groups, or not so many.
        """
        if self.store.groups is None:
            raise ValueError(f"{self.store.path}: expected a dataset with groups, got one without")
        samples = self.store.groups.samples(number)
        indices = np.arange(samples.start, samples.stop)
        return {**self.gather(indices), "order": torch.from_numpy(self.store.groups.order[samples].copy())}

    def __reduce__(self) -> tuple[Any, ...]:
        # Mappings do not travel to spawned workers; every process opens its own.
        # The generation too: another one may be current by then.
        again = functools.partial(
            type(self), columns=self.columns, backend=self.backend, generation=self.store.generation
        )
        return again, (self.store.path,)

    def empty(self, count: int, bucket: int = 0, *, pin_memory: bool = False) -> dict[str, Tensor]:
        """Uninitialised CPU tensors for `count` samples of a bucket, as `gather` fills them; without ragged columns."""
        store = self.store
        shape, dtype = store.buckets[bucket].shape, store.buckets[bucket].dtype
        layout: dict[str, tuple[tuple[int, ...], torch.dtype]] = {name: ((), torch.int64) for name in self.columns}
        for one in store.extras:
            if one.name in layout:
                layout[one.name] = one.shape, torch_dtype(one.dtype)
        if store.payload in layout:
            layout[store.payload] = shape, torch_dtype(dtype)
        if "scale" in layout:
            first = next(i for i, record in enumerate(store.shards) if record.bucket == bucket)
            layout["scale"] = store.open_shard(first).columns[f"{store.payload}.scale"].shape[1:], torch.float32
        return {
            name: torch.empty((count, *shape), dtype=dtype, pin_memory=pin_memory)
            for name, (shape, dtype) in layout.items()
            if name not in self._ragged[bucket]
        }

    def gather(
        self,
        indices: np.ndarray,
        *,
        out: dict[str, Tensor] | None = None,
        threads: int = 1,
        check_rows: bool = False,
    ) -> dict[str, Tensor]:
        """The samples `indices` (int64 [B], of one bucket) as one batch of CPU tensors.

        Args:
            out: of `empty`, to be filled and returned; new tensors by default.
            threads: how many copy rows from memory.
            check_rows: hold every row against the checksum that its shard has of it.

        Raises:
            ValueError: the samples are of several buckets, a row cannot be read, or one is damaged and `check_rows`
                is set.
        """
        store, bucket = self.store, self._bucket_of(indices, "gather")
        batch = self.empty(len(indices), bucket) if out is None else out
        for name in self.columns:
            if name == "label":
                batch[name].numpy()[:] = store.label[indices]
            elif name == "key_hash":
                batch[name].numpy()[:] = store.key_hash.view(np.int64)[indices]
            elif name in self._ragged[bucket]:
                stored = f"{store.payload}.scale" if name == "scale" else name
                of = store.payload if name == "scale" else name
                values, offsets = gather_ragged(store, stored, indices, of)
                batch |= {name: values, f"{of}.offsets": offsets}
            elif name == store.payload:
                reader = self.reader(bucket)
                shard = torch.from_numpy(reader.places(store.shard[indices]))
                row = torch.from_numpy(store.row[indices].astype(np.int64))
                reader.read(shard, row, batch[name], threads=threads)
            else:
                gather_column(store, f"{store.payload}.scale" if name == "scale" else name, indices, batch[name])
        if check_rows and store.payload in batch:
            check_row_digests(store, indices, batch)
        return batch

    def gather_tokens(
        self,
        indices: np.ndarray,
        tokens: Tensor | np.ndarray,
        *,
        out: dict[str, Tensor] | None = None,
        threads: int = 1,
    ) -> dict[str, Tensor]:
        """Tokens tokens[i] (int64 [B, M], of `MaskConfig.masked`, say) of sample indices[i] (int64 [B], of one bucket).

        Nothing else of the rows is read. A quarter of the tokens takes 35 to 41 % of the time of whole rows where the
        dataset is in memory and `out` is given, 6 % into new tensors; from a disk scattered tokens of 1.5 KiB take as
        long as whole rows, since they share its pages. A row's checksum is of the whole row: parts cannot be held
        against it, as `fastlatent verify` does.

        Args:
            out: what an earlier call with this B and M returned, to be filled and returned; new tensors by default.
            threads: how many copy from memory.

        Returns:
            {"tokens": [B, M, D] as stored}, and where that is int8 "scale" float32 [B, M]: value = int8 · scale.

        Raises:
            ValueError: rows are no tokens, or mirrored ones too; the samples are of several buckets; a sample or a
                token that is not there; a shape or dtype is not as above; or a token cannot be read.
        """
        store = self.store
        if store.payload != "tokens":
            raise ValueError(f"gather_tokens: expected a dataset of tokens, got {store.payload} in {store.path}")
        indices, wanted = np.asarray(indices), np.ascontiguousarray(tokens)
        if indices.ndim != 1 or wanted.ndim != 2 or {indices.dtype, wanted.dtype} != {np.dtype(np.int64)}:
            raise ValueError(
                "gather_tokens: expected indices int64 [B] and tokens int64 [B, M], "
                f"got {indices.dtype} {list(indices.shape)} and {wanted.dtype} {list(wanted.shape)}"
            )
        if len(indices) and not 0 <= indices.min() <= indices.max() < len(self):
            raise ValueError(
                f"gather_tokens: expected samples from 0 to {len(self) - 1}, got {indices.min()} to {indices.max()}"
            )
        bucket = self._bucket_of(indices, "gather_tokens")
        if store.buckets[bucket].shape[0] != 1:
            raise ValueError(f"gather_tokens: expected rows [1, N, D], got {list(store.buckets[bucket].shape)}")
        first = check_tokens(store, indices, wanted)
        reader = self._token_reader(bucket)
        layout = {"tokens": ((*wanted.shape, *reader.row_shape), reader.dtype)}
        if store.buckets[bucket].dtype == "I8":
            layout["scale"] = wanted.shape, torch.float32
        batch = (
            {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in layout.items()} if out is None else out
        )
        found = {name: (tuple(one.shape), one.dtype) for name, one in batch.items() if one.is_contiguous()}
        if found != layout:
            raise ValueError(f"gather_tokens: expected out contiguous {layout}, got {found}")
        shard = torch.from_numpy(reader.places(store.shard[indices])).repeat_interleave(wanted.shape[1])
        row = torch.from_numpy((first[:, None] + wanted).reshape(-1))
        reader.read(shard, row, batch["tokens"].view(-1, *reader.row_shape), threads=threads)
        if "scale" in batch:
            gather_token_scales(store, indices, wanted, batch["scale"])
        return batch

    def _bucket_of(self, indices: np.ndarray, what: str) -> int:
        """The bucket of all these samples."""
        if len(self._used) == 1 or not len(indices):
            return self._used[0]
        buckets = self.store.bucket[indices]
        if (buckets != buckets[0]).any():
            raise ValueError(f"{what}: expected samples of one bucket, got some of {np.unique(buckets).tolist()}")
        return int(buckets[0])


def draw_latents(
    stored: Tensor,
    key_hash: Tensor,
    *,
    seed: int,
    epoch: int,
    scale: Tensor | None = None,
    has_logvar: bool = True,
    mean: Tensor | None = None,
    std: Tensor | None = None,
) -> Tensor:
    """One posterior sample of each row, of the mirrored image in half of the cases where it is stored.

    Args:
        stored: moments [B, F, 2C, *S], mean‖logvar; or latents [B, F, C, *S], which are only chosen among.
        key_hash: int64 [B]. Choice and noise are functions of (seed, epoch, key hash) alone.
        seed, epoch: as for `fastlatent.ops.sample_posterior`, which says how.
        scale: of int8 rows.
        has_logvar: moments, not latents.
        mean, std: float32 [C]: the result is normalised to (x − mean)/std.

    Returns:
        float32 [B, C, *S] on the rows' device.
    """
    return sample_posterior(
        stored,
        key_hash.to(stored.device),
        seed=seed,
        epoch=epoch,
        mean=mean,
        std=std,
        scale=scale,
        has_logvar=has_logvar,
    )
