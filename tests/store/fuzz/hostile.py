"""A small dataset with every file of the format, changes that make its files hostile, and what a reader may answer.

`Target.attempt` puts bytes in the place of one file and reads the whole dataset. Shared by hypothesis in
test_fuzz_parse.py and by atheris in fuzz_parse.py.
"""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import xxhash

from fastlatent.store.files import canonical_json
from fastlatent.store.reader import Dataset, build_state, root_digest
from fastlatent.store.records import RAGGED, Field, Quarantined, Schema
from fastlatent.store.rows import Rows
from fastlatent.store.scan import Entry
from fastlatent.store.statistics import Statistics
from fastlatent.store.writer import DatasetWriter

Pick = Callable[[int], int]  # n -> an integer from 0 to n - 1
KINDS = {
    "root": "dataset.json", "provenance": "provenance.json", "manifest": "manifest/000001.json",
    "statistics": "statistics/000001.json", "quarantine": "quarantine/000001.json",
    "index": "index/000001.safetensors", "shard": "shards/*/*.safetensors", "plan": "plan/000002.json",
    "journal": "journal/*.jsonl",
}  # fmt: skip
NAMED = ("manifest", "statistics", "quarantine", "index")  # by dataset.json, with their digest
PENDING = ("plan", "journal")  # of an encode in progress: no digest covers them
SECONDS = 1.0  # of processor time, for files of at most 1 MB
# What may stand in the place of any JSON value. It need not be JSON.
VALUES = [
    b"null", b"true", b"0", b"-1", b"-0", b"1.0", b"1e2", b"1e999", b"NaN", b"Infinity", b"-Infinity", b"[]", b"{}",
    b"9223372036854775807", b"9223372036854775808", b"18446744073709551616", b"-9223372036854775809",
    b"9" * 400, b"9" * 4300, b"9" * 4301,  # beyond float64; the longest integer Python reads, and one digit more
    b'""', b'"."', b'".."', b'"../x"', b'"/etc/passwd"', b'"shards"', b'"a\\u0000b"', b'"\\ud800"', b'"\\udc80"',
    b'"' + b"m" * 300 + b'"',  # longer than a file name may be
    b'"' + b"0" * 16 + b'"', b'"' + b"0" * 32 + b'"', b'"' + b"0" * 64 + b'"', b'"F64"', b'"BF16"',
    b'{"a":1,"a":2}', b'{"path":"dataset.json","bytes":0,"xxh3_128":"' + b"0" * 32 + b'"}', b"[0]", b"[[], [], []]",
    b"[0,9223372036854775807,9223372036854775807]", b"[0,1,1,1,1,1,1,1]", b"[-1,1]", b"[1,0]", b"[4,4.0]", b"[true]",
    b"[" * 100_000, b"[" * 100_000 + b"]" * 100_000, b'{"a":' * 100_000,
]  # fmt: skip
TOKENS = [*VALUES, b"\xef\xbb\xbf", b"\xff", b"\xed\xa0\x80", b"\0", b"\n", b",", b'"', b"\\", b"}", b"  "]
LENGTHS = (0, 1, 2, 7, 1 << 31, 1 << 32, 1 << 63, (1 << 64) - 1, 100_000_000, 100_000_001)  # of a header
PLACE = "@@ here @@"


def write_images(folder: Path, toy: ModuleType, finish: bool) -> None:
    """Moments of images, one bucket; without `finish` two files and one bad one more, and the commit left out."""
    source = toy.make_source(folder / "source", ["ant/1.jpg", "ant/2.jpg", "bee/1.jpg"])
    toy.write_file(source, "ant/bad.jpg", b"bad bytes")
    if finish:
        toy.build(folder / "dataset", source)
        return
    for name in ("bee/2.jpg", "bee/3.jpg", "bee/bad.jpg"):
        toy.write_file(source, name, name[4:].encode())
    entries, classes = toy.scan(source)
    with DatasetWriter.open(folder / "dataset", toy.PROVENANCE, classes, unit_rows=2, schema=toy.SCHEMA) as writer:
        for unit in writer.plan(entries):  # two journal lines or more: only a damaged last one counts for nothing
            writer.commit(unit, *toy.encode(unit))


def write_tokens(folder: Path, toy: ModuleType, finish: bool) -> None:
    """Everything else: groups, two buckets, one of them ragged, int8 with scales, further tensors."""
    extras = (Field("text", "U8", (RAGGED,)), Field("embedding", "BF16", (3,)), Field("time", "F64", ()))
    schema = Schema(((1, RAGGED, 4), (1, 3, 4)), "tokens", extras)
    entries = []
    for i in range(5 if finish else 9):
        key = f"{i}.bin"
        toy.write_file(folder / "source", key, key.encode())
        size, mtime = len(key), (folder / "source" / key).stat().st_mtime_ns
        entries.append(Entry(key, str(folder / "source" / key), -1, size, mtime, i // 3 % 2, f"clip {i // 3}", i % 3))
    with DatasetWriter.open(folder / "dataset", toy.PROVENANCE, [], unit_rows=2, schema=schema) as writer:
        for unit in writer.plan(entries):
            keys = [item.key for item in unit.items if item.key != "1.bin"]
            bad = [Quarantined(one.key, one.digest, "bad", "OSError") for one in unit.items if one.key == "1.bin"]
            count = len(keys)
            payload: Any = np.ones((count, 1, 3, 4), np.int8)
            scale: Any = np.ones((count, 1), np.float32)
            if RAGGED in unit.bucket:
                payload = [np.full((i + 1, 4), i, np.int8) for i in range(count)]
                scale = [np.ones(i + 1, np.float32) for i in range(count)]
            texts = [np.frombuffer(key.encode(), np.uint8) for key in keys]
            more = {"text": texts, "embedding": np.zeros((count, 3), np.uint16), "time": np.zeros(count)}
            writer.commit(unit, Rows(keys, payload, scale=scale, extras=more), bad)
        if finish:
            writer.finish()


WRITERS = {"images": write_images, "tokens": write_tokens}


class Target:
    """A dataset of one generation in `path`, with an encode of the second interrupted before its end."""

    def __init__(self, path: Path, toy: ModuleType, what: str):
        self.path = path / "dataset"
        for finish in (True, False):
            WRITERS[what](path, toy, finish)
        shards = Dataset.open(self.path).shards
        self.files = {kind: next(self.path.glob(pattern)) for kind, pattern in KINDS.items()}
        self.files["shard"] = self.path / shards[0].path
        self.originals = {file: file.read_bytes() for file in self.files.values()}
        self.committed, self.pending = read_dataset(self.path), read_pending(self.path)

    def original(self, kind: str) -> bytes:
        return self.originals[self.files[kind]]

    def attempt(self, kind: str, data: bytes, *, seal: bool) -> list[str]:
        """Read the dataset with `data` as its file `kind`; the errors that came. The file is put back.

        `seal`: every digest is made right again, as a liar would; then nothing is known of the values.

        Raises:
            AssertionError: other values than the committed ones were read, an error names no file, or reading
                took too long.
        """
        file = self.files[kind]
        before = {one: self.originals[one] for one in {file, self.files["root"], self.files["manifest"]}}
        try:
            file.write_bytes(data)
            if seal:
                self._seal(kind, data)
            errors = []
            for read, expected in ((read_dataset, self.committed), (read_pending, self.pending)):
                start = time.process_time()
                try:
                    found = read(self.path)
                    free = seal or (kind in PENDING and read is read_pending)
                    assert free or found == expected, f"{kind}: other values than were committed"
                except ValueError as error:
                    assert f"{self.path}/" in str(error), f"{kind}: an error that names no file: {error!r:.500}"
                    errors.append(str(error))
                taken = time.process_time() - start
                assert taken < SECONDS or len(data) > 1 << 20, f"{kind}: {taken:.1f} s for {len(data)} bytes"
            return errors
        finally:
            for one, contents in before.items():
                one.write_bytes(contents)

    def _seal(self, kind: str, data: bytes) -> None:
        try:
            root = json.loads((self.path / "dataset.json").read_bytes())
            if kind == "shard":
                manifest = json.loads(self.original("manifest"))
                entry = manifest["shards"][0]
                root["totals"]["bytes"] += len(data) - entry["bytes"]
                header = min(8 + struct.unpack("<Q", data[:8].ljust(8))[0], len(data))
                entry |= {"bytes": len(data), "header_bytes": header, "xxh3_128": xxhash.xxh3_128_hexdigest(data)}
                entry["header_xxh3_64"] = xxhash.xxh3_64_hexdigest(data[:header])
                self.files["manifest"].write_bytes(canonical_json(manifest))
                self._record(root, "manifest", self.files["manifest"].read_bytes())
            elif kind in NAMED:
                self._record(root, kind, data)
            root["xxh3_128"] = root_digest(root)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return  # the root itself is no JSON that has a digest: it stays as it is
        (self.path / "dataset.json").write_bytes(canonical_json(root))

    def _record(self, root: dict[str, Any], kind: str, data: bytes) -> None:
        places = {"manifest": root["manifests"][0], "index": root["indexes"][0]}
        record = places[kind] if kind in places else root[kind]
        record |= {"bytes": len(data), "xxh3_128": xxhash.xxh3_128_hexdigest(data)}


def read_dataset(path: Path) -> dict[str, object]:
    """Everything a reader gets from a dataset, but for the rows themselves and what is only informational."""
    dataset = Dataset.open(path)
    values = {name: value for name, value in vars(dataset).items() if not name.startswith("_")}
    del values["path"]
    values["provenance"] = dataset.provenance["hashed"]
    values["keys"] = [dataset.key(i) for i in range(len(dataset))]
    values["latent_std"], values["quarantined"] = dataset.statistics.latent_std, dataset.quarantined
    for i in range(len(dataset.shards)):
        shard = dataset.open_shard(i)
        for column in shard.columns.values():
            column.tobytes()  # every page that the header promises is there
        shapes = {name: (shard.dtypes[name], column.shape) for name, column in shard.columns.items()}
        values[f"shard {i}"] = (shard.bytes, shard.header_bytes, shard.header_xxh3_64, shard.metadata, shapes)
        shard.close()
    return {name: comparable(value) for name, value in values.items()}


def read_pending(path: Path) -> object:
    state = build_state(path)
    return state and {name: comparable(value) for name, value in vars(state).items()}


def comparable(value: object) -> object:
    if isinstance(value, np.ndarray):
        return value.dtype.str, value.shape, value.tobytes()
    return repr(value.to_dict() if isinstance(value, Statistics) else value)


def mutate(data: bytes, binary: bool, pick: Pick) -> bytes:
    """One to three changes of a file, or bytes that have nothing to do with it; `binary`: it is a safetensors file."""
    for _ in range(1 + pick(3)):
        data = (edit_header if binary else edit_json)(data, pick) if pick(2) else damage(data, pick)
    return data


def damage(data: bytes, pick: Pick) -> bytes:
    """What disks, copies and editors do."""
    at, end = sorted((pick(len(data) + 1), pick(len(data) + 1)))
    change = pick(7)
    if change == 0:
        return data[:at]
    if change == 1:
        return data + data[at:end]
    if change == 2:
        return data[:at] + bytes([pick(256)]) + data[at + 1 :]
    if change == 3:
        return data[:at] + bytes(end - at) + data[end:]
    if change == 4:
        return data[end:] + data[at:end] + data[:at]
    if change == 5:
        return data[:at] + data[end:]
    token = TOKENS[pick(len(TOKENS))]
    return data[:at] + token + data[at + len(token) * pick(2) :]


def edit_json(data: bytes, pick: Pick) -> bytes:
    """Replace, remove or repeat one value of a JSON file, or of one line of a journal."""
    lines = data.split(b"\n")
    number = pick(len(lines))
    try:
        if len(lines) > 2 and b"\n " in data:  # dataset.json is indented: one value on many lines
            return edit_value(data, pick)
        lines[number] = edit_value(lines[number], pick)
    except (ValueError, RecursionError):
        return damage(data, pick)
    return b"\n".join(lines)


def edit_header(data: bytes, pick: Pick) -> bytes:
    """The same for the header of a safetensors file; or a header's length that lies."""
    length = struct.unpack("<Q", data[:8].ljust(8, b"\0"))[0]
    if length > len(data) - 8 or not pick(8):
        return struct.pack("<Q", LENGTHS[pick(len(LENGTHS))]) + data[8:]
    try:
        text = edit_value(data[8 : 8 + length].rstrip(b" "), pick)
    except (ValueError, RecursionError):
        return damage(data, pick)
    text = text.ljust(length) if pick(2) else text
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


def edit_value(text: bytes, pick: Pick) -> bytes:
    """Raises ValueError, RecursionError: `text` is no JSON that has a value to change."""
    value = json.loads(text)
    places = list(places_of(value)) if isinstance(value, (dict, list)) else []
    if not places:
        raise ValueError("nothing to change")
    parent, name = places[pick(len(places))]
    change = pick(5)
    if change == 0:
        del parent[name]
        return json.dumps(value).encode()
    other = VALUES[pick(len(VALUES))]
    if change == 1:  # of as deep a structure as the parser may just take
        depth = pick(1200)
        other = b"[" * depth + b"]" * depth
    if change == 2:
        with_it, at = places[pick(len(places))]
        other = json.dumps(with_it[at]).encode()
    if change == 3:
        other = json.dumps(parent[name]).encode() + b"," + (json.dumps(name).encode() + b":" if name in parent else b"")
        other += VALUES[pick(len(VALUES))]
    parent[name] = PLACE
    return json.dumps(value).encode().replace(json.dumps(PLACE).encode(), other)


def places_of(value: Any) -> Any:
    """(container, name or number) of every value inside `value`."""
    for name, one in list(value.items() if isinstance(value, dict) else enumerate(value)):
        yield value, name
        if isinstance(one, (dict, list)):
            yield from places_of(one)
