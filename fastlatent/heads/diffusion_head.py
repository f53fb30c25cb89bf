"""A published per-token diffusion head, ready to sample from."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from numbers import Real
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fastlatent.diffusion.solvers import SolverTable
from fastlatent.heads.families import FoldedHead, fold_head
from fastlatent.ops.diffusion_head_sample import PATHS, diffusion_head_sample, head_reference
from fastlatent.ops.diffusion_head_sample import Path as OpPath
from fastlatent.ops.linear import quantize_rows

INDEX = "model.safetensors.index.json"
TIME_NORM_EPS = 1e-5

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, eq=False)
class DiffusionHead(FoldedHead):
    """Any published head (`HeadSpec.family`) in the one form that the fused op runs. For inference: no gradients."""

    # What a table is on this device: rows and time embeddings, which are the same for every token.
    _prepared: WeakKeyDictionary[SolverTable, dict[bool, tuple[Tensor, Tensor]]] = field(
        default_factory=WeakKeyDictionary, init=False, repr=False
    )

    @classmethod
    def from_state_dict(
        cls,
        state: Mapping[str, Tensor],
        family: str | None = None,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> DiffusionHead:
        """The head within a state dict: a head's own, or a whole model's.

        Args:
            state: tensors by their published names, below any prefix.
            family: a name of `fastlatent.heads.spec.FAMILIES`; None recognises it.
            dtype: float64, float32, bfloat16 or float16; None takes that of the token embedding.
            device: None takes that of the token embedding.

        Raises:
            ValueError: there is not exactly one head, its family is ambiguous, or a weight is missing, unknown, of a
                wrong shape or not finite.
        """
        for name, value in state.items():
            if not isinstance(name, str) or not isinstance(value, Tensor):
                raise ValueError(
                    f"DiffusionHead.from_state_dict: expected tensors by name, got {name!r}: {type(value).__name__}; "
                    "pass the dict that holds the weights themselves"
                )
        shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
        return cls(**vars(fold_head(shapes, state.__getitem__, family, dtype=dtype, device=device)))

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        family: str | None = None,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> DiffusionHead:
        """The head within a model's file; of safetensors, only the head's tensors are read.

        Args:
            path: a .safetensors file; a folder with one, or with model.safetensors.index.json; or a .pt, .pth or .ckpt
                file with a state dict. Of MAR's dict, model_ema is taken and not model; of Lightning's, state_dict.
            family, dtype, device: as for `from_state_dict`; device None is the CPU.

        Raises:
            ValueError: as `from_state_dict`, or the path does not lead to weights that can be read.
        """
        path = Path(path)
        if path.suffix in (".pt", ".pth", ".ckpt") and path.is_file():
            return cls.from_state_dict(_load_pickled(path), family, dtype=dtype, device=device)
        with _open_safetensors(path) as (shapes, read):
            return cls(**vars(fold_head(shapes, read, family, dtype=dtype, device=device)))

    @torch.no_grad()
    def time_embedding(self, timesteps: Tensor, *, published: bool = False) -> Tensor:
        """Embeddings of timesteps, computed in float64 and rounded once.

        Args:
            timesteps: [S], or [S, 2] where the head takes two times, in the unit of the published sinusoid: 0 to 999
                of a discrete schedule; of a flow 1000·t, but t itself for nextstep and pocket_tts.
            published: round t to the weights' dtype first, and then the sinusoid, as LatentLM's and VibeVoice's code
                does: bfloat16 makes 1000 of t = 999.

        Returns:
            [S, H] in the weights' dtype.

        Raises:
            ValueError: timesteps has another shape.
        """
        embedders, weights = self.spec.time_embedders, self.time
        shape = ("S", embedders) if embedders > 1 else ("S",)
        if timesteps.ndim != len(shape) or timesteps.shape[1:] != shape[1:]:
            raise ValueError(
                f"DiffusionHead.time_embedding: expected timesteps [{', '.join(map(str, shape))}] for {embedders} time "
                f"embedders, got {list(timesteps.shape)}"
            )
        dtype, device = self.weights.dtype, self.weights.device
        if weights is None:
            return torch.zeros(len(timesteps), self.spec.hidden_size, dtype=dtype, device=device)
        t = timesteps.to(device).double().reshape(-1, embedders).T
        if published:
            t = t.to(dtype).double()
        angle = t[..., None] * weights.frequencies[:, None]
        sinusoid = torch.cat([angle.cos(), angle.sin()], dim=-1)
        if published:
            sinusoid = sinusoid.to(dtype).double()
        h = F.silu(sinusoid @ weights.first_weight.double().mT + weights.first_bias.double()[:, None])
        h = h @ weights.second_weight.double().mT + weights.second_bias.double()[:, None]
        if weights.norm_weight is not None:
            centred = h - h.mean(-1, keepdim=True)
            variance = centred.square().sum(-1, keepdim=True) / (h.shape[-1] - 1)
            h = h * weights.norm_weight[:, None] * torch.rsqrt(variance + TIME_NORM_EPS)
        return h.mean(0).to(dtype)

    @torch.no_grad()
    def project(self, condition: Tensor) -> Tensor:
        """The backbone's condition [..., Z] → what the head adds to the time's embedding, [..., H].

        Both are in the weights' dtype, to which `condition` is rounded.

        Raises:
            ValueError: condition does not have Z channels, or is on another device.
        """
        channels, dtype = self.spec.condition_channels, self.weights.dtype
        if condition.ndim < 1 or condition.shape[-1] != channels or not condition.is_floating_point():
            raise ValueError(
                f"DiffusionHead.project: expected a condition [..., {channels}] of floating point, got "
                f"{list(condition.shape)} {condition.dtype}"
            )
        self._check_device("project", "condition", condition)
        condition = condition.to(dtype)
        if self.condition_weight is None or self.condition_bias is None:
            return condition
        return F.linear(condition, self.condition_weight, self.condition_bias.to(dtype))

    @torch.no_grad()
    def __call__(self, x: Tensor, t: Tensor | float, condition: Tensor) -> Tensor:
        """One evaluation, by the definition of the op.

        Args:
            x: noisy tokens [B, C].
            t: a number for all tokens, or [B]; [B, 2] where the head takes two times. Units as in `time_embedding`.
            condition: [B, Z].

        Returns:
            [B, O] in the op's state dtype: float32, or float64 where the weights are.

        Raises:
            ValueError: a shape or device is not as above.
        """
        self._check("__call__", "x", x, None, self.spec.channels)
        self._check("__call__", "condition", condition, len(x), self.spec.condition_channels)
        times = torch.as_tensor(t, dtype=torch.float64)
        if times.ndim == 0:
            times = times.expand(len(x))
        if len(times) != len(x):
            raise ValueError(f"DiffusionHead.__call__: expected t [{len(x)}, ...] or a number, got {list(times.shape)}")
        weights = self.weights
        y = self.project(condition).to(weights.state_dtype) + self.time_embedding(times)
        modulations = F.linear(F.silu(y).to(weights.dtype), weights.modulation_weight) + weights.modulation_bias
        return head_reference(x.to(weights.state_dtype), modulations.to(weights.dtype)[None], weights)[0]

    @torch.no_grad()
    def sample(
        self,
        cond: Tensor,
        *,
        solver: SolverTable,
        null_cond: Tensor | tuple[Tensor, Tensor] | None = None,
        guidance_scale: float | Tensor | tuple[float | Tensor, float | Tensor] = 1.0,
        noise: Tensor | None = None,
        step_noise: Tensor | None = None,
        generator: torch.Generator | None = None,
        path: OpPath = "auto",
        published: bool = False,
        t_embedding: Tensor | None = None,
    ) -> Tensor:
        """Denoise one token for every condition; the whole loop is one op.

        Args:
            cond: [B, Z], of the backbone.
            solver: the sampler as a table (`fastlatent.diffusion.solvers`).
            null_cond: [B, Z] of the unconditional branch u; or a pair of branches (u1, u2).
            guidance_scale: s, a number or one for each row [B], of u + s·(c − u). With a pair of branches it is a pair
                (s, s2), of u2 + s2·(u1 − u2) + s·(c − u1) (NextStep).
            noise: [B, C], standard normal, to start from; None draws it.
            step_noise: [S, B, C], standard normal, for solvers that add noise; None draws it if the solver does.
            generator: draws noise and step_noise, in this order, in the state dtype on the head's device.
            path: of the op.
            published: as in `time_embedding`.
            t_embedding: [S, H], embeddings of the solver's timesteps that another module made, with its own roundings;
                None: `time_embedding` of them.

        Returns:
            Tokens [B, C], float32, or float64 where the weights are.

        Raises:
            ValueError: a shape, device or path is not as above, or guidance lacks its unconditional branch.
        """
        if not isinstance(solver, SolverTable):
            raise ValueError(
                f"DiffusionHead.sample: expected solver to be a SolverTable, got {type(solver).__name__}; "
                "fastlatent.diffusion.solvers.build_table makes one"
            )
        if path not in PATHS:
            raise ValueError(f"DiffusionHead.sample: expected a path of {', '.join(PATHS)}, got {path!r}")
        self._check("sample", "cond", cond, None, self.spec.condition_channels)
        batch, channels, steps = len(cond), self.spec.channels, len(solver.rows)
        branches, guidance = self._guidance(cond, null_cond, guidance_scale)
        dtype, device = self.weights.state_dtype, self.weights.device
        if noise is None:
            noise = torch.randn(batch, channels, generator=generator, dtype=dtype, device=device)
        self._check("sample", "noise", noise, batch, channels)
        if step_noise is None and solver.needs_noise:
            step_noise = torch.randn(steps, batch, channels, generator=generator, dtype=dtype, device=device)
        if step_noise is not None:
            self._check("sample", "step_noise", step_noise, steps, batch, channels)
            step_noise = step_noise.to(dtype).contiguous()
        state = torch.zeros(4, batch, channels, dtype=dtype, device=device)
        if batch == 0:
            return state[0]
        state[0] = noise
        rows, ours = self._prepare(solver, published)
        if t_embedding is None:
            t_embedding = ours
        else:
            self._check("sample", "t_embedding", t_embedding, steps, self.spec.hidden_size)
            t_embedding = t_embedding.to(self.weights.dtype).contiguous()
        condition = self.project(torch.stack([branch.to(self.weights.dtype) for branch in branches]))
        diffusion_head_sample(state, condition, t_embedding, rows, guidance, self.weights, step_noise, path=path)
        return state[0]

    @torch.no_grad()
    def quantize_int8(self) -> DiffusionHead:
        """The same head with the FFNs' weights in int8: half the bytes of bfloat16 where time goes.

        Every output row has its own scale, max|w|/127 (symmetric, rounded to nearest; a row of zeros has scale 1).

        Raises:
            ValueError: they are int8 already.
        """
        weights = self.weights
        if weights.up_scale is not None:
            raise ValueError("DiffusionHead.quantize_int8: expected weights of floating point, got int8")
        up, up_scale = quantize_rows(weights.up_weight)
        down, down_scale = quantize_rows(weights.down_weight)
        return replace(
            self,
            weights=replace(weights, up_weight=up, up_scale=up_scale, down_weight=down, down_scale=down_scale),
        )

    def _prepare(self, solver: SolverTable, published: bool) -> tuple[Tensor, Tensor]:
        prepared = self._prepared.setdefault(solver, {})
        if published not in prepared:
            rows = solver.rows.to(self.weights.device, self.weights.state_dtype).contiguous()
            prepared[published] = rows, self.time_embedding(solver.timesteps, published=published).contiguous()
        return prepared[published]

    def _guidance(
        self,
        cond: Tensor,
        null_cond: Tensor | tuple[Tensor, Tensor] | None,
        scale: float | Tensor | tuple[float | Tensor, float | Tensor],
    ) -> tuple[list[Tensor], Tensor]:
        """The branches that are evaluated, and their weights [W, B] in the state dtype."""
        nulls = [] if null_cond is None else [null_cond] if isinstance(null_cond, Tensor) else list(null_cond)
        scales = list(scale) if isinstance(scale, (tuple, list)) else [scale]
        if len(nulls) > 2 or (nulls and len(scales) != len(nulls)) or (not nulls and len(scales) > 1):
            raise ValueError(
                "DiffusionHead.sample: expected one null_cond and one guidance_scale, or a pair of each, got "
                f"{len(nulls)} and {len(scales)}"
            )
        plain = all(not isinstance(value, Tensor) and value == 1 for value in scales)
        if not nulls and not plain:
            raise ValueError(
                f"DiffusionHead.sample: expected null_cond, the unconditional branch, for guidance_scale {scales[0]}"
            )
        for branch in nulls:
            self._check("sample", "null_cond", branch, len(cond), self.spec.condition_channels)
        for i, value in enumerate(scales):
            if isinstance(value, Tensor):
                self._check_device("sample", "guidance_scale", value)
                if value.shape not in ((), (len(cond),)):
                    raise ValueError(
                        f"DiffusionHead.sample: expected guidance_scale [{len(cond)}], got {list(value.shape)}"
                    )
                scales[i] = value.double()
            elif not isinstance(value, Real) or not math.isfinite(value):
                raise ValueError(f"DiffusionHead.sample: expected a finite guidance_scale, got {value!r}")
        # A scale of 1 leaves the conditional branch alone; asking a tensor would wait for the device.
        if plain:
            nulls, ways = [], scales[:1]
        elif len(nulls) == 1:
            ways = [scales[0], 1 - scales[0]]
        else:
            ways = [scales[0], scales[1] - scales[0], 1 - scales[1]]
        guidance = torch.empty(len(ways), len(cond), dtype=self.weights.state_dtype, device=self.weights.device)
        for row, way in zip(guidance, ways, strict=True):
            row[...] = way
        return [cond, *nulls], guidance

    def _check(self, function: str, name: str, tensor: Any, *shape: int | None) -> None:
        """A floating tensor of that shape on the head's device; None stands for any size."""
        got = f"{list(tensor.shape)} {tensor.dtype}" if isinstance(tensor, Tensor) else type(tensor).__name__
        if (
            not isinstance(tensor, Tensor)
            or not tensor.is_floating_point()
            or tensor.ndim != len(shape)
            or any(wanted not in (None, size) for wanted, size in zip(shape, tensor.shape, strict=True))
        ):
            wanted = ", ".join("B" if size is None else str(size) for size in shape)
            raise ValueError(f"DiffusionHead.{function}: expected {name} [{wanted}] of floating point, got {got}")
        self._check_device(function, name, tensor)

    def _check_device(self, function: str, name: str, tensor: Tensor) -> None:
        if tensor.device != self.weights.device:
            raise ValueError(
                f"DiffusionHead.{function}: expected {name} on {self.weights.device}, got it on {tensor.device}"
            )


@contextmanager
def _open_safetensors(path: Path) -> Iterator[tuple[Shapes, Callable[[str], Tensor]]]:
    """Shapes of all tensors of a file or folder, and a function that reads one."""
    files = _safetensors_files(path)
    with ExitStack() as stack:
        where: dict[str, Any] = {}
        try:
            for file in files:
                handle = stack.enter_context(safe_open(file, framework="pt", device="cpu"))
                where.update(dict.fromkeys(handle.keys(), handle))
            shapes = {name: tuple(handle.get_slice(name).get_shape()) for name, handle in where.items()}
        except (SafetensorError, OSError) as error:
            raise ValueError(f"DiffusionHead.from_pretrained: {file} does not load: {error}") from None
        yield shapes, lambda name: where[name].get_tensor(name)


def _safetensors_files(path: Path) -> list[Path]:
    if path.is_file() and path.suffix == ".safetensors":
        return [path]
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else []
    if (path / INDEX).is_file():
        try:
            names = sorted(set(json.loads((path / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
            files = [path / Path(name).name for name in names]
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            raise ValueError(f"DiffusionHead.from_pretrained: {path / INDEX} is not an index: {error!r}") from None
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise ValueError(f"DiffusionHead.from_pretrained: {path} lacks {', '.join(missing)}, which its index names")
    elif len(files) != 1:
        found = f"{len(files)} .safetensors files" if path.is_dir() else "no such folder" if not path.exists() else path
        raise ValueError(
            "DiffusionHead.from_pretrained: expected a .safetensors, .pt, .pth or .ckpt file, or a folder with one "
            f".safetensors file or {INDEX}, got {path} ({found})"
        )
    return files


def _load_pickled(path: Path) -> Mapping[str, Tensor]:
    """The state dict in a torch.save file; weights and plain values alone are unpickled."""
    try:
        # MAR keeps its command line beside the weights.
        with torch.serialization.safe_globals([argparse.Namespace]):
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # every kind of damage has its own class, some only RuntimeError
        raise ValueError(
            f"DiffusionHead.from_pretrained: {path} does not load with weights_only=True ({type(error).__name__}); "
            "save its state dict as .safetensors where it was made"
        ) from error
    for key in ("model_ema", "state_dict"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict):
        raise ValueError(f"DiffusionHead.from_pretrained: expected a state dict in {path}, got {type(state).__name__}")
    return state
