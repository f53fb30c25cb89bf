"""Durable files: what has a name is complete, and stays after a power cut. Also the store's JSON rules."""

from __future__ import annotations

import errno
import json
import math
import os
import stat
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any

TEMPORARY = ".tmp-"  # the prefix of every unfinished file; such a file is never read
MAX_JSON_BYTES = 1 << 31  # a plan of 10 M files is about 1.2 GB; anything above is not ours


def write_atomic(path: Path, data: bytes) -> None:
    """Write `data` to `path` so that any reader, also after a power cut, sees the old file or the new.

    Temporary file in the same directory -> write -> fdatasync -> rename -> fsync of the directory. Missing
    parent directories are made durable first.

    Raises:
        OSError: the disk is full, read-only ...; the temporary file is removed and what was at `path` is
            kept.
    """

    def write(fd: int) -> str:
        write_all(fd, data)
        return path.name

    make_directory(path.parent)
    publish(path.parent, path.name, write)


def publish(directory: Path, stem: str, write: Callable[[int], str]) -> Path:
    """Create one file: `write(fd)` fills a temporary one and returns its final name."""
    temporary = directory / f"{TEMPORARY}{_shorten(stem)}-{uuid.uuid4().hex}"
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            final = directory / write(fd)
            os.fdatasync(fd)
        finally:
            os.close(fd)
        os.replace(temporary, final)
    except OSError as error:
        _unlink_quietly(temporary)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OSError(
                error.errno,
                f"{os.strerror(error.errno)} while writing {directory / stem}: what was there is kept; "
                "free some space and rerun the same command",
            ) from error
        raise
    except BaseException:
        _unlink_quietly(temporary)
        raise
    fsync_directory(directory)
    return final


def write_all(fd: int, data: bytes | memoryview) -> None:
    """os.write until every byte is written: one call takes at most 2 GiB and may take less."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def make_directory(path: Path) -> None:
    """Make `path` and its missing parents, each entry made durable in its parent."""
    if path.is_dir():
        return
    make_directory(path.parent)
    path.mkdir(exist_ok=True)
    fsync_directory(path.parent)


def fsync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def canonical_json(value: object) -> bytes:
    """The spelling of a JSON value that is hashed: sorted keys, no spaces, ASCII (surrogates escaped).

    Raises:
        ValueError: the value holds something JSON has no exact form for (NaN, infinity, an object).
    """
    try:
        text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"expected a value that JSON can hold exactly, got {value!r:.200}: {error}") from None
    return text.encode("ascii")


def parse_json(data: bytes | memoryview, what: str) -> Any:
    """`data` as JSON; names that occur twice, NaN and infinity are refused. `what` begins the error: the file.

    Raises:
        ValueError: it is not JSON.
    """
    try:
        text = bytes(data).decode("utf-8")
        return json.loads(text, object_pairs_hook=_unique, parse_float=_finite, parse_constant=_finite)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{what}: expected JSON, got {bytes(data[:40])!r} ...: {error}") from None


def read_bytes(path: Path) -> bytes:
    """The file's bytes.

    Raises:
        ValueError: it is missing, not a file, or larger than any JSON file of a dataset can be.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for its writer
            raise ValueError(f"{path}: expected a file")
        size = status.st_size
        if size > MAX_JSON_BYTES:
            raise ValueError(f"{path}: expected at most {MAX_JSON_BYTES} bytes of JSON, got {size}")
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: expected a readable file, got: {error.strerror or error}") from None


def inside(root: Path, relative: str, what: str) -> Path:
    """`root / relative`, after checking that it names something inside `root`, symbolic links followed.

    Raises:
        ValueError: an absolute path, "..", a link that leads out, or not a plain relative path.
    """
    pure = PurePosixPath(relative)
    if not pure.parts or "\0" in relative or pure.is_absolute() or ".." in pure.parts or str(pure) != relative:
        raise ValueError(f"{what}: expected a path inside {root}, got {relative!r:.300}")
    path = root / pure
    try:
        target = path.resolve()
    except (OSError, RuntimeError, UnicodeEncodeError) as error:  # a ring of links; a surrogate that is no byte
        raise ValueError(f"{what}: expected a path inside {root}, got {relative!r:.300}: {error}") from None
    if not target.is_relative_to(root.resolve()):
        raise ValueError(f"{what}: expected a path inside {root}, got {relative!r:.300}, a link to {target}")
    return path


def member(value: object, name: str, kind: type | tuple[type, ...], what: str) -> Any:
    """`value[name]`, which must be a `kind`; true and false are not integers here.

    Raises:
        ValueError: `value` is no object, or the member is missing or of another type.
    """
    if not isinstance(value, dict):
        raise ValueError(f"{what}: expected a JSON object, got {value!r:.100}")
    if name not in value:
        raise ValueError(f"{what}: expected {name!r}, got only {sorted(value)!r:.200}")
    found = value[name]
    if not isinstance(found, kind) or isinstance(found, bool):
        raise ValueError(f"{what}: {name!r}: expected {_name(kind)}, got {found!r:.100}")
    return found


def natural(value: object, name: str, what: str) -> int:
    """An integer >= 0 among the members of `value`."""
    found = member(value, name, int, what)
    if not 0 <= found < 1 << 63:
        raise ValueError(f"{what}: {name!r}: expected an integer from 0 to 2**63 - 1, got {found}")
    return found


def hexadecimal(value: object, name: str, digits: int, what: str) -> str:
    """A lower-case hexadecimal string of exactly `digits` digits among the members of `value`."""
    found = member(value, name, str, what)
    if len(found) != digits or not set(found) <= set("0123456789abcdef"):
        raise ValueError(f"{what}: {name!r}: expected {digits} hexadecimal digits, got {found!r:.100}")
    return found


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name occurs twice in one object")
    return result


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is not a finite float64")
    return value


def _name(kind: type | tuple[type, ...]) -> str:
    return " or ".join(one.__name__ for one in (kind if isinstance(kind, tuple) else (kind,)))


def _shorten(stem: str) -> str:
    return stem[:64]  # a file name has at most 255 bytes, and the prefix and the uuid take 38


def _unlink_quietly(path: Path) -> None:
    with suppress(OSError):  # it is never read, and the next writer removes it
        os.unlink(path)
