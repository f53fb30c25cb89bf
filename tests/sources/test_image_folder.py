import inspect
import os
import sys

import pytest

from fastlatent.sources.image_folder import EXTENSIONS, Item, scan_image_folder


def touch(path):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    open(path, "xb").close()


def keys(root):
    return [item.key for item in scan_image_folder(root).items]


def test_classes_are_sorted_folders_and_keys_are_relative(tmp_path):
    for name in ("b/2.png", "b/10.png", "a/1.png", "B/1.png"):
        touch(tmp_path / name)
    folder = scan_image_folder(tmp_path)
    assert folder.classes == ["B", "a", "b"]  # by bytes: capitals first, as torchvision sorts
    assert folder.items == [
        Item("B/1.png", str(tmp_path / "B/1.png"), 0),
        Item("a/1.png", str(tmp_path / "a/1.png"), 1),
        Item("b/10.png", str(tmp_path / "b/10.png"), 2),
        Item("b/2.png", str(tmp_path / "b/2.png"), 2),
    ]


def test_keys_are_sorted_across_classes_by_bytes(tmp_path):
    # "-" sorts before "/", so the class a-b precedes the files of a although its label is the larger.
    for name in ("a/1.png", "a-b/1.png"):
        touch(tmp_path / name)
    items = scan_image_folder(tmp_path).items
    assert [(item.key, item.label) for item in items] == [("a-b/1.png", 1), ("a/1.png", 0)]


def test_images_count_at_any_depth(tmp_path):
    for name in ("c/x/y/z/deep.png", "c/top.png", "c/x/mid.png"):
        touch(tmp_path / name)
    folder = scan_image_folder(tmp_path)
    assert folder.classes == ["c"]
    assert [item.key for item in folder.items] == ["c/top.png", "c/x/mid.png", "c/x/y/z/deep.png"]
    assert {item.label for item in folder.items} == {0}


def test_deeper_than_the_python_stack(tmp_path):
    # PATH_MAX of 4096 bytes has room for 2048 levels, Python's stack for 1000. Both are scaled down here,
    # since pytest's own removal of the folder recurses.
    name = "c" + "/d" * 300
    touch(tmp_path / name / "i.png")
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(len(inspect.stack()) + 100)
    try:
        assert keys(tmp_path) == [f"{name}/i.png"]
    finally:
        sys.setrecursionlimit(limit)


@pytest.mark.parametrize("extension", sorted(EXTENSIONS))
def test_every_extension_in_any_case(tmp_path, extension):
    mixed = extension[:2] + extension[2:].upper()
    for name in ("lower" + extension, "upper" + extension.upper(), "mixed" + mixed):
        touch(tmp_path / "c" / name)
    assert len(keys(tmp_path)) == 3


def test_other_files_are_no_images(tmp_path):
    for name in ("c/1.png", "c/2.npz", "c/3.png.txt", "c/png", "c/4.", "c/5.gif", "readme.txt"):
        touch(tmp_path / name)
    assert keys(tmp_path) == ["c/1.png"]


def test_flat_folder(tmp_path):
    for name in ("2.png", "1.JPEG"):
        touch(tmp_path / name)
    folder = scan_image_folder(tmp_path)
    assert folder.classes == []
    assert [(item.key, item.label) for item in folder.items] == [("1.JPEG", -1), ("2.png", -1)]
    assert folder.items[0].path == str(tmp_path / "1.JPEG")


def test_empty_sub_folders_leave_a_flat_folder_flat(tmp_path):
    touch(tmp_path / "1.png")
    touch(tmp_path / "notes" / "notes.txt")
    folder = scan_image_folder(tmp_path)
    assert folder.classes == [] and folder.items[0].label == -1


def test_images_in_root_and_in_classes_are_refused(tmp_path):
    for name in ("stray.png", "c/x/inside.png"):
        touch(tmp_path / name)
    with pytest.raises(ValueError, match=r"stray\.png.*c/x/inside\.png"):
        scan_image_folder(tmp_path)


def test_an_empty_class_keeps_its_label(tmp_path):
    # ImageNet without n00000001's files must not renumber n00000002.
    os.mkdir(tmp_path / "n00000001")
    touch(tmp_path / "n00000000" / "one.JPEG")
    touch(tmp_path / "n00000002" / "one.JPEG")
    folder = scan_image_folder(tmp_path)
    assert folder.classes == ["n00000000", "n00000001", "n00000002"]
    assert [item.label for item in folder.items] == [0, 2]


@pytest.mark.parametrize("content", [(), ("c/notes.txt",), (".hidden.png", "c/.hidden.png")])
def test_no_image_is_refused_with_folder_and_extensions(tmp_path, content):
    for name in content:
        touch(tmp_path / name)
    with pytest.raises(ValueError) as error:
        scan_image_folder(tmp_path)
    assert str(tmp_path) in str(error.value)
    assert all(extension in str(error.value) for extension in EXTENSIONS)


def test_missing_folder_and_file_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"missing' does not exist; expected a folder"):
        scan_image_folder(tmp_path / "missing")
    touch(tmp_path / "one.png")
    with pytest.raises(ValueError, match=r"one\.png' is a file; expected a folder"):
        scan_image_folder(tmp_path / "one.png")


def test_hidden_names_are_ignored(tmp_path):
    for name in ("c/1.png", "c/._1.png", ".cache/2.png", "c/.thumbs/3.png"):
        touch(tmp_path / name)
    folder = scan_image_folder(tmp_path)
    assert folder.classes == ["c"] and [item.key for item in folder.items] == ["c/1.png"]


def test_a_folder_named_like_an_image_is_a_folder(tmp_path):
    touch(tmp_path / "set.jpg" / "inner.png" / "1.png")
    folder = scan_image_folder(tmp_path)
    assert folder.classes == ["set.jpg"] and folder.items[0].key == "set.jpg/inner.png/1.png"


def test_symbolic_links_are_followed_but_not_round(tmp_path):
    root = tmp_path / "root"
    touch(root / "c" / "x" / "1.png")
    touch(tmp_path / "elsewhere" / "2.png")
    os.symlink(root / "c", root / "c" / "x" / "up")  # to an ancestor
    os.symlink(".", root / "c" / "same")  # to itself
    os.symlink(root, root / "c" / "root")  # to the root
    os.symlink(root, root / "again")  # a class that is the root
    os.symlink("loop.png", root / "c" / "loop.png")  # resolves to nothing at all: ELOOP
    os.symlink("loop", root / "c" / "loop")
    os.symlink(tmp_path / "elsewhere", root / "linked")
    os.symlink(tmp_path / "elsewhere" / "2.png", root / "c" / "3.png")
    folder = scan_image_folder(root)
    assert folder.classes == ["again", "c", "linked"]
    assert [item.key for item in folder.items] == ["c/3.png", "c/loop.png", "c/x/1.png", "linked/2.png"]


def test_two_folders_that_link_to_each_other(tmp_path):
    for here, there in (("a", "b"), ("b", "a")):
        touch(tmp_path / here / f"{here}.png")
        os.symlink(tmp_path / there, tmp_path / here / "other")
    # Each class may hold the other's images once; the way back is closed.
    assert keys(tmp_path) == ["a/a.png", "a/other/b.png", "b/b.png", "b/other/a.png"]


def test_a_link_to_nothing_is_listed_and_a_pipe_is_not(tmp_path):
    os.mkdir(tmp_path / "c")
    os.symlink(tmp_path / "gone.png", tmp_path / "c" / "gone.png")
    os.mkfifo(tmp_path / "c" / "pipe.png")  # opening it would hang
    os.symlink(tmp_path / "c" / "pipe.png", tmp_path / "c" / "to_pipe.png")
    assert keys(tmp_path) == ["c/gone.png"]


def test_names_of_any_bytes(tmp_path):
    root = os.fsencode(tmp_path)
    names = [
        "ünïcode 图像 🙂.png".encode(),
        b"line\nbreak.png",
        b"\xff\xfe\x80.png",  # no UTF-8
        "\U0001f600.png".encode(),  # above U+DC80, where surrogates sort as str but not as bytes
        b"a" * 251 + b".png",  # 255 bytes, the longest name ext4 allows
    ]
    os.mkdir(root + b"/\xe9t\xe9")  # Latin-1, no UTF-8
    os.mkdir(root + b"/" + "\U0001f600".encode())
    os.mkdir(root + b"/" + "\uff01".encode())
    os.mkdir(root + b"/\xff")  # as str (U+DCFF) before the two above, as bytes after them
    for name in names:
        open(root + b"/\xe9t\xe9/" + name, "xb").close()
    folder = scan_image_folder(tmp_path)
    assert [os.fsencode(name) for name in folder.classes] == [
        b"\xe9t\xe9",
        "\uff01".encode(),
        "\U0001f600".encode(),
        b"\xff",
    ]
    assert [os.fsencode(item.key) for item in folder.items] == sorted(b"\xe9t\xe9/" + name for name in names)
    for item in folder.items:
        open(item.path, "rb").close()


def test_the_root_may_be_relative_bytes_or_hidden(tmp_path, monkeypatch):
    touch(tmp_path / ".cache" / "c" / "1.png")
    monkeypatch.chdir(tmp_path)
    assert scan_image_folder(".cache").items == [Item("c/1.png", os.path.join(".cache", "c", "1.png"), 0)]
    assert keys(os.fsencode(tmp_path / ".cache")) == ["c/1.png"]
