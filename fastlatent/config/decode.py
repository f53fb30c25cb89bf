"""Settings of decode and gallery."""

from __future__ import annotations

from dataclasses import dataclass

from fastlatent.config.fields import DEVICE_HELP, MAX_THREADS, option, required

PROMPTS = "experiments: names or globs of prompt folders separated by commas; also first, last, every:5"
VIDEOS = "experiments: the same for video folders"
STEPS = "experiments: the same for steps, such as step_000,step_019"


@dataclass(frozen=True, kw_only=True)
class DecodeConfig:
    """Decode latents: denoising steps of an experiment or clips of a dataset to videos; other latents to images."""

    latents: str = required(
        "experiment folder (latents/PROMPT/VIDEO/step_*, configs/generation_config.yaml), dataset folder, or latents: "
        ".safetensors of sample, .npz, .pt, .npy, or LightningDiT's shards",
        positional=True,
    )
    output_dir: str | None = option(
        None, "where to write; otherwise EXPERIMENT/latents_videos, or NAME-images or NAME-videos beside the latents"
    )
    vae: str | None = option(
        None, "autoencoder; otherwise the experiment's model_id, or the one that the latents' provenance names"
    )
    allow_other_vae: bool = option(False, "decode although the autoencoder is not the one that made the latents")
    latents_are: str | None = option(
        None,
        "images of files that do not say it: raw as the autoencoder gives them, or scaled by its config's factors",
        choices=("raw", "scaled"),
    )
    prompt_filter: str | None = option(None, PROMPTS)
    video_filter: str | None = option(None, VIDEOS)
    step_filter: str | None = option(None, STEPS)
    format: str = option(
        "auto",
        "auto: mp4 for videos, png for images. gif and png-frames are for videos, jpeg and tiff (float32) for images",
        choices=("auto", "mp4", "gif", "webp", "png-frames", "png", "jpeg", "tiff"),
    )
    fps: float | None = option(
        None,
        "frames a second; otherwise the experiment's video_settings.fps or the clips' --fps, or 12",
        minimum=0.01,
        maximum=1000,
    )
    crf: int = option(18, "quality of mp4: 0 is without loss, 51 the worst", minimum=0, maximum=51)
    scale: float = option(1.0, "videos: factor of width and height", minimum=0.01, maximum=16)
    force: bool = option(False, "experiments: decode again what is decoded already")
    dry_run: bool = option(False, "say what would be decoded, of an experiment also the plan, and stop")
    verbose: bool = option(False, "experiments: a line for each step")
    gpus: str | None = option(None, 'experiments: one process on each of these GPUs, such as "0,1"')
    limit: int = option(0, "images, clips: only the first; 0: all", minimum=0)
    columns: int = option(10, "images per row of sheet.png", minimum=1)
    bit_depth: str = option("8", "of PNG images; 16 for models of 16-bit or float images", choices=("8", "16"))
    batch_size: int = option(16, "images: latents per forward pass", minimum=1)
    engine: str = option(
        "eager",
        "compile: torch.compile; aoti: the same ahead of time, kept in ~/.cache/fastlatent (videos: Wan only)",
        choices=("eager", "compile", "aoti"),
    )
    dtype: str = option(
        "float32",
        "dtype the autoencoder runs in; tf32 is float32 with products rounded to 10 bits on GPUs",
        choices=("float32", "tf32", "bfloat16", "float16"),
    )
    threads: int = option(0, "CPU threads; 0: all cores", minimum=0, maximum=MAX_THREADS)
    device: str = option("auto", DEVICE_HELP)


@dataclass(frozen=True, kw_only=True)
class GalleryConfig:
    """One HTML page of an experiment's videos over its denoising steps, or of a folder of images."""

    folder: str = required("experiment folder, or folder written by decode or sample", positional=True)
    output: str | None = option(None, "the page; otherwise FOLDER/gallery.html")
    height: int = option(
        240, "of the embedded videos and images in pixels, which are never enlarged; 0: as they are", minimum=0
    )
    prompt_filter: str | None = option(None, PROMPTS)
    video_filter: str | None = option(None, VIDEOS)
    step_filter: str | None = option(None, STEPS)
