import errno
import inspect
import os
import re
import sys
import tempfile
from pathlib import Path

import fsspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastlatent.sources.files import MAX_TEXT
from fastlatent.sources.image_folder import EXTENSIONS, scan_image_folder
from fastlatent.sources.items import RAGGED, Column


def touch(path):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    open(path, "xb").close()


def keys(root):
    return [item.key for item in scan_image_folder(root).items]


@pytest.fixture
def as_a_user():
    """A folder of whoever runs the test, who is not root: root may read everything."""
    with tempfile.TemporaryDirectory() as root:  # pytest's own folders are closed to others
        os.chmod(root, 0o777)
        me = os.geteuid()
        if me == 0:
            os.seteuid(65534)
        try:
            os.mkdir(f"{root}/files")
            yield Path(root, "files")
        finally:
            os.seteuid(me)
            for folder, _, _ in os.walk(root):
                os.chmod(folder, 0o700)


def test_classes_are_sorted_folders_and_keys_are_relative(tmp_path):
    for name in ("b/2.png", "b/10.png", "a/1.png", "B/1.png"):
        touch(tmp_path / name)
    folder = scan_image_folder(tmp_path)
    assert folder.classes == ["B", "a", "b"]  # by bytes: capitals first, as torchvision sorts
    assert [(item.key, item.place, item.label) for item in folder.items] == [
        ("B/1.png", str(tmp_path / "B/1.png"), 0),
        ("a/1.png", str(tmp_path / "a/1.png"), 1),
        ("b/10.png", str(tmp_path / "b/10.png"), 2),
        ("b/2.png", str(tmp_path / "b/2.png"), 2),
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


def test_items_carry_size_and_time_and_are_read(tmp_path):
    touch(tmp_path / "c" / "empty.png")
    (tmp_path / "c" / "full.png").write_bytes(b"pixels")
    os.utime(tmp_path / "c" / "full.png", ns=(5, 1_700_000_000_123_456_789))
    os.utime(tmp_path / "c" / "empty.png", ns=(5, -1_500_000_000))  # before 1970
    source = scan_image_folder(tmp_path)
    assert [(item.size, item.stamp) for item in source.items] == [(0, -1_500_000_000), (6, 1_700_000_000_123_456_789)]
    assert [source.read(item) for item in source.items] == [b"", b"pixels"]
    assert source.columns == () and all(item.attached == {} and item.group == "" for item in source.items)


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
    assert folder.items[0].place == str(tmp_path / "1.JPEG")


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
    assert [item.key for item in folder.items] == ["c/3.png", "c/x/1.png", "linked/2.png"]
    assert folder.left_out == {"c/loop.png": f"cannot be read: {os.strerror(errno.ELOOP)}"}


def test_two_folders_that_link_to_each_other(tmp_path):
    for here, there in (("a", "b"), ("b", "a")):
        touch(tmp_path / here / f"{here}.png")
        os.symlink(tmp_path / there, tmp_path / here / "other")
    # Each class may hold the other's images once; the way back is closed.
    assert keys(tmp_path) == ["a/a.png", "a/other/b.png", "b/b.png", "b/other/a.png"]


def test_a_link_to_nothing_is_left_out_and_a_pipe_is_not_listed(tmp_path):
    touch(tmp_path / "c" / "1.png")
    os.symlink(tmp_path / "gone.png", tmp_path / "c" / "gone.png")
    os.symlink(tmp_path / "gone.txt", tmp_path / "c" / "gone.txt")  # no image: nobody asks for it
    os.mkfifo(tmp_path / "c" / "pipe.png")  # opening it would hang
    os.symlink(tmp_path / "c" / "pipe.png", tmp_path / "c" / "to_pipe.png")
    folder = scan_image_folder(tmp_path)
    assert [item.key for item in folder.items] == ["c/1.png"]
    assert folder.left_out == {"c/gone.png": f"cannot be read: {os.strerror(errno.ENOENT)}"}


def test_only_images_that_cannot_be_read(tmp_path):
    os.mkdir(tmp_path / "c")
    os.symlink("gone", tmp_path / "c" / "1.png")
    with pytest.raises(
        ValueError, match=r"no image that can be read: 1 cannot; the first is 'c/1\.png': cannot be read"
    ):
        scan_image_folder(tmp_path)


def test_images_that_cannot_be_read_count_for_the_structure(tmp_path):
    # Else a folder would change from flat to classes, and every label with it, while a disk is away.
    touch(tmp_path / "c" / "1.png")
    os.symlink("gone", tmp_path / "stray.png")
    with pytest.raises(ValueError, match=r"directly \('stray\.png'\) and in sub-folders \('c/1\.png'\)"):
        scan_image_folder(tmp_path)


def test_without_permission(as_a_user):
    for name in ("a/1.png", "a/2.png", "b/3.png", "c/4.png"):
        touch(as_a_user / name)
    os.chmod(as_a_user / "a" / "2.png", 0)
    os.chmod(as_a_user / "b", 0)  # cannot be listed
    os.chmod(as_a_user / "c", 0o444)  # can be listed, and nothing in it opened
    folder = scan_image_folder(as_a_user)
    denied = os.strerror(errno.EACCES)
    assert folder.classes == ["a", "b", "c"]  # a class that is away shifts nobody's label
    assert [(item.key, item.label) for item in folder.items] == [("a/1.png", 0)]
    assert folder.left_out == {
        "a/2.png": f"cannot be read: {denied}",
        "b": f"the folder cannot be listed: {denied}",
        "c/4.png": f"cannot be read: {denied}",
    }


def test_a_root_without_permission(as_a_user):
    os.chmod(as_a_user, 0o311)
    with pytest.raises(ValueError, match=f"cannot be listed: {os.strerror(errno.EACCES)}"):
        scan_image_folder(as_a_user)


def test_other_files_are_counted_by_suffix(tmp_path):
    for name in ("c/1.png", "c/2.TXT", "c/d.e/3", "c/4.tar.gz", "5.txt", ".hidden.txt"):
        touch(tmp_path / name)
    assert scan_image_folder(tmp_path).ignored == {".txt": 2, "": 1, ".gz": 1}


class TestCaptions:
    def scan(self, root):
        return scan_image_folder(root, captions="txt")

    def texts(self, root):
        return {item.key: item.attached["caption"] for item in self.scan(root).items}

    def test_are_the_text_files_of_the_same_stem(self, tmp_path):
        for name in ("c/1.png", "c/2.png", "c/3.a.png", "d/1.png"):
            touch(tmp_path / name)
        (tmp_path / "c" / "1.txt").write_bytes("a cat, ein Kätzchen 🐈\r\n".encode())
        (tmp_path / "c" / "3.a.txt").write_bytes(b"\xef\xbb\xbf with a byte order mark\n")
        (tmp_path / "d" / "2.txt").write_text("nobody's")
        assert self.texts(tmp_path) == {
            "c/1.png": "a cat, ein Kätzchen 🐈",
            "c/2.png": "",
            "c/3.a.png": "with a byte order mark",
            "d/1.png": "",
        }
        source = self.scan(tmp_path)
        assert source.columns == (Column("caption", "U8", (RAGGED,)),)
        assert source.ignored == {".txt": 1}

    def test_two_images_of_one_stem_share_theirs(self, tmp_path):
        for name in ("1.png", "1.jpg"):
            touch(tmp_path / name)
        (tmp_path / "1.txt").write_text("both")
        assert self.texts(tmp_path) == {"1.jpg": "both", "1.png": "both"}

    def test_change_the_stamp_and_nothing_else_does(self, tmp_path):
        touch(tmp_path / "1.png")
        (tmp_path / "1.txt").write_text("before")
        before = self.scan(tmp_path).items[0]
        os.utime(tmp_path / "1.txt")
        assert self.scan(tmp_path).items[0] == before
        (tmp_path / "1.txt").write_text("beyond")
        after = self.scan(tmp_path).items[0]
        assert after.stamp != before.stamp and after.size == before.size
        assert 0 <= after.stamp < 2**63

    @pytest.mark.parametrize(
        ("data", "why"),
        [(b"caf\xe9", r"its caption 1\.txt: expected UTF-8, got b'\\xe9' at byte 3"),
         (b"x" * (MAX_TEXT + 1), r"its caption 1\.txt: expected a text of at most 1048576 bytes")],
    )  # fmt: skip
    def test_that_are_no_text_leave_the_image_out(self, tmp_path, data, why):
        for name in ("1.jpg", "1.png", "2.png"):
            touch(tmp_path / name)
        (tmp_path / "1.txt").write_bytes(data)
        source = self.scan(tmp_path)
        assert [item.key for item in source.items] == ["2.png"]
        assert set(source.left_out) == {"1.jpg", "1.png"} and re.match(why, source.left_out["1.jpg"])

    def test_that_cannot_be_read_leave_the_image_out(self, tmp_path):
        for name in ("1.png", "2.png"):
            touch(tmp_path / name)
        os.symlink("gone", tmp_path / "1.txt")
        assert self.scan(tmp_path).left_out == {
            "1.png": f"its caption 1.txt: cannot be read: {os.strerror(errno.ENOENT)}"
        }

    @pytest.mark.parametrize("captions", ["", ".", "a/b", "png", ".JPG"])
    def test_other_suffixes_are_refused(self, tmp_path, captions):
        touch(tmp_path / "1.png")
        with pytest.raises(ValueError, match="captions: expected the suffix of text files"):
            scan_image_folder(tmp_path, captions=captions)


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
        open(item.place, "rb").close()


def test_the_root_may_be_relative_bytes_or_hidden(tmp_path, monkeypatch):
    touch(tmp_path / ".cache" / "c" / "1.png")
    monkeypatch.chdir(tmp_path)
    (item,) = scan_image_folder(".cache").items
    assert (item.key, item.place, item.label) == ("c/1.png", os.path.join(".cache", "c", "1.png"), 0)
    assert keys(os.fsencode(tmp_path / ".cache")) == ["c/1.png"]


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.lists(st.text("ab-./0\U0001f600\udcff\uff01", min_size=1, max_size=3), min_size=1, max_size=3),
        min_size=1, max_size=12,
    )
)  # fmt: skip
def test_keys_are_always_sorted_by_bytes(names):
    # "-" and "." sort before "/", "0" after it, and a folder's name may begin another's: the traps of sorting folder by
    # folder. Surrogates sort as text after U+FF01 and before U+1F600, as bytes after both.
    with tempfile.TemporaryDirectory() as root:
        made = set()
        for parts in names:
            parts = [part.replace("/", "").strip(".") or "x" for part in parts]
            path = os.path.join(root, "c", *parts[:-1], parts[-1] + ".png")
            try:
                os.makedirs(os.path.dirname(path), exist_ok=True)
                open(path, "xb").close()
            except (FileExistsError, NotADirectoryError, IsADirectoryError):
                continue
            made.add(os.path.relpath(path, root))
        assert keys(root) == sorted(made, key=os.fsencode)


class TestUrls:
    @pytest.fixture
    def memory(self):
        files = fsspec.filesystem("memory")
        files.store.clear()
        files.pseudo_dirs[:] = [""]
        yield files
        files.store.clear()
        files.pseudo_dirs[:] = [""]

    def test_are_like_folders(self, memory):
        for name in ("b/2.png", "a/x/1.JPG", "a-b/1.png", "a/.hidden.png", ".cache/3.png", "a/notes.txt"):
            memory.pipe(f"/data/{name}", name.encode())
        memory.mkdir("/data/empty")
        source = scan_image_folder("memory://data")
        assert source.classes == ["a", "a-b", "b", "empty"]
        assert [(item.key, item.place, item.label, item.size) for item in source.items] == [
            ("a-b/1.png", "memory://data/a-b/1.png", 1, 9),
            ("a/x/1.JPG", "memory://data/a/x/1.JPG", 0, 9),
            ("b/2.png", "memory://data/b/2.png", 2, 7),
        ]
        assert [source.read(item) for item in source.items] == [b"a-b/1.png", b"a/x/1.JPG", b"b/2.png"]
        assert source.ignored == {".txt": 1}

    def test_captions(self, memory):
        memory.pipe({"/data/1.png": b"", "/data/1.txt": b"a cat\n", "/data/2.png": b""})
        items = scan_image_folder("memory://data", captions="txt").items
        assert [item.attached["caption"] for item in items] == ["a cat", ""]

    def test_a_replaced_file_has_another_stamp(self, memory):
        memory.pipe("/data/1.png", b"one")
        (before,) = scan_image_folder("memory://data").items
        assert scan_image_folder("memory://data").items[0] == before
        memory.pipe("/data/1.png", b"two")
        (after,) = scan_image_folder("memory://data").items
        assert after.stamp != before.stamp and after.size == before.size

    def test_missing(self, memory):
        with pytest.raises(ValueError, match=r"'memory://nowhere' does not exist; expected a folder"):
            scan_image_folder("memory://nowhere")

    def test_local_ones_are_folders(self, tmp_path):
        os.makedirs(tmp_path / "c" / "d")
        os.symlink(tmp_path, tmp_path / "c" / "d" / "round")  # fsspec's own listing would run 40 rounds
        touch(tmp_path / "c" / "1.png")
        assert keys(f"file://{tmp_path}") == ["c/1.png"]
