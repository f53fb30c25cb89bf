"""Per-channel statistics of the stored rows, in fp64, merged without a second pass over the data."""

from __future__ import annotations

import functools
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields

import numpy as np

from fastlatent import _native
from fastlatent.store.files import member, natural

THREADS = 4
CHUNK_BYTES = 4 << 20  # of stored values: 1 ms of one thread, 20 times what its Python takes
LOGVAR_RANGE = (-30.0, 20.0)  # every latent-diffusion autoencoder clamps to it before exp(logvar)
# How NumPy holds what may be stored, and the compiled functions' codes of what comes without a scale.
STORED = {"F16": np.float16, "BF16": np.uint16, "F32": np.float32, "I8": np.int8}
DTYPE_CODES = {
    "F16": _native.DTYPE_CODES["float16"],
    "BF16": _native.DTYPE_CODES["bfloat16"],
    "F32": _native.DTYPE_CODES["float32"],
}


@dataclass(frozen=True, eq=False)
class Statistics:
    """Per latent channel, over rows, mirrors and positions.

    Attributes:
        count: values per channel.
        mean, m2: float64 [C] of the posterior means: their mean, and the sum of squared distances from it.
        posterior_variance: float64 [C], the mean of exp(logvar), logvar clamped to [-30, 20]; 0 without logvar.
        min, max, abs_max: float64 [C] of the posterior means.
    """

    count: int
    mean: np.ndarray
    m2: np.ndarray
    posterior_variance: np.ndarray
    min: np.ndarray
    max: np.ndarray
    abs_max: np.ndarray

    @classmethod
    def of(
        cls,
        values: np.ndarray,
        dtype: str,
        payload: str = "moments",
        scale: np.ndarray | None = None,
    ) -> Statistics:
        """Of stored rows, N >= 1; BF16 comes as uint16, I8 with its scale.

        Args:
            values: moments [N, F, 2C, ...] (mean||logvar on axis 2), latents [N, F, C, ...], or tokens [N, F, n, C];
                rows of ragged tokens one after another, [total, C].
            scale: float32, the first sizes of `values` ([N, F], say): value = int8 * scale.
        """
        assert values.size and values.dtype == STORED[dtype] and (scale is not None) == (dtype == "I8")
        values = np.ascontiguousarray(values)
        channels, inner = (
            (values.shape[-1], 1) if payload == "tokens" else (values.shape[2], math.prod(values.shape[3:]))
        )
        has_logvar = payload == "moments"
        assert not has_logvar or channels % 2 == 0
        means = channels // 2 if has_logvar else channels
        rows, run = values.size // (channels * inner), 1
        if scale is not None:
            scale = np.ascontiguousarray(scale, np.float32)
            run = values.size // scale.size
        # The chunk decides the order of summation, so it depends on the shape of a row alone.
        step = max(1, CHUNK_BYTES // (channels * inner * values.itemsize))

        def part(first: int) -> Statistics:
            last = min(first + step, rows)
            found = np.empty((5, channels))
            scales = None if scale is None else scale.ctypes.data
            sizes = (first, last, channels, inner, run, means, DTYPE_CODES.get(dtype, 0))
            _native.call("cpu", "row_statistics", values.ctypes.data, scales, found.ctypes.data, *sizes)
            mean, m2, low, high, _ = found[:, :means]
            variance = found[0, means:] if has_logvar else np.zeros(means)
            count = (last - first) * inner
            return cls(count, mean, m2, variance, low, high, np.maximum(np.abs(low), np.abs(high)))

        with ThreadPoolExecutor(THREADS) as pool:  # the call lets go of the GIL
            return functools.reduce(cls.merge, pool.map(part, range(0, rows, step)))

    def merge(self, other: Statistics) -> Statistics:
        """Of both together (Chan, Golub, LeVeque 1979). Rounding depends on the order: merge in unit order."""
        count = self.count + other.count
        share = other.count / count
        delta = other.mean - self.mean
        return Statistics(
            count=count,
            mean=self.mean + delta * share,
            m2=self.m2 + other.m2 + delta * delta * (self.count * share),
            posterior_variance=self.posterior_variance + (other.posterior_variance - self.posterior_variance) * share,
            min=np.minimum(self.min, other.min),
            max=np.maximum(self.max, other.max),
            abs_max=np.maximum(self.abs_max, other.abs_max),
        )

    @property
    def latent_mean(self) -> np.ndarray:
        """float64 [C]: the mean of the posterior's samples."""
        return self.mean

    @property
    def latent_std(self) -> np.ndarray:
        """float64 [C]: the std of the posterior's samples, sqrt(Var(mean) + E[variance])."""
        return np.sqrt(self.m2 / self.count + self.posterior_variance)

    def to_dict(self) -> dict[str, object]:
        """As JSON can hold it; float64 values come back bit by bit."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value if name == "count" else value.tolist() for name, value in values.items()}

    @classmethod
    def from_dict(cls, value: object, what: str) -> Statistics:
        """The inverse of `to_dict`; `what` begins the error.

        Raises:
            ValueError: a field is missing, or is not a list of finite numbers, all of one length.
        """
        count = natural(value, "count", what)
        arrays = {}
        for field in fields(cls):
            if field.name != "count":
                numbers = member(value, field.name, list, what)
                if not all(type(number) is float for number in numbers):
                    raise ValueError(f"{what}: {field.name!r}: expected floating-point numbers, got {numbers!r:.100}")
                arrays[field.name] = np.array(numbers, np.float64)
        if count < 1 or len({len(array) for array in arrays.values()}) != 1:
            raise ValueError(f"{what}: expected a count >= 1 and as many values everywhere, got {value!r:.200}")
        if not all(np.isfinite(array).all() for array in arrays.values()):
            raise ValueError(f"{what}: expected finite numbers, got {value!r:.200}")
        if (arrays["m2"] < 0).any() or (arrays["posterior_variance"] < 0).any():
            raise ValueError(f"{what}: expected 'm2' and 'posterior_variance' >= 0, got {value!r:.200}")
        return cls(count=count, **arrays)


def to_float64(stored: np.ndarray, dtype: str, scale: np.ndarray | None = None) -> np.ndarray:
    """Stored values as float64; "BF16" are the upper halves of float32 numbers, "I8" is multiplied by its scale."""
    if dtype == "BF16":
        stored = (stored.astype(np.uint32) << 16).view(np.float32)
    if scale is None:
        return stored.astype(np.float64)
    return stored.astype(np.float64) * scale.reshape(*scale.shape, *[1] * (stored.ndim - scale.ndim))
