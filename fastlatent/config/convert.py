"""Settings of the conversion of other projects' latent caches."""

from __future__ import annotations

from dataclasses import dataclass

from fastlatent.config.fields import MAX_THREADS, option, required

FORMATS = (
    "mar", "lightningdit", "fast-dit", "edm2", "frames", "steps", "tokens", "kohya", "simpletuner", "musubi",
    "webdataset", "mds",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """Turn another project's latent cache into a dataset, or a dataset into another project's cache (--to)."""

    source: str = required("the cache: a folder, file or URL; with --to the dataset", positional=True)
    out: str = required("folder of the dataset, or of the cache")
    format: str = option("auto", "what the source is; auto: told by its files", choices=("auto", *FORMATS))
    to: str = option("dataset", "what it becomes", choices=("dataset", *FORMATS, "datasets"))
    dtype: str = option(
        "auto",
        "as which values are stored; auto: as they are, float32 where they are scaled",
        choices=("auto", "float16", "bfloat16", "float32"),
    )
    vae: str | None = option(None, "the autoencoder that made the latents, to be recorded, and for its scaling")
    scaling_factor: str = option(
        "auto", "stored = (raw - shift) * factor; auto: the format's or the --vae's; unknown: values stay as they are"
    )
    shift_factor: float = option(0.0, "shift of --scaling-factor")
    pixel_range: str = option(
        "unknown", "of the pixels that the autoencoder was fed", choices=("unknown", "-1,1", "0,1")
    )
    latent_shape: tuple[int, ...] = option((), "C,h,w of a row, where files hold bytes without a shape")
    unit_rows: int = option(4096, "most rows in a shard, or in a file of many rows", minimum=1)
    max_errors: int = option(0, "most rows that may be left out because they are damaged; more end the job", minimum=0)
    check: int = option(256, "rows, drawn at random, that are read again at the end and compared", minimum=0)
    threads: int = option(0, "that read files; 0: two for each core", minimum=0, maximum=MAX_THREADS)

    def __post_init__(self) -> None:
        if self.scaling_factor not in ("auto", "unknown"):
            try:
                sound = 0 < abs(float(self.scaling_factor)) < float("inf")
            except ValueError:
                sound = False
            if not sound:
                raise ValueError(
                    f"--scaling-factor: expected auto, unknown or a number other than 0, got {self.scaling_factor!r}"
                )
        if self.shift_factor and self.scaling_factor in ("auto", "unknown"):
            raise ValueError(f"--shift-factor {self.shift_factor}: expected it beside --scaling-factor X")
        if any(size < 1 for size in self.latent_shape):
            raise ValueError(f"--latent-shape: expected sizes >= 1, got {self.latent_shape}")
        if self.to != "dataset" and self.format != "auto":
            raise ValueError(f"--format {self.format}: expected it without --to, which takes a dataset of fastlatent")
