import gzip
import io
import json
import os
import re
import shutil
import types
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from toy_experiment import make_experiment, write_latent

from fastlatent import config
from fastlatent.caches import steps
from fastlatent.caches.cache import DamagedEntry, Told
from fastlatent.caches.formats import detect
from fastlatent.config import ConvertConfig
from fastlatent.data.latents import LatentDataset
from fastlatent.sources.experiment import SUFFIXES, open_experiment
from fastlatent.sources.files import open_files
from fastlatent.workflows.convert import convert

SHAPE = (1, 4, 2, 3, 5)


def run(source: Path, out: Path, **settings) -> types.SimpleNamespace:
    settings = {"scaling_factor": "unknown", "threads": 1, **settings}
    return convert(config.build(ConvertConfig, {}, {"source": str(source), "out": str(out), **settings}))


def opened(root: Path):
    files = open_files(root)
    return steps.open_cache(files, files.listing(), Told())


def tree(root: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file() and not path.name.startswith(".")
    }


def array_of(data: bytes, name: str):
    """What the project's own loader makes of a file: by the ending, unzipped first."""
    data = gzip.decompress(data) if name.endswith(".gz") else data

    if ".npy" in name:
        return torch.from_numpy(np.load(io.BytesIO(data)))
    if ".pt" in name:
        return torch.load(io.BytesIO(data), weights_only=True)
    return safetensors.torch.load(data)["latent"]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_there_and_back(tmp_path, suffix):
    source = make_experiment(tmp_path / "e", shape=SHAPE, suffix=suffix, steps=(0, 3))
    files = open_files(source)
    assert detect(files, files.listing()) == "steps"
    report = run(source, tmp_path / "d")
    assert (report.format, report.rows) == ("steps", 8)
    dataset = LatentDataset(tmp_path / "d")
    assert [dataset.store.key(i) for i in range(3)] == [
        "prompt_000/vid_000/step_000", "prompt_000/vid_000/step_003", "prompt_000/vid_001/step_000",
    ]  # fmt: skip
    groups = dataset.store.groups
    assert groups.key(int(groups.group[2])) == "prompt_000/vid_001" and groups.order[:4].tolist() == [0, 3, 0, 3]
    hashed = dataset.store.provenance["hashed"]
    assert hashed["converted"]["facts"] == {"normalized": True} and hashed["storage_dtype"] == "float16"
    run(tmp_path / "d", tmp_path / "back", to="steps")
    before, after = tree(source), tree(tmp_path / "back")
    # The videos' summaries repeat what the folders say, and are left out.
    assert set(after) == {name for name in before if not name.endswith("summary.json")}
    for name, data in after.items():
        if not name.endswith(suffix):
            assert data == before[name], name
        else:
            assert torch.equal(array_of(data, name), array_of(before[name], name)), name
    # What the project itself would open.
    experiment = open_experiment(tmp_path / "back")
    assert experiment.model_id() == "Wan-AI/Wan2.1-T2V-1.3B-Diffusers" and len(experiment.steps) == 8


def test_a_training_loop_reads_what_was_exported(tmp_path):
    source = make_experiment(tmp_path / "e", shape=SHAPE, steps=(0, 1))
    run(source, tmp_path / "d")
    run(tmp_path / "d", tmp_path / "back", to="steps")
    pairs = []
    for video in sorted((tmp_path / "back/latents").glob("prompt_*/vid_*")):
        names = (f"step_00{i}.npy.gz" for i in (0, 1))
        first, last = (array_of((video / name).read_bytes(), name).float().flatten() for name in names)
        pairs.append((first, last))
    assert len(pairs) == 4
    model = torch.nn.Linear(len(pairs[0][0]), len(pairs[0][0]))
    optimizer, losses = torch.optim.SGD(model.parameters(), 0.2), []
    for _ in range(20):
        loss = sum((model(first) - last).square().mean() for first, last in pairs)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_other_trees(tmp_path):
    # One folder for each video, below a folder that holds the experiment; several shapes; no settings or metadata.
    video = tmp_path / "a/run/latents/p000_b000_s000"
    video.mkdir(parents=True)
    values = np.arange(8, dtype="<f4").reshape(2, 2, 2)
    np.save(video / "step_10.npy", values)
    np.save(video / "step_2.npy", values.astype(">f4"))
    other = video.with_name("wide")
    other.mkdir()
    np.save(other / "step_0.npy", np.asfortranarray(np.tile(values, 2)))
    cache = opened(tmp_path / "a")
    assert [item.key for item in cache.items] == [
        "p000_b000_s000/step_2", "p000_b000_s000/step_10", "wide/step_0",
    ]  # fmt: skip
    assert cache.buckets == ((1, 2, 2, 2), (1, 2, 2, 4)) and cache.dtype == "F32" and not cache.fields
    for item in cache.items:
        assert np.array_equal(cache.row(item, cache.content(item)).values[0, :, :, :2], values)
    run(tmp_path / "a", tmp_path / "d")
    run(tmp_path / "d", tmp_path / "back", to="steps")
    assert set(tree(tmp_path / "back")) == set(tree(tmp_path / "a/run"))
    assert np.array_equal(np.load(tmp_path / "back/latents/wide/step_0.npy"), np.tile(values, 2))
    shutil.copytree(tmp_path / "a/run", tmp_path / "a/again")
    with pytest.raises(ValueError, match="expected the steps of one experiment, got again/ .3 steps., run/ .3 steps"):
        opened(tmp_path / "a")
    with pytest.raises(ValueError, match="convert the folder above it"):
        opened(video)


def test_bfloat16_is_written_as_pt(tmp_path):
    video = tmp_path / "e/v"
    video.mkdir(parents=True)
    values = torch.randn(SHAPE).bfloat16()
    torch.save(values, video / "step_0.pt")
    (video / "step_1.safetensors").write_bytes(safetensors.torch.save({"latent": values + 1, "sigma": torch.ones(1)}))
    cache = opened(tmp_path / "e")
    assert cache.dtype == "BF16" and "suffix" not in cache.notes
    assert cache.remarks == ("1 files hold more than the latent, which is not converted",)
    run(tmp_path / "e", tmp_path / "d")
    run(tmp_path / "d", tmp_path / "back", to="steps")
    assert torch.equal(torch.load(tmp_path / "back/latents/v/step_1.pt"), values + 1)


def objects(path: Path) -> None:
    with gzip.open(path, "wb") as file:
        np.save(file, np.array([{}]), allow_pickle=True)


BAD = {
    "cut.npy.gz": (lambda p: p.write_bytes(p.read_bytes()[:-20]), "gzip stream is truncated"),
    "torn.npy.gz": (lambda p: p.write_bytes(p.read_bytes()[:12]), "truncated|damaged|expected a .npy"),
    "empty.npy.gz": (lambda p: p.write_bytes(b""), "expected a .npy file"),
    "shape.npy.gz": (lambda p: write_latent(p, np.zeros((1, 4, 2, 3, 4), "f2")), r"as in the video's first step, got"),
    "dtype.npy.gz": (lambda p: write_latent(p, np.zeros(SHAPE, "f4")), "expected F16 as in the first file, got F32"),
    "rank.npy.gz": (lambda p: write_latent(p, np.zeros(SHAPE[1:], "f2")), "as in the video's first step"),
    "ints.npy.gz": (lambda p: write_latent(p, np.zeros(SHAPE, "u2")), "got uint16; if these are bfloat16's bits"),
    "batch.npy.gz": (lambda p: write_latent(p, np.zeros((2, 4, 2, 3, 5), "f2")), "of one video, got"),
    "packed.npy.gz": (lambda p: write_latent(p, np.zeros((1, 6, 4), "f2")), "packed latents must be unpacked first"),
    "pickle.npy.gz": (objects, "pickled objects, which are never read"),
    "twice.npy": (lambda p: write_latent(p.with_name("step_001.npy"), np.zeros(SHAPE, "f2")), "one file of step 1"),
    "number.npy.gz": (lambda p: p.rename(p.with_name("step_last.npy.gz")), "expected step_ and a number"),
    "metadata": (lambda p: p.with_name("step_001_metadata.json").write_bytes(b"\xff"), "json: expected UTF-8"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_one_bad_step_is_named_and_left_out(tmp_path, case):
    source = make_experiment(tmp_path / "e", shape=SHAPE, prompts=("p",), steps=(0, 1, 2))
    damage, message = BAD[case]
    damage(source / "latents/p/vid_001/step_001.npy.gz")
    with pytest.raises(ValueError, match="rows cannot be used, and --max-errors is 0") as raised:
        run(source, tmp_path / "d")
    assert "step_" in str(raised.value)
    report = run(source, tmp_path / "d", max_errors=2)
    assert report.rows == 5 and any(re.search(message, why) for why in report.left_out.values())
    assert len(LatentDataset(tmp_path / "d").store) == 5


def test_nothing_that_can_be_read(tmp_path):
    (tmp_path / "v").mkdir()
    (tmp_path / "v/step_0.npy").write_bytes(b"x")
    (tmp_path / "v/step_1.tmp.npy").write_bytes(b"x")
    with pytest.raises(ValueError, match="none that can be read; .*step_0.npy: expected a .npy file"):
        opened(tmp_path)
    assert steps.claims(open_files(tmp_path), open_files(tmp_path).listing()) == 1


def test_a_step_that_changes_its_shape_after_the_look_is_damaged(tmp_path):
    source = make_experiment(tmp_path / "e", shape=SHAPE, prompts=("p",), videos=("v",), steps=(0,))
    cache = opened(source)
    write_latent(source / "latents/p/v/step_000.npy.gz", np.zeros((1, 4, 2, 3, 4), "f2"))
    with pytest.raises(DamagedEntry, match=r"expected float16 \[1, 4, 2, 3, 5\]"):
        cache.row(cache.items[0], cache.content(cache.items[0]))


def test_an_edited_metadata_file_is_a_changed_row(tmp_path):
    source = make_experiment(tmp_path / "e", shape=SHAPE, prompts=("p",), videos=("v",), steps=(0, 1))
    before = opened(source)
    path = source / "latents/p/v/step_001_metadata.json"
    path.write_text(json.dumps({"sigma": 0.5}))
    os.utime(path, ns=(1, 1))
    after = opened(source)
    assert before.items[0].stamp == after.items[0].stamp and before.items[1].stamp != after.items[1].stamp
    assert before.content(before.items[0]) != after.content(after.items[1])


def test_what_steps_cannot_hold(tmp_path):
    outgoing = types.SimpleNamespace(shapes=((2, 4, 3, 3),), notes={}, dtype="F16", count=1)
    with pytest.raises(ValueError, match="steps have no mirror image"):
        next(steps.write(outgoing, tmp_path))
    row = types.SimpleNamespace(group="", key="a/b", extras={}, order=0)
    outgoing = types.SimpleNamespace(shapes=((1, 4, 3, 3),), notes={}, dtype="F16", count=1, row=lambda i: row)
    with pytest.raises(ValueError, match="expected rows of videos' steps, got 'a/b' of none"):
        next(steps.write(outgoing, tmp_path))
    row.group = "../up"
    with pytest.raises(ValueError, match=r"\.\."):
        next(steps.write(outgoing, tmp_path))
    assert not list(tmp_path.iterdir())
