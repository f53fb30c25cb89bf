"""The fused form of a head that lives on in another model."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastlatent.heads.diffusion_head import DiffusionHead


class LiveHead:
    """A model's own head module in the form that the op runs; folded and proved anew when its weights have changed.

    The folded weights are a copy: 2 bytes a parameter in bfloat16, 250 MB of VibeVoice 1.5B's head. Who trains, moves,
    casts, loads or exchanges the module in between is served: addresses, versions, dtypes and devices of the parameters
    are compared at each call, 1 µs for each of them. Writes that torch does not count, through `parameter.data` or into
    tensors of inference mode, are not seen: undo the patch before them.

    Args:
        find: gives the module that holds the head's weights under their published names, whatever the prefix.
        family: of `fastlatent.heads.spec.FAMILIES`.
        prove: raises ValueError where the module computes something else than the head; may call `get`.
    """

    def __init__(self, find: Callable[[], nn.Module], family: str, prove: Callable[[], None]) -> None:
        self._find, self._family, self._prove = find, family, prove
        self._seen: tuple[object, ...] | None = None
        self._held: list[Tensor] = []
        self._heads: dict[torch.dtype | None, DiffusionHead] = {}

    def get(self, dtype: torch.dtype | None = None) -> DiffusionHead:
        """The head with the module's present weights, in their dtype or in this one.

        Raises:
            ValueError: the weights are not those of a head of this family, or something else is done with them.
        """
        module = self._find()
        parameters = _parameters(module)
        now = tuple((p.data_ptr(), 0 if p.is_inference() else p._version, p.dtype, p.device) for p in parameters)
        if now != self._seen:
            self._heads = {None: DiffusionHead.from_state_dict(module.state_dict(), self._family)}
            # What is held is not freed, so that no other weights can come to lie at the same address.
            self._held = [p.detach() for p in parameters]
            self._seen = now
            try:
                self._prove()
            except BaseException:
                self._seen = None
                raise
        if dtype not in self._heads:
            self._heads[dtype] = DiffusionHead.from_state_dict(module.state_dict(), self._family, dtype=dtype)
        return self._heads[dtype]


def _parameters(module: nn.Module) -> list[Tensor]:
    """Its weights, if they are plain tensors that nothing but the modules' own code works on."""
    found: list[Tensor] = []
    for path, part in module.named_modules():
        if part._forward_hooks or part._forward_pre_hooks:
            raise ValueError(
                f"patch: expected the head without forward hooks, which one op for all its modules cannot call, got "
                f"one on {path or type(part).__name__}: remove it, or undo the patch"
            )
        for name, parameter in part._parameters.items():
            if parameter is None:
                continue
            if type(parameter) not in (nn.Parameter, Tensor):  # quantised, or spread over devices
                raise ValueError(
                    f"patch: expected plain weights, got {type(parameter).__name__} as {path}.{name}: leave the head "
                    "out of quantisation and sharding"
                )
            found.append(parameter)
    return found
