"""Settings of what carries datasets to the Hugging Face Hub and back."""

from __future__ import annotations

from dataclasses import dataclass

from fastlatent.config.fields import option, required


@dataclass(frozen=True, kw_only=True)
class PushConfig:
    """Upload the current generation of a dataset to the Hugging Face Hub; interrupted, the same command goes on."""

    dataset: str = required("dataset folder", positional=True)
    repo_id: str = required("dataset repository, OWNER/NAME; made if it is not there", positional=True)
    revision: str | None = option(None, "branch, made if it is not there; otherwise the repository's main one")
    private: bool = option(False, "make the repository private; one that is there must be")


@dataclass(frozen=True, kw_only=True)
class PullConfig:
    """Download a dataset that was pushed, checking every file; interrupted, the same command goes on."""

    repo_id: str = required("dataset repository, OWNER/NAME", positional=True)
    out: str = required("folder of the dataset; one that an earlier pull left is brought up to date")
    revision: str | None = option(None, "branch, tag or commit; otherwise the repository's main branch")
    full: bool = option(False, "then check rows, index and statistics too, as verify --full does")
