"""push and pull against a hub on this machine: whole or not at all, gone on with, checked, and nothing else touched."""

import importlib.util
import inspect
import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
from fake_hub import Repo, serving
from huggingface_hub import constants

from fastlatent.config.fields import build
from fastlatent.config.hub import PullConfig, PushConfig
from fastlatent.store.reader import Dataset, root_digest
from fastlatent.store.records import FileRecord
from fastlatent.store.verify import verify
from fastlatent.workflows import hub

KEYS = ["ant/1.jpg", "ant/2.jpg", "bee/1.jpg", "bee/2.jpg", "cat/1.jpg"]
NAME = "me/latents"


def load_toy():
    path = Path(__file__).parents[1] / "store" / "toy.py"
    spec = importlib.util.spec_from_file_location("hub_store_toy", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


toy = load_toy()


@pytest.fixture
def repo(monkeypatch):
    repo = Repo(NAME)
    with serving(repo) as endpoint:
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)  # as HF_ENDPOINT, which is read at import
        template = "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + template)
        monkeypatch.setenv("HF_TOKEN", "hf_fake")
        yield repo


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Generation 2, with a shard that generation 1 alone has and what a kill leaves behind."""
    folder = tmp_path_factory.mktemp("made")
    source = toy.make_source(folder / "source", KEYS)
    toy.build(folder / "dataset", source)
    toy.write_file(source, "bee/2.jpg", b"edited", 1)
    toy.write_file(source, "ant/bad.jpg", b"bad bytes")
    toy.build(folder / "dataset", source)
    (folder / "dataset" / "encode.yaml").write_text("size: 8\n")
    (folder / "dataset" / "shards" / ".tmp-left").write_bytes(b"left")
    return folder


@pytest.fixture
def dataset(made, tmp_path):
    for name in ("source", "dataset"):
        shutil.copytree(made / name, tmp_path / name)
    return tmp_path / "dataset"


def push(path, **flags):
    hub.push(build(PushConfig, {}, {"dataset": str(path), "repo_id": NAME, **flags}))


def pull(out, **flags):
    return hub.pull(build(PullConfig, {}, {"repo_id": NAME, "out": str(out), **flags}))


def current(path):
    """The files of the current generation."""
    dataset = Dataset.open(path)
    names = {record.path for record in hub._records(dataset.root)} | {shard.path for shard in dataset.shards}
    extra = [name for name in ("encode.yaml",) if (path / name).exists()]
    return {name: (path / name).read_bytes() for name in {*names, *extra, "dataset.json", "provenance.json"}}


def refuse_after(repo, count, method="POST", part="/commit/"):
    left = [count]

    def fail(verb, path):
        if verb == method and part in path:
            left[0] -= 1
            if left[0] < 0:
                raise PermissionError("the network is gone")

    repo.fail = fail


def test_there_and_back(repo, dataset, tmp_path):
    push(dataset)
    files = dict(repo.files())
    assert files.pop(".gitattributes") == b""
    assert files == current(dataset)
    assert pull(tmp_path / "out", full=True) == 0
    assert current(tmp_path / "out") == files
    assert not (tmp_path / "out" / hub.STAGE).exists()
    assert verify(tmp_path / "out", full=True, threads=1).findings == []
    seen = len(repo.seen)
    pull(tmp_path / "out")  # nothing but what says that nothing is to be done
    asked = {path.rpartition("/")[2] for method, path in repo.seen[seen:] if method == "GET" and "/resolve/" in path}
    assert asked <= {"dataset.json", "provenance.json", "encode.yaml"}


def test_a_reader_of_the_hub_never_sees_half_a_dataset(repo, dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "COMMIT_FILES", 1)
    refuse_after(repo, 3)  # provenance, two shards
    with pytest.raises(ValueError, match=r"the upload failed: .*network is gone.*run the same command again"):
        push(dataset)
    assert "dataset.json" not in repo.files() and "provenance.json" in repo.files()
    with pytest.raises(ValueError, match="if a push was interrupted, run it again"):
        pull(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    repo.fail = lambda *_: None
    before = len(repo.commits)
    push(dataset)
    assert len(repo.commits) - before == len(Dataset.open(dataset).shards) - 2 + 1
    for files in repo.commits.values():  # whoever reads at any time
        if "dataset.json" in files:
            root = json.loads(files["dataset.json"])
            assert {record.path for record in hub._records(root)} <= files.keys()
    pull(tmp_path / "out")


def test_a_later_generation_takes_the_place_of_the_earlier(repo, dataset, tmp_path):
    push(dataset)
    pull(tmp_path / "out")
    toy.write_file(tmp_path / "source", "dog/1.jpg", b"one more class")
    toy.build(dataset, tmp_path / "source")
    push(dataset)
    files = dict(repo.files())
    del files[".gitattributes"]
    assert files == current(dataset)
    pull(tmp_path / "out")
    assert Dataset.open(tmp_path / "out").generation == 3 and current(tmp_path / "out") == files
    pull(tmp_path / "first", revision=list(repo.commits)[3])  # a commit stays what it was
    assert Dataset.open(tmp_path / "first").generation == 2
    with pytest.raises(ValueError, match="holds generation 3 of other rows, or a later one, than generation 2"):
        push(tmp_path / "first")


def test_branches_and_privacy(repo, dataset, tmp_path):
    push(dataset, revision="next", private=True)
    assert repo.private and "dataset.json" in repo.files("next") and "dataset.json" not in repo.files()
    pull(tmp_path / "out", revision="next")
    repo.private = False
    with pytest.raises(ValueError, match="expected a private repository"):
        push(dataset, private=True)
    with pytest.raises(ValueError, match="cannot be read.*--revision"):
        pull(tmp_path / "other", revision="nowhere")


def test_repositories_of_something_else(repo, dataset, tmp_path):
    repo.make(False)
    repo.commit("main", {"README.md": b"mine", "train.parquet": b"..."})
    with pytest.raises(ValueError, match="expected an empty repository or one of this dataset, it holds train.parquet"):
        push(dataset)
    repo.commit("main", {"README.md": b"mine"})
    push(dataset)
    assert repo.files()["README.md"] == b"mine"
    toy.make_source(tmp_path / "s2", KEYS)
    provenance = {"hashed": {"vae": "another"}, "informational": {}}
    toy.build(tmp_path / "other", tmp_path / "s2", provenance=provenance)
    with pytest.raises(ValueError, match="expected a dataset of the same settings"):
        push(tmp_path / "other")
    with pytest.raises(ValueError, match="expected a dataset with fingerprint"):
        pull(tmp_path / "other")
    toy.make_source(tmp_path / "s3", ["x/9.jpg"])
    toy.build(tmp_path / "rows", tmp_path / "s3")  # the same settings, other images
    with pytest.raises(ValueError, match="holds generation 2 of other rows"):
        push(tmp_path / "rows")
    with pytest.raises(ValueError, match="of other rows"):
        pull(tmp_path / "rows")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years")
    with pytest.raises(ValueError, match=r"expected an empty folder or a pulled dataset, it holds 'thesis.tex'"):
        pull(tmp_path / "mine")
    assert [one.name for one in (tmp_path / "mine").iterdir()] == ["thesis.tex"]
    with pytest.raises(ValueError, match="cannot be read"):
        hub.pull(build(PullConfig, {}, {"repo_id": "me/none", "out": str(tmp_path / "none")}))
    with pytest.raises(ValueError, match="cannot be made"):
        hub.push(build(PushConfig, {}, {"dataset": str(dataset), "repo_id": "you/latents"}))


def test_an_interrupted_pull_goes_on(repo, dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "THREADS", 1)
    push(dataset)
    refuse_after(repo, 1, "GET", "/shards/")
    with pytest.raises(ValueError, match="could not be downloaded.*run the same command again"):
        pull(tmp_path / "out")
    assert not (tmp_path / "out" / "dataset.json").exists()
    assert len(list((tmp_path / "out" / "shards").rglob("*.safetensors"))) == 1
    repo.fail = lambda *_: None
    repo.seen.clear()
    pull(tmp_path / "out")
    fetched = [path for method, path in repo.seen if method == "GET" and "/shards/" in path]
    assert len(fetched) == len(Dataset.open(dataset).shards) - 1
    assert current(tmp_path / "out") == current(dataset)


@pytest.mark.parametrize("kind", ["shards", "index"])
def test_damaged_downloads(repo, dataset, tmp_path, kind):
    push(dataset)
    name = next(one for one in repo.files() if one.startswith(f"{kind}/"))
    data = bytearray(repo.files()[name])
    data[len(data) // 2] ^= 1
    repo.damage[name] = bytes(data)
    with pytest.raises(ValueError, match=rf"{name}: expected xxh3_128 .*, what came has another"):
        pull(tmp_path / "out")
    assert not (tmp_path / "out" / "dataset.json").exists() and not (tmp_path / "out" / name).exists()
    repo.damage.clear()
    pull(tmp_path / "out")
    assert current(tmp_path / "out") == current(dataset)
    place = tmp_path / "out" / name  # a file that went bad here is brought again
    place.write_bytes(bytes(data))
    pull(tmp_path / "out")
    assert current(tmp_path / "out") == current(dataset)


@pytest.mark.parametrize("name", ["dataset.json", "provenance.json"])
def test_what_names_the_rest_comes_damaged(repo, dataset, tmp_path, name):
    push(dataset)
    data = bytearray(repo.files()[name])
    data[len(data) // 2] ^= 1
    repo.damage[name] = bytes(data)
    with pytest.raises(ValueError, match=r"dataset\.json|provenance\.json"):
        pull(tmp_path / "out")
    repo.damage.clear()
    pull(tmp_path / "out")
    assert current(tmp_path / "out") == current(dataset)


def test_a_damaged_shard_is_not_uploaded(repo, dataset):
    shard = dataset / Dataset.open(dataset).shards[0].path
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(ValueError, match="the shard is damaged, and was not uploaded"):
        push(dataset)
    assert not any(name.startswith("shards/") for name in repo.files())
    shard.write_bytes(data[:-1])
    with pytest.raises(ValueError, match="expected a sound dataset"):
        push(dataset)


@pytest.mark.parametrize("name", ["../../escaped", "/tmp/escaped", "provenance.json", "shards/../../escaped"])
def test_names_that_lead_elsewhere(repo, dataset, tmp_path, name):
    push(dataset)
    files = dict(repo.files())
    root = json.loads(files["dataset.json"])
    data = files.get(name, b"hostile")
    root["statistics"] = vars(FileRecord.of(name, data))
    root["xxh3_128"] = root_digest(root)
    repo.commit("main", files | {"dataset.json": json.dumps(root).encode(), name: data})
    with pytest.raises(ValueError, match="expected files in manifest, index|expected a path inside"):
        pull(tmp_path / "deep" / "out")
    assert not list(tmp_path.rglob("escaped")) and not (tmp_path / "deep" / "out" / "dataset.json").exists()


def test_two_pushes_at_once(repo, dataset):
    push(dataset)
    there = hub._look(hub._api(), NAME, None)
    repo.commit("main", dict(repo.files()))
    api = hub._api()
    config = build(PushConfig, {}, {"dataset": str(dataset), "repo_id": NAME})
    job = hub._Push(api, config, there, Dataset.open(dataset), (dataset / "dataset.json").read_bytes())
    with pytest.raises(ValueError, match="A commit has happened since"):
        job.run()


def test_the_calls_are_those_of_huggingface_hub():
    """Keywords that are used, against the signatures of the version that is installed."""
    used = {
        "create_repo": {"repo_type", "private", "exist_ok"},
        "create_branch": {"branch", "repo_type", "exist_ok"},
        "create_commit": {"commit_message", "repo_type", "revision", "parent_commit"},
        "hf_hub_download": {"repo_type", "revision", "local_dir", "force_download"},
    }
    for name, keywords in used.items():
        assert keywords <= inspect.signature(getattr(huggingface_hub.HfApi, name)).parameters.keys()
