import pickle

import numpy as np
import pytest
import torch

from fastlatent.caches import frames, simpletuner, tokens
from fastlatent.caches.cache import DamagedEntry, Told
from fastlatent.caches.formats import detect
from fastlatent.config import ConvertConfig, build
from fastlatent.data.latents import LatentDataset
from fastlatent.sources.files import open_files
from fastlatent.sources.unpickle import read_arrays
from fastlatent.workflows.convert import convert

LENGTHS = {"recon/b": 12, "recon/a": 3, "scand/a": 2}  # 12: "10.pt" comes before "2.pt" by its bytes


def poses(count, seed=0):
    random = np.random.default_rng(seed)
    return {"position": np.asfortranarray(random.normal(size=(count, 2))), "yaw": random.normal(size=count)}


def make(root, lengths=None, *, posed=True, wrap=lambda latent: {"latent": latent}, dtype=torch.float32):
    """As the first encoder wrote them: latents by key."""
    generator, latents = torch.Generator().manual_seed(0), {}
    for name, count in (LENGTHS if lengths is None else lengths).items():
        folder = root / name
        folder.mkdir(parents=True)
        for n in range(count):
            latents[f"{name}/{n}"] = torch.randn(4, 2, 3, generator=generator).to(dtype)
            torch.save(wrap(latents[f"{name}/{n}"]), folder / f"{n}.pt")
        if posed:
            (folder / "traj_data.pkl").write_bytes(pickle.dumps(poses(count, len(latents)), protocol=4))
    return latents


def opened(root):
    files = open_files(root)
    return frames.open_cache(files, files.listing(), Told())


def rows(cache):
    return {item.key: cache.row(item, cache.content(item)) for item in cache.items}


def run(source, out, **more):
    return convert(build(ConvertConfig, {}, {"source": str(source), "out": str(out), **more}))


def listed(root):
    return sorted(str(one.relative_to(root)) for one in root.rglob("*") if one.is_file() and one.name[0] != ".")


def test_rows_with_their_poses(tmp_path):
    latents = make(tmp_path)
    (tmp_path / "readme.txt").write_text("x")
    files = open_files(tmp_path)
    assert detect(files, files.listing()) == "frames"
    cache = opened(tmp_path)
    expected = [(f"{name}/{n}", name, n) for name in sorted(LENGTHS) for n in range(LENGTHS[name])]
    assert [(item.key, item.group, item.order) for item in cache.items] == expected
    assert cache.buckets == ((1, 4, 2, 3),) and cache.dtype == "F32"
    assert cache.ignored == {".txt": 1} and cache.left_out == {} and cache.remarks == ()
    assert [one.name for one in cache.fields] == ["position", "yaw"]
    found, position, yaw = rows(cache), {}, {}
    for name in LENGTHS:
        told = pickle.loads((tmp_path / name / "traj_data.pkl").read_bytes())
        for n in range(LENGTHS[name]):
            position[f"{name}/{n}"], yaw[f"{name}/{n}"] = told["position"][n], told["yaw"][n]
    for key, row in found.items():
        assert np.array_equal(row.values, latents[key].numpy()[None])
        assert np.array_equal(row.extras["position"], position[key])
        assert row.extras["yaw"].shape == () and row.extras["yaw"] == yaw[key]


@pytest.mark.parametrize(
    "wrap",
    [lambda x: x, lambda x: {"latent": x}, lambda x: [x], lambda x: x.numpy(), lambda x: x.tolist(), lambda x: (x,)],
    ids=["tensor", "dict", "list", "array", "numbers", "tuple"],
)
def test_what_a_file_may_hold(tmp_path, wrap):
    latents = make(tmp_path, {"t": 2}, wrap=wrap)
    for key, row in rows(opened(tmp_path)).items():
        assert np.array_equal(row.values[0], latents[key].numpy())


def test_an_equal_pickle_is_not_taken_for_equal_values(tmp_path):
    """Known pickles are read without torch.load: values must be the file's own, a view's those that it shows."""
    make(tmp_path, {"t": 3})
    whole = torch.arange(48.0).reshape(2, 4, 2, 3)
    for n in range(2):
        torch.save({"latent": (whole + 100 * n)[1]}, tmp_path / f"t/{n}.pt")  # one storage, twice as long
    torch.save({"latent": torch.arange(24.0).reshape(3, 2, 4).permute(2, 1, 0)}, tmp_path / "t/2.pt")
    found = rows(opened(tmp_path))
    assert [float(found[f"t/{n}"].values.reshape(-1)[0]) for n in range(3)] == [24.0, 124.0, 0.0]
    assert found["t/2"].values[0, 1, 0, 0] == 1.0


def test_the_poses_belong_to_a_row_s_content(tmp_path):
    make(tmp_path, {"t": 2})
    before = opened(tmp_path)
    told = poses(2)
    (tmp_path / "t/traj_data.pkl").write_bytes(pickle.dumps(told | {"yaw": told["yaw"][:, None]}))  # (T, 1) too
    after = opened(tmp_path)
    for one, other in zip(before.items, after.items, strict=True):
        assert one.stamp != other.stamp and before.content(one) != after.content(other)
    assert rows(after)["t/1"].extras["yaw"] == told["yaw"][1]


def test_round_trip_and_the_project_s_own_loader(tmp_path):
    source, made, back = (tmp_path / name for name in ("source", "dataset", "back"))
    latents = make(source, dtype=torch.float16)
    (source / "recon/a/0.pt").rename(source / "recon/a/000.pt")
    report = run(source, made)
    assert (report.format, report.rows, report.left_out) == ("frames", 17, {})
    dataset = LatentDataset(made)
    sample = dataset[16]
    assert dataset.store.key(16) == "scand/a/1" and dataset.store.groups is not None
    raw = latents["scand/a/1"].double() / 0.18215
    assert torch.equal(sample["latents"][0], raw.float()) and sample["position"].dtype == torch.float64
    run(made, back, to="frames")
    assert listed(back) == listed(source)
    for path in listed(source):
        if path.endswith(".pt"):
            ours, theirs = (torch.load(root / path, weights_only=True)["latent"] for root in (back, source))
            assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)
            assert ours.untyped_storage().nbytes() == ours.numel() * 2
    steps = [train_step(back / name, weight) for weight in (torch.zeros(3, 4),) for name in ("recon/b", "scand/a")]
    assert steps == [train_step(source / name, torch.zeros(3, 4)) for name in ("recon/b", "scand/a")]


def test_float32_comes_back_within_one_unit_in_the_last_place(tmp_path):
    latents = make(tmp_path / "source", {"t": 9})
    run(tmp_path / "source", tmp_path / "dataset")
    run(tmp_path / "dataset", tmp_path / "back", to="frames")
    for key, latent in latents.items():
        back = torch.load(tmp_path / f"back/{key}.pt", weights_only=True)["latent"]
        assert torch.equal(back, latent) or ((back.view(torch.int32) - latent.view(torch.int32)).abs() <= 1).all()
    run(tmp_path / "source", tmp_path / "as is", scaling_factor="unknown")
    run(tmp_path / "as is", tmp_path / "same", to="frames", scaling_factor="unknown")
    same = {key: torch.load(tmp_path / f"same/{key}.pt", weights_only=True)["latent"] for key in latents}
    assert all(torch.equal(same[key], latents[key]) for key in latents)


def train_step(folder, weight):
    """A navigation model's dataset in three lines, and a step of regression on it."""
    told = pickle.loads((folder / "traj_data.pkl").read_bytes())
    assert told["position"].dtype == told["yaw"].dtype == np.float64
    x = torch.stack([torch.load(folder / f"{n}.pt", weights_only=True)["latent"] for n in range(len(told["yaw"]))])
    y = torch.from_numpy(np.concatenate([told["position"], told["yaw"][:, None]], 1)).float()
    weight = weight.clone().requires_grad_()
    loss = (x.float().mean((2, 3)) @ weight.T - y).square().mean()
    loss.backward()
    return loss.item(), weight.grad.tolist()


def test_the_pickle_that_is_written():
    arrays = {"position": np.arange(6.0).reshape(3, 2), "yaw": np.array([0.1, -2.0, np.pi])}
    data = frames.pickled(arrays)
    assert data[:2] == b"\x80\x04" and b"numpy._core" not in data
    for told in (pickle.loads(data), read_arrays(data)):
        assert all(np.array_equal(told[name], arrays[name]) for name in arrays) and list(told) == list(arrays)
    assert pickle.loads(data)["yaw"].flags.writeable


@pytest.mark.parametrize(
    ("break_it", "why"),
    [
        (lambda folder: (folder / "1.pt").unlink(), "frame 1 is missing"),
        (lambda folder: (folder / "00.pt").write_bytes((folder / "0.pt").read_bytes()), "two frames 0"),
        (lambda folder: (folder / "traj_data.pkl").unlink(), "no traj_data.pkl"),
        (lambda folder: (folder / "traj_data.pkl").write_bytes(pickle.dumps(poses(4))), "3 frames, but 4 poses"),
        (lambda folder: (folder / "traj_data.pkl").write_bytes(pickle.dumps(print)), "traj_data.pkl: "),
        (lambda folder: (folder / "traj_data.pkl").write_bytes(b"\x80\x04"), "traj_data.pkl: "),
    ],
)
def test_a_trajectory_is_taken_whole_or_named(tmp_path, break_it, why):
    make(tmp_path, {"bad": 3, "good": 2})
    break_it(tmp_path / "bad")
    cache = opened(tmp_path)
    assert [item.key for item in cache.items] == ["good/0", "good/1"]
    assert list(cache.left_out) == [str(tmp_path / "bad")] and why in cache.left_out[str(tmp_path / "bad")]


def test_damaged_frames_are_named(tmp_path):
    latents = make(tmp_path, {"t": 6})
    whole = (tmp_path / "t/1.pt").read_bytes()
    (tmp_path / "t/1.pt").write_bytes(whole[: len(whole) // 2])
    torch.save({"latent": torch.zeros(4, 3, 2)}, tmp_path / "t/2.pt")
    torch.save({"latent": torch.zeros(4, 2, 3, dtype=torch.float64)}, tmp_path / "t/3.pt")
    (tmp_path / "t/4.pt").write_bytes(pickle.dumps(print))
    values = latents["t/1"].numpy().tobytes()
    (tmp_path / "t/5.pt").write_bytes(whole.replace(values, b"\0" + values[1:]))
    cache = opened(tmp_path)
    assert cache.row(cache.items[0], cache.content(cache.items[0])).values.shape == (1, 4, 2, 3)
    reasons = ("truncated", r"\[1, 4, 2, 3\]", "float64", "torch.save", "checksum")
    for item, why in zip(cache.items[1:], reasons, strict=True):
        with pytest.raises(DamagedEntry, match=why):
            cache.row(item, cache.content(item))


def test_no_poses_at_all_and_more_than_poses(tmp_path):
    make(tmp_path / "none", {"t": 2}, posed=False)
    cache = opened(tmp_path / "none")
    assert cache.fields == () and "no position and yaw" in cache.remarks[0]
    assert rows(cache)["t/1"].extras == {}
    make(tmp_path / "more", {"t": 2}, wrap=lambda latent: {"latent": latent, "seed": 1})
    (tmp_path / "more/t/traj_data.pkl").write_bytes(pickle.dumps(poses(2) | {"speed": np.zeros(2)}))
    remarks = opened(tmp_path / "more").remarks
    assert "more than the latent" in remarks[0] and "speed (1 trajectories)" in remarks[1]


def test_detection(tmp_path):
    """Numbers are names of frames, of videos and, with hash_filenames off, of images."""
    made = {
        "frames": {"a/0": 3, "a/1": 3},
        "tokens": {"train/78687": 2, "train/42": 2},
        "simpletuner": {"a/0": 3, "a/x": 3, "7": 3},
    }
    for name, inside in made.items():
        for key, axes in inside.items():
            path = tmp_path / name / f"{key}.pt"
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(torch.zeros(2, 3, 4)[(0,) * (3 - axes)].clone(), path)
        (tmp_path / name / "step_000.pt").write_bytes(b"")  # of a video's steps
        files = open_files(tmp_path / name)
        claimed = {module.__name__.rpartition(".")[2]: module.claims(files, files.listing()) for module in MODULES}
        assert claimed == {other: len(inside) * (other == name) for other in made}
    files = open_files(tmp_path)
    with pytest.raises(ValueError, match="expected one format, got frames"):
        detect(files, files.listing())


MODULES = (frames, tokens, simpletuner)


def test_what_frames_cannot_hold(tmp_path):
    make(tmp_path / "source", {"t": 2})
    with pytest.raises(ValueError, match="convert the folder above"):
        opened(tmp_path / "source/t")
    torch.save(torch.zeros(4, 2, 3), tmp_path / "x.pt")
    run(tmp_path / "x.pt", tmp_path / "one", scaling_factor="1")
    with pytest.raises(ValueError, match="expected rows of trajectories"):
        run(tmp_path / "one", tmp_path / "back", to="frames")
