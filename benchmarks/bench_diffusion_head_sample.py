"""diffusion_head_sample against the published loops of per-token diffusion heads: seconds per token of a whole batch.

Weights are random, N(0, 0.02) everywhere, also where training starts from zero. Two guidance ways: `rows` is twice the
batch. What depends on the step or the token alone is outside for everyone: timestep embedding, condition projection,
noise. Published code does that at every step, so each rival here is faster than its original.

fastlatent           the op, path="auto"; `-few-rows` and `-many-rows` force a path, to show where auto should switch;
                     `-int8` has FFN weights of 8 bits with a scale per row, so it is no rival: relative to float64 a
                     token of Base is off by 1.5 %, with bfloat16 weights by 0.5 % (tests/benchmarks asserts below 2 %);
                     `-graph` is auto in one CUDA graph
plain-eager          plain_head.py: modulations inside the loop, solver scalars as numbers
plain-compiled       its step, modulations included, under torch.compile
plain-hoisted-compiled   modulations of all steps in one product ahead of the loop, as in ours; step compiled
plain-hoisted-frozen     CPU: that with Inductor's freezing, which packs the weights for its matrix products
plain-reduce-overhead, plain-max-autotune   CUDA: that in these modes of torch.compile
plain-graph, plain-graph-hoisted, plain-graph-hoisted-compiled   CUDA: all steps as one CUDA graph of the eager loop,
                     the eager hoisted loop, plain-hoisted-compiled
floor                reads as many bytes as the weights of one token, once per step and the modulations once

`bytes` and `floor` count weights in the case's dtype, embeddings left out, so `-int8` may pass its floor. Reading is
Tensor.sum over 1 GiB of float32. No head here fits a 32 MiB L3 except the int8 FFNs of Base and MAR-L; in bfloat16
these two (42 and 53 MB a step) fit the L2 of an H100 or H200, where they may pass the floor too. From about 200 rows
arithmetic is the limit there, not reading: see `flops`. Compiling is part of the 60 s warm-up; after a "timeout" a
second run gets further, because Inductor keeps what it has compiled on disk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import harness
import plain_head
import pytest
import rows as row_files
import torch
from torch import Tensor

from fastlatent.diffusion.solvers import build_table
from fastlatent.ops.diffusion_head_sample import HeadWeights, Path, diffusion_head_sample
from fastlatent.ops.solver_step import L0, L1, ROW, A, B, E, P, Q, R, S

WAYS = 2
READ_BYTES = 2**30


@dataclass(frozen=True)
class Head:
    """A published head, and the sampler and steps it is published with."""

    hidden: int
    width: int
    blocks: int
    channels: int
    solver: str  # "dpmsolver++", "ancestral" (learned variance: twice the outputs) or "flow_sde"
    steps: int
    gated: bool = True
    layer_norm: bool = False
    bias: bool = False
    eps: float = 1e-6

    @property
    def outputs(self) -> int:
        return self.channels * (2 if self.solver == "ancestral" else 1)

    @property
    def step_weights(self) -> int:
        """Weights that every step reads."""
        per_block = self.hidden * self.width * (3 if self.gated else 2)
        return self.blocks * per_block + self.hidden * (self.channels + self.outputs)

    @property
    def modulation_weights(self) -> int:
        return (3 * self.blocks + 2) * self.hidden**2


MLP = {"gated": False, "layer_norm": True, "bias": True}
HEADS = {
    "LatentLM-Medium": Head(1024, 4096, 3, 16, "dpmsolver++", 20),
    "LatentLM-Base": Head(768, 3072, 3, 16, "dpmsolver++", 20),
    "LatentLM-Large": Head(1536, 6144, 3, 16, "dpmsolver++", 20),
    "VibeVoice-1.5B": Head(1536, 4608, 4, 64, "dpmsolver++", 10, eps=1e-5),
    "MAR-L": Head(1280, 1280, 8, 16, "ancestral", 100, **MLP),
    "NextStep-1": Head(1536, 1536, 12, 64, "flow_sde", 28, **MLP),
}

# ---- cases -----------------------------------------------------------------------------------------------


def make_case(head: str, rows: int, dtype: str, device: str) -> harness.Case:
    providers = ["fastlatent", "fastlatent-few-rows", "fastlatent-many-rows", "fastlatent-int8"]
    rivals = ["plain-eager", "plain-compiled", "plain-hoisted-compiled"]
    if device == "cuda":
        providers += ["fastlatent-graph"]
        rivals += ["plain-reduce-overhead", "plain-max-autotune"]
        rivals += ["plain-graph", "plain-graph-hoisted", "plain-graph-hoisted-compiled"]
    else:
        rivals += ["plain-hoisted-frozen"]
    return harness.Case(
        "diffusion_head_sample",
        {"head": head, "rows": rows, "ways": WAYS, "steps": HEADS[head].steps},
        dtype,
        device,
        (*providers, *rivals, "floor"),
        threads=row_files.cpu_cores() if device == "cpu" else 1,
    )


def make_cases(device: str) -> list[harness.Case]:
    """In order of worth, which is the order gpu_validate measures them in."""
    if device == "cuda":
        return [make_case(head, rows, "bfloat16", "cuda") for head in HEADS for rows in (2, 16, 128, 512)]
    return [
        *(make_case("LatentLM-Medium", rows, dtype, "cpu") for rows in (2, 16) for dtype in ("bfloat16", "float32")),
        *(make_case("LatentLM-Base", rows, dtype, "cpu") for rows in (2, 16) for dtype in ("bfloat16", "float32")),
        make_case("VibeVoice-1.5B", 2, "bfloat16", "cpu"),
        make_case("MAR-L", 2, "bfloat16", "cpu"),
    ]


CASES = make_cases("cuda" if torch.cuda.is_available() else "cpu")


def random_weights(head: Head, dtype: torch.dtype, device: str, std: float) -> HeadWeights:
    hidden, up = head.hidden, head.width * (2 if head.gated else 1)

    def normal(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device).normal_(std=std)

    def bias(*shape: int) -> Tensor:
        return normal(*shape).float() if head.bias else torch.zeros(shape, device=device)

    modulations = (3 * head.blocks + 2) * hidden
    return HeadWeights(
        normal(hidden, head.channels), normal(hidden).float(), normal(modulations, hidden), bias(modulations),
        normal(head.blocks, up, hidden), bias(head.blocks, up),
        normal(head.blocks, hidden, head.width), bias(head.blocks, hidden),
        normal(head.outputs, hidden), bias(head.outputs), layer_norm=head.layer_norm, eps=head.eps,
    )  # fmt: skip


def int8_weights(weights: HeadWeights) -> HeadWeights:
    """FFN weights as int8 with a scale per row, max|w| / 127."""

    def quantize(matrix: Tensor) -> tuple[Tensor, Tensor]:
        scale = matrix.float().abs().amax(-1) / 127
        return (matrix.float() / scale[..., None]).round().to(torch.int8), scale

    up, up_scale = quantize(weights.up_weight)
    down, down_scale = quantize(weights.down_weight)
    return replace(weights, up_weight=up, down_weight=down, up_scale=up_scale, down_scale=down_scale)


def solvers(head: Head) -> tuple[plain_head.Solver, Tensor]:
    """The published sampler, and its table [S, 16] in float64."""
    if head.solver == "dpmsolver++":
        table = build_table("dpmsolver++", head.steps, "v_prediction", "cosine")
        return plain_head.dpmsolver_pp(head.steps), table.rows
    rows = torch.zeros(head.steps, ROW, dtype=torch.float64)
    rows[:, R] = torch.inf
    if head.solver == "ancestral":
        solver = plain_head.ancestral(head.steps)
        per_x, per_output, mean_data, mean_x, small, large, noisy = torch.tensor(solver.scalars, dtype=torch.float64).T
        rows[:, P], rows[:, Q], rows[:, A], rows[:, B] = per_x, -per_output, mean_x, mean_data
        rows[:, S], rows[:, L0], rows[:, L1] = noisy, small, large - small
    else:
        solver = plain_head.flow_sde(head.steps)
        per_output, per_x, dt, spread = torch.tensor(solver.scalars, dtype=torch.float64).T
        rows[:, A], rows[:, E], rows[:, S] = 1 - per_x * dt, per_output * dt, spread
    return solver, rows


# ---- providers -------------------------------------------------------------------------------------------

Inputs = tuple[Tensor, Tensor, Tensor, Tensor | None]  # start, condition, t_embedding, noise
Sample = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


@dataclass(frozen=True, eq=False)
class Problem:
    """What a case is about: random weights, and the inputs of one token, as `plain_head.PlainLoop` takes them."""

    weights: HeadWeights
    solver: plain_head.Solver
    table: Tensor  # float32 [S, 16]
    guidance: Tensor  # float32 [WAYS, B]
    inputs: Inputs


def make_problem(case: harness.Case, std: float) -> Problem:
    head, device, rows = HEADS[str(case.sizes["head"])], case.device, int(case.sizes["rows"])
    dtype, batch, scale = getattr(torch, case.dtype), rows // WAYS, plain_head.GUIDANCE_SCALE
    torch.manual_seed(0)
    weights = random_weights(head, dtype, device, std)
    solver, table = solvers(head)
    with torch.inference_mode():  # an ordinary tensor among inference tensors costs compiled rivals a compilation
        start = torch.randn(batch, head.channels, device=device)
        condition = torch.randn(rows, head.hidden, device=device).to(dtype)
        t_embedding = torch.randn(head.steps, head.hidden, device=device).to(dtype)
        noise = torch.randn(head.steps, batch, head.channels, device=device) if solver.needs_noise else None
    guidance = torch.tensor([[scale], [1 - scale]], device=device).expand(WAYS, batch).contiguous()
    return Problem(weights, solver, table.float().to(device), guidance, (start, condition, t_embedding, noise))


def our_sample(problem: Problem, weights: HeadWeights, path: Path) -> Sample:
    def sample(start: Tensor, condition: Tensor, t_embedding: Tensor, noise: Tensor | None) -> Tensor:
        state = start.new_zeros(4, *start.shape)
        state[0] = start
        ways, table = condition.unflatten(0, (WAYS, len(start))), problem.table
        diffusion_head_sample(state, ways, t_embedding, table, problem.guidance, weights, noise, path=path)
        return state[0]

    return sample


def captured(sample: Sample, inputs: Inputs) -> Sample:
    """`sample` as one CUDA graph, with the copies of a token's inputs that its use needs."""
    start, condition, t_embedding, noise = (None if tensor is None else tensor.clone() for tensor in inputs)
    sample(start, condition, t_embedding, noise)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = sample(start, condition, t_embedding, noise)

    def replay(new_start: Tensor, new_condition: Tensor, _: Tensor, new_noise: Tensor | None) -> Tensor:
        start.copy_(new_start)
        condition.copy_(new_condition)
        if noise is not None:
            noise.copy_(new_noise)
        graph.replay()
        return out

    return replay


@contextmanager
def prepare(case: harness.Case, std: float = 0.02) -> Iterator[harness.Prepared]:
    head, device, rows = HEADS[str(case.sizes["head"])], case.device, int(case.sizes["rows"])
    threads_before = torch.get_num_threads()
    torch.set_num_threads(case.threads)
    # All cases share the code of the steps, and after 8 compilations of one function Dynamo runs it in eager mode.
    torch.compiler.reset()
    problem = make_problem(case, std)
    weights, inputs = problem.weights, problem.inputs

    def running(sample: Sample, capture: bool) -> Callable[[], Tensor]:
        if capture:
            sample = captured(sample, inputs)

        @torch.inference_mode()
        def run() -> Tensor:
            return sample(*inputs)

        return run

    @torch.inference_mode()
    def ours(path: Path = "auto", int8: bool = False, capture: bool = False) -> Callable[[], Tensor]:
        sample = our_sample(problem, int8_weights(weights) if int8 else weights, path)
        if path != "auto":
            try:
                sample(*inputs)
            except ValueError as refusal:  # a forced path may not serve these sizes: an answer, not a failure
                raise harness.Unavailable(str(refusal)) from refusal
        return running(sample, capture)

    @torch.inference_mode()
    def plain(hoisted: bool, *compilers: plain_head.Compile, capture: bool = False) -> Callable[[], Tensor]:
        module = plain_head.PlainHead(weights, head.bias, WAYS, problem.solver.update)
        return running(plain_head.PlainLoop(module, problem.solver, *compilers, hoisted=hoisted), capture)

    every_step, once = head.step_weights, head.modulation_weights
    size = (head.steps * every_step + once) * weights.dtype.itemsize

    def floor() -> Callable[[], object]:
        buffer = torch.ones(READ_BYTES // 4, device=device)
        whole, rest = divmod(size // 4, len(buffer))
        parts = [buffer] * whole + [buffer[:rest]]

        def run() -> None:
            for part in parts:
                part.sum()

        return run

    default, frozen = plain_head.compile_default, plain_head.compile_frozen
    overhead, autotune = map(plain_head.compile_with_graphs, ("reduce-overhead", "max-autotune"))
    factories: dict[str, Callable[[], Callable[[], object]]] = {
        "fastlatent": ours,
        "fastlatent-few-rows": lambda: ours("few_rows"),
        "fastlatent-many-rows": lambda: ours("many_rows"),
        "fastlatent-int8": lambda: ours(int8=True),
        "fastlatent-graph": lambda: ours(capture=True),
        "plain-eager": lambda: plain(False),
        "plain-compiled": lambda: plain(False, default),
        "plain-hoisted-compiled": lambda: plain(True, default, default),
        "plain-hoisted-frozen": lambda: plain(True, frozen, frozen),
        "plain-reduce-overhead": lambda: plain(True, overhead, default),
        "plain-max-autotune": lambda: plain(True, autotune, default),
        "plain-graph": lambda: plain(False, capture=True),
        "plain-graph-hoisted": lambda: plain(True, capture=True),
        "plain-graph-hoisted-compiled": lambda: plain(True, default, default, capture=True),
        "floor": floor,
    }
    try:
        yield harness.Prepared(
            {name: factories[name] for name in case.providers},
            bytes=size,
            flops=2 * rows * head.steps * (every_step + once),
            floor="floor",
            rivals=[name for name in case.providers if name.startswith("plain")],
        )
    finally:
        torch.set_num_threads(threads_before)
        if device == "cuda":
            torch.cuda.empty_cache()


# ---- pytest ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "case, provider", [(c, p) for c in CASES for p in c.providers], ids=lambda v: getattr(v, "key", v)
)
def test_diffusion_head_sample(benchmark, case, provider):
    with prepare(case) as prepared:
        benchmark(prepared.providers[provider]())


if __name__ == "__main__":
    harness.main(CASES, prepare)
