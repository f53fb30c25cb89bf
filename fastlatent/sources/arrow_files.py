"""One parquet file or Arrow stream, local or remote, opened so that a batch of one column can be read alone.

Torch-free; needs pyarrow.
"""

from __future__ import annotations

import io
import os
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NoReturn

from fastlatent.sources.files import Files, Found, LocalFiles

SUFFIXES = (".parquet", ".arrow")
STREAM_ENDS = (b"\xff\xff\xff\xff\0\0\0\0", b"\0\0\0\0")  # the second before Arrow 0.15
BATCHES_KEPT = 2  # readers in key order are in one row group, or at the seam of two


@dataclass(frozen=True)
class Opened:
    """One file. starts: the first row of each batch (a parquet row group, an Arrow record batch), then the row count.

    load(batch, column, field of a struct or None): a pyarrow ChunkedArray; from several threads at once.
    complete(batch, column, field): whether it is known, without reading it, that no value is null.
    """

    schema: Any
    starts: list[int]
    load: Callable[[int, str, str | None], Any]
    complete: Callable[[int, str, str | None], bool]


def require_pyarrow() -> None:
    """Raises: ValueError: pyarrow is not installed."""
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError:
        raise ValueError("parquet and Arrow files need pyarrow: pip install 'fastlatent[tables]'") from None


def open_table(files: Files, found: Found) -> Opened:
    """Raises: ValueError, OSError: the file is damaged or cannot be read (pyarrow's own errors are of these kinds)."""
    return (_open_parquet if found.path.lower().endswith(".parquet") else _open_arrow)(files, found)


class _Ranges(io.RawIOBase):
    """A remote file, read in ranges."""

    def __init__(self, files: Files, found: Found) -> None:
        self._files, self._found, self._at = files, found, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = offset + (0, self._at, self._found.size)[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        size = max(0, min(len(buffer), self._found.size - self._at))
        data = self._files.read_range(self._found.path, self._at, size) if size else b""
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


def _raw(files: Files, found: Found) -> Any:
    import pyarrow as pa

    if isinstance(files, LocalFiles):
        return pa.memory_map(os.fsencode(files.place(found.path)))  # labels are read without the images between them
    return pa.PythonFile(io.BufferedReader(_Ranges(files, found), files.gap), mode="r")


def _open_parquet(files: Files, found: Found) -> Opened:
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    with _raw(files, found) as raw:
        metadata = pq.read_metadata(raw)
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]

    def load(batch: int, column: str, inner: str | None) -> Any:
        with _raw(files, found) as raw, pq.ParquetFile(raw, metadata=metadata) as file:
            leaf = column if inner is None else f"{column}.{inner}"
            values = file.read_row_group(batch, columns=[leaf], use_threads=False).column(column)
        return values if inner is None else pc.struct_field(values, inner)

    def complete(batch: int, column: str, inner: str | None) -> bool:
        leaf = column if inner is None else f"{column}.{inner}"
        chunks = (groups[batch].column(number) for number in range(metadata.num_columns))
        statistics = next(chunk.statistics for chunk in chunks if chunk.path_in_schema == leaf)
        return statistics is not None and statistics.has_null_count and statistics.null_count == 0

    starts = [0, *accumulate(group.num_rows for group in groups)]
    return Opened(metadata.schema.to_arrow_schema(), starts, load, complete)


def _open_arrow(files: Files, found: Found) -> Opened:
    """A stream has no table of contents: its messages are gone through one by one (remotely: read)."""
    import pyarrow as pa
    import pyarrow.compute as pc

    offsets, counts = [], []
    with _raw(files, found) as raw:
        if raw.read(6) == b"ARROW1":
            raise ValueError("an Arrow file with a footer; expected a stream, as save_to_disk writes it")
        raw.seek(0)
        schema = pa.ipc.read_schema(_message(raw) or _cut_off())
        at = raw.tell()
        while (message := _message(raw)) is not None:
            if message.type != "record batch":
                raise ValueError(f"it holds a {message.type} message; expected record batches only")
            offsets.append(at)
            counts.append(pa.ipc.read_record_batch(message, schema).num_rows)
            at = raw.tell()
        raw.seek(at)
        if raw.read(8) not in STREAM_ENDS:
            _cut_off()

    def load(batch: int, column: str, inner: str | None) -> Any:
        with _raw(files, found) as raw:
            raw.seek(offsets[batch])
            values = pa.ipc.read_record_batch(_message(raw) or _cut_off(), schema).column(column)
        return pa.chunked_array([values if inner is None else pc.struct_field(values, inner)])

    return Opened(schema, [0, *accumulate(counts)], load, lambda batch, column, inner: False)


def _cut_off() -> NoReturn:
    raise ValueError("the stream has no end: it was cut off")


def _message(raw: Any) -> Any:
    """The next message of a stream, None at its end."""
    import pyarrow as pa

    try:
        return pa.ipc.read_message(raw)
    except EOFError:
        return None


class Batches:
    """The last few image columns that were loaded; threads that want the same one wait for one load."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: OrderedDict[tuple[str, int], Future[Any]] = OrderedDict()

    def get(self, path: str, batch: int, load: Callable[[], Any]) -> Any:
        with self._lock:
            known = self._kept.get((path, batch))
            if known is not None:
                self._kept.move_to_end((path, batch))
            else:
                mine = self._kept[path, batch] = Future()
                if len(self._kept) > BATCHES_KEPT:
                    self._kept.popitem(last=False)
        if known is not None:
            return known.result()
        try:
            mine.set_result(load())
        except BaseException as error:
            with self._lock:
                if self._kept.get((path, batch)) is mine:
                    del self._kept[path, batch]
            mine.set_exception(error)
        return mine.result()
