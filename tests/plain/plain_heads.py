"""Published diffusion heads and their sampling loops written down again, plainly: nothing of fastlatent.

A head is a function (state, x [B, C], t, condition [B, Z]) → [B, O] of a dict of published names (without prefix), in
the state's dtype; t is a number, or a pair for pocket-tts. In bfloat16 it rounds where the published code does: norms
inside are float32, products round. `shapes(family, ...)` lists the published names.
"""

import math

import torch
import torch.nn.functional as F


def wide(x):
    return x.to(torch.promote_types(x.dtype, torch.float32))


def rms(x, eps):
    w = wide(x)
    return (w / torch.sqrt((w * w).mean(-1, keepdim=True) + eps)).to(x.dtype)


def layer(x, weight=None, bias=None):
    w = wide(x)
    centred = w - w.mean(-1, keepdim=True)
    y = centred / torch.sqrt((centred * centred).mean(-1, keepdim=True) + 1e-6)
    if weight is not None:
        y = y * wide(weight) + wide(bias)
    return y.to(x.dtype)


def silu(x):
    return x * torch.sigmoid(x)


def linear(state, name, x):
    return F.linear(x, state[name + ".weight"].flatten(1), state.get(name + ".bias"))


def sinusoid(t, dtype, frequencies=None):
    if frequencies is None:
        frequencies = torch.tensor([10000.0 ** (-i / 128) for i in range(128)], dtype=torch.float64)
    angle = t * frequencies.double()
    return torch.cat([torch.cos(angle), torch.sin(angle)])[None].to(dtype)


def latentlm(state, x, t, condition):
    e = silu(linear(state, "t_embedder.mlp.0", sinusoid(t, x.dtype)))
    c = silu(condition + linear(state, "t_embedder.mlp.2", e))
    h = linear(state, "noisy_x_embedder.proj", x)
    i = 0
    while f"diffusion_blocks.{i}.mlp.fc1.weight" in state:
        block = f"diffusion_blocks.{i}."
        shift, scale, gate = linear(state, block + "adaLN_modulation.1", c).chunk(3, -1)
        m = rms(h, 1e-6) * (1 + scale) + shift
        inner = silu(linear(state, block + "mlp.fc1", m)) * linear(state, block + "mlp.gate", m)
        h = h + gate * linear(state, block + "mlp.fc2", inner)
        i += 1
    shift, scale = linear(state, "final_layer.adaLN_modulation.1", c).chunk(2, -1)
    return linear(state, "final_layer.linear", rms(h, 1e-6) * (1 + scale) + shift)


def synthlm(state, x, t, condition):
    """t is what reaches the sinusoid, 1000 times the flow's time."""
    e = silu(linear(state, "time_embedder.mlp.0", sinusoid(t, x.dtype)))
    c = silu(condition + linear(state, "time_embedder.mlp.2", e))
    h = linear(state, "noisy_input_embedder", x)
    i = 0
    while f"diffusion_blocks.{i}.mlp.up_gate.weight" in state:
        block = f"diffusion_blocks.{i}."
        shift, scale, gate = linear(state, block + "adaLN_modulation.proj", c).chunk(3, -1)
        up, activated = linear(state, block + "mlp.up_gate", rms(h, 1e-6) * (1 + scale) + shift).chunk(2, -1)
        h = h + gate * linear(state, block + "mlp.down_proj", up * silu(activated))
        i += 1
    shift, scale = linear(state, "final_layer.adaLN_modulation.proj", c).chunk(2, -1)
    return linear(state, "final_layer.out_proj", rms(h, 1e-6) * (1 + scale) + shift)


def adaln_mlp(state, x, y):
    """The skeleton of MAR and its descendants, after y = condition + time."""
    c = silu(y)
    h = linear(state, "input_proj", x)
    i = 0
    while f"res_blocks.{i}.in_ln.weight" in state:
        block = f"res_blocks.{i}."
        shift, scale, gate = linear(state, block + "adaLN_modulation.1", c).chunk(3, -1)
        m = layer(h, state[block + "in_ln.weight"], state[block + "in_ln.bias"]) * (1 + scale) + shift
        if block + "mlp.w12.weight" in state:
            first, second = linear(state, block + "mlp.w12", m).chunk(2, -1)
            out = linear(state, block + "mlp.w3", silu(first) * second)
        else:
            out = linear(state, block + "mlp.2", silu(linear(state, block + "mlp.0", m)))
        h = h + gate * out
        i += 1
    shift, scale = linear(state, "final_layer.adaLN_modulation.1", c).chunk(2, -1)
    return linear(state, "final_layer.linear", layer(h) * (1 + scale) + shift)


def mar(state, x, t, condition):
    e = silu(linear(state, "time_embed.mlp.0", sinusoid(t, x.dtype)))
    time = linear(state, "time_embed.mlp.2", e)
    return adaln_mlp(state, x, time + linear(state, "cond_embed", condition))


def pocket_tts(state, x, t, condition):
    embeddings = []
    for i, time in enumerate(t):
        e = f"time_embed.{i}."
        h = silu(linear(state, e + "mlp.0", sinusoid(time, x.dtype, state[e + "freqs"])))
        h = linear(state, e + "mlp.2", h)
        # The variance is unbiased and about the mean; the mean stays in h.
        variance = ((h - h.mean(-1, keepdim=True)) ** 2).sum(-1, keepdim=True) / (h.shape[-1] - 1)
        embeddings.append(h * state[e + "mlp.3.alpha"] / torch.sqrt(variance + 1e-5))
    y = linear(state, "cond_embed", condition)
    return adaln_mlp(state, x, y + sum(embeddings) / len(embeddings) if embeddings else y)


def vibevoice(state, x, t, condition, names=("t_embedder.mlp.0", "t_embedder.mlp.2", "adaLN_modulation.1")):
    first, second, modulation = names
    port = modulation == "linear"
    c = linear(state, "cond_proj", condition) + linear(state, second, silu(linear(state, first, sinusoid(t, x.dtype))))
    c = silu(c)
    h = linear(state, "noisy_images_proj", x)
    i = 0
    while f"layers.{i}.norm.weight" in state:
        block = f"layers.{i}."
        shift, scale, gate = linear(state, block + modulation, c).chunk(3, -1)
        m = rms(h, 1e-5) * state[block + "norm.weight"] * (1 + scale) + shift
        inner = silu(linear(state, block + "ffn.gate_proj", m)) * linear(state, block + "ffn.up_proj", m)
        h = h + gate * linear(state, block + "ffn.down_proj", inner)
        i += 1
    shift, scale = linear(state, "final_layer.linear_1" if port else "final_layer.adaLN_modulation.1", c).chunk(2, -1)
    return linear(state, "final_layer.linear_2" if port else "final_layer.linear", rms(h, 1e-5) * (1 + scale) + shift)


def vibevoice_port(state, x, t, condition):
    return vibevoice(state, x, t, condition, ("timestep_proj.fc1", "timestep_proj.fc2", "linear"))


def vibevoice_early_port(state, x, t, condition):
    return vibevoice(state, x, t, condition, ("timestep_embedder.layer_1", "timestep_embedder.layer_2", "linear"))


HEADS = {
    "latentlm": latentlm,
    "synthlm": synthlm,
    "mar": mar,
    "nextstep": mar,
    "ming": mar,
    "calm": mar,
    "orthus": mar,
    "vibevoice": vibevoice,
    "vibevoice_port": vibevoice_port,
    "vibevoice_early_port": vibevoice_early_port,
    "pocket_tts": pocket_tts,
}


def shapes(family, *, hidden=12, blocks=2, width=20, channels=5, condition=7, out=None, times=2):
    """Published names and shapes; condition is `hidden` where the family does not project it (or H → H)."""
    h, c, z, f = hidden, channels, condition, width
    found = {}

    def add(name, *shape, bias=False):
        found[name + ".weight"] = shape
        if bias:
            found[name + ".bias"] = shape[:1]

    if family in ("latentlm", "synthlm"):
        if family == "latentlm":
            add("noisy_x_embedder.proj", h, c, 1, 1, bias=True)
        else:
            add("noisy_input_embedder", h, c)
        time = "t_embedder" if family == "latentlm" else "time_embedder"
        add(time + ".mlp.0", h, 256)
        add(time + ".mlp.2", h, h)
        modulation, output = ("1", "linear") if family == "latentlm" else ("proj", "out_proj")
        for i in range(blocks):
            if family == "latentlm":
                add(f"diffusion_blocks.{i}.mlp.fc1", f, h)
                add(f"diffusion_blocks.{i}.mlp.gate", f, h)
                add(f"diffusion_blocks.{i}.mlp.fc2", h, f)
            else:
                add(f"diffusion_blocks.{i}.mlp.up_gate", 2 * f, h)
                add(f"diffusion_blocks.{i}.mlp.down_proj", h, f)
            add(f"diffusion_blocks.{i}.adaLN_modulation.{modulation}", 3 * h, h)
        add("final_layer." + output, c, h)
        add("final_layer.adaLN_modulation." + modulation, 2 * h, h)
    elif family.startswith("vibevoice"):
        add("noisy_images_proj", h, c)
        add("cond_proj", h, h)
        first, second, modulation = {
            "vibevoice": ("t_embedder.mlp.0", "t_embedder.mlp.2", "adaLN_modulation.1"),
            "vibevoice_port": ("timestep_proj.fc1", "timestep_proj.fc2", "linear"),
            "vibevoice_early_port": ("timestep_embedder.layer_1", "timestep_embedder.layer_2", "linear"),
        }[family]
        add(first, h, 256)
        add(second, h, h)
        for i in range(blocks):
            add(f"layers.{i}.ffn.gate_proj", f, h)
            add(f"layers.{i}.ffn.up_proj", f, h)
            add(f"layers.{i}.ffn.down_proj", h, f)
            found[f"layers.{i}.norm.weight"] = (h,)
            add(f"layers.{i}.{modulation}", 3 * h, h)
        add("final_layer.linear" if family == "vibevoice" else "final_layer.linear_2", c, h)
        add("final_layer.adaLN_modulation.1" if family == "vibevoice" else "final_layer.linear_1", 2 * h, h)
    else:
        out = out or (2 * c if family == "mar" else c)
        for e in [f"time_embed.{i}" for i in range(times)] if family == "pocket_tts" else ["time_embed"]:
            add(e + ".mlp.0", h, 256, bias=True)
            add(e + ".mlp.2", h, h, bias=True)
            if family == "pocket_tts":
                found[e + ".mlp.3.alpha"] = (h,)
                found[e + ".freqs"] = (128,)
        add("cond_embed", h, z, bias=True)
        add("input_proj", h, c, bias=True)
        for i in range(blocks):
            add(f"res_blocks.{i}.in_ln", h, bias=True)
            if family == "ming":
                add(f"res_blocks.{i}.mlp.w12", 2 * f, h, bias=True)
                add(f"res_blocks.{i}.mlp.w3", h, f, bias=True)
            else:
                add(f"res_blocks.{i}.mlp.0", f, h, bias=True)
                add(f"res_blocks.{i}.mlp.2", h, f, bias=True)
            add(f"res_blocks.{i}.adaLN_modulation.1", 3 * h, h, bias=True)
        add("final_layer.linear", out, h, bias=True)
        add("final_layer.adaLN_modulation.1", 2 * h, h, bias=True)
    return found


def random_state(family, *, seed=0, std=0.1, norm=1.0, **sizes):
    """Float64 weights of std 0.1; norms' weights are within a factor of 2 of `norm`, with either sign."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in shapes(family, **sizes).items():
        value = torch.randn(shape, generator=generator, dtype=torch.float64)
        if name.endswith((".norm.weight", ".in_ln.weight", ".alpha")):
            value = norm * 2 ** torch.tanh(value) * torch.where(value.frac().abs() < 0.2, -1.0, 1.0)
        elif name.endswith(".freqs"):
            value = torch.exp(-math.log(10000) * torch.arange(128) / 128).double()
        else:
            value = std * value
        state[name] = value
    return state


# Sampling loops; `predict` is a function (x, t) → output that applies guidance.


def cosine_alphas_cumprod():
    def alpha_bar(u):
        return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

    product, out = 1.0, []
    for i in range(1000):
        product *= 1 - min(1 - alpha_bar((i + 1) / 1000) / alpha_bar(i / 1000), 0.999)
        out.append(product)
    return out


def dpmsolver_2m(predict, x, steps):
    """LatentLM and VibeVoice: DPM-Solver++(2M), v-prediction, midpoint, linspace, last step of order 1."""
    alphas_cumprod = cosine_alphas_cumprod()
    times = [round(999 * k / steps) for k in range(steps, 0, -1)]
    levels = [(math.sqrt(alphas_cumprod[t]), math.sqrt(1 - alphas_cumprod[t])) for t in times] + [(1.0, 0.0)]
    previous, previous_lambda = None, None
    for k, t in enumerate(times):
        (alpha, sigma), (alpha_next, sigma_next) = levels[k], levels[k + 1]
        x0 = alpha * x - sigma * predict(x, t)
        if sigma_next == 0:
            return x0
        lam, lam_next = math.log(alpha / sigma), math.log(alpha_next / sigma_next)
        h = lam_next - lam
        difference = 0 if previous is None else (x0 - previous) / ((lam - previous_lambda) / h)
        x = sigma_next / sigma * x - alpha_next * math.expm1(-h) * (x0 + 0.5 * difference)
        previous, previous_lambda = x0, lam
    raise AssertionError("unreachable")


def euler_down(predict, x, steps):
    """SynthLM: t from 1 to 0, the net predicts noise − data and is given 1000·t."""
    for k in range(steps):
        x = x - predict(x, 1000 * (1 - k / steps)) / steps
    return x


def euler_up(predict, x, steps):
    """Ming: the net is given 1000·t with t falling from 1, and predicts data − noise."""
    for k in range(steps):
        x = x + predict(x, 1000 * (1 - k / steps)) / steps
    return x


def ancestral(predict, x, noise, times):
    """MAR: learned-range DDPM over spaced timesteps (falling), noise [S, B, C]; predict gives [B, 2C]."""
    alphas_cumprod = cosine_alphas_cumprod()
    channels = x.shape[-1]
    for k, t in enumerate(times):
        now = alphas_cumprod[t]
        following = alphas_cumprod[times[k + 1]] if k + 1 < len(times) else 1.0
        beta = 1 - now / following
        output = predict(x, t)
        epsilon, v = output[:, :channels], output[:, channels:]
        x0 = x / math.sqrt(now) - math.sqrt(1 / now - 1) * epsilon
        mean = (beta * math.sqrt(following) * x0 + (1 - following) * math.sqrt(now / following) * x) / (1 - now)
        if k + 1 == len(times):
            return mean
        posterior = beta * (1 - following) / (1 - now)
        fraction = (v + 1) / 2
        log_variance = fraction * math.log(beta) + (1 - fraction) * math.log(posterior)
        x = mean + torch.exp(0.5 * log_variance) * noise[k]
    raise AssertionError("unreachable")


def nextstep_sde(predict, x, noise, steps):
    """NextStep: Euler–Maruyama on linspace(0, 0.96, N), then an ODE step of 0.04; t = 0 is noise, raw t to the net."""
    times = [0.96 * k / (steps - 1) for k in range(steps)]
    for k in range(steps - 1):
        t, dt = times[k], times[k + 1] - times[k]
        drift = (1 + t) * predict(x, t) - x
        x = x + drift * dt + math.sqrt(2 * (1 - t) * dt) * noise[k]
    return x + 0.04 * predict(x, times[-1])


def midpoint_up(predict, x, steps):
    """CALM's flow: two evaluations a step, t from 0 to 1; the net is given trunc(1000·t), t in float32."""

    def given(t):
        return float(int(1000 * torch.tensor(t, dtype=torch.float32)))

    for k in range(steps):
        t, dt = k / steps, 1 / steps
        middle = x + 0.5 * dt * predict(x, given(t))
        x = x + dt * predict(middle, given(t + 0.5 * dt))
    return x


def flow_map(predict, x, steps):
    """pocket-tts: x + (t − s)·v(s, t, x)."""
    for k in range(steps):
        x = x + predict(x, (k / steps, (k + 1) / steps)) / steps
    return x


def zero_snr_alphas_cumprod():
    """Orthus: scaled-linear betas, rescaled so that the last step is noise alone (Lin et al. 2024, algorithm 1)."""
    product, roots = 1.0, []
    for i in range(1000):
        product *= 1 - (0.00085**0.5 + (0.012**0.5 - 0.00085**0.5) * i / 999) ** 2
        roots.append(math.sqrt(product))
    first, last = roots[0], roots[-1]
    return [((root - last) * first / (first - last)) ** 2 for root in roots]


def ddim_v(predict, x, times, alphas_cumprod):
    """Orthus: deterministic DDIM of a v-prediction over falling timesteps, ending at alpha_bar = 1."""
    for k, t in enumerate(times):
        now = alphas_cumprod[t]
        following = alphas_cumprod[times[k + 1]] if k + 1 < len(times) else 1.0
        v = predict(x, t)
        x0 = math.sqrt(now) * x - math.sqrt(1 - now) * v
        epsilon = math.sqrt(now) * v + math.sqrt(1 - now) * x
        x = math.sqrt(following) * x0 + math.sqrt(1 - following) * epsilon
    return x
