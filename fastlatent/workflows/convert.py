"""Latent caches of other projects → datasets, and back."""

from __future__ import annotations

import gc

from fastlatent.config import ConvertConfig
from fastlatent.workflows.convert_cache import ConvertReport
from fastlatent.workflows.convert_in import convert_in
from fastlatent.workflows.convert_out import convert_out
from fastlatent.workflows.runtime import keep_freed_memory


def convert(config: ConvertConfig) -> ConvertReport:
    """Convert a cache into a dataset, or a dataset into a cache; see ConvertConfig.

    Raises:
        ValueError: the source cannot be used as asked, or the folder holds something else; see `convert_in` and
            `convert_out`.
    """
    keep_freed_memory()  # 64 KiB that are mapped anew cost 250 µs, as much as to read them
    frozen = gc.get_freeze_count()  # by the caller
    gc.freeze()  # what is imported: to walk through it again and again took a third of the time of 2,000 rows
    try:
        return convert_in(config) if config.to == "dataset" else convert_out(config)
    finally:
        if not frozen:
            gc.unfreeze()
