"""Checkpoints of VideoMAE in every published layout, small enough for tests: random weights, the real names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

LAYOUTS = ("hub", "github", "github-module", "pretraining", "transformers")
FILES = ("github", "github-module", "pretraining")  # one .pth file; the others are folders


def write_teacher(
    path: str | Path,
    layout: str = "hub",
    dim: int = 32,
    depth: int = 2,
    heads: int = 2,
    frames: int = 4,
    size: int = 32,
    patch: int = 16,
    tubelet: int = 2,
    seed: int = 0,
    *,
    mlp_ratio: float = 4.0,
    layer_scale: bool = False,
    cosine: bool = False,
    config: bool = True,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write a checkpoint and return what `load_teacher` takes as weights; one seed gives the same model in all layouts.

    path: folder or, of a layout in FILES, file (teacher.pth in it if it is a folder or has no suffix). config: of the
    layouts in FILES, an entry "config" beside the weights, which the published files lack: without it a loader knows
    neither heads (but of the published dims) nor frames and size.
    """
    path = Path(path)
    state = make_state(dim, depth, heads, patch, tubelet, seed, int(dim * mlp_ratio), layer_scale, cosine, dtype)
    sizes: dict[str, Any] = {
        "img_size": size, "patch_size": patch, "in_chans": 3, "num_classes": 0, "embed_dim": dim, "depth": depth,
        "num_heads": heads, "mlp_ratio": mlp_ratio, "qkv_bias": True, "qk_scale": None, "layer_norm_eps": 1e-6,
        "init_values": 0.1 if layer_scale else 0.0, "use_learnable_pos_emb": False, "tubelet_size": tubelet,
        "use_mean_pooling": True, "num_frames": frames, "cos_attn": cosine,
    }  # fmt: skip
    extra = {name: torch.randn(shape).to(dtype) for name, shape in _unused(layout, dim).items()}
    if layout in FILES:
        file = path if path.suffix else path / "teacher.pth"
        file.parent.mkdir(parents=True, exist_ok=True)
        prefix = "encoder." if layout == "pretraining" else ""
        wrapped: dict[str, Any] = {
            "module" if layout == "github-module" else "model": {f"{prefix}{k}": v for k, v in state.items()} | extra
        }
        torch.save({**wrapped, "config": sizes} if config else wrapped, file)
        return file
    path.mkdir(parents=True, exist_ok=True)
    if layout == "hub":
        named: dict[str, Any] = {"model_type": "VideoMAEv2_Base", "model_config": sizes}
        tensors = {f"model.{k}": v for k, v in state.items()} | extra
    else:
        assert layout == "transformers", layout
        named = {
            "model_type": "videomae", "architectures": ["VideoMAEForVideoClassification"], "image_size": size,
            "patch_size": patch, "num_channels": 3, "num_frames": frames, "tubelet_size": tubelet, "hidden_size": dim,
            "num_hidden_layers": depth, "num_attention_heads": heads, "intermediate_size": int(dim * mlp_ratio),
            "hidden_act": "gelu", "layer_norm_eps": 1e-6, "qkv_bias": True, "use_mean_pooling": True,
        }  # fmt: skip
        tensors = transformers_names(state) | extra
    (path / "config.json").write_text(json.dumps(named))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path / "model.safetensors")
    return path


def make_state(
    dim: int, depth: int, heads: int, patch: int, tubelet: int, seed: int, mlp: int, layer_scale: bool, cosine: bool,
    dtype: torch.dtype,
) -> dict[str, Tensor]:  # fmt: skip
    """An encoder under the names of the published .pth files. Nothing is zero or one: what is left out would show."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float, mean: float = 0.0) -> Tensor:
        return (mean + scale * torch.randn(shape, generator=draw)).to(dtype)

    fan = 3 * tubelet * patch * patch
    state = {
        "patch_embed.proj.weight": normal(dim, 3, tubelet, patch, patch, scale=fan**-0.5),
        "patch_embed.proj.bias": normal(dim, scale=0.1),
    }
    for i in range(depth):
        block = {
            "norm1.weight": normal(dim, scale=0.1, mean=1.0),
            "norm1.bias": normal(dim, scale=0.1),
            "attn.q_bias": normal(dim, scale=0.1),
            "attn.v_bias": normal(dim, scale=0.1),
            "attn.qkv.weight": normal(3 * dim, dim, scale=dim**-0.5),
            "attn.proj.weight": normal(dim, dim, scale=dim**-0.5),
            "attn.proj.bias": normal(dim, scale=0.1),
            "norm2.weight": normal(dim, scale=0.1, mean=1.0),
            "norm2.bias": normal(dim, scale=0.1),
            "mlp.fc1.weight": normal(mlp, dim, scale=dim**-0.5),
            "mlp.fc1.bias": normal(mlp, scale=0.1),
            "mlp.fc2.weight": normal(dim, mlp, scale=mlp**-0.5),
            "mlp.fc2.bias": normal(dim, scale=0.1),
        }
        if layer_scale:
            block |= {name: normal(dim, scale=0.1, mean=0.5) for name in ("gamma_1", "gamma_2")}
        if cosine:  # exp(2.3) = 10 is what it starts from; above 4.6 it is cut off
            block["attn.scale"] = torch.linspace(2.0, 5.0, heads).reshape(heads, 1, 1).to(dtype)
        state |= {f"blocks.{i}.{name}": tensor for name, tensor in block.items()}
    return state


def transformers_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """`make_state`'s tensors as transformers names them."""
    renamed: dict[str, Tensor] = {}
    parts = {
        "norm1": "layernorm_before", "norm2": "layernorm_after", "attn.proj": "attention.output.dense",
        "mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense",
    }  # fmt: skip
    for name, tensor in state.items():
        if name.startswith("patch_embed.proj."):
            renamed["videomae.embeddings.patch_embeddings.projection." + name.rpartition(".")[2]] = tensor
            continue
        _, number, rest = name.split(".", 2)
        begin = f"videomae.encoder.layer.{number}."
        if rest == "attn.qkv.weight":
            for part, rows in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                renamed[f"{begin}attention.attention.{part}.weight"] = rows
        elif rest in ("attn.q_bias", "attn.v_bias"):
            renamed[f"{begin}attention.attention.{rest[5:]}"] = tensor
        else:
            part, _, kind = rest.rpartition(".")
            renamed[f"{begin}{parts[part]}.{kind}"] = tensor
    return renamed


def _unused(layout: str, dim: int) -> dict[str, tuple[int, ...]]:
    """What such a checkpoint also holds, and a teacher of tokens does not use."""
    norm: dict[str, tuple[int, ...]] = {"weight": (dim,), "bias": (dim,)}
    head: dict[str, tuple[int, ...]] = {"head.weight": (7, dim), "head.bias": (7,)}
    if layout == "hub":
        return {f"model.fc_norm.{k}": v for k, v in norm.items()}
    if layout == "github":
        return {f"fc_norm.{k}": v for k, v in norm.items()} | head
    if layout == "github-module":
        return {f"norm.{k}": v for k, v in norm.items()} | head
    if layout == "pretraining":
        more: dict[str, tuple[int, ...]] = {
            "mask_token": (1, 1, 8), "encoder_to_decoder.weight": (8, dim), "decoder.norm.weight": (8,),
            "decoder.blocks.0.attn.qkv.weight": (24, 8), "decoder.head.bias": (5,),
        }  # fmt: skip
        return {f"encoder.norm.{k}": v for k, v in norm.items()} | more
    more = {"classifier.weight": (7, dim), "classifier.bias": (7,)}
    return {f"fc_norm.{k}": v for k, v in norm.items()} | more
