"""Teachers: frozen encoders of clips whose tokens are stored for students. `load_teacher` is the way to all of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastlatent.encoders.clip_protocol import ClipEncoder
from fastlatent.encoders.hub import from_hub, is_hub_id
from fastlatent.encoders.teacher_functions import load_function
from fastlatent.encoders.token_readout import MEAN, STD, Readout, normalize_clips
from fastlatent.encoders.videomae import PUBLISHED, VideoMAE, VideoMAESizes, sine_positions
from fastlatent.encoders.videomae_keys import (
    CONFIG,
    PICKLED,
    SHARDS,
    WEIGHTS,
    encoder_tensors,
    missing,
    read_checkpoint,
)
from fastlatent.encoders.weights import tensors_digest

VIDEOMAE = "videomaev2"
NAMES = (VIDEOMAE, *(f"{VIDEOMAE}-{size}" for size in PUBLISHED))
_ON_HUB = {size: f"OpenGVLab/VideoMAEv2-{size.capitalize()}" for size in ("base", "large", "huge")}
_ON_HUB["giant"] = "OpenGVLab/VideoMAEv2-giant"
_HUB_FILES = (CONFIG, WEIGHTS, SHARDS, WEIGHTS.replace(".safetensors", "-*.safetensors"), PICKLED)
_SMALL_FILE = "vit_s_k710_dl_from_giant.pth"


def load_teacher(
    name: str,
    weights: str | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    layer: int = 0,
    token_norm: str = "none",
    pool: str = "none",
    project_to: int = 0,
    seed: int = 0,
) -> ClipEncoder:
    """Load a teacher.

    Args:
        name: "videomaev2-small", -base, -large, -huge or -giant, and the weights must be of that size; "videomaev2", of
            whatever size; an entry point of the group fastlatent.teachers, or "module:function", for which see
            `teacher_functions`.
        weights: a folder with config.json and weights, a file, or the id of a model on the Hugging Face Hub, whose code
            is never run. None: the published model on the hub.
        dtype: that it runs in; norm, pooling and projection run in float32.
        layer: 1 to the number of blocks: the one whose output is taken, as it is before any norm; 0: the last.
        token_norm, pool, project_to, seed: see `Readout`.

    Raises:
        ValueError: no such teacher; its weights are not found, do not load, do not fit, or are not of that size; or the
            settings are not possible with it.
    """
    device = torch.device(device)
    settings: dict[str, Any] = {"token_norm": token_norm, "pool": pool, "project_to": project_to, "seed": seed}
    if name in NAMES:
        return _videomae(name, _find(name, weights), device, dtype, layer, settings)
    if layer:
        raise ValueError(f"--layer {layer}: teacher {name} gives the tokens that it gives; only {VIDEOMAE} has layers")
    return load_function(name, weights, device, dtype, settings, NAMES)


class VideoMAETeacher:
    """VideoMAE or VideoMAEv2 as a ClipEncoder: rows are tokens [N, D] of one block, numbered time first.

    Raw, they are what the published classes' blocks give: no norm of the checkpoint (norm, fc_norm) is applied.
    """

    payload = "tokens"

    def __init__(
        self, model: VideoMAE, readout: Readout, weights_digest: str, reload: Callable[[], VideoMAETeacher]
    ) -> None:
        sizes = model.sizes
        self.clip: tuple[int, int, int] | None = (sizes.frames, sizes.size, sizes.size)
        self.size_multiple = sizes.patch
        self.sizes, self.layer = sizes, len(model.blocks)
        self.device = model.positions.device
        self._network = nn.Sequential(model, readout).eval().requires_grad_(False)
        self._readout, self._digest, self._reload = readout, weights_digest, reload

    def row_shape(self, frames: int, height: int, width: int) -> tuple[int, ...]:
        if (frames, height, width) != self.clip:
            expected = "{} frames of {}×{}".format(*self.clip or ())
            raise ValueError(f"this teacher takes clips of {expected} only, got {frames} frames of {height}×{width}")
        return self._readout.row_shape(self.sizes.tokens)

    def prepare(self, clips: Tensor) -> Tensor:
        return normalize_clips(clips)

    @torch.inference_mode()
    def encode(self, pixels: Tensor) -> Tensor:
        if pixels.ndim != 5 or pixels.shape[1] != 3:
            raise ValueError(f"expected pixels [B, 3, T, H, W], got {list(pixels.shape)}")
        self.row_shape(*pixels.shape[2:])
        out: Tensor = self._network(pixels.to(self.device, next(self._network.parameters()).dtype))
        return out.float()

    def encoder(self) -> nn.Module:
        """`encode` as a module: pixels in the weights' dtype → rows, in float32 even from half precision."""
        return self._network

    def upcast(self) -> VideoMAETeacher:
        again = self._reload()
        if again.identity() != self.identity():
            raise ValueError("teacher: its files changed since they were loaded; run the command again")
        return again

    def identity(self) -> dict[str, Any]:
        sizes = self.sizes
        return {
            "class": "VideoMAE",
            "sizes": {
                "dim": sizes.dim, "depth": sizes.depth, "heads": sizes.heads, "mlp": sizes.mlp, "patch": sizes.patch,
                "tubelet": sizes.tubelet, "eps": sizes.eps,
            },
            "clip": list(self.clip or ()),
            "layer": self.layer,
            **self._readout.identity(),
            "mean": list(MEAN),
            "std": list(STD),
            "weights": self._digest,
        }  # fmt: skip


def _videomae(
    name: str, path: Path, device: torch.device, dtype: torch.dtype, layer: int, settings: dict[str, Any]
) -> VideoMAETeacher:
    sizes, tensors = encoder_tensors(read_checkpoint(path))
    _check_name(name, sizes, path)
    if not 0 <= layer <= sizes.depth:
        raise ValueError(f"--layer: {name} has blocks 1 to {sizes.depth} (0: the last), got {layer}")
    readout = Readout(sizes.dim, sizes.grid[0], **settings)
    with torch.device("meta"):
        model = VideoMAE(sizes, layer)
    used = {key: tensors[key] for key in model.state_dict() if key in tensors}
    # Of the tensors that are used, by one name in every layout, in the dtype that they are stored in.
    digest = tensors_digest(used)
    state = {key: tensor.to(device, dtype) for key, tensor in used.items()}
    broken = [key for key, tensor in state.items() if not tensor.isfinite().all()]
    if broken:
        raise ValueError(
            f"teacher: the weights in {path} hold NaN or infinity in {str(dtype)[6:]}: {', '.join(broken[:3])} "
            f"({len(broken)} in all)"
        )
    if not sizes.learned_positions:
        state["positions"] = sine_positions(sizes.tokens, sizes.dim).to(device, dtype)
    model.load_state_dict(state, assign=True)
    return VideoMAETeacher(
        model, readout.to(device), digest, lambda: _videomae(name, path, device, torch.float32, layer, settings)
    )


def _check_name(name: str, sizes: VideoMAESizes, path: Path) -> None:
    """ValueError unless the weights are of the size that the name says."""

    def told(sizes: VideoMAESizes) -> dict[str, int]:
        return {key: getattr(sizes, key) for key in ("dim", "depth", "heads", "mlp", "patch", "tubelet")}

    if name == VIDEOMAE:
        return
    want, got = told(PUBLISHED[name.removeprefix(f"{VIDEOMAE}-")]), told(sizes)
    if want != got:
        is_named = next((f"{VIDEOMAE}-{size}" for size, one in PUBLISHED.items() if told(one) == got), "none of them")
        wants, gots = (", ".join(f"{key} {value}" for key, value in one.items()) for one in (want, got))
        raise ValueError(
            f"--teacher {name} is of {wants}; the weights in {path} are of {gots} ({is_named}): name the teacher that "
            f"they are, or {VIDEOMAE} for weights of any size"
        )


def _find(name: str, weights: str | None) -> Path:
    """Where the weights are, downloaded if need be."""
    size = name.removeprefix(VIDEOMAE).removeprefix("-")
    looked: list[str] = []
    if weights is not None:
        path = Path(weights).expanduser()
        if path.exists():
            return path
        looked.append(f"{path.absolute()}: does not exist")
        model = weights if is_hub_id(weights) and "/" in weights else None
    else:
        model = _ON_HUB.get(size)
        if size == "small":
            raise ValueError(
                f"--teacher {name} is on no hub: download {_SMALL_FILE} from the model zoo of the VideoMAEv2 project "
                "and name the file with --teacher-weights"
            )
        if model is None:
            raise ValueError(
                f"--teacher {name} says no size: name one ({', '.join(NAMES[1:])}), or its file or folder with "
                "--teacher-weights"
            )
    if model is not None:
        found = from_hub(model, looked, files=_HUB_FILES, missing=missing)
        if found is not None:
            return found
    places = "\n  ".join(looked)
    raise ValueError(
        f"no weights of the teacher {name} were found; looked at\n  {places}\nname a folder or a file with "
        "--teacher-weights, or download them where there is a network"
    )
