"""benchmarks/bench_video_decode.py: every provider hands out the same clip."""

from dataclasses import replace

import bench_video_decode as bench
import harness
import numpy as np
import pytest

pytest.importorskip("av")


def test_every_provider_runs_on_a_tiny_video(monkeypatch):
    monkeypatch.setattr(bench, "CLIPS", 2)
    monkeypatch.setitem(bench.VIDEOS, "tiny", ("webm", "libvpx-vp9", (64, 48), 12, 40, 40, {"cpu-used": "8"}))
    case = replace(bench.CASES[1], sizes={**bench.CASES[1].sizes, "video": "tiny"})
    ran = []
    with bench.prepare(case) as prepared:
        assert set(prepared.providers) == set(case.providers) and prepared.bytes == 16 * 64 * 48 * 3
        for name, factory in prepared.providers.items():
            try:
                factory()()
                ran.append(name)
            except harness.Unavailable:
                continue
    assert {"fastlatent-pyav", "decode-all"} <= set(ran)


def test_the_rivals_hand_out_our_frames():
    data = bench.make_video("vp9-427x240")
    indices = np.arange(9, 40, 2)
    ours = bench.by_us(bench.open_video_decoder("pyav"), data, indices)
    np.testing.assert_array_equal(bench.decode_all(data, indices), ours)
    try:
        theirs = bench.by_torchcodec("exact", data, indices)
    except (ImportError, OSError, RuntimeError) as error:
        pytest.skip(f"no torchcodec: {error}")
    np.testing.assert_array_equal(theirs, ours)
