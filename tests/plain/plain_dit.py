"""LatentLM's DiT written down again, plainly, in float64; nothing of fastlatent.

`state` is a dict of published keys; `sizes` a dict with the entries of config.json.
"""

import math

import torch


def rms(x):
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-6)


def silu(x):
    return x / (1 + torch.exp(-x))


def positions(side, hidden):
    """[side², hidden]: sine and cosine of the column, then of the row."""
    quarter = hidden // 4
    out = torch.empty(side * side, hidden, dtype=torch.float64)
    for row in range(side):
        for column in range(side):
            for i in range(quarter):
                frequency = 1 / 10000 ** (i / quarter)
                for place, half in ((column, 0), (row, 2 * quarter)):
                    out[row * side + column, half + i] = math.sin(place * frequency)
                    out[row * side + column, half + quarter + i] = math.cos(place * frequency)
    return out


def tokens(state, sizes, x):
    """x [B, C, H, W] → [B, N, hidden], patch after patch in raster order."""
    patch, weight = sizes["patch_size"], state["x_embedder.proj.weight"]
    side = sizes["input_size"] // patch
    out = []
    for row in range(side):
        for column in range(side):
            square = x[:, :, row * patch : (row + 1) * patch, column * patch : (column + 1) * patch]
            out.append(torch.einsum("bcij,hcij->bh", square, weight) + state["x_embedder.proj.bias"])
    return torch.stack(out, 1)


def attention(state, prefix, sizes, x):
    heads, kv = sizes["num_heads"], sizes["num_kv_heads"]
    dim = sizes["hidden_size"] // heads
    batch, count, width = x.shape
    qkv = (x @ state[prefix + "qkv.weight"].T).reshape(batch, count, heads + 2 * kv, dim)
    out = torch.zeros(batch, count, heads, dim, dtype=x.dtype)
    for h in range(heads):
        group = h // (heads // kv)
        q, k, v = qkv[:, :, h], qkv[:, :, heads + group], qkv[:, :, heads + kv + group]
        out[:, :, h] = torch.softmax(q @ k.transpose(1, 2) / math.sqrt(dim), -1) @ v
    return out.reshape(batch, count, width) @ state[prefix + "proj.weight"].T


def embedded_time(state, t):
    i = torch.arange(128, dtype=torch.float64)
    rows = []
    for one in t.tolist():
        angle = one * torch.exp(-math.log(10000.0) * i / 128)
        rows.append(torch.cat([torch.cos(angle), torch.sin(angle)]))
    return silu(torch.stack(rows) @ state["t_embedder.mlp.0.weight"].T) @ state["t_embedder.mlp.2.weight"].T


def predict(state, sizes, x, t, labels):
    """x [B, C, H, W], t [B], labels [B] → [B, C, H, W]."""
    c = silu(embedded_time(state, t) + state["y_embedder.embedding_table.weight"][labels])
    h = tokens(state, sizes, x) + positions(sizes["input_size"] // sizes["patch_size"], sizes["hidden_size"])
    for i in range(sizes["depth"]):
        prefix = f"blocks.{i}."
        six = [part[:, None] for part in (c @ state[prefix + "adaLN_modulation.1.weight"].T).chunk(6, -1)]
        shift, scale, gate = six[:3]
        h = h + gate * attention(state, prefix + "attn.", sizes, rms(h) * (1 + scale) + shift)
        shift, scale, gate = six[3:]
        z = rms(h) * (1 + scale) + shift
        gated = silu(z @ state[prefix + "mlp.fc1.weight"].T) * (z @ state[prefix + "mlp.gate.weight"].T)
        h = h + gate * (gated @ state[prefix + "mlp.fc2.weight"].T)
    shift, scale = (part[:, None] for part in (c @ state["final_layer.adaLN_modulation.1.weight"].T).chunk(2, -1))
    h = (rms(h) * (1 + scale) + shift) @ state["final_layer.linear.weight"].T
    patch, channels = sizes["patch_size"], sizes["in_channels"]
    side = sizes["input_size"] // patch
    out = torch.empty_like(x)
    for n in range(side * side):
        row, column = divmod(n, side)
        for i in range(patch):
            for j in range(patch):
                first = (i * patch + j) * channels
                out[:, :, row * patch + i, column * patch + j] = h[:, n, first : first + channels]
    return out
