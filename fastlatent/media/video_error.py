"""Why a video cannot be used. Torch-free."""

from __future__ import annotations

from fastlatent.media.image_error import ImageError

MAX_FRAME_PIXELS = 2**28
"""16384 × 16384: a few bytes can claim terabytes of pixels."""


class VideoError(ImageError):
    """A video that cannot be used; the message is one short line: what was expected and what came."""


def refuse_size(height: int, width: int) -> None:
    """To be called before anything is decoded.

    Raises:
        VideoError: no pixels, or more than MAX_FRAME_PIXELS.
    """
    if height < 1 or width < 1:
        raise VideoError(f"frames of {width} x {height} pixels")
    if height * width > MAX_FRAME_PIXELS:
        raise VideoError(f"frames of {width} x {height} pixels, more than {MAX_FRAME_PIXELS}")
