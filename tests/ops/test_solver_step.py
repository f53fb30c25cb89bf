import itertools
import platform

import numpy as np
import pytest
import torch

from fastlatent import _native
from fastlatent.ops.solver_step import BASE, ROW, B, Q, R, solver_step, solver_step_reference

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.needs_cuda)]
STATE_DTYPES = [torch.float32, torch.float64]
OUTPUT_DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# (ways, batch, channels). 257: one more than the C++ kernel's block of 256. 33 x 16: one row more than
# Triton's tile of 512 elements. 513: one channel more than that tile.
SHAPES = [(1, 1, 1), (2, 3, 17), (3, 33, 16), (2, 2, 257), (1, 2, 513)]


def inputs(shape, state_dtype, output_dtype, *, learned=False, noise=True, base=0.0, device="cpu", seed=0):
    """Every column random, so that a swapped column shows; r = 1.5 clips about a third of the data."""
    ways, batch, channels = shape
    generator = torch.Generator().manual_seed(seed)

    def draw(*size):
        return torch.randn(size, generator=generator, dtype=torch.float64)

    row = draw(ROW)
    row[R], row[BASE] = 1.5, base
    return (
        draw(4, batch, channels).to(device, state_dtype),
        draw(ways, batch, channels * (2 if learned else 1)).to(device, output_dtype),
        draw(ways, batch).to(device, state_dtype),
        row.to(device, state_dtype),
        draw(batch, channels).to(device, state_dtype) if noise else None,
    )


def extended_precision(state, output, guidance, row, noise):
    """The formula again in numpy's long double: independent of the op, exact enough to judge float64 by."""
    wide = [None if v is None else v.double().cpu().numpy().astype(np.longdouble) for v in (state, output, guidance)]
    (x, d1, d2, x_base), out, weights = wide
    p, q, r, a, f, b, c, d, e, s, l0, l1, base, *_ = row.double().cpu().numpy().astype(np.longdouble)
    channels = x.shape[1]
    o = (weights[:, :, None] * out[:, :, :channels]).sum(axis=0)
    data = np.clip(p * x + q * o, -r, r)
    start = x if base else x_base
    following = a * x + f * start + b * data + c * d1 + d * d2 + e * o
    if noise is not None:
        z = noise.double().cpu().numpy().astype(np.longdouble)
        if out.shape[2] == 2 * channels:
            z = z * np.exp((l0 + l1 * (out[0, :, channels:] + 1) / 2) / 2)
        following = following + s * z
    return np.stack([following, data, d1, start])


def error(state, exact):
    """Relative Frobenius error."""
    difference = state.double().cpu().numpy().astype(np.longdouble) - exact
    return float(np.linalg.norm(difference.astype(np.float64)) / np.linalg.norm(exact.astype(np.float64)))


def allowed(want, exact):
    """1.5 times torch's error; a rounding of the result where few elements let torch be exact by luck."""
    return max(1.5 * error(want, exact), torch.finfo(want.dtype).eps)


def stepped(function, arguments):
    state = arguments[0].clone()
    assert function(state, *arguments[1:]) is None
    return state


def test_reference_by_hand():
    # x=2, D1=3, D2=5, x_base=7; outputs 1 and 3 guided 1.5 and -0.5 give o = 0.
    state = torch.tensor([2.0, 3.0, 5.0, 7.0]).reshape(4, 1, 1)
    output, guidance = torch.tensor([1.0, 3.0]).reshape(2, 1, 1), torch.tensor([[1.5], [-0.5]])
    row = torch.tensor([10.0, 1.0, 4.0, 1.0, 100.0, 10.0, 1000.0, 1e4, 9.0, 0.5, 0.0, 0.0, 0.0, 999.0, 0.0, 0.0])
    solver_step_reference(state, output, guidance, row, torch.tensor([[6.0]]))
    # data = clip(20, -4, 4) = 4; x' = 2 + 700 + 40 + 3000 + 50000 + 0 + 3.
    assert state.flatten().tolist() == [53745.0, 4.0, 3.0, 7.0]


@pytest.mark.parametrize("base", [0.0, 1.0])
@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("noise", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_reference_is_the_formula(shape, noise, learned, base):
    arguments = inputs(shape, torch.float64, torch.float64, learned=learned, noise=noise, base=base)
    assert error(stepped(solver_step_reference, arguments), extended_precision(*arguments)) < 1e-15


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("output_dtype", OUTPUT_DTYPES)
@pytest.mark.parametrize("state_dtype", STATE_DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_no_less_accurate_than_torch(shape, state_dtype, output_dtype, learned, device, native_calls):
    for case, (noise, base) in enumerate([(False, 0.0), (False, 1.0), (True, 0.0), (True, 1.0)]):
        arguments = inputs(
            shape,
            state_dtype,
            output_dtype,
            learned=learned,
            noise=noise,
            base=base,
            device=device,
            seed=case,
        )
        exact = extended_precision(*arguments)
        want, got = stepped(solver_step_reference, arguments), stepped(solver_step, arguments)
        assert error(got, exact) <= allowed(want, exact)
        if not (noise and learned) and (device == "cuda" or platform.machine() == "x86_64"):
            # Same operations in the same order, none fused. exp differs between libraries, and other CPUs'
            # compilers may fuse.
            assert torch.equal(got, want)
    assert [call[:2] for call in native_calls] == ([("cpu", "solver_step")] * 4 if device == "cpu" else [])


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("output_dtype", OUTPUT_DTYPES)
@pytest.mark.parametrize("state_dtype", STATE_DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_triton_kernel(shape, state_dtype, output_dtype, learned):
    """The Triton kernel itself, on any machine: interpreted where there is no GPU."""
    pytest.importorskip("triton")
    from fastlatent.kernels.solver_step import solver_step_kernel, solver_step_triton

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        assert type(solver_step_kernel).__name__ == "InterpretedFunction"
    for case, (noise, base) in enumerate([(False, 1.0), (True, 0.0)]):
        arguments = inputs(
            shape,
            state_dtype,
            output_dtype,
            learned=learned,
            noise=noise,
            base=base,
            device=device,
            seed=case,
        )
        exact = extended_precision(*arguments)
        want, got = stepped(solver_step_reference, arguments), stepped(solver_step_triton, arguments)
        assert error(got, exact) <= allowed(want, exact)
        if not (noise and learned):
            assert torch.equal(got, want)


@pytest.mark.needs_cuda
def test_cuda_runs_triton(monkeypatch):
    from fastlatent.kernels import solver_step as kernels

    launched, original = [], kernels.solver_step_triton
    monkeypatch.setattr(kernels, "solver_step_triton", lambda *args: launched.append(1) or original(*args))
    solver_step(*inputs((2, 3, 17), torch.float32, torch.bfloat16, device="cuda"))
    assert launched == [1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_half_value_is_read_exactly(dtype):
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int16)  # subnormals, infinities and NaNs too
    values = bits.view(dtype).reshape(1, 256, 256)
    row = torch.zeros(ROW)
    row[Q], row[R], row[B] = 1.0, torch.inf, 1.0
    state = torch.zeros(4, 256, 256)
    solver_step(state, values, torch.ones(1, 256), row)
    torch.testing.assert_close(state[1], values[0].float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("device", DEVICES)
def test_nan_and_inf_pass_the_clip(device):
    """A broken network must show, whatever r is; and r = inf does not clip."""
    for r in (1.0, torch.inf):
        row = torch.zeros(ROW)
        row[Q], row[R] = 1.0, r
        state = torch.zeros(4, 1, 4, device=device)
        output = torch.tensor([[[torch.nan, torch.inf, -torch.inf, 1e30]]], device=device)
        solver_step(state, output, torch.ones(1, 1, device=device), row.to(device))
        want = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e30]).clamp(-r, r)
        torch.testing.assert_close(state[1, 0].cpu(), want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("device", DEVICES)
def test_empty_batch(device):
    arguments = inputs((2, 0, 16), torch.float32, torch.bfloat16, device=device)
    assert stepped(solver_step, arguments).shape == (4, 0, 16)
    assert stepped(solver_step_reference, arguments).shape == (4, 0, 16)


@pytest.mark.parametrize("device", DEVICES)
def test_strided_inputs(device):
    """Broadcast guidance, an output in another memory order, a column of a table, every second noise."""
    state, output, guidance, row, noise = inputs((2, 5, 16), torch.float32, torch.bfloat16, device=device)
    strided = (
        output.transpose(0, 2).contiguous().transpose(0, 2),
        guidance[:, :1].expand(2, 5),
        row[:, None].expand(ROW, 3).contiguous()[:, 1],
        torch.stack((noise, noise), dim=-1)[..., 0],
    )
    assert not any(tensor.is_contiguous() for tensor in strided)
    want, got = state.clone(), state.clone()
    solver_step_reference(want, *(tensor.contiguous() for tensor in strided))
    solver_step(got, *strided)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


# (ways, learned variance, noise). Without either optional part, and with both; each by itself for one pair of dtypes.
PARTS = [(1, False, False), (3, True, True)]
ONE_PART = [(2, False, True), (2, True, False)]
OTHER_PARTS = [parts for parts in itertools.product((1, 2, 3), (False, True), (False, True)) if parts not in PARTS]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("output_dtype", OUTPUT_DTYPES)
@pytest.mark.parametrize("state_dtype", STATE_DTYPES)
@pytest.mark.parametrize("parts", [PARTS, pytest.param(OTHER_PARTS, marks=pytest.mark.soak)], ids=["two", "others"])
def test_registration(parts, state_dtype, output_dtype, device):
    """The schema's mutation, the fake and tracing."""
    for ways, learned, noise in parts:
        arguments = inputs((ways, 2, 3), state_dtype, output_dtype, learned=learned, noise=noise, device=device)
        torch.library.opcheck(torch.ops.fastlatent.solver_step.default, arguments)


@pytest.mark.parametrize(("ways", "learned", "noise"), ONE_PART)
def test_registration_of_one_optional_part(ways, learned, noise):
    arguments = inputs((ways, 2, 3), torch.float32, torch.bfloat16, learned=learned, noise=noise)
    torch.library.opcheck(torch.ops.fastlatent.solver_step.default, arguments)


@pytest.mark.parametrize("device", DEVICES)
def test_compiles_whole(device):
    """The argument checks must not break the graph of a compiled sampling loop."""
    arguments = inputs((2, 3, 16), torch.float32, torch.bfloat16, device=device)
    compiled = torch.compile(solver_step, fullgraph=True, backend="aot_eager")
    assert torch.equal(stepped(compiled, arguments), stepped(solver_step, arguments))


def test_other_devices_use_the_reference():
    arguments = inputs((2, 3, 16), torch.float32, torch.bfloat16, device="meta")
    solver_step(*arguments)
    keys = ("CompositeExplicitAutograd", "CPU", "CUDA")
    assert all(torch._C._dispatch_has_kernel_for_dispatch_key("fastlatent::solver_step", key) for key in keys)


def test_missing_library_is_an_error(monkeypatch):
    """Not a silent fallback to slow code; and the state is as it was."""
    monkeypatch.setattr(_native, "load", lambda backend: None)
    arguments = inputs((2, 3, 16), torch.float32, torch.bfloat16)
    before = arguments[0].clone()
    with pytest.raises(RuntimeError, match=r"libfastlatent_cpu\.so"):
        solver_step(*arguments)
    assert torch.equal(arguments[0], before)


STATE, OUTPUT, GUIDANCE, ROW_ARGUMENT, NOISE = range(5)
WRONG = {
    "state rank": (STATE, torch.zeros(4, 48), r"state \[4, B, C\]"),
    "state planes": (STATE, torch.zeros(3, 3, 16), r"state \[4, B, C\]"),
    "state dtype": (STATE, torch.zeros(4, 3, 16, dtype=torch.bfloat16), r"torch\.float32 or torch\.float64"),
    "state layout": (STATE, torch.zeros(4, 16, 3).mT, r"contiguous state, got .*strides"),
    "state gradient": (STATE, torch.zeros(4, 3, 16, requires_grad=True), r"got state that requires grad"),
    "output rank": (OUTPUT, torch.zeros(3, 16), r"output \[W >= 1, 3, 16 or 32\]"),
    "no ways": (OUTPUT, torch.zeros(0, 3, 16), r"output \[W >= 1, 3, 16 or 32\]"),
    "output batch": (OUTPUT, torch.zeros(2, 4, 16), r"output \[W >= 1, 3, 16 or 32\]"),
    "output channels": (OUTPUT, torch.zeros(2, 3, 48), r"output \[W >= 1, 3, 16 or 32\]"),
    "output dtype": (OUTPUT, torch.zeros(2, 3, 16, dtype=torch.int32), r"float16, got .*torch\.int32"),
    "output device": (OUTPUT, torch.zeros(2, 3, 16, device="meta"), r"output on cpu like state, got .*meta"),
    "output gradient": (OUTPUT, torch.zeros(2, 3, 16, requires_grad=True), r"got output that requires grad"),
    "guidance shape": (GUIDANCE, torch.zeros(3, 3), r"guidance \[2, 3\] of torch\.float32"),
    "guidance dtype": (GUIDANCE, torch.zeros(2, 3).double(), r"guidance .* got .*torch\.float64"),
    "row length": (ROW_ARGUMENT, torch.zeros(14), r"row \[16\] of torch\.float32"),
    "row dtype": (ROW_ARGUMENT, torch.zeros(16).double(), r"row .* got .*torch\.float64"),
    "noise shape": (NOISE, torch.zeros(3, 32), r"noise \[3, 16\] of torch\.float32"),
    "noise dtype": (NOISE, torch.zeros(3, 16).bfloat16(), r"noise .* got .*torch\.bfloat16"),
    "noise device": (NOISE, torch.zeros(3, 16, device="meta"), r"noise on cpu like state, got .*meta"),
}


@pytest.mark.parametrize("case", WRONG)
def test_rejects(case):
    position, wrong, message = WRONG[case]
    arguments = list(inputs((2, 3, 16), torch.float32, torch.bfloat16))
    arguments[position] = wrong
    with pytest.raises(ValueError, match=f"^solver_step: expected .*{message}"):
        solver_step(*arguments)


def test_compiles_for_hopper(hopper):
    """Ahead of time and without a GPU: whole 16-byte accesses, nothing fused. tools/kernel_table watches the rest."""
    bf16, learned = "fp32 state, bf16 output, 16 -> 16", "fp32 state, bf16 output, 16 -> 32"
    for row in hopper(
        "solver_step", bf16, learned, "fp64 state, fp64 output, 16 -> 32", "fp32 state, fp32 output, 1 -> 2"
    ):
        assert row["spilled"] == 0, row
        if "16 ->" in row["case"]:
            assert row["sass"]["LDG.128"] >= 5, row  # four planes of the state and the noise
            assert row["sass"]["STG.128"] >= 4, row
        if row["case"].startswith("fp32 state, bf16 output"):
            # 2048 threads share an SM's 65536 registers: 64 each keep half of them there.
            assert row["registers"] <= 64, row
        # The exponential alone may be fused, and is not in float32.
        assert row["sass"]["FFMA"] == 0, row
