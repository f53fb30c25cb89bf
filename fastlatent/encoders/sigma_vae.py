"""σ-VAE checkpoints as published with LatentLM: a BEiT-3 ViT encodes patches of pixels to a mean, a ViT decodes it.

Sun et al. 2024, "Multimodal Latent Language Modeling with Next-Token Diffusion". The file holds `config` (img_size,
patch_size, latent_size, std; encoder_arch and decoder_arch where they are not the usual ones) and `model`. The
published code builds one size (width 768, 12 layers, 12 heads); widths and depths are read from the weights here, heads
are 64 wide. The encoder is torchscale's with its defaults: pre-norm with sub-LayerNorm, eps 1e-5, positions counted
from 2, no relative bias. Training adds noise of `std` to the mean; encoding gives the mean alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastlatent.encoders.diffusers_autoencoders import check_size
from fastlatent.encoders.protocol import Autoencoder
from fastlatent.encoders.weights import load_into, reloaded, tensors_digest

FILE = "sigma_vae.pt"  # in a run of `fastlatent train vae --layout sigma-vae`
_HEAD = 64
_DEFAULTS: dict[str, Any] = {"encoder_arch": "beit3-base", "decoder_arch": "vit-base"}
_REQUIRED = ("img_size", "patch_size", "latent_size", "std")
_ENCODERS, _DECODERS = ("beit3-base", "vit-base"), ("vit-base",)


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[B, N, width] each, with heads of 64 → [B, N, width]."""
    q, k, v = (x.unflatten(-1, (-1, _HEAD)).transpose(1, 2) for x in (q, k, v))
    return functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


# Attribute names below are those of the published weights.
class _Beit3Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.v_proj, self.out_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.inner_attn_ln = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_proj(self.inner_attn_ln(_attend(self.q_proj(x), self.k_proj(x), self.v_proj(x))))


class _Beit3FeedForward(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.ffn_layernorm = nn.LayerNorm(hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.ffn_layernorm(functional.gelu(self.fc1(x))))


class Beit3Layer(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.self_attn, self.self_attn_layer_norm = _Beit3Attention(width), nn.LayerNorm(width)
        self.ffn, self.final_layer_norm = _Beit3FeedForward(width, hidden), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.self_attn_layer_norm(x))
        return x + self.ffn(self.final_layer_norm(x))


class _PatchEmbedding(nn.Module):
    """The patches' projection; the BEiT-3 encoder also keeps its class token and an unused mask token here."""

    def __init__(self, channels: int, patch: int, width: int, tokens: bool) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch, patch)
        if tokens:
            self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
            self.mask_token = nn.Parameter(torch.zeros(1, 1, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class _Beit3Layers(nn.Module):
    def __init__(self, patches: int, width: int, hidden: int, depth: int) -> None:
        super().__init__()
        # A class token, and two rows that are never read: positions are counted from 2.
        self.embed_positions = nn.Embedding(patches + 3, width)
        self.layers = nn.ModuleList(Beit3Layer(width, hidden) for _ in range(depth))
        self.layer_norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.embed_positions.weight[2:]
        for layer in self.layers:
            x = layer(x)
        return self.layer_norm(x)


class _Beit3(nn.Module):
    def __init__(self, channels: int, patch: int, patches: int, width: int, hidden: int, depth: int) -> None:
        super().__init__()
        self.vision_embed = _PatchEmbedding(channels, patch, width, tokens=True)
        self.encoder = _Beit3Layers(patches, width, hidden, depth)

    def forward(self, x: Tensor) -> Tensor:
        """[B, channels, H, W] → [B, patches, width]."""
        x = self.vision_embed(x)
        x = torch.cat([self.vision_embed.cls_token.expand(len(x), -1, -1), x], 1)
        return self.encoder(x)[:, 1:]


class _VitAttention(nn.Module):
    """Keys have no bias."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.proj(_attend(q + self.q_bias, k, v + self.v_bias))


class _VitFeedForward(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(functional.gelu(self.fc1(x)))


class VitBlock(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width, eps=1e-6), _VitAttention(width)
        self.norm2, self.mlp = nn.LayerNorm(width, eps=1e-6), _VitFeedForward(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class _Vit(nn.Module):
    def __init__(self, channels: int, patch: int, patches: int, width: int, hidden: int, depth: int) -> None:
        super().__init__()
        self.patch_embed = _PatchEmbedding(channels, patch, width, tokens=False)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, patches + 1, width))
        self.blocks = nn.ModuleList(VitBlock(width, hidden) for _ in range(depth))
        self.fc_norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """[B, channels, H, W] → [B, patches, width]."""
        x = self.patch_embed(x)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.fc_norm(x)[:, 1:]


class _Mean(nn.Module):
    def __init__(self, width: int, latent_size: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, latent_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.dense(x)


class _Pixels(nn.Module):
    def __init__(self, width: int, pixels: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, width), nn.Linear(width, pixels)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(torch.tanh(self.fc1(x)))


class SigmaVaeNetwork(nn.Module):
    """The whole autoencoder under its published names; `forward` encodes."""

    def __init__(self, config: Mapping[str, Any], state: Mapping[str, Tensor]) -> None:
        super().__init__()
        patch, latent_size = config["patch_size"], config["latent_size"]
        self.side, self.patch = config["img_size"] // patch, patch
        beit3 = config["encoder_arch"] == "beit3-base"
        stem = "encoder.vision_embed.proj.weight" if beit3 else "encoder.patch_embed.proj.weight"
        first = "encoder.encoder.layers.0.ffn.fc1.weight" if beit3 else "encoder.blocks.0.mlp.fc1.weight"
        width, self.channels = _shape(state, stem, 4)[:2]
        depth = _depth(state, "encoder.encoder.layers." if beit3 else "encoder.blocks.")
        hidden = _shape(state, first, 2)[0]
        decoder_width = _shape(state, "decoder.patch_embed.proj.weight", 4)[0]
        decoder_hidden = _shape(state, "decoder.blocks.0.mlp.fc1.weight", 2)[0]
        for name, value in (("encoder", width), ("decoder", decoder_width)):
            if value % _HEAD:
                raise ValueError(f"expected a width of the {name} in heads of {_HEAD}, got {value}")
        patches = self.side**2
        self.encoder = (_Beit3 if beit3 else _Vit)(self.channels, patch, patches, width, hidden, depth)
        self.encoder_post_processor = _Mean(width, latent_size)
        self.decoder = _Vit(latent_size, 1, patches, decoder_width, decoder_hidden, _depth(state, "decoder.blocks."))
        self.decoder_post_processor = _Pixels(decoder_width, patch**2 * self.channels)

    def decode(self, latents: Tensor) -> Tensor:
        return _joined(self.decoder_post_processor(self.decoder(latents)), self.side, self.channels, self.patch)


def _joined(patches: Tensor, side: int, channels: int, patch: int) -> Tensor:
    """[B, side·side, channels·patch·patch] → [B, channels, side·patch, side·patch]."""
    shape = (len(patches), side, side, channels, patch, patch)
    return patches.reshape(shape).permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


class SigmaVaeEncoder(nn.Module):
    def __init__(self, network: SigmaVaeNetwork) -> None:
        super().__init__()
        self.encoder, self.head, self.side = network.encoder, network.encoder_post_processor, network.side

    def forward(self, pixels: Tensor) -> Tensor:
        return self.head(self.encoder(pixels)).transpose(1, 2).unflatten(2, (self.side, self.side))


class SigmaVaeDecoder(nn.Module):
    def __init__(self, network: SigmaVaeNetwork) -> None:
        super().__init__()
        self.decoder, self.head = network.decoder, network.decoder_post_processor
        self.sizes = network.side, network.channels, network.patch

    def forward(self, latents: Tensor) -> Tensor:
        return _joined(self.head(self.decoder(latents)), *self.sizes)


class SigmaVAE:
    """A σ-VAE for encoding to means and decoding; evaluation mode, no gradients. Images have one size, `img_size`.

    Args:
        network: in the dtype and on the device that it runs in.
        config: img_size, patch_size, latent_size, std, encoder_arch and decoder_arch.
        weights_digest: SHA-256 of the tensors as they are stored.
        reload: loads the same weights in float32, for `upcast`.
    """

    has_posterior = False

    def __init__(
        self,
        network: SigmaVaeNetwork,
        config: Mapping[str, Any],
        weights_digest: str,
        reload: Callable[[], Autoencoder],
    ) -> None:
        self.network = network.eval().requires_grad_(False)
        self.config = dict(config)
        self.weights_digest = weights_digest
        self._reload = reload
        self._encoder = SigmaVaeEncoder(self.network).eval()
        self._decoder = SigmaVaeDecoder(self.network).eval()
        self.pixel_channels = network.channels
        self.latent_channels: int = config["latent_size"]
        self.downsample: int = config["patch_size"]
        self.size_multiple: int = config["img_size"]
        self.fixed_size: int | None = config["img_size"]

    def _placed(self, tensor: Tensor) -> Tensor:
        like = self.network.decoder.pos_embed
        return tensor.to(like.device, like.dtype)

    @torch.inference_mode()
    def encode(self, pixels: Tensor) -> Tensor:
        check_size(pixels, self.size_multiple, self.size_multiple)
        return self._encoder(self._placed(pixels)).float()

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> Tensor:
        return self._decoder(self._placed(latents)).float()

    def encoder(self) -> nn.Module:
        return self._encoder

    def decoder(self) -> nn.Module:
        return self._decoder

    def upcast(self) -> Autoencoder:
        return reloaded(self._reload, self.identity())

    def identity(self) -> dict[str, Any]:
        return {"class": "SigmaVAE", "config": dict(sorted(self.config.items())), "weights": self.weights_digest}


def sigma_vae(
    file: Path,
    given: Mapping[str, Any],
    state: Mapping[str, Tensor],
    device: torch.device | str,
    dtype: torch.dtype,
    reload: Callable[[], Autoencoder],
) -> SigmaVAE:
    """The σ-VAE of a checkpoint's `config` and `model`.

    Raises:
        ValueError: the config lacks a size, or the weights are not those of the published architecture.
    """
    config = _checked(file, given)
    try:
        network = SigmaVaeNetwork(config, state)
    except ValueError as error:
        raise ValueError(f"autoencoder: {file}: {error}") from None
    load_into(network, state, file)
    return SigmaVAE(network.to(device, dtype), config, tensors_digest(state), reload)


def _checked(file: Path, given: Mapping[str, Any]) -> dict[str, Any]:
    config = _DEFAULTS | {name: given[name] for name in (*_DEFAULTS, *_REQUIRED) if name in given}
    for name in ("img_size", "patch_size", "latent_size"):
        value = config.get(name)
        if type(value) is not int or value < 1:
            raise ValueError(f"autoencoder: {file}: expected config[{name!r}] of a σ-VAE to be a size, got {value!r}")
    if config["img_size"] % config["patch_size"]:
        raise ValueError(
            f"autoencoder: {file}: expected an img_size in patches of {config['patch_size']}, got {config['img_size']}"
        )
    for name, known in (("encoder_arch", _ENCODERS), ("decoder_arch", _DECODERS)):
        if config[name] not in known:
            raise ValueError(
                f"autoencoder: {file}: expected config[{name!r}] of a σ-VAE to be {' or '.join(known)}, got "
                f"{config[name]!r}"
            )
    if type(config.get("std")) not in (int, float):
        raise ValueError(
            f"autoencoder: {file}: expected config['std'] of a σ-VAE to be a number, got {config.get('std')!r}"
        )
    return config


def _shape(state: Mapping[str, Tensor], name: str, dims: int) -> torch.Size:
    if name not in state or state[name].ndim != dims:
        raise ValueError(f"the weights lack {name!r} of {dims} dimensions: not the published architecture of a σ-VAE")
    return state[name].shape


def _depth(state: Mapping[str, Tensor], stack: str) -> int:
    return len({name.removeprefix(stack).split(".")[0] for name in state if name.startswith(stack)})
