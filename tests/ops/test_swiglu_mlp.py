import pytest
import torch

from fastlatent.ops.swiglu_mlp import swiglu_mlp, swiglu_mlp_reference

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.needs_cuda)]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
# (rows, hidden, width). 1 and 17: padded tiles. 65 and 129: one more than two lines of the table of tiles. 48 and 80:
# no multiples of a depth of 32 or 64. No rows.
SHAPES = [(1, 48, 80), (17, 32, 33), (65, 48, 80), (129, 16, 48), (0, 16, 16)]


def inputs(shape, dtype, *, gated=True, residual=True, gate=True, device="cpu"):
    """gate is a slice of a table [R, 3H], as a head's modulations are."""
    rows, hidden, width = shape
    up = 2 * width if gated else width
    wide = torch.promote_types(dtype, torch.float32)
    generator = torch.Generator().manual_seed(0)

    def draw(*size):
        return torch.randn(size, generator=generator, dtype=torch.float64)

    tensors = [
        draw(rows, hidden).to(dtype), (draw(up, hidden) * hidden**-0.5).to(dtype), draw(up).to(wide),
        (draw(hidden, width) * width**-0.5).to(dtype), draw(hidden).to(wide),
        draw(rows, hidden).to(wide) if residual else None,
        draw(rows, 3 * hidden).to(dtype) if gate else None,
    ]  # fmt: skip
    tensors = [None if tensor is None else tensor.to(device) for tensor in tensors]
    if gate:
        tensors[-1] = tensors[-1][:, hidden : 2 * hidden]
    return tensors


def exact(x, up_weight, up_bias, down_weight, down_bias, residual, gate):
    tensors = (x, up_weight, up_bias, down_weight, down_bias, residual, gate)
    x, up, up_bias, down, down_bias, residual, gate = (None if t is None else t.double().cpu() for t in tensors)
    inner, width = x @ up.T + up_bias, down.shape[1]
    first = inner[:, :width]
    first = first * torch.sigmoid(first)
    out = (first if len(up) == width else first * inner[:, width:]) @ down.T + down_bias
    out = out if gate is None else out * gate
    return out if residual is None else out + residual


def error(got, want):
    return float((got.double().cpu() - want).norm() / want.norm().clamp(min=1e-300))


def assert_as_good_as_torch(got, arguments):
    want, plain = exact(*arguments), swiglu_mlp_reference(*arguments)
    assert got.shape == want.shape and got.dtype == plain.dtype
    # A rounding where torch's sums are exact by luck.
    assert error(got, want) <= max(1.5 * error(plain, want), torch.finfo(got.dtype).eps)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("residual, gate", [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_no_less_accurate_than_torch(shape, dtype, gated, residual, gate, device):
    arguments = inputs(shape, dtype, gated=gated, residual=residual, gate=gate, device=device)
    assert_as_good_as_torch(swiglu_mlp(*arguments), arguments)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_triton_kernel(shape, dtype, gated):
    """The Triton kernel itself, on any machine: interpreted where there is no GPU."""
    pytest.importorskip("triton")
    from fastlatent.kernels.swiglu_mlp import swiglu_mlp_triton

    device = "cuda" if torch.cuda.is_available() else "cpu"
    for residual, gate in ((False, False), (True, False), (True, True)):
        arguments = inputs(shape, dtype, gated=gated, residual=residual, gate=gate, device=device)
        got = torch.full_like(arguments[0] if arguments[5] is None else arguments[5], torch.nan)
        swiglu_mlp_triton(*arguments, got)
        assert_as_good_as_torch(got, arguments)


@pytest.mark.parametrize("up", [False, True])
@pytest.mark.parametrize("rows, line", [(1, 0), (64, 0), (65, 1), (128, 1), (129, 2), (512, 2), (513, 3), (10**6, 3)])
def test_tiles_by_rows(rows, line, up):
    pytest.importorskip("triton")
    from fastlatent.kernels.swiglu_mlp import TILES, TILES_FLOAT32, _tile

    assert list(_tile(rows, up, False)[0].values()) == [TILES[line][i] for i in (1, 2 if up else 3, 4)]
    assert _tile(rows, up, True)[0]["BLOCK_M"] == TILES_FLOAT32[0][1]


@pytest.mark.parametrize("line", [2, 3])
def test_tiles_of_many_rows(line, monkeypatch):
    """The lines of more rows than the interpreter is asked for elsewhere, with few."""
    pytest.importorskip("triton")
    from fastlatent.kernels import swiglu_mlp as kernels

    monkeypatch.setattr(kernels, "TILES", ((None, *kernels.TILES[line][1:]),))
    arguments = inputs((130, 80, 144), torch.bfloat16, device="cuda" if torch.cuda.is_available() else "cpu")
    got = torch.full_like(arguments[5], torch.nan)
    kernels.swiglu_mlp_triton(*arguments, got)
    assert_as_good_as_torch(got, arguments)


@pytest.mark.needs_cuda
def test_cuda_runs_triton(monkeypatch):
    from fastlatent.kernels import swiglu_mlp as kernels

    launched, original = [], kernels.swiglu_mlp_triton
    monkeypatch.setattr(kernels, "swiglu_mlp_triton", lambda *args: launched.append(1) or original(*args))
    swiglu_mlp(*inputs((3, 48, 80), torch.bfloat16, device="cuda"))
    assert launched == [1]


def test_by_hand():
    # up: 2x + 1 = 5 and 3x = 6; silu(5) * 6; down: times 10, plus 1; gate 0.5; residual 100.
    one = torch.ones(1)
    up_weight, up_bias = torch.tensor([[2.0], [3.0]]), torch.tensor([1.0, 0.0])
    inputs = (torch.tensor([[2.0]]), up_weight, up_bias, torch.tensor([[10.0]]), one)
    inner = 5.0 / (1 + 2.718281828459045**-5) * 6
    got = swiglu_mlp(*inputs, residual=torch.tensor([[100.0]]), gate=torch.tensor([[0.5]]))
    torch.testing.assert_close(got, torch.tensor([[100 + 0.5 * (10 * inner + 1)]]))
    torch.testing.assert_close(swiglu_mlp(*inputs), torch.tensor([[10 * inner + 1]]))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_registration(dtype, device):
    operator = torch.ops.fastlatent.swiglu_mlp.default
    torch.compiler.reset()  # each dtype and optional argument is a compilation of its own, of at most 8
    compiled = torch.compile(swiglu_mlp, fullgraph=True, backend="aot_eager")
    for residual, gate in ((False, False), (True, False), (True, True)):
        arguments = inputs((3, 16, 32), dtype, residual=residual, gate=gate, device=device)
        torch.library.opcheck(operator, tuple(arguments))
        assert torch.equal(compiled(*arguments), swiglu_mlp(*arguments))
    for key in ("CompositeExplicitAutograd", "CUDA"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key("fastlatent::swiglu_mlp", key)


NAMES = ("x", "up_weight", "up_bias", "down_weight", "down_bias", "residual", "gate")
WRONG = {
    "x rank": ("x", torch.zeros(48), r"x \[R, H\]"),
    "x dtype": ("x", torch.zeros(3, 48, dtype=torch.int32), r"x \[R, H\] of torch\.bfloat16.* torch\.int32"),
    "x layout": ("x", torch.zeros(48, 3).bfloat16().mT, r"a contiguous x, got strides"),
    "x gradient": ("x", torch.zeros(3, 48).bfloat16().requires_grad_(), r"got x that requires grad"),
    "up rows": ("up_weight", torch.zeros(81, 48).bfloat16(), r"up_weight \[F or 2F, H\].* got 81 and F 80"),
    "up dtype": ("up_weight", torch.zeros(160, 48), r"up_weight \[160, 48\] of torch\.bfloat16"),
    "up bias dtype": ("up_bias", torch.zeros(160).bfloat16(), r"up_bias \[160\] of torch\.float32"),
    "down shape": ("down_weight", torch.zeros(49, 80).bfloat16(), r"down_weight \[48, 80\]"),
    "down bias shape": ("down_bias", torch.zeros(80), r"down_bias \[48\]"),
    "residual dtype": ("residual", torch.zeros(3, 48).bfloat16(), r"residual \[3, 48\] of torch\.float32"),
    "residual device": ("residual", torch.zeros(3, 48, device="meta"), r"residual .* on cpu, got .*meta"),
    "no residual": ("residual", None, r"a residual with a gate"),
    "gate layout": ("gate", torch.zeros(48, 3).bfloat16().mT, r"adjacent elements within a row of gate"),
    "gate rows": ("gate", torch.zeros(1, 48).bfloat16(), r"gate \[3, 48\]"),
}


@pytest.mark.parametrize("case", WRONG)
def test_rejects(case):
    name, wrong, message = WRONG[case]
    arguments = dict(zip(NAMES, inputs((3, 48, 80), torch.bfloat16), strict=True)) | {name: wrong}
    with pytest.raises(ValueError, match=f"^swiglu_mlp: expected .*{message}"):
        swiglu_mlp(**arguments)
