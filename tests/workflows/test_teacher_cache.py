"""A student trains on cached tokens as on those of the teacher itself: Something-Something V2's tree, the real command,
kills, and the real dataset behind a DataLoader."""

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_teachers import write_teacher
from torch.utils.data import DataLoader
from toy_ssv2 import make_ssv2
from toy_videos import damaged, make_video

from fastlatent.data.masks import MaskConfig
from fastlatent.data.teacher_tokens import CachedSSv2Dataset, collate_cached_latents
from fastlatent.data.views import ChangedVideoError
from fastlatent.encoders.teachers import VideoMAETeacher, load_teacher
from fastlatent.store.reader import Dataset

# Number among all clips → what is wrong with it. 1 has 3 frames for a clip of 4, every second one of 7.
FAULTS = {3: "truncated", 6: "garbage", 9: "audio-only", 11: "no-frames", 12: "empty"}
COUNT, GOOD = 20, 15
MASKS = MaskConfig("random", 0.75)  # 6 of the 8 tokens
# Of a stored value against the teacher's own float32. float16 rounds to 11 bits, int8 to 1/254 of the token's largest
# value; the teacher's batches differ in size here and there, which is worth 1e-5.
FLOAT16, INT8, BATCHES = 2**-11, 1 / 254, 1e-5


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return write_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The tree, and the ids of the good clips in the order of keys."""
    root = tmp_path_factory.mktemp("made")
    make_video(root / "sound.webm", frames=20)

    def write(path, number):
        if FAULTS.get(number) == "empty":
            path.write_bytes(b"")
        elif number in FAULTS:
            damaged(root / "sound.webm", path, FAULTS[number])
        else:
            make_video(path, frames=3 if number == 1 else 20, seed=number)

    ids = make_ssv2(root / "ssv2", write, counts={"train": COUNT, "validation": 1, "test": 1})["train"]
    good = sorted(id for number, id in enumerate(ids) if number not in FAULTS)
    # Faults lie between the good ones also in the order in which clips are encoded.
    assert len([id for id in ids if id not in good and good[0] < id < good[-1]]) >= 3 and len(good) == GOOD
    return root / "ssv2", good


@pytest.fixture
def tree(made, tmp_path):
    """A copy for those who change it."""
    return Path(shutil.copytree(made[0], tmp_path / "ssv2"))


@pytest.fixture(scope="module")
def arguments(teacher):
    """arguments(tree, cache, flags …): of the command."""

    def of(tree, cache, *more):
        line = "encode --threads 1 --batch-size 2 --unit-rows 2 --num-workers 2 --split train --teacher videomaev2"
        paths = ("--teacher-weights", teacher, "--data-root", tree, "--cache-dir", cache)
        return [*line.split(), *map(str, paths), *more]

    return of


def settled(chain, cache: Path) -> dict[str, bytes]:
    """All of a dataset but encode.yaml, which names the folder it is in, and the lease of a writer that was killed
    behind the last rename: who finds nothing to do opens no writer, and the next writer sweeps it."""
    contents = chain.contents(cache / "train").items()
    return {name: data for name, data in contents if name != "encode.yaml" and not name.startswith("lease/")}


@pytest.fixture(scope="module")
def undisturbed(chain, arguments, made, tmp_path_factory):
    """A cache that one process made, and every clip that its teacher was given."""
    cache, seen = tmp_path_factory.mktemp("undisturbed"), set()
    prepare = VideoMAETeacher.prepare

    def watched(self, clips):
        seen.update(clip.numpy().tobytes() for clip in clips if clip.any())  # batches are padded with black
        return prepare(self, clips)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(VideoMAETeacher, "prepare", watched)
        done = chain.ok("", *arguments(made[0], cache))
    assert f"{GOOD} rows in" in done.out and f"{len(FAULTS)} files could not be used" in done.out
    return cache, seen


# Children that last long enough to be killed: the teacher takes 30 ms more for each batch.
SLOW = """
import time
from fastlatent.encoders.teachers import VideoMAETeacher
prepare = VideoMAETeacher.prepare
def slow(self, clips):
    time.sleep(0.03)
    return prepare(self, clips)
VideoMAETeacher.prepare = slow
"""


@pytest.fixture(scope="module")
def disturbed(chain, arguments, made, forking_process, tmp_path_factory):
    """A cache that two processes began, until both were killed; a Ctrl-C stopped the next; two more finished it."""
    cache = tmp_path_factory.mktemp("disturbed")
    shards = str(cache / "train" / "shards" / "*" / "*.safetensors")
    argv = arguments(made[0], cache)

    def run(**job):
        text = json.dumps({"argv": argv, "first": SLOW, "log": str(cache / "log"), **job})
        forking_process.stdin.write(text + "\n")
        forking_process.stdin.flush()
        return json.loads(forking_process.stdout.readline())

    def size():
        return sum(path.stat().st_size for path in cache.glob("train/shards/*/*.safetensors"))

    # One at the first shard of 41 KiB, the other at the third.
    assert run(count=2, kill_after=[[shards, 0], [shards, 90_000]]) == [-9, -9]
    kept = {path.name for path in cache.glob("train/shards/*/*.safetensors")}
    assert 3 <= len(kept) <= 7  # of 10 units
    unfinished = chain.ok("inspect", cache / "train").out
    with pytest.raises(ValueError, match=r"an encode was interrupted .* rerun the same encode command to go on"):
        CachedSSv2Dataset(cache)
    assert run(kill_after=[[shards, size()]], signal=2) == [130]
    assert kept <= {path.name for path in cache.glob("train/shards/*/*.safetensors")}  # nothing is done twice
    codes = run(count=2, kill_after=[[shards, size()], None])
    assert codes in ([-9, 0], [0, 0])
    for log in cache.glob("log*"):
        log.unlink()
    return cache, unfinished


def test_a_cache_of_killed_processes_is_the_undisturbed_one(chain, undisturbed, disturbed):
    assert settled(chain, disturbed[0]) == settled(chain, undisturbed[0])
    assert "unfinished encode" in disturbed[1] and "none; rerun the same encode command to go on" in disturbed[1]
    assert "sound" in chain.ok("verify --full --reencode 20", disturbed[0] / "train").out


def test_the_student_sees_what_the_teacher_saw(undisturbed, made):
    cache, seen = undisturbed
    tree, good = made
    samples = CachedSSv2Dataset(cache, data_root=tree).__getitems__(range(GOOD))
    assert [sample["id"] for sample in samples] == good
    assert {sample["clip"].numpy().tobytes() for sample in samples} == seen and len(seen) == GOOD


class Student(torch.nn.Module):
    """Predicts masked tokens from the visible ones of a clip's 2×16×16 patches alone."""

    def __init__(self):
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.embed, self.predict = torch.nn.Linear(1536, 16), torch.nn.Linear(16, 32)
        self.place = torch.nn.Parameter(torch.randn(8, 16, generator=draw))
        for parameter in (*self.embed.parameters(), *self.predict.parameters()):
            parameter.data.normal_(0, 0.05, generator=draw)

    def forward(self, clip, visible, masked):
        patches = clip.float().div(255).unflatten(1, (2, 2)).unflatten(3, (2, 16)).unflatten(5, (2, 16))
        patches = patches.permute(0, 1, 3, 5, 2, 4, 6, 7).flatten(4).flatten(1, 3)  # [B, 8 tokens, 1536]
        shown = patches.gather(1, visible[..., None].expand(-1, -1, 1536))
        context = (self.embed(shown) + self.place[visible]).mean(1, keepdim=True)
        return self.predict(torch.tanh(context + self.place[masked]))


def trained(student, optimizer, batch, targets) -> float:
    loss = (student(batch["clip"], batch["visible"], batch["masked"]) - targets).abs().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


@pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker")  # than this machine may have cores
@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_cached_and_live_targets_train_alike(chain, arguments, undisturbed, disturbed, made, teacher, tmp_path, dtype):
    torch.set_num_threads(1)
    tree, good = made
    cache = disturbed[0]
    if dtype == "int8":
        cache = tmp_path
        chain.ok("", *arguments(tree, cache, "--dtype", "int8"))
    live = load_teacher("videomaev2", str(teacher))
    dataset = CachedSSv2Dataset(cache, "train", tree, masks=MASKS, seed=3, teacher=live.identity())
    assert len(dataset) == GOOD and len(dataset.missing) == len(FAULTS)
    loader = DataLoader(
        dataset, 4, shuffle=True, num_workers=4, persistent_workers=True, collate_fn=collate_cached_latents,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    alone = CachedSSv2Dataset(cache, "train", masks=MASKS, seed=3)  # no workers, no videos, other batches
    students = Student(), Student()
    optimizers = [torch.optim.SGD(student.parameters(), 0.05) for student in students]
    losses, masked = [], {}
    for epoch in (0, 1):
        dataset.set_epoch(epoch)
        alone.set_epoch(epoch)
        seen = []
        for batch in loader:
            assert batch["left_out"] == [] and batch["masked"].shape[1:] == (6,)
            everything = live.encode(live.prepare(batch["clip"]))
            targets = everything.gather(1, batch["masked"][..., None].expand(-1, -1, everything.shape[2]))
            cached = batch["tokens"].float()
            if dtype == "float16":
                limit = FLOAT16 * targets.abs() + BATCHES
            else:
                limit = INT8 * targets.abs().amax(2, keepdim=True) + 2 * BATCHES
            assert ((cached - targets).abs() <= limit).all()
            # The next clip's tokens would not pass for this one's.
            assert not ((cached.roll(1, 0) - targets).abs() <= limit).all() or len(cached) == 1
            losses.append([
                trained(student, optimizer, batch, values)
                for student, optimizer, values in zip(students, optimizers, (cached, targets), strict=True)
            ])  # fmt: skip
            for id, row, tokens in zip(batch["ids"], batch["masked"], batch["tokens"], strict=True):
                again = alone[alone.ids.index(id)]
                assert torch.equal(again["masked"], row) and torch.equal(again["tokens"], tokens)
                assert masked.get((id, 0)) != row.tolist()  # another mask each epoch
                masked[id, epoch] = row.tolist()
            seen += batch["ids"]
        assert sorted(seen) == good
    # In the loss, a mean of 6 · 32 values a clip, roundings cancel: measured 1.6e-5 of it, and 2.3e-4 for int8.
    ours, theirs = np.array(losses).T
    assert np.abs(ours - theirs).max() < (8e-5 if dtype == "float16" else 1e-3) * theirs.max()
    assert ours[-4:].mean() < ours[:4].mean()  # it learns
    for one, other in zip(*(student.parameters() for student in students), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=5e-4 if dtype == "float16" else 2e-3)


# --- what changed since ---


def test_ids_do_not_shift_where_clips_are_lost(undisturbed, made, tree, teacher):
    cache, good = undisturbed[0], made[1]
    videos = tree / "20bn-something-something-v2"
    dataset = CachedSSv2Dataset(cache, data_root=tree)
    make_video(videos / f"{good[4]}.webm", frames=20, seed=99)
    (videos / f"{good[9]}.webm").unlink()
    live = load_teacher("videomaev2", str(teacher))
    left_out, ids = [], []
    for batch in DataLoader(dataset, 4, num_workers=2, collate_fn=collate_cached_latents):
        ids += batch["ids"]
        left_out += batch["left_out"]
        wanted = live.encode(live.prepare(batch["clip"]))
        assert ((batch["tokens"].float() - wanted).abs() <= FLOAT16 * wanted.abs() + BATCHES).all()
    assert ids == [id for id in good if id not in (good[4], good[9])]
    assert [(one.id, one.reason.split(".webm ")[1][:24]) for one in left_out] == [
        (good[4], "changed since it was cac"), (good[9], "could not be read: No su"),
    ]  # fmt: skip
    with pytest.raises(
        ChangedVideoError, match=rf"{good[4]}.webm changed since it was cached: xxh3_128 .* run the same"
    ):
        CachedSSv2Dataset(cache, data_root=tree, ids=[good[4]], missing="error")[0]


def test_the_same_command_catches_up(chain, arguments, undisturbed, made, tree, tmp_path):
    cache, good = Path(shutil.copytree(undisturbed[0], tmp_path / "cache")), made[1]
    before = {path.name for path in cache.glob("train/shards/*/*.safetensors")}
    make_video(tree / "20bn-something-something-v2" / f"{good[4]}.webm", frames=20, seed=99)
    done = chain.ok("", *arguments(tree, cache))
    assert "1 files encoded now" in done.out
    assert len({path.name for path in cache.glob("train/shards/*/*.safetensors")} - before) == 1
    samples = CachedSSv2Dataset(cache, data_root=tree, missing="leave-out").__getitems__(range(GOOD))
    assert [sample["id"] for sample in samples] == good
    moved = CachedSSv2Dataset(cache, data_root=made[0], ids=[good[4], good[5]])  # where the file is the earlier one
    assert [type(one).__name__ for one in moved.__getitems__([0, 1])] == ["LeftOut", "dict"]


# --- lists and caches that are wrong ---

LISTS = {
    "an id twice": (lambda old: [*old, old[0]], "entry 21: its id '{first}' is that of entry 1 too|its id '{first}'"),
    "no list": (lambda old: {"a": 1}, "expected a list of"),
    "cut off": (lambda old: None, "is not JSON"),
    "no ids": (lambda old: [*old, {"label": "x"}], "id"),
}


@pytest.mark.parametrize("what", LISTS)
def test_lists_that_cannot_be_used(chain, arguments, undisturbed, tree, what):
    change, message = LISTS[what]
    file = tree / "labels" / "train.json"
    old = json.loads(file.read_text())
    new = change(old)
    file.write_text("[1," if new is None else json.dumps(new))
    before = chain.contents(undisturbed[0])
    refused = chain.command("", *arguments(tree, undisturbed[0])).message
    assert str(file) in refused
    assert any(one in refused for one in message.format(first=old[0]["id"]).split("|"))
    assert chain.contents(undisturbed[0]) == before


def test_an_id_without_a_video_is_named_everywhere(chain, arguments, made, tree, tmp_path):
    file = tree / "labels" / "train.json"
    file.write_text(json.dumps([*json.loads(file.read_text()), {"id": "999"}]))
    done = chain.ok("", *arguments(tree, tmp_path))
    assert "1 files could not be read" in done.out and "'999': no video of this name" in done.out
    dataset = CachedSSv2Dataset(tmp_path, data_root=tree)
    assert dataset.ids == made[1] and "no video of this name" in dataset.missing["999"]
    assert dataset.missing.keys() == {"999", *(one.key for one in Dataset.open(tmp_path / "train").quarantined)}
    with pytest.raises(ValueError, match="6 of 21 videos are missing"):
        CachedSSv2Dataset(tmp_path, data_root=tree, missing="error")


def test_what_else_is_refused(chain, arguments, undisturbed, made, teacher):
    cache, (tree, good) = undisturbed[0], made
    with pytest.raises(ValueError, match=r"cache of the split 'validation'.* there are: train\. `fastlatent encode"):
        CachedSSv2Dataset(cache, "validation", tree)
    with pytest.raises(ValueError, match="expected each id once"):
        CachedSSv2Dataset(cache, ids=[good[0], good[1], good[0]])
    assert "not in the cache" in CachedSSv2Dataset(cache, ids=["1", good[0]]).missing["1"]
    other = load_teacher("videomaev2", str(teacher), layer=1).identity()
    with pytest.raises(ValueError, match=r"another teacher's: layer: 2 \(dataset\) != 1 \(now\); weights: "):
        CachedSSv2Dataset(cache, teacher=other)
    refused = chain.command("", *arguments(tree, cache, "--layer", "1")).message
    assert "\n  teacher.layer: 2 (dataset) != 1 (now)\n" in refused
    refused = chain.command("", *arguments(tree, cache, "--split", "trainn")).message
    assert "--split: expected train, validation, test of Something-Something V2, got 'trainn'" in refused


# --- kills ---


@pytest.mark.soak
def test_killed_fifty_times(chain, forked, arguments, made, undisturbed, tmp_path):
    cache, draw, killed = tmp_path / "cache", random.Random(50), 0
    job = {"argv": arguments(made[0], cache), "first": SLOW}
    wanted = settled(chain, undisturbed[0])
    while killed < 50:
        count = 1 + killed % 2
        (codes,) = forked({**job, "count": count, "kill_after": [draw.uniform(0.05, 0.4) for _ in range(count)]})
        assert set(codes) <= {0, -9}
        killed += codes.count(-9)
        if (cache / "train" / "dataset.json").exists():
            # Killed behind the last rename, or not at all: the next run finds nothing to do, and another cache begins.
            assert forked(job) == [[0]]
            assert settled(chain, cache) == wanted
            shutil.rmtree(cache)
    assert forked(job) == [[0]] and settled(chain, cache) == wanted
