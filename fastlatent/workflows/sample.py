"""checkpoint → latents, and images."""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from fastlatent.config import SampleConfig
from fastlatent.diffusion.annealing import annealed_steps
from fastlatent.diffusion.noise import normal
from fastlatent.diffusion.solvers import build_table
from fastlatent.models.checkpoint import CheckpointConfig, load_checkpoint
from fastlatent.models.transformer import Transformer
from fastlatent.pipeline.interrupt import StopRequest
from fastlatent.pipeline.progress import Progress
from fastlatent.sampling.autoregressive import NextTokenSampler
from fastlatent.workflows.decode import decode_to_folder, load_matching_autoencoder, rows_of
from fastlatent.workflows.latent_files import LatentFile
from fastlatent.workflows.runtime import DTYPES, keep_config, set_up

LATENTS = "latents.safetensors"


def sample(config: SampleConfig) -> None:
    """Sample from a next-token-diffusion checkpoint; see SampleConfig."""
    output = Path(config.output)
    if not config.decode and output.suffix != ".safetensors":
        raise ValueError(f"--no-decode writes a file: expected --output NAME.safetensors, got {output}")
    if not config.decode and output.is_dir():
        raise ValueError(f"--output {output} is a folder; --no-decode writes a file")
    if config.decode and output.suffix == ".safetensors":
        raise ValueError(
            f"--output {output}: without --no-decode it is a folder; add --no-decode to write latents only"
        )
    device = set_up(config.device, config.threads)
    model, checkpoint = load_model(config, device)
    labels = parse_labels(config.labels, checkpoint.num_classes).repeat_interleave(config.per_class)
    noise = _noise(config, checkpoint, len(labels))
    # Before hours of sampling, not after: is there an autoencoder that fits, can the result be written?
    vae = None
    if config.decode:
        vae = load_matching_autoencoder(
            config.vae,
            checkpoint.vae,
            checkpoint.in_channels,
            device,
            torch.float32,
            allow_other=config.allow_other_vae,
        )
    sampler = make_sampler(config, model, checkpoint)
    (output if config.decode else output.parent).mkdir(parents=True, exist_ok=True)
    batches = []
    with StopRequest() as stop, Progress("sample", len(labels) * checkpoint.num_tokens, "tokens") as progress:
        for begin in range(0, len(labels), config.batch_size):
            part = slice(begin, begin + config.batch_size)

            def on_token(rows: int) -> None:
                stop.check()
                progress.advance(rows)

            try:
                batch = sampler.sample(labels[part], noise[part], seed=config.seed, first_id=begin, on_token=on_token)
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
            batches.append(batch.cpu())
    latents = torch.cat(batches)
    file = LatentFile(
        latents, labels, checkpoint.latents_mean, checkpoint.latents_std, checkpoint.vae, checkpoint.classes
    )
    if vae is None:
        file.write(output)
        keep_config(output.with_name(output.name + ".yaml"), config)
        print(f"{output}: latents {list(latents.shape)}")
        return
    file.write(output / LATENTS)
    keep_config(output / "sample.yaml", config)
    decode_to_folder(
        functools.partial(rows_of, file.raw()),
        vae,
        output,
        names=file.names(),
        batch_size=config.batch_size,
        columns=max(config.per_class, 4),
    )


def load_model(config: SampleConfig, device: torch.device) -> tuple[Transformer, CheckpointConfig]:
    """The checkpoint that the config names, as the config says."""
    return load_checkpoint(
        config.checkpoint, DTYPES[config.dtype], device, model_config=config.model_config, ema=config.ema
    )


def make_sampler(config: SampleConfig, model: Transformer, checkpoint: CheckpointConfig) -> NextTokenSampler:
    """The sampler with the config's solver, guidance and back ends."""
    solver = config.solver
    if solver == "auto":
        solver = "euler" if checkpoint.prediction_type == "flow" else "dpmsolver++"
    steps = annealed_steps(
        config.num_inference_steps, config.last_inference_steps or config.num_inference_steps, checkpoint.num_tokens
    )
    tables = {n: build_table(solver, n, checkpoint.prediction_type, checkpoint.beta_schedule) for n in set(steps)}
    return NextTokenSampler(
        model,
        [tables[n] for n in steps],
        cfg_scale=config.cfg_scale,
        cfg_schedule=config.cfg_schedule,
        attention=config.attention,
        kv_dtype=torch.float8_e4m3fn if config.fp8_cache else None,
        int8=config.int8,
        published=config.published,
        compile=config.compile,
    )


def parse_labels(text: str, num_classes: int) -> Tensor:
    """ "3,1,4" or "all" → int64 [B]; ValueError for anything else or a class that is not there."""
    if text == "all":
        return torch.arange(num_classes)
    try:
        labels = [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f'--labels: expected class numbers such as "3,1,4", or "all", got {text!r}') from None
    for label in labels:
        if not 0 <= label < num_classes:
            raise ValueError(f"--labels: expected 0 to {num_classes - 1} (this checkpoint's classes), got {label}")
    return torch.tensor(labels)


def _noise(config: SampleConfig, checkpoint: CheckpointConfig, count: int) -> Tensor:
    """Start noise [B, N, C] in float64: from the file, or drawn for each sample's number."""
    shape = (checkpoint.num_tokens, checkpoint.in_channels)
    if config.noise is None:
        return normal(config.seed, range(count), 0, shape)
    try:
        tensors = load_file(config.noise)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"--noise {config.noise}: not a readable safetensors file: {error}") from None
    if "noise" not in tensors:
        raise ValueError(f"--noise {config.noise}: expected a tensor `noise`, found {', '.join(tensors) or 'none'}")
    noise = tensors["noise"]
    if noise.shape != (count, *shape):
        raise ValueError(
            f"--noise {config.noise}: expected [{count}, {shape[0]}, {shape[1]}] [samples, tokens, channels], got "
            f"{list(noise.shape)}; --labels times --per-class gives the samples"
        )
    if not noise.is_floating_point() or not noise.isfinite().all():
        raise ValueError(f"--noise {config.noise}: expected finite floating-point numbers, got {noise.dtype}")
    return noise.double()
