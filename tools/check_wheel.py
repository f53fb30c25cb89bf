"""Build the wheel, install it in a clean environment elsewhere, and use it there. Needs only a Python >= 3.10.

Run by `make wheel`. Everything happens in a temporary folder that is removed afterwards. The exit code is 1 where
the wheel does not build, holds what it should not, or does not work away from the checkout.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
import venv
import zipfile
from pathlib import Path

SELF = Path(__file__).resolve()
ROOT = SELF.parents[1]
LIBRARY = "fastlatent/lib/libfastlatent_cpu.so"
IMAGES, SIZE = 3, 16
# Nothing of the caller's may reach the new environment.
HIDDEN = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")


def main() -> None:
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="fastlatent-wheel-") as temporary:
        folder = Path(temporary).resolve()
        environment, elsewhere = folder / "environment", folder / "elsewhere"
        elsewhere.mkdir()
        print(f"creating {environment}", flush=True)
        venv.create(environment, with_pip=True)
        python = environment / "bin" / "python"
        # Not the checkout's build folder: what an earlier build left there could hide that a file is missing.
        run(
            python, "-m", "pip", "wheel", "--quiet", "--no-deps", "--config-settings", f"build-dir={folder / 'build'}",
            "--wheel-dir", folder / "wheels", ROOT, cwd=elsewhere,
        )  # fmt: skip
        (wheel,) = (folder / "wheels").glob("*.whl")
        check_contents(wheel)
        run(python, "-m", "pip", "install", "--quiet", wanted_torch(), wheel, cwd=elsewhere)
        command = environment / "bin" / "fastlatent"
        run(command, "--help", cwd=elsewhere)
        run(command, "doctor", cwd=elsewhere)
        # -I: neither the current folder nor that of this file is importable.
        run(python, "-I", SELF, "use", environment, cwd=elsewhere)
        run(command, *shlex.split(f"encode images --vae vae --out latents --size {SIZE}"), cwd=elsewhere)
        run(command, "inspect", "latents", cwd=elsewhere)
        run(command, *shlex.split("decode latents --output-dir decoded"), cwd=elsewhere)
        decoded = sorted(path.name for path in (elsewhere / "decoded").rglob("*.png") if path.name != "sheet.png")
        expect(len(decoded) == IMAGES, f"expected {IMAGES} decoded images, got {decoded}")
    print(f"the wheel works ({time.monotonic() - start:.0f} s)")


def run(*command: str | Path, cwd: Path) -> None:
    print(f"$ {shlex.join(map(str, command))}", flush=True)
    environment = {name: value for name, value in os.environ.items() if name not in HIDDEN}
    code = subprocess.run(
        list(map(str, command)), cwd=cwd, env=environment | {"PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    ).returncode
    expect(code == 0, f"exit code {code}")


def expect(condition: bool, message: str) -> None:
    if not condition:
        print(f"check_wheel: {message}", file=sys.stderr, flush=True)
        sys.exit(1)


def wanted_torch() -> str:
    """The torch of the Python that runs this where it is new enough, so that CI tries every version it has."""
    import bootstrap  # beside this file, so out of reach of the new environment's `python -I`

    if bootstrap.torch_version(sys.executable) < bootstrap.OLDEST_TORCH:
        return bootstrap.TORCH
    return f"torch=={importlib.metadata.version('torch').split('+')[0]}"


def check_contents(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    print(f"{wheel.name}: {len(names)} files, {wheel.stat().st_size / 1024:.0f} KiB", flush=True)
    expect(wheel.name.endswith(".whl") and "-py3-none-" in wheel.name, f"expected a py3-none wheel, got {wheel.name}")
    wanted = [LIBRARY, "fastlatent/lib/fastlatent.h"]
    wanted += [f"fastlatent/kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py")]
    wanted += [str(path.relative_to(ROOT)) for path in (ROOT / "fastlatent").rglob("*.py")]
    wanted += [str(path.relative_to(ROOT)) for path in (ROOT / "fastlatent").rglob("*.html")]
    missing = sorted(set(wanted) - set(names))
    expect(not missing, f"the wheel lacks {', '.join(missing)}")
    folders = ("fastlatent/", f"{'-'.join(wheel.name.split('-')[:2])}.dist-info/")
    unwanted = re.compile(r"(^|/)(tests?|test_[^/]*|conftest\.py|__pycache__)(/|$)")
    strangers = [name for name in names if not name.startswith(folders) or unwanted.search(name)]
    expect(not strangers, f"the wheel should not hold {', '.join(strangers)}")


def use(environment: Path) -> None:
    """Runs in the new environment: where things come from, the ops, and inputs for the commands in ./."""
    import importlib.util

    import fastlatent.kernels

    import fastlatent
    from fastlatent import _native

    kernels = Path(importlib.util.find_spec("fastlatent.kernels.solver_step").origin)  # type: ignore[union-attr, arg-type]
    library = Path(_native.load("cpu")._name)  # type: ignore[union-attr]
    for path in (Path(fastlatent.__file__), *map(Path, fastlatent.kernels.__path__), kernels, library):
        print(f"  {path}")
        expect(path.resolve().is_relative_to(environment), f"expected {path} in {environment}")
    expect(str(library).endswith(LIBRARY), f"expected {LIBRARY}, got {library}")
    check_ops()
    write_inputs()


def check_ops() -> None:
    import torch

    from fastlatent.diffusion.solvers import build_table
    from fastlatent.ops import gather_rows, gather_rows_reference, solver_step, solver_step_reference

    generator = torch.Generator().manual_seed(0)
    shards = [torch.randn(rows, 4, 5, generator=generator) for rows in (7, 3)]
    shard, row = torch.tensor([0, 1, 0, 1, 0]), torch.tensor([6, 2, 0, 0, 3])
    got, want = torch.empty(2, 5, 4, 5)
    gather_rows(shards, shard, row, got)
    gather_rows_reference(shards, shard, row, want)
    expect(bool(torch.equal(got, want)), "gather_rows is not its reference")

    state, reference = torch.randn(4, 3, 6, generator=generator).repeat(2, 1, 1, 1)
    guidance = torch.tensor([[3.0], [-2.0]]).expand(2, 3)
    for coefficients in build_table("ddpm", 5, "epsilon", "cosine").rows.float():
        output, noise = torch.randn(2, 3, 6, generator=generator), torch.randn(3, 6, generator=generator)
        solver_step(state, output, guidance, coefficients, noise)
        solver_step_reference(reference, output, guidance, coefficients, noise)
    # 5 steps of sums of at most 8 terms: a few float32 units in the last place of the largest.
    error = float((state - reference).abs().max() / reference.abs().max())
    expect(error < 1e-5, f"solver_step is off its reference by {error:g}")
    print("  gather_rows and solver_step agree with their references")


def write_inputs() -> None:
    import numpy as np
    import torch
    from diffusers import AutoencoderKL
    from PIL import Image

    torch.manual_seed(0)
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4, sample_size=SIZE,
    ).save_pretrained("vae")  # fmt: skip
    generator = np.random.default_rng(0)
    Path("images").mkdir()
    for i in range(IMAGES):
        pixels = generator.integers(0, 256, (SIZE + 4 * i, SIZE + 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(f"images/{i}.png")


if __name__ == "__main__":
    if sys.argv[1:2] == ["use"]:
        use(Path(sys.argv[2]))
    elif sys.argv[1:]:
        sys.exit("usage: check_wheel.py")
    else:
        main()
