"""Listing 1.28 M images in 1,000 class folders, with sizes and times; and comparing a finished dataset with them.

The files are empty and lie in memory (/dev/shm where there is one): this is the cost of the calls, not of a disk.

fastlatent: scan_image_folder, by its 8 threads; the others have one. recheck: the same, then Dataset.open and
`unchanged`: all that a second encode does before it says that there is nothing to do. scandir-stat: os.scandir and
DirEntry.stat, sorted: the same columns by plain Python. walk: os.walk, sorted, without sizes and times: how
torchvision's ImageFolder lists.

    python benchmarks/bench_listing.py                   several minutes, most of them for making files and dataset
    FASTLATENT_BENCH_FILES=2000 python benchmarks/bench_listing.py    a trial
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import harness
import numpy as np
import pytest
from store_costs import PROVENANCE

from fastlatent.sources.files import THREADS
from fastlatent.sources.image_folder import EXTENSIONS, scan_image_folder
from fastlatent.store.reader import Dataset
from fastlatent.store.records import Schema
from fastlatent.store.rows import Rows
from fastlatent.store.scan import Entry
from fastlatent.store.unchanged import unchanged
from fastlatent.store.writer import DatasetWriter

FILES = int(os.environ.get("FASTLATENT_BENCH_FILES", 1_280_000))
FOLDERS = 1000
BUCKET = (1, 2, 1, 1)  # the smallest row: the latents are not looked at
CASES = [
    harness.Case(
        "listing",
        {"files": FILES, "folders": FOLDERS},
        dtype="none",
        device="cpu",
        threads=THREADS,
        providers=("fastlatent", "recheck", "scandir-stat", "walk"),
    )
]


def make_tree(root: Path) -> None:
    for number in range(FOLDERS):
        folder = root / f"n{number:08d}"
        folder.mkdir(parents=True)
        for i in range(FILES // FOLDERS):
            os.close(os.open(folder / f"{folder.name}_{i}.JPEG", os.O_CREAT | os.O_WRONLY | os.O_EXCL))


def make_dataset(path: Path, root: Path) -> None:
    source = scan_image_folder(root)
    entries = [Entry(one.key, one.place, one.label, one.size, one.stamp) for one in source.items]
    with DatasetWriter.open(path, PROVENANCE, source.classes, unit_rows=65536, schema=Schema((BUCKET,))) as writer:
        writer.plan(entries)
        for unit in writer.claim():
            count = len(unit.items)
            sizes = np.zeros((count, 2), np.int32), np.zeros((count, 4), np.int32)
            rows = np.zeros((count, *BUCKET), np.float16)
            writer.commit(unit, Rows([item.key for item in unit.items], rows, *sizes))
        writer.finish()


def recheck(path: Path, root: Path) -> None:
    source = scan_image_folder(root)
    items = source.items
    columns = items.keys.utf8, items.keys.offsets, items.size, items.stamp, items.label
    assert unchanged(Dataset.open(path), *columns, source.classes)


def scandir_stat(root: Path) -> list[tuple[str, int, int]]:
    found = []
    for folder in sorted(os.listdir(root)):
        here = []
        with os.scandir(root / folder) as entries:
            for entry in entries:
                if entry.is_file() and os.path.splitext(entry.name)[1].lower() in EXTENSIONS:
                    status = entry.stat()
                    here.append((f"{folder}/{entry.name}", status.st_size, status.st_mtime_ns))
        found += sorted(here)
    return found


def walk(root: Path) -> list[tuple[str, int]]:
    found = []
    suffixes = tuple(EXTENSIONS)
    for label, name in enumerate(sorted(entry.name for entry in os.scandir(root) if entry.is_dir())):
        for folder, _, names in sorted(os.walk(root / name, followlinks=True)):
            found += [(os.path.join(folder, one), label) for one in sorted(names) if one.lower().endswith(suffixes)]
    return found


@contextmanager
def prepare(case: harness.Case) -> Iterator[harness.Prepared]:
    memory = "/dev/shm" if os.path.isdir("/dev/shm") else None
    with tempfile.TemporaryDirectory(prefix="fastlatent-bench-", dir=memory) as folder:
        root, dataset = Path(folder) / "images", Path(folder) / "dataset"
        make_tree(root)
        make_dataset(dataset, root)
        providers: dict[str, Callable[[], object]] = {
            "fastlatent": lambda: scan_image_folder(root),
            "recheck": lambda: recheck(dataset, root),
            "scandir-stat": lambda: scandir_stat(root),
            "walk": lambda: walk(root),
        }
        yield harness.Prepared(
            {name: lambda one=one: one for name, one in providers.items()}, rivals=("scandir-stat", "walk")
        )


@pytest.mark.parametrize(
    "case, provider", [(c, p) for c in CASES for p in c.providers], ids=lambda v: getattr(v, "key", v)
)
def test_listing(benchmark, case, provider):
    with prepare(case) as prepared:
        benchmark(prepared.providers[provider]())


if __name__ == "__main__":
    harness.main(CASES, prepare)
