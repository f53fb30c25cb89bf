"""Video folders: `root/<class>/…/<video>`, or a flat folder of videos; local or behind a URL. Torch-free."""

from __future__ import annotations

import os

from fastlatent.sources.image_folder import VIDEOS, scan_folder
from fastlatent.sources.items import Source


def scan_video_folder(root: str | os.PathLike[str] | bytes, *, captions: str | None = None) -> Source:
    """List the videos below `root`, as `scan_image_folder` lists images: order, classes, captions and what is left out
    are the same. What a file really holds is decided at decoding.

    Raises:
        ValueError: as `scan_image_folder`.
    """
    return scan_folder(root, VIDEOS, captions)
