"""Random batches of 256 latents: fastlatent against what is written by hand and against loaders from PyPI.

Every reader has the same payload, random float16 rows, puts it into its own format first, and gives a contiguous batch
of it (what it gives as 256 objects is copied into one); its first batch is compared with the payload. One thread: a
package's process is held on one core.

Hot: the page cache holds all, and every reader has read an epoch before. Cold: POSIX_FADV_DONTNEED before every batch
(before the first only for readers that go through their files in order); fastlatent's index stays. "mmap-*" read
fastlatent's shards under one piece of advice, "fastlatent-*" are its back ends by name. `bytes` of a cold row are
what a batch brought into the page cache, so bytes / (rows x row_bytes) is the read amplification; `read_ahead_kb` in
the case is the kernel's setting for that disk.

Packages are installed when this runs, each into a virtual environment under --cache; one that cannot be installed or
does not run becomes a row with status "error". WebDataset (tar files in order, a shuffle buffer of 1,000) and LitData
(its own shuffled order of chunks) do not read random rows; ratios are to the fastest reader that does. The two with a
file per sample have 2,000 rows only.

Also here: what writing a dataset costs against writing plain bytes, and what opening one costs (store_costs.py).

    python benchmarks/bench_loading.py --cache FOLDER     about 6 minutes, and 3 GB in --work
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent / "rivals"))  # the scripts there import one another by name

import environments
import harness
import in_process
import numpy as np
import pagecache
import protocol
import store_costs
import torch
from rows import Case, Row, append, results_path

ROWS = 256
DATASET_ROWS = 20_000
SHARDS = 64


def make_cases(folder: Path, dataset_rows: int = DATASET_ROWS) -> list[Case]:
    read_ahead = {"hot": {}, "cold": {"read_ahead_kb": pagecache.read_ahead_kb(folder)}}
    return [
        Case(
            "loading",
            {"rows": ROWS, "row_bytes": row_bytes, "dataset_rows": dataset_rows, "cache": cache, **read_ahead[cache]},
            dtype="float16",
            device="cpu",
            providers=(
                *(name for name, provider in in_process.PROVIDERS.items() if cache in provider.caches),
                *environments.PACKAGES,
            ),
        )
        # A float16 [4, 32, 32] latent, and the mean and logvar of a [16, 32, 32] one (or [4, 64, 64] alone).
        for row_bytes in (8 * 1024, 32 * 1024)
        for cache in ("hot", "cold")
    ] + store_costs.CASES


def make_files(folder: Path, dataset_rows: int, row_bytes: int) -> in_process.Files:
    """The payload, and a dataset of 64 shards that holds it in the same order."""
    files = in_process.Files(folder / "payload", folder / "store", folder / "work")
    files.payload.mkdir(parents=True)
    files.work.mkdir()
    bits = np.random.default_rng(0).integers(0, 0x7C00, (dataset_rows, row_bytes // 2), dtype=np.uint16)
    np.save(files.payload / "rows.npy", bits.view(np.float16))  # finite values
    store_costs.write_dataset(files.store, files.rows(), unit_rows=-(-dataset_rows // SHARDS))
    os.sync()  # else the first providers are measured while the disk is still busy
    return files


@dataclass
class Run:
    """What was measured of one size of row; a package's process measures hot and cold at once."""

    files: in_process.Files
    cache: Path
    seconds: float
    caches: list[str]
    packages: dict[str, Any] = field(default_factory=dict)

    def batches(self, name: str, *, cold: bool = False) -> tuple[protocol.Batches, Path]:
        """A provider's batches, the first one compared with the payload, and the folder of the files that it reads.

        Cold: it finds them out of the page cache, as it would where they do not fit; fastlatent looks.
        """
        provider = in_process.PROVIDERS[name]
        files = replace(self.files, work=self.files.work / name)
        shutil.rmtree(files.work, ignore_errors=True)
        files.work.mkdir()
        folder = files.folder(provider.folder)
        if cold:
            pagecache.drop(folder)
        batches = provider.read(files, ROWS)
        protocol.check(next(batches), files.rows())
        return batches, folder

    def hot(self, names: Sequence[str]) -> dict[str, harness.Outcome]:
        def factory(name: str) -> Callable[[], Callable[[], object]]:
            def start() -> Callable[[], object]:
                batches, _ = self.batches(name)
                protocol.warm(batches, len(self.files.rows()))
                return lambda: next(batches)

            return start

        # Apart from those that take 100 times as long and leave nothing of the others in any cache.
        slow = [name for name in names if in_process.PROVIDERS[name].folder == "work"]
        outcomes: dict[str, harness.Outcome] = {}
        for group in ([name for name in names if name not in slow], slow):
            factories = {name: factory(name) for name in group}
            outcomes |= harness.interleave(factories, device="cpu", min_seconds=self.seconds)
        return outcomes

    def cold(self, names: Sequence[str]) -> tuple[dict[str, harness.Outcome], dict[str, int]]:
        """Outcomes, and the bytes that a batch brought into the page cache."""
        outcomes, sizes = {}, {}
        for name in names:
            try:
                batches, folder = self.batches(name, cold=True)
                found = protocol.cold(batches, folder, self.seconds, len(self.files.rows()))
            except pagecache.CannotDrop as error:
                outcomes[name] = harness.Outcome("unavailable", str(error))
            except Exception as error:  # one broken reader must not cost the other rows
                outcomes[name] = harness.failure(error)
            else:
                outcomes[name], sizes[name] = _ok(found.seconds), found.bytes
        return outcomes, sizes

    def package(self, name: str) -> Any:
        """What the script of a package printed, or the Outcome that tells why there is nothing."""
        if name not in self.packages:
            package = environments.PACKAGES[name]
            work = self.files.work / name
            work.mkdir()
            try:
                python = environments.install(name, package, self.cache)
                script, payload = environments.HERE / package.script, self.files.payload / "rows.npy"
                self.packages[name] = environments.run(
                    python, script, work, payload, ROWS, self.seconds, ",".join(self.caches)
                )
            except environments.Failed as error:
                self.packages[name] = harness.Outcome("error", str(error))
            finally:
                shutil.rmtree(work)
        return self.packages[name]


def _ok(seconds: Sequence[float]) -> harness.Outcome:
    return harness.Outcome("ok", timing=harness.quantiles(seconds))


def loading(case: Case, run: Run) -> list[Row]:
    """The rows of one case: hot or cold."""
    cache, row_bytes = str(case.sizes["cache"]), int(case.sizes["row_bytes"])
    own = [name for name in case.providers if name in in_process.PROVIDERS]
    outcomes, sizes = (run.hot(own), {}) if cache == "hot" else run.cold(own)
    versions: dict[str, dict[str, str]] = {}
    for name in environments.PACKAGES:
        result = run.package(name)
        if isinstance(result, harness.Outcome):
            outcomes[name] = result
            continue
        versions[name] = {result["package"]: result["version"]}
        if result[cache] is None:
            outcomes[name] = harness.Outcome("unavailable", result["reason"])
            continue
        outcomes[name] = _ok(result[cache])
        if cache == "cold":
            sizes[name] = result["cold_bytes"]
    prepared = harness.Prepared(
        dict.fromkeys(case.providers, lambda: lambda: None),
        bytes=2 * ROWS * row_bytes if cache == "hot" else None,
        floor="memcpy" if cache == "hot" else "read-contiguous",
        rivals=[name for name, package in environments.PACKAGES.items() if package.random]
        + [name for name in own if in_process.PROVIDERS[name].rival],
    )
    rows = harness.rows_of(case, prepared, {name: outcomes[name] for name in case.providers})
    return [
        replace(
            row,
            bytes=sizes.get(row.provider, row.bytes),
            versions={**row.versions, **versions.get(row.provider, {})},
        )
        for row in rows
    ]


def describe(row: Row) -> str:
    text = harness.describe(row)
    if row.benchmark == "loading" and row.case["cache"] == "cold" and row.bytes is not None:
        text += f"  read amplification {row.bytes / (ROWS * int(row.case['row_bytes'])):.2f}"
    elif row.benchmark == "store_open" and row.bytes is not None:
        text += f"  resident memory +{row.bytes / 1e6:.0f} MB"
    return text


def main(argv: Sequence[str] | None = None) -> list[Row]:
    parser = harness.case_parser((__doc__ or "").split("\n")[0])
    parser.add_argument("--cache", type=Path, help="where the packages' environments are kept; default: nowhere")
    parser.add_argument("--work", type=Path, help="where the data is written; default: the temporary folder")
    parser.add_argument("--dataset-rows", type=int, default=DATASET_ROWS, help="fewer, for a trial")
    args = parser.parse_args(argv)
    cases = make_cases(args.work or Path(tempfile.gettempdir()), args.dataset_rows)
    chosen = harness.chosen_cases(parser, args, cases)
    return measure(chosen, args.seconds, args.cache, args.work) if chosen else []


def measure(cases: Sequence[Case], seconds: float, cache: Path | None, work: Path | None) -> list[Row]:
    """Measure the cases and append their rows."""
    path, written = results_path(), []
    threads = torch.get_num_threads()

    def keep(rows: Sequence[Row]) -> None:
        for row in rows:
            append(path, row)
            print(describe(row), flush=True)
            written.append(row)

    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory(prefix="fastlatent-bench-", dir=work) as name:
            folder = Path(name)
            sizes = dict.fromkeys(int(case.sizes["row_bytes"]) for case in cases if case.benchmark == "loading")
            for row_bytes in sizes:
                here = [case for case in cases if case.benchmark == "loading" and case.sizes["row_bytes"] == row_bytes]
                files = make_files(folder / str(row_bytes), int(here[0].sizes["dataset_rows"]), row_bytes)
                run = Run(files, cache or folder / "environments", seconds, [str(case.sizes["cache"]) for case in here])
                for case in here:
                    keep(loading(case, run))
                shutil.rmtree(folder / str(row_bytes))
            for case in cases:
                if case.benchmark != "loading":
                    keep(store_costs.measure(case, folder))
    finally:
        torch.set_num_threads(threads)
    return written


if __name__ == "__main__":
    main()
