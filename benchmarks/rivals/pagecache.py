"""What of a folder's files is in the page cache, counted with mincore, and how to get it out of there."""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path

import numpy as np

MADV_DONTNEED = 4
_libc = ctypes.CDLL(None, use_errno=True)


class CannotDrop(Exception):
    """The page cache keeps the files here: there is no cold read to measure."""


def resident_bytes(folder: Path) -> int:
    """Bytes of the files under `folder` that are in the page cache, in whole pages."""
    return sum(_resident_pages(path) for path in folder.rglob("*") if path.is_file()) * mmap.PAGESIZE


def _resident_pages(path: Path) -> int:
    size = path.stat().st_size
    if not size:
        return 0
    with path.open("rb") as file, mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ) as mapping:
        states = np.zeros(-(-size // mmap.PAGESIZE), np.uint8)
        view = np.frombuffer(mapping, np.uint8)
        address, length = ctypes.c_void_p(view.ctypes.data), ctypes.c_size_t(size)
        failed = _libc.mincore(address, length, ctypes.c_void_p(states.ctypes.data))
        del view  # else the mapping cannot be closed
        if failed:
            raise OSError(ctypes.get_errno(), f"mincore: {os.strerror(ctypes.get_errno())}", str(path))
        return int((states & 1).sum())


def drop(folder: Path) -> None:
    """Put the files under `folder` out of the page cache.

    A page that this process has mapped stays: its mappings of these files forget their pages first. No page may
    have been changed through a private mapping.

    Raises:
        CannotDrop: more than 1 % is still there (another process has it mapped, or the file system ignores it).
    """
    inside = f"{folder.resolve()}/"
    for line in Path("/proc/self/maps").read_text().splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and fields[5].startswith(inside):
            begin, end = (int(number, 16) for number in fields[0].split("-"))
            _libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), MADV_DONTNEED)
    total = 0
    for path in folder.rglob("*"):
        if path.is_file():
            fd = os.open(path, os.O_RDONLY)
            try:
                os.fdatasync(fd)  # dirty pages stay
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
                total += os.fstat(fd).st_size
            finally:
                os.close(fd)
    if (left := resident_bytes(folder)) > total // 100:
        raise CannotDrop(f"{left} of {total} bytes stay in the page cache after POSIX_FADV_DONTNEED")


def read_ahead_kb(folder: Path) -> int:
    """The kernel's read-ahead for the device of `folder`, in KiB; -1 where it cannot be told."""
    device = folder.stat().st_dev
    try:
        return int(Path(f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb").read_text())
    except OSError:
        return -1
