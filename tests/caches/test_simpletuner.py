import gzip
import hashlib
import io
import json

import pytest
import torch

from fastlatent.caches import simpletuner
from fastlatent.caches.cache import DamagedEntry, Told
from fastlatent.config import ConvertConfig, build
from fastlatent.data import packed_files
from fastlatent.data.latents import LatentDataset
from fastlatent.sources.files import open_files
from fastlatent.workflows.convert import convert

IMAGES = {"cat/a.png": (4, 2, 3), "cat/b.png": (4, 3, 2), "dog/é.webp": (4, 2, 3), "dog/sub/c.png": (4, 2, 3)}


def cached_name(image):
    """Where SimpleTuner looks for an image's latents: folders stay, the name without its suffix is hashed."""
    folder, _, name = image.rpartition("/")
    return f"{folder}/{hashlib.sha256(name.rpartition('.')[0].encode()).hexdigest()}.pt"


def save(path, value, zipped=False):
    path.parent.mkdir(parents=True, exist_ok=True)
    stream = io.BytesIO()
    torch.save(value, stream)
    path.write_bytes(gzip.compress(stream.getvalue()) if zipped else stream.getvalue())


def load(path, zipped=False):
    """SimpleTuner's: the file, unzipped if its backend says so, through torch.load."""
    data = path.read_bytes()
    value = torch.load(io.BytesIO(gzip.decompress(data) if zipped else data), map_location="cpu", weights_only=True)
    return value["latents"] if isinstance(value, dict) else value


def make(root, zipped=False, dtype=torch.bfloat16, wrap=lambda latent, i: latent, images=IMAGES):
    generator, latents = torch.Generator().manual_seed(0), {}
    for i, (image, shape) in enumerate(images.items()):
        latents[image] = torch.randn(shape, generator=generator).to(dtype)
        save(root / cached_name(image), wrap(latents[image], i), zipped)
    return latents


def opened(root):
    files = open_files(root)
    return simpletuner.open_cache(files, files.listing(), Told())


def run(source, out, **more):
    return convert(build(ConvertConfig, {}, {"source": str(source), "out": str(out), **more}))


def listed(root):
    return {str(one.relative_to(root)) for one in root.rglob("*") if one.is_file() and one.name[0] != "."}


def train(root, zipped):
    """A step per bucket, as a loader that knows the images finds their latents."""
    weight, losses = torch.full((4,), 0.5, requires_grad=True), []
    for shape in sorted(set(IMAGES.values())):
        batch = [load(root / cached_name(image), zipped) for image, size in IMAGES.items() if size == shape]
        loss = (torch.stack(batch).float().mean((2, 3)) - weight).square().mean()
        losses += [loss.item(), *torch.autograd.grad(loss, weight)[0].tolist()]
    return losses


@pytest.mark.parametrize("zipped", [False, True], ids=["plain", "gzip"])
def test_round_trip_and_the_project_s_own_loader(tmp_path, zipped):
    source, made, back = (tmp_path / name for name in ("cache", "dataset", "back"))
    latents = make(source, zipped)
    notes = {"cat/a.png": {"original_size": [24, 16], "crop_coordinates": [0, 0]}}
    (source / "aspect_ratio_bucket_metadata_x.json").write_text(json.dumps(notes, indent=1))
    (source / "readme.txt").write_text("x")
    with pytest.raises(ValueError, match="say --vae PATH"):
        run(source, made)
    report = run(source, made, scaling_factor="unknown")
    assert (report.format, report.rows, report.left_out) == ("simpletuner", 4, {})
    dataset = LatentDataset(made)
    assert dataset.store.classes == ["cat", "dog"] and {one.shape for one in dataset.store.buckets} == {
        (1, 4, 2, 3),
        (1, 4, 3, 2),
    }
    by_key = {cached_name(image).removesuffix(".pt"): latent for image, latent in latents.items()}
    for i in range(4):
        assert torch.equal(dataset[i]["latents"][0], by_key[dataset.store.key(i)])
        assert dataset.store.classes[dataset[i]["label"]] == dataset.store.key(i).partition("/")[0]
    run(made, back, to="simpletuner", scaling_factor="unknown")
    assert listed(back) == listed(source) - {"readme.txt"}
    for image, latent in latents.items():
        assert torch.equal(load(back / cached_name(image), zipped), latent)
    name = "aspect_ratio_bucket_metadata_x.json"
    assert (back / name).read_bytes() == (source / name).read_bytes()
    assert train(back, zipped) == train(source, zipped)


def test_buckets_are_told_by_the_files_headers(tmp_path):
    make(tmp_path)
    files = open_files(tmp_path)
    read, ranges = [], []
    whole, part = files.read, files.read_range
    object.__setattr__(files, "read", lambda path: read.append(path) or whole(path))
    object.__setattr__(files, "read_range", lambda *place: ranges.append(place) or part(*place))
    cache = simpletuner.open_cache(files, files.listing(), Told())
    assert cache.buckets == ((1, 4, 2, 3), (1, 4, 3, 2)) and cache.facts == {"gzip": False, "key": ""}
    assert 2 <= len(read) < 4 + 2 and len(ranges) == 5  # a pickle of each shape, by up to two threads; and the gzip
    assert [item.key for item in cache.items] == sorted(item.key for item in cache.items)


def test_a_dict_with_more_comes_back_as_it_was(tmp_path):
    """Sounds: [C, L] with lengths and lyrics; other entries of a dict are kept in the dataset's `rest`."""
    more = [{}, {"lyrics": ["la", "lä"], "latent_lengths": torch.tensor([7, 8])}, {"seconds": 1.5, "mask": None}]
    source, made, back = (tmp_path / name for name in ("cache", "dataset", "back"))
    images = {f"s/{i}.wav": (4, 2, 5) for i in range(3)}
    latents = make(source, wrap=lambda latent, i: {"latents": latent, **more[i]}, images=images)
    run(source, made, scaling_factor="unknown")
    run(made, back, to="simpletuner", scaling_factor="unknown")
    for i, (image, latent) in enumerate(latents.items()):
        value = torch.load(back / cached_name(image), weights_only=True)
        assert torch.equal(value.pop("latents"), latent) and set(value) == set(more[i])
        lengths = value.pop("latent_lengths", None), more[i].pop("latent_lengths", None)
        assert value == more[i] and (lengths == (None, None) or torch.equal(*lengths))


def test_a_tensor_of_the_rest_may_be_a_view_of_the_latent(tmp_path):
    for i in range(3):
        latent = torch.full((4, 2, 2), float(i))
        save(tmp_path / f"x{i}.pt", {"latents": latent, "first": latent[0]})
    cache = opened(tmp_path)
    rests = [cache.row(item, cache.content(item)).extras["rest"] for item in cache.items]
    firsts = [simpletuner._rest(rest)["first"][0, 0].item() for rest in rests]
    assert firsts == [0.0, 1.0, 2.0]


def test_videos(tmp_path):
    for i, steps in enumerate((1, 3)):
        save(tmp_path / f"clip{i}.pt", torch.full((16, steps, 2, 2), float(i)))
    cache = opened(tmp_path)
    assert cache.buckets == ((1, 16, 1, 2, 2), (1, 16, 3, 2, 2)) and cache.classes == []
    assert cache.row(cache.items[1], cache.content(cache.items[1])).values.max() == 1


def test_damaged_files_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(packed_files, "MAX_UNPACKED", 1 << 20)
    make(tmp_path)
    whole = (tmp_path / cached_name("cat/a.png")).read_bytes()
    bad = {
        "0": (whole[:-9], "truncated"),
        "1": (gzip.compress(whole)[:-9], "gzip stream is truncated"),
        "2": (b"", "torch.save"),
        "3": (gzip.compress(bytes(2 << 20)), "unpacked"),
    }
    for name, (data, _) in bad.items():
        (tmp_path / f"cat/{name}.pt").write_bytes(data)
    others = {
        "4": (torch.zeros(8, 2, 3, dtype=torch.bfloat16), "axes"),
        "5": (torch.zeros(4, 2, 3), "float32"),
        "6": (torch.zeros(4, 5, 3, 2, dtype=torch.bfloat16), "axes"),
        "7": ({"prompt_embeds": torch.zeros(4, 2), "mask": torch.zeros(4, 2)}, "a dict of prompt_embeds"),
        "8": (torch.tensor(1.0), "axes"),
    }
    for name, (value, _) in others.items():
        save(tmp_path / f"cat/{name}.pt", value)
    cache = opened(tmp_path)
    assert cache.buckets == ((1, 4, 2, 3), (1, 4, 3, 2))
    for name, (_, why) in (bad | others).items():
        (item,) = [item for item in cache.items if item.key == f"cat/{name}"]
        with pytest.raises(DamagedEntry, match=why):
            cache.row(item, cache.content(item))
    report = run(tmp_path, tmp_path.parent / f"{tmp_path.name}-out", scaling_factor="unknown", max_errors=9)
    assert report.rows == 4 and set(report.left_out) == {f"cat/{i}" for i in range(9)}


def test_what_cannot_be_kept_is_said(tmp_path):
    save(tmp_path / "a.pt", {"latents": torch.zeros(4, 2, 2), "x": [torch.zeros(1)]})
    save(tmp_path / "b.pt", torch.zeros(4, 2, 2))
    (tmp_path / "aspect_ratio_bucket_indices_x.json").write_bytes(bytes(simpletuner.MAX_NOTED + 1))
    cache = opened(tmp_path)
    assert "1,048,577 bytes" in cache.remarks[0] and cache.notes == {}
    with pytest.raises(DamagedEntry, match="beside the latent, got x"):
        cache.row(cache.items[0], cache.content(cache.items[0]))
    (tmp_path / "other").mkdir()
    with pytest.raises(ValueError, match="got none that can be read"):
        opened(tmp_path / "other")
