"""A folder that Hugging Face's `datasets.load_from_disk` reads; written with pyarrow alone, a batch of rows at a time.

Columns: key; label (ClassLabel, -1 for none) where there are classes; moments, latents or tokens, an ArrayND of a row's
sizes (a list of numbers where it has one); the same with `_flip`, the mirror image, where rows have it; orig_hw [2] and
crop [4]; group and order where samples have them; the further tensors (captions as text, other bytes as binary). Tokens
whose number differs are Array2D of [None, D]; other rows must be of one shape. float16, float32 and float64 stay what
they are, bfloat16 becomes float32 without a rounding. Bytes of a key that are no UTF-8 are written as \\xNN.

data-00000-of-000NN.arrow (Arrow streams), dataset_info.json and, last, state.json.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import xxhash

from fastlatent.caches.outgoing import Outgoing, OutRow, put, put_file, target
from fastlatent.sources.arrow_files import require_pyarrow

TITLE = "Hugging Face datasets: a folder for load_from_disk"
PAYLOADS = ("moments", "latents", "tokens")
SCALING = (1.0, 0.0)
EXTRAS = None
FLIP = "_flip"
BATCH_BYTES = 32 << 20  # of values in a record batch; the writer holds one
BATCH_ROWS = 1000  # as `datasets` writes them
NAMES = {np.dtype("<f2"): "float16", np.dtype("<f4"): "float32", np.dtype("<f8"): "float64"}


@dataclass(frozen=True)
class _Column:
    """feature: as in dataset_info.json. shape: of an ArrayND, None for what differs; () for other columns."""

    name: str
    feature: dict[str, Any]
    shape: tuple[int | None, ...] = ()


def write(outgoing: Outgoing, out: Path) -> Iterator[int]:
    """See the module.

    Raises:
        ValueError: pyarrow is missing, or rows have several shapes.
    """
    require_pyarrow()
    columns = _columns(outgoing)
    starts = list(range(0, outgoing.count, outgoing.rows_per_shard))
    names = [f"data-{i:05d}-of-{len(starts):05d}.arrow" for i in range(len(starts))]
    for start, name in zip(starts, names, strict=True):
        end = min(start + outgoing.rows_per_shard, outgoing.count)
        path = target(out, name)
        if not path.exists():
            put_file(path, partial(_write_stream, outgoing, columns, start, end))
        yield end - start
    features = {column.name: column.feature for column in columns}
    info = {"citation": "", "description": "", "features": features, "homepage": "", "license": ""}
    put(target(out, "dataset_info.json"), json.dumps(info, indent=2).encode())
    state: dict[str, Any] = {
        "_data_files": [{"filename": name} for name in names],
        "_fingerprint": _fingerprint([out / name for name in names]),
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None,
    }
    put(target(out, "state.json"), json.dumps(state, indent=2, sort_keys=True).encode())


def check(outgoing: Outgoing, out: Path, count: int) -> int:
    """Read `count` rows, drawn at random, again and compare them with what was to be written; how many.

    Raises:
        ValueError: a row is missing or differs.
    """
    import pyarrow as pa

    chosen = np.sort(np.random.default_rng(0).permutation(outgoing.count)[:count]).tolist()
    done = start = 0
    for file in json.loads((out / "state.json").read_bytes())["_data_files"]:
        with pa.memory_map(str(out / file["filename"])) as raw, pa.ipc.open_stream(raw) as stream:
            for batch in stream:
                while done < len(chosen) and chosen[done] < start + batch.num_rows:
                    _check_row(outgoing, batch, chosen[done] - start, chosen[done], out)
                    done += 1
                start += batch.num_rows
    if start != outgoing.count:
        raise ValueError(f"{out}: expected {outgoing.count} rows, {start} can be read again")
    return done


def _check_row(outgoing: Outgoing, batch: Any, at: int, number: int, out: Path) -> None:
    row = outgoing.row(number)
    values, dtype = _values(row.values, outgoing.dtype)
    for wanted, name in zip(values, (outgoing.payload, outgoing.payload + FLIP), strict=False):
        column = batch.column(name)
        found = getattr(column, "storage", column)[at : at + 1]  # an extension where `datasets` is imported
        while hasattr(found, "flatten") and _is_list(found.type):
            found = found.flatten()
        flat = found.to_numpy(zero_copy_only=False)
        key = batch.column("key")[at].as_py()
        if key != _text(row.key) or flat.dtype != dtype or not np.array_equal(flat, wanted.reshape(-1)):
            raise ValueError(f"{out}: row {row.key!r} reads otherwise than it was written")


def _is_list(kind: Any) -> bool:
    import pyarrow as pa

    return pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind)


def _columns(outgoing: Outgoing) -> list[_Column]:
    first = outgoing.row(0)
    shapes = {shape[1:] for shape in outgoing.shapes}
    sizes: tuple[int | None, ...] = first.values.shape[1:]
    if outgoing.payload == "tokens" and (len(shapes) > 1 or -1 in next(iter(shapes))):
        sizes = (None, *sizes[1:])
    elif len(shapes) > 1:
        raise ValueError(
            f"--to datasets: expected rows of one shape, got {', '.join(map(str, map(list, sorted(shapes)[:4])))}: "
            "an ArrayND holds no other; use --to webdataset, which does"
        )
    dtype = NAMES[_values(first.values[:0], outgoing.dtype)[1]]
    columns = [_Column("key", _value("string"))]
    if outgoing.classes:
        columns.append(_Column("label", {"names": list(outgoing.classes), "_type": "ClassLabel"}))
    for name in (outgoing.payload, outgoing.payload + FLIP)[: len(first.values)]:
        columns.append(_array(name, sizes, dtype))
    columns += [_Column("orig_hw", _fixed("int32", 2)), _Column("crop", _fixed("int32", 4))]
    if first.group:
        columns += [_Column("group", _value("string")), _Column("order", _value("int64"))]
    taken = {column.name for column in columns}
    for name, array in first.extras.items():
        if name in taken:
            raise ValueError(f"--to datasets: expected further tensors of other names than the columns', got {name!r}")
        if array.dtype == np.uint8 and array.ndim == 1:
            columns.append(_Column(name, _value("string" if name == "caption" else "binary")))
        else:  # what is ragged is so in its first size
            columns.append(_array(name, (None, *array.shape[1:]) if array.ndim else (), array.dtype.name))
    return columns


def _value(dtype: str) -> dict[str, Any]:
    return {"dtype": dtype, "_type": "Value"}


def _fixed(dtype: str, length: int) -> dict[str, Any]:
    return {"feature": _value(dtype), "length": length, "_type": "Sequence"}


def _array(name: str, sizes: tuple[int | None, ...], dtype: str) -> _Column:
    if not sizes:
        return _Column(name, _value(dtype))
    if len(sizes) == 1:
        return _Column(name, _fixed(dtype, -1 if sizes[0] is None else sizes[0]))
    if len(sizes) > 5:
        raise ValueError(f"--to datasets: {name}: expected at most 5 sizes, got {list(sizes)}; use --to webdataset")
    return _Column(name, {"shape": list(sizes), "dtype": dtype, "_type": f"Array{len(sizes)}D"}, sizes)


def _schema(columns: Sequence[_Column]) -> Any:
    import pyarrow as pa

    fields = []
    for column in columns:
        feature, metadata = column.feature, None
        if column.shape:
            kind = pa.from_numpy_dtype(np.dtype(feature["dtype"]))
            for _ in column.shape:
                kind = pa.list_(kind)
            metadata = {
                "ARROW:extension:name": f"datasets.features.features.Array{len(column.shape)}DExtensionType",
                "ARROW:extension:metadata": json.dumps([list(column.shape), feature["dtype"]]),
            }
        elif feature["_type"] == "Sequence":
            kind = pa.list_(pa.from_numpy_dtype(np.dtype(feature["feature"]["dtype"])), feature["length"])
        elif feature["_type"] == "ClassLabel":
            kind = pa.int64()
        else:
            plain = {"string": pa.string(), "binary": pa.binary()}
            kind = plain.get(feature["dtype"]) or pa.from_numpy_dtype(np.dtype(feature["dtype"]))
        fields.append(pa.field(column.name, kind, metadata=metadata))
    info = {"info": {"features": {column.name: column.feature for column in columns}}}
    return pa.schema(fields, metadata={"huggingface": json.dumps(info)})


def _write_stream(outgoing: Outgoing, columns: Sequence[_Column], start: int, end: int, file: BinaryIO) -> None:
    import pyarrow as pa

    schema = _schema(columns)
    with pa.ipc.new_stream(pa.PythonFile(file, mode="w"), schema) as stream:
        while start < end:
            rows: list[OutRow] = []
            held = 0
            while start < end and len(rows) < BATCH_ROWS and held < BATCH_BYTES:
                row = outgoing.row(start)
                rows.append(row)
                held += row.values.nbytes * (2 if outgoing.dtype == "BF16" else 1)
                held += sum(array.nbytes for array in row.extras.values())
                start += 1
            arrays = [_filled(column, schema.field(column.name).type, rows, outgoing) for column in columns]
            stream.write_batch(pa.record_batch(arrays, schema=schema))


def _filled(column: _Column, kind: Any, rows: Sequence[OutRow], outgoing: Outgoing) -> Any:
    import pyarrow as pa

    name, plain = column.name, {"key", "group"}
    if name in plain:
        return pa.array([_text(getattr(row, name)) for row in rows], kind)
    if name in ("label", "order"):
        return pa.array(np.array([getattr(row, name) for row in rows], np.int64), kind)
    if name in ("orig_hw", "crop"):
        return pa.FixedSizeListArray.from_arrays(
            pa.array(np.array([getattr(row, name) for row in rows], np.int32).reshape(-1)), type=kind
        )
    if name in (outgoing.payload, outgoing.payload + FLIP):
        flip = int(name != outgoing.payload)
        parts = [_values(row.values[flip], outgoing.dtype)[0] for row in rows]
    else:
        parts = [row.extras[name] for row in rows]
    if kind == pa.string():
        return pa.array([_decoded(part.tobytes()) for part in parts], kind)
    if kind == pa.binary():
        return pa.array([part.tobytes() for part in parts], kind)
    return _nested(parts, kind)


def _nested(parts: Sequence[np.ndarray], kind: Any) -> Any:
    """Arrays [n, ...], one a row, as lists of lists; n may differ."""
    import pyarrow as pa

    values = pa.array(np.concatenate([part.reshape(-1) for part in parts]))
    if pa.types.is_fixed_size_list(kind):
        return pa.FixedSizeListArray.from_arrays(values, type=kind)
    sizes = parts[0].shape
    for axis in range(len(sizes) - 1, 0, -1):
        count = sum(math.prod(part.shape[:axis]) for part in parts)
        values = pa.ListArray.from_arrays(pa.array(np.arange(count + 1, dtype=np.int32) * sizes[axis]), values)
    if sizes:
        offsets = np.concatenate([[0], np.cumsum([len(part) for part in parts])]).astype(np.int32)
        values = pa.ListArray.from_arrays(pa.array(offsets), values)
    return values


def _values(values: np.ndarray, dtype: str) -> tuple[np.ndarray, np.dtype]:
    """As a type that pyarrow has."""
    if dtype == "BF16":
        values = (values.astype(np.uint32) << 16).view(np.float32)
    return values, values.dtype


def _text(key: str) -> str:
    return _decoded(key.encode("utf-8", "surrogateescape"))


def _decoded(data: bytes) -> str:
    return data.decode("utf-8", "backslashreplace")


def _fingerprint(paths: Sequence[Path]) -> str:
    """16 hexadecimal digits, by which `datasets` tells its cached results of one folder from another's."""
    digest = xxhash.xxh3_64()
    for path in paths:
        with open(path, "rb", buffering=0) as file:
            while block := file.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()
