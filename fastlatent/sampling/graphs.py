"""CUDA graphs of one token or step: captured once for each key, replayed for all that follow."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor


def batch_bucket(rows: int) -> int:
    """What a batch is padded to: the next power of two up to 64, then the next multiple of 64."""
    return 1 << (rows - 1).bit_length() if rows <= 64 else -(-rows // 64) * 64


class TokenGraphs:
    """Graphs that share one memory pool and work on the same buffers, by key."""

    def __init__(self) -> None:
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}

    def clear(self) -> None:
        """Forget all graphs: their buffers are gone."""
        self._graphs.clear()

    def run(self, key: Hashable, function: Callable[[], None], *, keep: Sequence[Tensor]) -> None:
        """Replay the graph of `key`; the first time, run `function` once to warm up, and capture it.

        keep: the tensors that `function` reads and then writes. They are put back after the warm-up, so that the
        replay starts from where the caller was. Everything else it writes must be the same when written twice.
        """
        if key not in self._graphs:
            self._graphs[key] = self._capture(function, keep)
        self._graphs[key].replay()

    def _capture(self, function: Callable[[], None], keep: Sequence[Tensor]) -> torch.cuda.CUDAGraph:
        saved = [tensor.clone() for tensor in keep]
        # Compiling and choosing algorithms may synchronise or allocate for good: not inside a capture.
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            function()
        torch.cuda.current_stream().wait_stream(side)
        for tensor, value in zip(keep, saved, strict=True):
            tensor.copy_(value)
        graph = torch.cuda.CUDAGraph()
        pool = next(iter(self._graphs.values())).pool() if self._graphs else None
        with torch.cuda.graph(graph, pool=pool):
            function()
        return graph
