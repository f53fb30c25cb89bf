"""Numbers that describe an image, from a manifest's metadata: "temperature:1,wind:3,wind_mag:1". Torch-free."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from fastlatent.sources.items import Column

MAX_FLOAT32 = 3.4028234663852886e38


def parse_conditions(text: str) -> tuple[tuple[str, int], ...]:
    """(name, how many numbers) of each condition, in the order of the vector; "" and "none" give ().

    Raises:
        ValueError: text is not `name:count,…` with counts ≥ 1 and names that occur once.
    """
    if text.strip() in ("", "none"):
        return ()
    conditions: dict[str, int] = {}
    for part in text.split(","):
        name, _, count = (piece.strip() for piece in part.partition(":"))
        if not name or not count.isdecimal() or int(count) < 1:
            raise ValueError(
                f"conditions {text!r}: {part.strip()!r} is not name:count with a count of 1 or more; "
                "expected, say, temperature:1,wind:3,wind_mag:1, or none"
            )
        if name in conditions:
            raise ValueError(f"conditions {text!r}: {name!r} occurs twice")
        conditions[name] = int(count)
    return tuple(conditions.items())


def condition_columns(conditions: tuple[tuple[str, int], ...]) -> tuple[Column, ...]:
    """condition F32 [sum of counts], and condition_present F32 [number of names]: 1 where an item has that
    condition, 0 where its numbers are filled in (a missing temperature and one of 0 both read 0)."""
    if not conditions:
        return ()
    return (
        Column("condition", "F32", (sum(count for _, count in conditions),)),
        Column("condition_present", "F32", (len(conditions),)),
    )


def condition_values(conditions: tuple[tuple[str, int], ...], metadata: Mapping[str, Any]) -> dict[str, list[float]]:
    """One item's values for `condition_columns`.

    A list is cut or filled with zeros to its count, a single number fills the first place. What is missing, no
    number (text, null), not finite, or too large for float32 reads 0, and the condition then counts as missing;
    so does an empty list. wind_mag is the Euclidean norm of the whole of wind where the metadata have no wind_mag.
    """
    if not conditions:
        return {}
    vector: list[float] = []
    present: list[float] = []
    for name, count in conditions:
        numbers = [_number(one) for one in _as_list(_value(name, metadata))[:count]]
        present.append(float(bool(numbers) and None not in numbers))
        vector += [number or 0.0 for number in numbers] + [0.0] * (count - len(numbers))
    return {"condition": vector, "condition_present": present}


def condition_remarks(
    conditions: tuple[tuple[str, int], ...], samples: Iterable[tuple[str, Mapping[str, Any]]]
) -> tuple[str, ...]:
    """What `condition_values` fills in or cuts: a line for each condition and kind of problem, with how many samples
    have it, and the first of them.

    Args:
        samples: (key, metadata) of each.
    """
    number, found = 0, dict[tuple[str, str], tuple[int, str]]()
    for key, metadata in samples:
        number += 1
        for name, count in conditions:
            if problem := _problem(_value(name, metadata), count):
                before, first = found.get((name, problem), (0, key))
                found[name, problem] = (before + 1, first)
    return tuple(
        f"condition {name!r}: {affected:,} of {number:,} samples {problem}; the first is {first!a}"
        for name, _ in conditions
        for (of, problem), (affected, first) in found.items()
        if of == name
    )


def _problem(value: Any, count: int) -> str:
    """What is wrong with a condition's value, "" for nothing."""
    if value is None:
        return "lack it"
    values = _as_list(value)
    if not values or None in map(_number, values[:count]):
        return "have no finite number there, and count as lacking it"
    return f"hold another number of values than {count}: cut, or filled with zeros" if len(values) != count else ""


def _value(name: str, metadata: Mapping[str, Any]) -> Any:
    value = metadata.get(name)
    return _norm(metadata.get("wind")) if value is None and name == "wind_mag" else value


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _number(value: Any) -> float | None:
    if not isinstance(value, (int, float)):  # True and False are the numbers 1 and 0
        return None
    # Compared before float(), which an integer of 400 digits overflows; False for NaN.
    return float(value) if abs(value) <= MAX_FLOAT32 else None


def _norm(wind: Any) -> float | None:
    numbers = [_number(one) for one in _as_list(wind)]
    known = [number for number in numbers if number is not None]
    return math.hypot(*known) if known and len(known) == len(numbers) else None
