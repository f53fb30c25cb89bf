import json
import os

import fsspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastlatent.sources.items import RAGGED, Column, content_digest
from fastlatent.sources.manifest import scan_manifest


def touch(root, *names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode("utf-8", "surrogateescape"))


def lines(path, *records, end="\n"):
    path.write_bytes("".join(json.dumps(one) + end for one in records).encode())
    return path


def sets(root):
    return {"record_type": "set", "output_root": str(root), "version": 3}


def sample(path, **metadata):
    return {"record_type": "sample", "output_rel": path, "metadata": metadata}


def test_json_lines(tmp_path):
    touch(tmp_path / "images", "b/2.tif", "a/1.tif", "unlisted.tif")
    manifest = lines(tmp_path / "m.json", sets(tmp_path / "images"), sample("b/2.tif"), sample("a/1.tif"))
    source = scan_manifest(manifest)
    assert [item.key for item in source.items] == ["a/1.tif", "b/2.tif"]
    first = source.items[0]
    assert first.place == str(tmp_path / "images" / "a" / "1.tif")
    status = os.stat(first.place)
    assert (first.size, first.stamp, first.label, first.group) == (status.st_size, status.st_mtime_ns, -1, "")
    assert source.read(first) == b"a/1.tif"
    assert source.columns == () and source.classes == [] and source.left_out == {} and first.attached == {}


@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\n\n  \t\n", "\r\n\r\n"])
def test_byte_order_mark_line_ends_and_blank_lines(tmp_path, start, end):
    touch(tmp_path, "1.png", "2.png")
    manifest = lines(tmp_path / "m.jsonl", sets(tmp_path), sample("1.png"), sample("2.png"), end=end)
    manifest.write_bytes(start + manifest.read_bytes())
    assert [item.key for item in scan_manifest(manifest).items] == ["1.png", "2.png"]
    manifest.write_bytes(manifest.read_bytes().rstrip())  # no end of the last line
    assert len(scan_manifest(manifest).items) == 2


def test_unknown_records_are_passed_over(tmp_path):
    touch(tmp_path, "1.png")
    others = {"record_type": "camera", "output_rel": 3}, {"note": 1}, {}
    manifest = lines(tmp_path / "m.json", *others, sets(tmp_path), *others, sample("1.png"))
    assert len(scan_manifest(manifest).items) == 1


@pytest.mark.parametrize("indent", [None, 2])
def test_a_json_document(tmp_path, indent):
    touch(tmp_path / "images", "1.png", "2.png")
    samples = [{"output_rel": "1.png"}, sample("2.png", split="val"), {"record_type": "note"}]
    manifest = tmp_path / "m.json"
    manifest.write_text(json.dumps({"output_root": "images", "samples": samples}, indent=indent))
    assert [item.key for item in scan_manifest(manifest).items] == ["1.png", "2.png"]
    assert [item.key for item in scan_manifest(manifest, split="val").items] == ["2.png"]
    manifest.write_text(json.dumps(samples, indent=indent))
    assert [item.key for item in scan_manifest(manifest, root=str(tmp_path / "images")).items] == ["1.png", "2.png"]
    manifest.write_text(json.dumps([sets("images"), *samples], indent=indent))
    assert len(scan_manifest(manifest).items) == 2


def test_where_the_root_is(tmp_path, monkeypatch):
    touch(tmp_path / "a", "1.png")
    touch(tmp_path / "b" / "a", "1.png")
    manifest = lines(tmp_path / "m.json", sets("a"), sample("1.png"))  # relative: from the manifest's folder
    assert scan_manifest(manifest).items[0].place == str(tmp_path / "a" / "1.png")
    monkeypatch.chdir(tmp_path)
    assert scan_manifest("m.json").items[0].place == "a/1.png"
    override = scan_manifest(manifest, root=str(tmp_path / "b" / "a")).items[0]
    assert override.place == str(tmp_path / "b" / "a" / "1.png")
    document = tmp_path / "a" / "d.json"
    document.write_text('[{"output_rel": "1.png"}]')  # no root: the manifest's folder
    assert scan_manifest(document).items[0].place == str(tmp_path / "a" / "1.png")
    document.write_text('{"output_root": null, "samples": [{"output_rel": "1.png"}]}')
    with pytest.raises(ValueError, match="output_root must be a folder's path, got null"):
        scan_manifest(document)
    assert len(scan_manifest(document, root=str(tmp_path / "a")).items) == 1


def test_a_root_for_each_set(tmp_path):
    touch(tmp_path / "a", "1.png", "both.png")
    touch(tmp_path / "b", "2.png", "both.png")
    manifest = lines(
        tmp_path / "m.json",
        *(sets("a"), sample("1.png"), sample("both.png")),
        *(sets("b"), sample("2.png"), sample("both.png")),
    )
    source = scan_manifest(manifest)
    assert [item.place[len(str(tmp_path)) :] for item in source.items] == ["/a/1.png", "/b/2.png", "/a/both.png"]
    assert source.left_out == {"both.png (line 6)": "named a second time; line 3 counts"}
    assert source.read(source.items[1]) == b"2.png"


def test_splits(tmp_path):
    touch(tmp_path, "1.png", "2.png", "3.png")
    manifest = lines(
        tmp_path / "m.json", sets(""), sample("1.png", split="train"), sample("2.png", split="val"), sample("3.png")
    )
    assert [item.key for item in scan_manifest(manifest, split="train").items] == ["1.png"]
    assert len(scan_manifest(manifest).items) == 3
    with pytest.raises(
        ValueError, match=r"names no image of split 'test'; its splits are train \(1\), val \(1\), None"
    ):
        scan_manifest(manifest, split="test")


def test_what_is_left_out(tmp_path):
    root = tmp_path / "root"
    touch(root, "1.png", "sub/2.png")
    touch(tmp_path, "outside.png")
    (root / "broken.png").symlink_to("nowhere")
    paths = ["1.png", "missing.png", "../outside.png", "sub/../../outside.png", str(root / "1.png"), "sub", "."]
    paths += ["1.png/deeper.png", "./sub//2.png", "sub/../1.png", "a\0b", "half \ud800", "x" * 300, "broken.png"]
    paths += ["missing.png"]
    source = scan_manifest(lines(tmp_path / "m.json", sets("root"), *map(sample, paths)))
    assert [item.key for item in source.items] == ["1.png", "sub/2.png"]
    reasons = {
        "missing.png": "line 3: there is no such file",
        "../outside.png": "line 4: not a path below output_root",
        "sub/../../outside.png": "line 5: not a path below output_root",
        str(root / "1.png"): "line 6: an absolute path",
        "sub": "line 7: no file but a folder",
        ".": "line 8: not a path below output_root",
        "1.png/deeper.png": "line 9: cannot be read: Not a directory",
        "1.png (line 11)": "named a second time; line 2 counts",
        "a\0b": "line 12: not a path",
        "half \\ud800": "line 13: no file can be called that",
        "x" * 300: "line 14: cannot be read: File name too long",
        "broken.png": "line 15: there is no such file",
        "missing.png (line 16)": "named a second time; line 3 counts",
    }
    assert source.left_out.keys() == reasons.keys()
    for name, reason in reasons.items():
        assert source.left_out[name].startswith(reason), (name, source.left_out[name])


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "names no image"),
        (b"\n \n", "names no image"),
        (b'{"record_type": "set", "output_root": "."}\n', "names no image"),
        (b"[]", "names no image"),
        (b'{"samples": []}', "names no image"),
        (b'{"record_type": "sample", "output_rel": "1.png"}\n', "line 1: a sample before the"),
        (b'\n\n{"record_type": "sample", "output_rel": "1.png"}', "line 3: a sample before the"),
        (b'{"record_type": "set"}\n', "line 1: output_root must be a folder's path, got null"),
        (b'{"record_type": "set", "output_root": 3}\n', "line 1: output_root must be a folder's path, got 3"),
        (b'{"record_type": "set", "output_root": "."}\n{"record_type": "sam', "line 2: not JSON"),
        (b'{"record_type": "set", "output_root": "."}\r\n\r\nnonsense\r\n', "line 3: not JSON"),
        (b'{"record_type": "set", "output_root": "."}\n[1, 2]', r"line 2: expected an object {…}, got \[1, 2\]"),
        (b'{"record_type": "set", "output_root": "."}\n{"record_type": "sample"}', "line 2: output_rel must be"),
        (
            b'{"record_type": "set", "output_root": "."}\n{"record_type": "sample", "output_rel": ""}',
            "line 2: output_rel",
        ),
        (
            b'{"record_type": "set", "output_root": "."}\n{"record_type": "sample", "output_rel": "1", "metadata": 3}',
            "line 2: metadata must be an object",
        ),
        (b'[{"output_rel": "1.png"}, 3]', "sample 2: expected an object"),
        (b'[{"output_rel": 3}]', "sample 1: output_rel must be an image's path, got 3"),
        (b"\xff\xfe\x00", "not UTF-8"),
        (b"\x1f\x8b\x08", "not UTF-8"),
        (b"[" * 100_000, "line 1: not JSON"),  # deeper than the parser goes
        (
            b'{"record_type": "set", "output_root": "."}\n{"record_type": "sample", "output_rel": "gone.png"}',
            "gone.png",
        ),
    ],
)
def test_what_is_no_manifest(tmp_path, content, message):
    (tmp_path / "m.json").write_bytes(content)
    with pytest.raises(ValueError, match=f"m.json'.*{message}"):
        scan_manifest(tmp_path / "m.json")


def test_a_manifest_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match="cannot be read"):
        scan_manifest(tmp_path / "m.json")


def test_all_missing_tells_of_the_root(tmp_path):
    manifest = lines(tmp_path / "m.json", sets("/gone"), sample("1.png"))
    with pytest.raises(ValueError, match="none of its 1 images.*give their folder as the root"):
        scan_manifest(manifest)


def test_captions_and_conditions_are_columns(tmp_path):
    touch(tmp_path, "1.png", "2.png")
    manifest = lines(
        tmp_path / "m.json", sets(""), sample("2.png", text=None), sample("gone.png"),
        sample("1.png", text="für \u2028 Elise", wind=[3, 4]),
    )  # fmt: skip
    source = scan_manifest(manifest, captions="text", conditions="temperature:1,wind:3,wind_mag:1")
    assert source.columns == (
        Column("caption", "U8", (RAGGED,)),
        Column("condition", "F32", (5,)),
        Column("condition_present", "F32", (3,)),
    )
    assert source.items[0].attached == {
        "caption": "für \u2028 Elise",
        "condition": [0, 3, 4, 0, 5],
        "condition_present": [0, 1, 1],
    }
    assert source.items[1].attached == {"caption": "", "condition": [0] * 5, "condition_present": [0] * 3}
    # Of the images that are there, in the order of their keys.
    assert source.remarks == (
        "condition 'temperature': 2 of 2 samples lack it; the first is '1.png'",
        "condition 'wind': 1 of 2 samples hold another number of values than 3: cut, or filled with zeros; the first "
        "is '1.png'",
        "condition 'wind': 1 of 2 samples lack it; the first is '2.png'",
        "condition 'wind_mag': 1 of 2 samples lack it; the first is '2.png'",
    )
    assert content_digest(source.items[0], b"x") != content_digest(source.items[1], b"x")
    plain = scan_manifest(manifest)
    assert plain.columns == () and plain.remarks == () and plain.items[0].stamp != source.items[0].stamp


@pytest.mark.parametrize("text", [3, ["a"], "half \ud800"])
def test_a_caption_that_is_no_text(tmp_path, text):
    touch(tmp_path, "1.png")
    manifest = lines(tmp_path / "m.json", sets(""), sample("1.png", text=text))
    with pytest.raises(ValueError, match="line 2: 'text' is no text"):
        scan_manifest(manifest, captions="text")


def test_a_condition_that_changes_changes_its_own_stamp(tmp_path):
    touch(tmp_path, "1.png", "2.png")
    stamps = []
    for temperature in (1, 2):
        manifest = lines(tmp_path / "m.json", sets(""), sample("1.png", t=temperature), sample("2.png", t=1))
        stamps.append([item.stamp for item in scan_manifest(manifest, conditions="t:1").items])
    assert stamps[0][0] != stamps[1][0] and stamps[0][1] == stamps[1][1]


def test_nan_is_json_here(tmp_path):  # Python's json writes it, so manifests hold it
    touch(tmp_path, "1.png")
    manifest = lines(tmp_path / "m.json", sets(""), sample("1.png", t=float("nan")))
    item = scan_manifest(manifest, conditions="t:1").items[0]
    assert item.attached == {"condition": [0.0], "condition_present": [0.0]}


def test_remote():
    memory = fsspec.filesystem("memory")
    for name in ("a/1.png", "2.png"):
        memory.pipe(f"/manifests/images/{name}", name.encode())
    records = [sets("images"), sample("a/1.png"), sample("2.png"), sample("3.png")]
    memory.pipe("/manifests/m.json", "\n".join(map(json.dumps, records)).encode())
    try:
        source = scan_manifest("memory://manifests/m.json")
        assert [(item.key, item.size, source.read(item)) for item in source.items] == [
            ("2.png", 5, b"2.png"),
            ("a/1.png", 7, b"a/1.png"),
        ]
        assert list(source.left_out) == ["3.png"]
    finally:
        memory.rm("/manifests", recursive=True)


NAME = st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=8).filter(
    lambda name: name not in (".", "..")
)
PATHS = st.lists(st.lists(NAME, min_size=1, max_size=3).map("/".join), min_size=1, max_size=6, unique=True)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(paths=PATHS, ascii_only=st.booleans(), blank=st.integers(0, 2), mark=st.booleans(), crlf=st.booleans())
def test_any_names_in_any_order(tmp_path_factory, paths, ascii_only, blank, mark, crlf):
    root = tmp_path_factory.mktemp("root")
    written = set()
    for path in paths:
        try:
            touch(root, path)
            written.add(path)
        except (FileExistsError, IsADirectoryError, NotADirectoryError):  # a path that is another's folder
            pass
    end = ("\r\n" if crlf else "\n") * (1 + blank)
    text = end.join(json.dumps(one, ensure_ascii=ascii_only) for one in [sets(""), *map(sample, paths)])
    manifest = root.parent / f"{root.name}.json"
    manifest.write_bytes((b"\xef\xbb\xbf" if mark else b"") + text.encode())
    source = scan_manifest(manifest, root=str(root))
    keys = [item.key for item in source.items]
    assert set(keys) == written and keys == sorted(keys, key=os.fsencode)
    assert set(source.left_out) == set(paths) - written
    assert [source.read(item) for item in source.items] == [key.encode() for key in keys]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_damaged_manifest_is_a_value_error_or_a_source(tmp_path, data):
    touch(tmp_path, "1.png", "2.png")
    text = bytearray("\n".join(map(json.dumps, [sets(""), sample("1.png", t=1), sample("2.png", t=2)])).encode())
    for _ in range(data.draw(st.integers(1, 3))):
        text[data.draw(st.integers(0, len(text) - 1))] = data.draw(st.integers(0, 255))
    (tmp_path / "m.json").write_bytes(text)
    try:
        source = scan_manifest(tmp_path / "m.json", conditions="t:1")
    except ValueError:
        return
    assert {item.key for item in source.items} <= {"1.png", "2.png", "m.json"}
