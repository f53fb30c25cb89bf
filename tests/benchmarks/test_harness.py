"""benchmarks/harness.py: rows survive, providers are timed in turn, and a slow warm-up is abandoned."""

import importlib
import json
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def harness():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        yield importlib.import_module("harness")
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.fixture
def case(harness):
    return harness.Case("sleep", {"rows": 4, "kind": "a"}, "float32", "cpu", ("slow", "fast", "absent"))


@contextmanager
def prepare_sleeps(case):
    import harness

    def absent():
        raise ModuleNotFoundError("No module named 'absent'")

    providers = {
        "slow": lambda: lambda: time.sleep(0.004),
        "fast": lambda: lambda: time.sleep(0.002),
        "absent": absent,
    }
    yield harness.Prepared(providers, bytes=1000, flops=2000, floor=0.001, rivals=("slow",), units=2)


def test_main_writes_one_row_per_provider(harness, case, tmp_path, monkeypatch):
    import rows as rows_module

    monkeypatch.setenv("FASTLATENT_RESULTS", str(tmp_path))
    written = harness.main([case], prepare_sleeps, ["--seconds", "0.05"])
    path = harness.results_path()
    assert path.parent == tmp_path and path.stem == rows_module.machine()
    assert rows_module.read(path) == written
    slow, fast, absent = written
    assert [r.status for r in written] == ["ok", "ok", "unavailable"]
    assert absent.p50 is None and absent.reason == "No module named 'absent'"
    assert 0.001 <= fast.p20 <= fast.p50 <= fast.p80  # two units a call: 1 ms each, and sleep is never short
    assert 1.2 < fast.ratio < 2.8 and fast.rival == "slow"
    assert slow.rival is None and slow.ratio is None
    assert fast.fraction_of_floor == pytest.approx(0.001 / fast.p50)
    assert fast.key == f"{case.key}/fast" == "sleep/kind=a,rows=4/float32/cpu/1/fast"
    assert fast.schema == 1 and fast.versions["torch"] and fast.date.endswith("+00:00")


def test_main_only_the_named_case(harness, case, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FASTLATENT_RESULTS", str(tmp_path))
    other = replace(case, threads=2)
    harness.main([case, other], prepare_sleeps, ["--list"])
    listed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["key"] for line in listed] == [case.key, other.key]
    assert listed[0]["providers"] == ["slow", "fast", "absent"]
    assert not harness.results_path().exists()
    written = harness.main([case, other], prepare_sleeps, ["--case", other.key, "--seconds", "0.01"])
    assert {row.threads for row in written} == {2}
    with pytest.raises(SystemExit):
        harness.main([case], prepare_sleeps, ["--case", "no/such/case"])


def test_a_case_that_cannot_be_prepared_leaves_rows_and_the_next_runs(harness, case, tmp_path, monkeypatch):
    monkeypatch.setenv("FASTLATENT_RESULTS", str(tmp_path))

    @contextmanager
    def prepare(this):
        if this.threads == 1:
            raise MemoryError("512 MiB")
        with prepare_sleeps(this) as prepared:
            yield prepared

    written = harness.main([case, replace(case, threads=2)], prepare, ["--seconds", "0.01"])
    assert [r.status for r in written[:3]] == ["error"] * 3 and written[0].reason == "MemoryError: 512 MiB"
    assert written[3].status == "ok"


def test_providers_must_be_the_announced_ones(harness, case):
    with pytest.raises(ValueError, match="expected providers"):
        harness.rows_of(case, harness.Prepared({"slow": lambda: None}), {})


def test_interleave_takes_turns(harness):
    calls = []
    providers = {name: (lambda name=name: lambda: (calls.append(name), time.sleep(0.002))) for name in "AB"}
    outcomes = harness.interleave(providers, device="cpu", min_seconds=0, max_samples=200)
    assert outcomes["A"].timing.samples == outcomes["B"].timing.samples == harness.MIN_SAMPLES
    assert "".join(calls).endswith("AB" * harness.MIN_SAMPLES)


def test_interleave_one_failure_does_not_cost_the_others(harness):
    def broken():
        raise RuntimeError("no\nkernel")

    def unavailable():
        raise harness.Unavailable("needs 9.0")

    good = {"good": lambda: lambda: None}
    outcomes = harness.interleave({"broken": broken, "unavailable": unavailable} | good, device="cpu", min_seconds=0)
    assert outcomes["broken"] == harness.Outcome("error", "RuntimeError: no kernel")
    assert outcomes["unavailable"] == harness.Outcome("unavailable", "needs 9.0")
    assert outcomes["good"].status == "ok"


def test_measure_setup_runs_untimed_before_every_sample(harness):
    setups = []
    timing = harness.measure(
        lambda: None, device="cpu", min_seconds=0, setup=lambda: (setups.append(1), time.sleep(0.003))
    )
    assert timing.samples == harness.MIN_SAMPLES and len(setups) == harness.MIN_SAMPLES + 1
    assert timing.p80 < 0.001


def test_measure_short_calls_are_timed_several_at_a_time(harness):
    calls = []
    timing = harness.measure(lambda: calls.append(1), device="cpu", min_seconds=0)
    assert len(calls) > 20 * timing.samples  # a list append is far under 50 us


# ---- the cap on a warm-up: what SIGALRM can interrupt, and how late ----


def elapsed(harness, provider, cap):
    begin = time.perf_counter()
    outcome = harness.interleave({"rival": provider}, device="cpu", min_seconds=0, cap_seconds=cap)["rival"]
    return outcome, time.perf_counter() - begin


def test_cap_interrupts_the_wait_for_a_compiler_process(harness):
    outcome, seconds = elapsed(harness, lambda: subprocess.run(["sleep", "30"]), cap=0.3)
    assert outcome.status == "timeout" and seconds < 2


def test_cap_is_repeated_where_a_library_swallows_it(harness):
    def swallows():
        try:
            time.sleep(30)
        except BaseException:  # what a ctypes callback or a __del__ does
            time.sleep(30)

    outcome, seconds = elapsed(harness, swallows, cap=0.2)
    assert outcome.status == "timeout" and 1 < seconds < 5  # the second alarm comes a second later


def test_cap_waits_for_a_call_that_stays_in_c(harness):
    def busy():
        return sum(range(40_000_000))  # one C call; about 0.5 s

    begin = time.perf_counter()
    busy()
    alone = time.perf_counter() - begin
    outcome, seconds = elapsed(harness, busy, cap=0.05)
    # Honest: abandoned, but only when the call has returned.
    assert outcome.status == "timeout" and 0.5 * alone < seconds < 3 * alone + 1


def test_cap_abandons_torch_compile_and_the_next_compile_works(harness):
    def large():
        def function(x):
            for i in range(3000):  # tens of seconds in Dynamo and Inductor
                x = torch.sin(x) * i + x.roll(i, 0)
            return x

        compiled = torch.compile(function)
        return lambda: compiled(torch.ones(8))

    outcome, seconds = elapsed(harness, large, cap=1.0)
    assert outcome.status == "timeout", outcome
    assert seconds < 15
    compiled = torch.compile(lambda x: x * 2 + 1, backend="aot_eager")
    assert torch.equal(compiled(torch.ones(3)), torch.full((3,), 3.0))


def test_append_is_durable_and_read_refuses_other_schemas(harness, case, tmp_path, monkeypatch):
    import rows as rows_module

    synced = []
    monkeypatch.setattr(rows_module.os, "fsync", synced.append)
    path = tmp_path / "new" / "machine.jsonl"
    assert rows_module.read(path) == []
    row = harness.row(case, "fast", harness.Outcome("timeout", "longer than 60 s"))
    rows_module.append(path, row)
    rows_module.append(path, row)
    assert len(synced) == 2 and rows_module.read(path) == [row, row]
    path.write_text(path.read_text().replace('"schema": 1', '"schema": 0', 1))
    with pytest.raises(ValueError, match=r"machine.jsonl:1: expected schema 1, got 0"):
        rows_module.read(path)
    with pytest.raises(ValueError, match="expected status in"):
        rows_module.append(path, replace(row, status="fine"))


@pytest.mark.parametrize(
    ("gpu", "cpu", "slug"),
    [
        ("NVIDIA H200", "any", "nvidia-h200"),
        ("NVIDIA H100 80GB HBM3", "any", "nvidia-h100-80gb-hbm3"),
        (None, "AMD EPYC", "cpu-2core-amd-epyc"),
    ],
)
def test_machine_slug(harness, monkeypatch, gpu, cpu, slug):
    import rows as rows_module

    monkeypatch.setattr(rows_module, "gpu_name", lambda: gpu)
    monkeypatch.setattr(rows_module, "cpu_name", lambda: cpu)
    monkeypatch.setattr(rows_module, "cpu_cores", lambda: 2)
    assert rows_module.machine() == slug
