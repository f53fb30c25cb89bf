"""The compiled step of a streamed decode: where it is used, that it is compared with eager; (soak) the compilers."""

import pytest
import torch
from tiny_video_models import make_vae

from fastlatent.encoders.engines import video_step
from fastlatent.encoders.video_autoencoders import load_video_autoencoder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_vae("AutoencoderKLWan", tmp_path_factory.mktemp("step") / "vae")


def joined(vae, z, **options):
    return torch.cat(list(vae.stream(z, **options)), 1)


def test_used_from_the_third_latent_frame(folder, tmp_path, monkeypatch):
    """The compiler is replaced by one that counts calls."""
    calls = []

    def compile(module, **options):
        # Dynamo gives up at its 8th compilation of the same code, and each size of videos is one.
        assert torch._dynamo.config.recompile_limit > 1000
        assert torch._dynamo.config.accumulated_recompile_limit > 1000
        return lambda *inputs: (calls.append(inputs[0].shape), module(*inputs))[1]

    monkeypatch.setattr(torch, "compile", compile)
    vae = load_video_autoencoder(folder, "cpu", torch.float32)
    z = torch.randn(1, 4, 5, 3, 4)
    want = joined(vae, z)
    vae.use_engine("compile", tmp_path)
    assert torch.equal(joined(vae, z), want)
    assert len(calls) == 4  # three latent frames of five, and the comparison
    assert torch.equal(joined(vae, z[:, :, :2]), want[:, :5]) and len(calls) == 4
    joined(vae, torch.randn(1, 4, 3, 2, 2))
    assert len(calls) == 6  # another shape: compared again


def test_a_compiler_that_computes_something_else(folder, tmp_path, monkeypatch):
    vae = load_video_autoencoder(folder, "cpu", torch.float32)
    vae.use_engine("compile", tmp_path)

    def compile(module, **options):
        def run(z, caches):
            pixels, caches = module(z, caches)
            return pixels * 1.001, caches

        return run

    monkeypatch.setattr(torch, "compile", compile)
    with pytest.raises(ValueError, match=r"--engine compile: differs from eager by 0\.001.*use --engine eager"):
        joined(vae, torch.randn(1, 4, 3, 3, 4))
    monkeypatch.setattr(torch, "compile", lambda module, **options: lambda *inputs: [][1])
    with pytest.raises(ValueError, match="--engine compile: compiling the step failed: list index"):
        joined(vae, torch.randn(1, 4, 3, 3, 4))


def test_a_package_is_of_one_precision(folder, tmp_path, monkeypatch):
    """TF32 is a switch of the process and no property of the inputs."""
    keys = []

    def no_file(folder, key, suffix, build):
        keys.append(dict(key))
        raise OSError("not now")

    monkeypatch.setattr("fastlatent.encoders.engines.compiled.cached_file", no_file)
    vae = load_video_autoencoder(folder, "cpu", torch.float32)
    vae.use_engine("aoti", tmp_path)
    for precision in ("highest", "high"):
        monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda precision=precision: precision)
        with pytest.raises(OSError, match="not now"):
            joined(vae, torch.randn(1, 4, 3, 1, 1))
    assert keys[0].pop("float32") != keys[1].pop("float32") and keys[0] == keys[1]


def test_other_classes_have_none(tmp_path):
    vae = load_video_autoencoder(make_vae("AutoencoderKLMochi", tmp_path / "vae"), "cpu", torch.float32)
    with pytest.raises(ValueError, match="AutoencoderKLWan only, not AutoencoderKLMochi"):
        vae.use_engine("aoti", tmp_path)


@pytest.mark.soak
@pytest.mark.parametrize("name", video_step.STEP_ENGINES)
def test_compilers(folder, tmp_path, name):
    vae = load_video_autoencoder(folder, "cpu", torch.float32)
    z = torch.randn(1, 4, 5, 3, 4)
    want = joined(vae, z)
    vae.use_engine(name, tmp_path)
    assert (joined(vae, z) - want).abs().max() < 1e-5
    packages = list(tmp_path.glob("*.pt2"))
    assert len(packages) == (name == "aoti")
    if packages:  # loaded, not compiled, by a later run
        changed = packages[0].stat().st_mtime_ns
        again = load_video_autoencoder(folder, "cpu", torch.float32)
        again.use_engine(name, tmp_path)
        assert (joined(again, z) - want).abs().max() < 1e-5
        assert packages[0].stat().st_mtime_ns == changed
