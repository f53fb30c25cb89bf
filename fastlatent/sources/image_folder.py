"""Image folders: `root/<class>/…/<image>`, or a flat folder of images without classes.

The order and the labels are those of torchvision's ImageFolder: classes are the sorted names of the root's
sub-folders, a label is an index into them. Torch-free.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

# Compared in lower case. The eight of ImageFolder and .tiff; what a file really holds is decided at decoding.
EXTENSIONS = frozenset((".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"))


@dataclass(frozen=True, slots=True)
class Item:
    """One image.

    key: path below the root with "/" between folders. Bytes of a name that are no UTF-8 appear as surrogates
        (os.fsdecode), so os.fsencode(key) gives the name's exact bytes back.
    path: what to open; it starts with the root as the caller wrote it.
    label: index into ImageFolder.classes, -1 in a flat folder.
    """

    key: str
    path: str
    label: int


@dataclass(frozen=True, slots=True)
class ImageFolder:
    """All images below a root. items: sorted by the bytes of their keys. classes: [] for a flat folder."""

    items: list[Item]
    classes: list[str]


def scan_image_folder(root: str | os.PathLike[str]) -> ImageFolder:
    """List the images below `root` without opening any of them.

    Every sub-folder of the root is a class, with or without images (a missing class must not shift the
    labels of the others); images count at any depth below it. A root with images of its own and none in
    sub-folders is flat. Names with a leading dot are ignored. Symbolic links are followed, except into a
    folder that the path already runs through. A link to nothing is listed if its name is an image's, so that
    reading it reports it; pipes, sockets and devices are not listed.

    Raises:
        ValueError: root is missing or no folder, holds no image at all, or holds images both directly and in
            class folders.
        OSError: a folder below the root cannot be listed.
    """
    root = os.fsdecode(root)
    if not os.path.isdir(root):
        problem = "is a file" if os.path.exists(root) else "does not exist"
        raise ValueError(
            f"image folder {root!r} {problem}; expected a folder with one sub-folder of images per class, "
            "or a folder of images"
        )
    images, folders, identity = _list_folder(root, ())
    classes = sorted(folders, key=os.fsencode)
    items = []
    for label, name in enumerate(classes):
        items += _walk(os.path.join(root, name), name, label, identity)
    if images and items:
        raise ValueError(
            f"image folder {root!r} holds images both directly ({images[0]!r}) and in sub-folders "
            f"({items[0].key!r}), so their classes are unclear; move the former into a class folder, "
            "or pass the sub-folders' root alone"
        )
    if images:
        classes = []
        items = [Item(name, os.path.join(root, name), -1) for name in images]
    if not items:
        raise ValueError(
            f"image folder {root!r} holds no image; looked for {' '.join(sorted(EXTENSIONS))} (any case) "
            f"in it and in its {len(classes)} sub-folders"
        )
    items.sort(key=lambda item: os.fsencode(item.key))
    return ImageFolder(items, classes)


def _walk(path: str, key: str, label: int, ancestors: tuple[tuple[int, int], ...]) -> list[Item]:
    items = []
    # A list, not recursion: a path of 4096 bytes has room for 2048 levels, Python's stack for 1000.
    pending = [(path, key, ancestors)]
    while pending:
        path, key, ancestors = pending.pop()
        images, folders, chain = _list_folder(path, ancestors)
        items += [Item(f"{key}/{name}", os.path.join(path, name), label) for name in images]
        pending += [(os.path.join(path, name), f"{key}/{name}", chain) for name in folders]
    return items


def _list_folder(
    path: str, ancestors: tuple[tuple[int, int], ...]
) -> tuple[list[str], list[str], tuple[tuple[int, int], ...]]:
    """The names of a folder's images and of its folders, and its chain of (device, inode) from the root on;
    empty lists if the folder is its own ancestor."""
    status = os.stat(path)
    identity = (status.st_dev, status.st_ino)
    if identity in ancestors:
        return [], [], ancestors
    images, folders = [], []
    with os.scandir(path) as entries:
        for entry in entries:
            name = entry.name
            if name.startswith("."):
                continue
            if _is_folder(entry):
                folders.append(name)
            elif os.path.splitext(name)[1].lower() in EXTENSIONS and _is_file_or_broken_link(entry):
                images.append(name)
    return images, folders, (*ancestors, identity)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    # os.path.isdir is False for a link that leads round to itself, where DirEntry.is_dir raises (ELOOP).
    return os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()


def _is_file_or_broken_link(entry: os.DirEntry[str]) -> bool:
    if entry.is_symlink():
        return os.path.isfile(entry.path) or not os.path.exists(entry.path)
    return entry.is_file()
