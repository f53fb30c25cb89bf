"""Every back end gives the same rows; the probe chooses among them; damage behind an open dataset is survived."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from fastlatent.data import backends
from fastlatent.data.backends import BACKENDS, Choice, RowReader, choose_backend, file_system
from fastlatent.data.latents import LatentDataset
from fastlatent.ops.read_rows import io_uring_refusal


def usable(backend):
    if backend == "io_uring" and (refusal := io_uring_refusal()):
        pytest.skip(f"io_uring: {refusal}")
    return backend


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_every_backend_gives_the_stored_rows(make, make_row, tmp_path, backend, dtype):
    dataset = LatentDataset(make(tmp_path, 13, flips=2, dtype=dtype), backend=usable(backend))
    indices = np.array([12, 0, 4, 5, 5, 3])
    batch = dataset.gather(indices, check_rows=True)
    assert dataset.choice == Choice(backend, "it was asked for")
    for i, values in zip(indices, batch["moments"], strict=True):
        assert torch.equal(values, make_row(int(i), (2, 4, 3, 3), dtype))


def test_some_shards_only(path):
    store = LatentDataset(path).store
    whole = RowReader(store, Choice("ram", ""))
    some = RowReader(store, Choice("pread", ""), [3, 1])
    out, want = (torch.empty(2, *whole.row_shape) for _ in range(2))
    some.read(torch.tensor([0, 1]), torch.tensor([2, 0]), out)
    whole.read(torch.tensor([3, 1]), torch.tensor([2, 0]), want)
    assert torch.equal(out, want)


# --- the choice ---


def test_what_is_in_memory_is_copied_from_there(path, monkeypatch):
    """Asked for as if in memory: the kernel may drop files just written at any time, and once did (40 % were there)."""
    monkeypatch.setattr(backends, "count_resident", lambda tensor: (7, 7))
    assert choose_backend(LatentDataset(path).store) == Choice("ram", "100% of what was probed is in memory")


@pytest.mark.parametrize("kind", ["nfs4", "lustre", "ceph", "cifs", "fuse.sshfs", "fuseblk"])
def test_a_network_file_system_is_never_mapped(path, monkeypatch, kind):
    monkeypatch.setattr(backends, "file_system", lambda path: kind)
    choice = choose_backend(LatentDataset(path).store)
    assert choice.name == "pread"
    assert f"the dataset is on {kind}" in choice.why


@pytest.mark.parametrize("slow", ["willneed", "pread", "io_uring"])
def test_a_trial_takes_the_fastest(path, monkeypatch, slow):
    """Where it is not in memory: what is made slow is not taken, whatever this machine's disk prefers."""
    usable("io_uring")
    monkeypatch.setattr(backends, "_resident", lambda *args: 0.25)
    original = RowReader.read

    def read(self, *args, **options):
        if self.choice.name == slow:
            __import__("time").sleep(0.02)
        return original(self, *args, **options)

    monkeypatch.setattr(RowReader, "read", read)
    choice = choose_backend(LatentDataset(path).store)
    assert choice.name in {"willneed", "pread", "io_uring"} - {slow}
    assert choice.why.startswith("the dataset is in memory to 25%; microseconds a row: willneed ")


def test_a_trial_without_io_uring(path, monkeypatch):
    monkeypatch.setattr(backends, "_resident", lambda *args: None)
    monkeypatch.setattr(backends, "io_uring_refusal", lambda: "Operation not permitted")
    choice = choose_backend(LatentDataset(path).store)
    assert choice.name in {"willneed", "pread"}
    assert choice.why.startswith("the dataset may be in memory or not")
    with pytest.raises(ValueError, match=r"a seccomp filter refuses it \(Operation not permitted\); use pread"):
        choose_backend(LatentDataset(path).store, "io_uring")


def test_cold_files_are_tried_out(path):
    dataset = LatentDataset(path)
    for record in dataset.store.shards:
        fd = os.open(path / record.path, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)
    choice = choose_backend(dataset.store)
    assert choice.name == "ram" or "microseconds a row" in choice.why  # tmpfs keeps everything


def test_forced(path):
    store = LatentDataset(path).store
    with pytest.raises(ValueError, match="backend: expected one of ram, willneed, pread, io_uring, got 'mmap'"):
        choose_backend(store, "mmap")
    assert choose_backend(store, "willneed") == Choice("willneed", "it was asked for")


MOUNTS = r"""
22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/root rw
30 22 0:26 / /mnt rw - tmpfs tmpfs rw
31 30 0:27 / /mnt/my\040data rw,nosuid shared:3 master:1 - nfs4 server:/export rw,vers=4.2
32 31 0:28 / /mnt/my\040data/near rw - xfs /dev/sdb rw
33 32 0:29 / /mnt/my\040data/near rw - fuse.sshfs host: rw
"""


@pytest.mark.parametrize(
    ("folder", "kind"),
    [("/a", "ext4"), ("/mnt", "tmpfs"), ("/mntx", "ext4"), ("/mnt/my data/d", "nfs4"), ("/mnt/my data", "nfs4"),
     ("/mnt/my data/near/x", "fuse.sshfs")],  # two mounts on one point: the later is seen
)  # fmt: skip
def test_file_system_of_a_folder(monkeypatch, folder, kind):
    original = backends.Path.read_text
    monkeypatch.setattr(
        backends.Path,
        "read_text",
        lambda self, **options: MOUNTS.strip() if "mountinfo" in str(self) else original(self, **options),
    )
    assert file_system(backends.Path(folder)) == kind


# --- files that change behind an open dataset ---


@pytest.mark.parametrize("backend", ["willneed", "pread", "io_uring"])
def test_a_shard_that_is_cut_is_named(make, tmp_path, backend):
    # 300 rows of 144 bytes are 11 pages: the rows that are cut off lie in pages that are gone.
    path = make(tmp_path, 300, unit_rows=300)
    dataset = LatentDataset(path, backend=usable(backend))
    dataset[0]
    shard = dataset.store.open_shard(0)
    begin = shard.columns["moments"].ctypes.data - np.frombuffer(shard.mapping, np.uint8).ctypes.data
    os.truncate(shard.path, begin + 4096)
    assert len(dataset.gather(np.arange(20))["label"]) == 20
    with pytest.raises(ValueError, match=rf"{shard.path}: row 200: expected it inside the file, .*was cut"):
        dataset.gather(np.array([3, 200, 4]))


CUT = """
import os, sys
from fastlatent import LatentDataset
dataset = LatentDataset(sys.argv[1], backend="ram")
dataset[0]
os.truncate(dataset.store.open_shard(0).path, 4096)
dataset[299]
"""


def test_the_documented_limit_of_ram(make, tmp_path):
    """A mapping whose file is cut has no page to give: the process ends by SIGBUS, and trains on nothing wrong."""
    path = make(tmp_path, 300, unit_rows=300)
    assert subprocess.run([sys.executable, "-c", CUT, path], check=False).returncode == -7


def test_a_shard_that_is_removed_stays_readable(make, tmp_path):
    for backend in BACKENDS:
        path = make(tmp_path / backend, 8)
        dataset = LatentDataset(path, backend=usable(backend))
        want = dataset[0]["moments"].clone()
        for record in dataset.store.shards:
            os.unlink(path / record.path)
        assert torch.equal(dataset[0]["moments"], want)
