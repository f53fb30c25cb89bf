"""Settings of train: what every model shares, what models of latents share, and those of each model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from fastlatent.config.fields import DEVICE_HELP, MAX_SEED, MAX_THREADS, option, required

BETA_SCHEDULES = ("cosine", "linear", "scaled_linear", "cauchy", "laplace", "exp")
PREDICTION_TYPES = ("epsilon", "v_prediction", "flow")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """What every model shares."""

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {}

    out: str = required("run folder; rerun the same command to resume from its newest checkpoint")
    preset: str | None = option(None, "named recipe: its values replace the defaults; file and flags override it")
    steps: int = option(200_000, "optimiser steps", minimum=1)
    epochs: int = option(0, "passes over the data, in place of --steps; 0: --steps counts", minimum=0)
    batch_size: int = option(32, "samples per optimiser step, over all processes", minimum=1)
    accumulate: int = option(1, "parts that a process takes of its share of a batch, one after the other", minimum=1)
    learning_rate: float = option(1e-4, "peak of the schedule", minimum=0)
    lr_schedule: str = option("cosine", "after the warm-up", choices=("cosine", "linear", "constant"))
    warmup_steps: int = option(100, "linear warm-up", minimum=0)
    adam_beta1: float = option(0.9, "AdamW", minimum=0, maximum=0.999999)
    adam_beta2: float = option(0.98, "AdamW", minimum=0, maximum=0.999999)
    adam_eps: float = option(1e-8, "AdamW", minimum=0)
    weight_decay: float = option(0.01, "AdamW, on matrices only", minimum=0)
    grad_clip: float = option(1.0, "largest global gradient norm; 0: no limit", minimum=0)
    ema_decay: float = option(0.9999, "decay of the weight average; 0 turns it off", minimum=0, maximum=0.999999)
    ema_schedule: str = option(
        "warmup",
        "how the decay gets there. warmup: (1 + step)/(10 + step); power: 1 - (1 + step/inv_gamma)^-power; constant: "
        "from the first step; published: a copy after the first step, then constant (LatentLM's)",
        choices=("warmup", "power", "constant", "published"),
    )
    ema_inv_gamma: float = option(1.0, "of --ema-schedule power", minimum=1e-9)
    ema_power: float = option(0.75, "of --ema-schedule power", minimum=0)
    mixed_precision: str = option("no", "autocast; weights stay float32", choices=("no", "bf16", "fp16"))
    compile: str = option("auto", "torch.compile the model; auto: on CUDA", choices=("auto", "on", "off"))
    gradient_checkpointing: bool = option(False, "compute activations again in the backward pass: less memory")
    fsdp: bool = option(False, "shard weights, gradients and optimiser over the processes (FSDP2) instead of DDP")
    init: str | None = option(None, "checkpoint whose weights training starts from")
    checkpoint_every: int = option(5000, "steps between checkpoints", minimum=1)
    keep_checkpoints: int = option(2, "how many of the newest checkpoints stay", minimum=1)
    trackers: tuple[str, ...] = option((), "also log to these: tensorboard, wandb")
    seed: int = option(0, "of initial weights, order, noise and dropout", minimum=0, maximum=MAX_SEED)
    threads: int = option(0, "CPU threads; 0: all cores", minimum=0, maximum=MAX_THREADS)
    device: str = option("auto", DEVICE_HELP)


@dataclass(frozen=True, kw_only=True)
class ImageConfig:
    """Where images come from: of train vae and pixel-ddpm."""

    source: str = required("folder, manifest, tars or tables of images: a path or an fsspec URL", positional=True)
    split: str | None = option(None, "manifests: only samples of this metadata.split; tables: files that begin so")
    manifest_root: str | None = option(None, "manifests: folder of the images, in place of output_root")
    size: int = option(256, "side of the square centre crop, in pixels", minimum=1)
    channels: int = option(3, "1: grey, 3: RGB", minimum=1)
    mirror: bool = option(False, "mirror half of the images at random")
    preserve_input_precision: bool = option(True, "16-bit and float images keep their values; otherwise 8 bits")
    input_range: str | None = option(None, 'float images: "LOW,HIGH" become black and white; otherwise 0,1')


@dataclass(frozen=True, kw_only=True)
class TrainVaeConfig(TrainConfig, ImageConfig):
    """Train an image autoencoder (diffusers layout) from scratch."""

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        # Latent diffusion's recipe: learning rate 4.5e-6 per sample, discriminator late. Its KL weight of 1e-6 is for
        # sums over values, ours for means: 1e-6·(4·32·32)/(3·256·256) = 2.1e-8, for 4×32×32 latents of 256² images.
        "ldm": {
            "block_out_channels": (128, 256, 512, 512), "batch_size": 12, "learning_rate": 5.4e-5,
            "lr_schedule": "constant", "warmup_steps": 0, "adam_beta1": 0.5, "adam_beta2": 0.9, "weight_decay": 0.0,
            "mse_weight": 0.0, "l1_weight": 1.0, "lpips_weight": 1.0, "kl_weight": 2.1e-8, "disc_weight": 0.5,
            "disc_start": 50_001, "ema_decay": 0.0, "grad_clip": 0.0,
        },
        # LatentLM's: the regulariser is the mean square of the means.
        "sigma-vae": {"layout": "sigma-vae", "kl_weight": 0.01},
        # What manifest-based trainers begin with.
        "manifest": {
            "batch_size": 8, "warmup_steps": 500, "adam_beta1": 0.95, "adam_beta2": 0.999, "weight_decay": 1e-6,
        },
    }  # fmt: skip

    layout: str = option(
        "kl",
        "kl: AutoencoderKL of the sizes below; kl-16: that of MAR and LatentLM (16 channels, side/16); sigma-vae: "
        "LatentLM's σ-VAE, without a learned variance",
        choices=("kl", "kl-16", "sigma-vae"),
    )
    latent_channels: int = option(4, "channels of a latent", minimum=1)
    block_out_channels: tuple[int, ...] = option(
        (128, 256, 256, 256), "width of each level; n levels reduce the side by 2^(n-1)"
    )
    layers_per_block: int = option(2, "residual blocks per level", minimum=1)
    norm_groups: int = option(32, "groups of every GroupNorm; must divide every width", minimum=1)
    mse_weight: float = option(1.0, "weight of the mean squared error per pixel value", minimum=0)
    l1_weight: float = option(1.0, "weight of the mean absolute error per pixel value", minimum=0)
    lpips_weight: float = option(0.0, "weight of LPIPS (VGG16); needs --lpips-weights", minimum=0)
    lpips_weights: str | None = option(None, "weights of VGG16 and LPIPS: a file, or a folder; nothing is downloaded")
    kl_weight: float = option(1e-6, "weight of the KL divergence", minimum=0)
    kl_reduction: str = option(
        "mean", "unit of the KL divergence: mean per latent value, or its sum over each latent", choices=("mean", "sum")
    )
    disc_weight: float = option(0.0, "weight of the adversarial loss before the adaptive factor; 0: none", minimum=0)
    disc_start: int = option(50_001, "first step with the adversarial loss", minimum=0)
    disc_learning_rate: float | None = option(None, "of the discriminator; otherwise --learning-rate", minimum=0)
    decoder_only: bool = option(False, "train the decoder alone; with --init, on the encoder that is there")
    validation: str | None = option(None, "images that PSNR and SSIM are measured on at every checkpoint")
    validation_split: str | None = option(None, "the split of --validation, or of SOURCE where that is not given")
    validation_images: int = option(64, "at most so many are measured", minimum=1)
    latent_statistics: int = option(10_000, "latents that scaling_factor and the like are measured on", minimum=1)


@dataclass(frozen=True, kw_only=True)
class LatentTrainConfig(TrainConfig):
    """Where latents come from: of train ar, dit and ddpm."""

    latents: str = required(
        "dataset written by `fastlatent encode`; or images as encode takes, with --vae", positional=True
    )
    vae: str | None = option(None, "images: the autoencoder that encodes them, every time anew")
    split: str | None = option(None, "images: only samples of this metadata.split")
    manifest_root: str | None = option(None, "manifests: folder of the images, in place of output_root")
    size: int = option(256, "images: side of the square centre crop, in pixels", minimum=1)
    mirror: bool = option(False, "images: mirror half of them at random (a dataset says itself: encode --mirror)")
    preserve_input_precision: bool = option(True, "16-bit and float images keep their values; otherwise 8 bits")
    input_range: str | None = option(None, 'float images: "LOW,HIGH" become black and white; otherwise 0,1')
    normalization: str = option(
        "channel",
        "latents become (raw - mean)/std with mean and std of each channel, or of all values (as published)",
        choices=("channel", "all"),
    )
    latent_statistics: int = option(10_000, "images: latents that mean and std are measured on", minimum=2)


@dataclass(frozen=True, kw_only=True)
class LabelledTrainConfig(LatentTrainConfig):
    """What train ar and dit share."""

    prediction_type: str = option("v_prediction", "what the model predicts", choices=PREDICTION_TYPES)
    beta_schedule: str = option("cosine", "noise schedule of epsilon and v_prediction", choices=BETA_SCHEDULES)
    flow_times: str = option("uniform", "distribution of the times of flow", choices=("uniform", "logit_normal"))
    class_dropout_prob: float = option(0.1, "share of labels replaced by the null class", minimum=0, maximum=1)
    hidden_size: int | None = option(None, "width", minimum=1)
    depth: int | None = option(None, "blocks", minimum=1)
    num_heads: int | None = option(None, "attention heads", minimum=1)
    mlp_ratio: float | None = option(None, "FFN width is floor(hidden·ratio·2/3/64)·64", minimum=0)


_LATENTLM: dict[str, Any] = {
    "weight_decay": 0.1, "ema_schedule": "published", "mixed_precision": "bf16", "normalization": "all",
}  # fmt: skip
_LATENTLM_TOKENIZER = _LATENTLM | {"batch_size": 256, "steps": 200_000}


@dataclass(frozen=True, kw_only=True)
class TrainArConfig(LabelledTrainConfig):
    """Train a next-token-diffusion Transformer (LatentLM) on latents."""

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "latentlm-medium-tokenizer": _LATENTLM_TOKENIZER | {"model": "Transformer-Medium"},
        "latentlm-scaling": _LATENTLM | {"model": "Transformer-L", "batch_size": 2048},
    }

    model: str = option(
        "Transformer-Medium", "published size; flags override single numbers of it; with --init its sizes count instead"
    )
    num_kv_heads: int | None = option(None, "key and value heads (grouped-query attention)", minimum=1)
    diffusion_depth: int | None = option(None, "blocks of the diffusion head", minimum=1)
    batch_mul: int = option(4, "noised copies of each sequence per backbone pass", minimum=1)


@dataclass(frozen=True, kw_only=True)
class TrainDitConfig(LabelledTrainConfig):
    """Train a diffusion Transformer (LatentLM's DiT) on latents."""

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "latentlm-medium-tokenizer": _LATENTLM_TOKENIZER | {"model": "DiT-Medium"},
        "dit": {
            "model": "DiT-XL", "batch_size": 256, "lr_schedule": "constant", "warmup_steps": 0, "weight_decay": 0.0,
            "adam_beta2": 0.999, "prediction_type": "epsilon", "beta_schedule": "linear",
            "ema_schedule": "constant", "grad_clip": 0.0, "patch_size": 2,
        },
    }  # fmt: skip

    model: str = option(
        "DiT-Medium", "published size; flags override single numbers of it; with --init its sizes count instead"
    )
    patch_size: int | None = option(
        None, "side of the square of latent values that is one token; otherwise 1, or that of --init", minimum=1
    )


@dataclass(frozen=True, kw_only=True)
class UNetTrainConfig:
    """What train ddpm and pixel-ddpm share; before TrainConfig among their bases, of which it replaces defaults."""

    warmup_steps: int = option(500, "linear warm-up", minimum=0)
    adam_beta1: float = option(0.95, "AdamW", minimum=0, maximum=0.999999)
    adam_beta2: float = option(0.999, "AdamW", minimum=0, maximum=0.999999)
    weight_decay: float = option(1e-6, "AdamW, on matrices only", minimum=0)
    ema_schedule: str = option("power", "as of the other models", choices=("warmup", "power", "constant", "published"))
    condition_spec: str | None = option(
        None, 'conditions such as "temperature:1,wind:3,wind_mag:1", or none; otherwise those of the dataset'
    )
    cond_dropout_prob: float = option(0.1, "share of samples trained without conditions", minimum=0, maximum=1)
    unet: str = option(
        "auto",
        "class of diffusers; auto: UNet2DConditionModel with conditions (all weights are in unet/), else UNet2DModel",
        choices=("auto", "UNet2DModel", "UNet2DConditionModel"),
    )
    unet_config: str | None = option(None, "config.json of a UNet, in place of the sizes below")
    block_out_channels: tuple[int, ...] = option((256, 256, 256), "width of each level; attention at all but the ends")
    layers_per_block: int = option(2, "residual blocks per level", minimum=1)
    norm_groups: int = option(32, "groups of every GroupNorm; must divide every width", minimum=1)
    prediction_type: str = option("epsilon", "what the model predicts", choices=("epsilon", "v_prediction"))
    beta_schedule: str = option("linear", "noise schedule", choices=BETA_SCHEDULES)
    preview_inference_steps: int = option(50, "denoising steps of the previews", minimum=1, maximum=1000)
    preview_images: int = option(4, "images of the previews", minimum=1)
    enable_xformers_memory_efficient_attention: bool = option(
        False, "accepted for scripts that have it: attention is PyTorch's scaled_dot_product_attention either way"
    )


@dataclass(frozen=True, kw_only=True)
class TrainDdpmConfig(UNetTrainConfig, LatentTrainConfig):
    """Train a latent-diffusion UNet, with or without conditions."""


@dataclass(frozen=True, kw_only=True)
class TrainPixelDdpmConfig(UNetTrainConfig, TrainConfig, ImageConfig):
    """Train a diffusion UNet on pixels, with or without conditions."""

    size: int = option(64, "side of the square centre crop, in pixels", minimum=1)


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Write a checkpoint of train ar or dit as the published LatentLM code reads it."""

    checkpoint: str = required("checkpoint folder, or run folder", positional=True)
    output: str = required("folder to write: checkpoint-STEP/ and `latest`")
