"""Per-channel statistics of the stored rows, in fp64, merged without a second pass over the data."""

from __future__ import annotations

import functools
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields

import numpy as np

from fastlatent.store.files import member, natural

THREADS = 4
CHUNK_BYTES = 1 << 20  # of stored moments; its fp64 copy is 4 MiB and stays in the cache
LOGVAR_RANGE = (-30.0, 20.0)  # every latent-diffusion autoencoder clamps to it before exp(logvar)


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
        if payload == "tokens":
            values = np.ascontiguousarray(values).reshape(-1, 1, values.shape[-1])
            scale = None if scale is None else _per_token(scale, len(values))
        assert len(values) and (payload != "moments" or values.shape[2] % 2 == 0)
        # The chunk decides the order of summation, so it depends on the shape of a row alone.
        rows = max(1, CHUNK_BYTES // max(1, values[0].nbytes))

        def part(start: int) -> Statistics:
            end = start + rows
            wide = to_float64(values[start:end], dtype, None if scale is None else scale[start:end])
            return cls._of_chunk(wide, payload == "moments")

        with ThreadPoolExecutor(THREADS) as pool:  # numpy lets go of the GIL
            return functools.reduce(cls.merge, pool.map(part, range(0, len(values), rows)))

    @classmethod
    def _of_chunk(cls, values: np.ndarray, has_logvar: bool) -> Statistics:
        flat = values.reshape(*values.shape[:3], -1)  # [n, F, 2C or C, positions]
        means, logvars = np.split(flat, 2, axis=2) if has_logvar else (flat, None)
        axes = (0, 1, 3)
        mean = means.mean(axis=axes)
        low, high = means.min(axis=axes), means.max(axis=axes)
        return cls(
            count=means.size // means.shape[2],
            mean=mean,
            m2=np.square(means - mean[:, None]).sum(axis=axes),
            posterior_variance=(
                np.zeros_like(mean) if logvars is None else np.exp(np.clip(logvars, *LOGVAR_RANGE)).mean(axis=axes)
            ),
            min=low,
            max=high,
            abs_max=np.maximum(np.abs(low), np.abs(high)),
        )

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


def _per_token(scale: np.ndarray, tokens: int) -> np.ndarray:
    """One scale for each of so many tokens, from one for each row or each token."""
    return np.repeat(scale.reshape(-1), tokens // scale.size)[:, None]
