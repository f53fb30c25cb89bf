"""Harmon (Wu et al. 2025, wusize/Harmon): the DiffLoss of its MAR, and of models built like it (UniPic), as one op.

As in `fastlatent.patches.mar`. Harmon hands over both branches as rows of one batch and overwrites the null branch's
tokens with the conditional ones, so it discards the second half too.
"""

from __future__ import annotations

from typing import Any

from fastlatent.patches.handle import PatchHandle
from fastlatent.patches.mar import diff_losses, found_mismatch, inside_mar, sampler


def mismatch(model: Any) -> str:
    """ "" where the model has one DiffLoss at mar.diffloss, however deep; else what is missing or otherwise."""
    return found_mismatch(_found(model), "a module mar.diffloss with net, gen_diffusion and sample")


def apply(model: Any, handle: PatchHandle) -> None:
    """Replace `sample` of the DiffLoss of the model's MAR.

    Raises:
        ValueError: its weights are not those of MAR's head.
    """
    [(path, loss)] = _found(model).items()
    handle.replace(loss, "sample", sampler(loss), path)


def _found(model: Any) -> dict[str, Any]:
    return {path: loss for path, loss in diff_losses(model).items() if inside_mar(path)}
