"""What a large dataset costs to open, and what a long training costs in memory."""

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest

from fastlatent.data.latents import LatentDataset
from fastlatent.data.loader import LatentLoader
from fastlatent.store.generation import Contents, publish
from fastlatent.store.reader import Dataset
from fastlatent.store.records import key_columns, key_hashes
from fastlatent.store.shard import Shard

ROWS, SHARD_ROWS = 1_281_167, 16_384  # ImageNet in shards of 256 MiB


@pytest.fixture(scope="module")
def large(make, tmp_path_factory):
    """A dataset of ImageNet's size, all but its shards, which opening does not touch: about 3 s, 150 MB on disk."""
    store = Dataset.open(make(tmp_path_factory.mktemp("large"), 1))
    small = Shard.open(store.path / store.root["indexes"][0]["path"]).columns
    index = {name: np.repeat(column, ROWS, axis=0) for name, column in small.items() if not name.startswith("key")}
    keys = [b"n%08d/n%08d_%05d.JPEG" % (i // 1300, i // 1300, i % 1300) for i in range(ROWS)]
    index |= {"key_hash": key_hashes(keys), **key_columns(keys)}
    index["shard"], index["row"] = (part.astype("<u4") for part in np.divmod(np.arange(ROWS), SHARD_ROWS))
    shards = [
        dataclasses.replace(
            store.shards[0],
            unit=f"{i:032x}",
            path=f"shards/{i}.safetensors",
            rows=min(SHARD_ROWS, ROWS - i * SHARD_ROWS),
        )
        for i in range(-(-ROWS // SHARD_ROWS))
    ]
    publish(
        store.path,
        store,
        Contents(
            fingerprint=store.fingerprint,
            classes=store.classes,
            buckets=[dataclasses.replace(store.buckets[0], rows=ROWS)],
            fields=store.root["fields"],
            manifests=[],
            kept=[],
            added=shards,
            index=index,
            statistics=store.statistics,
            quarantine=[],
        ),
    )
    return store.path


OPEN = """
import json, re, sys, time
from fastlatent.store.reader import Dataset

def resident(name):
    return int(re.search(name + r":\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024

names = ("RssAnon", "RssFile")
before, seconds = [resident(name) for name in names], []
for _ in range(5):
    begin = time.perf_counter()
    dataset = Dataset.open(sys.argv[1])
    seconds.append(time.perf_counter() - begin)
print(json.dumps([min(seconds), *(resident(name) - was for name, was in zip(names, before)), len(dataset)]))
"""


def test_opening_a_dataset_of_imagenets_size(large):
    done = subprocess.run([sys.executable, "-c", OPEN, large], capture_output=True, text=True, check=True)
    seconds, anonymous, mapped, rows = json.loads(done.stdout)
    print(f"{1e3 * seconds:.0f} ms, {anonymous:.0f} MB of its own, {mapped:.0f} MB of mapped files")
    assert rows == ROWS
    assert seconds < 0.25  # 31 ms where the machine is quiet
    assert anonymous < 40  # manifests and temporaries of the checks; 320 MB as Python objects
    assert mapped < 20  # the index has 154 MB; after the checks its pages are given back


def test_memory_does_not_grow_with_epochs(make, tmp_path):
    loader = LatentLoader(LatentDataset(make(tmp_path, 300, unit_rows=100)), 100)

    def resident(epochs):
        for _ in range(epochs):
            assert len(list(loader)) == 3
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096

    before = resident(50)
    grown = resident(500) - before
    loader.close()
    # 500 epochs are 150,000 rows: 14 bytes a row would be as much.
    assert grown < 2 << 20, f"{grown / 2**20:.1f} MiB more after 500 epochs"
