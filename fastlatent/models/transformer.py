"""The causal Transformer of LatentLM with its diffusion head, for training: layers, sizes and keys as published."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from fastlatent.heads.latentlm import (
    DiffusionBlock,
    FinalLayer,
    SwiGLU,
    TimestepEmbedder,
    TokenEmbedder,
    ffn_width,
    rms_norm,
)
from fastlatent.models.attention import Attention, run_block

ROPE_BASE = 10_000
MAX_SIZE = 2**31
EMBEDDING_STD = 0.02

# name: depth, hidden size, heads, mlp ratio, blocks of the diffusion head
SIZES: dict[str, tuple[int, int, int, float, int]] = {
    "Transformer-Base": (12, 768, 12, 6, 3),
    "Transformer-Medium": (24, 1024, 16, 6, 3),
    "Transformer-Large": (24, 1536, 12, 6, 3),
    "Transformer-XL": (24, 2048, 16, 6, 3),
    "Transformer-3B": (32, 2560, 20, 6, 3),
    "Transformer-7B": (32, 4096, 32, 6, 3),
    "Transformer-13B": (40, 5120, 40, 6, 3),
    "Transformer-B": (24, 768, 12, 4, 6),
    "Transformer-L": (32, 1024, 16, 4, 8),
    "Transformer-H": (40, 1280, 20, 4, 12),
}


def check_sizes(config: Any, kind: type) -> None:
    """ValueError unless the fields of `kind` (a config of the Transformer or the DiT) can be a model's sizes."""
    for field in fields(kind):
        value = getattr(config, field.name)
        if type(value) not in (int, float) or not 0 < value < MAX_SIZE:
            raise ValueError(f"config: expected {field.name} to be a positive number, got {value!r}")
        if field.type == "int" and not isinstance(value, int):
            raise ValueError(f"config: expected {field.name} to be a whole number, got {value!r}")
    if config.hidden_size % config.num_heads:
        raise ValueError(
            f"config: expected num_heads to divide hidden_size {config.hidden_size}, got {config.num_heads}"
        )
    if config.num_heads % config.num_kv_heads:
        raise ValueError(
            f"config: num_heads {config.num_heads} must be a multiple of num_kv_heads {config.num_kv_heads}"
        )
    if ffn_width(config.hidden_size, config.mlp_ratio) == 0:
        raise ValueError(
            f"config: hidden_size {config.hidden_size} and mlp_ratio {config.mlp_ratio} give an FFN of width 0; "
            "floor(hidden·ratio·2/3/64)·64 must be at least 64"
        )


@dataclass(frozen=True)
class TransformerConfig:
    """Every size of a Transformer; N = input_size² tokens of in_channels numbers, in raster order."""

    hidden_size: int
    depth: int
    num_heads: int
    num_kv_heads: int
    mlp_ratio: float
    diffusion_depth: int
    in_channels: int
    input_size: int
    num_classes: int

    def __post_init__(self) -> None:
        check_sizes(self, TransformerConfig)
        if self.head_dim % 2:
            raise ValueError(
                f"config: hidden_size {self.hidden_size} must be num_heads {self.num_heads} times an even number"
            )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def ffn_width(self) -> int:
        return ffn_width(self.hidden_size, self.mlp_ratio)

    @property
    def num_tokens(self) -> int:
        return self.input_size**2


def published_size(name: str) -> dict[str, int | float]:
    """The sizes that a published name stands for; ValueError lists the names."""
    if name not in SIZES:
        raise ValueError(f"unknown model {name!r}; known: {', '.join(SIZES)}")
    depth, hidden_size, num_heads, mlp_ratio, diffusion_depth = SIZES[name]
    return {
        "depth": depth, "hidden_size": hidden_size, "num_heads": num_heads, "num_kv_heads": num_heads,
        "mlp_ratio": mlp_ratio, "diffusion_depth": diffusion_depth,
    }  # fmt: skip


def rope_table(positions: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """cos and sin [positions, head_dim/2] in float64 (cast by the user, so that every dtype rounds once).

    Published frequencies: 10000^(−linspace(0, 1, head_dim/2)), both endpoints included.
    """
    frequencies = ROPE_BASE ** -torch.linspace(0, 1, head_dim // 2, dtype=torch.float64)
    angles = torch.arange(positions, dtype=torch.float64)[:, None] * frequencies
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE on interleaved (even, odd) pairs. x [..., N, D]; cos and sin [N, D/2]."""
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)


class Block(nn.Module):
    """Pre-norm: x + attention(norm(x)), then x + SwiGLU(norm(x))."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.attn = Attention(config.hidden_size, config.num_heads, config.num_kv_heads, causal=True)
        self.mlp = SwiGLU(config.hidden_size, config.ffn_width)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attn(rms_norm(x), lambda heads: rotate(heads, cos, sin))
        return x + self.mlp(rms_norm(x))


class LabelEmbedder(nn.Module):
    """Class embedding; row num_classes is the null class of classifier-free guidance."""

    def __init__(self, num_classes: int, hidden_size: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, hidden_size)

    def forward(self, labels: Tensor) -> Tensor:
        return self.embedding_table(labels)


class ConditionLayer(nn.Module):
    """RMSNorm then Linear: backbone output → condition of the head."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(rms_norm(x))


def initialize(model: nn.Module) -> None:
    """Published initial weights of Transformer and DiT: modulations, output and the bias of clean (of a DiT: of all)
    tokens are 0, t MLP and labels N(0, 0.02), the rest is PyTorch's."""
    for name, parameter in model.named_parameters():
        if ".adaLN_modulation." in name or name in ("final_layer.linear.weight", "x_embedder.proj.bias"):
            nn.init.zeros_(parameter)
        elif name.startswith(("t_embedder.", "y_embedder.")):
            nn.init.normal_(parameter, std=EMBEDDING_STD)


class Transformer(nn.Module):
    """Backbone and head. Sub-modules stand in the published order: that of the unnamed EMA list."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        hidden, width = config.hidden_size, config.ffn_width
        self.x_embedder = TokenEmbedder(config.in_channels, hidden)
        self.noisy_x_embedder = TokenEmbedder(config.in_channels, hidden)
        self.t_embedder = TimestepEmbedder(hidden)
        self.y_embedder = LabelEmbedder(config.num_classes, hidden)
        self.blocks = nn.ModuleList([Block(config) for _ in range(config.depth)])
        self.diffusion_blocks = nn.ModuleList([DiffusionBlock(hidden, width) for _ in range(config.diffusion_depth)])
        self.condition_layer = ConditionLayer(hidden)
        self.final_layer = FinalLayer(hidden, config.in_channels)
        self._rope: dict[tuple[torch.dtype, torch.device], tuple[Tensor, Tensor]] = {}

    def initialize(self) -> None:
        """Published initial weights: see `initialize`."""
        initialize(self)

    def condition(self, x: Tensor, labels: Tensor) -> Tensor:
        """Conditions of all tokens at once. x [B, N, C] clean latents, labels int64 [B] → [B, N, hidden].

        The sequence is [class, x_0 … x_{N−2}]: output i conditions token i.
        """
        h = torch.cat([self.y_embedder(labels)[:, None], self.x_embedder(x[:, :-1])], dim=1)
        cos, sin = self.rope_for(h)
        for block in self.blocks:
            h = run_block(block, h, cos[: h.shape[1]], sin[: h.shape[1]], again=self.gradient_checkpointing)
        return self.condition_layer(h)

    def denoise(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """Prediction for noisy tokens. x [..., C], t [...], condition [..., hidden] → [..., C].

        The dimensions in front may be broadcast: one condition [B, 1, N, hidden] serves all copies x [B, M, N, C].
        """
        c = condition + self.t_embedder(t)
        h = self.noisy_x_embedder(x)
        for block in self.diffusion_blocks:
            h = run_block(block, h, c, again=self.gradient_checkpointing)
        return self.final_layer(h, c)

    def rope_for(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin [num_tokens, head_dim/2] in the dtype and on the device of h; made once."""
        key = (h.dtype, h.device)
        if key not in self._rope:
            cos, sin = rope_table(self.config.num_tokens, self.config.head_dim)
            self._rope[key] = cos.to(h.device, h.dtype), sin.to(h.device, h.dtype)
        return self._rope[key]
