import errno
import io
import os
import pickle
import tarfile
import tempfile
from pathlib import Path

import fsspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastlatent.sources.frame_folders import scan_frame_folders
from fastlatent.sources.items import UnreadableError


def touch(root, *names):
    for name in names:
        path = os.path.join(os.fsencode(root), os.fsencode(name))
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "xb") as file:
            file.write(os.fsencode(name))


def frames(data):
    """Names and bytes of a clip, in the archive's order."""
    with tarfile.open(fileobj=io.BytesIO(data), encoding="utf-8", errors="surrogateescape") as archive:
        members = archive.getmembers()
        assert all((one.mtime, one.uid, one.gid, one.uname, one.gname) == (0, 0, 0, "", "") for one in members)
        return [(one.name, archive.extractfile(one).read()) for one in members]


def test_clips_below_the_root_have_no_classes(tmp_path):
    touch(tmp_path, "b/frame_2.png", "b/frame_10.png", "b/frame_1.PNG", "a/0.jpg", "a/notes.txt", "empty/readme.md")
    source = scan_frame_folders(tmp_path)
    assert source.classes == [] and source.columns == ()
    assert [(one.key, one.place, one.size, one.label) for one in source.items] == [
        ("a", str(tmp_path / "a"), 7, -1),
        ("b", str(tmp_path / "b"), len("b/frame_1.PNGb/frame_2.pngb/frame_10.png"), -1),
    ]
    # Numbers count, not letters: as text frame_10 comes before frame_2.
    assert frames(source.fetch(source.items[1])) == [
        (name, f"b/{name}".encode()) for name in ("frame_1.PNG", "frame_2.png", "frame_10.png")
    ]
    assert source.ignored == {".txt": 1, ".md": 1} and source.left_out == {}


def test_classes_are_the_first_of_several_levels(tmp_path):
    touch(tmp_path, "push/1/0.jpg", "hold/deep/er/0.jpg", "hold/2/0.jpg", "hold/2/sub/0.jpg", "hold/2/z.jpg")
    os.mkdir(tmp_path / "fold")  # a class without clips must not shift the labels of the others
    source = scan_frame_folders(tmp_path)
    assert source.classes == ["fold", "hold", "push"]
    assert [(one.key, one.label) for one in source.items] == [
        ("hold/2", 1), ("hold/2/sub", 1), ("hold/deep/er", 1), ("push/1", 2),
    ]  # fmt: skip
    # hold/2/sub/0.jpg sorts between the frames of hold/2, and is none of them.
    assert [name for name, _ in frames(source.fetch(source.items[0]))] == ["0.jpg", "z.jpg"]


def test_bytes_are_a_function_of_names_and_contents(tmp_path):
    for root, order in (tmp_path / "a", (1, 2, 10)), (tmp_path / "b", (10, 1, 2)):  # made in another order
        for i in order:
            touch(root, f"clip/{i}.png")
        os.utime(root / "clip" / "1.png", ns=(0, hash(root) % 10**18))
        os.chmod(root / "clip" / "2.png", 0o600 if root.name == "a" else 0o644)
    first, second = (scan_frame_folders(tmp_path / name) for name in "ab")
    data = first.fetch(first.items[0])
    assert data == second.fetch(second.items[0]) == first.fetch(first.items[0])
    (tmp_path / "b" / "clip" / "1.png").write_bytes(b"CLIP/1.png")
    assert second.fetch(second.items[0]) != data


def test_the_stamp_changes_with_names_sizes_times_and_number(tmp_path):
    touch(tmp_path, "clip/1.png", "clip/2.png", "other/1.png")
    path = tmp_path / "clip" / "1.png"

    def stamps():
        clip, other = scan_frame_folders(tmp_path).items
        assert 0 <= clip.stamp < 2**63
        return clip.stamp, other.stamp

    seen = [stamps()]
    assert stamps() == seen[0]
    status = os.stat(path)
    os.utime(path, ns=(0, status.st_mtime_ns + 1))
    seen.append(stamps())
    path.write_bytes(b"a longer one")
    os.utime(path, ns=(0, status.st_mtime_ns + 1))
    seen.append(stamps())
    os.rename(path, path.with_name("3.png"))
    seen.append(stamps())
    touch(tmp_path, "clip/1.png")
    seen.append(stamps())
    os.remove(path)
    assert stamps() == seen[3]
    touch(tmp_path, "clip/10.txt", "clip/.hidden.png")
    assert stamps() == seen[3]
    assert len({clip for clip, _ in seen}) == len(seen) == 5 and len({other for _, other in seen}) == 1


def test_a_sub_folder_between_the_frames_is_no_change(tmp_path):
    touch(tmp_path, "c/clip/1.png", "c/clip/z.png")
    (before,) = scan_frame_folders(tmp_path).items
    touch(tmp_path, "c/clip/mm/0.png")
    assert scan_frame_folders(tmp_path).items[0] == before


def test_names_of_any_bytes_and_links(tmp_path):
    clip = b"\xe9t\xe9"  # Latin-1, no UTF-8
    names = ["ünï 图像 🙂.png".encode(), b"\xff.png", b"a" * 251 + b".png"]  # tar's header has room for 100 bytes
    touch(tmp_path / "root", *(clip + b"/" + name for name in names))
    touch(tmp_path / "elsewhere", "1.png")
    os.symlink(tmp_path / "elsewhere", tmp_path / "root" / "linked")
    os.symlink(tmp_path / "root", tmp_path / "root" / "round")
    source = scan_frame_folders(tmp_path / "root")
    assert [os.fsencode(one.key) for one in source.items] == [b"linked", clip]
    assert {os.fsencode(name) for name, _ in frames(source.fetch(source.items[1]))} == set(names)


def test_clips_that_cannot_be_used_are_left_out_whole(tmp_path):
    # A frame that is missing would shift all that follow it.
    touch(tmp_path, "good/0.png", "gone/0.png", "twice/1.jpg", "twice/1.png", "twice/2.png")
    os.symlink("nowhere", tmp_path / "gone" / "1.png")
    os.symlink("nowhere", tmp_path / "good" / "1.txt")  # no image: nobody asks for it
    source = scan_frame_folders(tmp_path)
    assert [one.key for one in source.items] == ["good"]
    assert source.left_out == {
        "gone": f"its frame 1.png cannot be read: {os.strerror(errno.ENOENT)}",
        "twice": "two images of one stem: 1.jpg and 1.png; expected one for each frame",
    }
    for path in (tmp_path / "good").iterdir():
        path.unlink()
    with pytest.raises(ValueError, match="holds no clip that can be used: 2 cannot; the first is 'gone': its frame"):
        scan_frame_folders(tmp_path)


def test_without_permission():
    with tempfile.TemporaryDirectory() as folder:  # pytest's own folders are closed to others
        os.chmod(folder, 0o777)
        me = os.geteuid()
        if me == 0:  # who may read everything
            os.seteuid(65534)
        try:
            root = Path(folder, "files")
            touch(root, "a/1/0.png", "a/2/0.png", "b/1/0.png")
            os.chmod(root / "a" / "2" / "0.png", 0)
            os.chmod(root / "b", 0)
            source = scan_frame_folders(root)
        finally:
            os.seteuid(me)
            os.chmod(root / "b", 0o700)
    denied = os.strerror(errno.EACCES)
    assert source.classes == ["a", "b"] and [one.key for one in source.items] == ["a/1"]
    assert source.left_out == {
        "a/2": f"its frame 0.png cannot be read: {denied}",
        "b": f"the folder cannot be listed: {denied}",
    }


def test_a_frame_that_goes_after_the_scan_is_named(tmp_path):
    touch(tmp_path, "clip/0.png", "clip/1.png")
    source = scan_frame_folders(tmp_path)
    os.remove(tmp_path / "clip" / "1.png")
    with pytest.raises(UnreadableError, match="clip/1.png could not be read: No such file"):
        source.fetch(source.items[0])


def test_refusals(tmp_path):
    with pytest.raises(ValueError, match="frame folder .*missing' does not exist; expected a folder with one"):
        scan_frame_folders(tmp_path / "missing")
    touch(tmp_path, "one/0.png", "two/clip/0.png", "two/class/clip/0.png", "videos/c/1.mp4", "nothing/c/1.txt")
    with pytest.raises(ValueError, match="holds images itself; expected .*give the folder above"):
        scan_frame_folders(tmp_path / "one")
    with pytest.raises(ValueError, match=r"both directly \('clip'\) and in sub-folders \('class/clip'\)"):
        scan_frame_folders(tmp_path / "two")
    with pytest.raises(ValueError, match="holds no image; .*; it holds videos: --kind videos"):
        scan_frame_folders(tmp_path / "videos")
    with pytest.raises(ValueError, match=r"holds no image; looked for \.bmp .* in all of its sub-folders$"):
        scan_frame_folders(tmp_path / "nothing")


def test_behind_a_url(tmp_path):
    memory = fsspec.filesystem("memory")
    memory.pipe({"/frames/a/10.png": b"ten", "/frames/a/9.png": b"nine", "/frames/b/1.png": b"one"})
    touch(tmp_path, "a/9.png", "a/10.png")
    try:
        source = scan_frame_folders("memory://frames")
        assert [(one.key, one.place, one.size) for one in source.items] == [
            ("a", "memory://frames/a", 7),
            ("b", "memory://frames/b", 3),
        ]
        assert frames(source.fetch(source.items[0])) == [("9.png", b"nine"), ("10.png", b"ten")]
        items, read = pickle.loads(pickle.dumps((source.items, source.read)))  # for other processes
        assert [read(one) for one in items] == [source.fetch(one) for one in source.items]
    finally:
        memory.rm("/frames", recursive=True)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.text("ab-./0é", min_size=1, max_size=5), min_size=1, max_size=12))
def test_every_image_is_in_one_clip(names):
    # "-" and "." sort before "/", "0" after it, so that clips' frames lie apart among the sorted paths.
    with tempfile.TemporaryDirectory() as root:
        wanted = {}
        for name in names:
            folder = "/".join(["c", "c", *(part.strip(".") or "x" for part in name.split("/"))])
            for i in range(2):
                os.makedirs(os.path.join(root, folder), exist_ok=True)
                Path(root, folder, f"{i}.png").write_text(f"{folder}/{i}")
            wanted[folder] = [("0.png", f"{folder}/0".encode()), ("1.png", f"{folder}/1".encode())]
        source = scan_frame_folders(root)
        assert [one.key for one in source.items] == sorted(wanted, key=os.fsencode)
        assert {one.key: frames(source.fetch(one)) for one in source.items} == wanted
