"""How every benchmark here measures, and the row (rows.py) it leaves in benchmarks/results/<machine>.jsonl.

A benchmark file is a list of `Case`s, a `prepare(case)` that yields `Prepared` providers, and `harness.main`:

    python benchmarks/bench_x.py              measure every case and append its rows
    python benchmarks/bench_x.py --list       print its cases and their providers as JSON lines
    python benchmarks/bench_x.py --case KEY   only this case (may be repeated)
    pytest benchmarks/bench_x.py --benchmark-only
"""

from __future__ import annotations

import argparse
import importlib
import json
import platform
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone

import torch
from rows import SCHEMA, Case, Row, append, cpu_name, environment, gpu_name, results_path

# One sample lasts at least this long: 1 ms is 1,000 times the resolution of a CUDA event or of perf_counter.
SAMPLE_SECONDS = 1e-3
MIN_SAMPLES = 5
CAP_SECONDS = 60.0


# ---- timing ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Timing:
    """Quantiles of the seconds one call took, over `samples` samples of one or more calls each."""

    p20: float
    p50: float
    p80: float
    samples: int


@dataclass(frozen=True)
class Outcome:
    """What came of one provider: a timing, or the reason why there is none."""

    status: str
    reason: str | None = None
    timing: Timing | None = None


class Unavailable(Exception):
    """Raised by a provider that cannot run here; its message says why."""


class TimeLimitExceeded(BaseException):  # not an Exception: torch.compile must not catch it
    """Raised in the main thread by `time_limit`."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeLimitExceeded in the block after `seconds`, and every second again until it leaves the block.

    Main thread only. Python delivers the signal between two bytecodes: a call that stays in C is interrupted
    only when it returns (the wait for a compiler's process returns at once; one long LLVM run does not).
    It is repeated because libraries swallow an exception raised inside a callback or __del__.
    """

    def on_alarm(*_: object) -> None:
        raise TimeLimitExceeded(f"longer than {seconds:g} s")

    previous = signal.signal(signal.SIGALRM, on_alarm)
    signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def _sample(function: Callable[[], object], device: str, calls: int) -> float:
    """Seconds per call over `calls` calls in a row."""
    if device == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(calls):
            function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / calls
    begin = time.perf_counter()
    for _ in range(calls):
        function()
    return (time.perf_counter() - begin) / calls


def _calls_per_sample(function: Callable[[], object], device: str) -> int:
    seconds = _sample(function, device, 1)
    if seconds < SAMPLE_SECONDS:  # again: one call is less than the clock and the warm-up's remains can tell
        seconds = _sample(function, device, 5)
    return max(1, min(1000, round(SAMPLE_SECONDS / max(seconds, 1e-9))))


def quantiles(samples: Sequence[float]) -> Timing:
    if len(samples) == 1:
        return Timing(samples[0], samples[0], samples[0], 1)
    cuts = statistics.quantiles(samples, n=10, method="inclusive")
    return Timing(cuts[1], cuts[4], cuts[7], len(samples))


def measure(
    function: Callable[[], object],
    *,
    device: str,
    min_seconds: float = 0.5,
    max_samples: int = 200,
    setup: Callable[[], object] | None = None,
) -> Timing:
    """Time `function` after one untimed call.

    Args:
        device: "cuda" times with events (a launch slower than its kernel counts: capture a graph to leave it
            out), "cpu" with perf_counter.
        min_seconds: sample for this long, but at least 5 samples and at most max_samples.
        setup: run untimed before each sample; a sample is then a single call. Without it, short calls are
            timed several at a time. Rotating inputs, so that a cache holds what it would in use, is the
            caller's work.
    """
    if setup is not None:
        setup()
    function()
    calls = 1 if setup is not None else _calls_per_sample(function, device)
    samples: list[float] = []
    begin = time.perf_counter()
    while len(samples) < max_samples and (len(samples) < MIN_SAMPLES or time.perf_counter() - begin < min_seconds):
        if setup is not None:
            setup()
        samples.append(_sample(function, device, calls))
    return quantiles(samples)


def interleave(
    providers: Mapping[str, Callable[[], Callable[[], object]]],
    *,
    device: str,
    min_seconds: float = 0.5,
    max_samples: int = 200,
    cap_seconds: float = CAP_SECONDS,
) -> dict[str, Outcome]:
    """Time providers in turn, A B A B, so that a drift of clocks or neighbours meets all of them alike.

    Args:
        providers: name -> a factory of the function to time. The factory and the first calls (where
            torch.compile, Triton and graph capture do their work) together may take cap_seconds; after that
            the provider is abandoned as "timeout". ModuleNotFoundError and Unavailable make it "unavailable",
            any other exception "error"; the rest go on.
        min_seconds: per provider, as in `measure`.
    """
    # Imported ahead: an alarm in the middle of this import would leave torch.compile broken for the whole process.
    importlib.import_module("torch._inductor.compile_fx")
    outcomes: dict[str, Outcome] = {}
    ready: dict[str, tuple[Callable[[], object], int]] = {}
    for name, factory in providers.items():
        try:
            with time_limit(cap_seconds):
                function = factory()
                function()
                ready[name] = function, _calls_per_sample(function, device)
        except TimeLimitExceeded as limit:
            torch._dynamo.reset()  # an abandoned compilation leaves half-built guards
            outcomes[name] = Outcome("timeout", f"warm-up took {limit}")
        except Exception as error:  # one broken rival must not cost the other rows
            outcomes[name] = failure(error)
    for name, (function, _) in list(ready.items()):
        try:
            with time_limit(cap_seconds):
                function()  # again: the reset above threw away what others had compiled
        except TimeLimitExceeded as limit:
            outcomes[name] = Outcome("timeout", f"second warm-up took {limit}")
            del ready[name]
    samples: dict[str, list[float]] = {name: [] for name in ready}
    begin = time.perf_counter()
    rounds = 0
    while ready and rounds < max_samples:
        if rounds >= MIN_SAMPLES and time.perf_counter() - begin > min_seconds * len(ready):
            break
        for name, (function, calls) in ready.items():
            samples[name].append(_sample(function, device, calls))
        rounds += 1
    outcomes.update({name: Outcome("ok", timing=quantiles(times)) for name, times in samples.items()})
    return {name: outcomes[name] for name in providers}


def failure(error: Exception) -> Outcome:
    text = " ".join(str(error).split())[:300]
    if isinstance(error, ModuleNotFoundError | Unavailable):
        return Outcome("unavailable", text)
    return Outcome("error", f"{type(error).__name__}: {text}")


# ---- running a benchmark file ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Prepared:
    """What `prepare(case)` yields. One call of a function does `units` units; all numbers are per unit."""

    providers: Mapping[str, Callable[[], Callable[[], object]]]
    bytes: int | None = None
    flops: int | None = None
    floor: float | str | None = None  # seconds per unit, or the provider whose p50 is the floor
    rivals: Sequence[str] = ()  # ratios are to the fastest of them
    units: int = 1  # e.g. the nodes of the graph that one call replays


def row(case: Case, provider: str, outcome: Outcome) -> Row:
    """A row with its environment and no derived numbers."""
    timing = outcome.timing
    return Row(
        schema=SCHEMA,
        benchmark=case.benchmark,
        provider=provider,
        case=dict(case.sizes),
        dtype=case.dtype,
        device=case.device,
        device_name=(gpu_name() or "none") if case.device == "cuda" else cpu_name(),
        threads=case.threads,
        status=outcome.status,
        reason=outcome.reason,
        samples=timing.samples if timing else 0,
        p20=timing.p20 if timing else None,
        p50=timing.p50 if timing else None,
        p80=timing.p80 if timing else None,
        **environment(),
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )


def rows_of(case: Case, prepared: Prepared, outcomes: Mapping[str, Outcome]) -> list[Row]:
    """One row per provider, times per unit, with floor and ratio filled in."""
    if set(prepared.providers) != set(case.providers):
        raise ValueError(f"{case.key}: expected providers {case.providers}, got {tuple(prepared.providers)}")
    n = prepared.units
    timings = {
        name: Timing(o.timing.p20 / n, o.timing.p50 / n, o.timing.p80 / n, o.timing.samples)
        for name, o in outcomes.items()
        if o.timing
    }
    floor = prepared.floor
    rival = min((name for name in prepared.rivals if name in timings), key=lambda name: timings[name].p50, default=None)
    floor_seconds = (timings[floor].p50 if floor in timings else None) if isinstance(floor, str) else floor
    rows = []
    for name, outcome in outcomes.items():
        timing = timings.get(name)
        against = timings.get(rival) if rival is not None and rival != name else None
        rows.append(
            replace(
                row(case, name, replace(outcome, timing=timing)),
                bytes=prepared.bytes,
                flops=prepared.flops,
                floor_seconds=floor_seconds,
                fraction_of_floor=floor_seconds / timing.p50 if timing and floor_seconds else None,
                rival=rival if rival != name else None,
                ratio=against.p50 / timing.p50 if timing and against else None,
            )
        )
    return rows


def describe(row: Row) -> str:
    """One printed line: time, rate, memory, floor, ratio."""
    head = f"{row.case_key}/{row.provider:24s}"
    if row.p50 is None:
        return f"{head} {row.status}: {row.reason}"
    text = f"{head} {row.p50 * 1e6:12.2f} us [{row.p20 * 1e6:.2f}, {row.p80 * 1e6:.2f}]"
    text += f" {row.bytes / row.p50 / 1e9:8.1f} GB/s" if row.bytes else ""
    text += f" {row.flops / row.p50 / 1e12:8.1f} TFLOP/s" if row.flops else ""
    text += f" {row.peak_bytes / 2**20:8.0f} MiB peak" if row.peak_bytes is not None else ""
    text += f" {row.fraction_of_floor:6.1%} of floor" if row.fraction_of_floor is not None else ""
    return text + (f" {row.ratio:6.2f}x {row.rival}" if row.ratio is not None else "")


def case_parser(description: str | None = None) -> argparse.ArgumentParser:
    """The flags that every benchmark has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--list", action="store_true", help="print cases and their providers, and exit")
    parser.add_argument("--case", action="append", metavar="KEY", help="only this case; may be repeated")
    parser.add_argument("--seconds", type=float, default=0.5, help="sampling time per provider and case")
    return parser


def chosen_cases(parser: argparse.ArgumentParser, args: argparse.Namespace, cases: Sequence[Case]) -> list[Case]:
    """Those that --case names, or all; none where --list was given, which prints them."""
    if args.case and (unknown := set(args.case) - {case.key for case in cases}):
        parser.error(f"no such case: {', '.join(sorted(unknown))}; see --list")
    chosen = [case for case in cases if not args.case or case.key in args.case]
    if args.list:
        for case in chosen:
            print(json.dumps({"key": case.key, **asdict(case)}))
        return []
    return chosen


def main(
    cases: Sequence[Case],
    prepare: Callable[[Case], AbstractContextManager[Prepared]],
    argv: Sequence[str] | None = None,
) -> list[Row]:
    """The command line of a benchmark file (module docstring). Returns the rows written."""

    def measure(case: Case, seconds: float) -> list[Row]:
        with prepare(case) as prepared:
            outcomes = interleave(prepared.providers, device=case.device, min_seconds=seconds)
        return rows_of(case, prepared, outcomes)

    return measure_all(cases, measure, argv)


def measure_all(
    cases: Sequence[Case],
    measure: Callable[[Case, float], Sequence[Row]],
    argv: Sequence[str] | None = None,
    description: str | None = None,
) -> list[Row]:
    """The same for a benchmark that makes its rows itself: `measure(case, seconds)`, seconds being --seconds."""
    parser = case_parser(description)
    args = parser.parse_args(argv)
    chosen = chosen_cases(parser, args, cases)
    if not chosen:
        return []
    path = results_path()
    print(f"{platform.python_version()} torch {torch.__version__} -> {path}", file=sys.stderr)
    written: list[Row] = []
    for case in chosen:
        try:
            found = measure(case, args.seconds)
        except Exception as error:  # out of memory or disk in one case must not cost the next
            found = [row(case, name, failure(error)) for name in case.providers]
        for new in found:
            append(path, new)
            print(describe(new), flush=True)
            written.append(new)
    return written
