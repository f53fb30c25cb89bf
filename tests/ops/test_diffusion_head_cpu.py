"""The C++ path of diffusion_head_sample, against the definition in float64."""

import dataclasses
import itertools
import math
import sys

import pytest
import torch

from fastlatent import _native
from fastlatent.ops.diffusion_head_sample import (
    CPU_FEW_ROWS,
    HeadWeights,
    choose_path,
    diffusion_head_sample,
    modulation_chunks,
)
from fastlatent.ops.solver_step import R

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
INT8 = [False, True]
# (blocks, hidden, width, channels). 33 and 41: odd, below a multiple of 16 lanes and of 4 outputs at once. 40: whole
# vectors of 8 lanes but not of 16. 100 and 70: more than one cache line of outputs for each of 2 to 5 threads.
SIZES = [(2, 40, 100, 8), (1, 33, 41, 3), (3, 64, 70, 16)]
# (gated, layer norm, learned variance, noise)
FAMILIES = [
    (True, False, False, False),
    (False, True, True, True),
    (True, True, False, True),
    (False, False, True, True),
]
# (ways, batch): 1, 2, 3, 5 and 16 rows: one, less than the 4 (AVX2: 3) at once, one more, whole blocks.
ROWS = [(1, 1), (2, 1), (3, 1), (1, 5), (2, 8)]


def head(size, dtype, *, gated=True, layer_norm=False, learned=False, int8=False, seed=0):
    blocks, hidden, width, channels = size
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape, like):
        return torch.randn(shape, generator=generator) * like**-0.5

    up, out, modulations = width * (1 + gated), channels * (1 + learned), (3 * blocks + 2) * hidden
    tensors = {
        "input_weight": draw(hidden, channels, like=channels), "input_bias": draw(hidden, like=9),
        "modulation_weight": draw(modulations, hidden, like=9 * hidden), "modulation_bias": draw(modulations, like=9),
        "up_weight": draw(blocks, up, hidden, like=hidden), "up_bias": draw(blocks, up, like=9),
        "down_weight": draw(blocks, hidden, width, like=width), "down_bias": draw(blocks, hidden, like=9),
        "output_weight": draw(out, hidden, like=hidden), "output_bias": draw(out, like=9),
    }  # fmt: skip
    tensors = {name: tensor.to(dtype) if name.endswith("weight") else tensor for name, tensor in tensors.items()}
    if int8:
        for name in ("up", "down"):
            weight = tensors[f"{name}_weight"].float()
            scale = weight.abs().amax(-1) / 127
            tensors[f"{name}_weight"] = (weight / scale[..., None]).round().to(torch.int8)
            tensors[f"{name}_scale"] = scale
    return HeadWeights(**tensors, layer_norm=layer_norm)


def inputs(weights, ways, batch, *, steps=3, noise=True, seed=1):
    """All columns of the table random, so that every plane of the state is used; r = 1.5 clips some of the data."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator)

    table = draw(steps, 16) * 0.5
    table[:, R] = 1.5
    return [
        draw(4, batch, weights.channels),
        draw(ways, batch, weights.hidden_size).to(weights.dtype),
        draw(steps, weights.hidden_size).to(weights.dtype),
        table,
        draw(ways, batch),
        weights,
        draw(steps, batch, weights.channels) if noise else None,
    ]


def run(arguments, path):
    state = arguments[0].clone()
    diffusion_head_sample(state, *arguments[1:], path=path)
    return state


def exact(arguments):
    """The definition with everything in float64; int8 weights multiplied out."""
    weights = arguments[5]
    wide = {field.name: getattr(weights, field.name) for field in dataclasses.fields(weights)}
    for name in ("up", "down"):
        scale = wide.pop(f"{name}_scale")
        if scale is not None:
            wide[f"{name}_weight"] = wide[f"{name}_weight"].double() * scale.double()[..., None]
    wide = {name: value.double() if isinstance(value, torch.Tensor) else value for name, value in wide.items()}
    return run(
        [HeadWeights(**wide) if v is weights else v if v is None else v.double() for v in arguments], "reference"
    )


def error(got, want):
    """Relative Frobenius error."""
    return float((got.double() - want).norm() / want.norm())


@pytest.fixture(params=[16, 8, 4])
def lanes(request, monkeypatch):
    """Every instruction set that this CPU has: a narrower CPU repeats its widest."""
    monkeypatch.setattr(sys.modules["fastlatent.ops.diffusion_head_sample"], "CPU_LANES", request.param)


@pytest.mark.parametrize("int8", INT8)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_no_less_accurate_than_torch(size, dtype, int8, lanes, native_calls):
    """Errors of all cases together: with 3 channels a single one is luck. A wrong one would outweigh them all."""
    got, torchs = [], []
    for seed, (rows, (gated, layer_norm, learned, noise)) in enumerate(itertools.product(ROWS, FAMILIES)):
        weights = head(size, dtype, gated=gated, layer_norm=layer_norm, learned=learned, int8=int8, seed=seed)
        arguments = inputs(weights, *rows, noise=noise, seed=seed)
        want = exact(arguments)
        got.append(error(run(arguments, "few_rows"), want))
        torchs.append(error(run(arguments, "reference"), want))
    assert math.hypot(*got) <= 1.5 * math.hypot(*torchs)
    assert [call[:2] for call in native_calls] == [("cpu", "diffusion_head_sample")] * len(got)


@pytest.mark.parametrize("int8", INT8)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_activations(dtype, int8):
    """Activations are not rounded to the weights' dtype: what is left is the rounding of the modulations."""
    arguments = inputs(head((2, 64, 96, 16), dtype, int8=int8), 2, 4)
    want = exact(arguments)
    assert error(run(arguments, "few_rows"), want) < 0.9 * error(run(arguments, "reference"), want)


@pytest.mark.parametrize("int8", INT8)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_same_bits_for_any_threads(size, dtype, int8, lanes):
    """7 threads: more than there are cache lines of outputs, so some have no work. And the same bits again."""
    arguments = inputs(head(size, dtype, int8=int8), 2, 3)
    before = torch.get_num_threads()
    results = []
    try:
        # The modulations come from torch, which may round otherwise for another number of threads.
        chunks = list(modulation_chunks(*arguments[1:3], arguments[5]))
        for threads in (1, 2, 3, 7, 2):
            torch.set_num_threads(threads)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(
                    sys.modules["fastlatent.ops.diffusion_head_sample"], "modulation_chunks", lambda *_: iter(chunks)
                )
                results.append(run(arguments, "few_rows"))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_do_not_depend_on_each_other(dtype):
    """Samples one by one give the bits of the batch: each sum's order is that of its own length."""
    weights = head(SIZES[0], dtype)
    arguments = inputs(weights, 2, 5)
    chunks = list(modulation_chunks(*arguments[1:3], weights))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules["fastlatent.ops.diffusion_head_sample"], "modulation_chunks", lambda *_: iter(chunks))
        together = run(arguments, "few_rows")
        for n in range(5):
            state, condition, embedding, table, guidance, _, noise = arguments
            one = [(begin, chunk[:, :, n : n + 1].contiguous()) for begin, chunk in chunks]
            patch.setattr(
                sys.modules["fastlatent.ops.diffusion_head_sample"], "modulation_chunks", lambda *_, one=one: iter(one)
            )
            sliced = [x[:, n : n + 1].contiguous() for x in (state, condition, guidance, noise)]
            alone = run([sliced[0], sliced[1], embedding, table, sliced[2], weights, sliced[3]], "few_rows")
            assert torch.equal(alone, together[:, n : n + 1])


def test_chunks_of_steps(monkeypatch, native_calls):
    """One step, and a workspace that holds two of five: tables and noise are those of the chunk."""
    weights = head(SIZES[0], torch.bfloat16)
    for steps, calls in ((1, 1), (5, 3)):
        arguments = inputs(weights, 2, 3, steps=steps)
        whole = run(arguments, "few_rows")
        step_bytes = 2 * 3 * len(weights.modulation_weight) * 2
        with monkeypatch.context() as patch:
            patch.setattr(sys.modules["fastlatent.ops.diffusion_head_sample"], "WORKSPACE_BYTES", 2 * step_bytes)
            native_calls.clear()
            # A product of fewer rows may round otherwise.
            torch.testing.assert_close(run(arguments, "few_rows"), whole, rtol=1e-2, atol=1e-2)
        assert len(native_calls) == calls


@pytest.mark.parametrize("name", ["input", "up", "down", "output", "modulation"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_weights_show(name, dtype):
    weights = head(SIZES[1], dtype)
    getattr(weights, f"{name}_weight").view(-1)[-1] = torch.nan
    arguments = inputs(weights, 2, 2)
    assert run(arguments, "few_rows")[0].isnan().any()
    assert torch.equal(run(arguments, "few_rows")[0].isnan(), run(arguments, "reference")[0].isnan())


def test_large_activations():
    """silu far outside the range of exp: x on one side, 0 on the other, no infinity times 0."""
    weights = head(SIZES[0], torch.float32)
    weights.up_bias.copy_(torch.linspace(-3e4, 3e4, weights.up_bias.numel()).view_as(weights.up_bias))
    arguments = inputs(weights, 1, 2, steps=1)
    torch.testing.assert_close(run(arguments, "few_rows").double(), exact(arguments), rtol=1e-4, atol=1e-4)


def test_empty_batch(native_calls):
    assert run(inputs(head(SIZES[0], torch.bfloat16), 2, 0), "few_rows").shape == (4, 0, 8)


@pytest.mark.parametrize("int8", INT8)
@pytest.mark.parametrize("dtype", DTYPES)
def test_auto_takes_it_for_few_rows(dtype, int8, native_calls):
    weights = head(SIZES[0], dtype, int8=int8)
    limit = CPU_FEW_ROWS[torch.int8 if int8 else dtype]
    assert choose_path(1, weights) == choose_path(limit, weights) == "few_rows"
    assert choose_path(limit + 1, weights) == "many_rows"
    run(inputs(weights, 1, limit), "auto")
    assert [call[:2] for call in native_calls] == [("cpu", "diffusion_head_sample")]
    # Torch's products; the solver step is the reference's too.
    many = inputs(weights, 1, limit + 1)
    assert torch.equal(run(many, "auto"), run(many, "reference"))
    assert len(native_calls) == 1


def test_float64_stays_in_torch(native_calls):
    weights = head(SIZES[0], torch.float32)
    wide = {field.name: getattr(weights, field.name) for field in dataclasses.fields(weights)}
    weights = HeadWeights(**{k: v.double() if isinstance(v, torch.Tensor) else v for k, v in wide.items()})
    arguments = [weights if isinstance(v, HeadWeights) else v.double() for v in inputs(weights, 2, 1)]
    run(arguments, "auto")
    assert native_calls == []
    with pytest.raises(ValueError, match=r"float16 weights for path 'few_rows' on the CPU, got torch\.float64"):
        run(arguments, "few_rows")


def test_missing_library_is_an_error(monkeypatch):
    """Not a silent fallback to slow code; and the state is as it was."""
    monkeypatch.setattr(_native, "load", lambda backend: None)
    arguments = inputs(head(SIZES[0], torch.bfloat16), 2, 1)
    before = arguments[0].clone()
    with pytest.raises(RuntimeError, match=r"libfastlatent_cpu\.so"):
        diffusion_head_sample(*arguments)
    assert torch.equal(arguments[0], before)
