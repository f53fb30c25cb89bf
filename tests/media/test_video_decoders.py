import io
import subprocess
import sys
import tarfile
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import toy_videos
from PIL import Image
from toy_videos import damaged, frame_number, make_video, toy_frames

from fastlatent.media import video_decoders
from fastlatent.media.image_error import ImageError
from fastlatent.media.video_decoders import NAMES, choose_video_decoder, open_video_decoder, video_decoder_of
from fastlatent.media.video_error import VideoError

av = pytest.importorskip("av")


@lru_cache
def decoder_of(name):
    try:
        return open_video_decoder(name, threads=2)
    except ValueError as error:
        return str(error)


@pytest.fixture(params=NAMES)
def decoder(request):
    found = decoder_of(request.param)
    return pytest.skip(found) if isinstance(found, str) else found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("videos")


@pytest.fixture(scope="module")
def make(folder):
    """(the file's bytes, the frames that went in), made once a module."""
    made = {}

    def make(suffix, **options):
        key = f"{suffix} {sorted(options.items())}"
        if key not in made:
            path = folder / f"{len(made)}{suffix}"
            made[key] = (make_video(path, **options), path.read_bytes())
        return made[key][::-1]

    return make


def ffmpeg(folder, data, suffix, *arguments):
    """data → another file, by imageio-ffmpeg's own binary."""
    imageio_ffmpeg = pytest.importorskip("imageio_ffmpeg")
    source, target = folder / "ffmpeg-in", folder / f"ffmpeg-out{suffix}"
    source.write_bytes(data)
    before = arguments[: arguments.index("-i")] if "-i" in arguments else ()
    after = arguments[len(before) + bool(before) :]
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-y", "-nostdin", "-v", "error", "-threads", "1", *before]
    done = subprocess.run([*command, "-i", source, *after, target], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    return target.read_bytes()


def psnr(a, b):
    return 10 * np.log10(255**2 / max(np.mean((a.astype(float) - b) ** 2), 1e-9))


def assert_numbered(decoder, data, first=0, count=24, seed=0):
    """Every frame is the one of its number, read alone, together, in any order and after anything."""
    with decoder.open(data) as video:
        assert video.info.frames == count
        whole = video.read(np.arange(count))
        assert whole.dtype == np.uint8 and whole.flags.c_contiguous
        assert whole.shape == (count, video.info.height, video.info.width, 3)
        assert [frame_number(frame) for frame in whole] == list(range(first, first + count))
        if video.info.seconds is not None:
            assert video.info.seconds.dtype == np.float64 and video.info.seconds.shape == (count,)
            assert video.info.seconds[0] == 0 and (np.diff(video.info.seconds) > 0).all()
        random = np.random.default_rng(seed)
        asked = [np.array([0]), np.array([0, count - 1]), *(random.integers(0, count, 5) for _ in range(3))]
        for indices in asked:
            np.testing.assert_array_equal(video.read(indices.astype(np.int32)), whole[indices])
        for indices in asked:
            with decoder.open(data) as fresh:
                np.testing.assert_array_equal(fresh.read(indices), whole[indices])
    return whole


OPEN_GOP = {"x264-params": "open-gop=1:keyint=5:min-keyint=1:bframes=3:b-adapt=0:scenecut=0:mbtree=0:sliced-threads=0"}
ALT_REF = {"deadline": "good", "cpu-used": "5", "auto-alt-ref": "1", "lag-in-frames": "16", "b": "50k"}
VARIABLE = [0.01 * i * i for i in range(24)]


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".webm"])
@pytest.mark.parametrize(
    "options",
    [
        {"gop": 5},  # B-frames, and a key frame beside every fifth
        {"gop": 250},  # one key frame: everything is decoded from the start
        {"times": VARIABLE, "fps": 30},
        {"frames": 1},
        {"frames": 2, "audio": True},
        {"rotation": 90}, {"rotation": 180}, {"rotation": 270, "size": (66, 50)},
        {"options": OPEN_GOP, "codec": "libx264", "gop": 5},  # frames before key frames that need the GOP before
        {"options": ALT_REF, "codec": "libvpx-vp9", "gop": 40},  # frames that are never shown
    ],
    ids=lambda options: "-".join(map(str, options)),
)  # fmt: skip
def test_every_frame_is_the_one_of_its_number(decoder, make, suffix, options):
    if suffix not in {"libx264": (".mp4", ".mkv"), "libvpx-vp9": (".webm",)}.get(options.get("codec"), suffix):
        pytest.skip("that codec in another container")
    data, frames = make(suffix, **options)
    whole = assert_numbered(decoder, data, count=len(frames))
    assert whole.shape == frames.shape  # upright
    assert psnr(whole, frames) > 28


def test_seconds_are_the_timestamps_of_a_variable_rate(decoder, make):
    for suffix, tolerance in ((".mp4", 1e-4), (".webm", 6e-4)):  # WebM counts milliseconds
        with decoder.open(make(suffix, times=VARIABLE, fps=30)[0]) as video:
            np.testing.assert_allclose(video.info.seconds, VARIABLE, rtol=0, atol=tolerance)


@pytest.mark.parametrize("flips", [(True, False), (False, True)])
def test_mirrored_pictures_are_turned(decoder, tmp_path, flips):
    frames, path = toy_frames(4), tmp_path / "a.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=12)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.set_display_rotation(90, *flips)
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    with decoder.open(path.read_bytes()) as video:
        assert (video.info.height, video.info.width) == (64, 48)
        shown = video.read(np.arange(4))
    # Another reader's opinion.
    raw = ffmpeg(tmp_path, path.read_bytes(), ".rgb", "-f", "rawvideo", "-pix_fmt", "rgb24")
    assert psnr(shown, np.frombuffer(raw, np.uint8).reshape(shown.shape)) > 35


CONTAINERS = {
    # A cut without encoding anew: frames before the cut are decoded and not presented.
    "edit list": (".mp4", 16, ["-ss", "1.3", "-i", "-c", "copy"]),
    "fragments": (".mp4", 0, ["-c", "copy", "-movflags", "frag_keyframe+empty_moov"]),
    "transport stream": (".ts", 0, ["-c", "copy"]),  # timestamps begin at 1.4 s
    "AVI with B-frames": (".avi", 0, ["-c:v", "mpeg4", "-bf", "2", "-q:v", "2"]),
    "no timestamps": (".h264", 0, ["-c", "copy"]),
    "HEVC, open GOP": (".mp4", 0, ["-c:v", "libx265", "-x265-params", "keyint=10:open-gop=1:bframes=3:log-level=none"]),
    # Packets marked as key frames that are none.
    "intra refresh": (".mp4", 0, ["-c:v", "libx264", "-x264-params", "keyint=8:bframes=0:scenecut=0:intra-refresh=1"]),
    "MPEG-2": (".mkv", 0, ["-c:v", "mpeg2video", "-g", "10", "-bf", "2", "-q:v", "2"]),
    "AV1": (".mp4", 0, ["-c:v", "libsvtav1", "-preset", "12", "-svtav1-params", "keyint=16"]),
    "no cues": (".webm", 0, ["-c:v", "libvpx-vp9", "-deadline", "realtime", "-cpu-used", "8", "-live", "1"]),
}  # fmt: skip


@pytest.mark.parametrize("case", CONTAINERS)
def test_containers_of_all_sorts(decoder, make, folder, case):
    suffix, first, arguments = CONTAINERS[case]
    path = folder / f"{case}.made"
    if not path.exists():
        path.write_bytes(ffmpeg(folder, make(".mp4", frames=40)[0], suffix, *arguments))
    data = path.read_bytes()
    assert_numbered(decoder, data, first=first, count=40 - first)
    if decoder.name == "pyav":
        table = decoder.open(data).table
        assert table.by_order == (case == "no timestamps")
        assert table.shown.all() == (case != "edit list")
        assert case != "intra refresh" or len(table.entries) == 1


def test_hidden_packets_of_vp8_are_no_frames(decoder, folder):
    # Alternative references take two passes over what is worth predicting: noise over a picture that moves.
    y, x = np.mgrid[:96, :128]
    still = np.stack([128 + 60 * np.sin(x / 7 + c) + 50 * np.cos(y / 9 - c) for c in range(3)], axis=-1)
    noise = np.random.default_rng(0).normal(0, 12, (40, 96, 128, 3))
    frames = np.stack([np.roll(still, t, axis=1) + noise[t] for t in range(40)])
    for t in range(40):
        frames[t, 40:56, 2 * t : 2 * t + 16] = 255
    path = folder / "vp8.webm"
    if not path.exists():
        make_video(folder / "vp8.mkv", pixels=frames.clip(0, 255).astype(np.uint8), codec="ffv1")
        arguments = ["-c:v", "libvpx", "-auto-alt-ref", "1", "-lag-in-frames", "16", "-arnr-maxframes", "7"]
        arguments += ["-arnr-strength", "5", "-b:v", "200k", "-cpu-used", "2", "-passlogfile", str(folder / "log")]
        for number in ("1", "2"):
            path.write_bytes(ffmpeg(folder, (folder / "vp8.mkv").read_bytes(), ".webm", *arguments, "-pass", number))
    with decoder.open(path.read_bytes()) as video:
        assert video.info.frames == 40
        whole = video.read(np.arange(40))
        # The white block is where it was in that frame.
        for t in range(40):
            assert whole[t, 40:56, 2 * t + 1 : 2 * t + 15].min() > 200
        np.testing.assert_array_equal(video.read(np.array([31])), whole[31:32])
        if decoder.name == "pyav":
            assert (~video.table.shown).sum() > 0


@pytest.mark.parametrize("tags", ["untagged", "bt601", "bt709", "bt709 full"])
def test_matrix_and_range_are_the_streams(decoder, tmp_path, tags):
    # Encoded from RGB by the stated matrix with swscale's accurate path, decoded to the RGB that went in.
    frames = toy_frames(6, (96, 80))
    full = "JPEG" if "full" in tags else "MPEG"
    matrix = "ITU709" if "709" in tags else "ITU601"
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=12)
        stream.width, stream.height, stream.pix_fmt, stream.options = 96, 80, "yuv420p", {"crf": "1"}
        if tags != "untagged":
            context = stream.codec_context
            context.colorspace, context.color_range = 1 if "709" in tags else 6, 2 if "full" in tags else 1
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            container.mux(
                stream.encode(
                    picture.reformat(
                        format="yuv420p", src_colorspace=matrix, dst_colorspace=matrix, src_color_range="JPEG",
                        dst_color_range=full, interpolation="AREA",
                    )
                )
            )  # fmt: skip
        container.mux(stream.encode(None))
    with decoder.open(path.read_bytes()) as video:
        assert psnr(video.read(np.arange(6)), frames) > 33  # 27 with the other matrix, 24 with the other range


@pytest.mark.parametrize(
    ("pix_fmt", "size"),
    [("gray", (64, 48)), ("yuv444p", (65, 49)), ("yuv420p10le", (64, 48)), ("yuv422p", (66, 50)), ("yuv420p", (65, 49)),
     ("yuva420p", (64, 48)), ("bgr0", (33, 17))],
)  # fmt: skip
def test_pixel_formats_and_odd_sizes(decoder, make, pix_fmt, size):
    codec = {"yuva420p": "libvpx-vp9", "bgr0": "ffv1"}.get(pix_fmt, "libx264")
    codec = "ffv1" if pix_fmt == "yuv420p" and size[0] % 2 else codec
    data, frames = make(".mkv", codec=codec, pix_fmt=pix_fmt, size=size, frames=5)
    whole = assert_numbered(decoder, data, count=5)
    assert whole.shape == frames.shape and (pix_fmt == "gray" or psnr(whole, frames) > 28)


@pytest.mark.parametrize("size", [(64, 48), (66, 50), (427, 240)])  # torchcodec converts widths of 32 n by another path
@pytest.mark.parametrize("suffix", [".mp4", ".webm"])
def test_torchcodec_is_pyav_bit_for_bit(make, suffix, size):
    found = decoder_of("torchcodec")
    if isinstance(found, str):
        pytest.skip(found)
    if size[0] % 2 and suffix == ".mp4":
        size = (428, 240)
    data, _ = make(suffix, size=size, frames=6)
    with found.open(data) as theirs, decoder_of("pyav").open(data) as ours:
        assert type(theirs).__name__ == "TorchcodecVideo"
        np.testing.assert_array_equal(theirs.read(np.arange(6)), ours.read(np.arange(6)))


def test_dali_takes_vp9_and_leaves_h264_to_pyav_on_the_cpu(make):
    found = decoder_of("dali")
    if isinstance(found, str):
        pytest.skip(found)
    for suffix, kind in ((".webm", "DaliVideo"), (".mp4", "PyavVideo")):
        data, _ = make(suffix)
        with found.open(data) as theirs, decoder_of("pyav").open(data) as ours:
            assert type(theirs).__name__ == kind
            a, b = theirs.read(np.arange(24)), ours.read(np.arange(24))
            assert psnr(a, b) > 35  # another enlargement of chroma
            assert np.array_equal(a, b) == (suffix == ".mp4")


def test_only_the_entry_and_what_follows_is_decoded(make, monkeypatch):
    data, _ = make(".mp4", frames=60, gop=10, options={"x264-params": "bframes=0:scenecut=0:sliced-threads=0:mbtree=0"})
    with decoder_of("pyav").open(data) as video:
        assert video.table.entries == [0, 10, 20, 30, 40, 50]
        asked = []
        inner = video._packets
        monkeypatch.setattr(video, "_packets", lambda begin, end: asked.append((begin, end)) or inner(begin, end))
        video.read(np.array([57, 12, 15]))
        assert asked == [(10, 16), (50, 58)]
        asked.clear()
        video.read(np.arange(8, 23))  # dense: straight through two entries
        assert asked == [(0, 23)]


def test_large_files_are_read_twice_instead_of_being_kept(make, monkeypatch):
    from fastlatent.media import pyav_decoder

    monkeypatch.setattr(pyav_decoder, "KEEP_BYTES", 0)
    for suffix in (".mp4", ".webm", ".mkv"):
        data, _ = make(suffix, gop=5)
        assert decoder_of("pyav").open(data)._kept is None
        assert_numbered(decoder_of("pyav"), data)


def test_threads_change_nothing(decoder, make):
    data, _ = make(".webm", gop=5)
    with decoder.open(data) as video:
        whole = video.read(np.arange(24))

    def one(seed):
        indices = np.random.default_rng(seed).integers(0, 24, 6)
        with decoder.open(data) as video:
            return np.array_equal(video.read(indices), whole[indices])

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(one, range(24)))


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
    arguments = [
        "-i",
        str(tmp_path / "cover.jpg"),
        "-map",
        "0",
        "-map",
        "1",
        "-c",
        "copy",
        "-disposition:v",
        "attached_pic",
    ]
    imageio_ffmpeg = pytest.importorskip("imageio_ffmpeg")
    command = [
        imageio_ffmpeg.get_ffmpeg_exe(),
        "-nostdin",
        "-v",
        "error",
        "-i",
        str(tmp_path / "sound.mp4"),
        *arguments,
    ]
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


def tar(files, folder=False):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        if folder:
            member = tarfile.TarInfo("folder")
            member.type = tarfile.DIRTYPE
            archive.addfile(member)
        for name, data in files:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return stream.getvalue()


def image(pixels, format="PNG"):
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format)
    return stream.getvalue()


def test_a_tar_of_images_is_a_video(decoder):
    frames = toy_frames(12)
    data = tar([(f"{number + 1}.png", image(frame)) for number, frame in enumerate(frames)])  # 1, 2 … 10: as it lies
    whole = assert_numbered(decoder, data, count=12)
    np.testing.assert_array_equal(whole, frames)
    assert decoder.open(data).info.seconds is None


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


def test_names_rules_and_choice(monkeypatch):
    rules = [decoder.rule for decoder in map(decoder_of, NAMES) if not isinstance(decoder, str)]
    assert len(set(rules)) == len(rules)
    for decoder in map(decoder_of, NAMES):
        if not isinstance(decoder, str):
            assert video_decoder_of(decoder.rule) == decoder.name and decoder.device == "cpu"
    with pytest.raises(ValueError, match="'decord-1' is of no decoder"):
        video_decoder_of("decord-1")
    with pytest.raises(ValueError, match="'decord' is unknown; expected one of pyav, torchcodec, dali"):
        open_video_decoder("decord")
    assert choose_video_decoder("cpu") == ("pyav", "decoded on the CPU")

    def absent(module):
        raise ImportError(f"No module named {module!r}")

    monkeypatch.setattr(video_decoders.importlib, "import_module", absent)
    for name in NAMES:
        with pytest.raises(ValueError, match=rf"video decoder {name} does not work here .*: pip install 'fastlatent\["):
            open_video_decoder(name)
    assert choose_video_decoder("cuda")[0] == "pyav" and "dali" in choose_video_decoder("cuda")[1]


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


def test_toy_videos_say_their_numbers():
    frames = toy_frames(300, (64, 48))
    for number in (0, 1, 100, 255):
        assert frame_number(frames[number]) == number
        assert frame_number(np.asarray(Image.fromarray(frames[number]).resize((16, 16)))) == number
        assert frame_number(frames[number][:, 20:40]) == number
    assert frame_number(frames[257]) == 1
    assert Path(toy_videos.__file__).name == "toy_videos.py"
