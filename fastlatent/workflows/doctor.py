"""Report what is installed, what is missing and the remedy, and which path each command takes because of it."""

from __future__ import annotations

import ctypes.util
import importlib
import importlib.metadata
import platform
import subprocess
import sys
from dataclasses import dataclass

from fastlatent import __version__, _native
from fastlatent.config import DoctorConfig


@dataclass(frozen=True)
class Finding:
    """One line of the report; `remedy` is empty where nothing is wrong."""

    name: str
    state: str
    remedy: str = ""


def doctor(config: DoctorConfig) -> int:
    """Print the report. Returns 1 where something that every command needs is missing."""
    torch = _torch()
    packages = [_package("diffusers"), _package("safetensors"), _package("PIL", "pillow"), _codecs()]
    needed = [_library(), torch, *packages]
    cuda = _cuda() if not torch.remedy else None
    optional = [
        *([cuda] if cuda else []),
        _package("triton", remedy="pip install triton (comes with CUDA builds of torch)"),
        _package("flash_attn", "flash-attn", remedy="pip install --no-build-isolation flash-attn (needs nvcc)"),
        _package("nvidia.dali", "nvidia-dali-cuda130", remedy="pip install 'fastlatent[gpu]'"),
        _package("tensorrt", remedy="pip install tensorrt-cu13"),
        _package("nvidia.nvimgcodec", "nvidia-nvimgcodec-cu13", remedy="pip install 'nvidia-nvimgcodec-cu13[all]'"),
        _libstdcxx(),
    ]
    print(f"fastlatent {__version__}, Python {platform.python_version()}, {platform.platform()}")
    for title, findings in (("needed", needed), ("optional", optional)):
        print(f"\n{title}:")
        for finding in findings:
            print(f"  {finding.name:<18} {finding.state}")
            if finding.remedy:
                print(f"  {'':<18}   remedy: {finding.remedy}")
    device = "cuda" if cuda and not cuda.remedy else "cpu"
    kernels = "Triton kernels" if device == "cuda" else "compiled CPU kernels for few rows, torch for many"
    print("\npaths taken on this machine:")
    print(f"  encode   Pillow decode and crop on the CPU, autoencoder in eager torch on {device}")
    print(f"  train    rows gathered by the compiled CPU kernel, eager torch on {device}, SDPA attention")
    print(f"  sample   head: {kernels}" + ("; a CUDA graph per token" if device == "cuda" else ""))
    if not any(finding.remedy for finding in needed):
        from fastlatent.sampling.attention import choose_attention

        half = importlib.import_module("torch").bfloat16
        print(f"           {choose_attention(device, half, 64, half).describe()}")
    print(f"  decode   autoencoder in eager torch on {device}")
    return 1 if any(finding.remedy for finding in needed) else 0


def _library() -> Finding:
    try:
        library = _native.load("cpu")
    except OSError as error:
        return Finding(
            "compiled library", f"does not load: {error}", "rebuild: pip install . (a C++17 compiler is needed)"
        )
    if library is None:
        return Finding("compiled library", "missing", "build it: pip install . (a C++17 compiler is needed)")
    functions = (
        "advise_random, count_resident, diffusion_head_sample, gather_rows, group_norm_silu, linear, list_files, "
        "populate_rows, read_rows, resize, resize_weights, sample_posterior, solver_step, take_listing"
    )
    return Finding("compiled library", f"libfastlatent_cpu.so: {functions}")


def _torch() -> Finding:
    finding = _package("torch", remedy="pip install torch==2.13.0")
    if not finding.remedy and tuple(int(part) for part in finding.state.split(".")[:2]) < (2, 11):
        return Finding("torch", finding.state, "pip install 'torch>=2.11'")
    return finding


def _package(module: str, distribution: str = "", remedy: str = "") -> Finding:
    """Import a package: present and loadable, present and broken, or absent."""
    name = distribution or module
    try:
        importlib.import_module(module)
    except ImportError as error:
        if getattr(error, "name", "") and module.startswith(str(error.name)):
            return Finding(name, "not installed", remedy or f"pip install {name}")
        return Finding(name, f"installed but does not import: {error}", f"reinstall {name}")
    except Exception as error:  # a broken binary package may raise anything, and that is the finding
        return Finding(name, f"installed but does not import: {type(error).__name__}: {error}", f"reinstall {name}")
    try:
        return Finding(name, importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return Finding(name, "present")


def _cuda() -> Finding:
    import torch

    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        return Finding("CUDA", f"{torch.version.cuda}, {', '.join(names)}")
    if torch.version.cuda is None:
        return Finding("CUDA", "this torch is a CPU build", "install a CUDA build of torch if there is a GPU")
    return Finding(
        "CUDA", f"torch is built for {torch.version.cuda} but sees no device", "check the driver: nvidia-smi"
    )


def _codecs() -> Finding:
    try:
        from PIL import features
    except ImportError:
        return Finding("image codecs", "none without Pillow", "pip install pillow")
    wanted = ("jpg", "zlib", "webp", "libtiff")
    missing = [name for name in wanted if not features.check(name)]
    state = "Pillow decodes " + ", ".join(name for name in wanted if name not in missing)
    return Finding("image codecs", state, f"reinstall pillow: {', '.join(missing)} missing" if missing else "")


def _libstdcxx() -> Finding:
    """Other packages' binaries need the system's libstdc++; ours holds its own."""
    path = ctypes.util.find_library("stdc++")
    if path is None:
        return Finding("libstdc++", "not found (fastlatent holds its own; other packages may need it)")
    # This symbol came with GLIBCXX_3.4.29.
    symbol = "_ZSt28__throw_bad_array_new_lengthv"
    code = f"import ctypes; print(hasattr(ctypes.CDLL('libstdc++.so.6'), '{symbol}'))"
    new = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "True"
    if new:
        return Finding("libstdc++", f"{path}, GLIBCXX_3.4.29 or newer")
    return Finding(
        "libstdc++",
        f"{path}, older than GLIBCXX_3.4.29 (fastlatent holds its own; other packages may fail to import)",
        "conda install -c conda-forge libstdcxx-ng, or load a newer gcc module",
    )
