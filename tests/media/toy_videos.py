"""Small videos whose frames say which frame they are. Imports nothing of fastlatent; PyAV writes them."""

from __future__ import annotations

import io
from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image

BANDS = 8
CODECS = {".mp4": "libx264", ".mkv": "libx264", ".webm": "libvpx-vp9"}
OPTIONS = {
    "libx264": {"preset": "veryfast", "crf": "12", "x264-params": "mbtree=0:sliced-threads=0"},
    "libvpx-vp9": {"deadline": "realtime", "cpu-used": "8", "crf": "12", "b": "0", "auto-alt-ref": "0"},
    "libx265": {"preset": "ultrafast", "crf": "12", "x265-params": "log-level=none:pools=1:frame-threads=1"},
}
TICK = Fraction(1, 12000)
"""Seconds. A common multiple of the usual rates; Matroska and WebM round times to milliseconds."""


def toy_frames(frames: int = 24, size: tuple[int, int] = (64, 48), seed: int = 0) -> np.ndarray:
    """uint8 [frames, h, w, 3]: 8 horizontal bands, dark or bright as the bits of frame number % 256 (the highest at the
    top), tinted by colours that drift from frame to frame. Columns may be cropped away: frame_number still reads it."""
    width, height = size
    phases = np.random.default_rng(seed).uniform(0, 2 * np.pi, 3)
    number = np.arange(frames) % 256
    band = np.arange(height) * BANDS // height
    bright = (number[:, None] >> (BANDS - 1 - band)) & 1
    waves = [np.sin(0.5 * np.arange(frames)[:, None] + np.arange(width) / 9 + phase) for phase in phases]
    tint = np.rint(40 + 30 * np.stack(waves, axis=-1)).astype(np.int64)  # [frames, w, 3], 10 to 70
    return np.where(bright[:, :, None, None] == 1, 255 - tint[:, None], tint[:, None]).astype(np.uint8)


def frame_number(pixels: np.ndarray) -> int:
    """Of a frame [H, W, 3] of toy_frames, uint8, upright, H at least 8: its number % 256."""
    rows = np.asarray(pixels, dtype=np.float64).mean(axis=(1, 2))
    centres = ((np.arange(BANDS) + 0.5) * len(rows) / BANDS).astype(int)
    return int(sum(int(value > 127.5) << (BANDS - 1 - bit) for bit, value in enumerate(rows[centres])))


def make_video(
    path: Path | str,
    *,
    frames: int = 24,
    size: tuple[int, int] = (64, 48),
    fps: float = 12,
    times: list[float] | None = None,
    rotation: int = 0,
    audio: bool = False,
    seed: int = 0,
    codec: str | None = None,
    pix_fmt: str = "yuv420p",
    gop: int = 12,
    options: dict[str, str] | None = None,
    pixels: np.ndarray | None = None,
) -> np.ndarray:
    """Write `frames` toy frames; the suffix picks container and codec: .mp4 and .mkv libx264, .webm libvpx-vp9.

    Args:
        size: (width, height) of the upright frames; even for yuv420p.
        times: seconds of each frame, rising: a variable rate; None for one frame every 1 / fps.
        rotation: 0, 90, 180 or 270: the file holds the frames turned clockwise, and a display matrix that turns them
            back, counterclockwise.
        audio: adds a track of sound.
        codec, pix_fmt, gop, options: of the encoder; gop is the number of frames from one key frame to the next.
        pixels: uint8 [frames, h, w, 3] to write in place of toy frames.

    Returns:
        The upright frames, uint8 [n, h, w, 3], as they were before compression.
    """
    import av

    path = Path(path)
    upright = toy_frames(frames, size, seed) if pixels is None else pixels
    stored = np.rot90(upright, -rotation // 90, axes=(1, 2))
    codec = codec or CODECS[path.suffix]
    path.parent.mkdir(parents=True, exist_ok=True)
    # The index in front, so that a file cut short still has it.
    flags = {"movflags": "+faststart", "fflags": "+bitexact"} if path.suffix == ".mp4" else {"fflags": "+bitexact"}
    with av.open(str(path), "w", options=flags) as container:
        stream = container.add_stream(codec, rate=Fraction(fps).limit_denominator(1001))
        stream.height, stream.width = stored.shape[1:3]
        stream.pix_fmt = pix_fmt
        context = stream.codec_context
        context.time_base, context.gop_size, context.thread_count = TICK, gop, 1
        stream.options = OPTIONS.get(codec, {}) | (options or {})
        if rotation:
            stream.set_display_rotation(rotation)
        sound = container.add_stream("libopus" if path.suffix == ".webm" else "aac", rate=48000) if audio else None
        for number, picture in enumerate(stored):
            seconds = number / Fraction(fps).limit_denominator(1001) if times is None else Fraction(times[number])
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24").reformat(format=pix_fmt)
            frame.pts, frame.time_base = round(seconds / TICK), TICK
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        if sound is not None:
            _hum(container, sound)
    return upright


def _hum(container, stream) -> None:
    import av

    for start in range(0, 9600, 960):
        wave = np.sin(np.arange(start, start + 960) / 20).astype(np.float32)
        frame = av.AudioFrame.from_ndarray(np.stack([wave, wave]), format="fltp", layout="stereo")
        frame.rate, frame.pts, frame.time_base = 48000, start, Fraction(1, 48000)
        container.mux(stream.encode(frame))
    container.mux(stream.encode(None))


def frame_folder(
    path: Path | str, *, frames: int = 24, size: tuple[int, int] = (64, 48), seed: int = 0, suffix: str = ".png"
) -> np.ndarray:
    """A folder of images 000001.png, 000002.png …; returns uint8 [frames, h, w, 3] (.png holds exactly these)."""
    pictures = toy_frames(frames, size, seed)
    Path(path).mkdir(parents=True, exist_ok=True)
    for number, picture in enumerate(pictures):
        Image.fromarray(picture).save(Path(path) / f"{number + 1:06d}{suffix}")
    return pictures


def damaged(path_of_sound: Path | str, to: Path | str, kind: str) -> Path:
    """A file that no reader can use, at `to`, of the container that its suffix says.

    kind: "truncated": the first 60 % of a sound file (an .mp4 of make_video keeps its whole index); "garbage": bytes
    of no format; "no-frames": a video track without a frame; "audio-only": sound and no video track.
    """
    import av

    to = Path(to)
    to.parent.mkdir(parents=True, exist_ok=True)
    if kind == "truncated":
        data = Path(path_of_sound).read_bytes()
        to.write_bytes(data[: len(data) * 6 // 10])
    elif kind == "garbage":
        to.write_bytes(np.random.default_rng(0).integers(0, 256, 4096, dtype=np.uint8).tobytes())
    elif kind in ("no-frames", "audio-only"):
        buffer = io.BytesIO()
        webm = to.suffix == ".webm"
        with av.open(buffer, "w", format={".mp4": "mp4", ".mkv": "matroska", ".webm": "webm"}[to.suffix]) as container:
            if kind == "no-frames":
                stream = container.add_stream("libvpx-vp9" if webm else "libx264", rate=12)
                stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
                container.start_encoding()
            else:
                _hum(container, container.add_stream("libopus" if webm else "aac", rate=48000))
        to.write_bytes(buffer.getvalue())
    else:
        raise ValueError(f"damaged: expected truncated, garbage, no-frames or audio-only, got {kind!r}")
    return to
