import builtins
import gzip
import io
import json
import math
import os
import pickle
import random
import tracemalloc
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import xxhash
from toy_experiment import make_experiment, write_latent

from fastlatent.data import packed_files, step_latents
from fastlatent.data.step_latents import read_step, statistics
from fastlatent.sources.experiment import SUFFIXES, open_experiment

SHAPE = (1, 4, 2, 3, 3)
VALUES = np.random.default_rng(0).standard_normal(SHAPE).astype(np.float16)


def npy(array: np.ndarray, **more) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, **more)
    return stream.getvalue()


def header(text: str, version: int = 1, body: bytes = b"") -> bytes:
    raw = text.encode("utf-8" if version == 3 else "latin-1")
    return b"\x93NUMPY" + bytes([version, 0]) + len(raw).to_bytes(2 if version == 1 else 4, "little") + raw + body


def pt(value, **more) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream, **more)
    return stream.getvalue()


def read(path: Path, data: bytes):
    path.write_bytes(data)
    return read_step(path)


def refused(path: Path, data: bytes, message: str) -> str:
    with pytest.raises(ValueError, match=message) as raised:
        read(path, data)
    assert str(raised.value).startswith(f"{path}")
    return str(raised.value)


@pytest.fixture
def latent(tmp_path):
    """The path of a step by the ending of its name."""
    return lambda suffix: tmp_path / f"step_000{suffix}"


# What is read


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_format(latent, suffix):
    path = latent(suffix)
    write_latent(path, VALUES)
    step = read_step(path)
    assert step.values.dtype == torch.float16 and step.values.is_contiguous()
    assert np.array_equal(step.values.numpy(), VALUES)
    assert step.digest == xxhash.xxh3_128_hexdigest(path.read_bytes())
    assert step.notes == ()
    step.values.add_(1)  # writable, and no other's memory
    assert np.array_equal(read_step(path).values.numpy(), VALUES)


def test_the_experiment_of_the_tests(tmp_path):
    shape = (1, 16, 2, 4, 6)
    steps = open_experiment(make_experiment(tmp_path, prompts=("p",), videos=("v",), steps=(0, 19))).steps
    for step in steps:
        assert read_step(step.path).values.shape == shape
    assert not torch.equal(*(read_step(step.path).values for step in steps))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(), (1,), (3, 2), (1, 2, 1, 1, 2)], ids=str)  # any rank
def test_dtypes_stay_as_stored(latent, dtype, shape):
    values = torch.randn(shape).to(dtype)
    stored = {
        ".pt": pt(values),
        ".pt.gz": gzip.compress(pt(values)),
        ".safetensors": safetensors.torch.save({"x": values}),
    }
    if dtype != torch.bfloat16:
        stored |= {".npy": npy(values.numpy()), ".npy.gz": gzip.compress(npy(values.numpy()))}
    for suffix, data in stored.items():
        got = read(latent(suffix), data).values
        assert (got.dtype, got.shape) == (dtype, values.shape) and torch.equal(got, values), suffix


def test_npy_of_every_layout_and_version(latent):
    array = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    fields = "{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3, 4)}"
    cases = {
        "columns first": npy(np.asfortranarray(array)),
        "strides": npy(array.transpose(2, 0, 1)),
        "big-endian": npy(array.astype(">f4")),
        **{f"version {version}": header(fields, version, array.tobytes()) for version in (1, 2, 3)},
    }
    for what, data in cases.items():
        expected = torch.from_numpy(np.load(io.BytesIO(data)).astype(np.float32))
        got = read(latent(".npy"), data).values
        assert torch.equal(got, expected) and got.is_contiguous(), what


def test_several_gzip_members_are_one_stream(latent):
    data = npy(VALUES)
    step = read(latent(".npy.gz"), gzip.compress(data[:150]) + gzip.compress(data[150:]))
    assert np.array_equal(step.values.numpy(), VALUES)


@pytest.mark.parametrize(
    ("wrap", "notes"),
    [
        (lambda t: t, ()),
        (lambda t: torch.nn.Parameter(t.float()), ()),
        (lambda t: t.float().requires_grad_(), ()),
        (lambda t: torch.cat([t, t])[1:], ()),  # a view into a larger storage
        (lambda t: t.transpose(1, 2).contiguous().transpose(1, 2), ()),
        (lambda t: [t], ()),
        (lambda t: (t,), ()),
        (lambda t: t.numpy(), ()),
        (lambda t: np.asfortranarray(t.numpy()), ()),
        (lambda t: t.numpy().astype(">f2"), ()),
        (lambda t: {"latent": t}, ()),
        (lambda t: {"latents": [t.numpy()], "step": 3, "mask": t}, ("took 'latents', left step, mask",)),
        (lambda t: OrderedDict(x=t), ()),
        (lambda t: {"x": t, "sigma": 0.5, "prompt": "a boat"}, ("took 'x', left sigma, prompt",)),
    ],
    ids=range(14),
)
def test_pt_holds_one_array(latent, wrap, notes):
    step = read(latent(".pt"), pt(wrap(torch.from_numpy(VALUES))))
    assert np.array_equal(step.values.half().numpy(), VALUES) and step.values.is_contiguous()
    assert step.notes == notes and not step.values.requires_grad


def test_pt_without_checksums_is_read(latent):
    torch.serialization.set_crc32_options(False)
    try:
        data = pt(torch.from_numpy(VALUES))
    finally:
        torch.serialization.set_crc32_options(True)
    assert np.array_equal(read(latent(".pt"), data).values.numpy(), VALUES)


def test_safetensors_by_name(latent):
    tensors = {"mask": torch.zeros(2), "latents": torch.ones(3), "count": torch.tensor([1])}
    step = read(latent(".safetensors"), safetensors.torch.save(tensors))
    assert torch.equal(step.values, torch.ones(3))
    assert step.notes[0].startswith("took 'latents', left ")


# What is refused


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_no_file(latent, suffix):
    path = latent(suffix)
    with pytest.raises(ValueError, match="cannot be read: No such file"):
        read_step(path)
    path.symlink_to("nowhere")
    with pytest.raises(ValueError, match=r"\(a link to nowhere\): cannot be read"):
        read_step(path)
    path.unlink()
    os.mkfifo(path)  # to open it would wait for ever
    with pytest.raises(ValueError, match="expected a file of latents, got a pipe or device"):
        read_step(path)
    path.unlink()
    path.mkdir()
    with pytest.raises(ValueError, match="expected a file of latents, got a folder"):
        read_step(path)
    path.rmdir()
    refused(path, b"", "got 0; make it again")


def test_a_file_that_may_not_be_read(latent, monkeypatch):
    path = latent(".npy")
    path.write_bytes(npy(VALUES))

    def denied(file, *args, **more):
        raise PermissionError(13, "Permission denied", file)

    monkeypatch.setattr(builtins, "open", denied)  # root may read all
    with pytest.raises(ValueError, match="step_000.npy: cannot be read: Permission denied"):
        read_step(path)


def test_names_that_lie(latent):
    refused(latent(".npz"), b"x", "expected a name that ends in one of .npy, .npy.gz")
    refused(
        latent(".npy"),
        gzip.compress(npy(VALUES)),
        "expected a .npy file by its name, got a gzip file; rename it to step_000.npy.gz",
    )
    refused(
        latent(".pt.gz"), pt(torch.zeros(1)), "expected a gzip file .* if it is not zipped, rename it to step_000.pt$"
    )
    refused(latent(".npy"), pt(torch.zeros(1)), r"expected a .npy file of numpy.save, got one that starts with b'PK")
    refused(latent(".pt"), npy(VALUES), r"torch.save \(a zip archive\), got one that starts with")
    refused(latent(".safetensors"), npy(VALUES), "expected a safetensors file")


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (VALUES.astype(object), "got pickled objects, which are never read"),
        (np.zeros(3, np.int32), "expected float16, float32 or float64, got a numpy array of int32"),
        (np.zeros(3, np.uint8), "numpy array of uint8"),
        (np.zeros(3, bool), "numpy array of bool"),
        (np.zeros(3, np.complex64), "got '<c8'"),
        (np.zeros(3, np.longdouble), "got '<f16'"),
        (np.zeros(3, "U4"), "got '<U4'"),
        (np.zeros(3, [("a", "f4")]), r"got \[\('a', '<f4'\)\]"),
        (np.zeros((1, 0, 4), np.float16), r"expected latents, got the empty shape \[1, 0, 4\]"),
        (np.zeros((1,) * 9, np.float16), "damaged: shape"),
    ],
    ids=lambda value: str(value)[:24] if isinstance(value, str) else "",
)
def test_npy_of_something_else(latent, array, message):
    refused(latent(".npy"), npy(array), message)
    refused(latent(".npy.gz"), gzip.compress(npy(array)), message)


@pytest.mark.parametrize("view", [np.uint16, np.int16, "V2"], ids=str)
@pytest.mark.parametrize("suffix", [".npy", ".npy.gz"])
def test_bfloat16_as_raw_bits_is_told_with_the_line_that_mends_it(latent, view, suffix):
    values = torch.randn(2, 3).bfloat16()
    data = npy(values.view(torch.int16).numpy().view(view))
    path = latent(suffix)
    message = refused(path, gzip.compress(data) if suffix == ".npy.gz" else data, "as bfloat16 is often saved")
    exec(message.split("makes them float32: ")[1], {})
    assert torch.equal(read_step(path).values, values.float())


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "{'descr': '<f2'}",
        "{'descr': '<f2', 'fortran_order': 1, 'shape': (3,)}",
        "{'descr': '<f2', 'fortran_order': False, 'shape': [3]}",
        "{'descr': '<f2', 'fortran_order': False, 'shape': (-3,)}",
        "{'descr': '<f2', 'fortran_order': False, 'shape': (True,)}",
        "{'descr': '<f2', 'fortran_order': False, 'shape': (3.0,)}",
        "(" * 5000,
        "1+" * 3000 + "1",
        " " * 10_001,
    ],
    ids=lambda text: text[:60],
)
def test_damaged_headers(latent, text):
    refused(latent(".npy"), header(text, body=bytes(6)), "the .npy header is damaged")


def test_a_header_promises_more_or_less_than_there_is(latent):
    def shaped(shape: str, body: int) -> bytes:
        return header(f"{{'descr': '<f2', 'fortran_order': False, 'shape': {shape}}}", body=bytes(body))

    for data, message in [
        (shaped("(4,)", 7), r"truncated: expected 8 bytes, \[4\] of float16, got 7"),
        (shaped("(4,)", 9), "expected 8 bytes, .* got more: it is damaged or holds several arrays"),
        (npy(VALUES) * 2, "holds several arrays"),
        (shaped("(2**40,)", 8), "the .npy header is damaged"),
        (shaped("(0, 2**62)".replace("2**62", str(2**62)), 0), "damaged: shape"),
    ]:
        refused(latent(".npy"), data, message)
        refused(latent(".npy.gz"), gzip.compress(data), message)
    # 32 GiB that are promised are never allocated.
    data = shaped("(1, 17179869184)", 8)
    refused(latent(".npy"), data, "truncated: expected 34359738368 bytes, .* got 8;")
    refused(latent(".npy.gz"), gzip.compress(data), "expected at most 64 bytes unpacked of each packed one, got 343597")


def test_bombs_stop_where_the_header_ends(latent, monkeypatch):
    bomb = gzip.compress(npy(VALUES) + bytes(30_000_000), 1)
    tracemalloc.start()
    refused(latent(".npy.gz"), bomb, "got more")
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    # An unzipped .pt does not say how long it is.
    monkeypatch.setattr(packed_files, "MAX_UNPACKED", 5_000_000)
    refused(latent(".pt.gz"), bomb, "expected at most 64 bytes unpacked of each packed one, got 9")
    assert tracemalloc.get_traced_memory()[1] < 25_000_000
    tracemalloc.stop()


class Harmful:
    def __reduce__(self):
        return os.system, ("exit 1",)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (Harmful(), "got a pickle that needs posix.system, which is never loaded"),
        ({"latents": Harmful()}, "needs posix.system"),
        (np.array([1, "a"], object), "got what torch.load calls|got a numpy array of object"),
        (
            [torch.ones(1)] * 2,
            "expected a tensor, a dict with `latent` or `latents`, or a list of one, got a list of 2",
        ),
        ([], "got a list of 0"),
        ({}, "got a dict of nothing"),
        ({"a": torch.ones(1), "b": torch.ones(1)}, "got a dict of a, b"),
        ({"latent": torch.ones(1), "latents": torch.ones(1)}, "got a dict of latent, latents"),
        ({"latent": 3.0}, "got a float"),
        ([[[[torch.ones(1)]]]], "got a list of 1"),
        ("text", "got a str"),
        (torch.ones(3, dtype=torch.int64), "expected float16, bfloat16, float32 or float64, got torch.int64$"),
        (torch.ones(3, dtype=torch.int16), r"if these are bfloat16's bits, save latents.view\(torch.bfloat16\)"),
        (torch.ones(3, dtype=torch.complex64), "got torch.complex64"),
        (torch.ones(3, dtype=torch.bool), "got torch.bool"),
        (torch.ones(3).to(torch.float8_e5m2), "got torch.float8_e5m2"),
        (np.ones(3, np.int64), "got a numpy array of int64"),
        (torch.ones(0, 3), r"expected latents, got the empty shape \[0, 3\]"),
        (torch.ones(3).to_sparse(), "expected a dense tensor, got torch.sparse_coo on cpu"),
        (torch.ones(3, device="meta"), "expected a dense tensor, got torch.strided on meta"),
        # An expanded tensor of 4 TiB has 4 bytes.
        (torch.ones(1).expand(2**40), r"a tensor of shape \[1099511627776\] is larger than what is stored of it"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_pt_of_something_else(latent, value, message):
    refused(latent(".pt"), pt(value), message)


def rewritten(data: bytes, change, compression=zipfile.ZIP_STORED) -> bytes:
    """The zip archive with other contents, and checksums that fit them."""
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(stream, "w", compression) as new:
        for record in old.infolist():
            new.writestr(record.filename, change(record.filename, old.read(record)))
    return stream.getvalue()


def test_hostile_archives(latent):
    data = pt(torch.ones(300))
    path = latent(".pt")
    assert read(path, rewritten(data, lambda name, content: content)).values.sum() == 300

    def larger(name, content):
        # The pickle says 65,000 numbers in a storage whose record has 300: 258,800 bytes past its end.
        promised, there = (number.to_bytes(2, "little") for number in (65_000, 300))
        return content.replace(there, promised) if name.endswith("data.pkl") else content

    refused(path, rewritten(data, larger), "is larger than what is stored of it|does not match expected size")
    refused(path, rewritten(data, lambda n, c: b"big" if n.endswith("byteorder") else c), "got byte order b'big'")
    refused(path, rewritten(data, lambda n, c: c, zipfile.ZIP_DEFLATED), "an archive with compressed records")
    refused(path, pt(torch.ones(3), pickle_protocol=4), "got a pickle of another protocol than torch.save's own, 2")
    refused(path, pickle.dumps(torch.ones(3)), "expected a file of torch.save")
    old = pt(torch.ones(3), _use_new_zipfile_serialization=False)  # before torch 1.6
    assert torch.equal(read(path, old).values, torch.ones(3))
    refused(path, old[:-1], "expected tensors, got what torch.load calls")


def test_safetensors_of_something_else(latent):
    path = latent(".safetensors")
    for tensors, message in [
        ({"a": torch.ones(1), "b": torch.ones(1)}, "got a dict of a, b|got a dict of b, a"),
        (
            {"latent": torch.ones(1, dtype=torch.int16)},
            r"float64, got torch.int16; if these are bfloat16's bits, save latents.view",
        ),
        ({"x": torch.ones(1, dtype=torch.uint8)}, "float64, got torch.uint8$"),
        ({"x": torch.ones(0, 3)}, "got the empty shape"),
    ]:
        refused(path, safetensors.torch.save(tensors), message)
    refused(path, (8).to_bytes(8, "little") + b"{}      ", "got a dict of nothing")
    refused(path, (2**60).to_bytes(8, "little") + b"{}", "expected a safetensors file")


def test_no_memory(latent, monkeypatch):
    def exhausted(path):
        raise MemoryError

    monkeypatch.setattr(step_latents, "_read", exhausted)
    with pytest.raises(ValueError, match="not enough memory to read it"):
        read_step(latent(".npy"))


# Damage


def stored(path: Path) -> bytes:
    write_latent(path, VALUES)
    return path.read_bytes()


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_truncated_files_are_refused(latent, suffix):
    path = latent(suffix)
    data = stored(path)
    # Every 7th length meets every part of each format; and the last three bytes.
    for length in [*range(0, len(data), 7), *range(len(data) - 3, len(data))]:
        refused(path, data[:length], f"^{path}: ")


def flip(path: Path, data: bytes, seed: int) -> bool:
    """Read the file with some bytes changed: whether it was refused."""
    generator = random.Random(seed)
    damaged = bytearray(data)
    for _ in range(generator.choice([1, 1, 1, 8])):
        damaged[generator.randrange(len(damaged))] ^= generator.randrange(1, 256)
    try:
        step = read(path, bytes(damaged))
    except ValueError as error:
        assert str(error).startswith(f"{path}: "), error
        return True
    json.dumps(statistics(step.values), allow_nan=False)
    return False


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_changed_bytes_are_refused_or_are_other_values(latent, suffix):
    path = latent(suffix)
    data = stored(path)
    assert any(flip(path, data, seed) for seed in range(150))


@pytest.mark.soak
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_changed_bytes_at_length(latent, suffix):
    path = latent(suffix)
    data = stored(path)
    assert sum(flip(path, data, seed) for seed in range(4_000)) > 500
    for length in range(len(data)):
        refused(path, data[:length], f"^{path}: ")


# Statistics


def test_statistics_of_the_finite_values():
    values = torch.tensor([[1.0, math.nan, 3.0], [math.inf, -math.inf, 5.0]], dtype=torch.float16)
    assert statistics(values) == {
        "shape": [2, 3],
        "dtype": "float16",
        "mean": 3.0,
        "std": math.sqrt(8 / 3),
        "min": 1.0,
        "max": 5.0,
        "nan": 3,
    }
    one = statistics(torch.tensor([2.0], dtype=torch.bfloat16))
    assert (one["dtype"], one["mean"], one["std"], one["nan"]) == ("bfloat16", 2.0, 0.0, 0)
    none = statistics(torch.full((2,), math.nan))
    assert (none["mean"], none["std"], none["min"], none["max"], none["nan"]) == (None, None, None, None, 2)
    # Squares beyond float64: no number, as JSON has no infinity.
    assert statistics(torch.tensor([1e200, -1e200], dtype=torch.float64))["std"] is None


def test_statistics_are_of_float64():
    # A float16 sum of these ends at 2048·0.1.
    values = torch.full((100_000,), 0.1, dtype=torch.float16)
    found = statistics(values)
    assert abs(found["mean"] - float(values[0])) < 1e-15 and found["std"] < 1e-15
