"""latents of clips → videos: one for each row of a dataset that encode made of videos by an autoencoder."""

from __future__ import annotations

import json
import os
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from fastlatent.config import DecodeConfig, given
from fastlatent.data.latents import LatentDataset
from fastlatent.encoders.decode_memory import available_memory, plan_decode, weight_bytes
from fastlatent.encoders.engines.numerics import fix_numerics
from fastlatent.encoders.model_folder import find_vae
from fastlatent.encoders.video_autoencoders import load_video_autoencoder, video_autoencoder_on_meta
from fastlatent.media.videos import FORMATS, choose_video_encoder, open_video, output_path
from fastlatent.pipeline.interrupt import StopRequest
from fastlatent.pipeline.progress import Progress
from fastlatent.store.files import write_atomic
from fastlatent.store.reader import PROVENANCE, Dataset, read_provenance
from fastlatent.workflows.decode_experiment import FPS
from fastlatent.workflows.decode_images import check_made_by
from fastlatent.workflows.decode_steps import to_frames
from fastlatent.workflows.encode_setup import engine_cache
from fastlatent.workflows.latent_inputs import dataset_means
from fastlatent.workflows.runtime import DTYPES, keep_config, set_up

LISTING = "videos.jsonl"
_OF_OTHERS = (
    "latents_are", "prompt_filter", "video_filter", "step_filter", "force", "verbose", "gpus", "columns", "bit_depth",
    "batch_size",
)  # fmt: skip


def is_dataset_of_clips(path: Path) -> bool:
    return (path / PROVENANCE).is_file() and "view" in read_provenance(path)["hashed"]


def decode_clips(config: DecodeConfig) -> None:
    """Decode a dataset of clips: videos/NNNNNN.mp4 … in the order of its rows, and videos.jsonl with their keys.

    One after the other, in tiles where memory needs it; not the mirrored ones.

    Raises:
        ValueError: a setting is for something else, the rows are a teacher's tokens, or the autoencoder is not there,
            does not fit in memory or is not the one that made the rows.
    """
    dataset = LatentDataset(config.latents)
    store = dataset.store
    _check(config, store)
    format = "mp4" if config.format == "auto" else config.format
    if format == "mp4":
        choose_video_encoder()  # raises where there is none
    device, dtype = set_up(config.device, config.threads), DTYPES[config.dtype]
    fix_numerics(tf32=config.dtype == "tf32")
    path = config.vae or dataset.autoencoder["path"]
    if path is None:
        raise ValueError("these latents do not say which autoencoder made them; name it with --vae PATH")
    folder = find_vae(path, near=store.path)
    count = min(config.limit or len(store), len(store))
    empty = video_autoencoder_on_meta(folder, dtype)
    plans = {}  # of each bucket
    for number in np.unique(store.bucket[:count]).tolist():
        bucket = store.buckets[number]
        plans[number] = plan_decode(
            empty, (1, bucket.channels, *bucket.shape[2:]), weight_bytes=weight_bytes(empty),
            available=available_memory(device), device=device,
        )  # fmt: skip
        print(plans[number].text)
    fps = config.fps or _fps(store.provenance["hashed"]["view"]["sampling"])
    output = Path(config.output_dir or f"{os.path.abspath(store.path)}-videos")
    print(f"{store.path}: {count} clips to {output}, {format} of {fps:g} frames a second")
    if config.dry_run:
        return
    vae = load_video_autoencoder(folder, device, dtype)
    if not config.allow_other_vae:
        check_made_by(path, dataset.autoencoder, vae.identity())
    if config.engine != "eager":
        vae.use_engine(config.engine, engine_cache())
    places = [output_path(output / "videos", f"{row:06d}", format) for row in range(count)]
    if (output / "videos").exists() and not (output / LISTING).is_file():
        raise ValueError(f"{output / 'videos'} is not of an earlier run of decode; write to another folder")
    keep_config(output / "decode.yaml", config)
    named = [{"file": str(place.relative_to(output)), "name": store.key(row)} for row, place in enumerate(places)]
    write_atomic(output / LISTING, "".join(json.dumps(one) + "\n" for one in named).encode())
    (output / "videos").mkdir(exist_ok=True)
    with StopRequest() as stop, Progress("decode", count, "clips") as progress:
        for row, place in enumerate(places):
            latents = dataset_means(dataset, np.array([row])).to(device)
            with closing(vae.stream(latents, tiles=plans[int(store.bucket[row])].tiles)) as decoded:
                frames, _ = to_frames(next(decoded)).wait()
                _, height, width, channels = frames.shape
                with open_video(
                    place, format=format, fps=fps, height=height, width=width, channels=channels, crf=config.crf,
                    scale=config.scale,
                ) as writer:  # fmt: skip
                    writer.write(frames)
                    for pixels in decoded:
                        stop.check()
                        writer.write(to_frames(pixels).wait()[0])
            stop.check()
            progress.advance()
    print(f"{output}: {count} videos ({format}), {LISTING}")


def _check(config: DecodeConfig, store: Dataset) -> None:
    if store.payload == "tokens":
        raise ValueError(
            f"{store.path}: expected latents of an autoencoder, got a teacher's tokens: nothing decodes them"
        )
    if not len(store):
        raise ValueError(f"{store.path}: expected latents of clips, the dataset is empty")
    if config.format not in ("auto", *FORMATS):
        raise ValueError(f"--format {config.format}: clips become videos: {', '.join(FORMATS)}")
    if flags := given(config, _OF_OTHERS):
        raise ValueError(f"{', '.join(flags)}: not for datasets of clips; leave it out")


def _fps(sampling: dict[str, Any]) -> float:
    """Of the clips where a rate was asked for; else the videos' rates, which nothing recorded, FPS in their place."""
    return sampling["fps"] / sampling["stride"] if sampling["fps"] and sampling["placement"] != "uniform" else FPS
