"""Causal convolutions that go on where the last chunk ended, for decoders of diffusers that keep no cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

# Classes by name, so that a diffusers without one of them serves for the others.
_PADDED = ("CogVideoXCausalConv3d", "HunyuanVideo15CausalConv3d")  # have .conv, .time_causal_padding, .pad_mode
_COSMOS = "CosmosCausalConv3d"  # is the convolution; .temporal_pad, .spatial_pad, .pad_mode


class CausalCache:
    """What the causal convolutions under `modules` need of earlier frames: the last (kernel − 1) of each.

    Within `installed()` those convolutions, and the upsamplings that treat the first frame differently, take their
    input for the frames that follow those of the `installed()` before: what a chunk gives is its part of the whole
    result, up to rounding. The first chunk begins with frame 0. Outside `installed()` the modules are as always.
    """

    def __init__(self, *modules: nn.Module) -> None:
        self._last: dict[nn.Module, Tensor] = {}
        self._chunks = 0
        self._forwards: dict[nn.Module, Callable[..., Any]] = {}
        for module in dict.fromkeys(child for root in modules for child in root.modules()):
            name = type(module).__name__
            if name in _PADDED:
                self._forwards[module] = partial(self._padded, module)
            elif name == _COSMOS:
                self._forwards[module] = partial(self._cosmos, module)
            elif name == "HunyuanVideo15Upsample" and module.add_temporal_upsample:
                self._forwards[module] = partial(self._hunyuan15_upsample, module)
            elif name == "CosmosUpsample3d" and module.temporal_upsample:
                self._forwards[module] = partial(self._cosmos_upsample, module)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """The modules continue, for one chunk; afterwards they are as they were."""
        before = {module: vars(module).get("forward") for module in self._forwards}
        try:
            for module, forward in self._forwards.items():
                setattr(module, "forward", forward)  # noqa: B010 (mypy: a method)
            yield
            self._chunks += 1
        finally:
            for module, own in before.items():
                if own is None:
                    vars(module).pop("forward", None)
                else:
                    setattr(module, "forward", own)  # noqa: B010 (as above)

    def _with_past(self, module: nn.Module, x: Tensor, past: int) -> Tensor:
        """`past` earlier frames before x; before the first frame lie copies of it."""
        if past == 0:
            return x
        earlier = self._last.get(module)
        x = torch.cat([x[:, :, :1].expand(-1, -1, past, -1, -1) if earlier is None else earlier, x], 2)
        self._last[module] = x[:, :, -past:].clone()  # a view would keep all of x
        return x

    def _padded(self, module: Any, x: Tensor, conv_cache: None = None) -> Any:
        *space, past, _ = module.time_causal_padding
        x = self._with_past(module, x, past)
        x = module.conv(functional.pad(x, (*space, 0, 0), mode=module.pad_mode) if any(space) else x)
        return x if type(module).__name__ != "CogVideoXCausalConv3d" else (x, None)

    def _cosmos(self, module: Any, x: Tensor) -> Tensor:
        x = self._with_past(module, x, module.temporal_pad)
        return nn.Conv3d.forward(module, functional.pad(x, (*module.spatial_pad, 0, 0), mode=module.pad_mode))

    def _hunyuan15_upsample(self, module: Any, x: Tensor) -> Tensor:
        if self._chunks == 0:
            return type(module).forward(module, x)
        spread = partial(module._dcae_upsample_rearrange, r1=2, r2=2, r3=2)
        return spread(module.conv(x)) + spread(x).repeat_interleave(module.repeats, dim=1)

    def _cosmos_upsample(self, module: Any, x: Tensor) -> Tensor:
        if self._chunks == 0:
            return type(module).forward(module, x)
        x = x.repeat_interleave(2, dim=2)
        x = module.conv1(x) + x
        if module.spatial_upsample:
            x = x.repeat_interleave(2, dim=3).repeat_interleave(2, dim=4)
            x = module.conv2(x) + x
        return module.conv3(x)
