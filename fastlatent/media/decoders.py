"""Decoders of image files, one interface for all: Pillow, DALI and nvImageCodec.

DALI and nvImageCodec take the JPEGs that `plain_jpeg` knows, which they decode on the CPU bit for bit as Pillow does;
every other file, and whatever they refuse, goes to `read_image`, which reads it or says what is wrong with it.
Torch is imported for pixels on a GPU only.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from PIL import Image

from fastlatent.media.image_error import ImageError
from fastlatent.media.images import DECODE_RULE, read_image
from fastlatent.media.jpeg_header import plain_jpeg
from fastlatent.media.orientation import upright

if TYPE_CHECKING:
    import torch

    Pixels = np.ndarray | torch.Tensor

NAMES = ("pillow", "dali", "nvimagecodec")
EXTRAS = {"dali": "dali", "nvimagecodec": "nvimgcodec"}


class Decoder(Protocol):
    """Files → pixels. Called by one thread at a time; it works in threads of its own.

    name: one of NAMES. rule: what it does to a file, for provenance; `input_range` is recorded beside it. device: where
    its pixels are, "cpu" (NumPy) or "cuda:N" (torch).
    """

    name: str
    rule: str
    device: str

    def decode(self, files: Sequence[bytes]) -> list[Pixels | ImageError]:
        """In the order of `files`: pixels [H, W, channels], uint8, or float32 in [0, 1], or why there are none.

        Raises:
            ValueError: a package that a file needs is missing.
        """
        ...

    def close(self) -> None:
        """Ends its threads."""
        ...


class JpegCodec(Protocol):
    """A library that decodes plain JPEGs to uint8 RGB [H, W, 3] as the file lies; None where it cannot."""

    def decode(self, files: Sequence[bytes]) -> list[Pixels | None]: ...

    def close(self) -> None: ...


def choose_decoder(device: str) -> tuple[str, str]:
    """What `--decoder auto` means on a device ("cpu" or "cuda"), and why: (name, reason)."""
    if not device.startswith("cuda"):
        return "pillow", "no GPU is used"
    reasons = []
    for name in ("dali", "nvimagecodec"):
        try:
            _import_codec(name)
        except ValueError as error:
            reasons.append(str(error))
        else:
            return name, "; ".join(["JPEGs are decoded on the GPU", *reasons])
    return "pillow", "; ".join(reasons)


def decoder_of(rule: str) -> str:
    """The name of the decoder with this `rule`."""
    return next((name for name in NAMES if f" jpeg:{name}-" in rule), "pillow")


def open_decoder(
    name: str, *, channels: int, device: str, threads: int, input_range: tuple[float, float] | None = None
) -> Decoder:
    """
    Args:
        name: one of NAMES.
        channels: 1 or 3.
        device: "cpu", "cuda" or "cuda:N": where JPEGs are decoded; Pillow's pixels are on the CPU with any.
        threads: CPU threads.
        input_range: as of `read_image`.

    Raises:
        ValueError: the name is unknown, its package is missing, or it does not work on this machine.
    """
    if name not in NAMES:
        raise ValueError(f"decoder {name!r} is unknown; expected one of {', '.join(NAMES)}")
    if name == "pillow":
        return PillowDecoder(_ReadPool(threads, channels, input_range))
    if device.startswith("cuda"):
        import torch

        index = torch.device(device).index
        index = torch.cuda.current_device() if index is None else index
    else:
        index = None
    codec = _open_codec(name, threads, index)
    return JpegDecoder(name, codec, _ReadPool(threads, channels, input_range), index)


def _open_codec(name: str, threads: int, index: int | None) -> JpegCodec:
    """Opened and tried: one that refused every file would leave them all to `read_image`, unnoticed."""
    place = "the CPU" if index is None else f"GPU {index}"
    stream = io.BytesIO()
    Image.new("RGB", (16, 16)).save(stream, "JPEG")
    try:
        codec: JpegCodec = _import_codec(name)(threads, index)
        (pixels,) = codec.decode([stream.getvalue()])
    except RuntimeError as error:
        raise ValueError(f"decoder {name} does not work on {place}: {' '.join(str(error).split())}") from None
    if pixels is None:
        raise ValueError(f"decoder {name} does not work on {place}: it refused a sound JPEG; see its messages above")
    return codec


def _import_codec(name: str) -> Any:
    try:
        if name == "dali":
            from fastlatent.media.dali_decoder import DaliJpegs

            return DaliJpegs
        from fastlatent.media.nvimagecodec_decoder import NvImageCodecJpegs

        return NvImageCodecJpegs
    except (ImportError, OSError) as error:  # OSError: a library that it loads
        raise ValueError(
            f"decoder {name} cannot be imported ({error}): pip install 'fastlatent[{EXTRAS[name]}]'"
        ) from None


class _ReadPool:
    """`read_image` in threads; Pillow and the libraries for deep files let go of the GIL while they decode."""

    def __init__(self, threads: int, channels: int, input_range: tuple[float, float] | None) -> None:
        self.channels, self.input_range = channels, input_range
        self.threads = ThreadPoolExecutor(threads, thread_name_prefix="decode")

    def submit(self, data: bytes) -> Future[np.ndarray | ImageError]:
        return self.threads.submit(self.read, data)

    def read(self, data: bytes) -> np.ndarray | ImageError:
        try:
            return read_image(data, channels=self.channels, input_range=self.input_range)
        except ImageError as error:
            return error

    def close(self) -> None:
        self.threads.shutdown(cancel_futures=True)


class PillowDecoder:
    """`read_image` in threads."""

    name, rule, device = "pillow", DECODE_RULE, "cpu"

    def __init__(self, pool: _ReadPool) -> None:
        self.pool = pool

    def decode(self, files: Sequence[bytes]) -> list[Pixels | ImageError]:
        if len(files) == 1:  # the caller may have threads of its own
            return [self.pool.read(files[0])]
        return [future.result() for future in [self.pool.submit(data) for data in files]]

    def close(self) -> None:
        self.pool.close()


class JpegDecoder:
    """Plain JPEGs by a codec, on the CPU (index None) or a GPU; the rest by `read_image`, meanwhile."""

    def __init__(self, name: str, codec: JpegCodec, pool: _ReadPool, index: int | None) -> None:
        self.name, self.codec, self.pool = name, codec, pool
        self.device = "cpu" if index is None else f"cuda:{index}"
        self.rule = f"{DECODE_RULE} jpeg:{name}-{'cpu' if index is None else 'cuda'}-1"

    def decode(self, files: Sequence[bytes]) -> list[Pixels | ImageError]:
        headers = [plain_jpeg(data) for data in files]
        futures = {i: self.pool.submit(files[i]) for i, header in enumerate(headers) if header is None}
        plain = {i: header for i, header in enumerate(headers) if header is not None}
        pixels: dict[int, Pixels | ImageError] = {}
        for (i, header), rgb in zip(plain.items(), self.codec.decode([files[i] for i in plain]), strict=True):
            if rgb is None or tuple(rgb.shape) != (header.height, header.width, 3):
                futures[i] = self.pool.submit(files[i])
            else:
                rgb = upright(rgb, header.orientation)
                pixels[i] = luma(rgb) if self.pool.channels == 1 else rgb
        for i, future in futures.items():
            pixels[i] = self._moved(future.result())
        return [pixels[i] for i in range(len(files))]

    def _moved(self, pixels: np.ndarray | ImageError) -> Pixels | ImageError:
        if self.device == "cpu" or isinstance(pixels, ImageError):
            return pixels
        import torch

        return torch.from_numpy(pixels if pixels.flags.writeable else pixels.copy()).to(self.device)

    def close(self) -> None:
        self.codec.close()
        self.pool.close()


def luma(rgb: Pixels) -> Pixels:
    """uint8 [H, W, 3] → [H, W, 1]: Pillow's luma, (19595 R + 38470 G + 7471 B + 2¹⁵) / 2¹⁶, floor."""
    if isinstance(rgb, np.ndarray):
        return np.array(Image.fromarray(rgb).convert("L"))[:, :, None]
    wide = rgb.int()
    sums = 19595 * wide[:, :, :1] + 38470 * wide[:, :, 1:2] + 7471 * wide[:, :, 2:]
    return ((sums + 0x8000) >> 16).byte()
