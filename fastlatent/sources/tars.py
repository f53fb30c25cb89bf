"""WebDataset tars: `00000.tar` with a.jpg (or a.mp4), a.txt, a.cls, b.jpg …; local or behind a URL. Torch-free."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import takewhile

import numpy as np
import xxhash

from fastlatent.sources.columnar import ItemTable, Keys
from fastlatent.sources.files import MAX_TEXT, Files, Found, open_beside, open_files, read_each, read_text
from fastlatent.sources.image_folder import CAPTION, IMAGES, Medium, caption_suffix
from fastlatent.sources.items import Item, Source
from fastlatent.sources.tar_members import DamagedTar, Member, Window, members

COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")
MAX_CLASSES = 1 << 20
Place = str | os.PathLike[str]


@dataclass(frozen=True, slots=True)
class _Sample:
    """A file of an archive: its name and place there, and what comes with it. label -1, caption None: not given."""

    name: str
    offset: int
    size: int
    label: int
    caption: str | None


@dataclass
class _Contents:
    """What an archive holds; the names in `left_out` are those of members, "" stands for the archive itself."""

    samples: list[_Sample] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    ignored: Counter[str] = field(default_factory=Counter)


@dataclass
class _Parts:
    """One sample's members and their names, by suffix in lower case; and the bytes of those that are looked into."""

    members: dict[str, tuple[str, Member]] = field(default_factory=dict)
    texts: dict[str, bytes] = field(default_factory=dict)
    twice: str = ""


def scan_tars(root: Place | Sequence[Place], *, captions: str | None = None, medium: Medium = IMAGES) -> Source:
    """List the images in uncompressed tars, reading headers, captions and labels only.

    A sample is the members of a tar whose names agree up to the first dot of the last part: a.jpg, a.txt, a.cls. Its
    image is the member with an image's suffix (where there are several, the one whose whole suffix it is: a.jpg, not
    a.mask.png); its label the whole number in .cls, so that classes are called "0", "1" … up to the largest. An item's
    key is "<tar>/<member>", the tar's path being relative to the folder of all. Members with hidden names and folders
    are passed over; samples with two images or a member twice, links, names that lead out of the archive, and what is
    cut off with the archive's end are left out, with the reason.

    Args:
        root: a folder with *.tar at any depth, one tar, or several; paths, or URLs of one file system.
        captions: suffix of the text members (txt), or a key of .json members. None: no captions.
        medium: VIDEOS takes the videos instead, by the same rules.

    Raises:
        ValueError: nothing there, a compressed tar, no image that can be read, no caption where `captions` is given.
    """
    captions = caption_suffix(captions).removeprefix(".") or None
    files, archives, left_out, ignored = _archives(root)
    by_path = {one.path: one for one in archives}
    found: list[tuple[bytes, str, _Sample]] = []
    for path, contents in zip(
        by_path, read_each(by_path, partial(_look, files, by_path, captions, medium)), strict=True
    ):
        if isinstance(contents, OSError):
            left_out[path] = f"cannot be read: {contents.strerror or contents}"
        elif isinstance(contents, Exception):
            raise ValueError(f"{files.place(path)}: {contents}")
        else:
            left_out |= {f"{path}/{name}" if name else path: why for name, why in contents.left_out.items()}
            ignored += contents.ignored
            found += [(os.fsencode(f"{path}/{one.name}"), path, one) for one in contents.samples]
    if not found:
        first = next((f"; the first of what was left out is {name!r}: {why}" for name, why in left_out.items()), "")
        first += medium.instead(ignored)
        raise ValueError(f"{_shown(root)}: no {medium.noun} in {len(archives)} tars{first}")
    found.sort(key=lambda one: one[0])
    return _source(files, by_path, found, captions, left_out, ignored, medium.noun)


def _source(
    files: Files,
    by_path: dict[str, Found],
    found: list[tuple[bytes, str, _Sample]],
    captions: str | None,
    left_out: dict[str, str],
    ignored: Counter[str],
    noun: str,
) -> Source:
    samples = [one for _, _, one in found]
    label = np.array([one.label for one in samples], np.int64)
    with_text = any(one.caption is not None for one in samples)
    if captions is not None and not with_text:
        raise ValueError(
            f"captions {captions!r}: no {noun} of {files.root!r} has such a member, or such a key in .json"
        )
    table = ItemTable(
        Keys.of([key for key, _, _ in found]),
        np.array([one.size for one in samples], np.uint64),
        np.array([_stamp(by_path[path], one) for _, path, one in found], np.int64),
        label,
        files.place,
        [one.caption or "" for one in samples] if with_text else None,
    )
    numbers = {path: i for i, path in enumerate(by_path)}
    archive = np.array([numbers[path] for _, path, _ in found], np.int64)
    reader = _Reader(files, list(by_path), table.keys, archive, np.array([one.offset for one in samples], np.int64))
    classes = [str(i) for i in range(int(label.max()) + 1)]
    return Source(table, reader, classes, (CAPTION,) if with_text else (), left_out, ignored)


@dataclass(frozen=True)
class _Reader:
    """Source.read. archive, offset: int64 [N], of the items in key order."""

    files: Files
    archives: list[str]
    keys: Keys
    archive: np.ndarray
    offset: np.ndarray

    def __call__(self, item: Item) -> bytes:
        i = self.keys.find(item.key)
        if i < 0:
            raise ValueError(f"{item.key!r}: expected an item of this source")
        path = self.archives[self.archive[i]]
        data = self.files.read_range(path, int(self.offset[i]), item.size)
        if len(data) != item.size:
            raise ValueError(
                f"{item.place}: expected {item.size} bytes, got {len(data)}: the tar was cut since the scan"
            )
        return data


def _stamp(archive: Found, sample: _Sample) -> int:
    what = f"{archive.size} {archive.stamp} {sample.offset} {sample.size}"
    return xxhash.xxh3_64_intdigest(what.encode()) >> 1


def _shown(root: Place | Sequence[Place]) -> str:
    return os.fspath(root) if isinstance(root, str | os.PathLike) else ", ".join(os.fspath(one) for one in root[:3])


def _archives(root: Place | Sequence[Place]) -> tuple[Files, list[Found], dict[str, str], Counter[str]]:
    """The tars, sorted by bytes; those that cannot be read -> why; other files of a folder by suffix."""
    if not isinstance(root, str | os.PathLike):
        return *_several([os.fspath(one) for one in root]), {}, Counter()
    files = open_files(root)
    if not files.exists():
        raise ValueError(f"{files.root!r} does not exist; expected a tar, or a folder of *.tar")
    if not files.is_dir():
        return *_several([os.fspath(root)]), {}, Counter()
    listing = files.listing()
    compressed = [path for path in listing.keys.texts() if path.lower().endswith(COMPRESSED)]
    if compressed:
        raise ValueError(
            f"{files.place(compressed[0])}: expected uncompressed tars: the members of a compressed one cannot be read "
            "one by one. Uncompress it; the images or videos in it are compressed already"
        )
    found = [one for one in listing if one.path.lower().endswith(".tar")]
    left_out = {path: why for path, why in listing.left_out.items() if path.lower().endswith(".tar")}
    if not found:
        first = next((f"; the first that cannot be used is {name!r}: {why}" for name, why in left_out.items()), "")
        raise ValueError(f"{files.root!r}: expected a folder of *.tar, got none{first}")
    others = (one.path for one in listing if not one.path.lower().endswith(".tar"))
    return files, found, left_out, Counter(os.path.splitext(path)[1].lower() for path in others)


def _several(places: list[str]) -> tuple[Files, list[Found]]:
    """Tars given by name; keys are relative to the deepest folder that holds them all."""
    if not places:
        raise ValueError("expected one tar or more, got none")
    if len(places) == 1:
        files, name = open_beside(places[0])
        return files, [_stat(files, name)]
    parts = [(one if "://" in one else os.path.abspath(one)).split("/") for one in places]
    levels = zip(*(one[:-1] for one in parts), strict=False)
    shared = sum(1 for _ in takewhile(lambda level: len(set(level)) == 1, levels))
    below = sorted({"/".join(one[shared:]) for one in parts}, key=os.fsencode)
    if len(below) < len(places) or shared < (3 if "://" in places[0] else 1):  # "s3:", "", "bucket"
        raise ValueError(f"expected tars, each once, below one folder or bucket, got {places[:5]}")
    files = open_files("/".join(parts[0][:shared]) or "/")
    return files, [_stat(files, path) for path in below]


def _stat(files: Files, path: str) -> Found:
    try:
        return files.stat(path)
    except OSError as error:
        raise ValueError(f"{files.place(path)}: expected a tar, got: {error.strerror or error}") from None


def _look(files: Files, archives: dict[str, Found], captions: str | None, medium: Medium, path: str) -> _Contents:
    """Index one archive.

    Raises:
        OSError: it cannot be read. ValueError: it is compressed.
    """
    window = Window(partial(files.read_range, path), archives[path].size, files.gap)
    looked_into = {"cls"} if captions is None else {captions.lower(), "json", "cls"}
    contents = _Contents()
    samples: dict[str, _Parts] = {}
    last = ""
    try:
        for member in members(window):
            name = member.name
            while name.startswith("./"):
                name = name[2:]
            why = _unusable(name, member)
            if why:
                contents.left_out[name] = why
            if why is not None:
                continue
            folder, slash, base = name.rpartition("/")
            stem, _, suffix = base.partition(".")
            last, suffix = folder + slash + stem, suffix.lower()
            parts = samples.setdefault(last, _Parts())
            if suffix in parts.members:
                parts.twice = name
            parts.members[suffix] = name, member
            if suffix in looked_into:
                parts.texts[suffix] = window.read(member.offset, min(member.size, MAX_TEXT + 1))
    except DamagedTar as error:
        contents.left_out[""] = f"{error}; what comes before is used" if samples else str(error)
        for name in _wanted(samples.get(last, _Parts()), medium):
            contents.left_out[name] = "its tar cannot be read on from here, and may hold more of this sample"
        samples.pop(last, None)
    for parts in samples.values():
        _add(contents, parts, captions, medium)
    return contents


def _unusable(name: str, member: Member) -> str | None:
    """Why a member cannot be part of a sample; "" where it is none and nobody misses it, None where it can."""
    parts = name.split("/")
    if member.kind == "a folder":
        return ""
    if name.startswith("/") or ".." in parts or "" in parts:
        return "its name leads out of the archive: expected a relative path"
    if any(part.startswith(".") for part in parts):
        return ""
    return f"{member.kind}: expected a file" if member.kind else None


def _wanted(parts: _Parts, medium: Medium) -> list[str]:
    whole = [name for suffix, (name, _) in parts.members.items() if f".{suffix}" in medium.suffixes]
    return whole or [name for name, _ in parts.members.values() if medium.has(name)]


def _add(contents: _Contents, parts: _Parts, captions: str | None, medium: Medium) -> None:
    wanted = _wanted(parts, medium)
    try:
        if wanted and parts.twice:
            raise ValueError(f"{parts.twice} is in its tar twice")
        if len(wanted) > 1:
            raise ValueError(f"one sample of {len(wanted)} {medium.noun}s: {', '.join(wanted)}")
        label, caption = class_label(parts.texts.get("cls")), _caption(parts, captions)
    except ValueError as error:
        contents.left_out |= dict.fromkeys(wanted, str(error))
        return
    used = {"cls", *([captions.lower(), "json"] if captions else [])} if wanted else set()
    for suffix, (name, member) in parts.members.items():
        if name in wanted:
            contents.samples.append(_Sample(name, member.offset, member.size, label, caption))
        elif suffix not in used:
            contents.ignored[os.path.splitext(name)[1].lower()] += 1


def class_label(data: bytes | None) -> int:
    """What a sample's .cls says, −1 of none. ValueError: it is no number of a class."""
    if data is None:
        return -1
    text = data[:100].strip()
    if not text.isdigit() or len(text) > 9 or int(text) >= MAX_CLASSES:
        raise ValueError(f"its .cls: expected a whole number from 0 to {MAX_CLASSES - 1}, got {text!r:.50}")
    return int(text)


def _caption(parts: _Parts, captions: str | None) -> str | None:
    if captions is None:
        return None
    try:
        if captions.lower() in parts.texts:
            return read_text(parts.texts[captions.lower()])
        if "json" not in parts.texts:
            return None
        values = json.loads(read_text(parts.texts["json"]))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its caption: {error}") from None
    value = values.get(captions) if isinstance(values, dict) else values
    if value is not None and not isinstance(value, str):
        raise ValueError(f"its caption: expected a text as {captions!r} of its .json, got {value!r:.50}")
    if value is not None and any("\ud800" <= letter <= "\udfff" for letter in value):
        raise ValueError(f"its caption: expected Unicode text, got half of a surrogate pair in {value!a:.50}")
    return None if value is None else value.strip()
