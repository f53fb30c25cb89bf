"""The formats of other projects by name, and which of them a folder holds."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

from fastlatent.sources.files import Files, Found
from fastlatent.store.records import ROOT

FORMATS = (
    "mar", "lightningdit", "fast-dit", "edm2", "frames", "steps", "tokens", "kohya", "simpletuner", "musubi",
    "webdataset", "mds",
)  # fmt: skip
TARGETS = (*FORMATS, "datasets")  # what is only written last


def format_of(name: str) -> Any:
    """The module of a format."""
    return importlib.import_module(f"fastlatent.caches.{name.replace('-', '_')}")


def detect(files: Files, found: Sequence[Found]) -> str:
    """The format of these files.

    Raises:
        ValueError: none, or several formats at once; says how many files each has.
    """
    found = list(found)  # a listing makes its entries anew on every walk, 21 µs for each over the dozen here
    claimed = {name: count for name in FORMATS if (count := format_of(name).claims(files, found))}
    if len(claimed) == 1:
        return next(iter(claimed))
    if not claimed and files.exists(ROOT) and files.is_dir("shards"):
        raise ValueError(
            f"{files.root}: expected a latent cache, got a dataset of fastlatent: say --to and what it shall become "
            f"({', '.join(TARGETS)})"
        )
    if not claimed:
        titles = "\n  ".join(f"{name}: {format_of(name).TITLE}" for name in FORMATS)
        raise ValueError(
            f"{files.root}: expected a latent cache of one of these formats:\n  {titles}\n"
            f"got {len(found)} files" + (f", {found[0].path} first" if found else "")
        )
    listed = ", ".join(f"{name} ({count:,} files)" for name, count in claimed.items())
    raise ValueError(
        f"{files.root}: expected one format, got {listed}: convert each from a folder of its own, or say --format"
    )
