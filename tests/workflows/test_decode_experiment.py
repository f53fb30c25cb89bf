"""`fastlatent decode` of an experiment folder: the commands and calls that its users have, damage, interruptions."""

import glob
import gzip
import json
import os
import random
import re
import shutil
import signal
import sys
import threading
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from tiny_video_models import make_vae
from toy_experiment import make_experiment, write_latent

from fastlatent.cli import main
from fastlatent.config import DecodeConfig, build, read_yaml
from fastlatent.encoders.video_autoencoders import load_video_autoencoder
from fastlatent.media import videos
from fastlatent.workflows import decode_steps
from fastlatent.workflows.decode_experiment import ExperimentLatentDecoder, run_together

SHAPE = (1, 4, 2, 3, 4)  # 5 frames of 32×24


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A model folder: its autoencoder is in vae/."""
    folder = tmp_path_factory.mktemp("model")
    make_vae("AutoencoderKLWan", folder / "vae")
    return folder


@pytest.fixture
def experiment(tmp_path, model) -> Path:
    return make_experiment(tmp_path / "run, [1] é", model_id=str(model), steps=(0, 10, 19), shape=SHAPE)


def decode(experiment, *flags) -> int:
    return main(["decode", str(experiment), "--device", "cpu", "--threads", "1", *map(str, flags)])


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("step_*.mp4"))


def summary(folder: Path) -> dict:
    return json.loads((folder / "decode_summary.json").read_text())


def unzipped(path: Path) -> np.ndarray:
    with gzip.open(path) as file:
        return np.load(file)


def frames(path: Path) -> np.ndarray:
    with av.open(str(path)) as file:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)])


ALL = [f"prompt_00{p}/vid_00{v}/step_{s:03d}.mp4" for p in (0, 1) for v in (0, 1) for s in (0, 10, 19)]


# --- the commands and calls of the script that users come from, as they stand there ---


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], ALL),
        (["--prompt-filter", "prompt_000"], ALL[:6]),
        (["--prompt-filter", "prompt_000,prompt_001", "--video-filter", "vid_001"], ALL[3:6] + ALL[9:]),
        (["--step-filter", "step_000,step_019"], ALL[0::3] + ALL[2::3]),
        # Three comma lists at once, with which the script itself decoded nothing.
        (
            ["--prompt-filter", "prompt_000,prompt_001", "--video-filter", "vid_000,vid_001", "--step-filter",
             "step_000,step_019"],
            ALL[0::3] + ALL[2::3],
        ),
        (["--step-filter", "last", "--video-filter", "first"], [ALL[2], ALL[8]]),
        (["--prompt-filter", "*_001", "--step-filter", "every:2"], sorted(ALL[6::3] + ALL[8::3])),
    ],
)  # fmt: skip
def test_filters(experiment, flags, expected, capsys):
    assert decode(experiment, *flags) == 0
    output = experiment / "latents_videos"
    assert names(output) == sorted(expected)
    counts = summary(output)
    assert (counts["total_steps"], counts["successful_steps"], counts["failed_steps"]) == (len(expected),) * 2 + (0,)
    assert counts["success_rate"] == 1 and counts["total_decode_time"] > 0
    out = capsys.readouterr().out
    assert f"{len(expected)} of 12 steps" in out


def test_a_filter_that_matches_nothing(experiment, capsys):
    assert decode(experiment, "--prompt-filter", "prompt_002") == 1
    assert "prompt_000, prompt_001" in capsys.readouterr().err
    assert not (experiment / "latents_videos").exists()


def test_dry_run(experiment, capsys):
    assert decode(experiment, "--dry-run", "--step-filter", "step_000") == 0
    out = capsys.readouterr().out
    assert "4 of 12 steps" in out and "prompt_001/vid_001/step_000.mp4" in out and "decode plan" in out
    assert not (experiment / "latents_videos").exists()


def test_the_rest_of_the_flags(experiment, tmp_path, capsys):
    out = tmp_path / "elsewhere"
    assert decode(experiment, "--output-dir", out, "--fps", 24, "--verbose", "--prompt-filter", "prompt_000") == 0
    assert names(out) == ALL[:6] and not (experiment / "latents_videos").exists()
    with av.open(str(out / ALL[0])) as file:
        assert file.streams.video[0].average_rate == 24
    assert f"{ALL[0].removesuffix('.mp4')}: " in capsys.readouterr().out
    assert (out / "decode.yaml").exists()


@pytest.mark.parametrize(("fps", "flag", "expected"), [(16, None, 16), (16, 24, 24), (None, None, 12)])
def test_frames_a_second(tmp_path, model, fps, flag, expected):
    """The flag, else the experiment's, else 12."""
    extra = {} if fps else {"video_settings": {"width": 32, "height": 24, "frames": 5}}
    root = make_experiment(
        tmp_path / "e", model_id=str(model), prompts=["p"], videos=["v"], steps=[0], shape=SHAPE, extra=extra
    )
    assert decode(root, *(["--fps", flag] if flag else [])) == 0
    with av.open(str(root / "latents_videos/p/v/step_000.mp4")) as file:
        assert file.streams.video[0].average_rate == expected


def test_python(experiment):
    with ExperimentLatentDecoder(experiment, device="cpu", threads=1) as decoder:
        results = decoder.decode_video_directory(
            video_dir=experiment / "latents" / "prompt_000" / "vid_001", step_filter="step_000,step_019"
        )
        assert [result.output_path.name for result in results] == ["step_000.mp4", "step_019.mp4"]
        assert all(result.success and result.decode_time > 0 and not result.error_message for result in results)
        assert results[0].metadata["frames"] == 5 and results[0].metadata["metadata"]["prompt"]
        done = decoder.decode_experiment(
            prompt_filter="prompt_000,prompt_001", video_filter="vid_000,vid_001", step_filter="step_000,step_019"
        )
        assert done["total_steps"] == 8 and done["skipped_steps"] == 2
        assert done == summary(experiment / "latents_videos")
        steps = done["video_summaries"]["prompt_001/vid_000"]["steps"]
        assert steps["step_019"]["output"] == "prompt_001/vid_000/step_019.mp4"
    decoder.cleanup()  # again: harmless
    with pytest.raises(ValueError, match="expected a folder of latents"):
        ExperimentLatentDecoder(experiment, device="cpu").decode_video_directory("latents/prompt_000/vid_009")
    with pytest.raises(ValueError, match="unknown key 'quality'"):
        ExperimentLatentDecoder(experiment, quality=3.0)


# --- what comes out ---


def test_pixels(experiment, model):
    """Without loss: the frames are the autoencoder's, rounded; latents de-normalised by its config."""
    assert decode(experiment, "--crf", 0, "--prompt-filter", "first", "--video-filter", "first") == 0
    stored = unzipped(experiment / "latents/prompt_000/vid_000/step_010.npy.gz")
    config = json.loads((model / "vae/config.json").read_text())
    mean, std = (torch.tensor(config[name]).view(1, -1, 1, 1, 1) for name in ("latents_mean", "latents_std"))
    vae = load_video_autoencoder(model / "vae", "cpu", torch.float32)
    pixels = vae.decode(torch.from_numpy(stored).float() * std + mean)[0]
    want = ((pixels.clamp(-1, 1) + 1) * 127.5).round().permute(1, 2, 3, 0).numpy()
    got = frames(experiment / "latents_videos/prompt_000/vid_000/step_010.mp4")
    assert got.shape == want.shape == (5, 24, 32, 3)
    # yuv420p keeps a quarter of the colours of noise: its brightness must agree.
    luma = np.array([0.2126, 0.7152, 0.0722])
    assert abs((got @ luma) - (want @ luma)).mean() < 6


@pytest.mark.parametrize("form", ["gif", "webp", "png-frames"])
def test_formats(experiment, form):
    assert decode(experiment, "--format", form, "--prompt-filter", "first", "--step-filter", "last") == 0
    steps = summary(experiment / "latents_videos")["video_summaries"]["prompt_000/vid_000"]["steps"]
    path = experiment / "latents_videos" / steps["step_019"]["output"]
    assert videos.video_info(path)[:3] == (5, 32, 24)


def test_every_stored_format_is_the_same_video(tmp_path, model):
    made = set()
    for suffix in (".npy.gz", ".npy", ".pt", ".pt.gz", ".safetensors"):
        root = make_experiment(
            tmp_path / suffix, model_id=str(model), prompts=["p"], videos=["v"], steps=[0], shape=SHAPE, suffix=suffix
        )
        assert decode(root) == 0
        made.add((root / "latents_videos/p/v/step_000.mp4").read_bytes())
    assert len(made) == 1


# --- done before ---


def test_what_is_done_is_not_done_again(experiment, capsys):
    assert decode(experiment) == 0
    output = experiment / "latents_videos"
    times = {name: (output / name).stat().st_mtime_ns for name in names(output)}
    assert decode(experiment) == 0
    assert "12 were done before" in capsys.readouterr().out
    assert {name: (output / name).stat().st_mtime_ns for name in names(output)} == times
    # By content: a video that was cut, latents that changed, a video that is gone, and nothing else.
    (output / ALL[0]).write_bytes((output / ALL[0]).read_bytes()[:-100])
    (output / ALL[1]).unlink()
    source = experiment / "latents/prompt_001/vid_001/step_019.npy.gz"
    source.write_bytes(gzip.compress(gzip.decompress(source.read_bytes())[:-2] + b"\0\0"))
    assert decode(experiment) == 0
    assert "9 were done before" in capsys.readouterr().out
    changed = {name for name in times if (output / name).stat().st_mtime_ns != times[name]}
    assert changed == {ALL[0], ALL[1], ALL[11]}
    # Another setting, or --force: all of them.
    assert decode(experiment, "--crf", 30) == decode(experiment, "--crf", 30, "--force") == 0
    assert capsys.readouterr().out.count("(0 were done before)") == 2


def test_two_at_once_do_nothing_twice(experiment, monkeypatch):
    """Two decoders in this process: every video is written once, and both know all results."""
    written = []
    original = decode_steps.open_video

    def open_video(path, **settings):
        written.append(Path(path).relative_to(experiment / "latents_videos").as_posix())
        return original(path, **settings)

    monkeypatch.setattr(decode_steps, "open_video", open_video)
    summaries: list[dict] = []

    def run():
        with ExperimentLatentDecoder(experiment, device="cpu", threads=1) as decoder:
            summaries.append(decoder.decode_experiment())

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(written) == ALL
    assert [one["successful_steps"] for one in summaries] == [12, 12]


SLOW = (
    "import time\n"
    "from fastlatent.workflows import decode_steps\n"
    "original = decode_steps.to_frames\n"
    "decode_steps.to_frames = lambda pixels: (time.sleep(0.05), original(pixels))[1]\n"
)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_interrupted_runs_resume(experiment, number, forked, tmp_path):
    output = experiment / "latents_videos"
    argv = ["decode", str(experiment), "--device", "cpu", "--threads", "1"]
    first_video = [f"{glob.escape(str(output))}/*/*/step_*.mp4", 0]
    [[code]] = forked({"argv": argv, "first": SLOW, "kill_after": [first_video], "signal": number})
    assert code == (130 if number == signal.SIGINT else -number)
    before = names(output)
    assert 1 <= len(before) < 12
    if number == signal.SIGINT:
        assert "rerun the same command to go on" in (tmp_path / "log-0-0.txt").read_text()
        assert not list(output.rglob(".tmp-*")) and summary(output)["total_steps"] == len(before)
    times = {name: (output / name).stat().st_mtime_ns for name in before}
    assert decode(experiment) == 0
    assert names(output) == ALL and summary(output)["successful_steps"] == 12
    # What a killed process left is swept by the next one.
    assert not list(output.rglob(".tmp-*")) and not list((output / ".records/lease").iterdir())
    again = [name for name in before if (output / name).stat().st_mtime_ns != times[name]]
    # A video that was complete but not yet recorded is made again: at most the one that was being finished.
    assert len(again) <= (0 if number == signal.SIGINT else 1)
    for name in names(output):
        assert frames(output / name).shape == (5, 24, 32, 3)


@pytest.mark.soak
def test_killed_at_random(experiment, forked):
    """Two at a time, 50 kills at any moment: never half a video, and whoever comes last ends with all of them."""
    output, draw, kills = experiment / "latents_videos", random.Random(0), 0
    argv = ["decode", str(experiment), "--device", "cpu", "--threads", "1"]
    while kills < 50:
        if names(output) == ALL:
            shutil.rmtree(output)
        waits = [draw.uniform(0.05, 1.5) for _ in range(2)]
        [codes] = forked({"argv": argv, "first": SLOW, "count": 2, "kill_after": waits})
        assert set(codes) <= {0, -signal.SIGKILL}
        kills += codes.count(-signal.SIGKILL)
        assert all(frames(output / name).shape == (5, 24, 32, 3) for name in names(output))
    assert decode(experiment) == 0
    assert names(output) == ALL and summary(output)["successful_steps"] == 12
    assert not list(output.rglob(".tmp-*"))


def test_processes_together(experiment, forked):
    """Two processes, as --gpus starts them: each takes a part, and says what it failed at."""
    (experiment / "latents/prompt_000/vid_000/step_000.npy.gz").write_bytes(b"")
    argv = ["decode", str(experiment), "--device", "cpu", "--threads", "1"]
    [codes] = forked({"argv": argv, "first": SLOW, "count": 2})
    assert set(codes) <= {0, 1} and 1 in codes
    assert names(experiment / "latents_videos") == ALL[1:]
    assert summary(experiment / "latents_videos")["failed_steps"] == 1


def test_processes_are_told_their_config(experiment, tmp_path, monkeypatch):
    """With a program instead of Python that keeps the file."""
    program = tmp_path / "python"
    program.write_text(f'#!/bin/sh\n[ "$1 $2 $3 $4" = "-m fastlatent decode --config" ] && cp "$5" "{tmp_path}"\n')
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    config = build(DecodeConfig, {}, {"latents": str(experiment), "step_filter": "every:2"})
    configs = [replace(config, device=f"cuda:{i}") for i in range(2)]
    assert run_together(configs) == 0
    assert [build(DecodeConfig, read_yaml(tmp_path / f"{i}.yaml"), {}) for i in range(2)] == configs


# --- bad input ---


def only_failure(experiment, capsys) -> str:
    """Decode; exactly the first step fails, all others are there, the summary says so. Returns the message."""
    assert decode(experiment) == 1
    output = experiment / "latents_videos"
    assert names(output) == ALL[1:]
    counts = summary(output)
    assert (counts["total_steps"], counts["failed_steps"]) == (12, 1)
    assert counts["success_rate"] == pytest.approx(11 / 12)
    result = counts["video_summaries"]["prompt_000/vid_000"]["steps"]["step_000"]
    assert result["success"] is False and result["output"] is None
    assert f"prompt_000/vid_000/step_000: failed: {result['error']}" in capsys.readouterr().out
    return result["error"]


def _cut(path):
    path.write_bytes(path.read_bytes()[:-20])


def _pickled(path):
    with gzip.open(path, "wb") as file:
        np.save(file, np.array([{"a": 1}], dtype=object), allow_pickle=True)


DAMAGED = [
    (lambda path: write_latent(path, np.zeros((1, 5, 2, 3, 4), np.float16)), r"C = 4,.*\[1, 5, 2, 3, 4\]"),
    (lambda path: write_latent(path, np.zeros((4, 4), np.float16)), r"\[4, 4\]"),
    (lambda path: write_latent(path, np.zeros(SHAPE, np.uint16)), "bfloat16"),
    (lambda path: write_latent(path, np.zeros(SHAPE, np.int64)), "got a numpy array of int64"),
    (lambda path: write_latent(path, np.zeros((0, 4, 2, 3, 4), np.float16)), r"empty shape \[0, 4"),
    (_cut, "truncated"),
    (_pickled, "pickle"),
]


def test_latents_that_cannot_be_decoded(experiment, capsys):
    """Each fails with its own message; all others are decoded."""
    for name, (damage, _) in zip(ALL, DAMAGED, strict=False):
        damage(experiment / "latents" / name.replace(".mp4", ".npy.gz"))
    assert decode(experiment) == 1
    output, printed = experiment / "latents_videos", capsys.readouterr().out
    assert names(output) == ALL[len(DAMAGED) :]
    assert summary(output)["failed_steps"] == len(DAMAGED)
    for name, (_, message) in zip(ALL, DAMAGED, strict=False):
        folder, _, step = name.removesuffix(".mp4").rpartition("/")
        result = summary(output)["video_summaries"][folder]["steps"][step]
        assert result["success"] is False and result["output"] is None
        assert re.search(message, result["error"]), result
        assert f"{folder}/{step}: failed: {result['error']}" in printed


def test_nan_latents_are_decoded_and_flagged(experiment):
    values = unzipped(experiment / "latents/prompt_000/vid_000/step_000.npy.gz")
    values[0, 0, 0, 0, 0] = np.nan
    write_latent(experiment / "latents/prompt_000/vid_000/step_000.npy.gz", values)
    assert decode(experiment) == 0
    result = summary(experiment / "latents_videos")["video_summaries"]["prompt_000/vid_000"]["steps"]["step_000"]
    assert result["success"] and result["latent"]["nan"] == 1
    assert any("1 of 96 latents are NaN" in note for note in result["notes"])
    assert any("pixel values are NaN" in note for note in result["notes"])


def test_odd_sizes(tmp_path, model):
    """Sides of an odd number of pixels cannot be yuv420p; --scale makes one."""
    root = make_experiment(
        tmp_path / "e", model_id=str(model), prompts=["p"], videos=["v"], steps=[0], shape=(1, 4, 1, 3, 5)
    )
    assert decode(root, "--scale", 0.9) == 0
    step = summary(root / "latents_videos")["video_summaries"]["p/v"]["steps"]["step_000"]
    assert step["width"] % 2 == step["height"] % 2 == 0 and step["notes"]


def test_disk_full_in_the_middle(experiment, capsys, monkeypatch):
    """One video cannot be written: no half file, the others are there, the summary says it."""
    original = decode_steps.open_video

    def open_video(path, **settings):
        writer = original(path, **settings)
        if Path(path).parts[-3:] == ("prompt_000", "vid_000", "step_000.mp4"):

            def write(pixels):
                raise OSError(28, os.strerror(28), str(path))

            monkeypatch.setattr(writer, "write", write)
        return writer

    monkeypatch.setattr(decode_steps, "open_video", open_video)
    assert "No space left" in only_failure(experiment, capsys)
    assert not [path for path in (experiment / "latents_videos").rglob("*") if path.name.startswith(".tmp")]


def test_no_autoencoder(experiment, tmp_path, model, capsys):
    config = experiment / "configs/generation_config.yaml"
    text = config.read_text()
    config.write_text(text.replace(str(model), str(tmp_path / "gone")))
    assert decode(experiment) == 1
    assert str(tmp_path / "gone") in capsys.readouterr().err
    config.write_text(text.replace("model_id", "model"))
    assert decode(experiment) == 1
    assert "model_id" in capsys.readouterr().err
    config.unlink()
    assert decode(experiment) == 1
    assert "generation_config.yaml" in capsys.readouterr().err
    assert not (experiment / "latents_videos").exists()
    assert decode(experiment, "--vae", model / "vae", "--step-filter", "first") == 0


def test_no_latents(tmp_path, capsys):
    (tmp_path / "e" / "configs").mkdir(parents=True)
    (tmp_path / "e" / "latents").mkdir()
    assert decode(tmp_path / "e") == 1
    assert "latents/PROMPT/VIDEO/step_*" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [["--limit", "3"], ["--format", "png"], ["--gpus", "0,x"], ["--gpus", "7"]])
def test_flags_that_do_not_fit(experiment, flags, capsys):
    assert decode(experiment, *flags) == 1
    assert flags[0] in capsys.readouterr().err


# --- memory ---


@pytest.mark.parametrize("twice", [False, True])
def test_out_of_memory(experiment, monkeypatch, capsys, twice):
    """Once more in tiles; if that fails too, what was needed and what to do."""
    from fastlatent.encoders.video_autoencoders import DiffusersVideoAutoencoder

    original = DiffusersVideoAutoencoder.stream

    def stream(self, raw, *, tiles=False):
        chunks = original(self, raw, tiles=tiles)
        if not raw.is_meta and (not tiles or twice):  # not while it is planned
            yield next(chunks)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 7.70 GiB")
        yield from chunks

    monkeypatch.setattr(DiffusersVideoAutoencoder, "stream", stream)
    flags = ["--prompt-filter", "first", "--video-filter", "first", "--step-filter", "first"]
    assert decode(experiment, *flags) == int(twice)
    step = summary(experiment / "latents_videos")["video_summaries"]["prompt_000/vid_000"]["steps"]["step_000"]
    if twice:
        assert "out of memory on cpu" in step["error"] and "--dtype bfloat16" in step["error"]
    else:
        assert any("tiles" in note for note in step["notes"])
    assert not list((experiment / "latents_videos").rglob(".tmp-*"))
