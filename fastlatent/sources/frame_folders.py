"""Frame folders: every folder of images is a clip, the images are its frames; local or behind a URL. Torch-free."""

from __future__ import annotations

import io
import os
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby

import numpy as np
import xxhash

from fastlatent.sources.columnar import BLOCK, ItemTable, Keys
from fastlatent.sources.experiment import natural_order
from fastlatent.sources.files import Files, Listing, open_files
from fastlatent.sources.image_folder import EXTENSIONS, IMAGES, VIDEO_EXTENSIONS, class_labels, list_folder
from fastlatent.sources.items import Item, Source

EXPECTED = "one sub-folder of images per clip, or such folders in one folder per class"


def scan_frame_folders(root: str | os.PathLike[str] | bytes) -> Source:
    """List the folders below `root`, a folder or a URL, that hold images themselves: each is a clip.

    A clip's key is the folder's path. With root/<clip>/… there are no classes; with root/<class>/<clip>/…, at any
    depth, classes are the root's sub-folders as in image folders. An item's bytes are an uncompressed tar made in
    memory, of its images by their file names in natural order (frame_2 before frame_10), without times and owners: a
    function of names and contents alone. size is the sum of the files' sizes; stamp changes when a name, a size or a
    time does, or when a frame is added or goes.

    Left out, with the reason: clips of which one frame cannot be read, or that hold two images of one stem (1.jpg and
    1.png: two frames, or one twice?), and folders that cannot be listed.

    Raises:
        ValueError: root is missing, no folder or cannot be listed; it holds images itself, clips both directly and in
            class folders, or no clip that can be used.
    """
    files = open_files(root)
    listing = list_folder(files, "frame", EXPECTED)
    images = listing.keys.ending(EXTENSIONS)
    picked = np.flatnonzero(images)
    frames = _Frames(files, listing.keys.select(picked), listing.size[picked], listing.stamp[picked])
    runs = frames.runs()
    left_out = _broken(listing)
    _check_levels(files, {*runs, *(left_out.keys() - listing.left_out.keys())})
    found: list[tuple[bytes, int, int]] = []
    for clip in runs.keys() - left_out.keys():
        names = frames.names(clip, runs[clip])
        if twice := _twice(names):
            left_out[clip] = f"two images of one stem: {twice[0]} and {twice[1]}; expected one for each frame"
        else:
            found.append((os.fsencode(clip), *frames.size_and_stamp(names, runs[clip])))
    others = [os.path.splitext(path)[1].lower() for path in listing.keys.select(np.flatnonzero(~images)).texts()]
    if not found:
        raise ValueError(_no_clip(files, left_out, others))
    found.sort()
    keys = Keys.of([clip for clip, _, _ in found])
    classes = [name for name in listing.folders if "/" not in name] if b"/" in found[0][0] else []
    table = ItemTable(
        keys,
        np.array([size for _, size, _ in found], np.uint64),
        np.array([stamp for _, _, stamp in found], np.int64),
        class_labels(keys, classes),
        files.place,
    )
    return Source(table, partial(_read, frames), classes, (), left_out, Counter(others))


@dataclass(frozen=True)
class _Frames:
    """Every image below the root. size, stamp: uint64 and int64 [N]."""

    files: Files
    keys: Keys
    size: np.ndarray
    stamp: np.ndarray

    def runs(self) -> dict[str, list[range]]:
        """Folder -> the numbers of the images that it holds itself: between them may lie those of its sub-folders."""
        runs: dict[str, list[range]] = {}
        start = 0
        for folder, group in groupby(self._folders()):
            end = start + sum(1 for _ in group)
            runs.setdefault(folder, []).append(range(start, end))
            start = end
        return runs

    def _folders(self) -> Iterator[str]:
        for start in range(0, len(self.keys), BLOCK):
            for path in self.keys.texts(start, min(start + BLOCK, len(self.keys))):
                yield path.rpartition("/")[0]

    def names(self, clip: str, runs: Sequence[range]) -> list[str]:
        """File names, sorted by their bytes."""
        return [path[len(clip) + 1 :] for run in runs for path in self.keys.texts(run.start, run.stop)]

    def size_and_stamp(self, names: Sequence[str], runs: Sequence[range]) -> tuple[int, int]:
        """The sum of the files' sizes, and a number of 63 bits made of names, sizes and stamps."""
        size, stamp = (np.concatenate([one[run.start : run.stop] for run in runs]) for one in (self.size, self.stamp))
        what = b"\0".join((os.fsencode("\0".join(names)), size.tobytes(), stamp.tobytes()))
        return int(size.sum()), xxhash.xxh3_64_intdigest(what) >> 1


def _read(frames: _Frames, item: Item) -> bytes:
    """All frames of the listing, or the error of the first that cannot be read."""
    start, end = (frames.keys.bisect(os.fsencode(item.key) + mark) for mark in (b"/", b"0"))  # "0" follows "/"
    below = [path[len(item.key) + 1 :] for path in frames.keys.texts(start, end)]
    names = sorted((name for name in below if "/" not in name), key=natural_order)
    assert names, item.key
    data = io.BytesIO()
    with tarfile.open(
        fileobj=data, mode="w", format=tarfile.GNU_FORMAT, encoding="utf-8", errors="surrogateescape"
    ) as archive:
        for name in names:
            image = _read_frame(frames.files, f"{item.key}/{name}")
            member = tarfile.TarInfo(name)  # of nobody, time 0
            member.size = len(image)
            archive.addfile(member, io.BytesIO(image))
    return data.getvalue()


def _read_frame(files: Files, path: str) -> bytes:
    try:
        return files.read(path)
    except (FileNotFoundError, PermissionError, IsADirectoryError) as error:  # fetch would name the folder alone
        raise ValueError(f"{files.place(path)} could not be read: {error.strerror or error}") from None


def _broken(listing: Listing) -> dict[str, str]:
    """Clips of which a frame cannot be read, and folders that cannot be listed -> why."""
    folders = set(listing.folders)
    broken: dict[str, str] = {}
    for path, why in sorted(listing.left_out.items()):
        folder, _, name = path.rpartition("/")
        if path in folders:
            broken[path] = why
        elif IMAGES.has(path):
            broken.setdefault(folder, f"its frame {name} {why}")
    return broken


def _twice(names: Sequence[str]) -> tuple[str, str] | None:
    """The first two of one stem, if there are such."""
    stems = [os.path.splitext(name)[0] for name in names]
    if len(set(stems)) == len(stems):
        return None
    first: dict[str, str] = {}
    for stem, name in zip(stems, names, strict=True):
        if first.setdefault(stem, name) != name:
            break
    return first[stem], name


def _check_levels(files: Files, clips: set[str]) -> None:
    """Clips that cannot be read are among them: classes must not come and go with a disk."""
    if "" in clips:
        raise ValueError(
            f"frame folder {files.root!r} holds images itself; expected {EXPECTED}. If they are the frames of one "
            "clip, give the folder above"
        )
    direct = sorted(clip for clip in clips if "/" not in clip)
    below = sorted(clip for clip in clips if "/" in clip)
    if direct and below:
        raise ValueError(
            f"frame folder {files.root!r} holds clips both directly ({direct[0]!r}) and in sub-folders ({below[0]!r}), "
            "so their classes are unclear; move the former into a class folder, or pass the sub-folders' root alone"
        )


def _no_clip(files: Files, left_out: dict[str, str], suffixes: Sequence[str]) -> str:
    first = min(left_out, default=None)
    if first is not None:
        return (
            f"frame folder {files.root!r} holds no clip that can be used: {len(left_out)} cannot; the first is "
            f"{first!r}: {left_out[first]}"
        )
    videos = "; it holds videos: --kind videos" if VIDEO_EXTENSIONS & set(suffixes) else ""
    return (
        f"frame folder {files.root!r} holds no image; looked for {' '.join(sorted(EXTENSIONS))} (any case) in all of "
        f"its sub-folders{videos}"
    )
