"""Image folders: `root/<class>/…/<image>`, or a flat folder of images without classes; local or behind a URL.

The order and the labels are those of torchvision's ImageFolder: classes are the sorted names of the root's
sub-folders, a label is an index into them. Torch-free.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

import numpy as np

from fastlatent.sources.columnar import ItemTable, Keys
from fastlatent.sources.files import MAX_TEXT, Files, Listing, open_files, read_each, read_text
from fastlatent.sources.items import RAGGED, Column, Item, Source

# Compared in lower case. The eight of ImageFolder, .tiff and .exr; what a file really holds is decided at decoding.
EXTENSIONS = frozenset((".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".exr"))
VIDEO_EXTENSIONS = frozenset((".mp4", ".webm", ".mkv", ".avi", ".mov", ".m4v", ".mpg", ".mpeg", ".ogv", ".ts"))
CAPTION = Column("caption", "U8", (RAGGED,))


@dataclass(frozen=True)
class Medium:
    """What a scan looks for.

    noun: what messages call one. suffixes: of its files, in lower case. other: what to do with `other_suffixes` where
    there is nothing but those.
    """

    noun: str
    suffixes: frozenset[str]
    other_suffixes: frozenset[str]
    other: str

    def has(self, path: str) -> bool:
        """Whether it is named like one."""
        return os.path.splitext(path)[1].lower() in self.suffixes

    def instead(self, suffixes: Iterable[str]) -> str:
        """The end of a message that says that there is none, given the suffixes of what is there; mostly ""."""
        return f"; it {self.other}" if self.other_suffixes & set(suffixes) else ""


IMAGES = Medium(
    "image", EXTENSIONS, VIDEO_EXTENSIONS, "holds videos: fastlatent encode --vae with a video VAE, or --teacher"
)
VIDEOS = Medium(
    "video", VIDEO_EXTENSIONS, EXTENSIONS, "holds images: frames of clips have to lie in one folder each, --kind frames"
)


def scan_image_folder(root: str | os.PathLike[str] | bytes, *, captions: str | None = None) -> Source:
    """List the images below `root`, a folder or a URL, without opening any of them.

    Every sub-folder of the root is a class, with or without images (a missing class must not shift the
    labels of the others); images count at any depth below it. A root with images of its own and none in
    sub-folders is flat. Names with a leading dot are ignored. Symbolic links are followed, except into a
    folder that the path already runs through. Links to nothing, files that may not be read and folders that cannot be
    listed are left out with the reason; pipes, sockets and devices are not listed.

    Args:
        captions: suffix of the text file beside each image: with "txt", a.txt is the caption of a.jpg, and of a.png. An
            image without one has the caption "".

    Raises:
        ValueError: root is missing, no folder or cannot be listed; it holds no image that can be read, or images both
            directly and in class folders; `captions` is no suffix of text files.
    """
    return scan_folder(root, IMAGES, captions)


def scan_folder(root: str | os.PathLike[str] | bytes, medium: Medium, captions: str | None) -> Source:
    """`scan_image_folder` for the files of any medium."""
    sidecar = caption_suffix(captions)
    files = open_files(root)
    listing = list_folder(
        files, medium.noun, f"one sub-folder of {medium.noun}s per class, or a folder of {medium.noun}s"
    )
    folders = set(listing.folders)
    left_out = {path: why for path, why in listing.left_out.items() if path in folders or medium.has(path)}
    classes = [name for name in listing.folders if "/" not in name]
    label = class_labels(listing.keys, classes)
    wanted = listing.keys.ending(medium.suffixes)
    direct, below = wanted & (label < 0), wanted & (label >= 0)
    if not _has_classes(files, medium, listing.keys, direct, below, set(left_out) - folders):
        classes, label = [], np.full(len(label), -1)
    good = np.flatnonzero(wanted)
    others = listing.keys.select(np.flatnonzero(~wanted)).texts()
    texts: dict[str, str] = {}
    if sidecar:
        texts, faults = _read_captions(files, listing, listing.keys.select(good).texts(), others, sidecar)
        if not texts and not faults:
            raise ValueError(
                f"captions {captions!r}: no {medium.noun} of {files.root!r} has a {sidecar} file of its stem beside it"
            )
        left_out |= faults
        good = good[[path not in faults for path in listing.keys.select(good).texts()]]
    if not len(good):
        raise ValueError(_nothing(files, medium, listing, left_out))
    keys = listing.keys.select(good)
    captions_of = [texts.get(_beside(key, sidecar), "") for key in keys.texts()] if sidecar else None
    return Source(
        ItemTable(keys, listing.size[good], listing.stamp[good], label[good], files.place, captions_of),
        partial(_read, files),
        classes,
        (CAPTION,) if sidecar else (),
        left_out,
        Counter(os.path.splitext(path)[1].lower() for path in others if path not in texts),
    )


def is_image(path: str) -> bool:
    """Whether it is named like an image."""
    return IMAGES.has(path)


def _read(files: Files, item: Item) -> bytes:
    return files.read(item.key)


def list_folder(files: Files, noun: str, expected: str) -> Listing:
    """Everything below the root.

    Raises:
        ValueError: it is no folder, or cannot be listed.
    """
    if not files.is_dir():
        problem = "is a file" if files.exists() else "does not exist"
        raise ValueError(f"{noun} folder {files.root!r} {problem}; expected a folder with {expected}")
    try:
        return files.listing()
    except OSError as error:
        raise ValueError(f"{noun} folder {files.root!r} cannot be listed: {error.strerror or error}") from None


def class_labels(keys: Keys, classes: list[str]) -> np.ndarray:
    """int64 [N]: the class whose folder a path begins with, -1 for what lies in the root itself."""
    label = np.full(len(keys), -1, np.int64)
    for i, name in enumerate(classes):
        folder = os.fsencode(name)
        label[keys.bisect(folder + b"/") : keys.bisect(folder + b"0")] = i  # "0" is the byte after "/"
    return label


def _has_classes(
    files: Files, medium: Medium, keys: Keys, direct: np.ndarray, below: np.ndarray, broken: set[str]
) -> bool:
    """Whether the files lie in class folders; what cannot be read counts like the rest."""
    in_root = [os.fsdecode(keys.raw(i)) for i in np.flatnonzero(direct)[:1]] + sorted(p for p in broken if "/" not in p)
    in_class = [os.fsdecode(keys.raw(i)) for i in np.flatnonzero(below)[:1]] + sorted(p for p in broken if "/" in p)
    if in_root and in_class:
        raise ValueError(
            f"{medium.noun} folder {files.root!r} holds {medium.noun}s both directly ({in_root[0]!r}) and in "
            f"sub-folders ({in_class[0]!r}), so their classes are unclear; move the former into a class folder, "
            "or pass the sub-folders' root alone"
        )
    return not in_root


def _nothing(files: Files, medium: Medium, listing: Listing, left_out: dict[str, str]) -> str:
    first = next(iter(sorted(left_out)), None)
    if first is not None:
        return (
            f"{medium.noun} folder {files.root!r} holds no {medium.noun} that can be read: {len(left_out)} cannot; "
            f"the first is {first!r}: {left_out[first]}"
        )
    count = sum("/" not in name for name in listing.folders)
    suffixes = {os.path.splitext(path)[1].lower() for path in listing.keys.texts()}
    return (
        f"{medium.noun} folder {files.root!r} holds no {medium.noun}; looked for {' '.join(sorted(medium.suffixes))} "
        f"(any case) in it and in its {count} sub-folders{medium.instead(suffixes)}"
    )


def caption_suffix(captions: str | None) -> str:
    """The suffix with its dot; "" of None."""
    if captions is None:
        return ""
    suffix = f".{captions.removeprefix('.')}"
    if suffix == "." or "/" in suffix or IMAGES.has(f"a{suffix}") or VIDEOS.has(f"a{suffix}"):
        raise ValueError(
            f"captions: expected the suffix of text files beside the images or videos, such as txt, got {captions!r}"
        )
    return suffix


def _beside(key: str, sidecar: str) -> str:
    return os.path.splitext(key)[0] + sidecar


def _read_captions(
    files: Files, listing: Listing, good: list[str], others: list[str], sidecar: str
) -> tuple[dict[str, str], dict[str, str]]:
    """The text of every sidecar that a file has; and the files whose sidecar cannot be used -> why."""
    there = {*others, *listing.left_out}
    wanted = sorted({_beside(one, sidecar) for one in good} & there, key=os.fsencode)
    texts: dict[str, str] = {}
    faults: dict[str, str] = {}
    for path, text in zip(wanted, read_each(wanted, partial(_read_caption, files, listing)), strict=True):
        if isinstance(text, str):
            texts[path] = text
        else:
            faults[path] = f"its caption {path}: {getattr(text, 'strerror', None) or text}"
    return texts, {one: faults[path] for one in good if (path := _beside(one, sidecar)) in faults}


def _read_caption(files: Files, listing: Listing, path: str) -> str:
    if path in listing.left_out:
        raise OSError(listing.left_out[path])
    return read_text(files.read_range(path, 0, MAX_TEXT + 1))
