import gzip
import io
import math
import os
import pickle
import struct
import tracemalloc
import zipfile

import ml_dtypes
import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastlatent.data import packed_files
from fastlatent.data.array_files import (
    DamagedArrays,
    extract_latent,
    map_pt,
    npy_bytes,
    npz_bytes,
    pt_bytes,
    read_npy,
    read_npz,
    read_pt,
    read_safetensors,
    safetensors_bytes,
    to_tensor,
    to_values,
)

VALUES = np.random.default_rng(0).standard_normal((2, 3, 4)).astype("<f4")
READERS = {"npy": read_npy, "npz": read_npz, "pt": read_pt, "safetensors": read_safetensors}
WHOLE = {
    "npy": npy_bytes(VALUES),
    "npz": npz_bytes({"moments": VALUES, "b": VALUES[0]}),
    "deflated": npz_bytes({"moments": VALUES}, compressed=True),
    "pt": pt_bytes({"latent": torch.from_numpy(VALUES), "n": [VALUES[0, 0], 3, "x"]}),
    "safetensors": safetensors_bytes({"latent": torch.from_numpy(VALUES)}, {"b": "☃", "a": '"\n'}),
    **{f"{kind}.gz": gzip.compress(npy_bytes(VALUES)) for kind in ("npy", "pt", "safetensors")},
}


def saved(save, *args, **more) -> bytes:
    stream = io.BytesIO()
    save(stream, *args, **more)
    return stream.getvalue()


def torch_saved(value, **more) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream, **more)
    return stream.getvalue()


# What is read


@pytest.mark.parametrize("dtype", ["<f2", ">f4", "<f8", "|b1", "<u2", ">i8", "|i1"])
@pytest.mark.parametrize("shape", [(), (0, 3), (5,), (1, 2, 3)], ids=str)
def test_npy_is_what_numpy_saves(dtype, shape):
    array = (np.arange(math.prod(shape)).reshape(shape) % 2).astype(dtype)
    for one in (array, np.asfortranarray(array)):
        for data in (saved(np.save, one), gzip.compress(saved(np.save, one)), memoryview(saved(np.save, one))):
            got = read_npy(data)
            assert got.dtype == np.dtype(dtype).newbyteorder("=") and got.shape == one.shape
            assert np.array_equal(got, one)
    assert npy_bytes(array) == saved(np.save, array)


def test_a_stored_array_is_a_view():
    data = npy_bytes(VALUES)
    assert np.shares_memory(read_npy(data), np.frombuffer(data, "u1"))
    assert not read_npy(data).flags.writeable and read_npy(bytearray(data)).flags.writeable
    data = npz_bytes({"a": VALUES})
    assert np.shares_memory(read_npz(data)["a"], np.frombuffer(data, "u1"))


def test_bits_of_bfloat16_come_as_uint16():
    bits = np.arange(6, dtype="u2")
    assert np.array_equal(read_npy(saved(np.save, bits.view(ml_dtypes.bfloat16))), bits)


def test_npz_is_what_numpy_saves():
    arrays = {"moments": VALUES, "file": VALUES[0], "träge/☃": np.float16(3)}
    for compressed in (False, True):
        assert npz_bytes({"a": VALUES}, compressed) == saved((np.savez, np.savez_compressed)[compressed], a=VALUES)
        got = read_npz(npz_bytes(arrays, compressed))
        assert list(got) == list(arrays) and all(np.array_equal(got[name], arrays[name]) for name in arrays)
    assert list(read_npz(npz_bytes(arrays), ("file", "gone"))) == ["file"]
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:  # a note beside the arrays, and a comment behind them
        archive.writestr("a.npy", npy_bytes(VALUES))
        archive.writestr("note.txt", "x")
        archive.comment = b"made by hand"
    assert list(read_npz(stream.getvalue())) == ["a"]


def test_zip64(monkeypatch):
    # zipfile writes its long records for archives beyond 4 GiB, or for what it takes to be that long.
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 10)
    data = npz_bytes({"a": VALUES, "b": VALUES})
    assert b"PK\6\6" in data and b"PK\6\7" in data
    assert np.array_equal(read_npz(data)["b"], VALUES)


def test_pt_is_what_torch_saves(tmp_path):
    value = {"a": torch.ones(3).bfloat16(), "n": VALUES, "l": [1, (2.5, None, "☃"), b"\xff\0x"], "t": torch.zeros(0)}
    for legacy in (False, True):
        (tmp_path / "x.pt").write_bytes(torch_saved(value, _use_new_zipfile_serialization=not legacy))
        data = (tmp_path / "x.pt").read_bytes()
        for got in (read_pt(data), read_pt(gzip.compress(data)), map_pt(tmp_path / "x.pt")):
            assert torch.equal(got["a"], value["a"]) and np.array_equal(got["n"], VALUES) and got["l"] == value["l"]
    assert pt_bytes(value) == torch_saved(value)


def test_pt_bytes_of_a_view_hold_the_view_alone():
    whole = torch.arange(100_000.0)
    data = pt_bytes({"latent": [whole[5:8]]})
    assert len(data) < 4_000 and torch.equal(read_pt(data)["latent"][0], whole[5:8])


def test_safetensors_are_what_the_library_saves():
    tensors = {
        f"{i}": torch.ones(i, 2).to(dtype) for i, dtype in enumerate([torch.float64, torch.bool, torch.bfloat16])
    }
    data = safetensors.torch.save(tensors, {"a": '"\n☃'})
    assert safetensors_bytes(tensors, {"a": '"\n☃'}) == data
    for bytes_of in (data, bytearray(data), gzip.compress(data)):
        got, metadata = read_safetensors(bytes_of)
        assert metadata == {"a": '"\n☃'} and got.keys() == tensors.keys()
        assert all(torch.equal(got[name], tensors[name]) and got[name].dtype == tensors[name].dtype for name in got)
    assert read_safetensors(safetensors_bytes({}, {"a": "b"})) == ({}, {"a": "b"})


def test_the_order_of_metadata_and_tensors_changes_no_byte():
    names = list("abcdefgh")
    made = {
        safetensors_bytes({name: torch.ones(1) for name in order}, {name: name for name in order})
        for order in (names, names[::-1], names[3:] + names[:3])
    }
    assert len(made) == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_values_and_back(dtype):
    tensor = torch.randn(2, 3).to(dtype)
    values, name = to_values(tensor)
    values.flags.writeable = False
    back = to_tensor(values, name)
    assert back.dtype == dtype and torch.equal(back, tensor)
    odd = np.frombuffer(b"x" + values.tobytes(), values.dtype, offset=1).reshape(2, 3)  # as in a .npz
    assert torch.equal(to_tensor(odd, name), tensor)
    with pytest.raises(DamagedArrays, match="got torch.int64"):
        to_values(torch.ones(2, dtype=torch.int64))


# The one latent


TENSOR = torch.from_numpy(VALUES)


@pytest.mark.parametrize(
    "loaded",
    [
        TENSOR, VALUES, VALUES.astype(">f4"), [TENSOR], (VALUES,), {"latent": TENSOR},
        {"latents": VALUES, "mask": VALUES}, {"moments": [TENSOR], "mask": VALUES},
        {"x": TENSOR, "sigma": 1.0}, VALUES.tolist(), [VALUES.tolist()],
        {"latent": VALUES.tolist()}, {"x": VALUES.tolist()}, torch.nn.Parameter(TENSOR),
    ],
    ids=range(14),
)  # fmt: skip
def test_what_extract_latent_takes(loaded):
    got = extract_latent(loaded)
    assert got.dtype == torch.float32 and torch.equal(got.reshape(TENSOR.shape), TENSOR)
    assert not got.requires_grad and got.is_contiguous()


@pytest.mark.parametrize(
    ("loaded", "message"),
    [
        ([TENSOR, TENSOR], "got a list of 2; save one latent a file"),
        ([[1.0, 2.0], [3.0]], "nested lists that are no array"),
        ({"a": TENSOR, "b": TENSOR}, "got a dict of a, b"),
        ({"latent": TENSOR, "latents": TENSOR}, "got a dict of latent, latents"),
        ({}, "got a dict of nothing"),
        ("x", "got a str"),
        (3.0, "got a float"),
        ([True], "got a bool"),
        (None, "got a NoneType"),
        (TENSOR.long(), "got torch.int64"),
        (VALUES.astype("u2"), "numpy array of uint16; if these are bfloat16's bits"),
        (TENSOR[:0], "the empty shape"),
        ([10**400], "nested lists that are no array"),
    ],
    ids=range(13),
)
def test_what_extract_latent_refuses(loaded, message):
    with pytest.raises(DamagedArrays, match=message):
        extract_latent(loaded)


# Damaged and hostile files


def refused(reader, data: bytes, message: str) -> None:
    """And without allocating more than four times the bytes (64 KiB are Python's own, once it has imported all)."""
    with pytest.raises(DamagedArrays, match=message):
        reader(data)
    tracemalloc.start()
    with pytest.raises(DamagedArrays, match=message):
        reader(data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak <= 4 * len(data) + 65_536, peak


def header(shape: str, descr: str = "<f4", fortran: str = "False") -> bytes:
    text = f"{{'descr': '{descr}', 'fortran_order': {fortran}, 'shape': {shape}, }}".encode()
    return b"\x93NUMPY\1\0" + len(text).to_bytes(2, "little") + text


def zipped(content: bytes, method: int = zipfile.ZIP_STORED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", method) as archive:
        archive.writestr("a.npy", content)
    return stream.getvalue()


class Harmful:
    def __reduce__(self):
        return os.system, ("exit 1",)


def test_claims_are_not_believed():
    refused(read_npy, header("(1099511627776,)") + bytes(8), "truncated: expected 4398046511104 bytes")
    refused(read_npy, gzip.compress(header("(1099511627776,)")), "expected at most 64 bytes unpacked")
    refused(read_npy, header("(0, 4611686018427387904)"), "the .npy header is damaged: shape")
    refused(read_npy, header("(-2, -2)") + bytes(16), "damaged: shape")
    refused(read_npz, zipped(header("(1099511627776,)")), "'a': truncated")
    bomb = zipped(header("(1000000000,)") + bytes(100_000_000), zipfile.ZIP_DEFLATED)
    refused(read_npz, bomb, "expected at most 64 bytes unpacked")
    refused(read_safetensors, (2**60).to_bytes(8, "little") + b"{}", "expected a safetensors file, got 10 bytes")
    text = b'{"a":{"dtype":"F32","shape":[1099511627776],"data_offsets":[0,4398046511104]}}'
    refused(read_safetensors, len(text).to_bytes(8, "little") + text, "expected 4398046511190 bytes as its header says")


def test_bombs_of_gzip(monkeypatch):
    monkeypatch.setattr(packed_files, "MAX_UNPACKED", 1 << 20)
    monkeypatch.setattr(packed_files, "CHUNK", 1 << 14)
    bomb = gzip.compress(bytes(50_000_000))
    for reader in (read_pt, read_safetensors):
        tracemalloc.start()
        with pytest.raises(DamagedArrays, match="expected at most 64 bytes unpacked of each packed one"):
            reader(bomb)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
        tracemalloc.stop()


def test_what_the_directory_of_a_zip_may_not_say():
    data = npz_bytes({"a": VALUES})
    directory = data.rindex(b"PK\1\2")

    def changed(at: int, format: str, value: int) -> bytes:
        raw = bytearray(data)
        struct.pack_into(format, raw, at, value)
        return bytes(raw)

    for bad, message in [
        (changed(directory + 16, "<L", 1), "checksum is wrong"),
        (changed(directory + 20, "<L", 10**9), "is longer than its file"),
        (changed(directory + 42, "<L", 7), "is not where it should be"),
        (changed(directory + 42, "<L", 10**9), "a damaged zip archive"),
        (changed(directory + 10, "<H", 12), "expected a stored or deflated member, got method 12"),
        (changed(directory + 8, "<H", 1), "member, got an encrypted one"),
        (changed(directory, "<L", 0), "directory is torn"),
        (changed(len(data) - 6, "<L", 10**9), "its directory claims"),
        (changed(len(data) - 6, "<L", 2**32 - 1), "its directory claims"),
        (changed(len(data) - 12, "<H", 2), "its directory claims 2 members"),
        (data[:-30], "directory is missing"),
        (b"PK\5\6" + bytes(3), "directory is missing"),
        (npz_bytes({"a": VALUES, "b": VALUES}).replace(b"b.npy", b"a.npy"), "each array once, got 'a' twice"),
        (zipped(pickle.dumps(3)), "'a': expected a .npy file"),
        (zipped(saved(np.save, np.array([{}]), allow_pickle=True)), "'a': .* pickled objects, which are never read"),
        (b"hello", "expected a .npz file of numpy.savez, got one that starts with b'hello'"),
    ]:
        refused(read_npz, bad, message)


def test_what_a_pt_may_not_hold(tmp_path):
    for value, message in [
        (Harmful(), "got a pickle that needs posix.system, which is never loaded"),
        ([[[[{"deep": torch.ones(1).expand(2**30)}]]]], "is larger than what is stored of it"),
        (torch.ones(3, device="meta"), "expected a dense tensor, got torch.strided on meta"),
        (torch.ones(3).to_sparse(), "expected a dense tensor"),
    ]:
        data = torch_saved(value)
        (tmp_path / "x.pt").write_bytes(data)
        for read in (lambda: read_pt(data), lambda: map_pt(tmp_path / "x.pt")):  # noqa: B023
            with pytest.raises(DamagedArrays, match=message):
                read()
    (tmp_path / "x.pt").write_bytes(b"")
    with pytest.raises(DamagedArrays, match="got an empty one"):
        map_pt(tmp_path / "x.pt")
    loop: list = [torch.ones(1)]
    loop.append(loop)
    assert len(read_pt(torch_saved(loop))) == 2


def pickled(code: bytes) -> bytes:
    """A file of torch.save with this pickle."""
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(WHOLE["pt"])) as old, zipfile.ZipFile(stream, "w") as new:
        for record in old.infolist():
            new.writestr(record.filename, code if record.filename.endswith(".pkl") else old.read(record))
    return stream.getvalue()


def number(value: int) -> bytes:
    return b"\x8a\x08" + value.to_bytes(8, "little")


def test_pickles_that_weights_only_would_let_allocate():
    encode = b"c_codecs\nencode\n"
    doubled = encode + b"X\1\0\0\0aX\6\0\0\0latin1\x86R"
    for _ in range(30):  # each makes twice as many bytes
        doubled = encode + doubled + b"X\3\0\0\0hex\x86R"
    array = b"cnumpy\nndarray\n"
    refused(read_pt, pickled(b"\x80\2" + doubled + b"."), "expected latin1, as pickle writes bytes, got 'hex'")
    for module in (b"builtins", b"__builtin__"):
        code = b"\x80\2c" + module + b"\nbytearray\n" + number(17 << 30) + b"\x85R."
        refused(read_pt, pickled(code), "a pickle that needs bytearray, which is never loaded")
    for code in (
        array + number(1 << 30) + b"\x85\x85R.",
        array + number(1 << 30) + b"\x85\x81.",
        b"cnumpy.core.multiarray\n_reconstruct\n" + array + number(1 << 30) + b"\x85X\2\0\0\0f8\x87R.",
    ):
        refused(read_pt, pickled(b"\x80\2" + code), "numpy's own way to write an array|takes no arguments|torch.load")
    refused(read_pt, pickled(b"\x80\2X\xff\xff\xff\x7fabc."), "expected tensors, got what torch.load calls .")


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_any_bytes_are_read_or_refused(data):
    kind = data.draw(st.sampled_from(sorted(WHOLE)))
    reader = READERS.get(kind.removesuffix(".gz"), read_npz)
    raw = bytearray(WHOLE[kind])
    raw = raw[: data.draw(st.one_of(st.just(len(raw)), st.integers(0, len(raw))))]
    for _ in range(data.draw(st.integers(0, 4))):
        if raw:
            raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    raw += data.draw(st.binary(max_size=8))
    check_one(reader, bytes(raw))


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(sorted(READERS)),
    st.sampled_from([b"", b"\x93NUMPY", b"PK\3\4", b"PK\5\6", b"\x1f\x8b\x08"]),
    st.binary(max_size=200),
)
def test_noise_is_refused(kind, start, noise):
    check_one(READERS[kind], start + noise)


@pytest.mark.soak
@settings(max_examples=20_000, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.sampled_from(sorted(WHOLE)), st.lists(st.tuples(st.integers(0), st.integers(0, 255)), max_size=8))
def test_any_changes_at_length(kind, changes):
    raw = bytearray(WHOLE[kind])
    for at, value in changes:
        raw[at % len(raw)] = value
    check_one(READERS.get(kind.removesuffix(".gz"), read_npz), bytes(raw))


def check_one(reader, data: bytes) -> None:
    try:
        value = reader(data)
    except DamagedArrays as error:
        assert str(error)
        return
    try:
        extract_latent(value[0] if isinstance(value, tuple) else value)
    except DamagedArrays as error:
        assert str(error)
