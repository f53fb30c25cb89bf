"""Structural doubles of LatentLM's published classes: module names, method names and call signatures are theirs.

Written from what they compute. RMSNorm is float32 inside there; here it is float64 for float64 weights, so that the
loops can be held against each other without its rounding. No dropout.
"""

import functools
import math
from types import SimpleNamespace

import diffusers
import torch
import torch.nn.functional as F
from torch import nn


class RMSNorm(nn.Module):
    def __init__(self, eps=1e-6):
        super().__init__()
        self.eps = eps

    def forward(self, x):
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)


class PatchEmbed(nn.Module):
    def __init__(self, patch, channels, hidden):
        super().__init__()
        self.proj = nn.Conv2d(channels, hidden, patch, patch)
        self.norm = nn.Identity()

    def forward(self, x):
        return self.norm(self.proj(x).flatten(2).transpose(1, 2))


class TimestepEmbedder(nn.Module):
    def __init__(self, hidden):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, hidden, bias=False), nn.SiLU(), nn.Linear(hidden, hidden, bias=False))

    def forward(self, t):
        angle = t[:, None].float() * torch.exp(-math.log(10000) * torch.arange(128, device=t.device) / 128)
        return self.mlp(torch.cat([angle.cos(), angle.sin()], -1).to(t.dtype))


class SwiGLU(nn.Module):
    def __init__(self, hidden, width):
        super().__init__()
        self.fc1 = nn.Linear(hidden, width, bias=False)
        self.gate = nn.Linear(hidden, width, bias=False)
        self.fc2 = nn.Linear(width, hidden, bias=False)

    def forward(self, x):
        return self.fc2(F.silu(self.fc1(x)) * self.gate(x))


class FusedSwiGLU(nn.Module):  # SynthLM: chunks up and gate, and the activation on the second
    def __init__(self, hidden, width):
        super().__init__()
        self.up_gate = nn.Linear(hidden, 2 * width, bias=False)
        self.down_proj = nn.Linear(width, hidden, bias=False)

    def forward(self, x):
        up, gate = self.up_gate(x).chunk(2, -1)
        return self.down_proj(up * F.silu(gate))


class AdaLNzero(nn.Module):
    def __init__(self, hidden, chunks):
        super().__init__()
        self.proj = nn.Linear(hidden, chunks * hidden, bias=False)

    def forward(self, c):
        return self.proj(F.silu(c))


def modulation(hidden, chunks, later):
    return (
        AdaLNzero(hidden, chunks) if later else nn.Sequential(nn.SiLU(), nn.Linear(hidden, chunks * hidden, bias=False))
    )


class Block(nn.Module):  # one head: the backbone is the model's own, patched or not
    def __init__(self, hidden, width):
        super().__init__()
        self.norm1, self.norm2 = RMSNorm(), RMSNorm()
        self.qkv = nn.Linear(hidden, 3 * hidden, bias=False)
        self.mlp = SwiGLU(hidden, width)

    def forward(self, x, cache):
        q, k, v = self.qkv(self.norm1(x)).chunk(3, -1)
        cache["key"] = torch.cat([cache["key"], k], 1) if "key" in cache else k
        cache["value"] = torch.cat([cache["value"], v], 1) if "value" in cache else v
        x = x + F.scaled_dot_product_attention(q, cache["key"], cache["value"])
        return x + self.mlp(self.norm2(x))


class MLPBlock(nn.Module):
    def __init__(self, hidden, width, later):
        super().__init__()
        self.norm = RMSNorm()
        self.mlp = (FusedSwiGLU if later else SwiGLU)(hidden, width)
        self.adaLN_modulation = modulation(hidden, 3, later)

    def forward(self, x, c):
        shift, scale, gate = self.adaLN_modulation(c).chunk(3, -1)
        return x + gate * self.mlp(self.norm(x) * (1 + scale) + shift)


class FinalLayer(nn.Module):
    def __init__(self, hidden, channels, later):
        super().__init__()
        self.norm_final = RMSNorm()
        setattr(self, "out_proj" if later else "linear", nn.Linear(hidden, channels, bias=False))
        self.adaLN_modulation = modulation(hidden, 2, later)

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c).chunk(2, -1)
        x = self.norm_final(x) * (1 + scale) + shift
        return self.out_proj(x) if hasattr(self, "out_proj") else self.linear(x)


class ConditionLayer(nn.Module):
    def __init__(self, hidden):
        super().__init__()
        self.norm_final = RMSNorm()
        self.linear = nn.Linear(hidden, hidden, bias=False)

    def forward(self, x):
        return self.linear(self.norm_final(x))


class Transformer(nn.Module):
    def __init__(self, input_size=2, in_channels=4, hidden_size=64, width=128, depth=1, diffusion_depth=2, patch=1):
        super().__init__()
        self.input_size, self.in_channels, self.patch = input_size, in_channels, patch
        self.flatten_input_size = input_size**2
        self.x_embedder = PatchEmbed(patch, in_channels, hidden_size)
        self.noisy_x_embedder = PatchEmbed(patch, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = nn.Embedding(11, hidden_size)
        self.blocks = nn.ModuleList(Block(hidden_size, width) for _ in range(depth))
        self.diffusion_blocks = nn.ModuleList(MLPBlock(hidden_size, width, False) for _ in range(diffusion_depth))
        self.condition_layer = ConditionLayer(hidden_size)
        self.final_layer = FinalLayer(hidden_size, in_channels * patch**2, False)

    def forward_recurrent(self, x, start_pos=0, incremental_state=None):
        x = self.y_embedder(x)[:, None] if start_pos == 0 else self.x_embedder(x)
        for i, block in enumerate(self.blocks):
            x = block(x, incremental_state.setdefault(i, {}))
        return self.condition_layer(x)

    def forward_diffusion(self, x, t, condition):
        c = condition + self.t_embedder(t.view(-1)).view(len(t), 1, -1)
        h = self.noisy_x_embedder(x)
        for block in self.diffusion_blocks:
            h = block(h, c)
        return self.final_layer(h, c).view(x.shape)

    def sample_with_cfg(self, prev_token, cfg_scale, sample_func):
        half, state, samples = len(prev_token) // 2, {}, []
        weight = self.final_layer.linear.weight
        for i in range(self.flatten_input_size):
            z = torch.randn(
                2 * half, self.in_channels, self.patch, self.patch, dtype=weight.dtype, device=weight.device
            )
            given = torch.cat([prev_token, prev_token]) if i else prev_token
            condition = self.forward_recurrent(given, start_pos=i, incremental_state=state)
            network = functools.partial(self.forward_with_cfg, condition=condition, cfg_scale=cfg_scale)
            prev_token, _ = sample_func(network, z).chunk(2)
            samples.append(prev_token)
        return torch.stack(samples, 2).view(half, self.in_channels, self.input_size, self.input_size)

    def forward_with_cfg(self, x, t, condition, cfg_scale):
        half = x[: len(x) // 2]
        with_class, without = self.forward_diffusion(torch.cat([half, half]), t, condition).chunk(2)
        guided = without + cfg_scale * (with_class - without)
        return torch.cat([guided, guided])


class LaterTransformer(nn.Module):
    """SynthLM's later layout: tokens [B, T, C], other names; its backbone is shortened to the last token here."""

    def __init__(self, seq_len=4, in_channels=4, hidden_size=64, width=128):
        super().__init__()
        self.seq_len, self.in_channels = seq_len, in_channels
        self.input_embedder = nn.Linear(in_channels, hidden_size, bias=False)
        self.noisy_input_embedder = nn.Linear(in_channels, hidden_size, bias=False)
        self.time_embedder = TimestepEmbedder(hidden_size)
        self.label_embedder = nn.Embedding(11, hidden_size)
        self.diffusion_blocks = nn.ModuleList(MLPBlock(hidden_size, width, True) for _ in range(2))
        self.condition_layer = ConditionLayer(hidden_size)
        self.final_layer = FinalLayer(hidden_size, in_channels, True)

    def forward_recurrent(self, hidden_states, start_pos=0, inference_params=None):
        first = start_pos == 0
        return self.condition_layer(
            self.label_embedder(hidden_states)[:, None] if first else self.input_embedder(hidden_states)
        )

    def forward_diffusion(self, hidden_states, timesteps, conditioning):
        conditioning = conditioning + self.time_embedder(timesteps.view(-1))[:, None]
        hidden_states = self.noisy_input_embedder(hidden_states)
        for block in self.diffusion_blocks:
            hidden_states = block(hidden_states, conditioning)
        return self.final_layer(hidden_states, conditioning)

    def sample_with_cfg(self, labels, cfg_scale, sample_func):
        prev_token, samples, weight = labels, [], self.final_layer.out_proj.weight
        for i in range(self.seq_len):
            noise = torch.randn(len(labels), 1, self.in_channels, dtype=weight.dtype, device=weight.device)
            conditioning = self.forward_recurrent(torch.cat([prev_token] * 2) if i else prev_token, start_pos=i)
            network = functools.partial(self.forward_with_cfg, conditioning=conditioning, cfg_scale=cfg_scale)
            prev_token, _ = sample_func(network, noise).chunk(2)
            samples.append(prev_token)
        return torch.cat(samples, 1)

    def forward_with_cfg(self, hidden_states, timesteps, conditioning, cfg_scale):
        half = hidden_states[: len(hidden_states) // 2]
        eps = self.forward_diffusion(torch.cat([half, half]), timesteps, conditioning)
        with_class, without = eps.chunk(2)
        return torch.cat([without + cfg_scale * (with_class - without)] * 2)


class DPMSolverMultistepScheduler(diffusers.DPMSolverMultistepScheduler):
    """LatentLM's and VibeVoice's copy of diffusers' class under its name, with one more name for a schedule."""

    def __init__(self, num_train_timesteps=1000, beta_schedule="cosine", prediction_type="epsilon", **options):
        known = {"cosine": "squaredcos_cap_v2"}.get(beta_schedule, beta_schedule)
        super().__init__(num_train_timesteps, beta_schedule=known, prediction_type=prediction_type, **options)
        self.register_to_config(beta_schedule=beta_schedule)


class FlowMatchingScheduler:
    """SynthLM's Euler steps along a flow, t from 1 to 0."""

    def __init__(self, num_train_timesteps=1000, prediction_type="flow"):
        self.config = {"num_train_timesteps": num_train_timesteps, "prediction_type": prediction_type}

    def set_timesteps(self, num_inference_steps):
        self.timesteps = torch.linspace(1.0, 0.0, num_inference_steps + 1)[:-1]

    def step(self, model_output, timestep, sample):
        k = int((self.timesteps == timestep).nonzero()[0])
        following = self.timesteps[k + 1] if k + 1 < len(self.timesteps) else torch.tensor(0.0)
        change = following.to(sample.dtype) - timestep.to(sample.dtype)
        return SimpleNamespace(prev_sample=sample + change * model_output)


def p_sample_of(scheduler, steps):
    """sample_func as the published scripts write it: a closure over the scheduler."""

    def p_sample(model, image):
        scheduler.set_timesteps(steps)
        scale = 1000.0 if isinstance(scheduler, FlowMatchingScheduler) else 1
        for t in scheduler.timesteps:
            output = model(image, (t * scale).repeat(image.shape[0]).to(image))
            image = scheduler.step(output, t, image).prev_sample
        return image

    return p_sample


def randomise(module):
    """Published heads start at zero: weights of std 0.1, those of norms about 1."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.normal_(std=0.1, generator=generator)
            if name.endswith("norm.weight"):
                parameter += 1
    return module.eval()


def same_noise(monkeypatch, seed):
    """Global draws that are the same numbers, exact in bfloat16, whatever dtype is asked for."""
    ours, randn = torch.Generator().manual_seed(seed), torch.randn

    def rounded(*shape, dtype=None, device=None, generator=None):
        drawn = randn(*shape, generator=generator or ours)
        return (drawn if generator else drawn.bfloat16()).to(dtype or torch.float32)

    monkeypatch.setattr(torch, "randn", rounded)


def relative(got, want):
    return float((got.double() - want.double()).norm() / want.double().norm())
