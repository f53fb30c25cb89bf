"""images or videos → dataset; any number of processes and hosts on one file system may fill one together."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

from fastlatent.config import EncodeConfig
from fastlatent.pipeline.progress import Progress
from fastlatent.sources.trajectories import find_datasets
from fastlatent.store.admission import check_shards
from fastlatent.store.files import write_atomic
from fastlatent.store.merge import published
from fastlatent.store.provenance import fingerprint
from fastlatent.store.reader import Dataset
from fastlatent.store.records import ROOT
from fastlatent.store.unchanged import unchanged
from fastlatent.workflows.encode_open import set_up_encode
from fastlatent.workflows.encode_plan import open_writer, plan, preflight, try_engine
from fastlatent.workflows.encode_ray import require_ray, run_units
from fastlatent.workflows.encode_setup import EncodeSetup
from fastlatent.workflows.encode_work import Work, check_errors
from fastlatent.workflows.runtime import absolute_paths, keep_config, refuse_output_in_source

STORE_FOLDERS = (
    "shards", "manifest", "index", "statistics", "quarantine", "generation", "plan", "journal", "lease", "damaged",
)  # fmt: skip
LISTED = 100  # files that are named at the end; the dataset's quarantine names all


@dataclass(frozen=True)
class EncodeReport:
    """What an encode run left: rows and shards of the dataset, rows encoded now, and what was left out.

    quarantined: files that cannot be decoded, or whose latents are not finite. unreadable: what the source could not
    give. retried: images or clips that overflowed in half precision, and were encoded again in float32.
    """

    path: Path
    rows: int
    encoded: int
    shards: int
    bytes: int
    quarantined: dict[str, str]
    unreadable: dict[str, str]
    retried: int = 0


def encode(config: EncodeConfig) -> EncodeReport | list[EncodeReport]:
    """Encode images or videos into a dataset, or each of several; see EncodeConfig.

    Raises:
        ValueError: the source, the autoencoder or the dataset folder cannot be used as asked; --max-errors is exceeded.
    """
    if not config.all:
        return encode_one(config)
    if config.trajectories is not None or config.kind not in ("auto", "trajectories"):
        raise ValueError("--all: expected neither --trajectories nor another --kind: it encodes every dataset whole")
    reports, failed = [], []
    for name, path in find_datasets(config.source).items():
        print(f"{path} -> {Path(config.out) / name}")
        one = replace(config, source=path, out=str(Path(config.out) / name), all=False, kind="trajectories")
        try:
            reports.append(encode_one(one))
        except (ValueError, OSError) as error:  # the others do not wait for it
            failed.append(f"{name}: {error}")
            print(failed[-1])
    if failed:
        raise ValueError(
            "\n  ".join([f"--all: {len(failed)} of {len(failed) + len(reports)} datasets failed:", *failed])
        )
    return reports


def encode_one(config: EncodeConfig) -> EncodeReport:
    """`encode` of one dataset."""
    refuse_output_in_source(config.out, config.source)
    if config.cluster == "ray":
        require_ray()
    with closing(set_up_encode(config)) as setup:
        return _encode(setup)


def _encode(setup: EncodeSetup) -> EncodeReport:
    config, out = setup.config, Path(setup.config.out)
    _check_beside(setup)
    if (done := finished(setup)) is not None:
        info = published(done)
        report = EncodeReport(
            out, info.rows, 0, info.shards, info.bytes, _quarantined(done), setup.left_out
        )  # fmt: skip
        _copy_beside(setup, out)
        check_errors(setup, len(report.quarantined))
        _print(setup, report)
        return report
    try_engine(setup)
    with open_writer(setup) as writer:
        keep_config(out / "encode.yaml", absolute_paths(config))
        for line in setup.reasons:
            print(line)
        _copy_beside(setup, out)
        check_errors(setup, 0)
        with Progress("read", 0, "files") as scanned:

            def on_scan(done: int, total: int) -> None:
                scanned.total = total
                scanned.advance(done - scanned.done)

            units = plan(setup, writer, on_scan)
        preflight(setup, units)
        work = Work(setup, writer)
        check_errors(setup, work.errors)
        elsewhere = run_units(setup, units) if config.cluster == "ray" else 0
        work.run(sum(len(unit.items) for unit in units))
        check_errors(setup, writer.left_out)
        info = writer.finish()
    report = EncodeReport(
        out,
        info.rows,
        elsewhere + work.encoded,
        info.shards,
        info.bytes,
        _quarantined(Dataset.open(out)),
        setup.left_out,
        work.retried,
    )
    _print(setup, report)
    return report


def finished(setup: EncodeSetup) -> Dataset | None:
    """The dataset, if it is of these settings and of exactly these files: told by arrays, 1.28 M files in a second."""
    out, items = Path(setup.config.out), setup.table
    if not (out / ROOT).exists() or items is None:
        return None
    dataset = Dataset.open(out)
    check_shards(out, dataset)
    same = dataset.fingerprint == fingerprint(setup.provenance()["hashed"]) and unchanged(
        dataset, items.keys.utf8, items.keys.offsets, items.size, items.stamp, items.label, setup.source.classes
    )
    return dataset if same else None


def _quarantined(dataset: Dataset) -> dict[str, str]:
    return {one.key: one.reason for one in dataset.quarantined}


def _check_beside(setup: EncodeSetup) -> None:
    """Raise ValueError where --copy-pkl cannot be done."""
    if setup.config.copy_pkl and not setup.source.beside:
        raise ValueError("--copy-pkl: expected trajectories, got a source without traj_data.pkl")
    names = {name.split("/")[0] for name in setup.source.beside if setup.config.copy_pkl}
    if taken := sorted(names & set(STORE_FOLDERS)):
        raise ValueError(f"--copy-pkl: a trajectory cannot be called {taken[0]!r}: the dataset has a folder of it")


def _copy_beside(setup: EncodeSetup, out: Path) -> None:
    """--copy-pkl: the source's own files beside the dataset, where a loader of the source's tree looks for them."""
    for name, read in setup.source.beside.items() if setup.config.copy_pkl else ():
        data, target = read(), out / name
        if not target.exists() or target.read_bytes() != data:
            target.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(target, data)


def _print(setup: EncodeSetup, report: EncodeReport) -> None:
    print(
        f"{report.path}: {report.rows:,} rows in {report.shards} shards, {report.bytes / 2**20:,.1f} MiB; "
        f"{report.encoded:,} files encoded now"
    )
    if report.retried:
        print(
            f"{report.retried:,} {setup.noun} (mirror images counted) overflowed in {setup.config.compute_dtype} and "
            "were encoded in float32"
        )
    if setup.text is not None and setup.text.truncated:
        print(f"{setup.text.truncated:,} captions were longer than {setup.text.max_length} tokens and were cut")
    ignored = ", ".join(f"{suffix or 'no suffix'} {count:,}" for suffix, count in sorted(setup.source.ignored.items()))
    if ignored:
        print(f"not looked at, by suffix: {ignored}")
    for what, listed in (
        ("could not be used", report.quarantined),
        ("could not be read", report.unreadable),
    ):
        if listed:
            print(f"{len(listed)} files {what} and are not in the dataset:")
            for key, reason in list(listed.items())[:LISTED]:
                print(f"  {key!a}: {reason}")
            if len(listed) > LISTED:
                print(f"  … and {len(listed) - LISTED} more")
