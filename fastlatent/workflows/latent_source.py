"""Where train ar, dit and ddpm get latents from: a dataset of `fastlatent encode`, or images, encoded every time."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed
import xxhash
from torch import Tensor

from fastlatent.config import LatentTrainConfig
from fastlatent.data.columns import gather_column
from fastlatent.data.encoded import EncodedLoader
from fastlatent.data.images import ImageLoader
from fastlatent.data.latents import LatentDataset
from fastlatent.data.loader import LatentLoader
from fastlatent.data.order import Permutation
from fastlatent.encoders.load import load_autoencoder
from fastlatent.pipeline.ahead import ahead
from fastlatent.pipeline.progress import Progress
from fastlatent.sources.conditions import parse_conditions
from fastlatent.sources.items import items_digest
from fastlatent.sources.open import open_source
from fastlatent.store.files import canonical_json, parse_json, read_bytes, write_atomic
from fastlatent.store.reader import PROVENANCE
from fastlatent.store.records import ROOT
from fastlatent.store.statistics import Statistics
from fastlatent.training.latents import CONDITION_COLUMNS, LatentBatches
from fastlatent.workflows.condition_statistics import Conditions, condition_statistics
from fastlatent.workflows.encode_images import parse_range
from fastlatent.workflows.runtime import refuse_output_in_source

if TYPE_CHECKING:
    from fastlatent.workflows.train import Run

STATISTICS = "statistics.json"
# Images that are encoded together to measure mean and std: always the same ones, whatever the number of processes,
# because a convolution's last bits depend on its batch.
MEASURED_TOGETHER = 16
_MEASURE_ID = 0x6D656173757265  # "measure": which images are measured is drawn apart from their order
_CONDITION_ROWS = 65536
# Settings of LatentTrainConfig that images use, and datasets do not.
_FOR_IMAGES = {
    "split", "manifest_root", "size", "mirror", "preserve_input_precision", "input_range", "latent_statistics",
}  # fmt: skip


class LatentSource(ABC):
    """Latents to train on.

    Attributes:
        channels, side: of the square latents.
        count: samples.
        classes: names of the labels; none where there are no labels.
        unlabelled: how many samples have no label.
        vae: identity of the autoencoder, and the "path" it had; what a checkpoint keeps.
        conditions: (name, how many numbers) of each condition, in the order of the vector.
        data: JSON that changes with the training data.
        unused: settings that change nothing here, or nothing that `data` does not tell.
    """

    channels: int
    side: int
    count: int
    classes: list[str]
    unlabelled: int
    vae: dict[str, Any]
    conditions: Conditions
    data: Any
    unused = frozenset({"latents", "vae"})  # data holds what they name: digests of the samples, identity of the weights

    @abstractmethod
    def batches(self, run: Run, config: LatentTrainConfig) -> tuple[LatentBatches, list[float], list[float]]:
        """This process's batches, and mean and std of each channel that they are normalised with (one number, repeated,
        with --normalization all). Says where the latents come from.

        Raises:
            ValueError: the batch does not fit the data or the processes, or a channel is the same everywhere.
        """

    @abstractmethod
    def _condition_rows(self) -> Iterable[tuple[np.ndarray, np.ndarray]]:
        """All samples' conditions and which of them are present: float [rows, numbers], float [rows, names]."""

    def condition_statistics(self) -> tuple[list[float], list[float]]:
        """Mean and std of each number of the condition vector, over the samples that have it.

        Raises:
            ValueError: no sample has one of the conditions.
        """
        return condition_statistics(self.conditions, self._condition_rows())


def open_latents(config: LatentTrainConfig) -> LatentSource:
    """Open the dataset or the images that config.latents names.

    Raises:
        ValueError: nothing usable is there; it does not fit the other settings; no square latents of one shape.
    """
    refuse_output_in_source(config.out, config.latents)
    path = Path(config.latents)
    if (path / ROOT).exists() or (path / PROVENANCE).exists():
        return _DatasetSource(config)
    if config.vae is None:
        found = "nothing that is there"
        if path.is_dir():
            found = f"a folder with {', '.join(sorted(one.name for one in path.iterdir())[:5]) or 'nothing in it'}"
        elif path.exists():
            found = "a file"
        raise ValueError(
            f"{config.latents}: expected a dataset written by `fastlatent encode`, or images together with --vae, got "
            f"{found}"
        )
    return _ImageSource(config)


def _wanted(config: LatentTrainConfig) -> str | None:
    """--condition-spec of the commands that have it; "none" for the others."""
    spec: str | None = getattr(config, "condition_spec", "none")
    return spec


def _normalization(config: LatentTrainConfig, mean: np.ndarray, std: np.ndarray) -> tuple[list[float], list[float]]:
    if config.normalization == "all":
        overall = math.sqrt(float(np.square(std).mean() + mean.var()))
        mean, std = np.full_like(mean, mean.mean()), np.full_like(std, overall)
    if not (std > 0).all():
        raise ValueError(
            f"{config.latents}: channels {np.flatnonzero(~(std > 0)).tolist()} of the latents are the same everywhere, "
            "and cannot be normalised: use more images, another autoencoder, or --normalization all"
        )
    return mean.tolist(), std.tolist()


class _DatasetSource(LatentSource):
    unused = LatentSource.unused | _FOR_IMAGES

    def __init__(self, config: LatentTrainConfig) -> None:
        flags = {
            "--vae": config.vae, "--split": config.split, "--manifest-root": config.manifest_root,
            "--input-range": config.input_range,
        }  # fmt: skip
        given = [name for name, value in flags.items() if value is not None]
        given += ["--no-preserve-input-precision"] * (not config.preserve_input_precision)
        given += ["--mirror"] * config.mirror
        if given:
            raise ValueError(
                f"{config.latents} is a dataset, and {', '.join(given)} is for images: leave it out"
                + (" (mirror images are stored by encode --mirror)" if config.mirror else "")
            )
        self.path = config.latents
        self.dataset = LatentDataset(config.latents)
        store = self.dataset.store
        known: Conditions = ()
        if any(one.name == "condition" for one in store.extras):
            known = parse_conditions(store.provenance["hashed"].get("conditions", "none"))
        self.conditions = _choose(config.latents, known, _wanted(config))
        scale = ("scale",) if store.buckets[0].dtype == "I8" else ()
        wanted = CONDITION_COLUMNS if self.conditions else ()
        self.dataset.columns = (
            store.payload,
            *scale,
            "label",
            "key_hash",
            *wanted,
        )  # captions and the like stay unread
        flips, stored, *sides = self.dataset.row_shape
        if store.payload == "tokens" or len(sides) != 2 or sides[0] != sides[1]:
            raise ValueError(
                f"{config.latents}: expected square latents of images, got {store.payload} {self.dataset.row_shape}"
            )
        self.mirrored = flips == 2
        self.channels, self.side, self.count = stored // (2 if store.payload == "moments" else 1), sides[0], len(store)
        self.classes = store.classes
        # Of a converted cache nothing may be known, of a merged dataset not the path.
        self.vae = {name: one for name, one in self.dataset.autoencoder.items() if one is not None}
        self.unlabelled = int((store.label < 0).sum())
        # What a batch is made of; a dataset that was only touched is the same data.
        digests = [
            xxhash.xxh3_128_hexdigest(column.tobytes()) for column in (store.key_hash, store.label, store.src_xxh3)
        ]
        self.data = [store.fingerprint, store.classes, *digests]
        self._selected = None if self.conditions == known else _places(known, self.conditions)

    def batches(self, run: Run, config: LatentTrainConfig) -> tuple[LatentBatches, list[float], list[float]]:
        statistics = self.dataset.store.statistics
        mean, std = _normalization(config, statistics.latent_mean, statistics.latent_std)
        loader = LatentLoader(
            self.dataset, config.batch_size, seed=config.seed, device=run.device, rank=run.rank,
            world_size=run.world_size,
        )  # fmt: skip
        if run.rank == 0:
            also = ", also mirrored" if self.mirrored else ""
            print(f"latents from the dataset {self.path}: {self.count:,}{also}", flush=True)
        batches = LatentBatches(
            loader, mean=torch.tensor(mean), std=torch.tensor(std), seed=config.seed, conditions=self._selected
        )
        return batches, mean, std

    def _condition_rows(self) -> Iterable[tuple[np.ndarray, np.ndarray]]:
        if not self.conditions:
            return
        for start in range(0, self.count, _CONDITION_ROWS):
            indices = np.arange(start, min(start + _CONDITION_ROWS, self.count))
            empty = self.dataset.empty(len(indices))
            found = []
            for name, which in zip(CONDITION_COLUMNS, self._selected or (None, None), strict=True):
                gather_column(self.dataset.store, name, indices, empty[name])
                values = empty[name].double().numpy()
                found.append(values if which is None else values[:, which])
            yield found[0], found[1]


def _choose(path: str, known: Conditions, spec: str | None) -> Conditions:
    """The conditions that `spec` asks a dataset with `known` ones for."""
    if spec is None:
        return known
    wanted = parse_conditions(spec)
    for name, count in wanted:
        if (name, count) not in known:
            has = ",".join(f"{one}:{width}" for one, width in known) or "none"
            raise ValueError(
                f"--condition-spec: {path} has no {name}:{count}; its conditions are {has} (encode --condition-spec "
                "stores others)"
            )
    return wanted


def _places(known: Conditions, wanted: Conditions) -> tuple[list[int], list[int]]:
    """Where the numbers and the names of the wanted conditions stand among the known ones."""
    begins = np.cumsum([0, *(width for _, width in known)])
    names = [known.index(one) for one in wanted]
    return [place for i in names for place in range(int(begins[i]), int(begins[i + 1]))], names


class _ImageSource(LatentSource):
    def __init__(self, config: LatentTrainConfig) -> None:
        assert config.vae is not None
        self.path = config.latents
        spec = _wanted(config) or "none"
        self.source = open_source(config.latents, split=config.split, conditions=spec, root=config.manifest_root)
        items = self.source.items
        if not len(items):
            reasons = "; ".join(f"{key}: {why}" for key, why in list(self.source.left_out.items())[:3])
            raise ValueError(f"{config.latents}: expected images, got none that can be used: {reasons or 'none there'}")
        vae = load_autoencoder(config.vae)
        size, multiple = config.size, vae.size_multiple
        if vae.fixed_size and size != vae.fixed_size:
            raise ValueError(f"--size {size}: this autoencoder takes images of {vae.fixed_size}×{vae.fixed_size} only")
        if size % multiple:
            near = sorted({max(multiple, size // multiple * multiple), -(-size // multiple) * multiple})
            raise ValueError(
                f"--size {size}: this autoencoder needs a multiple of {multiple}; the nearest: "
                f"{' and '.join(map(str, near))}"
            )
        self._input_range = parse_range(config.input_range) if config.input_range else None
        self._encoder, self.has_posterior = vae.encoder(), vae.has_posterior
        self.pixel_channels = vae.pixel_channels
        self.channels, self.side, self.count = vae.latent_channels, size // vae.downsample, len(items)
        self.classes, self.conditions = self.source.classes, parse_conditions(spec)
        self.vae = {**vae.identity(), "path": str(Path(config.vae).resolve())}
        self.unlabelled = sum(item.label < 0 for item in items)
        self.data = [vae.identity(), self.classes, items_digest(items, "key", "size", "stamp", "label")]

    def batches(self, run: Run, config: LatentTrainConfig) -> tuple[LatentBatches, list[float], list[float]]:
        images = ImageLoader(
            self.source, config.batch_size, size=config.size, channels=self.pixel_channels, mirror=config.mirror,
            seed=config.seed, rank=run.rank, world_size=run.world_size, device=run.device,
            preserve_input_precision=config.preserve_input_precision, input_range=self._input_range,
        )  # fmt: skip
        if run.rank == 0:
            for remark in self.source.remarks:
                print(remark)
            print(
                f"latents of images from {self.path}, which {config.vae} encodes every time anew: {self.count:,} "
                "(`fastlatent encode` would do it once)",
                flush=True,
            )
        self._encoder.to(run.device)
        measured = self._statistics(run, config, images)
        mean, std = _normalization(config, measured.latent_mean, measured.latent_std)
        loader = EncodedLoader(images, self._encode, self.has_posterior)
        return LatentBatches(loader, mean=torch.tensor(mean), std=torch.tensor(std), seed=config.seed), mean, std

    def _encode(self, pixels: Tensor) -> Tensor:
        encoded: Tensor = self._encoder(pixels)
        return encoded

    def _condition_rows(self) -> Iterable[tuple[np.ndarray, np.ndarray]]:
        items = self.source.items
        for start in range(0, len(items) if self.conditions else 0, _CONDITION_ROWS):
            some = items[start : start + _CONDITION_ROWS]
            values, present = (np.array([item.attached[name] for item in some]) for name in CONDITION_COLUMNS)
            yield values, present

    def _statistics(self, run: Run, config: LatentTrainConfig, images: ImageLoader) -> Statistics:
        """Of config.latent_statistics images drawn at random; those of the run's folder where it has been there.

        Each process measures a part. All merge the parts in one order, so their number changes no bit.
        """
        file = run.folder / STATISTICS
        settings = [
            self.data, config.size, config.mirror, config.preserve_input_precision, self._input_range,
            config.latent_statistics, config.seed,
        ]  # fmt: skip
        what = xxhash.xxh3_128_hexdigest(canonical_json(settings))
        kept = run.team.on_main(lambda: _kept_statistics(file, what))
        if run.world_size > 1:  # what one process finds, all take: files of a network appear at different times
            shared = [kept]
            torch.distributed.broadcast_object_list(shared, src=0, device=run.device)
            kept = shared[0]
        if kept is not None:
            return Statistics.from_dict(kept, str(file))
        count = min(config.latent_statistics, self.count)
        chosen = Permutation(config.seed, _MEASURE_ID, 0, self.count)(np.arange(count))
        groups = [chosen[start : start + MEASURED_TOGETHER] for start in range(0, count, MEASURED_TOGETHER)]
        mine = range(run.rank, len(groups), run.world_size)
        parts = torch.zeros(len(groups), 7, self.channels, dtype=torch.float64)
        with (
            ThreadPoolExecutor(1) as reader,
            Progress("measure", len(mine) if run.rank == 0 else 0, "batches") as progress,
        ):
            waiting = iter(mine)
            read = ahead(
                lambda: next(waiting, None), lambda i: images.samples(groups[i])["pixels"], pool=reader, depth=3
            )
            for i, pixels in read:
                with torch.no_grad():
                    encoded = self._encode(pixels).float().unsqueeze(1).cpu().numpy()
                parts[i] = _to_rows(Statistics.of(encoded, "F32", "moments" if self.has_posterior else "latents"))
                progress.advance()
        if run.world_size > 1:
            parts = parts.to(run.device)
            torch.distributed.all_reduce(parts)  # every row is 0 in all processes but one
            parts = parts.cpu()
        measured = _from_rows(parts[0])
        for part in parts[1:]:
            measured = measured.merge(_from_rows(part))
        if not all(np.isfinite(values).all() for values in (measured.latent_mean, measured.latent_std)):
            raise ValueError(f"{self.path}: latents of {config.vae} are not finite; is it an autoencoder for them?")
        run.team.on_main(lambda: write_atomic(file, canonical_json({"of": what, **measured.to_dict()})))
        return measured


_ARRAYS = ("mean", "m2", "posterior_variance", "min", "max", "abs_max")


def _to_rows(statistics: Statistics) -> Tensor:
    """float64 [7, C]: the count, then the arrays."""
    arrays = [getattr(statistics, name) for name in _ARRAYS]
    return torch.from_numpy(np.stack([np.full_like(arrays[0], statistics.count), *arrays]))


def _from_rows(rows: Tensor) -> Statistics:
    return Statistics(int(rows[0, 0]), *rows[1:].numpy())


def _kept_statistics(file: Path, what: str) -> dict[str, Any] | None:
    if not file.exists():
        return None
    value = parse_json(read_bytes(file), str(file))
    if not isinstance(value, dict) or value.pop("of", None) != what:
        return None  # of a run in this folder that never came to a checkpoint
    Statistics.from_dict(value, str(file))
    return value
