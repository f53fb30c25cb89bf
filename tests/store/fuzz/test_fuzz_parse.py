"""Hostile files: a reader returns what was committed, or raises a ValueError that names a file, soon and in bounds."""

import importlib.util
import json
import os
import signal
import struct
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastlatent.store.reader import Dataset
from fastlatent.store.shard import Shard, write_shard

spec = importlib.util.spec_from_file_location("store_hostile", Path(__file__).with_name("hostile.py"))
assert spec is not None and spec.loader is not None
hostile = importlib.util.module_from_spec(spec)
spec.loader.exec_module(hostile)

BINARY = ("index", "shard")
SIZE = 300_000  # bytes of a text that is hostile by its size


@pytest.fixture(scope="module")
def targets(tmp_path_factory, toy):
    return {what: hostile.Target(tmp_path_factory.mktemp("hostile"), toy, what) for what in hostile.WRITERS}


@pytest.fixture(params=hostile.WRITERS)
def any_target(targets, request):
    return targets[request.param]


@pytest.fixture
def target(targets):
    return targets["images"]


# derandomize: the same files in every run. `make soak` goes through all values, and atheris searches.
@pytest.mark.parametrize("kind", hostile.KINDS)
@given(data=st.data(), seal=st.booleans())
@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_any_change(any_target, kind, data, seal):
    def pick(count):
        return data.draw(st.integers(0, count - 1))

    changed = hostile.mutate(any_target.original(kind), kind in BINARY, pick)
    errors = any_target.attempt(kind, changed, seal=seal)
    assert errors or seal or changed == any_target.original(kind) or kind in ("journal", "provenance", "plan", "shard")


@pytest.mark.parametrize("kind", hostile.KINDS)
@given(data=st.binary(max_size=200))
@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_any_bytes(target, kind, data):
    # A journal whose only line is torn is what a kill leaves, so it is no error.
    assert target.attempt(kind, data, seal=False) or kind == "journal"


def replaced(target, kind, at, value):
    """The file `kind` with the bytes `value` in the place of its value number `at`, or at the path `at`."""
    original = target.original(kind)
    text, head, tail = original, b"", b""
    if kind in BINARY:
        length = struct.unpack("<Q", original[:8])[0]
        text, tail = original[8 : 8 + length], original[8 + length :]
    elif kind == "journal":
        text, tail = original.split(b"\n", 1)
        tail = b"\n" + tail
    parsed = json.loads(text)
    if isinstance(at, int):
        parent, name = list(hostile.places_of(parsed))[at]
    else:
        parent, name = parsed, at[-1]
        for step in at[:-1]:
            parent = parent[step]
    parent[name] = hostile.PLACE
    changed = json.dumps(parsed).encode().replace(json.dumps(hostile.PLACE).encode(), value)
    if kind in BINARY:
        changed = changed.ljust(length)
        head = struct.pack("<Q", len(changed))
    return head + changed + tail


HUGE, NUL, SURROGATE, NESTED = b"9" * 4300, b'"a\\u0000b"', b'"\\ud800"', b"[" * 100_000
REFUSED = [
    ("root", ("generation",), b"NaN"), ("root", ("buckets", 0, "rows"), b"1e999"), ("root", ("indexes",), b"null"),
    ("root", ("manifests", 0, "path"), b'"."'), ("root", ("indexes", 0, "path"), b'"."'),
    ("root", ("manifests", 0, "path"), SURROGATE), ("root", ("statistics", "path"), NUL), ("root", ("classes",), HUGE),
    ("root", ("totals", "rows"), b"9" * 4301), ("root", ("fields",), NESTED),
    ("provenance", ("hashed", "size"), b"Infinity"), ("provenance", ("hashed", "size"), b"-1e999"),
    ("manifest", ("shards", 0, "path"), SURROGATE), ("manifest", ("shards", 0, "path"), NUL),
    ("manifest", ("shards", 0, "path"), b'"../x"'), ("manifest", ("shards", 0, "path"), b'"."'),
    ("manifest", ("shards", 0, "rows"), b"9223372036854775807"), ("manifest", ("shards", 0, "rows"), b"3.0"),
    ("manifest", ("shards", 0, "statistics", "count"), HUGE), ("manifest", ("shards", 0, "statistics", "m2"), b"[NaN]"),
    ("statistics", ("count",), HUGE), ("statistics", ("m2", 0), b"-1e9"), ("statistics", ("mean", 0), b"NaN"),
    ("statistics", ("posterior_variance", 0), b"-0.5"),
    ("quarantine", ("files", 0, "key"), b"7"), ("quarantine", ("files", 0, "size"), b"-1"),
    ("plan", ("generation",), b"2.0"), ("plan", ("units", 0, "bucket", 3), HUGE), ("plan", ("units", 0), NESTED),
    ("journal", ("shard", "path"), SURROGATE), ("journal", ("shard", "path"), NUL), ("journal", ("generation",), HUGE),
    ("journal", ("shard", "path"), b'"../../dataset.json"'), ("journal", ("shard", "statistics", "count"), HUGE),
    ("index", ("row", "shape"), b"[]"), ("index", ("row", "data_offsets"), b"[0.0, 12.0]"),
    ("index", ("key_hash", "shape", 0), b"-3"), ("index", ("label", "dtype"), b'"U64"'),
    ("shard", ("moments", "dtype"), b'"BF16"'), ("shard", ("moments", "shape", 0), b"true"),
    ("shard", ("moments", "data_offsets", 0), b"0"), ("shard", ("crop", "data_offsets"), b"[9223372036854775807, 0]"),
    ("shard", ("__metadata__", "fls.unit"), b"7"), ("shard", ("__metadata__",), NESTED),
    ("shard", ("_pad.0", "dtype"), b'"U16"'), ("shard", ("_pad.0",), b'{}, "_pad.0": {}'),
]  # fmt: skip


TOKENS_REFUSED = [
    ("root", ("fields", 1, "dtype"), b'"F63"'), ("root", ("fields", 1, "shape", 0), b"0"),
    ("root", ("fields", 1, "name"), b'"key"'), ("root", ("fields", 2, "shape", 0), b"4"),
    ("root", ("buckets", 0, "shape"), b"[1,-1,-1]"), ("root", ("buckets", 1, "shape", 0), b"9" * 4300),
    ("shard", ("tokens.scale", "dtype"), b'"U32"'), ("shard", ("tokens", "shape"), b"[4]"),
    ("shard", ("text.offsets", "shape"), b"[]"), ("shard", ("embedding", "dtype"), b'"F16"'),
]  # fmt: skip


@pytest.mark.parametrize(
    "what, kind, at, value",
    [("images", *one) for one in REFUSED] + [("tokens", *one) for one in TOKENS_REFUSED],
    ids=lambda part: str(part)[:40],
)
def test_a_lie_whose_digests_are_right_is_refused(targets, what, kind, at, value):
    assert targets[what].attempt(kind, replaced(targets[what], kind, at, value), seal=True)


@pytest.mark.soak
@pytest.mark.parametrize("kind", hostile.KINDS)
def test_every_value_in_every_place(any_target, kind):
    original = any_target.original(kind)
    length = struct.unpack("<Q", original[:8])[0]
    text = original[8 : 8 + length] if kind in BINARY else original.split(b"\n")[0] if kind == "journal" else original
    for at in range(len(list(hostile.places_of(json.loads(text))))):
        for value in hostile.VALUES:
            any_target.attempt(kind, replaced(any_target, kind, at, value), seal=True)


@pytest.mark.parametrize("kind", ["root", "provenance", "journal"])
def test_json_of_any_depth(target, kind):
    # Python's parser, its encoder and repr() stop at slightly different depths near the recursion limit.
    for depth in (10, *range(sys.getrecursionlimit() - 110, sys.getrecursionlimit() + 5), 100_000):
        for left, right in ((b"[", b"]"), (b'{"a":', b"}")):
            nested = left * depth + b"1" + right * depth
            target.attempt(kind, target.original(kind).replace(b"{", b'{"later":' + nested + b",", 1), seal=False)


def test_a_column_of_no_rows_and_endless_others(tmp_path):
    # 0 x 2**62 x 8 bytes are no bytes, as the offsets say; numpy has no such array.
    for shape in ([0, 1 << 62], [1 << 62, 0, 1 << 62]):
        text = json.dumps({"a": {"dtype": "F64", "shape": shape, "data_offsets": [0, 0]}}).encode()
        (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
        with pytest.raises(ValueError, match=r"a\.safetensors"):
            Shard.open(tmp_path / "a.safetensors")


def test_an_index_whose_columns_agree_on_no_rows_at_all(target):
    # Scalars: their shapes agree with each other, and len() of one is a TypeError.
    original = target.original("index")
    length = struct.unpack("<Q", original[:8])[0]
    header = json.loads(original[8 : 8 + length])
    metadata = header["__metadata__"]
    end, entries = 0, {}
    for name, entry in header.items():
        if name not in ("__metadata__", "key.utf8") and not name.startswith("_pad."):
            size = {"U16": 2, "U32": 4, "I32": 4}.get(entry["dtype"], 8)
            entries[name] = {"dtype": entry["dtype"], "shape": [], "data_offsets": [end, end + size]}
            end += size
    text = json.dumps({"__metadata__": metadata, **entries}).encode()
    assert target.attempt("index", struct.pack("<Q", len(text)) + text + bytes(end), seal=True)


def hostile_text(name):
    return {
        "spaces": b" " * SIZE,
        "brackets": b"[" * SIZE,
        "one string": b'"' + b"m" * SIZE + b'"',
        "escapes": b'"' + b"\\u1234" * (SIZE // 6) + b'"',
        "one wide character": b'"' + b"m" * SIZE + '\U0001f600"'.encode(),
        "numbers": b"[" + b"0," * (SIZE // 2) + b"0]",
        "longest numbers": b"[" + b",".join([b"9" * 4300] * (SIZE // 4301)) + b"]",
        "empty lists": b"[" + b"[]," * (SIZE // 3) + b"[]]",
        "names": b"{" + b",".join(b'"%x":0' % i for i in range(SIZE // 8)) + b"}",
    }[name]


@pytest.mark.parametrize(
    "name, times",
    [
        ("spaces", 3), ("brackets", 3), ("one string", 4), ("escapes", 4), ("longest numbers", 4),
        # Python's objects: 4 bytes a character once one needs them, 8 for a reference, 56 for an empty list.
        ("one wide character", 10), ("numbers", 8), ("empty lists", 30), ("names", 30),
    ],
)  # fmt: skip
def test_memory_is_bounded_by_the_file(target, tmp_path, name, times):
    """A header or dataset.json takes at most 30 times its own size, however hostile, and 3 where it is no JSON."""
    text = hostile_text(name)
    header = tmp_path / "a.safetensors"
    header.write_bytes(struct.pack("<Q", len(text)) + text)
    target.files["root"].write_bytes(text)
    try:
        for read, path in ((Shard.open, header), (Dataset.open, target.path)):
            tracemalloc.start()
            start = time.process_time()
            with pytest.raises(ValueError, match="expected"):
                read(path)
            taken, peak = time.process_time() - start, tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            assert peak < times * len(text) + 100_000
            assert taken < 3  # seconds; tracemalloc makes it 5 times as long
    finally:
        target.files["root"].write_bytes(target.original("root"))


@pytest.mark.parametrize("length", [100_000_001, 1 << 31, (1 << 31) + 12345, 1 << 40, 1 << 63, (1 << 64) - 1])
def test_a_header_that_claims_gigabytes_takes_no_memory(tmp_path, length):
    path = tmp_path / "a.safetensors"
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", length) + b"{")
        file.truncate((1 << 31) + (1 << 20))  # sparse; long enough for a header of 2 GiB
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"a\.safetensors: expected a safetensors header of 2 to 100000000 bytes"):
        Shard.open(path)
    assert tracemalloc.get_traced_memory()[1] < 100_000
    tracemalloc.stop()


def put_ring(file):
    file.symlink_to(file.name)


# What lies in the place of the file, and how it goes.
NO_FILES = {
    "ring of links": (put_ring, Path.unlink),
    "folder": (Path.mkdir, Path.rmdir),
    "pipe": (os.mkfifo, Path.unlink),
}


@pytest.mark.parametrize("kind", [kind for kind in hostile.KINDS if kind not in hostile.PENDING])
@pytest.mark.parametrize("name", NO_FILES)
def test_what_is_no_file_is_refused(target, tmp_path, kind, name):
    """At once: whoever opens a pipe waits for its writer."""
    make, remove = NO_FILES[name]
    file = target.files[kind]

    def late(number, frame):
        raise AssertionError(f"waits for {file}")

    file.rename(tmp_path / "put aside")
    make(file)
    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, 0.5)
    try:
        with pytest.raises(ValueError, match=str(target.path)):
            hostile.read_dataset(target.path)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        remove(file)
        (tmp_path / "put aside").rename(file)


@given(count=st.integers(0, 40), data=st.data())
@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_a_shard_with_any_one_byte_changed_in_its_header(tmp_path_factory, count, data):
    """Without a manifest's digests: either refused, or every column has the bytes that its header promises."""
    columns = {"a": np.arange(count, dtype="<u8"), "b": np.arange(3 * count, dtype="<f4").reshape(count, 3)}
    path = write_shard(tmp_path_factory.mktemp("shard"), "u" * 32, columns, (), {"fls.format": "fls/1"}).path
    raw = bytearray(path.read_bytes())
    length = struct.unpack("<Q", raw[:8])[0]
    at = data.draw(st.integers(0, 8 + len(raw[8 : 8 + length].rstrip(b" "))))
    raw[at] = data.draw(st.integers(0, 255))
    path.write_bytes(raw)
    try:
        shard = Shard.open(path)
    except ValueError as error:
        assert path.name in str(error)
    else:
        assert sum(len(column.tobytes()) for column in shard.columns.values()) <= len(raw)


@pytest.mark.soak
@pytest.mark.skipif(importlib.util.find_spec("atheris") is None, reason="atheris is not installed")
def test_atheris_finds_nothing_in_60_seconds(tmp_path):
    script = Path(__file__).with_name("fuzz_parse.py")
    limits = ["-max_total_time=60", "-timeout=5", "-rss_limit_mb=2048", "-max_len=512", "-len_control=0"]
    command = [sys.executable, script, *limits]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert "Done " in done.stderr, done.stderr[-2000:]
