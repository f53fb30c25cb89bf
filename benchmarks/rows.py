"""The row a measurement leaves in benchmarks/results/<machine>.jsonl, and where and with what it was made."""

from __future__ import annotations

import functools
import importlib.metadata
import json
import os
import platform
import re
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

SCHEMA = 1
ROOT = Path(__file__).resolve().parents[1]
STATUSES = ("ok", "timeout", "error", "unavailable")


@dataclass(frozen=True)
class Case:
    """One thing measured with several providers in the same run. `sizes` (JSON scalars) name the case."""

    benchmark: str
    sizes: Mapping[str, int | float | str]
    dtype: str
    device: str
    providers: tuple[str, ...]
    threads: int = 1

    @property
    def key(self) -> str:
        return _key(self.benchmark, self.sizes, self.dtype, self.device, self.threads)


@dataclass(frozen=True)
class Row:
    """One line of benchmarks/results/<machine>.jsonl. Times are seconds per call; None where not measured."""

    schema: int
    benchmark: str
    provider: str
    case: Mapping[str, int | float | str]
    dtype: str
    device: str  # "cpu" or "cuda": where the timed work ran
    device_name: str  # the processor's or the GPU's name
    threads: int
    status: str  # one of STATUSES
    reason: str | None  # why, where status is not "ok"
    samples: int
    p20: float | None
    p50: float | None
    p80: float | None
    machine: str
    cpu: str
    cores: int
    gpu: str | None
    versions: Mapping[str, str | None]
    commit: str | None  # None outside a checkout
    dirty: bool | None
    date: str  # UTC, ISO 8601
    bytes: int | None = None  # moved per call, each byte counted once read and once written
    flops: int | None = None  # per call
    peak_bytes: int | None = None  # of memory: allocated on the GPU, or added to the process by the work
    floor_seconds: float | None = None  # the time this machine cannot beat for one call
    fraction_of_floor: float | None = None  # floor_seconds / p50: 1 is perfect
    rival: str | None = None  # a provider measured in turn with this one
    ratio: float | None = None  # the rival's p50 / this p50: above 1 is faster than the rival

    @property
    def case_key(self) -> str:
        return _key(self.benchmark, self.case, self.dtype, self.device, self.threads)

    @property
    def key(self) -> str:
        """What makes two rows measurements of the same thing (on one machine)."""
        return f"{self.case_key}/{self.provider}"


def _key(benchmark: str, sizes: Mapping[str, Any], dtype: str, device: str, threads: int) -> str:
    return f"{benchmark}/{','.join(f'{k}={v}' for k, v in sorted(sizes.items()))}/{dtype}/{device}/{threads}"


def append(path: Path, row: Row) -> None:
    """Add one line and force it to disk at once, so that a killed run keeps every row it finished."""
    if row.status not in STATUSES:
        raise ValueError(f"append: expected status in {STATUSES}, got {row.status!r}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(asdict(row)) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read(path: Path) -> list[Row]:
    """All rows of a results file, oldest first; [] where there is none. ValueError for another schema."""
    rows = []
    for number, line in enumerate(path.read_text().splitlines() if path.exists() else [], 1):
        fields = json.loads(line)
        if fields.get("schema") != SCHEMA:
            raise ValueError(f"{path}:{number}: expected schema {SCHEMA}, got {fields.get('schema')}")
        rows.append(Row(**fields))
    return rows


def results_path() -> Path:
    """benchmarks/results/<machine>.jsonl; the variable FASTLATENT_RESULTS names another folder."""
    folder = os.environ.get("FASTLATENT_RESULTS") or ROOT / "benchmarks" / "results"
    return Path(folder) / f"{machine()}.jsonl"


def machine() -> str:
    """A slug for the machine: "nvidia-h200" where there is a GPU, else "cpu-2core-amd-epyc"."""
    name = gpu_name() or f"cpu {cpu_cores()}core {cpu_name()}"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def gpu_name() -> str | None:
    import torch  # here: reading rows needs no torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def cpu_cores() -> int:
    return len(os.sched_getaffinity(0))


@functools.cache
def cpu_name() -> str:
    match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    name = match[1] if match else platform.machine()
    return re.sub(r"\((R|TM|r|tm)\)|\bCPU\b|\bProcessor\b|@.*|\d+-Core", "", name).strip()


@functools.cache
def environment() -> dict[str, Any]:
    """The fields of a row that describe where and with what it was measured."""
    # Appending rows must not make the tree they were measured from dirty.
    changes = _git("status", "--porcelain", "--", ":!benchmarks/results")
    return {
        "machine": machine(),
        "cpu": cpu_name(),
        "cores": cpu_cores(),
        "gpu": gpu_name(),
        "versions": {
            "python": platform.python_version(),
            **{name: _version(name) for name in ("torch", "triton", "numpy", "fastlatent")},
        },
        "commit": _git("rev-parse", "HEAD"),
        "dirty": None if changes is None else changes != "",
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(*args: str) -> str | None:
    try:
        result = subprocess.run(["git", "-C", str(ROOT), *args], capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return result.stdout.strip() if result.returncode == 0 else None
