"""The fused form of a head that lives on in another model."""

from __future__ import annotations

from torch import Tensor, nn

from fastlatent.heads.diffusion_head import DiffusionHead


class LiveHead:
    """A model's own head module in the form that the op runs; folded anew whenever its weights have changed.

    The folded weights are a copy: 2 bytes a parameter in bfloat16, 250 MB of VibeVoice 1.5B's head. Who trains, moves,
    casts or loads the model in between is served: addresses, versions, dtypes and devices of the parameters are
    compared at each call, 1 µs for each of them. Writes through `parameter.data`, which torch does not count, are not
    seen: undo the patch before them.

    Args:
        module: holds the head's weights under their published names, whatever the prefix.
        family: of `fastlatent.heads.spec.FAMILIES`.

    Raises:
        ValueError: its weights are not those of a head of this family.
    """

    def __init__(self, module: nn.Module, family: str) -> None:
        self._module, self._family = module, family
        self._seen: tuple[object, ...] = ()
        self._held: list[Tensor] = []
        self._head = self.get()

    def get(self) -> DiffusionHead:
        """The head with the module's present weights."""
        now = tuple(
            (p.data_ptr(), 0 if p.is_inference() else p._version, p.dtype, p.device) for p in self._module.parameters()
        )
        if now != self._seen:
            self._head = DiffusionHead.from_state_dict(self._module.state_dict(), self._family)
            # What is held is not freed, so that no other weights can come to lie at the same address.
            self._held = [p.detach() for p in self._module.parameters()]
            self._seen = now
        return self._head
