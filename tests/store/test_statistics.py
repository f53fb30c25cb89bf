import json

import numpy as np
import pytest

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
