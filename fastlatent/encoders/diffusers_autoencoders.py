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
SCALING = {"scaling_factor", "shift_factor", "latents_mean", "latents_std"}
# Parts that the other direction does not use; an exported encoder or decoder leaves them out.
_DECODING = ("decoder", "post_quant_conv", "decoder_unet", "quantize", "bn")
_ENCODING = ("encoder", "quant_conv", "bn")

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

_VIDEO = "it compresses time: it is made for videos, whose latents `fastlatent decode` decodes"
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
    "AutoencoderKLTemporalDecoder": "it mixes the frames of a video, whose latents `fastlatent decode` decodes "
    "(its encoder is that of Stable Diffusion: name that AutoencoderKL)",
    "RFD4ProteinaAutoencoder": "it is made for molecules, not for images",
}  # fmt: skip


class ImageEncoder(nn.Module):
    """pixels [B, channels, H, W] in [−1, 1] → mean‖logvar [B, 2C, h, w] or latents [B, C, h, w], dtype of the weights.

    Shares the weights of `model`, without the parts that decode.
    """

    def __init__(self, model: Any, kind: Kind) -> None:
        super().__init__()
        self.model = _without(model, _DECODING)
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


class ImageDecoder(nn.Module):
    """latents [B, C, h, w] → pixels [B, channels, H, W], nominally in [−1, 1], dtype of the weights.

    Shares the weights of `model`, without the parts that encode. Not for noisy kinds.
    """

    def __init__(self, model: Any, kind: Kind) -> None:
        super().__init__()
        assert not kind.noisy
        self.model = _without(model, _ENCODING)
        self.kind, self.channels = kind, _pixel_channels(model, kind)

    def forward(self, latents: Tensor) -> Tensor:
        return _pixels(self.model, self.kind, latents)[:, : self.channels].to(latents.dtype)


def _without(model: Any, parts: tuple[str, ...]) -> Any:
    """`model` with the same weights, and nothing in the place of `parts`."""
    some = copy.copy(model)
    some._modules = {name: nn.Identity() if name in parts else part for name, part in model._modules.items()}
    for part in some.modules():
        for name in ("add_temporal_downsample", "add_temporal_upsample"):
            if hasattr(part, name):  # a numpy.bool here, which torch.compile takes for data
                setattr(part, name, bool(getattr(part, name)))
    return some


def _pixels(model: Any, kind: Kind, latents: Tensor, **options: Any) -> Tensor:
    """What `model` decodes from latents in its dtype, as float32 pixels. options: of its decode."""
    if kind.frames:
        latents = latents.unsqueeze(2)
    pixels: Tensor = model.decode(latents, return_dict=False, **options)[0].float()
    if kind.frames:
        pixels = pixels.squeeze(2)
    if kind.unit_range:
        pixels = pixels * 2 - 1
    return pixels


def _pixel_channels(model: Any, kind: Kind) -> int:
    """Without alpha."""
    channels = kind.pixels(model.config)
    return 3 if channels == 4 else channels


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
        self.pixel_channels = _pixel_channels(model, self.kind)
        self.latent_channels = self.kind.latents(config)
        self.downsample = self.kind.downsample(config)
        self.fixed_size = self.kind.fixed_size(config)
        self.size_multiple = self.fixed_size or self.downsample * self.kind.patch(config)
        self.has_posterior = self.kind.posterior
        self._encoder = ImageEncoder(self.model, self.kind).eval()
        self._decoder = None if self.kind.noisy else ImageDecoder(self.model, self.kind).eval()

    @torch.inference_mode()
    def encode(self, pixels: Tensor) -> Tensor:
        check_size(pixels, self.size_multiple, self.fixed_size)
        return self._encoder(pixels.to(self.model.device, self.model.dtype)).float()

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> Tensor:
        seeded = {"generator": torch.Generator().manual_seed(0)} if self.kind.noisy else {}
        latents = latents.to(self.model.device, self.model.dtype)
        return _pixels(self.model, self.kind, latents, **seeded)[:, : self.pixel_channels]

    def encoder(self) -> nn.Module:
        return self._encoder

    def decoder(self) -> nn.Module:
        if self._decoder is None:
            raise ValueError(
                f"autoencoder: {type(self.model).__name__} draws noise to decode, which no engine can; use its decode()"
            )
        return self._decoder

    def upcast(self) -> Autoencoder:
        return reloaded(self._reload, self.identity())

    def identity(self) -> dict[str, Any]:
        return identity_of(self.model, self.weights_digest, set() if self.kind.scaled else SCALING)


def identity_of(model: Any, weights_digest: str, left_out: set[str]) -> dict[str, Any]:
    """Class, config but for the entries `left_out`, and weights of a model."""
    # diffusers' own notes begin with an underscore: paths, versions, and a list whose order changes by process.
    config = {k: v for k, v in model.config.items() if k not in left_out and not k.startswith("_")}
    return {
        "class": type(model).__name__,
        "config": json.loads(json.dumps(config, sort_keys=True)),
        "weights": weights_digest,
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
LOADING = threading.Lock()


def load_folder(path: Path, device: torch.device | str, dtype: torch.dtype) -> DiffusersAutoencoder:
    """Load a folder with config.json and weights (in one file or in shards), or the newest checkpoint of a run.

    Raises:
        ValueError: the folder is not there, its class is not for images, or its weights do not fit its config.
    """
    folder = weights_folder(path)
    config = read_config(folder)
    model, stored = load_weights(folder, _model_class(folder, config.get("_class_name")), dtype)
    _check_config(folder, model)
    return DiffusersAutoencoder(
        model.to(device),
        tensors_digest(stored),
        lambda: load_folder(folder, device, torch.float32),
        config.get("force_upcast") is True,
    )


def weights_folder(path: Path) -> Path:
    """The folder that holds config.json and the weights: `path`, or the newest checkpoint of the run `path`."""
    return path if (path / SHARDS).is_file() else resolve(path, WEIGHTS, "autoencoder")


def load_weights(folder: Path, model_class: Any, dtype: torch.dtype) -> tuple[Any, dict[str, Tensor]]:
    """The model of a folder in `dtype`, and its tensors as they are stored. ValueError unless they fit exactly."""
    try:
        with LOADING:
            model, info = model_class.from_pretrained(
                folder, local_files_only=True, torch_dtype=dtype, output_loading_info=True
            )
        stored = _stored(folder)
    except Exception as error:  # diffusers and safetensors raise many kinds; every one means this folder is unusable
        raise ValueError(f"autoencoder: {folder} does not load: {' '.join(str(error).split())[:300]}") from error
    # diffusers fills what is missing with random numbers and only warns.
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[what]:
            raise ValueError(
                f"autoencoder: {folder / WEIGHTS} does not fit its config.json: {what} "
                f"{sorted(map(str, info[what]))[:3]}"
            )
    return model, stored


def read_config(folder: Path, name: str = "config.json") -> dict[str, Any]:
    """The config of a folder, empty if it is no object; ValueError unless it is JSON."""
    config = _read_json(folder / name)
    return config if isinstance(config, dict) else {}


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
    return diffusers_class(name)


def diffusers_class(name: str) -> Any:
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
