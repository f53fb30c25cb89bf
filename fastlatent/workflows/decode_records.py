"""What is decoded of an experiment: a record beside the videos for each step, and decode_summary.json made of them."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from fastlatent.media.videos import output_digest
from fastlatent.sources.experiment import Step
from fastlatent.store.files import parse_json, write_atomic
from fastlatent.store.lease import Leases, exclusive

VIDEOS = "latents_videos"  # the output folder, unless another is named: in the experiment
SUMMARY = "decode_summary.json"
RECORDS = ".records"  # a hidden folder of the output: a JSON file for each step, and who is at work
_STEPS = "steps"
# Files that are not finished: of videos, and by their names of a record, the summary and the settings.
_UNFINISHED = re.compile(r"\.tmp-(([0-9a-f]{32}\.json|decode_summary\.json|decode\.yaml)-)?[0-9a-f]{32}")
# Of a record: its members, and what each may be. Another version's, or a damaged one, is no record.
_MEMBERS: dict[str, Any] = {
    "time": float, "latents": (str, type(None)), "settings": dict, "digest": (str, type(None)),
    "output": (str, type(None)), "success": bool, "error_message": (str, type(None)), "decode_time": float,
    "metadata": dict,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What became of one step.

    Attributes:
        success: there is a video, now or since an earlier run.
        output_path: of it; None where there is none.
        error_message: why not.
        decode_time: seconds from its latents in memory to the finished file.
        skipped: it was decoded before, by the same settings from the same latents; nothing was done.
        metadata: frames, width, height, fps, notes, latent (shape and statistics of the stored latents), metadata (what
            the experiment says of the step: prompt, timestep, sigma …).
    """

    success: bool
    output_path: Path | None = None
    error_message: str | None = None
    decode_time: float = 0.0
    skipped: bool = False
    metadata: dict[str, Any] = field(default_factory=dict)


class Records:
    """The records of one output folder, which any number of processes may write to.

    Args:
        output: the folder of the videos.
        begun: when this run began (time.time()); what others record later is as good as its own.
    """

    def __init__(self, output: Path, begun: float) -> None:
        self.output = output
        self._settings: dict[str, Any] = {}
        self._begun = begun
        self._folder = output / RECORDS
        self.leases = Leases(self._folder)

    def depend_on(self, settings: Mapping[str, Any]) -> None:
        """What the videos depend on besides the latents; another one makes every record worthless."""
        self._settings = json.loads(json.dumps(settings))

    def sweep(self, steps: Iterable[Step]) -> None:
        """Remove what killed processes left unfinished, unless another is at work here; before anything is written."""
        # Whoever comes while this one sweeps waits here, and finds it at work.
        with exclusive(self._folder / "sweep.lock"):
            if self.leases.others(0):
                return
            self.leases.sweep()
            for folder in {self.output, self._folder / _STEPS, *(self.output / step.folder for step in steps)}:
                with suppress(OSError):
                    for path in [path for path in folder.iterdir() if _UNFINISHED.fullmatch(path.name)]:
                        if path.is_dir() and not path.is_symlink():
                            shutil.rmtree(path, ignore_errors=True)
                        else:
                            path.unlink()

    def close(self) -> None:
        self.leases.close()

    @staticmethod
    def lease(step: Step) -> str:
        """The name of a step's lease."""
        return xxhash.xxh3_128_hexdigest(f"{step.folder}/{step.name}".encode("utf-8", "surrogateescape"))

    def finished(self, step: Step, latents: str | None, *, force: bool = False) -> StepResult | None:
        """The result of an earlier run, or of another process, which need not be done again; else None.

        latents: digest of the step's file; None if it cannot be read, which another process may have found out too.
        force: only of a process beside this one.
        """
        record = _read(self._path(step))
        if record is None or record["latents"] != latents or record["settings"] != self._settings:
            return None
        result = _result(record, self.output)
        if (force or not result.success) and record["time"] < self._begun:  # what failed then may work now
            return None
        if not result.success:
            return result
        assert result.output_path is not None
        try:  # trusted by content: an mp4 that was cut, edited or replaced is made again
            return result if output_digest(result.output_path) == record["digest"] else None
        except OSError:
            return None

    def write(self, step: Step, latents: str | None, result: StepResult) -> None:
        """Keep what became of a step. The video must be at its place already."""
        output = None if result.output_path is None else result.output_path.relative_to(self.output).as_posix()
        record = {
            "time": time.time(),
            "latents": latents,
            "settings": self._settings,
            "digest": None if result.output_path is None else output_digest(result.output_path),
            "output": output,
            **{name: getattr(result, name) for name in ("success", "error_message", "decode_time", "metadata")},
        }
        write_atomic(self._path(step), json.dumps(record).encode())

    def write_summary(self, steps: Iterable[Step], skipped: int, about: Mapping[str, Any]) -> dict[str, Any]:
        """Write decode_summary.json of every step of `steps` that was ever tried, and return it.

        skipped: how many of them this run found done. about: further entries.
        """
        with exclusive(self._folder / "summary.lock"):
            summary = self._summary(steps, skipped, about)
            write_atomic(self.output / SUMMARY, json.dumps(summary, indent=1, ensure_ascii=True).encode())
        return summary

    def _summary(self, steps: Iterable[Step], skipped: int, about: Mapping[str, Any]) -> dict[str, Any]:
        videos: dict[str, dict[str, Any]] = {}
        for step in steps:
            record = _read(self._path(step))
            if record is None:
                continue
            result = _result(record, self.output)
            if result.success and not (result.output_path and result.output_path.exists()):
                continue  # somebody deleted it
            video = videos.setdefault(
                step.folder,
                {"total_steps": 0, "successful_steps": 0, "failed_steps": 0, "decode_time": 0.0, "steps": {}},
            )
            video["total_steps"] += 1
            video["successful_steps" if result.success else "failed_steps"] += 1
            video["decode_time"] += result.decode_time
            video["steps"][step.name] = {
                "success": result.success,
                "output": record["output"],
                "error": result.error_message,
                "decode_time": result.decode_time,
                **result.metadata,
            }
        total, done, seconds = (
            sum(video[name] for video in videos.values()) for name in ("total_steps", "successful_steps", "decode_time")
        )
        return {
            "total_steps": total,
            "successful_steps": done,
            "failed_steps": total - done,
            "skipped_steps": skipped,
            "success_rate": done / total if total else 0.0,
            "total_decode_time": seconds,
            "avg_decode_time": seconds / done if done else 0.0,
            **about,
            "settings": self._settings,
            "video_summaries": videos,
        }

    def _path(self, step: Step) -> Path:
        return self._folder / _STEPS / f"{self.lease(step)}.json"  # a name with .json may be too long for a file


def _read(path: Path) -> dict[str, Any] | None:
    """A record; None where there is none, or it is damaged: its step is decoded again."""
    try:
        record = parse_json(path.read_bytes(), str(path))
    except (FileNotFoundError, ValueError):
        return None
    if not isinstance(record, dict) or record.keys() != _MEMBERS.keys():
        return None
    sound = all(isinstance(record[name], kind) for name, kind in _MEMBERS.items())
    return record if sound and record["success"] == isinstance(record["output"], str) else None


def _result(record: Mapping[str, Any], output: Path) -> StepResult:
    names = [field.name for field in dataclasses.fields(StepResult)]
    values = {name: record[name] for name in names if name in record}
    place = record["output"]
    return StepResult(**values, output_path=None if place is None else output / place, skipped=True)
