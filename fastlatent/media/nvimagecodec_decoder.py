"""JPEGs by nvImageCodec alone, on the CPU or a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import nvidia.nvimgcodec as nvimgcodec


class NvImageCodecJpegs:
    """A `JpegCodec`. index: of the GPU, None for the CPU (the only way that works where there is no driver)."""

    def __init__(self, threads: int, index: int | None) -> None:
        self.index = index
        self.decoder = nvimgcodec.Decoder(
            device_id=nvimgcodec.NVIMGCODEC_DEVICE_CPU_ONLY if index is None else index,
            max_num_cpu_threads=threads,
            # Not the hardware engine, which takes some files of a batch by their place in it; no CPU in a GPU's name.
            backends=[
                nvimgcodec.Backend(kind)
                for kind in (
                    (nvimgcodec.BackendKind.CPU_ONLY,)
                    if index is None
                    else (nvimgcodec.BackendKind.GPU_ONLY, nvimgcodec.BackendKind.HYBRID_CPU_GPU)
                )
            ],
            options=":fancy_upsampling=1",  # chroma as libjpeg-turbo, and with it Pillow, enlarges it
        )
        self.params = nvimgcodec.DecodeParams(
            apply_exif_orientation=False,
            color_spec=nvimgcodec.ColorSpec.SRGB,
            sample_format=nvimgcodec.SampleFormat.I_RGB,
        )

    def decode(self, files: Sequence[bytes]) -> list[Any]:
        if not files:
            return []
        streams: list[Any] = []
        for data in files:
            try:
                streams.append(nvimgcodec.CodeStream(data))
            except Exception:  # a header that it cannot parse; what it raises is not documented
                streams.append(None)
        images = iter(self._decode([stream for stream in streams if stream is not None]))
        return [None if stream is None else self._pixels(next(images)) for stream in streams]

    def _decode(self, streams: list[Any]) -> list[Any]:
        if self.index is None:
            return self.decoder.decode(streams, params=self.params)
        import torch

        stream = torch.cuda.current_stream(self.index).cuda_stream
        return self.decoder.decode(streams, params=self.params, cuda_stream=stream)

    def _pixels(self, image: Any) -> Any:
        if image is None:
            return None
        if self.index is None:
            return np.array(image.cpu())
        import torch

        return torch.from_dlpack(image)

    def close(self) -> None:
        self.decoder = None
