"""Parquet files, and Hugging Face datasets written by `save_to_disk`: one image per row. Torch-free; needs pyarrow."""

from __future__ import annotations

import json
import os
import posixpath
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastlatent.sources.arrow_files import SUFFIXES, Batches, Opened, open_table, require_pyarrow
from fastlatent.sources.columnar import ItemTable, Keys
from fastlatent.sources.files import Files, Found, open_beside, open_files
from fastlatent.sources.image_folder import CAPTION
from fastlatent.sources.items import Item, Source
from fastlatent.sources.lookup import look_up

# What a column of bare bytes is called if it holds encoded images.
IMAGE_NAMES = ("image", "img", "jpg", "jpeg", "png", "webp", "pixels", "pixel_values")
DESCRIPTIONS = ("state.json", "dataset_info.json", "dataset_dict.json")  # what save_to_disk writes beside the tables
MAX_CLASSES = 2**20  # a column of larger numbers holds no classes


def scan_table(source: str | os.PathLike[str], *, split: str | None = None, captions: str | None = None) -> Source:
    """List the rows of a .parquet or .arrow file, or of all such files below a folder or URL.

    Keys are "<file>/<row, eight digits>", so files that are added and rows that are left out shift nothing. In a
    folder that save_to_disk wrote (with a state.json) the files listed there count, and no others.

    The image column is the `Image` of the Hugging Face features (in the file's schema, or in dataset_info.json beside
    it), else the only struct of bytes and path, else the only column of bytes with a name of IMAGE_NAMES. Where the
    bytes are null the file at `path` is read, if it lies below the table's folder. Labels are the `ClassLabel` column
    (the one called label, else the first), else an integer column called label; null and negative ones are -1.
    The first file settles columns and classes; a file that differs or is damaged is in left_out.

    Args:
        split: take train-00000-of-00014.parquet, train.parquet and what lies in a folder train; None takes all files.
        captions: the text column that becomes the column "caption"; "" where it is null.

    Raises:
        ValueError: pyarrow is missing, source is no table, it has no image column or several, no such caption column,
            or not a row that can be used.
    """
    require_pyarrow()
    source = os.fsdecode(source)
    files, found, ignored, left_out = _find(source, split)
    scanned: list[_Scanned] = []
    columns: _Columns | None = None
    for one in found:
        try:
            opened = open_table(files, one)
            features = _features(files, one.path, opened.schema)
        except (ValueError, OSError) as error:
            left_out[one.path] = f"not a table that can be read: {error}"
            continue
        try:
            own = _choose(opened.schema, features, captions)
        except ValueError as error:
            if columns is None:
                raise ValueError(f"table {files.place(one.path)!r} {error}") from None
            left_out[one.path] = str(error)
            continue
        columns = columns or own
        if own != columns:
            left_out[one.path] = "its columns or classes differ from those of the files before it"
            continue
        try:
            scanned.append(_scan(one, opened, columns))
        except (ValueError, OSError) as error:
            left_out[one.path] = f"damaged: {error}"
    tables = _settle(files, scanned, left_out)
    if columns is None or not any(len(table.rows) for table in tables.values()):
        reasons = "".join(f"; {name}: {why}" for name, why in list(left_out.items())[:3])
        raise ValueError(f"table {source!r}: none of its {len(found)} files has an image that can be used{reasons}")
    settled, batches = columns, Batches()
    return Source(
        items=_items(files, tables),
        read=lambda item: _read(files, tables, settled, batches, item),
        classes=_classes(settled, tables, source),
        columns=() if captions is None else (CAPTION,),
        left_out=left_out,
        ignored=ignored,
    )


@dataclass(frozen=True)
class _Columns:
    """image_field: "bytes" of a struct, None for bare bytes. classes: None where they are the numbers themselves."""

    image: str
    image_field: str | None
    label: str | None
    classes: tuple[str, ...] | None
    caption: str | None


@dataclass(frozen=True)
class _Scanned:
    """One file. labels, captions: of every row. absent: row without bytes -> the path it has instead, or ""."""

    found: Found
    opened: Opened
    labels: np.ndarray
    captions: list[str] | None
    absent: dict[int, str]


@dataclass(frozen=True)
class _Table:
    """One file's rows that can be used; labels and captions are theirs. aside: row -> the file it names instead."""

    found: Found
    opened: Opened
    rows: np.ndarray
    labels: np.ndarray
    captions: list[str] | None
    aside: Mapping[int, Found]


def _features(files: Files, path: str, schema: Any) -> dict[str, Any]:
    """Column -> its Hugging Face feature; {} if nothing says."""
    beside = posixpath.join(posixpath.dirname(path), "dataset_info.json")
    try:
        if b"huggingface" in (schema.metadata or {}):
            features = json.loads(schema.metadata[b"huggingface"]).get("info", {}).get("features")
        else:
            features = json.loads(files.read(beside)).get("features") if files.exists(beside) else None
        return {name: one for name, one in (features or {}).items() if isinstance(one, dict) and name in schema.names}
    except (ValueError, AttributeError):
        raise ValueError("the description of its Hugging Face features is damaged") from None


def _choose(schema: Any, features: dict[str, Any], captions: str | None) -> _Columns:
    import pyarrow as pa

    image = _image_column(schema, features)
    named = {name: one.get("names") for name, one in features.items() if one.get("_type") == "ClassLabel"}
    classes = {name: tuple(map(str, names)) for name, names in named.items() if isinstance(names, list)}
    label = "label" if "label" in classes else next(iter(classes), None)
    if label is None and "label" in schema.names and pa.types.is_integer(schema.field("label").type):
        label = "label"
    if captions is not None:
        kind = schema.field(captions).type if captions in schema.names else None
        if kind is None or not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            raise ValueError(f"has no text column {captions!r} for captions; its columns: {_listed(schema)}")
    image_field = "bytes" if pa.types.is_struct(schema.field(image).type) else None
    return _Columns(image, image_field, label, classes.get(label) if label else None, captions)


def _image_column(schema: Any, features: dict[str, Any]) -> str:
    import pyarrow as pa

    kinds = {name: schema.field(name).type for name in schema.names}
    images = [name for name, one in features.items() if one.get("_type") == "Image"]
    if not images:
        images = [name for name, kind in kinds.items() if pa.types.is_struct(kind) and _holds_bytes(kind)]
    if not images:
        images = [name for name, kind in kinds.items() if name.lower() in IMAGE_NAMES and _holds_bytes(kind)]
    if "image" in images:
        images = ["image"]
    if len(images) != 1 or not _holds_bytes(kinds[images[0]]):
        raise ValueError(
            f"has {len(images) or 'no'} image columns {images}; expected one (an Image feature, a struct of bytes and "
            f"path, or bytes called {' or '.join(IMAGE_NAMES)}); its columns: {_listed(schema)}"
        )
    return images[0]


def _holds_bytes(kind: Any) -> bool:
    import pyarrow as pa

    if pa.types.is_struct(kind):
        names = [kind.field(number).name for number in range(kind.num_fields)]
        return {"bytes", "path"} <= set(names) and _holds_bytes(kind.field(names.index("bytes")).type)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _listed(schema: Any) -> str:
    return ", ".join(f"{name} ({schema.field(name).type})" for name in schema.names)


def _scan(found: Found, opened: Opened, columns: _Columns) -> _Scanned:
    count = opened.starts[-1]
    labels, captions = np.full(count, -1, np.int64), None
    if columns.label is not None:
        values = _whole(opened, columns.label)
        labels = np.maximum(np.array([-1 if one is None else one for one in values.to_pylist()], np.int64), -1)
        if columns.classes is not None and count and labels.max() >= len(columns.classes):
            raise ValueError(f"label {labels.max()} in {columns.label!r}, which has {len(columns.classes)} classes")
    if columns.caption is not None:
        values = _whole(opened, columns.caption)
        values.validate(full=True)  # UTF-8
        captions = [text or "" for text in values.to_pylist()]
    return _Scanned(found, opened, labels, captions, _absent(opened, columns))


def _whole(opened: Opened, column: str) -> Any:
    import pyarrow as pa

    parts = [opened.load(batch, column, None) for batch in range(len(opened.starts) - 1)]
    kind = opened.schema.field(column).type
    return pa.chunked_array([chunk for part in parts for chunk in part.chunks], kind)


def _absent(opened: Opened, columns: _Columns) -> dict[int, str]:
    absent = {}
    for batch, start in enumerate(opened.starts[:-1]):
        if opened.complete(batch, columns.image, columns.image_field):
            continue
        nulls = opened.load(batch, columns.image, columns.image_field).is_null().to_numpy()
        rows = np.flatnonzero(nulls).tolist()
        paths = opened.load(batch, columns.image, "path") if rows and columns.image_field else None
        absent.update({start + row: (paths and paths[row].as_py()) or "" for row in rows})
    return absent


def _settle(files: Files, scanned: list[_Scanned], left_out: dict[str, str]) -> dict[str, _Table]:
    """The tables in the order of their keys; rows without bytes take the file they name, or are left out."""
    named = {
        (one.found.path, row): posixpath.normpath(posixpath.join(posixpath.dirname(one.found.path), path))
        for one in scanned
        for row, path in one.absent.items()
        if path and _is_below(path)
    }
    wanted = sorted(set(named.values()))
    known = dict(zip(wanted, look_up(files, wanted), strict=True)) if wanted else {}
    tables = {}
    for one in scanned:
        aside = {}
        for row, path in one.absent.items():
            file = known.get(named.get((one.found.path, row), ""))
            if isinstance(file, Found):
                aside[row] = file
            else:
                left_out[_key(one.found.path, row)] = "the image is null" + (
                    f", and {path!r} is not there" if path else ""
                )
        lost = np.array([row for row in one.absent if row not in aside], np.int64)
        rows = np.setdiff1d(np.arange(len(one.labels)), lost, assume_unique=True)
        captions = None if one.captions is None else [one.captions[row] for row in rows.tolist()]
        tables[one.found.path] = _Table(one.found, one.opened, rows, one.labels[rows], captions, aside)
    return tables


def _is_below(path: str) -> bool:
    return not (posixpath.isabs(path) or "\0" in path or ".." in path.split("/"))


def _classes(columns: _Columns, tables: Mapping[str, _Table], source: str) -> list[str]:
    if columns.label is None or columns.classes is not None:
        return list(columns.classes or ())
    largest = max(int(table.labels.max(initial=-1)) for table in tables.values())
    if largest >= MAX_CLASSES:
        raise ValueError(f"table {source!r}: column {columns.label!r} holds no classes; it goes up to {largest}")
    return [str(number) for number in range(largest + 1)]


def _items(files: Files, tables: Mapping[str, _Table]) -> ItemTable:
    keys: list[bytes] = []
    sizes, stamps, captions = [], [], []
    for table in tables.values():
        keys += [os.fsencode(_key(table.found.path, row)) for row in table.rows.tolist()]
        holders = [table.aside.get(row, table.found) for row in table.rows.tolist()]
        sizes += [holder.size for holder in holders]
        stamps += [(holder.stamp + row) % 2**63 for holder, row in zip(holders, table.rows.tolist(), strict=True)]
        captions += table.captions or []
    return ItemTable(
        Keys.of(keys),
        np.array(sizes, np.uint64),
        np.array(stamps, np.int64),
        np.concatenate([table.labels for table in tables.values()]),
        lambda key: _place(files, tables, key),
        captions if any(table.captions is not None for table in tables.values()) else None,
    )


def _key(path: str, row: int) -> str:
    return f"{path}/{row:08d}"


def _split_key(key: str) -> tuple[str, int]:
    path, _, row = key.rpartition("/")
    return path, int(row)


def _place(files: Files, tables: Mapping[str, _Table], key: str) -> str:
    path, row = _split_key(key)
    aside = tables[path].aside.get(row)
    return f"{files.place(path)}: row {row}" if aside is None else files.place(aside.path)


def _read(files: Files, tables: Mapping[str, _Table], columns: _Columns, batches: Batches, item: Item) -> bytes:
    path, row = _split_key(item.key)
    table = tables[path]
    if row in table.aside:
        return files.read(table.aside[row].path)
    batch = bisect_right(table.opened.starts, row) - 1
    images = batches.get(path, batch, lambda: table.opened.load(batch, columns.image, columns.image_field))
    return images[row - table.opened.starts[batch]].as_py()


def _find(source: str, split: str | None) -> tuple[Files, list[Found], dict[str, int], dict[str, str]]:
    """The table files in the order of their keys, how many other files were passed over, and what cannot be read."""
    if source.lower().endswith(SUFFIXES):
        files, name = open_beside(source)
        found = next(iter(look_up(files, [name])))
        if isinstance(found, str):
            raise ValueError(f"table {source!r}: {found}")
        return files, [found], {}, {}
    files = open_files(source)
    try:
        listing = files.listing()
    except OSError as error:
        raise ValueError(f"table {source!r} cannot be listed: {error}; expected a folder or a file") from None
    listed = list(listing)
    saved = {posixpath.dirname(one.path): _saved(files, one.path) for one in listed if _is_state(one.path)}
    tables, ignored = [], Counter[str]()
    for one in listed:
        folder, name = posixpath.split(one.path)
        if not name.lower().endswith(SUFFIXES) or name not in saved.get(folder, (name,)):  # cache-….arrow of `map`
            ignored[posixpath.splitext(name)[1].lower()] += name not in DESCRIPTIONS
        elif split is None or is_of_split(one.path, split):
            tables.append(one)
    missing = [posixpath.join(folder, name) for folder, names in saved.items() for name in names]
    missing = sorted({path for path in missing if split is None or is_of_split(path, split)} - {t.path for t in tables})
    if missing:
        raise ValueError(f"table {source!r}: {missing[0]!r} is listed in the state.json beside it, but is not there")
    if not tables:
        _refuse_without_tables(source, split, [one.path for one in listed if one.path.lower().endswith(SUFFIXES)])
    folders = set(listing.folders)
    lost = {path: why for path, why in listing.left_out.items() if path in folders or path.lower().endswith(SUFFIXES)}
    return files, sorted(tables, key=lambda one: os.fsencode(one.path + "/")), dict(+ignored), lost


def _refuse_without_tables(source: str, split: str | None, others: list[str]) -> None:
    wanted = "" if split is None else f" of split {split!r} (train-….parquet, train.parquet, train/… for train)"
    there = f"; it holds {', '.join(others[:5])}{', …' if len(others) > 5 else ''}" if others else ""
    raise ValueError(f"{source!r} holds no .parquet and no .arrow file{wanted}{there}")


def is_of_split(path: str, split: str) -> bool:
    """train/…, train.parquet, train-00000-of-00014.parquet and train_0.parquet are of split train."""
    *folders, name = path.split("/")
    return split in folders or re.fullmatch(rf"{re.escape(split)}([-_]\d.*)?", name.rpartition(".")[0]) is not None


def _is_state(path: str) -> bool:
    return posixpath.basename(path) == "state.json"


def _saved(files: Files, path: str) -> tuple[str, ...]:
    """The files that a folder's state.json says the dataset consists of."""
    try:
        return tuple(one["filename"] for one in json.loads(files.read(path))["_data_files"])
    except (ValueError, KeyError, TypeError):
        raise ValueError(
            f"{files.place(path)!r} is not what save_to_disk writes: expected _data_files, each with a filename"
        ) from None
