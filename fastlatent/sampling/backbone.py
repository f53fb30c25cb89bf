"""The Transformer's backbone for sampling: one token of every row at a time, optionally with int8 weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from fastlatent.heads.latentlm import rms_norm
from fastlatent.models.transformer import Block, Transformer, rope_table
from fastlatent.ops.linear import linear, quantize_rows


@dataclass(frozen=True)
class _Linear:
    """A weight [N, K] of the model, or its int8 with a scale per row."""

    weight: Tensor
    scale: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, scale=self.scale)


@dataclass(frozen=True)
class _Layer:
    qkv: _Linear
    proj: _Linear
    fc1: _Linear
    gate: _Linear
    fc2: _Linear


class Backbone:
    """Reads the weights of `model` where they are; with int8 it holds its own, and the model keeps its own too."""

    def __init__(self, model: Transformer, *, int8: bool = False) -> None:
        def packed(module: nn.Linear) -> _Linear:
            weight = module.weight.detach()
            return _Linear(*quantize_rows(weight)) if int8 else _Linear(weight, None)

        self._layers = []
        for block in model.blocks:
            assert isinstance(block, Block)
            attn, mlp = block.attn, block.mlp
            self._layers.append(_Layer(*map(packed, (attn.qkv, attn.proj, mlp.fc1, mlp.gate, mlp.fc2))))
        self._condition = packed(model.condition_layer.linear)
        weight = model.condition_layer.linear.weight
        table = rope_table(model.config.num_tokens, model.config.head_dim)
        self.cos, self.sin = (part.to(weight.device, weight.dtype) for part in table)

    def step(self, h: Tensor, attend: Callable[[int, Tensor], Tensor]) -> Tensor:
        """Condition [R, hidden] of one token, from h [R, hidden]: the embedded class or previous token.

        attend(layer, qkv [R, (H + 2·Hkv)·D]) rotates q and k, keeps k and v, and attends to the tokens so far:
        [R, H·D] (`fastlatent.sampling.attention`).
        """
        for i, layer in enumerate(self._layers):
            h = h + layer.proj(attend(i, layer.qkv(rms_norm(h))))
            x = rms_norm(h)
            h = h + layer.fc2(F.silu(layer.fc1(x)) * layer.gate(x))
        return self._condition(rms_norm(h))
