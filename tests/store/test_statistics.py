import json
import math

import numpy as np
import pytest

from fastlatent.store import statistics as module
from fastlatent.store.rows import finite_rows
from fastlatent.store.statistics import Statistics


def stored(dtype: str, shape: tuple[int, ...], seed=0) -> tuple[np.ndarray, np.ndarray]:
    """Moments as they are stored, and the same values in fp64."""
    values = np.random.default_rng(seed).normal(3.0, 2.0, shape).astype(np.float32)
    if dtype == "BF16":
        bits = (values.view(np.uint32) >> 16).astype(np.uint16)
        return bits, (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    moments = values.astype({"F16": np.float16, "F32": np.float32}[dtype])
    return moments, moments.astype(np.float64)


def two_pass(values: np.ndarray) -> dict[str, np.ndarray]:
    channels = values.shape[2] // 2
    means = np.moveaxis(values[:, :, :channels], 2, 0).reshape(channels, -1)
    logvars = np.moveaxis(values[:, :, channels:], 2, 0).reshape(channels, -1)
    variance = np.exp(np.clip(logvars, -30, 20)).mean(1)
    return {
        "count": means.shape[1], "mean": means.mean(1), "m2": ((means - means.mean(1, keepdims=True)) ** 2).sum(1),
        "posterior_variance": variance, "min": means.min(1), "max": means.max(1), "abs_max": np.abs(means).max(1),
        "latent_mean": means.mean(1), "latent_std": np.sqrt(means.var(1) + variance),
    }  # fmt: skip


@pytest.mark.parametrize("dtype", ["F16", "F32", "BF16"])
@pytest.mark.parametrize(
    "shape",
    [
        (1, 1, 2, 1, 1),  # one value a channel: m2 is zero
        (7, 2, 8, 3, 5),  # sizes that are no powers of two
        (300, 1, 64, 16, 16),  # many chunks of 1 MiB, the last one short
    ],
)
def test_equal_to_a_two_pass_computation(dtype, shape):
    moments, values = stored(dtype, shape)
    statistics = Statistics.of(moments, dtype)
    for name, expected in two_pass(values).items():
        np.testing.assert_allclose(getattr(statistics, name), expected, rtol=1e-12, err_msg=name)


def test_merge_of_units_is_the_statistics_of_all():
    parts = [stored("F16", (n, 1, 4, 3, 3), seed=n)[0] for n in (1, 5, 2)]
    merged = Statistics.of(parts[0], "F16")
    for part in parts[1:]:
        merged = merged.merge(Statistics.of(part, "F16"))
    for name, expected in two_pass(np.concatenate(parts).astype(np.float64)).items():
        np.testing.assert_allclose(getattr(merged, name), expected, rtol=1e-12, err_msg=name)


def test_a_large_mean_does_not_eat_the_variance():
    # The sum of squares would lose all 16 digits here: 1e8 squared is 1e16, the variance is 1.
    values = 1e8 + np.resize(np.array([-1.0, 1.0], np.float32), (4096, 1, 2, 16, 16)).astype(np.float32) * 8
    statistics = Statistics.of(values.astype(np.float32), "F32")
    np.testing.assert_allclose(statistics.m2 / statistics.count, 64.0, rtol=1e-12)


def test_logvar_is_clamped_as_by_the_autoencoders():
    moments = np.zeros((1, 1, 2, 1, 2), np.float16)
    moments[0, 0, 1, 0] = 60_000, -60_000  # exp(60000) is infinite in fp64
    expected = (np.exp(20.0) + np.exp(-30.0)) / 2
    np.testing.assert_allclose(Statistics.of(moments, "F16").posterior_variance, expected, rtol=1e-15)


def test_json_gives_the_same_bits_back():
    statistics = Statistics.of(stored("F16", (5, 1, 6, 3, 3))[0], "F16")
    again = Statistics.from_dict(json.loads(json.dumps(statistics.to_dict())), "a file")
    assert json.dumps(again.to_dict()) == json.dumps(statistics.to_dict())


@pytest.mark.parametrize(
    "change",
    [
        {"count": 0}, {"count": True}, {"mean": [1.0]}, {"mean": "x"}, {"m2": [1, 2, 3]}, {"max": [1.0, 2.0, None]},
        {"min": [0.0, 0.0, float("inf")]}, {"abs_max": [0.0, 0.0, float("nan")]},
    ],
)  # fmt: skip
def test_from_dict_refuses(change):
    value = Statistics.of(stored("F16", (5, 1, 6, 3, 3))[0], "F16").to_dict()
    with pytest.raises(ValueError, match="a file"):
        Statistics.from_dict({**value, **change}, "a file")
    for name in value:
        with pytest.raises(ValueError, match=name):
            Statistics.from_dict({key: one for key, one in value.items() if key != name}, "a file")


ARRAYS = ("mean", "m2", "posterior_variance", "min", "max", "abs_max")


def random_values(dtype: str, shape: tuple[int, ...], scales: tuple[int, ...] = ()):
    """Values as they are stored, their scale, and what they mean in fp64."""
    generator = np.random.default_rng(len(shape) * shape[-1])
    if dtype != "I8":
        values, wide = stored(dtype, shape)
        return values, None, wide
    values, scale = generator.integers(-127, 128, shape, np.int8), generator.random(scales, np.float32) / 32
    wide = scale.astype(np.float64).reshape(*scales, *[1] * (len(shape) - len(scales)))
    return values, scale, values * wide


def exact(values: np.ndarray, payload: str) -> dict[str, np.ndarray]:
    """Of fp64 values, every sum rounded once (math.fsum)."""
    axis = -1 if payload == "tokens" else 2
    channels = np.moveaxis(values, axis, 0).reshape(values.shape[axis], -1)
    half = len(channels) // 2 if payload == "moments" else len(channels)
    means, logvars = channels[:half], channels[half:]
    mean = np.array([math.fsum(one) / len(one) for one in means])
    m2 = [math.fsum(((one - middle) ** 2).tolist()) for one, middle in zip(means, mean, strict=True)]
    variance = [math.fsum(math.exp(min(max(x, -30), 20)) for x in one) / len(one) for one in logvars.tolist()]
    low, high = means.min(1), means.max(1)
    variance = variance or [0.0] * half
    return dict(zip(ARRAYS, (mean, m2, variance, low, high, np.maximum(abs(low), abs(high))), strict=True))


def check(values, dtype, payload, scale, wide):
    found, truth = Statistics.of(values, dtype, payload, scale), exact(wide, payload)
    assert found.count == wide.size // wide.shape[-1 if payload == "tokens" else 2]
    for name in ("min", "max", "abs_max"):
        np.testing.assert_array_equal(getattr(found, name), truth[name], err_msg=name)
    # A mean near zero is a sum of numbers that cancel: relative to the largest of them.
    np.testing.assert_allclose(found.mean, truth["mean"], rtol=0, atol=1e-14 * np.abs(wide).max())
    for name in ("m2", "posterior_variance"):
        np.testing.assert_allclose(getattr(found, name), truth[name], rtol=1e-13, err_msg=name)


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32", "I8"])
@pytest.mark.parametrize(
    "payload, shape, axes",
    [
        ("latents", (1, 1, 1, 1, 1), 2),  # one value
        ("latents", (3, 2, 5, 7), 3),  # fewer values of a channel than lanes; a scale for each channel
        ("latents", (1, 1, 3, 8), 2),  # lanes without a rest
        ("latents", (1, 2, 3, 3, 3), 2),  # lanes and a rest
        ("latents", (7, 1, 2, 31, 33), 3),  # two rows to a tile of 2048, a part of a vector each; the last alone
        ("latents", (2, 1, 2, 1, 2048), 2),  # a tile of one row
        ("latents", (2, 1, 2, 1, 4099), 3),  # a row longer than two tiles
        ("latents", (70, 1, 3), 2),  # no positions: channels side by side, as tokens have them
        ("latents", (70, 1, 3), 3),  # the same with a scale for each channel
        ("moments", (37, 2, 2), 2),
        ("moments", (5, 2, 6, 3, 3), 3),
        ("moments", (33, 1, 130), 2),  # 65 means and 65 logvars side by side: blocks of 64 and 1 of each
        ("tokens", (1, 1, 1, 1), 3),  # one value
        ("tokens", (2, 1, 17, 9), 3),  # 34 tokens: a tile of 32 and one of 2; 9 channels: a vector and a rest
        ("tokens", (2, 1, 17, 9), 2),  # a scale for each row
        ("tokens", (3, 1, 11, 64), 2),  # a block of channels
        ("tokens", (3, 2, 6, 131), 3),  # two blocks and a rest
        ("tokens", (33, 70), 1),  # ragged tokens, one after another
    ],
)
def test_equal_to_exactly_rounded_sums(dtype, payload, shape, axes):
    values, scale, wide = random_values(dtype, shape, shape[:axes])
    check(values, dtype, payload, scale, wide)


@pytest.mark.parametrize("payload, shape", [("tokens", (50, 1, 40, 8)), ("moments", (50, 2, 8, 5, 5))])
def test_bits_do_not_depend_on_threads_or_alignment(monkeypatch, payload, shape):
    monkeypatch.setattr(module, "CHUNK_BYTES", 4096)  # many chunks
    values, _, _ = random_values("F32", shape)
    wanted = Statistics.of(values, "F32", payload).to_dict()
    for threads in (1, 3):
        monkeypatch.setattr(module, "THREADS", threads)
        assert Statistics.of(values, "F32", payload).to_dict() == wanted
    space = bytearray(values.nbytes + 1)  # as in a mapped file: at an odd address, read-only
    space[1:] = values.tobytes()
    odd = np.frombuffer(bytes(space), np.uint8)[1:].view(np.float32).reshape(shape)
    assert odd.ctypes.data % 4 and not odd.flags.writeable
    assert Statistics.of(odd, "F32", payload).to_dict() == wanted
    turned = np.asfortranarray(values)
    assert Statistics.of(turned, "F32", payload).to_dict() == wanted


def test_extremes_of_the_dtypes():
    big = np.finfo(np.float32).max  # its square is 1e77: no overflow in fp64
    values = np.array([big, -big, -0.0, 1e-45, -1e-45, 0.0, 1.0, 2.0], np.float32).reshape(1, 1, 1, 8)
    check(values, "F32", "latents", None, values.astype(np.float64))
    tiny = np.arange(2048, dtype=np.uint16).view(np.float16).reshape(1, 1, 2, 1024)  # channel 0: all subnormals
    check(tiny, "F16", "latents", None, tiny.astype(np.float64))
    zeros = Statistics.of(np.full((2, 1, 1, 8), -0.0, np.float16), "F16", "latents")
    assert zeros.mean == zeros.m2 == zeros.min == zeros.max == zeros.abs_max == 0


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_every_finite_half_is_read_exactly(dtype):
    bits = np.arange(1 << 16, dtype=np.uint16)
    bits = bits[bits & (0x7C00 if dtype == "F16" else 0x7F80) != (0x7C00 if dtype == "F16" else 0x7F80)]
    wide = bits.view(np.float16) if dtype == "F16" else (bits.astype(np.uint32) << 16).view(np.float32)
    values = (bits.view(np.float16) if dtype == "F16" else bits).reshape(1, 1, -1)  # one value a channel
    found = Statistics.of(values, dtype, "latents")
    for name in ("mean", "min", "max"):
        np.testing.assert_array_equal(getattr(found, name), wide.astype(np.float64))


def test_exponentials_within_2_ulps():
    generator = np.random.default_rng(0)
    edges = [-30, 20, 0.0, -0.0, 1e-30, -1e-30, math.log(2) / 2, -math.log(2) / 2, -31, 21, -3e38, 3e38]
    logvars = np.concatenate([edges, generator.uniform(-30, 20, 200_000), generator.normal(0, 1, 50_000)])
    logvars = logvars.astype(np.float32)
    moments = np.concatenate([np.zeros_like(logvars), logvars]).reshape(1, 1, -1)  # one value a channel: no sum
    found = Statistics.of(moments, "F32").posterior_variance
    truth = np.exp(np.clip(logvars.astype(np.longdouble), -30, 20))  # 64 bits of mantissa or more
    assert (abs(found - truth) / np.spacing(truth.astype(np.float64))).max() < 1.5  # 0.97 were seen


@pytest.mark.parametrize(
    "payload, shape", [("latents", (3, 1, 2, 20)), ("tokens", (3, 1, 5, 9)), ("moments", (3, 1, 2, 9))]
)
@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_what_is_not_finite_shows_in_its_channel(payload, shape, bad):
    values, _, _ = random_values("F32", shape)
    values[1].flat[0] = bad  # of channel 0
    assert not np.isfinite(Statistics.of(values, "F32", payload).mean[0])


def test_a_large_mean_of_random_values():
    # Tiles whose means differ: the squares of their differences keep their digits.
    values = (1e7 + np.random.default_rng(0).integers(-9, 10, (300, 1, 2, 8, 8))).astype(np.float32)
    for payload, some in (("latents", values), ("tokens", values.reshape(300, 1, -1, 4))):
        statistics, truth = Statistics.of(some, "F32", payload), exact(some.astype(np.float64), payload)
        np.testing.assert_allclose(statistics.m2, truth["m2"], rtol=1e-13)
        np.testing.assert_allclose(statistics.mean, truth["mean"], rtol=1e-15)


NOT_FINITE = {
    "F16": (np.uint16, (0x7C00, 0xFC00, 0x7C01, 0xFFFF), (0x7BFF, 0xFBFF, 0x0001, 0x8000)),
    "BF16": (np.uint16, (0x7F80, 0xFF80, 0x7F81, 0xFFFF), (0x7F7F, 0xFF7F, 0x0001, 0x8000)),
    "F32": (np.uint32, (0x7F800000, 0xFF800000, 0x7F800001, 0xFFFFFFFF), (0x7F7FFFFF, 0xFF7FFFFF, 1, 1 << 31)),
}


@pytest.mark.parametrize("dtype", NOT_FINITE)
@pytest.mark.parametrize("length", [1, 31, 32, 4096, 4097, 10_000])  # part of a vector, one, one look, more of them
def test_finite_rows(dtype, length):
    kind, bad, good = NOT_FINITE[dtype]
    places = [*{0, length // 2, length - 1}]
    rows = np.full((len(bad) * len(places) + 2, length), good[0], kind)
    rows[-1] = np.resize(np.array(good, kind), length)
    for i, (bits, place) in enumerate((bits, place) for bits in bad for place in places):
        rows[i, place] = bits
    expected = np.arange(len(rows)) >= len(rows) - 2
    values = rows.view(np.float16 if dtype == "F16" else np.float32 if dtype == "F32" else np.uint16)
    for some in (values, list(values), values.reshape(len(rows), 1, length), values[:, ::-1]):
        found = finite_rows(some, dtype)
        assert found.dtype == bool
        np.testing.assert_array_equal(found, expected)


def test_finite_rows_of_different_lengths():
    rows = [np.ones(3, np.float32), np.empty((0, 2), np.float32), np.array([[np.nan]], np.float32)]
    assert finite_rows(rows, "F32").tolist() == [True, True, False]
    odd = np.frombuffer(b"x" + np.array([1, np.inf], np.float32).tobytes(), np.uint8)[1:].view(np.float32)
    assert finite_rows([odd[:1], odd[1:]], "F32").tolist() == [True, False]
    assert finite_rows([], "F16").shape == finite_rows(np.empty((0, 4), np.float16), "F16").shape == (0,)
