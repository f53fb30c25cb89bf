"""Weights of autoencoders and teachers: reading them without pickle, their digest, and whether they fit a model."""

from __future__ import annotations

import hashlib
import pickle
import re
import shlex
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

SUFFIXES = (".ckpt", ".pt", ".pth", ".bin", ".safetensors")
# Where training scripts put the weights in a checkpoint; a file without any of them holds nothing but weights.
_WEIGHTS = ("model", "state_dict", "module")


def read_file(file: Path, what: str = "autoencoder") -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """The named weights of one file, on the CPU as they are stored, and its entry `config` if it has one.

    what: how errors begin: what the weights are of.

    Raises:
        ValueError: the file is damaged, needs pickle, or holds no weights.
    """
    loaded: Any = _safetensors(file, what) if file.suffix == ".safetensors" else _unpickled(file, what)
    where = next((name for name in _WEIGHTS if isinstance(loaded.get(name), Mapping)), None)
    state = loaded if where is None else loaded[where]
    if not state or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise ValueError(
            f'{what}: expected tensors by name in {file}, or below "model", "state_dict" or "module"; it holds '
            f"{', '.join(sorted(map(repr, loaded))[:5]) or 'nothing'}"
        )
    config = loaded.get("config")
    if where is None or config is None:
        return {str(name): tensor for name, tensor in state.items()}, None
    if not isinstance(config, Mapping):
        raise ValueError(f'{what}: expected a dict at "config" in {file}, got {type(config).__name__}')
    return {str(name): tensor for name, tensor in state.items()}, dict(config)


def _safetensors(file: Path, what: str) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except Exception as error:  # safetensors raises kinds of its own
        raise ValueError(f"{what}: {file} does not load: {_line(error)}") from None


def _unpickled(file: Path, what: str) -> Mapping[str, Any]:
    try:
        loaded = torch.load(file, weights_only=True, map_location="cpu", mmap=zipfile.is_zipfile(file))
    except Exception as error:  # damaged pickles raise whatever their bytes happen to mean
        needed = re.search(r"GLOBAL (\S+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
        if needed is None:
            raise ValueError(f"{what}: {file} does not load: {_line(error)}") from None
        code = (
            "import os, sys, torch; file = sys.argv[1]; old = torch.load(file, 'cpu', weights_only=False); "
            f"torch.save({{k: dict(old[k]) for k in {('config', *_WEIGHTS)} if k in old}}, file + '.new'); "
            "os.replace(file + '.new', file)"
        )
        raise ValueError(
            f"{what}: {file} holds {needed[1]}, which only pickle can load, and pickle runs whatever code a file "
            f'holds. If you trust it, write it again as plain tensors:\npython -c "{code}" {shlex.quote(str(file))}'
        ) from None
    if not isinstance(loaded, Mapping):
        raise ValueError(f"{what}: expected a dict in {file}, got {type(loaded).__name__}")
    return loaded


def _line(error: Exception) -> str:
    return " ".join((str(error) or repr(error)).split())[:300]


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of CPU tensors, over names, dtypes, shapes and contents, in the order of the names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def load_into(model: nn.Module, state: Mapping[str, Tensor], file: Path) -> None:
    """Give `model` exactly these weights, in the dtype they are stored in.

    Raises:
        ValueError: names or shapes differ; the first three of each kind are named.
    """
    wanted = model.state_dict()
    wrong = {
        "missing": sorted(wanted.keys() - state.keys()),
        "unexpected": sorted(state.keys() - wanted.keys()),
        "of another shape": sorted(
            f"{name} {list(state[name].shape)}, expected {list(wanted[name].shape)}"
            for name in wanted.keys() & state.keys()
            if state[name].shape != wanted[name].shape
        ),
    }
    found = [f"{what}: {', '.join(names[:3])} ({len(names)} in all)" for what, names in wrong.items() if names]
    if found:
        raise ValueError(f"autoencoder: the weights in {file} do not fit; {'; '.join(found)}")
    model.load_state_dict(state, assign=True)


class _Identified(Protocol):
    def identity(self) -> dict[str, Any]: ...


_Model = TypeVar("_Model", bound=_Identified)


def reloaded(reload: Callable[[], _Model], identity: Mapping[str, Any]) -> _Model:
    """What `reload` gives; ValueError unless it still is what was loaded before."""
    again = reload()
    if again.identity() != identity:
        raise ValueError("autoencoder: its files changed since they were loaded; run the command again")
    return again
