import errno
import os
import resource
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
from PIL import Image

from fastlatent.media import videos
from fastlatent.media.videos import FORMATS, open_video, output_digest, output_path, rate, video_info
from fastlatent.store.files import TEMPORARY

EVERY = pytest.mark.parametrize("format", FORMATS)


def clip(frames=9, height=48, width=64, channels=3):
    """Smooth colours that move a pixel a frame: a codec has no excuse."""
    t, y, x = np.mgrid[:frames, :height, :width]
    waves = [128 + 100 * np.sin((x + t) / 17 + channel) * np.cos((y - t) / 13) for channel in range(channels)]
    return np.stack(waves, axis=-1).astype(np.uint8)


def write(path, frames, format="mp4", fps=12, **options):
    _, height, width, channels = frames.shape
    options = {"encoder": "libx264", **options}
    with open_video(path, format=format, fps=fps, height=height, width=width, channels=channels, **options) as writer:
        for start in range(0, len(frames), 4):
            writer.write(frames[start : start + 4])
    assert writer.frames == len(frames)
    return writer


def ffmpeg(*arguments):
    """imageio-ffmpeg's own binary: no code in common with PyAV's libraries at run time."""
    imageio_ffmpeg = pytest.importorskip("imageio_ffmpeg")
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-nostdin", "-threads", "1", *arguments]
    return subprocess.run(command, capture_output=True, check=False)


def read_back(path, height, width):
    # accurate_rnd and full_chroma_int: the reader's own rounding shall not count.
    done = ffmpeg(
        "-i", f"file:{path}", "-vf", "scale=in_color_matrix=bt709:flags=accurate_rnd+full_chroma_int+full_chroma_inp",
        "-fps_mode", "passthrough", "-f", "rawvideo", "-pix_fmt", "rgb24", "-",
    )  # fmt: skip
    return np.frombuffer(done.stdout, np.uint8).reshape(-1, height, width, 3), done.stderr.decode()


def psnr(a, b):
    return 10 * np.log10(255**2 / np.mean((a.astype(float) - b) ** 2))


@pytest.mark.parametrize(("crf", "least"), [(1, 40), (18, 30)])
def test_mp4_is_read_by_another_reader(tmp_path, crf, least):
    frames = clip()
    writer = write(tmp_path / "a.mp4", frames, fps=23.976, crf=crf)
    assert writer.notes == ()
    pixels, text = read_back(tmp_path / "a.mp4", 48, 64)
    assert len(pixels) == 9
    assert psnr(pixels, frames) >= least
    assert "yuv420p(tv, bt709" in text and "64x48" in text and "23.98 fps" in text and "h264 (High)" in text
    data = (tmp_path / "a.mp4").read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")  # a browser shows it before all of it came
    assert b"Lavf" not in data
    assert video_info(tmp_path / "a.mp4") == (9, 64, 48, pytest.approx(24000 / 1001, abs=1e-9))
    assert oct((tmp_path / "a.mp4").stat().st_mode)[-3:] == oct(0o666 & ~umask())[-3:]


def umask():
    old = os.umask(0)
    os.umask(old)
    return old


def test_saturated_colours(tmp_path):
    # The matrix of BT.601 in the writer alone would turn pure green into (0, 255 - 20 …): 15 levels and more.
    bars = np.array([[r, g, b] for r in (16, 235) for g in (16, 235) for b in (16, 235)], dtype=np.uint8)
    frame = np.broadcast_to(bars.repeat(16, axis=0), (32, 128, 3))
    write(tmp_path / "bars.mp4", np.stack([frame] * 3), crf=1)
    pixels, _ = read_back(tmp_path / "bars.mp4", 32, 128)
    centres = pixels[:, 8::16, 8::16].astype(int)
    assert np.abs(centres - bars).max() <= 3, centres[0, 0]


def test_lossless_says_who_cannot_play_it(tmp_path):
    writer = write(tmp_path / "a.mp4", clip(3), crf=0)
    assert "browsers do not play" in writer.notes[0]
    assert psnr(read_back(tmp_path / "a.mp4", 48, 64)[0], clip(3)) >= 40  # chroma is halved all the same


@EVERY
def test_same_frames_same_bytes(tmp_path, format):
    frames = np.random.default_rng(0).integers(0, 256, (6, 40, 56, 3), dtype=np.uint8)
    digests = set()
    for i in range(3):
        write(tmp_path / f"{i}", frames, format)
        digests.add(output_digest(tmp_path / f"{i}"))
    assert len(digests) == 1
    frames = frames.copy()
    frames[3, 5, 5] ^= 128
    write(tmp_path / "other", frames, format)
    assert output_digest(tmp_path / "other") not in digests


@EVERY
@pytest.mark.parametrize("fps", [23.976, 12, 0.5, 120])
def test_counts_sizes_and_durations(tmp_path, format, fps):
    frames = clip(7, 10, 12)
    frames[3] = frames[2]  # writers of animations like to drop a frame that repeats
    path = output_path(tmp_path, "video", format)
    write(path, frames, format, fps)
    count, width, height, found = video_info(path)
    assert (count, width, height) == (7, 12, 10)
    if format == "png-frames":
        assert found is None
        return
    step = {"mp4": 0, "gif": 0.01, "webp": 0.001}[format]  # of the whole duration, not of each delay
    assert 7 / found == pytest.approx(7 / float(rate(fps)), abs=step / 2 + 1e-9)
    if format != "mp4":
        with Image.open(path) as image:
            assert image.n_frames == 7 and image.info["loop"] == 0


@EVERY
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("height", "width"), [(1, 1), (31, 33), (32, 33)])  # the least; both odd; one odd
def test_one_frame_of_any_size(tmp_path, format, channels, height, width):
    frames = clip(1, height, width, channels)
    path = tmp_path / "one"
    writer = write(path, frames, format, crf=1)
    even = (height + height % 2, width + width % 2) if format == "mp4" else (height, width)
    assert video_info(path)[:3] == (1, even[1], even[0])
    if format == "mp4":
        assert writer.notes == (f"padded from {width}×{height} to {even[1]}×{even[0]} for yuv420p",)
        assert video_info(path)[3] == 12
        pixels = read_back(path, *even)[0][0]
        # The row that was added is its neighbour's again, so no dark edge bleeds in through the chroma.
        source = np.broadcast_to(frames[0], (height, width, 3)).astype(float)
        np.testing.assert_allclose(pixels[:height, :width].astype(float), source, atol=12)
        np.testing.assert_allclose(pixels[-1].astype(float), pixels[height - 1], atol=12)
        return
    assert writer.notes == ()
    file = path / "000000.png" if format == "png-frames" else path
    with Image.open(file) as image:
        found = np.asarray(image.convert("RGB")).astype(float)
    # libwebp halves the chroma; a GIF of three channels is dithered.
    close = {"webp": 25, "gif": 40 if channels == 3 else 0, "png-frames": 0}[format]
    np.testing.assert_allclose(found, np.broadcast_to(frames[0], found.shape), atol=close)


def test_gif_and_webp_show_the_frames(tmp_path):
    frames = clip(5)
    for format, least in (("gif", 25), ("webp", 35)):
        write(tmp_path / format, frames, format)
        with Image.open(tmp_path / format) as image:
            for i, frame in enumerate(frames):
                image.seek(i)
                assert psnr(np.asarray(image.convert("RGB")), frame) >= least, (format, i)


@EVERY
def test_scaled_to_even_sizes(tmp_path, format):
    writer = write(tmp_path / "half", clip(2, 50, 67), format, scale=0.5)
    assert video_info(tmp_path / "half")[1:3] == (34, 24)  # 33.5 and 25: to the nearest even number, 24.98 / 2 = 12.5
    assert writer.notes == ("scaled from 67×50 to 34×24",)


def test_rates():
    assert rate(23.976) == rate(23.98) == rate(24000 / 1001) == Fraction(24000, 1001)
    assert (rate(29.97), rate(24), rate(0.5), rate(12.5)) == (
        Fraction(30000, 1001),
        24,
        Fraction(1, 2),
        Fraction(25, 2),
    )
    for bad in (0, -1, float("nan"), float("inf"), 1001):
        with pytest.raises(ValueError, match="fps: expected 0.01 to 1000"):
            rate(bad)


def test_fast_gifs_are_noted(tmp_path):
    assert "below 0.02 s" in write(tmp_path / "a.gif", clip(2), "gif", 120).notes[0]


@EVERY
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_exception_leaves_what_was_there(tmp_path, format, error):
    path = tmp_path / "video"
    write(path, clip(2), format)
    before = output_digest(path)
    with pytest.raises(error), open_video(path, format=format, fps=12, height=48, width=64) as writer:
        writer.write(clip(2) // 2)
        raise error
    assert output_digest(path) == before
    assert os.listdir(tmp_path) == ["video"]
    write(path, clip(3), format)  # and a whole one replaces it
    assert video_info(path)[0] == 3
    assert os.listdir(tmp_path) == ["video"]


@EVERY
def test_no_frames(tmp_path, format):
    with (
        pytest.raises(ValueError, match="at least one frame"),
        open_video(tmp_path / "video", format=format, fps=12, height=8, width=8) as writer,
    ):
        writer.write(np.zeros((0, 8, 8, 3), np.uint8))
    assert os.listdir(tmp_path) == []


@EVERY
@pytest.mark.parametrize("share", [0.3, 0.97])  # in the middle, and (mp4) while the index is moved to the front
def test_a_full_disk_leaves_nothing(tmp_path, format, share):
    # A small file system needs rights that a test has not; a limit of the size of files fails in the same system
    # call, with EFBIG for ENOSPC, deep in FFmpeg too. It is the process's: the soft limit is put back.
    frames = np.random.default_rng(0).integers(0, 256, (12, 64, 64, 3), dtype=np.uint8)
    write(tmp_path / "video", frames, format)
    whole = tmp_path / "video"
    size = (whole / "000000.png" if whole.is_dir() else whole).stat().st_size
    before = output_digest(whole)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(size * share), hard))
    try:
        with pytest.raises(OSError, match="while writing .*video: what was there is kept") as caught:
            write(whole, frames, format)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.errno in (errno.EFBIG, errno.EIO)
    assert os.listdir(tmp_path) == ["video"]
    assert output_digest(whole) == before


@EVERY
def test_file_names(tmp_path, format):
    for name in ("a, b", "[0-9]*%03d", "x:y", "Ünï–🎞", "-i", "100% #1?", "q" * 240):
        folder = tmp_path / f"in:{name}"
        path = output_path(folder, name, format)
        write(path, clip(1, 4, 4), format)
        assert os.listdir(folder) == [path.name] and video_info(path)[0] == 1


def test_names_that_are_paths():
    with pytest.raises(ValueError, match="expected the name of a file"):
        output_path(videos.Path("x"), "../y", "mp4")
    with pytest.raises(ValueError, match="format: expected one of mp4, gif"):
        output_path(videos.Path("x"), "y", "avi")


def test_frames_replace_frames_only(tmp_path):
    path = tmp_path / "step_000"
    write(path, clip(5), "png-frames")
    write(path, clip(3), "png-frames")
    assert sorted(os.listdir(path)) == ["000000.png", "000001.png", "000002.png"]
    with Image.open(path / "000002.png") as image:
        np.testing.assert_array_equal(np.asarray(image), clip(3)[2])
    (path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"notes\.txt"):
        write(path, clip(3), "png-frames")
    (path / "000001.png").unlink()
    with pytest.raises(ValueError, match="expected 000000.png and what follows"):
        video_info(path)
    with pytest.raises(ValueError, match="expected a file to replace"):
        write(path, clip(1), "mp4")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fps": float("nan")}, "fps"),
        ({"fps": 0}, "fps"),
        ({"crf": 52}, "crf: expected 0 to 51"),
        ({"scale": 0.0}, "scale"),
        ({"scale": float("nan")}, "scale"),
        ({"height": 0}, "height and width"),
        ({"channels": 4}, "channels"),
        ({"format": "avi"}, "format"),
        ({"encoder": "x265"}, "encoder"),
        ({"width": 20000}, "at most 16384"),
        ({"format": "webp", "height": 16384}, "at most 16383"),
    ],
)
def test_bad_arguments(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        open_video(tmp_path / "a", **{"format": "mp4", "fps": 12, "height": 8, "width": 8, **options})
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("frames", [clip(1, 8, 9), clip(1, 9, 8, 1), clip(1, 9, 8).astype(float), clip(1, 9, 8)[0]])
def test_bad_frames(tmp_path, frames):
    with (
        pytest.raises(ValueError, match=r"expected uint8 \[n, 9, 8, 3\]"),
        open_video(tmp_path / "a.gif", format="gif", fps=12, height=9, width=8) as writer,
    ):
        writer.write(frames)
    assert os.listdir(tmp_path) == []


@EVERY
def test_damaged_videos(tmp_path, format):
    if format == "png-frames":
        return  # test_frames_replace_frames_only
    path = tmp_path / "video"
    write(path, clip(4), format)
    data = path.read_bytes()
    for size in (0, 5, 40, len(data) // 2, len(data) - 200):
        path.write_bytes(data[:size])
        with pytest.raises(ValueError, match=str(path)):
            video_info(path)


def test_without_pyav_and_without_an_encoder(tmp_path, monkeypatch):
    arguments = {"fps": 12, "height": 8, "width": 8}
    videos._opens.cache_clear()
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "av", None)
        with pytest.raises(ValueError, match=r"pip install 'fastlatent\[video\]'"):
            open_video(tmp_path / "a.mp4", format="mp4", **arguments)
        write(tmp_path / "a.gif", clip(1), "gif")
        assert video_info(tmp_path / "a.gif")[0] == 1
    monkeypatch.setattr(videos, "_opens", lambda encoder, height, width: False)
    with pytest.raises(ValueError, match="no libx264 .*pip install av, or choose --format webp"):
        open_video(tmp_path / "a.mp4", format="mp4", **arguments)
    with pytest.raises(ValueError, match="h264_nvenc cannot encode"):
        open_video(tmp_path / "a.mp4", format="mp4", encoder="h264_nvenc", **arguments)


def test_unfinished_files_are_named_as_the_store_names_them():
    assert videos.TEMPORARY == TEMPORARY


def test_importing_costs_no_torch_and_no_pyav():
    code = "import sys, fastlatent.media.videos; print([m for m in ('torch', 'av') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.soak
def test_x264_repeats_its_bytes(tmp_path):
    # With mbtree, x264 gave other bits in 1 of 10 runs of this moving noise.
    noise = np.random.default_rng(0).integers(0, 256, (240, 496, 3), dtype=np.uint8)
    frames = np.stack([noise[:, 2 * i : 2 * i + 416] for i in range(40)])
    digests = set()
    for _ in range(40):
        write(tmp_path / "a.mp4", frames)
        digests.add(output_digest(tmp_path / "a.mp4"))
    assert len(digests) == 1
