"""Videos by torchcodec, on the CPU."""

from __future__ import annotations

from typing import Any

import numpy as np
from torchcodec.decoders import VideoDecoder as TorchcodecFile

from fastlatent.media.pyav_decoder import RULE as PYAV_RULE
from fastlatent.media.pyav_decoder import PyavDecoder, PyavVideo
from fastlatent.media.video_decoders import OpenVideo, TarVideo, Video, is_tar

RULE = f"torchcodec-1 exact; other: {PYAV_RULE}"
"""Frames by number in torchcodec's exact mode, one thread a video, its own conversion to 8-bit RGB, its own turning.
Its pixels are PyAV's bit for bit where swscale has a converter of its own (8-bit 4:2:0 and 4:2:2 of an even height),
not for 10 bits and odd heights: hence a rule of its own. By PyAV are decoded: files whose frames it would number
otherwise (timestamps that are missing or repeat, packets that are not shown); H.264 with key frames that are no IDR
pictures (torchcodec seeks to them, and in a stream of intra refresh a frame's pixels then depend on what else is read);
mirrored pictures; whatever it refuses. It conceals damage that PyAV would refuse; PyAV, which reads the container and
the first frame, still refuses what is cut off."""
MIRRORED = (2, 4, 5, 7)


class TorchcodecDecoder:
    """A `VideoDecoder`; the threads are the callers'."""

    name, rule, device, packages = "torchcodec", RULE, "cpu", ("torchcodec", "av")

    def __init__(self, *, device: str, threads: int) -> None:
        PyavDecoder(device="cpu", threads=1)  # new enough

    def open(self, data: bytes) -> Video:
        if is_tar(data):
            return TarVideo(data)
        video = PyavVideo(data)
        return TorchcodecVideo(video, data) if video.plain() and video.orientation not in MIRRORED else video

    def close(self) -> None: ...


class TorchcodecVideo(OpenVideo):
    def __init__(self, video: PyavVideo, data: bytes) -> None:
        self._video, self._data, self.info = video, data, video.info
        self._file: Any = None

    def close(self) -> None:
        self._file = None
        self._video.close()

    def rising(self, numbers: np.ndarray) -> np.ndarray:
        frames = self._exactly(numbers)
        return self._video.rising(numbers) if frames is None else frames

    def _exactly(self, numbers: np.ndarray) -> np.ndarray | None:
        """None where torchcodec refuses the file or hands out frames of other times or sizes."""
        try:
            if self._file is None:
                self._file = TorchcodecFile(
                    self._data, dimension_order="NHWC", num_ffmpeg_threads=1, seek_mode="exact", device="cpu"
                )
            if len(self._file) != self.info.frames:
                return None
            batch = self._file.get_frames_at(numbers.tolist())
        except (RuntimeError, ValueError, IndexError):
            return None
        frames = np.ascontiguousarray(batch.data.numpy())
        same_times = np.allclose(batch.pts_seconds.numpy(), self._video.seconds_in_file(numbers), rtol=0, atol=1e-4)
        return frames if same_times and frames.shape[1:] == (self.info.height, self.info.width, 3) else None
