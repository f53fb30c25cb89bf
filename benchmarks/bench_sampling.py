"""fastlatent's next-token sampler against the published sampling loop: seconds per token of a whole batch.

Weights are random: N(0, 0.02) everywhere, also where training starts from zero. Guidance is on, so each sample
is two rows of the network; 20 steps of DPM-Solver++. A call samples the tokens 127 and 128 of 256 (from 0) on a
cache filled with noise: they attend to 128.5 tokens on average, as the tokens of a whole sequence do.

fastlatent           `NextTokenSampler`; `fastlatent-compiled` with compile=True; `fastlatent-int8` (CPU) with int8
                     weights: another result, so no rival's equal
plain-eager          the published loop, written down below: modulations and timestep embedding inside the loop,
                     a scheduler object set up for every token, 2·B rows all the way. Where diffusers is installed
                     the scheduler is its DPMSolverMultistepScheduler (`plain-eager-diffusers`). RoPE and timestep
                     frequencies cost it less than as published: a table, and no copy to the device at each step
plain-compiled       its backbone and head step under torch.compile
plain-reduce-overhead, plain-graph   CUDA: that with mode="reduce-overhead"; eager, with the scheduler and the head's
                     20 steps as one CUDA graph
floor                reads as many bytes as the weights of one token: backbone and modulations once, FFNs and output
                     of the head at every step. `floor-once`: all of them once. Reading is Tensor.sum over 1 GiB of
                     float32 with the same threads. Reads of the KV cache are in neither

`bytes` counts the weights once, embeddings left out; `head_bytes` of a case what the head's steps read. No head here
fits a 32 MiB L3: Base reads 42.5 MB a step in bfloat16, 85 MB in float32. That does fit the 50 to 60 MB L2 of an H100
or H200, so there `floor` can be beaten for Base in bfloat16, and `floor-once` cannot.

Compiling is part of the 60 s warm-up. After a "timeout" a second run gets further: Inductor keeps what it has
compiled on disk. Busy neighbours ruin a run on CPU threads, since each product waits for the slower thread: a head
step of Base took 51 ms on 2 threads and 15 ms on one while 3 processes shared the 2 cores.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache

import harness
import pytest
import rows as row_files
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastlatent.diffusion.solvers import build_table
from fastlatent.models.transformer import Transformer, TransformerConfig, published_size, rope_table
from fastlatent.sampling.autoregressive import NextTokenSampler

STEPS = 20
CFG_SCALE = 3.0
TOKENS = 2  # per call, around the middle of the sequence
READ_BYTES = 2**30
DATA = {"in_channels": 16, "input_size": 16, "num_classes": 1000}
MODELS = ("Transformer-Base", "Transformer-Medium")
CONFIGS = {name: TransformerConfig(**published_size(name), **DATA) for name in MODELS}
# For the test below.
CONFIGS["tiny"] = TransformerConfig(
    hidden_size=64, depth=2, num_heads=2, num_kv_heads=2, mlp_ratio=3, diffusion_depth=2, in_channels=4, input_size=4,
    num_classes=5,
)  # fmt: skip
HAS_DIFFUSERS = importlib.util.find_spec("diffusers") is not None
PLAIN = "plain-eager-diffusers" if HAS_DIFFUSERS else "plain-eager"

# ---- the published loop ----------------------------------------------------------------------------------


def rms_norm(x: Tensor) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def swiglu(mlp: nn.Module, x: Tensor) -> Tensor:
    return mlp.fc2(F.silu(mlp.fc1(x)) * mlp.gate(x))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)


class PlainScheduler:
    """DPM-Solver++(2M), midpoint, final sigma 0; its coefficients are 0-dim CPU tensors made at every step."""

    def __init__(self) -> None:
        def alpha_bar(u: float) -> float:
            return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

        betas = [min(1 - alpha_bar((i + 1) / 1000) / alpha_bar(i / 1000), 0.999) for i in range(1000)]
        self.alphas_cumprod = (1 - torch.tensor(betas)).cumprod(0)

    def set_timesteps(self, steps: int) -> None:
        self.timesteps = torch.linspace(0, 999, steps + 1).round().long().flip(0)[:-1]
        alpha_bar = self.alphas_cumprod[self.timesteps]
        self.sigmas = torch.cat([((1 - alpha_bar) / alpha_bar).sqrt(), torch.zeros(1)])
        self.index, self.previous = 0, None

    def _levels(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        alpha = 1 / (self.sigmas[index] ** 2 + 1).sqrt()
        sigma = self.sigmas[index] * alpha
        return alpha, sigma, alpha.log() - sigma.log()

    def step(self, output: Tensor, timestep: Tensor, x: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        """One step with a v-prediction."""
        alpha, sigma, log_snr = self._levels(self.index)
        alpha_next, sigma_next, log_snr_next = self._levels(self.index + 1)
        data = alpha * x - sigma * output
        h = log_snr_next - log_snr
        following = sigma_next / sigma * x.float() - alpha_next * torch.expm1(-h) * data
        if 0 < self.index < len(self.timesteps) - 1:
            ratio = (log_snr - self._levels(self.index - 1)[2]) / h
            following = following - 0.5 * alpha_next * torch.expm1(-h) * (1 / ratio * (data - self.previous))
        self.index, self.previous = self.index + 1, data
        return (following.to(output.dtype),)


def scheduler() -> object:
    if not HAS_DIFFUSERS:
        return PlainScheduler()
    from diffusers import DPMSolverMultistepScheduler

    return DPMSolverMultistepScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")


Wrap = Callable[[Callable[..., Tensor]], Callable[..., Tensor]]


class PlainSampler:
    """The published loop on a Transformer's weights: 2·B rows, the conditional ones first."""

    def __init__(self, model: Transformer, wrap: Wrap = lambda function: function) -> None:
        self.model = model
        weight = model.condition_layer.linear.weight
        self.cos, self.sin = (
            table.to(weight.device, weight.dtype)[:, None]
            for table in rope_table(model.config.num_tokens, model.config.head_dim)
        )
        self.scheduler = scheduler()
        self.backbone, self.head = wrap(self.backbone_step), wrap(self.head_step)

    def backbone_step(self, h: Tensor, position: int, cache: Tensor) -> Tensor:
        config, end = self.model.config, position + 1
        cos, sin = self.cos[position], self.sin[position]
        h = h[:, None]
        for block, (keys, values) in zip(self.model.blocks, cache, strict=True):
            qkv = block.attn.qkv(rms_norm(h)).unflatten(-1, (-1, config.head_dim)).transpose(1, 2)
            q, k, v = qkv.split([config.num_heads, config.num_kv_heads, config.num_kv_heads], dim=1)
            keys[:, :, position:end] = rotate(k, cos, sin)
            values[:, :, position:end] = v
            out = F.scaled_dot_product_attention(rotate(q, cos, sin), keys[:, :, :end], values[:, :, :end])
            h = h + block.attn.proj(out.transpose(1, 2).flatten(-2))
            h = h + swiglu(block.mlp, rms_norm(h))
        return self.model.condition_layer.linear(rms_norm(h))[:, 0]

    def head_step(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """x [2·B, C] of which the first half counts, t [2·B], condition [2·B, hidden] → the guided output, twice."""
        model = self.model
        half = x[: len(x) // 2]
        x = torch.cat([half, half])
        frequencies = torch.exp(-math.log(10_000) / 128 * torch.arange(128, device=t.device, dtype=torch.float32))
        angle = t[:, None].float() * frequencies
        c = condition + model.t_embedder.mlp(torch.cat([angle.cos(), angle.sin()], dim=-1).to(t.dtype))
        h = model.noisy_x_embedder(x)
        for block in model.diffusion_blocks:
            shift, scale, gate = block.adaLN_modulation(c).chunk(3, dim=-1)
            h = h + gate * swiglu(block.mlp, rms_norm(h) * (1 + scale) + shift)
        shift, scale = model.final_layer.adaLN_modulation(c).chunk(2, dim=-1)
        output = model.final_layer.linear(rms_norm(h) * (1 + scale) + shift)
        conditional, unconditional = output.chunk(2)
        guided = unconditional + CFG_SCALE * (conditional - unconditional)
        return torch.cat([guided, guided])

    def denoise(self, x: Tensor, condition: Tensor, times: Sequence[Tensor] | None = None) -> Tensor:
        """Noise and condition of 2·B rows → token, twice. times: what `t` becomes at each step, on the device."""
        self.scheduler.set_timesteps(STEPS)
        for i, t in enumerate(self.scheduler.timesteps):
            output = self.head(x, t.repeat(len(x)).to(x) if times is None else times[i], condition)
            x = self.scheduler.step(output, t, x, return_dict=False)[0]
        return x

    def captured_denoise(self, x: Tensor, condition: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        """`denoise` as one CUDA graph, for inputs like these."""
        x, condition = x.clone(), condition.clone()
        self.scheduler.set_timesteps(STEPS)
        times = [t.repeat(len(x)).to(x) for t in self.scheduler.timesteps]
        self.denoise(x, condition, times)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = self.denoise(x, condition, times)

        def replay(noise: Tensor, new_condition: Tensor) -> Tensor:
            x.copy_(noise)
            condition.copy_(new_condition)
            graph.replay()
            return out.clone()

        return replay


def reduce_overhead(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    compiled = torch.compile(function, mode="reduce-overhead")

    def call(*args: object) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        return compiled(*args).clone()  # the next replay overwrites its output

    return call


# ---- cases -----------------------------------------------------------------------------------------------


def parameters(*modules: nn.Module) -> int:
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


@cache
def sizes(name: str) -> tuple[int, int, int]:
    """Parameters of (the backbone, the head's modulations, the head's steps), embeddings of x, t and class left out."""
    with torch.device("meta"):
        model = Transformer(CONFIGS[name])
    blocks = [*model.diffusion_blocks, model.final_layer]
    modulations = parameters(*(block.adaLN_modulation for block in blocks))
    head = parameters(model.noisy_x_embedder, *blocks) - modulations
    return parameters(model.blocks, model.condition_layer), modulations, head


def make_case(model: str, dtype: str, batch: int, device: str) -> harness.Case:
    positions = window(CONFIGS[model])
    providers = ("fastlatent", "fastlatent-compiled", PLAIN, "plain-compiled")
    providers += ("plain-reduce-overhead", "plain-graph") if device == "cuda" else ("fastlatent-int8",)
    return harness.Case(
        "sampling",
        {
            "model": model,
            "batch": batch,
            "cfg_rows": 2 * batch,
            "steps": STEPS,
            "tokens": f"{positions[0]}-{positions[-1]}",
            "head_bytes": sizes(model)[2] * STEPS * getattr(torch, dtype).itemsize,
        },
        dtype,
        device,
        (*providers, "floor", "floor-once"),
        threads=row_files.cpu_cores() if device == "cpu" else 1,
    )


def window(config: TransformerConfig) -> range:
    """The positions one call samples."""
    begin = (config.num_tokens - TOKENS) // 2
    return range(begin, begin + TOKENS)


def make_cases() -> list[harness.Case]:
    dtypes = ("float32", "bfloat16")
    if torch.cuda.is_available():
        batches = (1, 8, 64, 256)
        return [make_case(m, dtype, batch, "cuda") for m in MODELS for dtype in dtypes for batch in batches]
    batch_1 = [make_case(m, dtype, 1, "cpu") for m in MODELS for dtype in dtypes]
    return [*batch_1, make_case("Transformer-Medium", "bfloat16", 8, "cpu")]


CASES = make_cases()


def random_model(config: TransformerConfig, dtype: torch.dtype, device: str, std: float) -> Transformer:
    with torch.device("meta"):
        model = Transformer(config)
    model = model.to(dtype).to_empty(device=device).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.normal_(std=std)
    return model


# ---- providers -------------------------------------------------------------------------------------------


@contextmanager
def prepare(case: harness.Case, std: float = 0.02) -> Iterator[harness.Prepared]:
    config, device, batch = CONFIGS[str(case.sizes["model"])], case.device, int(case.sizes["batch"])
    threads_before = torch.get_num_threads()
    torch.set_num_threads(case.threads)
    # All cases share the code of the steps, and after 8 compilations of one function Dynamo runs it in eager mode.
    torch.compiler.reset()
    torch.manual_seed(0)
    model = random_model(config, getattr(torch, case.dtype), device, std)
    positions = window(config)
    shape = (batch, config.in_channels)
    # As in the engine. An ordinary tensor among them would cost the compiled rivals one more compilation.
    with torch.inference_mode():
        # [depth, 2 (keys and values), rows, Hkv, N, D]
        sizes_of_cache = (config.depth, 2, 2 * batch, config.num_kv_heads, config.num_tokens, config.head_dim)
        cache = torch.randn(sizes_of_cache, device=device, dtype=getattr(torch, case.dtype))
        first, *noise = (torch.randn(shape, device=device) for _ in range(1 + TOKENS))
        first = first.to(model.condition_layer.linear.weight)
        plain_noise = [z.repeat(2, 1).to(first) for z in noise]

    def fastlatent(**options: bool) -> Callable[[], list[Tensor]]:
        table = build_table("dpmsolver++", STEPS, "v_prediction", "cosine")
        sampler = NextTokenSampler(model, table, cfg_scale=CFG_SCALE, **options)
        grid = torch.zeros(batch, config.num_tokens, config.in_channels)
        for z, position in zip(noise, positions, strict=True):
            grid[:, position] = z
        with torch.inference_mode():
            buffers = sampler._start(torch.zeros(batch, dtype=torch.int64), grid)
            buffers.cache.keys.copy_(cache[:, 0].transpose(2, 3))
            buffers.cache.values.copy_(cache[:, 1].transpose(2, 3))

        @torch.inference_mode()
        def run() -> list[Tensor]:
            buffers.position.fill_(positions[0])
            buffers.h.copy_(model.x_embedder(first).repeat(sampler.ways, 1))
            for position in positions:
                sampler._advance(buffers, position, sampler._steps[position])
            return [buffers.latents[:, position].clone() for position in positions]

        return run

    def plain(wrap: Wrap = lambda function: function, capture: bool = False) -> Callable[[], list[Tensor]]:
        sampler = PlainSampler(model, wrap)
        denoise = sampler.denoise
        if capture:
            with torch.inference_mode():
                denoise = sampler.captured_denoise(plain_noise[0], first.new_zeros(2 * batch, config.hidden_size))

        @torch.inference_mode()
        def run() -> list[Tensor]:
            tokens, previous = [], first
            for z, position in zip(plain_noise, positions, strict=True):
                h = model.x_embedder(torch.cat([previous, previous]))
                condition = sampler.backbone(h, position, cache)
                previous = denoise(z, condition)[:batch]
                tokens.append(previous)
            return tokens

        return run

    backbone, modulations, head = sizes(str(case.sizes["model"]))
    once = (backbone + modulations + head) * first.itemsize
    every_step = (backbone + modulations + STEPS * head) * first.itemsize
    buffer = torch.ones(READ_BYTES // 4, device=device)

    def read(size: int) -> Callable[[], object]:
        whole, rest = divmod(size // 4, len(buffer))
        parts = [buffer] * whole + [buffer[:rest]]

        def run() -> None:
            for part in parts * TOKENS:
                part.sum()

        return run

    factories = {
        "fastlatent": fastlatent,
        "fastlatent-compiled": lambda: fastlatent(compile=True),
        "fastlatent-int8": lambda: fastlatent(int8=True),
        PLAIN: plain,
        "plain-compiled": lambda: plain(torch.compile),
        "plain-reduce-overhead": lambda: plain(reduce_overhead),
        "plain-graph": lambda: plain(capture=True),
        "floor": lambda: read(every_step),
        "floor-once": lambda: read(once),
    }
    try:
        yield harness.Prepared(
            {name: factories[name] for name in case.providers},
            bytes=once,
            flops=2 * 2 * batch * (backbone + STEPS * (modulations + head)),
            floor="floor",
            rivals=[name for name in case.providers if name.startswith("plain")],
            units=TOKENS,
        )
    finally:
        torch.set_num_threads(threads_before)
        if device == "cuda":
            torch.cuda.empty_cache()


# ---- pytest ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "case, provider", [(c, p) for c in CASES for p in c.providers], ids=lambda v: getattr(v, "key", v)
)
def test_sampling(benchmark, case, provider):
    with prepare(case) as prepared:
        benchmark(prepared.providers[provider]())


def test_providers_agree(monkeypatch):
    case = make_case("tiny", "float32", 3, CASES[0].device)
    # 0.1, not 0.02: attention and modulations must show in the result.
    with prepare(case, std=0.1) as prepared:
        providers = prepared.providers
        want = torch.stack(providers["fastlatent"]()())

        def check(name: str) -> None:
            error = float((torch.stack(providers[name]()()) - want).abs().max() / want.abs().max())
            assert error < 1e-4, f"{name}: {error}"

        for name in set(case.providers) - {"fastlatent", "fastlatent-int8", "floor", "floor-once"}:
            check(name)
        monkeypatch.setitem(globals(), "HAS_DIFFUSERS", False)  # PlainScheduler
        check(PLAIN)


if __name__ == "__main__":
    harness.main(CASES, prepare)
