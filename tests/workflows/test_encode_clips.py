"""Videos → rows through the real command: autoencoders and teachers, every setting, damaged files, later runs."""

import os
import re
import shutil
import time
from collections import Counter, namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan
from tiny_teachers import write_teacher
from tiny_video_models import make_vae
from toy_videos import damaged, frame_folder, frame_number, make_video

from fastlatent.data.masks import MaskConfig
from fastlatent.data.teacher_tokens import TeacherTokens
from fastlatent.data.views import column_row
from fastlatent.encoders.teachers import VideoMAETeacher, load_teacher
from fastlatent.media.clips import open_clip_reader
from fastlatent.sources.items import Source
from fastlatent.store.reader import Dataset
from fastlatent.workflows import encode_clips, encode_plan, encode_work

# Key → frames, (width, height) and seed. Names of other letters; two classes; shorter than a clip.
VIDEOS = {
    "ant/ä b.mp4": (20, (48, 32), 0), "ant/手.webm": (20, (64, 32), 1), "bee/2.mp4": (7, (32, 48), 2),
    "bee/3.mkv": (3, (48, 32), 3),
}  # fmt: skip
ENCODE = "encode --threads 1 --batch-size 2"
PREFLIGHT = re.compile(r"^([\d,]+) clips to encode in ([\d,]+) shards of ([\d,]+) bytes .* GiB free, about ", re.M)
DIM, TOKENS = 32, 8  # of the tiny teacher: 4 frames of 32×32 in patches of 2×16×16


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    for name, (frames, size, seed) in VIDEOS.items():
        make_video(folder / name, frames=frames, size=size, seed=seed)
    return folder


@pytest.fixture
def videos(made, tmp_path):
    """A copy for those who change it."""
    return Path(shutil.copytree(made, tmp_path / "videos"))


@pytest.fixture(scope="module")
def wan(tmp_path_factory):
    return make_vae("AutoencoderKLWan", tmp_path_factory.mktemp("wan"))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return write_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def with_teacher(chain, teacher):
    """with_teacher(videos, out, flags): the command."""

    def run(source, out, more="", **changes):
        weights = changes.get("weights", teacher)
        return chain.command(
            f"{ENCODE} {more} --teacher videomaev2 --teacher-weights", weights, "--out", out, source
        )  # fmt: skip

    return run


@pytest.fixture(scope="module")
def with_vae(chain, wan):
    def run(source, out, more="--frames 5"):
        return chain.command(f"{ENCODE} --size 32 {more} --vae", wan, "--out", out, source)

    return run


@pytest.fixture(scope="module")
def cache(with_teacher, made, tmp_path_factory):
    """All videos' tokens, two rows a shard."""
    out = tmp_path_factory.mktemp("cache") / "c"
    done = with_teacher(made, out, "--unit-rows 2")
    assert done.code == 0, done.err
    return out


@pytest.fixture(scope="module")
def clips(with_vae, made, tmp_path_factory):
    """All videos' moments, of one shape."""
    out = tmp_path_factory.mktemp("clips") / "c"
    done = with_vae(made, out)
    assert done.code == 0, done.err
    return out


@pytest.fixture(scope="module")
def views(with_teacher, made, tmp_path_factory):
    """Two views of each video with their pixels. Units of 3 rows: a group may lie in two shards."""
    out = tmp_path_factory.mktemp("views") / "c"
    done = with_teacher(made, out, "--views 2 --placement random --keep-pixels --unit-rows 3")
    assert done.code == 0, done.err
    return out


def taken(done):
    assert done.code == 0, done.err
    return done.out


def encoded_now(done) -> int:
    return int(re.search(r"; ([\d,]+) files encoded now", taken(done))[1])


def values(dataset: Dataset, i: int) -> np.ndarray:
    """A sample's payload as float32."""
    stored, row = column_row(dataset, dataset.payload, i), dataset.buckets[dataset.bucket[i]].dtype
    if row == "BF16":
        return (stored.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    if row == "I8":
        scale = column_row(dataset, f"{dataset.payload}.scale", i)
        return stored * scale.reshape(*scale.shape, *[1] * (stored.ndim - scale.ndim))
    return stored.astype(np.float32)


def rows_of(out: Path, *columns: str) -> dict[str, list[bytes]]:
    """Key → the bytes of its payload and of further tensors."""
    dataset = Dataset.open(out)
    names = (dataset.payload, "frame_index", "view_xxh3", *columns)
    return {dataset.key(i): [column_row(dataset, name, i).tobytes() for name in names] for i in range(len(dataset))}


def clips_of(dataset: Dataset, folder: Path) -> list[np.ndarray]:
    """What a reader of the recorded rules makes of the videos."""
    reader = open_clip_reader(dataset.provenance["hashed"]["view"])
    clips = []
    for i in range(len(dataset)):
        clip = reader.read((folder / dataset.key(i)).read_bytes(), dataset.key(i))
        assert int(column_row(dataset, "view_xxh3", i)[0]) == clip.digest
        assert column_row(dataset, "frame_index", i).tolist() == clip.frame_index.tolist()
        assert dataset.crop[i].tolist() == clip.crop.tolist() and tuple(dataset.orig_hw[i]) == clip.orig_hw
        clips.append(clip.pixels)
    return clips


def whole(dataset: Dataset, i: int) -> bool:
    """Whether a clip shows all lines of its video, so that frames say which they are."""
    return int(dataset.crop[i][2]) == int(dataset.orig_hw[i][0])


# --- autoencoders of videos ---


def test_clips_of_several_lengths_and_sizes(with_vae, made, wan, tmp_path, chain):
    out = tmp_path / "d"
    taken(with_vae(made, out, "--frames 5,9 --transform buckets --dtype float32"))
    dataset = Dataset.open(out)
    assert [dataset.key(i) for i in range(len(dataset))] == sorted(VIDEOS, key=os.fsencode)
    # 20 frames fill 9; 7 and 3 only 5, and 3 repeat their last.
    index = {dataset.key(i): column_row(dataset, "frame_index", i).tolist() for i in range(len(dataset))}
    assert index == {
        "ant/ä b.mp4": list(range(5, 14)), "ant/手.webm": list(range(5, 14)), "bee/2.mp4": [1, 2, 3, 4, 5],
        "bee/3.mkv": [0, 1, 2, 2, 2],
    }  # fmt: skip
    torch.set_num_threads(1)
    vae = AutoencoderKLWan.from_pretrained(wan).eval()
    shapes = set()
    for i, clip in enumerate(clips_of(dataset, made)):
        if whole(dataset, i):
            assert [frame_number(frame) for frame in clip] == index[dataset.key(i)]
        pixels = torch.from_numpy(clip).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
        with torch.no_grad():
            wanted = vae.encode(pixels).latent_dist
            found = torch.from_numpy(values(dataset, i))
            decoded = vae.decode(found[:, :4]).sample
        # Chunks of our own streaming: the order of sums in oneDNN differs.
        torch.testing.assert_close(found, torch.cat([wanted.mean, wanted.logvar], 1), rtol=0, atol=1e-4)
        assert decoded.shape == pixels.shape
        shapes.add(clip.shape)
    assert len(shapes) >= 3  # of length, width and height
    assert "4 encoded again and compared bit for bit: sound" in chain.ok("verify --full --reencode 4", out).out
    assert encoded_now(with_vae(made, out, "--frames 5,9 --transform buckets --dtype float32")) == 0


def test_pixels_of_several_lengths_count_as_memory(with_vae, made, tmp_path, monkeypatch):
    """A shard's rows are assembled in memory, pixels among them: 27,648 bytes of the longer clips."""
    monkeypatch.setattr(encode_plan, "MAX_UNIT_BYTES", 30_000)
    printed = taken(with_vae(made, tmp_path / "d", "--frames 5,9 --keep-pixels"))
    check_preflight(printed, tmp_path / "d")
    assert [shard.rows for shard in Dataset.open(tmp_path / "d").shards] == [1] * 4


@pytest.mark.parametrize("more", ["--mirror --dtype bfloat16", "--payload latents --dtype int8", "--captions txt"])
def test_rows_of_an_autoencoder(with_vae, videos, tmp_path, chain, more):
    for name in VIDEOS:
        (videos / name).with_suffix(".txt").write_text(f"a caption of {name}, ü")
    out = tmp_path / "d"
    printed = taken(with_vae(videos, out, f"--frames 5 --keep-pixels {more}"))
    dataset = Dataset.open(out)
    channels = 4 if "latents" in more else 8
    assert dataset.buckets[0].shape == (2 if "mirror" in more else 1, channels, 2, 4, 4)
    check_preflight(printed, out)
    if "mirror" in more:
        # The second is what the flipped clip gives.
        pixels = column_row(dataset, "pixels", 0)[:, :, ::-1].copy()
        vae = AutoencoderKLWan.from_pretrained(Path(dataset.provenance["informational"]["vae_path"])).eval()
        with torch.no_grad():
            wanted = vae.encode(torch.from_numpy(pixels).permute(3, 0, 1, 2)[None].float() / 127.5 - 1).latent_dist
        found = torch.from_numpy(values(dataset, 0))[1:]
        torch.testing.assert_close(found[:, :4], wanted.mean, rtol=2**-8, atol=1e-4)
    if "captions" in more:
        texts = [column_row(dataset, "caption", i).tobytes().decode() for i in range(len(dataset))]
        assert texts == [f"a caption of {dataset.key(i)}, ü" for i in range(len(dataset))]
    assert "4 encoded again and compared bit for bit: sound" in chain.ok("verify --full --reencode 4", out).out


# --- teachers ---


@pytest.mark.parametrize(
    ("more", "shape", "limit"),
    [  # the largest difference to float32, in parts of the largest value
        ("--dtype float32 --layer 1", (TOKENS, DIM), 1e-5),
        ("--dtype bfloat16 --token-norm layer --keep-pixels", (TOKENS, DIM), 2**-8),
        ("--dtype int8", (TOKENS, DIM), 1 / 254 + 1e-5),
        ("--pool space", (2, DIM), 2**-11),
        ("--pool all --short loop", (1, DIM), 2**-11),
        ("--project-to 8 --dtype int8 --placement uniform", (TOKENS, 8), 1 / 254 + 1e-5),
    ],
)
def test_rows_of_a_teacher(with_teacher, made, teacher, tmp_path, chain, more, shape, limit):
    out = tmp_path / "d"
    printed = taken(with_teacher(made, out, more))
    check_preflight(printed, out)
    dataset = Dataset.open(out)
    assert dataset.payload == "tokens" and dataset.buckets[0].shape == (1, *shape)
    word = more.split()
    asked = {"layer": 1} if "--layer" in word else {"pool": word[1]} if word[0] == "--pool" else {}
    asked |= {"token_norm": "layer"} if "--token-norm" in word else {"project_to": 8} if "8" in word else {}
    live = load_teacher("videomaev2", str(teacher), **asked)
    clips = clips_of(dataset, made)
    wanted = live.encode(live.prepare(torch.from_numpy(np.stack(clips)))).numpy()
    for i, clip in enumerate(clips):
        found = values(dataset, i)[0]
        assert np.abs(found - wanted[i]).max() <= limit * np.abs(wanted[i]).max()
        if "--keep-pixels" in word:
            assert np.array_equal(column_row(dataset, "pixels", i), clip)
    assert "4 encoded again and compared bit for bit: sound" in chain.ok("verify --full --reencode 4", out).out


def check_preflight(printed, out):
    count, shards, size = (int(text.replace(",", "")) for text in PREFLIGHT.search(printed).groups())
    files = list(out.glob("shards/*/*"))
    assert (count, shards, size) == (4, len(files), sum(file.stat().st_size for file in files))


def test_views(views, made, chain, teacher):
    dataset = Dataset.open(views)
    videos = sorted(VIDEOS, key=os.fsencode)
    assert [dataset.key(i) for i in range(len(dataset))] == [f"{name}@{view}" for name in videos for view in (0, 1)]
    assert dataset.groups.group.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert dataset.groups.order.tolist() == [0, 1] * 4
    assert [dataset.groups.key(i) for i in range(4)] == videos
    assert [dataset.classes[label] for label in dataset.label] == ["ant"] * 4 + ["bee"] * 4
    index = [tuple(column_row(dataset, "frame_index", i).tolist()) for i in range(8)]
    assert index[0] != index[1] or index[2] != index[3]  # 14 places for a clip in 20 frames
    for i in range(8):
        pixels = column_row(dataset, "pixels", i)
        if whole(dataset, i):
            assert tuple(frame_number(frame) for frame in pixels) == index[i]
    samples = TeacherTokens(views, videos=made)
    assert len(samples) == 8 and samples.ids == [name for name in videos for _ in (0, 1)]
    for i, sample in enumerate(samples.__getitems__(range(8))):
        assert np.array_equal(sample["clip"], column_row(dataset, "pixels", i)) and sample["view"] == i % 2
    done = chain.ok("verify --full --reencode 8 --vae", teacher, views)  # where the weights are now
    assert "8 encoded again and compared bit for bit: sound" in done.out


def test_a_video_is_fetched_once_for_all_its_views(with_teacher, made, tmp_path, monkeypatch):
    fetch, times = Source.fetch, Counter()
    monkeypatch.setattr(Source, "fetch", lambda self, item: times.update([item.key]) or fetch(self, item))
    taken(with_teacher(made, tmp_path / "d", "--views 3 --unit-rows 6 --readers 1"))
    # To plan and to encode; four rows of the first two are read once more, to say how long it will take.
    assert sorted(times.values()) == [2, 2, 3, 3]


def test_one_thread_or_four_and_any_unit_give_the_same_rows(with_teacher, made, views, cache, tmp_path, monkeypatch):
    taken(with_teacher(made, tmp_path / "a", "--readers 1 --unit-rows 3"))
    assert rows_of(tmp_path / "a") == rows_of(cache)
    # As of clips so large that each view is read by itself, and few of them ahead.
    monkeypatch.setattr(encode_clips, "CALL_BYTES", 1)
    monkeypatch.setattr(encode_work, "AHEAD_BYTES", 1)
    flags = "--views 2 --placement random --keep-pixels --readers 1 --unit-rows 8"
    taken(with_teacher(made, tmp_path / "b", flags))
    assert rows_of(tmp_path / "b", "pixels") == rows_of(views, "pixels")


# --- refusals ---


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--frames 8", "this teacher takes 4 frames of 32×32, got 8 of 32"),
        ("--size 64", "this teacher takes 4 frames of 32×32, got 4 of 64"),
        ("--layer 3", "--layer: videomaev2 has blocks 1 to 2 (0: the last), got 3"),
        ("--mirror --payload latents", "--payload, --mirror: means nothing for videos with --teacher"),
        ("--placement uniform --fps 6", "placement uniform spreads a clip over the whole video"),
        ("--fps 0", "--fps: expected a positive number, got 0.0"),
        ("--decoder pillow", "--decoder pillow: of images; expected auto, pyav, torchcodec or dali"),
        ("--pool space --project-to 64", "--project-to"),
    ],
)
def test_what_a_teacher_does_not_take(with_teacher, made, tmp_path, more, message):
    done = with_teacher(made, tmp_path / "d", more)
    assert message in done.message and not (tmp_path / "d").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--frames 6", "AutoencoderKLWan has videos of 4·k + 1 frames, 5 or 9, got 6"),
        ("--frames 5,10", "AutoencoderKLWan has videos of 4·k + 1 frames, 9 or 13, got 10"),
        ("", "--frames: expected how many frames a clip has, such as 17"),
        ("--frames 5 --layer 1", "--layer: means nothing for videos with --vae"),
        ("--frames 5 --engine compile", "--engine compile: autoencoders of videos encode with eager only"),
        ("--frames 5 --keep-pixels --transform buckets", "--keep-pixels: expected clips of one height and width"),
        ("--frames 5 --size 36", "36"),
    ],
)
def test_what_an_autoencoder_does_not_take(with_vae, made, tmp_path, more, message):
    done = with_vae(made, tmp_path / "d", more)
    assert message in done.message and not (tmp_path / "d").exists()


def test_no_space_is_noticed_before_a_byte_is_written(with_teacher, made, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    needed = PREFLIGHT.search(taken(with_teacher(made, tmp_path / "d", "--keep-pixels")))[3]
    free = int(needed.replace(",", ""))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**12, 0, free - 1))
    done = with_teacher(made, tmp_path / "e", "--keep-pixels")
    assert f"{needed} bytes are to be written, and {free - 1:,} are free: choose another folder" in done.message
    assert not list((tmp_path / "e").glob("shards/*/*"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**12, 0, free))
    assert encoded_now(with_teacher(made, tmp_path / "e", "--keep-pixels")) == 4


def test_other_weights_and_another_decoder_are_named(with_teacher, made, cache, tmp_path, chain):
    before = chain.contents(cache)
    other = write_teacher(tmp_path / "other", seed=1)
    refused = with_teacher(made, cache, weights=other).message
    assert re.search(r"\n  teacher.weights: \w{12}… \(dataset\) != \w{12}… \(now\)", refused), refused
    assert "teacher.layer: 2 (dataset) != 1 (now)" in with_teacher(made, cache, "--layer 1").message
    if _torchcodec():
        refused = with_teacher(made, cache, "--decoder torchcodec").message
        assert "view.decode: pyav-1 " in refused and " != torchcodec" in refused
    assert chain.contents(cache) == before


def _torchcodec() -> bool:
    try:
        import torchcodec  # noqa: F401
    except (ImportError, RuntimeError, OSError):
        return False
    return True


def test_torchcodec_gives_the_same_views(with_teacher, made, cache, tmp_path):
    """Its frames, sizes and crops are PyAV's; pixels may differ in the last bit of a colour, so rules are its own."""
    if not _torchcodec():
        pytest.skip("torchcodec is not installed")
    taken(with_teacher(made, tmp_path / "d", "--decoder torchcodec"))
    theirs, ours = Dataset.open(tmp_path / "d"), Dataset.open(cache)
    assert np.array_equal(theirs.crop, ours.crop) and np.array_equal(theirs.orig_hw, ours.orig_hw)
    for i in range(len(ours)):
        assert np.array_equal(column_row(theirs, "frame_index", i), column_row(ours, "frame_index", i))
        wanted = values(ours, i)
        assert np.abs(values(theirs, i) - wanted).max() < 0.1 * np.abs(wanted).max()
    samples = TeacherTokens(tmp_path / "d", videos=made)
    assert sorted(sample["id"] for sample in samples.__getitems__(range(4))) == sorted(VIDEOS)


# --- damaged files ---

FAULTS = {"truncated": ".mp4", "garbage": ".mp4", "no-frames": ".webm", "audio-only": ".mp4"}


@pytest.mark.parametrize("more", ["", "--views 2"])
def test_damaged_videos_cost_themselves_alone(with_teacher, videos, cache, tmp_path, more):
    for i, (kind, suffix) in enumerate(FAULTS.items()):
        damaged(videos / "ant/ä b.mp4", videos / f"ant/{i} {kind}{suffix}", kind)
    (videos / "bee/empty.mp4").write_bytes(b"")
    out, many = tmp_path / "d", 5 * (2 if more else 1)
    done = with_teacher(videos, out, f"{more} --unit-rows 2 --max-errors {many - 1}")
    assert f"--max-errors {many - 1}: {many} files cannot be used; what is finished stays" in done.message
    assert not (out / "dataset.json").exists()
    printed = taken(with_teacher(videos, out, f"{more} --unit-rows 2 --max-errors {many}"))
    dataset = Dataset.open(out)
    why = {one.key: one.reason for one in dataset.quarantined}
    bad = [f"ant/{i} {kind}{suffix}" for i, (kind, suffix) in enumerate(FAULTS.items())] + ["bee/empty.mp4"]
    assert why.keys() == ({f"{name}@{view}" for name in bad for view in (0, 1)} if more else set(bad))
    assert f"{many} files could not be used and are not in the dataset" in printed
    assert all(f"{key!a}: {reason}" in printed for key, reason in why.items())
    if not more:
        assert rows_of(out) == rows_of(cache)
        assert "audio" in why[bad[3]] or "video" in why[bad[3]]
        assert len(set(why.values())) >= 3  # they say what is wrong


# --- later runs ---


def test_one_video_comes_one_changes_one_goes(with_teacher, videos, tmp_path):
    out = tmp_path / "d"
    assert encoded_now(with_teacher(videos, out, "--unit-rows 2")) == 4
    before = rows_of(out)
    make_video(videos / "ant/new.mp4", frames=12, size=(48, 32), seed=9)
    assert encoded_now(with_teacher(videos, out, "--unit-rows 2")) == 1
    after = rows_of(out)
    assert after.keys() == before.keys() | {"ant/new.mp4"} and all(after[key] == before[key] for key in before)
    make_video(videos / "bee/2.mp4", frames=8, size=(32, 48), seed=10)
    assert encoded_now(with_teacher(videos, out, "--unit-rows 2")) == 1
    changed = rows_of(out)
    assert [key for key in changed if changed[key] != after[key]] == ["bee/2.mp4"]
    (videos / "ant/手.webm").unlink()
    assert encoded_now(with_teacher(videos, out, "--unit-rows 2")) == 0
    assert rows_of(out) == {key: row for key, row in changed.items() if key != "ant/手.webm"}


def test_views_of_a_video_that_changed(with_teacher, videos, views, tmp_path):
    out = Path(shutil.copytree(views, tmp_path / "d"))
    before = rows_of(out)
    flags = "--views 2 --placement random --keep-pixels --unit-rows 3"
    assert encoded_now(with_teacher(videos, out, flags)) == 0
    make_video(videos / "bee/2.mp4", frames=8, size=(32, 48), seed=10)
    make_video(videos / "bee/4.mp4", frames=8, size=(32, 48), seed=11)
    assert encoded_now(with_teacher(videos, out, flags)) == 4
    after = rows_of(out)
    assert {key for key in after if after[key] != before.get(key)} == {
        f"bee/{i}.mp4@{k}" for i in (2, 4) for k in (0, 1)
    }
    dataset = Dataset.open(out)
    assert [dataset.groups.key(int(i)) for i in dataset.groups.group] == [dataset.key(i)[:-2] for i in range(10)]


def test_inspect_tells_how_far_an_encode_is(with_teacher, videos, tmp_path, chain, monkeypatch):
    prepare = VideoMAETeacher.prepare
    # Shards apart by more than a tick of the file system's clock, 4 ms.
    monkeypatch.setattr(VideoMAETeacher, "prepare", lambda self, clips: time.sleep(0.01) or prepare(self, clips))
    damaged(videos / "ant/ä b.mp4", videos / "bee/9.mp4", "garbage")
    out = tmp_path / "d"
    with_teacher(videos, out, "--unit-rows 1 --max-errors 0 --keep-pixels")  # the last of 5 units stops it
    told = chain.ok("inspect", out).out
    assert "unfinished encode" in told and "rerun the same encode command to go on" in told
    done = int(re.search(r"rows: (\d+) of 5 done", told)[1])
    assert done >= 2  # units are written behind: one may be on its way
    assert re.search(r"still to write: about [\d.]+ GiB, [\d,.]+ GiB free", told)
    assert re.search(r"speed: [\d,.]+ rows/s, by the last shards", told)
    assert re.search(r"time left once it goes on: about ", told)
    assert f"{TOKENS}\n    - {DIM}" in told


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_an_output_that_is_read_only(with_teacher, made, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    message = with_teacher(made, tmp_path / "locked" / "d").message
    assert "Permission denied" in message


# --- sources and teachers of other kinds ---


def test_folders_of_frames(with_teacher, made, tmp_path):
    for i, name in enumerate(("a", "ü")):
        frame_folder(tmp_path / "frames" / name, frames=9 - i, size=(48, 32), seed=i)
    taken(with_teacher(tmp_path / "frames", tmp_path / "d", "--kind frames --keep-pixels"))
    dataset = Dataset.open(tmp_path / "d")
    for i, name in enumerate(("a", "ü")):
        assert dataset.key(i) == name
        pixels = column_row(dataset, "pixels", i)
        assert [frame_number(frame) for frame in pixels] == column_row(dataset, "frame_index", i).tolist()
    samples = TeacherTokens(tmp_path / "d", videos=tmp_path / "frames")
    assert np.array_equal(samples[1]["clip"], pixels)
    done = with_teacher(tmp_path / "frames", tmp_path / "e", "--fps 4")
    assert done.code == 1 and "--fps: folders of frames have no times" in done.err and not (tmp_path / "e").exists()


FUNCTION = """
import torch
def make(weights, device, dtype):
    def tokens(clip):  # float32 [3, T, H, W] → [T, 3]
        assert clip.shape == (3, 4, 32, 32) and weights == "w"
        return clip.mean((2, 3)).T
    tokens.clip, tokens.mean, tokens.std = (4, 32, 32), (0, 0, 0), (1, 1, 1)
    return tokens
"""


def test_any_function_is_a_teacher(chain, made, tmp_path, monkeypatch):
    (tmp_path / "my_teacher_of_clips.py").write_text(FUNCTION)
    line = f"{ENCODE} --teacher my_teacher_of_clips:make --teacher-weights w --dtype float32 --out"
    assert "my_teacher_of_clips" in chain.command(line, tmp_path / "d", made).message  # not on the path
    monkeypatch.syspath_prepend(tmp_path)
    taken(chain.command(line, tmp_path / "d", made))
    dataset = Dataset.open(tmp_path / "d")
    for i, clip in enumerate(clips_of(dataset, made)):
        np.testing.assert_allclose(values(dataset, i)[0], clip.mean((1, 2)) / 255, atol=1e-6)
    (tmp_path / "my_teacher_of_clips.py").write_text(FUNCTION + "# another version\n")
    refused = chain.command(f"{line}", tmp_path / "d", made)
    assert "teacher." in refused.message
    samples = TeacherTokens(tmp_path / "d", videos=made, masks=MaskConfig("random", 0.5), grid=(4, 1, 1))
    assert samples[0]["tokens"].shape == (2, 3)


# --- other commands ---


def test_merge_split_and_filter(chain, with_teacher, made, videos, cache, views, tmp_path):
    shutil.rmtree(videos / "bee")
    taken(with_teacher(videos, tmp_path / "ant"))
    shutil.copytree(made / "bee", videos / "bee")
    shutil.rmtree(videos / "ant")
    taken(with_teacher(videos, tmp_path / "bee"))
    chain.ok("merge --out", tmp_path / "both", tmp_path / "ant", tmp_path / "bee")
    assert rows_of(tmp_path / "both") == rows_of(cache)
    assert sample_ids(tmp_path / "both", made) == sorted(VIDEOS, key=os.fsencode)
    chain.ok("filter --classes ant --out", tmp_path / "filtered", views)
    assert sample_ids(tmp_path / "filtered", made) == [name for name in ("ant/ä b.mp4", "ant/手.webm") for _ in (0, 1)]
    chain.ok("split --fractions a=0.5,b=0.5 --out", tmp_path / "part", views)
    # By keys, and so not by videos: a video's views may be on both sides, each with its own number.
    parts = [Dataset.open(tmp_path / f"part-{name}") for name in "ab"]
    keys = [sorted(one.key(i) for i in range(len(one))) for one in parts]
    assert sorted(keys[0] + keys[1]) == sorted(rows_of(views))
    for name, wanted in zip("ab", keys, strict=True):
        samples = TeacherTokens(tmp_path / f"part-{name}", videos=made)
        found = [f"{one['id']}@{one['view']}" for one in samples.__getitems__(range(len(samples)))]
        assert sorted(found) == wanted
    # Nothing says with which settings it was encoded.
    assert "expected encode.yaml" in chain.command("verify --reencode 2", tmp_path / "both").message


def sample_ids(path, videos):
    samples = TeacherTokens(path, videos=videos)
    return [one["id"] for one in samples.__getitems__(range(len(samples)))]


SMALL = "--steps 1 --batch-size 2 --threads 1"


SQUARE = "expected square latents of images, got"


@pytest.mark.parametrize(
    ("line", "of_tokens", "of_clips"),
    [
        ("decode --format jpeg --output-dir {0}", "got a teacher's tokens", "--format jpeg: clips become videos"),
        (f"train ar {SMALL} --out {{0}}", f"{SQUARE} tokens (1, 8, 32)", f"{SQUARE} moments (1, 8, 2, 4, 4)"),
        (f"train dit {SMALL} --out {{0}}", f"{SQUARE} tokens (1, 8, 32)", f"{SQUARE} moments (1, 8, 2, 4, 4)"),
        ("roundtrip --threads 1 --output {0}.png", "got one of clips of videos", "got one of clips of videos"),
    ],
)
def test_commands_for_images_say_what_they_cannot_do(chain, cache, clips, tmp_path, line, of_tokens, of_clips):
    for dataset, message in ((cache, of_tokens), (clips, of_clips)):
        done = chain.command(line.format(tmp_path / "o"), dataset)
        assert done.code == 1 and message in done.message


def test_a_cache_with_captions_finds_its_videos_again(with_teacher, videos, tmp_path):
    (videos / next(iter(VIDEOS))).with_suffix(".txt").write_text("a caption, which the file's digest covers")
    taken(with_teacher(videos, tmp_path / "d", "--captions txt"))
    cached = TeacherTokens(tmp_path / "d", videos=videos, missing="error")
    assert [len(sample["clip"]) for sample in cached] == [4] * 4
