"""tools/readme_tables: tables come from rows, and --check sees a stale README."""

import importlib.util
import json
from importlib.machinery import SourceFileLoader
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[2] / "tools" / "readme_tables"
ROW = {
    "schema": 1, "benchmark": "copy", "provider": "ours", "case": {"rows": 4}, "dtype": "float16", "device": "cpu",
    "device_name": "x", "threads": 2, "status": "ok", "reason": None, "samples": 5, "p20": 1e-4, "p50": 2e-4,
    "p80": 3e-4, "machine": "box", "cpu": "x", "cores": 2, "gpu": None, "versions": {}, "commit": None,
    "dirty": None, "date": "2026-01-02T03:04:05+00:00", "bytes": 2_000_000, "flops": None,
    "floor_seconds": 1e-4, "fraction_of_floor": 0.5, "rival": "numpy", "ratio": 1.234,
}  # fmt: skip
README = "# Title\n<!-- rows:copy -->\n<!-- /rows -->\nend\n"


@pytest.fixture
def tool():
    loader = SourceFileLoader("readme_tables", str(TOOL))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("readme_tables", loader))
    loader.exec_module(module)
    return module


@pytest.fixture
def root(tmp_path):
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    (tmp_path / "README.md").write_text(README)
    return tmp_path


def write_rows(root, *changes):
    lines = [json.dumps(ROW | change) for change in changes]
    (root / "benchmarks" / "results" / "box.jsonl").write_text("\n".join(lines) + "\n")


def test_the_newest_row_of_each_provider(tool, root):
    failed = {"provider": "compiled", "status": "timeout", "p20": None, "p50": None, "p80": None}
    write_rows(root, {"p50": 9.0}, failed, {}, {"benchmark": "other"})
    assert tool.main(root, check=True) == 1 and (root / "README.md").read_text() == README
    assert tool.main(root, check=False) == 0
    lines = (root / "README.md").read_text().splitlines()
    assert lines[0] == "# Title" and lines[-1] == "end"
    assert lines[2:7] == [
        "machine box; rows 4; dtype float16; threads 2; date 2026-01-02",
        "",
        "| ours | compiled |",
        "|---|---|",
        "| 200 µs (1.23×) | timeout |",
    ]
    assert tool.main(root, check=True) == 0  # what it wrote is not stale


def test_a_benchmark_of_memory_shows_memory(tool, root):
    (root / "README.md").write_text(README.replace("rows:copy", "rows:video_memory"))
    write_rows(root, {"benchmark": "video_memory", "peak_bytes": 3 << 30})
    assert tool.main(root, check=False) == 0
    assert "| 3,072 MiB |" in (root / "README.md").read_text().splitlines()


def test_what_differs_is_a_column(tool, root):
    write_rows(root, {"ratio": None}, {"case": {"rows": 8}, "dtype": "float32"}, {"case": {"rows": 8}, "provider": "b"})
    assert tool.main(root, check=False) == 0
    lines = (root / "README.md").read_text().splitlines()
    assert lines[2] == "machine box; threads 2; date 2026-01-02"
    assert lines[4:9] == [
        "| rows | dtype | ours | b |",
        "|---|---|---|---|",
        "| 4 | float16 | 200 µs |  |",
        "| 8 | float32 | 200 µs (1.23×) |  |",
        "| 8 | float16 |  | 200 µs (1.23×) |",
    ]


def test_a_table_without_rows_or_without_an_end_is_an_error(tool, root, capsys):
    assert tool.main(root, check=False) == 1
    assert "rows:copy" in capsys.readouterr().err and (root / "README.md").read_text() == README
    write_rows(root, {})
    two = "<!-- rows:copy -->\n<!-- rows:copy -->\n<!-- /rows -->\n"  # the first is never closed
    (root / "README.md").write_text(two)
    assert tool.main(root, check=False) == 1 and (root / "README.md").read_text() == two


@pytest.mark.parametrize(("seconds", "text"), [(2.5, "2.5 s"), (1.0, "1 s"), (0.0123, "12.3 ms"), (9.9e-7, "0.99 µs")])
def test_duration(tool, seconds, text):
    assert tool.duration(seconds) == text
