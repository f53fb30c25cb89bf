"""images → autoencoder."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL

from fastlatent.config import TrainVaeConfig
from fastlatent.data.images import ImageLoader
from fastlatent.encoders.diffusers_autoencoders import DiffusersAutoencoder
from fastlatent.encoders.load import load_autoencoder
from fastlatent.encoders.sigma_vae import SigmaVAE
from fastlatent.pipeline.checkpoints import checkpoints
from fastlatent.sources.items import Source, items_digest
from fastlatent.sources.open import kind_of, open_source
from fastlatent.training import discriminator, lpips
from fastlatent.training.vae import (
    LDM_KL_WEIGHT,
    PREVIEW_IMAGES,
    STATISTICS,
    FixedImages,
    VaeLoss,
    VaeObjective,
    VaeWeights,
)
from fastlatent.training.vae_networks import (
    KL16,
    SIGMA_PATCH,
    KlNetwork,
    Network,
    SigmaNetwork,
    new_kl,
    new_kl16,
    new_sigma,
)
from fastlatent.workflows.encode_images import parse_range
from fastlatent.workflows.runtime import refuse_output_in_source
from fastlatent.workflows.train import Run, count_weights, run_training, training_run

# Settings that are sizes, under the names that diffusers' config has for them.
_SIZES = {
    "latent_channels": "latent_channels", "block_out_channels": "block_out_channels",
    "layers_per_block": "layers_per_block", "norm_groups": "norm_num_groups",
}  # fmt: skip
_DEFAULTS = {field.name: field.default for field in dataclasses.fields(TrainVaeConfig)}


def train_vae(config: TrainVaeConfig) -> None:
    """Train an autoencoder on images; see TrainVaeConfig."""
    if config.channels not in (1, 3):
        raise ValueError(f"--channels: expected 1 (grey) or 3 (RGB), got {config.channels}")
    refuse_output_in_source(config.out, config.source)
    begun = bool(checkpoints(Path(config.out)))
    _check(config, begun)
    initial = _initial(config) if config.init and not begun else None
    perceptual = lpips.load_lpips(config.lpips_weights) if config.lpips_weight and config.lpips_weights else None
    source = _open(config.source, config.split, config.manifest_root, "SOURCE")
    held_out = None
    if config.validation or config.validation_split:
        place = config.validation or config.source
        root = config.manifest_root if kind_of(place) == "manifest" else None
        held_out = _open(place, config.validation_split, root, "--validation")
        _check_held_out(config, place)
    data = items_digest(source.items, "key", "size", "stamp")
    with training_run(config, data, len(source.items)) as run:
        if run.resumed_from:  # what --init named may be gone by now
            network: Network = _network(load_autoencoder(checkpoints(run.folder)[-1]), config.size)
        else:
            network = initial or _new(config)
        if config.decoder_only:
            network.freeze_encoder()
        if config.gradient_checkpointing:
            network.checkpoint_gradients()
        weights = VaeWeights(
            config.mse_weight, config.l1_weight, config.lpips_weight, config.kl_weight, config.kl_reduction,
            config.disc_weight,
        )  # fmt: skip
        loss = VaeLoss(network, weights, perceptual)
        options: dict[str, Any] = {
            "size": network.size, "channels": network.channels, "seed": config.seed, "device": run.device,
            "preserve_input_precision": config.preserve_input_precision,
            "input_range": parse_range(config.input_range) if config.input_range else None,
        }  # fmt: skip
        loader = ImageLoader(
            source, config.batch_size, mirror=config.mirror, rank=run.rank, world_size=run.world_size, **options
        )
        # As many at a time as a step holds: what fits into memory there fits here.
        share = max(1, config.batch_size // run.world_size // config.accumulate)
        measured = FixedImages(loader, config.latent_statistics, share)
        validation = None
        if held_out is not None:
            validation = FixedImages(ImageLoader(held_out, 1, mirror=False, **options), config.validation_images, share)
        shown = FixedImages((validation or measured).loader, PREVIEW_IMAGES, share)
        rate = config.disc_learning_rate
        objective = VaeObjective(
            loader, loss, measured=measured, shown=shown, validation=validation, seed=config.seed, device=run.device,
            disc_learning_rate=config.learning_rate if rate is None else rate, disc_start=config.disc_start,
        )  # fmt: skip
        if run.rank == 0:
            _describe(config, network, loss, source)
        run_training(objective, config, run, publish_files=True)
        if run.rank == 0:
            _describe_statistics(config, run)


def _check(config: TrainVaeConfig, begun: bool) -> None:
    """What can be told from the settings alone, and whether the run has `begun`: then its model is there.

    Raises:
        ValueError: they contradict each other.
    """
    if config.lpips_weight and not config.lpips_weights:
        raise ValueError(f"--lpips-weight {config.lpips_weight} needs --lpips-weights. {lpips.WANTED}")
    for weight, smallest in (("lpips_weight", lpips.SMALLEST_SIDE), ("disc_weight", discriminator.SMALLEST_SIDE)):
        if getattr(config, weight) and config.size < smallest:
            raise ValueError(
                f"--size {config.size}: --{weight.replace('_', '-')} needs images of at least {smallest} pixels a side"
            )
    if begun:
        return
    if config.decoder_only and not config.init:
        raise ValueError("--decoder-only needs --init: the autoencoder whose encoder stays as it is")
    if config.init:
        return
    fixed: Mapping[str, Any] = {}
    if config.layout == "kl-16":
        fixed, factor = {name: KL16[key] for name, key in _SIZES.items()}, 16
    elif config.layout == "sigma-vae":
        fixed, factor = {name: _DEFAULTS[name] for name in _SIZES if name != "latent_channels"}, SIGMA_PATCH
    if fixed:
        _check_given(config, fixed, f"--layout {config.layout}")
        if config.size % factor:
            raise ValueError(f"--size {config.size}: --layout {config.layout} needs a multiple of {factor}")
        return
    levels = len(config.block_out_channels)
    if config.size % 2 ** (levels - 1):
        raise ValueError(
            f"--size {config.size}: {levels} levels in --block-out-channels need a multiple of {2 ** (levels - 1)}"
        )
    if any(width < 1 or width % config.norm_groups for width in config.block_out_channels):
        raise ValueError(
            f"--norm-groups {config.norm_groups} must divide every width of --block-out-channels "
            f"{','.join(map(str, config.block_out_channels))}"
        )


def _check_held_out(config: TrainVaeConfig, place: str) -> None:
    """ValueError where validation would measure images that are trained on."""
    if place != config.source and (
        "://" in place + config.source or Path(place).resolve() != Path(config.source).resolve()
    ):
        return
    if config.split is None or config.validation_split is None or config.split == config.validation_split:
        splits = f"--split {config.split or '(all)'} and --validation-split {config.validation_split or '(all)'}"
        raise ValueError(
            f"--validation: {splits} of {place} would measure images that are trained on; name different ones with "
            "--split and --validation-split, or give --validation other images"
        )


def _check_given(config: TrainVaeConfig, fixed: Mapping[str, Any], by: str) -> None:
    """ValueError where a setting is neither left alone nor what it has to be."""
    for name, value in fixed.items():
        given = getattr(config, name)
        if given not in (value, _DEFAULTS[name]):
            flag, text = f"--{name.replace('_', '-')}", str(given).strip("()").replace(" ", "")
            raise ValueError(f"{flag} {text}: {by} has {str(value).strip('()').replace(' ', '')}; leave {flag} out")


def _initial(config: TrainVaeConfig) -> Network:
    """The autoencoder of --init, which decides on all sizes but that of the images."""
    assert config.init is not None
    loaded = load_autoencoder(config.init)
    by = f"--init {config.init}"
    if isinstance(loaded, SigmaVAE):
        sizes = loaded.config
        fixed = {name: _DEFAULTS[name] for name in _SIZES} | {
            "latent_channels": sizes["latent_size"], "size": sizes["img_size"], "channels": loaded.pixel_channels,
            "layout": "sigma-vae",
        }  # fmt: skip
        _check_given(config, fixed, by)
        return _network(loaded, config.size)
    if type(loaded.model) is not AutoencoderKL or loaded.model.config.in_channels != loaded.model.config.out_channels:
        raise ValueError(f"{by}: expected an AutoencoderKL or a σ-VAE, got {type(loaded.model).__name__}")
    sizes = loaded.model.config
    fixed = {name: tuple(v) if isinstance(v := sizes[key], list) else v for name, key in _SIZES.items()}
    is_kl16 = all(fixed[name] == KL16[key] for name, key in _SIZES.items())
    layout = "kl-16" if is_kl16 and config.layout == "kl-16" else "kl"
    _check_given(config, fixed | {"channels": sizes["in_channels"], "layout": layout}, by)
    if config.size % loaded.size_multiple:
        raise ValueError(f"--size {config.size}: {by} needs a multiple of {loaded.size_multiple}")
    return _network(loaded, config.size)


def _network(loaded: DiffusersAutoencoder | SigmaVAE, size: int) -> Network:
    if isinstance(loaded, SigmaVAE):
        loaded.network.requires_grad_(True)
        return SigmaNetwork(loaded.network, loaded.config)
    loaded.model.requires_grad_(True)
    return KlNetwork(loaded.model, size)


def _new(config: TrainVaeConfig) -> Network:
    if config.layout == "kl-16":
        return new_kl16(config.size, config.channels)
    if config.layout == "sigma-vae":
        return new_sigma(config.size, config.channels, config.latent_channels)
    return new_kl(
        size=config.size, channels=config.channels, latent_channels=config.latent_channels,
        block_out_channels=config.block_out_channels, layers_per_block=config.layers_per_block,
        norm_groups=config.norm_groups,
    )  # fmt: skip


def _open(place: str, split: str | None, root: str | None, name: str) -> Source:
    source = open_source(place, split=split, root=root)
    if not len(source.items):
        reasons = "; ".join(f"{key}: {why}" for key, why in list(source.left_out.items())[:3])
        raise ValueError(f"{name} {place}: expected images, got none that can be used: {reasons or 'none there'}")
    return source


def _describe(config: TrainVaeConfig, network: Network, loss: VaeLoss, source: Source) -> None:
    latent, pixels = 1, network.channels * network.size**2
    for side in network.latent_shape:
        latent *= side
    print(
        f"{count_weights(network.model)} weights; {len(source.items):,} images; a latent holds {latent} numbers, an "
        f"image {pixels}"
    )
    if network.has_posterior:
        unit = loss.weights.ldm_unit(pixels, latent)
        print(
            f"KL weight: latent diffusion's {LDM_KL_WEIGHT:.0e}, a weight of sums over pixels and latents, is "
            f"{LDM_KL_WEIGHT / unit:.2g} here (--kl-reduction {config.kl_reduction}); {config.kl_weight:g} here is "
            f"{config.kl_weight * unit:.2g} there"
        )
    if loss.discriminator is not None:
        print(f"{count_weights(loss.discriminator)} weights of a discriminator, from step {config.disc_start:,} on")
    print(end="", flush=True)


def _describe_statistics(config: TrainVaeConfig, run: Run) -> None:
    file = checkpoints(run.folder)[-1] / STATISTICS
    if not file.exists():
        print("no scaling_factor: the latents were not measured at the last checkpoint", flush=True)
        return
    values = json.loads(file.read_text(encoding="utf-8"))
    fewer = "" if values["count"] >= config.latent_statistics else f", of {config.latent_statistics:,} asked for"
    print(f"scaling_factor {values['scaling_factor']:.6g}, measured on {values['count']:,} latents{fewer}", flush=True)
