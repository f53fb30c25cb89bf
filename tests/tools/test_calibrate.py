"""tools/calibrate: its kernels compute what they say (interpreter or GPU) and compile for sm_90."""

import importlib.util
import json
import os
import subprocess
import sys
from importlib.machinery import SourceFileLoader
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
TOOL = Path(__file__).parents[2] / "tools" / "calibrate"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

AOT = """
import sys
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
import triton
from triton.backends.compiler import GPUTarget
loader = SourceFileLoader("calibrate", sys.argv[1])
calibrate = module_from_spec(spec_from_loader("calibrate", loader))
loader.exec_module(calibrate)
read = {"source": "*fp32", "sink": "*fp32", "blocks": "i32", "steps": "i32", "BLOCK": "constexpr"}
node = {"x": "*fp32", "repeats": "i32", "BLOCK": "constexpr", "PDL": "constexpr"}
barrier = {"counter": "*i32", "polls_left": "*i32", "programs": "i32", "barriers": "i32", "polls": "i32"}
def compile(kernel, signature, constants, pointers, **options):
    attrs = {(i,): [["tt.divisibility", 16]] for i in range(pointers)}
    source = triton.compiler.ASTSource(kernel, signature, constants, attrs)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert len(compiled.asm["cubin"]) > 1000
    return compiled.asm["ptx"]
ptx = compile(calibrate.read_cyclic_kernel, read, {"BLOCK": 4096}, 2, num_warps=8)
assert "ld.global.cg.v4" in ptx, "the reads must be 16 bytes wide and pass the L1 by"
for pdl in (False, True):
    ptx = compile(calibrate.node_kernel, node, {"BLOCK": 1024, "PDL": pdl}, 1, launch_pdl=pdl)
    assert ("griddepcontrol.wait" in ptx) == pdl
ptx = compile(calibrate.barrier_kernel, barrier, {}, 2, launch_cooperative_grid=True)
assert "acquire" in ptx and "acq_rel" in ptx
"""


@pytest.fixture(scope="module")
def calibrate():
    loader = SourceFileLoader("calibrate", str(TOOL))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("calibrate", loader))
    loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("blocks", "steps", "programs"),
    [(5, 15, 2), (5, 5, 1), (1, 3, 4)],  # an odd share per program; one scan; a program with nothing to read
)
def test_read_cyclic_reads_every_block_equally_often(calibrate, blocks, steps, programs):
    source = torch.randn(blocks * 64, device=DEVICE)
    sink = torch.full((programs,), float("nan"), device=DEVICE)
    calibrate.read_cyclic_kernel[(programs,)](source, sink, blocks, steps, BLOCK=64)
    torch.testing.assert_close(sink.sum(), source.sum() * (steps // blocks), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("repeats", [0, 1, 3])  # 0 is the empty kernel
def test_node_adds_one_per_repeat(calibrate, repeats):
    x = torch.arange(2 * 64, dtype=torch.float32, device=DEVICE)
    want = x + repeats
    calibrate.node_kernel[(2,)](x, repeats, BLOCK=64, PDL=False)
    assert torch.equal(x, want)


def barrier(calibrate, programs, polls):
    counter = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    left = torch.full((1,), -1, dtype=torch.int32, device=DEVICE)
    # One program, whatever it expects: the interpreter runs programs one after another.
    calibrate.barrier_kernel[(1,)](counter, left, programs, 3, polls)
    return int(counter), int(left)


def test_barrier_of_one_program_never_polls(calibrate):
    assert barrier(calibrate, programs=1, polls=7) == (3, 7)


def test_barrier_ends_when_a_program_never_arrives(calibrate):
    # The second program does not exist: the polls of all three barriers together are capped, so this returns.
    assert barrier(calibrate, programs=2, polls=7) == (3, 0)


def test_every_case_prepares_the_providers_it_announces(calibrate, monkeypatch):
    monkeypatch.setattr(calibrate, "ceilings", lambda: (4.3e12, 790e12))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    keys = set()
    for case in calibrate.CASES:
        with calibrate.prepare(case) as prepared:
            assert set(prepared.providers) == set(case.providers)
        keys.add(case.key)
    assert len(keys) == len(calibrate.CASES)


def test_compiles_for_sm_90_and_says_when_there_is_no_gpu(tmp_path):
    environment = os.environ | {"TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": ""}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    script = tmp_path / "aot.py"
    script.write_text(AOT + "\nsys.argv = ['calibrate']\nsys.exit(calibrate.main())\n")
    result = subprocess.run([sys.executable, script, TOOL], env=environment, capture_output=True, text=True)
    assert result.returncode == 1, result.stderr
    assert "needs a CUDA GPU" in result.stderr, result.stderr
    assert "Traceback" not in result.stderr, result.stderr


def test_rows_are_json(calibrate, capsys):
    calibrate.harness.main(calibrate.CASES, calibrate.prepare, ["--list"])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {line["benchmark"] for line in lines} == {case.benchmark for case in calibrate.CASES}
