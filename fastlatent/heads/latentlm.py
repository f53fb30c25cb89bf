"""LatentLM's per-token diffusion head for training: modulated RMSNorm + SwiGLU blocks over one token's channels.

For sampling, `fastlatent.heads.diffusion_head` folds it, like every other published head, into one op. The classes
bear the state-dict keys of the published checkpoints. Norms have no weight and no Linear has a bias.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

RMS_EPS = 1e-6
SINUSOID_WIDTH = 256
SINUSOID_PERIOD = 10_000


def rms_norm(x: Tensor) -> Tensor:
    """x·rsqrt(mean(x²) + 1e-6) over the last dim, without weight; computed in float32 (float64 for float64)."""
    return F.rms_norm(x, x.shape[-1:], None, RMS_EPS)


def ffn_width(hidden_size: int, mlp_ratio: float) -> int:
    """floor(hidden·ratio·2/3/64)·64, as published."""
    return int(hidden_size * mlp_ratio * 2 / 3 / 64) * 64


class SwiGLU(nn.Module):
    """fc2(silu(fc1·x) ⊙ gate·x): the activation is on fc1, `gate` is the linear branch."""

    def __init__(self, hidden_size: int, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, width, bias=False)
        self.gate = nn.Linear(hidden_size, width, bias=False)
        self.fc2 = nn.Linear(width, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.silu(self.fc1(x)) * self.gate(x))


class TokenEmbedder(nn.Module):
    """C channels → hidden, with bias. Stored as the published 1×1 convolution [hidden, C, 1, 1]."""

    def __init__(self, channels: int, hidden_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, hidden_size, 1)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., C] → [..., hidden]."""
        return F.linear(x, self.proj.weight[:, :, 0, 0], self.proj.bias)


class TimestepEmbedder(nn.Module):
    """Sinusoid [cos(128) | sin(128)] of t → Linear → SiLU → Linear."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(SINUSOID_WIDTH, hidden_size, bias=False),
            nn.SiLU(),
            nn.Linear(hidden_size, hidden_size, bias=False),
        )

    def forward(self, t: Tensor) -> Tensor:
        """t [...] float64 or float32 (0 to 999, or 1000·t of flow) → [..., hidden] in the weights' dtype."""
        return self.mlp(timestep_sinusoid(t).to(next(self.mlp.parameters()).dtype))


def timestep_sinusoid(t: Tensor) -> Tensor:
    """[cos | sin] of t·exp(−ln(10000)·i/128), i = 0 … 127; in float64, so that every dtype rounds only once."""
    half = SINUSOID_WIDTH // 2
    i = torch.arange(half, dtype=torch.float64, device=t.device)
    angle = t.double()[..., None] * torch.exp(-math.log(SINUSOID_PERIOD) * i / half)
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


class DiffusionBlock(nn.Module):
    """x + gate ⊙ SwiGLU(RMSNorm(x)·(1 + scale) + shift), with (shift, scale, gate) from the condition c."""

    def __init__(self, hidden_size: int, width: int) -> None:
        super().__init__()
        self.mlp = SwiGLU(hidden_size, width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 3 * hidden_size, bias=False))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale, gate = self.adaLN_modulation(c).chunk(3, dim=-1)
        return x + gate * self.mlp(rms_norm(x) * (1 + scale) + shift)


class FinalLayer(nn.Module):
    """Linear(RMSNorm(x)·(1 + scale) + shift): hidden → C, with (shift, scale) from the condition c."""

    def __init__(self, hidden_size: int, channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, channels, bias=False)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size, bias=False))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=-1)
        return self.linear(rms_norm(x) * (1 + scale) + shift)
