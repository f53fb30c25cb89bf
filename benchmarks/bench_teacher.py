"""Tokens of VideoMAEv2 from clips that are normalised and on the device already: seconds for a clip.

Weights are random. 16 frames of 224² are 1,568 tokens: 361 GFLOP a clip with B, and about 91 with S.

eager, compile, aoti    ours, as `fastlatent encode --teacher` runs it: float32 pixels in, float32 tokens out
torch                   a plain vision transformer as one writes it (convolution, scaled_dot_product_attention), pixels
                        and tokens in the weights' dtype
torch-compile           that with torch.compile: mode max-autotune-no-cudagraphs on CUDA, default on the CPU
torch-reduce-overhead   that as a CUDA graph; CUDA only
transformers            VideoMAEModel of that library, with its attention "sdpa"
floor                   as many FLOPs in products of matrices: see bench_vae_encode.py

benchmark teacher  seconds per clip; its inverse is clips/s
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import harness
import pytest
import torch
import torch.nn.functional as F
from bench_vae_encode import products
from rows import Case, cpu_cores
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fastlatent.encoders.engines.engine import open_engine
from fastlatent.encoders.engines.numerics import fix_numerics, relative_error
from fastlatent.encoders.teachers import VideoMAETeacher
from fastlatent.encoders.token_readout import Readout
from fastlatent.encoders.videomae import PUBLISHED, VideoMAE, VideoMAESizes, sine_positions
from fastlatent.workflows.encode_setup import engine_cache

CUDA = torch.cuda.is_available()
OURS = ("eager", "compile", "aoti")
PROVIDERS = (*OURS, "torch", "torch-compile", "torch-reduce-overhead", "transformers", "floor")
ON_CPU = ("eager", "compile", "torch", "torch-compile", "transformers", "floor")
RIVALS = ("torch", "torch-compile", "torch-reduce-overhead", "transformers")
COMPILE_SECONDS = 120.0  # max-autotune times every product of matrices
SIZES = {**PUBLISHED, "tiny": VideoMAESizes(64, 2, 2, 256, size=32)}


def _case(model: str, batch: int, frames: int, dtype: str) -> Case:
    sizes: dict[str, int | float | str] = {"model": model, "batch": batch, "frames": frames}
    return Case("teacher", sizes, dtype, *(("cuda", PROVIDERS, 1) if CUDA else ("cpu", ON_CPU, cpu_cores())))


CASES = (
    [_case("base", 32, 16, "bfloat16"), _case("giant", 8, 16, "bfloat16"), _case("small", 32, 16, "bfloat16")]
    if CUDA
    else [_case("small", 1, 8, "float32")]
)


class PlainBlock(nn.Module):
    def __init__(self, sizes: VideoMAESizes) -> None:
        super().__init__()
        self.heads = sizes.heads
        self.norm1, self.norm2 = (nn.LayerNorm(sizes.dim, eps=1e-6) for _ in range(2))
        self.qkv, self.proj = nn.Linear(sizes.dim, 3 * sizes.dim), nn.Linear(sizes.dim, sizes.dim)
        self.fc1, self.fc2 = nn.Linear(sizes.dim, sizes.mlp), nn.Linear(sizes.mlp, sizes.dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, count, dim = x.shape
        qkv = self.qkv(self.norm1(x)).reshape(batch, count, 3, self.heads, dim // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, count, dim))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class Plain(nn.Module):
    def __init__(self, sizes: VideoMAESizes) -> None:
        super().__init__()
        cube = (sizes.tubelet, sizes.patch, sizes.patch)
        self.patches = nn.Conv3d(3, sizes.dim, cube, stride=cube)
        self.positions = nn.Buffer(torch.empty(sizes.tokens, sizes.dim))
        self.blocks = nn.Sequential(*(PlainBlock(sizes) for _ in range(sizes.depth)))

    def forward(self, pixels: Tensor) -> Tensor:
        tokens: Tensor = self.blocks(self.patches(pixels).flatten(2).transpose(1, 2) + self.positions)
        return tokens


def of_case(case: Case) -> VideoMAESizes:
    one = SIZES[str(case.sizes["model"])]
    return VideoMAESizes(
        one.dim, one.depth, one.heads, one.mlp, one.patch, frames=int(case.sizes["frames"]), size=one.size
    )


@functools.cache
def flops(sizes: VideoMAESizes) -> int:
    """Of one clip."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
        VideoMAE(sizes)(torch.empty(1, 3, *_clip(sizes)))
    return counter.get_total_flops()


def _clip(sizes: VideoMAESizes) -> tuple[int, int, int]:
    return sizes.frames, sizes.size, sizes.size


@contextmanager
def prepare(case: Case) -> Iterator[harness.Prepared]:
    threads_before = torch.get_num_threads()
    torch.set_num_threads(case.threads)
    torch.compiler.reset()
    fix_numerics()
    sizes, dtype, device = of_case(case), getattr(torch, case.dtype), torch.device(case.device)
    torch.manual_seed(0)
    with device:
        model = VideoMAE(sizes).to(dtype)
    model.positions.copy_(sine_positions(sizes.tokens, sizes.dim))
    teacher = VideoMAETeacher(model, Readout(sizes.dim, sizes.grid[0]), f"random: {case.key}", lambda: teacher)
    batch = int(case.sizes["batch"])
    pixels = torch.randn(batch, 3, *_clip(sizes)).to(device)
    inputs = pixels.to(dtype)

    def ours(name: str) -> Callable[[], Tensor]:
        engine = open_engine(name, teacher, shapes=(tuple(pixels.shape),), cache=engine_cache())
        return lambda: engine.encode(pixels)

    @functools.cache
    def plain() -> Plain:
        with device:
            made = Plain(sizes).to(dtype).eval().requires_grad_(False)
        names = [name.replace(".attn.", ".").replace(".mlp.", ".") for name in model.state_dict()]
        names = [name.replace("patch_embed.proj.", "patches.") for name in names]
        made.load_state_dict(dict(zip(names, model.state_dict().values(), strict=True)))
        return made

    def run(function: Callable[[Tensor], Tensor]) -> Callable[[], Tensor]:
        @torch.no_grad()
        def call() -> Tensor:
            return function(inputs)

        return call

    def compiled(mode: str) -> Callable[[], Tensor]:
        return run(torch.compile(plain(), fullgraph=True, dynamic=False, mode=mode))

    def transformers() -> Callable[[], Tensor]:
        from transformers import VideoMAEConfig, VideoMAEModel

        config = VideoMAEConfig(
            image_size=sizes.size, patch_size=sizes.patch, num_frames=sizes.frames, hidden_size=sizes.dim,
            num_hidden_layers=sizes.depth, num_attention_heads=sizes.heads, intermediate_size=sizes.mlp,
            layer_norm_eps=1e-6, attn_implementation="sdpa",
        )  # fmt: skip
        network: Any = VideoMAEModel(config).to(device, dtype).eval()
        frames_first = inputs.transpose(1, 2).contiguous()

        @torch.no_grad()
        def call() -> Tensor:
            return network(frames_first).last_hidden_state

        return call

    count = flops(sizes)
    factories: dict[str, Callable[[], Callable[[], object]]] = {
        **{name: functools.partial(ours, name) for name in OURS},
        "torch": lambda: run(plain()),
        "torch-compile": lambda: compiled("max-autotune-no-cudagraphs" if CUDA else "default"),
        "torch-reduce-overhead": lambda: compiled("reduce-overhead"),
        "transformers": transformers,
        "floor": lambda: products(count * batch, device, dtype),
    }
    factories = {name: factories[name] for name in case.providers}
    try:
        yield harness.Prepared(factories, flops=count, floor="floor", rivals=RIVALS, units=batch)
    finally:
        torch.set_num_threads(threads_before)
        if CUDA:
            torch.cuda.empty_cache()


# ---- pytest ----------------------------------------------------------------------------------------------


def test_flops():
    # 2 FLOPs for each of 180.5 G multiplications: what the papers give for B.
    assert flops(PUBLISHED["base"]) == pytest.approx(2 * 180.5e9, rel=5e-3)


def test_providers_agree():
    case = _case("tiny", 2, 4, "float32")
    with prepare(case) as prepared:
        want = prepared.providers["torch"]()()
        assert want.shape == (2, 8, 64)
        assert relative_error(prepared.providers["eager"]()(), want) < (1e-5 if not CUDA else 1e-4)
        assert prepared.providers["floor"]()() is not None


# ---- the command line ------------------------------------------------------------------------------------


def measure(case: Case, seconds: float) -> list[Any]:
    with prepare(case) as prepared:
        outcomes = harness.interleave(
            prepared.providers, device=case.device, min_seconds=seconds, cap_seconds=COMPILE_SECONDS
        )
    return harness.rows_of(case, prepared, outcomes)


def main(argv: list[str] | None = None) -> list[Any]:
    return harness.measure_all(CASES, measure, argv, (__doc__ or "").split("\n")[0])


if __name__ == "__main__":
    main()
