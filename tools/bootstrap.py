"""Make .venv ready for one of the Makefile's targets. Needs only a Python >= 3.10 with pip.

Idempotent: a stamp in .venv names what was installed; while pyproject.toml, CMakeLists.txt and csrc/ are
unchanged, the next call returns at once.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
TORCH = "torch==2.13.0"
OLDEST_TORCH = (2, 11)


def main() -> None:
    if len(sys.argv) != 2 or sys.argv[1] not in ("demo", "test", "lint"):
        sys.exit("usage: bootstrap.py demo|test|lint")
    target = sys.argv[1]
    stamp = VENV / f".ready-{target}"
    wanted = fingerprint()
    if stamp.exists() and stamp.read_text() == wanted:
        return
    # A half-made environment (interrupted) has no working pip.
    if not PYTHON.exists() or subprocess.run([PYTHON, "-m", "pip", "--version"], capture_output=True).returncode:
        print(f"creating {VENV}", flush=True)
        try:
            venv.create(VENV, with_pip=True, clear=True)
        except subprocess.CalledProcessError:
            sys.exit("this Python cannot make virtual environments with pip; on Debian: apt-get install python3-venv")
        if torch_version(sys.executable) >= OLDEST_TORCH:
            share_site_packages()
    if torch_version(str(PYTHON)) < OLDEST_TORCH:
        pip(TORCH)
    # The constraint keeps pip from replacing the torch that is there by the newest one.
    torch = subprocess.run([PYTHON, "-c", "import torch; print(torch.__version__.split('+')[0])"],
                           capture_output=True, text=True, check=True).stdout.strip()  # fmt: skip
    constraint = VENV / "torch-constraint.txt"
    constraint.write_text(f"torch=={torch}\n")
    pip("--constraint", str(constraint), "--editable", f"{ROOT}[{target}]")
    stamp.write_text(wanted)


def fingerprint() -> str:
    """Hash of everything that an installation depends on."""
    digest = hashlib.sha256()
    files = [ROOT / "pyproject.toml", ROOT / "CMakeLists.txt", Path(__file__), *sorted(ROOT.glob("csrc/**/*"))]
    for path in files:
        if path.is_file():
            digest.update(path.read_bytes())
    return json.dumps({"root": str(ROOT), "sources": digest.hexdigest()})


def torch_version(python: str) -> tuple[int, int]:
    """(major, minor) of the torch that `python` imports, or (0, 0)."""
    code = "import importlib.metadata as m; print('.'.join(m.version('torch').split('.')[:2]))"
    result = subprocess.run([python, "-c", code], capture_output=True, text=True)
    if result.returncode:
        return (0, 0)
    major, minor = result.stdout.strip().split(".")
    return int(major), int(minor)


def share_site_packages() -> None:
    """Let .venv see the packages of the Python that runs this: its torch (a CUDA build, say) is kept.

    Unlike venv's system_site_packages this also works where that Python is itself a virtual environment.
    """
    outer = sysconfig.get_paths()["purelib"]
    site = subprocess.run([PYTHON, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"],
                          capture_output=True, text=True, check=True).stdout.strip()  # fmt: skip
    (Path(site) / "outer-site-packages.pth").write_text(outer + "\n")


def pip(*args: str) -> None:
    print("pip install", *args, flush=True)
    subprocess.run([PYTHON, "-m", "pip", "install", "--quiet", *args], check=True,
                   env={**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"})  # fmt: skip


if __name__ == "__main__":
    main()
