import hashlib
import json
import os
import struct
import subprocess
import sys

import numpy as np
import pytest
import torch
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from safetensors import safe_open
from safetensors.torch import load_file

from fastlatent.store.shard import DTYPES, Shard, write_shard

COLUMNS = {
    "sample_id": np.arange(3, dtype=np.uint64) * 1000,
    "key.utf8": np.frombuffer(b"abcdefg", np.uint8),
    "crop": np.arange(12, dtype=np.int32).reshape(3, 4),
    "moments": (np.arange(3 * 8 * 4 * 4) / 8).astype(np.float16).reshape(3, 1, 8, 4, 4),
}
METADATA = {"fls.format": "fls/1", "a": "é"}


def write(path, columns=COLUMNS, bf16=(), metadata=METADATA):
    return write_shard(path, "u" * 32, columns, bf16, metadata)


names = st.text(min_size=1, max_size=20).filter(lambda name: not name.startswith("_pad.") and name != "__metadata__")
columns = st.dictionaries(
    names.filter(lambda name: name.encode("utf-8", "ignore").decode() == name),
    st.sampled_from(sorted(set(DTYPES.values()))).flatmap(
        lambda dtype: arrays.arrays(dtype, arrays.array_shapes(min_dims=0, max_dims=5, min_side=0, max_side=20))
    ),
    max_size=6,
)


@given(
    columns=columns,
    metadata=st.dictionaries(st.text(max_size=9), st.text(max_size=9), max_size=3),
    bf16=st.sets(st.integers(0, 5)),
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_columns_come_back_bit_by_bit(tmp_path_factory, columns, metadata, bf16):
    """Through our reader, and through that of safetensors."""
    bits = {name for i, (name, column) in enumerate(columns.items()) if i in bf16 and column.dtype == np.uint16}
    file = write(tmp_path_factory.mktemp("shard"), columns, bits, metadata)
    shard = Shard.open(file.path, expected_bytes=file.bytes)
    assert shard.metadata == metadata
    assert list(shard.columns) == list(columns)
    with safe_open(file.path, "pt") as plain:
        assert (plain.metadata() or {}) == metadata
        for name, column in columns.items():
            found, theirs = shard.columns[name], plain.get_tensor(name)
            assert (found.dtype, found.shape, shard.dtypes[name] == "BF16") == (
                column.dtype,
                column.shape,
                name in bits,
            )
            assert found.tobytes() == column.tobytes()
            assert (theirs.dtype == torch.bfloat16, tuple(theirs.shape)) == (name in bits, column.shape)
            assert theirs.reshape(-1).view(torch.uint8).numpy().tobytes() == column.tobytes()
    shard.close()


@given(columns=columns)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_every_tensor_begins_on_a_page(tmp_path_factory, columns):
    file = write(tmp_path_factory.mktemp("shard"), columns)
    data = file.path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    assert file.header_bytes == 8 + length and (8 + length) % 4096 == 0
    for name in columns:
        assert header[name]["data_offsets"][0] % 4096 == 0
    assert all(
        entry["data_offsets"][1] - entry["data_offsets"][0] < 4096 for name, entry in header.items() if "_pad" in name
    )


def test_digests_and_name(tmp_path):
    file = write(tmp_path)
    data = file.path.read_bytes()
    assert file.bytes == len(data)
    assert file.xxh3_128 == xxhash.xxh3_128_hexdigest(data)
    assert file.header_xxh3_64 == xxhash.xxh3_64_hexdigest(data[: file.header_bytes])
    assert file.path == tmp_path / f"{'u' * 32}-{file.xxh3_128}.safetensors"


def test_the_format_is_what_it_was(tmp_path):
    # Pinned: a change here makes files that readers of fls/1 have never seen. Do not update; see fastlatent.store.
    file = write(tmp_path)
    header = file.path.read_bytes()[8 : file.header_bytes].rstrip(b" ")
    assert header == (
        b'{"__metadata__":{"a":"\\u00e9","fls.format":"fls/1"},'
        b'"sample_id":{"dtype":"U64","shape":[3],"data_offsets":[0,24]},'
        b'"_pad.0":{"dtype":"U8","shape":[4072],"data_offsets":[24,4096]},'
        b'"key.utf8":{"dtype":"U8","shape":[7],"data_offsets":[4096,4103]},'
        b'"_pad.1":{"dtype":"U8","shape":[4089],"data_offsets":[4103,8192]},'
        b'"crop":{"dtype":"I32","shape":[3,4],"data_offsets":[8192,8240]},'
        b'"_pad.2":{"dtype":"U8","shape":[4048],"data_offsets":[8240,12288]},'
        b'"moments":{"dtype":"F16","shape":[3,1,8,4,4],"data_offsets":[12288,13056]}}'
    )
    assert file.xxh3_128 == "eaca3fe4634c9802e3ca4db67380696e"


def test_plain_safe_open_reads_it(tmp_path):
    bits = np.arange(6, dtype=np.uint16).reshape(2, 3)
    file = write(tmp_path, {**COLUMNS, "bits": bits, "empty": np.zeros((0, 3), np.float32)}, {"bits"})
    with safe_open(file.path, "numpy") as opened:
        assert opened.metadata() == METADATA
        for name, column in COLUMNS.items():
            np.testing.assert_array_equal(opened.get_tensor(name), column)
        assert set(opened.keys()) - set(COLUMNS) - {"bits", "empty"} == {f"_pad.{i}" for i in range(5)}
    loaded = load_file(file.path)
    assert loaded["bits"].dtype == torch.bfloat16
    np.testing.assert_array_equal(loaded["bits"].view(torch.int16).numpy(), bits)
    assert Shard.open(file.path).dtypes["bits"] == "BF16"
    np.testing.assert_array_equal(Shard.open(file.path).columns["bits"], bits)


def test_views_are_writable_and_the_file_never_changes(tmp_path):
    file = write(tmp_path)
    before = file.path.read_bytes()
    one, other = Shard.open(file.path), Shard.open(file.path)
    one.columns["moments"][:] = 7
    assert file.path.read_bytes() == before
    np.testing.assert_array_equal(other.columns["moments"], COLUMNS["moments"])
    view = one.columns["moments"]
    one.close()
    assert (view == 7).all()  # a view outlives its shard


def test_arrays_of_any_layout(tmp_path):
    big_endian = np.arange(6, dtype=">f4").reshape(2, 3)
    strided = np.arange(24, dtype=np.int32).reshape(4, 6)[::2, ::-3]
    shard = Shard.open(write(tmp_path, {"big": big_endian, "strided": strided, "scalar": np.array(5, np.int64)}).path)
    np.testing.assert_array_equal(shard.columns["big"], big_endian)
    np.testing.assert_array_equal(shard.columns["strided"], strided)
    assert shard.columns["scalar"] == 5 and shard.columns["scalar"].shape == ()


@pytest.mark.parametrize(
    "columns, bf16",
    [
        ({"_pad.7": np.zeros(1)}, ()), ({"__metadata__": np.zeros(1)}, ()), ({"c": np.zeros(1, np.complex64)}, ()),
        ({"o": np.array(["x"])}, ()), ({"b": np.zeros(1, bool)}, ()), ({"f": np.zeros(1, np.float32)}, {"f"}),
    ],
)  # fmt: skip
def test_write_refuses(tmp_path, columns, bf16):
    with pytest.raises(ValueError, match="column"):
        write(tmp_path, columns, bf16)
    assert list(tmp_path.iterdir()) == []


def tensor(dtype="U8", shape=(4,), offsets=(0, 4)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


LIES = {
    "no object": [],
    "metadata no object": {"__metadata__": [], "a": tensor()},
    "metadata not strings": {"__metadata__": {"a": 1}, "a": tensor()},
    "no tensor": {"a": 7},
    "a missing member": {"a": {"dtype": "U8", "shape": [4]}},
    "a member too many": {"a": {**tensor(), "x": 1}},
    "unknown dtype": {"a": tensor("F4")},
    "dtype no string": {"a": tensor(["U8"])},
    "dtype of another size": {"a": tensor("U16")},
    "shape too small": {"a": tensor(shape=(3,))},
    "shape negative": {"a": tensor(shape=(-2, -2))},
    "shape no integer": {"a": tensor(shape=(4.0,))},
    "shape true": {"a": tensor(shape=(4, True))},
    "shape no list": {"a": {**tensor(), "shape": "4"}},
    "shape beyond 64 bits": {"a": tensor(shape=(1 << 64,))},
    "shape whose product overflows": {"a": tensor(shape=(1 << 62, 1 << 62))},
    "shape of nine dimensions": {"a": tensor(shape=(4, 1, 1, 1, 1, 1, 1, 1, 1))},
    "offsets reversed": {"a": tensor(offsets=(4, 0))},
    "offsets negative": {"a": tensor(offsets=(-4, 0))},
    "one offset": {"a": tensor(offsets=(0,))},
    "a hole in front": {"a": tensor(offsets=(4, 8)), "b": tensor(shape=(0,), offsets=(8, 8))},
    "a hole": {"a": tensor("U8", (1,), (0, 1)), "b": tensor("U8", (1,), (3, 4))},
    "an overlap": {"a": tensor("U8", (3,), (0, 3)), "b": tensor("U8", (2,), (2, 4))},
    "past the end": {"a": tensor(shape=(8,), offsets=(0, 8))},
    "bytes that belong to none": {"a": tensor(shape=(2,), offsets=(0, 2))},
}


@pytest.mark.parametrize("name", LIES)
def test_a_header_that_lies_is_refused(tmp_path, name):
    text = json.dumps(LIES[name]).encode()
    path = tmp_path / "lie.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"1234")
    with pytest.raises(ValueError, match=r"lie\.safetensors"):
        Shard.open(path)


@pytest.mark.parametrize(
    "data",
    [
        b"", b"1234567", struct.pack("<Q", 0), struct.pack("<Q", 1) + b"{", struct.pack("<Q", 3) + b"{}",
        struct.pack("<Q", 2) + b"{}" + b"x", struct.pack("<Q", 1 << 63) + b"{}", struct.pack("<Q", 100_000_001) + b"{}",
        struct.pack("<Q", 4) + b"{\xff}x", struct.pack("<Q", 20_000) + b"[" * 20_000,
        struct.pack("<Q", 16) + b'{"a":{},"a":{}} ',
    ],
)  # fmt: skip
def test_what_is_no_header_is_refused(tmp_path, data):
    path = tmp_path / "lie.safetensors"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"lie\.safetensors"):
        Shard.open(path)


def test_a_header_above_100_mb_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / "lie.safetensors"
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", 100_000_001))
        file.truncate(200_000_000)  # sparse: no such header is on the disk
    with pytest.raises(ValueError, match="header of 2 to 100000000 bytes"):
        Shard.open(path)


def test_truncated_and_extended_files_are_refused(tmp_path):
    file = write(tmp_path)
    data = file.path.read_bytes()
    for size in (0, 7, 8, 100, 4095, 4096, len(data) - 1):
        file.path.write_bytes(data[:size])
        for expected in (None, file.bytes):
            with pytest.raises(ValueError, match=file.path.name):
                Shard.open(file.path, expected_bytes=expected)
    file.path.write_bytes(data + b"\0")
    for expected in (None, file.bytes):
        with pytest.raises(ValueError, match=file.path.name):
            Shard.open(file.path, expected_bytes=expected)


@pytest.mark.parametrize("path", ["missing", "."])
def test_what_is_no_file_is_refused(tmp_path, path):
    with pytest.raises(ValueError, match=str(tmp_path)):
        Shard.open(tmp_path / path)


READ = """
import hashlib, json, sys
import safetensors
from safetensors import safe_open
import torch
found = {}
for path in sys.argv[1:]:
    with safe_open(path, framework="pt") as file:
        assert file.metadata()["fls.format"] == "fls/1"
        for name in file.keys():
            tensor = file.get_tensor(name)
            digest = hashlib.sha256(tensor.reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
            found[f"{path} {name}"] = [str(tensor.dtype), list(tensor.shape), digest]
print(json.dumps([safetensors.__version__, safetensors.__file__, found]))
"""


@pytest.mark.soak
@pytest.mark.parametrize("version", ["==0.3.3", ""], ids=["0.3.3", "newest"])
def test_other_versions_of_safetensors_read_every_shard(tmp_path, toy, dataset, version):
    # The oldest that this format promises to, of 2023-08, and whatever is the newest today.
    folder = tmp_path / "safetensors"
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", folder, f"safetensors{version}"]
    subprocess.run(install, check=True, timeout=300)
    every = {name: np.arange(48).astype(dtype).reshape(2, 3, 8) for name, dtype in DTYPES.items()}
    metadata = {"fls.format": "fls/1"}
    paths = [*dataset.glob("shards/*/*"), *dataset.glob("index/*"), write(tmp_path, every, {"BF16"}, metadata).path]
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    done = subprocess.run([sys.executable, "-c", READ, *paths], env=environment, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    found_version, where, found = json.loads(done.stdout)
    assert where.startswith(str(folder)) and found_version.startswith(version.removeprefix("=="))
    for path in paths:
        shard = Shard.open(path)
        for name, column in shard.columns.items():
            dtype, shape, digest = found[f"{path} {name}"]
            assert (shape, digest) == (list(column.shape), hashlib.sha256(column.tobytes()).hexdigest())
            assert (dtype == "torch.bfloat16") == (shard.dtypes[name] == "BF16")
    assert len({dtype for dtype, _, _ in found.values()}) == len(DTYPES)  # I8, BF16 and F64 among them
