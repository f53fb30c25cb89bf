"""Clips: the right frames, all cut alike, and the same again from what was recorded."""

import io
import json
import tarfile
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import xxhash
from toy_videos import damaged, frame_folder, frame_number, make_video, toy_frames

from fastlatent.media import clips
from fastlatent.media.clips import ClipReader, open_clip_reader
from fastlatent.media.frame_sampling import FrameSampling
from fastlatent.media.transforms import open_transform
from fastlatent.media.video_decoders import open_video_decoder
from fastlatent.media.video_error import VideoError


class ArrayVideo:
    """A video of an array [n, H, W, 3]; `reads` says which frames were asked for."""

    def __init__(self, pixels, fps, reads):
        seconds = None if fps is None else np.arange(len(pixels)) / fps
        self.info = SimpleNamespace(seconds=seconds, frames=len(pixels), height=pixels.shape[1], width=pixels.shape[2])
        self.pixels, self.reads = pixels, reads

    def read(self, indices):
        self.reads.append(np.asarray(indices).tolist())
        return self.pixels[indices]

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.reads.append("closed")


class ArrayDecoder:
    """`open` of a name gives one of these videos."""

    name, rule, device, packages = "pyav", "arrays-1", "cpu", ()

    def __init__(self, videos, fps=12):
        self.videos, self.fps, self.reads, self.opened = videos, fps, [], 0

    def open(self, data):
        self.opened += 1
        return ArrayVideo(self.videos[data], self.fps, self.reads)

    def close(self):
        self.reads.append("decoder closed")


def reader(sampling, transform, size=16, **how):
    videos = {
        b"wide": toy_frames(24, (64, 48)), b"short": toy_frames(5, (64, 48)), b"tall": toy_frames(60, (30, 51)),
        b"noise": np.random.default_rng(0).integers(0, 256, (24, 48, 64, 3), dtype=np.uint8),
    }  # fmt: skip
    return ClipReader(ArrayDecoder(videos), sampling, open_transform(transform, size, **how))


@pytest.mark.parametrize("transform", ["adm", "center", "random", "random-resized", "nwm", "buckets"])
def test_every_frame_is_cut_as_the_first(transform):
    clip_reader = reader(FrameSampling((4,), stride=3, placement="random", views=3, seed=1), transform, seed=5)
    pixels, rule = clip_reader.decoder.videos[b"noise"], clip_reader.transform
    crops = set()
    for view in range(3):
        clip = clip_reader.read(b"noise", "a/b.mp4", view)
        bucket = rule.shape_of(48, 64)
        assert clip.pixels.shape == (4, *rule.shapes[bucket], 3) and clip.pixels.dtype == np.uint8
        assert clip.pixels.flags.c_contiguous and clip.pixels.flags.writeable
        for frame, index in zip(clip.pixels, clip.frame_index, strict=True):
            expected, crop = rule.apply(pixels[index], f"a/b.mp4@{view}", bucket)
            np.testing.assert_array_equal(frame, expected)
            np.testing.assert_array_equal(clip.crop, crop)
        assert clip.frame_index.dtype == np.int32 and clip.crop.dtype == np.int32 and clip.orig_hw == (48, 64)
        assert clip.digest == xxhash.xxh3_64_intdigest(clip.pixels.tobytes())
        crops.add(tuple(clip.crop.tolist()))
    assert (len(crops) > 1) == transform.startswith("random")


def test_one_view_is_cropped_by_the_key_itself():
    clip_reader = reader(FrameSampling((4,)), "random", seed=5)
    crop = clip_reader.read(b"noise", "a").crop
    np.testing.assert_array_equal(crop, clip_reader.transform.plan(48, 64, "a").crop())


@pytest.mark.parametrize(
    ("short", "numbers"), [("repeat", [0, 1, 2, 3, 4, 4, 4, 4]), ("loop", [0, 1, 2, 3, 4, 0, 1, 2])]
)
def test_frames_that_come_again_are_decoded_once(short, numbers):
    clip_reader = reader(FrameSampling((8,), short=short), "center")
    clip = clip_reader.read(b"short", "a")
    assert clip_reader.decoder.reads == [[0, 1, 2, 3, 4], "closed"]
    assert clip.frame_index.tolist() == numbers == [frame_number(frame) for frame in clip.pixels]
    assert clip.pixels.flags.c_contiguous and clip.digest == xxhash.xxh3_64_intdigest(clip.pixels.tobytes())


def test_a_loop_that_repeats_nothing_still_falls():
    # 24 frames, stride 11: 0, 11, 22, then 33 and 44 come round to 9 and 20.
    clip = reader(FrameSampling((5,), stride=11, short="loop"), "center").read(b"wide", "a")
    assert clip.frame_index.tolist() == [0, 11, 22, 9, 20] == [frame_number(frame) for frame in clip.pixels]


def test_too_short_is_said_and_the_video_closed():
    clip_reader = reader(FrameSampling((8,), short="leave-out"), "center")
    with pytest.raises(VideoError, match="too short: 5 frames, a clip of 8 needs 8"):
        clip_reader.read(b"short", "a")
    assert clip_reader.decoder.reads == ["closed"]
    with pytest.raises(ValueError, match="view: expected 0 to 0, got 1"):
        clip_reader.read(b"wide", "a", 1)


def test_buckets_are_lengths_times_shapes():
    clip_reader = reader(FrameSampling((4, 17, 33)), "buckets", 32)
    shapes, sizes = clip_reader.shapes, clip_reader.transform.shapes
    assert len(shapes) == 3 * len(sizes) and shapes[0] == (4, *sizes[0]) and shapes[-1] == (33, *sizes[-1])
    for data, length in ((b"short", 4), (b"wide", 17), (b"tall", 33)):
        shape = shapes[clip_reader.bucket(data)]
        assert shape[0] == length and clip_reader.read(data, "a").pixels.shape == (*shape, 3)
    wide, tall = (shapes[clip_reader.bucket(data)] for data in (b"wide", b"tall"))
    assert wide[1] < wide[2] and tall[1] > tall[2]
    one = reader(FrameSampling((4,)), "center")
    assert one.bucket(b"no video") == 0 and one.decoder.opened == 0
    assert one.shapes == ((4, 16, 16),)


def test_settings_are_json_and_close_closes():
    clip_reader = reader(FrameSampling((4,)), "center")
    written = clip_reader.settings()
    assert json.loads(json.dumps(written)) == written
    assert written["decode"] == "arrays-1" and written["transform"]["size"] == 16
    clip_reader.close()
    assert clip_reader.decoder.reads == ["decoder closed"]


# --- real videos ---


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toys")
    make_video(folder / "a.webm")
    make_video(folder / "turned.mp4", rotation=90)
    uneven = [i / 24 if i < 12 else 0.5 + (i - 12) / 6 for i in range(24)]
    make_video(folder / "uneven.mkv", times=uneven)
    damaged(folder / "turned.mp4", folder / "cut.mp4", "truncated")
    frame_folder(folder / "frames", frames=10)
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        for path in sorted((folder / "frames").iterdir()):
            tar.add(path, path.name)
    (folder / "frames.tar").write_bytes(packed.getvalue())
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.fixture(scope="module")
def pyav():
    decoder = open_video_decoder("pyav", device="cpu", threads=1)
    yield decoder
    decoder.close()


def numbers(clip):
    return [frame_number(frame) for frame in clip.pixels]


def test_frames_of_real_videos(toys, pyav):
    square = open_transform("center", 32)
    for name, sampling, expected in [
        ("a.webm", FrameSampling((8,), stride=2), [*range(4, 20, 2)]),
        ("a.webm", FrameSampling((24,), fps=12, short="leave-out"), [*range(24)]),  # times in milliseconds
        ("a.webm", FrameSampling((6,), fps=4, short="leave-out"), [*range(3, 21, 3)]),
        ("turned.mp4", FrameSampling((4,), placement="uniform"), [3, 9, 15, 21]),
        ("frames.tar", FrameSampling((4,), placement="start", stride=3), [0, 3, 6, 9]),
        ("frames.tar", FrameSampling((12,)), [*range(10), 9, 9]),
        # Four frames a second: 24 a second for half a second, then 6.
        ("uneven.mkv", FrameSampling((8,), fps=4, placement="start"), [0, 6, 12, 13, 15, 16, 18, 19]),
    ]:
        clip = ClipReader(pyav, sampling, square).read(toys[name], name)
        assert numbers(clip) == clip.frame_index.tolist() == expected, name
        assert clip.orig_hw == (48, 64), name


def test_what_is_no_video(toys, pyav):
    clip_reader = ClipReader(pyav, FrameSampling((24,)), open_transform("center", 16))
    for data in (toys["cut.mp4"], b"", b"no video", toys["a.webm"][:40]):
        with pytest.raises(VideoError):
            clip_reader.read(data, "a")
    with pytest.raises(VideoError, match="no times, which fps needs"):
        ClipReader(pyav, FrameSampling((4,), fps=4), clip_reader.transform).read(toys["frames.tar"], "a")


def test_the_same_view_again(toys, pyav):
    """What the student does: from the settings, as JSON, to the teacher's pixels; in threads, in any order."""
    sampling = FrameSampling((6,), stride=2, placement="random", views=3, seed=7)
    first = ClipReader(pyav, sampling, open_transform("random-resized", 16, seed=7))
    jobs = [(name, view) for name in ("a.webm", "turned.mp4", "uneven.mkv", "frames.tar") for view in range(3)]
    made = {job: first.read(toys[job[0]], *job) for job in jobs}
    assert len({clip.digest for clip in made.values()}) == len(jobs)
    again = open_clip_reader(json.loads(json.dumps(first.settings())))
    with ThreadPoolExecutor(4) as pool:
        repeated = pool.map(lambda job: (job, again.read(toys[job[0]], *job)), jobs[::-1])
        for job, clip in repeated:
            np.testing.assert_array_equal(clip.pixels, made[job].pixels)
            np.testing.assert_array_equal(clip.frame_index, made[job].frame_index)
            np.testing.assert_array_equal(clip.crop, made[job].crop)
            assert clip.digest == made[job].digest
    again.close()


def test_refuses_rules_that_it_cannot_follow(pyav, monkeypatch):
    written = ClipReader(pyav, FrameSampling((4,)), open_transform("center", 16)).settings()
    for field, wrong, message in [
        ("sampling", {**written["sampling"], "rule": "slots-0"}, "sampling rule: expected 'slots-1', got 'slots-0'"),
        ("transform", {**written["transform"], "rule": "other"}, "transform: expected a rule among .*got 'other'"),
        ("decode", pyav.rule + "-older", f"decode: expected {pyav.rule!r}, .*got {pyav.rule + '-older'!r}"),
        ("decode", "pyav-1 nvdec", "decode: .* for device cpu, .*with device='cuda' they may"),
    ]:
        with pytest.raises(ValueError, match=message.replace("(", ".").replace(")", ".").replace("+", ".")):
            open_clip_reader({**written, field: wrong})
    with pytest.raises(ValueError, match="view: expected decode, sampling and transform, got decode"):
        open_clip_reader({"decode": pyav.rule})

    def missing(name, **how):
        raise ValueError(f"{name} is not installed")

    monkeypatch.setattr(clips, "open_video_decoder", missing)
    with pytest.raises(ValueError, match="pyav is not installed"):
        open_clip_reader(written)
