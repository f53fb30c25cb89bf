"""The fast path for latent generative models: encode, train, sample, decode, and the ops behind them."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import os

    from fastlatent import ops
    from fastlatent.data.latents import LatentDataset
    from fastlatent.data.loader import LatentLoader
    from fastlatent.data.masks import MaskConfig
    from fastlatent.data.teacher_tokens import CachedSSv2Dataset, TeacherTokens, collate_cached_latents
    from fastlatent.diffusion.solvers import SolverTable
    from fastlatent.heads.diffusion_head import DiffusionHead
    from fastlatent.patches.patch import patch
    from fastlatent.workflows.convert_cache import ConvertReport
    from fastlatent.workflows.decode_experiment import ExperimentLatentDecoder
    from fastlatent.workflows.encode import EncodeReport
    from fastlatent.workflows.next_token_pipeline import NextTokenPipeline

__version__ = "0.1.0"
__all__ = [
    "CachedSSv2Dataset",
    "DiffusionHead",
    "ExperimentLatentDecoder",
    "LatentDataset",
    "LatentLoader",
    "MaskConfig",
    "NextTokenPipeline",
    "SolverTable",
    "TeacherTokens",
    "collate_cached_latents",
    "convert",
    "encode",
    "ops",
    "patch",
]

# Resolved on first use: importing fastlatent imports no torch.
_HOME = {
    "CachedSSv2Dataset": "fastlatent.data.teacher_tokens",
    "DiffusionHead": "fastlatent.heads.diffusion_head",
    "ExperimentLatentDecoder": "fastlatent.workflows.decode_experiment",
    "LatentDataset": "fastlatent.data.latents",
    "LatentLoader": "fastlatent.data.loader",
    "MaskConfig": "fastlatent.data.masks",
    "NextTokenPipeline": "fastlatent.workflows.next_token_pipeline",
    "SolverTable": "fastlatent.diffusion.solvers",
    "TeacherTokens": "fastlatent.data.teacher_tokens",
    "collate_cached_latents": "fastlatent.data.teacher_tokens",
    "patch": "fastlatent.patches.patch",
}


def encode(
    source: str | os.PathLike[str], vae: str | os.PathLike[str], out: str | os.PathLike[str], **settings: Any
) -> EncodeReport | list[EncodeReport]:
    """Encode images into a latent dataset; `settings` are the other fields of config.EncodeConfig (all=True: a list).

    Raises:
        ValueError: a setting is unknown or wrong, or the source, autoencoder or dataset folder cannot be used so.
    """
    from os import fspath

    from fastlatent.config import EncodeConfig, build
    from fastlatent.workflows.encode import encode as run

    return run(build(EncodeConfig, {}, {"source": fspath(source), "vae": fspath(vae), "out": fspath(out), **settings}))


def convert(source: str | os.PathLike[str], out: str | os.PathLike[str], **settings: Any) -> ConvertReport:
    """Turn another project's latent cache into a dataset, or, with to="mar" …, a dataset into such a cache.

    `settings` are the other fields of config.ConvertConfig.

    Raises:
        ValueError: a setting is unknown or wrong, the source is of no known format or damaged, or `out` holds
            something else.
    """
    from os import fspath

    from fastlatent.config import ConvertConfig, build
    from fastlatent.workflows.convert import convert as run

    return run(build(ConvertConfig, {}, {"source": fspath(source), "out": fspath(out), **settings}))


def __getattr__(name: str) -> Any:
    if name == "ops":
        return importlib.import_module("fastlatent.ops")
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'fastlatent' has no attribute {name!r}")
