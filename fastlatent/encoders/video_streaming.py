"""Latents of one video to its frames, chunk by chunk, for the video autoencoders of diffusers.

`STREAMS[class name](model, z, tiles=False)` iterates over pixels [1, 3, n, H, W] of raw latents z [1, C, t, h, w].
Joined along time they are bit for bit what `model.decode` of diffusers gives with its defaults: the same calls, handed
out early. `TIMES` says how each class goes through time. The classes in `WHOLE` come in one piece, because diffusers
decodes them so: their convolutions are causal (LTX's are not), but a convolution over 3 frames is not bit-equal to that
part of one over 60. oneDNN chooses its blocking by size; we measured differences of 1e-6 of the pixels' range.

`tiles=True` is for when memory is short, and sets nothing on the model: tiles in space as after `enable_tiling()`, and
time in chunks for the classes in `WHOLE` too (LTX: diffusers' own tiles in time; the others: `CausalCache`, which gives
the values of diffusers up to rounding). See `video_tiles`.

Iterating leaves nothing behind: caches belong to the iterator and go when it ends, is closed or is dropped. Between two
chunks the model may be used for something else, by the same thread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastlatent.encoders.causal_cache import CausalCache
from fastlatent.encoders.video_tiles import Grid, grid_of, overlapping_grid, stream_grid, stream_time_tiles

# How each class goes through time, in a phrase.
TIMES: Mapping[str, str] = {
    "AutoencoderKLWan": "causal: one latent frame at a time",
    "AutoencoderKLCogVideoX": "causal: two latent frames at a time",
    "AutoencoderKLHunyuanVideo": "overlapping pieces of 5 latent frames, blended",
    "AutoencoderKLAllegro": "overlapping pieces of 6 latent frames, blended",
    "AutoencoderKLTemporalDecoder": "independent groups of 14 frames",
    "AutoencoderKLMochi": "whole; with tiles: one latent frame at a time",
    "AutoencoderKLHunyuanVideo15": "whole; with tiles: attention over all frames, then one latent frame at a time",
    "AutoencoderKLCosmos": "whole; with tiles: attention over all frames, then one latent frame at a time",
    "AutoencoderKLLTXVideo": "whole, it looks ahead; with tiles: overlapping pieces of 3 latent frames, blended",
}
# Memory grows with the number of frames, without tiles.
WHOLE = frozenset({"AutoencoderKLMochi", "AutoencoderKLHunyuanVideo15", "AutoencoderKLCosmos", "AutoencoderKLLTXVideo"})
UNTILED = frozenset({"AutoencoderKLTemporalDecoder"})  # diffusers has no tiles for it: `tiles=True` is a ValueError

SVD_CHUNK = 14  # decode_chunk_size's default in StableVideoDiffusionPipeline.decode_latents


class WanStep(nn.Module):
    """The steady step of a Wan decode, third latent frame on: a function of tensors, for torch.compile and AOTInductor.

    forward(z [1, C, 1, h, w] after post_quant_conv, caches) -> (pixels [1, 3, 4, H, W] in [−1, 1], new caches), where
    caches are the two last frames that each causal convolution of the decoder has seen, in the order of execution. All
    are contiguous, and a compiled step may rely on it.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.decoder = model.decoder
        self.patch = model.config.get("patch_size")

    def forward(self, z: Tensor, caches: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        cache: list[Tensor | str | None] = list(caches)
        pixels = self.decoder(z, feat_cache=cache, feat_idx=[0])
        return _wan_pixels(pixels, self.patch), [held.contiguous() for held in cache if isinstance(held, Tensor)]


def wan_step(model: Any) -> WanStep:
    """The module that `stream_wan` calls from the third latent frame on; compile or export it and pass it as `step`."""
    return WanStep(model)


def _wan_pixels(pixels: Tensor, patch: int | None) -> Tensor:
    if patch is not None:
        b, c, n, h, w = pixels.shape
        c //= patch * patch
        pixels = pixels.view(b, c, patch, patch, n, h, w).permute(0, 1, 4, 5, 3, 6, 2)
        pixels = pixels.reshape(b, c, n, h * patch, w * patch)
    return pixels.clamp(-1.0, 1.0)


def _wan_frames(
    model: Any, frames: Iterable[Tensor], step: Callable[..., Any] | None, finish: Callable[[Tensor], Tensor]
) -> Iterator[Tensor]:
    """frames: latents [1, C, 1, h, w] after post_quant_conv, one at a time."""
    # Every convolution keeps at most one entry; those that keep none (1×1×1 shortcuts) leave theirs None at the end.
    cache: list[Any] = [None] * sum(isinstance(m, nn.Conv3d) for m in model.decoder.modules())
    # Only the residual decoder (2.2) treats the first chunk differently, and older diffusers know no such argument.
    first = {"first_chunk": True} if model.config.get("is_residual") else {}
    for i, frame in enumerate(frames):
        if i >= 2 and step is not None:
            # Contiguous, as compiled code may take the strides of its examples for granted: the frame is a slice.
            pixels, cache = step(frame.contiguous(), [held.contiguous() for held in cache if held is not None])
        else:
            pixels = finish(model.decoder(frame, feat_cache=cache, feat_idx=[0], **({} if i else first)))
        yield pixels
        del pixels  # else it would be held while the next chunk is made


@torch.no_grad()
def stream_wan(
    model: Any, z: Tensor, *, tiles: bool = False, step: Callable[..., Any] | None = None
) -> Iterator[Tensor]:
    """AutoencoderKLWan, 2.1 and 2.2: 1 frame, then 4 for each latent frame.

    step: a compiled `wan_step(model)`, called from the third latent frame on, where its caches have their final shapes;
    the bits are then the compiler's. Tiles are decoded without it: their sizes differ at the edges.
    """
    patch = model.config.get("patch_size")
    grid = grid_of(model, z, patch or 1) if tiles else None
    # As in diffusers: post_quant_conv over all frames of the whole, and over each of a tile. The roundings differ.
    if grid is None:
        frames = model.post_quant_conv(z).split(1, 2)
        yield from _wan_frames(model, frames, step, lambda pixels: _wan_pixels(pixels, patch))
        return

    def tiled(tile: Tensor) -> Iterator[Tensor]:
        return _wan_frames(model, map(model.post_quant_conv, tile.split(1, 2)), None, lambda pixels: pixels)

    for pixels in stream_grid(model, z, grid, tiled):
        yield _wan_pixels(pixels, patch)


def _cogvideox_frames(model: Any, z: Tensor) -> Iterator[Tensor]:
    size = model.num_latent_frames_batch_size
    rest, cache = z.shape[2] % size, None
    for i in range(max(z.shape[2] // size, 1)):  # the frames that are left over go with the first batch
        part = z[:, :, size * i + (rest if i else 0) : size * (i + 1) + rest]
        if model.post_quant_conv is not None:
            part = model.post_quant_conv(part)
        pixels, cache = model.decoder(part, conv_cache=cache)
        yield pixels
        del pixels


@torch.no_grad()
def stream_cogvideox(model: Any, z: Tensor, *, tiles: bool = False) -> Iterator[Tensor]:
    """AutoencoderKLCogVideoX: 8 frames a chunk, 9 first where the number of latent frames is odd."""
    overlap = (model.tile_overlap_factor_height, model.tile_overlap_factor_width)
    yield from _in_grid(model, z, overlapping_grid(model, z, overlap) if tiles else None, _cogvideox_frames)


def _mochi_frames(model: Any, z: Tensor) -> Iterator[Tensor]:
    cache = CausalCache(model.decoder)
    drop = model.temporal_compression_ratio - 1 if getattr(model, "drop_last_temporal_frames", True) else 0
    for i in range(z.shape[2]):
        with cache.installed():
            pixels = model.decoder(z[:, :, i : i + 1])[0][:, :, 0 if i else drop :]
        yield pixels
        del pixels


@torch.no_grad()
def stream_mochi(model: Any, z: Tensor, *, tiles: bool = False) -> Iterator[Tensor]:
    """AutoencoderKLMochi: in one piece; with tiles 1 frame, then 6 for each latent frame.

    Its norms are per frame and its decoder has no attention: all of it can go on where the last chunk ended.
    """
    if tiles:
        yield from _in_grid(model, z, grid_of(model, z), _mochi_frames)
    else:
        yield model.decode(z, return_dict=False)[0]


@torch.no_grad()
def stream_hunyuan(model: Any, z: Tensor, *, tiles: bool = False) -> Iterator[Tensor]:
    """AutoencoderKLHunyuanVideo: 13 frames, then 12 at a time; up to 4 latent frames (13 frames) in one piece.

    Its GroupNorms take means over all frames of a piece, so these pieces are part of the definition.
    """

    def piece(part: Tensor) -> Tensor:
        if tiles and grid_of(model, part) is not None:
            return model.tiled_decode(part, return_dict=False)[0]
        return model.decoder(model.post_quant_conv(part))

    if z.shape[2] > model.tile_sample_min_num_frames // model.temporal_compression_ratio:
        yield from stream_time_tiles(model, z, piece, keep=slice(1, None))
    else:
        yield piece(z)


@torch.no_grad()
def stream_ltx(model: Any, z: Tensor, *, tiles: bool = False, temb: Tensor | None = None) -> Iterator[Tensor]:
    """AutoencoderKLLTXVideo: in one piece; with tiles as with `use_tiling` and `use_framewise_decoding` set.

    temb: the decode time step [1], for models with timestep_conditioning.
    """

    def piece(part: Tensor) -> Tensor:
        if tiles and grid_of(model, part) is not None:
            return model.tiled_decode(part, temb, return_dict=False)[0]
        return model.decoder(part, temb)

    if tiles and z.shape[2] > model.tile_sample_min_num_frames // model.temporal_compression_ratio:
        yield from stream_time_tiles(model, z, piece, keep=slice(None, -1))
    else:
        yield piece(z)


def _hunyuan15_frames(model: Any, z: Tensor) -> Iterator[Tensor]:
    decoder = model.decoder
    x = decoder.mid_block(decoder.conv_in(z) + z.repeat_interleave(decoder.repeat, dim=1))
    cache = CausalCache(decoder.up_blocks, decoder.conv_out)
    for i in range(x.shape[2]):
        pixels = x[:, :, i : i + 1]
        with cache.installed():
            for block in decoder.up_blocks:
                pixels = block(pixels)
            pixels = decoder.conv_out(decoder.conv_act(decoder.norm_out(pixels)))
        yield pixels
        del pixels


@torch.no_grad()
def stream_hunyuan15(model: Any, z: Tensor, *, tiles: bool = False) -> Iterator[Tensor]:
    """AutoencoderKLHunyuanVideo15: in one piece; with tiles 1 frame, then 4 for each latent frame.

    The middle block's attention sees all earlier frames, so it runs over all of them at once, at latent size (1/16), as
    in diffusers, which makes a mask of [t·h·w]² values: 2.6 GB for 61 frames of 848×480, 67 MB for a tile of them.
    """
    if not tiles:
        yield model.decode(z, return_dict=False)[0]
        return
    overlap = (model.tile_overlap_factor, model.tile_overlap_factor)
    yield from _in_grid(model, z, overlapping_grid(model, z, overlap), _hunyuan15_frames)


def _cosmos_frames(model: Any, z: Tensor) -> Iterator[Tensor]:
    # What attends over time runs over all frames, at latent size: the middle block, and with it every block up to the
    # last one that has attention. Published models have none above the middle block.
    decoder = model.decoder
    blocks = list(decoder.up_blocks)
    cut = max((i + 1 for i, block in enumerate(blocks) if any(a is not None for a in block.temp_attentions)), default=0)
    x = decoder.mid_block(decoder.conv_in(model.post_quant_conv(z)))
    for block in blocks[:cut]:
        x = block(x)
    rate = (x.shape[2] - 1) // max(z.shape[2] - 1, 1)  # frames of x for each latent frame after the first
    cache = CausalCache(*blocks[cut:], decoder.conv_out)
    for i in range(z.shape[2]):
        pixels = x[:, :, rate * (i - 1) + 1 : rate * i + 1] if i else x[:, :, :1]
        with cache.installed():
            for block in blocks[cut:]:
                pixels = block(pixels)
            pixels = decoder.conv_out(nn.functional.silu(decoder.norm_out(pixels)))
        # Unpatching works frame by frame, and drops all but one of those that the first one makes: give it one more.
        if i:
            yield decoder.unpatch_embed(torch.cat([pixels[:, :, :1], pixels], 2))[:, :, 1:]
        else:
            yield decoder.unpatch_embed(pixels)
        del pixels


@torch.no_grad()
def stream_cosmos(model: Any, z: Tensor, *, tiles: bool = False) -> Iterator[Tensor]:
    """AutoencoderKLCosmos: in one piece; with tiles 1 frame, then 8 for each latent frame.

    diffusers has the switch for tiles in space and ignores it, and so do we: `tiles` is the whole decode, in chunks.
    """
    if tiles:
        yield from _cosmos_frames(model, z)
    else:
        yield model.decode(z, return_dict=False)[0]


@torch.no_grad()
def stream_temporal_decoder(model: Any, z: Tensor, *, tiles: bool = False) -> Iterator[Tensor]:
    """AutoencoderKLTemporalDecoder: groups of 14 frames, as StableVideoDiffusionPipeline.decode_latents makes them."""
    if tiles:
        raise ValueError(
            "AutoencoderKLTemporalDecoder cannot be decoded in tiles: diffusers has none for it. Decode without tiles, "
            "on a device with more memory or the CPU, or with dtype bfloat16"
        )
    for part in z[0].transpose(0, 1).split(SVD_CHUNK):
        yield model.decode(part, num_frames=part.shape[0], return_dict=False)[0].transpose(0, 1)[None]


@torch.no_grad()
def stream_allegro(model: Any, z: Tensor, *, tiles: bool = True) -> Iterator[Tensor]:
    """AutoencoderKLAllegro: 16 frames at a time and the rest; diffusers decodes it in tiles only.

    What its tiles do not cover stays zero, as in diffusers: the published sizes cover t = 6 + 4k, h = 40 + 25k and
    w = 40 + 30k latents. `model.decode` of diffusers returns [B, T, C, H, W].
    """
    time, space = model.config.temporal_compression_ratio, model.spatial_compression_ratio
    scale = (time, space, space)
    kernel = [k // s for k, s in zip(model.kernel, scale, strict=True)]
    stride = [k // s for k, s in zip(model.stride, scale, strict=True)]
    overlap = [k - s for k, s in zip(model.kernel, model.stride, strict=True)]
    z = model.post_quant_conv(z[0].transpose(0, 1)).transpose(0, 1)[None]
    counts = [max((n - k) // s + 1, 0) for n, k, s in zip(z.shape[2:], kernel, stride, strict=True)]
    height, width, left = z.shape[3] * space, z.shape[4] * space, z.shape[2] * time
    video = z.new_zeros((1, model.config.out_channels, model.kernel[0], height, width))
    for i in range(counts[0]):
        for j in range(counts[1]):
            for k in range(counts[2]):
                at = [stride[0] * i, stride[1] * j, stride[2] * k]
                part = z[:, :, at[0] : at[0] + kernel[0], at[1] : at[1] + kernel[1], at[2] : at[2] + kernel[2]]
                pixels = model.decoder(part.contiguous())
                for dim, index, count, lap in zip((2, 3, 4), (i, j, k), counts, overlap, strict=True):
                    fade(pixels, dim, index, count, lap)
                y, x = model.stride[1] * j, model.stride[2] * k
                video[:, :, :, y : y + model.kernel[1], x : x + model.kernel[2]] += pixels
                del pixels
        done = min(model.stride[0] if i < counts[0] - 1 else model.kernel[0], left)
        yield video[:, :, :done].clone()
        left -= done
        video = torch.cat([video[:, :, done:], torch.zeros_like(video[:, :, :done])], 2)
    if left:
        yield z.new_zeros((1, model.config.out_channels, left, height, width))


def fade(pixels: Tensor, dim: int, index: int, count: int, overlap: int) -> None:
    """Scale what the neighbours of tile `index` of `count` along `dim` cover too, linearly, in place."""
    if overlap <= 0:
        return
    ramp = torch.arange(overlap, device=pixels.device).float() / overlap
    ramp = ramp.reshape([-1 if axis == dim else 1 for axis in range(pixels.ndim)])
    if index > 0:
        head = pixels.narrow(dim, 0, overlap)
        head.copy_(head * ramp)
    if index < count - 1:
        tail = pixels.narrow(dim, pixels.shape[dim] - overlap, overlap)
        tail.copy_(tail * (1 - ramp))


def _in_grid(
    model: Any, z: Tensor, grid: Grid | None, frames: Callable[[Any, Tensor], Iterator[Tensor]]
) -> Iterator[Tensor]:
    """The chunks of `frames(model, z)`, in tiles where there is a grid."""
    return frames(model, z) if grid is None else stream_grid(model, z, grid, lambda tile: frames(model, tile))


STREAMS: Mapping[str, Callable[..., Iterator[Tensor]]] = {
    "AutoencoderKLWan": stream_wan,
    "AutoencoderKLCogVideoX": stream_cogvideox,
    "AutoencoderKLMochi": stream_mochi,
    "AutoencoderKLHunyuanVideo": stream_hunyuan,
    "AutoencoderKLHunyuanVideo15": stream_hunyuan15,
    "AutoencoderKLCosmos": stream_cosmos,
    "AutoencoderKLTemporalDecoder": stream_temporal_decoder,
    "AutoencoderKLAllegro": stream_allegro,
    "AutoencoderKLLTXVideo": stream_ltx,
}
