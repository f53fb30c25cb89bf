"""One HTML page, complete in itself, of an experiment's videos over its denoising steps, or of a folder of images."""

from __future__ import annotations

import base64
import hashlib
import html
import io
import json
import math
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

from fastlatent.config import GalleryConfig
from fastlatent.media.images import ImageError, read_image
from fastlatent.media.videos import choose_video_encoder, open_video, rate, video_info
from fastlatent.pipeline.ahead import ahead
from fastlatent.pipeline.interrupt import StopRequest
from fastlatent.pipeline.progress import Progress
from fastlatent.sources.experiment import Step, natural_order, select
from fastlatent.store.files import inside, make_directory, member, publish, read_bytes
from fastlatent.workflows.decode_records import SUMMARY, VIDEOS

MAX_PAGE_BYTES = 500_000_000  # browsers become slow, and some refuse a page of 512 MB
IMAGES = "images.jsonl"  # the list of ImageFiles, whose module imports torch
CRF = 24  # of videos that are made smaller
THUMBNAIL = (78, 48)  # pixels at most; the page's cells are of this size
QUALITY = 90  # of images that are made smaller (WebP), and of thumbnails (JPEG)
BROWSER_FORMATS = {"PNG": "image/png", "JPEG": "image/jpeg", "WEBP": "image/webp", "GIF": "image/gif"}


class Unreadable(ValueError):
    """A video that cannot be read; the page says so in its place."""


@dataclass(frozen=True)
class Medium:
    """A file of the page, and what the page says of it."""

    data: bytes
    about: dict[str, Any]


@dataclass(frozen=True)
class Page:
    """What is to be written.

    Attributes:
        data: of the page's script. `about` comes last, when it is known what failed.
        media: (entry of `data` that gets the medium's number, or an error; the file).
        embed: makes the medium of one of `media`. Raises Unreadable or ImageError.
        unit: what is counted.
        remedy: against a page that is too large.
    """

    data: dict[str, Any]
    media: list[tuple[dict[str, Any], Path]]
    embed: Callable[[dict[str, Any], Path], Medium]
    unit: str
    remedy: str


def gallery(config: GalleryConfig) -> None:
    """Write the page; see GalleryConfig."""
    folder = Path(config.folder)
    output = Path(config.output) if config.output else folder / "gallery.html"
    if output.is_dir():
        raise ValueError(f"--output {output} is a folder; expected the name of a file, such as {output}/gallery.html")
    listing = find_listing(folder)
    page = _videos(listing, config) if listing.name == SUMMARY else _images(listing, config)
    title = folder.resolve().name or str(folder)
    make_directory(output.parent)

    def write(fd: int) -> str:
        with os.fdopen(fd, "wb", closefd=False) as file:
            _write(file, page, title)
        return output.name

    publish(output.parent, output.name, write)
    failed = sum(entry["media"] is None for entry, _ in page.media)
    print(
        f"{output}: {len(page.media) - failed} {page.unit}{f', {failed} unreadable' if failed else ''}, "
        f"{output.stat().st_size / 1e6:.1f} MB"
    )


def find_listing(folder: Path) -> Path:
    """The decode_summary.json or images.jsonl of an experiment, or of a folder written by decode or sample.

    Raises:
        ValueError: there is neither.
    """
    for path in (folder / SUMMARY, folder / VIDEOS / SUMMARY, folder / IMAGES):
        if path.is_file():
            return path
    if not folder.is_dir():
        raise ValueError(f"{folder}: expected a folder, got {'a file' if folder.exists() else 'nothing there'}")
    if (folder / "latents").is_dir():
        raise ValueError(f"{folder}: nothing is decoded yet; run `fastlatent decode {folder}` first")
    there = sorted(path.name for path in folder.iterdir())
    raise ValueError(
        f"{folder}: expected {SUMMARY}, {VIDEOS}/{SUMMARY} or {IMAGES}, as `fastlatent decode` and `fastlatent sample` "
        f"write them; got {', '.join(there[:20]) or 'an empty folder'}"
    )


def _videos(listing: Path, config: GalleryConfig) -> Page:
    choose_video_encoder("libx264")  # raises where PyAV or its encoder is missing: now, not at every video
    summary = _read_json(read_bytes(listing), str(listing))
    records: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for key, video in member(summary, "video_summaries", dict, str(listing)).items():
        prompt, _, name = key.rpartition("/")
        what = f"{listing}: {key}"
        steps = member(video, "steps", dict, what)
        records[prompt, name] = {step: member(steps, step, dict, what) for step in steps}
    every = [Step(*row, step, listing) for row, steps in records.items() for step in steps]
    if not every:
        raise ValueError(f"{listing}: no step was decoded; see what `fastlatent decode` said")
    chosen, warnings = select(every, config.prompt_filter, config.video_filter, config.step_filter)
    for warning in warnings:
        print(f"gallery: {warning}", file=sys.stderr)
    columns = sorted({step.name for step in chosen}, key=natural_order)
    place = {name: i for i, name in enumerate(columns)}
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    media = []
    for step in chosen:
        key = step.prompt, step.video
        row = rows.setdefault(
            key, {"prompt": step.prompt, "video": step.video, "text": "", "steps": [None] * len(columns)}
        )
        record = records[key][step.name]
        metadata = dict(_mapping(record, "metadata"))
        text = metadata.pop("prompt", None)
        row["text"] = row["text"] or (text if isinstance(text, str) else "")
        latent = _mapping(record, "latent")
        notes = record.get("notes")
        facts = [
            *metadata.items(),
            ("latent", latent.get("shape")),
            ("decode time (s)", record.get("decode_time")),
            ("notes", "; ".join(map(str, notes)) if isinstance(notes, list) else ""),
        ]
        entry: dict[str, Any] = {
            "media": None,
            "error": str(record.get("error") or ""),
            "fps": record.get("fps"),
            "latent": latent,
            "facts": facts,
        }
        row["steps"][place[step.name]] = entry
        if record.get("success"):
            output = member(record, "output", str, f"{listing}: {step.folder}/{step.name}")
            media.append((entry, inside(listing.parent, output, f"{listing}: {step.folder}/{step.name}")))
        elif not entry["error"]:
            entry["error"] = "no reason is recorded"
    failed = len(chosen) - len(media)
    about = [
        str(summary.get("model_id") or ""),
        f"{len(rows)} videos, {len(columns)} steps{f', {failed} failed' if failed else ''}",
        "arrow keys: another step, space: play, comma and full stop: one frame",
    ]
    return Page(
        data={"rows": list(rows.values()), "steps": columns, "about": " · ".join(part for part in about if part)},
        media=media,
        embed=lambda entry, path: _clip(path, config.height, entry["fps"]),
        unit="videos",
        remedy="a smaller --height, fewer steps (--step-filter every:5,last) or fewer prompts (--prompt-filter)",
    )


def _images(listing: Path, config: GalleryConfig) -> Page:
    for flag, value in (
        ("--prompt-filter", config.prompt_filter),
        ("--video-filter", config.video_filter),
        ("--step-filter", config.step_filter),
    ):
        if value is not None:
            raise ValueError(f"{flag} is about the videos of an experiment; {listing} lists images")
    images, media = [], []
    for number, line in enumerate(read_bytes(listing).splitlines(), 1):
        what = f"{listing}, line {number}"
        image = _read_json(line, what)
        path = inside(listing.parent, member(image, "file", str, what), what)
        labels = [f"{k}: {v}" for k, v in image.items() if k not in ("file", "name") and v is not None]
        entry = {"media": None, "error": "", "name": str(image.get("name", path.name)), "labels": labels}
        images.append(entry)
        media.append((entry, path))
    if not images:
        raise ValueError(f"{listing}: expected at least one image; was the command that writes them interrupted?")
    return Page(
        data={"images": images, "about": f"{len(images)} images"},
        media=media,
        embed=lambda entry, path: _picture(path, config.height),
        unit="images",
        remedy="a smaller --height",
    )


def _write(file: BinaryIO, page: Page, title: str) -> None:
    """Stream the page: the media as they are made, then the data that refer to them."""
    template = Path(__file__).with_name("gallery.html").read_text(encoding="utf-8")
    head, rest = template.split("@MEDIA@")
    middle, tail = rest.split("@DATA@")
    size = 0

    def put(text: str) -> None:
        nonlocal size
        size += file.write(text.encode("utf-8", "replace"))  # names may hold bytes that are no text

    put(head.replace("@POLICY@", _policy(template)).replace("@TITLE@", html.escape(title)))
    waiting = iter(page.media)
    threads = min(8, os.cpu_count() or 1)

    def embed(task: tuple[dict[str, Any], Path]) -> Medium | str:
        try:
            return page.embed(*task)
        except (Unreadable, ImageError) as error:
            return str(error)

    with (
        ThreadPoolExecutor(threads) as pool,
        StopRequest() as stop,
        Progress("gallery", len(page.media), page.unit) as progress,
    ):
        results = ahead(lambda: next(waiting, None), embed, pool=pool, depth=threads + 1)
        for number, ((entry, _), result) in enumerate(results):
            stop.check()
            if isinstance(result, str):
                entry["error"] = result
            else:
                entry["facts"] = entry.get("facts", []) + result.about.pop("facts", [])
                entry |= result.about | {"media": number}
                put(f'<script id="media-{number}" type="text/plain">')
                put(base64.b64encode(result.data).decode())
                put("</script>\n")
                if size > MAX_PAGE_BYTES:
                    raise ValueError(
                        f"the page would have more than {MAX_PAGE_BYTES / 1e6:.0f} MB ({number + 1} of "
                        f"{len(page.media)} {page.unit} fill that); choose {page.remedy}"
                    )
            progress.advance()
    put(middle)
    put(_script_json(page.data))
    put(tail)


def _policy(template: str) -> str:
    """Content-Security-Policy: the page's own script and style by their hashes, media from within, nothing else."""
    hashes = []
    for tag in ("script", "style"):
        (text,) = re.findall(f"<{tag}>(.*?)</{tag}>", template, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        hashes.append(f"{tag}-src 'sha256-{digest}'")
    return f"default-src 'none'; {'; '.join(hashes)}; img-src data: blob:; media-src blob:; base-uri 'none'"


def _script_json(value: Any) -> str:
    """JSON inside of <script>: without <, > and &, neither a tag nor a comment can begin or end in it."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _clip(path: Path, height: int, recorded: object) -> Medium:
    """A video as an mp4 of at most `height` pixels (0: any) that browsers play; a good mp4 is taken byte for byte.

    recorded: frames a second as the summary has it, for a folder of frames.
    """
    if not path.exists():
        raise Unreadable(f"{path.name} is missing: it was moved or deleted after decoding")
    try:
        frames, width, rows, kept = video_info(path)
        fps = recorded if kept is None else kept
        if not isinstance(fps, (int, float)):
            raise ValueError(f"expected its frames a second in {SUMMARY}, got {fps!r:.40}")
        rate(fps)  # raises where it is out of range
    except (OSError, ValueError) as error:
        raise Unreadable(f"{path.name} cannot be read: {error}") from None
    thumbnail, size = "", [width, rows]
    with tempfile.TemporaryDirectory(prefix="fastlatent-gallery-") as temporary:
        whole = (not height or rows <= height) and _plays(path)
        small = path if whole else Path(temporary) / "clip.mp4"
        if whole:
            for number, frame in enumerate(_frames(path)):
                if number == frames // 2:
                    thumbnail = _thumbnail(frame)
        else:
            scale = min(1.0, height / rows) if height else 1.0
            with open_video(
                small, format="mp4", fps=fps, height=rows, width=width, crf=CRF, scale=scale, encoder="libx264"
            ) as writer:
                for number, frame in enumerate(_frames(path)):
                    if number == frames // 2:
                        thumbnail = _thumbnail(frame)
                    writer.write(frame[None])
            _, *size, _ = video_info(small)
        data = small.read_bytes()
    facts = [("video", f"{width} × {rows}, {frames} frames, {fps:g} a second")]
    about = {"frames": frames, "fps": fps, "size": size, "thumbnail": thumbnail, "facts": facts}
    return Medium(data, about)


def _plays(path: Path) -> bool:
    """Whether browsers play a file as it is: an mp4 of H.264 in 8-bit 4:2:0. That of --crf 0 has a profile that they
    do not know."""
    import av

    if path.suffix != ".mp4":
        return False
    with av.open(f"file:{path}") as container:
        context = container.streams.video[0].codec_context
        return context.name == "h264" and context.pix_fmt == "yuv420p" and "4:4:4" not in (context.profile or "")


def _frames(path: Path) -> Iterator[np.ndarray]:
    """uint8 [H, W, 3], one after another, of a video as decode writes it.

    Raises:
        Unreadable: it is damaged.
    """
    import av

    try:
        if path.is_dir():
            for file in sorted(path.glob("*.png")):
                with Image.open(file) as image:
                    yield np.asarray(image.convert("RGB"))
        elif path.suffix == ".mp4":
            with av.open(f"file:{path}") as container:
                for frame in container.decode(video=0):
                    yield frame.to_ndarray(format="rgb24")
        else:
            with Image.open(path) as animation:
                for number in range(getattr(animation, "n_frames", 1)):
                    animation.seek(number)
                    yield np.asarray(animation.convert("RGB"))
    except (OSError, EOFError, SyntaxError, ValueError, av.FFmpegError) as error:  # of Pillow and PyAV
        raise Unreadable(f"{path.name} cannot be read: {error}") from None


def _thumbnail(frame: np.ndarray) -> str:
    image = Image.fromarray(frame)
    image.thumbnail(THUMBNAIL, Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}"


def _picture(path: Path, height: int) -> Medium:
    """An image of at most `height` pixels (0: any) that browsers show; a good one is taken byte for byte."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ImageError(f"{path.name} cannot be read: {error.strerror}") from None
    pixels = read_image(data, channels=3)
    rows = len(pixels)
    if not height or rows <= height:
        with suppress(UnidentifiedImageError), Image.open(io.BytesIO(data), formats=tuple(BROWSER_FORMATS)) as image:
            return Medium(data, {"type": BROWSER_FORMATS[image.format or ""]})
    if pixels.dtype != np.uint8:
        pixels = np.rint(pixels * 255).astype(np.uint8)
    small = Image.fromarray(pixels)
    if height and rows > height:
        width = max(1, round(small.width * height / small.height))
        small = small.resize((width, height), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    small.save(stream, "WEBP", quality=QUALITY)
    return Medium(stream.getvalue(), {"type": "image/webp"})


def _read_json(data: bytes, what: str) -> Any:
    """JSON in which NaN and numbers beyond float64, which a browser's JSON does not have, become null."""

    def finite(text: str) -> float | None:
        value = float(text)
        return value if math.isfinite(value) else None

    try:
        return json.loads(data, parse_float=finite, parse_constant=lambda _: None)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{what}: expected JSON, got {data[:40]!r} ...: {error}") from None


def _mapping(value: dict[str, Any], name: str) -> dict[str, Any]:
    found = value.get(name)
    return found if isinstance(found, dict) else {}
