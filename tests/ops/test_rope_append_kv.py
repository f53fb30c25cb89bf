import numpy as np
import pytest
import torch

from fastlatent.ops.rope_append_kv import rope_append_kv, rope_append_kv_reference

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.needs_cuda)]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
FLOAT8 = torch.float8_e4m3fn
# (rows, query heads, key heads, head size, tokens, position). The first: one head of each, at the first position.
# 48 and 80 are no powers of two. 24 + 2·8 heads of 32: several programs per row. The last position of each length.
SHAPES = [
    (1, 1, 1, 32, 1, 0), (2, 4, 4, 48, 65, 64), (3, 24, 8, 32, 64, 63), (1, 8, 2, 80, 9, 8), (2, 2, 1, 64, 70, 1),
    (1, 8, 1, 128, 5, 4), (2, 1, 1, 2, 3, 1),
]  # fmt: skip


def inputs(shape, dtype, cache_dtype=None, *, table_dtype=torch.float32, device="cpu", seed=0, scale=1.0):
    """The tables hold no angles but random numbers: a swap of cos and sin, of pairs or of rows shows."""
    rows, q_heads, kv_heads, head_dim, tokens, position = shape
    generator = torch.Generator().manual_seed(seed)

    def draw(*size):
        return torch.randn(size, generator=generator, dtype=torch.float64)

    return (
        (scale * draw(rows, (q_heads + 2 * kv_heads) * head_dim)).to(device, dtype),
        draw(tokens, head_dim // 2).to(device, table_dtype),
        draw(tokens, head_dim // 2).to(device, table_dtype),
        torch.tensor([position], device=device),
        draw(rows, tokens, kv_heads, head_dim).to(device, cache_dtype or dtype),
        draw(rows, tokens, kv_heads, head_dim).to(device, cache_dtype or dtype),
    )


def exact(qkv, cos, sin, position, keys, values):
    """q and this token's k and v in float64: a rotation is a complex product."""
    kv_heads, head_dim = keys.shape[2:]
    x = qkv.double().cpu().numpy().reshape(len(qkv), -1, head_dim)
    turn = (cos.double() + 1j * sin.double()).cpu().numpy()[int(position)]
    q_and_k = np.ascontiguousarray(x[:, :-kv_heads]).view(np.complex128) * turn
    q_and_k = torch.from_numpy(q_and_k.view(np.float64))
    return q_and_k[:, :-kv_heads], q_and_k[:, -kv_heads:], torch.from_numpy(x[:, -kv_heads:].copy())


def plain(qkv, cos, sin, position, keys, values):
    """q and k as plain torch rotates them in qkv's dtype."""
    kv_heads, head_dim = keys.shape[2:]
    x = qkv.unflatten(1, (-1, head_dim))[:, :-kv_heads]
    c, s = cos[int(position)].to(qkv.dtype), sin[int(position)].to(qkv.dtype)
    even, odd = x[..., 0::2], x[..., 1::2]
    x = torch.stack([even * c - odd * s, even * s + odd * c], dim=-1).flatten(-2)
    return x[:, :-kv_heads], x[:, -kv_heads:]


def error(got, want):
    """Relative Frobenius error."""
    return float((got.double().cpu() - want).norm() / want.norm())


def called(function, arguments):
    """The function's q and the caches that it left."""
    *rest, keys, values = arguments
    keys, values = keys.clone(), values.clone()
    return function(*rest, keys, values), keys, values


def check(function, arguments, *, interpreted=False):
    """q, k and v against float64, and every other place of the caches as it was.

    interpreted: Triton's interpreter cuts bfloat16 off where the GPU rounds, and its cast to float8 is off by a step,
    and loses the carry of what rounds up to a power of two.
    """
    q, keys, values = called(function, arguments)
    p = int(arguments[3])
    want_q, want_k, want_v = exact(*arguments)
    dtype = q.dtype
    eps = torch.finfo(dtype).eps
    plain_q, plain_k = plain(*arguments)
    # Half a rounding where few numbers let torch be exact by luck; a whole one where the interpreter truncates.
    floor = eps if interpreted and dtype == torch.bfloat16 else eps / 2
    assert q.dtype == dtype and q.is_contiguous()
    assert error(q, want_q) <= max(1.5 * error(plain_q, want_q), floor)
    if keys.dtype == dtype:
        assert error(keys[:, p], want_k) <= max(1.5 * error(plain_k, want_k), floor)
        assert torch.equal(values[:, p].double().cpu(), want_v)
    else:
        # float8: 3 bits after the point, and steps of 2^-9 below 2^-6.
        for cache, want in ((keys, want_k), (values, want_v)):
            power = 2.0 ** torch.floor(torch.log2(want.abs()))
            step = (power / 8).clamp(min=2.0**-9)
            within = (cache[:, p].double().cpu() - want).abs() <= step * (1 if interpreted else 0.5) * (1 + 1e-6)
            assert (within | (interpreted & (want.abs() >= 1.9375 * power))).all()
    for cache, before in ((keys, arguments[4]), (values, arguments[5])):
        cache, before = (tensor.view(torch.uint8).clone().cpu() for tensor in (cache, before))
        cache[:, p] = before[:, p]
        assert torch.equal(cache, before)


def test_reference_by_hand():
    # Position 1 turns by a quarter: (even, odd) → (-odd, even). 1 query head, 1 key head, D = 2.
    keys, values = torch.zeros(1, 3, 1, 2), torch.zeros(1, 3, 1, 2)
    cos, sin = torch.tensor([[1.0], [0.0], [9.0]]), torch.tensor([[0.0], [1.0], [9.0]])
    qkv = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]])
    q = rope_append_kv_reference(qkv, cos, sin, torch.tensor([1]), keys, values)
    assert q.flatten().tolist() == [-2.0, 1.0]
    assert keys.flatten().tolist() == [0, 0, -4.0, 3.0, 0, 0]
    assert values.flatten().tolist() == [0, 0, 5.0, 6.0, 0, 0]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("cache_dtype", [None, FLOAT8])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_no_less_accurate_than_torch(shape, dtype, cache_dtype, device):
    if dtype == torch.float32 and cache_dtype is None:
        cache_dtype = torch.float32  # with tables in float64, which round once
    for table_dtype in (torch.float32, torch.float64) if dtype == torch.float64 else (torch.float32, dtype):
        check(rope_append_kv, inputs(shape, dtype, cache_dtype, table_dtype=table_dtype, device=device))


@pytest.mark.needs_cuda
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_cuda_bits_are_the_reference_s(shape, dtype):
    """Same operations in the same order, none fused: what the first position's tests see holds for every one."""
    arguments = inputs(shape, dtype, device="cuda")
    got, want = called(rope_append_kv, arguments), called(rope_append_kv_reference, arguments)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("cache_dtype", [None, FLOAT8])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_triton_kernel(shape, dtype, cache_dtype):
    """The Triton kernel itself, on any machine: interpreted where there is no GPU."""
    pytest.importorskip("triton")
    from fastlatent.kernels.rope_append_kv import rope_append_kv_kernel, rope_append_kv_triton

    device = "cuda" if torch.cuda.is_available() else "cpu"
    interpreted = type(rope_append_kv_kernel).__name__ == "InterpretedFunction"
    assert interpreted == (device == "cpu")
    check(rope_append_kv_triton, inputs(shape, dtype, cache_dtype, device=device), interpreted=interpreted)


def test_mixed_dtypes():
    """The caches' dtype is not qkv's: rounded from the rotation in float32, once."""
    arguments = inputs((2, 4, 2, 32, 5, 3), torch.float32, torch.bfloat16)
    _, keys, values = called(rope_append_kv, arguments)
    _, want_k, want_v = exact(*arguments)
    assert error(keys[:, 3], want_k) < 2.0**-9 and error(values[:, 3], want_v) < 2.0**-9


@pytest.mark.parametrize("device", DEVICES)
def test_float8_saturates(device):
    """1000·N(0, 1): most numbers are above 448, and none may become NaN."""
    arguments = inputs((2, 2, 2, 64, 3, 1), torch.float32, FLOAT8, device=device, scale=1000.0)
    _, keys, values = called(rope_append_kv, arguments)
    _, want_k, want_v = exact(*arguments)
    for cache, want in ((keys, want_k), (values, want_v)):
        got = cache[:, 1].double().cpu()
        assert got.abs().max() == 448 and (want.abs() > 448).any()
        assert torch.equal(got, want.clamp(-448, 448).float().to(FLOAT8).double())


def test_triton_kernel_saturates():
    """What is above 448, of either sign; the interpreter's rounding of the rest is not the GPU's."""
    pytest.importorskip("triton")
    from fastlatent.kernels.rope_append_kv import rope_append_kv_triton

    device = "cuda" if torch.cuda.is_available() else "cpu"
    arguments = inputs((2, 2, 2, 64, 3, 1), torch.float32, FLOAT8, device=device, scale=1000.0)
    _, keys, values = called(rope_append_kv_triton, arguments)
    _, want_k, want_v = exact(*arguments)
    for cache, want in ((keys, want_k), (values, want_v)):
        got, above = cache[:, 1].double().cpu(), want.abs() > 448
        assert (above & (want > 0)).any() and (above & (want < 0)).any()
        assert torch.equal(got[above], 448 * want[above].sign())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("cache_dtype", [torch.float32, FLOAT8])
def test_nan_stays(cache_dtype, device):
    """A broken network must show."""
    arguments = inputs((1, 1, 1, 32, 2, 0), torch.float32, cache_dtype, device=device)
    arguments[0].fill_(torch.nan)
    q, keys, values = called(rope_append_kv, arguments)
    assert all(tensor.float().isnan().all() for tensor in (q, keys[:, 0], values[:, 0]))


@pytest.mark.parametrize("device", DEVICES)
def test_zero_rows(device):
    q, _, _ = called(rope_append_kv, inputs((0, 4, 2, 32, 5, 3), torch.bfloat16, device=device))
    assert q.shape == (0, 4, 32)


@pytest.mark.parametrize("device", DEVICES)
def test_strided_inputs(device):
    """qkv as a slice of a wider product, tables and position as columns of others."""
    qkv, cos, sin, position, keys, values = inputs((2, 4, 2, 32, 5, 3), torch.float32, device=device)
    wide = torch.cat([qkv, qkv], dim=1)[:, : qkv.shape[1]]
    tables = torch.stack((cos, sin), dim=-1)
    positions = torch.arange(5, device=device)
    got = called(rope_append_kv, (wide, tables[..., 0], tables[..., 1], positions[3:4], keys, values))
    want = called(rope_append_kv_reference, (qkv, cos, sin, position, keys, values))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("dtype", "cache_dtype"), [(torch.float32, torch.bfloat16), (torch.bfloat16, FLOAT8)])
def test_registration(dtype, cache_dtype, device):
    """The schema's mutations, the fake and tracing; the first and last of these compare as torch cannot in float8."""
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    tests = tests[1:3] if cache_dtype == FLOAT8 else tests
    arguments = inputs((2, 4, 2, 32, 5, 3), dtype, cache_dtype, device=device)
    torch.library.opcheck(torch.ops.fastlatent.rope_append_kv.default, arguments, test_utils=tests)


@pytest.mark.parametrize("device", DEVICES)
def test_compiles_whole(device):
    arguments = inputs((2, 4, 2, 32, 5, 3), torch.bfloat16, device=device)
    compiled = torch.compile(rope_append_kv, fullgraph=True, backend="aot_eager")
    for a, b in zip(called(compiled, arguments), called(rope_append_kv, arguments), strict=True):
        assert torch.equal(a, b)


def test_other_devices_use_the_reference():
    assert rope_append_kv(*inputs((2, 4, 2, 32, 5, 3), torch.bfloat16, device="meta")).shape == (2, 4, 32)
    keys = ("CompositeExplicitAutograd", "CPU", "CUDA")
    assert all(torch._C._dispatch_has_kernel_for_dispatch_key("fastlatent::rope_append_kv", key) for key in keys)


QKV, COS, SIN, POSITION, KEYS, VALUES = range(6)
CACHE = (2, 5, 2, 32)
WRONG = {
    "qkv rank": (QKV, torch.zeros(2, 8, 32), r"qkv \[2, \(Hq \+ 4\)·32\]"),
    "qkv rows": (QKV, torch.zeros(3, 256), r"qkv \[2, "),
    "qkv width": (QKV, torch.zeros(2, 250), r"qkv \[2, "),
    "no query heads": (QKV, torch.zeros(2, 4 * 32), r"qkv \[2, "),
    "qkv dtype": (QKV, torch.zeros(2, 256, dtype=torch.int32), r"qkv .* got .*torch\.int32"),
    "qkv device": (QKV, torch.zeros(2, 256, device="meta"), r"cos on meta like qkv, got .*cpu"),
    "qkv gradient": (QKV, torch.zeros(2, 256, requires_grad=True), r"got qkv that requires grad"),
    "cos tokens": (COS, torch.zeros(4, 16), r"cos \[5, 16\]"),
    "cos width": (COS, torch.zeros(5, 32), r"cos \[5, 16\]"),
    "cos dtype": (COS, torch.zeros(5, 16, dtype=torch.int64), r"cos .* got .*torch\.int64"),
    "sin shape": (SIN, torch.zeros(16), r"sin \[5, 16\]"),
    "sin device": (SIN, torch.zeros(5, 16, device="meta"), r"sin on cpu like qkv, got .*meta"),
    "position shape": (POSITION, torch.tensor(3), r"position \[1\] of torch\.int64"),
    "position dtype": (POSITION, torch.tensor([3], dtype=torch.int32), r"position .* got .*torch\.int32"),
    "position device": (POSITION, torch.zeros(1, dtype=torch.int64, device="meta"), r"position on cpu .*meta"),
    "position after the end": (POSITION, torch.tensor([5]), r"a position from 0 to N - 1 = 4, got 5"),
    "position before the start": (POSITION, torch.tensor([-1]), r"a position from 0 to N - 1 = 4, got -1"),
    "keys rank": (KEYS, torch.zeros(2, 5, 64), r"contiguous keys \[R, N, Hkv, D"),
    "no tokens": (KEYS, torch.zeros(2, 0, 2, 32), r"contiguous keys \[R, N, Hkv, D"),
    "odd head size": (KEYS, torch.zeros(2, 5, 2, 31), r"D even and ≤ 256\]"),
    "large head size": (KEYS, torch.zeros(2, 5, 2, 258), r"D even and ≤ 256\]"),
    "keys dtype": (KEYS, torch.zeros(CACHE, dtype=torch.float8_e5m2), r"got .*torch\.float8_e5m2"),
    "keys layout": (KEYS, torch.zeros(2, 2, 5, 32).transpose(1, 2), r"contiguous keys .*strides"),
    "values shape": (VALUES, torch.zeros(2, 6, 2, 32), r"values like keys \[2, 5, 2, 32\]"),
    "values dtype": (VALUES, torch.zeros(CACHE).double(), r"values like keys .* got .*torch\.float64"),
    "values device": (VALUES, torch.zeros(CACHE, device="meta"), r"values on cpu .* got .*meta"),
    "values gradient": (VALUES, torch.zeros(CACHE, requires_grad=True), r"got values that requires grad"),
}


@pytest.mark.parametrize("case", WRONG)
def test_rejects(case):
    index, wrong, message = WRONG[case]
    arguments = list(inputs((2, 4, 2, 32, 5, 3), torch.float32))
    arguments[index] = wrong
    before = [tensor.clone() for tensor in arguments[KEYS:]]
    with pytest.raises(ValueError, match=f"^rope_append_kv: expected .*{message}"):
        rope_append_kv(*arguments)
    if not any(tensor.is_meta for tensor in arguments):
        assert all(torch.equal(a, b) for a, b in zip(arguments[KEYS:], before, strict=True))


def test_compiles_for_hopper(hopper):
    for row in hopper("rope_append_kv", "bf16 D64 16/16", "fp8e4nv D128 16/4"):
        # 2048 threads share an SM's 65536 registers. Nothing is fused: the bits are the reference's.
        assert row["registers"] <= 32 and row["spilled"] == 0, row["case"]
        assert row["sass"]["FFMA"] == 0, row["case"]
