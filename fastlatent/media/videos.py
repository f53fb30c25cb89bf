"""Videos: frames go in as they come, and a file (or a folder of PNGs) appears whole or not at all. Torch-free."""

from __future__ import annotations

import errno
import math
import os
import re
import shutil
import struct
import uuid
from contextlib import suppress
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Protocol

import numpy as np
import xxhash
from PIL import Image

from fastlatent.media.animations import GifFile, WebPFile, gif_info, webp_info

FORMATS = ("mp4", "gif", "webp", "png-frames")
ENCODERS = ("auto", "libx264", "h264_nvenc")
TEMPORARY = ".tmp-"  # the store's prefix of unfinished files
MAX_SIDE = {"mp4": 16384, "gif": 65535, "webp": 16383, "png-frames": 65535}  # x264, and what the formats' fields hold
FPS_RANGE = (0.01, 1000.0)  # a delay of a GIF has 16 bits: 655 s
NTSC = (24, 30, 48, 60, 120)  # rates that exist times 1000/1001 too; people write 23.976 or 23.98
X264_THREADS = 8  # fixed: the bytes name the number. x264 itself takes fewer for small frames
_FRAME_NAME = re.compile(r"\d{6,}\.png")
_REMEDY = "choose --format webp, gif or png-frames"


def output_path(folder: Path, name: str, format: str) -> Path:
    """Where the video `name` of one of FORMATS lies: `folder`/name.mp4 …; for png-frames the folder `folder`/name."""
    _check_format(format)
    if not name or "/" in name or "\0" in name or name in (".", ".."):
        raise ValueError(f"output_path: expected the name of a file, got {name!r}")
    return folder / (name if format == "png-frames" else f"{name}.{format}")


def output_digest(path: Path) -> str:
    """xxh3-128 (32 hex digits) of a file's bytes; of a folder: of its entries' names, sizes and bytes, sorted.

    Raises:
        OSError: there is nothing at `path`, or it cannot be read.
    """
    digest = xxhash.xxh3_128()
    for file in sorted(path.iterdir()) if path.is_dir() else [path]:
        with open(file, "rb") as opened:
            if file != path:
                digest.update(os.fsencode(file.name) + b"\0" + struct.pack("<Q", os.fstat(opened.fileno()).st_size))
            while piece := opened.read(1 << 20):
                digest.update(piece)
    return digest.hexdigest()


def video_info(path: Path) -> tuple[int, int, int, float | None]:
    """(frames, width, height, frames a second) of what a VideoWriter wrote; nothing is decoded.

    The rate is None where none is kept: png-frames, and webp or gif whose delays are all 0.

    Raises:
        ValueError: it is damaged or no video.
        OSError: it is missing or cannot be read.
    """
    if path.is_dir():
        frames = sorted(entry.name for entry in path.iterdir() if _FRAME_NAME.fullmatch(entry.name))
        if frames != [f"{i:06d}.png" for i in range(len(frames))] or not frames:
            raise ValueError(f"{path}: expected 000000.png and what follows it, got {len(frames)} frames")
        with Image.open(path / frames[0]) as image:
            return len(frames), *image.size, None
    with open(path, "rb") as file:
        start = file.read(12)
        file.seek(0)
        try:
            if start[:3] == b"GIF":
                return gif_info(file)
            if start[:4] == b"RIFF" and start[8:] == b"WEBP":
                return webp_info(file)
            return _mp4_info(file)
        except (struct.error, IndexError) as error:
            raise ValueError(f"{path}: expected a video, got a damaged file: {error}") from None
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None


def rate(fps: float) -> Fraction:
    """Frames a second as the fraction that is meant: 23.976 → 24000/1001.

    Raises:
        ValueError: fps is not within FPS_RANGE.
    """
    if not FPS_RANGE[0] <= fps <= FPS_RANGE[1]:  # NaN too
        raise ValueError(f"fps: expected {FPS_RANGE[0]:g} to {FPS_RANGE[1]:g} frames a second, got {fps:g}")
    for whole in NTSC:
        if abs(fps - whole * 1000 / 1001) < 0.005:
            return Fraction(whole * 1000, 1001)
    return Fraction(fps).limit_denominator(1001)


def open_video(
    path: Path,
    *,
    format: str,
    fps: float,
    height: int,
    width: int,
    channels: int = 3,
    crf: int = 18,
    scale: float = 1.0,
    encoder: str = "auto",
) -> VideoWriter:
    """A writer of one video, used as a context manager.

    Memory: one frame beyond what write() is given; libx264 keeps about 60 frames of 1.5 bytes a pixel.

    Args:
        format: one of FORMATS. mp4: H.264, yuv420p, BT.709, limited range, odd sizes padded by one row or column;
            gif: 256 colours per frame, dithered; webp: quality 90; png-frames: a folder of 000000.png …
        height, width, channels: of the frames that will come; channels 1 (grey) or 3.
        crf: of mp4, 0 (lossless) to 51.
        scale: factor of both sides, rounded to even numbers.
        encoder: of mp4, one of ENCODERS; "auto" takes the GPU's where it has one. Only libx264 repeats its bytes.

    Raises:
        ValueError: an argument is not as above; what is at `path` is of another kind; no encoder is there.
    """
    _check_format(format)
    if encoder not in ENCODERS:
        raise ValueError(f"encoder: expected one of {', '.join(ENCODERS)}, got {encoder!r}")
    if not 0 <= crf <= 51:
        raise ValueError(f"crf: expected 0 to 51, got {crf}")
    if not 0 < scale < math.inf or height < 1 or width < 1 or channels not in (1, 3):
        raise ValueError(
            "open_video: expected scale > 0, height and width of at least 1 and 1 or 3 channels, "
            f"got scale {scale}, {width}×{height}, {channels} channels"
        )
    if path.is_dir() != (format == "png-frames") and path.exists():
        raise ValueError(f"{path}: expected a {'folder' if format == 'png-frames' else 'file'} to replace; remove it")
    if format == "png-frames":
        _check_frames_only(path)
    return VideoWriter(path, format, rate(fps), height, width, channels, crf, scale, encoder)


class VideoWriter:
    """See open_video. When the `with` block ends well the video appears at `path`; after any exception, also one
    of the disk, nothing is left of it and what was at `path` stays.

    Attributes:
        notes: what differs from what was asked for: scaled, padded …
        frames: how many were written. size: (height, width) of what is written.
    """

    def __init__(
        self,
        path: Path,
        format: str,
        rate: Fraction,
        height: int,
        width: int,
        channels: int,
        crf: int,
        scale: float,
        encoder: str,
    ) -> None:
        self.path, self.frames = path, 0
        self._format, self._rate, self._crf, self._shape = format, rate, crf, (height, width, channels)
        notes = []
        if scale != 1:
            height, width = (max(2, 2 * round(side * scale / 2)) for side in (height, width))
            notes.append(f"scaled from {self._shape[1]}×{self._shape[0]} to {width}×{height}")
        self._scaled = (height, width)
        if format == "mp4" and (height % 2 or width % 2):
            height, width = height + height % 2, width + width % 2
            notes.append(f"padded from {self._scaled[1]}×{self._scaled[0]} to {width}×{height} for yuv420p")
        self.size = (height, width)
        if max(height, width) > MAX_SIDE[format]:
            raise ValueError(f"{format}: expected at most {MAX_SIDE[format]} pixels a side, got {width}×{height}")
        self._encoder = choose_video_encoder(encoder, height, width) if format == "mp4" else ""
        if self._encoder == "libx264" and crf == 0:
            notes.append("crf 0 is lossless H.264 (High 4:4:4 Predictive), which browsers do not play: use crf 1")
        if format == "gif" and rate > 50:
            notes.append(f"{float(rate):g} fps: browsers show a GIF's delays below 0.02 s as 0.1 s")
        self.notes = tuple(notes)
        self._temporary = path.parent / f"{TEMPORARY}{uuid.uuid4().hex}"
        self._sink: _Sink | None = None

    def __enter__(self) -> VideoWriter:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            if self._format == "mp4":
                self._sink = _Mp4(self._temporary, self._rate, *self.size, self._crf, self._encoder)
            elif self._format == "png-frames":
                self._sink = _PngFrames(self._temporary)
            else:
                kind = GifFile if self._format == "gif" else WebPFile
                self._sink = kind(self._temporary, self._rate, *self.size)
        except BaseException:
            self._abort()
            raise
        return self

    def write(self, frames: np.ndarray) -> None:
        """Append uint8 [n, height, width, channels] as given to open_video; n may be 0.

        Raises:
            ValueError: dtype or shape is not as above.
            OSError: the disk is full …
        """
        assert self._sink is not None, "write() belongs inside the with block"
        if frames.dtype != np.uint8 or frames.shape[1:] != self._shape:
            raise ValueError(f"write: expected uint8 [n, {', '.join(map(str, self._shape))}], got {_of(frames)}")
        for frame in frames:
            frame = frame[:, :, 0] if frame.shape[2] == 1 else frame
            if self._scaled != self._shape[:2]:
                resized = Image.fromarray(frame).resize(self._scaled[::-1], Image.Resampling.LANCZOS)
                frame = np.asarray(resized)
            if self.size != self._scaled:
                pads = [(0, self.size[i] - self._scaled[i]) for i in (0, 1)]
                frame = np.pad(frame, pads + [(0, 0)] * (frame.ndim - 2), mode="edge")
            try:
                self._sink.add(np.ascontiguousarray(frame))
            except OSError as error:
                raise self._explain(error) from error
            self.frames += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._abort()
            return
        try:
            if not self.frames:
                raise ValueError(f"{self.path}: expected at least one frame, got none")
            assert self._sink is not None
            self._sink.close()
            self._publish()
        except OSError as failure:
            self._abort()
            raise self._explain(failure) from failure
        except BaseException:
            self._abort()
            raise

    def _publish(self) -> None:
        if self._format != "png-frames":
            # A muxer may swallow the disk's last error: what is renamed has been read back.
            written = video_info(self._temporary)[0]
            if written != self.frames:
                raise OSError(errno.EIO, f"{written} of {self.frames} frames arrived")
            _sync(self._temporary)
            os.replace(self._temporary, self.path)
        else:
            for entry in self._temporary.iterdir():
                _sync(entry)
            _sync(self._temporary)
            _replace_folder(self._temporary, self.path)
        _sync(self.path.parent)

    def _abort(self) -> None:
        if self._sink is not None:
            with suppress(Exception):  # it ends in nothing anyway
                self._sink.close(whole=False)
        if self._temporary.is_dir():
            shutil.rmtree(self._temporary, ignore_errors=True)
        else:
            with suppress(OSError):
                self._temporary.unlink()

    def _explain(self, error: OSError) -> OSError:
        text = f"{error.strerror or error} while writing {self.path}: what was there is kept"
        return OSError(error.errno, text + ("; free some space" if error.errno == errno.ENOSPC else ""))


class _Sink(Protocol):
    def add(self, frame: np.ndarray) -> None: ...  # uint8 [H, W] or [H, W, 3], contiguous

    def close(self, whole: bool = True) -> None: ...  # may be called twice; not whole: it will be deleted


class _Mp4:
    def __init__(self, path: Path, rate: Fraction, height: int, width: int, crf: int, encoder: str) -> None:
        av = _import_av()
        self._av, self._rate, self._count = av, rate, 0
        self._reformatter = av.video.reformatter.VideoReformatter()
        # "file:" and an absolute path: a folder's name may look like a protocol.
        url = f"file:{os.path.abspath(path)}"
        self._container = av.open(url, "w", format="mp4", options={"movflags": "+faststart", "fflags": "+bitexact"})
        self._stream = self._container.add_stream(encoder, rate=rate)
        context = self._stream.codec_context
        context.width, context.height, context.pix_fmt = width, height, "yuv420p"
        context.time_base = 1 / rate
        context.color_primaries = context.color_trc = context.colorspace = context.color_range = 1  # BT.709, limited
        options = {"flags": "+bitexact", "chroma_sample_location": "center"}
        if encoder == "libx264":
            # Frame threads give the bits of one thread; slices, PyAV's choice, cost 3 %. With mbtree x264 (core 165)
            # gave other bits in 1 of 10 runs, even on one thread; without it in none of 85.
            context.thread_type, context.thread_count = "FRAME", X264_THREADS
            options |= {"crf": str(crf), "preset": "medium", "x264-params": "mbtree=0:sliced-threads=0"}
        else:
            options |= {"preset": "p5", "rc": "constqp", "qp": str(crf)}
        self._stream.options = context.options = options

    def add(self, frame: np.ndarray) -> None:
        rgb = np.repeat(frame[:, :, None], 3, axis=2) if frame.ndim == 2 else frame
        # Left to itself swscale takes BT.601. AREA is the mean of each 2×2, exact to a half step; the others ring or
        # round worse at edges.
        picture = self._reformatter.reformat(
            self._av.VideoFrame.from_ndarray(rgb, format="rgb24"),
            format="yuv420p",
            src_colorspace="ITU709",
            dst_colorspace="ITU709",
            src_color_range="JPEG",
            dst_color_range="MPEG",
            interpolation="AREA",
        )
        picture.colorspace = picture.color_range = 1
        picture.pts, picture.time_base = self._count, 1 / self._rate
        self._count += 1
        self._mux(picture)

    def close(self, whole: bool = True) -> None:
        if self._container is not None:
            container = self._container
            try:
                if whole:
                    self._mux(None)
            finally:
                self._container = None
                with _disk_errors(self._av):
                    container.close()

    def _mux(self, picture: Any) -> None:
        with _disk_errors(self._av):
            for packet in self._stream.encode(picture):
                self._container.mux(packet)


class _disk_errors:
    """FFmpeg's errors as OSError."""

    def __init__(self, av: Any) -> None:
        self._kind = av.error.FFmpegError

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, self._kind):
            raise OSError(getattr(error, "errno", errno.EIO), getattr(error, "strerror", str(error))) from error


class _PngFrames:
    def __init__(self, folder: Path) -> None:
        self._folder, self._count = folder, 0
        folder.mkdir()

    def add(self, frame: np.ndarray) -> None:
        Image.fromarray(frame).save(self._folder / f"{self._count:06d}.png")
        self._count += 1

    def close(self, whole: bool = True) -> None: ...


def _check_format(format: str) -> None:
    if format not in FORMATS:
        raise ValueError(f"format: expected one of {', '.join(FORMATS)}, got {format!r}")


def _of(array: np.ndarray) -> str:
    return f"{array.dtype} {list(array.shape)}"


def _import_av() -> Any:
    try:
        import av
        import av.video.reformatter
    except ImportError as error:
        raise ValueError(f"mp4 needs PyAV: pip install 'fastlatent[video]', or {_REMEDY} ({error})") from None
    return av


def choose_video_encoder(encoder: str = "auto", height: int = 480, width: int = 848) -> str:
    """The H.264 encoder that writes mp4 here: of a GPU where one encodes, else libx264.

    Raises:
        ValueError: PyAV is missing, or has none.
    """
    _import_av()
    if encoder in ("auto", "h264_nvenc") and _opens("h264_nvenc", height, width):
        return "h264_nvenc"
    if encoder == "h264_nvenc":
        raise ValueError(f"h264_nvenc cannot encode {width}×{height} on this machine: use encoder libx264 or auto")
    if not _opens("libx264", height, width):
        raise ValueError(f"this PyAV has no libx264 for {width}×{height}: pip install av, or {_REMEDY}")
    return "libx264"


@lru_cache(maxsize=64)
def _opens(encoder: str, height: int, width: int) -> bool:
    av = _import_av()
    try:
        context = av.CodecContext.create(encoder, "w")
        context.width, context.height, context.pix_fmt, context.time_base = width, height, "yuv420p", Fraction(1, 12)
        context.open()
    except (av.error.FFmpegError, ValueError):  # no such codec, no such GPU, sizes it does not take
        return False
    return True


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _check_frames_only(folder: Path) -> None:
    others = sorted(e.name for e in folder.iterdir() if not _FRAME_NAME.fullmatch(e.name)) if folder.is_dir() else []
    if others:
        raise ValueError(f"{folder}: expected nothing but NNNNNN.png to replace, got {others!r:.200}; choose another")


def _replace_folder(new: Path, path: Path) -> None:
    _check_frames_only(path)
    aside = path.parent / f"{TEMPORARY}{uuid.uuid4().hex}"
    if not path.exists():
        os.rename(new, path)
        return
    os.rename(path, aside)
    try:
        os.rename(new, path)
    except BaseException:
        os.rename(aside, path)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _mp4_info(file: BinaryIO) -> tuple[int, int, int, float | None]:
    av = _import_av()
    try:
        with av.open(file) as container:
            stream = container.streams.video[0]
            frames = sum(packet.size > 0 for packet in container.demux(stream))
            if frames != stream.frames:
                raise ValueError(f"expected {stream.frames} frames, got {frames}: the file was cut off")
            size = stream.codec_context.width, stream.codec_context.height
            return frames, *size, float(stream.average_rate) if stream.average_rate else None
    except av.error.FFmpegError as error:
        raise ValueError(f"expected a video, got: {error}") from None
