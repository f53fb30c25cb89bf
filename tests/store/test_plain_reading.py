"""A dataset is read with safetensors and json alone: the lines of the README, where fastlatent cannot be imported."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fastlatent.store.reader import Dataset

pytest.importorskip("safetensors")

README = (Path(__file__).parents[2] / "README.md").read_text()
LINES = README.split("is read without fastlatent too:\n\n```python\n")[1].split("```")[0]
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
