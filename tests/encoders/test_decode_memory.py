"""Peaks of memory found on meta tensors, against hand counts, real tensors, and the process's own memory; the plan."""

import math
import re
import subprocess
import sys
import types
from functools import partial
from pathlib import Path

import diffusers
import pytest
import torch
from tiny_video_models import TINY, VARIANTS
from torch import nn
from torch.nn import functional as F

from fastlatent.encoders import decode_memory
from fastlatent.encoders.decode_memory import (
    DecodePlan,
    available_memory,
    explain,
    is_out_of_memory,
    peak_bytes,
    plan_decode,
    weight_bytes,
    working_set,
)
from fastlatent.encoders.video_autoencoders import video_autoencoder_on_meta

CPU = torch.device("cpu")
GIB = 2**30
IMAGES = {
    "AutoencoderKL": {"block_out_channels": (8, 8), "norm_num_groups": 4, "layers_per_block": 1,
                      "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2},
    "AutoencoderTiny": {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8),
                        "num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)},
}  # fmt: skip
CLASSES = {**{name: (name, kwargs) for name, kwargs in (TINY | IMAGES).items()}, **VARIANTS}


def on_meta(folder: Path, name: str, **changes):
    """An autoencoder of CLASSES, or with its class's defaults (the published sizes), from a config.json alone."""
    kind, kwargs = CLASSES[name] if not changes.pop("published", False) else (name, {})
    if kind == "AutoencoderKLWan" and kwargs:  # the default has 16 channels
        kwargs = {**kwargs, "latents_mean": [0.0] * kwargs["z_dim"], "latents_std": [1.0] * kwargs["z_dim"]}
    with torch.device("meta"):
        getattr(diffusers, kind)(**kwargs).save_config(folder)
    return video_autoencoder_on_meta(folder, changes.pop("dtype", torch.float32))


def views_and_in_place(device):
    a = torch.empty(1000, device=device)  # 4,000 B
    b = a[10:].view(-1, 10)
    b.mul_(2)
    del a  # still alive through b
    c = b + 1  # 3,960 B more
    del b  # 4,000 B less
    return c, torch.empty(500, device=device)  # 2,000 B more: 5,960


def kept_by_a_generator(device):
    def chunks():
        held = torch.zeros(100, device=device)  # 400 B as long as the generator is
        for _ in range(3):
            yield held + 1  # 400 B, one at a time

    for chunk in chunks():  # the last chunk is held while the next is made
        del chunk


def composite(device):
    # x, its norm clamped [8, 1] (the norm before it is freed by then), x / norm.
    F.normalize(torch.ones(8, 100, device=device), dim=1)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (views_and_in_place, 4000 + 3960),
        (kept_by_a_generator, 800),
        (composite, 3200 + 32 + 3200),
        (lambda device: torch.empty(0, device=device), 0),
        (lambda device: None, 0),
        # the same shapes again, as what an operation made is remembered: nothing stays counted
        (lambda device: [torch.ones(10, device=device).add(1) is None for _ in range(5)], 80),
        (lambda device: [torch.ones(10, device=device).add(1) for _ in range(5)], 240),
        # several results: native_group_norm gives [1, 4, 2], and mean and 1/std [1, 2] each
        (lambda device: [F.group_norm(torch.ones(1, 4, 2, device=device), 2) for _ in range(2)], 32 + 32 + 32 + 16),
        # int and float scalars give different dtypes (int64, float32)
        (lambda device: [(x := torch.ones(10, device=device, dtype=torch.int64)), x + 1, x + 1.0], 80 + 80 + 40),
    ],
)
def test_hand_counts(function, expected, device):
    assert peak_bytes(partial(function, device)) == expected


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_views_of_weights_are_not_made_inside(device):
    weight = torch.ones(1000, 10, device=device)
    assert peak_bytes(lambda: weight.T.reshape(10, 1000)[0].add_(0).unsqueeze(0) + 1) == 4000


def test_real_and_meta_tensors_agree():
    torch.manual_seed(0)
    model = diffusers.AutoencoderKLWan(**TINY["AutoencoderKLWan"]).eval().requires_grad_(False)
    z = torch.randn(1, 4, 3, 5, 6)
    real = peak_bytes(lambda: model.decode(z).sample)
    model, z = model.to("meta"), z.to("meta")
    # Real attention is the fused one, which keeps no [30, 30] scores; at these sizes the peak is not there.
    assert peak_bytes(lambda: model.decode(z).sample) == real
    assert peak_bytes(lambda: model.decode(z).sample, CPU) > real


def test_attention_has_scores_only_where_torch_takes_the_plain_one():
    # [1, 1, 512, 16] in and out: 32,768 B; scores 1 MiB
    def attend(mask=None, rank=4):
        shape = (1, 1, 512, 16)[4 - rank :]
        q = torch.empty(shape, device="meta")
        return F.scaled_dot_product_attention(q, q, q, attn_mask=mask)

    scores = 512 * 512 * 4
    assert peak_bytes(attend, CPU) == 2 * 32768
    assert peak_bytes(attend) > scores
    mask = torch.empty(1, 1, 512, 512, dtype=torch.bool, device="meta")
    assert peak_bytes(lambda: attend(mask), CPU) == 2 * 32768 + scores  # the mask as float
    # On the CPU, a mask of three axes has no fused kernel.
    assert peak_bytes(lambda: attend(mask[0].float(), 3), CPU) > 2 * scores


def test_workspace_of_a_convolution(monkeypatch):
    x, conv = torch.empty(1, 96, 6, 482, 834, device="meta"), nn.Conv3d(96, 96, 3, device="meta")
    output, weight = 96 * 4 * 480 * 832 * 4, 96 * 96 * 27 * 4
    assert peak_bytes(lambda: conv(x)) == output
    assert peak_bytes(lambda: conv(x), CPU) == output + output + weight + x.nbytes
    backend = types.SimpleNamespace(name="SlowDilated3d")
    monkeypatch.setattr(torch._C, "_select_conv_backend", lambda *_: backend)
    x, conv = x.bfloat16(), conv.to(torch.bfloat16)
    columns = peak_bytes(lambda: conv(x), CPU) - output / 2
    assert columns == 96 * 27 * 4 * 480 * 832 * 2
    assert round(columns / GIB, 1) == 7.7  # what was reported for Wan at 832×480


def test_copies_to_the_host_count_on_the_host():
    def decode():
        held = [torch.empty(100, device="meta").cpu() for _ in range(5)]
        held[0].add_(1)
        return torch.empty(300, device="cpu").copy_(torch.cat([x.to("meta") for x in held[:3]]))

    # One tensor at a time, and the three of `cat`.
    assert peak_bytes(decode, torch.device("cuda")) == 1200
    # Each copy, the real one too; on the CPU, `cpu` makes none, so this is a bound.
    assert peak_bytes(decode, CPU) == 2000 + 1200 + 1200


@pytest.mark.parametrize("name", CLASSES)
def test_every_class_runs(name, tmp_path):
    vae = on_meta(tmp_path, name)
    t, h, w = 5, 3, 4
    if name == "AutoencoderKLAllegro":  # decodes in tiles of 6×16×16 latents at these sizes, and needs them covered
        t, h, w = 6, 16, 16
    working = working_set(vae, (1, vae.latent_channels, t, h, w), CPU, tiles=False)
    assert working.bytes > 3 * working.chunk_frames * h * w * vae.downsample**2 * 4  # one chunk in float32
    assert weight_bytes(vae) > 10_000


class Stream:
    """An autoencoder whose chunks of n frames take `cost(i)` bytes; it counts those that were asked for."""

    def __init__(self, cost, n=2, tiles=True):
        self.cost, self.n, self.tiles, self.drawn, self.downsample = cost, n, tiles, 0, 8

    def frames(self, t):
        return self.n * t

    def stream(self, raw, tiles=False):
        for i in range(raw.shape[2]):
            self.drawn += 1
            torch.empty(self.cost(i) // (4 if tiles else 1), dtype=torch.uint8, device=raw.device)
            yield torch.empty(3, self.n, 8, 8, device=raw.device)


def test_a_stream_is_measured_by_its_first_chunks_and_only_once():
    # 1536 B a chunk; two of them, and the latents (4,000 B), are alive with the working memory or right after it
    steady = Stream(lambda i: 10_000 if i else 20_000)
    assert working_set(steady, (1, 1, 1000, 1, 1), CPU, False).bytes == 4000 + 20_000
    assert steady.drawn < 8
    before = steady.drawn
    working_set(steady, (1, 1, 1000, 1, 1), CPU, False)
    assert steady.drawn == before
    growing = Stream(lambda i: 10_000 + 10 * i)
    # the last chunk needs most, beside the one before it
    assert working_set(growing, (1, 1, 1000, 1, 1), CPU, False).bytes == 4000 + 1536 + 10_000 + 9990
    assert growing.drawn == 1000
    # less at first than later
    late = Stream(lambda i: 90_000 if i == 0 else 1000 * i)
    assert working_set(late, (1, 1, 200, 1, 1), CPU, False).bytes == 800 + 1536 + 199_000


def test_wan_at_its_published_size(tmp_path):
    vae = on_meta(tmp_path, "AutoencoderKLWan", published=True)
    assert weight_bytes(vae) == 126_892_531 * 4
    shape = (1, 16, 16, 60, 106)
    # 151,328 numbers of caches for each latent pixel, from the third chunk on.
    with torch.inference_mode(), decode_memory._Meter(None) as meter:
        raw = torch.empty(shape, device="meta")
        stream = vae.stream(raw)
        for _ in range(3):
            chunk = next(stream)
        caches = meter.alive - 2 * raw.nbytes - chunk.nbytes  # post_quant_conv makes as many latents again
        stream.close()
        del chunk, raw
        assert meter.alive == 0
    assert caches == pytest.approx(151_328 * 60 * 106 * 4, rel=0.02)
    working = working_set(vae, shape, CPU, tiles=False)
    # Measured on a CPU at 30×53: 2.1 GiB over the weights, four times as much here.
    assert working.bytes == pytest.approx(8.3 * GIB, rel=0.1)
    assert working.chunk_frames == 4
    # 241 frames instead of 61 need no more than their latents: twice 73 MB.
    longer = working_set(vae, (1, 16, 61, 60, 106), CPU, tiles=False)
    assert longer.bytes < 1.05 * working.bytes
    plan = plan_decode(vae, shape, weight_bytes=weight_bytes(vae), available=79 * GIB, device=CPU)
    assert re.fullmatch(
        r"decode plan: 61 frames of 848×480, streamed by 4 frames; 0\.5 GiB weights \+ 8\.\d GiB working memory of "
        r"79\.0 GiB free on cpu",
        plan.text,
    )
    # half in bfloat16
    half = working_set(on_meta(tmp_path, "AutoencoderKLWan", published=True, dtype=torch.bfloat16), shape, CPU, False)
    assert half.bytes == pytest.approx(working.bytes / 2, rel=0.15)


def test_the_plan_takes_tiles_only_where_it_must(tmp_path):
    vae = on_meta(tmp_path, "AutoencoderKLWan")
    shape = (1, 4, 3, 48, 48)  # four tiles of 32 at a stride of 24
    whole, tiled = (working_set(vae, shape, CPU, tiles).bytes for tiles in (False, True))
    assert tiled < 0.6 * whole
    plan = partial(plan_decode, vae, shape, weight_bytes=1000, device=CPU)
    enough = math.ceil((whole + 1000) / decode_memory.USABLE)
    assert plan(available=enough) == DecodePlan(False, 1000, whole, enough, CPU, plan(available=enough).text)
    assert "tiles" not in plan(available=enough).text
    less = plan(available=enough - 2)
    assert less.tiles and less.working_bytes == tiled and "in tiles (without: " in less.text
    with pytest.raises(ValueError, match=r"not enough memory to decode 9 frames of 384×384: .*--dtype bfloat16"):
        plan(available=int(tiled / decode_memory.USABLE))
    unknown = plan(available=None)
    assert not unknown.tiles and "of unknown free memory on cpu" in unknown.text
    # A class without tiles is told so.
    with pytest.raises(ValueError, match="has no tiles"):
        plan_decode(Stream(lambda i: 10**6, tiles=False), (1, 1, 2, 1, 1), weight_bytes=0, available=10**6, device=CPU)
    whole_video = plan_decode(Stream(lambda i: 1, n=4), (1, 1, 1, 1, 1), weight_bytes=0, available=None, device=CPU)
    assert "4 frames of 8×8, at once;" in whole_video.text


def meminfo(root, cgroup, files):
    for name, text in {
        "proc/meminfo": "MemTotal: 9 kB\nMemAvailable:   1000 kB\n",
        "proc/self/cgroup": cgroup,
        **files,
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return available_memory(CPU, root)


def test_memory_of_the_host(tmp_path):
    assert available_memory(CPU, tmp_path) is None
    assert available_memory(torch.device("meta")) is None
    assert meminfo(tmp_path / "none", "0::/\n", {}) == 1_024_000
    v2 = "sys/fs/cgroup/"
    files = {
        # the parent is tighter than the group itself; page cache is given back
        f"{v2}a/b/memory.max": "900000\n", f"{v2}a/b/memory.current": "100000\n",
        f"{v2}a/memory.max": "500000\n", f"{v2}a/memory.current": "400000\n",
        f"{v2}a/memory.stat": "anon 1\ninactive_file 50000\n",
        f"{v2}memory.max": "max\n", f"{v2}memory.current": "400000\n",
    }  # fmt: skip
    assert meminfo(tmp_path / "v2", "0::/a/b\n", files) == 150_000
    # In a container, the group's path is not visible and its files are at the mount.
    files = {f"{v2}memory.max": "300000\n", f"{v2}memory.current": "100000\n"}
    assert meminfo(tmp_path / "container", "0::/docker/1\n", files) == 200_000
    v1 = "sys/fs/cgroup/memory/"
    files = {
        f"{v1}job/memory.limit_in_bytes": "700000\n", f"{v1}job/memory.usage_in_bytes": "800000\n",
        f"{v1}job/memory.stat": "inactive_file 1\ntotal_inactive_file 120000\n",
        f"{v1}memory.limit_in_bytes": "9223372036854771712\n", f"{v1}memory.usage_in_bytes": "5\n",
    }  # fmt: skip
    assert meminfo(tmp_path / "v1", "4:cpu,memory:/job\n1:cpuset:/\n", files) == 20_000
    here = available_memory(CPU)
    assert here is None or here > 2**20


def test_running_out_of_memory_is_known_and_explained():
    with pytest.raises(RuntimeError) as failed:
        torch.empty(2**50)  # 4 PiB
    with pytest.raises(MemoryError) as python:
        bytearray(2**60)
    errors = [
        failed.value, python.value, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    ]  # fmt: skip
    assert all(map(is_out_of_memory, errors))
    assert not any(map(is_out_of_memory, (RuntimeError("shapes do not match"), ValueError("out of memory"), OSError())))
    plan = DecodePlan(True, GIB // 2, 2 * GIB, 3 * GIB, torch.device("cuda:1"), "")
    text = explain(errors[2], plan)
    for part in ("cuda:1 in tiles", "0.5 GiB", "2.0 GiB", "free at the start 3.0 GiB", "CUDA out of memory. Tried",
                 "--device cuda:N", "--dtype bfloat16", "--device cpu"):  # fmt: skip
        assert part in text
    assert "more" not in text
    text = explain(MemoryError(), DecodePlan(False, 1, 1, None, CPU, ""))
    assert "MemoryError" in text and "unknown" in text and "--device cuda" in text and "--device cpu" not in text


# Peak of the process above what it took before, with every large tensor in a mapping of its own (M_MMAP_THRESHOLD).
RSS = """
import ctypes, re, sys, torch, diffusers
torch.set_num_threads(1)
ctypes.CDLL(None).mallopt(-3, 1 << 16)
model = diffusers.AutoencoderKLWan().eval().requires_grad_(False)
def status(key):
    return int(re.search(key + r":\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
with torch.inference_mode():
    model.decode(torch.zeros(1, 16, 1, 4, 4))  # the libraries' own memory
    open("/proc/self/clear_refs", "w").write("5")
    before = status("VmRSS")
    model.decode(torch.zeros(1, 16, 3, 8, 12))
print(status("VmHWM") - before)
"""


@pytest.mark.soak
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
def test_the_process_needs_what_was_estimated():
    measured = int(subprocess.run([sys.executable, "-c", RSS], check=True, capture_output=True, text=True).stdout)
    with torch.device("meta"):
        model = diffusers.AutoencoderKLWan()
    z = torch.empty(1, 16, 3, 8, 12, device="meta")
    tensors, bound = (peak_bytes(lambda: model.decode(z).sample, device) for device in (None, CPU))
    assert 0.95 * tensors < measured < 1.1 * bound


@pytest.mark.needs_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_needs_what_was_estimated(dtype):
    device = torch.device("cuda", torch.cuda.current_device())
    torch.manual_seed(0)
    model = diffusers.AutoencoderKLWan(**TINY["AutoencoderKLWan"] | {"base_dim": 32}).to(device, dtype).eval()
    z = torch.randn(1, 4, 3, 32, 32, device=device, dtype=dtype)
    with torch.inference_mode():
        model.decode(z)  # handles and their workspaces
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        model.decode(z)
    measured = torch.cuda.max_memory_allocated() - before
    model, z = model.to("meta"), z.to("meta")
    tensors, bound = (peak_bytes(lambda: model.decode(z).sample, where) for where in (None, device))
    assert 0.95 * tensors < measured
    # cuDNN may ask for more than a copy in another layout; it then gets it, as there is enough.
    assert measured < 1.5 * bound
    assert 0 < available_memory(device) <= torch.cuda.get_device_properties(device).total_memory
