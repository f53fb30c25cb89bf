"""A source from its path or URL alone. Torch-free."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator

from fastlatent.sources.arrow_files import SUFFIXES as TABLE_SUFFIXES
from fastlatent.sources.files import open_files
from fastlatent.sources.image_folder import is_image, scan_image_folder
from fastlatent.sources.items import Source
from fastlatent.sources.manifest import scan_manifest
from fastlatent.sources.tables import DESCRIPTIONS, scan_table
from fastlatent.sources.tars import COMPRESSED, scan_tars
from fastlatent.sources.trajectories import POSES, holds_trajectories, scan_trajectories

# kind -> how to scan it, and the options it knows
KINDS: dict[str, tuple[Callable[..., Source], tuple[str, ...]]] = {
    "manifest": (scan_manifest, ("split", "captions", "conditions", "root")),
    "tars": (scan_tars, ("captions",)),
    "table": (scan_table, ("split", "captions")),
    "trajectories": (scan_trajectories, ("names",)),
    "images": (scan_image_folder, ("captions",)),
}


# What the command line calls the options.
FLAGS = {
    "split": "--split", "names": "--trajectories", "captions": "--captions", "conditions": "--condition-spec",
    "root": "--manifest-root",
}  # fmt: skip


def open_source(
    source: str | os.PathLike[str],
    *,
    kind: str = "auto",
    split: str | None = None,
    names: str | os.PathLike[str] | None = None,
    captions: str | None = None,
    conditions: str = "none",
    root: str | None = None,
) -> Source:
    """List what `source` holds, as the scan function of its kind does: one of KINDS, or "auto" for `kind_of(source)`.

    Args:
        split: of a manifest or a table. names: file with names of trajectories. root: where a manifest's paths start.
        captions: suffix of text files (images, tars), text column (table), or key of the metadata (manifest).
        conditions: "temperature:1,wind:3,wind_mag:1", of a manifest; "none" or "" for none.

    Raises:
        ValueError: an unknown kind, an option that this kind has no use for, or what the scan raises.
    """
    if kind != "auto" and kind not in KINDS:
        raise ValueError(f"kind: expected auto, {', '.join(KINDS)}, got {kind!r}")
    chosen = kind_of(source) if kind == "auto" else kind
    scan, known = KINDS[chosen]
    wanted = None if conditions in ("", "none") else conditions
    options = {"split": split, "names": names, "captions": captions, "conditions": wanted, "root": root}
    given = {name: value for name, value in options.items() if value is not None}
    for name in given:
        if name not in known:
            users = ", ".join(one for one, (_, options_of) in KINDS.items() if name in options_of)
            raise ValueError(
                f"{FLAGS[name]} {given[name]!r} means nothing for {os.fsdecode(source)!r}, which is of kind {chosen}; "
                f"it is for {users}. Leave it out, or say --kind if {chosen} is wrong"
            )
    return scan(source, **given)


def kind_of(source: str | os.PathLike[str]) -> str:
    """The first that fits:

    1. "manifest": a .json or .jsonl file.
    2. "tars": a .tar file, or a folder with .tar files and neither images nor tables at any depth.
    3. "table": a .parquet or .arrow file; a folder with dataset_info.json, state.json or dataset_dict.json;
       or a folder with .parquet or .arrow files and neither images nor tars at any depth.
    4. "trajectories": a folder with a folder that holds traj_data.pkl.
    5. "images": everything else.

    Raises:
        ValueError: a URL that cannot be opened or listed.
    """
    source = os.fsdecode(source)
    name = source.partition("::")[0].rstrip("/").lower()
    remote = "://" in source
    if remote or not os.path.isdir(source):
        if name.endswith((".json", ".jsonl")):
            return "manifest"
        if name.endswith((".tar", *COMPRESSED)):
            return "tars"
        if name.endswith(TABLE_SUFFIXES):
            return "table"
        if not remote:
            return "images"
    files = open_files(source)
    paths: Iterable[str] = _walk(source)
    if remote:
        try:
            paths = files.listing().keys.texts()
        except OSError as error:
            raise ValueError(f"{source!r} cannot be listed: {error}") from None
    held = _held(paths)
    if held == {"tars"}:
        return "tars"
    if held == {"table"} or any(files.exists(description) for description in DESCRIPTIONS):
        return "table"
    poses = any(p.count("/") == 1 and p.endswith(f"/{POSES}") for p in paths) if remote else holds_trajectories(source)
    return "trajectories" if poses else "images"


def _held(paths: Iterable[str]) -> set[str]:
    """Which of images, tars and tables are there; no further than it takes to know that it is more than one kind."""
    held = set()
    for path in paths:
        name = path.lower()
        if is_image(name):
            return {"images"}
        if name.endswith((".tar", *COMPRESSED)):
            held.add("tars")
        elif name.endswith(TABLE_SUFFIXES):
            held.add("table")
    return held


def _walk(root: str) -> Iterator[str]:
    """The files below a local folder, as they come; no hidden names, and every folder once, so that loops end."""
    pending, seen = [root], set()
    while pending:
        folder = pending.pop()
        try:
            status = os.stat(folder)
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(folder) as entries:
                found = [entry for entry in entries if not entry.name.startswith(".")]
        except OSError:  # the scan reports it
            continue
        for entry in found:
            if os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir():
                pending.append(entry.path)
            else:
                yield entry.path
