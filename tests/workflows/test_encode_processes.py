"""Kills, several processes, torchrun and Ray: whoever does the work and however it ends, the dataset is the same."""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from fastlatent.store.reader import Dataset

ENCODE = ["encode", "--size", "8", "--batch-size", "2", "--unit-rows", "4", "--threads", "1", "--readers", "2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """160 pictures, 40 units; every 16th is no picture."""
    root = tmp_path_factory.mktemp("many")
    draw = random.Random(0)
    for label in ("ant", "bee"):
        (root / label).mkdir()
        for i in range(80):
            image = Image.new("RGB", (12, 10), tuple(draw.randrange(256) for _ in range(3)))
            image.paste((draw.randrange(256), 0, 0), (2, 2, 2 + i % 9, 8))
            image.save(root / label / f"{i}.png")
        for i in range(0, 80, 16):
            (root / label / f"{i}.png").write_bytes(b"no picture")
    return root


def arguments(chain, folder, out, *more):
    return [*ENCODE, *more, "--vae", str(chain.vae), "--out", str(out), str(folder)]


def settled(chain, out: Path) -> dict[str, bytes]:
    """All of a dataset but encode.yaml, which names the folder it is in."""
    return {name: data for name, data in chain.contents(out).items() if name != "encode.yaml"}


@pytest.fixture(scope="module")
def undisturbed(chain, folder, tmp_path_factory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("undisturbed") / "latents"
    done = chain.ok(" ".join(ENCODE), "--vae", chain.vae, "--out", out, folder)
    assert "150 rows in 40 shards" in done.out and "10 files could not be used" in done.out
    return settled(chain, out)


@pytest.mark.parametrize("count", [3, pytest.param(50, marks=pytest.mark.soak)])
def test_killed_at_random_it_ends_with_the_same_bytes(chain, forked, folder, undisturbed, tmp_path, count):
    out, draw = tmp_path / "latents", random.Random(count)
    argv = arguments(chain, folder, out)
    kills = [{"argv": argv, "kill_after": [draw.uniform(0.05, 0.8)]} for _ in range(count)]
    *killed, last = forked(*kills, {"argv": argv})
    assert last == [0]
    assert any(codes == [-9] for codes in killed)  # else the machine is so fast that nothing was tested
    assert settled(chain, out) == undisturbed


def test_four_processes_one_of_them_killed(chain, forked, folder, undisturbed, tmp_path):
    out = tmp_path / "latents"
    job = {"argv": arguments(chain, folder, out), "count": 4, "kill_after": [0.4, None, None, None]}
    (codes,) = forked(job)
    assert codes[1:] == [0, 0, 0] and codes[0] in (0, -9), [(tmp_path / f"log-0-{i}.txt").read_text() for i in range(4)]
    assert settled(chain, out) == undisturbed


def test_ctrl_c_stops_and_the_same_command_goes_on(chain, forked, folder, undisturbed, tmp_path):
    out = tmp_path / "latents"
    argv = arguments(chain, folder, out)
    begun = [str(out / "shards" / "*" / "*.safetensors"), 0]
    codes = forked({"argv": argv, "kill_after": [begun], "signal": 2}, {"argv": argv})
    assert codes[0] in ([130], [0]) and codes[1] == [0]
    assert settled(chain, out) == undisturbed


def test_torchrun_with_two_processes(chain, folder, undisturbed, tmp_path):
    out = tmp_path / "latents"
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0",
         "-m", "fastlatent", *arguments(chain, folder, out)],
        capture_output=True, text=True, timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert settled(chain, out) == undisturbed


def test_ray(chain, forked, folder, undisturbed, tmp_path):
    pytest.importorskip("ray")
    out = tmp_path / "latents"
    argv = arguments(chain, folder, out, "--cluster", "ray")
    codes = forked({"argv": argv, "first": "import os; os.environ['RAY_USAGE_STATS_ENABLED'] = '0'"})
    printed = (tmp_path / "log-0-0.txt").read_text()
    assert codes == [[0]], printed
    assert "150 files encoded now" in printed
    assert settled(chain, out) == undisturbed
    assert len(Dataset.open(out).quarantined) == 10
