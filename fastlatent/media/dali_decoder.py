"""JPEGs by a DALI pipeline, on the CPU or a GPU ("mixed")."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from nvidia.dali import Pipeline, fn, types

MAX_BATCH = 64


class DaliJpegs:
    """A `JpegCodec`. index: of the GPU, None for the CPU.

    A batch with one bad file fails as a whole and is decoded again file by file, by DALI too: what becomes of a file
    must not depend on its neighbours.
    """

    def __init__(self, threads: int, index: int | None) -> None:
        self.threads, self.index = threads, index
        self.pipeline = self._build()

    def decode(self, files: Sequence[bytes]) -> list[Any]:
        pixels: list[Any] = []
        for begin in range(0, len(files), MAX_BATCH):
            batch = files[begin : begin + MAX_BATCH]
            decoded = self._run(batch)
            if decoded is None:
                alone = (self._run([data]) for data in batch) if len(batch) > 1 else (None,)
                decoded = [None if one is None else one[0] for one in alone]
            pixels += decoded
        return pixels

    def _build(self) -> Any:
        # A queue of one: a batch is fed, decoded and taken, and nothing of it stays behind.
        pipeline = Pipeline(
            batch_size=MAX_BATCH, num_threads=self.threads, device_id=self.index, prefetch_queue_depth=1
        )
        with pipeline:
            # Whole batches: fed sample by sample, DALI drops the last, short one.
            files = fn.external_source(name="files", batch=True, dtype=types.DALIDataType.UINT8, ndim=1)
            positions = fn.external_source(name="positions", batch=True, dtype=types.DALIDataType.INT64, ndim=1)
            images = fn.decoders.image(
                files,
                device="cpu" if self.index is None else "mixed",
                # Never ANY_DATA or GRAY: grey JPEGs crash with the one, the other takes Y instead of Pillow's luma.
                output_type=types.DALIImageType.RGB,
                adjust_orientation=False,
                jpeg_fancy_upsampling=True,  # chroma as libjpeg-turbo, and with it Pillow, enlarges it
                # By default the hardware engine takes some files of a batch, by their place in it, and CUDA the others.
                hw_decoder_load=0.0,
            )
            pipeline.set_outputs(images, positions)
        pipeline.build()
        return pipeline

    def _run(self, batch: Sequence[bytes]) -> list[Any] | None:
        try:
            images, positions = self.pipeline.run(
                files=[np.frombuffer(data, dtype=np.uint8) for data in batch],
                positions=[np.array([i]) for i in range(len(batch))],
            )
        except RuntimeError as error:
            if "memory" in str(error).lower():  # of the GPU: no property of a file
                raise
            self.pipeline = self._build()  # DALI calls one invalid after an exception
            return None
        pixels: list[Any] = [None] * len(batch)
        for i in range(len(batch)):
            pixels[int(np.asarray(positions.at(i))[0])] = self._copied(images[i])
        if self.index is not None:  # DALI does not know when the copies are made, and would write over their source
            import torch

            torch.cuda.current_stream(self.index).synchronize()
        return pixels

    def _copied(self, image: Any) -> Any:
        """The next run writes over DALI's own buffers."""
        if self.index is None:
            return np.array(image)
        import torch

        return torch.from_dlpack(image).clone()

    def close(self) -> None:
        self.pipeline = None
