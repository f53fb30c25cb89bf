"""LatentLM: the Transformer of the original code (also in SynthLM's first layout), and SynthLM's later one."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from types import CodeType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from fastlatent.heads.spec import LATENTLM
from fastlatent.patches.fused_loop import FlowMatchingProof, FusedLoop, differs_inside, prove
from fastlatent.patches.handle import PatchHandle
from fastlatent.patches.live_head import LiveHead
from fastlatent.patches.schedules import Loop, Schedule, learn, scheduler_loop


@dataclass(frozen=True)
class _Layout:
    """Names in a published class."""

    family: str
    embedder: str
    time: str
    condition: str  # parameter of forward_with_cfg
    token: tuple[int, ...]  # shape of a noisy token but for its channels, -1

    @property
    def modules(self) -> tuple[str, ...]:
        return self.embedder, self.time, "diffusion_blocks", "final_layer"


LAYOUTS = (
    _Layout("latentlm", "noisy_x_embedder", "t_embedder", "condition", (-1, 1, 1)),
    _Layout("synthlm", "noisy_input_embedder", "time_embedder", "conditioning", (1, -1)),
)


def mismatch(model: Any) -> str:
    """See `fastlatent.patches.patch.FAMILIES`."""
    layout = _layout(model)
    if layout is None:
        return "expected a module noisy_x_embedder (LatentLM) or noisy_input_embedder (SynthLM)"
    for name in layout.modules:
        if not isinstance(getattr(model, name, None), nn.Module):
            return f"expected the module {name}, which is missing"
    for name, needed in (("sample_with_cfg", "sample_func"), ("forward_with_cfg", layout.condition)):
        method = getattr(model, name, None)
        if not callable(method) or needed not in inspect.signature(method).parameters:
            return f"expected a method {name}(…, {needed}, …), got {'another' if callable(method) else 'none'}"
    for name in layout.modules:
        why = differs_inside(getattr(model, name), name, LATENTLM.eps)
        if why:
            return why
    return ""


def apply(model: Any, handle: PatchHandle) -> None:
    """See `fastlatent.patches.patch.FAMILIES`."""
    layout = _layout(model)
    assert layout is not None
    fused = _Fused(model, layout)
    fused.live.get()
    handle.replace(model, "sample_with_cfg", _sampler(model.sample_with_cfg, fused))


def _layout(model: Any) -> _Layout | None:
    return next((layout for layout in LAYOUTS if hasattr(model, layout.embedder)), None)


def _sampler(original: Any, fused: _Fused) -> Any:
    """The model's own loop over tokens, with its KV cache and its draws, around one op for each token."""

    def sample_with_cfg(*args: Any, **kwargs: Any) -> Tensor:
        call = inspect.signature(original).bind(*args, **kwargs)
        sample_func = call.arguments["sample_func"]
        scheduler = scheduler_of(sample_func)
        learnt: list[Schedule] = []  # anew for each call: the function may read another number of steps by then

        def denoise(network: Any, noise: Tensor) -> Tensor:
            if not learnt:
                learnt.append(learn(scheduler, sample_func, tuple(noise.shape[1:]), noise.device))
            return fused(network, noise, learnt[0])

        call.arguments["sample_func"] = denoise
        return original(*call.args, **call.kwargs)

    return sample_with_cfg


class _Fused(FusedLoop):
    """One token: what sample_func does with functools.partial(forward_with_cfg, condition=…, cfg_scale=…)."""

    def __init__(self, model: Any, layout: _Layout) -> None:
        super().__init__()
        self._model, self._layout = model, layout
        self.live = LiveHead(self._head, layout.family, self._prove)

    def _head(self) -> nn.Module:
        """The head alone: the backbone's weights are not compared at each token."""
        return nn.ModuleDict({name: getattr(self._model, name) for name in self._layout.modules})

    def embed(self, t: Tensor) -> Tensor:
        return getattr(self._model, self._layout.time)(t)

    @torch.no_grad()
    def __call__(self, network: Any, noise: Tensor, schedule: Schedule) -> Tensor:
        """noise [2B, …] of one token each → its token twice, as noise; no gradients."""
        given = getattr(network, "keywords", {})
        if self._layout.condition not in given or "cfg_scale" not in given:
            raise ValueError(
                "patch: expected sample_with_cfg to hand functools.partial(forward_with_cfg, "
                f"{self._layout.condition}=…, cfg_scale=…) to sample_func, got {network!r}; undo the patch"
            )
        head = self.live.get()
        condition = given[self._layout.condition].flatten(1)
        token = self.sample(head, schedule, condition, noise.flatten(1), given["cfg_scale"])
        return torch.cat([token, token]).view(noise.shape)

    def _prove(self) -> None:
        model, layout = self._model, self._layout
        parameter = model.final_layer.get_parameter(
            "linear.weight" if layout.family == "latentlm" else "out_proj.weight"
        )
        channels, hidden = parameter.shape
        generator = torch.Generator().manual_seed(0)
        shape = [channels if size == -1 else size for size in layout.token]
        noise = torch.randn(4, *shape, generator=generator).to(parameter)
        condition = torch.randn(4, 1, hidden, generator=generator).to(parameter)
        network = functools.partial(model.forward_with_cfg, **{layout.condition: condition, "cfg_scale": 1.5})
        proof = FlowMatchingProof()
        loop = scheduler_loop(proof, 2)
        schedule = learn(proof, loop, tuple(shape), parameter.device)
        prove(
            lambda: loop(network, noise)[:2],
            lambda: self(network, noise, schedule)[:2],
            parameter,
            f"{type(model).__name__}.forward_with_cfg",
        )


def scheduler_of(sample_func: Loop) -> Any:
    """The one scheduler that a function steps with.

    Searched are the function itself, its closure, its defaults, the arguments of a functools.partial, the globals that
    its code names, and, if there is none, the attributes that its code names of the objects found so.

    Raises:
        ValueError: there is none, or more than one.
    """
    reached = list(_reached(sample_func, set()))
    found = {id(value): value for value, _ in reached if _is_scheduler(value)}
    if not found:
        inside = [getattr(value, name, None) for value, names in reached for name in names]
        found = {id(value): value for value in inside if _is_scheduler(value)}
    if len(found) != 1:
        kinds = ", ".join(type(value).__name__ for value in found.values()) or "none"
        raise ValueError(
            f"patch: expected one scheduler (set_timesteps and step) in sample_func, got {kinds}; write it as a "
            "function of (model, image) that names its scheduler: a variable of the function around it, a global, a "
            "default or an argument of functools.partial"
        )
    return next(iter(found.values()))


def _is_scheduler(value: Any) -> bool:
    if isinstance(value, type):
        return False
    return all(callable(getattr(value, name, None)) for name in ("set_timesteps", "step"))


def _reached(value: Any, seen: set[int]) -> Iterator[tuple[Any, tuple[str, ...]]]:
    """An object and those that it uses as a function, each with the names of attributes that the code has there."""
    yield value, ()
    if id(value) in seen or _is_scheduler(value):
        return
    seen.add(id(value))
    if isinstance(value, functools.partial):
        for used in (value.func, *value.args, *value.keywords.values()):
            yield from _reached(used, seen)
        return
    if callable(value) and not isinstance(value, FunctionType | MethodType):
        value = value.__call__  # an object with that method
    function = inspect.unwrap(value.__func__ if isinstance(value, MethodType) else value)
    if not isinstance(function, FunctionType):
        return
    names = tuple(_names(function.__code__))
    used = [cell.cell_contents for cell in function.__closure__ or () if _filled(cell)]
    used += [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    used += [function.__globals__[name] for name in names if name in function.__globals__]
    used += [value.__self__] if isinstance(value, MethodType) else []
    for one in used:
        yield one, names
        theirs = isinstance(one, FunctionType | MethodType) and one.__module__ == function.__module__
        if theirs or isinstance(one, functools.partial):
            yield from _reached(one, seen)


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:  # a variable that is not bound yet
        return False
    return True
