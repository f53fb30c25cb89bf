import json
import pickle
import shutil
from collections import Counter

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, DistributedSampler
from toy_token_cache import FRAMES, GRID, SIZE, TEACHER, make_cache, toy_reader, toy_tokens
from toy_videos import damaged, frame_folder, frame_number, make_video

import fastlatent
from fastlatent.data.masks import MaskConfig
from fastlatent.data.teacher_tokens import CachedSSv2Dataset, LeftOut, TeacherTokens, collate_cached_latents
from fastlatent.data.views import ChangedVideoError, ViewMismatch

NAMES = ["a.mp4", "b.mp4", "bad.mp4", "c.mp4", "d.mp4", "e.mp4", "f.mp4", "g.mp4"]  # in key order; one is no video
GOOD = [name for name in NAMES if name != "bad.mp4"]
MASKS = MaskConfig("random", 0.75)  # 6 of the 8 tokens


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """Seven videos of 8 frames, each of its own colours, and one that is none."""
    folder = tmp_path_factory.mktemp("videos")
    for i, name in enumerate(NAMES):
        make_video(folder / name, frames=8, size=(48, 36), seed=i)
    damaged(folder / "a.mp4", folder / "bad.mp4", "garbage")
    return folder


@pytest.fixture
def videos(made, tmp_path):
    """A copy for those who change it."""
    return shutil.copytree(made, tmp_path / "videos")


@pytest.fixture(scope="session")
def cache(made, tmp_path_factory):
    return make_cache(tmp_path_factory.mktemp("cache") / "train", made)


@pytest.fixture(scope="session")
def seen(made):
    """What the teacher saw: id → Clip."""
    reader = toy_reader()
    return {name: reader.read((made / name).read_bytes(), name) for name in GOOD}


def loader(dataset, **settings):
    return DataLoader(dataset, collate_fn=collate_cached_latents, **{"batch_size": 3, **settings})


def test_samples_are_what_was_cached(cache, seen):
    dataset = TeacherTokens(cache)
    assert (len(dataset), dataset.ids, dataset.teacher, dataset.grid) == (7, GOOD, TEACHER, GRID)
    assert dataset.missing.keys() == {"bad.mp4"}
    assert "quarantine" in dataset.missing["bad.mp4"]
    for i, name in enumerate(GOOD):
        sample = dataset[i]
        assert sample.keys() == {"id", "view", "label", "key_hash", "tokens"}
        assert (sample["id"], sample["view"], sample["label"]) == (name, 0, -1)
        assert torch.equal(sample["tokens"], torch.from_numpy(toy_tokens(seen[name].pixels)).half())
    assert dataset[-1]["id"] == "g.mp4"
    assert [one["id"] for one in dataset.__getitems__([4, 0, 4])] == ["e.mp4", "a.mp4", "e.mp4"]
    with pytest.raises(IndexError, match=r"index \[7\] of 7 samples"):
        dataset[7]


def test_the_student_sees_the_teachers_pixels(made, cache, seen):
    dataset = TeacherTokens(cache, videos=made)
    batch = next(iter(loader(dataset, batch_size=7)))
    assert batch["ids"] == GOOD
    assert (batch["clip"].shape, batch["clip"].dtype) == ((7, FRAMES, SIZE, SIZE, 3), torch.uint8)
    for name, clip, tokens in zip(GOOD, batch["clip"].numpy(), batch["tokens"].numpy(), strict=True):
        assert np.array_equal(clip, seen[name].pixels)
        assert [frame_number(frame) for frame in clip] == [2, 3, 4, 5]  # the middle of 8
        # What is cached is what the teacher gives for this clip now, to float16's rounding of numbers up to 1.
        assert np.abs(toy_tokens(clip) - tokens).max() <= 2**-12


def test_cached_pixels(made, tmp_path, seen):
    cache = make_cache(tmp_path / "c", made, pixels=True)
    dataset = TeacherTokens(cache, clips=True)
    assert np.array_equal(dataset[3]["clip"].numpy(), seen["d.mp4"].pixels)
    dataset[3]["clip"].zero_()  # a copy: the file stays
    assert np.array_equal(dataset[3]["clip"].numpy(), seen["d.mp4"].pixels)
    spoilt = make_cache(tmp_path / "s", made, pixels=True, spoil=lambda key, row: row.update(pixels=row["pixels"] ^ 1))
    with pytest.raises(ValueError, match="pixels of 'a.mp4': expected xxh3_64 .* the shard is damaged"):
        TeacherTokens(spoilt, clips=True)[0]


def test_no_pixels_were_cached(cache):
    with pytest.raises(ValueError, match="no pixels were stored .* give videos=, or encode with --keep-pixels"):
        TeacherTokens(cache, clips=True)


def test_a_changed_file_is_no_view_of_the_cache(videos, cache):
    make_video(videos / "c.mp4", frames=8, size=(48, 36), seed=99)
    (videos / "e.mp4").unlink()
    dataset = TeacherTokens(cache, videos=videos)
    # e.mp4 is known to be gone; of c.mp4 only its bytes tell.
    assert dataset.missing.keys() == {"bad.mp4", "e.mp4"}
    assert dataset.missing["e.mp4"].startswith("there is no such video in")
    assert dataset.ids == [name for name in GOOD if name != "e.mp4"]
    batches = list(loader(dataset, batch_size=4))
    assert [batch["ids"] for batch in batches] == [["a.mp4", "b.mp4", "d.mp4"], ["f.mp4", "g.mp4"]]
    assert [[one.id for one in batch["left_out"]] for batch in batches] == [["c.mp4"], []]
    for batch in batches:
        for name, tokens, clip in zip(batch["ids"], batch["tokens"], batch["clip"], strict=True):
            assert torch.equal(tokens, torch.from_numpy(toy_tokens(clip.numpy())).half()), name
    strict = TeacherTokens(cache, videos=videos, missing="error", ids=["a.mp4", "c.mp4"])
    assert strict[0]["id"] == "a.mp4"
    with pytest.raises(ChangedVideoError, match=r"c.mp4 changed since it was cached: xxh3_128 \w{32} \(cache\) != \w"):
        strict[1]


def test_a_file_that_goes_while_training(videos, cache):
    dataset = TeacherTokens(cache, videos=videos, ids=["a.mp4", "b.mp4"])
    (videos / "a.mp4").unlink()
    (videos / "b.mp4").unlink()
    samples = dataset.__getitems__([1, 0])
    assert [(type(one), one.id, one.view) for one in samples] == [(LeftOut, "b.mp4", 0), (LeftOut, "a.mp4", 0)]
    assert "could not be read" in samples[0].reason
    batch = collate_cached_latents(samples)
    assert batch == {"ids": [], "left_out": samples}


SPOILT = {
    "frame_index": (
        lambda row: row.update(frame_index=row["frame_index"] + np.int32(1)),
        r"frame_index: \[3 4 5 6\] \(cache\) != \[2 3 4 5\] \(now\)",
    ),
    "crop": (
        lambda row: row.update(crop=row["crop"] + np.int32([1, 0, 0, 0])),
        r"crop: \[1 6 36 37\] \(cache\) != \[0 6 36 37\] \(now\); decoder 'pyav.*', all recorded versions as they were",
    ),
    "pixels": (
        lambda row: row.update(view_xxh3=row["view_xxh3"] ^ np.uint64(1)),
        r"pixels \(view_xxh3\): \w{16} \(cache\) != \w{16} \(now\); decoder 'pyav.*'; av: 0\.1 \(cache\) != \d",
    ),
}


@pytest.mark.parametrize("field", SPOILT)
def test_the_field_that_differs_is_named(made, tmp_path, field):
    change, message = SPOILT[field]
    cache = make_cache(
        tmp_path / "c",
        made,
        only="a.mp4".__eq__,
        spoil=lambda key, row: change(row),
        environment={"av": "0.1", "cores": "2"} if field == "pixels" else {},
    )
    with pytest.raises(ViewMismatch, match=rf"a.mp4, view 0: this is not the clip that the teacher saw: {message}"):
        TeacherTokens(cache, videos=made)[0]


def test_a_decoder_that_is_not_here(made, tmp_path, monkeypatch):
    reader = toy_reader()
    foreign = reader.settings() | {"decode": "somebody-else-1"}
    monkeypatch.setattr(type(reader), "settings", lambda self: foreign)
    cache = make_cache(tmp_path / "c", made, only="a.mp4".__eq__)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="somebody-else-1"):  # at opening, not in the middle of an epoch
        TeacherTokens(cache, videos=made)
    assert len(TeacherTokens(cache)) == 1  # tokens need none


def test_masks_read_their_rows_alone(cache):
    whole = TeacherTokens(cache)
    dataset = TeacherTokens(cache, masks=MASKS, seed=5)
    samples = dataset.__getitems__([6, 0, 3])
    for i, sample in zip([6, 0, 3], samples, strict=True):
        assert torch.equal(sample["tokens"], whole[i]["tokens"][sample["masked"]])
        assert sorted([*sample["masked"].tolist(), *sample["visible"].tolist()]) == list(range(8))
        alone = dataset[i]  # not of the batch
        assert torch.equal(alone["masked"], sample["masked"])
    before = [sample["masked"].tolist() for sample in samples]
    dataset.set_epoch(1)
    after = [sample["masked"].tolist() for sample in dataset.__getitems__([6, 0, 3])]
    assert before != after
    dataset.set_epoch(0)
    assert before == [sample["masked"].tolist() for sample in dataset.__getitems__([6, 0, 3])]
    # The rule itself, from the config alone: whoever makes masks elsewhere gets the same.
    hashes = torch.tensor([sample["key_hash"] for sample in samples])
    assert MASKS.masked(5, 0, hashes, GRID).tolist() == before
    other = TeacherTokens(cache, masks=MASKS, seed=6)
    assert before != [sample["masked"].tolist() for sample in other.__getitems__([6, 0, 3])]


@pytest.mark.parametrize("masks", [None, MASKS])
def test_int8(made, tmp_path, cache, masks):
    path = make_cache(tmp_path / "c", made, dtype="int8")
    exact, dataset = TeacherTokens(cache, masks=masks), TeacherTokens(path, masks=masks)
    raw = TeacherTokens(path, masks=masks, dequantize=False)
    for i in range(len(dataset)):
        tokens, stored = dataset[i]["tokens"], raw[i]
        assert (tokens.dtype, stored["tokens"].dtype) == (torch.float32, torch.int8)
        assert torch.equal(tokens, stored["tokens"].float() * stored["scale"][:, None])
        # Half a step of at most 1/127, and float16's rounding.
        assert (tokens - exact[i]["tokens"].float()).abs().max() <= 1 / 254 + 2**-11


def test_views(made, tmp_path):
    cache = make_cache(tmp_path / "c", made, views=3)
    every = TeacherTokens(cache, videos=made)
    assert every.ids == [name for name in GOOD for _ in range(3)]
    assert [every[i]["view"] for i in range(6)] == [0, 1, 2, 0, 1, 2]
    assert [frame_number(every[i]["clip"].numpy()[0]) for i in range(3)] == [0, 2, 4]
    assert every.missing.keys() == {"bad.mp4"}
    one = TeacherTokens(cache, videos=made, view="epoch", seed=1)
    assert one.ids == GOOD
    chosen = []
    for epoch in range(6):
        one.set_epoch(epoch)
        chosen.append([sample["view"] for sample in one.__getitems__(range(7))])
        assert chosen[-1][2] == one[2]["view"]
        assert frame_number(one[2]["clip"].numpy()[0]) == 2 * chosen[-1][2]
    for video in range(7):  # every view once in three epochs
        assert {epoch[video] for epoch in chosen[:3]} == {epoch[video] for epoch in chosen[3:]} == {0, 1, 2}
    assert len({tuple(epoch) for epoch in chosen}) > 3  # no fixed rotation
    assert len(set(chosen[0])) > 1  # nor the same view of all videos
    # Views have masks of their own.
    masked = TeacherTokens(cache, masks=MaskConfig("random", 0.5))
    assert len({tuple(masked[i]["masked"].tolist()) for i in range(21)}) > 7
    picked = TeacherTokens(cache, ids=["c.mp4", "a.mp4"])
    assert [(one["id"], one["view"]) for one in picked.__getitems__(range(6))] == [
        (name, view) for name in ("c.mp4", "a.mp4") for view in range(3)
    ]


def test_a_view_that_is_missing(made, tmp_path):
    def spoil(key, row):
        if key == "c.mp4@1":
            row["tokens"] = row["tokens"] * np.float32("nan")

    cache = make_cache(tmp_path / "c", made, views=3, spoil=spoil)
    dataset = TeacherTokens(cache)
    assert Counter(dataset.ids) == {name: 2 if name == "c.mp4" else 3 for name in GOOD}
    assert dataset.missing.keys() == {"bad.mp4", "c.mp4@1"}
    assert "NaN" in dataset.missing["c.mp4@1"]
    assert [one["view"] for one in TeacherTokens(cache, ids=["c.mp4"]).__getitems__([0, 1])] == [0, 2]
    epochs = TeacherTokens(cache, ids=["c.mp4"], view="epoch")
    views = []
    for epoch in range(2):
        epochs.set_epoch(epoch)
        views.append(epochs[0]["view"])
    assert sorted(views) == [0, 2]
    with pytest.raises(ValueError, match="1 of 2 videos are missing: 'c.mp4@1'"):
        TeacherTokens(cache, ids=["c.mp4"], missing="error")


def test_ids(cache, tmp_path):
    listed = tmp_path / "ids.txt"
    listed.write_text("f.mp4\n\nbad.mp4\na.mp4\nnew.mp4\n")
    dataset = TeacherTokens(cache, ids=listed)
    assert dataset.ids == ["f.mp4", "a.mp4"]
    assert [dataset[i]["id"] for i in range(2)] == ["f.mp4", "a.mp4"]
    assert dataset.missing.keys() == {"bad.mp4", "new.mp4"}
    assert dataset.missing["new.mp4"].startswith("not in the cache (yet): run the same encode again")
    with pytest.raises(ValueError, match="2 of 4 videos are missing: 'bad.mp4': .*'new.mp4': .*leave-out"):
        TeacherTokens(cache, ids=str(listed), missing="error")
    with pytest.raises(ValueError, match=r"each id once, got 1 more than once: \['a.mp4'\]"):
        TeacherTokens(cache, ids=["a.mp4", "b.mp4", "a.mp4"])
    with pytest.raises(ValueError, match="expected a file with one id on each line"):
        TeacherTokens(cache, ids=tmp_path / "none.txt")
    with pytest.raises(ValueError, match="1 of 1 videos are missing"):
        TeacherTokens(cache, ids=["nowhere.mp4"])
    with pytest.raises(ValueError, match="each id once"):
        TeacherTokens(cache, ids=[])


def test_videos_that_are_not_cached_yet(made, tmp_path):
    cache = make_cache(tmp_path / "c", made, only=lambda key: key < "c")
    dataset = TeacherTokens(cache, videos=made)
    assert dataset.ids == ["a.mp4", "b.mp4"]
    assert dataset.missing.keys() == set(NAMES) - {"a.mp4", "b.mp4"}
    with pytest.raises(ValueError, match="6 of 8 videos are missing"):
        TeacherTokens(cache, videos=made, missing="error")


def test_another_teacher(cache):
    assert len(TeacherTokens(cache, teacher=dict(TEACHER))) == 7
    with pytest.raises(ValueError, match=r"another teacher's: layer: 12 \(dataset\) != 6 \(now\); weights: 0{12}"):
        TeacherTokens(cache, teacher=TEACHER | {"layer": 6, "weights": "1" * 64})


def test_what_is_no_cache(cache, tmp_path, make):
    latents = make(tmp_path, 3)
    with pytest.raises(ValueError, match="expected a cache of a teacher's tokens .* got moments"):
        TeacherTokens(latents)
    with pytest.raises(ValueError, match="expected one of error, leave-out, got 'ignore'"):
        TeacherTokens(cache, missing="ignore")
    with pytest.raises(ValueError, match="expected one of all, epoch, got 'random'"):
        TeacherTokens(cache, view="random")


def test_a_cache_that_is_not_finished(made, tmp_path):
    path = make_cache(tmp_path / "c", made, units=1)  # killed after one unit of three
    with pytest.raises(ValueError, match="interrupted .1 of 3 units done.: rerun the same encode command"):
        TeacherTokens(path)

    def watch(number):
        with pytest.raises(ValueError, match=r"still going on \(pid \d+.*[12] of 3 units done\); wait for its end"):
            TeacherTokens(path)

    make_cache(path, made, watch=watch)
    assert TeacherTokens(path).ids == GOOD
    # What is finished is read while more is encoded.
    first = make_cache(tmp_path / "g", made, only=lambda key: key < "d")
    make_cache(first, made, units=1)
    assert TeacherTokens(first).ids == ["a.mp4", "b.mp4", "c.mp4"]


def test_ragged_tokens(made, tmp_path, seen):
    cache = make_cache(tmp_path / "c", made, ragged=True)
    dataset = TeacherTokens(cache)
    assert [len(dataset[i]["tokens"]) for i in range(3)] == [8, 7, 8]  # bad.mp4 ends the first unit of three
    assert torch.equal(dataset[1]["tokens"], torch.from_numpy(toy_tokens(seen["b.mp4"].pixels)[:7]).half())
    with pytest.raises(ValueError, match=r"one shape in a batch, got \[\(7, 6\), \(8, 6\)\]: .*TeacherTokens.buckets"):
        next(iter(loader(dataset)))
    with pytest.raises(ValueError, match=r"masks need clips of 8 tokens, .* got \[-1\]"):
        TeacherTokens(cache, masks=MASKS)


def test_grids(made, cache, tmp_path):
    silent = make_cache(tmp_path / "c", made, only="a.mp4".__eq__, teacher={"weights": "1"})
    with pytest.raises(ValueError, match="does not say how tokens lie in a clip; give grid="):
        TeacherTokens(silent, masks=MASKS)
    with pytest.raises(ValueError, match=r"masks need clips of 12 tokens, as the grid \(2, 3, 2\) has, got \[8\]"):
        TeacherTokens(silent, masks=MASKS, grid=(2, 3, 2))
    assert len(TeacherTokens(silent)) == 1
    assert torch.equal(
        TeacherTokens(silent, masks=MASKS, grid=GRID)[0]["masked"], TeacherTokens(cache, masks=MASKS)[0]["masked"]
    )
    for pool, grid in (("space", (2, 1, 1)), ("all", (1, 1, 1))):
        pooled = make_cache(tmp_path / pool, made, only="a.mp4".__eq__, teacher=TEACHER | {"pool": pool})
        assert TeacherTokens(pooled).grid == grid
    with pytest.raises(ValueError, match="choose a ratio nearer to 0.5"):  # at opening
        TeacherTokens(cache, masks=MaskConfig("random", 0.01))


def test_pickle_opens_it_again(made, cache):
    dataset = TeacherTokens(cache, videos=made, masks=MASKS, seed=3)
    dataset.set_epoch(4)
    dataset[0]  # source, decoder and shards are open
    again = pickle.loads(pickle.dumps(dataset))
    assert again.epoch == 4
    assert again._views._source is None
    one, other = dataset[5], again[5]
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]) if isinstance(value, torch.Tensor) else value == other[name]


def epochs_of(loaders, datasets, epochs):
    """id → (masked, tokens, clip) of each epoch, over the batches of all ranks."""
    found = []
    for epoch in range(epochs):
        samples, count = {}, 0
        for one, dataset in zip(loaders, datasets, strict=True):
            dataset.set_epoch(epoch)
            one.sampler.set_epoch(epoch)
        for batch in (batch for one in loaders for batch in one):
            count += len(batch["ids"])
            rows = zip(batch["masked"], batch["tokens"], batch["clip"], strict=True)
            samples |= dict(zip(batch["ids"], rows, strict=True))
        assert count == len(samples)  # nothing twice
        found.append(samples)
    return found


def distributed(cache, made, workers, **settings):
    ids = GOOD[:6]  # whose number two ranks divide, so that DistributedSampler repeats none
    datasets = [TeacherTokens(cache, videos=made, masks=MASKS, seed=2, ids=ids) for _ in range(2)]
    for dataset in datasets:
        dataset[0]  # all is open in this process before others are made
    loaders = [
        loader(
            dataset, batch_size=2, num_workers=workers, sampler=DistributedSampler(dataset, 2, rank, seed=7), **settings
        )
        for rank, dataset in enumerate(datasets)
    ]
    return loaders, datasets


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_workers_and_ranks_change_nothing(made, cache, seen):
    want = epochs_of(*distributed(cache, made, 0), 2)
    got = epochs_of(*distributed(cache, made, 4, persistent_workers=True, multiprocessing_context="fork"), 2)
    masks = []
    for one, other in zip(want, got, strict=True):
        assert one.keys() == other.keys() == set(GOOD[:6])
        for name in one:
            assert all(map(torch.equal, one[name], other[name])), name
            assert np.array_equal(one[name][2].numpy(), seen[name].pixels)
        masks.append([one[name][0].tolist() for name in one])
    assert masks[0] != masks[1]  # workers that live on have seen the second epoch


@pytest.mark.soak
def test_spawned_workers(made, cache):
    want = epochs_of(*distributed(cache, made, 0), 2)
    got = epochs_of(*distributed(cache, made, 2, persistent_workers=True, multiprocessing_context="spawn"), 2)
    for one, other in zip(want, got, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(a, b) for name in one for a, b in zip(one[name], other[name], strict=True))


def test_the_names_that_users_know(tmp_path):
    root = tmp_path / "ssv2"
    for i, id in enumerate(("78687", "42326")):
        make_video(root / "videos" / f"{id}.webm", frames=6, size=(48, 36), seed=i)
    entries = [{"id": "78687", "template": "Holding [something]"}, {"id": "42326", "template": "Folding [something]"}]
    (root / "validation.json").write_text(json.dumps([*entries, {"id": "1", "template": "Holding [something]"}]))
    (root / "labels.json").write_text(json.dumps({"Holding something": "0", "Folding something": "1"}))
    make_cache(tmp_path / "cache" / "validation", root, kind="ssv2", split="validation")
    dataset = fastlatent.CachedSSv2Dataset(cache_dir=tmp_path / "cache", split="validation", data_root=root)
    assert isinstance(dataset, fastlatent.TeacherTokens)
    assert dataset.missing.keys() == {"1"}  # listed, and never downloaded
    assert dataset.missing["1"].startswith("no video of this name")
    batch = fastlatent.collate_cached_latents(dataset.__getitems__([0, 1]))
    assert (batch["ids"], batch["label"].tolist()) == (["42326", "78687"], [1, 0])
    assert batch["clip"].shape == (2, FRAMES, SIZE, SIZE, 3)
    assert fastlatent.MaskConfig is MaskConfig
    with pytest.raises(
        ValueError, match="expected a cache of the split 'train', .* there are: validation. `fastlatent"
    ):
        CachedSSv2Dataset(tmp_path / "cache", "train")


def test_a_view_that_is_left_out_hides_no_video_of_its_name(tmp_path):
    for name in ("c", "c@0"):
        frame_folder(tmp_path / "v" / name, frames=5, size=(32, 32))

    def spoil(key, columns):
        if key == "c@0":  # view 0 of c
            columns["tokens"][:] = np.nan

    cache = make_cache(tmp_path / "cache", tmp_path / "v", views=2, kind="frames", spoil=spoil)
    dataset = TeacherTokens(cache, videos=tmp_path / "v")
    assert [(one["id"], one["view"]) for one in map(dataset.__getitem__, range(3))] == [
        ("c", 1),
        ("c@0", 0),
        ("c@0", 1),
    ]
    assert len(dataset) == 3 and dataset.missing.keys() == {"c@0"}
