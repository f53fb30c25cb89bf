"""WebDataset tars of latents: `00000.tar` with a.latent.pth, a.cls, a.json, b.latent.pth …; uncompressed.

A sample is the members of a tar whose names agree up to the first dot of the last part. Its latent is the array member
(.npy, .npz, .pt, .pth, .safetensors) whose suffix names one: moments, latents, latent or tokens; else the one without
further suffix, else the only one. `moments_flip.npy` beside `moments.npy`, or an array `moments_flip` in the same file,
is the mirror image. Arrays are [C, ...]; a first size of 1 before three more is a batch of one and taken off. What is
not called moments, latents or tokens is tokens where it has two axes, else latents. `.cls` is the label; all other
members are kept with the row as they are, but for pickles, which are never read.

Written are `moments.npy` (`latents.npy`, `tokens.npy`; `.pth` of bfloat16, which numpy lacks), that of the mirror
image, `.cls`, and a `.json` of key, label, sizes and scaling, by which such tars are read back as the dataset that they
were. Rows that came from foreign tars go back into tars, samples and suffixes of the same names. Round trip: equal
arrays; samples are in the order of their keys, tars of ours have equal bytes.
"""

from __future__ import annotations

import io
import json
import os
import re
import tarfile
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import torch

from fastlatent.caches.cache import REST, Cache, CacheItem, CacheRow, DamagedEntry, Told
from fastlatent.caches.outgoing import Outgoing, OutRow, put_file, target
from fastlatent.caches.shards import Ranges
from fastlatent.caches.tar_samples import FLIP, OURS, Kind, Place, Samples, has_latents, look, read_member, told_by
from fastlatent.data.array_files import (
    DamagedArrays,
    npy_bytes,
    npz_bytes,
    pt_bytes,
    read_safetensors,
    safetensors_bytes,
    to_tensor,
)
from fastlatent.sources.files import Files, Found, read_each
from fastlatent.sources.tar_members import BLOCK
from fastlatent.sources.tars import COMPRESSED

TITLE = "WebDataset: tars of samples with a .npy, .npz, .pt, .pth or .safetensors latent, .cls, .json"
PAYLOADS = ("moments", "latents", "tokens")
SCALING = None
WRITES = (1.0, 0.0)  # (factor, shift) of tars that are written, unless the user says otherwise
EXTRAS = None
LOOK_TARS = 3  # by `claims`


def claims(files: Files, found: Sequence[Found]) -> int:
    tars = [one for one in found if one.path.lower().endswith(".tar")]
    compressed = [one for one in found if one.path.lower().endswith(COMPRESSED)]
    if compressed and len(compressed) == len(found):
        return len(compressed)  # `open_cache` says what to do
    return len(tars) if any(has_latents(files, one) for one in tars[:LOOK_TARS]) else 0


def open_cache(files: Files, found: Sequence[Found], told: Told) -> Cache:
    compressed = [one for one in found if one.path.lower().endswith(COMPRESSED)]
    tars = {one.path: one for one in found if one.path.lower().endswith(".tar")}
    if compressed and not tars:
        raise ValueError(
            f"{files.place(compressed[0].path)}: expected uncompressed tars, whose members can be read one by one; "
            "uncompress it (gunzip, bunzip2, xz -d, zstd -d)"
        )
    seen, left_out, ignored = {}, {}, Counter[str]()
    ranges = Ranges(files)

    def look_into(path: str) -> Samples:
        one = tars[path]
        return look(lambda offset, size: ranges.read(one, offset, min(size, one.size - offset)), one, files.gap)

    for path, looked in zip(tars, read_each(tars, look_into), strict=True):
        if isinstance(looked, Exception):
            left_out[files.place(path)] = str(getattr(looked, "strerror", None) or looked)
            continue
        seen[path] = looked
        left_out |= {files.place(path) + (f"/{name}" if name else ""): why for name, why in looked.left_out.items()}
        ignored += looked.ignored
    ignored += Counter(os.path.splitext(one.path)[1].lower() for one in found if one.path not in tars)
    kinds = sum((one.kinds for one in seen.values()), Counter[Kind]())
    if not kinds:
        why = next((f": {place}: {reason}" for place, reason in left_out.items()), "")
        raise ValueError(f"{files.root}: expected tars with latents, got none in {len(tars)} tars{why}")
    kind, buckets = _settle(kinds, any(place.flip for one in seen.values() for _, place, _ in one.samples))
    ours = [one for tar in seen.values() for one in tar.told]
    pickles = sum((one.pickles for one in seen.values()), Counter[str]())
    remarks = [f"{count:,} members *{name} are pickles: never read, left out" for name, count in pickles.items()]
    if all(ours):
        items, classes, scaling, notes = _items_of_ours(files, seen)
        beside = Counter(one for item in items for one, _, _ in item.at.parts[1 + item.at.flip :] if one != "json")
        remarks += [f"{count:,} members .{suffix} are not converted" for suffix, count in sorted(beside.items())]
    else:
        items, classes = _items(files, seen)
        scaling, notes = (None if kind.payload == "latents" else WRITES), _notes(seen, kind)
        if any(ours):
            remarks.append("some samples are not fastlatent's: what it has written beside the others is not used")
    usual = str(notes.get("suffix", "")), kind.name, kind.batch
    extra = kind.name or len({(one.name, one.batch) for one in kinds}) > 1
    extra = extra or any(len(item.at.parts) > 1 + item.at.flip or item.at.parts[0][0] != usual[0] for item in items)
    return Cache(
        items=items,
        payload=kind.payload,
        dtype=kind.dtype,
        buckets=buckets,
        content=partial(_content, ranges),
        row=partial(_row, frozenset(buckets), kind, None if all(ours) else usual),
        classes=classes,
        fields=(REST,) if extra and not all(ours) else (),
        scaling=scaling,
        notes=notes,
        left_out=left_out,
        ignored=+ignored,
        remarks=tuple(remarks),
        close=ranges.close,
    )


def _settle(kinds: Counter[Kind], flip: bool) -> tuple[Kind, tuple[tuple[int, ...], ...]]:
    """The kind of most rows; and the shapes of all that differ from it in sizes after the channels alone."""

    def family(kind: Kind) -> tuple[Any, ...]:
        channels = kind.shape[-1] if kind.payload == "tokens" else kind.shape[0]
        return kind.payload, kind.dtype, len(kind.shape), channels, kind.rows

    families = Counter[tuple[Any, ...]]()
    for kind, count in kinds.items():
        families[family(kind)] += count
    most = families.most_common(1)[0][0]
    own = [kind for kind in kinds if family(kind) == most]
    rows = 2 if flip else own[0].rows
    return max(own, key=lambda kind: kinds[kind]), tuple(sorted({(rows, *kind.shape) for kind in own}))


def _items(files: Files, seen: Mapping[str, Samples]) -> tuple[list[CacheItem], list[str]]:
    items = [
        CacheItem(
            f"{path[:-4]}/{name}", f"{files.place(path)}/{name}", place.tar.size, place.tar.stamp, label, at=place
        )
        for path, tar in seen.items()
        for name, place, label in tar.samples
    ]
    items.sort(key=lambda item: os.fsencode(item.key))
    return items, [str(i) for i in range(1 + max((item.label for item in items), default=-1))]


def _notes(seen: Mapping[str, Samples], kind: Kind) -> dict[str, Any]:
    """What `write` needs to make tars of the same names: none where one tar's name is a folder of another's."""
    suffixes = Counter(place.parts[0][0] for tar in seen.values() for _, place, _ in tar.samples)
    names = [path[:-4] for path, tar in seen.items() if tar.samples]
    if any(f"{name}/".startswith(f"{other}/") for name in names for other in _folders(name) if other in set(names)):
        names = []
    return {"tars": names, "suffix": suffixes.most_common(1)[0][0], "array": kind.name, "batch": kind.batch}


def _folders(name: str) -> list[str]:
    parts = name.split("/")
    return ["/".join(parts[:i]) for i in range(1, len(parts))]


def _items_of_ours(
    files: Files, seen: Mapping[str, Samples]
) -> tuple[list[CacheItem], list[str], tuple[float, float] | None, dict[str, Any]]:
    """Raises ValueError where tars of several exports are mixed."""
    items, names, scalings = [], dict[int, str](), set()
    for path, tar in seen.items():
        for (name, place, label), said in zip(tar.samples, tar.told, strict=True):
            assert said is not None
            where = f"{files.place(path)}/{name}"
            if label >= 0 and names.setdefault(label, said["label"]) != said["label"]:
                raise ValueError(
                    f"{where}: expected label {label} to be {names[label]!r} as before, got {said['label']!r}: these "
                    "tars are of several datasets; convert each from a folder of its own"
                )
            scalings.add(json.dumps(said["scaling"]))
            group, order = said["group"], said["order"]
            items.append(CacheItem(said["key"], where, place.tar.size, place.tar.stamp, label, group, order, place))
    if len(scalings) > 1:
        raise ValueError(f"{files.root}: expected one scaling in all tars, got {', '.join(sorted(scalings))}")
    items.sort(key=lambda item: (_raw(item.group), item.order, _raw(item.key)))
    scaling = json.loads(scalings.pop())
    factors = WRITES if scaling == "raw" else tuple(scaling) if scaling else None
    return items, [names.get(i, str(i)) for i in range(1 + max(names, default=-1))], factors, {}


def _raw(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def _content(ranges: Ranges, item: CacheItem) -> bytes:
    """The members' bytes, then their suffixes; of a latent alone its bytes."""
    place: Place = item.at
    begin = min(offset for _, offset, _ in place.parts)
    end = max(offset + size for _, offset, size in place.parts)
    if len(place.parts) == 1:
        return ranges.read(place.tar, begin, end - begin)
    if end - begin <= sum(size + 8 * BLOCK for _, _, size in place.parts):
        data = memoryview(ranges.read(place.tar, begin, end - begin))
        pieces: list[Any] = [data[offset - begin : offset - begin + size] for _, offset, size in place.parts]
    else:
        pieces = [ranges.read(place.tar, offset, size) for _, offset, size in place.parts]
    return b"".join((*pieces, "\n".join(suffix for suffix, _, _ in place.parts).encode("utf-8", "surrogateescape")))


def _row(
    buckets: frozenset[tuple[int, ...]], kind: Kind, usual: tuple[str, str, bool] | None, item: CacheItem, data: bytes
) -> CacheRow:
    """usual: suffix, array and batch of most samples, which the others are noted to differ from; None of ours."""
    place: Place = item.at
    view, at, pieces = memoryview(data), 0, []
    for _, _, size in place.parts:
        pieces.append(view[at : at + size])
        at += size
    try:
        values, dtype, found, rest = read_member(place.parts[0][0], pieces[0])
        if place.flip:
            mirror, _, _, _ = read_member(place.parts[1][0], pieces[1])
            if mirror.shape != values.shape or mirror.dtype != values.dtype:
                raise DamagedArrays(f"expected a mirror image {list(values.shape)[1:]}, got {list(mirror.shape)[1:]}")
            values = np.concatenate((values, mirror))
    except DamagedArrays as error:
        raise DamagedEntry(f".{place.parts[0][0]}: {error}") from None
    if values.shape not in buckets or dtype != kind.dtype or found.payload != kind.payload:
        shapes = " or ".join(str(list(shape)) for shape in sorted(buckets)[:4])
        raise DamagedEntry(
            f"expected {kind.payload} {kind.dtype} {shapes} as in most samples, got {found.payload} {dtype} "
            f"{list(values.shape)}"
        )
    if usual is None:
        suffixes = [suffix for suffix, _, _ in place.parts]
        said = told_by(bytes(pieces[suffixes.index("json")])) if "json" in suffixes else None
        if said is None:
            raise DamagedEntry("expected the .json that was there at first: the tar changed")
        return CacheRow(values, tuple(said["orig_hw"]), tuple(said["crop"]))
    rest |= {
        f"/{suffix}": torch.frombuffer(bytearray(piece), dtype=torch.uint8)
        if piece
        else torch.empty(0, dtype=torch.uint8)
        for (suffix, _, _), piece in list(zip(place.parts, pieces, strict=True))[1 + place.flip :]
    }
    own = place.parts[0][0], found.name, found.batch
    called = {} if own == usual else {"suffix": own[0], "array": own[1], "batch": "1" if own[2] else ""}
    packed = safetensors_bytes(rest, called) if rest or called else b""
    return CacheRow(values, extras={REST.name: np.frombuffer(packed, np.uint8)})


def write(outgoing: Outgoing, out: Path) -> Iterator[int]:
    """Tars of the names they had, else shard-000000.tar … of outgoing.rows_per_shard."""
    tars = [str(one) for one in outgoing.notes.get("tars", ())]
    if not tars:
        for number, begin in enumerate(range(0, outgoing.count, outgoing.rows_per_shard)):
            end = min(begin + outgoing.rows_per_shard, outgoing.count)
            _put_tar(target(out, f"shard-{number:06d}.tar"), outgoing, begin, end, None)
            yield end - begin
        return
    known, begin = set(tars), 0
    while begin < outgoing.count:
        key = outgoing.row(begin).key
        tar = next((one for one in _folders(key) if one in known), None)
        if tar is None:
            raise ValueError(f"{key!r}: expected a key below one of the tars of the cache, {', '.join(tars)!r:.200}")
        prefix = _raw(tar) + b"/"

        def beyond(i: int, prefix: bytes = prefix) -> bool:
            return not _raw(outgoing.row(i).key).startswith(prefix)

        end = bisect_left(range(outgoing.count), True, begin, key=beyond)
        _put_tar(target(out, f"{tar}.tar"), outgoing, begin, end, tar)
        yield end - begin
        begin = end


def _put_tar(path: Path, outgoing: Outgoing, begin: int, end: int, tar: str | None) -> None:
    if path.exists():
        return

    def fill(file: BinaryIO) -> None:
        stream = io.BufferedWriter(cast(io.RawIOBase, file), 1 << 20)
        for i in range(begin, end):
            row = outgoing.row(i)
            for name, data in _ours(outgoing, row) if tar is None else _foreign(outgoing, row, tar):
                stream.write(tar_header(name, len(data)))
                stream.write(data)
                stream.write(bytes(-len(data) % BLOCK))
        stream.write(bytes(2 * BLOCK))
        stream.flush()
        stream.detach()

    put_file(path, fill)


def _ours(outgoing: Outgoing, row: OutRow) -> Iterator[tuple[str, bytes]]:
    """A row's members. Names that webdataset would cut at a dot, or pass over, are percent-encoded."""
    folder, slash, base = row.key.replace("%", "%25").rpartition("/")
    folder = re.sub(r"(^|/)\.", r"\1%2E", folder)
    sample = folder + slash + base.replace(".", "%2E")
    if row.key.startswith("/") or {"", ".."} & set(row.key.split("/")):
        raise ValueError(f"key {row.key!r}: expected a relative path; a tar holds no other")
    kind = "pth" if outgoing.dtype == "BF16" else "npy"
    for values, flip in zip(row.values, ("", FLIP), strict=False):
        yield f"{sample}.{outgoing.payload}{flip}.{kind}", _member(kind, {"": values}, outgoing.dtype)
    if row.label >= 0:
        yield f"{sample}.cls", str(row.label).encode()
    told = {
        "crop": list(row.crop),
        "format": OURS,
        "group": row.group,
        "key": row.key,
        "label": outgoing.classes[row.label] if row.label >= 0 else "",
        "order": row.order,
        "orig_hw": list(row.orig_hw),
        "scaling": "raw" if outgoing.scaling == WRITES else outgoing.scaling,
    }
    yield f"{sample}.json", json.dumps(told, sort_keys=True, separators=(",", ":")).encode()
    for name, array in sorted(row.extras.items()):
        if name == "caption":
            yield f"{sample}.txt", array.tobytes()
        else:
            yield f"{sample}.{name}.npy", npy_bytes(array)


def _foreign(outgoing: Outgoing, row: OutRow, tar: str) -> Iterator[tuple[str, bytes]]:
    """A row's members as they were called in the tar that it came from."""
    sample, rest = row.key[len(tar) + 1 :], row.extras.get(REST.name)
    others, called = read_safetensors(rest.tobytes()) if rest is not None and len(rest) else ({}, {})
    notes = {**outgoing.notes, **called}
    beside = {name[1:]: tensor.numpy().tobytes() for name, tensor in others.items() if name.startswith("/")}
    within = {name: tensor for name, tensor in others.items() if not name.startswith("/")}
    stem, _, kind = str(notes["suffix"]).rpartition(".")
    if kind == "npy" and outgoing.dtype == "BF16":
        kind = "pth"
    parts = [values[None] if notes["batch"] else values for values in row.values]
    if notes["array"] or kind in ("npz", "safetensors"):
        name = str(notes["array"]) or outgoing.payload
        named = dict(zip((name, name + FLIP), parts, strict=False))
        yield f"{sample}.{f'{stem}.' if stem else ''}{kind}", _member(kind, named, outgoing.dtype, within)
    else:
        for values, flip in zip(parts, ("", FLIP), strict=False):
            stem = stem or (outgoing.payload if len(parts) > 1 else "")
            yield f"{sample}.{f'{stem}{flip}.' if stem else ''}{kind}", _member(kind, {"": values}, outgoing.dtype)
    if row.label >= 0:
        yield f"{sample}.cls", str(row.label).encode()
    yield from ((f"{sample}.{suffix}", data) for suffix, data in sorted(beside.items()))


def _member(
    kind: str, arrays: Mapping[str, np.ndarray], dtype: str, others: Mapping[str, torch.Tensor] | None = None
) -> bytes:
    """The file of a latent: `arrays` by name, "" for one without."""
    if kind == "npy":
        return npy_bytes(arrays[""])
    tensors = {name: to_tensor(array, dtype) for name, array in arrays.items()} | dict(others or {})
    if kind == "safetensors":
        return safetensors_bytes(tensors)
    if kind == "npz":
        return npz_bytes({name: tensor.numpy() for name, tensor in tensors.items()})
    return pt_bytes(tensors[""] if set(arrays) == {""} else tensors)


def tar_header(name: str, size: int) -> bytes:
    """The block (blocks, for a name that is long or not ASCII) before a member of `size` bytes; no time, no owner."""
    if len(name) <= 100 and name.isascii() and size < 8 << 30:  # 3 µs; tarfile takes 30
        block = bytearray(_TEMPLATE)
        block[: len(name)] = name.encode("ascii")
        block[124:135] = b"%011o" % size
        block[148:156] = b"%06o\0 " % sum(block)
        return bytes(block)
    info = tarfile.TarInfo(name)
    info.size = size
    return info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")


def _template() -> bytes:
    block = bytearray(tarfile.TarInfo("").tobuf(tarfile.USTAR_FORMAT))
    block[148:156] = b" " * 8  # the checksum counts as spaces while it is computed
    return bytes(block)


_TEMPLATE = _template()
