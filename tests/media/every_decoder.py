"""What tests of video decoders share, whichever decoder it is."""

import io
import subprocess
import tarfile
from functools import lru_cache

import numpy as np
import pytest
from PIL import Image
from toy_videos import frame_number

from fastlatent.media.video_decoders import open_video_decoder


@lru_cache
def decoder_of(name):
    try:
        return open_video_decoder(name, threads=2)
    except ValueError as error:
        return str(error)


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
