"""The engine and the batch size where the user leaves the choice to us."""

from __future__ import annotations

import torch

# Compiling one shape takes a minute or so, which fewer images than this do not win back.
COMPILE_FROM = 2_000
# Images of up to 256² in a batch.
BASE_BATCH = {"cpu": 16, "cuda": 64}
# Clips of 16 frames of 224² in a batch of a teacher. On CUDA 32 fill the GPU: 1,568 tokens each.
CLIP_BATCH = {"cpu": 4, "cuda": 32}


def choose_engine(device: torch.device, images: int, shapes: tuple[tuple[int, int], ...]) -> tuple[str, int, str]:
    """(engine, batch size, reason for both) for `images` pictures of the sizes `shapes` (H, W), one for each bucket.

    The rule, in full. Nothing is measured and no free memory is looked at, so that a repeat gives the same bytes:

    engine      on the CPU `eager`; on CUDA `compile` above 2,000 images per shape (each shape is compiled by itself),
                else `eager`. `aoti` and `tensorrt` are never chosen: ask for them by name.
    batch       64 on CUDA, 16 on the CPU, for a largest shape of up to 256² pixels; divided by how many times more
                pixels it has, rounded down to a power of two, at least 1. So 64, 16, 4 on CUDA and 16, 4, 1 on the CPU
                at 256², 512², 1024². One number for all buckets.

    Raises:
        ValueError: no shape.
    """
    if not shapes:
        raise ValueError("choose_engine: expected one or more shapes (H, W), got none")
    height, width = max(shapes, key=lambda shape: shape[0] * shape[1])
    base = BASE_BATCH[device.type]
    batch = 1 << (max(1, min(base, base * 256**2 // (height * width))).bit_length() - 1)
    name, why = "eager", "on the CPU"
    if device.type == "cuda":
        limit = COMPILE_FROM * len(shapes)
        name = "compile" if images > limit else "eager"
        why = f"{images:,} images, {'more than' if images > limit else 'at most'} {limit:,}"
    return name, batch, f"{why}; batch {batch}: the largest shape is {height}×{width}"


def choose_clip_engine(device: torch.device, clips: int, teacher: bool) -> tuple[str, int, str]:
    """(engine, batch size, reason for both) for `clips` clips; as with `choose_engine`, by rule alone.

    teacher     on the CPU `eager`, batch 4; on CUDA batch 32, `compile` from 2,000 clips on, else `eager`
    autoencoder `eager`, batch 1: one clip of many frames fills a device, and its length may differ from the next
    """
    if not teacher:
        return "eager", 1, "an autoencoder of videos: clip by clip"
    batch = CLIP_BATCH[device.type]
    if device.type == "cpu":
        return "eager", batch, f"on the CPU; batch {batch}"
    many = clips >= COMPILE_FROM
    why = f"{clips:,} clips, {'at least' if many else 'fewer than'} {COMPILE_FROM:,}; batch {batch}"
    return "compile" if many else "eager", batch, why
