"""musubi-tuner's latent cache: a file for each image or clip, {stem}_{WWWW}x{HHHH}_{architecture}.safetensors.

The tensor `latents_[{F}x]{H}x{W}_{dtype}` [C, F, H, W] or [C, H, W] is the row; what else a file holds (latents of
start and control images, embeddings, indices) and its metadata stay beside it, byte for byte. Text encoder caches
(_te.safetensors) are not read. Round trip: files of the same names with the same tensors, names and metadata.

How values are scaled follows from the architecture that a file names: HunyuanVideo's are as the autoencoder gives them,
FramePack's and FLUX.1 Kontext's are scaled by one number; Wan, Qwen-Image and others are normalised for each channel,
which no (factor, shift) says, so that nothing is claimed of them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastlatent.caches.cache import DTYPES, REST, Cache, CacheItem, CacheRow, DamagedEntry, Told
from fastlatent.caches.mar import ignored
from fastlatent.caches.outgoing import Outgoing, OutRow, put, target
from fastlatent.data.tensor_files import TensorEntry, file_bytes, read_header
from fastlatent.sources.files import Files, Found, read_each

TITLE = "musubi-tuner: {stem}_{WWWW}x{HHHH}_{architecture}.safetensors, one for each image or clip"
PAYLOADS = ("latents",)
SCALING = None
SUFFIX = ".safetensors"
FILE = re.compile(r".*_\d{4,}x\d{4,}_[^_/]+\.safetensors", re.DOTALL)
MAIN = re.compile(r"latents_(?:\d+x)?(\d+)x(\d+)_(\w+)")
MAIN_NAME = "fastlatent.latents"  # in the rest's metadata: what the row's tensor was called
SCALED = {"hunyuan_video": (1.0, 0.0), "framepack": (0.476986, 0.0), "flux_kontext": (0.3611, 0.1159)}
NAMES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}


@dataclass(frozen=True, slots=True)
class Seen:
    """What a file's header says: the row's tensor by name and entry, and which model it is for."""

    name: str
    main: TensorEntry
    architecture: str

    @property
    def kind(self) -> tuple[Any, ...]:
        """What must be the same in all files."""
        return self.main.dtype, self.main.shape[0], len(self.main.shape)


def claims(files: Files, found: Sequence[Found]) -> int:
    return sum(FILE.fullmatch(one.path) is not None for one in found)


def open_cache(files: Files, found: Sequence[Found], told: Told) -> Cache:
    own = {one.path: one for one in found if FILE.fullmatch(one.path)}

    def look(path: str) -> Seen:
        entries, metadata = read_header(lambda at, count: files.read_range(path, at, count), own[path].size)
        return seen(entries, metadata)

    left_out: dict[str, str] = {}
    good: list[tuple[Found, Seen]] = []
    for one, got in zip(own.values(), read_each(own, look), strict=True):
        if isinstance(got, Exception):
            left_out[files.place(one.path)] = str(got)
        else:
            good.append((one, got))
    if not good:
        why = next((f"; {place}: {why}" for place, why in left_out.items()), "")
        raise ValueError(f"{files.root}: expected files with a tensor latents_FxHxW_dtype, got none{why}")
    models = Counter(got.architecture for _, got in good)
    if len(models) > 1:
        listed = ", ".join(f"{name or 'none'} ({count:,} files)" for name, count in models.most_common())
        raise ValueError(
            f"{files.root}: expected latents of one architecture, got {listed}: convert each from a folder of its own"
        )
    architecture = next(iter(models))
    kind = Counter(got.kind for _, got in good).most_common(1)[0][0]
    for one, got in good:
        if got.kind != kind:
            left_out[files.place(one.path)] = f"expected {_said(kind)} as in most files, got {_said(got.kind)}"
    good = [(one, got) for one, got in good if got.kind == kind]
    dtype = np.dtype(str(DTYPES[kind[0]]))

    def row(item: CacheItem, data: bytes) -> CacheRow:
        entries, metadata = read_header(lambda at, count: data[at : at + count], len(data))
        got = seen(entries, metadata)
        if (got.main.dtype, got.main.shape) != (kind[0], item.at[1]):
            raise DamagedEntry(
                f"expected {kind[0]} {list(item.at[1])} as when it was listed, got {got.main.dtype} "
                f"{list(got.main.shape)}: the file changed meanwhile; run the same command again"
            )
        view = memoryview(data)
        rest = file_bytes(
            {
                name: (one.dtype, one.shape, view[one.begin : one.end])
                for name, one in entries.items()
                if name != got.name
            },
            metadata | {MAIN_NAME: got.name},
        )
        count = (got.main.end - got.main.begin) // dtype.itemsize
        return CacheRow(
            np.frombuffer(data, dtype, count, got.main.begin).reshape(1, *got.main.shape),
            orig_hw=_pixels(metadata),
            extras={"rest": np.frombuffer(rest, np.uint8)},
        )

    shapes: dict[tuple[int, ...], tuple[int, ...]] = {}  # one object for each
    return Cache(
        items=[
            CacheItem(
                one.path.removesuffix(SUFFIX), files.place(one.path), one.size, one.stamp,
                at=(one.path, shapes.setdefault(got.main.shape, got.main.shape)),
            )
            for one, got in good
        ],
        payload="latents",
        dtype=kind[0],
        buckets=tuple((1, *shape) for shape in sorted(shapes)),
        content=lambda item: files.read(item.at[0]),
        row=row,
        fields=(REST,),
        scaling=SCALED.get(architecture),
        facts={"architecture": architecture},
        left_out=left_out,
        ignored=ignored([one for one in found if one.path not in own]),
        remarks=()
        if architecture in SCALED
        else (f"{architecture or 'files without an architecture'}: how latents were normalised is not in the files",),
    )  # fmt: skip


def seen(entries: Mapping[str, TensorEntry], metadata: Mapping[str, str]) -> Seen:
    """The row's tensor of one file.

    Raises:
        DamagedEntry: there is none, or more than one, or it is not what its name says.
    """
    matches = [(name, match) for name in entries if (match := MAIN.fullmatch(name))]
    if len(matches) != 1:
        got = ", ".join(name for name, _ in matches) or ", ".join(entries) or "no tensors"
        raise DamagedEntry(f"expected one tensor latents_FxHxW_dtype, got {got:.200}")
    name, match = matches[0]
    main = entries[name]
    if main.dtype not in DTYPES or len(main.shape) not in (3, 4) or 0 in main.shape:
        raise DamagedEntry(f"{name}: expected floats [C, F, H, W] or [C, H, W], got {main.dtype} {list(main.shape)}")
    if main.shape[-2:] != (int(match[1]), int(match[2])):
        raise DamagedEntry(f"{name}: expected [..., {match[1]}, {match[2]}] as its name says, got {list(main.shape)}")
    if MAIN_NAME in metadata:
        raise DamagedEntry(f"expected metadata of musubi-tuner, got a key {MAIN_NAME!r}, which this conversion keeps")
    return Seen(name, main, metadata.get("architecture", ""))


def _said(kind: tuple[Any, ...]) -> str:
    dtype, channels, axes = kind
    return f"{dtype} of {axes} axes and {channels} channels"


def _pixels(metadata: Mapping[str, str]) -> tuple[int, int]:
    """(height, width) of the image, (0, 0) where the metadata does not say."""
    said = metadata.get("height", ""), metadata.get("width", "")
    if all(one.isascii() and one.isdigit() and len(one) < 8 for one in said):
        return int(said[0]), int(said[1])
    return 0, 0


def write(outgoing: Outgoing, out: Path) -> Iterator[int]:
    if "architecture" not in outgoing.facts:
        raise ValueError(
            f"{out}: expected a dataset that was converted from musubi-tuner's cache, since files carry the model's "
            "name and what else the model needs, got another: cache the images with musubi-tuner"
        )
    for number in range(outgoing.count):
        row = outgoing.row(number)
        path = target(out, row.key + SUFFIX)
        if not path.exists():
            put(path, _file(row, outgoing.dtype, out))
        yield 1


def _file(row: OutRow, dtype: str, out: Path) -> bytes:
    rest = row.extras.get("rest")
    try:
        if rest is None:
            raise DamagedEntry("got none")
        data = rest.tobytes()
        entries, metadata = read_header(lambda at, count: data[at : at + count], len(data))
        name = metadata.pop(MAIN_NAME, "")
        if MAIN.fullmatch(name) is None or name in entries:
            raise DamagedEntry(f"got the name {name!r:.100} for its latents")
    except DamagedEntry as error:
        raise ValueError(f"{out}: {row.key}: expected `rest` as the conversion made it, {error}") from None
    if NAMES[dtype] != name.split("_", 2)[2]:  # the dataset was made with another --dtype
        name = f"{name.rpartition('_')[0]}_{NAMES[dtype]}"
    view = memoryview(data)
    tensors: dict[str, tuple[str, tuple[int, ...], bytes | memoryview]] = {
        one: (entry.dtype, entry.shape, view[entry.begin : entry.end]) for one, entry in entries.items()
    }
    tensors[name] = (dtype, row.values.shape[1:], row.values.tobytes())
    return file_bytes(tensors, metadata)
