"""fastlatent convert against reading the same cache with its usual reader and writing the bytes.

Caches of 4,000 images (MAR: moments and mirror image of KL-16, 64 KiB; frames: 12 KiB in a torch file; EDM2: 32 KiB),
of 16,000 (LightningDiT: 32 KiB, in two shards), and of 400 clips (tokens: 1568 x 384 float16, 1.2 MB in a torch file),
all in the page cache.

"read-write", the rival: np.load, torch.load (weights_only) or safe_open of each file in turn, the arrays' bytes written
to one file, which is synced at the end: one thread, as the projects read. "fastlatent" is the whole command: listing,
digests, plan, conversion, statistics, shards synced, index; 64 rows read again. Times are per row. Export is the way
back, and "write" the rows of the dataset with the project's usual writer, one file after another.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

os.environ["OMP_WAIT_POLICY"] = "PASSIVE"

import harness
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import save_file

from fastlatent.config import ConvertConfig, build
from fastlatent.store.reader import Dataset
from fastlatent.workflows.convert import convert

ROWS = {"mar": 4000, "frames": 4000, "edm2": 4000, "lightningdit": 16000, "tokens": 400}
CASES = [
    harness.Case(
        "convert",
        {"format": format, "rows": rows, "direction": direction},
        dtype="float16" if format == "tokens" else "float32",
        device="cpu",
        providers=("fastlatent", rival),
    )
    for direction, rival in (("in", "read-write"), ("out", "write"))
    for format, rows in ROWS.items()
    if direction == "in" or format in ("mar", "frames")
]


@contextmanager
def prepare(case: harness.Case) -> Iterator[harness.Prepared]:
    threads_before = torch.get_num_threads()
    torch.set_num_threads(case.threads)
    format, rows = str(case.sizes["format"]), int(case.sizes["rows"])
    with tempfile.TemporaryDirectory(prefix="fastlatent-bench-") as name:
        folder = Path(name)
        size = make(folder / "cache", format, rows)
        os.sync()
        numbers = itertools.count()

        def fresh() -> Path:
            """A folder that is not there; the last one is gone."""
            number = next(numbers)
            shutil.rmtree(folder / f"out{number - 1}", ignore_errors=True)
            return folder / f"out{number}"

        if case.sizes["direction"] == "in":
            source, settings = folder / "cache", {"format": format}
            theirs = {"read-write": lambda: lambda: read_and_write(folder, format)}
        else:
            run(folder / "cache", folder / "latents", format=format)
            source, settings = folder / "latents", {"to": format}
            theirs = {"write": lambda: lambda: write(folder / "latents", fresh(), format)}
        try:
            providers = {"fastlatent": lambda: lambda: run(source, fresh(), **settings), **theirs}
            yield harness.Prepared(providers, bytes=2 * size // rows, rivals=tuple(theirs), units=rows)
        finally:
            torch.set_num_threads(threads_before)


def run(source: Path, out: Path, **settings: str) -> None:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        values = {"source": str(source), "out": str(out), "check": 64, **settings}
        convert(build(ConvertConfig, {}, values))


def make(root: Path, format: str, rows: int) -> int:
    """Write a cache with the project's usual writer; the bytes of its values."""
    draw = np.random.default_rng(0)
    root.mkdir()
    if format == "mar":
        values = draw.standard_normal((rows, 2, 32, 16, 16), np.float32)
        for label in range(10):
            (root / f"class{label}").mkdir()
        for i, (moments, flip) in enumerate(values):
            np.savez(root / f"class{i % 10}" / f"{i}.JPEG.npz", moments=moments, moments_flip=flip)
    elif format == "frames":
        values = draw.standard_normal((rows, 4, 28, 28), np.float32)
        for i, frame in enumerate(values):
            folder = root / f"walk{i // 100:03d}"
            folder.mkdir(exist_ok=True)
            torch.save({"latent": torch.from_numpy(frame)}, folder / f"{i % 100}.pt")
    elif format == "edm2":
        values = draw.uniform(0.1, 2.0, (rows, 8, 32, 32)).astype(np.float32)
        for i, row in enumerate(values):
            folder = root / f"{i // 1000:05d}"
            folder.mkdir(exist_ok=True)
            np.save(folder / f"img-mean-std-{i:08d}.npy", row)
        labels = [[f"{i // 1000:05d}/img-mean-std-{i:08d}.npy", i % 10] for i in range(rows)]
        (root / "dataset.json").write_text(json.dumps({"labels": labels}))
    elif format == "lightningdit":
        values = draw.standard_normal((2, rows, 4, 32, 32), np.float32)
        for shard in range(2):
            part = slice(shard * rows // 2, (shard + 1) * rows // 2)
            labels = np.arange(rows // 2, dtype=np.int64) % 10
            arrays = {"latents": values[0, part], "latents_flip": values[1, part], "labels": labels}
            save_file(
                {k: np.ascontiguousarray(v) for k, v in arrays.items()},
                root / f"latents_rank00_shard{shard:03d}.safetensors",
            )
    else:
        values = draw.standard_normal((rows, 1568, 384), np.float32).astype(np.float16)
        for i, tokens in enumerate(values):
            torch.save(torch.from_numpy(tokens), root / f"{i}.pt")
    return values.nbytes


def read_and_write(folder: Path, format: str) -> None:
    """Every value read as the project reads it, and its bytes written once."""
    with open(folder / "bytes", "wb") as file:
        for array in READERS[format](folder / "cache"):
            file.write(np.ascontiguousarray(array).data)
        file.flush()
        os.fdatasync(file.fileno())


def _npz(root: Path) -> Iterator[np.ndarray]:
    for path in sorted(root.glob("*/*.npz")):
        with np.load(path) as archive:
            yield archive["moments"]
            yield archive["moments_flip"]


def _torch(root: Path) -> Iterator[np.ndarray]:
    for path in sorted(root.rglob("*.pt")):
        loaded = torch.load(path, weights_only=True)
        yield (loaded["latent"] if isinstance(loaded, dict) else loaded).numpy()


def _npy(root: Path) -> Iterator[np.ndarray]:
    return (np.load(path) for path in sorted(root.rglob("*.npy")))


def _shards(root: Path) -> Iterator[np.ndarray]:
    for path in sorted(root.glob("*.safetensors")):
        with safe_open(path, "np") as shard:
            for name in ("latents", "latents_flip", "labels"):
                yield shard.get_tensor(name)


READERS: dict[str, Callable[[Path], Iterator[np.ndarray]]] = {
    "mar": _npz, "frames": _torch, "edm2": _npy, "lightningdit": _shards, "tokens": _torch,
}  # fmt: skip


def write(latents: Path, out: Path, format: str) -> None:
    """The dataset's rows in the project's format, by its usual writer."""
    dataset = Dataset.open(latents)
    for i in range(len(dataset)):
        values = dataset.open_shard(int(dataset.shard[i])).columns[dataset.payload][dataset.row[i]]
        path = out / dataset.key(i)
        path.parent.mkdir(parents=True, exist_ok=True)
        if format == "mar":
            np.savez(f"{path}.npz", moments=values[0], moments_flip=values[1])
        else:
            torch.save({"latent": torch.from_numpy(values[0] * np.float32(0.18215))}, f"{path}.pt")
    os.sync()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.key)
def test_convert(benchmark, case):
    with prepare(case) as prepared:
        benchmark(prepared.providers["fastlatent"]())


if __name__ == "__main__":
    harness.main(CASES, prepare)
