"""Every format → a dataset → the same format, through the command line; and killed at random in both directions."""

import random
import shutil
from pathlib import Path

import pytest
from toy_caches import MAKERS, arrays, differences

# Relative: edm2 has std where a dataset has log-variance; two divide by a factor, in float32.
ROUNDING = {"edm2": 2e-6, "fast-dit": 2**-23, "frames": 2**-23}


def tree(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in (".lock", "convert.yaml")
    }


def ok(forked, tmp_path, *lines):
    codes = forked(*({"argv": [str(word) for word in words]} for words in lines))
    logs = sorted(tmp_path.glob("log-*.txt"), key=lambda path: path.stat().st_mtime_ns)
    assert codes == [[0]] * len(lines), logs[-1].read_text()


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("kills", [1, pytest.param(20, marks=pytest.mark.soak)])
def test_every_array_comes_back_and_kills_change_no_byte(forked, tmp_path, name, kills):
    make, said = MAKERS[name]
    cache, made, back = (tmp_path / one for one in ("cache", "dataset", "back"))
    make(cache)
    into = ["convert", str(cache), "--out", str(made), "--unit-rows", "4", *said]
    out = ["convert", str(made), "--to", name, "--out", str(back), "--unit-rows", "4"]
    ok(forked, tmp_path, into, out)
    before, after = arrays(cache), arrays(back)
    for statistics in [one for one in before if one.startswith("latents_stats.pt")]:  # the cache's were not its rows'
        assert after.pop(statistics).shape == before.pop(statistics).shape
    assert differences(before, after, ROUNDING.get(name, 0.0)) == []
    draw = random.Random(f"{name} {kills}")
    for argv, result in ((into, made), (out, back)):
        undisturbed = tree(result)
        shutil.rmtree(result)
        forked(*({"argv": argv, "kill_after": [draw.uniform(0.01, 0.15)]} for _ in range(kills)))
        ok(forked, tmp_path, argv)
        assert tree(result) == undisturbed
