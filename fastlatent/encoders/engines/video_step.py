"""The steady step of a streamed video decode, compiled: the chunks from the third latent frame on, all of one shape."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastlatent.encoders.engines.compiled import OPTIONS, any_number_of_shapes, compile_ahead
from fastlatent.encoders.engines.engine import LIMITS
from fastlatent.encoders.engines.numerics import relative_error
from fastlatent.encoders.video_streaming import wan_step

STEP_ENGINES = ("compile", "aoti")
Step = Callable[[Tensor, list[Tensor]], tuple[Tensor, list[Tensor]]]


class CompiledStep:
    """`wan_step(model)`, compiled when it is first called with latents of a shape, and compared with eager there.

    compile  torch.compile: again in every process
    aoti     the same compiler ahead of time, into a package in `cache` that later runs load

    Args:
        model: AutoencoderKLWan of diffusers.
        identity: of the autoencoder; it names the packages.
        cache: folder for them; whoever can write there can run code here.
    """

    def __init__(self, name: str, model: Any, identity: dict[str, Any], cache: Path) -> None:
        assert name in STEP_ENGINES, name
        self._name, self._identity, self._cache = name, identity, cache
        self._eager = wan_step(model).eval()
        self._runs: dict[torch.Size, Step] = {}

    def __call__(self, z: Tensor, caches: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """As `WanStep.forward`.

        Raises:
            ValueError: the compiler fails, or its result is not eager's.
        """
        # Tensors of inference mode are to Dynamo another kind, and torch.export takes none.
        with torch.inference_mode(False), torch.no_grad():
            z, caches = _plain(z), [_plain(cache) for cache in caches]
            if z.shape not in self._runs:
                self._runs[z.shape] = self._open(z, caches)
            return self._runs[z.shape](z, caches)

    def _open(self, z: Tensor, caches: list[Tensor]) -> Step:
        try:
            with any_number_of_shapes():
                run = (
                    torch.compile(self._eager, fullgraph=True, dynamic=False, options=dict(OPTIONS))
                    if self._name == "compile"
                    else compile_ahead(self._eager, (z, caches), self._cache, self._identity)
                )
                got = run(z, caches)[0]
        except (OSError, torch.OutOfMemoryError):  # a full disk and a full GPU say so themselves
            raise
        except Exception as error:  # Dynamo, export, Inductor and the C++ compiler raise many kinds
            text = " ".join(str(error).split())[:300]
            raise ValueError(f"--engine {self._name}: compiling the step failed: {text}; use --engine eager") from error
        off, limit = relative_error(got, self._eager(z, caches)[0]), LIMITS[z.dtype]
        if not off <= limit:  # NaN is above
            raise ValueError(
                f"--engine {self._name}: differs from eager by {off:.2g} (relative) on {str(z.dtype)[6:]} latents "
                f"{list(z.shape)}, expected at most {limit:g}; use --engine eager"
            )
        return run


def _plain(tensor: Tensor) -> Tensor:
    return tensor.clone() if tensor.is_inference() else tensor
