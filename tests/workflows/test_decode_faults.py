"""Experiments decoded in bad circumstances: processes killed, several at once, damaged records, impossible folders."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from tiny_video_models import make_vae
from toy_experiment import make_experiment, write_latent

from fastlatent.cli import main
from fastlatent.config import DecodeConfig
from fastlatent.sources.experiment import Step
from fastlatent.workflows import decode as decode_workflow
from fastlatent.workflows import decode_experiment as experiment_workflow
from fastlatent.workflows import decode_steps
from fastlatent.workflows.decode_experiment import ExperimentLatentDecoder, run_together
from fastlatent.workflows.decode_records import Records, StepResult


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A model folder: its autoencoder is in vae/."""
    folder = tmp_path_factory.mktemp("model")
    make_vae("AutoencoderKLWan", folder / "vae")
    return folder


def decode(root: Path, *flags) -> int:
    return main(["decode", str(root), "--device", "cpu", "--threads", "1", *map(str, flags)])


def summary(folder: Path) -> dict:
    return json.loads((folder / "decode_summary.json").read_text())


def one_step(tmp_path, model, **changes) -> Path:
    settings = {"prompts": ["p"], "videos": ["v"], "steps": [0], "shape": (1, 4, 1, 3, 4), **changes}
    return make_experiment(tmp_path / "e", model_id=str(model), **settings)


def test_force_beside_another(tmp_path, model):
    """--force of several processes: what one of them made since they began is not made again by the others."""
    root = one_step(tmp_path, model, steps=(0, 1))
    with ExperimentLatentDecoder(root, device="cpu", threads=1, force=True) as decoder:
        steps = list(decoder.experiment.steps)
        assert decoder.decode_experiment()["skipped_steps"] == 0
        assert decoder.decode_experiment(step_filter="first")["skipped_steps"] == 0  # a later run: again

        def beside():  # another decoder, at the moment when this one loads its model
            with ExperimentLatentDecoder(root, device="cpu", threads=1, force=True) as other:
                assert other._decode(steps[:1], None, None)[1]["skipped_steps"] == 0
            return vae

        vae = decoder._load()
        decoder._load = beside
        results, _ = decoder._decode(steps, None, None)
    assert [results[step].skipped for step in steps] == [True, False]


def test_unfinished_files_are_swept(tmp_path, model):
    """Those of killed processes, unless another process is at work; nobody else's."""
    root = one_step(tmp_path, model)
    output = root / "latents_videos"
    (output / "p/v").mkdir(parents=True)
    (output / ".records/steps").mkdir(parents=True)
    number = "0123456789abcdef" * 2
    stale = [f"p/v/.tmp-{number}", f"p/v/.tmp-{number[::-1]}/000000.png", f".records/steps/.tmp-{number}.json-{number}"]
    stale += [f".tmp-{name}-{number}" for name in ("decode_summary.json", "decode.yaml")]
    others = [f".tmp-gallery.html-{number}", "p/v/.tmp-mine"]
    for name in stale + others:
        (output / name).parent.mkdir(exist_ok=True)
        (output / name).touch()
    beside = Records(output, time.time())
    assert decode(root) == 0
    assert all((output / name).exists() for name in stale + others)
    beside.close()
    assert decode(root) == 0
    assert not [name for name in stale if (output / name).exists()]
    assert sorted(path.name for path in output.rglob(".tmp-*")) == sorted(Path(name).name for name in others)


@pytest.mark.parametrize(
    "change",
    [
        {"output": None}, {"output": 5}, {"output": ""}, {"output": "p"}, {"success": 1}, {"metadata": None},
        {"decode_time": None}, {"time": "x"}, {"settings": None}, {"more": 1},
        {"success": False, "output": None, "time": None},
    ],
)  # fmt: skip
def test_a_damaged_record_is_none(tmp_path, change):
    """Of another version, or edited: its step counts as not decoded."""
    step = Step("p", "v", "step_000", tmp_path / "latent")
    records = Records(tmp_path, time.time())
    try:
        video = tmp_path / "p/v/step_000.mp4"
        video.parent.mkdir(parents=True)
        video.write_bytes(b"a video")
        records.write(step, "digest", StepResult(success=True, output_path=video, decode_time=0.5))
        assert records.finished(step, "digest").output_path == video
        (path,) = (tmp_path / ".records/steps").iterdir()
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
        assert records.finished(step, "digest") is None
        if change not in ({"output": ""}, {"output": "p"}):  # a folder that is there may be a video of png-frames
            assert records.write_summary([step], 0, {})["total_steps"] == 0
    finally:
        records.close()


def test_the_longest_names(tmp_path, model):
    """255 bytes with .npy; a record's own ending must not make that longer."""
    root = one_step(tmp_path, model, suffix=".npy")
    folder = root / "latents/p/v"
    for name in ("step_" + "a" * 246, "step_" + "\U0001f600" * 61):
        (folder / f"{name}.npy").write_bytes((folder / "step_000.npy").read_bytes())
    assert decode(root) == 0
    assert summary(root / "latents_videos")["successful_steps"] == 3


def test_the_count_of_an_interrupted_run(tmp_path, model, monkeypatch):
    """decode_summary.json of a run that was stopped says how many steps it found done."""
    root = one_step(tmp_path, model, steps=(0, 1, 2))
    assert decode(root, "--step-filter", "step_000,step_001") == 0
    monkeypatch.setattr(decode_steps.StepDecoder, "_decode", lambda *_: os.kill(os.getpid(), signal.SIGINT) or done)
    done = decode_steps.Future()
    done.set_result(StepResult(success=False, error_message="x"))
    assert decode(root) == 130
    assert summary(root / "latents_videos")["skipped_steps"] == 2


@pytest.mark.parametrize("fps", [0, -1, 5000.0, float("nan")])
def test_impossible_frames_a_second(tmp_path, model, fps):
    root = one_step(tmp_path, model)
    with ExperimentLatentDecoder(root, device="cpu", threads=1) as decoder, pytest.raises(ValueError, match="0.01 to"):
        decoder.decode_experiment(fps=fps)


def test_no_mp4_without_pyav(tmp_path, model, capsys, monkeypatch):
    """Said once and before the model is loaded, not for each step; other formats need none."""
    monkeypatch.setitem(sys.modules, "av", None)
    root = one_step(tmp_path, model)
    assert decode(root) == 1
    assert "pip install 'fastlatent[video]'" in capsys.readouterr().err
    assert not (root / "latents_videos").exists()
    assert decode(root, "--format", "gif") == 0


def test_an_output_folder_that_cannot_be(tmp_path, model, capsys, monkeypatch):
    """Found before the model is loaded."""
    (tmp_path / "file").touch()
    monkeypatch.setattr(ExperimentLatentDecoder, "_load", lambda self: pytest.fail("loaded"))
    assert decode(one_step(tmp_path, model), "--output-dir", tmp_path / "file") == 1
    assert "choose another folder with --output-dir" in capsys.readouterr().err


def test_imports_are_where_ctrl_c_ends_them():
    """The command line guards the import of a command's module; torch's import swallows Ctrl-C elsewhere."""
    assert decode_workflow.decode_experiment is experiment_workflow.decode_experiment
    assert callable(decode_workflow.decode_images)


@pytest.mark.parametrize(("codes", "expected"), [([0, 0], 0), ([0, 1], 1), ([1, 130], 130), ([0, -9], 1)])
def test_exit_code_of_several(monkeypatch, tmp_path, capsys, codes, expected):
    """0, 1 or 130, whatever ended the processes."""
    lines = iter(
        [[sys.executable, "-c", f"import os; os.kill(os.getpid(), {-c})" if c < 0 else f"exit({c})"] for c in codes]
    )
    original = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda line: original(next(lines)))
    config = DecodeConfig(latents=str(tmp_path), device="cuda:1")
    assert run_together([config] * len(codes)) == expected
    assert ("cuda:1 was ended by SIGKILL" in capsys.readouterr().err) == (-9 in codes)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_parent_alone_ends_all(monkeypatch, tmp_path, number):
    monkeypatch.setattr(experiment_workflow, "_GRACE_SECONDS", 0.05)
    monkeypatch.setattr(experiment_workflow, "_POLL_SECONDS", 0.01)
    original, children = subprocess.Popen, []

    def start(line):
        children.append(original(["sleep", "60"]))
        if len(children) == 2:
            threading.Timer(0.03, os.kill, (os.getpid(), number)).start()
        return children[-1]

    monkeypatch.setattr(subprocess, "Popen", start)
    with pytest.raises(KeyboardInterrupt):
        run_together([DecodeConfig(latents=str(tmp_path))] * 2)
    assert [child.returncode for child in children] == [-signal.SIGTERM] * 2


def test_a_first_step_that_cannot_be_decoded(tmp_path, model, monkeypatch):
    """It fails alone: the plan is made of the next one."""
    root = one_step(tmp_path, model, steps=(0, 1))
    write_latent(root / "latents/p/v/step_000.npy.gz", np.zeros((1, 4, 2, 3, 4), np.float16))
    original = experiment_workflow.plan_decode

    def plan_decode(vae, shape, **given):
        if shape[2] == 2:
            raise ValueError("expected 1 latent frame, got 2")
        return original(vae, shape, **given)

    monkeypatch.setattr(experiment_workflow, "plan_decode", plan_decode)
    assert decode(root) == 1
    steps = summary(root / "latents_videos")["video_summaries"]["p/v"]["steps"]
    assert steps["step_000"]["error"] == "expected 1 latent frame, got 2" and steps["step_001"]["success"]
    with ExperimentLatentDecoder(root, device="cpu", threads=1) as decoder, pytest.raises(ValueError, match="1 latent"):
        decoder.decode_experiment(step_filter="first")
