"""How rows come from a dataset's files into a batch: copied from mapped memory, or read; chosen by a short probe."""

from __future__ import annotations

import math
import os
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastlatent.ops import ShardTable, gather_rows
from fastlatent.ops.read_rows import (
    FileTable,
    RowFile,
    advise_random,
    count_resident,
    io_uring_refusal,
    populate_rows,
    read_rows,
    unreadable,
)
from fastlatent.store.reader import Dataset
from fastlatent.store.shard import Shard

# ram       copied from the mapping, which is expected to be in memory. A file that is cut while it is mapped kills the
#           process (SIGBUS): its size is checked when it is opened, and never again.
# willneed  the same, after the batch's pages were brought in together; a file that was cut is found then.
# pread     read by threads, without the mapping. io_uring: read through a ring of the kernel.
BACKENDS = ("ram", "willneed", "pread", "io_uring")
READ_THREADS = 16  # a disk wants many reads at once: 16 KiB rows took 70 us each with one, 26 with 16
RING_DEPTH = 128

RESIDENT = 0.99  # from here on `ram`: at 16 KiB a row, 1 % from the disk costs as much as the other 99 %
PROBE_SECONDS = 0.15
PROBE_SHARDS = 16
PROBE_BYTES = 4 << 20  # of each probed shard, looked up in the page cache; and what one trial reads at most
# Mapped files of these can change or vanish under the reader, and fault page by page over the network.
NETWORK = {
    "9p", "afs", "beegfs", "ceph", "cifs", "coda", "davfs", "gfs", "gfs2", "glusterfs", "gpfs", "lustre", "nfs", "nfs4",
    "ocfs2", "panfs", "pvfs2", "smb3", "smbfs", "wekafs",
}  # fmt: skip


@dataclass(frozen=True)
class Choice:
    """The back end that reads a dataset's rows, and a sentence that says why."""

    name: str
    why: str


class RowReader:
    """Reads rows of a dataset's payload with one back end. The shards must hold rows of one shape and dtype.

    Args:
        store: the dataset.
        choice: of `choose_backend`.
        numbers: which shards; all by default. `read` counts among these.
        tokens: rows are single tokens, [D] each, the n of a shard's first row before those of its second.

    Attributes:
        numbers: int64, which shards.
        row_shape, dtype: of a row.

    Raises:
        ValueError: a shard is missing, damaged, or of another row shape.
    """

    def __init__(
        self, store: Dataset, choice: Choice, numbers: Sequence[int] | None = None, *, tokens: bool = False
    ) -> None:
        self.store, self.choice = store, choice
        self.numbers = np.arange(len(store.shards)) if numbers is None else np.asarray(numbers)
        self.shards = [store.open_shard(i) for i in self.numbers.tolist()]
        tensors = [_payload(store, shard) for shard in self.shards]
        if tokens:
            tensors = [tensor.view(-1, tensor.shape[-1]) for tensor in tensors]
        self._mapped = ShardTable(tensors)
        self.row_shape, self.dtype = self._mapped.row_shape, self._mapped.dtype
        self._files: FileTable | None = None
        if choice.name in ("pread", "io_uring"):
            files = [
                RowFile(shard.path, tensor.data_ptr() - _address(shard), len(tensor))
                for shard, tensor in zip(self.shards, tensors, strict=True)
            ]
            self._files = FileTable(files, self.row_shape, self.dtype)
        else:
            for tensor in tensors:
                advise_random(tensor)

    def places(self, shards: np.ndarray) -> np.ndarray:
        """int64: which of `numbers` these shards of the dataset are, as `read` counts them."""
        if len(self.numbers) == len(self.store.shards):
            return shards.astype(np.int64)
        return np.searchsorted(self.numbers, shards)

    def read(self, shard: Tensor, row: Tensor, out: Tensor, *, threads: int = 1) -> None:
        """out[i] = row row[i] of shard shard[i]; `threads` copy from memory, how many read is the back end's affair.

        Args:
            shard, row: int64 [N].
            out: contiguous CPU tensor [N, *row_shape].

        Raises:
            ValueError: an index is out of range, or a row cannot be read (not with `ram`).
        """
        if self._files is not None:
            depth = RING_DEPTH if self.choice.name == "io_uring" else 0
            read_rows(self._files, shard, row, out, threads=READ_THREADS, depth=depth)
            return
        if self.choice.name == "willneed" and (failed := populate_rows(self._mapped, shard, row)):
            position, code = failed
            raise unreadable(self.shards[int(shard[position])].path, int(row[position]), code)
        gather_rows(self._mapped, shard, row, out, threads)


def choose_backend(store: Dataset, force: str | None = None) -> Choice:
    """How this process should read this dataset now. Takes at most about 0.2 s.

    On a network file system never through a mapping; from memory where the shards are there already; else whatever
    was the fastest at a few random rows.

    Args:
        force: a name out of BACKENDS, which is then taken.

    Raises:
        ValueError: no such back end, or one that the kernel or a container refuses.
    """
    if force is not None:
        if force not in BACKENDS:
            raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {force!r}")
        if force == "io_uring" and (refusal := io_uring_refusal()):
            raise ValueError(f"backend io_uring: the kernel or a seccomp filter refuses it ({refusal}); use pread")
        return Choice(force, "it was asked for")
    kind = file_system(store.path)
    if kind in NETWORK or kind.startswith("fuse"):
        return Choice("pread", f"the dataset is on {kind}, where mapped files fault one page at a time")
    generator = np.random.default_rng()  # not seeded: a second probe must not find the first one's rows in memory
    largest = max(range(len(store.buckets)), key=lambda i: (not store.buckets[i].ragged, store.buckets[i].rows))
    numbers = [i for i, record in enumerate(store.shards) if record.bucket == largest]
    numbers = generator.choice(numbers, min(PROBE_SHARDS, len(numbers)), replace=False).tolist()
    share = _resident(store, numbers, generator)
    if share is not None and share >= RESIDENT:
        return Choice("ram", f"{share:.0%} of what was probed is in memory")
    known = "may be in memory or not" if share is None else f"is in memory to {share:.0%}"
    return _trial(store, numbers, generator, f"the dataset {known}")


def file_system(path: Path) -> str:
    """The type of the file system that holds `path`, as /proc/self/mountinfo names it; "" where that is not there."""
    try:
        lines = Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines()
    except OSError:
        return ""
    resolved = path.resolve()
    best, kind = -1, ""
    for line in lines:
        fields, _, after = line.partition(" - ")
        # Blanks and the like stand there as \040.
        point = re.sub(r"\\(\d{3})", lambda match: chr(int(match[1], 8)), fields.split(" ")[4])
        if resolved.is_relative_to(point) and len(point) >= best:  # of two on one point the later covers the other
            best, kind = len(point), after.split(" ")[0]
    return kind


def _resident(store: Dataset, numbers: list[int], generator: np.random.Generator) -> float | None:
    """The share of probed pages that are in memory; None where Linux does not tell this user."""
    inside = pages = 0
    for number in numbers:
        shard = store.open_shard(number)
        if shard.path.stat().st_uid != os.geteuid() and not os.access(shard.path, os.W_OK):
            return None
        payload = torch.from_numpy(shard.columns[store.payload].reshape(-1).view(np.uint8))
        begin = int(generator.integers(max(1, len(payload) - PROBE_BYTES)))
        counts = count_resident(payload[begin : begin + PROBE_BYTES])
        inside, pages = inside + counts[0], pages + counts[1]
    return inside / max(1, pages)


def _trial(store: Dataset, numbers: list[int], generator: np.random.Generator, why: str) -> Choice:
    """The fastest at reading random rows of these shards, rows of their own for each candidate."""
    names = ["willneed", "pread"] + ([] if io_uring_refusal() else ["io_uring"])
    readers = {name: RowReader(store, Choice(name, "trial"), numbers) for name in names}
    lengths = [store.shards[number].rows for number in numbers]
    row_bytes = max(1, math.prod(readers["pread"].row_shape) * readers["pread"].dtype.itemsize)
    begin = time.perf_counter()
    for rows in (8, 64):  # a disk so slow that 8 rows take long is judged by those
        seconds: dict[str, float] = {}
        rows = max(1, min(rows, PROBE_BYTES // row_bytes))
        for name, reader in readers.items():
            shard = generator.integers(len(numbers), size=rows)
            row = generator.integers(np.array(lengths)[shard])
            out = torch.empty((rows, *reader.row_shape), dtype=reader.dtype)
            start = time.perf_counter()
            reader.read(torch.from_numpy(shard), torch.from_numpy(row), out)
            seconds[name] = (time.perf_counter() - start) / rows
        if time.perf_counter() - begin > PROBE_SECONDS / 8:
            break
    best = min(seconds, key=seconds.__getitem__)
    times = ", ".join(f"{name} {1e6 * value:.0f}" for name, value in seconds.items())
    return Choice(best, f"{why}; microseconds a row: {times}")


def _payload(store: Dataset, shard: Shard) -> Tensor:
    tensor = torch.from_numpy(shard.columns[store.payload])
    # numpy has no bfloat16: the store hands out its bits.
    return tensor.view(torch.bfloat16) if shard.dtypes[store.payload] == "BF16" else tensor


def _address(shard: Shard) -> int:
    return np.frombuffer(shard.mapping, np.uint8, count=1).ctypes.data
