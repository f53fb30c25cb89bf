"""Videos by PyAV, that is by FFmpeg's libraries. What they are made of is read here for every decoder."""

from __future__ import annotations

import io
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import Any

import av
import av.video.reformatter
import numpy as np

from fastlatent.media.matroska import damaged_at, segment_end
from fastlatent.media.orientation import upright
from fastlatent.media.video_decoders import OpenVideo, TarVideo, Video, VideoInfo, is_tar
from fastlatent.media.video_error import VideoError, refuse_size

RULE = "pyav-1 rgb24:swscale-bilinear matrix:tagged-else-bt601 range:tagged-else-limited"
"""The name, kept in provenance, of what happens to a file:

- its first video track that FFmpeg ranks best; cover pictures are none; frames by rising presentation timestamps of its
  packets, without those that an edit list cuts away;
- decoded by one thread; a damaged frame is refused, never concealed (err_detect explode);
- to 8-bit RGB by swscale with the flag "bilinear" and no other, at the size that was coded; for 8-bit 4:2:0 and 4:2:2
  of an even height swscale has converters of its own, which repeat chroma whatever the flag;
- by the matrix and range that the stream is tagged with; untagged: BT.601, limited range, at any size, as swscale,
  decord and torchcodec do; primaries and transfer functions (HDR) are left as they are; alpha is dropped;
- interlaced frames as they are coded; non-square pixels stay non-square;
- turned and mirrored as the display matrix says.
"""

# Playlists and concatenations would open other files.
FORMATS = "mov,matroska,avi,mpegts,mpeg,mpegvideo,h264,hevc,flv,asf,ogg,ivf,gif,mxf,nut,m4v,obu,3gp"
# Packets of larger files are read a second time instead of being kept.
KEEP_BYTES = 2**28
# Files whose header is a little long are sound; cut ones lack more.
DURATION_SLACK = 1.0  # seconds


@contextmanager
def _errors(what: str) -> Iterator[None]:
    try:
        yield
    except (VideoError, av.error.EOFError):
        raise
    except (av.error.FFmpegError, ValueError, MemoryError, OverflowError) as error:
        text = getattr(error, "strerror", None) or str(error)
        raise VideoError(f"{what}: {' '.join(text.split())[:200]}") from None


@dataclass(frozen=True)
class PacketTable:
    """Of one track, in decoding order. pts: int64 [packets]. shown: bool [packets], False of what gives no frame.
    entries: rising positions from which decoding may begin; false_entries: others were marked as key frames. frames:
    int64 [frames], the position of each presented frame's packet. by_order: timestamps are missing or repeat, or the
    first packets cannot be told to be frames: frames are counted as they come out of the decoder, from the start.
    """

    pts: np.ndarray
    shown: np.ndarray
    entries: list[int]
    false_entries: bool
    frames: np.ndarray
    by_order: bool


class PyavDecoder:
    """A `VideoDecoder`; the threads are the callers'."""

    name, rule, device, packages = "pyav", RULE, "cpu", ("av",)

    def __init__(self, *, device: str, threads: int) -> None:
        if int(av.__version__.split(".")[0]) < 17:
            raise ImportError(f"expected PyAV 17 or newer, got {av.__version__}")

    def open(self, data: bytes) -> Video:
        return TarVideo(data) if is_tar(data) else PyavVideo(data)

    def close(self) -> None: ...


class PyavVideo(OpenVideo):
    """A `Video`. Opening it reads every packet and decodes the first frame; nothing is ever sought by time: packets are
    handed to the decoder from the last entry before a frame on, so that no seek can land beside it."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        # The packet that alone has been decoded since the last flush, and its frame: decoding may go on from there.
        self._head: tuple[int, Any] | None = None
        self._container: Any = None
        self._stream: Any = None
        try:
            self._open()
            self._kept: list[Any] | None = None if len(data) > KEEP_BYTES else []
            self.table = self._read_table()
            self.info = self._read_info()
        except BaseException:
            self.close()
            raise

    def plain(self) -> bool:
        """Whether one who counts packets and seeks to whatever is marked as a key frame finds these frames too."""
        return bool(self.table.shown.all()) and not (self.table.by_order or self.table.false_entries)

    def close(self) -> None:
        container, self._container = self._container, None
        self._kept, self._stream, self._head = None, None, None
        if container is not None:
            container.close()

    def _open(self) -> None:
        # codec_whitelist: FFmpeg would decode the first frames for what the decoder tells us anyway, which took 15 ms
        # of 80 for a clip of 848×480.
        options = {"format_whitelist": FORMATS, "protocol_whitelist": "none", "codec_whitelist": "none"}
        try:
            with _errors("not a video"):
                self._container = av.open(io.BytesIO(self._data), metadata_errors="ignore", options=options)
        except av.error.EOFError:
            raise VideoError("expected frames, got the end of the file") from None
        tracks = [s for s in self._container.streams.video if not s.disposition & av.stream.Disposition.attached_pic]
        if not tracks:
            sound = ", only sound" if self._container.streams.audio else ""
            raise VideoError(f"expected a video track, got none{sound}")
        best = self._container.streams.best("video")
        self._stream = best if best in tracks else tracks[0]
        context = self._stream.codec_context
        if context is None:
            raise VideoError("expected a video track, got one of a codec that FFmpeg does not know")
        self.codec = context.codec.canonical_name
        if context.height or context.width:  # known before a frame is decoded
            refuse_size(context.height, context.width)
        context.thread_count = 1
        # strict: H.264 that does not say how far frames are reordered is given the most; else frames may be dropped.
        context.options = (
            {"err_detect": "explode", "strict": "1"} if self.codec == "h264" else {"err_detect": "explode"}
        )

    def _packets(self, begin: int, end: int) -> list[Any]:
        """Of the track, at the positions [begin, end)."""
        if self._kept is not None:
            return self._kept[begin:end]
        # Opened anew: a demuxer that has come to the end cannot always go back.
        self._container.close()
        self._open()
        return list(islice((p for p in self._container.demux(self._stream) if p.size), begin, end))

    def _read_table(self) -> PacketTable:
        stream, container = self._stream, self._container
        matroska = container.format.name.startswith("matroska")
        pts: list[int | None] = []
        shown, entries, end = [], [], 0.0
        incomplete = false_entries = False
        nal_bytes = _nal_length_bytes(stream.codec_context)
        try:
            # All tracks of a Matroska file: it declares one duration for all.
            for packet in container.demux() if matroska else container.demux(stream):
                if not packet.size:
                    continue
                if packet.pts is not None:
                    end = max(end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
                if packet.stream_index != stream.index:
                    continue
                if packet.is_corrupt:
                    incomplete = True
                    break
                if packet.is_keyframe:
                    if not pts or _may_begin(packet, self.codec, nal_bytes):
                        entries.append(len(pts))
                    else:
                        false_entries = True
                # VP8's alternative references are packets of their own.
                hidden = self.codec == "vp8" and not memoryview(packet)[0] & 0x10
                shown.append(not (packet.is_discard or hidden))
                pts.append(packet.pts)
                if self._kept is not None:
                    self._kept.append(packet)
        except av.error.FFmpegError as error:
            raise VideoError(f"damaged after {len(pts)} frames: {error.strerror}") from None
        self._refuse_cut_off(len(pts), end, matroska)
        if incomplete:
            raise VideoError(f"frame {len(pts)} is incomplete: the file is damaged or cut off")
        if not pts:
            raise VideoError("expected frames, got a video track without one")
        times = np.array([-1 if time is None else time for time in pts], np.int64)
        usable = np.array(shown)
        # Frames before the first key frame, or presented before it, may or may not be decodable.
        first = times[entries[0]] if entries else 0
        by_order = (
            None in pts
            or len(np.unique(times[usable])) < usable.sum()
            or not entries
            or entries[0] != 0
            or bool((times[usable] < first).any())
        )
        positions = np.flatnonzero(usable)
        frames = positions[np.argsort(times[positions], kind="stable")]
        return PacketTable(times, usable, entries or [0], false_entries, frames, by_order)

    def _refuse_cut_off(self, packets: int, end: float, matroska: bool) -> None:
        container, stream = self._container, self._stream
        if container.format.name.startswith("mov"):
            declared = len(stream.index_entries)
            if declared > packets:
                raise VideoError(f"says {declared} frames, {packets} can be read: the file is cut off")
        if not matroska:
            return
        size = segment_end(self._data)
        if size is not None and size > len(self._data):
            raise VideoError(f"says {size} bytes, {len(self._data)} are there ({packets} frames): the file is cut off")
        if (place := damaged_at(self._data)) is not None:
            raise VideoError(f"damaged at byte {place} of {len(self._data)}, where no element of Matroska begins")
        seconds = (container.duration or 0) / av.time_base
        if packets and seconds - end > DURATION_SLACK:
            raise VideoError(f"says {seconds:.3f} s, {packets} frames end at {end:.3f} s: the file is cut off")

    def _read_info(self) -> VideoInfo:
        table = self.table
        if table.by_order:
            frames = [(frame.pts, self._look_at(frame)) for frame in self._decode(0, len(table.pts))]
            if not frames:
                raise VideoError("expected frames, got packets that give none")
            seconds, first = self._rising([pts for pts, _ in frames]), frames[0][1]
        else:
            if not len(table.frames):
                raise VideoError("expected frames, got none that is presented")
            start = int(table.frames[0])
            (first,) = (
                self._look_at(frame)
                for frame in self._decode(self._entry(start), start + 1)
                if frame.pts == table.pts[start]
            )
            times = table.pts[table.frames]
            seconds = (times - times[0]) * float(self._stream.time_base)
        height, width, self.orientation, self.pixel_format = first
        self._stored = height, width
        if self.orientation >= 5:
            height, width = width, height
        return VideoInfo(seconds, len(seconds), height, width)

    def _rising(self, pts: list[int | None]) -> np.ndarray:
        """Seconds of frames counted by order: their timestamps where those rise, else the track's rate."""
        known = [time for time in pts if time is not None]
        if len(known) == len(pts) and all(a < b for a, b in pairwise(known)):
            return (np.array(known) - known[0]) * float(self._stream.time_base)
        rate = self._stream.average_rate or self._stream.base_rate or 25
        return np.arange(len(pts)) / float(rate)

    @staticmethod
    def _look_at(frame: Any) -> tuple[int, int, int, str]:
        """Height and width as stored, the EXIF number of how to turn it, and the pixel format."""
        refuse_size(frame.height, frame.width)
        return frame.height, frame.width, _orientation(frame), frame.format.name

    def _entry(self, position: int) -> int:
        """Where decoding has to begin for the frame of a packet: at the last entry that is not presented after it."""
        at = bisect_right(self.table.entries, position) - 1
        while at > 0 and self.table.pts[self.table.entries[at]] > self.table.pts[position]:
            at -= 1
        return self.table.entries[max(at, 0)]

    def _decode(self, begin: int, end: int) -> Iterator[Any]:
        """Frames of the packets [begin, end), all of them or VideoError."""
        times = self.table.pts[begin:end]
        # What is presented before its entry belongs to the entry before, and is not decodable from this one.
        due = self.table.shown[begin:end] & (times >= times[0])
        missing = set() if self.table.by_order else set(times[due].tolist())
        with _errors("cannot be decoded"):
            for frame in self._frames(begin, end):
                if self.table.by_order or frame.pts >= times[0]:
                    if frame.is_corrupt:
                        raise VideoError(f"the frame at {float(frame.time or 0):.3f} s is damaged")
                    missing.discard(frame.pts)
                    yield frame
        if missing:
            number = int(np.searchsorted(self.table.pts[self.table.frames], min(missing)))
            raise VideoError(f"frame {number} of {len(self.table.frames)} cannot be decoded: the file is damaged")

    def _frames(self, begin: int, end: int) -> Iterator[Any]:
        packets = self._packets(begin, end)
        context = self._stream.codec_context  # of the container that is open now
        head, self._head = self._head, None
        if head is not None and begin == head[0]:
            yield head[1]
            packets = packets[1:]
        else:
            context.flush_buffers()
        if self._kept is not None and head is None and len(packets) == 1:
            frames = context.decode(packets[0])
            if len(frames) == 1:  # a codec without delay
                self._head = begin, frames[0]
                yield frames[0]
                return
            yield from frames
            packets = []
        for packet in [*packets, None]:
            yield from context.decode(packet)
        context.flush_buffers()

    def rising(self, numbers: np.ndarray) -> np.ndarray:
        frames = np.empty((len(numbers), self.info.height, self.info.width, 3), np.uint8)
        reformatter = av.video.reformatter.VideoReformatter()
        for i, frame in self._wanted(numbers):
            if (frame.height, frame.width) != self._stored:
                raise VideoError(
                    f"frame {numbers[i]}: expected {self._stored[1]} x {self._stored[0]} pixels as of the first frame, "
                    f"got {frame.width} x {frame.height}"
                )
            with _errors(f"frame {numbers[i]}"):
                rgb = reformatter.reformat(
                    frame, format="rgb24", interpolation="BILINEAR", dst_color_range="JPEG", threads=1
                )
            frames[i] = upright(rgb.to_ndarray(), self.orientation)
        return frames

    def seconds_in_file(self, numbers: np.ndarray) -> np.ndarray:
        """float64: timestamps of frames in the file's own time, whose first frame need not be at 0."""
        return self.table.pts[self.table.frames[numbers]] * float(self._stream.time_base)

    def _wanted(self, unique: np.ndarray) -> Iterator[tuple[int, Any]]:
        """(place in unique, decoded frame), of every rising frame number in unique."""
        if self.table.by_order:
            places = {int(index): i for i, index in enumerate(unique)}
            for number, frame in enumerate(self._decode(0, len(self.table.pts))):
                if number in places:
                    yield places[number], frame
            return
        positions = self.table.frames[unique]
        places = {int(self.table.pts[position]): i for i, position in enumerate(positions)}
        runs: list[list[int]] = []
        for position in sorted(positions.tolist()):
            begin = self._entry(position)
            while runs and begin <= runs[-1][1]:
                begin = min(begin, runs.pop()[0])
            runs.append([begin, position + 1])
        for begin, end in runs:
            for frame in self._decode(begin, end):
                if frame.pts in places:
                    yield places.pop(frame.pts), frame
        if places:
            raise VideoError(f"frame {unique[min(places.values())]} cannot be decoded: the file is damaged")


def _orientation(frame: Any) -> int:
    """1 to 8, from the display matrix (x, y) → (a x + c y, b x + d y); 1 for one that does not turn by right angles."""
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return 1
    a, b, _, c, d = (int(np.sign(value)) for value in np.frombuffer(bytes(matrix), np.int32)[:5])
    turns = {
        (1, 0, 0, 1): 1, (-1, 0, 0, 1): 2, (-1, 0, 0, -1): 3, (1, 0, 0, -1): 4,
        (0, 1, 1, 0): 5, (0, 1, -1, 0): 6, (0, -1, -1, 0): 7, (0, -1, 1, 0): 8,
    }  # fmt: skip
    return turns.get((a, b, c, d), 1)


def _nal_length_bytes(context: Any) -> int:
    """Of the lengths before NAL units in H.264 packets; 0 where start codes part them."""
    extra = context.extradata or b""
    return (extra[4] & 3) + 1 if len(extra) > 4 and extra[0] == 1 else 0


def _may_begin(packet: Any, codec: str, nal_bytes: int) -> bool:
    """Whether what follows a packet marked as a key frame is decoded as it is from the start. In H.264 after an IDR
    picture (NAL type 5) only: others so marked refresh the picture little by little, or were marked by mistake."""
    if codec != "h264":
        return True
    data, at = bytes(packet), 0
    if not nal_bytes:
        while (at := data.find(b"\0\0\1", at)) >= 0:
            at += 3
            if data[at : at + 1] and data[at] & 31 == 5:
                return True
        return False
    while at + nal_bytes < len(data):
        size = int.from_bytes(data[at : at + nal_bytes], "big")
        if data[at + nal_bytes] & 31 == 5:
            return True
        at += nal_bytes + size
    return False
