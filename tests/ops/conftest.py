"""What several tests of ops need: which compiled function was called, and what a kernel is on sm_90."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastlatent import _native

# Compiles for sm_90 in a process of its own, as here the kernels are interpreted; one process for all, as importing
# triton takes seconds. A line of its input: the file's stem and the names of cases; of its output: what each case is.
COMPILER = """
import json, sys
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
import triton

loader = SourceFileLoader("kernel_table", sys.argv[1])
tool = sys.modules["kernel_table"] = module_from_spec(spec_from_loader("kernel_table", loader))
loader.exec_module(tool)
kept, compile, cuobjdump = {}, triton.compile, tool.cuobjdump

def keep_ptx(*args, **options):
    compiled = compile(*args, **options)
    kept["ptx"] = compiled.asm["ptx"]
    return compiled

def keep_sass(flag, cubin):
    text = cuobjdump(flag, cubin)
    kept[flag] = text
    return text

triton.compile, tool.cuobjdump = keep_ptx, keep_sass
for line in sys.stdin:
    stem, names = json.loads(line)
    cases = {case["name"]: case for case in tool.load_cases(Path(sys.argv[2]) / f"{stem}.py")}
    found = []
    for name in names:
        row = tool.compile_case(stem, cases[name], 90).__dict__
        found.append(row | {"ptx": kept["ptx"], "sass_text": kept["--dump-sass"]})
    print(json.dumps(found), flush=True)
"""


@pytest.fixture(scope="session")
def compiler(tmp_path_factory):
    root = Path(__file__).parents[2]
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}
    command = [sys.executable, "-W", "ignore", "-c", COMPILER, root / "tools" / "kernel_table", root / "kernels"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment, **pipes) as process:
        yield process
        process.stdin.close()


@pytest.fixture
def hopper(request):
    """hopper(stem, *names): aot_cases() of kernels/<stem>.py compiled ahead of time for sm_90, without a GPU.

    A dict for each: a row of tools/kernel_table (registers, spilled, shared, sass: counts of instructions), and the
    texts "ptx" and "sass_text".
    """
    pytest.importorskip("triton")
    compiler = request.getfixturevalue("compiler")

    def compiled(stem: str, *names: str) -> list[dict]:
        compiler.stdin.write(json.dumps([stem, names]) + "\n")
        compiler.stdin.flush()
        line = compiler.stdout.readline()
        assert line, "the compiler's process ended; its error is in what the test printed to stderr"
        return json.loads(line)

    return compiled


@pytest.fixture
def native_calls(monkeypatch):
    """The arguments of every call of the compiled library: its backend, the function's name, its own arguments."""
    calls = []
    original = _native.call
    monkeypatch.setattr(_native, "call", lambda *args: calls.append(args) or original(*args))
    return calls
