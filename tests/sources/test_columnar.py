import pickle

import numpy as np
import pytest

from fastlatent.sources.columnar import ItemTable, Keys
from fastlatent.sources.image_folder import scan_image_folder


class TestItems:
    @pytest.fixture
    def items(self, tmp_path):
        for i in range(5):
            (tmp_path / f"{i}.png").touch()
        return scan_image_folder(tmp_path).items

    def test_are_a_sequence(self, items, monkeypatch):
        monkeypatch.setattr("fastlatent.sources.columnar.BLOCK", 2)  # 2, 2 and 1
        every = list(items)
        assert [item.key for item in every] == [f"{i}.png" for i in range(5)]
        assert [items[i] for i in range(5)] == [items[i - 5] for i in range(5)] == every
        for cut in (slice(1, 3), slice(None, None, 2), slice(4, 1), slice(-2, 9), slice(None, None, -1)):
            assert items[cut] == every[cut]
        for i in (5, -6):
            with pytest.raises(IndexError):
                items[i]

    def test_are_found_by_key(self, items):
        assert [items.find(f"{i}.png") for i in range(5)] == [0, 1, 2, 3, 4]
        assert [items.find(key) for key in ("", "0.pn", "0.png0", "z", "9.png")] == [-1] * 5

    def test_go_to_other_processes(self, tmp_path):
        (tmp_path / "1.png").touch()
        source = scan_image_folder(tmp_path)
        items, read = pickle.loads(pickle.dumps((source.items, source.read)))
        assert list(items) == list(source.items) and read(items[0]) == b""

    def test_columns(self, items):
        assert isinstance(items, ItemTable)
        dtypes = [one.dtype for one in (items.keys.offsets, items.keys.utf8, items.size, items.stamp, items.label)]
        assert dtypes == [np.dtype(one) for one in ("<u8", "u1", "<u8", "<i8", "<i8")]  # those of a dataset's index


def test_endings():
    names = [b"a", b"png", b"x.png", b"x.PnG", b"x.png0", b"[.PNG", b"x.pn\x87", b"long/name.jpeg", b"y.caption"]
    found = Keys.of(names).ending((".png", ".jpeg", ".caption"))
    assert [name for name, one in zip(names, found, strict=True) if one] == [names[i] for i in (2, 3, 5, 7, 8)]
    assert Keys.of([]).ending((".png",)).tolist() == []
