"""tools/hub_kernels: a layout that `kernels` loads, by its rules, with the numbers of fastlatent.ops."""

import ast
import base64
import hashlib
import importlib.util
import json
import platform
import sys
from contextlib import contextmanager
from importlib.machinery import SourceFileLoader
from pathlib import Path

import pytest
import torch

from fastlatent import ops

TOOL = Path(__file__).parents[2] / "tools" / "hub_kernels"
MACHINE = platform.machine()
COMPILED = [f"torch-stable-abi211-{backend}-{MACHINE}-linux" for backend in ("cpu", "cu126", "cu130")]
PLAIN = ["torch-cpu", "torch-cuda"]
# The compiled library is for the CPU, and the same in every variant.
ONLY_COMPILED = {"ShardTable", "gather_rows", "gather_rows_reference", "resize", "resize_reference"}


@pytest.fixture(scope="module")
def tool():
    loader = SourceFileLoader("hub_kernels", str(TOOL))
    module = sys.modules["hub_kernels"] = importlib.util.module_from_spec(
        importlib.util.spec_from_loader("hub_kernels", loader)
    )
    loader.exec_module(module)
    yield module
    del sys.modules["hub_kernels"]


@pytest.fixture(scope="module")
def repository(tool, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("hub") / "fastlatent-ops"
    assert tool.main([str(out)]) == 0
    return out


@contextmanager
def taken_out_again(name: str):
    """A namespace of torch.library can be defined once: what a test loads must be gone for the next."""
    try:
        yield
    finally:
        for module in [module for module in sys.modules if module == name or module.startswith(f"{name}.")]:
            if module.endswith("._library"):
                sys.modules[module].LIBRARY._destroy()
            del sys.modules[module]


def fields(variant: Path) -> dict:
    return json.loads((variant / "metadata.json").read_text())


def trees(variant: Path) -> list[tuple[Path, ast.Module]]:
    return [(path.relative_to(variant), ast.parse(path.read_text())) for path in sorted(variant.rglob("*.py"))]


def numbers(library) -> dict[str, torch.Tensor]:
    """An op of every kind: C++ on the CPU where there is a library, plain torch, random numbers, the whole head."""
    draw = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw)

    state, row = torch.zeros(4, 3, 4), randn(16)
    state[0], row[2] = randn(3, 4), torch.inf
    library.solver_step(state, randn(2, 3, 4), randn(2, 3), row, randn(3, 4))
    weights = library.HeadWeights(
        randn(16, 4), randn(16), 0.1 * randn(128, 16), randn(128), 0.3 * randn(2, 40, 16), randn(2, 40),
        0.3 * randn(2, 16, 20), randn(2, 16), 0.1 * randn(4, 16), randn(4),
    )  # fmt: skip
    token = torch.zeros(4, 3, 4)
    token[0], table = randn(3, 4), 0.5 * randn(3, 16)
    table[:, 2] = torch.inf
    library.diffusion_head_sample(token, randn(1, 3, 16), randn(3, 16), table, torch.ones(1, 3), weights)
    moments, keys = randn(3, 1, 8, 4, 4), torch.tensor([5, -7, 2**40])
    return {
        "solver_step": state,
        "diffusion_head_sample": token,
        "sample_posterior": library.sample_posterior(moments, keys, seed=1, epoch=2),
        "norm_modulate": library.norm_modulate(randn(5, 24), randn(5, 24), randn(5, 24), layer_norm=True, eps=1e-6),
        "group_norm_silu": library.group_norm_silu(randn(2, 8, 5, 5), randn(8), randn(8), groups=4, eps=1e-6),
        "linear": library.linear(randn(3, 32), randn(8, 32)),
    }


def test_the_layout(repository):
    variants = sorted(path.name for path in (repository / "build").iterdir())
    assert variants == sorted(COMPILED + PLAIN)
    identities = []
    for variant in (repository / "build").iterdir():
        found = fields(variant)
        assert found["name"] == "fastlatent-ops" and found["python-depends"] == []
        assert found["backend"]["type"] == ("cpu" if "cpu" in variant.name else "cuda")
        identities.append(found["id"])
        hashes = {
            path.relative_to(variant).as_posix(): base64.b64encode(hashlib.sha256(path.read_bytes()).digest()).decode()
            for path in variant.rglob("*")
            if path.is_file() and path.name != "metadata.json"
        }
        assert found["digest"] == {"algorithm": "sha256", "files": hashes}
        assert (variant / "lib" / "libfastlatent_cpu.so").exists() == (variant.name in COMPILED)
    # The name of a module and of a namespace: no dots, and never twice.
    assert len(set(identities)) == 5 and all(identity.isidentifier() for identity in identities)


@pytest.mark.parametrize("name", COMPILED + PLAIN)
def test_the_rules_of_the_hub(repository, name):
    variant = repository / "build" / name
    identity = fields(variant)["id"]
    used = set()
    for path, tree in trees(variant):
        for node in ast.walk(tree):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [str(node.module)]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == len(path.parts), f"{path}: counted from the variant's folder"
                target = variant.joinpath(*(node.module or "").split("."))
                targets = [target] if node.module else [target / alias.name for alias in node.names]
                assert all(found.is_dir() or found.with_suffix(".py").exists() for found in targets), (
                    path,
                    node.module,
                )
            elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == "torch.ops":
                used.add(node.attr)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and "::" in node.value:
                used.add(node.value.split("::")[0].strip('"'))
            allowed = {*sys.stdlib_module_names, "torch", "triton"}
            assert {one.split(".")[0] for one in names} <= allowed, f"{path} imports {names}"
    assert used == {identity}
    assert f'Library("{identity}", "DEF")' in (variant / "ops" / "_library.py").read_text()


@pytest.mark.parametrize("name", [COMPILED[0], "torch-cuda"])
def test_the_same_numbers(repository, name):
    """Loaded as `kernels` loads it: by path, under the name that metadata.json says."""
    variant = repository / "build" / name
    identity = fields(variant)["id"]
    spec = importlib.util.spec_from_file_location(identity, variant / "__init__.py")
    with taken_out_again(identity):
        module = sys.modules[identity] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        assert set(ops.__all__) - set(module.__all__) == (set() if name in COMPILED else ONLY_COMPILED)
        wanted, found = numbers(ops), numbers(module)
        for op, value in wanted.items():
            if name in COMPILED:
                assert torch.equal(found[op], value), op
            else:  # another order of sums
                torch.testing.assert_close(found[op], value, rtol=1e-4, atol=1e-5)
        if name in COMPILED:
            library = sys.modules[f"{identity}._native"].load("cpu")
            assert Path(library._name).parent == variant / "lib"


def test_every_kernel_is_there(repository):
    here = {path.name for path in (TOOL.parents[1] / "kernels").glob("*.py")}
    for name in COMPILED + PLAIN:
        there = {path.name for path in (repository / "build" / name / "kernels").glob("*.py")} - {"__init__.py"}
        assert there == here - (set() if name in COMPILED else {"resize.py"})


def test_the_same_tree_gives_the_same_files(tool, repository, tmp_path, capsys):
    assert tool.main([str(tmp_path)]) == 0
    for path in repository.rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts:
            assert (tmp_path / path.relative_to(repository)).read_bytes() == path.read_bytes()
    capsys.readouterr()
    assert tool.main([str(tmp_path)]) == 1 and "is there already" in capsys.readouterr().err
    assert tool.main([]) == 2 and "tools/hub_kernels OUT" in capsys.readouterr().err


def test_kernels_loads_it(repository):
    # From the repository's root, where `python -m pytest` looks first, our folder kernels/ has that name too.
    kernels = pytest.importorskip("kernels")
    if not hasattr(kernels, "get_local_kernel"):
        pytest.skip("the package kernels is not installed (pip install 'kernels>=0.17')")
    from kernels._rust import Digest, DigestAlgorithm

    variant = repository / "build" / COMPILED[0]
    digest = kernels.Metadata.read_from_file(variant / "metadata.json").digest
    digest.validate(Digest.hash_variant(DigestAlgorithm.SHA256, variant))
    with taken_out_again(fields(variant)["id"]):
        module = kernels.get_local_kernel(repository, backend="cpu")
        assert Path(module.__file__).parent == variant  # preferred to torch-cpu
        wanted, found = numbers(ops), numbers(module)
        assert all(torch.equal(found[op], value) for op, value in wanted.items())
