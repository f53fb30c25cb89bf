"""A source from its path or URL alone. Torch-free."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from functools import partial

from fastlatent.sources.arrow_files import SUFFIXES as TABLE_SUFFIXES
from fastlatent.sources.files import Files, open_files
from fastlatent.sources.frame_folders import scan_frame_folders
from fastlatent.sources.image_folder import EXTENSIONS, VIDEO_EXTENSIONS, VIDEOS, is_image, scan_image_folder
from fastlatent.sources.items import Source
from fastlatent.sources.manifest import scan_manifest
from fastlatent.sources.ssv2 import SPLITS, list_paths, scan_ssv2
from fastlatent.sources.tables import DESCRIPTIONS, scan_table
from fastlatent.sources.tars import COMPRESSED, scan_tars
from fastlatent.sources.trajectories import POSES, holds_trajectories, scan_trajectories
from fastlatent.sources.video_folder import scan_video_folder

# medium -> kind -> how to scan it, and the options it knows
KINDS: dict[str, dict[str, tuple[Callable[..., Source], tuple[str, ...]]]] = {
    "images": {
        "manifest": (scan_manifest, ("split", "captions", "conditions", "root")),
        "tars": (scan_tars, ("captions",)),
        "table": (scan_table, ("split", "captions")),
        "trajectories": (scan_trajectories, ("names",)),
        "images": (scan_image_folder, ("captions",)),
    },
    "videos": {
        "ssv2": (scan_ssv2, ("split",)),
        "tars": (partial(scan_tars, medium=VIDEOS), ("captions",)),
        "videos": (scan_video_folder, ("captions",)),
        "frames": (scan_frame_folders, ()),
    },
}


# What the command line calls the options.
FLAGS = {
    "split": "--split", "names": "--trajectories", "captions": "--captions", "conditions": "--condition-spec",
    "root": "--manifest-root",
}  # fmt: skip


def open_source(
    source: str | os.PathLike[str],
    *,
    media: str = "images",
    kind: str = "auto",
    split: str | None = None,
    names: str | os.PathLike[str] | None = None,
    captions: str | None = None,
    conditions: str = "none",
    root: str | None = None,
) -> Source:
    """List what `source` holds, as the scan function of its kind does: one of KINDS[media], or "auto" for
    `kind_of(source, media)`.

    Args:
        media: "images" or "videos".
        split: of a manifest, a table or ssv2. names: file with names of trajectories. root: where a manifest's paths
            start.
        captions: suffix of text files (images, videos, tars), text column (table), or key of the metadata (manifest).
        conditions: "temperature:1,wind:3,wind_mag:1", of a manifest; "none" or "" for none.

    Raises:
        ValueError: a kind that this medium does not have, an option that this kind has no use for, or what the scan
            raises.
    """
    assert media in KINDS, media
    kinds = KINDS[media]
    if kind != "auto" and kind not in kinds:
        raise ValueError(f"kind: expected auto, {', '.join(kinds)} for {media}, got {kind!r}")
    chosen = kind_of(source, media) if kind == "auto" else kind
    scan, known = kinds[chosen]
    wanted = None if conditions in ("", "none") else conditions
    options = {"split": split, "names": names, "captions": captions, "conditions": wanted, "root": root}
    given = {name: value for name, value in options.items() if value is not None}
    for name in given:
        if name not in known:
            path = os.fsdecode(source)
            if "://" not in path and not os.path.exists(path):  # what kind it is of was told by its name
                raise ValueError(f"{path!r} does not exist")
            users = (
                ", ".join(one for one, (_, options_of) in kinds.items() if name in options_of) or "sources of images"
            )
            raise ValueError(
                f"{FLAGS[name]} {given[name]!r} means nothing for {os.fsdecode(source)!r}, which is of kind {chosen}; "
                f"it is for {users}. Leave it out, or say --kind if {chosen} is wrong"
            )
    return scan(source, **given)


def kind_of(source: str | os.PathLike[str], media: str = "images") -> str:
    """The first that fits; of images:

    1. "manifest": a .json or .jsonl file.
    2. "tars": a .tar file, or a folder with .tar files and neither images nor tables at any depth.
    3. "table": a .parquet or .arrow file; a folder with dataset_info.json, state.json or dataset_dict.json;
       or a folder with .parquet or .arrow files and neither images nor tars at any depth.
    4. "trajectories": a folder with a folder that holds traj_data.pkl.
    5. "images": everything else.

    Of videos:

    1. "tars": a .tar file.
    2. "ssv2": a folder with one of the lists of Something-Something V2.
    3. "videos": a folder with videos at any depth; or no folder at all.
    4. "tars": a folder with .tar files at any depth.
    5. "frames": a folder with images at any depth.

    Raises:
        ValueError: a URL that cannot be opened or listed; a source without videos.
    """
    source = os.fsdecode(source)
    if media == "videos":
        return _kind_of_videos(source)
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


def _kind_of_videos(source: str) -> str:
    name = source.partition("::")[0].rstrip("/").lower()
    files = open_files(source)
    if not files.is_dir():
        if name.endswith((".tar", *COMPRESSED)):
            return "tars"
        if name.endswith((".json", ".jsonl", *TABLE_SUFFIXES)):
            raise _no_videos(files, "manifests and tables are of images")
        return "videos"
    try:
        listing = files.listing()
    except OSError as error:
        raise ValueError(f"{source!r} cannot be listed: {error.strerror or error}") from None
    keys = listing.keys
    if any(keys.find(path) >= 0 for split in SPLITS for path in list_paths(split)):
        return "ssv2"
    for kind, suffixes in ("videos", VIDEO_EXTENSIONS), ("tars", (".tar", *COMPRESSED)), ("frames", EXTENSIONS):
        if keys.ending(suffixes).any():
            return kind
    if listing.left_out:
        return "videos"  # whose scan says why they cannot be read
    raise _no_videos(files, f"none of the {len(keys):,} files below it is one")


def _no_videos(files: Files, why: str) -> ValueError:
    return ValueError(
        f"{files.root!r}: expected videos, and {why}. Videos come as a folder of videos "
        f"({' '.join(sorted(VIDEO_EXTENSIONS))}), Something-Something V2 with its lists, folders of frames, or tars"
    )


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
