"""VideoMAE's encoder written out in float64, from the tensors of a published .pth file; nothing of fastlatent."""

from __future__ import annotations

import math

import numpy as np
import torch


def tokens(state, pixels, heads, *, layer=None, eps=1e-6):
    """[B, N, D] after block `layer` (from 1 on; None: the last), raw. pixels: [B, 3, T, H, W], normalised."""
    state = {name: tensor.double().numpy() for name, tensor in state.items()}
    x = _patches(state, pixels.double().numpy())
    x = x + _positions(x.shape[1], x.shape[2])
    depth = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))
    for i in range(depth if layer is None else layer):
        block = {name.removeprefix(f"blocks.{i}."): v for name, v in state.items() if name.startswith(f"blocks.{i}.")}
        branch = _attention(block, _norm(x, block["norm1.weight"], block["norm1.bias"], eps), heads)
        x = x + block.get("gamma_1", 1.0) * branch
        hidden = _norm(x, block["norm2.weight"], block["norm2.bias"], eps) @ block["mlp.fc1.weight"].T
        hidden = _gelu(hidden + block["mlp.fc1.bias"])
        x = x + block.get("gamma_2", 1.0) * (hidden @ block["mlp.fc2.weight"].T + block["mlp.fc2.bias"])
    return torch.from_numpy(x)


def _patches(state, pixels):
    weight, bias = state["patch_embed.proj.weight"], state["patch_embed.proj.bias"]
    _, _, tubelet, side, _ = weight.shape
    batch, _, frames, height, width = pixels.shape
    rows = []
    for t in range(0, frames, tubelet):  # time first, then rows, then columns
        for y in range(0, height, side):
            for x in range(0, width, side):
                cube = pixels[:, :, t : t + tubelet, y : y + side, x : x + side]
                rows.append(np.einsum("bcthw,dcthw->bd", cube, weight) + bias)
    return np.stack(rows, 1).reshape(batch, len(rows), -1)


def _positions(count, dim):
    table = np.empty((count, dim))
    for n in range(count):
        for j in range(dim):
            angle = n / math.pow(10000, 2 * (j // 2) / dim)
            table[n, j] = math.cos(angle) if j % 2 else math.sin(angle)
    return table


def _norm(x, weight, bias, eps):
    mean = x.mean(-1, keepdims=True)
    variance = ((x - mean) ** 2).mean(-1, keepdims=True)
    return (x - mean) / np.sqrt(variance + eps) * weight + bias


def _gelu(x):
    return 0.5 * x * (1 + torch.erf(torch.from_numpy(x) / math.sqrt(2)).numpy())


def _attention(block, x, heads):
    dim = x.shape[-1]
    size = dim // heads
    q, k, v = (x @ part.T for part in np.split(block["attn.qkv.weight"], 3))
    if "attn.q_bias" in block:
        q, v = q + block["attn.q_bias"], v + block["attn.v_bias"]
    out = np.empty_like(q)
    for head in range(heads):
        one = slice(head * size, (head + 1) * size)
        a, b = q[..., one], k[..., one]
        if "attn.scale" in block:
            a = a / np.maximum(np.linalg.norm(a, axis=-1, keepdims=True), 1e-12)
            b = b / np.maximum(np.linalg.norm(b, axis=-1, keepdims=True), 1e-12)
            scores = a @ b.swapaxes(-1, -2) * math.exp(min(block["attn.scale"][head, 0, 0], 4.6052))
        else:
            scores = a @ b.swapaxes(-1, -2) / math.sqrt(size)
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        out[..., one] = scores / scores.sum(-1, keepdims=True) @ v[..., one]
    return out @ block["attn.proj.weight"].T + block["attn.proj.bias"]
