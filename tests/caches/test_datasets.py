"""Export to a folder that Hugging Face's load_from_disk reads."""

import json

import numpy as np
import pyarrow as pa
import pytest
import torch

from fastlatent.config import ConvertConfig
from fastlatent.config.fields import build
from fastlatent.sources.tables import scan_table
from fastlatent.store.records import Field, Schema
from fastlatent.store.rows import Rows
from fastlatent.store.scan import Entry
from fastlatent.store.writer import DatasetWriter
from fastlatent.workflows.convert import convert

SHAPES = {"moments": (2, 4, 3, 5), "latents": (1, 4, 2, 3, 5), "tokens": (1, 6, 3)}
BITS = {"float16": np.float16, "float32": np.float32, "bfloat16": np.uint16}


def values(shape, seed, dtype="float32"):
    """Exact in every dtype."""
    exact = np.random.default_rng(seed).integers(-64, 64, shape).astype(np.float32) / 16
    return (exact.view(np.uint32) >> 16).astype(np.uint16) if dtype == "bfloat16" else exact.astype(BITS[dtype])


def dataset(path, source, *, payload="moments", dtype="float32", count=7, shapes=None, groups=False, extras=True):
    """Rows as some encode left them, with a caption, a matrix of a length of its own and a number each."""
    source.mkdir()
    shapes = shapes or [SHAPES[payload]] * count
    names = [f"{'ant' if i % 2 else 'bee'}/{i}.jpg" for i in range(count)]
    entries = []
    for i, name in enumerate(names):
        file = source / f"{i}"
        file.write_bytes(b"%d" % i)
        status = file.stat()
        bucket = sorted(set(shapes)).index(shapes[i])
        group = {"group": f"g{i % 2}", "order": i} if groups else {}
        entries.append(Entry(name, str(file), i % 2, status.st_size, status.st_mtime_ns, bucket, **group))
    fields = (Field("caption", "U8", (-1,)), Field("text", "F16", (-1, 3)), Field("weight", "F32", ()))
    schema = Schema(tuple(sorted(set(shapes))), payload, fields if extras else ())
    provenance = {"hashed": {"storage_dtype": dtype}, "informational": {}}
    with DatasetWriter.open(path, provenance, ["bee", "ant"], unit_rows=4, schema=schema) as writer:
        writer.plan(entries)
        for unit in writer.claim():
            numbers = [names.index(item.key) for item in unit.items]
            payloads = np.stack([values(unit.bucket, i, dtype) for i in numbers])
            more = {
                "caption": [np.frombuffer(f"caption {i} é".encode(), np.uint8) for i in numbers],
                "text": [values((i % 3, 3), i, "float16") for i in numbers],
                "weight": np.array(numbers, np.float32),
            }
            hw = np.tile(np.array([30, 40], np.int32), (len(numbers), 1))
            crop = np.tile(np.array([1, 2, 3, 4], np.int32), (len(numbers), 1))
            rows = Rows([names[i] for i in numbers], payloads, hw, crop, None, more if extras else {})
            writer.commit(unit, rows, [])
        writer.finish()
    return path, names


def export(path, out, **flags):
    return convert(build(ConvertConfig, {}, {"source": str(path), "out": str(out), "to": "datasets", **flags}))


def load_from_disk(folder):
    """What `datasets` does: the streams that state.json names, one after another, by the features of the other file."""
    files = json.loads((folder / "state.json").read_text())["_data_files"]
    features = json.loads((folder / "dataset_info.json").read_text())["features"]
    table = pa.concat_tables([pa.ipc.open_stream(folder / file["filename"]).read_all() for file in files])
    assert table.column_names == list(features)
    rows = table.to_pylist()
    for row in rows:
        for name, feature in features.items():
            if feature["_type"].startswith("Array"):
                sizes = [-1 if size is None else size for size in feature["shape"]]
                row[name] = np.array(row[name], feature["dtype"]).reshape(sizes)
    return rows, features


@pytest.mark.parametrize("dtype", BITS)
@pytest.mark.parametrize("payload", SHAPES)
def test_rows_are_what_they_were(tmp_path, payload, dtype):
    path, names = dataset(tmp_path / "dataset", tmp_path / "source", payload=payload, dtype=dtype)
    export(path, tmp_path / "out", unit_rows=3)
    rows, features = load_from_disk(tmp_path / "out")
    assert sorted(file.name for file in (tmp_path / "out").glob("*.arrow")) == [
        f"data-0000{i}-of-00003.arrow" for i in range(3)
    ]
    assert [row["key"] for row in rows] == sorted(names)
    assert features["label"]["names"] == ["bee", "ant"]
    for row in rows:
        i = int(row["key"][4:-4])
        exact = values(SHAPES[payload], i)
        np.testing.assert_array_equal(row[payload], exact[0])
        if len(exact) > 1:
            np.testing.assert_array_equal(row[f"{payload}_flip"], exact[1])
        assert row[payload].dtype == ("float16" if dtype == "float16" else "float32")
        assert (row["label"], row["caption"], row["weight"]) == (i % 2, f"caption {i} é", i)
        assert (row["orig_hw"], row["crop"]) == ([30, 40], [1, 2, 3, 4])
        np.testing.assert_array_equal(row["text"].reshape(-1, 3), values((i % 3, 3), i))


def test_a_killed_export_goes_on_with_the_same_bytes(tmp_path):
    path, _ = dataset(tmp_path / "dataset", tmp_path / "source")
    export(path, tmp_path / "out", unit_rows=3)
    before = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    for name in ("data-00001-of-00003.arrow", "state.json", "dataset_info.json"):
        (tmp_path / "out" / name).unlink()
    export(path, tmp_path / "out", unit_rows=3)
    assert before == {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}


def test_groups(tmp_path):
    path, _ = dataset(tmp_path / "dataset", tmp_path / "source", groups=True, extras=False)
    export(path, tmp_path / "out")
    rows, _ = load_from_disk(tmp_path / "out")
    assert [(row["group"], row["order"]) for row in rows] == sorted((f"g{i % 2}", i) for i in range(7))


def test_several_shapes(tmp_path):
    shapes = [(1, 4, 2, 3), (1, 4, 3, 2)] * 3
    path, _ = dataset(tmp_path / "dataset", tmp_path / "source", shapes=shapes, count=6)
    with pytest.raises(ValueError, match=r"expected rows of one shape, got \[4, 2, 3\], \[4, 3, 2\].*webdataset"):
        export(path, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.arrow"))
    shapes = [(1, 2, 3), (1, 5, 3)] * 3
    path, _ = dataset(tmp_path / "t", tmp_path / "s", payload="tokens", shapes=shapes, count=6)
    export(path, tmp_path / "tokens")
    rows, features = load_from_disk(tmp_path / "tokens")
    assert features["tokens"] == {"shape": [None, 3], "dtype": "float32", "_type": "Array2D"}
    for row in rows:
        i = int(row["key"][4:-4])
        np.testing.assert_array_equal(row["tokens"], values(shapes[i], i)[0])


def test_our_own_tables_say_what_it_is_not(tmp_path):
    path, _ = dataset(tmp_path / "dataset", tmp_path / "source")
    export(path, tmp_path / "out")
    with pytest.raises(ValueError, match="has no image columns"):
        scan_table(tmp_path / "out")


def test_the_package_reads_it(tmp_path):
    datasets = pytest.importorskip("datasets")
    path, names = dataset(tmp_path / "dataset", tmp_path / "source", dtype="float16")
    export(path, tmp_path / "out", unit_rows=3)  # with its extension types registered in pyarrow
    loaded = datasets.load_from_disk(str(tmp_path / "out"))
    assert loaded["key"][:] == sorted(names) and loaded.features["label"].names == ["bee", "ant"]
    tensors, arrays = loaded.with_format("torch"), loaded.with_format("numpy")
    model, steps = torch.nn.Linear(60, 2), 0
    for batch in torch.utils.data.DataLoader(tensors.select_columns(["moments", "label"]), batch_size=2):
        loss = torch.nn.functional.cross_entropy(model(batch["moments"].flatten(1).float()), batch["label"])
        loss.backward()
        steps += 1
    assert steps == 4
    for k, key in enumerate(sorted(names)):
        exact = values(SHAPES["moments"], int(key[4:-4]))
        np.testing.assert_array_equal(arrays[k]["moments"], exact[0])
        assert torch.equal(tensors[k]["moments_flip"].float(), torch.from_numpy(exact[1]))
        assert loaded[k]["caption"] == f"caption {key[4:-4]} é"


def test_what_a_format_has_no_place_for_is_named(tmp_path, capsys):
    path, _ = dataset(tmp_path / "d", tmp_path / "source")
    line = "not written, since mar has no place for them: caption, text, weight"
    for to in ("datasets", "webdataset", "mar"):
        convert(build(ConvertConfig, {}, {"source": str(path), "out": str(tmp_path / to), "to": to}))
        assert (line in capsys.readouterr().out) == (to == "mar")
    convert(build(ConvertConfig, {}, {"source": str(tmp_path / "webdataset"), "out": str(tmp_path / "again")}))
    assert "7 members .txt are not converted" in capsys.readouterr().out
