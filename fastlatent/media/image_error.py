"""Why a file cannot be used. Torch-free."""

from __future__ import annotations

import importlib
from types import ModuleType

# Twice Pillow's warning threshold, where Pillow itself refuses; ours holds even if a library lifted Pillow's.
MAX_PIXELS = 178_956_970


class ImageError(ValueError):
    """A file that cannot be used; the message is one short line, fit for a list of bad files."""


class MissingPackage(ValueError):
    """A package that a file needs and this environment lacks: no fault of the file."""


def refuse_bomb(width: int, height: int) -> None:
    """To be called before anything is decoded: a few bytes can claim terabytes of pixels.

    Raises:
        ImageError: no pixels, or more than MAX_PIXELS.
    """
    if width < 1 or height < 1:
        raise ImageError(f"{width} x {height} pixels")
    if width * height > MAX_PIXELS:
        raise ImageError(f"{width} x {height} pixels, more than {MAX_PIXELS}")


def optional_package(name: str, what: str) -> ModuleType:
    """Import a package of the extra [media].

    Raises:
        MissingPackage: it cannot be imported.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingPackage(
            f"{what} is decoded by {name}, which cannot be imported ({error}): pip install 'fastlatent[media]'"
        ) from None
