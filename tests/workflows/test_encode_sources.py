"""Every kind of source through `fastlatent encode`: rows, columns, groups, classes, and what a second run does."""

import importlib.util
import io
import json
import os
import pickle
import re
import shutil
import tarfile
import uuid
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModel, T5EncoderModel

from fastlatent.data.latents import LatentDataset
from fastlatent.encoders.text import load_text_encoder
from fastlatent.store.reader import Dataset


def encode(chain, source, out, more=""):
    return chain.command(f"encode {chain.encode} {more} --out", out, "--vae", chain.vae, str(source))


def encoded(chain, source, out, more="") -> str:
    done = encode(chain, source, out, more)
    assert done.code == 0, done.err
    return done.out


def png(chain, seed: int) -> bytes:
    stream = io.BytesIO()
    chain.image(seed, (10, 14, 3)).save(stream, "PNG")
    return stream.getvalue()


def text(values) -> str:
    return bytes(values.tolist()).decode()


def samples_of(out, *columns: str) -> dict[str, dict]:
    """Key → the sample as a loader sees it."""
    dataset = LatentDataset(out, columns=columns or None)
    return {dataset.store.key(i): dataset[i] for i in range(len(dataset))}


def shards_of(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(out).glob("shards/*/*")}


def same(one: dict[str, dict], other: dict[str, dict]) -> bool:
    return one.keys() == other.keys() and all(
        one[key].keys() == other[key].keys() and all(torch.equal(one[key][name], other[key][name]) for name in one[key])
        for key in one
    )


# --- trajectories (W0) ---


def poses(count: int, seed: int) -> bytes:
    rng = np.random.default_rng(seed)
    return pickle.dumps({"position": rng.normal(size=(count, 2)), "yaw": rng.normal(size=count)}, protocol=4)


def trajectory(chain, folder: Path, count: int, seed: int = 0, pkl: bytes | None = None) -> Path:
    folder.mkdir(parents=True)
    for number in range(count):
        chain.image(100 * seed + number, (9, 12, 3)).save(folder / f"{number}.jpg")
    (folder / "traj_data.pkl").write_bytes(poses(count, seed) if pkl is None else pkl)
    return folder


@pytest.fixture(scope="module")
def data(chain, tmp_path_factory) -> Path:
    """data/<dataset>/<trajectory>/N.jpg, with faults in one dataset."""
    root = tmp_path_factory.mktemp("w0") / "data"
    trajectory(chain, root / "recon" / "b", 11, 1)  # 10.jpg comes behind 9.jpg
    trajectory(chain, root / "recon" / "a-1", 2, 2)
    trajectory(chain, root / "recon" / "a", 4, 3)
    trajectory(chain, root / "tartan" / "P0", 2, 4)
    (trajectory(chain, root / "tartan" / "no poses", 2, 5) / "traj_data.pkl").unlink()
    trajectory(chain, root / "tartan" / "short", 2, 6, poses(3, 6))
    (trajectory(chain, root / "tartan" / "gap", 3, 7) / "1.jpg").unlink()
    trajectory(chain, root / "tartan" / "evil", 1, 8, pickle.dumps({"position": os.system}))
    (root / "notes").mkdir()  # no dataset
    return root


@pytest.fixture(scope="module")
def w0(chain, data, tmp_path_factory):
    """`encode --all data/`: what it printed, and the folder with all datasets."""
    out = tmp_path_factory.mktemp("w0_out") / "latents"
    return encoded(chain, data, out, "--all --copy-pkl --transform nwm"), out


def test_all_datasets_each_by_the_name_its_readers_use(data, w0):
    out, folder = w0
    assert sorted(path.name for path in folder.iterdir()) == ["recon", "tartan_drive"]
    assert f"{data / 'tartan'} -> {folder / 'tartan_drive'}\n" in out
    assert "17 rows in" in out and "17 files encoded now" in out
    dataset = Dataset.open(folder / "recon")
    assert (dataset.classes, set(dataset.label.tolist())) == ([], {-1})
    assert dataset.provenance["hashed"]["transform"]["rule"].startswith("nwm")


def test_frames_are_in_numeric_order_and_a_group_is_one_read(data, w0):
    dataset = LatentDataset(w0[1] / "recon")
    groups = dataset.store.groups
    assert [groups.key(i) for i in range(len(groups))] == ["a", "a-1", "b"]
    for number, count in enumerate((4, 2, 11)):
        name = groups.key(number)
        _, _, rows = dataset.store.group_rows(number)
        assert rows == count
        group = dataset.group(number)
        assert group["order"].tolist() == list(range(count))
        samples = groups.samples(number)
        found = [dataset.store.key(i) for i in range(samples.start, samples.stop)]
        assert found == [f"{name}/{frame}.jpg" for frame in range(count)]
        expected = pickle.loads((data / "recon" / name / "traj_data.pkl").read_bytes())
        assert group["position"].dtype == group["yaw"].dtype == torch.float64
        assert group["position"].tolist() == expected["position"].tolist()
        assert group["yaw"].tolist() == expected["yaw"].tolist()


def test_pickles_are_copied_byte_for_byte_and_disturb_nothing(chain, data, w0):
    for name, trajectories in (("recon", ["a", "a-1", "b"]), ("tartan", ["P0"])):
        out = w0[1] / ("tartan_drive" if name == "tartan" else name)
        copies = {path.parent.name: path.read_bytes() for path in out.glob("*/traj_data.pkl")}
        assert copies == {one: (data / name / one / "traj_data.pkl").read_bytes() for one in trajectories}
        assert "sound" in chain.ok("verify --full --reencode 3", out).out


def test_a_trajectory_that_is_called_like_a_folder_of_the_dataset(chain, tmp_path):
    # gc empties damaged/, and index/ holds the index: a pickle there would not stay, or not be left alone.
    for name in ("damaged", "index"):
        trajectory(chain, tmp_path / name / name, 1)
        assert encode(chain, tmp_path / name, tmp_path / "d").code == 0
        message = encode(chain, tmp_path / name, tmp_path / "e", "--copy-pkl").message
        assert f"--copy-pkl: a trajectory cannot be called '{name}'" in message
        shutil.rmtree(tmp_path / "d")
        assert not (tmp_path / "e").exists()  # refused before a byte is written


def test_the_preflight_of_each_dataset_says_how_many_bytes_are_written(w0):
    sizes = [int(text.replace(",", "")) for text in re.findall(r" shards of ([\d,]+) bytes", w0[0])]
    assert sizes == [sum(map(len, shards_of(w0[1] / name).values())) for name in ("recon", "tartan_drive")]


def test_all_datasets_again(chain, data, w0):
    before = {name: shards_of(w0[1] / name) for name in ("recon", "tartan_drive")}
    out = encoded(chain, data, w0[1], "--all --copy-pkl --transform nwm")
    assert out.count("; 0 files encoded now") == 2
    assert {name: shards_of(w0[1] / name) for name in before} == before


def test_trajectories_that_cannot_be_used_are_listed(w0):
    out = w0[0][w0[0].index("tartan_drive:") :]
    assert "2 rows in" in out and "\n4 files could not be read and are not in the dataset:\n" in out
    for line in (
        "'no poses': no traj_data.pkl",
        "'short': 2 frames, but 3 poses in traj_data.pkl",
        "'gap': frame 1 is missing; 2.jpg follows",
        "'evil': traj_data.pkl: the pickle refers to 'posix system'; only numpy arrays are read, nothing is imported",
    ):
        assert f"\n  {line}" in out


def test_a_second_run_encodes_nothing_and_a_frame_more_its_own_trajectory(chain, data, w0, tmp_path):
    source, out = tmp_path / "recon", tmp_path / "out"
    trajectory(chain, source / "b", 5, 1)
    trajectory(chain, source / "a", 4, 3)
    assert "9 files encoded now" in encoded(chain, source, out)
    before, rows = shards_of(out), samples_of(out)
    assert "0 files encoded now" in encoded(chain, source, out)
    assert shards_of(out) == before
    chain.image(999, (9, 12, 3)).save(source / "b" / "5.jpg")
    (source / "b" / "traj_data.pkl").write_bytes(poses(6, 1))  # drawn with another shape: every pose is new
    assert "6 files encoded now" in encoded(chain, source, out)
    after = shards_of(out)
    assert {name: after[name] for name in before} == before  # shards are never changed
    dataset = Dataset.open(out)
    assert [dataset.group_rows(number)[2] for number in range(2)] == [4, 6]
    found = samples_of(out)
    assert same({key: found[key] for key in rows if key[0] == "a"}, {key: rows[key] for key in rows if key[0] == "a"})
    for key in rows:
        assert torch.equal(found[key]["moments"], rows[key]["moments"])
    assert found["b/5.jpg"]["yaw"].item() == pickle.loads((source / "b" / "traj_data.pkl").read_bytes())["yaw"][5]
    # A pose that is corrected changes its row's digest, and the trajectory is one piece again.
    trajectory_pkl = pickle.loads((source / "a" / "traj_data.pkl").read_bytes())
    trajectory_pkl["yaw"][2] += 1
    (source / "a" / "traj_data.pkl").write_bytes(pickle.dumps(trajectory_pkl))
    assert "4 files encoded now" in encoded(chain, source, out)
    assert samples_of(out)["a/2.jpg"]["yaw"].item() == trajectory_pkl["yaw"][2]
    assert "sound" in chain.ok("verify --full", out).out


def test_chosen_trajectories(chain, data, tmp_path):
    names = tmp_path / "traj_names.txt"
    names.write_bytes(b"\xef\xbb\xbfb\r\n\r\na-1\r\n")
    out = encoded(chain, data / "recon", tmp_path / "d", f"--trajectories {names}")
    assert "13 rows in" in out
    groups = Dataset.open(tmp_path / "d").groups
    assert [groups.key(i) for i in range(len(groups))] == ["a-1", "b"]
    assert "13 files encoded now" in out and not list((tmp_path / "d").glob("*/traj_data.pkl"))
    names.write_text("b\nc\n")
    done = encode(chain, data / "recon", tmp_path / "e", f"--trajectories {names}")
    assert f"'{names}': 1 trajectories are not in" in done.message and done.message.endswith(": c")
    assert not (tmp_path / "e").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--all --trajectories x.txt", "--all: expected neither --trajectories nor another --kind"),
        ("--all --kind images", "--all: expected neither --trajectories nor another --kind"),
        ("--transform buckets", "--transform buckets: expected images without groups"),
        ("--captions txt", "captions 'txt' means nothing for"),
    ],
)
def test_what_trajectories_do_not_take(chain, data, tmp_path, more, message):
    source = data if "--all" in more else data / "recon"
    assert message in encode(chain, source, tmp_path / "d", more).message
    assert not (tmp_path / "d").exists()


def test_copy_pkl_of_a_source_without_pickles(chain, tmp_path):
    message = encode(chain, chain.images, tmp_path / "d", "--copy-pkl").message
    assert "--copy-pkl: expected trajectories, got a source without traj_data.pkl" in message


# --- manifests (W3) ---


SPEC = "--condition-spec temperature:1,wind:3,wind_mag:1 --captions prompt"
METADATA = {
    "a/0.png": {"split": "train", "temperature": 0.25, "wind": [3, 4, 0], "prompt": "a träge cat 🐈"},
    "a/1.png": {"split": "train", "wind": [1.5], "prompt": None},
    "b/2.png": {"split": "train", "temperature": 0},
    "b/3.png": {"split": "val", "temperature": -2},
    "b/gone.png": {"split": "train", "temperature": 1},
}
CONDITIONS = {
    "a/0.png": ([0.25, 3, 4, 0, 5], [1, 1, 1]),
    "a/1.png": ([0, 1.5, 0, 0, 1.5], [0, 1, 1]),
    "b/2.png": ([0, 0, 0, 0, 0], [1, 0, 0]),
}


@pytest.fixture
def manifest(chain, tmp_path) -> Path:
    for number, key in enumerate(METADATA):
        if "gone" not in key:
            (tmp_path / "renders" / key).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "renders" / key).write_bytes(png(chain, number))
    return write_manifest(tmp_path / "set.jsonl", METADATA)


def write_manifest(path: Path, metadata: dict[str, dict]) -> Path:
    """As an editor on Windows saves it: with a byte order mark and CRLF."""
    records = [{"record_type": "set", "output_root": "renders"}]
    records += [{"record_type": "sample", "output_rel": key, "metadata": one} for key, one in metadata.items()]
    lines = [json.dumps(record, ensure_ascii=False) for record in records]
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode() + b"\r\n")
    return path


def test_a_manifest_with_conditions_and_captions(chain, manifest, tmp_path):
    out = encoded(chain, manifest, tmp_path / "d", f"--split train {SPEC}")
    assert "3 rows in" in out
    assert (
        "condition 'temperature': 1 of 3 samples lack it; the first is 'a/1.png'\n"
        "condition 'wind': 1 of 3 samples hold another number of values than 3: cut, or filled with zeros; the first "
        "is 'a/1.png'\n"
        "condition 'wind': 1 of 3 samples lack it; the first is 'b/2.png'\n"
        "condition 'wind_mag': 1 of 3 samples lack it; the first is 'b/2.png'\n"
        "3 images to encode"
    ) in out
    assert (
        "\n1 files could not be read and are not in the dataset:\n  'b/gone.png': line 6: there is no such file" in out
    )
    found = samples_of(tmp_path / "d", "condition", "condition_present", "caption")
    assert found.keys() == CONDITIONS.keys()
    for key, (values, present) in CONDITIONS.items():
        assert found[key]["condition"].dtype == torch.float32
        assert (found[key]["condition"].tolist(), found[key]["condition_present"].tolist()) == (values, present)
        assert text(found[key]["caption"]) == (METADATA[key].get("prompt") or "")
    assert Dataset.open(tmp_path / "d").provenance["hashed"]["columns"] == [
        "caption", "condition", "condition_present"
    ]  # fmt: skip
    assert "4 rows in" in encoded(chain, manifest, tmp_path / "all", SPEC)
    assert "sound" in chain.ok("verify --full --reencode 3", tmp_path / "d").out


def test_a_changed_condition_makes_exactly_its_row_anew(chain, manifest, tmp_path):
    out = tmp_path / "d"
    encoded(chain, manifest, out, f"--split train {SPEC}")
    before, rows = shards_of(out), samples_of(out)
    changed = {key: dict(one) for key, one in METADATA.items()}
    changed["a/1.png"]["temperature"] = 7
    write_manifest(manifest, changed)
    assert "1 files encoded now" in encoded(chain, manifest, out, f"--split train {SPEC}")
    found = samples_of(out)
    assert found["a/1.png"].pop("condition").tolist() == [7, 1.5, 0, 0, 1.5]
    assert found["a/1.png"].pop("condition_present").tolist() == [1, 1, 1]
    for name in ("condition", "condition_present"):
        rows["a/1.png"].pop(name)
    assert same(found, rows)
    assert before.items() <= shards_of(out).items() and len(shards_of(out)) == len(before) + 1
    assert "0 files encoded now" in encoded(chain, manifest, out, f"--split train {SPEC}")
    # Other conditions, or the same in another order, are another dataset.
    turned = SPEC.replace("temperature:1,wind:3,", "wind:3,temperature:1,")
    message = encode(chain, manifest, out, f"--split train {turned}").message
    assert "conditions: temperature:… (dataset) != wind:3,tempe… (now)" in message
    message = encode(chain, manifest, out, "--split train --condition-spec temperature:1").message
    assert "was encoded with other settings:\n  columns: " in message


def test_a_manifest_of_files_that_lie_elsewhere(chain, manifest, tmp_path):
    encoded(chain, manifest, tmp_path / "d", f"--split train {SPEC}")
    (tmp_path / "renders").rename(tmp_path / "moved")
    message = encode(chain, manifest, tmp_path / "e", "--split train").message
    assert "none of its 4 images can be used" in message and "give their folder as the root" in message
    done = encoded(chain, manifest, tmp_path / "d", f"--split train {SPEC} --manifest-root {tmp_path / 'moved'}")
    assert "0 files encoded now" in done  # paths are no part of a dataset


# --- tars, tables, URLs ---


def add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    archive.addfile(info, io.BytesIO(data))


def test_tars_with_captions_and_labels(chain, tmp_path):
    (tmp_path / "tars" / "deep").mkdir(parents=True)
    for path, names in (("0.tar", ("x", "ключ/y")), ("deep/1.tar", ("x", "z"))):
        with tarfile.open(tmp_path / "tars" / path, "w") as archive:
            for number, name in enumerate(names):
                add(archive, f"{name}.png", png(chain, number))
                add(archive, f"{name}.txt", f"a {name} in {path}\n".encode())
                add(archive, f"{name}.cls", b"%d" % (2 * number))
            if path == "0.tar":
                add(archive, "bad.jpg", b"no picture")
                add(archive, "twice.png", png(chain, 5))
                add(archive, "twice.jpg", png(chain, 5))
    out = encoded(chain, tmp_path / "tars", tmp_path / "d", "--captions txt")
    found = samples_of(tmp_path / "d", "caption", "label", "moments")
    assert {key: (text(one["caption"]), int(one["label"])) for key, one in found.items()} == {
        "0.tar/x.png": ("a x in 0.tar", 0),
        "0.tar/ключ/y.png": ("a ключ/y in 0.tar", 2),
        "deep/1.tar/x.png": ("a x in deep/1.tar", 0),
        "deep/1.tar/z.png": ("a z in deep/1.tar", 2),
    }
    assert Dataset.open(tmp_path / "d").classes == ["0", "1", "2"]
    assert torch.equal(found["0.tar/x.png"]["moments"], found["deep/1.tar/x.png"]["moments"])
    assert "'0.tar/bad.jpg': no readable" in out
    assert "'0.tar/twice.png': one sample of 2 images" in out and "'0.tar/twice.jpg': one sample of 2 images" in out
    assert "0 files encoded now" in encoded(chain, tmp_path / "tars", tmp_path / "d", "--captions txt")


FEATURES = {"image": {"_type": "Image"}, "kind": {"_type": "ClassLabel", "names": ["cat", "dog", "eel"]}}


def table(images: list[bytes | None]) -> pa.Table:
    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    rows = [{"bytes": data, "path": f"{i}.png"} for i, data in enumerate(images)]
    kinds = [(2, 0, None)[i % 3] for i in range(len(images))]
    texts = [f"№ {i}" for i in range(len(images))]
    return pa.table({"image": pa.array(rows, struct), "kind": pa.array(kinds, pa.int64()), "text": texts})


def test_parquet(chain, tmp_path):
    images = [png(chain, 0), png(chain, 1), None, png(chain, 3), b"no picture"]
    described = table(images).replace_schema_metadata({"huggingface": json.dumps({"info": {"features": FEATURES}})})
    (tmp_path / "t").mkdir()
    pq.write_table(described, tmp_path / "t" / "train-00000-of-00001.parquet", row_group_size=2)
    pq.write_table(described, tmp_path / "t" / "test-00000-of-00001.parquet")
    out = encoded(chain, tmp_path / "t", tmp_path / "d", "--split train --captions text")
    keys = [f"train-00000-of-00001.parquet/{i:08d}" for i in range(5)]
    found = samples_of(tmp_path / "d", "caption", "label", "moments")
    assert {key: (text(one["caption"]), int(one["label"])) for key, one in found.items()} == {
        keys[0]: ("№ 0", 2), keys[1]: ("№ 1", 0), keys[3]: ("№ 3", 2),
    }  # fmt: skip
    assert Dataset.open(tmp_path / "d").classes == ["cat", "dog", "eel"]
    assert f"'{keys[2]}': the image is null, and '2.png' is not there" in out
    assert f"'{keys[4]}': no readable" in out
    assert "0 files encoded now" in encoded(chain, tmp_path / "t", tmp_path / "d", "--split train --captions text")


def test_a_saved_hugging_face_dataset(chain, tmp_path):
    folder = tmp_path / "saved"
    folder.mkdir()
    name = "data-00000-of-00001.arrow"
    written = table([png(chain, i) for i in range(4)])
    for file in (name, "cache-1f.arrow"):  # the second is what `map` leaves; it is not part of the dataset
        with pa.OSFile(str(folder / file), "wb") as raw, pa.ipc.new_stream(raw, written.schema) as stream:
            stream.write_table(written, 3)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name}]}))
    (folder / "dataset_info.json").write_text(json.dumps({"features": FEATURES}))
    encoded(chain, folder, tmp_path / "d")
    dataset = Dataset.open(tmp_path / "d")
    assert [dataset.key(i) for i in range(len(dataset))] == [f"{name}/{i:08d}" for i in range(4)]
    assert (dataset.classes, dataset.label.tolist()) == (["cat", "dog", "eel"], [2, 0, -1, 2])


def test_through_fsspec_as_from_a_folder(chain, tmp_path):
    root = f"{uuid.uuid4().hex}/pictures"
    memory = fsspec.filesystem("memory")
    for path in chain.images.rglob("*.png"):
        memory.pipe(f"/{root}/{path.relative_to(chain.images)}", path.read_bytes())
    memory.pipe(f"/{root}/bee/bad.png", b"no picture")
    out = encoded(chain, f"memory://{root}", tmp_path / "d")
    assert "8 rows in" in out and "'bee/bad.png': no readable" in out
    assert same(samples_of(tmp_path / "d"), samples_of(chain.latents))
    assert "0 files encoded now" in encoded(chain, f"memory://{root}", tmp_path / "d")
    assert "8 encoded again and compared bit for bit: sound" in chain.ok("verify --reencode 8", tmp_path / "d").out
    memory.pipe(f"/{root}/bee/bad.png", (chain.images / "bee" / "0.png").read_bytes())
    assert "1 files encoded now" in encoded(chain, f"memory://{root}", tmp_path / "d")


# --- captions and their embeddings ---


@pytest.fixture(scope="module")
def encoders(tmp_path_factory) -> dict[str, Path]:
    """A tiny CLIP and a tiny T5, with tokenizers as tests/encoders/test_text.py makes them."""
    path = Path(__file__).parents[1] / "encoders" / "test_text.py"
    spec = importlib.util.spec_from_file_location("text_helpers", path)
    helpers = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(helpers)
    root = tmp_path_factory.mktemp("text")
    folders = {name: root / name for name in ("clip", "t5")}
    for folder in folders.values():
        folder.mkdir()
    torch.manual_seed(0)
    size = helpers.write_clip_tokenizer(folders["clip"])
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"bos_token_id": size - 2, "eos_token_id": 2, "pad_token_id": size - 1}
    config = CLIPTextConfig(vocab_size=size, projection_dim=8, max_position_embeddings=12, **sizes, **ids)
    CLIPTextModel(config).save_pretrained(folders["clip"])
    helpers.write_t5_tokenizer(folders["t5"])
    T5EncoderModel(helpers.t5_config()).save_pretrained(folders["t5"])
    return folders


CAPTIONS = {
    "ant/0": "a photo of a cat",
    "ant/1": "träge Züge, 日本語, 🐈",
    "bee/0": "cat " * 40,
    "bee/1": " hello world\r\n",
}


@pytest.fixture
def captioned(images) -> Path:
    for stem, caption in CAPTIONS.items():
        (images / f"{stem}.txt").write_bytes(caption.encode())
    return images


def caption_of(key: str) -> str:
    return CAPTIONS.get(key.removesuffix(".png"), "").strip()


@pytest.mark.parametrize(("kind", "columns"), [("clip", ("text", "text_pooled")), ("t5", ("text",))])
def test_embeddings_of_captions_are_columns(chain, encoders, captioned, tmp_path, kind, columns):
    more = f"--captions txt --text-encoder {encoders[kind]}"
    out = encoded(chain, captioned, tmp_path / "d", more)
    assert ".txt" not in out[out.index("rows in") :]  # they were looked at
    found = samples_of(tmp_path / "d", "caption", *columns)
    torch.set_num_threads(1)
    encoder = load_text_encoder(encoders[kind])
    for key, sample in found.items():
        assert text(sample["caption"]) == caption_of(key)
        (wanted,) = encoder.encode([caption_of(key)])  # whatever stands beside it
        assert torch.equal(sample["text"], wanted.tokens.half())
        if kind == "clip":
            assert torch.equal(sample["text_pooled"], wanted.pooled.half())
    assert encoder.truncated == 2  # "cat cat …", and the one of many bytes per letter
    assert f"2 captions were longer than {encoder.max_length} tokens and were cut" in out
    lengths = {len(sample["text"]) for sample in found.values()}
    assert lengths == {12} if kind == "clip" else len(lengths) > 1 and max(lengths) == 16
    # The images' latents are what they are without captions.
    plain = samples_of(chain.latents, "moments")
    assert same(samples_of(tmp_path / "d", "moments"), plain)
    assert "0 files encoded now" in encoded(chain, captioned, tmp_path / "d", more)
    (captioned / "bee" / "1.txt").write_text("another one")
    assert "1 files encoded now" in encoded(chain, captioned, tmp_path / "d", more)
    assert text(samples_of(tmp_path / "d")["bee/1.png"]["caption"]) == "another one"
    message = encode(chain, captioned, tmp_path / "d", f"{more} --text-length 9").message
    assert "text.max_length: " in message


def test_a_text_encoder_needs_captions(chain, encoders, tmp_path):
    message = encode(chain, chain.images, tmp_path / "d", f"--text-encoder {encoders['clip']}").message
    assert "--text-encoder: expected --captions too" in message
    message = encode(chain, chain.images, tmp_path / "d", "--captions txt").message
    assert "no image of" in message and ".txt" in message
    assert not (tmp_path / "d").exists()


def test_columns_go_through_verify_split_merge_and_filter(chain, encoders, captioned, tmp_path):
    out = tmp_path / "d"
    encoded(chain, captioned, out, f"--captions txt --text-encoder {encoders['t5']}")
    whole = samples_of(out)
    assert set(whole["ant/0.png"]) == {"moments", "label", "key_hash", "caption", "text"}
    assert "sound" in chain.ok("verify --full --reencode 8", out).out
    chain.ok("split --fractions a=0.5,b=0.5 --out", tmp_path / "part", out)
    chain.ok("merge --out", tmp_path / "whole", tmp_path / "part-a", tmp_path / "part-b")
    chain.ok("filter --classes bee --copy --out", tmp_path / "bees", out)
    assert same(samples_of(tmp_path / "whole"), whole)
    assert same(samples_of(tmp_path / "part-a") | samples_of(tmp_path / "part-b"), whole)
    bees = samples_of(tmp_path / "bees", "caption", "text", "moments")
    wanted = {
        key: {name: whole[key][name] for name in ("caption", "text", "moments")} for key in whole if key[0] == "b"
    }
    assert same(bees, wanted)
    for name in ("whole", "bees"):
        assert "sound" in chain.ok("verify --full", tmp_path / name).out


def test_all_goes_on_after_a_dataset_that_fails(chain, tmp_path):
    for name in ("a", "b", "c"):
        trajectory(chain, tmp_path / "data" / name / "run", 2)
    (tmp_path / "out" / "b").mkdir(parents=True)
    (tmp_path / "out" / "b" / "mine.txt").write_text("not a dataset")
    done = chain.command(f"encode {chain.encode} --all --out", tmp_path / "out", "--vae", chain.vae, tmp_path / "data")
    assert done.code == 1 and "1 of 3 datasets failed" in done.err and "mine.txt" in done.err
    assert [len(Dataset.open(tmp_path / "out" / name)) for name in ("a", "c")] == [2, 2]
