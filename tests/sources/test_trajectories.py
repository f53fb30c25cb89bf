import json
import os
import pickle
import shutil

import fsspec
import numpy as np
import pytest

from fastlatent.sources.items import Column, content_digest
from fastlatent.sources.trajectories import find_datasets, scan_trajectories


def poses(count, seed=0):
    random = np.random.default_rng(seed)
    return {"position": np.asfortranarray(random.normal(size=(count, 2))), "yaw": random.normal(size=count)}


def trajectory(folder, count, data=None, suffix=".jpg"):
    folder.mkdir(parents=True)
    for number in range(count):
        (folder / f"{number}{suffix}").write_bytes(b"%d of %s" % (number, os.fsencode(folder.name)))
    (folder / "traj_data.pkl").write_bytes(pickle.dumps(poses(count) if data is None else data, protocol=4))
    return folder


def test_frames_in_numeric_order_with_their_poses(tmp_path):
    trajectory(tmp_path / "b", 12)
    trajectory(tmp_path / "a-1", 2)
    trajectory(tmp_path / "a", 3)
    source = scan_trajectories(tmp_path)
    assert [(item.group, item.order) for item in source.items] == (
        [("a", n) for n in range(3)] + [("a-1", n) for n in range(2)] + [("b", n) for n in range(12)]
    )
    assert [item.key for item in source.items][-3:] == ["b/9.jpg", "b/10.jpg", "b/11.jpg"]
    assert source.columns == (Column("position", "F64", (2,)), Column("yaw", "F64", ()))
    expected = poses(12)
    for item in source.items[5:]:
        assert item.attached["position"] == expected["position"][item.order].tolist()
        assert item.attached["yaw"] == expected["yaw"][item.order]
        assert json.loads(json.dumps(dict(item.attached))) == item.attached  # exactly: floats are written by repr
        assert item.label == -1
        assert item.place == str(tmp_path / item.key)
        assert item.size == len(source.read(item))
        content_digest(item, b"")
    assert source.read(source.items[-1]) == b"11 of b"
    assert source.classes == [] and source.left_out == {} and source.ignored == {}


def test_items_are_a_sequence(tmp_path):
    trajectory(tmp_path / "a", 2)
    trajectory(tmp_path / "b", 3)
    items = scan_trajectories(tmp_path).items
    assert len(items) == 5
    assert list(items) == [items[n] for n in range(5)] == items[:] == items[-5:]
    assert items[-1].key == "b/2.jpg"
    assert [item.key for item in items[1:4:2]] == ["a/1.jpg", "b/1.jpg"]
    with pytest.raises(IndexError):
        items[5]


def test_beside_are_the_pickles_as_they_are(tmp_path):
    folder = trajectory(tmp_path / "a", 2)
    trajectory(tmp_path / "gap", 2, poses(3))
    beside = scan_trajectories(tmp_path).beside
    assert list(beside) == ["a/traj_data.pkl"]  # none of a trajectory that is left out
    assert beside["a/traj_data.pkl"]() == (folder / "traj_data.pkl").read_bytes()


@pytest.mark.parametrize("suffix", [".jpg", ".JPG", ".jpeg", ".png", ".Png"])
def test_suffixes(tmp_path, suffix):
    trajectory(tmp_path / "a", 2, suffix=suffix)
    assert [item.key for item in scan_trajectories(tmp_path).items] == [f"a/0{suffix}", f"a/1{suffix}"]


def test_leading_zeros_are_numbers_too(tmp_path):
    folder = trajectory(tmp_path / "a", 11)
    for number in range(11):
        os.rename(folder / f"{number}.jpg", folder / f"{number:04d}.jpg")
    assert [item.order for item in scan_trajectories(tmp_path).items] == list(range(11))


@pytest.mark.parametrize("yaw", [np.arange(3.0)[:, None], np.arange(3, dtype=np.float32), np.arange(3)])
def test_yaw_of_other_shapes_and_dtypes(tmp_path, yaw):
    trajectory(tmp_path / "a", 3, {"position": np.ones((3, 2), np.float32), "yaw": yaw})
    values = [item.attached["yaw"] for item in scan_trajectories(tmp_path).items]
    assert values == [0.0, 1.0, 2.0] and all(type(value) is float for value in values)


def test_a_changed_pose_changes_the_stamp_of_its_frame_only(tmp_path):
    folder = trajectory(tmp_path / "a", 3)
    before = scan_trajectories(tmp_path).items
    data = poses(3)
    data["yaw"][1] = np.nextafter(data["yaw"][1], 9)
    (folder / "traj_data.pkl").write_bytes(pickle.dumps({**data, "extra": np.zeros(1)}))
    after = scan_trajectories(tmp_path).items
    assert [a.stamp == b.stamp for a, b in zip(before, after, strict=True)] == [True, False, True]


POSES_3 = poses(3)


def _without(folder, name):
    (folder / name).unlink()


@pytest.mark.parametrize(
    "spoil, reason",
    [
        (lambda folder: _without(folder, "traj_data.pkl"), "no traj_data.pkl"),
        (lambda folder: (folder / "traj_data.pkl").write_bytes(b""), "traj_data.pkl: "),
        (lambda folder: (folder / "traj_data.pkl").write_bytes(b"\x80\x04garbage"), "traj_data.pkl: "),
        (lambda folder: (folder / "traj_data.pkl").write_bytes(pickle.dumps(POSES_3)[:-40]), "traj_data.pkl: "),
        (lambda folder: _dump(folder, {"position": POSES_3["position"]}), "no yaw; it holds position"),
        (lambda folder: _dump(folder, {}), "no position and no yaw; it holds nothing"),
        (lambda folder: _dump(folder, {**POSES_3, "position": np.ones((3, 3))}), "got [3, 3] and [3]"),
        (lambda folder: _dump(folder, {**POSES_3, "yaw": np.ones((3, 2))}), "got [3, 2] and [3, 2]"),
        (lambda folder: _dump(folder, {**POSES_3, "yaw": np.ones(4)}), "got [3, 2] and [4]"),
        (lambda folder: _dump(folder, {**POSES_3, "yaw": [1, 2, 3]}), "the pickle uses EMPTY_LIST"),
        (lambda folder: _dump(folder, {**POSES_3, "yaw": np.array([0, np.nan, 0])}), "pose of frame 1 is not finite"),
        (lambda folder: _dump(folder, poses(4)), "3 frames, but 4 poses"),
        (lambda folder: _dump(folder, poses(2)), "3 frames, but 2 poses"),
        (lambda folder: _without(folder, "1.jpg"), "frame 1 is missing; 2.jpg follows"),
        (lambda folder: _without(folder, "0.jpg"), "frame 0 is missing; 1.jpg follows"),
        (lambda folder: _without(folder, "2.jpg"), "2 frames, but 3 poses"),
        (lambda folder: (folder / "1.png").write_bytes(b""), "two frames 1: 1.jpg and 1.png"),
        (lambda folder: (folder / "01.jpg").write_bytes(b""), "two frames 1: 01.jpg and 1.jpg"),
        (lambda folder: (folder / "3.jpg").symlink_to("nowhere"), "3.jpg: "),
        (lambda folder: [_without(folder, f"{n}.jpg") for n in range(3)], "no frame called 0.jpg"),
    ],
)
def test_a_fault_leaves_out_the_whole_trajectory_and_no_other(tmp_path, spoil, reason):
    trajectory(tmp_path / "good", 2)
    spoil(trajectory(tmp_path / "bad", 3))
    source = scan_trajectories(tmp_path)
    assert [item.key for item in source.items] == ["good/0.jpg", "good/1.jpg"]
    assert list(source.left_out) == ["bad"] and reason in source.left_out["bad"]
    assert list(source.beside) == ["good/traj_data.pkl"]


def _dump(folder, data):
    (folder / "traj_data.pkl").write_bytes(pickle.dumps(data))


def test_a_hostile_pickle_is_left_out_and_not_run(tmp_path):
    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "trace"),)

    trajectory(tmp_path / "good", 1)
    _dump(trajectory(tmp_path / "bad", 1), {"position": Hostile(), "yaw": Hostile()})
    assert "nothing is imported" in scan_trajectories(tmp_path).left_out["bad"]
    assert not (tmp_path / "trace").exists()


def test_other_files_are_passed_over(tmp_path):
    folder = trajectory(tmp_path / "a", 1)
    for name in ("notes.txt", "thumb.jpg", "-1.jpg", "1.5.png", "0.tif", "１.jpg"):  # a full-width digit
        (folder / name).write_bytes(b"")
    (folder / "deep").mkdir()
    (folder / "deep" / "1.jpg").write_bytes(b"")
    (tmp_path / "0.jpg").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "README").write_bytes(b"")
    source = scan_trajectories(tmp_path)
    assert [item.key for item in source.items] == ["a/0.jpg"]
    assert source.ignored == {".txt": 1, ".jpg": 5, ".png": 1, ".tif": 1, "": 1}
    assert source.left_out == {}


def test_names_of_any_kind(tmp_path):
    for name in ("jackal 2019", "ключ", "a\udcff"):  # the last is the byte 0xff, no UTF-8
        trajectory(tmp_path / name, 2)
    source = scan_trajectories(tmp_path)
    groups = list(dict.fromkeys(item.group for item in source.items))
    assert groups == sorted(["jackal 2019", "ключ", "a\udcff"], key=os.fsencode)
    assert all(source.read(item) for item in source.items)


def test_split_files(tmp_path):
    for name in ("a", "b", "c"):
        trajectory(tmp_path / "data" / name, 2)
    (tmp_path / "data" / "b" / "traj_data.pkl").unlink()
    names = tmp_path / "traj_names.txt"
    names.write_bytes(b"\xef\xbb\xbfc\r\n\r\n  a \n\na\n")
    source = scan_trajectories(tmp_path / "data", names=names)
    assert [item.group for item in source.items] == ["a", "a", "c", "c"]
    assert source.left_out == {}  # b was not asked for
    names.write_text("a\nb\n")
    assert scan_trajectories(tmp_path / "data", names=names).left_out == {"b": "no traj_data.pkl"}
    (tmp_path / "data" / "empty").mkdir()
    names.write_text("a\nempty\n")
    assert scan_trajectories(tmp_path / "data", names=names).left_out == {"empty": "no traj_data.pkl"}
    names.write_text("a\nx\ny\n")
    with pytest.raises(ValueError, match="2 trajectories are not in .*: x, y"):
        scan_trajectories(tmp_path / "data", names=names)
    names.write_text("\n\n")
    with pytest.raises(ValueError, match="names no trajectory"):
        scan_trajectories(tmp_path / "data", names=names)
    with pytest.raises(ValueError, match="cannot be read"):
        scan_trajectories(tmp_path / "data", names=tmp_path / "missing.txt")


def test_nothing_to_use(tmp_path):
    with pytest.raises(ValueError, match="expected <trajectory>/0.jpg"):
        scan_trajectories(tmp_path)
    (trajectory(tmp_path / "a", 2) / "1.jpg").unlink()
    with pytest.raises(ValueError, match="a: 1 frames, but 2 poses"):
        scan_trajectories(tmp_path)
    with pytest.raises(ValueError, match="cannot be listed"):
        scan_trajectories(tmp_path / "missing")


def test_remote(tmp_path):
    trajectory(tmp_path / "a", 3)
    memory = fsspec.filesystem("memory")
    memory.put(str(tmp_path), "/trajectories", recursive=True)
    try:
        here, there = scan_trajectories(tmp_path), scan_trajectories("memory://trajectories")
        assert [item.key for item in there.items] == [item.key for item in here.items]
        assert [item.attached for item in there.items] == [item.attached for item in here.items]
        assert there.read(there.items[2]) == b"2 of a"
        assert there.beside["a/traj_data.pkl"]() == here.beside["a/traj_data.pkl"]()
    finally:
        memory.rm("/trajectories", recursive=True)


def test_find_datasets(tmp_path):
    for name in ("recon", "tartan", "sacson"):
        trajectory(tmp_path / name / "t_0", 1)
    (tmp_path / "images" / "class").mkdir(parents=True)
    (tmp_path / "file").write_bytes(b"")
    assert find_datasets(tmp_path) == {
        "recon": str(tmp_path / "recon"),
        "sacson": str(tmp_path / "sacson"),
        "tartan_drive": str(tmp_path / "tartan"),
    }
    shutil.copytree(tmp_path / "tartan", tmp_path / "tartan_drive")
    with pytest.raises(ValueError, match="tartan' and .*tartan_drive' are both called tartan_drive"):
        find_datasets(tmp_path)


def test_no_datasets(tmp_path):
    with pytest.raises(ValueError, match="no trajectory dataset"):
        find_datasets(tmp_path)
    with pytest.raises(ValueError, match="no local folder"):
        find_datasets(tmp_path / "missing")
