import pytest
import torch
import torch.nn.functional as F

from fastlatent import _native
from fastlatent.ops.group_norm_silu import group_norm_silu, group_norm_silu_reference

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.needs_cuda)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LAYOUTS = [torch.contiguous_format, torch.channels_last]
# (shape, groups), with what it is the edge of. Several images: of few groups one's rounding could be luck.
SHAPES = [
    ((4, 12, 9, 7), 4),  # odd sides; 3 channels a group, no power of two
    ((3, 8, 4, 4), 8),  # a channel is a group
    ((9, 8, 4, 4), 1),  # all channels are
    ((9, 1, 3, 3), 1),  # one channel: both layouts at once
    ((6, 8, 1, 1), 4),  # one pixel
    ((3, 8, 1, 1), 8),  # a group of one number: variance 0
    ((6, 6, 1, 5), 3),  # a row
    ((0, 8, 4, 4), 2),  # no image
    ((2, 8, 0, 4), 2),  # no pixel
]
# A unit of work has 65,536 / C pixels where channels are last; a run of elements that are converted has 4,096.
CPU_SHAPES = [*SHAPES, ((2, 64, 33, 32), 32), ((1, 4100, 1, 3), 5)]
# A tile has 64 channels; a program has 256 of their pixels, or 16,384 pixels of one channel; and statistics take 1,024
# entries at a time.
TRITON_SHAPES = [*SHAPES, ((2, 96, 3, 3), 32), ((1, 64, 17, 16), 32), ((1, 2, 130, 127), 1), ((1, 1100, 2, 2), 1)]


def inputs(shape, dtype, *, layout=torch.contiguous_format, device="cpu", offset=0.0):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator, dtype=torch.float64) * 2 + offset
    weight, bias = torch.randn(2, shape[1], generator=generator, dtype=torch.float64)
    return x.to(device, dtype).contiguous(memory_format=layout), weight.to(device, dtype), bias.to(device, dtype)


def triton(x, weight, bias, *, groups, eps, silu=True):
    """The Triton kernels themselves, on any machine: interpreted where there is no GPU."""
    pytest.importorskip("triton")
    from fastlatent.kernels.group_norm_silu import group_norm_silu_triton

    device = "cuda" if torch.cuda.is_available() else "cpu"
    x, weight, bias = x.to(device), weight.to(device), bias.to(device)
    out = torch.full_like(x, torch.nan)
    group_norm_silu_triton(x, weight, bias, out, groups, eps, silu, not x.is_contiguous())
    return out


def exact(x, weight, bias, groups, eps, silu):
    x, weight, bias = x.double().cpu(), weight.double().cpu(), bias.double().cpu()
    wide = torch.group_norm(x.contiguous(), groups, weight, bias, eps)
    return F.silu(wide) if silu else wide


def error(got, want):
    return float((got.double().cpu() - want).norm() / want.norm().clamp(min=1e-300))


def assert_as_good_as_torch(got, x, weight, bias, groups, eps, silu):
    want = exact(x, weight, bias, groups, eps, silu)
    plain = torch.group_norm(x, groups, weight, bias, eps)
    plain = F.silu(plain) if silu else plain
    assert got.shape == x.shape and got.dtype == x.dtype and got.stride() == x.stride()
    # A rounding where few elements, or torch's order of operations, let torch be exact by luck.
    assert error(got, want) <= max(1.5 * error(plain, want), torch.finfo(got.dtype).eps / 2)


# --- numbers ---


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "groups"), [*CPU_SHAPES, *TRITON_SHAPES[len(SHAPES) :]])
def test_no_less_accurate_than_torch(shape, groups, dtype, layout, silu, device):
    arguments = inputs(shape, dtype, layout=layout, device=device, offset=0.5)
    got = group_norm_silu(*arguments, groups=groups, eps=1e-6, silu=silu)
    assert_as_good_as_torch(got, *arguments, groups, 1e-6, silu)


# bfloat16 with one shape of each kind, the others in the soak. float16: test_the_half_types_are_the_rounded_float32
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("shape", "groups", "dtype"),
    [(*shape, torch.float32) for shape in TRITON_SHAPES]
    + [(*shape, torch.bfloat16) for shape in (TRITON_SHAPES[0], TRITON_SHAPES[9])]
    + [pytest.param(*s, torch.bfloat16, marks=pytest.mark.soak) for s in (*TRITON_SHAPES[1:9], *TRITON_SHAPES[10:])],
)
def test_triton_kernels(shape, groups, dtype, layout):
    arguments = inputs(shape, dtype, layout=layout, offset=0.5)
    silu = len(arguments[0]) != 9
    got = triton(*arguments, groups=groups, eps=1e-6, silu=silu)
    assert_as_good_as_torch(got.cpu(), *arguments, groups, 1e-6, silu)


def test_by_hand():
    # (1, 3) and (5, 9): mean 2 and 7, deviation 1 and 2.
    x = torch.tensor([1.0, 3.0, 5.0, 9.0]).reshape(1, 4, 1, 1)
    weight, bias = torch.tensor([1.0, 1.0, 2.0, 2.0]), torch.tensor([0.0, 0.0, 0.0, 1.0])
    want = torch.tensor([-1.0, 1.0, -2.0, 3.0]).reshape(1, 4, 1, 1)
    for function in (group_norm_silu, triton):
        torch.testing.assert_close(function(x, weight, bias, groups=2, eps=0.0, silu=False).cpu(), want)
        torch.testing.assert_close(function(x, weight, bias, groups=2, eps=0.0).cpu(), want * torch.sigmoid(want))


@pytest.mark.parametrize("function", [group_norm_silu, triton])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_mean_far_from_zero(layout, function):
    """10,000 deviations away, where float32's E[x^2] - E[x]^2 has no digit left (torch's channels_last on the CPU)."""
    x, weight, bias = inputs((2, 12, 17, 19), torch.float32, layout=layout, offset=2e4)
    for groups in (1, 4, 12):
        got = function(x, weight, bias, groups=groups, eps=1e-6)
        # The mean of a chunk is rounded to float32 on the GPU: 2^-24 * 2e4 / 2 deviations.
        assert error(got, exact(x, weight, bias, groups, 1e-6, True)) < 6e-4


@pytest.mark.parametrize("function", [group_norm_silu, triton])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_sums_that_overflow_half(layout, function):
    """+-60,000 in float16, whose sum and squares are infinite there; float32 up to squares of 1e36."""
    sign = torch.tensor([1.0, -1.0]).repeat(64).reshape(1, 4, 4, 8).contiguous(memory_format=layout)
    for dtype, size in ((torch.float16, 6e4), (torch.float32, 1e18)):
        x, one, zero = (sign * size).to(dtype), torch.ones(4, dtype=dtype), torch.zeros(4, dtype=dtype)
        got = function(x, one, zero, groups=2, eps=1e-6, silu=False).cpu()
        torch.testing.assert_close(got, sign.to(dtype))


@pytest.mark.parametrize("function", [group_norm_silu, triton])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_constant_becomes_its_bias(layout, function):
    for value in (0.0, 1e-3, 1e4, -3e4):
        x = torch.full((2, 4, 5, 7), value).contiguous(memory_format=layout)
        bias = torch.tensor([-1.0, 0.0, 0.5, 2.0])
        got = function(x, torch.ones(4), bias, groups=2, eps=1e-6).cpu()
        torch.testing.assert_close(got, F.silu(bias)[:, None, None].expand(x.shape), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("function", [group_norm_silu, triton])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_nan_and_infinity_stay_in_their_group(layout, function):
    x, weight, bias = inputs((2, 8, 5, 7), torch.float32, layout=layout)
    want = function(x, weight, bias, groups=4, eps=1e-6).cpu()
    x[0, 1, 2, 3], x[1, 7, 4, 6] = torch.nan, torch.inf
    want[0, :2], want[1, 6:] = torch.nan, torch.nan
    for dtype in DTYPES:
        arguments = (x.to(dtype), weight.to(dtype), bias.to(dtype))
        got = function(*arguments, groups=4, eps=1e-6).cpu()
        assert torch.equal(got.isnan(), want.isnan())
        if dtype == torch.float32:
            torch.testing.assert_close(got, want, equal_nan=True)


def test_silu_over_its_range():
    """The CPU's polynomial: 4 of the last place, and where exp(-y) would overflow nothing to speak of is left."""
    bias = torch.linspace(-150, 150, 30_001)
    x = torch.zeros(1, len(bias), 1, 1)
    got = group_norm_silu(x, torch.ones_like(bias), bias, groups=1, eps=1.0).flatten().double()
    want = F.silu(bias.double())
    inside = bias > -87
    assert float((got / want - 1).abs()[inside & (bias != 0)].max()) <= 4 * 2.0**-23
    assert float((got - want).abs()[~inside].max()) < 1e-35
    assert got[bias == 0].eq(0).all()


@pytest.mark.parametrize("function", [group_norm_silu, triton])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_the_half_types_are_the_rounded_float32(dtype, layout, function):
    """Subnormals, halfway cases and what overflows: weights from the smallest to the largest."""
    x, _, bias = inputs((1, 64, 4, 5), dtype, layout=layout)
    largest = torch.finfo(dtype).max
    weight = torch.logspace(-8, 4.8 if dtype == torch.float16 else 38, 64).clamp(max=largest).to(dtype)
    arguments = {"groups": 32, "eps": 1e-6, "silu": False}
    bias[:32] = 0
    wide = function(x.float(), weight.float(), bias.float(), **arguments)
    got = function(x, weight, bias, **arguments)
    assert torch.equal(got, wide.to(dtype))
    assert wide.abs().max() > largest or dtype == torch.bfloat16
    assert got.abs()[got != 0].min() < torch.finfo(dtype).tiny or dtype == torch.bfloat16


@pytest.mark.parametrize("layout", LAYOUTS)
def test_threads_change_nothing(layout):
    arguments = inputs((3, 32, 70, 70), torch.float32, layout=layout)  # 5 units an image over 1, 2 and 5 threads
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(group_norm_silu(*arguments, groups=8, eps=1e-6))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("function", [group_norm_silu, triton])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_image_depends_on_itself_alone(layout, function):
    x, weight, bias = inputs((3, 12, 9, 7), torch.float32, layout=layout)
    together = function(x, weight, bias, groups=4, eps=1e-6)
    for i in range(3):
        assert torch.equal(function(x[i : i + 1], weight, bias, groups=4, eps=1e-6), together[i : i + 1])


# --- layouts, registration ---


@pytest.mark.parametrize("device", DEVICES)
def test_other_layouts(device):
    """A crop, a transposed and an expanded image are copied; every second weight."""
    x, weight, bias = inputs((2, 8, 6, 6), torch.float32, device=device)
    for strided in (x[:, :, 1:5, 2:6], x.transpose(2, 3), x[:1].expand(3, 8, 6, 6)):
        assert not strided.is_contiguous() and not strided.is_contiguous(memory_format=torch.channels_last)
        got = group_norm_silu(strided, weight, bias, groups=4, eps=1e-6)
        assert got.is_contiguous()
        assert torch.equal(got, group_norm_silu(strided.contiguous(), weight, bias, groups=4, eps=1e-6))
    apart = weight.repeat_interleave(2)[::2]
    assert torch.equal(
        group_norm_silu(x, apart, bias, groups=4, eps=1e-6), group_norm_silu(x, weight, bias, groups=4, eps=1e-6)
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_cpu_runs_the_compiled_kernel(layout, native_calls):
    x, weight, bias = inputs((2, 8, 4, 5), torch.bfloat16, layout=layout)
    group_norm_silu(x, weight, bias, groups=2, eps=1e-6)
    (call,) = native_calls
    assert call[:2] == ("cpu", "group_norm_silu")
    assert call[6:10] == (2, 8, 20, 2) and call[12] == (layout == torch.channels_last)
    assert call[2] == x.data_ptr()  # read where it is


@pytest.mark.needs_cuda
@pytest.mark.parametrize("layout", LAYOUTS)
def test_cuda_runs_triton(layout, monkeypatch):
    from fastlatent.kernels import group_norm_silu as kernels

    launched, original = [], kernels.group_norm_silu_triton
    monkeypatch.setattr(kernels, "group_norm_silu_triton", lambda *args: launched.append(args[-1]) or original(*args))
    group_norm_silu(*inputs((2, 8, 4, 5), torch.bfloat16, layout=layout, device="cuda"), groups=2, eps=1e-6)
    assert launched == [layout == torch.channels_last]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_registration(dtype, layout, device):
    operator = torch.ops.fastlatent.group_norm_silu.default
    arguments = inputs((2, 12, 5, 3), dtype, layout=layout, device=device)
    torch.library.opcheck(operator, (*arguments, 4, 1e-6, True))
    compiled = torch.compile(group_norm_silu, fullgraph=True, backend="aot_eager")
    want = group_norm_silu(*arguments, groups=4, eps=1e-6)
    got = compiled(*arguments, groups=4, eps=1e-6)
    assert torch.equal(got, want) and got.stride() == want.stride() == arguments[0].stride()


def test_other_devices_use_the_reference():
    x, weight, bias = inputs((2, 8, 4, 4), torch.bfloat16, layout=torch.channels_last)
    got = group_norm_silu(x.to("meta"), weight.to("meta"), bias.to("meta"), groups=2, eps=1e-6)
    assert got.shape == x.shape and got.stride() == x.stride()
    for key in ("CompositeExplicitAutograd", "CPU", "CUDA"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key("fastlatent::group_norm_silu", key)
    for silu in (True, False):
        want = group_norm_silu(x, weight, bias, groups=2, eps=1e-6, silu=silu)
        reference = group_norm_silu_reference(x, weight, bias, 2, 1e-6, silu)
        assert reference.stride() == x.stride()
        torch.testing.assert_close(reference, want, rtol=2**-7, atol=1e-6)  # a last place of bfloat16


def test_missing_library_is_an_error(monkeypatch):
    monkeypatch.setattr(_native, "load", lambda backend: None)
    with pytest.raises(RuntimeError, match=r"libfastlatent_cpu\.so"):
        group_norm_silu(*inputs((2, 8, 4, 4), torch.float32), groups=2, eps=1e-6)


WRONG = {
    "rank": ({"x": torch.zeros(2, 8, 4)}, r"x \[N, C, H, W\] .* got \[2, 8, 4\]"),
    "dtype": ({"x": torch.zeros(2, 8, 4, 4).double()}, r"float16, got .*float64"),
    "no groups": ({"groups": 0}, r"groups that divide 8 channels, got 0"),
    "groups": ({"groups": 3}, r"groups that divide 8 channels, got 3"),
    "no channels": ({"x": torch.zeros(2, 0, 4, 4)}, r"groups that divide 0 channels"),
    "too large": ({"x": torch.zeros(1, 1, 1, 1).expand(1, 8, 2**14, 2**14)}, r"fewer than 2\^31 numbers an image"),
    "weight length": ({"weight": torch.zeros(4)}, r"weight \[8\] torch\.float32 on cpu, got \[4\]"),
    "bias dtype": ({"bias": torch.zeros(8).half()}, r"bias \[8\] torch\.float32 on cpu, got .*float16"),
    "bias device": ({"bias": torch.zeros(8, device="meta")}, r"bias .* on cpu, got .*meta"),
    "x gradient": ({"x": torch.zeros(2, 8, 4, 4, requires_grad=True)}, r"got x that requires grad"),
    "weight gradient": ({"weight": torch.zeros(8, requires_grad=True)}, r"got weight that requires grad"),
}


@pytest.mark.parametrize("case", WRONG)
def test_rejects(case):
    wrong, message = WRONG[case]
    x, weight, bias = inputs((2, 8, 4, 4), torch.float32)
    arguments = {"x": x, "weight": weight, "bias": bias, "groups": 2, "eps": 1e-6} | wrong
    with pytest.raises(ValueError, match=f"^group_norm_silu: expected .*{message}"):
        group_norm_silu(**arguments)


def test_weights_that_require_grad_where_none_is_recorded():
    x, weight, bias = inputs((2, 8, 4, 4), torch.float32)
    want = group_norm_silu(x, weight, bias, groups=2, eps=1e-6)
    with torch.no_grad():
        assert torch.equal(group_norm_silu(x, weight.requires_grad_(), bias, groups=2, eps=1e-6), want)


def test_compiles_for_hopper(hopper):
    """Ahead of time and without a GPU, one shape; tools/kernel_table watches the rest."""
    size = "bf16 NHWC 128 x 256^2"
    rows = hopper("group_norm_silu", *(f"{part} {size}" for part in ("moments", "statistics", "normalise")))
    assert all(row["spilled"] == 0 and row["registers"] <= 80 for row in rows), rows
    moments, _, normalise = (row["sass"] for row in rows)
    # 16 bytes at a time: 8 tiles of 16 numbers a thread are 2 loads each; 32 numbers are 4 loads and 4 stores.
    assert moments["LDG.128"] == 16 and normalise["LDG.128"] == normalise["STG.128"] == 4
