"""What both directions of a conversion share: the cache of another project, opened, and the report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fastlatent.caches.cache import Cache, Told
from fastlatent.caches.formats import format_of
from fastlatent.sources.files import Files, Found, Listing, open_beside, open_files


@dataclass(frozen=True)
class ConvertReport:
    """Rows of the result, rows converted now, and what was left out -> why."""

    path: Path
    format: str
    rows: int
    converted: int
    left_out: dict[str, str]


def list_source(source: str) -> tuple[Files, Sequence[Found]]:
    """The files of a folder or URL; of a single file its folder, and that file.

    Raises:
        ValueError: it is not there, or cannot be listed.
    """
    files = open_files(source)
    try:
        if files.is_dir():
            return files, files.listing()
        beside, name = open_beside(source)
        return beside, [beside.stat(name)]
    except OSError as error:
        raise ValueError(f"{source}: expected a cache, got: {error.strerror or error}") from None


def open_format(name: str, files: Files, found: Sequence[Found], latent_shape: tuple[int, ...] = ()) -> Cache:
    """A cache of the format `name`, with one row or more, none of whose keys leads out of a folder.

    Raises:
        ValueError: it cannot be used so.
    """
    cache: Cache = format_of(name).open_cache(files, found, Told(latent_shape))
    if isinstance(found, Listing) and found.left_out:  # links to nothing, folders that cannot be listed
        unreadable = {files.place(path): why for path, why in found.left_out.items()}
        cache = replace(cache, left_out={**cache.left_out, **unreadable})
    if not len(cache.items):
        why = "; ".join(f"{place}: {reason}" for place, reason in list(cache.left_out.items())[:3])
        raise ValueError(f"{files.root}: expected rows of {name}, got none that can be used{': ' + why if why else ''}")
    for item in cache.items:
        if {"", ".", ".."} & set(item.key.split("/")) or "\0" in item.key:
            raise ValueError(f"{item.place}: expected names that stay inside a folder, got {item.key!r:.200}")
    return cache
