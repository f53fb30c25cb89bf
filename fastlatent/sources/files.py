"""Files below one root: a local folder, or what fsspec gives access to (s3://, hf://, memory:// …). Torch-free."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Protocol, TypeVar, overload

import numpy as np
import xxhash

from fastlatent import _native
from fastlatent.sources.columnar import BLOCK, Keys

THREADS = 8  # waiting for a network file system or a server, not for the processor
CHUNK = 32  # files that a thread reads in a row: to hand over a single one takes 50 µs and 2 KB
MAX_TEXT = 1 << 20  # bytes of a file that is to be a text beside an image
# What a protocol says of a file that tells whether it was replaced: hashes of its content first, then its times.
IDENTITIES = (
    "ETag", "etag", "md5Hash", "content_md5", "blob_id", "CRC", "version_id", "generation",
    "mtime", "LastModified", "last_modified", "updated", "modified", "created",
)  # fmt: skip
NO_SIZE = "the server does not tell its size"
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Found:
    """A file below the root.

    path: below the root, "/" between folders, bytes that are no UTF-8 as surrogates (os.fsdecode). size: bytes.
    stamp: changes when the file does: mtime_ns, or a number of 63 bits made of what the protocol says.
    """

    path: str
    size: int
    stamp: int


class Listing(Sequence[Found]):
    """Every file below a root that can be read, sorted by the bytes of their paths; no name with a leading dot.

    Attributes:
        keys, size, stamp: the files' columns; uint64 and int64 [N].
        folders: every folder below the root, also the empty ones, sorted by bytes.
        left_out: path of a file that cannot be read (a link to nothing, no permission), or of a folder that cannot be
            listed -> why. Folders among them are in `folders` too.
    """

    def __init__(
        self, keys: Keys, size: np.ndarray, stamp: np.ndarray, folders: list[str], left_out: Mapping[str, str]
    ) -> None:
        self.keys, self.size, self.stamp = keys, size, stamp
        self.folders, self.left_out = folders, left_out

    def __len__(self) -> int:
        return len(self.keys)

    @overload
    def __getitem__(self, index: int) -> Found: ...
    @overload
    def __getitem__(self, index: slice) -> list[Found]: ...
    def __getitem__(self, index: int | slice) -> Found | list[Found]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        i = range(len(self))[index]
        return Found(os.fsdecode(self.keys.raw(i)), int(self.size[i]), int(self.stamp[i]))

    def __iter__(self) -> Iterator[Found]:
        for start in range(0, len(self), BLOCK):
            end = min(start + BLOCK, len(self))
            columns = (column[start:end].tolist() for column in (self.size, self.stamp))
            yield from map(Found, self.keys.texts(start, end), *columns)


class Files(Protocol):
    """Files below `root`. Every path is relative to it, with "/" between folders; "" is the root itself.

    gap: bytes that a reader may as well read as skip: what arrives while one request waits for its answer.
    """

    @property
    def root(self) -> str: ...

    @property
    def gap(self) -> int: ...

    def listing(self) -> Listing:
        """OSError where the root cannot be listed."""
        ...

    def read(self, path: str) -> bytes:
        """All of a file. OSError where that fails."""
        ...

    def read_range(self, path: str, offset: int, size: int) -> bytes:
        """`size` bytes from `offset` on, fewer at the file's end. OSError where that fails."""
        ...

    def stat(self, path: str) -> Found:
        """One file, as `listing` gives it. OSError where that fails."""
        ...

    def exists(self, path: str = "") -> bool: ...

    def is_dir(self, path: str = "") -> bool: ...

    def place(self, path: str) -> str:
        """The path or URL that messages show, beginning with the root as the user wrote it."""
        ...


def open_files(root: str | os.PathLike[str] | bytes) -> Files:
    """The files below a local folder, or below a URL (anything with "://") through fsspec. Nothing is read yet.

    Raises:
        ValueError: fsspec, or the package that it needs for this protocol, is missing; a protocol that nobody knows.
    """
    text = os.fsdecode(root)
    for local in ("file://", "local://"):
        text = text.removeprefix(local) if "::" not in text else text
    return _open_remote(text) if "://" in text else LocalFiles(text)


def open_beside(place: str | os.PathLike[str] | bytes) -> tuple[Files, str]:
    """The folder that holds the file `place`, opened, and the file's name in it.

    Raises:
        ValueError: as `open_files`.
    """
    text = os.fsdecode(place)
    first, *chain = text.split("::")
    folder, slash, name = first.rpartition("/")
    if "://" in text:
        return open_files("::".join((folder, *chain))), name
    return open_files(folder or slash or "."), name


def read_each(names: Iterable[str], read: Callable[[str], T]) -> Iterable[T | Exception]:
    """What `read` gives for every name, THREADS at once, in order; an OSError or ValueError in place of what failed."""
    listed = list(names)
    size = max(1, min(CHUNK, -(-len(listed) // THREADS)))  # of a few files each thread has one

    def some(start: int) -> list[T | Exception]:
        got: list[T | Exception] = []
        for name in listed[start : start + size]:
            try:
                got.append(read(name))
            except (OSError, ValueError) as error:
                got.append(error)
        return got

    with ThreadPoolExecutor(THREADS, thread_name_prefix="sources") as pool:
        for got in pool.map(some, range(0, len(listed), size)):
            yield from got


def read_text(data: bytes) -> str:
    """The text of a small file: UTF-8 with or without a byte order mark, white space around it removed.

    Raises:
        ValueError: longer than MAX_TEXT, or no UTF-8.
    """
    if len(data) > MAX_TEXT:
        raise ValueError(f"expected a text of at most {MAX_TEXT} bytes, got {len(data)}")
    try:
        return data.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise ValueError(f"expected UTF-8, got {data[error.start : error.start + 8]!r} at byte {error.start}") from None


@dataclass(frozen=True)
class LocalFiles:
    """Files of a mounted file system."""

    root: str
    gap: int = 4096

    def listing(self) -> Listing:
        """Links are followed, except into a folder that the path already runs through."""
        root = np.frombuffer(os.fsencode(self.root) + b"\0", "u1")
        summary = np.zeros(4, np.int64)
        _native.call("cpu", "list_files", root.ctypes.data, THREADS, summary.ctypes.data)
        handle, count, length, error = summary.tolist()
        if error:
            raise OSError(error, os.strerror(error), self.root)
        utf8, offsets = np.empty(length, np.uint8), np.empty(count + 1, np.int64)
        size, stamp, state = (np.empty(count, np.int64) for _ in range(3))
        columns = (utf8, offsets, size, stamp, state)
        _native.call("cpu", "take_listing", handle, *(column.ctypes.data for column in columns))
        found = Keys(utf8, offsets)
        left_out = {
            os.fsdecode(found.raw(i)): _why(int(state[i]))
            for i in np.flatnonzero((state != 0) & (state != -1)).tolist()
        }
        folders = sorted(found.raw(i) for i in np.flatnonzero(state < 0).tolist())
        good = np.flatnonzero(state == 0)
        return Listing(found.select(good), size[good], stamp[good], [os.fsdecode(one) for one in folders], left_out)

    def read(self, path: str) -> bytes:
        with open(self.place(path), "rb", buffering=0) as file:
            return file.read()

    def read_range(self, path: str, offset: int, size: int) -> bytes:
        descriptor = os.open(self.place(path), os.O_RDONLY | os.O_CLOEXEC)
        try:
            return os.pread(descriptor, size, offset)
        finally:
            os.close(descriptor)

    def stat(self, path: str) -> Found:
        status = os.stat(self.place(path))
        return Found(path, status.st_size, status.st_mtime_ns)

    def exists(self, path: str = "") -> bool:
        return os.path.exists(self.place(path))

    def is_dir(self, path: str = "") -> bool:
        return os.path.isdir(self.place(path))

    def place(self, path: str) -> str:
        return os.path.join(self.root, path) if path else self.root


def _why(state: int) -> str:
    if state < 0:
        return f"the folder cannot be listed: {os.strerror(-1 - state)}"
    return f"cannot be read: {os.strerror(state)}"


def _open_remote(root: str) -> Files:
    try:
        core = importlib.import_module("fsspec.core")
    except ImportError:
        raise ValueError(f"{root}: URLs need fsspec: pip install 'fastlatent[remote]'") from None
    try:
        system, base = core.url_to_fs(root)
    except ImportError as error:
        raise ValueError(f"{root}: this protocol needs one more package: {error}") from None
    except ValueError as error:
        raise ValueError(f"{root}: {error}; expected a folder, or a URL of one that fsspec knows") from None
    return RemoteFiles(root, system, base.rstrip("/"))


@dataclass(frozen=True)
class RemoteFiles:
    """Files through fsspec; it, or the package behind it, tries again what fails.

    system: fsspec's file system. base: the root in its own words.
    """

    root: str
    system: Any = field(repr=False)
    base: str
    gap: int = 4 << 20  # 40 ms at 100 MB/s

    def listing(self) -> Listing:
        self.system.invalidate_cache()  # else a second look shows what the first one saw
        entries = self._call(lambda: self.system.find(self.base, withdirs=True, detail=True))
        files: dict[bytes, tuple[int, int]] = {}
        folders: set[bytes] = set()
        left_out: dict[str, str] = {}
        for name, info in entries.items():
            path = name.rstrip("/").removeprefix(self.base).removeprefix("/")
            if not path or any(part.startswith(".") for part in path.split("/")):
                continue
            raw = os.fsencode(path)
            parts = raw.split(b"/")
            folders.update(b"/".join(parts[:i]) for i in range(1, len(parts)))
            if info["type"] == "directory" or name.endswith("/"):
                folders.add(raw)
                continue
            size = info.get("size")
            if size is None:
                left_out[path] = f"cannot be read: {NO_SIZE}"
            else:
                files[raw] = int(size), self._stamp(name, info)
        order = sorted(files)
        columns = np.array([files[path] for path in order], np.int64).reshape(-1, 2)
        return Listing(
            Keys.of(order), columns[:, 0], columns[:, 1], [os.fsdecode(one) for one in sorted(folders)], left_out
        )

    def read(self, path: str) -> bytes:
        return self._call(lambda: self.system.cat_file(self._name(path)))

    def read_range(self, path: str, offset: int, size: int) -> bytes:
        return self._call(lambda: self.system.cat_file(self._name(path), start=offset, end=offset + size))

    def stat(self, path: str) -> Found:
        info = self._call(lambda: self.system.info(self._name(path)))
        if info.get("size") is None:
            raise OSError(f"{self.place(path)}: {NO_SIZE}")
        return Found(path, int(info["size"]), self._stamp(self._name(path), info))

    def exists(self, path: str = "") -> bool:
        return self._call(lambda: self.system.exists(self._name(path)))

    def is_dir(self, path: str = "") -> bool:
        return self._call(lambda: self.system.isdir(self._name(path)))

    def place(self, path: str) -> str:
        first, *chain = self.root.split("::")
        return "::".join((f"{first.rstrip('/')}/{path}" if path else first, *chain))

    def _name(self, path: str) -> str:
        return f"{self.base}/{path}" if path else self.base

    def _stamp(self, name: str, info: Mapping[str, Any]) -> int:
        said = next((info[one] for one in IDENTITIES if info.get(one) not in (None, "")), None)
        if said is None:
            said = self._call(lambda: self.system.ukey(name))
        text = str(said.timestamp() if isinstance(said, datetime) else said)  # memory:// says both
        return xxhash.xxh3_64_intdigest(text.encode()) >> 1

    def _call(self, request: Callable[[], T]) -> T:
        try:
            return request()
        except OSError:
            raise
        except Exception as error:  # every protocol has exceptions of its own
            raise OSError(f"{self.root}: {type(error).__name__}: {error}") from error
