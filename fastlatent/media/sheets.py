"""Pictures for people: PNG files, contact sheets and loss curves, each written whole or not at all."""

from __future__ import annotations

import io
import math
import os
import uuid
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SEPARATOR = 2  # pixels between cells
SEPARATOR_GREY = 255
LABEL_HEIGHT = 14  # pixels under a cell; Pillow's built-in font is 10 high
MIN_CELL = 64  # pixels; smaller images are enlarged so that a person can see them


def save_png(path: str | os.PathLike[str], image: np.ndarray) -> None:
    """Write uint8 [H, W, 1 or 3] as a PNG. Like every function here it creates missing parent folders, writes
    beside `path` under a temporary name and renames: a failure leaves what was at `path`.

    Raises:
        ValueError: dtype or shape is not as above.
        OSError: the folder cannot be written.
    """
    _check("save_png", image, "H, W", 3)
    _replace(path, _png(Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)))


def save_sheet(
    path: str | os.PathLike[str],
    images: np.ndarray,
    *,
    columns: int,
    scale: int | None = None,
    labels: Sequence[str] | None = None,
) -> None:
    """Write images as a grid, row by row, in one PNG with SEPARATOR white pixels between cells.

    Args:
        images: uint8 [N, H, W, 1 or 3], N at least 1.
        columns: cells in a row; fewer images make a narrower sheet.
        scale: whole factor by which pixels are repeated; None: the smallest that makes H and W at least
            MIN_CELL.
        labels: N texts, one under each cell, cut off at its width; characters beyond ASCII are shown escaped.

    Raises:
        ValueError: an argument is not as above.
        OSError: the folder cannot be written.
    """
    _check("save_sheet", images, "N, H, W", 4)
    count, height, width, channels = images.shape
    if columns < 1 or (scale is not None and scale < 1):
        raise ValueError(f"save_sheet: expected columns and scale of at least 1, got {columns} and {scale}")
    if labels is not None and len(labels) != count:
        raise ValueError(f"save_sheet: expected {count} labels, one per image, got {len(labels)}")
    if scale is None:
        scale = math.ceil(MIN_CELL / min(height, width, MIN_CELL))
    cells = images.repeat(scale, axis=1).repeat(scale, axis=2)
    if labels is not None:
        strips = np.stack([_label(text, width * scale, channels) for text in labels])
        cells = np.concatenate([cells, strips], axis=1)
    columns = min(columns, count)
    rows = math.ceil(count / columns)
    step_y, step_x = cells.shape[1] + SEPARATOR, cells.shape[2] + SEPARATOR
    sheet = np.full((rows * step_y - SEPARATOR, columns * step_x - SEPARATOR, channels), SEPARATOR_GREY, dtype=np.uint8)
    for i, cell in enumerate(cells):
        y, x = i // columns * step_y, i % columns * step_x
        sheet[y : y + cell.shape[0], x : x + cell.shape[1]] = cell
    save_png(path, sheet)


def save_loss_curve(
    path: str | os.PathLike[str], steps: Sequence[float], series: Mapping[str, Sequence[float]], title: str
) -> None:
    """Write a PNG with one line per series over `steps`; the y axis is logarithmic if every finite value is
    positive.

    Raises:
        ValueError: no steps, no series, or a series of another length than steps.
        OSError: the folder cannot be written.
    """
    if not steps or not series:
        raise ValueError(f"save_loss_curve: expected steps and series, got {len(steps)} and {len(series)}")
    for name, values in series.items():
        if len(values) != len(steps):
            raise ValueError(f"save_loss_curve: {name!r} has {len(values)} values for {len(steps)} steps")
    # Imported here: it takes 0.4 s, and most runs draw no curve. pyplot would keep global state.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, values in series.items():
        # A single point makes no line.
        axes.plot(steps, values, label=name, linewidth=1, marker="." if len(steps) == 1 else None)
    finite = [value for values in series.values() for value in values if math.isfinite(value)]
    if finite and min(finite) > 0:
        axes.set_yscale("log")
    axes.set_xlabel("step")
    axes.set_title(title, parse_math=False)
    axes.grid(visible=True, which="both", alpha=0.3)
    for text in axes.legend().get_texts():
        text.set_parse_math(False)  # a "$" in a name is no formula
    stream = io.BytesIO()
    figure.savefig(stream, format="png")
    _replace(path, stream.getvalue())


def _check(caller: str, images: np.ndarray, axes: str, ndim: int) -> None:
    if images.dtype != np.uint8 or images.ndim != ndim or images.shape[-1] not in (1, 3) or 0 in images.shape:
        raise ValueError(
            f"{caller}: expected uint8 [{axes}, 1 or 3], none of them 0, got {images.dtype} {images.shape}"
        )


def _label(text: str, width: int, channels: int) -> np.ndarray:
    strip = Image.new("L", (width, LABEL_HEIGHT), SEPARATOR_GREY)
    # The built-in font has few glyphs, and a file name may hold bytes that are no text at all.
    ascii_text = " ".join(text.encode("ascii", "backslashreplace").decode().split())
    ImageDraw.Draw(strip).text((1, 1), ascii_text, fill=0, font=ImageFont.load_default())
    return np.repeat(np.asarray(strip)[:, :, None], channels, axis=2)


def _png(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format="PNG")
    return stream.getvalue()


def _replace(path: str | os.PathLike[str], data: bytes) -> None:
    path = os.fspath(path)
    folder = os.path.dirname(path)
    if folder:
        os.makedirs(folder, exist_ok=True)
    # Not derived from the name, which may already have the 255 bytes that file systems allow.
    temporary = os.path.join(folder, f".{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
        os.replace(temporary, path)
    except BaseException as error:
        if os.path.exists(temporary):
            os.unlink(temporary)
        if isinstance(error, OSError) and error.errno:
            raise type(error)(error.errno, error.strerror, path) from None  # not the temporary's name, or none at all
        raise
