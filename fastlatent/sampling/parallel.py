"""Sampling of whole images: all values of all samples of a batch take a solver step together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastlatent.diffusion.noise import normal
from fastlatent.diffusion.solvers import SolverTable
from fastlatent.ops.solver_step import solver_step
from fastlatent.sampling.graphs import TokenGraphs, batch_bucket

# (x [R, C, H, W] in the model's dtype, timesteps float64 [R], condition [R, ...] or None) → prediction [R, C, H, W].
Denoise = Callable[[Tensor, Tensor, Tensor | None], Tensor]


@dataclass(frozen=True)
class _Batch:
    """What a batch writes to while it is sampled: allocated once, at fixed addresses. W ways of B samples."""

    step: Tensor  # int64 [1]
    state: Tensor  # [4, B, C·H·W]
    added: Tensor | None  # [B, C·H·W], the noise that the solver adds at this step
    guidance: Tensor  # [W, B]
    condition: Tensor | None  # [W·B, ...]


class ParallelSampler:
    """Samples batches of images or latents: no scheduler object, no host synchronisation in the loop.

    A batch is padded to a bucket (`batch_bucket`), so a sample has the same bits whatever it shares the bucket with.
    On CUDA a step is one graph launch.

    Args:
        denoise: the model, in evaluation mode. Its rows must not depend on each other.
        table: the solver's coefficients and timesteps.
        shape: (C, H, W) of a sample.
        dtype: of the model. Solver state and coefficients are float32, or float64 where the model is.
        device: of the model.
        cfg_scale: guidance u + cfg_scale·(c − u); 1 leaves the unconditional branch out.
        null: the condition of that branch, [...] without a batch; None for a model that cannot be guided.
    """

    def __init__(
        self,
        denoise: Denoise,
        table: SolverTable,
        shape: tuple[int, int, int],
        *,
        dtype: torch.dtype,
        device: torch.device,
        cfg_scale: float = 1.0,
        null: Tensor | None = None,
    ) -> None:
        self.denoise, self.shape, self.dtype, self.device, self.null = denoise, shape, dtype, device, null
        self.state_dtype = torch.promote_types(dtype, torch.float32)
        self.steps, self.needs_noise = len(table.rows), table.needs_noise
        weights = [1.0] if cfg_scale == 1 or null is None else [cfg_scale, 1 - cfg_scale]
        self.ways = len(weights)
        self._weights = torch.tensor(weights, dtype=torch.float64)
        self._rows = table.rows.to(device, self.state_dtype)
        self._timesteps = table.timesteps.to(device)
        self._graphs = TokenGraphs() if device.type == "cuda" else None
        self._batch: _Batch | None = None

    @torch.inference_mode()
    def sample(
        self,
        noise: Tensor,
        condition: Tensor | None = None,
        *,
        seed: int = 0,
        first_id: int = 0,
        on_step: Callable[[int], None] = lambda rows: None,
    ) -> Tensor:
        """Denoise a batch.

        Args:
            noise: [B, C, H, W], what the samples start from.
            condition: [B, ...] for the model; None for one that takes none.
            seed, first_id: row i draws the noise that its solver adds (ddpm) as sample first_id + i.
            on_step: called with the number of rows after each step; may raise to stop.

        Returns:
            [B, C, H, W] in the state dtype.

        Raises:
            ValueError: the shapes do not fit each other, or the model cannot be guided without a null.
        """
        rows = len(noise)
        if noise.shape[1:] != self.shape:
            raise ValueError(f"noise: expected [samples, {', '.join(map(str, self.shape))}], got {list(noise.shape)}")
        if condition is not None and len(condition) != rows:
            raise ValueError(f"condition: expected one row per sample ({rows}), got {list(condition.shape)}")
        if condition is None and self.null is not None:
            raise ValueError("condition: expected one row per sample for a model with a null condition, got none")
        if not rows:
            return torch.empty(noise.shape, dtype=self.state_dtype, device=self.device)
        batch = self._start(noise, condition)
        for step in range(self.steps):
            if batch.added is not None:
                # Call 0 is the start noise, so step i draws as call i + 1.
                drawn = normal(seed, range(first_id, first_id + rows), step + 1, (batch.added.shape[1],))
                drawn = drawn.to(self.state_dtype)
                if self._graphs is not None:
                    drawn = drawn.pin_memory()  # without it the copy would wait for the device
                batch.added[:rows].copy_(drawn, non_blocking=True)
            if self._graphs is None:
                self._advance(batch)
            else:
                self._graphs.run("step", lambda: self._advance(batch), keep=(batch.step, batch.state))
            on_step(rows)
        return batch.state[0, :rows].reshape(noise.shape).clone()

    def _start(self, noise: Tensor, condition: Tensor | None) -> _Batch:
        """Buffers for this batch, those of the last one where they fit, at the first step."""
        rows = len(noise)
        size = batch_bucket(rows)
        if self._batch is None or self._batch.state.shape[1] != size:
            self._batch = None  # its memory goes before the new one's comes
            if self._graphs is not None:
                self._graphs.clear()
            self._batch = self._allocate(size, condition)
        batch = self._batch
        batch.step.zero_()
        batch.state.zero_()
        batch.state[0, :rows] = noise.to(self.device, self.state_dtype).flatten(1)
        if batch.condition is not None:
            assert condition is not None
            batch.condition.zero_()  # a label of the rows that pad must be one
            batch.condition[:rows] = condition.to(self.device)
            if self.ways == 2:
                assert self.null is not None
                batch.condition[size:] = self.null.to(self.device)
        return batch

    def _allocate(self, size: int, condition: Tensor | None) -> _Batch:
        values = self.shape[0] * self.shape[1] * self.shape[2]

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=self.state_dtype, device=self.device)

        guidance = self._weights.to(self.device, self.state_dtype)[:, None].expand(-1, size).contiguous()
        batch_condition = None
        if condition is not None:
            shape = (self.ways * size, *condition.shape[1:])
            batch_condition = torch.zeros(shape, dtype=condition.dtype, device=self.device)
        return _Batch(
            torch.zeros(1, dtype=torch.int64, device=self.device),
            zeros(4, size, values),
            zeros(size, values) if self.needs_noise else None,
            guidance,
            batch_condition,
        )

    def _advance(self, batch: _Batch) -> None:
        """The step at batch.step, which is read on the device."""
        size = batch.state.shape[1]
        x = batch.state[0].to(self.dtype).reshape(size, *self.shape).repeat(self.ways, 1, 1, 1)
        t = self._timesteps.index_select(0, batch.step).expand(self.ways * size)
        output = self.denoise(x, t, batch.condition)
        row = self._rows.index_select(0, batch.step)[0]
        solver_step(batch.state, output.reshape(self.ways, size, -1), batch.guidance, row, batch.added)
        batch.step.add_(1)
