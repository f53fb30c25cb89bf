"""`fastlatent encode` end to end against its stages alone: seconds per image, JPEG files to a finished dataset.

"decode" reads, decodes and crops every file with the threads that the end-to-end run has, and does nothing else; "vae"
encodes as many batches. placement "shared": all threads may use all cores, and the floor is the serial bound, decode +
vae (both use all the cores there are). placement "pinned": decoding has one core and the autoencoder another, and the
floor is the slower stage. On CUDA the floor is "vae". The rival is what is written by hand: a DataLoader with worker
processes (Pillow, ADM's crop), the same autoencoder, one file at the end.

`bytes` of a row: the JPEG's, of "fastlatent" the dataset's, per image.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path

import harness
import numpy as np
import torch
from bench_decode import SHAPES, jpegs
from diffusers import AutoencoderKL
from PIL import Image
from rows import Case, Row
from safetensors.torch import save_file

from fastlatent.config import EncodeConfig
from fastlatent.store.records import PlannedItem, Unit
from fastlatent.workflows.encode import encode
from fastlatent.workflows.encode_images import ImageSetup, set_up_images
from fastlatent.workflows.encode_setup import EncodeSetup

# Widths of the autoencoder: one with little work to a pixel, so that decoding counts, and Stable Diffusion's.
WIDTHS = {"narrow": (16, 16, 32, 32), "sd": (128, 256, 512, 512)}
PROVIDERS = ("fastlatent", "decode", "vae", "dataloader")
CUDA = torch.cuda.is_available()


def _case(vae: str, jpeg: str, placement: str, images: int, dtype: str) -> Case:
    sizes: dict[str, int | float | str] = {
        "vae": vae, "jpeg": jpeg, "placement": placement, "images": images, "size": 256,
    }  # fmt: skip
    return Case("encode", sizes, dtype, "cuda" if CUDA else "cpu", PROVIDERS, threads=1 if placement == "pinned" else 2)


CASES = (
    [_case("sd", "500x375", "shared", 4096, "bfloat16")]
    if CUDA
    else [
        _case("narrow", jpeg, placement, 160 if jpeg == "500x375" else 96, "float32")
        for jpeg in SHAPES  # of the large ones decoding takes half as long as encoding, of the others a twentieth
        for placement in ("shared", "pinned")
    ]
)


@contextmanager
def prepare(case: Case) -> Iterator[tuple[harness.Prepared, Path]]:
    """The providers, and the folder of the dataset that "fastlatent" writes."""
    count, pinned = int(case.sizes["images"]), case.sizes["placement"] == "pinned"
    cores = os.sched_getaffinity(0)
    with tempfile.TemporaryDirectory() as folder, _placed(pinned) as on_decode_core:
        root = Path(folder)
        size = write_images(root / "images", count, *SHAPES[str(case.sizes["jpeg"])])
        write_vae(root / "vae", WIDTHS[str(case.sizes["vae"])])
        config = EncodeConfig(
            source=str(root / "images"), vae=str(root / "vae"), out=str(root / "out"), device=case.device,
            compute_dtype=case.dtype, threads=case.threads, readers=case.threads if case.device == "cpu" else 8,
            unit_rows=64 if case.device == "cpu" else 4096,
        )  # fmt: skip
        setup = set_up_images(config)
        unit = whole_unit(setup)
        chunk, threads = setup.reading

        def end_to_end() -> None:
            shutil.rmtree(root / "out", ignore_errors=True)
            with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
                encode(config)

        def decode() -> None:
            parts = [unit.items[i : i + chunk] for i in range(0, count, chunk)]
            with on_decode_core(), ThreadPoolExecutor(threads) as pool:
                assert all(pictures for pictures in pool.map(lambda part: setup.read(unit, part), parts))

        def vae() -> None:
            batch = setup.config.batch_size
            for _ in range(-(-count // batch)):
                pixels = torch.zeros(batch, setup.vae.pixel_channels, 256, 256, device=setup.device)
                moments = setup.engine.encode(pixels).cpu()
            assert moments.isfinite().all()

        functions: dict[str, Callable[[], None]] = {
            "fastlatent": end_to_end,
            "decode": decode,
            "vae": vae,
            "dataloader": by_hand(setup, root, {max(cores)} if pinned else cores),
        }
        prepared = harness.Prepared(
            {name: (lambda function=function: function) for name, function in functions.items()},
            bytes=size // count,
            floor="vae" if case.device == "cuda" else None,
            rivals=("dataloader",),
            units=count,
        )
        yield prepared, root / "out"


def measure(case: Case, seconds: float) -> list[Row]:
    """The rows of a case, with the floor that is made of two of its providers."""
    with prepare(case) as (prepared, out):
        outcomes = harness.interleave(prepared.providers, device="cpu", min_seconds=seconds)
        written = sum(path.stat().st_size for path in out.rglob("*") if path.is_file()) // prepared.units
    found = [
        replace(row, bytes=written) if row.provider == "fastlatent" else row
        for row in harness.rows_of(case, prepared, outcomes)
    ]
    alone = {row.provider: row.p50 for row in found}
    if case.device == "cpu" and alone["decode"] and alone["vae"]:
        both = (alone["decode"], alone["vae"])
        floor = max(both) if case.sizes["placement"] == "pinned" else sum(both)
        found = [
            replace(row, floor_seconds=floor, fraction_of_floor=floor / row.p50) if row.p50 else row for row in found
        ]
    return found


def write_images(folder: Path, count: int, width: int, height: int) -> int:
    """`count` JPEGs in two classes; their bytes."""
    files = jpegs(width, height, min(count, 64))
    for i in range(count):
        path = folder / f"class{i % 2}" / f"{i:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(files[i % len(files)])
    return sum(len(files[i % len(files)]) for i in range(count))


def write_vae(folder: Path, widths: tuple[int, ...]) -> None:
    """A diffusers AutoencoderKL of these widths with random weights."""
    torch.manual_seed(0)
    AutoencoderKL(
        block_out_channels=widths, layers_per_block=2, norm_num_groups=min(32, widths[0]), latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    ).save_pretrained(folder)  # fmt: skip


def whole_unit(setup: EncodeSetup) -> Unit:
    """One unit of all the files."""
    items = []
    for entry in setup.entries():
        digest, _ = setup.examine(entry)
        items.append(PlannedItem(entry.key, entry.path, digest, entry.size, entry.mtime_ns))
    return Unit.of("0" * 64, setup.schema.buckets[0], tuple(items))


class Files(torch.utils.data.Dataset):
    """What is written by hand: Pillow, ADM's crop, [-1, 1]."""

    def __init__(self, paths: list[Path]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> torch.Tensor:
        image = Image.open(self.paths[i]).convert("RGB")
        while min(image.size) >= 512:
            image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
        scale = 256 / min(image.size)
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
        pixels = np.asarray(image)
        top, left = (pixels.shape[0] - 256) // 2, (pixels.shape[1] - 256) // 2
        cut = torch.from_numpy(pixels[top : top + 256, left : left + 256].copy())
        return cut.permute(2, 0, 1).float() / 127.5 - 1


def by_hand(setup: ImageSetup, root: Path, core: set[int]) -> Callable[[], None]:
    paths = sorted((root / "images").rglob("*.jpg"))

    def place(worker: int) -> None:
        os.sched_setaffinity(0, core)

    def run() -> None:
        loader = torch.utils.data.DataLoader(
            Files(paths), batch_size=setup.config.batch_size, num_workers=setup.config.readers, worker_init_fn=place
        )
        parts = [setup.vae.encode(batch.to(setup.device)).half().cpu() for batch in loader]
        save_file({"moments": torch.cat(parts).contiguous()}, root / "by_hand.safetensors")

    return run


@contextmanager
def _placed(pinned: bool) -> Iterator[Callable[[], contextlib.AbstractContextManager[None]]]:
    """Pinned: this thread on one core, the threads that read on another. Yields what puts this thread there too."""
    cores = sorted(os.sched_getaffinity(0))
    if not pinned or len(cores) < 2:
        yield contextlib.nullcontext
        return
    original = ImageSetup.read

    def there(*arguments):
        os.sched_setaffinity(0, {cores[1]})  # of the calling thread; Pillow's threads are begun by it
        return original(*arguments)

    @contextmanager
    def on_decode_core() -> Iterator[None]:
        os.sched_setaffinity(0, {cores[1]})
        try:
            yield
        finally:
            os.sched_setaffinity(0, {cores[0]})

    ImageSetup.read = there  # type: ignore[method-assign]
    os.sched_setaffinity(0, {cores[0]})
    try:
        yield on_decode_core
    finally:
        ImageSetup.read = original  # type: ignore[method-assign]
        os.sched_setaffinity(0, set(cores))


def main(argv: Sequence[str] | None = None) -> list[Row]:
    return harness.measure_all(CASES, measure, argv, (__doc__ or "").split("\n")[0])


if __name__ == "__main__":
    main()
