"""What is on disk is damaged, foreign, busy or full: one clear message, and nothing that was there is lost."""

import contextlib
import errno
import io
import json
import os
import resource
import shutil
from pathlib import Path

import pytest
import torch
from chain_helpers import encode, train_ar, train_vae
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fastlatent.pipeline.checkpoints import checkpoints
from fastlatent.store import files
from fastlatent.store.build import Lock
from fastlatent.store.reader import Dataset
from fastlatent.workflows.latent_files import FORMAT, LatentFile

NAN = float("nan")


# --- datasets and latent files ---


GOOD = {"latents": torch.zeros(2, 4, 2), "labels": torch.zeros(2, dtype=torch.int64)}
PROVENANCE = {"latents_mean": 0, "latents_std": 1, "vae": None, "classes": []}


@pytest.mark.parametrize(
    ("tensors", "provenance"),
    [
        (GOOD, None),
        (GOOD, "{"),
        (GOOD, "{}"),
        (GOOD | {"labels": torch.tensor([0, 5])}, json.dumps(PROVENANCE | {"classes": ["one", "two"]})),
        (GOOD | {"latents": torch.zeros(2, 3, 2)}, json.dumps(PROVENANCE)),  # 3 tokens are no square
        (GOOD | {"latents": torch.zeros(2, 4)}, json.dumps(PROVENANCE)),
        ({name: tensor[:0] for name, tensor in GOOD.items()}, json.dumps(PROVENANCE)),
        (GOOD | {"labels": torch.zeros(3, dtype=torch.int64)}, json.dumps(PROVENANCE)),
        (GOOD | {"latents": torch.full((2, 4, 2), NAN)}, json.dumps(PROVENANCE)),
        ({"labels": GOOD["labels"]}, json.dumps(PROVENANCE)),
    ],
)
def test_bad_latent_files(chain, tmp_path, tensors, provenance):
    file = tmp_path / "latents.safetensors"
    save_file(tensors, file, {FORMAT: provenance} if provenance else None)
    done = chain.command("decode --threads 1 --output-dir", tmp_path / "out", "--vae", chain.vae, file)
    assert str(file) in done.message


def test_one_metadata_entry(tmp_path):
    # safetensors 0.8 writes two in an order that changes from process to process, and with it the bytes.
    LatentFile(**GOOD, **PROVENANCE).write(tmp_path / "latents.safetensors")
    with safe_open(tmp_path / "latents.safetensors", "pt") as file:
        assert list(file.metadata()) == [FORMAT]


def test_what_is_no_latents(chain, tmp_path):
    out = tmp_path / "out"
    (tmp_path / "garbage.safetensors").write_bytes(b"garbage" * 100)
    for path, message in (
        (tmp_path / "nothing", "does not exist; expected a dataset folder, a .safetensors file"),
        (tmp_path / "garbage.safetensors", "not a readable safetensors file"),
        (chain.images / "ant" / "0.png", "expected a dataset folder, a .safetensors file"),
        (chain.latents / Dataset.open(chain.latents).shards[0].path, "expected latents written by `fastlatent sample`"),
        (chain.ar, "expected a dataset"),
        (chain.images, "expected a dataset"),
    ):
        assert message in chain.command("decode --output-dir", out, path).message
        assert not out.exists()
    for path in (chain.ar, chain.images, tmp_path / "nothing"):
        assert "expected a dataset" in train_ar(chain, out, latents=path).message
        assert not out.exists()


def test_inspect_of_garbage(chain, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("text")
    (tmp_path / "garbage.safetensors").write_bytes(os.urandom(1000))
    (tmp_path / "short.safetensors").write_bytes(b"1234")
    damaged = chain.copy("latents", tmp_path / "damaged")
    (damaged / "dataset.json").write_text("{}")
    for name, message in (
        ("nothing", "does not exist"),
        ("empty", "an empty folder"),
        ("file", "expected a dataset, run or checkpoint folder, or a .safetensors file"),
        ("garbage.safetensors", "not a shard"),
        ("short.safetensors", "not a shard"),
        ("damaged", "dataset.json"),
    ):
        done = chain.command("inspect", tmp_path / name).message
        assert str(tmp_path / name) in done
        assert message in done


@pytest.mark.parametrize("what", ["index", "statistics", "manifest", "shards"])
def test_damaged_datasets(chain, tmp_path, what):
    latents = chain.copy("latents", tmp_path / "latents")
    file = next(path for path in sorted((latents / what).rglob("*")) if path.is_file())
    file.write_bytes(file.read_bytes()[:-3])
    for done in (
        train_ar(chain, tmp_path / "ar", latents=latents),
        chain.command("decode --threads 1 --output-dir", tmp_path / "o", latents),
        encode(chain, chain.images, latents),
    ):
        assert file.name in done.message


# --- running twice, and resuming ---


def test_resume_with_other_settings(chain, tmp_path):
    run = chain.copy("ar", tmp_path / "ar")
    before = chain.contents(run)
    message = train_ar(chain, run, "--steps 9 --learning-rate 1e-3").message
    assert "holds a run with other settings; nothing was changed" in message
    assert "steps: 4 (the run) != 9 (now)" in message
    assert "learning_rate: 0.01 (the run) != 0.001 (now)" in message
    assert "another --out" in message
    assert chain.contents(run) == before
    # These change no loss, nor does what is for images only, or where the dataset lies.
    moved = chain.copy("latents", tmp_path / "moved")
    for_images = "--size 16 --latent-statistics 5"
    assert train_ar(chain, run, f"--checkpoint-every 1 --keep-checkpoints 1 {for_images}", latents=moved).code == 0


def test_resume_as_another_kind_of_run(chain, tmp_path):
    run = chain.copy("vae", tmp_path / "run")
    before = chain.contents(run)
    assert "other settings" in train_ar(chain, run).message
    assert chain.contents(run) == before


@pytest.mark.parametrize("text", ["", "{", "[]", '"text"', "\0"])
def test_resume_with_damaged_settings(chain, tmp_path, text):
    run = chain.copy("ar", tmp_path / "ar")
    (run / ".settings.json").write_text(text)
    assert ".settings.json" in train_ar(chain, run).message


def test_resume_from_a_damaged_checkpoint(chain, tmp_path):
    run = chain.copy("ar", tmp_path / "ar")
    shutil.rmtree(checkpoints(run)[-1])
    state = checkpoints(run)[-1] / "training.safetensors"
    data = state.read_bytes()
    state.write_bytes(data[:1000])
    assert str(state) in train_ar(chain, run).message
    state.unlink()
    assert str(state) in train_ar(chain, run).message
    state.write_bytes(data)
    assert train_ar(chain, run).code == 0
    assert (
        chain.contents(run)["checkpoint-000004/model.safetensors"]
        == (checkpoints(chain.ar)[-1] / "model.safetensors").read_bytes()
    )


def test_resume_on_another_dataset(chain, images, tmp_path):
    # The dataset has grown since: other normalisation, other order.
    latents = chain.copy("latents", tmp_path / "latents")
    assert train_ar(chain, tmp_path / "ar", latents=latents).code == 0
    shutil.rmtree(checkpoints(tmp_path / "ar")[-1])
    chain.image(99).save(images / "ant" / "new.png")
    assert encode(chain, images, latents).code == 0
    before = chain.contents(tmp_path / "ar")
    assert "\n  data: " in train_ar(chain, tmp_path / "ar", latents=latents).message
    assert chain.contents(tmp_path / "ar") == before


def test_two_at_once(chain, images, tmp_path):
    for name, run in (("ar", train_ar), ("vae", train_vae)):
        folder = chain.copy(name, tmp_path / name)
        lock = Lock(folder)
        try:
            message = run(chain, folder).message
        finally:
            lock.release()
        assert f"{folder} is being written by pid {os.getpid()}" in message
        assert "wait until that has finished" in message
    folder = chain.copy("latents", tmp_path / "latents")
    before = chain.contents(folder)
    lock = Lock(folder)
    try:
        # Where nothing is to be done nothing is written, whoever else does.
        assert "0 files encoded now" in encode(chain, images, folder).out
        chain.image(5).save(images / "ant" / "new.png")
        assert f"is being written by pid {os.getpid()}" in encode(chain, images, folder).message
    finally:
        lock.release()
    assert chain.contents(folder) == before


# --- disks ---


@pytest.mark.parametrize("command", ["encode", "train vae", "train ar", "decode"])
@pytest.mark.parametrize("where", ["file", "file/below"])
def test_output_that_is_a_file(chain, tmp_path, command, where):
    (tmp_path / "file").write_text("mine")
    out = tmp_path / where
    done = {
        "encode": lambda: encode(chain, chain.images, out),
        "train vae": lambda: train_vae(chain, out),
        "train ar": lambda: train_ar(chain, out),
        "decode": lambda: chain.command("decode --threads 1 --output-dir", out, chain.latents),
    }[command]()
    assert str(tmp_path / "file") in done.message
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
@pytest.mark.parametrize("command", ["encode", "train ar"])
def test_output_that_cannot_be_written(chain, tmp_path, command):
    (tmp_path / "out").mkdir(mode=0o500)
    run = encode(chain, chain.images, tmp_path / "out") if command == "encode" else train_ar(chain, tmp_path / "out")
    assert "expected a folder that can be written to" in run.message


def test_encode_does_not_touch_other_folders(chain, images):
    before = chain.contents(chain.ar)
    assert "expected an empty folder or a dataset" in encode(chain, images, chain.ar).message
    assert chain.contents(chain.ar) == before


@pytest.fixture
def small_files():
    """No file of more than 100 kB can be written: a checkpoint cannot, its config and log can."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_no_room_for_a_checkpoint(chain, tmp_path, request):
    run = chain.copy("ar", tmp_path / "ar")
    shutil.rmtree(checkpoints(run)[-1])
    before = chain.contents(checkpoints(run)[0])
    request.getfixturevalue("small_files")
    message = train_ar(chain, run).message
    assert "File too large" in message
    assert [path.name for path in checkpoints(run)] == ["checkpoint-000002"]
    assert chain.contents(checkpoints(run)[0]) == before
    assert not list(run.glob(".tmp-*"))


@pytest.mark.parametrize("call", ["write", "fdatasync", "replace"])
def test_no_room_for_a_shard(chain, images, tmp_path, monkeypatch, call):
    latents = chain.copy("latents", tmp_path / "latents")
    before = chain.contents(latents)
    chain.image(50).save(images / "ant" / "new.png")
    original = getattr(os, call)
    calls = []

    def full(*args, **options):
        calls.append(call)
        if len(calls) > 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(files.os, call, full)
        message = encode(chain, images, latents).message
    assert "No space left on device" in message
    after = chain.contents(latents)
    same = {name for name in before if name != "encode.yaml"}
    assert {name: after[name] for name in same} == {name: before[name] for name in same}
    assert not list(latents.rglob(".tmp-*"))
    # With room again the same command goes on.
    assert encode(chain, images, latents).code == 0
    assert len(Dataset.open(latents)) == 9


def test_no_room_for_an_image(chain, tmp_path, monkeypatch):
    def full(*args, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "sheet.png")

    monkeypatch.setattr("fastlatent.workflows.image_files.save_sheet", full)
    done = chain.command("decode --threads 1 --output-dir", tmp_path / "out", chain.latents)
    assert "No space left on device (sheet.png)" in done.message


# --- numbers ---


def test_training_that_diverges(chain, tmp_path):
    more = "--steps 30 --learning-rate 1e30 --warmup-steps 0 --checkpoint-every 1 --keep-checkpoints 3"
    message = train_ar(chain, tmp_path / "ar", more).message
    assert "loss became nan at step 1" in message
    assert "--learning-rate" in message
    assert "--out" in message  # in this folder another rate is refused
    kept = checkpoints(tmp_path / "ar")
    assert kept
    for tensor in load_file(kept[-1] / "training.safetensors").values():
        assert tensor.isfinite().all()


def test_training_an_autoencoder_that_diverges(chain, tmp_path):
    more = "--steps 30 --learning-rate 1e30 --warmup-steps 0 --checkpoint-every 1 --keep-checkpoints 3"
    message = train_vae(chain, tmp_path / "vae", more).message
    assert " step " in message
    assert "--learning-rate" in message


def test_out_of_memory(chain, tmp_path, monkeypatch):
    from fastlatent.sampling.autoregressive import NextTokenSampler

    def full(*args, **options):
        torch.empty(2**60)

    monkeypatch.setattr(NextTokenSampler, "sample", full)
    assert "memory" in chain.sample(chain.ar, tmp_path / "out").message


def test_traceback_on_request(chain, tmp_path, monkeypatch):
    monkeypatch.setenv("FASTLATENT_TRACEBACK", "1")
    with pytest.raises(ValueError, match="does not exist"), contextlib.redirect_stdout(io.StringIO()):
        from fastlatent.cli import main

        main(["sample", str(Path(tmp_path / "nothing")), "--output", str(tmp_path / "out")])


def test_training_into_a_folder_of_something_else(chain, tmp_path):
    out = tmp_path / "mine"
    out.mkdir()
    (out / "log.jsonl").write_text("precious\n")
    message = train_ar(chain, out).message
    assert "expected an empty folder or a run of `fastlatent train`, found log.jsonl" in message
    assert (out / "log.jsonl").read_text() == "precious\n"


def test_decoding_into_a_folder_with_more_images(chain, tmp_path):
    out = tmp_path / "out"
    chain.ok("decode --threads 1 --output-dir", out, chain.latents)
    precious = tmp_path / "precious"
    precious.touch()
    with open(out / "images.jsonl", "a") as file:
        file.write('{"file": "../precious"}\n')
    chain.ok("decode --threads 1 --limit 2 --output-dir", out, chain.latents)
    assert sorted(path.name for path in (out / "images").iterdir()) == ["000000.png", "000001.png"]
    assert precious.exists()
