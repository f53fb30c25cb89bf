from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import toy_videos
from every_decoder import assert_numbered, decoder_of, ffmpeg, image, tar
from PIL import Image
from toy_videos import frame_number, make_video, toy_frames

from fastlatent.media import video_decoders
from fastlatent.media.video_decoders import NAMES, choose_video_decoder, open_video_decoder, video_decoder_of

av = pytest.importorskip("av")


def psnr(a, b):
    return 10 * np.log10(255**2 / max(np.mean((a.astype(float) - b) ** 2), 1e-9))


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


def test_a_tar_of_images_is_a_video(decoder):
    frames = toy_frames(12)
    data = tar([(f"{number + 1}.png", image(frame)) for number, frame in enumerate(frames)])  # 1, 2 … 10: as it lies
    whole = assert_numbered(decoder, data, count=12)
    np.testing.assert_array_equal(whole, frames)
    assert decoder.open(data).info.seconds is None


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


def test_toy_videos_say_their_numbers():
    frames = toy_frames(300, (64, 48))
    for number in (0, 1, 100, 255):
        assert frame_number(frames[number]) == number
        assert frame_number(np.asarray(Image.fromarray(frames[number]).resize((16, 16)))) == number
        assert frame_number(frames[number][:, 20:40]) == number
    assert frame_number(frames[257]) == 1
    assert Path(toy_videos.__file__).name == "toy_videos.py"
