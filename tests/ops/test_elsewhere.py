"""fastlatent.ops in other projects: with torch and triton alone, in torch.export, compiled by AOTInductor."""

import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fastlatent import ops
from fastlatent.diffusion.solvers import build_table

# Every other top-level package is refused, numpy too, which torch does without. What torch requires: METADATA of its
# wheel; torchgen and functorch are in it, markupsafe and mpmath are what jinja2 and sympy require.
ALONE = """
import sys
from importlib.abc import MetaPathFinder

TORCH = {"torch", "torchgen", "functorch", "filelock", "typing_extensions", "setuptools", "pkg_resources", "sympy",
         "mpmath", "networkx", "jinja2", "markupsafe", "fsspec"}
ALLOWED = {*sys.stdlib_module_names, *TORCH, "triton", "fastlatent"}
refused = {}

class Refuse(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        top = name.split(".")[0]
        if top not in ALLOWED and not top.startswith("_"):  # _sysconfigdata_…, the editable install's finder
            frame = sys._getframe(1)
            while "importlib" in frame.f_code.co_filename:
                frame = frame.f_back
            refused.setdefault(top, []).append(frame.f_globals.get("__name__", ""))
            raise ModuleNotFoundError(f"{name} is not here", name=name)

before = set(sys.modules)
sys.meta_path.insert(0, Refuse())
import warnings
warnings.simplefilter("ignore")  # torch says that numpy is missing
import torch
torch.set_num_threads(1)
import fastlatent.ops as ops
from pathlib import Path
import importlib
for path in sorted(Path(sys.argv[1]).glob("*.py")):
    importlib.import_module(f"fastlatent.kernels.{path.stem}")

state, row = torch.zeros(4, 2, 3), torch.zeros(16)
state[0], row[2], row[3], row[9] = 1.0, torch.inf, 2.0, 0.5   # r, a, s: x' = 2·x + 0.5·z
ops.solver_step(state, torch.zeros(1, 2, 3), torch.ones(1, 2), row, torch.ones(2, 3))  # C++
assert state[0].tolist() == [[2.5] * 3] * 2
x = torch.tensor([[3.0, 4.0]])
out = ops.norm_modulate(x, torch.ones_like(x), torch.ones_like(x), layer_norm=False, eps=0.0)  # plain torch
torch.testing.assert_close(out, 1 + 2 * x / 12.5**0.5)

ours = {top: names for top, names in refused.items() if any(name.startswith("fastlatent") for name in names)}
assert not ours, f"fastlatent asks for {ours}"
strangers = {name.split(".")[0] for name in set(sys.modules) - before} - ALLOWED
assert not {name for name in strangers if not name.startswith("_")}, strangers
print("alone")
"""


def test_torch_and_triton_alone():
    pytest.importorskip("triton")
    kernels = Path(__file__).parents[2] / "kernels"
    command = [sys.executable, "-c", ALONE, str(kernels)]
    # Interpreted kernels need numpy; compiled ones, which nobody launches here, do not.
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.stdout.strip() == "alone", done.stderr


HIDDEN, CHANNELS, STEPS, WAYS = 16, 4, 3, 2


class Sampler(nn.Module):
    """A head as somebody would export it: weights and tables are buffers, state is made inside."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)

        def randn(*shape: int) -> Tensor:
            return 0.3 * torch.randn(*shape, generator=draw)

        h, c, blocks, width = HIDDEN, CHANNELS, 2, 20
        shapes = {
            "input": ((h, c), (h,)), "modulation": (((3 * blocks + 2) * h, h), ((3 * blocks + 2) * h,)),
            "up": ((blocks, 2 * width, h), (blocks, 2 * width)), "down": ((blocks, h, width), (blocks, h)),
            "output": ((c, h), (c,)),
        }  # fmt: skip
        for name, (weight, bias) in shapes.items():
            self.register_buffer(f"{name}_weight", randn(*weight).to(dtype))
            self.register_buffer(f"{name}_bias", randn(*bias))
        self.register_buffer("table", build_table("dpmsolver++", STEPS, "v_prediction", "cosine").rows.float())
        self.register_buffer("t_embedding", randn(STEPS, h).to(dtype))

    def forward(self, noise: Tensor, condition: Tensor, guidance: Tensor) -> Tensor:
        names = [field.name for field in fields(ops.HeadWeights)]
        weights = ops.HeadWeights(**{name: getattr(self, name) for name in names if hasattr(self, name)})
        state = torch.cat([noise[None], noise.new_zeros(3, *noise.shape)])
        ops.diffusion_head_sample(
            state, condition.contiguous(), self.t_embedding, self.table, guidance.contiguous(), weights
        )
        return state[0]


def inputs(batch: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(batch)
    guidance = torch.tensor([[1.5], [-0.5]]).repeat(1, batch)
    condition = torch.randn(WAYS, batch, HIDDEN, generator=draw).to(dtype)
    return torch.randn(batch, CHANNELS, generator=draw), condition, guidance


def exported(sampler: Sampler, dtype: torch.dtype) -> torch.export.ExportedProgram:
    # Path "auto" is decided while tracing, so the batch must be bounded: 2 ways of 8 are few rows. An open one needs
    # path="few_rows" or "many_rows"; torch says so.
    batch = torch.export.Dim("batch", max=8)
    shapes = {"noise": {0: batch}, "condition": {1: batch}, "guidance": {1: batch}}
    return torch.export.export(sampler, inputs(3, dtype), dynamic_shapes=shapes)


def test_a_head_is_exported_with_an_open_batch():
    sampler = Sampler()
    program = exported(sampler, torch.float32)
    targets = [node.target for node in program.graph.nodes]
    assert targets.count(torch.ops.fastlatent.diffusion_head_sample.default) == 1
    [node] = [n for n in program.graph.nodes if n.target is torch.ops.fastlatent.diffusion_head_sample.default]
    assert node.args[-1] == "few_rows"
    for batch in (1, 3, 8):
        assert torch.equal(program.module()(*inputs(batch)), sampler(*inputs(batch)))


LOADER = """
import sys, torch
torch.set_num_threads(int(sys.argv[3]))  # products are added up in another order by others
import fastlatent.ops
head = torch._inductor.aoti_load_package(sys.argv[1])
for given, wanted in torch.load(sys.argv[2]):
    assert torch.equal(head(*given), wanted), len(wanted)
print("equal")
"""


@pytest.mark.soak  # 20 s: g++ compiles torch's headers
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_head_is_compiled_ahead_of_time(dtype, tmp_path):
    """AOTInductor calls the op through the dispatcher: who loads the library imports fastlatent.ops first."""
    sampler = Sampler(dtype)
    package = torch._inductor.aoti_compile_and_package(
        exported(sampler, dtype), package_path=str(tmp_path / "head.pt2")
    )
    torch.save([(inputs(batch, dtype), sampler(*inputs(batch, dtype))) for batch in (1, 3, 8)], tmp_path / "wanted.pt")
    command = [sys.executable, "-W", "ignore", "-c", LOADER, package, str(tmp_path / "wanted.pt")]
    command.append(str(torch.get_num_threads()))
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout.strip() == "equal", done.stderr


@pytest.mark.parametrize("path", ["reference", "few_rows", "many_rows"])
def test_the_operator_itself_takes_strided_inputs(path):
    """An exported program calls torch.ops.fastlatent, past the checks of the Python function."""
    sampler, (noise, condition, guidance) = Sampler(), inputs(3)
    names = [field.name for field in fields(ops.HeadWeights)][:-2]
    weights = [getattr(sampler, name, None) for name in names]

    def run(state: Tensor, condition: Tensor, table: Tensor, guidance: Tensor) -> Tensor:
        rest = (*weights, False, 1e-6, path)
        torch.ops.fastlatent.diffusion_head_sample(
            state, condition, sampler.t_embedding, table, guidance, step_noise, *rest
        )
        return state[0]

    step_noise = torch.zeros(STEPS, 3, CHANNELS)
    state = torch.cat([noise[None], noise.new_zeros(3, *noise.shape)])
    wanted = run(state.clone(), condition, sampler.table, guidance)
    assert not torch.equal(wanted, noise)
    step_noise = torch.zeros(CHANNELS, 3, STEPS).mT.transpose(0, 1).mT  # [S, B, C], as no kernel reads it
    assert step_noise.shape == (STEPS, 3, CHANNELS) and not step_noise.is_contiguous()
    strided = [condition.mT.contiguous().mT, sampler.table.mT.contiguous().mT, guidance.mT.contiguous().mT]
    assert torch.equal(run(state.clone(), *strided), wanted)
    with pytest.raises(ValueError, match="expected a contiguous state"):
        run(state.mT.contiguous().mT, condition, sampler.table, guidance)
