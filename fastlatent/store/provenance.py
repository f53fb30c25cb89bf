"""What decides the bytes of a dataset, as one JSON object, and its fingerprint."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

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
        left, right = before.get(name, "(absent)"), now.get(name, "(absent)")
        if left != right:
            short = left[:SHOWN] != right[:SHOWN]
            lines.append(f"{name}: {_show(left, short)} (dataset) != {_show(right, short)} (now)")
    return lines


def _flatten(value: object, name: str = "") -> dict[str, str]:
    if isinstance(value, Mapping) and (value or not name):
        flat: dict[str, str] = {}
        for key in value:
            flat.update(_flatten(value[key], f"{name}.{key}" if name else str(key)))
        return flat
    return {name: value if isinstance(value, str) and value != "(absent)" else canonical_json(value).decode()}


def _show(text: str, short: bool) -> str:
    return f"{text[:SHOWN]}…" if short and len(text) > 2 * SHOWN else text
