"""Cut the files that are to be encoded into units, so that what is done, and what was planned, stays."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby

from fastlatent.store.records import PlannedItem, Schema, Unit, encode_key
from fastlatent.store.scan import Pair, Scanned


@dataclass(frozen=True)
class Cutter:
    """What decides the units besides the files: at most `unit_rows` files in each, all of one bucket.

    A group is never divided: one that has more files is a unit of its own.
    """

    fingerprint: str
    schema: Schema
    unit_rows: int

    def cut(self, wanted: Mapping[Pair, Scanned], pending: list[Unit], committed: Collection[str]) -> list[Unit]:
        """The plan's units: of the pending plan whatever still holds, then what is left, cut in the order of `wanted`.

        Units that are committed stay while one of their files is wanted. Of the others either all stay or
        none: a unit that lost a file would be cut differently, and then so should its neighbours be, lest
        many small units pile up.
        """
        left = dict(wanted)
        place = {pair: i for i, pair in enumerate(wanted)}
        groups: dict[str, list[Pair]] = {}
        for pair, one in wanted.items():
            groups.setdefault(one.entry.group, []).append(pair)

        def whole(pairs: list[Pair]) -> bool:
            """Whether a unit's groups are what they were: one that changed since it was planned is encoded anew."""
            names = dict.fromkeys(wanted[pair].entry.group for pair in pairs if pair in wanted)
            return "" in names or [pair for name in names for pair in groups[name]] == pairs

        units: list[Unit] = []
        for unit in pending:
            pairs = _pairs(unit)
            if unit.id in committed and any(pair in left for pair in pairs) and whole(pairs):
                units.append(unit)
                for pair in pairs:
                    left.pop(pair, None)
        open_units = [unit for unit in pending if unit.id not in committed]
        if all(self._holds(unit, left) and whole(_pairs(unit)) for unit in open_units):
            for unit in open_units:
                units.append(self._unit([left.pop(pair) for pair in _pairs(unit)]))
        for bucket in range(len(self.schema.buckets)):
            files = [one for one in left.values() if one.entry.bucket == bucket]
            units += [self._unit(part) for part in self._parts(files)]

        def first(unit: Unit) -> tuple[int, str]:
            return min(place.get((encode_key(item.key), item.digest), len(place)) for item in unit.items), unit.id

        return sorted(units, key=first)

    def _holds(self, unit: Unit, left: Mapping[Pair, Scanned]) -> bool:
        """Whether all files of a pending unit are still wanted, in its bucket."""
        files = [left.get((encode_key(item.key), item.digest)) for item in unit.items]
        return all(one is not None and self.schema.buckets[one.entry.bucket] == unit.bucket for one in files)

    def _parts(self, files: list[Scanned]) -> Iterator[list[Scanned]]:
        part: list[Scanned] = []
        # Without groups every file is one of its own.
        for _, members in groupby(files, lambda one: one.entry.group or one.key):
            group = list(members)
            if part and len(part) + len(group) > self.unit_rows:
                yield part
                part = []
            part += group
        if part:
            yield part

    def _unit(self, files: list[Scanned]) -> Unit:
        items = tuple(
            PlannedItem(one.entry.key, one.entry.path, one.digest, one.entry.size, one.entry.mtime_ns) for one in files
        )
        return Unit.of(self.fingerprint, self.schema.buckets[files[0].entry.bucket], items)


def _pairs(unit: Unit) -> list[Pair]:
    return [(encode_key(item.key), item.digest) for item in unit.items]
