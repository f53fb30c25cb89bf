import importlib.util
from pathlib import Path

import pytest

spec = importlib.util.spec_from_file_location("store_toy", Path(__file__).with_name("toy.py"))
assert spec is not None and spec.loader is not None
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)

KEYS = ["ant/1.jpg", "ant/2.jpg", "bee/1.jpg", "bee/2.jpg", "cat/1.jpg"]  # units of 2: the last one is short


@pytest.fixture(scope="session")
def toy():
    return module


@pytest.fixture
def source(tmp_path):
    return module.make_source(tmp_path / "source", KEYS)


@pytest.fixture
def dataset(tmp_path, source):
    """Generation 2: one file edited, one that cannot be decoded added, one removed."""
    path = tmp_path / "dataset"
    module.build(path, source)
    change(source)
    module.build(path, source)
    return path


def change(source: Path) -> None:
    module.write_file(source, "bee/2.jpg", b"edited", 1)
    module.write_file(source, "ant/bad.jpg", b"bad bytes")
    module.write_file(source, "aardvark/0.jpg", b"a class in front of all others")
    (source / "ant/2.jpg").unlink()


@pytest.fixture(name="change", scope="session")
def change_fixture():
    return change
