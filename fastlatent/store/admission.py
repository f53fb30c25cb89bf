"""Whether a writer may work on a folder: what the folder holds, the settings, the schema, the shards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastlatent.store.files import TEMPORARY, canonical_json
from fastlatent.store.lease import write_exclusive
from fastlatent.store.provenance import differences, fingerprint
from fastlatent.store.reader import PROVENANCE, Dataset, read_provenance
from fastlatent.store.records import ROOT, Bucket, Schema


def check_ours(path: Path) -> None:
    """Raise ValueError where `path` holds what no writer of ours has put there."""
    if not path.exists():
        return
    if not path.is_dir():
        raise ValueError(f"{path}: expected a folder for the dataset, got a file")
    names = sorted(entry.name for entry in path.iterdir())
    others = [name for name in names if name != ".lock" and not name.startswith(TEMPORARY)]
    if others and PROVENANCE not in others and ROOT not in others:
        raise ValueError(f"{path}: expected an empty folder or a dataset, got {others[:5]}: choose another folder")


def check_provenance(path: Path, provenance: dict[str, Any]) -> None:
    """Write provenance.json where there is none; refuse where there is another."""
    if not (path / PROVENANCE).exists():
        if (path / ROOT).exists():
            raise ValueError(f"{path / PROVENANCE} is missing: restore it from a copy, or encode into a new folder")
        write_exclusive(path / PROVENANCE, canonical_json(provenance) + b"\n")
    ours = read_provenance(path)["hashed"]
    if fingerprint(ours) != fingerprint(provenance["hashed"]):
        lines = "\n  ".join(differences(ours, provenance["hashed"]))
        raise ValueError(
            f"{path} was encoded with other settings:\n  {lines}\n"
            "encode into another folder, or go back to the dataset's settings"
        )


def foreign_environment(path: Path, provenance: dict[str, Any], *, allow_mixed: bool) -> dict[str, Any] | None:
    """What each shard is to say of this machine: its environment if it is not the first writer's, else None.

    Raises:
        ValueError: it is another, and `allow_mixed` is false: values would differ in their last bits.
    """
    recorded = read_provenance(path)["informational"].get("environment")
    ours = provenance["informational"].get("environment")
    if recorded == ours or not isinstance(recorded, dict):
        return None
    if not allow_mixed:
        lines = "\n  ".join(differences(recorded, ours))
        raise ValueError(
            f"{path} was begun on another machine or with other software:\n  {lines}\n"
            "keys and order stay the same, but last bits of new rows will differ: go on there, or say --allow-mixed "
            "(each shard then records where it was made)"
        )
    return ours


def check_schema(current: Dataset, schema: Schema) -> None:
    if (current.payload, tuple(current.extras)) != (schema.payload, schema.extras):
        raise ValueError(
            f"{current.path}: expected rows of {current.payload} with {current.extras}, got {schema.payload} with "
            f"{schema.extras}: encode into another folder"
        )
    one, other = current.buckets[0].shape, schema.buckets[0]
    channels = current.buckets[0].channels, Bucket(other, "F16", 0, schema.payload).channels
    if (one[0], len(one), channels[0]) != (other[0], len(other), channels[1]):
        raise ValueError(f"{current.path}: expected rows like {one}, got bucket {other}: encode into another folder")


def check_shards(path: Path, current: Dataset | None) -> None:
    for record in current.shards if current else ():
        try:
            size = (path / record.path).stat().st_size
        except OSError:
            size = -1
        if size != record.bytes:
            came = "no such file" if size < 0 else f"{size} bytes"
            raise ValueError(
                f"{path / record.path}: expected {record.bytes} bytes, got {came}: restore it from a copy, or "
                f"run `fastlatent repair {path}` and this again"
            )
