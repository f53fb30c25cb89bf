"""Trajectories: `root/<trajectory>/0.jpg 1.jpg … traj_data.pkl`, the layout of the navigation world models. Torch-free.

A trajectory is used whole or not at all: a frame that is missing would shift the poses of all that follow.
"""

from __future__ import annotations

import os
import re
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import overload

import numpy as np

from fastlatent.sources.files import Files, Found, Listing, open_beside, open_files, read_each
from fastlatent.sources.items import Column, Item, Source, stamp_of
from fastlatent.sources.unpickle import MAX_BYTES, read_arrays

POSES = "traj_data.pkl"
COLUMNS = (Column("position", "F64", (2,)), Column("yaw", "F64", ()))
DATASET_NAMES = {"tartan": "tartan_drive"}  # folder -> what the latents' readers call it
_FRAME = re.compile(r"([0-9]{1,9})\.(?:jpe?g|png)", re.IGNORECASE)


def scan_trajectories(root: str | os.PathLike[str], *, names: str | os.PathLike[str] | None = None) -> Source:
    """List the frames `root/<trajectory>/N.jpg` (.jpeg, .png) in numeric order, with position F64 [2] and yaw F64 [].

    group is the trajectory's folder, order the frame's number, key "<trajectory>/<file>"; there are no labels.
    Poses are numbers as traj_data.pkl holds them: position [T, 2] and yaw [T] or [T, 1]. A trajectory is in left_out
    if its pickle is missing or holds anything else, its numbers are not 0 to T−1, a number occurs twice (1.jpg and
    1.png), or a frame cannot be read. Files of other names are passed over, and so are folders with neither
    frames nor poses. Every used pickle is in `beside`, as it is.

    Args:
        names: a text file of the trajectories to take, one name a line, blank lines ignored; None takes all.

    Raises:
        ValueError: root cannot be listed or has no trajectory that can be used, or a name is not there.
    """
    files = open_files(root)
    try:
        listing = files.listing()
    except OSError as error:
        raise ValueError(f"trajectories {files.root!r} cannot be listed: {error}; expected a folder") from None
    frames, poses, ignored = _sort(listing)
    broken = _broken(listing.left_out)
    wanted = sorted({*frames, *poses, *broken}, key=os.fsencode)
    if names is not None:
        empty = [folder for folder in listing.folders if "/" not in folder]
        wanted = _chosen(names, sorted({*wanted, *empty}, key=os.fsencode), files.root)
    left_out: dict[str, str] = {}
    used: list[_Trajectory] = []
    for name, trajectory in zip(wanted, read_each(wanted, _reader(files, frames, poses, broken)), strict=True):
        if isinstance(trajectory, Exception):
            left_out[name] = str(trajectory)
        else:
            used.append(trajectory)
    if not used:
        reasons = "".join(f"; {name}: {why}" for name, why in list(left_out.items())[:3])
        expected = f"expected <trajectory>/0.jpg, 1.jpg … and {POSES}"
        raise ValueError(f"{files.root!r} has no trajectory that can be used; {expected}{reasons}")
    return Source(
        items=_Frames(files, used),
        read=lambda item: files.read(item.key),
        columns=COLUMNS,
        left_out=left_out,
        ignored=ignored,
        beside={one.poses: _reading(files, one.poses) for one in used},
    )


def find_datasets(root: str | os.PathLike[str]) -> dict[str, str]:
    """The trajectory datasets among the folders of a local folder: name -> path, sorted by name.

    A folder counts if one of its own folders holds traj_data.pkl. Names are those of the folders, but tartan is called
    tartan_drive.

    Raises:
        ValueError: root is no folder, holds no such dataset, or two of one name.
    """
    root = os.fsdecode(root)
    if not os.path.isdir(root):
        raise ValueError(f"{root!r} is no local folder; expected one with a folder per dataset")
    datasets: dict[str, str] = {}
    for folder in sorted(_folders(root), key=os.fsencode):
        path = os.path.join(root, folder)
        if not holds_trajectories(path):
            continue
        name = DATASET_NAMES.get(folder, folder)
        if name in datasets:
            raise ValueError(f"{datasets[name]!r} and {path!r} are both called {name}; move one of them away")
        datasets[name] = path
    if not datasets:
        raise ValueError(f"{root!r} holds no trajectory dataset; expected <dataset>/<trajectory>/{POSES}")
    return dict(sorted(datasets.items()))


def holds_trajectories(path: str) -> bool:
    """Whether a folder of this local folder holds traj_data.pkl; a folder that cannot be listed holds none."""
    return any(os.path.exists(os.path.join(path, folder, POSES)) for folder in _folders(path))


def _folders(path: str) -> Iterator[str]:
    try:
        with os.scandir(path) as entries:
            for entry in entries:
                if not entry.name.startswith(".") and os.path.isdir(entry.path):
                    yield entry.name
    except OSError:
        return


@dataclass(frozen=True)
class _Trajectory:
    """frames: sorted by number, of which there are none but 0 to T−1. position: float64 [T, 2]. yaw: float64 [T]."""

    name: str
    poses: str
    frames: list[Found]
    position: np.ndarray
    yaw: np.ndarray

    def item(self, files: Files, order: int) -> Item:
        found = self.frames[order]
        attached = {"position": self.position[order].tolist(), "yaw": float(self.yaw[order])}
        return Item(
            key=found.path,
            place=files.place(found.path),
            size=found.size,
            stamp=stamp_of(found.stamp, attached),
            group=self.name,
            order=order,
            attached=attached,
        )


class _Frames(Sequence[Item]):
    """The items of all trajectories, made when asked for; poses stay arrays, a tenth of the memory."""

    def __init__(self, files: Files, trajectories: list[_Trajectory]) -> None:
        self._files, self._trajectories = files, trajectories
        self._starts = [0, *accumulate(len(one.frames) for one in trajectories)]

    def __len__(self) -> int:
        return self._starts[-1]

    @overload
    def __getitem__(self, index: int) -> Item: ...
    @overload
    def __getitem__(self, index: slice) -> list[Item]: ...
    def __getitem__(self, index: int | slice) -> Item | list[Item]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        place = range(len(self))[index]
        which = bisect_right(self._starts, place) - 1
        return self._trajectories[which].item(self._files, place - self._starts[which])

    def __iter__(self) -> Iterator[Item]:
        for one in self._trajectories:
            for order in range(len(one.frames)):
                yield one.item(self._files, order)


def _sort(listing: Listing) -> tuple[dict[str, list[tuple[int, Found]]], dict[str, Found], dict[str, int]]:
    """trajectory -> its numbered frames; trajectory -> its pickle; suffix -> how many other files."""
    frames: dict[str, list[tuple[int, Found]]] = defaultdict(list)
    poses: dict[str, Found] = {}
    ignored: Counter[str] = Counter()
    paths = listing.keys.texts()  # all at once: ten times faster than one by one
    for path, size, stamp in zip(paths, listing.size.tolist(), listing.stamp.tolist(), strict=True):
        folder, _, name = path.rpartition("/")
        frame = _FRAME.fullmatch(name)
        if not folder or "/" in folder or not (frame or name == POSES):
            ignored[os.path.splitext(name)[1].lower()] += 1
        elif frame:
            frames[folder].append((int(frame[1]), Found(path, size, stamp)))
        else:
            poses[folder] = Found(path, size, stamp)
    return frames, poses, dict(ignored)


def _broken(left_out: Mapping[str, str]) -> dict[str, str]:
    """trajectory -> what the listing could not read of it: itself, a frame, or its pickle."""
    broken = {}
    for path, why in left_out.items():
        folder, _, name = path.rpartition("/")
        if not folder or ("/" not in folder and (_FRAME.fullmatch(name) or name == POSES)):
            broken[folder or path] = f"{name}: {why}"
    return broken


def _chosen(names: str | os.PathLike[str], there: list[str], root: str) -> list[str]:
    files, file = open_beside(names)
    try:
        lines = files.read(file).decode("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"the trajectories' names {os.fsdecode(names)!r} cannot be read: {error}") from None
    wanted = {line.strip() for line in lines} - {""}
    missing = sorted(wanted - set(there))
    if not wanted:
        raise ValueError(f"{os.fsdecode(names)!r} names no trajectory; expected one name a line")
    if missing:
        shown = ", ".join(missing[:10]) + (", …" if len(missing) > 10 else "")
        raise ValueError(f"{os.fsdecode(names)!r}: {len(missing)} trajectories are not in {root!r}: {shown}")
    return [name for name in there if name in wanted]


def _reader(
    files: Files, frames: Mapping[str, list[tuple[int, Found]]], poses: Mapping[str, Found], broken: Mapping[str, str]
) -> Callable[[str], _Trajectory]:
    """name -> its trajectory; ValueError or OSError says why it is left out."""

    def read(name: str) -> _Trajectory:
        if name in broken:
            raise ValueError(broken[name])
        if name not in poses:
            raise ValueError(f"no {POSES}")
        if poses[name].size > MAX_BYTES:
            raise ValueError(f"{POSES} has {poses[name].size} bytes; at most {MAX_BYTES} are read")
        ordered = in_order(frames.get(name, []))
        try:
            position, yaw = check_poses(read_arrays(files.read(poses[name].path)))
        except ValueError as error:
            raise ValueError(f"{POSES}: {error}") from None
        if len(position) != len(ordered):
            raise ValueError(f"{len(ordered)} frames, but {len(position)} poses in {POSES}")
        return _Trajectory(name, poses[name].path, ordered, position, yaw)

    return read


def in_order(frames: list[tuple[int, Found]]) -> list[Found]:
    """Numbered frames by number; ValueError unless these are 0 to T−1, each once."""
    if not frames:
        raise ValueError("no frame called 0.jpg, 1.jpg …")
    frames = sorted(frames, key=lambda frame: frame[0])
    for expected, (number, found) in enumerate(frames):
        name = found.path.rpartition("/")[2]
        if number < expected:
            raise ValueError(f"two frames {number}: {frames[expected - 1][1].path.rpartition('/')[2]} and {name}")
        if number > expected:
            raise ValueError(f"frame {expected} is missing; {name} follows")
    return [found for _, found in frames]


def check_poses(arrays: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """float64 position [T, 2] and yaw [T] of what a traj_data.pkl holds; ValueError where they are anything else."""
    if missing := {"position", "yaw"} - arrays.keys():
        raise ValueError(f"no {' and no '.join(sorted(missing))}; it holds {', '.join(sorted(arrays)) or 'nothing'}")
    position, yaw = (arrays[name].astype(np.float64) for name in ("position", "yaw"))
    if yaw.ndim == 2 and yaw.shape[1] == 1:
        yaw = yaw[:, 0]
    if position.ndim != 2 or position.shape[1] != 2 or yaw.shape != position.shape[:1]:
        got = f"{list(position.shape)} and {list(arrays['yaw'].shape)}"
        raise ValueError(f"expected position [T, 2] and yaw [T] or [T, 1], got {got}")
    lost = np.flatnonzero(~(np.isfinite(position).all(axis=1) & np.isfinite(yaw)))
    if len(lost):
        raise ValueError(f"the pose of frame {lost[0]} is not finite")
    return position, yaw


def _reading(files: Files, path: str) -> Callable[[], bytes]:
    return lambda: files.read(path)
