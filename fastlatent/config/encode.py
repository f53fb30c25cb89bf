"""Settings of encode."""

from __future__ import annotations

from dataclasses import dataclass

from fastlatent.config.fields import DEVICE_HELP, MAX_SEED, MAX_THREADS, option, required


@dataclass(frozen=True, kw_only=True)
class EncodeConfig:
    """Encode images into a latent dataset. Rerun the same command to resume or to add new files."""

    source: str = required("folder, manifest, tars or tables of images: a local path or an fsspec URL", positional=True)
    vae: str = required("autoencoder: diffusers folder, run of `fastlatent train vae`, KL-16 or other LDM checkpoint")
    out: str = required("dataset folder to write or to complete")
    kind: str = option(
        "auto",
        "what the source is; auto: told by suffixes and traj_data.pkl",
        choices=("auto", "images", "trajectories", "manifest", "tars", "table"),
    )
    all: bool = option(False, "SOURCE holds several trajectory datasets: encode each, into OUT/NAME")
    split: str | None = option(None, "manifests: only samples of this metadata.split; tables: files that begin so")
    trajectories: str | None = option(None, "file with the names of the trajectories to encode (traj_names.txt)")
    manifest_root: str | None = option(None, "manifests: folder of the images, in place of output_root")
    copy_pkl: bool = option(False, "trajectories: also copy every traj_data.pkl, to OUT/TRAJECTORY/")
    condition_spec: str = option("none", 'manifests: conditions as columns, such as "temperature:1,wind:3,wind_mag:1"')
    captions: str | None = option(
        None, "carry captions: suffix of files beside the images (txt), key of metadata, or column"
    )
    text_encoder: str | None = option(None, "also store embeddings of the captions: folder of a CLIP or T5 encoder")
    text_length: int = option(0, "tokens of a caption; 0: as many as the encoder takes, at most 256", minimum=0)
    size: int = option(256, "side of the square crop, in pixels; of --transform buckets, root of the area", minimum=1)
    transform: str = option(
        "adm",
        "adm: as ADM and DiT crop; center, random: shorter side bilinear, then a crop; nwm: 4:3 crop, squashed; "
        "buckets: sizes by aspect ratio",
        choices=("adm", "center", "random", "nwm", "buckets"),
    )
    seed: int = option(0, "of the crops of --transform random", minimum=0, maximum=MAX_SEED)
    mirror: bool = option(False, "also store the latents of each image mirrored left to right")
    input_range: str | None = option(None, 'float images: "LOW,HIGH" become black and white; otherwise 0,1')
    decoder: str = option(
        "auto",
        "who decodes; auto: pillow, or on CUDA the first of dali, nvimagecodec, pillow that is installed",
        choices=("auto", "pillow", "nvimagecodec", "dali"),
    )
    payload: str = option(
        "moments", "moments: mean and log-variance; latents: the mean alone", choices=("moments", "latents")
    )
    dtype: str = option(
        "float16", "how it is stored; int8 has a scale per channel", choices=("float16", "bfloat16", "float32", "int8")
    )
    compute_dtype: str = option("float32", "dtype the autoencoder runs in", choices=("float32", "bfloat16", "float16"))
    engine: str = option(
        "auto",
        "what runs the autoencoder; auto: what the dataset was begun with, else by device and number of images",
        choices=("auto", "eager", "compile", "aoti", "tensorrt"),
    )
    batch_size: int = option(
        0,
        "images per forward pass, part of the fingerprint; 0: what the dataset was begun with, else by size",
        minimum=0,
    )
    unit_rows: int = option(4096, "images per shard at most (a shard also stays below 256 MiB)", minimum=1)
    readers: int = option(4, "threads that read and decode", minimum=1, maximum=MAX_THREADS)
    threads: int = option(
        0, "CPU threads; 0: what the dataset was begun with, or all cores", minimum=0, maximum=MAX_THREADS
    )
    device: str = option("auto", DEVICE_HELP)
    max_errors: int | None = option(None, "stop, with exit code 1, once more files than this cannot be used", minimum=0)
    allow_mixed: bool = option(False, "go on with a dataset on another kind of machine or with other software")
    cluster: str = option("none", "ray: the units as tasks of a Ray cluster (RAY_ADDRESS)", choices=("none", "ray"))
