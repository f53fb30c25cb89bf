"""What a teacher's tokens go through before they are stored, and what pixels go through before a teacher sees them."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastlatent.diffusion.noise import philox

# ImageNet's statistics of RGB in [0, 1]: what VideoMAE was trained with, and most image and video encoders.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)

TOKEN_NORMS = ("none", "layer")
POOLS = ("none", "space", "all")
NORM_EPS = 1e-5


def normalize_clips(clips: Tensor, mean: Sequence[float] = MEAN, std: Sequence[float] = STD) -> Tensor:
    """uint8 [B, T, H, W, 3] → float32 [B, 3, T, H, W] on the same device: (x / 255 − mean) / std.

    Three steps, each rounded to float32, so that CPU and CUDA give the same bits: what a teacher saw, a student can
    make again from its own clips.

    Raises:
        ValueError: another dtype or shape.
    """
    if clips.dtype != torch.uint8 or clips.ndim != 5 or clips.shape[-1] != 3:
        raise ValueError(f"expected clips uint8 [B, T, H, W, 3], got {str(clips.dtype)[6:]} {list(clips.shape)}")
    x = clips.permute(0, 4, 1, 2, 3).to(torch.float32, memory_format=torch.contiguous_format)
    by, mean_, std_ = (_channels(tuple(values), x.device) for values in ((255.0,), mean, std))
    # By tensors: CUDA divides by a number of Python's by multiplying with its rounded reciprocal.
    return x.div_(by).sub_(mean_).div_(std_)


@functools.cache
def _channels(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Kept: to copy them to a GPU waits for the batch that it is at work on."""
    return torch.tensor(values, dtype=torch.float32, device=device).reshape(-1, 1, 1, 1)


class Readout(nn.Module):
    """float [B, N, D] tokens → [B, n, d] rows, in float32 (float64 stays): norm, then pooling, then projection.

    Args:
        dim: D.
        times: time steps of the tokens, which are numbered time first; None where that is not known.
        token_norm: "layer": each token has mean 0 and variance 1 over its D numbers: layer normalisation without affine
            parameters, ε = 1e-5, as V-JEPA's targets have it. "none": raw.
        pool: "space": the mean over the tokens of each time step (n = times); "all": of all of them (n = 1).
        project_to: d: a product with a fixed matrix [D, d] of normal numbers of variance 1/D, which keeps the standard
            deviation of tokens whose numbers are independent. It is drawn in float64 from `seed` and rounded once.
            0: none.

    Raises:
        ValueError: an unknown norm or pooling, pooling over space without `times`, or a projection to more than D.
    """

    matrix: Tensor | None

    def __init__(
        self, dim: int, times: int | None, *, token_norm: str = "none", pool: str = "none", project_to: int = 0,
        seed: int = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        if token_norm not in TOKEN_NORMS or pool not in POOLS:
            raise ValueError(
                f"expected --token-norm {' or '.join(TOKEN_NORMS)} and --pool {', '.join(POOLS)}; got {token_norm!r} "
                f"and {pool!r}"
            )
        if pool == "space" and times is None:
            raise ValueError("--pool space: which tokens are of one time step is not known of this teacher; use all")
        if not 0 <= project_to <= dim:
            raise ValueError(f"--project-to: expected 1 to {dim}, the width of the tokens, or 0 for none: {project_to}")
        self.dim, self.times, self.token_norm, self.pool, self.seed = dim, times, token_norm, pool, seed
        matrix = None
        if project_to:
            drawn = philox(seed, dim, project_to).standard_normal((dim, project_to)) / dim**0.5
            matrix = torch.from_numpy(drawn).float()
        self.register_buffer("matrix", matrix)

    def row_shape(self, tokens: int) -> tuple[int, int]:
        """(n, d) of N tokens."""
        count = {"none": tokens, "space": self.times or 0, "all": 1}[self.pool]
        return count, self.dim if self.matrix is None else self.matrix.shape[1]

    def forward(self, tokens: Tensor) -> Tensor:
        x = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
        if self.token_norm == "layer":
            x = F.layer_norm(x, (self.dim,), eps=NORM_EPS)
        if self.pool == "space":
            assert self.times is not None
            x = x.unflatten(1, (self.times, -1)).mean(2)
        elif self.pool == "all":
            x = x.mean(1, keepdim=True)
        return x if self.matrix is None else x @ self.matrix.to(x.dtype)

    def identity(self) -> dict[str, Any]:
        projection = None
        if self.matrix is not None:
            digest = hashlib.sha256(self.matrix.cpu().contiguous().numpy().tobytes()).hexdigest()
            projection = {"to": self.matrix.shape[1], "seed": self.seed, "sha256": digest}
        return {"token_norm": self.token_norm, "pool": self.pool, "projection": projection}

    def extra_repr(self) -> str:
        to = 0 if self.matrix is None else self.matrix.shape[1]
        return f"{self.dim}, {self.times}, token_norm={self.token_norm}, pool={self.pool}, project_to={to}"
