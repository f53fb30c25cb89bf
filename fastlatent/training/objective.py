"""What the training loop trains: a module whose forward is the whole loss, and the batches that it learns from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn


@dataclass(frozen=True)
class Part:
    """Weights that an optimiser of their own trains (a discriminator): those whose names begin with `prefix`.

    They are not averaged. Before step `begin` they stay as they are; they must get gradients (zeros) even then, because
    the processes that share a batch wait for the gradient of every weight.
    """

    prefix: str
    learning_rate: float
    begin: int


class Objective(Protocol):
    """What differs between the models that the loop trains.

    Attributes:
        module: `module(batch)` → (loss, {name: scalar} to log, detached). All that makes the loss is inside: what
            bypasses its forward would bypass the averaging of gradients. Computes in the weights' dtype, losses and KL
            in float32 or more. Draws nothing at random.
        parts: weights with an optimiser of their own; all others belong to the main one.
        blocks: classes of the repeated layers, which FSDP shards by; none where sharding is not for this objective.
        steps_per_epoch: steps in which every sample is seen once.
    """

    module: nn.Module
    parts: tuple[Part, ...]
    blocks: tuple[type[nn.Module], ...]
    steps_per_epoch: int

    def batch(self, step: int) -> dict[str, Any]:
        """This process's share of a step's batch, on the device, with everything random drawn (`noise.Draws`): a
        function of (data, seed, step, rank, world size) alone, and a share of the same samples at any world size.

        Tensors have one row per sample of the share, always as many; what is no tensor is the same for all samples.
        """
        ...

    def compile(self) -> None:
        """Put torch.compile on what gains from it, in place."""
        ...

    def save(self, folder: Path, weights: dict[str, Tensor], *, hurried: bool) -> dict[str, float]:
        """Write what users load, and pictures, into an empty folder. Only the main process calls it.

        `weights` are those of the module under its parameters' names, float32 on the CPU: the average where there is
        one. `hurried`: a stop was asked for, and who asked may not wait: weights only. Returns what was measured on
        held-out data, to log.
        """
        ...

    def left_out(self) -> Mapping[str, str]:
        """Files that this process could not use so far → why."""
        ...
