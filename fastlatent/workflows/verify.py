"""Check a dataset; on request also encode some of its samples again."""

from __future__ import annotations

import os

from fastlatent.config import VerifyConfig
from fastlatent.pipeline.progress import Progress
from fastlatent.store.verify import Finding
from fastlatent.store.verify import Progress as OnProgress
from fastlatent.store.verify import verify as check

SHOWN = 100  # findings that are printed; a report has them all


def verify(config: VerifyConfig) -> int:
    """Print what is wrong with config.dataset; 1 where something is. See VerifyConfig."""
    with Progress("verify", 0, "shards") as progress:
        report = check(
            config.dataset, full=config.full, threads=config.threads or os.cpu_count() or 1, on_progress=shown(progress)
        )
    findings, again = report.findings, ""
    if config.reencode and not findings:
        from fastlatent.workflows.reencode import reencode  # only here is torch needed

        findings, again = reencode(config)
    print_findings(findings)
    depth = f"{report.bytes / 2**20:,.1f} MiB read" if report.full else "headers; --full reads every byte"
    remedy = "`fastlatent repair` takes them out" if report.findings else "they are not what these settings give"
    verdict = f"{len(findings)} findings; {remedy}" if findings else "sound"
    held = f"generation {report.generation}, {report.rows:,} rows in {report.shards} shards"
    print(f"{report.path}: {held} ({depth}){again}: {verdict}")
    return 1 if findings else 0


def shown(progress: Progress) -> OnProgress:
    """What the store calls with (done, total) to move a progress line."""

    def on_progress(done: int, total: int) -> None:
        progress.total = total
        progress.advance(done - progress.done)

    return on_progress


def print_findings(findings: list[Finding]) -> None:
    """One line each, for the first of them."""
    for finding in findings[:SHOWN]:
        print(finding)
    if len(findings) > SHOWN:
        print(f"… and {len(findings) - SHOWN} more")
