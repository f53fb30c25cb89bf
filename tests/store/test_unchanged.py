import os
import shutil

import numpy as np
import pytest

from fastlatent.store.merge import describes
from fastlatent.store.reader import Dataset
from fastlatent.store.records import encode_key, key_columns
from fastlatent.store.scan import Scanned, hash_file, sort_entries
from fastlatent.store.unchanged import unchanged

NAMES = [f"{folder}/{i}.png" for folder in "abc" for i in range(4)]
FIRST, LAST = NAMES[0], NAMES[-1]
# No file in quarantine; the first, the last, two neighbours, one in the middle: the edges of the runs between them.
FAULTS = [(), (FIRST,), (LAST,), ("a/3.png", "b/0.png"), (FIRST, "b/1.png", "b/2.png", LAST), tuple(NAMES[1:])]


@pytest.fixture(scope="module", params=FAULTS, ids=lambda bad: f"{len(bad)}-bad")
def encoded(tmp_path_factory, request, toy):
    root = tmp_path_factory.mktemp("unchanged")
    source = toy.make_source(root / "source", NAMES)
    for key in request.param:
        toy.write_file(source, key, b"bad " + key.encode())
    toy.build(root / "dataset", source)
    return root


@pytest.fixture
def built(encoded, tmp_path):
    """The dataset, and a copy of its source to be changed."""
    return encoded / "dataset", shutil.copytree(encoded / "source", tmp_path / "source")


def scanned(toy, source):
    """As `unchanged` takes it: in key order, as columns."""
    entries, classes = toy.scan(source)
    ordered = sort_entries(entries, len(classes), 1)
    columns = key_columns([key for key, _ in ordered])
    found = [entry for _, entry in ordered]
    return (
        columns["key.utf8"], columns["key.offsets"],
        np.array([one.size for one in found], "<u8"), np.array([one.mtime_ns for one in found], "<i8"),
        np.array([one.label for one in found], "<i8"), classes,
    )  # fmt: skip


def asked(toy, dataset, source):
    """What `unchanged` says, held against what the writer says file by file."""
    opened = Dataset.open(dataset)
    entries, classes = toy.scan(source)
    files = [Scanned(key, one, hash_file(one)) for key, one in sort_entries(entries, len(classes), 1)]
    found = unchanged(opened, *scanned(toy, source))
    assert found == describes(opened, files, classes)
    return found


def test_the_same_files(toy, built):
    assert asked(toy, *built)


@pytest.mark.parametrize("key", [FIRST, "a/3.png", "b/1.png", LAST])
class TestOneFile:
    """Some of these are in quarantine, and some lie beside one that is."""

    def test_is_gone(self, toy, built, key):
        os.remove(built[1] / key)
        assert not asked(toy, *built)

    def test_has_another_size(self, toy, built, key):
        toy.write_file(built[1], key, b"longer than it was, and of the same time")
        assert not asked(toy, *built)

    def test_has_another_time(self, toy, built, key):
        os.utime(built[1] / key, ns=(toy.EPOCH + 1, toy.EPOCH + 1))
        assert not asked(toy, *built)

    def test_has_another_name(self, toy, built, key):
        os.rename(built[1] / key, built[1] / key.replace(".png", ".pnh"))  # in the same place of the order
        assert not asked(toy, *built)

    def test_is_new(self, toy, built, key):
        toy.write_file(built[1], key.replace(".png", "+.png"), b"contents")
        assert not asked(toy, *built)

    def test_is_another_one_in_number(self, toy, built, key):
        # As many files as before: the count says nothing.
        os.rename(built[1] / key, built[1] / "b" / "new.png")
        assert not asked(toy, *built)

    def test_moves_to_another_class_with_the_same_key(self, toy, built, key):
        utf8, offsets, sizes, stamps, labels, classes = scanned(toy, built[1])
        i = NAMES.index(key)
        labels[i] = (labels[i] + 1) % 3
        in_quarantine = key in {one.key for one in Dataset.open(built[0]).quarantined}  # has no label there
        assert unchanged(Dataset.open(built[0]), utf8, offsets, sizes, stamps, labels, classes) == in_quarantine


def test_other_classes(toy, built):
    *columns, classes = scanned(toy, built[1])
    assert not unchanged(Dataset.open(built[0]), *columns, [*classes, "d"])


def test_names_that_share_bytes(toy, tmp_path):
    # "ab", "c" and "a", "bc" are the same bytes one after another: the offsets tell them apart.
    source = toy.make_source(tmp_path / "source", ["x/ab", "x/c"])
    toy.build(tmp_path / "dataset", source)
    utf8, offsets, *rest = scanned(toy, source)
    dataset = Dataset.open(tmp_path / "dataset")
    assert unchanged(dataset, utf8, offsets, *rest)
    other = key_columns([b"x/a", b"bx/c"])
    assert not unchanged(dataset, other["key.utf8"], other["key.offsets"], *rest)


def test_names_that_are_no_utf8(toy, tmp_path):
    name = os.fsdecode(b"x/\xff\xe9.png")
    source = toy.make_source(tmp_path / "source", ["x/a.png", name])
    toy.write_file(source, name, b"bad")
    toy.build(tmp_path / "dataset", source)
    assert encode_key(Dataset.open(tmp_path / "dataset").quarantined[0].key) == b"x/\xff\xe9.png"
    assert asked(toy, tmp_path / "dataset", source)
