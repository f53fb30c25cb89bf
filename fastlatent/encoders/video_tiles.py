"""Tiled decoding of video autoencoders in the order of frames: what diffusers' tiled decodes give, handed out early.

A causal decoder that is tiled in space needs, for each tile, the cache of that tile. Going chunk by chunk over all
tiles would keep all caches: at 848×480, Wan's take 3.6 GiB untiled and, with tiles of 256 at a stride of 192 pixels,
1.7 times as much, which is most of what tiles are to save. So each tile goes over all of its time with one cache
(0.6 GiB), as in diffusers, but its frames are moved to the host as they are made: on the device, memory stays constant
in time. The host holds all frames in float32, overlaps twice: 8 MiB a frame of 848×480. Then they are blended chunk by
chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Grid:
    """Overlapping tiles: (height, width) of each, in latents and in what the decoder makes of them."""

    tile: tuple[int, int]  # latents
    stride: tuple[int, int]  # latents
    blend: tuple[int, int]  # pixels that are blended with the tile above, to the left
    keep: tuple[int, int]  # pixels of a tile that stay
    crop: tuple[int | None, int | None] = (None, None)  # pixels of the whole


def grid_of(model: Any, z: Tensor, patch: int = 1) -> Grid | None:
    """Tiles from tile_sample_min_* and tile_sample_stride_*; None where z [1, C, t, h, w] is not larger than one tile.

    patch: the decoder makes pixels / patch, which are blended before they are unfolded.
    """
    ratio = model.spatial_compression_ratio
    minimum = (model.tile_sample_min_height, model.tile_sample_min_width)
    stride = (model.tile_sample_stride_height, model.tile_sample_stride_width)
    tile = (minimum[0] // ratio, minimum[1] // ratio)
    if z.shape[-2] <= tile[0] and z.shape[-1] <= tile[1]:
        return None
    keep = (stride[0] // patch, stride[1] // patch)
    return Grid(
        tile=tile,
        stride=(stride[0] // ratio, stride[1] // ratio),
        blend=(minimum[0] // patch - keep[0], minimum[1] // patch - keep[1]),
        keep=keep,
        crop=(z.shape[-2] * ratio // patch, z.shape[-1] * ratio // patch),
    )


def overlapping_grid(model: Any, z: Tensor, overlap: tuple[float, float]) -> Grid | None:
    """Tiles from tile_latent_min_*, tile_sample_min_* and the part of (height, width) in which neighbours overlap."""
    tile = (model.tile_latent_min_height, model.tile_latent_min_width)
    if z.shape[-2] <= tile[0] and z.shape[-1] <= tile[1]:
        return None
    pixels = (model.tile_sample_min_height, model.tile_sample_min_width)
    blend = (int(pixels[0] * overlap[0]), int(pixels[1] * overlap[1]))
    return Grid(
        tile=tile,
        stride=(int(tile[0] * (1 - overlap[0])), int(tile[1] * (1 - overlap[1]))),
        blend=blend,
        keep=(pixels[0] - blend[0], pixels[1] - blend[1]),
    )


def stream_grid(model: Any, z: Tensor, grid: Grid, stream: Callable[[Tensor], Iterator[Tensor]]) -> Iterator[Tensor]:
    """Decode z [1, C, t, h, w] tile by tile with `stream`, then give the joined frames, in the chunks of `stream`."""
    rows: list[list[list[Tensor]]] = []
    for y in range(0, z.shape[-2], grid.stride[0]):
        rows.append([])
        for x in range(0, z.shape[-1], grid.stride[1]):
            tile = z[..., y : y + grid.tile[0], x : x + grid.tile[1]]
            rows[-1].append([pixels.cpu() for pixels in stream(tile)][::-1])
    for _ in range(len(rows[0][0])):
        yield _join(model, [[chunks.pop().to(z.device) for chunks in row] for row in rows], grid)


def _join(model: Any, rows: list[list[Tensor]], grid: Grid) -> Tensor:
    # Blending is in place: a tile is blended with its neighbours as they are after their own blending.
    lines = []
    for i, row in enumerate(rows):
        line = []
        for j, tile in enumerate(row):
            if i > 0:
                tile = model.blend_v(rows[i - 1][j], tile, grid.blend[0])
            if j > 0:
                tile = model.blend_h(row[j - 1], tile, grid.blend[1])
            line.append(tile[..., : grid.keep[0], : grid.keep[1]])
        lines.append(torch.cat(line, -1))
    return torch.cat(lines, -2)[..., : grid.crop[0], : grid.crop[1]]


def stream_time_tiles(model: Any, z: Tensor, decode: Callable[[Tensor], Tensor], *, keep: slice) -> Iterator[Tensor]:
    """Overlapping tiles of time (tile_sample_min_num_frames, tile_sample_stride_num_frames), blended.

    decode: latents [1, C, m, h, w] to pixels of (m − 1)·ratio + 1 frames, of which all tiles but the first give up one:
    keep is the rest. Each tile has one latent frame more than its size says.
    """
    ratio = model.temporal_compression_ratio
    size, stride = model.tile_sample_min_num_frames // ratio, model.tile_sample_stride_num_frames // ratio
    stride_frames = model.tile_sample_stride_num_frames
    overlap = model.tile_sample_min_num_frames - stride_frames
    left, end = (z.shape[2] - 1) * ratio + 1, None
    for i in range(0, z.shape[2], stride):
        if left <= 0:  # the last tile may be one latent frame that adds nothing
            return
        pixels = decode(z[:, :, i : i + size + 1])
        if end is None:
            out = pixels[:, :, : stride_frames + 1]
        else:
            pixels = model.blend_t(end, pixels[:, :, keep], overlap)
            out = pixels[:, :, :stride_frames]
        end = pixels[:, :, -overlap:].clone()
        left -= out.shape[2]
        yield out if left >= 0 else out[:, :, :left]
        del pixels, out
