"""Triton kernel for fastlatent.ops.solver_step."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Elements per program: 4 per thread of 4 warps, one 16-byte access each in float32.
TILE = 512
# Memory bounds this kernel, so fused multiply-adds gain nothing; without them its bits are the CPU's.
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}


# Channels alone decide the alignment, so one compilation serves every batch size.
@triton.jit(do_not_specialize=["batch"])
def solver_step_kernel(
    state_ptr,
    output_ptr,
    guidance_ptr,
    row_ptr,
    noise_ptr,
    batch,
    channels,
    out_channels,
    WAYS: tl.constexpr,
    HAS_NOISE: tl.constexpr,
    LEARNED_VARIANCE: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    # int64: the state's 4 * batch * channels elements pass 2^31 where one plane has 2 GiB of float32.
    batch = tl.cast(batch, tl.int64)
    n = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)[:, None]
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    mask = (n < batch) & (c < channels)
    plane = batch * channels
    x_ptr = state_ptr + n * channels + c
    x = tl.load(x_ptr, mask=mask)
    d1 = tl.load(x_ptr + plane, mask=mask)
    d2 = tl.load(x_ptr + 2 * plane, mask=mask)
    x_base = tl.load(x_ptr + 3 * plane, mask=mask)

    # Every load of the output is converted at once: the interpreter computes garbage on bfloat16.
    first_ptr = output_ptr + n * out_channels + c
    weight_ptr = guidance_ptr + n
    o = tl.load(weight_ptr, mask=n < batch) * tl.load(first_ptr, mask=mask).to(x.dtype)
    for way in tl.static_range(1, WAYS):
        weight = tl.load(weight_ptr + way * batch, mask=n < batch)
        o += weight * tl.load(first_ptr + way * (batch * out_channels), mask=mask).to(x.dtype)

    # Columns in the order of fastlatent/ops/solver_step.py: p q r a f b c d e s l0 l1 base.
    r = tl.load(row_ptr + 2)
    data = tl.load(row_ptr) * x + tl.load(row_ptr + 1) * o
    # tl.clamp would drop a NaN; torch.clamp keeps it.
    data = tl.where(data < -r, -r, data)
    data = tl.where(data > r, r, data)
    base = tl.where(tl.load(row_ptr + 12) != 0, x, x_base)
    following = tl.load(row_ptr + 3) * x + tl.load(row_ptr + 4) * base
    following += tl.load(row_ptr + 5) * data
    following += tl.load(row_ptr + 6) * d1
    following += tl.load(row_ptr + 7) * d2
    following += tl.load(row_ptr + 8) * o
    if HAS_NOISE:
        z = tl.load(noise_ptr + n * channels + c, mask=mask)
        scale = tl.load(row_ptr + 9)
        if LEARNED_VARIANCE:
            v = tl.load(first_ptr + channels, mask=mask).to(x.dtype)
            scale *= tl.exp(0.5 * (tl.load(row_ptr + 10) + tl.load(row_ptr + 11) * (0.5 * (v + 1))))
        following += scale * z

    tl.store(x_ptr, following, mask=mask)
    tl.store(x_ptr + plane, data, mask=mask)
    tl.store(x_ptr + 2 * plane, d1, mask=mask)
    tl.store(x_ptr + 3 * plane, base, mask=mask)


def _constants(ways: int, channels: int, out_channels: int, has_noise: bool) -> dict[str, int | bool]:
    block_c = min(triton.next_power_of_2(channels), TILE)
    return {
        "WAYS": ways,
        "HAS_NOISE": has_noise,
        "LEARNED_VARIANCE": out_channels != channels,
        "BLOCK_B": TILE // block_c,
        "BLOCK_C": block_c,
    }


def solver_step_triton(state: Tensor, output: Tensor, guidance: Tensor, row: Tensor, noise: Tensor | None) -> None:
    """Launch over contiguous tensors, as checked by `fastlatent.ops.solver_step.solver_step`."""
    if state.numel() == 0:
        return  # a CUDA grid cannot be empty
    ways, batch, out_channels = output.shape
    channels = state.shape[2]
    constants = _constants(ways, channels, out_channels, noise is not None)
    grid = (triton.cdiv(batch, constants["BLOCK_B"]), triton.cdiv(channels, constants["BLOCK_C"]))
    solver_step_kernel[grid](
        state, output, guidance, row, noise, batch, channels, out_channels, **constants, **OPTIONS
    )  # fmt: skip


def aot_cases() -> list[dict]:
    """What tools/kernel_table compiles: each case specialised as the launcher's arguments are."""
    cases = []
    for state, output, channels, out_channels in (
        ("fp32", "bf16", 16, 16),
        ("fp32", "bf16", 16, 32),  # learned variance
        ("fp64", "fp64", 16, 32),
        ("fp32", "fp32", 1, 2),  # a size of 1 is specialised as a constant, which has other methods than a tensor
    ):
        signature = dict.fromkeys(("state_ptr", "output_ptr", "guidance_ptr", "row_ptr", "noise_ptr"), f"*{state}")
        signature |= {"output_ptr": f"*{output}", "batch": "i32", "channels": "i32", "out_channels": "i32"}
        constants = _constants(2, channels, out_channels, True) | ({"channels": 1} if channels == 1 else {})
        multiples_of_16 = (0, 1, 2, 3, 4, 6, 7) if channels == 16 else (0, 1, 2, 3, 4)  # addresses and sizes

        def launch(state=state, output=output, channels=channels, out_channels=out_channels) -> None:
            dtypes = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16}
            shapes = ((4, 3, channels), (2, 3, out_channels), (2, 3), (16,), (3, channels))
            tensors = [torch.empty(shape, dtype=dtypes[state], device="meta") for shape in shapes]
            tensors[1] = tensors[1].to(dtypes[output])
            solver_step_triton(*tensors)

        cases.append(
            {
                "name": f"{state} state, {output} output, {channels} -> {out_channels}",
                "kernel": solver_step_kernel,
                "signature": signature | dict.fromkeys(constants, "constexpr"),
                "constants": constants,
                "attrs": {(i,): [["tt.divisibility", 16]] for i in multiples_of_16},
                "options": OPTIONS,
                "wgmma": False,
                "launch": launch,
            }
        )
    return cases
