"""Frames of videos to latents, piece by piece, for the video autoencoders of diffusers.

`ENCODES[class name](model, take, frames)` gives [B, 2C, t, h, w] (or [B, C, t, h, w] of a class without a posterior) in
the model's dtype. `take(start, stop)` is asked for pixels [B, 3, n, H, W] of these frames, in [−1, 1], in the model's
dtype and on its device, when their turn comes: neither all pixels nor all activations are in memory at once.

The result is bit for bit what `model.encode` of diffusers gives with its defaults: the same calls, on pixels that are
made late. Only those classes go by pieces that diffusers itself encodes so (`ENCODE_TIMES`), and those that know no
time. The classes in `ENCODE_WHOLE` see all frames at once: Mochi, HunyuanVideo 1.5 and Cosmos attend over time, LTX's
causal convolutions over pieces are not bit-equal to those over the whole (oneDNN chooses its blocking by size).

Nothing is set on the model, which diffusers' own Wan and Allegro encodes do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastlatent.encoders.video_streaming import SVD_CHUNK, fade

Take = Callable[[int, int], Tensor]

# How each class goes through time, in a phrase.
ENCODE_TIMES: Mapping[str, str] = {
    "AutoencoderKLWan": "causal: 1 frame, then 4 at a time",
    "AutoencoderKLCogVideoX": "causal: 8 frames at a time, 9 first where one is left over",
    "AutoencoderKLHunyuanVideo": "up to 16 frames whole; else overlapping pieces of 17 frames, blended",
    "AutoencoderKLAllegro": "overlapping tiles of 24 frames, blended; one video at a time",
    "AutoencoderKLTemporalDecoder": "independent frames, 14 at a time",
    "AutoencoderKLMochi": "whole: attention over all frames in all but its first levels",
    "AutoencoderKLHunyuanVideo15": "whole: attention over all frames in its middle block; one video at a time",
    "AutoencoderKLCosmos": "whole: attention over all frames",
    "AutoencoderKLLTXVideo": "whole: diffusers has no pieces for it by default",
}
# Memory grows with the number of frames.
ENCODE_WHOLE = frozenset(name for name, how in ENCODE_TIMES.items() if how.startswith("whole"))

WAN_CHUNK = 4  # frames, whatever the strides; the first one is encoded alone


def encode_wan(model: Any, take: Take, frames: int) -> Tensor:
    """AutoencoderKLWan, 2.1 and 2.2: what its convolutions need of earlier frames is handed on."""
    cache: list[Any] = [None] * sum(isinstance(m, nn.Conv3d) for m in model.encoder.modules())
    patch, parts = model.config.get("patch_size"), []
    for start in (0, *range(1, frames, WAN_CHUNK)):
        x = take(start, start + WAN_CHUNK if start else 1)
        x = x if patch is None else _patches(x, patch)
        parts.append(model.encoder(x, feat_cache=cache, feat_idx=[0]))
        del x
    cache.clear()
    return model.quant_conv(torch.cat(parts, 2))  # over all frames, as in diffusers: over each it is rounded otherwise


def _patches(x: Tensor, patch: int) -> Tensor:
    """Wan 2.2: squares of pixels as channels, the column before the row."""
    b, c, n, h, w = x.shape
    x = x.view(b, c, n, h // patch, patch, w // patch, patch).permute(0, 1, 6, 4, 2, 3, 5)
    return x.reshape(b, c * patch * patch, n, h // patch, w // patch)


def encode_cogvideox(model: Any, take: Take, frames: int) -> Tensor:
    size, cache, parts = model.num_sample_frames_batch_size, None, []
    rest = frames % size
    for i in range(max(frames // size, 1)):
        part, cache = model.encoder(take(size * i + (rest if i else 0), size * (i + 1) + rest), conv_cache=cache)
        parts.append(part if model.quant_conv is None else model.quant_conv(part))
    return torch.cat(parts, 2)


def encode_hunyuan(model: Any, take: Take, frames: int) -> Tensor:
    """AutoencoderKLHunyuanVideo. Its GroupNorms take means over a piece: the pieces are part of the definition."""
    size, stride = model.tile_sample_min_num_frames, model.tile_sample_stride_num_frames
    if frames <= size:
        return model.quant_conv(model.encoder(take(0, frames)))
    ratio = model.temporal_compression_ratio
    keep, blend = stride // ratio, size // ratio - stride // ratio
    parts: list[Tensor] = []
    end: Tensor | None = None
    for start in range(0, frames, stride):
        if start and start + 1 >= frames:  # one frame, whose only latent frame is dropped
            break
        part = model.quant_conv(model.encoder(take(start, start + size + 1)))
        if end is not None:
            part = model.blend_t(end, part[:, :, 1:], blend)  # with the last piece after its own blending
        parts.append(part[:, :, : keep + (end is None)].clone())
        end = part[:, :, -blend:].clone()
        del part
    return torch.cat(parts, 2)[:, :, : (frames - 1) // ratio + 1]


def encode_allegro(model: Any, take: Take, frames: int) -> Tensor:
    """AutoencoderKLAllegro: tiles in time and space, summed up with linear fades; it has no other way."""
    time, space = model.config.temporal_compression_ratio, model.spatial_compression_ratio
    scale = (time, space, space)
    overlap = [(k - s) // r for k, s, r in zip(model.kernel, model.stride, scale, strict=True)]
    span, high, wide = model.kernel
    latents: Tensor | None = None
    for start in range(0, frames - span + 1, model.stride[0]):
        pixels = take(start, start + span)
        height, width = pixels.shape[3:]
        counts = [(n - k) // s + 1 for n, k, s in zip((frames, height, width), model.kernel, model.stride, strict=True)]
        if latents is None:
            shape = (len(pixels), 2 * model.config.latent_channels, frames // time, height // space, width // space)
            latents = pixels.new_zeros(shape)
        for y in range(0, height - high + 1, model.stride[1]):
            for x in range(0, width - wide + 1, model.stride[2]):
                at = [n // s for n, s in zip((start, y, x), model.stride, strict=True)]
                begin = [n // r for n, r in zip((start, y, x), scale, strict=True)]
                for row, video in enumerate(pixels.split(1)):
                    part = model.encoder(video[..., y : y + high, x : x + wide].contiguous())
                    for dim, index, count, lap in zip((2, 3, 4), at, counts, overlap, strict=True):
                        fade(part, dim, index, count, lap)
                    place = latents[row : row + 1]
                    for dim, first in zip((2, 3, 4), begin, strict=True):
                        place = place.narrow(dim, first, part.shape[dim])
                    place += part
                    del part
        del pixels
    assert latents is not None  # shorter videos are refused before
    return torch.stack([model.quant_conv(video.transpose(0, 1)).transpose(0, 1) for video in latents])


def encode_temporal_decoder(model: Any, take: Take, frames: int) -> Tensor:
    """AutoencoderKLTemporalDecoder encodes images; as many at a time as Stable Video Diffusion decodes."""
    parts = []
    for start in range(0, frames, SVD_CHUNK):
        videos = take(start, start + SVD_CHUNK).transpose(1, 2)
        parts.append(torch.stack([_encode(model, images).transpose(0, 1) for images in videos]))
        del videos
    return torch.cat(parts, 2)


def encode_whole(model: Any, take: Take, frames: int) -> Tensor:
    return _encode(model, take(0, frames))


def encode_one_by_one(model: Any, take: Take, frames: int) -> Tensor:
    """The mask of the attention of HunyuanVideo 1.5 is wrong for two videos at once."""
    return torch.cat([_encode(model, video) for video in take(0, frames).split(1)])


def _encode(model: Any, pixels: Tensor) -> Tensor:
    return model.encode(pixels, return_dict=False)[0].parameters


ENCODES: Mapping[str, Callable[[Any, Take, int], Tensor]] = {
    "AutoencoderKLWan": encode_wan,
    "AutoencoderKLCogVideoX": encode_cogvideox,
    "AutoencoderKLHunyuanVideo": encode_hunyuan,
    "AutoencoderKLAllegro": encode_allegro,
    "AutoencoderKLTemporalDecoder": encode_temporal_decoder,
    "AutoencoderKLMochi": encode_whole,
    "AutoencoderKLHunyuanVideo15": encode_one_by_one,
    "AutoencoderKLCosmos": encode_whole,
    "AutoencoderKLLTXVideo": encode_whole,
}
