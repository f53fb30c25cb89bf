"""benchmarks/bench_loading.py: every reader gives the payload's bytes; what does not run becomes a row."""

import json
import os
import sys
from dataclasses import replace

import bench_loading as bench
import numpy as np
import pytest
from bench_loading import environments, in_process, pagecache, protocol, store_costs

ROWS, ROW_BYTES, BATCH = 40, 4096, 8  # 4096 bytes: the smallest row of 32 x 32 with a mean and a logvar


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return bench.make_files(tmp_path_factory.mktemp("loading"), ROWS, ROW_BYTES)


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setattr(bench, "ROWS", BATCH)
    monkeypatch.setattr(in_process, "SINGLE_FILES", 16)
    monkeypatch.setattr(in_process, "ROWS_PER_SAFETENSORS", 15)  # 40 rows: the last of three files is short
    monkeypatch.setattr(store_costs, "SAMPLES", 2)


@pytest.mark.parametrize("name", in_process.PROVIDERS)
def test_readers_give_the_payload(files, tmp_path, name):
    batches = in_process.PROVIDERS[name].read(replace(files, work=tmp_path), BATCH)
    seen = set()
    for _ in range(2 * ROWS // BATCH):  # two epochs: the second starts anew
        try:
            indices, values = next(batches)
        except ValueError as error:
            if "io_uring" not in name:
                raise
            pytest.skip(str(error))  # the kernel or a sandbox forbids it
        protocol.check((indices, values), files.rows())
        seen.update(indices.tolist())
    assert len(seen) == (16 if name in ("pt-files", "npz-files") else ROWS)


def test_check_finds_one_wrong_bit(files):
    indices = np.arange(3)
    values = np.array(files.rows()[indices])
    protocol.check((indices, values), files.rows())
    values.view(np.uint8)[2, 77] ^= 1
    with pytest.raises(ValueError, match="other bytes"):
        protocol.check((indices, values), files.rows())
    with pytest.raises(ValueError, match="other bytes"):
        protocol.check((indices, values[:2]), files.rows())


STUB = f"""
import sys
sys.path.insert(0, {str(environments.HERE)!r})
import numpy as np, protocol

def read(payload, folder, batch):
    print("a banner, as some packages print one")
    (folder / "rows").write_bytes(payload.tobytes())
    rows = np.memmap(folder / "rows", payload.dtype, "r", shape=payload.shape)
    for indices in protocol.epochs(len(rows), batch):
        yield indices, rows[indices] + 0 * WRONG

protocol.main("numpy", read)
"""


def run_stub(tmp_path, files, text, caches="hot"):
    script, folder = tmp_path / "stub.py", tmp_path / "work"
    script.write_text(text)
    folder.mkdir()
    payload = files.payload / "rows.npy"
    return environments.run(sys.executable, script, folder, payload, BATCH, 0.01, caches)


def test_script_tells_times_and_version(tmp_path, files):
    result = run_stub(tmp_path, files, STUB.replace(" + 0 * WRONG", ""), "hot,cold")
    assert (result["package"], result["version"]) == ("numpy", np.__version__)
    assert len(result["hot"]) >= protocol.MIN_SAMPLES and all(seconds > 0 for seconds in result["hot"])
    if result["reason"] is None:
        # 40 rows are 5 batches; each brings in at least its own 8 pages, unless one read ahead for it.
        assert len(result["cold"]) == 5 and result["cold_bytes"] >= BATCH * ROW_BYTES
    else:
        assert result["cold"] is None and "page cache" in result["reason"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (STUB.replace(" + 0 * WRONG", " + np.float16(1)"), "other bytes"),
        ("raise SystemExit(3)", "exit status 3"),
        ("import not_there", "not_there"),
        ("print('done')", "expected a line of JSON"),
    ],
)
def test_script_that_fails_is_named(tmp_path, files, text, message):
    with pytest.raises(environments.Failed, match=message):
        run_stub(tmp_path, files, text)


def test_rows_of_what_runs_and_of_what_cannot_be_installed(tmp_path, monkeypatch):
    """Without an index pip finds nothing: as on a machine without network."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    monkeypatch.setenv("FASTLATENT_RESULTS", str(tmp_path / "results"))
    absent = environments.Package("absent.py", ("not-a-package-of-anyone==0",))
    monkeypatch.setattr(environments, "PACKAGES", {"absent": absent})
    cases = [
        replace(case, providers=("fastlatent", "memcpy" if case.sizes["cache"] == "hot" else "mmap-default", "absent"))
        for case in bench.make_cases(tmp_path, 4 * ROWS)[:2]
    ]
    rows = {(row.case["cache"], row.provider): row for row in bench.measure(cases, 0.0, tmp_path / "cache", tmp_path)}
    assert len(rows) == 6
    for cache in ("hot", "cold"):
        assert rows[cache, "absent"].status == "error" and "not-a-package-of-anyone" in rows[cache, "absent"].reason
    ours = rows["hot", "fastlatent"]
    assert ours.status == "ok" and ours.p50 > 0 and ours.bytes == 2 * BATCH * 8192
    assert ours.floor_seconds == rows["hot", "memcpy"].p50 and ours.rival is None
    cold = rows["cold", "fastlatent"]
    assert cold.status in ("ok", "unavailable") and "read_ahead_kb" in cold.case
    if cold.status == "ok":
        assert BATCH * 8192 <= cold.bytes <= 4 * ROWS * 8192 + (1 << 20)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "results"]  # nothing is left behind


def test_costs_of_writing_and_opening(tmp_path):
    write, opened = store_costs.CASES
    tiny = replace(write, sizes={"shard_bytes": 16 * ROW_BYTES, "row_bytes": ROW_BYTES})
    rows = {row.provider: row for row in store_costs.measure(tiny, tmp_path)}
    assert {name: row.bytes for name, row in rows.items()} == {
        "fastlatent": 16 * ROW_BYTES, "commit-of-one-row": ROW_BYTES, "plain": 16 * ROW_BYTES,
    }  # fmt: skip
    assert rows["fastlatent"].floor_seconds == rows["plain"].p50
    [row] = store_costs.measure(replace(opened, sizes={"rows": 100, "shards": 3}), tmp_path)
    assert row.status == "ok" and 0 < row.bytes < 100 << 20
    assert not list(tmp_path.iterdir())


def test_page_cache_is_dropped_and_counted(tmp_path):
    page = os.sysconf("SC_PAGE_SIZE")
    path = tmp_path / "file"
    path.write_bytes(bytes(64 * page))
    assert pagecache.resident_bytes(tmp_path) == 64 * page
    mapped = np.memmap(path, np.uint8, "r")
    assert mapped[::page].sum() == 0  # a mapped page stays unless it is forgotten first
    try:
        pagecache.drop(tmp_path)
    except pagecache.CannotDrop as error:
        pytest.skip(str(error))
    assert pagecache.resident_bytes(tmp_path) == 0
    with path.open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        os.pread(file.fileno(), 10, 5 * page)
    assert pagecache.resident_bytes(tmp_path) == page


def test_list_names_every_case_once(capsys):
    assert bench.main(["--list"]) == []
    keys = [json.loads(line)["key"] for line in capsys.readouterr().out.splitlines()]
    assert len(keys) == len(set(keys)) == 6
    with pytest.raises(SystemExit):
        bench.main(["--case", "loading/none"])
