"""Open a dataset: all but the latents is checked here, once; shards open when they are needed."""

from __future__ import annotations

import functools
import mmap
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastlatent.store.build import lock_holder, plan_path, read_journals, read_plan
from fastlatent.store.checked import check_keys, check_offsets, open_checked
from fastlatent.store.files import (
    canonical_json,
    hexadecimal,
    inside,
    member,
    natural,
    parse_json,
    read_bytes,
)
from fastlatent.store.provenance import fingerprint as fingerprint_of
from fastlatent.store.records import (
    FORMAT,
    PAYLOADS,
    ROOT,
    Bucket,
    Field,
    FileRecord,
    Quarantined,
    ShardRecord,
    decode_key,
)
from fastlatent.store.shard import Shard
from fastlatent.store.statistics import Statistics

PROVENANCE = "provenance.json"
RATE_SHARDS = 32  # that the speed of a running encode is told from
GENERATION = "generation"  # holds a copy of every generation's dataset.json
# index column -> (dtype in the file, sizes after the row axis)
INDEX_COLUMNS = {
    "key_hash": ("U64", ()), "bucket": ("U16", ()), "shard": ("U32", ()), "row": ("U32", ()), "label": ("I64", ()),
    "src_size": ("U64", ()), "src_mtime_ns": ("I64", ()), "src_xxh3": ("U64", (2,)), "orig_hw": ("I32", (2,)),
    "crop": ("I32", (4,)),
}  # fmt: skip


@dataclass(frozen=True)
class Totals:
    """Rows in the index, shards in the manifests and their bytes, files in quarantine."""

    rows: int
    shards: int
    bytes: int
    quarantined: int


class Dataset:
    """One generation of a dataset. Row i of every index column describes sample i; samples are in key order.

    Attributes:
        path, generation, fingerprint, provenance ({"hashed", "informational"}), classes (names; a label is an
        index
            into them), totals, buckets, shards, statistics: of this generation.
        key_hash: uint64 [N], xxh3_64 of the key's bytes.
        bucket: uint16 [N], into `buckets`.
        shard, row: uint32 [N], into `shards`, and of that shard's rows.
        label: int64 [N], -1 where there is none.
        src_size, src_mtime_ns, src_xxh3: uint64 [N], int64 [N], uint64 [N, 2] (upper and lower half of
            xxh3_128) of the source file.
        orig_hw, crop: int32 [N, 2], int32 [N, 4]: see `fastlatent.store`.
        key_offsets, key_utf8: uint64 [N+1], uint8: key i is key_utf8[key_offsets[i] : key_offsets[i+1]].
        payload: "moments", "latents" or "tokens". extras: the further tensors of every row.
        groups: which samples belong together; None where the dataset has no groups.
        root: dataset.json itself. quarantine: the entries of the quarantine file.

    The columns are views over one private mapping, shared between processes until something writes to them.
    """

    def __init__(self, path: Path, root: dict[str, Any]):
        what = str(path / ROOT)
        self.path, self.root = path, root
        self.generation = natural(root, "generation", what)
        self.fingerprint = hexadecimal(root, "fingerprint", 64, what)
        self.provenance = read_provenance(path)
        found = fingerprint_of(self.provenance["hashed"])
        if found != self.fingerprint:
            raise ValueError(
                f"{path / PROVENANCE}: expected what has the fingerprint {self.fingerprint}, got {found}: "
                "the file was edited; restore it from a copy, or run `fastlatent repair`"
            )
        self.classes: list[str] = member(root, "classes", list, what)
        if not all(isinstance(name, str) for name in self.classes):
            raise ValueError(f"{what}: 'classes': expected strings, got {self.classes!r:.200}")
        totals = member(root, "totals", dict, what)
        self.totals = Totals(*(natural(totals, name, what) for name in ("rows", "shards", "bytes", "quarantined")))
        self.payload, self.extras = read_fields(root, what)
        buckets = member(root, "buckets", list, what)
        self.buckets = [Bucket.parse(one, f"{what}: buckets", self.payload) for one in buckets]
        self.shards = _read_manifests(path, root, self.fingerprint, len(self.buckets))
        recorded = FileRecord.parse(member(root, "statistics", dict, what), f"{what}: statistics")
        self.statistics = Statistics.from_dict(recorded.read_json(path), str(path / recorded.path))
        self.quarantine = _read_quarantine(path, root)
        opened = _read_index(path, root, self.fingerprint)
        index = opened.columns
        self.key_hash = index["key_hash"]
        self.bucket = index["bucket"]
        self.shard = index["shard"]
        self.row = index["row"]
        self.label = index["label"]
        self.src_size = index["src_size"]
        self.src_mtime_ns = index["src_mtime_ns"]
        self.src_xxh3 = index["src_xxh3"]
        self.orig_hw = index["orig_hw"]
        self.crop = index["crop"]
        self.key_offsets = index["key.offsets"]
        self.key_utf8 = index["key.utf8"]
        self.groups = Groups.parse(index, str(path / ROOT)) if "group" in index else None
        self._check_totals()
        # The checks have read all of it, 110 bytes a sample; what is needed again comes from the page cache.
        opened.mapping.madvise(mmap.MADV_DONTNEED)
        self._open_shards: dict[int, Shard] = {}

    @classmethod
    def open(cls, path: Path | str, *, generation: int | None = None) -> Dataset:
        """Open the current generation, or an earlier one, which stays until `fastlatent gc`.

        Raises:
            ValueError: no dataset there, one that is not finished, another format version, no such generation, or
                damage anywhere but in the latents; it names the file, what was expected and what came.
        """
        path = Path(path)
        root = read_root(path)
        if generation is not None and generation != root["generation"]:
            file = path / GENERATION / f"{generation:06d}.json"
            if not file.is_file():
                kept = sorted(int(one.stem) for one in (path / GENERATION).glob("*.json") if one.stem.isdecimal())
                raise ValueError(
                    f"{path}: expected a generation that is there, {kept or [root['generation']]}, got {generation}"
                )
            root = _checked_root(file)
        return cls(path, root)

    def __len__(self) -> int:
        return self.totals.rows

    def key(self, i: int) -> str:
        """The key of sample i: its relative POSIX path."""
        start, end = self.key_offsets[i : i + 2].tolist()
        return decode_key(self.key_utf8[start:end].tobytes())

    @property
    def quarantined(self) -> list[Quarantined]:
        """Files of this generation's scan that did not become samples, in key order."""
        return [Quarantined.parse(one, "quarantine") for one in self.quarantine]

    def open_shard(self, i: int) -> Shard:
        """Shard i, mapped and kept open; its size, header and columns are checked, the latents not.

        Raises:
            ValueError: missing, truncated, extended, or with another header than the one that was committed.
        """
        if i not in self._open_shards:
            record = self.shards[i]
            self._open_shards[i] = open_checked(self.path, record, self.buckets, self.fingerprint, self.extras)
        return self._open_shards[i]

    def group_rows(self, group: int) -> tuple[int, int, int]:
        """Where group number `group` lies: its shard, the first row there, and how many; in the group's order.

        Raises:
            ValueError: there are no groups, or the rows do not follow each other (a writer keeps them together).
        """
        if self.groups is None:
            raise ValueError(f"{self.path}: expected a dataset with groups, got one without")
        samples = self.groups.samples(group)
        shard, row = self.shard[samples], self.row[samples]
        if (shard != shard[0]).any() or (np.diff(row.astype(np.int64)) != 1).any():
            raise ValueError(f"{self.path}: expected the rows of group {self.groups.key(group)!r} to follow each other")
        return int(shard[0]), int(row[0]), len(row)

    def _check_totals(self) -> None:
        """Raise ValueError where index, manifests and totals contradict each other."""
        what = f"{self.path / ROOT}: expected it to agree with the files it names"
        rows = np.array([shard.rows for shard in self.shards], np.uint64)
        buckets = np.array([shard.bucket for shard in self.shards], np.uint64)
        size = sum(shard.bytes for shard in self.shards)
        found = Totals(len(self.row), len(self.shards), size, len(self.quarantine))
        if found != self.totals or not found.rows:
            raise ValueError(f"{what}, got {self.totals} beside {found}")
        if self.shard.max() >= len(rows) or (self.row >= rows[self.shard]).any():
            raise ValueError(f"{what}, got an index that points past the end of a shard")
        if (self.bucket != buckets[self.shard]).any():
            raise ValueError(f"{what}, got an index and a manifest that give a shard different buckets")
        counts = np.bincount(self.bucket, minlength=len(self.buckets)).tolist()
        if counts != [bucket.rows for bucket in self.buckets]:
            raise ValueError(f"{what}, got {self.buckets} beside {counts} rows in the index")
        if self.label.min() < -1 or self.label.max() >= len(self.classes):
            raise ValueError(f"{what}, got labels outside -1 to {len(self.classes) - 1}")
        channels = {bucket.channels for bucket in self.buckets}
        if channels != {len(self.statistics.mean)}:
            raise ValueError(f"{what}, got statistics of {len(self.statistics.mean)} channels, not {channels}")


@dataclass(frozen=True)
class Groups:
    """Samples that belong together and have an order: the frames of a trajectory, the clips of a video.

    Attributes:
        group: uint32 [N], the number of each sample's group; samples of one group follow each other in the index.
        order: int64 [N], increasing within a group.
        offsets, utf8: uint64 [G+1], uint8: the groups' keys, as those of the samples.
    """

    group: np.ndarray
    order: np.ndarray
    offsets: np.ndarray
    utf8: np.ndarray

    @classmethod
    def parse(cls, index: Mapping[str, np.ndarray], what: str) -> Groups:
        rows = index["row"].shape
        wanted = {
            "group": ("<u4", rows),
            "order": ("<i8", rows),
            "group.offsets": ("<u8", None),
            "group.utf8": ("u1", None),
        }
        for name, (dtype, shape) in wanted.items():
            column = index.get(name)
            if column is None or column.dtype != dtype or column.ndim != 1 or column.shape != (shape or column.shape):
                raise ValueError(f"{what}: expected an index with a column {name!r} of {dtype}, one value per sample")
        groups = cls(*(index[name] for name in wanted))
        check_offsets(groups.offsets, len(groups.utf8), "group.offsets", what)
        if (groups.group[1:] < groups.group[:-1]).any() or int(groups.group[-1]) != len(groups) - 1:
            raise ValueError(f"{what}: expected an index whose groups follow each other, 0 to {len(groups) - 1}")
        return groups

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def key(self, group: int) -> str:
        start, end = self.offsets[group : group + 2].tolist()
        return decode_key(self.utf8[start:end].tobytes())

    def samples(self, group: int) -> slice:
        """The group's samples, in order, as a slice of the index."""
        if not 0 <= group < len(self):
            raise ValueError(f"expected a group from 0 to {len(self) - 1}, got {group}")
        return slice(*np.searchsorted(self.group, [group, group + 1]).tolist())


@dataclass
class BuildState:
    """How far an encode is: of the plan of the coming generation, or zeros while files are being read.

    `bytes` and `statistics` are those of the finished shards (None where there is none); `shapes` are those of the
    rows, [F, 2C, H, W]; `writer` is "pid N on HOST", None where the encode was interrupted; `rows_per_second` is told
    from the last shards, None where fewer than two are finished.
    """

    planned_units: int
    done_units: int
    planned_rows: int
    done_rows: int
    quarantined: int
    bytes: int
    shapes: list[tuple[int, ...]]
    statistics: Statistics | None
    writer: str | None
    last_generation: int | None
    rows_per_second: float | None


def build_state(path: Path | str) -> BuildState | None:
    """The encode that is going on in `path`, or was interrupted there; None where there is neither.

    Raises:
        ValueError: a damaged dataset.json, plan or journal.
    """
    path = Path(path)
    writer = lock_holder(path)
    last = natural(read_root(path), "generation", str(path / ROOT)) if (path / ROOT).is_file() else None
    coming = (last or 0) + 1
    units = []
    if plan_path(path, coming).exists():
        units = read_plan(path, coming, fingerprint_of(read_provenance(path)["hashed"]))
    elif writer is None:
        return None
    journal = read_journals(path, coming)
    done = [journal[unit.id] for unit in units if unit.id in journal]
    parts = [committed.shard.statistics for committed in done if committed.shard]
    return BuildState(
        planned_units=len(units),
        done_units=len(done),
        planned_rows=sum(len(unit.items) for unit in units),
        done_rows=sum(committed.shard.rows for committed in done if committed.shard),
        quarantined=sum(len(committed.quarantined) for committed in done),
        bytes=sum(committed.shard.bytes for committed in done if committed.shard),
        shapes=sorted({unit.bucket for unit in units}),
        statistics=functools.reduce(Statistics.merge, parts) if parts else None,
        writer=writer,
        last_generation=last,
        rows_per_second=_rate([(path / one.shard.path, one.shard.rows) for one in done if one.shard]),
    )


def _rate(shards: list[tuple[Path, int]]) -> float | None:
    """Rows per second over the last shards, by when they were written; pauses between two runs do not count.

    Those are longer than a minute, and than ten times the usual pause: that in which half of the time passed, the
    longest left aside. (A median would be no measure: processes that began together write many shards at once.)
    """
    written = []
    for file, rows in shards:
        with suppress(OSError):
            written.append((file.stat().st_mtime, rows))
    times, counts = np.array(sorted(written)[-RATE_SHARDS:]).reshape(-1, 2).T
    pauses = np.diff(times)
    if not len(pauses) or not pauses.max() > 0:
        return None
    usual = np.sort(pauses)[: max(1, len(pauses) - 1)]
    typical = usual[np.searchsorted(usual.cumsum(), usual.sum() / 2)]
    going_on = pauses <= max(60.0, 10 * typical)
    return float(counts[1:][going_on].sum() / max(pauses[going_on].sum(), 1e-3))


def read_root(path: Path) -> dict[str, Any]:
    """dataset.json, its format, its own digest and its required fields checked.

    Raises:
        ValueError: missing (it says whether an encode is going on), damaged, or of a version not known here.
    """
    file = path / ROOT
    if not file.exists():  # anything else that is no file is refused by `read_bytes`
        raise ValueError(f"{file}: {_why_missing(path)}")
    return _checked_root(file)


def _checked_root(file: Path) -> dict[str, Any]:
    root = parse_json(read_bytes(file), str(file))
    if member(root, "format", str, str(file)) != FORMAT:
        raise ValueError(
            f"{file}: expected format {FORMAT!r}, got {root['format']!r:.100}: use the version of "
            "fastlatent that wrote it, or a newer one"
        )
    stated = hexadecimal(root, "xxh3_128", 32, str(file))
    try:
        found = root_digest(root)
    except ValueError as error:  # nested so deeply that it can be read, and not written
        raise ValueError(f"{file}: {error}") from None
    if stated != found:
        raise ValueError(
            f"{file}: expected contents with xxh3_128 {stated}, got {found}: the file was "
            "edited or damaged; restore it from a copy, or run `fastlatent repair`"
        )
    for field in member(root, "fields", list, str(file)):
        name = member(field, "name", str, f"{file}: fields")
        if field.get("required") is not False and name not in PAYLOADS:
            raise ValueError(
                f"{file}: fields: expected only {sorted(PAYLOADS)} to be required, got {name!r:.100}: "
                "use a newer version of fastlatent"
            )
    return root


def root_digest(root: Mapping[str, Any]) -> str:
    """xxh3_128 of dataset.json's canonical JSON without the member "xxh3_128" that holds it."""
    return FileRecord.of(ROOT, canonical_json({k: v for k, v in root.items() if k != "xxh3_128"})).xxh3_128


def _why_missing(path: Path) -> str:
    if not path.is_dir():
        return f"expected a dataset, got no folder {path}"
    state = build_state(path)
    if state is not None and state.writer is not None:
        return f"the first encode is still going on ({state.writer}, {_progress(state)}); wait for its end"
    if state is not None:
        return f"an encode was interrupted ({_progress(state)}): rerun the same encode command to go on"
    if (path / PROVENANCE).exists():
        return "an encode was interrupted before its first unit: rerun the same encode command"
    return f"expected a dataset, got a folder with {sorted(p.name for p in path.iterdir())[:5]}"


def _progress(state: BuildState) -> str:
    return f"{state.done_units} of {state.planned_units} units done"


def read_provenance(path: Path) -> dict[str, Any]:
    """provenance.json: {"hashed": what the fingerprint is of, "informational": the rest}."""
    file = path / PROVENANCE
    value = parse_json(read_bytes(file), str(file))
    member(value, "hashed", dict, str(file))
    member(value, "informational", dict, str(file))
    return value


def read_fields(root: Mapping[str, Any], what: str) -> tuple[str, list[Field]]:
    """The payload, and the further tensors of every row that are described as this version describes them."""
    fields = member(root, "fields", list, what)
    payloads = [field["name"] for field in fields if field.get("required") is not False]
    if len(payloads) != 1:
        raise ValueError(f"{what}: fields: expected one payload of {sorted(PAYLOADS)}, got {payloads!r:.100}")
    optional = [field for field in fields if field.get("required") is False and {"dtype", "shape"} <= set(field)]
    return payloads[0], [Field.parse(field, f"{what}: fields") for field in optional]


def _read_manifests(path: Path, root: dict[str, Any], fingerprint: str, buckets: int) -> list[ShardRecord]:
    shards = []
    for entry in member(root, "manifests", list, str(path / ROOT)):
        record = FileRecord.parse(entry, f"{path / ROOT}: manifests")
        what = str(path / record.path)
        manifest = record.read_json(path)
        for name, expected in (("format", FORMAT), ("fingerprint", fingerprint)):
            if member(manifest, name, str, what) != expected:
                raise ValueError(f"{what}: {name!r}: expected {expected!r}, got {manifest[name]!r:.100}")
        for one in member(manifest, "shards", list, what):
            shard = ShardRecord.parse(one, f"{what}: shards")
            inside(path, shard.path, f"{what}: shards")
            if shard.bucket >= buckets:
                raise ValueError(f"{what}: expected bucket {shard.bucket} of {shard.path}, got {buckets} buckets")
            shards.append(shard)
    return shards


def _read_index(path: Path, root: dict[str, Any], fingerprint: str) -> Shard:
    entries = member(root, "indexes", list, str(path / ROOT))
    records = [FileRecord.parse(one, f"{path / ROOT}: indexes") for one in entries]
    if len(records) != 1:
        raise ValueError(f"{path / ROOT}: 'indexes': expected one file, got {len(records)}: use a newer fastlatent")
    file = inside(path, records[0].path, str(path / ROOT))
    shard = Shard.open(file, expected_bytes=records[0].bytes)
    records[0].check(file, memoryview(shard.mapping))
    row = shard.columns.get("row")
    rows = len(row) if row is not None and row.ndim else 0
    if shard.metadata.get("fls.format") != FORMAT or shard.metadata.get("fls.fingerprint") != fingerprint:
        raise ValueError(f"{file}: expected the index of {FORMAT} dataset {fingerprint}, got {shard.metadata}")
    for name, (dtype, rest) in {**INDEX_COLUMNS, "key.offsets": ("U64", ())}.items():
        expected = (dtype, (rows + (name == "key.offsets"), *rest))
        found = (shard.dtypes.get(name), shard.columns[name].shape if name in shard.columns else None)
        if found != expected:
            raise ValueError(f"{file}: {name!r}: expected {expected}, got {found}")
    check_keys(shard.columns, shard.dtypes, str(file))
    return shard


def _read_quarantine(path: Path, root: dict[str, Any]) -> list[dict[str, Any]]:
    if member(root, "quarantine", (dict, type(None)), str(path / ROOT)) is None:
        return []
    record = FileRecord.parse(root["quarantine"], f"{path / ROOT}: quarantine")
    what = str(path / record.path)
    entries = member(record.read_json(path), "files", list, what)
    for entry in entries:
        Quarantined.parse(entry, what)
        natural(entry, "size", what)
        member(entry, "mtime_ns", int, what)
    return entries
