"""Published checkpoints of VideoMAE and VideoMAEv2: their layouts, what sizes they have, and every key accounted for.

published     the .pth files of both projects: blocks.0.attn.qkv.weight …, below "model" or "module"; with the prefix
              "encoder." beside the decoder where they come from pre-training, with "model." in the folders on the hub
transformers  the classes of that library: encoder.layer.0.attention.attention.query.weight …
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastlatent.encoders.videomae import VideoMAE, VideoMAESizes
from fastlatent.encoders.weights import read_file

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
SHARDS = WEIGHTS + ".index.json"
PICKLED = "pytorch_model.bin"

# Width → heads, for files that say nothing about heads. 1280 and 1408 have 16 too: not always 64 numbers each.
_HEADS = {384: 6, 768: 12, 1024: 16, 1280: 16, 1408: 16}
_PUBLISHED_PATCH = "patch_embed.proj.weight"
_NATIVE_PATCH = "embeddings.patch_embeddings.projection.weight"
# What tokens of a block do not need: what comes after the blocks, and the decoder of pre-training.
_UNUSED = re.compile(r"((norm|fc_norm|head|layernorm|classifier)\.(weight|bias)|mask_token|encoder_to_decoder\.weight)")
_DECODER = "decoder."
# Names of a config: ours, those of "model_config" on the hub, those of transformers.
_CONFIG_NAMES = {
    "dim": ("embed_dim", "hidden_size"),
    "depth": ("depth", "num_hidden_layers"),
    "heads": ("num_heads", "num_attention_heads"),
    "mlp": ("mlp_ratio", "intermediate_size"),
    "patch": ("patch_size", "patch_size"),
    "tubelet": ("tubelet_size", "tubelet_size"),
    "frames": ("num_frames", "num_frames"),
    "size": ("img_size", "image_size"),
    "eps": ("layer_norm_eps", "layer_norm_eps"),
    "cosine": ("cos_attn", "cos_attn"),
    "biases": ("qkv_bias", "qkv_bias"),
}
# transformers' default; the published models have 1e-6.
_NATIVE_EPS = 1e-12
_BIASES = {".attention.attention.query.bias": ".q_bias", ".attention.attention.value.bias": ".v_bias"}


@dataclass(frozen=True)
class Checkpoint:
    """Read by `read_checkpoint`. tensors: of the file or files, on the CPU, by their own names. config: what says the
    sizes, in the names of the hub's "model_config" or of transformers; empty without one."""

    path: Path
    tensors: Mapping[str, Tensor]
    config: Mapping[str, Any]


def read_checkpoint(path: Path) -> Checkpoint:
    """A folder with config.json and weights, or one file of weights; no pickle.

    A file may have an entry "config" beside its weights, with the names of "model_config", where it is of none of the
    published sizes.

    Raises:
        ValueError: nothing is there, it is incomplete, or it does not load.
    """
    if path.is_file():
        tensors, config = read_file(path, "teacher")
        return Checkpoint(path, tensors, config or {})
    if not path.is_dir():
        raise ValueError(f"teacher: expected a folder or a file of weights, got {path}, which does not exist")
    if (problem := missing(path)) is not None:
        raise ValueError(f"teacher: expected {CONFIG} and {WEIGHTS} (or {PICKLED}) in {path}; it has {problem}")
    config = _json(path / CONFIG)
    if (path / SHARDS).is_file():
        files = sorted(set(_json(path / SHARDS)["weight_map"].values()))
    else:
        files = [WEIGHTS if (path / WEIGHTS).is_file() else PICKLED]
    tensors = {}
    for name in files:
        tensors |= read_file(path / name, "teacher")[0]
    return Checkpoint(path, tensors, config.get("model_config", config))


def missing(folder: Path) -> str | None:
    """What a folder lacks to be a checkpoint, or None."""
    if not (folder / CONFIG).is_file():
        return f"no {CONFIG}"
    if (folder / SHARDS).is_file():  # an interrupted download leaves some of them
        names = _json(folder / SHARDS).get("weight_map", {})
        gone = sorted({name for name in names.values() if not (folder / name).is_file()})
        return f"{SHARDS}, but no {gone[0]}" if gone else None
    has_weights = (folder / WEIGHTS).is_file() or (folder / PICKLED).is_file()
    return None if has_weights else f"{CONFIG}, but neither {WEIGHTS} nor {PICKLED}"


def _json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"teacher: {file} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"teacher: expected an object in {file}, got {type(found).__name__}")
    return found


def encoder_tensors(checkpoint: Checkpoint) -> tuple[VideoMAESizes, dict[str, Tensor]]:
    """The sizes of a checkpoint, and its tensors by the names that VideoMAE gives its parameters.

    One model gives the same here from every layout. "positions" is there only where they are learned.

    Raises:
        ValueError: it is no VideoMAE; keys are missing, unexpected or of another shape; the config says otherwise; or
            heads are not told anywhere.
    """
    where = checkpoint.path
    found = [key for key in checkpoint.tensors if re.search(rf"(^|\.)({_PUBLISHED_PATCH}|{_NATIVE_PATCH})$", key)]
    if len(found) != 1:
        some = ", ".join(sorted(checkpoint.tensors)[:3]) if not found else ", ".join(sorted(found))
        raise ValueError(
            f"teacher: expected one encoder of VideoMAE in {where}, with a key that ends in {_PUBLISHED_PATCH} or "
            f"{_NATIVE_PATCH}; got {some}"
        )
    native = found[0].endswith(_NATIVE_PATCH)
    prefix = found[0].removesuffix(_NATIVE_PATCH if native else _PUBLISHED_PATCH)
    state: dict[str, Tensor] = {}
    unused: list[str] = []  # keys that nothing here needs, or that are not the encoder's
    for key, tensor in checkpoint.tensors.items():
        name = key.removeprefix(prefix)
        if not key.startswith(prefix) or name.startswith(_DECODER) or _UNUSED.fullmatch(name):
            unused.append(key)
            continue
        for new, old in _BIASES.items():
            name = name.replace(new, ".attention.attention" + old)
        state[name] = tensor
    parent = prefix.rstrip(".").rpartition(".")[0]
    parent = parent + "." if parent else ""
    rest = [key.removeprefix(prefix).removeprefix(parent) for key in unused]
    strange = {key for key, name in zip(unused, rest, strict=True) if not _known_unused(name)}
    sizes = _sizes(state, checkpoint, native)
    sources = _sources(sizes, native)
    _account(where, prefix, state, sources, strange)
    tensors = {name: _joined(keys, state, sizes.dim) for name, keys in sources.items()}
    if sizes.learned_positions:
        tensors["positions"] = tensors["positions"].flatten(0, -2)
    with torch.device("meta"):
        wanted = {name: tensor.shape for name, tensor in VideoMAE(sizes).state_dict().items()}
    wrong = sorted(
        f"{prefix}{'|'.join(filter(None, sources[name]))} {list(tensor.shape)}, expected {list(wanted[name])}"
        for name, tensor in tensors.items()
        if tensor.shape != wanted[name]
    )
    if wrong:
        raise ValueError(f"teacher: the weights in {where} are of another shape: {', '.join(wrong[:3])}")
    return sizes, tensors


def _known_unused(name: str) -> bool:
    return name.startswith(_DECODER) or _UNUSED.fullmatch(name) is not None


def _account(
    where: Path, prefix: str, state: Mapping[str, Tensor], sources: Mapping[str, tuple[str | None, ...]],
    strange: set[str],
) -> None:  # fmt: skip
    keys = {key for joined in sources.values() for key in joined if key is not None}
    wrong = {
        "missing": sorted(prefix + key for key in keys - state.keys()),
        "unexpected": sorted({prefix + key for key in state.keys() - keys} | strange),
    }
    said = [f"{what}: {', '.join(names[:3])} ({len(names)} in all)" for what, names in wrong.items() if names]
    if said:
        raise ValueError(f"teacher: the weights in {where} do not fit VideoMAE; {'; '.join(said)}")


def _joined(keys: tuple[str | None, ...], state: Mapping[str, Tensor], dim: int) -> Tensor:
    if len(keys) == 1:
        assert keys[0] is not None
        return state[keys[0]]
    like = next(state[key] for key in keys if key is not None)
    return torch.cat([like.new_zeros(dim) if key is None else state[key] for key in keys])


def _sources(sizes: VideoMAESizes, native: bool) -> dict[str, tuple[str | None, ...]]:
    """Of every tensor of VideoMAE the keys that it is joined from; None stands for zeros, the biases of the keys."""
    patch = (_NATIVE_PATCH if native else _PUBLISHED_PATCH).removesuffix("weight")
    found: dict[str, tuple[str | None, ...]] = {
        "patch_embed.proj.weight": (patch + "weight",),
        "patch_embed.proj.bias": (patch + "bias",),
    }
    if sizes.learned_positions:
        found["positions"] = ("pos_embed",)
    names = {"norm1": "norm1", "attn.proj": "attn.proj", "norm2": "norm2", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
    if native:
        names = {
            "norm1": "layernorm_before", "attn.proj": "attention.output.dense", "norm2": "layernorm_after",
            "mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense",
        }  # fmt: skip
    attention = "attention.attention." if native else "attn."
    qkv = ("query.weight", "key.weight", "value.weight") if native else ("qkv.weight",)
    for i in range(sizes.depth):
        ours, theirs = f"blocks.{i}.", f"encoder.layer.{i}." if native else f"blocks.{i}."
        for name, key in names.items():
            found |= {f"{ours}{name}.{kind}": (f"{theirs}{key}.{kind}",) for kind in ("weight", "bias")}
        found[f"{ours}attn.qkv.weight"] = tuple(f"{theirs}{attention}{key}" for key in qkv)
        if sizes.biases:
            biases = (f"{theirs}{attention}q_bias", None, f"{theirs}{attention}v_bias")
            found[f"{ours}attn.qkv.bias"] = biases
        if sizes.cosine:
            found[f"{ours}attn.scale"] = (f"{theirs}attn.scale",)
        if sizes.layer_scale:
            found |= {f"{ours}{name}": (f"{theirs}{name}",) for name in ("gamma_1", "gamma_2")}
    return found


def _sizes(state: Mapping[str, Tensor], checkpoint: Checkpoint, native: bool) -> VideoMAESizes:
    where, config = checkpoint.path, _config(checkpoint, native)
    patch = state[_NATIVE_PATCH if native else _PUBLISHED_PATCH]
    begin = "encoder.layer." if native else "blocks."
    numbers = [int(found[1]) for key in state if (found := re.match(re.escape(begin) + r"(\d+)\.", key))]
    first = f"{begin}0."
    hidden = re.compile(re.escape(begin) + r"\d+\." + (r"intermediate\.dense" if native else r"mlp\.fc1") + r"\.weight")
    fc1 = next((tensor for key, tensor in state.items() if hidden.fullmatch(key)), None)
    if patch.ndim != 5 or patch.shape[1] != 3 or patch.shape[3] != patch.shape[4] or not numbers or fc1 is None:
        raise ValueError(
            f"teacher: expected the blocks of VideoMAE in {where}, on patches [dim, 3, tubelet, side, side]; got "
            f"patches {list(patch.shape)} and {len(set(numbers))} blocks"
        )
    dim, _, tubelet, side, _ = patch.shape
    attention = first + ("attention.attention." if native else "attn.")
    scale = state.get(attention + "scale")
    heads = config.get("heads", _HEADS.get(dim) if scale is None else len(scale))
    if heads is None:
        raise ValueError(
            f'teacher: {where} does not say how many heads its width of {dim} has: add an entry "config" with '
            '{"num_heads": …} beside the weights'
        )
    told: dict[str, Any] = {"dim": dim, "depth": max(numbers) + 1, "mlp": len(fc1), "patch": side, "tubelet": tubelet}
    told |= {"cosine": scale is not None, "biases": any(key.endswith(".q_bias") for key in state)}
    if "mlp" in config and not native:  # a ratio, whose digits may end early: 48/11
        ratio = config["mlp"] * dim
        config = {**config, "mlp": told["mlp"] if abs(ratio - told["mlp"]) < 1 else round(ratio)}
    for name, value in told.items():
        if config.get(name, value) != value:
            names = _CONFIG_NAMES[name]
            raise ValueError(
                f"teacher: the config of {where} says {names[native]} = {config[name]} ({name}), its weights have "
                f"{value}; they are not of one model"
            )
    sizes = VideoMAESizes(
        heads=heads,
        frames=config.get("frames", 16),
        size=config.get("size", 224),
        eps=config.get("eps", _NATIVE_EPS if native and config else 1e-6),
        layer_scale=f"{first}gamma_1" in state,
        learned_positions="pos_embed" in state,
        **told,
    )
    if dim % heads or sizes.frames % tubelet or sizes.size % side:
        raise ValueError(f"teacher: the sizes in {where} do not divide: {sizes}")
    return sizes


def _config(checkpoint: Checkpoint, native: bool) -> dict[str, Any]:
    """The config in our names, without what it does not say."""
    given, where = checkpoint.config, checkpoint.path
    if given.get("model_type", "videomae") != "videomae" and "num_heads" not in given:
        raise ValueError(f"teacher: expected the config of a VideoMAE in {where}, got model_type {given['model_type']}")
    fixed = {
        "in_chans": 3, "num_channels": 3, "qk_scale": None, "hidden_act": "gelu", "norm_layer": "nn.LayerNorm",
    }  # fmt: skip
    for name, value in fixed.items():
        if given.get(name, value) != value:
            raise ValueError(f"teacher: {where} has {name} = {given[name]!r}; only {value!r} is known here")
    found = {
        ours: given[names[native]] for ours, names in _CONFIG_NAMES.items() if given.get(names[native]) is not None
    }
    for name in ("size", "patch"):
        if isinstance(found.get(name), list | tuple):
            if len(set(found[name])) != 1:
                raise ValueError(f"teacher: expected squares in {where}, got {name} {found[name]}")
            found[name] = found[name][0]
    for name, value in found.items():
        kinds: Any = {"eps": float, "mlp": (int, float), "cosine": bool, "biases": bool}.get(name, int)
        if not isinstance(value, kinds) or (not isinstance(value, bool) and value <= 0):
            raise ValueError(f"teacher: the config of {where} has {_CONFIG_NAMES[name][native]} = {value!r}")
    return found
