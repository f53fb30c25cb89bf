"""Describe what a path holds: dataset (also an unfinished one), shard, checkpoint, run or latent file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from fastlatent.config import InspectConfig
from fastlatent.pipeline.checkpoints import checkpoints
from fastlatent.pipeline.progress import duration
from fastlatent.store.reader import PROVENANCE, BuildState, Dataset, build_state, read_provenance
from fastlatent.store.records import ROOT
from fastlatent.store.shard import Shard
from fastlatent.store.statistics import Statistics, to_float64

# Of a model of latents, or an autoencoder; of a UNet.
_CONFIGS = ("config.json", "unet/config.json", "scheduler_config.json", "vae_source.json", "latent_statistics.json")

LISTED_CHANNELS = 64  # of a teacher's hundreds, the numbers of each would fill pages


def inspect(config: InspectConfig) -> None:
    """Print YAML about config.path; see InspectConfig."""
    path = Path(config.path)
    if not path.exists():
        raise ValueError(f"{path} does not exist")
    if path.is_file():
        described = _file(path)
    elif (path / PROVENANCE).exists():
        described = _dataset(path, build_state(path))
    else:
        described = _run_or_checkpoint(path)
    print(yaml.safe_dump(described, sort_keys=False, allow_unicode=True, width=120), end="")
    if config.vae is not None:
        _sheet(config, path)


def _dataset(path: Path, state: Any) -> dict[str, Any]:
    described: dict[str, Any] = {"kind": "latent dataset", "path": str(path)}
    if state is not None:
        described["encoding now" if state.writer else "unfinished encode"] = {
            "writer": state.writer or "none; rerun the same encode command to go on",
            "units": f"{state.done_units} of {state.planned_units} done",
            "rows": f"{state.done_rows} of {state.planned_rows} done, {_missing(state)} missing",
            "quarantined": state.quarantined,
            "bytes": state.bytes,
            **_forecast(path, state),
            "latents": [{"shape": list(shape)} for shape in state.shapes],
            "statistics": _statistics(state.statistics) if state.statistics else None,
        }
    if not (path / ROOT).exists():
        return described | {"provenance": read_provenance(path)}
    dataset = Dataset.open(path)
    described |= {
        "generation": dataset.generation,
        "fingerprint": dataset.fingerprint,
        "rows": len(dataset),
        "shards": len(dataset.shards),
        "bytes": sum(shard.bytes for shard in dataset.shards),
        "latents": [
            {"shape": list(bucket.shape), "dtype": bucket.dtype, "rows": bucket.rows} for bucket in dataset.buckets
        ],
        "classes": len(dataset.classes),
        "rows per class": _per_class(dataset),
        "quarantined": {one.key: one.reason for one in dataset.quarantined},
        "statistics": _statistics(dataset.statistics),
        "provenance": dataset.provenance,
    }
    return described


def _missing(state: BuildState) -> int:
    return state.planned_rows - state.done_rows - state.quarantined


def _forecast(path: Path, state: BuildState) -> dict[str, Any]:
    """How much more disk and time it takes, as far as the finished shards tell."""
    missing = _missing(state)
    forecast: dict[str, Any] = {}
    if state.done_rows:
        more = missing * state.bytes / state.done_rows
        free = shutil.disk_usage(path).free
        forecast["still to write"] = f"about {more / 2**30:,.2f} GiB, {free / 2**30:,.1f} GiB free"
    if state.rows_per_second is not None:
        rate = state.rows_per_second
        forecast["speed"] = f"{rate:,.1f} rows/s, by the last shards"
        forecast["time left" if state.writer else "time left once it goes on"] = f"about {duration(missing / rate)}"
    return forecast


def _statistics(statistics: Statistics) -> dict[str, Any]:
    mean, std = statistics.latent_mean, statistics.latent_std
    if len(mean) > LISTED_CHANNELS:
        spread = float(np.sqrt((std**2).mean() + mean.var()))
        extremes = {"min": float(statistics.min.min()), "max": float(statistics.max.max())}
        return {f"of all {len(mean)} channels": {"mean": float(mean.mean()), "std": spread, **extremes}}
    return {
        "latent mean": statistics.latent_mean.tolist(),
        "latent std": statistics.latent_std.tolist(),
        "min": statistics.min.tolist(),
        "max": statistics.max.tolist(),
    }


def _per_class(dataset: Dataset) -> dict[str, int]:
    names = dataset.classes[:20]
    counts = {name: int((dataset.label == label).sum()) for label, name in enumerate(names)}
    return counts | ({"…": int((dataset.label >= len(names)).sum())} if len(dataset.classes) > len(names) else {})


def _file(path: Path) -> dict[str, Any]:
    if path.suffix == ".safetensors":
        shard = Shard.open(path)
        metadata = {name: _parsed(text) for name, text in shard.metadata.items()}
        kind = "latent shard" if "fls.fields" in metadata else "safetensors file"
        if any(name.startswith("fastlatent-latents/") for name in metadata):
            kind = "sampled latents"
        tensors = {
            name: f"{shard.dtypes[name]} {list(values.shape)}{_range(values, shard.dtypes[name])}"
            for name, values in shard.columns.items()
            if not name.startswith("_pad.")
        }
        return {
            "kind": kind,
            "path": str(path),
            "bytes": path.stat().st_size,
            "tensors": tensors,
            "metadata": metadata,
        }
    raise ValueError(f"{path}: expected a dataset, run or checkpoint folder, or a .safetensors file")


def _range(values: Any, dtype: str) -> str:
    if dtype not in ("F16", "F32", "F64") or values.size == 0:
        return ""
    wide = values.astype("float64")
    return f", {wide.min():.4g} to {wide.max():.4g}, mean {wide.mean():.4g}, std {wide.std():.4g}"


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _run_or_checkpoint(path: Path) -> dict[str, Any]:
    runs = checkpoints(path)
    folder = runs[-1] if runs else path
    described: dict[str, Any] = {"kind": "run" if runs else "checkpoint", "path": str(path)}
    if runs:
        described["checkpoints"] = [one.name for one in runs]
        log = (path / "log.jsonl").read_text(encoding="utf-8").splitlines() if (path / "log.jsonl").exists() else []
        described["last step logged"] = _parsed(log[-1]) if log else None
    weights = sorted(folder.glob("*.safetensors"))
    if (folder / "other_state.pth").is_file():  # accelerate's or DeepSpeed's; `sample` reads it
        described["kind"] = f"LatentLM {described['kind']} as the published training script writes it"
        files = sorted(file for file in folder.rglob("*") if file.is_file())
        described["files"] = {file.relative_to(folder).as_posix(): file.stat().st_size for file in files}
        return described
    configs = [file for name in _CONFIGS if (file := folder / name).is_file()]
    weights += sorted(folder.glob("unet/*.safetensors"))
    if not configs or not weights:
        raise ValueError(
            f"{path}: expected a dataset (dataset.json), a run (checkpoint-*) or a checkpoint (config.json and "
            f".safetensors), found {', '.join(sorted(p.name for p in path.iterdir())[:8]) or 'an empty folder'}"
        )
    for file in configs:
        name = "config" if file.name == "config.json" and len(configs) == 1 else file.relative_to(folder).as_posix()
        try:
            described[name] = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{file} is not JSON: {error}") from None
    for file in weights:
        shard = Shard.open(file)
        count = sum(values.size for values in shard.columns.values())
        described[file.relative_to(folder).as_posix()] = {
            "bytes": file.stat().st_size,
            "tensors": len(shard.columns),
            "numbers": count,
        }
    return described


def _sheet(config: InspectConfig, path: Path) -> None:
    # Only here is torch needed.
    import torch

    from fastlatent.media.images import to_uint8
    from fastlatent.media.sheets import save_sheet
    from fastlatent.workflows.decode_images import load_matching_autoencoder
    from fastlatent.workflows.latent_files import read_latent_file
    from fastlatent.workflows.latent_inputs import open_latents

    if path.is_dir():
        images = open_latents(path)
        latents = images.read(next(images.batches(config.rows)))
    elif "fls.fields" in (shard := Shard.open(path)).metadata:
        name = json.loads(shard.metadata["fls.fields"])[0]
        scale = shard.columns.get(f"{name}.scale")
        rows = slice(0, config.rows)
        values = to_float64(shard.columns[name][rows], shard.dtypes[name], None if scale is None else scale[rows])
        means = values[:, 0, : values.shape[2] // (2 if name == "moments" else 1)]
        latents = torch.from_numpy(means).float()
    else:
        latents = read_latent_file(path).raw()[: config.rows]
    vae = load_matching_autoencoder(
        config.vae, None, latents.shape[1], torch.device("cpu"), torch.float32, allow_other=True
    )
    Path(config.sheet).parent.mkdir(parents=True, exist_ok=True)
    save_sheet(config.sheet, to_uint8(vae.decode(latents).numpy()), columns=8)
    print(f"contact sheet: {config.sheet}")
