"""Trajectories' frames: `[<dataset>/]<trajectory>/{0.pt, 1.pt, …, traj_data.pkl}`, a latent [C, h, w] in each file.

A file is a tensor, a dict with `latent`, a list or an array; `write` makes {"latent": tensor} of each. Positions and
yaw are those of traj_data.pkl; where no trajectory has one, there are none. A trajectory is used whole or not at all:
a frame that is missing would shift the poses of all that follow.

Round trip: equal arrays under equal names, but float32 within one unit in the last place (6e-8) where values were
scaled; poses equal as float64, yaw [T] where it was [T, 1].
"""

from __future__ import annotations

import os
import struct
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastlatent.caches.cache import Cache, CacheItem, CacheRow, Told, check_row
from fastlatent.caches.outgoing import Outgoing, OutRow, put, target
from fastlatent.caches.pt_files import NUMBER, SUFFIX, LatentReader, first_look, kinds, number_of
from fastlatent.data.array_files import pt_bytes, to_tensor
from fastlatent.sources.files import Files, Found, read_each
from fastlatent.sources.items import stamp_of
from fastlatent.sources.trajectories import POSES, check_poses, in_order
from fastlatent.sources.unpickle import MAX_BYTES, read_arrays
from fastlatent.store.records import Field

TITLE = "navigation world models: <trajectory>/0.pt, 1.pt …, all called by numbers, [C, h, w], with traj_data.pkl"
PAYLOADS = ("latents",)
SCALING = (0.18215, 0.0)  # the autoencoder's of Stable Diffusion
EXTRAS = ("position", "yaw")
FIELDS = (Field("position", "F64", (2,)), Field("yaw", "F64", ()))
POSE_BYTES = 24


def claims(files: Files, found: Sequence[Found]) -> int:
    return kinds(files, found)["frames"]


@dataclass(frozen=True)
class Trajectory:
    """frames: 0 to T−1. poses: float64 [T, 3], position and yaw; None where the cache has none. more: other arrays."""

    frames: list[Found]
    poses: np.ndarray | None
    more: tuple[str, ...] = ()


def open_cache(files: Files, found: Sequence[Found], told: Told) -> Cache:
    frames, poses, ignored = sort(found)
    if "" in frames and len(frames) == 1:
        raise ValueError(f"{files.root}: expected <trajectory>/0.pt …, got one trajectory: convert the folder above it")
    left_out: dict[str, str] = {}
    used: dict[str, Trajectory] = {}
    names = sorted({*frames, *poses}, key=os.fsencode)
    for name, one in zip(names, read_each(names, lambda name: read(files, name, frames, poses)), strict=True):
        if isinstance(one, Exception):
            left_out[files.place(name)] = str(one)
        else:
            used[name] = one
    frames.clear()
    first = first_look(files, [frame for one in used.values() for frame in one.frames[:1]])
    if first is None:
        reasons = "".join(f"; {place}: {why}" for place, why in list(left_out.items())[:3])
        raise ValueError(
            f"{files.root}: expected <trajectory>/0.pt, 1.pt …, got none that can be used{reasons}; if these are no "
            "frames but images with numbers for names, say --format simpletuner"
        )
    if len(first.shape) != 3:
        raise ValueError(f"{files.root}: expected frames [C, h, w], got {list(first.shape)}: say another --format")
    shape, dtype, posed, latents = first.shape, first.dtype, bool(poses), LatentReader()

    def content(item: CacheItem) -> bytes:
        data = files.read(item.key + SUFFIX)
        table = used[item.group].poses
        return data if table is None else data + table[item.order].tobytes()

    def row(item: CacheItem, data: bytes) -> CacheRow:
        values, _ = latents.read(data[:-POSE_BYTES] if posed else data)
        values = check_row(values, (1, *shape), dtype)
        if not posed:
            return CacheRow(values)
        pose = np.frombuffer(data, "<f8", 3, len(data) - POSE_BYTES)
        return CacheRow(values, extras={"position": pose[:2], "yaw": pose[2:].reshape(())})

    items = [item for name, one in used.items() for item in items_of(files, name, one)]
    for name, one in used.items():
        used[name] = Trajectory([], one.poses, one.more)
    return Cache(
        items=items,
        payload="latents",
        dtype=dtype,
        buckets=((1, *shape),),
        content=content,
        row=row,
        fields=FIELDS if posed else (),
        left_out=left_out,
        ignored=ignored,
        remarks=tuple(remarks(used, first.rest, posed)),
    )


def sort(found: Sequence[Found]) -> tuple[dict[str, list[tuple[int, Found]]], dict[str, Found], dict[str, int]]:
    """trajectory -> its numbered frames; trajectory -> its pickle; suffix -> how many other files."""
    frames: dict[str, list[tuple[int, Found]]] = {}
    poses: dict[str, Found] = {}
    ignored: Counter[str] = Counter()
    for one in found:
        folder, _, name = one.path.rpartition("/")
        number = number_of(one) if name.endswith(SUFFIX) else None
        if number is not None:
            frames.setdefault(folder, []).append((number, one))
        elif name == POSES:
            poses[folder] = one
        else:
            ignored[os.path.splitext(name)[1].lower()] += 1
    return frames, poses, dict(ignored)


def read(files: Files, name: str, frames: dict[str, list[tuple[int, Found]]], poses: dict[str, Found]) -> Trajectory:
    """One trajectory; ValueError or OSError says why it is left out."""
    if name not in frames:
        raise ValueError("no frame called 0.pt, 1.pt …")
    if not name:
        raise ValueError("frames beside the folders of trajectories; expected <trajectory>/0.pt …")
    ordered = in_order(frames[name])
    if not poses:
        return Trajectory(ordered, None)
    if name not in poses:
        raise ValueError(f"no {POSES}, which other trajectories have")
    if poses[name].size > MAX_BYTES:
        raise ValueError(f"{POSES} has {poses[name].size} bytes; at most {MAX_BYTES} are read")
    try:
        arrays = read_arrays(files.read(poses[name].path))
        position, yaw = check_poses(arrays)
    except ValueError as error:
        raise ValueError(f"{POSES}: {error}") from None
    if len(position) != len(ordered):
        raise ValueError(f"{len(ordered)} frames, but {len(position)} poses in {POSES}")
    table = np.concatenate([position, yaw[:, None]], axis=1, dtype="<f8")
    return Trajectory(ordered, table, tuple(sorted(arrays.keys() - {"position", "yaw"})))


def items_of(files: Files, name: str, one: Trajectory) -> Iterator[CacheItem]:
    for order, frame in enumerate(one.frames):
        stamp = frame.stamp
        if one.poses is not None:
            stamp = stamp_of(stamp, {"pose": one.poses[order].tolist()})
        key = frame.path.removesuffix(SUFFIX)
        yield CacheItem(key, files.place(frame.path), frame.size, stamp, group=name, order=order)


def remarks(used: dict[str, Trajectory], rest: bool, posed: bool) -> Iterator[str]:
    if not posed:
        yield f"no {POSES}: rows have no position and yaw"
    if rest:
        yield "the files hold more than the latent, which is not converted"
    more = Counter(name for one in used.values() for name in one.more)
    if more:
        yield f"{POSES}: only position and yaw are converted, not " + ", ".join(
            f"{name} ({count:,} trajectories)" for name, count in sorted(more.items())
        )


def write(outgoing: Outgoing, out: Path) -> Iterator[int]:
    if len(outgoing.shapes) != 1 or len(outgoing.shapes[0]) != 4 or outgoing.shapes[0][0] != 1:
        raise ValueError(
            f"{out}: expected rows of one shape [1, C, h, w], got {[list(shape) for shape in outgoing.shapes]}: frames "
            "have no mirror images and one size"
        )
    poses: list[tuple[float, ...]] = []
    group = None
    for number in range(outgoing.count):
        row = outgoing.row(number)
        if not row.group:
            raise ValueError(f"{out}: expected rows of trajectories, got {row.key!r:.200} of none: try simpletuner")
        if row.group != group:
            finish(out, group, poses)
            group, poses, order = row.group, [], 0
        if row.order != order:
            raise ValueError(
                f"{out}: expected frame {order} of {group!r:.200}, got {row.order}: it is missing from the dataset "
                "(see its quarantine), and frames are counted; take the trajectory out with `fastlatent filter`"
            )
        order += 1
        if "position" in row.extras and "yaw" in row.extras:
            poses.append((*row.extras["position"].tolist(), float(row.extras["yaw"])))
        path = target(out, f"{group}/{name_of(row)}{SUFFIX}")
        if not path.exists():
            put(path, pt_bytes({"latent": to_tensor(row.values[0], outgoing.dtype)}))
        yield 1
    finish(out, group, poses)


def name_of(row: OutRow) -> str:
    """The frame's number, written as in the key ("traj/007" or "traj/7.jpg") if it is there."""
    stem = row.key.rpartition("/")[2].partition(".")[0]
    return stem if NUMBER.fullmatch(stem) and int(stem) == row.order else str(row.order)


def finish(out: Path, group: str | None, poses: list[tuple[float, ...]]) -> None:
    if group is not None and poses:
        table = np.array(poses, "<f8")
        put(target(out, f"{group}/{POSES}"), pickled({"position": table[:, :2], "yaw": table[:, 2]}))


def pickled(arrays: dict[str, np.ndarray]) -> bytes:
    """A dict of float64 arrays as pickle's protocol 4 has it, with the names that both numpy 1 and 2 know.

    numpy 2 itself would name numpy._core, which numpy before 1.26 lacks.
    """
    parts = [b"\x80\x04}("]
    for name, array in arrays.items():
        data = np.ascontiguousarray(array, "<f8").tobytes()
        parts += [text(name), b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\0\x85C\x01b\x87R"]
        parts += [b"(K\x01(", *(b"J" + struct.pack("<i", size) for size in array.shape), b"t"]
        parts += [b"cnumpy\ndtype\n", text("f8"), b"\x89\x88\x87R(K\x03", text("<"), b"NNN", 2 * b"J\xff\xff\xff\xff"]
        parts += [b"K\0tb\x89B", struct.pack("<I", len(data)), data, b"tb"]
    return b"".join([*parts, b"u."])


def text(value: str) -> bytes:
    return b"\x8c" + bytes([len(value)]) + value.encode()
