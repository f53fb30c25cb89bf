"""Doubles of MAR and Harmon: their projects' module names, signatures, order of draws and roundings; tiny backbones.

Written down from what LTH14/mar and wusize/Harmon do. The head runs on any device (`.cuda()` is `.to(z.device)`), the
backbones on the CPU: they are a few layers, and Harmon has neither tokenizer nor VAE. The published code keeps tables
and sinusoids in float32; `widen` makes all of it float64.
"""

import copy
import enum
import itertools
import math

import numpy as np
import torch
from torch import nn


class ModelMeanType(enum.Enum):
    PREVIOUS_X = enum.auto()
    START_X = enum.auto()
    EPSILON = enum.auto()


class ModelVarType(enum.Enum):
    LEARNED = enum.auto()
    FIXED_LARGE = enum.auto()
    LEARNED_RANGE = enum.auto()


class SpacedDiffusion:
    """Ancestral sampling on the kept timesteps' own betas, with a variance that the network interpolates."""

    def __init__(self, use_timesteps, betas, model_mean_type, model_var_type):
        self.model_mean_type, self.model_var_type = model_mean_type, model_var_type
        self.timestep_map, self.tables = sorted(use_timesteps), torch.float32
        bar = np.cumprod(1 - betas)[self.timestep_map]
        before = np.append(1.0, bar[:-1])
        self.betas, self.num_timesteps = 1 - bar / before, len(bar)
        # Published code goes by the betas from here on, which near 1 have lost digits: 5e-8 of a bar of 2e-9.
        bar = np.cumprod(1 - self.betas)
        before = np.append(1.0, bar[:-1])
        variance = self.betas * (1 - before) / (1 - bar)
        self.low = np.log(np.append(variance[1], variance[1:]))
        self.per_x, self.per_eps = np.sqrt(1 / bar), np.sqrt(1 / bar - 1)
        self.per_start = self.betas * np.sqrt(before) / (1 - bar)
        self.per_state = (1 - before) * np.sqrt(1 - self.betas) / (1 - bar)

    def at(self, table, t, x):
        return torch.from_numpy(table).to(x.device)[t].to(self.tables)[:, None].expand(x.shape)

    def p_sample_loop(
        self, model, shape, noise=None, clip_denoised=True, model_kwargs=None, progress=False, temperature=1.0
    ):
        assert not clip_denoised and tuple(shape) == tuple(noise.shape)
        x = noise
        with torch.no_grad():
            for i in reversed(range(self.num_timesteps)):
                t = torch.tensor([i] * len(x), device=x.device)
                kept = torch.tensor(self.timestep_map, device=x.device)[t]
                eps, v = model(x, kept, **model_kwargs).split(x.shape[1], dim=1)
                share = (v + 1) / 2
                log_variance = share * self.at(np.log(self.betas), t, x) + (1 - share) * self.at(self.low, t, x)
                start = self.at(self.per_x, t, x) * x - self.at(self.per_eps, t, x) * eps
                mean = self.at(self.per_start, t, x) * start + self.at(self.per_state, t, x) * x
                drawn = torch.randn_like(x)
                x = mean + float(i != 0) * torch.exp(0.5 * log_variance) * drawn * temperature
        return x


def create_diffusion(timestep_respacing, noise_schedule="cosine", learn_sigma=True, predict_xstart=False):
    assert noise_schedule == "cosine"
    bar = [math.cos((i / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(1001)]
    betas = np.array([min(1 - after / before, 0.999) for before, after in itertools.pairwise(bar)])
    steps, first = [], 0
    counts = [int(count) for count in timestep_respacing.split(",")] if timestep_respacing else [1000]
    for section, count in enumerate(counts):
        size = 1000 // len(counts) + (section < 1000 % len(counts))
        position, stride = 0.0, (size - 1) / (count - 1) if count > 1 else 1.0
        for _ in range(count):
            steps.append(first + round(position))
            position += stride
        first += size
    mean = ModelMeanType.START_X if predict_xstart else ModelMeanType.EPSILON
    variance = ModelVarType.LEARNED_RANGE if learn_sigma else ModelVarType.FIXED_LARGE
    return SpacedDiffusion(set(steps), betas, mean, variance)


class TimestepEmbedder(nn.Module):
    def __init__(self, hidden_size, frequency_embedding_size=256):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(frequency_embedding_size, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        )
        self.frequency_embedding_size, self.tables = frequency_embedding_size, torch.float32

    def forward(self, t):
        half = self.frequency_embedding_size // 2
        frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=self.tables) / half)
        angles = t[:, None].to(self.tables) * frequencies.to(t.device)
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1).to(self.mlp[0].weight.dtype))


class ResBlock(nn.Module):
    def __init__(self, channels, width=None):
        super().__init__()
        self.in_ln = nn.LayerNorm(channels, eps=1e-6)
        width = width or channels
        self.mlp = nn.Sequential(nn.Linear(channels, width), nn.SiLU(), nn.Linear(width, channels))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(channels, 3 * channels))

    def forward(self, x, y):
        shift, scale, gate = self.adaLN_modulation(y).chunk(3, dim=-1)
        return x + gate * self.mlp(self.in_ln(x) * (1 + scale) + shift)


class FinalLayer(nn.Module):
    def __init__(self, model_channels, out_channels):
        super().__init__()
        self.norm_final = nn.LayerNorm(model_channels, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(model_channels, out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(model_channels, 2 * model_channels))

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=-1)
        return self.linear(self.norm_final(x) * (1 + scale) + shift)


class SimpleMLPAdaLN(nn.Module):
    def __init__(self, in_channels, model_channels, out_channels, z_channels, num_res_blocks):
        super().__init__()
        self.in_channels = in_channels
        self.time_embed = TimestepEmbedder(model_channels)
        self.cond_embed = nn.Linear(z_channels, model_channels)
        self.input_proj = nn.Linear(in_channels, model_channels)
        self.res_blocks = nn.ModuleList(ResBlock(model_channels) for _ in range(num_res_blocks))
        self.final_layer = FinalLayer(model_channels, out_channels)

    def forward(self, x, t, c):
        dtype = self.input_proj.weight.dtype
        x, y = self.input_proj(x.to(dtype)), self.time_embed(t) + self.cond_embed(c.to(dtype))
        for block in self.res_blocks:
            x = block(x, y)
        return self.final_layer(x, y)

    def forward_with_cfg(self, x, t, c, cfg_scale):
        half = x[: len(x) // 2]
        out = self.forward(torch.cat([half, half]), t, c)
        eps, rest = out[:, : self.in_channels], out[:, self.in_channels :]
        cond, uncond = eps.chunk(2)
        guided = uncond + cfg_scale * (cond - uncond)
        return torch.cat([torch.cat([guided, guided]), rest], dim=1)


class DiffLoss(nn.Module):
    def __init__(self, target_channels, z_channels, depth, width, num_sampling_steps):
        super().__init__()
        self.in_channels = target_channels
        self.net = SimpleMLPAdaLN(target_channels, width, target_channels * 2, z_channels, depth)
        self.train_diffusion = create_diffusion(timestep_respacing="")
        self.gen_diffusion = create_diffusion(timestep_respacing=num_sampling_steps)

    def sample(self, z, temperature=1.0, cfg=1.0):
        if cfg != 1.0:
            half = torch.randn(z.shape[0] // 2, self.in_channels).to(z.device)
            noise, sample_fn, arguments = torch.cat([half, half]), self.net.forward_with_cfg, dict(c=z, cfg_scale=cfg)
        else:
            noise, sample_fn, arguments = (
                torch.randn(z.shape[0], self.in_channels).to(z.device),
                self.net.forward,
                dict(c=z),
            )
        return self.gen_diffusion.p_sample_loop(
            sample_fn, noise.shape, noise, clip_denoised=False, model_kwargs=arguments, progress=False,
            temperature=temperature,
        )  # fmt: skip


class Block(nn.Module):
    """Mixes tokens by their mean: all that a backbone must do here."""

    def __init__(self, dim):
        super().__init__()
        self.norm1, self.mlp = nn.LayerNorm(dim), nn.Linear(dim, dim)

    def forward(self, x):
        return x + torch.tanh(self.mlp(self.norm1(x) + x.mean(1, keepdim=True)))


class MAR(nn.Module):
    def __init__(self, seq=4, embed_dim=24, vae_embed_dim=5, classes=7, buffer_size=2, diffloss_d=3, diffloss_w=32,
                 num_sampling_steps="8"):  # fmt: skip
        super().__init__()
        self.seq_h = self.seq_w = seq
        self.seq_len, self.token_embed_dim, self.buffer_size = seq * seq, vae_embed_dim, buffer_size
        self.class_emb = nn.Embedding(classes, embed_dim)
        self.fake_latent = nn.Parameter(torch.randn(1, embed_dim))
        self.z_proj, self.z_proj_ln = nn.Linear(vae_embed_dim, embed_dim), nn.LayerNorm(embed_dim, eps=1e-6)
        self.encoder_pos_embed_learned = nn.Parameter(torch.randn(1, self.seq_len + buffer_size, embed_dim))
        self.encoder_blocks = nn.ModuleList([Block(embed_dim)])
        self.decoder_embed = nn.Linear(embed_dim, embed_dim)
        self.mask_token = nn.Parameter(torch.randn(1, 1, embed_dim))
        self.decoder_blocks = nn.ModuleList([Block(embed_dim)])
        self.diffusion_pos_embed_learned = nn.Parameter(torch.randn(1, self.seq_len, embed_dim))
        self.diffloss = DiffLoss(vae_embed_dim, embed_dim, diffloss_d, diffloss_w, num_sampling_steps)

    @property
    def dtype(self):
        return self.fake_latent.dtype

    def sample_orders(self, bsz):
        return torch.tensor(np.array([np.random.permutation(self.seq_len) for _ in range(bsz)]))

    def forward_mae_encoder(self, x, mask, class_embedding):
        x = self.z_proj(x.to(self.dtype))
        x = torch.cat([class_embedding[:, None].expand(-1, self.buffer_size, -1), x], dim=1)
        x = self.z_proj_ln(x + self.encoder_pos_embed_learned)
        kept = torch.cat([torch.ones(len(x), self.buffer_size, dtype=torch.bool), mask == 0], dim=1)
        x = x[kept].reshape(len(x), -1, x.shape[-1])
        for block in self.encoder_blocks:
            x = block(x)
        return x

    def forward_mae_decoder(self, x, mask):
        kept = torch.cat([torch.ones(len(x), self.buffer_size, dtype=torch.bool), mask == 0], dim=1)
        x = self.decoder_embed(x)
        whole = self.mask_token.to(x.dtype).repeat(*kept.shape, 1)
        whole[kept] = x.flatten(0, 1)
        for block in self.decoder_blocks:
            whole = block(whole)
        return whole[:, self.buffer_size :] + self.diffusion_pos_embed_learned

    def sample_tokens(
        self, bsz, num_iter=64, cfg=1.0, cfg_schedule="linear", labels=None, temperature=1.0, progress=False
    ):
        mask, tokens = torch.ones(bsz, self.seq_len), torch.zeros(bsz, self.seq_len, self.token_embed_dim)
        tokens, orders = tokens.to(self.dtype), self.sample_orders(bsz)
        for step in range(num_iter):
            classes, null = self.class_emb(labels), self.fake_latent.repeat(bsz, 1)
            if cfg != 1.0:
                both = torch.cat([tokens, tokens]), torch.cat([mask, mask]), torch.cat([classes, null])
            else:
                both = tokens, mask, classes
            z = self.forward_mae_decoder(self.forward_mae_encoder(*both), both[1])
            to_predict, mask, mask_len = next_mask(mask, orders, step, num_iter, self.seq_len)
            z = z[torch.cat([to_predict] * (len(z) // bsz))]
            # A tensor of one element, as MAR hands over.
            now = 1 + (cfg - 1) * (self.seq_len - mask_len) / self.seq_len if cfg_schedule == "linear" else cfg
            sampled = self.diffloss.sample(z, temperature, now)
            if cfg != 1.0:
                sampled, _ = sampled.chunk(2, dim=0)
            tokens = tokens.clone()
            tokens[to_predict] = sampled.to(tokens.dtype)
        return tokens.mT.unflatten(-1, (self.seq_h, self.seq_w))


def next_mask(mask, orders, step, num_iter, length):
    """What is predicted now, the mask after that, and its length [1]: a cosine schedule, one token at least."""
    left = torch.tensor([np.floor(length * np.cos(math.pi / 2 * (step + 1) / num_iter))], dtype=torch.float32)
    left = torch.maximum(torch.ones(1), torch.minimum(mask.sum(-1)[:1] - 1, left))
    following = torch.zeros_like(mask).scatter(1, orders[:, : int(left)], 1.0)
    to_predict = mask.bool() if step >= num_iter - 1 else mask.bool() ^ following.bool()
    return to_predict, following, left


class Harmon(nn.Module):
    """Both branches are one batch: its second half is the null prompt's."""

    def __init__(self, **kwargs):
        super().__init__()
        self.mar = MAR(**kwargs)
        dim = self.mar.fake_latent.shape[-1]
        self.llm = nn.Embedding(11, dim)
        self.proj_in, self.proj_out = (nn.Sequential(nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, dim)) for _ in "io")

    @torch.no_grad()
    def sample(self, input_ids=None, attention_mask=None, num_iter=64, cfg=1.0, cfg_schedule="constant",
               temperature=1.0, progress=False):  # fmt: skip
        mar, bsz, length = self.mar, len(attention_mask), self.mar.seq_len
        prompt = (self.llm(input_ids) * attention_mask[..., None]).mean(1)
        mask, orders = torch.ones(bsz, length), mar.sample_orders(bsz)
        tokens = torch.zeros(bsz, length, mar.token_embed_dim, dtype=mar.dtype)
        if cfg != 1.0:
            orders[bsz // 2 :] = orders[: bsz // 2]
        for step in range(num_iter):
            x = mar.forward_mae_encoder(tokens, mask, mar.fake_latent.expand(bsz, -1))
            z = mar.forward_mae_decoder(x + self.proj_out(self.proj_in(x) + prompt[:, None]), mask)
            to_predict, mask, mask_len = next_mask(mask, orders, step, num_iter, length)
            now = 1 + (cfg - 1) * (length - mask_len) / length if cfg_schedule == "linear" else cfg
            sampled = mar.diffloss.sample(z[to_predict], temperature, now).to(mar.dtype)
            tokens = tokens.clone()
            tokens[to_predict] = sampled
            if cfg != 1.0:
                tokens[bsz // 2 :] = tokens[: bsz // 2]
        tokens = tokens.mT.unflatten(-1, (mar.seq_h, mar.seq_w))
        return tokens[: bsz // 2] if cfg != 1.0 else tokens


def randomise(model, seed=0):
    """Weights as after training: modulations and the output start from zero, and would give zeros."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            scale = 0.8 / math.sqrt(weight.shape[-1]) if weight.ndim > 1 else 0.1
            weight.copy_(torch.randn(weight.shape, generator=generator) * scale + (1.0 if "ln.weight" in name else 0.0))
    return model.eval().requires_grad_(False)


def widen(model):
    """A copy that computes everything in float64."""
    model = copy.deepcopy(model).double()
    for module in model.modules():
        if hasattr(module, "tables"):
            module.tables = torch.float64
        if hasattr(module, "gen_diffusion"):
            module.gen_diffusion.tables = torch.float64
    return model


def error(ours, theirs):
    return ((ours.double() - theirs.double()).norm() / theirs.double().norm()).item()


def noise_as_float32(monkeypatch):
    """A float64 loop then has the noise of the float32 loop."""
    plain = torch.randn_like
    monkeypatch.setattr(torch, "randn_like", lambda x: plain(x.float()).to(x.dtype))
