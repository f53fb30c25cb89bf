"""The autoencoders that can be trained: AutoencoderKL of any size, and LatentLM's σ-VAE, under one face."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastlatent.encoders.sigma_vae import FILE, Beit3Layer, SigmaVaeEncoder, SigmaVaeNetwork, VitBlock

SIGMA_PATCH = 16
# C_σ of the published σ-VAE is std/0.8: 0.9375.
_SIGMA_STD, _STD_UNIT = 0.75, 0.8
_SIGMA_WIDTH, _SIGMA_DEPTH, _SIGMA_HIDDEN = 768, 12, 3072


@dataclass(frozen=True)
class LatentStatistics:
    """Of raw latents: mean and standard deviation (population) of all values, and of each channel's."""

    count: int
    mean: float
    std: float
    channel_mean: list[float]
    channel_std: list[float]

    def entries(self) -> dict[str, Any]:
        """As diffusers' configs name them: (raw − shift)·scaling has mean 0 and standard deviation 1."""
        return {
            "scaling_factor": 1 / self.std,
            "shift_factor": self.mean,
            "latents_mean": self.channel_mean,
            "latents_std": self.channel_std,
        }


# What a config says of latents that were not measured; that of --init would be about other weights.
UNMEASURED: dict[str, Any] = {"scaling_factor": 1.0, "shift_factor": None, "latents_mean": None, "latents_std": None}


class Network(Protocol):
    """An autoencoder in training.

    Attributes:
        model: holds the weights, under the names that they are saved with.
        channels, size: of an image; size is its side. latent_shape: (C, h, w) of its latent.
        has_posterior: whether a variance is learned, and stored with latents.
        last: the decoder's last layer.
    """

    model: nn.Module
    channels: int
    size: int
    latent_shape: tuple[int, int, int]
    has_posterior: bool

    @property
    def last(self) -> nn.Conv2d | nn.Linear: ...

    def encode(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """What `latents` and `kl` take: [B, C, h, w] each, of any float dtype."""
        ...

    def latents(self, encoded: tuple[Tensor, ...], noise: Tensor, sigma: Tensor) -> Tensor:
        """A draw from the posterior. noise [B, C, h, w] and sigma [B]: standard normal."""
        ...

    def kl(self, encoded: tuple[Tensor, ...]) -> Tensor:
        """What draws the posterior to N(0, 1): [B, C, h, w]."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """→ pixels [B, channels, H, W]."""
        ...

    def freeze_encoder(self) -> None:
        """Let the decoder alone train."""
        ...

    def checkpoint_gradients(self) -> None:
        """Compute activations again in the backward pass."""
        ...

    def compile(self, *, adversarial: bool) -> None:
        """torch.compile, in place. With `adversarial`, `last` stays outside: its gradient is taken alone, and for that
        a compiled decoder would run its whole backward pass."""
        ...

    def copy(self, weights: Mapping[str, Tensor], device: torch.device) -> Network:
        """Another one of the same sizes, for evaluation, with these weights of `model`."""
        ...

    def save(self, folder: Path, statistics: LatentStatistics | None) -> None:
        """Write it as `load_autoencoder` reads it."""
        ...


class KlNetwork:
    """diffusers' AutoencoderKL: the posterior has a mean and a variance per value, log-variances in [−30, 20]."""

    has_posterior = True

    def __init__(self, model: AutoencoderKL, size: int) -> None:
        self.model: Any = model
        self.size, self.channels = size, model.config.in_channels
        side = size // 2 ** (len(model.config.block_out_channels) - 1)
        self.latent_shape = (model.config.latent_channels, side, side)

    @property
    def last(self) -> nn.Conv2d:
        return self.model.decoder.conv_out

    def encode(self, pixels: Tensor) -> tuple[Tensor, ...]:
        posterior = self.model.encode(pixels).latent_dist
        return posterior.mean, posterior.logvar

    def latents(self, encoded: tuple[Tensor, ...], noise: Tensor, sigma: Tensor) -> Tensor:
        mean, logvar = encoded
        return mean + (0.5 * logvar).exp() * noise

    def kl(self, encoded: tuple[Tensor, ...]) -> Tensor:
        mean, logvar = encoded
        return 0.5 * (mean.square() + logvar.exp() - 1 - logvar)

    def decode(self, latents: Tensor) -> Tensor:
        return self.model.decode(latents).sample

    def freeze_encoder(self) -> None:
        for part in (self.model.encoder, self.model.quant_conv):
            if part is not None:
                part.requires_grad_(False)

    def checkpoint_gradients(self) -> None:
        self.model.enable_gradient_checkpointing()

    def compile(self, *, adversarial: bool) -> None:
        decoder = self.model.decoder
        parts = (decoder.mid_block, *decoder.up_blocks) if adversarial else (decoder,)
        _compile(self.model.encoder, *parts)

    def copy(self, weights: Mapping[str, Tensor], device: torch.device) -> KlNetwork:
        with torch.device("meta"):
            model = AutoencoderKL.from_config(self.model.config)
        model.load_state_dict(dict(weights), assign=True)
        return KlNetwork(model.eval().requires_grad_(False).to(device), self.size)

    def save(self, folder: Path, statistics: LatentStatistics | None) -> None:
        self.model.register_to_config(**(statistics.entries() if statistics else UNMEASURED))
        self.model.save_pretrained(folder)


class SigmaNetwork:
    """LatentLM's σ-VAE: the encoder gives the mean, the spread is drawn: z = μ + σ·C_σ·ε with one σ ~ N(0, 1) for each
    image. What stands for the KL divergence is μ², as published: twice the divergence, but for a constant."""

    has_posterior = False

    def __init__(self, model: SigmaVaeNetwork, config: Mapping[str, Any]) -> None:
        self.model: Any = model
        self.config, self.channels, self.size = dict(config), model.channels, config["img_size"]
        side = config["img_size"] // config["patch_size"]
        self.latent_shape = (config["latent_size"], side, side)
        self._encoder = SigmaVaeEncoder(model)

    @property
    def last(self) -> nn.Linear:
        return self.model.decoder_post_processor.fc2

    def encode(self, pixels: Tensor) -> tuple[Tensor, ...]:
        return (self._encoder(pixels),)

    def latents(self, encoded: tuple[Tensor, ...], noise: Tensor, sigma: Tensor) -> Tensor:
        return encoded[0] + self.config["std"] / _STD_UNIT * sigma[:, None, None, None] * noise

    def kl(self, encoded: tuple[Tensor, ...]) -> Tensor:
        return encoded[0].square()

    def decode(self, latents: Tensor) -> Tensor:
        return self.model.decode(latents)

    def freeze_encoder(self) -> None:
        self._encoder.requires_grad_(False)

    def checkpoint_gradients(self) -> None:
        for part in self.model.modules():
            if type(part) in (Beit3Layer, VitBlock):
                again = functools.partial(checkpoint, part.forward, use_reentrant=False)
                part.forward = again

    def compile(self, *, adversarial: bool) -> None:
        _compile(self.model.encoder, self.model.decoder)  # `last` is not part of it

    def copy(self, weights: Mapping[str, Tensor], device: torch.device) -> SigmaNetwork:
        with torch.device("meta"):
            model = SigmaVaeNetwork(self.config, weights)
        model.load_state_dict(dict(weights), assign=True)
        return SigmaNetwork(model.eval().requires_grad_(False).to(device), self.config)

    def save(self, folder: Path, statistics: LatentStatistics | None) -> None:
        config = {name: value for name, value in self.config.items() if name not in UNMEASURED}
        config |= statistics.entries() if statistics else {}
        weights = {name: tensor.detach().cpu() for name, tensor in self.model.state_dict().items()}
        torch.save({"config": config, "model": weights}, folder / FILE)


def _compile(*parts: nn.Module) -> None:
    for part in parts:
        # Blocks of one class share their forward's code: to torch.compile the second one's other shapes are the first
        # one's, changed, and it would compile all that follow for dynamic shapes.
        part.compile(dynamic=False)


def new_kl(
    *,
    size: int,
    channels: int,
    latent_channels: int,
    block_out_channels: tuple[int, ...],
    layers_per_block: int,
    norm_groups: int,
) -> KlNetwork:
    """An AutoencoderKL with random weights."""
    levels = len(block_out_channels)
    return _kl(
        size,
        in_channels=channels,
        out_channels=channels,
        latent_channels=latent_channels,
        block_out_channels=block_out_channels,
        layers_per_block=layers_per_block,
        norm_num_groups=norm_groups,
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
    )


KL16: dict[str, Any] = {
    "latent_channels": 16,
    "block_out_channels": (128, 128, 256, 256, 512),
    "layers_per_block": 2,
    "norm_num_groups": 32,
}


def new_kl16(size: int, channels: int, **sizes: Any) -> KlNetwork:
    """KL-16 as MAR and LatentLM use it, with random weights: attention behind the encoder's blocks of the last level
    and in the middles, none in the decoder's levels. `sizes` replace those of KL16."""
    sizes = KL16 | sizes
    levels = len(sizes["block_out_channels"])
    down = ["DownEncoderBlock2D"] * (levels - 1) + ["AttnDownEncoderBlock2D"]
    up = ["UpDecoderBlock2D"] * levels
    return _kl(size, in_channels=channels, out_channels=channels, down_block_types=down, up_block_types=up, **sizes)


def _kl(size: int, **sizes: Any) -> KlNetwork:
    return KlNetwork(AutoencoderKL(**sizes, sample_size=size, scaling_factor=1.0), size)


def new_sigma(
    size: int,
    channels: int,
    latent_channels: int,
    *,
    patch: int = SIGMA_PATCH,
    width: int = _SIGMA_WIDTH,
    depth: int = _SIGMA_DEPTH,
    hidden: int = _SIGMA_HIDDEN,
) -> SigmaNetwork:
    """A σ-VAE with random weights; the defaults are the published sizes."""
    config = {
        "img_size": size, "patch_size": patch, "latent_size": latent_channels, "std": _SIGMA_STD,
        "encoder_arch": "beit3-base", "decoder_arch": "vit-base",
    }  # fmt: skip
    # The network reads its sizes from weights.
    shapes: dict[str, tuple[int, ...]] = {
        "encoder.vision_embed.proj.weight": (width, channels, patch, patch),
        "decoder.patch_embed.proj.weight": (width, latent_channels, 1, 1),
    }
    for layer in range(depth):
        shapes[f"encoder.encoder.layers.{layer}.ffn.fc1.weight"] = (hidden, width)
        shapes[f"decoder.blocks.{layer}.mlp.fc1.weight"] = (hidden, width)
    model = SigmaVaeNetwork(config, {name: torch.empty(shape, device="meta") for name, shape in shapes.items()})
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2:  # ViT's: norms keep their ones, biases their zeros
            nn.init.trunc_normal_(parameter, std=0.02)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)
    return SigmaNetwork(model, config)
