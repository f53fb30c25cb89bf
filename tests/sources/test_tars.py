import gzip
import io
import os
import pickle
import tarfile

import fsspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastlatent.sources.columnar import ItemTable
from fastlatent.sources.image_folder import VIDEOS
from fastlatent.sources.items import RAGGED, Column, Source
from fastlatent.sources.tar_members import DamagedTar, Window, members
from fastlatent.sources.tars import scan_tars


def add(archive, name, data=b"", **header):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in header.items():
        setattr(info, field, value)
    archive.addfile(info, io.BytesIO(data))


def make(path, files, format=tarfile.USTAR_FORMAT):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with tarfile.open(path, "w", format=format, encoding="utf-8", errors="surrogateescape") as archive:
        for name, data in files.items() if isinstance(files, dict) else files:
            add(archive, name, data)
    return path


def read_all(source: Source):
    return {item.key: source.read(item) for item in source.items}


def test_samples_of_several_tars(tmp_path):
    make(tmp_path / "b" / "1.tar", {"x.jpg": b"x", "x.cls": b"3\n", "x.txt": b" an x ", "x.json": b"{}", "y.png": b"y"})
    make(tmp_path / "0.tar", {"dir/z.jpeg": b"zz", "dir/z.cls": b"0"})
    (tmp_path / "readme.md").write_text("hello")
    source = scan_tars(tmp_path, captions="txt")
    assert [(one.key, one.size, one.label, one.attached["caption"]) for one in source.items] == [
        ("0.tar/dir/z.jpeg", 2, 0, ""),
        ("b/1.tar/x.jpg", 1, 3, "an x"),
        ("b/1.tar/y.png", 1, -1, ""),
    ]
    assert read_all(source) == {"0.tar/dir/z.jpeg": b"zz", "b/1.tar/x.jpg": b"x", "b/1.tar/y.png": b"y"}
    assert source.items[0].place == str(tmp_path / "0.tar" / "dir" / "z.jpeg")
    assert source.classes == ["0", "1", "2", "3"]
    assert source.columns == (Column("caption", "U8", (RAGGED,)),)
    assert source.ignored == {".md": 1} and source.left_out == {}
    assert isinstance(source.items, ItemTable)


def test_without_labels_and_captions(tmp_path):
    source = scan_tars(make(tmp_path / "a.tar", {"1.jpg": b"1"}))
    (item,) = source.items
    assert (item.key, item.label, item.attached, source.classes, source.columns) == ("a.tar/1.jpg", -1, {}, [], ())
    assert item.place == str(tmp_path / "a.tar" / "1.jpg")


def test_one_tar_several_or_a_folder_give_the_same_items(tmp_path):
    paths = [make(tmp_path / "in" / f"{i}.tar", {f"{i}.jpg": b"%d" % i}) for i in range(3)]
    by_folder = scan_tars(tmp_path / "in")
    assert list(scan_tars(paths[::-1]).items) == list(by_folder.items)
    assert list(scan_tars(paths[1]).items) == [by_folder.items[1]]
    make(tmp_path / "other" / "0.tar", {"0.jpg": b"0"})
    source = scan_tars([paths[0], tmp_path / "other" / "0.tar"])
    assert [one.key for one in source.items] == ["in/0.tar/0.jpg", "other/0.tar/0.jpg"]
    with pytest.raises(ValueError, match="expected tars, each once"):
        scan_tars([paths[0], paths[0]])
    with pytest.raises(ValueError, match="expected one tar or more, got none"):
        scan_tars([])


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_format_and_long_names(tmp_path, format):
    # 100 bytes fit into the header, 255 with ustar's prefix, and more into GNU's and pax's extensions.
    names = ["a" * 96 + ".jpg", "d" * 90 + "/" + "b" * 90 + ".jpg"]
    if format != tarfile.USTAR_FORMAT:
        names += ["d/" * 200 + "ü" * 200 + ".jpg", os.fsdecode(b"\xff\xe9.jpg"), "图像 🙂.png", "line\nbreak.jpg"]
    contents = {name: os.fsencode(name) * 3 for name in names}
    make(tmp_path / "x.tar", contents, format)
    assert read_all(scan_tars(tmp_path)) == {f"x.tar/{name}": data for name, data in contents.items()}


def test_members_begin_where_tarfile_says(tmp_path):
    # Sizes at the edges of a block: 0, 1, 511, 512, 513; and read in windows smaller and larger than the archive.
    path = make(tmp_path / "x.tar", {f"{i}.jpg": b"q" * size for i, size in enumerate((0, 1, 511, 512, 513, 9000))})
    data = path.read_bytes()
    with tarfile.open(path) as archive:
        wanted = [(one.name, one.offset_data, one.size) for one in archive]
    for gap in (0, 512, 700, 4096, 1 << 20):
        asked = []

        def read(offset, size, asked=asked):
            asked.append(size)
            return data[offset : offset + size]

        found = members(Window(read, len(data), gap))
        assert [(one.name, one.offset, one.size) for one in found] == wanted
        assert sum(asked) <= (len(data) if gap == 1 << 20 else len(asked) * max(gap, 512))
        assert gap < 1 << 20 or len(asked) == 1


def test_names_are_taken_relative(tmp_path):
    # As `tar cf x.tar .` writes them, with an entry for the folder itself.
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        add(archive, "./", type=tarfile.DIRTYPE)
        add(archive, "./sub", type=tarfile.DIRTYPE)
        add(archive, "./sub/1.jpg", b"1")
        add(archive, "././2.jpg", b"2")
        add(archive, "./._2.jpg", b"a Mac's")
        add(archive, ".hidden/3.jpg", b"3")
    source = scan_tars(tmp_path)
    assert read_all(source) == {"x.tar/sub/1.jpg": b"1", "x.tar/2.jpg": b"2"} and source.left_out == {}


def test_the_image_among_several_suffixes(tmp_path):
    files = {"1.mask.png": b"m", "1.jpg": b"i", "photo.v2.jpg": b"p", "UPPER.JPG": b"u"}
    assert read_all(scan_tars(make(tmp_path / "x.tar", files))) == {
        "x.tar/1.jpg": b"i",
        "x.tar/photo.v2.jpg": b"p",
        "x.tar/UPPER.JPG": b"u",
    }


def test_unusable_samples_are_left_out_and_shift_nothing(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        add(archive, "0.jpg", b"good 0")
        add(archive, "../up.jpg", b"out")
        add(archive, "/root.jpg", b"out")
        add(archive, "a/../../b.jpg", b"out")
        add(archive, "a//b.jpg", b"out")
        add(archive, "soft.jpg", type=tarfile.SYMTYPE, linkname="0.jpg")
        add(archive, "hard.jpg", type=tarfile.LNKTYPE, linkname="0.jpg")
        add(archive, "device.jpg", type=tarfile.CHRTYPE)
        add(archive, "pipe.jpg", type=tarfile.FIFOTYPE)
        add(archive, "folder.jpg", type=tarfile.DIRTYPE)
        add(archive, "two.jpg", b"one")
        add(archive, "two.png", b"two")
        add(archive, "twice.jpg", b"first")
        add(archive, "label.jpg", b"l")
        add(archive, "label.cls", b"cat")
        add(archive, "minus.jpg", b"l")
        add(archive, "minus.cls", b"-1")
        add(archive, "large.jpg", b"l")
        add(archive, "large.cls", b"99999999")
        add(archive, "text.jpg", b"t")
        add(archive, "text.txt", b"\xff")
        add(archive, "twice.jpg", b"second")
        add(archive, "lonely.cls", b"7")
        add(archive, "sparse.jpg", b"s", pax_headers={"GNU.sparse.major": "1"})
        add(archive, "9.jpg", b"good 9")
        add(archive, "9.cls", b"1")
        add(archive, "9.txt", b"nine")
    source = scan_tars(tmp_path, captions="txt")
    assert read_all(source) == {"x.tar/0.jpg": b"good 0", "x.tar/9.jpg": b"good 9"}
    assert source.items[1].label == 1 and source.classes == ["0", "1"]
    outside = "its name leads out of the archive: expected a relative path"
    number = "its .cls: expected a whole number from 0 to 1048575, got "
    assert source.left_out == {
        "x.tar/../up.jpg": outside,
        "x.tar//root.jpg": outside,
        "x.tar/a/../../b.jpg": outside,
        "x.tar/a//b.jpg": outside,
        "x.tar/soft.jpg": "a symbolic link: expected a file",
        "x.tar/hard.jpg": "a hard link: expected a file",
        "x.tar/device.jpg": "a device: expected a file",
        "x.tar/pipe.jpg": "a pipe: expected a file",
        "x.tar/sparse.jpg": "a sparse file: expected a file",
        "x.tar/two.jpg": "one sample of 2 images: two.jpg, two.png",
        "x.tar/two.png": "one sample of 2 images: two.jpg, two.png",
        "x.tar/twice.jpg": "twice.jpg is in its tar twice",
        "x.tar/label.jpg": number + "b'cat'",
        "x.tar/minus.jpg": number + "b'-1'",
        "x.tar/large.jpg": number + "b'99999999'",
        "x.tar/text.jpg": "its caption: expected UTF-8, got b'\\xff' at byte 0",
    }


class TestCaptions:
    def texts(self, path, captions):
        return {one.key.rpartition("/")[2]: one.attached["caption"] for one in scan_tars(path, captions=captions).items}

    def test_by_suffix_or_key_of_json(self, tmp_path):
        files = {
            "1.jpg": b"", "1.txt": b"not asked for", "1.alt": b"by suffix\n", "1.json": b'{"alt": "not read"}',
            "2.jpg": b"", "2.json": '{"alt": " by key: größer ", "other": [1]}'.encode(),
            "3.jpg": b"", "3.json": b'{"other": 1}', "4.jpg": b"", "5.jpg": b"", "5.json": b'{"alt": null}',
        }  # fmt: skip
        make(tmp_path / "x.tar", files)
        wanted = {"1.jpg": "by suffix", "2.jpg": "by key: größer", "3.jpg": "", "4.jpg": "", "5.jpg": ""}
        assert self.texts(tmp_path, "alt") == self.texts(tmp_path, ".alt") == wanted
        assert self.texts(tmp_path, "txt")["1.jpg"] == "not asked for"

    @pytest.mark.parametrize(
        ("json", "why"),
        [(b"{", "its caption: Expecting property name"), (b"[" * 100_000, "its caption: "),
         (b"\xff", "its caption: expected UTF-8"),
         (b'{"alt": 3}', "its caption: expected a text as 'alt' of its .json, got 3"),
         (b"[1]", r"its caption: expected a text as 'alt' of its .json, got [1]"),
         (b'{"alt": "a\\ud83d"}', "its caption: expected Unicode text, got half of a surrogate pair")],
    )  # fmt: skip
    def test_of_damaged_json(self, tmp_path, json, why):
        make(tmp_path / "x.tar", {"1.jpg": b"", "1.json": json, "2.jpg": b"2", "2.alt": b"two"})
        source = scan_tars(tmp_path, captions="alt")
        assert [one.key for one in source.items] == ["x.tar/2.jpg"]
        assert source.left_out["x.tar/1.jpg"].startswith(why)

    def test_that_no_image_has(self, tmp_path):
        make(tmp_path / "x.tar", {"1.jpg": b"", "1.txt": b"text"})
        with pytest.raises(ValueError, match="captions 'caption': no image of .* has such a member"):
            scan_tars(tmp_path, captions="caption")
        with pytest.raises(ValueError, match="captions: expected the suffix"):
            scan_tars(tmp_path, captions="")


class TestVideos:
    def test_are_their_samples_members_with_a_videos_suffix(self, tmp_path):
        files = {
            "1.mp4": b"v", "1.jpg": b"poster", "1.txt": b" text ", "1.cls": b"2", "1.json": b"{}",
            "2.low.webm": b"low", "2.webm": b"whole suffix", "UPPER.MKV": b"u", "3.png": b"no video",
        }  # fmt: skip
        make(tmp_path / "x.tar", files)
        source = scan_tars(tmp_path, captions="txt", medium=VIDEOS)
        assert read_all(source) == {"x.tar/1.mp4": b"v", "x.tar/2.webm": b"whole suffix", "x.tar/UPPER.MKV": b"u"}
        assert [(one.label, one.attached["caption"]) for one in source.items] == [(2, "text"), (-1, ""), (-1, "")]
        assert source.ignored == {".jpg": 1, ".webm": 1, ".png": 1}

    def test_unusable_samples(self, tmp_path):
        make(tmp_path / "x.tar", [("1.mp4", b"1"), ("1.webm", b"2"), ("2.mp4", b"3"), ("2.mp4", b"4"), ("3.mp4", b"5")])
        source = scan_tars(tmp_path, medium=VIDEOS)
        assert read_all(source) == {"x.tar/3.mp4": b"5"}
        assert source.left_out["x.tar/1.mp4"] == "one sample of 2 videos: 1.mp4, 1.webm"
        assert source.left_out["x.tar/2.mp4"] == "2.mp4 is in its tar twice"

    def test_of_the_other_medium(self, tmp_path):
        path = make(tmp_path / "x.tar", {"1.mp4": b"1", "1.txt": b"text"})
        with pytest.raises(ValueError, match="no image in 1 tars; it holds videos: fastlatent encode --vae"):
            scan_tars(path)
        with pytest.raises(ValueError, match="captions 'alt': no video of .* has such a member"):
            scan_tars(path, captions="alt", medium=VIDEOS)
        path = make(tmp_path / "y.tar", {"1.png": b"1"})
        with pytest.raises(ValueError, match="no video in 1 tars; it holds images: frames of clips have to lie in one"):
            scan_tars(path, medium=VIDEOS)


class TestStamps:
    def test_change_with_the_tar_and_the_text(self, tmp_path):
        path = make(tmp_path / "x.tar", {"1.jpg": b"1", "1.txt": b"one", "2.jpg": b"2"})
        os.utime(path, ns=(0, 1_700_000_000_000_000_000))
        before = list(scan_tars(path).items)
        assert list(scan_tars(path).items) == before
        assert before[0].stamp != before[1].stamp and all(0 <= one.stamp < 2**63 for one in before)
        os.utime(path, ns=(0, 1_700_000_000_000_000_001))
        assert not {one.stamp for one in scan_tars(path).items} & {one.stamp for one in before}


class TestDamage:
    def test_cut_off_anywhere(self, tmp_path):
        # What ends without its mark may miss members of the last sample that it shows, its caption, say: that one is
        # left out, also where the cut is between members. Those before it are there, with their own bytes.
        files = {f"{i}.{suffix}": suffix.encode() * 400 for i in range(3) for suffix in ("jpg", "json")}
        path = make(tmp_path / "x.tar", files)
        whole = path.read_bytes()
        with tarfile.open(path) as archive:
            found = list(archive)
        headers = [one.offset for one in found if one.name.endswith("jpg")]
        mark = found[-1].offset_data + -(-found[-1].size // 512) * 512
        edges = [
            at + d
            for one in found
            for at in (one.offset, one.offset_data, one.offset_data + one.size)
            for d in (-1, 0, 1)
        ]
        for size in sorted(
            {*range(1, 13), *range(600, len(whole), 331), *edges, mark, mark + 511, mark + 512} - {-1, 0}
        ):
            path.write_bytes(whole[:size])
            shown = sum(at + 512 <= size for at in headers)
            expected = 3 if size >= mark + 512 else max(shown - 1, 0)
            if expected == 0:
                with pytest.raises(ValueError, match="no image in 1 tars; the first of what was left out is"):
                    scan_tars(path)
                continue
            source = scan_tars(path)
            assert read_all(source) == {f"x.tar/{i}.jpg": b"jpg" * 400 for i in range(expected)}, size
            left_out = {} if expected == 3 else {"x.tar", f"x.tar/{expected}.jpg"}
            assert set(source.left_out) == set(left_out), size

    @pytest.mark.parametrize(
        ("data", "why"),
        [(b"", "an empty file, no tar"), (b"text", "cut off: byte 512 of it was asked for, and it has 4"),
         (b"<html>" * 500, "no tar: expected a header at byte 0")],
    )  # fmt: skip
    def test_files_that_are_no_tars_cost_nobody_else(self, tmp_path, data, why):
        make(tmp_path / "good.tar", {"1.jpg": b"1"})
        (tmp_path / "bad.tar").write_bytes(data)
        source = scan_tars(tmp_path)
        assert [one.key for one in source.items] == ["good.tar/1.jpg"]
        assert list(source.left_out) == ["bad.tar"] and source.left_out["bad.tar"].startswith(why)

    def test_links_to_nothing(self, tmp_path):
        make(tmp_path / "good.tar", {"1.jpg": b"1"})
        os.symlink("gone", tmp_path / "bad.tar")
        assert list(scan_tars(tmp_path).left_out) == ["bad.tar"]

    @settings(max_examples=150, deadline=None)
    @given(st.integers(0, 12 * 512), st.binary(min_size=1, max_size=12))
    def test_any_bytes_anywhere(self, position, junk):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
            add(archive, "ü" * 120 + ".jpg", b"1" * 700)
            add(archive, "2.jpg", b"2" * 700)
        data = bytearray(buffer.getvalue())
        data[position : position + len(junk)] = junk
        found = []
        try:
            for one in members(Window(lambda offset, size: bytes(data[offset : offset + size]), len(data), 512)):
                found.append(one)  # it ends, and with nothing but this:
        except DamagedTar:
            pass
        except ValueError as error:
            assert "uncompressed" in str(error) and position < 4
        assert all(one.size >= 0 for one in found) and len(found) < 15

    def test_cut_after_the_scan(self, tmp_path):
        path = make(tmp_path / "x.tar", {"1.jpg": b"1" * 2000})
        source = scan_tars(path)
        os.truncate(path, 1000)
        with pytest.raises(ValueError, match="expected 2000 bytes, got 488: the tar was cut since the scan"):
            source.read(source.items[0])
        os.remove(path)
        with pytest.raises(OSError):
            source.read(source.items[0])


class TestRefusals:
    @pytest.mark.parametrize("name", ["x.tar", "x.tar.gz", "x.tgz"])
    def test_compressed(self, tmp_path, name):
        path = make(tmp_path / "plain" / "x.tar", {"1.jpg": b"1"})
        (tmp_path / name).write_bytes(gzip.compress(path.read_bytes()))
        for root in (tmp_path, tmp_path / name):
            with pytest.raises(ValueError, match=f"{name}: expected .*uncompressed tar.*Uncompress it"):
                scan_tars(root)

    def test_nothing_there(self, tmp_path):
        with pytest.raises(ValueError, match="does not exist; expected a tar, or a folder of"):
            scan_tars(tmp_path / "missing")
        with pytest.raises(ValueError, match=r"expected a folder of \*.tar, got none"):
            scan_tars(tmp_path)
        path = make(tmp_path / "x.tar", {"readme.txt": b"no image"})
        with pytest.raises(ValueError, match="no image in 1 tars"):
            scan_tars(path)
        with pytest.raises(ValueError, match=r"y\.tar: expected a tar, got: No such file"):
            scan_tars([path, tmp_path / "y.tar"])


def test_behind_a_url(tmp_path):
    memory = fsspec.filesystem("memory")
    path = make(tmp_path / "x.tar", {"1.jpg": b"one", "1.txt": b"text", "2.jpg": b"two"})
    for name in ("a/0.tar", "b/1.tar"):
        memory.pipe(f"/tars/{name}", path.read_bytes())
    try:
        source = scan_tars("memory://tars")
        assert read_all(source) == {
            f"{name}/{image}": data
            for name in ("a/0.tar", "b/1.tar")
            for image, data in (("1.jpg", b"one"), ("2.jpg", b"two"))
        }
        assert source.items[0].place == "memory://tars/a/0.tar/1.jpg"
        assert [one.key for one in scan_tars("memory://tars/a/0.tar").items] == ["0.tar/1.jpg", "0.tar/2.jpg"]
        several = scan_tars(["memory://tars/b/1.tar", "memory://tars/a/0.tar"])
        assert list(several.items) == list(source.items)
        items, read = pickle.loads(pickle.dumps((source.items, source.read)))  # for other processes
        assert {one.key: read(one) for one in items} == read_all(source)
    finally:
        memory.store.clear()
