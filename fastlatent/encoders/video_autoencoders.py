"""Every video autoencoder of diffusers behind the VideoAutoencoder protocol, and the image ones frame by frame."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastlatent.encoders.diffusers_autoencoders import (
    KINDS,
    LOADING,
    SCALING,
    DiffusersAutoencoder,
    diffusers_class,
    identity_of,
    load_folder,
    load_weights,
    read_config,
    weights_folder,
)
from fastlatent.encoders.engines.video_step import CompiledStep
from fastlatent.encoders.video_encode_streaming import ENCODES, Take
from fastlatent.encoders.video_kinds import (
    VIDEO_KINDS,
    Normalization,
    VideoKind,
    divided,
    per_std,
    reciprocal,
    times_std,
)
from fastlatent.encoders.video_streaming import STREAMS, UNTILED, WHOLE
from fastlatent.encoders.weights import reloaded, tensors_digest

# Cosmos keeps its scale in the scheduler's config; this is the default of its scheduler's class (EDMEulerScheduler).
COSMOS_SIGMA_DATA = 0.5
# Where diffusers' DiagonalGaussianDistribution cuts off log-variances.
LOGVAR = (-30.0, 20.0)


class DiffusersVideoAutoencoder:
    """A video autoencoder of diffusers, or an image one frame by frame; evaluation mode, no gradients.

    Args:
        model: in the dtype and on the device that it runs in.
        kind: its row of VIDEO_KINDS, or what `_image_kind` makes of an image autoencoder.
        normalization: of its latents.
        identity: see `VideoAutoencoder.identity`.
        reload: loads the same weights in float32, for `upcast`.
        pixel_channels: 1 or 3.
    """

    def __init__(
        self,
        model: Any,
        kind: VideoKind,
        normalization: Normalization,
        identity: dict[str, Any],
        reload: Callable[[], DiffusersVideoAutoencoder],
        pixel_channels: int = 3,
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self.kind = kind
        self.pixel_channels = pixel_channels
        self.latent_channels = kind.latents(model.config)
        self.time_stride = kind.time_stride(model.config)
        self.downsample = kind.downsample(model.config)
        self.has_posterior = kind.posterior
        self._name = type(model).__name__
        self.streams = self._name not in WHOLE
        self.tiles = kind.tiles and self._name not in UNTILED
        self._normalization = normalization
        self._identity = identity
        self._reload = reload
        self._step: CompiledStep | None = None

    def frames(self, latent_frames: int) -> int:
        whole = self.time_stride * latent_frames
        alone = self.kind.first_alone and not (self.kind.even_whole and latent_frames % 2 == 0)
        return whole - self.time_stride + 1 if alone else whole

    def latent_frames(self, frames: int) -> int:
        count = self._floor_latent_frames(frames)
        if count < 1 or self.frames(count) != frames:
            stride = self.time_stride
            form = f"{stride}·k + 1" if self.kind.first_alone else f"{stride}·k"
            form = f"{2 * stride}·k or {2 * stride}·k + 1" if self.kind.even_whole else form
            near = max(count, 1)
            raise ValueError(
                f"{self._name} has videos of {form} frames, {self.frames(near)} or {self.frames(near + 1)}, "
                f"got {frames}"
            )
        return count

    def _floor_latent_frames(self, frames: int) -> int:
        return (frames - 1) // self.time_stride + 1 if self.kind.first_alone else frames // self.time_stride

    def arrange(self, stored: Tensor, size: tuple[int, int, int] | None) -> Tensor:
        channels, shape = self.latent_channels, list(stored.shape)
        layout = "[1, t, C, h, w]" if self.kind.time_first else "[1, C, t, h, w]"
        if self.kind.packed and stored.ndim in (2, 3):
            return self._unpacked(stored.reshape(1, *shape) if stored.ndim == 2 else stored, size)
        if self.kind.image and stored.ndim == 4 and shape[0] != channels:
            stored = stored.unsqueeze(2)
        latents = stored.unsqueeze(0) if stored.ndim == 4 else stored
        axis = 2 if self.kind.time_first else 1
        if latents.ndim != 5 or latents.shape[0] != 1 or latents.shape[axis] != channels or not latents.numel():
            packed = " or packed as [1, t·h·w, C]" if self.kind.packed else ""
            raise ValueError(
                f"expected latents of one video of {self._name}: {layout}{packed} with C = {channels}, with or without "
                f"the first axis; got {shape}"
            )
        if self.kind.time_first:
            latents = latents.transpose(1, 2)
        if self.kind.padded_start and size and latents.shape[2] == self._floor_latent_frames(size[0]) + 1:
            latents = latents[:, :, 1:]
        return latents

    def _unpacked(self, stored: Tensor, size: tuple[int, int, int] | None) -> Tensor:
        shape, channels = list(stored.shape), self.latent_channels
        expected = f"packed latents of {self._name}: [1, t·h·w, C] with C = {channels}, with or without the first axis"
        if stored.shape[0] != 1 or stored.shape[2] != channels:
            raise ValueError(f"expected {expected}; got {shape}")
        if size is None:
            raise ValueError(
                f"{expected}, {shape} here, do not say how long, high and wide the video is: the experiment's config "
                "must have video_settings.frames, height and width"
            )
        frames, height, width = size
        grid = (self._floor_latent_frames(frames), height // self.downsample, width // self.downsample)
        if math.prod(grid) != stored.shape[1]:
            raise ValueError(
                f"expected {expected}: {frames} frames of {width}×{height} are {'·'.join(map(str, grid))} = "
                f"{math.prod(grid)} latents; got {shape}"
            )
        return stored.reshape(1, *grid, channels).permute(0, 4, 1, 2, 3)

    def normalize(self, raw: Tensor) -> Tensor:
        raw = raw.float()
        mean, std = self._normalization.over(raw)
        return (raw - mean) * self._normalization.factor / std

    def denormalize(self, latents: Tensor) -> Tensor:
        latents = latents.float()
        mean, std = self._normalization.over(latents)
        return self._normalization.inverse(latents, mean, std, self._normalization.factor)

    def normalization(self) -> dict[str, Any]:
        return self._normalization.numbers()

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """(t, h, w) of what a video of this size encodes to.

        Raises:
            ValueError: a number of frames or a size that it does not take; the message names the nearest that it does.
        """
        if self.kind.check:
            self.kind.check(self.model, (frames, height, width))
        count, step, fixed = self.latent_frames(frames), self.downsample, self.kind.fixed_size
        if fixed and (height, width) != (fixed, fixed):
            raise ValueError(f"{self._name} encodes frames of {fixed}×{fixed} only, got {height}×{width}")
        if height % step or width % step:
            near = "×".join(f"{max(round(side / step), 1) * step}" for side in (height, width))
            raise ValueError(
                f"{self._name} needs sides that are multiples of {step}, got {height}×{width}; the nearest are {near}"
            )
        return count, height // step, width // step

    def encode(self, pixels: Tensor) -> Tensor:
        if pixels.ndim != 5 or pixels.shape[1] != self.pixel_channels or not pixels.numel():
            raise ValueError(f"expected pixels [B, {self.pixel_channels}, T, H, W], got {list(pixels.shape)}")
        _, _, frames, height, width = pixels.shape
        return self.encode_pieces(lambda start, stop: pixels[:, :, start:stop], frames, height, width)

    @torch.inference_mode()
    def encode_pieces(self, take: Take, frames: int, height: int, width: int) -> Tensor:
        """`encode`, of pixels that are made when their turn comes.

        take: (start, stop) → pixels [B, channels, n, height, width] in [−1, 1] of these frames, in any dtype, anywhere.
        """
        grid = self.latent_shape(frames, height, width)
        encode = self.kind.encode or ENCODES[self._name]

        def placed(start: int, stop: int) -> Tensor:
            return take(start, min(stop, frames)).to(self.model.device, self.model.dtype)

        encoded = encode(self.model, placed, frames)
        assert tuple(encoded.shape[2:]) == grid, (encoded.shape, grid)
        if self.has_posterior:
            mean, logvar = encoded.chunk(2, 1)
            encoded = torch.cat([mean, logvar.clamp(*LOGVAR)], 1)
        return encoded.float()

    @torch.inference_mode()
    def decode(self, raw: Tensor) -> Tensor:
        return self.kind.decode(self.model, self._checked(raw)).float()

    def stream(self, raw: Tensor, *, tiles: bool = False) -> Generator[Tensor, None, None]:
        latents = self._checked(raw)
        if len(latents) != 1:
            raise ValueError(f"expected the latents of one video to stream, got {list(raw.shape)}")
        if tiles and not self.tiles:
            raise ValueError(f"{self._name} has no choice of tiles in diffusers: leave them out")
        return self._stream(latents, tiles)

    def use_engine(self, name: str, cache: Path) -> None:
        """Compile the step that `stream` repeats, without tiles (see `engines.video_step`).

        Raises:
            ValueError: this class has no such step.
        """
        if self._name != "AutoencoderKLWan":
            raise ValueError(f"--engine {name}: of video autoencoders AutoencoderKLWan only, not {self._name}")
        self._step = CompiledStep(name, self.model, self._identity, cache)

    @torch.inference_mode()
    def _stream(self, latents: Tensor, tiles: bool) -> Generator[Tensor, None, None]:
        stream = self.kind.stream or STREAMS[self._name]
        compiled = {} if self._step is None else {"step": self._step}
        for chunk in stream(self.model, latents, tiles=tiles, **compiled):
            yield chunk[0].float()

    def _checked(self, raw: Tensor) -> Tensor:
        if raw.ndim != 5 or raw.shape[1] != self.latent_channels or not raw.numel():
            raise ValueError(f"expected raw latents [B, {self.latent_channels}, t, h, w], got {list(raw.shape)}")
        if self.kind.check:
            t, h, w = raw.shape[2:]
            self.kind.check(self.model, (self.frames(t), h * self.downsample, w * self.downsample))
        return raw.to(self.model.device, self.model.dtype)

    def upcast(self) -> DiffusersVideoAutoencoder:
        """The same autoencoder in float32, its own copy of the weights; ValueError if its files changed."""
        return reloaded(self._reload, self._identity)

    def identity(self) -> dict[str, Any]:
        return self._identity


def load_video_autoencoder(folder: Path, device: torch.device | str, dtype: torch.dtype) -> DiffusersVideoAutoencoder:
    """Load a folder with config.json and weights, of a class in VIDEO_KINDS or an image autoencoder of diffusers.

    Raises:
        ValueError: the folder is not there, its class decodes no frames, or its weights do not fit its config.
    """
    folder = weights_folder(folder)
    name = _class_name(folder)

    def reload() -> DiffusersVideoAutoencoder:
        return load_video_autoencoder(folder, device, torch.float32)

    if name in KINDS:
        return _of_images(load_folder(folder, device, dtype), reload)
    model, stored = load_weights(folder, diffusers_class(name), dtype)
    return _of_videos(model.to(device), folder, stored, reload)


def video_autoencoder_on_meta(folder: Path, dtype: torch.dtype) -> DiffusersVideoAutoencoder:
    """The same autoencoder with weights on "meta", for estimates of memory; reads no more than config.json.

    Raises:
        ValueError: config.json is not there, or its class decodes no frames.
    """
    name = _class_name(folder)
    with LOADING, torch.device("meta"):
        model = diffusers_class(name).from_config(read_config(folder))
        nn.Module.to(model, "meta", dtype)  # diffusers' own warns of a loss of precision, and there are no numbers

    def reload() -> DiffusersVideoAutoencoder:
        return load_video_autoencoder(folder, "cpu", torch.float32)

    if name in KINDS:
        return _of_images(DiffusersAutoencoder(model, "", lambda: load_folder(folder, "cpu", torch.float32)), reload)
    return _of_videos(model, folder, {}, reload)


def _class_name(folder: Path) -> str:
    name = read_config(folder).get("_class_name")
    if name not in VIDEO_KINDS and name not in KINDS:
        raise ValueError(
            f"autoencoder: expected {folder}/config.json of an autoencoder of videos or images, got _class_name "
            f"{name!r}. Those of videos are {', '.join(sorted(VIDEO_KINDS))}; of images, {', '.join(sorted(KINDS))}"
        )
    return name


def _of_videos(
    model: Any, folder: Path, stored: Mapping[str, Tensor], reload: Callable[[], DiffusersVideoAutoencoder]
) -> DiffusersVideoAutoencoder:
    """stored: its tensors as they are in the file; without them, it is on "meta" and has no digest."""
    name, config = type(model).__name__, model.config
    kind = VIDEO_KINDS[name]
    mean, std, factor = config.get("latents_mean"), config.get("latents_std"), config.get("scaling_factor", 1.0)
    if kind.inverse not in (per_std, times_std):
        mean = std = None
    if name == "AutoencoderKLLTXVideo":  # among the weights, where a half precision model would round them
        mean, std = (stored.get(key, torch.tensor(0.0)) for key in ("latents_mean", "latents_std"))
        mean, std = (value.float().expand(kind.latents(config)) for value in (mean, std))
    if name == "AutoencoderKLCosmos":
        scheduler = folder.parent / "scheduler" / "scheduler_config.json"
        factor = read_config(scheduler.parent, scheduler.name).get("sigma_data") if scheduler.is_file() else None
        factor = COSMOS_SIGMA_DATA if factor is None else factor
    weights = tensors_digest({key: value for key, value in stored.items() if key not in SCALING}) if stored else ""
    normalization = Normalization(*_statistics(mean, std, kind.latents(config)), factor, kind.inverse)
    return DiffusersVideoAutoencoder(model, kind, normalization, identity_of(model, weights, SCALING), reload)


def _of_images(
    autoencoder: DiffusersAutoencoder, reload: Callable[[], DiffusersVideoAutoencoder]
) -> DiffusersVideoAutoencoder:
    name, config, image = type(autoencoder.model).__name__, autoencoder.model.config, autoencoder.kind
    if name == "AutoencoderKLFlux2":
        raise ValueError(
            f"autoencoder: {name} is not for frames of a video: its pipeline normalises squares of 2×2 latents by the "
            "statistics of a batch norm"
        )
    mean, std = config.get("latents_mean"), config.get("latents_std")
    factor, inverse = config.get("scaling_factor", 1.0), times_std if "scaling_factor" in config else per_std
    if image.scaled:
        mean, std, factor = None, None, 1.0
    if mean is None or std is None:
        shift = None if image.scaled else config.get("shift_factor")
        mean, std, inverse = None, None, reciprocal  # as AnimateDiff has it
        if shift is not None:
            mean, std, inverse = [shift] * autoencoder.latent_channels, [1.0] * autoencoder.latent_channels, divided

    def stream(model: Any, latents: Tensor, *, tiles: bool) -> Iterator[Tensor]:
        for frame in latents.unbind(2):
            before = getattr(model, "use_tiling", False)
            if tiles:
                model.enable_tiling()
            try:
                pixels = autoencoder.decode(frame).unsqueeze(2)
            finally:
                if tiles:
                    model.use_tiling = before
            yield pixels

    kind = VideoKind(
        image.downsample,
        lambda config: 1,
        inverse,
        image.latents,
        lambda model, take, frames: torch.stack(
            [autoencoder.encode(take(i, i + 1)[:, :, 0]) for i in range(frames)], 2
        ),
        lambda model, latents: torch.cat(list(stream(model, latents, tiles=False)), 2),
        stream,
        posterior=image.posterior,
        fixed_size=autoencoder.fixed_size,
        first_alone=False,
        image=True,
        tiles=hasattr(autoencoder.model, "use_tiling"),
    )
    normalization = Normalization(*_statistics(mean, std, autoencoder.latent_channels), factor, inverse)
    return DiffusersVideoAutoencoder(
        autoencoder.model, kind, normalization, autoencoder.identity(), reload, autoencoder.pixel_channels
    )


def _statistics(mean: Any, std: Any, channels: int) -> tuple[Tensor | None, Tensor | None]:
    """Lists for [C] channels, or for [C, frames] → float32 [1, C, 1 or frames, 1, 1]."""
    if mean is None or std is None:
        return None, None
    lists = [torch.as_tensor(value, dtype=torch.float32) for value in (mean, std)]
    if any(value.numel() % channels or not value.numel() for value in lists):
        raise ValueError(
            f"autoencoder: expected latents_mean and latents_std of {channels} channels in its config.json, got "
            f"{lists[0].numel()} and {lists[1].numel()} numbers"
        )
    return lists[0].reshape(1, channels, -1, 1, 1), lists[1].reshape(1, channels, -1, 1, 1)
