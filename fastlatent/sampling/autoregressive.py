"""Next-token diffusion sampling: a KV-cached backbone, and a head whose modulations are computed ahead of its loop."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastlatent.diffusion.noise import normal
from fastlatent.diffusion.solvers import SolverTable
from fastlatent.models.transformer import Transformer
from fastlatent.ops import solver_step

# The modulations of one chunk of solver steps take at most this much, or one step.
WORKSPACE_BYTES = 64 * 2**20


class NextTokenSampler:
    """Samples sequences of latents, token by token. No scheduler object, no host synchronisation in the loop.

    Args:
        model: in evaluation mode; its dtype is that of weights, norms and attention. Solver state and coefficients
            are float32, or float64 where the model is.
        table: the solver's coefficients.
        cfg_scale: guidance u + cfg_scale·(c − u) with the null class; 1 leaves the unconditional branch out.
        compile: torch.compile the two functions that do the work.
    """

    def __init__(self, model: Transformer, table: SolverTable, *, cfg_scale: float, compile: bool = False) -> None:
        self.model, self.table, self.cfg_scale = model, table, cfg_scale
        weight = model.condition_layer.linear.weight
        self.dtype, self.device = weight.dtype, weight.device
        self.state_dtype = torch.promote_types(self.dtype, torch.float32)
        self.ways = 1 if cfg_scale == 1 else 2
        self.head = model.head
        self._rows = table.rows.to(self.device, self.state_dtype).unbind(0)
        with torch.inference_mode():
            self._t_embedding = model.t_embedder(table.timesteps.to(self.device))[:, None]
            self._modulation_weight = self.head.modulation_weight()
        wrap: Callable = torch.compile if compile else lambda function: function
        self._step = wrap(model.step)
        self._denoise = wrap(self.head.denoise)

    @torch.inference_mode()
    def sample(
        self,
        labels: Tensor,
        noise: Tensor,
        *,
        seed: int = 0,
        first_id: int = 0,
        on_token: Callable[[], None] = lambda: None,
    ) -> Tensor:
        """Sample one sequence per label.

        Args:
            labels: int64 [B], classes from 0.
            noise: [B, N, C], the start noise of every token in raster order.
            seed, first_id: row i draws the noise that its solver adds (ddpm) as sample first_id + i.
            on_token: called after each token of the batch; may raise to stop.

        Returns:
            [B, N, C] in the state dtype, before de-normalisation.

        Raises:
            ValueError: labels or noise do not fit the model.
        """
        config, batch = self.model.config, len(labels)
        expected = (batch, config.num_tokens, config.in_channels)
        if noise.shape != expected:
            raise ValueError(
                f"noise: expected {list(expected)} [labels, input_size², in_channels], got {list(noise.shape)}"
            )
        if batch and (labels.min() < 0 or labels.max() >= config.num_classes):
            raise ValueError(
                f"labels: expected 0 to {config.num_classes - 1}, got {int(labels.min())} to {int(labels.max())}"
            )
        labels, noise = labels.to(self.device), noise.to(self.device, self.state_dtype)
        if self.ways == 2:
            labels = torch.cat([labels, torch.full_like(labels, config.num_classes)])
        guidance = torch.tensor([1.0] if self.ways == 1 else [self.cfg_scale, 1 - self.cfg_scale], dtype=torch.float64)
        guidance = guidance.to(self.device, self.state_dtype)[:, None].expand(self.ways, batch).contiguous()
        cache = self.model.new_cache(self.ways * batch)
        latents = torch.empty_like(noise)
        h = self.model.y_embedder(labels)
        for position in range(config.num_tokens):
            condition = self._step(h, position, cache)
            latents[:, position] = self._token(condition, noise[:, position], guidance, seed, first_id, position)
            h = self.model.x_embedder(latents[:, position].to(self.dtype)).repeat(self.ways, 1)
            on_token()
        return latents

    def _token(
        self, condition: Tensor, noise: Tensor, guidance: Tensor, seed: int, first_id: int, position: int
    ) -> Tensor:
        """Denoise one token of each row: condition [W·B, hidden], noise [B, C] → [B, C]."""
        batch, channels = noise.shape
        condition = condition.unflatten(0, (self.ways, batch))
        state = torch.zeros((4, batch, channels), dtype=self.state_dtype, device=self.device)
        state[0] = noise
        added = None
        if self.table.needs_noise:
            # [B, S, C]; call 0 is the start noise, so token i draws as call i + 1.
            ids = range(first_id, first_id + batch)
            added = normal(seed, ids, position + 1, (len(self._rows), channels)).to(self.device, self.state_dtype)
        step_bytes = condition[..., :1].numel() * self._modulation_weight.shape[0] * self._modulation_weight.itemsize
        chunk = max(1, WORKSPACE_BYTES // max(1, step_bytes))
        for begin in range(0, len(self._rows), chunk):
            t_embedding = self._t_embedding[begin : begin + chunk, :, None]
            modulations = self.head.modulations(condition, t_embedding, self._modulation_weight)
            for k, modulation in enumerate(modulations, begin):
                output = self._denoise(state[0].to(self.dtype), modulation)
                solver_step(
                    state,
                    output,
                    guidance,
                    self._rows[k],
                    None if added is None else added[:, k].contiguous(),
                )
        return state[0]
