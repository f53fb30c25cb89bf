"""Doubles of NextStep-1's three samplers: the projects' module names, signatures, draws and roundings; a tiny backbone.

Written down from what stepfun-ai/NextStep-1 does. The language model is a running mean. `tables` is the dtype of times,
coefficients and the state, published float32; `toy_mar.widen` makes it float64.
"""

import functools
import math

import torch
import torch.nn.functional as F
from torch import nn
from toy_mar import FinalLayer, ResBlock, TimestepEmbedder


class CompileManager:
    """ENABLE_TORCH_COMPILE: here a compiled call is counted and runs eagerly."""

    compile_enabled, calls = False, 0


compile_manager = CompileManager()


def smart_compile(**options):
    def decorate(function):
        @functools.wraps(function)
        def wrapper(*args, **kwargs):
            compile_manager.calls += compile_manager.compile_enabled
            return function(*args, **kwargs)

        wrapper.original = wrapper.compiled = function
        return wrapper

    return decorate


class SimpleMLPAdaLN(nn.Module):
    def __init__(self, input_dim, cond_dim, dim=1536, layers=12, mlp_ratio=1.0):
        super().__init__()
        self.input_dim, self.cond_dim = input_dim, cond_dim
        self.time_embed = TimestepEmbedder(dim)
        self.cond_embed, self.input_proj = nn.Linear(cond_dim, dim), nn.Linear(input_dim, dim)
        self.res_blocks = nn.ModuleList(ResBlock(dim, int(dim * mlp_ratio)) for _ in range(layers))
        self.final_layer = FinalLayer(dim, input_dim)

    @smart_compile()
    def forward(self, x, t, c):
        x, y = self.input_proj(x), self.time_embed(t) + self.cond_embed(c)
        for block in self.res_blocks:
            x = block(x, y)
        return self.final_layer(x, y)


class Head(nn.Module):
    """What the three have in common."""

    def __init__(self, input_dim, cond_dim, dim=1536, layers=12, mlp_ratio=1.0):
        super().__init__()
        self.input_dim, self.tables = input_dim, torch.float32
        self.net = SimpleMLPAdaLN(input_dim, cond_dim, dim, layers, mlp_ratio)

    def draw(self, rows, noise_repeat):
        if rows % noise_repeat != 0:
            raise ValueError(f"Batch size ({rows}) must be divisible by noise repeat ({noise_repeat})")
        device = self.net.input_proj.weight.device
        shared = torch.randn((noise_repeat, self.input_dim), device=device, dtype=torch.float32)
        return shared.repeat(rows // noise_repeat, 1).to(self.tables)

    def times(self, end, count, shift):
        t = torch.linspace(0, end, count, dtype=self.tables)
        return t / (shift - (shift - 1) * t)

    def velocity(self, x, t, c, cfg, cfg_img, ways):
        v = self.net(torch.cat([x] * ways).to(c.dtype), t.expand(len(c)).to(c), c).to(self.tables)
        if ways == 2:
            cond, uncond = v.chunk(2)
            return uncond + cfg * (cond - uncond)
        if ways == 3:
            cond, first, second = v.chunk(3)
            return second + cfg_img * (first - second) + cfg * (cond - first)
        return v

    def maruyama(self, x, v, t, dt, noise):
        score = (t * v - x) / ((1 - t) ** 2 + t * (1 - t))
        return x + (v + (1 - t) * score) * dt + torch.sqrt(2 * (1 - t)) * noise * torch.sqrt(dt)


class FlowMatchingHead1(Head):
    """NextStep-1 as first released."""

    @smart_compile(options={"triton.cudagraphs": True}, fullgraph=True)
    @torch.no_grad()
    def sample(self, c, cfg=1.0, cfg2=1.0, timesteps_shift=1.0, num_sampling_steps=20, last_step_size=0.04,
               noise_repeat=1):  # fmt: skip
        ways = 1 + (cfg > 1.0) + (cfg2 > 1.0)
        rows = len(c) // ways
        x = self.draw(rows, noise_repeat)
        times = self.times(1 - last_step_size, num_sampling_steps, timesteps_shift)
        for i in range(num_sampling_steps - 1):
            v = self.velocity(x, times[i], c, cfg, cfg2, ways)
            x = self.maruyama(x, v, times[i], times[i + 1] - times[i], self.draw(rows, noise_repeat))
        return (x + self.velocity(x, times[-1], c, cfg, cfg2, ways) * last_step_size).to(c.dtype)


class FlowMatchingHead11(Head):
    """NextStep-1.1."""

    @smart_compile(options={"triton.cudagraphs": True}, fullgraph=True)
    @torch.no_grad()
    def sample(self, c, cfg=1.0, cfg_img=1.0, timesteps_shift=1.0, num_sampling_steps=20, last_step_size=0.0,
               noise_repeat=1):  # fmt: skip
        ways = 1 + (cfg > 1.0) + (cfg_img > 1.0)
        rows = len(c) // ways
        x = self.draw(rows, noise_repeat)
        times = self.times(1, num_sampling_steps + 1, timesteps_shift)  # ends at 1 with any shift
        for i in range(num_sampling_steps):
            v = self.velocity(x, times[i], c, cfg, cfg_img, ways)
            x = self.maruyama(x, v, times[i], times[i + 1] - times[i], self.draw(rows, noise_repeat))
        return x.to(c.dtype)


class FlowMatchingHeadTraining(Head):
    """That of the training code."""

    @smart_compile(options={"triton.cudagraphs": True}, fullgraph=True)
    @torch.no_grad()
    def sample(self, c, noise=None, cfg=1.0, cfg_img=1.0, timesteps_shift=1.0, num_sampling_steps=20,
               last_step_size=0.0, noise_repeat=1, sde_solver=False, sde_type="sde", noise_level=0.8):  # fmt: skip
        ways = 1 + (cfg > 1.0) + (cfg_img > 1.0)
        shape = len(c) // ways, self.input_dim
        x = torch.randn(shape, device=c.device, dtype=c.dtype) if noise is None else noise
        times = self.times(1, num_sampling_steps + 1, timesteps_shift)
        for i in range(num_sampling_steps):
            t, u = times[i], times[i + 1]
            v = self.velocity(x, t, c, cfg, cfg_img, ways)
            start, end, left = x - v * t, x + v * (1 - t), 1 - t
            if sde_type == "cps":
                std = (1 - u) * math.sin(noise_level * math.pi / 2)
                drawn = torch.randn(shape, device=c.device, dtype=c.dtype)
                x = start * torch.sqrt((1 - u) ** 2 - std**2) + end * u + std * drawn
            elif sde_type == "sde":
                # times[-2] is a time where left is a noise level: as published.
                std = torch.sqrt(left / (1 - torch.where(left == 1, times[-2], left))) * noise_level
                drawn = torch.randn(shape, device=c.device, dtype=c.dtype)
                x = start * (1 - u) + end * u - std**2 * (u - t) / (2 * left) * start + std * torch.sqrt(u - t) * drawn
            else:
                x = start * (1 - u) + end * u
        return x.to(c.dtype)


HEADS = {"1": FlowMatchingHead1, "1.1": FlowMatchingHead11, "training": FlowMatchingHeadTraining}


class NextStep(nn.Module):
    def __init__(self, release, hidden=24, token_dim=8, dim=32, layers=3):
        super().__init__()
        self.embed_tokens = nn.Embedding(9, hidden)
        self.layers = nn.ModuleList([nn.Linear(hidden, hidden)])
        self.image_in_projector, self.image_out_projector = nn.Linear(token_dim, hidden), nn.Linear(hidden, hidden)
        self.image_head = HEADS[release](token_dim, hidden, dim, layers)

    def forward_model(self, inputs_embeds, past):
        """A mean of all so far, [rows, 1, hidden], and the sums that it comes from."""
        total = inputs_embeds.sum(1, keepdim=True) if past is None else past[0] + inputs_embeds.sum(1, keepdim=True)
        count = inputs_embeds.shape[1] + (0 if past is None else past[1])
        return torch.tanh(self.layers[0](total / count)), (total, count)

    @torch.no_grad()
    def decoding(self, input_ids, max_new_len, num_images_per_caption=1, use_norm=False, cfg=1.0, cfg_img=1.0,
                 cfg_schedule="constant", timesteps_shift=1.0, num_sampling_steps=20):  # fmt: skip
        """The pipeline's loop over tokens: rows are captions, then as many without text (then without image)."""
        c, past = self.forward_model(self.embed_tokens(input_ids), None)
        second = "cfg2" if isinstance(self.image_head, FlowMatchingHead1) else "cfg_img"
        tokens = []
        for step in range(max_new_len):
            left = (max_new_len - step) / max_new_len if cfg_schedule == "linear" else 1.0
            token = self.image_head.sample(
                c=self.image_out_projector(c).squeeze(1), cfg=1 + (cfg - 1) * left, timesteps_shift=timesteps_shift,
                num_sampling_steps=num_sampling_steps, noise_repeat=num_images_per_caption,
                **{second: 1 + (cfg_img - 1) * left},
            )  # fmt: skip
            if use_norm:
                token = F.layer_norm(token, token.shape[1:], None, None, 1e-6)
            tokens.append(token)
            embedded = self.image_in_projector(token[:, None])
            c, past = self.forward_model(embedded.repeat(len(input_ids) // len(token), 1, 1), past)
        return torch.stack(tokens, dim=1)
