"""A teacher's tokens: `[<split>/]<video_id>.pt`, a matrix (n, D) in each file, and metadata.json beside them.

n may differ from video to video. metadata.json (a list of ids, or an object with one, called as in IDS) says which
videos there should be; it came last, so caches that were interrupted have none. It does not say which teacher, frames
or crop it was, so a converted cache is read by LatentDataset; CachedSSv2Dataset asks for the teacher's identity.

Round trip: equal matrices under equal names; ids and counts in metadata.json are those of the rows.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastlatent.caches.cache import Cache, CacheItem, CacheRow, DamagedEntry, Told, check_row
from fastlatent.caches.mar import ignored
from fastlatent.caches.outgoing import Outgoing, put, target
from fastlatent.caches.pt_files import SUFFIX, LatentReader, kinds, looks, own_files
from fastlatent.data.array_files import pt_bytes, to_tensor
from fastlatent.sources.files import Files, Found
from fastlatent.store.files import parse_json
from fastlatent.store.records import RAGGED

TITLE = "teacher's tokens: [<split>/]<video_id>.pt of matrices (n, D), with metadata.json"
PAYLOADS = ("tokens",)
SCALING = (1.0, 0.0)
METADATA = "metadata.json"
MAX_METADATA = 64 << 20
MAX_KEPT = 1 << 20  # of a metadata.json that is kept whole; of larger ones the list of ids is made anew
IDS = ("video_ids", "ids", "videos", "samples")
COUNTS = ("num_videos", "num_samples", "num_cached", "total", "count")


def claims(files: Files, found: Sequence[Found]) -> int:
    return kinds(files, found)["tokens"]


def open_cache(files: Files, found: Sequence[Found], told: Told) -> Cache:
    own = own_files(found)
    seen = looks(files, own)
    good = [one for one in seen if one is not None and len(one.shape) == 2]
    if not good:
        raise ValueError(
            f"{files.root}: expected <video_id>.pt with a matrix (n, D) in each, got none that can be read"
        )
    (width, dtype), _ = Counter((one.shape[1], one.dtype) for one in good).most_common(1)[0]
    lengths = {one.shape[0] for one in good if (one.shape[1], one.dtype) == (width, dtype)}
    length = lengths.pop() if len(lengths) == 1 else RAGGED
    matrices = LatentReader()

    def row(item: CacheItem, data: bytes) -> CacheRow:
        values, _ = matrices.read(data)
        if values.ndim != 3:
            raise DamagedEntry(f"expected a matrix (n, D), got {list(values.shape[1:])}")
        tokens = values.shape[1] if length == RAGGED else length
        return CacheRow(check_row(values, (1, tokens, width), dtype))

    items = [
        CacheItem(one.path.removesuffix(SUFFIX), files.place(one.path), one.size, one.stamp) for one in own
    ]  # fmt: skip
    items.sort(key=lambda item: os.fsencode(item.key))
    read = _read_metadata(files, found, items)
    remarks = ["ids are the files' names; whether each file holds that video's tokens, it does not say"]
    if any(one is not None and one.rest for one in seen):
        remarks.append("the files hold more than the tokens, which is not converted")
    return Cache(
        items=items,
        payload="tokens",
        dtype=dtype,
        buckets=((1, length, width),),
        content=lambda item: files.read(item.key + SUFFIX),
        row=row,
        notes={"metadata": read.kept} if read.kept else {},
        left_out=read.missing,
        ignored=ignored(found, SUFFIX, METADATA),
        remarks=(*remarks, *read.remarks),
    )


@dataclass(frozen=True)
class Metadata:
    """kept: path -> JSON. missing: place -> why, of files that it names and that are not there."""

    kept: dict[str, Any]
    missing: dict[str, str]
    remarks: list[str]


def _read_metadata(files: Files, found: Sequence[Found], items: Sequence[CacheItem]) -> Metadata:
    result = Metadata({}, {}, [])
    there = [one for one in found if one.path.rpartition("/")[2] == METADATA]
    if not there:
        result.remarks.append(f"no {METADATA}: whether videos are missing cannot be told")
    for one in there:
        place = files.place(one.path)
        try:
            if one.size > MAX_METADATA:
                raise ValueError(f"{place}: expected at most {MAX_METADATA} bytes, got {one.size}")
            said = parse_json(files.read(one.path), place)
        except (OSError, ValueError) as error:
            result.remarks.append(f"{error}; it is passed over")
            continue
        folder = one.path.removesuffix(METADATA)
        names = {item.key.rpartition("/")[2] for item in items if item.key.startswith(folder)}
        listed = list_of(said)
        if listed is not None:
            ids = [id_of(entry) for entry in listed]
            lost = [id for id in ids if id is not None and id not in names]
            why = f"{place} lists it, there is no such file"
            result.missing.update({files.place(f"{folder}{id}{SUFFIX}"): why for id in lost})
            more = len(names) - (len(set(ids)) - len(set(lost)))
            if more:
                result.remarks.append(f"{place}: {more:,} files are not in its list of {len(ids):,}")
        counts = {name: said[name] for name in COUNTS if isinstance(said, dict) and type(said.get(name)) is int}
        for name, count in counts.items():
            if count != len(names):
                result.remarks.append(f"{place}: {name} is {count:,}, there are {len(names):,} files")
        if one.size > MAX_KEPT and listed is not None:
            if not all(isinstance(entry, (str, int)) for entry in listed):
                result.remarks.append(
                    f"{place}: of its list the ids alone are kept, it is longer than {MAX_KEPT} bytes"
                )
            said = replaced(said, [])
        result.kept[one.path] = said
    return result


def list_of(said: Any) -> list[Any] | None:
    """The list of videos in a metadata.json."""
    if isinstance(said, dict):
        return next((said[name] for name in IDS if isinstance(said.get(name), list)), None)
    return said if isinstance(said, list) else None


def replaced(said: Any, listed: list[Any]) -> Any:
    """`said` with another list of videos."""
    if isinstance(said, list):
        return listed
    name = next((name for name in IDS if isinstance(said.get(name), list)), IDS[0])
    return {**said, name: listed}


def id_of(entry: Any) -> str | None:
    """The video's id in an entry of the list: text, a number, or an object with one."""
    if isinstance(entry, dict):
        entry = next((entry[name] for name in ("id", "video_id") if name in entry), None)
    return str(entry) if isinstance(entry, (str, int)) else None


def write(outgoing: Outgoing, out: Path) -> Iterator[int]:
    if any(shape[0] != 1 for shape in outgoing.shapes):
        raise ValueError(f"{out}: expected tokens of clips as they are, got those of mirrored clips too")
    noted = outgoing.notes.get("metadata", {})
    ids: dict[str, list[str]] = {path.removesuffix(METADATA): [] for path in noted}
    for number in range(outgoing.count):
        row = outgoing.row(number)
        path = target(out, row.key + SUFFIX)
        folder = path_above(row.key, ids) if noted else row.key[: row.key.rfind("/") + 1]
        ids.setdefault(folder, []).append(row.key.rpartition("/")[2])
        if not path.exists():
            put(path, pt_bytes(to_tensor(row.values[0], outgoing.dtype)))
        yield 1
    for folder, those in ids.items():
        said = merged(noted.get(folder + METADATA, {COUNTS[0]: 0, IDS[0]: []}), those)
        put(target(out, folder + METADATA), json.dumps(said, indent=2).encode())


def path_above(key: str, folders: dict[str, list[str]]) -> str:
    """The deepest of `folders` ("" or "a/") that the key is in; else its own."""
    above = [folder for folder in folders if key.startswith(folder)]
    return max(above, key=len) if above else key[: key.rfind("/") + 1]


def merged(said: Any, ids: list[str]) -> Any:
    """A metadata.json, noted from a source, as it is of these videos: its list in its own order, and its counts."""
    written = set(ids)
    kept = [entry for entry in list_of(said) or [] if id_of(entry) in written]
    known = {id_of(entry) for entry in kept}
    if isinstance(said, dict):
        said = {name: len(ids) if name in COUNTS and type(one) is int else one for name, one in said.items()}
    elif not isinstance(said, list):
        return said
    return replaced(said, [*kept, *(id for id in ids if id not in known)])
