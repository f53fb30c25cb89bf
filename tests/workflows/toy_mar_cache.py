"""A latent cache as MAR's script writes it."""

from pathlib import Path

import numpy as np


def make_mar(
    root: Path, *, classes: int, count: int, size: int = 4, keep: bool = True
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """`count` images of each class; key -> moments and moments_flip, where they are kept."""
    draw, arrays = np.random.default_rng(0), {}
    for label in range(classes):
        folder = root / f"class{label}"
        folder.mkdir(parents=True)
        for i in range(count):
            pair = draw.standard_normal((2, 8, size, size)).astype(np.float32)
            np.savez(folder / f"{i:04d}.JPEG.npz", moments=pair[0], moments_flip=pair[1])
            if keep:
                arrays[f"class{label}/{i:04d}.JPEG"] = (pair[0], pair[1])
    return arrays
