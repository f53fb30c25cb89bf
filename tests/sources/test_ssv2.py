import errno
import json
import os
import pickle
import time

import fsspec
import numpy as np
import pytest
from toy_ssv2 import TEMPLATES, make_ssv2

from fastlatent.sources.columnar import ItemTable
from fastlatent.sources.ssv2 import SPLITS, scan_ssv2

CLASSES = [template.replace("[", "").replace("]", "") for template in TEMPLATES]


def write(root, split, entries, *names, folder="videos"):
    """A list, and empty clips."""
    (root / folder).mkdir(parents=True, exist_ok=True)
    (root / f"{split}.json").write_text(entries if isinstance(entries, str) else json.dumps(entries))
    for name in names:
        (root / folder / name).touch()
    return root


def keys(root, split="train"):
    return [one.key for one in scan_ssv2(root, split=split).items]


def test_every_split(tmp_path):
    ids = make_ssv2(tmp_path)
    number = 0
    for split in SPLITS:
        source = scan_ssv2(tmp_path, split=split)
        assert [one.key for one in source.items] == sorted(ids[split]) and isinstance(source.items, ItemTable)
        assert source.classes == CLASSES and source.columns == () and source.left_out == {} and source.remarks == ()
        by_key = {one.key: one for one in source.items}
        for id in ids[split]:
            item, path = by_key[id], tmp_path / "20bn-something-something-v2" / f"{id}.webm"
            assert (item.place, item.size, item.stamp) == (str(path), 6, path.stat().st_mtime_ns)
            assert item.label == (-1 if split == "test" else number % len(TEMPLATES))
            assert source.fetch(item) == f"clip {number}".encode()
            number += 1


@pytest.mark.parametrize("folder", ["", "annotations", "labels"])
@pytest.mark.parametrize("videos", ["", "videos", "something-something-v2", "20bn-something-something-v2", "videos/a"])
def test_where_lists_and_videos_may_lie(tmp_path, folder, videos):
    ids = make_ssv2(tmp_path, lists=folder, videos=videos, counts={"validation": 2})
    (tmp_path / folder / "validation.json").rename(tmp_path / folder / "something-something-v2-validation.json")
    (tmp_path / folder / "labels.json").rename(tmp_path / folder / "something-something-v2-labels.json")
    source = scan_ssv2(tmp_path, split="validation")
    assert [one.key for one in source.items] == sorted(ids["validation"])
    assert source.classes == CLASSES


def test_videos_elsewhere_do_not_count(tmp_path):
    root = write(tmp_path, "train", ["1"], "1.webm")
    for folder in ("previews", "videos/a/b", "annotations"):
        (root / folder).mkdir(parents=True)
        (root / folder / "1.webm").touch()
    assert scan_ssv2(root, split="train").items[0].place == str(root / "videos" / "1.webm")


@pytest.mark.parametrize("entries", [["9", "10"], [9, 10], [{"id": 9}, {"id": "10", "label": "x"}], ["10", {"id": 9}]])
def test_lists_of_ids(tmp_path, entries):
    root = write(tmp_path, "train", entries, "9.webm", "10.MP4", "11.mkv")
    source = scan_ssv2(root, split="train")
    assert [(one.key, one.label) for one in source.items] == [("10", -1), ("9", -1)]  # sorted by bytes
    assert source.classes == [] and source.remarks == () and source.left_out == {}


def test_a_byte_order_mark_and_names_of_other_letters(tmp_path):
    names = ["a b", "ünï-🙂", "x.y", "-1"]
    root = write(tmp_path, "train", "\ufeff" + json.dumps(names), *(f"{name}.webm" for name in names))
    assert keys(root) == sorted(names, key=os.fsencode)


def test_missing_and_broken_videos_are_left_out_by_id(tmp_path):
    root = write(tmp_path, "train", ["3", "1", "2", "4"], "1.webm", "30.webm")
    os.symlink("gone", root / "videos" / "4.webm")
    os.symlink("gone", root / "videos" / "5.webm")  # of another split
    source = scan_ssv2(root, split="train")
    assert [one.key for one in source.items] == ["1"]
    missing = (
        "no video of this name (.webm, .mp4, .mkv) in the root, videos/, something-something-v2/, "
        "20bn-something-something-v2/"
    )
    assert list(source.left_out.items()) == [
        ("3", missing),  # in the list's order
        ("2", missing),
        ("4", f"videos/4.webm cannot be read: {os.strerror(errno.ENOENT)}"),
    ]


def test_two_videos_of_one_id(tmp_path):
    root = write(tmp_path, "train", ["1", "2"], "1.webm", "2.webm", "3.webm", "3.mp4")  # nobody asks for 3
    assert keys(root) == ["1", "2"]
    (root / "1.mp4").touch()
    with pytest.raises(ValueError, match="two videos of id '1': 1.mp4 and videos/1.webm; leave one there"):
        scan_ssv2(root, split="train")
    (root / "1.mp4").unlink()
    (root / "videos" / "2.mkv").touch()
    with pytest.raises(ValueError, match="two videos of id '2': videos/2.mkv and videos/2.webm"):
        scan_ssv2(root, split="train")


def test_one_video_by_two_paths(tmp_path):
    root = write(tmp_path, "train", ["1", "2"], "1.webm", "2.webm")
    os.symlink("videos", root / "something-something-v2")
    os.link(root / "videos" / "1.webm", root / "1.webm")
    assert [(one.key, one.place) for one in scan_ssv2(root, split="train").items] == [
        ("1", str(root / "1.webm")),
        ("2", str(root / "something-something-v2" / "2.webm")),  # the first by bytes
    ]


class TestSplits:
    @pytest.mark.parametrize(
        ("split", "got"), [(None, "none"), ("val", "'val': say validation"), ("Train", "'Train'"), ("", "''")]
    )
    def test_that_do_not_exist(self, tmp_path, split, got):
        with pytest.raises(ValueError, match=f"--split: expected train, validation, test of .*, got {got}$"):
            scan_ssv2(tmp_path, split=split)

    def test_without_a_list(self, tmp_path):
        root = write(tmp_path, "train", ["1"], "1.webm")
        with pytest.raises(ValueError, match="no list of split 'test', but of train; looked for test.json, "):
            scan_ssv2(root, split="test")
        write(tmp_path, "validation", ["1"])
        with pytest.raises(ValueError, match="no list of split 'test', but of train and validation; "):
            scan_ssv2(root, split="test")
        with pytest.raises(ValueError, match="no list of split 'test', but of none; "):
            scan_ssv2(root / "videos", split="test")
        os.symlink("gone", root / "test.json")
        with pytest.raises(ValueError, match="test.json: cannot be read: No such file"):
            scan_ssv2(root, split="test")

    def test_with_two_lists(self, tmp_path):
        root = write(tmp_path, "train", ["1"], "1.webm", "2.webm")
        (root / "labels").mkdir()
        (root / "labels" / "something-something-v2-train.json").write_text('[ "1" ]')
        assert keys(root) == ["1"]
        (root / "labels" / "something-something-v2-train.json").write_text('["2"]')
        with pytest.raises(
            ValueError, match="2 different lists train.json and labels/something-something-v2-train.json"
        ):
            scan_ssv2(root, split="train")

    def test_without_a_folder(self, tmp_path):
        with pytest.raises(ValueError, match="missing' does not exist; expected a folder with the lists train.json"):
            scan_ssv2(tmp_path / "missing", split="train")


class TestBadLists:
    @pytest.mark.parametrize(
        ("text", "why"),
        [("", "is not JSON: Expecting value"), ('["1"', "is not JSON: Expecting ',' delimiter"),
         ("[" * 100_000, "is not JSON: "), ("null", "expected a list .*, got a JSON NoneType"),
         ('{"1": "2"}', "expected a list .*, got a JSON dict"), ("[]", "expected a list .*, got an empty list")],
    )  # fmt: skip
    def test_that_are_none(self, tmp_path, text, why):
        with pytest.raises(ValueError, match=f"train.json:? {why}"):
            scan_ssv2(write(tmp_path, "train", text, "1.webm"), split="train")

    def test_that_are_no_utf8(self, tmp_path):
        root = write(tmp_path, "train", ["1"], "1.webm")
        (root / "train.json").write_bytes(b'["\xff"]')
        with pytest.raises(ValueError, match=r"train.json is not JSON: 'utf-8' codec.*position 2"):
            scan_ssv2(root, split="train")

    @pytest.mark.parametrize(
        "entry",
        [{}, {"id": None}, {"id": ["1"]}, {"ID": "1"}, None, 1.5, True, [], "", "../x", "a/b", "/1", ".hidden", "..",
         "a\0b", "half \ud83d", {"id": ""}, {"id": False}],
    )  # fmt: skip
    def test_entries_without_a_usable_id(self, tmp_path, entry):
        root = write(tmp_path, "train", ["1", entry, "2"], "1.webm")
        with pytest.raises(ValueError, match="train.json, entry 2: expected an id, such as 78687, .* mend the entry"):
            scan_ssv2(root, split="train")

    @pytest.mark.parametrize("entries", [["7", "1", "7"], [7, 1, "7"], [{"id": 7}, 1, {"id": "7", "template": "x"}]])
    def test_ids_that_occur_twice(self, tmp_path, entries):
        root = write(tmp_path, "train", entries, "7.webm")
        with pytest.raises(ValueError, match="entry 3: its id '7' is that of entry 1 too; take one of them out"):
            scan_ssv2(root, split="train")

    def test_templates_that_are_no_text(self, tmp_path):
        root = write(tmp_path, "train", [{"id": 1, "template": 3}], "1.webm")
        with pytest.raises(ValueError, match="entry 1: expected a text as its template, got 3"):
            scan_ssv2(root, split="train")

    def test_of_another_dataset(self, tmp_path):
        root = write(tmp_path, "train", ["1", "2"], "3.webm")
        with pytest.raises(
            ValueError,
            match=r"no video of the 2 ids in train.json .*; the first is '1': looked for 1 with .webm, .* videos/",
        ):
            scan_ssv2(root, split="train")
        os.symlink("gone", root / "videos" / "1.webm")
        with pytest.raises(ValueError, match=r"the first is '1': videos/1.webm cannot be read"):
            scan_ssv2(root, split="train")


class TestLabels:
    ENTRIES = ({"id": 1, "template": "Holding [something]"}, {"id": 2, "template": "Folding [something]"}, {"id": 3})

    def root(self, tmp_path, labels):
        root = write(tmp_path, "train", self.ENTRIES, "1.webm", "2.webm", "3.webm")
        if labels is not None:
            (root / "labels.json").write_text(json.dumps(labels))
        return root

    @pytest.mark.parametrize("labels", [{"Folding something": 1, "Holding something": 0},
                                        {"Folding something": "1", "Holding something": "0"}])  # fmt: skip
    def test_are_in_the_order_of_their_indices(self, tmp_path, labels):
        source = scan_ssv2(self.root(tmp_path, labels), split="train")
        assert source.classes == ["Holding something", "Folding something"] and source.remarks == ()
        assert [one.label for one in source.items] == [0, 1, -1]

    def test_that_are_missing_are_remarked(self, tmp_path):
        source = scan_ssv2(self.root(tmp_path, {"Folding something": 0}), split="train")
        assert [one.label for one in source.items] == [-1, 0, -1]
        assert source.remarks == ("1 of 3 clips have no label: labels.json has no 'Holding something' (clip 1)",)
        (tmp_path / "labels.json").unlink()
        source = scan_ssv2(tmp_path, split="train")
        assert [one.label for one in source.items] == [-1, -1, -1] and source.classes == []
        assert source.remarks == ("2 of 3 clips have no label: there is no labels.json (clip 1)",)

    @pytest.mark.parametrize(
        "labels",
        [{}, [], ["Folding something"], {"a": 0, "b": 0}, {"a": 0, "b": 2}, {"a": 1}, {"a": -1}, {"a": "x"},
         {"a": True}, {"a": "٣"}, {"a": 0.0}, {"a": None}],
    )  # fmt: skip
    def test_that_are_damaged(self, tmp_path, labels):
        with pytest.raises(ValueError, match=r"labels.json: expected \{.*every index from 0 on once, got .*mend it"):
            scan_ssv2(self.root(tmp_path, labels), split="train")


def test_behind_a_url_and_in_other_processes(tmp_path):
    memory = fsspec.filesystem("memory")
    ids = make_ssv2(tmp_path)["train"]
    memory.put(str(tmp_path), "/ssv2", recursive=True)
    try:
        source = scan_ssv2("memory://ssv2", split="train")
        assert [one.key for one in source.items] == sorted(ids)
        assert source.items[0].place == f"memory://ssv2/20bn-something-something-v2/{sorted(ids)[0]}.webm"
        items, read = pickle.loads(pickle.dumps((source.items, source.read)))
        assert sorted(read(one) for one in items) == [f"clip {i}".encode() for i in range(4)]
        memory.pipe(f"/ssv2/videos/{ids[0]}.webm", b"another")
        with pytest.raises(ValueError, match=f"two videos of id '{ids[0]}'"):
            scan_ssv2("memory://ssv2", split="train")
    finally:
        memory.rm("/ssv2", recursive=True)


@pytest.mark.soak
def test_all_of_it_is_listed_at_once(tmp_path):
    # 220,847 clips in one folder, 168,913 of them in the train split: 1.5 s on 2 cores.
    ids = [str(i) for i in range(1, 220_848)]
    make_ssv2(tmp_path, counts={"test": 0}, lists="", videos="videos")
    for id in ids:
        os.close(os.open(tmp_path / "videos" / f"{id}.webm", os.O_CREAT | os.O_WRONLY))
    entries = [{"id": id, "label": "holding a cup", "template": TEMPLATES[int(id) % 3]} for id in ids[:168_913]]
    (tmp_path / "train.json").write_text(json.dumps(entries))
    seconds = []
    for _ in range(3):
        begin = time.perf_counter()
        source = scan_ssv2(tmp_path, split="train")
        seconds.append(time.perf_counter() - begin)
    assert len(source.items) == 168_913 and source.left_out == {}
    wanted = [int(id) % 3 for id in sorted(ids[:168_913])]
    assert np.array_equal(source.items.label, wanted)
    assert min(seconds) < 2, seconds
