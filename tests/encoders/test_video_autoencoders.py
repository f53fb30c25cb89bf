import functools
import json

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_video_models import TINY, TINY_LATENTS, VARIANTS, make_vae

from fastlatent.encoders.diffusers_autoencoders import REFUSED
from fastlatent.encoders.video_autoencoders import load_video_autoencoder, video_autoencoder_on_meta
from fastlatent.encoders.video_kinds import VIDEO_KINDS
from fastlatent.encoders.video_streaming import WHOLE

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.needs_cuda)]
EVERY = [*TINY, *VARIANTS]
WEIGHTS = "diffusion_pytorch_model.safetensors"
FLOAT32 = torch.finfo(torch.float32).eps


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """name -> folder of a model and what loads from it, made once."""

    @functools.cache
    def make(name):
        folder = make_vae(name, tmp_path_factory.mktemp("models") / name)
        return folder, load_video_autoencoder(folder, "cpu", torch.float32)

    return make


def class_of(name):
    return VARIANTS[name][0] if name in VARIANTS else name


def raw_of(name, vae, frames=None, seed=0):
    t, h, w = TINY_LATENTS[class_of(name)]
    return torch.randn(1, vae.latent_channels, frames or t, h, w, generator=torch.Generator().manual_seed(seed))


def plain_encode(name, model, pixels):
    if class_of(name) == "AutoencoderKLTemporalDecoder":
        return model.encode(pixels[0].transpose(0, 1)).latent_dist.mode().transpose(0, 1)[None]
    if class_of(name) == "AutoencoderKLAllegro":
        model.enable_tiling()
    return model.encode(pixels).latent_dist.mode()


def plain_decode(name, model, raw):
    """What one writes with diffusers alone → [1, 3, T, H, W]."""
    if class_of(name) == "AutoencoderKLTemporalDecoder":
        parts = raw[0].transpose(0, 1).split(14)
        return torch.cat([model.decode(p, num_frames=len(p)).sample for p in parts]).transpose(0, 1)[None]
    if class_of(name) == "AutoencoderKLAllegro":
        model.enable_tiling()
        return model.decode(raw).sample.transpose(1, 2)
    if name == "LTX-0.9.1":
        torch.manual_seed(0)
        return model.decode(raw, torch.zeros(1)).sample
    return model.decode(raw).sample


@torch.no_grad()
@pytest.mark.parametrize("name", [*TINY, "Wan2.2", "LTX-0.9.1"])  # the other variants are other numbers alone
def test_encode_normalize_denormalize_decode_is_the_direct_path(name, tiny):
    folder, vae = tiny(name)
    model = getattr(diffusers, class_of(name)).from_pretrained(folder).eval().requires_grad_(False)
    t, h, w = TINY_LATENTS[class_of(name)]
    shape = (1, 3, vae.frames(t), h * vae.downsample, w * vae.downsample)
    pixels = torch.rand(shape, generator=torch.Generator().manual_seed(1)) * 2 - 1
    encoded = vae.encode(pixels)
    assert encoded.shape[1] == vae.latent_channels * (2 if vae.has_posterior else 1)
    raw = encoded[:, : vae.latent_channels]
    assert raw.shape[2:] == (t, h, w) and encoded.dtype == torch.float32
    assert torch.equal(raw, plain_encode(name, model, pixels))
    want = plain_decode(name, model, raw)
    assert want.shape == shape
    assert torch.equal(vae.decode(raw), want)

    # Not bit for bit: normalising and back is five float32 roundings, of numbers up to |raw| + |mean|.
    back = vae.denormalize(vae.normalize(raw))
    size = raw.abs().amax() + (0 if vae._normalization.mean is None else vae._normalization.mean.abs().amax())
    assert (back - raw).abs().amax() <= 5 * FLOAT32 * size
    chunks = list(vae.stream(back))
    assert all(chunk.dtype == torch.float32 and chunk.shape[::2] == (3, shape[3]) for chunk in chunks)
    # A group of Stable Video Diffusion is 14 frames, and a tile of Allegro is the whole video here.
    whole = (*WHOLE, "AutoencoderKLTemporalDecoder", "AutoencoderKLAllegro")
    assert (len(chunks) == 1) == (class_of(name) in whole) and vae.streams == (class_of(name) not in WHOLE)
    assert (torch.cat(chunks, 1) - want[0]).abs().amax() <= 1e-4 * want.abs().amax()


def formula64(name, config, z):
    """raw latents from the pipeline's, in float64, and the same in the order of float32 operations of the pipeline."""
    name, t = class_of(name), z.shape[2]

    def lists(dtype):
        shape = (1, z.shape[1], -1, 1, 1)
        values = (torch.tensor(config[key], dtype=dtype).view(shape) for key in ("latents_mean", "latents_std"))
        return [value[:, :, :t] for value in values]

    s = config.get("scaling_factor")
    if name == "AutoencoderKLWan":
        (mean, std), (mean32, std32) = lists(torch.float64), lists(torch.float32)
        return z.double() * std + mean, z / (1.0 / std32) + mean32
    if name in ("AutoencoderKLMochi", "AutoencoderKLCosmos", "AutoencoderKLLTXVideo"):
        s = 0.5 if name == "AutoencoderKLCosmos" else s  # sigma_data of its scheduler
        (mean, std), (mean32, std32) = lists(torch.float64), lists(torch.float32)
        return z.double() * std / s + mean, z * std32 / s + mean32
    if name in ("AutoencoderKLHunyuanVideo", "AutoencoderKLHunyuanVideo15"):
        return z.double() / s, z / s
    return z.double() / s, 1 / s * z


@pytest.mark.parametrize("name", EVERY)
def test_denormalize_against_float64_and_the_pipelines_own_order(name, tiny):
    folder, vae = tiny(name)
    config = json.loads((folder / "config.json").read_text())
    if class_of(name) == "AutoencoderKLLTXVideo":  # among its weights
        stored = load_file(folder / WEIGHTS)
        config |= {key: stored[key].tolist() for key in ("latents_mean", "latents_std")}
    z = raw_of(name, vae, seed=2).half()  # as an experiment stores them
    want, order = formula64(name, config, z.float())
    got = vae.denormalize(z)
    assert got.dtype == torch.float32 and torch.equal(got, order)
    assert (got - want).abs().amax() <= 3 * FLOAT32 * want.abs().amax()
    again = vae.normalize(want.float())
    assert (again - z.float()).abs().amax() <= 8 * FLOAT32 * z.float().abs().amax()


WAN_MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)  # fmt: skip
WAN_STD = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)  # fmt: skip
FOUR = {"down_block_types": ["DownEncoderBlock2D"] * 4, "block_out_channels": [128, 256, 512, 512]}
# class, config beside the defaults -> latent channels, frames per latent frame, pixels per latent, (t, frames)
PUBLISHED = [
    ("AutoencoderKLWan", {}, (16, 4, 8), (16, 61)),
    (
        "AutoencoderKLWan",
        {"base_dim": 160, "decoder_base_dim": 256, "z_dim": 48, "is_residual": True, "patch_size": 2, "in_channels": 12,
         "out_channels": 12, "latents_mean": [0.0] * 48, "latents_std": [1.0] * 48},
        (48, 4, 16), (31, 121),
    ),
    ("AutoencoderKLHunyuanVideo", {}, (16, 4, 8), (33, 129)),
    ("AutoencoderKLHunyuanVideo15", {}, (32, 4, 16), (31, 121)),
    ("AutoencoderKLCogVideoX", {}, (16, 4, 8), (13, 49)),
    ("AutoencoderKLLTXVideo", {}, (128, 8, 32), (21, 161)),
    ("AutoencoderKLMochi", {}, (12, 6, 8), (4, 19)),
    ("AutoencoderKLAllegro", {}, (4, 4, 8), (22, 88)),
    ("AutoencoderKLCosmos", {}, (16, 8, 8), (16, 121)),
    ("AutoencoderKLTemporalDecoder", FOUR, (4, 1, 8), (25, 25)),
]  # fmt: skip


# Made at full size, on "meta": 0.2 to 0.4 s each, most of it torch's bookkeeping.
@pytest.mark.parametrize(
    "name, config, numbers, lengths",
    [PUBLISHED[0], *(pytest.param(*row, marks=pytest.mark.soak) for row in PUBLISHED[1:])],
)
def test_published_sizes_from_config_json_alone(name, config, numbers, lengths, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": name, **config}))
    vae = video_autoencoder_on_meta(tmp_path, torch.bfloat16)
    assert (vae.latent_channels, vae.time_stride, vae.downsample) == numbers
    assert vae.frames(lengths[0]) == lengths[1] and vae.latent_frames(lengths[1]) == lengths[0]
    weight = next(vae.model.parameters())
    assert weight.device.type == "meta" and weight.dtype == torch.bfloat16
    if numbers[1] > 1:
        with pytest.raises(ValueError, match=f"{name} has videos of {numbers[1]}·k.* frames, .* or .*, got"):
            vae.latent_frames(lengths[1] + 1)
    with pytest.raises(ValueError, match="got 0"):
        vae.latent_frames(0)
    if name == "AutoencoderKLWan" and not config:
        z = torch.ones(1, 16, 1, 1, 1, dtype=torch.float16)
        want = torch.tensor(WAN_STD, dtype=torch.float64) + torch.tensor(WAN_MEAN, dtype=torch.float64)
        # z / (1 / std) + mean is three roundings.
        assert (vae.denormalize(z).flatten() - want).abs().amax() < 3 * FLOAT32 * 4
        assert vae.normalization()["mean"] == pytest.approx(WAN_MEAN)


def test_half_precision_on_meta_warns_of_nothing(tiny, monkeypatch):
    said = []
    monkeypatch.setattr(diffusers.models.modeling_utils.logger, "warning", said.append)
    vae = video_autoencoder_on_meta(tiny("AutoencoderKLWan")[0], torch.bfloat16)
    assert not said and {one.dtype for one in vae.model.parameters()} == {torch.bfloat16}


def test_decode_on_meta_has_the_shape_of_the_real_one(tiny):
    for name in ("AutoencoderKLWan", "LTX-0.9.1", "AutoencoderKLTemporalDecoder"):
        folder, vae = tiny(name)
        meta = video_autoencoder_on_meta(folder, torch.float32)
        chunks = [tuple(chunk.shape) for chunk in meta.stream(raw_of(name, vae).to("meta"))]
        assert chunks == [tuple(chunk.shape) for chunk in vae.stream(raw_of(name, vae))]


@pytest.mark.parametrize("name, config, numbers, lengths", PUBLISHED)
def test_strides_and_lengths(name, config, numbers, lengths, tiny):
    """The tiny models have the published strides."""
    vae = tiny("Wan2.2" if config.get("z_dim") == 48 else name)[1]
    assert (vae.time_stride, vae.downsample) == numbers[1:]
    assert vae.frames(lengths[0]) == lengths[1] and vae.latent_frames(lengths[1]) == lengths[0]


def test_an_even_number_of_cogvideox_is_all_of_8_frames(tiny):
    vae = tiny("AutoencoderKLCogVideoX")[1]
    assert [vae.frames(t) for t in (1, 2, 3, 4, 12, 13)] == [1, 8, 9, 16, 48, 49]
    assert [vae.latent_frames(n) for n in (1, 8, 9, 16, 48, 49)] == [1, 2, 3, 4, 12, 13]
    with pytest.raises(ValueError, match="videos of 8·k or 8·k . 1 frames, 8 or 9, got 5"):  # it would give 8 back
        vae.latent_frames(5)
    raw = vae.encode(torch.zeros(1, 3, 8, 8, 8))[:, :4]
    assert raw.shape[2] == 2 and vae.decode(raw).shape[2] == 8


def test_two_videos_at_once(tiny):
    """diffusers gives the attention of HunyuanVideo 1.5 a mask that is wrong for two."""
    vae = tiny("AutoencoderKLHunyuanVideo15")[1]
    raw = torch.cat([raw_of("AutoencoderKLHunyuanVideo15", vae, 1, seed) for seed in (0, 1)])
    assert torch.equal(vae.decode(raw), torch.cat([vae.decode(raw[:1]), vae.decode(raw[1:])]))
    assert vae.encode(torch.zeros(2, 3, 5, 32, 32)).shape == (2, 8, 2, 2, 2)


def numbered(*shape):
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float32).reshape(shape)


def test_arrange_takes_what_callbacks_give(tiny):
    wan, cog, ltx = (tiny(f"AutoencoderKL{name}")[1] for name in ("Wan", "CogVideoX", "LTXVideo"))
    want = numbered(1, 4, 5, 3, 2)
    assert torch.equal(wan.arrange(want, None), want) and torch.equal(wan.arrange(want[0], (17, 24, 16)), want)
    stored = want.transpose(1, 2)
    assert torch.equal(cog.arrange(stored, None), want) and torch.equal(cog.arrange(stored[0], (17, 24, 16)), want)
    # CogVideoX 1.5 denoises an even number of latent frames, the first of which belongs to no video of 13 frames.
    assert torch.equal(cog.arrange(stored, (13, 24, 16)), want[:, :, 1:])
    svd = tiny("AutoencoderKLTemporalDecoder")[1]
    assert torch.equal(svd.arrange(stored, None), want)
    want = numbered(1, 8, 5, 3, 2)
    packed = want.permute(0, 2, 3, 4, 1).reshape(1, 30, 8)
    assert torch.equal(ltx.arrange(packed, (33, 96, 64)), want)
    assert torch.equal(ltx.arrange(packed[0], (33, 96, 64)), want)
    assert torch.equal(ltx.arrange(want, None), want)  # unpacked by who stored it


@pytest.mark.parametrize(
    "name, shape, size, says",
    [
        (
            "Wan",
            (2, 4, 5, 3, 4),
            None,
            r"one video of AutoencoderKLWan: \[1, C, t, h, w\] with C = 4.*\[2, 4, 5, 3, 4\]",
        ),
        ("Wan", (1, 16, 5, 3, 4), None, r"C = 4, .* got \[1, 16, 5, 3, 4\]"),
        ("Wan", (1, 5, 4, 3, 4), None, r"got \[1, 5, 4, 3, 4\]"),  # the order of CogVideoX
        ("Wan", (4, 3, 4), None, r"got \[4, 3, 4\]"),
        ("Wan", (1, 4, 0, 3, 4), None, r"got \[1, 4, 0, 3, 4\]"),
        ("CogVideoX", (1, 4, 5, 3, 2), None, r"\[1, t, C, h, w\] with C = 4.* got \[1, 4, 5, 3, 2\]"),
        ("LTXVideo", (1, 30, 8), None, "do not say how long, high and wide"),
        ("LTXVideo", (1, 31, 8), (33, 96, 64), r"33 frames of 64×96 are 5·3·2 = 30 latents; got \[1, 31, 8\]"),
        ("LTXVideo", (1, 30, 16), (33, 96, 64), r"C = 8, .*got \[1, 30, 16\]"),
        ("LTXVideo", (30,), (33, 96, 64), r"or packed as \[1, t·h·w, C\].* got \[30\]"),
    ],
)
def test_arrange_refuses_what_it_cannot_place(name, shape, size, says, tiny):
    with pytest.raises(ValueError, match=says):
        tiny(f"AutoencoderKL{name}")[1].arrange(torch.zeros(shape), size)


def test_wrong_shapes_are_refused(tiny):
    wan, allegro = tiny("AutoencoderKLWan")[1], tiny("AutoencoderKLAllegro")[1]
    with pytest.raises(ValueError, match=r"\[B, 4, t, h, w\], got \[1, 5, 2, 3, 4\]"):
        wan.decode(torch.zeros(1, 5, 2, 3, 4))
    with pytest.raises(ValueError, match=r"one video to stream, got \[2, 4"):
        wan.stream(torch.zeros(2, 4, 2, 3, 4))
    with pytest.raises(ValueError, match=r"pixels \[B, 3, T, H, W\], got \[1, 4, 5, 8, 8\]"):
        wan.encode(torch.zeros(1, 4, 5, 8, 8))
    with pytest.raises(ValueError, match="videos of 4·k . 1 frames, 5 or 9, got 6"):
        wan.encode(torch.zeros(1, 3, 6, 8, 8))
    with pytest.raises(ValueError, match="multiples of 8, got 12×8"):
        wan.encode(torch.zeros(1, 3, 5, 12, 8))
    # diffusers leaves black what its tiles of 24 frames do not cover: 28 = 24 + 4, and they advance by 16.
    with pytest.raises(ValueError, match="expected frames 24 . 16·k, got 28"):
        allegro.decode(torch.zeros(1, 4, 7, 16, 16))
    with pytest.raises(ValueError, match="expected width 128 . 48·k, got 136"):
        allegro.stream(torch.zeros(1, 4, 6, 16, 17))
    for name in TINY:
        vae = tiny(name)[1]
        assert vae.tiles == (name not in ("AutoencoderKLTemporalDecoder", "AutoencoderKLAllegro"))
        if not vae.tiles:
            with pytest.raises(ValueError, match=f"{name} has no choice of tiles in diffusers"):
                vae.stream(raw_of(name, vae), tiles=True)


def test_svd_decodes_groups_of_14_frames(tiny):
    folder, vae = tiny("AutoencoderKLTemporalDecoder")
    model = diffusers.AutoencoderKLTemporalDecoder.from_pretrained(folder).eval()
    raw = raw_of("AutoencoderKLTemporalDecoder", vae, frames=15)  # one more than a group
    with torch.no_grad():
        want = plain_decode("AutoencoderKLTemporalDecoder", model, raw)
    assert torch.equal(vae.decode(raw), want)
    assert [chunk.shape[1] for chunk in vae.stream(raw)] == [14, 1]
    assert torch.equal(vae.decode(torch.cat([raw, raw])), torch.cat([want, want]))


@pytest.mark.parametrize("device", DEVICES)
def test_ltx_draws_the_same_noise_each_time_and_none_of_the_programs(device, tiny):
    vae = load_video_autoencoder(tiny("LTX-0.9.1")[0], device, torch.float32)
    raw = raw_of("LTX-0.9.1", vae, frames=2)
    torch.manual_seed(5)
    before, on_device = torch.get_rng_state(), torch.cuda.get_rng_state() if device == "cuda" else None
    first = vae.decode(raw)
    assert torch.equal(torch.get_rng_state(), before)
    assert on_device is None or torch.equal(torch.cuda.get_rng_state(), on_device)
    torch.manual_seed(6)
    assert torch.equal(torch.cat(list(vae.stream(raw)), 1), first[0])
    torch.manual_seed(0)
    other = vae.model.decode(raw.to(device), torch.zeros(1, device=device)).sample
    torch.manual_seed(1)
    assert not torch.equal(vae.model.decode(raw.to(device), torch.zeros(1, device=device)).sample, other)


def test_identity_ignores_dtype_and_scaling_and_sees_weights(tiny, tmp_path):
    for name in ("AutoencoderKLWan", "AutoencoderKLLTXVideo", "AutoencoderKLHunyuanVideo"):
        folder, vae = tiny(name)
        changed = {"scaling_factor": 3.0, "latents_mean": [1.0] * vae.latent_channels}
        other = tmp_path / name
        other.mkdir()
        config = json.loads((folder / "config.json").read_text())
        (other / "config.json").write_text(json.dumps(config | {k: v for k, v in changed.items() if k in config}))
        stored = load_file(folder / WEIGHTS)
        if "latents_mean" in stored:
            stored["latents_mean"] = torch.ones_like(stored["latents_mean"])
        save_file(stored, other / WEIGHTS, {"format": "pt"})
        scaled = load_video_autoencoder(other, "cpu", torch.bfloat16)
        assert scaled.identity() == vae.identity() and vae.identity()["class"] == name
        assert scaled.normalization() != vae.normalization()
        key = next(key for key in stored if key.startswith("decoder"))
        stored[key] = stored[key] + 1
        save_file(stored, other / WEIGHTS, {"format": "pt"})
        assert load_video_autoencoder(other, "cpu", torch.float32).identity() != vae.identity()


@pytest.mark.parametrize("name", ["AutoencoderKLWan", "AutoencoderKLLTXVideo"])
def test_half_precision_rounds_the_weights_and_not_the_normalization(name, tiny):
    folder, vae = tiny(name)
    half = load_video_autoencoder(folder, "cpu", torch.bfloat16)
    raw = raw_of(name, vae, frames=2)
    assert half.normalization() == vae.normalization()
    assert torch.equal(half.denormalize(raw), vae.denormalize(raw))
    pixels, want = half.decode(raw), vae.decode(raw)
    assert pixels.dtype == torch.float32
    assert 0 < (pixels - want).abs().amax() < 0.2 * want.abs().amax()


def test_cosmos_reads_its_scale_from_the_scheduler_and_knows_16_latent_frames(tmp_path):
    folder = make_vae("AutoencoderKLCosmos", tmp_path / "vae")
    assert video_autoencoder_on_meta(folder, torch.float32).normalization()["factor"] == 0.5
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "scheduler_config.json").write_text('{"sigma_data": 1.0}')
    vae = video_autoencoder_on_meta(folder, torch.float32)
    assert vae.normalization()["factor"] == 1.0
    assert vae.denormalize(torch.zeros(1, 4, 16, 1, 1)).shape[2] == 16
    with pytest.raises(ValueError, match="statistics for 16 latent frames, and the latents have 17"):
        vae.denormalize(torch.zeros(1, 4, 17, 1, 1))


KL = {
    "block_out_channels": (8, 8), "norm_num_groups": 4, "latent_channels": 2,
    "down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2,
}  # fmt: skip
TAESD = {
    "encoder_block_out_channels": (8,) * 4, "decoder_block_out_channels": (8,) * 4, "num_encoder_blocks": (1,) * 4,
    "num_decoder_blocks": (1,) * 4, "latent_channels": 2,  # diffusers' tiles know the published 4 levels only
}  # fmt: skip
IMAGES = [
    ("AutoencoderKL", KL | {"scaling_factor": 0.25, "shift_factor": 0.5}, lambda z: z / 0.25 + 0.5),
    ("AutoencoderKL", KL | {"scaling_factor": 0.5, "latents_mean": [1.0, 2.0], "latents_std": [3.0, 4.0]},
     lambda z: z * torch.tensor([3.0, 4.0]).view(1, 2, 1, 1, 1) / 0.5 + torch.tensor([1.0, 2.0]).view(1, 2, 1, 1, 1)),
    ("AutoencoderKL", KL | {"scaling_factor": 0.18215}, lambda z: 1 / 0.18215 * z),  # AnimateDiff; not z / 0.18215
    ("AutoencoderTiny", TAESD, lambda z: z),
]  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("name, config, raw_from", IMAGES)
def test_image_autoencoders_decode_frame_by_frame(name, config, raw_from, tmp_path):
    torch.manual_seed(0)
    model = getattr(diffusers, name)(**config).eval()
    model.save_pretrained(tmp_path)
    vae = load_video_autoencoder(tmp_path, "cpu", torch.float32)
    side = 2 if name == "AutoencoderKL" else 8
    assert (vae.latent_channels, vae.time_stride, vae.downsample, vae.streams) == (2, 1, side, True)
    assert vae.frames(7) == vae.latent_frames(7) == 7
    z = torch.randn(1, 2, 3, 5, 4)
    raw = vae.denormalize(z)
    assert torch.equal(raw, raw_from(z))
    want = torch.stack([model.decode(raw[:, :, i]).sample for i in range(3)], 2)
    assert torch.equal(vae.decode(raw), want)
    chunks = list(vae.stream(raw))
    assert [chunk.shape[1] for chunk in chunks] == [1, 1, 1] and torch.equal(torch.cat(chunks, 1), want[0])
    # A sample's latents are one frame; those of a video come with or without the batch axis.
    for stored in (z, z[0]):
        assert torch.equal(vae.arrange(stored, None), z)
    assert torch.equal(vae.arrange(z[:, :, 0], None), z[:, :, :1])
    pixels = torch.rand(1, 3, 3, 2 * side, 3 * side) * 2 - 1
    assert vae.encode(pixels).shape == (1, 4 if vae.has_posterior else 2, 3, 2, 3)
    assert vae.tiles
    tiled = []
    for chunk in vae.stream(raw, tiles=True):
        assert not vae.model.use_tiling  # between two chunks, the model may be used for something else
        tiled.append(chunk)
    assert torch.cat(tiled, 1).shape == want[0].shape
    meta = video_autoencoder_on_meta(tmp_path, torch.float32)
    assert next(meta.stream(raw.to("meta"))).shape == (3, 1, 5 * side, 4 * side)


def test_unusable_folders(tiny, tmp_path):
    with pytest.raises(ValueError, match="got _class_name 'UNet2DModel'. Those of videos are AutoencoderKLAllegro"):
        (tmp_path / "config.json").write_text('{"_class_name": "UNet2DModel"}')
        video_autoencoder_on_meta(tmp_path, torch.float32)
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderKLFlux2"}')
    with pytest.raises(ValueError, match="AutoencoderKLFlux2 is not for frames of a video"):
        video_autoencoder_on_meta(tmp_path, torch.float32)
    with pytest.raises(ValueError, match="does not exist"):
        load_video_autoencoder(tmp_path / "nowhere", "cpu", torch.float32)
    folder = tiny("AutoencoderKLWan")[0]
    config = json.loads((folder / "config.json").read_text())
    stored = load_file(folder / WEIGHTS)
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(dict(list(stored.items())[1:]), tmp_path / WEIGHTS, {"format": "pt"})
    with pytest.raises(ValueError, match="does not fit its config.json: missing_keys"):
        load_video_autoencoder(tmp_path, "cpu", torch.float32)
    (tmp_path / "config.json").write_text(json.dumps(config | {"latents_mean": [0.0] * 3}))
    with pytest.raises(ValueError, match="latents_mean and latents_std of 4 channels .* got 3 and 4 numbers"):
        video_autoencoder_on_meta(tmp_path, torch.float32)


def test_every_video_class_is_pointed_to_from_the_image_commands():
    assert set(VIDEO_KINDS) <= set(REFUSED) and set(VIDEO_KINDS) == set(TINY)
    assert all("whose latents `fastlatent decode` decodes" in REFUSED[name] for name in VIDEO_KINDS)
