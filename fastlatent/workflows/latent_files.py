"""The files that `sample` writes and `decode` and `inspect` read: model latents and what is needed to undo them."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from fastlatent.store.files import write_atomic

FORMAT = "fastlatent-latents/1"


@dataclass(frozen=True)
class LatentFile:
    """Sampled latents.

    Attributes:
        latents: [B, N, C] before de-normalisation, N tokens in raster order of a square grid.
        labels: int64 [B]; −1 where there are none.
        latents_mean, latents_std: raw = latents·std + mean, per channel or for all.
        vae: identity and path of the autoencoder that made the training latents, if known.
        classes: names of the labels, if known.
        conditions: what the samples were conditioned on, repeated in order; [] if nothing.
    """

    latents: Tensor
    labels: Tensor
    latents_mean: float | list[float]
    latents_std: float | list[float]
    vae: dict[str, Any] | None
    classes: list[str]
    conditions: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    def raw(self) -> Tensor:
        """float32 [B, C, side, side], what the autoencoder decodes."""
        side = math.isqrt(self.latents.shape[1])
        mean, std = (torch.tensor(v, dtype=torch.float64) for v in (self.latents_mean, self.latents_std))
        return (self.latents.double() * std + mean).float().transpose(1, 2).unflatten(-1, (side, side))

    def names(self) -> list[str]:
        """The class name of each sample, or its number; without classes its conditions, or which sample it is."""
        if self.conditions:
            return [json.dumps(self.conditions[i % len(self.conditions)]) for i in range(len(self.labels))]
        if len(self.labels) and int(self.labels.max()) < 0:
            return [f"sample {i}" for i in range(len(self.labels))]
        return [self.classes[label] if self.classes else str(label) for label in self.labels.tolist()]

    def write(self, path: Path) -> None:
        """Write as safetensors, in one go; the same latents give the same bytes."""
        values = dataclasses.asdict(self)
        tensors = {name: values.pop(name).contiguous() for name in ("latents", "labels")}
        path.parent.mkdir(parents=True, exist_ok=True)
        # One entry: safetensors writes several in an order that changes from process to process.
        write_atomic(path, save(tensors, metadata={FORMAT: json.dumps(values)}))


def read_latent_file(path: Path) -> LatentFile:
    """Read what LatentFile.write wrote.

    Raises:
        ValueError: the file is damaged or something else.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if FORMAT not in metadata:
                raise ValueError(
                    f"{path}: expected latents written by `fastlatent sample` (metadata {FORMAT}), got metadata "
                    f"{', '.join(sorted(metadata)) or 'of none'}"
                )
            tensors = {name: file.get_tensor(name) for name in ("latents", "labels")}
    except SafetensorError as error:
        raise ValueError(f"{path}: not a readable safetensors file: {error}") from None
    latents, labels = tensors["latents"], tensors["labels"]
    if latents.ndim != 3 or math.isqrt(latents.shape[1]) ** 2 != latents.shape[1] or not latents.numel():
        raise ValueError(f"{path}: expected latents [B, N, C] with N a square number, got {list(latents.shape)}")
    if labels.shape != latents.shape[:1]:
        raise ValueError(f"{path}: expected {len(latents)} labels, one per sample, got {list(labels.shape)}")
    if not all(bool(part.isfinite().all()) for part in latents.split(1024)):  # they are on disk, not in memory
        raise ValueError(f"{path}: its latents hold NaN or infinity; sample again")
    try:
        read = LatentFile(**tensors, **json.loads(metadata[FORMAT]))
        if not isinstance((read.vae or {}).get("path"), str | None):
            raise ValueError("vae: expected a path")
        dataclasses.replace(read, latents=latents[:1]).raw()  # do the factors fit?
        classes = len(read.classes)
        if classes and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
            raise ValueError(f"expected labels from 0 to {classes - 1} (its classes), got others")
        read.names()
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path}: its provenance is damaged: {error!r}; sample again") from None
    return read
