import errno
import os

import pytest

from fastlatent.store.files import canonical_json, inside, parse_json, write_all, write_atomic


def test_write_atomic_replaces_the_whole_file(tmp_path):
    path = tmp_path / "deep" / "er" / "file"
    for data in (b"", b"first", b"longer than first", b"x"):  # empty: os.write is never called
        write_atomic(path, data)
        assert path.read_bytes() == data
    assert [entry.name for entry in path.parent.iterdir()] == ["file"]


@pytest.mark.parametrize("call", ["write", "fdatasync", "replace"])
def test_a_full_disk_keeps_what_was_there(tmp_path, monkeypatch, call):
    path = tmp_path / "file"
    write_atomic(path, b"before")

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, call, full)
    with pytest.raises(OSError, match="what was there is kept; free some space") as error:
        write_atomic(path, b"after")
    assert error.value.errno == errno.ENOSPC
    assert path.read_bytes() == b"before"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_write_all_goes_on_after_a_short_write(tmp_path, monkeypatch):
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: real(fd, data[:3]))
    fd = os.open(tmp_path / "file", os.O_WRONLY | os.O_CREAT)
    write_all(fd, b"0123456789")
    os.close(fd)
    assert (tmp_path / "file").read_bytes() == b"0123456789"


def test_canonical_json_has_one_spelling():
    assert canonical_json({"b": [1, 2.5, None], "a": "é\udcff"}) == b'{"a":"\\u00e9\\udcff","b":[1,2.5,null]}'
    assert canonical_json({"a": 1, "b": 2}) == canonical_json({"b": 2, "a": 1})
    for value in (float("nan"), float("inf"), {1, 2}, b"bytes"):
        with pytest.raises(ValueError, match="JSON can hold exactly"):
            canonical_json(value)


@pytest.mark.parametrize("data", [b"", b"{", b"\xff", b'{"a":1,"a":2}', b"[" * 100_000, b"1" * 5000 + b"x"])
def test_parse_json_refuses(data):
    with pytest.raises(ValueError, match="a file: expected JSON"):
        parse_json(data, "a file")


@pytest.mark.parametrize(
    "path", ["", "/etc/passwd", "..", "a/../b", "../x", "a//b", "./a", "a/", "a\0b", "link/x", "loop"]
)
def test_inside_refuses_paths_that_lead_out(tmp_path, path):
    root = tmp_path / "root"
    root.mkdir()
    (root / "link").symlink_to(tmp_path)
    (root / "loop").symlink_to("loop")
    with pytest.raises((ValueError, RuntimeError)):  # before 3.13 a loop of links is a RuntimeError
        inside(root, path, "manifest")
