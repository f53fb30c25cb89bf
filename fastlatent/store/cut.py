"""Cut the files that are to be encoded into units, so that what is done, and what was planned, stays."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from fastlatent.store.records import PlannedItem, Unit, encode_key
from fastlatent.store.scan import Pair, Scanned


@dataclass(frozen=True)
class Cutter:
    """What decides the units besides the files: at most `unit_rows` files in each, all of one bucket."""

    fingerprint: str
    bucket: tuple[int, ...]
    unit_rows: int

    def cut(self, wanted: Mapping[Pair, Scanned], pending: list[Unit], committed: Collection[str]) -> list[Unit]:
        """The plan's units: of the pending plan whatever still holds, then what is left, cut in key order.

        Units that are committed stay while one of their files is wanted. Of the others either all stay or
        none: a unit that lost a file would be cut differently, and then so should its neighbours be, lest
        many small units pile up.
        """
        left = dict(wanted)
        units: list[Unit] = []
        for unit in pending:
            pairs = [(encode_key(item.key), item.digest) for item in unit.items]
            if unit.id in committed and any(pair in left for pair in pairs):
                units.append(unit)
                for pair in pairs:
                    left.pop(pair, None)
        open_units = [unit for unit in pending if unit.id not in committed]
        items = [(encode_key(item.key), item.digest) for unit in open_units for item in unit.items]
        if all(pair in left for pair in items) and all(unit.bucket == self.bucket for unit in open_units):
            for unit in open_units:
                pairs = [(encode_key(item.key), item.digest) for item in unit.items]
                units.append(self._unit([left.pop(pair) for pair in pairs]))
        rest = list(left.values())
        for start in range(0, len(rest), self.unit_rows):
            units.append(self._unit(rest[start : start + self.unit_rows]))
        return sorted(units, key=lambda unit: (encode_key(unit.items[0].key), unit.id))

    def _unit(self, files: list[Scanned]) -> Unit:
        items = tuple(PlannedItem(one.name, one.path, one.digest, one.size, one.mtime_ns) for one in files)
        return Unit.of(self.fingerprint, self.bucket, items)
