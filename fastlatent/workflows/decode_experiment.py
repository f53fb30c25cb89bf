"""An experiment's denoising steps → videos; any number of processes share the work of one output folder."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from fastlatent.config import DecodeConfig, build, given, to_yaml
from fastlatent.data.step_latents import read_step
from fastlatent.encoders.decode_memory import DecodePlan, available_memory, plan_decode, weight_bytes
from fastlatent.encoders.engines.numerics import fix_numerics
from fastlatent.encoders.model_folder import find_vae
from fastlatent.encoders.video_autoencoders import (
    DiffusersVideoAutoencoder,
    load_video_autoencoder,
    video_autoencoder_on_meta,
)
from fastlatent.encoders.video_protocol import VideoAutoencoder
from fastlatent.media.videos import FORMATS, choose_video_encoder, output_path, rate
from fastlatent.pipeline.interrupt import StopRequest
from fastlatent.sources.experiment import Experiment, Step, open_experiment, select
from fastlatent.workflows.decode_records import SUMMARY, VIDEOS, Records, StepResult
from fastlatent.workflows.decode_steps import StepDecoder, VideoSettings
from fastlatent.workflows.encode_setup import engine_cache
from fastlatent.workflows.runtime import DTYPES, keep_config, set_up

FPS = 12  # where neither the flag nor the experiment says it
_LISTED = 20  # steps that a dry run names
_GRACE_SECONDS = 3.0  # for processes that have perhaps been told to stop
_POLL_SECONDS = 0.1


class ExperimentLatentDecoder:
    """Decodes the stored latents of an experiment; `with` frees the autoencoder at the end, as `cleanup()` does.

    The autoencoder is loaded when the first step is decoded, and kept.

    Args:
        experiment_dir: folder with latents/PROMPT/VIDEO/step_* and configs/generation_config.yaml.
        device: auto, cpu, cuda, cuda:1 …
        settings: other fields of config.DecodeConfig, such as dtype="bfloat16" or format="gif".

    Raises:
        ValueError: no experiment there, an unknown setting, or no such device.
    """

    def __init__(self, experiment_dir: str | os.PathLike[str], device: str = "auto", **settings: Any) -> None:
        given = {"latents": os.fspath(experiment_dir), "device": device, **settings}
        self.config: DecodeConfig = build(DecodeConfig, {}, given)
        _refuse_image_settings(self.config)
        self.experiment: Experiment = open_experiment(Path(self.config.latents))
        self.device = set_up(self.config.device, self.config.threads)
        self._vae: VideoAutoencoder | None = None
        self._plans: dict[torch.Size, DecodePlan] = {}

    def __enter__(self) -> ExperimentLatentDecoder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cleanup()

    def cleanup(self) -> None:
        """Free the autoencoder and the memory that it used. Decoding again loads it again."""
        self._vae = None
        self._plans.clear()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def decode_video_directory(
        self,
        video_dir: str | os.PathLike[str],
        output_dir: str | os.PathLike[str] | None = None,
        fps: float | None = None,
        step_filter: str | None = None,
    ) -> list[StepResult]:
        """Decode the steps of one video folder of the experiment; results in the order of the steps.

        Args:
            video_dir: as latents/prompt_000/vid_001, from here, from the experiment, or absolute.
            output_dir: below which PROMPT/VIDEO/STEP.mp4 is written; otherwise the experiment's latents_videos.

        Raises:
            ValueError: no such folder or step, no autoencoder, or one that cannot be used. What is wrong with a step
                is in its result.
        """
        wanted = [Path(video_dir), self.experiment.root / video_dir]
        folders = {place.resolve() for place in wanted}
        steps = [step for step in self.experiment.steps if step.path.parent.resolve() in folders]
        if not steps:
            known = sorted({str(step.path.parent) for step in self.experiment.steps})
            raise ValueError(
                f"{video_dir}: expected a folder of latents of {self.experiment.root}, such as {', '.join(known[:5])}"
            )
        steps, _ = select(steps, step_filter=step_filter or self.config.step_filter)
        results, _ = self._decode(steps, output_dir, fps)
        return [results[step] for step in steps]

    def decode_experiment(
        self,
        output_dir: str | os.PathLike[str] | None = None,
        prompt_filter: str | None = None,
        video_filter: str | None = None,
        step_filter: str | None = None,
        fps: float | None = None,
    ) -> dict[str, Any]:
        """Decode all steps that the filters choose (see `sources.experiment.select`; otherwise those of the settings);
        returns decode_summary.json.

        Its video_summaries hold a result for each step. Raises as `decode_video_directory` does.
        """
        config = self.config
        filters = prompt_filter or config.prompt_filter, video_filter or config.video_filter
        steps, _ = select(self.experiment.steps, *filters, step_filter or config.step_filter)
        return self._decode(steps, output_dir, fps)[1]

    def output(self, output_dir: str | os.PathLike[str] | None = None) -> Path:
        """The folder that videos go to."""
        return Path(output_dir or self.config.output_dir or self.experiment.root / VIDEOS)

    def video_settings(self, fps: float | None = None) -> VideoSettings:
        """How videos are written: frames a second by argument, setting, experiment or FPS."""
        config = self.config
        fps = config.fps if fps is None else fps
        fps = self.experiment.fps() if fps is None else fps
        fps = FPS if fps is None else fps
        rate(fps)  # raises where it is out of range
        form = "mp4" if config.format == "auto" else config.format
        if form == "mp4":
            choose_video_encoder()  # raises where there is none: now, not at every step
        return VideoSettings(
            format=form,
            fps=fps,
            crf=config.crf,
            scale=config.scale,
        )

    @cached_property
    def vae_folder(self) -> Path:
        """Where the autoencoder is.

        Raises:
            ValueError: the experiment names none, or it is in none of the places looked at.
        """
        return find_vae(self.config.vae or self.experiment.model_id(), near=self.experiment.root)

    @cached_property
    def _empty(self) -> DiffusersVideoAutoencoder:
        return video_autoencoder_on_meta(self.vae_folder, self.dtype)

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.config.dtype]

    def plan(self, shape: torch.Size) -> DecodePlan:
        """What decoding latents [1, C, t, h, w] takes, printed when it is first asked for.

        Raises:
            ValueError: more memory than there is.
        """
        if shape not in self._plans:
            weights = 0 if self._vae else weight_bytes(self._empty)
            free = available_memory(self.device)
            self._plans[shape] = plan_decode(
                self._empty, shape, weight_bytes=weights, available=free, device=self.device
            )
            print(self._plans[shape].text, flush=True)
        return self._plans[shape]

    def plan_first(self, steps: list[Step]) -> None:
        """Plan the first of these that can be read and decoded; nothing where none can be read.

        Raises:
            ValueError: some can be read, none decoded.
        """
        empty = self._empty  # what is wrong with it is no matter of a step
        errors: dict[torch.Size, ValueError] = {}
        for step in steps:
            try:
                shape = empty.arrange(read_step(step.path).values, self.experiment.size()).shape
            except (ValueError, OSError):
                continue
            if shape not in errors:
                try:
                    self.plan(shape)
                    return
                except ValueError as error:
                    errors[shape] = error
        if errors:
            raise next(iter(errors.values()))

    def _decode(
        self, steps: list[Step], output_dir: str | os.PathLike[str] | None, fps: float | None
    ) -> tuple[dict[Step, StepResult], dict[str, Any]]:
        begun = time.time()
        output, videos = self.output(output_dir), self.video_settings(fps)
        self.plan_first(steps)  # before anything is loaded
        try:
            records = Records(output, begun)  # before the model: a folder that cannot be written to is found at once
        except OSError as error:
            where = error.filename or output
            raise ValueError(f"{where}: {error.strerror}; choose another folder with --output-dir") from None
        try:
            records.sweep(self.experiment.steps)
            vae = self._load()
            records.depend_on(
                {
                    **asdict(videos),
                    "dtype": self.config.dtype,
                    "vae": vae.identity(),
                    "normalization": vae.normalization(),
                }
            )
            keep_config(output / "decode.yaml", self.config)
            decoder = StepDecoder(
                vae, self.device, videos, records, size=self.experiment.size(), plan=self.plan, told=self._tell
            )
            try:
                decoder.run(steps, force=self.config.force)
            finally:  # also of an interrupted run
                skipped = sum(result.skipped for result in decoder.results.values())
                about = {"model_id": self.config.vae or self.experiment.model_id()}
                summary = records.write_summary(self.experiment.steps, skipped, about)
        finally:
            records.close()
        return decoder.results, summary

    def _load(self) -> VideoAutoencoder:
        if self._vae is None:
            fix_numerics(tf32=self.config.dtype == "tf32")
            vae = load_video_autoencoder(self.vae_folder, self.device, self.dtype)
            if self.config.engine != "eager":
                vae.use_engine(self.config.engine, engine_cache())
            self._vae = vae
        return self._vae

    def _tell(self, step: Step, result: StepResult) -> None:
        name = f"{step.folder}/{step.name}"
        if not result.success:
            print(f"{name}: failed: {result.error_message}", flush=True)
        elif self.config.verbose:
            how = "done before" if result.skipped else f"{result.decode_time:.1f} s"
            notes = "".join(f"; {note}" for note in result.metadata.get("notes", ()))
            print(f"{name}: {result.output_path}, {how}{notes}", flush=True)


def decode_experiment(config: DecodeConfig) -> int:
    """Decode an experiment; see DecodeConfig. 0: all that was chosen is there; 1: some of it failed."""
    given = {name: value for name, value in asdict(config).items() if name not in ("latents", "device")}
    with ExperimentLatentDecoder(config.latents, config.device, **given) as decoder:
        experiment = decoder.experiment
        filters = config.prompt_filter, config.video_filter, config.step_filter
        steps, warnings = select(experiment.steps, *filters)
        for warning in (*warnings, *([experiment.problem] if experiment.problem else [])):
            print(f"warning: {warning}")
        print(f"{len(steps)} of {len(experiment.steps)} steps")
        for what in ("prompt", "video", "name"):
            names = dict.fromkeys(getattr(step, what) for step in steps)
            more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
            print(f"  {what.replace('name', 'step')}s: {', '.join(list(names)[:_LISTED])}{more}")
        if config.dry_run:
            return _dry_run(decoder, steps)
        if config.gpus is not None:
            return _on_gpus(config)
        results, summary = decoder._decode(steps, None, None)
        failed = sum(not result.success for result in results.values())
        print(
            f"{decoder.output() / SUMMARY}: {len(results)} steps: {len(results) - failed} decoded, {failed} failed "
            f"({summary['skipped_steps']} were done before)"
        )
        return 1 if failed else 0


def _dry_run(decoder: ExperimentLatentDecoder, steps: list[Step]) -> int:
    output, form = decoder.output(), decoder.video_settings().format
    for step in steps[:_LISTED]:
        print(f"{step.path} -> {output_path(output / step.folder, step.name, form)}")
    if len(steps) > _LISTED:
        print(f"and {len(steps) - _LISTED} more")
    print(f"autoencoder: {decoder.vae_folder}")
    decoder.plan_first(steps)
    return 0


def _on_gpus(config: DecodeConfig) -> int:
    """One process on each GPU; they divide the steps among themselves."""
    numbers = [part.strip() for part in (config.gpus or "").split(",")]
    if not all(part.isdecimal() for part in numbers):
        raise ValueError(f'--gpus: expected numbers of GPUs such as "0,1", got {config.gpus!r}')
    if missing := [part for part in numbers if int(part) >= torch.cuda.device_count()]:
        raise ValueError(f"--gpus {config.gpus}: torch sees {torch.cuda.device_count()} GPUs, not {', '.join(missing)}")
    return run_together([replace(config, gpus=None, device=f"cuda:{part}") for part in dict.fromkeys(numbers)])


def run_together(configs: list[DecodeConfig]) -> int:
    """`fastlatent decode` with each config in a process of its own. 130: one was interrupted; 1: one failed."""
    processes: list[subprocess.Popen[bytes]] = []
    with tempfile.TemporaryDirectory() as folder, StopRequest() as stop:
        try:
            for i, config in enumerate(configs):
                file = Path(folder) / f"{i}.yaml"
                file.write_text(to_yaml(config), encoding="utf-8")
                processes.append(subprocess.Popen([sys.executable, "-m", "fastlatent", "decode", "--config", file]))
            while any(process.poll() is None for process in processes):
                stop.check()
                time.sleep(_POLL_SECONDS)
        except BaseException:  # whoever told only this process to stop means all
            try:  # Ctrl-C on a terminal has told them too, and a second signal would interrupt what they finish
                end = time.monotonic() + _GRACE_SECONDS
                while any(process.poll() is None for process in processes) and time.monotonic() < end:
                    time.sleep(_POLL_SECONDS)
            finally:
                for process in processes:
                    process.terminate()
                for process in processes:
                    process.wait()
            raise
    codes = [process.returncode for process in processes]
    for config, code in zip(configs, codes, strict=True):
        if code < 0:
            print(f"the process on {config.device} was ended by {signal.Signals(-code).name}", file=sys.stderr)
    return 130 if 130 in codes else int(any(codes))


def _refuse_image_settings(config: DecodeConfig) -> None:
    """Raise ValueError where a setting has no meaning for an experiment."""
    if config.format not in ("auto", *FORMATS):
        raise ValueError(f"--format {config.format}: an experiment's videos are one of {', '.join(FORMATS)}")
    of_images = ("latents_are", "limit", "bit_depth", "columns", "batch_size", "allow_other_vae")
    for flag, value in given(config, of_images).items():
        raise ValueError(f"{flag} {value}: is for images; an experiment's steps are chosen with --step-filter")
