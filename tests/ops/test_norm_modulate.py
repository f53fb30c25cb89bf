import pytest
import torch

from fastlatent.ops.norm_modulate import MAX_HIDDEN, norm_modulate, norm_modulate_reference

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.needs_cuda)]
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
# (rows, hidden). 1: the smallest. 48: a padded block. 513: one more than the elements of one warp. No rows.
SHAPES = [(1, 1), (3, 48), (2, 513), (5, 64), (0, 16)]


def inputs(shape, dtype, *, device="cpu", offset=0.0):
    """shift and scale are slices of a table [R, 3H], as a head's modulations are."""
    generator = torch.Generator().manual_seed(0)
    wide = torch.promote_types(dtype, torch.float32)
    x = torch.randn(shape, generator=generator, dtype=torch.float64) * 3 + offset
    table = torch.randn(shape[0], 3 * shape[1], generator=generator, dtype=torch.float64).to(device, dtype)
    shift, scale, _ = table.split(shape[1], dim=1)
    return x.to(device, wide), shift, scale


def exact(x, shift, scale, layer_norm, eps):
    x, shift, scale = x.double().cpu(), shift.double().cpu(), scale.double().cpu()
    x = x - x.mean(-1, keepdim=True) if layer_norm else x
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * (1 + scale) + shift


def error(got, want):
    return float((got.double().cpu() - want).norm() / want.norm().clamp(min=1e-300))


def assert_as_good_as_torch(got, arguments, layer_norm, eps):
    want = exact(*arguments, layer_norm, eps)
    plain = norm_modulate_reference(*arguments, layer_norm=layer_norm, eps=eps)
    assert got.shape == want.shape and got.dtype == arguments[1].dtype and got.is_contiguous()
    # Half a rounding where few elements let torch be exact by luck.
    assert error(got, want) <= max(1.5 * error(plain, want), torch.finfo(got.dtype).eps / 2)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_no_less_accurate_than_torch(shape, dtype, layer_norm, device):
    arguments = inputs(shape, dtype, device=device)
    got = norm_modulate(*arguments, layer_norm=layer_norm, eps=1e-5)
    assert_as_good_as_torch(got, arguments, layer_norm, 1e-5)


@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize("dtype", DTYPES[:3])
@pytest.mark.parametrize("shape", SHAPES)
def test_triton_kernel(shape, dtype, layer_norm):
    """The Triton kernel itself, on any machine: interpreted where there is no GPU."""
    pytest.importorskip("triton")
    from fastlatent.kernels.norm_modulate import norm_modulate_triton

    arguments = inputs(shape, dtype, device="cuda" if torch.cuda.is_available() else "cpu", offset=5.0)
    got = torch.full(shape, torch.nan, dtype=dtype, device=arguments[0].device)
    norm_modulate_triton(*arguments, got, layer_norm, 1e-5)
    assert_as_good_as_torch(got, arguments, layer_norm, 1e-5)


@pytest.mark.needs_cuda
def test_cuda_runs_triton(monkeypatch):
    from fastlatent.kernels import norm_modulate as kernels

    launched, original = [], kernels.norm_modulate_triton
    monkeypatch.setattr(kernels, "norm_modulate_triton", lambda *args: launched.append(1) or original(*args))
    norm_modulate(*inputs((2, 48), torch.bfloat16, device="cuda"), layer_norm=False, eps=1e-6)
    assert launched == [1]


def test_by_hand():
    # RMS of (3, 4) over two is sqrt(12.5); layer norm of (3, 5) is (-1, 1).
    zeros, ones = torch.zeros(1, 2), torch.ones(1, 2)
    rms = norm_modulate(torch.tensor([[3.0, 4.0]]), zeros, ones, layer_norm=False, eps=0.0)
    torch.testing.assert_close(rms, torch.tensor([[6.0, 8.0]]) / 12.5**0.5)
    layer = norm_modulate(torch.tensor([[3.0, 5.0]]), ones, zeros, layer_norm=True, eps=0.0)
    torch.testing.assert_close(layer, torch.tensor([[0.0, 2.0]]))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_registration(dtype, device):
    operator = torch.ops.fastlatent.norm_modulate.default
    torch.library.opcheck(operator, (*inputs((3, 48), dtype, device=device), True, 1e-6))
    compiled = torch.compile(norm_modulate, fullgraph=True, backend="aot_eager")
    arguments = inputs((3, 48), dtype, device=device)
    want = norm_modulate(*arguments, layer_norm=False, eps=1e-6)
    assert torch.equal(compiled(*arguments, layer_norm=False, eps=1e-6), want)
    for key in ("CompositeExplicitAutograd", "CUDA"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key("fastlatent::norm_modulate", key)


X, SHIFT, SCALE = range(3)
WRONG = {
    "x rank": (X, torch.zeros(48), r"x \[R, 1 <= H"),
    "x too wide": (X, torch.zeros(1, MAX_HIDDEN + 1), r"H <= 16384\], got \[1, 16385\]"),
    "x dtype": (X, torch.zeros(3, 48).double(), r"x \[3, 48\] of torch\.float32 .*float64"),
    "x layout": (X, torch.zeros(48, 3).mT, r"x with adjacent elements"),
    "x gradient": (X, torch.zeros(3, 48, requires_grad=True), r"got x that requires grad"),
    "shift dtype": (SHIFT, torch.zeros(3, 48, dtype=torch.int32), r"shift of torch\.bfloat16.* got torch\.int32"),
    "shift shape": (SHIFT, torch.zeros(2, 48).bfloat16(), r"shift \[3, 48\]"),
    "scale shape": (SCALE, torch.zeros(3, 49).bfloat16(), r"scale \[3, 48\]"),
    "scale dtype": (SCALE, torch.zeros(3, 48), r"scale .* torch\.bfloat16 .* torch\.float32"),
    "scale layout": (SCALE, torch.zeros(48, 3).bfloat16().mT, r"scale with adjacent elements"),
    "scale device": (SCALE, torch.zeros(3, 48, device="meta").bfloat16(), r"scale .* on cpu, got .*meta"),
}


@pytest.mark.parametrize("case", WRONG)
def test_rejects(case):
    position, wrong, message = WRONG[case]
    arguments = list(inputs((3, 48), torch.bfloat16))
    arguments[position] = wrong
    with pytest.raises(ValueError, match=f"^norm_modulate: expected .*{message}"):
        norm_modulate(*arguments, layer_norm=False, eps=1e-6)
