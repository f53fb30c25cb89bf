"""Video autoencoders as encoders of clips: against diffusers' own encode bit for bit, memory, what they refuse."""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from tiny_video_models import TINY, VARIANTS, make_vae
from torch import Tensor

from fastlatent.encoders import video_clips
from fastlatent.encoders.clip_protocol import ClipEncoder
from fastlatent.encoders.decode_memory import peak_bytes
from fastlatent.encoders.video_autoencoders import load_video_autoencoder, video_autoencoder_on_meta
from fastlatent.encoders.video_clips import VideoClipEncoder, is_video_model, load_video_clip_encoder
from fastlatent.encoders.video_encode_streaming import ENCODE_TIMES, ENCODE_WHOLE, ENCODES

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.needs_cuda)]
KL = {
    "block_out_channels": (8, 8), "norm_num_groups": 4, "latent_channels": 2,
    "down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2,
}  # fmt: skip
ONE_AT_A_TIME = ("AutoencoderKLHunyuanVideo15", "AutoencoderKLAllegro")  # diffusers fails with two videos


def class_of(name: str) -> str:
    return VARIANTS[name][0] if name in VARIANTS else name


def small_tiles(name: str, model: Any) -> Any:
    if name == "AutoencoderKLAllegro":  # the published overlaps are larger than a tiny tile
        model.kernel, model.stride = (24, 32, 32), (16, 16, 24)
    return model


def payload_of(name: str) -> str:
    return "latents" if name == "AutoencoderKLCosmos" else "moments"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """name -> (folder, encoder, the model of diffusers alone), made once."""

    @functools.cache
    def make(name: str) -> tuple[Path, VideoClipEncoder, Any]:
        folder = make_vae(name, tmp_path_factory.mktemp("models") / name)
        vae = load_video_autoencoder(folder, "cpu", torch.float32)
        small_tiles(name, vae.model)
        # Without gradients: torch chooses other kernels for weights that require them, whatever the mode.
        model = getattr(diffusers, class_of(name)).from_pretrained(folder).eval().requires_grad_(False)
        return folder, VideoClipEncoder(vae, payload=payload_of(name)), small_tiles(name, model)

    return make


def clips_of(frames: int, height: int, width: int, batch: int = 1, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (batch, frames, height, width, 3), dtype=torch.uint8, generator=draw)


@torch.inference_mode()
def plain_encode(name: str, model: Any, clips: Tensor) -> Tensor:
    """What one writes with diffusers alone."""
    pixels = clips.permute(0, 4, 1, 2, 3).contiguous().float() / 127.5 - 1
    if name == "AutoencoderKLTemporalDecoder":  # an encoder of images: groups of 14, as its pipeline decodes
        videos = [
            torch.cat([model.encode(p).latent_dist.parameters for p in v.transpose(0, 1).split(14)]) for v in pixels
        ]
        return torch.stack(videos).transpose(1, 2)
    if name == "AutoencoderKLAllegro":
        model.enable_tiling()
    parts = pixels.split(1) if name in ONE_AT_A_TIME else [pixels]
    return torch.cat([model.encode(part).latent_dist.parameters for part in parts])


# 1: no second piece. The next: two. The last: pieces that follow a piece that has followed one.
LENGTHS: dict[str, tuple[int, ...]] = {
    "AutoencoderKLWan": (1, 5, 13),
    "Wan2.2": (1, 5, 13),
    "AutoencoderKLCogVideoX": (1, 8, 9, 17, 24),  # 8 and 24: no first frame alone
    # 13: in one piece. 17: the first that is not. 25: the last piece is one frame, which adds nothing. 41: blended with
    # what was blended.
    "AutoencoderKLHunyuanVideo": (1, 13, 17, 25, 41),
    "AutoencoderKLAllegro": (40,),
    "AutoencoderKLTemporalDecoder": (1, 15),
    "AutoencoderKLMochi": (1, 13),
    "AutoencoderKLHunyuanVideo15": (1, 9),
    "AutoencoderKLCosmos": (1, 17),
    "AutoencoderKLLTXVideo": (1, 17),
}


def side(name: str, encoder: VideoClipEncoder) -> tuple[int, int]:
    step = encoder.size_multiple
    return (48, 56) if name == "AutoencoderKLAllegro" else (2 * step, 3 * step)  # Allegro: two tiles each way


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("name", "frames"), [(name, n) for name, lengths in LENGTHS.items() for n in lengths])
def test_rows_are_what_diffusers_encodes(name: str, frames: int, device: str, tiny: Any) -> None:
    folder, encoder, model = tiny(name)
    if device == "cuda":
        encoder = VideoClipEncoder(load_video_autoencoder(folder, device, torch.float32), payload=payload_of(name))
        small_tiles(name, encoder.autoencoder.model)
        model = small_tiles(name, type(model).from_pretrained(folder).eval().requires_grad_(False).to(device))
    height, width = side(name, encoder)
    for batch in (2,) if name in ONE_AT_A_TIME else (1, 2):
        clips = clips_of(frames, height, width, batch, seed=frames)
        rows = encoder.encode_clips(clips)
        want = plain_encode(name, model, clips.to(device))
        assert rows.dtype == torch.float32 and rows.device.type == device
        assert rows.shape == (batch, *encoder.row_shape(frames, height, width))
        if device == "cpu":
            assert torch.equal(rows, want)
            assert name in ONE_AT_A_TIME or torch.equal(encoder.encode(encoder.prepare(clips)), rows)
        else:  # the same calls, but cuDNN may choose another algorithm the second time
            torch.testing.assert_close(rows, want, rtol=0, atol=1e-3)


def test_pixels_are_prepared_exactly_and_in_order(tiny: Any) -> None:
    encoder = tiny("AutoencoderKLWan")[1]
    clips = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16, 1).repeat(1, 2, 1, 1, 3)
    clips[:, 1] += 1
    clips[..., 2] += 3
    pixels = encoder.prepare(clips)
    assert pixels.shape == (1, 3, 2, 16, 16) and pixels.dtype == torch.float32 and pixels.is_contiguous()
    assert torch.equal(pixels[0, 2, 1].flatten(), (torch.arange(4, 260) % 256).float() / 127.5 - 1)
    assert torch.equal(pixels[0, 0, 0].flatten(), torch.arange(256).float() / 127.5 - 1)
    for wrong in (clips.float(), clips[0], clips[..., :1], clips[:, :0]):
        with pytest.raises(ValueError, match=r"expected uint8 clips \[B, T, H, W, 3\], got torch"):
            encoder.prepare(wrong)
        with pytest.raises(ValueError, match=r"expected uint8 clips \[B, T, H, W, 3\], got torch"):
            encoder.encode_clips(wrong)


# Frames of two lengths, the second about four times the first, and several pieces in both.
LONGER = {
    "AutoencoderKLWan": (17, 65), "Wan2.2": (17, 65), "AutoencoderKLCogVideoX": (17, 65),
    "AutoencoderKLHunyuanVideo": (41, 161), "AutoencoderKLAllegro": (40, 152),
    "AutoencoderKLTemporalDecoder": (28, 112), "AutoencoderKLMochi": (13, 49), "AutoencoderKLHunyuanVideo15": (9, 33),
    "AutoencoderKLCosmos": (17, 65), "AutoencoderKLLTXVideo": (17, 65),
}  # fmt: skip


@pytest.mark.parametrize("name", LONGER)
def test_memory_does_not_grow_with_time_where_the_class_goes_by_pieces(name: str, tiny: Any) -> None:
    vae = video_autoencoder_on_meta(tiny(name)[0], torch.float32)
    small_tiles(name, vae.model)
    encoder = VideoClipEncoder(vae, payload=payload_of(name))
    height, width = side(name, encoder)
    peaks = []
    for frames in LONGER[name]:
        clips = torch.empty(1, frames, height, width, 3, dtype=torch.uint8, device="meta")
        peaks.append(peak_bytes(functools.partial(encoder.encode_clips, clips)))
        # What it returns has to grow: joined, with its log-variances cut off, and before that.
        peaks[-1] -= 3 * 4 * math.prod(encoder.row_shape(frames, height, width))
    if class_of(name) in ENCODE_WHOLE:
        assert peaks[1] > 2 * peaks[0]
    else:
        assert peaks[1] < 1.1 * peaks[0]


def test_every_class_is_named() -> None:
    assert set(ENCODES) == set(ENCODE_TIMES) == set(TINY)
    assert set(map(class_of, LONGER)) == set(map(class_of, LENGTHS)) == set(TINY)


@pytest.mark.parametrize(
    ("name", "size", "says"),
    [
        ("AutoencoderKLWan", (6, 16, 16), "videos of 4·k . 1 frames, 5 or 9, got 6"),
        ("AutoencoderKLWan", (0, 16, 16), "1 or 5, got 0"),
        ("AutoencoderKLWan", (5, 20, 21), "multiples of 8, got 20×21; the nearest are 16×24"),
        ("AutoencoderKLWan", (5, 3, 16), "got 3×16; the nearest are 8×16"),
        ("AutoencoderKLCogVideoX", (7, 16, 16), "8·k or 8·k . 1 frames, 8 or 9, got 7"),
        ("AutoencoderKLAllegro", (28, 48, 56), "expected frames 24 . 16·k, got 28; the nearest is 24"),
        (
            "AutoencoderKLAllegro",
            (41, 48, 56),
            "expected frames 24 . 16·k, got 41; the nearest is 40",
        ),  # not 44, of 4·k
        ("AutoencoderKLAllegro", (24, 48, 72), "expected width 32 . 24·k, got 72; the nearest is 80"),
        ("AutoencoderKLAllegro", (4, 48, 56), "expected frames 24 . 16·k, got 4; the nearest is 24"),
    ],
)
def test_wrong_lengths_and_sizes_are_refused_with_the_nearest(
    name: str, size: tuple[int, int, int], says: str, tiny: Any
) -> None:
    encoder = tiny(name)[1]
    with pytest.raises(ValueError, match=says):
        encoder.row_shape(*size)
    if size[0]:
        with pytest.raises(ValueError, match=says):
            encoder.encode_clips(clips_of(*size))
        with pytest.raises(ValueError, match=says):
            encoder.encode(encoder.prepare(clips_of(*size)))


def test_payloads(tiny: Any) -> None:
    encoder = tiny("AutoencoderKLWan")[1]
    assert (encoder.payload, encoder.size_multiple, encoder.clip) == ("moments", 8, None)
    means: ClipEncoder = VideoClipEncoder(encoder.autoencoder, payload="latents")
    clips = clips_of(5, 16, 16)
    rows = means.encode(means.prepare(clips))
    assert rows.shape[1:] == means.row_shape(5, 16, 16) == (4, 2, 2, 2)
    assert torch.equal(rows, encoder.encode_clips(clips)[:, :4])
    cosmos = tiny("AutoencoderKLCosmos")[1].autoencoder
    with pytest.raises(ValueError, match="AutoencoderKLCosmos encodes to latents.* use --payload latents"):
        VideoClipEncoder(cosmos)
    with pytest.raises(ValueError, match="a payload of moments or latents, got 'tokens'"):
        VideoClipEncoder(cosmos, payload="tokens")
    with pytest.raises(ValueError, match="no engine compiles: use --engine eager"):
        encoder.encoder()


def test_log_variances_are_cut_off_as_in_diffusers(tmp_path: Path) -> None:
    encoder = VideoClipEncoder(load_video_autoencoder(make_vae("AutoencoderKLWan", tmp_path), "cpu", torch.float32))
    encoder.autoencoder.model.quant_conv.bias[4:] = torch.tensor([100.0, -100.0, 20.0, -30.0])
    clips = clips_of(1, 16, 16)
    rows = encoder.encode_clips(clips)
    with torch.inference_mode():
        want = encoder.autoencoder.model.encode(encoder.prepare(clips)).latent_dist
    assert torch.equal(rows, torch.cat([want.mean, want.logvar], 1)) and rows[:, 4].unique().tolist() == [20.0]


@pytest.mark.parametrize("name", ["AutoencoderKLWan", "AutoencoderKLCogVideoX", "AutoencoderKLTemporalDecoder"])
def test_rows_are_raw_and_decode_to_the_clips_size(name: str, tiny: Any) -> None:
    encoder = tiny(name)[1]
    vae, (height, width) = encoder.autoencoder, side(name, encoder)
    frames = LENGTHS[name][-1]
    raw = encoder.encode_clips(clips_of(frames, height, width))[:, : vae.latent_channels]
    assert vae.latent_frames(frames) == raw.shape[2] and vae.frames(raw.shape[2]) == frames
    whole = vae.decode(raw)
    assert whole.shape == (1, 3, frames, height, width)
    assert torch.equal(torch.cat(list(vae.stream(raw)), 1), whole[0])


def test_upcast_has_the_files_own_weights(tmp_path: Path) -> None:
    clips = clips_of(5, 16, 16)
    image = tmp_path / "image"
    torch.manual_seed(0)
    diffusers.AutoencoderKL(**KL).save_pretrained(image)
    for folder in (make_vae("AutoencoderKLWan", tmp_path / "video"), image):
        want = load_video_clip_encoder(str(folder), "cpu", torch.float32)
        half = load_video_clip_encoder(str(folder), "cpu", torch.bfloat16, "latents")
        rows = half.encode_clips(clips)
        assert rows.dtype == torch.float32 and half.identity() == want.identity()
        full = half.upcast()
        assert full.payload == "latents" and full.autoencoder.model.dtype == torch.float32
        assert torch.equal(full.encode_clips(clips), want.encode_clips(clips)[:, : rows.shape[1]])
        off = (rows - full.encode_clips(clips)).abs().max()
        assert 0 < off < 0.1 * rows.abs().max()
    make_vae("AutoencoderKLWan", tmp_path / "video", seed=1)
    encoder = load_video_clip_encoder(str(tmp_path / "video"), "cpu", torch.bfloat16)
    make_vae("AutoencoderKLWan", tmp_path / "video", seed=2)
    with pytest.raises(ValueError, match="its files changed since they were loaded"):
        encoder.upcast()


def test_image_autoencoders_encode_frame_by_frame(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = diffusers.AutoencoderKL(**KL).eval().requires_grad_(False)
    model.save_pretrained(tmp_path / "rgb")
    encoder = load_video_clip_encoder(str(tmp_path / "rgb"), "cpu", torch.float32)
    clips = clips_of(3, 4, 6, batch=2)
    rows = encoder.encode_clips(clips)
    assert rows.shape == (2, *encoder.row_shape(3, 4, 6)) == (2, 4, 3, 2, 3)
    with torch.inference_mode():
        for i, frame in enumerate(encoder.prepare(clips).unbind(2)):
            assert torch.equal(rows[:, :, i], model.encode(frame).latent_dist.parameters)
    meta = VideoClipEncoder(video_autoencoder_on_meta(tmp_path / "rgb", torch.float32))
    one, long = (torch.empty(1, n, 32, 32, 3, dtype=torch.uint8, device="meta") for n in (2, 8))
    assert peak_bytes(lambda: meta.encode_clips(long)) < 1.1 * peak_bytes(lambda: meta.encode_clips(one))
    diffusers.AutoencoderKL(**KL, in_channels=1, out_channels=1).save_pretrained(tmp_path / "grey")
    with pytest.raises(
        ValueError, match="clips are RGB: expected an autoencoder of 3 channels, got AutoencoderKL of 1"
    ):
        load_video_clip_encoder(str(tmp_path / "grey"), "cpu", torch.float32)


def test_which_folders_hold_video_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def config(folder: str, name: str) -> str:
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "config.json").write_text(json.dumps({"_class_name": name}))
        return str(tmp_path / folder)

    assert is_video_model(config("wan", "AutoencoderKLWan")) and is_video_model(config("svd/vae", "AutoencoderKLMochi"))
    assert is_video_model(str(tmp_path / "svd"))
    assert not is_video_model(config("image", "AutoencoderKL"))
    assert not is_video_model(str(tmp_path / "wan" / "config.json")) and not is_video_model(str(tmp_path / "nowhere"))
    assert not is_video_model(str(tmp_path))
    asked = []

    def found(name: str, *, near: Path) -> Path:
        asked.append(name)
        return tmp_path / "wan"

    monkeypatch.setattr(video_clips, "find_vae", found)
    assert is_video_model("owner/Model-2.1") and asked == ["owner/Model-2.1"]
    assert not is_video_model("model") and not is_video_model("../a/b") and len(asked) == 1  # no ids: no network
    monkeypatch.chdir(tmp_path)
    assert is_video_model("svd/vae") and len(asked) == 1  # a folder here comes first
