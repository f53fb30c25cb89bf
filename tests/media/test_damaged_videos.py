"""Videos that cannot be used, and parts of videos: every decoder says what is wrong, and gives no wrong frame."""

import io
import subprocess
import sys

import numpy as np
import pytest
from every_decoder import assert_numbered, decoder_of, ffmpeg, image, tar
from PIL import Image
from toy_videos import damaged, frame_number, make_video, toy_frames

from fastlatent.media.image_error import ImageError
from fastlatent.media.video_error import VideoError

av = pytest.importorskip("av")


BAD = {
    "truncated": "the file is cut off",
    "garbage": "not a video",
    "no-frames": "got none|end of the file",  # the mp4 muxer leaves an empty track away
    "audio-only": "expected a video track, got none, only sound",
}


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".webm"])
@pytest.mark.parametrize("kind", BAD)
def test_bad_files_say_what_is_wrong(decoder, folder, make, suffix, kind):
    sound = folder / f"sound{suffix}"
    sound.write_bytes(make(suffix, frames=60, gop=12)[0])
    data = damaged(sound, folder / f"{kind}{suffix}", kind).read_bytes()
    with pytest.raises(VideoError, match=BAD[kind]) as caught:
        decoder.open(data)
    assert isinstance(caught.value, ImageError) and "\n" not in str(caught.value)


def test_a_cut_file_says_how_many_frames_there_are(decoder, make):
    data, _ = make(".mp4", frames=60)
    with pytest.raises(VideoError, match=r"says 60 frames, \d+ can be read: the file is cut off"):
        decoder.open(data[: len(data) // 2])
    data, _ = make(".webm", frames=60)
    at = data.index(b"\x18\x53\x80\x67") + 4  # the segment's length, of 8 bytes: now unknown, as of a live stream
    unknown = data[:at] + b"\x01" + b"\xff" * 7 + data[at + 8 :]
    assert_numbered(decoder, unknown, count=60)
    with pytest.raises(VideoError, match=r"says 5.000 s, \d+ frames end at 3.\d+ s: the file is cut off"):
        decoder.open(unknown[: len(unknown) * 6 // 10])  # 36 of 60 frames


@pytest.mark.parametrize(
    "data", [b"", b"\0" * 1000, b"#EXTM3U\nhttp://localhost/a.ts\n", b"ffconcat version 1.0\nfile a\n"]
)
def test_what_is_no_video_is_refused(decoder, data):
    with pytest.raises(VideoError, match="not a video"):
        decoder.open(data)


def test_a_cover_picture_is_no_video(decoder, tmp_path):
    path, stream = tmp_path / "a.mp4", io.BytesIO()
    damaged("", tmp_path / "sound.mp4", "audio-only")
    Image.fromarray(toy_frames(1)[0]).save(stream, "JPEG")
    (tmp_path / "cover.jpg").write_bytes(stream.getvalue())
    binary = pytest.importorskip("imageio_ffmpeg").get_ffmpeg_exe()
    inputs = f"-nostdin -v error -i {tmp_path / 'sound.mp4'} -i {tmp_path / 'cover.jpg'}"
    command = [binary, *f"{inputs} -map 0 -map 1 -c copy -disposition:v attached_pic".split()]
    subprocess.run([*command, str(path)], check=True)
    with pytest.raises(VideoError, match="expected a video track, got none, only sound"):
        decoder.open(path.read_bytes())


def test_damage_is_noticed_by_the_frames_that_need_it(make):
    data, _ = make(".mp4", frames=60, gop=12, options={"x264-params": "bframes=0:scenecut=0:sliced-threads=0:mbtree=0"})
    with decoder_of("pyav").open(data) as video:
        whole = video.read(np.arange(60))
        with av.open(io.BytesIO(data)) as container:
            packets = [packet for packet in container.demux(video=0) if packet.size]
    at, size = packets[30].pos, packets[30].size
    hole = data[: at + 5] + bytes(byte ^ 0xFF for byte in data[at + 5 : at + size]) + data[at + size :]
    with decoder_of("pyav").open(hole) as video:
        for sound in (np.arange(24), np.arange(36, 60), np.array([59, 0, 29])):  # other GOPs, and its own before it
            np.testing.assert_array_equal(video.read(sound), whole[sound])
        for number in (30, 35):  # itself, and what is predicted from it
            with pytest.raises(VideoError, match="cannot be decoded|damaged"):
                video.read(np.array([0, number]))
        np.testing.assert_array_equal(video.read(np.array([36])), whole[36:37])  # nothing stays behind


def test_frames_of_another_size_are_refused(decoder, make, tmp_path):
    small = ffmpeg(tmp_path, make(".mp4")[0], ".h264", "-c", "copy")
    large = ffmpeg(tmp_path, make(".mp4", size=(96, 64))[0], ".h264", "-c", "copy")
    with decoder.open(small + large) as video:
        assert video.info.frames == 48
        with pytest.raises(VideoError, match="frame 24: expected 64 x 48 pixels as of the first frame, got 96 x 64"):
            video.read(np.array([2, 24]))
        assert frame_number(video.read(np.array([23]))[0]) == 23


def test_absurd_sizes_are_refused_before_anything_is_decoded(decoder, make, monkeypatch):
    from fastlatent.media import video_error

    monkeypatch.setattr(video_error, "MAX_FRAME_PIXELS", 64 * 48 - 1)
    with pytest.raises(VideoError, match="64 x 48 pixels, more than 3071"):
        decoder.open(make(".mp4")[0])


@pytest.mark.parametrize("indices", [[-1], [24], [[0]]])
def test_frames_that_are_not_there_are_the_callers_mistake(decoder, make, indices):
    with decoder.open(make(".webm")[0]) as video:
        with pytest.raises(ValueError, match="frame numbers .* from 0 to 23") as caught:
            video.read(np.array(indices))
        assert not isinstance(caught.value, VideoError)
        assert video.read(np.array([], np.int32)).shape == (0, 48, 64, 3)


def test_bad_tars_say_what_is_wrong(decoder):
    frames = [image(frame) for frame in toy_frames(2)]
    with pytest.raises(VideoError, match="without a frame"):
        decoder.open(tar([], folder=True))
    with pytest.raises(VideoError, match="a.png: "):
        decoder.open(tar([("a.png", b"no image")]))
    other = image(toy_frames(1, (32, 32))[0])
    with decoder.open(tar([("a.png", frames[0]), ("b.png", b"no image"), ("c.png", other)])) as video:
        assert frame_number(video.read(np.array([0]))[0]) == 0
        with pytest.raises(VideoError, match="b.png: "):
            video.read(np.array([1]))
        with pytest.raises(VideoError, match="c.png: expected 64 x 48 pixels as of the first frame, got 32 x 32"):
            video.read(np.array([2]))
    whole = tar([("a.png", frames[0]), ("b.png", frames[1])])
    with pytest.raises(VideoError, match="cut off|cannot be read"):
        decoder.open(whole[: 512 + 512 * (-(-len(frames[0]) // 512)) + 512 + len(frames[1]) // 2])


FUZZ = """
import sys
import numpy as np
from pathlib import Path
from fastlatent.media.video_decoders import open_video_decoder
from fastlatent.media.video_error import VideoError
decoder, outcomes = open_video_decoder("pyav"), {"frames": 0, "refused": 0}
files = [path.read_bytes() for path in sorted(Path(sys.argv[1]).glob("fuzz.*"))]
for seed in range(int(sys.argv[2])):
    random = np.random.default_rng(seed)
    data = bytearray(files[seed % len(files)])
    # Anywhere, or among the headers in front.
    span = len(data) if seed % 3 else min(len(data), 800)
    for at in random.integers(0, span, random.integers(1, 12)):
        data[at] ^= 1 << random.integers(8)
    try:
        with decoder.open(bytes(data)) as video:
            shape = video.read(np.linspace(0, video.info.frames - 1, 8).astype(int)).shape
            assert shape == (8, video.info.height, video.info.width, 3)
        outcomes["frames"] += 1
    except VideoError as error:
        assert "\\n" not in str(error) and len(str(error)) < 400, error
        outcomes["refused"] += 1
print(outcomes)
"""


@pytest.mark.parametrize("cases", [30, pytest.param(1000, marks=pytest.mark.soak)])
def test_flipped_bits_give_frames_or_an_error_and_never_a_crash(tmp_path, cases):
    make_video(tmp_path / "fuzz.mp4")
    make_video(tmp_path / "fuzz.webm")
    make_video(tmp_path / "fuzz.mkv", codec="mpeg4")
    make_video(tmp_path / "fuzz.h265.mp4", codec="libx265", frames=8)
    command = [sys.executable, "-c", FUZZ, str(tmp_path), str(cases)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20 + cases / 5, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stderr == "" and "'frames': 0" not in done.stdout and "'refused': 0" not in done.stdout
