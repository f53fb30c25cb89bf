"""tools/gpu_validate on a made-up checkout: order, resumption, time limits, what is left out and why."""

import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from importlib.machinery import SourceFileLoader
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# A benchmark program without torch. SLEEP maps a case's number to the seconds it takes.
PROGRAM = """
import json, os, sys, time
from pathlib import Path
NAME, CASES, SLEEP, DEVICE, PROVIDERS = {name!r}, {cases!r}, {sleep!r}, {device!r}, ["ours", "rival"]
keys = {{f"{{NAME}}/n={{n}}/none/{{DEVICE}}/1": n for n in CASES}}
if "--list" in sys.argv:
    for key, n in keys.items():
        print(json.dumps({{"key": key, "benchmark": NAME, "sizes": {{"n": n}}, "dtype": "none", "device": DEVICE,
                           "providers": PROVIDERS, "threads": 1}}))
    sys.exit()
chosen = [sys.argv[i + 1] for i, a in enumerate(sys.argv) if a == "--case"]
for key, n in keys.items():
    if key in chosen:
        time.sleep(SLEEP.get(n, 0))
        for provider in PROVIDERS:
            row = {row!r} | {{"benchmark": NAME, "provider": provider, "case": {{"n": n}}, "device": DEVICE}}
            with open(Path(os.environ["FASTLATENT_RESULTS"]) / "made-up.jsonl", "a") as file:
                file.write(json.dumps(row | {{"date": "2026-02-02T00:00:00+00:00"}}) + "\\n")
        print("done", n, flush=True)
"""
ROW = {
    "schema": 1, "dtype": "none", "device_name": "x", "threads": 1, "status": "ok", "reason": None, "samples": 5,
    "p20": 1.0, "p50": 1.0, "p80": 1.0, "machine": "made-up", "cpu": "x", "cores": 1, "gpu": None, "versions": {},
    "commit": None, "dirty": None,
}  # fmt: skip
CUDA_TEST = (
    "import pytest\n@pytest.mark.needs_cuda\ndef test_it():\n    {body}\ndef test_cpu_only():\n    assert False\n"
)


@pytest.fixture
def tool(tmp_path, monkeypatch):
    loader = SourceFileLoader("gpu_validate", str(ROOT / "tools" / "gpu_validate"))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("gpu_validate", loader))
    monkeypatch.setitem(sys.modules, "gpu_validate", module)  # dataclasses look their module up
    loader.exec_module(module)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "WORK", tmp_path / "build")
    monkeypatch.setattr(module, "PROGRAMS", {})
    monkeypatch.setattr(module, "DEFAULT", (0.1, 30))
    monkeypatch.setattr(module, "STARTUP_SECONDS", 0.1)
    monkeypatch.setattr(module, "FINISH_SECONDS", 0)
    monkeypatch.setattr(module, "TESTS", (("tests/ops", 0.1, 30), ("tests/models", 0.1, 30)))
    module.real_build = module.build
    monkeypatch.setattr(module, "build", lambda out, env, timeout: "made up")
    monkeypatch.setattr(module.row_files, "machine", lambda: "made-up")
    monkeypatch.setattr(module.row_files, "gpu_name", lambda: "Made Up")
    for folder in ("tools", "benchmarks/results", "tests/ops", "tests/models", "fastlatent", "kernels"):
        (tmp_path / folder).mkdir(parents=True)
    for name in ("CMakeLists.txt", "pyproject.toml"):
        (tmp_path / name).write_text("")
    program(tmp_path / "tools" / "calibrate", "calibrate", [1], device="cuda")
    return module


def program(path, name, cases, sleep=None, device="cpu"):
    path.write_text(PROGRAM.format(name=name, cases=cases, sleep=sleep or {}, device=device, row=ROW))


def session(tool, out, budget=60, **options):
    code = tool.validate(out, budget, **options)
    return code, json.loads((out / "summary.json").read_text())


def names(summary):
    return [task["task"] for task in summary["tasks"]]


def reasons(summary):
    return {entry["task"]: entry["reason"] for entry in summary["left_out"]}


def test_order_is_tests_calibration_missing_oldest(tool, tmp_path):
    (tmp_path / "tests/ops/test_a.py").write_text(CUDA_TEST.format(body="pass"))
    (tmp_path / "tests/ops/test_cpu.py").write_text("def test_never_run(): assert False\n")
    program(tmp_path / "benchmarks/bench_a.py", "a", [1, 2])
    program(tmp_path / "benchmarks/bench_b.py", "b", [1])
    for n, date in ((1, "2026-01-01"), (2, "2025-01-01")):  # b is present, c is present and older
        program(tmp_path / f"benchmarks/bench_{'bc'[n - 1]}.py", "bc"[n - 1], [1])
        with (tmp_path / "benchmarks/results/made-up.jsonl").open("a") as file:
            for provider in ("ours", "rival"):
                row = ROW | {"benchmark": "bc"[n - 1], "provider": provider, "case": {"n": 1}, "device": "cpu"}
                file.write(json.dumps(row | {"date": f"{date}T00:00:00+00:00"}) + "\n")
    code, summary = session(tool, tmp_path / "out")
    assert code == 0, (tmp_path / "out/log.txt").read_text()
    assert names(summary) == [
        "tests/ops",
        "tools/calibrate",
        "benchmarks/bench_a.py",
        "benchmarks/bench_c.py (oldest rows)",
        "benchmarks/bench_b.py (oldest rows)",
    ]
    assert summary["tasks"][0]["last"].startswith("1 passed")  # only needs_cuda tests, of files that have any
    assert [task["rows"] for task in summary["tasks"][1:]] == [2, 4, 2, 2]
    assert sorted(os.listdir(tmp_path / "out")) == ["log.txt", "made-up.jsonl", "summary.json"]


def test_every_program_that_it_names_is_there(tool):
    text = (ROOT / "tools" / "gpu_validate").read_text()
    named = set(re.findall(r'"((?:tools|benchmarks)/[^"]+)"', text)) - {"benchmarks/bench_*.py"}
    assert len(named) > 10 and all((ROOT / name).is_file() for name in named)
    benchmarks = " ".join(path.read_text() for path in (ROOT / "benchmarks").glob("bench_*.py"))
    assert all(f'"{rows.split("/")[0]}"' in benchmarks for rows in tool.FIRST_ROWS)  # names of benchmarks


def test_first_rows_come_in_their_order_and_last_rows_last(tool, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tool, "FIRST_ROWS", ("b/n=2", "c/", "a/n=1/"))
    monkeypatch.setattr(tool, "LAST_ROWS", "a/")
    monkeypatch.setattr(tool, "PROGRAMS", {"benchmarks/bench_c.py": (1, 2)})  # one case a run
    program(tmp_path / "benchmarks/bench_a.py", "a", [1, 2, 3])
    program(tmp_path / "benchmarks/bench_b.py", "b", [1, 2, 3])
    program(tmp_path / "benchmarks/bench_c.py", "c", [1, 2])
    (tmp_path / "benchmarks/bench_broken.py").write_text("import no_such_package\n")
    tasks = tool.row_tasks({}, True, dict(os.environ))
    assert [(Path(task.name).stem, [case.sizes["n"] for case in task.cases]) for task in tasks] == [
        ("calibrate", [1]), ("bench_b", [2]), ("bench_c", [1]), ("bench_c", [2]), ("bench_a", [1]),
        ("bench_b", [1, 3]), ("bench_broken", []), ("bench_a", [2, 3]),
    ]  # fmt: skip
    assert tasks[6].left_out == "--list failed: ModuleNotFoundError: No module named 'no_such_package'"


def test_resumes_from_both_places_and_tests_again_when_sources_change(tool, tmp_path, capsys):
    (tmp_path / "tests/ops/test_a.py").write_text(CUDA_TEST.format(body="pass"))
    program(tmp_path / "benchmarks/bench_a.py", "a", [1, 2])
    out = tmp_path / "out"
    assert session(tool, out)[0] == 0
    code, summary = session(tool, out)  # rows in the output folder
    assert code == 0 and all(name.endswith("(oldest rows)") for name in names(summary)), names(summary)
    (out / "made-up.jsonl").rename(tmp_path / "benchmarks/results/made-up.jsonl")  # rows in the checkout
    program(tmp_path / "benchmarks/bench_a.py", "a", [1, 2, 3])
    tool.validate(out, 60, dry_run=True)
    printed = capsys.readouterr().out
    assert "benchmarks/bench_a.py, 1 cases" in printed and "tests/ops" not in printed.splitlines()[-4:]
    (tmp_path / "fastlatent/new.py").write_text("x = 1\n")
    assert names(session(tool, out)[1])[0] == "tests/ops"


def test_failures_are_recorded_and_tried_again(tool, tmp_path):
    (tmp_path / "tests/ops/test_a.py").write_text(CUDA_TEST.format(body="assert 1 == 2"))
    (tmp_path / "tools/calibrate").write_text("import sys\nif '--list' not in sys.argv: pass\nsys.exit('no list')\n")
    out = tmp_path / "out"
    for _ in range(2):
        code, summary = session(tool, out)
        assert code == 1 and summary["tasks"][0]["status"] == "error"
        assert summary["tasks"][0]["last"].startswith("1 failed")
        assert reasons(summary) == {"tools/calibrate": "--list failed: no list"}
    rows = tool.row_files.read(out / "made-up.jsonl")
    assert [(row.benchmark, row.status) for row in rows] == [("correctness", "error")] * 2


def test_a_case_that_hangs_gets_its_rows_and_does_not_stop_the_next_session(tool, tmp_path, monkeypatch):
    monkeypatch.setattr(tool, "DEFAULT", (0.1, 2.0))
    program(tmp_path / "benchmarks/bench_a.py", "a", [1, 2, 3], sleep={2: 60})
    out = tmp_path / "out"
    begin = time.monotonic()
    code, summary = session(tool, out)
    assert code == 1 and time.monotonic() - begin < 20
    task = summary["tasks"][-1]
    assert (task["status"], task["rows"], task["last"]) == ("timeout", 2, "killed after 2 s")
    rows = tool.row_files.read(out / "made-up.jsonl")
    assert [(row.case["n"], row.status) for row in rows if row.benchmark == "a"] == [
        (1, "ok"), (1, "ok"), (2, "timeout"), (2, "timeout"),
    ]  # fmt: skip
    code, summary = session(tool, out)
    assert any(row.case["n"] == 3 and row.status == "ok" for row in tool.row_files.read(out / "made-up.jsonl"))


def test_budget_is_respected_and_cases_are_cut_to_fit(tool, tmp_path, monkeypatch):
    (tmp_path / "tests/ops/test_a.py").write_text(CUDA_TEST.format(body="pass"))
    monkeypatch.setattr(tool, "TESTS", (("tests/ops", 1000, 2000),))
    monkeypatch.setattr(tool, "PROGRAMS", {"benchmarks/bench_a.py": (2, 100), "benchmarks/bench_b.py": (50, 100)})
    program(tmp_path / "benchmarks/bench_a.py", "a", list(range(20)))
    program(tmp_path / "benchmarks/bench_b.py", "b", [1, 2])
    begin = time.monotonic()
    code, summary = session(tool, tmp_path / "out", budget=15)
    assert code == 0 and time.monotonic() - begin < 16
    left_out = reasons(summary)
    assert left_out["tests/ops"].startswith("needs about 1000 s")
    assert left_out["benchmarks/bench_b.py"].startswith("needs about 50 s")  # one case a run
    assert "of 20 cases" in left_out["benchmarks/bench_a.py"]
    assert names(summary) == ["tools/calibrate", "benchmarks/bench_a.py"]
    assert 2 <= summary["tasks"][1]["rows"] <= 14


def test_a_test_file_whose_imports_are_missing_is_left_out_by_name(tool, tmp_path):
    (tmp_path / "fastlatent/encoder.py").write_text("import no_such_package.models\n")
    (tmp_path / "kernels/fine.py").write_text("import json\n")
    through_ours = "import fastlatent.encoder\nimport fastlatent.kernels.fine\n"
    (tmp_path / "tests/models/test_encoder.py").write_text(through_ours + CUDA_TEST.format(body="pass"))
    (tmp_path / "tests/models/helper.py").write_text("")
    (tmp_path / "tests/models/test_plain.py").write_text("import helper\n" + CUDA_TEST.format(body="pass"))
    tasks = tool.test_tasks(set(), "digest", True)
    assert [(task.name, task.left_out) for task in tasks] == [
        ("tests/models/test_encoder.py", "no_such_package is not installed"),
        ("tests/models", None),
    ]
    assert [Path(argument).name for argument in tasks[1].command if argument.endswith(".py")] == ["test_plain.py"]


def test_without_a_gpu(tool, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tool.row_files, "gpu_name", lambda: None)
    (tmp_path / "tests/ops/test_a.py").write_text(CUDA_TEST.format(body="pass"))
    program(tmp_path / "benchmarks/bench_a.py", "a", [1])
    assert tool.validate(tmp_path / "out", 60) == 1
    assert "--allow-cpu" in capsys.readouterr().err and not (tmp_path / "out").exists()
    code, summary = session(tool, tmp_path / "out", allow_cpu=True)
    assert code == 0 and names(summary) == ["benchmarks/bench_a.py"]
    assert reasons(summary) == {"tests/ops": "needs a CUDA GPU", "tools/calibrate": "1 cases need a CUDA GPU"}


def test_dry_run_runs_nothing(tool, tmp_path, capsys):
    (tmp_path / "tests/ops/test_a.py").write_text(CUDA_TEST.format(body="pass"))
    program(tmp_path / "benchmarks/bench_a.py", "a", [1, 2])
    assert tool.validate(tmp_path / "out", 60, dry_run=True) == 0
    lines = [line.split("  ", 2)[-1].strip() for line in capsys.readouterr().out.splitlines()[1:]]
    assert [line.split("s  ")[-1] for line in lines] == [
        "tests/ops, 1 cases", "tools/calibrate, 1 cases", "benchmarks/bench_a.py, 2 cases",
    ]  # fmt: skip
    assert os.listdir(tmp_path / "out") == []


@pytest.mark.parametrize(
    ("codes", "how"),
    [
        ([0], "pip install"),
        ([1, 0], "pip install --target build/site"),  # an environment that others manage
        ([1, None], None),  # no compiler; out of time
    ],
)
def test_build(tool, tmp_path, monkeypatch, codes, how):
    commands = []

    def run(command, log, timeout, env):
        commands.append(command)
        return codes[len(commands) - 1]

    def not_installed(name):
        raise tool.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(tool, "run", run)
    monkeypatch.setattr(tool.importlib.metadata, "distribution", not_installed)
    env = {}
    assert tool.real_build(tmp_path, env, 10) == how
    assert all("--no-build-isolation" in command and "--no-deps" in command for command in commands)
    assert ("PYTHONPATH" in env) == (how is not None and "target" in how)


@pytest.mark.soak  # it takes long: see `make soak`
def test_the_real_queue_prints():
    """One process: every benchmark of this checkout announces itself."""
    command = [sys.executable, ROOT / "tools" / "gpu_validate", "--budget", "1", "--dry-run", "--allow-cpu"]
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OUT": "build/gpu_validate"})
    assert result.returncode == 0, result.stderr
    for path in (ROOT / "benchmarks").glob("bench_*.py"):
        assert (path.name in result.stdout) == (path.name not in ("bench_loading.py", "bench_listing.py"))
    assert "--list failed" not in result.stdout, result.stdout
