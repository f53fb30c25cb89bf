"""An encoder or decoder compiled by Inductor in this process (`compile`) or into a package that is kept (`aoti`)."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fastlatent.encoders.engines.cache import cached_file

Run = Callable[[Tensor], Tensor]

# Nothing that changes bytes is chosen by timing. Autotuning would take the fastest kernel of the day; `deterministic`
# (torch >= 2.10) leaves it only such choices as change no sum: block sizes of pointwise kernels.
OPTIONS: dict[str, Any] = {
    "deterministic": True,
    "max_autotune": False,
    "coordinate_descent_tuning": False,
    "benchmark_fusion": False,
}


def compile_module(module: nn.Module, inputs: Tensor, pool: Any = None) -> Run:
    """`module` compiled whole for inputs exactly like `inputs`; on CUDA replayed as a CUDA graph.

    What a run returns is overwritten by the next one on CUDA, of any module with the same `pool`
    (torch.cuda.graph_pool_handle): graphs that never run at once need the memory of the largest, not of all together.
    """
    compiled = torch.compile(module, fullgraph=True, dynamic=False, options=OPTIONS)
    with any_number_of_shapes():
        compiled(inputs)
    return captured(compiled, inputs, pool) if inputs.is_cuda else compiled


def any_number_of_shapes() -> AbstractContextManager[Any]:
    """Every shape is a compilation of the same code, of which Dynamo allows 8 outside of this: there may be more."""
    limits: AbstractContextManager[Any] = torch._dynamo.config.patch(
        recompile_limit=1 << 16, accumulated_recompile_limit=1 << 16
    )
    return limits


def captured(function: Run, inputs: Tensor, pool: Any = None) -> Run:
    """`function` as a CUDA graph, for inputs like `inputs`.

    Our own capture rather than mode="reduce-overhead": Inductor's graphs belong to the thread that made them.
    """
    still = inputs.clone()
    side = torch.cuda.Stream(inputs.device)
    side.wait_stream(torch.cuda.current_stream(inputs.device))
    with torch.cuda.stream(side):
        function(still)  # libraries that set themselves up at the first call must not do so inside the capture
    torch.cuda.current_stream(inputs.device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    # thread_local: threads that decode meanwhile may allocate.
    with torch.cuda.device(inputs.device), torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        out = function(still)

    def replay(new: Tensor) -> Tensor:
        still.copy_(new)
        graph.replay()
        return out

    return replay


def compile_ahead(module: nn.Module, inputs: tuple[Any, ...], cache: Path, identity: dict[str, Any]) -> Any:
    """`module` compiled ahead of time for arguments exactly like `inputs` (tensors, and lists of them), from the
    package in `cache` or into one.

    identity: of the autoencoder; with the inputs' dtypes and shapes, TF32, torch and the machine it names the package.
    """
    tensors = tree_leaves(inputs)
    key = {
        "engine": "aoti",
        "autoencoder": identity,
        "module": _signature(module),
        "inputs": [[str(one.dtype), list(one.shape), list(one.stride())] for one in tensors],
        "options": OPTIONS,
        "float32": torch.get_float32_matmul_precision(),  # TF32 or not
        "machine": machine(tensors[0].device),
    }

    def build(path: Path) -> None:
        program = torch.export.export(module, inputs)
        # A copy of the options: torch adds its own to the dictionary that it is given.
        torch._inductor.aoti_compile_and_package(program, package_path=str(path), inductor_configs=dict(OPTIONS))

    path = cached_file(cache, key, ".pt2", build)
    device = tensors[0].device
    index = device.index if device.type == "cuda" else None
    return torch._inductor.aoti_load_package(str(path), device_index=-1 if index is None else index)


def machine(device: torch.device) -> dict[str, Any]:
    """What compiled code depends on besides its source."""
    found: dict[str, Any] = {"torch": torch.__version__, "device": device.type}
    if device.type == "cuda":
        import triton

        capability = torch.cuda.get_device_capability(device)
        return {
            **found,
            "triton": triton.__version__,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "gpu": torch.cuda.get_device_name(device),
            "capability": list(capability),
        }
    return {
        **found,
        "processor": platform.machine(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),  # Inductor writes their number into the code
    }


def _signature(module: nn.Module) -> str:
    """Of the code that runs: the modules by class and settings. The weights are in the autoencoder's identity."""
    return hashlib.sha256(repr(module).encode()).hexdigest()
