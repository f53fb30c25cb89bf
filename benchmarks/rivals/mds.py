"""MosaicML Streaming: MDS shards of 64 MiB, uncompressed, through LocalDataset, the faster of its two readers."""

from __future__ import annotations

import sys
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import protocol

# The package imports its vision and text datasets, and with them torchvision and transformers, of which a reader of
# bytes uses nothing; torchvision would also have to be built for exactly the torch that is here.
for name in (
    "torchvision", "torchvision.datasets", "torchvision.transforms", "torchvision.transforms.functional",
    "transformers", "transformers.feature_extraction_utils", "transformers.models", "transformers.models.auto",
    "transformers.models.auto.tokenization_auto", "transformers.tokenization_utils_base",
):  # fmt: skip
    sys.modules[name] = MagicMock()
sys.modules["torchvision.datasets"].VisionDataset = object  # a class is derived from it

from streaming import LocalDataset, MDSWriter  # noqa: E402


def read(payload: np.ndarray, folder: Path, batch: int) -> protocol.Batches:
    with MDSWriter(out=str(folder), columns={"row": "bytes"}, size_limit=64 << 20) as writer:
        for row in payload:
            writer.write({"row": row.tobytes()})
    dataset = LocalDataset(str(folder))
    for indices in protocol.epochs(len(payload), batch):
        values = np.empty((batch, payload.shape[1]), payload.dtype)
        for out, index in zip(values, indices.tolist(), strict=True):
            out[:] = np.frombuffer(dataset[index]["row"], payload.dtype)
        yield indices, values


if __name__ == "__main__":
    protocol.main("mosaicml-streaming", read)
