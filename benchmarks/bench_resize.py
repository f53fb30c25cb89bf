"""fastlatent.ops.resize against Pillow: photographs to the pixels an autoencoder sees, as ADM's center_crop has them.

One call transforms IMAGES images of one size, shared out to `threads` threads, as the decoding threads of an encode
process do; times are per image. "pillow" makes the same crop exactly, from whole resized images, as the published
preprocessing does; "torch" by its antialiased uint8 interpolation, which differs from Pillow by up to 1 in a pass. On a
GPU the images are there already, as a decoder leaves them, and the crops stay. The floor copies the bytes of an image
and its crop once.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

# torch's OpenMP threads spin for milliseconds after each call, on cores that the next provider needs.
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"

import harness
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from fastlatent.media.transforms import center_crop

IMAGES = 8
# (height, width): ImageNet's commonest size, one bicubic resize; a photograph, three box halvings before it.
SIZES = ((375, 500), (1708, 2560))
SIDE = 256


def make_case(height: int, width: int, device: str, threads: int) -> harness.Case:
    return harness.Case(
        "resize",
        {"transform": "adm", "height": height, "width": width, "size": SIDE, "images": IMAGES},
        "uint8",
        device,
        ("fastlatent", "pillow", "torch", "copy") if device == "cpu" else ("fastlatent", "torch", "copy"),
        threads=threads,
    )


CASES = [make_case(*size, "cpu", threads) for size in SIZES for threads in (1, 2)]
if torch.cuda.is_available():
    CASES += [make_case(*size, "cuda", 1) for size in SIZES]


def pillow_crop(image: Image.Image) -> np.ndarray:
    while min(image.size) >= 2 * SIDE:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = SIDE / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - SIDE) // 2, (image.height - SIDE) // 2
    return np.asarray(image.crop((left, top, left + SIDE, top + SIDE)))


def torch_crop(image: Tensor) -> Tensor:
    """[H, W, 3] as a decoder gives it; the halvings by average pooling, which has no uint8."""
    planes = image.permute(2, 0, 1)[None]
    while min(planes.shape[2:]) >= 2 * SIDE:
        planes = torch.nn.functional.avg_pool2d(planes.float(), 2).add_(0.5).byte()
    height, width = planes.shape[2:]
    scale = SIDE / min(height, width)
    height, width = round(height * scale), round(width * scale)
    # CUDA interpolates floats only.
    planes = planes if planes.device.type == "cpu" else planes.float()
    planes = torch.nn.functional.interpolate(planes, (height, width), mode="bicubic", antialias=True)
    planes = planes if planes.dtype == torch.uint8 else planes.add_(0.5).clamp_(0, 255).byte()
    top, left = (height - SIDE) // 2, (width - SIDE) // 2
    return planes[0, :, top : top + SIDE, left : left + SIDE].permute(1, 2, 0).contiguous()


@contextmanager
def prepare(case: harness.Case) -> Iterator[harness.Prepared]:
    height, width, device = int(case.sizes["height"]), int(case.sizes["width"]), case.device
    generator = np.random.default_rng(0)
    arrays = [generator.integers(0, 256, (height, width, 3), dtype=np.uint8) for _ in range(IMAGES)]
    tensors = [torch.from_numpy(array).to(device) for array in arrays]
    size = IMAGES * 3 * (height * width + SIDE * SIDE)
    source = torch.empty(size // 2, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    threads_before = torch.get_num_threads()
    torch.set_num_threads(1)  # of each image; the images are shared out
    pool = ThreadPoolExecutor(case.threads)

    def each(function: Callable[[object], object], images: list) -> Callable[[], Callable[[], object]]:
        def run() -> list[object]:
            return [function(image) for image in images] if case.threads == 1 else list(pool.map(function, images))

        return lambda: run

    factories = {
        "fastlatent": each(lambda image: center_crop(image, SIDE), arrays if device == "cpu" else tensors),
        "pillow": each(pillow_crop, [Image.fromarray(array) for array in arrays]),
        "torch": each(torch_crop, tensors),
        "copy": lambda: lambda: target.copy_(source),
    }
    try:
        yield harness.Prepared(
            {name: factories[name] for name in case.providers},
            bytes=size // IMAGES,
            floor="copy",
            rivals=("pillow", "torch"),
            units=IMAGES,
        )
    finally:
        pool.shutdown()
        torch.set_num_threads(threads_before)


@pytest.mark.parametrize(
    "case, provider", [(c, p) for c in CASES for p in c.providers], ids=lambda v: getattr(v, "key", v)
)
def test_resize(benchmark, case, provider):
    with prepare(case) as prepared:
        benchmark(prepared.providers[provider]())


if __name__ == "__main__":
    harness.main(CASES, prepare)
