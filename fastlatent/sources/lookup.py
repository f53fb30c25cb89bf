"""Size and stamp of files whose names are known. Torch-free."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from fastlatent.sources.files import THREADS, Files, Found, LocalFiles

AT_ONCE = 1024  # names a thread takes: handing over one costs 20 µs, asking for it 2 µs


def look_up(files: Files, paths: Sequence[str]) -> Iterator[Found | str]:
    """For each path, in order: the file, or why it is none. Local: one os.stat each; remote: one listing of the root,
    which knows no name with a leading dot."""
    if isinstance(files, LocalFiles):
        return _ask(files, paths)
    return _pick(files, paths)


def _ask(files: LocalFiles, paths: Sequence[str]) -> Iterator[Found | str]:
    chunks = [paths[start : start + AT_ONCE] for start in range(0, len(paths), AT_ONCE)]
    with ThreadPoolExecutor(THREADS, thread_name_prefix="look_up") as pool:
        for found in pool.map(lambda chunk: [_ask_one(files, path) for path in chunk], chunks):
            yield from found


def _ask_one(files: LocalFiles, path: str) -> Found | str:
    try:
        status = os.stat(files.place(path))
    except FileNotFoundError:
        return f"there is no such file below {files.root!r}"
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    if not stat.S_ISREG(status.st_mode):
        return f"no file but a folder or device, below {files.root!r}"
    return Found(path, status.st_size, status.st_mtime_ns)


def _pick(files: Files, paths: Sequence[str]) -> Iterator[Found | str]:
    listing = files.listing()
    for path in paths:
        place = listing.keys.find(path)
        known = listing.left_out.get(path, f"there is no such file below {files.root!r}")
        yield listing[place] if place >= 0 else known
