"""LatentLM's diffusion Transformer: all tokens are denoised at once. Layers, sizes and keys as published."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastlatent.heads.latentlm import FinalLayer, SwiGLU, TimestepEmbedder, ffn_width, rms_norm
from fastlatent.models.attention import Attention, run_block
from fastlatent.models.transformer import LabelEmbedder, check_sizes, initialize

# name: depth, hidden size, heads; the mlp ratio is 4 for all
DIT_SIZES: dict[str, tuple[int, int, int]] = {
    "DiT-Base": (12, 768, 12),
    "DiT-Medium": (24, 1024, 16),
    "DiT-Large": (24, 1536, 12),
    "DiT-XL": (24, 2048, 16),
    "DiT-3B": (32, 2560, 20),
    "DiT-7B": (32, 4096, 32),
    "DiT-13B": (40, 5120, 40),
}
MLP_RATIO = 4
POSITION_PERIOD = 10_000


@dataclass(frozen=True)
class DiTConfig:
    """Every size of a DiT; N = (input_size/patch_size)² tokens of patch_size²·in_channels numbers, in raster order."""

    hidden_size: int
    depth: int
    num_heads: int
    num_kv_heads: int
    mlp_ratio: float
    patch_size: int
    in_channels: int
    input_size: int
    num_classes: int

    def __post_init__(self) -> None:
        check_sizes(self, DiTConfig)
        if self.hidden_size % 4:
            raise ValueError(
                "config: expected hidden_size of a DiT to be a multiple of 4 (sine and cosine of two coordinates), "
                f"got {self.hidden_size}"
            )
        if self.input_size % self.patch_size:
            raise ValueError(
                f"config: expected patch_size to divide input_size {self.input_size}, got {self.patch_size}"
            )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def ffn_width(self) -> int:
        return ffn_width(self.hidden_size, self.mlp_ratio)

    @property
    def num_tokens(self) -> int:
        return (self.input_size // self.patch_size) ** 2


def published_dit_size(name: str) -> dict[str, int | float]:
    """The sizes that a published name stands for; ValueError lists the names."""
    if name not in DIT_SIZES:
        raise ValueError(f"unknown model {name!r}; known: {', '.join(DIT_SIZES)}")
    depth, hidden_size, num_heads = DIT_SIZES[name]
    return {
        "depth": depth, "hidden_size": hidden_size, "num_heads": num_heads, "num_kv_heads": num_heads,
        "mlp_ratio": MLP_RATIO,
    }  # fmt: skip


def position_table(side: int, hidden_size: int) -> Tensor:
    """float64 [side², hidden]: the first half of the width encodes the column, the second the row.

    Each half is [sin | cos] of position·10000^(−i/(hidden/4)) (Vaswani et al. 2017; in two dimensions as in MAE).
    """
    quarter = hidden_size // 4
    frequencies = POSITION_PERIOD ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    angles = torch.arange(side, dtype=torch.float64)[:, None] * frequencies
    one = torch.cat([angles.sin(), angles.cos()], dim=1)
    return torch.cat([one.repeat(side, 1), one.repeat_interleave(side, dim=0)], dim=1)


class PatchEmbedder(nn.Module):
    """Squares of the input → hidden, with bias: a convolution whose stride is its size."""

    def __init__(self, channels: int, hidden_size: int, patch_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, hidden_size, patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, H, W] → [B, N, hidden]."""
        return self.proj(x).flatten(2).transpose(1, 2)


class DiTBlock(nn.Module):
    """Attention, then SwiGLU, each on a modulated norm and behind a gate, all six from the condition c (adaLN-Zero)."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.attn = Attention(hidden, config.num_heads, config.num_kv_heads, causal=False)
        self.mlp = SwiGLU(hidden, config.ffn_width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden, 6 * hidden, bias=False))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """x [B, N, hidden], c [B, 1, hidden] → [B, N, hidden]."""
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(c).chunk(6, dim=-1)
        x = x + gate_a * self.attn(rms_norm(x) * (1 + scale_a) + shift_a)
        return x + gate_m * self.mlp(rms_norm(x) * (1 + scale_m) + shift_m)


class DiT(nn.Module):
    """Parameters stand in the published order, that of the unnamed EMA list: the fixed pos_embed is the first."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        hidden, patch = config.hidden_size, config.patch_size
        # A parameter, because it is one in published checkpoints; but it does not learn.
        self.pos_embed = nn.Parameter(torch.zeros(1, config.num_tokens, hidden), requires_grad=False)
        self.x_embedder = PatchEmbedder(config.in_channels, hidden, patch)
        self.t_embedder = TimestepEmbedder(hidden)
        self.y_embedder = LabelEmbedder(config.num_classes, hidden)
        self.blocks = nn.ModuleList([DiTBlock(config) for _ in range(config.depth)])
        self.final_layer = FinalLayer(hidden, patch**2 * config.in_channels)

    @torch.no_grad()
    def initialize(self) -> None:
        """Published initial weights: see `fastlatent.models.transformer.initialize`; and the positions."""
        initialize(self)
        config = self.config
        self.pos_embed.copy_(position_table(config.input_size // config.patch_size, config.hidden_size))

    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """Prediction for noisy latents.

        Args:
            x: [B, C, H, W], H = W = input_size.
            t: [B], float64 or integers: 0 to 999, or 1000·t of flow.
            labels: int64 [B]; num_classes is the null class.

        Returns:
            [B, C, H, W].
        """
        c = (self.t_embedder(t) + self.y_embedder(labels))[:, None]
        h = self.x_embedder(x) + self.pos_embed
        for block in self.blocks:
            h = run_block(block, h, c, again=self.gradient_checkpointing)
        h = self.final_layer(h, c)
        patch = self.config.patch_size
        side = self.config.input_size // patch
        # A token holds its square row by row, the channels of one place side by side.
        return h.reshape(-1, side, side, patch, patch, x.shape[1]).permute(0, 5, 1, 3, 2, 4).reshape(x.shape)
