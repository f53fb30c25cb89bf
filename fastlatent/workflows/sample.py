"""checkpoint → latents, and images."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from fastlatent.config import SampleConfig
from fastlatent.encoders.protocol import Autoencoder
from fastlatent.pipeline.checkpoints import TRAINING_STATE, step_of
from fastlatent.pipeline.interrupt import StopRequest
from fastlatent.pipeline.progress import Progress
from fastlatent.workflows.decode_images import load_matching_autoencoder
from fastlatent.workflows.image_files import ImageFiles, decode_batch
from fastlatent.workflows.latent_files import LatentFile
from fastlatent.workflows.runtime import keep_config, set_up
from fastlatent.workflows.sample_models import Samples, open_samples
from fastlatent.workflows.sample_requests import columns_of_sheet

LATENTS = "latents.safetensors"
# The process that is done first waits for the one with the most batches.
WAIT = timedelta(days=7)


def sample(config: SampleConfig) -> None:
    """Sample from a checkpoint of any kind; see SampleConfig.

    Under torchrun each process takes whole batches, so that every file is as one process would write it.
    """
    output = Path(config.output)
    _check_output(config, output)
    device = set_up(config.device, config.threads)
    with _processes() as (rank, world_size):
        samples = open_samples(config, device)
        if samples.in_pixels and not config.decode:
            raise ValueError("--no-decode: this model samples pixels, there are no latents; leave it out")
        for flag, given in (("--vae", config.vae), ("--allow-other-vae", config.allow_other_vae)):
            if samples.in_pixels and given:
                raise ValueError(f"{flag}: this model samples pixels, there is nothing to decode; leave it out")
        batches = -(-samples.count // config.batch_size)
        if rank == 0 and batches < world_size:
            print(f"{world_size - batches} of {world_size} processes have no batch: choose a smaller --batch-size")
        # Before hours of sampling, not after: is there an autoencoder that fits, can the result be written?
        vae = _autoencoder(config, samples, device) if config.decode and not samples.in_pixels else None
        files = None
        if config.decode:
            files = ImageFiles(output, bit_depth=int(config.bit_depth))
        else:
            output.parent.mkdir(parents=True, exist_ok=True)
        parts = _all_parts(_sample_batches(config, samples, vae, files, rank, world_size), rank, world_size)
        if rank == 0:
            _finish(config, samples, files, latent_file(samples, parts))


def _check_output(config: SampleConfig, output: Path) -> None:
    folder = Path(config.checkpoint).resolve()
    if step_of(folder) is not None and (folder / TRAINING_STATE).exists():
        folder = folder.parent  # of the run that it belongs to
    if output.resolve().is_relative_to(folder):
        raise ValueError(f"--output {output} lies inside {folder}, which belongs to the training; name another place")
    if not config.decode:
        if output.suffix != ".safetensors":
            raise ValueError(f"--no-decode writes a file: expected --output NAME.safetensors, got {output}")
        if output.is_dir():
            raise ValueError(f"--output {output} is a folder; --no-decode writes a file")
        for flag, given in (("--npz", config.npz), ("--bit-depth 16", config.bit_depth == "16")):
            if given:
                raise ValueError(f"{flag} is about images, which --no-decode leaves out")
    elif output.suffix == ".safetensors":
        raise ValueError(
            f"--output {output}: without --no-decode it is a folder; add --no-decode to write latents only"
        )
    if config.npz and config.bit_depth == "16":
        raise ValueError("--npz holds 8 bits per channel; leave out --bit-depth 16")


@contextlib.contextmanager
def _processes() -> Iterator[tuple[int, int]]:
    """(rank, world size), as a launcher such as torchrun says; without one (0, 1)."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield 0, 1
        return
    dist.init_process_group("gloo", timeout=WAIT)
    try:
        yield dist.get_rank(), dist.get_world_size()
    finally:
        dist.destroy_process_group()


def _autoencoder(config: SampleConfig, samples: Samples, device: torch.device) -> Autoencoder:
    return load_matching_autoencoder(
        config.vae, samples.vae, samples.channels, device, torch.float32, allow_other=config.allow_other_vae
    )


def _sample_batches(
    config: SampleConfig, samples: Samples, vae: Autoencoder | None, files: ImageFiles | None, rank: int, world: int
) -> list[Tensor]:
    """This process's batches: number rank, rank + world, …; their images are written, their latents returned."""
    begins = range(rank * config.batch_size, samples.count, world * config.batch_size)
    mine = sum(min(config.batch_size, samples.count - begin) for begin in begins)
    parts = []
    with StopRequest() as stop, Progress("sample", mine * samples.steps, samples.unit) as progress:

        def on_step(rows: int) -> None:
            stop.check()
            progress.advance(rows)

        for begin in begins:
            try:
                batch = samples.run(begin, min(begin + config.batch_size, samples.count), on_step).cpu()
            except RuntimeError as error:
                if not config.compile:
                    raise
                reason = str(error).strip().split("\n")[0]
                raise ValueError(f"--compile failed: {reason}; leave out --compile") from error
            bad = int((~batch.isfinite()).flatten(1).any(1).sum())
            if bad:
                raise ValueError(
                    f"{bad} of the samples {begin} to {begin + len(batch) - 1} are not finite; try a smaller "
                    "--cfg-scale, more --num-inference-steps, or --dtype float32"
                )
            if files is not None:
                raw = latent_file(samples, [batch]).raw()
                files.write(range(begin, begin + len(raw)), raw if vae is None else decode_batch(vae, raw))
            if not samples.in_pixels:
                parts.append(batch)
    return parts


def _all_parts(own: list[Tensor], rank: int, world_size: int) -> list[Tensor]:
    """The batches of all processes in order, at rank 0 once all are there; at the others nothing."""
    if world_size == 1:
        return own
    gathered: list[list[Tensor]] | None = [[]] * world_size if rank == 0 else None
    dist.gather_object(own, gathered)
    if gathered is None:
        return []
    longest = max(len(parts) for parts in gathered)
    return [parts[i] for i in range(longest) for parts in gathered if i < len(parts)]


def latent_file(samples: Samples, parts: list[Tensor]) -> LatentFile:
    """What was sampled, with what undoes its normalisation."""
    latents = torch.cat(parts) if parts else torch.empty(0, samples.side**2, samples.channels)
    labels = torch.full((samples.count,), -1) if samples.labels is None else samples.labels
    return LatentFile(latents, labels, samples.mean, samples.std, samples.vae, samples.classes, samples.conditions)


def _finish(config: SampleConfig, samples: Samples, files: ImageFiles | None, file: LatentFile) -> None:
    output = Path(config.output)
    if files is None:
        file.write(output)
        keep_config(output.with_name(output.name + ".yaml"), config)
        print(f"{output}: latents {list(file.latents.shape)}")
        return
    if not samples.in_pixels:
        file.write(output / LATENTS)
    keep_config(output / "sample.yaml", config)
    columns = columns_of_sheet(config, samples.count)
    files.finish(file.names(), columns=columns, npz=config.npz, labels=samples.labels)
    print(f"{output}: {samples.count} images, sheet.png{', samples.npz' if config.npz else ''}")
