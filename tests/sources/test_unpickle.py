import contextlib
import io
import os
import pickle
import pickletools
import struct
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastlatent.sources import unpickle
from fastlatent.sources.unpickle import read_arrays

POSES = {
    "position": np.asfortranarray(np.random.default_rng(0).normal(size=(93, 2))),  # as the published files hold it
    "yaw": np.linspace(-3, 3, 93),
}


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("module", [b"numpy.core", b"numpy._core"])  # numpy 1 and numpy 2 write one each
def test_every_protocol_and_numpy(protocol, module):
    data = pickle.dumps(POSES, protocol=protocol)
    if protocol < 4:  # GLOBAL lines have no length
        data = data.replace(b"numpy._core", b"numpy.core").replace(b"numpy.core", module)
    else:
        data = rename_modules(data, module)
    assert module + b"." in data
    arrays = read_arrays(data)
    assert arrays.keys() == POSES.keys()
    for name, expected in POSES.items():
        assert arrays[name].dtype == expected.dtype
        np.testing.assert_array_equal(arrays[name], expected)


def rename_modules(data, module):
    """The same pickle (protocol ≥ 4) without its frames, with the module names as another numpy spells them."""
    out = io.BytesIO()
    places = [place for _, _, place in pickletools.genops(data)] + [len(data)]
    for (opcode, argument, place), end in zip(pickletools.genops(data), places[1:], strict=True):
        if opcode.name == "SHORT_BINUNICODE" and argument.startswith("numpy._core"):
            name = module + argument.encode()[len("numpy._core") :]
            out.write(b"\x8c" + bytes([len(name)]) + name)
        elif opcode.name != "FRAME":
            out.write(data[place:end])
    return out.getvalue()


@pytest.mark.parametrize("dtype", ["<f8", ">f8", "<f4", "<f2", "<i8", ">i2", "|u1", "|b1", "<u4"])
@pytest.mark.parametrize("protocol", range(6))
def test_dtypes_orders_and_layouts(dtype, protocol):
    array = np.arange(24).reshape(2, 3, 4).astype(dtype)
    cases = {
        "c": array,
        "f": np.asfortranarray(array),
        "strided": array[:, ::2],
        "0d": array[0, 0, 0],
        "scalar": np.asarray(array[1, 2, 3])[()],
    }
    for name, read in read_arrays(pickle.dumps(cases, protocol=protocol)).items():
        np.testing.assert_array_equal(read, cases[name])
        assert read.dtype == np.dtype(dtype) or name in ("scalar", "0d")  # numpy scalars are always of native order


@pytest.mark.parametrize("protocol", range(3, 6))  # below, empty bytes are a call of `bytes`
def test_an_array_without_elements(protocol):
    read = read_arrays(pickle.dumps({"position": np.empty((0, 2))}, protocol=protocol))
    assert read["position"].shape == (0, 2)


def test_one_array_twice():
    yaw = np.arange(3.0)
    read = read_arrays(pickle.dumps({"a": yaw, "b": yaw}))
    np.testing.assert_array_equal(read["a"], read["b"])


class Calls:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize(
    "function, arguments",
    [
        (os.system, ("touch {}",)),
        (eval, ("open({!r}, 'w')",)),
        (os.mkdir, ("{}",)),
        (np.load, ("{}",)),
        (getattr, ("{}", "x")),
        (np.fromfile, ("{}",)),
    ],
)
def test_nothing_is_called(tmp_path, protocol, function, arguments):
    trace = tmp_path / "trace"
    arguments = tuple(text.format(str(trace)) for text in arguments)
    for value in ({"position": Calls(function, *arguments)}, Calls(function, *arguments)):
        with pytest.raises(ValueError, match="refers to .*nothing is imported"):
            read_arrays(pickle.dumps(value, protocol=protocol))
    assert not trace.exists()


@pytest.mark.parametrize(
    "value",
    [
        {"yaw": [1.0, 2.0]},
        {"yaw": None},
        {"yaw": 1.0},
        {"yaw": "text"},
        {1: np.zeros(2)},
        {("a", "b"): np.zeros(2)},
        {"yaw": {"deep": np.zeros(2)}},
        {"yaw": np.array([None])},
        {"yaw": np.array(["text"])},
        {"yaw": np.array([b"bytes"])},
        {"yaw": np.zeros(2, [("x", "f4")])},
        {"yaw": np.zeros(2, "M8[s]")},
        {"yaw": np.zeros(2, complex)},
        {"yaw": np.float64},
        {"yaw": np.dtype("f8")},
        [np.zeros(2)],
        np.zeros(2),
        None,
    ],
    ids=str,
)
@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_anything_else_is_refused(value, protocol):
    with pytest.raises(ValueError):
        read_arrays(pickle.dumps(value, protocol=protocol))


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_truncated_anywhere(protocol):
    data = pickle.dumps({"yaw": np.arange(4.0)}, protocol=protocol)
    for length in range(len(data)):
        with pytest.raises(ValueError):
            read_arrays(data[:length])


ARRAY = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n%stR"


@pytest.mark.parametrize(
    "data",
    [
        b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b"x.",  # a bytearray of 1 TiB
        b"\x80\x04\x8e" + struct.pack("<Q", 2**40) + b"x.",
        b"\x80\x04\x8d" + struct.pack("<Q", 2**62) + b"x.",
        b"}" + b"X\x01\x00\x00\x00a" + ARRAY % b"(I1099511627776\ntc__builtin__\nbytes\n" + b"s.",
        # an array of 2**60 elements and 8 bytes
        b"\x80\x03}X\x01\x00\x00\x00a"
        + ARRAY % b"I0\ntC\x01b"
        + b"(K\x01\x8a\x08"
        + struct.pack("<Q", 2**60)
        + b"\x85cnumpy\ndtype\nX\x02\x00\x00\x00f8\x89\x88\x87R\x89C\x08"
        + bytes(8)
        + b"tbs.",
    ],
)
def test_a_length_in_the_file_allocates_nothing(data):
    started = time.perf_counter()
    with pytest.raises(ValueError):
        read_arrays(data)
    assert time.perf_counter() - started < 1


def test_frames_and_memo_places_are_not_believed():
    assert read_arrays(b"\x80\x04\x95" + struct.pack("<Q", 2**62) + b"}.") == {}
    started = time.perf_counter()
    assert read_arrays(b"\x80\x02}r\xff\xff\xff\x0f.") == {}  # pickle.loads allocates and clears 4 GiB for it
    assert time.perf_counter() - started < 0.5


def test_the_same_text_again_and_again():
    text = "x" * 10_000
    encode = b"c_codecs\nencode\n(h\x00X\x06\x00\x00\x00latin1tR"
    data = b"\x80\x02X" + struct.pack("<I", len(text)) + text.encode() + b"q\x00" + encode * 1000 + b"."
    with pytest.raises(ValueError, match="more bytes than it has"):
        read_arrays(data)


def test_nested_tuples_as_a_key_do_not_hang():
    # 2**200 leaves by sharing: hash() would never return.
    data = b"\x80\x02}K\x01\x85" + b"q\x00h\x00\x86" * 200 + b"K\x01s."
    with pytest.raises(ValueError, match="key in the pickle is a tuple"):
        read_arrays(data)


def test_too_large(monkeypatch):
    data = pickle.dumps(POSES)
    monkeypatch.setattr(unpickle, "MAX_BYTES", len(data))
    read_arrays(data)
    monkeypatch.setattr(unpickle, "MAX_BYTES", len(data) - 1)
    with pytest.raises(ValueError, match=f"{len(data)} bytes; at most {len(data) - 1}"):
        read_arrays(data)


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 5), st.data())
def test_a_damaged_pickle_is_a_value_error_or_numbers(protocol, data):
    pickled = bytearray(pickle.dumps({"position": np.ones((3, 2)), "yaw": np.arange(3.0)}, protocol=protocol))
    for _ in range(data.draw(st.integers(1, 4))):
        pickled[data.draw(st.integers(0, len(pickled) - 1))] = data.draw(st.integers(0, 255))
    try:
        arrays = read_arrays(bytes(pickled))
    except ValueError:
        return
    assert all(array.dtype.kind in "biuf" for array in arrays.values())


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from([opcode.code.encode("latin-1") for opcode in pickletools.opcodes]), max_size=30))
def test_any_opcodes(codes):
    with contextlib.suppress(ValueError):
        read_arrays(b"".join(codes) + b".")
