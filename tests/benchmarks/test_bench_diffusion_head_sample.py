"""benchmarks/bench_diffusion_head_sample.py: every provider makes the same token, what int8 weights cost, and when
the rows are made."""

import importlib.util
import sys
from dataclasses import fields, replace
from importlib.machinery import SourceFileLoader
from pathlib import Path

import bench_diffusion_head_sample as bench
import pytest
import torch

from fastlatent.ops.diffusion_head_sample import HeadWeights, head_reference, modulation_chunks

# The three kinds of published heads, small. 5 steps: all orders of DPM-Solver++ occur. One block: less to compile.
TINY = {
    "rms": bench.Head(64, 96, 2, 4, "dpmsolver++", 5, eps=1e-5),
    "variance": bench.Head(64, 64, 1, 4, "ancestral", 6, **bench.MLP),
    "flow": bench.Head(48, 48, 3, 8, "flow_sde", 4, **bench.MLP),
}


@pytest.mark.parametrize(
    ("head", "compiled", "device"),
    [
        *((head, False, "cpu") for head in TINY),
        *(pytest.param(head, False, "cuda", marks=pytest.mark.needs_cuda) for head in TINY),
        # Through Inductor, which takes 10 s: ahead of a measurement on a GPU, and in `make soak`.
        pytest.param("variance", True, "cpu", marks=pytest.mark.soak),
        pytest.param("variance", True, "cuda", marks=pytest.mark.needs_cuda),
    ],
)
def test_providers_agree(monkeypatch, head, compiled, device):
    monkeypatch.setattr(bench, "HEADS", TINY)
    if not compiled:  # the same loops, hoisted and with scalars on the device, in eager mode
        monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    case = bench.make_case(head, 6, "float32", device)
    # 0.1, not 0.02: modulations must show in the result.
    with bench.prepare(case, std=0.1) as prepared:
        want = prepared.providers["plain-eager"]()().clone()
        assert want.abs().max() > 0.1
        for name in set(case.providers) - {"plain-eager", "fastlatent-int8", "floor"}:
            error = float((prepared.providers[name]()() - want).abs().max() / want.abs().max())
            assert error < 1e-4, f"{name}: {error}"


def as_float64(weights: HeadWeights) -> HeadWeights:
    tensors = {field.name: getattr(weights, field.name) for field in fields(weights)[:-4]}
    return replace(weights, **{name: tensor.double() for name, tensor in tensors.items()})


def test_int8_error(capsys):
    """Relative errors of LatentLM-Base, 2 rows, with bfloat16 and with int8 FFN weights, against float64."""
    case = bench.make_case("LatentLM-Base", 2, "bfloat16", "cpu")
    problem = bench.make_problem(case, std=0.02)
    weights, (start, condition, t_embedding, _) = problem.weights, problem.inputs
    exact = as_float64(weights)

    def errors(weights: HeadWeights) -> tuple[float, float]:
        """Of one evaluation of the head, and of the token after all steps."""
        predictions = []
        for used in (exact, weights):
            ways = condition.to(used.dtype).unflatten(0, (bench.WAYS, 1))
            _, modulations = next(modulation_chunks(ways, t_embedding[:1].to(used.dtype), used))
            predictions.append(head_reference(start.to(used.state_dtype), modulations[0], used).double())
        wide = replace(problem, table=problem.table.double(), guidance=problem.guidance.double())
        inputs = (start.double(), condition.double(), t_embedding.double(), None)
        want = bench.our_sample(wide, exact, "reference")(*inputs)
        token = bench.our_sample(problem, weights, "auto")(*problem.inputs).double()
        return float((predictions[1] - predictions[0]).norm() / predictions[0].norm()), float(
            (token - want).norm() / want.norm()
        )

    with torch.inference_mode():
        plain, int8 = errors(weights), errors(bench.int8_weights(weights))
    with capsys.disabled():
        print(f"\nbfloat16: evaluation {plain[0]:.2%}, token {plain[1]:.2%}; int8: {int8[0]:.2%}, {int8[1]:.2%}")
    assert int8[0] < 0.02 and int8[1] < 0.02


def test_bytes_and_flops():
    """Medium as published: 37.8 M weights that every step reads, 11.5 M of modulations."""
    head = bench.HEADS["LatentLM-Medium"]
    assert head.step_weights == 3 * 3 * 1024 * 4096 + 2 * 16 * 1024 and head.modulation_weights == 11 * 1024**2
    for name, head in bench.HEADS.items():
        with torch.device("meta"):
            weights = bench.random_weights(head, torch.bfloat16, "meta", 0.02)
        matrices = {field.name: getattr(weights, field.name) for field in fields(weights) if "weight" in field.name}
        assert matrices.pop("modulation_weight").numel() == head.modulation_weights, name
        assert sum(matrix.numel() for matrix in matrices.values()) == head.step_weights, name


def test_gpu_validate_measures_medium_first_and_the_other_heads_last(monkeypatch):
    path = Path(__file__).parents[2] / "tools" / "gpu_validate"
    loader = SourceFileLoader("gpu_validate", str(path))
    tool = importlib.util.module_from_spec(importlib.util.spec_from_loader("gpu_validate", loader))
    monkeypatch.setitem(sys.modules, "gpu_validate", tool)  # dataclasses look their module up
    loader.exec_module(tool)
    program = "benchmarks/bench_diffusion_head_sample.py"
    other = bench.harness.Case("other", {}, "none", "cuda", ("ours",))
    monkeypatch.setattr(tool, "announced", lambda name, env: bench.make_cases("cuda") if name == program else [other])
    tasks = tool.row_tasks({}, True, {})
    assert [task.name for task in tasks[:2]] == [tool.CALIBRATE, program]
    assert [(case.sizes["head"], case.sizes["rows"]) for case in tasks[1].cases] == [
        ("LatentLM-Medium", rows) for rows in (2, 16, 128, 512)
    ]  # fmt: skip
    rest = [task.name for task in tasks[2:]]
    heads = rest.count(program)
    assert heads == 5 and rest[-heads:] == [program] * heads and program not in rest[:-heads]
