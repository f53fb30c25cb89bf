import errno
import os

import fsspec
import pytest

from fastlatent.sources.image_folder import VIDEO_EXTENSIONS, scan_image_folder
from fastlatent.sources.video_folder import scan_video_folder


def touch(root, *names):
    for name in names:
        path = os.path.join(os.fsencode(root), os.fsencode(name))
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "xb") as file:
            file.write(os.fsencode(name))


def test_classes_keys_and_bytes_are_as_of_images(tmp_path):
    touch(tmp_path, "b/2.mp4", "b/10.WEBM", "a/deep/1.mkv", "a/poster.jpg", "notes.txt", ".hidden/3.mp4", "b/._2.mp4")
    os.mkdir(tmp_path / "empty")
    source = scan_video_folder(tmp_path)
    assert source.classes == ["a", "b", "empty"] and source.columns == ()
    assert [(one.key, one.label, one.place) for one in source.items] == [
        ("a/deep/1.mkv", 0, str(tmp_path / "a/deep/1.mkv")),
        ("b/10.WEBM", 1, str(tmp_path / "b/10.WEBM")),
        ("b/2.mp4", 1, str(tmp_path / "b/2.mp4")),
    ]
    assert [source.fetch(one) for one in source.items] == [b"a/deep/1.mkv", b"b/10.WEBM", b"b/2.mp4"]
    assert source.ignored == {".jpg": 1, ".txt": 1} and source.left_out == {}


def test_every_extension_in_any_case_and_flat(tmp_path):
    names = [f"{i}{one if i % 2 else one.upper()}" for i, one in enumerate(sorted(VIDEO_EXTENSIONS))]
    touch(tmp_path, *names, "1.gif", "1.png", "mp4")
    source = scan_video_folder(tmp_path)
    assert [one.key for one in source.items] == sorted(names)
    assert source.classes == [] and {one.label for one in source.items} == {-1}


def test_names_of_any_bytes_and_links(tmp_path):
    names = ["ünïcode 图像 🙂.mp4".encode(), b"\xff\xfe.mp4", b"line\nbreak.webm"]
    touch(tmp_path / "root", *(b"c/" + name for name in names))
    touch(tmp_path / "elsewhere", "1.mkv")
    os.symlink(tmp_path / "elsewhere", tmp_path / "root" / "linked")
    os.symlink(tmp_path / "root", tmp_path / "root" / "c" / "round")
    os.symlink("gone", tmp_path / "root" / "c" / "gone.mp4")
    source = scan_video_folder(tmp_path / "root")
    assert [os.fsencode(one.key) for one in source.items] == [*sorted(b"c/" + name for name in names), b"linked/1.mkv"]
    assert [source.fetch(one) for one in source.items[:3]] == sorted(b"c/" + name for name in names)
    assert source.left_out == {"c/gone.mp4": f"cannot be read: {os.strerror(errno.ENOENT)}"}


def test_captions(tmp_path):
    touch(tmp_path, "1.mp4", "2.mp4")
    (tmp_path / "1.txt").write_text(" a cat\n")
    assert [one.attached["caption"] for one in scan_video_folder(tmp_path, captions="txt").items] == ["a cat", ""]
    with pytest.raises(ValueError, match="captions 'alt': no video of .* has a .alt file"):
        scan_video_folder(tmp_path, captions="alt")
    with pytest.raises(ValueError, match="captions: expected the suffix of text files beside the images or videos"):
        scan_video_folder(tmp_path, captions="mp4")


def test_refusals_speak_of_videos(tmp_path):
    with pytest.raises(ValueError, match="video folder .*missing' does not exist; expected a folder with one"):
        scan_video_folder(tmp_path / "missing")
    touch(tmp_path, "one/a.mp4", "two/stray.mp4", "two/c/inside.webm", "three/1.mp4.txt", "four/c/1.png")
    with pytest.raises(ValueError, match=r"a\.mp4' is a file; expected a folder with one sub-folder of videos"):
        scan_video_folder(tmp_path / "one" / "a.mp4")
    with pytest.raises(ValueError, match=r"holds videos both directly \('stray.mp4'\) and in sub-folders"):
        scan_video_folder(tmp_path / "two")
    with pytest.raises(ValueError, match=r"holds no video; looked for \.avi .*in its 0 sub-folders$"):
        scan_video_folder(tmp_path / "three")
    with pytest.raises(ValueError, match="holds images: frames of clips have to lie in one folder each, --kind frames"):
        scan_video_folder(tmp_path / "four")


def test_an_image_folder_of_videos_says_so(tmp_path):
    touch(tmp_path, "c/1.MP4", "c/notes.txt")
    with pytest.raises(ValueError, match="holds no image; .*; it holds videos: fastlatent encode --vae .* --teacher"):
        scan_image_folder(tmp_path)


def test_behind_a_url():
    memory = fsspec.filesystem("memory")
    memory.pipe({"/clips/a/1.mp4": b"one", "/clips/b/2.webm": b"two!", "/clips/b/2.png": b"poster"})
    try:
        source = scan_video_folder("memory://clips")
        assert [(one.key, one.place, one.size) for one in source.items] == [
            ("a/1.mp4", "memory://clips/a/1.mp4", 3),
            ("b/2.webm", "memory://clips/b/2.webm", 4),
        ]
        assert [source.fetch(one) for one in source.items] == [b"one", b"two!"]
    finally:
        memory.rm("/clips", recursive=True)
