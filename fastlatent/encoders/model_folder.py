"""Where the autoencoder of a named model lies: a folder here, or a hub id in the cache of huggingface_hub or online."""

from __future__ import annotations

import os
import re
from pathlib import Path

from fastlatent.encoders.diffusers_autoencoders import SHARDS, WEIGHTS, read_config

# Weights in one file or in shards, and what Cosmos keeps its scale in; not the same weights in other formats.
_HUB_FILES = (
    "vae/config.json",
    f"vae/{WEIGHTS}",
    f"vae/{SHARDS}",
    f"vae/{WEIGHTS.replace('.safetensors', '-*.safetensors')}",
    "scheduler/scheduler_config.json",
)
_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)
# Seconds until a hub that does not answer counts as away.
_HUB_TIMEOUT = 10.0


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
    if _HUB_ID.fullmatch(name) and ".." not in name:
        found = _from_hub(name, cache_dir, looked)
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


def _from_hub(name: str, cache_dir: Path | None, looked: list[str]) -> Path | None:
    """The autoencoder's folder in the hub's cache, downloaded if need be; what failed is added to `looked`."""
    try:
        from huggingface_hub import HfApi, constants, snapshot_download
    except ImportError:
        looked.append(f"the hub: {name} needs huggingface_hub: pip install huggingface_hub")
        return None
    cache = Path(cache_dir or constants.HF_HUB_CACHE)
    place = cache / f"models--{name.replace('/', '--')}"
    for local in (True, False):
        where = f"the hub's cache, {place}" if local else f"the hub, {name}"
        if not local and constants.HF_HUB_OFFLINE:
            looked.append(f"{where}: not asked, HF_HUB_OFFLINE is set")
            return None
        try:
            if not local:  # the download asks the same without a time limit
                HfApi().model_info(name, timeout=_HUB_TIMEOUT)
            root = snapshot_download(
                name,
                cache_dir=cache,
                local_files_only=local,
                allow_patterns=list(_HUB_FILES),
                etag_timeout=_HUB_TIMEOUT,
            )
        except Exception as error:  # of httpx, requests, the hub and the disk: all mean that it is not to be had
            said = "nothing of this model" if local and not place.exists() else " ".join(str(error).split())[:300]
            looked.append(f"{where}: {said or type(error).__name__}")
            continue
        folder = Path(root) / "vae"
        if (problem := _missing(folder)) is None:
            return folder
        looked.append(f"{where}: vae/ has {problem}")
    return None
