"""diffusion_head_sample: every solver step of a whole per-token diffusion head, for every published family."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlatent import _native
from fastlatent.ops._library import LIBRARY
from fastlatent.ops.norm_modulate import norm_modulate
from fastlatent.ops.solver_step import ROW, solver_step, solver_step_reference
from fastlatent.ops.swiglu_mlp import swiglu_mlp

# The modulations of one chunk of solver steps take at most this much, or one step.
WORKSPACE_BYTES = 64 * 2**20
# The widest vectors of the C++ path, in float32 lanes: AVX-512. Tests run the narrower ones, 8 and 4.
CPU_LANES = 16
# The most rows for which "auto" takes the C++ path on the CPU, by the dtype of the FFNs. At 16 it wins in all of them
# (LatentLM-Medium, 20 steps on 2 cores with AVX-512, ms: float32 236 against 676, bfloat16 169 and 199, int8 165).
CPU_FEW_ROWS = {torch.float32: 32, torch.bfloat16: 16, torch.float16: 16, torch.int8: 32}
Path = Literal["auto", "reference", "few_rows", "many_rows"]
# A prediction from the bytes that each path moves; benchmarks/bench_diffusion_head_sample.py forces both to measure it.
CUDA_FEW_ROWS = 32
PATHS = ("auto", "reference", "few_rows", "many_rows")


@dataclass(frozen=True, eq=False)
class HeadWeights:
    """A head in the one form that every published family folds into (`fastlatent.heads`); L blocks of

        x ← x + gate ⊙ FFN(norm(x)·(1 + scale) + shift),   FFN(h) = down(silu(up₀ h) ⊙ up₁ h) or down(silu(up h)),

    then output(norm(x)·(1 + scale) + shift). The norm has no weight: an affine one is folded into the modulations.
    Modulations are one product of silu(condition + t_embedding): (shift, scale, gate) of each block in turn, then
    (shift, scale) of the output. Families without biases carry zeros.

    Attributes:
        input_weight, input_bias: [H, C], [H].
        modulation_weight, modulation_bias: [(3L+2)·H, H], [(3L+2)·H].
        up_weight, up_bias: [L, U, H], [L, U]; U = 2F for a gated FFN (rows [:F] go through silu), U = F without gate.
        down_weight, down_bias: [L, H, F], [L, H].
        output_weight, output_bias: [O, H], [O]; O is C, or 2C with learned variance.
        up_scale, down_scale: [L, U] and [L, H] where up_weight and down_weight are int8 (weight = int8·scale).
        layer_norm: layer norm, or RMS norm.
        eps: of the norm.

    All weights have one dtype (up and down may be int8 instead); biases and scales are float32, or float64 where the
    weights are.
    """

    input_weight: Tensor
    input_bias: Tensor
    modulation_weight: Tensor
    modulation_bias: Tensor
    up_weight: Tensor
    up_bias: Tensor
    down_weight: Tensor
    down_bias: Tensor
    output_weight: Tensor
    output_bias: Tensor
    up_scale: Tensor | None = None
    down_scale: Tensor | None = None
    layer_norm: bool = False
    eps: float = 1e-6

    def __post_init__(self) -> None:
        if self.up_weight.ndim != 3 or self.down_weight.ndim != 3 or self.input_weight.ndim != 2:
            raise ValueError(
                "HeadWeights: expected up_weight [L, U, H], down_weight [L, H, F] and input_weight [H, C], got "
                f"{list(self.up_weight.shape)}, {list(self.down_weight.shape)} and {list(self.input_weight.shape)}"
            )
        blocks, up, hidden = self.up_weight.shape
        width, channels, out = self.down_weight.shape[2], self.input_weight.shape[1], len(self.output_weight)
        if up not in (width, 2 * width) or out not in (channels, 2 * channels) or min(blocks, hidden, channels) < 1:
            raise ValueError(
                f"HeadWeights: expected U = F or 2F and O = C or 2C, got U {up}, F {width}, O {out}, C {channels}"
            )
        shapes = {
            "input_weight": (hidden, channels), "input_bias": (hidden,),
            "modulation_weight": ((3 * blocks + 2) * hidden, hidden), "modulation_bias": ((3 * blocks + 2) * hidden,),
            "up_weight": (blocks, up, hidden), "up_bias": (blocks, up),
            "down_weight": (blocks, hidden, width), "down_bias": (blocks, hidden),
            "output_weight": (out, hidden), "output_bias": (out,),
            "up_scale": (blocks, up), "down_scale": (blocks, hidden),
        }  # fmt: skip
        int8 = self.up_weight.dtype == torch.int8
        for name, shape in shapes.items():
            tensor = getattr(self, name)
            if tensor is None and not int8 and name.endswith("_scale"):
                continue
            wanted = self.dtype if name.endswith("_weight") else self.state_dtype
            if int8 and name in ("up_weight", "down_weight"):
                wanted = torch.int8
            if tensor is None or tensor.shape != shape or tensor.dtype != wanted or tensor.device != self.device:
                raise ValueError(
                    f"HeadWeights: expected {name} {list(shape)} of {wanted} on {self.device}, got "
                    + ("None" if tensor is None else f"{list(tensor.shape)} {tensor.dtype} on {tensor.device}")
                )
            if not tensor.is_contiguous():
                raise ValueError(f"HeadWeights: expected a contiguous {name}, got strides {tensor.stride()}")

    @property
    def dtype(self) -> torch.dtype:
        return self.input_weight.dtype

    @property
    def state_dtype(self) -> torch.dtype:
        return torch.promote_types(self.dtype, torch.float32)

    @property
    def device(self) -> torch.device:
        return self.input_weight.device

    @property
    def hidden_size(self) -> int:
        return self.input_weight.shape[0]

    @property
    def channels(self) -> int:
        return self.input_weight.shape[1]

    @property
    def blocks(self) -> int:
        return self.up_weight.shape[0]

    @property
    def gated(self) -> bool:
        return self.up_weight.shape[1] != self.down_weight.shape[2]

    def tensors(self) -> list[Tensor | None]:
        """The weights in the order of the op's schema."""
        return [getattr(self, field.name) for field in fields(self)][:-2]


LIBRARY.define(
    "diffusion_head_sample(Tensor(a!) state, Tensor condition, Tensor t_embedding, Tensor table, Tensor guidance, "
    "Tensor? noise, Tensor input_weight, Tensor input_bias, Tensor modulation_weight, Tensor modulation_bias, "
    "Tensor up_weight, Tensor up_bias, Tensor down_weight, Tensor down_bias, Tensor output_weight, Tensor output_bias, "
    "Tensor? up_scale, Tensor? down_scale, bool layer_norm, float eps, str path) -> ()"
)


def diffusion_head_sample(
    state: Tensor,
    condition: Tensor,
    t_embedding: Tensor,
    table: Tensor,
    guidance: Tensor,
    weights: HeadWeights,
    noise: Tensor | None = None,
    *,
    path: Path = "auto",
) -> None:
    """Denoise one token of every sample: all S solver steps of all L blocks, in place. The same bits on every run.

    Args:
        state: [4, B, C] in the weights' state dtype (float32, or float64), as for `solver_step`; state[0] is the start
            noise on entry and the token on return. Zero the other three first.
        condition: [W, B, H] in the weights' dtype, for W guidance ways; after the family's condition projection.
        t_embedding: [S, H] in the weights' dtype, one row per step.
        table: [S, 16] coefficient rows in the state dtype (`fastlatent.diffusion.solvers`).
        guidance: [W, B] weights of the ways in the state dtype.
        weights: the head.
        noise: [S, B, C] standard normal in the state dtype; None only for tables that add none.
        path: "few_rows" fuses norm, modulation and activation into the weight stream (C++ on the CPU, Triton on CUDA);
            "many_rows" runs matrix products of whole tiles; "reference" is the definition in plain torch. "auto"
            chooses by `choose_path`.

    Raises:
        ValueError: a shape, dtype, device, layout or path is not as above, or an input requires grad.
    """
    hidden, channels, dtype, wide = weights.hidden_size, weights.channels, weights.dtype, weights.state_dtype
    if condition.ndim != 3 or table.ndim != 2 or len(condition) < 1 or len(table) < 1:
        raise ValueError(
            "diffusion_head_sample: expected condition [W >= 1, B, H] and table [S >= 1, 16], got "
            f"{list(condition.shape)} and {list(table.shape)}"
        )
    ways, batch, steps = condition.shape[0], condition.shape[1], table.shape[0]
    expected = {
        "state": (state, (4, batch, channels), wide),
        "condition": (condition, (ways, batch, hidden), dtype),
        "t_embedding": (t_embedding, (steps, hidden), dtype),
        "table": (table, (steps, ROW), wide),
        "guidance": (guidance, (ways, batch), wide),
    }
    if noise is not None:
        expected["noise"] = (noise, (steps, batch, channels), wide)
    for name, (tensor, shape, kind) in expected.items():
        if tensor.shape != shape or tensor.dtype != kind or tensor.device != weights.device:
            raise ValueError(
                f"diffusion_head_sample: expected {name} {list(shape)} of {kind} on {weights.device}, got "
                f"{list(tensor.shape)} {tensor.dtype} on {tensor.device}"
            )
        if not tensor.is_contiguous():
            raise ValueError(f"diffusion_head_sample: expected a contiguous {name}, got strides {tensor.stride()}")
        if tensor.requires_grad:
            raise ValueError(
                f"diffusion_head_sample: expected inputs without gradient, got {name} that requires grad; this op only "
                "runs forward: compute it under torch.no_grad() or detach it"
            )
    if any(tensor is not None and tensor.requires_grad for tensor in weights.tensors()):
        raise ValueError("diffusion_head_sample: expected weights without gradient; call requires_grad_(False) on them")
    if path not in PATHS:
        raise ValueError(f"diffusion_head_sample: expected a path of {', '.join(PATHS)}, got {path!r}")
    if path == "auto":
        path = choose_path(ways * batch, weights)
    torch.ops.fastlatent.diffusion_head_sample.default(
        state, condition, t_embedding, table, guidance, noise, *weights.tensors(), weights.layer_norm, weights.eps, path
    )


def choose_path(rows: int, weights: HeadWeights) -> Path:
    """What "auto" runs for so many rows (ways times batch)."""
    if weights.device.type == "cpu" and weights.dtype in CPU_FEW_ROWS:
        limit = CPU_FEW_ROWS[torch.int8 if weights.up_scale is not None else weights.dtype]
        return "few_rows" if rows <= limit else "many_rows"
    if weights.device.type == "cuda" and weights.dtype != torch.float64:
        # int8 weights have few-row kernels only, so more rows run the definition.
        many: Path = "many_rows" if weights.up_scale is None else "reference"
        return "few_rows" if rows <= CUDA_FEW_ROWS else many
    return "reference"


def diffusion_head_sample_reference(
    state: Tensor,
    condition: Tensor,
    t_embedding: Tensor,
    table: Tensor,
    guidance: Tensor,
    weights: HeadWeights,
    noise: Tensor | None = None,
) -> None:
    """The definition of `diffusion_head_sample`, in plain torch; in place too."""
    for begin, modulations in modulation_chunks(condition, t_embedding, weights):
        steps = slice(begin, begin + len(modulations))
        _reference(state, modulations, table[steps], guidance, None if noise is None else noise[steps], weights)


def modulation_chunks(condition: Tensor, t_embedding: Tensor, weights: HeadWeights) -> Iterator[tuple[int, Tensor]]:
    """The first step and the modulations [K, W, B, (3L+2)·H] of as many steps as fit WORKSPACE_BYTES, in turn.

    They do not depend on x, so they are one product ahead of the steps: in a small batch that spares reading
    modulation_weight at every step.
    """
    step_bytes = condition.shape[0] * condition.shape[1] * len(weights.modulation_weight) * weights.dtype.itemsize
    chunk = max(1, WORKSPACE_BYTES // max(1, step_bytes))
    for begin in range(0, len(t_embedding), chunk):
        wide = condition.to(weights.state_dtype) + t_embedding[begin : begin + chunk, None, None]
        products = F.linear(F.silu(wide).to(weights.dtype), weights.modulation_weight)
        yield begin, (products + weights.modulation_bias).to(weights.dtype)


def head_reference(x: Tensor, modulations: Tensor, weights: HeadWeights) -> Tensor:
    """One evaluation: x [B, C] and modulations [W, B, (3L+2)·H] → prediction [W, B, O], both wide.

    The residual stream and the norms are in the state dtype; what enters a product is rounded to the weights' dtype.
    """
    h = _linear(x, weights.input_weight, weights.input_bias, None, weights)
    parts = modulations.to(weights.state_dtype).unflatten(-1, (-1, weights.hidden_size)).unbind(-2)
    for i in range(weights.blocks):
        shift, scale, gate = parts[3 * i : 3 * i + 3]
        modulated = _norm(h, weights) * (1 + scale) + shift
        up_scale = None if weights.up_scale is None else weights.up_scale[i]
        down_scale = None if weights.down_scale is None else weights.down_scale[i]
        up = _linear(modulated, weights.up_weight[i], weights.up_bias[i], up_scale, weights)
        if weights.gated:
            first, second = up.chunk(2, dim=-1)
            inner = F.silu(first) * second
        else:
            inner = F.silu(up)
        h = h + gate * _linear(inner, weights.down_weight[i], weights.down_bias[i], down_scale, weights)
    shift, scale = parts[-2:]
    return _linear(_norm(h, weights) * (1 + scale) + shift, weights.output_weight, weights.output_bias, None, weights)


def _norm(x: Tensor, weights: HeadWeights) -> Tensor:
    if weights.layer_norm:
        x = x - x.mean(-1, keepdim=True)
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + weights.eps)


def _linear(x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None, weights: HeadWeights) -> Tensor:
    if scale is None:
        return F.linear(x.to(weights.dtype), weight).to(weights.state_dtype) + bias
    return F.linear(x.to(weights.dtype).to(weights.state_dtype), weight.to(weights.state_dtype)) * scale + bias


def _run(
    state: Tensor, condition: Tensor, t_embedding: Tensor, table: Tensor, guidance: Tensor, noise: Tensor | None,
    input_weight: Tensor, input_bias: Tensor, modulation_weight: Tensor, modulation_bias: Tensor, up_weight: Tensor,
    up_bias: Tensor, down_weight: Tensor, down_bias: Tensor, output_weight: Tensor, output_bias: Tensor,
    up_scale: Tensor | None, down_scale: Tensor | None, layer_norm: bool, eps: float, path: str,
) -> None:  # fmt: skip
    weights = HeadWeights(
        input_weight, input_bias, modulation_weight, modulation_bias, up_weight, up_bias, down_weight, down_bias,
        output_weight, output_bias, up_scale, down_scale, layer_norm, eps,
    )  # fmt: skip
    # Who calls torch.ops, as an exported program does, skips the checks above, and kernels read addresses.
    if not state.is_contiguous():
        raise ValueError(f"diffusion_head_sample: expected a contiguous state, got strides {state.stride()}")
    condition, table, guidance = condition.contiguous(), table.contiguous(), guidance.contiguous()
    noise = None if noise is None else noise.contiguous()
    runs = {
        "cpu": {"few_rows": _few_rows_cpu, "many_rows": _reference},
        "cuda": {"few_rows": _few_rows_cuda, "many_rows": _many_rows_cuda},
    }
    run = _reference if path == "reference" else runs.get(state.device.type, {}).get(path)
    if run is None:
        raise ValueError(f"diffusion_head_sample: path {path!r} does not run on {state.device}")
    for begin, modulations in modulation_chunks(condition, t_embedding, weights):
        steps = slice(begin, begin + len(modulations))
        run(state, modulations, table[steps], guidance, None if noise is None else noise[steps], weights)


# Each runs the K solver steps of one chunk: modulations [K, W, B, (3L+2)·H], table [K, 16], noise [K, B, C].


def _reference(
    state: Tensor, modulations: Tensor, table: Tensor, guidance: Tensor, noise: Tensor | None, weights: HeadWeights
) -> None:
    for k, modulation in enumerate(modulations):
        output = head_reference(state[0], modulation, weights)
        solver_step_reference(state, output, guidance, table[k], None if noise is None else noise[k])


def _few_rows_cuda(
    state: Tensor, modulations: Tensor, table: Tensor, guidance: Tensor, noise: Tensor | None, weights: HeadWeights
) -> None:
    from fastlatent.kernels.diffusion_head_sample import MAX_ROWS, head_steps_triton

    rows = modulations.shape[1] * modulations.shape[2]
    if weights.dtype == torch.float64 or rows > MAX_ROWS:
        raise ValueError(
            f"diffusion_head_sample: expected at most {MAX_ROWS} rows and no float64 for path 'few_rows' on CUDA, got "
            f"{rows} rows of {weights.dtype}; use path 'many_rows' or 'reference'"
        )
    body = [weights.input_weight, weights.input_bias, *weights.tensors()[4:]]
    with torch.cuda.device(state.device):
        head_steps_triton(state, modulations, table, guidance, noise, *body, weights.layer_norm, weights.eps)


def _many_rows_cuda(
    state: Tensor, modulations: Tensor, table: Tensor, guidance: Tensor, noise: Tensor | None, weights: HeadWeights
) -> None:
    """Norm and modulation in one kernel, products with fused epilogues, and the solver step as its op."""
    if weights.up_scale is not None or weights.dtype == torch.float64:
        raise ValueError(
            "diffusion_head_sample: expected float32, bfloat16 or float16 weights for path 'many_rows' on CUDA, got "
            f"{weights.up_weight.dtype} of {weights.dtype}; use path 'reference'"
        )
    ways, batch = modulations.shape[1:3]
    w = weights
    for k, modulation in enumerate(modulations.flatten(1, 2)):
        parts = modulation.split(w.hidden_size, dim=-1)
        x = F.linear(state[0].to(w.dtype), w.input_weight).to(w.state_dtype) + w.input_bias
        h = x.repeat(ways, 1)
        for i in range(w.blocks):
            shift, scale, gate = parts[3 * i : 3 * i + 3]
            modulated = norm_modulate(h, shift, scale, layer_norm=w.layer_norm, eps=w.eps)
            h = swiglu_mlp(modulated, w.up_weight[i], w.up_bias[i], w.down_weight[i], w.down_bias[i], h, gate)
        modulated = norm_modulate(h, *parts[-2:], layer_norm=w.layer_norm, eps=w.eps)
        output = F.linear(modulated, w.output_weight).to(w.state_dtype) + w.output_bias
        solver_step(state, output.unflatten(0, (ways, batch)), guidance, table[k], None if noise is None else noise[k])


def _few_rows_cpu(
    state: Tensor, modulations: Tensor, table: Tensor, guidance: Tensor, noise: Tensor | None, weights: HeadWeights
) -> None:
    """All steps in one C++ call. Activations stay float32: they are not rounded to the weights' dtype."""
    if weights.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(
            "diffusion_head_sample: expected float32, bfloat16 or float16 weights for path 'few_rows' on the CPU, got "
            f"{weights.dtype}; use path 'many_rows'"
        )
    dtype = _native.DTYPE_CODES[str(weights.dtype).removeprefix("torch.")]
    tensors = [state, modulations, table, guidance, noise]
    tensors += [weights.input_weight, weights.input_bias, *weights.tensors()[4:]]
    _native.call(
        "cpu", "diffusion_head_sample", *(None if x is None else x.data_ptr() for x in tensors),
        *modulations.shape[:3], weights.channels, len(weights.output_weight), weights.hidden_size,
        weights.down_weight.shape[2], weights.blocks, weights.gated, weights.layer_norm, weights.eps, dtype,
        torch.get_num_threads(), CPU_LANES,
    )  # fmt: skip


LIBRARY.impl("diffusion_head_sample", _run, "CompositeExplicitAutograd")


@torch.library.register_fake("fastlatent::diffusion_head_sample", lib=LIBRARY)
def _fake(state: Tensor, *args: object) -> None:
    return None
