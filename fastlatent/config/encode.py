"""Settings of encode."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fastlatent.config.fields import DEVICE_HELP, MAX_SEED, MAX_THREADS, option, required

VIDEO_KINDS = ("videos", "ssv2", "frames")  # of sources that hold nothing but videos
KINDS = ("auto", "images", "trajectories", "manifest", "tars", "table", *VIDEO_KINDS)
# Where --size and --transform leave it to us, and --frame-stride.
IMAGE_SIZE, IMAGE_TRANSFORM, CLIP_TRANSFORM = 256, "adm", "center"
VAE_STRIDE, TEACHER_STRIDE = 1, 2
MAX_STRIDE, MAX_VIEWS = 100_000, 1000


@dataclass(frozen=True, kw_only=True)
class EncodeConfig:
    """Encode images or videos into a dataset. Rerun the same command to resume or to add new files."""

    source: str = required(
        "images: folder, manifest, tars or tables; videos: folder, SSv2, frame folders or tars; a local path or an "
        "fsspec URL",
        positional=True,
        also="data_root",
    )
    vae: str | None = option(
        None,
        "autoencoder: diffusers folder (of videos also a model or its Hub id), run of `fastlatent train vae`, KL-16 or "
        "other LDM checkpoint",
    )
    teacher: str | None = option(
        None,
        "in place of --vae, a teacher whose tokens of each video are stored: videomaev2-small, -base, -large, -huge, "
        "-giant, videomaev2 (of any size), an entry point of fastlatent.teachers, or MODULE:FUNCTION",
    )
    teacher_weights: str | None = option(
        None, "the teacher's checkpoint: folder or file; without it, its repository on the Hugging Face Hub"
    )
    out: str = option("", "dataset folder to write or to complete")
    cache_dir: str | None = option(None, "in place of --out: a folder of datasets, one for each --split")
    kind: str = option(
        "auto",
        "what the source is; auto: told by suffixes, traj_data.pkl and lists of SSv2",
        choices=KINDS,
    )
    all: bool = option(False, "SOURCE holds several trajectory datasets: encode each, into OUT/NAME")
    split: str | None = option(
        None,
        "manifests: only samples of this metadata.split; tables: files that begin so; SSv2: train, validation, test",
    )
    trajectories: str | None = option(None, "file with the names of the trajectories to encode (traj_names.txt)")
    manifest_root: str | None = option(None, "manifests: folder of the images, in place of output_root")
    copy_pkl: bool = option(False, "trajectories: also copy every traj_data.pkl, to OUT/TRAJECTORY/")
    condition_spec: str = option("none", 'manifests: conditions as columns, such as "temperature:1,wind:3,wind_mag:1"')
    captions: str | None = option(
        None, "carry captions: suffix of files beside the images (txt), key of metadata, or column"
    )
    text_encoder: str | None = option(None, "also store embeddings of the captions: folder of a CLIP or T5 encoder")
    text_length: int = option(0, "tokens of a caption; 0: as many as the encoder takes, at most 256", minimum=0)
    frames: tuple[int, ...] = option(
        (),
        "videos: frames of a clip; several: a video gives the longest that it fills. A teacher has its own number",
    )
    frame_stride: int = option(
        0,
        f"videos: every which frame; 0: {VAE_STRIDE} with --vae, {TEACHER_STRIDE} with --teacher",
        minimum=0,
        maximum=MAX_STRIDE,
    )
    fps: float | None = option(
        None, "videos: frames per second that --frame-stride counts in, by timestamps; otherwise the video's own"
    )
    placement: str = option(
        "center",
        "videos: where in the video a clip lies; uniform: its frames lie over all of it",
        choices=("start", "center", "random", "uniform"),
    )
    views: int = option(1, "videos: clips of each video, a row each", minimum=1, maximum=MAX_VIEWS)
    short: str = option(
        "repeat",
        "videos that are shorter than a clip: repeat the last frame, loop, or leave them out",
        choices=("repeat", "loop", "leave-out"),
    )
    keep_pixels: bool = option(False, "videos: also store the clips' uint8 pixels, for a student of the teacher")
    layer: int = option(0, "teacher: the block whose tokens are stored, from 1 on; 0: the last", minimum=0)
    token_norm: str = option("none", "teacher: layer: tokens normalised, without affine", choices=("none", "layer"))
    pool: str = option(
        "none", "teacher: mean of the tokens of each time step (space), or of all", choices=("none", "space", "all")
    )
    project_to: int = option(
        0, "teacher: tokens of this many numbers, by a fixed random projection; 0: as they are", minimum=0
    )
    size: int = option(
        0,
        "side of the square crop, in pixels; of --transform buckets, root of the area; "
        f"0: {IMAGE_SIZE}, of a teacher its own",
        minimum=0,
    )
    transform: str = option(
        "auto",
        "adm: as ADM and DiT crop; center, random: shorter side bilinear, then a crop; random-resized: a crop of "
        "random place, size and shape; nwm: 4:3 crop, squashed; buckets: sizes by aspect ratio; "
        f"auto: {IMAGE_TRANSFORM}, of videos {CLIP_TRANSFORM}",
        choices=("auto", "adm", "center", "random", "random-resized", "nwm", "buckets"),
    )
    seed: int = option(0, "of random crops, places of clips, and projections", minimum=0, maximum=MAX_SEED)
    mirror: bool = option(False, "also store what each image or clip mirrored left to right gives")
    input_range: str | None = option(None, 'float images: "LOW,HIGH" become black and white; otherwise 0,1')
    decoder: str = option(
        "auto",
        "who decodes; auto: pillow, or on CUDA the first of dali, nvimagecodec, pillow that is installed; of videos "
        "pyav, or on CUDA dali where it is installed",
        choices=("auto", "pillow", "nvimagecodec", "dali", "pyav", "torchcodec"),
    )
    payload: str = option(
        "moments", "of --vae: moments: mean and log-variance; latents: the mean alone", choices=("moments", "latents")
    )
    dtype: str = option(
        "float16",
        "how it is stored; int8 has a scale per channel or token",
        choices=("float16", "bfloat16", "float32", "int8"),
    )
    compute_dtype: str = option(
        "float32", "dtype the autoencoder or teacher runs in", choices=("float32", "bfloat16", "float16")
    )
    engine: str = option(
        "auto",
        "what runs it; auto: what the dataset was begun with, else by device and number of images",
        choices=("auto", "eager", "compile", "aoti", "tensorrt"),
    )
    batch_size: int = option(
        0,
        "images or clips per forward pass, part of the fingerprint; 0: what the dataset was begun with, else by size",
        minimum=0,
    )
    unit_rows: int = option(4096, "rows per shard at most (a shard also stays below 256 MiB)", minimum=1)
    readers: int = option(4, "threads that read and decode", minimum=1, maximum=MAX_THREADS, also="num_workers")
    threads: int = option(
        0, "CPU threads; 0: what the dataset was begun with, or all cores", minimum=0, maximum=MAX_THREADS
    )
    device: str = option("auto", DEVICE_HELP)
    max_errors: int | None = option(None, "stop, with exit code 1, once more files than this cannot be used", minimum=0)
    allow_mixed: bool = option(False, "go on with a dataset on another kind of machine or with other software")
    cluster: str = option("none", "ray: the units as tasks of a Ray cluster (RAY_ADDRESS)", choices=("none", "ray"))

    def __post_init__(self) -> None:
        missing = [] if self.vae or self.teacher else ["--vae (or --teacher)"]
        missing += [] if self.out or self.cache_dir else ["--out"]
        if missing:
            raise ValueError(f"missing {', '.join(missing)}: give it on the command line or in the config file")
        if self.vae and self.teacher:
            raise ValueError("--vae, --teacher: expected one of them, got both")
        if self.cache_dir is not None:
            if self.split is None:
                raise ValueError("--cache-dir: expected --split too, the dataset is CACHE_DIR/SPLIT; or say --out")
            out = str(Path(self.cache_dir) / self.split)
            if self.out not in ("", out):
                raise ValueError(f"--out {self.out}: expected it without --cache-dir, which says {out}")
            object.__setattr__(self, "out", out)
        if min(self.frames, default=1) < 1 or list(self.frames) != sorted(set(self.frames)):
            raise ValueError(f"--frames: expected rising numbers from 1 on, got {','.join(map(str, self.frames))}")
