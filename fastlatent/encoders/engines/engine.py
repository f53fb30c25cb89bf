"""Engines: ways to run an autoencoder's encoder or decoder, or a teacher of clips, on batches of fixed shapes, all with
the same result up to rounding."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from fastlatent.encoders.clip_protocol import ClipEncoder
from fastlatent.encoders.engines.compiled import OPTIONS, compile_ahead, compile_module
from fastlatent.encoders.engines.numerics import numerics, relative_error
from fastlatent.encoders.engines.onnx_export import OPSET
from fastlatent.encoders.engines.tensorrt import BUILDER, import_tensorrt, load_plan
from fastlatent.encoders.fused_norms import fuse_norms
from fastlatent.encoders.protocol import Autoencoder

ENGINES = ("eager", "compile", "aoti", "tensorrt")
Shape = tuple[int, ...]  # B, C, H, W; of clips B, C, T, H, W

# |engine − eager| / |eager| above which an engine is refused. In bfloat16 each of the two is about 1 % from float32, in
# float16 an eighth of that; four times both together.
LIMITS = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.06, torch.float16: 0.0075}

# What each half of an autoencoder takes.
TAKES = {"encoder": "pixels", "decoder": "latents"}


class Engine:
    """An encoder or a decoder ready to run; made by `open_engine` or `open_decoder`.

    name: of the engine, one of ENGINES. half: "encoder" or "decoder".
    """

    def __init__(
        self, name: str, half: str, runs: dict[Shape, Callable[[Tensor], Tensor]], dtype: torch.dtype,
        device: torch.device | None, settings: dict[str, Any],
    ) -> None:  # fmt: skip
        """dtype, device: of what runs take; None: they move it themselves."""
        self.name, self.half = name, half
        self._runs = runs
        self._dtype, self._device = dtype, device
        self._settings = settings

    def encode(self, pixels: Tensor) -> Tensor:
        """float [B, C, H, W] in [−1, 1], on the device → float32 moments or latents [B, 2C | C, h, w] there.

        Of a ClipEncoder, what its `prepare` gives, [B, 3, T, H, W] → float32 [B, *row_shape].

        Asynchronous on CUDA. The same input gives the same bytes.

        Raises:
            ValueError: a shape that the engine was not opened for, or another device.
        """
        assert self.half == "encoder"
        return self._run(pixels)

    def decode(self, latents: Tensor) -> Tensor:
        """float [B, C, h, w], on the device → float32 pixels [B, channels, H, W] there, nominally in [−1, 1].

        Otherwise as `encode`.
        """
        assert self.half == "decoder"
        return self._run(latents)

    @torch.inference_mode(False)
    @torch.no_grad()
    def _run(self, inputs: Tensor) -> Tensor:
        run, takes = self._runs.get(tuple(inputs.shape)), TAKES[self.half]
        if run is None:
            shapes = ", ".join(map(str, self._runs)) or "none, it is closed"
            raise ValueError(f"engine {self.name}: expected {takes} of shape {shapes}; got {tuple(inputs.shape)}")
        if self._device not in (None, inputs.device):
            raise ValueError(f"engine {self.name}: expected {takes} on {self._device}, got {inputs.device}")
        inputs = inputs.to(self._dtype).contiguous(memory_format=_format(self.name, inputs.ndim))
        if inputs.is_inference():  # to Dynamo another kind of tensor: it would compile once more
            inputs = inputs.clone()
        out = run(inputs)
        # Always a copy: a CUDA graph writes its next result over this one.
        return out.to(torch.float32, memory_format=torch.contiguous_format, copy=True)

    def settings(self) -> dict[str, Any]:
        """What changes the engine's bytes, besides autoencoder, device, dtype, shapes and threads: for provenance."""
        return self._settings

    def close(self) -> None:
        """Free what it holds on the device."""
        self._runs.clear()


def open_engine(
    name: str, vae: Autoencoder | ClipEncoder, *, shapes: tuple[Shape, ...], cache: str | Path, fuse: bool = False
) -> Engine:
    """Make everything ready to encode batches of the given shapes with the weights as they are now.

    Call `fix_numerics` before. Every shape is compiled, or loaded, and compared with eager here, on noise: nothing of
    that is left for the first batch.

    eager     the modules as they are. channels_last, on CUDA for its convolutions, on the CPU since the encoder of
              Stable Diffusion takes 3 to 14 % less time with it at 128² and 256², float32 and bfloat16, 1 and 2 threads
              (AMD EPYC with AVX-512)
    compile   torch.compile of the whole encoder; as a CUDA graph on CUDA
    aoti      the same compiler ahead of time, into a package in `cache` that later runs load
    tensorrt  TensorRT by way of ONNX, its plan in `cache`; CUDA only, and not for clips

    Clips are contiguous everywhere, and `eager` is the encoder's own `encode`: it copies no weights.

    Args:
        shapes: (B, C, H, W), or (B, 3, T, H, W) of a ClipEncoder; one for each bucket. A batch that is not full is
            padded by the caller.
        cache: folder for packages and plans; whoever can write there can run code here.
        fuse: GroupNorm and SiLU as one op of ours, in `eager` and `compile`. On the CPU that changes the time of the
            whole encoder by less than its noise (under 10 %), and halves the error of float32: torch's GroupNorm loses
            digits in channels_last (3e-6 from float64 at 128², 1.5e-6 with ours, 1e-6 in torch's other layout).

    Raises:
        ValueError: an unknown engine, no shape, one that does not fit the encoder, a library that is missing, a
            compiler that fails, or a result that is not eager's; a ClipEncoder that runs eagerly only.
    """
    return _opened(name, "encoder", vae, shapes, Path(cache), fuse)


def open_decoder(
    name: str, vae: Autoencoder, *, shapes: tuple[Shape, ...], cache: str | Path, fuse: bool = False
) -> Engine:
    """`open_engine` for the other direction: shapes are those of latents, (B, latent channels, h, w).

    Raises:
        ValueError: as `open_engine`, and where the autoencoder draws noise to decode.
    """
    return _opened(name, "decoder", vae, shapes, Path(cache), fuse)


def _opened(name: str, half: str, vae: Any, shapes: tuple[Shape, ...], cache: Path, fuse: bool) -> Engine:
    if name not in ENGINES:
        raise ValueError(f"--engine: expected one of {', '.join(ENGINES)}, got {name!r}")
    if fuse and name not in ("eager", "compile"):
        raise ValueError(f"--engine {name}: its network cannot hold the fused GroupNorm; only eager and compile can")
    if _takes_clips(vae):
        _check_clips(name, fuse, shapes, vae)
        if name == "eager":
            # Both kinds of teachers have a device; VideoClipEncoder is not opened here.
            settings = engine_settings(name, torch.device(getattr(vae, "device", "cpu")), clips=True)
            return Engine(name, half, dict.fromkeys(shapes, vae.encode), torch.float32, None, settings)
        return _built(name, half, vae.encoder(), shapes, cache, vae.identity())
    _check(half, shapes, vae)
    network = vae.encoder() if half == "encoder" else vae.decoder()
    return _built(name, half, network, shapes, cache, vae.identity(), fuse)


def _built(
    name: str, half: str, network: nn.Module, shapes: tuple[Shape, ...], cache: Path, identity: dict[str, Any],
    fuse: bool = False,
) -> Engine:  # fmt: skip
    weight = next(network.parameters())
    if name == "tensorrt" and weight.device.type != "cuda":
        raise ValueError("--engine tensorrt: needs a CUDA device; use --engine eager on the CPU")
    clips = len(shapes[0]) == 5
    settings = engine_settings(name, weight.device, fuse=fuse, clips=clips)
    # A copy: the layout of the autoencoder's own weights changes the last bits of what it encodes and decodes.
    module = copy.deepcopy(network).eval().requires_grad_(False)
    for parameter in module.parameters():
        if parameter.ndim == 4:  # Module.to(memory_format=...) fails on the kernels of 3-D convolutions
            parameter.data = parameter.data.contiguous(memory_format=_format(name))
    if fuse:
        fuse_norms(module)
    runs: dict[Shape, Callable[[Tensor], Tensor]] = {}
    pool = torch.cuda.graph_pool_handle() if weight.is_cuda and name == "compile" else None
    for shape in dict.fromkeys(shapes):
        inputs = _noise(shape, weight).contiguous(memory_format=_format(name, len(shape)))
        with torch.inference_mode(False), torch.no_grad():
            runs[shape] = _open(name, half, module, inputs, identity, cache, settings, pool)
            if name != "eager":
                _compare(name, runs[shape](inputs), module, inputs)
    return Engine(name, half, runs, weight.dtype, weight.device, settings)


def _open(
    name: str,
    half: str,
    module: nn.Module,
    inputs: Tensor,
    identity: dict[str, Any],
    cache: Path,
    settings: dict[str, Any],
    pool: Any,
) -> Callable[[Tensor], Tensor]:
    if name == "eager":
        return module
    if name == "tensorrt":
        run, digest = load_plan(module, inputs, cache)
        settings.setdefault("plans", {})["x".join(map(str, inputs.shape))] = digest
        return run
    try:
        return (
            compile_module(module, inputs, pool)
            if name == "compile"
            else compile_ahead(module, (inputs,), cache, identity)
        )
    except (OSError, torch.OutOfMemoryError):  # a full disk and a full GPU say so themselves
        raise
    except Exception as error:  # Dynamo, export, Inductor and the C++ compiler raise many kinds
        text = " ".join(str(error).split())[:300]
        raise ValueError(f"--engine {name}: compiling the {half} failed: {text}; use --engine eager") from error


def engine_settings(name: str, device: torch.device, *, fuse: bool = False, clips: bool = False) -> dict[str, Any]:
    """`Engine.settings` of an engine that is not open yet; TensorRT's are known only then, and name its plans too.

    clips: of a ClipEncoder.
    """
    memory_format = _format(name, 5 if clips else 4)
    settings: dict[str, Any] = {"name": name, "memory_format": str(memory_format).removeprefix("torch.")}
    settings |= {**numerics(device), **({"fused_norms": True} if fuse else {})}
    if name == "tensorrt":
        return {**settings, "tensorrt": import_tensorrt().__version__, "builder": BUILDER, "opset": OPSET}
    return settings if name == "eager" else {**settings, "options": OPTIONS}


def _format(name: str, dimensions: int = 4) -> torch.memory_format:
    return torch.contiguous_format if name == "tensorrt" or dimensions != 4 else torch.channels_last


def _takes_clips(vae: Any) -> TypeGuard[ClipEncoder]:
    return hasattr(vae, "row_shape")


def _check_clips(name: str, fuse: bool, shapes: tuple[Shape, ...], encoder: ClipEncoder) -> None:
    if name == "tensorrt" or fuse:
        what = "clips" if name == "tensorrt" else "clips with fused norms"
        raise ValueError(f"--engine {name}: not for {what}; use eager, compile or aoti")
    if not shapes:
        raise ValueError("engine: expected one or more shapes (B, 3, T, H, W), got none")
    for shape in shapes:
        if len(shape) != 5 or min(shape) < 1 or shape[1] != 3:
            raise ValueError(f"engine: expected shapes (B, 3, T, H, W), got {shape}")
        encoder.row_shape(*shape[2:])


def _check(half: str, shapes: tuple[Shape, ...], vae: Autoencoder) -> None:
    if not shapes:
        raise ValueError("engine: expected one or more shapes (B, C, H, W), got none")
    channels, sides = (vae.pixel_channels, "H, W") if half == "encoder" else (vae.latent_channels, "h, w")
    for shape in shapes:
        if len(shape) != 4 or min(shape) < 1 or shape[1] != channels:
            raise ValueError(f"engine: expected shapes (B, {channels}, {sides}), got {shape}")
        if half == "decoder":
            side = vae.fixed_size and vae.fixed_size // vae.downsample
            if side and shape[2:] != (side, side):
                raise ValueError(f"engine: this autoencoder needs latents of {side}×{side}, got {shape}")
        elif shape[2] % vae.size_multiple or shape[3] % vae.size_multiple:
            raise ValueError(f"engine: this autoencoder needs sides divisible by {vae.size_multiple}, got {shape}")


def _noise(shape: Shape, weight: Tensor) -> Tensor:
    """Values in [−1, 1], the same everywhere."""
    noise = torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return noise.to(weight.device, weight.dtype)


def _compare(name: str, got: Tensor, module: nn.Module, inputs: Tensor) -> None:
    """The first and the last row of the batch against eager, one by one: eager needs more memory than the engine."""
    for row in sorted({0, len(inputs) - 1}):
        want = module(inputs[row : row + 1].contiguous(memory_format=_format(name, inputs.ndim)))
        error, limit = relative_error(got[row : row + 1], want), LIMITS[inputs.dtype]
        if not error <= limit:  # NaN is above
            raise ValueError(
                f"--engine {name}: differs from eager by {error:.2g} (relative) on {str(inputs.dtype)[6:]} "
                f"{tuple(inputs.shape)}, expected at most {limit:g}; use --engine eager"
            )
