"""solver_step: one step of any sampler as one row of coefficients, with guidance, in place."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlatent import _native
from fastlatent.ops._library import LIBRARY

# Columns of a coefficient row. The last two of its 16 are spare: a float32 row fills one 64-byte cache line.
ROW = 16
P, Q, R, A, F, B, C, D, E, S, L0, L1, BASE, T = range(14)

LIBRARY.define("solver_step(Tensor(a!) state, Tensor output, Tensor guidance, Tensor row, Tensor? noise=None) -> ()")


def solver_step(state: Tensor, output: Tensor, guidance: Tensor, row: Tensor, noise: Tensor | None = None) -> None:
    """Advance `state` by one solver step in place. Everything is computed in the state's dtype.

    With o = sum_j guidance[j] * output[j] and z = noise, elementwise over [B, C]:

        data   = clip(p*x + q*o, -r, r)
        x_base = x if base != 0 else x_base
        x'     = a*x + f*x_base + b*data + c*D1 + d*D2 + e*o + s*z * exp((l0 + l1*(v + 1)/2) / 2)
        state  = (x', data, D1, x_base)

    The exp factor is 1 unless the network predicts its variance (learned range, Nichol & Dhariwal 2021); then
    v is the second half of way 0's output. Tables of rows come from `fastlatent.diffusion.solvers`.

    Args:
        state: contiguous float32 or float64 [4, B, C] = (x, D1, D2, x_base). Zero the last three before the
            first step: a coefficient of 0 does not silence a NaN.
        output: the network's output [W, B, C], or [W, B, 2C] with learned variance, for W guidance ways;
            float64, float32, bfloat16 or float16.
        guidance: [W, B] weights in the state's dtype. Classifier-free guidance with scale s is (s, 1 - s) for
            (conditional, unconditional).
        row: [16] coefficients in the state's dtype: p, q, r, a, f, b, c, d, e, s, l0, l1, base, t and two
            spares, at this module's P, Q, ... T. r = inf does not clip. t is for the caller.
        noise: [B, C] standard normal in the state's dtype. None leaves out the last term: that is only right
            where s is 0, and checking would wait for the device. `SolverTable.needs_noise` tells.

    Raises:
        ValueError: a shape, dtype, device or layout is not as above, or an input requires grad.
        RuntimeError: the compiled library is missing.
    """
    if state.ndim != 3 or state.shape[0] != 4 or state.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"solver_step: expected state [4, B, C] of torch.float32 or torch.float64, got {_describe(state)}"
        )
    if not state.is_contiguous():
        raise ValueError(f"solver_step: expected a contiguous state, got {_describe(state)}")
    _, batch, channels = state.shape
    if (
        output.ndim != 3
        or output.shape[0] < 1
        or output.shape[1] != batch
        or output.shape[2] not in (channels, 2 * channels)
        or str(output.dtype).removeprefix("torch.") not in _native.DTYPE_CODES
    ):
        raise ValueError(
            f"solver_step: expected output [W >= 1, {batch}, {channels} or {2 * channels}] of one of "
            f"{', '.join(_native.DTYPE_CODES)}, got {_describe(output)}"
        )
    named = {"state": state, "output": output, "guidance": guidance, "row": row}
    shapes = {"guidance": (output.shape[0], batch), "row": (ROW,)}
    if noise is not None:
        named["noise"] = noise
        shapes["noise"] = (batch, channels)
    for name, shape in shapes.items():
        if named[name].shape != shape or named[name].dtype != state.dtype:
            raise ValueError(
                f"solver_step: expected {name} {list(shape)} of {state.dtype}, got {_describe(named[name])}"
            )
    for name, tensor in named.items():
        if tensor.device != state.device:
            raise ValueError(f"solver_step: expected {name} on {state.device} like state, got {_describe(tensor)}")
        if tensor.requires_grad:
            raise ValueError(
                f"solver_step: expected inputs without gradient, got {name} that requires grad; this op only "
                "runs forward: compute it under torch.no_grad() or detach it"
            )
    torch.ops.fastlatent.solver_step.default(state, output, guidance, row, noise)


def solver_step_reference(
    state: Tensor, output: Tensor, guidance: Tensor, row: Tensor, noise: Tensor | None = None
) -> None:
    """The definition of `solver_step`, in plain torch; in place too."""
    x, d1, d2, x_base = state
    channels = state.shape[2]
    output = output.to(state.dtype)
    o = guidance[0, :, None] * output[0, :, :channels]
    for way in range(1, output.shape[0]):
        o = o + guidance[way, :, None] * output[way, :, :channels]
    data = (row[P] * x + row[Q] * o).clamp(-row[R], row[R])
    base = torch.where(row[BASE] != 0, x, x_base)
    following = row[A] * x + row[F] * base + row[B] * data + row[C] * d1 + row[D] * d2 + row[E] * o
    if noise is not None:
        scale = row[S]
        if output.shape[2] != channels:
            v = output[0, :, channels:]
            scale = scale * torch.exp(0.5 * (row[L0] + row[L1] * (0.5 * (v + 1))))
        following = following + scale * noise
    state.copy_(torch.stack((following, data, d1, base)))


# The dispatcher leaves out a trailing argument that equals its default, so each backend repeats `noise=None`.
def _cpu(state: Tensor, output: Tensor, guidance: Tensor, row: Tensor, noise: Tensor | None = None) -> None:
    output, guidance, row = output.contiguous(), guidance.contiguous(), row.contiguous()
    noise = None if noise is None else noise.contiguous()
    ways, batch, out_channels = output.shape
    codes = [_native.DTYPE_CODES[str(tensor.dtype).removeprefix("torch.")] for tensor in (state, output)]
    _native.call(
        "cpu", "solver_step", state.data_ptr(), output.data_ptr(), guidance.data_ptr(), row.data_ptr(),
        None if noise is None else noise.data_ptr(), ways, batch, state.shape[2], out_channels, *codes,
    )  # fmt: skip


def _cuda(state: Tensor, output: Tensor, guidance: Tensor, row: Tensor, noise: Tensor | None = None) -> None:
    from fastlatent.kernels.solver_step import solver_step_triton

    with torch.cuda.device(state.device):
        solver_step_triton(
            state, output.contiguous(), guidance.contiguous(), row.contiguous(),
            None if noise is None else noise.contiguous(),
        )  # fmt: skip


def _describe(tensor: Tensor) -> str:
    layout = "contiguous" if tensor.is_contiguous() else f"strides {tensor.stride()}"
    return f"{list(tensor.shape)} {tensor.dtype} on {tensor.device}, {layout}"


LIBRARY.impl("solver_step", solver_step_reference, "CompositeExplicitAutograd")
LIBRARY.impl("solver_step", _cpu, "CPU")
LIBRARY.impl("solver_step", _cuda, "CUDA")


@torch.library.register_fake("fastlatent::solver_step", lib=LIBRARY)
def _fake(state: Tensor, output: Tensor, guidance: Tensor, row: Tensor, noise: Tensor | None = None) -> None:
    return None
