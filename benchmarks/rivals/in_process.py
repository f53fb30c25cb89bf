"""The readers that need no package of their own: fastlatent, the floors, and what is commonly written by hand."""

from __future__ import annotations

import itertools
import mmap
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import protocol
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastlatent.data.latents import LatentDataset
from fastlatent.data.loader import LatentLoader
from fastlatent.ops import ShardTable, gather_rows
from fastlatent.store.reader import Dataset
from fastlatent.store.shard import Shard

SINGLE_FILES = 2000  # of the payload's rows: 20,000 files show nothing more
ROWS_PER_SAFETENSORS = 10_000  # as LightningDiT's feature extraction writes


@dataclass(frozen=True)
class Files:
    """Where the data lies: `payload`/rows.npy, `store`, a fastlatent dataset of the same rows, and room for more."""

    payload: Path
    store: Path
    work: Path

    def folder(self, name: str) -> Path:
        """One of them, or a folder inside."""
        first, _, rest = name.partition("/")
        return getattr(self, first) / rest

    def rows(self) -> np.ndarray:
        """float16 [N, row], mapped."""
        return np.load(self.payload / "rows.npy", mmap_mode="c")


Read = Callable[[Files, int], protocol.Batches]


def fastlatent(backend: str | None = None) -> Read:
    """Batches gathered into tensors that are used again; None: by the back end that the dataset chooses."""

    def read(files: Files, batch: int) -> protocol.Batches:
        dataset = LatentDataset(files.store, backend=backend)
        out = dataset.empty(batch)
        for indices in protocol.epochs(len(dataset), batch):
            yield indices, dataset.gather(indices, out=out)[dataset.store.payload]

    return read


def fastlatent_loader(files: Files, batch: int) -> protocol.Batches:
    """The loader's own order and new tensors, each batch read when it is asked for: what prefetching would hide."""
    dataset = LatentDataset(files.store)
    loader = LatentLoader(dataset, batch, prefetch=0)
    hashes = np.array(dataset.store.key_hash)
    order = np.argsort(hashes)
    while True:
        for columns in loader:
            found = columns["key_hash"].numpy().view(np.uint64)
            yield order[np.searchsorted(hashes, found, sorter=order)], columns[dataset.store.payload]


def mapped(advice: int, will_need: bool) -> Read:
    """Rows gathered from mappings of the store's shards under this advice, without fastlatent's own choice of one."""

    def read(files: Files, batch: int) -> protocol.Batches:
        dataset = Dataset.open(files.store)
        shards = [Shard.open(files.store / record.path) for record in dataset.shards]
        views = [shard.columns[dataset.payload] for shard in shards]
        row_bytes = views[0][0].nbytes
        starts = [np.frombuffer(shard.mapping, np.uint8) for shard in shards]
        begins = [view.ctypes.data - start.ctypes.data for view, start in zip(views, starts, strict=True)]
        for shard in shards:
            shard.mapping.madvise(advice)
        table = ShardTable([torch.from_numpy(view) for view in views])
        out = torch.empty((batch, *views[0].shape[1:]), dtype=torch.float16)
        for indices in protocol.epochs(len(dataset), batch):
            shard_of, row_of = (np.asarray(column[indices], np.int64) for column in (dataset.shard, dataset.row))
            if will_need:
                for number, row in zip(shard_of.tolist(), row_of.tolist(), strict=True):
                    begin = begins[number] + row * row_bytes
                    aligned = begin // mmap.PAGESIZE * mmap.PAGESIZE
                    shards[number].mapping.madvise(mmap.MADV_WILLNEED, aligned, begin + row_bytes - aligned)
            gather_rows(table, torch.from_numpy(shard_of), torch.from_numpy(row_of), out, 1)
            yield indices, out

    return read


def memcpy(files: Files, batch: int) -> protocol.Batches:
    """The floor: as many bytes, side by side, copied once."""
    rows = files.rows()
    out = np.empty((batch, rows.shape[1]), rows.dtype)
    for begin in itertools.cycle(range(0, len(rows) - batch + 1, batch)):
        np.copyto(out, rows[begin : begin + batch])
        yield np.arange(begin, begin + batch), out


def read_contiguous(files: Files, batch: int) -> protocol.Batches:
    """The cold floor: as many bytes, side by side, in one system call without read-ahead."""
    path = files.payload / "rows.npy"
    rows = files.rows()
    start = path.stat().st_size - rows.nbytes
    row_bytes = rows[0].nbytes
    out = np.empty((batch, rows.shape[1]), rows.dtype)
    with path.open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        for begin in itertools.cycle(range(0, len(rows) - batch + 1, batch)):
            got = os.preadv(file.fileno(), [out], start + begin * row_bytes)
            assert got == out.nbytes, got
            yield np.arange(begin, begin + batch), out


def torch_index_select(files: Files, batch: int) -> protocol.Batches:
    rows = torch.from_numpy(files.rows())
    out = torch.empty((batch, rows.shape[1]), dtype=rows.dtype)
    for indices in protocol.epochs(len(rows), batch):
        torch.index_select(rows, 0, torch.from_numpy(indices), out=out)
        yield indices, out


def numpy_take(files: Files, batch: int) -> protocol.Batches:
    rows = files.rows()
    out = np.empty((batch, rows.shape[1]), rows.dtype)
    for indices in protocol.epochs(len(rows), batch):
        np.take(rows, indices, axis=0, out=out, mode="clip")  # "raise" goes through a buffer
        yield indices, out


def numpy_fancy(files: Files, batch: int) -> protocol.Batches:
    rows = files.rows()
    for indices in protocol.epochs(len(rows), batch):
        yield indices, rows[indices]


def safe_open_per_sample(files: Files, batch: int) -> protocol.Batches:
    """As LightningDiT's dataset does: every sample opens its file, and slices latent and label out of it."""
    rows = torch.from_numpy(files.rows())
    paths = []
    for begin in range(0, len(rows), ROWS_PER_SAFETENSORS):
        latents = rows[begin : begin + ROWS_PER_SAFETENSORS]
        paths.append(files.work / f"{begin:08d}.safetensors")
        save_file({"latents": latents, "labels": torch.zeros(len(latents), dtype=torch.int64)}, paths[-1])

    def sample(index: int) -> tuple[Tensor, Tensor]:
        number, row = divmod(index, ROWS_PER_SAFETENSORS)
        with safe_open(paths[number], framework="pt", device="cpu") as file:
            return file.get_slice("latents")[row : row + 1], file.get_slice("labels")[row : row + 1]

    for indices in protocol.epochs(len(rows), batch):
        yield indices, torch.cat([sample(index)[0] for index in indices.tolist()])


def pt_files(files: Files, batch: int) -> protocol.Batches:
    """A file per sample, by torch.save; of the first SINGLE_FILES rows."""
    rows = torch.from_numpy(files.rows()[:SINGLE_FILES])
    for number, row in enumerate(rows):
        torch.save(row.clone(), files.work / f"{number:08d}.pt")
    for indices in protocol.epochs(len(rows), batch):
        yield (
            indices,
            torch.stack([torch.load(files.work / f"{i:08d}.pt", weights_only=True) for i in indices.tolist()]),
        )


def npz_files(files: Files, batch: int) -> protocol.Batches:
    """A file per sample, by np.savez; of the first SINGLE_FILES rows."""
    rows = files.rows()[:SINGLE_FILES]
    for number, row in enumerate(rows):
        np.savez(files.work / f"{number:08d}.npz", row=row)

    def sample(index: int) -> np.ndarray:
        with np.load(files.work / f"{index:08d}.npz") as file:
            return file["row"]

    for indices in protocol.epochs(len(rows), batch):
        yield indices, np.stack([sample(index) for index in indices.tolist()])


@dataclass(frozen=True)
class Provider:
    """A reader, where it is measured, and under which folder lie the files that "cold" puts out of the page cache."""

    read: Read
    folder: str
    caches: tuple[str, ...] = ("hot", "cold")
    rival: bool = True


PROVIDERS = {
    "fastlatent": Provider(fastlatent(), "store/shards", rival=False),
    **{
        f"fastlatent-{backend}": Provider(fastlatent(backend), "store/shards", ("cold",), rival=False)
        for backend in ("willneed", "pread", "io_uring")
    },
    "fastlatent-loader": Provider(fastlatent_loader, "store/shards", rival=False),
    "memcpy": Provider(memcpy, "payload", ("hot",), rival=False),
    "read-contiguous": Provider(read_contiguous, "payload", ("cold",), rival=False),
    "mmap-default": Provider(mapped(mmap.MADV_NORMAL, False), "store/shards", ("cold",), rival=False),
    "mmap-random": Provider(mapped(mmap.MADV_RANDOM, False), "store/shards", ("cold",), rival=False),
    "mmap-random-willneed": Provider(mapped(mmap.MADV_RANDOM, True), "store/shards", ("cold",), rival=False),
    "torch-index_select": Provider(torch_index_select, "payload"),
    "numpy-take": Provider(numpy_take, "payload"),
    "numpy-fancy": Provider(numpy_fancy, "payload"),
    "safe_open": Provider(safe_open_per_sample, "work"),
    "pt-files": Provider(pt_files, "work"),
    "npz-files": Provider(npz_files, "work"),
}
