"""Next-token diffusion sampling: a KV-cached backbone, then all solver steps of the head as one op, token by token."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fastlatent.diffusion.annealing import guidance_scales
from fastlatent.diffusion.noise import normal
from fastlatent.diffusion.solvers import SolverTable
from fastlatent.heads.diffusion_head import DiffusionHead
from fastlatent.models.transformer import Transformer
from fastlatent.ops.diffusion_head_sample import HeadWeights, diffusion_head_sample
from fastlatent.sampling.attention import KVCache, choose_attention
from fastlatent.sampling.backbone import Backbone
from fastlatent.sampling.graphs import TokenGraphs, batch_bucket

# Caches of a batch may take this share of the memory that the weights leave; the rest is for activations.
CACHE_SHARE = 0.7
# Context lengths under CUDA graphs where attention reads a slice: a graph for each multiple of this.
CONTEXT_BUCKET = 64


@dataclass(frozen=True)
class _Steps:
    """A solver table on the device: what one token's denoising needs."""

    rows: Tensor
    t_embedding: Tensor
    needs_noise: bool


@dataclass(frozen=True)
class _Batch:
    """What a batch writes to while it is sampled: allocated once, at fixed addresses. W ways, R = W·B rows."""

    cache: KVCache
    h: Tensor  # [R, hidden], what enters the backbone
    position: Tensor  # int64 [1]
    state: Tensor  # [4, B, C]
    noise: Tensor  # [B, N, C]
    added: Tensor  # [S, B, C], the noise that the solver adds to this token
    guidance: Tensor  # [N, W, B]
    latents: Tensor  # [B, N, C]


class NextTokenSampler:
    """Samples sequences of latents, token by token: no scheduler object, no host synchronisation in the loop.

    On CUDA a token is one graph launch. Sequences of a batch are sampled together; a batch whose caches would not fit
    the memory is split.

    Args:
        model: in evaluation mode; its dtype is that of weights, norms and attention. Solver state and coefficients
            are float32, or float64 where the model is. The head's weights are packed, and the model's parameters
            become views of the packed ones.
        tables: the solver's coefficients; one for all tokens, or one for each (step annealing).
        cfg_scale: guidance u + cfg_scale·(c − u) with the null class; 1 leaves the unconditional branch out.
        cfg_schedule: "constant", or "linear" from 1 + (cfg_scale − 1)/N at the first token to cfg_scale at the last.
        attention: a back end of `fastlatent.sampling.attention`, "auto" chooses.
        kv_dtype: of keys and values; None for the model's, or torch.float8_e4m3fn.
        published: round timesteps and their sinusoid to the model's dtype, as the published code does.
        int8: backbone and head blocks with int8 weights, a scale per row; on the CPU, where that halves what is read.
        compile: torch.compile the backbone's step.
    """

    def __init__(
        self,
        model: Transformer,
        tables: SolverTable | Sequence[SolverTable],
        *,
        cfg_scale: float,
        cfg_schedule: str = "constant",
        attention: str = "auto",
        kv_dtype: torch.dtype | None = None,
        published: bool = False,
        int8: bool = False,
        compile: bool = False,
    ) -> None:
        self.model, config = model, model.config
        weight = model.condition_layer.linear.weight
        self.dtype, self.device = weight.dtype, weight.device
        if int8 and self.device.type != "cpu":
            raise ValueError(f"int8: runs on the CPU only, got a model on {self.device}")
        self.state_dtype = torch.promote_types(self.dtype, torch.float32)
        self.ways = 1 if cfg_scale == 1 else 2
        per_token = [tables] * config.num_tokens if isinstance(tables, SolverTable) else list(tables)
        if len(per_token) != config.num_tokens:
            raise ValueError(f"tables: expected one, or {config.num_tokens} (one per token), got {len(per_token)}")
        self.kv_dtype = kv_dtype or self.dtype
        self.attention = choose_attention(
            self.device, self.dtype, config.head_dim, self.kv_dtype, force=None if attention == "auto" else attention
        )
        with torch.inference_mode():
            head = DiffusionHead.from_state_dict(model.state_dict(), "latentlm")
            _share(model, head.weights)
            self.weights = head.quantize_int8().weights if int8 else head.weights
            self.backbone = Backbone(model, int8=int8)
            made: dict[int, _Steps] = {}
            for table in per_token:
                if id(table) not in made:
                    made[id(table)] = _Steps(
                        table.rows.to(self.device, self.state_dtype),
                        head.time_embedding(table.timesteps, published=published),
                        table.needs_noise,
                    )
            self._steps = [made[id(table)] for table in per_token]
            scales = guidance_scales(cfg_scale, config.num_tokens, cfg_schedule)
            ones = torch.ones_like(scales)
            self._guidance = torch.stack([ones] if self.ways == 1 else [scales, 1 - scales], dim=1)
        self._step: Callable[..., Tensor] = torch.compile(self.backbone.step) if compile else self.backbone.step
        self._graphs = TokenGraphs() if self.device.type == "cuda" else None
        self._batch: _Batch | None = None

    def sample(
        self,
        labels: Tensor,
        noise: Tensor,
        *,
        seed: int = 0,
        first_id: int = 0,
        on_token: Callable[[int], None] = lambda rows: None,
    ) -> Tensor:
        """Sample one sequence per label.

        Args:
            labels: int64 [B], classes from 0.
            noise: [B, N, C], the start noise of every token in raster order.
            seed, first_id: row i draws the noise that its solver adds (ddpm) as sample first_id + i.
            on_token: called with the number of rows after each token of a batch; may raise to stop.

        Returns:
            [B, N, C] in the state dtype, before de-normalisation.

        Raises:
            ValueError: labels or noise do not fit the model.
        """
        self._check(labels, noise)
        latents = torch.empty(noise.shape, dtype=self.state_dtype, device=self.device)
        size = self.max_batch()
        for begin in range(0, len(labels), size):
            part = slice(begin, begin + size)
            tokens = self.stream(labels[part], noise[part], seed=seed, first_id=first_id + begin)
            for position, token in enumerate(tokens):
                latents[part, position] = token
                on_token(len(token))
        return latents

    @torch.inference_mode()
    def stream(self, labels: Tensor, noise: Tensor, *, seed: int = 0, first_id: int = 0) -> Iterator[Tensor]:
        """As `sample`, for a batch that fits: yields the tokens [B, C] of each position as they are made.

        Closing the iterator stops; the next batch starts afresh.
        """
        self._check(labels, noise)
        if not len(labels):
            return
        batch = self._start(labels, noise)
        ids = range(first_id, first_id + len(labels))
        for position, steps in enumerate(self._steps):
            if steps.needs_noise:
                # Call 0 is the start noise, so token i draws as call i + 1.
                drawn = normal(seed, ids, position + 1, (len(steps.rows), noise.shape[2])).to(self.state_dtype)
                if self._graphs is not None:
                    drawn = drawn.pin_memory()  # without it the copy would wait for the device
                batch.added[: len(steps.rows), : len(labels)].copy_(drawn.transpose(0, 1), non_blocking=True)
            self._advance(batch, position, steps)
            yield batch.latents[: len(labels), position].clone()

    def max_batch(self) -> int:
        """Sequences whose caches fit the memory beside the weights: a number of this machine, not of its load."""
        config = self.model.config
        if self.device.type == "cuda":
            memory = torch.cuda.get_device_properties(self.device).total_memory
        else:
            memory = _host_memory()
        free = memory - sum(parameter.nbytes for parameter in self.model.parameters())
        cached = 2 * config.depth * config.num_tokens * config.num_kv_heads * config.head_dim * self.kv_dtype.itemsize
        return max(1, int(CACHE_SHARE * free / (self.ways * cached)))

    def _check(self, labels: Tensor, noise: Tensor) -> None:
        config = self.model.config
        expected = (len(labels), config.num_tokens, config.in_channels)
        if noise.shape != expected:
            raise ValueError(
                f"noise: expected {list(expected)} [labels, input_size², in_channels], got {list(noise.shape)}"
            )
        if len(labels) and (labels.min() < 0 or labels.max() >= config.num_classes):
            raise ValueError(
                f"labels: expected 0 to {config.num_classes - 1}, got {int(labels.min())} to {int(labels.max())}"
            )

    def _start(self, labels: Tensor, noise: Tensor) -> _Batch:
        """Buffers for this batch, those of the last one where they fit, at the first token."""
        config, rows = self.model.config, len(labels)
        # A graph belongs to its buffers, so on CUDA a batch is padded to a size that many batches share.
        size = batch_bucket(rows) if self._graphs is not None else rows
        if self._batch is None or self._batch.noise.shape[0] != size:
            self._batch = None  # its memory goes before the new one's comes
            if self._graphs is not None:
                self._graphs.clear()
            self._batch = self._allocate(size)
        batch = self._batch
        batch.position.zero_()
        batch.noise.zero_()
        batch.noise[:rows] = noise.to(self.device, self.state_dtype)
        padded = torch.zeros(size, dtype=torch.int64, device=self.device)
        padded[:rows] = labels.to(self.device)
        if self.ways == 2:
            padded = torch.cat([padded, torch.full_like(padded, config.num_classes)])
        batch.h.copy_(self.model.y_embedder(padded))
        return batch

    def _allocate(self, size: int) -> _Batch:
        config, rows = self.model.config, self.ways * size
        grid = (size, config.num_tokens, config.in_channels)
        steps = max((len(s.rows) for s in self._steps if s.needs_noise), default=0)

        def empty(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=self.state_dtype, device=self.device)

        return _Batch(
            KVCache.allocate(
                config.depth,
                rows,
                config.num_tokens,
                config.num_kv_heads,
                config.head_dim,
                kv_dtype=self.kv_dtype,
                device=self.device,
            ),
            torch.empty(rows, config.hidden_size, dtype=self.dtype, device=self.device),
            torch.zeros(1, dtype=torch.int64, device=self.device),
            empty(4, size, config.in_channels),
            empty(*grid),
            empty(steps, size, config.in_channels).zero_(),
            self._guidance.to(self.device, self.state_dtype)[:, :, None].expand(-1, -1, size).contiguous(),
            empty(*grid),
        )

    def _advance(self, batch: _Batch, position: int, steps: _Steps) -> None:
        """One token. Under CUDA graphs the host only launches."""
        if self._graphs is None:
            self._token(batch, steps, position + 1)
            return
        context = self.model.config.num_tokens
        if self.attention.name == "sdpa":  # the others read the position on the device
            context = min(context, -(-(position + 1) // CONTEXT_BUCKET) * CONTEXT_BUCKET)
        self._graphs.run(
            (context, id(steps)), lambda: self._token(batch, steps, context), keep=(batch.position, batch.h)
        )

    def _token(self, batch: _Batch, steps: _Steps, context: int) -> None:
        """Condition, denoise and embed the token at batch.position; `context` bounds the tokens attended to."""

        def attend(layer: int, qkv: Tensor) -> Tensor:
            keys, values = batch.cache.keys[layer], batch.cache.values[layer]
            cos, sin = self.backbone.cos, self.backbone.sin
            return self.attention.run(qkv, cos, sin, batch.position, context, keys, values)

        condition = self._step(batch.h, attend)
        batch.state.zero_()
        batch.state[:1] = batch.noise.index_select(1, batch.position).transpose(0, 1)
        diffusion_head_sample(
            batch.state,
            condition.unflatten(0, (self.ways, -1)),
            steps.t_embedding,
            steps.rows,
            batch.guidance.index_select(0, batch.position)[0],
            self.weights,
            batch.added[: len(steps.rows)] if steps.needs_noise else None,
        )
        token = batch.state[0]
        batch.latents.index_copy_(1, batch.position, token[:, None])
        batch.h.copy_(self.model.x_embedder(token.to(self.dtype)).repeat(self.ways, 1))
        batch.position.add_(1)


def _share(model: Transformer, weights: HeadWeights) -> None:
    """Make the model's head parameters views of the packed weights, so that they are in memory once."""
    hidden, width = weights.hidden_size, weights.down_weight.shape[2]
    modulations = weights.modulation_weight.split([3 * hidden] * weights.blocks + [2 * hidden])
    views = {
        "final_layer.adaLN_modulation.1.weight": modulations[-1],
        "final_layer.linear.weight": weights.output_weight,
    }
    for i in range(weights.blocks):
        views |= {
            f"diffusion_blocks.{i}.mlp.fc1.weight": weights.up_weight[i, :width],
            f"diffusion_blocks.{i}.mlp.gate.weight": weights.up_weight[i, width:],
            f"diffusion_blocks.{i}.mlp.fc2.weight": weights.down_weight[i],
            f"diffusion_blocks.{i}.adaLN_modulation.1.weight": modulations[i],
        }
    for name, view in views.items():
        model.get_parameter(name).data = view


def _host_memory() -> int:
    """Bytes of memory, or of this container's share of it."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.exists() and (text := limit.read_text().strip()) != "max":
        memory = min(memory, int(text))
    return memory
