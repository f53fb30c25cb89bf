"""The units that one process encodes: pictures read ahead, batches encoded, shards written behind, all at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from fastlatent.pipeline.ahead import ahead
from fastlatent.pipeline.interrupt import StopRequest
from fastlatent.pipeline.meter import Meter
from fastlatent.pipeline.progress import Progress
from fastlatent.store.records import PlannedItem, Quarantined, Unit
from fastlatent.store.rows import Rows
from fastlatent.store.writer import DatasetWriter
from fastlatent.workflows.encode_rows import RowMaker
from fastlatent.workflows.encode_setup import EncodeSetup, Picture

AHEAD_BYTES = 2**30  # of pixels that are read ahead

Part = tuple[Unit, tuple[PlannedItem, ...]]  # files of one unit that are read together


class Work:
    """What this process does of a plan.

    Attributes:
        encoded, errors: rows made here; files left out here, or before this process began.
        meter: busy shares of decode, encode and write.
    """

    def __init__(self, setup: EncodeSetup, writer: DatasetWriter) -> None:
        self.encoded, self.errors = 0, writer.left_out
        self._setup, self._writer = setup, writer
        self._watch = setup.watch()
        self._unit: Unit | None = None  # the one whose files are being handed out
        self._parts: Iterator[tuple[PlannedItem, ...]] = iter(())
        self._only: str | None = None
        self._chunk, self._threads = setup.reading
        self.meter = Meter({"decode": self._threads, "encode": 1, "write": 1})

    @property
    def retried(self) -> int:
        """Rows that overflowed in half precision, and were encoded again in float32."""
        return self._watch.retried

    def run(self, total: int, only: str | None = None) -> None:
        """Claim, encode and commit units until all are committed, by whomever; or the unit of id `only`, if it is free.

        Args:
            total: rows of all units, for the progress line; 0: none is shown.

        Raises:
            ValueError: more files than --max-errors cannot be used; a file changed since it was planned.
            KeyboardInterrupt: a stop was asked for. Units that are finished stay.
        """
        self._only = only
        with (
            StopRequest() as stop,
            Progress("encode", total, self._setup.noun, describe=self._describe) as progress,
            ThreadPoolExecutor(self._threads, thread_name_prefix="decode") as pool,
            ThreadPoolExecutor(1, thread_name_prefix="write") as behind,
        ):

            def on_others(files: int) -> None:
                stop.check()
                progress.advance(files)

            def on_done(files: int, bad: int) -> None:
                self.errors += bad
                check_errors(self._setup, self.errors)
                progress.advance(files)

            def make(unit: Unit) -> RowMaker:
                return RowMaker(self._setup, self._watch, unit, self.meter, stop.check, on_done)

            if only is None:
                while unit := next(self._writer.claim(on_others), None):
                    self._stream(unit, make, on_others, pool, behind)
                progress.advance(progress.total - progress.done)  # by others, after this process last looked
            elif unit := self._writer.claim_now(name=only):
                self._stream(unit, make, on_others, pool, behind)

    def _stream(
        self,
        first: Unit,
        make: Callable[[Unit], RowMaker],
        on_others: Callable[[int], None],
        pool: ThreadPoolExecutor,
        behind: ThreadPoolExecutor,
    ) -> None:
        """`first`, and whatever can be claimed while its files are read, until there is nothing at the moment."""
        self._hand_out(first)
        depth = max(2 * self._threads, 2 * self._setup.config.batch_size // self._chunk)
        # Large clips: no more than keep all threads at work.
        part = self._chunk * self._setup.most_pixel_bytes
        depth = min(depth, max(self._threads + 1, AHEAD_BYTES // part))
        writing: Future[None] | None = None  # one at a time: two units' rows are in memory at most
        maker: RowMaker | None = None
        left = 0
        for (unit, _), pictures in ahead(lambda: self._pull(on_others), self._read, pool=pool, depth=depth):
            if maker is None:
                maker, left = make(unit), len(unit.items)
            if writing is not None and writing.done():
                writing.result()  # a full disk is no news to wait for
            for picture in pictures:
                maker.add(picture)
            left -= len(pictures)
            if not left:
                rows, bad = maker.finish()
                maker = None
                self.encoded += len(rows.keys)
                if writing is not None:
                    writing.result()
                writing = behind.submit(self._write, unit, rows, bad)
        if writing is not None:
            writing.result()

    def _hand_out(self, unit: Unit) -> None:
        self._unit = unit
        self._parts = iter([unit.items[i : i + self._chunk] for i in range(0, len(unit.items), self._chunk)])

    def _pull(self, on_others: Callable[[int], None]) -> Part | None:
        """The next files to read. At most one unit is claimed ahead: what this process holds, no other one does."""
        part = next(self._parts, None)
        if part is None:
            unit = self._writer.claim_now(on_others) if self._only is None else None
            if unit is None:
                return None
            self._hand_out(unit)
            part = next(self._parts)
        assert self._unit is not None
        return self._unit, part

    def _read(self, part: Part) -> list[Picture]:
        with self.meter.busy("decode"):
            return self._setup.read(*part)

    def _write(self, unit: Unit, rows: Rows, bad: list[Quarantined]) -> None:
        with self.meter.busy("write"):
            self._writer.commit(unit, rows, bad)
        check_errors(self._setup, self._writer.left_out)  # of all processes, latents that are not finite among them

    def _describe(self) -> str:
        left_out = self.errors + len(self._setup.left_out)
        return self.meter.text() + (f", {left_out:,} left out" if left_out else "")


def check_errors(setup: EncodeSetup, quarantined: int) -> None:
    """Raise ValueError where more files than --max-errors cannot be used."""
    limit = setup.config.max_errors
    if limit is not None and (found := quarantined + len(setup.left_out)) > limit:
        raise ValueError(
            f"--max-errors {limit}: {found} files cannot be used; what is finished stays, and the same command with a "
            "higher limit goes on"
        )
