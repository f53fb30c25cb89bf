"""Where the autoencoder of a named model lies: a folder here, or a hub id in the cache of huggingface_hub or online."""

from __future__ import annotations

import os
from pathlib import Path

from fastlatent.encoders.diffusers_autoencoders import SHARDS, WEIGHTS, read_config
from fastlatent.encoders.hub import from_hub, is_hub_id

# Weights in one file or in shards, and what Cosmos keeps its scale in; not the same weights in other formats.
_HUB_FILES = (
    "vae/config.json",
    f"vae/{WEIGHTS}",
    f"vae/{SHARDS}",
    f"vae/{WEIGHTS.replace('.safetensors', '-*.safetensors')}",
    "scheduler/scheduler_config.json",
)


def find_vae(model_id: str, *, near: Path, cache_dir: Path | None = None) -> Path:
    """The folder with config.json and weights of a model's autoencoder.

    In this order: `model_id` as a folder, relative to the working directory, then to `near`; each with the autoencoder
    in its vae/ or itself. Then, if it can be one, as a hub id: in the cache, and downloaded (only the autoencoder)
    unless HF_HUB_OFFLINE is set.

    Args:
        near: the experiment's folder.
        cache_dir: of huggingface_hub, whose own default it is.

    Raises:
        ValueError: it is nowhere; every place that was looked at is named, with what was wrong there.
    """
    name = model_id.strip()
    if not name:
        raise ValueError("expected a model id or a folder, got an empty one; --vae FOLDER names the autoencoder")
    path = Path(os.path.expanduser(name))  # Path.expanduser raises where there is no such user
    looked = []
    for root in dict.fromkeys((path.absolute(), (near / path).absolute())):
        for folder in (root / "vae", root):
            if _missing(folder) is None:
                return folder
            looked.append(f"{folder}: {_state(folder)}")
    if is_hub_id(name):
        found = from_hub(name, looked, files=_HUB_FILES, folder="vae", missing=_missing, cache_dir=cache_dir)
        if found is not None:
            return found
    else:
        looked.append(f"the hub: {name!r} is no hub id (owner/name)")
    places = "\n  ".join(looked)
    raise ValueError(
        f"no autoencoder of the model {model_id!r} was found; looked at\n  {places}\nname its folder with --vae, or "
        "download the model where there is a network"
    )


def _missing(folder: Path) -> str | None:
    """What an autoencoder's folder lacks, or None. ValueError: its index of shards is not JSON."""
    if not (folder / "config.json").is_file():
        return "no config.json"
    if (folder / SHARDS).is_file():  # an interrupted download leaves some of them
        shards = sorted(set(read_config(folder, SHARDS).get("weight_map", {}).values()))
        gone = [name for name in shards if not (folder / name).is_file()]
        return f"{SHARDS}, but no {gone[0]}" if gone else None
    return None if (folder / WEIGHTS).is_file() else f"config.json, but no {WEIGHTS}"


def _state(folder: Path) -> str:
    if not folder.is_dir():
        return "is a file" if folder.exists() else "does not exist"
    return _missing(folder) or "is complete"
