"""A small latent dataset, written without an autoencoder."""

from pathlib import Path

import numpy as np
import pytest
import torch

from fastlatent.store.records import Schema
from fastlatent.store.rows import Rows
from fastlatent.store.scan import Entry
from fastlatent.store.writer import DatasetWriter

PROVENANCE = {"hashed": {"vae": {"weights": "0" * 64}}, "informational": {"vae_path": "none"}}


def write(folder: Path, count: int, *, flips: int = 1, dtype: str = "float32", unit_rows: int = 5) -> Path:
    """`count` rows [flips, 4, 3, 3] in shards of `unit_rows`; row i is drawn from seed i, and its label is i mod 3."""
    source = folder / "source"
    source.mkdir(parents=True)
    entries = []
    for i in range(count):
        path = source / f"{i:04d}.png"
        path.write_text(str(i))
        stat = path.stat()
        entries.append(Entry(path.name, str(path), i % 3, stat.st_size, stat.st_mtime_ns))
    bucket = (flips, 4, 3, 3)
    with DatasetWriter.open(
        folder / "d", PROVENANCE, ["a", "b", "c"], unit_rows=unit_rows, schema=Schema((bucket,))
    ) as writer:
        for unit in writer.plan(entries):
            keys = [item.key for item in unit.items]
            rows = torch.stack([row(int(key.removesuffix(".png")), bucket, dtype) for key in keys])
            stored = rows.view(torch.uint16) if dtype == "bfloat16" else rows
            sizes = np.zeros((len(keys), 2), np.int32), np.zeros((len(keys), 4), np.int32)
            writer.commit(unit, Rows(keys, stored.numpy(), *sizes))
        writer.finish()
    return folder / "d"


def row(seed: int, bucket: tuple[int, ...], dtype: str) -> torch.Tensor:
    values = torch.randn(bucket, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return values.to(getattr(torch, dtype))


@pytest.fixture(scope="session")
def make():
    return write


@pytest.fixture(scope="session")
def make_row():
    return row


@pytest.fixture(scope="session")
def path(tmp_path_factory):
    """23 rows: shards of 5, the last one of 3; batches of 8 leave 7 over."""
    return write(tmp_path_factory.mktemp("data"), 23, flips=2)
