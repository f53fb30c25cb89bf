import plain_sigma_vae as plain
import pytest
import torch

from fastlatent.encoders.load import load_autoencoder
from fastlatent.encoders.sigma_vae import SigmaVaeEncoder, SigmaVaeNetwork

# Two heads, and sides of three patches: a transposed grid, or heads mixed up, cannot go unseen.
SIZES = {"width": 128, "hidden": 96, "depth": 2, "patch": 4, "side": 3, "latent_size": 5}
CONFIG = {"img_size": 12, "patch_size": 4, "latent_size": 5, "std": 0.75}
PIXELS = torch.rand(2, 3, 12, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 2 - 1


def relative(got, want):
    return ((got.double() - want).norm() / want.norm()).item()


def saved(path, weights, **config):
    torch.save({"config": CONFIG | config, "model": {k: v.float() for k, v in weights.items()}}, path)
    return path


@pytest.mark.parametrize(("encoder", "arch"), [("beit3", "beit3-base"), ("vit", "vit-base")])
def test_float64_equals_the_published_network(encoder, arch, tmp_path):
    weights = plain.random_weights(0, **SIZES, encoder=encoder)
    network = SigmaVaeNetwork(CONFIG | {"encoder_arch": arch}, weights).double().eval()
    network.load_state_dict(weights)
    want = plain.encode(weights, PIXELS, 4)
    with torch.no_grad():
        assert want.shape == (2, 5, 3, 3)
        assert relative(SigmaVaeEncoder(network)(PIXELS), want) < 1e-10
        assert relative(network.decode(want), plain.decode(weights, want, 4)) < 1e-10
    vae = load_autoencoder(saved(tmp_path / "a.pt", weights, encoder_arch=arch))
    assert relative(vae.encode(PIXELS), want) < 1e-5


def test_is_an_autoencoder_without_posterior(tmp_path):
    weights = plain.random_weights(0, **SIZES)
    # Entries of the config that training alone uses change nothing.
    vae = load_autoencoder(saved(tmp_path / "a.ckpt", weights, kl_weight=0.01))
    assert (vae.pixel_channels, vae.latent_channels, vae.downsample, vae.size_multiple) == (3, 5, 4, 12)
    assert not vae.has_posterior
    latents = vae.encode(PIXELS)
    assert latents.shape == (2, 5, 3, 3)
    assert latents.dtype == torch.float32
    assert torch.equal(vae.encoder()(PIXELS.float()), latents)
    assert relative(vae.decode(latents), plain.decode(weights, plain.encode(weights, PIXELS, 4), 4)) < 1e-4
    identity = vae.identity()
    assert identity["class"] == "SigmaVAE"
    assert identity["config"] == CONFIG | {"encoder_arch": "beit3-base", "decoder_arch": "vit-base"}
    other = load_autoencoder(saved(tmp_path / "b.ckpt", weights, std=0.5)).identity()
    assert other["weights"] == identity["weights"]
    assert other != identity
    half = load_autoencoder(tmp_path / "a.ckpt", "cpu", torch.bfloat16)
    torch.testing.assert_close(half.encode(PIXELS), latents, rtol=0.1, atol=0.1)
    assert half.identity() == identity
    assert torch.equal(half.upcast().encode(PIXELS), latents)
    with pytest.raises(ValueError, match="12×12 only, got 16×12"):
        vae.encode(torch.zeros(1, 3, 16, 12))


def test_the_encoder_exports(tmp_path):
    vae = load_autoencoder(saved(tmp_path / "a.pt", plain.random_weights(0, **SIZES)))
    exported = torch.export.export(vae.encoder(), (PIXELS.float(),))
    assert not any("decoder" in name for name in exported.state_dict)
    assert torch.equal(exported.module()(PIXELS.float()), vae.encode(PIXELS))


@pytest.mark.parametrize(
    ("config", "weights", "message"),
    [
        ({"latent_size": 6}, {}, r"another shape: decoder.patch_embed.proj.weight \[128, 5, 1, 1\], expected \[128, 6"),
        ({"img_size": 16}, {}, "another shape: decoder.pos_embed"),
        ({"img_size": 13}, {}, "img_size in patches of 4, got 13"),
        ({"patch_size": 0}, {}, r"config\['patch_size'\] of a σ-VAE to be a size, got 0"),
        ({"std": None}, {}, r"config\['std'\]"),
        ({"encoder_arch": "resnet"}, {}, "beit3-base or vit-base, got 'resnet'"),
        ({"encoder_arch": "vit-base"}, {}, "lack 'encoder.patch_embed.proj.weight'"),
        ({}, {"encoder.encoder.layers.0.self_attn.inner_attn_ln.weight": None}, "missing: .*inner_attn_ln.weight"),
        ({}, {"encoder.encoder.relative_position.weight": torch.zeros(1)}, "unexpected: .*relative_position"),
    ],
)  # fmt: skip
def test_checkpoints_that_do_not_fit(tmp_path, config, weights, message):
    state = {k: v for k, v in (plain.random_weights(0, **SIZES) | weights).items() if v is not None}
    file = saved(tmp_path / "a.pt", state, **config)
    with pytest.raises(ValueError, match=message) as caught:
        load_autoencoder(file)
    assert str(file) in str(caught.value)
