import errno
import importlib
import os
import zipfile

import fsspec
import pytest

from fastlatent.sources.files import MAX_TEXT, Found, open_beside, open_files, read_each, read_text


@pytest.fixture
def memory():
    files = fsspec.filesystem("memory")
    yield files
    files.store.clear()
    files.pseudo_dirs[:] = [""]


@pytest.fixture(params=["local", "file", "memory", "zip"])
def files(request, tmp_path, memory):
    """The same files behind every kind of root."""
    contents = {
        "b/2.bin": b"0123456789",
        "a-b.txt": b"",
        "a/x/1": b"one",
        "a/.hidden": b"",
        ".top/1": b"",
        "ü/🙂": b"u",
    }
    for name, data in contents.items():
        path = tmp_path / "files" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        memory.pipe(f"/deep/files/{name}", data)
    if request.param == "zip":
        with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
            for name, data in contents.items():
                archive.writestr(name, data)
        return open_files(f"zip://::file://{tmp_path}/x.zip")
    roots = {"local": tmp_path / "files", "file": f"file://{tmp_path}/files", "memory": "memory://deep/files/"}
    return open_files(roots[request.param])


def test_the_listing(files):
    listing = files.listing()
    assert [(one.path, one.size) for one in listing] == [("a-b.txt", 0), ("a/x/1", 3), ("b/2.bin", 10), ("ü/🙂", 1)]
    assert listing.folders == ["a", "a/x", "b", "ü"] and listing.left_out == {}
    assert listing[-1] == listing[3] and listing[1:3] == [listing[1], listing[2]]
    with pytest.raises(IndexError):
        listing[4]
    for one in listing:
        assert files.stat(one.path) == one
        assert len(files.read(one.path)) == one.size


def test_ranges(files):
    assert files.read_range("b/2.bin", 3, 4) == b"3456"
    assert files.read_range("b/2.bin", 8, 4) == b"89"  # fewer at the end
    assert files.read_range("b/2.bin", 0, 10) == files.read("b/2.bin") == b"0123456789"


def test_what_is_there(files):
    assert files.exists() and files.is_dir() and files.exists("b/2.bin") and files.is_dir("a/x")
    assert not files.exists("nothing") and not files.is_dir("b/2.bin") and not files.is_dir("nothing")
    for call in (files.read, files.stat, lambda path: files.read_range(path, 0, 1)):
        with pytest.raises(OSError):
            call("nothing")


def test_places_begin_with_the_root_as_written(tmp_path, memory):
    assert open_files("data/").place("a/b") == "data/a/b" and open_files("data").place("") == "data"
    assert open_files("memory://data/").place("a/b") == "memory://data/a/b"
    assert open_files(tmp_path).root == str(tmp_path)
    assert open_files(b"d\xff").place("x") == os.fsdecode(b"d\xff/x")
    zipfile.ZipFile(tmp_path / "x.zip", "w").close()
    assert open_files(f"zip://in::file://{tmp_path}/x.zip").place("a") == f"zip://in/a::file://{tmp_path}/x.zip"


def test_the_folder_of_a_file(tmp_path, memory, monkeypatch):
    (tmp_path / "list.csv").write_bytes(b"local")
    memory.pipe("/deep/list.csv", b"remote")
    monkeypatch.chdir(tmp_path)
    for place, data in (
        (tmp_path / "list.csv", b"local"),
        ("list.csv", b"local"),
        ("memory://deep/list.csv", b"remote"),
    ):
        files, name = open_beside(place)
        assert name == "list.csv" and files.read(name) == data
    files, name = open_beside("/list.csv")
    assert (files.root, name) == ("/", "list.csv")


def test_protocols_that_are_not_there(monkeypatch):
    with pytest.raises(ValueError, match="nosuch://x: Protocol not known: nosuch"):
        open_files("nosuch://x")
    real = importlib.import_module

    def without(name, *rest):
        if name.startswith("fsspec"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(importlib, "import_module", without)
    with pytest.raises(ValueError, match=r"s3://x: URLs need fsspec: pip install 'fastlatent\[remote\]'"):
        open_files("s3://x")


def test_a_package_that_a_protocol_needs(monkeypatch):
    def missing(url):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr("fsspec.core.url_to_fs", missing)
    with pytest.raises(ValueError, match="this protocol needs one more package: Install s3fs"):
        open_files("s3://bucket/folder")


class TestRemote:
    def listing(self, monkeypatch, memory, infos):
        monkeypatch.setattr(type(memory), "find", lambda self, path, **_: infos)
        return open_files("memory://d").listing()

    def info(self, **more):
        return {"/d/x": {"name": "/d/x", "type": "file", "size": 1, **more}}

    def test_stamps_are_of_the_content_where_the_server_says_it(self, memory, monkeypatch):
        stamps = {}
        for name, more in {
            "etag": {"ETag": '"1"', "LastModified": 1}, "touched": {"ETag": '"1"', "LastModified": 2},
            "other": {"ETag": '"2"', "LastModified": 1}, "time": {"LastModified": 1}, "later": {"LastModified": 2},
        }.items():  # fmt: skip
            (found,) = self.listing(monkeypatch, memory, self.info(**more))
            stamps[name] = found.stamp
        assert stamps["etag"] == stamps["touched"] and len(set(stamps.values())) == 4
        assert all(0 <= stamp < 2**63 for stamp in stamps.values())

    def test_stamps_where_it_says_nothing(self, memory, monkeypatch):
        monkeypatch.setattr(type(memory), "ukey", lambda self, path: f"key of {path}")
        (found,) = self.listing(monkeypatch, memory, self.info())
        monkeypatch.setattr(type(memory), "ukey", lambda self, path: "another")
        (other,) = self.listing(monkeypatch, memory, self.info())
        assert found.stamp != other.stamp

    def test_without_a_size(self, memory, monkeypatch):
        listing = self.listing(
            monkeypatch, memory, self.info(size=None) | {"/d/y": {"type": "file", "size": 2, "etag": 1}}
        )
        assert [one.path for one in listing] == ["y"] and "does not tell its size" in listing.left_out["x"]

    def test_folders_that_are_objects(self, memory, monkeypatch):
        # Object stores have "folders": objects of no bytes with a name that ends in "/".
        infos = {"/d/e/": {"type": "file", "size": 0}, "/d/f/g/h": {"type": "file", "size": 1, "etag": 1}}
        listing = self.listing(monkeypatch, memory, infos)
        assert [one.path for one in listing] == ["f/g/h"] and listing.folders == ["e", "f", "f/g"]

    def test_exceptions_of_a_protocol_are_os_errors(self, memory, monkeypatch):
        class StrangeError(Exception):
            pass

        def fail(self, *_, **__):
            raise StrangeError("throttled")

        monkeypatch.setattr(type(memory), "cat_file", fail)
        with pytest.raises(OSError, match="memory://d: StrangeError: throttled"):
            open_files("memory://d").read("x")

    def test_a_second_listing_sees_what_is_new(self, memory):
        files = open_files("memory://d")
        memory.pipe("/d/1", b"")
        assert len(files.listing()) == 1
        memory.pipe("/d/2", b"")
        assert len(files.listing()) == 2


def test_a_root_that_cannot_be_listed(tmp_path):
    for root, number in ((tmp_path / "gone", errno.ENOENT), (tmp_path / "file", errno.ENOTDIR)):
        (tmp_path / "file").touch()
        with pytest.raises(OSError) as error:
            open_files(root).listing()
        assert error.value.errno == number


def test_an_empty_root(tmp_path):
    listing = open_files(tmp_path).listing()
    assert (len(listing), list(listing), listing.folders) == (0, [], [])


def test_many_folders_by_many_threads(tmp_path):
    # More folders than threads, empty ones and deep ones among them: the order is that of paths all the same.
    names = sorted(f"{i % 7}/{i % 5}-{i}/{'x/' * (i % 4)}{i}" for i in range(200))
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    files = open_files(tmp_path)
    for _ in range(5):
        listing = files.listing()
        assert listing.keys.texts() == names
        assert [one.size for one in listing] == [len(name) for name in names]
    assert listing[0] == Found(names[0], len(names[0]), os.stat(tmp_path / names[0]).st_mtime_ns)


def test_read_each_keeps_the_order_and_gives_failures():
    def read(name):
        if name == "b":
            raise OSError(5, "broken")
        return name.upper()

    found = list(read_each("abc", read))
    assert (found[0], found[2]) == ("A", "C") and isinstance(found[1], OSError)


def test_texts():
    assert read_text(b"\xef\xbb\xbf a\r\nb \r\n") == "a\r\nb" and read_text(b"") == ""
    assert read_text(b"x" * MAX_TEXT) == "x" * MAX_TEXT
    for data in (b"x" * (MAX_TEXT + 1), b"\xff", "ü".encode("latin-1"), "ü".encode("utf-16")):
        with pytest.raises(ValueError, match="expected"):
            read_text(data)
