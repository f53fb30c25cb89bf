"""Settings of sample and roundtrip."""

from __future__ import annotations

from dataclasses import dataclass

from fastlatent.config.fields import DEVICE_HELP, MAX_SEED, MAX_THREADS, option, required


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """Sample latents, and images, from a checkpoint of train ar, dit, ddpm or pixel-ddpm."""

    checkpoint: str = required("checkpoint folder (ours, or as published), or run folder", positional=True)
    model_config: str | None = option(
        None, "JSON to read instead of the folder's config.json; partial where the weights tell the rest"
    )
    ema: bool = option(False, "published checkpoints: the averaged weights of other_state.pth (as their --use_ema)")
    output: str = required("folder for images, sheet and latents; with --no-decode a .safetensors file")
    labels: str = option("all", 'class numbers such as "3,1,4", "all", or "random": --num draws from --seed')
    per_class: int = option(1, "samples of each label, one label after the other", minimum=1)
    num: int = option(
        0, "samples in all, labels or conditions repeated in order; 0: each once (labels times --per-class)", minimum=0
    )
    cond: str | None = option(
        None,
        'conditions: a JSON file or JSON such as \'{"temperature": 0.3, "wind": [1, 0, 0]}\', or a list of them; what '
        "is null or not named counts as missing. Without it a model with conditions samples without any",
    )
    num_inference_steps: int = option(20, "denoising steps (of each token, where there are tokens)", minimum=1)
    last_inference_steps: int = option(
        0, "ar: steps of the last token, those between linearly (step annealing, DiSA); 0: as many as the first",
        minimum=0,
    )  # fmt: skip
    cfg_scale: float = option(3.0, "classifier-free guidance; 1 turns it off", minimum=0)
    cfg_schedule: str = option(
        "constant",
        "ar: linear: guidance grows from token to token, up to --cfg-scale (MAR)",
        choices=("constant", "linear"),
    )
    solver: str = option(
        "auto",
        "auto: dpmsolver++, or euler for flow",
        choices=("auto", "dpmsolver++", "ddim", "ddpm", "euler"),
    )
    seed: int = option(
        0, "of noise and random labels; sample i has the same at any batch size and number of processes",
        minimum=0, maximum=MAX_SEED,
    )  # fmt: skip
    noise: str | None = option(None, "ar: safetensors file with tensor `noise` [B, N, C]: start noise of every token")
    dtype: str = option("float32", "of weights and arithmetic", choices=("float64", "float32", "bfloat16", "float16"))
    decode: bool = option(True, "decode the latents to images")
    npz: bool = option(False, "also samples.npz: all images as arr_0 uint8 [N, H, W, C], labels as arr_1")
    bit_depth: str = option("8", "of the PNG files; 16 for models of 16-bit or float images", choices=("8", "16"))
    vae: str | None = option(None, "autoencoder to decode with; otherwise the one that encoded the training set")
    allow_other_vae: bool = option(False, "decode although the autoencoder is not the one that encoded the set")
    batch_size: int = option(
        64, "samples at a time (ar: fewer where caches would not fit); of several processes each takes whole batches",
        minimum=1,
    )  # fmt: skip
    attention: str = option(
        "auto",
        "ar: back end; auto: the first that runs of flash, triton, sdpa",
        choices=("auto", "flash", "triton", "varlen", "sdpa"),
    )
    fp8_cache: bool = option(False, "ar: keep keys and values in float8_e4m3: half the memory of bfloat16, less exact")
    int8: bool = option(False, "ar, CPU: int8 weights with a scale per row: half the bytes of bfloat16, less exact")
    published: bool = option(False, "ar: round timesteps to --dtype as the published code does")
    compile: bool = option(False, "torch.compile the model (ar: the backbone's step)")
    threads: int = option(0, "CPU threads; 0: all cores", minimum=0, maximum=MAX_THREADS)
    device: str = option("auto", DEVICE_HELP)


@dataclass(frozen=True, kw_only=True)
class RoundtripConfig:
    """Take one image through crop, encode and decode: PSNR, SSIM, and both side by side."""

    image: str = required("image; or folder of images or dataset, to draw one at random", positional=True)
    vae: str | None = option(None, "autoencoder; of a dataset otherwise the one that encoded it")
    output: str = option("roundtrip.png", "the picture of both; its settings go beside it, to a .yaml")
    size: int | None = option(None, "side of the square crop, in pixels; otherwise the dataset's, or 256", minimum=1)
    transform: str | None = option(
        None,
        "as of encode; otherwise the dataset's, or adm",
        choices=("adm", "center", "random", "nwm", "buckets"),
    )
    input_range: str | None = option(
        None, 'float images: "LOW,HIGH" become black and white; otherwise the dataset\'s, or 0,1'
    )
    seed: int = option(0, "of the draw and of --transform random", minimum=0, maximum=MAX_SEED)
    dtype: str = option("float32", "dtype the autoencoder runs in", choices=("float32", "bfloat16", "float16"))
    threads: int = option(0, "CPU threads; 0: all cores", minimum=0, maximum=MAX_THREADS)
    device: str = option("auto", DEVICE_HELP)
