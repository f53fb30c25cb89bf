"""A tree as Something-Something V2 comes: lists in labels/, clips in 20bn-something-something-v2/. Imports nothing of
fastlatent."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

TEMPLATES = ("Pushing [something] off of [something]", "Holding [something]", "Folding [something]")


def _bytes(path: Path, number: int) -> None:
    path.write_bytes(f"clip {number}".encode())


def make_ssv2(
    root: Path,
    write: Callable[[Path, int], object] = _bytes,
    *,
    counts: Mapping[str, int] | None = None,
    lists: str = "labels",
    videos: str = "20bn-something-something-v2",
) -> dict[str, list[str]]:
    """Write lists, labels.json and clips; the ids of each split, in the list's order, which is not that of the ids.

    Args:
        write: makes the clip of a path and of its number among all; by default of the bytes "clip 0", "clip 1" …
        counts: clips of each split; 4, 2 and 2 by default.
        lists, videos: their folders; "" is the root.
    """
    number, ids = 0, dict[str, list[str]]()
    for folder in (root / lists, root / videos):
        folder.mkdir(parents=True, exist_ok=True)
    for split, count in (counts or {"train": 4, "validation": 2, "test": 2}).items():
        entries: list[dict[str, object]] = []
        for _ in range(count):
            id, template = str(78687 + 40503 * number % 100003), TEMPLATES[number % len(TEMPLATES)]
            write(root / videos / f"{id}.webm", number)
            entry = {"label": "holding a cup", "template": template, "placeholders": ["a cup"]}
            entries.append({"id": id} if split == "test" else {"id": id, **entry})
            number += 1
        ids[split] = [str(entry["id"]) for entry in entries]
        (root / lists / f"{split}.json").write_text(json.dumps(entries))
    names = [template.replace("[", "").replace("]", "") for template in TEMPLATES]
    (root / lists / "labels.json").write_text(json.dumps({name: str(i) for i, name in enumerate(names)}))
    return ids
