"""The kinds of checkpoint that `sample` takes, each as one function: a range of sample numbers → latents."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastlatent.config import SampleConfig, given
from fastlatent.diffusion.annealing import annealed_steps
from fastlatent.diffusion.noise import normal
from fastlatent.diffusion.solvers import SolverTable, build_table
from fastlatent.models.checkpoint import AnyCheckpointConfig, CheckpointConfig, DiTCheckpointConfig, load_checkpoint
from fastlatent.models.dit import DiT
from fastlatent.models.transformer import Transformer
from fastlatent.models.unet import ConditionVectors, find_unet, load_unet
from fastlatent.sampling.autoregressive import NextTokenSampler
from fastlatent.sampling.parallel import Denoise, ParallelSampler
from fastlatent.workflows.runtime import DTYPES
from fastlatent.workflows.sample_requests import condition_rows, read_conditions, read_noise, sample_labels

# Settings that only some kinds of model have.
_TOKENS = ("last_inference_steps", "cfg_schedule", "noise", "attention", "fp8_cache", "int8", "published")
_CHECKPOINT = ("model_config", "ema")
_LABELS = ("labels", "per_class")
_CONDITIONS = ("cond",)


@dataclass(frozen=True)
class Samples:
    """What is to be sampled, and how.

    Attributes:
        count: samples in all.
        channels, side: of the square latents, or of the pixels.
        mean, std: raw = sample·std + mean, per channel or for all.
        vae: identity and path of the autoencoder that made the training latents, if known.
        in_pixels: samples are pixels in [−1, 1], and there is no autoencoder.
        labels: int64 [count], or None for a model without classes.
        classes: names of the labels, if known.
        conditions: of the samples, repeated in order; [] if none were given.
        steps, unit: what a sample's progress is counted in.
        run: (begin, end, on_step) → samples begin to end − 1 [B, N, C] in the state dtype, before de-normalisation,
            N = side² in raster order; on_step(rows) is called `steps` times and may raise to stop.
    """

    count: int
    channels: int
    side: int
    mean: float | list[float]
    std: float | list[float]
    vae: dict[str, Any] | None
    in_pixels: bool
    labels: Tensor | None
    classes: list[str]
    steps: int
    unit: str
    run: Callable[[int, int, Callable[[int], None]], Tensor]
    conditions: list[dict[str, Any]] = field(default_factory=list)


def open_samples(config: SampleConfig, device: torch.device) -> Samples:
    """Load the checkpoint, whatever its kind, and check what is asked of it.

    Raises:
        ValueError: nothing can be loaded, or a setting is wrong or not one of this kind of model.
    """
    if find_unet(config.checkpoint) is not None:
        return _unet_samples(config, device)
    model, checkpoint = _load(config, device)
    if isinstance(model, DiT):
        assert isinstance(checkpoint, DiTCheckpointConfig)
        return _dit_samples(config, model, checkpoint, device)
    assert isinstance(checkpoint, CheckpointConfig)
    return _token_samples(config, model, checkpoint)


def load_model(config: SampleConfig, device: torch.device) -> tuple[Transformer, CheckpointConfig]:
    """The next-token-diffusion checkpoint that the config names, as the config says."""
    model, checkpoint = _load(config, device)
    if not isinstance(model, Transformer):
        raise ValueError(
            f"{config.checkpoint}: expected a next-token-diffusion checkpoint, got a {type(model).__name__}; "
            "`fastlatent sample` takes either"
        )
    assert isinstance(checkpoint, CheckpointConfig)
    return model, checkpoint


def _load(config: SampleConfig, device: torch.device) -> tuple[Transformer | DiT, AnyCheckpointConfig]:
    return load_checkpoint(
        config.checkpoint, DTYPES[config.dtype], device, model_config=config.model_config, ema=config.ema
    )


def make_sampler(config: SampleConfig, model: Transformer, checkpoint: CheckpointConfig) -> NextTokenSampler:
    """The sampler of tokens with the config's solver, guidance and back ends."""
    steps = annealed_steps(
        config.num_inference_steps, config.last_inference_steps or config.num_inference_steps, checkpoint.num_tokens
    )
    tables = {n: _table(config, n, checkpoint.prediction_type, checkpoint.beta_schedule) for n in set(steps)}
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


def _table(config: SampleConfig, steps: int, prediction_type: str, beta_schedule: str) -> SolverTable:
    solver = config.solver
    if solver == "auto":
        solver = "euler" if prediction_type == "flow" else "dpmsolver++"
    if (solver == "euler") != (prediction_type == "flow"):
        raise ValueError(
            f"--solver {solver} is {'for flow' if solver == 'euler' else 'not for flow'}; {config.checkpoint} predicts "
            f"{prediction_type}: leave --solver out"
        )
    return build_table(solver, steps, prediction_type, beta_schedule)


def _token_samples(config: SampleConfig, model: Transformer, checkpoint: CheckpointConfig) -> Samples:
    _refuse(config, "a next-token-diffusion model", _CONDITIONS)
    labels = sample_labels(config, checkpoint.num_classes)
    grid = (checkpoint.num_tokens, checkpoint.in_channels)
    given = None if config.noise is None else read_noise(config.noise, len(labels), *grid)
    sampler = make_sampler(config, model, checkpoint)

    def run(begin: int, end: int, on_step: Callable[[int], None]) -> Tensor:
        noise = normal(config.seed, range(begin, end), 0, grid) if given is None else given[begin:end]
        return sampler.sample(labels[begin:end], noise, seed=config.seed, first_id=begin, on_token=on_step)

    return Samples(
        len(labels), checkpoint.in_channels, checkpoint.input_size, checkpoint.latents_mean, checkpoint.latents_std,
        checkpoint.vae, False, labels, checkpoint.classes, checkpoint.num_tokens, "tokens", run,
    )  # fmt: skip


def _dit_samples(config: SampleConfig, model: DiT, checkpoint: DiTCheckpointConfig, device: torch.device) -> Samples:
    _refuse(config, "a DiT", (*_TOKENS, *_CONDITIONS))
    labels = sample_labels(config, checkpoint.num_classes)

    def denoise(x: Tensor, t: Tensor, condition: Tensor | None) -> Tensor:
        assert condition is not None
        return model(x, t, condition)

    table = _table(config, config.num_inference_steps, checkpoint.prediction_type, checkpoint.beta_schedule)
    shape = (checkpoint.in_channels, checkpoint.input_size, checkpoint.input_size)
    sampler = _parallel(config, denoise, table, shape, device, torch.tensor(checkpoint.num_classes))
    return Samples(
        len(labels), checkpoint.in_channels, checkpoint.input_size, checkpoint.latents_mean, checkpoint.latents_std,
        checkpoint.vae, False, labels, checkpoint.classes, sampler.steps, "steps", _run(config, sampler, labels),
    )  # fmt: skip


def _unet_samples(config: SampleConfig, device: torch.device) -> Samples:
    _refuse(config, "a UNet", (*_TOKENS, *_CHECKPOINT, *_LABELS))
    model, unet = load_unet(config.checkpoint, device, DTYPES[config.dtype])
    if not unet.conditions:
        _refuse(config, "a UNet without conditions", _CONDITIONS)
    objects = [] if config.cond is None else read_conditions(config.cond, unet.conditions)
    if not objects and config.cfg_scale not in (1, SampleConfig.cfg_scale):
        raise ValueError(
            f"--cfg-scale {config.cfg_scale:g}: guidance is towards --cond, "
            f"{'which was not given' if unet.conditions else 'and this UNet has no conditions'}"
        )
    count = config.num or len(objects) or 1
    null = rows = None
    if unet.conditions:
        # Nothing given is what training calls dropped: all-missing is something else, and may never have been trained.
        numbers = sum(dims for _, dims in unet.conditions)
        nothing = torch.zeros(1, numbers, dtype=torch.float64), torch.zeros(1, len(unet.conditions))
        vectors = ConditionVectors(unet)
        dropped = vectors(*nothing, torch.ones(1))
        if objects:
            values, present = condition_rows(objects, unet.conditions)
            rows, null = vectors(values, present, torch.zeros(len(objects))), dropped[0]
        else:
            rows = dropped
        rows = rows[torch.arange(count) % len(rows)]

    def denoise(x: Tensor, t: Tensor, condition: Tensor | None) -> Tensor:
        return model(x, t.long(), condition)

    table = _table(config, config.num_inference_steps, unet.prediction_type, unet.beta_schedule)
    sampler = _parallel(config, denoise, table, (unet.channels, unet.side, unet.side), device, null)
    return Samples(
        count, unet.channels, unet.side, unet.latents_mean, unet.latents_std, unet.vae, unet.vae is None, None, [],
        sampler.steps, "steps", _run(config, sampler, rows), objects,
    )  # fmt: skip


def _parallel(
    config: SampleConfig,
    denoise: Denoise,
    table: SolverTable,
    shape: tuple[int, int, int],
    device: torch.device,
    null: Tensor | None,
) -> ParallelSampler:
    return ParallelSampler(
        torch.compile(denoise) if config.compile else denoise,
        table,
        shape,
        dtype=DTYPES[config.dtype],
        device=device,
        cfg_scale=config.cfg_scale,
        null=null,
    )


def _run(
    config: SampleConfig, sampler: ParallelSampler, conditions: Tensor | None
) -> Callable[[int, int, Callable[[int], None]], Tensor]:
    def run(begin: int, end: int, on_step: Callable[[int], None]) -> Tensor:
        noise = normal(config.seed, range(begin, end), 0, sampler.shape)
        condition = None if conditions is None else conditions[begin:end]
        batch = sampler.sample(noise, condition, seed=config.seed, first_id=begin, on_step=on_step)
        return batch.flatten(2).transpose(1, 2)

    return run


def _refuse(config: SampleConfig, kind: str, names: tuple[str, ...]) -> None:
    """ValueError where one of these settings is not its default."""
    for flag in given(config, names):
        raise ValueError(f"{flag}: {config.checkpoint} is {kind}, which has no such setting")
