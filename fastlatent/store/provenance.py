"""What decides the bytes of a dataset, as one JSON object, and its fingerprint."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from fastlatent.store.files import canonical_json

SHOWN = 12  # of a digest: enough to tell two apart by eye


def fingerprint(hashed: Mapping) -> str:
    """SHA-256 (64 hexadecimal digits) of the canonical JSON of `hashed`.

    Raises:
        ValueError: a value that JSON has no exact form for.
    """
    return hashlib.sha256(canonical_json(hashed)).hexdigest()


def differences(ours: Mapping, theirs: Mapping) -> list[str]:
    """Field by field what differs: "vae.weights: a1b2… (dataset) != c3d4… (now)"; empty where nothing does.

    Args:
        ours: the "hashed" part of the dataset's provenance.
        theirs: that of the present call.
    """
    before, now = _flatten(ours), _flatten(theirs)
    lines = []
    for name in sorted(before.keys() | now.keys()):
        pair = [canonical_json(side[name]).decode() if name in side else "(absent)" for side in (before, now)]
        if pair[0] == pair[1]:
            continue
        if isinstance(before.get(name), str) and isinstance(now.get(name), str):
            pair = [before[name], now[name]]
        if pair[0][:SHOWN] != pair[1][:SHOWN]:
            pair = [f"{text[:SHOWN]}…" if len(text) > 2 * SHOWN else text for text in pair]
        lines.append(f"{name}: {pair[0]} (dataset) != {pair[1]} (now)")
    return lines


def _flatten(value: object, name: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} as {"a.b": 1}; an empty object is a value."""
    if isinstance(value, Mapping) and (value or not name):
        flat: dict[str, Any] = {}
        for key in value:
            flat.update(_flatten(value[key], f"{name}.{key}" if name else str(key)))
        return flat
    return {name: value}
