"""Clips of 16 frames at stride 2 from the middle of a video in memory: seconds per clip, for every video decoder.

fastlatent-NAME  `open_video_decoder(NAME)`: reads the container, decodes, hands out uint8 RGB [16, H, W, 3]
torchcodec       torchcodec's own API: a VideoDecoder of the file's bytes in exact mode, get_frames_at
decode-all       PyAV, every frame of the file decoded and converted, 16 of them kept: for loaders that trust no seek
torchcodec-approximate   the same with seek_mode="approximate": no list of frames is made; wrong for a variable rate

Videos as data sets have them: VP9 of 427×240 at 12 fps, 4 s, one key frame; H.264 of 848×480 at 24 fps, 4 s, a key
frame every 2 s. One call reads CLIPS clips, shared out to `threads` threads, each of which decodes with one thread.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial

import harness
import numpy as np
from rows import Case

from fastlatent.media.video_decoders import NAMES, VideoDecoder, open_video_decoder

CLIPS = 8
FRAMES, STRIDE = 16, 2
VIDEOS = {
    "vp9-427x240": ("webm", "libvpx-vp9", (427, 240), 12, 48, 128, {"crf": "34", "b": "0", "cpu-used": "5"}),
    "h264-848x480": ("mp4", "libx264", (848, 480), 24, 96, 48, {"crf": "23", "preset": "medium"}),
}
OURS = tuple(f"fastlatent-{name}" for name in NAMES)
RIVALS = ("torchcodec", "torchcodec-approximate", "decode-all")

CASES = [
    Case("clip_decode", {"video": video, "frames": FRAMES, "stride": STRIDE, "clips": CLIPS}, "uint8", "cpu",
         (*OURS, *RIVALS), threads=threads)
    for video in VIDEOS for threads in (1, 2)
]  # fmt: skip


def make_video(name: str) -> bytes:
    """A still picture with edges and texture that is panned, under camera noise."""
    import av

    format, codec, (width, height), fps, frames, gop, options = VIDEOS[name]
    random = np.random.default_rng(0)
    y, x = np.mgrid[: height + frames, : width + 2 * frames]
    still = np.stack([128 + 60 * np.sign(np.sin(x / 31 + c) * np.cos(y / 23 - c)) for c in range(3)], axis=-1)
    still += random.normal(0, 20, still.shape)
    stream = io.BytesIO()
    with av.open(stream, "w", format=format) as container:
        track = container.add_stream(codec, rate=fps)
        assert isinstance(track, av.VideoStream)
        track.width, track.height, track.pix_fmt, track.gop_size, track.options = width, height, "yuv420p", gop, options
        for t in range(frames):
            picture = still[t : t + height, 2 * t : 2 * t + width] + random.normal(0, 3, (height, width, 3))
            frame = av.VideoFrame.from_ndarray(picture.clip(0, 255).astype(np.uint8), format="rgb24")
            container.mux(track.encode(frame))
        container.mux(track.encode(None))
    return stream.getvalue()


def by_us(decoder: VideoDecoder, data: bytes, indices: np.ndarray) -> np.ndarray:
    with decoder.open(data) as video:
        return video.read(indices)


def by_torchcodec(seek_mode: str, data: bytes, indices: np.ndarray) -> np.ndarray:
    from torchcodec.decoders import VideoDecoder as TorchcodecFile

    video = TorchcodecFile(data, dimension_order="NHWC", num_ffmpeg_threads=1, seek_mode=seek_mode)
    return video.get_frames_at(indices.tolist()).data.numpy()


def decode_all(data: bytes, indices: np.ndarray) -> np.ndarray:
    import av

    with av.open(io.BytesIO(data)) as container:
        container.streams.video[0].codec_context.thread_count = 1
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    return frames[indices]


@contextmanager
def prepare(case: Case) -> Iterator[harness.Prepared]:
    name = str(case.sizes["video"])
    data, count = make_video(name), VIDEOS[name][4]
    indices = (count - (FRAMES - 1) * STRIDE - 1) // 2 + STRIDE * np.arange(FRAMES)
    pool = ThreadPoolExecutor(case.threads)

    def factory(provider: str) -> Callable[[], object]:
        read: Callable[[bytes, np.ndarray], np.ndarray]
        try:
            if provider in OURS:
                decoder = open_video_decoder(provider.removeprefix("fastlatent-"), device="cpu", threads=case.threads)
                read = partial(by_us, decoder)
            elif provider == "decode-all":
                read = decode_all
            else:
                import torchcodec.decoders  # noqa: F401

                read = partial(by_torchcodec, "approximate" if "approximate" in provider else "exact")
        except (ImportError, OSError, RuntimeError, ValueError) as error:
            raise harness.Unavailable(str(error)) from None
        if read(data, indices).shape != (FRAMES, *VIDEOS[name][2][::-1], 3):
            raise ValueError(f"{provider}: other frames")

        def run() -> None:
            if case.threads == 1:
                for _ in range(CLIPS):
                    read(data, indices)
            else:
                list(pool.map(lambda _: read(data, indices), range(CLIPS)))

        return run

    try:
        width, height = VIDEOS[name][2]
        yield harness.Prepared(
            {provider: partial(factory, provider) for provider in case.providers},
            bytes=FRAMES * height * width * 3,
            rivals=RIVALS,
            units=CLIPS,
        )
    finally:
        pool.shutdown()


if __name__ == "__main__":
    harness.main(CASES, prepare)
