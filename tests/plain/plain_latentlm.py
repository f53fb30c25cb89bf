"""LatentLM and its sampler written down again, plainly, in float64: no cache, no hoisting, nothing of fastlatent.

`state` is a dict of published keys; `sizes` a dict with the entries of config.json.
"""

import itertools
import math

import torch


def rms(x):
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-6)


def silu(x):
    return x / (1 + torch.exp(-x))


def swiglu(state, prefix, x):
    gated = silu(x @ state[prefix + "fc1.weight"].T) * (x @ state[prefix + "gate.weight"].T)
    return gated @ state[prefix + "fc2.weight"].T


def embed(state, prefix, x):
    weight = state[prefix + "proj.weight"]
    return x @ weight.reshape(weight.shape[0], weight.shape[1]).T + state[prefix + "proj.bias"]


def rope(x):
    """x [B, N, heads, D]: pairs (2i, 2i+1) turned by n·10000^(−i/(D/2 − 1))."""
    half = x.shape[-1] // 2
    out = torch.empty_like(x)
    for n in range(x.shape[1]):
        for i in range(half):
            angle = n * 10000.0 ** -(i / (half - 1)) if half > 1 else float(n)
            c, s = math.cos(angle), math.sin(angle)
            a, b = x[:, n, :, 2 * i], x[:, n, :, 2 * i + 1]
            out[:, n, :, 2 * i], out[:, n, :, 2 * i + 1] = a * c - b * s, a * s + b * c
    return out


def attention(state, prefix, sizes, x):
    heads, kv, width = sizes["num_heads"], sizes["num_kv_heads"], sizes["hidden_size"]
    dim = width // heads
    batch, tokens, _ = x.shape
    qkv = (x @ state[prefix + "qkv.weight"].T).reshape(batch, tokens, heads + 2 * kv, dim)
    q, k, v = rope(qkv[:, :, :heads]), rope(qkv[:, :, heads : heads + kv]), qkv[:, :, heads + kv :]
    out = torch.zeros(batch, tokens, heads, dim, dtype=x.dtype)
    for h in range(heads):
        group = h // (heads // kv)
        for n in range(tokens):
            scores = torch.einsum("bd,bmd->bm", q[:, n, h], k[:, : n + 1, group]) / math.sqrt(dim)
            out[:, n, h] = torch.einsum("bm,bmd->bd", torch.softmax(scores, -1), v[:, : n + 1, group])
    return out.reshape(batch, tokens, width) @ state[prefix + "proj.weight"].T


def conditions(state, sizes, latents, labels):
    """Conditions [B, n + 1, hidden] of a sequence whose first n latents [B, n, C] are known."""
    h = torch.cat(
        [state["y_embedder.embedding_table.weight"][labels][:, None], embed(state, "x_embedder.", latents)], 1
    )
    for i in range(sizes["depth"]):
        h = h + attention(state, f"blocks.{i}.attn.", sizes, rms(h))
        h = h + swiglu(state, f"blocks.{i}.mlp.", rms(h))
    return rms(h) @ state["condition_layer.linear.weight"].T


def head(state, sizes, x, t, condition):
    """x [B, C], t a number, condition [B, hidden] → prediction [B, C]."""
    i = torch.arange(128, dtype=x.dtype)
    angle = t * torch.exp(-math.log(10000.0) * i / 128)
    sinusoid = torch.cat([torch.cos(angle), torch.sin(angle)])
    t_emb = silu(sinusoid @ state["t_embedder.mlp.0.weight"].T) @ state["t_embedder.mlp.2.weight"].T
    c = silu(condition + t_emb)
    h = embed(state, "noisy_x_embedder.", x)
    for i in range(sizes["diffusion_depth"]):
        modulation = c @ state[f"diffusion_blocks.{i}.adaLN_modulation.1.weight"].T
        shift, scale, gate = modulation.chunk(3, -1)
        h = h + gate * swiglu(state, f"diffusion_blocks.{i}.mlp.", rms(h) * (1 + scale) + shift)
    shift, scale = (c @ state["final_layer.adaLN_modulation.1.weight"].T).chunk(2, -1)
    return (rms(h) * (1 + scale) + shift) @ state["final_layer.linear.weight"].T


def cosine_alphas_cumprod():
    def alpha_bar(u):
        return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

    product, out = 1.0, []
    for i in range(1000):
        product *= 1 - min(1 - alpha_bar((i + 1) / 1000) / alpha_bar(i / 1000), 0.999)
        out.append(product)
    return out


def dpmsolver_2m(predict, x, steps, prediction_type):
    """DPM-Solver++(2M), midpoint, linspace spacing, final sigma 0, first and last step of order 1."""
    alphas_cumprod = cosine_alphas_cumprod()
    times = [round(999 * k / steps) for k in range(steps, 0, -1)]
    levels = [(math.sqrt(alphas_cumprod[t]), math.sqrt(1 - alphas_cumprod[t])) for t in times] + [(1.0, 0.0)]
    previous, previous_lambda = None, None
    for k, t in enumerate(times):
        (alpha, sigma), (alpha_next, sigma_next) = levels[k], levels[k + 1]
        output = predict(x, t)
        x0 = (x - sigma * output) / alpha if prediction_type == "epsilon" else alpha * x - sigma * output
        if sigma_next == 0:
            return x0
        lam, lam_next = math.log(alpha / sigma), math.log(alpha_next / sigma_next)
        h = lam_next - lam
        difference = 0 if previous is None else (x0 - previous) / ((lam - previous_lambda) / h)
        x = sigma_next / sigma * x - alpha_next * math.expm1(-h) * (x0 + 0.5 * difference)
        previous, previous_lambda = x0, lam
    raise AssertionError("unreachable")


def euler_flow(predict, x, steps):
    times = [1 - k / steps for k in range(steps + 1)]
    for t, t_next in itertools.pairwise(times):
        x = x + (t_next - t) * predict(x, 1000 * t)
    return x


def sample(state, sizes, labels, noise, *, prediction_type, steps, cfg_scale):
    """noise [B, N, C] → latents [B, N, C], everything recomputed from the start for every token.

    steps and cfg_scale: a number, or a list with one for each token.
    """
    batch, tokens, channels = noise.shape
    null = torch.full_like(labels, sizes["num_classes"])
    latents = torch.zeros(batch, 0, channels, dtype=noise.dtype)
    for n in range(tokens):
        with_class = conditions(state, sizes, latents, labels)[:, -1]
        without = conditions(state, sizes, latents, null)[:, -1]

        scale = cfg_scale[n] if isinstance(cfg_scale, list) else cfg_scale
        count = steps[n] if isinstance(steps, list) else steps

        def predict(x, t, with_class=with_class, without=without, scale=scale):
            conditional = head(state, sizes, x, t, with_class)
            unconditional = head(state, sizes, x, t, without)
            return unconditional + scale * (conditional - unconditional)

        if prediction_type == "flow":
            token = euler_flow(predict, noise[:, n], count)
        else:
            token = dpmsolver_2m(predict, noise[:, n], count, prediction_type)
        latents = torch.cat([latents, token[:, None]], 1)
    return latents
