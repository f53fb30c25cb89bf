import json

import numpy as np
import pytest
import torch

from fastlatent.caches import tokens
from fastlatent.caches.cache import DamagedEntry, Told
from fastlatent.config import ConvertConfig, build
from fastlatent.data.latents import LatentDataset
from fastlatent.sources.files import open_files
from fastlatent.workflows.convert import convert

IDS = ("78687", "42", "100904", "a.b")


def make(root, ids=IDS, lengths=(6,), dtype=torch.bfloat16, said=None):
    """As the first script cached them: token matrices (n, 4) by key."""
    generator, matrices = torch.Generator().manual_seed(0), {}
    for i, id in enumerate(ids):
        matrices[id] = torch.randn(lengths[i % len(lengths)], 4, generator=generator).to(dtype)
        (root / id).parent.mkdir(parents=True, exist_ok=True)
        torch.save(matrices[id], root / f"{id}.pt")
    if said is not None:
        (root / "metadata.json").write_text(said if isinstance(said, str) else json.dumps(said))
    return matrices


def opened(root):
    files = open_files(root)
    return tokens.open_cache(files, files.listing(), Told())


def values(cache, item):
    found = torch.from_numpy(cache.row(item, cache.content(item)).values.copy())
    return found.view(torch.bfloat16) if cache.dtype == "BF16" else found


def run(source, out, **more):
    return convert(build(ConvertConfig, {}, {"source": str(source), "out": str(out), **more}))


@pytest.mark.parametrize(("lengths", "bucket"), [((6,), (1, 6, 4)), ((6, 3), (1, -1, 4))])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rows(tmp_path, lengths, bucket, dtype):
    matrices = make(tmp_path, lengths=lengths, dtype=dtype)
    cache = opened(tmp_path)
    assert [item.key for item in cache.items] == sorted(IDS) and cache.buckets == (bucket,)
    assert cache.payload == "tokens" and tokens.claims(open_files(tmp_path), open_files(tmp_path).listing()) == 4
    for item in cache.items:
        assert torch.equal(values(cache, item)[0], matrices[item.key])
    assert any("no metadata.json" in line for line in cache.remarks)
    assert any("ids are the files' names" in line for line in cache.remarks)


@pytest.mark.parametrize("lengths", [(6,), (6, 3)], ids=["equal", "ragged"])
def test_round_trip_and_the_project_s_own_loader(tmp_path, lengths):
    source, made, back = (tmp_path / name for name in ("cache", "dataset", "back"))
    ids = ("train/78687", "train/42", "validation/7")
    matrices = make(source, ids, lengths)
    said = {"video_ids": ["78687", "42"], "num_videos": 2, "teacher": "videomaev2-base"}
    (source / "train/metadata.json").write_text(json.dumps(said))
    (source / "validation/metadata.json").write_text(json.dumps([7]))  # a number and no object
    report = run(source, made)
    assert (report.format, report.rows, report.left_out) == ("tokens", 3, {})
    dataset = LatentDataset(made)
    for i in range(3):
        found = dataset[i]["tokens"]
        found = found if found.ndim == 2 else found[0]
        assert torch.equal(found, matrices[dataset.store.key(i)])
    run(made, back, to="tokens")
    assert json.loads((back / "train/metadata.json").read_text()) == said
    assert json.loads((back / "validation/metadata.json").read_text()) == [7]
    assert distill(back / "train") == distill(source / "train")
    assert torch.equal(torch.load(back / "validation/7.pt", weights_only=True), matrices["validation/7"])
    assert sum(one.suffix == ".pt" for one in back.rglob("*")) == 3


def distill(folder):
    """A cached teacher's dataset, and two steps of a student's regression on it."""
    ids = json.loads((folder / "metadata.json").read_text())["video_ids"]
    student = torch.full((4, 4), 0.1, requires_grad=True)
    losses = []
    for id in ids:
        teacher = torch.load(folder / f"{id}.pt", map_location="cpu", weights_only=True)
        assert teacher.untyped_storage().nbytes() == teacher.numel() * teacher.element_size()
        loss = (torch.ones(len(teacher), 4) @ student - teacher.float()).abs().mean()
        (gradient,) = torch.autograd.grad(loss, student)
        student = (student - 0.1 * gradient).detach().requires_grad_()
        losses.append(loss.item())
    return losses


def test_metadata_names_what_is_missing(tmp_path):
    said = {"ids": [{"id": 42}, {"id": "78687"}, {"id": "5"}, {"video_id": "6"}], "num_videos": 4}
    make(tmp_path, ("78687", "42", "8"), said=said)
    cache = opened(tmp_path)
    assert list(cache.left_out) == [str(tmp_path / "5.pt"), str(tmp_path / "6.pt")]
    assert "metadata.json lists it" in cache.left_out[str(tmp_path / "5.pt")]
    assert any("num_videos is 4, there are 3 files" in line for line in cache.remarks)
    assert any("1 files are not in its list of 4" in line for line in cache.remarks)
    assert tokens.merged(cache.notes["metadata"]["metadata.json"], ["42", "78687", "8"]) == {
        "ids": [{"id": 42}, {"id": "78687"}, "8"],
        "num_videos": 3,
    }


@pytest.mark.parametrize("said", ["{", "[NaN]", '{"ids": [], "ids": []}', "\xff", "[" * 100_000, "7", '"x"', "[[]]"])
def test_metadata_of_other_kinds(tmp_path, said):
    make(tmp_path, said=said)
    cache = opened(tmp_path)
    assert len(cache.items) == 4 and cache.left_out == {}


def test_large_metadata_is_made_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(tokens, "MAX_KEPT", 10)
    make(tmp_path, ("1", "2"), said={"videos": [{"id": "1", "frames": [0, 4]}, {"id": "2"}], "fps": 12})
    cache = opened(tmp_path)
    assert cache.notes["metadata"] == {"metadata.json": {"videos": [], "fps": 12}}
    assert any("ids alone are kept" in line for line in cache.remarks)
    assert tokens.merged({"videos": [], "fps": 12}, ["1", "2"]) == {"videos": ["1", "2"], "fps": 12}
    monkeypatch.setattr(tokens, "MAX_METADATA", 10)
    assert any("at most 10 bytes" in line for line in opened(tmp_path).remarks)


def test_damaged_files_are_named(tmp_path):
    make(tmp_path)
    (tmp_path / "1.pt").write_bytes((tmp_path / "42.pt").read_bytes()[:300])
    torch.save(torch.zeros(6, 5, dtype=torch.bfloat16), tmp_path / "2.pt")  # another teacher's
    torch.save(torch.zeros(2, 6, 4, dtype=torch.bfloat16), tmp_path / "3.pt")
    torch.save(torch.zeros(6, 4, dtype=torch.float16), tmp_path / "4.pt")
    torch.save(torch.zeros(6, 4, dtype=torch.int64), tmp_path / "5.pt")
    cache = opened(tmp_path)
    assert cache.buckets == ((1, 6, 4),) and len(cache.items) == 9
    bad = [item for item in cache.items if item.key in "12345"]
    for item, why in zip(bad, ("torch.save", "6, 5", "matrix", "float16", "int64"), strict=True):
        with pytest.raises(DamagedEntry, match=why):
            cache.row(item, cache.content(item))
    report = run(tmp_path, tmp_path.parent / f"{tmp_path.name}-out", max_errors=5)
    assert report.rows == 4 and set(report.left_out) == set("12345")


def test_what_tokens_cannot_hold(tmp_path):
    (tmp_path / "x.pt").write_bytes(b"PK")
    with pytest.raises(ValueError, match="got none that can be read"):
        opened(tmp_path)
    outgoing = type("Outgoing", (), {"shapes": ((2, 6, 4),), "count": 1, "notes": {}})
    with pytest.raises(ValueError, match="mirrored"):
        next(tokens.write(outgoing, tmp_path))


def test_numpy_does_not_copy_what_is_read(tmp_path):
    make(tmp_path, ("1", "2"), dtype=torch.float32)
    cache = opened(tmp_path)
    rows = [cache.row(item, cache.content(item)).values for item in cache.items]
    assert not rows[1].flags.writeable and isinstance(rows[1], np.ndarray)  # a view on the file's bytes
