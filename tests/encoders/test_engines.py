import copy
import os
import subprocess
import sys
import threading

import pytest
import torch
from diffusers import AutoencoderKL
from torch import nn

import fastlatent.encoders.engines.engine as engine_module
from fastlatent.encoders.engines.cache import cached_file
from fastlatent.encoders.engines.choose import choose_engine
from fastlatent.encoders.engines.engine import open_engine
from fastlatent.encoders.engines.numerics import fix_numerics, numerics, relative_error

SHAPE = (2, 3, 16, 16)
SWITCHES = [
    (torch.backends.cudnn, "benchmark", True),
    (torch.backends.cudnn, "deterministic", False),
    (torch.backends.cudnn, "allow_tf32", True),
    (torch.backends.cuda.matmul, "allow_tf32", True),
]


class Encoder(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.encoder, self.quant_conv = model.encoder, model.quant_conv

    def forward(self, pixels):
        return self.quant_conv(self.encoder(pixels))


def smallest():
    """A kind of each layer of an encoder, which compiles in a third of the time: (2, 3, 16, 16) to (2, 4, 8, 8)."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(4, 8), nn.SiLU(), nn.Conv2d(8, 4, 3, stride=2, padding=1)
    )  # fmt: skip


class TinyVae:
    """An Autoencoder as far as engines look at one."""

    pixel_channels, size_multiple = 3, 2

    def __init__(self, device="cpu", dtype=torch.float32, widths=(8, 8)):
        torch.manual_seed(0)
        model = AutoencoderKL(
            block_out_channels=widths, down_block_types=["DownEncoderBlock2D"] * len(widths),
            up_block_types=["UpDecoderBlock2D"] * len(widths), layers_per_block=1, norm_num_groups=4, latent_channels=2,
        )  # fmt: skip
        self.module = Encoder(model).to(device, dtype).eval().requires_grad_(False)
        self.size_multiple = 2 ** (len(widths) - 1)

    def encoder(self):
        return self.module

    def identity(self):
        return {"class": "AutoencoderKL", "weights": "0123"}

    @torch.inference_mode()
    def encode(self, pixels):
        weight = self.module.quant_conv.weight
        return self.module(pixels.to(weight.device, weight.dtype)).float()


def pixels_of(shape=SHAPE, seed=1, device="cpu"):
    return (torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1).to(device)


@pytest.fixture(autouse=True)
def kept_switches():
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in SWITCHES]
    precision = torch.get_float32_matmul_precision()
    fix_numerics()
    yield
    torch.set_float32_matmul_precision(precision)
    for owner, name, value in before:
        setattr(owner, name, value)


def check(vae, engine, limit, device="cpu"):
    """Close to eager, the same bytes twice and from another thread, whatever kind of tensor comes in."""
    pixels = pixels_of(device=device)
    got = engine.encode(pixels)
    assert got.dtype == torch.float32 and got.is_contiguous() and got.shape == (2, 4, 8, 8)
    assert got.device.type == device
    assert relative_error(got, vae.encode(pixels)) <= limit
    other = engine.encode(pixels.flip(0))
    assert not torch.equal(other, got)  # and `got` is not a buffer that the second call wrote
    results = [engine.encode(pixels), engine.encode(pixels.to(memory_format=torch.channels_last))]
    with torch.inference_mode():
        results.append(engine.encode(pixels.clone()))
    thread = threading.Thread(target=lambda: results.append(engine.encode(pixels)))
    thread.start()
    thread.join()
    assert len(results) == 4 and all(torch.equal(result, got) for result in results)


# ---- eager, and what all engines share -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)], ids=str
)
def test_eager(tmp_path, dtype, limit):
    vae = TinyVae(dtype=dtype)
    engine = open_engine("eager", vae, shapes=(SHAPE,), cache=tmp_path / "cache")
    check(vae, engine, limit)
    assert engine.settings() == {"name": "eager", "memory_format": "channels_last"}
    assert not (tmp_path / "cache").exists()


def test_the_autoencoder_is_left_alone(tmp_path):
    vae = TinyVae()
    before = {name: (tensor.clone(), tensor.stride()) for name, tensor in vae.module.state_dict().items()}
    engine = open_engine("eager", vae, shapes=(SHAPE,), cache=tmp_path)
    want = engine.encode(pixels_of())
    for name, tensor in vae.module.state_dict().items():
        assert torch.equal(tensor, before[name][0]) and tensor.stride() == before[name][1]
        tensor.zero_()
    assert torch.equal(engine.encode(pixels_of()), want)  # its own weights


def test_each_shape_it_was_opened_for_and_no_other(tmp_path):
    # Another batch size would change last bits; buckets have shapes of their own.
    engine = open_engine("eager", TinyVae(), shapes=(SHAPE, (1, 3, 8, 24), SHAPE), cache=tmp_path)
    assert engine.encode(pixels_of((1, 3, 8, 24))).shape == (1, 4, 4, 12)
    with pytest.raises(ValueError, match=r"expected pixels of shape \(2, 3, 16, 16\), \(1, 3, 8, 24\); got \(1, 3, 16"):
        engine.encode(pixels_of((1, 3, 16, 16)))
    with pytest.raises(ValueError, match="expected pixels on cpu, got meta"):
        engine.encode(torch.empty(SHAPE, device="meta"))
    engine.close()
    with pytest.raises(ValueError, match="closed"):
        engine.encode(pixels_of())


def test_fused_norms(tmp_path):
    vae = TinyVae()
    plain = open_engine("eager", vae, shapes=(SHAPE,), cache=tmp_path)
    engine = open_engine("eager", vae, shapes=(SHAPE,), cache=tmp_path, fuse=True)
    # Two residual blocks on the way down, two in the middle, the attention's norm and the last one.
    assert engine.settings() == {**plain.settings(), "fused_norms": True}
    check(vae, engine, 1e-5)
    assert not torch.equal(engine.encode(pixels_of()), plain.encode(pixels_of()))  # it ran
    assert all(type(norm) is nn.GroupNorm for name, norm in vae.module.named_modules() if name.endswith("norm1"))
    with pytest.raises(ValueError, match="only eager and compile can"):
        open_engine("aoti", vae, shapes=(SHAPE,), cache=tmp_path, fuse=True)


def test_kernels_of_video_convolutions(tmp_path):
    # Qwen-Image's encoder takes an image as one frame; channels_last is for four dimensions only.
    class OneFrame(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv3d(3, 4, 2, stride=2, padding=(1, 0, 0)).requires_grad_(False)

        def forward(self, pixels):
            return self.conv(pixels.unsqueeze(2))[:, :, 0]

    vae = TinyVae()
    vae.module = OneFrame()
    engine = open_engine("eager", vae, shapes=(SHAPE,), cache=tmp_path)
    assert relative_error(engine.encode(pixels_of()), vae.module(pixels_of())) < 1e-5


@pytest.mark.parametrize(
    ("name", "shapes", "message"),
    [
        ("fast", (SHAPE,), "expected one of eager, compile, aoti, tensorrt, got 'fast'"),
        ("eager", (), "one or more shapes"),
        ("eager", ((2, 1, 16, 16),), r"\(B, 3, H, W\), got \(2, 1,"),
        ("eager", ((2, 3, 16),), r"\(B, 3, H, W\)"),
        ("eager", ((0, 3, 16, 16),), r"\(B, 3, H, W\)"),
        ("eager", ((2, 3, 16, 15),), "divisible by 2"),
        ("tensorrt", (SHAPE,), "needs a CUDA device; use --engine eager"),
    ],
)
def test_what_cannot_be_opened(tmp_path, name, shapes, message):
    with pytest.raises(ValueError, match=message):
        open_engine(name, TinyVae(), shapes=shapes, cache=tmp_path)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda moments: moments * (1 + 2e-4), "differs from eager by 0.0002 "),  # the limit is 1e-4
        (lambda moments: moments * float("nan"), "differs from eager by nan"),
        (lambda moments: torch.cat([moments[:1], moments[1:] * 1.01]), "differs from eager by 0.01 "),  # the last row
    ],
)
def test_a_result_that_is_not_eagers_is_refused(tmp_path, monkeypatch, wrong, message):
    monkeypatch.setattr(engine_module, "compile_module", lambda module, *_: lambda pixels: wrong(module(pixels)))
    with pytest.raises(ValueError, match=message):
        open_engine("compile", TinyVae(), shapes=(SHAPE,), cache=tmp_path)


def test_a_compiler_that_fails(tmp_path, monkeypatch):
    def no_compiler(*_):
        raise RuntimeError("g++ not\nfound")

    monkeypatch.setattr(engine_module, "compile_module", no_compiler)
    with pytest.raises(ValueError, match="compiling the encoder failed: g\\+\\+ not found; use --engine eager"):
        open_engine("compile", TinyVae(), shapes=(SHAPE,), cache=tmp_path)


def test_numerics_are_fixed():
    for owner, name, bad in SWITCHES:
        setattr(owner, name, bad)
        with pytest.raises(ValueError, match=rf"fix_numerics\(\).*{name}={bad}"):
            numerics(torch.device("cuda"))
        fix_numerics()
    torch.set_float32_matmul_precision("medium")
    fix_numerics()
    assert numerics(torch.device("cuda")) == {"tf32": False, "cudnn": "deterministic"}
    assert numerics(torch.device("cpu")) == {}  # none of them reaches the CPU's kernels


def test_relative_error():
    one, zero = torch.tensor([3.0, 4.0]), torch.zeros(2)
    assert relative_error(one, one) == relative_error(zero, zero) == 0
    assert relative_error(one + torch.tensor([0.0, 0.5]), one) == pytest.approx(0.1)
    assert not relative_error(one, one * float("nan")) <= 1
    assert relative_error(one, zero) == 5  # nothing to be relative to


# ---- the automatic choice --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("device", "images", "shapes", "want"),
    [
        ("cpu", 10**6, [(256, 256)], ("eager", 16)),
        ("cpu", 10**6, [(512, 512)], ("eager", 4)),
        ("cpu", 1, [(1024, 1024)], ("eager", 1)),
        ("cpu", 1, [(4096, 4096)], ("eager", 1)),  # never 0
        ("cuda", 2_000, [(256, 256)], ("eager", 64)),
        ("cuda", 2_001, [(256, 256)], ("compile", 64)),
        ("cuda", 2_001, [(8, 8)], ("compile", 64)),  # no more than that for small ones
        ("cuda", 2_001, [(512, 512)], ("compile", 16)),
        ("cuda", 2_001, [(1024, 1024)], ("compile", 4)),
        ("cuda", 2_001, [(256, 264)], ("compile", 32)),  # 62, rounded down to a power of two
        ("cuda", 4_000, [(256, 256), (128, 512)], ("eager", 64)),  # two to compile
        ("cuda", 4_001, [(256, 256), (128, 1024)], ("compile", 32)),  # the largest decides for all
    ],
)
def test_choose_engine(device, images, shapes, want):
    name, batch, reason = choose_engine(torch.device(device), images, tuple(shapes))
    assert (name, batch) == want
    assert f"; batch {batch}: the largest shape is " in reason


def test_choose_engine_without_a_shape():
    with pytest.raises(ValueError, match="one or more shapes"):
        choose_engine(torch.device("cpu"), 1, ())


# ---- the cache of built engines --------------------------------------------------------------------------


def test_cached_file(tmp_path):
    built = []

    def build(path):
        assert path.name.endswith(".pt2")
        path.write_bytes(b"engine" * (len(built) + 1))
        built.append(path)

    def cached(**key):
        return cached_file(tmp_path / "new" / "cache", key, ".pt2", build)

    first = cached(a=1, b=[2])
    assert first == cached(b=[2], a=1) and len(built) == 1  # the order of names does not count
    assert not built[0].exists()
    assert cached(a=1, b=[3]) != first and len(built) == 2
    for damage in (b"engine"[:-1], b"Engine", b""):  # cut short, another byte, emptied by a full disk
        first.write_bytes(damage)
        second = cached(a=1, b=[2])
        assert second.read_bytes() == b"engine" * len(built)
        assert second == first or not first.exists()
        first = second
    assert len(built) == 5
    assert sorted(path.suffix for path in first.parent.glob("[!.]*")) == [".pt2", ".pt2"]  # nothing is left behind


def test_a_build_that_fails_leaves_nothing(tmp_path):
    def build(path):
        path.write_bytes(b"half")
        raise RuntimeError("no compiler")

    with pytest.raises(RuntimeError, match="no compiler"):
        cached_file(tmp_path, {"a": 1}, ".pt2", build)
    assert [path.suffix for path in tmp_path.iterdir()] == [".lock"]


# ---- compile and aoti ------------------------------------------------------------------------------------


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
    torch.compiler.reset()


def test_compile(tmp_path, one_thread):
    vae = TinyVae()
    torch._dynamo.utils.counters.clear()
    engine = open_engine("compile", vae, shapes=(SHAPE,), cache=tmp_path)
    check(vae, engine, 1e-5)
    # No kind of input compiled once more, and the whole encoder is one graph.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    settings = engine.settings()
    assert settings["options"]["deterministic"]
    assert not {"threads", "torch", "gpu"} & set(settings)  # the environment's, which --allow-mixed may change


@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.soak)])
def test_aoti(tmp_path, one_thread, monkeypatch, whole):
    vae, cache = TinyVae(), tmp_path / "cache"
    if not whole:
        vae.module = smallest().eval().requires_grad_(False)
        monkeypatch.setattr(vae, "encode", lambda pixels: vae.module(pixels))
    engine = open_engine("aoti", vae, shapes=(SHAPE,), cache=cache)
    check(vae, engine, 1e-5)
    (package,) = cache.glob("*.pt2")

    def forbidden(*_, **__):
        raise AssertionError("compiled anew")

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", forbidden)
    again = open_engine("aoti", vae, shapes=(SHAPE,), cache=cache)
    assert torch.equal(again.encode(pixels_of()), engine.encode(pixels_of()))
    assert again.settings() == engine.settings()
    data = bytearray(package.read_bytes())
    data[len(data) // 2] ^= 1
    package.write_bytes(data)
    with pytest.raises(ValueError, match="compiled anew"):
        open_engine("aoti", vae, shapes=(SHAPE,), cache=cache)


def test_what_names_a_package(tmp_path, monkeypatch, one_thread):
    keys = []

    def no_file(folder, key, suffix, build):
        keys.append(copy.deepcopy(key))
        raise OSError("not now")

    monkeypatch.setattr("fastlatent.encoders.engines.compiled.cached_file", no_file)

    def key_of(vae, shape=SHAPE):
        with pytest.raises(OSError, match="not now"):
            open_engine("aoti", vae, shapes=(shape,), cache=tmp_path)
        return keys[-1]

    want = key_of(TinyVae())
    assert key_of(TinyVae()) == want
    other_weights = TinyVae()
    monkeypatch.setattr(other_weights, "identity", lambda: {"weights": "0124"})
    others = [
        key_of(other_weights),
        key_of(TinyVae(dtype=torch.bfloat16)),
        key_of(TinyVae(widths=(8, 16))),
        key_of(TinyVae(), (1, 3, 16, 16)),
    ]
    torch.set_num_threads(2)
    others.append(key_of(TinyVae()))
    monkeypatch.setattr(torch, "__version__", "2.99.0")
    others.append(key_of(TinyVae()))
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "SVE")
    others.append(key_of(TinyVae()))
    assert not [(a, b) for i, a in enumerate(others) for b in [want, *others[:i]] if a == b]


@pytest.mark.soak
def test_compile_more_buckets_than_dynamo_allows(tmp_path, one_thread):
    # 8 compilations of one function are its default.
    vae, shapes = TinyVae(), tuple((1, 3, 8, 8 + 2 * i) for i in range(10))
    engine = open_engine("compile", vae, shapes=shapes, cache=tmp_path)
    for shape in shapes:
        pixels = pixels_of(shape)
        assert relative_error(engine.encode(pixels), vae.encode(pixels)) < 1e-5


@pytest.mark.soak
@pytest.mark.parametrize("name", ["compile", "aoti"])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.bfloat16, 4e-2)], ids=str)
def test_four_levels(tmp_path, one_thread, name, dtype, limit):
    vae, shape = TinyVae(dtype=dtype, widths=(16, 32, 64, 64)), (2, 3, 64, 32)
    engine = open_engine(name, vae, shapes=(shape,), cache=tmp_path)
    pixels = pixels_of(shape)
    assert relative_error(engine.encode(pixels), vae.encode(pixels)) < limit
    assert torch.equal(engine.encode(pixels), engine.encode(pixels))


@pytest.mark.soak
def test_processes_agree(tmp_path, one_thread):
    # Each compiles for itself, with a compiler cache of its own.
    code = (
        "import sys, hashlib, test_engines as t; "
        "e = t.open_engine(sys.argv[1], t.TinyVae(), shapes=(t.SHAPE,), cache=sys.argv[2]); "
        "print(hashlib.sha256(e.encode(t.pixels_of()).numpy().tobytes()).hexdigest())"
    )
    code = f"import torch; torch.set_num_threads(1); import {numerics.__module__} as n; n.fix_numerics(); {code}"
    for name in ("compile", "aoti"):
        results = set()
        for run in "ab":
            own = os.environ | {
                "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / f"{name}-{run}"),
                "PYTHONPATH": os.path.dirname(__file__),
            }
            command = [sys.executable, "-c", code, name, str(tmp_path / f"packages-{run}")]
            results.add(subprocess.run(command, capture_output=True, text=True, check=True, env=own).stdout)
        assert len(results) == 1


@pytest.mark.needs_cuda
@pytest.mark.parametrize(
    ("name", "fuse"),
    [("eager", False), ("eager", True), ("compile", False), ("compile", True), ("aoti", False)],
)
@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.float32, 1e-4), (torch.bfloat16, 6e-2), (torch.float16, 7.5e-3)], ids=str
)
def test_on_cuda(tmp_path, name, fuse, dtype, limit):
    vae = TinyVae("cuda", dtype)
    engine = open_engine(name, vae, shapes=(SHAPE, (1, 3, 8, 24)), cache=tmp_path, fuse=fuse)
    check(vae, engine, limit, "cuda")
    assert engine.encode(pixels_of((1, 3, 8, 24), device="cuda")).shape == (1, 4, 4, 12)
    assert engine.settings()["tf32"] is False
