"""One tiny chain for all tests of the commands: images, autoencoder, latents, Transformer. Made once, then copied."""

import contextlib
import io
import itertools
import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastlatent.cli import main

VAE_SIZES = "--size 8 --latent-channels 2 --block-out-channels 8,8 --layers-per-block 1 --norm-groups 4"
AR_SIZES = "--hidden-size 64 --depth 1 --num-heads 2 --mlp-ratio 2 --diffusion-depth 1"
TRAIN_VAE = f"{VAE_SIZES} --steps 3 --batch-size 4 --warmup-steps 1 --checkpoint-every 2 --threads 1"
# 3 rows a shard, 2 a batch: several shards, the last one short; a full batch and a padded one.
ENCODE = "--size 8 --batch-size 2 --unit-rows 3 --threads 1"
TRAIN_AR = f"{AR_SIZES} --steps 4 --batch-size 4 --warmup-steps 1 --learning-rate 1e-2 --checkpoint-every 2 --threads 1"


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def message(self) -> str:
        """The error: exactly one, below whatever progress was shown."""
        assert self.code in (1, 2), self
        assert "Traceback" not in self.err
        lines = self.err.split("\n")
        starts = [i for i, line in enumerate(lines) if line.startswith("fastlatent ")]
        assert len(starts) == 1, self.err
        return "\n".join(lines[starts[0] :]).strip()


def command(line: str, *more: object) -> Done:
    """Run one command in this process. `more`: paths, which may hold spaces."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main([*line.split(), *map(str, more)])
        except SystemExit as error:
            code = int(error.code or 0)
    return Done(code, out.getvalue(), err.getvalue())


def ok(line: str, *more: object) -> Done:
    done = command(line, *more)
    assert done.code == 0, done.err
    return done


def image(seed: int, shape: tuple[int, ...] = (20, 24, 3)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder but the lock, which names the process that held it."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@dataclass(frozen=True)
class Chain:
    """The folders of the shared chain, for reading only, and the helpers above."""

    images: Path
    vae: Path
    latents: Path
    ar: Path
    command = staticmethod(command)
    ok = staticmethod(ok)
    image = staticmethod(image)
    contents = staticmethod(contents)
    train_vae, encode, train_ar = TRAIN_VAE, ENCODE, TRAIN_AR

    def copy(self, name: str, to: Path) -> Path:
        return Path(shutil.copytree(getattr(self, name), to))

    def sample(self, checkpoint: Path, output: Path, more: str = "") -> Done:
        return command(f"sample --num-inference-steps 2 --threads 1 {more} --output", output, checkpoint)


@pytest.fixture(scope="session")
def chain(tmp_path_factory) -> Chain:
    root = tmp_path_factory.mktemp("chain")
    made = Chain(root / "images", root / "vae", root / "latents", root / "ar")
    for label, name in enumerate(("ant", "bee")):
        (made.images / name).mkdir(parents=True)
        for i in range(4):
            image(10 * label + i).save(made.images / name / f"{i}.png")
    ok(f"train vae {TRAIN_VAE} --out", made.vae, made.images)
    ok(f"encode {ENCODE} --out", made.latents, "--vae", made.vae, made.images)
    ok(f"train ar {TRAIN_AR} --out", made.ar, made.latents)
    return made


@pytest.fixture
def images(chain, tmp_path):
    return chain.copy("images", tmp_path / "images")


@pytest.fixture(scope="session")
def forking_process():
    script = Path(__file__).with_name("forked_cli.py")
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, script], **pipes) as process:
        yield process
        process.stdin.close()


@pytest.fixture
def forked(forking_process, tmp_path):
    """forked(*jobs): what forked_cli.py does with each; the exit codes. Child i of job n prints to log-<n>-<i>.txt."""
    logs = (tmp_path / f"log-{number}" for number in itertools.count())

    def run(*jobs: dict) -> list[list[int]]:
        found = []
        for job in jobs:
            forking_process.stdin.write(json.dumps({"log": str(next(logs)), **job}) + "\n")
            forking_process.stdin.flush()
            found.append(json.loads(forking_process.stdout.readline()))
        return found

    return run
