"""Every image autoencoder of diffusers behind the Autoencoder protocol: one adapter, one row each for what differs."""

from __future__ import annotations

import copy
import json
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fastlatent.encoders.protocol import Autoencoder
from fastlatent.encoders.weights import reloaded, tensors_digest
from fastlatent.pipeline.checkpoints import resolve

WEIGHTS = "diffusion_pytorch_model.safetensors"
SHARDS = WEIGHTS + ".index.json"
# Config entries of the model that is trained on the latents; they change no byte of the output.
_SCALING = {"scaling_factor", "shift_factor", "latents_mean", "latents_std"}
# Parts that encoding does not use; an exported encoder leaves them out.
_DECODING = ("decoder", "post_quant_conv", "decoder_unet", "quantize", "bn")

Config = Mapping[str, Any]


def _halvings(name: str) -> Callable[[Config], int]:
    return lambda config: 2 ** (len(config[name]) - 1)


_LEVELS = _halvings("block_out_channels")


@dataclass(frozen=True)
class Kind:
    """What a class of autoencoders does its own way.

    downsample: pixels per latent. pixels, latents: their channels. All three from the config.
    posterior: it encodes to a Gaussian, not to a latent. frames: images are videos of one frame [B, C, 1, H, W].
    patch: latents are taken together in squares of this side. fixed_size: the one size of its images.
    scaled: what is elsewhere left to the model trained on the latents changes its output. unit_range: pixels in [0, 1].
    noisy: it decodes with noise, which is drawn with seed 0 for each call.
    """

    downsample: Callable[[Config], int] = _LEVELS
    pixels: Callable[[Config], int] = itemgetter("in_channels")
    latents: Callable[[Config], int] = itemgetter("latent_channels")
    posterior: bool = True
    frames: bool = False
    patch: Callable[[Config], int] = lambda config: 1
    fixed_size: Callable[[Config], int | None] = lambda config: None
    scaled: bool = False
    unit_range: bool = False
    noisy: bool = False


def _rae_size(config: Config) -> int:
    return config["encoder_input_size"] // config["encoder_patch_size"] * config["patch_size"]


KINDS: dict[str, Kind] = {
    "AutoencoderKL": Kind(),
    "AsymmetricAutoencoderKL": Kind(_halvings("down_block_out_channels")),
    "AutoencoderTiny": Kind(_halvings("encoder_block_out_channels"), posterior=False),
    "AutoencoderDC": Kind(_halvings("encoder_block_out_channels"), posterior=False),
    "AutoencoderKLFlux2": Kind(patch=lambda config: config["patch_size"][0]),
    "AutoencoderKLHunyuanImage": Kind(itemgetter("spatial_compression_ratio")),
    "AutoencoderKLHunyuanImageRefiner": Kind(itemgetter("spatial_compression_ratio"), frames=True),
    "AutoencoderKLKVAE": Kind(_halvings("ch_mult"), latents=itemgetter("z_channels")),
    "AutoencoderKLQwenImage": Kind(
        _halvings("dim_mult"), itemgetter("input_channels"), itemgetter("z_dim"), frames=True
    ),
    "AutoencoderKLQwenImage21": Kind(
        lambda config: 2 ** (len(config["dim_mult"]) - 1) * (config["patch_size"] or 1),
        lambda config: config["in_channels"] // (config["patch_size"] or 1) ** 2, itemgetter("z_dim"), frames=True,
    ),
    "AutoencoderRAE": Kind(
        itemgetter("patch_size"), itemgetter("num_channels"), itemgetter("encoder_hidden_size"),
        posterior=False, fixed_size=_rae_size, scaled=True, unit_range=True,
    ),
    "ConsistencyDecoderVAE": Kind(
        _halvings("encoder_block_out_channels"), itemgetter("encoder_in_channels"), scaled=True, noisy=True
    ),
    # The latents before quantisation; `decode` quantises.
    "VQModel": Kind(
        latents=lambda config: config["vq_embed_dim"] or config["latent_channels"], posterior=False
    ),
}  # fmt: skip

_VIDEO = "it compresses time: it is made for videos, not for images"
_SOUND = "it is made for sound, not for images"
REFUSED: dict[str, str] = {
    **dict.fromkeys(
        (
            "AutoencoderKLAllegro", "AutoencoderKLCogVideoX", "AutoencoderKLCosmos", "AutoencoderKLHunyuanVideo",
            "AutoencoderKLHunyuanVideo15", "AutoencoderKLKVAEVideo", "AutoencoderKLLTX2Video", "AutoencoderKLLTXVideo",
            "AutoencoderKLMagvit", "AutoencoderKLMiniMaxH3", "AutoencoderKLMochi", "AutoencoderKLWan",
            "AutoencoderVidTok", "Kandinsky6SRVAE",
        ),
        _VIDEO,
    ),
    **dict.fromkeys(
        (
            "AutoencoderKLKVAEAudio", "AutoencoderKLLTX2Audio", "AutoencoderKLMiniMaxH3Audio", "AutoencoderOobleck",
            "AutoencoderSAME", "AceStepAudioTokenizer", "Cosmos3AVAEAudioTokenizer", "LongCatAudioDiTVae", "MMAudioVAE",
        ),
        _SOUND,
    ),
    "AutoencoderKLTemporalDecoder": "its decoder mixes the frames of a video (its encoder is that of Stable Diffusion: "
    "name that AutoencoderKL)",
    "RFD4ProteinaAutoencoder": "it is made for molecules, not for images",
}  # fmt: skip


class ImageEncoder(nn.Module):
    """pixels [B, channels, H, W] in [−1, 1] → mean‖logvar [B, 2C, h, w] or latents [B, C, h, w], dtype of the weights.

    Shares the weights of `model`, without the parts that decode.
    """

    def __init__(self, model: Any, kind: Kind) -> None:
        super().__init__()
        self.model: Any = copy.copy(model)
        self.model._modules = {
            name: nn.Identity() if name in _DECODING else part for name, part in model._modules.items()
        }
        for part in self.model.modules():
            if hasattr(part, "add_temporal_downsample"):  # a numpy.bool here, which torch.compile takes for data
                part.add_temporal_downsample = bool(part.add_temporal_downsample)
        self.kind = kind
        self.opaque: bool = kind.pixels(model.config) == 4

    def forward(self, pixels: Tensor) -> Tensor:
        if self.opaque:
            pixels = torch.cat([pixels, torch.ones_like(pixels[:, :1])], 1)
        if self.kind.unit_range:
            pixels = pixels * 0.5 + 0.5
        if self.kind.frames:
            pixels = pixels.unsqueeze(2)
        encoded = self.model.encode(pixels, return_dict=False)[0]
        if self.kind.posterior:
            encoded = torch.cat([encoded.mean, encoded.logvar], 1)
        return encoded.squeeze(2) if self.kind.frames else encoded


class DiffusersAutoencoder:
    """An image autoencoder of diffusers for encoding and decoding; evaluation mode, no gradients.

    One with four pixel channels (Qwen-Image's for layers) is given opaque RGB, and its alpha is left out.

    Args:
        model: of a class in KINDS, in the dtype and on the device that it runs in.
        weights_digest: SHA-256 of the tensors as they are stored, whatever dtype the model runs in.
        reload: loads the same weights in float32, for `upcast`.
        force_upcast: its config says that it was made for float32.
    """

    def __init__(
        self,
        model: Any,
        weights_digest: str,
        reload: Callable[[], Autoencoder],
        force_upcast: bool = False,
    ) -> None:
        self.kind = KINDS[type(model).__name__]
        self.model = model.eval().requires_grad_(False)
        self.weights_digest = weights_digest
        self.force_upcast = force_upcast
        self._reload = reload
        config = model.config
        channels = self.kind.pixels(config)
        self.pixel_channels = 3 if channels == 4 else channels
        self.latent_channels = self.kind.latents(config)
        self.downsample = self.kind.downsample(config)
        self.fixed_size = self.kind.fixed_size(config)
        self.size_multiple = self.fixed_size or self.downsample * self.kind.patch(config)
        self.has_posterior = self.kind.posterior
        self._encoder = ImageEncoder(self.model, self.kind).eval()

    @torch.inference_mode()
    def encode(self, pixels: Tensor) -> Tensor:
        check_size(pixels, self.size_multiple, self.fixed_size)
        return self._encoder(pixels.to(self.model.device, self.model.dtype)).float()

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> Tensor:
        latents = latents.to(self.model.device, self.model.dtype)
        if self.kind.frames:
            latents = latents.unsqueeze(2)
        seeded = {"generator": torch.Generator().manual_seed(0)} if self.kind.noisy else {}
        pixels = self.model.decode(latents, **seeded).sample.float()
        if self.kind.frames:
            pixels = pixels.squeeze(2)
        if self.kind.unit_range:
            pixels = pixels * 2 - 1
        return pixels[:, : self.pixel_channels]

    def encoder(self) -> nn.Module:
        return self._encoder

    def upcast(self) -> Autoencoder:
        return reloaded(self._reload, self.identity())

    def identity(self) -> dict[str, Any]:
        # diffusers' own notes begin with an underscore: paths, versions, and a list whose order changes by process.
        left_out = set() if self.kind.scaled else _SCALING
        config = {k: v for k, v in self.model.config.items() if k not in left_out and not k.startswith("_")}
        return {
            "class": type(self.model).__name__,
            "config": json.loads(json.dumps(config, sort_keys=True)),
            "weights": self.weights_digest,
        }


def check_size(pixels: Tensor, multiple: int, fixed: int | None) -> None:
    """ValueError unless H and W are multiples of `multiple`, or the `fixed` size."""
    height, width = pixels.shape[-2:]
    if fixed and (height, width) != (fixed, fixed):
        raise ValueError(f"this autoencoder encodes images of {fixed}×{fixed} only, got {height}×{width}")
    if height % multiple or width % multiple:
        raise ValueError(f"this autoencoder needs sides that are multiples of {multiple}, got {height}×{width}")


# diffusers loads under a patch of torch that accelerate puts on and off again: two threads at once leave it on, and
# from then on every weight of this process is made on "meta".
_LOADING = threading.Lock()


def load_folder(path: Path, device: torch.device | str, dtype: torch.dtype) -> DiffusersAutoencoder:
    """Load a folder with config.json and weights (in one file or in shards), or the newest checkpoint of a run.

    Raises:
        ValueError: the folder is not there, its class is not for images, or its weights do not fit its config.
    """
    folder = path if (path / SHARDS).is_file() else resolve(path, WEIGHTS, "autoencoder")
    config = _read_json(folder / "config.json")
    model_class = _model_class(folder, config.get("_class_name") if isinstance(config, dict) else None)
    try:
        with _LOADING:
            model, info = model_class.from_pretrained(
                folder, local_files_only=True, torch_dtype=dtype, output_loading_info=True
            )
        digest = tensors_digest(_stored(folder))
    except Exception as error:  # diffusers and safetensors raise many kinds; every one means this folder is unusable
        raise ValueError(f"autoencoder: {folder} does not load: {' '.join(str(error).split())[:300]}") from error
    # diffusers fills what is missing with random numbers and only warns.
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[what]:
            raise ValueError(
                f"autoencoder: {folder / WEIGHTS} does not fit its config.json: {what} "
                f"{sorted(map(str, info[what]))[:3]}"
            )
    _check_config(folder, model)
    return DiffusersAutoencoder(
        model.to(device), digest, lambda: load_folder(folder, device, torch.float32), config.get("force_upcast") is True
    )


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"autoencoder: {file} is not JSON: {error}") from None


def _model_class(folder: Path, name: Any) -> Any:
    supported = f"Image autoencoders are {', '.join(sorted(KINDS))}"
    if name in REFUSED:
        raise ValueError(f"autoencoder: {folder} holds a {name}, and {REFUSED[name]}. {supported}")
    if name not in KINDS:
        raise ValueError(
            f"autoencoder: expected {folder}/config.json of an image autoencoder, got _class_name {name!r}. {supported}"
        )
    if name == "AutoencoderRAE":
        try:
            import transformers  # noqa: F401
        except ImportError:
            raise ValueError(f"autoencoder: {name} needs transformers: pip install fastlatent[text]") from None
    try:
        return getattr(diffusers, name)
    except AttributeError:
        raise ValueError(
            f"autoencoder: {name} is not in diffusers {diffusers.__version__}; install a newer one"
        ) from None


def _stored(folder: Path) -> dict[str, Tensor]:
    """All tensors of the folder, whether they lie in one file or in shards."""
    if not (folder / SHARDS).is_file():
        return load_file(folder / WEIGHTS)
    files = set(_read_json(folder / SHARDS)["weight_map"].values())
    return {name: tensor for file in sorted(files) for name, tensor in load_file(folder / file).items()}


def _check_config(folder: Path, model: Any) -> None:
    channels = KINDS[type(model).__name__].pixels(model.config)
    if channels not in (1, 3, 4):
        raise ValueError(
            f"autoencoder: {folder}: expected 1 (grey), 3 (RGB) or 4 (RGBA) pixel channels, got {channels}"
        )
    if model.config.get("reshape_to_2d") is False:
        raise ValueError(f"autoencoder: {folder}: expected latents on a grid: set reshape_to_2d to true in config.json")
