"""Engines that decode: what they do as engines that encode do is tested in test_engines.py."""

import diffusers
import numpy as np
import plain_sigma_vae as plain
import pytest
import torch
from torch import nn

import fastlatent.encoders.engines.engine as engine_module
from fastlatent.encoders.engines.engine import LIMITS, open_decoder, open_engine
from fastlatent.encoders.engines.numerics import fix_numerics, relative_error
from fastlatent.encoders.load import load_autoencoder

UP, DOWN = {"up_block_types": ["UpDecoderBlock2D"] * 2}, {"down_block_types": ["DownEncoderBlock2D"] * 2}
TINY = {
    "AutoencoderKL": {"block_out_channels": (8, 8), "norm_num_groups": 4, "latent_channels": 2, **DOWN, **UP},
    "AutoencoderDC": {
        "latent_channels": 2, "attention_head_dim": 4, "encoder_block_types": ("ResBlock", "EfficientViTBlock"),
        "decoder_block_types": ("ResBlock", "EfficientViTBlock"), "encoder_block_out_channels": (8, 8),
        "decoder_block_out_channels": (8, 8), "encoder_layers_per_block": (1, 1), "decoder_layers_per_block": (1, 1),
        "encoder_qkv_multiscales": ((), (5,)), "decoder_qkv_multiscales": ((), (5,)),
    },
    "AutoencoderTiny": {
        "encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8), "num_encoder_blocks": (1, 1),
        "num_decoder_blocks": (1, 1), "latent_channels": 2,
    },
    "ConsistencyDecoderVAE": {
        "latent_channels": 4, "encoder_block_out_channels": (8, 8), "encoder_norm_num_groups": 4,
        "encoder_down_block_types": ["DownEncoderBlock2D"] * 2, "encoder_layers_per_block": 1,
        "decoder_block_out_channels": (8, 8), "decoder_down_block_types": ["ResnetDownsampleBlock2D"] * 2,
        "decoder_up_block_types": ["ResnetUpsampleBlock2D"] * 2, "decoder_norm_num_groups": 4,
        "decoder_layers_per_block": 1,
    },
}  # fmt: skip
SIGMA = {"img_size": 12, "patch_size": 4, "latent_size": 2, "std": 0.75}
SHAPE = (2, 2, 3, 4)


def make(name, folder, device="cpu", dtype=torch.float32):
    if name == "SigmaVAE":
        weights = plain.random_weights(0, width=128, hidden=96, depth=2, patch=4, side=3, latent_size=2)
        torch.save({"config": SIGMA, "model": {k: v.float() for k, v in weights.items()}}, folder / "vae.pt")
        return load_autoencoder(folder / "vae.pt", device, dtype)
    torch.manual_seed(0)
    getattr(diffusers, name)(**TINY[name]).save_pretrained(folder)
    return load_autoencoder(folder, device, dtype)


def latents_of(shape=SHAPE, device="cpu"):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(device)


@pytest.fixture(autouse=True)
def fixed():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    fix_numerics()
    yield
    torch.set_num_threads(before)
    torch.compiler.reset()


def check(vae, engine, limit, shape=SHAPE, device="cpu"):
    latents = latents_of(shape, device)
    got, want = engine.decode(latents), vae.decode(latents)
    assert got.dtype == torch.float32 and got.is_contiguous() and got.shape == want.shape
    assert relative_error(got, want) <= limit
    again = engine.decode(latents.flip(0))
    assert not torch.equal(again, got)  # and `got` is not a buffer that the second call wrote
    assert torch.equal(engine.decode(latents.to(memory_format=torch.channels_last)), got)


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("name", ["AutoencoderKL", "AutoencoderDC", "AutoencoderTiny", "SigmaVAE"])
def test_eager(tmp_path, name, fuse):
    vae = make(name, tmp_path)
    shape = (2, 2, 3, 3) if name == "SigmaVAE" else SHAPE
    engine = open_decoder("eager", vae, shapes=(shape,), cache=tmp_path / "cache", fuse=fuse)
    check(vae, engine, 1e-5, shape)
    assert (engine.name, engine.half) == ("eager", "decoder")
    want = {"name": "eager", "memory_format": "channels_last", **({"fused_norms": True} if fuse else {})}
    assert engine.settings() == want
    if fuse and name == "AutoencoderKL":  # the only one of them with GroupNorm and SiLU: they did run as one
        unfused = open_decoder("eager", vae, shapes=(shape,), cache=tmp_path)
        assert not torch.equal(unfused.decode(latents_of()), engine.decode(latents_of()))
        assert type(vae.model.decoder.conv_norm_out) is nn.GroupNorm  # the autoencoder itself is left alone


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(tmp_path, dtype):
    vae = make("AutoencoderKL", tmp_path, dtype=dtype)
    check(vae, open_decoder("eager", vae, shapes=(SHAPE,), cache=tmp_path), LIMITS[dtype])


def test_latents_that_do_not_fit(tmp_path):
    vae = make("SigmaVAE", tmp_path)
    with pytest.raises(ValueError, match=r"expected shapes \(B, 2, h, w\), got \(2, 3, 3, 3\)"):
        open_decoder("eager", vae, shapes=((2, 3, 3, 3),), cache=tmp_path)
    with pytest.raises(ValueError, match=r"needs latents of 3×3, got \(2, 2, 3, 4\)"):
        open_decoder("eager", vae, shapes=(SHAPE,), cache=tmp_path)
    engine = open_decoder("eager", vae, shapes=((2, 2, 3, 3),), cache=tmp_path)
    with pytest.raises(ValueError, match=r"expected latents of shape \(2, 2, 3, 3\); got \(1, 2, 3, 3\)"):
        engine.decode(torch.zeros(1, 2, 3, 3))
    with pytest.raises(ValueError, match="expected latents on cpu, got meta"):
        engine.decode(torch.empty(2, 2, 3, 3, device="meta"))


def test_a_decoder_that_draws_noise(tmp_path):
    vae = make("ConsistencyDecoderVAE", tmp_path)
    with pytest.raises(ValueError, match="ConsistencyDecoderVAE draws noise to decode.*use its decode"):
        open_decoder("eager", vae, shapes=((1, 4, 4, 4),), cache=tmp_path)


def test_compile(tmp_path, monkeypatch):
    # Traced whole, but not by Inductor, which takes 10 s; test_engines.py has it compile an encoder.
    def traced(module, latents, pool):
        return torch.compile(module, backend="eager", fullgraph=True, dynamic=False)

    monkeypatch.setattr(engine_module, "compile_module", traced)
    vae = make("AutoencoderKL", tmp_path)
    engine = open_decoder("compile", vae, shapes=(SHAPE,), cache=tmp_path)
    check(vae, engine, 1e-5)
    assert engine.settings()["options"]["deterministic"]


@pytest.mark.soak
@pytest.mark.parametrize("name", ["compile", "aoti"])
@pytest.mark.parametrize("kind", ["AutoencoderKL", "AutoencoderDC", "AutoencoderTiny", "SigmaVAE"])
def test_compiled_ahead_and_now(tmp_path, kind, name):
    vae = make(kind, tmp_path)
    shape = (2, 2, 3, 3) if kind == "SigmaVAE" else SHAPE
    check(vae, open_decoder(name, vae, shapes=(shape,), cache=tmp_path / "cache"), 1e-5, shape)
    if name == "aoti":
        open_decoder(name, vae, shapes=(shape,), cache=tmp_path / "cache")
        assert len(list((tmp_path / "cache").glob("*.pt2"))) == 1


def test_encoder_and_decoder_have_packages_of_their_own(tmp_path, monkeypatch):
    keys = []

    def no_file(folder, key, suffix, build):
        keys.append(key)
        raise OSError("not now")

    monkeypatch.setattr("fastlatent.encoders.engines.compiled.cached_file", no_file)
    vae = make("AutoencoderKL", tmp_path)
    for open_half, shape in ((open_engine, (2, 3, 6, 8)), (open_decoder, SHAPE)):
        with pytest.raises(OSError, match="not now"):
            open_half("aoti", vae, shapes=(shape,), cache=tmp_path)
    assert keys[0]["autoencoder"] == keys[1]["autoencoder"] and keys[0]["module"] != keys[1]["module"]


@pytest.mark.soak
@pytest.mark.filterwarnings("ignore:.*TensorRT-RTX:DeprecationWarning")
# Not AutoencoderDC: onnxruntime gets NaN of its linear attention, and opening an engine refuses that.
@pytest.mark.parametrize("kind", ["AutoencoderKL", "AutoencoderTiny", "SigmaVAE"])
def test_as_onnx_and_as_a_plan(tmp_path, kind):
    import onnxruntime

    from fastlatent.encoders.engines.onnx_export import INPUT, OUTPUT, export_onnx
    from fastlatent.encoders.engines.tensorrt import build_plan

    vae = make(kind, tmp_path)
    latents = latents_of((2, 2, 3, 3))
    file = export_onnx(vae.decoder(), latents)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    (got,) = session.run([OUTPUT], {INPUT: latents.numpy()})
    assert relative_error(torch.from_numpy(np.asarray(got)), vae.decode(latents)) <= LIMITS[torch.float32]
    plan, _ = build_plan(pytest.importorskip("tensorrt_rtx"), file)
    assert len(plan) > 10_000


@pytest.mark.needs_cuda
@pytest.mark.parametrize(("name", "fuse"), [("eager", False), ("eager", True), ("compile", False), ("aoti", False)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_on_cuda(tmp_path, name, fuse, dtype):
    vae = make("AutoencoderKL", tmp_path, "cuda", dtype)
    engine = open_decoder(name, vae, shapes=(SHAPE, (1, 2, 4, 8)), cache=tmp_path / "cache", fuse=fuse)
    check(vae, engine, LIMITS[dtype], device="cuda")
    assert engine.decode(latents_of((1, 2, 4, 8), "cuda")).shape == (1, 3, 8, 16)
