"""What the classes of video autoencoders in diffusers do their own way: one row each."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from fastlatent.encoders.video_encode_streaming import Take
from fastlatent.encoders.video_streaming import STREAMS

# What LTX's pipeline gives a decoder with timestep_conditioning unless it is told otherwise. Its decode_noise_scale is
# then the same 0, so that the noise which it mixes into the latents vanishes.
LTX_DECODE_TIMESTEP = 0.0

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Normalization:
    """pipeline = (raw − mean) · factor / std. mean and std: float32 [1, C, 1 or frames, 1, 1], or None for 0 and 1.

    inverse: (latents, mean, std, factor) → raw, in the order in which the pipeline computes it.
    """

    mean: Tensor | None
    std: Tensor | None
    factor: float
    inverse: Callable[[Tensor, Any, Any, float], Tensor]

    def numbers(self) -> dict[str, Any]:
        lists = {"mean": self.mean, "std": self.std}
        return {"factor": self.factor, **{k: None if v is None else v.flatten().tolist() for k, v in lists.items()}}

    def over(self, latents: Tensor) -> tuple[Any, Any]:
        """mean and std for these latents; 0 and 1 without statistics."""
        if self.mean is None or self.std is None:
            return 0.0, 1.0
        known, frames = self.mean.shape[2], latents.shape[2]
        if 1 < known < frames:
            raise ValueError(
                f"autoencoder: its config has statistics for {known} latent frames, and the latents have {frames}: "
                f"{list(latents.shape)}"
            )
        return self.mean[:, :, :frames].to(latents.device), self.std[:, :, :frames].to(latents.device)


def per_std(z: Tensor, mean: Any, std: Any, factor: float) -> Tensor:
    return z / (1.0 / std) + mean


def times_std(z: Tensor, mean: Any, std: Any, factor: float) -> Tensor:
    return z * std / factor + mean


def divided(z: Tensor, mean: Any, std: Any, factor: float) -> Tensor:
    return z / factor + mean


def reciprocal(z: Tensor, mean: Any, std: Any, factor: float) -> Tensor:
    return 1 / factor * z


def _decode_whole(model: Any, latents: Tensor) -> Tensor:
    return model.decode(latents, return_dict=False)[0]


def _decode_one_by_one(model: Any, latents: Tensor) -> Tensor:
    return torch.cat([_decode_whole(model, one) for one in latents.split(1)])


def _decode_allegro(model: Any, latents: Tensor) -> Tensor:
    model.enable_tiling()
    return _decode_one_by_one(model, latents).transpose(1, 2)


def _decode_streamed(model: Any, latents: Tensor) -> Tensor:
    stream = STREAMS[type(model).__name__]
    return torch.cat([torch.cat(list(stream(model, one)), 2) for one in latents.split(1)])


def _ltx_time(model: Any, latents: Tensor) -> Tensor | None:
    return latents.new_full((len(latents),), LTX_DECODE_TIMESTEP) if model.config.get("timestep_conditioning") else None


def _decode_ltx(model: Any, latents: Tensor) -> Tensor:
    with _ltx_noise(model):
        return model.decode(latents, _ltx_time(model, latents), return_dict=False)[0]


def _stream_ltx(model: Any, latents: Tensor, *, tiles: bool) -> Iterator[Tensor]:
    chunks = STREAMS["AutoencoderKLLTXVideo"](model, latents, tiles=tiles, temb=_ltx_time(model, latents))
    while True:
        with _ltx_noise(model):
            chunk = next(chunks, None)
        if chunk is None:
            return
        yield chunk


@contextlib.contextmanager
def _ltx_noise(model: Any) -> Iterator[None]:
    """LTX 0.9.1 draws noise inside its decoder, from torch's global generator: with seed 0 each time, and put back."""
    if not any(model.config.get("decoder_inject_noise") or ()):
        yield
        return
    cuda = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        torch.default_generator.manual_seed(0)
        for device in cuda:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(0)
        yield


def _check_allegro(model: Any, size: tuple[int, int, int]) -> None:
    """Where its tiles do not cover the video, diffusers' decode leaves black."""
    for name, side, tile, stride in zip(("frames", "height", "width"), size, model.kernel, model.stride, strict=True):
        if side < tile or (side - tile) % stride:
            raise ValueError(
                f"AutoencoderKLAllegro works in tiles of {'×'.join(map(str, model.kernel))} (frames×height×width) "
                f"that advance by {'×'.join(map(str, model.stride))}: expected {name} {tile} + {stride}·k, got {side}; "
                f"the nearest is {tile + stride * max(round((side - tile) / stride), 0)}"
            )


def _halvings(name: str) -> Callable[[Config], int]:
    return lambda config: 2 ** (len(config[name]) - 1)


def _ltx_ratio(name: str, patch: str) -> Callable[[Config], int]:
    return lambda config: config.get(name) or config[patch] * 2 ** sum(config["spatio_temporal_scaling"])


@dataclass(frozen=True)
class VideoKind:
    """What a class of video autoencoders does its own way.

    downsample: pixels per latent. time_stride: frames per latent frame. latents: their channels. All from the config.
    inverse: see Normalization. encode: (model, take, frames) → mean‖logvar or latents, unless ENCODES has it all.
    decode: (model, latents) → pixels. stream: (model, latents, tiles) → chunks, unless STREAMS has it all.
    posterior: it encodes to a Gaussian, not to a latent. fixed_size: the one side that its frames may have, or None.
    check: (model, (frames, height, width)) → ValueError for sizes that it cannot encode or decode.
    time_first: its pipeline holds [B, t, C, h, w]. packed: its pipeline holds [B, t·h·w, C].
    first_alone: the first latent frame is one frame, so that there are stride·(t − 1) + 1 of them; else stride·t.
    even_whole: an even number of them has no such first one, so that there are stride·t (CogVideoX).
    padded_start: its pipeline may put one latent frame before the video, and drops it to decode (CogVideoX 1.5).
    image: it has no time, so that latents may also be one image [1, C, h, w]. tiles: False where it is always the same.
    """

    downsample: Callable[[Config], int]
    time_stride: Callable[[Config], int]
    inverse: Callable[[Tensor, Any, Any, float], Tensor]
    latents: Callable[[Config], int] = itemgetter("latent_channels")
    encode: Callable[[Any, Take, int], Tensor] | None = None
    decode: Callable[[Any, Tensor], Tensor] = _decode_whole
    stream: Callable[..., Iterator[Tensor]] | None = None
    posterior: bool = True
    fixed_size: int | None = None
    check: Callable[[Any, tuple[int, int, int]], None] | None = None
    time_first: bool = False
    packed: bool = False
    first_alone: bool = True
    even_whole: bool = False
    padded_start: bool = False
    image: bool = False
    tiles: bool = True


_SPACE, _TIME = itemgetter("spatial_compression_ratio"), itemgetter("temporal_compression_ratio")

VIDEO_KINDS: dict[str, VideoKind] = {
    "AutoencoderKLWan": VideoKind(
        lambda config: 2 ** (len(config["dim_mult"]) - 1) * (config.get("patch_size") or 1),
        lambda config: 2 ** sum(config["temperal_downsample"]), per_std, itemgetter("z_dim"),
    ),
    "AutoencoderKLHunyuanVideo": VideoKind(_SPACE, _TIME, divided),
    # The mask of its attention is wrong for two videos at once.
    "AutoencoderKLHunyuanVideo15": VideoKind(_SPACE, _TIME, divided, decode=_decode_one_by_one),
    # invert_scale_latents concerns the image that conditions CogVideoX-1.5-I2V; the latents of its video are scaled
    # like those of the others.
    "AutoencoderKLCogVideoX": VideoKind(
        _halvings("block_out_channels"), _TIME, reciprocal, time_first=True,
        even_whole=True, padded_start=True,
    ),
    "AutoencoderKLLTXVideo": VideoKind(
        _ltx_ratio("spatial_compression_ratio", "patch_size"), _ltx_ratio("temporal_compression_ratio", "patch_size_t"),
        times_std, decode=_decode_ltx, stream=_stream_ltx, packed=True,
    ),
    "AutoencoderKLMochi": VideoKind(
        lambda config: math.prod(config["spatial_expansions"]), lambda config: math.prod(config["temporal_expansions"]),
        times_std,
    ),
    "AutoencoderKLAllegro": VideoKind(
        _halvings("block_out_channels"), _TIME, reciprocal, decode=_decode_allegro, check=_check_allegro,
        first_alone=False, tiles=False,
    ),
    "AutoencoderKLCosmos": VideoKind(_SPACE, _TIME, times_std, posterior=False),
    "AutoencoderKLTemporalDecoder": VideoKind(
        _halvings("block_out_channels"), lambda config: 1, reciprocal, decode=_decode_streamed,
        time_first=True, first_alone=False,
    ),
}  # fmt: skip
