"""The rivals that are packages: their pinned versions, and a virtual environment for each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
INSTALL_SECONDS = 180
RUN_SECONDS = 120


@dataclass(frozen=True)
class Package:
    """A rival: its script here, and all that is installed for it. numpy and torch are those of this interpreter, so
    that nothing of gigabytes is downloaded and every reader makes its arrays with the same numpy.

    `random`: it reads any row at any time; else in an order of its own, which no other reader is compared with.
    """

    script: str
    requirements: tuple[str, ...]
    random: bool = True


AWS = (
    "boto3==1.44.5", "botocore==1.44.5", "jmespath==1.1.0", "python-dateutil==2.9.0.post0", "s3transfer==0.19.3",
    "six==1.17.0",
)  # fmt: skip
PACKAGES = {
    "mosaicml-streaming": Package(
        "mds.py",
        (
            "mosaicml-streaming==0.13.0", "brotli==1.2.1", "catalogue==2.0.10", "cramjam==2.14.0",
            "python-snappy==0.7.3", "zstd==1.5.7.2", *AWS,
        ),
    ),
    "litdata": Package(
        "litdata_chunks.py",
        ("litdata==0.2.76", "lightning-utilities==0.15.3", "obstore==0.12.1", *AWS),
        random=False,
    ),
    "webdataset": Package("webdataset_tar.py", ("webdataset==1.0.2", "braceexpand==0.1.7"), random=False),
    "hf-datasets": Package(
        "hf_arrow.py",
        ("datasets==5.2.0", "dill==0.4.1", "multiprocess==0.70.19", "pandas==3.1.1", "pyarrow==26.0.1"),
    ),
    "lmdb": Package("lmdb_file.py", ("lmdb==3.0.0",)),
    "array-record": Package("arrayrecord.py", ("array-record==0.8.6", "absl-py==2.5.1", "etils==1.15.0")),
}  # fmt: skip


class Failed(Exception):
    """A rival that cannot be installed, or that does not run; the message is the last line that it said."""


def install(name: str, package: Package, cache: Path) -> Path:
    """The Python of the rival's environment, `cache`/NAME, made where it is not there with these versions.

    Raises:
        Failed: pip cannot install them.
    """
    folder = cache / name
    python = folder / "bin" / "python"
    done = folder / "requirements.txt"
    wanted = "\n".join(package.requirements)
    if done.is_file() and done.read_text() == wanted:
        return python
    _call([sys.executable, "-m", "venv", "--clear", "--without-pip", str(folder)], INSTALL_SECONDS)
    [site] = folder.glob("lib/python*/site-packages")
    shared = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    (site / "shared.pth").write_text("\n".join(shared) + "\n")  # after the environment's own packages
    pip = [sys.executable, "-m", "pip", "--python", str(python), "--disable-pip-version-check", "--quiet"]
    _call([*pip, "install", "--no-deps", "--only-binary=:all:", *package.requirements], INSTALL_SECONDS)
    done.write_text(wanted)
    return python


def run(python: Path, script: Path, folder: Path, payload: Path, batch: int, seconds: float, caches: str) -> Any:
    """What a rival's script printed last: see `protocol`. `folder` is empty, and also its home.

    Raises:
        Failed: it does not end well, or in RUN_SECONDS.
    """
    environment = os.environ | {
        "HOME": str(folder), "TMPDIR": str(folder), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1",
    }  # fmt: skip
    command = [str(python), str(script), str(folder), str(payload), str(batch), str(seconds), caches]
    lines = _call(command, RUN_SECONDS, environment).splitlines()
    try:
        return json.loads(lines[-1])
    except (IndexError, ValueError):
        raise Failed(f"{script.name}: expected a line of JSON, got {lines[-1:]!r:.200}") from None


def _call(command: list[str], seconds: float, environment: dict[str, str] | None = None) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, env=environment)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Failed(f"{error!r:.300}") from None
    if done.returncode:
        lines = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        raise Failed((lines or [f"exit status {done.returncode}"])[-1][:300])
    return done.stdout
