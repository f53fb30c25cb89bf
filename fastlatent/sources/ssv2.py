"""Something-Something V2: lists of clip ids beside a folder of `<id>.webm`; local or behind a URL. Torch-free."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np

from fastlatent.sources.columnar import ItemTable, Keys
from fastlatent.sources.files import Files, Listing, LocalFiles, open_files
from fastlatent.sources.image_folder import list_folder
from fastlatent.sources.items import Item, Source

SPLITS = ("train", "validation", "test")
LIST_FOLDERS = ("", "annotations/", "labels/")
LIST_NAMES = ("{}.json", "something-something-v2-{}.json")
# Where the videos are: there, or, but for the root, in sub-folders of one level.
VIDEO_FOLDERS = ("", "videos", "something-something-v2", "20bn-something-something-v2")
VIDEO_SUFFIXES = (".webm", ".mp4", ".mkv")
LAYOUT = (
    "the lists train.json, validation.json, test.json (in it, in annotations/ or labels/) and the videos ID.webm "
    "(in it, in videos/, something-something-v2/ or 20bn-something-something-v2/)"
)


def list_paths(name: str) -> list[str]:
    """Where the list of a split, or "labels", may lie below the root."""
    return [folder + form.format(name) for folder in LIST_FOLDERS for form in LIST_NAMES]


def scan_ssv2(root: str | os.PathLike[str] | bytes, *, split: str | None = None) -> Source:
    """List the clips of a split, without opening any of them.

    Its list is JSON: [{"id": "78687", "template": "Putting [something] on [something]", …}, …], or ids alone, as text
    or numbers. An item's key is its id; its label the index that labels.json, {"Putting something on something": 0, …},
    gives its template without the brackets, -1 where there is no template. Ids whose video is missing or cannot be read
    are in left_out, by id. remarks say where labels are missing otherwise.

    Raises:
        ValueError: `split` is none of SPLITS, or has no list; a list or labels.json is damaged (with its path, the
            entry's number, and the way out), an id is no file's name, or occurs twice; an id has two videos; there is
            no video at all.
    """
    if split not in SPLITS:
        got = "none" if split is None else f"{split!r}: say validation" if split == "val" else repr(split)
        raise ValueError(f"--split: expected {', '.join(SPLITS)} of Something-Something V2, got {got}")
    files = open_files(root)
    listing = list_folder(files, "Something-Something V2", LAYOUT)
    path = _list(files, listing, split)
    if path is None:
        there = [one for one in SPLITS if any(listing.keys.find(place) >= 0 for place in list_paths(one))]
        raise ValueError(
            f"{files.root!r} has no list of split {split!r}, but of {' and '.join(there) or 'none'}; looked for "
            f"{', '.join(list_paths(split))}. If this is no Something-Something V2, say --kind"
        )
    entries = _entries(files.place(path), _read_json(files, path))
    videos, broken = _videos(files, listing, entries)
    if not videos:
        first = next(iter(entries))
        why = broken.get(first, f"looked for {first} with {', '.join(VIDEO_SUFFIXES)} in {_looked_in()}")
        raise ValueError(
            f"{files.root!r} holds no video of the {len(entries):,} ids in {path} that can be read; the first is "
            f"{first!r}: {why}"
        )
    missing = f"no video of this name ({', '.join(VIDEO_SUFFIXES)}) in {_looked_in()}"
    left_out = {one: listing.left_out[one] for one in listing.left_out.keys() & listing.folders if _may_hold(one)}
    left_out |= {one: broken.get(one, missing) for one in entries if one not in videos}
    classes = _classes(files, listing)
    ids = sorted(videos, key=os.fsencode)
    label, remarks = _labels(ids, entries, {name: i for i, name in enumerate(classes)})
    number = np.array([videos[one][1] for one in ids], np.int64)
    paths = {one: videos[one][0] for one in ids}
    table = ItemTable(
        Keys.of([os.fsencode(one) for one in ids]),
        listing.size[number],
        listing.stamp[number],
        label,
        partial(_place, files, paths),
    )
    return Source(table, partial(_read, files, paths), classes, (), left_out, remarks=remarks)


def _place(files: Files, paths: Mapping[str, str], key: str) -> str:
    return files.place(paths[key])


def _read(files: Files, paths: Mapping[str, str], item: Item) -> bytes:
    return files.read(paths[item.key])


def _list(files: Files, listing: Listing, name: str) -> str | None:
    """The path of the list of that name, None where there is none.

    Raises:
        ValueError: there are two with different contents, or it cannot be read.
    """
    for path in list_paths(name):
        if path in listing.left_out:
            raise ValueError(f"{files.place(path)}: {listing.left_out[path]}")
    there = [path for path in list_paths(name) if listing.keys.find(path) >= 0]
    if len(there) > 1 and any(_read_json(files, path) != _read_json(files, there[0]) for path in there[1:]):
        raise ValueError(f"{files.root!r} has {len(there)} different lists {' and '.join(there)}; leave one there")
    return there[0] if there else None


def _read_json(files: Files, path: str) -> Any:
    try:
        return json.loads(files.read(path).decode("utf-8-sig"))
    except OSError as error:
        raise ValueError(f"{files.place(path)} cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{files.place(path)} is not JSON: {error}; take the list from the download again") from None


def _entries(place: str, values: Any) -> dict[str, str]:
    """Id -> template without brackets, "" for none; in the list's order."""
    if not isinstance(values, list) or not values:
        got = "an empty list" if values == [] else f"a JSON {type(values).__name__}"
        raise ValueError(
            f'{place}: expected a list of {{"id": "78687", …}} or of ids, got {got}. If this is no Something-Something '
            "V2, say --kind videos"
        )
    entries: dict[str, str] = {}
    for number, value in enumerate(values, 1):
        given, template = (value.get("id"), value.get("template")) if isinstance(value, dict) else (value, None)
        name = str(given) if type(given) is int else given
        if not isinstance(name, str) or not _is_name(name):
            raise ValueError(
                f"{place}, entry {number}: expected an id, such as 78687, that is a file's name, got {_shown(value)}; "
                "mend the entry, or take it out"
            )
        if name in entries:
            raise ValueError(
                f"{place}, entry {number}: its id {name!r} is that of entry {list(entries).index(name) + 1} too; take "
                "one of them out"
            )
        if template is not None and not isinstance(template, str):
            raise ValueError(f"{place}, entry {number}: expected a text as its template, got {_shown(template)}")
        entries[name] = (template or "").replace("[", "").replace("]", "")
    return entries


def _is_name(name: str) -> bool:
    """Whether it can be the stem of a visible file."""
    if name.isascii() and name.isalnum():
        return True
    return name != "" and name[0] != "." and not any(c in "/\0" or "\ud800" <= c <= "\udfff" for c in name)


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:60]} …"


def _looked_in() -> str:
    return ", ".join(f"{folder}/" if folder else "the root" for folder in VIDEO_FOLDERS)


def _may_hold(folder: str) -> bool:
    """Whether videos in this folder count."""
    return folder in VIDEO_FOLDERS or os.path.dirname(folder) in VIDEO_FOLDERS[1:]


def _videos(
    files: Files, listing: Listing, entries: Mapping[str, str]
) -> tuple[dict[str, tuple[str, int]], dict[str, str]]:
    """Id -> path of its video and number of that in the listing; id -> why its video cannot be read."""
    numbers = np.flatnonzero(listing.keys.ending(VIDEO_SUFFIXES))
    paths = listing.keys.select(numbers).texts()
    videos: dict[str, tuple[str, int]] = {}
    for path, name, number in zip(paths, _names(paths), numbers.tolist(), strict=True):
        if name not in entries:
            continue
        first, _ = videos.setdefault(name, (path, number))
        if first != path and not _same_file(files, first, path):
            raise ValueError(f"{files.root!r} has two videos of id {name!r}: {first} and {path}; leave one there")
    broken = [path for path in listing.left_out if path.lower().endswith(VIDEO_SUFFIXES)]
    why = (f"{path} {listing.left_out[path]}" for path in broken)
    return videos, dict(zip(_names(broken), why, strict=True))


def _names(paths: list[str]) -> Iterator[str]:
    """The id of each video; "", which is no id, where it lies in a folder that does not count."""
    counts: dict[str, bool] = {}
    for path in paths:
        folder, _, name = path.rpartition("/")
        if folder not in counts:
            counts[folder] = _may_hold(folder)
        yield name.rpartition(".")[0] if counts[folder] else ""


def _same_file(files: Files, first: str, second: str) -> bool:
    return isinstance(files, LocalFiles) and os.path.samefile(files.place(first), files.place(second))


def _classes(files: Files, listing: Listing) -> list[str]:
    """The templates of labels.json in the order of their indices; [] without one."""
    path = _list(files, listing, "labels")
    if path is None:
        return []
    values = _read_json(files, path)
    index: dict[int, str] = {}
    if isinstance(values, dict):
        for template, i in values.items():
            if type(i) is int or (isinstance(i, str) and i.isascii() and i.isdigit() and len(i) < 10):
                index[int(i)] = template
    if not index or len(index) != len(values) or sorted(index) != list(range(len(index))):
        raise ValueError(
            f'{files.place(path)}: expected {{"Putting something on something": 0, …}}, every index from 0 on once, '
            f"got {_shown(values)}; mend it, or take it away to have no labels"
        )
    return [index[i] for i in range(len(index))]


def _labels(ids: list[str], entries: Mapping[str, str], index: Mapping[str, int]) -> tuple[np.ndarray, tuple[str, ...]]:
    """int64 [N], and remarks."""
    label = np.array([index.get(entries[one], -1) for one in ids], np.int64)
    without = [ids[i] for i in np.flatnonzero(label < 0) if entries[ids[i]]]
    if not without:
        return label, ()
    why = f"labels.json has no {entries[without[0]]!r}" if index else "there is no labels.json"
    return label, (f"{len(without):,} of {len(ids):,} clips have no label: {why} (clip {without[0]})",)
