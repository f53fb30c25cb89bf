"""LatentDataset.gather_tokens: a quarter of the tokens of 32 clips against whole clips and against other readers.

Clips are of a ViT-B teacher, 1568 x 768 float16, 2.4 MB each; a batch of whole ones is 77 MB, a quarter of it 19 MB.
130 of them (313 MB) lie in shards of 32 in the page cache, every page of which was read before. Batches are random
clips, every batch with masks of its own: "blocks" of 0.7 of the grid and "tube", both alike in all time steps, "brief"
blocks of 0.15 over half of the time steps, "random" single tokens.

"fastlatent" reads the masked tokens, "whole" all of the clips: p50 / p50 is the share that skipping leaves. "copy", the
floor, is Tensor.copy_ of contiguous memory as large as the masked tokens. Rivals: "whole-then-index", the same rows
picked out of whole clips; "memmap", fancy indexing of one numpy file; "safetensors", each clip's slice of our shards by
safe_open, then its tokens. out: "kept" tensors are filled again (memmap and safetensors cannot), "new" ones are
allocated, and of large ones the system hands out the pages one by one. Bytes: the masked tokens, read and written.

"masks" rows are what drawing them costs, per mask, in batches of 32.
"""

from __future__ import annotations

import itertools
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # as in bench_gather_rows: spinning threads cost the next provider

import harness
import numpy as np
import pytest
import torch
from safetensors import safe_open

from fastlatent.data.latents import LatentDataset
from fastlatent.data.masks import LONG, SHORT, MaskConfig
from fastlatent.store.records import Schema
from fastlatent.store.rows import Rows
from fastlatent.store.scan import Entry
from fastlatent.store.writer import DatasetWriter

CLIPS, BATCH, GRID, WIDTH = 130, 32, (8, 14, 14), 768
TOKENS = GRID[0] * GRID[1] * GRID[2]
QUARTERS = {
    "blocks": MaskConfig("blocks", 0.25, 0.7),
    "brief": MaskConfig("blocks", 0.25, 0.15, temporal=0.5),
    "tube": MaskConfig("tube", 0.25),
    "random": MaskConfig("random", 0.25),
}
DRAWN = {"short": SHORT, "long": LONG, **QUARTERS}
BATCHES = 8
CASES = [
    harness.Case(
        "masked_tokens",
        {"clips": BATCH, "tokens": TOKENS, "width": WIDTH, "mask": mask, "out": out, "backend": backend},
        dtype="float16",
        device="cpu",
        providers=("fastlatent", "whole", "whole-then-index", "memmap", "safetensors", "copy"),
    )
    for backend in ("ram", "willneed", "pread")
    for out in ("kept", "new")
    for mask in QUARTERS
    if backend == "ram" or (out, mask) in (("kept", "brief"), ("kept", "random"))
] + [
    harness.Case(
        "masks",
        {"batch": BATCH, "tokens": TOKENS, "mask": mask},
        dtype="int64",
        device="cpu",
        providers=("fastlatent",),
    )
    for mask in DRAWN
]


@contextmanager
def prepare(case: harness.Case) -> Iterator[harness.Prepared]:
    threads_before = torch.get_num_threads()
    torch.set_num_threads(case.threads)
    try:
        if case.benchmark == "masks":
            yield drawing(DRAWN[str(case.sizes["mask"])])
        else:
            with tempfile.TemporaryDirectory(prefix="fastlatent-bench-") as folder:
                yield reading(case, Path(folder))
    finally:
        torch.set_num_threads(threads_before)


def drawing(config: MaskConfig) -> harness.Prepared:
    epochs, keys = itertools.count(), torch.arange(BATCH)
    return harness.Prepared({"fastlatent": lambda: lambda: config.masked(0, next(epochs), keys, GRID)}, units=BATCH)


def write_dataset(folder: Path) -> Path:
    """Random finite clips, and the same in clips.npy."""
    (folder / "source").mkdir()
    entries = []
    for i in range(CLIPS):
        path = folder / "source" / f"{i:04d}"
        path.write_text(str(i))
        stat = path.stat()
        entries.append(Entry(path.name, str(path), -1, stat.st_size, stat.st_mtime_ns))
    shape, schema = (1, TOKENS, WIDTH), Schema(((1, TOKENS, WIDTH),), "tokens")
    clips = np.random.default_rng(0).integers(0, 0x7C00, (CLIPS, *shape), dtype=np.uint16).view(np.float16)
    np.save(folder / "clips.npy", clips[:, 0])
    provenance = {"hashed": {"teacher": {"weights": "benchmark"}}, "informational": {}}
    with DatasetWriter.open(folder / "store", provenance, [], unit_rows=32, schema=schema) as writer:
        for unit in writer.plan(entries):
            keys = [item.key for item in unit.items]
            writer.commit(unit, Rows(keys, clips[[int(key) for key in keys]]))
        writer.finish()
    return folder / "store"


def reading(case: harness.Case, folder: Path) -> harness.Prepared:
    config, keep = QUARTERS[str(case.sizes["mask"])], case.sizes["out"] == "kept"
    dataset = LatentDataset(write_dataset(folder), columns=("tokens",), backend=str(case.sizes["backend"]))
    os.sync()  # else the first providers are measured while the disk is still busy
    mapped = np.load(folder / "clips.npy", mmap_mode="r")
    for begin in range(0, CLIPS, BATCH):  # every page of both is mapped
        want = torch.from_numpy(np.array(mapped[begin : begin + BATCH]))
        assert torch.equal(dataset.gather(np.arange(begin, min(CLIPS, begin + BATCH)))["tokens"][:, 0], want)
    generator = np.random.default_rng(1)
    indices = [generator.permutation(CLIPS)[:BATCH] for _ in range(BATCHES)]
    masks = [config.masked(0, epoch, dataset.store.key_hash[of], GRID) for epoch, of in enumerate(indices)]
    parts, wholes = dataset.gather_tokens(indices[0], masks[0]), dataset.empty(BATCH)
    files = [safe_open(dataset.store.path / record.path, "pt") for record in dataset.store.shards]
    slices = [file.__enter__().get_slice("tokens") for file in files]

    def fastlatent(i: int) -> torch.Tensor:
        return dataset.gather_tokens(indices[i], masks[i], out=parts if keep else None)["tokens"]

    def whole(i: int) -> torch.Tensor:
        return dataset.gather(indices[i], out=wholes if keep else None)["tokens"]

    def whole_then_index(i: int) -> torch.Tensor:
        flat = whole(i).view(-1, WIDTH)
        rows = (masks[i] + TOKENS * torch.arange(BATCH)[:, None]).flatten()
        out = parts["tokens"].view(-1, WIDTH) if keep else None
        return torch.index_select(flat, 0, rows, out=out).view(BATCH, -1, WIDTH)

    def memmap(i: int) -> torch.Tensor:
        return torch.from_numpy(mapped[indices[i][:, None], masks[i].numpy()])

    def safetensors(i: int) -> torch.Tensor:
        places = zip(dataset.store.shard[indices[i]].tolist(), dataset.store.row[indices[i]].tolist(), strict=True)
        clips = (slices[shard][row : row + 1] for shard, row in places)
        return torch.stack([clip[0, 0][mask] for clip, mask in zip(clips, masks[i], strict=True)])

    sources = torch.from_numpy(np.array(mapped[: BATCH * 3])).view(-1)

    def copy(i: int) -> torch.Tensor:
        target = parts["tokens"] if keep else torch.empty_like(parts["tokens"])
        return target.copy_(sources[i * WIDTH * TOKENS :][: target.numel()].view_as(target))

    def factory(read: Callable[[int], torch.Tensor], check: bool) -> Callable[[], Callable[[], object]]:
        def start() -> Callable[[], object]:
            if check:
                assert torch.equal(read(1).clone(), torch.from_numpy(mapped[indices[1][:, None], masks[1].numpy()]))
            numbers = itertools.cycle(range(BATCHES))
            return lambda: read(next(numbers))

        return start

    readers = {
        "fastlatent": fastlatent, "whole": whole, "whole-then-index": whole_then_index, "memmap": memmap,
        "safetensors": safetensors, "copy": copy,
    }  # fmt: skip
    return harness.Prepared(
        {name: factory(read, name not in ("whole", "copy")) for name, read in readers.items()},
        bytes=2 * parts["tokens"].nbytes,
        floor="copy",
        rivals=("whole-then-index", "memmap", "safetensors"),
    )


@pytest.mark.parametrize(
    "case, provider", [(c, p) for c in CASES for p in c.providers], ids=lambda v: getattr(v, "key", v)
)
def test_masked_tokens(benchmark, case, provider):
    with prepare(case) as prepared:
        benchmark(prepared.providers[provider]())


if __name__ == "__main__":
    harness.main(CASES, prepare)
