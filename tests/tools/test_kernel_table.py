"""tools/kernel_table: it measures and refuses what it says, and the committed table holds on sm_90 (soak: all)."""

import importlib.util
import json
import re
import subprocess
import sys
from dataclasses import replace
from importlib.machinery import SourceFileLoader
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "kernel_table"

# Run as a process: here the kernels are interpreted. Arguments: the tool, a folder of kernels, architectures.
LOAD = """
import importlib.util, json, os, sys
from dataclasses import asdict
from importlib.machinery import SourceFileLoader
from pathlib import Path
loader = SourceFileLoader("kernel_table", sys.argv[1])
spec = importlib.util.spec_from_loader("kernel_table", loader)
tool = sys.modules["kernel_table"] = importlib.util.module_from_spec(spec)
loader.exec_module(tool)
"""
MEASURE = (
    LOAD
    + """
rows, errors = tool.measure(Path(sys.argv[2]), [int(arch) for arch in sys.argv[3:]])
print(json.dumps([[asdict(row) for row in rows], errors]))
"""
)
# Of each kernel the case with the most registers, where a spill shows first, and the one with the fewest. Prints their
# rows, the errors, and every case that there is for sm_90.
HEAVIEST = (
    LOAD
    + """
registers = {row.key[1:3]: row.registers for row in tool.read(tool.TABLE) if row.arch == 90}
load, present = tool.load_cases, []

def heaviest(path):
    kernels = {}
    for case in load(path):
        if 90 in case.get("arches", [90]):
            present.append([path.stem, case["name"]])
            kernels.setdefault(case["kernel"].__name__, []).append(case)
    chosen = []
    for cases in kernels.values():
        cases.sort(key=lambda case: registers.get((path.stem, case["name"]), 255))
        chosen += [cases[-1], *cases[:-1][:1]]
    return chosen

tool.load_cases = heaviest
rows, errors = tool.measure(tool.ROOT / "kernels", [90])
print(json.dumps([[asdict(row) for row in rows], errors, present]))
"""
)
CRASH = (
    LOAD
    + """
tool.compile_case = lambda stem, case, arch: os._exit(1)
print(json.dumps(tool.measure(Path(sys.argv[2]), [90])))
"""
)

KERNELS = """
import torch
import triton
import triton.language as tl

@triton.jit
def product_kernel(a, b, c, size, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    total = tl.zeros((M, N), tl.float32)
    for i in range(0, size, K):
        x = tl.load(a + m[:, None] * size + i + k[None, :])
        total = tl.dot(x, tl.load(b + n[:, None] * size + i + k[None, :]).T, total)
    tl.store(c + m[:, None] * N + n[None, :], total)

@triton.jit
def wrong_kernel(a, b, c, size, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    tl.store(c, tl.arange(0, 3))

SIZES = {"M": 64, "N": 128, "K": 64}
OPTIONS = {"num_warps": 4, "num_stages": 3, "enable_fp_fusion": True}

def product(a, b, c, sizes=SIZES, options=OPTIONS):
    product_kernel[(1,)](a, b, c, a.shape[1], **sizes, **options)

def case(name, kernel=product_kernel, options=None, **more):
    signature = {"a": "*bf16", "b": "*bf16", "c": "*fp32", "size": "i32"} | dict.fromkeys(SIZES, "constexpr")
    attrs = {(i,): [["tt.divisibility", 16]] for i in range(4)}
    return {"name": name, "kernel": kernel, "signature": signature, "constants": SIZES, "attrs": attrs,
            "options": OPTIONS | (options or {}), "wgmma": True} | more

def launch(**changes):
    a, b = (torch.empty(rows, changes.pop("size", 256), dtype=torch.bfloat16, device="meta") for rows in (64, 128))
    product(a, b, torch.empty(64, 128, device="meta"), **changes)
"""


@pytest.fixture(scope="module")
def tool():
    loader = SourceFileLoader("kernel_table", str(TOOL))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("kernel_table", loader))
    sys.modules["kernel_table"] = module  # where dataclasses look up annotations
    loader.exec_module(module)
    yield module
    del sys.modules["kernel_table"]


@pytest.fixture
def row(tool):
    counts = dict.fromkeys(tool.SASS, 1) | {"FFMA": 0}
    return tool.Row("3.9.0", "x", "small", 90, True, 100, 0, 0, 0, counts)


def script(code, *arguments):
    command = [sys.executable, "-W", "ignore", "-c", code, TOOL, *map(str, arguments)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


def kernels(folder, **files):
    """One file of kernels for each list of cases."""
    for stem, cases in files.items():
        (folder / f"{stem}.py").write_text(f"{KERNELS}\ndef aot_cases():\n    return [{cases}]\n")
    return folder


def test_measures_what_a_kernel_is(tmp_path):
    cases = """
        case("plain", launch=launch),
        case("tight", options={"maxnreg": 96}),       # too few registers for 64 x 128 sums on 128 threads of mma.sync
        case("wrong", kernel=wrong_kernel),           # a range of 3 is no power of 2
        case("only", arches=[90]),
    """
    rows, errors = script(MEASURE, kernels(tmp_path, x=cases), 80, 90)
    found = {(row["case"], row["arch"]): row for row in rows}
    assert set(found) == {("plain", 80), ("plain", 90), ("tight", 80), ("tight", 90), ("only", 90)}
    assert all(row["kernel"] == "x" and row["triton"] == triton.__version__ for row in rows)
    assert [error.split(": ")[:3] for error in errors] == [["x", "wrong", "sm_80"], ["x", "wrong", "sm_90"]]
    assert all("power of 2" in error for error in errors)
    old, new = found["plain", 80], found["plain", 90]
    # 64 x 128 sums on 128 threads are 64 registers each.
    assert 64 < old["registers"] <= 255 and old["spilled"] == 0 and old["sass"]["HMMA"] > 0 == old["sass"]["HGMMA"]
    assert new["sass"]["HGMMA"] > 0 == new["sass"]["HMMA"] and new["sass"]["LDGSTS"] > 0 and new["sass"]["STG.128"] > 0
    # Two operands of (64 + 128) x 64 bf16 and 3 stages: two or three of them in shared memory.
    stage = (64 + 128) * 64 * 2
    assert 2 * stage <= old["shared"] <= new["shared"] <= 3 * stage
    tight = found["tight", 80]
    assert tight["registers"] <= 96 and tight["spilled"] > 0


REFUSED = {
    'case("a"), case("a")': r"expected cases with names of their own",
    "": r"expected cases with names of their own",
    'case("a", warps=4)': r"a: .*unknown keys \['warps'\]",
    'case("a", arches=[91])': r"a: expected arches among",
    'case("a", signature={"a": "*bf16"})': r"a: expected a signature of \['a', 'b', 'c', 'size', 'M', 'N', 'K'\]",
    'case("a", constants={"M": 64})': r"a: the signature has the constants \['K', 'M', 'N'\], constants \['M'\]",
    'case("a", attrs={(4,): [["tt.divisibility", 16]]})': r"a: attrs are for arguments, .*\['M'\]",
    'case("a", options={"num_wraps": 4})': r"a: expected options of triton .*num_wraps",
    'case("a", launch=lambda: launch(sizes=SIZES | {"K": 32}))': r"constants K: the case has 64, .* passes 32",
    'case("a", launch=lambda: launch(options=OPTIONS | {"num_warps": 8}))': r"options num_warps: .* has 4, .* passes 8",
    'case("a", launch=lambda: launch(size=72))': r"attrs size: the case has .*'tt.divisibility', 16.* passes None",
    'case("a", launch=lambda: None)': r"a: launch launches no product_kernel",
}


def test_refuses_what_triton_would_take(tmp_path):
    """All in one process; a file that is refused does not keep the others from being compiled."""
    names = {f"x{i:02}": cases for i, cases in enumerate(REFUSED)}
    kernels(tmp_path, **names, z='case("good", arches=[90])')
    (tmp_path / "y.py").write_text("")
    rows, errors = script(MEASURE, tmp_path, 90)
    assert [row["case"] for row in rows] == ["good"]
    assert len(errors) == len(REFUSED) + 1
    for (stem, _), message, error in zip(names.items(), REFUSED.values(), errors, strict=False):
        assert error.startswith(f"{stem}: ")
        assert re.search(message, error), error
    assert errors[-1].startswith("y: expected a function aot_cases()")


def test_a_crash_of_the_compiler_names_the_case(tmp_path):
    rows, errors = script(CRASH, kernels(tmp_path, x='case("plain")'))
    assert rows == [] and len(errors) == 1
    assert errors[0].startswith("x: plain: sm_90: the compiler crashed")


def test_missing_cuobjdump_is_an_error(tool, tmp_path, monkeypatch):
    monkeypatch.setattr(triton, "__file__", str(tmp_path / "__init__.py"))
    with pytest.raises(FileNotFoundError, match=r"cuobjdump is missing: install triton's own wheel"):
        tool.cuobjdump("--dump-sass", tmp_path / "x.cubin")


def test_instructions_of_a_listing(tool):
    listing = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;                   /* 0x00000a00ff017b82 */
                                                                            /* 0x000fe20000000a00 */
        /*0d10*/              @!P0 LDG.E.EF.128 R4, desc[UR4][R2.64] ;      /* 0x0000000402048981 */
        /*0d20*/             @!UP0 UTCHMMA gdesc[UR8], gdesc[UR10] ;        /* 0x0000000402048981 */
        /*10d30*/                  HMMA.16816.F32.BF16 R4, R8, R2, R4 ;     /* 0x0000000402048981 */
    """
    assert tool.INSTRUCTION.findall(listing) == ["LDC", "LDG.E.EF.128", "UTCHMMA", "HMMA.16816.F32.BF16"]


def test_only_serialised_wgmma_is_a_warning(tool):
    log = "ptxas info : (C{}) Potential Performance Loss: wgmma.mma_async instructions are serialized due to …\n"
    codes = {7509: False, 7510: True, 7515: True, 7519: True, 7520: True, 7521: False, 7602: False}
    for code, warns in codes.items():
        assert bool(tool.SERIALISED.findall(log.format(code))) == warns, code
    assert tool.SERIALISED.findall(log.format(7515))[0].endswith("due to …")


def test_the_table_survives_writing(tool, row, tmp_path):
    rows = [replace(row, arch=100), replace(row, warnings=("(C7510) …",))]
    tool.write(tmp_path / "t.jsonl", rows)
    assert tool.read(tmp_path / "t.jsonl") == rows[::-1]  # sorted: sm_90 before sm_100
    assert tool.read(tmp_path / "none.jsonl") == []


LIMITS = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
# (change of the committed row, change of the new one, what is said: None for nothing)
CHANGES = {
    "the same": ({}, {}, None),
    "eight registers": ({}, {"registers": 108}, None),
    "nine registers": ({}, {"registers": 109}, "109 registers, 100 before"),
    "fewer registers": ({}, {"registers": 32}, None),
    "a spill": ({}, {"spilled": 4}, "4 bytes spilled, 0 before"),
    "a spill as before": ({"spilled": 8}, {"spilled": 8}, None),
    "more spilled": ({"spilled": 8}, {"spilled": 12}, "12 bytes spilled, 8 before"),
    "no HGMMA": ({}, {"sass": {"HGMMA": 0}}, "no HGMMA"),
    "no HGMMA due": ({}, {"wgmma": False, "sass": {"HGMMA": 0}}, None),
    "no HGMMA there": ({"arch": 100}, {"arch": 100, "sass": {"HGMMA": 0}}, None),
    "serialised": ({}, {"warnings": ("(C7515) slow",)}, "(C7515) slow"),
    "all tensor memory": ({}, {"tensor_memory": 512}, None),
    "too much tensor memory": ({}, {"tensor_memory": 1024}, "1024 columns of tensor memory, of 512"),
    "a new case": ({"case": "other", "arch": 80}, {}, "no row for triton 3.9.0"),  # sm_80 was not compiled
    "another triton": ({"triton": "3.6.0"}, {}, "no row for triton 3.9.0"),
    **{f"sm_{a} full": ({"arch": a}, {"arch": a, "shared": k * 1024}, None) for a, k in LIMITS.items()},
    **{
        f"sm_{a} over": ({"arch": a}, {"arch": a, "shared": k * 1024 + 1}, "bytes of shared") for a, k in LIMITS.items()
    },
}


@pytest.mark.parametrize("change", CHANGES)
def test_regressions(tool, row, change):
    before, after, said = CHANGES[change]
    found = tool.regressions([replace(row, **after)], [replace(row, **before)], [after.get("arch", 90)])
    if said is None:
        assert found == []
    else:
        assert len(found) == 1 and found[0].startswith(f"x: small: sm_{after.get('arch', 90)}: ") and said in found[0]


def test_a_row_without_a_case_is_a_regression(tool, row):
    gone = replace(row, case="gone")
    found = tool.regressions([row], [row, gone], [90])
    assert len(found) == 1 and found[0].startswith("x: gone: sm_90: in kernel_table.jsonl but not compiled")
    assert tool.regressions([row], [row, replace(gone, arch=80), replace(gone, triton="3.6.0")], [90]) == []


def test_write_replaces_the_rows_of_this_triton_and_these_architectures(tool, row, tmp_path, monkeypatch, capsys):
    table = tmp_path / "t.jsonl"
    others = [replace(row, arch=80), replace(row, triton="3.6.0")]
    tool.write(table, [*others, row, replace(row, case="gone")])
    new = replace(row, registers=120)
    failed = []
    monkeypatch.setattr(tool, "TABLE", table)
    monkeypatch.setattr(tool, "measure", lambda folder, arches: ([new], list(failed)))
    monkeypatch.setattr(sys, "argv", ["kernel_table", "--arch", "90"])
    assert tool.main() == 1 and "120 registers, 100 before" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["kernel_table", "--arch", "90", "--write"])
    failed.append("y: does not compile")
    assert tool.main() == 1 and len(tool.read(table)) == 4  # an incomplete table is not written
    failed.clear()
    assert tool.main() == 0
    assert {row.key: row.registers for row in tool.read(table)} == {r.key: r.registers for r in [*others, new]}


def test_no_regression_on_hopper(tool):
    """The heaviest and the lightest case of each kernel against the table as it is committed; `make soak` does all."""
    found, errors, present = script(HEAVIEST)
    assert errors == []
    rows = [tool.Row(**row | {"warnings": tuple(row["warnings"])}) for row in found]
    # The kernels of every file are here, and every case has been checked against its launcher.
    assert {row.kernel for row in rows} == {path.stem for path in (ROOT / "kernels").glob("*.py")}
    committed = [row for row in tool.read(tool.TABLE) if row.triton == triton.__version__ and row.arch == 90]
    compiled = {row.key for row in rows}
    problems = tool.regressions(rows, [row for row in committed if row.key in compiled], [90])
    if committed:
        assert problems == []
        assert sorted(present) == sorted([row.kernel, row.case] for row in committed)
    else:  # a triton that nobody has committed a table for: what needs no table must hold
        assert all("no row for triton" in problem for problem in problems), problems


@pytest.mark.soak
@pytest.mark.parametrize("version", ["3.6.0", "3.9.0"])
def test_no_regression_anywhere(version):
    """The oldest and the newest triton that is supported, installed by pip where it is not the one that is here."""
    other = [] if version == triton.__version__ else ["--triton", version]
    run = subprocess.run([sys.executable, TOOL, *other], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
