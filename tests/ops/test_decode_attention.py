import numpy as np
import pytest
import torch

from fastlatent.ops.decode_attention import decode_attention, decode_attention_reference

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.needs_cuda)]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
FLOAT8 = torch.float8_e4m3fn
# (rows, query heads, key heads, head size, tokens, position). The first token alone, of one and of many: most splits
# are empty. 63, 64 and 65 tokens
# are a tile of some head size, one more and one less. Groups of
# 1, 2, 4, 6, 8 and 20 heads: tl.dot pads to 16 or 32. 48 and 80 are no powers of two. 600 tokens of one head: 19
# splits, more than the reduction reads at once.
SHAPES = [
    (1, 1, 1, 32, 1, 0), (2, 2, 2, 64, 130, 0), (3, 2, 1, 48, 130, 63), (1, 3, 3, 80, 65, 64), (1, 8, 2, 128, 70, 1),
    (1, 8, 1, 64, 64, 63), (1, 20, 1, 32, 64, 40), (1, 6, 1, 16, 100, 99), (1, 1, 1, 64, 600, 599), (2, 2, 2, 2, 3, 2),
]  # fmt: skip


def inputs(shape, dtype, cache_dtype=None, *, device="cpu", seed=0):
    """What lies behind the position is NaN: reading it would show."""
    rows, q_heads, kv_heads, head_dim, tokens, position = shape
    generator = torch.Generator().manual_seed(seed)

    def draw(*size):
        return torch.randn(size, generator=generator, dtype=torch.float64)

    keys, values = (draw(rows, tokens, kv_heads, head_dim) for _ in range(2))
    keys[:, position + 1 :], values[:, position + 1 :] = torch.nan, torch.nan
    # Scores of standard deviation 3: neither one token alone nor all the same.
    q = 3 * draw(rows, q_heads, head_dim)
    caches = (cache.to(device, cache_dtype or dtype) for cache in (keys, values))
    return (q.to(device, dtype), *caches, torch.tensor([position], device=device))


def exact(q, keys, values, position):
    """numpy's long double, head by head: exact enough to judge float64 by."""
    group = q.shape[1] // keys.shape[2]
    n = int(position) + 1
    q, keys, values = (tensor.double().cpu().numpy().astype(np.longdouble) for tensor in (q, keys, values))
    out = np.empty_like(q)
    for row in range(q.shape[0]):
        for head in range(q.shape[1]):
            scores = keys[row, :n, head // group] @ q[row, head] / np.sqrt(np.longdouble(q.shape[2]))
            weights = np.exp(scores - scores.max())
            out[row, head] = weights @ values[row, :n, head // group] / weights.sum()
    return torch.from_numpy(out.astype(np.float64))


def plain(q, keys, values, position):
    """As plain torch computes it in q's dtype: the heads of a group as the rows of one product."""
    k, v = (cache[:, : int(position) + 1].to(q.dtype).transpose(1, 2) for cache in (keys, values))
    grouped = q.unflatten(1, (keys.shape[2], -1))
    weights = (grouped @ k.transpose(-1, -2) * q.shape[2] ** -0.5).softmax(-1)
    return (weights @ v).flatten(1, 2)


def error(got, want):
    """Relative Frobenius error."""
    return float((got.double().cpu() - want).norm() / want.norm())


def check(got, arguments, *, truncates=False):
    q, *_ = arguments
    want, eps = exact(*arguments), torch.finfo(q.dtype).eps
    # Where few numbers let torch be exact by luck: half a rounding of the result, or a whole one where Triton's
    # interpreter truncates to bfloat16. In float32 and float64 a score, up to 9 here, rounds by more: by 4 eps.
    floor = eps * (4 if q.dtype in (torch.float32, torch.float64) else 1 if truncates else 0.5)
    assert got.shape == q.shape and got.dtype == q.dtype and got.is_contiguous()
    assert error(got, want) <= max(1.5 * error(plain(*arguments), want), floor)


def reference(q, keys, values, position, max_length=None):
    return decode_attention_reference(q, keys, values, position, q.shape[2] ** -0.5, max_length or keys.shape[1])


def interpreted_or_cuda(q, keys, values, position, max_length=None):
    """The Triton kernels themselves, on any machine: interpreted where there is no GPU."""
    pytest.importorskip("triton")
    from fastlatent.kernels.decode_attention import decode_attention_triton, decode_one_head_kernel

    interpreted = type(decode_one_head_kernel).__name__ == "InterpretedFunction"
    assert interpreted == (q.device.type == "cpu")
    return decode_attention_triton(q, keys, values, position, q.shape[2] ** -0.5, max_length or keys.shape[1])


def test_reference_by_hand():
    # Scores 0 and ln 3 weigh values 4 and 8 as 1/4 and 3/4; the third token is behind the position.
    keys = torch.tensor([[0.0, 0.0], [np.log(3.0), 0.0], [torch.nan, 9.0]]).reshape(1, 3, 1, 2)
    values = torch.tensor([[4.0, 0.0], [8.0, 0.0], [torch.nan, 9.0]]).reshape(1, 3, 1, 2)
    q = torch.tensor([[[1.0, 0.0]]])
    out = decode_attention_reference(q, keys, values, torch.tensor([1]), 1.0, 3)
    torch.testing.assert_close(out.flatten(), torch.tensor([7.0, 0.0]))


@pytest.mark.parametrize("shape", SHAPES)
def test_reference_is_the_formula(shape):
    arguments = inputs(shape, torch.float64)
    assert error(reference(*arguments), exact(*arguments)) < 1e-14


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("cache_dtype", [None, FLOAT8])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_no_less_accurate_than_torch(shape, dtype, cache_dtype, device):
    """Against float64 with the keys and values as the cache holds them, float8 too."""
    for seed in range(2):
        arguments = inputs(shape, dtype, cache_dtype, device=device, seed=seed)
        check(decode_attention(*arguments, max_length=shape[4]), arguments)
        check(reference(*arguments), arguments)


# float32 for every shape; the others, on a machine of little time, for one of each kernel (bfloat16 for all: soak).
@pytest.mark.parametrize(
    ("shape", "dtype", "cache_dtype"),
    [(shape, torch.float32, None) for shape in SHAPES]
    + [(shape, torch.bfloat16, None) for shape in SHAPES[3:5]]
    + [pytest.param(shape, torch.bfloat16, None, marks=pytest.mark.soak) for shape in (*SHAPES[:3], *SHAPES[5:])]
    + [(shape, dtype, FLOAT8) for shape in SHAPES[3:5] for dtype in DTYPES]
    + [(SHAPES[4], torch.float16, None), (SHAPES[4], torch.float64, None), (SHAPES[4], torch.float32, torch.bfloat16)],
)
def test_triton_kernels(shape, dtype, cache_dtype):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    arguments = inputs(shape, dtype, cache_dtype, device=device)
    check(interpreted_or_cuda(*arguments), arguments, truncates=device == "cpu")


@pytest.mark.parametrize("splits", [1, 2, 3, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_every_number_of_splits(dtype, splits, monkeypatch):
    """151 tokens of heads of 32 are three tiles of 64 in one split, two in each of two, the second uneven; 20 splits
    are more than the reduction reads at once, of which the last but one has 7 tokens of 8 and the last none."""
    kernels = pytest.importorskip("fastlatent.kernels.decode_attention")
    monkeypatch.setattr(kernels, "split_count", lambda programs, max_length: splits)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    arguments = inputs((1, 2, 1, 32, 160, 150), dtype, device=device)
    # Later keys are longer, so that the maximum rises from tile to tile.
    arguments[1].mul_(torch.linspace(0.2, 1, 160, device=device)[:, None, None].to(dtype))
    check(interpreted_or_cuda(*arguments), arguments)


def test_split_count():
    pytest.importorskip("triton")
    from fastlatent.kernels.decode_attention import split_count

    assert split_count(512 * 16, 256) == 1  # many rows need none
    assert split_count(132, 256) == 1 and split_count(131, 256) == 2
    assert split_count(2 * 16, 256) == 5  # 160 programs
    assert split_count(1, 4096) == 128 and split_count(1, 16384) == 132
    assert split_count(1, 1) == 1 and split_count(1, 33) == 2  # no split of fewer than 32 tokens, but the last


def test_float8_error():
    """What float8 itself costs, of N(0, 1) keys and values: 2 to 4 % of the output."""
    q, keys, values, position = inputs((4, 4, 4, 64, 256, 255), torch.float64)
    got = reference(q, keys.to(FLOAT8), values.to(FLOAT8), position)
    assert 0.02 < error(got, exact(q, keys, values, position)) < 0.08


@pytest.mark.parametrize("device", DEVICES)
def test_scale(device):
    """scale replaces D^-1/2; 0 is the mean of the values."""
    q, keys, values, position = inputs((2, 4, 2, 64, 70, 65), torch.float32, device=device)
    got = decode_attention(q, keys, values, position, scale=0.0, max_length=70)
    mean = values[:, :66].double().mean(1).repeat_interleave(2, 1)
    assert error(got, mean.cpu()) < 1e-6
    doubled = decode_attention(2 * q, keys, values, position, scale=0.5 * 64**-0.5, max_length=70)
    torch.testing.assert_close(doubled, decode_attention(q, keys, values, position, max_length=70))


@pytest.mark.parametrize("device", DEVICES)
def test_large_scores(device):
    """Scores of ±3000: exp must not overflow."""
    q, keys, values, position = inputs((1, 2, 2, 64, 70, 65), torch.float32, device=device)
    arguments = (1000 * q, keys, values, position)
    assert error(decode_attention(*arguments, max_length=70), exact(*arguments)) < 1e-3
    assert error(interpreted_or_cuda(*arguments), exact(*arguments)) < 1e-3


@pytest.mark.parametrize("device", DEVICES)
def test_nan_shows(device):
    """A NaN that is attended to must not vanish in a maximum."""
    for index in (0, 1, 2):
        arguments = inputs((1, 2, 1, 64, 70, 65), torch.float32, device=device)
        arguments[index][..., -1, -1] = torch.nan
        if index:
            arguments[index][0, 65] = torch.nan
        assert decode_attention(*arguments, max_length=70)[0, -1].isnan().any()
        assert interpreted_or_cuda(*arguments)[0, -1].isnan().any()


@pytest.mark.needs_cuda
def test_same_bits_every_time():
    arguments = inputs((2, 16, 4, 64, 600, 577), torch.bfloat16, device="cuda")
    first = decode_attention(*arguments, max_length=600)
    assert all(torch.equal(decode_attention(*arguments, max_length=600), first) for _ in range(10))


@pytest.mark.parametrize("device", DEVICES)
def test_zero_rows(device):
    arguments = inputs((0, 4, 2, 32, 5, 3), torch.bfloat16, device=device)
    assert decode_attention(*arguments, max_length=5).shape == (0, 4, 32)
    assert reference(*arguments).shape == (0, 4, 32)


@pytest.mark.parametrize("device", DEVICES)
def test_strided_query(device):
    q, keys, values, position = inputs((3, 4, 2, 32, 70, 65), torch.float32, device=device)
    strided = torch.stack((q, q), dim=-1)[..., 0]
    got = decode_attention(strided, keys, values, position, max_length=66)
    assert got.is_contiguous()
    torch.testing.assert_close(got, decode_attention(q, keys, values, position, max_length=66))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("cache_dtype", [None, FLOAT8])
def test_registration(cache_dtype, device):
    """The schema, the fake and tracing; the first and last of these compare as torch cannot in float8."""
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    tests = tests[1:3] if cache_dtype == FLOAT8 else tests
    arguments = (*inputs((2, 4, 2, 32, 5, 4), torch.bfloat16, cache_dtype, device=device), 0.2, 5)
    torch.library.opcheck(torch.ops.fastlatent.decode_attention.default, arguments, test_utils=tests)


@pytest.mark.parametrize("device", DEVICES)
def test_compiles_whole(device):
    arguments = inputs((2, 4, 2, 32, 5, 3), torch.bfloat16, device=device)
    compiled = torch.compile(decode_attention, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*arguments, max_length=5), decode_attention(*arguments, max_length=5))


def test_other_devices_use_the_reference():
    arguments = inputs((2, 4, 2, 32, 5, 3), torch.bfloat16, device="meta")
    assert decode_attention(*arguments, max_length=5).shape == (2, 4, 32)
    keys = ("CompositeExplicitAutograd", "CPU", "CUDA")
    assert all(torch._C._dispatch_has_kernel_for_dispatch_key("fastlatent::decode_attention", key) for key in keys)


@pytest.mark.needs_cuda
def test_cuda_runs_triton(monkeypatch):
    from fastlatent.kernels import decode_attention as kernels

    launched, original = [], kernels.decode_attention_triton
    monkeypatch.setattr(kernels, "decode_attention_triton", lambda *args: launched.append(1) or original(*args))
    decode_attention(*inputs((2, 4, 2, 32, 5, 3), torch.bfloat16, device="cuda"), max_length=5)
    assert launched == [1]


Q, KEYS, VALUES, POSITION, MAX_LENGTH = range(5)
CACHE = (2, 5, 2, 32)
WRONG = {
    "q rank": (Q, torch.zeros(2, 128), r"q \[2, a multiple of 2, 32\]"),
    "q rows": (Q, torch.zeros(3, 4, 32), r"q \[2, a multiple of 2, 32\]"),
    "no heads": (Q, torch.zeros(2, 0, 32), r"q \[2, a multiple of 2, 32\]"),
    "q heads": (Q, torch.zeros(2, 3, 32), r"q \[2, a multiple of 2, 32\]"),
    "q head size": (Q, torch.zeros(2, 4, 64), r"q \[2, a multiple of 2, 32\]"),
    "q dtype": (Q, torch.zeros(2, 4, 32).to(FLOAT8), r"float64, got .*torch\.float8_e4m3fn"),
    "q device": (Q, torch.zeros(2, 4, 32, device="meta"), r"keys on meta like q, got .*cpu"),
    "q gradient": (Q, torch.zeros(2, 4, 32, requires_grad=True), r"got q that requires grad"),
    "keys rank": (KEYS, torch.zeros(2, 5, 64), r"contiguous keys \[R, N, Hkv, D"),
    "keys dtype": (KEYS, torch.zeros(CACHE, dtype=torch.int8), r"contiguous keys .* got .*torch\.int8"),
    "keys layout": (KEYS, torch.zeros(2, 2, 5, 32).transpose(1, 2), r"contiguous keys .*strides"),
    "values shape": (VALUES, torch.zeros(2, 5, 1, 32), r"values like keys \[2, 5, 2, 32\]"),
    "values dtype": (VALUES, torch.zeros(CACHE).half(), r"values like keys .* got .*torch\.float16"),
    "values device": (VALUES, torch.zeros(CACHE, device="meta"), r"values on cpu .* got .*meta"),
    "position shape": (POSITION, torch.tensor([3, 3]), r"position \[1\] of torch\.int64"),
    "position dtype": (POSITION, torch.tensor([3.0]), r"position .* got .*torch\.float32"),
    "position before the start": (POSITION, torch.tensor([-1]), r"from 0 to max_length - 1 = 3, got -1"),
    "position after max_length": (POSITION, torch.tensor([4]), r"from 0 to max_length - 1 = 3, got 4"),
    "no length": (MAX_LENGTH, 0, r"max_length from 1 to N = 5, got 0"),
    "more tokens than the cache": (MAX_LENGTH, 6, r"max_length from 1 to N = 5, got 6"),
}


@pytest.mark.parametrize("case", WRONG)
def test_rejects(case):
    index, wrong, message = WRONG[case]
    arguments = [*inputs((2, 4, 2, 32, 5, 3), torch.float32), 4]
    arguments[index] = wrong
    with pytest.raises(ValueError, match=f"^decode_attention: expected .*{message}"):
        decode_attention(*arguments[:4], max_length=arguments[4])


def test_compiles_for_hopper(hopper):
    """Ahead of time and without a GPU: no spills, 16-byte loads, and the tensor cores for groups."""
    one, group = hopper("decode_attention", "bf16 D128 16/16 512 rows", "fp8e4nv D64 16/4 2 rows")
    for row in (one, group):
        # 80 registers keep 6 of these programs of 128 threads on an SM.
        assert row["registers"] <= 80 and row["spilled"] == 0, row["case"]
    assert one["sass"]["LDG.128"] >= 4 and one["sass"]["HMMA"] == 0
    assert group["sass"]["LDGSTS"] > 0 and group["sass"]["HMMA"] > 0
