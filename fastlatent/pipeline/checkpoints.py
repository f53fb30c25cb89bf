"""Checkpoint folders: `RUN/checkpoint-000500/`, complete or not there at all. Torch-free."""

from __future__ import annotations

import os
import re
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

from fastlatent.store.files import fsync_directory

TRAINING_STATE = "training.safetensors"
_NAME = re.compile(r"checkpoint-(\d+)")


def step_of(folder: Path) -> int | None:
    """The step in a checkpoint folder's name, or None."""
    match = _NAME.fullmatch(folder.name)
    return int(match[1]) if match else None


def checkpoints(run: Path) -> list[Path]:
    """The checkpoint folders of a run, oldest first."""
    if not run.is_dir():
        return []
    found = [(step, folder) for folder in run.iterdir() if (step := step_of(folder)) is not None and folder.is_dir()]
    return [folder for _, folder in sorted(found)]


def newest_first(path: Path) -> list[Path]:
    """The checkpoint folders of a run, newest first, then the folder: it has what was newest when training ended."""
    return [*reversed(checkpoints(path)), path]


def resolve(path: str | Path, weights: str, what: str) -> Path:
    """The folder that holds config.json and `weights`: the newest checkpoint of the run `path`, or `path` itself.

    Raises:
        ValueError: there is none; `what` says what was looked for.
    """
    path = Path(path)
    for folder in newest_first(path):
        if (folder / "config.json").is_file() and (folder / weights).is_file():
            return folder
    if not path.exists():
        raise ValueError(f"{what}: {path} does not exist")
    raise ValueError(
        f"{what}: expected config.json and {weights} in {path} or in its checkpoint-* folders, found "
        f"{', '.join(sorted(p.name for p in path.iterdir())[:8]) or 'nothing'}"
        if path.is_dir()
        else f"{what}: expected a folder with config.json and {weights}, got the file {path}"
    )


def save(run: Path, step: int, write: Callable[[Path], None], keep: int) -> Path:
    """Write RUN/checkpoint-{step} in one go: `write` fills a temporary folder, which is synced and renamed.

    Only then are all but the newest `keep` checkpoints removed. If anything fails, the older ones are as before.
    """
    final = run / f"checkpoint-{step:06d}"
    if final.exists():  # the same step is the same state
        return final
    temporary = run / f".tmp-{final.name}-{uuid.uuid4().hex}"
    temporary.mkdir(parents=True)
    try:
        write(temporary)
        for root, _, files in os.walk(temporary):
            for name in files:
                with open(os.path.join(root, name), "rb") as file:
                    os.fsync(file.fileno())
            fsync_directory(Path(root))
        temporary.rename(final)
        fsync_directory(run)
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"{final} could not be written ({error}); older checkpoints are kept. Free some space and run the same "
            "command again"
        ) from error
    finally:
        remove_temporaries(run)
    for old in checkpoints(run)[:-keep]:
        shutil.rmtree(old)
    return final


def publish(run: Path) -> None:
    """Give the run's folder itself what users load of its newest checkpoint: all but the state of the training.

    Every entry is replaced as a whole. What is large is linked, not copied.
    """
    newest = checkpoints(run)[-1]
    for entry in sorted(newest.iterdir()):
        if entry.name == TRAINING_STATE:
            continue
        temporary, final = run / f".tmp-{entry.name}-{uuid.uuid4().hex}", run / entry.name
        if entry.is_dir():
            shutil.copytree(entry, temporary, copy_function=_link)
            if final.exists():
                final.rename(run / f".tmp-old-{uuid.uuid4().hex}")
        else:
            _link(entry, temporary)
        temporary.rename(final)
    fsync_directory(run)
    remove_temporaries(run)


def _link(source: str | Path, target: str | Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, target)


def remove_temporaries(run: Path) -> None:
    """Delete what a killed `save` left."""
    for left in run.glob(".tmp-*"):
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)
