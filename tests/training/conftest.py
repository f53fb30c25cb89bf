"""Teams of processes for the tests of training."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# What the children would import else, each of them.
IMPORTED = [f"fastlatent.workflows.{name}" for name in ("encode", "train_ar", "train_ddpm", "train_dit", "train_vae")]
IMPORTED.append("matplotlib.backends.backend_agg")


class Teams:
    """Runs a function in a team of processes; see forked_team.py."""

    def __init__(self, folder):
        here = Path(__file__).parent
        paths = [str(here), str(here.parent / "workflows"), os.environ.get("PYTHONPATH", "")]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, here / "forked_team.py", *IMPORTED], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            text=True, env=environment,
        )  # fmt: skip
        self._folder, self._count = folder, 0

    def run(self, world, call, kill_after=None, kill_from=None, **kwargs):
        """Returns what the first process printed. Exit codes are 0, or None is returned where it was killed."""
        self._count += 1
        log = self._folder / f"{self._count}"
        job = {
            "world": world, "call": call, "kwargs": kwargs, "log": str(log), "kill_after": kill_after,
            "kill_from": kill_from,
        }  # fmt: skip
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        codes = json.loads(self._process.stdout.readline())
        printed = [Path(f"{log}-{rank}.txt").read_text() for rank in range(world)]
        allowed = {0} if kill_after is None else {0, -9}
        assert set(codes) <= allowed, f"exit codes {codes}\n" + "\n".join(printed)
        return None if -9 in codes else printed[0]

    def close(self):
        self._process.stdin.close()
        self._process.wait(timeout=30)


@pytest.fixture(scope="session")
def teams(tmp_path_factory):
    made = Teams(tmp_path_factory.mktemp("teams"))
    yield made
    made.close()
