"""Mean and std of conditions over the samples that have them: what a conditional UNet is trained with."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

Conditions = tuple[tuple[str, int], ...]


def condition_statistics(conditions: Conditions, rows: Iterable[tuple[Any, Any]]) -> tuple[list[float], list[float]]:
    """Mean and std (of the population) of each number of the condition vector, over the samples that have it.

    A number that is the same everywhere gets the std 1.

    Args:
        conditions: (name, how many numbers) of each, in the order of the vector.
        rows: some samples' conditions and which of them are present: [rows, numbers], [rows, names], as often as it
            takes; unread where there are no conditions.

    Raises:
        ValueError: no sample has one of the conditions.
    """
    if not conditions:
        return [], []
    widths = [width for _, width in conditions]
    count, mean, m2 = np.zeros(sum(widths)), np.zeros(sum(widths)), np.zeros(sum(widths))
    for values, present in rows:
        here = np.repeat(np.asarray(present) > 0, widths, axis=1)
        values = np.where(here, np.asarray(values, np.float64), 0.0)
        number = here.sum(0)
        part = values.sum(0) / np.maximum(number, 1)
        deviation = np.where(here, values - part, 0.0)
        total = np.maximum(count + number, 1)
        # Chan, Golub and LeVeque (1979), as Statistics.merge.
        m2 += np.square(deviation).sum(0) + np.square(part - mean) * count * number / total
        mean += (part - mean) * number / total
        count += number
    for (name, _), known in zip(conditions, count[np.cumsum([0, *widths[:-1]])], strict=True):
        if not known:
            raise ValueError(f"--condition-spec: no image has numbers for {name!r}; leave it out, or correct its name")
    std = np.sqrt(m2 / count)
    return mean.tolist(), np.where(std > 0, std, 1.0).tolist()
