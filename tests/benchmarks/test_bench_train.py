"""benchmarks/bench_train.py and bench_train_source.py: both loops train one loss, and every provider gets its row."""

import importlib.util
import sys
from dataclasses import replace
from importlib.machinery import SourceFileLoader
from pathlib import Path

import bench_train as bench
import bench_train_source as source
import pytest
import torch
from plain_train import PlainLoss

TINY = {"hidden_size": 32, "depth": 1, "num_heads": 2, "num_kv_heads": 2, "mlp_ratio": 3}


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setattr(bench, "SMALL_AR", TINY | {"diffusion_depth": 1})
    monkeypatch.setattr(bench, "SMALL_DIT", TINY)
    bench.flops.cache_clear()
    yield
    bench.flops.cache_clear()


@pytest.mark.parametrize("name", ["Transformer-small", "DiT-small"])
def test_plain_loss_is_ours(name):
    config = bench.model_config(name)
    torch.manual_seed(0)
    loss = bench.make_loss(config, torch.device("cpu"))
    autoregressive = name.startswith("Transformer")
    shape = (3, 64, 4) if autoregressive else (3, 4, 8, 8)
    noise = torch.randn(3, bench.COPIES, 64, 4) if autoregressive else torch.randn(shape)
    t = torch.randint(1000, noise.shape[:3] if autoregressive else (3,))
    batch = {"latents": torch.randn(shape), "label": torch.tensor([0, 7, 1000]), "t": t, "noise": noise}
    with torch.no_grad():
        want, _ = loss(batch)
        got = PlainLoss(loss.model)(batch["latents"], batch["label"], t, noise)
    assert float(abs(got - want) / want) < 1e-5
    assert 0.5 < float(want) < 5  # of random weights: neither dead nor astray


def test_every_provider_of_a_step_gets_its_row(monkeypatch):
    monkeypatch.setattr(bench, "steps_per_call", lambda device: bench.LEAD + 1)
    case = bench.make_case("Transformer-small", 4, "off", "cpu")
    case = replace(case, threads=1)
    with bench.prepare(case) as (prepared, timed):
        ours, plain, floor = (prepared.providers[name]() for name in ("fastlatent", "plain", "floor"))
        for run in (ours, plain, floor):
            run()
        assert len(timed.seconds) == bench.LEAD + 1
    rows = {row.provider: row for row in bench.measure(case, 0.01)}
    assert set(rows) == set(case.providers) and {row.status for row in rows.values()} == {"ok"}
    assert rows["fastlatent"].rival == "plain" and rows["fastlatent"].floor_seconds == rows["floor"].p50
    wait = rows["loader-wait"]
    # One step of each call; the five samples have a call each, or more.
    assert wait.samples >= 5 and wait.p50 < rows["fastlatent"].p50 and wait.ratio is None and wait.flops is None


def test_all_loops_train_the_same_tensors():
    case = replace(bench.make_case("DiT-small", 4, "off", "cpu"), threads=1)
    with bench.prepare(case) as (prepared, _):
        ours, plain, floor = (prepared.providers[name]() for name in ("fastlatent", "plain", "floor"))
        closure = dict(zip(floor.__code__.co_freevars, (cell.cell_contents for cell in floor.__closure__), strict=True))
        adamw, weight = closure["adamw"], closure["objective"].module.model.final_layer.linear.weight
        seen = [weight.detach().clone()]
        for calls, run in enumerate((ours, plain, floor), 1):
            run()
            seen.append(weight.detach().clone())
            assert not torch.equal(seen[-1], seen[-2])
            # AdamW's own count goes on: its moments are in memory once.
            assert float(adamw.state[weight]["step"]) == calls * bench.steps_per_call("cpu")


def test_flops():
    """6 for each weight and token, and attention: 12·width for each pair of tokens and block."""
    config = bench.model_config("Transformer-Large")
    blocks = 24 * (4 * 1536**2 + 3 * 1536 * 6144) + 1536**2
    head = 3 * (3 * 1536 * 6144) + 3 * 1536 * 16
    modulations = 3 * 3 * 1536**2 + 2 * 1536**2 + 1536**2 + 256 * 1536  # and the times'
    tokens = 2 * config.num_tokens
    want = 6 * tokens * (blocks + bench.COPIES * (head + modulations)) + 12 * 24 * 1536 * 256 * tokens
    assert bench.flops("Transformer-Large", 2) == pytest.approx(want, rel=0.01)


class Pipe:
    """What the other side of a segment's process asks for."""

    def __init__(self, asked):
        self.asked, self.sent = list(asked), []

    def recv(self):
        return self.asked.pop(0)

    def send(self, answer):
        self.sent.append(answer)


def test_segments_of_both_sources(tmp_path, monkeypatch):
    monkeypatch.setitem(source.WIDTHS, "narrow", (8, 8, 8, 8))
    case = replace(source.make_case("DiT-small", 4, 64, "narrow", 8, "cpu"), threads=1)
    source.write_source(tmp_path, case)
    for provider in case.providers:
        pipe = Pipe([2, 1, None])
        source.train_segments(pipe, provider, tmp_path, case)
        assert [0 < seconds < 60 and peak >= 0 for seconds, peak in pipe.sent] == [True, True], pipe.sent
    pipe = Pipe([1])
    source.train_segments(pipe, "cached", tmp_path / "absent", case)
    assert pipe.sent[0].status == "error"


@pytest.mark.soak
def test_processes_take_turns():
    case = replace(source.make_case("DiT-small", 4, 64, "narrow", 8, "cpu"), threads=1)
    rows = source.measure(case, 0.01)
    assert [(row.provider, row.status) for row in rows] == [("cached", "ok"), ("on-the-fly", "ok")]
    assert rows[0].rival == "on-the-fly" and all(row.samples >= 5 and row.peak_bytes > 0 for row in rows)
    assert "MiB peak" in bench.harness.describe(rows[0])


def test_a_process_that_ends_is_an_error():
    ours, theirs = source.multiprocessing.Pipe()
    theirs.close()
    assert source._ask(ours, 1).status == "error"


def test_gpu_validate_measures_the_two_largest_first(monkeypatch):
    path = Path(__file__).parents[2] / "tools" / "gpu_validate"
    loader = SourceFileLoader("gpu_validate", str(path))
    tool = importlib.util.module_from_spec(importlib.util.spec_from_loader("gpu_validate", loader))
    monkeypatch.setitem(sys.modules, "gpu_validate", tool)  # dataclasses look their module up
    loader.exec_module(tool)
    cases = bench.make_cases("cuda")
    first = [case for case in cases if any(case.key.startswith(begin) for begin in tool.FIRST_ROWS)]
    assert [case.sizes["model"] for case in first] == ["Transformer-Large", "DiT-XL"]
    assert {case.sizes["compile"] for case in first} == {"on"} and all("gemm" in case.providers for case in cases)
