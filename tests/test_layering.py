"""Imports run one way, and the command line stays light: CONTRIBUTING.md, "The house"."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Who may import whom, besides itself. Siblings (models and encoders, say) never import each other.
BELOW_OPS = {"_native", "kernels"}
BELOW_STORE = {"ops", *BELOW_OPS}
BELOW_PIPELINE = {"sources", "media", "store", *BELOW_STORE}
BELOW_DIFFUSION = {"pipeline", *BELOW_PIPELINE}
BELOW_HEADS = {"diffusion", *BELOW_DIFFUSION}
BELOW_DATA = {"heads", *BELOW_HEADS}
BELOW_SAMPLING = {"data", "encoders", "models", *BELOW_DATA}
BELOW_EVALUATION = {"sampling", *BELOW_SAMPLING}
BELOW_TRAINING = {"evaluation", *BELOW_EVALUATION}
BELOW_WORKFLOWS = {"config", "caches", "patches", "training", *BELOW_TRAINING}
ALLOWED = {
    "kernels": set(),
    "_native": set(),
    "ops": BELOW_OPS,
    # Torch-free, as sources and store are, excludes ops: everything under it imports torch.
    "sources": {"_native"},
    "media": BELOW_STORE,
    "store": {"_native"},
    "pipeline": BELOW_PIPELINE,
    "diffusion": BELOW_DIFFUSION,
    "heads": BELOW_HEADS,
    "data": BELOW_DATA,
    "encoders": BELOW_DATA,
    "models": BELOW_DATA,
    "sampling": BELOW_SAMPLING,
    "evaluation": BELOW_EVALUATION,
    "training": BELOW_TRAINING,
    "patches": BELOW_TRAINING,
    "caches": {"data", *BELOW_DATA},
    "workflows": BELOW_WORKFLOWS,
    "config": set(),
    "cli": {"config", "workflows"},
    "__main__": {"cli"},
    "__init__": {"config", "ops", "data", "diffusion", "heads", "patches", "workflows"},
}
FILES = [*ROOT.glob("fastlatent/**/*.py"), *ROOT.glob("kernels/**/*.py")]


def room(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return "kernels" if parts[0] == "kernels" else parts[1]


def imported_names(path: Path) -> list[str]:
    names: list[str] = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: write absolute imports"
            if node.module == "fastlatent":
                names += [f"fastlatent.{alias.name}" for alias in node.names if alias.name != "__version__"]
            else:
                names.append(node.module or "")
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_one_way(path):
    here = room(path)
    for name in imported_names(path):
        assert name.split(".")[0] != "kernels", f"{path}: import fastlatent.kernels, not kernels"
        if name.startswith("fastlatent."):
            there = name.split(".")[1]
            assert there == here or there in ALLOWED[here], f"{path}: {here} must not import {name}"


def test_kernels_is_not_a_package():
    # kernels/__init__.py would shadow Hugging Face's PyPI package `kernels` from the repository root.
    assert not (ROOT / "kernels" / "__init__.py").exists()


# Packages that only one kind of source or file, or one setting, needs are imported when that comes.
OPTIONAL = (
    "pyarrow", "fsspec", "imagecodecs", "OpenEXR", "tifffile", "av", "ray", "transformers", "nvidia", "onnx",
    "tensorrt", "torchcodec", "huggingface_hub", "datasets", "webdataset", "streaming",
)  # fmt: skip
# Imported themselves when their decoder is chosen.
WHOLE = {
    "dali_decoder.py", "nvimagecodec_decoder.py", "pyav_decoder.py", "torchcodec_decoder.py", "dali_video_decoder.py",
}  # fmt: skip


@pytest.mark.parametrize("path", [path for path in FILES if path.name not in WHOLE], ids=lambda path: path.stem)
def test_optional_packages_are_imported_inside_functions(path):
    for node in ast.parse(path.read_text()).body:
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        assert not {name.split(".")[0] for name in names} & set(OPTIONAL)


def modules_of(room: str) -> list[str]:
    paths = sorted((ROOT / "fastlatent" / room).rglob("*.py"))
    return [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in paths]


@pytest.mark.parametrize(
    ("modules", "absent"),
    [
        (["fastlatent"], ("torch", "diffusers", "numpy")),
        (["fastlatent.cli", "fastlatent.config"], ("torch", "diffusers", "numpy")),
        (modules_of("store"), ("torch", "diffusers", *OPTIONAL)),
        (modules_of("sources"), ("torch", "diffusers", *OPTIONAL)),
        (modules_of("pipeline"), ("torch", "diffusers", *OPTIONAL)),
        (["fastlatent.media.images", "fastlatent.media.high_depth"], ("torch", "diffusers", *OPTIONAL)),
        (["fastlatent.media.decoders", "fastlatent.media.transforms"], ("diffusers", *OPTIONAL)),
        (["fastlatent.media.video_decoders"], ("torch", "diffusers", *OPTIONAL)),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_imports_stay_light(modules, absent):
    assert modules
    code = f"import sys, {', '.join(modules)}; print([name for name in {absent!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"
