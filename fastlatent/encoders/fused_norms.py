"""GroupNorm and SiLU of a diffusers autoencoder replaced by the fused op, in place, and put back."""

from __future__ import annotations

from dataclasses import dataclass

from diffusers.models.attention_processor import Attention
from diffusers.models.autoencoders.vae import Decoder, Encoder, MaskConditionDecoder
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from fastlatent.ops.group_norm_silu import group_norm_silu


class FusedGroupNorm(nn.Module):
    """A GroupNorm, and the SiLU after it where `silu`, as one op. Shares the norm's parameters and their names."""

    def __init__(self, norm: nn.GroupNorm, silu: bool) -> None:
        super().__init__()
        self.weight, self.bias = norm.weight, norm.bias
        self.groups, self.eps, self.silu = norm.num_groups, norm.eps, silu

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W], or [N, C, pixels] as attention has it; the layout stays."""
        image = x.unsqueeze(-1) if x.ndim == 3 else x
        out = group_norm_silu(image, self.weight, self.bias, groups=self.groups, eps=self.eps, silu=self.silu)
        return out.squeeze(-1) if x.ndim == 3 else out


@dataclass(frozen=True)
class FusedNorms:
    """What `fuse_norms` replaced: (module, name of its child, the child that was there)."""

    replaced: tuple[tuple[nn.Module, str, nn.Module], ...]

    @property
    def count(self) -> int:
        """How many GroupNorms run as the fused op; SiLUs are not counted."""
        return sum(isinstance(child, nn.GroupNorm) for _, _, child in self.replaced)

    def undo(self) -> None:
        """Put every norm and activation back, with the weights as they are now."""
        for owner, name, child in self.replaced:
            if isinstance(child, nn.GroupNorm):  # load_state_dict(assign=True) would have replaced them
                fused = getattr(owner, name)
                child.weight, child.bias = fused.weight, fused.bias
            setattr(owner, name, child)


def fuse_norms(module: nn.Module) -> FusedNorms:
    """Replace GroupNorm + SiLU in `module`, in place, by `ops.group_norm_silu`; forward only, evaluation mode.

    Taken are the norms of diffusers' ResnetBlock2D without time embedding, the last ones of its Encoder and Decoder,
    and those of Attention (no SiLU there). A norm that is not a plain affine GroupNorm, or that something other than
    a SiLU follows, stays. state_dict() keeps its keys. Where nothing fits, count is 0 and nothing has changed.
    """
    replaced: list[tuple[nn.Module, str, nn.Module]] = []
    for owner in list(module.modules()):
        norms, activation = _names(owner)
        children = [getattr(owner, name) for name in norms]
        # None where an Attention has no norm; SpatialNorm and others by type.
        if any(type(child) is not nn.GroupNorm or not child.affine for child in children):
            continue
        if activation and type(getattr(owner, activation)) is not nn.SiLU:
            continue
        for name, norm in zip(norms, children, strict=True):
            replaced.append((owner, name, norm))
            setattr(owner, name, FusedGroupNorm(norm, silu=activation is not None).train(norm.training))
        if activation:
            replaced.append((owner, activation, getattr(owner, activation)))
            setattr(owner, activation, nn.Identity())
    return FusedNorms(tuple(replaced))


def _names(owner: nn.Module) -> tuple[tuple[str, ...], str | None]:
    """The norms of a module and the activation that directly follows each of them, by name."""
    # With a time embedding the same activation is also applied to that, or a scale stands between it and the norm.
    if type(owner) is ResnetBlock2D and owner.time_emb_proj is None and owner.time_embedding_norm != "scale_shift":
        return ("norm1", "norm2"), "nonlinearity"
    if isinstance(owner, (Encoder, Decoder, MaskConditionDecoder)):
        return ("conv_norm_out",), "conv_act"
    if isinstance(owner, Attention):
        return ("group_norm",), None
    return (), None
