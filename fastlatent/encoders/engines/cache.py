"""Built engines on disk: named by what they were made from and by their own digest."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import xxhash

from fastlatent.store.files import canonical_json, make_directory, publish
from fastlatent.store.lease import exclusive


def cached_file(folder: Path, key: dict[str, Any], suffix: str, build: Callable[[Path], None]) -> Path:
    """The file made from `key`: a complete one in `folder`, or what `build(path)` writes now.

    Its name is <digest of key>-<digest of contents><suffix>, so a name vouches for the contents: what is damaged is
    removed and built anew, and of processes that come at once one builds and the others wait. path ends in `suffix`.

    Raises:
        ValueError: the key holds what JSON cannot.
        OSError: the folder cannot be written.
    """
    stem = xxhash.xxh3_128_hexdigest(canonical_json(key))
    make_directory(folder)
    with exclusive(folder / f".{stem}.lock"):  # whose build differs from time to time: all processes get the first one
        return _cached_file(folder, stem, suffix, build)


def _cached_file(folder: Path, stem: str, suffix: str, build: Callable[[Path], None]) -> Path:
    for path in sorted(folder.glob(f"{stem}-*{suffix}")):
        if path.name == _name(stem, path, suffix):
            return path
        path.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(prefix="fastlatent-engine-") as temporary:
        made = Path(temporary) / f"engine{suffix}"
        build(made)

        def copy(fd: int) -> str:
            with made.open("rb") as source, open(fd, "wb", closefd=False) as target:
                shutil.copyfileobj(source, target, 1 << 20)
            return _name(stem, made, suffix)

        return publish(folder, stem, copy)


def _name(stem: str, path: Path, suffix: str) -> str:
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return f"{stem}-{digest.hexdigest()}{suffix}"
