"""Decoders of videos, one interface for all: PyAV, torchcodec and DALI.

Frames are numbered in the order in which they are presented, from 0, by the timestamps of the container's packets,
which PyAV reads for all three: what frame 17 is does not depend on the decoder. A tar archive of images (a frame
folder) is a video too, whichever decoder is chosen.
"""

from __future__ import annotations

import importlib
import io
import tarfile
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from fastlatent.media.images import ImageError, image_size, read_image
from fastlatent.media.video_error import VideoError, refuse_size

NAMES = ("pyav", "torchcodec", "dali")
_CLASSES = {
    "pyav": ("fastlatent.media.pyav_decoder", "PyavDecoder", "pip install 'fastlatent[video]'"),
    "torchcodec": (
        "fastlatent.media.torchcodec_decoder",
        "TorchcodecDecoder",
        "pip install 'fastlatent[video,torchcodec]', and FFmpeg's libraries (apt-get install ffmpeg); a torchcodec of "
        "another torch, or one built for CUDA, does not import",
    ),
    "dali": ("fastlatent.media.dali_video_decoder", "DaliDecoder", "pip install 'fastlatent[video,dali]'"),
}


@dataclass(frozen=True)
class VideoInfo:
    """seconds: float64 [frames], when each frame is presented: the first at 0, rising; None for a tar of images.
    frames: how many can be presented. height, width: upright, the container's rotation applied."""

    seconds: np.ndarray | None
    frames: int
    height: int
    width: int


class Video(Protocol):
    """One open video; used by one thread at a time."""

    info: VideoInfo

    def read(self, indices: np.ndarray) -> np.ndarray:
        """Frames at `indices`, integers [T] in [0, frames), in any order, repeats allowed; each is decoded once.

        Returns:
            uint8 [T, height, width, 3], RGB, C-contiguous: the same bytes for the same data and indices, whatever was
            read before.

        Raises:
            VideoError: a frame, or one that it is predicted from, cannot be decoded, or is of another size.
            ValueError: an index lies outside.
        """
        ...

    def close(self) -> None: ...

    def __enter__(self) -> Video: ...

    def __exit__(self, *_: object) -> None: ...


class VideoDecoder(Protocol):
    """Files → videos. Several threads may have videos open at once.

    name: one of NAMES. rule: what it does to a file, for provenance. device: where it decodes, "cpu" or "cuda:N"; what
    it hands out is in host memory. packages: of pip, whose versions may change pixels.
    """

    name: str
    rule: str
    device: str
    packages: tuple[str, ...]

    def open(self, data: bytes) -> Video:
        """
        Raises:
            VideoError: no video, cut off, without a frame, sound only, of absurd size …
            ValueError: this decoder cannot take such a file on this device, whatever is in it.
        """
        ...

    def close(self) -> None: ...


def choose_video_decoder(device: str) -> tuple[str, str]:
    """What `auto` means on a device ("cpu" or "cuda…"), and why: (name, reason). By what is installed, in one order."""
    reasons = []
    for name in ("dali", "pyav") if device.startswith("cuda") else ("pyav",):
        try:
            open_video_decoder(name, device=device if name == "dali" else "cpu", threads=1).close()
        except ValueError as error:
            reasons.append(str(error))
        else:
            where = "decoded on the GPU" if name == "dali" else "decoded on the CPU"
            return name, "; ".join([where, *reasons])
    return "pyav", "; ".join(reasons)  # opened, it says what is missing


def video_decoder_of(rule: str) -> str:
    """The name of the decoder with this `rule`.

    Raises:
        ValueError: no decoder of this version has it.
    """
    name = rule.split("-")[0]
    if name not in NAMES:
        raise ValueError(f"video rule {rule!r} is of no decoder of this version; expected {', '.join(NAMES)}")
    return name


def open_video_decoder(name: str, *, device: str = "cpu", threads: int = 1) -> VideoDecoder:
    """
    Args:
        name: one of NAMES.
        device: "cpu", "cuda" or "cuda:N": where DALI decodes; the others decode on the CPU with any.
        threads: of DALI. PyAV and torchcodec decode a video in the thread that calls, for the same bytes with any
            number of threads.

    Raises:
        ValueError: the name is unknown, its package is missing, or it does not work on this machine.
    """
    if name not in NAMES:
        raise ValueError(f"video decoder {name!r} is unknown; expected one of {', '.join(NAMES)}")
    module, kind, remedy = _CLASSES[name]
    try:
        decoder: VideoDecoder = getattr(importlib.import_module(module), kind)(device=device, threads=threads)
    except (ImportError, OSError, RuntimeError) as error:  # OSError, RuntimeError: libraries that it loads
        text = " ".join(str(error).split())[:300]
        raise ValueError(f"video decoder {name} does not work here ({text}): {remedy}") from None
    return decoder


class OpenVideo(ABC):
    """What every `Video` shares: any order and repeats, made of `rising`."""

    info: VideoInfo

    @abstractmethod
    def rising(self, numbers: np.ndarray) -> np.ndarray:
        """Frames at `numbers`, int64, one or more, rising, each in [0, frames): uint8 [len(numbers), H, W, 3]."""

    def read(self, indices: np.ndarray) -> np.ndarray:
        numbers = np.asarray(indices, dtype=np.int64)
        if numbers.ndim != 1 or (numbers.size and (numbers.min() < 0 or numbers.max() >= self.info.frames)):
            raise ValueError(f"read: expected frame numbers [T] from 0 to {self.info.frames - 1}, got {indices!r:.100}")
        if not numbers.size:
            return np.empty((0, self.info.height, self.info.width, 3), np.uint8)
        unique, places = np.unique(numbers, return_inverse=True)
        frames = self.rising(unique)
        return frames if np.array_equal(unique, numbers) else frames[places]

    def close(self) -> None:  # noqa: B027 (not every video holds something)
        """Frees what it holds."""

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def is_tar(data: bytes) -> bool:
    """By the header's mark, which POSIX and GNU tars have."""
    return data[257:262] == b"ustar"


class TarVideo(OpenVideo):
    """The images of a tar archive, in its order, by `read_image`. A file of more than 8 bits is rounded to 8."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        try:
            with tarfile.open(fileobj=io.BytesIO(data)) as archive:
                members = [member for member in archive if member.isfile()]
        except (tarfile.TarError, EOFError, OverflowError, ValueError) as error:
            raise VideoError(f"a tar of frames that cannot be read: {error}") from None
        if not members:
            raise VideoError("a tar of frames without a frame")
        self._spans = [(member.name, member.offset_data, member.size) for member in members]
        _, begin, size = self._spans[-1]
        if begin + size > len(data):
            raise VideoError(
                f"a tar of frames that is cut off: its last frame ends at byte {begin + size} of {len(data)}"
            )
        try:
            height, width = image_size(self._bytes(0))
        except ImageError as error:
            raise VideoError(f"{self._spans[0][0]}: {error}") from None
        refuse_size(height, width)
        self.info = VideoInfo(None, len(members), height, width)

    def _bytes(self, index: int) -> bytes:
        _, begin, size = self._spans[index]
        return self._data[begin : begin + size]

    def rising(self, numbers: np.ndarray) -> np.ndarray:
        frames = np.empty((len(numbers), self.info.height, self.info.width, 3), np.uint8)
        for i, index in enumerate(numbers):
            name = self._spans[index][0]
            try:
                pixels = read_image(self._bytes(index), channels=3)
            except ImageError as error:
                raise VideoError(f"{name}: {error}") from None
            if pixels.shape != frames.shape[1:]:
                raise VideoError(
                    f"{name}: expected {self.info.width} x {self.info.height} pixels as of the first frame, got "
                    f"{pixels.shape[1]} x {pixels.shape[0]}"
                )
            frames[i] = pixels if pixels.dtype == np.uint8 else np.rint(pixels * np.float32(255))
        return frames
