import re

import plain_ldm_autoencoder as plain
import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file

from fastlatent.encoders.ldm_keys import from_ldm
from fastlatent.encoders.load import load_autoencoder

# KL-16's shape, one channel per group: attention behind the encoder's last level only, widths that grow twice.
KL16 = {"ch": 32, "mult": (1, 1, 2), "blocks": 2, "z": 3, "encoder_attention": (2,)}
PIXELS = torch.rand(2, 3, 8, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 2 - 1


def relative(got, want):
    return ((got.double() - want).norm() / want.norm()).item()


@pytest.mark.parametrize(
    "sizes",
    [
        KL16,
        {"ch": 32, "mult": (1, 2), "blocks": 1, "z": 2},  # Stable Diffusion's: no attention but in the middle
        # Attention that is not at the end, and in the decoder, whose levels diffusers counts the other way.
        {"ch": 32, "mult": (1, 2, 1), "blocks": 1, "z": 2, "encoder_attention": (1,), "decoder_attention": (0, 1)},
        {"ch": 32, "mult": (1,), "blocks": 1, "z": 1},  # one level: nothing is down-sampled
    ],
)
def test_float64_equals_the_published_network(sizes):
    weights = plain.random_weights(0, **sizes)
    config, state = from_ldm(weights)
    model = AutoencoderKL(**config).double().eval()
    model.load_state_dict(state)
    with torch.no_grad():
        posterior = model.encode(PIXELS).latent_dist
        want = plain.encode(weights, PIXELS)
        assert relative(torch.cat([posterior.mean, posterior.logvar], 1), want) < 1e-10
        latents = want[:, : sizes["z"]]
        assert relative(model.decode(latents).sample, plain.decode(weights, latents)) < 1e-10


def save(path, weights, form):
    weights = {name: tensor.float() for name, tensor in weights.items()}
    if form == "model":
        torch.save({"model": weights}, path)
    elif form == "bare":
        torch.save(weights, path)
    elif form == "stable diffusion":
        whole = {f"first_stage_model.{name}": tensor for name, tensor in weights.items()}
        torch.save({"state_dict": whole | {"model.diffusion_model.out.weight": torch.zeros(2)}, "epoch": 3}, path)
    elif form == "training":
        torch.save(
            {"state_dict": weights | {"loss.logvar": torch.zeros(()), "loss.discriminator.w": torch.ones(1)}}, path
        )
    elif form == "safetensors":
        save_file(weights, path)
    elif form == "linear":  # attention written as linear layers
        names = re.compile(r"attn.*\.(q|k|v|proj_out)\.weight")
        save_file({n: t[:, :, 0, 0].contiguous() if names.search(n) else t for n, t in weights.items()}, path)


def test_files_as_published(tmp_path):
    weights = plain.random_weights(0, **KL16)
    want = plain.encode(weights, PIXELS)
    identities = []
    for form, name in (
        ("model", "kl16.ckpt"), ("bare", "a.pt"), ("stable diffusion", "v1.ckpt"), ("training", "b.pth"),
        ("safetensors", "c.safetensors"), ("linear", "d.safetensors"),
    ):  # fmt: skip
        save(tmp_path / name, weights, form)
        vae = load_autoencoder(tmp_path / name)
        assert (vae.pixel_channels, vae.latent_channels, vae.downsample, vae.size_multiple) == (3, 3, 4, 4)
        assert vae.has_posterior
        moments = vae.encode(PIXELS)
        assert relative(moments, want) < 1e-5
        assert relative(vae.decode(moments[:, :3]), plain.decode(weights, want[:, :3])) < 1e-4
        identities.append(vae.identity())
    # The same weights are the same autoencoder, however they were wrapped.
    assert all(identity == identities[0] for identity in identities)
    assert identities[0]["class"] == "AutoencoderKL"
    half = load_autoencoder(tmp_path / "kl16.ckpt", "cpu", torch.bfloat16)
    assert half.identity() == identities[0]
    assert torch.equal(half.upcast().encode(PIXELS), vae.encode(PIXELS))


def without(weights, *parts):
    return {name: tensor for name, tensor in weights.items() if not any(part in name for part in parts)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w | {"quantize.embedding.weight": torch.zeros(4, 3)}, "a VQ model"),
        (lambda w: w | {"text.weight": torch.zeros(1)}, "expected weights of an AutoencoderKL only, got text.weight"),
        (lambda w: w | {"quant_conv.weight": torch.zeros(8, 6, 1, 1)}, "z_channels = embed_dim.*got 8"),
        (lambda w: without(w, "decoder.conv_in"), "expected a convolution decoder.conv_in.weight"),
        (lambda w: without(w, "encoder.down.1.downsample"), "missing: encoder.down_blocks.1.downsamplers.0.conv.bias"),
        (lambda w: without(w, "encoder.down"), r"expected weights such as encoder.down.0.…"),
        (lambda w: w | {"encoder.mid.block_1.temb_proj.weight": torch.zeros(3)}, "unexpected: .*temb_proj"),
        (lambda w: w | {"decoder.norm_out.bias": torch.zeros(5)}, r"another shape: decoder.conv_norm_out.bias \[5\]"),
        (lambda w: {"decoder.blocks.0.weight": torch.zeros(1)}, "name the folder with its config.json"),
        (lambda w: {"encoder.conv_in.weight": "text"}, "expected tensors by name"),
        (lambda w: {}, "it holds nothing"),
    ],
)  # fmt: skip
def test_weights_that_do_not_fit(tmp_path, change, message):
    file = tmp_path / "weights.pt"
    torch.save(change(plain.random_weights(0, **KL16)), file)
    with pytest.raises(ValueError, match=message) as caught:
        load_autoencoder(file)
    assert str(file) in str(caught.value)


def test_widths_must_be_multiples_of_the_groups():
    weights = plain.random_weights(0, **KL16)
    narrow = {name: tensor[:31] if name.startswith("encoder.down.0") else tensor for name, tensor in weights.items()}
    with pytest.raises(ValueError, match="multiples of 32.*got 31"):
        from_ldm(narrow)
