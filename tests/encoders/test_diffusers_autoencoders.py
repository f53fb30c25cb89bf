import inspect
import json

import diffusers
import pytest
import torch

from fastlatent.encoders.diffusers_autoencoders import KINDS, REFUSED
from fastlatent.encoders.load import load_autoencoder

# All that diffusers exports and that encodes something, also under names that do not begin with Autoencoder.
EXPORTED = sorted(
    name
    for name in dir(diffusers)
    if ("Autoencoder" in name or name.endswith(("VAE", "Vae", "VQModel", "Tokenizer")))
    and "Pipeline" not in name
    and inspect.isclass(getattr(diffusers, name))
)
DOWN, UP = {"down_block_types": ["DownEncoderBlock2D"] * 2}, {"up_block_types": ["UpDecoderBlock2D"] * 2}
CONVOLUTIONS = {"block_out_channels": (8, 8), "norm_num_groups": 4, "latent_channels": 2, **DOWN, **UP}
QWEN = {
    "base_dim": 8, "z_dim": 2, "dim_mult": [1, 1], "num_res_blocks": 1, "temperal_downsample": [True],
    "latents_mean": [0.0] * 2, "latents_std": [1.0] * 2,
}  # fmt: skip
# name -> config, (downsample, size_multiple, latent_channels)
TINY: dict[str, tuple[dict, tuple[int, int, int]]] = {
    "AutoencoderKL": (CONVOLUTIONS, (2, 2, 2)),
    "AsymmetricAutoencoderKL": (
        {"down_block_out_channels": (8, 8), "up_block_out_channels": (8, 16), "norm_num_groups": 4,
         "latent_channels": 2, **DOWN, **UP},
        (2, 2, 2),
    ),
    "AutoencoderTiny": (
        {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8), "num_encoder_blocks": (1, 1),
         "num_decoder_blocks": (1, 1), "latent_channels": 2},
        (2, 2, 2),
    ),
    "AutoencoderDC": (
        {"latent_channels": 4, "attention_head_dim": 4, "encoder_block_types": ("ResBlock", "EfficientViTBlock"),
         "decoder_block_types": ("ResBlock", "EfficientViTBlock"), "encoder_block_out_channels": (8, 8),
         "decoder_block_out_channels": (8, 8), "encoder_layers_per_block": (1, 1),
         "decoder_layers_per_block": (1, 1), "encoder_qkv_multiscales": ((), (5,)),
         "decoder_qkv_multiscales": ((), (5,))},
        (2, 2, 4),
    ),
    "AutoencoderKLFlux2": ({**CONVOLUTIONS, "layers_per_block": 1}, (2, 4, 2)),
    "AutoencoderKLHunyuanImage": (
        {"in_channels": 3, "out_channels": 3, "latent_channels": 4, "block_out_channels": (32, 32),
         "layers_per_block": 1, "spatial_compression_ratio": 2, "sample_size": 8},
        (2, 2, 4),
    ),
    "AutoencoderKLHunyuanImageRefiner": (
        {"latent_channels": 4, "block_out_channels": (8, 16), "layers_per_block": 1, "spatial_compression_ratio": 2,
         "temporal_compression_ratio": 2},
        (2, 2, 4),
    ),
    "AutoencoderKLKVAE": (
        {"channels": 32, "num_enc_blocks": 1, "num_dec_blocks": 1, "z_channels": 2, "ch_mult": (1, 1)}, (2, 2, 2)
    ),
    "AutoencoderKLQwenImage": (QWEN, (2, 2, 2)),
    "AutoencoderKLQwenImage21": ({**QWEN, "decoder_base_dim": 8, "scale_factor_spatial": 2}, (2, 2, 2)),
    "AutoencoderRAE": (
        {"encoder_type": "dinov2", "encoder_hidden_size": 64, "encoder_patch_size": 4, "encoder_num_hidden_layers": 1,
         "decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2,
         "decoder_intermediate_size": 16, "patch_size": 8, "encoder_input_size": 8, "latents_mean": [0.5],
         "latents_std": [2.0]},
        (8, 16, 64),
    ),
    "ConsistencyDecoderVAE": (
        {"latent_channels": 4, "encoder_block_out_channels": (8, 8), "encoder_norm_num_groups": 4,
         "encoder_down_block_types": ["DownEncoderBlock2D"] * 2, "encoder_layers_per_block": 1,
         "decoder_block_out_channels": (8, 8), "decoder_down_block_types": ["ResnetDownsampleBlock2D"] * 2,
         "decoder_up_block_types": ["ResnetUpsampleBlock2D"] * 2, "decoder_norm_num_groups": 4,
         "decoder_layers_per_block": 1},
        (2, 2, 4),
    ),
    "VQModel": ({**CONVOLUTIONS, "num_vq_embeddings": 5, "vq_embed_dim": 3}, (2, 2, 3)),
}  # fmt: skip

# One of each network; tracing takes a second.
COMPILED = (
    "AutoencoderKL", "AutoencoderDC", "AutoencoderKLHunyuanImageRefiner", "AutoencoderKLQwenImage21", "AutoencoderRAE"
)  # fmt: skip


def tiny(name, **changes):
    torch.manual_seed(0)
    return getattr(diffusers, name)(**(TINY[name][0] | changes)).eval().requires_grad_(False)


def images(vae):
    """Two of them, not square where the autoencoder allows it."""
    height = vae.fixed_size or 2 * vae.size_multiple
    shape = (2, 3, height, vae.fixed_size or height + vae.size_multiple)
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2 - 1


def plain_encode(model, pixels):
    """What one writes with diffusers alone."""
    name = type(model).__name__
    if "QwenImage21" in name:
        pixels = torch.cat([pixels, torch.ones_like(pixels[:, :1])], 1)  # opaque RGBA
    if "Qwen" in name or "Refiner" in name:
        pixels = pixels[:, :, None]
    if name == "AutoencoderRAE":
        pixels = pixels * 0.5 + 0.5
    out = model.encode(pixels)
    if "latent_dist" not in out:
        return out["latent" if "latent" in out else "latents"]
    moments = torch.cat([out.latent_dist.mean, out.latent_dist.logvar], 1)
    return moments[:, :, 0] if moments.ndim == 5 else moments


def plain_decode(model, latents):
    name = type(model).__name__
    if "Qwen" in name or "Refiner" in name:
        return model.decode(latents[:, :, None]).sample[:, :3, 0]
    if name == "ConsistencyDecoderVAE":
        return model.decode(latents, generator=torch.Generator().manual_seed(0)).sample
    pixels = model.decode(latents).sample
    return pixels * 2 - 1 if name == "AutoencoderRAE" else pixels


@pytest.mark.parametrize("name", EXPORTED)
def test_every_class_of_diffusers_is_placed(name, tmp_path):
    """A class that a later diffusers adds fails here until it is in one of the two tables, and then in TINY."""
    assert (name in KINDS) != (name in REFUSED), f"{name} is new in diffusers {diffusers.__version__}"
    if name in KINDS:
        assert name in TINY
        return
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": name}))
    (tmp_path / "diffusion_pytorch_model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=f"holds a {name}, and it.*Image autoencoders are .*AutoencoderKL,"):
        load_autoencoder(tmp_path)


@pytest.mark.parametrize("name", KINDS)
def test_equals_plain_diffusers_bit_for_bit(name, tmp_path):
    model = tiny(name)
    model.save_pretrained(tmp_path)
    vae = load_autoencoder(tmp_path)
    downsample, multiple, channels = TINY[name][1]
    assert (vae.downsample, vae.size_multiple, vae.latent_channels) == (downsample, multiple, channels)
    assert vae.pixel_channels == 3
    pixels = images(vae)
    encoded, want = vae.encode(pixels), plain_encode(model, pixels)
    height, width = (side // downsample for side in pixels.shape[2:])
    assert encoded.shape == (2, channels * (2 if vae.has_posterior else 1), height, width)
    assert vae.has_posterior == (name not in ("AutoencoderTiny", "AutoencoderDC", "AutoencoderRAE", "VQModel"))
    assert torch.equal(encoded, want)
    latents = encoded[:, :channels]
    decoded = vae.decode(latents)
    assert decoded.shape == pixels.shape
    assert torch.equal(decoded, plain_decode(model, latents))
    if not KINDS[name].noisy:
        assert torch.equal(vae.decoder()(latents), decoded)
    assert vae.identity()["class"] == name
    assert json.loads(json.dumps(vae.identity())) == vae.identity()


@pytest.mark.parametrize(
    "name", [name if name in COMPILED else pytest.param(name, marks=pytest.mark.soak) for name in KINDS]
)
def test_the_encoder_can_be_exported_and_compiled_whole(name, tmp_path):
    tiny(name).save_pretrained(tmp_path)
    vae = load_autoencoder(tmp_path)
    pixels = images(vae)
    want, encoder = vae.encode(pixels), vae.encoder()
    exported = torch.export.export(encoder, (pixels,))
    assert torch.equal(exported.module()(pixels), want)
    assert not any("decoder" in weight for weight in exported.state_dict)
    if name in COMPILED:
        torch.compiler.reset()
        with torch.no_grad():
            assert torch.equal(torch.compile(encoder, backend="eager", fullgraph=True)(pixels), want)
    # It shares the weights, in the memory they lie in.
    theirs = {weight.data_ptr() for weight in vae.model.parameters()}
    assert {weight.data_ptr() for weight in encoder.parameters()} <= theirs


# The one with numpy's booleans in its decoder; the others take a second or two each.
@pytest.mark.parametrize(
    "name",
    [
        name if "Refiner" in name else pytest.param(name, marks=pytest.mark.soak)
        for name in KINDS
        if not KINDS[name].noisy
    ],
)
def test_the_decoder_can_be_exported_and_compiled_whole(name, tmp_path):
    tiny(name).save_pretrained(tmp_path)
    vae = load_autoencoder(tmp_path)
    latents = vae.encode(images(vae))[:, : vae.latent_channels].clone()
    want, decoder = vae.decode(latents), vae.decoder()
    exported = torch.export.export(decoder, (latents,))
    assert torch.equal(exported.module()(latents), want)
    assert not any(weight.startswith("model.encoder.") for weight in exported.state_dict)
    torch.compiler.reset()
    with torch.no_grad():
        assert torch.equal(torch.compile(decoder, backend="eager", fullgraph=True)(latents), want)
    theirs = {weight.data_ptr() for weight in vae.model.parameters()}
    assert {weight.data_ptr() for weight in decoder.parameters()} <= theirs


@pytest.mark.parametrize(
    ("name", "key", "value", "same"),
    [
        ("AutoencoderKL", "scaling_factor", 0.5, True),
        ("AutoencoderDC", "scaling_factor", 0.5, True),
        ("AutoencoderTiny", "shift_factor", 0.5, True),
        ("AutoencoderKLQwenImage", "latents_std", [3.0, 3.0], True),
        # These two apply it themselves: one when encoding, one when decoding.
        ("AutoencoderRAE", "scaling_factor", 0.5, False),
        ("ConsistencyDecoderVAE", "scaling_factor", 0.5, False),
    ],
)
def test_scaling_is_part_of_the_identity_only_where_it_is_applied(name, key, value, same, tmp_path):
    tiny(name).save_pretrained(tmp_path)
    vae = load_autoencoder(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    other = load_autoencoder(tmp_path)
    pixels = images(vae)
    encoded = vae.encode(pixels)
    latents = encoded[:, : vae.latent_channels]
    equal = torch.equal(other.encode(pixels), encoded) and torch.equal(other.decode(latents), vae.decode(latents))
    assert equal == same
    assert (other.identity() == vae.identity()) == same


def test_sizes_that_are_fixed(tmp_path):
    tiny("AutoencoderRAE").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="16×16 only, got 32×32"):
        load_autoencoder(tmp_path).encode(torch.zeros(1, 3, 32, 32))


def test_latents_that_are_no_grid_are_refused(tmp_path):
    tiny("AutoencoderRAE", reshape_to_2d=False).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="reshape_to_2d"):
        load_autoencoder(tmp_path)


def test_channels_that_are_no_image_are_refused(tmp_path):
    tiny("AutoencoderKL", in_channels=2, out_channels=2).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"1 \(grey\), 3 \(RGB\) or 4 \(RGBA\) pixel channels, got 2"):
        load_autoencoder(tmp_path)


@pytest.mark.parametrize(("alpha", "patch_size"), [(0, None), (1, 2), (0, 2)])
def test_qwen_image_counts_patched_channels_and_takes_rgb(alpha, patch_size, tmp_path):
    channels = (3 + alpha) * (patch_size or 1) ** 2
    model = tiny("AutoencoderKLQwenImage21", in_channels=channels, out_channels=channels, patch_size=patch_size)
    model.save_pretrained(tmp_path)
    vae = load_autoencoder(tmp_path)
    assert (vae.pixel_channels, vae.downsample) == (3, 2 * (patch_size or 1))
    pixels = images(vae)
    video = torch.cat([pixels, torch.ones_like(pixels[:, :alpha])], 1)[:, :, None]
    assert torch.equal(vae.encode(pixels)[:, :2], model.encode(video).latent_dist.mean[:, :, 0])
    assert vae.decode(vae.encode(pixels)[:, :2]).shape == pixels.shape


def test_grey(tmp_path):
    tiny("AutoencoderKL", in_channels=1, out_channels=1).save_pretrained(tmp_path)
    vae = load_autoencoder(tmp_path)
    assert vae.pixel_channels == 1
    assert vae.decode(vae.encode(torch.zeros(1, 1, 4, 4))[:, :2]).shape == (1, 1, 4, 4)
