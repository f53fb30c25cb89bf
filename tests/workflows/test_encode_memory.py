"""The memory of an encode does not grow with the number of images that it has done."""

import re

import numpy as np
import pytest
from PIL import Image

# Runs in the child before the command, which then prints its resident memory after every unit.
WATCH = """
from pathlib import Path
from fastlatent.workflows import encode_work

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

original = encode_work.Work._write

def write(self, unit, rows, bad):
    original(self, unit, rows, bad)
    print("resident", resident(), flush=True)

encode_work.Work._write = write
"""


@pytest.mark.parametrize("count", [3_000, pytest.param(100_000, marks=pytest.mark.soak)])
def test_memory_stays_flat(chain, forked, tmp_path, count):
    draw = np.random.default_rng(0)
    images = [Image.fromarray(draw.integers(0, 256, (10, 12, 3), dtype=np.uint8)) for _ in range(50)]
    files = []
    for i, image in enumerate(images):
        image.save(tmp_path / f"{i}.png")
        files.append((tmp_path / f"{i}.png").read_bytes())
    for i in range(count):
        folder = tmp_path / "images" / f"{i // 1000:03d}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{i}.png").write_bytes(files[i % 50])
    units = 30
    arguments = ["encode", "--size", "8", "--batch-size", "64", "--unit-rows", str(count // units), "--threads", "1"]
    folders = ["--vae", str(chain.vae), "--out", str(tmp_path / "latents"), str(tmp_path / "images")]
    codes = forked({"argv": [*arguments, *folders], "first": WATCH})
    printed = (tmp_path / "log-0-0.txt").read_text()
    assert codes == [[0]], printed
    seen = [int(size) for size in re.findall(r"^resident (\d+)$", printed, re.MULTILINE)]
    assert len(seen) >= units
    # The first units bring what every unit needs: threads, buffers, the allocator's arenas. A thousand images of 192
    # bytes and as many latents would be 1 MB of pixels; 100,000 pictures kept would be 100 MB.
    assert max(seen[units // 2 :]) - max(seen[: units // 3]) < 24 * 2**20
