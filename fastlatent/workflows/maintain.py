"""Keep a finished dataset in order: repair, gc, stats; and make new ones of it: merge, split, filter. No torch."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from fastlatent.config import (
    FilterConfig,
    GcConfig,
    MergeConfig,
    RepairConfig,
    SplitConfig,
    StatsConfig,
)
from fastlatent.pipeline.progress import Progress
from fastlatent.store import derive
from fastlatent.store.collect import collect
from fastlatent.store.live import dataset_index, live_statistics
from fastlatent.store.reader import Dataset
from fastlatent.store.repair import repair as repair_dataset
from fastlatent.store.statistics import Statistics
from fastlatent.workflows.verify import print_findings, shown

SHOWN = 20


def repair(config: RepairConfig) -> None:
    """Publish a generation without what is damaged; see RepairConfig."""
    with Progress("check", 0, "shards") as progress:
        report = repair_dataset(
            config.dataset, threads=config.threads or os.cpu_count() or 1, on_progress=shown(progress)
        )
    if not report.findings:
        print(f"{report.path}: sound, nothing to repair")
        return
    print_findings(report.findings)
    for note in report.notes:
        print(note)
    _print_some("moved to damaged/", report.moved)
    _print_some("samples no longer in the dataset", report.lost)
    now = "no generation is left" if report.generation is None else f"generation {report.generation}"
    plan = f"; {report.planned} units are planned" if report.planned else ""
    again = "; rerun the same encode command to make them again" if report.lost or report.generation is None else ""
    print(f"{report.path}: {now}{plan}{again}")


def gc(config: GcConfig) -> None:
    """Remove what the current generation does not need; see GcConfig."""
    report = collect(config.dataset, dry_run=config.dry_run)
    _print_some("to remove" if config.dry_run else "removed", report.removed)
    if report.waiting:
        print(f"{report.waiting} shards without a sample stay until the pending encode has finished: rerun it, then gc")
    print(
        f"{report.path}: generation {report.generation}, {len(report.removed)} files, {report.bytes:,} bytes "
        + ("would be freed" if config.dry_run else "freed")
    )


def stats(config: StatsConfig) -> None:
    """Print the statistics of a dataset as YAML; see StatsConfig."""
    dataset = Dataset.open(config.dataset)
    parts: dict[int, list[Statistics]] = {}
    every: list[Statistics] = []
    for i, part in live_statistics(
        dataset_index(dataset), dataset.shards, dataset.buckets, dataset.open_shard, recompute=config.recompute
    ):
        parts.setdefault(dataset.shards[i].bucket, []).append(part)
        every.append(part)
    described: dict[str, Any] = {
        "path": str(dataset.path),
        "generation": dataset.generation,
        "rows": len(dataset),
        **_described(functools.reduce(Statistics.merge, every)),
    }
    if config.per == "bucket":
        described["buckets"] = [
            {
                "shape": list(dataset.buckets[number].shape),
                "dtype": dataset.buckets[number].dtype,
                "rows": dataset.buckets[number].rows,
                **_described(functools.reduce(Statistics.merge, own)),
            }
            for number, own in sorted(parts.items())
        ]
    print(yaml.safe_dump(described, sort_keys=False, allow_unicode=True, width=120), end="")


def _described(per_channel: Statistics) -> dict[str, Any]:
    """The numbers of all channels together, and of each."""
    return {"all channels": _numbers(scalar(per_channel)), "per channel": _numbers(per_channel)}


def _numbers(statistics: Statistics) -> dict[str, Any]:
    columns = {
        "latent mean": statistics.latent_mean,
        "latent std": statistics.latent_std,
        "std of the means": np.sqrt(statistics.m2 / statistics.count),
        "posterior variance": statistics.posterior_variance,
        "min": statistics.min,
        "max": statistics.max,
        "abs max": statistics.abs_max,
    }
    one = len(statistics.mean) == 1
    return {"values": statistics.count} | {
        name: column.tolist()[0] if one else column.tolist() for name, column in columns.items()
    }


def scalar(per_channel: Statistics) -> Statistics:
    """Of the values of all channels together: one channel. Every channel has as many values."""
    parts = [
        Statistics(
            per_channel.count,
            **{
                name: getattr(per_channel, name)[i : i + 1]
                for name in Statistics.__dataclass_fields__
                if name != "count"
            },
        )
        for i in range(len(per_channel.mean))
    ]
    return functools.reduce(Statistics.merge, parts)


def merge(config: MergeConfig) -> None:
    """Unite datasets; see MergeConfig."""
    _print_derived(derive.merge([Path(path) for path in config.datasets], Path(config.out), copy=config.copy))


def split(config: SplitConfig) -> None:
    """Divide a dataset; see SplitConfig."""
    shares = parse_fractions(config.fractions)
    parts = derive.split(Path(config.dataset), shares, config.seed, config.out, copy=config.copy)
    for part in parts.values():
        _print_derived(part)


def filter(config: FilterConfig) -> None:
    """Pick samples of a dataset; see FilterConfig."""
    listed = None
    if config.list is not None:
        try:
            lines = Path(config.list).read_bytes().splitlines()
        except OSError as error:
            raise ValueError(f"--list {config.list}: expected a file of keys, one a line: {error.strerror}") from None
        listed = frozenset(line for line in lines if line)
    conditions = derive.Conditions(config.classes, config.keys, config.min_size, listed)
    _print_derived(derive.select(Path(config.dataset), conditions, Path(config.out), copy=config.copy))


def parse_fractions(text: str) -> dict[str, float]:
    """ "train=0.9,val=0.1" as {"train": 0.9, "val": 0.1}.

    Raises:
        ValueError: it is not of that form, or a name occurs twice or holds a "/".
    """
    shares: dict[str, float] = {}
    for part in text.split(","):
        name, equals, share = (one.strip() for one in part.partition("="))
        try:
            value = float(share)
        except ValueError:
            value = 0.0
        if not equals or not name or "/" in name or name in shares or not value > 0:
            raise ValueError(f'--fractions: expected NAME=SHARE,… such as "train=0.9,val=0.1", got {text!r}')
        shares[name] = value
    return shares


def _print_derived(derived: derive.Derived) -> None:
    info = derived.info
    copied = info.shards - derived.linked
    how = f"{derived.linked} shared with their parents" + (f", {copied} copied" if copied else "")
    print(f"{info.path}: {info.rows:,} rows in {info.shards} shards ({how}), {info.bytes / 2**20:,.1f} MiB")


def _print_some(what: str, names: list[str]) -> None:
    if names:
        print(f"{len(names)} {what}:")
        for name in names[:SHOWN]:
            print(f"  {name!a}")
        if len(names) > SHOWN:
            print(f"  … and {len(names) - SHOWN} more")
