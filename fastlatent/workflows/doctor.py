"""Report what is installed, what is missing and the remedy, and which path each command takes because of it."""

from __future__ import annotations

import ctypes.util
import importlib
import importlib.metadata
import importlib.util
import platform
import subprocess
import sys
from dataclasses import dataclass

from fastlatent import __version__, _native
from fastlatent.config import DoctorConfig

NAME_WIDTH = 22
# Packages that one setting or one kind of file needs: module, distribution, what for, how to install it.
OPTIONAL = (
    ("nvidia.dali", "nvidia-dali-cuda130", "decodes JPEGs and videos on the GPU", "'fastlatent[dali]'"),
    ("nvidia.nvimgcodec", "nvidia-nvimgcodec-cu13", "decodes JPEGs on the GPU", "'fastlatent[nvimgcodec]'"),
    ("imagecodecs", "imagecodecs", "PNG and TIFF of more than 8 bits", "'fastlatent[media]'"),
    ("OpenEXR", "OpenEXR", "EXR files", "'fastlatent[media]'"),
    ("pyarrow", "pyarrow", "parquet files and Hugging Face datasets", "'fastlatent[tables]'"),
    ("av", "av", "mp4 videos of decode and gallery, videos of encode", "'fastlatent[video]'"),
    ("torchcodec", "torchcodec", "encode --decoder torchcodec", "'fastlatent[torchcodec]'"),
    ("fsspec", "fsspec", "sources behind URLs", "'fastlatent[remote]'"),
    ("transformers", "transformers", "encode --text-encoder", "'fastlatent[text]'"),
    ("huggingface_hub", "huggingface_hub", "push, pull", "'fastlatent[hub]'"),
    ("onnx", "onnx", "encode --engine tensorrt", "'fastlatent[onnx]'"),
    ("onnxscript", "onnxscript", "encode --engine tensorrt", "'fastlatent[onnx]'"),
    ("tensorrt", "tensorrt", "encode --engine tensorrt", "tensorrt-cu13"),
    ("ray", "ray", "encode --cluster ray", "'fastlatent[ray]'"),
    ("tensorboard", "tensorboard", "train --trackers tensorboard", "'fastlatent[trackers]'"),
    ("wandb", "wandb", "train --trackers wandb", "'fastlatent[trackers]'"),
)


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
        *(_optional(*row) for row in OPTIONAL),
        _libstdcxx(),
    ]
    print(f"fastlatent {__version__}, Python {platform.python_version()}, {platform.platform()}")
    for title, findings in (("needed", needed), ("optional", optional)):
        print(f"\n{title}:")
        for finding in findings:
            print(f"  {finding.name:<{NAME_WIDTH}} {finding.state}")
            if finding.remedy:
                print(f"  {'':<{NAME_WIDTH}}   remedy: {finding.remedy}")
    if any(finding.remedy for finding in needed):
        return 1
    device = "cuda" if cuda and not cuda.remedy else "cpu"
    kernels = "Triton kernels" if device == "cuda" else "compiled CPU kernels for few rows, torch for many"
    print("\npaths taken on this machine:")
    print("  encode   " + "\n           ".join([*_encode_paths(device), _video_decoder(device)]))
    how = "torch.compile" if device == "cuda" else "eager torch"
    print(f"  train    rows gathered by the compiled CPU kernel, {how} on {device}")
    print(f"           attention: {_train_attention(device)}")
    print(f"  sample   head: {kernels}" + ("; a CUDA graph per token" if device == "cuda" else ""))
    print(f"           {_attention(device)}")
    print(f"  decode   autoencoder in eager torch on {device}; {_videos()}")
    return 0


def _encode_paths(device: str) -> list[str]:
    """What --decoder auto, --engine auto and --batch-size 0 mean here, for RGB images of 256×256."""
    import torch

    from fastlatent.encoders.engines.choose import COMPILE_FROM, choose_engine
    from fastlatent.media.decoders import choose_decoder

    decoder, why = choose_decoder(device)
    shapes = ((256, 256),)
    engine, batch, _ = choose_engine(torch.device(device), COMPILE_FROM, shapes)
    many, _, _ = choose_engine(torch.device(device), COMPILE_FROM + 1, shapes)
    change = "" if many == engine else f", above {COMPILE_FROM:,} images {many}"
    return [f"decoder {decoder}: {why}", f"engine {engine}{change}, on {device}, {batch} images of 256×256 at a time"]


def _video_decoder(device: str) -> str:
    from fastlatent.media.video_decoders import choose_video_decoder

    decoder, why = choose_video_decoder(device)
    return f"videos: decoder {decoder}: {why}"


def _attention(device: str) -> str:
    import torch

    from fastlatent.sampling.attention import choose_attention

    return choose_attention(device, torch.bfloat16, 64, torch.bfloat16).describe()


def _train_attention(device: str) -> str:
    from fastlatent.models.attention import flash_attention

    return "flash-attn in half precision" if device == "cuda" and flash_attention() else "PyTorch's SDPA"


def _videos() -> str:
    from fastlatent.media.videos import choose_video_encoder

    try:
        return f"mp4 by {choose_video_encoder()}"
    except ValueError as error:
        return f"no mp4: {error}"


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
        "advise_random, count_resident, diffusion_head_sample, finite_rows, gather_rows, group_norm_silu, linear, "
        "list_files, populate_rows, read_rows, resize, resize_weights, row_statistics, sample_posterior, solver_step, "
        "take_listing"
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


def _optional(module: str, distribution: str, purpose: str, install: str) -> Finding:
    """A package that is looked up and not imported: some take seconds. What is broken says so where it is used."""
    try:
        present = importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package around it
        present = False
    if not present:
        return Finding(distribution, f"not installed ({purpose})", f"pip install {install}")
    try:
        return Finding(distribution, f"{importlib.metadata.version(distribution)} ({purpose})")
    except importlib.metadata.PackageNotFoundError:
        return Finding(distribution, f"present ({purpose})")


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
