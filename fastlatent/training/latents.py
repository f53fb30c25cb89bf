"""The part of a batch that all models of latents share: drawn from the posterior, normalised, with their labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from fastlatent.data.latents import draw_latents
from fastlatent.diffusion.noise import Draws

CONDITION_COLUMNS = ("condition", "condition_present")


class Batches(Protocol):
    """What gives the batch of a step counted from 0: a loader, or what turns its batches into others."""

    @property
    def steps_per_epoch(self) -> int: ...

    @property
    def left_out(self) -> Mapping[str, str]: ...

    def batch(self, step: int) -> dict[str, Any]: ...


class LatentBatches:
    """Batches of latents to train on.

    Args:
        loader: gives moments or latents, of one shape.
        mean, std: [C], float; latents become (raw − mean)/std.
        seed: of posterior noise and mirroring, and of everything drawn with a batch's `draws`.
        conditions: which numbers of the loader's `condition`, and which of `condition_present`, a batch has; all by
            default.
    """

    def __init__(
        self,
        loader: Batches,
        *,
        mean: Tensor,
        std: Tensor,
        seed: int,
        conditions: tuple[Sequence[int], Sequence[int]] | None = None,
    ) -> None:
        self.loader, self.seed = loader, seed
        self._mean, self._std = mean.float().contiguous(), std.float().contiguous()
        self._conditions = None if conditions is None else [torch.tensor(which) for which in conditions]

    @property
    def steps_per_epoch(self) -> int:
        """Steps in which every sample is seen once."""
        return self.loader.steps_per_epoch

    @property
    def left_out(self) -> Mapping[str, str]:
        """Files that this process could not use so far → why."""
        return self.loader.left_out

    def batch(self, step: int) -> dict[str, Any]:
        """This process's share of a step's batch.

        Returns:
            latents float32 [B, C, H, W]; label int64 [B], −1 for none; draws (`Draws` of these samples); and condition
            float32 [B, numbers] and condition_present float32 [B, names] where the data have them.
        """
        stored = self.loader.batch(step)
        has_logvar = "moments" in stored
        values = stored["moments" if has_logvar else "latents"]
        self._mean, self._std = self._mean.to(values.device), self._std.to(values.device)
        latents = draw_latents(
            values,
            stored["key_hash"],
            seed=self.seed,
            epoch=stored["epoch"],
            scale=stored.get("scale"),
            has_logvar=has_logvar,
            mean=self._mean,
            std=self._std,
        )
        batch: dict[str, Any] = {
            "latents": latents,
            "label": stored["label"],
            "draws": Draws(stored["key_hash"], self.seed, stored["epoch"]),
        }
        if "condition" in stored:
            batch |= {name: stored[name] for name in CONDITION_COLUMNS}
            if self._conditions is not None:
                self._conditions = [which.to(values.device) for which in self._conditions]
                for name, which in zip(CONDITION_COLUMNS, self._conditions, strict=True):
                    batch[name] = stored[name].index_select(1, which)
        return batch
