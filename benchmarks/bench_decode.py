"""JPEG bytes to cropped pixels: our decoders and resize against Pillow, and against a DALI pipeline: seconds per image.

All but "dali-resize" give ADM's crop, the same bytes. "pillow" is what is written by hand: Image.open, two Pillow
resizes, in a pool of threads. "dali-resize" is DALI's own pipeline, decoding and cubic resize, whose pixels are 44 to
52 dB from ADM's. "fastlatent-X" is `media.decoders` with back end X, then `media.transforms`.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial

import harness
import numpy as np
import pytest
import torch
from PIL import Image
from rows import Case
from sklearn.datasets import load_sample_images

from fastlatent.media.decoders import NAMES, open_decoder
from fastlatent.media.images import ImageError
from fastlatent.media.transforms import open_transform
from fastlatent.workflows.runtime import set_up

SIZE, COUNT = 256, 64
SHAPES = {"500x375": (500, 375), "2560x1708": (2560, 1708)}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PROVIDERS = (*(f"fastlatent-{name}" for name in NAMES), "pillow", "dali-resize")
CASES = [
    Case("decode", {"jpeg": shape, "size": SIZE, "images": COUNT}, "uint8", DEVICE, PROVIDERS, threads)
    for shape in SHAPES
    for threads in ((8,) if DEVICE == "cuda" else (1, 2))
]


@contextmanager
def prepare(case: Case) -> Iterator[harness.Prepared]:
    count = COUNT if case.sizes["jpeg"] == "500x375" else COUNT // 8
    files = jpegs(*SHAPES[str(case.sizes["jpeg"])], count)
    set_up(case.device, 1)  # as `encode` does: what the process keeps of freed memory counts here
    with ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(case.threads))
        providers: dict[str, Callable[[], Callable[[], object]]] = {
            f"fastlatent-{name}": partial(ours, name, files, case, pool, stack) for name in NAMES
        }
        providers["pillow"] = lambda: lambda: list(pool.map(by_pillow, files))
        providers["dali-resize"] = partial(dali_resize, files, case)
        yield harness.Prepared(
            providers, bytes=sum(map(len, files)) // count, rivals=("pillow", "dali-resize"), units=count
        )


def jpegs(width: int, height: int, count: int) -> list[bytes]:
    """Quality 90, cut from two photographs, enlarged first where they are too small."""
    files = []
    for i in range(count):
        photo = Image.fromarray(load_sample_images().images[i % 2])
        if width > photo.width:
            photo = photo.resize((width + 64, height + 64), Image.Resampling.BICUBIC)
        left, top = i * 7 % (photo.width - width + 1), i * 5 % (photo.height - height + 1)
        stream = io.BytesIO()
        photo.crop((left, top, left + width, top + height)).save(stream, "JPEG", quality=90)
        files.append(stream.getvalue())
    return files


def ours(name: str, files: list[bytes], case: Case, pool: ThreadPoolExecutor, stack: ExitStack) -> Callable[[], object]:
    try:
        decoder = open_decoder(name, channels=3, device=case.device, threads=case.threads)
    except ValueError as error:
        raise harness.Unavailable(str(error)) from None
    stack.callback(decoder.close)
    transform = open_transform("adm", SIZE)

    def crop(image: object) -> object:
        assert not isinstance(image, ImageError), image
        return transform.apply(image, "")[0]

    if name == "pillow":  # as `encode` does it: one file per call, many calls at a time
        return lambda: list(pool.map(lambda data: crop(decoder.decode([data])[0]), files))

    def run() -> None:
        pixels = list(pool.map(crop, decoder.decode(files)))
        if case.device == "cuda":
            torch.stack(pixels).sum().item()

    return run


def by_pillow(data: bytes) -> np.ndarray:
    image = Image.open(io.BytesIO(data)).convert("RGB")
    while min(image.size) >= 2 * SIZE:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = SIZE / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - SIZE) // 2, (image.height - SIZE) // 2
    return np.asarray(image)[top : top + SIZE, left : left + SIZE].copy()


def dali_resize(files: list[bytes], case: Case) -> Callable[[], object]:
    from nvidia.dali import fn, pipeline_def, types

    # Nothing ahead: DALI would prefetch two batches while the others are timed.
    @pipeline_def(
        batch_size=len(files), num_threads=case.threads, device_id=0 if case.device == "cuda" else None,
        prefetch_queue_depth=1, exec_async=False, exec_pipelined=False,
    )  # fmt: skip
    def graph():
        data = fn.external_source(source=lambda: [np.frombuffer(one, np.uint8) for one in files], batch=True)
        images = fn.decoders.image(data, device="mixed" if case.device == "cuda" else "cpu", output_type=types.RGB)
        images = fn.resize(images, resize_shorter=SIZE, interp_type=types.INTERP_CUBIC, antialias=True)
        return fn.crop(images, crop=(SIZE, SIZE))

    pipeline = graph()
    pipeline.build()

    def run() -> None:
        (pixels,) = pipeline.run()
        pixels = pixels.as_cpu() if case.device == "cuda" else pixels
        assert pixels.as_array().shape == (len(files), SIZE, SIZE, 3)

    return run


@pytest.mark.parametrize("case", CASES[:1], ids=lambda case: case.key)
def test_decode(case, benchmark):
    with prepare(case) as prepared:
        benchmark(prepared.providers["fastlatent-pillow"]())


if __name__ == "__main__":
    harness.main(CASES, prepare)
