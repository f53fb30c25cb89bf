"""What a run needs to go on as if it had never stopped, in one file: weights, average, optimisers, gradient scale.

Tensors are whole and under the names of the module's parameters, so that a run may go on with another number of
processes, sharded or not.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastlatent.models.ema import EMA
from fastlatent.pipeline import checkpoints
from fastlatent.training.objective import Part
from fastlatent.training.team import copy_whole, like, whole


@dataclass(frozen=True)
class Optimiser:
    """AdamW over the weights of one part; part None is the main one."""

    part: Part | None
    parameters: dict[str, nn.Parameter]
    adamw: torch.optim.Optimizer

    def active(self, step: int) -> bool:
        return self.part is None or step >= self.part.begin


def make_optimisers(
    module: nn.Module, parts: tuple[Part, ...], *, betas: tuple[float, float], eps: float, weight_decay: float
) -> list[Optimiser]:
    """One AdamW for each part and one for the rest; weight decay on matrices only."""
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    made = []
    for part in (*parts, None):
        prefix = part.prefix if part else ""
        mine = {name: p for name, p in trained.items() if name.startswith(prefix)}
        trained = {name: p for name, p in trained.items() if name not in mine}
        matrices, vectors = ([p for p in mine.values() if (p.ndim >= 2) == wanted] for wanted in (True, False))
        groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        adamw = torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=eps, fused=_on_cuda(module))
        made.append(Optimiser(part, mine, adamw))
    return made


def averaged_weights(module: nn.Module, parts: tuple[Part, ...]) -> dict[str, nn.Parameter]:
    """The weights that an average is kept of: all but the parts', frozen ones too."""
    return {name: p for name, p in module.named_parameters() if not any(name.startswith(x.prefix) for x in parts)}


@dataclass
class TrainingState:
    """Everything that changes from step to step, by reference."""

    module: nn.Module
    optimisers: list[Optimiser]
    ema: EMA | None
    scaler: torch.amp.GradScaler | None

    def collect(self, keep: bool) -> dict[str, Tensor]:
        """The tensors of the file, on the CPU; {} without `keep`, but all processes must collect."""
        found: dict[str, Tensor] = {}

        def add(name: str, tensor: Tensor) -> None:
            tensor = whole(tensor.detach())
            if keep:
                found[name] = tensor.cpu().contiguous()

        for name, parameter in self.module.named_parameters():
            add(f"weights.{name}", parameter)
        for name, shadow in self.ema.shadow.items() if self.ema else ():
            add(f"ema.{name}", shadow)
        for optimiser in self.optimisers:
            for name, parameter in optimiser.parameters.items():
                for slot, tensor in optimiser.adamw.state.get(parameter, {}).items():
                    add(f"optimizer.{name}.{slot}", tensor)
        if self.scaler:
            scale = self.scaler.state_dict()
            found |= {f"scaler.{k}": torch.tensor(float(scale[k])) for k in ("scale", "_growth_tracker")}
        return found

    def restore(self, run: Path) -> int:
        """Load the newest checkpoint of the run, if there is one; returns the number of steps done.

        Raises:
            ValueError: it is damaged, or of another model or other settings.
        """
        found = checkpoints.checkpoints(run)
        if not found:
            return 0
        file = found[-1] / checkpoints.TRAINING_STATE
        try:
            state = load_file(file)
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{file} does not load ({error}); delete {found[-1]} to resume from the checkpoint before it"
            ) from None
        targets: dict[str, Tensor] = {f"weights.{name}": p.detach() for name, p in self.module.named_parameters()}
        targets |= {f"ema.{name}": shadow for name, shadow in self.ema.shadow.items()} if self.ema else {}
        for name, stored in state.items():
            if not name.startswith(("optimizer.", "scaler.")):
                if name not in targets or targets[name].shape != stored.shape:
                    shape = list(stored.shape)
                    raise ValueError(f"{file}: {name} {shape} does not fit this model; use another --out")
                copy_whole(targets.pop(name), stored)
        if targets:
            raise ValueError(f"{file} lacks {next(iter(targets))}; use another --out")
        for optimiser in self.optimisers:
            for name, parameter in optimiser.parameters.items():
                optimiser.adamw.state[parameter] = _slots(state, f"optimizer.{name}.", parameter)
            for unused in [p for p, slots in optimiser.adamw.state.items() if not slots]:
                del optimiser.adamw.state[unused]  # of a part that has not begun
        if self.scaler:
            if "scaler.scale" not in state:
                raise ValueError(f"{file} has no gradient scale: it was not trained in fp16; use another --out")
            scale = self.scaler.state_dict() | {"scale": float(state["scaler.scale"])}
            self.scaler.load_state_dict(scale | {"_growth_tracker": int(state["scaler._growth_tracker"])})
        step = checkpoints.step_of(found[-1])
        assert step is not None
        return step


def write_state(folder: Path, tensors: dict[str, Tensor]) -> None:
    save_file(tensors, folder / checkpoints.TRAINING_STATE)


def _slots(state: dict[str, Tensor], prefix: str, parameter: nn.Parameter) -> dict[str, Tensor]:
    """AdamW's tensors of one weight; `step` stays where torch keeps it: on the CPU, or beside the weight if fused."""
    slots = {}
    for name, tensor in state.items():
        slot = name.removeprefix(prefix)
        if slot != name and "." not in slot:
            tensor = tensor.to(parameter.device) if slot != "step" or parameter.is_cuda else tensor
            slots[slot] = tensor if slot == "step" else like(parameter, tensor)
    return slots


def _on_cuda(module: nn.Module) -> bool:
    return all(parameter.is_cuda for parameter in module.parameters())
