"""Every setting of every command: frozen dataclasses, the only place where defaults live.

The command line, the YAML files and the docs are made from these. Precedence: dataclass < YAML file < flags.
Plain Python, no torch: `fastlatent --help` imports this.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CONFIG_FILE = "config file"
_NULL = ("null", "Null", "NULL", "~", "")
MAX_SEED = 2**63 - 1  # what every generator takes
MAX_THREADS = 4096
DEVICE_HELP = "auto (CUDA if there is one), cpu, cuda, cuda:1 …"


def option(
    default: Any,
    help: str,
    *,
    choices: tuple[str, ...] = (),
    minimum: float | None = None,
    maximum: float | None = None,
) -> Any:
    """A field with a default: `--name VALUE` on the command line."""
    return dataclasses.field(default=default, metadata=_metadata(help, choices, minimum, maximum, positional=False))


def required(help: str, *, positional: bool = False) -> Any:
    """A field without a default: `--name VALUE`, or a bare argument if positional."""
    return dataclasses.field(metadata=_metadata(help, (), None, None, positional=positional))


def _metadata(
    help: str, choices: tuple[str, ...], minimum: float | None, maximum: float | None, *, positional: bool
) -> dict[str, Any]:
    return {"help": help, "choices": choices, "minimum": minimum, "maximum": maximum, "positional": positional}


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


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """What every objective shares."""

    out: str = required("run folder; rerun the same command to resume from its newest checkpoint")
    steps: int = option(200_000, "optimiser steps", minimum=1)
    batch_size: int = option(32, "samples per step", minimum=1)
    learning_rate: float = option(1e-4, "peak of the cosine schedule", minimum=0)
    warmup_steps: int = option(100, "linear warm-up", minimum=0)
    weight_decay: float = option(0.01, "AdamW, on matrices only", minimum=0)
    grad_clip: float = option(1.0, "largest global gradient norm", minimum=0)
    ema_decay: float = option(0.9999, "decay of the weight average; 0 turns it off", minimum=0, maximum=0.999999)
    mixed_precision: str = option("no", "autocast; weights stay float32", choices=("no", "bf16"))
    checkpoint_every: int = option(5000, "steps between checkpoints", minimum=1)
    keep_checkpoints: int = option(2, "how many of the newest checkpoints stay", minimum=1)
    seed: int = option(0, "of initial weights, order, noise and dropout", minimum=0, maximum=MAX_SEED)
    threads: int = option(0, "CPU threads; 0: all cores", minimum=0, maximum=MAX_THREADS)
    device: str = option("auto", DEVICE_HELP)


@dataclass(frozen=True, kw_only=True)
class TrainVaeConfig(TrainConfig):
    """Train an AutoencoderKL (diffusers layout) on a folder of images."""

    source: str = required("folder of images, local", positional=True)
    size: int = option(256, "side of the square centre crop, in pixels", minimum=1)
    channels: int = option(3, "1: grey, 3: RGB", minimum=1)
    latent_channels: int = option(4, "channels of a latent", minimum=1)
    block_out_channels: tuple[int, ...] = option(
        (128, 256, 256, 256), "width of each level; n levels reduce the side by 2^(n-1)"
    )
    layers_per_block: int = option(2, "residual blocks per level", minimum=1)
    norm_groups: int = option(32, "groups of every GroupNorm; must divide every width", minimum=1)
    mirror: bool = option(False, "mirror half of the images at random")
    mse_weight: float = option(1.0, "weight of the mean squared error per pixel value", minimum=0)
    l1_weight: float = option(1.0, "weight of the mean absolute error per pixel value", minimum=0)
    kl_weight: float = option(1e-6, "weight of the KL divergence, mean per latent value", minimum=0)


@dataclass(frozen=True, kw_only=True)
class TrainArConfig(TrainConfig):
    """Train a next-token-diffusion Transformer (LatentLM) on a latent dataset."""

    latents: str = required("dataset folder written by `fastlatent encode`", positional=True)
    model: str = option("Transformer-Medium", "published size; the flags below override single numbers of it")
    hidden_size: int | None = option(None, "width", minimum=1)
    depth: int | None = option(None, "backbone blocks", minimum=1)
    num_heads: int | None = option(None, "attention heads", minimum=1)
    num_kv_heads: int | None = option(None, "key and value heads (grouped-query attention)", minimum=1)
    mlp_ratio: float | None = option(None, "FFN width is floor(hidden·ratio·2/3/64)·64", minimum=0)
    diffusion_depth: int | None = option(None, "blocks of the diffusion head", minimum=1)
    prediction_type: str = option("v_prediction", "what the head predicts", choices=("epsilon", "v_prediction", "flow"))
    beta_schedule: str = option(
        "cosine", "noise schedule of epsilon and v_prediction", choices=("cosine", "linear", "scaled_linear")
    )
    batch_mul: int = option(4, "noised copies of each sequence per backbone pass", minimum=1)
    class_dropout_prob: float = option(0.1, "share of labels replaced by the null class", minimum=0, maximum=1)


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """Sample latents, and images, from a next-token-diffusion checkpoint."""

    checkpoint: str = required("checkpoint folder (ours, or as published), or run folder", positional=True)
    model_config: str | None = option(
        None, "JSON to read instead of the folder's config.json; partial where the weights tell the rest"
    )
    ema: bool = option(False, "published checkpoints: the averaged weights of other_state.pth (as their --use_ema)")
    output: str = required("folder for images, sheet and latents; with --no-decode a .safetensors file")
    labels: str = option("all", 'class numbers such as "3,1,4", or "all"')
    per_class: int = option(1, "samples of each label, one label after the other", minimum=1)
    num_inference_steps: int = option(20, "denoising steps per token", minimum=1)
    last_inference_steps: int = option(
        0, "steps of the last token, the others in between linearly (step annealing, DiSA); 0: as many as the first",
        minimum=0,
    )  # fmt: skip
    cfg_scale: float = option(3.0, "classifier-free guidance; 1 turns it off", minimum=0)
    cfg_schedule: str = option(
        "constant",
        "linear: guidance grows from token to token, up to --cfg-scale (MAR)",
        choices=("constant", "linear"),
    )
    solver: str = option(
        "auto",
        "auto: dpmsolver++, or euler for flow",
        choices=("auto", "dpmsolver++", "ddim", "ddpm", "euler"),
    )
    seed: int = option(0, "of the noise; sample i has the same noise at any batch size", minimum=0, maximum=MAX_SEED)
    noise: str | None = option(None, "safetensors file with tensor `noise` [B, N, C]: start noise of every token")
    dtype: str = option("float32", "of weights and arithmetic", choices=("float64", "float32", "bfloat16", "float16"))
    decode: bool = option(True, "decode the latents to images")
    vae: str | None = option(None, "autoencoder to decode with; otherwise the one that encoded the training set")
    allow_other_vae: bool = option(False, "decode although the autoencoder is not the one that encoded the set")
    batch_size: int = option(64, "sequences sampled at a time; fewer where their caches would not fit", minimum=1)
    attention: str = option(
        "auto",
        "back end; auto: the first that runs of flash, triton, sdpa",
        choices=("auto", "flash", "triton", "varlen", "sdpa"),
    )
    fp8_cache: bool = option(False, "keep keys and values in float8_e4m3: half the memory of bfloat16, less exact")
    int8: bool = option(False, "CPU: int8 weights with a scale per row: half the bytes of bfloat16, less exact")
    published: bool = option(False, "round timesteps to --dtype as the published code does")
    compile: bool = option(False, "torch.compile the backbone step")
    threads: int = option(0, "CPU threads; 0: all cores", minimum=0, maximum=MAX_THREADS)
    device: str = option("auto", DEVICE_HELP)


@dataclass(frozen=True, kw_only=True)
class DecodeConfig:
    """Decode latents (a dataset, or a file written by sample) to images."""

    latents: str = required("dataset folder, or .safetensors file written by `fastlatent sample`", positional=True)
    output: str = required("folder for PNG images and sheet.png")
    vae: str | None = option(None, "autoencoder; otherwise the one that the latents' provenance names")
    allow_other_vae: bool = option(False, "decode although the autoencoder is not the one that made the latents")
    limit: int = option(0, "decode only the first rows; 0: all", minimum=0)
    columns: int = option(10, "images per row of sheet.png", minimum=1)
    batch_size: int = option(16, "latents per forward pass", minimum=1)
    dtype: str = option("float32", "dtype the autoencoder runs in", choices=("float32", "bfloat16", "float16"))
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


@dataclass(frozen=True, kw_only=True)
class InspectConfig:
    """Describe a dataset (also one that is being encoded right now), shard, checkpoint or latent file."""

    path: str = required("what to describe", positional=True)
    vae: str | None = option(None, "decode the first rows with this autoencoder to a contact sheet")
    sheet: str = option("sheet.png", "where the contact sheet goes (with --vae)")
    rows: int = option(64, "rows on the contact sheet", minimum=1)


@dataclass(frozen=True, kw_only=True)
class VerifyConfig:
    """Check a dataset against its digests and against itself; exit code 1 where something is wrong."""

    dataset: str = required("dataset folder", positional=True)
    full: bool = option(False, "read every byte: digests of shards and rows, NaN, index, statistics")
    reencode: int = option(0, "encode so many samples, drawn at random, again and compare", minimum=0)
    vae: str | None = option(None, "for --reencode: the autoencoder; otherwise where it was when the set was encoded")
    source: str | None = option(None, "for --reencode: the images; otherwise where they were then")
    seed: int = option(0, "of the draw of --reencode", minimum=0, maximum=MAX_SEED)
    tolerance: float = option(
        0.02, "relative error of a row where another engine wrote it; on the same one every bit must agree", minimum=0
    )
    threads: int = option(0, "shards read at a time; 0: as many as there are cores", minimum=0, maximum=MAX_THREADS)
    device: str = option("auto", "for --reencode: auto (the kind that wrote the set), cpu, cuda …")


@dataclass(frozen=True, kw_only=True)
class RepairConfig:
    """Take damaged and missing shards out of a dataset, so that a rerun of encode makes exactly those again."""

    dataset: str = required("dataset folder", positional=True)
    threads: int = option(0, "shards read at a time; 0: as many as there are cores", minimum=0, maximum=MAX_THREADS)


@dataclass(frozen=True, kw_only=True)
class StatsConfig:
    """Print the statistics of a dataset, in float64: of all channels together and of each."""

    dataset: str = required("dataset folder", positional=True)
    per: str = option("dataset", "bucket: also of each shape of latent", choices=("dataset", "bucket"))
    recompute: bool = option(False, "read every latent instead of merging what each shard has recorded")


@dataclass(frozen=True, kw_only=True)
class GcConfig:
    """Remove what the current generation of a dataset does not need: earlier ones, unused shards, left-overs."""

    dataset: str = required("dataset folder", positional=True)
    dry_run: bool = option(False, "only say what would be removed")


@dataclass(frozen=True, kw_only=True)
class MergeConfig:
    """Make one dataset of several that were encoded with the same settings; their shards are shared, not copied."""

    datasets: tuple[str, ...] = required("dataset folders, two or more", positional=True)
    out: str = required("folder of the new dataset")
    copy: bool = option(False, "copy the shards instead of linking to them")


@dataclass(frozen=True, kw_only=True)
class SplitConfig:
    """Divide a dataset at random, by keys: a sample never changes sides, however the dataset grows."""

    dataset: str = required("dataset folder", positional=True)
    out: str = required("prefix: the new datasets are PREFIX-NAME")
    fractions: str = required('shares that add up to 1, such as "train=0.9,val=0.1"')
    seed: int = option(0, "of the draw", minimum=0, maximum=MAX_SEED)
    copy: bool = option(False, "copy the shards instead of linking to them")


@dataclass(frozen=True, kw_only=True)
class FilterConfig:
    """Make a dataset of the samples of another that meet all conditions; their shards are shared, not copied."""

    dataset: str = required("dataset folder", positional=True)
    out: str = required("folder of the new dataset")
    classes: tuple[str, ...] = option((), "names; the new dataset has these classes only")
    keys: tuple[str, ...] = option((), 'patterns such as "ant/*.png", of which a key must match one; * matches / too')
    min_size: int = option(0, "shorter side of the source image, in pixels", minimum=0)
    list: str | None = option(None, "file of keys, one a line")
    copy: bool = option(False, "copy the shards instead of linking to them")


@dataclass(frozen=True, kw_only=True)
class DoctorConfig:
    """Report what is installed, what is missing, the remedy, and the path each command would take."""


def build(cls: type, file_values: Mapping[str, Any], flag_values: Mapping[str, Any]) -> Any:
    """Resolve a config: dataclass defaults, then the YAML file, then flags.

    Raises:
        ValueError: an unknown key (with the nearest name), a missing one, or a value of the wrong type or range.
    """
    fields = {field.name: field for field in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    values: dict[str, Any] = {}
    for origin, given in ((CONFIG_FILE, file_values), ("flag", flag_values)):
        for raw_name, value in given.items():
            name = str(raw_name).replace("-", "_")
            if name not in fields:
                raise ValueError(f"{origin}: unknown key {raw_name!r}{suggest(name, fields)}")
            values[name] = _checked(origin, fields[name], hints[name], value)
    missing = [_flag(field) for field in fields.values() if _is_required(field) and field.name not in values]
    if missing:
        raise ValueError(f"missing {', '.join(missing)}: give it on the command line or in the config file")
    return cls(**values)


def suggest(name: str, known: typing.Iterable[str]) -> str:
    """'; did you mean …?' for a misspelt name, or the list of what there is."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}"


def to_yaml(config: Any) -> str:
    """The resolved config, readable by --config."""
    import yaml

    values = {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(config).items()}
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True) if values else ""


def read_yaml(path: str) -> dict[str, Any]:
    """The mapping in a YAML file, every scalar as its text; ValueError if it is not there or not a mapping.

    Text, because YAML's own guesses surprise: `no` is false, `1e-4` is text, `007` is 7. Fields know their types.
    """
    import yaml

    try:
        loaded = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=yaml.BaseLoader)
    except OSError as error:
        raise ValueError(f"--config {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"--config {path}: not YAML: {' '.join(str(error).split())}") from None
    if not loaded:
        return {}
    if not isinstance(loaded, dict):
        raise ValueError(f"--config {path}: expected a mapping of keys to values, got {type(loaded).__name__}")
    return loaded


def value_type(hint: Any) -> tuple[type, bool]:
    """(plain type, may be None) of a field's annotation; tuple[int, ...] and tuple[str, ...] are given as tuple."""
    if isinstance(hint, types.UnionType):
        inner = [arg for arg in typing.get_args(hint) if arg is not types.NoneType]
        return inner[0], True
    return (tuple, False) if typing.get_origin(hint) is tuple else (hint, False)


def item_type(hint: Any) -> type:
    """What a tuple holds: int or str; any other field holds one thing of its own type."""
    return typing.get_args(hint)[0] if typing.get_origin(hint) is tuple else value_type(hint)[0]


def _checked(origin: str, field: dataclasses.Field, hint: Any, value: Any) -> Any:
    kind, optional = value_type(hint)
    where = f"{origin}: {field.name}"
    item = item_type(hint)
    if isinstance(value, str) and kind is not str and origin == CONFIG_FILE:
        value = (value,) if kind is tuple and item is str else _parsed(kind, value)
    if optional and (value is None or (origin == CONFIG_FILE and value in _NULL)):
        return None
    if kind is tuple and isinstance(value, list):
        value = tuple(_parsed(item, v) if isinstance(v, str) else v for v in value)
    if kind is float and type(value) is int:
        value = float(value)
    sound = kind is not tuple or (isinstance(value, tuple) and all(type(v) is item for v in value))
    if kind is tuple and item is int:
        sound = sound and bool(value)
    if kind is float and type(value) is float and not math.isfinite(value):
        raise ValueError(f"{where}: expected a finite number, got {value}")
    if kind is str and isinstance(value, list):
        raise ValueError(f'{where}: expected text, got a list; write it as "{",".join(map(str, value))}"')
    if kind is str and value == "":
        raise ValueError(f"{where}: expected text, got nothing")
    if type(value) is not kind or not sound:
        expected = f"a list of {'whole numbers' if item is int else 'texts'}" if kind is tuple else kind.__name__
        raise ValueError(f"{where}: expected {expected}, got {value!r}")
    choices, minimum, maximum = (field.metadata[name] for name in ("choices", "minimum", "maximum"))
    if choices and value not in choices:
        raise ValueError(f"{where}: expected one of {', '.join(choices)}, got {value!r}{_near(value, choices)}")
    if minimum is not None and not value >= minimum:
        raise ValueError(f"{where}: expected at least {minimum}, got {value}")
    if maximum is not None and not value <= maximum:
        raise ValueError(f"{where}: expected at most {maximum}, got {value}")
    return value


def _parsed(kind: type, text: str) -> Any:
    """The value that a text of a YAML file stands for; the text itself where it stands for none."""
    if kind is bool:
        return {"true": True, "false": False}.get(text.lower(), text)
    if kind is tuple:
        return tuple(_parsed(int, part.strip()) for part in text.split(","))
    try:
        return kind(text)
    except ValueError:
        return text


def _near(value: Any, choices: tuple[str, ...]) -> str:
    near = difflib.get_close_matches(value, choices, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _is_required(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING


def _flag(field: dataclasses.Field) -> str:
    return field.name.upper() if field.metadata["positional"] else "--" + field.name.replace("_", "-")
