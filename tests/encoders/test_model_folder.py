import json

import huggingface_hub
import pytest

from fastlatent.encoders.model_folder import find_vae

WEIGHTS = "diffusion_pytorch_model.safetensors"
HUB = "owner/Model-1.3B"


def vae_at(folder, weights=WEIGHTS):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKLWan"}))
    if weights:
        (folder / weights).write_bytes(b"")
    return folder


def cached(cache, weights=WEIGHTS):
    """A model as huggingface_hub keeps it: blobs, a snapshot of links to them, and where main points to."""
    root, commit = cache / "models--owner--Model-1.3B", "a" * 40
    vae = vae_at(root / "snapshots" / commit / "vae", weights)
    (root / "blobs").mkdir()
    for i, file in enumerate(sorted(vae.iterdir())):
        file.rename(root / "blobs" / f"{i}")
        file.symlink_to(f"../../../blobs/{i}")
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(commit)
    return vae


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub, "HfApi", None)  # nothing here may ask the hub
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


def test_local_folders(tmp_path):
    near = tmp_path / "experiment"
    model = vae_at(tmp_path / "here" / "models" / "wan" / "vae").parent
    assert find_vae("models/wan", near=near) == model / "vae"
    assert find_vae(str(model), near=near) == model / "vae"
    assert find_vae(str(model / "vae"), near=near) == model / "vae"  # as --vae names it
    beside = vae_at(near / "own model" / "vae")  # a name that no hub has
    assert find_vae("own model", near=near) == beside
    # The working directory goes first.
    first = vae_at(tmp_path / "here" / "own model")
    assert find_vae("own model", near=near) == first
    shards = vae_at(tmp_path / "shards", None)
    (shards / f"{WEIGHTS}.index.json").write_text('{"weight_map": {"a": "one.safetensors"}}')
    with pytest.raises(ValueError, match=f"{shards}: {WEIGHTS}.index.json, but no one.safetensors"):
        find_vae(str(shards), near=near)
    (shards / "one.safetensors").write_bytes(b"")
    assert find_vae(str(shards), near=near) == shards


def test_the_hubs_cache(tmp_path):
    vae = cached(tmp_path / "cache")
    assert find_vae(HUB, near=tmp_path, cache_dir=tmp_path / "cache") == vae
    local = vae_at(tmp_path / "here" / HUB)  # what is named so here goes first
    assert find_vae(HUB, near=tmp_path, cache_dir=tmp_path / "cache") == local


def test_what_is_nowhere_says_where_it_was_looked_for(tmp_path):
    cached(tmp_path / "cache", weights=None)
    vae_at(tmp_path / "near" / HUB / "vae", "diffusion_pytorch_model.bin")
    with pytest.raises(ValueError) as error:
        find_vae(HUB, near=tmp_path / "near", cache_dir=tmp_path / "cache")
    text = str(error.value)
    for place in (
        f"no autoencoder of the model '{HUB}' was found",
        f"{tmp_path}/here/{HUB}/vae: does not exist",
        f"{tmp_path}/here/{HUB}: does not exist",
        f"{tmp_path}/near/{HUB}/vae: config.json, but no {WEIGHTS}",
        f"{tmp_path}/near/{HUB}: no config.json",
        f"the hub's cache, {tmp_path}/cache/models--owner--Model-1.3B: vae/ has config.json, but no {WEIGHTS}",
        f"the hub, {HUB}: not asked, HF_HUB_OFFLINE is set",
        "--vae",
    ):
        assert place in text
    with pytest.raises(ValueError, match="cache/models--owner--Model-1.3B: nothing of this model"):
        find_vae(HUB, near=tmp_path, cache_dir=tmp_path / "empty" / "cache")
    (tmp_path / "here" / "file").write_text("")
    with pytest.raises(ValueError, match="here/file: is a file"):
        find_vae("file", near=tmp_path)
    for name in ("a/b/c", "../up", "with space", "/absolute", "~nosuchuser/model"):
        with pytest.raises(ValueError, match="is no hub id"):
            find_vae(name, near=tmp_path)
    with pytest.raises(ValueError, match="got an empty one"):
        find_vae(" ", near=tmp_path)


def test_download(tmp_path, monkeypatch):
    """Only after the cache, only the autoencoder, and not before the hub has answered within seconds."""
    asked = []

    class Api:
        def model_info(self, name, timeout):
            asked.append((name, timeout))

    def snapshot(name, *, cache_dir, local_files_only, allow_patterns, etag_timeout):
        asked.append((name, local_files_only))
        assert all(pattern.startswith(("vae/", "scheduler/")) for pattern in allow_patterns)
        if local_files_only:
            raise FileNotFoundError("nothing here")
        return cached(cache_dir).parent

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    found = find_vae(HUB, near=tmp_path, cache_dir=tmp_path / "cache")
    assert found.name == "vae" and (found / WEIGHTS).is_file()
    assert asked == [(HUB, True), (HUB, 10.0), (HUB, False)]

    def refused(self, name, timeout):
        raise ConnectionError("no route")

    monkeypatch.setattr(Api, "model_info", refused)
    with pytest.raises(ValueError, match=f"the hub, {HUB}: no route"):
        find_vae(HUB, near=tmp_path, cache_dir=tmp_path / "other")
