"""Manifests: a file that lists images and what is known of each. Torch-free.

JSON Lines (also when the file is called .json), in order:

    {"record_type": "set", "output_root": "/data/renders"}
    {"record_type": "sample", "output_rel": "a/1.tif", "metadata": {"split": "train", "temperature": 0.2}}

or one JSON document: {"output_root": …, "samples": [{"output_rel": …, "metadata": …}]}, or the list of samples alone.
"""

from __future__ import annotations

import json
import os
import posixpath
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from fastlatent.sources.conditions import condition_columns, condition_remarks, condition_values, parse_conditions
from fastlatent.sources.files import Files, open_beside, open_files
from fastlatent.sources.image_folder import CAPTION
from fastlatent.sources.items import Item, Source, stamp_of
from fastlatent.sources.lookup import look_up


@dataclass(frozen=True)
class _Sample:
    where: str  # "line 7", for messages
    root: str
    path: str
    metadata: Mapping[str, Any]


def scan_manifest(
    path: str | os.PathLike[str],
    *,
    root: str | None = None,
    split: str | None = None,
    captions: str | None = None,
    conditions: str = "none",
) -> Source:
    """List the images a manifest names. Keys are their paths below its output_root.

    Args:
        root: the folder the paths start at, instead of the manifest's output_root (which, if it is relative or
            missing from a document, starts at the manifest's own folder).
        split: take the samples whose metadata have this split; None takes all.
        captions: name of the metadata's text that becomes the column "caption"; "" where it is missing or null.
        conditions: "temperature:1,wind:3,wind_mag:1", say, becomes the columns "condition" and "condition_present"
            (see conditions.py); "none" for none.

    Every file is asked for its size and time, none is opened. What is missing, is named by an absolute path or one
    that leaves the root, or is named a second time is in left_out. Records of an unknown record_type are passed over.
    remarks say which conditions are missing or unusable, and of how many images.

    Raises:
        ValueError: the manifest is missing or damaged, a sample comes before the set record (with the line's
            number), a caption is no text, or nothing is left.
    """
    path = os.fsdecode(path)
    wanted = parse_conditions(conditions)
    samples = list(_samples(_read(path), path, root))
    chosen = [one for one in samples if split is None or one.metadata.get("split") == split]
    if not chosen:
        raise ValueError(f"manifest {path!r} names no image{_splits(samples, split)}")
    named, left_out = _keys(chosen)
    items: dict[str, Item] = {}
    owner: dict[str, Files] = {}
    for below in dict.fromkeys(sample.root for sample in named.values()):
        files = open_files(below)
        keys = [key for key, sample in named.items() if sample.root == below]
        for key, found in zip(keys, look_up(files, keys), strict=True):
            if isinstance(found, str):
                left_out[key] = f"{named[key].where}: {found}"
                continue
            attached = {**_caption(named[key], captions, path), **condition_values(wanted, named[key].metadata)}
            stamp = stamp_of(found.stamp, attached)
            items[key] = Item(key, files.place(key), found.size, stamp, attached=attached)
            owner[key] = files
    if not items:
        first, reason = next(iter(left_out.items()))
        raise ValueError(
            f"manifest {path!r}: none of its {len(chosen)} images can be used; {first!r}: {reason}. "
            "If the files lie elsewhere now, give their folder as the root"
        )
    text = (CAPTION,) if captions is not None else ()
    keys = sorted(items, key=os.fsencode)
    return Source(
        items=[items[key] for key in keys],
        read=lambda item: owner[item.key].read(item.key),
        columns=(*text, *condition_columns(wanted)),
        left_out=left_out,
        remarks=condition_remarks(wanted, ((key, named[key].metadata) for key in keys)),
    )


def _read(path: str) -> str:
    files, name = open_beside(path)
    try:
        return files.read(name).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"manifest {path!r} is not UTF-8: {error}") from None
    except OSError as error:
        raise ValueError(f"manifest {path!r} cannot be read: {error}") from None


def _samples(text: str, path: str, root: str | None) -> Iterator[_Sample]:
    """The samples of either form; a set record in a document's list applies as it does in JSON Lines."""
    folder = os.path.dirname(path)
    document = _document(text)
    current: str | None
    if document is None:
        records, current = _lines(text, path), None
    else:
        listed, output_root = document
        records = ((f"sample {number}", one) for number, one in enumerate(listed, 1))
        current = root or _root(output_root, folder, f"manifest {path!r}")
    for where, record in records:
        message = f"manifest {path!r}, {where}"
        if not isinstance(record, dict):
            raise ValueError(f"{message}: expected an object {{…}}, got {json.dumps(record)[:60]}")
        kind = record.get("record_type", None if document is None else "sample")
        if kind == "set":
            current = root or _root(record.get("output_root"), folder, message)
        elif kind == "sample":
            if current is None:
                raise ValueError(f'{message}: a sample before the {{"record_type": "set", "output_root": …}} record')
            yield _sample(record, where, root or current, message)


def _document(text: str) -> tuple[list[Any], Any] | None:
    """(samples, output_root) if the text is one JSON document, None if it has to be JSON Lines."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if isinstance(value, list):
        return value, ""
    if isinstance(value, dict) and isinstance(value.get("samples"), list):
        return value["samples"], value.get("output_root", "")
    return None  # a file of one line, say


def _lines(text: str, path: str) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(text.split("\n"), 1):  # splitlines() would also split at U+2028, which JSON allows
        if line.strip():
            try:
                yield f"line {number}", json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"manifest {path!r}, line {number}: not JSON: {error}") from None


def _root(output_root: Any, folder: str, message: str) -> str:
    if not isinstance(output_root, str):
        raise ValueError(f"{message}: output_root must be a folder's path, got {json.dumps(output_root)[:60]}")
    return output_root if "://" in output_root else os.path.join(folder, output_root) or "."


def _sample(record: dict[str, Any], where: str, root: str, message: str) -> _Sample:
    path, metadata = record.get("output_rel"), record.get("metadata", {})
    if not isinstance(path, str) or not path:
        raise ValueError(f"{message}: output_rel must be an image's path, got {json.dumps(path)[:60]}")
    if not isinstance(metadata, dict):
        raise ValueError(f"{message}: metadata must be an object {{…}}, got {json.dumps(metadata)[:60]}")
    return _Sample(where, root, path, metadata)


def _keys(samples: list[_Sample]) -> tuple[dict[str, _Sample], dict[str, str]]:
    """Normalised path -> sample, and what is no path below the root or is there already -> why."""
    named: dict[str, _Sample] = {}
    left_out: dict[str, str] = {}
    for sample in samples:
        key = posixpath.normpath(sample.path)
        problem = _problem(sample.path, key)
        if problem:
            left_out[sample.path.encode("utf-8", "backslashreplace").decode()] = f"{sample.where}: {problem}"
        elif key in named:
            left_out[f"{key} ({sample.where})"] = f"named a second time; {named[key].where} counts"
        else:
            named[key] = sample
    return named, left_out


def _problem(path: str, key: str) -> str:
    try:
        os.fsencode(path)
    except UnicodeEncodeError:
        return "no file can be called that: it holds half a surrogate pair"
    if posixpath.isabs(path):
        return "an absolute path; expected one below output_root"
    if key in (".", "..") or key.startswith("../") or "\0" in key:
        return "not a path below output_root"
    return ""


def _caption(sample: _Sample, captions: str | None, path: str) -> dict[str, str]:
    if captions is None:
        return {}
    text = sample.metadata.get(captions)
    if text is not None and not (isinstance(text, str) and _is_utf8(text)):
        raise ValueError(f"manifest {path!r}, {sample.where}: {captions!r} is no text: {json.dumps(text)[:60]}")
    return {"caption": text or ""}


def _is_utf8(text: str) -> bool:
    """False if it holds half a surrogate pair, which JSON can write and UTF-8 cannot."""
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


def _splits(samples: list[_Sample], split: str | None) -> str:
    if split is None or not samples:
        return ""
    counts = Counter(str(sample.metadata.get("split")) for sample in samples)
    found = ", ".join(f"{name} ({count})" for name, count in counts.most_common(10))
    return f" of split {split!r}; its splits are {found}"
