"""atheris target: no file of a dataset, however hostile, makes a reader raise anything but ValueError.

    python tests/store/fuzz/fuzz_parse.py -max_total_time=60

Ends with a traceback and libFuzzer's crash file at the first other exception, wrong value or slow read.
"""

import sys
import tempfile
from pathlib import Path

import atheris

sys.path.insert(1, str(Path(__file__).parents[1]))
with atheris.instrument_imports(include=["fastlatent.store"]):
    import hostile
    import toy


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        targets = [hostile.Target(Path(folder) / what, toy, what) for what in hostile.WRITERS]

        def one(data: bytes) -> None:
            source = atheris.FuzzedDataProvider(data)

            def pick(count: int) -> int:
                return source.ConsumeIntInRange(0, count - 1)

            target = targets[pick(len(targets))]
            kind = list(hostile.KINDS)[pick(len(hostile.KINDS))]
            seal = bool(pick(4))  # three in four get past the digests
            if pick(4):
                changed = hostile.mutate(target.original(kind), kind in ("index", "shard"), pick)
            else:
                changed = source.ConsumeBytes(source.remaining_bytes())
            target.attempt(kind, changed, seal=seal)

        atheris.Setup(sys.argv, one)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
