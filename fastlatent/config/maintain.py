"""Settings of what looks at datasets and looks after them."""

from __future__ import annotations

from dataclasses import dataclass

from fastlatent.config.fields import MAX_SEED, MAX_THREADS, option, required


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
    vae: str | None = option(
        None, "for --reencode: the autoencoder, or the teacher's weights; otherwise where they were then"
    )
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
