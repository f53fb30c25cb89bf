"""From the bytes of a video to the pixels of a clip, and from the recorded rules to the same pixels again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import xxhash

from fastlatent.media.frame_sampling import FrameSampling
from fastlatent.media.transforms import Transform, run_plan, transform_of
from fastlatent.media.video_decoders import Video, VideoDecoder, open_video_decoder, video_decoder_of


@dataclass(frozen=True)
class Clip:
    """One view of a video.

    pixels: uint8 [T, h, w, 3], C-contiguous. frame_index: int32 [T], of decoded frames in the order of presentation.
    orig_hw: the video's height and width, upright. crop: int32 [4], top, left, height and width of what the pixels
    show, in pixels of the video. digest: XXH3-64 of the pixels.
    """

    pixels: np.ndarray
    frame_index: np.ndarray
    orig_hw: tuple[int, int]
    crop: np.ndarray
    digest: int


class ClipReader:
    """Videos → clips, by one decoder, one rule for the frames and one for sizes. Several threads may read at once, each
    with no threads of its own but the decoder's.

    shapes: (T, h, w) of every clip that there can be: all of the transform's shapes at the first length, then at the
    second, and so on.
    """

    def __init__(self, decoder: VideoDecoder, sampling: FrameSampling, transform: Transform) -> None:
        self.decoder, self.sampling, self.transform = decoder, sampling, transform
        self.shapes = tuple((frames, *shape) for frames in sampling.frames for shape in transform.shapes)

    def bucket(self, data: bytes) -> int:
        """The index into `shapes` of a video's clips: all of its views have one shape. Nothing is decoded, and where
        there is one shape, nothing opened.

        Raises:
            VideoError: no video, or too short for a clip.
        """
        if len(self.shapes) == 1:
            return 0
        with self.decoder.open(data) as video:
            return self._bucket(video)

    def read(self, data: bytes, key: str, view: int = 0) -> Clip:
        """One view of a video: the same for the same bytes, key and view, whatever was read before.

        Raises:
            VideoError: no video, one that cannot be decoded, or too short for a clip.
            ValueError: no such view.
        """
        with self.decoder.open(data) as video:
            frame_index = self.sampling.indices(video.info, key, view)
            shape = self.shapes[self._bucket(video)]
            different, of_frame = np.unique(frame_index, return_inverse=True)
            frames = video.read(different)
            height, width = video.info.height, video.info.width
        plan = self.transform.plan(
            height, width, self.sampling.clip_key(key, view), self.transform.shapes.index(shape[1:])
        )
        # In one thread, 16 frames of 427 x 240 pixels cost 2.5 ms, of which one call for all of them would save 0.15:
        # the weights and the dispatch. To decode the 32 frames of VP9 that they lie among takes 23 ms.
        pixels = np.empty((len(different), *shape[1:], 3), dtype=np.uint8)
        for place, frame in zip(pixels, frames, strict=True):
            place[...] = run_plan(frame, plan)
        if len(different) < len(frame_index) or (frame_index[1:] < frame_index[:-1]).any():
            pixels = pixels[of_frame]
        return Clip(
            pixels=pixels,
            frame_index=frame_index,
            orig_hw=(height, width),
            crop=plan.crop(),
            digest=xxhash.xxh3_64_intdigest(pixels.data),
        )

    def settings(self) -> dict[str, Any]:
        """All that decides on a clip but bytes, key and view, as JSON."""
        return {
            "decode": self.decoder.rule,
            "sampling": self.sampling.settings(),
            "transform": self.transform.settings(),
        }

    def close(self) -> None:
        """Closes the decoder."""
        self.decoder.close()

    def _bucket(self, video: Video) -> int:
        shape = self.transform.shape_of(video.info.height, video.info.width)
        return self.sampling.length(video.info) * len(self.transform.shapes) + shape


def open_clip_reader(settings: dict[str, Any], *, device: str = "cpu", threads: int = 1) -> ClipReader:
    """The reader with these `ClipReader.settings`: it makes the same clips again.

    Args:
        device, threads: as of `open_video_decoder`.

    Raises:
        ValueError: a rule is not the one that this version follows, the settings are none of ours, or the decoder is
            not installed.
    """
    if set(settings) != {"decode", "sampling", "transform"}:
        raise ValueError(
            f"view: expected decode, sampling and transform, got {', '.join(map(str, settings)) or 'none'}"
        )
    sampling = FrameSampling.from_settings(settings["sampling"])
    transform = transform_of(settings["transform"])
    decoder = open_video_decoder(video_decoder_of(settings["decode"]), device=device, threads=threads)
    if decoder.rule != settings["decode"]:
        decoder.close()
        raise ValueError(
            f"decode: expected {decoder.rule!r}, which is what is installed here for device {device}, got "
            f"{settings['decode']!r}: these clips were decoded by other rules, so their pixels cannot be made again"
            + (" (by a GPU: with device='cuda' they may)" if "nvdec" in settings["decode"] and device == "cpu" else "")
        )
    return ClipReader(decoder, sampling, transform)
