"""Videos by a DALI pipeline, on the CPU or by a GPU's NVDEC ("mixed")."""

from __future__ import annotations

import io
from queue import SimpleQueue
from typing import Any

import av
import numpy as np
from nvidia.dali import Pipeline, fn, types

from fastlatent.media.orientation import upright
from fastlatent.media.pyav_decoder import RULE as PYAV_RULE
from fastlatent.media.pyav_decoder import PyavDecoder, PyavVideo
from fastlatent.media.video_decoders import OpenVideo, TarVideo, Video, is_tar

RULE = f"dali-1 {{place}}; other: {PYAV_RULE}"
"""Frames by number in fn.decoders.video, RGB by DALI's own arithmetic, turned by us. It takes 8-bit 4:2:0 of the
codecs in CODECS; everything else, and whatever it refuses, is decoded by PyAV: what becomes of a file depends on the
file alone. On the CPU DALI's pixels are 37 to 40 dB from PyAV's (it enlarges chroma smoothly). It conceals damage that
PyAV would refuse; PyAV, which reads the container and the first frame, still refuses what is cut off."""

CODECS = {"cpu": ("vp8", "vp9", "mjpeg"), "cuda": ("vp8", "vp9", "av1", "mpeg4", "h264", "hevc")}
PIXEL_FORMATS = ("yuv420p", "yuvj420p")


class DaliDecoder:
    """A `VideoDecoder`: as many pipelines as threads, each for one video at a time."""

    name, packages = "dali", ("nvidia-dali-cuda130", "av")

    def __init__(self, *, device: str, threads: int) -> None:
        self._index: int | None = None
        self.device = "cpu"
        if device.startswith("cuda"):
            import torch

            index = torch.device(device).index
            self._index = torch.cuda.current_device() if index is None else index
            self.device = f"cuda:{self._index}"
        self.place = self.device.split(":")[0]
        self.rule = RULE.format(place="cpu" if self.place == "cpu" else "nvdec")
        PyavDecoder(device="cpu", threads=1)  # new enough
        self._pipelines: SimpleQueue[Any] = SimpleQueue()
        for _ in range(threads):
            self._pipelines.put(self._build())
        self._try()

    def open(self, data: bytes) -> Video:
        if is_tar(data):
            return TarVideo(data)
        video = PyavVideo(data)
        known = video.codec in CODECS[self.place] and video.pixel_format in PIXEL_FORMATS
        return DaliVideo(self, video, data) if known and video.plain() else video

    def close(self) -> None:
        self._pipelines = SimpleQueue()

    def frames(self, data: bytes, numbers: np.ndarray) -> np.ndarray:
        """uint8 [numbers, H, W, 3] as stored.

        Raises:
            RuntimeError: DALI refuses the file, or a GPU's memory is full.
        """
        pipeline = self._pipelines.get()
        try:
            (output,) = pipeline.run(data=[np.frombuffer(data, np.uint8)], numbers=[numbers.astype(np.int32)])
            return np.array(output.as_cpu()[0])  # a copy: the next run writes over DALI's own buffer
        except RuntimeError:
            pipeline = self._build()  # DALI calls one invalid after an exception
            raise
        finally:
            self._pipelines.put(pipeline)

    def _build(self) -> Any:
        pipeline = Pipeline(batch_size=1, num_threads=1, device_id=self._index, prefetch_queue_depth=1)
        with pipeline:
            data = fn.external_source(name="data", batch=True, dtype=types.DALIDataType.UINT8, ndim=1)
            numbers = fn.external_source(name="numbers", batch=True, dtype=types.DALIDataType.INT32, ndim=1)
            device = "cpu" if self._index is None else "mixed"
            frames = fn.decoders.video(data, frames=numbers, device=device, pad_mode="none", affine=False)
            pipeline.set_outputs(frames)
        pipeline.build()
        return pipeline

    def _try(self) -> None:
        """One that refused every file would leave them all to PyAV, unnoticed."""
        stream = io.BytesIO()
        # Encoders that every FFmpeg has.
        codec, pixel_format = ("mjpeg", "yuvj420p") if self.place == "cpu" else ("mpeg4", "yuv420p")
        with av.open(stream, "w", format="mp4") as container:
            track = container.add_stream(codec, rate=12)
            assert isinstance(track, av.VideoStream)
            track.width, track.height, track.pix_fmt = 128, 128, pixel_format
            for _ in range(2):
                picture = av.VideoFrame.from_ndarray(np.full((128, 128, 3), 255, np.uint8), format="rgb24")
                container.mux(track.encode(picture.reformat(format=pixel_format)))
            container.mux(track.encode(None))
        white = self.frames(stream.getvalue(), np.array([1]))
        if white.shape != (1, 128, 128, 3) or white.min() < 240:
            raise RuntimeError(f"DALI decodes a white frame to {list(white.shape)} from {white.min()} to {white.max()}")


class DaliVideo(OpenVideo):
    def __init__(self, decoder: DaliDecoder, video: PyavVideo, data: bytes) -> None:
        self._decoder, self._video, self._data, self.info = decoder, video, data, video.info

    def close(self) -> None:
        self._video.close()

    def rising(self, numbers: np.ndarray) -> np.ndarray:
        try:
            stored = self._decoder.frames(self._data, numbers)
        except RuntimeError as error:
            if "memory" in str(error).lower().replace("memory file", ""):  # of the GPU: no property of the file
                raise
            return self._video.rising(numbers)  # or says what is wrong with it
        frames = np.ascontiguousarray(np.stack([upright(frame, self._video.orientation) for frame in stored]))
        if frames.shape != (len(numbers), self.info.height, self.info.width, 3):
            return self._video.rising(numbers)
        return frames
