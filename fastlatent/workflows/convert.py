"""Latent caches of other projects → datasets, and back."""

from __future__ import annotations

from fastlatent.config import ConvertConfig
from fastlatent.workflows.convert_cache import ConvertReport
from fastlatent.workflows.convert_in import convert_in
from fastlatent.workflows.convert_out import convert_out


def convert(config: ConvertConfig) -> ConvertReport:
    """Convert a cache into a dataset, or a dataset into a cache; see ConvertConfig.

    Raises:
        ValueError: the source cannot be used as asked, or the folder holds something else; see `convert_in` and
            `convert_out`.
    """
    return convert_in(config) if config.to == "dataset" else convert_out(config)
