"""images → autoencoder."""

from __future__ import annotations

from diffusers import AutoencoderKL

from fastlatent.config import TrainVaeConfig
from fastlatent.data.images import ImageLoader
from fastlatent.sources.image_folder import scan_image_folder
from fastlatent.training.vae import ReconstructionLoss, VaeObjective
from fastlatent.workflows.runtime import refuse_output_in_source
from fastlatent.workflows.train import count_weights, run_training, training_run


def train_vae(config: TrainVaeConfig) -> None:
    """Train an AutoencoderKL on a folder of images; see TrainVaeConfig."""
    levels = len(config.block_out_channels)
    factor = 2 ** (levels - 1)
    if config.size % factor:
        raise ValueError(f"--size {config.size}: {levels} levels in --block-out-channels need a multiple of {factor}")
    if config.channels not in (1, 3):
        raise ValueError(f"--channels: expected 1 (grey) or 3 (RGB), got {config.channels}")
    refuse_output_in_source(config.out, config.source)
    if any(width < 1 or width % config.norm_groups for width in config.block_out_channels):
        raise ValueError(
            f"--norm-groups {config.norm_groups} must divide every width of --block-out-channels "
            f"{','.join(map(str, config.block_out_channels))}"
        )
    folder = scan_image_folder(config.source)
    batch_size = config.batch_size
    loader = ImageLoader(
        folder.items,
        batch_size,
        size=config.size,
        channels=config.channels,
        mirror=config.mirror,
        seed=config.seed,
    )
    with training_run(config, data=[item.key for item in folder.items]) as device:
        model = AutoencoderKL(
            in_channels=config.channels,
            out_channels=config.channels,
            latent_channels=config.latent_channels,
            block_out_channels=config.block_out_channels,
            down_block_types=["DownEncoderBlock2D"] * levels,
            up_block_types=["UpDecoderBlock2D"] * levels,
            layers_per_block=config.layers_per_block,
            norm_num_groups=config.norm_groups,
            sample_size=config.size,
        ).to(device)
        loss = ReconstructionLoss(
            model, mse_weight=config.mse_weight, l1_weight=config.l1_weight, kl_weight=config.kl_weight
        )
        latent = config.latent_channels * (config.size // factor) ** 2
        print(
            f"{count_weights(model)} weights; {len(folder.items):,} images; a latent holds {latent} numbers, "
            f"an image {config.channels * config.size**2}",
            flush=True,
        )
        run_training(VaeObjective(loader, loss, device), config, device)
    if loader.failures:
        print(f"{len(loader.failures)} files could not be decoded and were left out:")
        for key, reason in list(loader.failures.items())[:20]:
            print(f"  {key!a}: {reason}")
