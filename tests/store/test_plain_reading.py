"""A dataset is read with safetensors and json alone: the lines of the README, where fastlatent cannot be imported."""

import subprocess
import sys

import numpy as np
import pytest

from fastlatent.store.reader import Dataset

pytest.importorskip("safetensors")

LINES = """
import json
from safetensors.numpy import load_file

root = json.load(open(f"{path}/dataset.json"))
shards = [s for m in root["manifests"] for s in json.load(open(f"{path}/{m['path']}"))["shards"]]
index = load_file(f"{path}/{root['indexes'][0]['path']}")
ends, utf8 = index["key.offsets"].tolist(), index["key.utf8"].tobytes()
keys = [utf8[a:b].decode("utf-8", "surrogateescape") for a, b in zip(ends, ends[1:])]
opened = {i: load_file(f"{path}/{shards[i]['path']}") for i in set(index["shard"].tolist())}
moments = [opened[s]["moments"][r] for s, r in zip(index["shard"].tolist(), index["row"].tolist())]
labels = [root["classes"][i] if i >= 0 else None for i in index["label"].tolist()]
"""
BLOCK = "import sys; sys.modules['fastlatent'] = sys.modules['torch'] = None; path, out = sys.argv[1:]"
REPORT = "import numpy; numpy.savez(out, moments=moments, keys=keys, labels=labels)"


def test_ten_lines_read_a_dataset(dataset, tmp_path):
    assert len([line for line in LINES.splitlines() if line and "import" not in line]) <= 10
    script = "\n".join((BLOCK, LINES, REPORT))
    subprocess.run([sys.executable, "-c", script, str(dataset), str(tmp_path / "read.npz")], check=True)
    ours = Dataset.open(dataset)
    with np.load(tmp_path / "read.npz") as read:
        assert read["keys"].tolist() == [ours.key(i) for i in range(len(ours))]
        assert read["labels"].tolist() == [ours.classes[i] for i in ours.label]
        for i in range(len(ours)):
            row = ours.open_shard(int(ours.shard[i])).columns["moments"][ours.row[i]]
            np.testing.assert_array_equal(read["moments"][i], row)
            assert read["moments"][i].dtype == row.dtype == np.float16
