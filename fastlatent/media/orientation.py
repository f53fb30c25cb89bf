"""EXIF orientation: which way up the pixels are. Torch-free."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

ORIENTATION_TAG = 0x0112
# Swap rows and columns?, then the axes to mirror; 1 is upright.
_TURNS: dict[int, tuple[bool, tuple[int, ...]]] = {
    2: (False, (1,)),
    3: (False, (0, 1)),
    4: (False, (0,)),
    5: (True, ()),
    6: (True, (1,)),
    7: (True, (0, 1)),
    8: (True, (0,)),
}


def orientation_of(image: Image.Image) -> int:
    """1 to 8, of a loaded image; 1 where there is none, or none that can be read."""
    # Pillow has already turned a TIFF while loading it, and forgotten its orientation.
    try:
        return known_orientation(image.getexif().get(ORIENTATION_TAG, 1))
    except Exception:  # as many types as a broken file raises; thousands of photographs carry broken EXIF
        return 1


def orientation_in(exif: bytes) -> int:
    """The same, of the Exif block of a JPEG, which begins with b"Exif\\0\\0"."""
    block = Image.Exif()
    try:
        block.load(exif)
        return known_orientation(block.get(ORIENTATION_TAG, 1))
    except Exception:
        return 1


def known_orientation(value: object) -> int:
    return value if isinstance(value, int) and value in _TURNS else 1


def upright(pixels: Any, orientation: int) -> Any:
    """Turn [H, W, C], a NumPy array or a torch tensor on any device; contiguous where something is turned."""
    if orientation == 1:
        return pixels
    swap, axes = _TURNS[orientation]
    turned = pixels.swapaxes(0, 1) if swap else pixels
    return np.flip(turned, axes).copy() if isinstance(turned, np.ndarray) else turned.flip(axes).contiguous()
