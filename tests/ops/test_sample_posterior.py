import itertools
import math
import re

import numpy as np
import pytest
import torch

from fastlatent import _native
from fastlatent.ops.sample_posterior import MIRROR_BLOCK, philox, sample_posterior, sample_posterior_reference

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.needs_cuda)]
# moments [B, F, 2C, *S]. No spatial axis: an odd row of 3, less than a Philox block, and one of 5 * 3 over one. 5 x 7:
# blocks of 4 cross channels, the last has 3 of them. 257 * 4: one block more than the C++ kernel's chunk of 64 blocks,
# and than Triton's program of 256 in 4 channels. 3 axes: clips. No row, no channel, no element.
SHAPES = [
    (3, 2, 6), (2, 2, 10, 3), (3, 1, 6, 5, 7), (2, 2, 8, 257), (2, 2, 4, 2, 3, 4),
    (0, 2, 4, 3, 3), (2, 1, 0, 4), (2, 2, 4, 0),
]  # fmt: skip
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int8]
SEEDS = [0, 2**64 - 3]  # the second: both words, and the sign of the schema's integer


def inputs(shape, dtype=torch.float32, *, device="cpu", normalise=True, has_logvar=True, per_channel=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    batch, flips, stored = shape[:3]
    channels = stored // 2 if has_logvar else stored
    if dtype == torch.int8:
        moments = torch.randint(-128, 128, shape, generator=generator, dtype=torch.int8)
        scale = torch.rand((batch, flips, stored)[: 3 if per_channel else 2], generator=generator) / 32
    else:
        moments, scale = torch.randn(shape, generator=generator).mul_(2).to(dtype), None
    # Both halves of the range of 64-bit hashes.
    keys = torch.randint(-(2**63), 2**63 - 1, (batch,), generator=generator)
    mean = torch.randn(channels, generator=generator) if normalise else None
    std = torch.rand(channels, generator=generator) + 0.5 if normalise else None
    tensors = {"moments": moments, "key_hash": keys, "mean": mean, "std": std, "scale": scale}
    return {name: None if t is None else t.to(device) for name, t in tensors.items()} | {"has_logvar": has_logvar}


def reference(moments, key_hash, *, seed, epoch, mean=None, std=None, scale=None, has_logvar=True, dtype=torch.float32):
    return sample_posterior_reference(moments, key_hash, seed, epoch, mean, std, scale, has_logvar, dtype)


def triton(moments, key_hash, *, seed, epoch, mean=None, std=None, scale=None, has_logvar=True, dtype=torch.float32):
    from fastlatent.kernels.sample_posterior import sample_posterior_triton

    channels = moments.shape[2] // 2 if has_logvar else moments.shape[2]
    out = moments.new_full((len(moments), channels, *moments.shape[3:]), 7, dtype=dtype)
    sample_posterior_triton(moments, key_hash, seed, epoch, mean, std, scale, has_logvar, out)
    return out


def assert_within_the_bound(got, arguments, *, seed, epoch):
    """4 float32 roundings of |mean| + |noise|, before the normalisation; that adds a rounding of its own twice."""
    with_noise = {**arguments, "mean": None, "std": None}
    want = reference(**with_noise, seed=seed, epoch=epoch).double()
    if not arguments["has_logvar"] or not got.numel():
        size = want.abs()
    else:
        # The same draw of rows with mean 0 is the noise alone: |mean| + |noise|.
        silent = arguments["moments"].clone()
        silent[:, :, : silent.shape[2] // 2] = 0
        noise = reference(**{**with_noise, "moments": silent}, seed=seed, epoch=epoch).double()
        size = (want - noise).abs() + noise.abs()
    bound = 4 * 2.0**-23 * size
    if arguments["mean"] is not None:
        per_channel = (-1,) + (1,) * (want.ndim - 2)
        mean, std = (arguments[name].double().reshape(per_channel) for name in ("mean", "std"))
        want, bound = (want - mean) / std, (bound + 2.0**-22 * (want - mean).abs()) / std
    assert got.shape == want.shape and got.dtype == torch.float32 and got.is_contiguous()
    assert bool(((got.double() - want).abs() <= bound).all())


# --- the generator ---

# Counter, key, result: philox4x32 10 in Random123's file of known answers (kat_vectors).
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN_ANSWERS)
def test_philox_known_answers(counter, key, result):
    counter, key, result = ([int(word, 16) for word in words.split()] for words in (counter, key, result))
    got = philox(tuple(torch.tensor([word]) for word in counter), tuple(key))
    assert [int(word) for word in got] == result


def plain_philox(counter, key):
    """Python's unbounded integers."""
    c, k = list(counter), list(key)
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(b >> 32) ^ c[1] ^ k[0], b % 2**32, (a >> 32) ^ c[3] ^ k[1], a % 2**32]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c


def test_by_hand():
    """One row through the whole definition with Python's own arithmetic: layout of counters, Box-Muller, mirror."""
    seed, epoch, key_hash = 0xFEDCBA9876543210, 0x89ABCDEF, 0x8123456789ABCDEF
    key, call = (seed % 2**32, seed >> 32), (key_hash % 2**32, key_hash >> 32, epoch)
    mirror = plain_philox((MIRROR_BLOCK, *call), key)[0] >> 31
    moments = torch.zeros(1, 2, 6, 3)  # 9 numbers a row: blocks 0, 1 and a quarter of 2
    moments[:, 1, :3] = 100
    moments[:, :, 3:] = 2 * math.log(3)
    want = []
    for block in range(3):
        w = plain_philox((block, *call), key)
        for i in (0, 2):
            r = math.sqrt(-2 * math.log(np.float32(np.float32(w[i]) * np.float32(2**-32) + np.float32(2**-33))))
            t = 2 * math.pi * w[i + 1] / 2**32
            want += [100 * mirror + 3 * r * math.cos(t), 100 * mirror + 3 * r * math.sin(t)]
    want = torch.tensor(want[:9]).reshape(1, 3, 3)
    keys = torch.tensor([key_hash - 2**64])
    for function in (sample_posterior, reference):
        got = function(moments, keys, seed=seed, epoch=epoch)
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


# --- against the reference ---


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("has_logvar", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_is_the_definition(shape, dtype, has_logvar, device, native_calls):
    for i, (normalise, per_channel) in enumerate([(True, False), (False, True)]):
        arguments = inputs(
            shape, dtype, device=device, normalise=normalise, has_logvar=has_logvar, per_channel=per_channel
        )
        got = sample_posterior(**arguments, seed=SEEDS[i], epoch=i * (2**32 - 1))
        assert_within_the_bound(got, arguments, seed=SEEDS[i], epoch=i * (2**32 - 1))
    assert [call[:2] for call in native_calls] == (
        [("cpu", "sample_posterior")] * 2 if device == "cpu" and got.numel() else []
    )


@pytest.mark.parametrize("has_logvar", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_triton_kernel(shape, dtype, has_logvar):
    """The Triton kernel itself, on any machine: interpreted where there is no GPU. Its bits are the C++ kernel's."""
    pytest.importorskip("triton")
    from fastlatent.kernels.sample_posterior import sample_posterior_kernel

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        assert type(sample_posterior_kernel).__name__ == "InterpretedFunction"
    for i, (normalise, per_channel) in enumerate([(True, False), (False, True)]):
        arguments = inputs(shape, dtype, normalise=normalise, has_logvar=has_logvar, per_channel=per_channel)
        on_device = {n: v.to(device) if isinstance(v, torch.Tensor) else v for n, v in arguments.items()}
        got = triton(**on_device, seed=SEEDS[i], epoch=i * (2**32 - 1))
        assert_within_the_bound(got.cpu(), arguments, seed=SEEDS[i], epoch=i * (2**32 - 1))
        assert torch.equal(got.cpu(), sample_posterior(**arguments, seed=SEEDS[i], epoch=i * (2**32 - 1)))


def test_words_are_exactly_philox():
    """Where the reference's integers differ in one bit, z shows it; 2^14 numbers of other keys, epochs and seeds."""
    for seed, epoch in itertools.product((1, 2**32, 2**63 + 1), (0, 2**31)):
        arguments = inputs((3, 2, 2, 37, 73), normalise=False, seed=epoch % 7)
        got = sample_posterior(**arguments, seed=seed, epoch=epoch)
        assert_within_the_bound(got, arguments, seed=seed, epoch=epoch)


@pytest.mark.parametrize("count", [2**14, pytest.param(2**20, marks=pytest.mark.soak)])
def test_noise_and_deviation_are_accurate(count):
    """z within 4 units in its own last place, near the zeros of sine and cosine too; exp(logvar / 2) within 2."""
    keys = torch.arange(16) * 0x1234567890ABCDEF
    z = sample_posterior(torch.zeros(16, 1, 2, count), keys, seed=1, epoch=2).double()
    low, high = (keys & 0xFFFFFFFF)[:, None], (keys >> 32 & 0xFFFFFFFF)[:, None]
    w = philox((torch.arange(count // 4)[None], low, high, torch.full_like(low, 2)), (1, 0))
    exact = torch.empty(16, count // 4, 4, dtype=torch.float64)
    for i in (0, 2):
        uniform = torch.from_numpy(w[i].numpy().astype(np.float32) * np.float32(2**-32) + np.float32(2**-33))
        r, t = (-2 * uniform.double().log()).sqrt(), w[i + 1].double() * (2 * math.pi / 2**32)
        exact[..., i], exact[..., i + 1] = r * t.cos(), r * t.sin()
    exact = exact.reshape(z.shape)
    last_place = torch.from_numpy(np.spacing(exact.abs().float().numpy())).double()
    assert float(((z - exact).abs() / last_place).max()) <= 4

    logvar = torch.linspace(-31, 21, count).expand(16, 1, 1, count)
    moments = torch.cat([torch.zeros_like(logvar), logvar], dim=2)
    ratio = sample_posterior(moments, keys, seed=1, epoch=2).double() / z
    want = (logvar[:, 0].double().clamp(-30, 20) / 2).exp()
    assert float((ratio / want - 1).abs().max()) <= 2 * 2.0**-23


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("device", DEVICES)
def test_no_less_accurate_than_torch(dtype, device):
    """Against plain torch in float32 with the same z, both judged by float64."""
    arguments = inputs((4, 1, 8, 16, 16), dtype, device=device)
    got = sample_posterior(**arguments, seed=1, epoch=2).double()
    silent = torch.zeros_like(arguments["moments"])
    z = sample_posterior(silent, arguments["key_hash"], seed=1, epoch=2)

    def plain(kind):
        mean, logvar = arguments["moments"][:, 0].to(kind).chunk(2, dim=1)
        x = mean + torch.exp(0.5 * logvar.clamp(-30, 20)) * z.to(kind)
        return ((x - arguments["mean"].to(kind)[:, None, None]) / arguments["std"].to(kind)[:, None, None]).double()

    exact = plain(torch.float64)
    assert float((got - exact).norm()) <= 1.5 * float((plain(torch.float32) - exact).norm())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float16])
def test_cast_is_the_rounded_float32(out_dtype, device):
    arguments = inputs((2, 2, 8, 5, 7), torch.float16, device=device)
    want = sample_posterior(**arguments, seed=1, epoch=2).to(out_dtype)
    got = sample_posterior(**arguments, seed=1, epoch=2, out_dtype=out_dtype)
    assert got.dtype == out_dtype and torch.equal(got, want)
    if device == "cuda" or not torch.cuda.is_available():  # compiled there, interpreted here
        pytest.importorskip("triton")
        assert torch.equal(triton(**arguments, seed=1, epoch=2, dtype=out_dtype), want)


# --- what a row depends on ---


@pytest.mark.parametrize("device", DEVICES)
def test_a_row_depends_on_itself_alone(device):
    arguments = inputs((9, 2, 4, 3, 3), device=device)
    together = sample_posterior(**arguments, seed=1, epoch=2)
    order = torch.tensor([4, 8, 0, 2], device=device)
    some = {**arguments, "moments": arguments["moments"][order], "key_hash": arguments["key_hash"][order]}
    assert torch.equal(sample_posterior(**some, seed=1, epoch=2), together[order])


def test_threads_change_nothing():
    arguments = inputs((7, 2, 8, 64, 64), torch.float16)  # 7 rows over 2 and 4 threads
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            results.append(sample_posterior(**arguments, seed=1, epoch=2))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("has_logvar", [True, False])
def test_the_mirror_is_the_same_with_and_without_noise(has_logvar):
    moments = torch.zeros(64, 2, 2, 3)
    moments[:, 1] = 1
    if has_logvar:
        moments[:, :, 1] = -30  # a deviation of 3e-7
    got = sample_posterior(moments, torch.arange(64), seed=5, epoch=1, has_logvar=has_logvar)
    low, zero = torch.arange(64), torch.zeros(64, dtype=torch.int64)
    bits = philox((zero + MIRROR_BLOCK, low, zero, zero + 1), (5, 0))[0] >> 31
    assert torch.equal(got.round(), bits.float().reshape(-1, 1, 1).expand(got.shape))


def test_statistics_of_a_million_draws():
    """Moments of the normal distribution, and independence of neighbours, keys, epochs and seeds: 5 deviations."""
    keys = torch.arange(1000)  # neighbouring keys, which no hash would be
    z = sample_posterior(torch.zeros(1000, 1, 2, 1000), keys, seed=0, epoch=0).double()
    count = z.numel()
    assert abs(float(z.mean())) < 5 / math.sqrt(count)
    assert abs(float(z.var()) - 1) < 5 * math.sqrt(2 / count)
    assert abs(float((z**3).mean())) < 5 * math.sqrt(15 / count)
    assert abs(float((z**4).mean()) - 3) < 5 * math.sqrt(96 / count)
    # Half, 4.55 % and 0.0063 % of them within 0.6745, beyond 2 and beyond 4 deviations.
    for bound, share in ((0.67449, 0.5), (2.0, 0.0455003), (4.0, 6.3342e-5)):
        beyond = float((z.abs() > bound).double().mean())
        assert abs(beyond - share) < 5 * math.sqrt(share / count), bound
    flat = z.flatten()
    # 1, 2, 4: partners in a block, and blocks. 1000: the next key.
    for distance in (1, 2, 3, 4, 1000):
        product, square = flat[:-distance] * flat[distance:], flat[:-distance] ** 2 * flat[distance:] ** 2
        assert abs(float(product.mean())) < 5 / math.sqrt(count), distance
        assert abs(float(square.mean()) - 1) < 5 * math.sqrt(8 / count), distance
    for seed, epoch in ((0, 1), (1, 0), (2**32, 0), (0, 2**31)):
        other = sample_posterior(torch.zeros(1000, 1, 2, 1000), keys, seed=seed, epoch=epoch).double()
        assert abs(float((other * z).mean())) < 5 / math.sqrt(count)


def test_the_mirror_is_fair():
    moments, keys = torch.zeros(100_000, 2, 1), torch.arange(100_000)
    moments[:, 1] = 1
    bits = [sample_posterior(moments, keys, seed=0, epoch=epoch, has_logvar=False).flatten() for epoch in (0, 1)]
    deviation = 0.5 / math.sqrt(100_000)
    for share in (bits[0].mean(), bits[1].mean(), (bits[0] != bits[1]).float().mean()):
        assert abs(float(share) - 0.5) < 5 * deviation
    assert abs(float((bits[0][1:] != bits[0][:-1]).float().mean()) - 0.5) < 5 * deviation


# --- values that are no numbers ---


@pytest.mark.parametrize("device", DEVICES)
def test_nan_and_infinity_pass(device):
    moments = torch.zeros(1, 1, 2, 8)
    moments[0, 0, 0, :3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    # +inf and -inf are clamped to 20 and -30.
    moments[0, 0, 1, 3:] = torch.tensor([torch.nan, torch.inf, -torch.inf, 20, -30])
    keys = torch.tensor([3])
    z = sample_posterior(torch.zeros_like(moments), keys, seed=0, epoch=0)
    want = z * torch.tensor([1, 1, 1, torch.nan, math.exp(10), math.exp(-15), math.exp(10), math.exp(-15)])
    want[0, 0, :3] = moments[0, 0, 0, :3]
    functions = [sample_posterior, reference]
    if device == "cuda" or not torch.cuda.is_available():
        pytest.importorskip("triton")
        functions.append(triton)
    for function in functions:
        got = function(moments.to(device), keys.to(device), seed=0, epoch=0)
        torch.testing.assert_close(got.cpu(), want, rtol=1e-6, atol=0, equal_nan=True)


def test_nan_reaches_every_out_dtype():
    moments, keys = torch.full((1, 1, 2, 4), torch.nan), torch.tensor([3])
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert sample_posterior(moments, keys, seed=0, epoch=0, out_dtype=dtype).isnan().all()
        if not torch.cuda.is_available():
            pytest.importorskip("triton")
            assert triton(moments, keys, seed=0, epoch=0, dtype=dtype).isnan().all()


# --- registration ---


@pytest.mark.parametrize("device", DEVICES)
def test_strided_inputs(device):
    """A batch in another memory order, every second key, a column of a table of statistics."""
    arguments = inputs((4, 2, 6, 3, 5), torch.float16, device=device)
    want = sample_posterior(**arguments, seed=1, epoch=2)
    strided = {
        **arguments,
        "moments": arguments["moments"].transpose(0, 4).contiguous().transpose(0, 4),
        "key_hash": arguments["key_hash"].repeat_interleave(2)[::2],
        "mean": torch.stack((arguments["mean"], arguments["std"]), dim=1)[:, 0],
    }
    assert not any(strided[name].is_contiguous() for name in ("moments", "key_hash", "mean"))
    assert torch.equal(sample_posterior(**strided, seed=1, epoch=2), want)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_registration(dtype, device):
    """The schema, the fake and tracing, with and without each optional part."""
    for has_logvar, out_dtype in ((True, torch.bfloat16), (False, torch.float32)):
        given = inputs((2, 2, 6, 3), dtype, device=device, normalise=has_logvar, has_logvar=has_logvar)
        arguments = (given["moments"], given["key_hash"], 1, 2, given["mean"], given["std"], given["scale"])
        operator = torch.ops.fastlatent.sample_posterior.default
        torch.library.opcheck(operator, (*arguments, has_logvar, out_dtype))


@pytest.mark.parametrize("device", DEVICES)
def test_compiles_whole(device):
    """In one graph, and not again for each epoch."""
    arguments = inputs((2, 2, 6, 3), device=device)
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    compiled = torch.compile(lambda epoch: sample_posterior(**arguments, seed=1, epoch=epoch), backend=backend,
                             fullgraph=True)  # fmt: skip
    for epoch in range(5):
        assert torch.equal(compiled(epoch), sample_posterior(**arguments, seed=1, epoch=epoch))
    assert len(graphs) <= 4  # 0 and 1 are constants to torch.compile, and so is a first number


def test_other_devices_use_the_reference():
    arguments = inputs((2, 2, 6, 3), device="meta")
    assert sample_posterior(**arguments, seed=1, epoch=2).shape == (2, 3, 3)
    keys = ("CompositeExplicitAutograd", "CPU", "CUDA")
    assert all(torch._C._dispatch_has_kernel_for_dispatch_key("fastlatent::sample_posterior", key) for key in keys)


@pytest.mark.needs_cuda
def test_cuda_runs_triton(monkeypatch):
    from fastlatent.kernels import sample_posterior as kernels

    launched, original = [], kernels.sample_posterior_triton
    monkeypatch.setattr(kernels, "sample_posterior_triton", lambda *args: launched.append(1) or original(*args))
    arguments = inputs((5, 2, 8, 64, 64), torch.float16)
    on_device = {name: v.cuda() if isinstance(v, torch.Tensor) else v for name, v in arguments.items()}
    got = sample_posterior(**on_device, seed=1, epoch=2)
    assert launched == [1]
    assert torch.equal(got.cpu(), sample_posterior(**arguments, seed=1, epoch=2))  # the CPU's bits


def test_missing_library_is_an_error(monkeypatch):
    monkeypatch.setattr(_native, "load", lambda backend: None)
    with pytest.raises(RuntimeError, match=r"libfastlatent_cpu\.so"):
        sample_posterior(**inputs((2, 2, 6, 3)), seed=1, epoch=2)


WRONG = {
    "rank": ({"moments": torch.zeros(2, 2)}, r"moments \[B, 1 or 2, channels, \.\.\.\] .* got \[2, 2\]"),
    "flips": ({"moments": torch.zeros(2, 3, 6)}, r"moments \[B, 1 or 2, .* got \[2, 3, 6\]"),
    "moments dtype": ({"moments": torch.zeros(2, 2, 6).double()}, r"int8, got .*float64"),
    "odd channels": ({"moments": torch.zeros(2, 2, 7)}, r"an even axis 2.*has_logvar=False"),
    "too long": ({"moments": torch.zeros(1, 1, 1).expand(2, 2, 2**31)}, r"fewer than 2\^31 numbers a row"),
    "key length": ({"key_hash": torch.zeros(3, dtype=torch.int64)}, r"key_hash \[2\] of torch\.int64, got \[3\]"),
    "key dtype": ({"key_hash": torch.zeros(2, dtype=torch.int32)}, r"key_hash .* got .*int32"),
    "key device": ({"key_hash": torch.zeros(2, dtype=torch.int64, device="meta")}, r"key_hash on cpu like moments"),
    "negative seed": ({"seed": -1}, r"a seed of 0 to 2\^64 - 1, got -1"),
    "seed": ({"seed": 2**64}, r"a seed of 0 to 2\^64 - 1"),
    "negative epoch": ({"epoch": -1}, r"an epoch of 0 to 2\^32 - 1, got -1"),
    "epoch": ({"epoch": 2**32}, r"an epoch of 0 to 2\^32 - 1"),
    "out dtype": ({"out_dtype": torch.float64}, r"out_dtype float32, bfloat16 or float16, got torch\.float64"),
    "no std": ({"std": None}, r"mean and std, both or neither"),
    "mean length": ({"mean": torch.zeros(6)}, r"mean \[3\] of float32, got \[6\]"),
    "std dtype": ({"std": torch.ones(3).double()}, r"std \[3\] of float32, got .*float64"),
    "std device": ({"std": torch.ones(3, device="meta")}, r"std on cpu like moments, got .*meta"),
    "no scale": ({"moments": torch.zeros(2, 2, 6, dtype=torch.int8)}, r"a scale for int8 .* and no scale"),
    "scale": ({"scale": torch.ones(2, 2)}, r"a scale for int8 moments and only for them"),
    "scale shape": (
        {"moments": torch.zeros(2, 2, 6, dtype=torch.int8), "scale": torch.ones(2, 2, 3)},
        r"scale \[2, 2\] or \[2, 2, 6\] of float32, got \[2, 2, 3\]",
    ),
    "moments gradient": ({"moments": torch.zeros(2, 2, 6, requires_grad=True)}, r"got moments that requires grad"),
    "mean gradient": ({"mean": torch.zeros(3, requires_grad=True)}, r"got mean that requires grad"),
}


@pytest.mark.parametrize("case", WRONG)
def test_rejects(case):
    wrong, message = WRONG[case]
    arguments = inputs((2, 2, 6)) | {"seed": 1, "epoch": 2} | wrong
    with pytest.raises(ValueError, match=f"^sample_posterior: expected .*{message}"):
        sample_posterior(**arguments)


def test_compiles_for_hopper(hopper):
    """Ahead of time and without a GPU, one case; tools/kernel_table watches the rest."""
    (row,) = hopper("sample_posterior", "fp16 to bf16, F 2, 16 x 1024, normalised")
    assert row["spilled"] == 0 and row["registers"] <= 64, row
    assert row["shared"] == 0, row  # z is made where it is used: no exchange between threads
    text = row.pop("ptx")
    # The CPU's bits: nothing fused, no subnormal flushed, no approximation in float32.
    assert not re.findall(r"\b(?:fma|\w+(?:\.\w+)*\.(?:ftz|approx|full))\b[.\w]*", text)
    assert "sqrt.rn.f32" in text and "div.rn.f32" in text
