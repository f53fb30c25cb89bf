"""Checkpoints as the published LatentLM training script writes them with accelerate or DeepSpeed: no sizes, no names.

Of the Transformer or of the DiT, which pos_embed tells apart.

`checkpoint-{step}/` holds model.safetensors, or pytorch_model/mp_rank_00_model_states.pt with the weights under
"module"; and other_state.pth = {scaling_factor, bias_factor, steps, ema}. `RUN/latest` holds the path of the newest.
Model latents are (raw + bias_factor)·scaling_factor. Files are read without pickle.
"""

from __future__ import annotations

import json
import math
import pickle
import re
import shlex
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeGuard

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastlatent.heads.latentlm import ffn_width
from fastlatent.models.dit import DIT_SIZES, MLP_RATIO
from fastlatent.models.transformer import MAX_SIZE, SIZES
from fastlatent.pipeline.checkpoints import checkpoints

WEIGHTS = "model.safetensors"
DEEPSPEED = "pytorch_model/mp_rank_00_model_states.pt"
OTHER_STATE = "other_state.pth"

_LIGHTNING = "SynthLM main, another architecture: norms with weights, qk-norm, another RoPE and another FFN"
# Keys that only that architecture has.
_LIGHTNING_KEYS = ("input_embedder", "noisy_input_embedder", "time_embedder", "label_embedder")
# Shown where the weights cannot tell: what the published sampling script takes without flags.
_SCRIPT_DEFAULTS = {"prediction_type": "epsilon", "input_size": 16, "latents_mean": 0.0, "latents_std": 1.0}
_HEAD_SIZE = 64


def find_weights(path: Path) -> Path | None:
    """The folder with weights of either kind: `path`, the one that `path`/latest names, or the newest checkpoint-*.

    Raises:
        ValueError: `latest` names a folder without weights, or `path` holds a Lightning checkpoint.
    """
    if _has_weights(path):
        return path
    if (path / "latest").is_file():
        return _latest(path)
    found = next((folder for folder in reversed(checkpoints(path)) if _has_weights(folder)), None)
    lightning = [path] if path.is_file() else sorted(path.glob("*.ckpt"))
    if found is None and lightning and lightning[0].suffix == ".ckpt":
        raise ValueError(
            f"checkpoint: {lightning[0]} is a Lightning checkpoint, which is what the code of {_LIGHTNING} writes; "
            f"expected a folder with {WEIGHTS} or {DEEPSPEED}"
        )
    return found


def _latest(run: Path) -> Path:
    named = Path((run / "latest").read_text(encoding="utf-8", errors="replace").strip())
    # Written where the run was trained: a folder of that name here is nearer than that path on this machine.
    for folder in (run / named.name, named):
        if named.name and _has_weights(folder):
            return folder
    raise ValueError(
        f"checkpoint: {run / 'latest'} names {str(named)!r}, but neither {run / named.name} nor that path holds "
        f"{WEIGHTS} or {DEEPSPEED}; name a checkpoint folder instead"
    )


def _has_weights(folder: Path) -> bool:
    return (folder / WEIGHTS).is_file() or bool(_model_states(folder))


def _model_states(folder: Path) -> list[Path]:
    return sorted((folder / DEEPSPEED).parent.glob("*model_states.pt"))


def is_published(folder: Path) -> bool:
    """Whether a folder with weights is one of these, and not one with a config.json of all sizes."""
    ours = (folder / "config.json").is_file() and (folder / WEIGHTS).is_file()
    return not ours or (folder / OTHER_STATE).is_file()


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The named weights of a folder, on the CPU, in the dtype they were written in.

    Raises:
        ValueError: a damaged file, one that needs pickle, weights in shards, or another architecture.
    """
    if (folder / WEIGHTS).is_file():
        file = folder / WEIGHTS
        try:
            state = load_file(file)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"checkpoint: {file} does not load: {error}") from None
    else:
        file = folder / DEEPSPEED
        names = [path.name for path in _model_states(folder)]
        if names != [file.name]:
            raise ValueError(
                f"checkpoint: expected all weights in {file}, found {', '.join(names[:3])}"
                f"{' …' if len(names) > 3 else ''} (DeepSpeed ZeRO stage 3 or model parallelism); join them: in "
                f"{folder} run `python zero_to_fp32.py . fp32 --safe_serialization --max_shard_size 1000GB`, then move "
                f"fp32/{WEIGHTS} to {folder}"
            )
        module = _load(file, "{'module': old['module']}").get("module")
        if not isinstance(module, dict) or not all(isinstance(tensor, Tensor) for tensor in module.values()):
            raise ValueError(f'checkpoint: expected a dict of tensors under "module" in {file}')
        state = {str(name): tensor for name, tensor in module.items()}
    if not state:
        raise ValueError(f"checkpoint: {file} holds no weights")
    if all(name.startswith("module.") for name in state):  # DistributedDataParallel
        state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    foreign = next((name for name in state if name.removeprefix("model.").split(".")[0] in _LIGHTNING_KEYS), None)
    if foreign:
        raise ValueError(
            f"checkpoint: {file} belongs to {_LIGHTNING} (it holds {foreign!r}); expected a Transformer with keys such "
            "as 'noisy_x_embedder.proj.weight', or a DiT with 'pos_embed'"
        )
    return state


def model_of(state: dict[str, Tensor]) -> str:
    """ "transformer" or "dit"."""
    return "dit" if "pos_embed" in state else "transformer"


def read_other_state(folder: Path) -> dict[str, Any] | None:
    """The dict in other_state.pth, or None where there is no such file; ValueError if it does not load."""
    file = folder / OTHER_STATE
    if not file.is_file():
        return None
    return _load(
        file,
        "{'scaling_factor': float(old['scaling_factor']), 'bias_factor': float(old['bias_factor']), "
        "'ema': old['ema'] and {'shadow_params': old['ema']['shadow_params']}}",
    )


def _load(file: Path, keep: str) -> dict[str, Any]:
    """torch.load of a dict without pickle; `keep` is Python that makes a plain one of `old`, for the error."""
    try:
        # Weights and averaged weights are GiB: only what is used is read. Files of torch < 1.6 cannot be mapped.
        loaded = torch.load(file, weights_only=True, map_location="cpu", mmap=zipfile.is_zipfile(file))
    except Exception as error:  # damaged pickles raise whatever their bytes happen to mean
        needed = re.search(r"GLOBAL (\S+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
        if needed is None:
            raise ValueError(
                f"checkpoint: {file} does not load: {(str(error) or repr(error)).splitlines()[0]}"
            ) from None
        code = (
            "import os, sys, torch; file = sys.argv[1]; old = torch.load(file, 'cpu', weights_only=False); "
            f"torch.save({keep}, file + '.new'); os.replace(file + '.new', file)"
        )
        raise ValueError(
            f"checkpoint: {file} holds {needed[1]}, which only pickle can load, and pickle runs whatever code a file "
            "holds. If you trust it, write it again as plain tensors and numbers:\n"
            f'python -c "{code}" {shlex.quote(str(file))}'
        ) from None
    if not isinstance(loaded, dict):
        raise ValueError(f"checkpoint: expected a dict in {file}, got {type(loaded).__name__}")
    return loaded


def complete(
    folder: Path, given: dict[str, Any], state: dict[str, Tensor], other: dict[str, Any] | None
) -> dict[str, Any]:
    """Every entry of config.json but the model: what weights and other_state.pth say, and `given` for the rest.

    Raises:
        ValueError: something is missing (with a line of JSON to paste), or `given` contradicts the files.
    """
    found = _sizes(state, given)
    if other is not None:
        found |= _normalisation(folder / OTHER_STATE, other)
    for name, value in found.items():
        if name in given and given[name] != value and not _same_number(given[name], value):
            raise ValueError(
                f"checkpoint: {name} is {value} by the files in {folder}, but {given[name]!r} in the given config: "
                "leave it out there, or it belongs to another checkpoint"
            )
    needed = ("prediction_type", "input_size", "num_heads", "latents_mean", "latents_std")
    missing = [name for name in needed if name not in given and name not in found]
    if missing:
        shown = _SCRIPT_DEFAULTS | {"num_heads": max(found["hidden_size"] // _HEAD_SIZE, 1)}
        line = json.dumps(given | {name: shown[name] for name in missing})
        lacks_state = f"\n(latents_mean and latents_std come from {OTHER_STATE}, which is not there)"
        raise ValueError(
            f"checkpoint: the files in {folder} do not tell {', '.join(missing)}; write them to "
            f"{folder / 'config.json'} or to a file for --model-config. With the published script's defaults, to be "
            f"changed where training differed:{lacks_state if 'latents_std' in missing else ''}\n{line}"
        )
    return given | found


def _sizes(state: dict[str, Tensor], given: dict[str, Any]) -> dict[str, Any]:
    hidden, channels, patch = _shape(state, "x_embedder.proj.weight", 4)[:3]
    ffn = _shape(state, "blocks.0.mlp.fc1.weight", 2)[0]
    qkv = _shape(state, "blocks.0.attn.qkv.weight", 2)[0]
    # Counted, not the largest number: a stray name must not ask for a billion blocks.
    depth, diffusion_depth = (
        len({name.split(".")[1] for name in state if name.startswith(stack + ".")})
        for stack in ("blocks", "diffusion_blocks")
    )
    found: dict[str, Any] = {
        "hidden_size": hidden, "depth": depth, "in_channels": channels,
        "num_classes": _shape(state, "y_embedder.embedding_table.weight", 2)[0] - 1,
    }  # fmt: skip
    named: list[tuple[int, int, int, float]]
    if model_of(state) == "dit":
        found |= {"patch_size": patch, "input_size": math.isqrt(_shape(state, "pos_embed", 3)[1]) * patch}
        named = [(*size, MLP_RATIO) for size in DIT_SIZES.values()]
    else:
        found["diffusion_depth"] = diffusion_depth
        named = [size[:4] for size in SIZES.values() if size[4] == diffusion_depth]
    published = [
        (heads, ratio)
        for size_depth, size_hidden, heads, ratio in named
        if (size_depth, size_hidden) == (depth, hidden) and ffn_width(size_hidden, ratio) == ffn
    ]
    # Many ratios give one width: the given one, the published one, the smallest, or the middle if rounding spoils that.
    ratios = [given.get("mlp_ratio"), *(r for _, r in published), ffn * 1.5 / hidden, (ffn + 32) * 1.5 / hidden]
    fitting = [r for r in ratios if _is_number(r) and 0 < r < MAX_SIZE and ffn_width(hidden, r) == ffn]
    if not fitting:
        raise ValueError(
            f"checkpoint: expected blocks.0.mlp.fc1.weight to have a multiple of 64 rows (the FFN width is "
            f"floor(hidden·ratio·2/3/64)·64), got {ffn}"
        )
    found["mlp_ratio"] = fitting[0]
    heads = given.get("num_heads", published[0][0] if published else None)
    if heads is not None or "num_heads" in given:
        if type(heads) is not int or heads < 1 or hidden % heads:
            raise ValueError(f"config: expected num_heads to divide hidden_size {hidden}, got {heads!r}")
        head_dim = hidden // heads
        kv_heads, rest = divmod(qkv - hidden, 2 * head_dim)
        if rest or kv_heads < 1 or heads % kv_heads:
            raise ValueError(
                f"checkpoint: blocks.0.attn.qkv.weight has {qkv} rows; with num_heads {heads} expected {hidden} + "
                f"2·{head_dim}·num_kv_heads, where num_kv_heads divides num_heads; give the num_heads of training"
            )
        found |= {"num_heads": heads, "num_kv_heads": kv_heads}
    return found


def _shape(state: dict[str, Tensor], name: str, dims: int) -> torch.Size:
    if name not in state:
        raise ValueError(
            f"checkpoint: the weights lack {name!r}: not a LatentLM Transformer or DiT (it holds {min(state)!r})"
        )
    shape = state[name].shape
    if len(shape) != dims or 0 in shape:
        raise ValueError(f"checkpoint: expected {name} to have {dims} dimensions, none of them 0, got {list(shape)}")
    return shape


def _normalisation(file: Path, other: dict[str, Any]) -> dict[str, float]:
    """(raw + bias)·scale is (raw − mean)/std with mean = −bias, std = 1/scale."""
    factors = []
    for name in ("scaling_factor", "bias_factor"):
        value = other.get(name)
        if isinstance(value, Tensor) and value.numel() == 1:
            value = value.item()
        if not _is_number(value) or (name == "scaling_factor" and value <= 0):
            above = " above 0" if name == "scaling_factor" else ""
            raise ValueError(f"checkpoint: expected {name} in {file} to be a finite number{above}, got {value!r}")
        factors.append(float(value))
    scale, bias = factors
    return {"latents_mean": 0.0 - bias, "latents_std": 1 / scale}


def averaged(folder: Path, other: dict[str, Any] | None, parameters: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """The averaged weights by name: the unnamed list of other_state.pth in the order of the model's `parameters`.

    Raises:
        ValueError: there are none, or their number or shapes are not the model's.
    """
    file = folder / OTHER_STATE
    if other is None:
        raise ValueError(
            f"--ema: there is no {file}; leave out --ema (a checkpoint of `fastlatent train` already is the average)"
        )
    ema = other.get("ema")
    if ema is None:
        raise ValueError(f"--ema: {file} holds no averaged weights (trained without --use_ema); leave out --ema")
    shadow = ema.get("shadow_params") if isinstance(ema, dict) else None
    if not isinstance(shadow, (list, tuple)):
        raise ValueError(f"--ema: expected a list ema.shadow_params in {file}, got {type(shadow).__name__}")
    named = list(parameters)
    for i, ((name, parameter), tensor) in enumerate(zip(named, shadow, strict=False)):
        got = list(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
        if got != list(parameter.shape):
            raise ValueError(
                f"--ema: expected shadow_params[{i}] in {file} to be {name} {list(parameter.shape)}, got {got}: "
                "the average of another model"
            )
    if len(shadow) != len(named):
        i = min(len(shadow), len(named))
        first = f"is missing ({named[i][0]})" if i < len(named) else "belongs to no weight"
        raise ValueError(
            f"--ema: expected {len(named)} tensors in shadow_params of {file}, got {len(shadow)}: index {i} {first}"
        )
    return {name: tensor for (name, _), tensor in zip(named, shadow, strict=True)}


def write(
    folder: Path,
    weights: dict[str, Tensor],
    shadow: dict[str, Tensor] | None,
    *,
    mean: float,
    std: float,
    steps: int,
    ema_decay: float,
) -> None:
    """Write model.safetensors and other_state.pth into an existing folder.

    Args:
        weights: as they are trained, under the model's names.
        shadow: their average, in the order of the model's parameters; None if there is none.
        mean, std: model latents are (raw − mean)/std.
        steps: optimiser steps done.
    """
    contiguous = {name: tensor.contiguous() for name, tensor in weights.items()}
    save_file(contiguous, folder / WEIGHTS, metadata={"format": "pt"})
    # The rest of what the published EMAModel keeps, for a constant decay.
    ema = None if shadow is None else {
        "decay": ema_decay, "min_decay": ema_decay, "optimization_step": steps, "update_after_step": 0,
        "use_ema_warmup": False, "inv_gamma": 1.0, "power": 2 / 3, "shadow_params": list(shadow.values()),
    }  # fmt: skip
    factors = {"scaling_factor": 1 / std, "bias_factor": 0.0 - mean}
    torch.save({**factors, "steps": steps, "ema": ema}, folder / OTHER_STATE)


def _same_number(given: Any, found: Any) -> bool:
    """Whether a hand-written number is the one found, as far as it was written out."""
    return _is_number(given) and type(found) is float and math.isclose(given, found, rel_tol=1e-6)


def _is_number(value: Any) -> TypeGuard[int | float]:
    return type(value) in (int, float) and math.isfinite(value)
