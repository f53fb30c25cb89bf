"""Values of a cache ⇄ values of a dataset: scaling undone or applied, dtypes changed, with one rounding."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastlatent.config import ConvertConfig
from fastlatent.store.rows import DTYPES as STORED
from fastlatent.store.statistics import to_float64
from fastlatent.workflows.latent_scaling import read_scaling

FLAGS = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}


@dataclass(frozen=True)
class Scaling:
    """raw = stored·std + mean; float64 [] or [C]. known: whether `raw` then means what the autoencoder gives."""

    mean: np.ndarray
    std: np.ndarray
    known: bool = True

    @classmethod
    def of(cls, factor: float, shift: float) -> Scaling:
        return cls(np.float64(shift), np.float64(1 / factor))

    @cached_property
    def is_identity(self) -> bool:
        return bool((self.std == 1).all() and (self.mean == 0).all())

    @property
    def factors(self) -> tuple[float, float] | None:
        """(factor, shift) of stored = (raw - shift) * factor; None where channels differ or nothing is known."""
        return (float(1 / self.std), float(self.mean)) if self.known and not self.std.ndim + self.mean.ndim else None

    def record(self) -> dict[str, Any]:
        """For provenance, which `recorded` reads back."""
        return {"mean": self.mean.tolist(), "std": self.std.tolist()} if self.known else {"values": "unknown"}

    @classmethod
    def recorded(cls, value: dict[str, Any]) -> Scaling:
        if "std" not in value:
            return UNKNOWN
        return cls(np.array(value["mean"], np.float64), np.array(value["std"], np.float64))


UNKNOWN = Scaling(np.float64(0), np.float64(1), known=False)


def settle_scaling(
    config: ConvertConfig, asked: tuple[float, float] | None, payload: str, channels: int, what: str
) -> Scaling:
    """What the flags, the format or the autoencoder say, in this order.

    Args:
        asked: (factor, shift) of the format, None where its files do not tell.
        what: the format, for messages.

    Raises:
        ValueError: nothing says it; or values are scaled that are no latents.
    """
    if config.scaling_factor == "unknown":
        return UNKNOWN
    if config.scaling_factor != "auto":
        scaling = Scaling.of(float(config.scaling_factor), config.shift_factor)
    elif asked is not None:
        scaling = Scaling.of(*asked)
    elif config.vae is not None:
        mean, std = read_scaling(Path(config.vae), channels, f"scaled latents of {what}")
        scaling = Scaling(mean.numpy(), std.numpy())
    else:
        raise ValueError(
            f"{what}: its files do not say how latents are scaled; say --vae PATH (whose config has the factors), "
            "--scaling-factor X [--shift-factor Y] (stored = (raw - Y) * X; 0.18215 of SD 1.x, 0.13025 of SDXL, 0.3611 "
            "and 0.1159 of Flux; 1 where values are raw), or --scaling-factor unknown to keep them as they are"
        )
    if payload != "latents" and not scaling.is_identity:
        raise ValueError(f"--scaling-factor: expected 1 for {payload}, which are stored as the encoder gives them")
    return scaling


def stored_dtype(asked: str, dtype: str, scaling: Scaling) -> str:
    """As which the dataset stores values of `dtype`: float32 where scaling would round half precision again."""
    if asked != "auto":
        return FLAGS[asked]
    return dtype if dtype in STORED.values() and scaling.is_identity else "F32"


def to_raw(values: np.ndarray, dtype: str, scaling: Scaling, stored: str) -> np.ndarray:
    """[F, C, ...] of a cache → as a dataset stores them; the same bits where nothing is to be done."""
    if dtype == stored and scaling.is_identity:
        return values
    exact = to_float64(values, dtype)
    if not scaling.is_identity:
        exact = exact * _channels(scaling.std, exact) + _channels(scaling.mean, exact)
    return cast(exact, stored)


def to_scaled(values: np.ndarray, dtype: str, scale: np.ndarray | None, scaling: Scaling, target: str) -> np.ndarray:
    """[F, C, ...] of a dataset (scale: of int8) → as the cache has them; the inverse of `to_raw`."""
    if dtype == target and scale is None and scaling.is_identity:
        return values
    exact = to_float64(values, dtype, scale)
    if not scaling.is_identity:
        exact = (exact - _channels(scaling.mean, exact)) / _channels(scaling.std, exact)
    return cast(exact, target)


def cast(exact: np.ndarray, dtype: str) -> np.ndarray:
    """float64 → dtype, rounded to nearest even; uint16 for BF16. Values too large become infinite."""
    if dtype == "F64":
        return exact
    if dtype == "BF16":
        return torch.from_numpy(exact.astype(np.float32)).to(torch.bfloat16).view(torch.uint16).numpy()
    with np.errstate(over="ignore"):
        return exact.astype({"F16": np.float16, "F32": np.float32}[dtype])


def _channels(per_channel: np.ndarray, values: np.ndarray) -> np.ndarray:
    """[] or [C] against [F, C, ...]."""
    return per_channel.reshape(-1, *[1] * (values.ndim - 2)) if per_channel.ndim else per_channel
