"""Which frames of a video make a clip. Torch-free."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from fastlatent.media.video_error import VideoError

if TYPE_CHECKING:
    from fastlatent.media.video_decoders import VideoInfo

SAMPLING_RULE = "slots-1"
"""The name, kept in provenance, of how `FrameSampling` chooses frames.

A video is G slots, and all that is chosen are slots; each shows one frame:

- G = n and slot g is frame g, where `fps` is not given and the n frames are evenly spaced, that is, each lies within a
  quarter of the average interval (but at least TICK) of its place between the first and the last;
- else slot g is the time g / rate behind the first frame, rate = `fps` or (n - 1) / (last time), and shows the last
  frame whose time is at most that + tick, tick = min(TICK, a quarter of the average interval). The last frame is taken
  to be shown for an average interval: G slots lie before its end by more than 2 ticks. One frame: one slot.

Clips of T frames, `stride` slots apart, span S = (T - 1) stride + 1 slots. T is the longest length with S <= G, else
the shortest. Frame i of view k of K is slot

    start         i stride
    center        floor((G - S) k / (K - 1)) + i stride; with one view floor((G - S) / 2) + i stride
    random        floor((G - S + 1) u / 2^64) + i stride, u = XXH3-64 of "start k of KEY" with `seed`
    uniform       floor(G (2 (K i + k) + 1) / (2 K T)): the middle of the k-th of K parts of the i-th of T segments

and where the video is shorter than S, slot i stride whatever the placement, which past the end means

    repeat        the last slot
    loop          that number modulo G
    leave-out     that there is no clip
"""

PLACEMENTS = ("start", "center", "random", "uniform")
SHORT = ("repeat", "loop", "leave-out")

# Matroska and WebM count time in milliseconds: what they state is up to one off, and the half microsecond is for float
# arithmetic. At 12 frames a second a strict comparison would find frame 1 (0.083) at 2/12 s, since frame 2 says 0.167.
TICK = 1.0005e-3

# As many as float64 counts one by one. A damaged file can claim any time, and --fps be any number.
MAX_SLOTS = 2**53


@dataclass(frozen=True)
class FrameSampling:
    """A rule that picks the frames of clips, by SAMPLING_RULE.

    frames: lengths of clips on offer, rising. stride: slots from one frame of a clip to the next. views: clips of one
    video. fps: slots a second; None for the video's own frames. short: what becomes of videos that are too short for
    the shortest length. seed: of "random", 0 to 2^64 - 1.

    Raises:
        ValueError: a setting is not as above, or does not go with another.
    """

    frames: tuple[int, ...]
    stride: int = 1
    placement: str = "center"
    views: int = 1
    fps: float | None = None
    short: str = "repeat"
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.frames or self.frames[0] < 1 or any(a >= b for a, b in pairwise(self.frames)):
            raise ValueError(f"frames: expected numbers of frames from 1 that rise, got {_listed(self.frames)}")
        for name, value in (("stride", self.stride), ("views", self.views)):
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        for name, text, known in (("placement", self.placement, PLACEMENTS), ("short", self.short, SHORT)):
            if text not in known:
                raise ValueError(f"{name}: expected one of {', '.join(known)}, got {text!r}")
        if self.fps is not None and not 0 < self.fps < math.inf:
            raise ValueError(f"fps: expected more than 0 frames a second, got {self.fps}")
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed: expected 0 to 2^64 - 1, got {self.seed}")
        if self.placement == "uniform" and (self.stride != 1 or self.fps is not None):
            raise ValueError(
                f"placement uniform spreads a clip over the whole video: expected stride 1 and no fps, got stride "
                f"{self.stride} and fps {self.fps}; leave them out, or place clips by start, center or random"
            )
        if self.placement == "start" and self.views > 1:
            raise ValueError(
                f"placement start: expected 1 view, got {self.views}, which would all be the same; "
                "several views need center, random or uniform"
            )

    def length(self, info: VideoInfo) -> int:
        """The clips' length as an index into `frames`.

        Raises:
            VideoError: the video is too short and `short` is "leave-out", or its frames have no times as `fps` needs.
        """
        return self._length(_Slots(info, self.fps).count)

    def _length(self, slots: int) -> int:
        fitting = [i for i, length in enumerate(self.frames) if self._span(length) <= slots]
        if fitting:
            return fitting[-1]
        if self.short == "leave-out":
            span = self._span(self.frames[0])
            rate = "" if self.fps is None else f" at {self.fps:g} a second"
            raise VideoError(f"too short: {slots} frames{rate}, a clip of {self.frames[0]} needs {span}")
        return 0

    def indices(self, info: VideoInfo, key: str, view: int = 0) -> np.ndarray:
        """The clip's frames: int32 [frames[length(info)]] in [0, info.frames), in the order of presentation; they fall
        only where a short video is looped.

        Args:
            key: the video's; "random" draws from (seed, key, view) alone.
            view: 0 to views - 1.

        Raises:
            VideoError: as `length`.
            ValueError: no such view.
        """
        if not 0 <= view < self.views:
            raise ValueError(f"view: expected 0 to {self.views - 1}, got {view}")
        slots = _Slots(info, self.fps)
        length = self.frames[self._length(slots.count)]
        steps = np.arange(length, dtype=np.int64)
        room = slots.count - self._span(length)
        if room < 0:
            chosen = steps * self.stride
            chosen = chosen % slots.count if self.short == "loop" else chosen.clip(max=slots.count - 1)
        elif self.placement == "uniform":
            chosen = slots.count * (2 * (self.views * steps + view) + 1) // (2 * self.views * length)
        else:
            chosen = self._start(room, key, view) + steps * self.stride
        return slots.frames_at(chosen)

    def clip_key(self, key: str, view: int) -> str:
        """The key of a view's row: the video's own where there is one view, else KEY@VIEW."""
        return key if self.views == 1 else f"{key}@{view}"

    def settings(self) -> dict[str, Any]:
        """What provenance records, and what must not change within a dataset; as JSON."""
        settings: dict[str, Any] = {
            "rule": SAMPLING_RULE, "frames": list(self.frames), "stride": self.stride, "placement": self.placement,
            "views": self.views, "fps": self.fps, "short": self.short,
        }  # fmt: skip
        if self.placement == "random":
            settings["seed"] = self.seed
        return settings

    @classmethod
    def from_settings(cls, settings: dict[str, Any]) -> FrameSampling:
        """The inverse of `settings`.

        Raises:
            ValueError: another rule, or fields that are none of ours.
        """
        if settings.get("rule") != SAMPLING_RULE:
            raise ValueError(f"sampling rule: expected {SAMPLING_RULE!r}, got {settings.get('rule')!r:.100}")
        fields = {name: value for name, value in settings.items() if name != "rule"}
        try:
            sampling = cls(**{**fields, "frames": tuple(fields["frames"])})
            known = sampling.settings() == settings
        except (KeyError, TypeError):
            known = False
        if not known:
            raise ValueError(f"sampling: expected settings as of {SAMPLING_RULE}, got {settings!r:.300}")
        return sampling

    def _span(self, length: int) -> int:
        """Slots from a clip's first frame to its last, both counted."""
        return length if self.placement == "uniform" else (length - 1) * self.stride + 1

    def _start(self, room: int, key: str, view: int) -> int:
        if self.placement == "start":
            return 0
        if self.placement == "center":
            return room // 2 if self.views == 1 else room * view // (self.views - 1)
        # Another text than the one that a random crop hashes, so that place and time are independent.
        text = f"start {view} of {key}".encode("utf-8", "surrogatepass")
        return (xxhash.xxh3_64_intdigest(text, seed=self.seed) * (room + 1)) >> 64


class _Slots:
    """The slots of one video: see SAMPLING_RULE."""

    def __init__(self, info: VideoInfo, fps: float | None) -> None:
        assert info.frames >= 1, info
        self._seconds: np.ndarray | None = None
        self.count = info.frames
        if info.seconds is None:
            if fps is not None:
                raise VideoError("a folder of frames has no times, which fps needs: leave fps out")
            return
        seconds = np.asarray(info.seconds, dtype=np.float64) - info.seconds[0]
        if info.frames == 1 or (fps is None and _evenly_spaced(seconds)):
            return
        if not seconds[-1] > 0:
            raise VideoError(f"{info.frames} frames with the same time")
        interval = float(seconds[-1]) / (info.frames - 1)
        self._rate, self._tick = fps or 1 / interval, min(TICK, interval / 4)
        self._seconds = seconds
        # Two ticks: the end is the last time, which may be one off, and its share of an interval.
        slots = (float(seconds[-1]) + interval - 2 * self._tick) * self._rate
        if slots > MAX_SLOTS:
            raise VideoError(f"{slots:.3g} slots at {self._rate:g} a second, more than {MAX_SLOTS:.3g}")
        self.count = max(1, math.ceil(slots))

    def frames_at(self, slots: np.ndarray) -> np.ndarray:
        """int32 [T]: the frames that these slots show."""
        if self._seconds is not None:
            slots = np.searchsorted(self._seconds, slots / self._rate + self._tick, side="right") - 1
        return slots.astype(np.int32)


def _evenly_spaced(seconds: np.ndarray) -> bool:
    """Frames within a quarter of an interval (8 ms at 30 a second: the jitter of phones) are nearest to their own
    places, so that numbers are the better measure; a frame missing in the middle moves its neighbours by half a one."""
    interval = float(seconds[-1]) / (len(seconds) - 1)
    places = np.arange(len(seconds)) * interval
    return bool(np.abs(seconds - places).max() <= max(interval / 4, TICK))


def _listed(numbers: tuple[int, ...]) -> str:
    return ", ".join(map(str, numbers)) or "none"
