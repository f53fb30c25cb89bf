"""VideoMAE's encoder, from pixels to tokens (Tong et al., arXiv 2203.12602; version 2: Wang et al., arXiv 2303.16727).

A plain vision transformer over cubes of tubelet × patch × patch pixels, without a class token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Logarithm of the largest factor of cosine attention.
MAX_LOG_SCALE = 4.6052


@dataclass(frozen=True)
class VideoMAESizes:
    """Of a model, as its weights and config have them.

    mlp: width of the hidden layer. size: of the square frames. eps: of its LayerNorms. biases: queries and values have
    one (keys never do). layer_scale: each branch has a factor per channel. cosine: attention between unit vectors, with
    a learned factor per head. learned_positions: in place of the table of sines.
    """

    dim: int
    depth: int
    heads: int
    mlp: int
    patch: int = 16
    tubelet: int = 2
    frames: int = 16
    size: int = 224
    eps: float = 1e-6
    biases: bool = True
    layer_scale: bool = False
    cosine: bool = False
    learned_positions: bool = False

    @property
    def grid(self) -> tuple[int, int, int]:
        """Tokens along time, height and width; they are numbered in this order, time first."""
        return self.frames // self.tubelet, self.size // self.patch, self.size // self.patch

    @property
    def tokens(self) -> int:
        return math.prod(self.grid)


# Of VideoMAEv2 as they were published. "giant" has an MLP of 48/11 times its width.
PUBLISHED = {
    "small": VideoMAESizes(384, 12, 6, 1536),
    "base": VideoMAESizes(768, 12, 12, 3072),
    "large": VideoMAESizes(1024, 24, 16, 4096),
    "huge": VideoMAESizes(1280, 32, 16, 5120),
    "giant": VideoMAESizes(1408, 40, 16, 6144, patch=14),
}


class VideoMAE(nn.Module):
    """float [B, 3, frames, size, size], normalised → tokens [B, N, dim] of one block, raw, in the weights' dtype.

    The names of its parameters are those of the published .pth files, but for the biases of queries and values, which
    are one tensor attn.qkv.bias with zeros between them for the keys.

    Args:
        layer: 1 to depth: the block whose output is returned; those above it do not exist here. 0: the last.
    """

    def __init__(self, sizes: VideoMAESizes, layer: int = 0) -> None:
        super().__init__()
        assert 0 <= layer <= sizes.depth, (layer, sizes.depth)
        self.sizes = sizes
        self.patch_embed = PatchEmbed(sizes)
        self.positions = nn.Buffer(torch.empty(sizes.tokens, sizes.dim))  # [N, dim], loaded with the weights
        self.blocks = nn.ModuleList(Block(sizes) for _ in range(layer or sizes.depth))

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.patch_embed(pixels) + self.positions
        for block in self.blocks:
            x = block(x)
        return x

    def extra_repr(self) -> str:
        return repr(self.sizes)


class PatchEmbed(nn.Module):
    """A convolution of kernel = stride, as the product of matrices that it is."""

    def __init__(self, sizes: VideoMAESizes) -> None:
        super().__init__()
        self.sizes = sizes
        cube = (sizes.tubelet, sizes.patch, sizes.patch)
        self.proj = nn.Conv3d(3, sizes.dim, cube, stride=cube)

    def forward(self, pixels: Tensor) -> Tensor:
        sizes, (t, h, w) = self.sizes, self.sizes.grid
        cubes = pixels.reshape(-1, 3, t, sizes.tubelet, h, sizes.patch, w, sizes.patch)
        cubes = cubes.permute(0, 2, 4, 6, 1, 3, 5, 7).reshape(len(pixels), sizes.tokens, -1)
        return F.linear(cubes, self.proj.weight.flatten(1), self.proj.bias)


class Block(nn.Module):
    def __init__(self, sizes: VideoMAESizes) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(sizes.dim, eps=sizes.eps)
        self.attn = Attention(sizes)
        self.norm2 = nn.LayerNorm(sizes.dim, eps=sizes.eps)
        self.mlp = Mlp(sizes)
        if sizes.layer_scale:
            self.gamma_1 = nn.Parameter(torch.empty(sizes.dim))
            self.gamma_2 = nn.Parameter(torch.empty(sizes.dim))
        self.layer_scale = sizes.layer_scale

    def forward(self, x: Tensor) -> Tensor:
        branch = self.attn(self.norm1(x))
        x = x + (self.gamma_1 * branch if self.layer_scale else branch)
        branch = self.mlp(self.norm2(x))
        return x + (self.gamma_2 * branch if self.layer_scale else branch)


class Attention(nn.Module):
    def __init__(self, sizes: VideoMAESizes) -> None:
        super().__init__()
        self.heads, self.cosine = sizes.heads, sizes.cosine
        self.qkv = nn.Linear(sizes.dim, 3 * sizes.dim, bias=sizes.biases)
        self.proj = nn.Linear(sizes.dim, sizes.dim)
        if sizes.cosine:
            self.scale = nn.Parameter(torch.empty(sizes.heads, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        if self.cosine:
            q = F.normalize(q, dim=-1) * self.scale.clamp(max=MAX_LOG_SCALE).exp()
            out = F.scaled_dot_product_attention(q, F.normalize(k, dim=-1), v, scale=1.0)
        else:
            out = F.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, sizes: VideoMAESizes) -> None:
        super().__init__()
        self.fc1 = nn.Linear(sizes.dim, sizes.mlp)
        self.fc2 = nn.Linear(sizes.mlp, sizes.dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


def sine_positions(tokens: int, dim: int) -> Tensor:
    """The fixed table, float64 [tokens, dim]: sin and cos of n / 10000^(2i/dim) in columns 2i and 2i + 1 of token n.

    n runs over all tokens of the clip: time and place are not told apart.
    """
    column = torch.arange(dim, dtype=torch.float64)
    angle = torch.arange(tokens, dtype=torch.float64)[:, None] / 10000.0 ** (2 * (column // 2) / dim)
    return torch.where(column % 2 == 0, angle.sin(), angle.cos())
