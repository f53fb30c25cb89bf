"""Frames are chosen by whole numbers: every formula is recomputed here with fractions."""

import json
from fractions import Fraction
from math import floor
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastlatent.media.frame_sampling import PLACEMENTS, SHORT, FrameSampling
from fastlatent.media.video_error import VideoError


def video(frames, fps=None, times=None):
    """A folder of frames, a video of a constant rate, or one of these times."""
    seconds = times if fps is None else np.arange(frames) / fps
    return SimpleNamespace(frames=frames, seconds=None if seconds is None else np.float64(seconds), height=4, width=6)


def milliseconds(seconds, how=np.round):
    return how(np.asarray(seconds) * 1000) / 1000


def chosen(frames, info, view=0, key="a", **how):
    frames = frames if isinstance(frames, tuple) else (frames,)
    got = FrameSampling(frames, **how).indices(info, key, view)
    assert got.dtype == np.int32 and got.ndim == 1
    return got.tolist()


# --- the index grid ---


def test_placements_by_hand():
    ten = video(10)
    assert chosen(4, ten, placement="start") == [0, 1, 2, 3]
    assert chosen(4, ten, placement="start", stride=3) == [0, 3, 6, 9]  # the span is all ten
    assert chosen(4, ten) == [3, 4, 5, 6]  # room 6, half of it 3
    assert chosen(4, video(11), stride=2) == [2, 4, 6, 8]  # room 4
    assert chosen(4, video(10), stride=2) == [1, 3, 5, 7]  # room 3: floor
    assert [chosen(4, ten, view, views=3)[0] for view in range(3)] == [0, 3, 6]
    assert [chosen(4, video(11), view, views=3)[0] for view in range(3)] == [0, 3, 7]  # room 7: floor(3.5)
    assert chosen(4, ten, placement="uniform") == [1, 3, 6, 8]  # middles of 2.5: 1.25, 3.75, 6.25, 8.75
    # Each half of 2.5 has its middle at 0.625 and 1.875.
    assert chosen(4, ten, 0, placement="uniform", views=2) == [0, 3, 5, 8]
    assert chosen(4, ten, 1, placement="uniform", views=2) == [1, 4, 6, 9]
    assert chosen(10, ten, placement="uniform") == list(range(10))


def test_short_videos_by_hand():
    for placement in PLACEMENTS:
        assert chosen(6, video(4), placement=placement) == [0, 1, 2, 3, 3, 3]
        assert chosen(6, video(4), placement=placement, short="loop") == [0, 1, 2, 3, 0, 1]
        with pytest.raises(VideoError, match="too short: 4 frames, a clip of 6 needs 6"):
            chosen(6, video(4), placement=placement, short="leave-out")
        assert chosen(5, video(1), placement=placement) == [0] * 5
        assert chosen(5, video(1), placement=placement, short="loop") == [0] * 5
        assert chosen(1, video(1), placement=placement, short="leave-out") == [0]
    # 5 of 6 slots of the span are there; the last slot that is repeated is the video's last frame.
    assert chosen(4, video(8), stride=3) == [0, 3, 6, 7]
    assert chosen(4, video(8), stride=3, short="loop") == [0, 3, 6, 1]
    with pytest.raises(VideoError, match="too short: 8 frames, a clip of 4 needs 10"):
        chosen(4, video(8), stride=3, short="leave-out")


def test_the_longest_length_that_is_filled():
    sampling = FrameSampling((17, 33, 61), placement="start")
    lengths = [sampling.length(video(n)) for n in (1, 16, 17, 32, 33, 60, 61, 1000)]
    assert lengths == [0, 0, 0, 0, 1, 1, 2, 2]
    assert [len(sampling.indices(video(n), "a")) for n in (16, 33, 61)] == [17, 33, 61]
    strided = FrameSampling((17, 33), stride=2)
    assert [strided.length(video(n)) for n in (64, 65)] == [0, 1]  # (33 - 1) 2 + 1 = 65
    spread = FrameSampling((17, 33), placement="uniform")
    assert [spread.length(video(n)) for n in (32, 33)] == [0, 1]


RANDOM_STARTS = [80, 8, 67, 32]


def test_random_starts_are_of_seed_key_and_view_alone():
    sampling = FrameSampling((16,), stride=2, placement="random", views=2, seed=3)
    info, keys = video(34), [f"{i}.webm" for i in range(3000)]  # room 3: four starts
    starts = [[int(sampling.indices(info, key, view)[0]) for key in keys] for view in (0, 1)]
    again = [int(sampling.indices(info, key, 0)[0]) for key in reversed(keys)]
    assert again[::-1] == starts[0]
    slack = 5 * np.sqrt(3000 * 0.25 * 0.75)
    assert abs(np.bincount(starts[0], minlength=4) - 750).max() < slack and max(starts[0]) == 3
    other = FrameSampling((16,), stride=2, placement="random", seed=4)
    for independent in (starts[1], [int(other.indices(info, key)[0]) for key in keys]):
        assert abs(sum(a == b for a, b in zip(starts[0], independent, strict=True)) - 750) < slack
    sampling.indices(info, "name\udcff.webm", 1)  # bytes that are no UTF-8
    # Written down: they must be the same everywhere and for ever.
    fixed = [FrameSampling((16,), placement="random", views=2, seed=s) for s in (0, 2**64 - 1)]
    assert [int(s.indices(video(100), "78687", view)[0]) for s in fixed for view in (0, 1)] == RANDOM_STARTS


RULES = st.builds(
    lambda frames, stride, placement, views, short, seed: FrameSampling(
        tuple(sorted(frames)),
        stride=1 if placement == "uniform" else stride,
        placement=placement,
        views=1 if placement == "start" else views,
        short=short,
        seed=seed,
    ),
    st.sets(st.integers(1, 40), min_size=1, max_size=3),
    st.integers(1, 9),
    st.sampled_from(PLACEMENTS),
    st.integers(1, 5),
    st.sampled_from(SHORT),
    st.integers(0, 2**64 - 1),
)


def reference(sampling, n, key, view):
    """Of SAMPLING_RULE on n frames, but for where "random" begins."""
    uniform = sampling.placement == "uniform"
    spans = {t: t if uniform else (t - 1) * sampling.stride + 1 for t in sampling.frames}
    t = max((t for t in spans if spans[t] <= n), default=None)
    if t is None:
        t = sampling.frames[0]
        slots = [i * sampling.stride for i in range(t)]
        return [g % n if sampling.short == "loop" else min(g, n - 1) for g in slots]
    if uniform:
        segment = Fraction(n, t)
        return [floor(i * segment + segment / sampling.views * (view + Fraction(1, 2))) for i in range(t)]
    room = n - spans[t]
    start = {
        "start": 0,
        "center": floor(Fraction(room, 2) if sampling.views == 1 else Fraction(room * view, sampling.views - 1)),
        "random": sampling.indices(video(n), key, view)[0],
    }[sampling.placement]
    assert 0 <= start <= room
    return [start + i * sampling.stride for i in range(t)]


@settings(max_examples=150, deadline=None)
@given(RULES, st.integers(1, 200), st.text(max_size=8), st.sampled_from([7, 12, 24, Fraction(30000, 1001), 60]))
def test_any_rule(sampling, n, key, fps):
    by_number = video(n)
    try:
        sampling.length(by_number)
    except VideoError as error:
        needed = (
            sampling.frames[0] if sampling.placement == "uniform" else (sampling.frames[0] - 1) * sampling.stride + 1
        )
        assert (
            sampling.short == "leave-out" and needed > n and f"{n} frames" in str(error) and str(needed) in str(error)
        )
        return
    views = [sampling.indices(by_number, key, view) for view in range(sampling.views)]
    for view, got in enumerate(views):
        assert got.tolist() == reference(sampling, n, key, view)
        assert len(got) == sampling.frames[sampling.length(by_number)] and got.min() >= 0 and got.max() < n
        assert sampling.short == "loop" or (np.diff(got) >= 0).all()
        # Times of a constant rate, exact or in milliseconds as Matroska has them, change nothing.
        exact = np.array([float(i / Fraction(fps)) for i in range(n)])
        for seconds in (exact, milliseconds(exact), milliseconds(exact, np.floor)):
            np.testing.assert_array_equal(sampling.indices(video(n, times=seconds), key, view), got)
            if n > 1 and sampling.placement != "uniform":  # nor does naming that rate
                timed = FrameSampling(**{**vars(sampling), "fps": float(fps)})
                np.testing.assert_array_equal(timed.indices(video(n, times=seconds), key, view), got)
    length = len(views[0])
    if sampling.placement == "center" and n - ((length - 1) * sampling.stride + 1) >= sampling.views - 1:
        assert len({tuple(v) for v in views}) == sampling.views
    if sampling.placement == "uniform" and n >= sampling.views * length:
        assert len({int(i) for v in views for i in v}) == sampling.views * length  # no frame twice


# --- the time grid ---


def test_fps_takes_the_frame_that_is_shown():
    thirty = video(90, fps=30)  # 3 s
    assert chosen(4, thirty, fps=10, placement="start") == [0, 3, 6, 9]
    assert chosen(4, thirty, fps=10, stride=2, placement="start") == [0, 6, 12, 18]
    assert chosen(5, thirty, fps=12, placement="start") == [0, 2, 5, 7, 10]  # 2.5 frames apart: the last one begun
    assert chosen(5, thirty, fps=60, placement="start") == [0, 0, 1, 1, 2]
    assert chosen(16, thirty, fps=10)[0] == 21  # 30 slots: begins at slot 7
    assert chosen(5, video(90, fps=29.97), fps=29.97, placement="start") == [0, 1, 2, 3, 4]
    # 12 of the 16 slots at 4 a second are there, the last at 2.75 s.
    assert chosen(16, thirty, fps=4) == [*np.arange(12) * 30 // 4, *[82] * 4]
    assert chosen(14, thirty, fps=4, short="loop") == [*np.arange(12) * 30 // 4, 0, 7]
    with pytest.raises(VideoError, match="too short: 12 frames at 4 a second, a clip of 16 needs 16"):
        chosen(16, thirty, fps=4, short="leave-out")


@pytest.mark.parametrize("how", [np.round, np.floor, np.ceil])
@pytest.mark.parametrize("fps", [12, 24, 25, Fraction(24000, 1001), 30, 60, 120])
def test_milliseconds_hide_no_frame(fps, how):
    """SSv2 is WebM: frame 2 of 12 a second says 0.167, which is later than 2/12."""
    exact = np.array([float(i / Fraction(fps)) for i in range(500)])
    for n in (2, 3, 23, 24, 500):
        info = video(n, times=milliseconds(exact[:n], how))
        assert chosen(n, info, fps=float(fps), short="leave-out") == list(range(n))
        with pytest.raises(VideoError, match=f"too short: {n} frames"):
            chosen(n + 1, info, fps=float(fps), short="leave-out")


def test_variable_rate_goes_by_time():
    # Half a second at 24 a second, then half a second at 8: 16 frames in 1 s, 16 a second on average.
    times = np.concatenate([np.arange(12) / 24, 0.5 + np.arange(4) / 8])
    info = video(16, times=times)
    # (16 - 1) / 0.875 = 17.14 slots a second, of which 16 lie before the end.
    expected = [max(i for i in range(16) if times[i] <= g * 0.875 / 15 + 1e-3) for g in range(16)]
    assert chosen(16, info, placement="start") == expected == [0, 1, 2, 4, 5, 7, 8, 9, 11, 12, 12, 13, 13, 14, 14, 15]
    assert chosen(4, info, placement="uniform") == [expected[2], expected[6], expected[10], expected[14]]
    assert chosen(4, info, fps=4, placement="start") == [0, 6, 12, 14]
    assert chosen(4, info, placement="start", stride=2) == expected[:8:2]
    assert chosen(17, info, short="loop") == [*expected, 0]


def test_how_uneven_counts_as_variable():
    rng = np.random.default_rng(0)
    even = np.arange(64) / 30
    jitter = rng.uniform(-1, 1, 64) * 0.2 / 30  # a fifth of an interval
    jitter[[0, -1]] = 0
    assert chosen(64, video(64, times=even + jitter)) == list(range(64))
    gap = np.where(np.arange(64) < 32, even, even + 1 / 30)  # one frame was dropped in the middle
    shown = chosen(64, video(64, times=gap))
    assert shown != list(range(64)) and max(np.bincount(shown)) == 2
    late = np.where(np.arange(64) < 32, even, even + 1.0)  # the picture stood still for a second
    assert np.bincount(chosen(64, video(64, times=late)))[31] > 15


def test_times_begin_anywhere_and_one_frame_has_no_rate():
    times = np.concatenate([np.arange(12) / 24, 0.5 + np.arange(4) / 8])
    assert chosen(9, video(16, times=times + 5.5)) == chosen(9, video(16, times=times))
    assert chosen(3, video(1, times=[0.0]), fps=4) == [0, 0, 0]
    assert chosen(3, video(2, times=[0.0, 10.0]), fps=4, placement="start") == [0, 0, 0]  # the first stays for 10 s
    assert len(chosen(79, video(2, times=[0.0, 10.0]), fps=4, short="leave-out")) == 79


@pytest.mark.parametrize(("last", "fps"), [(2.0, 1e308), (1e300, 12.0), (1e300, 1e300)])
def test_absurd_times_and_rates_cost_one_video(last, fps):
    with pytest.raises(VideoError, match=r"slots at .* a second, more than 9.01e\+15"):
        chosen(4, video(3, times=[0.0, 1.0, last]), fps=fps)


def test_fps_needs_times():
    with pytest.raises(VideoError, match="a folder of frames has no times, which fps needs"):
        chosen(4, video(10), fps=4)
    with pytest.raises(VideoError, match="10 frames with the same time"):
        chosen(4, video(10, times=np.zeros(10)), fps=4)
    assert chosen(4, video(10, times=np.zeros(10)), placement="start") == [0, 1, 2, 3]


# --- settings ---


@settings(max_examples=50, deadline=None)
@given(RULES, st.sampled_from([None, 4.0, 29.97]))
def test_settings_and_back(sampling, fps):
    if sampling.placement != "uniform":
        sampling = FrameSampling(**{**vars(sampling), "fps": fps})
    written = json.loads(json.dumps(sampling.settings()))
    back = FrameSampling.from_settings(written)
    assert back.settings() == written == sampling.settings()
    assert ("seed" in written) == (sampling.placement == "random")
    if sampling.placement == "random":
        assert back == sampling


def test_everything_that_changes_frames_is_in_the_settings():
    plain = FrameSampling((16,), placement="random")
    others = [
        {"frames": (16, 32)}, {"stride": 2}, {"placement": "center"}, {"views": 2}, {"fps": 4.0}, {"short": "loop"},
        {"seed": 1},
    ]  # fmt: skip
    written = [FrameSampling(**{**vars(plain), **other}).settings() for other in [{}, *others]]
    assert len({json.dumps(each) for each in written}) == len(written)
    assert FrameSampling((16,), seed=1).settings() == FrameSampling((16,)).settings()  # nothing is drawn


def test_refuses_other_rules_and_fields():
    written = FrameSampling((16,)).settings()
    with pytest.raises(ValueError, match="sampling rule: expected 'slots-1', got 'slots-2'"):
        FrameSampling.from_settings({**written, "rule": "slots-2"})
    with pytest.raises(ValueError, match="sampling rule: expected 'slots-1', got None"):
        FrameSampling.from_settings({})
    incomplete = {name: value for name, value in written.items() if name != "stride"}
    for wrong in ({**written, "jitter": 1}, incomplete, {"rule": "slots-1"}, {**written, "frames": 16}):
        with pytest.raises(ValueError, match="sampling: expected settings as of slots-1, got"):
            FrameSampling.from_settings(wrong)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"frames": ()}, "frames: expected numbers of frames from 1 that rise, got none"),
        ({"frames": (0, 16)}, "that rise, got 0, 16"),
        ({"frames": (16, 16)}, "that rise, got 16, 16"),
        ({"stride": 0}, "stride: expected at least 1, got 0"),
        ({"views": 0}, "views: expected at least 1, got 0"),
        ({"placement": "middle"}, "placement: expected one of start, center, random, uniform, got 'middle'"),
        ({"short": "pad"}, "short: expected one of repeat, loop, leave-out, got 'pad'"),
        ({"fps": 0.0}, "fps: expected more than 0 frames a second, got 0.0"),
        ({"fps": float("nan")}, "fps: expected more than 0 frames a second, got nan"),
        ({"seed": 2**64}, r"seed: expected 0 to 2\^64 - 1"),
        ({"placement": "uniform", "stride": 2}, "expected stride 1 and no fps, got stride 2 and fps None"),
        ({"placement": "uniform", "fps": 4.0}, "expected stride 1 and no fps, got stride 1 and fps 4.0"),
        ({"placement": "start", "views": 2}, "placement start: expected 1 view, got 2"),
    ],
)
def test_refuses_settings(how, message):
    with pytest.raises(ValueError, match=message):
        FrameSampling(**{"frames": (16,), **how})


def test_refuses_views_that_are_not():
    for view in (-1, 2):
        with pytest.raises(ValueError, match=f"view: expected 0 to 1, got {view}"):
            FrameSampling((4,), views=2).indices(video(9), "a", view)
    assert [FrameSampling((4,), views=2).clip_key("a", 1), FrameSampling((4,)).clip_key("a", 0)] == ["a@1", "a"]
