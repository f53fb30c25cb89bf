"""One folder with every kind of image file and every fault of one that is known here; small, and the same each time."""

from __future__ import annotations

import io
import struct
import tempfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import imagecodecs
import numpy as np
import OpenEXR
import tifffile
from PIL import Image, features

HEIGHT, WIDTH = 36, 44  # not square, so that a turn shows; no multiple of a JPEG block
HAS_AVIF = "avif" in features.modules and features.check("avif")  # Pillow's wheels since 11.3


@dataclass(frozen=True)
class Corpus:
    """good: key → what it is. bad: key → a regular expression that its reason contains. Keys are below `folder`."""

    folder: Path
    good: dict[str, str]
    bad: dict[str, str]


def picture(seed: int = 0, height: int = HEIGHT, width: int = WIDTH) -> Image.Image:
    """Smooth colours with some noise: JPEG keeps them within a few steps."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    return Image.fromarray((smooth + rng.integers(-4, 5, smooth.shape)).clip(0, 255).astype(np.uint8))


def deep_picture(channels: int = 3) -> np.ndarray:
    """uint16 [HEIGHT, WIDTH, channels] of noise above a flat part, with both ends of the range."""
    values = np.random.default_rng(9).integers(0, 65536, (HEIGHT, WIDTH, 4), dtype=np.uint16)
    values[HEIGHT // 2 :] = 777
    values[0, 0], values[0, 1] = 0, 65535
    return values[:, :, :channels].copy()


def encode(image: Image.Image, format: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format=format, **options)
    return stream.getvalue()


def tiff(values: np.ndarray, **options: object) -> bytes:
    stream = io.BytesIO()
    tifffile.imwrite(stream, values, **options)
    return stream.getvalue()


def exr(channels: dict[str, np.ndarray], **header: object) -> bytes:
    header = {"compression": OpenEXR.ZIP_COMPRESSION, "type": OpenEXR.scanlineimage, **header}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "one.exr")
        OpenEXR.File(header, channels).write(str(path))
        return path.read_bytes()


def exif(orientation: int) -> Image.Exif:
    block = Image.Exif()
    block[0x0112] = orientation
    return block


def png_of(width: int, height: int, depth: int = 8, colour: int = 2) -> bytes:
    """A PNG that claims a size and holds 99 bytes of pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def good_files() -> dict[str, tuple[bytes, str]]:
    """Key → (bytes, what it is)."""
    image = picture()
    grey, palette = image.convert("L"), image.quantize(19)
    clear = image.copy()
    clear.putalpha(picture(1).convert("L"))
    later = [picture(2), picture(3)]
    deep = deep_picture()
    unit = deep.astype(np.float32) / 65535
    files = {
        "jpeg/444.jpg": (encode(image, "JPEG", subsampling="4:4:4"), "JPEG 4:4:4"),
        "jpeg/422.jpg": (encode(image, "JPEG", subsampling="4:2:2"), "JPEG 4:2:2"),
        "jpeg/420.JPG": (encode(image, "JPEG", subsampling="4:2:0"), "JPEG 4:2:0"),
        "jpeg/411.jpeg": (encode(image, "JPEG", subsampling="4:1:1"), "JPEG 4:1:1"),
        "jpeg/progressive.jpg": (encode(image, "JPEG", progressive=True), "progressive JPEG"),
        "jpeg/restarts.jpg": (encode(image, "JPEG", restart_marker_blocks=2), "JPEG with restart markers"),
        "jpeg/grey.jpg": (encode(grey, "JPEG"), "grey JPEG"),
        "jpeg/cmyk.jpg": (encode(image.convert("CMYK"), "JPEG"), "CMYK JPEG"),
        "jpeg/rgb.jpg": (encode(image, "JPEG", keep_rgb=True), "JPEG of RGB components"),
        "jpeg/one pixel.jpg": (encode(picture(4, 1, 1), "JPEG"), "one pixel"),
        "jpeg/tail.jpg": (encode(image, "JPEG") + b"appended by a camera", "JPEG with bytes behind its end"),
        "png/rgb.png": (encode(image, "PNG"), "PNG"),
        "png/rgba.png": (encode(clear, "PNG"), "PNG with alpha"),
        "png/grey alpha.png": (encode(clear.convert("LA"), "PNG"), "grey PNG with alpha"),
        "png/palette.png": (encode(palette, "PNG", transparency=3), "PNG palette, a transparent colour"),
        "png/1-bit.png": (encode(grey.convert("1"), "PNG"), "PNG of 1 bit"),
        "png/16 grey.png": (encode(Image.fromarray(deep[:, :, 0]), "PNG"), "16-bit grey PNG"),
        "png/16 rgb.png": (imagecodecs.png_encode(deep), "16-bit RGB PNG"),
        "png/16 rgba.png": (imagecodecs.png_encode(deep_picture(4)), "16-bit RGBA PNG"),
        "png/one row.png": (encode(picture(5, 1, 50), "PNG"), "one row of pixels"),
        "tiff/8.tif": (encode(image, "TIFF", compression="tiff_lzw"), "8-bit TIFF, LZW"),
        "tiff/16 rgb.tif": (tiff(deep, photometric="rgb", compression="zlib"), "16-bit RGB TIFF"),
        "tiff/16 planar.tiff": (
            tiff(deep.transpose(2, 0, 1).copy(), photometric="rgb", planarconfig="separate"),
            "16-bit planar TIFF",
        ),
        "tiff/float.tif": (tiff(unit, photometric="rgb"), "float RGB TIFF"),
        "tiff/float grey.tif": (tiff(unit[:, :, 0], photometric="minisblack"), "float grey TIFF"),
        "exr/rgb.exr": (exr({"RGB": unit}), "EXR"),
        "exr/grey.exr": (exr({"Y": unit[:, :, 0].copy()}), "grey EXR"),
        "other/webp.webp": (encode(image, "WEBP"), "WebP"),
        "other/animated.webp": (encode(image, "WEBP", save_all=True, append_images=later), "animated WebP"),
        "other/bmp.bmp": (encode(image, "BMP"), "BMP"),
        "other/ppm.ppm": (encode(image, "PPM"), "PPM"),
        "other/pgm.pgm": (encode(grey, "PPM"), "PGM"),
        "wrong names/a png.jpg": (encode(image, "PNG"), "PNG named .jpg"),
        "wrong names/a jpeg.png": (encode(image, "JPEG"), "JPEG named .png"),
        "wrong names/a gif.png": (encode(image, "GIF", save_all=True, append_images=later), "animated GIF named .png"),
        "ünïcode 猫/ключ — 1.jpg": (encode(image, "JPEG"), "a name of many scripts"),
        "ünïcode 猫/with  two spaces .jpg": (encode(image, "JPEG"), "a name with spaces"),
    }
    if HAS_AVIF:
        files["wrong names/an avif.png"] = (encode(image, "AVIF"), "AVIF named .png")
    for orientation in range(2, 9):
        turned = encode(image, "JPEG", exif=exif(orientation))
        files[f"jpeg/orientation {orientation}.jpg"] = (turned, f"JPEG of EXIF orientation {orientation}")
    return files


def bad_files() -> dict[str, tuple[bytes, str]]:
    """Key → (bytes, what its reason contains)."""
    image = picture()
    jpeg, png = encode(image, "JPEG"), encode(image, "PNG")
    deep = deep_picture()
    deep_png = imagecodecs.png_encode(deep)
    unit = deep.astype(np.float32) / 65535
    nan = unit.copy()
    nan[3, 4, 1] = np.nan
    flipped = png[:19] + bytes([png[19] ^ 0xFF]) + png[20:]  # in the width
    no_image = "no readable .* image; starts with"
    files = {
        "faults/empty.jpg": (b"", "empty file"),
        "faults/text.jpg": (b"404: not found\n", no_image),
        "faults/html.png": (b"<!DOCTYPE html><html></html>", no_image),
        "faults/zeros.png": (bytes(4096), no_image),
        "faults/only a header.jpg": (jpeg[:20], "."),
        "faults/broken header.jpg": (jpeg[:2] + b"\0\0" + jpeg[4:], "."),
        "faults/truncated.jpg": (jpeg[: len(jpeg) // 2], "[Tt]runcated"),
        "faults/truncated progressive.jpg": (encode(image, "JPEG", progressive=True)[:-300], "[Tt]runcated"),
        "faults/truncated.png": (png[: len(png) // 2], "[Tt]runcated"),
        "faults/truncated 16-bit.png": (deep_png[: len(deep_png) // 2], "[Tt]runcated"),
        "faults/truncated.webp": (encode(image, "WEBP")[:-99], "."),
        "faults/truncated.tif": (_truncated_tiff(deep), "truncated"),
        "faults/truncated.exr": (exr({"RGB": unit})[:-99], "truncated or broken"),
        "faults/flipped header.png": (flipped, "."),
        "faults/bomb.png": (png_of(60_000, 60_000), "pixels"),
        "faults/bomb 16-bit.png": (png_of(60_000, 60_000, depth=16), "pixels"),
        "faults/nan.exr": (exr({"RGB": nan}), "NaN or infinity"),
        "faults/nan.tif": (tiff(nan, photometric="rgb"), "NaN or infinity"),
        "faults/0 to 255.tif": (tiff(unit * 255, photometric="rgb"), "--input-range LO,HI"),
        "faults/signed.tif": (tiff(deep.astype(np.int16), photometric="rgb"), "signed integer"),
        "faults/only depth.exr": (exr({"Z": unit[:, :, 0].copy()}), "OpenEXR channels Z, expected R, G, B"),
    }
    if HAS_AVIF:
        files["faults/truncated avif.png"] = (encode(image, "AVIF")[:-99], ".")
    return files


def _truncated_tiff(deep: np.ndarray) -> bytes:
    # The directory lies at the front, so that only pixels are missing.
    return tiff(deep, photometric="rgb", rowsperstrip=8)[:-500]


def write_corpus(folder: Path) -> Corpus:
    good, bad = good_files(), bad_files()
    for key, (data, _) in {**good, **bad}.items():
        path = folder / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return Corpus(
        folder, {key: what for key, (_, what) in good.items()}, {key: reason for key, (_, reason) in bad.items()}
    )
