"""A real Ctrl-C, sent to a real process."""

import json
import signal
import subprocess
import sys
import time

from fastlatent.pipeline.checkpoints import checkpoints
from fastlatent.store.reader import Dataset

COUNT = 300  # images, 60 units: Ctrl-C comes long before the last


def start(line, *more):
    command = [sys.executable, "-u", "-m", "fastlatent", *line.split(), *map(str, more)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_until(condition, process, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.005)


def interrupted(process):
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    check_interrupted(process.returncode, err)


def check_interrupted(code, err):
    assert code == 130, err
    assert "SIGINT: stopping after this step; again: at once" in err
    assert err.strip().splitlines()[-1].endswith("interrupted; rerun the same command to go on")
    assert "Traceback" not in err


def log(run):
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def test_train_goes_on_after_ctrl_c(chain, forked, tmp_path):
    line = chain.train_ar.replace("--steps 4", "--steps 100000").replace(
        "--checkpoint-every 2", "--checkpoint-every 50000"
    )
    process = start(f"train ar {line} --out", tmp_path / "ar", chain.latents)
    wait_until(
        lambda: (tmp_path / "ar" / "log.jsonl").exists() and (tmp_path / "ar" / "log.jsonl").stat().st_size, process
    )
    interrupted(process)
    (kept,) = checkpoints(tmp_path / "ar")
    steps = [entry["step"] for entry in log(tmp_path / "ar")]
    assert steps == list(range(int(kept.name[-6:])))
    # It can be sampled, and resumed: one more step, which is the one that follows.
    assert chain.sample(tmp_path / "ar", tmp_path / "s.safetensors", "--no-decode").code == 0
    before = (tmp_path / "ar" / "log.jsonl").read_text()
    argv = [*f"train ar {line} --out".split(), str(tmp_path / "ar"), str(chain.latents)]
    longer = [str(tmp_path / "ar" / "log.jsonl"), len(before)]
    ((code,),) = forked({"argv": argv, "kill_after": [longer], "signal": signal.SIGINT})
    printed = (tmp_path / "log-0-0.txt").read_text()
    check_interrupted(code, printed)
    assert f"resuming from step {len(steps):,}" in printed
    assert (tmp_path / "ar" / "log.jsonl").read_text().startswith(before)


def test_encode_goes_on_after_ctrl_c(chain, forked, tmp_path):
    images = tmp_path / "images" / "class"
    images.mkdir(parents=True)
    for i in range(COUNT):
        chain.image(i).save(images / f"{i:03d}.png")
    line = f"encode --size 8 --batch-size 1 --unit-rows 5 --threads 1 --vae {chain.vae}"
    chain.ok(line, "--out", tmp_path / "whole", tmp_path / "images")
    largest = max(path.stat().st_size for path in (tmp_path / "whole" / "shards").rglob("*.safetensors"))
    two = [str(tmp_path / "cut" / "shards" / "*" / "*.safetensors"), largest]
    argv = [*line.split(), "--out", str(tmp_path / "cut"), str(tmp_path / "images")]
    ((code,),) = forked({"argv": argv, "kill_after": [two], "signal": signal.SIGINT})
    check_interrupted(code, (tmp_path / "log-0-0.txt").read_text())
    assert not (tmp_path / "cut" / "dataset.json").exists()
    done = len(list((tmp_path / "cut" / "shards").rglob("*.safetensors")))
    assert 2 <= done < COUNT // 5
    assert "unfinished encode" in chain.ok("inspect", tmp_path / "cut").out
    again = chain.ok(line, "--out", tmp_path / "cut", tmp_path / "images")
    encoded = int(again.out.rsplit("; ", 1)[1].split(" files encoded now")[0])
    assert encoded <= COUNT - 5 * done  # what was finished is not done again
    assert len(Dataset.open(tmp_path / "cut")) == COUNT
    # The same files with the same bytes as if nothing had happened; encode.yaml says where it went.
    one, other = (
        {k: v for k, v in chain.contents(tmp_path / name).items() if k != "encode.yaml"} for name in ("whole", "cut")
    )
    assert one == other


def test_interrupted_while_torch_is_imported(tmp_path):
    # torch and diffusers swallow an exception that comes up inside their imports. 0.4 s after the start is in there;
    # should a machine be so fast or slow that it is not, the code is 130 or the run refuses its missing source (1).
    command = [
        sys.executable,
        "-m",
        "fastlatent",
        "train",
        "vae",
        str(tmp_path / "none"),
        "--out",
        str(tmp_path / "run"),
    ]
    for delay in (0.3, 0.4, 0.5):
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            assert process.stdout.readline()  # the settings: parsing is done, the import begins
            time.sleep(delay)
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=60)
        assert process.returncode in (130, 1), err
        assert "Traceback" not in err and "terminate" not in err
        assert not (tmp_path / "run").exists()
