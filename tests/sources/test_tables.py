import json
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fastlatent.sources import arrow_files
from fastlatent.sources.arrow_files import Batches
from fastlatent.sources.items import RAGGED, Column
from fastlatent.sources.tables import is_of_split, scan_table

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def image(number):
    return b"image %d" % number


def rows(count, start=0, **columns):
    images = [{"bytes": image(start + n), "path": f"{n}.png"} for n in range(count)]
    return pa.table({"image": pa.array(images, IMAGE), **columns})


def described(table, **features):
    info = {"info": {"features": {"image": {"_type": "Image"}, **features}}}
    return table.replace_schema_metadata({"huggingface": json.dumps(info)})


def write(path, table, batch=2):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(table, path, row_group_size=batch)
    else:
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
            for one in table.to_batches(batch):
                stream.write_batch(one)
    return path


CLASSES = {"_type": "ClassLabel", "names": ["cat", "dog", "eel"]}
SUFFIXES = pytest.mark.parametrize("suffix", [".parquet", ".arrow"])


@SUFFIXES
def test_one_file(tmp_path, suffix):
    table = described(rows(5, label=[2, 0, None, -1, 1], text=["a", None, "ü", "", "e"]), label=CLASSES)
    path = write(tmp_path / f"t{suffix}", table)
    source = scan_table(path, captions="text")
    assert [item.key for item in source.items] == [f"t{suffix}/{n:08d}" for n in range(5)]
    assert [source.read(item) for item in source.items] == [image(n) for n in range(5)]
    assert source.classes == ["cat", "dog", "eel"]
    assert [item.label for item in source.items] == [2, 0, -1, -1, 1]
    assert [item.attached["caption"] for item in source.items] == ["a", "", "ü", "", "e"]
    assert source.columns == (Column("caption", "U8", (RAGGED,)),)
    assert source.items[3].place == f"{path}: row 3"
    assert {item.size for item in source.items} == {os.path.getsize(path)}
    assert len({item.stamp for item in source.items}) == 5
    assert source.left_out == {} and source.ignored == {}
    assert scan_table(path).columns == () and scan_table(path).items[0].attached == {}


@SUFFIXES
def test_files_of_a_folder_and_stable_keys(tmp_path, suffix):
    write(tmp_path / "data" / f"b{suffix}", rows(3, 10))
    write(tmp_path / "data" / "deep" / f"c{suffix}", rows(2, 20))
    (tmp_path / "README.md").write_bytes(b"")
    before = {item.key: (item.stamp, item.size) for item in scan_table(tmp_path).items}
    assert list(before) == [f"data/b{suffix}/{n:08d}" for n in range(3)] + [
        f"data/deep/c{suffix}/{n:08d}" for n in (0, 1)
    ]
    write(tmp_path / "data" / f"a{suffix}", rows(2, 0))
    write(tmp_path / "data" / f"b-1{suffix}", rows(1, 5))  # "-" sorts before ".", and "." before "/"
    source = scan_table(tmp_path)
    keys = [item.key for item in source.items]
    assert len(keys) == 8 and keys == sorted(keys, key=os.fsencode)
    assert {item.key: (item.stamp, item.size) for item in source.items}.items() >= before.items()
    numbers = [int(source.read(item).split()[1]) for item in source.items]
    assert numbers == [0, 1, 5, 10, 11, 12, 20, 21]
    assert source.ignored == {".md": 1}


@pytest.mark.parametrize("name", ["ü x", "a\udcff", "naïve/deep"])
def test_names_of_any_kind(tmp_path, name):
    write(tmp_path / "plain.parquet", rows(1))
    os.makedirs(os.path.dirname(tmp_path / name), exist_ok=True)
    os.rename(tmp_path / "plain.parquet", tmp_path / f"{name}.parquet")
    source = scan_table(tmp_path)
    assert [item.key for item in source.items] == [f"{name}.parquet/00000000"]
    assert source.read(source.items[0]) == image(0)


@SUFFIXES
@pytest.mark.parametrize("count, batch", [(0, 2), (1, 1), (2, 2), (7, 3), (6, 3)])  # none, one, whole and cut batches
def test_row_counts(tmp_path, suffix, count, batch):
    write(tmp_path / f"a{suffix}", rows(count), batch)
    write(tmp_path / f"z{suffix}", rows(1, 100), batch)
    source = scan_table(tmp_path)
    assert [source.read(item) for item in source.items] == [image(n) for n in range(count)] + [image(100)]


@SUFFIXES
def test_null_images_are_left_out_or_lie_beside(tmp_path, suffix):
    (tmp_path / "data" / "pictures").mkdir(parents=True)
    (tmp_path / "data" / "pictures" / "1.png").write_bytes(b"beside")
    (tmp_path / "outside.png").write_bytes(b"secret")
    cells = [
        {"bytes": image(0), "path": None},
        None,
        {"bytes": None, "path": "pictures/1.png"},
        {"bytes": None, "path": "pictures/2.png"},
        {"bytes": None, "path": None},
        {"bytes": None, "path": str(tmp_path / "outside.png")},
        {"bytes": None, "path": "../outside.png"},
        {"bytes": b"", "path": "pictures/1.png"},  # there, and empty: the decoder says so
        {"bytes": image(8), "path": "8.png"},
    ]
    table = pa.table({"image": pa.array(cells, IMAGE), "label": pa.array(range(9))})
    source = scan_table(write(tmp_path / "data" / f"t{suffix}", table).parent)
    keys = [f"t{suffix}/{n:08d}" for n in range(9)]
    assert [item.key for item in source.items] == [keys[n] for n in (0, 2, 7, 8)]  # numbers are those of the table
    assert [item.label for item in source.items] == [0, 2, 7, 8]
    assert [source.read(item) for item in source.items] == [image(0), b"beside", b"", image(8)]
    aside = source.items[1]
    assert aside.place == str(tmp_path / "data" / "pictures" / "1.png") and aside.size == len(b"beside")
    assert source.left_out.keys() == {keys[n] for n in (1, 3, 4, 5, 6)}
    assert source.left_out[keys[1]] == source.left_out[keys[4]] == "the image is null"
    assert source.left_out[keys[3]] == "the image is null, and 'pictures/2.png' is not there"


def test_statistics_save_reading_the_images(tmp_path, monkeypatch):
    path = write(tmp_path / "t.parquet", rows(4, label=[0, 1, 0, 1]))
    asked = []
    read = pq.ParquetFile.read_row_group
    monkeypatch.setattr(
        pq.ParquetFile,
        "read_row_group",
        lambda *args, **kwargs: asked.append(kwargs["columns"]) or read(*args, **kwargs),
    )
    source = scan_table(path)
    assert asked == [["label"], ["label"]]
    source.read(source.items[0])
    assert asked[2:] == [["image.bytes"]]  # no other column


def test_without_statistics(tmp_path):
    cells = [{"bytes": image(0), "path": None}, None]
    pq.write_table(pa.table({"image": pa.array(cells, IMAGE)}), tmp_path / "t.parquet", write_statistics=False)
    source = scan_table(tmp_path)
    assert len(source.items) == 1 and list(source.left_out) == ["t.parquet/00000001"]


def names(value):
    """An id without addresses: the columns' names."""
    return "+".join(value) if isinstance(value, dict) else str(value)


def images(kind=None, count=2):
    return pa.array([image(n) for n in range(count)], kind or pa.binary())


@SUFFIXES
@pytest.mark.parametrize(
    "columns, chosen",
    [
        ({"jpg": images(), "label": pa.array([0, 1])}, "jpg"),
        ({"PNG": images(pa.large_binary())}, "PNG"),
        (
            {"picture": pa.array([{"bytes": image(n), "path": ""} for n in range(2)], IMAGE), "other": images()},
            "picture",
        ),
        ({"image": images(), "jpg": images(), "depth": images()}, "image"),
        ({"a.b": pa.array([{"path": "", "bytes": image(n)} for n in range(2)])}, "a.b"),
    ],
    ids=names,
)
def test_the_image_column(tmp_path, suffix, columns, chosen):
    source = scan_table(write(tmp_path / f"t{suffix}", pa.table(columns)))
    assert [source.read(item) for item in source.items] == [image(0), image(1)], chosen


@pytest.mark.parametrize(
    "columns",
    [
        {"data": images()},
        {"image": pa.array(["a", "b"])},
        {"jpg": images(), "png": images()},
        {"a": pa.array([{"bytes": b"", "path": ""}], IMAGE), "b": pa.array([{"bytes": b"", "path": ""}], IMAGE)},
    ],
    ids=names,
)
def test_no_or_several_image_columns(tmp_path, columns):
    with pytest.raises(ValueError, match=f"image columns .*its columns: {next(iter(columns))}"):
        scan_table(write(tmp_path / "t.parquet", pa.table(columns)))


@SUFFIXES
def test_the_features_name_the_image(tmp_path, suffix):
    table = pa.table({"control": pa.array([{"bytes": b"no", "path": ""}], IMAGE), "target": images(count=1)})
    info = {"info": {"features": {"target": {"_type": "Image"}, "control": {"bytes": {"_type": "Value"}}}}}
    source = scan_table(
        write(tmp_path / f"t{suffix}", table.replace_schema_metadata({"huggingface": json.dumps(info)}))
    )
    assert source.read(source.items[0]) == image(0)


@pytest.mark.parametrize("text", ["{", "[]", '{"info": []}', '{"info": {"features": [1]}}'])
def test_damaged_features_are_left_out(tmp_path, text):
    write(tmp_path / "a.parquet", rows(1).replace_schema_metadata({"huggingface": text}))
    write(tmp_path / "b.parquet", rows(1))
    source = scan_table(tmp_path)
    assert "features is damaged" in source.left_out["a.parquet"] and len(source.items) == 1


def test_features_of_no_use(tmp_path):
    for text in "{}", '{"info": {}}', '{"info": {"features": null}}', '{"info": {"features": {"image": [], "x": {}}}}':
        write(tmp_path / "a.parquet", rows(1).replace_schema_metadata({"huggingface": text}))
        assert len(scan_table(tmp_path).items) == 1


@pytest.mark.parametrize("kind", [pa.int64(), pa.int8(), pa.uint16()])
def test_integer_labels_without_names(tmp_path, kind):
    write(tmp_path / "a.parquet", rows(3, label=pa.array([3, None, 0], kind)))
    write(tmp_path / "b.parquet", rows(1, label=pa.array([5], kind)))
    source = scan_table(tmp_path)
    assert source.classes == ["0", "1", "2", "3", "4", "5"]
    assert [item.label for item in source.items] == [3, -1, 0, 5]


def test_labels_that_are_no_classes(tmp_path):
    path = write(tmp_path / "t.parquet", rows(1, label=[2**40]))
    with pytest.raises(ValueError, match="holds no classes; it goes up to 1099511627776"):
        scan_table(path)
    write(path, rows(1, label=["cat"]))  # text: no labels
    assert scan_table(path).classes == [] and scan_table(path).items[0].label == -1
    write(path, rows(1, label=[-1]))
    assert scan_table(path).classes == []


def test_which_class_label(tmp_path):
    coarse, fine = {**CLASSES, "names": ["x"]}, CLASSES
    path = write(tmp_path / "t.parquet", described(rows(1, fine=[1], coarse=[0]), fine=fine, coarse=coarse))
    assert scan_table(path).classes == CLASSES["names"]  # the first of the features
    write(path, described(rows(1, coarse=[0], label=[1]), coarse=coarse, label=fine))
    assert scan_table(path).classes == CLASSES["names"]  # the one called label
    write(path, described(rows(1, label=[1]), label={"_type": "ClassLabel", "num_classes": 3}))
    assert scan_table(path).classes == ["0", "1"]  # without names the numbers themselves


def test_files_that_differ_or_are_damaged_are_left_out(tmp_path):
    good = described(rows(3, label=[0, 1, 2]), label=CLASSES)
    write(tmp_path / "a.parquet", good)
    write(tmp_path / "b.parquet", described(rows(1, label=[1]), label={**CLASSES, "names": ["eel", "cat", "dog"]}))
    write(tmp_path / "c.parquet", described(rows(1, label=[3]), label=CLASSES))
    write(tmp_path / "d.parquet", pa.table({"x": [1]}))
    (tmp_path / "e.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-9])
    (tmp_path / "f.parquet").write_bytes(b"")
    arrow = write(tmp_path / "g.arrow", good).read_bytes()
    (tmp_path / "g.arrow").write_bytes(arrow[:-8])  # cut between two batches
    (tmp_path / "h.arrow").write_bytes(arrow[:-100])
    (tmp_path / "i.arrow").write_bytes(b"")
    with pa.OSFile(str(tmp_path / "j.arrow"), "wb") as file, pa.ipc.new_file(file, good.schema) as footer:
        footer.write_table(good)
    write(tmp_path / "k.parquet", good)
    source = scan_table(tmp_path)
    assert [item.key[:1] for item in source.items] == ["a"] * 3 + ["k"] * 3
    left_out = source.left_out
    assert "differ" in left_out["b.parquet"]
    assert "label 3 in 'label', which has 3 classes" in left_out["c.parquet"]
    assert "has no image columns" in left_out["d.parquet"]
    assert "it was cut off" in left_out["g.arrow"]
    assert "with a footer" in left_out["j.arrow"]
    for name in "e.parquet", "f.parquet", "h.arrow", "i.arrow":
        assert "not a table that can be read" in left_out[name]
    assert left_out.keys() == {f"{name}.parquet" for name in "bcdef"} | {f"{name}.arrow" for name in "ghij"}


def test_broken_links_are_left_out(tmp_path):
    write(tmp_path / "a.parquet", rows(1))
    for name in "b.parquet", "c.png":
        (tmp_path / name).symlink_to("nowhere")
    source = scan_table(tmp_path)
    assert list(source.left_out) == ["b.parquet"] and len(source.items) == 1


def test_a_row_group_that_cannot_be_read(tmp_path):
    path = tmp_path / "t.parquet"
    pq.write_table(rows(400), path, row_group_size=200, compression="snappy", use_dictionary=False)
    source = scan_table(path)
    data = bytearray(path.read_bytes())
    end = pq.read_metadata(path).row_group(1).column(0).data_page_offset
    data[20 : end - 20] = b"\xff" * (end - 40)
    path.write_bytes(data)
    for _ in range(2):  # also the second time: a failure is not kept
        with pytest.raises((ValueError, OSError)):
            source.read(source.items[0])
    assert source.read(source.items[399]) == image(399)


@SUFFIXES
def test_all_files_damaged(tmp_path, suffix):
    (tmp_path / f"a{suffix}").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=f"none of its 1 files has an image.*a{suffix}: not a table"):
        scan_table(tmp_path)


@pytest.mark.parametrize("captions", ["nothing", "label", "image"])
def test_captions_that_are_no_text(tmp_path, captions):
    path = write(tmp_path / "t.parquet", rows(1, label=[1], text=["a"]))
    with pytest.raises(ValueError, match=f"no text column '{captions}'.*text \\(string\\)"):
        scan_table(path, captions=captions)


def test_nothing_there(tmp_path):
    with pytest.raises(ValueError, match=r"holds no .parquet and no .arrow file"):
        scan_table(tmp_path)
    with pytest.raises(ValueError, match="cannot be listed"):
        scan_table(tmp_path / "missing")
    with pytest.raises(ValueError, match="no such file"):
        scan_table(tmp_path / "missing.parquet")
    write(tmp_path / "t.parquet", rows(0))
    with pytest.raises(ValueError, match="none of its 1 files has an image"):
        scan_table(tmp_path)


@pytest.mark.parametrize(
    "path, expected",
    [
        ("data/train-00000-of-00014.parquet", True),
        ("data/train-00000-of-00001-a09b74b3ef9c3b56.parquet", True),
        ("train.parquet", True),
        ("train_0.parquet", True),
        ("default/train/0000.parquet", True),
        ("train/data-00000-of-00001.arrow", True),
        ("data/validation-00000-of-00001.parquet", False),
        ("data/train_extra-00000-of-00001.parquet", False),
        ("data/train-extra.parquet", False),
        ("data/trainer.parquet", False),
        ("train.parquet/0.parquet", False),
    ],
)
def test_is_of_split(path, expected):
    assert is_of_split(path, "train") == expected


def test_splits(tmp_path):
    write(tmp_path / "data" / "train-00000-of-00001.parquet", rows(2))
    write(tmp_path / "data" / "test-00000-of-00001.parquet", rows(3))
    assert len(scan_table(tmp_path).items) == 5
    assert len(scan_table(tmp_path, split="train").items) == 2
    with pytest.raises(ValueError, match="of split 'val'.*it holds data/test-00000-of-00001.parquet, data/train"):
        scan_table(tmp_path, split="val")


def saved(folder, features=None, shards=2):
    """As datasets.save_to_disk writes it."""
    names = [f"data-{n:05d}-of-{shards:05d}.arrow" for n in range(shards)]
    for number, name in enumerate(names):
        write(folder / name, rows(3, 10 * number, label=[0, 1, 2]))
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    info = {"features": features or {"image": {"_type": "Image"}, "label": CLASSES}}
    (folder / "dataset_info.json").write_text(json.dumps(info))


def test_save_to_disk(tmp_path):
    for split in ("train", "test"):
        saved(tmp_path / split)
    write(tmp_path / "train" / "cache-0123456789abcdef.arrow", rows(9))
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    source = scan_table(tmp_path, split="train")
    assert [item.key for item in source.items] == [
        f"train/data-{shard:05d}-of-00002.arrow/{n:08d}" for shard in range(2) for n in range(3)
    ]
    assert source.classes == CLASSES["names"] and source.items[2].label == 2
    assert source.ignored == {".arrow": 1}  # the cache of `map`
    assert len(scan_table(tmp_path).items) == 12
    assert len(scan_table(tmp_path / "test").items) == 6
    (tmp_path / "train" / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(ValueError, match="'train/data-00001-of-00002.arrow' is listed in the state.json"):
        scan_table(tmp_path)
    assert len(scan_table(tmp_path, split="test").items) == 6
    (tmp_path / "test" / "state.json").write_text("{}")
    with pytest.raises(ValueError, match="not what save_to_disk writes"):
        scan_table(tmp_path / "test")


@SUFFIXES
def test_remote_is_the_same(tmp_path, suffix):
    table = described(rows(5, label=[2, 0, 1, None, 1], text=["a", None, "ü", "", "e"]), label=CLASSES)
    write(tmp_path / "data" / f"t{suffix}", table)
    memory = fsspec.filesystem("memory")
    memory.put(str(tmp_path), "/tables", recursive=True)
    try:
        here = scan_table(tmp_path, captions="text")
        there = scan_table("memory://tables", captions="text")
        single = scan_table(f"memory://tables/data/t{suffix}", captions="text")
        assert there.classes == here.classes
        for a, b, c in zip(here.items, there.items, single.items, strict=True):
            assert (a.key, a.size, a.label, a.attached) == (b.key, b.size, b.label, b.attached)
            assert here.read(a) == there.read(b) == single.read(c)
            assert c.key == a.key.removeprefix("data/")
    finally:
        memory.rm("/tables", recursive=True)


@SUFFIXES
def test_many_threads(tmp_path, suffix):
    for name in "ab":
        write(tmp_path / f"{name}{suffix}", rows(40, ord(name)), batch=7)
    source = scan_table(tmp_path)
    order = np.random.default_rng(0).permutation(np.repeat(np.arange(80), 4))
    with ThreadPoolExecutor(8) as pool:
        read = list(pool.map(lambda n: source.read(source.items[n]), order.tolist()))
    assert read == [image(n % 40 + ord("ab"[n // 40])) for n in order]


def test_a_batch_is_loaded_once_and_two_are_kept():
    batches, loads, entered = Batches(), [], threading.Barrier(4)

    def load(number):
        loads.append(number)
        return number

    def get(_):
        entered.wait()
        return batches.get("t", 0, lambda: load(0))

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(get, range(4))) == [0] * 4
    assert loads == [0]
    for number in (1, 0, 2, 0, 1):  # 2 pushes out 1, the older of the two
        assert batches.get("t", number, lambda number=number: load(number)) == number
    assert loads == [0, 1, 2, 1]
    assert arrow_files.BATCHES_KEPT == 2


def test_a_load_that_fails_is_tried_again():
    batches = Batches()
    with pytest.raises(OSError):
        batches.get("t", 0, lambda: (_ for _ in ()).throw(OSError()))
    assert batches.get("t", 0, lambda: 7) == 7


def test_pyarrow_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    with pytest.raises(ValueError, match=r"pip install 'fastlatent\[tables\]'"):
        scan_table(tmp_path)
