"""Files of a model on the Hugging Face Hub: from the cache here, or downloaded."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)
# Seconds until a hub that does not answer counts as away.
_HUB_TIMEOUT = 10.0


def is_hub_id(name: str) -> bool:
    """Whether a hub would take it for one (owner/name, or name alone)."""
    return _HUB_ID.fullmatch(name) is not None and ".." not in name


def from_hub(
    name: str,
    looked: list[str],
    *,
    files: tuple[str, ...],
    missing: Callable[[Path], str | None],
    folder: str = "",
    cache_dir: Path | None = None,
) -> Path | None:
    """`folder` of the model `name` in the hub's cache, downloaded unless HF_HUB_OFFLINE is set; None if that failed.

    Args:
        looked: what failed is added here, a line for each place.
        files: patterns of what is downloaded.
        missing: what a folder lacks, or None.
        cache_dir: of huggingface_hub, whose own default it is.
    """
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
                name, cache_dir=cache, local_files_only=local, allow_patterns=list(files), etag_timeout=_HUB_TIMEOUT
            )
        except Exception as error:  # of httpx, requests, the hub and the disk: all mean that it is not to be had
            said = "nothing of this model" if local and not place.exists() else " ".join(str(error).split())[:300]
            looked.append(f"{where}: {said or type(error).__name__}")
            continue
        found = Path(root) / folder
        if (problem := missing(found)) is None:
            return found
        looked.append(f"{where}: {folder + '/' if folder else 'it'} has {problem}")
    return None
