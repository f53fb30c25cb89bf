"""An encoder or decoder as a TensorRT engine: ONNX → strongly typed network → plan, kept on disk with its timing cache.

`build_plan` takes the module `tensorrt` or `tensorrt_rtx`, whose Python interfaces agree here: the latter builds
without a GPU, so that tests build the real network.
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastlatent.encoders.engines.cache import cached_file
from fastlatent.encoders.engines.compiled import machine
from fastlatent.encoders.engines.onnx_export import INPUT, OUTPUT, export_onnx
from fastlatent.store.files import write_atomic

Run = Callable[[Tensor], Tensor]

BUILDER = {"optimization_level": 3, "tf32": False, "strongly_typed": True}


def load_plan(module: nn.Module, inputs: Tensor, cache: Path) -> tuple[Run, str]:
    """`module` (contiguous weights, on CUDA) for inputs exactly like `inputs`, and the SHA-256 of its plan.

    TensorRT chooses kernels by timing: only the plan itself says which bytes come out, hence the digest. The plan is
    kept in `cache` under the SHA-256 of the ONNX file (weights inside), the versions of TensorRT, CUDA and driver, and
    the GPU.

    Raises:
        ValueError: no CUDA, TensorRT is missing, or it cannot build or load the network.
    """
    if not inputs.is_cuda:
        raise ValueError("--engine tensorrt: needs a CUDA device; use --engine eager on the CPU")
    trt = import_tensorrt()
    onnx_file = export_onnx(module, inputs)
    where = {**machine(inputs.device), "driver": _driver(), "tensorrt": trt.__version__}
    key = {
        "engine": "tensorrt",
        "onnx": hashlib.sha256(onnx_file).hexdigest(),
        "profile": list(inputs.shape),  # the network is static: its only profile, min = opt = max
        "builder": BUILDER,
        "machine": where,
    }
    timing = cache / f"timing-{hashlib.sha256(repr(where).encode()).hexdigest()[:32]}.cache"

    def build(path: Path) -> None:
        plan, timings = build_plan(trt, onnx_file, timing.read_bytes() if timing.exists() else b"")
        path.write_bytes(plan)
        write_atomic(timing, timings)

    with torch.cuda.device(inputs.device):
        path = cached_file(cache, key, ".plan", build)
        try:
            run = _loaded(trt, path.read_bytes(), inputs)
        except ValueError:  # complete, but of a library that calls itself the same: once more
            path.unlink(missing_ok=True)
            path = cached_file(cache, key, ".plan", build)
            run = _loaded(trt, path.read_bytes(), inputs)
    return run, hashlib.sha256(path.read_bytes()).hexdigest()


def import_tensorrt() -> Any:
    try:
        return importlib.import_module("tensorrt")
    except (ImportError, OSError) as error:  # OSError: its shared libraries are not where it looks
        raise ValueError(
            f"--engine tensorrt: TensorRT does not import ({error}); pip install tensorrt-cu13 "
            "'fastlatent[onnx]' with access to NVIDIA's package index, which holds its libraries, "
            "or use --engine compile"
        ) from None


def build_plan(trt: Any, onnx_file: bytes, timings: bytes = b"") -> tuple[bytes, bytes]:
    """(the serialised engine, the timing cache afterwards) of an ONNX file, in the types that the file states.

    timings: an earlier timing cache; one of another version or GPU is ignored.

    Raises:
        ValueError: it does not parse, or no kernel fits.
    """
    logger = _logger(trt)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(onnx_file):
        errors = "; ".join(str(parser.get_error(i)) for i in range(parser.num_errors))
        raise ValueError(f"engine: TensorRT {trt.__version__} does not parse this network: {errors[:500]}")
    config = builder.create_builder_config()
    config.builder_optimization_level = BUILDER["optimization_level"]
    config.clear_flag(trt.BuilderFlag.TF32)
    cache = config.create_timing_cache(timings)
    if timings and (cache is None or not config.set_timing_cache(cache, ignore_mismatch=False)):
        cache = config.create_timing_cache(b"")
    config.set_timing_cache(cache, ignore_mismatch=False)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise ValueError(f"engine: TensorRT {trt.__version__} cannot build this network: {logger.last or 'no reason'}")
    kept = config.get_timing_cache()
    return bytes(plan), bytes(kept.serialize()) if kept is not None else b""


def _logger(trt: Any) -> Any:
    class Logger(trt.ILogger):
        """Keeps the last error, which the library only logs."""

        def __init__(self) -> None:
            super().__init__()
            self.last = ""

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.last = message

    return Logger()


def _loaded(trt: Any, plan: bytes, inputs: Tensor) -> Run:
    logger = _logger(trt)
    runtime = trt.Runtime(logger)
    engine = runtime.deserialize_cuda_engine(plan)
    context = engine.create_execution_context() if engine is not None else None
    if context is None:
        raise ValueError(f"engine: TensorRT {trt.__version__} does not load its own plan: {logger.last or 'no reason'}")
    for name, mode in ((INPUT, trt.TensorIOMode.INPUT), (OUTPUT, trt.TensorIOMode.OUTPUT)):
        if engine.get_tensor_mode(name) != mode:
            raise ValueError(f"engine: expected a plan with {INPUT} → {OUTPUT}")
    shape = tuple(engine.get_tensor_shape(OUTPUT))

    def run(new: Tensor) -> Tensor:
        assert new.is_contiguous() and new.shape == inputs.shape and new.dtype == inputs.dtype
        out = torch.empty(shape, dtype=inputs.dtype, device=inputs.device)
        context.set_tensor_address(INPUT, new.data_ptr())
        context.set_tensor_address(OUTPUT, out.data_ptr())
        stream = torch.cuda.current_stream(new.device)
        if not context.execute_async_v3(stream.cuda_stream):
            raise RuntimeError(f"TensorRT did not run: {logger.last or 'no reason'}")
        return out

    run.keep = (runtime, engine)  # type: ignore[attr-defined]  # a context outlives neither
    return run


def _driver() -> str:
    try:
        return Path("/proc/driver/nvidia/version").read_text().splitlines()[0]
    except OSError:
        return "unknown"
