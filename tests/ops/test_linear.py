"""fastlatent.ops.linear against its definition in float64: few rows run in C++, everything else in torch."""

import pytest
import torch
import torch.nn.functional as F

from fastlatent import _native
from fastlatent.ops.linear import FEW_ROWS, linear, linear_reference, quantize_rows

HALVES = (torch.bfloat16, torch.float16)
DTYPES = (torch.float64, torch.float32, *HALVES)


def inputs(rows, k, n, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, k, generator=generator, dtype=torch.float64)
    weight = torch.randn(n, k, generator=generator, dtype=torch.float64) * k**-0.5
    return x.to(dtype), weight.to(dtype)


def error(got, want):
    return float((got.double() - want).norm() / want.norm())


@pytest.fixture
def native(monkeypatch):
    """The C++ calls that were made."""
    calls, original = [], _native.call
    monkeypatch.setattr(
        _native, "call", lambda backend, name, *args: calls.append(name) or original(backend, name, *args)
    )
    return calls


# 1: less than a vector; 31, 33: a tail beside whole vectors; 1024: a published width. 5 outputs: four at once, and one.
@pytest.mark.parametrize("k", [1, 31, 33, 1024])
@pytest.mark.parametrize("n", [1, 5, 64])
@pytest.mark.parametrize("dtype", DTYPES)
def test_error_is_that_of_plain_torch(k, n, dtype, native):
    for rows in (1, 2, 3, 5, 8):
        x, weight = inputs(rows, k, n, dtype)
        want = x.double() @ weight.double().T
        got, plain = linear(x, weight), F.linear(x, weight)
        assert got.dtype == dtype and got.shape == (rows, n)
        # One float32 rounding per term may be ordered otherwise; the half types round once at the end.
        assert error(got, want) <= 1.5 * error(plain, want) + 2e-7 * (dtype != torch.float64)
    assert len(native) == (5 if dtype == torch.float32 else 0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 3, FEW_ROWS, FEW_ROWS + 1])
def test_int8(dtype, rows, native):
    x, weight = inputs(rows, 96, 37, dtype)
    values, scale = quantize_rows(weight)
    want = x.double() @ (values.double() * scale.double()[:, None]).T
    rounding = {torch.float64: 1e-15, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 5e-3}[dtype]
    assert error(linear(x, values, scale=scale), want) <= rounding
    # What int8 itself costs: 127 steps to the largest of 96 normal numbers, an error of a 29th of a step each.
    assert error(linear(x, values, scale=scale), x.double() @ weight.double().T) <= 0.015
    assert len(native) == (2 if rows <= FEW_ROWS and dtype != torch.float64 else 0)


def test_quantize_rows():
    weight = torch.tensor([[1.0, -2.0, 0.5], [0.0, 0.0, 0.0]])
    values, scale = quantize_rows(weight)
    assert values.tolist() == [[64, -127, 32], [0, 0, 0]] and scale.tolist() == pytest.approx([2 / 127, 1])
    assert quantize_rows(weight.double())[1].dtype == torch.float64
    assert quantize_rows(torch.zeros(2, 3, 4))[1].shape == (2, 3)


def test_many_rows_are_torchs_own(native):
    x, weight = inputs(FEW_ROWS + 1, 32, 16, torch.float32)
    assert torch.equal(linear(x, weight), F.linear(x, weight)) and not native


def test_same_bits_for_any_number_of_threads():
    # 4 MiB of weight: enough for the kernel to start threads.
    x, weight = inputs(2, 1024, 1000, torch.float32)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append(linear(x, weight))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)


def test_rows_do_not_depend_on_each_other():
    x, weight = inputs(7, 100, 50, torch.float32)
    together = linear(x, weight)
    assert all(torch.equal(linear(x[i : i + 1], weight)[0], together[i]) for i in range(7))


def test_nan_and_zero_rows():
    x, weight = inputs(2, 64, 8, torch.float32)
    weight[3, 5] = torch.nan
    assert linear(x, weight).isnan().nonzero()[:, 1].unique().tolist() == [3]
    assert linear(x[:0], weight).shape == (0, 8)
    assert linear(x, weight[:0]).shape == (2, 0)


def test_strided_inputs():
    x, weight = inputs(4, 64, 8, torch.float32)
    got = linear(x.T.contiguous().T, weight.T.contiguous().T)
    assert torch.equal(got, linear(x, weight))


@pytest.mark.parametrize("dtype", DTYPES)
def test_registration(dtype):
    x, weight = inputs(2, 16, 8, dtype)
    torch.library.opcheck(torch.ops.fastlatent.linear.default, (x, weight, None))
    torch.library.opcheck(torch.ops.fastlatent.linear.default, (x, *quantize_rows(weight)))


def test_compiles_whole():
    x, weight = inputs(2, 16, 8, torch.float32)
    values, scale = quantize_rows(weight)
    compiled = torch.compile(
        lambda x: linear(x, weight) + linear(x, values, scale=scale), fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(x), linear(x, weight) + linear(x, values, scale=scale))


def test_missing_library_is_an_error(monkeypatch):
    monkeypatch.setattr(_native, "load", lambda backend: None)
    with pytest.raises(RuntimeError, match=r"libfastlatent_cpu\.so"):
        linear(*inputs(2, 16, 8, torch.float32))


X, W = inputs(2, 16, 8, torch.float32)
INT8 = torch.zeros(8, 16, dtype=torch.int8)
WRONG = {
    "rank": (X[0], W, None, r"x \[R, K\]"),
    "width": (X[:, :8], W, None, r"x \[R, K\]"),
    "device": (X, W.to("meta"), None, r"on one device"),
    "dtype": (X, W.double(), None, r"a weight of x's dtype"),
    "int8 without scale": (X, INT8, None, r"int8 with a scale"),
    "scale without int8": (X, W, torch.ones(8), r"int8 weight with scale \[8\]"),
    "scale shape": (X, INT8, torch.ones(16), r"scale \[8\] of torch\.float32, got .*\[16\]"),
    "scale dtype": (X, INT8, torch.ones(8).double(), r"scale \[8\] of torch\.float32, got .*float64"),
    "gradient": (X.clone().requires_grad_(), W, None, r"without gradient"),
}


@pytest.mark.parametrize("case", WRONG)
def test_rejects(case):
    x, weight, scale, message = WRONG[case]
    with pytest.raises(ValueError, match=f"^linear: expected .*{message}"):
        linear(x, weight, scale=scale)


def test_reference_is_the_definition():
    x, weight = inputs(2, 16, 8, torch.float64)
    values, scale = quantize_rows(weight)
    assert error(linear_reference(x, values, scale), x @ (values.double() * scale[:, None]).T) <= 1e-15
