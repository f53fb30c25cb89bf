"""Published diffusion heads, recognised by the names and shapes of their weights and folded into `HeadWeights`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fastlatent.heads.latentlm import SINUSOID_PERIOD, SINUSOID_WIDTH
from fastlatent.heads.spec import FAMILIES, HeadSpec, Layout
from fastlatent.ops.diffusion_head_sample import HeadWeights

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# A norm's weight is split into a power of two, at most this far from 1, and a rest near 1: see `_fold_norm`.
MAX_EXPONENT = 4


@dataclass(frozen=True, eq=False)
class TimeWeights:
    """E time embedders: sinusoid of t → first → silu → second (→ norm), and the mean of all E.

    Attributes:
        frequencies: float64 [E, 128].
        first_weight, first_bias: [E, H, 256], [E, H].
        second_weight, second_bias: [E, H, H], [E, H].
        norm_weight: float64 [E, H] (`HeadSpec.time_norm`), or None.
    """

    frequencies: Tensor
    first_weight: Tensor
    first_bias: Tensor
    second_weight: Tensor
    second_bias: Tensor
    norm_weight: Tensor | None


@dataclass(frozen=True, eq=False)
class FoldedHead:
    """Any published head in one form.

    Attributes:
        spec: what was published.
        weights: what `fastlatent.ops.diffusion_head_sample` takes.
        time: weights of the time embedders; None where the head takes no time.
        condition_weight, condition_bias: [H, Z] and [H] of the condition's projection; None where there is none.
    """

    spec: HeadSpec
    weights: HeadWeights
    time: TimeWeights | None
    condition_weight: Tensor | None
    condition_bias: Tensor | None


def fold_head(
    shapes: Mapping[str, tuple[int, ...]],
    read: Callable[[str], Tensor],
    family: str | None = None,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> FoldedHead:
    """Find the one head in a model's state, and fold it.

    An affine norm becomes part of the modulations, in float64 and rounded once (`_fold_norm`).

    Args:
        shapes: of every tensor in the state, by name.
        read: reads one tensor; only the head's are read.
        family: a name of `FAMILIES`; None recognises it by names, prefix and shapes.
        dtype: of the weights; None takes that of the token embedding.
        device: None takes that of the token embedding.

    Raises:
        ValueError: there is no head, or more than one; the family is unknown, wrong or ambiguous; a weight is missing,
            does not belong to the head, has a wrong shape or dtype, or is not finite.
    """
    if family is not None and family not in FAMILIES:
        raise ValueError(f"diffusion head: expected a family of {', '.join(FAMILIES)}, got {family!r}")
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"diffusion head: expected dtype {', '.join(map(str, DTYPES))}, got {dtype}")
    prefix, layout = _find(shapes, family)
    spec = _check(shapes, prefix, layout, family)
    return _fold(spec, layout, _Reader(prefix, read, dtype, device))


def _find(shapes: Mapping[str, tuple[int, ...]], family: str | None) -> tuple[str, Layout]:
    """The prefix of the only head and the layout that fits its names best."""
    families = FAMILIES.values() if family is None else [FAMILIES[family]]
    layouts = [layout for entry in families for layout in entry.layouts]
    found = {
        (key.removesuffix(layout.anchor), layout.anchor): None
        for layout in layouts
        for key in shapes
        if key == layout.anchor or key.endswith("." + layout.anchor)
    }
    if not found:
        anchors = ", ".join(dict.fromkeys(layout.anchor for layout in layouts))
        roots = [prefix.split(".")[0] for entry in FAMILIES.values() for prefix in entry.prefixes if prefix]
        near = [key for key in shapes if any(f".{root}." in f".{key}" for root in roots)] or list(shapes)
        hint = f"{near[0]} {list(shapes[near[0]])} fits nothing" if near else "the state is empty"
        raise ValueError(
            f"diffusion head: expected one of the names {anchors} (of {family or 'any family'}) in the state; {hint}"
        )
    if len(found) > 1:
        heads = ", ".join(f"{prefix + anchor!r}" for prefix, anchor in found)
        raise ValueError(f"diffusion head: expected one head, got several, at {heads}; pass the tensors of one alone")
    prefix, anchor = next(iter(found))

    def misfit(layout: Layout) -> int:
        inside = _inside(shapes, prefix, layout)
        return len(inside ^ _names(layout, *_counts(inside, prefix, layout, family)))

    return prefix, min((layout for layout in layouts if layout.anchor == anchor), key=misfit)


def _inside(shapes: Mapping[str, tuple[int, ...]], prefix: str, layout: Layout) -> set[str]:
    """Names below the prefix that must be the head's."""
    names = {key.removeprefix(prefix) for key in shapes if key.startswith(prefix)}
    if layout.shared_prefix:
        roots = {name.split(".")[0] for name in _names(layout, 1, 1)}
        names = {name for name in names if name.split(".")[0] in roots}
    return names


def _counts(inside: set[str], prefix: str, layout: Layout, family: str | None) -> tuple[int, int]:
    """How many blocks and time embedders there are: how many numbers stand where theirs would.

    No embedder at all is believed of pocket-tts alone, where it is published: elsewhere they are missing.
    """

    def numbers(template: str) -> int:
        before, _, _ = template.partition("{}")
        return len({name.removeprefix(before).split(".")[0] for name in inside if name.startswith(before)})

    blocks = max(1, numbers(layout.down))
    if not layout.several_times:
        return blocks, 1
    timeless = family is not None or prefix.endswith(FAMILIES["pocket_tts"].prefixes)
    return blocks, max(0 if timeless else 1, numbers(layout.time[0]))


def _names(layout: Layout, blocks: int, embedders: int) -> set[str]:
    return set(_shapes(layout, blocks, embedders, 1, 1, 1, 1, 1))


def _shapes(
    layout: Layout, blocks: int, embedders: int, hidden: int, channels: int, out: int, width: int, condition: int
) -> dict[str, tuple[int, ...]]:
    """Every tensor of a head of these sizes, by its name below the prefix."""
    shapes: dict[str, tuple[int, ...]] = {}

    def linear(name: str, rows: int, columns: int) -> None:
        convolution = layout.convolution and name == layout.input
        shapes[name + ".weight"] = (rows, columns, 1, 1) if convolution else (rows, columns)
        if layout.bias == "all" or (layout.bias == "input" and name == layout.input):
            shapes[name + ".bias"] = (rows,)

    linear(layout.input, hidden, channels)
    if layout.condition:
        linear(layout.condition, hidden, condition)
    for i in range(embedders):
        linear(layout.time[0].format(i), hidden, SINUSOID_WIDTH)
        linear(layout.time[1].format(i), hidden, hidden)
        if layout.time_norm:
            shapes[layout.time_norm.format(i)] = (hidden,)
        if layout.frequencies:
            shapes[layout.frequencies.format(i)] = (SINUSOID_WIDTH // 2,)
    for i in range(blocks):
        if layout.norm:
            shapes[layout.norm.format(i) + ".weight"] = (hidden,)
            if layout.layer_norm:
                shapes[layout.norm.format(i) + ".bias"] = (hidden,)
        linear(layout.block_modulation.format(i), 3 * hidden, hidden)
        for name in layout.up:
            linear(name.format(i), 2 * width if layout.gated and len(layout.up) == 1 else width, hidden)
        linear(layout.down.format(i), hidden, width)
    linear(layout.output_modulation, 2 * hidden, hidden)
    linear(layout.output, out, hidden)
    return shapes


def _check(shapes: Mapping[str, tuple[int, ...]], prefix: str, layout: Layout, family: str | None) -> HeadSpec:
    """Every name and shape of the head, and what they say about it."""
    inside = _inside(shapes, prefix, layout)
    blocks, embedders = _counts(inside, prefix, layout, family)
    known = _names(layout, blocks, embedders)
    unknown = [name for name in shapes if name.startswith(prefix) and name[len(prefix) :] in inside - known]
    if unknown:
        kind = family or next(name for name, entry in FAMILIES.items() if layout in entry.layouts)
        raise ValueError(
            f"diffusion head: {unknown[0]} {list(shapes[unknown[0]])} fits nothing in a head like {kind}'s at "
            f"{prefix!r}, whose blocks are numbered from 0"
        )
    missing = sorted(known - inside)
    if missing:
        raise ValueError(f"diffusion head: expected {', '.join(prefix + name for name in missing)}, which are missing")

    def size(name: str, axis: int) -> int:
        shape = shapes[prefix + name + ".weight"]
        if len(shape) < 2 or min(shape) < 1:
            raise ValueError(f"diffusion head: expected a matrix {prefix + name}.weight, got shape {list(shape)}")
        return shape[axis]

    hidden, channels, out = size(layout.input, 0), size(layout.input, 1), size(layout.output, 0)
    width = size(layout.down.format(0), 1)
    condition = size(layout.condition, 1) if layout.condition else hidden
    for name, wanted in _shapes(layout, blocks, embedders, hidden, channels, out, width, condition).items():
        got = tuple(shapes[prefix + name])
        if got != wanted:
            raise ValueError(f"diffusion head: expected {prefix + name} {list(wanted)}, got {list(got)}")
    family = _name_family(prefix, layout, family, channels, out)
    return HeadSpec(
        family=family, hidden_size=hidden, blocks=blocks, ffn_width=width, channels=channels, out_channels=out,
        condition_channels=condition, norm="layer" if layout.layer_norm else "rms", affine=layout.norm is not None,
        eps=layout.eps, ffn="swiglu" if layout.gated else "mlp", bias=layout.bias,
        condition_projection=layout.condition is not None, time_embedders=embedders,
        time_norm=layout.time_norm is not None,
    )  # fmt: skip


def _name_family(prefix: str, layout: Layout, family: str | None, channels: int, out: int) -> str:
    able = {name: entry for name, entry in FAMILIES.items() if layout in entry.layouts and family in (name, None)}
    fitting = {name: entry for name, entry in able.items() if out in [ratio * channels for ratio in entry.ratios]}
    if not fitting:
        wanted = sorted({ratio * channels for entry in able.values() for ratio in entry.ratios})
        raise ValueError(
            f"diffusion head: expected {prefix + layout.output}.weight with {' or '.join(map(str, wanted))} rows, of a "
            f"{' or '.join(able)} head with {channels} channels, got {out}"
        )
    by_prefix = [name for name, entry in fitting.items() if prefix.endswith(entry.prefixes)]
    by_ratio = [name for name, entry in fitting.items() if out == entry.ratios[0] * channels]
    candidates = list(fitting) if len(fitting) == 1 else by_prefix or by_ratio
    if len(candidates) > 1:
        raise ValueError(
            f"diffusion head: the weights at {prefix!r} fit {', '.join(candidates)}; pass one of them as family"
        )
    return candidates[0]


class _Reader:
    """Reads a head's tensors and checks that they are finite; rounds what was folded to the dtype asked for."""

    def __init__(
        self, prefix: str, read: Callable[[str], Tensor], dtype: torch.dtype | None, device: torch.device | str | None
    ) -> None:
        self.prefix, self.read, self.dtype, self.device = prefix, read, dtype, device

    def __call__(self, name: str) -> Tensor:
        """A tensor as it was published."""
        tensor = self.read(self.prefix + name).detach()
        if tensor.dtype not in DTYPES:
            raise ValueError(
                f"diffusion head: expected {self.prefix + name} of {', '.join(map(str, DTYPES))}, got {tensor.dtype}"
            )
        if not torch.isfinite(tensor).all():
            raise ValueError(f"diffusion head: expected finite weights, got NaN or inf in {self.prefix + name}")
        return tensor if self.device is None else tensor.to(self.device)

    def linear(self, name: str, has_bias: bool) -> tuple[Tensor, Tensor]:
        """Weight and bias as published; a bias of zeros where the family has none."""
        weight = self(name + ".weight").flatten(1)
        return weight, self(name + ".bias") if has_bias else weight.new_zeros(len(weight))

    def rounded(self, name: str, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """Weight and bias in their final dtypes, refusing what these cannot hold (float16 ends at 65504)."""
        assert self.dtype is not None
        state_dtype = torch.promote_types(self.dtype, torch.float32)
        weight, bias = weight.to(self.dtype).contiguous(), bias.to(state_dtype).contiguous()
        if not (torch.isfinite(weight).all() and torch.isfinite(bias).all()):
            raise ValueError(
                f"diffusion head: {self.prefix + name} does not fit {self.dtype}; pass dtype=torch.float32"
            )
        return weight, bias

    def rounded_linear(self, name: str, has_bias: bool) -> tuple[Tensor, Tensor]:
        """New tensors: a head shares none with the state, which may be a file's pages."""
        weight, bias = self.linear(name, has_bias)
        return self.rounded(name, weight.clone(), bias.clone())


def _fold(spec: HeadSpec, layout: Layout, reader: _Reader) -> FoldedHead:
    biased = layout.bias == "all"
    published = reader(layout.input + ".weight")
    reader.dtype, reader.device = reader.dtype or published.dtype, published.device
    input_weight, input_bias = reader.rounded_linear(layout.input, layout.bias != "none")
    modulations, ups, downs = [], [], []
    for i in range(spec.blocks):
        modulation = reader.linear(layout.block_modulation.format(i), biased)
        parts = [reader.linear(name.format(i), biased) for name in layout.up]
        up, up_bias = (torch.cat(pair) for pair in zip(*parts, strict=True))
        if layout.silu_second:
            up, up_bias = up.roll(spec.ffn_width, 0), up_bias.roll(spec.ffn_width, 0)
        if layout.norm:
            norm = layout.norm.format(i)
            bias = reader(norm + ".bias") if layout.layer_norm else None
            modulation, up = _fold_norm(*modulation, up, reader(norm + ".weight"), bias)
        modulations.append(reader.rounded(layout.block_modulation.format(i), *modulation))
        ups.append(reader.rounded(layout.up[0].format(i), up, up_bias))
        downs.append(reader.rounded_linear(layout.down.format(i), biased))
    modulations.append(reader.rounded_linear(layout.output_modulation, biased))
    modulation_weight, modulation_bias = (torch.cat(pair) for pair in zip(*modulations, strict=True))
    up_weight, up_bias = (torch.stack(pair) for pair in zip(*ups, strict=True))
    down_weight, down_bias = (torch.stack(pair) for pair in zip(*downs, strict=True))
    output_weight, output_bias = reader.rounded_linear(layout.output, biased)
    weights = HeadWeights(
        input_weight, input_bias, modulation_weight, modulation_bias, up_weight, up_bias, down_weight, down_bias,
        output_weight, output_bias, layer_norm=layout.layer_norm, eps=layout.eps,
    )  # fmt: skip
    condition = reader.rounded_linear(layout.condition, biased) if layout.condition else (None, None)
    return FoldedHead(spec, weights, _time_weights(spec, layout, reader), *condition)


def _fold_norm(
    modulation: Tensor, modulation_bias: Tensor, up: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Modulations and FFN input, in float64, that do to norm(x) what the published ones do to norm(x)·weight + bias.

    (n·w + b)·(1 + scale) + shift = c·(n·(1 + scale') + shift') with scale' = (w/c)·(1 + scale) − 1 and
    shift' = (shift + b·(1 + scale))/c; c goes into the columns of `up`. c is the power of two nearest to w, which is
    exact: without it a small w would leave scale' near −1, and rounding that would cost 1 + scale' its leading bits.
    """
    weight = weight.double()
    exponent = weight.abs().log2().round().clamp(-MAX_EXPONENT, MAX_EXPONENT)
    power = torch.where(weight == 0, 1.0, exponent.exp2().copysign(weight))
    ratio = weight / power
    shift, scale, gate = modulation.double().chunk(3)
    shift_bias, scale_bias, gate_bias = modulation_bias.double().chunk(3)
    if bias is not None:
        bias = bias.double()
        shift, shift_bias = shift + bias[:, None] * scale, shift_bias + bias * (1 + scale_bias)
    folded = torch.cat([shift / power[:, None], ratio[:, None] * scale, gate])
    folded_bias = torch.cat([shift_bias / power, ratio * (1 + scale_bias) - 1, gate_bias])
    return (folded, folded_bias), up.double() * power


def _time_weights(spec: HeadSpec, layout: Layout, reader: _Reader) -> TimeWeights | None:
    if spec.time_embedders == 0:
        return None
    count, biased, half = range(spec.time_embedders), layout.bias == "all", SINUSOID_WIDTH // 2
    first, second = ([reader.rounded_linear(template.format(i), biased) for i in count] for template in layout.time)
    if layout.frequencies:
        frequencies = torch.stack([reader(layout.frequencies.format(i)).double() for i in count])
    else:
        i = torch.arange(half, dtype=torch.float64, device=reader.device)
        frequencies = torch.exp(-math.log(SINUSOID_PERIOD) * i / half)[None]
    norms = [reader(layout.time_norm.format(i)).double() for i in count] if layout.time_norm else None
    first_weight, first_bias = (torch.stack(pair) for pair in zip(*first, strict=True))
    second_weight, second_bias = (torch.stack(pair) for pair in zip(*second, strict=True))
    norm_weight = None if norms is None else torch.stack(norms)
    return TimeWeights(frequencies, first_weight, first_bias, second_weight, second_bias, norm_weight)
