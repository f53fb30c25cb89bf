import io
import json
import os
import pickle
import tarfile

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from toy_ssv2 import make_ssv2

from fastlatent.sources.open import FLAGS, KINDS, kind_of, open_source

IMAGE = b"\x89PNG"


def touch(*paths):
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(IMAGE)


def write_tar(path, image="a.png"):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in (image, IMAGE), ("a.txt", b"text"):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def write_table(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({"png": [IMAGE], "text": ["text"]})
    if path.suffix == ".parquet":
        pq.write_table(table, path)
    else:
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
            stream.write_table(table)


def write_trajectory(path):
    touch(path / "0.jpg")
    (path / "traj_data.pkl").write_bytes(pickle.dumps({"position": np.zeros((1, 2)), "yaw": np.zeros(1)}))


def write_manifest(path):
    touch(path.parent / "1.png")
    path.write_text(json.dumps([{"output_rel": "1.png", "metadata": {"split": "train", "text": "t", "wind": 1}}]))


def make(root):
    """Sources of every kind: path -> (kind, key of its only item)."""
    write_manifest(root / "manifest" / "m.json")
    write_manifest(root / "lines" / "m.JSONL")
    write_tar(root / "tar" / "a.tar")
    write_tar(root / "tars" / "deep" / "a.tar")
    (root / "tars" / "README.md").write_bytes(b"")
    write_table(root / "table" / "t.parquet")
    write_table(root / "stream" / "t.arrow")
    write_table(root / "tables" / "data" / "train-00000-of-00001.parquet")
    (root / "tables" / "README.md").write_bytes(b"")
    write_table(root / "saved" / "t.arrow")
    touch(root / "saved" / "assets" / "logo.png")
    (root / "saved" / "state.json").write_text('{"_data_files": [{"filename": "t.arrow"}]}')
    (root / "saved" / "dataset_info.json").write_text("{}")
    write_trajectory(root / "recon" / "t_0")
    touch(root / "folder" / "class" / "1.png", root / "flat" / "1.png", root / "mixed" / "1.png")
    write_tar(root / "mixed" / "a.tar")
    write_table(root / "mixed" / "t.parquet")
    return {
        "manifest/m.json": ("manifest", "1.png"),
        "lines/m.JSONL": ("manifest", "1.png"),
        "tar/a.tar": ("tars", "a.tar/a.png"),
        "tars": ("tars", "deep/a.tar/a.png"),
        "table/t.parquet": ("table", "t.parquet/00000000"),
        "stream/t.arrow": ("table", "t.arrow/00000000"),
        "tables": ("table", "data/train-00000-of-00001.parquet/00000000"),
        "saved": ("table", "t.arrow/00000000"),
        "recon": ("trajectories", "t_0/0.jpg"),
        "folder": ("images", "class/1.png"),
        "flat": ("images", "1.png"),
        "mixed": ("images", "1.png"),
    }


def test_every_kind(tmp_path):
    for path, (kind, key) in make(tmp_path).items():
        assert kind_of(tmp_path / path) == kind, path
        source = open_source(tmp_path / path)
        assert [item.key for item in source.items] == [key]
        assert source.read(source.items[0]) == IMAGE
        assert [item.key for item in open_source(tmp_path / path, kind=kind).items] == [key]


def test_every_kind_remote(tmp_path):
    memory = fsspec.filesystem("memory")
    expected = make(tmp_path)
    memory.put(str(tmp_path), "/sources", recursive=True)
    try:
        for path, (kind, key) in expected.items():
            assert kind_of(f"memory://sources/{path}") == kind, path
            source = open_source(f"memory://sources/{path}")
            assert [item.key for item in source.items] == [key]
            assert source.read(source.items[0]) == IMAGE
    finally:
        memory.rm("/sources", recursive=True)


def test_the_kind_may_be_told(tmp_path):
    make(tmp_path)
    assert open_source(tmp_path / "recon", kind="images").classes == ["t_0"]
    assert [item.key for item in open_source(tmp_path / "mixed", kind="tars").items] == ["a.tar/a.png"]
    with pytest.raises(ValueError, match="kind: expected auto, manifest, .*got 'video'"):
        open_source(tmp_path, kind="video")


def test_a_folder_that_is_called_like_a_file(tmp_path):
    touch(tmp_path / "images.json" / "1.png")
    assert kind_of(tmp_path / "images.json") == "images"


def test_options_reach_their_kind(tmp_path):
    make(tmp_path)
    write_table(tmp_path / "tables" / "data" / "val-00000-of-00001.parquet")
    assert len(open_source(tmp_path / "tables", split="val").items) == 1
    assert open_source(tmp_path / "tables", captions="text").items[0].attached == {"caption": "text"}
    assert open_source(tmp_path / "tars", captions="txt").items[0].attached == {"caption": "text"}
    (tmp_path / "flat" / "1.txt").write_text("text")
    assert open_source(tmp_path / "flat", captions="txt").items[0].attached == {"caption": "text"}
    manifest = open_source(
        tmp_path / "manifest" / "m.json",
        split="train",
        captions="text",
        conditions="wind:2",
        root=str(tmp_path / "flat"),
    )
    assert manifest.items[0].attached == {"caption": "t", "condition": [1.0, 0.0], "condition_present": [1.0]}
    assert manifest.items[0].place == str(tmp_path / "flat" / "1.png")
    write_trajectory(tmp_path / "recon" / "t_1")
    (tmp_path / "names.txt").write_text("t_1\n")
    assert [item.group for item in open_source(tmp_path / "recon", names=tmp_path / "names.txt").items] == ["t_1"]


GIVEN = {"split": "train", "names": "names.txt", "captions": "txt", "conditions": "wind:3", "root": "images"}


@pytest.mark.parametrize(("media", "kind"), [(media, kind) for media, kinds in KINDS.items() for kind in kinds])
def test_an_option_that_means_nothing(tmp_path, media, kind):
    for name in GIVEN.keys() - set(KINDS[media][kind][1]):
        with pytest.raises(ValueError, match=f"{FLAGS[name]} .* means nothing for .*of kind {kind}; it is for [a-z]"):
            open_source(tmp_path, media=media, kind=kind, **{name: GIVEN[name]})


@pytest.mark.parametrize("conditions", ["none", ""])
def test_no_conditions_are_no_option(tmp_path, conditions):
    touch(tmp_path / "1.png")
    assert len(open_source(tmp_path, conditions=conditions).items) == 1


def test_what_is_not_there(tmp_path):
    for name in ("missing", "missing.json", "missing.tar", "missing.parquet"):
        with pytest.raises(ValueError, match="missing"):
            open_source(tmp_path / name)
    with pytest.raises(ValueError, match="no image"):
        open_source(tmp_path)
    with pytest.raises(ValueError, match="nobody"):
        open_source("nobody://knows/this")


def test_loops_end(tmp_path):
    folder = tmp_path / "data" / "a" / "b"
    folder.mkdir(parents=True)
    for number in range(3):  # 3 ways on from each of 40 levels, if the loop were followed
        (folder / f"loop{number}").symlink_to(tmp_path / "data")
    write_tar(tmp_path / "elsewhere" / "a.tar")
    (tmp_path / "data" / "link").symlink_to(tmp_path / "elsewhere")
    assert kind_of(tmp_path / "data") == "tars"
    (tmp_path / "data" / ".hidden.png").write_bytes(b"")
    (tmp_path / "data" / "self").symlink_to("self")
    assert kind_of(tmp_path / "data") == "tars"


def test_an_image_folder_is_known_by_its_first_image(tmp_path, monkeypatch):
    touch(*(tmp_path / f"{n}" / "1.png" for n in range(50)))
    listed = []
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: listed.append(path) or scandir(path))
    assert kind_of(tmp_path) == "images"
    assert len(listed) <= 4  # the root and a class, and the root again for trajectories


def make_videos(root):
    """Sources of videos of every kind: path -> (kind, key of its only item)."""
    id = make_ssv2(root / "ssv2", counts={"train": 1})["train"][0]
    write_tar(root / "tar" / "a.tar", "a.mp4")
    write_tar(root / "tars" / "deep" / "a.tar", "a.webm")
    touch(root / "tars" / "poster.jpg")
    touch(root / "folder" / "class" / "1.mp4", root / "flat" / "1.MKV")
    touch(root / "mixed" / "1.mov", root / "mixed" / "thumbnails" / "1.jpg")
    write_tar(root / "mixed" / "a.tar", "a.mp4")
    touch(root / "frames" / "clip" / "1.png")
    return {
        "ssv2": ("ssv2", id),
        "tar/a.tar": ("tars", "a.tar/a.mp4"),
        "tars": ("tars", "deep/a.tar/a.webm"),
        "folder": ("videos", "class/1.mp4"),
        "flat": ("videos", "1.MKV"),
        "mixed": ("videos", "1.mov"),
        "frames": ("frames", "clip"),
    }


class TestVideos:
    def test_every_kind(self, tmp_path):
        for path, (kind, key) in make_videos(tmp_path).items():
            assert kind_of(tmp_path / path, "videos") == kind, path
            options = {"media": "videos", "split": "train" if kind == "ssv2" else None}
            for told in ("auto", kind):
                source = open_source(tmp_path / path, kind=told, **options)
                assert [item.key for item in source.items] == [key]
                assert source.read(source.items[0])

    def test_every_kind_remote(self, tmp_path):
        memory = fsspec.filesystem("memory")
        expected = make_videos(tmp_path)
        memory.put(str(tmp_path), "/videos", recursive=True)
        try:
            for path, (kind, key) in expected.items():
                url = f"memory://videos/{path}"
                assert kind_of(url, "videos") == kind, path
                source = open_source(url, media="videos", split="train" if kind == "ssv2" else None)
                assert [item.key for item in source.items] == [key]
        finally:
            memory.rm("/videos", recursive=True)

    def test_options_reach_their_kind(self, tmp_path):
        make_videos(tmp_path)
        (tmp_path / "flat" / "1.txt").write_text("text")
        for path in ("flat", "tars"):
            source = open_source(tmp_path / path, media="videos", captions="txt")
            assert source.items[0].attached == {"caption": "text"}
        with pytest.raises(ValueError, match="--split: expected train, validation, test .*got none"):
            open_source(tmp_path / "ssv2", media="videos")
        with pytest.raises(ValueError, match="--split 'train' means nothing .* of kind videos; it is for ssv2. "):
            open_source(tmp_path / "flat", media="videos", split="train")
        with pytest.raises(ValueError, match="--trajectories .* of kind videos; it is for sources of images. "):
            open_source(tmp_path / "flat", media="videos", names="names.txt")

    def test_kinds_of_the_other_medium(self, tmp_path):
        for kind in ("manifest", "table", "trajectories", "images"):
            with pytest.raises(ValueError, match=f"kind: expected auto, ssv2, .*frames for videos, got '{kind}'"):
                open_source(tmp_path, media="videos", kind=kind)
        for kind in ("ssv2", "videos", "frames"):
            with pytest.raises(ValueError, match=f"kind: expected auto, manifest, .*images for images, got '{kind}'"):
                open_source(tmp_path, kind=kind)

    def test_what_is_no_video(self, tmp_path):
        write_manifest(tmp_path / "m.json")
        write_table(tmp_path / "t.parquet")
        for name in ("m.json", "t.parquet"):
            with pytest.raises(
                ValueError, match=f"{name}': expected videos, and manifests and tables are of images. Vid"
            ):
                open_source(tmp_path / name, media="videos")
        write_table(tmp_path / "tables" / "t.parquet")
        with pytest.raises(ValueError, match="none of the 1 files below it is one. Videos come as a folder of videos"):
            open_source(tmp_path / "tables", media="videos")
        with pytest.raises(ValueError, match="missing' does not exist; expected a folder"):
            open_source(tmp_path / "missing", media="videos")
        with pytest.raises(ValueError, match="missing' does not exist$"):  # not: --split means nothing for it
            open_source(tmp_path / "missing", media="videos", split="train")
        with pytest.raises(ValueError, match="missing.tar"):
            open_source(tmp_path / "missing.tar", media="videos")
        with pytest.raises(ValueError, match="memory://nothing"):
            open_source("memory://nothing/here", media="videos")
        touch(tmp_path / "clips" / "a.mp4")
        with pytest.raises(ValueError, match="holds videos: fastlatent encode --vae"):
            open_source(tmp_path / "clips")

    def test_only_videos_that_cannot_be_read(self, tmp_path):
        (tmp_path / "a.mp4").symlink_to("gone")
        with pytest.raises(ValueError, match="holds no video that can be read: 1 cannot; the first is 'a.mp4': cannot"):
            open_source(tmp_path, media="videos")
